"""Attention and neuron selectivity transfer: reference values, literal loops, and what the losses are blind to."""

import math
from dataclasses import asdict

import pytest
import torch
from batches import TOLERANCE, maps_f, oracles
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdstudy.attention import MAPS, AttentionTransfer, NeuronSelectivity, attention_map
from kdstudy.core import View

NO_ADAPTERS = nn.ModuleDict()
ATTENTION = [AttentionTransfer(map=kind, distance=distance) for kind in MAPS for distance in ("mean_square", "norm")]
every_attention = pytest.mark.parametrize("method", ATTENTION, ids=repr)
every_method = pytest.mark.parametrize("method", [*ATTENTION, NeuronSelectivity()], ids=repr)
precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def random_maps(*shapes, seed=0, batch=3):
    """Signed maps of one network, stage by stage, from shapes (c, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for shape in shapes)


def view(*maps):
    return View(maps[0].new_zeros(len(maps[0]), 2) if maps else torch.zeros(1, 2), maps=maps)


def loss_of(method, student_maps, teacher_maps):
    return method.loss(view(*student_maps), view(*teacher_maps), None, NO_ADAPTERS)


def pooled_by_hand(stage_map, sides):
    """The mean over blocks, for sides that divide the map's."""
    down, right = (of // side for of, side in zip(stage_map.shape[2:], sides, strict=True))
    return stage_map.unfold(2, down, down).unfold(3, right, right).mean(dim=(4, 5))


@precisions
@pytest.mark.parametrize(("kind", "key"), [("sum", "sum"), ("sum_power", "sump2"), ("max_power", "maxp2")])
def test_attention_maps_and_losses_are_the_oracles(kind, key, dtype):
    views = maps_f(dtype)
    expected = torch.tensor(oracles()[f"at_{key}_maps"], dtype=dtype)
    found = attention_map(views[0].maps[0], kind, 2.0)
    torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=0)
    for distance, name in (("mean_square", "mean"), ("norm", "paper_l2")):
        loss = AttentionTransfer(map=kind, distance=distance).loss(*views, NO_ADAPTERS)
        assert loss.dtype == dtype and loss.shape == ()
        assert loss.item() == pytest.approx(oracles()[f"at_{key}_{name}"], abs=TOLERANCE[dtype])


@precisions
def test_neuron_selectivity_is_the_oracle(dtype):
    loss = NeuronSelectivity().loss(*maps_f(dtype), NO_ADAPTERS)
    assert loss.dtype == dtype and loss.shape == ()
    assert loss.item() == pytest.approx(oracles()["g_nst"], abs=TOLERANCE[dtype])


def attention_loop(sample, kind, power):
    """The normalised attention of one sample (c, h, w), position by position."""
    channels = sample.flatten(1).tolist()
    powers = [[abs(value) ** (1 if kind == "sum" else power) for value in channel] for channel in channels]
    positions = [max(values) if kind == "max_power" else sum(values) for values in zip(*powers, strict=True)]
    length = math.sqrt(sum(value * value for value in positions))
    return [value / length for value in positions]


@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
@every_attention
def test_attention_transfer_is_the_loop(method, power):
    """Three stages of unequal width; in the second the student's map is larger, in the third the teacher's."""
    student = random_maps((3, 4, 4), (2, 4, 6), (5, 2, 1))
    teacher = random_maps((4, 4, 4), (3, 2, 3), (5, 4, 2), seed=1)
    pairs = [
        (student[0], teacher[0]),
        (pooled_by_hand(student[1], (2, 3)), teacher[1]),
        (student[2], pooled_by_hand(teacher[2], (2, 1))),
    ]
    expected = 0.0
    for s, t in pairs:
        for sample_s, sample_t in zip(s, t, strict=True):
            rows = (attention_loop(sample, method.map, power) for sample in (sample_s, sample_t))
            squares = [(a - b) ** 2 for a, b in zip(*rows, strict=True)]
            of_sample = math.sqrt(sum(squares)) if method.distance == "norm" else sum(squares) / len(squares)
            expected += of_sample / len(s)
    changed = AttentionTransfer(map=method.map, power=power, distance=method.distance)
    assert loss_of(changed, student, teacher).item() == pytest.approx(expected, rel=1e-12)


