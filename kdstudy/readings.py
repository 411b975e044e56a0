"""Sentences computed from results, so that no number in a notebook is typed."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from IPython.display import Markdown

from kdstudy.answers import Answers
from kdstudy.results import Ledger
from kdstudy.statistics import Interval, holm, mean_interval, paired_difference
from kdstudy.study import Planner
from kdstudy.tables import BASELINE_STAGE, label, tuning_table

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
        lines.append(_only_machinery(profile))
    return Markdown("\n".join(line for line in lines if line))


def _only_machinery(profile: str) -> str:
    return (
        f"- **These numbers prove the machinery, not the methods.** The profile `{profile}` has small images and "
        "tiny networks, so that it runs on a laptop. What it finds need not hold elsewhere."
    )


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


def share_reading(table: pd.DataFrame, profile: str) -> Markdown:
    """What a teacher is worth on each share of the training images, from `tables.share_table`."""
    found = table[table.n > 0]
    if found.empty:
        return Markdown("- No student has finished.")
    lines = [
        "- Test accuracy by share of the training images; in brackets the points more or less than labels alone, with "
        "the same network, images and seeds:"
    ]
    lines += [f"  - {label(method)}: {_on_shares(rows)}" for method, rows in found.groupby("method", sort=False)]
    lines += [_won_back(rows) for _, rows in found.groupby("student", sort=False)]
    lines.append(_share_verdict(found[found.p_holm.notna()]))
    if profile == MACHINERY_PROFILE:
        lines.append(_only_machinery(profile))
    return Markdown("\n".join(line for line in lines if line))


def _on_shares(rows: pd.DataFrame) -> str:
    gains = ["" if np.isnan(gain) else f" ({gain:+.2f})" for gain in rows.difference_to_labels]
    pairs = zip(rows.itertuples(), gains, strict=True)
    return ", ".join(f"{row.test_accuracy:.2f} % on {row.share:g} %{gain}" for row, gain in pairs)


def _won_back(rows: pd.DataFrame) -> str:
    """What labels alone lose from all images to the smallest share, and who makes up for most of it."""
    compared = rows[rows.difference_to_labels.notna()]
    alone = compared.groupby("share").labels_alone.first()
    if len(alone) < 2:
        return ""
    few = compared[compared.share == alone.index[0]]
    best = few.loc[few.difference_to_labels.idxmax()]
    makes_up = f"{label(best.method)} makes up for most: {best.difference_to_labels:+.2f}"
    return (
        f"- From {alone.index[-1]:g} % to {alone.index[0]:g} % of the images labels alone lose "
        f"{alone.iloc[-1] - alone.iloc[0]:.2f} points. "
        f"{makes_up if best.difference_to_labels > 0 else 'No method makes up for any of that'}."
    )


def _share_verdict(compared: pd.DataFrame) -> str:
    tested = f"{len(compared)} comparisons with labels alone, corrected by Holm's procedure"
    sure = compared[compared.p_holm < SIGNIFICANT]
    if compared.empty:
        return "- There are no paired runs yet to compare with labels alone."
    if sure.empty:
        return f"- None of these differences can be told from chance (p below {SIGNIFICANT} in {tested})."
    named = [
        f"{label(row.method)} on {row.share:g} % ({row.difference_to_labels:+.2f} points)" for row in sure.itertuples()
    ]
    return f"- Not by chance (p below {SIGNIFICANT} in {tested}): {', '.join(named)}."


def alignment_reading(before: Mapping[str, float], results: pd.DataFrame, seed: int) -> Markdown:
    """What few-sample distillation repairs in the teacher of one seed.

    `before` is the test accuracy (percent) of each pruned network before alignment; `results` are those of
    `table_files.by_share`.
    """
    runs = results[(results.scheme == "offline") & (results.status == "finished") & (results.seed == seed)]
    lines = []
    for network, accuracy in before.items():
        aligned = runs[runs.student == network].sort_values("share", kind="stable")
        after = ", ".join(f"{row.test_accuracy:.2f} % ({row.share:g} % of the images)" for row in aligned.itertuples())
        lines.append(
            f"- The teacher of seed {seed} gets {aligned.teacher_accuracy.mean():.2f} % of the test images right. "
            f"Pruned, as `{network}`, it gets {accuracy:.2f} %. Aligned: {after}."
        )
    return Markdown("\n".join(lines) or "No network of this setting is pruned.")


def control_reading(results: pd.DataFrame, setting: str, controls: Mapping[str, str]) -> Markdown:
    """The mean paired difference of each row to its control, where results.csv has final runs of both."""
    finals = results[(results.setting == setting) & (results.purpose == "final")]
    accuracies = {row: runs.set_index("seed").test_accuracy for row, runs in finals.groupby("method")}
    lines = [
        f"- {label(row)}, less its control {label(control)}: {_difference(accuracies[row], accuracies[control])}."
        for row, control in controls.items()
        if row in accuracies and control in accuracies
    ]
    return Markdown("\n".join(lines) or "- None of these pairs has been run on this setting.")


def _difference(accuracy: pd.Series, reference: pd.Series) -> str:
    interval, _ = paired_difference(accuracy, reference)
    return _interval(interval, " points", "+.2f") if interval.n else "no seed has both"


def weights_reading(planner: Planner, setting: str, stage: str) -> Markdown:
    """With what right the rows of a stage without grids are compared with vanilla KD."""
    cells = len(planner.tuning(setting, BASELINE_STAGE, "kd")) if "kd" in planner.rows(setting, BASELINE_STAGE) else 0
    kd = f"were chosen on held-out images, out of {cells} cells" if cells else "are those of `params.yaml`, not tuned"
    rows, own = planner.rows(setting, stage), planner.setting(setting).overrides
    tuned = [label(row) for row in rows if planner.tuning(setting, stage, row)]
    by_hand = [label(row) for row in rows if row in own and not planner.tuning(setting, stage, row)]
    except_for = f" but {', '.join(tuned + by_hand)}" if tuned or by_hand else ""
    lines = [f"- The numbers of vanilla KD {kd}."]
    if len(tuned + by_hand) < len(rows):
        lines[0] += (
            f" The rows of this stage{except_for} have the weights of their papers or authors, made for other images "
            "and other networks. A row that is behind here may be a good method with a wrong weight."
        )
    if by_hand:
        lines.append(f"- Set by hand for this setting, in `params.yaml`: {', '.join(by_hand)}.")
    return Markdown("\n".join(lines))


def sizes_reading(results: pd.DataFrame) -> Markdown:
    """Which rows deploy a network of another size than the CE student's, so that accuracies alone are no fair race."""
    sizes = results[results.purpose == "final"].groupby("method", sort=False).student_parameters.first()
    if "ce" not in sizes:
        return Markdown("- There is no CE student to compare the sizes with.")
    usual = sizes["ce"]
    others = [f"{label(row)} {size:,.0f} ({size / usual - 1:+.0%})" for row, size in sizes.items() if size != usual]
    if not others:
        return Markdown(f"- All rows deploy a network of {usual:,.0f} parameters.")
    return Markdown(f"- The CE student has {usual:,.0f} parameters. Other sizes are deployed by: {', '.join(others)}.")


