"""The shortest time that a device could need for a step: what it can move and compute, and what the networks ask of it.

A kernel lasts at least `max(FLOPs / rate, bytes / bandwidth)` (Williams, Waterman, Patterson 2009). Both limits are
measured on the spot; kernels are counted on one image, in the form that a compiler for pointwise operations gives
them. The share of the roofline that training reaches is the roofline's seconds over the measured ones.
"""

import copy
import math
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kdstudy.core import require_choice, require_positive, require_whole

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
COPY_MEGABYTES = {"cpu": 256, "cuda": 1024}  # far more than a cache holds
PRODUCT_SECONDS = 0.01  # matrices grow until a product lasts that long
SMALLEST_SIDE, LARGEST_SIDE = 256, {"cpu": 2048, "cuda": 16384}
STILL_RISING = 1.1  # times the rate of smaller ones
CALLS = {"cpu": 1, "cuda": 4}  # of a round, so that waiting for a GPU does not count
CPU_INFO = Path("/proc/cpuinfo")
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Limits:
    """What a device can do at most, as measured.

    `bandwidth` in bytes per second, read and written ones together; `rate` in FLOP/s, a multiplication and an addition
    being two; `number_bytes` of an activation. `device` and `clock` say where and at what frequency, or "unknown".
    """

    bandwidth: float
    rate: float
    number_bytes: int
    device: str = UNKNOWN
    clock: str = UNKNOWN

    def __post_init__(self) -> None:
        """Refuse limits that are none."""
        require_positive("bandwidth", self.bandwidth)
        require_positive("rate", self.rate)
        require_whole("number_bytes", self.number_bytes)


class Kernel(NamedTuple):
    """One pass over an image's activations: its FLOPs, and how many numbers it reads and writes in memory."""

    flops: int
    numbers: int

    def seconds(self, limits: Limits) -> float:
        """The least time of this kernel."""
        return max(self.flops / limits.rate, self.numbers * limits.number_bytes / limits.bandwidth)


class Work(NamedTuple):
    """The kernels of a network for one image: to answer, with batch norm folded away, and to train, forward and back.

    Weights and the optimiser's passes over them are left out: they do not grow with the batch.
    """

    answering: tuple[Kernel, ...]
    training: tuple[Kernel, ...]

    def answer_seconds(self, limits: Limits) -> float:
        """The least time of a forward in eval mode, per image."""
        return sum(kernel.seconds(limits) for kernel in self.answering)

    def training_seconds(self, limits: Limits) -> float:
        """The least time of a forward and backward pass in train mode, per image."""
        return sum(kernel.seconds(limits) for kernel in self.training)


def roofline_seconds(students: Sequence[Work], teachers: Sequence[Work], limits: Limits) -> float:
    """The least time per image of a batch that all students are trained on and all teachers answer."""
    trained = sum(work.training_seconds(limits) for work in students)
    return trained + sum(work.answer_seconds(limits) for work in teachers)


def count_work(network: nn.Module, shape: tuple[int, int, int]) -> Work:
    """Count the kernels of a network for an image (channels, H, W); nothing is computed, the network stays as it is.

    * A convolution or linear layer reads its input and writes its output; back, once more for the gradient of its
      input and once for that of its weights, each with the FLOPs of the forward. What needs no gradient has none:
      the images, frozen weights.
    * A batch norm makes 3 passes forward (one for the statistics, then a read and a write) and 5 back (two reads for
      the sums; two reads and a write). The activation that follows belongs to the same passes.
    * Where two maps are added the second one makes 1 pass forward and 1 back.
    * Anything else that changes a map's size reads the one and writes the other, forward and back.

    To answer, batch norm is part of the convolution, and so is an activation; an added map is read once.
    """
    counter = _Counter()
    images = torch.zeros(1, *shape, device="meta")
    twin = copy.deepcopy(network).to("meta").eval()
    with torch.enable_grad(), counter:
        twin(images)
    return Work(tuple(counter.answering), tuple(counter.training))


