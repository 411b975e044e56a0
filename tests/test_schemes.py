"""A frozen teacher that nothing can move, gradients that go where they should, modes that evaluation cannot upset."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from toy import (
    IMAGES,
    Plain,
    TinyNet,
    TwoPhases,
    clone,
    difference,
    make_bank,
    make_recipe,
    make_scheme,
    make_training,
    pictures,
    tiny_net,
    tiny_teacher,
)

from kdstudy.checkpoint import load_weights, save_weights
from kdstudy.core import Clock, Method, Phase, View, without_decay
from kdstudy.evaluate import logits_of
from kdstudy.models import build_model
from kdstudy.response import SphericalKD, VanillaKD
from kdstudy.schemes import (
    Alone,
    Batch,
    Cast,
    Committee,
    NoOptions,
    Offline,
    SelfTaught,
    Turn,
    count_correct,
    look,
    sample_batch,
    untracked,
)

ALL_TAPS = ("logits", "stem", "maps", "pre_maps", "embedding")


@dataclass(frozen=True, kw_only=True)
class Spy(Method):
    """Keeps the views that its loss is given."""

    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "none"
    seen: ClassVar[list[tuple[View, View]]] = []

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        self.seen.append((student, teacher))
        return (student.logits - teacher.logits).square().mean()


def spying_on(*taps: str) -> Method:
    """A spy that reads these taps, with an empty memory."""
    spy = type("SpyOnTaps", (Spy,), {"reads": taps, "seen": []})
    return dataclass(frozen=True, kw_only=True)(spy)()


def a_batch(dtype=torch.float64) -> Batch:
    bank = make_bank(*pictures(6), dtype=dtype)
    return Batch(next(bank.plain(6)), bank.labels)


def step(scheme, phase, half=None, dtype=torch.float64) -> dict[str, Tensor]:
    """Losses of a batch with gradients computed, in the modes of the phase."""
    scheme.set_modes(phase)
    (turn,) = scheme.turns(phase)
    losses = scheme.losses(phase, turn, a_batch(dtype), half)
    sum(losses.terms.values()).backward()
    return losses.terms


@pytest.mark.parametrize("method", [VanillaKD(), SphericalKD(), TwoPhases()], ids=lambda m: type(m).__name__)
def test_training_does_not_touch_the_teacher(method):
    teacher = tiny_teacher().train()
    before = clone(teacher.state_dict())
    scheme = make_scheme(method, teacher=teacher)
    modes = []
    training = make_training(scheme, make_recipe(), on_step=lambda *_: modes.append(teacher.training))
    training.run()
    assert difference(clone(teacher.state_dict()), before) is None
    assert modes and not any(modes)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())


def test_the_teacher_is_no_part_of_the_scheme():
    teacher = tiny_teacher()
    scheme = make_scheme(VanillaKD(), teacher=teacher)
    own = {id(tensor) for tensor in (*scheme.parameters(), *scheme.buffers())}
    assert own == {id(tensor) for tensor in (*scheme.student.parameters(), *scheme.student.buffers())}
    assert {name.split(".")[0] for name in scheme.state_dict()} == {"student"}
    scheme.train().requires_grad_(True)
    scheme.set_modes(scheme.phases()[-1])
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_student_and_teacher_see_the_same_images_and_the_teachers_view_is_that_of_eval_mode():
    teacher = tiny_teacher()
    spy = spying_on(*ALL_TAPS)
    scheme = make_scheme(spy, teacher=teacher)
    step(scheme, scheme.phases()[0])
    images = a_batch().images
    student_view, teacher_view = spy.seen[-1]
    torch.testing.assert_close(teacher_view.logits, teacher.eval()(images).logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(student_view.stem, scheme.student.stem(images), rtol=1e-12, atol=1e-12)
    assert student_view.logits.requires_grad
    assert not any(x.requires_grad for x in (teacher_view.logits, teacher_view.stem, *teacher_view.maps))


def test_gradient_reaches_student_and_adapters_only():
    scheme = make_scheme(TwoPhases())
    terms = step(scheme, scheme.phases()[-1])
    assert set(terms) == {"ce", "kd"}
    assert {name for name, p in scheme.named_parameters() if p.grad is not None and p.grad.any()} >= {
        "adapters.regressor.weight",
        "adapters.regressor.bias",
        "student.stem.weight",
        "student.norm.weight",
        "student.classifier.weight",
    }
    (teacher,) = scheme._teacher
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("taps", [("logits",), ("embedding",), ("maps", "stem"), ALL_TAPS], ids=str)
def test_only_the_taps_a_method_reads_reach_its_loss(taps):
    spy = spying_on(*taps)
    scheme = make_scheme(spy)
    step(scheme, scheme.phases()[0])
    for view in spy.seen[-1]:
        shown = {tap for tap in View._fields if getattr(view, tap) not in (None, ())}
        assert shown == {"logits", *taps}


@pytest.mark.parametrize("half", [None, torch.bfloat16], ids=str)
def test_losses_are_computed_in_float32_outside_autocast(half):
    spy = spying_on(*ALL_TAPS)
    scheme = make_scheme(spy, dtype=torch.float32)
    inside = []
    scheme.student.layer.register_forward_hook(lambda module, arguments, output: inside.append(output.dtype))
    terms = step(scheme, scheme.phases()[0], half, torch.float32)
    assert inside == [half or torch.float32]
    assert {term.dtype for term in terms.values()} == {torch.float32}
    for view in spy.seen[-1]:
        assert {x.dtype for x in (view.logits, view.stem, *view.maps, *view.pre_maps, view.embedding)} == {
            torch.float32
        }
    assert {p.grad.dtype for p in scheme.student.parameters()} == {torch.float32}


def test_autocast_around_the_loop_does_not_reach_a_full_precision_run():
    network, batch = tiny_net(0, dtype=torch.float32).eval(), a_batch(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        view = look(network, batch, ALL_TAPS, None)
    assert torch.equal(view.maps[0], network(batch.images).maps[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sizing_the_adapters_leaves_the_students_statistics_alone(dtype):
    student = tiny_net(0, dtype=dtype).train()
    before = clone(student.state_dict())
    scheme = make_scheme(TwoPhases(), student=student, dtype=dtype)
    assert difference(clone(student.state_dict()), before) is None
    regressor = scheme.adapters["regressor"]
    assert (regressor.in_features, regressor.out_features) == (3, 5)
    assert regressor.weight.dtype == dtype and regressor.weight.requires_grad


def test_prepare_shows_the_method_the_teacher_on_all_plain_images():
    teacher = tiny_teacher()
    scheme = make_scheme(TwoPhases(), teacher=teacher)
    images, labels = pictures()
    with torch.no_grad():
        embedding = teacher(next(make_bank(images, labels).plain(IMAGES))).embedding
    before = clone(teacher.state_dict())
    scheme.prepare(partial(make_bank(images, labels, padding=3).plain, 5))
    measured = scheme.adapters["spread"].running_mean
    torch.testing.assert_close(measured, embedding.mean(dim=0), rtol=1e-12, atol=1e-12)
    assert not measured.requires_grad and difference(clone(teacher.state_dict()), before) is None


def training_modules(scheme) -> set[str]:
    return {name for name, module in scheme.named_modules() if module.training}


def test_only_what_a_phase_trains_is_in_train_mode():
    scheme = make_scheme(TwoPhases())
    regress, distil = scheme.phases()
    scheme.set_modes(regress)
    assert training_modules(scheme) == {"adapters.regressor"}
    scheme.set_modes(distil)
    assert training_modules(scheme) == {
        f"student{part}" for part in ("", *(f".{x}" for x, _ in TinyNet().named_children()))
    }


@pytest.mark.parametrize("method", [Plain(), VanillaKD()], ids=lambda m: type(m).__name__)
def test_the_student_is_in_train_mode_at_every_step_although_it_is_evaluated_every_epoch(method):
    scheme = make_scheme(method)
    modes = []

    def note(network, arguments):
        modes.append((network.training, network.norm.training))

    scheme.student.register_forward_pre_hook(note)
    make_training(scheme, make_recipe(epochs=3)).run()
    # per epoch three steps, then the test set and the held-out set
    assert modes == ([(True, True)] * 3 + [(False, False)] * 2) * 3


def test_trained_parameters_are_those_of_the_named_modules_in_order():
    scheme = make_scheme(TwoPhases())

    def names(*modules):
        known = {id(parameter): name for name, parameter in scheme.named_parameters()}
        return [known[id(parameter)] for parameter in scheme.trained_parameters(modules)]

    regressor = ["adapters.regressor.weight", "adapters.regressor.bias"]
    assert names("adapters.regressor") == regressor
    student = [f"student.{name}" for name, _ in scheme.student.named_parameters()]
    assert names("adapters", "student") == regressor + student
    assert names("student", "adapters") == student + regressor


def test_a_network_alone_is_its_own_detached_teacher():
    spy = spying_on("logits", "maps")
    scheme = Alone(tiny_net(0), spy, a_batch())
    terms = step(scheme, scheme.phases()[0])
    student, teacher = spy.seen[-1]
    assert torch.equal(student.maps[0], teacher.maps[0]) and not teacher.maps[0].requires_grad
    assert terms["kd"].item() == 0 and scheme.deployed is scheme.student


def test_counts_are_of_the_students_right_answers():
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]], requires_grad=True)
    correct = count_correct(logits.detach(), torch.tensor([1, 1, 1]))
    assert correct.item() == 2 and not correct.requires_grad
    scheme = make_scheme(VanillaKD())
    phase = scheme.phases()[0]
    scheme.set_modes(phase)
    counts = scheme.losses(phase, scheme.turns(phase)[0], a_batch(), None).counts
    expected = (scheme.student(a_batch().images).logits.argmax(dim=1) == a_batch().labels).sum()
    assert list(counts) == ["correct"] and counts["correct"] == expected


@pytest.mark.parametrize("names", [("wrn_10_0.25", "cnn_small"), ("cnn_small", "wrn_10_0.25")])
def test_the_studys_networks_distil_into_each_other(names):
    torch.manual_seed(0)
    student, teacher = (build_model(name, classes=3, image_size=8).double() for name in names)
    bank = make_bank(*pictures(12, size=(8, 8)))
    scheme = Offline(student, teacher, SphericalKD(), Batch(next(bank.plain(2)), bank.labels[:2]))
    scheme.prepare(partial(bank.plain, 5))
    phase = scheme.phases()[0]
    scheme.set_modes(phase)
    terms = scheme.losses(phase, scheme.turns(phase)[0], Batch(next(bank.plain(12)), bank.labels), None).terms
    norms = logits_of(teacher, bank).norm(dim=1)
    # the method adds a small number under the root, these networks' logits are small
    torch.testing.assert_close(scheme.adapters["teacher_norm"].mean, norms.mean(), rtol=1e-5, atol=0)
    assert all(torch.isfinite(term) for term in terms.values())


@dataclass(frozen=True, kw_only=True)
class Keeps(Method):
    """A student that keeps an adapter and predicts with it; notes the clock and the indices that its loss sees."""

    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "none"
    reads: ClassVar[tuple[str, ...]] = ("embedding", "indices", "census", "network")
    deploys: ClassVar[tuple[str, ...]] = ("head",)
    least_batch: ClassVar[int] = 3
    seen: ClassVar[list[tuple]] = []

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        self.seen.append((student, teacher))
        head = nn.Linear(student.embedding.shape[1], student.logits.shape[1])
        free = nn.Module()
        free.rho = without_decay(nn.Parameter(torch.ones(2)))
        return nn.ModuleDict({"head": head, "clock": Clock(), "free": free})

    def predict(self, student: View, adapters: nn.ModuleDict) -> Tensor:
        return adapters["head"](student.embedding)

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        clock = adapters["clock"]
        self.seen.append((student, teacher, clock.epoch.item(), clock.epochs.item()))
        return (self.predict(student, adapters) - teacher.logits).square().mean() + adapters["free"].rho.sum() * 0

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("first", self.objective, share=0.5), Phase("then", self.objective))


@pytest.fixture
def kept():
    Keeps.seen.clear()
    return make_scheme(Keeps(ce_weight=0.0))


def test_a_student_is_deployed_with_the_adapters_that_it_keeps(kept, tmp_path):
    images = a_batch().images
    kept.eval()
    embedding = kept.student(images).embedding
    torch.testing.assert_close(kept.deployed(images).logits, kept.adapters["head"](embedding), rtol=0, atol=0)
    assert {name.split(".")[0] for name in kept.deployed.state_dict()} == {"student", "adapters"}
    assert not any("free" in name for name in kept.deployed.state_dict())
    save_weights(kept.deployed, tmp_path / "weights")
    other = make_scheme(Keeps(), seed=1)
    load_weights(other.deployed, tmp_path / "weights")
    other.eval()
    assert torch.equal(other.deployed(images).logits, kept.deployed(images).logits)


def test_right_answers_are_those_of_the_deployed_logits(kept):
    batch = a_batch()
    phase = kept.phases()[-1]
    kept.set_modes(phase)
    counts = kept.losses(phase, kept.turns(phase)[0], batch, None).counts
    student = Keeps.seen[-1][0]
    expected = (kept.adapters["head"](student.embedding).argmax(dim=1) == batch.labels).sum()
    assert counts["correct"] == expected


def test_the_clock_is_set_at_every_epoch_of_every_phase_and_images_are_named(kept):
    bank = make_bank(*pictures(), padding=1)
    training = make_training(kept, make_recipe(epochs=4))
    Keeps.seen.clear()
    training.run()
    times = [(epoch, epochs) for _, _, epoch, epochs in Keeps.seen]
    assert times == [(epoch, 2) for epoch in range(2) for _ in range(3)] + [
        (epoch, 4) for epoch in range(4) for _ in range(3)
    ]
    first_epoch = torch.cat([student.indices for student, *_ in Keeps.seen[:3]])
    assert sorted(first_epoch.tolist()) == list(range(len(bank)))
    student, teacher, *_ = Keeps.seen[0]
    assert torch.equal(student.indices, teacher.indices)
    assert student.network is kept.student and teacher.network is kept._teacher[0]


def test_weight_decay_leaves_marked_parameters_alone(kept):
    training = make_training(kept, make_recipe(epochs=2, weight_decay=0.5))
    training.run()
    assert torch.equal(kept.adapters["free"].rho, torch.ones(2, dtype=torch.float64))


def test_an_odd_last_batch_that_is_too_small_is_refused_before_training(kept):
    with pytest.raises(ValueError, match="batches of 7 leave a last one of 1 of the 22 training images"):
        make_training(kept, make_recipe(batch=7))
    make_training(kept, make_recipe(batch=19))


@torch.no_grad()
def test_an_untracked_norm_answers_as_the_usual_one_and_keeps_nothing():
    x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 + 1
    norm, usual = nn.BatchNorm2d(3, eps=0.5), nn.BatchNorm2d(3, eps=0.5)
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    with untracked(nn.Sequential(norm)):
        torch.testing.assert_close(norm(x), usual(x), rtol=0, atol=0)
    assert all(torch.equal(before[name], tensor) for name, tensor in norm.state_dict().items())
    norm(x)
    assert torch.equal(norm.running_mean, usual.running_mean) and norm.num_batches_tracked == 1
    with untracked(norm.eval()):
        torch.testing.assert_close(norm(x), usual.eval()(x), rtol=0, atol=0)


# beginnings, costs, and schemes without a teacher of their own


def a_cast(*teachers, build=None) -> Cast:
    return Cast(build or (lambda name: tiny_net(0)), "student", teachers=teachers)


def test_a_cast_gives_its_one_teacher_or_all_as_one():
    with pytest.raises(ValueError, match="this scheme needs a trained teacher, and the run has none"):
        a_cast().teacher()
    first, second = tiny_teacher(), tiny_net(8)
    assert a_cast(first).teacher() is first
    together = a_cast(first, second).teacher().eval()
    images = a_batch().images
    mean = (first.eval()(images).logits.softmax(dim=1) + second.eval()(images).logits.softmax(dim=1)) / 2
    torch.testing.assert_close(together(images).logits.exp(), mean, rtol=1e-12, atol=1e-12)


def test_a_cast_builds_the_student_by_its_name_and_each_time_anew():
    asked = []
    cast = a_cast(build=lambda name: asked.append(name) or tiny_net(len(asked)))
    assert not torch.equal(cast.student().stem.weight, cast.student().stem.weight)
    assert asked == ["student", "student"]


@pytest.mark.parametrize("size", [1, 4, 6, 100])
def test_a_sample_is_of_the_first_plain_images(size):
    bank = make_bank(*pictures(6), padding=2)
    sample = sample_batch(bank, size)
    count = min(size, 6)
    assert torch.equal(sample.images, next(bank.plain(6))[:count]) and torch.equal(sample.strong, sample.images)
    assert torch.equal(sample.labels, bank.labels[:count]) and sample.indices.tolist() == list(range(count))
    assert torch.equal(sample.census, bank.labels) and sample.others == ()


@pytest.mark.parametrize(
    ("names", "networks"),
    [
        (("student", "adapters"), ["student"]),
        (("student.stem", "student.stages.0", "adapters.regressor"), ["student"]),
        (("adapters.regressor",), []),
        (("peers.0", "peers.1.stages.2", "peers.1.stem", "adapters.0_1"), ["peers.0", "peers.1"]),
        (("generator", "student"), ["generator", "student"]),
        (("peers.10", "peers.1"), ["peers.10", "peers.1"]),
    ],
)
def test_networks_that_are_trained_are_told_from_their_parts_and_from_adapters(names, networks):
    assert make_scheme(Plain()).trained_networks(names) == networks


def test_a_phase_costs_a_pass_for_every_step_and_network():
    scheme = make_scheme(Plain())
    turns = (Turn("one", ("generator",), times=3), Turn("two", ("student", "adapters", "peers.1", "peers.1.stem")))
    scheme.turns = lambda phase: turns
    assert scheme.passes(scheme.phases()[0]) == 3 + 2
    assert make_scheme(VanillaKD()).passes(make_scheme(VanillaKD()).phases()[0]) == 1


def test_a_network_that_teaches_itself_is_one_alone_of_another_family():
    spy = spying_on("logits", "maps")
    scheme = SelfTaught.assemble(a_cast(), spy, a_batch(), NoOptions())
    assert (SelfTaught.family, SelfTaught.needs_teacher, scheme.role) == ("self", False, "student")
    terms = step(scheme, scheme.phases()[0])
    student, teacher = spy.seen[-1]
    assert torch.equal(student.maps[0], teacher.maps[0]) and not teacher.maps[0].requires_grad
    assert terms["kd"].item() == 0 and scheme.deployed is scheme.student


def test_a_committee_answers_with_the_mean_of_probabilities_and_is_not_trained():
    networks = [tiny_teacher(), tiny_net(8), tiny_net(9)]
    before = [clone(network.state_dict()) for network in networks]
    scheme = Committee.assemble(a_cast(*networks), VanillaKD(), a_batch(), NoOptions())
    assert make_training(scheme, make_recipe()).run() == [] and scheme.phases() == ()
    assert [difference(clone(n.state_dict()), b) for n, b in zip(networks, before, strict=True)] == [None] * 3
    images = a_batch().images
    mean = sum(network.eval()(images).logits.softmax(dim=1) for network in networks) / 3
    torch.testing.assert_close(scheme.deployed.eval()(images).logits.exp(), mean, rtol=1e-12, atol=1e-12)
    assert scheme.role == "committee" and scheme.further() == {}
    with pytest.raises(RuntimeError, match="not trained"):
        scheme.losses(None, None, a_batch(), None)


def test_a_look_that_fails_leaves_batch_norms_tracking():
    norm = nn.BatchNorm2d(2)
    with pytest.raises(ZeroDivisionError), untracked(nn.Sequential(norm), norm):
        raise ZeroDivisionError
    assert norm.track_running_stats
    never = nn.BatchNorm2d(2, track_running_stats=False)
    with untracked(never):
        pass
    assert not never.track_running_stats
