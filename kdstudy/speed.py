"""What the page on speed says: tables and sentences from what the benchmark measured, and the study's goals."""

import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from IPython.display import Markdown

from kdstudy.bench import CLASSES, COLUMNS, PAIRS, SHAPE
from kdstudy.logit_table import bytes_needed, views_of
from kdstudy.models import build_model
from kdstudy.params import Params
from kdstudy.recipe import Recipe
from kdstudy.roofline import DTYPES, Kernel, Limits, Work, count_work
from kdstudy.sources import CIFAR_COUNTS

FOLDER = Path("reports/bench")
GROWTH = "_growth"  # ends the name of a file on how cost grows
COMMAND = "python -m kdstudy bench"
TABLE_COMMAND, GROWTH_COMMAND = f"{COMMAND} --table", f"{COMMAND} --growth"
NAIVE, TABLE = "naive", "table"  # a variant's name, and the end of one's
GPU, CPU = "GPU", "CPU"
MOST_OUTSIDE = 0.05  # the goal for the share of time in which a GPU has nothing to do
TABLED = "cifar100"  # the data set for which the time of making a table is said
COMPILED = "_compiled"  # ends the name of a way whose students are compiled
NAN = float("nan")
SECONDS = ((3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "\N{MICRO SIGN}s"))


class Goal(NamedTuple):
    """How many times the images of the naive loop, per student, so many students are to see, trained together."""

    kind: str  # of device
    student: str
    students: int
    precision: str
    least: float


GOALS = (
    *(Goal(GPU, student, 9, "bf16", least) for student, least in zip(PAIRS, (10.0, 6.0, 4.0), strict=True)),
    *(Goal(GPU, student, 1, "bf16", least) for student, least in zip(PAIRS, (6.0, 4.0, 3.0), strict=True)),
    Goal(CPU, "wrn_16_1", 4, "bf16", 2.4),
    *(Goal(CPU, student, 1, "bf16", 1.7) for student in PAIRS),
    *(Goal(CPU, student, 1, "fp32", 1.0) for student in PAIRS),
)


def read_bench(folder: Path = FOLDER) -> pd.DataFrame:
    """All tables that `python -m kdstudy bench` wrote to a folder, one below the other.

    Columns: `bench.COLUMNS`, and file, the table's name. Pairs are in the benchmark's order. No rows where nothing has
    been measured. Raises ValueError for a file that is no such table.
    """
    return _read((path for path in folder.glob("*.csv") if not path.stem.endswith(GROWTH)), COLUMNS)


def read_growth(folder: Path = FOLDER) -> pd.DataFrame:
    """The same for `python -m kdstudy bench --growth`, with `series` besides."""
    return _read(folder.glob(f"*{GROWTH}.csv"), ("series", *COLUMNS))


def _read(paths: Iterable[Path], columns: Sequence[str]) -> pd.DataFrame:
    frames = [pd.DataFrame(columns=[*columns, "file"])]
    for path in sorted(paths):
        frame = pd.read_csv(path, dtype={"torch": str, "python": str})
        if missing := [name for name in columns if name not in frame]:
            raise ValueError(f"{path} is no table of the benchmark: it lacks {', '.join(missing)}")
        ordered = frame.sort_values("student", key=lambda names: names.map(list(PAIRS).index), kind="stable")
        frames.append(ordered.assign(file=path.stem)[[*columns, "file"]])
    return pd.concat(frames[1:] or frames, ignore_index=True)


def kind_of(device: str) -> str:
    """GPU or CPU, from a device's name: a CPU's ends with its number of threads (`roofline.Limits`)."""
    return CPU if _THREADS.search(device) else GPU


def machine(device: str) -> str:
    """A device's name without the number of threads."""
    return _THREADS.sub("", device)


_THREADS = re.compile(r", \d+ threads?$")


def limits_of(row: pd.Series) -> Limits:
    """The limits that were measured for a row, beside it."""
    number_bytes = DTYPES[row.precision].itemsize
    return Limits(row.copy_gigabytes_per_second * 1e9, row.product_teraflops * 1e12, number_bytes)


@cache
def work_of(network: str) -> Work:
    """The kernels of a network of this name, for an image of the benchmark."""
    return count_work(build_model(network, classes=CLASSES), SHAPE)


