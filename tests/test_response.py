"""Losses on logits: reference values, and what holds for every method that reads logits only."""

import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from batches import EDITED, TOLERANCE, batch_a, deterministic, loss_of, oracles, random_logits, row, total_of
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kdstudy.core import View
from kdstudy.relative import EarthMover, RelativeV2, RelativeV3
from kdstudy.response import CrossEntropy, SphericalKD, TwoTemperature, VanillaKD, hard_soft_weights

NO_ADAPTERS = nn.ModuleDict()
PULLED_TO_TEACHER = [
    VanillaKD(),
    TwoTemperature(),
    SphericalKD(mode="norm"),
    SphericalKD(mode="layernorm"),
    SphericalKD(mode="stdmatch"),
]
every_method = pytest.mark.parametrize("method", PULLED_TO_TEACHER + EDITED, ids=repr)
precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@precisions
@pytest.mark.parametrize(
    ("method", "key"),
    [
        (VanillaKD(temperature=1.0), "kd_T1"),
        (VanillaKD(temperature=2.0), "kd_T2"),
        (VanillaKD(temperature=4.0), "kd_T4"),
        (TwoTemperature(), "twotemp"),
        (SphericalKD(), "skd_kd_T4"),
        (SphericalKD(mode="layernorm"), "skd_layernorm_mult2_kd_T4"),
        (SphericalKD(mode="stdmatch"), "skd_stdmatch_kd_T4"),
    ],
    ids=str,
)
def test_loss_is_the_oracles(method, key, dtype):
    loss = method.loss(*batch_a(dtype), NO_ADAPTERS)
    assert loss.dtype == dtype and loss.shape == ()
    assert loss.item() == pytest.approx(oracles()[key], abs=TOLERANCE[dtype])


@precisions
@pytest.mark.parametrize(
    ("method", "key"),
    [
        (VanillaKD(temperature=1.0), "kd_T1_per_sample"),
        (VanillaKD(temperature=2.0), "kd_T2_per_sample"),
        (VanillaKD(temperature=4.0), "kd_T4_per_sample"),
        (TwoTemperature(), "twotemp_T2_T10_per_sample"),
    ],
    ids=str,
)
def test_loss_of_a_batch_of_one_is_the_oracles(method, key, dtype):
    student, teacher, labels = batch_a(dtype)
    for index, expected in enumerate(oracles()[key]):
        loss = method.loss(row(student, index), row(teacher, index), labels[index : index + 1], NO_ADAPTERS)
        assert loss.item() == pytest.approx(expected, abs=TOLERANCE[dtype])


@precisions
@pytest.mark.parametrize(
    ("method", "key"),
    [
        (CrossEntropy(), "ce"),
        (VanillaKD(), "vanilla_a0.1_T4"),
        (VanillaKD(**hard_soft_weights(0.1)), "vanilla_a0.1_T4"),
        (VanillaKD(**hard_soft_weights(0.1, weighs_kd=True)), "vanilla_alg1meaning_a0.1_T4"),
        (TwoTemperature(), "twotemp_total_a0.3"),
        (SphericalKD(), "skd_total_kd0.9"),
        (SphericalKD(kd_weight=0.0, ce_weight=1.0), "skd_ce_normalised"),
    ],
    ids=str,
)
def test_total_is_the_oracles(method, key, dtype):
    assert total_of(method, *batch_a(dtype)).item() == pytest.approx(oracles()[key], abs=TOLERANCE[dtype])


def test_the_divergence_is_in_nats():
    nats = VanillaKD(temperature=1.0).loss(*batch_a(), NO_ADAPTERS).item()
    assert nats / math.log(2) == pytest.approx(oracles()["kl_log2_T1"], abs=1e-6)


def test_cross_entropy_has_one_term_and_needs_no_teacher():
    student, _, labels = batch_a()
    terms = CrossEntropy().objective(student, None, labels, NO_ADAPTERS)
    assert list(terms) == ["ce"]
    assert CrossEntropy().loss(student, None, labels, NO_ADAPTERS).item() == 0


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan, "1e-1"])
def test_weights_of_a_sum_lie_between_0_and_1(weight):
    with pytest.raises(ValueError, match=f"weight must be .* not {weight!r}"):
        hard_soft_weights(weight)


def test_weights_of_a_sum_are_written_without_rounding_noise():
    assert hard_soft_weights(0.9) == {"ce_weight": 0.9, "kd_weight": 0.1}


@deterministic
@given(st.floats(0.5, 50), st.floats(0.5, 50), st.integers(0, 99))
def test_two_temperatures_soften_each_sample_with_its_own(right, wrong, seed):
    student, teacher, labels = random_logits(8, 6, 4.0, seed)
    rows = []
    for z_s, z_t, label in zip(student, teacher, labels, strict=True):
        t = right if z_t.argmax() == label else wrong
        rows.append(t * t * F.kl_div((z_s / t).log_softmax(0), (z_t / t).softmax(0), reduction="sum"))
    method = TwoTemperature(temperature_right=right, temperature_wrong=wrong)
    torch.testing.assert_close(loss_of(method, student, teacher, labels), torch.stack(rows).mean())


