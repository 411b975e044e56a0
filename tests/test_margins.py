"""The overhaul's margin and distance: reference values, numerical integration, and cases at their edges."""

import math

import pytest
import torch
from batches import TOLERANCE, oracles
from torch import nn

from kdstudy.margins import Margin, connector, negative_means, partial_l2

precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
STUDENT, TEACHER = [0.5, -2, 2, -0.5, 0.3, -0.2], [1, -1, 3, 2, -0.5, -2]


def norm_of(scale: list[float], shift: list[float], dtype: torch.dtype = torch.float64) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(len(scale)).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(scale))
        norm.bias.copy_(torch.tensor(shift))
    return norm


def as_map(values: list[float], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype).view(1, 1, 2, 3)


@precisions
def test_margins_are_the_oracles(dtype):
    keys = ("g_ofd_margin_g1_b0", "g_ofd_margin_g.5_b1", "g_ofd_margin_g.5_b2", "g_ofd_margin_g-1_b-.5")
    found = negative_means(norm_of([1, 0.5, 0.5, -1], [0, 1, 2, -0.5], dtype))
    assert found.dtype == dtype and not found.requires_grad
    assert found.tolist() == pytest.approx([oracles()[key] for key in keys], abs=TOLERANCE[dtype])


@pytest.mark.parametrize(("scale", "shift"), [(1.3, 0.7), (-0.4, 0.3), (0.2, -1.0), (2.0, 5.5)])
def test_a_margin_is_the_mean_of_what_lies_below_zero(scale, shift):
    x = torch.arange(-40, 0, 1e-4, dtype=torch.float64) + 5e-5
    density = (-(((x - shift) / scale) ** 2) / 2).exp()
    expected = (x * density).sum() / density.sum()
    assert negative_means(norm_of([scale], [shift])).item() == pytest.approx(expected.item(), rel=1e-6)


@precisions
@pytest.mark.parametrize(("scale", "shift", "margin"), [(0.0, -0.5, -0.5), (0.0, 0.5, 0.0), (0.0, 0.0, 0.0)])
def test_a_channel_that_does_not_vary_has_a_finite_margin(scale, shift, margin, dtype):
    assert negative_means(norm_of([scale], [shift], dtype)).item() == pytest.approx(margin, abs=1e-7)


@precisions
def test_partial_l2_is_the_oracle(dtype):
    margin = Margin(norm_of([1], [0], dtype)).value
    elements = partial_l2(as_map(STUDENT, dtype), as_map(TEACHER, dtype), margin)
    assert elements.flatten().tolist() == pytest.approx(oracles()["g_ofd_elem"], abs=TOLERANCE[dtype])
    assert elements.sum().item() == pytest.approx(oracles()["g_ofd_sum"], abs=10 * TOLERANCE[dtype])


def loop(s: float, t: float, m: float) -> float:
    """One element, case by case."""
    if t > 0:
        return (s - t) ** 2
    if t > m:
        return (s - t) ** 2 if s > t else 0.0
    return (s - m) ** 2 if s > m else 0.0


def test_partial_l2_case_by_case_with_a_margin_for_every_channel():
    student, teacher = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    student[0, 0], teacher[0, 1] = teacher[0, 0], 0.0  # equal, and a teacher at the edge
    margin = torch.tensor([-0.1, -1.0, 0.0, -0.5], dtype=torch.float64).view(4, 1, 1)
    elements = partial_l2(student, teacher, margin)
    for (b, c, h, w), value in zip(
        torch.cartesian_prod(*map(torch.arange, student.shape)), elements.flatten(), strict=True
    ):
        assert value.item() == pytest.approx(
            loop(*(x.item() for x in (student[b, c, h, w], teacher[b, c, h, w], margin[c])))
        )


def test_a_connector_also_joins_equal_widths_and_starts_as_printed():
    torch.manual_seed(0)
    convolution, norm = connector(256, 256)
    assert convolution.kernel_size == (1, 1) and convolution.bias is None and norm.num_features == 256
    assert convolution.weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.02)
    assert connector(3, 128)[0].weight.std().item() == pytest.approx(math.sqrt(2 / 128), rel=0.1)
