"""Every figure of the study, each a function from plain data to a matplotlib `Figure`; nothing else draws."""

import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path

import matplotlib.style
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from kdstudy.answers import Sample, Target
from kdstudy.files import atomic_write
from kdstudy.insides import Looks, Sides
from kdstudy.relations import image_gap
from kdstudy.tables import label, thesis_title

DPI = 120
WIDTH = 8.4  # inches; a README column
INK, SOFT, GRID = "#24292f", "#8c959f", "#e6e8eb"
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"  # of Okabe and Ito's palette, apart for every kind of sight
LINES = (  # of the same palette, each with a marker of its own
    {"color": INK, "marker": "o"},
    {"color": BLUE, "marker": "s"},
    {"color": ORANGE, "marker": "^"},
    {"color": GREEN, "marker": "v"},
    {"color": "#cc79a7", "marker": "D"},
    {"color": "#56b4e9", "marker": "P"},
)
SIDESTEP = 1.06  # of points that would lie upon each other, on an axis of logarithms
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that a figure is the same on every machine
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
styled = matplotlib.style.context(["default", STYLE])  # whatever the session or a matplotlibrc say
MANY_CLASSES = 20  # from here on, classes are no longer named one by one
SIGNIFICANT = 0.05


@styled  # some texts are made only when they are drawn
def show(figure: Figure, path: Path) -> Image:
    """Write the figure to `path` (.png, atomically) and return the same bytes for a notebook.

    Equal data give equal bytes: nothing of the time, the machine or the library's version is in them.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None}, pil_kwargs={"optimize": True})
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return Image(data=buffer.getvalue(), format="png", width=round(96 * figure.get_figwidth()))


def folder(profile: str, name: str) -> Path:
    """The folder for a stage's figures, made if need be: it is there even if it stays empty."""
    path = Path("reports", profile, "figures", name)
    path.mkdir(parents=True, exist_ok=True)
    return path


def _figure(height: float, width: float = WIDTH) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


@styled
def image_grid(images: np.ndarray, captions: Sequence[str], columns: int = 10) -> Figure:
    """Images (N, H, W, C) uint8 with 1, 3 or 4 channels, row by row, each under its caption."""
    rows = math.ceil(len(images) / columns)
    size = WIDTH / columns
    figure = _figure(height=rows * (size + 0.16))
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, image, caption in zip(axes.flat, images, captions, strict=False):
        _draw_image(ax, image)
        ax.set_title(caption, fontsize=8, loc="center", pad=3)
    return figure


def _draw_image(ax: Axes, image: np.ndarray) -> None:
    # two channels are no picture that one could look at: the first is shown
    ax.imshow(image if image.shape[2] in (3, 4) else image[..., 0], cmap="gray", vmin=0, vmax=255)
    ax.axis("off")


