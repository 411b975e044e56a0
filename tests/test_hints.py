"""FitNets, factor transfer and variational information: reference values, loops, and what each phase trains."""

import math
from dataclasses import asdict, replace

import pytest
import torch
from batches import TOLERANCE, batch_a, maps_f, oracles, total_of
from torch import nn
from toy import CLASSES, clone, difference, make_recipe, make_scheme, make_training, run_session

from kdstudy.core import Clock, View, is_without_decay
from kdstudy.hints import FactorTransfer, FitNets, Gaussian, Paraphraser, VariationalInformation, hint_regressor
from kdstudy.models import build_model

METHODS = [FitNets(), FitNets(two_stage=False), FactorTransfer(), VariationalInformation()]
every_method = pytest.mark.parametrize("method", METHODS, ids=repr)
precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def random_map(channels, height=4, width=4, *, seed=0, batch=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)


def view(*maps):
    return View(torch.zeros(len(maps[0]) if maps else 1, 2, dtype=torch.float64), maps=maps)


def scheme_for(method, student="wrn_10_0.25", teacher="wrn_10_0.5"):
    """Two networks of three stages on the toy images of 6 x 5 pixels."""
    torch.manual_seed(0)
    networks = [build_model(name, classes=CLASSES, image_size=(6, 5)).double() for name in (student, teacher)]
    networks[1](torch.randn(40, 3, 6, 5, dtype=torch.float64))  # batch statistics that are no longer the first ones
    return make_scheme(method, student=networks[0], teacher=networks[1])


def changed(before, after):
    """The names of tensors that are not the same bit for bit."""
    return {name for name in before if not torch.equal(before[name], after[name])}


def under(names, *prefixes):
    return {name for name in names if name.startswith(prefixes)}


# FitNets


@precisions
def test_the_hint_is_the_oracle(dtype):
    regressor = nn.ModuleDict({"regressor": nn.Identity()})
    loss = FitNets(stage=1).loss(*maps_f(dtype), regressor)
    assert loss.dtype == dtype and loss.shape == ()
    assert loss.item() == pytest.approx(oracles()["fitnet_mse"], abs=TOLERANCE[dtype])
    assert loss.item() * 8 / 2 == pytest.approx(oracles()["fitnet_half_l2"], abs=8 * TOLERANCE[dtype])


def test_in_one_stage_the_hint_stands_beside_the_labels():
    method = FitNets(two_stage=False, stage=1)
    (phase,) = method.phases()
    student, teacher, labels = maps_f()
    terms = phase.objective(student, teacher, labels, nn.ModuleDict({"regressor": nn.Identity()}))
    assert set(terms) == {"ce", "kd"} and phase.trains == ("student", "adapters")
    assert terms["ce"].item() == pytest.approx(math.log(5)) and terms["kd"].item() == pytest.approx(187.5)


def test_in_two_stages_the_hint_has_a_phase_to_itself():
    first, second = FitNets(stage=1, kd_weight=3.0).phases()
    (term,) = first.objective(*maps_f(), nn.ModuleDict({"regressor": nn.Identity()})).values()
    assert term.item() == pytest.approx(3 * 1.875)
    assert first.trains == ("student.stem", "student.stages.0", "adapters.regressor")
    assert second.trains == ("student",)
    assert FitNets(stage=3).phases()[0].trains[:4] == ("student.stem", *(f"student.stages.{i}" for i in range(3)))
    assert [first.epochs(240), second.epochs(240)] == [30, 240]


@precisions
def test_the_second_phase_is_the_oracles_distillation(dtype):
    method = FitNets(temperature=4.0, first_kl_weight=5.0, kl_weight=2.0)
    views = batch_a(dtype)
    expected = oracles()["ce"] + 2 * oracles()["kd_T4"]
    assert total_of(method, *views).item() == pytest.approx(expected, abs=2 * TOLERANCE[dtype])
    clock = Clock().to(dtype)
    for epoch, weight in enumerate((5.0, 4.0, 3.0, 2.0)):
        clock.set(epoch, 4)
        terms = method.objective(*views, nn.ModuleDict({"clock": clock}))
        assert terms["kl"].item() == pytest.approx(weight * oracles()["kd_T4"], abs=5 * TOLERANCE[dtype])


