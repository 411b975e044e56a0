"""Mimicked, decoupled, correlated, standardised and multi-level logits: reference values, identities, wrong use."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from batches import TOLERANCE, batch_a, deterministic, loss_of, oracles, random_logits, row, total_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kdstudy.core import Clock, View, softened_kl
from kdstudy.logits import DIST, DecoupledKD, LogitMimic, MultiLevel, StandardisedKD, standardised, unsure
from kdstudy.response import VanillaKD

NO_ADAPTERS = nn.ModuleDict()
ON_LOGITS = [LogitMimic(), DecoupledKD(), DecoupledKD(standardise=True), DIST(), StandardisedKD()]
TWO_VIEWS = [MultiLevel(), MultiLevel(variant="masked"), MultiLevel(standardise=True)]
every_method = pytest.mark.parametrize("method", ON_LOGITS + TWO_VIEWS, ids=repr)
precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def batch_a3(dtype: torch.dtype = torch.float64) -> tuple[View, View, Tensor]:
    """Batch A with a third image."""
    student, teacher, labels = batch_a(dtype)
    more = torch.tensor([[0.1, 0.6, 0.9, -0.2, 0.4], [0.2, -0.3, 1.9, 0.4, 2.6]], dtype=dtype)
    views = (View(torch.cat([view.logits, third[None]])) for view, third in zip((student, teacher), more, strict=True))
    return *views, torch.cat([labels, torch.tensor([4])])


def two_views(dtype: torch.dtype = torch.float64) -> tuple[View, View, Tensor]:
    """Batch A seen weakly; the strong view is that of a third network against the same teacher."""
    student, teacher, labels = batch_a(dtype)
    third = torch.tensor([[1.0, 0, 0, 0, 0], [0, 0, 1, 0, 0]], dtype=dtype)
    return student._replace(strong=View(third)), teacher._replace(strong=teacher), labels


def random_views(batch: int, classes: int, scale: float = 3.0, dtype: torch.dtype = torch.float64):
    """Student and teacher views with strong ones beside them, and labels."""
    student, teacher, labels = random_logits(batch, classes, scale, dtype=dtype)
    strong_s, strong_t, _ = random_logits(batch, classes, scale, seed=1, dtype=dtype)
    return View(student, strong=View(strong_s)), View(teacher, strong=View(strong_t)), labels


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(value - top) for value in row]
    return [power / sum(powers) for power in powers]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


# ---- mimic


@precisions
def test_mimic_is_the_oracle(dtype):
    loss = LogitMimic().loss(*batch_a(dtype), NO_ADAPTERS)
    assert loss.dtype == dtype and loss.shape == ()
    assert loss.item() == pytest.approx(oracles()["mimic_half_mean"], abs=TOLERANCE[dtype])


def test_mimic_compares_raw_logits_not_probabilities():
    """Some public code takes the squared error of softened probabilities for the distillation loss, and vice versa."""
    student, teacher, labels = random_logits(8, 5, 2.0)
    loss = loss_of(LogitMimic(), student, teacher, labels)
    assert loss_of(LogitMimic(), 3 * student, 3 * teacher, labels).item() == pytest.approx(9 * loss.item())
    assert loss_of(LogitMimic(), student + 1, student, labels).item() == pytest.approx(2.5)


def test_mimic_uses_no_labels():
    assert list(LogitMimic().objective(*batch_a(), NO_ADAPTERS)) == ["kd"]


def test_mimic_is_the_limit_of_distillation_at_a_high_temperature():
    student, teacher, labels = random_logits(16, 10)
    student, teacher = (z - z.mean(1, keepdim=True) for z in (student, teacher))
    limit = 10 * loss_of(VanillaKD(temperature=1e4), student, teacher, labels).item()
    assert loss_of(LogitMimic(), student, teacher, labels).item() == pytest.approx(limit, rel=1e-3)


def test_normalised_mimic_compares_z_scores_over_the_training_set():
    method = LogitMimic(normalise=True)
    train, student = (random_logits(40, 6, 3.0, seed=seed)[0] for seed in (1, 2))
    teacher, labels = train[:20], torch.zeros(20, dtype=torch.long)
    adapters = method.adapters(View(student[:20]), View(teacher)).double()
    method.calibrate(adapters, [View(train[:30]), View(train[30:])])
    mean, deviation = train.numpy().mean(0), train.numpy().std(0)
    scored = [(z[:20].numpy() - mean) / deviation for z in (student, teacher)]
    expected = ((scored[0] - scored[1]) ** 2).sum() / 40
    loss = method.loss(View(student[:20]), View(teacher), labels, adapters)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert not list(adapters.parameters()) and "spread.deviation" in adapters.state_dict()


def test_an_unmeasured_deviation_cannot_pass_for_a_result():
    method = LogitMimic(normalise=True)
    student, teacher, labels = batch_a()
    assert method.loss(student, teacher, labels, method.adapters(student, teacher)).isnan()


def test_plain_mimic_does_not_run_the_teacher_over_the_training_set():
    def views():
        pytest.fail("the teacher was run")
        yield

    student, teacher, _ = batch_a()
    LogitMimic().calibrate(LogitMimic().adapters(student, teacher), views())


# ---- decoupled


@precisions
@pytest.mark.parametrize("temperature", [1, 4])
def test_both_decoupled_parts_are_the_oracles(temperature, dtype):
    student, teacher, labels = batch_a(dtype)
    method = DecoupledKD(temperature=float(temperature))
    for part, name in zip(method.parts(student, teacher, labels), ("tckd", "nckd"), strict=True):
        assert part.item() == pytest.approx(oracles()[f"g_dkd_T{temperature}_{name}"], abs=TOLERANCE[dtype])
    for index in range(2):
        parts = method.parts(row(student, index), row(teacher, index), labels[index : index + 1])
        for part, name in zip(parts, ("tckd", "nckd"), strict=True):
            wanted = oracles()[f"g_dkd_T{temperature}_{name}_per_sample"][index]
            assert part.item() == pytest.approx(wanted, abs=TOLERANCE[dtype])
    total = method.loss(student, teacher, labels, NO_ADAPTERS)
    assert total.dtype == dtype and total.shape == ()
    # the sum weighs the second part 8 times
    assert total.item() == pytest.approx(oracles()[f"g_dkd_T{temperature}_a1_b8"], abs=8 * TOLERANCE[dtype])


@precisions
def test_the_decoupled_total_is_the_oracle(dtype):
    total = total_of(DecoupledKD(), *batch_a(dtype))
    assert total.item() == pytest.approx(oracles()["g_dkd_total_ce1_a1_b8_T4"], abs=8 * TOLERANCE[dtype])


@deterministic
@given(st.floats(0.5, 20), st.integers(2, 9), st.integers(0, 99))
def test_the_parts_are_those_of_probabilities_and_make_up_plain_distillation(temperature, classes, seed):
    student, teacher, labels = random_logits(4, classes, 3.0, seed)
    sums = {"target": 0.0, "others": 0.0, "kd": 0.0}
    for z_s, z_t, label in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        p_s, p_t = (softmax([value / temperature for value in z]) for z in (z_s, z_t))
        rest_s, rest_t = (sum(p) - p[label] for p in (p_s, p_t))
        shares = [[p[c] / rest for c in range(classes) if c != label] for p, rest in ((p_s, rest_s), (p_t, rest_t))]
        target = kl([p_t[label], rest_t], [p_s[label], rest_s])
        others = kl(shares[1], shares[0])
        sums["target"] += target * temperature**2 / 4
        sums["others"] += others * temperature**2 / 4
        sums["kd"] += (target + rest_t * others) * temperature**2 / 4
    method = DecoupledKD(temperature=temperature)
    parts = method.parts(View(student), View(teacher), labels)
    assert [part.item() for part in parts] == pytest.approx([sums["target"], sums["others"]], rel=1e-6, abs=1e-9)
    plain = loss_of(VanillaKD(temperature=temperature), student, teacher, labels)
    assert plain.item() == pytest.approx(sums["kd"], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("gap", [18, 120])
def test_no_probability_is_logged_a_sure_student_has_the_oracles_loss(gap, half):
    """The usual code takes log(sum(softmax)), which is -inf from a gap of 18 T in float16 and of 104 T in float32."""
    student = torch.tensor([[gap, 0.0, 0, 0, 0]], dtype=half).requires_grad_()
    teacher = torch.tensor([[3.0, 1, 0, 0, 0]], dtype=half)
    views = [View(logits).full_precision() for logits in (student, teacher)]
    loss = DecoupledKD(temperature=1.0).loss(*views, torch.tensor([0]), NO_ADAPTERS)
    loss.backward()
    assert loss.item() == pytest.approx(oracles()[f"g_dkd_saturated_gap{gap}_T1_a1_b8"], abs=1e-4)
    assert student.grad.isfinite().all() and student.grad.any()


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("teacher_gap", [0.0, 60000.0])
@pytest.mark.parametrize("label", [0, 1])
def test_decoupled_stays_finite_at_the_end_of_float16(label, teacher_gap, classes):
    student, teacher = torch.zeros(2, 1, classes, dtype=torch.float16)
    student[0, 0], teacher[0, 0] = 60000.0, teacher_gap
    student.requires_grad_()
    views = [View(logits).full_precision() for logits in (student, teacher)]
    loss = DecoupledKD(temperature=1.0).loss(*views, torch.tensor([label]), NO_ADAPTERS)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_the_classes_beside_the_label_do_not_matter_to_the_target_part():
    student, teacher, labels = random_logits(8, 6, 2.0)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    where = order.argsort()[labels]
    one = DecoupledKD().parts(View(student), View(teacher), labels)
    other = DecoupledKD().parts(View(student[:, order]), View(teacher[:, order]), where)
    torch.testing.assert_close(one, other)
    mixed = student.clone()
    for image, label in enumerate(labels.tolist()):
        rest = [c for c in range(6) if c != label]
        mixed[image, rest] = student[image, rest[1:] + rest[:1]]
    target, others = DecoupledKD().parts(View(mixed), View(teacher), labels)
    torch.testing.assert_close(target, one[0])
    assert abs(others - one[1]) > 1e-2


def test_the_warm_up_is_a_share_of_the_run():
    student, teacher, labels = batch_a()
    method = DecoupledKD()
    adapters = method.adapters(student, teacher).double()
    full = method.loss(student, teacher, labels, NO_ADAPTERS).item()
    weights = []
    for epoch in range(200):
        adapters["clock"].set(epoch, 200)
        weights.append(method.loss(student, teacher, labels, adapters).item() / full)
    assert weights == pytest.approx([min((epoch + 1) / 20, 1) for epoch in range(200)], rel=1e-6)
    adapters["clock"].set(0, 200)
    assert replace(method, warm_up=0.0).loss(student, teacher, labels, adapters).item() == pytest.approx(full)
    assert isinstance(adapters["clock"], Clock) and not list(adapters.parameters())


@precisions
def test_decoupled_standardised_logits_are_the_oracles(dtype):
    method = DecoupledKD(standardise=True, temperature=2.0)
    for part, name in zip(method.parts(*batch_a(dtype)), ("tckd", "nckd"), strict=True):
        wanted = oracles()[f"g_logitstd_dkd_T2_{name}"]
        assert part.item() == pytest.approx(wanted, abs=TOLERANCE[dtype])


# ---- correlated


@precisions
@pytest.mark.parametrize("temperature", [1, 4])
def test_both_correlations_are_the_oracles(temperature, dtype):
    student, teacher, _ = batch_a3(dtype)
    parts = DIST(temperature=float(temperature)).parts(student, teacher)
    for part, name in zip(parts, ("inter", "intra"), strict=True):
        wanted = oracles()[f"g_dist_B3_T{temperature}_{name}_eps1e-8"]
        assert part.dtype == dtype and part.item() == pytest.approx(wanted, abs=TOLERANCE[dtype])


@precisions
def test_the_correlated_total_is_the_oracle(dtype):
    total = total_of(DIST(), *batch_a3(dtype))
    assert total.item() == pytest.approx(oracles()["g_dist_total_ce1_b2_g2_B3_T4_eps1e-8"], abs=4 * TOLERANCE[dtype])


def test_correlations_are_numpys():
    student, teacher, labels = random_logits(9, 6, 2.0)
    p_s, p_t = ((z / 4).softmax(1).numpy() for z in (student, teacher))
    inter = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p_s, p_t, strict=True)])
    intra = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p_s.T, p_t.T, strict=True)])
    expected = 16 * (3 * (1 - inter) + 5 * (1 - intra))
    method = DIST(inter_weight=3.0, intra_weight=5.0)
    assert loss_of(method, student, teacher, labels).item() == pytest.approx(expected, rel=1e-4)


def test_two_images_always_correlate_or_oppose_and_one_is_refused():
    assert DIST.least_batch == 2
    for seed in range(5):
        student, teacher, _ = random_logits(2, 5, seed=seed)
        _, intra = DIST(temperature=1.0).parts(View(student), View(teacher))
        opposed = ((student.softmax(1).diff(dim=0) * teacher.softmax(1).diff(dim=0)) < 0).double().mean()
        assert intra.item() == pytest.approx(2 * opposed.item(), abs=1e-3)


def test_equal_networks_correlate_but_for_epsilon():
    _, teacher, labels = random_logits(24, 10)
    loss = loss_of(DIST(), teacher, teacher, labels).item()
    assert 0 < loss < 2e-4
    rows, columns = ((teacher / 4).softmax(1) for _ in range(2))
    rows, columns = rows - rows.mean(1, keepdim=True), columns - columns.mean(0)
    lost = [1e-8 / (x.square().sum(dim) + 1e-8) for x, dim in ((rows, 1), (columns, 0))]
    assert loss == pytest.approx(32 * sum(part.mean().item() for part in lost), rel=1e-6)


@precisions
def test_a_class_that_never_varies_has_a_finite_gradient(dtype):
    student, teacher, labels = random_logits(8, 5, 2.0, dtype=dtype)
    student[:, 2] = -1e4  # no probability at all
    student[:, 3:] = student[:1, 3:]
    student.requires_grad_()
    for flat in (student.detach().clone(), teacher):
        loss = loss_of(DIST(), student, flat, labels)
        loss.backward()
        assert loss.isfinite() and student.grad.isfinite().all()


# ---- standardised


@precisions
def test_standardised_logits_are_the_oracles(dtype):
    student, teacher, _ = batch_a(dtype)
    for view, name in ((student, "s"), (teacher, "t")):
        wanted = torch.tensor(oracles()[f"g_logitstd_zscore_{name}"], dtype=dtype)
        torch.testing.assert_close(standardised(view.logits), wanted, rtol=0, atol=TOLERANCE[dtype])


@precisions
@pytest.mark.parametrize("temperature", [2, 4])
def test_standardised_distillation_is_the_oracle(temperature, dtype):
    student, teacher, labels = batch_a(dtype)
    method = StandardisedKD(temperature=float(temperature))
    loss = method.loss(student, teacher, labels, NO_ADAPTERS)
    assert loss.item() == pytest.approx(oracles()[f"g_logitstd_kd_T{temperature}"], abs=TOLERANCE[dtype])
    for index, wanted in enumerate(oracles()[f"g_logitstd_kd_T{temperature}_per_sample"]):
        loss = method.loss(row(student, index), row(teacher, index), labels[index : index + 1], NO_ADAPTERS)
        assert loss.item() == pytest.approx(wanted, abs=TOLERANCE[dtype])


@precisions
def test_the_standardised_total_is_the_oracle_with_the_labels_on_raw_logits(dtype):
    total = total_of(StandardisedKD(), *batch_a(dtype))
    assert total.item() == pytest.approx(oracles()["g_logitstd_total_ce.1_kd9_T2"], abs=9 * TOLERANCE[dtype])


def test_the_deviation_is_the_unbiased_one():
    loss = StandardisedKD().loss(*batch_a(), NO_ADAPTERS).item()
    assert abs(loss - oracles()["g_logitstd_kd_T2_biased_std"]) > 0.03


@pytest.mark.parametrize("method", [StandardisedKD(), DecoupledKD(standardise=True)], ids=repr)
def test_standardised_methods_are_blind_to_shift_and_scale_of_either_network(method):
    student, teacher, labels = random_logits(16, 10, 3.0)
    loss = loss_of(method, student, teacher, labels).item()
    assert loss_of(method, 5 * student - 2, teacher / 3 + 1, labels).item() == pytest.approx(loss, abs=1e-5)


def test_the_gradient_passes_through_the_students_own_mean_and_deviation():
    student, teacher, labels = random_logits(4, 6, 2.0)
    loss_of(StandardisedKD(), student.requires_grad_(), teacher, labels).backward()
    # moving along or scaling the student's own logits changes nothing
    torch.testing.assert_close(student.grad.sum(dim=1), torch.zeros(4, dtype=torch.float64), atol=1e-7, rtol=0)
    along = (student.grad * (student - student.mean(1, keepdim=True))).sum(dim=1)
    torch.testing.assert_close(along.detach(), torch.zeros(4, dtype=torch.float64), atol=1e-6, rtol=0)
    assert student.grad.abs().max() > 1e-3


# ---- multi-level


@precisions
def test_the_released_codes_total_is_the_oracle(dtype):
    total = total_of(MultiLevel(), *two_views(dtype))
    assert total.item() == pytest.approx(oracles()["g_mlkd_as_executed_total"], abs=10 * TOLERANCE[dtype])


def test_the_masks_are_the_oracles():
    _, teacher, _ = batch_a()
    images, classes = unsure(teacher.logits)
    assert images.bool().tolist() == oracles()["g_mlkd_mask_sample"]
    assert classes.bool().tolist() == oracles()["g_mlkd_mask_class"]


@pytest.mark.parametrize(("batch", "classes"), [(7, 4), (8, 5), (1, 3), (2, 2), (32, 10)])
def test_half_of_images_and_classes_are_masked_as_numpys_median_has_it(batch, classes):
    _, teacher, _ = random_logits(batch, classes, 2.0)
    probabilities = teacher.softmax(1).numpy()
    images, by_class = unsure(teacher)
    for mask, confidence in ((images, probabilities.max(1)), (by_class, probabilities.sum(0))):
        assert mask.bool().tolist() == (confidence <= np.percentile(confidence, 50)).tolist()
        assert mask.dtype == teacher.dtype


def literal_multi_level(method: MultiLevel, student: View, teacher: View, labels: Tensor) -> dict[str, float]:
    """The terms image by image and pair by pair, in double precision."""
    batch, classes = student.logits.shape
    weak_s, weak_t = student.logits.tolist(), teacher.logits.tolist()
    strong_s, strong_t = student.strong.logits.tolist(), teacher.strong.logits.tolist()
    at_one = [softmax(z) for z in weak_t]
    tops = [max(p) for p in at_one]
    sums = [sum(p[c] for p in at_one) for c in range(classes)]
    images = [float(top <= np.median(tops)) for top in tops]
    by_class = [float(total <= np.median(sums)) for total in sums]
    if method.variant == "code":
        images, by_class = [sum(images) / batch] * batch, [sum(by_class) / classes] * classes

    def kls(z_s, z_t, t):
        pairs = zip(z_s, z_t, strict=True)
        return [t * t * kl(softmax([x / t for x in b]), softmax([x / t for x in a])) for a, b in pairs]

    total = 0.0
    for t in (2.0, 3.0, 4.0, 5.0, 6.0):
        weak = kls(weak_s, weak_t, t)
        strong = weak if method.variant == "code" and t in (2.0, 6.0) else kls(strong_s, strong_t, t)
        total += sum(mask * value for mask, value in zip(images, weak, strict=True)) / batch + sum(strong) / batch
        p_s, p_t = ([softmax([x / t for x in z]) for z in each] for each in (weak_s, weak_t))
        for i in range(batch):
            for j in range(batch):
                gap = sum(p_t[i][c] * p_t[j][c] - p_s[i][c] * p_s[j][c] for c in range(classes))
                total += images[i] * gap**2 / batch
        for c in range(classes):
            for d in range(classes):
                gap = sum(p_t[i][c] * p_t[i][d] - p_s[i][c] * p_s[i][d] for i in range(batch))
                total += by_class[c] * gap**2 / classes
    ce = 0.0
    for weak, strong, label in zip(weak_s, strong_s, labels.tolist(), strict=True):
        ce -= (math.log(softmax(weak)[label]) + math.log(softmax(strong)[label])) / batch
    return {"ce": 0.1 * ce, "kd": 0.9 * total}


@pytest.mark.parametrize("variant", ["code", "masked"])
@pytest.mark.parametrize(("batch", "classes"), [(7, 4), (6, 5)])
def test_multi_level_is_the_sum_over_images_and_pairs(variant, batch, classes):
    method, views = MultiLevel(variant=variant), random_views(batch, classes)
    terms = {name: term.item() for name, term in method.objective(*views, NO_ADAPTERS).items()}
    assert terms == pytest.approx(literal_multi_level(method, *views), rel=1e-10)


def test_masked_images_count_nothing_in_their_mean():
    """Every level by itself: the sum over temperatures of the weak images that pass is the oracle."""
    student, teacher, _ = two_views()
    images, _ = unsure(teacher.logits)
    rows = [softened_kl(student.logits, teacher.logits, t, reduction="none") for t in (2.0, 3.0, 4.0, 5.0, 6.0)]
    wanted = oracles()["g_mlkd_persample_masked_5T_inst"]
    assert sum((images * each).mean() for each in rows).item() == pytest.approx(wanted, abs=1e-6)
    # the strong view of equal networks, and its own levels, add nothing
    method = MultiLevel(variant="masked")
    loss = method.loss(student._replace(strong=teacher), teacher._replace(strong=teacher), None, NO_ADAPTERS).item()
    levels = 0.0
    _, classes = unsure(teacher.logits)
    for t in (2.0, 3.0, 4.0, 5.0, 6.0):
        p_s, p_t = ((view.logits / t).softmax(1) for view in (student, teacher))
        levels += (images[:, None] * (p_t @ p_t.T - p_s @ p_s.T) ** 2).sum().item() / 2
        levels += (classes[:, None] * (p_t.T @ p_t - p_s.T @ p_s) ** 2).sum().item() / 5
    assert loss == pytest.approx(wanted + levels, abs=1e-6)


def test_the_strong_logits_teach_at_five_temperatures_if_masked_and_at_three_in_the_released_code():
    student, teacher, labels = random_views(8, 5)
    for variant, temperatures in (("code", (3.0, 4.0, 5.0)), ("masked", (2.0, 3.0, 4.0, 5.0, 6.0))):
        losses = [
            MultiLevel(variant=variant).loss(student._replace(strong=strong), teacher, labels, NO_ADAPTERS).item()
            for strong in (student.strong, teacher.strong)
        ]
        wanted = sum(softened_kl(student.strong.logits, teacher.strong.logits, t).item() for t in temperatures)
        assert losses[0] - losses[1] == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("temperature", [2.0, 8.0])
def test_the_middle_temperature_is_the_one_to_choose_and_stays_strong(temperature):
    student, teacher, labels = random_views(8, 5)
    losses = [
        MultiLevel(temperature=temperature).loss(student._replace(strong=s), teacher, labels, NO_ADAPTERS).item()
        for s in (student.strong, teacher.strong)
    ]
    wanted = sum(softened_kl(student.strong.logits, teacher.strong.logits, t).item() for t in (temperature, 3.0, 5.0))
    assert losses[0] - losses[1] == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("variant", ["code", "masked"])
def test_with_standardised_logits_only_the_divergences_change(variant):
    student, teacher, labels = random_views(8, 5)
    plain, scored = (MultiLevel(variant=variant, standardise=each) for each in (False, True))
    ready = [
        view._replace(logits=standardised(view.logits), strong=View(standardised(view.strong.logits)))
        for view in (student, teacher)
    ]
    # the same masks and products of probabilities, divergences of logits standardised by hand
    images, _ = unsure(teacher.logits)
    weights = images.mean().expand(8) if variant == "code" else images

    def divergences(student, teacher):
        total = 0.0
        for t in (2.0, 3.0, 4.0, 5.0, 6.0):
            weak = softened_kl(student.logits, teacher.logits, t, reduction="none")
            strong = softened_kl(student.strong.logits, teacher.strong.logits, t, reduction="none")
            slip = variant == "code" and t in (2.0, 6.0)
            total += (weights * weak + (weak if slip else strong)).mean().item()
        return total

    change = scored.loss(student, teacher, labels, NO_ADAPTERS) - plain.loss(student, teacher, labels, NO_ADAPTERS)
    assert change.item() == pytest.approx(divergences(*ready) - divergences(student, teacher), rel=1e-9)


def test_the_labels_are_learned_from_both_views():
    student, teacher, labels = two_views()
    terms = MultiLevel(ce_weight=1.0, kd_weight=0.0).objective(student, teacher, labels, NO_ADAPTERS)
    wanted = F.cross_entropy(student.logits, labels) + F.cross_entropy(student.strong.logits, labels)
    assert list(terms) == ["ce"] and terms["ce"].item() == pytest.approx(wanted.item())


def test_multi_level_asks_for_strongly_augmented_images():
    assert MultiLevel.reads == ("logits", "strong")


# ---- all


def loss(method, student: View, teacher: View, labels: Tensor) -> Tensor:
    return method.loss(student, teacher, labels, NO_ADAPTERS)


@every_method
def test_a_uniform_student_is_no_better_than_a_copy_of_the_teacher(method):
    """A divergence with swapped or logged arguments scores a uniform student above an exact copy."""
    _, teacher, labels = random_views(24, 10)
    uniform = View(torch.zeros(24, 10, dtype=torch.float64), strong=View(torch.zeros(24, 10, dtype=torch.float64)))
    copied = loss(method, teacher, teacher, labels).item()
    assert -1e-9 <= copied < 2e-4
    assert loss(method, uniform, teacher, labels).item() > copied + 0.1


@every_method
def test_the_teacher_is_the_first_argument_of_the_divergence(method):
    student, teacher, labels = random_views(24, 10)
    forward, backward = loss(method, student, teacher, labels), loss(method, teacher, student, labels)
    if isinstance(method, (LogitMimic, DIST)):  # a distance and a correlation
        torch.testing.assert_close(forward, backward)
    else:
        assert abs(forward - backward) > 1e-3


@pytest.mark.parametrize("method", [m for m in ON_LOGITS if not isinstance(m, DIST)], ids=repr)
def test_the_mean_is_over_the_batch_alone_not_over_classes(method):
    """The mean over images and classes that `kl_div` takes by default is C times smaller."""
    student, teacher, labels = random_logits(6, 100, 2.0)
    rows = [loss(method, row(View(student), i), row(View(teacher), i), labels[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(loss(method, View(student), View(teacher), labels), torch.stack(rows).mean())
    assert loss(method, View(student), View(teacher), labels) > 0.1


@every_method
def test_neither_the_order_nor_the_repetition_of_samples_matters(method):
    student, teacher, labels = random_views(24, 6)
    twice = torch.arange(24).repeat(2)
    orders = [torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    if not isinstance(method, MultiLevel):  # products of a batch with itself grow with it
        orders.append(twice)
    for pick in orders:
        picked = [view.map(lambda x, pick=pick: x[pick]) for view in (student, teacher)]
        again = loss(method, *picked, labels[pick])
        torch.testing.assert_close(again, loss(method, student, teacher, labels), rtol=1e-5, atol=1e-6)


@every_method
def test_the_inputs_are_left_alone(method):
    views = random_views(8, 6)
    copies = [x.clone() for x in (views[0].logits, views[1].logits, views[0].strong.logits, views[2])]
    loss(method, *views)
    for x, copy in zip((views[0].logits, views[1].logits, views[0].strong.logits, views[2]), copies, strict=True):
        assert torch.equal(x, copy)


@every_method
def test_the_gradient_is_that_of_the_value(method):
    student, teacher, labels = random_views(4, 5, 1.0)

    def value(weak, strong):
        return loss(method, View(weak, strong=View(strong)), teacher, labels)

    inputs = (student.logits.requires_grad_(), student.strong.logits.requires_grad_())
    assert torch.autograd.gradcheck(value, inputs)


@every_method
def test_finite_for_half_precision_logits_in_full_precision(method):
    student, teacher, labels = random_views(24, 100, 8.0, torch.bfloat16)
    student = student.full_precision().map(lambda x: x.requires_grad_())
    value = loss(method, student, teacher.full_precision(), labels)
    value.backward()
    assert value.dtype == torch.float32 and value.isfinite() and student.logits.grad.isfinite().all()


@every_method
def test_finite_for_logits_hundreds_apart(method):
    student, teacher, labels = random_views(24, 10, 600.0, torch.float32)
    student = student.map(lambda x: x.requires_grad_())
    coldest = {field: 1.0 for field in asdict(method) if field.startswith("temperature")}
    value = loss(replace(method, **coldest), student, teacher, labels)
    value.backward()
    assert value.isfinite() and student.logits.grad.isfinite().all()


@pytest.mark.parametrize("method", [DecoupledKD(standardise=True), StandardisedKD()], ids=repr)
@precisions
def test_standardised_methods_survive_equal_logits(method, dtype):
    _, teacher, labels = random_logits(4, 10, dtype=dtype)
    for flat_teacher in (teacher, torch.full_like(teacher, 3.0)):
        student = torch.full_like(teacher, 3.0, requires_grad=True)
        value = loss(method, View(student), View(flat_teacher), labels)
        value.backward()
        assert value.isfinite() and student.grad.isfinite().all()


@every_method
def test_no_value_decides_what_is_run(method):
    """Without values there is nothing to wait for and no shape can depend on them: what a captured graph needs."""
    views = [View(*logits[:1], strong=View(logits[1])) for logits in torch.empty(2, 2, 8, 10, device="meta")]
    labels = torch.empty(8, dtype=torch.long, device="meta")
    views[0].logits.requires_grad_()
    value = loss(method, *views, labels)
    value.backward()
    assert value.shape == () and views[0].logits.grad.shape == (8, 10)


@every_method
def test_hyperparameters_survive_a_round_trip(method):
    assert type(method)(**asdict(method)) == method


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, "4", True])
@every_method
def test_a_bad_temperature_is_named(method, value):
    for field in (field for field in asdict(method) if field.startswith("temperature")):
        with pytest.raises(ValueError, match=rf"{field} must be .* not {value!r}"):
            replace(method, **{field: value})


@every_method
def test_a_negative_weight_is_named(method):
    for field in (field for field in asdict(method) if field.endswith("weight")):
        with pytest.raises(ValueError, match=f"{field} must be .* not -0.5"):
            replace(method, **{field: -0.5})


@pytest.mark.parametrize(
    ("kind", "field", "value", "allowed"),
    [
        (DecoupledKD, "warm_up", 1.5, "at most 1"),
        (DecoupledKD, "warm_up", -0.1, "at least 0"),
        (MultiLevel, "variant", "paper", "code, masked"),
    ],
)
def test_a_bad_choice_is_named_with_what_is_allowed(kind, field, value, allowed):
    with pytest.raises(ValueError) as error:
        kind(**{field: value})
    assert field in str(error.value) and repr(value) in str(error.value) and allowed in str(error.value)