def kernel_loop(one, other):
    """The mean of squared cosines of all channels of one sample with all of another."""
    total = 0.0
    for x in one.flatten(1).tolist():
        for y in other.flatten(1).tolist():
            lengths = math.sqrt(sum(a * a for a in x)) * math.sqrt(sum(b * b for b in y))
            total += (sum(a * b for a, b in zip(x, y, strict=True)) / lengths) ** 2
    return total / (len(one) * len(other))


def test_neuron_selectivity_is_the_loop():
    """Two stages of unequal width, the second of unequal size."""
    student = random_maps((3, 4, 4), (2, 4, 6))
    teacher = random_maps((5, 4, 4), (4, 2, 3), seed=1)
    pairs = [(student[0], teacher[0]), (pooled_by_hand(student[1], (2, 3)), teacher[1])]
    expected = 0.0
    for stages in pairs:
        for s, t in zip(*stages, strict=True):
            expected += (kernel_loop(t, t) + kernel_loop(s, s) - 2 * kernel_loop(t, s)) / len(stages[0])
    assert loss_of(NeuronSelectivity(), student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_neuron_selectivity_is_the_difference_of_mean_pattern_products():
    """With a kernel of squares, MMD^2 is the squared distance of the mean outer products of unit channels."""
    student, teacher = random_maps((6, 3, 3), batch=1), random_maps((4, 3, 3), batch=1, seed=1)

    def mean_product(maps):
        channels = maps[0].flatten(2)[0]
        unit = channels / channels.norm(dim=1, keepdim=True)
        return unit.T @ unit / len(unit)

    expected = (mean_product(student) - mean_product(teacher)).square().sum()
    torch.testing.assert_close(loss_of(NeuronSelectivity(), student, teacher), expected)


@every_method
def test_equal_maps_have_no_loss_and_no_gradient_that_is_not_a_number(method):
    (maps,) = random_maps((4, 3, 3))
    student = maps.clone().requires_grad_()
    loss = loss_of(method, (student,), (maps,))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-14) and student.grad.isfinite().all()


@every_method
def test_the_order_of_channels_is_immaterial(method):
    """What the student's channels are called is its own affair."""
    (student,), (teacher,) = random_maps((4, 3, 3)), random_maps((6, 3, 3), seed=1)
    loss = loss_of(method, (student,), (teacher,))
    torch.testing.assert_close(loss_of(method, (student[:, [2, 0, 3, 1]],), (teacher,)), loss)
    torch.testing.assert_close(loss_of(method, (-student,), (teacher,)), loss)


@every_attention
def test_attention_is_blind_to_the_scale_of_each_sample(method):
    (student,), (teacher,) = random_maps((4, 3, 3)), random_maps((4, 3, 3), seed=1)
    scale = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64).view(3, 1, 1, 1)
    loss = loss_of(method, (student,), (teacher,))
    torch.testing.assert_close(loss_of(method, (scale * student,), (teacher,)), loss)


def test_neuron_selectivity_is_blind_to_the_scale_of_each_channel_and_attention_is_not():
    (student,), (teacher,) = random_maps((4, 3, 3)), random_maps((4, 3, 3), seed=1)
    scaled = torch.tensor([0.1, 1.0, 30.0, 2.0], dtype=torch.float64).view(1, 4, 1, 1) * student
    for method, blind in ((NeuronSelectivity(), True), (AttentionTransfer(), False)):
        values = [loss_of(method, (maps,), (teacher,)).item() for maps in (student, scaled)]
        assert (values[0] == pytest.approx(values[1], rel=1e-9)) == blind


