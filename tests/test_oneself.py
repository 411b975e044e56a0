"""Who taught a network, what its exits need and reach, and what its generations come to."""

from pathlib import Path

import pytest
from scored import images, line, results, row

from kdstudy.models import build_model, count_parameters
from kdstudy.oneself import (
    controls_reading,
    exit_names,
    exit_scores,
    exits_table,
    generation_names,
    generation_scores,
    lineage_table,
    self_reading,
)
from kdstudy.params import load_params
from kdstudy.study import Planner

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def planner() -> Planner:
    params = load_params(ROOT / "params.yaml")
    return Planner(params, dict.fromkeys(params.datasets, "0" * 64))


def test_a_lineage_goes_back_to_the_labels_and_names_no_teacher_who_did_not_teach(planner):
    text = lineage_table(planner, "digits").data
    assert line(text, "born_again_1")[2] == "CE student"
    assert line(text, "born_again_3")[2] == "CE student → Born-again 1 → Born-again 2"
    assert line(text, "born_again_ensemble")[2].count(";") == 2
    assert line(text, "own_teacher")[2] == "its own last classifier"
    assert line(text, "virtual_teacher_code")[2] == "a formula"
    assert line(text, "bigger")[1:] == ["wrn_10_1", "the labels alone"]
    assert line(text, "bigger_taught")[1:] == ["wrn_10_1", "CE student"]
    epochs = planner.final("digits", "self", "poorly_taught", {})[0].teacher.epochs
    assert line(text, "poorly_taught")[2] in (
        f"wrn_10_1 after {epochs} epochs of labels",
        "wrn_10_1 after 1 epoch of labels",
    )
    assert "teaches itself" in lineage_table(planner, "digits_equal").data


def test_an_exit_needs_the_stages_up_to_it_and_its_head():
    cells = [each.split("|") for each in exits_table("wrn_10_0.25", images()).data.splitlines() if "exit" in each]
    headed = build_model("wrn_10_0.25+heads", classes=3, channels=1, image_size=(8, 8))
    up_to = [headed.backbone.stem, headed.backbone.stages[0], headed.heads[0]]
    assert int(cells[0][2].replace(",", "")) == sum(map(count_parameters, up_to))
    assert len(cells) == 2 and int(cells[1][2].replace(",", "")) > int(cells[0][2].replace(",", ""))


def scored(method: str, accuracy: float, further: dict | None = None, seed: int = 0, **more) -> dict:
    usual = {"setting": "digits", "stage": "self", "ece": 2.0, "teacher_accuracy": 90.0}
    return row(method, seed, accuracy, further, **usual | more)


EXITS = {"exit_1": 60.0, "exit_2": 70.0, "ensemble": 78.0}


def test_exits_stand_shallow_to_deep_seed_by_seed():
    scores = exit_scores(results(scored("ce", 75.0), scored("own_teacher", 80.0, EXITS)))
    assert exit_names(scores) == ["exit 1", "exit 2", "last", "together"]
    assert scores["seed 0"].to_dict() == {"exit 1": 60.0, "exit 2": 70.0, "last": 80.0, "together": 78.0}


def test_generations_stand_in_their_order():
    runs = [scored("born_again_2", 72.0), scored("ce", 70.0), scored("born_again_1", 71.0), scored("kd", 99.0)]
    scores = generation_scores(results(*runs))
    assert [scores["seed 0"].get(name) for name in generation_names()] == [70.0, 71.0, 72.0, None, None]


def test_the_reading_says_what_helped_and_what_did_not():
    runs = [
        scored("ce", 75.0, ece=4.0),
        scored("own_teacher", 80.0, EXITS),
        scored("born_again_1", 76.0),
        scored("born_again_2", 74.0),
        scored("born_again_ensemble", 77.5),
        scored("bigger_taught", 91.0, ece=13.5),
        scored("poorly_taught", 60.0, ece=30.0),
        scored("snapshot", 81.0, ece=14.5),
    ]
    text = self_reading(results(*runs), "digits").data
    assert "exit 1 60.00 %, exit 2 70.00 %, the last classifier 80.00 %, all together 78.00 %" in text
    assert "does not help here (-2.00 points)" in text
    assert "generation by generation: 75.00 %, 76.00 %, 74.00 %." in text
    assert "reach 77.50 %, +1.50 points against the best of them alone (Born-again 1)" in text
    assert "91.00 %, by a teacher that has 90.00 %. The student is ahead of its teacher" in text
    assert "60.00 %, by a teacher that has 90.00 %. The student is not ahead of its teacher" in text
    assert "CE student 4.0): Vanilla KD, poor teacher 30.0, Snapshot distillation 14.5." in text


def test_runs_of_another_setting_or_no_runs_are_not_read():
    elsewhere = scored("own_teacher", 80.0, EXITS) | {"setting": "elsewhere"}
    assert self_reading(results(elsewhere), "digits").data == "- No network that teaches itself has finished."


def test_each_row_is_held_against_what_it_would_be_without_its_teacher():
    runs = [scored("born_again_1", 76.0, seed=seed) for seed in (0, 1)]
    runs += [scored("born_again_2", 74.0, seed=seed) for seed in (0, 1)] + [scored("bigger", 90.0), scored("ce", 70.0)]
    rows = ["born_again_1", "born_again_2", "bigger", "bigger_taught"]
    text = controls_reading(results(*runs), "digits", rows).data
    assert "Born-again 2, less its control Born-again 1: -2.00 points" in text
    assert "Born-again 1, less its control CE student: +6.00 points" in text and "igger" not in text
