"""What the notebooks show beside figures and readings: source code, small tables, images as the loop sees them."""

import inspect
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown
from torch import Tensor

from kdstudy.answers import Answers, Sample, edited
from kdstudy.augment import StrongDraw
from kdstudy.core import Method, View
from kdstudy.data import Draws, ImageBank
from kdstudy.device import DataOnDevice
from kdstudy.exits import edit_rates
from kdstudy.few_samples import FewSample
from kdstudy.image_set import ImageSet, channel_statistics, holdout_split
from kdstudy.insides import Sides
from kdstudy.models import build_model, count_parameters
from kdstudy.recipe import Recipe
from kdstudy.relations import spread, view_of
from kdstudy.results import Ledger
from kdstudy.samples import Correlation, InstanceGraph, Probabilistic, Relational, SimilarityPreserving
from kdstudy.study import METHODS, SCHEMES, Planner, RunSpec
from kdstudy.table_files import first_specs, percent
from kdstudy.tables import BASELINE_STAGE, label, to_markdown

DIFFERENCES = "Differs from the printed text"


def source(*things: Any) -> Markdown:
    """The code of functions, methods or classes, as it stands in the package, highlighted."""
    code = "\n\n\n".join(textwrap.dedent(inspect.getsource(thing)).rstrip() for thing in things)
    return Markdown(f"```python\n{code}\n```")


def differences(*things: Any) -> Markdown:
    """The lists "Differs from the printed text" of the docstrings of classes, functions or modules, under their names.

    Raises ValueError for a docstring without such a list.
    """
    return Markdown("\n\n".join(f"**{_name(thing)}**\n\n{_differences(thing)}" for thing in things))


def _differences(thing: Any) -> str:
    _, found, rest = inspect.getdoc(thing).partition(DIFFERENCES)
    if not found:
        raise ValueError(f"the docstring of {thing.__name__} has no list {DIFFERENCES!r}")
    return rest.split("\n\n")[1]


def _name(thing: Any) -> str:
    keys = {cls: key for key, cls in METHODS.items()}
    schemes = {cls: key for key, cls in SCHEMES.items()}
    if thing in schemes:
        return f"Scheme `{schemes[thing]}`"
    if inspect.isfunction(thing):
        return f"`{thing.__name__}`"
    return label(keys[thing]) if thing in keys else "All edits of the target"


def table(frame: pd.DataFrame, caption: str = "", floatfmt: str | Sequence[str] = ".2f") -> Markdown:
    """A frame as a Markdown table, numbers to the right and in one format, or one for each column."""
    text = frame.to_markdown(index=False, floatfmt=floatfmt)
    return Markdown(f"**{caption}**\n\n{text}" if caption else text)


def results_table(frame: pd.DataFrame, caption: str) -> Markdown:
    """A table of `kdstudy.tables` in its printed form, or the remark that it is empty."""
    if frame.empty:
        return Markdown(f"**{caption}**: no runs.")
    return Markdown(to_markdown(frame, caption))


def parts_table(images: ImageSet, held_out: int) -> Markdown:
    """How many images each part of a data set has, and how many of a class."""
    parts = {"training": images.y_train, "test": images.y_test}
    if held_out:
        train, kept = holdout_split(images.y_train, held_out)
        parts |= {"training, held out": images.y_train[kept], "training, the rest": images.y_train[train]}
    rows = [(part, len(labels), _per_class(labels, images.classes)) for part, labels in parts.items()]
    return table(pd.DataFrame(rows, columns=["part", "images", "of each class"]))


def _per_class(labels: np.ndarray, classes: int) -> str:
    counts = np.bincount(labels, minlength=classes)
    return f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"


def samples(images: ImageSet, columns: int = 10, rows: int = 2) -> tuple[np.ndarray, list[str]]:
    """The first `rows` training images of up to `columns` classes, spread evenly over all, and their classes' names."""
    classes = spread(images.classes, columns)
    firsts = {c: np.flatnonzero(images.y_train == c)[:rows] for c in classes}
    picked = [(firsts[c][row], c) for row in range(rows) for c in classes if row < len(firsts[c])]
    return images.x_train[[index for index, _ in picked]], [images.class_names[c] for _, c in picked]


