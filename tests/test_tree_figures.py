"""The picture of a tree shows the nodes that it is given, where they belong."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from kdstudy.figures import BLUE, ORANGE, show
from kdstudy.tree_figures import first_splits
from kdstudy.trees import Node

INF = torch.inf


def node(place: int, share: float, shares: list[float], asks=None, threshold: float = INF, channels: int = 1) -> Node:
    picture = torch.arange(channels * 12, dtype=torch.float64).reshape(channels, 3, 4) / 12
    return Node(place, share, picture, torch.tensor(shares), asks, threshold)


def small_tree(channels: int = 1) -> list[Node]:
    """The first child is a leaf; the second one would be split further."""
    return [
        node(0, 1.0, [0.6, 0.4], (channels - 1, 2, 1), 0.5, channels),
        node(1, 0.25, [0.9, 0.1], channels=channels),
        node(2, 0.75, [0.2, 0.8], (0, 0, 0), 0.1, channels),
    ]


def drawn(nodes: list[Node], names=("a", "b")) -> Figure:
    channels = nodes[0].picture.shape[0]
    return first_splits(nodes, [100.0, 110.0, 120.0][:channels], [50.0, 60.0, 70.0][:channels], names)


def texts(figure: Figure) -> dict[str, float]:
    """What is written, and how far from the left."""
    return {text.get_text(): text.get_position()[0] for text in figure.axes[0].texts}


def pictures(figure: Figure) -> list:
    return [ax for ax in figure.axes if ax.images]


def bars(figure: Figure) -> list:
    return [ax for ax in figure.axes if ax.containers]


def centre(ax) -> float:
    box = ax.get_position()
    return (box.x0 + box.x1) / 2


def test_every_node_has_its_share_its_picture_and_its_classes():
    figure = drawn(small_tree())
    assert {"100 %", "25 %", "75 %"} <= set(texts(figure))
    assert [round(centre(ax), 3) for ax in pictures(figure)] == [0.5, 0.25, 0.75]
    tops = [ax.get_position().y1 for ax in pictures(figure)]
    assert tops[0] > tops[1] == pytest.approx(tops[2])
    assert [ax.get_xlabel() for ax in bars(figure)] == ["a: 60 %", "a: 90 %", "b: 80 %"]
    heights = [[bar.get_height() for bar in ax.patches] for ax in bars(figure)]
    np.testing.assert_allclose(heights, [[0.6, 0.4], [0.9, 0.1], [0.2, 0.8]], rtol=1e-6)
    colored = [[bar.get_facecolor() for bar in ax.patches] for ax in bars(figure)]
    blue = tuple(int(BLUE[at : at + 2], 16) / 255 for at in (1, 3, 5))
    assert [[color[:3] == pytest.approx(blue) for color in row] for row in colored] == [
        *([True, False], [True, False], [False, True])
    ]


def test_the_pixel_that_decides_is_framed_only_where_the_tree_goes_on():
    first, *others = pictures(drawn(small_tree()))
    (frame,) = first.patches
    assert frame.get_xy() == (0.5, 1.5) and frame.get_width() == frame.get_height() == 1  # column 1, row 2
    assert not any(ax.patches for ax in others)


def test_pictures_and_thresholds_are_those_of_the_images_before_they_were_normalised():
    figure = drawn(small_tree())
    shown = pictures(figure)[0].images[0].get_array()
    np.testing.assert_array_equal(shown, np.rint(np.arange(12).reshape(3, 4) / 12 * 50 + 100))
    # 0.5 of the only channel, whose deviation is 50
    places = texts(figure)
    assert places["\N{LESS-THAN OR EQUAL TO} 125"] < places["100 %"] < places["> 125"]


def test_of_colour_images_the_channel_is_named():
    figure = drawn(small_tree(channels=3))
    assert "blue \N{LESS-THAN OR EQUAL TO} 155" in texts(figure) and "> 155" in texts(figure)
    shown = pictures(figure)[0].images[0].get_array()
    expected = np.arange(36).reshape(3, 3, 4).transpose(1, 2, 0) / 12 * [50, 60, 70] + [100, 110, 120]
    np.testing.assert_array_equal(shown, np.clip(np.rint(expected), 0, 255))


def test_branches_lead_to_the_children_that_are_there():
    def branches(nodes):
        lines = drawn(nodes).axes[0].lines
        return [(float(line.get_xdata()[0]), float(line.get_xdata()[-1])) for line in lines]

    width = 8.4
    assert branches(small_tree()) == [(width / 2, width / 4), (width / 2, 3 * width / 4)]
    without_first = [small_tree()[0], small_tree()[2]]
    assert branches(without_first) == [(width / 2, 3 * width / 4)]
    answers = [text for text in texts(drawn(without_first)) if text.endswith("125")]
    assert answers == ["> 125"]
    assert branches(small_tree()[:1]) == []


def test_of_many_classes_the_ten_with_most_are_shown():
    shares = torch.linspace(0, 1, 30).roll(7)
    shares = (shares / shares.sum()).tolist()
    (ax,) = bars(drawn([node(0, 1.0, shares)], [f"class {c}" for c in range(30)]))
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], sorted(shares, reverse=True)[:10])
    assert ax.get_xlabel().startswith("class 6:")


def test_equal_nodes_give_equal_files(tmp_path):
    one, two = (show(drawn(small_tree(3)), tmp_path / name) for name in ("one.png", "two.png"))
    assert one.data == two.data


def test_more_levels_than_there_is_room_for_are_refused():
    nodes = [node(place, 1.0, [0.5, 0.5], (0, 0, 0), 0.0) for place in (0, 1, 3, 7)]
    assert len(pictures(drawn(nodes))) == 4
    with pytest.raises(ValueError, match="room for 3 levels of splits, not for 4"):
        drawn([*nodes, node(15, 1.0, [0.5, 0.5])])


def test_what_decides_has_the_colour_of_its_frame():
    figure = drawn(small_tree())
    colors = {text.get_text(): text.get_color() for text in figure.axes[0].texts}
    assert colors["> 125"] == colors["pixel that decides, from 0 to 255"] == ORANGE
