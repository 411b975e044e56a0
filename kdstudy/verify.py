"""Re-checks results: records against params.yaml, themselves and each other, tables against records, weights against
both; and says what could not be made again, and why. Nothing of the study is written."""

import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path

import pandas as pd

from kdstudy import literature, table_files
from kdstudy.checkpoint import file_checksum, load_weights
from kdstudy.device import DataOnDevice, data_path
from kdstudy.evaluate import logits_of
from kdstudy.execute import Executor, only_teaching
from kdstudy.file_difference import difference
from kdstudy.image_set import read_card
from kdstudy.make import accuracy
from kdstudy.params import Params, load_params, look_up
from kdstudy.plausibility import (
    EXACT,
    ROUNDING,
    ends_differently,
    is_cpu,
    is_earlier,
    latitude,
    malformed,
    other_length,
    other_than_asked,
    out_of_range,
)
from kdstudy.provenance import SOURCES, code, device_name
from kdstudy.records import RUN, BadRecord, Record, read_record
from kdstudy.results import Ledger
from kdstudy.schemes import sample_batch
from kdstudy.stopping import never
from kdstudy.store import Store
from kdstudy.study import Planner, RunSpec, check_methods
from kdstudy.train import REVISION

REPORTS = Path("reports")
COMMIT = re.compile(r"[0-9a-f]{7,40}")


