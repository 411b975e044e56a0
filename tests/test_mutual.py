"""Deep mutual learning and codistillation: reference values, two forms that differ, and whom a gradient reaches."""

import math

import pytest
import torch
import torch.nn.functional as F
from batches import TOLERANCE, batch_a, deterministic, oracles, total_of
from hypothesis import given
from hypothesis import strategies as st
from test_methods import STUDENT, TEACHER, batch_of, network
from torch import nn

from kdstudy.core import View
from kdstudy.ensembles import AveragedTeachers
from kdstudy.mutual import Codistillation, DeepMutualLearning
from kdstudy.peers import PeerOptions, Peers
from kdstudy.response import VanillaKD

NO_ADAPTERS = nn.ModuleDict()
THIRD = [[1.0, 0, 0, 0, 0], [0, 0, 1.0, 0, 0]]
precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def as_one(method, members, labels):
    """The teacher's view of several peers, as the scheme makes it."""
    return View(method.unite(members, labels, NO_ADAPTERS), members=members)


def three(dtype=torch.float64):
    first, second, labels = batch_a(dtype)
    return first, second, View(torch.tensor(THIRD, dtype=dtype)), labels


def random_peers(count, seed=0, classes=6, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    views = [View(scale * torch.randn(8, classes, generator=generator, dtype=torch.float64)) for _ in range(count)]
    return *views, torch.randint(classes, (8,), generator=generator)


def softmax_slowly(logits, temperature=1.0):
    powers = [math.exp(z / temperature) for z in logits]
    return [power / sum(powers) for power in powers]


# deep mutual learning


@precisions
def test_two_peers_lose_what_the_oracle_says_and_not_the_other_way_round(dtype):
    first, second, labels = batch_a(dtype)
    method = DeepMutualLearning()
    for student, teacher, kl, whole in [
        (first, second, "dml_l1_kl(p2||p1)", "dml_L1"),
        (second, first, "dml_l2_kl(p1||p2)", "dml_L2"),
    ]:
        loss = method.loss(student, teacher, labels, NO_ADAPTERS)
        assert loss.dtype == dtype and loss.shape == ()
        assert loss.item() == pytest.approx(oracles()[kl], abs=TOLERANCE[dtype])
        total = total_of(method, student, teacher, labels)
        assert total.item() == pytest.approx(oracles()[whole], abs=TOLERANCE[dtype])


@precisions
def test_with_three_peers_the_forms_are_the_oracles(dtype):
    first, second, third, labels = three(dtype)
    method = DeepMutualLearning()
    each = [method.loss(first, other, labels, NO_ADAPTERS) for other in (second, third)]
    assert (sum(each) / 2).item() == pytest.approx(oracles()["dml_K3_net1_pairmean"], abs=TOLERANCE[dtype])
    together = method.loss(first, as_one(method, (second, third), labels), labels, NO_ADAPTERS)
    assert together.item() == pytest.approx(oracles()["dml_K3_net1_ensemble"], abs=TOLERANCE[dtype])


def test_peers_that_teach_as_one_have_averaged_probabilities_not_logits():
    first, second, third, labels = three()
    mean_logits = View((second.logits + third.logits) / 2)
    wrong = DeepMutualLearning().loss(first, mean_logits, labels, NO_ADAPTERS).item()
    assert wrong == pytest.approx(0.136682, abs=1e-6)
    right = DeepMutualLearning().loss(first, as_one(DeepMutualLearning(), (second, third), labels), labels, NO_ADAPTERS)
    assert abs(right.item() - wrong) > 0.04


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_probabilities_are_softened_before_they_are_averaged(temperature):
    student, *others, labels = random_peers(4)
    method = DeepMutualLearning(temperature=temperature)
    rows = []
    for row in range(8):
        softened = [softmax_slowly(other.logits[row].tolist(), temperature) for other in others]
        target = [sum(column) / 3 for column in zip(*softened, strict=True)]
        own = softmax_slowly(student.logits[row].tolist(), temperature)
        rows.append(sum(p * (math.log(p) - math.log(q)) for p, q in zip(target, own, strict=True)))
    loss = method.loss(student, as_one(method, tuple(others), labels), labels, NO_ADAPTERS)
    assert loss.item() == pytest.approx(temperature**2 * sum(rows) / 8, abs=1e-9)


@deterministic
@given(st.integers(0, 99), st.integers(2, 5), st.floats(0.5, 20))
def test_the_ensemble_form_is_never_larger(seed, count, temperature):
    student, *others, labels = random_peers(count + 1, seed)
    method = DeepMutualLearning(temperature=temperature)
    each = torch.stack([method.loss(student, other, labels, NO_ADAPTERS) for other in others]).mean()
    together = method.loss(student, as_one(method, tuple(others), labels), labels, NO_ADAPTERS)
    assert together <= each + 1e-12


def test_peers_that_are_equal_have_nothing_to_teach_each_other():
    student, other, labels = random_peers(2)
    student.logits.requires_grad_()
    loss = DeepMutualLearning().loss(student, student.detach(), labels, NO_ADAPTERS)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-14) and student.logits.grad.abs().max() < 1e-14
    assert DeepMutualLearning().loss(student, other, labels, NO_ADAPTERS) > 0.1


