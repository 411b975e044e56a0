"""The figures of the page on speed: how many times the naive loop, and how cost grows."""

from itertools import cycle

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, NullLocator

from kdstudy.bench import PAIRS
from kdstudy.figures import BLUE, INK, LINES, ORANGE, SOFT, WIDTH, styled
from kdstudy.params import MEASURED, WAYS
from kdstudy.speed import COMPILED, NAIVE, judge, spelled

MARKERS = dict(zip((*WAYS, MEASURED), "os^D", strict=True))  # of the ways to take steps; open if compiled
STYLES = ("-", "--", "-.", (0, (1, 1)))  # of devices
COLOURS = {student: look["color"] for student, look in zip(PAIRS, LINES[1:], strict=False)}
TITLES = {"students": "students trained together", "batch": "images in a batch", "threads": "CPU threads"}
ROW = 0.26  # inches


@styled
def ratios(frame: pd.DataFrame) -> Figure:
    """Images per second against the naive loop's, from `speed.read_bench`: a panel per device, a dot per variant.

    Goals of the study are upright lines, of the row that they are for.
    """
    shown = frame[frame.variant != NAIVE]
    devices = list(shown.groupby("device", sort=False))
    heights = [len(rows) + rows.student.nunique() for _, rows in devices]
    figure = Figure(figsize=(WIDTH, 0.9 + sum(0.7 + ROW * height for height in heights)), layout="constrained")
    axes = figure.subplots(max(len(devices), 1), 1, squeeze=False, sharex=True, height_ratios=heights or None)[:, 0]
    goals = judge(frame).set_index(["device", "student", "variant", "precision"]).least
    for ax, (device, rows) in zip(axes, devices, strict=False):
        ax.set_title(device)
        _variants(ax, rows, goals)
    if devices:
        _ratio_axis(axes, shown, goals)
        entries = [Line2D([], [], color=BLUE, marker="o", ls="", ms=5, label="measured"), _goal_entry()]
        figure.legend(handles=entries, loc="outside lower right", ncols=2, frameon=False, fontsize=8)
    else:
        _nothing(axes[0])
    return figure


def _goal_entry() -> Line2D:
    return Line2D([], [], color=ORANGE, marker="|", ls="", ms=10, mew=2, label="goal: at least")


def _nothing(ax: Axes) -> None:
    ax.axis("off")
    ax.text(0.5, 0.5, "not measured yet", ha="center", va="center", color=SOFT, transform=ax.transAxes)


def _variants(ax: Axes, rows: pd.DataFrame, goals: pd.Series) -> None:
    place, names = 0, {}
    for student, own in rows.groupby("student", sort=False):
        ax.text(-0.01, place, student, transform=ax.get_yaxis_transform(), ha="right", va="center", weight="bold")
        for row in own.itertuples():
            place += 1
            names[place] = f"{row.variant}, {row.precision}"
            ax.plot([1, row.ratio], [place, place], color=BLUE, lw=1.4, alpha=0.5)
            ax.plot(row.ratio, place, "o", color=BLUE, ms=5)
            ax.text(1.01, place, f"{row.ratio:.2f}", transform=ax.get_yaxis_transform(), va="center", fontsize=8)
            if (row.device, student, row.variant, row.precision) in goals.index:
                goal = goals[row.device, student, row.variant, row.precision]
                ax.plot(goal, place, "|", color=ORANGE, ms=10, mew=2, zorder=3)
        place += 1
    ax.axvline(1, color=INK, lw=0.8)
    ax.set_yticks(list(names), list(names.values()))
    ax.set_ylim(place - 0.4, -0.6)
    ax.grid(axis="x")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)


def _ratio_axis(axes: list[Axes], shown: pd.DataFrame, goals: pd.Series) -> None:
    values = [1.0, *shown.ratio, *goals[[device != "" for device in goals.index.get_level_values("device")]]]
    low, high = min(values) / 1.15, max(values) * 1.15
    _logarithmic(axes[-1], "x", [tick for tick in (0.25, 0.5, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30) if low < tick < high])
    axes[-1].set_xlim(low, high)
    axes[-1].set_xlabel("images per second of a student, times those of the naive loop")


def _logarithmic(ax: Axes, axis: str, ticks: list[float]) -> None:
    ax.set(**{f"{axis}scale": "log"})
    own = getattr(ax, f"{axis}axis")
    own.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    own.set_minor_locator(NullLocator())
    own.set_minor_formatter(NullFormatter())


@styled
def growth(points: pd.DataFrame) -> Figure:
    """Cost of one student's image, from `speed.growth_points`, relative to each line's first point; dotted: predicted.

    A panel for each series: students, batch, threads. Colours are students, markers the ways to take steps, and lines
    devices.
    """
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.subplots(1, len(TITLES), sharey=True)
    styles = dict(zip(points.device.unique(), cycle(STYLES), strict=False))
    for ax, series in zip(axes, TITLES, strict=True):
        ax.set_title(TITLES[series])
        own = points[points.series == series]
        if own.empty:
            _nothing(ax)
            continue
        for (student, device), line in own.groupby(["student", "device"], sort=False):
            _growth_line(ax, line, COLOURS.get(student, INK), styles[device])
        _logarithmic(ax, "x", sorted(own["at"].unique()))
        ax.grid(axis="y")
    measured = [ax for ax, series in zip(axes, TITLES, strict=True) if (points.series == series).any()]
    if measured:
        _cost_axis(measured, points)
        figure.legend(handles=_growth_entries(points, styles), loc="outside lower center", ncols=4, frameon=False,
                      fontsize=8)  # fmt: skip
    return figure


def _growth_line(ax: Axes, line: pd.DataFrame, colour: str, style: str | tuple) -> None:
    ax.plot(line["at"], line.predicted, color=colour, lw=0.9, ls=":", zorder=1)
    ax.plot(line["at"], line.cost, color=colour, lw=1.1, ls=style)
    for way, those in line.groupby("way"):
        ax.plot(those["at"], those.cost, color=colour, ls="", **_marker(way, colour))


def _marker(way: str, colour: str) -> dict:
    compiled = way.endswith(COMPILED)
    return {"marker": MARKERS[way.removesuffix(COMPILED)], "ms": 4.5, "mfc": "white" if compiled else colour}


def _cost_axis(axes: list[Axes], points: pd.DataFrame) -> None:
    values = pd.concat([points.cost, points.predicted]).astype(float)
    low, high = values.min() / 1.1, values.max() * 1.1
    steps = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1, 1.2, 1.5, 2, 3, 5)
    _logarithmic(axes[0], "y", [step for step in steps if low < step < high])
    axes[0].set_ylim(low, high)
    axes[0].set_ylabel("cost of a student's image,\nrelative to the first point")


def _growth_entries(points: pd.DataFrame, styles: dict) -> list[Line2D]:
    students = [Line2D([], [], color=COLOURS.get(name, INK), lw=2, label=name) for name in points.student.unique()]
    devices = [Line2D([], [], color=SOFT, ls=style, lw=1.1, label=name) for name, style in styles.items()]
    ways = [Line2D([], [], color=SOFT, ls="", label=spelled(way), **_marker(way, SOFT)) for way in points.way.unique()]
    return [*students, *ways, Line2D([], [], color=SOFT, ls=":", lw=0.9, label="predicted"), *devices]
