"""The command line as its users meet it: lists, errors in one line, and a run without DVC and Jupyter."""

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from kdstudy import bench
from kdstudy.__main__ import main
from kdstudy.roofline import Limits
from kdstudy.study import METHODS

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with params.yaml and the digits, which the commands of a test run in."""
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDSTUDY_DEVICE", "cpu")
    assert main(["data", "digits"]) == 0
    return tmp_path


def test_methods_for_readers_and_for_machines(capsys):
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "WRN-40-2" in lines[0] and lines[2].split() == ["key", "kind", "scheme", "phases", "extra", "paper"]
    assert [line.split()[0] for line in lines[3:]] == list(METHODS)
    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["key"] for row in rows] == list(METHODS)
    assert {"key", "kind", "scheme", "phases", "paper", "hyperparameters", "extra_parameters"} <= set(rows[0])


def test_a_run_without_pipeline_and_what_is_finished_stays_so(folder):
    words = ["run", "--setting", "digits", "--stage", "response", "--seed", "0", "--order", "named"]
    words += ["--method", "kd", "--method", "ce"]
    words += ["--set", "recipes.quick.epochs=1", "--set", "recipes.quick.milestones=[]", "--out", "elsewhere"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "kdstudy", *words]
    first, again = (subprocess.run(command, env=environment, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert "took" in first.stderr
    assert not (folder / ".kdstudy").exists()
    *table, new = first.stdout.splitlines()[1:]
    assert [line.split()[2:5] for line in table] == [
        *[["kd", "tuning", "0"]] * 2,
        *[["kd", "final", "0"], ["ce", "final", "0"]],
    ]
    assert new == "4 of the wanted runs are on record, 4 of them new"
    assert (again.stdout, again.stderr) == (first.stdout.replace("4 of them new", "0 of them new"), "")


def test_a_budget_stops_in_time_and_the_next_call_goes_on(folder, capsys):
    words = ["run", "--setting", "digits", "--stage", "response", "--method", "ce", "--seed", "0", "--out", "elsewhere"]
    words += ["--set", "recipes.quick.epochs=60", "--set", "recipes.quick.milestones=[]"]
    started = time.monotonic()
    assert main([*words, "--budget", "2s"]) == 0
    assert time.monotonic() - started < 12
    assert "the budget is spent" in capsys.readouterr().out
    (checkpoint,) = Path("elsewhere").glob("runs/*/checkpoint.pt")
    before = checkpoint.read_bytes()
    assert main([*words, "--budget", "2s"]) == 0
    assert checkpoint.read_bytes() != before
    with pytest.raises(SystemExit):
        main([*words, "--budget", "2"])
    assert "a time reads 90s, 25m or 2h, not '2'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--setting", "digit"], "unknown setting 'digit'; did you mean 'digits'"),
        (["run", "--setting", "digits", "--method", "kdd"], "did you mean 'kd'"),
        (["run", "--setting", "digits", "--stage", "respons"], "unknown stage 'respons'; did you mean 'response'"),
        (["run", "--setting", "digits", "--set", "recipes.quick.epoch=1"], "did you mean 'epochs'"),
        (["run", "--setting", "digits", "--set", "recipes.quick.batch=900"], "batch must be at most the 899"),
        (["run", "--setting", "digits", "--set", "settings.digits.student=wrn_11_1"], "6n + 4"),
        (["run", "--setting", "digits", "--set", "settings.digits.teacher=resnet17"], "unknown model 'resnet17'"),
        (["run", "--setting", "digits", "--set", "datasets.digits.validation=899"], "can be held out, not 899"),
        (["run", "--setting", "digits", "--device", "gpu"], "device must be auto, cpu, cuda or cuda:N"),
        (
            ["run", "--setting", "cifar10_wrn_16_1"],
            "data/cifar10.json does not exist; `dvc repro data@cifar10` makes it",
        ),
        (["data", "digit"], "unknown data set 'digit'; did you mean 'digits'"),
        (["report", "quik"], "unknown profile 'quik'; did you mean 'quick'"),
    ],
)
def test_a_mistake_is_answered_in_one_line(folder, words, message, capsys, monkeypatch):
    if "--device" in words:
        monkeypatch.delenv("KDSTUDY_DEVICE")
    short = ["--set", "recipes.quick.epochs=1", "--set", "recipes.quick.milestones=[]"] if words[0] == "run" else []
    assert main(words + short) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line


def test_a_folder_that_cannot_be_written_is_named(folder, capsys):
    (folder / "elsewhere").write_text("a file where a folder should be")
    assert main(["run", "--setting", "digits", "--stage", "teacher", "--out", "elsewhere"]) == 1
    assert "elsewhere" in capsys.readouterr().err


# speed


def store_of(folder: str) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in Path(folder).glob("runs/*/weights.safetensors")}


def test_a_profiled_run_is_what_it_is_otherwise_and_leaves_trace_and_page(folder):
    words = ["run", "--setting", "digits", "--stage", "response", "--method", "ce", "--seed", "0"]
    words += [
        "--set",
        "recipes.quick.epochs=3",
        "--set",
        "recipes.quick.milestones=[]",
        "--set",
        "profiles.quick.workers=1",
    ]
    assert main([*words, "--out", "plain"]) == 0
    assert main([*words, "--out", "profiled", "--trace", "pages/first"]) == 0
    assert store_of("profiled") == store_of("plain") != {}
    trace = json.loads(gzip.open("pages/first/trace.json.gz").read())
    steps = [event for event in trace["traceEvents"] if event["name"].startswith("ProfilerStep") and event["ph"] == "X"]
    assert len(steps) == 20
    page = Path("pages/first/breakdown.md").read_text()
    assert "wrn_10_0.25, 1 at once: digits ce seed 0. 20 steps in a row" in page  # not the teacher, which comes first
    # all runs are on record: nothing is trained, and nothing is recorded
    assert main([*words, "--out", "profiled", "--trace", "pages/second"]) == 0
    assert not Path("pages/second").exists()


@pytest.fixture
def flags(monkeypatch):
    """What a command may set for its process; put back afterwards."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    threads = torch.get_num_threads()

    def read() -> tuple[bool, bool, str | None]:
        deterministic = torch.are_deterministic_algorithms_enabled()
        return deterministic, torch.backends.cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG")

    yield read
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("words", "workspace", "expected"),
    [
        ([], None, (False, True, None)),
        (["--deterministic"], None, (True, False, ":4096:8")),
        (["--deterministic"], ":16:8", (True, False, ":16:8")),  # the user's own is left
        (["--set", "profiles.quick.deterministic=true"], None, (True, False, ":4096:8")),
    ],
)
def test_results_that_repeat_are_asked_for_by_word_or_profile(folder, flags, words, workspace, expected, monkeypatch):
    if workspace:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", workspace)
    run = ["run", "--setting", "digits", "--stage", "teacher", "--seed", "0", "--out", "elsewhere"]
    run += ["--set", "recipes.quick.epochs=1", "--set", "recipes.quick.milestones=[]"]
    assert main([*run, *words]) == 0
    assert flags() == expected
    assert not expected[0] or torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.fixture