def test_the_weight_of_a_second_phase_of_one_epoch_is_its_first():
    clock = Clock()
    clock.set(0, 1)
    terms = FitNets(temperature=4.0).objective(*batch_a(), nn.ModuleDict({"clock": clock}))
    assert terms["kl"].item() == pytest.approx(4 * oracles()["kd_T4"])


def test_the_second_phase_has_no_term_without_weight():
    assert set(FitNets(ce_weight=0.0).objective(*batch_a(), nn.ModuleDict())) == {"kl"}
    assert set(FitNets(first_kl_weight=0.0, kl_weight=0.0).objective(*batch_a(), nn.ModuleDict())) == {"ce"}


def test_the_loop_lets_the_weight_of_the_softened_answers_fall_and_keeps_it_above_zero():
    """No second phase of cross-entropy alone: with networks that stand still, its term falls as 4, 3, 2, 1 do."""
    recipe = make_recipe(epochs=4, batch=22, learning_rate=1e-12, weight_decay=0.0, crop_padding=0, flip=False)
    rows = run_session(scheme_for(FitNets()), recipe).history
    assert [row["phase"] for row in rows] == ["hint"] + ["distil"] * 4
    assert "ce" not in rows[0] and all("hint" not in row and row["ce"] > 0 for row in rows[1:])
    last = rows[-1]["kl"]
    assert last > 1e-3
    assert [row["kl"] / last for row in rows[1:]] == pytest.approx([4, 3, 2, 1], rel=1e-6)


