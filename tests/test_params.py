"""params.yaml is read whole or refused by name."""

import copy
from pathlib import Path

import pytest
import yaml

from kdstudy.params import Row, TaughtBy, load_params, parse_params, parse_row
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
    assert len(params.settings_of("thesis")) == 7 + 9 + 1 + 1  # thesis, survey, A Gift from KD, online


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


def read_row(text: str) -> Row:
    return parse_row("own", yaml.safe_load(text), "methods.response.own")


def test_a_row_is_read_word_by_word():
    row = read_row(
        """
        method: mutual
        network: "{plain}"
        images: 0.5
        length: 2
        scheme: {name: peers, count: 3, alternate: true}
        partners: ["{teacher}", wrn_10_0.5]
        temperature: 3.0
        """
    )
    assert row == Row(
        "mutual",
        network="{plain}",
        images=0.5,
        length=2.0,
        scheme="peers",
        scheme_options={"count": 3, "alternate": True},
        partners=("{teacher}", "wrn_10_0.5"),
        hyperparameters={"temperature": 3.0},
    )
    assert isinstance(row.length, float)
    assert row.networks == ("{plain}", "{teacher}", "wrn_10_0.5")


def test_a_row_says_nothing_by_default():
    assert read_row("{}") == Row("own", network="{student}", length=1.0, scheme=None, scheme_options={}, partners=())
    assert read_row("{scheme: {count: 4}}") == Row("own", scheme_options={"count": 4})  # of the method's own scheme
    assert read_row("{scheme: {name: peers}}") == Row("own", scheme="peers")


