"""Schemes whose student sees no real image: who moves when, on which images, and that no real one is among them."""

import itertools
import math

import pytest
import torch
import toy
from torch import Tensor, nn
from toy import (
    CPU,
    IMAGES,
    MEAN,
    PADDING,
    STD,
    clone,
    difference,
    ends_alike_if_stopped,
    make_bank,
    make_recipe,
    pictures,
    run_session,
    tiny_net,
    tiny_teacher,
)

from kdstudy.contrast import CRD
from kdstudy.core import Method
from kdstudy.data import BlankBank, ImageBank
from kdstudy.data_free import DataImpressions, ZeroShotTransfer
from kdstudy.ensembles import AveragedTeachers
from kdstudy.logits import MultiLevel
from kdstudy.models import Ensemble
from kdstudy.response import SphericalKD, VanillaKD
from kdstudy.schemes import Batch, Cast, Offline, sample_batch
from kdstudy.synthetic import (
    ImpressionOptions,
    Impressions,
    Munged,
    MungeOptions,
    ZeroShot,
    ZeroShotOptions,
)
from kdstudy.train import Surroundings, Training

SIDES = (8, 4)
BATCHES = math.ceil(IMAGES / 8)  # of an epoch
FEW = ImpressionOptions(count=10, batch=4, iterations=3, learning_rate=0.05)  # the last batch is odd
MIXED = MungeOptions(components=20)
OPTIONS = {ZeroShot: ZeroShotOptions(batch=8), Impressions: FEW, Munged: MIXED, Offline: None}
SCHEMES = {
    "zero_shot": lambda **own: make(
        ZeroShot, ZeroShotTransfer(), options=ZeroShotOptions(batch=8, student_steps=2), **own
    ),
    "impressions": lambda **own: make(Impressions, DataImpressions(), options=FEW, **own),
    "munged": lambda **own: make(Munged, VanillaKD(), options=MIXED, **own),
}
every_scheme = pytest.mark.parametrize("name", SCHEMES)


def real_bank(padding: int = PADDING) -> ImageBank:
    return make_bank(*pictures(size=SIDES), padding=padding)


def blank_bank(padding: int = PADDING) -> BlankBank:
    return BlankBank(IMAGES, (3, *SIDES), mean=MEAN, std=STD, padding=padding, device=CPU, dtype=torch.float64)


def bank_for(cls: type) -> ImageBank | BlankBank:
    return blank_bank() if cls.data_free else real_bank()


def make(cls: type, method: Method, *, seed: int = 0, teacher: nn.Module | None = None, options=None, student=None):
    """A scheme on tiny networks, with the images that such a run is given."""
    teachers = [teacher or tiny_teacher()]
    cast = Cast(lambda name: student or tiny_net(seed), "student", teachers=teachers)
    torch.manual_seed(seed)
    return cls.assemble(cast, method, sample_batch(bank_for(cls), 8), options or OPTIONS[cls])


def make_training(scheme, recipe, *, seed=0, device=CPU, bank=None, **surroundings) -> Training:
    watch = {name: make_bank(*pictures(30, size=SIDES, seed=k)) for k, name in enumerate(("test", "held_out"), 1)}
    bank = bank_for(type(scheme)) if bank is None else bank
    return Training(scheme, recipe, bank, seed=seed, watch=watch, surroundings=Surroundings(**surroundings))


@pytest.fixture(autouse=True)
def sides_that_a_generator_can_make(monkeypatch):
    monkeypatch.setattr(toy, "make_training", make_training)


def teacher_of(scheme) -> nn.Module:
    (teacher,) = scheme._teacher
    return teacher


def networks(scheme) -> dict[str, nn.Module]:
    """All that has weights, or images that are moved like weights."""
    own = {name: module for name, module in scheme.named_children() if any(True for _ in module.parameters())}
    return own | {"teacher": teacher_of(scheme)}


def inputs(network: nn.Module, into: list) -> None:
    """Note every input of a network, and whether it is in train mode."""
    network.register_forward_pre_hook(lambda module, given: into.append((given[0].detach().clone(), module.training)))


