"""What a run is: its id follows all that its result depends on, and nothing else."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kdstudy.params import load_params
from kdstudy.results import choose
from kdstudy.study import METHODS, Planner, build_method, describe_method

ROOT = Path(__file__).parent.parent


@pytest.fixture
def planner() -> Planner:
    params = load_params(ROOT / "params.yaml")
    return Planner(params, dict.fromkeys(params.datasets, "0" * 64))


def spec_of(planner, row="kd", seed=0, setting="digits"):
    return next(spec for spec in planner.final(setting, "response", row, {}) if spec.seed == seed)


@pytest.mark.parametrize(
    "change",
    [
        {"data_checksum": "1" * 64},
        {"held_out": 10},
        {"network": "wrn_16_1"},
        {"method": "relative_v2"},
        {"hyperparameters": (("ce_weight", 0.1), ("kd_weight", 0.9), ("temperature", 3.0))},
        {"seed": 9},
        {"teacher": None},
    ],
)
def test_the_id_follows_what_matters(planner, change):
    spec = spec_of(planner)
    assert replace(spec, **change).id != spec.id


def test_the_id_follows_the_recipe_the_teacher_and_the_revision(planner, monkeypatch):
    spec = spec_of(planner)
    assert replace(spec, recipe=replace(spec.recipe, flip=True)).id != spec.id
    longer = replace(spec.teacher, recipe=replace(spec.teacher.recipe, epochs=31))
    assert replace(spec, teacher=longer).id != spec.id
    before = replace(spec).id
    monkeypatch.setattr("kdstudy.train.REVISION", 10**6)
    assert replace(spec).id != before


def test_the_id_leaves_names_and_defaults_out(planner):
    spec = spec_of(planner)
    assert replace(spec, profile="x", setting="x", stage="x", purpose="x", row="x", dataset="x").id == spec.id
    # 0.1, 0.9 and 4.0 are vanilla KD's defaults
    assert replace(spec, hyperparameters=()).id == spec.id


def test_runs_of_one_seed_share_their_teacher(planner):
    for seed in (0, 1, 2):
        own = planner.teacher("digits", seed)
        taught = [spec_of(planner, row, seed).teacher for row in planner.rows("digits", "response")]
        assert {spec.id for spec in taught if spec.purpose == "final"} == {own.id}
        between = {spec.row: spec.teacher for spec in taught if spec.purpose == "teaching"}
        assert between == {"class_distance: teacher": None, "assistant: teacher": own}


def test_tuning_holds_images_out_of_student_and_teacher(planner):
    cells = planner.tuning("cifar100_wrn_16_1", "response", "two_temperature")
    assert len(cells) == 18
    assert {cell.held_out for cell in cells} == {cell.teacher.held_out for cell in cells} == {5000}
    finals = planner.final("cifar100_wrn_16_1", "response", "two_temperature", {})
    assert {spec.held_out for spec in finals} == {0}


def test_a_plateau_never_watches_the_test_set(planner):
    finals = planner.final("cifar10_resnet50", "response", "kd", {})
    assert {(spec.held_out, spec.recipe.schedule) for spec in finals} == {(5000, "plateau")}


def test_a_setting_limits_its_rows(planner):
    rows = planner.rows("cifar10_resnet50", "response")
    assert "relative_v2" in rows and "relative_v3" not in rows
    assert planner.rows("digits", "response") == list(planner.params.methods["response"])


def test_choice_takes_the_best_validation_and_breaks_ties_alike(planner):
    cells = planner.tuning("cifar100_wrn_16_1", "response", "kd")

    def records(accuracies):
        return [{"scores": {} if a is None else {"val_accuracy": a}} for a in accuracies]

    assert choose(cells, records([1, 2, 3, 9, 5, 4, 3, 2, 1])) == cells[3]
    tied = records([1, 7, 3, 7, 5, 4, 7, 2, None])
    assert choose(cells, tied) == choose(cells[::-1], tied[::-1])
    assert dict(choose(cells, tied).hyperparameters)["ce_weight"] == 0.1


def test_build_method_refuses_by_name():
    with pytest.raises(ValueError, match="unknown method 'earthmover'; did you mean 'earth_mover'"):
        build_method("earthmover")
    with pytest.raises(ValueError, match="unknown key in kd: 'temprature'; did you mean 'temperature'"):
        build_method("kd", temprature=2.0)
    with pytest.raises(ValueError, match="temperature_right must be a finite number above 0"):
        build_method("two_temperature", temperature_right=0.0)
    with pytest.raises(ValueError, match="kd_weight must be a finite number of at least 0"):
        build_method("kd", kd_weight=-1.0)
    with pytest.raises(ValueError, match="both 0"):
        build_method("kd", kd_weight=0.0, ce_weight=0.0)


@pytest.mark.parametrize("key", METHODS)
def test_every_method_describes_itself(key):
    described = describe_method(key)
    assert json.loads(json.dumps(described)) == described
    assert described["kind"] in ("none", "response", "feature", "relation")
    assert described["paper"]
    assert described["phases"] or key == "few_sample"  # which is solved in closed form


def test_every_method_has_a_row():
    rows = load_params(ROOT / "params.yaml").methods.values()
    used = {row.method for stage in rows for row in stage.values()}
    used |= {own.method for stage in rows for row in stage.values() for own in row.taught_by if own.method}
    assert used == set(METHODS)
