"""The pictures of the comparison of schemes: accuracy against budget, shared losses, possible combinations."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter

from kdstudy.budget import LABELS, STAGE, unit_of
from kdstudy.figures import BLUE, GREEN, GRID, INK, ORANGE, SIDESTEP, SOFT, WIDTH, styled
from kdstudy.study import SCHEMES
from kdstudy.tables import label

FAMILIES = {  # of schemes: name, colour, marker
    "none": ("labels alone", INK, "o"),
    "offline": ("offline", BLUE, "s"),
    "online": ("online", ORANGE, "^"),
    "self": ("self", GREEN, "D"),
    "data_free": ("data-free", "#cc79a7", "P"),
}
STATES = {"refused": GRID, "possible": "#a6cee3", "tried: a row of params.yaml": BLUE}  # of a pair, with colours
FAR = 8.0  # points below the middle of all rows: what lies lower ends in an arrow at the axis


@styled
def accuracy_by_budget(points: pd.DataFrame, frame: pd.DataFrame, allowed: int) -> Figure:
    """Accuracy against cost. Above: network-epochs of all rows of `budget.points`, those of the stage emphasised.

    Below: multiply-adds of the rows of `budget.budget_table`, with names and 95 % intervals. Open markers are rows on
    fewer images. What lies far below the rest ends in an arrow at the axis, its accuracy beside it.
    """
    figure = Figure(figsize=(WIDTH, 7.2), layout="constrained")
    above, below = figure.subplots(2, 1)
    low, high = _limits(points.test_accuracy)
    for ax in (above, below):
        ax.set(xscale="log", ylabel="test accuracy (%)", ylim=(low, high))
        ax.grid(axis="y")
    _all_rows(above, points, allowed, low)
    _stage_rows(below, frame, (low, high))
    return figure


def _limits(accuracies: pd.Series) -> tuple[float, float]:
    low, high = max(accuracies.min(), accuracies.median() - FAR), accuracies.max()
    margin = 0.08 * max(high - low, 1.0)
    return float(low - margin), float(high + margin)


def _all_rows(ax: Axes, points: pd.DataFrame, allowed: int, low: float) -> None:
    ax.axvline(allowed, color=SOFT, lw=0.8, ls="--", zorder=0)
    note = {"ha": "center", "fontsize": 8, "color": SOFT, "transform": ax.get_xaxis_transform()}
    ax.text(allowed, 1.01, f"budget: {allowed}", **note)
    for (cost, _), those in points.groupby(["all_network_epochs", points.test_accuracy < low]):
        # rows of equal cost would hide each other
        width = min(1.0, len(those) / 10)
        places = cost * SIDESTEP ** np.linspace(-width, width, len(those))
        for place, row in zip(places if len(those) > 1 else [cost], those.itertuples(), strict=True):
            _point(ax, place, row, low)
    ax.set_xlabel("network-epochs, with all runs that teach")
    _plain_ticks(ax, points.all_network_epochs)
    shown = [FAMILIES[name] for name in FAMILIES if name in set(points.family)]
    entries = [Line2D([], [], color=color, marker=marker, ls="", ms=5, label=name) for name, color, marker in shown]
    entries.append(Line2D([], [], color=SOFT, marker="o", mfc="white", ls="", ms=5, label="fewer images"))
    entries.append(Line2D([], [], color=SOFT, marker="o", mec=INK, ls="", ms=8, label="on this budget"))
    ax.legend(handles=entries, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)


def _point(ax: Axes, place: float, row, low: float) -> None:
    _, color, marker = FAMILIES[row.family]
    of_stage = row.stage == STAGE
    if row.test_accuracy < low:
        ax.plot(place, low, "v", color=color, ms=6 if of_stage else 4, clip_on=False)
        return
    face, edge = ("white" if row.few else color), INK if of_stage else color
    look = {"ms": 7, "zorder": 3} if of_stage else {"ms": 4, "alpha": 0.6}
    ax.plot(place, row.test_accuracy, marker, mfc=face, mec=edge, mew=0.9, **look)


def _stage_rows(ax: Axes, frame: pd.DataFrame, limits: tuple[float, float]) -> None:
    low, high = limits
    scale, unit = unit_of(frame.multiply_adds.max()) if len(frame) else (1.0, "")
    heights = _spread([max(accuracy, low) for accuracy in frame.test_accuracy], 0.065 * (high - low), limits)
    for height, row in zip(heights, frame.itertuples(), strict=True):
        _, color, marker = FAMILIES[row.family]
        x, y = row.multiply_adds / scale, max(row.test_accuracy, low)
        if not np.isnan(row.ci_low):
            ax.vlines(x, max(row.ci_low, low), min(row.ci_high, high), color=color, lw=1, alpha=0.35)
        hidden = row.test_accuracy < low
        ax.plot(x, y, "v" if hidden else marker, color=color, mec=INK, mew=0.9, ms=7, zorder=3, clip_on=False)
        note = {"xytext": (1.03, height), "textcoords": ax.get_yaxis_transform(), "va": "center", "fontsize": 8}
        arrow = {"arrowstyle": "-", "color": SOFT, "lw": 0.5, "shrinkB": 4}
        text = f"{row.test_accuracy:.1f}  {label(row.method)}"
        ax.annotate(text, (x, y), color=color, arrowprops=arrow, annotation_clip=False, **note)
    ax.set_xlabel(f"multiply-adds ({unit}), with all runs that teach")
    _plain_ticks(ax, frame.multiply_adds / scale)


def _spread(heights: Sequence[float], gap: float, limits: tuple[float, float]) -> np.ndarray:
    """The heights, moved apart by at least `gap`, and within the limits as far as there is room; any order."""
    order = np.argsort(heights, kind="stable")
    moved = np.array(heights, dtype=float)[order]
    for number in range(1, len(moved)):
        moved[number] = max(moved[number], moved[number - 1] + gap)
    if len(moved):
        moved[-1] = min(moved[-1], limits[1])
    for number in range(len(moved) - 2, -1, -1):
        moved[number] = min(moved[number], moved[number + 1] - gap)
    result = np.empty_like(moved)
    result[order] = moved
    return result


def _plain_ticks(ax: Axes, values: pd.Series) -> None:
    """Numbers such as 20 and 50 at the axis, and not powers of ten alone, where the values span little."""
    values = values[values > 0]
    if values.empty:
        return
    low, high = values.min() / 1.2, values.max() * 1.2
    ax.set_xlim(low, high)
    steps = [m * 10.0**p for p in range(-3, 7) for m in ((1, 2, 5) if high / low < 300 else (1,))]
    shown = [step for step in steps if low <= step <= high]
    ax.set_xticks(shown, [f"{step:g}" for step in shown])
    ax.xaxis.set_minor_formatter(NullFormatter())


@styled
def worth_by_scheme(worth: pd.DataFrame) -> Figure:
    """What each shared loss is worth under different schemes, from `budget.worth`: points against labels alone.

    Bars are 95 % intervals; an arrow at an edge says that a row or its interval goes on.
    """
    groups = list(worth.groupby("shared", sort=False))
    figure = Figure(figsize=(WIDTH, 0.8 + 0.3 * (len(worth) + len(groups))), layout="constrained")
    ax = figure.subplots()
    far = max(3 * float(worth.difference.abs().median()), 2.0) if len(worth) else 1.0
    low, high = max(worth.difference.min(), -far), min(worth.difference.max(), far)
    margin = 0.15 * max(high - low, 1.0)
    limits = min(low, 0.0) - margin, max(high, 0.0) + margin
    ax.axvline(0, color=INK, lw=0.8)
    place, names = 0.0, {}
    for shared, rows in groups:
        ax.text(-0.01, place, shared, transform=ax.get_yaxis_transform(), ha="right", va="center", weight="bold")
        for row in rows.itertuples():
            place += 1
            names[place] = f"{label(row.method)}  ({row.scheme}, {row.all_network_epochs:.0f})"
            _worth_bar(ax, place, row, limits)
        place += 1
    ax.set_yticks(list(names), list(names.values()))
    ax.set(xlim=limits, ylim=(place - 0.5, -0.6))
    reference = label(LABELS)
    ax.set_xlabel(f"paired difference to {reference} (points of test accuracy); in brackets scheme, network-epochs")
    ax.grid(axis="x")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return figure


def _worth_bar(ax: Axes, place: float, row, limits: tuple[float, float]) -> None:
    left, right = limits
    _, color, _ = FAMILIES[SCHEMES[row.scheme].family]
    if not np.isnan(row.low):
        ax.plot([max(row.low, left), min(row.high, right)], [place, place], color=color, lw=1.4, alpha=0.5)
    if left <= row.difference <= right:
        ax.plot(row.difference, place, "o", color=color, ms=5)
    for edge, marker, beyond in ((left, "<", row.difference < left), (right, ">", row.difference > right)):
        if beyond:
            ax.plot(edge, place, marker, color=color, ms=6, clip_on=False)
    ax.text(1.01, place, f"{row.difference:+.2f}".replace("-", "\N{MINUS SIGN}"),
            transform=ax.get_yaxis_transform(), va="center", fontsize=8)  # fmt: skip


@styled
def possible(cells: pd.DataFrame, columns: int = 3) -> Figure:
    """`combinations.combinations` as a chart, in columns: blue where a row trains the pair, light where one could."""
    methods = list(cells.method.unique())
    schemes = list(cells.scheme.unique())
    rows = -(-len(methods) // columns)
    figure = Figure(figsize=(WIDTH, 0.9 + 0.17 * rows), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    state = (cells.possible.astype(int) + (cells.rows != "")).to_numpy().reshape(len(methods), len(schemes))
    for number, ax in enumerate(axes):
        part = slice(number * rows, (number + 1) * rows)
        names = methods[part]
        if names:
            _chart(ax, state[part], names, schemes)
        else:
            ax.axis("off")
    entries = [Patch(color=color, label=text) for text, color in STATES.items()]
    figure.legend(handles=entries, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _chart(ax: Axes, state: np.ndarray, names: Sequence[str], schemes: Sequence[str]) -> None:
    ax.pcolormesh(state, cmap=ListedColormap(list(STATES.values())), vmin=0, vmax=2, edgecolors="white", lw=1)
    ax.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=6.5)
    ax.set_xticks(np.arange(len(schemes)) + 0.5, [name.replace("_", "-") for name in schemes], rotation=60, ha="left",
                  rotation_mode="anchor", fontsize=7)  # fmt: skip
    ax.xaxis.tick_top()
    ax.set_ylim(len(names), 0)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