def work_table(frame: pd.DataFrame) -> Markdown:
    """What a step of one run asks for, and the least time that it could take on the devices of `read_bench`."""
    rows, measured = [], frame[_lone(frame)].drop_duplicates(["device", "student"], keep="last")
    for student, teacher in PAIRS.items():
        kernels = (*work_of(student).training, *work_of(teacher).answering)
        operations = sum(kernel.flops for kernel in kernels) / 2
        asked = (f"`{student}`", f"`{teacher}`", f"{len(kernels)}", f"{operations / 1e6:.0f}")
        times = [_least_times(row, kernels) for _, row in measured[measured.student == student].iterrows()]
        rows += [(*asked, *time) for time in times or [("not measured yet", "", "", "")]]
    heads = ["student", "teacher", "kernels", "multiply-adds of an image (millions)"]
    return _printed(rows, [*heads, "device", "precision", "a step takes at least", "a kernel, on average"])


def _least_times(row: pd.Series, kernels: Sequence[Kernel]) -> tuple[str, ...]:
    limits = limits_of(row)
    step = row.batch * sum(kernel.seconds(limits) for kernel in kernels)
    return row.device, row.precision, duration(step), duration(step / len(kernels))


def duration(seconds: float) -> str:
    """A time to three digits, in hours, minutes, seconds or parts of one."""
    scale, unit = next(((scale, unit) for scale, unit in SECONDS if seconds >= scale), SECONDS[-1])
    return f"{seconds / scale:.3g} {unit}"


def bench_tables(frame: pd.DataFrame) -> Markdown:
    """A table for each device of `read_bench`, under the conditions in which it was measured."""
    if frame.empty:
        return Markdown(f"Not measured yet: `{COMMAND}` makes this table.")
    return Markdown("\n\n".join(_device_table(device, rows) for device, rows in frame.groupby("device", sort=False)))


def _device_table(device: str, rows: pd.DataFrame) -> str:
    shown = {
        "student": [f"`{name}`" for name in rows.student],
        "variant": rows.variant + ", " + rows.precision,
        "way": [_way(row) for row in rows.itertuples()],
        "images/s": [f"{speed:,.0f}" for speed in rows.images_per_second],
        "ratio": [f"{ratio:.2f}" for ratio in rows.ratio],
        "of roofline (%)": [f"{100 * share:.0f}" for share in rows.roofline_share],
        "outside kernels (%)": [f"{100 * share:.1f}" for share in rows.outside_kernels],
        "peak (MB)": [f"{size:,.0f}" for size in rows.peak_megabytes],
        "start-up (s)": [f"{seconds:.1f}" for seconds in rows.startup_seconds],
    }
    printed = _printed(list(zip(*shown.values(), strict=True)), list(shown))
    return f"**{device}.** {_conditions(rows)}\n\n{printed.data}"


def _way(row: NamedTuple) -> str:
    return spelled(row.way) + (", graph" if row.graph else "")


def spelled(way: str) -> str:
    """The name of a way to take steps, as it is printed."""
    plain = way.removesuffix(COMPILED)
    return plain.replace("_", "\N{NO-BREAK SPACE}") + (", compiled" if plain != way else "")


def _conditions(rows: pd.DataFrame) -> str:
    """Under what the rows of a device were measured."""
    rates = [f"{_span(own.product_teraflops)} TFLOP/s in {name}" for name, own in rows.groupby("precision", sort=False)]
    return (
        f"Clock {_all(rows.clock)}; copies {_span(rows.copy_gigabytes_per_second)} GB/s; products {', '.join(rates)}; "
        f"batch {_span(rows.batch)}; {_span(rows.workers.dropna())} workers load the naive loop's images; torch "
        f"{_all(rows.torch)}; Python {_all(rows.python)}."
    )


def _all(texts: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(texts))


def _span(values: pd.Series) -> str:
    """The least and the greatest, once if they print alike."""
    return " to ".join(
        dict.fromkeys(f"{value:.3g}" if value < 1000 else f"{value:.0f}" for value in (values.min(), values.max()))
    )


def _printed(rows: Sequence[Sequence[str]], heads: Sequence[str]) -> Markdown:
    """Texts as a Markdown table, numbers to the right."""
    frame = pd.DataFrame(rows, columns=list(heads))
    numbers = [frame[head].str.fullmatch(r"[\d.,]+( \w+)?|-").all() for head in heads]
    sides = ["right" if number else "left" for number in numbers]
    return Markdown(frame.to_markdown(index=False, disable_numparse=True, colalign=sides))


