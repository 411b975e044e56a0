"""The study's tables: the thesis's beside ours, the methods of a setting, the tuning grids; as CSV, Markdown, LaTeX."""

import json
import re
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdstudy.files import unknown_name, write_text
from kdstudy.results import RESULT_COLUMNS, cell_order
from kdstudy.statistics import holm, mean_interval, paired_difference

METHOD_LABELS: Mapping[str, str] = {
    "teacher": "Teacher",
    "ce": "CE student",
    "kd": "Vanilla KD",
    "spherical": "Spherical KD",
    "relative_v1": "Relative KD V1",
    "relative_v2": "Relative KD V2",
    "relative_v3": "Relative KD V3",
    "relative_v4": "Relative KD V4",
    "two_temperature": "Two Temperature",
    "earth_mover": "Earth Mover",
    "earth_mover_printed": "Earth Mover, as printed",
    "relative_v1_signed": "Relative KD V1, signed",
    "relative_v4_literal": "Relative KD V4, as printed",
    "fitnets": "FitNets",
    "fitnets_one_stage": "FitNets, one stage",
    "attention": "Attention transfer",
    "factor_transfer": "Factor transfer",
    "semckd": "SemCKD",
    "activation_boundaries": "Activation boundaries",
    "lit": "LIT",
    "adain": "AdaIN",
    "plain": "Plain student, labels",
    "joint_residual": "JointRD",
    "tofd": "TOFD",
    "crd": "CRD",
    "crd_inbatch": "CRD, in-batch",
    "review": "ReviewKD",
    "reused_classifier": "SimKD",
    "variational_information": "VID",
    "neuron_selectivity": "NST",
    "overhaul": "Overhaul (OFD)",
    "heads_plain": "Heads, plain KD",
    "heads_v2": "Heads, Relative V2",
    "heads_v4": "Heads, Relative V4",
    "heads_labels": "Heads, labels",
    "logit_mimic": "Logit mimic",
    "class_distance": "Class distance",
    "class_distance_teacher": "Class distance, its teacher",
    "feature_normalised": "Feature-normalised KD",
    "dkd": "DKD",
    "dist": "DIST",
    "logit_standardisation": "Logit standardisation",
    "kd_strong": "Vanilla KD, strong",
    "mlkd": "MLKD",
    "mlkd_masked": "MLKD, masked",
    "ensemble": "Ensemble",
    "ensemble_probabilities": "Ensemble, probabilities",
    "ensemble_logits": "Ensemble, logits",
    "ensemble_losses": "Ensemble, losses",
    "aekd": "AE-KD",
    "assistant": "Teacher assistant",
    "fsp": "FSP",
    "relational": "Relational KD",
    "relational_distance": "Relational KD, distances",
    "relational_angle": "Relational KD, angles",
    "instance_graph": "Instance graph",
    "similarity": "Similarity preserving",
    "multi_head_graph": "Multi-head graph",
    "probabilistic": "Probabilistic transfer",
    "correlation": "Correlation congruence",
    "correlation_consecutive": "Correlation, consecutive",
    "collaborative_teaching": "Collaborative teaching",
    "few_sample": "FSKD",
    "pruned": "Pruned network, labels",
    "ce_1": "CE student, 1 %",
    "kd_1": "Vanilla KD, 1 %",
    "attention_1": "Attention transfer, 1 %",
    "similarity_1": "Similarity preserving, 1 %",
    "few_sample_1": "FSKD, 1 %",
    "ce_10": "CE student, 10 %",
    "kd_10": "Vanilla KD, 10 %",
    "attention_10": "Attention transfer, 10 %",
    "similarity_10": "Similarity preserving, 10 %",
    "few_sample_10": "FSKD, 10 %",
    "pruned_1": "Pruned network, labels, 1 %",
    "pruned_10": "Pruned network, labels, 10 %",
    "pruned_100": "Pruned network, labels",
    "few_sample_100": "FSKD, 100 %",
    "mutual": "DML",
    "mutual_alternate": "DML, in turn",
    "mutual_4": "DML, 4 peers",
    "mutual_4_ensemble": "DML, 4 peers, as one",
    "mutual_large": "DML, larger peer",
    "codistillation": "Codistillation",
    "codistillation_live": "Codistillation, live",
    "kdcl": "KDCL",
    "kdcl_min_logit": "KDCL, min-logit",
    "kdcl_naive": "KDCL, naive",
    "kdcl_linear": "KDCL, linear",
    "kdcl_general": "KDCL, general",
    "kdcl_mean_large": "KDCL, mean, larger peer",
    "okddip": "OKDDip",
    "okddip_branches": "OKDDip, branches",
    "afd": "AFD",
    "afd_3": "AFD, 3 networks",
    "rocket": "Rocket launching",
    "rocket_bottom": "Rocket launching, bottom",
    "peers_relative_v2": "Relative V2 between peers",
    "peers_attention": "Attention between peers",
    "peers_similarity": "Similarity between peers",
    "own_teacher": "Be Your Own Teacher",
    "snapshot": "Snapshot distillation",
    "born_again": "Born-again network",
    "born_again_1": "Born-again 1",
    "born_again_2": "Born-again 2",
    "born_again_3": "Born-again 3",
    "born_again_ensemble": "Born-again, 1 to 3 together",
    "born_again_cwtm": "Born-again, CWTM",
    "born_again_dkpp": "Born-again, DKPP",
    "teacher_free_self": "Tf-KD, self",
    "virtual_teacher": "Tf-KD, regularised",
    "virtual_teacher_code": "Tf-KD, as released",
    "bigger": "Bigger, labels",
    "bigger_taught": "Bigger, by the smaller",
    "poorly_taught": "Vanilla KD, poor teacher",
    "zero_shot": "Zero-shot transfer",
    "data_impressions": "Data impressions",
    "impressions_attention": "Attention on impressions",
    "munge": "MUNGE",
    "munge_ensemble": "MUNGE of an ensemble",
    "grey_ce": "CE, grey",
    "grey": "KD, grey",
    "edges_ce": "CE, edges",
    "edges": "KD, edges",
    "low_ce": "CE, half size",
    "low": "KD, half size",
    "quantised": "Quantised KD",
    "soft_tree": "Decision tree",
    "tree_labels": "Tree on labels",
    "tree": "Tree on teacher's targets",
    "budget_ce": "Budget: labels",
    "budget_kd": "Budget: vanilla KD",
    "budget_equal_teacher": "Budget: equal teacher",
    "budget_mutual": "Budget: mutual learning",
    "budget_own_teacher": "Budget: own teacher",
    "budget_snapshot": "Budget: snapshots",
    "budget_born_again": "Budget: born again",
    "budget_virtual_teacher": "Budget: virtual teacher",
    "budget_zero_shot": "Budget: zero-shot",
}

