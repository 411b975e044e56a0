"""Be Your Own Teacher and snapshot distillation: reference values, who is constant, and what cycles change."""

import math

import pytest
import torch
import torch.nn.functional as F
from batches import TOLERANCE, batch_a, oracles, random_logits, total_of
from test_methods import batch_of, network
from torch import nn

from kdstudy.core import Clock, View
from kdstudy.heads import Head
from kdstudy.models import count_parameters
from kdstudy.recipe import Recipe, cycle_starts
from kdstudy.schemes import SelfTaught
from kdstudy.self_taught import BeYourOwnTeacher, SnapshotDistillation

NO_ADAPTERS = nn.ModuleDict()
precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


# Be Your Own Teacher, by hand: one head, whose logits and embedding are the map's channels


class Reading(nn.Module):
    """A head that shows the first channels of its map as logits and the other two as embedding."""

    def forward(self, stage_map):
        flat = stage_map.flatten(1)
        return View(flat[:, :5], embedding=flat[:, 5:])


def by_hand(dtype=torch.float64):
    shallow, deep, labels = batch_a(dtype)
    early = torch.tensor([[1.0, 2], [0, -1]], dtype=dtype)
    late = torch.tensor([[0.0, 1], [1, 1]], dtype=dtype)
    first = torch.cat([shallow.logits, early], dim=1)[:, :, None, None].requires_grad_()
    own = View(deep.logits.requires_grad_(), maps=(first, torch.ones(2, 2, 1, 1)), embedding=late.requires_grad_())
    return own, labels, nn.ModuleDict({"heads": nn.ModuleList([Reading()])})


@precisions
def test_the_terms_are_the_oracles(dtype):
    own, labels, adapters = by_hand(dtype)
    method = BeYourOwnTeacher(feature_weight=0.03 / 2)  # the mean over two samples
    terms = method.objective(own, own.detach(), labels, adapters)
    assert list(terms) == ["ce", "exit1_ce", "exit1_kd", "exit1_feature"]
    assert terms["exit1_kd"].item() == pytest.approx(0.1 * oracles()["byot_kl_T3"], abs=TOLERANCE[dtype])
    assert terms["exit1_feature"].item() == pytest.approx(0.03 * 3.5, abs=TOLERANCE[dtype])
    total = oracles()["byot_total(a.1,l.03,KL,mean)"]
    assert sum(terms.values()).item() == pytest.approx(total, abs=TOLERANCE[dtype])
    loss = method.loss(own, own.detach(), labels, adapters)
    assert loss.dtype == dtype and loss.item() == pytest.approx(oracles()["byot_kl_T3"], abs=TOLERANCE[dtype])


def test_features_are_summed_over_the_batch():
    own, labels, adapters = by_hand()
    term = BeYourOwnTeacher().objective(own, own.detach(), labels, adapters)["exit1_feature"].item()
    assert term == pytest.approx(1e-6 * oracles()["byot_feat_sumsq"])
    assert term == pytest.approx(1e-6 * 2 * oracles()["byot_feat_per_sample_mean"])


def test_the_soft_cross_entropy_is_the_kl_and_the_entropy():
    own, labels, adapters = by_hand()
    p = (own.logits.detach() / 3).softmax(dim=1)
    entropy = -9 * (p * p.log()).sum(dim=1).mean().item()
    kl = BeYourOwnTeacher().loss(own, own.detach(), labels, adapters).item()
    assert kl + entropy == pytest.approx(oracles()["byot_softce_T3"], abs=1e-6)


def test_a_weight_of_zero_leaves_its_terms_out():
    own, labels, adapters = by_hand()

    def names(**weights):
        return list(BeYourOwnTeacher(**weights).objective(own, own.detach(), labels, adapters))

    assert names(feature_weight=0.0) == ["ce", "exit1_ce", "exit1_kd"]
    assert names(kd_weight=0.0) == ["ce", "exit1_ce", "exit1_feature"]
    assert names(ce_weight=0.0) == ["exit1_kd", "exit1_feature"]


# Be Your Own Teacher, on a network


def scheme_of_own(method=None):
    torch.manual_seed(0)
    scheme = SelfTaught(
        network("wrn_10_0.5", torch.float64), method or BeYourOwnTeacher(feature_weight=0.1), batch_of()
    )
    (phase,) = scheme.phases()
    scheme.set_modes(phase)
    return scheme


