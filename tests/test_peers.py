"""Peers: against loops written out for each way of learning together; who is reached by what; stops and resumes."""

import copy
import math
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from test_methods import OTHER_STUDENTS, STUDENT, TEACHER, batch_of, network
from toy import (
    CPU,
    IMAGES,
    PADDING,
    Plain,
    clone,
    difference,
    make_bank,
    make_recipe,
    make_training,
    pictures,
    run_session,
    tiny_net,
)
from toy import make_scheme as make_alone

from kdstudy.checkpoint import load_weights, save_weights
from kdstudy.collective import KDCL, OKDDip
from kdstudy.contrast import CRD
from kdstudy.data import Draws
from kdstudy.hints import FitNets
from kdstudy.logits import MultiLevel
from kdstudy.models import build_model
from kdstudy.mutual import Codistillation, DeepMutualLearning
from kdstudy.peers import PeerOptions, Peers
from kdstudy.response import CrossEntropy, VanillaKD
from kdstudy.samples import Relational
from kdstudy.schemes import Alone, Cast, sample_batch
from kdstudy.study import METHODS, build_method
from kdstudy.train import Surroundings, Training

close = {"rtol": 1e-12, "atol": 1e-12}


def tiny_peers(*widths, first_seed=0):
    return [tiny_net(first_seed + number, width) for number, width in enumerate(widths)]


def staged_peers(*names):
    torch.manual_seed(3)
    return [build_model(name, classes=3, image_size=(6, 5)).double() for name in names]


def peers_of(networks, method, **options):
    sample = sample_batch(make_bank(*pictures()), 8)
    torch.manual_seed(1)
    return Peers(networks, method, sample, PeerOptions(**{"count": max(2, len(networks))} | options))


def entropy_to(target, logits):
    return -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()


def divergence(target_logits, logits, temperature=1.0):
    """`T^2 KL`, with the target detached."""
    target = (target_logits.detach() / temperature).softmax(dim=1)
    own = (logits / temperature).log_softmax(dim=1)
    return temperature**2 * (target * (target.log() - own)).sum() / len(logits)


def batches_by_hand(seed, epochs, count, batches="shared"):
    """For every step the (images, labels) of every peer; peer k has random numbers of its own in stream 1000 k."""
    bank = make_bank(*pictures(), padding=PADDING)
    same = {"seed": seed, "epochs": epochs, "images": IMAGES, "padding": PADDING, "flip": True, "device": CPU}
    draws = [Draws.make(stream=1000 * number, **same) for number in range(count)]
    for epoch in range(epochs):
        for place in torch.arange(IMAGES).split(8):
            step = []
            for own in draws if batches != "shared" else draws[:1] * count:
                index = (own if batches == "own_images" else draws[0]).order[epoch, place].long()
                images = bank.augmented(index, own.shift[epoch, place].long(), own.flip[epoch, place])
                step.append((images, bank.labels[index]))
            yield epoch, step


def optimiser_for(parameters):
    return torch.optim.SGD(parameters, lr=0.2, momentum=0.9, weight_decay=5e-4, foreach=False, fused=False)


def as_if_looked_at(net, images):
    """What a network in train mode answers, without its batch statistics taking note of it."""
    with torch.no_grad():
        return copy.deepcopy(net).train()(images).logits


def learn(nets, terms, *, seed, epochs=3, batches="shared", after=lambda: None):
    """All at once: `terms(nets, step, epoch)` gives one loss per network."""
    optimisers = [optimiser_for(net.parameters()) for net in nets]
    for net in nets:
        net.train()
    for epoch, step in batches_by_hand(seed, epochs, len(nets), batches):
        losses = terms(nets, step, epoch)
        for optimiser, loss in zip(optimisers, losses, strict=True):
            optimiser.param_groups[0]["lr"] = 0.2 if epoch < 2 else 0.04
            optimiser.zero_grad()
            loss.backward(retain_graph=True)
        for optimiser in optimisers:
            optimiser.step()
        after()


def assert_same_peers(scheme, nets):
    for peer, net in zip(scheme.peers, nets, strict=True):
        torch.testing.assert_close(peer.state_dict(), net.state_dict(), **close)