THESIS_COLUMNS = (
    "method", "published", "ours", "ci_low", "ci_high", "n", "difference",
    "best_on_test", "chosen_on_validation", "optimism", "cells", "diverged",
)  # fmt: skip
COMPARISON_COLUMNS = (
    "stage", "scheme", "method", "test_accuracy", "ci_low", "ci_high", "n",
    "difference_to_kd", "difference_low", "difference_high", "pairs", "p_holm", "agreement", "nll", "ece", "diverged",
)  # fmt: skip
SHARE_COLUMNS = (
    "share", "method", "student", "student_parameters", "test_accuracy", "ci_low", "ci_high", "n",
    "labels_alone", "difference_to_labels", "difference_low", "difference_high", "pairs", "p_holm", "diverged",
)  # fmt: skip
GROUP = ["stage", "scheme", "method"]
NUMBERS = ["test_accuracy", "val_accuracy", "agreement", "nll", "ece"]
# the stage of the thesis's methods and of the baselines: another scheme may run the same loss elsewhere, as born-again
# networks run "kd"
BASELINE_STAGE = "response"


def published_results() -> pd.DataFrame:
    """The 68 accuracies (percent) that the thesis prints, in its order; source and misprints: `published/README.md`.

    Columns: table, setting, dataset, teacher_arch, student_arch, method (our key), accuracy, note.
    """
    return pd.read_csv(Path(__file__).parent / "published" / "thesis_tables.csv", keep_default_na=False)


