"""Trees that are fitted: against every possible split, against scikit-learn's answers, and on digits."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.tree import DecisionTreeRegressor
from torch import Tensor, nn

from kdstudy.core import View, softened_kl
from kdstudy.data import ImageBank
from kdstudy.evaluate import logits_of, score
from kdstudy.models import build_model
from kdstudy.recipe import Recipe
from kdstudy.schemes import Batch, Offline
from kdstudy.train import Surroundings, Training
from kdstudy.tree_students import SoftTree
from kdstudy.trees import DecisionTree

CLASSES = 4
TINY = 1e-9  # a smoothing that does next to nothing


class Table(nn.Module):
    """A teacher whose logits are linear in the pixels."""

    def __init__(self, shape: tuple[int, int, int], seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(int(np.prod(shape)), CLASSES, generator=generator, dtype=torch.float64))

    def forward(self, images: Tensor) -> View:
        return View(images.flatten(1) @ self.weight)


def images(count: int, shape: tuple[int, int, int] = (1, 2, 3), seed: int = 0) -> Tensor:
    """On a few levels of brightness, so that pixels are often equal; exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (count, *shape), generator=generator).double() / 8


def labels_of(count: int, seed: int = 5) -> Tensor:
    return torch.randint(CLASSES, (count,), generator=torch.Generator().manual_seed(seed))


def fitted(method: SoftTree, batch: Tensor, depth: int, teacher: nn.Module | None = None, labels=None) -> DecisionTree:
    """A tree on these images, shown in batches of 7."""
    shape = tuple(batch.shape[1:])
    tree = DecisionTree(depth, CLASSES, shape).double()
    teacher = teacher or Table(shape)
    view = View(torch.zeros(2, CLASSES), census=labels, network=tree)
    method.initialise(tree, teacher, batch.split(7), method.adapters(view, view))
    return tree


def remaining(method: SoftTree, tree: DecisionTree, batch: Tensor, labels: Tensor) -> float:
    teacher = Table(tuple(batch.shape[1:]))
    return method.loss(tree(batch), teacher(batch), labels, nn.ModuleDict()).item()


METHODS = [
    SoftTree(smoothing=TINY),
    SoftTree(smoothing=TINY, temperature=3.0),
    SoftTree(smoothing=TINY, target="labels"),
]
every_target = pytest.mark.parametrize("method", METHODS, ids=["teacher", "softened", "labels"])


def targets_slowly(method: SoftTree, batch: Tensor, labels: Tensor) -> np.ndarray:
    if method.target == "labels":
        return np.eye(CLASSES)[labels.numpy()]
    logits = Table(tuple(batch.shape[1:]))(batch).logits.detach().numpy() / method.temperature
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@every_target
@pytest.mark.parametrize("least_leaf", [1, 12])
def test_of_all_possible_splits_the_one_with_the_least_squared_error_is_taken(method, least_leaf):
    count = 40
    method = SoftTree(smoothing=TINY, target=method.target, temperature=method.temperature, least_leaf=least_leaf)
    batch, labels = images(count), labels_of(count)
    targets, flat = targets_slowly(method, batch, labels), batch.flatten(1).numpy()
    errors = []
    for pixel, value in itertools.product(range(flat.shape[1]), np.unique(flat)):
        left = flat[:, pixel] <= value
        if min(left.sum(), (~left).sum()) < least_leaf:
            continue
        parts = [targets[left], targets[~left]]
        errors.append(sum(((part - part.mean(axis=0)) ** 2).sum() for part in parts) / count)
    tree = fitted(method, batch, depth=1, labels=labels)
    assert remaining(method, tree, batch, labels) == pytest.approx(min(errors), rel=1e-6)
    assert min(errors) < 0.97 * np.median(errors)


@every_target
@pytest.mark.parametrize(("shape", "depth"), [((1, 2, 3), 3), ((3, 4, 2), 6)])
@pytest.mark.parametrize("least_leaf", [1, 9])
def test_its_answers_for_new_images_are_scikit_learns(method, shape, depth, least_leaf):
    method = SoftTree(smoothing=TINY, target=method.target, temperature=method.temperature, least_leaf=least_leaf)
    batch, labels, others = images(90, shape), labels_of(90), images(200, shape, seed=9)
    torch.manual_seed(3)
    tree = fitted(method, batch, depth, labels=labels)
    torch.manual_seed(3)
    seed = int(torch.randint(2**31, ()))
    reference = DecisionTreeRegressor(max_depth=depth, min_samples_leaf=least_leaf, random_state=seed)
    # to the last bit the same: in small leaves many splits are equally good
    targets = method.targets(Table(shape)(batch).logits.detach(), labels)
    reference.fit(batch.flatten(1).numpy(), targets.numpy())
    expected = reference.predict(others.flatten(1).numpy())
    answers = (tree(others).logits / method.temperature).softmax(dim=1)
    np.testing.assert_allclose(answers.detach().numpy(), expected, atol=1e-7)
    assert reference.get_n_leaves() > depth


