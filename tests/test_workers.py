"""Work side by side: all of it is done, an error or a stop ends it at once, and nobody outlives the parent."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdstudy.workers import side_by_side


def square(folder: str, task: int, tell, should_stop) -> None:
    tell(1.0, f"task {task}")
    Path(folder, str(task)).write_text(f"{task**2} {os.getpid()}")


def later_than_its_group(folder: str, task: int, tell, should_stop) -> None:
    assert task < 3 or (Path(folder, "1").exists() and Path(folder, "2").exists())
    time.sleep(0.2 * (task == 1))
    Path(folder, str(task)).touch()


def fail_on_two(folder: str, task: int, tell, should_stop) -> None:
    if task == 2:
        raise ValueError("two is refused")
    while not should_stop():
        time.sleep(0.01)
    Path(folder, f"stopped {task}").touch()


def wait_for_ever(folder: str, task: int, tell, should_stop) -> None:
    Path(folder, f"pid {os.getpid()}").touch()
    time.sleep(600)


def test_every_task_is_done_in_another_process(tmp_path):
    told = []
    side_by_side(
        square, str(tmp_path), [[3, 4], [5]], 2, tell=lambda *what: told.append(what), should_stop=lambda: False
    )
    results = [(tmp_path / str(task)).read_text().split() for task in (3, 4, 5)]
    assert [int(value) for value, _ in results] == [9, 16, 25]
    assert str(os.getpid()) not in {pid for _, pid in results}
    assert set(told) <= {(3, 1.0, "task 3"), (4, 1.0, "task 4"), (5, 1.0, "task 5")}


def test_a_group_begins_when_the_one_before_is_done(tmp_path):
    groups = [[1, 2], [3, 4]]
    side_by_side(later_than_its_group, str(tmp_path), groups, 2, tell=lambda *_: None, should_stop=lambda: False)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "3", "4"}


def test_an_error_stops_the_others_and_is_raised(tmp_path):
    with pytest.raises(ValueError, match="two is refused"):
        side_by_side(fail_on_two, str(tmp_path), [[1, 2]], 2, tell=lambda *_: None, should_stop=lambda: False)
    assert (tmp_path / "stopped 1").exists()


def test_a_wish_to_stop_reaches_the_workers(tmp_path):
    side_by_side(fail_on_two, str(tmp_path), [[1, 3]], 2, tell=lambda *_: None, should_stop=lambda: True)
    assert {path.name for path in tmp_path.iterdir()} == {"stopped 1", "stopped 3"}


def test_workers_die_with_their_parent(tmp_path):
    program = (
        "from test_workers import wait_for_ever\nfrom kdstudy.workers import side_by_side\n"
        f"if __name__ == '__main__':\n    side_by_side(wait_for_ever, {str(tmp_path)!r}, [[1, 2]], 2, "
        "tell=print, should_stop=lambda: False)"
    )
    script = tmp_path / "parent.py"
    script.write_text(program)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    parent = subprocess.Popen([sys.executable, script], env=environment)
    wait_until(lambda: len(workers(tmp_path)) == 2)
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers(tmp_path)))


def workers(folder: Path) -> list[str]:
    return [path.name.split()[1] for path in folder.glob("pid *")]


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not come to pass"
        time.sleep(0.05)
