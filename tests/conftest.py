"""What all tests share: one thread each, since they run side by side, and names that are the same in every process."""

import os
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_make_parametrize_id(config: Any, val: Any, argname: str) -> str | None:
    """Name functions and classes by their name: pytest's own choice shows their address."""
    return getattr(val, "__qualname__", None)
