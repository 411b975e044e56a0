"""Figures of networks that learn together or from themselves; plain data in, a matplotlib `Figure` out."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kdstudy.companions import DEPLOYED, TOGETHER, means
from kdstudy.figures import BLUE, GREEN, GRID, INK, LINES, ORANGE, SOFT, WIDTH, styled
from kdstudy.tables import label

REFERENCES = {"ce": (INK, "--"), "kd": (SOFT, "-")}
FAR = 5.0  # points below the median of the accuracies; what is worse is shown at the edge


@styled
def companions(scores: pd.DataFrame) -> Figure:
    """What all networks of each row reach: `companions.networks`, of which rows with a single one are left out.

    Means over seeds. The deployed network is filled, the others are open, all together is a diamond. The lines are the
    means of the CE student (dashed) and of vanilla KD; an arrow at the edge stands for what is far below the rest.
    """
    found = means(scores)
    rows = {method: mean for method, mean in found.items() if len(mean) > 1}
    figure = Figure(figsize=(WIDTH, 0.95 + 0.27 * len(rows)), layout="constrained")
    ax = figure.subplots()
    if not rows:
        ax.axis("off")
        ax.text(0, 0.5, "No row has more networks than the one that it deploys.", color=SOFT)
        return figure
    references = {key: found[key][DEPLOYED] for key in REFERENCES if key in found}
    least = _least([*references.values(), *(value for mean in rows.values() for value in mean)])
    for key, value in references.items():
        color, line = REFERENCES[key]
        ax.axvline(value, color=color, ls=line, lw=1, zorder=0)
    for place, mean in enumerate(rows.values()):
        _networks_of_row(ax, place, mean, least)
    ax.set_yticks(range(len(rows)), [label(method) for method in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlabel("test accuracy (%), mean over seeds")
    ax.grid(axis="x")
    ax.tick_params(axis="y", length=0, pad=8)
    looks = {"deployed": ("o", BLUE, BLUE), "others": ("o", "white", SOFT), "all together": ("D", ORANGE, ORANGE)}
    for name, (marker, fill, edge) in looks.items():
        ax.plot([], [], marker, mfc=fill, mec=edge, ms=6, label=name)
    for key in references:
        ax.plot([], [], color=REFERENCES[key][0], ls=REFERENCES[key][1], lw=1, label=label(key))
    figure.legend(loc="outside upper right", ncols=len(looks) + len(references), frameon=False, fontsize=8)
    return figure


def _least(values: Sequence[float]) -> float:
    """The least accuracy that is shown in its place."""
    return max(min(values), float(np.median(values)) - FAR)


def _networks_of_row(ax: Axes, place: int, mean: pd.Series, least: float) -> None:
    others = mean.drop([DEPLOYED, TOGETHER], errors="ignore")
    inside = others[others >= least]
    ax.plot(inside, [place] * len(inside), "o", mfc="white", mec=SOFT, ms=6, zorder=2)
    looks = {TOGETHER: ("D", ORANGE, 5), DEPLOYED: ("o", BLUE, 6)}
    for name, (marker, color, size) in looks.items():
        if mean.get(name, -math.inf) >= least:
            ax.plot(mean[name], place, marker, mfc=color, mec=color, ms=size, zorder=3)
    beyond = [value for value in mean if value < least]
    if beyond:
        ax.plot(least, place, "<", color=SOFT, ms=5, clip_on=False)
        text = ", ".join(f"{value:.1f}" for value in sorted(beyond))
        ax.annotate(text, (least, place), xytext=(7, 0), textcoords="offset points", va="center", fontsize=7)


@styled
def distances(histories: pd.DataFrame, rows: Sequence[str]) -> Figure:
    """How far each network is from those that teach it, by epoch: a panel for each of these rows that has runs.

    It is the row's own weighted term on the training images, mean over seeds, so that panels are on scales of their
    own. Lines are the networks, the deployed one in blue.
    """
    final = histories[histories.purpose == "final"] if len(histories) else histories
    shown = [row for row in rows if len(final) and (final.method == row).any()]
    columns = 4
    figure = Figure(figsize=(WIDTH, 0.5 + 1.6 * max(math.ceil(len(shown) / columns), 1)), layout="constrained")
    axes = figure.subplots(max(math.ceil(len(shown) / columns), 1), columns, squeeze=False, sharex=True).ravel()
    for ax in axes[len(shown) :]:
        ax.axis("off")
    for ax, row in zip(axes, shown, strict=False):
        terms = _terms(final[final.method == row])
        for number, name in reversed(list(enumerate(terms))):
            color = BLUE if not number else SOFT
            ax.plot(terms.index + 1, terms[name], color=color, lw=1.4 if not number else 0.9)
        ax.set_title(label(row))
        highest = terms.max().max()
        ax.set_ylim(0, 1.08 * highest if highest > 0 else 1)
        ax.grid(axis="y")
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    figure.supxlabel("epoch", fontsize=9)
    figure.supylabel("distance to the teachers", fontsize=9)
    return figure


def _terms(runs: pd.DataFrame) -> pd.DataFrame:
    """The distillation terms of a row's networks by epoch, the deployed one's first; means over seeds."""
    names = [name for name in runs if name == "kd" or (name.startswith("peer") and name.endswith("_kd"))]
    return runs.groupby("epoch")[names].mean().dropna(axis=1, how="all")


@styled
def cycles(histories: pd.DataFrame, starts: Sequence[int]) -> Figure:
    """Learning rate, distance to the teacher and test accuracy of runs in cycles, by epoch.

    `histories` are those of one row's final runs and of the CE student; `starts` the 0-based epochs with which cycles
    begin, at each but the first of which the network is copied and teaches. Grey and dashed: the CE student's mean.
    """
    own, alone = histories[histories.method != "ce"], histories[histories.method == "ce"]
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1.5, 1.5])
    if len(alone):
        mean = alone.groupby("epoch").test_accuracy.mean()
        top.plot(mean.index + 1, mean, color=SOFT, ls="--", lw=1)
    for _, run in own.groupby("run", sort=False):
        top.plot(run.epoch + 1, run.test_accuracy, color=BLUE, lw=1)
        middle.plot(run.epoch + 1, run.kd, color=ORANGE, lw=1)
    rates = own.groupby("epoch").learning_rate.first()
    for start, stop in pairwise([*starts, len(rates)]):
        bottom.plot(np.arange(start, stop) + 1, rates.iloc[start:stop], color=INK, marker=".", lw=1)
    top.set_ylabel("test accuracy (%)")
    top.set_ylim(max(0.0, float(own.test_accuracy.quantile(0.2)) - 3), float(own.test_accuracy.max()) + 2)
    middle.set_ylabel("KL to the\nsnapshot")
    bottom.set(ylabel="learning rate", xlabel="epoch")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in (top, middle, bottom):
        ax.grid(axis="y")
        for start in starts[1:]:
            ax.axvline(start + 0.5, color=GREEN, lw=1, ls=":")
    for number, start in enumerate(starts):
        text = "labels alone" if not number else f"snapshot {number} teaches"
        place = {"xytext": (2, 3), "textcoords": "offset points", "va": "bottom", "fontsize": 8}
        top.annotate(text, (start + 0.5, 1), xycoords=top.get_xaxis_transform(), color=GREEN, **place)
    return figure


@styled
def steps(scores: Mapping[str, pd.Series], names: Sequence[str], title: str) -> Figure:
    """Accuracies from step to step: a thin line for each entry of `scores`, a seed's values by name, and their mean.

    `names` says which are shown, in their order; a value that is absent is left out.
    """
    shown = [name for name in names if any(name in values for values in scores.values())]
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    ax = figure.subplots()
    table = pd.DataFrame(scores).reindex(shown)
    places = np.arange(len(shown))
    for seed, look in zip(table, LINES[3:] * len(scores), strict=False):
        ax.plot(places, table[seed], color=GRID, lw=1, zorder=1)
        ax.plot(places, table[seed], look["marker"], mfc="white", mec=SOFT, ms=5, zorder=2, label=seed)
    ax.plot(places, table.mean(axis=1), color=BLUE, marker="o", lw=1.4, zorder=3, label="mean")
    ax.set_xticks(places, shown)
    ax.set_ylabel("test accuracy (%)")
    ax.set_title(title)
    ax.grid(axis="y")
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure
