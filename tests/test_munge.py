"""MUNGE: exchanges by hand, neighbours by brute force, and images that survive the way to their components and back."""

import math

import numpy as np
import pytest
import torch

from kdstudy.munge import Components, munge, nearest

NEVER = 1e12  # a local variance at which values are exchanged without any noise


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_of(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=generator(seed), dtype=torch.float64)


def nearest_slowly(rows: list[list[float]]) -> list[int]:
    found = []
    for number, row in enumerate(rows):
        distances = [(math.dist(row, other), index) for index, other in enumerate(rows) if index != number]
        found.append(min(distances)[1])
    return found


def test_neighbours_are_those_of_a_loop_over_all_pairs():
    rows = rows_of(1203, 3)  # more than are compared at once
    assert nearest(rows).tolist() == nearest_slowly(rows.tolist())


def test_the_first_of_equally_near_rows_is_taken_and_never_the_row_itself():
    rows = torch.tensor([[0.0], [1.0], [2.0], [2.0]])
    assert nearest(rows).tolist() == [1, 0, 3, 2]


def test_without_any_exchange_every_pass_gives_the_rows_back():
    rows = rows_of(40, 5)
    assert torch.equal(munge(rows, 3, 0.0, 1.0, generator()), rows.repeat(3, 1))


def test_mutual_neighbours_exchange_their_values_at_each_visit():
    """Both visit the other, so that after the pass each has its own again; a third row that is nobody's neighbour
    exchanges with its own neighbour for good."""
    pair = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    torch.testing.assert_close(munge(pair, 1, 1.0, NEVER, generator()), pair.double(), atol=1e-9, rtol=0)
    three = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.5, 3.0]])  # the last one's neighbour is the second
    expected = torch.tensor([[0.0, 0.0], [2.5, 3.0], [1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(munge(three, 1, 1.0, NEVER, generator()), expected, atol=1e-9, rtol=0)


def test_visits_find_what_earlier_visits_left():
    chain = torch.tensor([[0.0], [1.0], [3.0], [6.0]])  # neighbours 1, 0, 1, 2
    # visits: 0 with 1, 1 with 0 (undone), 2 with 1, 3 with 2
    expected = torch.tensor([[0.0], [3.0], [6.0], [1.0]], dtype=torch.float64)
    torch.testing.assert_close(munge(chain, 1, 1.0, NEVER, generator()), expected, atol=1e-9, rtol=0)


def test_passes_start_from_the_real_rows_and_differ():
    rows = rows_of(30, 4)
    together = munge(rows, 2, 0.5, 2.0, generator(3))
    assert together.shape == (60, 4) and together.dtype == torch.float64
    assert torch.equal(together[:30], munge(rows, 1, 0.5, 2.0, generator(3)))
    assert not torch.equal(together[:30], together[30:])
    assert torch.equal(rows, rows_of(30, 4))  # the real rows stay as they are


def test_the_outcome_is_the_seeds():
    rows = rows_of(30, 4)
    assert torch.equal(munge(rows, 1, 0.5, 2.0, generator(3)), munge(rows, 1, 0.5, 2.0, generator(3)))
    assert not torch.equal(munge(rows, 1, 0.5, 2.0, generator(3)), munge(rows, 1, 0.5, 2.0, generator(4)))


def far_pairs(count: int, width: int, gap: float) -> torch.Tensor:
    """Pairs of rows a gap apart in every attribute, each pair far from all others."""
    base = torch.arange(count, dtype=torch.float64).mul(1e4 * gap).repeat_interleave(2)
    return base.unsqueeze(1) + gap * torch.tensor([0.0, 1.0]).repeat(count).unsqueeze(1).expand(-1, width)


def test_the_probability_is_that_of_an_exchange_of_one_attribute():
    """Without noise, an attribute of a pair stands exchanged at the end if one of two visits exchanged it, not both."""
    rows = far_pairs(2000, 10, 1.0)
    for probability in (0.1, 0.5, 0.8):
        changed = (munge(rows, 1, probability, NEVER, generator()) - rows).abs() > 0.5
        expected = 2 * probability * (1 - probability)
        assert changed.double().mean().item() == pytest.approx(expected, abs=0.015)
        assert torch.equal(changed[0::2], changed[1::2])  # both members of a pair, or none
        alike = (changed[:, :1] == changed[:, 1:]).double().mean().item()  # attributes are drawn one by one
        assert alike == pytest.approx(expected**2 + (1 - expected) ** 2, abs=0.02)


def test_the_deviation_is_the_distance_in_the_attribute_over_the_local_variance():
    """One visit alone: a row whose neighbour has a nearer one, visited last."""
    triple = torch.tensor([[0.0], [0.001], [5.0]], dtype=torch.float64)
    base = torch.arange(4000, dtype=torch.float64).mul(1e5)
    rows = (base.view(-1, 1) + triple.view(1, -1)).reshape(-1, 1)
    munged = munge(rows, 1, 1.0, 4.0, generator()) - base.repeat_interleave(3).unsqueeze(1)
    second, last = munged[1::3, 0], munged[2::3, 0]
    for values, mean in ((last, 0.0), (second, 5.0)):
        assert values.mean().item() == pytest.approx(mean, abs=0.1)
        assert values.std().item() == pytest.approx(5 / 4, rel=0.05)
    assert abs(torch.corrcoef(torch.stack([second, last]))[0, 1].item()) < 0.05  # two draws, not one


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"passes": 0}, "passes must be a whole number of at least 1, not 0"),
        ({"probability": 1.1}, "probability must be at most 1, not 1.1"),
        ({"local_variance": 0.0}, "local_variance must be a finite number above 0, not 0.0"),
        ({"rows": torch.zeros(1, 2)}, "at least 2 rows to munge, not 1"),
    ],
)
def test_wrong_use_is_named(given, message):
    options = {"rows": torch.zeros(3, 2), "passes": 1, "probability": 0.5, "local_variance": 1.0} | given
    with pytest.raises(ValueError, match=message):
        munge(**options, generator=generator())


