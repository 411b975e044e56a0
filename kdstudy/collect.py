"""Takes in runs that were made elsewhere: records, weights and checkpoints, each checked before anything changes here.

What is looked through is only read: no link in it is followed, no code in it is run, and what cannot be taken stays
where it is. A kill loses nothing: weights come before the record that vouches for them, and the same call goes on.
"""

import os
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kdstudy.checkpoint import (
    BadFile,
    file_checksum,
    load_checkpoint,
    previous_checkpoint,
    remove_checkpoint,
    save_checkpoint,
    told_if_full,
)
from kdstudy.device import data_path
from kdstudy.execute import only_teaching
from kdstudy.files import atomic_write, is_locked, write_json
from kdstudy.image_set import read_card
from kdstudy.records import RUN, BadRecord, Record, read_record
from kdstudy.results import Ledger, above
from kdstudy.store import Store
from kdstudy.study import RunSpec
from kdstudy.train import REVISION, position_of

TAKEN, KNOWN, REFUSED = "taken", "known", "refused"
RECORD, WEIGHTS, CHECKPOINT, FOLDER = "record", "weights", "checkpoint", "folder"

_ANY = Store(Path("runs"))
NAMES = {
    _ANY.record_path("any").name: RECORD,
    _ANY.weights("any").name: WEIGHTS,
    _ANY.checkpoint("any").name: CHECKPOINT,
}
RESULT = ("status", "scores", "further", "weights_sha256")  # what two records of one run must agree in
PATIENCE = 10.0  # seconds of waiting, in all, for runs that other processes hold here
POLL_SECONDS = 0.05
NOWHERE = (-1, -1, -1)  # before the first step
SHOWN_AT_MOST = 5  # runs that a line of the summary names


@dataclass(frozen=True)
class Finding:
    """What became of a record or checkpoint of a `run` that was found at `path`.

    `outcome` is "taken", "known" (what is here says the same, or is as far) or "refused"; `text` is the reason.
    `remarks` say what the run lacks here, though it was not refused.
    """

    path: Path
    run: str
    kind: str
    outcome: str
    text: str = ""
    remarks: tuple[str, ...] = ()

    @property
    def taken(self) -> bool:
        """Whether something has been added here."""
        return self.outcome == TAKEN


class _Refused(Exception):
    """Why something is not taken in."""


Parts = dict[str, list[Path]]  # of a run, by kind


def collect(folders: Sequence[Path], ledger: Ledger) -> list[Finding]:
    """Take in all runs that these folders hold, at any depth: run stores and published records.

    Raises ValueError for what is no folder, and OSError, naming the place, if the store cannot be written; what was
    taken before stays.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; name one that `run --out` wrote, or a run store")
    intake = Intake(ledger)
    findings = [finding for folder in folders for finding in intake.take_in(folder)]
    # a teacher may have come after its student
    return [replace(finding, remarks=(*finding.remarks, *intake.of_teachers(finding))) for finding in findings]


class Intake:
    """Takes runs into a ledger's store. Raises ValueError if the card of a data set is torn."""

    def __init__(self, ledger: Ledger):
        self._store = ledger.store.own
        cards = {name: data_path(name) for name in ledger.planner.params.datasets}
        cards = {name: read_card(path) for name, path in cards.items() if path.with_suffix(".json").exists()}
        self._checksums = {name: card["checksum"] for name, card in cards.items()}
        self._published = {path.stem: path for path in self._store.published.glob("*/*/*/*.json")}
        self._patience = PATIENCE
        self._teachers: dict[str, list[str]] = {}
        self._contradicted: set[str] = set()

    def take_in(self, folder: Path) -> list[Finding]:
        """Take in the runs of a folder, at any depth. Raises OSError, naming the place, for a store it cannot write."""
        runs, findings = _search(folder)
        for run, parts in runs.items():
            findings += self._take(run, parts)
        return findings or [_refusal(folder, FOLDER, "holds no record and no checkpoint (links are not followed)")]

    def of_teachers(self, finding: Finding) -> Iterator[str]:
        """Remarks on the teachers of a run, when all that is to be taken in has been."""
        if finding.kind == RECORD and finding.outcome != REFUSED:
            teachers = self._teachers[finding.run]
            if not all(map(self._copies, teachers)):
                yield "a teacher's record is not here"
            if self._contradicted.intersection(teachers):
                yield "the teacher's record beside it was refused: it was taught by another making of the teacher"

    def _take(self, run: str, parts: Parts) -> list[Finding]:
        findings = []
        for path in parts[RECORD]:
            beside = [weights for weights in parts[WEIGHTS] if weights.parent == path.parent]
            findings.append(self._try_record(path, run, beside or parts[WEIGHTS]))
            if findings[-1].outcome != REFUSED:
                return findings
        return findings + [self._try_checkpoint(path, run) for path in parts[CHECKPOINT]]

    def _try_record(self, path: Path, run: str, weights: Sequence[Path]) -> Finding:
        try:
            record = self._checked(path, run)
            outcome = self._take_record(record, path, weights)
        except _Refused as refused:
            return Finding(path, run, RECORD, REFUSED, str(refused))
        self._teachers[run] = _teachers_of(record)
        return Finding(path, run, RECORD, outcome, remarks=tuple(self._lacks(record)))

    def _checked(self, path: Path, run: str) -> Record:
        try:
            record = read_record(path, run)
        except (BadRecord, OSError) as error:
            raise _Refused(_reason(error, path)) from error
        _check_revision(record["revision"])
        dataset, checksum = record["dataset"], record["data_checksum"]
        if self._checksums.get(dataset, checksum) != checksum:
            raise _Refused(
                f"it was trained on other images: the checksum of {dataset!r} is {checksum!r:.80} there, "
                f"and {self._checksums[dataset]!r} here"
            )
        return record

    def _take_record(self, record: Record, path: Path, weights: Sequence[Path]) -> str:
        """Take in what is not here yet of the record, which lies at `path`, and its weights. Returns the outcome."""
        run, finished = record["run"], record["status"] == "finished"
        own = self._store.weights(run)
        weights = weights[0] if weights and finished else None
        if self._agrees(record) and not (weights and not own.exists()):
            return KNOWN
        if weights and _checksum_of(weights) != record["weights_sha256"]:
            raise _Refused(f"{weights} do not fit its weights_sha256: they are torn, or another run's")
        with self._locked(run):
            here = self._agrees(record)  # another process may have been as quick
            if weights and not (here and own.exists()):
                _copy(weights, own, file_checksum, record["weights_sha256"])
            elif not here and own.exists() and file_checksum(own) != record["weights_sha256"]:
                own.unlink()  # no record vouched for them, and this one does not
            if not self._store.record_path(run).exists():
                _copy(path, self._store.record_path(run), partial(_seal_of, run=run), record["sha256"])
                remove_checkpoint(self._store.checkpoint(run))
        return TAKEN

    def _agrees(self, record: Record) -> bool:
        """Whether there is a record of the run here. Raises _Refused if its result is another."""
        found = self._own_record(record["run"])
        if found is None:
            return False
        path, own = found
        differing = [name for name in RESULT if own[name] != record[name]]
        if differing:
            self._contradicted.add(record["run"])
            raise _Refused(
                f"it contradicts {path}, which stays ({', '.join(differing)}: {_accuracy(record)} there, "
                f"{_accuracy(own)} here); two makings of a run may differ where devices or versions do"
            )
        return True

    def _own_record(self, run: str) -> tuple[Path, Record] | None:
        """The record of a run here, and its file. Raises _Refused if there are only torn ones."""
        problem = None
        for path in self._copies(run):
            try:
                return path, read_record(path, run)
            except BadRecord as error:
                problem = error
        if problem:
            raise _Refused(f"there is one here, which cannot be read: {problem}") from problem
        return None

    def _copies(self, run: str) -> list[Path]:
        """The files here that hold a record of a run."""
        places = (self._store.record_path(run), self._published.get(run))
        return [path for path in places if path and path.exists()]

    def _lacks(self, record: Record) -> Iterator[str]:
        if record["status"] == "finished" and not self._store.weights(record["run"]).exists():
            yield "without weights"
        if record["dataset"] not in self._checksums:
            yield f"unchecked against the images: data set {record['dataset']!r:.80} is not here"

    def _try_checkpoint(self, path: Path, run: str) -> Finding:
        try:
            outcome, text = self._take_checkpoint(path, run)
        except _Refused as refused:
            outcome, text = REFUSED, str(refused)
        return Finding(path, run, CHECKPOINT, outcome, text)

    def _take_checkpoint(self, path: Path, run: str) -> tuple[str, str]:
        """Take in one that is further than that here. Returns outcome and text."""
        if not RUN.fullmatch(run):
            raise _Refused("the name of its folder is no run's id, so it is not known whose it is")
        if is_locked(path.with_name("lock")):
            raise _Refused("its run is being trained there at this moment; collect it when that has ended")
        state, torn = _load(path)
        position = _position(state, run)
        with self._locked(run):
            if self._own_record(run):
                return KNOWN, "the run is finished here"
            if self._own_position(run) >= position:
                return KNOWN, "the checkpoint here is as far"
            save_checkpoint(state, self._store.checkpoint(run))
        return TAKEN, torn

    def _own_position(self, run: str) -> tuple[int, int, int]:
        path = self._store.checkpoint(run)
        try:
            return _position(_load(path)[0], run) if path.exists() else NOWHERE
        except _Refused:  # nothing could go on from it
            return NOWHERE

    @contextmanager
    def _locked(self, run: str) -> Iterator[None]:
        """Hold a run of the store. Raises _Refused if another process does so for long: it is training it."""
        while self._store.is_held(run):
            if self._patience <= 0:
                raise _Refused("its run is being made here at this moment; collect it again when that has ended")
            time.sleep(POLL_SECONDS)
            self._patience -= POLL_SECONDS
        with told_if_full(self._store.root), self._store.lock(run):
            yield


