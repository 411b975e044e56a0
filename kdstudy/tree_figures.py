"""The picture of a decision tree's first levels."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from kdstudy.figures import BLUE, GRID, INK, MANY_CLASSES, ORANGE, SOFT, WIDTH, styled
from kdstudy.trees import Node

PICTURE, BARS = 0.72, 0.3  # inches: the sides of a mean image, the height of the bars below it
ABOVE, NAMES, GAP = 0.2, 0.3, 0.42  # for the share, for the classes' names, and for the branches to the next level
MOST_LEVELS = 3
CHANNELS = ("red", "green", "blue")
LEGEND = (
    ("share of the images that come by", INK),
    ("their mean", INK),
    ("pixel that decides, from 0 to 255", ORANGE),
    ("their targets, by class", INK),
    ("most likely class", BLUE),
)


@styled
def first_splits(
    nodes: Sequence[Node], mean: Sequence[float], std: Sequence[float], class_names: Sequence[str]
) -> Figure:
    """A tree as far as `nodes`, from `trees.first_nodes`; `mean` and `std` (channels,) undo the images' normalisation.

    Each node shows how many images come by, their mean, and the mean of their targets by class, the largest named. The
    pixel that decides is framed; to the left go images where it is at most the value at the branch, of 255. Of more
    than 20 classes the ten with most are shown. Raises ValueError for more than 3 levels of splits.
    """
    last = _level(max(node.place for node in nodes))
    if last > MOST_LEVELS:
        raise ValueError(f"the picture has room for {MOST_LEVELS} levels of splits, not for {last}")
    row = ABOVE + PICTURE + BARS + NAMES + GAP
    height = (last + 1) * row - GAP + 0.1
    figure = Figure(figsize=(WIDTH, height))
    canvas = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
    canvas.axis("off")
    for line, (text, color) in enumerate(LEGEND):
        canvas.text(0.1, 0.2 + 0.17 * line, text, color=color, fontsize=8)
    tops = {node.place: _top(node.place, row) for node in nodes}
    for node in nodes:
        x, y = tops[node.place]
        children = [tops[place] for place in (2 * node.place + 1, 2 * node.place + 2) if place in tops]
        if children:
            _branches(canvas, (x, y + row - GAP), children, _question(node, mean, std))
        canvas.text(x, y + ABOVE - 0.05, f"{100 * node.share:.0f} %", ha="center", va="bottom", fontsize=8)
        picture = _panel(figure, x - PICTURE / 2, y + ABOVE, PICTURE, PICTURE)
        _mean_image(picture, node, mean, std, framed=bool(children))
        bars = _panel(figure, x - 0.66 * PICTURE, y + ABOVE + PICTURE + 0.04, 1.32 * PICTURE, BARS)
        _distribution(bars, node, class_names)
    return figure


def _level(place: int) -> int:
    return (place + 1).bit_length() - 1


def _top(place: int, row: float) -> tuple[float, float]:
    """Where a node begins, in inches from the left and from the top."""
    level = _level(place)
    number = place + 1 - 2**level
    return WIDTH * (number + 0.5) / 2**level, 0.05 + level * row


def _panel(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in inches from the left and from the top."""
    inches = figure.get_figheight()
    return figure.add_axes((left / WIDTH, 1 - (top + height) / inches, width / WIDTH, height / inches))


def _branches(
    canvas: Axes, start: tuple[float, float], ends: Sequence[tuple[float, float]], question: tuple[str, str]
) -> None:
    x, y = start
    for end, below in ends:
        bend = y + 0.19
        canvas.plot([x, x, end, end], [y, bend, bend, below + 0.04], color=SOFT, lw=0.9, solid_joinstyle="round")
        answer, side, shift = (question[0], "right", -0.06) if end < x else (question[1], "left", 0.06)
        canvas.text(x + shift, bend - 0.02, answer, ha=side, va="bottom", fontsize=8, color=ORANGE)


def _question(node: Node, mean: Sequence[float], std: Sequence[float]) -> tuple[str, str]:
    """What is written at the branches to the first and to the second child."""
    channel, _, _ = node.asks
    value = node.threshold * std[channel] + mean[channel]
    which = f"{CHANNELS[channel]} " if len(mean) == len(CHANNELS) else ""
    return f"{which}\N{LESS-THAN OR EQUAL TO} {value:.0f}", f"> {value:.0f}"


def _mean_image(ax: Axes, node: Node, mean: Sequence[float], std: Sequence[float], framed: bool) -> None:
    image = node.picture.cpu().numpy().transpose(1, 2, 0) * np.asarray(std) + np.asarray(mean)
    image = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    ax.imshow(image if image.shape[2] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if framed:
        _, row, column = node.asks
        frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=ORANGE, lw=1.8, clip_on=False)
        ax.add_patch(frame)


def _distribution(ax: Axes, node: Node, class_names: Sequence[str]) -> None:
    shares = node.distribution.cpu().numpy()
    first = int(shares.argmax())
    few = len(shares) <= MANY_CLASSES
    shown = np.arange(len(shares)) if few else np.argsort(-shares, kind="stable")[:10]
    ax.bar(range(len(shown)), shares[shown], color=[BLUE if c == first else SOFT for c in shown], width=0.8)
    ax.set(ylim=(0, 1), xlim=(-0.7, len(shown) - 0.3), yticks=[])
    ax.spines["left"].set_visible(False)
    ax.spines["bottom"].set_color(GRID)
    ax.tick_params(length=0, pad=1)
    named = few and max(map(len, class_names)) <= 2
    ax.set_xticks(range(len(shown)) if named else [], class_names if named else [], fontsize=6)
    ax.set_xlabel(f"{class_names[first]}: {100 * shares[first]:.0f} %", fontsize=7.5, labelpad=1)
