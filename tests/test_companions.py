"""Every network of a run is counted under its name, means are over seeds, and costs are those of the records."""

import pytest
from scored import results, row

from kdstudy.companions import accuracies, costs, means, networks

PAIR = results(
    row("ce", 0, 70.0),
    row("mutual", 0, 80.0, {"peer_1": 60.0, "ensemble": 90.0}, network_epochs=10, all_network_epochs=10),
    row("mutual", 1, 82.0, {"peer_1": 64.0, "ensemble": 91.0}, network_epochs=10, all_network_epochs=10),
    row("rocket", 0, 75.0, {"booster": 77.0}, deployed="light net"),
    row("mutual", 2, 10.0, {"peer_1": 10.0}, purpose="tuning"),
    row("kd", 0, float("nan"), status="diverged"),
)


def test_all_networks_of_final_runs_are_there_the_deployed_one_first():
    found = networks(PAIR)
    assert list(found[(found.method == "mutual") & (found.seed == 1)].network) == ["deployed", "peer_1", "ensemble"]
    assert set(found.method) == {"ce", "mutual", "rocket"} and len(found) == 1 + 3 + 3 + 2
    assert means(found)["mutual"].to_dict() == {"deployed": 81.0, "peer_1": 62.0, "ensemble": 90.5}


def test_the_table_shows_rows_with_more_than_one_network():
    table = accuracies(PAIR).set_index("row")
    assert list(table.index) == ["DML", "Rocket launching"]
    assert table.loc["DML"].to_list() == ["first peer", 81.0, "peer 1: 62.00", "90.50"]
    assert table.loc["Rocket launching"].to_list() == ["light net", 75.0, "booster: 77.00", "-"]


def test_costs_are_multiples_of_the_ce_student_with_all_that_taught():
    taught = results(row("ce", 0, 70.0), row("kd", 0, 72.0, network_epochs=5, all_network_epochs=10))
    table = costs(taught).set_index("row")
    assert table["x CE student"].to_dict() == {"CE student": 1.0, "Vanilla KD": 2.0}
    assert table["network-epochs"].to_dict() == {"CE student": 5.0, "Vanilla KD": 5.0}
    assert "x CE student" not in costs(taught[taught.method == "kd"])


@pytest.mark.parametrize("function", [networks, accuracies, costs])
def test_no_run_is_no_row(function):
    assert function(PAIR.head(0)).empty