def _search(folder: Path) -> tuple[dict[str, Parts], list[Finding]]:
    """The parts of the runs in a folder, at any depth, and what is no plain file or cannot be looked into."""
    runs: dict[str, Parts] = defaultdict(lambda: {RECORD: [], WEIGHTS: [], CHECKPOINT: []})
    refused = []

    def cannot_list(error: OSError) -> None:
        refused.append(_refusal(Path(error.filename), FOLDER, f"cannot be looked into: {error.strerror}"))

    for place, folders, files in os.walk(folder, onerror=cannot_list):
        folders.sort()
        links = [name for name in folders if RUN.fullmatch(name) and Path(place, name).is_symlink()]
        for path in (Path(place, name) for name in [*sorted(files), *links]):
            kind, run = _part(path)
            if not kind:
                continue
            if os.path.isfile(path) and not os.path.islink(path):  # False, not an error, where it cannot be asked
                runs[run][kind].append(path)
            else:
                refused.append(_refusal(path, kind, "is a link, which is not followed, or no plain file"))
    return dict(runs), refused


def _part(path: Path) -> tuple[str, str]:
    """Which part of which run a file or a link must be, by its name; "" if none."""
    if path.name in NAMES:
        return NAMES[path.name], path.parent.name
    if RUN.fullmatch(path.name):
        return FOLDER, path.name
    return (RECORD if path.suffix == ".json" and RUN.fullmatch(path.stem) else ""), path.stem


def _refusal(path: Path, kind: str, text: str) -> Finding:
    return Finding(path, "", kind, REFUSED, text)


def _reason(error: Exception, path: Path) -> str:
    """What an error says, but for the path that a finding names anyway."""
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror}"
    return str(error).removeprefix("checkpoint ").removeprefix(f"{path} ")


def _check_revision(revision: Any) -> None:
    if revision != REVISION:
        raise _Refused(f"it was made by revision {revision!r:.80} of the training code, and this is {REVISION}")


def _teachers_of(record: Record) -> list[str]:
    identity = record["identity"]
    others = identity.get("co_teachers")
    named = [identity.get("teacher"), *(others if isinstance(others, list) else ())]
    return [run for run in named if isinstance(run, str) and RUN.fullmatch(run)]


def _accuracy(record: Record) -> str:
    if record["status"] != "finished":
        return record["status"]
    return f"{record['scores']['test_accuracy']} % with weights {str(record['weights_sha256'])[:12]}"


def _checksum_of(path: Path) -> str:
    try:
        return file_checksum(path)
    except OSError as error:
        raise _Refused(f"{path} cannot be read: {error.strerror}") from error


