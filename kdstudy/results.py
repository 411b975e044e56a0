"""From params.yaml and the records on disk to tidy tables of runs; a run without a record is simply not in them."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from kdstudy.store import Record, Store
from kdstudy.study import SCHEMES, Planner, RunSpec

RESULT_COLUMNS = (
    *("run", "profile", "dataset", "teacher", "student", "stage", "scheme", "method", "hyperparameters", "seed"),
    *("epochs", "test_accuracy", "val_accuracy", "teacher_accuracy", "agreement", "nll", "ece", "student_parameters"),
    *("seconds", "device", "torch", "commit", "setting", "purpose", "status"),
    *("deployed", "network_epochs", "all_network_epochs", "further"),
)


@dataclass(frozen=True)
class Ledger:
    """What the study asks for, held against what the store has."""

    planner: Planner
    store: Store

    def runs(self, setting: str, stage: str) -> list[RunSpec]:
        """All runs of a stage and setting that are known so far, in the order of params.yaml.

        The final runs of a row with a grid are known only when all of its cells have a record.
        """
        if stage == "teacher":
            return self.planner.teachers(setting)
        specs = []
        for row in self.planner.rows(setting, stage):
            specs += self.planner.tuning(setting, stage, row) + self.final(setting, stage, row)
        return specs

    def final(self, setting: str, stage: str, row: str) -> list[RunSpec]:
        """The final runs of a row, with hyperparameters chosen on held-out images; empty while cells are missing."""
        cells = self.planner.tuning(setting, stage, row)
        records = [self.store.record(spec) for spec in cells]
        if any(record is None for record in records):
            return []
        chosen = dict(choose(cells, records).hyperparameters) if cells else {}
        return self.planner.final(setting, stage, row, chosen)

    def frame(self, specs: Iterable[RunSpec]) -> pd.DataFrame:
        """One row per run that has a record, in the columns of results.csv."""
        pairs = [(spec, self.store.record(spec)) for spec in specs]
        rows = [
            result_row(spec, record) | {"all_network_epochs": self.network_epochs(spec)}
            for spec, record in pairs
            if record is not None
        ]
        return pd.DataFrame(rows, columns=list(RESULT_COLUMNS))

    def network_epochs(self, spec: RunSpec) -> int | None:
        """What a run cost with all runs that taught it, each once; None if one of them has no record.

        The unit is an epoch of one network, forward and back.
        """
        records = [self.store.record(run) for run in with_teachers(spec).values()]
        return None if None in records else sum(record["network_epochs"] for record in records)

    def profile(self, profile: str) -> pd.DataFrame:
        """results.csv of a profile: all stages of all its settings."""
        stages = ["teacher", *self.planner.params.methods]
        settings = self.planner.params.settings_of(profile)
        return self.frame(spec for setting in settings for stage in stages for spec in self.runs(setting, stage))

    def histories(self, specs: Iterable[RunSpec]) -> pd.DataFrame:
        """One row per epoch of every run that has a record: run, method, seed, purpose, and its history's columns."""
        epochs = []
        for spec in specs:
            record = self.store.record(spec)
            names = {"run": spec.id, "method": spec.row, "seed": spec.seed, "purpose": spec.purpose}
            epochs += [names | epoch for epoch in (record["history"] if record else ())]
        return pd.DataFrame(epochs)


def above(spec: RunSpec) -> Iterator[RunSpec]:
    """All runs that must be made before a run, each before those that it comes before; some perhaps twice."""
    for teacher in spec.teachers:
        yield from above(teacher)
        yield teacher


def with_teachers(spec: RunSpec) -> dict[str, RunSpec]:
    """A run and all that it learned from, by id."""
    found = {spec.id: spec}
    if SCHEMES[spec.scheme_name].needs_teacher:
        for teacher in spec.teachers:
            found |= with_teachers(teacher)
    return found


def choose(cells: list[RunSpec], records: list[Record]) -> RunSpec:
    """The cell with the highest accuracy on the held-out images; of several, the first in `cell_order`."""
    accuracies = [record["scores"].get("val_accuracy", float("-inf")) for record in records]
    best = [cell for cell, accuracy in zip(cells, accuracies, strict=True) if accuracy == max(accuracies)]
    return min(best, key=lambda cell: cell_order(_json(cell)))


def cell_order(hyperparameters: str) -> tuple[tuple[str, bool, float, str], ...]:
    """Sort key of a grid cell, given as JSON: by name, then by value, numbers by size (2, 5, 10) and before words."""
    return tuple((name, *_value_order(value)) for name, value in sorted(json.loads(hyperparameters).items()))


def _value_order(value: Any) -> tuple[bool, float, str]:
    is_number = isinstance(value, int | float)
    return not is_number, float(value) if is_number else 0.0, json.dumps(value)


def _json(spec: RunSpec) -> str:
    return json.dumps(dict(spec.hyperparameters), sort_keys=True)


def result_row(spec: RunSpec, record: Record) -> dict[str, Any]:
    """The row of results.csv: names from the specification, everything measured from the record."""
    scores = record["scores"]
    measured = ("test_accuracy", "val_accuracy", "teacher_accuracy", "agreement", "nll", "ece")
    return {
        "run": spec.id,
        "profile": spec.profile,
        "dataset": spec.dataset,
        "teacher": spec.teacher.network if spec.teacher else None,
        "student": spec.network,
        "stage": spec.stage,
        "scheme": spec.scheme_name,
        "method": spec.row,
        "hyperparameters": _json(spec),
        "seed": spec.seed,
        "epochs": len(record["history"]),
        **{name: scores.get(name) for name in measured},
        **{name: record[name] for name in ("student_parameters", "seconds", "device", "torch", "commit")},
        "setting": spec.setting,
        "purpose": spec.purpose,
        "status": record["status"],
        "deployed": record["deployed"],
        "network_epochs": record["network_epochs"],
        "further": json.dumps(record["further"], sort_keys=True),
    }
