"""Who follows whom is read off the runs, and sentences on networks that learned together follow from their scores."""

from pathlib import Path

import pandas as pd
import pytest
from scored import images, line, results, row

from kdstudy.params import load_params
from kdstudy.study import Planner
from kdstudy.together import beside_published, roles_table, shared_table, together_reading

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def planner() -> Planner:
    params = load_params(ROOT / "params.yaml")
    return Planner(params, dict.fromkeys(params.datasets, "0" * 64))


def test_every_row_says_who_follows_whom(planner):
    text = roles_table(planner, "digits").data
    assert line(text, "mutual")[1:] == [
        "2 x wrn_10_0.25",
        "each follows every other one",
        "the same crops",
        "first peer",
    ]
    assert line(text, "mutual_alternate")[2].endswith("one steps after the other")
    dear = roles_table(planner, "cifar10_wrn_16_1").data
    assert line(dear, "mutual_4_ensemble")[1:3] == ["4 x wrn_16_1", "each follows all others as one"]
    assert line(text, "mutual_large")[1] == "wrn_10_0.25, wrn_10_1"
    stale = "each follows all others as one; labels alone for 10% of the epochs; copies, anew every 50 steps"
    assert line(text, "codistillation")[2:4] == [stale, "own images"]
    assert line(text, "kdcl_naive")[2:4] == ["each follows all as one, itself among them", "own crops"]
    leader = "all but the leader follow each other; the leader follows their mean"
    assert line(text, "okddip_branches")[1:3] == ["4 x wrn_10_0.25, stem and 2 stages shared", leader]
    assert line(text, "okddip")[4] == "leader"
    assert line(dear, "afd_3")[1:3] == ["3 x wrn_16_1", "each follows the one before it, in a cycle"]
    assert line(text, "rocket")[1:] == [
        "wrn_10_0.25, wrn_16_0.25",
        "the light net follows the booster",
        *line(text, "rocket")[3:4],
        "light net",
    ]
    assert len(planner.rows("digits", "online")) == text.count("\n") - 1


def test_a_setting_without_such_rows_says_so(planner):
    assert "trains no networks together" in roles_table(planner, "digits_equal").data
    assert "no light net" in shared_table(planner, "digits_equal", images()).data


def test_what_light_nets_share_is_counted(planner):
    # stem, and two convolutions and a shortcut for the one block of each stage but the first, which needs no shortcut
    cells = line(shared_table(planner, "digits", images()).data, "rocket")
    assert cells[1:3] == ["wrn_10_0.25", "wrn_16_0.25"] and cells[3].endswith("convolutions")
    assert 50 < float(cells[4].rstrip("%")) < 100


def peers(method: str, *accuracies: tuple[float, float, float]) -> list[dict]:
    return [
        row(
            method,
            seed,
            own,
            {"peer_1": other, "ensemble": all_},
            stage="online",
            network_epochs=10,
            all_network_epochs=10,
        )
        for seed, (own, other, all_) in enumerate(accuracies)
    ]


def test_all_together_the_first_and_the_best_are_told_apart(planner):
    alone = [row("ce", seed, 70.0, stage="response") for seed in (0, 1)]
    behind = [*peers("afd", (80.0, 70.0, 81.0)), *peers("codistillation", (80.0, 70.0, 83.0))]
    found = results(*alone, *peers("mutual", (80.0, 81.0, 84.0), (80.0, 83.0, 86.0)), *behind)
    text = together_reading(found, planner).data
    assert "score +3.00 points against the deployed one alone, in the mean over 3 rows; at most +5.00 (DML)" in text
    assert "In 1 of 3 rows with networks of one kind another one is ahead of it" in text
    assert "adds 0.67 points in the mean" in text
    assert "cost 2 to 2 times as much as the CE student." in text
    assert "rounding" not in text


def test_a_larger_peer_is_no_better_choice_of_the_same_kind(planner):
    text = together_reading(results(*peers("mutual_large", (80.0, 95.0, 90.0))), planner).data
    assert "of one kind" not in text and "+10.00" in text


def test_two_forms_of_one_gradient_tell_how_far_rounding_carries(planner):
    found = results(
        *peers("mutual_4", (80.0, 0.0, 0.0), (81.0, 0.0, 0.0)),
        *peers("mutual_4_ensemble", (80.5, 0.0, 0.0), (79.0, 0.0, 0.0)),
    )
    assert "differ by +0.50, -2.00 points, seed by seed" in together_reading(found, planner).data


def test_without_runs_there_is_nothing_to_tell(planner):
    assert (
        together_reading(results(row("ce", 0, 70.0)), planner).data
        == "- No networks that learned together have finished."
    )


def test_published_numbers_stand_beside_their_own_setting_only():
    columns = ["setting", "stage", "method", "purpose", "status", "seed", "test_accuracy", "further"]
    nothing = pd.DataFrame(columns=columns)
    assert "`cifar100_resnet32`" in beside_published(nothing, "digits").data
    table = beside_published(nothing, "cifar100_resnet32").data
    assert "73.68" in table and "not run" in table
