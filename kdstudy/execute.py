"""Finds the runs that a stage lacks, has them made in an order that serves, and publishes their records."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Protocol

import torch

from kdstudy.device import DataOnDevice, choose_devices, data_path, make_ready
from kdstudy.evaluate import logits_of
from kdstudy.image_set import read_card, read_image_set
from kdstudy.make import Maker, OnStep, accuracy, table_of
from kdstudy.models import Ensemble
from kdstudy.params import PARAMS_FILE, load_params, look_up
from kdstudy.results import Ledger, above
from kdstudy.stopping import ShouldStop, Stopped, StopRequest
from kdstudy.store import Store
from kdstudy.study import SCHEMES, Planner, RunSpec, check_methods
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


Cohort = tuple[RunSpec, ...]
Report = Callable[[float, float, str], None]


@dataclass(frozen=True)
class Order:
    """What whoever makes cohorts of a setting must know, wherever it is done."""

    ledger: Ledger
    setting: str
    deterministic: bool
    teaching: Mapping[tuple[str, str], int]  # `make.Maker.teaching`


class Spread(Protocol):
    """Has cohorts made elsewhere, as many at a time as it has `seats`."""

    seats: int

    def __call__(self, order: Order, groups: Sequence[Sequence[Cohort]], tell: OnStep, should_stop: ShouldStop) -> None:
        """Have them made, a group when the one before is done. Their records are in the ledger's store afterwards."""


