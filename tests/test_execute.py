"""Stages on disk: what is finished is never trained again, what is missing is, and nothing else."""

import hashlib
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kdstudy import figures, lesson, table_files
from kdstudy.answers import before_alignment, teacher_answers
from kdstudy.checkpoint import BadFile, save_weights
from kdstudy.cohort import Cohort
from kdstudy.device import choose_device, choose_devices, data_path
from kdstudy.evaluate import logits_of
from kdstudy.execute import Executor, cohorts, open_ledger
from kdstudy.few_samples import pruned_state
from kdstudy.image_set import ImageSet, save_image_set
from kdstudy.logit_table import LogitTable
from kdstudy.memory import OutOfMemory
from kdstudy.models import build_model, count_parameters
from kdstudy.params import load_params, parse_params
from kdstudy.results import RESULT_COLUMNS
from kdstudy.stopping import Stopped
from kdstudy.store import Store
from kdstudy.study import SCHEMES, Planner
from kdstudy.tables import share_table
from kdstudy.train import Training

TREE = {
    "profiles": {"quick": {"device": "cpu", "threads": 1}},
    "datasets": {"stripes": {"source": "npz", "validation": 12}},
    "recipes": {
        "short": {
            **{"epochs": 2, "batch": 16, "learning_rate": 0.05, "milestones": [1]},
            **{"crop_padding": 1, "flip": False, "precision": "fp32"},
        }
    },
    "settings": {
        "stripes": {
            **{"profile": "quick", "dataset": "stripes", "teacher": "cnn_small", "student": "wrn_10_0.25"},
            **{"recipe": "short", "seeds": [0, 1], "grid": "small"},
        }
    },
    "methods": {"response": {"ce": {}, "kd": {"temperature": 2.0}, "relative_v2": {"temperature": 2.0}}},
    "grids": {
        "small": {
            "axes": {"temperature": [{"temperature": 2.0}, {"temperature": 5.0}]},
            "rows": {"kd": ["temperature"]},
        }
    },
}


def stripes() -> ImageSet:
    """Three classes of oblong noisy images, told apart by where a bright stripe lies."""
    generator = np.random.default_rng(0)

    def part(n):
        labels = np.arange(n) % 3
        images = generator.integers(0, 120, (n, 8, 12, 1), np.uint8)
        images[np.arange(n), 2 + 2 * labels] += 100
        return images, labels

    return ImageSet("stripes", *part(60), *part(30))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KDSTUDY_DEVICE", raising=False)
    write_params(TREE)
    save_image_set(stripes(), data_path("stripes"))
    return tmp_path


def write_params(tree: dict) -> None:
    Path("params.yaml").write_text(yaml.safe_dump(tree))


def executor() -> Executor:
    return Executor(open_ledger(store=Store(Path("store"), Path("runs"))), "stripes")


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """The runs that are trained from now on, as "method seed"."""
    runs, start = [], Training.start

    def spy(self):
        method = getattr(self.scheme, "method", None)
        runs.append(f"{type(method).__name__} {self.seed}")
        start(self)

    monkeypatch.setattr(Training, "start", spy)
    return runs


def test_a_stage_is_trained_once_and_published(folder, trained):
    first = executor()
    teachers = first.run_stage("teacher")
    assert len(trained) == 3  # two seeds and one for tuning
    specs = first.run_stage("response")
    assert len(trained) == 3 + 2 + (2 + 2) + 2
    frame = first.ledger.frame([*teachers, *specs])
    assert tuple(frame.columns) == RESULT_COLUMNS
    assert frame.test_accuracy.between(0, 100).all()
    assert frame[frame.purpose == "tuning"].val_accuracy.notna().all()
    assert frame[frame.purpose == "final"].val_accuracy.isna().all()

    trained.clear()
    again = executor()
    again.run_stage("teacher")
    assert again.ledger.frame([*teachers, *again.run_stage("response")]).equals(frame)
    assert trained == []

    published = {path.stem for path in Path("runs/quick/response/stripes").iterdir()}
    assert published == {spec.id for spec in specs}


def test_an_edited_number_trains_that_method_only(folder, trained):
    executor().run_stage("response")
    trained.clear()
    tree = json.loads(json.dumps(TREE))
    tree["methods"]["response"]["relative_v2"]["temperature"] = 3.0
    write_params(tree)
    before = set(Path("runs/quick/response/stripes").iterdir())
    executor().run_stage("response")
    assert trained == ["RelativeV2 0", "RelativeV2 1"]
    after = set(Path("runs/quick/response/stripes").iterdir())
    assert len(before - after) == len(after - before) == 2  # records that nothing asks for are not published


def test_published_records_alone_make_a_run_finished(folder, trained):
    executor().run_stage("teacher")
    executor().run_stage("response")
    shutil.rmtree("store")
    trained.clear()
    executor().run_stage("teacher")
    executor().run_stage("response")
    assert trained == []
    # a run that is missing brings its teacher, whose weights are gone, and no other run
    victim = next(spec for spec in executor().ledger.final("stripes", "response", "ce") if spec.seed == 1)
    executor().store.published_path(victim).unlink()
    executor().run_stage("response")
    assert trained == ["CrossEntropy 1", "CrossEntropy 1"]


def test_a_diverging_student_stops_nobody(folder, trained):
    tree = json.loads(json.dumps(TREE))
    tree["methods"]["response"]["kd"] = {"method": "kd", "kd_weight": 1.0e38, "temperature": 10.0}
    tree["grids"]["small"]["rows"] = {}
    write_params(tree)
    specs = executor().run_stage("response")
    frame = executor().ledger.frame(specs)
    assert set(frame[frame.method == "kd"].status) == {"diverged"}
    assert frame[frame.method == "kd"].test_accuracy.isna().all()
    assert set(frame[frame.method != "kd"].status) == {"finished"}
    trained.clear()
    executor().run_stage("response")
    assert trained == []


def test_choice_is_of_the_validation_images(folder):
    executor().run_stage("response")
    ledger = executor().ledger
    cells = ledger.planner.tuning("stripes", "response", "kd")
    for cell, accuracy in zip(cells, (10.0, 90.0), strict=True):
        record = ledger.store.record(cell)
        record["scores"] |= {"val_accuracy": accuracy, "test_accuracy": 100 - accuracy}
        ledger.store.write_record(record)
    assert {dict(spec.hyperparameters)["temperature"] for spec in ledger.final("stripes", "response", "kd")} == {5.0}


def test_final_runs_wait_for_every_cell(folder):
    executor().run_stage("response")
    ledger = executor().ledger
    cell = ledger.planner.tuning("stripes", "response", "kd")[1]
    ledger.store.published_path(cell).unlink()
    shutil.rmtree(ledger.store.root / cell.id)
    assert ledger.final("stripes", "response", "kd") == []
    assert len(ledger.final("stripes", "response", "ce")) == 2


@pytest.mark.parametrize(("network", "classes"), [("wrn_10_0.25", 3), ("cnn_small", 3)])
def test_a_teacher_file_that_is_not_the_records_is_refused(folder, network, classes):
    first = executor()
    first.run_stage("teacher")
    spec = first.ledger.planner.teacher("stripes", 0)
    save_weights(build_model(network, classes=classes, channels=1, image_size=8), first.store.weights(spec.id))
    with pytest.raises(BadFile, match=f"{spec.id}/weights.safetensors are torn, or not those of the record"):
        executor().run_stage("response")