@every_method
def test_repeating_the_batch_changes_nothing(method):
    student, teacher = random_maps((4, 3, 3)), random_maps((6, 3, 3), seed=1)
    twice = [tuple(torch.cat([maps, maps]) for maps in each) for each in (student, teacher)]
    torch.testing.assert_close(loss_of(method, *twice), loss_of(method, student, teacher))


@every_method
def test_the_gradient_is_that_of_the_value(method):
    (student,), (teacher,) = random_maps((3, 2, 2), batch=2), random_maps((2, 2, 2), batch=2, seed=1)
    assert torch.autograd.gradcheck(lambda maps: loss_of(method, (maps,), (teacher,)), student.requires_grad_())


@pytest.mark.parametrize("dead", ["channel", "sample", "everything"])
@every_method
@precisions
def test_silent_channels_have_a_finite_gradient(dtype, method, dead):
    (student,), (teacher,) = random_maps((4, 3, 3)), random_maps((4, 3, 3), seed=1)
    mask = torch.ones_like(student)
    mask[{"channel": (0, 1), "sample": (0,), "everything": ()}[dead]] = 0
    student, teacher = (student * mask).relu().to(dtype).requires_grad_(), teacher.relu().to(dtype)
    for target in (teacher, torch.zeros_like(teacher)):
        loss = loss_of(method, (student,), (target,))
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.isfinite() and gradient.isfinite().all()


@every_method
def test_no_value_decides_what_is_run(method):
    student, teacher = torch.empty(2, 4, 3, 8, 8, device="meta")
    loss = loss_of(method, (student.requires_grad_(),), (teacher,))
    loss.backward()
    assert loss.shape == () and student.grad.shape == student.shape


class Largest(TorchDispatchMode):
    """Notes how many entries the largest tensor has that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.entries = max(self.entries, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)), 0)
        return result


def test_channel_pairs_times_positions_are_never_in_memory():
    """A tensor has all pairs of channels, or all positions of all channels, but not both."""
    (student,), (teacher,) = random_maps((32, 6, 6)), random_maps((48, 6, 6), seed=1)
    with Largest() as largest:
        loss_of(NeuronSelectivity(), (student.requires_grad_(),), (teacher,)).backward()
    assert largest.entries == 3 * 48 * 48


@pytest.mark.parametrize("counts", [(0, 0), (2, 0), (3, 4)])
@pytest.mark.parametrize("method", [AttentionTransfer(), NeuronSelectivity()], ids=repr)
def test_networks_without_the_same_stages_are_refused(method, counts):
    student, teacher = (view(*random_maps(*[(2, 2, 2)] * count)) for count in counts)
    with pytest.raises(ValueError, match=f"equally many stages, at least one, not {counts[0]} and {counts[1]}"):
        method.adapters(student, teacher)


@every_method
def test_no_module_is_trained_and_hyperparameters_survive_a_round_trip(method):
    maps = random_maps((4, 3, 3))
    assert not method.adapters(view(*maps), view(*maps))
    assert type(method)(**asdict(method)) == method


def test_defaults_are_those_of_the_public_code():
    assert AttentionTransfer() == AttentionTransfer(
        ce_weight=1.0, kd_weight=1000.0, map="sum_power", power=2.0, distance="mean_square"
    )
    assert NeuronSelectivity() == NeuronSelectivity(ce_weight=1.0, kd_weight=50.0)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("map", "mean", "sum, sum_power, max_power"),
        ("distance", "l1", "mean_square, norm"),
        ("power", 0.0, "above 0"),
        ("power", 0.5, "at least 1"),
        ("power", math.nan, "finite"),
        ("kd_weight", -1.0, "at least 0"),
    ],
)
def test_a_bad_hyperparameter_is_named_with_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError) as error:
        AttentionTransfer(**{field: value})
    assert field in str(error.value) and repr(value) in str(error.value) and allowed in str(error.value)


def test_an_unknown_attention_map_is_named():
    with pytest.raises(ValueError, match="kind must be one of sum, sum_power, max_power, not 'min'"):
        attention_map(torch.zeros(1, 1, 2, 2), "min")