class Steps:
    """Every optimiser step of a run: the turn, what moved by it, learning rate and gradient norm."""

    def __init__(self, scheme, recipe, monkeypatch, **options):
        self.moved, self.turns, self.rates, self.norms = [], [], [], []
        training = make_training(scheme, recipe, **options)
        parts = networks(scheme)

        def watched(kind):
            usual = kind.step

            def step(optimiser, *arguments, **named):
                before = {name: clone(dict(part.named_parameters())) for name, part in parts.items()}
                (self.turn,) = (name for name, each in training.current.optimisers.items() if each is optimiser)
                parameters = [p for group in optimiser.param_groups for p in group["params"]]
                self.norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in parameters)))
                self.rates.append(optimiser.param_groups[0]["lr"])
                self.turns.append(self.turn)
                done = usual(optimiser, *arguments, **named)
                after = {name: clone(dict(part.named_parameters())) for name, part in parts.items()}
                self.moved.append({name for name in parts if difference(before[name], after[name])})
                return done

            monkeypatch.setattr(kind, "step", step)

        for kind in (torch.optim.Adam, torch.optim.SGD):
            watched(kind)
        self.history = training.run()


# no real image


def crops(bank: ImageBank) -> Tensor:
    """Every crop of every image, mirrored or not, (N, C, H, W)."""
    shifts = itertools.product(range(2 * PADDING + 1), repeat=2)
    every = torch.arange(len(bank))
    found = []
    for shift, flip in itertools.product(shifts, (False, True)):
        moved = torch.tensor(shift).expand(len(bank), 2)
        found.append(bank.augmented(every, moved, torch.full((len(bank),), flip)))
    return torch.cat(found)


def real_images_seen(scheme, **options) -> int:
    """How many real images its networks, but the teacher, are shown in a run; evaluation is on others."""
    real, count = crops(real_bank()), 0

    def compare(network, given):
        nonlocal count
        if given[0].ndim == 4:
            count += (torch.cdist(given[0].flatten(1), real.flatten(1)) < 1e-3).any(dim=1).sum().item()

    for name, network in networks(scheme).items():
        if name != "teacher":
            network.register_forward_pre_hook(compare)
    make_training(scheme, make_recipe(), **options).run()
    return count


@every_scheme
def test_no_network_but_the_teacher_sees_a_real_image(name):
    assert real_images_seen(SCHEMES[name]()) == 0


@pytest.mark.parametrize("name", ["zero_shot", "impressions"])
def test_they_would_not_even_if_they_were_given_some(name):
    assert real_images_seen(SCHEMES[name](), bank=real_bank()) == 0


def test_real_images_are_found_where_there_are_some():
    assert real_images_seen(make(Offline, VanillaKD()), bank=real_bank()) == 3 * IMAGES
    copied = make(Munged, VanillaKD(), options=MungeOptions(components=96, probability=0.0))
    assert real_images_seen(copied) == 3 * IMAGES


def test_munged_sizes_its_adapters_without_a_real_image():
    student, seen = tiny_net(0), []
    inputs(student, seen)
    make(Munged, VanillaKD(), options=MIXED, student=student)
    assert seen and not any(images.any() for images, _ in seen)


def test_what_is_known_of_the_training_images():
    assert [cls.data_free for cls in (ZeroShot, Impressions, Munged)] == [True, True, False]
    assert {cls.family for cls in (ZeroShot, Impressions, Munged)} == {"data_free"}


# all of them


@every_scheme
def test_the_teacher_is_never_touched(name):
    teacher, seen = tiny_teacher(), []
    before = clone(teacher.state_dict())
    inputs(teacher, seen)
    make_training(SCHEMES[name](teacher=teacher), make_recipe()).run()
    assert difference(clone(teacher.state_dict()), before) is None
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert seen and not any(training for _, training in seen)


@every_scheme
def test_a_stopped_run_ends_as_one_that_is_not(name, tmp_path):
    ends_alike_if_stopped(SCHEMES[name], (1, 2, 3, 4, 6, -1), tmp_path)


@every_scheme
def test_runs_are_their_seeds(name):
    one, again = (run_session(SCHEMES[name](), make_recipe()).outcome for _ in range(2))
    assert difference(one, again) is None
    other = run_session(SCHEMES[name](seed=1), make_recipe(), seed=1).state
    assert not torch.equal(other["student.layer.weight"], one["state"]["student.layer.weight"])


