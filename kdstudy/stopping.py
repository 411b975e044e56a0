"""When work has to end early: a budget that is spent, a signal, and the exception with which the work then ends."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self, TypeVar

T = TypeVar("T")
ShouldStop = Callable[[], bool]


def never() -> bool:
    """The answer of whoever never asks to stop."""
    return False


class Stopped(Exception):
    """Work was asked to end before it was done; what is needed to go on is on disk."""

    def __init__(self, message: str = "stopped before the end; the same command goes on from here") -> None:
        super().__init__(message)


class Failed(RuntimeError):
    """Work that could not be done, through no fault of the code; the message says why and what to do."""


def until(should_stop: ShouldStop, items: Iterable[T]) -> Iterator[T]:
    """The items. Between two of them `should_stop` is asked, and Stopped raised if it says so."""
    for number, item in enumerate(items):
        if number and should_stop():
            raise Stopped
        yield item


class StopRequest:
    """Says when to stop: after `seconds`, or, while it is `listening`, on an interrupt or a request to terminate.

    Called wherever work can be left, such as after each step. It counts on a clock that nobody sets, and says so a
    little early if the next piece of work, taken to be as long as the shorter of the last two, would not end in time.
    """

    def __init__(self, seconds: float = math.inf) -> None:
        self._end = time.monotonic() + seconds
        self._last = time.monotonic()
        self._gaps = (0.0, 0.0)
        self._signal: signal.Signals | None = None

    def __call__(self) -> bool:
        """Whether to stop."""
        now = time.monotonic()
        self._gaps, self._last = (self._gaps[1], now - self._last), now
        return self._signal is not None or now + min(self._gaps) > self._end

    @property
    def reason(self) -> str:
        """Why it says so, in words."""
        return f"stopped by {self._signal.name}" if self._signal else "the budget is spent"

    @property
    def exit_code(self) -> int:
        """Of a process that ends for this reason: 0 for a budget that is spent, 128 and the number for a signal."""
        return 128 + self._signal if self._signal else 0

    @contextmanager
    def listening(self) -> Iterator[Self]:
        """Inside, Ctrl-C and SIGTERM ask to stop; a second Ctrl-C takes effect at once.

        In a thread that is not the main one signals cannot be heard, and nothing is changed.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():  # None stands for one that is not Python's
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        # who terminates a process, such as a queue, does so again after a while: only a person is impatient
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = self._signal or signal.Signals(number)