def judge(frame: pd.DataFrame) -> pd.DataFrame:
    """The goals beside what `read_bench` has for them: columns of `Goal`, device, variant, ratio.

    A row for each device that has a goal's variant, one without device ("") and ratio (NaN) where none has. Tables of
    the teacher's logits do not count, as their making is not in the ratio.
    """
    rows = []
    for goal in GOALS:
        asked = (
            (frame.student == goal.student) & (frame.students == goal.students) & (frame.precision == goal.precision)
        )
        own = frame[asked & (frame.variant != NAIVE) & ~_tabled(frame) & (frame.device.map(kind_of) == goal.kind)]
        rows += [(*goal, row.device, row.variant, row.ratio) for row in own.itertuples()] or [(*goal, "", "", NAN)]
    return pd.DataFrame(rows, columns=[*Goal._fields, "device", "variant", "ratio"])


def _lone(frame: pd.DataFrame) -> pd.Series:
    return (frame.variant != NAIVE) & (frame.students == 1)


def _tabled(frame: pd.DataFrame) -> pd.Series:
    return frame.variant.astype(str).str.endswith(TABLE)


def goals_table(judged: pd.DataFrame) -> Markdown:
    """`judge` in print."""
    rows = [
        (
            row.kind,
            f"`{row.student}`",
            "one run" if row.students == 1 else f"cohort of {row.students}",
            row.precision,
            f"{row.least:.1f}",
            f"{row.ratio:.2f}" if row.device else "-",
            f"{_verdict(row)}{', on ' + row.device if row.device else ''}",
        )
        for row in judged.itertuples()
    ]
    return _printed(rows, ["device", "student", "trained", "precision", "at least", "measured", "the goal is"])


def _verdict(row: NamedTuple) -> str:
    if not row.device:
        return "not measured"
    return "met" if row.ratio >= row.least else "missed"


def goals_reading(judged: pd.DataFrame) -> Markdown:
    """Which goals of `judge` are met, missed and not measured."""
    verdicts = [_verdict(row) for row in judged.itertuples()]
    counts = {verdict: verdicts.count(verdict) for verdict in ("met", "missed", "not measured")}
    lines = [f"- Goals, once for each device: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}."]
    lines += [
        f"- Missed: {row.least:.1f} for `{row.student}`, {'one run' if row.students == 1 else row.variant} in "
        f"{row.precision}, on {row.device}: {row.ratio:.2f} was measured."
        for row, verdict in zip(judged.itertuples(), verdicts, strict=True)
        if verdict == "missed"
    ]
    for kind, own in judged.groupby("kind", sort=False):
        if not own.device.any():
            command = f"{COMMAND} --cohort {own.students.max()}"
            lines.append(
                f"- **Not measured on a {kind} yet.** There, `{command}` does it; till then these goals are open."
            )
    return Markdown("\n".join(lines))


def growth_points(growth: pd.DataFrame) -> pd.DataFrame:
    """How the cost of one student's image grows, from `read_growth`; a single point is no line and left out.

    Columns: series, student, device (of the file's first row), way, at (the number that is varied), cost and predicted,
    both relative to the first point of the line. `PREDICTED` says what is predicted.
    """
    heads = ["series", "student", "device", "way", "at", "cost", "predicted"]
    frames = [pd.DataFrame(columns=heads)]
    for _, rows in growth.groupby("file", sort=False):
        for (series, _), own in rows.groupby(["series", "student"], sort=False):
            if len(own) > 1:
                frames.append(_line(series, own).assign(series=series, device=rows.device.iloc[0])[heads])
    return pd.concat(frames[1:] or frames, ignore_index=True)


def _line(series: str, rows: pd.DataFrame) -> pd.DataFrame:
    rows = rows.sort_values(series)
    first, at = rows.iloc[0], rows[series].astype(int)
    predicted = pd.Series([_predicted(series, first, number) for number in at], index=rows.index)
    cost = first.images_per_second / rows.images_per_second
    return rows.assign(at=at, cost=cost, predicted=predicted / predicted.iloc[0])


def _predicted(series: str, row: pd.Series, at: int) -> float:
    if series == "students":
        limits = limits_of(row)
        return work_of(row.student).training_seconds(limits) + work_of(row.teacher).answer_seconds(limits) / at
    return 1 / at if series == "threads" else 1.0


PREDICTED = {
    "students": "the teacher's answers are shared, and each student pays for all else (by the roofline)",
    "batch": "an image costs the same in any batch",
    "threads": "threads share the work evenly",
}


def growth_reading(points: pd.DataFrame) -> Markdown:
    """What each panel of the figure of `growth_points` says."""
    lines = []
    for series, prediction in PREDICTED.items():
        own = points[points.series == series]
        said = [_line_said(series, *line) for line in own.groupby(["student", "device"], sort=False)]
        text = f"Not measured yet: `{GROWTH_COMMAND}` does it."
        if said:
            text = (
                f"What a student's image costs, the first point of a line being 1: {'; '.join(said)}. "
                f"Predicted is that {prediction}."
            )
        lines.append(f"- **{series.capitalize()}.** {text}")
    return Markdown("\n".join(lines))