class Executor:
    """Makes the runs of one setting. `report(done, total, text)` is told how far it is, in epochs.

    `device` is "auto", "cpu", "cuda" or "cuda:N", or several with commas, by default the profile's. Cohorts are spread
    over all devices that it names, or, if there is a `spread`, by that. `profile_into` names a folder for a profile of
    the first steps that are taken; runs are then made in this process. `deterministic` asks for results that repeat to
    the bit, even if the profile does not. Without `should_stop` work stops at an interrupt or SIGTERM.
    """

    def __init__(
        self,
        ledger: Ledger,
        setting: str,
        *,
        report: Report = lambda done, total, text: None,
        should_stop: ShouldStop | None = None,
        device: str | torch.device | None = None,
        profile_into: Path | None = None,
        deterministic: bool = False,
        spread: Spread | None = None,
    ):
        self.ledger, self.store, self.setting = ledger, ledger.store, setting
        params = ledger.planner.params
        self._profile = params.profiles[ledger.planner.setting(setting).profile]
        self._report = report
        self._request = StopRequest()
        self._should_stop = should_stop or self._request
        self._wanted_device = device or self._profile.device
        self._profile_into, self._spread = profile_into, spread
        self._deterministic = deterministic or self._profile.deterministic

    @cached_property
    def devices(self) -> list[torch.device]:
        """All on which runs may be made."""
        named = self._wanted_device
        return [named] if isinstance(named, torch.device) else choose_devices(named)

    @cached_property
    def device(self) -> torch.device:
        """Where runs are made by this process."""
        if self._profile.threads:
            torch.set_num_threads(self._profile.threads)
        make_ready(self._deterministic)
        device = self.devices[0]
        if device.type == "cuda":
            torch.cuda.set_device(device)  # for whatever asks for the current one: graphs, streams, compiled code
        return device

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
        """Train whatever the stage lacks, cells of grids before final runs, and publish all of its records.

        Raises Stopped when it is asked to stop; what is not yet finished goes on from its checkpoints.
        """
        # whoever has a say in when to stop listens to signals, too
        with self._request.listening() if self._should_stop is self._request else nullcontext():
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
        return [*only_teaching(cells + final).values(), *cells, *final]

    def complete(self, specs: Iterable[RunSpec]) -> None:
        """Train those of the runs that have no record, in order, and first the teachers whose weights they need.

        Raises Stopped if asked to stop in between.
        """
        missing = lacking(specs, self.store)
        for network in dict.fromkeys(spec.network for spec in missing):
            self.data.check(network)  # the last one's misspelt name is told before the first one is trained
        seats = self._seats(len(missing))
        least = self._spread.seats if self._spread else len(seats)
        together = cohorts(missing, self._profile.cohort, least, tables_apart=self._profile.logit_table)
        done = dict.fromkeys((spec.id for spec in missing), 0.0)
        total = sum(spec.epochs for spec in missing)

        def tell(spec: RunSpec, epochs: float, text: str) -> None:
            done[spec.id] = epochs
            self._report(sum(done.values()), total, f"{spec} {text}")

        order = Order(self.ledger, self.setting, self._deterministic, _epochs_taught(together))
        # a student's teachers come before it
        groups = [list(group) for _, group in groupby(together, key=lambda cohort: cohort[0].depth)]
        if self._spread and missing:
            self._spread(order, groups, tell, self._should_stop)
        elif len(seats) > 1:
            _make_side_by_side(order, groups, seats, tell, self._should_stop)
        else:
            self._make_here(order, together, tell)

    def _seats(self, missing: int) -> list[torch.device]:
        """A device for each process that makes runs; one stands for this process itself."""
        if self._profile_into:
            return self.devices[:1]
        if len(self.devices) == 1 and self.devices[0].type == "cpu":
            workers = min(missing // 2, self._profile.workers or cores())  # a worker's start costs about a run
            return self.devices * max(workers, 1)
        return self.devices[: max(missing, 1)]

    def _make_here(self, order: Order, together: Sequence[Cohort], tell: OnStep) -> None:
        self.maker.teaching = order.teaching
        for cohort in together:
            if self._should_stop():
                raise Stopped
            if cohort[0].depth == together[-1][0].depth:  # not that of a teacher, if there are students
                self.maker.profile_into, self._profile_into = self._profile_into, None
            self.maker.make(cohort, tell)


def lacking(specs: Iterable[RunSpec], store: Store) -> list[RunSpec]:
    """Those without a record, behind all teachers whose weights they need and that have none."""
    found: dict[str, RunSpec] = {}

    def add(spec: RunSpec) -> None:
        for teacher in spec.teachers:
            if not store.weights(teacher.id).exists():
                add(teacher)
        found.setdefault(spec.id, spec)

    for spec in specs:
        if store.record(spec) is None:
            add(spec)
    return sorted(found.values(), key=lambda spec: spec.depth)


def only_teaching(specs: Iterable[RunSpec]) -> dict[str, RunSpec]:
    """The runs that only teach, above these, by id."""
    return {teacher.id: teacher for spec in specs for teacher in above(spec) if teacher.purpose == "teaching"}


def _make_side_by_side(
    order: Order,
    groups: Sequence[Sequence[Cohort]],
    seats: Sequence[torch.device],
    tell: OnStep,
    should_stop: ShouldStop,
) -> None:
    side_by_side(
        _make_in_worker,
        order,
        groups,
        [str(device) for device in seats],
        tell=lambda cohort, news, text: tell(cohort[news[0]], news[1], text),
        should_stop=should_stop,
        preload=("torch._dynamo",),  # torch.optim imports it when it is first used
    )


def _make_in_worker(
    order: Order, seat: str, cohort: Cohort, tell: Callable[[tuple[int, float], str], None], should_stop: ShouldStop
) -> None:
    numbers = {spec.id: number for number, spec in enumerate(cohort)}
    make_cohort(order, seat, cohort, lambda spec, epochs, text: tell((numbers[spec.id], epochs), text), should_stop)


_executors: dict[tuple[str, str], Executor] = {}  # of a worker process: the data is read once


def make_cohort(order: Order, device: str, cohort: Cohort, tell: OnStep, should_stop: ShouldStop) -> None:
    """Make a cohort in this process, which does so for one order only, on a device by its name. Raises Stopped."""
    if should_stop():
        raise Stopped
    key = (order.setting, device)
    if key not in _executors:
        _executors[key] = Executor(
            order.ledger,
            order.setting,
            should_stop=should_stop,
            device=torch.device(device),
            deterministic=order.deterministic,
        )
    maker = _executors[key].maker
    maker.teaching = order.teaching
    maker.make(cohort, tell)


def cohorts(specs: Iterable[RunSpec], most: int, least: int = 1, *, tables_apart: bool = False) -> list[Cohort]:
    """The runs in groups that share batches and teacher, at most `most` in each; of each depth `least` groups or more,
    if it can be.

    Groups are as even as can be, and come in the order of their first runs. With `tables_apart` runs that a table of
    logits could serve are not put beside others, for which the teacher must run.
    """
    alike: dict[tuple, list[RunSpec]] = {}
    for spec in specs:
        table = table_of([spec]) if tables_apart else None
        alike.setdefault((_shared(spec), table), []).append(spec)
    depths = {group[0].depth for group in alike.values()}
    limits = {
        depth: _limit([group for group in alike.values() if group[0].depth == depth], most, least) for depth in depths
    }
    return [tuple(part) for group in alike.values() for part in even_parts(group, limits[group[0].depth])]


def _limit(groups: Sequence[Sequence[RunSpec]], most: int, least: int) -> int:
    """The largest size, up to `most`, of parts of these groups of which there are at least so many, or 1."""
    while most > 1 and sum(-(-len(group) // most) for group in groups) < least:
        most -= 1
    return most


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
