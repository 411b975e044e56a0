"""Sentences computed from results, so that no number in a notebook is typed."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from IPython.display import Markdown

from kdstudy.answers import Answers
from kdstudy.results import Ledger
from kdstudy.statistics import Interval, mean_interval
from kdstudy.tables import label, tuning_table

SIGNIFICANT = 0.05
MACHINERY_PROFILE = "quick"


def _interval(interval: Interval, unit: str = " %", form: str = ".2f") -> str:
    mean = f"{interval.mean:{form}}{unit}"
    if np.isnan(interval.low):
        return f"{mean} (n = {interval.n})"
    return f"{mean} (95 % interval {interval.low:{form}} to {interval.high:{form}}, n = {interval.n})"


def teacher_reading(frame: pd.DataFrame, histories: pd.DataFrame) -> Markdown:
    """How good the teachers of a setting are, from their rows of results.csv and their histories."""
    final = frame[(frame.purpose == "final") & (frame.status == "finished")]
    if final.empty:
        return Markdown("- No teacher has finished.")
    last = histories[histories.run.isin(final.run)].groupby("run").train_accuracy.last()
    lines = [
        f"- Test accuracy of the last epoch: {_interval(mean_interval(final.test_accuracy))}.",
        f"- In that epoch it got {last.mean():.2f} % of its augmented training images right.",
        f"- Calibration: confidence and accuracy are {final.ece.mean():.2f} points apart on average (ECE).",
    ]
    spread = np.ptp(final.test_accuracy)
    if len(final) > 1:
        lines.append(
            f"- Seeds differ by up to {spread:.2f} points. A difference between methods has to be held against that, "
            "and is therefore taken between runs of the same seed."
        )
    return Markdown("\n".join(lines))


def dark_knowledge(answers: Answers, temperature: float, pairs: int = 3) -> Markdown:
    """Which wrong classes the teacher finds most likely, and how much the temperature adds to them."""
    cold, warm = answers.softened(1), answers.softened(temperature)
    names, classes = answers.class_names, len(answers.class_names)
    others = np.where(np.eye(classes, dtype=bool), -1.0, np.nan_to_num(warm, nan=-1.0))
    highest = np.argsort(-others, axis=None, kind="stable")[:pairs]
    listed = "; ".join(
        f"an image of {names[row]} is {names[column]} with {100 * warm[row, column]:.1f} %"
        for row, column in zip(*np.unravel_index(highest, warm.shape), strict=True)
    )
    return Markdown(
        f"- All classes but the true one share {_percent_off(cold):.2f} % of the probability at T = 1, and "
        f"{_percent_off(warm):.1f} % at T = {temperature:g}. The temperature changes no order, it makes it visible.\n"
        f"- What resembles what, for this teacher at T = {temperature:g}: {listed}."
    )


def _percent_off(matrix: np.ndarray) -> float:
    return 100 * (1 - float(np.nanmean(np.diag(matrix))))


def where_edits_act(answers: Mapping[str, Answers]) -> Markdown:
    """How many targets the edits of right and of wrong predictions touch, by part of the data."""
    names = {"training": "training, as they are", "augmented": "training, as a student's first epoch shows them"}
    rows = [
        (names.get(part, part), len(wrong), int(wrong.sum()), f"{100 * float(wrong.double().mean()):.2f}")
        for part, wrong in ((part, each.wrong) for part, each in answers.items())
    ]
    table = pd.DataFrame(rows, columns=["images", "how many", "teacher wrong", "%"]).to_markdown(
        index=False, disable_numparse=True, colalign=("left", "right", "right", "right")
    )
    seen = answers["augmented"].wrong
    count, percent = int(seen.sum()), 100 * float(seen.double().mean())
    return Markdown(
        f"{table}\n\n"
        f"- In its first epoch a student gets {len(seen):,} targets; {count:,} of them ({percent:.2f} %) come from a "
        "wrong prediction. Only there can Earth Mover, the second temperature and the corrections of V1 to V3 do "
        "anything.\n"
        f"- On the other {100 - percent:.2f} % Earth Mover is plain distillation, Two Temperature is it at "
        "`temperature_right`, and V1, V2 and V4 are one and the same: the confidence is lowered."
    )


def comparison_reading(table: pd.DataFrame, profile: str) -> Markdown:
    """What a comparison table (`tables.comparison_table`) supports, and what not."""
    compared = table[table.p_holm.notna()]
    lines = [_best(table), *_verdicts(compared)]
    if len(compared):
        half = (compared.difference_high - compared.difference_low).median() / 2
        lines.append(
            f"- A difference is known to ± {half:.2f} points (median of the intervals; "
            f"{int(compared.pairs.median())} pairs). More seeds would narrow that."
        )
    if profile == MACHINERY_PROFILE:
        lines.append(
            f"- **These numbers prove the machinery, not the methods.** The profile `{profile}` has small images and "
            "tiny networks, so that it runs on a laptop. What it finds need not hold elsewhere."
        )
    return Markdown("\n".join(line for line in lines if line))


def comparisons_reading(tables: Mapping[str, pd.DataFrame], profile: str) -> Markdown:
    """`comparison_reading` for several settings, each under its name."""
    parts = [f"**{setting}**\n\n{comparison_reading(table, profile).data}" for setting, table in tables.items()]
    return Markdown("\n\n".join(parts) or "No run has been made yet, so there is nothing to read.")


def _best(table: pd.DataFrame) -> str:
    ranked = table[table.n > 0]
    if ranked.empty:
        return "- No student has finished."
    first = ranked.iloc[0]
    mean = _interval(Interval(first.test_accuracy, first.ci_low, first.ci_high, first.n))
    return f"- Highest mean: {label(first.method)}, {mean}."


def _verdicts(compared: pd.DataFrame) -> list[str]:
    if compared.empty:
        return ["- There are no paired runs yet to compare with vanilla KD."]
    sure = compared[compared.p_holm < SIGNIFICANT]
    tested = f"{len(compared)} comparisons with vanilla KD, corrected by Holm's procedure"
    if sure.empty:
        return [f"- No difference to vanilla KD can be told from chance: of {tested}, none has p below {SIGNIFICANT}."]
    better, worse = sure[sure.difference_to_kd > 0], sure[sure.difference_to_kd < 0]
    return [
        f"- {word} than vanilla KD (p below {SIGNIFICANT} in {tested}): {_listed(rows)}."
        for word, rows in (("Better", better), ("Worse", worse))
        if len(rows)
    ]


def _listed(rows: pd.DataFrame) -> str:
    return ", ".join(f"{label(row.method)} ({row.difference_to_kd:+.2f} points)" for row in rows.itertuples())


def optimism_reading(results: pd.DataFrame) -> Markdown:
    """What picking each grid's cell on the test images, as the thesis seems to do, adds to the accuracy reported."""
    gains = [gain for setting in results.setting.unique() for gain in _optimism(tuning_table(results, setting))]
    if not gains:
        return Markdown("- No grid has been run, so there is nothing to be picked.")
    mean, best = float(np.mean(gains)), max(gains)
    return Markdown(
        f"- In {len(gains)} grids (one for each method and setting) the cell that is best on the test images scores "
        f"{mean:.2f} points more there than the cell that is best on the held-out images (mean; at most {best:.2f}). "
        "By that much selection on the test set flatters a method, without any student being better."
    )


