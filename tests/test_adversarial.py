"""Adversarial distillation of maps: its terms and its discriminator against reference values and plain arithmetic."""

import math

import pytest
import torch
import torch.nn.functional as F
from batches import LABELS_A, STUDENT_A, TEACHER_A, TOLERANCE, batch_a, loss_of, oracles, total_of
from torch import Tensor, nn

from kdstudy.adversarial import AdversarialDistillation, discriminator, discriminator_loss, generator_loss
from kdstudy.core import View

OWN, OTHER = [0.8, 0.4], [0.9, 0.5]  # what a discriminator says of either network's maps
precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def view_of(*shapes: tuple[int, ...], seed: int = 0) -> View:
    """A view with a map of each of these shapes."""
    return View(random(shapes[0][0], 5, seed=seed), maps=tuple(random(*shape, seed=seed) for shape in shapes))


# the adversarial terms


@precisions
def test_the_adversarial_terms_are_the_oracles(dtype):
    own, other = (torch.tensor(answers, dtype=dtype) for answers in (OWN, OTHER))
    for loss, name in ((generator_loss(own), "afd_LG"), (discriminator_loss(own, other), "afd_LD")):
        assert loss.shape == () and loss.dtype == dtype
        assert loss.item() == pytest.approx(oracles()[name], abs=TOLERANCE[dtype])


def test_the_followed_networks_maps_are_the_real_ones():
    own, other = torch.zeros(3, 1), torch.ones(3, 1)
    assert discriminator_loss(own, other) == 0 and discriminator_loss(other, own) == 2
    assert generator_loss(other) == 0 and generator_loss(own) == 1


def test_the_two_terms_pull_a_discriminators_answer_apart():
    own, other = (torch.tensor(answers, requires_grad=True) for answers in (OWN, OTHER))
    (upwards,) = torch.autograd.grad(generator_loss(own), own)
    downwards, upwards_too = torch.autograd.grad(discriminator_loss(own, other), (own, other))
    assert (upwards < 0).all() and (downwards > 0).all() and (upwards_too < 0).all()


# the term of the logits


@precisions
@pytest.mark.parametrize("temperature", [1, 2, 4])
def test_the_term_of_the_logits_is_the_oracles_forward_kl(dtype, temperature):
    student, teacher, labels = batch_a(dtype)
    loss = loss_of(AdversarialDistillation(temperature=float(temperature)), student.logits, teacher.logits, labels)
    assert loss.item() == pytest.approx(oracles()[f"kd_T{temperature}"], abs=TOLERANCE[dtype])


def test_the_default_total_is_cross_entropy_and_nine_times_the_kl_at_temperature_three():
    def softened(logits):
        powers = [math.exp(z / 3) for z in logits]
        return [power / sum(powers) for power in powers]

    divergence = 0.0
    for z_s, z_t in zip(STUDENT_A, TEACHER_A, strict=True):
        for p, q in zip(softened(z_t), softened(z_s), strict=True):
            divergence += p * math.log(p / q) / len(LABELS_A)
    student, teacher, labels = batch_a()
    total = total_of(AdversarialDistillation(), student, teacher, labels)
    assert total.item() == pytest.approx(oracles()["ce"] + 9 * divergence)