# against loops written out


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("widths", [(3, 3), (3, 5, 4)], ids=str)
def test_mutual_learning_at_once_is_a_plain_loop(widths, together):
    scheme = peers_of(tiny_peers(*widths), DeepMutualLearning(), together=together)
    session = run_session(scheme, make_recipe(), seed=7)

    def terms(nets, step, epoch):
        images, labels = step[0]
        logits = [net(images).logits for net in nets]
        losses = []
        for one in logits:
            others = [other.detach() for other in logits if other is not one]
            if together:
                mean = sum(other.softmax(dim=1) for other in others) / len(others)
                pull = entropy_to(mean, one) - entropy_to(mean, mean.log())
            else:
                pull = sum(divergence(other, one) for other in others) / len(others)
            losses.append(F.cross_entropy(one, labels) + pull)
        return losses

    nets = tiny_peers(*widths)
    learn(nets, terms, seed=7)
    assert_same_peers(scheme, nets)
    assert nets[1].norm.num_batches_tracked == 9
    assert {f"peer{k}_{term}" for k in range(len(widths)) for term in ("ce", "kd")} < set(session.history[0])


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("widths", [(3, 3), (3, 5, 4)], ids=str)
def test_mutual_learning_in_turn_is_a_plain_loop_that_asks_anew_before_every_step(widths, together):
    scheme = peers_of(tiny_peers(*widths), DeepMutualLearning(temperature=2.0), alternate=True, together=together)
    run_session(scheme, make_recipe(), seed=7)
    nets = tiny_peers(*widths)
    optimisers = [optimiser_for(net.train().parameters()) for net in nets]
    for epoch, step in batches_by_hand(7, 3, len(nets)):
        images, labels = step[0]
        for net, optimiser in zip(nets, optimisers, strict=True):
            others = [as_if_looked_at(other, images) for other in nets if other is not net]
            own = net(images).logits
            if together:
                mean = sum((other / 2).softmax(dim=1) for other in others) / len(others)
                pull = 4 * (entropy_to(mean, own / 2) - entropy_to(mean, mean.log()))
            else:
                pull = sum(divergence(other, own, 2.0) for other in others) / len(others)
            optimiser.param_groups[0]["lr"] = 0.2 if epoch < 2 else 0.04
            optimiser.zero_grad()
            (F.cross_entropy(own, labels) + pull).backward()
            optimiser.step()
    assert_same_peers(scheme, nets)
    assert nets[0].norm.num_batches_tracked == 9


@pytest.mark.parametrize("widths", [(3, 4), (3, 5, 4)], ids=str)
def test_codistillation_from_stale_copies_after_a_burn_in_on_own_images_is_a_plain_loop(widths):
    options = {"burn_in": 0.4, "exchange_interval": 4, "batches": "own_images"}
    scheme = peers_of(tiny_peers(*widths), Codistillation(), **options)
    run_session(scheme, make_recipe(epochs=4), seed=2)
    nets = tiny_peers(*widths)
    copies, steps = [], 0

    def terms(nets, step, epoch):
        nonlocal copies, steps
        if steps % 4 == 0:  # before the steps 0, 4, 8: in the midst of epochs of three
            copies = [copy.deepcopy(net).eval() for net in nets]
        steps += 1
        losses = []
        for own, (net, (images, labels)) in enumerate(zip(nets, step, strict=True)):
            with torch.no_grad():
                answers = [each(images).logits.softmax(dim=1) for k, each in enumerate(copies) if k != own]
            logits = net(images).logits
            taught = epoch >= 2  # round(0.4 * 4)
            losses.append(F.cross_entropy(logits, labels) + taught * entropy_to(sum(answers) / len(answers), logits))
        return losses

    learn(nets, terms, seed=2, epochs=4, batches="own_images")
    assert_same_peers(scheme, nets)
    for stale, net in zip(scheme.stale, copies, strict=True):
        torch.testing.assert_close(stale.state_dict(), net.state_dict(), **close)


@pytest.mark.parametrize("form", ["each", "together", "itself"])
def test_on_own_images_whoever_teaches_is_asked_about_the_learners(form):
    """With `itself`, the learner is one of those that teach it."""
    method = KDCL(mode="mean", temperature=1.0) if form == "itself" else DeepMutualLearning()
    scheme = peers_of(tiny_peers(3, 4, 5), method, batches="own_images", together=form == "together")
    run_session(scheme, make_recipe(), seed=2)

    def terms(nets, step, epoch):
        losses = []
        for net, (images, labels) in zip(nets, step, strict=True):
            others = [as_if_looked_at(other, images) for other in nets if other is not net]
            own = net(images).logits
            if form == "together":
                pull = divergence((sum(other.softmax(dim=1) for other in others) / 2).log(), own)
            elif form == "itself":
                pull = divergence((sum(others) + own.detach()) / 3, own)
            else:
                pull = sum(divergence(other, own) for other in others) / 2
            losses.append(F.cross_entropy(own, labels) + pull)
        return losses

    nets = tiny_peers(3, 4, 5)
    learn(nets, terms, seed=2, batches="own_images")
    assert_same_peers(scheme, nets)


def test_collaborative_learning_on_own_crops_is_a_plain_loop():
    scheme = peers_of(tiny_peers(3, 4, 5), KDCL(), batches="own_crops")
    run_session(scheme, make_recipe(), seed=2)

    def terms(nets, step, epoch):
        logits = [net(images).logits for net, (images, _) in zip(nets, step, strict=True)]
        labels = step[0][1]
        rows = []
        for b, y in enumerate(labels.tolist()):
            rows.append([min((z[b, c] - z[b, y]).item() for z in logits) for c in range(3)])
        target = torch.tensor(rows, dtype=torch.float64)
        return [F.cross_entropy(z, labels) + divergence(target, z, 2.0) for z in logits]

    nets = tiny_peers(3, 4, 5)
    learn(nets, terms, seed=2, batches="own_crops")
    assert_same_peers(scheme, nets)


def test_on_own_crops_a_peer_answers_for_its_own_also_where_it_is_asked_anew():
    scheme = peers_of(tiny_peers(3, 4), DeepMutualLearning(), batches="own_crops", exchange_interval=1)
    run_session(scheme, make_recipe(), seed=2)

    def terms(nets, step, epoch):
        (crops, labels), (others_crops, _) = step
        with torch.no_grad():
            own, others = (copy.deepcopy(net).eval() for net in nets)
            answers = own(crops).logits, others(others_crops).logits
        logits = nets[0](crops).logits, nets[1](others_crops).logits
        pairs = ((logits[0], answers[1]), (logits[1], answers[0]))
        return [F.cross_entropy(one, labels) + divergence(other, one) for one, other in pairs]

    nets = tiny_peers(3, 4)
    learn(nets, terms, seed=2, batches="own_crops")
    assert_same_peers(scheme, nets)