@every_scheme
def test_the_student_alone_is_deployed(name):
    scheme = SCHEMES[name]()
    assert scheme.deployed is scheme.student


@every_scheme
@pytest.mark.parametrize("method", [VanillaKD(), AveragedTeachers(), ZeroShotTransfer(attention_weight=0.0)])
def test_any_method_and_several_teachers_can_be_used(name, method):
    teacher = Ensemble([tiny_teacher(), tiny_net(7)])
    scheme = make(type(SCHEMES[name]()), method, teacher=teacher)
    assert math.isfinite(make_training(scheme, make_recipe(epochs=1)).run()[-1]["kd"])


@every_scheme
@pytest.mark.parametrize(
    ("method", "message"),
    [
        (SphericalKD(), "SphericalKD measures the training images before training"),
        (CRD(), "CRD .* made-up images do not have|CRD measures"),
    ],
)
def test_methods_that_need_the_real_images_are_refused(name, method, message):
    with pytest.raises(ValueError, match=message):
        make(type(SCHEMES[name]()), method)


def test_strong_augmentation_of_generated_images_is_refused_and_of_munged_ones_is_not():
    with pytest.raises(ValueError, match="MultiLevel reads strong, which made-up images do not have"):
        make(ZeroShot, MultiLevel())
    for scheme in (make(Munged, MultiLevel(), options=MIXED), make(Impressions, MultiLevel(), options=FEW)):
        assert math.isfinite(make_training(scheme, make_recipe(epochs=1)).run()[-1]["kd"])


# zero-shot transfer


@pytest.mark.parametrize(("generator_steps", "student_steps"), [(1, 10), (3, 2)])
def test_generator_and_student_alternate_and_each_step_moves_its_own_network_alone(
    generator_steps, student_steps, monkeypatch
):
    options = ZeroShotOptions(batch=8, generator_steps=generator_steps, student_steps=student_steps)
    steps = Steps(make(ZeroShot, ZeroShotTransfer(), options=options), make_recipe(epochs=2), monkeypatch)
    pseudo_batch = ["generator"] * generator_steps + ["student"] * student_steps
    assert steps.turns == pseudo_batch * 2 * BATCHES
    assert steps.moved == [{turn} for turn in steps.turns]


def test_learning_rates_fall_along_one_cosine_over_the_pseudo_batches(monkeypatch):
    options = ZeroShotOptions(batch=8, generator_steps=2, student_steps=3)
    steps = Steps(make(ZeroShot, ZeroShotTransfer(), options=options), make_recipe(epochs=2), monkeypatch)
    for turn, rate, times in (("generator", 1e-3, 2), ("student", 2e-3, 3)):
        found = [x for x, name in zip(steps.rates, steps.turns, strict=True) if name == turn]
        expected = [rate * (1 + math.cos(math.pi * k / (2 * BATCHES))) / 2 for k in range(2 * BATCHES)]
        assert found == pytest.approx([x for x in expected for _ in range(times)])


def test_gradients_of_both_are_cut_off_and_nothing_decays(monkeypatch):
    options = ZeroShotOptions(batch=8, student_steps=2, clip=1e-3)
    scheme = make(ZeroShot, ZeroShotTransfer(), options=options)
    (phase,) = make(ZeroShot, ZeroShotTransfer()).phases()
    assert phase.recipe["clip"] == 5.0 and phase.recipe["weight_decay"] == 0.0
    steps = Steps(scheme, make_recipe(epochs=1), monkeypatch)
    for turn in ("generator", "student"):
        norms = [norm for norm, name in zip(steps.norms, steps.turns, strict=True) if name == turn]
        assert max(norms) == pytest.approx(1e-3, rel=0.01)


