"""What CUDA graphs do, on a CPU: a step is taken down operation by operation, and replayed on the same memory.

`capture` can stand where `kdstudy.graphs.capture` does. As in a graph, numbers, shapes and addresses are those of the
one run that was recorded; a replay that differs from a step shows that the step is not fit for a graph. What a graph
cannot hold is refused. What the CPU cannot show, `step_on_a_stranger` does: which tensors are on which device.
"""

import io
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from kdstudy.graphs import NotCapturable, Pool, rehearse

aten = torch.ops.aten
STRANGER = torch.device("meta")  # that torch has and the tests' tensors are not on; autograd runs for it without a GPU
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
# on a GPU these read from the device whether they have succeeded
CHECKED = {"_linalg_eigh", "_linalg_svd", "linalg_eig", "_linalg_check_errors"}
READING = (Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__)


def capture(
    step: Callable[[], None], state: Iterable[Tensor], *, warm_up: int = 3, pool: Pool | None = None
) -> Callable[[], None]:
    """`step` taken down on a `Tape`; the returned function replays it. `state` is put back. Raises NotCapturable."""

    def record() -> Callable[[], None]:
        tape = Tape()
        with _Reading(), tape:
            step()
        return tape.replay

    return rehearse(step, state, record, warm_up=warm_up)


class Tape(TorchDispatchMode):
    """Inside, every operation is carried out and noted, with its tensors and numbers, forward and backward."""

    def __init__(self):
        super().__init__()
        self.entries: list[tuple[Any, tuple, dict, list[Tensor]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        refuse(function, args)
        answer = function(*args, **kwargs)
        schema = function._schema
        if schema.is_mutable or not all(each.alias_info for each in schema.returns):  # no view
            self.entries.append((function, *pinned((args, kwargs, new_of(function, answer)))))
        return answer

    @torch.no_grad()
    def replay(self) -> None:
        """Do all of it again: in place where it was, other results into the memory of those that were recorded."""
        for function, args, kwargs, results in self.entries:
            for result, again in zip(results, new_of(function, function(*args, **kwargs)), strict=True):
                result.copy_(again)


def new_of(function: Any, answer: Any) -> list[Tensor]:
    """What an operation has made new of its answer: neither what it wrote to nor a view."""
    returns = function._schema.returns
    parts = [answer] if len(returns) == 1 else list(answer or ())
    new = [part for part, each in zip(parts, returns, strict=True) if not each.alias_info]
    return [leaf for leaf in tree_leaves(new) if isinstance(leaf, Tensor)]


def pinned(value: Any) -> Any:
    """The same with every tensor as another one on its memory, which keeps shape and address whatever befalls it."""
    return tree_map_only(Tensor, Tensor.detach, value)


def refuse(function: Any, args: tuple) -> None:
    """Raise NotCapturable for an operation that no graph can hold."""
    name = function._schema.name.removeprefix("aten::")
    if function is aten.lift_fresh.default:
        raise NotCapturable("it makes a tensor from numbers of the host")
    if torch.Tag.data_dependent_output in function.tags or name in CHECKED:
        raise NotCapturable(f"{name} waits for the device")
    by_mask = function in INDEXING and any(
        part is not None and part.dtype in (torch.bool, torch.uint8) for part in args[1]
    )
    if by_mask or (torch.Tag.dynamic_output_shape in function.tags and function not in INDEXING):
        raise NotCapturable(f"the shape of what {name} gives depends on values")


class _Reading(TorchFunctionMode):
    """Refuses what reads a tensor unseen by a Tape; lets `one_hot` be what it is on a GPU, without its checks."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in READING:
            raise NotCapturable(f"{function.__name__} waits for the device")
        if function is F.one_hot:
            return _one_hot(*args, **kwargs or {})
        return function(*args, **kwargs or {})


def _one_hot(labels: Tensor, num_classes: int) -> Tensor:
    return (labels.unsqueeze(-1) == torch.arange(num_classes, device=labels.device)).long()


def step_on_a_stranger(step: Callable[..., None], *things: Any) -> None:
    """Run `step` once on copies of `things` (networks, schemes, batches) on a device that is not the host's.

    Tensors have no memory there: nothing is computed but shapes. Raises NotCapturable if the step touches a tensor of
    the host, waits for the device, or needs shapes that depend on values. Not seen: autocast, which knows devices by
    name and is left out, and fused optimisers, which refuse this one.
    """
    things = [abroad(thing) for thing in things]
    with mock.patch("torch.autocast", lambda *_, **__: nullcontext()), _Reading(), _Abroad():
        step(*things)


def abroad(thing: Any) -> Any:
    """A copy of anything that can be pickled, with all tensors in it on the strange device."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, map_location=STRANGER, weights_only=False)


class _Abroad(TorchDispatchMode):
    """Refuses tensors of the host, also the scalars that torch lets through: a graph would keep their first value."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        refuse(function, args)
        self._look(function, (args, kwargs))
        answer = function(*args, **kwargs or {})
        self._look(function, answer)
        return answer

    def _look(self, function: Any, values: Any) -> None:
        if any(isinstance(each, Tensor) and each.device != STRANGER for each in tree_leaves(values)):
            raise NotCapturable(f"{function._schema.name.removeprefix('aten::')} touches a tensor of the host")
