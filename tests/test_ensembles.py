"""Several teachers: reference values, loops written out, and an independent solver for the weights."""

import math

import numpy as np
import pytest
import torch
from batches import STUDENT_A, TEACHER_A, TOLERANCE, batch_a, deterministic, oracles, random_logits, total_of
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from test_methods import batch_of, make_scheme, network, steps, teachers_for, toy_bank, value
from torch import nn

from kdstudy.core import View
from kdstudy.ensembles import AdaptiveEnsemble, AveragedTeachers, agreeing_weights
from kdstudy.models import Ensemble
from kdstudy.recipe import Recipe
from kdstudy.schemes import Offline
from kdstudy.train import Training

NO_ADAPTERS = nn.ModuleDict()
THIRD = [[1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0]]
AVERAGES = ("probabilities", "logits", "losses")
every_average = pytest.mark.parametrize("average", AVERAGES)


def ensemble_of(*logits) -> View:
    """A teacher whose own logits are of no use: methods must read the members."""
    members = tuple(View(torch.as_tensor(z, dtype=torch.float64)) for z in logits)
    return View(torch.full_like(members[0].logits, math.nan), members=members)


def three_teachers(seed: int = 0, batch: int = 6, classes: int = 5):
    """Student logits, an ensemble of three, labels."""
    logits = [random_logits(batch, classes, 3.0, seed + number)[1] for number in range(3)]
    student, _, labels = random_logits(batch, classes, 2.0, seed)
    return student, ensemble_of(*logits), labels


def loss_of(method, student, teacher, labels=None):
    return method.loss(View(student), teacher, labels, NO_ADAPTERS)


def softmax_slowly(row, t):
    exponentials = [math.exp(x / t) for x in row]
    return [x / sum(exponentials) for x in exponentials]