def terms_of(scheme, batch=None):
    (phase,) = scheme.phases()
    (turn,) = scheme.turns(phase)
    return scheme.losses(phase, turn, batch or batch_of(), None).terms


def moved_by(scheme, term) -> set[str]:
    """Stem, stages, classifier and heads that a term's gradient reaches."""
    scheme.zero_grad(set_to_none=True)
    terms_of(scheme)[term].backward()
    found = set()
    for name, parameter in scheme.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            parts = name.split(".")
            found.add(f"{parts[1]}{parts[2]}" if parts[2].isdigit() else parts[1])
    return found


def test_each_exit_moves_its_head_and_what_lies_before_it_and_never_what_teaches_it():
    scheme = scheme_of_own()
    for term in ("ce", "kd", "feature"):
        assert moved_by(scheme, f"exit1_{term}") == {"stem", "stages0", "heads0"}
        assert moved_by(scheme, f"exit2_{term}") == {"stem", "stages0", "stages1", "heads1"}
    assert moved_by(scheme, "ce") == {"stem", "stages0", "stages1", "stages2", "embed", "classifier"} - (
        set() if list(scheme.student.embed.parameters()) else {"embed"}
    )


def test_every_exit_is_compared_with_the_last_classifier():
    scheme = scheme_of_own()
    terms = terms_of(scheme)
    with torch.no_grad():
        view = scheme.student(batch_of().images)
        heads = [head(stage_map) for head, stage_map in zip(scheme.adapters["heads"], view.maps, strict=False)]
    labels = batch_of().labels
    assert len(heads) == 2
    for number, head in enumerate(heads, start=1):
        kl = 9 * F.kl_div((head.logits / 3).log_softmax(1), (view.logits / 3).softmax(1), reduction="batchmean")
        gap = ((head.embedding - view.embedding) ** 2).sum()
        ce = -head.logits.log_softmax(dim=1)[torch.arange(24), labels].mean()
        assert terms[f"exit{number}_kd"].item() == pytest.approx(0.1 * kl.item())
        assert terms[f"exit{number}_feature"].item() == pytest.approx(0.1 * gap.item())
        assert terms[f"exit{number}_ce"].item() == pytest.approx(0.9 * ce.item())


def test_the_heads_see_each_batch_once():
    scheme = scheme_of_own()
    terms_of(scheme)
    counts = {name: int(x) for name, x in scheme.state_dict().items() if name.endswith("num_batches_tracked")}
    assert any("heads" in name for name in counts) and set(counts.values()) == {1}


def test_the_deployed_network_has_no_heads_and_every_classifier_is_scored_beside_it():
    scheme = scheme_of_own()
    assert scheme.deployed is scheme.student
    assert count_parameters(scheme.deployed) == count_parameters(network("wrn_10_0.5", torch.float64))
    further = scheme.further()
    assert list(further) == ["exit_1", "exit_2", "ensemble"]
    scheme.eval()
    images = batch_of().images
    with torch.no_grad():
        view = scheme.student(images)
        answers = [head(m).logits for head, m in zip(scheme.adapters["heads"], view.maps, strict=False)]
        for number, logits in enumerate(answers, start=1):
            torch.testing.assert_close(further[f"exit_{number}"](images).logits, logits)
        together = sum(z.softmax(dim=1) for z in (*answers, view.logits)) / 3
        torch.testing.assert_close(further["ensemble"](images).logits.softmax(dim=1), together)


def test_networks_that_heads_do_not_suit_are_refused():
    with pytest.raises(ValueError, match="a network without heads"):
        SelfTaught(network("wrn_10_0.5+heads", torch.float64), BeYourOwnTeacher(), batch_of())
    wide = View(torch.zeros(2, 5), maps=(torch.zeros(2, 4, 4, 4), torch.zeros(2, 8, 2, 2)), embedding=torch.zeros(2, 9))
    with pytest.raises(ValueError, match="the last stage's 8 channels, but this network's embedding has 9"):
        BeYourOwnTeacher().adapters(wide, wide)


def test_heads_are_bottlenecks_for_every_stage_but_the_last():
    heads = scheme_of_own().adapters["heads"]
    assert len(heads) == 2 and all(isinstance(head, Head) for head in heads)
    assert {head.classifier.in_features for head in heads} == {32}


# snapshot distillation


def clocked(epoch, epochs=8):
    adapters = SnapshotDistillation().adapters(None, None).double()
    adapters["clock"].set(epoch, epochs)
    return adapters


