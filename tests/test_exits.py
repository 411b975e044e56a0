"""Methods on auxiliary classifiers: reference values, runs, and the defects of other code that they must not have."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from batches import LABELS_A, TOLERANCE, batch_a, oracles, random_logits
from test_methods import batch_of, network, toy_bank, trained_network
from torch import Tensor, nn
from toy import clone, difference

from kdstudy import exits
from kdstudy.core import Clock, Method, View
from kdstudy.edits import relative_v2
from kdstudy.evaluate import logits_of
from kdstudy.exits import TOFD, HeadTraining, RelativeHeads, distance_from_orthogonal, edit_rates
from kdstudy.heads import Exit
from kdstudy.models import count_parameters
from kdstudy.recipe import Recipe
from kdstudy.schemes import Offline
from kdstudy.stopping import Stopped
from kdstudy.train import Surroundings, Training

STUDENT, TEACHER = "wrn_10_0.25", "wrn_10_0.5"
HEADS_T = (
    [[1.4, 0.6, 0.1, -0.2, -0.3], [0.3, 0.2, 0.9, -0.15, 1.6]],
    [[2.5, 1.2, 0.35, -0.3, -0.9], [0.7, 1.1, 2.7, -0.6, 0.2]],
)
HEADS_S = (
    [[0.2, 0.1, 0.0, -0.1, 0.3], [0.0, 0.1, 0.4, -0.2, 0.1]],
    [[0.5, 0.2, -0.1, 0.3, 0.0], [0.4, -0.2, 0.6, 0.1, -0.5]],
)
ARMS = {"control": "none", "v2": "relative_v2", "v4": "relative_v4"}
precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
arms = pytest.mark.parametrize("arm", ARMS)


class Given(nn.Module):
    """A head whose answer is known: rows of its map, and an embedding beside it."""

    def forward(self, stage_map: Tensor) -> View:
        return View(stage_map, embedding=stage_map)


def given_heads(count: int = 2) -> nn.ModuleDict:
    return nn.ModuleDict({"heads": nn.ModuleList(Given() for _ in range(count))})


def batch_of_heads(dtype: torch.dtype = torch.float64) -> tuple[View, View, Tensor]:
    """Batch A with two heads on either side; the student's `maps` are what `Given` heads answer."""
    student, teacher, labels = batch_a(dtype)
    maps = tuple(torch.tensor(logits, dtype=dtype) for logits in HEADS_S)
    early = tuple(View(torch.tensor(logits, dtype=dtype)) for logits in HEADS_T)
    return student._replace(maps=(*maps, torch.zeros(0))), teacher._replace(exits=early), labels


def make_scheme(
    method: Method, *, student: str = STUDENT, teacher: str, seed: int = 0, prepare: bool = True
) -> Offline:
    """Small networks on 8 x 8 grey images of 4 classes."""
    torch.manual_seed(seed)
    networks = network(student, torch.float64), trained_network(teacher, torch.float64)
    scheme = Offline(*networks, method, batch_of(16))
    if prepare:
        scheme.prepare(lambda: [batch_of(32).images])
    return scheme


def scheme_of(method: Method, **options) -> Offline:
    """The method on the networks it is meant for."""
    if isinstance(method, HeadTraining):
        return make_scheme(method, student=f"{TEACHER}+heads", teacher=TEACHER, **options)
    suffix = "sepheads" if isinstance(method, TOFD) else "heads"
    return make_scheme(method, teacher=f"{TEACHER}+{suffix}", **options)


def make_training(scheme: Offline, epochs: int = 3, **surroundings) -> Training:
    """A run whose batches of 16 leave a last one of 2."""
    recipe = Recipe(epochs=epochs, batch=16, learning_rate=0.05, crop_padding=1, precision="fp64")
    bank = toy_bank(50)
    return Training(scheme, recipe, bank, seed=4, watch={"train": bank}, surroundings=Surroundings(**surroundings))


METHODS = [HeadTraining(), TOFD(), *(RelativeHeads(edit=edit) for edit in ARMS.values())]
every_method = pytest.mark.parametrize("method", METHODS, ids=repr)


