"""Schemes under one budget: what their rows cost, in network-epochs and in multiply-adds, and what they are worth."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from IPython.display import Markdown
from torch.utils.flop_counter import FlopCounterMode

from kdstudy.core import Phase
from kdstudy.costs import untrained_scheme
from kdstudy.data import BlankBank, ImageBank
from kdstudy.device import DataOnDevice
from kdstudy.lesson import table
from kdstudy.readings import MACHINERY_PROFILE, SIGNIFICANT
from kdstudy.results import Ledger, with_teachers
from kdstudy.schemes import Batch, Scheme, Turn, sample_batch
from kdstudy.statistics import holm, mean_interval, paired_difference
from kdstudy.study import SCHEMES, Planner, RunSpec
from kdstudy.tables import label

STAGE = "budget"
LABELS, TAUGHT = "budget_ce", "budget_kd"  # what the others are compared with
NEAR_CHANCE = 2.0  # times the accuracy of guessing
COUNTED = 16  # images by which multiply-adds are counted
UNITS = ((1e15, "peta"), (1e12, "tera"), (1e9, "giga"))
# rows of the stage whose loss is a divergence from somebody's answers
ANSWERS = (
    *(TAUGHT, "budget_equal_teacher", "budget_born_again", "budget_mutual", "budget_own_teacher"),
    *("budget_snapshot", "budget_virtual_teacher", "budget_zero_shot"),
)


def allowance(planner: Planner, setting: str) -> int:
    """The budget: the network-epochs of a teacher and of one student of this setting."""
    this = planner.setting(setting)
    teacher = planner.teacher(setting, this.seeds[0])
    return teacher.recipe.epochs + planner.params.recipes[this.recipe].epochs


def planned_epochs(spec: RunSpec, batch: Batch, classes: int) -> int:
    """The network-epochs that a run takes at most, without those of the runs that teach it."""
    scheme = untrained_scheme(spec, batch, classes)
    return sum(spec.recipe.for_phase(phase).epochs * scheme.passes(phase) for phase in scheme.phases())


def planned_in_all(spec: RunSpec, batch: Batch, classes: int) -> int:
    """The same with all runs that teach it, each counted once."""
    return sum(planned_epochs(run, batch, classes) for run in with_teachers(spec).values())


def plan(planner: Planner, setting: str, batch: Batch, classes: int) -> pd.DataFrame:
    """What the rows of the stage may spend on a setting.

    Columns: method, scheme, epochs (of the row's own recipe), network_epochs, all_network_epochs, budget.
    """
    allowed, rows = allowance(planner, setting), []
    for name in planner.rows(setting, STAGE):
        spec = planner.final(setting, STAGE, name, {})[0]
        own, everything = (count(spec, batch, classes) for count in (planned_epochs, planned_in_all))
        rows.append((name, spec.scheme_name, spec.recipe.epochs, own, everything, allowed))
    heads = ["method", "scheme", "epochs", "network_epochs", "all_network_epochs", "budget"]
    return pd.DataFrame(rows, columns=heads)


def plan_table(planned: pd.DataFrame) -> Markdown:
    """`plan` in print."""
    if planned.empty:
        return Markdown(f"This setting trains no row of the stage `{STAGE}`.")
    taught = planned.all_network_epochs - planned.network_epochs
    shown = {
        "row": [f"`{name}`" for name in planned.method],
        "called": planned.method.map(label),
        "scheme": planned.scheme,
        "epochs": planned.epochs,
        "its own network-epochs": planned.network_epochs,
        "of those that teach it": taught,
        "in all": planned.all_network_epochs,
        "left of the budget": planned.budget - planned.all_network_epochs,
    }
    return table(pd.DataFrame(shown))


@dataclass(frozen=True)
class Cost:
    """What a run took: how many networks were trained, network-epochs, multiply-adds."""

    networks: int = 0
    network_epochs: int = 0
    multiply_adds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        """What two runs took."""
        return Cost(
            self.networks + other.networks,
            self.network_epochs + other.network_epochs,
            self.multiply_adds + other.multiply_adds,
        )


def cost_table(ledger: Ledger, setting: str, data: DataOnDevice) -> pd.DataFrame:
    """What the first seed of every row of the stage took, with all runs that taught it, each counted once.

    Columns: method, family, scheme, networks (trained), network_epochs (its own), all_network_epochs, multiply_adds
    (of all). Rows without records are left out.
    """
    known: dict[str, Cost] = {}
    rows = []
    firsts = [ledger.final(setting, STAGE, name)[:1] for name in ledger.planner.rows(setting, STAGE)]
    for spec in (spec for first in firsts for spec in first if ledger.network_epochs(spec) is not None):
        runs = with_teachers(spec)
        for run in runs.values():
            if run.id not in known:
                known[run.id] = run_cost(run, data, ledger.store.record(run)["history"])
        total = sum((known[run] for run in runs), Cost())
        scheme = spec.scheme_name
        cells = known[spec.id].network_epochs, total.network_epochs, total.multiply_adds
        rows.append((spec.row, SCHEMES[scheme].family, scheme, total.networks, *cells))
    heads = ("method", "family", "scheme", "networks", "network_epochs", "all_network_epochs", "multiply_adds")
    return pd.DataFrame(rows, columns=list(heads))


def run_cost(spec: RunSpec, data: DataOnDevice, history: Iterable[Mapping]) -> Cost:
    """What a run took, without the runs that taught it; `history` says how many epochs each phase had."""
    images = data.blank if SCHEMES[spec.scheme_name].data_free else data.training
    bank: ImageBank | BlankBank = images(spec.held_out, spec.recipe, spec.images)
    batch = sample_batch(bank, COUNTED)
    scheme = untrained_scheme(spec, batch, data.images.classes)
    phases = {phase.name: phase for phase in scheme.phases()}
    epochs = Counter(epoch["phase"] for epoch in history)
    networks = scheme.trained_networks(part for phase in phases.values() for part in phase.trains)
    passes = sum(epochs[name] * scheme.passes(phase) for name, phase in phases.items())
    seen = {name: epochs[name] * len(scheme.bank(phase, bank)) for name, phase in phases.items()}
    counted = sum(seen[name] * multiply_adds(scheme, phase, batch) for name, phase in phases.items())
    return Cost(len(networks), passes, counted)


def multiply_adds(scheme: Scheme, phase: Phase, batch: Batch) -> float:
    """The multiply-adds of a phase's step per image: convolutions and matrix products, of all networks that run.

    Forward and back, the teacher's forward pass and the adapters among them.
    """
    total = 0
    scheme.set_modes(phase)
    scheme.begin_step(0)
    for turn in scheme.turns(phase):
        # the second of several steps on a batch may find something made already
        steps = [_step_multiply_adds(scheme, phase, turn, batch) for _ in range(min(turn.times, 2))]
        total += steps[0] + (turn.times - 1) * steps[-1]
    return total / len(batch.labels)


def _step_multiply_adds(scheme: Scheme, phase: Phase, turn: Turn, batch: Batch) -> int:
    with FlopCounterMode(display=False) as counter:
        loss = sum(scheme.losses(phase, turn, batch, None).terms.values())
        loss.backward(inputs=scheme.trained_parameters(turn.trains))
    return counter.get_total_flops() // 2


def generation(planner: Planner, setting: str, epochs: int, *teachers: RunSpec) -> RunSpec:
    """A run of so many epochs, for examples: on labels, or on the answers of earlier runs."""
    base = planner.teacher(setting, planner.setting(setting).seeds[0])
    base = replace(base, recipe=replace(base.recipe, epochs=epochs, milestones=()))
    if not teachers:
        return base
    return replace(base, method="born_again", teacher=teachers[0], co_teachers=teachers[1:])


def points(ledger: Ledger, setting: str) -> pd.DataFrame:
    """All rows of all stages that have been run: what each cost with all that taught it, and how good it is.

    Columns: stage, method, family, all_network_epochs and test_accuracy (means over the final runs), few (whether it
    was trained on a share of the images, so that its epochs are shorter).
    """
    planner, rows = ledger.planner, []
    for stage in planner.params.methods:
        for name in planner.rows(setting, stage):
            specs = ledger.final(setting, stage, name)
            frame = ledger.frame(specs)
            means = frame[["all_network_epochs", "test_accuracy"]].astype(float).mean()
            if not means.isna().any():
                family = SCHEMES[specs[0].scheme_name].family
                rows.append((stage, name, family, *means, specs[0].images != 1))
    heads = ["stage", "method", "family", "all_network_epochs", "test_accuracy", "few"]
    return pd.DataFrame(rows, columns=heads)


def budget_table(results: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """The rows of the stage, best mean first: what they cost (`cost_table`), and how good they are.

    Columns: those of `costs`; student_parameters (deployed); test_accuracy (mean over the final runs), ci_low, ci_high
    (95 %), n; and, against budget_ce and budget_kd, paired by seed: ce, ce_low, ce_high, ce_p, kd, kd_low, kd_high,
    kd_p. The p values of both columns are corrected together by Holm's procedure.
    """
    accuracies = _accuracies(results)
    rows = []
    for name in costs.method:
        own = accuracies[name]
        cells = [results[results.method == name].student_parameters.iloc[0], *mean_interval(own)]
        for reference in (LABELS, TAUGHT):
            other = accuracies[reference] if reference in accuracies and reference != name else own.head(0)
            difference, p = paired_difference(own, other)
            cells += [difference.mean, difference.low, difference.high, p]
        rows.append(cells)
    heads = ["student_parameters", "test_accuracy", "ci_low", "ci_high", "n"]
    heads += ["ce", "ce_low", "ce_high", "ce_p", "kd", "kd_low", "kd_high", "kd_p"]
    frame = pd.concat([costs, pd.DataFrame(rows, columns=heads)], axis=1)
    both = holm(np.concatenate([frame.ce_p.astype(float), frame.kd_p.astype(float)]))
    frame["ce_p"], frame["kd_p"] = both[: len(frame)], both[len(frame) :]
    return frame.sort_values("test_accuracy", ascending=False, kind="stable", ignore_index=True)


def _accuracies(results: pd.DataFrame) -> dict[str, pd.Series]:
    """The test accuracies of each row's final runs, by seed."""
    finals = results[results.purpose == "final"]
    return {row: runs.set_index("seed").test_accuracy.astype(float) for row, runs in finals.groupby("method")}


def costs_printed(frame: pd.DataFrame) -> Markdown:
    """What the rows of `budget_table` cost, in print."""
    if frame.empty:
        return Markdown(f"No row of the stage `{STAGE}` has been run.")
    scale, unit = unit_of(frame.multiply_adds.max())
    shown = {
        "row": frame.method.map(label),
        "family": frame.family.str.replace("_", "-"),
        "scheme": frame.scheme,
        "networks trained": frame.networks,
        "network-epochs, own": frame.network_epochs,
        "in all": frame.all_network_epochs,
        f"multiply-adds in all ({unit})": frame.multiply_adds / scale,
        "deployed parameters": [f"{count:,.0f}" for count in frame.student_parameters],
    }
    return table(pd.DataFrame(shown), "What was trained, and what that cost", floatfmt=".3g")


def results_printed(frame: pd.DataFrame) -> Markdown:
    """How good the rows of `budget_table` are, in print."""
    if frame.empty:
        return Markdown(f"No row of the stage `{STAGE}` has been run.")
    shown = {
        "row": frame.method.map(label),
        "scheme": frame.scheme,
        "test accuracy (%) [95 % interval]": _spanned(frame, "test_accuracy", "ci", ".2f"),
        "n": frame.n,
        f"less {label(LABELS)} (points)": _spanned(frame, "ce", "ce", "+.2f"),
        "p (Holm)": _p_values(frame.ce_p),
        f"less {label(TAUGHT)} (points)": _spanned(frame, "kd", "kd", "+.2f"),
        "p (Holm) ": _p_values(frame.kd_p),
    }
    return table(pd.DataFrame(shown), "Students on this budget; last epoch, paired differences")


def unit_of(largest: float) -> tuple[float, str]:
    """In what to print numbers up to this one: the divisor and its name."""
    return next(((scale, unit) for scale, unit in UNITS if largest >= scale), UNITS[-1])


def _spanned(frame: pd.DataFrame, mean: str, limits: str, form: str) -> list[str]:
    """Means with their limits, "-" where there is none."""
    rows = zip(frame[mean], frame[f"{limits}_low"], frame[f"{limits}_high"], strict=True)
    spans = [(mean, "" if np.isnan(low) else f" [{low:{form}}, {high:{form}}]") for mean, low, high in rows]
    return ["-" if np.isnan(mean) else f"{mean:{form}}{span}" for mean, span in spans]


def _p_values(values: pd.Series) -> list[str]:
    return ["-" if np.isnan(p) else f"{p:.2g}" for p in values]


def shared_losses(planner: Planner, setting: str) -> dict[str, list[str]]:
    """Rows that share a loss and differ in who teaches whom, by what they share.

    First those of the stage that learn answers by a divergence, then every method with rows under several schemes:
    of each scheme the first row.
    """
    stage = planner.rows(setting, STAGE)
    groups = {"Answers, by a divergence": [row for row in stage if row in ANSWERS]}
    by_method: dict[str, dict[str, str]] = {}
    for other in planner.params.methods:
        for row in planner.rows(setting, other) if other != STAGE else ():
            spec = planner.final(setting, other, row, {})[0]
            if spec.images == 1 and spec.network == planner.setting(setting).student:
                by_method.setdefault(spec.method, {}).setdefault(spec.scheme_name, row)
    groups |= {label(method): list(rows.values()) for method, rows in by_method.items() if len(rows) > 1}
    return {shared: rows for shared, rows in groups.items() if rows}


def worth(planner: Planner, results: pd.DataFrame, setting: str) -> pd.DataFrame:
    """`shared_losses` that have been run, each row against budget_ce, paired by seed.

    Columns: shared, method (the row), scheme, all_network_epochs, difference (points), low, high (95 %), pairs.
    """
    accuracies, firsts = _accuracies(results), results.groupby("method").first()
    reference = accuracies.get(LABELS, pd.Series(dtype=float))
    rows = []
    for shared, names in shared_losses(planner, setting).items():
        for name in (name for name in names if name in accuracies):
            difference, _ = paired_difference(accuracies[name], reference)
            rows.append((shared, name, firsts.scheme[name], firsts.all_network_epochs[name], *difference))
    heads = ["shared", "method", "scheme", "all_network_epochs", "difference", "low", "high", "pairs"]
    frame = pd.DataFrame(rows, columns=heads)
    several = frame.groupby("shared").method.transform("count") > 1
    return frame[several & (frame.pairs > 0)].reset_index(drop=True)


def spending_reading(frame: pd.DataFrame, allowed: int) -> Markdown:
    """Who has spent how much of the budget, in network-epochs and in multiply-adds."""
    if frame.empty:
        return Markdown(f"- No row of the stage `{STAGE}` has been run.")
    spent = frame.all_network_epochs
    others = {"Less": frame[spent < allowed], "More": frame[spent > allowed]}
    exceptions = "".join(f" {word}: {_listed(rows)}." for word, rows in others.items() if len(rows))
    least, most = frame.loc[frame.multiply_adds.idxmin()], frame.loc[frame.multiply_adds.idxmax()]
    lines = [
        f"- The budget is {allowed} network-epochs; {(spent == allowed).sum()} of {len(frame)} rows spend all of it."
        f"{exceptions}",
        f"- In multiply-adds the rows are not equal: {label(most.method)} takes "
        f"{most.multiply_adds / least.multiply_adds:.1f} times those of {label(least.method)}.",
    ]
    costs = frame.set_index("method").multiply_adds
    if {LABELS, TAUGHT} <= set(costs.index):
        dear = costs[TAUGHT] / costs[LABELS]
        lines.append(
            f"- With its teacher, {label(TAUGHT)} is {dear:.1f} times as dear as {label(LABELS)}. For the same "
            f"multiply-adds, labels alone could train the student for {dear * allowed:.0f} epochs."
        )
    return Markdown("\n".join(lines))


def _listed(rows: pd.DataFrame) -> str:
    return ", ".join(f"{label(row.method)} ({row.all_network_epochs})" for row in rows.itertuples())


def budget_reading(frame: pd.DataFrame, results: pd.DataFrame, classes: int, profile: str) -> Markdown:
    """What schemes are worth under this budget, as far as `budget_table` and the runs behind it say."""
    if frame.empty:
        return Markdown(f"- No row of the stage `{STAGE}` has been run.")
    first, last = frame.iloc[0], frame.iloc[-1]
    lines = [
        f"- The mean test accuracies go from {last.test_accuracy:.2f} % ({label(last.method)}) to "
        f"{first.test_accuracy:.2f} % ({label(first.method)}), n = {frame.n.max()} seeds at most.",
        *_guessing(frame, 100 / classes),
        *(_verdict(frame, column, reference) for column, reference in (("ce", LABELS), ("kd", TAUGHT))),
    ]
    questions = {
        "What twice the epochs are worth to labels alone": (LABELS, "ce"),
        "What a larger teacher is worth, beside one of the student's size": (TAUGHT, "budget_equal_teacher"),
        "What it is worth that an equal has finished before": ("budget_equal_teacher", "budget_mutual"),
        "What real images are worth, beside generated ones": (TAUGHT, "budget_zero_shot"),
    }
    accuracies = _accuracies(results)
    lines += [
        f"- {question} ({label(one)} less {label(other)}): {_points(accuracies[one], accuracies[other])}."
        for question, (one, other) in questions.items()
        if {one, other} <= accuracies.keys()
    ]
    if profile == MACHINERY_PROFILE:
        lines.append(
            f"- **These numbers prove the machinery, not the schemes.** The profile `{profile}` has small images and "
            "tiny networks, so that it runs on a laptop. Which scheme is ahead here need not be ahead elsewhere."
        )
    return Markdown("\n".join(lines))


def _guessing(frame: pd.DataFrame, chance: float) -> list[str]:
    """Who has hardly begun to learn."""
    poor = frame[frame.test_accuracy < NEAR_CHANCE * chance]
    return [
        f"- {label(row.method)} is near guessing ({row.test_accuracy:.2f} %, where {chance:.2f} % is chance): for this "
        "row the budget is too small to say anything of its scheme but that."
        for row in poor.itertuples()
    ]


def _verdict(frame: pd.DataFrame, column: str, reference: str) -> str:
    tests = int(frame[["ce_p", "kd_p"]].notna().sum().sum())
    compared = frame[frame[column].notna()]
    if compared.empty:
        return f"- There are no paired runs to compare with {label(reference)}."
    sure = compared[compared[f"{column}_p"] < SIGNIFICANT]
    if sure.empty:
        return (
            f"- No difference to {label(reference)} can be told from chance: of {len(compared)}, none has p below "
            f"{SIGNIFICANT}, corrected for {tests} tests."
        )
    named = ", ".join(f"{label(row['method'])} ({row[column]:+.2f})" for _, row in sure.iterrows())
    return f"- Not by chance other than {label(reference)} (points; p below {SIGNIFICANT} of {tests} tests): {named}."


def _points(accuracy: pd.Series, reference: pd.Series) -> str:
    (mean, low, high, n), _ = paired_difference(accuracy, reference)
    if not n:
        return "no seed has both"
    span = "" if np.isnan(low) else f", 95 % interval {low:+.2f} to {high:+.2f}"
    return f"{mean:+.2f} points (n = {n}{span})"


def worth_reading(frame: pd.DataFrame) -> Markdown:
    """Under which scheme each shared loss is worth most, from `worth`, and what that cost."""
    lines = []
    for shared, rows in frame.groupby("shared", sort=False):
        most, least = rows.loc[rows.difference.idxmax()], rows.loc[rows.difference.idxmin()]
        lines.append(f"- {shared}: most by {_row_worth(most)}, least by {_row_worth(least)}, of {len(rows)} rows.")
    return Markdown("\n".join(lines) or "- No loss has been run under more than one scheme.")


def _row_worth(row: pd.Series) -> str:
    cost = f"{row.all_network_epochs:.0f} network-epochs"
    return f"{label(row.method)} under `{row.scheme}` ({row.difference:+.2f} points, {cost})"
