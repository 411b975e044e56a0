"""Progress: what is drawn and when, the estimate of the time left, and that it can never hurt a run."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdstudy import progress
from kdstudy.progress import FileReporter, Relay, Reporter, TerminalReporter, format_seconds, reporter


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


class Recorder(Reporter):
    def __init__(self, interval=0.0):
        super().__init__(interval)
        self.seen = []

    def _show(self, now, done, total, text):
        self.seen.append((done, total, text))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (45, "45 s"), (59.7, "1 min 0 s"), (80, "1 min 20 s"), (7530, "2 h 5 min"), (273_700, "3 d 4 h")],
)
def test_durations_are_given_in_their_two_largest_units(seconds, text):
    assert format_seconds(seconds) == text


def test_time_left_leaves_out_what_was_finished_before_the_session(clock):
    stream = io.StringIO()
    terminal = TerminalReporter("teacher@digits", stream, interval=0)
    terminal.update(100, 400, "kd seed 1 epoch 1/30")
    clock.now += 20
    terminal.update(148, 400, "kd seed 1 epoch 12/30")  # 2.4 a second, 252 to go
    clock.now += 105
    terminal.update(400, 400, "")
    assert stream.getvalue().splitlines() == [
        "teacher@digits   25 %  kd seed 1 epoch 1/30",
        "teacher@digits   37 %  kd seed 1 epoch 12/30  1 min 45 s left",
        "teacher@digits  100 %  took 2 min 5 s",
    ]


def test_the_estimate_starts_anew_with_the_next_loop(clock):
    stream = io.StringIO()
    terminal = TerminalReporter("", stream, interval=0)
    for done in (0, 10, 0, 1):
        terminal.update(done, 10, "")
        clock.now += 5
    assert stream.getvalue().splitlines()[-2:] == ["  0 %", " 10 %  45 s left"]


def test_plain_lines_come_every_thirty_seconds_and_at_the_end(clock):
    stream = io.StringIO()
    with TerminalReporter("x", stream) as terminal:
        for second in range(75):
            terminal.update(second, 74, "")
            clock.now += 1
    shares = [int(line.split()[1]) for line in stream.getvalue().splitlines()]
    assert shares == [0, 40, 81, 100]


def test_the_last_update_is_passed_on_once():
    with Recorder(interval=3600) as recorder:
        for done in range(5):
            recorder.update(done, 4)
        recorder.close()
    assert recorder.seen == [(0, 4, ""), (4, 4, "")]


def test_a_throttled_update_is_cheap():
    recorder = Recorder(interval=3600)
    start = time.process_time()
    for done in range(20_000):
        recorder.update(done, 20_000, "text")
    assert (time.process_time() - start) / 20_000 < 20e-6


def test_a_terminal_gets_one_line_that_moves_and_fits():
    master, slave = pty.openpty()
    with open(slave, "w") as stream, TerminalReporter("teacher@digits", stream, interval=0) as terminal:
        terminal.update(1, 4, "first")
        terminal.update(2, 4, "a very long text\nover two lines " * 20)
        terminal.close()
        drawn = ""
        while not drawn.endswith("\n"):  # what was written arrives in pieces
            drawn += os.read(master, 65536).decode()
    os.close(master)
    start, first, second = drawn.split("\r\x1b[K")
    assert start == ""
    assert first == "teacher@digits   25 %  [=====               ]  first"
    assert "[==========          ]  a very long text over two lines" in second
    assert len(second.rstrip("\r\n")) == 79
    assert second.endswith("\r\n") and second.count("\n") == 1


def test_a_full_disk_or_a_vanished_file_does_not_reach_the_training(tmp_path):
    for path in (Path("/dev/full"), tmp_path / "gone"):
        with FileReporter(path, interval=0) as file:
            file.update(1, 2, "text")
    assert not (tmp_path / "gone").exists()


def test_a_closed_terminal_or_senseless_numbers_do_not_reach_the_training():
    stream = io.StringIO()
    with TerminalReporter("x", stream, interval=0) as terminal:
        terminal.update(0, 0, "nothing to do")
        terminal.update(float("nan"), 3, "")
        terminal.update(5, 3, "more than all")
        assert [line[:8] for line in stream.getvalue().splitlines()] == ["x    0 %", "x  100 %"]
        stream.close()
        terminal.update(1, 3, "")


def test_the_reporter_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv(progress.VARIABLE, raising=False)
    assert isinstance(reporter(), TerminalReporter)
    monkeypatch.setenv(progress.VARIABLE, str(tmp_path / "progress"))
    assert isinstance(reporter(), FileReporter)


CHILD = """
import os, signal
from kdstudy.progress import reporter
with reporter() as r:
    r.update(1, 3, "first")
    r.update(3, 3, "last")
    r.close()
    with open(os.environ["KDSTUDY_PROGRESS"], "a") as file:
        file.write('not json\\n[1]\\n{"done": 3, "to')
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_relay_draws_what_another_process_reports_even_if_it_dies_in_the_middle_of_a_line():
    recorder = Recorder()
    with Relay("label", recorder) as relay:
        environment = os.environ | relay.environment
        (path,) = relay.environment.values()
        child = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True)
    assert child.returncode == -signal.SIGKILL
    assert child.stdout == child.stderr == b""
    assert recorder.seen == [(1, 3, "first"), (3, 3, "last")]
    assert not Path(path).exists()


def test_the_relay_draws_while_the_work_goes_on_and_outlives_its_file():
    recorder = Recorder()
    with Relay("label", recorder) as relay:
        (path,) = map(Path, relay.environment.values())
        path.write_text(json.dumps({"done": 1, "total": 2, "text": "now"}) + "\n")
        deadline = time.monotonic() + 10
        while not recorder.seen and time.monotonic() < deadline:
            time.sleep(0.01)
        assert recorder.seen == [(1, 2, "now")]
        path.unlink()


def test_the_command_line_stays_quick():
    code = "import sys, kdstudy.progress, kdstudy.notebook; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "pandas", "papermill", "nbformat", "tqdm"} & set(modules)
