"""A small study in a folder of its own, whose commands are those that a user types."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from nbformat import v4

from kdstudy.device import data_path
from kdstudy.image_set import ImageSet, save_image_set
from kdstudy.notebook import canonical

from .processes import Command, wait_until
from .witness import Event, read_events

ROOT = Path(__file__).parents[2]
INSIDE = Path(__file__).parent / "inside"
SETTING = "stripes"
CHECKPOINT_SECONDS = 0.2

TREE: dict[str, Any] = {
    "profiles": {
        "quick": {"device": "cpu", "threads": 1, "workers": 1, "cohort": 4, "checkpoint_seconds": CHECKPOINT_SECONDS}
    },
    "datasets": {SETTING: {"source": "npz", "validation": 0}},
    "recipes": {
        "short": {
            **{"epochs": 16, "batch": 10, "learning_rate": 0.05, "milestones": [10]},
            **{"crop_padding": 1, "flip": False, "precision": "fp32"},
        }
    },
    "settings": {
        SETTING: {
            **{"profile": "quick", "dataset": SETTING, "teacher": "cnn_small", "student": "wrn_10_0.25"},
            **{"recipe": "short", "seeds": [0, 1]},
        }
    },
    "methods": {"response": {"kd": {"temperature": 2.0}, "relative_v2": {"temperature": 2.0}}},
    "grids": {},
}

NOTEBOOK = Path("notebooks/train.ipynb")
EXECUTED = Path("reports/quick/notebooks/train.ipynb")
CELLS = (
    "from kdstudy.execute import Executor, open_ledger",
    'executor = Executor(open_ledger(), setting)\nfor stage in ("teacher", "response"):\n    executor.run_stage(stage)',
)

RUNS = 6  # that the tree above asks for

# of how and when a run was made, and in what company; all the rest of a record is its result
CIRCUMSTANCES = {"started", "finished", "seconds", "sessions", "resumes", "commit", "engine", "sha256"}

Result = tuple[str, dict[str, Any]]  # digest of the weights, record without circumstances


def stripes() -> ImageSet:
    """Three classes of small noisy images, told apart by where a bright stripe lies."""
    generator = np.random.default_rng(0)

    def part(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % 3
        images = generator.integers(0, 120, (count, 8, 8, 1), np.uint8)
        images[np.arange(count), 1 + 2 * labels] += 100
        return images, labels

    return ImageSet(SETTING, *part(60), *part(30))


def results_of(store: Path, published: Path) -> dict[str, Result]:
    """What every recorded run has come to, by its id; a record that was published counts as well as the store's own."""
    results = {}
    for path in [*published.glob("*/*/*/*.json"), *store.glob("*/record.json")]:
        record = json.loads(path.read_text(encoding="utf-8"))
        weights = store / record["run"] / "weights.safetensors"
        digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else ""
        results[record["run"]] = digest, {key: value for key, value in record.items() if key not in CIRCUMSTANCES}
    return results


def environment_of(folder: Path, witness: Path) -> dict[str, str]:
    """The environment in which a study's commands are run: this interpreter's, with witnesses in every process."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("KDSTUDY_", "PYTEST_"))}
    places = os.pathsep.join([str(INSIDE), str(folder)])
    own = {"PATH": path, "PYTHONPATH": places, "KDSTUDY_DEVICE": "cpu", "KDSTUDY_WITNESS": str(witness)}
    return {**inherited, **own, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "DVC_NO_ANALYTICS": "1"}


@dataclass
class Study:
    """A folder with params.yaml and images, and everything that became of them.

    `changes` are entries of params.yaml by their places, such as {"recipes.short.epochs": 1}.
    """

    folder: Path
    changes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.store, self.published = self.folder / ".kdstudy/runs", self.folder / "runs"
        self._commands = 0
        tree = json.loads(json.dumps(TREE))
        for place, value in self.changes.items():
            *mappings, name = place.split(".")
            reduce(getitem, mappings, tree)[name] = value
        (self.folder / "params.yaml").write_text(yaml.safe_dump(tree))
        (self.folder / "kdstudy").symlink_to(ROOT / "kdstudy")
        self._write_notebook()
        save_image_set(stripes(), self.folder / data_path(SETTING))

    def _write_notebook(self) -> None:
        cells = [v4.new_code_cell("setting: str", metadata={"tags": ["parameters"]}), *map(v4.new_code_cell, CELLS)]
        path = self.folder / NOTEBOOK
        path.parent.mkdir()
        path.write_text(canonical(v4.writes(v4.new_notebook(cells=cells))))

    def start(self, *words: str, fault: Mapping[str, Any] | None = None) -> Command:
        """Start a command; `python` and `dvc` are this environment's. A fault strikes inside it."""
        environment = environment_of(self.folder, self.folder / "witness")
        self._commands += 1
        if fault:
            fault = {"marks": str(self.folder / f"marks_{self._commands}"), **fault}
            environment["KDSTUDY_FAULT"] = json.dumps(fault)
        return Command(words, self.folder, environment, self.folder / f"output_{self._commands}")

    def train(self, *more: str, fault: Mapping[str, Any] | None = None) -> Command:
        """Start to make all runs."""
        return self.start("python", "-m", "kdstudy", "run", "--setting", SETTING, *more, fault=fault)

    def execute(self, fault: Mapping[str, Any] | None = None) -> Command:
        """Start to make all runs in a notebook, as a stage of the pipeline does."""
        words = ("python", "-m", "kdstudy", "notebook", str(NOTEBOOK), str(EXECUTED), f"setting={SETTING}")
        return self.start(*words, fault=fault)

    def complete(self) -> str:
        """Make whatever is missing, undisturbed. Returns what is said; raises ChildProcessError if it fails."""
        with self.train() as command:
            if command.wait(120):
                raise ChildProcessError(f"the study was not completed:\n{command.text}")
            return command.text

    @property
    def events(self) -> list[Event]:
        """What has been witnessed since the study began."""
        return read_events(self.folder / "witness")

    @property
    def results(self) -> dict[str, Result]:
        """Of all recorded runs."""
        return results_of(self.store, self.published)

    def await_event(self, what: str, count: int = 1, seconds: float = 60) -> Event:
        """Wait until so many events of a kind have been witnessed; the last of them."""

        def found() -> list[Event]:
            return [event for event in self.events if event.what == what]

        wait_until(lambda: len(found()) >= count, seconds, lambda: f"no {what} within {seconds} s in {self.folder}")
        return found()[count - 1]

    def await_events(self, count: int, seconds: float = 60) -> None:
        """Wait until so many events of any kind have been witnessed, or all runs are on record."""

        def reached() -> bool:
            return len(self.events) >= count or len(self.results) == RUNS

        wait_until(reached, seconds, lambda: f"no {count} events within {seconds} s in {self.folder}")

    def interrupt_midway(self) -> None:
        """Train until a second checkpoint of some run is there, and be killed."""
        with self.train() as command:
            self.await_event("save", 8)
            command.kill_all()

    def remove(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.folder)
