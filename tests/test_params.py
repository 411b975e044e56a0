"""params.yaml is read whole or refused by name."""

import copy
from pathlib import Path

import pytest
import yaml

from kdstudy.params import load_params, parse_params
from kdstudy.study import check_methods

ROOT = Path(__file__).parent.parent
TREE = yaml.safe_load((ROOT / "params.yaml").read_text())


def changed(place: str, value: object) -> dict:
    tree = copy.deepcopy(TREE)
    node = tree
    *path, last = place.split("/")
    for key in path:
        node = node[key]
    node[last] = value
    return tree


def test_the_committed_file_is_sound():
    params = load_params(ROOT / "params.yaml")
    check_methods(params)
    assert set(params.settings_of("quick")) == {"digits", "digits_equal"}
    assert len(params.settings_of("thesis")) == 7 + 9 + 1  # the thesis's, the survey's, and that of A Gift from KD


def test_the_thesis_recipe_is_the_thesis_recipe():
    recipe = load_params(ROOT / "params.yaml").recipes["step"]
    assert (recipe.epochs, recipe.batch, recipe.milestones, recipe.factor) == (200, 128, (60, 120, 160), 0.2)
    assert (recipe.learning_rate, recipe.momentum, recipe.weight_decay) == (0.1, 0.9, 5e-4)


@pytest.mark.parametrize(
    ("row", "count"), [("kd", 9), ("relative_v3", 9), ("earth_mover", 9), ("two_temperature", 18), ("ce", 0)]
)
def test_the_thesis_grid_has_its_cells(row, count):
    cells = load_params(ROOT / "params.yaml").grids["thesis"].cells(row)
    assert len(cells) == count
    assert len({tuple(sorted(cell.items())) for cell in cells}) == count
    assert all(abs(cell["ce_weight"] + cell["kd_weight"] - 1) < 1e-12 for cell in cells)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("recipes/quick/epoch", 3, r"unknown key in recipes.quick: 'epoch'; did you mean 'epochs'"),
        ("recipes/quick/epochs", 0, r"recipes.quick: epochs must be a finite number above 0, not 0"),
        ("recipes/quick/epochs", 2.5, r"recipes.quick.epochs must be a whole number, not 2.5"),
        (
            "recipes/quick/learning_rate",
            "1e-1",
            r"must be a number, not '1e-1' \(YAML reads 1e-1 as text; write 1.0e-1",
        ),
        ("recipes/quick/momentum", True, r"recipes.quick.momentum must be a number, not True"),
        ("recipes/quick/flip", 1, r"recipes.quick.flip must be true or false, not 1"),
        ("recipes/quick/milestones", [24, 15], r"milestones must rise"),
        ("recipes/quick/precision", "fp8", r"precision must be one of bf16, fp32, fp64, not 'fp8'"),
        ("recipes/quick", 3, r"recipes must map names to mappings"),
        ("settings/digits/profile", "quik", r"unknown profile of setting digits: 'quik'; did you mean 'quick'"),
        ("settings/digits/dataset", "digit", r"did you mean 'digits'"),
        ("settings/digits/recipe", "stepp", r"did you mean 'step'"),
        ("settings/digits/grid", "quik", r"did you mean 'quick'"),
        ("settings/digits/seeds", [], r"settings.digits.seeds must be distinct numbers"),
        ("settings/digits/seeds", [1, 1], r"settings.digits.seeds must be distinct numbers"),
        ("settings/digits/seeds", "0", r"settings.digits.seeds must be a list"),
        ("settings/digits/methods", ["kdd"], r"did you mean 'kd'"),
        ("settings/digits", {"profile": "quick"}, r"settings.digits lacks dataset, teacher, student, recipe, seeds"),
        ("grids/quick/rows/kdd", ["temperature"], r"unknown row of grid quick: 'kdd'"),
        ("grids/quick/rows/kd", ["temprature"], r"did you mean 'temperature'"),
        ("recipe", {}, r"unknown key in params.yaml: 'recipe'; did you mean 'recipes'"),
    ],
)
def test_a_mistake_is_refused_by_name(place, value, message):
    with pytest.raises(ValueError, match=message):
        parse_params(changed(place, value))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (
            "methods/response/kd/temperature",
            0.0,
            r"methods.response.kd: kd: temperature must be a finite number above 0",
        ),
        ("methods/response/kd/temprature", 2.0, r"unknown key in kd: 'temprature'; did you mean 'temperature'"),
        ("methods/response/kd/ce_weight", -0.1, r"ce_weight must be a finite number of at least 0"),
        ("methods/response/earth_moverr", {}, r"unknown method 'earth_moverr'; did you mean 'earth_mover'"),
        ("grids/thesis/axes/wrong", [{"temperature_wrong": -1.0}], r"methods.response.two_temperature: .*above 0"),
    ],
)
def test_a_mistake_in_a_method_is_refused_by_name(place, value, message):
    with pytest.raises(ValueError, match=message):
        check_methods(parse_params(changed(place, value)))


def test_overrides(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text())
    params = load_params(path, ["recipes.step.epochs=5", "recipes.step.milestones=[2, 3]", "settings.digits.seeds=[7]"])
    assert (params.recipes["step"].epochs, params.recipes["step"].milestones) == (5, (2, 3))
    assert params.settings["digits"].seeds == (7,)
    with pytest.raises(ValueError, match="did you mean 'recipes'"):
        load_params(path, ["recipe.step.epochs=5"])
    with pytest.raises(ValueError, match=r"unknown key in recipes\.step: 'epoch'"):
        load_params(path, ["recipes.step.epoch=5"])
    with pytest.raises(ValueError, match="PLACE=VALUE"):
        load_params(path, ["recipes.step.epochs"])
    with pytest.raises(ValueError, match="holds a value"):
        load_params(path, ["recipes.step.epochs.x=5"])


def test_a_file_that_is_no_yaml_or_no_mapping(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("a: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_params(path)
    path.write_text("- a")
    with pytest.raises(ValueError, match="must hold a mapping"):
        load_params(path)