@pytest.mark.parametrize(
    ("student", "resting"), [("resnet8x0.25", ()), ("wrn_10_0.25", ("student.stages.1.0.norm.",))], ids=str
)
def test_nothing_above_the_guided_layer_changes_in_the_hint_phase(student, resting):
    """A wide ResNet's guided map is read by a batch norm of the same stage: its weights rest, its statistics follow."""
    method, recipe = FitNets(hint_share=0.25), make_recipe(epochs=8)
    before = clone(scheme_for(method, student).state_dict())
    session = run_session(scheme_for(method, student), recipe, stop_after=6)
    assert {row["phase"] for row in session.history} == {"hint"} and session.stopped
    moved = changed(before, session.state)
    parameters = {name for name, _ in scheme_for(method, student).named_parameters()}
    guided = under(parameters, "student.stem", "student.stages.0", "student.stages.1") - under(parameters, *resting)
    assert moved & parameters == guided | under(parameters, "adapters.regressor")
    assert not under(moved, "student.stages.2", "student.embed", "student.classifier")
    if resting:
        statistics = {f"{resting[0]}{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
        assert under(moved, *resting) == statistics


def test_the_second_phase_trains_the_whole_student_and_drops_the_regressor():
    method, recipe = FitNets(hint_share=0.25), make_recipe(epochs=8)
    hinted = run_session(scheme_for(method), recipe, stop_after=6).state
    moved = changed(hinted, run_session(scheme_for(method), recipe).state)
    parameters = {name for name, _ in scheme_for(method).named_parameters()}
    assert moved & parameters == under(parameters, "student") and not under(moved, "adapters.regressor")


@pytest.mark.parametrize(
    ("student", "teacher", "kernel"),
    [
        ((8, 8), (8, 8), (1, 1)),
        ((8, 8), (4, 4), (3, 3)),
        ((4, 4), (8, 8), (4, 4)),
        ((7, 7), (4, 4), (4, 4)),
        ((8, 6), (8, 4), (1, 3)),
        ((5, 6), (4, 6), (2, 1)),
    ],
    ids=str,
)
def test_the_regressor_meets_the_teachers_size_and_width(student, teacher, kernel):
    maps = random_map(3, *student).float(), random_map(5, *teacher).float()
    regressor = hint_regressor(*maps)
    assert regressor(maps[0]).shape == maps[1].shape
    assert regressor[0].kernel_size == kernel and regressor[0].bias is None
    assert isinstance(regressor[0], nn.ConvTranspose2d) == (student == (4, 4))
    assert isinstance(regressor[1], nn.BatchNorm2d)


@pytest.mark.parametrize(("student", "teacher"), [((3, 3), (4, 4)), ((3, 2), (3, 3)), ((4, 4), (8, 6))], ids=str)
def test_a_size_that_no_regressor_meets_is_refused(student, teacher):
    with pytest.raises(ValueError, match=r"half the teacher's size or at least as large, not .* choose another stage"):
        hint_regressor(random_map(3, *student), random_map(5, *teacher))


def test_a_relu_ends_the_regressor_only_where_the_hint_has_one():
    signed = random_map(5)
    assert not any(isinstance(layer, nn.ReLU) for layer in hint_regressor(random_map(3), signed))
    assert isinstance(hint_regressor(random_map(3), signed.relu())[-1], nn.ReLU)


@pytest.mark.parametrize("counts", [(1, 2), (2, 1), (0, 2)])
def test_a_stage_that_a_network_lacks_is_refused(counts):
    views = [view(*[random_map(3)] * count) for count in counts]
    role = "student" if counts[0] < 2 else "teacher"
    with pytest.raises(ValueError, match=f"stage must be at most the {min(counts)} stages of the {role}, not 2"):
        FitNets().adapters(*views)


# factor transfer


def identities():
    """Adapters whose factors are the maps themselves."""
    paraphraser = Paraphraser(2, 1)
    paraphraser.encoder = nn.Identity()
    return nn.ModuleDict({"paraphraser": paraphraser, "translator": nn.Identity()})


@precisions
def test_the_factor_loss_is_the_oracle(dtype):
    loss = FactorTransfer().loss(*maps_f(dtype), identities())
    assert loss.dtype == dtype and loss.shape == ()
    assert loss.item() == pytest.approx(oracles()["ft_l1_mean"], abs=TOLERANCE[dtype])
    assert 8 * loss.item() == pytest.approx(oracles()["ft_l1_sum"], abs=8 * TOLERANCE[dtype])


@pytest.mark.parametrize("larger", ["student", "teacher", "neither"])
def test_the_factor_loss_is_the_loop(larger):
    """The last stage counts; the larger factor is pooled first and normalised then."""
    sides = {"student": (4, 4), "teacher": (2, 2)}
    student = random_map(2, *(sides["student"] if larger == "student" else (2, 2)))
    teacher = random_map(2, *(sides["student"] if larger == "teacher" else (2, 2)), seed=1)
    found = FactorTransfer().loss(view(random_map(3), student), view(teacher * 9, teacher), None, identities())
    expected = []
    for pair in zip(student, teacher, strict=True):
        small = [each if len(each[0]) == 2 else each.unfold(1, 2, 2).unfold(2, 2, 2).mean((3, 4)) for each in pair]
        flat = [each.flatten().tolist() for each in small]
        f_s, f_t = ([value / math.hypot(*values) for value in values] for values in flat)
        expected += [abs(a - b) for a, b in zip(f_s, f_t, strict=True)]
    assert found.item() == pytest.approx(sum(expected) / len(expected), rel=1e-12)


def test_the_factor_loss_is_not_blind_to_signs_and_channel_permutations():
    """An attention map of the factor would be: squares summed over channels before the norm is taken."""
    factor = random_map(6)
    views = view(factor), view(factor)
    assert FactorTransfer().loss(*views, None, identities()).item() == 0
    flips = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64).view(1, 6, 1, 1)
    for other in (factor * flips, -factor, factor.roll(1, dims=1)):
        assert FactorTransfer().loss(view(other), views[1], None, identities()).item() > 0.01


