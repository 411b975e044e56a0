"""Margin, distance and connector of the comprehensive overhaul of feature distillation (Heo et al. 2019, ICCV)."""

import torch
from torch import Tensor, nn

LEAST_TAIL = 1e-3  # of a normal distribution below zero; where less lies there, its mean is not meaningful


@torch.no_grad()
def negative_means(norm: nn.BatchNorm2d) -> Tensor:
    """The mean of the negative outputs of a batch norm, by channel, (c,), if its outputs are normally distributed.

    Scale g and shift b are the output's deviation and mean: `m = b - |g| phi(b/|g|) / Phi(-b/|g|)` with the standard
    normal density and distribution, but `-3 |g|` where at most 0.001 of the outputs are negative.
    """
    spread = norm.weight.abs()
    ratio = norm.bias / spread.clamp(min=1e-8)
    density = (-ratio.square() / 2).exp() / (2 * torch.pi) ** 0.5
    tail = torch.special.ndtr(-ratio)
    return torch.where(tail > LEAST_TAIL, norm.bias - spread * density / tail.clamp(min=LEAST_TAIL), -3 * spread)


class Margin(nn.Module):
    """The margins of one stage of a teacher, (c, 1, 1)."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        """Of the batch norm before the activation that ends the stage."""
        super().__init__()
        self.register_buffer("value", negative_means(norm)[:, None, None])


def partial_l2(student_map: Tensor, teacher_map: Tensor, margin: Tensor) -> Tensor:
    """`(s - max(t, m))^2` where `s > max(t, m)` or the teacher is on, `t > 0`; zero elsewhere. Elementwise.

    Maps (B, c, h, w) before their activation, `margin` (c, 1, 1), at most 0. A student that is as far off as a teacher
    that is off has nothing to learn.
    """
    target = torch.maximum(teacher_map, margin)
    counted = (student_map > target) | (teacher_map > 0)
    return (student_map - target).square() * counted


def connector(inputs: int, outputs: int) -> nn.Module:
    """1x1 convolution without bias, drawn from N(0, 2 / outputs), then batch norm; also between equal widths."""
    convolution = nn.Conv2d(inputs, outputs, 1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))
