"""How far a long stage is, told from the process that trains to the terminal, beside the notebook and never in it.

Training runs in a notebook kernel, whose output streams end up in the notebook. The notebook runner therefore opens a
`Relay`: a temporary file, named in the environment variable `KDSTUDY_PROGRESS`, to which the kernel appends one line of
JSON per update, and a thread that reads them and draws.
"""

import json
import math
import os
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Self, TextIO

VARIABLE = "KDSTUDY_PROGRESS"


class Reporter(ABC):
    """Takes updates as often as they come and passes one on every `interval` seconds.

    Nothing that goes wrong on the way (a full disk, a file or terminal that is gone) reaches the caller: a run is never
    lost for the sake of its progress.
    """

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self._next = -math.inf
        self._pending: tuple[float, float, float, str] | None = None

    def update(self, done: float, total: float, text: str = "") -> None:
        """Say that `done` of `total` units of work are finished; `text` says in a few words what is going on.

        The units are the caller's (epochs, steps), the same for both numbers. The first update says how much was
        finished before this session, which the estimate of the time left leaves out.
        """
        now = time.monotonic()
        self._pending = (now, done, total, text)
        if now >= self._next:
            self._next = now + self.interval
            self._pass_on()

    def close(self) -> None:
        """Pass on the last update, if it was held back."""
        if self._pending is not None:
            self._pass_on()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pass_on(self) -> None:
        update, self._pending = self._pending, None
        with suppress(Exception):
            self._show(*update)

    @abstractmethod
    def _show(self, now: float, done: float, total: float, text: str) -> None: ...


class FileReporter(Reporter):
    """Appends each update to a file as one line of JSON: `{"done": 12, "total": 400, "text": "kd seed 1"}`."""

    def __init__(self, path: Path, interval: float = 0.5) -> None:
        super().__init__(interval)
        self.path = path

    def _show(self, now: float, done: float, total: float, text: str) -> None:
        line = json.dumps({"done": done, "total": total, "text": text}) + "\n"
        # without O_CREAT, so that a kernel that outlives its runner leaves no file behind
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)


class TerminalReporter(Reporter):
    """Draws a bar that moves if `stream` is a terminal, else one line every 30 seconds and one at the end."""

    BAR_SECONDS = 0.1
    LINE_SECONDS = 30.0

    def __init__(self, label: str = "", stream: TextIO | None = None, interval: float | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._is_bar = self._stream.isatty()
        if interval is None:
            interval = self.BAR_SECONDS if self._is_bar else self.LINE_SECONDS
        super().__init__(interval)
        self.label = label
        self._clock = _Clock()
        self._has_drawn = False

    def close(self) -> None:
        """Draw the last state and end the bar's line."""
        super().close()
        if self._is_bar and self._has_drawn:
            with suppress(Exception):
                self._stream.write("\n")
                self._stream.flush()
            self._has_drawn = False

    def _show(self, now: float, done: float, total: float, text: str) -> None:
        share = min(max(done / total, 0.0), 1.0) if total > 0 else 0.0
        parts = [self.label, f"{math.floor(100 * share):3d} %", text, self._clock.read(now, done, total)]
        if self._is_bar:
            parts.insert(2, _bar(share))
        line = "  ".join(part for part in (" ".join(part.splitlines()) for part in parts) if part)
        if self._is_bar:
            columns = os.get_terminal_size(self._stream.fileno()).columns or 80
            self._stream.write(f"\r\x1b[K{line[: columns - 1]}")
        else:
            self._stream.write(line + "\n")
        self._stream.flush()
        self._has_drawn = True


class _Clock:
    """Time left, from the rate of work since the first reading; starts anew when `done` falls (the next loop)."""

    def __init__(self) -> None:
        self._start: tuple[float, float] | None = None
        self._last = -math.inf

    def read(self, now: float, done: float, total: float) -> str:
        if self._start is None or done < self._last:
            self._start = (now, done)
        self._last = done
        elapsed, worked = now - self._start[0], done - self._start[1]
        if worked <= 0:
            return ""
        if done >= total:
            return f"took {format_seconds(elapsed)}"
        return f"{format_seconds((total - done) * elapsed / worked)} left"


def format_seconds(seconds: float) -> str:
    """A duration in its two largest units: `45 s`, `1 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    whole = round(seconds)
    units = [("d", whole // 86400), ("h", whole // 3600 % 24), ("min", whole // 60 % 60), ("s", whole % 60)]
    first = next((index for index, (_, count) in enumerate(units) if count), len(units) - 1)
    return " ".join(f"{count} {unit}" for unit, count in units[first : first + 2])


def _bar(share: float, width: int = 20) -> str:
    full = math.floor(share * width)
    return f"[{'=' * full}{' ' * (width - full)}]"


def reporter(label: str = "") -> Reporter:
    """The reporter for this process: to the notebook runner's file if there is one, otherwise to the terminal."""
    path = os.environ.get(VARIABLE)
    return FileReporter(Path(path)) if path else TerminalReporter(label)


class Relay:
    """Draws in this process what the processes started with `environment` report.

    Whatever becomes of them, leaving the context ends the drawing and removes the file.
    """

    POLL_SECONDS = 0.1

    def __init__(self, label: str, target: Reporter | None = None) -> None:
        self._target = TerminalReporter(label) if target is None else target

    def __enter__(self) -> Self:
        handle, name = tempfile.mkstemp(prefix="kdstudy-progress-", suffix=".jsonl")
        os.close(handle)
        self._path = Path(name)
        self._offset = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="kdstudy-progress", daemon=True)
        self._thread.start()
        return self

    @property
    def environment(self) -> dict[str, str]:
        """The entry that tells another process where to report."""
        return {VARIABLE: str(self._path)}

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._target.close()
        self._path.unlink(missing_ok=True)

    def _follow(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._stop.wait(self.POLL_SECONDS)
            with suppress(OSError):
                self._read()

    def _read(self) -> None:
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]  # a line may be half written when its process dies
        self._offset += len(whole)
        for line in whole.splitlines():
            with suppress(ValueError, KeyError, TypeError):
                message = json.loads(line)
                self._target.update(message["done"], message["total"], message["text"])