def kl_slowly(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def averaged_slowly(average, student, members, t):
    """The loss in loops over samples, members and classes; summed over classes, averaged over samples."""
    found = 0.0
    for index, z_s in enumerate(student):
        rows = [member[index] for member in members]
        q = softmax_slowly(z_s, t)
        if average == "losses":
            found += sum(kl_slowly(softmax_slowly(row, t), q) for row in rows) / len(rows)
            continue
        if average == "probabilities":
            soft = [softmax_slowly(row, t) for row in rows]
            p = [sum(column) / len(rows) for column in zip(*soft, strict=True)]
        else:
            products = [
                math.prod(column) ** (1 / len(rows))
                for column in zip(*(softmax_slowly(r, t) for r in rows), strict=True)
            ]
            p = [x / sum(products) for x in products]
        found += kl_slowly(p, q)
    return t * t * found / len(student)


@every_average
@pytest.mark.parametrize("t", [1.0, 4.0])
def test_an_average_is_what_loops_over_samples_members_and_classes_give(average, t):
    student, teacher, _ = three_teachers()
    expected = averaged_slowly(average, student.tolist(), [m.logits.tolist() for m in teacher.members], t)
    loss = loss_of(AveragedTeachers(average=average, temperature=t), student, teacher)
    assert loss.shape == () and loss.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_mean_of_the_probabilities_is_the_oracles(dtype):
    student, _, _ = batch_a(dtype)
    members = tuple(View(torch.tensor(z, dtype=dtype)) for z in (TEACHER_A, THIRD))
    target = torch.stack([member.logits.softmax(dim=1) for member in members]).mean(dim=0)
    entropy = -(target * target.log()).sum(dim=1).mean()
    loss = AveragedTeachers(temperature=1.0).loss(student, View(student.logits, members=members), None, NO_ADAPTERS)
    assert loss.dtype == dtype
    assert (loss + entropy).item() == pytest.approx(oracles()["codist_psi_ce"], abs=TOLERANCE[dtype])


@every_average
def test_one_teacher_alone_is_plain_distillation(average):
    student, _, labels = batch_a()
    method = AveragedTeachers(average=average)
    alone = ensemble_of(TEACHER_A)
    assert loss_of(method, student.logits, alone).item() == pytest.approx(oracles()["kd_T4"], abs=1e-6)
    assert total_of(method, student, alone, labels).item() == pytest.approx(oracles()["vanilla_a0.1_T4"], abs=1e-6)


def test_averaged_losses_pull_like_averaged_probabilities_and_differ_by_what_no_student_changes():
    student, teacher, _ = three_teachers()
    gaps, gradients = [], []
    for logits in (student, 2 - student**2):
        values = []
        for average in ("losses", "probabilities"):
            leaf = logits.clone().requires_grad_()
            value = loss_of(AveragedTeachers(average=average), leaf, teacher)
            gradients.append(torch.autograd.grad(value, leaf)[0])
            values.append(value.item())
        torch.testing.assert_close(*gradients[-2:], rtol=1e-10, atol=1e-14)
        gaps.append(values[0] - values[1])
    assert gaps[0] == pytest.approx(gaps[1], rel=1e-9) and gaps[0] > 0.1
    assert gradients[0].abs().max() > 1e-3


@every_average
def test_the_order_of_the_teachers_is_irrelevant_and_doubles_count_for_nothing(average):
    student, teacher, _ = three_teachers()
    method = AveragedTeachers(average=average)
    loss = loss_of(method, student, teacher)
    for members in (teacher.members[::-1], teacher.members * 2):
        torch.testing.assert_close(loss_of(method, student, teacher._replace(members=members)), loss)
    assert loss_of(method, student, teacher._replace(members=teacher.members[:2])).item() != pytest.approx(loss.item())


@pytest.mark.parametrize("method", [AveragedTeachers(), AdaptiveEnsemble()], ids=lambda m: type(m).__name__)
def test_a_single_network_is_refused(method):
    with pytest.raises(ValueError, match="needs an ensemble of teachers, not a single network"):
        Offline(network("cnn_small", torch.float64), network("cnn_small", torch.float64), method, batch_of(4, of=8))


# weights that agree


def weights_of(*gradients, tolerance=1.0, normalise=False):
    found = AdaptiveEnsemble(tolerance=tolerance).weights(torch.tensor(gradients, dtype=torch.float64), normalise)
    return found.tolist()


def test_weights_are_the_oracles():
    pair = ([1.0, 0.0], [-0.2, 0.5])
    first = oracles()["aekd_unclipped_a1"]
    assert weights_of(*pair) == pytest.approx([first, 1 - first], abs=1e-6)
    assert weights_of(*pair, tolerance=0.6) == pytest.approx(oracles()["aekd_C0.6_a"], abs=1e-6)
    for tolerance in (0.5, 0.6, 1.0):
        normalised = weights_of(*pair, tolerance=tolerance, normalise=True)
        assert normalised == pytest.approx([0.350023, 0.649977], abs=1e-6)


vectors = st.lists(st.floats(-3, 3).map(lambda x: round(x, 3)), min_size=4, max_size=4)


@deterministic
@given(vectors, vectors, st.floats(0.5, 1))
def test_two_teachers_have_the_closed_form(first, second, tolerance):
    g_1, g_2 = np.array(first), np.array(second)
    apart = ((g_1 - g_2) ** 2).sum()
    if 0 < apart < 1e-3 * (g_1**2 + g_2**2).sum():
        return  # so nearly parallel that any weights do
    share = min(max(g_2 @ (g_2 - g_1) / apart, 1 - tolerance), tolerance) if apart else 0.5
    assert weights_of(first, second, tolerance=tolerance) == pytest.approx([share, 1 - share], abs=1e-5)


@pytest.mark.parametrize("tolerance", [0.26, 0.3, 0.5, 0.6, 1.0])
@pytest.mark.parametrize("count", [3, 4, 5])
def test_more_teachers_have_the_weights_that_an_independent_solver_finds(count, tolerance):
    if tolerance * count < 1:
        tolerance = 1 / count + 0.02
    generator = np.random.default_rng(count)
    edges = set()
    for _ in range(12):
        gradients = generator.normal(size=(count, 8)) + generator.normal(size=8) * generator.uniform(0, 2)
        gram = gradients @ gradients.T / (gradients**2).sum()
        solved = minimize(
            lambda w, gram=gram: w @ gram @ w,
            np.full(count, 1 / count),
            jac=lambda w, gram=gram: 2 * gram @ w,
            bounds=[(0, tolerance)] * count,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        found = weights_of(*gradients.tolist(), tolerance=tolerance)
        assert found == pytest.approx(solved.x.tolist(), abs=1e-5)
        edges |= {"none" if x < 1e-6 else "full" if x > tolerance - 1e-6 else "between" for x in found}
    assert "between" in edges and len(edges) > 1  # the bounds have mattered


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("rows", [[0.0, 0.0, 0.0], [1.0, -2.0, 0.5]], ids=["none", "equal"])
@pytest.mark.parametrize("normalise", [False, True])
def test_teachers_without_a_difference_share_alike(count, rows, normalise):
    found = weights_of(*[rows] * count, tolerance=0.6, normalise=normalise)
    assert found == pytest.approx([1 / count] * count, abs=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_scale_of_the_gradients_is_irrelevant(scale):
    gradients = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = agreeing_weights(scale**2 * gradients @ gradients.T, 0.6)
    torch.testing.assert_close(found, agreeing_weights(gradients @ gradients.T, 0.6))


def test_without_a_cap_no_teachers_loss_rises_along_the_common_gradient():
    gradients = torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    common = agreeing_weights(gradients @ gradients.T, 1.0) @ gradients
    assert (gradients @ common >= common @ common - 1e-8).all() and common.norm() > 0.1
    assert (gradients @ gradients.mean(dim=0)).min() < common @ common  # the plain mean does not have that


def test_the_gradients_are_those_of_the_kl_terms_averaged_over_the_batch():
    student, teacher, _ = three_teachers()
    leaf = student.clone().requires_grad_()
    logits = [member.logits for member in teacher.members]
    expected = []
    for z_m in logits:
        losses = [averaged_slowly("losses", [row], [[other]], 4.0) for row, other in zip(student, z_m, strict=True)]
        kl = AveragedTeachers(average="losses").loss(View(leaf), ensemble_of(z_m), None, NO_ADAPTERS)
        assert kl.item() == pytest.approx(sum(losses) / len(losses))
        # the loss has the 1/B already
        expected.append(torch.autograd.grad(kl, leaf)[0].sum(dim=0))
    torch.testing.assert_close(AdaptiveEnsemble().gradients(leaf, logits), torch.stack(expected))


def test_the_weights_are_constants_for_the_students_gradient():
    student, teacher, _ = three_teachers()
    method = AdaptiveEnsemble()
    leaf = student.clone().requires_grad_()
    weights = method.weights(method.gradients(leaf, [m.logits for m in teacher.members]), False)
    assert not weights.requires_grad and max(weights) > 0.4 and sum(weights).item() == pytest.approx(1)
    terms = [loss_of(AveragedTeachers(average="losses"), leaf, ensemble_of(m.logits)) for m in teacher.members]
    expected = sum(w * term for w, term in zip(weights.tolist(), terms, strict=True))
    loss = loss_of(method, leaf, teacher)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf), torch.autograd.grad(expected, leaf))


def test_the_smallest_tolerance_is_the_plain_average():
    student, teacher, labels = three_teachers()
    found = []
    for method in (AdaptiveEnsemble(tolerance=1 / 3), AveragedTeachers(average="losses")):
        leaf = student.clone().requires_grad_()
        loss = loss_of(method, leaf, teacher, labels)
        found.append((loss, *torch.autograd.grad(loss, leaf)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)
    assert loss_of(AdaptiveEnsemble(), student, teacher).item() != pytest.approx(found[0][0].item(), rel=1e-3)


def test_normalising_is_an_option_that_changes_the_loss():
    student, teacher, _ = three_teachers()
    losses = [loss_of(AdaptiveEnsemble(normalise=normalise), student, teacher).item() for normalise in (False, True)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


# hints


def hinted(method, widths=(3, 3), student_width=2, seed=0):
    """Views with two maps each, and the method's adapters for them."""
    generator = torch.Generator().manual_seed(seed)

    def view(width, side=4):
        maps = tuple(torch.randn(5, width, side, side, generator=generator, dtype=torch.float64) for _ in range(2))
        return View(torch.randn(5, 4, generator=generator, dtype=torch.float64), maps=maps)

    student, members = view(student_width), tuple(view(width, 2) for width in widths)
    student = student._replace(maps=tuple(x.requires_grad_() for x in student.maps))
    teacher = View(members[0].logits, members=members)
    torch.manual_seed(seed)
    return student, teacher, torch.arange(5) % 4, method.adapters(student, teacher).double()


def hint_slowly(student_map, teacher_map):
    """Mean square, the student's 4 x 4 map pooled over 2 x 2 windows."""
    pooled = student_map.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5))
    return ((pooled - teacher_map) ** 2).sum() / teacher_map.numel()


def test_hints_compare_the_maps_after_stage_2_with_weights_of_their_own():
    method = AdaptiveEnsemble(hint_weight=100.0)
    student, teacher, labels, adapters = hinted(method, widths=(2, 2), student_width=2)
    assert not list(adapters.parameters())  # equal widths need no regressor
    terms = [hint_slowly(student.maps[1], member.maps[1]) for member in teacher.members]
    slopes = [torch.autograd.grad(term, student.maps[1], retain_graph=True)[0].sum(dim=0).flatten() for term in terms]
    lengths = [slope.norm().item() for slope in slopes]
    units = [slope / length for slope, length in zip(slopes, lengths, strict=True)]
    share = min(max((units[1] @ (units[1] - units[0]) / (units[0] - units[1]).square().sum()).item(), 0.4), 0.6)
    raw = [share / lengths[0], (1 - share) / lengths[1]]
    expected = sum(weight / sum(raw) * term.item() for weight, term in zip(raw, terms, strict=True))
    found = method.objective(student, teacher, labels, adapters)
    assert list(found) == ["ce", "kd", "hint"]
    assert found["hint"].item() == pytest.approx(100 * expected, rel=1e-8)
    (gradient,) = torch.autograd.grad(found["hint"], student.maps[1])
    by_hand = sum(100 * weight / sum(raw) * slope.detach() for weight, slope in zip(raw, slopes, strict=True))
    torch.testing.assert_close(gradient.sum(dim=0).flatten(), by_hand)


@pytest.mark.parametrize("tolerance", [0.5, 0.6], ids=["average", "adaptive"])
def test_hints_averaged_or_not_have_a_gradient_in_the_student_and_every_regressor(tolerance):
    method = AdaptiveEnsemble(hint_weight=1.0, tolerance=tolerance)
    student, teacher, labels, adapters = hinted(method, widths=(3, 6))
    assert [regressor[0].out_channels for regressor in adapters["regressors"]] == [3, 6]
    hint = method.hint(student, teacher, labels, adapters)
    assert hint.requires_grad
    hint.backward()
    assert student.maps[1].grad.any() and student.maps[0].grad is None
    assert all(parameter.grad.any() for parameter in adapters.parameters())


def test_without_a_weight_there_are_no_hints_and_no_maps_are_needed():
    student, teacher, labels, adapters = hinted(AdaptiveEnsemble())
    assert not list(adapters.modules())[1:]
    plain = teacher._replace(members=tuple(member._replace(maps=()) for member in teacher.members))
    assert list(AdaptiveEnsemble().objective(student._replace(maps=()), plain, labels, adapters)) == ["ce", "kd"]
    with pytest.raises(ValueError, match="maps of two stages"):
        AdaptiveEnsemble(hint_weight=1.0).adapters(student, plain)
    with pytest.raises(ValueError, match="maps of two stages"):
        AdaptiveEnsemble(hint_weight=1.0).adapters(student._replace(maps=student.maps[:1]), teacher)


# wrong use


@pytest.mark.parametrize("count", [2, 3])
def test_a_tolerance_that_cannot_sum_to_1_is_refused(count):
    teacher = ensemble_of(*[TEACHER_A] * count)
    with pytest.raises(ValueError, match=f"tolerance must be at least 1/{count} for {count} teachers, not 0.33"):
        AdaptiveEnsemble(tolerance=0.33).adapters(View(torch.tensor(STUDENT_A)), teacher)
    AdaptiveEnsemble(tolerance=1 / count).adapters(View(torch.tensor(STUDENT_A)), teacher)


def test_too_many_teachers_are_refused():
    with pytest.raises(ValueError, match="at most 8 teachers, not 9"):
        AdaptiveEnsemble().adapters(View(torch.tensor(STUDENT_A)), ensemble_of(*[TEACHER_A] * 9))


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (AveragedTeachers, "temperature", 0.0),
        (AveragedTeachers, "average", "median"),
        (AveragedTeachers, "kd_weight", -1.0),
        (AdaptiveEnsemble, "temperature", -4.0),
        (AdaptiveEnsemble, "tolerance", 0.0),
        (AdaptiveEnsemble, "tolerance", 1.5),
        (AdaptiveEnsemble, "hint_weight", -1.0),
    ],
)
def test_a_bad_hyperparameter_is_named(kind, field, value):
    with pytest.raises(ValueError, match=rf"{field} must be .* not {value!r}"):
        kind(**{field: value})


# training


@pytest.mark.parametrize("method", [AdaptiveEnsemble(hint_weight=10.0), AdaptiveEnsemble(normalise=True)], ids=repr)
def test_an_ensemble_teaches_a_student_to_the_end(method):
    torch.manual_seed(0)
    student = network("wrn_10_0.25", torch.float64)
    scheme = Offline(student, Ensemble(teachers_for("aekd", torch.float64)), method, batch_of(16))
    recipe = Recipe(epochs=4, batch=16, learning_rate=0.05, crop_padding=1, precision="fp64")
    history = Training(scheme, recipe, toy_bank(50), seed=0, watch={}).run()
    assert history[-1]["ce"] < history[0]["ce"] and history[-1]["kd"] < 1
    if method.hint_weight:
        assert history[-1]["hint"] < history[0]["hint"]


def test_no_member_is_moved_or_put_into_train_mode():
    scheme = make_scheme("ensemble")
    (teacher,) = scheme._teacher
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    (phase,) = scheme.phases()
    scheme.train()
    ((_, turn),) = steps(scheme)
    value(scheme, phase, turn, batch_of()).backward()
    assert len(teacher.networks) == 3 and not any(module.training for module in teacher.modules())
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())
