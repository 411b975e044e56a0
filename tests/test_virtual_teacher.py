"""Teacher-free distillation: reference values of both variants, and what its multiplier has to do with classes."""

import math

import pytest
import torch
import torch.nn.functional as F
from batches import TOLERANCE, batch_a, loss_of, oracles, random_logits, total_of
from torch import nn

from kdstudy.core import View
from kdstudy.response import VanillaKD
from kdstudy.virtual_teacher import TeacherFreeSelf, VirtualTeacher

NO_ADAPTERS = nn.ModuleDict()
VARIANTS = ("paper", "code")
precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@precisions
@pytest.mark.parametrize(
    ("variant", "key"), [("paper", "tfreg_target_powT20_paper"), ("code", "tfreg_target_logitT20_official")]
)
def test_the_virtual_teacher_is_the_oracle(variant, key, dtype):
    student, _, labels = batch_a(dtype)
    target = VirtualTeacher(variant=variant).target(student.logits, labels)
    assert target.dtype == dtype
    assert target[0].tolist() == pytest.approx(oracles()[key], abs=TOLERANCE[dtype])


@precisions
@pytest.mark.parametrize(
    ("method", "key"),
    [
        (VirtualTeacher(), "tfreg_kl_paper_batchmean_T20"),
        (VirtualTeacher(variant="code", multiplier=1.0), "tfreg_kl_official_mean_elem"),
        (VirtualTeacher(variant="code", multiplier=5.0), "tfreg_kl_official_batchmean"),
    ],
    ids=str,
)
def test_the_loss_is_the_oracle(method, key, dtype):
    student, _, labels = batch_a(dtype)
    loss = method.loss(student, student.detach(), labels, NO_ADAPTERS)
    assert loss.dtype == dtype and loss.shape == ()
    assert loss.item() == pytest.approx(oracles()[key], abs=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("variant", "expected"),
    [("paper", "tfreg_kl_paper_batchmean_T20"), ("code", "tfreg_kl_official_mean_elem")],
)
def test_the_total_has_the_released_weights(variant, expected):
    student, _, labels = batch_a()
    kd = oracles()[expected] * (100 if variant == "code" else 1)
    total = total_of(VirtualTeacher(variant=variant), student, student.detach(), labels)
    assert total.item() == pytest.approx(0.9 * oracles()["ce"] + 0.1 * kd, abs=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_by_hand_for_other_numbers(variant):
    student, _, labels = random_logits(8, 6, 3.0)
    method = VirtualTeacher(variant=variant, temperature=7.0, confidence=0.8, multiplier=3.0)
    rows = []
    for z, y in zip(student.tolist(), labels.tolist(), strict=True):
        p = [0.8 if c == y else 0.2 / 5 for c in range(6)]
        scores = [x ** (1 / 7) if variant == "paper" else math.exp(x / 7) for x in p]
        target = [score / sum(scores) for score in scores]
        t = 7.0 if variant == "paper" else 1.0
        powers = [math.exp(value / t) for value in z]
        own = [power / sum(powers) for power in powers]
        rows.append(sum(a * math.log(a / b) for a, b in zip(target, own, strict=True)))
    expected = sum(rows) / 8 * (1 if variant == "paper" else 3 / 6)
    assert loss_of(method, student, student, labels).item() == pytest.approx(expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_virtual_teacher_is_always_right_and_sums_to_one(variant):
    logits, _, labels = random_logits(32, 10, 3.0)
    target = VirtualTeacher(variant=variant).target(logits, labels)
    assert torch.equal(target.argmax(dim=1), labels)
    torch.testing.assert_close(target.sum(dim=1), torch.ones(32, dtype=torch.float64))


def test_softened_as_logits_the_virtual_teacher_is_all_but_uniform():
    logits, _, labels = random_logits(4, 100)
    paper, code = (VirtualTeacher(variant=v).target(logits, labels).max().item() for v in VARIANTS)
    assert code == pytest.approx(0.0105, abs=1e-4) and paper > 0.014


def test_the_paper_variant_knows_no_multiplier_and_no_square_of_the_temperature():
    student, _, labels = random_logits(8, 6)
    assert loss_of(VirtualTeacher(multiplier=7.0), student, student, labels) == loss_of(
        VirtualTeacher(), student, student, labels
    )
    target = VirtualTeacher().target(student, labels)
    expected = F.kl_div((student / 20).log_softmax(dim=1), target, reduction="batchmean")
    assert loss_of(VirtualTeacher(), student, student, labels).item() == pytest.approx(expected.item())


def test_the_virtual_teacher_needs_nobody():
    student, _, labels = batch_a()
    method = VirtualTeacher()
    assert not method.needs_teacher
    assert list(method.objective(student, None, labels, NO_ADAPTERS)) == ["ce", "kd"]


@pytest.mark.parametrize(("classes", "weight"), [(100, 0.475), (10, 4.75)])
def test_the_released_multiplier_is_that_of_a_mean_over_classes(classes, weight):
    student, teacher, labels = random_logits(8, classes, 3.0)
    terms = TeacherFreeSelf().objective(View(student), View(teacher), labels, NO_ADAPTERS)
    p, q = (teacher / 6).softmax(dim=1), (student / 6).log_softmax(dim=1)
    kl = (p * (p.log() - q)).sum(dim=1).mean()
    assert terms["kd"].item() == pytest.approx(weight * 36 * kl.item())
    released = 0.95 * 50 * 36 * (p * (p.log() - q)).mean()
    assert terms["kd"].item() == pytest.approx(released.item())
    assert terms["ce"].item() == pytest.approx(0.05 * F.cross_entropy(student, labels).item())


@precisions
def test_a_multiplier_of_the_classes_is_plain_distillation(dtype):
    student, teacher, labels = batch_a(dtype)
    loss = TeacherFreeSelf(temperature=4.0, multiplier=5.0).loss(student, teacher, labels, NO_ADAPTERS)
    assert loss.item() == pytest.approx(oracles()["kd_T4"], abs=TOLERANCE[dtype])
    plain = VanillaKD(ce_weight=0.05, kd_weight=0.95, temperature=4.0)
    ours = TeacherFreeSelf(temperature=4.0, multiplier=5.0)
    assert total_of(ours, student, teacher, labels).item() == pytest.approx(
        total_of(plain, student, teacher, labels).item()
    )


EVERY = [VirtualTeacher(), VirtualTeacher(variant="code"), TeacherFreeSelf()]


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_finite_for_logits_hundreds_apart(method):
    student, teacher, labels = random_logits(24, 10, 600.0, dtype=torch.float32)
    loss = loss_of(method, student.requires_grad_(), teacher, labels)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all() and student.grad.any()


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_no_value_decides_what_is_run(method):
    student, teacher = torch.empty(2, 8, 10, device="meta")
    labels = torch.empty(8, dtype=torch.long, device="meta")
    assert loss_of(method, student, teacher, labels).shape == ()


@pytest.mark.parametrize(
    ("kind", "field", "value", "allowed"),
    [
        (VirtualTeacher, "temperature", 0.0, "above 0"),
        (VirtualTeacher, "confidence", 1.0, "below 1"),
        (VirtualTeacher, "confidence", 0.0, "above 0"),
        (VirtualTeacher, "multiplier", -1.0, "above 0"),
        (VirtualTeacher, "variant", "official", "paper, code"),
        (TeacherFreeSelf, "temperature", math.inf, "above 0"),
        (TeacherFreeSelf, "multiplier", 0, "above 0"),
        (TeacherFreeSelf, "kd_weight", -0.5, "at least 0"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(kind, field, value, allowed):
    with pytest.raises(ValueError) as error:
        kind(**{field: value})
    assert field in str(error.value) and repr(value) in str(error.value) and allowed in str(error.value)
