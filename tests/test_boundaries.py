"""Activation boundaries and the comprehensive overhaul: reference values, a literal computation, phases, defects."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from batches import TOLERANCE, batch_a, oracles
from staged import EPOCHS, batch, below, changed, modes_in_a_run, network, run, scheme_for, state, teacher_of, view
from torch import nn
from toy import ends_alike_if_stopped

from kdstudy.boundaries import (
    ActivationBoundaries,
    ComprehensiveOverhaul,
    boundary_disagreement,
    boundary_loss,
    summed_over_stages,
)
from kdstudy.margins import Margin, negative_means, partial_l2
from kdstudy.models import Ensemble
from kdstudy.schemes import Offline

S, T = [0.5, -2.0, 2.0, -0.5], [1.0, -1.0, 3.0, 2.0]
S_OFD, T_OFD = [*S, 0.3, -0.2], [*T, -0.5, -2.0]
precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
both = pytest.mark.parametrize("method", [ActivationBoundaries(), ComprehensiveOverhaul()], ids=lambda m: m.paper)


def as_map(values, dtype=torch.float64):
    """One image of one channel and one row."""
    return torch.tensor(values, dtype=dtype).view(1, 1, 1, -1)


def norm_with(scale, shift, dtype=torch.float64):
    """A batch norm of one channel."""
    norm = nn.BatchNorm2d(1, dtype=dtype)
    nn.init.constant_(norm.weight, scale)
    nn.init.constant_(norm.bias, shift)
    return norm


@precisions
def test_boundary_losses_are_the_oracles(dtype):
    elements = boundary_loss(as_map(S, dtype), as_map(T, dtype), 1.0)
    torch.testing.assert_close(elements, as_map(oracles()["ab_elem"][0], dtype))
    assert summed_over_stages([elements]).item() == pytest.approx(oracles()["ab_sum_per_B"], abs=TOLERANCE[dtype])
    elements = boundary_loss(as_map([0.5, 0.3], dtype), as_map([-1.0, 0.2], dtype), 1.0)
    torch.testing.assert_close(elements, as_map(oracles()["ab_elem2"][0], dtype))


@precisions
def test_the_true_disagreement_is_the_oracles_and_has_no_gradient(dtype):
    disagreement = boundary_disagreement(as_map(S, dtype).requires_grad_(), as_map(T, dtype))
    assert disagreement.sum().item() == oracles()["ab_true_L1"]
    assert disagreement.dtype == dtype and not disagreement.requires_grad


def test_a_value_of_zero_is_off():
    zero, on, off = as_map([0.0]), as_map([1e-9]), as_map([-1.0])
    assert [boundary_disagreement(zero, t).item() for t in (zero, on, off)] == [0, 1, 0]
    assert [boundary_loss(as_map([0.25]), t, 1.0).item() for t in (zero, on, off)] == [1.25**2, 0.75**2, 1.25**2]


def test_the_boundary_loss_bounds_the_disagreement():
    s, t = torch.randn(2, 50, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for margin in (0.5, 1.0, 2.0):
        assert (boundary_loss(s, t, margin) >= margin**2 * boundary_disagreement(s, t)).all()
        assert not boundary_loss(s.sign() * margin, s, margin).any()


@precisions
def test_partial_distances_are_the_oracles(dtype):
    margin = Margin(norm_with(1, 0, dtype)).value
    elements = partial_l2(as_map(S_OFD, dtype), as_map(T_OFD, dtype), margin)
    torch.testing.assert_close(elements, as_map(oracles()["g_ofd_elem"], dtype))
    loss = summed_over_stages([elements])
    assert loss.item() == pytest.approx(oracles()["g_ofd_sum"], abs=TOLERANCE[dtype])
    weighted = ComprehensiveOverhaul().kd_weight * loss
    assert weighted.item() == pytest.approx(oracles()["g_ofd_weighted_1e-3"], abs=TOLERANCE[dtype])


def test_where_both_are_off_nothing_is_asked_of_the_student():
    s, t = as_map([-0.9, -5.0, -0.7]).requires_grad_(), as_map([-2.0, -0.1, -2.0])
    partial_l2(s, t, torch.tensor(-0.8)).sum().backward()
    assert s.grad.flatten().tolist() == pytest.approx([0, 0, 0.2])


def connected(connector, s):
    """What a connector in train mode makes of a map, written out."""
    if isinstance(connector, nn.Identity):
        return s
    convolution, norm = connector
    x = torch.einsum("oi,bihw->bohw", convolution.weight[:, :, 0, 0], s)
    deviations = x - x.mean(dim=(0, 2, 3), keepdim=True)
    x = deviations / (deviations.square().mean(dim=(0, 2, 3), keepdim=True) + norm.eps).sqrt()
    return x * norm.weight[:, None, None] + norm.bias[:, None, None]


def element(method, s, t, margin):
    """One summand of a loss, with plain numbers."""
    if isinstance(method, ActivationBoundaries):
        rho = 1 if t > 0 else 0
        return (rho * max(method.margin - s, 0) + (1 - rho) * max(method.margin + s, 0)) ** 2
    target = max(t, margin)
    both_off = s <= target and target <= 0
    return 0 if both_off else (s - target) ** 2


def literal_loss(method, adapters, pairs):
    total = 0.0
    for stage, (s, t) in enumerate(pairs):
        s = connected(adapters["connectors"][stage], s)
        weight = 0.5 ** (len(pairs) - 1 - stage)
        for b, c, h, w in torch.cartesian_prod(*map(torch.arange, s.shape)).tolist():
            margin = adapters["margins"][stage].value[c].item() if "margins" in adapters else None
            total += weight * element(method, s[b, c, h, w].item(), t[b, c, h, w].item(), margin)
    return total / len(pairs[0][0])


@pytest.mark.parametrize(
    "method", [ActivationBoundaries(), ActivationBoundaries(margin=0.3), ComprehensiveOverhaul()], ids=repr
)
@pytest.mark.parametrize("names", [("wrn_10_0.25", "wrn_10_0.5"), ("resnet8", "wrn_10_0.5"), ("resnet8", "resnet8")])
def test_the_loss_is_the_literal_computation(method, names):
    scheme = scheme_for(method, *names)
    scheme.adapters.train()
    images = batch(3)
    student, teacher = view(scheme.student, method, images), view(teacher_of(scheme), method, images)
    expected = literal_loss(method, scheme.adapters, list(zip(student.pre_maps, teacher.pre_maps, strict=True)))
    assert method.loss(student, teacher, None, scheme.adapters).item() == pytest.approx(expected, rel=1e-10)


@both
def test_the_larger_map_is_pooled(method):
    fine = batch(4)
    coarse = fine._replace(images=fine.images[:, :, :3, :2])
    student, teacher = view(network("wrn_10_0.25"), method, fine), view(network("resnet8", seed=1), method, coarse)
    adapters = method.adapters(student, teacher).double()
    pairs = list(zip(student.pre_maps, teacher.pre_maps, strict=True))
    expected = literal_loss(method, adapters, [(F.adaptive_avg_pool2d(s, t.shape[2:]), t) for s, t in pairs])
    assert method.loss(student, teacher, None, adapters).item() == pytest.approx(expected, rel=1e-10)


def test_connectors_of_boundaries_stand_only_where_widths_differ():
    connectors = scheme_for(ActivationBoundaries(), "wrn_10_1", "resnet8").adapters["connectors"]
    assert all(isinstance(connector, nn.Identity) for connector in connectors)
    convolution, norm = scheme_for(ActivationBoundaries()).adapters["connectors"][1]
    assert (convolution.kernel_size, convolution.bias) == ((1, 1), None) and isinstance(norm, nn.BatchNorm2d)


def test_connectors_of_the_overhaul_stand_everywhere_with_their_own_first_weights():
    method = ComprehensiveOverhaul()
    wide = network("wrn_10_4")
    shown = view(wide, method, batch(2))
    for s, (convolution, norm) in zip(shown.pre_maps, method.adapters(shown, shown)["connectors"], strict=True):
        channels = s.shape[1]
        assert convolution.weight.shape == (channels, channels, 1, 1) and convolution.bias is None
        assert convolution.weight.std().item() == pytest.approx(math.sqrt(2 / channels), rel=0.05)
        assert (norm.weight == 1).all() and (norm.bias == 0).all()


@pytest.mark.parametrize("teacher", ["wrn_10_0.5", "resnet8", "cnn_small"])
def test_margins_belong_to_the_batch_norm_before_the_tap(teacher):
    """Its outputs are the tap, but for what a shortcut adds: replacing them moves the tap as much."""
    scheme = scheme_for(ComprehensiveOverhaul(), teacher, teacher)
    network = teacher_of(scheme)
    shown, found = [], []
    for norm in network.norms():
        norm.register_forward_hook(lambda module, inputs, output: shown.append(output))
    taps = network(batch().images).pre_maps
    for norm, tap, output, margin in zip(network.norms(), taps, shown, scheme.adapters["margins"], strict=True):
        torch.testing.assert_close(margin.value[:, 0, 0], negative_means(norm))
        found.append(torch.equal(output, tap))
    assert found == [teacher != "resnet8"] * 3


def test_margins_are_kept_with_the_run_and_never_trained():
    scheme = scheme_for(ComprehensiveOverhaul())
    before = state(scheme.adapters["margins"])
    assert before and not list(scheme.adapters["margins"].parameters())
    run(scheme)
    assert not changed(before, scheme.adapters["margins"])


@both
def test_repeating_images_changes_nothing(method):
    scheme = scheme_for(method).eval()
    views = [view(each, method, batch(6)) for each in (scheme.student, teacher_of(scheme))]
    once = method.loss(*views, None, scheme.adapters)
    views = [each.map(lambda x: torch.cat([x, x])) for each in views]
    twice = method.loss(*views, None, scheme.adapters)
    torch.testing.assert_close(twice, once)


def test_boundaries_come_first_for_an_eighth_of_the_main_phase():
    phases = ActivationBoundaries().phases()
    assert [(phase.name, phase.epochs(240)) for phase in phases] == [("boundaries", 30), ("distil", 240)]
    assert ActivationBoundaries(share=0.5).phases()[0].epochs(240) == 120


def test_boundaries_train_without_labels_and_classifier_and_the_student_without_connectors():
    method = ActivationBoundaries()
    scheme = scheme_for(method)
    first, second = method.phases()
    views = [view(scheme.student, method, batch()), view(teacher_of(scheme), method, batch())]
    terms = first.objective(*views, None, scheme.adapters)
    assert list(terms) == ["boundaries"]
    assert terms["boundaries"] == method.kd_weight * method.loss(*views, None, scheme.adapters)
    names = {id(parameter): name for name, parameter in scheme.named_parameters()}
    trained = [{names[id(p)] for p in scheme.trained_parameters(phase.trains)} for phase in (first, second)]
    everything = set(names.values())
    assert trained[0] == {name for name in everything if not name.startswith("student.classifier")}
    assert trained[1] == {name for name in everything if name.startswith("student.")}


def test_the_second_phase_is_a_divergence_at_3_degrees_without_its_square():
    student, teacher, labels = batch_a()
    terms = ActivationBoundaries().objective(student, teacher, labels, nn.ModuleDict())
    assert list(terms) == ["kl"]
    expected = F.kl_div((student.logits / 3).log_softmax(1), (teacher.logits / 3).softmax(1), reduction="batchmean")
    assert terms["kl"].item() == pytest.approx(expected.item(), abs=1e-12)
    terms = ActivationBoundaries(kl_weight=2.0, temperature=1.0).objective(student, teacher, labels, nn.ModuleDict())
    assert terms["kl"].item() == pytest.approx(2 * oracles()["kd_T1"], abs=1e-6)


def test_the_second_phase_can_be_cross_entropy_alone():
    terms = ActivationBoundaries(ce_weight=1.0, kl_weight=0.0).objective(*batch_a(), nn.ModuleDict())
    assert {name: term.item() for name, term in terms.items()} == {"ce": pytest.approx(oracles()["ce"], abs=1e-6)}


def test_public_defect_boundaries_followed_by_cross_entropy_alone_or_by_a_placeholder():
    """A usual re-implementation drops the second phase's divergence; the release lets both phases last an epoch."""
    history = run(scheme_for(ActivationBoundaries()), epochs=8, milestones=(6,))
    assert [row["phase"] for row in history] == ["boundaries"] + ["distil"] * 8
    assert all("kl" in row and "ce" not in row for row in history[1:])
    assert all(phase.epochs(200) > 1 for phase in ActivationBoundaries().phases())