@styled
def learning_curves(histories: pd.DataFrame) -> Figure:
    """Accuracy (percent) on training and test images and learning rate by epoch: one line for each final run."""
    runs = _final_runs(histories)
    figure = _figure(height=3.6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for run in runs:
        epochs = np.arange(1, len(run) + 1)
        top.plot(epochs, run.train_accuracy, color=ORANGE, lw=0.9, alpha=0.8)
        top.plot(epochs, run.test_accuracy, color=BLUE, lw=0.9, alpha=0.8)
        bottom.step(epochs, run.learning_rate, color=INK, lw=1, where="mid")
    top.set_ylabel("accuracy (%)")
    top.set_ylim(*_accuracy_limits(runs))
    top.set_title(f"training images as augmented, test images as they are; {len(runs)} seeds")
    _name_lines(top, runs, {"train_accuracy": ("training", ORANGE), "test_accuracy": ("test", BLUE)})
    bottom.set(yscale="log", ylabel="learning rate", xlabel="epoch")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in (top, bottom):
        ax.grid(axis="y")
    return figure


def _name_lines(ax: Axes, runs: Sequence[pd.DataFrame], names: Mapping[str, tuple[str, str]]) -> None:
    """Put a name at the end of each bundle of lines, the upper one above its end and the lower one below."""
    if not runs:
        return
    end = max(len(run) for run in runs)
    heights = {column: float(np.mean([run[column].iloc[-1] for run in runs])) for column in names}
    for rank, column in enumerate(sorted(names, key=heights.__getitem__)):
        text, color = names[column]
        place = {"xytext": (5, 5 if rank else -5), "textcoords": "offset points", "va": "center"}
        ax.annotate(text, (end, heights[column]), color=color, annotation_clip=False, **place)


def _final_runs(histories: pd.DataFrame) -> list[pd.DataFrame]:
    if histories.empty:
        return []
    final = histories[histories.purpose == "final"]
    return [run for _, run in final.groupby("run", sort=False)]


def _accuracy_limits(runs: Sequence[pd.DataFrame]) -> tuple[float, float]:
    """Limits that leave the lowest 30 % of the test accuracies out, so that the differences at the end can be seen."""
    if not runs:
        return 0.0, 100.0
    epochs = pd.concat(runs)
    low, high = epochs.test_accuracy.quantile(0.3), epochs[["train_accuracy", "test_accuracy"]].max().max()
    margin = 0.05 * (high - low) + 0.2
    return max(0.0, low - margin), high + margin


@styled
def softened(matrices: Mapping[float, np.ndarray], class_names: Sequence[str]) -> Figure:
    """Mean probabilities (K, K) by temperature: row = true class, column = the class that is given the probability."""
    figure = _figure(height=WIDTH / len(matrices))
    axes = figure.subplots(1, len(matrices), squeeze=False, sharey=True)[0]
    named = len(class_names) <= MANY_CLASSES
    for ax, (temperature, matrix) in zip(axes, matrices.items(), strict=True):
        # the root spreads the small probabilities, which are the point
        norm = PowerNorm(0.5, vmin=0, vmax=1)
        numbers = {"annot": _short(matrix), "fmt": "", "annot_kws": {"size": 6.5}} if len(class_names) <= 12 else {}
        ticks = {"xticklabels": class_names, "yticklabels": class_names} if named else _sparse_ticks(class_names)
        sns.heatmap(matrix, ax=ax, norm=norm, cmap="Blues", square=True, cbar=False, **numbers, **ticks)
        ax.set_title(f"T = {temperature:g}: mean probability (%)")
        ax.set_xlabel("class that is given the probability")
        ax.tick_params(length=0)
        ax.tick_params(axis="y", rotation=0)
        ax.tick_params(axis="x", rotation=90 if named and max(map(len, class_names)) > 2 else 0)
    axes[0].set_ylabel("true class")
    return figure


def _sparse_ticks(class_names: Sequence[str]) -> dict[str, int]:
    step = math.ceil(len(class_names) / 10)
    return {"xticklabels": step, "yticklabels": step}


def _short(matrix: np.ndarray) -> np.ndarray:
    """Probabilities in percent, "" below half of one."""
    return np.array([[f"{100 * p:.0f}" if p >= 0.005 else "" for p in row] for row in matrix])


@styled
def target_edits(sample: Sample, targets: Mapping[str, Target]) -> Figure:
    """One image's target before (grey) and after (colour) the edit of each row in `targets`.

    Classes stand in their order; with more than 20 of them in that of the first target, the highest first.
    """
    columns = 3
    rows = math.ceil((len(targets) + 1) / columns)
    figure = _figure(height=0.3 + 1.6 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[len(targets) + 1 :]:
        ax.axis("off")
    figure.suptitle(sample.title, x=0.01, ha="left", fontsize=9)
    _picture_panel(axes[0], sample.image)
    limits = _shared_limits(targets)
    for ax, (row, (before, after, unit)) in zip(axes[1:], targets.items(), strict=False):
        _edit_panel(ax, before, after, sample.label, sample.class_names)
        ax.set_title(label(row) + (" (unchanged)" if np.allclose(before, after) else ""), fontsize=8.5)
        ax.set_ylabel(unit, fontsize=8)
        ax.set_ylim(*limits[unit])
    return figure


def _picture_panel(ax: Axes, image: np.ndarray | None) -> None:
    ax.axis("off")
    if image is not None:
        _draw_image(ax.inset_axes((0.45, 0, 0.55, 1)), image)
    notes = [("before the edit", SOFT), ("after it", BLUE), ("after it, label", ORANGE)]
    for line, (text, color) in enumerate(notes):
        ax.text(0, 1 - 0.13 * line, text, color=color, fontsize=8, transform=ax.transAxes, va="top")


def _shared_limits(targets: Mapping[str, Target]) -> dict[str, tuple[float, float]]:
    limits = {}
    for unit in {unit for *_, unit in targets.values()}:
        values = np.concatenate([np.concatenate(pair) for *pair, other in targets.values() if other == unit])
        margin = 0.08 * (np.ptp(values) or 1.0)
        limits[unit] = (values.min() - margin, values.max() + margin)
    return limits


def _edit_panel(ax: Axes, before: np.ndarray, after: np.ndarray, true_class: int, class_names: Sequence[str]) -> None:
    named = len(class_names) <= MANY_CLASSES
    order = np.arange(len(before)) if named else np.argsort(-before, kind="stable")
    place = np.argsort(order)
    changed = ~np.isclose(before, after)
    size = 22 if named else 6
    ax.axhline(0, color=GRID, lw=0.8, zorder=0)
    ax.vlines(place[changed], before[changed], after[changed], color=BLUE, lw=1.2, alpha=0.5)
    ax.scatter(place, before, s=size, facecolor="white", edgecolor=SOFT, lw=1)
    colors = [ORANGE if c == true_class else BLUE for c in np.flatnonzero(changed)]
    ax.scatter(place[changed], after[changed], s=size, color=colors, zorder=3)
    ax.tick_params(length=2)
    if named:
        long_names = max(map(len, class_names)) > 2
        ax.set_xticks(place, class_names, rotation=90 if long_names else 0, fontsize=7)
        ax.get_xticklabels()[true_class].set_color(ORANGE)
    else:
        ax.set_xticks([place[true_class]], [class_names[true_class]], color=ORANGE, fontsize=7)


@styled
def forest(table: pd.DataFrame) -> Figure:
    """Paired differences to vanilla KD in points, with 95 % intervals, from `tables.comparison_table`.

    Filled and coloured where Holm's p is below 0.05. What reaches beyond the axis ends in an arrow; its numbers are
    printed beside it.
    """
    rows = table[table.difference_to_kd.notna()].reset_index(drop=True)
    figure = _figure(height=0.75 + 0.27 * len(rows))
    ax = figure.subplots()
    if rows.empty:
        ax.axis("off")
        ax.text(0, 0.5, "No method has runs to compare with those of vanilla KD.", color=SOFT)
        return figure
    ax.axvline(0, color=INK, lw=0.8)
    limits = _forest_limits(rows)
    for place, row in enumerate(rows.itertuples()):
        color = SOFT if not row.p_holm < SIGNIFICANT else BLUE if row.difference_to_kd > 0 else ORANGE
        _interval(ax, place, row.difference_to_kd, row.difference_low, row.difference_high, limits, color)
        ax.text(1.02, place, _forest_text(row), transform=ax.get_yaxis_transform(), va="center", fontsize=8)
    ax.set_yticks(range(len(rows)), [f"{label(row.method)}  (n = {row.pairs})" for row in rows.itertuples()])
    ax.set_ylim(len(rows) - 0.5, -0.6)
    ax.text(1.02, -0.9, "points [95 % interval]  p (Holm)", transform=ax.get_yaxis_transform(), fontsize=8, color=SOFT)
    ax.text(0, -0.9, "vanilla KD", ha="center", fontsize=8)
    ax.set_xlim(*limits)
    ax.set_xlabel("test accuracy, paired difference to vanilla KD (points, 95 % interval)")
    ax.grid(axis="x")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return figure


def _forest_text(row) -> str:
    text = f"{row.difference_to_kd:+.2f}"
    if not np.isnan(row.difference_low):
        text += f" [{row.difference_low:+.2f}, {row.difference_high:+.2f}]"
    return (text + ("" if np.isnan(row.p_holm) else f"  {row.p_holm:.2g}")).replace("-", "\N{MINUS SIGN}")


def _forest_limits(rows: pd.DataFrame) -> tuple[float, float]:
    """Limits with 0 between them that hold all intervals, but for those three times as far off as most."""
    reach = rows[["difference_to_kd", "difference_low", "difference_high"]]
    far = 3 * float(reach.abs().max(axis=1).median())
    low, high = max(float(reach.min().min()), -far), min(float(reach.max().max()), far)
    margin = max(0.04 * (max(high, 0) - min(low, 0)), 0.1)
    return min(low, 0.0) - margin, max(high, 0.0) + margin


def _interval(
    ax: Axes, place: float, mean: float, low: float, high: float, limits: tuple[float, float], color: str
) -> None:
    """A dot with its interval, cut at the axis' limits, where arrows say that it goes on."""
    left, right = limits
    if not np.isnan(low):
        ax.plot([max(low, left), min(high, right)], [place, place], color=color, lw=1.6, solid_capstyle="butt")
    if left <= mean <= right:
        ax.plot(mean, place, "o", color=color, ms=5)
    ends = np.nan_to_num([mean, low, high], nan=mean)
    for edge, marker, beyond in ((left, "<", ends.min() < left), (right, ">", ends.max() > right)):
        if beyond:
            ax.plot(edge, place, marker, color=color, ms=5, clip_on=False)


@styled
def method_curves(histories: pd.DataFrame, lowest: float | None = None) -> Figure:
    """Test accuracy (percent) by epoch: a panel per method and a line per final run, in blue.

    Behind them in grey, in every panel, the means of the CE student (dashed) and of vanilla KD. The lowest accuracies
    are left out unless `lowest` says where the axis begins.
    """
    runs = _final_runs(histories)
    methods = list(dict.fromkeys(run.method.iloc[0] for run in runs))
    columns = 4
    rows = max(math.ceil(len(methods) / columns), 1)
    figure = _figure(height=0.4 + 1.45 * rows)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    means = [_mean_curve([run for run in runs if run.method.iloc[0] == key]) for key in ("ce", "kd")]
    for ax, method in zip(axes, methods, strict=False):
        for mean, line in zip(means, ("--", "-"), strict=True):
            ax.plot(mean.index, mean, color=SOFT, lw=0.9, ls=line)
        for run in (run for run in runs if run.method.iloc[0] == method):
            ax.plot(np.arange(1, len(run) + 1), run.test_accuracy, color=BLUE, lw=0.8, alpha=0.8)
        ax.set_title(label(method))
        ax.grid(axis="y")
    for ax in axes[len(methods) :]:
        ax.axis("off")
    axes[0].set_ylim(*_accuracy_limits(runs))
    if lowest is not None:
        axes[0].set_ylim(bottom=lowest)
    axes[0].xaxis.set_major_locator(MaxNLocator(4, integer=True))
    figure.supxlabel("epoch", fontsize=9)
    figure.supylabel("test accuracy (%)", fontsize=9)
    return figure


def _mean_curve(runs: Sequence[pd.DataFrame]) -> pd.Series:
    if not runs:
        return pd.Series(dtype=float)
    curves = [run.test_accuracy.set_axis(range(1, len(run) + 1)) for run in runs]
    return pd.concat(curves, axis=1).mean(axis=1)


@styled
def attention_maps(seen: Looks, images: int = 5) -> Figure:
    """Where teacher and students look in the first test images: over each image, its map of every stage, enlarged.

    The brighter a place, the more a network responds there; each panel has its own scale.
    """
    networks = {"teacher": seen.teacher, **seen.students}
    stages, images = len(seen.teacher), min(images, len(seen.images))
    widths = [1, *[0.12, *[1] * len(networks)] * stages]  # each stage behind a gap
    size = WIDTH / sum(widths)
    figure = _figure(height=images * size + 0.5)
    grid = figure.add_gridspec(images, len(widths), width_ratios=widths)
    for row, image in enumerate(seen.images[:images]):
        _draw_image(figure.add_subplot(grid[row, 0]), image)
        for stage, (place, (name, maps)) in product(range(stages), enumerate(networks.items(), start=2)):
            ax = figure.add_subplot(grid[row, place + stage * (1 + len(networks))])
            _overlay(ax, image, maps[stage][row].numpy())
            if not row:
                _name_column(ax, name, stage + 1, maps[stage].shape[1:])
    return figure


def _name_column(ax: Axes, name: str, stage: int, sides: Sequence[int]) -> None:
    ax.set_title(label(name).replace(" ", "\n"), fontsize=6.5, loc="center", pad=3)
    if name == "teacher":
        note = {"xytext": (0, 22), "textcoords": "offset points", "fontsize": 8, "annotation_clip": False}
        ax.annotate(f"stage {stage}: " + " x ".join(map(str, sides)), (0, 1), xycoords="axes fraction", **note)


def _overlay(ax: Axes, image: np.ndarray, looked: np.ndarray) -> None:
    grey = image.mean(axis=2)
    height, width = grey.shape
    ax.imshow(grey, cmap="gray", vmin=0, vmax=255)
    ax.imshow(
        looked, cmap="inferno", alpha=0.7, interpolation="bilinear", extent=(-0.5, width - 0.5, height - 0.5, -0.5)
    )
    ax.axis("off")


@styled
def boundaries(seen: Sides, images: int = 3) -> Figure:
    """Which neurons of the teacher's last stage are on for the first test images, and what students say of them.

    A strip per network: one row for each position of the map, one column for each channel. Blue is on, grey off, orange
    where a student says the opposite of the teacher.
    """
    networks = {"teacher": seen.teacher.numpy()} | {name: on.numpy() for name, on in seen.students.items()}
    images = min(images, len(seen.images))
    figure = _figure(height=images * (0.3 * len(networks) + 0.2) + 0.4)
    grid = figure.add_gridspec(images, 2, width_ratios=[1, 7])
    for number in range(images):
        _draw_image(figure.add_subplot(grid[number, 0]), seen.images[number])
        strips = grid[number, 1].subgridspec(len(networks), 1)
        for strip, (name, on) in zip(strips, networks.items(), strict=True):
            _strip(figure.add_subplot(strip), name, on[number], networks["teacher"][number])
    figure.supxlabel("channel of the teacher's last stage", fontsize=9)
    return figure


def _strip(ax: Axes, name: str, on: np.ndarray, teacher: np.ndarray) -> None:
    wrong = on != teacher
    colors = ListedColormap([GRID, BLUE, ORANGE])
    ax.imshow(np.where(wrong, 2, on), cmap=colors, vmin=0, vmax=2, aspect="auto", interpolation="nearest")
    said = f"{100 * on.mean():.0f} % on" if name == "teacher" else f"{100 - 100 * wrong.mean():.0f} % agree"
    ax.set_ylabel(f"{label(name)}\n{said}", rotation=0, ha="right", va="center", fontsize=7.5)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


@styled
def image_relations(tables: Mapping[str, Mapping[str, Tensor]], class_names: Sequence[str]) -> Figure:
    """How networks relate images, darker where two are more alike: `relations.image_tables` by network, teacher first.

    `class_names` are those of the images, which stand class by class. Above each student: `relations.image_gap`.
    """
    shown = {"maps": "similarities of last maps", "cosines": "cosines of embeddings"}
    figure = _figure(height=len(shown) * (WIDTH / len(tables) + 0.1))
    axes = figure.subplots(len(shown), len(tables), squeeze=False)
    for row, (kind, text) in zip(axes, shown.items(), strict=True):
        networks = {name: each[kind] for name, each in tables.items()}
        low, high = _usual_values(networks.values())
        for ax, (name, table) in zip(row, networks.items(), strict=True):
            drawn = ax.imshow(table.numpy(), cmap="Blues", vmin=low, vmax=high, interpolation="nearest")
            apart = "" if name == "teacher" else f": {image_gap(table, networks['teacher']):.3f} off"
            ax.set_title(label(name) + apart)
            _name_classes(ax, class_names)
        row[0].set_ylabel(text)
        figure.colorbar(drawn, ax=row, fraction=0.02, pad=0.01).outline.set_visible(False)
    return figure


def _usual_values(tables: Iterable[Tensor]) -> tuple[float, float]:
    """Limits that leave out the outermost percents, and every image's likeness to itself."""
    apart = [table.numpy()[~np.eye(len(table), dtype=bool)] for table in tables]
    low, high = np.quantile(np.concatenate(apart), [0.01, 0.99])
    return float(low), float(high)


def _name_classes(ax: Axes, class_names: Sequence[str]) -> None:
    """Lines between the classes, and a name in the middle of each."""
    starts = [place for place, name in enumerate(class_names) if not place or name != class_names[place - 1]]
    middles = [(start + end - 1) / 2 for start, end in pairwise([*starts, len(class_names)])]
    names = [class_names[start] for start in starts]
    for start in starts[1:]:
        ax.axhline(start - 0.5, color="white", lw=0.6)
        ax.axvline(start - 0.5, color="white", lw=0.6)
    ax.set_xticks(middles, names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=7)
    ax.set_yticks(middles, names, fontsize=7)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


@styled
def flow_matrices(matrices: Mapping[str, Tensor], stage: int) -> Figure:
    """FSP's matrices (m, n) from a stage to the next by network, the teacher's first, all on one scale.

    Above each student: the length of the difference to the teacher's, as a share of the teacher's.
    """
    first = matrices["teacher"]
    height, width = first.shape
    figure = _figure(height=0.7 + WIDTH / len(matrices) * height / width)
    axes = figure.subplots(1, len(matrices), squeeze=False, sharey=True)[0]
    low, high = (function(torch.stack(list(matrices.values()))).item() for function in (torch.amin, torch.amax))
    for ax, (name, matrix) in zip(axes, matrices.items(), strict=True):
        drawn = ax.imshow(matrix.numpy(), cmap="Blues", vmin=low, vmax=high, interpolation="nearest")
        apart = "" if name == "teacher" else f": {100 * float((matrix - first).norm() / first.norm()):.0f} % off"
        ax.set_title(label(name) + apart)
        ax.set_xlabel(f"channel of stage {stage + 1}")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    axes[0].set_ylabel(f"channel of stage {stage}")
    figure.colorbar(drawn, ax=axes, fraction=0.02, pad=0.01, shrink=0.8).outline.set_visible(False)
    return figure


@styled
def published_and_ours(table: pd.DataFrame, title: str) -> Figure:
    """Published accuracy (diamond) and ours (dot with 95 % interval) by method, from `tables.thesis_table`.

    A collapse lies beyond the axis: an arrow at its edge points there.
    """
    figure = _figure(height=0.85 + 0.27 * len(table))
    ax = figure.subplots()
    limits = _accuracy_window(table)
    for place, row in enumerate(table.itertuples()):
        shown = min(max(row.published, limits[0]), limits[1])
        marker = "D" if shown == row.published else "<" if shown > row.published else ">"
        ax.plot(shown, place, marker, mfc="white", mec=ORANGE, ms=5, zorder=3, clip_on=False)
        if row.n:
            _interval(ax, place, row.ours, row.ci_low, row.ci_high, limits, BLUE)
        text = f"{row.published:.2f}"
        ax.text(1.02, place, text, color=ORANGE, transform=ax.get_yaxis_transform(), va="center", fontsize=8)
        ours = f"{row.ours:.2f}  (n = {row.n})" if row.n else "diverged" if row.diverged else "not run"
        ax.text(1.11, place, ours, color=BLUE, transform=ax.get_yaxis_transform(), va="center", fontsize=8)
    ax.text(1.02, -0.9, "published", color=ORANGE, transform=ax.get_yaxis_transform(), fontsize=8)
    ax.text(1.14, -0.9, "ours", color=BLUE, transform=ax.get_yaxis_transform(), fontsize=8)
    ax.set_yticks(range(len(table)), [label(method) for method in table.method])
    ax.set_ylim(len(table) - 0.5, -0.6)
    ax.set_xlim(*limits)
    ax.set_xlabel("test accuracy (%)")
    ax.set_title(title)
    ax.grid(axis="x")
    ax.tick_params(axis="y", length=0, pad=8)  # room for an arrow at the edge
    return figure


def _accuracy_window(table: pd.DataFrame) -> tuple[float, float]:
    """Limits around the bulk of the accuracies and their intervals."""
    values = pd.concat([table.published, table.ours, table.ci_low, table.ci_high]).dropna().astype(float)
    near = values[(values - values.median()).abs() <= 10]
    margin = max(0.06 * float(np.ptp(near)), 0.3)
    return float(near.min()) - margin, float(near.max()) + margin


@styled
def share_curves(results: pd.DataFrame) -> Figure:
    """Test accuracy (percent) by share of the training images, from `table_files.by_share`: a line for each method.

    It joins the means over seeds; dots and bars are the seeds and their range. The grey line is the teachers' mean.
    """
    final = results[(results.purpose == "final") & results.test_accuracy.notna()]
    figure = _figure(height=3.6)
    ax = figure.subplots()
    ax.set(xscale="log", xlabel="share of the training images", ylabel="test accuracy (%)")
    ax.grid(axis="y")
    if final.empty:
        ax.set_title("No run has finished.")
        return figure
    ax.axhline(final.groupby("seed").teacher_accuracy.first().mean(), color=SOFT, lw=1, label="Teacher")
    methods = final.method.unique()
    places = SIDESTEP ** np.linspace(-1, 1, len(methods))
    for method, place, look in zip(methods, places, itertools.cycle(LINES)):
        _share_line(ax, final[final.method == method], place, label=label(method), **look)
    shares = sorted(final.share.unique())
    ax.set_xticks(shares, [f"{share:g} %" for share in shares])
    ax.set_xticks([], minor=True)
    ax.set_xlim(shares[0] / 1.3, shares[-1] * 1.3)
    names = sorted(zip(*ax.get_legend_handles_labels(), strict=True), key=lambda name: -name[0].get_ydata()[-1])
    figure.legend(*zip(*names, strict=True), loc="outside right center", frameon=False, fontsize=8)
    return figure


def _share_line(ax: Axes, runs: pd.DataFrame, place: float, **look) -> None:
    at_share = runs.groupby("share").test_accuracy
    x = at_share.mean().index * place
    ax.vlines(x, at_share.min(), at_share.max(), color=look["color"], lw=1, alpha=0.5)
    ax.plot(runs.share * place, runs.test_accuracy, "o", ms=2.5, color=look["color"], alpha=0.6)
    ax.plot(x, at_share.mean(), ms=5, lw=1.2, **look)


def show_curves_by_share(histories: pd.DataFrame, folder: Path) -> list[Image]:
    """`method_curves` of the runs on each share of the images below all of them, as learning_curves_<percent>.png.

    `histories` are those of `table_files.by_share`. Shares on which nothing was trained by gradient have none.
    """
    shares = sorted(share for share in histories.share.unique() if share < 100)
    return [_show_share(histories[histories.share == share], share, folder) for share in shares]


def _show_share(histories: pd.DataFrame, share: float, folder: Path) -> Image:
    figure = method_curves(histories)
    figure.suptitle(f"{share:g} % of the training images", x=0.01, ha="left", fontsize=9)
    return show(figure, folder / f"learning_curves_{share:g}.png")


def show_forests(tables: Mapping[str, pd.DataFrame], folder: Path) -> list[Image]:
    """`forest` of every setting's comparison table, as comparison_<setting>.png."""
    return [show(forest(table), folder / f"comparison_{setting}.png") for setting, table in tables.items()]


def show_thesis_tables(tables: Mapping[int, pd.DataFrame], folder: Path) -> list[Image]:
    """`published_and_ours` of thesis tables by number, as thesis_table_<n>.png."""
    return [
        show(published_and_ours(table, thesis_title(number)), folder / f"thesis_table_{number}.png")
        for number, table in tables.items()
    ]
