"""What the study still lacks, made without DVC and Jupyter: cheapest runs first, until a budget is spent."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median

import pandas as pd
import torch

from kdstudy.device import data_path
from kdstudy.execute import Executor, lacking
from kdstudy.files import unknown_name
from kdstudy.image_set import read_card
from kdstudy.models import build_model
from kdstudy.params import look_up
from kdstudy.results import Ledger
from kdstudy.roofline import count_work
from kdstudy.study import SCHEMES, RunSpec

TEACHER = "teacher"


@dataclass(frozen=True)
class Choice:
    """Which runs are wanted; empty means all. With `as_named` they are made in the order of these words."""

    settings: Sequence[str]
    stages: Sequence[str] = ()
    rows: Sequence[str] = ()
    seeds: Sequence[int] = ()
    as_named: bool = False


class Campaign:
    """The wanted runs that have no record. Raises ValueError for names that are unknown.

    The final runs of a row with a grid are known only when its cells have records.
    """

    def __init__(self, ledger: Ledger, choice: Choice):
        self.ledger, self.choice = ledger, choice
        self._card = cache(lambda dataset: read_card(data_path(dataset)))  # one file for thousands of runs
        planner = ledger.planner
        stages = {TEACHER: None, **planner.params.methods}
        for stage in choice.stages:
            look_up("stage", stage, stages)
        self._stages = list(choice.stages or stages)
        known = {row for setting in choice.settings for _, row in self._rows(setting)}
        for row in choice.rows:
            if row not in known:
                where = ", ".join(choice.settings[:2]) + (", ..." if len(choice.settings) > 2 else "")
                raise unknown_name(f"row of {where} {', '.join(choice.stages)}".rstrip() + ":", row, sorted(known))

    def _rows(self, setting: str) -> list[tuple[str, str]]:
        """Stage and row of every row that a setting has in the chosen stages."""
        planner = self.ledger.planner
        return [(stage, row) for stage in self._stages if stage != TEACHER for row in planner.rows(setting, stage)]

    def make(self, executor_of: Callable[[str], Executor]) -> None:
        """Train what is missing, setting by setting. Raises Stopped."""
        executor_of = cache(executor_of)
        # once the cells of a grid are on record, the final runs behind it are known
        while missing := self.missing():
            for setting in dict.fromkeys(spec.setting for spec in missing):
                executor_of(setting).complete(spec for spec in missing if spec.setting == setting)

    def missing(self) -> list[RunSpec]:
        """Those without a record that are known so far, in the order in which they are to be made."""
        found = [spec for spec in self._wanted() if self.ledger.store.record(spec) is None]
        return found if self.choice.as_named else sorted(found, key=self.operations)

    def recorded(self) -> list[RunSpec]:
        """The wanted runs that have a record, in the order of params.yaml."""
        return [spec for spec in self._wanted() if self.ledger.store.record(spec) is not None]

    def _wanted(self) -> Iterator[RunSpec]:
        for setting in self.choice.settings:
            if TEACHER in self._stages and not self.choice.rows:
                yield from self._of_seeds(self.ledger.planner.teachers(setting))
            rows = self._rows(setting)
            for name in self.choice.rows or [row for _, row in rows]:
                for stage in (stage for stage, row in rows if row == name):
                    yield from self.ledger.planner.tuning(setting, stage, name)
                    yield from self._of_seeds(self.ledger.final(setting, stage, name))

    def _of_seeds(self, specs: Sequence[RunSpec]) -> list[RunSpec]:
        return [spec for spec in specs if not self.choice.seeds or spec.seed in self.choice.seeds]

    def operations(self, spec: RunSpec) -> float:
        """How many floating-point operations a run takes at most, roughly: networks forward and back, and teachers."""
        card = self._card(spec.dataset)
        shape = (card["channels"], *card["image_size"])
        trained = [_operations(name, len(card["class_names"]), shape)[1] for name in (spec.network, *spec.partners)]
        asked = spec.teachers if SCHEMES[spec.scheme_name].needs_teacher else ()
        answered = [_operations(teacher.network, len(card["class_names"]), shape)[0] for teacher in asked]
        return spec.epochs * spec.images * (card["train"] - spec.held_out) * (sum(trained) + sum(answered))

    def left(self) -> pd.DataFrame:
        """What is still to be made, one row per setting and stage: runs, epochs, and hours where they can be foretold.

        Teachers that are needed for it are among them, final runs behind unfinished grids are not. Hours are for one
        device like that of the newest records, at the speed at which those were made.
        """
        rate = self._rate()
        rows = [
            {
                "setting": spec.setting,
                "stage": spec.stage,
                "runs": 1,
                "epochs": spec.epochs,
                "hours": self.operations(spec) / rate / 3600 if rate else float("nan"),
            }
            for spec in lacking(self.missing(), self.ledger.store)
        ]
        table = pd.DataFrame(rows, columns=["setting", "stage", "runs", "epochs", "hours"])
        return table.groupby(["setting", "stage"], sort=False).sum(min_count=1).reset_index()

    def _rate(self) -> float | None:
        """Operations per second of the wanted runs that are on record, on the device of the newest; None without."""
        pairs = [(spec, self.ledger.store.record(spec)) for spec in self.recorded()]
        made = [(spec, record) for spec, record in pairs if record["seconds"] > 0]
        if not made:
            return None
        device = max(made, key=lambda pair: pair[1]["finished"])[1]["device"]
        return median(self.operations(spec) / record["seconds"] for spec, record in made if record["device"] == device)


@cache
def _operations(network: str, classes: int, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Of one image: to answer, and to be trained on. A network of few bits counts as the one that it is made of."""
    with torch.device("meta"):
        plain = re.sub(r"_int\d$", "", network)
        module = build_model(plain, classes=classes, channels=shape[0], image_size=shape[1:])
    work = count_work(module, shape)
    return sum(kernel.flops for kernel in work.answering), sum(kernel.flops for kernel in work.training)
