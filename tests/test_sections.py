"""Methods that run parts of one network on the other's maps: reference values, literal sums, and what must not move."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from batches import TOLERANCE, batch_a, oracles, total_of
from torch import Tensor, nn
from toy import (
    CLASSES,
    clone,
    difference,
    ends_alike_if_stopped,
    make_recipe,
    make_scheme,
    make_training,
    unsettled,
)

from kdstudy.core import Clock, View
from kdstudy.models import build_model
from kdstudy.schemes import Batch, look
from kdstudy.sections import LIT, AdaIN, JointRD, adaptive_instance_norm, statistics_loss

precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
MAP_S, MAP_T = [[[[1, 2], [0, 1]], [[0, 1], [2, 1]]]], [[[[2, 0], [1, 1]], [[1, 1], [0, 3]]]]
NETWORKS = {  # student and teacher
    "lit": (LIT(), "resnet8x0.25", "resnet14x0.25"),
    "lit of wide networks": (LIT(), "wrn_10_0.25", "wrn_16_0.25"),
    "adain": (AdaIN(), "resnet8x0.25", "wrn_10_0.5"),
    "joint": (JointRD(), "plain8x0.25", "resnet8x0.5"),
}
every_run = pytest.mark.parametrize("run", NETWORKS)


def network(name: str, seed: int = 0, size: int | tuple[int, int] = (6, 5), classes: int = CLASSES) -> nn.Module:
    """A float64 network in eval mode whose batch norms are no longer the identity."""
    torch.manual_seed(seed)
    return unsettled(build_model(name, classes=classes, image_size=size).double().eval())


def batch(size: int | tuple[int, int] = (6, 5)) -> Batch:
    sides = (size, size) if isinstance(size, int) else size
    images = torch.randn(4, 3, *sides, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Batch(images, torch.tensor([0, 1, 2, 1]))


def views(method, student: str, teacher: str, size: int | tuple[int, int] = (6, 5)) -> tuple[View, View, nn.ModuleDict]:
    """Both views of a batch, with a graph for the student's only, and the method's adapters in eval mode."""
    own = look(network(student, 1, size), batch(size), method.reads, None)
    with torch.no_grad():
        theirs = look(network(teacher, 2, size).requires_grad_(False), batch(size), method.reads, None)
    torch.manual_seed(3)
    return own, theirs, method.adapters(own, theirs).double().eval()


def scheme_of(run: str):
    method, student, teacher = NETWORKS[run]
    return make_scheme(method, student=network(student, 1), teacher=network(teacher, 2))


def tensor(values, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def mean_square(one: Tensor, other: Tensor) -> float:
    pairs = zip(one.flatten().tolist(), other.flatten().tolist(), strict=True)
    return math.fsum((a - b) ** 2 for a, b in pairs) / one.numel()


def with_map(teacher: nn.Module, stage: int, stage_map: Tensor, images: Tensor) -> View:
    """What a network shows for the images when the map of one stage (from 1) is another."""
    found = teacher.stages[stage - 1]
    last = found[-1] if isinstance(found, nn.Sequential) else found
    hook = found.register_forward_hook(lambda module, inputs, output: last.leave(stage_map))
    try:
        return teacher(images)
    finally:
        hook.remove()


# ---- what holds for all


@every_run
def test_teacher_statistics_do_not_move_though_gradient_passes_through_its_stages(run):
    scheme = scheme_of(run)
    (teacher,) = scheme._teacher
    before = clone(teacher.state_dict())

    def on_step(*_):
        assert not any(module.training for module in teacher.modules())

    make_training(scheme, make_recipe(), on_step=on_step).run()
    assert difference(clone(teacher.state_dict()), before) is None
    assert all(parameter.grad is None for parameter in teacher.parameters())


@every_run
def test_the_student_trains_in_train_mode_in_every_epoch(run):
    scheme, modes = scheme_of(run), []

    def on_step(*_):
        modes.append({module.training for module in scheme.student.stages.modules()})

    make_training(scheme, make_recipe(), on_step=on_step).run()
    assert modes == [{True}] * 9


@every_run
def test_stopped_and_resumed_equals_uninterrupted(run, tmp_path):
    ends_alike_if_stopped(lambda: scheme_of(run), (1, 4, -1), tmp_path)


@pytest.mark.parametrize("method", [AdaIN(), JointRD(margin_weight=0)], ids=str)
@pytest.mark.parametrize("weight", ["ce", "kd"])
def test_a_weight_of_zero_leaves_its_term_out(method, weight):
    own, theirs, adapters = views(method, "resnet8x0.25", "resnet8x0.25")
    terms = replace(method, **{f"{weight}_weight": 0.0}).objective(own, theirs, batch().labels, adapters)
    assert set(terms) == {"ce", "kd"} - {weight}


@pytest.mark.parametrize("method", [LIT(), AdaIN(), JointRD()], ids=str)
@pytest.mark.parametrize(
    ("student", "size"), [("resnet18", 8), ("swish_student", 32)], ids=["four residual", "four plain"]
)
def test_another_number_of_stages_is_refused(method, student, size):
    with pytest.raises(ValueError, match="equally many stages, at least one, not 4 and 3"):
        views(method, student, "resnet8", size)


@pytest.mark.parametrize("method", [LIT(), JointRD()], ids=str)
def test_maps_of_other_sides_are_refused(method):
    own, theirs, _ = views(method, "resnet8x0.25", "resnet8x0.25")
    smaller = theirs._replace(maps=tuple(stage_map[..., :-1] for stage_map in theirs.maps))
    with pytest.raises(ValueError, match="equal sides, but stage 1 has 6 x 5 and 6 x 4 pixels"):
        method.adapters(own, smaller)


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        *((LIT, "temperature", value) for value in (0, -1.0, math.inf)),
        *((LIT, "section_weight", value) for value in (-0.1, 1.1, math.nan)),
        *((AdaIN, "tail_weight", value) for value in (-1, math.nan)),
        *((JointRD, "margin_weight", value) for value in (-1e-3, math.inf)),
        *((JointRD, "floor", value) for value in (-0.1, 1.5)),
        *((JointRD, "decay_share", value) for value in (0, -0.3)),
    ],
)
def test_hyperparameters_out_of_range_are_refused(method, field, value):
    with pytest.raises(ValueError, match=rf"^{field} must be .*not {value!r}"):
        method(**{field: value})


# ---- LIT


class Repeats(nn.Module):
    """Answers every stage with the same map."""

    def __init__(self, answer: Tensor):
        super().__init__()
        self.answer = answer

    def section(self, number: int, before: Tensor) -> Tensor:
        return self.answer


@precisions
def test_lit_is_the_oracles(dtype):
    student, teacher, labels = batch_a(dtype)
    target = tensor(MAP_T, dtype)
    student = student._replace(network=Repeats(tensor(MAP_S, dtype)))
    teacher = teacher._replace(stem=torch.zeros_like(target), maps=(target,))
    total = sum(LIT().match_sections(student, teacher, labels, nn.ModuleDict()).values())
    assert total.dtype == dtype and total.shape == ()
    assert total.item() == pytest.approx(oracles()["lit_total_b.75"], abs=TOLERANCE[dtype])
    assert total_of(LIT(), student, teacher, labels).item() == pytest.approx(
        oracles()["lit_kd_a.95_T6"], abs=TOLERANCE[dtype]
    )


def test_lit_adds_up_its_stages_each_behind_the_teachers_map():
    own, theirs, _ = views(LIT(), "resnet8x0.25", "resnet14x0.25")
    own.network.train()
    expected, before = 0.0, theirs.stem
    for (block,), after in zip(own.network.stages, theirs.maps, strict=True):  # one block a stage
        first, norm, _, last, last_norm = [m for m in block.branch.modules() if not list(m.children())]
        x = F.relu(batch_norm(F.conv2d(before, first.weight, stride=first.stride, padding=1), norm))
        x = batch_norm(F.conv2d(x, last.weight, padding=1), last_norm)
        kept = before
        if not isinstance(block.shortcut, nn.Identity):
            convolution, shortcut_norm = block.shortcut
            kept = batch_norm(F.conv2d(before, convolution.weight, stride=convolution.stride), shortcut_norm)
        expected += mean_square(F.relu(x + kept), after)
        before = after
    assert LIT().section_loss(own, theirs).item() == pytest.approx(expected, rel=1e-10)


def batch_norm(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """By the statistics of the batch."""
    mean = x.mean(dim=(0, 2, 3), keepdim=True)
    spread = ((x - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True) + norm.eps
    return (x - mean) / spread**0.5 * norm.weight[:, None, None] + norm.bias[:, None, None]


def test_a_stage_of_lit_learns_nothing_from_the_others():
    own, theirs, _ = views(LIT(), "resnet8x0.25", "resnet14x0.25")
    stages = [list(stage.parameters()) for stage in own.network.stages]

    def gradients(teacher: View) -> list[list[Tensor]]:
        parameters = [parameter for stage in stages for parameter in stage]
        found = iter(torch.autograd.grad(LIT().section_loss(own, teacher), parameters))
        return [[next(found) for _ in stage] for stage in stages]

    plain = gradients(theirs)
    first, second, third = theirs.maps
    for maps, touched in (((first, second, third + 1), [2]), ((first + 1, second, third), [0, 1])):
        changed = gradients(theirs._replace(maps=maps))
        same = [all(map(torch.equal, *pair)) for pair in zip(plain, changed, strict=True)]
        assert [stage for stage in range(3) if not same[stage]] == touched
    unused = [*own.network.stem.parameters(), *own.network.classifier.parameters()]
    assert torch.autograd.grad(LIT().section_loss(own, theirs), unused, allow_unused=True) == (None,) * len(unused)


@pytest.mark.parametrize("run", ["lit", "lit of wide networks"])
def test_stem_and_classifier_of_lit_are_the_teachers_until_it_is_fine_tuned(run):
    scheme, seen = scheme_of(run), []
    (teacher,) = scheme._teacher

    def on_step(done, text):
        student = scheme.student
        same = [difference(clone(a.state_dict()), clone(b.state_dict())) is None for a, b in pairs(student, teacher)]
        modes = {part.training for part in (*student.stem.modules(), *student.classifier.modules())}
        seen.append((text.split()[0], same, modes))

    make_training(scheme, make_recipe(), on_step=on_step).run()
    assert seen == [("sections", [True, True], {False})] * 6 + [("fine_tune", [False, False], {True})] * 3


def pairs(student: nn.Module, teacher: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    return [(student.stem, teacher.stem), (student.classifier, teacher.classifier)]


def test_lit_trains_7_in_12_epochs_by_stages_and_5_at_a_tenth_of_the_learning_rate():
    scheme = scheme_of("lit")
    history = make_training(scheme, make_recipe(epochs=12, milestones=(), learning_rate=0.1)).run()
    assert [row["phase"] for row in history] == ["sections"] * 7 + ["fine_tune"] * 5
    assert [row["learning_rate"] for row in history] == pytest.approx([0.1] * 7 + [0.01] * 5)
    assert set(history[0]) - set(history[-1]) == {"sections"}
    assert history[6]["sections"] < history[0]["sections"]


@pytest.mark.parametrize(("weight", "terms"), [(0.0, {"ce", "kd"}), (1.0, {"sections"})])
def test_lit_leaves_out_what_has_no_weight(weight, terms):
    own, theirs, adapters = views(LIT(), "resnet8x0.25", "resnet14x0.25")
    method = LIT(section_weight=weight)
    assert set(method.match_sections(own, theirs, batch().labels, adapters)) == terms


def test_batch_norms_of_lit_see_both_inputs_once_a_step():
    scheme = scheme_of("lit")
    make_training(scheme, make_recipe(epochs=1)).run()  # one epoch of each phase, of three steps
    counts = {int(m.num_batches_tracked) for m in scheme.student.stages.modules() if isinstance(m, nn.BatchNorm2d)}
    assert counts == {3 * 2 + 3}


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ("resnet8x0.25", "resnet8x0.5", "LIT copies the teacher's stem, so the student's must be built alike"),
        ("wrn_10_0.25", "wrn_10_0.5", "LIT copies the teacher's stem"),
        ("cnn_small", "wrn_10_1", "LIT copies the teacher's stem"),
        ("resnet8x2", "resnet8x3", "LIT copies the teacher's classifier"),
    ],
)
def test_lit_refuses_networks_that_are_not_alike(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        views(LIT(), student, teacher, size=8)


def test_lit_refuses_a_stage_of_another_width():
    own, theirs, _ = views(LIT(), "resnet8x0.25", "resnet14x0.25")
    first, *others = own.maps
    with pytest.raises(ValueError, match="stages of equal width, but stage 1 has 3 and 4 channels"):
        LIT().adapters(own._replace(maps=(first[:, :3], *others)), theirs)


def test_lit_trains_a_student_of_another_family_with_the_same_stem_and_widths():
    for student in ("cnn_small", "plain8"):
        own, theirs, _ = views(LIT(), student, "resnet14", size=8)
        assert LIT().section_loss(own, theirs) > 0


# ---- AdaIN


@precisions
def test_adain_is_the_oracles(dtype):
    own, target = tensor(MAP_S, dtype), tensor(MAP_T, dtype)
    restyled = adaptive_instance_norm(target, own)
    torch.testing.assert_close(restyled, tensor(oracles()["adain_out"], dtype), atol=TOLERANCE[dtype], rtol=0)
    # the reference sums over the two channels
    assert 2 * statistics_loss(own, target).item() == pytest.approx(oracles()["adain_stat_l2"], abs=TOLERANCE[dtype])


def test_a_restyled_map_has_the_statistics_of_the_style_and_the_shape_of_the_content():
    content, style = torch.randn(2, 3, 4, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    style = style[..., :3] * 2 + 1
    restyled = adaptive_instance_norm(content, style)
    for b in range(3):
        for c in range(4):
            values = restyled[b, c].flatten()
            assert values.mean().item() == pytest.approx(style[b, c].mean().item(), abs=1e-8)
            assert values.std(correction=0).item() == pytest.approx(style[b, c].std(correction=0).item(), abs=1e-8)
            order = content[b, c].flatten().argsort()
            assert torch.equal(values.argsort(), order)
    torch.testing.assert_close(adaptive_instance_norm(content, content), content)


@pytest.mark.parametrize("teacher", ["resnet14x0.25", "resnet8x0.5", "wrn_10_0.5", "cnn_small"])
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_adain_loss_is_the_sum_over_stages(teacher, weight):
    method = AdaIN(tail_weight=weight)
    own, theirs, adapters = views(method, "resnet8x0.25", teacher)
    expected = 0.0
    for stage, (connect, s, t) in enumerate(zip(adapters["connectors"], own.maps, theirs.maps, strict=True), start=1):
        s = connect(s).detach()
        restyled = torch.empty_like(t)
        for b in range(4):
            for c in range(t.shape[1]):
                x, y = (m[b, c].flatten().tolist() for m in (s, t))
                (mean_x, std_x), (mean_y, std_y) = moments(x), moments(y)
                expected += ((mean_x - mean_y) ** 2 + (std_x - std_y) ** 2) / (4 * t.shape[1])
                restyled[b, c] = std_x / max(std_y, 1e-5) * (t[b, c] - mean_y) + mean_x
        answer = with_map(theirs.network, stage, restyled, batch().images).logits
        expected += weight * mean_square(answer, theirs.logits)
    assert method.loss(own, theirs, batch().labels, adapters).item() == pytest.approx(expected, rel=1e-5)


def moments(values: list[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / len(values))


def test_adain_gradient_reaches_the_student_through_the_teachers_tail():
    gradients = []
    for weight in (0.0, 1.0):
        method = AdaIN(tail_weight=weight)
        own, theirs, adapters = views(method, "resnet8x0.25", "wrn_10_0.5")
        loss = method.loss(own, theirs, batch().labels, adapters)
        gradients.append(torch.autograd.grad(loss, own.maps))
    for without, through in zip(*gradients, strict=True):
        assert (through - without).abs().amax(dim=(1, 2, 3)).min() > 1e-8  # every sample


def test_adain_without_a_tail_weight_does_not_run_the_teacher_again():
    method = AdaIN(tail_weight=0)
    own, theirs, adapters = views(method, "resnet8x0.25", "wrn_10_0.5")
    assert method.loss(own, theirs._replace(network=None), batch().labels, adapters) > 0


def test_adain_of_a_network_with_itself_is_zero():
    own, theirs, adapters = views(AdaIN(), "wrn_10_0.5", "wrn_10_0.5")
    theirs.network.load_state_dict(own.network.state_dict())
    theirs = look(theirs.network, batch(), AdaIN.reads, None).detach()
    assert AdaIN().loss(own, theirs, batch().labels, adapters).item() == pytest.approx(0, abs=1e-12)


@precisions
@pytest.mark.parametrize("dead", ["student", "teacher"])
def test_adain_of_a_channel_without_variance_is_finite(dead, dtype):
    maps = {"student": tensor(MAP_S, dtype), "teacher": tensor(MAP_T, dtype)}
    maps[dead][0, 1] = 0
    own = maps["student"].requires_grad_()
    loss = statistics_loss(own, maps["teacher"]) + adaptive_instance_norm(maps["teacher"], own).square().mean()
    loss.backward()
    assert loss.isfinite() and own.grad.isfinite().all() and own.grad.any()


def test_adain_takes_maps_of_any_sides():
    own, theirs, adapters = views(AdaIN(), "resnet8x0.25", "resnet8x0.25")
    smaller = own._replace(maps=tuple(stage_map[..., :-1] for stage_map in own.maps))
    loss = AdaIN().loss(smaller, theirs, batch().labels, adapters)
    assert loss.isfinite()
    assert not list(AdaIN().adapters(smaller, theirs).parameters())


# ---- residual distillation


def clock_at(epoch: int, epochs: int) -> Clock:
    clock = Clock()
    clock.set(epoch, epochs)
    return clock


@pytest.mark.parametrize(
    ("epoch", "expected"), [(0, 1.0), (20, 0.875), (30, 0.75), (40, 0.625), (60, 0.5), (61, 0.5), (199, 0.5)]
)
def test_branches_fade_along_half_a_cosine_over_60_of_200_epochs(epoch, expected):
    assert JointRD().branch_weight(clock_at(epoch, 200)).item() == pytest.approx(expected, abs=1e-6)


def test_branches_fade_to_another_floor_and_over_another_share():
    method = JointRD(floor=5e-3, decay_share=1.0)
    assert method.branch_weight(clock_at(0, 10)).item() == pytest.approx(1, abs=1e-6)
    assert method.branch_weight(clock_at(5, 10)).item() == pytest.approx((1 + 5e-3) / 2, abs=1e-6)
    nearly = 5e-3 + 0.995 * (1 + math.cos(0.9 * math.pi)) / 2
    assert method.branch_weight(clock_at(9, 10)).item() == pytest.approx(nearly, abs=1e-6)
    assert JointRD(floor=0).branch_weight(clock_at(9, 10)).item() == pytest.approx(0, abs=1e-6)


def distance(own: Tensor, target: Tensor, margin: Tensor) -> float:
    """Partial squared distance, element by element, per image."""
    total = 0.0
    for b, c, h, w in torch.cartesian_prod(*map(torch.arange, own.shape)).tolist():
        s, t, m = own[b, c, h, w].item(), target[b, c, h, w].item(), margin[c, 0, 0].item()
        if t > 0 or s > max(t, m):
            total += (s - max(t, m)) ** 2
    return total / len(own)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("plain8x0.25", "resnet14x0.25"), ("plain8x0.25", "resnet8x0.5"), ("resnet8x0.25", "wrn_10_0.5")],
)
@pytest.mark.parametrize("epoch", [0, 1, 9])
def test_joint_loss_is_the_sum_over_branches(student, teacher, epoch):
    method = JointRD(margin_weight=0.02, floor=0.2)
    own, theirs, adapters = views(method, student, teacher)
    adapters["clock"].set(epoch, 10)
    weight = {0: 1.0, 1: 0.2 + 0.8 * (1 + math.cos(math.pi / 3)) / 2, 9: 0.2}[epoch]
    labels, margin = batch().labels, adapters["margin"].value
    ends, expected = [own.pre_maps[-1]], 0.0
    for stage, entry in enumerate(adapters["entries"], start=1):
        branch = with_map(theirs.network, stage, entry(own.maps[stage - 1]), batch().images)
        ends.append(branch.pre_maps[-1])
        chances = branch.logits.softmax(dim=1)
        expected -= weight * sum(math.log(chances[b, y].item()) for b, y in enumerate(labels.tolist())) / 4
    assert len(ends) == len(adapters["connectors"]) == 3
    for number, (connect, end) in enumerate(zip(adapters["connectors"], ends, strict=True)):
        expected += 0.02 * (weight if number else 1) * distance(connect(end), theirs.pre_maps[-1], margin)
    assert method.loss(own, theirs, labels, adapters).item() == pytest.approx(expected, rel=1e-9)


def test_a_branch_teaches_the_stages_before_it_and_no_others():
    own, theirs, adapters = views(JointRD(), "plain8x0.25", "resnet8x0.5")
    parts = [own.network.stem, *own.network.stages, own.network.classifier]
    for number, branch in enumerate(JointRD().branches(own, theirs, adapters), start=1):
        loss = F.cross_entropy(branch.logits, batch().labels)
        taught = []
        for part in parts:
            found = torch.autograd.grad(loss, list(part.parameters()), retain_graph=True, allow_unused=True)
            taught.append(any(gradient is not None and gradient.any().item() for gradient in found))
        assert taught == [True] * (number + 1) + [False] * (len(parts) - number - 1)


def test_the_margin_is_that_of_the_teachers_last_norm_and_is_kept_in_checkpoints():
    method = JointRD()
    _, theirs, adapters = views(method, "plain8x0.25", "resnet8x0.5")
    norm = theirs.network.norms()[-1]
    assert "margin.value" in adapters.state_dict()
    below = [x for x in (torch.randn(400_000, dtype=torch.float64) * norm.weight[0] + norm.bias[0]).tolist() if x < 0]
    assert adapters["margin"].value.shape == (32, 1, 1)
    assert adapters["margin"].value[0].item() == pytest.approx(math.fsum(below) / len(below), rel=0.02)


def test_without_a_margin_weight_a_teacher_needs_no_batch_norm():
    with pytest.raises(ValueError, match="no batch norm before the activation that ends a stage"):
        views(JointRD(), "swish_teacher", "swish_teacher", size=32)
    method = JointRD(margin_weight=0)
    own, theirs, adapters = views(method, "swish_teacher", "swish_teacher", size=32)
    assert set(adapters) == {"clock", "entries"}
    assert method.loss(own, theirs, batch().labels, adapters).isfinite()


def test_the_plain_students_deeper_branches_fade_as_epochs_pass():
    scheme = scheme_of("joint")
    seen = []

    def on_step(*_):
        seen.append(scheme.method.branch_weight(scheme.adapters["clock"]).item())

    make_training(scheme, make_recipe(epochs=10), on_step=on_step).run()
    thirds = [0.5 + 0.25 * (1 + math.cos(math.pi * third / 3)) for third in range(4)]
    assert seen[::3] == pytest.approx(thirds + [0.5] * 6, abs=1e-6)
