"""Every corruption of a finished study is found and named, a sound one is called so, and nothing on disk is touched."""

import copy
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_execute import stripes

from kdstudy import provenance, verify
from kdstudy.checkpoint import file_checksum
from kdstudy.device import data_path
from kdstudy.execute import Executor, open_ledger
from kdstudy.image_set import save_image_set
from kdstudy.records import run_id, seal
from kdstudy.store import Store

ROOT = Path(__file__).parent.parent
SHORT = {
    **{"epochs": 2, "batch": 16, "learning_rate": 0.05, "milestones": [1]},
    **{"crop_padding": 1, "flip": False, "precision": "fp32", "stop_patience": 1},
}
COMMON = {"profile": "quick", "dataset": "stripes", "teacher": "resnet8x0.5", "student": "wrn_10_0.25"}
RESULTS, TABLE = Path("runs/quick/results.csv"), Path("reports/quick/tables/comparison_stripes.csv")
NO_TABLES = "quick: results.csv and the tables have not been made yet"
TREE = {
    "profiles": {"quick": {"device": "cpu", "threads": 1, "cohort": 4}, "later": {}},
    "datasets": {"stripes": {"source": "npz", "validation": 12}, "unmade": {"source": "npz", "validation": 0}},
    "recipes": {"short": SHORT, "long": SHORT | {"epochs": 30, "schedule": "plateau", "stop_patience": 1}},
    "settings": {
        "stripes": COMMON | {"recipe": "short", "seeds": [0, 1], "grid": "small"},
        "together": COMMON | {"recipe": "short", "seeds": [0, 1], "methods": ["ce"], "ensembles": True},
        "held": COMMON | {"recipe": "long", "seeds": [0], "teacher_recipe": "short", "methods": ["ce"]},
        "later": COMMON | {"profile": "later", "dataset": "unmade", "recipe": "short", "seeds": [0]},
    },
    "methods": {
        "response": {
            "ce": {},
            "kd": {"temperature": 2.0},
            "ensemble": {"teachers": 2},
            "wild": {"method": "kd", "kd_weight": 1.0e38, "temperature": 10.0},
        },
        "feature": {"reused_classifier": {}, "fitnets": {}},
        "few_data": {
            "ce_50": {"method": "ce", "images": 0.5},
            "few_sample_100": {"method": "few_sample", "network": "{teacher}_pruned0.5", "samples": 40},
        },
        "self": {
            "born_again_1": {"method": "born_again", "taught_by": {"row": "ce"}},
            "born_again_ensemble": {"taught_by": [{"row": "ce"}, {"row": "born_again_1"}]},
            "assistant": {"method": "kd", "taught_by": {"method": "kd", "network": "cnn_small"}},
        },
        "online": {"mutual": {}},
        "data_free": {"data_impressions": {"scheme": {"count": 32, "iterations": 3, "batch": 16}}},
    },
    "grids": {
        "small": {
            "axes": {"temperature": [{"temperature": 2.0}, {"temperature": 5.0}]},
            "rows": {"kd": ["temperature"]},
        }
    },
}


