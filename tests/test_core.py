"""The softened KL against scipy, what a View's operations promise, and the rules for a method's weights."""

import math
from dataclasses import FrozenInstanceError, dataclass

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr
from torch import nn
from toy import Plain

from kdstudy.core import (
    Clock,
    Method,
    Phase,
    View,
    require_at_least_zero,
    require_choice,
    require_positive,
    require_share,
    require_whole,
    softened_kl,
    target_kl,
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def logits(batch: int, classes: int, scale: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(batch * classes)
    return tuple(generator.normal(size=(2, batch, classes)) * scale)


def kl_rows(student: np.ndarray, teacher: np.ndarray, temperature: np.ndarray) -> np.ndarray:
    scale = np.asarray(temperature, dtype=float).reshape(-1, 1)
    target = np.exp(log_softmax(teacher / scale, axis=1))
    return np.squeeze(scale**2, 1) * rel_entr(target, np.exp(log_softmax(student / scale, axis=1))).sum(axis=1)


@precisions
@pytest.mark.parametrize("temperature", [1, 0.5, 4.0, [1.0, 2.0, 0.5, 20.0, 3.0, 1.0, 7.0]], ids=str)
def test_softened_kl_is_scipys(temperature, dtype):
    student, teacher = logits(7, 5)
    expected = kl_rows(student, teacher, temperature)
    given = torch.tensor(temperature) if isinstance(temperature, list) else temperature
    arguments = (torch.tensor(student, dtype=dtype), torch.tensor(teacher, dtype=dtype), given)
    rows, mean = softened_kl(*arguments, reduction="none"), softened_kl(*arguments)
    assert rows.dtype == mean.dtype == dtype and rows.shape == (7,) and mean.shape == ()
    np.testing.assert_allclose(rows, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert mean.item() == pytest.approx(expected.mean(), rel=TOLERANCE[dtype])


@precisions
def test_target_kl_is_scipys_and_skips_classes_without_mass(dtype):
    student, teacher = logits(6, 4)
    target = np.exp(log_softmax(teacher, axis=1))
    target[0] = [0, 1, 0, 0]
    target[1] = [0.5, 0, 0, 0.5]
    expected = 9 * rel_entr(target, np.exp(log_softmax(student / 3, axis=1))).sum(axis=1)
    arguments = (torch.tensor(student, dtype=dtype), torch.tensor(target, dtype=dtype), 3.0)
    rows = target_kl(*arguments, reduction="none")
    np.testing.assert_allclose(rows, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert target_kl(*arguments).item() == pytest.approx(expected.mean(), rel=TOLERANCE[dtype])


@precisions
def test_kl_and_its_gradient_stay_finite_for_huge_gaps(dtype):
    student = torch.tensor([[-800.0, 900.0, 0.0], [0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[1000.0, -1000.0, 0.0], [2000.0, -2000.0, 0.0]], dtype=dtype)
    rows = softened_kl(student, teacher, 1.0, reduction="none")
    # all the teacher's mass on class 0, so what is left is minus the student's log-probability of it
    torch.testing.assert_close(rows, torch.tensor([1700.0, math.log(3)], dtype=dtype))
    torch.testing.assert_close(target_kl(student, teacher.softmax(dim=1), 1.0, "none"), rows)
    rows.sum().backward()
    gradient = [[-1.0, 1.0, 0.0], [1 / 3 - 1, 1 / 3, 1 / 3]]
    torch.testing.assert_close(student.grad, torch.tensor(gradient, dtype=dtype))


def test_kl_of_equal_logits_is_zero_whatever_their_offset():
    student = torch.tensor(logits(5, 9)[0])
    torch.testing.assert_close(softened_kl(student, student + 50, 4.0), student.new_zeros(()))


def test_gradient_of_the_kl_is_the_textbooks():
    student, teacher = (torch.tensor(x) for x in logits(6, 4))
    student.requires_grad_()
    softened_kl(student, teacher, 4.0).backward()
    # d/dz T^2 KL = T (softmax(z / T) - target)
    expected = 4 * ((student / 4).softmax(dim=1) - (teacher / 4).softmax(dim=1)) / 6
    torch.testing.assert_close(student.grad, expected.detach())


@pytest.mark.parametrize("divergence", [softened_kl, target_kl])
def test_unknown_reduction_is_refused(divergence):
    with pytest.raises(ValueError, match=r"reduction must be 'mean' or 'none', not 'sum'"):
        divergence(torch.zeros(2, 3), torch.full((2, 3), 1 / 3), 1.0, "sum")


def nested_view(dtype=torch.float64) -> View:
    def part(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True) * 1

    inner = View(part(2, 3), maps=(part(2, 1, 2, 2),), embedding=part(2, 4))
    return View(part(2, 3), part(2, 3, 4, 4), (part(2, 5, 2, 2), part(2, 6, 1, 1)), (part(2, 5, 2, 2),), exits=(inner,))


def tensors(view: View) -> list[torch.Tensor]:
    own = [view.logits, view.stem, *view.maps, *view.pre_maps, view.embedding]
    return [tensor for tensor in own if tensor is not None] + [x for exit in view.exits for x in tensors(exit)]


def test_only_keeps_the_named_taps_and_always_the_logits():
    view = nested_view()
    for taps in ((), ("logits",)):
        assert view.only(taps) == View(view.logits)
    kept = view.only(("maps", "exits"))
    assert kept.logits is view.logits and kept.maps is view.maps and kept.exits is view.exits
    assert kept.stem is None and kept.pre_maps == () and kept.embedding is None


def test_map_reaches_every_tensor_and_keeps_the_structure():
    view = nested_view()
    doubled = view.map(lambda x: 2 * x)
    assert len(tensors(view)) == len(tensors(doubled)) == 8
    for before, after in zip(tensors(view), tensors(doubled), strict=True):
        torch.testing.assert_close(after, 2 * before)
    assert isinstance(doubled.exits[0], View) and doubled.embedding is None and doubled.exits[0].stem is None


def test_detach_cuts_every_tensor():
    view = nested_view()
    assert all(x.requires_grad for x in tensors(view))
    assert not any(x.requires_grad for x in tensors(view.detach()))


@pytest.mark.parametrize(
    ("dtype", "full"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_full_precision_raises_half_only_and_passes_gradient(dtype, full):
    view = nested_view(dtype).full_precision()
    assert {x.dtype for x in tensors(view)} == {full}
    assert all(x.requires_grad for x in tensors(view))


@dataclass(frozen=True, kw_only=True)
class Constant(Method):
    kind = "response"
    paper = "none"

    def loss(self, student, teacher, labels, adapters):
        return torch.tensor(5.0)


def terms(**weights) -> dict[str, float]:
    view = View(torch.zeros(2, 4))
    objective = Constant(**weights).objective(view, view, torch.tensor([0, 1]), nn.ModuleDict())
    return {name: term.item() for name, term in objective.items()}


def test_terms_are_weighted_and_a_weight_of_zero_leaves_its_term_out():
    cross_entropy = math.log(4)
    assert terms() == pytest.approx({"ce": cross_entropy, "kd": 5.0})
    assert terms(ce_weight=0.5, kd_weight=3) == pytest.approx({"ce": cross_entropy / 2, "kd": 15.0})
    assert terms(ce_weight=0.0) == {"kd": 5.0}
    assert terms(kd_weight=0.0) == pytest.approx({"ce": cross_entropy})


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "1", None, True])
@pytest.mark.parametrize("name", ["ce_weight", "kd_weight"])
def test_weights_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a finite number of at least 0, not {value!r}"):
        Constant(**{name: value})


def test_two_weights_of_zero_are_refused():
    with pytest.raises(ValueError, match="ce_weight and kd_weight are both 0"):
        Constant(ce_weight=0, kd_weight=0.0)


def test_a_method_is_frozen_and_has_one_phase_over_student_and_adapters():
    method = Plain()
    with pytest.raises(FrozenInstanceError):
        method.ce_weight = 2.0
    (phase,) = method.phases()
    assert phase.trains == ("student", "adapters") and phase.objective == method.objective and not phase.recipe


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "4", True])
def test_require_positive(value):
    with pytest.raises(ValueError, match=f"temperature must be a finite number above 0, not {value!r}"):
        require_positive("temperature", value)


def test_requirements_let_what_is_allowed_pass():
    require_positive("temperature", 1e-9)
    require_at_least_zero("ce_weight", 0)
    require_choice("mode", "norm", ("norm", "layernorm"))
    for share in (0, 0.5, 1):
        require_share("warm_up", share)
    require_whole("heads", 2, least=2)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "0.5", True])
def test_require_share_names_what_is_no_share(value):
    with pytest.raises(ValueError, match=f"warm_up must be .* not {value!r}"):
        require_share("warm_up", value)


@pytest.mark.parametrize("value", [1, 2.0, float("nan"), "2", True])
def test_require_whole_names_what_is_no_count(value):
    with pytest.raises(ValueError, match=f"heads must be a whole number of at least 2, not {value!r}"):
        require_whole("heads", value, least=2)


def test_require_choice_lists_the_choices():
    with pytest.raises(ValueError, match="mode must be one of norm, layernorm, not 'sphere'"):
        require_choice("mode", "sphere", ("norm", "layernorm"))


def test_a_clock_tells_how_much_of_a_phase_is_over():
    clock = Clock()
    clock.set(0, 8)
    assert clock.done() == 0.125 and clock.warm_up(0.5) == 0.25 and clock.warm_up(0.0) == 1
    clock.set(3, 8)
    assert clock.warm_up(0.5) == 1
    clock.set(7, 8)
    assert clock.done() == 1 and clock.warm_up(0.5) == 1
    assert set(clock.state_dict()) == {"epoch", "epochs"}


@pytest.mark.parametrize("share", [0.0, -1.0, float("nan")])
def test_a_phase_of_no_length_is_refused(share):
    with pytest.raises(ValueError, match="share must be"):
        Phase("hint", lambda *_: {}, share=share)


def test_a_phase_lasts_its_share_of_the_epochs_and_at_least_one():
    assert [Phase("hint", lambda *_: {}, share=0.125).epochs(epochs) for epochs in (240, 20, 1)] == [30, 2, 1]


def test_members_keep_the_same_taps():
    member = View(torch.ones(2, 3), stem=torch.ones(1), embedding=torch.ones(2, 4))
    kept = View(torch.zeros(2, 3), embedding=torch.ones(2, 4), members=(member, member)).only(("members", "embedding"))
    assert len(kept.members) == 2
    assert all(each.stem is None and each.embedding is member.embedding for each in kept.members)
    assert View(torch.zeros(2, 3), members=(member,)).only(("logits",)).members == ()


def test_a_network_in_a_view_stays_as_it_is():
    network = nn.Linear(2, 2)
    view = View(torch.ones(1, 2, requires_grad=True), network=network).detach()
    assert view.network is network and network.weight.requires_grad and not view.logits.requires_grad