def crops(
    images: ImageSet, recipe: Recipe, seed: int, image: int = 0, epochs: int = 10, strong: bool = False
) -> np.ndarray:
    """One training image (epochs, H, W, C) uint8 as the loop shows it in the first epochs of a run of this seed.

    `strong` gives the strongly augmented views instead, which only some methods ask for.
    """
    mean, one = channel_statistics(images.x_train)[0], np.ones(images.channels)
    here, padding = torch.device("cpu"), recipe.crop_padding
    bank = ImageBank(
        images.x_train, images.y_train, mean=mean, std=one, padding=padding, device=here, dtype=torch.float64
    )
    draws = Draws.make(
        seed=seed,
        stream=0,
        epochs=epochs,
        images=len(bank),
        padding=padding,
        flip=recipe.flip,
        device=here,
        strong=strong,
    )
    at = torch.arange(epochs), (draws.order == image).long().argmax(dim=1)
    index = draws.order[at].long()
    if strong:
        views = bank.strong(index, StrongDraw(*(part[at] for part in draws.strong)))
    else:
        views = bank.augmented(index, draws.shift[at].long(), draws.flip[at])
    # the mean stays in until here, as a cutout has its colour
    return (views.permute(0, 2, 3, 1).numpy() + mean).round().astype(np.uint8)


def taps_table(network: str, images: ImageSet) -> Markdown:
    """What a network of this name shows for 2 images: every tap of its `View`, with its shape."""
    module = build_model(network, classes=images.classes, channels=images.channels, image_size=images.image_size).eval()
    with torch.no_grad():
        view = module(torch.zeros(2, images.channels, *images.image_size))
    rows = [(name, _shape(getattr(view, name))) for name in View._fields if _shape(getattr(view, name))]
    return table(pd.DataFrame(rows, columns=["tap", "shape"]), f"{network}: {count_parameters(module):,} parameters")


def _shape(tap: Any) -> str:
    if isinstance(tap, Tensor):
        return " x ".join(map(str, tap.shape))
    return ", ".join(map(_shape, tap or ()))


def recipe_table(recipe: Recipe) -> Markdown:
    """Every field of the recipe."""
    rows = [(field.name.replace("_", " "), _shown(getattr(recipe, field.name))) for field in fields(recipe)]
    return table(pd.DataFrame(rows, columns=["recipe", "value"]))


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def rows_table(planner: Planner, setting: str, stage: str) -> Markdown:
    """The rows that a stage trains for a setting: name, class, hyperparameters of params.yaml, cells of its grid."""
    rows = [_row(planner, setting, stage, row) for row in planner.rows(setting, stage)]
    if not rows:
        return Markdown(f"The setting `{setting}` trains no row of the stage `{stage}`.")
    return table(pd.DataFrame(rows, columns=["row", "called", "class", "hyperparameters", "grid cells"]))


def _row(planner: Planner, setting: str, stage: str, row: str) -> tuple[str, ...]:
    spec = planner.final(setting, stage, row, {})[0]
    values = ", ".join(f"{name} {_shown(value)}" for name, value in spec.hyperparameters)
    cells = len(planner.tuning(setting, stage, row))
    return f"`{row}`", label(row), f"`{METHODS[spec.method].__name__}`", values, str(cells or "")


def shares_table(planner: Planner, setting: str, stage: str, images: ImageSet) -> Markdown:
    """For every share of the training images that a stage uses: how many images that are, and how many steps."""
    data, rows = DataOnDevice(images, torch.device("cpu")), {}
    for spec in first_specs(planner, setting, stage):
        labels = data.training(spec.held_out, spec.recipe, spec.images).labels.numpy()
        steps = math.ceil(len(labels) / spec.recipe.batch)
        counts = len(labels), _per_class(labels, images.classes), steps, steps * spec.recipe.epochs
        row = rows.setdefault(percent(spec.images), [f"{percent(spec.images):g} %", *counts, ""])
        method = spec.build_method()
        if isinstance(method, FewSample):
            row[-1] = str(min(method.samples, len(labels)))
    heads = ["share", "images", "of each class", "steps of an epoch", "steps of a run", "images that FSKD aligns on"]
    if not rows:
        return Markdown(f"The setting `{setting}` trains nothing on fewer images.")
    return table(pd.DataFrame([rows[share] for share in sorted(rows)], columns=heads))


