"""The run store: record, weights and checkpoint of every run by its id, and the published copies of the records.

The store (`.kdstudy/runs/<id>/`) is ignored by git and unknown to DVC. A stage publishes the records of its runs to
`runs/<profile>/<stage>/<setting>/<id>.json`: those DVC tracks and, for the thesis profile, git keeps, so that a clone
knows what is finished without having any weights.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdstudy.files import write_json
from kdstudy.study import RunSpec

STORE = Path(os.environ.get("KDSTUDY_STORE", ".kdstudy/runs"))
PUBLISHED = Path("runs")

Record = dict[str, Any]


@dataclass(frozen=True)
class Store:
    """Runs on disk. `root` holds them by id, `published` the records that stages have handed on."""

    root: Path = STORE
    published: Path = PUBLISHED

    def weights(self, run: str) -> Path:
        """Where the deployed network's weights are or will be."""
        return self.root / run / "weights.safetensors"

    def checkpoint(self, run: str) -> Path:
        """Where an unfinished run's checkpoint is or will be."""
        return self.root / run / "checkpoint.pt"

    def record(self, spec: RunSpec) -> Record | None:
        """The record of a finished or diverged run, from the store or as published; None if there is none.

        Raises ValueError naming the file if it is torn or belongs to another run.
        """
        for path in (self._record_path(spec.id), self.published_path(spec)):
            if path.exists():
                return _read_record(path, spec.id)
        return None

    def write_record(self, record: Record) -> None:
        """Keep a record; from now on the run is finished. Its checkpoint is removed."""
        write_json(self._record_path(record["run"]), record)
        self.checkpoint(record["run"]).unlink(missing_ok=True)

    def published_path(self, spec: RunSpec) -> Path:
        """Where a stage publishes the record of this run."""
        return self.published / spec.profile / spec.stage / spec.setting / f"{spec.id}.json"

    def published_checksum(self, dataset: str) -> str | None:
        """The data checksum of the newest published run on a data set; None if no run on it is published.

        Raises ValueError naming a published file that is torn.
        """
        found = [_read_record(path, path.stem) for path in self.published.glob("*/*/*/*.json")]
        found = [record for record in found if record["dataset"] == dataset]
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

    @contextmanager
    def lock(self, run: str) -> Iterator[None]:
        """Hold a run for this process; waits while another process holds it. The lock ends with its holder."""
        folder = self.root / run
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _record_path(self, run: str) -> Path:
        return self.root / run / "record.json"


def _read_record(path: Path, run: str) -> Record:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = record["run"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no record of a run ({error}); remove it to have the run made again") from error
    if found != run:
        raise ValueError(f"{path} is the record of run {found}, not {run}")
    # records from before there were schemes of several networks do not say these
    one_network = {"deployed": "student", "further": {}, "network_epochs": len(record["history"])}
    return one_network | record
