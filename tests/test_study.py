"""What a run is: its id follows all that its result depends on, and nothing else."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kdstudy.models import build_model
from kdstudy.params import load_params, parse_params
from kdstudy.results import choose
from kdstudy.schemes import Batch
from kdstudy.study import METHODS, Planner, build_method, check_methods, describe_method
from kdstudy.train import REVISION

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
    assert planner.rows("cifar10_wrn_16_1", "response") == list(planner.params.methods["response"])


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
    assert described["phases"] or key in ("few_sample", "born_again_ensemble", "soft_tree")  # not trained by gradient


def test_every_method_has_a_row():
    rows = load_params(ROOT / "params.yaml").methods.values()
    used = {row.method for stage in rows for row in stage.values()}
    used |= {own.method for stage in rows for row in stage.values() for own in row.taught_by if own.method}
    assert used == set(METHODS)


# what a run is, in a study of our own

TOY = {
    "profiles": {"quick": {}},
    "datasets": {"toy": {"source": "npz", "validation": 12}},
    "recipes": {"short": {"epochs": 4, "batch": 16, "learning_rate": 0.05, "milestones": [2]}},
    "settings": {
        "toy": {
            **{"profile": "quick", "dataset": "toy", "teacher": "big", "student": "small", "recipe": "short"},
            **{"seeds": [0, 1], "networks": {"plain": "flat"}},
        }
    },
    "grids": {},
}


def toy_planner(rows: dict, **others) -> Planner:
    tree = json.loads(json.dumps(TOY)) | {"methods": {"response": rows} | others}
    params = parse_params(tree)
    check_methods(params)
    return Planner(params, {"toy": "c0ffee"})


def toy_spec(row: dict, seed: int = 0, **rows):
    return toy_planner({"own": row, **rows}).final("toy", "response", "own", {})[seed]


def hashed(**identity) -> str:
    """The id of these; a run on labels is the least."""
    least = {"data": "c0ffee", "held_out": 0, "network": "small", "method": "ce", "hyperparameters": {}}
    least["recipe"] = {"epochs": 4, "batch": 16, "learning_rate": 0.05, "milestones": [2]}
    text = json.dumps(least | {"seed": 0, "teacher": None, "revision": REVISION} | identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


TEACHER = hashed(network="big")


@pytest.mark.parametrize(
    ("row", "identity"),
    [
        ({"method": "ce"}, {}),
        ({"method": "kd"}, {"method": "kd"}),
        ({"method": "kd", "temperature": 3}, {"method": "kd", "hyperparameters": {"temperature": 3.0}}),
        ({"method": "kd", "images": 0.5}, {"method": "kd", "images": 0.5}),
        ({"method": "ce", "network": "{plain}"}, {"network": "flat"}),
        ({"method": "kd", "teachers": 2}, {"method": "kd", "co_teachers": [hashed(network="big", seed=1)]}),
        (
            {"method": "kd", "taught_by": {"method": "ce"}},
            {"method": "kd", "teacher": hashed(network="big")},
        ),
        (
            {"method": "kd", "taught_by": {"method": "kd", "network": "{plain}"}},
            {"method": "kd", "teacher": hashed(network="flat", method="kd", teacher=TEACHER)},
        ),
    ],
    ids=str,
)
def test_the_ids_of_rows_that_say_nothing_new_are_what_they_were(row, identity):
    assert toy_spec(row).id == hashed(**{"teacher": TEACHER} | identity)


@pytest.mark.parametrize(
    ("row", "identity"),
    [
        ({"method": "mutual"}, {}),  # peers is its own scheme
        ({"method": "mutual", "scheme": {"name": "peers"}}, {}),
        ({"method": "mutual", "scheme": {"name": "peers", "count": 2, "burn_in": 0}}, {}),
        ({"method": "mutual", "scheme": {"batches": "shared", "alternate": False}}, {}),
        ({"method": "mutual", "scheme": {"count": 3}}, {"scheme_options": {"count": 3}}),
        (
            {"method": "mutual", "scheme": {"name": "peers", "alternate": True, "burn_in": 0.5, "count": 2}},
            {"scheme_options": {"alternate": True, "burn_in": 0.5}},
        ),
        ({"method": "mutual", "partners": ["{teacher}", "x"]}, {"partners": ["big", "x"]}),
        (
            {"method": "attention", "scheme": {"name": "peers"}},
            {"method": "attention", "scheme": "peers"},
        ),
        ({"method": "attention", "scheme": {"name": "offline"}}, {"method": "attention"}),
        (
            {"method": "mutual", "length": 2.5},
            {"recipe": {"epochs": 10, "batch": 16, "learning_rate": 0.05, "milestones": [5]}},
        ),
    ],
    ids=str,
)
def test_scheme_options_partners_and_length_are_part_of_the_id_where_they_are_not_the_default(row, identity):
    assert toy_spec(row).id == hashed(**{"method": "mutual", "teacher": TEACHER} | identity)


def test_the_order_of_scheme_options_does_not_matter_and_that_of_partners_does():
    one = toy_spec({"method": "mutual", "scheme": {"burn_in": 0.5, "alternate": True}})
    assert one == toy_spec({"method": "mutual", "scheme": {"alternate": True, "burn_in": 0.5}})
    partners = (
        toy_spec({"method": "mutual", "partners": ["a", "b"]}),
        toy_spec({"method": "mutual", "partners": ["b", "a"]}),
    )
    assert partners[0].id != partners[1].id


def test_a_chain_of_rows_is_a_chain_of_runs_of_one_seed():
    rows = {
        "first": {"method": "ce", "length": 0.5},
        "second": {"method": "born_again", "taught_by": {"row": "first"}},
        "third": {"method": "born_again", "taught_by": {"row": "second"}, "variant": "cwtm"},
        "all": {"method": "kd", "taught_by": [{"row": "first"}, {"row": "second"}, {"row": "third"}]},
    }
    planner = toy_planner(rows, later={"fourth": {"method": "born_again", "taught_by": {"row": "third"}}})
    for seed in (0, 1):
        fourth = planner.final("toy", "later", "fourth", {})[seed]
        chain = [fourth]
        while chain[-1].teacher:
            chain.append(chain[-1].teacher)
        assert [spec.row for spec in chain] == ["fourth", "third", "second", "first", "teacher"]
        assert [spec.stage for spec in chain] == ["later", *["response"] * 3, "teacher"]
        assert {spec.seed for spec in chain} == {seed} and {spec.purpose for spec in chain} == {"final"}
        assert [spec.depth for spec in chain] == [4, 3, 2, 1, 0]
        assert [spec.network for spec in chain] == ["small"] * 4 + ["big"]
        teacher = hashed(network="big", seed=seed)
        short = {"epochs": 2, "batch": 16, "learning_rate": 0.05, "milestones": [1]}
        first = hashed(recipe=short, teacher=teacher, seed=seed)
        second = hashed(method="born_again", teacher=first, seed=seed)
        third = hashed(method="born_again", hyperparameters={"variant": "cwtm"}, teacher=second, seed=seed)
        ids = [hashed(method="born_again", teacher=third, seed=seed), third, second, first, teacher]
        assert [spec.id for spec in chain] == ids
        # it is the very run that its own row asks for
        assert [planner.final("toy", "response", row, {})[seed] for row in ("third", "second", "first")] == chain[1:4]
        together = planner.final("toy", "response", "all", {})[seed]
        assert [spec.id for spec in together.teachers] == [first, second, third]
        assert together.id == hashed(method="kd", teacher=first, co_teachers=[second, third], seed=seed)
    assert chain[3].epochs == 2


def test_a_row_that_teaches_is_tuned_with_the_row_that_it_teaches():
    tree = json.loads(json.dumps(TOY))
    tree["grids"] = {"few": {"axes": {"t": [{"temperature": 2.0}, {"temperature": 3.0}]}, "rows": {"kd": ["t"]}}}
    tree["settings"]["toy"]["grid"] = "few"
    tree["methods"] = {"response": {"ce": {}, "kd": {"taught_by": {"row": "ce"}}}}
    planner = Planner(parse_params(tree), {"toy": "c0ffee"})
    for cell in planner.tuning("toy", "response", "kd"):
        assert (cell.purpose, cell.held_out) == ("tuning", 12)
        assert (cell.teacher.purpose, cell.teacher.held_out, cell.teacher.row) == ("teaching", 12, "ce")
        assert cell.teacher.teacher.held_out == 12
    final = planner.final("toy", "response", "kd", {"temperature": 3.0})[0]
    assert (final.teacher.purpose, final.teacher.held_out) == ("final", 0)


def test_a_run_in_between_has_a_length_of_its_own():
    spec = toy_spec(
        {"method": "kd", "taught_by": {"method": "ce", "length": 0.1, "network": "{student}"}, "length": 2.0}
    )
    assert (spec.epochs, spec.teacher.epochs, spec.teacher.purpose) == (8, 1, "teaching")
    assert spec.teacher.teacher is None and spec.teacher.network == "small"


def test_a_row_whose_teacher_the_setting_does_not_make_is_left_out():
    rows = {
        "ce": {},
        "flat": {"method": "ce", "network": "{flatter}"},
        "own": {"method": "kd", "taught_by": {"row": "flat"}},
        "next": {"method": "kd", "taught_by": [{"row": "ce"}, {"row": "own"}]},
        "beside": {"method": "mutual", "partners": ["{flatter}"]},
    }
    assert toy_planner(rows).rows("toy", "response") == ["ce"]
    tree = json.loads(json.dumps(TOY)) | {"methods": {"response": rows}}
    tree["settings"]["toy"]["networks"]["flatter"] = "flattest"
    assert Planner(parse_params(tree), {"toy": ""}).rows("toy", "response") == list(rows)
    tree["settings"]["toy"]["without"] = ["flat"]
    assert Planner(parse_params(tree), {"toy": ""}).rows("toy", "response") == ["ce", "beside"]
    tree["settings"]["toy"] |= {"without": [], "methods": ["ce", "own", "next"]}
    assert Planner(parse_params(tree), {"toy": ""}).rows("toy", "response") == ["ce"]


def test_weights_from_held_out_images_keep_them_from_training():
    assert toy_spec({"method": "kdcl", "mode": "general"}).held_out == 12
    assert toy_spec({"method": "kdcl"}).held_out == 0


def test_a_specification_can_be_told_from_others_whatever_its_options():
    spec = toy_spec({"method": "mutual", "scheme": {"count": 3}, "partners": ["a", "b"]})
    assert len({spec, replace(spec), replace(spec, partners=())}) == 2
    with pytest.raises(ValueError, match="unknown scheme 'pears'; did you mean 'peers'"):
        replace(spec, scheme="pears").build_options()


def test_a_runs_networks_begin_with_the_seed_and_the_student_comes_first():
    sample = Batch(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), torch.arange(2), None, torch.tensor([0, 1]))
    built = []

    def build(name):
        built.append((name, torch.randn(3)))
        return build_model("wrn_10_0.25", classes=3, channels=1, image_size=8)

    spec = toy_spec({"method": "mutual", "partners": ["a", "b"]}, seed=1)
    scheme = spec.assemble(build, [], sample)
    assert [name for name, _ in built] == ["small", "a", "b"] and scheme.role == "first peer"
    torch.manual_seed(1)
    assert torch.equal(built[0][1], torch.randn(3))