def calls(scheme, steps=1):
    """Inputs and modes of generator, student and teacher in `steps` pseudo-batches, the generator's images beside."""
    noted = {"generator": [], "student": [], "teacher": []}
    for name, network in networks(scheme).items():
        inputs(network, noted[name])
    made = []
    scheme.generator.register_forward_hook(lambda module, given, images: made.append(images.detach().clone()))
    (phase,) = scheme.phases()
    scheme.set_modes(phase)
    batch = next(batches())
    for step in range(steps):
        scheme.begin_step(step)
        for turn in scheme.turns(phase):
            optimiser = torch.optim.SGD(scheme.trained_parameters(turn.trains), lr=0.1)
            for _ in range(turn.times):
                optimiser.zero_grad()
                sum(scheme.losses(phase, turn, batch, None).terms.values()).backward()
                optimiser.step()
    return noted, made


def batches():
    bank = blank_bank()
    while True:
        yield sample_batch(bank, 8)._replace(strong=None, census=None)


def test_a_pseudo_batch_is_one_noise_and_its_images_are_made_once_after_the_generators_steps():
    options = ZeroShotOptions(batch=8, generator_steps=2, student_steps=3)
    noted, made = calls(make(ZeroShot, ZeroShotTransfer(), options=options), steps=2)
    noise = [given for given, _ in noted["generator"]]
    assert len(noise) == len(made) == 6 and noise[0].shape == (8, 100)
    assert all(torch.equal(noise[k], noise[0]) for k in (1, 2))
    assert all(torch.equal(noise[k], noise[3]) for k in (4, 5)) and not torch.equal(noise[3], noise[0])
    student = [given for given, _ in noted["student"]]
    assert len(student) == 2 * (2 + 3)
    assert torch.equal(student[0], made[0]) and torch.equal(student[1], made[1])
    assert all(torch.equal(student[k], made[2]) for k in (2, 3, 4))
    assert not torch.equal(made[2], made[1])  # the generator has moved
    teacher = [given for given, _ in noted["teacher"]]
    assert len(teacher) == 2 * (2 + 1)  # its answer for the student's steps is asked for once
    assert torch.equal(teacher[2], made[2])


def test_a_pseudo_batch_has_a_size_of_its_own_whatever_the_recipe_says():
    scheme, seen = make(ZeroShot, ZeroShotTransfer(), options=ZeroShotOptions(batch=5, student_steps=1)), []
    inputs(scheme.generator, seen)
    make_training(scheme, make_recipe(epochs=1)).run()
    assert [len(noise) for noise, _ in seen[::2]] == [5, 5, 5, 5, 2]  # a generator step, then the student's images


def test_student_and_generator_are_in_train_mode_in_both_turns_and_count_their_batches():
    scheme = make(ZeroShot, ZeroShotTransfer(), options=ZeroShotOptions(batch=8, generator_steps=2, student_steps=3))
    modes = {name: {training for _, training in given} for name, given in calls(scheme)[0].items()}
    assert modes == {"generator": {True}, "student": {True}, "teacher": {False}}
    assert scheme.student.norm.num_batches_tracked == 2 + 3
    assert scheme.generator.layers[-1].num_batches_tracked == 2 + 1


def a_turn(scheme, name):
    (phase,) = scheme.phases()
    scheme.set_modes(phase)
    (turn,) = (turn for turn in scheme.turns(phase) if turn.name == name)
    return lambda: scheme.losses(phase, turn, next(batches()), None)


def test_the_generators_loss_is_the_negative_divergence_and_its_gradient_passes_through_both_networks():
    scheme = make(ZeroShot, ZeroShotTransfer(kd_weight=3.0))
    scheme.begin_step(0)
    losses = a_turn(scheme, "generator")
    (loss,) = losses().terms.values()
    with torch.no_grad():
        images = scheme.generator(scheme._noise)
        q, p = (network(images).logits.softmax(dim=1) for network in (scheme.student, teacher_of(scheme)))
    assert loss.item() == pytest.approx(-(p * (p / q).log()).mean().item(), rel=1e-9)
    bias = scheme.generator.layers[-1].bias
    (slope,) = torch.autograd.grad(loss, bias)
    for channel in range(3):
        values = []
        for move in (1e-6, -2e-6):
            with torch.no_grad():
                bias[channel] += move
            values.append(losses().terms["generator"].item())
        with torch.no_grad():
            bias[channel] += 1e-6
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope[channel].item(), rel=1e-4)