def test_the_factor_loss_is_blind_to_the_scale_of_each_sample():
    student, teacher = random_map(4), random_map(4, seed=1)
    scale = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64).view(3, 1, 1, 1)
    losses = [
        FactorTransfer().loss(view(each), view(teacher), None, identities()) for each in (student, scale * student)
    ]
    torch.testing.assert_close(*losses)


def test_paraphraser_and_translator_are_three_leaky_convolutions_each_way():
    adapters = FactorTransfer(rate=0.6).adapters(view(random_map(3)), view(random_map(6)))
    code = 4  # 0.6 of 6, rounded
    parts = (adapters["paraphraser"].encoder, adapters["paraphraser"].decoder, adapters["translator"])
    widths = ([(6, 6), (6, code), (code, code)], [(code, code), (code, 6), (6, 6)], [(3, 3), (3, code), (code, code)])
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Conv2d)
    for part, expected, kind in zip(parts, widths, kinds, strict=True):
        layers, leaks = list(part)[::2], list(part)[1::2]
        assert [(layer.in_channels, layer.out_channels) for layer in layers] == expected
        assert all(type(layer) is kind and layer.kernel_size == (3, 3) and layer.bias is not None for layer in layers)
        assert all(type(leak) is nn.LeakyReLU and leak.negative_slope == 0.1 for leak in leaks) and len(leaks) == 3
    teacher_map = random_map(6, 5, 3).float()
    assert adapters["paraphraser"](teacher_map).shape == teacher_map.shape
    assert adapters["paraphraser"].encoder(teacher_map).shape == (3, code, 5, 3)


def test_the_paraphraser_learns_from_the_teachers_last_map_alone():
    teacher = random_map(6)
    method = FactorTransfer()
    adapters = method.adapters(view(random_map(3)), view(teacher)).double()
    errors = (adapters["paraphraser"].decoder(adapters["paraphraser"].encoder(teacher)) - teacher).detach()
    for reconstruction, expected in (("l1", errors.abs().mean()), ("l2", errors.square().mean())):
        first, _ = replace(method, reconstruction=reconstruction).phases()
        terms = first.objective(view(random_map(3)), view(random_map(9), teacher), None, adapters)
        assert set(terms) == {"paraphrase"} and terms["paraphrase"].item() == pytest.approx(expected.item())
        other = first.objective(view(random_map(3, seed=5)), view(teacher), None, adapters)
        assert other["paraphrase"].item() == terms["paraphrase"].item()


def test_the_paraphraser_is_trained_first_and_frozen_then(monkeypatch):
    method, recipe = FactorTransfer(paraphraser_share=0.5), make_recipe(epochs=4)
    before = clone(scheme_for(method).state_dict())
    first = run_session(scheme_for(method), recipe, stop_after=6)
    assert {row["phase"] for row in first.history} == {"paraphrase"} and first.stopped
    paraphraser = under(before, "adapters.paraphraser")
    assert changed(before, first.state) == paraphraser
    scheme = scheme_for(method)
    modes = []
    monkeypatch.setattr(Paraphraser, "train", lambda self, mode=True: modes.append(mode) or nn.Module.train(self, mode))
    last = run_session(scheme, recipe)
    moved = changed(first.state, last.state)
    assert not moved & paraphraser and under(moved, "adapters.translator") == under(before, "adapters.translator")
    assert under(moved, "student.") == under(before, "student.")
    assert modes[-1] is False and True in modes


def test_no_gradient_reaches_the_paraphraser_from_the_second_phase():
    adapters = FactorTransfer().adapters(view(random_map(3)), view(random_map(6))).double()
    student = random_map(3).requires_grad_()
    FactorTransfer().loss(view(student), view(random_map(6)), None, adapters).backward()
    assert all(parameter.grad is None for parameter in adapters["paraphraser"].parameters())
    assert student.grad.any() and all(parameter.grad.any() for parameter in adapters["translator"].parameters())