def test_a_leader_learns_from_all_others_and_teaches_nobody():
    scheme = peers_of(tiny_peers(3, 4, 5), DeepMutualLearning(), leader=True)
    run_session(scheme, make_recipe(), seed=2)

    def terms(nets, step, epoch):
        images, labels = step[0]
        leader, one, other = (net(images).logits for net in nets)
        pulls = [(divergence(one, leader) + divergence(other, leader)) / 2, divergence(other, one)]
        pulls.append(divergence(one, other))
        return [F.cross_entropy(z, labels) + pull for z, pull in zip((leader, one, other), pulls, strict=True)]

    nets = tiny_peers(3, 4, 5)
    learn(nets, terms, seed=2)
    assert_same_peers(scheme, nets)
    assert scheme.role == "leader" and scheme.deployed is scheme.peers[0]


@pytest.mark.parametrize("name", ["wrn_10_0.25", "resnet8x0.5", "cnn_small"])
@pytest.mark.parametrize("shared", [1, 2])
def test_branches_share_their_first_stages_and_the_sum_of_all_gradients(name, shared):
    scheme = peers_of(staged_peers(name, name, name), DeepMutualLearning(), shared_stages=shared)
    run_session(scheme, make_recipe(), seed=2)

    nets = staged_peers(name, name, name)
    for net in nets[1:]:
        net.stem = nets[0].stem
        for number in range(shared):
            net.stages[number] = nets[0].stages[number]
    trunk = [
        name
        for name, _ in nets[0].named_buffers()
        if name.startswith(("stem.", "stages.0.", "stages.1.")[: 1 + shared])
    ]
    optimiser = optimiser_for(list({id(p): p for net in nets for p in net.parameters()}.values()))
    for epoch, step in batches_by_hand(2, 3, 3):
        images, labels = step[0]
        logits = [nets[0].train()(images).logits]
        for net in nets[1:]:  # each runs the trunk anew, and leaves its statistics alone
            kept = {name: net.get_buffer(name).clone() for name in trunk}
            logits.append(torch.func.functional_call(net.train(), kept, (images,)).logits)
        total = sum(F.cross_entropy(z, labels) for z in logits)
        for one in logits:
            total = total + sum(divergence(other, one) for other in logits if other is not one) / 2
        optimiser.param_groups[0]["lr"] = 0.2 if epoch < 2 else 0.04
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
    for peer, net in zip(scheme.peers, nets, strict=True):
        torch.testing.assert_close(peer.state_dict(), net.state_dict(), rtol=1e-10, atol=1e-12)
    counts = {x.item() for n, x in scheme.peers[2].state_dict().items() if "num_batches" in n}
    assert counts == {9}


@pytest.mark.parametrize("taps", [("maps", "pre_maps", "stem", "embedding")])
@pytest.mark.parametrize("name", ["wrn_10_0.25", "resnet8x0.5", "cnn_small"])
def test_a_branch_shows_what_the_whole_network_would(name, taps):
    scheme = peers_of(staged_peers(name, name), DeepMutualLearning(), shared_stages=1)
    object.__setattr__(scheme, "method", type("Reads", (), {"reads": taps}))
    batch = sample_batch(make_bank(*pictures()), 8)
    scheme.peers.train()
    shown = scheme._own_views(batch, None, range(2))
    for number, peer in enumerate(scheme.peers):
        expected = peer(batch.images)
        for tap in ("logits", *taps):
            torch.testing.assert_close(getattr(shown[number], tap), getattr(expected, tap), **close)


def test_a_branch_that_is_deployed_is_a_plain_student(tmp_path):
    torch.manual_seed(0)
    cast = Cast(lambda name: build_model(name, classes=3, image_size=(6, 5)).double(), "wrn_10_0.25")
    sample = sample_batch(make_bank(*pictures()), 8)
    options = PeerOptions(count=3, leader=True, shared_stages=2)
    scheme = Peers.assemble(cast, DeepMutualLearning(), sample, options)
    run_session(scheme, make_recipe(epochs=1, milestones=()), seed=2)
    save_weights(scheme.deployed, tmp_path / "weights")
    alone = staged_peers("wrn_10_0.25")[0]
    load_weights(alone, tmp_path / "weights")
    assert torch.equal(alone.eval()(sample.images).logits, scheme.peers[0].eval()(sample.images).logits)


# what each sees


def seen_by_peers(scheme, seed=2, epochs=2):
    """The batches that every peer was shown as a learner, step by step."""
    seen = [[] for _ in scheme.peers]
    for own, peer in zip(seen, scheme.peers, strict=True):
        peer.register_forward_pre_hook(
            lambda net, arguments, own=own: own.append(arguments[0].clone()) if net.training else None
        )
    make_training(scheme, make_recipe(epochs=epochs, milestones=()), seed=seed).run()
    return seen