# images as rows


def images_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 4, 2), generator=generator(seed), dtype=torch.uint8)


def test_with_all_components_images_come_back_as_they_were_and_keep_their_distances():
    images = images_of(60)
    components = Components(images, 24)
    rows = components.encode(images)
    assert torch.equal(components.decode(rows), images) and rows.shape == (60, 24)
    flat = images.flatten(1).double()
    torch.testing.assert_close(torch.cdist(rows, rows), torch.cdist(flat, flat), atol=1e-5, rtol=1e-6)


def test_few_components_are_the_directions_of_most_variance():
    images = images_of(200)
    images[:, 0] //= 8  # so that variances differ
    flat = images.flatten(1).double().numpy()
    rows = Components(images, 5).encode(images)
    values = np.linalg.svd(flat - flat.mean(axis=0), compute_uv=False)[:5]
    assert rows.norm(dim=0).tolist() == pytest.approx(values.tolist())
    torch.testing.assert_close(rows.T @ rows, torch.diag(rows.square().sum(dim=0)), atol=1e-4, rtol=1e-9)


def test_the_sign_of_a_component_does_not_hang_on_the_library(monkeypatch):
    images = images_of(50)
    expected = Components(images, 6).encode(images)
    exact = torch.linalg.eigh

    def flipped(matrix):
        values, vectors = exact(matrix)
        return values, -vectors

    monkeypatch.setattr(torch.linalg, "eigh", flipped)
    torch.testing.assert_close(Components(images, 6).encode(images), expected)


def test_pixels_beyond_black_and_white_are_cut_off():
    images = images_of(30)
    components = Components(images, 24)
    far = components.decode(100 * components.encode(images))
    assert far.dtype == torch.uint8 and {0, 255} <= set(far.flatten().tolist())
    towards = images.double() > images.double().mean(dim=0)
    assert torch.equal(far > 127, towards)
