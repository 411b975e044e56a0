"""Finds the runs that a stage lacks, has them made in an order that serves, and publishes their records."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path

import torch

from kdstudy.device import DataOnDevice, choose_device, data_path, make_ready
from kdstudy.evaluate import logits_of
from kdstudy.image_set import read_card, read_image_set
from kdstudy.make import Maker, OnStep, accuracy, table_of
from kdstudy.models import Ensemble
from kdstudy.params import PARAMS_FILE, load_params, look_up
from kdstudy.results import Ledger
from kdstudy.store import Store
from kdstudy.study import SCHEMES, Planner, RunSpec, check_methods
from kdstudy.train import Stopped
from kdstudy.ways import even_parts
from kdstudy.workers import cores, side_by_side


def open_ledger(overrides: Sequence[str] = (), store: Store | None = None) -> Ledger:
    """The study of params.yaml in the current folder, and what its store holds.

    A data set that has not been made here goes by the checksum in the published records, so that tables can be made
    without it; where there are none of those either, its runs are unknown, and training asks for the data.
    Raises ValueError or FileNotFoundError with what is wrong or missing.
    """
    params = load_params(PARAMS_FILE, overrides)
    check_methods(params)
    store = store or Store()
    return Ledger(Planner(params, {name: _checksum(name, store) for name in params.datasets}), store)


def _checksum(dataset: str, store: Store) -> str:
    if data_path(dataset).exists():
        return read_card(data_path(dataset))["checksum"]
    return store.published_checksum(dataset) or "not made"


class Executor:
    """Makes the runs of one setting. `report(done, total, text)` is told how far it is, in epochs.

    `device` is "auto", "cpu", "cuda" or "cuda:N"; by default the profile's. `profile_into` names a folder for a profile
    of the first steps that are taken; runs are then made in this process. `deterministic` asks for results that repeat
    to the bit, even if the profile does not.
    """

    def __init__(
        self,
        ledger: Ledger,
        setting: str,
        *,
        report: Callable[[float, float, str], None] = lambda done, total, text: None,
        should_stop: Callable[[], bool] = lambda: False,
        device: str | None = None,
        profile_into: Path | None = None,
        deterministic: bool = False,
    ):
        self.ledger, self.store, self.setting = ledger, ledger.store, setting
        params = ledger.planner.params
        self._profile = params.profiles[ledger.planner.setting(setting).profile]
        self._report, self._should_stop = report, should_stop
        self._wanted_device = device or self._profile.device
        self._profile_into, self._deterministic = profile_into, deterministic

    @cached_property
    def device(self) -> torch.device:
        """Where runs are made."""
        if self._profile.threads:
            torch.set_num_threads(self._profile.threads)
        make_ready(self._deterministic or self._profile.deterministic)
        return choose_device(self._wanted_device)

    @cached_property
    def data(self) -> DataOnDevice:
        """The setting's images."""
        dataset = self.ledger.planner.setting(self.setting).dataset
        return DataOnDevice(read_image_set(data_path(dataset)), self.device)

    @cached_property
    def maker(self) -> Maker:
        """What makes the runs in this process."""
        return Maker(self.store, self.data, self._profile, self._should_stop)

    def run_stage(self, stage: str) -> list[RunSpec]:
        """Train whatever the stage lacks, cells of grids before final runs, and publish all of its records."""
        specs = self.make_chosen(stage)
        self.store.publish(self.ledger.planner.setting(self.setting).profile, stage, self.setting, specs)
        if self.ledger.planner.setting(self.setting).ensembles:
            self._publish_ensembles(spec for spec in specs if spec.purpose == "final")
        return specs

    def _publish_ensembles(self, specs: Iterable[RunSpec]) -> None:
        """Score the final runs of every row together, where their weights are here."""
        for _, group in groupby(sorted(specs, key=lambda spec: spec.row), key=lambda spec: spec.row):
            runs = sorted(group, key=lambda spec: spec.seed)
            if all(self.store.weights(spec.id).exists() for spec in runs):
                test = self.data.watched(0, runs[0].recipe)["test"]
                together = Ensemble([self.maker.teacher(spec) for spec in runs])
                self.store.publish_ensemble(runs, accuracy(logits_of(together, test), test))

    def make_chosen(
        self, stage: str, rows: Sequence[str] | None = None, seeds: Sequence[int] | None = None
    ) -> list[RunSpec]:
        """Train whatever the stage lacks of these rows and seeds (None: all), cells of grids before final runs."""
        planner = self.ledger.planner
        if stage == "teacher":
            specs = [spec for spec in planner.teachers(self.setting) if seeds is None or spec.seed in seeds]
            self.complete(specs)
            return specs
        known = planner.rows(self.setting, stage)
        for row in rows or ():
            look_up(f"row of {self.setting} {stage}:", row, dict.fromkeys(known))
        rows = rows or known
        cells = [spec for row in rows for spec in planner.tuning(self.setting, stage, row)]
        self.complete(cells)
        final = [spec for row in rows for spec in self.ledger.final(self.setting, stage, row)]
        final = [spec for spec in final if seeds is None or spec.seed in seeds]
        self.complete(final)
        return [*_teaching(cells + final).values(), *cells, *final]

    def complete(self, specs: Iterable[RunSpec]) -> None:
        """Train those of the runs that have no record, in order, and first the teachers whose weights they need.

        Raises Stopped if asked to stop in between.
        """
        missing = self._missing(specs)
        for network in dict.fromkeys(spec.network for spec in missing):
            self.data.check(network)  # the last one's misspelt name is told before the first one is trained
        workers = min(len(missing) // 2, self._profile.workers or cores())  # a worker's start costs about a run
        side = workers > 1 and self.device.type == "cpu" and not self._profile_into
        least = workers if side else 1
        together = cohorts(missing, self._profile.cohort, least, tables_apart=self._profile.logit_table)
        done = dict.fromkeys((spec.id for spec in missing), 0.0)
        total = sum(spec.epochs for spec in missing)

        def tell(spec: RunSpec, epochs: float, text: str) -> None:
            done[spec.id] = epochs
            self._report(sum(done.values()), total, f"{spec} {text}")

        if side:
            self._complete_side_by_side(together, workers, tell)
            return
        self.maker.teaching = _epochs_taught(together)
        for cohort in together:
            if cohort[0].depth == together[-1][0].depth:  # not that of a teacher, if there are students
                self.maker.profile_into, self._profile_into = self._profile_into, None
            self.maker.make(cohort, tell)

    def _complete_side_by_side(self, together: Sequence[Sequence[RunSpec]], workers: int, tell: OnStep) -> None:
        shared = (self.ledger, self.setting, str(self.device), _epochs_taught(together))
        # a student's teachers come before it
        groups = [list(group) for _, group in groupby(together, key=lambda cohort: cohort[0].depth)]
        options = {
            "tell": lambda cohort, news, text: tell(cohort[int(news[0])], news[1], text),
            "should_stop": self._should_stop,
            "preload": ("torch._dynamo",),  # torch.optim imports it when it is first used
        }
        side_by_side(_make_in_worker, shared, groups, workers, **options)

    def _missing(self, specs: Iterable[RunSpec]) -> list[RunSpec]:
        """Those without a record, behind all teachers whose weights they need and that have none."""
        found: dict[str, RunSpec] = {}

        def add(spec: RunSpec) -> None:
            for teacher in spec.teachers:
                if not self.store.weights(teacher.id).exists():
                    add(teacher)
            found.setdefault(spec.id, spec)

        for spec in specs:
            if self.store.record(spec) is None:
                add(spec)
        return sorted(found.values(), key=lambda spec: spec.depth)


def _teaching(specs: Iterable[RunSpec]) -> dict[str, RunSpec]:
    """The runs that only teach, above these, by id."""
    found: dict[str, RunSpec] = {}
    for spec in specs:
        for teacher in spec.teachers:
            found |= _teaching([teacher])
            if teacher.purpose == "teaching":
                found[teacher.id] = teacher
    return found


_executors: dict[tuple[str, str], Executor] = {}  # of a worker process: the data is read once


def _make_in_worker(
    shared: tuple[Ledger, str, str, Mapping[tuple[str, str], int]],
    cohort: Sequence[RunSpec],
    tell: Callable[[tuple[int, float], str], None],
    should_stop: Callable[[], bool],
) -> None:
    ledger, setting, device, teaching = shared
    if should_stop():
        raise Stopped
    key = (setting, device)
    if key not in _executors:
        _executors[key] = Executor(ledger, setting, should_stop=should_stop, device=device)
    maker, numbers = _executors[key].maker, {spec.id: number for number, spec in enumerate(cohort)}
    maker.teaching = teaching
    maker.make(cohort, lambda spec, epochs, text: tell((numbers[spec.id], epochs), text))


def cohorts(
    specs: Iterable[RunSpec], most: int, least: int = 1, *, tables_apart: bool = False
) -> list[tuple[RunSpec, ...]]:
    """The runs in groups that share batches and teacher, at most `most` in each; `least` groups or more, if it can be.

    Groups are as even as can be, and come in the order of their first runs. With `tables_apart` runs that a table of
    logits could serve are not put beside others, for which the teacher must run.
    """
    alike: dict[tuple, list[RunSpec]] = {}
    for spec in specs:
        table = table_of([spec]) if tables_apart else None
        alike.setdefault((_shared(spec), table), []).append(spec)
    while most > 1 and sum(-(-len(group) // most) for group in alike.values()) < least:
        most -= 1
    return [tuple(part) for group in alike.values() for part in even_parts(group, most)]


def _shared(spec: RunSpec) -> tuple:
    """What runs have in common that can be trained together."""
    scheme = SCHEMES[spec.scheme_name]
    if scheme.family not in ("none", "offline", "self"):
        return (spec.depth, spec.id)  # their networks are a cohort already
    teachers = tuple(teacher.id for teacher in spec.teachers) if scheme.needs_teacher else ()
    return (spec.depth, spec.held_out, spec.images, spec.recipe, spec.seed, spec.network, teachers)


def _epochs_taught(together: Iterable[Sequence[RunSpec]]) -> dict[tuple[str, str], int]:
    """How many epochs of cohorts each table of logits could serve, by `make.table_of`."""
    epochs: dict[tuple[str, str], int] = {}
    for cohort in together:
        if table := table_of(cohort):
            epochs[table] = epochs.get(table, 0) + max(spec.epochs for spec in cohort)
    return epochs
