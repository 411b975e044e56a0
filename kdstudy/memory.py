"""How much memory a step needs until its backward pass, and how much there is."""

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from kdstudy.stopping import Failed

T = TypeVar("T")

AVAILABLE = Path("/proc/meminfo")
CONTAINER = Path("/sys/fs/cgroup")
# of glibc's mallopt
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
NEVER, LARGE = 2**31 - 1, 2**25


def keep_freed_memory() -> bool:
    """Let the C library keep what tensors on the host give back, for the next step; says whether it can do so.

    By default glibc hands large blocks back to the system with each step, and getting them anew costs a page fault for
    every 4 KiB: a fifth of a step on a CPU.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return False
    return bool(mallopt(TRIM_THRESHOLD, NEVER) and mallopt(MMAP_THRESHOLD, LARGE))


def bytes_kept(function: Callable[[], T]) -> tuple[T, dict[int, int]]:
    """What `function` returns, and the size in bytes of every storage that it keeps for a backward pass, by address."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return function(), kept


class OutOfMemory(Failed):
    """A run that does not fit into memory even by itself."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error of Python, numpy or torch says that there is no memory left, on the host or on a GPU.

    Or was raised while such a one was handled: torch's writer of files hides it behind one of its own.
    """
    if error is None:
        return False
    words = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED", "Cannot allocate memory")
    says_so = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return says_so or isinstance(error, MemoryError | torch.OutOfMemoryError) or is_out_of_memory(error.__context__)


def release(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """How many bytes of the device's memory can still be had, caches of torch's own included."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    if not AVAILABLE.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # systems that do not say what is free
    lines = dict(line.split(":", 1) for line in AVAILABLE.read_text().splitlines())
    return min([1024 * int(lines["MemAvailable"].split()[0]), *_left_to_container()])


def _left_to_container() -> list[int]:
    """What a container's limit leaves; empty where there is none."""
    try:
        limit, used = ((CONTAINER / name).read_text() for name in ("memory.max", "memory.current"))
        kept = dict(line.split() for line in (CONTAINER / "memory.stat").read_text().splitlines())
    except OSError:
        return []
    # pages of files that nobody needs at the moment count as used, but are given back
    return [] if limit.strip() == "max" else [int(limit) - int(used) + int(kept.get("inactive_file", 0))]
