"""Figures of students that are not simply smaller networks; plain data in, a matplotlib `Figure` out."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kdstudy.figures import BLUE, INK, LINES, ORANGE, SOFT, WIDTH, styled

REACH = 1.6  # how far the gradient is shown; the grid covers -1 to 1


@styled
def grids(bits: Sequence[int] = (2, 3, 8)) -> Figure:
    """What grids of so many bits, spanning -1 to 1, make of a value, and the gradient that is taken instead."""
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    values, inside = np.linspace(-REACH, REACH, 1601), np.linspace(-1, 1, 1001)
    for count, look in zip(bits, LINES, strict=False):
        left.plot(inside, rounded(inside, count), color=look["color"], lw=1.1, label=f"{count} bits")
    left.set(title="rounded value", xlabel="value")
    left.legend(frameon=False, fontsize=8)
    right.plot(values, (np.abs(values) <= 1).astype(float), color=BLUE, lw=1.4, label="straight-through")
    right.plot(values, np.zeros_like(values), color=SOFT, lw=1.4, ls="--", label="true, between the steps")
    right.set(title="gradient", xlabel="value", ylim=(-0.1, 1.4))
    right.legend(frameon=False, fontsize=8, loc="upper right")
    for ax in (left, right):
        ax.grid(axis="y")
    return figure


def rounded(values: np.ndarray, bits: int) -> np.ndarray:
    """Values on the symmetric grid of so many bits whose largest number is 1."""
    most = 2 ** (bits - 1) - 1
    return np.clip(np.rint(values * most), -most - 1, most) / most


@styled
def by_bits(untrained: Mapping[int, float], full: float, trained: float) -> Figure:
    """Test accuracy (percent) by the bits of the weights: rounded without training, 8 bits trained, and (grey) full."""
    figure = Figure(figsize=(0.62 * WIDTH, 2.7), layout="constrained")
    ax = figure.subplots()
    ax.axhline(full, color=SOFT, lw=1, label="full precision")
    ax.plot(list(untrained), list(untrained.values()), "o-", color=INK, ms=4, lw=1, label="rounded, not trained")
    ax.plot(8, trained, "D", color=ORANGE, ms=5, label="8 bits, trained")
    ax.set(xlabel="bits of the weights", ylabel="test accuracy (%)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(axis="y")
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


@styled
def by_input(results: pd.DataFrame, pairs: Mapping[str, tuple[str, str]]) -> Figure:
    """Test accuracy (percent) by what a student sees, for `pairs` of rows: labels alone, and with the teacher.

    A grey line joins the runs of a seed; pairs without runs are left out.
    """
    final = results[(results.purpose == "final") & results.test_accuracy.notna()]
    runs = {row: each.set_index("seed").test_accuracy for row, each in final.groupby("method")}
    shown = {name: [runs.get(row) for row in pair] for name, pair in pairs.items() if any(row in runs for row in pair)}
    figure = Figure(figsize=(WIDTH, 0.9 + 0.55 * len(shown)), layout="constrained")
    ax = figure.subplots()
    for place, pair in enumerate(shown.values()):
        _pair(ax, place, *pair)
    ax.set_yticks(range(len(shown)), list(shown))
    ax.set_ylim(max(len(shown), 1) - 0.5, -0.5)
    ax.set_xlabel("test accuracy (%)")
    ax.grid(axis="x")
    ax.tick_params(axis="y", length=0)
    for name, fill in (("labels alone", "white"), ("with the teacher", BLUE)):
        ax.plot([], [], "o", mfc=fill, mec=BLUE, ms=5, label=name)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    return figure


def _pair(ax: Axes, place: int, alone: pd.Series | None, taught: pd.Series | None) -> None:
    series = [each for each in (alone, taught) if each is not None]
    seeds = sorted(set().union(*(each.index for each in series)))
    heights = dict(zip(seeds, place + np.linspace(-0.18, 0.18, len(seeds)) * (len(seeds) > 1), strict=True))
    if alone is not None and taught is not None:
        for seed in alone.index.intersection(taught.index):
            ax.plot([alone[seed], taught[seed]], [heights[seed]] * 2, color=SOFT, lw=1, zorder=1)
    for each, fill in ((alone, "white"), (taught, BLUE)):
        if each is not None:
            ax.plot(each, [heights[seed] for seed in each.index], "o", mfc=fill, mec=BLUE, ms=5, zorder=2)