@dataclass
class Findings:
    """What was checked, what is wrong, and what cannot be reproduced, or not be told; each a line."""

    checked: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of it, as it is printed."""
        parts = {
            "checked": self.checked,
            f"wrong: {len(self.wrong) or 'nothing'}": self.wrong,
            f"cannot be reproduced, or not be told here: {len(self.notes) or 'nothing'}": self.notes,
        }
        return "\n".join(line for title, lines in parts.items() for line in (title, *(f"  {text}" for text in lines)))


def verify(
    profiles: Sequence[str] = (),
    store: Store | None = None,
    reports: Path = REPORTS,
    *,
    rescore: bool = False,
    device: str | None = None,
) -> Findings:
    """Check the named profiles of params.yaml, or all that have something on disk.

    With `rescore` networks whose weights are here are evaluated again, on `device`, by default the profile's.
    Raises ValueError for an unknown profile, or where params.yaml cannot be used.
    """
    params, store = load_params(), store or Store()
    check_methods(params)
    for profile in profiles:
        look_up("profile", profile, params.profiles)
    present = [name for name in params.profiles if (store.published / name).is_dir() or (reports / name).is_dir()]
    findings, shelf = Findings(), _Shelf(params, store)
    for profile in profiles or present:
        check = _Check(findings, shelf, profile, reports / profile / "tables")
        check.check()
        if rescore:
            check.rescore(device)
        check.tell_notes()
    return findings


@dataclass(frozen=True)
class _View(Store):
    """A store that shows the records which `find` gives."""

    find: Callable[[RunSpec], Record | None] = lambda spec: None

    def record(self, spec: RunSpec) -> Record | None:
        return self.find(spec)


class _Shelf:
    """Every record on disk, read once: the sound ones by path, the others with what is wrong with them."""

    def __init__(self, params: Params, store: Store):
        self.params, self.store = params, store
        self.bad: dict[Path, str] = {}
        files = sorted(store.published.glob("*/*/*/*.json"))
        self.published = {path: record for path in files if (record := self._read(path, path.stem))}
        self._by_id = {record["run"]: record for record in self.published.values()}
        self.own, self.present_data = cache(self.own), cache(self.present_data)
        self.planner = Planner(params, {name: self._checksum(name) for name in params.datasets})

    def _read(self, path: Path, run: str) -> Record | None:
        try:
            return read_record(path, run)
        except (BadRecord, OSError) as error:
            self.bad[path] = str(error)
            return None

    def own(self, run: str) -> Record | None:
        """The record that the store itself keeps of a run; None if there is no sound one."""
        path = self.store.record_path(run)
        return self._read(path, run) if path.exists() else None

    def find(self, run: str) -> Record | None:
        """The sound record of a run, wherever it is."""
        return self._by_id.get(run) or (self.own(run) if RUN.fullmatch(run) else None)

    def _checksum(self, dataset: str) -> str:
        """That of the newest published record: what is published is checked, whatever data is here now."""
        found = [record for record in self.published.values() if record["dataset"] == dataset]
        if found:
            return max(found, key=lambda record: record["finished"])["data_checksum"]
        return self.present_data(dataset) or "not made"

    def present_data(self, dataset: str) -> str | None:
        """The checksum of the data set that is here; None if it is not, or cannot be read."""
        try:
            return read_card(data_path(dataset))["checksum"]
        except (ValueError, OSError):
            return None

    def all_known(self) -> Ledger:
        """The study, held against all sound records."""
        return self._ledger(lambda spec: self.find(spec.id))

    def all_published(self) -> tuple[Ledger, Ledger]:
        """The study, held against published records: where a clone looks for them, and wherever they are.

        Settings can share teachers. Whoever has the store knows one's record before the other's stage has published it.
        """
        where_filed = self._ledger(lambda spec: self.published.get(self.store.published_path(spec)))
        return where_filed, self._ledger(lambda spec: self._by_id.get(spec.id))

    def _ledger(self, find: Callable[[RunSpec], Record | None]) -> Ledger:
        return Ledger(self.planner, _View(self.store.root, self.store.published, find=find))


class _Check:
    """That of one profile."""

    def __init__(self, findings: Findings, shelf: _Shelf, profile: str, tables: Path):
        self._findings, self._shelf, self._profile, self._tables = findings, shelf, profile, tables
        self._store, self._planner = shelf.store, shelf.planner
        self._folder = self._store.published / profile
        self._here = {path: record for path, record in shelf.published.items() if path.is_relative_to(self._folder)}
        self._asked = self._all_asked()
        self._runs_noted: dict[str, dict[str, None]] = defaultdict(dict)

    @cached_property
    def _records(self) -> dict[str, Record]:
        """All of the profile that are sound, by run: the published ones, and those that are only in the store yet."""
        published = {record["run"]: record for record in self._here.values()}
        asked = {run: self._shelf.own(run) for specs in self._asked.values() for run in specs if run not in published}
        return published | {run: record for run, record in asked.items() if record}

    def check(self) -> None:
        """Check all but what needs the networks."""
        self._tell_records()
        for path in sorted(self._folder.rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(self._folder).parts)
            if not hidden and (path.is_file() or path in self._shelf.bad):
                self._check_file(path)
        self._check_store()
        self._check_tables()
        self._note_provenance()
        self._note_data()
        self._note_versions()

    def _tell_records(self) -> None:
        told = _count(len(self._here), "published record") if self._records else "no run is on record"
        if waiting := len(self._records) - len({record["run"] for record in self._here.values()}):
            told += f", {_count(waiting, 'record')} in the store that no stage has published"
        self._findings.checked.append(f"{self._profile}: {told}")

    def tell_notes(self) -> None:
        """Add what was noted of single runs to the findings."""
        for reason, runs in self._runs_noted.items():
            example = next(iter(runs)) + (", ..." if len(runs) > 1 else "")
            self._findings.notes.append(f"{self._profile}: {_count(len(runs), 'run')} {reason}: {example}")

    def _wrong(self, path: Path, reason: str) -> None:
        self._findings.wrong.append(f"{path}: {reason}")

    def _note(self, reason: str, run: str) -> None:
        self._runs_noted[reason][run] = None

    # what params.yaml asks for, and where it is filed

    def _all_asked(self) -> dict[tuple[str, str], dict[str, RunSpec]]:
        """By stage and setting the runs that params.yaml asks for, by id, with those that only teach them."""
        ledger, asked = self._shelf.all_known(), {}
        for setting in self._shelf.params.settings_of(self._profile):
            for stage in ("teacher", *self._shelf.params.methods):
                specs = asked[stage, setting] = {spec.id: spec for spec in ledger.runs(setting, stage)}
                for spec in list(specs.values()):
                    specs |= only_teaching([spec])
        return asked

    def _spec(self, run: str) -> RunSpec | None:
        return next((specs[run] for specs in self._asked.values() if run in specs), None)

    def _check_file(self, path: Path) -> None:
        match path.relative_to(self._folder).parts:
            case ("results.csv",):
                return
            case (stage, setting, _) if path.suffix == ".json":
                self._check_published(path, stage, setting)
            case (stage, setting, "ensembles", _) if path.suffix == ".json":
                self._check_ensemble(path, stage, setting)
            case _:
                self._wrong(path, "the study files nothing here")

    def _check_published(self, path: Path, stage: str, setting: str) -> None:
        if path not in self._here:
            self._findings.wrong.append(self._shelf.bad[path])
            return
        if problem := self._misplaced(self._here[path], stage, setting):
            self._wrong(path, problem)
        self._check_record(path, self._here[path])

    def _misplaced(self, record: Record, stage: str, setting: str) -> str:
        """Why a record should not be filed here; "" if it should."""
        run = record["run"]
        if run in self._asked.get((stage, setting), {}):
            return ""
        if record["revision"] != REVISION:
            return f"it was made by revision {record['revision']} of the training code, which is now {REVISION}"
        places = [f"{stage}/{setting}" for (stage, setting), specs in self._asked.items() if run in specs]
        if places:
            return f"it belongs to {self._folder / places[0]}"
        if record["data_checksum"] != self._planner.checksums.get(record["dataset"]):
            return f"it was trained on another version of the data set {record['dataset']} than the newest record"
        if rows := self._rows_in_doubt(stage, setting, run):
            return (
                f"whether params.yaml asks for it cannot be told: cells of the grid of {rows[0]} have no sound record"
            )
        return "params.yaml does not ask for it any more"

    def _rows_in_doubt(self, stage: str, setting: str, run: str) -> list[str]:
        """The rows whose grids lack cells and of which this may be a final run."""
        if (stage, setting) not in self._asked or stage == "teacher":
            return []
        ledger = self._shelf.all_known()
        found = []
        for row in self._planner.rows(setting, stage):
            cells = self._planner.tuning(setting, stage, row)
            if cells and not ledger.final(setting, stage, row):
                finals = [self._planner.final(setting, stage, row, dict(cell.hyperparameters)) for cell in cells]
                found += [row] if any(spec.id == run for specs in finals for spec in specs) else []
        return found

    def _check_ensemble(self, path: Path, stage: str, setting: str) -> None:
        try:
            score = self._store.ensemble(self._profile, stage, setting, path.stem)
        except (ValueError, OSError) as error:
            self._findings.wrong.append(str(error))
            return
        specs = self._asked.get((stage, setting), {}).values()
        runs = [spec.id for spec in specs if spec.row == path.stem and spec.purpose == "final"]
        if absent := [run for run in score["runs"] if not self._shelf.find(str(run))]:
            self._wrong(path, f"it is about run {absent[0]}, of which there is no sound record")
        elif not runs:
            self._wrong(path, "the study has no such row here")
        elif score["runs"] != runs:
            self._wrong(path, f"it is about other runs than those of row {path.stem}, which are {', '.join(runs)}")
        elif not 0 <= score["test_accuracy"] <= 100:
            self._wrong(path, f"test_accuracy is {score['test_accuracy']}")

    # what a record says

    def _check_record(self, path: Path, record: Record) -> None:
        for problem in self._problems(record):
            self._wrong(path, problem)
        if not malformed(record) and is_earlier(record["finished"], record["started"]):
            self._note("that ended before they began, by a clock that was set back", record["run"])

    def _problems(self, record: Record) -> list[str]:
        """What is wrong with a sound record's contents. One thing at a time: the rest may follow from it."""
        spec = self._spec(record["run"])
        steps: list[Callable[[], list[str]]] = [partial(malformed, record), partial(out_of_range, record)]
        if spec:
            steps += [partial(other_than_asked, record, spec), partial(other_length, record, spec)]
        steps += [partial(ends_differently, record), partial(self._other_teacher, record)]
        return next(filter(None, (step() for step in steps)), [])

    def _other_teacher(self, record: Record) -> list[str]:
        run = record.get("teacher_run")
        for other in (run, *record.get("co_teacher_runs", ())):
            if other and not self._shelf.find(other):
                return [f"its teacher is run {other}, of which there is no sound record"]
        if record["status"] == "diverged" or not run:
            return ["it has a teacher's accuracy, but no teacher"] if "teacher_accuracy" in record["scores"] else []
        teacher = self._shelf.find(run)
        own, told = teacher["scores"].get("test_accuracy"), record["scores"].get("teacher_accuracy")
        if own is None or told is None:
            return [f"teacher_accuracy is {told}, but by the record of the teacher {run} it is {own}"]
        if abs(told - own) > latitude(record, teacher):
            return [f"teacher_accuracy is {told}, but by the record of the teacher {run} it is {own}"]
        if abs(told - own) > EXACT:
            self._note(f"whose teacher scored up to {ROUNDING} points off its own record", record["run"])
        return []

    # what the store has

    def _check_store(self) -> None:
        """Records in the store, weights, and the two against each other."""
        published = {record["run"]: record for record in self._here.values()}
        absent = 0
        for run in dict.fromkeys([*published, *(run for specs in self._asked.values() for run in specs)]):
            own, path = self._shelf.own(run), self._store.record_path(run)
            if path in self._shelf.bad:
                self._findings.wrong.append(self._shelf.bad[path])
            elif own and run not in published:
                self._check_record(path, own)
            elif own:
                self._compare_copies(own, published[run])
            record = own or published.get(run)
            if record and record["status"] == "finished":
                absent += not self._check_weights(record)
        if absent:
            self._findings.notes.append(
                f"{self._profile}: the weights of {_count(absent, 'run')} are not here: they cannot be scored again"
            )

    def _compare_copies(self, own: Record, published: Record) -> None:
        if own["sha256"] == published["sha256"]:
            return
        same = all(own[name] == published[name] for name in ("status", "scores", "history"))
        self._note(f"made again here, with {'the same' if same else 'another'} result", own["run"])

    def _check_weights(self, record: Record) -> bool:
        """Whether the weights of a finished run are here; those of another network are wrong."""
        path = self._store.weights(record["run"])
        if not path.exists():
            return False
        try:
            found = file_checksum(path)
        except OSError as error:
            self._wrong(path, f"cannot be read ({error.strerror})")
            return True
        if record["weights_sha256"] != found:
            self._wrong(path, f"its checksum is {found}, but the record of the run names {record['weights_sha256']}")
        return True

    # results.csv and tables

    def _check_tables(self) -> None:
        results = self._folder / "results.csv"
        if not results.exists() and not _visible(self._tables):
            if self._here:
                self._findings.notes.append(f"{self._profile}: results.csv and the tables have not been made yet")
            return
        try:
            made, tables = self._make_tables(results)
        except ValueError as error:
            self._wrong(self._tables, f"from these records no tables can be made: {error}")
            return
        wanted = {results: made} | {self._tables / name: content for name, content in tables.items()}
        for path in sorted({*wanted, *_visible(self._tables)}):
            if problem := difference(path, wanted.get(path)):
                self._wrong(path, problem)
        self._findings.checked.append(f"{self._profile}: results.csv and {_count(len(tables), 'file')} of tables")

    def _make_tables(self, results: Path) -> tuple[bytes, dict[str, bytes]]:
        """results.csv and, by name, the files of tables, as the published records give them."""
        ledgers = self._shelf.all_published()
        frames = [ledger.profile(self._profile) for ledger in ledgers]
        texts = [table_files.results_text(frame).encode() for frame in frames]
        # either is right; where it is neither, it is told how it would be in a clone
        at = texts.index(found) if results.exists() and (found := results.read_bytes()) in texts else 0
        with tempfile.TemporaryDirectory() as folder:
            write_tables(ledgers[at], frames[at], self._profile, Path(folder))
            return texts[at], {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}

    # what stands in the way of making a run again

    def _note_provenance(self) -> None:
        deterministic = self._shelf.params.profiles[self._profile].deterministic
        for run, record in self._records.items():
            if malformed(record):
                continue
            sittings = record["sessions"]
            for sitting in sittings:
                if reason := _code_is_lost(sitting["commit"], sitting["code"]):
                    self._note(reason, run)
            on_gpu = [sitting for sitting in sittings if not is_cpu(sitting["device"])]
            if any(not deterministic and "--deterministic" not in sitting["command"].split() for sitting in on_gpu):
                self._note("made on a GPU without `deterministic`, which repeat but for rounding", run)
            for name, where in (("device", "another kind of device"), ("torch", "another version of torch")):
                if len({sitting[name] for sitting in sittings}) > 1:
                    self._note(f"stopped, and gone on with {where}", run)

    def _note_data(self) -> None:
        for run, record in self._records.items():
            dataset = record["dataset"]
            present = self._shelf.present_data(dataset)
            if present is None:
                self._note(f"trained on {dataset}, which is not here (`python -m kdstudy data {dataset}`)", run)
            elif present != record["data_checksum"]:
                self._note(f"trained on another version of {dataset} than is here", run)

    def _note_versions(self) -> None:
        """Tables are by setting, so the runs of a setting stand in one."""
        settings: dict[str, dict[str, str]] = defaultdict(dict)
        for (_, setting), specs in self._asked.items():
            settings[setting] |= {run: self._records[run]["torch"] for run in specs if run in self._records}
        for setting, versions in settings.items():
            distinct = sorted(set(versions.values()))
            if len(distinct) > 1:
                self._findings.notes.append(
                    f"{self._profile}: tables of {setting} compare runs of torch {', '.join(distinct)}"
                )

    # networks

    def rescore(self, device: str | None) -> None:
        """Evaluate networks whose weights and data are here on the test images once more."""
        scored: set[str] = set()
        for setting in self._shelf.params.settings_of(self._profile):
            specs = {
                run: spec for (_, own), each in self._asked.items() if own == setting for run, spec in each.items()
            }
            ready = [spec for run, spec in specs.items() if run not in scored and self._can_score(spec)]
            if not ready:
                continue
            executor = Executor(self._shelf.all_known(), setting, should_stop=never, device=device)
            try:
                data = executor.data
            except (ValueError, OSError) as error:
                self._findings.wrong.append(str(error))
                continue
            for spec in ready:
                self._rescore(spec, data)
            scored.update(spec.id for spec in ready)
        self._findings.checked.append(f"{self._profile}: {_count(len(scored), 'network')} scored again")

    def _can_score(self, spec: RunSpec) -> bool:
        record = self._shelf.own(spec.id) or self._records.get(spec.id)
        has_data = self._shelf.present_data(spec.dataset) == spec.data_checksum
        finished = record is not None and record["status"] == "finished"
        return finished and has_data and self._store.weights(spec.id).exists()

    def _rescore(self, spec: RunSpec, data: DataOnDevice) -> None:
        weights = self._store.weights(spec.id)
        try:
            found = _score(spec, weights, data)
        except ValueError as error:
            self._findings.wrong.append(str(error))
            return
        record = self._shelf.own(spec.id) or self._records[spec.id]
        told, here = record["scores"]["test_accuracy"], device_name(data.device)
        if abs(found - told) > (EXACT if here == record["device"] and is_cpu(here) else ROUNDING):
            self._wrong(
                weights, f"its test accuracy is {found} on {here}, but by its record {told} on {record['device']}"
            )
        elif abs(found - told) > EXACT:
            self._note(f"that score up to {ROUNDING} points more or less on {here} than on {record['device']}", spec.id)


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if not path.name.startswith(".")]