def test_where_nothing_is_left_to_split_the_leaf_goes_on_to_the_last_level():
    batch = images(30)
    labels = (batch[:, 0, 1, 2] > 0).long()
    tree = fitted(SoftTree(smoothing=TINY, target="labels"), batch, 4, labels=labels)
    assert tree.pixel[0] == 5 and tree.threshold[0].isfinite() and tree.threshold[1:].eq(torch.inf).all()
    assert torch.equal(tree(batch).logits.argmax(dim=1), labels)
    assert len(tree.leaf.unique(dim=0)) == 2


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_no_other_logits_of_the_leaves_are_nearer_to_the_teacher(temperature):
    """The fitted ones minimise the softened divergence, too: its gradient is zero, and was not before."""
    batch = images(60)
    teacher = Table((1, 2, 3))
    tree = fitted(SoftTree(smoothing=TINY, temperature=temperature), batch, 3, teacher)
    softened_kl(tree(batch).logits, teacher(batch).logits.detach(), temperature).backward()
    assert tree.leaf.grad.abs().max() < 1e-6
    untrained = DecisionTree(3, CLASSES, (1, 2, 3)).double()
    softened_kl(untrained(batch).logits, teacher(batch).logits.detach(), temperature).backward()
    assert untrained.leaf.grad.abs().max() > 1e-2


@pytest.mark.parametrize("smoothing", [1.0, 2.5])
def test_a_leaf_is_smoothed_as_by_images_of_no_class(smoothing):
    batch = torch.zeros(5, 1, 1, 1, dtype=torch.float64)
    batch[3:] = 1
    labels = torch.tensor([2, 2, 1, 0, 0])
    tree = fitted(SoftTree(target="labels", smoothing=smoothing), batch, 1, labels=labels)
    share = smoothing / CLASSES
    expected = np.array([[0, 1, 2, 0], [2, 0, 0, 0]]) + share
    expected /= np.array([[3], [2]]) + smoothing
    np.testing.assert_allclose(tree.leaf.detach().exp().numpy(), expected)


def test_a_leaf_is_softened_like_its_teacher():
    batch = images(20)
    method = SoftTree(temperature=5.0, smoothing=2.0)
    tree = fitted(method, batch, 1)
    targets = targets_slowly(method, batch, labels_of(20))
    for leaf in (0, 1):
        here = tree.path(batch)[:, -1].numpy() == 1 + leaf
        expected = (targets[here].sum(axis=0) + 2 / CLASSES) / (here.sum() + 2)
        np.testing.assert_allclose(tree.leaf[leaf].detach().numpy(), 5 * np.log(expected))


def test_the_loss_is_the_squared_error_of_the_softened_answers():
    student, teacher = images(3, (1, 1, CLASSES)).flatten(1), images(3, (1, 1, CLASSES), 1).flatten(1)
    labels = torch.tensor([3, 0, 0])
    for method in METHODS:
        expected = 0.0
        for z_s, z_t, label in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
            ours, theirs = (np.exp(np.array(z) / method.temperature) for z in (z_s, z_t))
            target = np.eye(CLASSES)[label] if method.target == "labels" else theirs / theirs.sum()
            expected += ((ours / ours.sum() - target) ** 2).sum() / 3
        assert method.loss(View(student), View(teacher), labels, nn.ModuleDict()).item() == pytest.approx(expected)


def test_the_teacher_s_mistakes_are_learnt_from_the_teacher_alone():
    batch, labels = images(40), labels_of(40)
    teacher = Table((1, 2, 3))
    said = teacher(batch).logits.argmax(dim=1)
    assert not torch.equal(said, labels)
    shown = {
        target: fitted(SoftTree(target=target, temperature=1.0), batch, 10, labels=labels)
        for target in ("teacher", "labels")
    }
    predicted = {target: tree(batch).logits.argmax(dim=1) for target, tree in shown.items()}
    assert torch.equal(predicted["teacher"], said) and torch.equal(predicted["labels"], labels)