def teachers_table(planner: Planner, setting: str, stage: str) -> Markdown:
    """Who teaches the rows of a stage that have another teacher than the setting's own, and what that has learned from.

    Shown for the first seed; a sentence if the setting trains no such row.
    """
    usual = [planner.teacher(setting, planner.tuning_seed(setting))]
    finals = first_specs(planner, setting, stage)
    rows = [_taught(spec) for spec in finals if [one.id for one in spec.teachers] != [one.id for one in usual]]
    if not rows:
        return Markdown("All students of this setting are taught by its own teacher alone.")
    caption = f"Other teachers than {usual[0].network} alone, for the student of seed {usual[0].seed}"
    return table(
        pd.DataFrame(rows, columns=["row", "student", "taught by", "of seed", "which has learned from"]), caption
    )


def _taught(spec: RunSpec) -> tuple[str, ...]:
    first, count = spec.teacher, len(spec.teachers)
    above = first.teacher.network if SCHEMES[first.scheme_name].needs_teacher else "the labels"
    learned = f"{above}, `{METHODS[first.method].__name__}`"
    seeds = ", ".join(str(teacher.seed) for teacher in spec.teachers)
    return f"`{spec.row}`", spec.network, f"{count} x {first.network}" if count > 1 else first.network, seeds, learned


def baselines(ledger: Ledger, setting: str) -> list[RunSpec]:
    """The final runs of the CE student and of vanilla KD, which the stage `response` of the same setting makes.

    A row that the setting lacks, or whose grid is not finished yet, is left out.
    """
    rows = [row for row in ("ce", "kd") if row in ledger.planner.rows(setting, BASELINE_STAGE)]
    return [spec for row in rows for spec in ledger.final(setting, BASELINE_STAGE, row)]


def editing_methods(planner: Planner, setting: str, stage: str) -> dict[str, Method]:
    """The rows of a stage that edit the teacher's target, with the numbers of params.yaml."""
    methods = {row: planner.final(setting, stage, row, {})[0].build_method() for row in planner.rows(setting, stage)}
    return {row: method for row, method in methods.items() if hasattr(method, "target")}


def edits_table(sample: Sample, methods: Mapping[str, Method]) -> Markdown:
    """The targets of `answers.edited` in numbers, each unedited one above those of the methods that share it."""
    if not methods:
        return Markdown(f"**{sample.title}**: no row of this setting edits its target.")
    rows: dict[str, tuple] = {}
    for row, target in edited(sample, methods).items():
        rows.setdefault(target.unit, (f"*unedited {target.unit}*", *target.before))
        rows[row] = (label(row), *target.after)
    heads = [f"class {name}" + (" (label)" if c == sample.label else "") for c, name in enumerate(sample.class_names)]
    return table(pd.DataFrame(rows.values(), columns=["target", *heads]), sample.title)


def finished(ledger: Ledger, setting: str, *rows: str) -> dict[str, RunSpec]:
    """The run of the first seed of each of these rows, whatever their stage.

    Left out are rows that the setting does not train, and runs that have diverged.
    """
    known = {row: stage for stage in ledger.planner.params.methods for row in ledger.planner.rows(setting, stage)}
    firsts = {row: ledger.final(setting, known[row], row)[:1] for row in rows if row in known}
    records = {row: (spec, ledger.store.record(spec)) for row, specs in firsts.items() for spec in specs}
    return {row: spec for row, (spec, record) in records.items() if record and record["status"] == "finished"}


def likeness_table(likeness: Mapping[str, Sequence[float]]) -> Markdown:
    """`insides.Looks.likeness`: a row per student, a column per stage."""
    rows = [(label(name), *cosines) for name, cosines in likeness.items()]
    stages = [f"stage {number}" for number in range(1, len(rows[0]))]
    return table(pd.DataFrame(rows, columns=["student", *stages]), "Likeness to the teacher's maps: mean cosine")


def agreement_table(sides: Sides) -> Markdown:
    """`insides.Sides.agreement`, and what saying always the same would reach."""
    rows = [(label(name), share) for name, share in sides.agreement.items()]
    rows.append(("always the more frequent side", sides.constant))
    return table(pd.DataFrame(rows, columns=["student", "neurons (%)"]), "Sides of the teacher's neurons named right")


def blindness_table(teacher: Tensor, students: Mapping[str, Tensor]) -> Markdown:
    """What the losses on relations between images say of several students' points (B, D), without their weights.

    Above them the squared distance of the points themselves, mean over the images.
    """
    parts = {
        "relational: distances": Relational(distance_weight=1.0, angle_weight=0.0),
        "relational: angles": Relational(distance_weight=0.0, angle_weight=1.0),
        "instance graph: edges": InstanceGraph(vertex_weight=0.0, edge_weight=1.0, transformation_weight=0.0),
        "similarity preserving": SimilarityPreserving(),
        "probabilistic transfer": Probabilistic(),
        "correlation congruence": Correlation(),
    }
    apart = [(points - teacher).square().sum(dim=1).mean().item() for points in students.values()]
    labels = torch.zeros(len(teacher), dtype=torch.int64)
    rows = [("squared distance", *apart)]
    for name, method in parts.items():
        losses = [method.loss(view_of(points), view_of(teacher), labels, {}) for points in students.values()]
        rows.append((name, *(round(loss.item(), 9) for loss in losses)))
    return table(pd.DataFrame(rows, columns=["loss", *students]), floatfmt=".4f")