def write_tables(ledger: Ledger, results: pd.DataFrame, profile: str, folder: Path) -> None:
    """Write all tables of a profile into a folder, as the stage `tables` does."""
    table_files.write_thesis_tables(results, ledger.planner, profile, folder)
    literature.write_tables(ledger, results, profile, folder)
    table_files.write_comparisons(results[results.stage != table_files.FEW_DATA], folder)
    table_files.write_shares(ledger, profile, folder)
    table_files.write_tunings(results, folder)


def _code_is_lost(commit: str, digest: str) -> str:
    """Why the code of a sitting cannot be had again; "" if it can."""
    if digest == code():
        return ""
    if COMMIT.fullmatch(commit.removesuffix("+")) is None:
        return "without the commit of their code"
    if commit.endswith("+"):
        return f"made by code with changes that no commit holds ({commit})"
    if not _has_repository():
        return "of commits that cannot be looked for: git or the repository is not here"
    return (
        ""
        if _git_answers("cat-file", "-e", f"{commit}^{{commit}}")
        else (f"made by code of commit {commit}, which is not in this repository")
    )


@cache
def _has_repository() -> bool:
    return _git_answers("rev-parse", "--git-dir")


@cache
def _git_answers(*arguments: str) -> bool:
    try:
        return subprocess.run(["git", *arguments], cwd=SOURCES.parent, capture_output=True).returncode == 0
    except OSError:
        return False


def _score(spec: RunSpec, weights: Path, data: DataOnDevice) -> float:
    """The test accuracy, percent, of the network with these weights. Raises ValueError if they are not its own."""
    build, test = partial(data.build, recipe=spec.recipe), data.watched(0, spec.recipe)["test"]
    # new teachers do: only what is deployed is looked at, and it may have adapters that are sized by a teacher's maps
    teachers = [build(teacher.network) for teacher in spec.teachers]
    network = spec.assemble(build, teachers, sample_batch(test, spec.recipe.batch)).deployed
    load_weights(network, weights)
    return round(accuracy(logits_of(network, test), test), 6)