# codistillation


@precisions
def test_the_cross_entropy_to_the_averaged_predictions_is_the_oracle(dtype):
    first, second, third, labels = three(dtype)
    method = Codistillation()
    loss = method.loss(first, as_one(method, (second, third), labels), labels, NO_ADAPTERS)
    assert loss.item() == pytest.approx(oracles()["codist_psi_ce"], abs=TOLERANCE[dtype])
    total = total_of(method, first, as_one(method, (second, third), labels), labels)
    expected = oracles()["codist_psi_ce"] + oracles()["ce"]
    assert total.item() == pytest.approx(expected, abs=TOLERANCE[dtype])


def test_codistillation_is_mutual_learning_but_for_the_targets_entropy():
    student, *others, labels = random_peers(4)
    student.logits.requires_grad_()
    gradients, values = [], []
    for method in (Codistillation(), DeepMutualLearning()):
        loss = method.loss(student, as_one(method, tuple(others), labels), labels, NO_ADAPTERS)
        gradients.append(torch.autograd.grad(loss, student.logits)[0])
        values.append(loss.item())
    torch.testing.assert_close(*gradients)
    target = torch.stack([other.logits.softmax(1) for other in others]).mean(dim=0)
    entropy = -(target * target.log()).sum(dim=1).mean()
    assert values[0] - values[1] == pytest.approx(entropy.item())


def test_the_variant_on_logits_is_a_mean_over_samples_and_classes():
    student, *others, labels = random_peers(3)
    method = Codistillation(variant="logits")
    squares = [
        (student.logits[b, c].item() - (others[0].logits[b, c].item() + others[1].logits[b, c].item()) / 2) ** 2
        for b in range(8)
        for c in range(6)
    ]
    loss = method.loss(student, as_one(method, tuple(others), labels), labels, NO_ADAPTERS)
    assert loss.item() == pytest.approx(sum(squares) / 48)


# both, between networks


def peers_of(method, **options):
    torch.manual_seed(0)
    networks = [network(STUDENT, torch.float64), network(STUDENT, torch.float64), network(TEACHER, torch.float64)]
    return Peers(networks, method, batch_of(), PeerOptions(count=3, **options))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (DeepMutualLearning(), {}),
        (DeepMutualLearning(), {"together": True}),
        (DeepMutualLearning(temperature=2.0), {"together": True}),
        (Codistillation(), {}),
        (Codistillation(variant="logits"), {}),
    ],
    ids=str,
)
def test_a_peers_terms_reach_that_peer_and_no_other(method, options):
    scheme = peers_of(method, **options)
    (phase,) = scheme.phases()
    (turn,) = scheme.turns(phase)
    scheme.set_modes(phase)
    for term in ("ce", "kd"):
        for number, peer in enumerate(scheme.peers):
            scheme.zero_grad(set_to_none=True)
            scheme.losses(phase, turn, batch_of(), None).terms[f"peer{number}_{term}"].backward()
            assert all(parameter.grad.any() for parameter in peer.parameters())
            others = [other for other in scheme.peers if other is not peer]
            assert all(parameter.grad is None for other in others for parameter in other.parameters())


