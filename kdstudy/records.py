"""Records of runs as JSON: what one must hold, the seal that shows it is unaltered, and the id that follows from it."""

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

Record = dict[str, Any]

RUN = re.compile(r"[0-9a-f]{16}")  # an id
STATUS = ("finished", "diverged")
# what every record holds; what it says beyond these is for readers
FIELDS: dict[str, type | tuple[type, ...]] = {
    "run": str,
    "status": str,
    "dataset": str,
    "data_checksum": str,
    "network": str,
    "method": str,
    "hyperparameters": dict,
    "recipe": dict,
    "seed": int,
    "scheme": str,
    "scores": dict,
    "further": dict,
    "history": list,
    "deployed": str,
    "student_parameters": int,
    "network_epochs": int,
    "seconds": (int, float),
    "started": str,
    "finished": str,
    "device": str,
    "torch": str,
    "commit": str,
    "identity": dict,
    "revision": int,
    "sessions": list,
    "resumes": int,
    "weights_sha256": (str, type(None)),
    "sha256": str,
}
# fields that repeat what the identity says, by their names there
REPEATED = {
    "data_checksum": "data",
    "held_out": "held_out",
    "network": "network",
    "method": "method",
    "seed": "seed",
    "teacher_run": "teacher",
    "revision": "revision",
}


class BadRecord(ValueError):
    """A record that cannot be used; the message says which and why."""


def run_id(identity: dict[str, Any]) -> str:
    """The id of the run whose result depends on this and nothing else: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def seal(record: Record) -> Record:
    """The record with a checksum of all that it says."""
    return record | {"sha256": _checksum(record)}


def _checksum(record: Record) -> str:
    content = {name: value for name, value in record.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def read_record(path: Path, run: str) -> Record:
    """The record of a run from a file.

    Raises BadRecord, naming the file, if it is torn, altered, incomplete or another run's.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        problem = _problem(record)
    except (ValueError, RecursionError) as error:
        problem = str(error)
    if problem:
        raise BadRecord(f"{path} is no record of a run ({problem}); remove it to have the run made again")
    if record["run"] != run:
        raise BadRecord(f"{path} is the record of run {record['run']}, not {run}")
    return record


def _refuse_constant(word: str) -> float:
    raise ValueError(f"JSON has no {word}")


def _problem(record: Any) -> str:
    """What is wrong with a parsed record, in words; "" for nothing."""
    if not isinstance(record, dict):
        return f"it holds a {type(record).__name__}"
    for name, kind in FIELDS.items():
        if name not in record:
            return f"{name} is missing"
        if not isinstance(record[name], kind) or isinstance(record[name], bool):
            return f"{name} is {record[name]!r:.80}"
    if record["status"] not in STATUS:
        return f"status is {record['status']!r:.80}"
    wrong = [name for name, value in record["scores"].items() if not _is_number(value)]
    if wrong or not all(map(_is_number, record["further"].values())):
        return f"a score is no number: {', '.join(wrong) or 'further'}"
    if not all(isinstance(epoch, dict) for epoch in record["history"]):
        return "an epoch of its history is no mapping"
    if not all(isinstance(sitting, dict) for sitting in record["sessions"]):
        return "a sitting of it is no mapping"
    if record["status"] == "finished" and "test_accuracy" not in record["scores"]:
        return "it is finished without a test accuracy"
    if (record["status"] == "finished") != (record["weights_sha256"] is not None):
        return f"it is {record['status']}, and weights_sha256 is {record['weights_sha256']!r:.80}"
    return _misfit(record)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < sys.float_info.max  # neither NaN nor a whole number beyond all floats


def _misfit(record: Record) -> str:
    """What does not fit the seal or the id; "" for nothing."""
    if record["sha256"] != _checksum(record):
        return "it does not fit its checksum: it was altered or torn"
    if run_id(record["identity"]) != record["run"]:
        return "its id is not that of what it says it depends on"
    for name, own in REPEATED.items():
        if record.get(name) != record["identity"].get(own):
            return f"{name} is {record.get(name)!r:.80}, but by its id it is {record['identity'].get(own)!r:.80}"
    if not record["sessions"] or record["resumes"] != len(record["sessions"]) - 1:
        return f"it tells of {len(record['sessions'])} sittings and {record['resumes']} resumes"
    return ""
