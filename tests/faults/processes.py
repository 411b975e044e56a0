"""A command and all that it starts, which are found, killed and waited for wherever they have gone."""

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

VARIABLE = "KDSTUDY_MARK"
POLL_SECONDS = 0.05
GONE_SECONDS = 30.0  # how long whatever a command started may outlive it


class Command:
    """A command in a session of its own, whose output goes to a file.

    Whatever it starts has its mark in the environment, by which it is found also when its parent has gone.
    """

    def __init__(self, words: Sequence[str | Path], folder: Path, environment: Mapping[str, str], output: Path):
        self.output, self._mark = output, uuid.uuid4().hex
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(output, "wb") as file:
            self.process = subprocess.Popen(
                list(map(str, words)),
                cwd=folder,
                env={**environment, VARIABLE: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_all()

    @property
    def ended(self) -> bool:
        """Whether the command itself has."""
        return self.process.poll() is not None

    @property
    def text(self) -> str:
        """What it and all that it started have said."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def alive(self) -> list[psutil.Process]:
        """All that still run."""
        self.process.poll()  # lets go of it, should it have ended
        return marked(self._mark)

    def kill_all(self) -> None:
        """End all at the same moment, as a power failure does."""
        end_all(self.alive)
        self.process.wait()

    def interrupt(self) -> None:
        """Ctrl-C: the terminal sends it to the whole group."""
        self.signal_group(signal.SIGINT)

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to the command and what has stayed in its group."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def wait(self, seconds: float) -> int:
        """The exit code. Raises TimeoutError, with what was said, if it has not ended by then."""
        wait_until(lambda: self.ended, seconds, lambda: f"the command has not ended:\n{self.text[-3000:]}")
        return self.process.returncode

    def orphans(self, seconds: float = GONE_SECONDS) -> list[str]:
        """The command lines of what still runs so many seconds after the command has ended; these are then ended."""
        end = time.monotonic() + seconds
        while self.alive() and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        left = [command_line(process) for process in self.alive()]
        self.kill_all()
        return left


def marked(mark: str) -> list[psutil.Process]:
    """All processes, but those that have ended, with this mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(VARIABLE) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def end_all(alive: Callable[[], list[psutil.Process]]) -> None:
    """Kill all processes that `alive` names, none of which sees another one end, until there are none."""
    while processes := alive():
        for act in (psutil.Process.suspend, psutil.Process.kill):
            for process in processes:
                with suppress(psutil.Error):
                    act(process)
        time.sleep(POLL_SECONDS)  # psutil's own wait would take the exit code from whoever is to read it


def command_line(process: psutil.Process) -> str:
    """Its words; "" if it has ended."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def wait_until(condition: Callable[[], bool], seconds: float, complaint: Callable[[], str]) -> None:
    """Wait for something to come to pass. Raises TimeoutError, with the complaint, if it does not."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(complaint())
        time.sleep(POLL_SECONDS)
