"""Rivals: who learns from whom in which turn, what stays as it is, and turns that alternate on every batch."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from batches import random_logits
from torch import nn
from toy import PADDING, clone, difference, make_bank, make_recipe, make_training, pictures, run_session

from kdstudy.adversarial import AdversarialDistillation
from kdstudy.core import softened_kl
from kdstudy.models import build_model
from kdstudy.mutual import DeepMutualLearning
from kdstudy.recipe import Recipe
from kdstudy.rivals import RivalOptions, Rivals, frozen
from kdstudy.schemes import Batch, Cast
from kdstudy.train import Training

TURNS = ("logits", "generators", "discriminators")
NARROW, BROAD, THIRD = "resnet8x0.25", "resnet8x0.375", "resnet8x0.5"
trios = pytest.mark.parametrize("names", [(NARROW, BROAD), (NARROW, BROAD, THIRD), (NARROW, NARROW)], ids=str)


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return build_model(name, classes=3, channels=3, image_size=(6, 5)).to(dtype)


def a_batch(count: int = 6) -> Batch:
    bank = make_bank(*pictures(count))
    return Batch(next(bank.plain(count)), bank.labels)


def rivals(*names: str, method=None, **hyperparameters) -> Rivals:
    """Small networks with weights of their own, by default of two widths."""
    torch.manual_seed(0)
    peers = [build(name) for name in names or (NARROW, BROAD)]
    return Rivals(peers, method or AdversarialDistillation(**hyperparameters), a_batch())


def in_turn(scheme: Rivals, name: str, batch: Batch | None = None):
    """The losses of one turn, in the modes of training."""
    (phase,) = scheme.phases()
    scheme.set_modes(phase)
    (turn,) = (turn for turn in scheme.turns(phase) if turn.name == name)
    return scheme.losses(phase, turn, batch or a_batch(), None)


def parts_of(scheme: Rivals) -> dict[str, list[nn.Parameter]]:
    """The parameters of everything that could learn: of every network and of what judges it, by name."""
    found = {}
    for k, peer in enumerate(scheme.peers):
        found[f"{k} features"] = [p for name, p in peer.named_parameters() if "classifier" not in name]
        found[f"{k} classifier"] = list(peer.classifier.parameters())
        for part in ("discriminator", "transfer"):
            found[f"{k} {part}"] = list(scheme.adapters[f"peer{k}"][part].parameters())
    return {name: parameters for name, parameters in found.items() if parameters}


def reached_by(scheme: Rivals, turn: str, term: str) -> set[str]:
    """The parts that a term's gradient reaches."""
    loss = in_turn(scheme, turn).terms[term]
    parts = parts_of(scheme)
    gradients = torch.autograd.grad(loss, [p for part in parts.values() for p in part], allow_unused=True)
    gradients = iter(gradients)
    return {
        name
        for name, parameters in parts.items()
        if any([g is not None and g.any().item() for g in [next(gradients) for _ in parameters]])
    }


# gradients


@trios
@pytest.mark.parametrize(
    ("turn", "term", "parts"),
    [
        ("logits", "ce", ("features", "classifier")),
        ("logits", "kd", ("features", "classifier")),
        ("generators", "generator", ("features", "transfer")),
        ("discriminators", "discriminator", ("discriminator",)),
    ],
)
def test_every_term_moves_its_own_network_or_discriminator_and_no_other(names, turn, term, parts):
    scheme = rivals(*names)
    there = parts_of(scheme)
    for k in range(len(names)):
        wanted = {f"{k} {part}" for part in parts} & set(there)
        assert reached_by(scheme, turn, f"peer{k}_{term}") == wanted
    assert list(in_turn(scheme, turn).terms) == [
        f"peer{k}_{name}" for k in range(len(names)) for name in (("ce", "kd") if turn == "logits" else (term,))
    ]


def test_every_weight_of_a_turn_learns_and_only_answers_train_the_classifiers():
    scheme = rivals()
    (phase,) = scheme.phases()
    names = {id(p): name for name, p in scheme.named_parameters()}
    for turn in scheme.turns(phase):
        scheme.zero_grad(set_to_none=True)
        sum(in_turn(scheme, turn.name).terms.values()).backward()
        wanted = {names[id(p)] for p in scheme.trained_parameters(turn.trains)}
        found = {name for name, p in scheme.named_parameters() if p.grad is not None and p.grad.any()}
        if turn.name != "logits":
            wanted = {name for name in wanted if "classifier" not in name}
        assert found == wanted, turn


