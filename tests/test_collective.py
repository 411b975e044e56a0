"""KDCL and OKDDip: reference values, teachers by hand, and where the gradient of a common target goes."""

import math

import pytest
import torch
import torch.nn.functional as F
from batches import TOLERANCE, batch_a, deterministic, oracles
from hypothesis import given
from hypothesis import strategies as st
from test_methods import STUDENT, TEACHER, batch_of, network
from torch import nn

from kdstudy.collective import KDCL, OKDDip, best_mixture, least_error_weights
from kdstudy.core import Clock, View
from kdstudy.peers import PeerOptions, Peers

NO_ADAPTERS = nn.ModuleDict()
THIRD = [[1.0, 0, 0, 0, 0], [0, 0, 1.0, 0, 0]]
MODES = ("min_logit", "naive", "linear", "general", "mean")
precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def three(dtype=torch.float64):
    first, second, labels = batch_a(dtype)
    return (first, second, View(torch.tensor(THIRD, dtype=dtype))), labels


def random_peers(count, seed=0, batch=8, classes=6, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(count, batch, classes, generator=generator, dtype=torch.float64)
    return tuple(View(each) for each in logits), torch.randint(classes, (batch,), generator=generator)


def kdcl_adapters(method, members, labels):
    adapters = method.adapters(members[0], View(members[0].logits, members=members)).to(members[0].logits.dtype)
    method.weigh(adapters, members, labels)
    return adapters


def common(method, members, labels):
    """KDCL's teacher, whose held-out images are the batch itself."""
    return method.unite(members, labels, kdcl_adapters(method, members, labels))


def close(tensor, expected, dtype=torch.float64):
    return tensor.flatten().tolist() == pytest.approx(torch.tensor(expected).flatten().tolist(), abs=TOLERANCE[dtype])


# KDCL


@precisions
def test_min_logit_is_the_oracle(dtype):
    members, labels = three(dtype)
    teacher = common(KDCL(), members, labels)
    assert teacher.dtype == dtype and close(teacher, oracles()["kdcl_minlogit"], dtype)
    loss = KDCL().loss(members[0], View(teacher), labels, NO_ADAPTERS)
    assert loss.item() == pytest.approx(oracles()["kdcl_minlogit_kd_net0_T2"], abs=TOLERANCE[dtype])


def test_naive_picks_the_best_peer_of_each_sample_or_of_the_batch():
    members, labels = three()
    picks = oracles()["kdcl_naive_idx_per_sample"]
    by_sample = torch.stack([members[pick].logits[row] for row, pick in enumerate(picks)])
    assert torch.equal(common(KDCL(mode="naive"), members, labels), by_sample)
    by_batch = members[oracles()["kdcl_naive_idx_batch"]].logits
    assert torch.equal(common(KDCL(mode="naive", per="batch"), members, labels), by_batch)
    assert not torch.equal(by_sample, by_batch)


@deterministic
@given(st.integers(0, 99), st.integers(2, 5))
def test_naive_by_hand(seed, count):
    members, labels = random_peers(count, seed)
    losses = [[F.cross_entropy(m.logits[b], labels[b]).item() for b in range(8)] for m in members]
    each = [min(range(count), key=lambda i, b=b: losses[i][b]) for b in range(8)]
    expected = torch.stack([members[i].logits[b] for b, i in enumerate(each)])
    assert torch.equal(common(KDCL(mode="naive"), members, labels), expected)
    best = min(range(count), key=lambda i: sum(losses[i]))
    assert torch.equal(common(KDCL(mode="naive", per="batch"), members, labels), members[best].logits)


@precisions
def test_the_best_mixture_of_two_is_the_oracle(dtype):
    members, labels = three(dtype)
    logits = torch.stack([member.logits for member in members[:2]])
    shares = best_mixture(logits, labels)
    assert shares[0].item() == pytest.approx(oracles()["kdcl_linear_nets0_1_alpha0"], abs=TOLERANCE[dtype])
    assert shares.sum().item() == pytest.approx(1)
    teacher = common(KDCL(mode="linear"), members[:2], labels)
    loss = F.cross_entropy(teacher, labels).item()
    assert loss == pytest.approx(oracles()["kdcl_linear_nets0_1_ce"], abs=TOLERANCE[dtype])


def test_the_best_mixture_of_three_comes_close_to_the_optimum():
    members, labels = three()
    loss = F.cross_entropy(common(KDCL(mode="linear"), members, labels), labels).item()
    assert loss == pytest.approx(1.126455, abs=1e-4)
    optimum = sum(a * m.logits for a, m in zip([0.242462, 0.372306, 0.385232], members, strict=True))
    assert F.cross_entropy(optimum, labels).item() == pytest.approx(1.126455, abs=1e-6)


@pytest.mark.parametrize("scale", [3.0, 30.0, 300.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_mixture_of_two_beats_a_grid_at_any_scale(seed, scale):
    members, labels = random_peers(2, seed, batch=32, scale=scale)
    first, second = (member.logits for member in members)
    grid = [F.cross_entropy(a * first + (1 - a) * second, labels).item() for a in torch.linspace(0, 1, 201).tolist()]
    found = F.cross_entropy(common(KDCL(mode="linear"), members, labels), labels).item()
    assert found <= min(grid) + 0.01 * (max(grid) - min(grid))


@precisions
def test_the_measured_weights_are_the_oracles(dtype):
    members, labels = three(dtype)
    adapters = kdcl_adapters(KDCL(mode="general"), members, labels)
    weights = adapters["weights"].value
    assert weights.dtype == dtype and close(weights, oracles()["kdcl_general_w"], dtype)
    expected = sum(w * m.logits for w, m in zip(oracles()["kdcl_general_w"], members, strict=True))
    assert close(KDCL(mode="general").unite(members, labels, adapters), expected.tolist(), dtype)
    assert not list(adapters.parameters()) and adapters.state_dict()


def error_of(weights):
    matrix = torch.tensor(oracles()["kdcl_C"], dtype=torch.float64)
    return (weights @ matrix @ weights).item()


def test_the_measured_weights_have_the_least_error():
    members, labels = three()
    weights = least_error_weights(torch.stack([member.logits for member in members]), labels)
    assert error_of(weights) == pytest.approx(oracles()["kdcl_general_E"], abs=1e-9)
    assert error_of(torch.full((3,), 1 / 3, dtype=torch.float64)) == pytest.approx(oracles()["kdcl_uniform_E"])
    for nudge in ([1e-3, -1e-3, 0.0], [0.0, 1e-3, -1e-3]):
        assert error_of(weights + torch.tensor(nudge)) > error_of(weights)


def test_mixed_probabilities_have_weights_that_are_clipped_and_rescaled():
    members, labels = three()
    method = KDCL(mode="general", combine="probabilities")
    teacher = common(method, members, labels)
    mixed = 0.807451 * members[0].logits.softmax(1) + 0.192549 * members[1].logits.softmax(1)
    torch.testing.assert_close(teacher.softmax(dim=1), mixed, atol=1e-6, rtol=0)
    assert teacher.isfinite().all()


def test_mixed_probabilities_are_softened_as_powers():
    members, labels = three()
    method = KDCL(mode="general", combine="probabilities", temperature=4.0)
    teacher = common(method, members, labels)
    powers = teacher.softmax(dim=1) ** (1 / 4)
    target = powers / powers.sum(dim=1, keepdim=True)
    expected = 16 * F.kl_div((members[2].logits / 4).log_softmax(1), target, reduction="batchmean")
    assert method.loss(members[2], View(teacher), labels, NO_ADAPTERS).item() == pytest.approx(expected.item())


def test_weights_come_from_the_held_out_images_not_from_the_batch():
    members, labels = random_peers(3)
    held_out, their_labels = random_peers(3, seed=1, batch=20)
    method = KDCL(mode="general")
    adapters = kdcl_adapters(method, held_out, their_labels)
    expected = kdcl_adapters(method, held_out, their_labels)["weights"].value.clone()
    mixed = method.unite(members, labels, adapters)
    assert torch.equal(adapters["weights"].value, expected)
    torch.testing.assert_close(mixed, sum(w * m.logits for w, m in zip(expected, members, strict=True)))
    assert not torch.allclose(mixed, common(method, members, labels))


def test_equal_peers_have_equal_weights_and_others_no_ridge():
    member, labels = random_peers(1)
    twins = least_error_weights(member[0].logits.expand(3, -1, -1), labels)
    torch.testing.assert_close(twins, torch.full_like(twins, 1 / 3))
    perfect = 800 * F.one_hot(labels, 6).double().expand(2, -1, -1)
    torch.testing.assert_close(least_error_weights(perfect, labels), torch.full((2,), 0.5, dtype=torch.float64))


def test_the_mean_is_that_of_logits():
    members, labels = three()
    expected = sum(member.logits for member in members) / 3
    torch.testing.assert_close(common(KDCL(mode="mean"), members, labels), expected)


@pytest.mark.parametrize("mode", MODES)
def test_only_general_needs_held_out_images(mode):
    assert KDCL(mode=mode).needs_held_out() == (mode == "general")
    members, labels = three()
    assert ("weights" in kdcl_adapters(KDCL(mode=mode), members, labels)) == (mode == "general")


def test_unmeasured_weights_cannot_pass_for_a_result():
    members, labels = three()
    method = KDCL(mode="general")
    adapters = method.adapters(members[0], View(members[0].logits, members=members)).double()
    assert method.unite(members, labels, adapters).isnan().all()


@pytest.mark.parametrize("mode", MODES)
def test_the_common_teacher_passes_no_gradient_on(mode):
    members, labels = random_peers(3)
    adapters = kdcl_adapters(KDCL(mode=mode), members, labels)
    for member in members:
        member.logits.requires_grad_()
    assert not KDCL(mode=mode).unite(members, labels, adapters).requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_peers_does_not_matter(mode):
    members, labels = random_peers(3)
    torch.testing.assert_close(
        common(KDCL(mode=mode), members, labels), common(KDCL(mode=mode), tuple(reversed(members)), labels)
    )


def test_min_logit_is_blind_to_a_shift_of_a_peers_logits():
    members, labels = random_peers(3)
    moved = (View(members[0].logits + 7), members[1], View(members[2].logits - 3))
    teacher = common(KDCL(), moved, labels)
    torch.testing.assert_close(teacher, common(KDCL(), members, labels))
    assert not teacher.gather(1, labels.unsqueeze(1)).any()
    kind = {len({mode_.flatten()[0].item() for mode_ in (common(KDCL(mode=m), members, labels) for m in MODES)})}
    assert kind == {5}  # five teachers, none an alias of another


@pytest.mark.parametrize("mode", MODES)
def test_kdcl_is_finite_for_logits_hundreds_apart(mode):
    members, labels = random_peers(3, scale=600.0)
    members = tuple(View(member.logits.float()) for member in members)
    for combine in ("logits", "probabilities"):
        method = KDCL(mode=mode, combine=combine)
        student = View(members[0].logits.clone().requires_grad_())
        loss = method.loss(student, View(common(method, members, labels)), labels, NO_ADAPTERS)
        loss.backward()
        assert loss.isfinite() and student.logits.grad.isfinite().all()


@pytest.mark.parametrize("per", ["sample", "batch"])
@pytest.mark.parametrize("mode", MODES)
def test_no_value_decides_what_kdcl_runs(mode, per):
    method = KDCL(mode=mode, per=per)
    members = tuple(View(logits) for logits in torch.empty(3, 8, 10, device="meta"))
    labels = torch.empty(8, dtype=torch.long, device="meta")
    adapters = method.adapters(members[0], View(members[0].logits, members=members)).to("meta")
    teacher = View(method.unite(members, labels, adapters))
    assert method.loss(members[0], teacher, labels, adapters).shape == ()


# OKDDip: by hand


EMBEDDINGS = ([[1.0, 0], [0, 1]], [[0.0, 1], [1, 1]])  # the embeddings of two peers, (2, 2, 2)


def pair(dtype=torch.float64):
    """Two peers with embeddings, their labels, and projections that change nothing."""
    first, second, labels = batch_a(dtype)
    members = tuple(
        view._replace(embedding=torch.tensor(h, dtype=dtype))
        for view, h in zip((first, second), EMBEDDINGS, strict=True)
    )
    links = {name: nn.Linear(2, 2, bias=False).to(dtype) for name in ("query", "key")}
    for link in links.values():
        nn.init.eye_(link.weight)
    return members, labels, nn.ModuleDict(links)


def taught(method, members, labels, adapters, place):
    answer = method.unite(members, labels, adapters)
    return View(answer, members=tuple(m.detach() for m in members), place=place)


@precisions
def test_attention_is_the_oracles_sample_by_sample(dtype):
    members, labels, adapters = pair(dtype)
    for place, student in enumerate(members):
        teacher = taught(OKDDip(), members, labels, adapters, place)
        alpha = OKDDip().attention(student, teacher, adapters).exp().T
        for sample in range(2):
            assert close(alpha[sample], oracles()["okddip_att"][sample][place], dtype)


@precisions
@pytest.mark.parametrize(("form", "key"), [("probabilities", "okddip_dis1_prob"), ("logits", "okddip_dis1_logit")])
def test_the_peers_losses_are_the_oracles(form, key, dtype):
    members, labels, adapters = pair(dtype)
    method = OKDDip(form=form)
    for place, student in enumerate(members):
        loss = method.loss(student, taught(method, members, labels, adapters, place), labels, adapters)
        assert loss.dtype == dtype and loss.shape == ()
        assert loss.item() == pytest.approx(oracles()[key][place], abs=TOLERANCE[dtype])


@precisions
@pytest.mark.parametrize(("form", "key"), [("probabilities", "okddip_dis2_prob"), ("logits", "okddip_dis2_logit")])
def test_the_leaders_loss_is_the_oracle(form, key, dtype):
    members, labels, adapters = pair(dtype)
    method = OKDDip(form=form)
    leader = View(torch.tensor(THIRD, dtype=dtype), embedding=torch.ones(2, 5, dtype=dtype))  # of any width
    loss = method.loss(leader, taught(method, members, labels, adapters, None), labels, adapters)
    assert loss.item() == pytest.approx(oracles()[key], abs=TOLERANCE[dtype])


@pytest.mark.parametrize("epoch", [0, 40, 80])
def test_the_ramp_is_the_oracle(epoch):
    clock = Clock().double()
    clock.set(epoch, 300)
    expected = dict(zip([0, 40, 80], oracles()["okddip_ramp_e0_40_80"], strict=True))[epoch]
    assert OKDDip().ramped(clock).item() == pytest.approx(expected, abs=1e-6)


def test_the_ramp_scales_both_targets_but_not_the_labels_and_then_stays():
    members, labels, adapters = pair()
    adapters["clock"] = Clock().double()
    for place in (0, None):
        teacher = taught(OKDDip(), members, labels, adapters, place)
        terms = []
        for epoch in (0, 80, 299):
            adapters["clock"].set(epoch, 300)
            terms.append(OKDDip().objective(members[0], teacher, labels, adapters))
        assert terms[0]["kd"].item() == pytest.approx(math.exp(-5) * terms[1]["kd"].item())
        assert terms[1]["kd"].item() == pytest.approx(terms[2]["kd"].item())
        assert len({each["ce"].item() for each in terms}) == 1
    adapters["clock"].set(0, 300)
    assert OKDDip(ramp=0.0).ramped(adapters["clock"]).item() == 1


def random_okddip(seed=0, count=3, width=16):
    members, labels = random_peers(count, seed)
    torch.manual_seed(seed)
    members = tuple(m._replace(embedding=torch.randn(8, width, dtype=torch.float64)) for m in members)
    adapters = OKDDip().adapters(members[0], View(members[0].logits, members=members)).double()
    del adapters["clock"]
    return members, labels, adapters


@pytest.mark.parametrize("form", ["probabilities", "logits"])
def test_the_targets_by_hand(form):
    members, labels, adapters = random_okddip()
    method, rows = OKDDip(form=form), []
    w_l, w_e = adapters["query"].weight, adapters["key"].weight
    for b in range(8):
        scores = [((w_l @ members[1].embedding[b]) @ (w_e @ other.embedding[b])).item() for other in members]
        alpha = [math.exp(s) / sum(math.exp(t) for t in scores) for s in scores]
        if form == "logits":
            target = sum(a * m.logits[b] for a, m in zip(alpha, members, strict=True)).div(3).softmax(0)
        else:
            target = sum(a * m.logits[b].div(3).softmax(0) for a, m in zip(alpha, members, strict=True))
        rows.append(9 * (target * (target.log() - members[1].logits[b].div(3).log_softmax(0))).sum())
    loss = method.loss(members[1], taught(method, members, labels, adapters, 1), labels, adapters)
    assert loss.item() == pytest.approx(torch.stack(rows).mean().item())


@pytest.mark.parametrize("form", ["probabilities", "logits"])
def test_the_gradient_reaches_both_projections_and_the_peers_own_query_and_key(form):
    members, labels, adapters = random_okddip()
    method = OKDDip(form=form)
    teacher = taught(method, members, labels, adapters, 1)

    def loss(logits, embedding, w_l, w_e):
        keys = torch.stack([members[0].embedding, embedding, members[2].embedding])
        scores = torch.einsum("bd,mbd->bm", embedding @ w_l.T, keys @ w_e.T).softmax(dim=1)
        answers = torch.stack([m.logits.detach() for m in members], dim=1)
        if form == "logits":
            target = torch.einsum("bm,bmc->bc", scores, answers).div(3).softmax(dim=1)
        else:
            target = torch.einsum("bm,bmc->bc", scores, answers.div(3).softmax(dim=2))
        return 9 * F.kl_div(logits.div(3).log_softmax(dim=1), target, reduction="none").sum(dim=1).mean()

    student = View(members[1].logits.clone().requires_grad_(), embedding=members[1].embedding.clone().requires_grad_())
    method.loss(student, teacher, labels, adapters).backward()
    inputs = [student.logits, student.embedding, adapters["query"].weight, adapters["key"].weight]
    expected = torch.autograd.grad(loss(*inputs), inputs)
    for one, other in zip(inputs, expected, strict=True):
        assert other.any()
        torch.testing.assert_close(one.grad, other)


def test_the_leader_trains_no_projection():
    members, labels, adapters = random_okddip()
    leader = View(torch.zeros(8, 6, dtype=torch.float64).requires_grad_(), embedding=members[0].embedding)
    OKDDip().loss(leader, taught(OKDDip(), members, labels, adapters, None), labels, adapters).backward()
    assert leader.logits.grad.any() and all(p.grad is None for p in adapters.parameters())


def test_attention_follows_its_own_place():
    members, labels, adapters = random_okddip()
    found = [
        OKDDip().loss(members[place], taught(OKDDip(), members, labels, adapters, place), labels, adapters).item()
        for place in range(3)
    ]
    order = (2, 0, 1)
    moved = tuple(members[number] for number in order)
    for place, number in enumerate(order):
        loss = OKDDip().loss(moved[place], taught(OKDDip(), moved, labels, adapters, place), labels, adapters)
        assert loss.item() == pytest.approx(found[number])


@pytest.mark.parametrize("form", ["probabilities", "logits"])
def test_okddip_is_finite_for_logits_hundreds_apart(form):
    members, labels, adapters = random_okddip()
    far = tuple(View(300 * m.logits.float(), embedding=30 * m.embedding.float()) for m in members)
    adapters, method = adapters.float(), OKDDip(form=form)
    student = far[1].map(lambda x: x.clone().requires_grad_())
    loss = method.loss(student, taught(method, far, labels, adapters, 1), labels, adapters)
    loss.backward()
    reached = [student.logits, student.embedding, *adapters.parameters()]
    assert loss.isfinite() and all(each.grad.isfinite().all() for each in reached)


@pytest.mark.parametrize("form", ["probabilities", "logits"])
def test_no_value_decides_what_okddip_runs(form):
    method = OKDDip(form=form)
    members = tuple(
        View(torch.empty(8, 10, device="meta"), embedding=torch.empty(8, 16, device="meta")) for _ in range(3)
    )
    labels = torch.empty(8, dtype=torch.long, device="meta")
    adapters = method.adapters(members[0], View(members[0].logits, members=members)).to("meta")
    assert method.loss(members[1], taught(method, members, labels, adapters, 1), labels, adapters).shape == ()


# OKDDip: between networks


def team():
    torch.manual_seed(0)
    networks = [network("wrn_10_0.5", torch.float64) for _ in range(4)]
    return Peers(networks, OKDDip(), batch_of(), PeerOptions(count=4, leader=True))


def test_a_peers_terms_reach_that_peer_and_the_projections_alone():
    scheme = team()
    (phase,) = scheme.phases()
    (turn,) = scheme.turns(phase)
    scheme.set_modes(phase)
    for number, peer in enumerate(scheme.peers):
        scheme.zero_grad(set_to_none=True)
        scheme.losses(phase, turn, batch_of(), None).terms[f"peer{number}_kd"].backward()
        assert all(parameter.grad.any() for parameter in peer.parameters())
        others = [other for other in scheme.peers if other is not peer]
        assert all(parameter.grad is None for other in others for parameter in other.parameters())
        reached = [parameter.grad is not None for parameter in scheme.adapters.parameters()]
        assert reached == [number > 0] * 2  # the first one leads


def test_projections_have_an_eighth_of_the_width_and_no_bias():
    shapes = {name: tuple(p.shape) for name, p in team().adapters.named_parameters()}
    assert shapes == {"query.weight": (4, 32), "key.weight": (4, 32)}


def test_the_leader_is_no_part_of_what_peers_attend_to():
    scheme = team()
    (phase,) = scheme.phases()
    (turn,) = scheme.turns(phase)
    scheme.set_modes(phase)
    before = scheme.losses(phase, turn, batch_of(), None).terms
    nn.init.normal_(scheme.peers[0].classifier.weight, std=9)
    after = scheme.losses(phase, turn, batch_of(), None).terms
    assert before["peer0_kd"].item() != after["peer0_kd"].item()
    assert all(before[f"peer{n}_kd"].item() == after[f"peer{n}_kd"].item() for n in (1, 2, 3))


def test_peers_that_count_themselves_follow_one_teacher():
    torch.manual_seed(0)
    networks = [network(name, torch.float64) for name in (STUDENT, TEACHER)]
    scheme = Peers(networks, KDCL(mode="naive"), batch_of(), PeerOptions())
    (phase,) = scheme.phases()
    (turn,) = scheme.turns(phase)
    scheme.set_modes(phase)
    terms = scheme.losses(phase, turn, batch_of(), None).terms
    with torch.no_grad():
        logits = [peer(batch_of().images).logits for peer in scheme.peers]
    labels = batch_of().labels
    losses = torch.stack([F.cross_entropy(z, labels, reduction="none") for z in logits])
    teacher = torch.where((losses[0] <= losses[1]).unsqueeze(1), *logits)
    for number, z in enumerate(logits):
        expected = 4 * F.kl_div((z / 2).log_softmax(1), (teacher / 2).softmax(1), reduction="batchmean")
        assert terms[f"peer{number}_kd"].item() == pytest.approx(expected.item())


# wrong use


@pytest.mark.parametrize("method", [KDCL(), KDCL(mode="general"), OKDDip()], ids=str)
def test_a_teacher_that_is_not_made_of_peers_is_refused(method):
    first, second, _ = batch_a()
    with pytest.raises(ValueError, match="needs peers that teach as one, and the teacher has no members"):
        method.adapters(first, second)


@pytest.mark.parametrize("widths", [(16, 32), (4, 4)])
def test_embeddings_that_no_shared_projection_fits_are_refused(widths):
    members = tuple(View(torch.zeros(2, 5), embedding=torch.zeros(2, width)) for width in widths)
    with pytest.raises(ValueError, match="embeddings of one width of 8 or more"):
        OKDDip().adapters(members[0], View(members[0].logits, members=members))


@pytest.mark.parametrize("method", [KDCL, OKDDip])
@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, "4", True])
def test_a_bad_temperature_is_named(method, value):
    with pytest.raises(ValueError, match=rf"temperature must be .* not {value!r}"):
        method(temperature=value)


@pytest.mark.parametrize(
    ("kind", "field", "value", "allowed"),
    [
        (KDCL, "mode", "best", "min_logit, naive, linear, general, mean"),
        (KDCL, "per", "epoch", "sample, batch"),
        (KDCL, "combine", "losses", "logits, probabilities"),
        (OKDDip, "form", "losses", "probabilities, logits"),
        (OKDDip, "ramp", 1.5, "at most 1"),
    ],
)
def test_a_bad_choice_is_named_with_what_is_allowed(kind, field, value, allowed):
    with pytest.raises(ValueError) as error:
        kind(**{field: value})
    assert field in str(error.value) and repr(value) in str(error.value) and allowed in str(error.value)
