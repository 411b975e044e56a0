"""Modules and functions by which two networks' maps are made comparable: one size, one width."""

import torch.nn.functional as F
from torch import Tensor, nn


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