@precisions
def test_only_the_teacher_is_softened_as_in_the_oracle(dtype):
    student, teacher, labels = batch_a(dtype)
    method = SnapshotDistillation(temperature=2.0, ce_weight=1.5)
    loss = method.loss(student, teacher, labels, NO_ADAPTERS)
    assert loss.dtype == dtype and loss.shape == ()
    assert loss.item() == pytest.approx(oracles()["sd_kl_T2"], abs=TOLERANCE[dtype])
    p = (teacher.logits / 2).softmax(dim=1)
    entropy = -(p * p.log()).sum(dim=1).mean().item()
    assert loss.item() + entropy == pytest.approx(oracles()["sd_soft_ce_T2"], abs=TOLERANCE[dtype])
    total = total_of(method, student, teacher, labels)
    assert total.item() == pytest.approx(oracles()["sd_total_lS1.5_lT1"], abs=TOLERANCE[dtype])


def test_the_first_cycle_is_plain_cross_entropy():
    student, teacher, labels = batch_a()
    student.logits.requires_grad_()
    terms = SnapshotDistillation().objective(student, teacher, labels, clocked(1))
    assert terms["ce"].item() == pytest.approx(oracles()["ce"], abs=1e-6)
    gradient = torch.autograd.grad(sum(terms.values()), student.logits, retain_graph=True)[0]
    expected = torch.autograd.grad(F.cross_entropy(student.logits, labels), student.logits)[0]
    torch.testing.assert_close(gradient, expected)
    assert terms["kd"].item() == 0


@pytest.mark.parametrize("epoch", [2, 3, 7])
def test_from_the_second_cycle_on_the_snapshot_teaches(epoch):
    student, teacher, labels = batch_a()
    method = SnapshotDistillation()
    terms = method.objective(student, teacher, labels, clocked(epoch))
    assert terms["ce"].item() == pytest.approx(4 / 3 * oracles()["ce"], abs=1e-6)
    assert terms["kd"].item() == pytest.approx(method.loss(student, teacher, labels, NO_ADAPTERS).item())


@pytest.mark.parametrize("cycles", [2, 3, 4, 7])
def test_teaching_begins_with_the_learning_rates_second_cycle(cycles):
    method = SnapshotDistillation(cycles=cycles)
    (phase,) = method.phases()
    for epochs in range(cycles, 60):
        recipe = Recipe(epochs=epochs, batch=8, learning_rate=0.1).for_phase(phase)
        assert recipe.schedule == "cosine" and recipe.cycles == cycles
        clock = Clock()
        for epoch in range(epochs):
            clock.set(epoch, epochs)
            assert bool(method.taught(clock)) == (epoch >= cycle_starts(epochs, cycles)[1])


def test_a_weight_of_zero_leaves_its_term_out_of_snapshots():
    student, teacher, labels = batch_a()
    objective = SnapshotDistillation(kd_weight=0.0).objective
    assert list(objective(student, teacher, labels, clocked(5))) == ["ce"]
    assert list(SnapshotDistillation(ce_weight=0.0).objective(student, teacher, labels, clocked(5))) == ["kd"]


def test_snapshots_are_finite_for_logits_hundreds_apart():
    student, teacher, labels = random_logits(24, 10, 600.0, dtype=torch.float32)
    terms = SnapshotDistillation().objective(View(student.requires_grad_()), View(teacher), labels, clocked(5))
    total = sum(terms.values())
    total.backward()
    assert total.isfinite() and student.grad.isfinite().all()


def test_no_value_decides_what_is_run():
    student, teacher = (View(logits) for logits in torch.empty(2, 8, 10, device="meta"))
    labels = torch.empty(8, dtype=torch.long, device="meta")
    terms = SnapshotDistillation().objective(student, teacher, labels, clocked(0).to("meta"))
    assert sum(terms.values()).shape == ()


# wrong use


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (BeYourOwnTeacher, "temperature", 0.0),
        (BeYourOwnTeacher, "feature_weight", -1.0),
        (BeYourOwnTeacher, "ce_weight", math.nan),
        (SnapshotDistillation, "temperature", -3.0),
        (SnapshotDistillation, "cycles", 1),
        (SnapshotDistillation, "cycles", 2.0),
        (SnapshotDistillation, "kd_weight", -0.5),
    ],
)
def test_a_bad_value_is_named(kind, field, value):
    with pytest.raises(ValueError) as error:
        kind(**{field: value})
    assert field in str(error.value) and repr(value) in str(error.value)
