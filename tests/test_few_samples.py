"""Alignment in closed form: least squares, merging, exact recovery, and what is refused."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from kdstudy.blocks import Taps
from kdstudy.core import View
from kdstudy.data import ImageBank
from kdstudy.evaluate import logits_of
from kdstudy.few_samples import FewSample, _drawn, absorb, align, least_squares, pruned_state
from kdstudy.models import Ensemble, build_model
from kdstudy.recipe import Recipe
from kdstudy.schemes import Batch, Offline
from kdstudy.train import Surroundings, Training

FAMILIES = ("resnet14", "wrn_16_1")
every_family = pytest.mark.parametrize("family", FAMILIES)


def network(name: str, seed: int = 0) -> nn.Module:
    """In float64 and eval mode, with batch norms that are far from the identity."""
    torch.manual_seed(seed)
    module = build_model(name, classes=5, image_size=8).double().eval()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
            nn.init.normal_(norm.running_mean, std=0.3)
    return module.requires_grad_(False)


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def remaining(student: nn.Module, teacher: nn.Module, batch: Tensor) -> float:
    labels = torch.zeros(len(batch), dtype=torch.int64)
    return FewSample().loss(student(batch), teacher(batch), labels, nn.ModuleDict()).item()


def test_least_squares_over_batches_is_numpys_over_all_pixels():
    ours, theirs = (torch.randn(7, width, 3, 2, dtype=torch.float64) for width in (4, 6))
    pairs = list(zip(ours.split(3), theirs.split(3), strict=True))
    flat_s, flat_t = (np.moveaxis(x.numpy(), 1, -1).reshape(-1, x.shape[1]) for x in (ours, theirs))
    expected = np.linalg.lstsq(flat_s, flat_t, rcond=None)[0].T
    np.testing.assert_allclose(least_squares(pairs, 0.0).numpy(), expected, rtol=1e-9)
    gram = flat_s.T @ flat_s
    ridged = flat_t.T @ flat_s @ np.linalg.inv(gram + 0.3 * np.trace(gram) / 4 * np.eye(4))
    np.testing.assert_allclose(least_squares(pairs, 0.3).numpy(), ridged, rtol=1e-9)


def test_least_squares_sums_in_double_precision_and_ignores_a_dead_channel():
    ours = 1e3 + torch.randn(400, 2, 4, 4)
    ours[:, 1] = 0
    mix = least_squares([(ours, 2 * ours)], 0.0)
    assert mix.dtype == torch.float64
    torch.testing.assert_close(mix, torch.tensor([[2.0, 0.0], [0.0, 0.0]], dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("with_norm", [False, True])
def test_a_merged_convolution_gives_what_an_explicit_one_behind_it_gave(with_norm):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False).double()
    if with_norm:
        norm = network("resnet8").stages[1][0].branch[0][1]
        layers = nn.Sequential(nn.Conv2d(3, norm.num_features, 3, padding=1, bias=False).double(), norm)
    layers = layers.eval().requires_grad_(False)
    batch = images(4)
    width = layers(batch).shape[1]
    mix = torch.randn(width, width, dtype=torch.float64)
    expected = F.conv2d(layers(batch), mix[:, :, None, None])
    absorb(layers, mix)
    torch.testing.assert_close(layers(batch), expected)


@every_family
def test_mixed_channels_are_unmixed_exactly(family):
    teacher = network(family)
    student = copy.deepcopy(teacher)
    torch.manual_seed(2)
    for stage in student.stages:
        for block in stage:
            for layers in (block.branch[0], block.branch[2]):
                weight = (layers[0] if isinstance(layers, nn.Sequential) else layers).weight
                absorb(layers, torch.randn(len(weight), len(weight), dtype=torch.float64))
    batches, others = images(60).split(25), images(5, seed=9)
    assert remaining(student, teacher, others) > 0.1
    for number in range(sum(map(len, student.stages))):
        align(student, teacher, number, batches, ridge=0.0)
    torch.testing.assert_close(student(others).logits, teacher(others).logits, rtol=1e-6, atol=1e-6)


@every_family
def test_of_filters_that_are_partly_zero_the_others_are_kept(family):
    """Pruning loses nothing then, so the student equals the teacher before and after it is aligned."""
    teacher, student = network(family), network(f"{family}_pruned0.5", seed=1)
    torch.manual_seed(3)
    for stage in teacher.stages:
        for block in stage:
            convolution, norm = block.branch[0]
            dead = torch.randperm(norm.num_features)[: norm.num_features // 2]
            for tensor in (convolution.weight, norm.weight, norm.bias):
                tensor[dead] = 0
    batch = images(4)
    student.load_state_dict(pruned_state(student, teacher))
    torch.testing.assert_close(student(batch).logits, teacher(batch).logits)
    FewSample(ridge=0.0).initialise(student.train(), teacher, images(12).split(5), nn.ModuleDict())
    torch.testing.assert_close(student.eval()(batch).logits, teacher(batch).logits)


@every_family
def test_a_pruned_network_comes_nearer_to_its_teacher_which_stays_as_it_was(family):
    teacher, student = network(family), network(f"{family}_pruned0.5", seed=1)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    seen, unseen = images(200), images(50, seed=9)
    student.load_state_dict(pruned_state(student, teacher))
    pruned = [remaining(student, teacher, each) for each in (seen, unseen)]
    FewSample().initialise(student, teacher, seen.split(64), nn.ModuleDict())
    aligned = [remaining(student, teacher, each) for each in (seen, unseen)]
    assert aligned[0] < 0.6 * pruned[0] and aligned[1] < 0.6 * pruned[1]
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


@every_family
def test_each_block_is_the_best_that_its_branch_can_give_on_top_of_the_aligned_ones(family):
    """What is left of the teacher's sum is orthogonal to every channel that the student's branch adds."""
    teacher, student = network(family), network(f"{family}_pruned0.5", seed=1)
    batch = images(120)  # more than are looked at in one go
    FewSample(ridge=0.0).initialise(student, teacher, [batch], nn.ModuleDict())
    ours, theirs = (net.stem(Taps(batch, batch, batch)) for net in (student, teacher))
    for stage, model in zip(student.stages, teacher.stages, strict=True):
        for block, expected in zip(stage, model, strict=True):
            branch = block.branch(ours.onward)
            ours, theirs = block(ours), expected(theirs)
            tap = "pre_map" if family.startswith("resnet") else "map"
            left = getattr(theirs, tap) - getattr(ours, tap)
            assert left.abs().mean() > 1e-3
            products = torch.einsum("bchw,bdhw->cd", left, branch)
            scale = left.norm() * branch.norm()
            assert products.abs().max() < 1e-9 * scale


@pytest.mark.parametrize("count", [1, 3])
def test_very_few_images_give_a_finite_student(count):
    teacher, student = network("wrn_16_1"), network("wrn_16_1_pruned0.5", seed=1)
    FewSample(samples=count).initialise(student, teacher, [images(8)], nn.ModuleDict())
    assert student(images(4)).logits.isfinite().all()


def test_images_are_drawn_at_random_without_replacement():
    everything = torch.arange(1000.0).reshape(1000, 1, 1, 1)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(_drawn(everything.split(70), 200).flatten().tolist())
    assert all(len(draw) == len(set(draw)) == 200 for draw in draws)
    assert draws[0] == draws[1] != draws[2]
    assert abs(np.mean(draws[0]) - 500) < 60  # those of all batches have the same chance
    assert sorted(_drawn(everything[:9].split(4), 200).flatten().tolist()) == list(range(9))


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("resnet8_pruned0.5", "resnet14"),
        ("resnet14_pruned0.5", "resnet8"),
        ("resnet8x2_pruned0.5", "resnet8"),
        ("resnet8", "resnet8_pruned0.5"),
        ("wrn_10_1_pruned0.5", "resnet8"),
        ("cnn_small", "cnn_small"),
        ("plain8", "plain8"),
        ("resnet50", "resnet50"),
        ("resnet8_pruned0.5", "resnet8+heads"),
    ],
)
def test_a_student_that_is_not_its_teacher_pruned_is_refused(student, teacher):
    views = [View(torch.zeros(2, 5), network=network(name)) for name in (student, teacher)]
    with pytest.raises(ValueError, match="needs a student that is its teacher with fewer channels inside its blocks"):
        FewSample().adapters(*views)


def test_several_teachers_are_refused():
    teacher = Ensemble([network("resnet8"), network("resnet8")])
    views = [View(torch.zeros(2, 5), network=each) for each in (network("resnet8_pruned0.5"), teacher)]
    with pytest.raises(ValueError, match="needs a student that is its teacher with fewer channels"):
        FewSample().adapters(*views)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("samples", 0, "samples must be a whole number of at least 1"),
        ("samples", 0.5, "samples must be a whole number of at least 1, not 0.5"),
        ("kd_weight", 0.5, "kd_weight must be 1, not 0.5: a closed form has nothing to weigh"),
        ("ridge", -1.0, "ridge must be a finite number of at least 0"),
        ("ce_weight", 0.1, "ce_weight must be 0, not 0.1: few-sample distillation reads no labels"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        FewSample(**{field: value})


def digits_bank(images, labels) -> ImageBank:
    images = (images * 15).astype(np.uint8)[..., None]
    return ImageBank(
        *(images, labels.astype(np.int64)),
        **{"mean": [75.0], "std": [90.0], "padding": 1, "device": torch.device("cpu"), "dtype": torch.float32},
    )


def accuracy(network: nn.Module, bank: ImageBank) -> float:
    return 100 * (logits_of(network, bank).argmax(dim=1) == bank.labels).double().mean().item()


def test_on_digits_alignment_repairs_what_pruning_broke_without_training(tmp_path):
    digits = load_digits()
    train, test = (
        digits_bank(digits.images[:1200], digits.target[:1200]),
        digits_bank(digits.images[1200:], digits.target[1200:]),
    )
    torch.manual_seed(0)
    teacher, student, other = (
        build_model(name, classes=10, channels=1, image_size=8)
        for name in ("resnet14", "resnet14_pruned0.375", "resnet14_pruned0.375")
    )
    optimiser = torch.optim.SGD(teacher.parameters(), lr=0.1, momentum=0.9)
    for _ in range(6):
        for index in torch.randperm(1200).split(60):
            batch = train.augmented(index, torch.ones(60, 2, dtype=torch.int64), torch.zeros(60, dtype=torch.bool))
            optimiser.zero_grad()
            F.cross_entropy(teacher(batch).logits, train.labels[index]).backward()
            optimiser.step()
    assert accuracy(teacher, test) > 90
    other.load_state_dict(pruned_state(other, teacher))

    told = []
    scheme = Offline(student, teacher, FewSample(samples=100), Batch(next(train.plain(4)), train.labels[:4]))
    recipe = Recipe(epochs=5, batch=60, learning_rate=0.1, crop_padding=1, flip=False, precision="fp32")
    surroundings = Surroundings(checkpoint=tmp_path / "checkpoint.pt", on_step=lambda *_: told.append(1))
    training = Training(scheme, recipe, train, seed=0, watch={"test": test}, surroundings=surroundings)
    assert training.run() == [] and not told and not (tmp_path / "checkpoint.pt").exists()
    assert training.seconds > 0
    assert accuracy(scheme.deployed, test) > accuracy(other, test) + 15
