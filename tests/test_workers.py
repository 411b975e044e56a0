"""Work side by side: all of it is done, an error or a stop ends it at once, and nobody outlives the parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdstudy.workers import WorkerDied, side_by_side


def square(folder: str, seat: str, task: int, tell, should_stop) -> None:
    tell(1.0, f"task {task}")
    Path(folder, str(task)).write_text(f"{task**2} {os.getpid()}")


def later_than_its_group(folder: str, seat: str, task: int, tell, should_stop) -> None:
    assert task < 3 or (Path(folder, "1").exists() and Path(folder, "2").exists())
    time.sleep(0.2 * (task == 1))
    Path(folder, str(task)).touch()


def fail_on_two(folder: str, seat: str, task: int, tell, should_stop) -> None:
    if task == 2:
        raise ValueError("two is refused")
    while not should_stop():
        time.sleep(0.01)
    Path(folder, f"stopped {task}").touch()


def wait_for_ever(folder: str, seat: str, task: int, tell, should_stop) -> None:
    Path(folder, f"pid {os.getpid()}").touch()
    time.sleep(600)


def say_the_seat(folder: str, seat: str, task: int, tell, should_stop) -> None:
    Path(folder, f"{task} {seat} {os.getpid()}").touch()
    while len(list(Path(folder).iterdir())) < 2 and not should_stop():
        time.sleep(0.01)


def die_at_first(folder: str, seat: str, task: int, tell, should_stop) -> None:
    with open(Path(folder, f"begun {task}"), "a") as file:
        file.write("x")
    if task == 2 and len(Path(folder, "begun 2").read_text()) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    Path(folder, f"done {task}").touch()


def die_always(folder: str, seat: str, task: int, tell, should_stop) -> None:
    with open(Path(folder, f"begun {task}"), "a") as file:
        file.write("x")
    os.kill(os.getpid(), signal.SIGKILL)


def side(work, folder: Path, groups, seats=("a", "b"), tell=lambda *_: None, should_stop=lambda: False) -> None:
    side_by_side(work, str(folder), groups, seats, tell=tell, should_stop=should_stop)


def test_every_task_is_done_in_another_process(tmp_path):
    told = []
    side(square, tmp_path, [[3, 4], [5]], tell=lambda *what: told.append(what))
    results = [(tmp_path / str(task)).read_text().split() for task in (3, 4, 5)]
    assert [int(value) for value, _ in results] == [9, 16, 25]
    assert str(os.getpid()) not in {pid for _, pid in results}
    assert set(told) <= {(3, 1.0, "task 3"), (4, 1.0, "task 4"), (5, 1.0, "task 5")}


def test_every_worker_has_a_seat_of_its_own(tmp_path):
    side(say_the_seat, tmp_path, [[1, 2]], ["cuda:0", "cuda:1"])
    names = [path.name.split() for path in tmp_path.iterdir()]
    assert {seat for _, seat, _ in names} == {"cuda:0", "cuda:1"} and len({pid for *_, pid in names}) == 2


def test_a_group_begins_when_the_one_before_is_done(tmp_path):
    side(later_than_its_group, tmp_path, [[1, 2], [], [3, 4]])
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "3", "4"}


def test_an_error_stops_the_others_and_is_raised(tmp_path):
    with pytest.raises(ValueError, match="two is refused"):
        side(fail_on_two, tmp_path, [[1, 2]])
    assert (tmp_path / "stopped 1").exists()


def test_a_wish_to_stop_reaches_the_workers(tmp_path):
    side(fail_on_two, tmp_path, [[1, 3]], should_stop=lambda: True)
    assert {path.name for path in tmp_path.iterdir()} == {"stopped 1", "stopped 3"}


def test_a_worker_that_dies_is_replaced_and_what_was_done_stays_done(tmp_path):
    with pytest.warns(UserWarning, match="a worker process died .* by 1 at a time"):
        side(die_at_first, tmp_path, [[1], [2], [3, 4]], ["only"])
    begun = {path.name: path.read_text() for path in tmp_path.glob("begun *")}
    assert begun == {"begun 1": "x", "begun 2": "xx", "begun 3": "x", "begun 4": "x"}
    assert len(list(tmp_path.glob("done *"))) == 4


def test_workers_that_always_die_cost_seats_until_none_is_left(tmp_path):
    with (
        pytest.warns(UserWarning) as warned,
        pytest.raises(WorkerDied, match=r"again and again, at 7, 8, 9, \.\.\.; what"),
    ):
        side(die_always, tmp_path, [[7, 8, 9, 10]], ["a", "b", "c", "d"])
    assert [str(warning.message).rpartition("by ")[2] for warning in warned] == [f"{n} at a time" for n in (4, 2, 1)]


def test_workers_die_with_their_parent(tmp_path):
    program = (
        "from test_workers import wait_for_ever\nfrom kdstudy.workers import side_by_side\n"
        f"if __name__ == '__main__':\n    side_by_side(wait_for_ever, {str(tmp_path)!r}, [[1, 2]], 'ab', "
        "tell=print, should_stop=lambda: False)"
    )
    script = tmp_path / "parent.py"
    script.write_text(program)
    parent = subprocess.Popen([sys.executable, script], env=here())
    wait_until(lambda: len(workers(tmp_path)) == 2)
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers(tmp_path)))


IN_BETWEEN = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"
FOLLOWER = """
import sys, time
from pathlib import Path
from kdstudy.workers import end_with_parent
end_with_parent()
Path(sys.argv[1], f"pid {__import__('os').getpid()}").touch()
time.sleep(600)
"""


def test_whoever_follows_its_parent_ends_with_it(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", IN_BETWEEN, "-c", FOLLOWER, str(tmp_path)],
        env=here(),
    )
    wait_until(lambda: len(workers(tmp_path)) == 1)
    parent.kill()
    parent.wait()
    wait_until(lambda: not Path(f"/proc/{workers(tmp_path)[0]}").exists(), seconds=10)


def here() -> dict[str, str]:
    root = Path(__file__).parent
    return os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root.parent}"}


def workers(folder: Path) -> list[str]:
    return [path.name.split()[1] for path in folder.glob("pid *")]


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not come to pass"
        time.sleep(0.05)
