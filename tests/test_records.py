"""A record is what was written, complete, and of the run that its id says; anything else is refused by name."""

import hashlib
import json
from pathlib import Path

import pytest

from kdstudy.records import BadRecord, read_record, run_id, seal

IDENTITY = {"data": "d" * 64, "held_out": 0, "network": "wrn_16_1", "method": "kd", "seed": 3, "teacher": "a" * 16}
IDENTITY |= {"hyperparameters": {}, "recipe": {"epochs": 1}, "revision": 1}
RECORD = {
    **{"run": hashlib.sha256(json.dumps(IDENTITY, sort_keys=True).encode()).hexdigest()[:16], "identity": IDENTITY},
    **{"status": "finished", "dataset": "digits", "data_checksum": "d" * 64, "held_out": 0, "network": "wrn_16_1"},
    **{
        "method": "kd",
        "hyperparameters": {"temperature": 4.0},
        "recipe": {"epochs": 1},
        "seed": 3,
        "scheme": "offline",
    },
    **{"teacher_run": "a" * 16, "revision": 1, "scores": {"test_accuracy": 91.5}, "further": {}, "history": [{}]},
    **{"deployed": "student", "student_parameters": 10, "network_epochs": 1, "seconds": 1.5, "resumes": 0},
    **{"started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T00:00:02+00:00", "sessions": [{}]},
    **{"device": "cpu (x86_64)", "torch": "2.11.0", "commit": "unknown", "weights_sha256": "e" * 64},
}


def write(path: Path, record: object) -> Path:
    path.write_text(json.dumps(record))
    return path


def test_a_record_is_read_as_it_was_sealed(tmp_path):
    sealed = seal(RECORD)
    assert {name: value for name, value in sealed.items() if name != "sha256"} == RECORD
    assert read_record(write(tmp_path / "r.json", sealed), RECORD["run"]) == sealed == seal(sealed)


def test_the_order_of_what_it_says_is_no_part_of_id_and_seal(tmp_path):
    turned = {name: RECORD[name] for name in reversed(RECORD)} | {"identity": dict(reversed(IDENTITY.items()))}
    assert seal(turned)["sha256"] == seal(RECORD)["sha256"]
    assert run_id(turned["identity"]) == RECORD["run"]


@pytest.mark.parametrize("name", [*RECORD, "sha256"])
def test_nothing_can_be_left_out_or_changed(name, tmp_path):
    sealed = seal(RECORD)
    without = {key: value for key, value in sealed.items() if key != name}
    changed = sealed | {name: [sealed[name], 1]}
    for record in (without, changed):
        with pytest.raises(BadRecord, match=r"r\.json is no record of a run \(.*\); remove it"):
            read_record(write(tmp_path / "r.json", record), RECORD["run"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "seed is 4, but by its id it is 3"),
        ({"network": "wrn_16_2"}, "network is 'wrn_16_2', but by its id it is 'wrn_16_1'"),
        ({"teacher_run": None}, "teacher_run is None, but by its id it is 'aaaaaaaaaaaaaaaa'"),
        ({"identity": IDENTITY | {"seed": 4}, "seed": 4}, "its id is not that of what it says it depends on"),
        ({"status": "done"}, "status is 'done'"),
        ({"scores": {}}, "it is finished without a test accuracy"),
        ({"scores": {"test_accuracy": True}}, "a score is no number: test_accuracy"),
        ({"further": {"peer": 10**400}}, "a score is no number: further"),
        ({"weights_sha256": None}, "it is finished, and weights_sha256 is None"),
        ({"status": "diverged", "scores": {}}, "it is diverged, and weights_sha256 is 'eee"),
        ({"resumes": 1}, "it tells of 1 sittings and 1 resumes"),
        ({"sessions": [], "resumes": -1}, "it tells of 0 sittings"),
        ({"history": [1]}, "an epoch of its history is no mapping"),
        ({"seconds": True}, "seconds is True"),
    ],
)
def test_a_seal_alone_makes_no_record(change, message, tmp_path):
    path = write(tmp_path / "r.json", seal(RECORD | change))
    with pytest.raises(BadRecord) as refused:
        read_record(path, RECORD["run"])
    assert message in str(refused.value)


def test_anothers_record_and_what_is_no_json_are_refused(tmp_path):
    path = write(tmp_path / "r.json", seal(RECORD))
    with pytest.raises(BadRecord, match=f"is the record of run {RECORD['run']}, not 0123456789abcdef"):
        read_record(path, "0123456789abcdef")
    for text in ("", "[]", "null", '{"run": ', '{"run": NaN}', "[" * 100_000, "\x00"):
        path.write_text(text)
        with pytest.raises(BadRecord, match=r"r\.json is no record of a run"):
            read_record(path, RECORD["run"])
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BadRecord, match=r"r\.json is no record of a run"):
        read_record(path, RECORD["run"])
