"""Makes runs, several at a time: builds, trains, scores them, and keeps records and weights."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from kdstudy import logit_table
from kdstudy.breakdown import Profile as StepProfile
from kdstudy.checkpoint import BadFile, file_checksum, load_weights, save_weights
from kdstudy.cohort import Cohort
from kdstudy.data import BlankBank, ImageBank
from kdstudy.device import DataOnDevice
from kdstudy.engine import Choices, Engine
from kdstudy.evaluate import logits_of, score
from kdstudy.logit_table import LogitTable
from kdstudy.memory import OutOfMemory, free_bytes, is_out_of_memory, release
from kdstudy.models import count_parameters
from kdstudy.params import Profile
from kdstudy.provenance import now, session
from kdstudy.records import Record
from kdstudy.schemes import Offline, Scheme, sample_batch
from kdstudy.stopping import ShouldStop, Stopped
from kdstudy.store import Store
from kdstudy.study import METHODS, SCHEMES, RunSpec
from kdstudy.train import HALF, REVISION, Diverged, Surroundings, Training
from kdstudy.ways import even_parts

OnStep = Callable[[RunSpec, float, str], None]


class Maker:
    """Makes the runs of one data set on one device, in the way that a profile says.

    `teaching` maps tables of teachers' logits, as `table_of` names them, to the epochs of cohorts that each could
    serve: whether one pays depends on it. Into the folder `profile_into`, if one is named, a profile of the next
    cohort is written.
    """

    def __init__(
        self,
        store: Store,
        data: DataOnDevice,
        profile: Profile,
        should_stop: ShouldStop,
    ):
        self.store, self.data, self.device = store, data, data.device
        self._profile, self._should_stop = profile, should_stop
        self.teaching: Mapping[tuple[str, str], int] = {}
        self.profile_into: Path | None = None
        self._last_table: dict[Path, LogitTable] = {}
        # on a CPU compiled students are no faster, and compiling, which nothing can stop, takes half a minute
        compiles = profile.compiles and data.device.type == "cuda"
        self._engine = Engine(profile.way, profile.graphs, compiles, Choices(store.root.parent / "ways.json"))
        self._teacher_logits = cache(self._teacher_logits)

    def make(self, specs: Sequence[RunSpec], on_step: OnStep = lambda spec, epochs, text: None) -> list[Record]:
        """Train runs together, each from its checkpoint if it has one; keep records and weights.

        Runs that are finished are left as they are; those that diverge have a record, too. Where memory does not
        suffice for all of them together, halves are made one after the other. Raises Stopped, and OutOfMemory if one
        does not fit by itself.
        """
        with ExitStack() as locks:
            for run in sorted(spec.id for spec in specs):  # in one order, so that no two processes wait for each other
                locks.enter_context(self.store.lock(run))
            self._make(specs, on_step)
        return [self.store.record(spec) for spec in specs]

    def _make(self, specs: Sequence[RunSpec], on_step: OnStep) -> None:
        missing = [spec for spec in specs if not self.store.is_made(spec)]  # another process may have made some
        if not missing:
            return
        problem = self._try_to_train(missing, on_step)
        if not problem:
            return
        release(self.device)
        if len(missing) == 1:
            raise OutOfMemory(
                f"{missing[0]} ran out of memory ({problem:.200}). Free some, or make it smaller: its recipe's batch, "
                "the profile's workers, logit_table: false; it goes on from its last checkpoint"
            )
        warnings.warn(f"{len(missing)} runs together ran out of memory, now half as many at a time", stacklevel=3)
        for part in even_parts(missing, -(-len(missing) // 2)):
            self._make(part, on_step)

    def _try_to_train(self, specs: Sequence[RunSpec], on_step: OnStep) -> str:
        """Train; what was said if memory did not suffice, else "". The error itself would keep what it ran out of."""
        try:
            self._train(specs, on_step)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return str(error).partition("\n")[0] or type(error).__name__
        return ""

    def _train(self, specs: Sequence[RunSpec], on_step: OnStep) -> None:
        teacher = cache(self.teacher)  # one network for all that it teaches
        trainings = {self._training(spec, teacher, on_step): spec for spec in specs}
        table = self._table(specs, trainings)

        def keep(training: Training, diverged: Diverged | None) -> None:
            spec = trainings[training]
            made_by = training.made_by | {"logit_table": bool(table)}
            record = _describe(spec, training) | {"engine": made_by}
            self._keep(spec, training, diverged, record)

        cohort = Cohort(list(trainings), self._engine, table, keep)
        if not self.profile_into:
            cohort.run()
            return
        folder, self.profile_into = self.profile_into, None
        subject = f"{specs[0].network}, {len(specs)} at once: {', '.join(map(str, specs))}"
        with StepProfile(folder, self.device, subject=subject) as profile:
            for _ in cohort.steps():
                profile.step()

    def _training(self, spec: RunSpec, teacher: Callable[[RunSpec], nn.Module], on_step: OnStep) -> Training:
        bank = self._bank(spec)
        self.store.take_up_checkpoint(spec.id)
        return Training(
            self._scheme(spec, bank, teacher),
            spec.recipe,
            bank,
            seed=spec.seed,
            watch=self.data.watched(spec.held_out, spec.recipe),
            surroundings=Surroundings(
                checkpoint=self.store.checkpoint(spec.id),
                checkpoint_seconds=self._profile.checkpoint_seconds,
                on_step=partial(on_step, spec),
                should_stop=self._should_stop,
                run=spec.id,
                session=session(self.device),
            ),
            capturable=self._profile.graphs and self.device.type == "cuda",
        )

    def _keep(self, spec: RunSpec, training: Training, diverged: Diverged | None, record: Record) -> None:
        scheme, history = training.scheme, training.history
        scores, further = {}, {}
        if not diverged:
            scores = self._scores(scheme.deployed, spec)
            further = {name: self._test_accuracy(network, spec) for name, network in scheme.further().items()}
        if diverged or not all(map(math.isfinite, scores.values())):  # the very last step can do that
            record |= {"status": "diverged", "scores": {}, "further": {}, "history": _without_nan(history)}
            record["weights_sha256"] = None
        else:
            record |= {"status": "finished", "scores": scores, "further": further, "history": history}
            weights = self.store.own.weights(spec.id)
            save_weights(scheme.deployed, weights)
            record["weights_sha256"] = file_checksum(weights)
        record["network_epochs"] = _network_epochs(scheme, history)
        self.store.write_record(record | {"seconds": round(training.seconds, 1), "finished": now()})

    def _bank(self, spec: RunSpec) -> ImageBank | BlankBank:
        """What a run is trained on."""
        data_free = SCHEMES[spec.scheme_name].data_free
        return (self.data.blank if data_free else self.data.training)(spec.held_out, spec.recipe, spec.images)

    def _scheme(self, spec: RunSpec, bank: ImageBank | BlankBank, teacher: Callable[[RunSpec], nn.Module]) -> Scheme:
        wanted = spec.teachers if SCHEMES[spec.scheme_name].needs_teacher else ()
        teachers = [teacher(each) for each in wanted]
        build = partial(self.data.build, recipe=spec.recipe)
        return spec.assemble(build, teachers, sample_batch(bank, spec.recipe.batch))

    def teacher(self, spec: RunSpec) -> nn.Module:
        """The trained teacher. Where its weights are absent it is trained, even if its record is known.

        Raises ValueError if it has diverged, and if its weights are not those that its record vouches for.
        """
        if not self.store.weights(spec.id).exists() and self.make([spec])[0]["status"] == "diverged":
            raise ValueError(f"the teacher {spec} ({spec.id}) has diverged: no student can be trained by it")
        weights, record = self.store.weights(spec.id), self.store.record(spec)
        if record and file_checksum(weights) != record["weights_sha256"]:
            raise BadFile(
                f"weights {weights} are torn, or not those of the record of {spec}; remove them to have them made again"
            )
        network = self.data.build(spec.network, spec.recipe)
        load_weights(network, weights)
        return network

    def _table(self, specs: Sequence[RunSpec], trainings: Mapping[Training, RunSpec]) -> dict[nn.Module, LogitTable]:
        """The logits of the teacher of these runs, by that network, if a table is wanted, possible and pays."""
        wanted = table_of(specs)
        if not self._profile.logit_table or not wanted:
            return {}
        first, scheme = specs[0], next(iter(trainings)).scheme
        bank, flip, half = next(iter(trainings)).bank, first.recipe.flip, HALF[first.recipe.precision]
        named = dict(zip(("teacher", "data"), wanted, strict=True))
        images = f"{first.images:g}_without_{first.held_out}"
        path = self.store.root / first.teacher.id / f"logits_{images}_{first.recipe.precision}.safetensors"
        if path in self._last_table:
            return {scheme.teacher: self._last_table[path]}
        try:
            table = LogitTable.load(path, bank, **named, flip=flip, half=half)
        except BadFile:  # absent, torn, or of other images
            size = {"images": len(bank), "classes": self.data.images.classes, "padding": bank.padding, "flip": flip}
            room = free_bytes(self.device) // 4
            if not logit_table.pays(self.teaching.get(wanted, 0), **size, memory=room):
                return {}
            try:
                table = LogitTable.build(scheme.teacher, bank, flip=flip, half=half, should_stop=self._should_stop)
            except ValueError as error:  # half precision does not hold its logits
                warnings.warn(f"the teacher runs beside its students: {error}", stacklevel=2)
                return {}
            if table is None:
                raise Stopped from None
            table.save(path, **named)
        self._last_table = {path: table}
        return {scheme.teacher: table}

    def _scores(self, network: nn.Module, spec: RunSpec) -> dict[str, float]:
        watch = self.data.watched(spec.held_out, spec.recipe)
        teacher_logits = self._teacher_logits(spec.teacher) if spec.teacher else None
        test = score(self._logits(network, watch["test"]), watch["test"].labels, teacher_logits)
        scores = {"test_accuracy": test.accuracy, "nll": test.nll, "ece": test.ece}
        if spec.teacher:
            scores |= {"agreement": test.agreement, "teacher_accuracy": accuracy(teacher_logits, watch["test"])}
        if "held_out" in watch:
            scores["val_accuracy"] = accuracy(self._logits(network, watch["held_out"]), watch["held_out"])
        return {name: round(value, 6) for name, value in scores.items()}

    def _test_accuracy(self, network: nn.Module, spec: RunSpec) -> float:
        test = self.data.watched(spec.held_out, spec.recipe)["test"]
        return round(accuracy(self._logits(network, test), test), 6)

    def _logits(self, network: nn.Module, bank: ImageBank) -> Tensor:
        return logits_of(network, bank, should_stop=self._should_stop)

    def _teacher_logits(self, spec: RunSpec) -> Tensor:
        return self._logits(self.teacher(spec), self.data.watched(0, spec.recipe)["test"])


def table_of(specs: Sequence[RunSpec]) -> tuple[str, str] | None:
    """The teacher's run and the images of a table of logits that could serve these runs; None if they need more."""
    for spec in specs:
        reads_logits_only = logit_table.reads_logits_only(METHODS[spec.method])
        if SCHEMES[spec.scheme_name] is not Offline or len(spec.teachers) > 1 or not reads_logits_only:
            return None
    first = specs[0]
    return first.teacher.id, f"{first.data_checksum} without {first.held_out}, {first.images:g} of the rest"


def accuracy(logits: Tensor, bank: ImageBank) -> float:
    """Percent of a bank's images that logits (N, C) get right."""
    return score(logits, bank.labels).accuracy


def _describe(spec: RunSpec, training: Training) -> Record:
    scheme, sessions = training.scheme, training.sessions
    last = sessions[-1]
    return {
        "run": spec.id,
        "identity": spec.identity,
        "revision": REVISION,
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
        "started": sessions[0]["started"],
        **{name: last[name] for name in ("device", "torch", "commit")},
        "resumes": len(sessions) - 1,
        "sessions": sessions,
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


def _without_nan(history: list[dict]) -> list[dict]:
    def cleaned(value):
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return [{name: cleaned(value) for name, value in epoch.items()} for epoch in history]