def test_the_paraphraser_gets_its_share_of_the_epochs():
    assert [phase.trains for phase in FactorTransfer().phases()] == [
        ("adapters.paraphraser",),
        ("student", "adapters.translator"),
    ]
    assert [phase.epochs(164) for phase in FactorTransfer().phases()] == [5, 164]
    assert [phase.epochs(10) for phase in FactorTransfer(paraphraser_share=0.3).phases()] == [3, 10]


def test_a_factor_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"rate must leave the factor a channel of the teacher's 4, not 0.1"):
        FactorTransfer(rate=0.1).adapters(view(random_map(3)), view(random_map(4)))
    for who, maps in (("student", ((), (random_map(3),))), ("teacher", ((random_map(3),), ()))):
        with pytest.raises(ValueError, match=f"the {who} shows no maps"):
            FactorTransfer().adapters(*(view(*each) for each in maps))


# variational information


def gaussian_of(dtype, channels=2, variance=None):
    """A Gaussian whose mean is the student's map itself."""
    gaussian = Gaussian(channels, channels).to(dtype)
    gaussian.mean = nn.Identity()
    if variance is not None:
        rho = torch.tensor(variance, dtype=dtype).sub(1e-5).expm1().log().expand(channels)
        gaussian.rho = nn.Parameter(rho.clone())
    return gaussian


@precisions
@pytest.mark.parametrize(("variance", "key"), [(None, "g_vid_init"), (1.0, "g_vid_var1")])
def test_variational_information_is_the_oracle(variance, key, dtype):
    adapters = nn.ModuleDict({"gaussians": nn.ModuleList([gaussian_of(dtype, variance=variance)])})
    loss = VariationalInformation().loss(*maps_f(dtype), adapters)
    assert loss.dtype == dtype and loss.shape == ()
    assert loss.item() == pytest.approx(oracles()[key], abs=TOLERANCE[dtype])


def test_variances_start_at_five():
    gaussian = Gaussian(3, 4)
    assert gaussian.rho.tolist() == pytest.approx([oracles()["g_vid_rho_init"]] * 4, abs=1e-6)
    assert gaussian.variance().tolist() == pytest.approx([5.0] * 4, abs=1e-5)


def test_variational_information_is_the_loop():
    """Two stages of unequal width; in the first the student's map is the larger, in the second the teacher's."""
    student = random_map(3, 4, 4), random_map(2, 2, 2)
    teacher = random_map(4, 2, 2, seed=1), random_map(3, 4, 4, seed=1)
    adapters = VariationalInformation().adapters(view(*student), view(*teacher)).double()
    expected = 0.0
    for gaussian, s, t in zip(adapters["gaussians"], student, teacher, strict=True):
        nn.init.normal_(gaussian.rho)
        s, t = (each if each.shape[2] == 2 else each.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)) for each in (s, t))
        weights = [layer.weight.flatten(1) for layer in gaussian.mean[::2]]
        one, two, three = weights
        total = 0.0
        for b, c, i, j in torch.cartesian_prod(*(torch.arange(size) for size in t.shape)).tolist():
            mean = (three @ (two @ (one @ s[b, :, i, j]).clamp(min=0)).clamp(min=0))[c].item()
            variance = math.log1p(math.exp(gaussian.rho[c].item())) + 1e-5
            total += 0.5 * ((t[b, c, i, j].item() - mean) ** 2 / variance + math.log(variance))
        expected += total / t.numel()
    loss = VariationalInformation().loss(view(*student), view(*teacher), None, adapters)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_the_best_variance_of_a_channel_is_its_mean_squared_error():
    student, teacher = random_map(3), 2 * random_map(3, seed=1)
    best = (teacher - student).square().mean(dim=(0, 2, 3))
    gaussian = gaussian_of(torch.float64, channels=3)
    gaussian.rho = nn.Parameter(torch.expm1(best - 1e-5).log())
    loss = gaussian(student, teacher)
    loss.backward()
    assert gaussian.rho.grad.abs().max() < 1e-12
    assert loss.item() == pytest.approx((1 + best.log().mean().item()) / 2)