def test_what_is_frozen_passes_gradient_on_and_is_as_before_afterwards():
    judge = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    judge[2].bias.requires_grad_(False)
    before, (x, _, _) = clone(judge.state_dict()), random_logits(5, 3)
    x.requires_grad_()
    with frozen(judge):
        answer = judge(x)
    answer.square().sum().backward()
    assert x.grad.any() and all(p.grad is None for p in judge.parameters())
    assert [p.requires_grad for p in judge.parameters()] == [True] * 5 + [False]
    assert difference(clone(judge.state_dict()), before) is None
    with pytest.raises(RuntimeError), frozen(judge):
        raise RuntimeError
    judge(x.detach()).sum().backward()
    assert judge[0].weight.grad is not None and judge[1].num_batches_tracked == 1


@pytest.mark.parametrize(
    ("turn", "moved"),
    [("logits", ("peers.",)), ("generators", ("peers.", "transfer")), ("discriminators", ("discriminator",))],
)
def test_batch_statistics_move_only_of_what_a_turn_trains(turn, moved):
    scheme = rivals()
    before = clone(scheme.state_dict())
    in_turn(scheme, turn)
    after = clone(scheme.state_dict())
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    statistics = {name for name in after if "running" in name or "num_batches" in name}
    assert changed == {name for name in statistics if any(part in name for part in moved)}
    counted = {int(after[name]) for name in changed if "num_batches" in name}
    assert counted == ({2} if turn == "discriminators" else {1})  # a discriminator sees own maps and others'


# values


def by_hand(scheme: Rivals, batch: Batch) -> list:
    """What the networks show of a batch in train mode; a copy's batch statistics move instead."""
    return [peer.train()(batch.images) for peer in scheme.peers]


@trios
def test_a_network_learns_from_the_one_before_it_in_the_cycle(names):
    scheme, batch = rivals(*names), a_batch()
    views = by_hand(scheme, batch)
    teachers = {0: len(names) - 1} | {k: k - 1 for k in range(1, len(names))}
    answers, fooled, judged = (in_turn(scheme, turn).terms for turn in TURNS)
    for k, n in teachers.items():
        judge, transfer = scheme.adapters[f"peer{k}"]["discriminator"], scheme.adapters[f"peer{k}"]["transfer"]
        d_own, d_other = judge(transfer(views[k].maps[-1])), judge(views[n].maps[-1])
        expected = {
            f"peer{k}_ce": F.cross_entropy(views[k].logits, batch.labels),
            f"peer{k}_kd": softened_kl(views[k].logits, views[n].logits, 3.0),
            f"peer{k}_generator": ((1 - d_own) ** 2).mean(),
            f"peer{k}_discriminator": ((1 - d_other) ** 2).mean() + (d_own**2).mean(),
        }
        found = {**answers, **fooled, **judged}
        for name, value in expected.items():
            assert found[name].item() == pytest.approx(value.item(), rel=1e-12), name


def test_weights_multiply_the_terms_of_the_answers_and_zero_leaves_them_out():
    whole = in_turn(rivals(), "logits").terms
    scaled = in_turn(rivals(ce_weight=0.5, kd_weight=2.0), "logits").terms
    for name, factor in (("peer0_ce", 0.5), ("peer1_ce", 0.5), ("peer0_kd", 2.0), ("peer1_kd", 2.0)):
        assert scaled[name].item() == pytest.approx(factor * whole[name].item())
    assert set(in_turn(rivals(kd_weight=0.0), "logits").terms) == {"peer0_ce", "peer1_ce"}


def test_the_first_network_counts_what_it_gets_right():
    scheme, batch = rivals(), a_batch()
    view = scheme.peers[0].train()(batch.images)
    losses = {turn: in_turn(scheme, turn) for turn in TURNS}
    assert losses["logits"].counts == {"correct": (view.logits.argmax(dim=1) == batch.labels).sum()}
    assert not losses["generators"].counts and not losses["discriminators"].counts


