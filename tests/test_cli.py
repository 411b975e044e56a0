"""The command line as its users meet it: lists, errors in one line, and a run without DVC and Jupyter."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdstudy.__main__ import main
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
    words = ["run", "--setting", "digits", "--method", "kd", "--method", "ce", "--seed", "0"]
    words += ["--set", "recipes.quick.epochs=1", "--set", "recipes.quick.milestones=[]", "--out", "elsewhere"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "kdstudy", *words]
    first, again = (subprocess.run(command, env=environment, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert "took" in first.stderr
    assert not (folder / ".kdstudy").exists()
    table = [line.split()[:3] for line in first.stdout.splitlines()[1:]]
    assert table == [["kd", "tuning", "0"], ["kd", "tuning", "0"], ["kd", "final", "0"], ["ce", "final", "0"]]
    assert (again.stdout, again.stderr) == (first.stdout, "")


def test_a_budget_stops_in_time_and_the_next_call_goes_on(folder, capsys):
    words = ["run", "--setting", "digits", "--method", "ce", "--seed", "0", "--out", "elsewhere"]
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
        (["run", "--setting", "digits", "--set", "recipes.quick.batch=900"], "batch must be at most the 719"),
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
    assert main(["run", "--setting", "digits", "--out", "elsewhere"]) == 1
    assert "elsewhere" in capsys.readouterr().err