def _optimism(tuning: pd.DataFrame) -> list[float]:
    gains = []
    for _, cells in tuning.groupby(["stage", "scheme", "method"]):
        chosen = cells.test_accuracy[cells.chosen]
        if len(chosen):
            gains.append(float(cells.test_accuracy.max() - chosen.iloc[0]))
    return gains


def completeness(ledger: Ledger, profile: str, results: pd.DataFrame) -> Markdown:
    """How many of the runs that params.yaml asks for have a record, in all and by setting and stage."""
    rows = []
    for setting in ledger.planner.params.settings_of(profile):
        for stage in ("teacher", *ledger.planner.params.methods):
            made = results[(results.setting == setting) & (results.stage == stage)]
            diverged = int((made.status == "diverged").sum())
            rows.append((setting, stage, _wanted(ledger, setting, stage), len(made) - diverged, diverged))
    table = pd.DataFrame(rows, columns=["setting", "stage", "wanted", "finished", "diverged"])
    wanted, finished, diverged = table[["wanted", "finished", "diverged"]].sum()
    tail = f", {diverged} diverged" if diverged else ""
    return Markdown(f"**{finished} of {wanted} runs are finished{tail}.**\n\n{table.to_markdown(index=False)}")


def _wanted(ledger: Ledger, setting: str, stage: str) -> int:
    planner = ledger.planner
    if stage == "teacher":
        return len(planner.teachers(setting))
    seeds = len(planner.setting(setting).seeds)
    return sum(len(planner.tuning(setting, stage, row)) + seeds for row in planner.rows(setting, stage))