def test_answers_without_weights_say_where_to_take_them_from(folder):
    first = executor()
    first.run_stage("teacher")
    spec = first.ledger.planner.teacher("stripes", 0)
    answers = teacher_answers(first.ledger, spec, torch.device("cpu"))
    assert [len(answers[part].labels) for part in ("training", "augmented", "test")] == [60, 60, 30]
    accuracy = 100 * (1 - answers["test"].wrong.double().mean().item())
    assert accuracy == pytest.approx(first.store.record(spec)["scores"]["test_accuracy"], abs=1e-4)
    first.store.weights(spec.id).unlink()
    with pytest.raises(FileNotFoundError, match=r"bring store/.*weights\.safetensors from where it was trained"):
        teacher_answers(first.ledger, spec, torch.device("cpu"))


def test_a_torn_teacher_file_is_refused(folder):
    first = executor()
    first.run_stage("teacher")
    path = first.store.weights(first.ledger.planner.teacher("stripes", 0).id)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BadFile, match="are torn, or not those of the record of stripes teacher seed 0; remove them"):
        executor().run_stage("response")


def test_a_torn_record_gives_way_to_its_published_copy_or_is_refused_and_left(folder, trained):
    specs = executor().run_stage("teacher")
    path = next(Path("store").glob("*/record.json"))
    torn = path.read_text()[:50]
    path.write_text(torn)
    trained.clear()
    with pytest.warns(
        UserWarning, match="is no record of a run .* until then its other copy, runs/quick/teacher/stripes"
    ):
        executor().run_stage("teacher")
    assert trained == [] and path.read_text() == torn
    spec = next(spec for spec in specs if spec.id == path.parent.name)
    executor().store.published_path(spec).unlink()
    with pytest.raises(ValueError, match="is no record of a run"):
        executor().run_stage("teacher")
    assert path.read_text() == torn


def test_a_folder_that_cannot_be_written_is_named(folder):
    Path("store").write_text("in the way")
    with pytest.raises(OSError, match="store"):
        executor().run_stage("teacher")


def test_data_that_was_altered_is_refused_before_training(folder, trained):
    path = data_path("stripes")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="dvc repro data@stripes"):
        executor().run_stage("teacher")
    assert trained == []


def test_a_data_set_that_was_not_made_is_named(folder):
    data_path("stripes").unlink()
    with pytest.raises(ValueError, match=r"stripes.npz does not exist; `dvc repro data@stripes`"):
        executor().run_stage("teacher")


def test_tables_are_made_without_the_data(folder):
    executor().run_stage("teacher")
    executor().run_stage("response")
    ledger = executor().ledger
    frame = ledger.frame(ledger.runs("stripes", "response"))
    assert len(frame) == 8
    shutil.rmtree("store")
    shutil.rmtree("data")
    ledger = executor().ledger
    assert ledger.frame(ledger.runs("stripes", "response")).equals(frame)


def test_a_network_that_breaks_at_its_very_last_step_has_diverged(folder, monkeypatch):
    end = Training.end_epoch

    def poisoned(self, tally):
        end(self, tally)
        if self.seed == 1 and self.finished:
            self.scheme.deployed.classifier.bias.data.fill_(float("nan"))

    executor().run_stage("teacher")
    monkeypatch.setattr(Training, "end_epoch", poisoned)
    frame = executor().ledger.frame(executor().run_stage("response"))
    assert set(frame[frame.seed == 1].status) == {"diverged"}
    assert set(frame[frame.seed == 0].status) == {"finished"}


def test_devices(monkeypatch):
    monkeypatch.delenv("KDSTUDY_DEVICE", raising=False)
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="must be auto, cpu, cuda"):
        choose_device("gpu")
    if not torch.cuda.is_available():
        assert choose_device("auto").type == "cpu"
        with pytest.raises(ValueError, match="asked for, but torch finds 0 CUDA devices"):
            choose_device("cuda")
    monkeypatch.setenv("KDSTUDY_DEVICE", "cpu")
    assert choose_device("cuda").type == "cpu"


def test_progress_reaches_the_end(folder):
    told = []
    ledger = open_ledger(store=Store(Path("store"), Path("runs")))
    Executor(ledger, "stripes", report=lambda *update: told.append(update)).run_stage("response")
    done = [update[0] for update in told]
    starts = [i for i in range(1, len(done)) if done[i] < done[i - 1]]
    assert len(starts) == 1  # the tuning cells, then the final runs
    assert told[-1][0] == told[-1][1] == max(update[1] for update in told)
    assert "relative_v2 seed 1" in told[-1][2]
    assert os.environ.get("KDSTUDY_PROGRESS") is None


def taught(rows: dict, **setting) -> dict:
    tree = json.loads(json.dumps(TREE))
    tree["methods"]["response"] = rows
    tree["grids"]["small"]["rows"] = {}
    tree["settings"]["stripes"] |= setting
    return tree


def test_runs_side_by_side_equal_those_one_after_the_other(folder):
    def weights() -> dict[str, bytes]:
        return {path.parent.name: path.read_bytes() for path in Path("store").glob("*/weights.safetensors")}

    executor().run_stage("response")
    alone = weights()
    shutil.rmtree("store")
    shutil.rmtree("runs")
    write_params(TREE | {"profiles": {"quick": {"device": "cpu", "threads": 1, "workers": 2}}})
    executor().run_stage("response")
    assert len(alone) == 11 and weights() == alone


def test_cohorts_are_spread_over_all_devices_and_each_has_its_own(folder, monkeypatch):
    write_params(FAST | profile(cohort=5))
    expected = made_anew(FAST, cohort=5)
    write_params(FAST | {"profiles": {"quick": {"device": "cpu,cpu", "threads": 1, "cohort": 5}}})
    for name in ("store", "runs"):
        shutil.rmtree(name)
    executor().run_stage("response")
    assert made() == expected
    assert {engine["runs"] for engine in engines().values()} == {2, 3}  # one cohort for each device