def test_a_close_fit_is_worth_less_than_nothing():
    student = random_map(3)
    gaussian = gaussian_of(torch.float64, channels=3, variance=0.01)
    assert gaussian(student, student).item() == pytest.approx(math.log(0.01) / 2)


@pytest.mark.parametrize("rho", [-1000.0, 1000.0])
def test_no_variance_overflows_or_vanishes(rho):
    gaussian = Gaussian(2, 2)
    nn.init.constant_(gaussian.rho, rho)
    loss = gaussian(random_map(2).float(), random_map(2, seed=1).float())
    loss.backward()
    assert loss.isfinite() and gaussian.rho.grad.isfinite().all() and (gaussian.variance() > 0).all()


def test_means_are_three_convolutions_of_one_pixel():
    (gaussian,) = VariationalInformation().adapters(view(random_map(3)), view(random_map(5)))["gaussians"]
    assert [type(layer) for layer in gaussian.mean] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.Conv2d]
    assert sum(parameter.numel() for parameter in gaussian.mean.parameters()) == 3 * 5 + 5 * 5 + 5 * 5
    assert gaussian.mean(random_map(3).float()).shape == (3, 5, 4, 4)


def rhos(state):
    return {name: tensor for name, tensor in state.items() if name.endswith(".rho")}


def test_variances_are_registered_and_trained_by_the_loop():
    """Variances in a plain list never move, and the loss is a tenth of the squared error."""
    before = clone(scheme_for(VariationalInformation()).state_dict())
    after = run_session(scheme_for(VariationalInformation()), make_recipe()).state
    assert len(rhos(before)) == 3
    for name, first in rhos(before).items():
        assert (after[name] != first).all(), name


def test_weight_decay_leaves_the_variances_alone():
    states = []
    for weight_decay in (0.0, 0.5):
        recipe = make_recipe(epochs=1, batch=22, weight_decay=weight_decay, milestones=())
        states.append(run_session(scheme_for(VariationalInformation()), recipe).state)
    moved = changed(*states)
    assert not rhos(dict.fromkeys(moved)) and under(moved, "adapters.gaussians.0.mean", "student.stem")
    training = make_training(scheme_for(VariationalInformation()), make_recipe())
    training.start()
    usual, free = training.current.optimisers["distil"].param_groups
    assert len(free["params"]) == 3 and free["weight_decay"] == 0 < usual["weight_decay"]
    assert all(is_without_decay(parameter) for parameter in free["params"])


@pytest.mark.parametrize("counts", [(0, 0), (2, 0), (3, 4)])
def test_networks_without_the_same_stages_are_refused(counts):
    with pytest.raises(ValueError, match=f"equally many stages, at least one, not {counts[0]} and {counts[1]}"):
        VariationalInformation().adapters(*(view(*[random_map(2)] * count) for count in counts))


# all of them


@pytest.mark.parametrize("method", METHODS[:3], ids=repr)
def test_stopped_in_either_phase_and_resumed_equals_uninterrupted(method, tmp_path):
    recipe = make_recipe()
    whole = run_session(scheme_for(method), recipe)
    for stop in (2, whole.steps - 2):
        path = tmp_path / f"{stop}.pt"
        assert run_session(scheme_for(method), recipe, path, stop_after=stop).stopped
        resumed = run_session(scheme_for(method), recipe, path)
        for part in ("history", "state"):
            assert difference(getattr(resumed, part), getattr(whole, part)) is None
        assert difference(resumed.momentum["distil"], whole.momentum["distil"]) is None