def thesis_title(number: int) -> str:
    """The heading of thesis table `number` (2 to 8), e.g. "Table 5. CIFAR-10, WRN-40-1 teacher, WRN-16-1 student"."""
    first = _published_table(number).iloc[0]
    title = f"Table {number}. {first.dataset}, {first.teacher_arch} teacher, {first.student_arch} student"
    return re.sub(r"(CIFAR|ResNet)(?=\d)", r"\1-", title)


def _published_table(number: int) -> pd.DataFrame:
    published = published_results()
    if number not in set(published.table):
        raise unknown_name("thesis table", number, published.table.unique())
    return published[published.table == number]


def thesis_table(number: int, results: pd.DataFrame) -> pd.DataFrame:
    """Thesis table `number` (2 to 8), its rows in its order, beside our runs; accuracies in percent.

    Columns: method, published, ours (mean over the final runs' seeds), ci_low, ci_high (95 %), n, difference (ours -
    published); then the thesis's own way beside ours: best_on_test (highest test accuracy of a tuning cell),
    chosen_on_validation (test accuracy of the cell best on validation), optimism (the first less the second), cells
    (how many were run); and diverged (final runs that did). What was not run is NaN with n = 0.
    Raises ValueError for an unknown number, a missing column or two final runs of one seed.
    """
    published = _published_table(number)
    runs = _runs_of(results, published.setting.iloc[0])
    rows = [
        (method, accuracy, *_thesis_cells(_thesis_runs(runs, method), accuracy))
        for method, accuracy in zip(published.method, published.accuracy, strict=True)
    ]
    return pd.DataFrame(rows, columns=THESIS_COLUMNS)


def _runs_of(results: pd.DataFrame, setting: str) -> pd.DataFrame:
    missing = [column for column in RESULT_COLUMNS if column not in results.columns]
    if missing:
        raise ValueError(f"results lack the columns {', '.join(missing)}; needed are {', '.join(RESULT_COLUMNS)}")
    runs = results[results.setting == setting].reset_index(drop=True)
    return runs.astype(dict.fromkeys(NUMBERS, np.float64))


def _thesis_runs(runs: pd.DataFrame, method: str) -> pd.DataFrame:
    if method == "teacher":
        # a teacher has no grid, so nothing of it was chosen
        return runs[(runs.stage == "teacher") & (runs.purpose == "final")]
    return runs[(runs.stage == BASELINE_STAGE) & (runs.method == method)]


def _thesis_cells(runs: pd.DataFrame, published: float) -> tuple[float, ...]:
    final = _final(runs)
    ours = mean_interval(final.test_accuracy)
    grid = runs[runs.purpose == "tuning"]
    best, chosen = grid.test_accuracy.max(), _chosen(grid).test_accuracy.max()
    return (*ours, ours.mean - published, best, chosen, best - chosen, len(grid), _count_diverged(final))


def _final(runs: pd.DataFrame) -> pd.DataFrame:
    """The final runs of one method, indexed by seed and in its order, so that sums do not depend on the rows' order."""
    final = runs[runs.purpose == "final"]
    twice = final[final.seed.duplicated()]
    if len(twice):
        names = ", ".join(final.run[final.seed == twice.seed.iloc[0]].astype(str))
        method = f"{twice.stage.iloc[0]}/{twice.method.iloc[0]}"
        raise ValueError(f"final runs of {method} must be one per seed, but seed {twice.seed.iloc[0]} has {names}")
    return final.set_index("seed").sort_index()