def test_devices_by_name(monkeypatch):
    monkeypatch.delenv("KDSTUDY_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [str(device) for device in choose_devices("auto")] == ["cuda:0", "cuda:1", "cuda:2"]
    assert choose_devices("cuda") == choose_devices("auto")
    assert [str(device) for device in choose_devices("cuda:2,cpu")] == ["cuda:2", "cpu"]
    with pytest.raises(ValueError, match="'cuda:3' was asked for, but torch finds 3"):
        choose_devices("cuda:0,cuda:3")
    monkeypatch.setenv("KDSTUDY_DEVICE", "cuda:1")
    assert [str(device) for device in choose_devices("auto")] == ["cuda:1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("KDSTUDY_DEVICE")
    assert [str(device) for device in choose_devices("auto")] == ["cpu"]


def test_a_store_above_another_takes_from_it_and_writes_nothing_there(folder, trained):
    write_params(FAST | profile(cohort=5))
    executor().run_stage("teacher")
    asked = itertools.count()
    with pytest.raises(Stopped):
        Executor(executor().ledger, "stripes", should_stop=lambda: next(asked) >= 6).run_stage("response")
    below = contents("store")
    above = open_ledger(
        store=Store(Path("out/runs"), Path("out/published"), beneath=Store(Path("store"), Path("runs")))
    )
    Executor(above, "stripes").run_stage("response")
    assert contents("store") == below
    taken = {path.parent.name for path in Path("out/runs").glob("*/record.json")}
    assert taken == {spec.id for spec in above.runs("stripes", "response")}  # not the teacher
    assert all(above.store.record(spec)["resumes"] == 1 for spec in above.runs("stripes", "response"))
    shutil.rmtree("out")
    executor().run_stage("response")
    assert {above.store.record(spec)["weights_sha256"] for spec in above.runs("stripes", "response")} == {
        record_of(spec)["weights_sha256"] for spec in above.runs("stripes", "response")
    }


def test_weights_beneath_that_no_record_vouches_for_are_left_alone(folder, trained):
    write_params(FAST | profile(cohort=5))
    (teacher,) = executor().run_stage("teacher")
    for path in (executor().store.record_path(teacher.id), executor().store.published_path(teacher)):
        path.unlink()
    below = contents("store")
    above = open_ledger(
        store=Store(Path("out/runs"), Path("out/published"), beneath=Store(Path("store"), Path("runs")))
    )
    Executor(above, "stripes").run_stage("teacher")
    assert contents("store") == below
    assert {path.name for path in Path("out/runs", teacher.id).iterdir()} >= {"record.json", "weights.safetensors"}


def test_signals_are_left_to_whoever_says_when_to_stop(folder, monkeypatch):
    heard = []
    monkeypatch.setattr(
        Executor, "make_chosen", lambda self, stage: heard.append(signal.getsignal(signal.SIGTERM)) or []
    )
    before = signal.getsignal(signal.SIGTERM)
    Executor(executor().ledger, "stripes", should_stop=lambda: False).run_stage("teacher")
    executor().run_stage("teacher")
    assert heard[0] == before != heard[1]
    assert signal.getsignal(signal.SIGTERM) == before


def contents(folder: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_run_in_between_teaches_and_is_published_with_its_stage(folder, trained):
    rows = {"ce": {}, "assisted": {"method": "kd", "taught_by": {"method": "kd", "network": "{middle}"}}}
    write_params(taught(rows, seeds=[0], networks={"middle": "wrn_10_0.5"}))
    specs = executor().run_stage("response")
    assistant, student = [spec for spec in specs if spec.row.startswith("assisted")]
    assert student.teacher == assistant and assistant.purpose == "teaching" and assistant.network == "wrn_10_0.5"
    assert assistant.teacher.network == "cnn_small" and student.network == "wrn_10_0.25"
    assert trained == ["CrossEntropy 0", "VanillaKD 0", "CrossEntropy 0", "VanillaKD 0"]
    record = Store(Path("store"), Path("runs")).record(student)
    assert record["teacher_run"] == assistant.id
    assert {path.stem for path in Path("runs/quick/response/stripes").iterdir()} == {spec.id for spec in specs}
    frame = open_ledger(store=Store(Path("store"), Path("runs"))).profile("quick")
    assert set(frame["method"]) == {"teacher", "ce", "assisted"}


def test_a_row_whose_network_the_setting_lacks_is_left_out(folder):
    write_params(taught({"ce": {}, "kd": {"network": "{plain}"}}))
    assert executor().ledger.planner.rows("stripes", "response") == ["ce"]


def test_rows_that_are_not_defined_for_a_setting_are_left_out(folder):
    write_params(taught({"ce": {}, "kd": {}}, without=["kd"]))
    assert executor().ledger.planner.rows("stripes", "response") == ["ce"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_method_that_trains_nothing_is_recorded_all_the_same(folder, workers):
    profiles = {"quick": {"device": "cpu", "threads": 1, "workers": workers}}
    row = {"network": "{teacher}_pruned0.5", "samples": 30}
    write_params(taught({"few_sample": row}, teacher="wrn_10_0.25") | {"profiles": profiles})
    executor().run_stage("teacher")
    told = []
    ledger = open_ledger(store=Store(Path("store"), Path("runs")))
    specs = Executor(ledger, "stripes", report=lambda *update: told.append(update)).run_stage("response")
    assert all(update[:2] == (0, 0) for update in told)  # no epochs, no progress
    records = [ledger.store.record(spec) for spec in specs]
    assert [record["history"] for record in records] == [[], []]
    assert all(record["status"] == "finished" and record["seconds"] >= 0 for record in records)
    frame = ledger.frame(specs)
    assert frame.test_accuracy.notna().all() and set(frame.epochs) == {0}
    assert ledger.histories(specs).empty


def test_several_teachers_of_other_seeds_teach_together(folder, trained):
    write_params(taught({"kd": {"teachers": 3}}))
    first, second = executor().run_stage("response")
    assert [teacher.seed for teacher in first.teachers] == [0, 1, 2]
    assert [teacher.seed for teacher in second.teachers] == [1, 0, 2]
    assert trained == [*(f"CrossEntropy {seed}" for seed in range(3)), "VanillaKD 0", "VanillaKD 1"]
    assert first.id != executor().ledger.planner.final("stripes", "response", "kd", {})[1].id


def test_a_share_of_the_images_is_trained_on(folder):
    write_params(taught({"ce": {}, "few": {"method": "ce", "images": 0.5}}, seeds=[0]))
    everything, few = executor().run_stage("response")
    assert few.id != everything.id
    bank = executor().data.training(0, few.recipe, few.images)
    assert len(bank) == 30 and bank.labels.bincount().tolist() == [10, 10, 10]


def test_a_share_with_fewer_images_than_classes_is_refused(folder):
    write_params(taught({"few": {"method": "ce", "images": 0.02}}, seeds=[0]))
    with pytest.raises(ValueError, match=r"0\.02 of 60 training images are 1, fewer than the 3 classes"):
        executor().run_stage("response")


def test_the_networks_of_all_seeds_are_scored_together_where_asked(folder):
    write_params(taught({"ce": {}}, ensembles=True))
    specs = executor().run_stage("response")
    store = Store(Path("store"), Path("runs"))
    found = store.ensemble("quick", "response", "stripes", "ce")
    assert found["runs"] == [spec.id for spec in specs]
    test = executor().data.watched(0, specs[0].recipe)["test"]
    probabilities = sum(logits_of(executor().maker.teacher(spec), test).softmax(dim=1) for spec in specs)
    expected = 100 * (probabilities.argmax(dim=1) == test.labels).double().mean().item()
    assert found["test_accuracy"] == pytest.approx(expected, abs=1e-6)
    executor().run_stage("response")  # publishing again leaves it
    assert store.ensemble("quick", "response", "stripes", "ce") == found


def test_a_stage_without_rows_publishes_an_empty_folder(folder):
    write_params(taught({"ce": {}}) | {"methods": {"response": {"ce": {}}, "feature": {"attention": {}}}})
    tree = yaml.safe_load(Path("params.yaml").read_text())
    tree["settings"]["stripes"]["methods"] = ["ce"]
    write_params(tree)
    assert executor().run_stage("feature") == []
    assert list(Path("runs/quick/feature/stripes").iterdir()) == []


def few_images(**setting) -> dict:
    """A teacher that can be pruned, and two stages: all images, and a half of them."""
    rows = {"ce_50": {"method": "ce", "images": 0.5}, "kd_50": {"method": "kd", "images": 0.5}}
    aligned = {"method": "few_sample", "network": "{teacher}_pruned0.5", "samples": 40}
    tree = taught({"ce": {}, "kd": {}, "dist": {}}, seeds=[0], teacher="resnet8x0.5", **setting)
    rows |= {"few_sample_50": aligned | {"images": 0.5}, "few_sample_100": aligned, "other": aligned | {"ridge": 0.1}}
    tree["methods"]["few_data"] = rows
    return tree


def test_runs_on_few_images_are_shown_beside_those_on_all(folder):
    write_params(few_images())
    first = executor()
    first.run_stage("response")
    specs = [*table_files.on_all_images(first.ledger, "stripes", "few_data"), *first.run_stage("few_data")]
    assert [spec.row for spec in specs] == ["ce", "kd", "ce_50", "few_sample_100", "few_sample_50", "kd_50", "other"]
    results = table_files.by_share(first.ledger.frame(specs), specs)
    assert list(results.method) == ["ce", "kd", "ce", "few_sample", "few_sample", "kd", "other"]
    assert list(results.share) == [100, 100, 50, 100, 50, 50, 100]
    compared = share_table(results, "stripes")
    assert list(compared.method[compared.pairs == 1]) == ["kd", "kd"]
    histories = table_files.by_share(first.ledger.histories(specs), specs)
    assert set(histories.method) == {"ce", "kd"}  # nothing is trained by gradient in the others
    assert len(figures.show_curves_by_share(histories, folder / "figures")) == 1
    text = lesson.shares_table(first.ledger.planner, "stripes", "few_data", stripes()).data
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert cells == [["50 %", "30", "10", "2", "4", "30"], ["100 %", "60", "20", "4", "8", "40"]]


def test_a_stage_that_aligns_and_trains_nothing_is_shown_without_curves(folder):
    write_params(few_images(methods=["few_sample_100"]))
    first = executor()
    specs = first.run_stage("few_data")
    assert table_files.on_all_images(first.ledger, "stripes", "few_data") == []
    assert first.ledger.frame(specs).epochs.tolist() == [0]
    histories = first.ledger.histories(specs)
    figures.show(figures.method_curves(histories), folder / "none.png")
    assert figures.show_curves_by_share(table_files.by_share(histories, specs), folder) == []


def test_a_setting_without_few_images_shows_sentences(folder):
    write_params(few_images(methods=["ce"]))
    first = executor()
    assert first.run_stage("few_data") == table_files.on_all_images(first.ledger, "stripes", "few_data") == []
    assert "nothing on fewer" in lesson.shares_table(first.ledger.planner, "stripes", "few_data", stripes()).data
    assert "no row" in lesson.rows_table(first.ledger.planner, "stripes", "few_data").data


def test_the_pruned_teacher_is_scored_before_it_is_aligned(folder):
    write_params(few_images())
    first = executor()
    (spec,) = (spec for spec in first.run_stage("few_data") if spec.row == "few_sample_100")
    teacher = first.maker.teacher(spec.teacher)
    pruned = first.data.build(spec.network, spec.recipe)
    pruned.load_state_dict(pruned_state(pruned, teacher))
    test = first.data.watched(0, spec.recipe)["test"]
    right = (pruned.eval()(next(test.plain(30))).logits.argmax(dim=1) == test.labels).double().mean().item()
    assert before_alignment(first.ledger, spec, torch.device("cpu")) == pytest.approx(100 * right)
    first.store.weights(spec.teacher.id).unlink()
    with pytest.raises(FileNotFoundError, match="without its weights"):
        before_alignment(first.ledger, spec, torch.device("cpu"))


def test_a_settings_own_hyperparameters_come_before_its_grid(folder):
    tree = taught({"ce": {}, "kd": {"temperature": 2.0, "ce_weight": 0.5}})
    tree["settings"]["stripes"]["overrides"] = {"kd": {"temperature": 3.0}}
    write_params(tree)
    planner = executor().ledger.planner
    spec = planner.final("stripes", "response", "kd", {})[0]
    assert dict(spec.hyperparameters) == {"temperature": 3.0, "ce_weight": 0.5}
    chosen = planner.final("stripes", "response", "kd", {"temperature": 7.0})[0]
    assert dict(chosen.hyperparameters)["temperature"] == 7.0
    for wrong, message in (
        ({"kd": {"temprature": 3.0}}, "temprature"),
        ({"kdd": {}}, "did you mean 'kd'"),
    ):
        tree["settings"]["stripes"]["overrides"] = wrong
        write_params(tree)
        with pytest.raises(ValueError, match=message):
            executor()


# peers, rows that teach rows, and what records say of them

PEERS = {"peers.0", "peers.1"}


@pytest.fixture
def schemes(monkeypatch) -> list:
    """The schemes that are trained from now on, as they are left."""
    kept, start = [], Training.start

    def spy(self):
        kept.append(self.scheme)
        start(self)

    monkeypatch.setattr(Training, "start", spy)
    return kept


def record_of(spec) -> dict:
    return Store(Path("store"), Path("runs")).record(spec)


def own_run(row: dict, **setting):
    """The one final run of a row, and its record."""
    write_params(taught({"own": row}, seeds=[0], **setting))
    (spec,) = [spec for spec in executor().run_stage("response") if spec.row == "own"]
    return spec, record_of(spec)


def weights_in(network: str) -> int:
    return count_parameters(build_model(network, classes=3, channels=1, image_size=(8, 12)))


def test_a_record_counts_all_peers_and_scores_each(folder, schemes):
    spec, record = own_run({"method": "mutual", "scheme": {"count": 3, "alternate": True}})
    student = weights_in("wrn_10_0.25")
    assert record["scheme"] == "peers" and record["deployed"] == "first peer" and record["partners"] == []
    assert record["scheme_options"] == {
        **{"count": 3, "together": False, "leader": False, "alternate": True, "batches": "shared"},
        **{"burn_in": 0.0, "exchange_interval": 0, "shared_stages": 0},
    }
    assert record["network_epochs"] == 3 * 2 and len(record["history"]) == 2
    assert record["trained_parameters"] == {f"peers.{number}": student for number in range(3)}
    assert record["student_parameters"] == student
    peers = schemes[-1].peers.eval()
    (images,) = executor().data.watched(0, spec.recipe)["test"].plain(30)
    labels = torch.from_numpy(stripes().y_test)
    answers = [peer(images).logits.softmax(dim=1) for peer in peers]
    scored = dict(zip(("peer_0", "peer_1", "peer_2", "ensemble"), [*answers, sum(answers)], strict=True))
    found = {name: 100 * (p.argmax(dim=1) == labels).double().mean().item() for name, p in scored.items()}
    assert record["scores"]["test_accuracy"] == pytest.approx(found.pop("peer_0"), abs=1e-5)
    assert record["further"] == pytest.approx(found, abs=1e-5)
    deployed = executor().maker.teacher(spec).eval()
    torch.testing.assert_close(deployed(images).logits, peers[0](images).logits, rtol=0, atol=0)


def test_a_record_names_partners_and_their_sizes(folder):
    spec, record = own_run({"method": "mutual", "partners": ["{teacher}", "wrn_10_0.5"]})
    assert spec.partners == ("cnn_small", "wrn_10_0.5") and record["partners"] == ["cnn_small", "wrn_10_0.5"]
    assert list(record["trained_parameters"].values()) == [
        weights_in(name) for name in ("wrn_10_0.25", "cnn_small", "wrn_10_0.5")
    ]
    assert record["student_parameters"] == weights_in("wrn_10_0.25")
    assert list(record["further"]) == ["peer_1", "peer_2", "ensemble"]


@pytest.mark.parametrize(
    ("row", "deployed", "network_epochs", "trained"),
    [
        ({"method": "ce"}, "student", 2, {"student"}),
        ({"method": "ce", "length": 2}, "student", 4, {"student"}),
        ({"method": "kd"}, "student", 2, {"student"}),
        ({"method": "fitnets", "two_stage": True, "stage": 1}, "student", 1 + 2, {"student", "adapters"}),
        ({"method": "factor_transfer"}, "student", 2, {"student", "adapters"}),  # the first phase trains no network
        ({"method": "okddip", "scheme": {"count": 3, "leader": True}}, "leader", 6, {*PEERS, "peers.2", "adapters"}),
        ({"method": "attention", "scheme": {"name": "peers"}}, "first peer", 4, PEERS),
        ({"method": "fitnets", "stage": 1, "scheme": {"name": "peers"}}, "first peer", 2 + 4, {*PEERS, "adapters"}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_a_record_counts_the_epochs_of_every_network_and_phase(folder, row, deployed, network_epochs, trained):
    networks = {"student": "cnn_small"} if row["method"] == "fitnets" else {"student": "wrn_10_1"}
    _, record = own_run(row, **networks)
    assert record["status"] == "finished" and record["deployed"] == deployed
    assert record["network_epochs"] == network_epochs
    assert set(record["trained_parameters"]) == trained
    student = weights_in(networks["student"])
    assert {count for name, count in record["trained_parameters"].items() if name != "adapters"} == {student}


def test_stages_that_branches_share_are_counted_once(folder, schemes):
    _, record = own_run({"method": "mutual", "scheme": {"count": 3, "shared_stages": 1}})
    student = weights_in("wrn_10_0.25")
    first = schemes[-1].peers[0]
    shared = sum(p.numel() for module in (first.stem, first.stages[0]) for p in module.parameters())
    counts = [student, student - shared, student - shared]
    assert record["trained_parameters"] == {f"peers.{number}": count for number, count in enumerate(counts)}
    assert record["student_parameters"] == student


def test_what_is_solved_in_closed_form_trains_nothing(folder):
    row = {"method": "few_sample", "network": "{teacher}_pruned0.5", "samples": 30}
    _, record = own_run(row, teacher="wrn_10_0.25")
    assert (record["network_epochs"], record["trained_parameters"], record["further"]) == (0, {}, {})


def test_a_run_that_diverges_counts_the_epochs_that_it_took(folder):
    _, record = own_run({"method": "mutual", "kd_weight": 1.0e38, "temperature": 10.0})
    assert record["status"] == "diverged"
    assert record["network_epochs"] == 2 * len(record["history"]) and record["further"] == {}


def test_peers_that_are_weighed_train_without_the_held_out_images(folder, schemes):
    spec, record = own_run({"method": "kdcl", "mode": "general"})
    assert spec.held_out == record["held_out"] == 12 and "val_accuracy" in record["scores"]
    assert schemes[-1].adapters["weights"].value.isfinite().all()
    assert spec.teacher.held_out == 0


def test_rows_teach_rows_and_every_run_is_made_once(folder, trained):
    rows = {
        "a_last": {"method": "born_again", "taught_by": {"row": "b_middle"}},
        "b_middle": {"method": "born_again", "taught_by": {"row": "c_first"}},
        "c_first": {"method": "ce"},
    }
    write_params(taught(rows, seeds=[0]))
    specs = executor().run_stage("response")
    assert [spec.row for spec in specs] == ["a_last", "b_middle", "c_first"]  # as they stand in the file
    assert trained == ["CrossEntropy 0", "CrossEntropy 0", "BornAgain 0", "BornAgain 0"]
    runs = {spec.row: record_of(spec) for spec in specs}
    assert runs["a_last"]["teacher_run"] == runs["b_middle"]["run"]
    assert runs["b_middle"]["teacher_run"] == runs["c_first"]["run"]
    assert runs["a_last"]["scores"]["teacher_accuracy"] == runs["b_middle"]["scores"]["test_accuracy"]
    assert {path.stem for path in Path("runs/quick/response/stripes").iterdir()} == {r["run"] for r in runs.values()}
    trained.clear()
    executor().run_stage("response")
    assert trained == []
    shutil.rmtree("store")  # a generation that is missing brings all before it
    Path("runs/quick/response/stripes", f"{runs['a_last']['run']}.json").unlink()
    executor().run_stage("response")
    assert trained == ["CrossEntropy 0", "CrossEntropy 0", "BornAgain 0", "BornAgain 0"]


def test_a_row_that_teaches_another_stages_row_is_published_with_its_own(folder):
    tree = taught({"first": {"method": "ce"}}, seeds=[0])
    tree["methods"]["later"] = {"next": {"method": "born_again", "taught_by": {"row": "first"}}}
    write_params(tree)
    (spec,) = executor().run_stage("later")
    assert {path.stem for path in Path("runs/quick/later/stripes").iterdir()} == {spec.id}
    assert not Path("runs/quick/response").exists()
    (first,) = executor().run_stage("response")
    assert spec.teacher == first


@pytest.mark.parametrize(("held_out", "share"), [(0, 1.0), (12, 1.0), (0, 0.5), (12, 0.35)])
def test_blank_images_are_as_many_and_as_large_as_those_for_training(folder, held_out, share):
    made = executor()
    recipe = made.ledger.planner.params.recipes["short"]
    blank, images = made.data.blank(held_out, recipe, share), made.data.training(held_out, recipe, share)
    assert (len(blank), blank.padding) == (len(images), images.padding)
    pairs = list(zip(blank.plain(16), images.plain(16), strict=True))
    for nothing, something in pairs:
        assert (nothing.shape, nothing.dtype, nothing.device) == (something.shape, something.dtype, something.device)
        assert not nothing.any() and something.any()
    assert not blank.labels.any() and blank.labels.dtype == torch.int64


# several runs at a time

MANY = {
    "ce": {},
    "kd": {"temperature": 2.0},
    "warm": {"method": "kd", "temperature": 4.0},
    "relative_v2": {"temperature": 2.0},
    "crd": {"negatives": 8},  # draws random numbers
    "activation_boundaries": {},  # two phases
    "few": {"method": "kd", "images": 0.5},
    "longer": {"method": "kd", "length": 2},
    "mutual": {},
}
HOW_IT_WAS_MADE = {"engine", "seconds", "started", "finished", "commit", "sessions", "resumes", "sha256"}


def profile(**options) -> dict:
    return {"profiles": {"quick": {"device": "cpu", "threads": 1, **options}}}


def made() -> dict[str, tuple[bytes | None, dict]]:
    """Weights and record of every run in the store, but for how it was made."""
    found = {}
    for path in Path("store").glob("*/record.json"):
        weights = path.with_name("weights.safetensors")
        record = {name: value for name, value in json.loads(path.read_text()).items() if name not in HOW_IT_WAS_MADE}
        found[path.parent.name] = (weights.read_bytes() if weights.exists() else None, record)
    return found


def made_anew(tree: dict, **options) -> dict[str, tuple[bytes | None, dict]]:
    """A stage from nothing."""
    for name in ("store", "runs"):
        shutil.rmtree(name, ignore_errors=True)
    write_params(tree | profile(**options))
    executor().run_stage("response")
    return made()


def engines() -> dict[str, dict]:
    """How every row's runs were made."""
    specs = executor().ledger.runs("stripes", "response")
    return {str(spec).removeprefix("stripes "): record_of(spec)["engine"] for spec in specs}


@cache
def quick_runs() -> list:
    """All runs of the quick profile, as far as they are known before any is made."""
    params = load_params(Path(__file__).parent.parent / "params.yaml")
    planner = Planner(params, dict.fromkeys(params.datasets, "checksum"))
    specs = planner.teachers("digits")
    for stage in params.methods:
        for row in planner.rows("digits", stage):
            specs += [*planner.tuning("digits", stage, row), *planner.final("digits", stage, row, {})]
    specs += [teacher for spec in specs for teacher in spec.teachers]
    return sorted({spec.id: spec for spec in specs}.values(), key=lambda spec: spec.depth)


def may_share(one, other) -> bool:
    """Whether two runs see the same batches, and the same teachers look at them."""
    schemes = [SCHEMES[spec.scheme_name] for spec in (one, other)]
    if any(scheme.family in ("online", "data_free") for scheme in schemes):
        return False
    taught = [
        [t.id for t in spec.teachers] * scheme.needs_teacher for spec, scheme in zip((one, other), schemes, strict=True)
    ]
    return taught[0] == taught[1] and all(
        getattr(one, name) == getattr(other, name)
        for name in ("depth", "held_out", "images", "recipe", "seed", "network", "dataset")
    )


@settings(deadline=None)
@given(first=st.integers(0, 300), length=st.integers(0, 80), most=st.integers(1, 12), least=st.integers(1, 16))
def test_runs_are_grouped_by_what_they_share(first, length, most, least):
    specs = quick_runs()[first : first + length]
    groups = cohorts(specs, most, least)
    assert all(isinstance(group, tuple) and 1 <= len(group) <= most for group in groups)
    assert Counter(spec.id for group in groups for spec in group) == Counter(spec.id for spec in specs)
    place = {spec.id: number for number, spec in enumerate(specs)}
    for group in groups:
        assert [place[spec.id] for spec in group] == sorted(place[spec.id] for spec in group)
        assert all(may_share(group[0], spec) for spec in group[1:])
    depths = [group[0].depth for group in groups]
    assert depths == sorted(depths)
    for depth in set(depths):
        assert depths.count(depth) >= min(least, sum(spec.depth == depth for spec in specs))

    classes: list[list[tuple]] = []  # groups that could be one
    for group in groups:
        own = next((each for each in classes if may_share(each[0][0], group[0])), None)
        if own is None:
            classes.append([group])
        else:
            own.append(group)
    for own in classes:
        sizes = [len(group) for group in own]
        assert max(sizes) - min(sizes) <= 1
    for depth in set(depths):
        own = [sum(map(len, each)) for each in classes if each[0][0].depth == depth]
        sizes = [len(group) for group in groups if group[0].depth == depth]
        for larger in range(max(sizes) + 1, most + 1):
            count = sum(-(-size // larger) for size in own)
            assert count < least or count == len(sizes)


def test_of_runs_alike_there_are_as_many_groups_as_workers():
    assert [len(group) for group in cohorts(_alike(9), 9, 4)] == [1, 2, 2, 2, 2]
    assert [len(group) for group in cohorts(_alike(11), 9, 4)] == [2, 3, 3, 3]
    assert [len(group) for group in cohorts(_alike(3), 9, 4)] == [1, 1, 1]
    assert cohorts([], 9, 4) == []


def test_runs_that_differ_in_anything_that_a_batch_or_its_teacher_depends_on_are_apart():
    one, other = _alike(2)
    assert cohorts([one, other], 9) == [(one, other)]
    teacher = replace(one.teacher, network="wrn_10_0.5")
    changes = [{"held_out": 12}, {"images": 0.5}, {"seed": 1}, {"network": "wrn_10_0.5"}, {"teacher": teacher}]
    for change in [*changes, {"recipe": one.recipe.lasting(2)}, {"co_teachers": (teacher,)}]:
        assert len(cohorts([one, replace(other, **change)], 9)) == 2, change
    untaught = [replace(one, method="ce", hyperparameters=(), teacher=each) for each in (one.teacher, None)]
    assert len(cohorts(untaught, 9)) == 2  # the one comes before runs that it may teach, the other behind
    untaught = [replace(one, method="ce", hyperparameters=(), teacher=each) for each in (one.teacher, teacher)]
    assert len(cohorts(untaught, 9)) == 1  # whom they are compared with makes no difference


def _alike(count: int) -> list:
    """Runs that differ in a hyperparameter only."""
    tree = taught({f"kd_{number}": {"method": "kd", "temperature": 1.0 + number} for number in range(count)}, seeds=[0])
    planner = Planner(parse_params(tree), {"stripes": "checksum"})
    return [spec for row in tree["methods"]["response"] for spec in planner.final("stripes", "response", row, {})]


def test_a_stage_made_in_cohorts_is_to_the_bit_what_it_is_run_by_run(folder):
    tree = taught(MANY, seeds=[0, 1])
    tree["grids"]["small"]["rows"] = {"kd": ["temperature"]}
    alone = made_anew(tree)
    assert {engine["runs"] for engine in engines().values()} == {1}
    for workers in (1, 2):
        together = made_anew(tree, cohort=4, workers=workers)
        assert together.keys() == alone.keys() and len(alone) == 3 + 2 + 2 * len(MANY)
        for run, (weights, record) in alone.items():
            assert together[run][1] == record
            assert together[run][0] == weights
        sizes = {name: engine["runs"] for name, engine in engines().items()}
        # these share a teacher, and five are two groups
        assert {sizes[f"{row} seed 0"] for row in ("kd", "warm", "relative_v2", "crd", "activation_boundaries")} == {
            2,
            3,
        }
        assert {sizes[f"{row} seed 1"] for row in ("ce", "few", "longer", "mutual")} == {1}
        assert sizes["kd seed 0 (tuning)"] == 2


FAST = taught(
    {f"kd_{number}": {"method": "kd", "temperature": 1.0 + number} for number in range(3)}
    | {"attention": {}, "crd": {"negatives": 8}},
    seeds=[0],
)


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_a_cohort_that_is_stopped_goes_on_in_other_company(steps, folder):
    expected = made_anew(FAST)
    for name in ("store", "runs"):
        shutil.rmtree(name)
    write_params(FAST | profile(cohort=5))
    executor().run_stage("teacher")
    asked = itertools.count()
    ledger = open_ledger(store=Store(Path("store"), Path("runs")))
    with pytest.raises(Stopped):
        Executor(ledger, "stripes", should_stop=lambda: next(asked) >= steps).run_stage("response")
    assert len(list(Path("store").glob("*/checkpoint.pt"))) == 5 and len(made()) == 1
    write_params(FAST | profile(cohort=2))
    executor().run_stage("response")
    assert made() == expected
    assert not list(Path("store").glob("*/checkpoint.pt"))


KILLED = """
import os, signal, sys
from pathlib import Path
from kdstudy.execute import Executor, open_ledger
from kdstudy.store import Store

told = 0
def report(done, total, text):
    global told
    told += "kd_1" in text
    if told == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
Executor(open_ledger(store=Store(Path("store"), Path("runs"))), "stripes", report=report).run_stage("response")
"""


def test_a_cohort_that_is_killed_goes_on_in_other_company(folder):
    expected = made_anew(FAST)
    for name in ("store", "runs"):
        shutil.rmtree(name)
    write_params(FAST | profile(cohort=5, checkpoint_seconds=0.0))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", KILLED, "6"], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(Path("store").glob("*/checkpoint.pt"))) == 5 and len(made()) == 1
    write_params(FAST | profile(cohort=3))
    executor().run_stage("response")
    assert made() == expected
    assert {engine["runs"] for engine in engines().values()} == {2, 3}


def test_one_of_a_cohort_that_diverges_is_recorded_and_the_others_are_what_they_were(folder):
    tree = json.loads(json.dumps(FAST))
    tree["methods"]["response"]["kd_1"] = {"method": "kd", "kd_weight": 1.0e38, "temperature": 10.0}
    expected = made_anew(tree)
    assert made_anew(tree, cohort=5) == expected
    specs = executor().ledger.runs("stripes", "response")
    statuses = {spec.row: record_of(spec)["status"] for spec in specs}
    assert [row for row, status in statuses.items() if status == "diverged"] == ["kd_1"]
    sizes = {spec.row: record_of(spec)["engine"]["runs"] for spec in specs}
    assert sizes == dict.fromkeys(sizes, 4) | {"kd_1": 5}


def test_whoever_has_ended_has_its_record_before_the_others_end(folder):
    pruned = {"network": "{teacher}_pruned0.5"}
    rows = {
        "kd": pruned | {"method": "kd"},
        "solved": pruned | {"method": "few_sample", "samples": 30},  # has no epochs
        "broken": pruned | {"method": "kd", "kd_weight": 1.0e38, "temperature": 10.0},
    }
    write_params(taught(rows, seeds=[0], teacher="wrn_10_0.25") | profile(cohort=3))
    executor().run_stage("teacher")
    ledger, seen = open_ledger(store=Store(Path("store"), Path("runs"))), []

    def report(done: float, total: float, text: str) -> None:
        known = {spec.row: ledger.store.record(spec) for spec in ledger.runs("stripes", "response")}
        seen.append({row: record["status"] for row, record in known.items() if record})

    specs = Executor(ledger, "stripes", report=report).run_stage("response")
    assert record_of(specs[0])["engine"]["runs"] in (1, 2)
    steps = 4  # of 16 images, an epoch; the first is that of two runs
    assert seen[: 2 * steps] == [{"solved": "finished"}] * 2 * steps
    assert seen[2 * steps :] == [{"solved": "finished", "broken": "diverged"}] * steps


def test_what_another_process_has_made_meanwhile_is_taken_as_it_is(folder, trained):
    write_params(FAST)
    specs = executor().run_stage("response")
    theirs = specs[1]
    place = Path("store") / theirs.id
    record, weights = (place / "record.json").read_bytes(), (place / "weights.safetensors").read_bytes()
    expected = made()
    for spec in specs:
        shutil.rmtree(Path("store") / spec.id)
    shutil.rmtree("runs")
    trained.clear()
    store, held = Store(Path("store"), Path("runs")), threading.Event()

    def other() -> None:
        with store.lock(theirs.id):
            held.set()
            time.sleep(0.5)  # the cohort waits at the lock
            (place / "weights.safetensors").write_bytes(weights)
            (place / "record.json").write_bytes(record)

    thread = threading.Thread(target=other)
    thread.start()
    held.wait()
    write_params(FAST | profile(cohort=5))
    executor().run_stage("response")
    thread.join()
    assert trained == ["AttentionTransfer 0", *["VanillaKD 0"] * 3]
    assert (place / "record.json").read_bytes() == record and made() == expected
    assert engines()["kd_0 seed 0"]["runs"] == 4


def test_a_run_that_is_named_by_a_published_record_alone_has_its_weights_made(folder, trained):
    write_params(FAST | profile(cohort=5))
    specs = executor().run_stage("response")
    expected = made()
    shutil.rmtree("store")
    trained.clear()
    executor().maker.make(specs[:2])
    assert trained == ["CrossEntropy 0", "AttentionTransfer 0", "CRD 0"]
    assert made() == {run: expected[run] for run in (specs[0].teacher.id, specs[0].id, specs[1].id)}


def test_records_say_how_they_were_made_and_tables_do_not(folder):
    write_params(FAST | profile(cohort=5))
    executor().run_stage("response")
    assert set(map(str, engines().values())) == {
        str({"runs": 5, "way": "in_turn", "graph": False, "logit_table": False})
    }
    ledger = executor().ledger
    frame = ledger.frame(ledger.runs("stripes", "response"))
    assert tuple(frame.columns) == RESULT_COLUMNS and "engine" not in RESULT_COLUMNS


def test_a_record_names_code_data_versions_device_command_and_every_sitting(folder, monkeypatch):
    write_params(FAST | profile(cohort=5))
    monkeypatch.setenv("KDSTUDY_COMMAND", "python -m kdstudy the first")
    asked = itertools.count()
    ledger = open_ledger(store=Store(Path("store"), Path("runs")))
    with pytest.raises(Stopped):
        Executor(ledger, "stripes", should_stop=lambda: next(asked) >= 15).run_stage("response")
    monkeypatch.setenv("KDSTUDY_COMMAND", "python -m kdstudy the second")
    record = record_of(executor().run_stage("response")[0])
    first, second = record["sessions"]
    assert record["resumes"] == 1
    assert [first["command"][-5:], second["command"][-6:]] == ["first", "second"]
    for each in (first, second):
        assert each["torch"] == torch.__version__ and each["python"] == platform.python_version()
        assert each["device"].startswith("cpu (") and len(each["code"]) == 16 and each["seconds"] > 0
    assert record["started"] == first["started"] <= second["started"] <= record["finished"]
    assert record["seconds"] == pytest.approx(first["seconds"] + second["seconds"], abs=0.1)
    assert record["data_checksum"] == stripes().checksum == record["identity"]["data"]
    weights = Path("store") / record["run"] / "weights.safetensors"
    assert record["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    content = {name: value for name, value in record.items() if name != "sha256"}
    assert record["sha256"] == hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize("name", ["scores", "history", "sessions", "weights_sha256"])
def test_a_record_that_was_altered_is_refused(name, folder):
    (spec,) = [spec for spec in executor().run_stage("teacher") if spec.purpose == "tuning"]
    for path in (executor().store.record_path(spec.id), executor().store.published_path(spec)):
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {name: type(record[name])()}))
    with pytest.warns(UserWarning, match="is no record"), pytest.raises(ValueError, match="is no record of a run"):
        record_of(spec)


def test_out_of_memory_halves_a_cohort_which_goes_on_where_it_was(folder, monkeypatch):
    expected = made_anew(FAST)
    for name in ("store", "runs"):
        shutil.rmtree(name)
    write_params(FAST | profile(cohort=5, checkpoint_seconds=0.0))
    executor().run_stage("teacher")
    step, steps = Cohort._between_steps, []

    def short_of_memory(self, group):
        step(self, group)
        steps.append(len(self.members))
        if len(self.members) > 3 and len(steps) % 7 == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Cohort, "_between_steps", short_of_memory)
    with pytest.warns(UserWarning, match="runs together ran out of memory, now half as many"):
        executor().run_stage("response")
    assert made() == expected
    assert max(record_of(spec)["resumes"] for spec in executor().ledger.runs("stripes", "response")) >= 1
    assert max(steps) == 5 and steps[-1] <= 3


def test_a_run_that_does_not_fit_alone_says_what_to_do(folder, monkeypatch):
    executor().run_stage("teacher")

    def short_of_memory(self, group):
        raise MemoryError

    monkeypatch.setattr(Cohort, "_between_steps", short_of_memory)
    with pytest.raises(OutOfMemory, match=r"stripes ce seed 0 ran out of memory .* its recipe's batch"):
        executor().complete([executor().ledger.final("stripes", "response", "ce")[0]])


def test_the_fastest_way_is_kept_beside_the_store_for_later_processes(folder, monkeypatch):
    tree = json.loads(json.dumps(FAST))
    tree["methods"]["response"].pop("crd")
    tree["recipes"]["short"] |= {"epochs": 12}
    write_params(tree | profile(cohort=4, way="measured"))
    executor().run_stage("response")
    ((kind, way),) = json.loads(Path("ways.json").read_text()).items()
    assert way in ("in_turn", "fused") and "4 runs" in kind
    assert {engine["way"] for engine in engines().values()} == {way}
    other = "fused" if way == "in_turn" else "in_turn"
    Path("ways.json").write_text(json.dumps({kind: other}))
    for name in ("store", "runs"):
        shutil.rmtree(name)
    executor().run_stage("response")
    assert {engine["way"] for engine in engines().values()} == {other}


# the table of a teacher's logits: 9 crops of an image here

TABLED = taught(
    {
        **{f"kd_{number}": {"method": "kd", "temperature": 1.0 + number} for number in range(3)},
        **{"ce": {}, "half": {"method": "kd", "images": 0.5}},
    },
    seeds=[0],
)
TABLED["recipes"]["short"]["epochs"] = 5
KINDRED = {"kd_0", "kd_1", "kd_2"}


@pytest.fixture
def built(monkeypatch) -> list[int]:
    """The numbers of images of the tables that are built from now on, in this process."""
    found, build = [], LogitTable.build.__func__

    def spy(cls, teacher, bank, **options):
        found.append(len(bank))
        return build(cls, teacher, bank, **options)

    monkeypatch.setattr(LogitTable, "build", classmethod(spy))
    return found


def tabled() -> set[str]:
    """The rows whose runs were made with a table."""
    return {name.split()[0] for name, engine in engines().items() if engine["logit_table"]}


def test_a_table_is_read_once_by_a_process(folder, monkeypatch):
    made_anew(TABLED, logit_table=True)
    forget(*KINDRED)
    read, load = [], LogitTable.load.__func__
    monkeypatch.setattr(LogitTable, "load", classmethod(lambda *a, **o: read.append(1) or load(*a, **o)))
    executor().run_stage("response")
    assert len(read) == 1 and tabled() == KINDRED


@pytest.mark.parametrize("options", [{}, {"cohort": 2}, {"workers": 2}], ids=str)
def test_a_table_is_made_once_for_all_that_read_logits_only_and_changes_little(folder, built, options):
    live = made_anew(TABLED)
    found = made_anew(TABLED, logit_table=True, **options)
    assert tabled() == KINDRED and built == [60] * ("workers" not in options)
    (path,) = Path("store").glob("*/logits*.safetensors")
    specs = executor().ledger.runs("stripes", "response")
    assert path.parent.name == specs[0].teacher.id
    for spec in specs:
        (weights, record), (live_weights, live_record) = found[spec.id], live[spec.id]
        if spec.row not in KINDRED:
            assert (weights, record) == (live_weights, live_record)
            continue
        assert weights != live_weights  # half precision shows
        for row, expected in zip(record["history"], live_record["history"], strict=True):
            assert row["ce"] == pytest.approx(expected["ce"], rel=2e-3)
            assert row["kd"] == pytest.approx(expected["kd"], rel=2e-2, abs=1e-3)


def test_a_table_on_disk_serves_later_runs_and_one_that_is_torn_is_made_anew_if_that_pays(folder, built):
    made_anew(TABLED, logit_table=True)
    (path,) = Path("store").glob("*/logits*.safetensors")
    whole, first = path.read_bytes(), made()
    tree = json.loads(json.dumps(TABLED))
    tree["methods"]["response"]["later"] = {"method": "kd", "temperature": 9.0}
    write_params(tree | profile(logit_table=True))
    executor().run_stage("response")  # one run alone would not pay for it
    assert built == [60] and tabled() == {*KINDRED, "later"} and path.read_bytes() == whole
    later = made()

    path.write_bytes(whole[:-100])
    forget(*KINDRED)
    executor().run_stage("response")
    assert built == [60, 60] and made() == later == later | first

    path.write_bytes(whole[:-100])
    forget("later")
    executor().run_stage("response")
    assert built == [60, 60] and tabled() == KINDRED


def forget(*rows: str) -> None:
    """Remove the records and weights of these rows."""
    ledger = executor().ledger
    for spec in ledger.runs("stripes", "response"):
        if spec.row in rows:
            shutil.rmtree(Path("store") / spec.id)
            ledger.store.published_path(spec).unlink()


@pytest.mark.parametrize(
    ("epochs", "rows", "cohort", "expected"),
    [
        (3, {"ce": {}, "attention": {}}, 1, set()),  # 9 looks at every image, no more than there are crops
        (4, {"attention": {}}, 2, set()),  # 8, by two cohorts
        (5, {"attention": {}}, 2, {60}),  # 10; the one that needs maps is trained apart
        (5, {"maps": {"method": "attention"}}, 2, {60}),
        (2, {"kd_3": {"method": "kd", "temperature": 4.0}, "kd_4": {"method": "kd", "temperature": 5.0}}, 1, {60}),
        (2, {"kd_3": {"method": "kd", "temperature": 4.0}, "kd_4": {"method": "kd", "temperature": 5.0}}, 5, set()),
        (5, {"two": {"method": "kd", "teachers": 2}}, 1, {60}),
    ],
)
def test_a_table_is_made_where_it_takes_less_of_the_teacher_than_doing_without(
    folder, built, epochs, rows, cohort, expected
):
    tree = json.loads(json.dumps(TABLED))
    tree["methods"]["response"] |= rows
    tree["recipes"]["short"]["epochs"] = epochs
    made_anew(tree, logit_table=True, cohort=cohort)
    assert set(built) == expected and len(built) == len(expected)
    others = {"ce", "half", "two", "attention", "maps"}
    assert tabled() == (set(tree["methods"]["response"]) - others if expected else set())


def test_a_teacher_whose_logits_no_table_can_hold_runs_beside_its_students(folder, monkeypatch):
    def refuse(*arguments, **options):
        raise ValueError("the teacher's logits do not fit")

    monkeypatch.setattr(LogitTable, "build", refuse)
    with pytest.warns(UserWarning, match="runs beside its students: the teacher's logits do not fit"):
        made_anew(TABLED, logit_table=True)
    assert tabled() == set()


def test_of_each_share_of_the_images_there_is_a_table_of_its_own(folder, built):
    tree = json.loads(json.dumps(TABLED))
    tree["methods"]["response"]["half"]["length"] = 2
    tree["methods"]["response"]["third"] = {"method": "kd", "images": 0.35, "length": 2}
    made_anew(tree, logit_table=True)
    assert built == [30, 60, 21] and tabled() == {*KINDRED, "half", "third"}
    forget("half", "third", "kd_1")
    executor().run_stage("response")
    assert built == [30, 60, 21] and tabled() == {*KINDRED, "half", "third"}


def test_a_table_that_memory_does_not_hold_is_not_made(folder, built, monkeypatch):
    needed = 60 * 9 * 3 * 2  # images, crops, classes, bytes; a quarter of what is free may go there
    for free, expected in ((4 * needed - 1, []), (4 * needed, [60])):
        monkeypatch.setattr("kdstudy.make.free_bytes", lambda device, free=free: free)
        made_anew(TABLED, logit_table=True)
        assert built == expected


def test_a_stop_while_a_table_is_made_leaves_none(folder, monkeypatch):
    write_params(TABLED | profile(logit_table=True))
    executor().run_stage("teacher")
    stop, build = [], LogitTable.build.__func__

    def spy(cls, *arguments, **options):
        stop.append(True)
        return build(cls, *arguments, **options)

    monkeypatch.setattr(LogitTable, "build", classmethod(spy))
    ledger = open_ledger(store=Store(Path("store"), Path("runs")))
    with pytest.raises(Stopped):
        Executor(ledger, "stripes", should_stop=lambda: bool(stop)).run_stage("response")
    assert not list(Path("store").glob("*/logits*.safetensors")) and len(made()) == 3  # the teacher, ce, half
    assert not list(Path("store").glob("*/checkpoint.pt"))  # nothing else has begun
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    executor().run_stage("response")
    assert tabled() == KINDRED