def test_a_high_temperature_matches_centred_logits():
    student, teacher, labels = random_logits(16, 10)
    difference = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    limit = difference.square().sum(dim=1).mean() / (2 * 10)
    assert loss_of(VanillaKD(temperature=1e4), student, teacher, labels).item() == pytest.approx(limit.item(), rel=1e-3)


def spherical_adapters(method, *teacher_logits):
    views = [View(logits) for logits in teacher_logits]
    adapters = method.adapters(views[0], views[0]).double()
    method.calibrate(adapters, iter(views))
    return adapters


@precisions
def test_the_teachers_norm_over_the_training_set_is_the_oracles(dtype):
    student, teacher, labels = batch_a(dtype)
    method = SphericalKD()
    adapters = method.adapters(student, teacher).to(dtype)
    method.calibrate(adapters, [teacher])
    assert adapters["teacher_norm"].mean.item() == pytest.approx(oracles()["skd_lavg"], abs=TOLERANCE[dtype])
    total = total_of(method, student, teacher, labels, adapters)
    assert total.item() == pytest.approx(oracles()["skd_total_kd0.9"], abs=TOLERANCE[dtype])
    assert not list(adapters.parameters())


def test_the_teachers_norm_weighs_samples_not_batches():
    logits = torch.eye(3, dtype=torch.float64) * torch.tensor([3.0, 6.0, 12.0])
    adapters = spherical_adapters(SphericalKD(), logits[:2], logits[2:])
    assert adapters["teacher_norm"].mean.item() == pytest.approx(7.0, abs=1e-6)


def test_the_measured_norm_scales_both_terms_and_goes_with_the_state():
    method = SphericalKD()
    student, teacher, labels = batch_a()
    adapters = method.adapters(student, teacher).double()
    adapters.load_state_dict(spherical_adapters(method, 3 * teacher.logits).state_dict())
    n_s = 3 * oracles()["skd_lavg"] * F.normalize(student.logits)
    n_t = 3 * oracles()["skd_lavg"] * F.normalize(teacher.logits)
    expected = 0.1 * F.cross_entropy(n_s, labels) + 0.9 * loss_of(VanillaKD(), n_s, n_t, labels)
    assert total_of(method, student, teacher, labels, adapters).item() == pytest.approx(expected.item(), abs=1e-6)


def test_an_unmeasured_norm_cannot_pass_for_a_result():
    student, teacher, labels = batch_a()
    adapters = SphericalKD().adapters(student, teacher)
    assert SphericalKD().loss(student, teacher, labels, adapters).isnan()


@pytest.mark.parametrize(
    "method", [SphericalKD(teacher_norm="batch"), SphericalKD(mode="layernorm"), SphericalKD(mode="stdmatch")], ids=repr
)
def test_where_no_norm_is_kept_the_teacher_is_not_run_over_the_training_set(method):
    def views():
        pytest.fail("the teacher was run")
        yield

    student, teacher, _ = batch_a()
    method.calibrate(method.adapters(student, teacher), views())


@pytest.mark.parametrize("mode", ["norm", "layernorm", "stdmatch"])
def test_spherical_is_blind_to_the_length_of_the_students_logits(mode):
    student, teacher, labels = random_logits(32, 10, 3.0)
    short = total_of(SphericalKD(mode=mode), View(student), View(teacher), labels)
    long = total_of(SphericalKD(mode=mode), View(7 * student), View(teacher), labels)
    assert short.item() == pytest.approx(long.item(), abs=1e-6)


def test_layernorm_is_blind_to_a_shift_of_either_networks_logits():
    student, teacher, labels = random_logits(32, 10, 3.0)
    method = SphericalKD(mode="layernorm", multiplier=2.5)
    loss = loss_of(method, student, teacher, labels)
    assert loss_of(method, student + 5, teacher - 9, labels).item() == pytest.approx(loss.item(), abs=1e-9)


@pytest.mark.parametrize("constant", [0.0, 3.0])
@pytest.mark.parametrize("mode", ["norm", "layernorm", "stdmatch"])
@precisions
def test_spherical_survives_equal_logits(mode, constant, dtype):
    _, teacher, labels = random_logits(4, 10, dtype=dtype)
    for flat_teacher in (teacher, torch.full_like(teacher, constant)):
        student = torch.full_like(teacher, constant, requires_grad=True)
        total = total_of(SphericalKD(mode=mode), View(student), View(flat_teacher), labels)
        total.backward()
        assert total.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("method", [VanillaKD(), TwoTemperature()], ids=repr)
