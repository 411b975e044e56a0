"""Data impressions: similarities as the oracle has them, targets of the right spread, images as bytes."""

import math

import pytest
import torch
from batches import oracles

from kdstudy.impressions import as_bytes, class_similarity, concentrations, draw_targets, rescale

WEIGHT = torch.tensor([[1.0, 0], [1, 1], [0, 2]], dtype=torch.float64)


def drawn(count: int, seed: int = 0, weight: torch.Tensor = WEIGHT) -> torch.Tensor:
    return draw_targets(weight, count, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_the_similarity_is_the_oracle(dtype, tolerance):
    expected = torch.tensor(oracles()["zskd_conc_rowminmax"], dtype=dtype)
    torch.testing.assert_close(class_similarity(WEIGHT.to(dtype)), expected, atol=tolerance, rtol=0)


def test_the_similarity_is_that_of_directions_row_by_row():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    rows = weight.tolist()
    lengths = [math.sqrt(sum(x * x for x in row)) for row in rows]
    for k, row in enumerate(class_similarity(weight).tolist()):
        products = [sum(a * b for a, b in zip(rows[k], other, strict=True)) for other in rows]
        cosines = [product / lengths[k] / length for product, length in zip(products, lengths, strict=True)]
        low, high = min(cosines), max(cosines)
        assert row == pytest.approx([(cosine - low) / (high - low) for cosine in cosines])
        assert row[k] == pytest.approx(1)


def test_beta_multiplies_after_the_rows_are_stretched_and_each_has_half_of_the_data():
    """The release divides beta out again: both halves have the same concentrations."""
    found = concentrations(WEIGHT, 12)
    similarity = class_similarity(WEIGHT)
    for number in range(12):
        beta = 1.0 if number % 6 < 3 else 0.1
        torch.testing.assert_close(found[number], beta * similarity[number % 3] + 1e-4)


def test_targets_are_distributions_with_the_mean_and_the_spread_of_their_concentration():
    count = 60_000
    targets = drawn(count)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(count, dtype=torch.float64))
    assert (targets >= 0).all()
    for number, concentration in enumerate(concentrations(WEIGHT, 6).tolist()):
        total, sample = sum(concentration), targets[number::6]
        for k, part in enumerate(concentration):
            mean = part / total
            variance = mean * (1 - mean) / (total + 1)
            assert sample[:, k].mean().item() == pytest.approx(mean, abs=0.015)
            assert sample[:, k].var().item() == pytest.approx(variance, abs=0.01)


def test_targets_are_the_seeds():
    assert torch.equal(drawn(30, seed=4), drawn(30, seed=4))
    assert not torch.equal(drawn(30, seed=4), drawn(30, seed=5))
    before = torch.get_rng_state()
    drawn(30)
    assert torch.equal(torch.get_rng_state(), before)


def test_targets_in_half_of_the_precision_stay_finite_distributions():
    alone = torch.eye(4)  # all classes but one at the least concentration
    targets = drawn(4000, weight=alone)
    assert targets.dtype == torch.float32 and targets.isfinite().all()
    assert torch.equal(targets, drawn(4000, weight=alone.double()).float())  # drawn in full precision
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(4000))
    assert (targets.argmax(dim=1) == torch.arange(4000) % 4).double().mean() > 0.98


def test_each_image_is_brought_to_0_to_255_by_its_own_extremes():
    images = torch.tensor([[[[-1.0, 0.0]], [[1.0, 3.0]]], [[[5.0, 5.5]], [[6.0, 5.0]]]], dtype=torch.float64)
    assert as_bytes(images).tolist() == [[[[0, 128], [64, 255]]], [[[0, 255], [128, 0]]]]
    assert as_bytes(images).dtype == torch.uint8
    assert rescale(images)[1].flatten().tolist() == [0, 0.5, 1, 0]


def test_a_constant_image_becomes_black_and_a_rescaled_one_stays():
    assert not as_bytes(torch.full((2, 3, 4, 4), 7.0)).any()
    images = torch.rand(3, 1, 4, 4)
    torch.testing.assert_close(rescale(rescale(images)), rescale(images))