def _count_diverged(runs: pd.DataFrame) -> int:
    return int((runs.status == "diverged").sum())


def _chosen(grid: pd.DataFrame) -> pd.DataFrame:
    """The row of `grid` with the best validation accuracy, the first in `cell_order` of those that tie; or no row."""
    return _in_cell_order(grid[grid.val_accuracy == grid.val_accuracy.max()]).head(1)


def _in_cell_order(grid: pd.DataFrame) -> pd.DataFrame:
    keys = [(cell_order(text), seed) for text, seed in zip(grid.hyperparameters, grid.seed, strict=True)]
    return grid.iloc[sorted(range(len(keys)), key=keys.__getitem__)]


def comparison_table(results: pd.DataFrame, setting: str) -> pd.DataFrame:
    """All methods run on `setting`, best mean first: one row for each (stage, scheme, method) of the students.

    Columns: stage, scheme, method; test_accuracy (mean over the final runs), ci_low, ci_high (95 %), n;
    difference_to_kd (paired, to vanilla KD), difference_low, difference_high, pairs (seeds that both have); p_holm
    (two-sided paired t test, adjusted for the number of methods compared); agreement, nll, ece (means, in the results'
    units); diverged (final runs that did). A method without final runs has n = 0 and NaN.
    Raises ValueError for a missing column or two final runs of one seed.
    """
    runs = _runs_of(results, setting)
    students = runs[(runs.stage != "teacher") & (runs.purpose != "teaching")]
    finals = {name: _final(group) for name, group in students.groupby(GROUP, dropna=False)}
    baseline = BASELINE_STAGE, "kd"
    kd = next((final for (stage, _, method), final in finals.items() if (stage, method) == baseline), None)
    rows = [(*name, *_comparison_cells(final, kd)) for name, final in finals.items()]
    table = pd.DataFrame(rows, columns=COMPARISON_COLUMNS)
    table["p_holm"] = holm(table.p_holm)
    return table.sort_values("test_accuracy", ascending=False, kind="stable", ignore_index=True)


def _comparison_cells(final: pd.DataFrame, kd: pd.DataFrame | None) -> tuple[float, ...]:
    # vanilla KD is not compared with itself, nor anything with a vanilla KD that was not run
    reference = final.head(0) if kd is None or kd is final else kd
    difference, p_value = paired_difference(final.test_accuracy, reference.test_accuracy)
    scores = final.loc[final.status == "finished", ["agreement", "nll", "ece"]].mean()
    return (*mean_interval(final.test_accuracy), *difference, p_value, *scores, _count_diverged(final))


def tuning_table(results: pd.DataFrame, setting: str) -> pd.DataFrame:
    """The students' grid cells on `setting`, in `cell_order` within each method; accuracies in percent.

    Columns: stage, scheme, method, hyperparameters (JSON), seed, val_accuracy, test_accuracy, chosen (the best on
    validation of its method), diverged (0 or 1). Raises ValueError for a missing column.
    """
    runs = _runs_of(results, setting)
    grids = runs[(runs.stage != "teacher") & (runs.purpose == "tuning")]
    chosen = [row for _, grid in grids.groupby(GROUP, dropna=False) for row in _chosen(grid).index]
    table = _in_cell_order(grids).sort_values(GROUP, kind="stable")
    table = table.assign(chosen=table.index.isin(chosen), diverged=(table.status == "diverged").astype(int))
    columns = [*GROUP, "hyperparameters", "seed", "val_accuracy", "test_accuracy", "chosen", "diverged"]
    return table[columns].reset_index(drop=True)


