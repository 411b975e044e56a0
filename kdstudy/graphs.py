"""A whole training step as one CUDA graph: what may be captured, what must be there before, and what is put back.

A graph repeats the kernels of one run of a step on the same memory and with the same numbers. So whatever changes from
step to step must be a tensor on the device that the step itself reads or advances: the position in the epoch, the
learning rate, sums. Adam must be `capturable`. Loading a checkpoint into an optimiser gives it new tensors: capture
afterwards.
"""

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from kdstudy.core import require_whole

Step = Callable[[], None]
Pool = tuple[int, int]


class NotCapturable(Exception):
    """A step that cannot be repeated as a CUDA graph; `reason` says why. It can still be run as it is."""

    def __init__(self, reason: str):
        super().__init__(f"the step cannot be captured: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Captured:
    """A captured step; calling it enqueues the step once and waits for nothing."""

    graph: torch.cuda.CUDAGraph
    step: Step  # kept, since the graph reads the memory of its tensors

    def __call__(self) -> None:
        """Replay it."""
        self.graph.replay()


def capture(step: Step, state: Iterable[Tensor], *, warm_up: int = 3, pool: Pool | None = None) -> Callable[[], None]:
    """`step` captured into a CUDA graph; the returned function replays it once per call.

    `state` are all tensors that a step changes and the next one reads, on one device: parameters, buffers,
    `optimiser_tensors`, counters, sums. The step is run `warm_up` times and once more, each time from that state, in
    which it is left whether this returns or raises. Graphs may share a `torch.cuda.graph_pool_handle()` if no two of
    them run at the same time. Raises NotCapturable if the step draws random numbers, waits for the device, or does what
    CUDA refuses to capture; other errors are the step's own.
    """
    state = list(state)
    # one stream for all: autograd remembers on which one a parameter was first seen. The context of its own leads back
    # to the caller's stream also where torch, in older versions, stays on the other after a failed capture
    with torch.cuda.device(state[0].device if state else torch.cuda.current_device()):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                return rehearse(step, state, lambda: _record(step, stream, pool), warm_up=warm_up)
        finally:
            torch.cuda.current_stream().wait_stream(stream)


def rehearse(
    step: Step, state: Iterable[Tensor], record: Callable[[], Callable[[], None]], *, warm_up: int
) -> Callable[[], None]:
    """What `record` returns once `step` has run `warm_up` times. State and random numbers are put back.

    Each run begins with the same state: a counter passes no end of data. Raises NotCapturable if the step draws random
    numbers by torch's own generators.
    """
    require_whole("warm_up", warm_up)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    put_back = _keep(state)
    with torch.random.fork_rng(devices):
        before = _random_states()
        try:
            for _ in range(warm_up):
                step()
                put_back()
            if not all(map(torch.equal, before, _random_states())):
                raise NotCapturable("it draws random numbers")
            return record()
        finally:
            put_back()


def make_state(optimiser: torch.optim.Optimizer) -> None:
    """Give every parameter the state from which a first step of SGD or Adam is made; in place where it has one.

    Torch makes it in the first step, which would then be another than those that follow. Raises ValueError for other
    optimisers, and for dampening and AMSGrad.
    """
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            for name, start in _first_state(optimiser, group, parameter).items():
                state = optimiser.state[parameter]
                state.setdefault(name, start).copy_(start)


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that a step of the optimiser changes beside the parameters."""
    return [value for state in optimiser.state.values() for value in state.values() if isinstance(value, Tensor)]


def rates_on_device(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    """Each parameter group's learning rate as a scalar on its parameters' device, to be changed by `fill_`.

    It is float32 whatever the parameters are: the fused kernels of CUDA read no other.
    """
    for group in optimiser.param_groups:
        rate = torch.as_tensor(group["lr"], dtype=torch.float32, device=group["params"][0].device)
        group["lr"] = rate
    return [group["lr"] for group in optimiser.param_groups]


def _first_state(optimiser: torch.optim.Optimizer, group: dict, parameter: Tensor) -> dict[str, Tensor]:
    if isinstance(optimiser, torch.optim.SGD) and not group["dampening"]:
        # the zero that adds nothing even to -0.0, so that the first momentum is the gradient to the bit
        return {"momentum_buffer": torch.full_like(parameter, -0.0)} if group["momentum"] else {}
    if isinstance(optimiser, torch.optim.Adam) and not group["amsgrad"]:
        zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)} | zeros
    raise ValueError(f"only SGD without dampening and Adam without AMSGrad are captured, not {optimiser}")


def _record(step: Step, stream: torch.cuda.Stream, pool: Pool | None) -> Captured:
    graph = torch.cuda.CUDAGraph()
    errors: list[RuntimeError] = []
    try:
        # before the capture: torch before 2.12 cannot give back what a broken one holds
        with _waiting_is_an_error():
            step()
        gc.collect()  # what is collected during a capture may be what must not be freed then
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"), _noted(errors):
            step()
    except RuntimeError as error:
        first = [*errors, error][0]
        if isinstance(first, torch.OutOfMemoryError):
            raise first from None
        raise NotCapturable(str(first).partition("\n")[0]) from first
    return Captured(graph, step)


@contextmanager
def _noted(errors: list[RuntimeError]) -> Iterator[None]:
    """Keep the error that breaks a capture: ending it raises another one."""
    try:
        yield
    except RuntimeError as error:
        errors.append(error)
        raise


@torch.no_grad()
def _keep(state: Iterable[Tensor]) -> Callable[[], None]:
    """Returns what makes the tensors hold again what they hold now, in the same memory."""
    pairs = [(tensor, tensor.clone()) for tensor in state]

    @torch.no_grad()
    def put_back() -> None:
        for tensor, copy in pairs:
            tensor.copy_(copy)

    return put_back


def _random_states() -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_available() else states


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that this does not see every wait
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)