@pytest.mark.parametrize("batches", ["shared", "own_crops", "own_images"])
def test_every_peer_sees_the_batches_that_are_meant_for_it(batches):
    # stale copies teach, so that peers in train mode are shown only what they learn from
    scheme = peers_of(tiny_peers(3, 3, 3), Codistillation(), exchange_interval=1, batches=batches)
    seen = seen_by_peers(scheme)
    expected = [step for _, step in batches_by_hand(2, 2, 3, batches)]
    for number, own in enumerate(seen):
        assert difference(own, [step[number][0] for step in expected]) is None
    labels = [[step[number][1] for step in expected] for number in range(3)]
    assert (difference(labels[0], labels[1]) is None) == (batches != "own_images")
    assert (difference(seen[0], seen[1]) is None) == (batches == "shared")
    assert difference(seen[1], seen[2]) is None or batches != "shared"


def test_copies_are_frozen_in_eval_mode_and_change_only_when_they_are_exchanged():
    scheme = peers_of(tiny_peers(3, 4), Codistillation(), exchange_interval=4)
    modes, changed, before = [], [], None
    for stale in scheme.stale:
        stale.register_forward_pre_hook(lambda net, arguments: modes.append(net.training))

    def note(done, text):
        nonlocal before
        now = clone(scheme.stale.state_dict())
        changed.append(before is not None and difference(before, now) is not None)
        before = now

    make_training(scheme, make_recipe(), on_step=note).run()
    assert [step for step, moved in enumerate(changed) if moved] == [4, 8]
    assert modes and not any(modes)
    assert not any(parameter.requires_grad for parameter in scheme.stale.parameters())
    assert not any("stale" in name for phase in scheme.phases() for name in phase.trains)


@pytest.mark.parametrize("burn_in", [0.0, 0.3, 0.5, 0.99])
def test_before_the_burn_in_is_over_only_labels_teach(burn_in):
    scheme = peers_of(tiny_peers(3, 4), DeepMutualLearning(), burn_in=burn_in)
    history = run_session(scheme, make_recipe(epochs=4)).history
    silent = [row["peer0_kd"] == row["peer1_kd"] == 0 for row in history]
    assert silent == [epoch < round(4 * burn_in) for epoch in range(4)]
    assert all(row["peer1_ce"] > 0 for row in history)


# who is reached


THREE = (STUDENT, STUDENT, TEACHER)
LEARNT = {
    "mutual": (DeepMutualLearning(), THREE, {}),
    "mutual as one": (DeepMutualLearning(), THREE, {"together": True}),
    "in turn": (DeepMutualLearning(), THREE, {"alternate": True}),
    "led": (DeepMutualLearning(), THREE, {"leader": True}),
    "codistillation": (Codistillation(), THREE, {"batches": "own_images", "exchange_interval": 2}),
    "own images": (DeepMutualLearning(), THREE, {"batches": "own_images"}),
    "own crops": (KDCL(mode="linear"), THREE, {"batches": "own_crops"}),
    **{f"kdcl {mode}": (KDCL(mode=mode), THREE, {}) for mode in ("min_logit", "naive", "mean", "general")},
    "attention over peers": (OKDDip(), (STUDENT,) * 4, {"leader": True}),
    "attention over peers in turn": (OKDDip(), (STUDENT,) * 3, {"leader": True, "alternate": True}),
    "attention over branches": (OKDDip(), (STUDENT,) * 4, {"leader": True, "shared_stages": 2}),
    "branches": (DeepMutualLearning(), (STUDENT,) * 3, {"shared_stages": 1}),
    "contrast": (CRD(negatives=5), THREE, {}),
    "hints": (FitNets(two_stage=False), ("cnn_small",) * 3, {}),
    "hints in two phases": (FitNets(two_stage=True), ("cnn_small",) * 2, {"alternate": True}),
    "attention of maps": (build_method("attention"), THREE, {}),
    "relations": (Relational(), THREE, {}),
    "strong views": (MultiLevel(), THREE, {}),
    "factors": (build_method("factor_transfer"), THREE, {}),
}


def learning(name):
    method, names, options = LEARNT[name]
    torch.manual_seed(0)
    nets = [network(each, torch.float64) for each in names]
    scheme = Peers(nets, method, batch_of(), PeerOptions(count=len(names), **options))
    scheme.begin_epoch(0, 1, held_out())
    scheme.begin_step(0)
    return scheme


def held_out():
    return make_bank(*pictures(12, size=(8, 8), channels=1))


def batches_for(scheme):
    """A batch, with others for the other peers where the scheme wants them."""
    batch = batch_of()
    turned = [batch._replace(images=batch.images.roll(number, 0)) for number in range(1, scheme.batches)]
    if scheme.own_images:
        turned = [each._replace(labels=each.labels.roll(number + 1)) for number, each in enumerate(turned)]
    return batch._replace(others=tuple(turned))


def reached(term, parameters):
    if not parameters:
        return []
    found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    return [gradient is not None and bool(gradient.any()) for gradient in found]