def test_half_precision_reaches_the_networks_and_not_the_discriminators():
    peers = [build(NARROW, torch.float32) for _ in range(2)]
    batch = a_batch()._replace(images=a_batch().images.float())
    scheme = Rivals(peers, AdversarialDistillation(), batch)
    seen = {"stem": set(), "judge": set()}
    peers[0].stem.layers[0].register_forward_hook(lambda module, inputs, output: seen["stem"].add(output.dtype))
    scheme.adapters["peer0"]["discriminator"][0].register_forward_hook(
        lambda module, inputs, output: seen["judge"].add(output.dtype)
    )
    (phase,) = scheme.phases()
    scheme.set_modes(phase)
    for turn in scheme.turns(phase):
        losses = scheme.losses(phase, turn, batch, torch.bfloat16)
        assert {term.dtype for term in losses.terms.values()} == {torch.float32}
    assert seen == {"stem": {torch.bfloat16}, "judge": {torch.float32}}


# a run


def test_the_turns_alternate_on_every_batch_and_each_changes_only_its_own():
    scheme = rivals()
    seen = []
    losses = scheme.losses

    def watched(phase, turn, batch, half):
        seen.append((turn.name, {name: p.detach().clone() for name, p in scheme.named_parameters()}))
        return losses(phase, turn, batch, half)

    scheme.losses = watched
    training = make_training(scheme, make_recipe(epochs=2))
    training.run()
    seen.append(("end", {name: p.detach().clone() for name, p in scheme.named_parameters()}))
    assert [name for name, _ in seen[:-1]] == [*TURNS] * (2 * 3)
    for (turn, before), (_, after) in pairwise(seen):
        changed = {name for name in after if not torch.equal(before[name], after[name])}
        if turn == "logits":
            wanted = {name for name in after if name.startswith("peers")}
        elif turn == "generators":
            wanted = {n for n in after if "transfer" in n or (n.startswith("peers") and "classifier" not in n)}
        else:
            wanted = {name for name in after if "discriminator" in name}
        assert changed == wanted, turn


def test_every_optimiser_takes_one_step_a_batch_with_its_own_rule_and_rate():
    scheme = rivals(NARROW, BROAD, adversarial_learning_rate=1e-3)
    rates, optimisers = [], {}

    def on_step(done, text):
        optimisers.update(training.current.optimisers)
        rates.append(tuple(optimiser.param_groups[0]["lr"] for optimiser in optimisers.values()))

    recipe = make_recipe(epochs=3, milestones=(1, 2), factor=0.1)
    training = make_training(scheme, recipe, on_step=on_step)
    training.run()
    assert list(optimisers) == list(TURNS)
    assert [type(optimiser) for optimiser in optimisers.values()] == [
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.Adam,
    ]
    assert [optimiser.param_groups[0]["weight_decay"] for optimiser in optimisers.values()] == [5e-4, 0.0, 0.0]
    for name in TURNS[1:]:
        assert {int(state["step"]) for state in optimisers[name].state.values()} == {9}
    assert optimisers["logits"] is not optimisers["generators"] is not optimisers["discriminators"]
    for epoch in range(3):
        for step in range(3):
            assert rates[3 * epoch + step] == pytest.approx((0.2 * 0.1**epoch, 1e-3 * 0.1**epoch, 1e-3 * 0.1**epoch))
    assert [row["learning_rate"] for row in training.history] == pytest.approx([0.2, 0.02, 0.002])
    terms = {f"peer{k}_{name}" for k in (0, 1) for name in ("ce", "kd", "generator", "discriminator")}
    assert terms <= set(training.history[-1])


def test_discriminators_learn_to_tell_and_networks_to_fool_them():
    def after(turn_name):
        scheme = rivals()
        (phase,) = scheme.phases()
        (turn,) = (turn for turn in scheme.turns(phase) if turn.name == turn_name)
        optimiser = torch.optim.Adam(scheme.trained_parameters(turn.trains), lr=0.01)
        values = []
        for _ in range(40):
            loss = sum(in_turn(scheme, turn_name).terms.values())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            values.append(loss.item())
        return values

    for turn in ("discriminators", "generators"):
        values = after(turn)
        assert values[-1] < values[0] - 0.03, turn