@pytest.mark.parametrize("student", ["resnet8x0.25", "wrn_10_0.25"])
@pytest.mark.parametrize("teacher", ["resnet14x0.5", "wrn_10_0.5"])
@pytest.mark.parametrize("method", [FitNets(hint_share=0.5), *METHODS[1:]], ids=repr)
def test_a_run_with_an_odd_last_batch_lowers_what_is_matched(method, teacher, student):
    rows = run_session(scheme_for(method, student, teacher), make_recipe(epochs=8, learning_rate=0.1)).history
    (term,) = {"hint", "kd"} & {name for row in rows for name in row}
    values = [row[term] for row in rows if term in row]
    assert max(values[-2:]) < values[0]


@every_method
def test_no_value_decides_what_is_run(method):
    sample = [view(*(random_map(channels, batch=2) for _ in range(2))) for channels in (3, 5)]
    adapters = method.adapters(*sample).to("meta")
    student, teacher = (each.map(lambda x: torch.empty_like(x, device="meta", dtype=torch.float32)) for each in sample)
    labels = torch.empty(2, dtype=torch.long, device="meta")
    for phase in method.phases():
        total = sum(phase.objective(student, teacher, labels, adapters).values())
        assert total.shape == () and total.device.type == "meta"


@every_method
def test_hyperparameters_survive_a_round_trip(method):
    assert type(method)(**asdict(method)) == method


def test_defaults_are_the_published_ones():
    fitnets = asdict(FitNets())
    assert fitnets == {"ce_weight": 1.0, "kd_weight": 100.0, "two_stage": True, "stage": 2, "hint_share": 0.125} | {
        "first_kl_weight": 4.0,
        "kl_weight": 1.0,
        "temperature": 3.0,
    }
    assert asdict(FactorTransfer()) == {
        "ce_weight": 1.0,
        "kd_weight": 500.0,
        "rate": 0.5,
        "reconstruction": "l1",
        "paraphraser_share": 0.03,
    }
    assert asdict(VariationalInformation()) == {"ce_weight": 1.0, "kd_weight": 1.0}


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (FitNets, {"stage": 0}, "stage must be a whole number of at least 1, not 0"),
        (FitNets, {"stage": 1.5}, "stage must be a whole number of at least 1, not 1.5"),
        (FitNets, {"stage": True}, "stage must be .* not True"),
        (FitNets, {"temperature": 0.0}, "temperature must be .* above 0, not 0.0"),
        (FitNets, {"hint_share": 0.0}, "hint_share must be .* above 0, not 0.0"),
        (FitNets, {"kl_weight": -1.0}, "kl_weight must be .* at least 0, not -1.0"),
        (FitNets, {"first_kl_weight": math.nan}, "first_kl_weight must be .* at least 0, not nan"),
        (FitNets, {"kd_weight": 0.0}, "kd_weight must be above 0, not 0: the hint phase has no other term"),
        (FitNets, {"ce_weight": 0.0, "kl_weight": 0.0}, "ce_weight and kl_weight are both 0"),
        (FactorTransfer, {"rate": 0.0}, "rate must be .* above 0, not 0.0"),
        (FactorTransfer, {"paraphraser_share": -1}, "paraphraser_share must be .* above 0, not -1"),
        (FactorTransfer, {"reconstruction": "bce"}, "reconstruction must be one of l1, l2, not 'bce'"),
        (VariationalInformation, {"kd_weight": -1.0}, "kd_weight must be .* at least 0, not -1.0"),
    ],
)
def test_a_bad_hyperparameter_is_named(kind, values, message):
    with pytest.raises(ValueError, match=message):
        kind(**values)


def test_one_stage_needs_no_hint_weight():
    assert set(FitNets(two_stage=False, kd_weight=0.0).objective(*batch_a(), nn.ModuleDict())) == {"ce"}