def test_who_teaches_is_one_or_several_rows_or_methods():
    one = read_row("{method: kd, taught_by: {method: ce, network: wrn_10_0.5, length: 0.5, ce_weight: 2.0}}")
    between = TaughtBy(method="ce", network="wrn_10_0.5", length=0.5, hyperparameters={"ce_weight": 2.0})
    assert one == Row("kd", taught_by=(between,)) and one.networks == ("{student}", "wrn_10_0.5")
    several = read_row("{method: kd, taught_by: [{row: ce}, {method: kd, temperature: 3.0}]}")
    assert several.taught_by == (TaughtBy(row="ce"), TaughtBy(method="kd", hyperparameters={"temperature": 3.0}))
    assert several.networks == ("{student}", "{teacher}", "{teacher}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{taught_by: ce}", r"own.taught_by must be a mapping with a row or a method, not 'ce'"),
        ("{taught_by: [ce]}", r"own.taught_by must be a mapping with a row or a method, not 'ce'"),
        ("{taught_by: null}", r"own.taught_by must be a mapping with a row or a method, not None"),
        ("{taught_by: {}}", r"own.taught_by: a run that teaches is said by a row or by a method, by one of them"),
        ("{taught_by: {row: ce, method: kd}}", r"said by a row or by a method, by one of them"),
        ("{taught_by: {row: ce, temperature: 2.0}}", r"a row that teaches is taken as it is"),
        ("{taught_by: {row: ce, network: wrn_10_0.5}}", r"a row that teaches is taken as it is"),
        ("{taught_by: {row: ce, length: 0.5}}", r"a row that teaches is taken as it is"),
        ("{taught_by: {row: 3}}", r"own.taught_by.row must be text, not 3"),
        ("{taught_by: {method: ce, length: 0}}", r"own.taught_by: length must be a finite number above 0, not 0"),
        ("{taught_by: {method: ce, length: long}}", r"own.taught_by.length must be a number, not 'long'"),
        ("{taught_by: {method: ce}, teachers: 2}", r"teachers above 1 and taught_by exclude each other"),
        ("{length: 0}", r"response.own: length must be a finite number above 0, not 0.0"),
        ("{length: -1.0}", r"length must be a finite number above 0"),
        ("{length: .inf}", r"length must be a finite number above 0"),
        ("{length: .nan}", r"length must be a finite number above 0"),
        ("{length: true}", r"own.length must be a number, not True"),
        ("{scheme: peers}", r"own.scheme must be a mapping of its name and options, not 'peers'"),
        ("{scheme: [peers]}", r"own.scheme must be a mapping of its name and options"),
        ("{scheme: {name: 3}}", r"own.scheme must be text, not 3"),
        ("{partners: wrn_10_0.5}", r"own.partners must be a list, not 'wrn_10_0.5'"),
        ("{partners: [3]}", r"own.partners\[0\] must be text, not 3"),
        ("{network: 3}", r"own.network must be text, not 3"),
    ],
)
def test_a_row_that_cannot_be_read_is_refused_by_name(text, message):
    with pytest.raises(ValueError, match=message):
        read_row(text)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"own": "{method: mutual, scheme: {name: pears}}"}, "own: unknown scheme 'pears'; did you mean 'peers'"),
        ({"own": "{method: mutual, scheme: {cuont: 3}}"}, r"own: .*'cuont'; did you mean 'count'"),
        ({"own": "{method: mutual, scheme: {count: 1}}"}, "own: .*count must be a whole number of at least 2, not 1"),
        ({"own": "{method: mutual, scheme: {burn_in: often}}"}, "burn_in must be a number, not 'often'"),
        ({"own": "{method: kd, scheme: {count: 2}}"}, r"own: .*'count'"),  # an offline run has no options
        ({"own": "{method: kd, scheme: {name: peers, count: 2.0}}"}, "count must be a whole number"),
        ({"own": "{method: kd, taught_by: {row: nobody}}"}, "own: unknown row 'nobody'"),
        ({"own": "{method: kd, taught_by: {method: cee}}"}, "own: unknown method 'cee'; did you mean 'ce'"),
        ({"own": "{method: kd, taught_by: {method: ce, temprature: 2.0}}"}, r"own: .*'temprature'"),
        ({"own": "{method: kd, taught_by: {row: own}}"}, "own: row own teaches itself, by way of own"),
        (
            {"own": "{method: kd, taught_by: {row: next}}", "next": "{method: kd, taught_by: {row: own}}"},
            "own: row own teaches itself, by way of next",
        ),
        (
            {
                "own": "{method: kd, taught_by: [{row: spare}, {row: next}]}",
                "spare": "{method: ce}",
                "next": "{method: kd, taught_by: [{row: spare}, {row: last}]}",
                "last": "{method: kd, taught_by: {row: own}}",
            },
            "own: row own teaches itself, by way of next",
        ),
        # one that is not itself part of the circle is no way round it
        (
            {
                "before": "{method: kd, taught_by: {row: own}}",
                "own": "{method: kd, taught_by: {row: next}}",
                "next": "{method: kd, taught_by: {row: own}}",
            },
            "own: row own teaches itself, by way of next",
        ),
        (
            {"own": "{method: kd, taught_by: {row: kd}}"},
            "own: row kd cannot teach: which of its runs is meant depends on grid",
        ),
        (
            {"own": "{method: kd, taught_by: [{row: ce}, {row: kd}]}"},
            "own: row kd cannot teach: which of its runs is meant depends on grid",
        ),
    ],
)
def test_rows_that_cannot_be_made_are_refused_by_name(rows, message):
    tree = copy.deepcopy(TREE)
    tree["methods"]["response"] |= {name: yaml.safe_load(text) for name, text in rows.items()}
    with pytest.raises(ValueError, match=message):
        check_methods(parse_params(tree))


def test_rows_may_teach_rows_of_other_stages_and_one_of_them_twice():
    tree = copy.deepcopy(TREE)
    rows = {
        "first": {"method": "kd", "taught_by": {"row": "ce"}},
        "second": {"method": "kd", "taught_by": [{"row": "ce"}, {"row": "first"}, {"row": "ce"}]},
    }
    tree["methods"]["feature"] |= rows
    params = parse_params(tree)
    check_methods(params)
    assert params.methods["feature"]["second"].taught_by[1] == TaughtBy(row="first")