def closeness_table(closeness: pd.DataFrame, results: pd.DataFrame) -> Markdown:
    """`relations.closeness` and the test accuracy, means over a row's runs, the closest cosines first."""
    if closeness.empty:
        return Markdown("There are no finished students to look into.")
    scores = results[results.purpose == "final"][["method", "seed", "test_accuracy"]]
    measured = ["maps", "distances", "cosines", "flows", "test_accuracy"]
    means = closeness.merge(scores, on=["method", "seed"]).groupby("method", sort=False)[measured].mean()
    means = means.sort_values("cosines", kind="stable").dropna(axis=1, how="all")
    means.insert(0, "student", means.index.map(label))
    heads = {
        "maps": "similarities of last maps",
        "distances": "distances of embeddings",
        "cosines": "cosines of embeddings",
        "test_accuracy": "test accuracy (%)",
    }
    floatfmt = ["", *[".3f"] * (means.shape[1] - 2), ".2f"]
    return table(means.rename(columns=heads), "How far students are from the teacher's relations", floatfmt)


def heads_table(exits: Sequence[Mapping[str, Answers]]) -> Markdown:
    """How good each exit of a teacher is (`answers.exit_answers`), and what the edits do to its targets.

    Accuracy on the test images; edits on the crops that a student sees in its first epoch, all in percent.
    """
    rows = []
    for number, parts in enumerate(exits, start=1):
        seen, name = parts["augmented"], f"head {number}" if number < len(exits) else "classifier"
        v2, v4 = (edit_rates(edit, [View(seen.logits)], seen.labels)[0] for edit in ("relative_v2", "relative_v4"))
        shares = v2.raised, v2.lowered * np.nan_to_num(v2.unchanged), v4.lowered * np.nan_to_num(v4.unchanged)
        right = 1 - parts["test"].wrong.double().mean().item()
        rows.append((name, *(100 * share for share in (right, *shares))))
    heads = ["exit", "test accuracy", "label raised (V2)", "left as it is (V2)", "left as it is (V4)"]
    return table(pd.DataFrame(rows, columns=heads), "The teacher's exits; edits of the targets of the first epoch (%)")


def kd_temperature(planner: Planner, setting: str) -> float:
    """The temperature of vanilla KD in params.yaml, or the class's default if the setting has no such row."""
    rows = planner.rows(setting, "response")
    method = planner.final(setting, "response", "kd", {})[0].build_method() if "kd" in rows else METHODS["kd"]()
    return method.temperature


def scores_table(results: pd.DataFrame) -> Markdown:
    """Every run of rows of results.csv, and the mean of the final ones."""
    scores = ["test_accuracy", "nll", "ece"]
    final, tuning = results[results.purpose == "final"], results[results.purpose == "tuning"]
    rows = [(f"seed {run.seed}", *run[scores]) for _, run in final.iterrows()]
    rows.append((f"mean (n = {final.test_accuracy.count()})", *final[scores].astype(float).mean()))
    rows += [(f"for tuning, seed {run.seed}", *run[scores]) for _, run in tuning.iterrows()]
    heads = ["run", "test accuracy (%)", "NLL (nats)", "ECE (%)"]
    return table(pd.DataFrame(rows, columns=heads), floatfmt=("", ".2f", ".4f", ".2f"))


def folder(profile: str) -> Path:
    """The folder for a profile's tables, made if need be: it is there even if it stays empty."""
    path = Path("reports", profile, "tables")
    path.mkdir(parents=True, exist_ok=True)
    return path


def written(folder: Path, kind: str, keys: Iterable[str | int], otherwise: str) -> Markdown:
    """The tables <kind>_<key>.md of a folder one below the other, or the sentence `otherwise` without a key."""
    texts = [(folder / f"{kind}_{key}.md").read_text(encoding="utf-8") for key in keys]
    return Markdown("\n\n".join(texts) or otherwise)