def tiny(monkeypatch, tmp_path, flags) -> list[str]:
    """Words of a benchmark of small networks on small images, on a device whose limits are known."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KDSTUDY_DEVICE", raising=False)
    pairs = {"wrn_10_0.25": "wrn_10_0.5", "wrn_10_0.5": "wrn_10_0.5"}
    limits = Limits(bandwidth=2e9, rate=5e9, number_bytes=4, device="Abacus (TM), 1 thread", clock="1 MHz")
    changes = {"PAIRS": pairs, "SHAPE": (3, 8, 8), "PROFILED_STEPS": 1, "measure_limits": lambda *_: limits}
    for name, value in changes.items():
        monkeypatch.setattr(bench, name, value)
    numbers = {"cohort": 2, "batch": 50, "images": 100, "steps": 1, "rounds": 1, "workers": 0, "threads": 1}
    words = [word for name, number in numbers.items() for word in (f"--{name}", str(number))]
    return ["bench", "--precision", "fp32", "--way", "in_turn", "--device", "cpu", "--out", "tables", *words]


def test_a_benchmark_is_a_table_to_which_other_pairs_are_added(tiny, flags, capsys):
    path = Path("tables/Abacus_TM_1_thread.csv")
    assert main([*tiny, "--student", "wrn_10_0.25"]) == 0
    told = capsys.readouterr().out
    assert f"written: {path}" in told and "round 1 of 1" in told and flags()[0] is False
    first = pd.read_csv(path)
    assert tuple(first.columns) == bench.COLUMNS
    assert list(first.variant) == ["naive", "one run", "cohort of 2"] and set(first.threads) == {1}
    assert set(first.batch) == {50} and first.ratio[0] == 1 and list(first.students) == [1, 1, 2]
    lines = path.read_text().splitlines()

    assert main([*tiny, "--student", "wrn_10_0.5", "--deterministic"]) == 0
    assert flags()[0] is True
    both = path.read_text().splitlines()
    assert both[:4] == lines and len(both) == 7  # the other pair's are what they were, to the byte
    assert all(line.startswith("wrn_10_0.5,") for line in both[4:])

    assert main([*tiny, "--student", "wrn_10_0.25"]) == 0
    again = path.read_text().splitlines()
    assert again[1:4] == both[4:] and len(again) == 7 and all(line.startswith("wrn_10_0.25,") for line in again[4:])


def test_without_a_name_all_pairs_are_measured_and_growth_has_a_table_of_its_own(tiny, monkeypatch):
    asked = []

    def growth(plan, precision, engine, tell):
        asked.append((plan.student, plan.teacher, precision, engine.way))
        return pd.DataFrame([dict.fromkeys(("series", *bench.COLUMNS), 1.0) | {"student": plan.student, "device": "X"}])

    monkeypatch.setattr(bench, "growth", growth)
    assert main([*tiny, "--growth"]) == 0
    assert asked == [(name, "wrn_10_0.5", "fp32", "in_turn") for name in ("wrn_10_0.25", "wrn_10_0.5")]
    table = pd.read_csv("tables/X_growth.csv")
    assert list(table.student) == ["wrn_10_0.25", "wrn_10_0.5"] and table.columns[0] == "series"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--student", "wrn_10_0.26"], "unknown student 'wrn_10_0.26'; did you mean 'wrn_10_0.25'"),
        (["--way", "fastest"], "way must be"),
        (["--images", "120"], "images must be whole batches of 50, so that steps are alike, not 120"),
        (["--device", "gpu"], "device must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_a_benchmark_that_is_none_is_refused_in_one_line(tiny, words, message, capsys):
    assert main([*tiny, *words]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line
    assert not Path("tables").exists()
