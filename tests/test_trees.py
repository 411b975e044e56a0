"""Trees against a walk from question to question; their names, sizes and first nodes."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdstudy.checkpoint import load_weights, save_weights
from kdstudy.core import View
from kdstudy.models import build_model, count_parameters, reset
from kdstudy.trees import DecisionTree, first_nodes

SHAPES = [(1, 4, 4), (3, 5, 2)]
INF = torch.inf


def images(count: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_tree(depth: int, shape: tuple[int, int, int], classes: int = 4) -> DecisionTree:
    """Every split and every leaf different."""
    generator = torch.Generator().manual_seed(depth)
    tree = DecisionTree(depth, classes, shape).double()
    with torch.no_grad():
        tree.pixel.copy_(torch.randint(int(np.prod(shape)), tree.pixel.shape, generator=generator))
        tree.threshold.normal_(std=0.5, generator=generator)
        tree.leaf.normal_(generator=generator)
    return tree


def written(pixels: list[int], thresholds: list[float], shape: tuple[int, int, int]) -> DecisionTree:
    """A tree of these splits, in heap order; leaf k is sure of class k."""
    leaves = len(pixels) + 1
    tree = DecisionTree(leaves.bit_length() - 1, leaves, shape).double()
    with torch.no_grad():
        tree.pixel.copy_(torch.tensor(pixels))
        tree.threshold.copy_(torch.tensor(thresholds))
        tree.leaf.copy_(torch.eye(leaves))
    return tree


def walk(tree: DecisionTree, image: np.ndarray) -> list[int]:
    """Places from the root to a leaf, by recursion."""
    flat, splits = image.ravel(), len(tree.threshold)

    def go(place: int) -> list[int]:
        if place >= splits:
            return [place]
        goes_left = flat[tree.pixel[place]] <= tree.threshold[place].item()
        return [place, *go(2 * place + (1 if goes_left else 2))]

    return go(0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_answer_is_that_of_the_leaf_where_a_walk_ends(depth, shape):
    tree, batch = random_tree(depth, shape), images(40, shape)
    walks = [walk(tree, image) for image in batch.numpy()]
    assert len({places[-1] for places in walks}) > 1
    assert tree.path(batch).tolist() == walks
    expected = torch.stack([tree.leaf[places[-1] - len(tree.threshold)] for places in walks])
    assert torch.equal(tree(batch).logits, expected)


def test_a_pixel_at_the_threshold_goes_to_the_first_child():
    tree = written([2], [0.5], (1, 2, 2))
    batch = torch.zeros(3, 1, 2, 2, dtype=torch.float64)
    batch[:, 0, 1, 0] = torch.tensor([0.5, 0.4, 0.6])
    assert tree(batch).logits.argmax(dim=1).tolist() == [0, 0, 1]


def test_the_order_of_pixels_is_that_of_the_image_whatever_its_place_in_memory():
    tree, batch = random_tree(4, SHAPES[1]), images(30, SHAPES[1])
    assert torch.equal(tree(batch.contiguous(memory_format=torch.channels_last)).logits, tree(batch).logits)


def test_a_new_tree_and_one_that_is_drawn_anew_say_the_same_of_every_image():
    tree = random_tree(3, SHAPES[0])
    reset(tree)
    for each in (tree, DecisionTree(3, 4, SHAPES[0]).double()):
        assert not each(images(10, SHAPES[0])).logits.any()
        assert not each.pixel.any() and torch.equal(each.threshold, torch.full((7,), INF, dtype=torch.float64))


def test_a_tree_shows_logits_and_nothing_else():
    view = random_tree(2, SHAPES[0])(images(3, SHAPES[0]))
    assert view._replace(logits=None) == View(None)


def test_gradient_reaches_the_leaves_that_answered_and_no_other():
    tree, batch = random_tree(4, SHAPES[0]), images(6, SHAPES[0])
    tree(batch).logits.square().sum().backward()
    answered = {walk(tree, image)[-1] - 15 for image in batch.numpy()}
    assert set(tree.leaf.grad.any(dim=1).nonzero().flatten().tolist()) == answered
    assert tree.threshold.grad is None


@pytest.mark.parametrize(("depth", "classes"), [(1, 2), (6, 10), (12, 100)])
def test_a_number_is_counted_for_each_split_and_for_each_class_of_a_leaf(depth, classes):
    with torch.device("meta"):
        tree = build_model(f"tree_{depth}", classes=classes)
    assert count_parameters(tree) == 2**depth - 1 + 2**depth * classes


def test_weights_are_saved_and_loaded_like_those_of_any_network(tmp_path):
    tree = random_tree(5, SHAPES[0])
    save_weights(tree, tmp_path / "weights.safetensors")
    torch.manual_seed(0)
    loaded = build_model("tree_5", classes=4, channels=1, image_size=4).double()
    load_weights(loaded, tmp_path / "weights.safetensors")
    assert torch.equal(loaded(images(9, SHAPES[0])).logits, tree(images(9, SHAPES[0])).logits)


def test_building_a_tree_draws_no_random_numbers():
    before = torch.get_rng_state()
    build_model("tree_3", classes=4, image_size=(5, 2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["tree_0", "tree_13", "tree_06", "tree_", "tree_6_pruned0.5", "tree"])
def test_other_depths_do_not_exist(name):
    with pytest.raises(ValueError, match=f"unknown model '{name}'"):
        build_model(name, classes=4)


def test_a_tree_has_no_stages_for_heads():
    with pytest.raises(ValueError, match="there must be 2 maps or more, not 0"):
        build_model("tree_3+heads", classes=4, image_size=8)


def test_a_tree_behind_a_modality_asks_its_pixels():
    tree = build_model("tree_3@low", classes=4, image_size=(8, 6))
    assert isinstance(tree, nn.Module) and tree.shape == (1, 4, 3)


def some_nodes(levels: int) -> tuple[list, DecisionTree, Tensor, Tensor]:
    """Of a tree whose second split lies above nothing but a leaf, on 2 x 3 images of 2 channels."""
    shape = (2, 2, 3)
    tree = written([0, 3, 10, 0, 0, 7, 11], [0.1, INF, -0.2, INF, INF, 0.3, 99.0], shape)
    batch = images(50, shape)
    targets = torch.rand(50, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return first_nodes(tree, batch, targets, levels), tree, batch, targets


@pytest.mark.parametrize(
    ("levels", "places"), [(0, [0]), (1, [0, 1, 2]), (2, [0, 1, 2, 5, 6]), (3, [0, 1, 2, 5, 6, 11, 12, 13])]
)
def test_first_nodes_are_those_that_images_come_by(levels, places):
    # 1 is a leaf, so 3, 4 and what follows do not exist; nothing is above 99, so 14 has no image
    nodes, tree, batch, _ = some_nodes(levels)
    assert [node.place for node in nodes] == places
    assert [node.place for node in first_nodes(tree, batch, torch.ones(50, 1), 9)] == [0, 1, 2, 5, 6, 11, 12, 13]


def test_each_node_says_which_pixel_it_asks_and_what_its_images_are():
    nodes, tree, batch, targets = some_nodes(3)
    asked = {0: (0, 0, 0), 2: (1, 1, 1), 5: (1, 0, 1), 6: (1, 1, 2)}
    thresholds = {0: 0.1, 2: -0.2, 5: 0.3, 6: 99.0}
    walks = [walk(tree, image) for image in batch.numpy()]
    for node in nodes:
        here = [number for number, places in enumerate(walks) if node.place in places]
        assert node.share == pytest.approx(len(here) / 50)
        np.testing.assert_allclose(node.picture, np.mean([batch[number].numpy() for number in here], axis=0))
        np.testing.assert_allclose(node.distribution, np.mean([targets[number].numpy() for number in here], axis=0))
        assert node.asks == asked.get(node.place)
        assert node.threshold == pytest.approx(thresholds.get(node.place, INF))