def share_table(results: pd.DataFrame, setting: str) -> pd.DataFrame:
    """Methods on shares of the training images: a row for each (share, method), the smallest share first.

    `results` are those of `table_files.by_share`. Columns: share (percent), method, student (network),
    student_parameters; test_accuracy (mean over the final runs), ci_low, ci_high (95 %), n; labels_alone (mean of the
    run without a teacher of the same network on the same images); difference_to_labels (to it, paired by seed),
    difference_low, difference_high, pairs, p_holm (adjusted for the number of differences); diverged.
    Raises ValueError for a missing column or two final runs of one seed.
    """
    runs = _runs_of(results, setting)
    final = {key: _final(group) for key, group in runs.groupby(["share", "student", "method"], sort=False)}
    alone = {key[:2]: group for key, group in final.items() if (group.scheme == "none").all()}
    rows = [_share_row(*key, group, alone.get(key[:2])) for key, group in final.items()]
    table = pd.DataFrame(rows, columns=SHARE_COLUMNS)
    table["p_holm"] = holm(table.p_holm)
    return table.sort_values("share", kind="stable", ignore_index=True)


def _share_row(share: float, student: str, method: str, final: pd.DataFrame, alone: pd.DataFrame | None) -> tuple:
    reference = final.head(0) if alone is None or alone is final else alone
    difference, p_value = paired_difference(final.test_accuracy, reference.test_accuracy)
    cells = (*mean_interval(final.test_accuracy), reference.test_accuracy.mean(), *difference, p_value)
    return share, method, student, int(final.student_parameters.iloc[0]), *cells, _count_diverged(final)


def write_table(frame: pd.DataFrame, stem: Path, caption: str) -> None:
    """Write one of the tables above as `<stem>.csv`, `<stem>.md` and `<stem>.tex`, each atomically.

    The CSV is for machines: numbers to 4 decimals (p values to 4 digits), an empty cell where there is none. Markdown
    and LaTeX (booktabs) are for readers: labels, `mean [low, high]`, "not run", "diverged". `caption` is plain text.
    """
    printed, sides = _printed(frame), _sides(frame)
    latex = printed.to_latex(
        index=False,
        escape=True,
        column_format="".join(side[0] for side in sides),
        caption=caption.translate(LATEX_ESCAPES),
        label=f"tab:{stem.name}",
    )
    write_text(stem.with_name(f"{stem.name}.csv"), _rounded(frame).to_csv(index=False, lineterminator="\n"))
    write_text(stem.with_name(f"{stem.name}.md"), to_markdown(frame, caption))
    write_text(stem.with_name(f"{stem.name}.tex"), latex)


def to_markdown(frame: pd.DataFrame, caption: str) -> str:
    """One of the tables above as it is printed, in Markdown under its caption."""
    markdown = _printed(frame).to_markdown(index=False, disable_numparse=True, colalign=_sides(frame))
    return f"**{caption}**\n\n{markdown}\n"


def label(method: str) -> str:
    """The printed name of a method's row, or the row's own name where it has none."""
    return METHOD_LABELS.get(method, method)


def _rounded(frame: pd.DataFrame) -> pd.DataFrame:
    rounded = frame.round({column: 4 for column in frame.columns if column != "p_holm"})
    if "p_holm" in rounded:
        rounded["p_holm"] = [float(f"{p:.4g}") for p in rounded.p_holm]
    return rounded.replace(-0.0, 0.0)  # -0.00001 would print as -0.0


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