class _Counter(TorchFunctionMode):
    """Notes the kernels of every torch function that is called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.answering: list[Kernel] = []
        self.training: list[Kernel] = []

    def __torch_function__(
        self, function: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        if isinstance(output, Tensor):
            self._note(function, args, output)
        return output

    def _note(self, function: Callable, args: tuple, output: Tensor) -> None:
        tensors = [each for each in args if isinstance(each, Tensor)]
        backward = output.requires_grad
        if function in PRODUCTS:
            self._note_product(*tensors[:2], output)
        elif function is F.batch_norm:
            self.training.append(Kernel(0, (3 + 5 * backward) * output.numel()))
        elif function in SUMS and len(tensors) == 2:
            self._note_passes(output.numel(), backward)
        elif tensors and tensors[0].numel() != output.numel():
            self._note_passes(tensors[0].numel() + output.numel(), backward)

    def _note_product(self, inputs: Tensor, weight: Tensor, output: Tensor) -> None:
        kernel = Kernel(2 * output.numel() * weight[0].numel(), inputs.numel() + output.numel())
        self.answering.append(kernel)
        self.training += [kernel] * (1 + inputs.requires_grad + weight.requires_grad)

    def _note_passes(self, numbers: int, backward: bool) -> None:
        self.answering.append(Kernel(0, numbers))
        self.training.append(Kernel(0, (1 + backward) * numbers))


PRODUCTS = (F.conv2d, F.linear)
SUMS = (Tensor.add, Tensor.add_, torch.add)


def measure_limits(
    device: torch.device,
    precision: str = "bf16",
    *,
    megabytes: float | None = None,
    product_seconds: float = PRODUCT_SECONDS,
    rounds: int = 10,
) -> Limits:
    """Measure a device's limits in a precision of recipes: the best of `rounds`, in as many threads as torch now has.

    The bandwidth is that of a copy of so many `megabytes`; the rate that of a product of random square matrices, whose
    side doubles from 256 until a product lasts `product_seconds` and the rate rises no more, or the side is 2048 on a
    CPU, 16384 on a GPU. Products of "fp32" on CUDA are without TF32, as is PyTorch's default, but convolutions are with
    it. Raises ValueError for an unknown precision and numbers out of range.
    """
    require_choice("precision", precision, tuple(DTYPES))
    require_whole("rounds", rounds)
    require_positive("product_seconds", product_seconds)
    megabytes = COPY_MEGABYTES[device.type] if megabytes is None else megabytes
    require_positive("megabytes", megabytes)
    return Limits(
        bandwidth=_bandwidth(device, megabytes, rounds),
        rate=_rate(device, DTYPES[precision], product_seconds, rounds),
        number_bytes=DTYPES[precision].itemsize,
        device=_name(device),
        clock=_clock(device),  # right after the load, before the device slows down
    )


def _bandwidth(device: torch.device, megabytes: float, rounds: int) -> float:
    source = torch.zeros(math.ceil(megabytes * 1e6), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _least_seconds(lambda: target.copy_(source), device, rounds)


def _rate(device: torch.device, dtype: torch.dtype, product_seconds: float, rounds: int) -> float:
    side, best = SMALLEST_SIDE, 0.0
    while side <= LARGEST_SIDE[device.type]:
        # of zeros a GPU makes products faster than of anything else, because it draws less power
        one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = _least_seconds(lambda one=one, other=other: one @ other, device, rounds)
        previous, best = best, max(best, 2 * side**3 / seconds)
        if seconds >= product_seconds and best < STILL_RISING * previous:
            break  # on a busy host a small product may be slow as well, but then the rate still rises
        side *= 2
    return best


def _least_seconds(function: Callable, device: torch.device, rounds: int) -> float:
    """The least seconds per call, over rounds inside which nothing waits for the device."""
    function()
    calls, taken = CALLS[device.type], []
    for _ in range(rounds):
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        _wait(device)
        taken.append((time.perf_counter() - start) / calls)
    return min(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"^model name\s*:\s*(.+)$", _cpu_info(), re.MULTILINE)
    threads = torch.get_num_threads()
    return f"{found[1] if found else UNKNOWN}, {threads} thread{'s' * (threads > 1)}"


def _clock(device: torch.device) -> str:
    if device.type == "cuda":
        return _gpu_clock(str(torch.cuda.get_device_properties(device).uuid))
    found = re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", _cpu_info(), re.MULTILINE)
    return f"{median(map(float, found)):.0f} MHz" if found else UNKNOWN


def _cpu_info() -> str:
    try:
        return CPU_INFO.read_text()
    except OSError:
        return ""


def _gpu_clock(uuid: str) -> str:
    command = ["nvidia-smi", f"--id=GPU-{uuid}", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN
    found = re.fullmatch(r"(\d+), (\d+)", answer.strip())
    return f"{found[1]} MHz, memory {found[2]} MHz" if found else UNKNOWN
