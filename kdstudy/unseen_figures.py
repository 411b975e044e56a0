"""Figures of students without real images; plain data in, a matplotlib `Figure` out."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from kdstudy.figures import BLUE, GRID, INK, MANY_CLASSES, ORANGE, SOFT, WIDTH, styled
from kdstudy.tables import BASELINE_STAGE, label

MARGIN = 1.0  # inches left of the images, for what they are


@styled
def rows_of_images(rows: Mapping[str, tuple[np.ndarray, Sequence[str]]]) -> Figure:
    """A row of images (N, H, W, C) uint8 for each name, each image under its caption."""
    columns = max(len(images) for images, _ in rows.values())
    side = (WIDTH - MARGIN) / columns
    figure = Figure(figsize=(WIDTH, len(rows) * (side + 0.12) + 0.1), layout="constrained")
    axes = figure.subplots(len(rows), 1 + columns, squeeze=False, width_ratios=[MARGIN / side, *[1] * columns])
    for line, (name, (images, captions)) in zip(axes, rows.items(), strict=True):
        for ax in line:
            ax.axis("off")
        line[0].text(0, 0.5, name, va="center", fontsize=8.5, transform=line[0].transAxes)
        for ax, image, caption in zip(line[1:], images, captions, strict=False):
            picture = image if image.shape[2] in (3, 4) else image[..., 0]
            ax.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            ax.set_title(caption, fontsize=7, loc="center", pad=2)
    return figure


@styled
def targets(similarity: Tensor, drawn: Mapping[str, Tensor], class_names: Sequence[str]) -> Figure:
    """How alike classes (C, C) are to a classifier, and beside it answers (N, C) that were drawn, a row each."""
    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    axes = figure.subplots(1, 1 + len(drawn), width_ratios=[1.25, *[1] * len(drawn)])
    _map(axes[0], similarity, class_names, rows=class_names)
    axes[0].set(title="likeness of classes, from 0 to 1", xlabel="its likeness to", ylabel="class")
    for ax, (title, values) in zip(axes[1:], drawn.items(), strict=True):
        _map(ax, values, class_names)
        ax.set(title=title, xlabel="class")
    axes[1].set_ylabel("targets, one in a row")
    return figure


def _map(ax: Axes, values: Tensor, class_names: Sequence[str], rows: Sequence[str] = ()) -> None:
    """Values of 0 to 1, darker where they are higher; numbers where rows have names and there is room."""
    few = len(class_names) <= MANY_CLASSES
    ticks = {"xticklabels": class_names if few else False, "yticklabels": rows if few and rows else False}
    numbers = {"annot": True, "fmt": ".1f", "annot_kws": {"size": 6.5}} if rows and len(rows) <= 12 else {}
    sns.heatmap(values.numpy(), ax=ax, cmap="Blues", vmin=0, vmax=1, cbar=False, **numbers, **ticks)
    ax.tick_params(length=0)
    ax.tick_params(axis="y", rotation=0)
    ax.tick_params(axis="x", rotation=90 if few and max(map(len, class_names)) > 2 else 0)


@styled
def points(real: Tensor, made: Mapping[str, Tensor]) -> Figure:
    """Real points (N, 2) in grey and, in a panel for each name, what was made of them in blue."""
    figure = Figure(figsize=(WIDTH, 0.98 * WIDTH / len(made)), layout="constrained")
    axes = figure.subplots(1, len(made), squeeze=False, sharex=True, sharey=True)[0]
    for ax, (title, each) in zip(axes, made.items(), strict=True):
        ax.plot(*each.numpy().T, "o", color=BLUE, ms=2, alpha=0.45, mew=0)
        ax.plot(*real.numpy().T, "o", color=INK, ms=3, mew=0)
        ax.set(aspect="equal", title=title)
        ax.tick_params(length=0, labelbottom=False, labelleft=False)
        ax.spines[:].set_visible(False)
    low, high = real.amin(dim=0).numpy(), real.amax(dim=0).numpy()
    limits = zip(low - 0.25 * (high - low), high + 0.25 * (high - low), strict=True)  # what lies beyond is left out
    axes[0].set(**dict(zip(("xlim", "ylim"), limits, strict=True)))
    return figure


@styled
def duel(losses: pd.DataFrame, histories: pd.DataFrame) -> Figure:
    """The disagreement of student and teacher in the first pseudo-batches (`unseen.Duel.losses`), and by epoch.

    Left every optimiser step, its turn by colour. Right the means over an epoch of each run, as `histories` have them:
    what the generator finds, and what the student's steps leave of it.
    """
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2], sharey=True)
    places = np.arange(len(losses))
    left.plot(places, losses.disagreement, color=GRID, lw=1, zorder=1)
    for turn, color in (("generator", ORANGE), ("student", BLUE)):
        own = (losses.turn == turn).to_numpy()
        left.plot(places[own], losses.disagreement[own], "o", color=color, ms=2.5, label=f"{turn}'s steps")
    left.set(xlabel="optimiser step", ylabel="disagreement (nats)", title="the first pseudo-batches of a run")
    left.legend(frameon=False, fontsize=8, loc="upper right")
    for _, run in histories.groupby("run", sort=False):
        epochs = np.arange(1, len(run) + 1)
        right.plot(epochs, -run.generator, color=ORANGE, lw=1)
        right.plot(epochs, run.kd, color=BLUE, lw=1)
    right.set(xlabel="epoch", title="all epochs, a line for each seed")
    right.set_ylim(bottom=0)
    right.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for ax in (left, right):
        ax.grid(axis="y")
    return figure


@styled
def beside_chance(results: pd.DataFrame, stage: str, chance: float) -> Figure:
    """Test accuracy (filled) and agreement with the teacher (open) of a stage's rows and of its baselines, in percent.

    Means over the final runs; small dots are single accuracies. The lines are chance and the teachers' mean.
    """
    final = results[(results.purpose == "final") & results.test_accuracy.notna()]
    groups = [
        group for group in final.groupby(["stage", "method"], sort=False) if group[0][0] in (BASELINE_STAGE, stage)
    ]
    figure = Figure(figsize=(WIDTH, 1.1 + 0.3 * len(groups)), layout="constrained")
    ax = figure.subplots()
    for place, ((of, _), runs) in enumerate(groups):
        _accuracies(ax, place, runs, BLUE if of == stage else INK)
    ax.set_yticks(range(len(groups)), [label(method) for (_, method), _ in groups])
    ax.set_ylim(len(groups) - 0.4, -0.6)
    ax.set(xlim=(0, 100), xlabel="percent of the test images")
    lines = {"chance": chance} | (
        {"teacher": final.groupby("seed").teacher_accuracy.first().mean()} if len(final) else {}
    )
    for name, value in lines.items():
        ax.axvline(value, color=SOFT, lw=1, ls="--" if name == "chance" else "-", zorder=0)
        ax.annotate(name, (value, 1), xycoords=ax.get_xaxis_transform(), xytext=(0, 3), textcoords="offset points",
                    ha="center", va="bottom", fontsize=8, color=SOFT)  # fmt: skip
    looks = {"test accuracy": BLUE, "agreement with the teacher": "white"}
    for name, fill in looks.items():
        ax.plot([], [], "o", mfc=fill, mec=BLUE, ms=6, label=name)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    ax.grid(axis="x")
    ax.tick_params(axis="y", length=0)
    return figure


def _accuracies(ax: Axes, place: int, runs: pd.DataFrame, color: str) -> None:
    ax.plot(runs.test_accuracy, [place] * len(runs), "o", color=color, ms=2.5, alpha=0.6, zorder=2)
    ax.plot(runs.agreement.mean(), place + 0.18, "o", mfc="white", mec=color, ms=5, zorder=3)
    ax.plot(runs.test_accuracy.mean(), place, "o", color=color, ms=6, zorder=3)