TEXTS: Mapping[str, Callable[[Any], str]] = {
    "stage": str,
    "scheme": str,
    "source": str,
    "teacher_arch": str,
    "student_arch": str,
    "student": str,
    "quoted_from": str,
    "networks": str,
    "method": label,
    "hyperparameters": lambda text: ", ".join(f"{name} {_plain(value)}" for name, value in json.loads(text).items()),
    "chosen": lambda chosen: "chosen" if chosen else "",
}
HEADINGS: Mapping[str, str] = {
    "source": "Method",
    "teacher_arch": "Teacher",
    "student_arch": "Student",
    "published": "Published (%)",
    "published_student": "Published student (%)",
    "published_gain": "Published gain (points)",
    "published_average": "Published, mean (%)",
    "published_ensemble": "Published, ensemble (%)",
    "deviation": "Published deviation (points)",
    "ensemble": "Ours, ensemble (%)",
    "gain": "Our gain (points)",
    "ours": "Ours (%)",
    "n": "n",
    "difference": "Difference (points)",
    "optimism": "Optimism (points)",
    "test_accuracy": "Test accuracy (%)",
    "val_accuracy": "Validation accuracy (%)",
    "difference_to_kd": "Difference to Vanilla KD (points)",
    "share": "Images (%)",
    "student_parameters": "Parameters",
    "difference_to_labels": "Difference to labels alone (points)",
    "p_holm": "p (Holm)",
    "agreement": "Agreement (%)",
    "nll": "NLL (nats)",
    "ece": "ECE (%)",
}
POINTS = dict.fromkeys(("difference", "difference_to_kd", "difference_to_labels", "published_gain", "gain"), "+z.2f")
FORMATS: Mapping[str, str] = {**POINTS, "nll": ".4f", "p_holm": ".2g", "share": "g"}
LIMITS: Mapping[str, tuple[str, str]] = {
    "ours": ("ci_low", "ci_high"),
    "test_accuracy": ("ci_low", "ci_high"),
    "difference_to_kd": ("difference_low", "difference_high"),
    "difference_to_labels": ("difference_low", "difference_high"),
    "gain": ("gain_low", "gain_high"),
}
# printed inside the cell that they belong to, or, for pairs, in the CSV alone
FOLDED = (*(limit for limits in LIMITS.values() for limit in limits), "diverged", "pairs", "labels_alone")
# what was measured, and the column that counts the runs which may have failed to give it
ATTEMPTS: Mapping[str, str] = {
    "ours": "diverged",
    "test_accuracy": "diverged",
    "val_accuracy": "diverged",
    "best_on_test": "cells",
    "chosen_on_validation": "cells",
}
LATEX_ESCAPES = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)


def _printed(frame: pd.DataFrame) -> pd.DataFrame:
    rows = frame.to_dict("records")
    columns = _shown(frame)
    cells = [[_cell(column, row) for column in columns] for row in rows]
    return pd.DataFrame(cells, columns=[_heading(column, frame) for column in columns], dtype=object)


def _shown(frame: pd.DataFrame) -> list[str]:
    # within one stage, stage and scheme say nothing of a method that its name does not
    dropped = {"stage", "scheme"} if "stage" in frame and frame.stage.nunique() <= 1 else set()
    return [column for column in frame.columns if column not in dropped | set(FOLDED)]


def _sides(frame: pd.DataFrame) -> list[str]:
    return ["left" if column in TEXTS else "right" for column in _shown(frame)]


def _heading(column: str, frame: pd.DataFrame) -> str:
    heading = HEADINGS.get(column, column.replace("_", " ").capitalize())
    has_limits = column in LIMITS and LIMITS[column][0] in frame
    return f"{heading} [95 % interval]" if has_limits else heading


def _cell(column: str, row: Mapping[Hashable, Any]) -> str:
    value = row[column]
    if column in TEXTS:
        return TEXTS[column](value)
    if isinstance(value, int):
        return str(value)
    if np.isnan(value):
        return _absent(column, row)
    form = FORMATS.get(column, ".2f")
    text = format(value, form)
    limits = [row.get(limit, np.nan) for limit in LIMITS.get(column, ())]
    if limits and not np.isnan(limits).any():
        text += f" [{', '.join(format(limit, form) for limit in limits)}]"
    if ATTEMPTS.get(column) == "diverged" and row["diverged"]:
        text += f" ({row['diverged']} diverged)"
    return text


def _absent(column: str, row: Mapping[Hashable, Any]) -> str:
    """Why a number is missing; "-" where there is none to be had, as for the grid of a method that has no grid."""
    if column not in ATTEMPTS:
        return "-"
    if row[ATTEMPTS[column]]:
        return "diverged"
    return "-" if row.get("n") else "not run"