def test_the_students_loss_has_no_way_back_to_the_generator():
    scheme = make(ZeroShot, ZeroShotTransfer())
    scheme.begin_step(0)
    a_turn(scheme, "generator")()
    losses = a_turn(scheme, "student")()
    assert list(losses.terms) == ["kd", "attention"]
    total = sum(losses.terms.values())
    found = torch.autograd.grad(total, list(scheme.generator.parameters()), retain_graph=True, allow_unused=True)
    assert all(gradient is None for gradient in found)
    assert all(gradient.any() for gradient in torch.autograd.grad(total, list(scheme.student.layer.parameters())))


def test_the_student_learns_from_the_teachers_classes_where_a_method_wants_labels():
    scheme = make(ZeroShot, VanillaKD(ce_weight=1.0, kd_weight=0.0))
    seen = []
    inputs(scheme.student, seen)
    scheme.begin_step(0)
    losses = a_turn(scheme, "student")()
    images = seen[0][0]
    labels = teacher_of(scheme)(images).logits.argmax(dim=1)
    logits = scheme.student(images).logits
    assert losses.terms["ce"].item() == pytest.approx(nn.functional.cross_entropy(logits, labels).item())
    assert losses.counts["correct"] == (logits.argmax(dim=1) == labels).sum()


def test_half_precision_is_for_the_networks_alone():
    scheme = make(ZeroShot, ZeroShotTransfer()).float()
    teacher_of(scheme).float()
    batch = next(batches())
    batch = batch._replace(images=batch.images.float())
    (phase,) = scheme.phases()
    scheme.set_modes(phase)
    for turn in scheme.turns(phase):
        for term in scheme.losses(phase, turn, batch, torch.bfloat16).terms.values():
            assert term.dtype == torch.float32 and term.isfinite()


# data impressions


def made_by(options: ImpressionOptions = FEW, **own) -> Impressions:
    """The scheme after its first phase, stopped there."""
    scheme = make(Impressions, DataImpressions(), options=options, **own)
    run_session(scheme, make_recipe(), stop_after=math.ceil(options.count / options.batch))
    return scheme


def test_images_are_made_first_and_alone_then_the_student_learns(monkeypatch):
    steps = Steps(make(Impressions, DataImpressions(), options=FEW), make_recipe(epochs=2), monkeypatch)
    looks = 3 * (FEW.iterations + 1)
    assert steps.turns == ["impressions"] * looks + ["distil"] * 4
    assert steps.moved == [{"canvas"}] * looks + [{"student"}] * 4
    assert steps.rates[:looks] == [0.05] * looks
    assert [row["phase"] for row in steps.history] == ["impressions", "distil", "distil"]


def test_the_students_first_state_is_not_touched_while_images_are_made():
    made, new = made_by(), make(Impressions, DataImpressions(), options=FEW)
    assert difference(clone(made.student.state_dict()), clone(new.student.state_dict())) is None


def looks_of(options: ImpressionOptions, count: int) -> list[Tensor]:
    """What the teacher is shown while images are made, on the 0..1 scale."""
    scheme, seen = make(Impressions, DataImpressions(), options=options), []
    inputs(teacher_of(scheme), seen)
    run_session(scheme, make_recipe(), stop_after=count)
    mean, std = (torch.tensor(x, dtype=torch.float64).view(-1, 1, 1) for x in (MEAN, STD))
    return [(images * std + mean) / 255 for images, _ in seen]


def test_the_teacher_is_shown_images_of_0_to_1_that_begin_as_noise_and_move_by_a_learning_rate():
    looks = looks_of(FEW, 3)
    assert [len(images) for images in looks] == [4] * 8 + [2] * 4
    for images in looks:
        flat = images.flatten(1)
        torch.testing.assert_close(flat.amin(dim=1), torch.zeros(len(flat)).double(), atol=1e-12, rtol=0)
        torch.testing.assert_close(flat.amax(dim=1), torch.ones(len(flat)).double(), atol=1e-12, rtol=0)
    many = looks_of(ImpressionOptions(count=IMAGES, batch=IMAGES, iterations=1), 1)[0]
    assert many.mean().item() == pytest.approx(0.5, abs=0.03)
    assert many.var().item() == pytest.approx(1 / 12, abs=0.01)
    assert (looks[4] - looks[0]).abs().mean() > 0.1  # each batch from noise of its own
    assert 0 < (looks[1] - looks[0]).abs().mean() < 0.1