def run_notebook(profile: str) -> None:
    """What the stage `tables` runs: the code of its notebook, with another profile. Its outputs are removed before."""
    shutil.rmtree(Path("reports", profile, "tables"), ignore_errors=True)
    space: dict[str, Any] = {}
    for cell in nbformat.read(ROOT / "notebooks" / "11_tables.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            exec(cell.source.replace('profile = "quick"', f'profile = "{profile}"'), space)
    plt.close("all")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A study of which every stage has been run."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("KDSTUDY_DEVICE", raising=False)
        write_params(TREE)
        save_image_set(stripes(), data_path("stripes"))
        for setting in ("stripes", "together", "held"):
            executor = Executor(open_ledger(), setting)
            for stage in ("teacher", *TREE["methods"]):
                executor.run_stage(stage)
        for profile in ("quick", "later"):
            run_notebook(profile)
    return folder


@pytest.fixture
def study(finished, tmp_path, monkeypatch) -> Path:
    """A copy of it, to be damaged."""
    folder = tmp_path / "study"
    shutil.copytree(finished, folder)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("KDSTUDY_DEVICE", raising=False)
    return folder


@pytest.fixture
def records(study) -> Path:
    """The same before any table is made of it: what is wrong with records shows in them alone."""
    RESULTS.unlink()
    shutil.rmtree("reports")
    return study


def write_params(tree: dict) -> None:
    Path("params.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(tree))))  # without aliases


def everything() -> dict[Path, tuple]:
    """All that is on disk, with the times of its last change."""
    paths = [Path(), *Path().rglob("*")]
    return {path: (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in paths}


def check(*profiles: str, **options: Any) -> verify.Findings:
    """What is found, after a look whether anything was changed by looking."""
    before = everything()
    found = verify.verify(profiles or ["quick"], **options)
    assert everything() == before
    return found


def published(stage: str, row: str, seed: int = 0, purpose: str = "final", setting: str = "stripes") -> Path:
    """The published record of a run."""
    ledger = open_ledger()
    specs = ledger.runs(setting, stage)
    specs += [teacher for spec in specs for teacher in spec.teachers]
    (spec,) = {spec.id: spec for spec in specs if (spec.row, spec.seed, spec.purpose) == (row, seed, purpose)}.values()
    return ledger.store.published_path(spec)


def own(path: Path) -> Path:
    """The store's copy of a published record."""
    return Store().record_path(path.stem)


def copies(path: Path) -> list[Path]:
    """A published record and all that say the same: settings can share runs."""
    return [*Path("runs").rglob(path.name), own(path)]


def edit(path: Path, change: Callable[[dict], None], resealed: bool = True) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(seal(record) if resealed else record))


def edit_both(path: Path, change: Callable[[dict], None]) -> None:
    """Edit a record wherever it is kept."""
    for copied in copies(path):
        edit(copied, change)


def assert_wrong(found: verify.Findings, path: Path, fragment: str) -> None:
    """This is found in this file; what else is wrong follows from it, in what is made from records."""
    assert any(line.startswith(str(path)) and fragment in line for line in found.wrong), found.text
    derived = ("runs/quick/results.csv", "reports/quick/tables")
    assert [line for line in found.wrong if not line.startswith((str(path), *derived))] == []


def assert_only_wrong(found: verify.Findings, path: Path, fragment: str) -> None:
    assert len(found.wrong) == 1 and found.wrong[0].startswith(str(path)) and fragment in found.wrong[0], found.text


def test_a_sound_study_is_called_so(study):
    found = check()
    assert (found.wrong, found.notes) == ([], [])
    records = len(list(Path("runs/quick").glob("*/*/*.json")))
    assert records > 25
    tables = len(list(Path("reports/quick/tables").iterdir()))
    assert found.checked == [
        f"quick: {records} published records",
        f"quick: results.csv and {tables} files of tables",
    ]
    assert found.text.splitlines()[-2:] == [
        "wrong: nothing",
        "cannot be reproduced, or not be told here: nothing",
    ]


def test_the_study_holds_what_the_checks_are_about(study):
    records = [json.loads(path.read_text()) for path in Path("runs/quick").glob("*/*/*.json")]
    assert {record["status"] for record in records} == {"finished", "diverged"}
    assert any(record["co_teacher_runs"] for record in records)
    assert any(record["status"] == "finished" and not record["history"] for record in records)
    assert any(len({epoch["phase"] for epoch in record["history"]}) > 1 for record in records)
    (held,) = (json.loads(path.read_text()) for path in Path("runs/quick/response/held").glob("*.json"))
    assert len(held["history"]) < 30


def test_what_is_on_disk_is_chosen_by_default(study):
    assert {line.split(":")[0] for line in check_all().checked} == {"quick", "later"}
    shutil.rmtree("runs/later")
    assert {line.split(":")[0] for line in check_all().checked} == {"quick", "later"}
    shutil.rmtree("reports/later")
    shutil.rmtree("reports/quick")
    assert {line.split(":")[0] for line in check_all().checked} == {"quick"}


def check_all() -> verify.Findings:
    before = everything()
    found = verify.verify()
    assert everything() == before
    return found


def test_a_profile_without_runs_is_sound(study):
    found = check("later")
    assert found.checked[0] == "later: no run is on record"
    assert (found.wrong, found.notes) == ([], [])
    for folder in ("runs", "reports", ".kdstudy", "data"):
        shutil.rmtree(folder)
    found = check()
    assert found.checked == ["quick: no run is on record"]
    assert (found.wrong, found.notes) == ([], [])


def test_an_unknown_profile_is_refused(study):
    with pytest.raises(ValueError, match="did you mean 'quick'"):
        verify.verify(["quikc"])


def set_last(name: str, value: Any) -> Callable[[dict], None]:
    return lambda record: record["history"][-1].update({name: value})


def set_score(name: str, value: Any) -> Callable[[dict], None]:
    return lambda record: record["scores"].update({name: value})


def shift_score(name: str, step: float) -> Callable[[dict], None]:
    return lambda record: record["scores"].update({name: record["scores"][name] + step})


def set_field(name: str, value: Any) -> Callable[[dict], None]:
    return lambda record: record.update({name: value})


EDITS = {
    "score": (set_score("test_accuracy", 12.5), "test_accuracy is 12.5, but after the last epoch"),
    "score in history": (set_last("test_accuracy", 12.5), "its history it is 12.5"),
    "score gone from history": (lambda record: record["history"][-1].pop("test_accuracy"), "it is None"),
    "a little": (shift_score("test_accuracy", 0.1), "but after the last epoch"),
    "teacher, a little": (shift_score("teacher_accuracy", 0.1), "but by the record of the teacher"),
    "validation": (set_score("val_accuracy", 50.0), "val_accuracy is 50.0, but after"),
    "above all": (set_last("train_accuracy", 100.1), "train_accuracy of epoch 1 is 100.1"),
    "no number": (set_last("train_accuracy", "all"), "train_accuracy of epoch 1 is all"),
    "below none": (set_score("agreement", -1), "agreement is -1"),
    "negative loss": (set_score("nll", -0.1), "nll is -0.1"),
    "others": (set_field("further", {"peer_1": 101}), "further peer_1 is 101"),
    "teacher": (set_score("teacher_accuracy", 12.5), "teacher_accuracy is 12.5, but by the record of the teacher"),
    "no teacher's": (lambda record: record["scores"].pop("teacher_accuracy"), "teacher_accuracy is None, but by"),
    "no score": (lambda record: record["scores"].clear(), "finished without a test accuracy"),
    "an epoch less": (lambda record: record["history"].pop(0), "do not follow one another"),
    "the last less": (lambda record: record["history"].pop(), "1 of the 2 epochs of phase distil"),
    "an epoch more": (
        lambda record: record["history"].append(record["history"][-1] | {"epoch": 2}),
        "3 of the 2 epochs of",
    ),
    "an epoch twice": (lambda record: record["history"].append(record["history"][-1]), "do not follow"),
    "other phases": (lambda record: [epoch.update(phase="hint") for epoch in record["history"]], "has the phases []"),
    "no history": (lambda record: record["history"].clear(), "has the phases []"),
    "no phase": (lambda record: record["history"][0].pop("phase"), "no phase or number"),
    "no number of an epoch": (set_last("epoch", [1]), "no phase or number"),
    "time": (set_field("seconds", -0.1), "seconds is -0.1"),
    "size": (set_field("student_parameters", -1), "student_parameters is -1"),
    "device": (set_field("device", "abacus"), "device is abacus, but by its sittings cpu"),
    "start": (set_field("started", "2001-01-01T00:00:00+00:00"), "started is 2001"),
    "no time": (set_field("finished", "noon"), "no times in one form"),
    "no zone": (set_field("finished", "2031-01-01T00:00:00"), "no times in one form"),
    "sitting": (set_field("sessions", ["at home"]), "a sitting of it is no mapping"),
    "sittings": (lambda record: record["sessions"].append(record["sessions"][0]), "2 sittings and 0 resumes"),
    "half a sitting": (lambda record: record["sessions"][0].pop("code"), "a sitting does not tell"),
    "seed": (set_field("seed", 7), "seed is 7, but by its id it is 1"),
    "identity": (lambda record: record["identity"].update(seed=7), "its id is not that of"),
    "recipe": (lambda record: record["recipe"].update(batch=17), "recipe.batch is 17, but by its id 16"),
    "milestones": (lambda record: record["recipe"].update(milestones=[0, 1]), "recipe.milestones is [0, 1], but"),
    "temperature": (lambda record: record["hyperparameters"].update(temperature=9.0), "temperature is 9.0, but"),
    "scheme": (set_field("scheme", "none"), "scheme is 'none', but by its id 'offline'"),
    "images": (set_field("images", 0.5), "images is 0.5, but by its id 1.0"),
    "co-teachers": (
        set_field("co_teacher_runs", ["0" * 16]),
        "co_teacher_runs is ['0000000000000000'], but by its id []",
    ),
    "no co-teacher": (set_field("co_teacher_runs", [3]), "no ids of runs"),
    "weights": (set_field("weights_sha256", 5), "weights_sha256 is 5"),
    "status": (lambda record: record.update(status="diverged", weights_sha256=None), "it diverged, and yet has scores"),
    "field": (lambda record: record.pop("recipe"), "recipe is missing"),
    "kind": (set_field("history", {}), "history is {}"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_that_was_sealed_anew_is_found(records, name):
    change, fragment = EDITS[name]
    path = published("response", "kd", seed=1)
    edit(path, change)
    assert_only_wrong(check(), path, fragment)


@pytest.mark.parametrize("name", ["score", "recipe", "seed", "time"])
def test_an_edit_that_was_not_sealed_is_found(study, name):
    path = published("response", "kd", seed=1)
    edit(path, EDITS[name][0], resealed=False)
    found = check()
    assert_wrong(found, path, "does not fit its checksum")
    if name != "recipe":  # which is in no table
        assert any("kd" in line or "results.csv" in line for line in found.wrong)


def test_a_record_rewritten_throughout_is_betrayed_by_results(study):
    path = published("response", "kd", seed=1)

    def change(record):
        record["scores"]["test_accuracy"] = record["history"][-1]["test_accuracy"] = 99.5

    true = json.loads(path.read_text())["scores"]["test_accuracy"]
    edit_both(path, change)
    found = check()
    line = next(line for line in found.wrong if line.startswith("runs/quick/results.csv"))
    assert f"test_accuracy: it has '{true}', the records give '99.5'" in line
    assert any(line.startswith("reports/quick/tables/comparison_stripes.tex") for line in found.wrong)


def test_a_teacher_that_did_not_teach_so_well_is_found_in_its_students(records):
    def change(record):
        record["scores"]["test_accuracy"] = record["history"][-1]["test_accuracy"] = 1.25

    path = published("teacher", "teacher", seed=0)
    edit_both(path, change)
    told = [line for line in check().wrong if f"teacher {path.stem} it is 1.25" in line]
    taught = [json.loads(record.read_text()) for record in Path("runs/quick").glob("*/*/*.json")]
    assert len(told) == sum(r["teacher_run"] == path.stem and r["status"] == "finished" for r in taught) > 5


def test_a_run_without_its_teachers_is_found(records):
    path = published("teacher", "teacher", seed=1)
    for copied in copies(path):
        copied.unlink()
    lines = [line for line in check().wrong if f"its teacher is run {path.stem}" in line]
    taught = [json.loads(record.read_text()) for record in Path("runs/quick").glob("*/*/*.json")]
    assert len(lines) == sum(path.stem in (r["teacher_run"], *r["co_teacher_runs"]) for r in taught) > 5


def test_small_differences_of_a_gpu_are_told_and_not_wrong(records):
    path = published("response", "kd", seed=1)

    def change(record):
        record["scores"]["teacher_accuracy"] -= 0.2
        record["device"] = record["sessions"][0]["device"] = "NVIDIA H100"

    edit_both(path, change)
    assert f"quick: 1 run whose teacher scored up to 0.3 points off its own record: {path.stem}" in notes()
    edit_both(path, lambda record: record["scores"].update(teacher_accuracy=record["scores"]["teacher_accuracy"] - 0.2))
    (line,) = {line.split(": ", 1)[1] for line in check().wrong}  # of both of its copies
    assert "by the record of the teacher" in line


FILES = {
    "torn": (lambda path: path.write_bytes(path.read_bytes()[:-30]), "is no record of a run"),
    "empty": (lambda path: path.write_bytes(b""), "is no record of a run"),
    "zeros": (lambda path: path.write_bytes(bytes(4096)), "is no record of a run"),
    "no text": (lambda path: path.write_bytes(b"\xff\xfe{}"), "is no record of a run"),
    "list": (lambda path: path.write_text("[]"), "it holds a list"),
    "nan": (lambda path: path.write_text(path.read_text().replace('"seconds": ', '"seconds": NaN, "s": ')), "no NaN"),
    "another run's": (lambda path: shutil.copyfile(published("response", "ce"), path), "is the record of run"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_record_is_found(records, name):
    damage, fragment = FILES[name]
    path = published("response", "kd", seed=1)
    damage(path)
    found = check()
    assert any(str(path) in line and fragment in line for line in found.wrong), found.text


def test_a_record_in_another_place_is_found(records):
    path = published("response", "kd", seed=1)
    moved = Path("runs/quick/feature/stripes") / path.name
    path.rename(moved)
    assert_only_wrong(check(), moved, f"it belongs to {path.parent}")


@pytest.mark.parametrize("place", ["feature/stripes", "response/held", "response/nowhere", "none/stripes"])
def test_a_copy_of_a_record_in_another_place_is_found(records, place):
    path = published("response", "kd", seed=1)
    copied = Path("runs/quick") / place / path.name
    copied.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, copied)
    assert_only_wrong(check(), copied, f"it belongs to {path.parent}")


def test_a_teacher_that_two_settings_share_belongs_to_both(study):
    tree = copy.deepcopy(TREE)
    tree["settings"]["twin"] = tree["settings"]["stripes"] | {"methods": ["ce"], "seeds": [0]}
    del tree["settings"]["twin"]["grid"]
    write_params(tree)
    assert check().wrong == []  # the twin's tables have not been made anew, but nothing of its own is published
    Executor(open_ledger(), "twin").run_stage("teacher")
    found = check()
    assert_only_wrong(found, Path("runs/quick/results.csv"), "rows, the records give")
    run_notebook("quick")  # in it are runs of the twin that only the other setting's stage has published
    assert check().wrong == []
    shutil.rmtree(".kdstudy")  # and in a clone there are not
    run_notebook("quick")
    assert check().wrong == []


def test_other_files_are_found_and_hidden_ones_are_not(records):
    for name in ("notes.txt", "response/notes.txt", "response/stripes/notes.txt", "response/stripes/a/b.json"):
        path = Path("runs/quick", name)
        path.parent.mkdir(exist_ok=True)
        path.write_text("?")
        assert_only_wrong(check(), path, "the study files nothing here")
        path.unlink()
    Path("runs/quick/response/.gitkeep").write_text("")
    Path("runs/quick/response/stripes/.a.json.torn-x.json").write_text("")
    assert check().wrong == []


def test_what_params_do_not_ask_for_any_more_is_found(records):
    tree = copy.deepcopy(TREE)
    tree["methods"]["feature"]["fitnets"] = {"kd_weight": 3.0}
    paths = [published("feature", "fitnets", seed) for seed in (0, 1)]
    write_params(tree)
    found = check()
    for path in paths:
        assert f"{path}: params.yaml does not ask for it any more" in found.wrong
    assert len([line for line in found.wrong if line.startswith("runs/quick/feature")]) == 2


def test_a_record_of_another_revision_is_found(records):
    path = published("response", "ce", seed=1)
    record = json.loads(path.read_text())
    record["identity"]["revision"] = record["revision"] = 0
    record["run"] = run_id(record["identity"])
    older = path.with_name(f"{record['run']}.json")
    older.write_text(json.dumps(seal(record)))
    assert_only_wrong(check(), older, "by revision 0 of the training code")


def test_a_record_of_other_data_is_found(records):
    path = published("response", "ce", seed=1)
    record = json.loads(path.read_text())
    record["identity"]["data"] = record["data_checksum"] = "0" * 64
    record["run"] = run_id(record["identity"])
    record["finished"] = record["started"] = record["sessions"][0]["started"] = "2001-01-01T00:00:00+00:00"
    other = path.with_name(f"{record['run']}.json")
    other.write_text(json.dumps(seal(record)))
    assert_only_wrong(check(), other, "another version of the data set stripes")


def test_without_a_cell_of_the_grid_final_runs_are_in_doubt(records):
    ledger = open_ledger()
    cell = ledger.store.published_path(ledger.planner.tuning("stripes", "response", "kd")[0])
    finals = [published("response", "kd", seed) for seed in (0, 1)]
    shutil.rmtree(own(cell).parent)
    cell.unlink()
    found = check()
    for path in finals:
        assert any(str(path) in line and "cells of the grid of kd have no sound record" in line for line in found.wrong)


def test_runs_that_another_cell_would_have_had_are_found(records):
    ledger = open_ledger()
    cells = [ledger.store.published_path(spec) for spec in ledger.planner.tuning("stripes", "response", "kd")]
    finals = [published("response", "kd", seed) for seed in (0, 1)]
    (chosen,) = ledger.final("stripes", "response", "kd")[:1]
    for path, spec in zip(cells, ledger.planner.tuning("stripes", "response", "kd"), strict=True):
        better = 0.0 if spec.hyperparameters == chosen.hyperparameters else 100.0

        def change(record, better=better):
            record["scores"]["val_accuracy"] = record["history"][-1]["held_out_accuracy"] = better

        edit_both(path, change)
    found = check()
    for path in finals:
        assert f"{path}: params.yaml does not ask for it any more" in found.wrong


def test_a_plateau_ends_where_it_was_found(records):
    path = published("response", "ce", setting="held")
    for cut in (lambda epochs: epochs.pop(), lambda epochs: epochs.append(epochs[-1] | {"epoch": len(epochs)})):

        def change(record, cut=cut):
            cut(record["history"])
            last = record["history"][-1]
            record["scores"] |= {"test_accuracy": last["test_accuracy"], "val_accuracy": last["held_out_accuracy"]}

        kept = path.read_text()
        edit(path, change)
        assert_only_wrong(check(), path, "of the 30 epochs of phase distil")
        path.write_text(kept)


def test_a_diverged_run_may_end_anywhere_but_not_later(records):
    path = published("response", "wild", seed=0)
    assert len(json.loads(path.read_text())["history"]) == 1
    edit(path, lambda record: record["history"].append(record["history"][0] | {"epoch": 1}))
    assert not any(str(path) in line for line in check().wrong)
    edit(path, lambda record: record["history"].append(record["history"][0] | {"epoch": 2}))
    assert_only_wrong(check(), path, "3 of the 2 epochs of phase distil")


def notes(**options: Any) -> list[str]:
    """What is noted of sound records, but for that no table is made of them."""
    found = check(**options)
    assert found.wrong == []
    return [note for note in found.notes if note != NO_TABLES]


def edit_text(path: Path, change: Callable[[list[str]], None]) -> None:
    lines = path.read_bytes().decode().split("\n")
    change(lines)
    path.write_bytes("\n".join(lines).encode())


@pytest.mark.parametrize("path", [RESULTS, TABLE], ids=["results", "table"])
def test_an_edited_cell_is_found(study, path):
    row = path.read_text().splitlines()[3].split(",")
    heads = path.read_text().splitlines()[0].split(",")
    at = heads.index("test_accuracy")
    if '"' in "".join(row[:at]):  # hyperparameters are JSON, which has commas
        at += "".join(row[:at]).count(",")
    number = heads.index("seed" if path == RESULTS else "n")
    before, after = f",{row[number]},", ",4711,"
    edit_text(path, lambda lines: lines.__setitem__(3, lines[3].replace(before, after, 1)))
    assert_only_wrong(
        check(), path, f"first in row 3, {heads[number]}: it has '4711', the records give '{row[number]}'"
    )


@pytest.mark.parametrize("path", [RESULTS, TABLE], ids=["results", "table"])
def test_dropped_and_added_rows_are_found(study, path):
    rows = len(path.read_text().splitlines()) - 1
    kept = path.read_bytes()
    edit_text(path, lambda lines: lines.pop(2))
    assert_only_wrong(check(), path, f"it has {rows - 1} rows, the records give {rows}; first in row 2, ")
    path.write_bytes(kept)
    edit_text(path, lambda lines: lines.insert(-1, lines[-2]))
    assert_only_wrong(check(), path, f"it has {rows + 1} rows, the records give {rows}; first in row {rows + 1}, ")
    path.write_bytes(kept)
    edit_text(path, lambda lines: lines.__setitem__(0, lines[0] + ",luck"))
    assert_only_wrong(check(), path, "first in row 0, ")


@pytest.mark.parametrize("path", [RESULTS, TABLE], ids=["results", "table"])
def test_other_bytes_are_found_where_cells_agree(study, path):
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert_only_wrong(check(), path, "first in line 1: it has ")
    path.write_bytes(b"\0" + path.read_bytes().replace(b"\r\n", b"\n"))
    assert_only_wrong(check(), path, "it has '")


@pytest.mark.parametrize("suffix", ["md", "tex"])
def test_an_edited_table_is_found(study, suffix):
    path = TABLE.with_suffix(f".{suffix}")
    number = next(
        n for n, line in enumerate(path.read_text().splitlines(), 1) if "Vanilla KD" in line and "CE" not in line
    )
    edit_text(path, lambda lines: lines.__setitem__(number - 1, lines[number - 1].replace("2", "3")))
    assert_only_wrong(check(), path, f"first in line {number}: it has ")


def test_missing_and_superfluous_tables_are_found(study):
    content = TABLE.read_bytes()
    TABLE.unlink()
    assert_only_wrong(check(), TABLE, "it is missing")
    TABLE.write_bytes(content)
    more = TABLE.with_name("comparison_moon.csv")
    more.write_bytes(content)
    assert_only_wrong(check(), more, "the records give no such table")
    more.unlink()
    RESULTS.unlink()
    assert_only_wrong(check(), RESULTS, "it is missing")
    shutil.rmtree(TABLE.parent)
    found = check()
    assert (found.wrong, found.notes) == ([], [NO_TABLES])


def test_a_published_record_that_is_gone_is_found_in_what_was_made_of_it(study):
    path = published("feature", "fitnets", seed=1)
    path.unlink()
    found = check()
    assert any(line.startswith(f"{RESULTS}: it has ") and "rows, the records give" in line for line in found.wrong)
    assert "1 record in the store that no stage has published" in found.checked[0]


def test_tables_that_cannot_be_made_are_told(study, monkeypatch):
    def fail(*arguments):
        raise ValueError("final runs must be one per seed")

    monkeypatch.setattr(verify, "write_tables", fail)
    assert_only_wrong(check(), TABLE.parent, "no tables can be made: final runs must be one per seed")


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_other_weights_are_found(records):
    run = published("response", "kd", seed=1).stem
    weights = Store().weights(run)
    flip_bit(weights)
    assert_only_wrong(check(), weights, f"its checksum is {file_checksum(weights)}, but the record of the run names")
    shutil.copyfile(Store().weights(published("response", "kd", seed=0).stem), weights)
    assert_only_wrong(check(), weights, "its checksum is")
    weights.unlink()
    weights.mkdir()
    assert_only_wrong(check(), weights, "cannot be read")


def test_absent_weights_are_counted(records):
    finals = [published("response", "kd", seed) for seed in (0, 1)]
    for path in finals:
        Store().weights(path.stem).unlink()
    assert notes() == ["quick: the weights of 2 runs are not here: they cannot be scored again"]
    shutil.rmtree(".kdstudy")
    assert check().wrong == []


def test_the_stores_own_records_are_checked_too(records):
    path = own(published("response", "kd", seed=1))
    kept = path.read_bytes()
    path.write_bytes(kept[:100])
    assert_only_wrong(check(), path, "is no record of a run")
    path.write_bytes(kept)
    only_there = published("feature", "fitnets", seed=1)
    only_there.unlink()
    edit(own(only_there), EDITS["score"][0])
    assert any(line.startswith(str(own(only_there))) and "test_accuracy is 12.5" in line for line in check().wrong)


def test_a_run_made_again_is_told(records):
    path = own(published("response", "kd", seed=1))
    edit(path, set_field("seconds", 4711.0))
    assert notes() == [f"quick: 1 run made again here, with the same result: {path.parent.name}"]
    edit(path, set_score("ece", 99.0))
    assert notes() == [f"quick: 1 run made again here, with another result: {path.parent.name}"]


ENSEMBLES = {
    "torn": (lambda score: None, "is no score of an ensemble"),
    "no runs": (lambda score: {"test_accuracy": 3.0}, "is no score of an ensemble"),
    "unknown run": (lambda score: score | {"runs": ["0" * 16, *score["runs"]]}, "of which there is no sound record"),
    "no run": (lambda score: score | {"runs": [[], 3]}, "of which there is no sound record"),
    "fewer runs": (lambda score: score | {"runs": score["runs"][:1]}, "it is about other runs than those of row ce"),
    "too good": (lambda score: score | {"test_accuracy": 100.5}, "test_accuracy is 100.5"),
}


@pytest.mark.parametrize("name", ENSEMBLES)
def test_a_wrong_score_of_an_ensemble_is_found(records, name):
    change, fragment = ENSEMBLES[name]
    path = Path("runs/quick/response/together/ensembles/ce.json")
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert_only_wrong(check(), path, fragment)


def test_a_score_of_an_ensemble_of_no_row_is_found(records):
    path = Path("runs/quick/response/together/ensembles/ce.json")
    shutil.copyfile(path, path.with_name("kd.json"))
    assert_only_wrong(check(), path.with_name("kd.json"), "no such row")


def in_sittings(**values: str) -> Callable[[dict], None]:
    def change(record):
        for sitting in record["sessions"]:
            sitting.update(values)
        record.update({name: value for name, value in values.items() if name in record})

    return change


def resumed(**values: str) -> Callable[[dict], None]:
    def change(record):
        record["sessions"].append(record["sessions"][0] | values)
        record["resumes"] = 1
        record.update({name: value for name, value in values.items() if name in record})

    return change


def clock_set_back(record: dict) -> None:
    record["finished"] = "2001-01-01T00:00:00+00:00"


OTHER = "0" * 16
HEAD = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
REASONS = {
    "changed code": (in_sittings(commit="abcdef012345+", code=OTHER), "changes that no commit holds (abcdef012345+)"),
    "unknown code": (in_sittings(commit="unknown", code=OTHER), "without the commit of their code"),
    "an option": (in_sittings(commit="--help", code=OTHER), "without the commit of their code"),
    "GPU": (in_sittings(device="NVIDIA H100"), "made on a GPU without `deterministic`"),
    "other device": (resumed(device="NVIDIA H100"), "stopped, and gone on with another kind of device"),
    "other torch": (resumed(torch="1.0"), "stopped, and gone on with another version of torch"),
    "clock": (clock_set_back, "ended before they began"),
}


@pytest.mark.parametrize("name", REASONS)
def test_why_a_run_cannot_be_made_again_is_told(records, name):
    change, fragment = REASONS[name]
    paths = [published("response", "kd", seed) for seed in (0, 1)]
    for path in paths:
        edit_both(path, change)
    (note,) = [note for note in notes() if fragment in note]
    assert note.startswith("quick: 2 runs ") and note.endswith((f": {paths[0].stem}, ...", f": {paths[1].stem}, ..."))


@pytest.mark.parametrize("changed", [in_sittings(commit="unknown"), in_sittings(commit="abcdef012345+")])
def test_code_that_is_here_is_not_missed(records, changed):
    edit_both(published("response", "kd"), changed)
    assert notes() == []


@pytest.mark.skipif(not HEAD, reason="needs the repository")
def test_commits_are_looked_for_in_the_repository(records, monkeypatch):
    edit_both(published("response", "kd"), in_sittings(commit=HEAD[:12], code=OTHER))
    assert notes() == []
    edit_both(published("response", "kd"), in_sittings(commit=OTHER))
    assert "1 run made by code of commit 0000000000000000, which is not in this repository" in notes()[0]
    for cached in (verify._has_repository, verify._git_answers):
        cached.cache_clear()
    monkeypatch.setenv("PATH", "")
    (note,) = notes()
    assert "git or the repository is not here" in note
    for cached in (verify._has_repository, verify._git_answers):
        cached.cache_clear()


def test_a_deterministic_gpu_is_not_noted(records):
    deterministic = in_sittings(device="NVIDIA H100", command="python -m kdstudy run --deterministic --setting stripes")
    edit_both(published("response", "kd"), deterministic)
    assert notes() == []
    edit_both(published("response", "kd"), in_sittings(command="python -m kdstudy run"))
    tree = copy.deepcopy(TREE)
    tree["profiles"]["quick"]["deterministic"] = True
    write_params(tree)
    assert notes() == []


def test_versions_of_torch_in_one_table_are_told(records):
    edit_both(published("response", "kd"), in_sittings(torch="1.0"))
    assert notes() == [f"quick: tables of stripes compare runs of torch 1.0, {torch.__version__}"]


def test_data_that_is_not_here_or_is_other_data_is_told(records):
    records = len({path.name for path in Path("runs/quick").glob("*/*/*.json")})
    data_path("stripes").unlink()
    data_path("stripes").with_suffix(".json").unlink()
    (note,) = notes()
    assert note.startswith(f"quick: {records} runs trained on stripes, which is not here (`python -m kdstudy data")
    images = stripes()
    images.x_train[0] ^= 1
    save_image_set(images, data_path("stripes"))
    (note,) = notes()
    assert note.startswith(f"quick: {records} runs trained on another version of stripes than is here")


def test_networks_score_again_what_their_records_say(study):
    found = check(rescore=True)
    finished = [path for path in Path(".kdstudy/runs").glob("*/weights.safetensors")]
    assert found.checked[-1] == f"quick: {len(finished)} networks scored again"
    assert (found.wrong, found.notes) == ([], [])


def weaken(weights: Path) -> None:
    tensors = load_file(weights)
    last = [name for name in tensors if name.endswith("bias")][-1]
    tensors[last] = torch.arange(len(tensors[last]), dtype=torch.float32) * 1e6
    save_file(tensors, weights)


def test_a_network_that_scores_otherwise_is_found(records):
    path = published("response", "kd", seed=1)
    weights = Store().weights(path.stem)
    weaken(weights)
    edit_both(path, set_field("weights_sha256", file_checksum(weights)))
    assert check().wrong == []
    told = json.loads(path.read_text())["scores"]["test_accuracy"]
    expected = 100 / 3  # all images are taken for the last class
    assert math.isclose(expected, told) is False
    assert_only_wrong(check(rescore=True), weights, f"its test accuracy is {round(expected, 6)} on cpu")
    save_file({}, weights)
    edit_both(path, set_field("weights_sha256", file_checksum(weights)))
    (line,) = check(rescore=True).wrong
    assert str(weights) in line and "belong to another network" in line


def test_a_small_difference_is_a_note_to_another_device_alone(records):
    path = published("response", "kd", seed=1)

    def worse(record):
        record["scores"]["test_accuracy"] -= 0.2
        record["history"][-1]["test_accuracy"] -= 0.2

    edit_both(path, worse)
    assert check().wrong == []
    assert_only_wrong(check(rescore=True), Store().weights(path.stem), "its test accuracy is")
    edit_both(path, in_sittings(device="NVIDIA H100"))
    (note,) = [note for note in notes(rescore=True) if "that score" in note]
    assert note.startswith("quick: 1 run that score up to 0.3 points more or less on cpu") and path.stem in note


def test_altered_data_is_told_when_networks_are_scored(records):
    flip_bit(data_path("stripes"))
    found = check(rescore=True)
    assert found.wrong and all("data/stripes.npz" in line for line in found.wrong)


def json_values() -> st.SearchStrategy:
    leaves = (
        st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
    )
    return st.recursive(
        leaves, lambda each: st.lists(each, max_size=2) | st.dictionaries(st.text(), each, max_size=2), max_leaves=4
    )


def places(value: Any, above: tuple = ()) -> Iterator[tuple]:
    """The paths to all values inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*above, key)
        yield from places(inner, (*above, key))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_nonsense_under_a_seal_never_ends_in_a_traceback(records, data):
    path = next(Path("runs/quick/self/stripes").glob("*.json"))
    kept = path.read_bytes()
    record = json.loads(kept)
    *above, key = data.draw(st.sampled_from(list(places(record))))
    inside = record
    for step in above:
        inside = inside[step]
    inside[key] = data.draw(json_values())
    if data.draw(st.booleans()):
        record["run"] = run_id(record["identity"]) if isinstance(record["identity"], dict) else record["run"]
    renamed = (
        path.with_name(f"{record['run']}.json") if isinstance(record["run"], str) and len(record["run"]) == 16 else path
    )
    renamed = renamed if "/" not in renamed.stem and "\0" not in renamed.stem else path
    path.unlink()
    renamed.write_text(json.dumps(seal(record)))
    try:
        assert isinstance(check().text, str)
    finally:
        renamed.unlink()
        path.write_bytes(kept)


def test_what_the_repository_holds_is_sound_without_notebook_pipeline_and_plots():
    blocked = ["IPython", "jupyterlab", "papermill", "nbformat", "nbconvert", "dvc", "matplotlib"]
    program = f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
    program += (
        "from kdstudy.verify import verify\nfound = verify(['thesis'])\nprint(found.text)\nassert not found.wrong"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "  thesis: " in done.stdout


def test_the_code_that_runs_is_the_code_that_is_asked_about():
    assert len(provenance.code()) == len(OTHER)