@both
def test_public_defect_a_teacher_in_train_mode(method):
    scheme = scheme_for(method)
    before = state(teacher_of(scheme))
    assert not any(teacher for _, _, teacher in modes_in_a_run(scheme))
    assert not changed(before, teacher_of(scheme))


@both
def test_public_defect_a_student_in_eval_mode_from_the_second_epoch(method):
    scheme = scheme_for(method)
    trained = {phase.name: below(scheme, *phase.trains) for phase in method.phases()}
    seen = modes_in_a_run(scheme)
    assert len(seen) == 3 * (EPOCHS + len(trained) - 1)
    assert all(in_train_mode == trained[phase] for phase, in_train_mode, _ in seen)


@both
def test_a_run_stopped_anywhere_ends_as_one_that_is_not(method, tmp_path):
    ends_alike_if_stopped(lambda: scheme_for(method), (1, 5), tmp_path)


@both
def test_networks_that_do_not_fit_are_refused(method):
    scheme = scheme_for(method)
    student, teacher = (view(each, method, batch()) for each in (scheme.student, teacher_of(scheme)))
    with pytest.raises(ValueError, match="equally many stages, at least one, not 3 and 2"):
        method.adapters(student, teacher._replace(pre_maps=teacher.pre_maps[:2]))
    with pytest.raises(ValueError, match="equally many stages, at least one, not 3 and 0"):
        Offline(scheme.student, Ensemble([network("resnet8")] * 2), method, batch())


def test_a_teacher_without_batch_norm_has_no_margins():
    teacher = network("cnn_small")
    for stage in teacher.stages:
        stage.layers = stage.layers[0]
    with pytest.raises(ValueError, match="no batch norm"):
        Offline(network("cnn_small"), teacher, ComprehensiveOverhaul(), batch())


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        *((ActivationBoundaries(), field, 0.0) for field in ("kd_weight", "temperature", "margin", "share")),
        *((ActivationBoundaries(), field, -1.0) for field in ("ce_weight", "kl_weight")),
        (ActivationBoundaries(), "kl_weight", 0.0),
        *((ComprehensiveOverhaul(), field, -1.0) for field in ("ce_weight", "kd_weight")),
    ],
)
def test_a_bad_hyperparameter_is_named(method, field, value):
    with pytest.raises(ValueError, match=field):
        replace(method, **{field: value})