@pytest.mark.parametrize("stop_after", range(1, 9))
def test_a_run_that_is_stopped_at_any_step_goes_on_exactly(tmp_path, stop_after):
    recipe, checkpoint = make_recipe(), tmp_path / "checkpoint.pt"
    whole = run_session(rivals(NARROW, BROAD, THIRD), recipe)
    assert run_session(rivals(NARROW, BROAD, THIRD), recipe, checkpoint, stop_after=stop_after).stopped
    resumed = run_session(rivals(NARROW, BROAD, THIRD), recipe, checkpoint)
    assert (whole.steps, resumed.steps) == (9, 9 - stop_after)
    assert difference(resumed.outcome, whole.outcome) is None


def test_a_single_image_in_the_last_batch_is_refused():
    recipe = Recipe(epochs=1, batch=7, learning_rate=0.1, crop_padding=PADDING, precision="fp64")  # 22 = 3 * 7 + 1
    with pytest.raises(ValueError, match="at least 2 in a batch"):
        Training(rivals(), recipe, make_bank(*pictures(), padding=PADDING), seed=0, watch={})


# new networks, and what becomes of them


def assembled(count: int = 2, partners: tuple[str, ...] = (), seed: int = 0) -> Rivals:
    torch.manual_seed(seed)

    cast = Cast(build, NARROW, partners)
    return Rivals.assemble(cast, AdversarialDistillation(), a_batch(), RivalOptions(count=count))


def test_new_networks_and_discriminators_start_from_different_weights():
    scheme = assembled(count=3)
    assert len(scheme.peers) == len(scheme.adapters) == 3
    for part in (
        [peer.state_dict() for peer in scheme.peers],
        [each.state_dict() for each in scheme.adapters.values()],
    ):
        for one, other in ((0, 1), (0, 2), (1, 2)):
            drawn = [name for name, x in part[one].items() if x.ndim > 1]
            assert drawn and not any(torch.equal(part[one][name], part[other][name]) for name in drawn)


def test_the_first_network_is_that_of_a_student_trained_alone():
    scheme = assembled(seed=3)
    torch.manual_seed(3)
    alone = build(NARROW)
    assert difference(clone(scheme.peers[0].state_dict()), clone(alone.state_dict())) is None
    assert scheme.deployed is scheme.peers[0] and scheme.role == "first peer"


def test_partners_take_the_place_of_further_students():
    scheme = assembled(partners=(BROAD, NARROW))
    assert [peer.classifier.in_features for peer in scheme.peers] == [16, 24, 16]
    assert [scheme.adapters[k]["transfer"][0].weight.shape[:2] for k in ("peer1", "peer2")] == [(16, 24), (24, 16)]
    assert isinstance(scheme.adapters["peer0"]["transfer"], nn.Identity)  # of the last one's width
    with pytest.raises(ValueError, match="count is 4, but the student and its partners are 3"):
        assembled(count=4, partners=(BROAD, NARROW))


def test_all_others_and_the_ensemble_are_scored_beside_the_first():
    scheme = assembled(count=3)
    further = scheme.further()
    assert list(further) == ["peer_1", "peer_2", "ensemble"]
    assert further["peer_1"] is scheme.peers[1] and further["peer_2"] is scheme.peers[2]
    images = a_batch().images
    scheme.eval()
    mean = torch.stack([peer(images).logits.softmax(dim=1) for peer in scheme.peers]).mean(dim=0)
    torch.testing.assert_close(further["ensemble"](images).logits.softmax(dim=1), mean)


def test_a_batch_costs_two_passes_of_every_network():
    scheme = rivals(NARROW, BROAD, THIRD)
    (phase,) = scheme.phases()
    assert scheme.passes(phase) == 6
    assert scheme.trained_networks(phase.trains) == ["peers.0", "peers.1", "peers.2"]


# wrong use


def test_a_method_without_discriminators_is_refused():
    with pytest.raises(ValueError, match="DeepMutualLearning has no discriminators: train its networks under peers"):
        rivals(method=DeepMutualLearning())


def test_a_network_alone_is_refused():
    with pytest.raises(ValueError, match="rivals are two or more"):
        rivals(NARROW)


@pytest.mark.parametrize("count", [1, 0, 2.0, True])
def test_a_bad_count_is_named(count):
    with pytest.raises(ValueError, match="count must be a whole number of at least 2"):
        RivalOptions(count=count)
