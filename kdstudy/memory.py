"""How much memory a step needs until its backward pass, and how much there is."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

AVAILABLE = Path("/proc/meminfo")


def bytes_kept(function: Callable[[], T]) -> tuple[T, dict[int, int]]:
    """What `function` returns, and the size in bytes of every storage that it keeps for a backward pass, by address."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return function(), kept


def free_bytes(device: torch.device) -> int:
    """How many bytes of the device's memory can still be had, caches of torch's own included."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    if AVAILABLE.exists():
        lines = dict(line.split(":", 1) for line in AVAILABLE.read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # systems that do not say what is free
