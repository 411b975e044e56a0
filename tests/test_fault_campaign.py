"""The campaign itself: its witnesses and judges notice what goes wrong, and a short one through DVC goes well."""

import re
from pathlib import Path

import pandas as pd
import pytest
from faults import interruptions, shortages, storage
from faults.campaign import KillCampaign, Plan
from faults.outcome import Outcome, missing_runs, shown, write_table, wrong_runs
from faults.scenarios import SCENARIOS
from faults.study import Study, results_of
from faults.witness import Event, lost_seconds, misdeeds, read_events, sittings


def events(*lines: str) -> list[Event]:
    """Of one process "1" unless a line says otherwise: what, run, step, seconds."""
    found = []
    for line in lines:
        what, run, step, seconds, *process = line.split()
        found.append(Event(what, run, (0, 0, int(step)), int(*process or "1"), float(seconds)))
    return found


GOOD = ["start a 0 0.0", "step a 1 0.1", "step a 2 0.2", "save a 2 0.3", "step a 3 0.4"]


def test_a_run_that_goes_on_from_its_checkpoint_is_no_misdeed():
    resumed = events(*GOOD, "start a 2 9.0 2", "step a 3 9.1 2", "kept a 0 9.2 2")
    assert misdeeds(resumed, 0.5) == []
    first, second = sittings(resumed)
    assert (first.began, first.saved, first.unsaved_steps, first.finished) == ((0, 0, 0), (0, 0, 2), 1, False)
    assert (second.began, second.finished) == ((0, 0, 2), True)
    assert lost_seconds(resumed) == pytest.approx(0.1)  # of the first: the second has finished


@pytest.mark.parametrize(
    ("later", "sentence"),
    [
        (["start a 0 9.0 2"], r"a went on from \(0, 0, 0\), but had saved \(0, 0, 2\)"),
        (["kept a 0 0.5", "start a 2 9.0 2"], "a was trained again after it had a record"),
        (["step a 4 1.0", "step a 5 1.1"], "a had no checkpoint for 0.7 s"),
    ],
)
def test_misdeeds_are_told(later, sentence):
    (told,) = misdeeds(events(*GOOD, *later), 0.5)
    assert re.fullmatch(sentence, told)


def test_runs_of_two_processes_are_not_mixed(tmp_path):
    lines = [
        "start a 0 0 0 7 0.5",
        "start b 0 0 0 8 0.6",
        "step a 0 0 1 7 0.7",
        "step b 0 0 1 8 0.8",
        "save a 0 0 1 7 1",
    ]
    path = tmp_path / "witness"
    path.write_text("\n".join(lines) + "\nstep b 0 0")
    first, second = sittings(read_events(path))
    assert (first.run, first.unsaved_steps, second.run, second.unsaved_steps) == ("a", 0, "b", 1)


def test_results_that_differ_are_counted(tmp_path):
    study = Study(tmp_path / "study")
    study.complete()
    expected = study.results
    assert missing_runs(expected, expected) == wrong_runs(expected, expected) == 0
    weights = sorted(study.store.glob("*/weights.safetensors"))
    content = bytearray(weights[0].read_bytes())
    content[-1] ^= 1
    weights[0].write_bytes(content)
    assert wrong_runs(study.results, expected) == 1
    record = weights[1].with_name("record.json")
    record.write_text(re.sub(r'"nll": 0\.', '"nll": 1.', record.read_text()))
    assert wrong_runs(study.results, expected) == 2
    record.write_text(re.sub(r'"started": ".*"', '"started": "then"', record.read_text()))
    assert wrong_runs(study.results, expected) == 2
    weights[2].with_name("record.json").unlink()
    assert missing_runs(results_of(study.store, study.published), expected) == 1


def test_the_table_names_no_place_of_the_machine(tmp_path):
    said = f"stripes   50 %  stripes kd\nerror: {tmp_path}/runs/0123456789abcdef/x.pt | {Path(__file__)}"
    outcome = Outcome("one", "how", shown(said, tmp_path), "nothing", 0, 0, ())
    bad = Outcome("two", "how", "", "nothing", 1, 0, ("left running: x",))
    assert outcome.ok and not bad.ok
    write_table([outcome, bad], tmp_path)
    table = pd.read_csv(tmp_path / "faults.csv", keep_default_na=False)
    assert table.loc[0, "what the user sees"] == "error: ./runs/RUN/x.pt | test_fault_campaign.py"
    assert list(table.result) == ["as promised", "left running: x"]
    assert len((tmp_path / "faults.md").read_text().splitlines()) == 4


def test_every_scenario_is_in_the_table_and_tested():
    import test_faults
    import test_faults_of_resources

    def is_scenario(value) -> bool:
        return callable(value) and getattr(value, "__annotations__", {}).get("return") is Outcome

    named = {name: value for module in (interruptions, shortages, storage) for name, value in vars(module).items()}
    defined = {value for name, value in named.items() if is_scenario(value) and name[0] != "_" and name != "judged"}
    tested = [*test_faults.SCENARIOS, *test_faults_of_resources.SCENARIOS]
    assert set(SCENARIOS.values()) == defined == set(tested) and len(tested) == len(defined)


@pytest.mark.pipeline
def test_a_short_campaign_through_dvc(tmp_path):
    said = []
    plan = Plan(tmp_path, kills=6, target="teacher@digits_equal", seed=1, longest_gap=12.0)
    outcome = KillCampaign(plan, said.append).run()
    assert outcome.ok, (outcome, said)
    assert sum(text.startswith("kill ") for text in said) == 6
    # a campaign that is started again has nothing left to do but to compare
    assert KillCampaign(plan, said.append).run().ok
    assert sum(text.startswith("kill ") for text in said) == 6