def test_equal_seeds_grow_equal_trees_and_ties_between_pixels_are_drawn():
    batch = images(30, (1, 1, 1)).expand(30, 1, 3, 3)  # nine equal pixels
    roots = []
    for seed in (0, 0, *range(1, 9)):
        torch.manual_seed(seed)
        roots.append(int(fitted(SoftTree(), batch, 2, Table((1, 3, 3))).pixel[0]))
    assert roots[0] == roots[1] and len(set(roots)) > 1


def test_the_teacher_stays_as_it_was_and_the_tree_as_trainable():
    teacher = Table((1, 2, 3))
    before = teacher.weight.detach().clone()
    tree = fitted(SoftTree(), images(20), 2, teacher)
    assert torch.equal(teacher.weight, before) and teacher.weight.grad is None
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in tree.parameters())


@pytest.mark.parametrize("name", ["wrn_10_0.25", "tree_3@grey"])
def test_a_student_that_is_no_tree_is_refused(name):
    view = View(torch.zeros(2, 4), network=build_model(name, classes=4, channels=1, image_size=8))
    with pytest.raises(ValueError, match="the student must be a tree_<depth>"):
        SoftTree().adapters(view, view)


def test_labels_that_are_not_there_are_asked_for():
    view = View(torch.zeros(2, 4), network=DecisionTree(2, 4, (1, 2, 2)))
    with pytest.raises(ValueError, match="needs those of all training images"):
        SoftTree(target="labels").adapters(view, view)
    assert not SoftTree().adapters(view, view)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": "both"}, "target must be one of teacher, labels, not 'both'"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0"),
        ({"least_leaf": 0}, "least_leaf must be a whole number of at least 1"),
        ({"smoothing": 0.0}, "smoothing must be a finite number above 0"),
        ({"ce_weight": 0.1}, "ce_weight must be 0, not 0.1"),
        ({"kd_weight": 0.5}, "kd_weight must be 1, not 0.5"),
        ({"target": "labels", "temperature": 4.0}, "temperature must be 1, not 4.0: labels cannot be softened"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SoftTree(**fields)


def digits_bank(images: np.ndarray, labels: np.ndarray) -> ImageBank:
    images = (images * 15).astype(np.uint8)[..., None]
    return ImageBank(
        *(images, labels.astype(np.int64)),
        **{"mean": [75.0], "std": [90.0], "padding": 1, "device": torch.device("cpu"), "dtype": torch.float32},
    )


@pytest.fixture(scope="module")
def digits() -> tuple[ImageBank, ImageBank, nn.Module]:
    """Training and test images, and a small network that has learnt the former."""
    scans = load_digits()
    train, test = (digits_bank(scans.images[part], scans.target[part]) for part in (slice(900), slice(900, None)))
    torch.manual_seed(0)
    teacher = build_model("wrn_10_0.5", classes=10, channels=1, image_size=8)
    optimiser = torch.optim.SGD(teacher.parameters(), lr=0.1, momentum=0.9)
    for _ in range(8):
        for index in torch.randperm(900).split(60):
            batch = train.augmented(index, torch.ones(60, 2, dtype=torch.int64), torch.zeros(60, dtype=torch.bool))
            optimiser.zero_grad()
            F.cross_entropy(teacher(batch).logits, train.labels[index]).backward()
            optimiser.step()
    return train, test, teacher


@pytest.mark.parametrize("target", ["teacher", "labels"])
def test_on_digits_the_loop_fits_a_tree_without_training(digits, target, tmp_path):
    train, test, teacher = digits
    told = []
    student = build_model("tree_7", classes=10, channels=1, image_size=8)
    sample = Batch(next(train.plain(4)), train.labels[:4], census=train.labels)
    scheme = Offline(student, teacher, SoftTree(target=target), sample)
    recipe = Recipe(epochs=5, batch=64, learning_rate=0.1, crop_padding=1, flip=False, precision="fp32")
    surroundings = Surroundings(checkpoint=tmp_path / "checkpoint.pt", on_step=lambda *_: told.append(1))
    training = Training(scheme, recipe, train, seed=0, watch={"test": test}, surroundings=surroundings)
    assert training.run() == [] and not told and not (tmp_path / "checkpoint.pt").exists()
    assert scheme.deployed is student
    scores = score(logits_of(student, test), test.labels, logits_of(teacher, test))
    # images and labels that did not belong together would give chance
    assert scores.accuracy > 65 and scores.agreement > 65 and scores.nll < 1.5