def teacher_of(scheme: Offline) -> nn.Module:
    (teacher,) = scheme._teacher
    return teacher


# --- all of them ---


@every_method
def test_the_teacher_is_never_in_train_mode_and_no_tensor_of_it_changes(method):
    # anchored in two public code bases that run the teacher's batch norms in train mode
    scheme = scheme_of(method)
    teacher = teacher_of(scheme)
    before, modes = clone(teacher.state_dict()), set()
    for module in teacher.modules():
        module.register_forward_pre_hook(lambda module, arguments: modes.add(module.training))
    make_training(scheme).run()
    assert modes == {False}
    assert difference(before, clone(teacher.state_dict())) is None


@every_method
def test_the_optimiser_lives_through_a_phase_with_the_recipes_decay(method):
    seen = []

    def note(done: float, text: str) -> None:
        (optimiser,) = training.current.optimisers.values()
        seen.append((optimiser, *(group["weight_decay"] for group in optimiser.param_groups)))

    training = make_training(scheme_of(method), epochs=7, on_step=note)  # of which the heads' phase has two
    training.run()
    assert len(seen) >= 2 * 4 and set(seen) == {(seen[0][0], 5e-4)}


@every_method
def test_an_interrupted_run_goes_on_exactly(method, tmp_path):
    whole, first = scheme_of(method), scheme_of(method)
    history = make_training(whole, epochs=7).run()
    steps = []
    training = make_training(
        first,
        epochs=7,
        checkpoint=tmp_path / "run.pt",
        on_step=lambda done, text: steps.append(text),
        should_stop=lambda: len(steps) == 6,
    )
    with pytest.raises(Stopped):
        training.run()
    second = scheme_of(method, seed=9, prepare=False)
    second._teacher = first._teacher
    assert difference(history, make_training(second, epochs=7, checkpoint=tmp_path / "run.pt").run()) is None
    assert difference(clone(whole.state_dict()), clone(second.state_dict())) is None


@pytest.mark.parametrize("method", METHODS[1:], ids=repr)
def test_heads_leave_the_student_as_it_would_be_without_them(method):
    scheme = scheme_of(method)
    make_training(scheme).run()
    plain = network(STUDENT, torch.float64)
    plain.load_state_dict(scheme.deployed.state_dict())  # nothing but the plain network's tensors is deployed
    assert count_parameters(scheme.deployed) == count_parameters(plain)
    bank = toy_bank(10)
    before = logits_of(scheme.deployed, bank)
    scheme.adapters = nn.ModuleDict()
    for other in (scheme.deployed, plain):
        assert torch.equal(logits_of(other, bank), before)


@pytest.mark.parametrize("method", METHODS[1:], ids=repr)
def test_a_teacher_whose_heads_do_not_pair_is_refused(method):
    kind = "sepheads" if isinstance(method, TOFD) else "heads"
    for teacher, found in ((TEACHER, 0), (f"resnet18+{kind}", 3)):
        with pytest.raises(ValueError, match=rf"teacher must have 2, not {found}: .* like wrn_40_2\+{kind}"):
            make_scheme(method, teacher=teacher)


