"""Trains the runs that a stage lacks, each in full or from its checkpoint, and publishes their records."""

import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache, cached_property, partial
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from kdstudy.checkpoint import load_weights, save_weights
from kdstudy.data import BlankBank, ImageBank
from kdstudy.device import DataOnDevice, choose_device, data_path
from kdstudy.evaluate import logits_of, score
from kdstudy.image_set import read_card, read_image_set
from kdstudy.models import Ensemble, count_parameters
from kdstudy.params import PARAMS_FILE, load_params, look_up
from kdstudy.results import Ledger
from kdstudy.schemes import Scheme, sample_batch
from kdstudy.store import Record, Store
from kdstudy.study import SCHEMES, Planner, RunSpec, check_methods
from kdstudy.train import Diverged, Stopped, Surroundings, Training
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

    `device` is "auto", "cpu", "cuda" or "cuda:N"; by default the profile's.
    """

    def __init__(
        self,
        ledger: Ledger,
        setting: str,
        *,
        report: Callable[[float, float, str], None] = lambda done, total, text: None,
        should_stop: Callable[[], bool] = lambda: False,
        device: str | None = None,
    ):
        self.ledger, self.store, self.setting = ledger, ledger.store, setting
        params = ledger.planner.params
        self._profile = params.profiles[ledger.planner.setting(setting).profile]
        self._report, self._should_stop = report, should_stop
        self._wanted_device = device or self._profile.device

    @cached_property
    def device(self) -> torch.device:
        """Where runs are made."""
        if self._profile.threads:
            torch.set_num_threads(self._profile.threads)
        torch.backends.cudnn.benchmark = True
        return choose_device(self._wanted_device)

    @cached_property
    def _data(self) -> DataOnDevice:
        dataset = self.ledger.planner.setting(self.setting).dataset
        return DataOnDevice(read_image_set(data_path(dataset)), self.device)

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
                test = self._data.watched(0, runs[0].recipe)["test"]
                together = Ensemble([self._teacher(spec) for spec in runs])
                self.store.publish_ensemble(runs, self._accuracy(logits_of(together, test), test))

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
            self._data.check(network)  # the last one's misspelt name is told before the first one is trained
        workers = min(len(missing) // 2, self._profile.workers or cores())  # a worker's start costs about a run
        if workers > 1 and self.device.type == "cpu":
            self._complete_side_by_side(missing, workers)
            return
        total = sum(spec.epochs for spec in missing)
        done = 0
        for spec in missing:
            self.make(spec, partial(self._tell, spec, done, total))
            done += spec.epochs

    def _complete_side_by_side(self, missing: Sequence[RunSpec], workers: int) -> None:
        total = sum(spec.epochs for spec in missing)
        done = dict.fromkeys((spec.id for spec in missing), 0.0)
        shared = (self.ledger, self.setting, str(self.device))

        def tell(spec: RunSpec, epochs: float, text: str) -> None:
            done[spec.id] = epochs
            self._report(sum(done.values()), total, f"{spec} {text}")

        # a student's teachers come before it
        groups = [list(group) for _, group in groupby(missing, key=lambda spec: spec.depth)]
        # torch.optim imports the preloaded module when it is first used
        options = {"tell": tell, "should_stop": self._should_stop, "preload": ("torch._dynamo",)}
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

    def _tell(self, spec: RunSpec, done: float, total: float, epochs: float, text: str) -> None:
        self._report(done + epochs, total, f"{spec} {text}")

    def make(self, spec: RunSpec, on_step: Callable[[float, str], None] = lambda epochs, text: None) -> Record:
        """Train one run, from its checkpoint if it has one; keep record and weights. Diverged runs have one too."""
        with self.store.lock(spec.id):
            finished = self.store.record(spec)
            if finished is not None and (finished["status"] == "diverged" or self.store.weights(spec.id).exists()):
                return finished  # perhaps by another process, while this one waited
            surroundings = Surroundings(
                checkpoint=self.store.checkpoint(spec.id), on_step=on_step, should_stop=self._should_stop
            )
            return self._make(spec, surroundings)

    def _make(self, spec: RunSpec, surroundings: Surroundings) -> Record:
        started = _now()
        bank = self._bank(spec)
        scheme = self._scheme(spec, bank)
        watch = self._data.watched(spec.held_out, spec.recipe)
        training = Training(scheme, spec.recipe, bank, seed=spec.seed, watch=watch, surroundings=surroundings)
        record = _describe(spec, scheme, self.device, started)
        try:
            history = training.run()
            scores = self._scores(scheme.deployed, watch, spec)
            further = {name: self._test_accuracy(network, watch) for name, network in scheme.further().items()}
            if not all(map(math.isfinite, scores.values())):  # the very last step can do that
                raise Diverged("the trained network's scores are not finite", history)
        except Diverged as diverged:
            record |= {"status": "diverged", "scores": {}, "further": {}, "history": _without_nan(diverged.history)}
        else:
            record |= {"status": "finished", "scores": scores, "further": further, "history": history}
            save_weights(scheme.deployed, self.store.weights(spec.id))
        record["network_epochs"] = _network_epochs(scheme, record["history"])
        record |= {"seconds": round(training.seconds, 1), "finished": _now()}
        self.store.write_record(record)
        return record

    def _bank(self, spec: RunSpec) -> ImageBank | BlankBank:
        """What a run is trained on."""
        data_free = SCHEMES[spec.scheme_name].data_free
        return (self._data.blank if data_free else self._data.training)(spec.held_out, spec.recipe, spec.images)

    def _scheme(self, spec: RunSpec, bank: ImageBank | BlankBank) -> Scheme:
        wanted = spec.teachers if SCHEMES[spec.scheme_name].needs_teacher else ()
        teachers = [self._teacher(teacher) for teacher in wanted]
        build = partial(self._data.build, recipe=spec.recipe)
        return spec.assemble(build, teachers, sample_batch(bank, spec.recipe.batch))

    def _teacher(self, spec: RunSpec) -> nn.Module:
        """The trained teacher. Where its weights are absent it is trained, even if its record is known."""
        if not self.store.weights(spec.id).exists() and self.make(spec)["status"] == "diverged":
            raise ValueError(f"the teacher {spec} ({spec.id}) has diverged: no student can be trained by it")
        network = self._data.build(spec.network, spec.recipe)
        load_weights(network, self.store.weights(spec.id))
        return network

    def _scores(self, network: nn.Module, watch: Mapping[str, ImageBank], spec: RunSpec) -> dict[str, float]:
        teacher_logits = self._teacher_logits(spec.teacher) if spec.teacher else None
        test = score(logits_of(network, watch["test"]), watch["test"].labels, teacher_logits)
        scores = {"test_accuracy": test.accuracy, "nll": test.nll, "ece": test.ece}
        if spec.teacher:
            scores |= {"agreement": test.agreement, "teacher_accuracy": self._accuracy(teacher_logits, watch["test"])}
        if "held_out" in watch:
            scores["val_accuracy"] = self._accuracy(logits_of(network, watch["held_out"]), watch["held_out"])
        return {name: round(value, 6) for name, value in scores.items()}

    def _test_accuracy(self, network: nn.Module, watch: Mapping[str, ImageBank]) -> float:
        return round(self._accuracy(logits_of(network, watch["test"]), watch["test"]), 6)

    @cache  # noqa: B019 - an executor lives as long as its stage
    def _teacher_logits(self, spec: RunSpec) -> Tensor:
        return logits_of(self._teacher(spec), self._data.watched(0, spec.recipe)["test"])

    def _accuracy(self, logits: Tensor, bank: ImageBank) -> float:
        return score(logits, bank.labels).accuracy


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
    shared: tuple[Ledger, str, str],
    spec: RunSpec,
    tell: Callable[[float, str], None],
    should_stop: Callable[[], bool],
) -> None:
    ledger, setting, device = shared
    if should_stop():
        raise Stopped
    key = (setting, device)
    if key not in _executors:
        _executors[key] = Executor(ledger, setting, should_stop=should_stop, device=device)
    _executors[key].make(spec, tell)


def _describe(spec: RunSpec, scheme: Scheme, device: torch.device, started: str) -> Record:
    return {
        "run": spec.id,
        "dataset": spec.dataset,
        "data_checksum": spec.data_checksum,
        "held_out": spec.held_out,
        "network": spec.network,
        "method": spec.method,
        "hyperparameters": asdict(spec.build_method()),
        "recipe": asdict(spec.recipe),
        "seed": spec.seed,
        "images": spec.images,
        "teacher_run": spec.teacher.id if spec.teacher else None,
        "co_teacher_runs": [teacher.id for teacher in spec.co_teachers],
        "scheme": spec.scheme_name,
        "scheme_options": asdict(spec.build_options()),
        "partners": list(spec.partners),
        "deployed": scheme.role,
        "student_parameters": count_parameters(scheme.deployed),
        "trained_parameters": _trained_parameters(scheme),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "started": started,
    }


def _trained_parameters(scheme: Scheme) -> dict[str, int]:
    """How many numbers of each network, and of the adapters, training changes."""
    names = [name for phase in scheme.phases() for name in phase.trains]
    counts, counted = {}, set()
    for network in [*scheme.trained_networks(names), "adapters"]:
        own = set(scheme.trained_parameters([network])) - counted  # of what networks share, the first one has it
        counted |= own
        counts[network] = sum(map(torch.numel, own))
    return {network: count for network, count in counts.items() if count}


def _network_epochs(scheme: Scheme, history: Sequence[Mapping]) -> int:
    """How many epochs of one network a run took, forward and back, over all phases and networks that it trained."""
    passes = {phase.name: scheme.passes(phase) for phase in scheme.phases()}
    return sum(passes[epoch["phase"]] for epoch in history)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _without_nan(history: list[dict]) -> list[dict]:
    def cleaned(value):
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return [{name: cleaned(value) for name, value in epoch.items()} for epoch in history]


@cache
def commit() -> str:
    """The commit of the code that runs, with "+" if the tree has changes; KDSTUDY_COMMIT where there is no git."""
    try:
        head = _git("rev-parse", "HEAD")[:12]
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "kdstudy", "params.yaml")
        return head + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("KDSTUDY_COMMIT", "unknown")


def _git(*arguments: str) -> str:
    here = Path(__file__).parent.parent
    return subprocess.run(["git", *arguments], cwd=here, check=True, capture_output=True, text=True).stdout.strip()