# discriminator and transfer layer


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sides", [(8, 8), (7, 4), (2, 2), (1, 1)])
def test_the_discriminator_layer_by_layer(training, sides):
    torch.manual_seed(0)
    judge = discriminator(3).double()
    norms = [module for module in judge if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    x = maps = random(4, 3, *sides)
    convolutions = [module.weight for module in judge if isinstance(module, nn.Conv2d)]
    for weight, norm in zip(convolutions, norms, strict=True):
        x = F.conv2d(x, weight, stride=2, padding=1)
        mean = x.mean(dim=(0, 2, 3)) if training else norm.running_mean
        variance = x.var(dim=(0, 2, 3), correction=0) if training else norm.running_var
        x = (x - mean.view(-1, 1, 1)) / (variance.view(-1, 1, 1) + norm.eps).sqrt()
        x = x * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
        x = torch.where(x > 0, x, 0.2 * x)
    (linear,) = [module for module in judge if isinstance(module, nn.Linear)]
    expected = 1 / (1 + (-(x.mean(dim=(2, 3)) @ linear.weight.T + linear.bias)).exp())
    found = judge.train(training)(maps)
    assert found.shape == (4, 1) and ((found > 0) & (found < 1)).all()
    torch.testing.assert_close(found, expected)


def extra_parameters(student: View, teacher: View) -> dict[str, int]:
    adapters = AdversarialDistillation().adapters(student, teacher)
    return {name: sum(p.numel() for p in module.parameters()) for name, module in adapters.items()}


def test_networks_of_one_width_have_a_discriminator_and_nothing_to_transfer():
    view = view_of((2, 4, 8, 8), (2, 6, 4, 4))
    assert extra_parameters(view, view) == {"discriminator": 2 * (9 * 6 * 6 + 2 * 6) + 6 + 1, "transfer": 0}


def test_of_other_widths_the_learners_maps_are_transferred_to_those_that_it_follows():
    narrow, broad = view_of((2, 4, 4, 4)), view_of((2, 6, 4, 4))
    judges = {width: 2 * (9 * width**2 + 2 * width) + width + 1 for width in (4, 6)}
    assert extra_parameters(narrow, broad) == {"discriminator": judges[6], "transfer": 4 * 6 + 2 * 6}
    assert extra_parameters(broad, narrow) == {"discriminator": judges[4], "transfer": 4 * 6 + 2 * 4}


@pytest.mark.parametrize(("own_side", "other_side"), [(4, 4), (8, 4), (4, 8)])
def test_maps_of_the_last_stage_are_compared_at_one_shape(own_side, other_side):
    student = view_of((2, 9, 16, 16), (2, 4, own_side, own_side))
    teacher = view_of((2, 9, 16, 16), (2, 6, other_side, other_side), seed=1)
    method = AdversarialDistillation()
    torch.manual_seed(0)
    adapters = method.adapters(student, teacher).double()
    own, other = method.rival_maps(student, teacher, adapters)
    assert own.shape == other.shape == (2, 6, 4, 4)
    pooled, expected = (
        F.avg_pool2d(view.maps[-1], view.maps[-1].shape[-1] // 4) if view.maps[-1].shape[-1] > 4 else view.maps[-1]
        for view in (student, teacher)
    )
    torch.testing.assert_close(other, expected)
    torch.testing.assert_close(own, adapters["transfer"](pooled))


def test_without_a_transfer_layer_the_maps_are_the_networks_own():
    student, teacher = view_of((2, 4, 4, 4)), view_of((2, 4, 4, 4), seed=1)
    method = AdversarialDistillation()
    own, other = method.rival_maps(student, teacher, method.adapters(student, teacher))
    assert torch.equal(own, student.maps[-1]) and torch.equal(other, teacher.maps[-1])


# wrong use


def test_networks_without_maps_are_refused():
    shown = view_of((2, 4, 4, 4))
    for views, who in (((View(shown.logits), shown), "student"), ((shown, View(shown.logits)), "teacher")):
        with pytest.raises(ValueError, match=f"the {who} shows no maps"):
            AdversarialDistillation().adapters(*views)


@pytest.mark.parametrize("field", ["temperature", "adversarial_learning_rate"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_bad_hyperparameter_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field} must be a finite number above 0"):
        AdversarialDistillation(**{field: value})


@pytest.mark.parametrize("field", ["ce_weight", "kd_weight"])
def test_a_bad_weight_is_named(field):
    with pytest.raises(ValueError, match=rf"{field} must be .* not -1.0"):
        AdversarialDistillation(**{field: -1.0})