@pytest.mark.parametrize(("method", "kind"), [(TOFD(), "sepheads"), (RelativeHeads(), "heads")], ids=str)
def test_the_students_heads_are_those_of_a_network_with_such_heads(method, kind):
    heads, expected = scheme_of(method).adapters["heads"], network(f"{STUDENT}+{kind}", torch.float64).heads
    shapes = [{name: tensor.shape for name, tensor in each.state_dict().items()} for each in (heads, expected)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("method", METHODS[1:], ids=repr)
def test_a_student_with_heads_of_its_own_is_refused(method):
    with pytest.raises(ValueError, match="student must be a network without heads"):
        make_scheme(method, student=f"{STUDENT}+heads", teacher=f"{TEACHER}+heads")


@pytest.mark.parametrize(
    ("method", "field", "value", "message"),
    [
        (HeadTraining, "kd_weight", 0.5, "kd_weight must be 0, not 0.5: heads are trained on the labels alone"),
        (TOFD, "temperature", 0.0, "temperature must be a finite number above 0, not 0.0"),
        (TOFD, "feature_weight", -1.0, "feature_weight must be a finite number of at least 0, not -1.0"),
        (TOFD, "orthogonal_weight", math.nan, "orthogonal_weight must be a finite number of at least 0, not nan"),
        (RelativeHeads, "temperature", -2.0, "temperature must be a finite number above 0, not -2.0"),
        (RelativeHeads, "head_ce_weight", -0.1, "head_ce_weight must be a finite number of at least 0, not -0.1"),
        (RelativeHeads, "head_kd_weight", math.inf, "head_kd_weight must be a finite number of at least 0, not inf"),
        (RelativeHeads, "edit", "v2", "edit must be one of none, relative_v2, relative_v4, not 'v2'"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(method, field, value, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        method(**{field: value})


def test_heads_that_would_not_be_trained_are_refused():
    with pytest.raises(ValueError, match="both 0: without heads the method is kd"):
        RelativeHeads(head_ce_weight=0.0, head_kd_weight=0.0)


# --- training of heads ---


def test_training_heads_changes_no_bit_of_the_backbone():
    scheme = scheme_of(HeadTraining())
    before = clone(scheme.student.heads.state_dict())
    make_training(scheme, epochs=10).run()
    backbone, teacher = (clone(module.state_dict()) for module in (scheme.student.backbone, teacher_of(scheme)))
    assert difference(backbone, teacher) is None
    after = clone(scheme.student.heads.state_dict())
    constant = [name for name in before if torch.equal(before[name], after[name])]
    assert constant == []


def test_the_backbone_is_a_copy_and_costs_no_gradient():
    scheme = scheme_of(HeadTraining())
    ours = {tensor.data_ptr() for tensor in scheme.student.state_dict().values()}
    assert not ours & {tensor.data_ptr() for tensor in teacher_of(scheme).state_dict().values()}
    (phase,) = scheme.phases()
    sum(scheme.losses(phase, scheme.turns(phase)[0], batch_of(), None).terms.values()).backward()
    assert all(p.grad is None for p in scheme.student.backbone.parameters())


def test_heads_are_trained_by_the_sum_of_their_cross_entropies_and_independently():
    scheme = scheme_of(HeadTraining(ce_weight=2.0))
    batch, (phase,) = batch_of(), scheme.phases()
    scheme.set_modes(phase)
    terms = scheme.losses(phase, scheme.turns(phase)[0], batch, None).terms
    assert list(terms) == ["head1_ce", "head2_ce"]
    scheme.set_modes(phase)
    for term, view in zip(terms.values(), scheme.student(batch.images).exits, strict=True):
        chosen = [-row.log_softmax(0)[label] for row, label in zip(view.logits, batch.labels, strict=True)]
        torch.testing.assert_close(term, 2 * sum(chosen) / len(chosen))
    terms["head1_ce"].backward()
    first, second = ([p.grad is not None for p in head.parameters()] for head in scheme.student.heads)
    assert all(first) and not any(second)


def test_heads_learn_what_the_backbone_shows():
    scheme, bank = scheme_of(HeadTraining()), toy_bank(50)
    history = make_training(scheme, epochs=60).run()
    assert history[-1]["head2_ce"] < 0.5 * history[0]["head2_ce"]
    for number in (0, 1):
        predicted = logits_of(Exit(scheme.deployed, number), bank).argmax(dim=1)
        assert (predicted == bank.labels).double().mean() > 0.5  # on an untrained backbone; chance is 0.25
    assert torch.equal(logits_of(scheme.deployed, bank), logits_of(teacher_of(scheme), bank))


def test_heads_train_for_three_tenths_of_the_schedule():
    (phase,) = HeadTraining().phases()
    recipe = Recipe(epochs=200, batch=128, learning_rate=0.1, milestones=(60, 120, 160)).for_phase(phase)
    assert (recipe.epochs, recipe.milestones, recipe.factor) == (60, (18, 36, 48), 0.2)
    assert phase.trains == ("student.heads",)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [(TEACHER, TEACHER), (f"{STUDENT}+heads", TEACHER), (f"{TEACHER}+heads", f"{TEACHER}+heads")],
)
def test_heads_are_trained_on_the_teachers_own_network_only(student, teacher):
    with pytest.raises(ValueError, match=r"teacher's own network with heads: wrn_40_2\+heads for wrn_40_2"):
        make_scheme(HeadTraining(), student=student, teacher=teacher)


# --- relative distillation on heads ---


@precisions
@arms
@pytest.mark.parametrize("final", [False, True])
def test_relative_heads_are_the_oracles(arm, final, dtype):
    method, reference = RelativeHeads(edit=ARMS[arm], edit_final=final), oracles()
    student, teacher, labels = batch_of_heads(dtype)
    terms = method.objective(student, teacher, labels, given_heads())
    assert list(terms) == ["ce", "kd", "head1_ce", "head1_kd", "head2_ce", "head2_kd"]
    near = partial(pytest.approx, abs=TOLERANCE[dtype])
    for number in (1, 2):
        assert terms[f"head{number}_ce"].item() / 0.3 == near(reference[f"g_relheads_ce_h{number}"])
        assert terms[f"head{number}_kd"].item() / 0.7 == near(reference[f"g_relheads_{arm}_kd_h{number}"])
    expected = reference[f"g_relheads_{arm}_total_{'edited' if final else 'plain'}final"]
    total = sum(terms.values())
    assert total.dtype == dtype and total.item() == near(expected)


@arms
@pytest.mark.parametrize("number", [1, 2])
def test_targets_of_heads_are_the_oracles(arm, number):
    logits = torch.tensor(HEADS_T[number - 1], dtype=torch.float64)
    target = RelativeHeads(edit=ARMS[arm]).target(logits, torch.tensor(LABELS_A))
    expected = torch.tensor(oracles()[f"g_relheads_{arm}_h{number}_target"], dtype=torch.float64)
    torch.testing.assert_close(target, expected)


def test_weights_and_temperature_act_on_their_own_terms():
    weights = {"ce_weight": 2.0, "kd_weight": 3.0, "head_ce_weight": 5.0, "head_kd_weight": 7.0}
    terms = RelativeHeads(**weights, temperature=3.0).objective(*batch_of_heads(), given_heads())
    student, teacher, labels = batch_of_heads()
    pairs = {"": (student.logits, teacher.logits, teacher.logits)}
    for number, early in enumerate(teacher.exits, start=1):
        pairs[f"head{number}_"] = student.maps[number - 1], early.logits, relative_v2(early.logits, labels)
    for prefix, (z_s, _, target) in pairs.items():
        ce, kd = (weights["head_" * bool(prefix) + name] for name in ("ce_weight", "kd_weight"))
        assert terms[f"{prefix}ce"].item() == pytest.approx(ce * F.nll_loss(z_s.log_softmax(1), labels).item())
        kl = F.kl_div((z_s / 3).log_softmax(1), (target / 3).softmax(1), reduction="sum") / len(labels)
        assert terms[f"{prefix}kd"].item() == pytest.approx(kd * 9 * kl.item())


def test_terms_without_weight_are_left_out():
    arguments = (*batch_of_heads(), given_heads())
    assert list(RelativeHeads(head_kd_weight=0.0).objective(*arguments)) == ["ce", "kd", "head1_ce", "head2_ce"]
    unlabelled = RelativeHeads(head_ce_weight=0.0, ce_weight=0.0)
    assert list(unlabelled.objective(*arguments)) == ["kd", "head1_kd", "head2_kd"]


@pytest.mark.parametrize("edit", ["relative_v2", "relative_v4"])
@pytest.mark.parametrize("final", [False, True])
def test_without_an_edit_the_run_is_the_controls_bit_for_bit(edit, final, monkeypatch):
    def outcome(method: Method) -> dict:
        scheme = scheme_of(method)
        return {"history": make_training(scheme).run(), "state": clone(scheme.state_dict())}

    control = outcome(RelativeHeads(edit="none"))
    assert difference(control, outcome(RelativeHeads(edit=edit, edit_final=final))) is not None
    monkeypatch.setitem(exits.EDITS, edit, lambda logits, labels: logits.clone())
    assert difference(control, outcome(RelativeHeads(edit=edit, edit_final=final))) is None


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("term", ["ce", "kd"])
def test_a_heads_term_moves_no_stage_behind_its_tap(number, term):
    scheme = scheme_of(RelativeHeads())
    (phase,) = scheme.phases()
    scheme.set_modes(phase)
    terms = scheme.losses(phase, scheme.turns(phase)[0], batch_of(), None).terms
    terms[f"head{number}_{term}"].backward()
    reached = [any(p.grad is not None and p.grad.any() for p in stage.parameters()) for stage in scheme.student.stages]
    assert reached == [True] * number + [False] * (3 - number)
    assert scheme.student.classifier.weight.grad is None
    others = [head for index, head in enumerate(scheme.adapters["heads"], start=1) if index != number]
    assert all(p.grad is None for head in others for p in head.parameters())


def test_right_and_wrong_are_judged_by_the_heads_own_prediction():
    labels = torch.tensor([0, 0])
    right, wrong = (
        torch.tensor([[3.0, 1.0, -0.5], [3.0, 1.0, -0.5]]),
        torch.tensor([[0.5, 2.0, -1.0], [0.5, 2.0, -1.0]]),
    )
    student = View(torch.zeros(2, 3), maps=(torch.zeros(2, 3), torch.zeros(0)))
    for final, early in ((right, wrong), (wrong, right)):
        terms = RelativeHeads().objective(student, View(final, exits=(View(early),)), labels, given_heads(1))
        # against a uniform student the term is log C less the target's entropy
        target = (relative_v2(early, labels) / 2).softmax(dim=1)
        expected = 0.7 * 4 * (math.log(3) + (target * target.log()).sum(dim=1).mean())
        assert terms["head1_kd"].item() == pytest.approx(expected.item())


def literal_rates(edit: str, logits: Tensor, labels: Tensor) -> tuple[float, float, float]:
    raised = lowered = unchanged = 0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        highest = max(range(len(row)), key=row.__getitem__)
        if edit == "relative_v2" and highest != label:
            raised += 1
            continue
        lowered += 1
        smallest = min(value for index, value in enumerate(row) if index != highest)
        unchanged += row[highest] - abs(smallest) < sorted(row)[-2]
    return raised / len(labels), lowered / len(labels), unchanged / lowered


@pytest.mark.parametrize("edit", ["relative_v2", "relative_v4"])
def test_edit_rates_are_counted_one_by_one(edit):
    early, labels = [], random_logits(200, 6)[2]
    for seed, scale in enumerate((0.5, 2.0)):
        early.append(View(random_logits(200, 6, scale, seed)[1]))
    rates = edit_rates(edit, early, labels)
    assert rates == [pytest.approx(literal_rates(edit, view.logits, labels)) for view in early]
    assert all(0 < rate.unchanged < 1 for rate in rates)


def test_edit_rates_of_the_hand_sized_heads():
    _, teacher, labels = batch_of_heads()
    # row 0 is right and lowered by |-0.3| or |-0.9| at least, row 1 is wrong
    assert edit_rates("relative_v2", teacher.exits, labels) == [(0.5, 0.5, 0.0)] * 2
    assert edit_rates("relative_v4", teacher.exits, labels) == [(0.0, 1.0, 0.0)] * 2
    assert math.isnan(edit_rates("relative_v2", teacher.exits, torch.tensor([1, 1]))[0].unchanged)


def test_edit_rates_of_a_control_are_refused():
    with pytest.raises(ValueError, match="edit must be one of relative_v2, relative_v4, not 'none'"):
        edit_rates("none", (), torch.tensor([0]))


# --- task-oriented features ---


def linked(*weights: Tensor, clock: tuple[int, int] | None = None) -> nn.ModuleDict:
    """Adapters with `Given` heads, these projections, and a clock if it is set."""
    adapters = given_heads(len(weights) - 1)
    links = [nn.Linear(*weight.T.shape, bias=False, dtype=weight.dtype) for weight in weights]
    for link, weight in zip(links, weights, strict=True):
        link.weight.data.copy_(weight)
    adapters["links"] = nn.ModuleList(links)
    if clock:
        adapters["clock"] = Clock()
        adapters["clock"].set(*clock)
    return adapters


def random_views(batch: int = 5, heads: int = 2, seed: int = 0) -> tuple[View, View, Tensor]:
    """A student of 4 and a teacher of 6 numbers per embedding, and 4 classes; `Given` heads repeat the maps."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    maps = tuple(draw(batch, 4) for _ in range(heads))
    student = View(draw(batch, 4), maps=(*maps, torch.zeros(0)), embedding=draw(batch, 4))
    early = tuple(View(draw(batch, 4), embedding=draw(batch, 6)) for _ in range(heads))
    teacher = View(draw(batch, 4), embedding=draw(batch, 6), exits=early)
    return student, teacher, torch.randint(4, (batch,), generator=generator)


def projections(heads: int = 3, outputs: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(outputs, 4, generator=generator, dtype=torch.float64) for _ in range(heads)]


def doubled(part):
    return part.map(lambda x: torch.cat([x, x])) if isinstance(part, View) else torch.cat([part, part])


@precisions
def test_orthogonal_distance_is_the_oracles(dtype):
    value = distance_from_orthogonal(torch.ones(1, 2, dtype=dtype))
    assert value.dtype == dtype and value.item() == pytest.approx(oracles()["tofd_orth"], abs=TOLERANCE[dtype])


@precisions
def test_feature_distance_is_the_oracles(dtype):
    unit = torch.eye(2, dtype=dtype)
    student = View(unit, maps=(torch.zeros(0),), embedding=unit)
    teacher = View(unit, embedding=torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=dtype))
    terms = TOFD(feature_weight=2.0).objective(student, teacher, torch.tensor([0, 1]), linked(unit))
    assert terms["feature"].item() == pytest.approx(2 * oracles()["tofd_dist"], abs=TOLERANCE[dtype])
    assert terms["orthogonal"].item() == 0


def test_task_oriented_features_written_out():
    student, teacher, labels = random_views()
    weights = projections()
    method = TOFD(ce_weight=2.0, kd_weight=3.0, feature_weight=5.0, orthogonal_weight=7.0)
    terms = method.objective(student, teacher, labels, linked(*weights, clock=(3, 8)))
    assert list(terms) == ["ce", "kd", "feature", "orthogonal"]
    temperature = 1 + 3 * 4 / 8
    ours = [(x, x) for x in student.maps[:2]] + [(student.logits, student.embedding)]
    theirs = [(view.logits, view.embedding) for view in (*teacher.exits, teacher)]
    expected = dict.fromkeys(terms, 0.0)
    for (h_s, v_s), (h_t, v_t), w in zip(ours, theirs, weights, strict=True):
        for b, label in enumerate(labels.tolist()):
            p_s = [math.exp(x) for x in h_s[b].tolist()]
            expected["ce"] -= 2 * math.log(p_s[label] / sum(p_s)) / len(labels)
            p_s, p_t = ([math.exp(x / temperature) for x in h[b].tolist()] for h in (h_s, h_t))
            soft = sum(t / sum(p_t) * math.log(s / sum(p_s)) for s, t in zip(p_s, p_t, strict=True))
            expected["kd"] -= 3 * soft / len(labels)
        gaps = [(w[j] @ v_s[b] - v_t[b, j]).item() ** 2 for b in range(len(labels)) for j in range(len(w))]
        expected["feature"] += 5 * math.sqrt(sum(gaps))
        for rows in (w.tolist(), w.T.tolist()):
            gram = [[sum(x * y for x, y in zip(a, b, strict=True)) - (a is b) for b in rows] for a in rows]
            expected["orthogonal"] += 7 * math.sqrt(sum(x * x for line in gram for x in line))
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected)


def test_terms_of_no_weight_are_not_computed():
    student, teacher, labels = random_views()
    method = TOFD(kd_weight=0.0, feature_weight=0.0, orthogonal_weight=0.0)
    assert list(method.objective(student, teacher, labels, linked(*projections()))) == ["ce"]


def test_each_head_is_asked_once_a_step():
    scheme, calls = scheme_of(TOFD()), []
    (phase,) = scheme.phases()
    for number, head in enumerate(scheme.adapters["heads"]):
        head.register_forward_hook(lambda *arguments, number=number: calls.append(number))
    scheme.losses(phase, scheme.turns(phase)[0], batch_of(), None)
    assert calls == [0, 1]


@pytest.mark.parametrize(
    ("epoch", "epochs", "expected"), [(0, 250, 1.012), (124, 250, 2.5), (249, 250, 4.0), (9, 10, 4.0)]
)
def test_the_temperature_rises_with_the_share_of_the_run(epoch, epochs, expected):
    student, teacher, labels = random_views()
    loss = TOFD().loss(student, teacher, labels, linked(*projections(), clock=(epoch, epochs)))
    pairs = zip((*student.maps[:2], student.logits), (*(e.logits for e in teacher.exits), teacher.logits), strict=True)
    soft = [-((t / expected).softmax(1) * (s / expected).log_softmax(1)).sum() / len(labels) for s, t in pairs]
    assert loss.item() == pytest.approx(sum(soft).item(), rel=1e-6)


def test_the_loop_sets_the_temperatures_clock():
    scheme, seen = scheme_of(TOFD()), []
    clock = scheme.adapters["clock"]
    make_training(scheme, epochs=3, on_step=lambda *told: seen.append(clock.done().item())).run()
    assert seen[::4] == pytest.approx([1 / 3, 2 / 3, 1])


def test_without_a_clock_the_temperature_is_the_last():
    student, teacher, labels = random_views()
    values = [TOFD().loss(student, teacher, labels, linked(*projections(), clock=at)) for at in (None, (9, 10))]
    assert torch.equal(*values)


def test_the_feature_norm_grows_with_the_root_of_the_batch_and_nothing_else_does():
    views = random_views()
    once = TOFD().objective(*views, linked(*projections()))
    twice = TOFD().objective(*map(doubled, views), linked(*projections()))
    for name in once:
        factor = math.sqrt(2) if name == "feature" else 1.0
        assert twice[name].item() == pytest.approx(factor * once[name].item()), name


def test_features_already_equal_have_a_finite_gradient():
    student, _, labels = random_views()
    teacher = View(student.logits, embedding=student.embedding)
    student = View(student.logits, maps=(torch.zeros(0),), embedding=student.embedding.clone().requires_grad_())
    terms = TOFD().objective(student, teacher, labels, linked(torch.eye(4, dtype=torch.float64)))
    assert terms["feature"].item() == terms["orthogonal"].item() == 0
    (gradient,) = torch.autograd.grad(terms["feature"], student.embedding)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(("outputs", "inputs"), [(6, 4), (6, 6), (3, 6)])
def test_a_matrix_with_orthonormal_rows_or_columns_is_as_near_as_its_shape_allows(outputs, inputs):
    square, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    columns = square[:, : min(outputs, inputs)]
    distance = distance_from_orthogonal(columns if outputs > inputs else columns.T)
    assert distance.item() == pytest.approx(math.sqrt(abs(outputs - inputs)), abs=1e-10)


def test_projections_map_the_students_features_only():
    scheme = scheme_of(TOFD())
    shapes = [tuple(link.weight.shape) for link in scheme.adapters["links"]]
    assert shapes == [(32, 16)] * 3
    assert all(link.bias is None for link in scheme.adapters["links"])
    assert set(scheme.adapters) == {"heads", "links", "clock"}