@pytest.mark.parametrize("name", LEARNT)
def test_every_term_reaches_its_own_peer_and_no_other(name):
    scheme = learning(name)
    shared = {id(p) for p in scheme.peers[0].parameters()} & {id(p) for p in scheme.peers[1].parameters()}
    assert bool(shared) == bool(LEARNT[name][2].get("shared_stages"))
    for phase in scheme.phases():
        scheme.set_modes(phase)
        for turn in scheme.turns(phase):
            terms = scheme.losses(phase, turn, batches_for(scheme), None).terms
            assert terms
            for label, term in terms.items():
                owner = int(label.removeprefix("peer").split("_")[0])
                for number, peer in enumerate(scheme.peers):
                    own = [p for p in peer.parameters() if id(p) not in shared]
                    if number != owner:
                        assert not any(reached(term, own)), (label, number)
                    elif label.endswith("_ce"):
                        assert all(reached(term, list(peer.parameters()))), label
                    elif "paraphrase" not in label:
                        assert any(reached(term, own)), label
                for pair, adapters in scheme.adapters.items():
                    if "_" in pair and not pair.startswith(f"{owner}_"):
                        assert not any(reached(term, list(adapters.parameters()))), (label, pair)
                if hasattr(scheme, "stale"):
                    assert not any(p.requires_grad for p in scheme.stale.parameters())


@pytest.mark.parametrize("name", LEARNT)
def test_a_turn_trains_what_its_terms_reach_and_all_turns_train_everything_once(name):
    scheme = learning(name)
    for phase in scheme.phases():
        scheme.set_modes(phase)
        trained = [name for turn in scheme.turns(phase) for name in turn.trains]
        assert set(trained) == set(phase.trains)
        shared = [name for name in trained if trained.count(name) > 1]
        assert set(shared) <= {"adapters"}
        for turn in scheme.turns(phase):
            losses = scheme.losses(phase, turn, batches_for(scheme), None)
            parameters = scheme.trained_parameters(turn.trains)
            with_others = reached(sum(losses.terms.values()), parameters)
            # the leader's own turn has nothing for the adapters that the others share
            assert all(with_others) or (turn.name.endswith(" 0") and "adapters" in turn.trains)
            assert any(with_others)


def test_the_leader_is_a_constant_for_the_others_and_they_for_him():
    scheme = learning("attention over peers")
    (phase,) = scheme.phases()
    (turn,) = scheme.turns(phase)
    scheme.set_modes(phase)
    with torch.no_grad():
        before = scheme.losses(phase, turn, batch_of(), None).terms
        scheme.peers[0].classifier.weight.mul_(3)
        after = scheme.losses(phase, turn, batch_of(), None).terms
    for label in before:
        assert (before[label] == after[label]) == (not label.startswith("peer0")), label


@pytest.mark.parametrize("options", [{}, {"alternate": True}, {"together": True}, {"exchange_interval": 1}], ids=str)
def test_the_weights_of_the_others_matter_all_the_same(options):
    """A term passes no gradient to another peer, but changes with it, for each of the pairs."""
    for student, other in permutations(range(3), 2):
        torch.manual_seed(0)
        scheme = Peers(
            [network(n, torch.float64) for n in THREE],
            DeepMutualLearning(),
            batch_of(),
            PeerOptions(count=3, **options),
        )
        (phase,) = scheme.phases()
        turn = next(turn for turn in scheme.turns(phase) if f"peers.{student}" in turn.trains)
        scheme.set_modes(phase)
        values = []
        for factor in (1, 3):
            with torch.no_grad():
                scheme.peers[other].classifier.weight.mul_(factor)
                scheme.begin_step(0)
                values.append(scheme.losses(phase, turn, batch_of(), None).terms[f"peer{student}_kd"])
        assert values[0] != values[1]


# beginnings


def assembled(seed, method=None, partners=(), **options):
    torch.manual_seed(seed)
    cast = Cast(lambda name: network(name, torch.float64), STUDENT, partners)
    return Peers.assemble(cast, method or DeepMutualLearning(), batch_of(), PeerOptions(**options))


def test_peers_start_apart_and_the_first_is_the_student_alone():
    scheme = assembled(4, count=3)
    states = [peer.state_dict() for peer in scheme.peers]
    for name, weight in states[0].items():
        if weight.ndim > 1:
            assert not any(torch.equal(states[a][name], states[b][name]) for a, b in permutations(range(3), 2)), name
    torch.manual_seed(4)
    alone = Alone.assemble(Cast(lambda name: network(name, torch.float64), STUDENT), CrossEntropy(), batch_of(), None)
    assert difference(clone(states[0]), clone(alone.student.state_dict())) is None
    assert difference(clone(assembled(5, count=3).peers[0].state_dict()), clone(states[0])) is not None


def test_partners_are_the_students_peers_in_their_order():
    scheme = assembled(4, partners=(TEACHER, "cnn_small"))
    torch.manual_seed(4)
    expected = [network(name, torch.float64) for name in (STUDENT, TEACHER, "cnn_small")]
    assert len(scheme.peers) == 3
    for peer, net in zip(scheme.peers, expected, strict=True):
        assert difference(clone(peer.state_dict()), clone(net.state_dict())) is None
    (phase,) = scheme.phases()
    scheme.set_modes(phase)
    losses = scheme.losses(phase, scheme.turns(phase)[0], batch_of(), None)
    assert all(torch.isfinite(term) for term in losses.terms.values()) and len(losses.terms) == 6


WITHOUT_TEACHING = [
    {},
    {"alternate": True},
    {"count": 3},
    {"count": 3, "together": True},
    {"batches": "own_crops"},
    {"batches": "own_images", "exchange_interval": 2},
    {"count": 3, "leader": True},
    {"burn_in": 0.5},
]