def test_the_students_gradient_is_the_difference_of_the_softened_distributions(method):
    student, teacher, labels = random_logits(16, 7, 3.0)
    loss_of(method, student.requires_grad_(), teacher, labels).backward()
    two = isinstance(method, TwoTemperature)
    t = method.temperatures(teacher, labels).unsqueeze(1) if two else method.temperature
    expected = t * ((student.detach() / t).softmax(1) - (teacher / t).softmax(1)) / 16
    torch.testing.assert_close(student.grad, expected)


@pytest.mark.parametrize("mode", ["norm", "layernorm", "stdmatch"])
def test_spherical_has_the_gradient_of_its_value(mode):
    student, teacher, labels = random_logits(4, 5, 2.0)

    def total(logits):
        return total_of(SphericalKD(mode=mode), View(logits), View(teacher), labels)

    assert torch.autograd.gradcheck(total, student.requires_grad_())


@every_method
def test_neither_the_order_nor_the_repetition_of_samples_matters(method):
    student, teacher, labels = random_logits(24, 6, 3.0)
    loss = loss_of(method, student, teacher, labels)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    twice = torch.arange(24).repeat(2)
    for pick in (order, twice):
        torch.testing.assert_close(loss_of(method, student[pick], teacher[pick], labels[pick]), loss)


@every_method
def test_the_inputs_are_left_alone(method):
    student, teacher, labels = random_logits(8, 6, 3.0)
    copies = [x.clone() for x in (student, teacher, labels)]
    loss_of(method, student, teacher, labels)
    assert all(torch.equal(x, copy) for x, copy in zip((student, teacher, labels), copies, strict=True))


@pytest.mark.parametrize("method", PULLED_TO_TEACHER, ids=repr)
def test_equal_networks_have_no_loss(method):
    student, teacher, labels = random_logits(24, 6, 3.0)
    assert loss_of(method, teacher, teacher, labels).item() == pytest.approx(0, abs=1e-14)
    assert loss_of(method, student, teacher, labels) > 0.01


@every_method
def test_finite_for_half_precision_logits_in_full_precision(method):
    student, teacher, labels = random_logits(24, 100, 8.0, dtype=torch.bfloat16)
    student = View(student).full_precision().logits.requires_grad_()
    loss = loss_of(method, student, View(teacher).full_precision().logits, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and student.grad.isfinite().all()


@every_method
def test_finite_for_logits_hundreds_apart(method):
    _, _, labels = random_logits(24, 10)
    student, teacher, _ = random_logits(24, 10, 600.0, dtype=torch.float32)
    student.requires_grad_()
    coldest = {field: 1.0 for field in asdict(method) if field.startswith("temperature")}
    loss = loss_of(replace(method, **coldest), student, teacher, labels)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


@every_method
def test_no_value_decides_what_is_run(method):
    """Without values there is nothing to wait for and no shape can depend on them: what a captured graph needs."""
    student, teacher = torch.empty(2, 8, 10, device="meta")
    labels = torch.empty(8, dtype=torch.long, device="meta")
    loss = loss_of(method, student.requires_grad_(), teacher, labels)
    loss.backward()
    assert loss.shape == () and student.grad.shape == (8, 10)


@every_method
def test_hyperparameters_survive_a_round_trip(method):
    assert type(method)(**asdict(method)) == method


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, "4", True])
@every_method
def test_a_bad_temperature_is_named(method, value):
    for field in (field for field in asdict(method) if field.startswith("temperature")):
        with pytest.raises(ValueError, match=rf"{field} must be .* not {value!r}"):
            replace(method, **{field: value})


@pytest.mark.parametrize("field", ["ce_weight", "kd_weight"])
@pytest.mark.parametrize("method", [CrossEntropy(), *PULLED_TO_TEACHER, *EDITED], ids=repr)
def test_a_negative_weight_is_named(method, field):
    with pytest.raises(ValueError, match=f"{field} must be .* not -0.5"):
        replace(method, **{field: -0.5})


@pytest.mark.parametrize(
    ("kind", "field", "value", "allowed"),
    [
        (CrossEntropy, "kd_weight", 0.5, "must be 0"),
        (SphericalKD, "mode", "l1", "norm, layernorm, stdmatch"),
        (SphericalKD, "teacher_norm", "epoch", "train_set, batch"),
        (SphericalKD, "multiplier", 0.0, "above 0"),
        (RelativeV2, "order", "random", "value, abs"),
        (RelativeV3, "order", "random", "value, abs"),
        (RelativeV3, "fill", "mean", "zero, min"),
        (EarthMover, "renormalise", True, "False"),
    ],
)
def test_a_bad_choice_is_named_with_what_is_allowed(kind, field, value, allowed):
    with pytest.raises(ValueError) as error:
        kind(**{field: value})
    assert field in str(error.value) and repr(value) in str(error.value) and allowed in str(error.value)
