"""Zero-shot transfer and data impressions: their terms against oracles and closed forms; labels that do not exist."""

import math

import pytest
import torch
import torch.nn.functional as F
from batches import TOLERANCE, batch_a, loss_of, maps_f, oracles, random_logits
from torch import nn

from kdstudy.core import View
from kdstudy.data_free import DataImpressions, ZeroShotTransfer, element_mean_kl

NO_ADAPTERS = nn.ModuleDict()
both = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


@both
def test_the_divergence_of_zero_shot_transfer_is_the_oracle_over_the_number_of_classes(dtype):
    student, teacher, labels = batch_a(dtype)
    expected = oracles()["zskt_kl_mean_elem"]
    found = loss_of(ZeroShotTransfer(), student.logits, teacher.logits, labels)
    assert found.item() == pytest.approx(expected, abs=TOLERANCE[dtype])
    assert 5 * found.item() == pytest.approx(oracles()["zskt_kl_batchmean"], abs=TOLERANCE[dtype])
    assert element_mean_kl(student.logits, teacher.logits).item() == found.item()


@both
def test_attention_is_summed_over_stages_and_weighed_as_the_oracle(dtype):
    student, teacher, labels = maps_f(dtype)
    pair = (student._replace(maps=student.maps * 3), teacher._replace(maps=teacher.maps * 3))
    terms = ZeroShotTransfer().objective(*pair, labels, NO_ADAPTERS)
    assert list(terms) == ["kd", "attention"]
    expected = 3 * 250 * oracles()["at_sump2_mean"]
    assert terms["attention"].item() == pytest.approx(expected, rel=TOLERANCE[dtype])
    assert terms["kd"].item() == 0  # equal logits


def test_the_divergence_goes_from_the_teacher_to_the_student():
    student, teacher, labels = random_logits(6, 4, 2.0)
    rows = []
    for z_s, z_t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = ([math.exp(z) / sum(map(math.exp, row)) for z in row] for row in (z_t, z_s))
        rows += [a * math.log(a / b) for a, b in zip(p, q, strict=True)]
    assert loss_of(ZeroShotTransfer(), student, teacher, labels).item() == pytest.approx(sum(rows) / 24)


def test_a_weight_of_zero_leaves_its_term_out():
    student, teacher, labels = maps_f()
    bare = [view._replace(maps=()) for view in (student, teacher)]
    assert list(ZeroShotTransfer(attention_weight=0.0).objective(*bare, labels, NO_ADAPTERS)) == ["kd"]


def test_nothing_depends_on_labels_by_default():
    student, teacher, _ = random_logits(5, 4)
    maps = (torch.rand(5, 2, 3, 3, dtype=torch.float64),)
    for method in (ZeroShotTransfer(), DataImpressions()):
        views = View(student, maps=maps), View(teacher, maps=maps)
        one, other = (sum(method.objective(*views, torch.full((5,), y), NO_ADAPTERS).values()).item() for y in (0, 3))
        assert one == other


@both
def test_data_impressions_are_the_divergence_of_softened_answers_times_the_square_of_the_temperature(dtype):
    student, teacher, labels = random_logits(7, 5, 6.0, dtype=dtype)
    total = 0.0
    for z_s, z_t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = ([math.exp(z / 20) / sum(math.exp(x / 20) for x in row) for z in row] for row in (z_t, z_s))
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    found = loss_of(DataImpressions(), student, teacher, labels).item()
    assert found == pytest.approx(400 * total / 7, rel=TOLERANCE[dtype])


def test_data_impressions_have_the_gradient_of_the_released_soft_cross_entropy():
    _, teacher, labels = random_logits(7, 5, 6.0)
    student = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    released = 9 * F.cross_entropy(student / 3, (teacher / 3).softmax(dim=1))
    ours = loss_of(DataImpressions(temperature=3.0), student, teacher, labels)
    slopes = [torch.autograd.grad(each, student)[0] for each in (ours, released)]
    torch.testing.assert_close(*slopes)
    assert ours < released


def test_data_impressions_add_the_labels_that_the_teacher_gives():
    student, teacher, labels = batch_a()
    terms = DataImpressions(ce_weight=0.3).objective(student, teacher, labels, NO_ADAPTERS)
    assert terms["ce"].item() == pytest.approx(0.3 * oracles()["ce"])


def test_a_weight_on_labels_that_generated_images_do_not_have_is_refused():
    with pytest.raises(ValueError, match=r"ce_weight must be 0, not 0\.1: generated images have no labels"):
        ZeroShotTransfer(ce_weight=0.1)


def test_networks_whose_stages_do_not_pair_up_are_refused_where_attention_is_compared():
    student, teacher, _ = maps_f()
    with pytest.raises(ValueError, match="equally many stages"):
        ZeroShotTransfer().adapters(student, teacher._replace(maps=()))
    assert not ZeroShotTransfer(attention_weight=0.0).adapters(student, teacher._replace(maps=()))


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        (ZeroShotTransfer, "attention_weight", -1.0),
        (ZeroShotTransfer, "kd_weight", float("nan")),
        (DataImpressions, "temperature", 0.0),
    ],
)
def test_a_bad_hyperparameter_is_named(method, field, value):
    with pytest.raises(ValueError, match=rf"{field} must be"):
        method(**{field: value})
