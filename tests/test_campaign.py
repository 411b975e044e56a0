"""What a profile lacks is made cheapest first or as named, until it is told to stop; what is left is said."""

import itertools
import json
from pathlib import Path

import pytest
import yaml
from test_execute import FAST, TREE, profile, stripes, taught

from kdstudy.campaign import Campaign, Choice
from kdstudy.device import data_path
from kdstudy.execute import Executor, open_ledger
from kdstudy.image_set import save_image_set
from kdstudy.stopping import Stopped
from kdstudy.store import Store


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KDSTUDY_DEVICE", raising=False)
    save_image_set(stripes(), data_path("stripes"))
    return tmp_path


def write(tree: dict) -> None:
    Path("params.yaml").write_text(yaml.safe_dump(tree))


def two_settings() -> dict:
    """A second setting whose student is four times as broad, and named first."""
    tree = json.loads(json.dumps(FAST | profile(cohort=5)))
    own = tree["settings"].pop("stripes")
    tree["settings"] = {"broad": own | {"student": "wrn_10_1"}, "stripes": own}
    return json.loads(json.dumps(tree))


def campaign(settings=("stripes",), **choice) -> Campaign:
    return Campaign(open_ledger(store=Store(Path("store"), Path("runs"))), Choice(settings, **choice))


def make(what: Campaign, **options) -> None:
    what.make(lambda setting: Executor(what.ledger, setting, **options))


def test_all_that_is_missing_is_made_and_final_runs_after_the_cells_that_choose_them(folder):
    write(TREE)
    what = campaign(stages=["response"])
    first = what.missing()
    assert {spec.purpose for spec in first if spec.row == "kd"} == {"tuning"}
    make(what)
    made = what.recorded()
    assert what.missing() == [] and len(made) == 2 + 2 + 2 + 2
    assert {spec.purpose for spec in made if spec.row == "kd"} == {"tuning", "final"}
    assert campaign().missing() == []  # teachers were needed


def test_cheapest_first_or_as_named(folder):
    write(two_settings())
    names = ("broad", "stripes")
    what = campaign(names, stages=["response"])
    order = [(spec.setting, spec.row) for spec in what.missing()]
    assert [setting for setting, _ in itertools.groupby(order, key=lambda pair: pair[0])] == ["stripes", "broad"]
    costs = [what.operations(spec) for spec in what.missing()]
    assert costs == sorted(costs) and costs[0] < costs[-1] / 4
    named = campaign(names, stages=["response"], rows=["kd_2", "attention", "kd_0"], as_named=True)
    assert [(spec.setting, spec.row) for spec in named.missing()] == [
        (setting, row) for setting in names for row in ("kd_2", "attention", "kd_0")
    ]


def test_what_a_run_costs_is_counted_by_hand(folder):
    write(taught({"ce": {}, "kd": {"images": 0.5}}, seeds=[0]))
    what = campaign(stages=["response"])
    ce, kd = (what.ledger.final("stripes", "response", row)[0] for row in ("ce", "kd"))
    teacher = what.ledger.planner.teacher("stripes", 0)
    epochs = 3
    # wrn_10_0.25 has 16 and 4, 8, 16 channels; maps of 8 x 12, 8 x 12, 4 x 6, 2 x 3
    student = 2 * 96 * 9 * 16 * 1
    assert what.operations(ce) > 3 * epochs * 60 * student
    answered = what.operations(kd) - what.operations(ce) / 2
    assert what.operations(teacher) > answered > 0
    assert what.operations(teacher) / 60 < 3 * answered / 30 <= what.operations(teacher) / 60 * 3


def test_seeds_and_stages_are_chosen(folder):
    write(TREE)
    assert {spec.seed for spec in campaign(seeds=[1], rows=["ce"]).missing()} == {1}
    assert {spec.stage for spec in campaign(stages=["teacher"]).missing()} == {"teacher"}
    assert {spec.stage for spec in campaign().missing()} == {"teacher", "response"}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"stages": ["respons"]}, "unknown stage 'respons'; did you mean 'response'"),
        ({"rows": ["kdd"]}, "unknown row of stripes: 'kdd'; did you mean 'kd'"),
        ({"settings": ["stripe"]}, "unknown setting 'stripe'; did you mean 'stripes'"),
        ({"rows": ["ce"], "stages": ["teacher"]}, "unknown row of stripes teacher: 'ce'"),
    ],
)
def test_names_that_are_unknown_are_refused(choice, message, folder):
    write(TREE)
    with pytest.raises(ValueError, match=message):
        campaign(**choice)


def test_a_stop_leaves_what_is_left_and_it_is_told_with_the_teachers_it_needs(folder):
    write(FAST | profile(cohort=2))
    what = campaign(rows=["kd_0", "kd_1", "kd_2"])
    left = what.left()
    assert left[["stage", "runs"]].values.tolist() == [["teacher", 1], ["response", 3]] and left.hours.isna().all()
    asked = itertools.count()
    with pytest.raises(Stopped):
        make(what, should_stop=lambda: next(asked) >= 22)
    left, missing = what.left(), what.missing()
    assert left[["stage", "runs"]].values.tolist() == [["response", 2]]
    assert left.epochs.item() == sum(spec.epochs for spec in missing)
    (made,) = what.recorded()
    rate = what.operations(made) / what.ledger.store.record(made)["seconds"]
    assert left.hours.item() * 3600 * rate == pytest.approx(sum(map(what.operations, missing)))
    make(what)
    assert what.left().empty