def test_moments_are_forgotten_between_batches(monkeypatch):
    """Adam's first step has the length of the learning rate everywhere, whatever the gradient; its second has not."""
    options = ImpressionOptions(count=10, batch=4, iterations=3, learning_rate=0.05, temperature=1.0)
    scheme, moves = make(Impressions, DataImpressions(), options=options), []
    (canvas,), usual = scheme.canvas, torch.optim.Adam.step

    def step(optimiser, *arguments):
        before = canvas.detach().clone()
        usual(optimiser, *arguments)
        moves.append((canvas.detach() - before).abs()[:2])  # the last batch has two

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    make_training(scheme, make_recipe(epochs=1)).run()
    lengths = [move.median().item() for move in moves]
    assert [length == pytest.approx(0.05, rel=1e-4) for length in lengths] == [True, False, False, False] * 3


def test_finished_images_are_kept_with_the_teachers_class_as_it_last_saw_them():
    scheme, seen = make(Impressions, DataImpressions(), options=FEW), []
    inputs(teacher_of(scheme), seen)
    run_session(scheme, make_recipe(), stop_after=3)
    mean, std = (torch.tensor(x, dtype=torch.float64).view(-1, 1, 1) for x in (MEAN, STD))
    last = torch.cat([seen[k][0] for k in (3, 7, 11)])
    kept = scheme.images.permute(0, 3, 1, 2).double()
    distances = torch.cdist((last * std + mean).flatten(1), kept.flatten(1), p=math.inf)
    place = distances.argmin(dim=1)
    assert sorted(place.tolist()) == list(range(10)) and distances.amin(dim=1).max() < 0.51
    assert torch.equal(scheme.labels[place], teacher_of(scheme)(last).logits.argmax(dim=1))