def _line_said(series: str, line: tuple[str, str], points: pd.DataFrame) -> str:
    student, device = line
    first, last, best = points.iloc[0], points.iloc[-1], points.loc[points.cost.astype(float).idxmin()]
    place = machine(device) if series == "threads" else device
    least = "" if best["at"] == last["at"] else f", least {best.cost:.2f} at {best['at']}"
    span = f"{first['at']} to {last['at']}"
    return f"`{student}` on {place}, {span}: {last.cost:.2f} (predicted {last.predicted:.2f}){least}"


def size_table(params: Params) -> Markdown:
    """What a table of a teacher's logits takes for the data sets and recipes of params.yaml, and when it pays.

    Only CIFAR's, whose number of images is known before they are there.
    """
    settings = [own for own in params.settings.values() if params.datasets[own.dataset].source in CIFAR_COUNTS]
    rows = [
        _size(dataset, *CIFAR_COUNTS[params.datasets[dataset].source], recipe, params.recipes[recipe])
        for dataset, recipe in dict.fromkeys((own.dataset, own.recipe) for own in settings)
    ]
    heads = ["data set", "images", "classes", "recipe", "views of an image", "table (MB)", "epochs of a run"]
    return _printed(rows, [*heads, "runs from which it pays"])


def _size(dataset: str, images: int, _: int, classes: int, name: str, recipe: Recipe) -> tuple[str, ...]:
    views = views_of(recipe.crop_padding, recipe.flip)
    size = bytes_needed(images, classes, recipe.crop_padding, recipe.flip) / 1e6
    runs = views // recipe.epochs + 1  # the first number of runs whose epochs are more than the views
    asked = (f"{images}", f"{classes}", f"`{name}`", f"{views}", f"{size:,.0f}", f"{recipe.epochs}", f"{runs}")
    return (f"`{dataset}`", *asked)


def making_table(frame: pd.DataFrame) -> Markdown:
    """How long a table of CIFAR-100's usual views takes to make, from cohorts of `read_bench` with and without one.

    What the teacher's answer to an image costs is what the table saves: the difference of their steps.
    """
    images, views = CIFAR_COUNTS[TABLED][0], views_of(Recipe.crop_padding, Recipe.flip)
    same = ["device", "student", "teacher", "students", "precision"]
    both = frame[~_tabled(frame)].merge(frame[_tabled(frame)], on=same, suffixes=("", "_tabled"))
    rows = []
    for _, row in both.iterrows():
        answer = row.students * (1 / row.images_per_second - 1 / row.images_per_second_tabled)
        least = work_of(row.teacher).answer_seconds(limits_of(row))
        share = answer * row.images_per_second / row.students
        times = [duration(answer), f"{100 * share:.0f}", duration(images * views * answer)] if answer > 0 else ["-"] * 3
        rows.append((row.device, f"`{row.teacher}`", f"{row.students}", *times, duration(images * views * least)))
    heads = ["device", "teacher", "students", "an answer, measured", "share of the step (%)"]
    if not rows:
        return Markdown(f"Not measured yet: `{TABLE_COMMAND}` measures cohorts with and without a table.")
    return _printed(rows, [*heads, "table, from that", "table, at least (roofline)"])


def limits_reading(frame: pd.DataFrame) -> Markdown:
    """What keeps the fastest variant of each pair of `read_bench` from the roofline."""
    lines = []
    for (device, student), rows in frame[frame.variant != NAIVE].groupby(["device", "student"], sort=False):
        best = rows.loc[rows.ratio.idxmax()]
        outside, inside = best.outside_kernels, 1 - best.outside_kernels - best.roofline_share
        goal = "" if kind_of(device) == CPU else f" (the goal: at most {_percent(MOST_OUTSIDE)})"
        lines.append(
            f'- `{student}` on {device}: the fastest is "{best.variant}" in {best.precision} ({_way(best)}), '
            f"{best.ratio:.1f} times the naive loop. It reaches {_percent(best.roofline_share)} of the roofline. In "
            f"{_percent(outside)} of the time nothing is computed{goal}; {_lost(outside, inside)}."
        )
    return Markdown("\n".join(lines) or f"- Not measured yet: `{COMMAND}` does it.")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _lost(outside: float, inside: float) -> str:
    if outside >= inside:
        return "that is more than kernels lose by being slower than the device could be"
    return f"kernels that are slower than the device could be lose more, {_percent(inside)}"