def heads_reading(results: pd.DataFrame, setting: str) -> Markdown:
    """The thesis's open question, answered as far as the runs do: what the edits of the heads' targets change."""
    controls = {"heads_v2": "heads_plain", "heads_v4": "heads_plain", "heads_plain": "heads_labels"}
    finals = results[(results.setting == setting) & (results.purpose == "final")]
    accuracies = {row: runs.set_index("seed").test_accuracy for row, runs in finals.groupby("method")}
    edits = [row for row in ("heads_v2", "heads_v4") if {row, "heads_plain"} <= accuracies.keys()]
    p_values = holm([paired_difference(accuracies[row], accuracies["heads_plain"])[1] for row in edits])
    text = control_reading(results, setting, controls).data
    if not edits:
        return Markdown(text)
    sure = [label(row) for row, p in zip(edits, p_values, strict=True) if p < SIGNIFICANT]
    shown = "; ".join(f"{label(row)} {p:.2g}" for row, p in zip(edits, p_values, strict=True) if not np.isnan(p))
    tests = f"p after Holm's correction: {shown}" if shown else "no p can be computed"
    if sure:
        verdict = f"make a difference that chance alone would hardly make: {', '.join(sure)}"
    else:
        verdict = "make no difference that can be told from chance with these seeds"
    return Markdown(f"{text}\n- Held against plain targets on the same heads, the edits {verdict} ({tests}).")


def teaching_reading(results: pd.DataFrame) -> Markdown:
    """How good the networks are that were trained only to teach the students of a stage."""
    teaching = results[(results.purpose == "teaching") & (results.status == "finished")]
    lines = [
        f"- {label(row.partition(':')[0])} is taught by a {runs.student.iloc[0]} of its own, test accuracy "
        f"{_interval(mean_interval(runs.test_accuracy))}."
        for row, runs in teaching.groupby("method", sort=False)
    ]
    return Markdown("\n".join(lines) or "- No row of this setting has a teacher of its own.")


def closeness_reading(closeness: pd.DataFrame, results: pd.DataFrame) -> Markdown:
    """What `relations.closeness` says: of methods in their own measure, of FSP, and of closeness and accuracy."""
    means = closeness.groupby("method", sort=False)[["maps", "distances", "cosines", "flows"]].mean()
    lines = []
    if {"ce", "similarity"} <= set(means.index):
        ours, ce = means.loc["similarity"], means.loc["ce"]
        lines.append(
            f"- Similarity preserving matches the similarities of the last maps. Its students are {ours.maps:.3f} off "
            f"the teacher there, the CE students {ce.maps:.3f}. It does not look at the embeddings: their cosines are "
            f"{ours.cosines:.3f} off, those of the CE students {ce.cosines:.3f}."
        )
    if {"ce", "relational_distance"} <= set(means.index):
        ours, ce = means.loc["relational_distance"], means.loc["ce"]
        lines.append(
            f"- Relational KD matches distances. By these alone, its students are {ours.distances:.3f} off, the CE "
            f"students {ce.distances:.3f}; in the cosines {ours.cosines:.3f} and {ce.cosines:.3f}."
        )
    if {"ce", "fsp"} <= set(means.index) and not np.isnan(means.flows["fsp"]):
        ours, ce = 100 * means.flows[["fsp", "ce"]]
        lines.append(
            f"- The flows of FSP's students end {ours:.0f} % off the teacher's, of the CE students {ce:.0f} %. "
            "Flows were matched in the first phase alone; the labels have moved them since."
        )
    lines += _closest(means, results)
    return Markdown("\n".join(lines) or "- There is too little here to compare.")


def _closest(means: pd.DataFrame, results: pd.DataFrame) -> list[str]:
    if len(means) < 5:
        return []
    accuracy = results[results.purpose == "final"].groupby("method").test_accuracy.mean().loc[means.index]
    order = -means.cosines.rank().corr(accuracy.rank())
    nearest = means.cosines.idxmin()
    return [
        f"- The cosines that are closest to the teacher's are those of {label(nearest)}, rank "
        f"{accuracy.rank(ascending=False, method='min')[nearest]:.0f} of {len(means)} by accuracy. Over all rows, "
        f"closeness and accuracy have a rank correlation of {order:.2f}; at 1 the closer student would always be the "
        "better one."
    ]


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
