"""What makes two networks' maps and vectors comparable: one size, one width, one length; and checks of views."""

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.core import Method, View


def same_size(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps (B, c, h, w) and (B, c', h', w') at one size: the larger is average-pooled to the smaller's sides."""
    sides = tuple(min(pair) for pair in zip(one.shape[2:], other.shape[2:], strict=True))
    return _pooled(one, sides), _pooled(other, sides)


def _pooled(stage_map: Tensor, sides: tuple[int, ...]) -> Tensor:
    return stage_map if tuple(stage_map.shape[2:]) == sides else F.adaptive_avg_pool2d(stage_map, sides)


def widen(inputs: int, outputs: int) -> nn.Module:
    """1x1 convolution without bias, then batch norm, from `inputs` to `outputs` channels; nothing if they are equal."""
    if inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))


def paired_maps(student: View, teacher: View) -> list[tuple[Tensor, Tensor]]:
    """The maps of two networks stage by stage, each pair at one size.

    Raises ValueError unless the networks have equally many stages, at least one.
    """
    mine, its = len(student.maps), len(teacher.maps)
    if not mine or mine != its:
        raise ValueError(f"student and teacher must have equally many stages, at least one, not {mine} and {its}")
    return [same_size(*pair) for pair in zip(student.maps, teacher.maps, strict=True)]


SHORTEST = 1e-6  # a shorter vector has no direction: what is left of it is rounding


def unit_length(vectors: Tensor) -> Tensor:
    """Vectors (..., D) at length 1; one shorter than `SHORTEST` becomes zero and passes no gradient on."""
    squares = vectors.square().sum(dim=-1, keepdim=True)
    return vectors * (squares.clamp(min=SHORTEST**2).rsqrt() * (squares > SHORTEST**2))


def require_taps(taps: Iterable[str], student: View, teacher: View) -> None:
    """Raise a ValueError unless both networks show all of these taps."""
    for who, view in (("student", student), ("teacher", teacher)):
        for tap in taps:
            shown = getattr(view, tap)
            if shown is None or (isinstance(shown, tuple) and not shown):
                raise ValueError(f"the {who} shows no {tap}, which the method compares: choose another network")


def require_samples(method: Method, student: View, teacher: View) -> None:
    """Raise a ValueError unless both networks show what the method reads, for as many samples as it compares."""
    require_taps(method.reads, student, teacher)
    if len(student.logits) < method.least_batch:
        count = len(student.logits)
        raise ValueError(f"relations between samples need a batch of at least {method.least_batch}, not of {count}")