@pytest.mark.parametrize("options", WITHOUT_TEACHING, ids=str)
@pytest.mark.parametrize("method", [DeepMutualLearning(kd_weight=0.0), Codistillation(kd_weight=0.0)], ids=str)
def test_without_teaching_the_first_peer_is_bit_for_bit_the_student_trained_alone(method, options):
    scheme = peers_of(tiny_peers(*(3,) * options.get("count", 2), first_seed=5), method, **options)
    session = run_session(scheme, make_recipe(), seed=5)
    alone = run_session(make_alone(Plain(), seed=5), make_recipe(), seed=5)
    assert (
        difference(
            clone(scheme.peers[0].state_dict()),
            clone({name.removeprefix("student."): tensor for name, tensor in alone.state.items()}),
        )
        is None
    )
    for row, expected in zip(session.history, alone.history, strict=True):
        assert row["peer0_ce"] == expected["ce"]
        for name in ("epoch", "learning_rate", "train_accuracy", "test_accuracy", "held_out_accuracy"):
            assert row[name] == expected[name]


def test_four_peers_without_teaching_leave_the_first_alone_but_for_rounding():
    scheme = peers_of(tiny_peers(3, 3, 3, 3, first_seed=5), DeepMutualLearning(kd_weight=0.0))
    run_session(scheme, make_recipe(), seed=5)
    alone = run_session(make_alone(Plain(), seed=5), make_recipe(), seed=5)
    found = {f"student.{name}": tensor for name, tensor in scheme.peers[0].state_dict().items()}
    torch.testing.assert_close(found, alone.state, **close)


def test_the_deployed_peer_and_all_others_are_scored():
    scheme = assembled(1, count=3)
    assert scheme.deployed is scheme.peers[0] and scheme.role == "first peer"
    further = scheme.further()
    assert list(further) == ["peer_1", "peer_2", "ensemble"]
    assert further["peer_2"] is scheme.peers[2]
    scheme.eval()
    images = batch_of().images
    mean = sum(peer(images).logits.softmax(dim=1) for peer in scheme.peers) / 3
    torch.testing.assert_close(further["ensemble"](images).logits.exp(), mean, **close)


def test_costs_count_every_peer():
    for options in ({}, {"alternate": True}, {"leader": True}):
        scheme = assembled(1, count=3, **options)
        (phase,) = scheme.phases()
        assert scheme.passes(phase) == 3
        assert scheme.trained_networks(phase.trains) == ["peers.0", "peers.1", "peers.2"]


# any offline method between peers

REFUSED = {
    "ce": "needs a teacher that is finished, or none",
    "heads": "needs a teacher that is finished, or none",
    "class_distance_teacher": "needs a teacher that is finished, or none",
    "virtual_teacher": "needs a teacher that is finished, or none",
    "own_teacher": "needs a teacher that is finished, or none",
    "spherical": "needs a teacher that is finished",  # measures it
    "logit_mimic": "needs a teacher that is finished",
    "overhaul": "needs a teacher that is finished",
    "few_sample": "needs a teacher that is finished",  # starts from it
    "class_distance": "needs a teacher that is finished",
    "feature_normalised": "needs a teacher that is finished",
    "lit": "needs a teacher that is finished",  # runs parts of it
    "adain": "needs a teacher that is finished",
    "joint_residual": "needs a teacher that is finished",
    "reused_classifier": "needs a teacher that is finished",
}
BETWEEN_PEERS = [
    *(
        "kd",
        "two_temperature",
        "earth_mover",
        "relative_v1",
        "relative_v2",
        "relative_v3",
        "relative_v4",
        "dkd",
        "dist",
    ),
    *("logit_standardisation", "mlkd", "ensemble", "fitnets", "factor_transfer", "variational_information"),
    *("attention", "neuron_selectivity", "activation_boundaries", "semckd", "review", "crd", "crd_inbatch"),
    *("relational", "instance_graph", "similarity", "probabilistic", "correlation", "fsp", "multi_head_graph"),
    *("mutual", "codistillation", "kdcl", "okddip", "born_again"),
]


def pair_of(key, name=None, **options):
    name = name or OTHER_STUDENTS.get(key, STUDENT)
    torch.manual_seed(0)
    networks = [network(name, torch.float64) for _ in range(2)]
    return Peers(networks, build_method(key), batch_of(), PeerOptions(**options))


@pytest.mark.parametrize("alternate", [False, True])
@pytest.mark.parametrize("key", BETWEEN_PEERS)
def test_an_offline_method_serves_between_peers(key, alternate):
    scheme = pair_of(key, alternate=alternate)
    for phase in scheme.phases():
        scheme.set_modes(phase)
        scheme.set_clocks(0, 2)
        learners = set()
        correct = 0
        for turn in scheme.turns(phase):
            losses = scheme.losses(phase, turn, batch_of(), None)
            assert all(torch.isfinite(term) for term in losses.terms.values())
            learners |= {label.split("_")[0] for label in losses.terms}
            correct += len(losses.counts)
            parameters = scheme.trained_parameters(turn.trains)
            sum(losses.terms.values()).backward(inputs=parameters)
            assert all(parameter.grad is not None for parameter in parameters)
            scheme.zero_grad(set_to_none=True)
        assert learners == {"peer0", "peer1"} and correct == 1


@pytest.mark.parametrize("key", REFUSED)
def test_a_method_that_needs_a_finished_teacher_or_none_is_refused(key):
    with pytest.raises(ValueError, match=f"{METHODS[key].__name__} cannot be used between peers: it {REFUSED[key]}"):
        pair_of(key, STUDENT)


