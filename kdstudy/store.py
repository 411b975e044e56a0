"""The run store: record, weights and checkpoint of every run by its id, and the published copies of the records.

The store (`.kdstudy/runs/<id>/`) is ignored by git and unknown to DVC. A stage publishes the records of its runs to
`runs/<profile>/<stage>/<setting>/<id>.json`: those DVC tracks and, for the thesis profile, git keeps, so that a clone
knows what is finished without having any weights.
"""

import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from kdstudy.checkpoint import remove_checkpoint
from kdstudy.files import atomic_write, is_locked, remove_torn_writes, write_json
from kdstudy.records import BadRecord, Record, read_record, seal
from kdstudy.study import RunSpec

STORE = Path(os.environ.get("KDSTUDY_STORE", ".kdstudy/runs"))
PUBLISHED = Path("runs")


@dataclass(frozen=True)
class Store:
    """Runs on disk. `root` holds them by id, `published` the records that stages have handed on.

    What is not there is looked for in the store `beneath`, which is only read.
    """

    root: Path = STORE
    published: Path = PUBLISHED
    beneath: "Store | None" = None

    @property
    def own(self) -> "Store":
        """This store without the one beneath: where things are written."""
        return replace(self, beneath=None)

    def weights(self, run: str) -> Path:
        """Where the deployed network's weights are or will be."""
        own = self.root / run / "weights.safetensors"
        if self.beneath and not own.exists() and self.beneath.weights(run).exists():
            return self.beneath.weights(run)
        return own

    def checkpoint(self, run: str) -> Path:
        """Where an unfinished run's checkpoint is or will be."""
        return self.root / run / "checkpoint.pt"

    def take_up_checkpoint(self, run: str) -> None:
        """Copy an unfinished run's checkpoint from the store beneath, where there is none here."""
        own = self.checkpoint(run)
        if self.beneath and not own.exists() and self.beneath.checkpoint(run).exists():
            with atomic_write(own) as temporary:
                shutil.copyfile(self.beneath.checkpoint(run), temporary)

    def record(self, spec: RunSpec) -> Record | None:
        """The record of a finished or diverged run, from the store or as published; None if there is none.

        One that is torn gives way to its other copy, with a warning. Raises ValueError naming the file if there is no
        other, or if it belongs to another run.
        """
        present = [path for path in (self.record_path(spec.id), self.published_path(spec)) if path.exists()]
        if not present:
            return self.beneath.record(spec) if self.beneath else None
        for path in present:
            try:
                return read_record(path, spec.id)
            except BadRecord as error:
                if path is present[-1]:
                    raise
                warnings.warn(f"{error}; until then its other copy, {present[-1]}, is taken", stacklevel=2)

    def write_record(self, record: Record) -> None:
        """Seal and keep a record; from now on the run is finished. Its checkpoint is removed."""
        write_json(self.record_path(record["run"]), seal(record))
        remove_checkpoint(self.checkpoint(record["run"]))

    def published_path(self, spec: RunSpec) -> Path:
        """Where a stage publishes the record of this run."""
        return self.published / spec.profile / spec.stage / spec.setting / f"{spec.id}.json"

    def published_checksum(self, dataset: str) -> str | None:
        """The data checksum of the newest published run on a data set; None if no run on it is published.

        Raises ValueError naming a published file that is torn.
        """
        found = [read_record(path, path.stem) for path in self.published.glob("*/*/*/*.json")]
        found = [record for record in found if record["dataset"] == dataset]
        if not found and self.beneath:
            return self.beneath.published_checksum(dataset)
        return max(found, key=lambda record: record["finished"])["data_checksum"] if found else None

    def publish(self, profile: str, stage: str, setting: str, specs: Iterable[RunSpec]) -> None:
        """Make the published folder of a stage hold the records of these runs and of no others; it may stay empty."""
        folder = self.published / profile / stage / setting
        folder.mkdir(parents=True, exist_ok=True)
        wanted = {self.published_path(spec): self.record(spec) for spec in specs}
        for path, record in wanted.items():
            write_json(path, record)
        for path in set(folder.glob("*.json")) - set(wanted):
            path.unlink()

    def ensemble(self, profile: str, stage: str, setting: str, row: str) -> Record | None:
        """What `publish_ensemble` was last given for a row; None if there is nothing. Raises ValueError if torn."""
        path = self._ensemble_path(profile, stage, setting, row)
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return {"runs": list(found["runs"]), "test_accuracy": float(found["test_accuracy"])}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no score of an ensemble ({error}); remove it to have it made again") from error

    def publish_ensemble(self, specs: Sequence[RunSpec], test_accuracy: float) -> None:
        """Keep how well the final runs of a row do together, percent."""
        first = specs[0]
        path = self._ensemble_path(first.profile, first.stage, first.setting, first.row)
        write_json(path, {"runs": [spec.id for spec in specs], "test_accuracy": round(test_accuracy, 6)})

    def _ensemble_path(self, profile: str, stage: str, setting: str, row: str) -> Path:
        return self.published / profile / stage / setting / "ensembles" / f"{row}.json"

    def is_held(self, run: str) -> bool:
        """Whether a process is making a run."""
        return is_locked(self._lock_path(run))

    def is_made(self, spec: RunSpec) -> bool:
        """Whether a run has diverged, or is finished and its weights are here."""
        record = self.record(spec)
        return record is not None and (record["status"] == "diverged" or self.weights(spec.id).exists())

    @contextmanager
    def lock(self, run: str) -> Iterator[None]:
        """Hold a run for this process; waits while another process holds it. The lock ends with its holder.

        What the last holder was writing when it was killed is swept away.
        """
        path = self._lock_path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            remove_torn_writes(path.parent)
            yield

    def _lock_path(self, run: str) -> Path:
        return self.root / run / "lock"

    def record_path(self, run: str) -> Path:
        """Where this store's own record of a run is or will be."""
        return self.root / run / "record.json"