@pytest.mark.parametrize("together", [False, True])
def test_between_peers_the_terms_are_those_of_their_logits(together):
    scheme = peers_of(DeepMutualLearning(), together=together)
    (phase,) = scheme.phases()
    (turn,) = scheme.turns(phase)
    scheme.set_modes(phase)
    terms = scheme.losses(phase, turn, batch_of(), None).terms
    with torch.no_grad():
        first, *others = [peer(batch_of().images).logits.log_softmax(dim=1) for peer in scheme.peers]
    if together:
        expected = F.kl_div(first, sum(other.exp() for other in others) / 2, reduction="batchmean")
    else:
        expected = sum(F.kl_div(first, other, reduction="batchmean", log_target=True) for other in others) / 2
    assert terms["peer0_kd"].item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    "method", [DeepMutualLearning(temperature=3.0), Codistillation(), Codistillation(variant="logits")], ids=str
)
def test_finite_for_logits_hundreds_apart(method):
    student, *others, labels = random_peers(3, scale=600.0)
    student, others = (View(student.logits.float().requires_grad_()), [View(o.logits.float()) for o in others])
    loss = method.loss(student, as_one(method, tuple(others), labels), labels, NO_ADAPTERS)
    loss.backward()
    assert loss.isfinite() and student.logits.grad.isfinite().all()


@pytest.mark.parametrize(
    "method", [DeepMutualLearning(temperature=3.0), Codistillation(), Codistillation(variant="logits")], ids=str
)
def test_no_value_decides_what_is_run(method):
    student, *others = (View(logits) for logits in torch.empty(3, 8, 10, device="meta"))
    labels = torch.empty(8, dtype=torch.long, device="meta")
    assert method.loss(student, as_one(method, tuple(others), labels), labels, NO_ADAPTERS).shape == ()


def test_mutual_learning_is_plain_distillation_with_the_papers_weights_and_temperature():
    student, other, labels = random_peers(2)
    plain = VanillaKD(ce_weight=1.0, kd_weight=1.0, temperature=1.0)
    total = total_of(DeepMutualLearning(), student, other, labels)
    assert total.item() == pytest.approx(total_of(plain, student, other, labels).item())


def test_mutual_learning_from_all_as_one_is_distillation_from_averaged_teachers():
    student, *others, labels = random_peers(4)
    method = DeepMutualLearning(temperature=5.0)
    averaged = AveragedTeachers(ce_weight=1.0, kd_weight=1.0, temperature=5.0)
    teacher = as_one(method, tuple(others), labels)
    total = total_of(method, student, teacher, labels)
    assert total.item() == pytest.approx(total_of(averaged, student, teacher, labels).item())


# wrong use


def test_codistillation_refuses_a_teacher_that_is_not_made_of_peers():
    first, second, _ = batch_a()
    with pytest.raises(ValueError, match=r"codistillation .* no members"):
        Codistillation().adapters(first, second)


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, "4", True])
def test_a_bad_temperature_is_named(value):
    with pytest.raises(ValueError, match=rf"temperature must be .* not {value!r}"):
        DeepMutualLearning(temperature=value)


def test_a_bad_variant_is_named_with_what_is_allowed():
    with pytest.raises(ValueError, match="variant must be one of cross_entropy, logits, not 'kl'"):
        Codistillation(variant="kl")


@pytest.mark.parametrize("method", [DeepMutualLearning, Codistillation])
def test_a_negative_weight_is_named(method):
    with pytest.raises(ValueError, match=r"kd_weight must be .* not -0.5"):
        method(kd_weight=-0.5)
