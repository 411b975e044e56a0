"""What all tests share: one thread each, since they run side by side, and names that are the same in every process."""

import os
import signal
import threading
from typing import Any

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    # a shell has what it starts in the background ignore interrupts, and what that starts, too
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_make_parametrize_id(config: Any, val: Any, argname: str) -> str | None:
    """Name functions and classes by their name: pytest's own choice shows their address."""
    return getattr(val, "__qualname__", None)