def _pieces(path: Path) -> Iterator[bytes]:
    """A file's content. Raises _Refused if it cannot be read, so that no other error is one of reading."""
    try:
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                yield piece
    except OSError as error:
        raise _Refused(f"{path} cannot be read: {error.strerror}") from error


def _copy(source: Path, target: Path, checksum_of: Callable[[Path], str], checksum: str) -> None:
    """Copy a file and check the copy before it gets its name."""
    with atomic_write(target) as temporary:
        with open(temporary, "wb") as file:
            file.writelines(_pieces(source))
        if checksum_of(temporary) != checksum:
            raise _Refused(f"{source} has changed while it was copied")


def _seal_of(path: Path, run: str) -> str:
    """The checksum that a run's record bears; "" if it is torn."""
    try:
        return read_record(path, run)["sha256"]
    except BadRecord:
        return ""


def _load(path: Path) -> tuple[dict[str, Any], str]:
    """A checkpoint's state in host memory, and a word if it is not the last one that was written."""
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            state = load_checkpoint(path, torch.device("cpu"))
    except (BadFile, OSError) as error:
        raise _Refused(_reason(error, path)) from error
    if state is None:
        raise _Refused("it is no longer there")
    torn = any(str(previous_checkpoint(path)) in str(warning.message) for warning in told)
    return state, "the last one is torn; this is the one before" if torn else ""


def _position(state: Mapping[str, Any], run: str) -> tuple[int, int, int]:
    """Where the checkpoint of a run stands. Raises _Refused unless it is surely that run's, and of this code."""
    if state.get("run") != run:
        raise _Refused(f"it says that its run is {state.get('run')!r:.80}, not {run}")
    _check_revision(state.get("revision"))
    try:
        return position_of(state)
    except BadFile as error:
        raise _Refused(str(error)) from error


def publish_collected(ledger: Ledger, runs: Collection[str]) -> tuple[list[RunSpec], list[str]]:
    """Publish the records in the store that stages would publish, and leave all others as they are.

    Returns the runs whose records were published now, and those of `runs` that params.yaml does not ask for, as far as
    is known: the final runs of a row with a grid are known when all of its cells have records.
    """
    published, asked = [], set()
    for setting in ledger.planner.params.settings:
        for stage in ("teacher", *ledger.planner.params.methods):
            for spec in ledger.runs(setting, stage):
                asked |= {spec.id, *(teacher.id for teacher in above(spec))}
                own = [spec, *only_teaching([spec]).values()]
                published += [each for each in own if _publish(ledger.store, each)]
    return published, [run for run in runs if run not in asked]


def _publish(store: Store, spec: RunSpec) -> bool:
    """Publish a run's record if there is one. Returns whether anything was written."""
    record, path = store.record(spec), store.published_path(spec)
    if record is None or _holds(path, record):
        return False
    with told_if_full(store.published):
        write_json(path, record)
    return True


def _holds(path: Path, record: Record) -> bool:
    try:
        return path.exists() and read_record(path, record["run"]) == record
    except BadRecord:
        return False


def summary(findings: Sequence[Finding]) -> Iterator[str]:
    """What was found, in lines: each refusal with its reason, remarks with the runs they are on, and counts."""
    for finding in findings:
        if finding.outcome == REFUSED:
            yield _printable(f"refused: {finding.path} ({finding.kind}): {finding.text}")
        elif finding.text:
            yield _printable(f"{finding.outcome}: {finding.path} ({finding.kind}): {finding.text}")
    remarked = defaultdict(list)
    for finding in findings:
        for remark in finding.remarks:
            remarked[remark].append(finding.run)
    for remark, runs in remarked.items():
        more = f" and {len(runs) - SHOWN_AT_MOST} more" if len(runs) > SHOWN_AT_MOST else ""
        yield f"{remark}: {', '.join(runs[:SHOWN_AT_MOST])}{more}"
    counts = Counter((finding.kind, finding.outcome) for finding in findings)
    parts = [
        f"{counts[kind, outcome]} {kind}s {outcome}" for kind in (RECORD, CHECKPOINT) for outcome in (TAKEN, KNOWN)
    ]
    refused = sum(count for (_, outcome), count in counts.items() if outcome == REFUSED)
    yield f"{', '.join(parts)}, {refused} refused and left where they are"


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()  # names of files can be any bytes