@pytest.mark.parametrize("key", ["mlkd", "attention", "crd", "relational", "aekd", "fitnets"])
def test_peers_that_teach_as_one_have_one_answer_and_no_features(key):
    with pytest.raises(ValueError, match=r"peers that teach as one show no more than logits, and .* reads more"):
        pair_of(key, STUDENT, together=True)


def test_every_ordered_pair_has_adapters_of_its_own():
    torch.manual_seed(0)
    networks = [network(name, torch.float64) for name in ("cnn_small", STUDENT, TEACHER)]
    scheme = Peers(networks, FitNets(two_stage=False, stage=1), batch_of(), PeerOptions(count=3))
    assert set(scheme.adapters) == {f"{one}_{other}" for one, other in permutations(range(3), 2)}
    widths = [net(batch_of().images).maps[0].shape[1] for net in networks]
    for one, other in permutations(range(3), 2):
        layer = scheme.adapters[f"{one}_{other}"]["regressor"][0]
        assert (layer.in_channels, layer.out_channels) == (widths[one], widths[other])
    led = Peers(networks, FitNets(two_stage=False, stage=1), batch_of(), PeerOptions(count=3, leader=True))
    assert set(led.adapters) == {"0_1", "0_2", "1_2", "2_1"}


def test_a_term_of_several_teachers_is_the_mean_over_them():
    torch.manual_seed(0)
    networks = [network("cnn_small", torch.float64) for _ in range(3)]
    scheme = Peers(networks, FitNets(two_stage=False), batch_of(), PeerOptions(count=3))
    (phase,) = scheme.phases()
    scheme.eval()
    terms = scheme.losses(phase, scheme.turns(phase)[0], batch_of(), None).terms
    views = [net(batch_of().images) for net in networks]
    for one in range(3):
        errors = [
            (scheme.adapters[f"{one}_{other}"]["regressor"](views[one].maps[1]) - views[other].maps[1]).square().mean()
            for other in range(3)
            if other != one
        ]
        expected = FitNets(two_stage=False).kd_weight * sum(errors) / 2
        assert terms[f"peer{one}_kd"].item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("alternate", [False, True])
def test_hints_of_two_phases_train_the_guided_parts_of_all_peers_first(alternate):
    scheme = pair_of("fitnets", alternate=alternate)
    states = {}
    recipe = make_recipe(epochs=8, milestones=())
    bank = make_bank(*pictures(size=(8, 8), channels=1), padding=PADDING)

    def note(done, text):
        states[text.split()[0]] = clone(scheme.state_dict())

    start = clone(scheme.state_dict())
    history = Training(scheme, recipe, bank, seed=1, watch={}, surroundings=Surroundings(on_step=note)).run()
    assert [row["phase"] for row in history] == ["hint"] + ["distil"] * 8
    assert {"peer0_hint", "peer1_hint"} <= set(history[0])

    def moved(before, after):
        return {name for name in before if not torch.equal(before[name], after[name])}

    first = {tuple(name.split(".")[:3]) for name in moved(start, states["hint"])}
    adapters = {("adapters", pair, "regressor") for pair in ("0_1", "1_0")}
    guided = {("peers", number, part) for number in "01" for part in ("stem", "stages")}
    assert adapters <= first <= adapters | guided
    assert {(root, number) for root, number, part in first if part == "stages"} == {("peers", "0"), ("peers", "1")}
    assert not any(".classifier." in name or ".stages.2." in name for name in moved(start, states["hint"]))
    second = moved(states["hint"], states["distil"])
    clocks = {name for name in second if "clock" in name}
    assert {name.split(".")[0] for name in second - clocks} == {"peers"}
    assert {"peers.0.classifier.weight", "peers.1.classifier.weight"} <= second


@pytest.mark.parametrize("batches", ["shared", "own_images"])
def test_contrast_remembers_every_pairs_embeddings_under_their_own_images(batches):
    networks = [network(STUDENT, torch.float64) for _ in range(2)]
    scheme = Peers(networks, CRD(negatives=4), batch_of(of=60), PeerOptions(batches=batches))
    one, other = batch_of(of=60), batch_of(of=60)
    rows = torch.arange(30, 54)
    other = other._replace(indices=rows, labels=rows % 4)
    batch = one._replace(others=(other,)) if batches == "own_images" else one
    start = clone(scheme.adapters.state_dict())
    (phase,) = scheme.phases()
    scheme.set_modes(phase)
    scheme.losses(phase, scheme.turns(phase)[0], batch, None)
    touched = {}
    for pair in ("0_1", "1_0"):
        name = f"{pair}.teacher_bank.rows"
        changed = (start[name] != scheme.adapters.state_dict()[name]).any(dim=1).nonzero().flatten().tolist()
        touched[pair] = changed
    assert touched["0_1"] == list(range(24))
    assert touched["1_0"] == (rows.tolist() if batches == "own_images" else list(range(24)))


# stops and resumes

