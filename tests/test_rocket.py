"""Rocket launching: the hint against reference values, its reduction and its gradient."""

import pytest
import torch
import torch.nn.functional as F
from batches import STUDENT_A, TEACHER_A, TOLERANCE, batch_a, loss_of, oracles, random_logits, total_of

from kdstudy.rocket import RocketLaunching

precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@precisions
def test_the_hint_is_the_oracle(dtype):
    light, booster, labels = batch_a(dtype)
    loss = loss_of(RocketLaunching(), light.logits, booster.logits, labels)
    assert loss.shape == () and loss.dtype == dtype
    assert loss.item() == pytest.approx(oracles()["rocket_hint_sum/B"], abs=TOLERANCE[dtype])


@precisions
def test_with_both_nets_cross_entropies_the_total_is_the_oracle(dtype):
    light, booster, labels = batch_a(dtype)
    total = total_of(RocketLaunching(), light, booster, labels) + F.cross_entropy(booster.logits, labels)
    assert total.item() == pytest.approx(oracles()["rocket_total_g.03"], abs=TOLERANCE[dtype])


def test_squares_are_summed_over_classes_and_averaged_over_the_images_that_are_there():
    light, booster, labels = batch_a()
    whole = 0.0
    for index, (z_l, z_b) in enumerate(zip(STUDENT_A, TEACHER_A, strict=True)):
        square = sum((a - b) ** 2 for a, b in zip(z_l, z_b, strict=True))
        whole += square
        rows = slice(index, index + 1)
        alone = loss_of(RocketLaunching(), light.logits[rows], booster.logits[rows], labels[rows])
        assert alone.item() == pytest.approx(square)  # a batch of one is divided by one
    assert loss_of(RocketLaunching(), light.logits, booster.logits, labels).item() == pytest.approx(whole / 2)


def test_the_light_net_is_pulled_by_twice_the_distance():
    light, booster, labels = random_logits(6, 4)
    light.requires_grad_()
    loss_of(RocketLaunching(), light, booster, labels).backward()
    torch.testing.assert_close(light.grad, 2 * (light.detach() - booster) / 6)


def test_equal_answers_cost_nothing_and_a_shift_of_all_logits_does():
    light, _, labels = random_logits(6, 4)
    assert loss_of(RocketLaunching(), light, light, labels) == 0
    assert loss_of(RocketLaunching(), light + 0.5, light, labels).item() == pytest.approx(4 * 0.25)


@pytest.mark.parametrize("field", ["ce_weight", "kd_weight"])
def test_a_bad_weight_is_named(field):
    with pytest.raises(ValueError, match=rf"{field} must be .* not -1.0"):
        RocketLaunching(**{field: -1.0})