def test_targets_are_drawn_by_the_seed_of_the_run():
    one, again, other = (make(Impressions, DataImpressions(), options=FEW, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.targets, again.targets) and not torch.equal(one.targets, other.targets)


def far_off(iterations: int, **changes) -> float:
    """The mean cross-entropy of the teacher's softened answers for kept images with what was drawn for them."""
    options = ImpressionOptions(
        count=24, batch=12, iterations=iterations, learning_rate=0.05, temperature=1.0, **changes
    )
    scheme = made_by(options)
    bank = make_bank(scheme.images.numpy(), scheme.labels)
    answers = teacher_of(scheme)(next(bank.plain(24))).logits.log_softmax(dim=1)
    return -(scheme.targets * answers).sum(dim=1).mean().item()


def test_answers_come_closer_to_their_own_targets_with_more_iterations():
    values = [far_off(iterations) for iterations in (1, 10, 60)]
    assert values[0] > values[1] > values[2]


def test_the_loss_is_the_cross_entropy_at_the_temperature_of_each_images_own_target():
    scheme = make(Impressions, DataImpressions(), options=FEW)
    phase = scheme.phases()[0]
    scheme.bank(phase, blank_bank())
    scheme.begin_step(0)
    (turn,) = scheme.turns(phase)
    indices = torch.tensor([7, 2, 5])
    seen = []
    inputs(teacher_of(scheme), seen)
    losses = scheme.losses(phase, turn, Batch(torch.zeros(3), torch.zeros(3), indices), None)
    answers = (teacher_of(scheme)(seen[0][0]).logits / 20).softmax(dim=1)
    expected = -(scheme.targets[indices] * answers.log()).sum(dim=1).mean()
    assert losses.terms["impressions"].item() == pytest.approx(expected.item())
    assert losses.counts["correct"] == (answers.argmax(dim=1) == scheme.targets[indices].argmax(dim=1)).sum()


def test_the_student_sees_crops_of_the_impressions_and_the_classes_kept_with_them():
    scheme = made_by()
    phase = scheme.phases()[-1]
    bank = scheme.bank(phase, blank_bank())
    assert isinstance(bank, ImageBank) and len(bank) == FEW.count and bank.padding == PADDING
    expected = make_bank(scheme.images.numpy(), scheme.labels)
    torch.testing.assert_close(next(bank.plain(10)), next(expected.plain(10)))
    assert torch.equal(bank.labels, scheme.labels)
    seen = []
    inputs(scheme.student, seen)
    make_training(scheme, make_recipe(epochs=1)).run()
    remade = crops(scheme.bank(phase, blank_bank())).flatten(1)
    shown = torch.cat([images for images, training in seen if training]).flatten(1)
    assert len(shown) == FEW.count and torch.cdist(shown, remade).amin(dim=1).max() < 1e-6


# munged images


def munged(options: MungeOptions = MIXED, **own) -> tuple[Munged, ImageBank]:
    scheme = make(Munged, VanillaKD(), options=options, **own)
    return scheme, scheme.bank(scheme.phases()[0], real_bank())


def as_pixels(bank: ImageBank) -> Tensor:
    mean, std = (torch.tensor(x, dtype=torch.float64).view(-1, 1, 1) for x in (MEAN, STD))
    return torch.cat(list(bank.plain(7))) * std + mean


def test_there_are_as_many_munged_images_as_passes_say_with_the_teachers_classes():
    scheme, bank = munged(MungeOptions(components=20, passes=3))
    assert len(bank) == 3 * IMAGES and bank.padding == PADDING
    answers = torch.cat([teacher_of(scheme)(images).logits for images in bank.plain(9)])
    assert torch.equal(bank.labels, answers.argmax(dim=1))
    pixels = as_pixels(bank)
    torch.testing.assert_close(pixels, pixels.round().clamp(0, 255), atol=1e-6, rtol=0)


def test_without_an_exchange_the_images_are_the_real_ones_as_their_components_show_them():
    exact = munged(MungeOptions(components=96, probability=0.0))[1]
    torch.testing.assert_close(as_pixels(exact), as_pixels(real_bank()), atol=1e-6, rtol=0)
    few = as_pixels(munged(MungeOptions(components=5, probability=0.0))[1])
    assert (few - as_pixels(real_bank())).abs().mean() > 5


def test_they_are_made_once_and_are_the_seeds():
    scheme, bank = munged()
    assert scheme.bank(scheme.phases()[0], real_bank()) is bank
    assert torch.equal(as_pixels(bank), as_pixels(munged()[1]))
    assert not torch.equal(as_pixels(bank), as_pixels(munged(seed=1)[1]))


def test_a_resumed_run_munges_as_the_one_that_was_stopped():
    scheme, other = make(Munged, VanillaKD(), options=MIXED), make(Munged, VanillaKD(), options=MIXED, seed=1)
    other.load_state_dict(scheme.state_dict())
    pixels = [as_pixels(each.bank(each.phases()[0], real_bank())) for each in (scheme, other)]
    assert torch.equal(*pixels)


# wrong use


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        (ZeroShotOptions, "batch", 0),
        (ZeroShotOptions, "noise", 0),
        (ZeroShotOptions, "generator_steps", 0),
        (ZeroShotOptions, "student_steps", 1.5),
        (ZeroShotOptions, "generator_rate", 0.0),
        (ZeroShotOptions, "student_rate", -1.0),
        (ZeroShotOptions, "clip", -1.0),
        (ImpressionOptions, "count", 0),
        (ImpressionOptions, "batch", 0),
        (ImpressionOptions, "iterations", 0),
        (ImpressionOptions, "learning_rate", 0.0),
        (ImpressionOptions, "temperature", 0.0),
        (MungeOptions, "components", 0),
        (MungeOptions, "passes", 0),
        (MungeOptions, "probability", 1.5),
        (MungeOptions, "local_variance", 0.0),
    ],
)
def test_a_bad_option_is_named(options, field, value):
    with pytest.raises(ValueError, match=rf"{field} must be"):
        options(**{field: value})


def test_a_run_without_a_teacher_is_refused():
    cast = Cast(lambda name: tiny_net(0), "student")
    with pytest.raises(ValueError, match="needs a trained teacher"):
        ZeroShot.assemble(cast, ZeroShotTransfer(), sample_batch(blank_bank(), 8), ZeroShotOptions())