CUT = {
    "in turn": (DeepMutualLearning(), (3, 4, 3), {"alternate": True}, {}),
    "stale, own images, burn-in": (
        Codistillation(),
        (3, 4),
        {"exchange_interval": 2, "batches": "own_images", "burn_in": 0.5},
        {},
    ),
    "own crops": (KDCL(), (3, 4), {"batches": "own_crops"}, {"schedule": "plateau", "milestones": ()}),
    "held-out weights": (KDCL(mode="general"), (3, 4, 5), {}, {}),
    "adam, cosine, clip, in turn": (
        DeepMutualLearning(),
        (3, 4),
        {"alternate": True},
        {"optimiser": "adam", "schedule": "cosine", "clip": 0.5, "learning_rate": 0.01, "milestones": ()},
    ),
    "leader with attention": (OKDDip(), (8, 8, 8), {"leader": True}, {}),
}


def cut_session(name, *arguments, **options):
    method, widths, peers, recipe = CUT[name]
    networks = [tiny_net(number, width, dropout=0.3) for number, width in enumerate(widths)]
    return run_session(peers_of(networks, method, **peers), make_recipe(epochs=2, **recipe), *arguments, **options)


@pytest.mark.parametrize("name", CUT)
def test_stopped_after_any_step_and_resumed_equals_uninterrupted(name, tmp_path):
    whole = cut_session(name)
    assert not whole.stopped and whole.steps == 6
    for stop in range(1, whole.steps + 1):
        checkpoint = tmp_path / f"{stop}.pt"
        assert cut_session(name, checkpoint, stop_after=stop).stopped
        second = cut_session(name, checkpoint)
        assert second.steps == whole.steps - stop
        expected = whole.outcome if second.momentum else whole.outcome | {"momentum": {}}
        assert difference(second.outcome, expected) is None, f"stopped after step {stop}"


def test_branches_that_are_stopped_go_on_as_they_were(tmp_path):
    def session(*arguments, **options):
        scheme = peers_of(staged_peers(*("wrn_10_0.25",) * 3), OKDDip(), leader=True, shared_stages=2)
        return run_session(scheme, make_recipe(epochs=2, milestones=(1,)), *arguments, **options), scheme

    whole, _ = session()
    for stop in range(1, 7):
        session(tmp_path / f"{stop}.pt", stop_after=stop)
        second, scheme = session(tmp_path / f"{stop}.pt")
        assert difference(second.state, whole.state) is None and second.history == whole.history
        assert scheme.peers[1].stages[0] is scheme.peers[0].stages[0]  # still one


# wrong use


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 1}, "count must be a whole number of at least 2, not 1"),
        ({"count": 2, "leader": True}, "count must be a whole number of at least 3, not 2"),
        ({"count": 2.0}, "count must be a whole number"),
        ({"batches": "own"}, "batches must be one of shared, own_crops, own_images, not 'own'"),
        ({"burn_in": 1.0}, "burn_in must be below 1, not 1.0"),
        ({"burn_in": -0.1}, "burn_in must be a finite number of at least 0"),
        ({"burn_in": math.nan}, "burn_in must be a finite number"),
        ({"exchange_interval": -1}, "exchange_interval must be a whole number of at least 0"),
        ({"exchange_interval": 1.5}, "exchange_interval must be a whole number"),
        ({"shared_stages": -1}, "shared_stages must be a whole number of at least 0"),
        ({"shared_stages": 1, "alternate": True}, "branches with shared stages step at once on shared batches"),
        ({"shared_stages": 1, "batches": "own_crops"}, "branches with shared stages step at once on shared batches"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        PeerOptions(**options)


@pytest.mark.parametrize(
    ("partners", "options"), [((TEACHER, TEACHER), {"count": 4}), ((TEACHER,) * 3, {"count": 3, "leader": True})]
)
def test_a_count_that_contradicts_the_partners_is_refused(partners, options):
    with pytest.raises(ValueError, match=f"count is {options['count']}, but the student and its partners are"):
        assembled(0, partners=partners, **options)


@pytest.mark.parametrize(
    ("names", "shared", "message"),
    [
        ((STUDENT, STUDENT), 3, "branches that share 3 stages need networks with a stem and more stages than that"),
        ((STUDENT, TEACHER), 1, "branches that share 1 stages need networks whose first 1 are alike"),
    ],
)
def test_networks_that_cannot_share_their_stages_are_refused(names, shared, message):
    networks = [network(name, torch.float64) for name in names]
    with pytest.raises(ValueError, match=message):
        Peers(networks, DeepMutualLearning(), batch_of(), PeerOptions(shared_stages=shared))


@pytest.mark.parametrize("place", [0, 1])
def test_a_network_without_stages_cannot_be_a_branch(place):
    networks = [network(STUDENT, torch.float64)]
    networks.insert(place, tiny_net(0))
    with pytest.raises(ValueError, match="need networks with a stem and more stages than that"):
        Peers(networks, DeepMutualLearning(), batch_of(), PeerOptions(shared_stages=1))


def test_peers_that_are_weighed_need_held_out_images():
    scheme = peers_of(tiny_peers(3, 4), KDCL(mode="general"))
    with pytest.raises(ValueError, match="weighed on held-out images: set the data set's `validation` above 0"):
        scheme.begin_epoch(0, 2, None)


def test_a_batch_too_small_for_the_method_is_refused_before_training():
    scheme = peers_of(tiny_peers(8, 8), build_method("correlation"))
    assert scheme.least_batch == build_method("correlation").least_batch


def test_strong_images_are_made_for_methods_that_read_them_only():
    assert peers_of(tiny_peers(3, 3), MultiLevel()).wants_strong
    assert not peers_of(tiny_peers(3, 3), VanillaKD()).wants_strong
