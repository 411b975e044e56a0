"""Published numbers are as printed, ours beside them are means and paired gains, and absent runs stay absent."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kdstudy.literature import GIFT_SETTING, gift_table, online_places, online_table, survey_table, write_tables
from kdstudy.params import load_params
from kdstudy.results import RESULT_COLUMNS, Ledger
from kdstudy.store import Store
from kdstudy.study import Planner

ROOT = Path(__file__).parent.parent


def runs(setting: str, stage: str, method: str, accuracies: list[float], **more) -> pd.DataFrame:
    rows = [
        {"run": f"{method}{seed}", "seed": seed, "test_accuracy": accuracy}
        | {"setting": setting, "stage": stage, "method": method, "purpose": "final", "status": "finished"}
        | more
        for seed, accuracy in enumerate(accuracies)
    ]
    return pd.DataFrame(rows, columns=list(RESULT_COLUMNS))


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    params = load_params(ROOT / "params.yaml")
    return Ledger(Planner(params, dict.fromkeys(params.datasets, "0" * 64)), Store(tmp_path / "s", tmp_path / "runs"))


def test_every_published_place_is_one_of_the_study(ledger):
    planner = ledger.planner
    survey = pd.read_csv(ROOT / "kdstudy/published/survey_table5.csv")
    for row in survey.itertuples():
        assert row.method in planner.rows(row.setting, row.stage), row
        assert {"ce", "kd"} <= set(planner.rows(row.setting, "response")), row
    for row in pd.read_csv(ROOT / "kdstudy/published/gift_table1.csv").itertuples():
        assert row.stage == "teacher" or row.method in planner.rows(GIFT_SETTING, row.stage)
    assert planner.setting(GIFT_SETTING).ensembles
    for row in pd.read_csv(ROOT / "kdstudy/published/online.csv").itertuples():
        assert row.method in planner.rows(row.setting, row.stage), row
        assert {"ce", "kd"} <= set(planner.rows(row.setting, "response")), row


def test_published_gains_are_those_that_the_survey_speaks_of():
    table = survey_table(runs("none", "none", "none", []))
    gains = dict(zip(zip(table.source, table.student_arch, strict=True), table.published_gain.round(2), strict=True))
    assert gains["FSP (Yim et al. 2017)", "ResNet8"] == 0.79
    assert gains["IRG (Liu et al. 2019g)", "ResNet20-x0.5"] == 2.33
    assert gains["TOFD (Zhang et al. 2020a)", "MobileNetV2"] == 2.91
    assert len(table) == 15 and table.ours.isna().all() and (table.n == 0).all()


def test_our_gain_is_paired_with_the_ce_student_of_the_same_seed():
    results = pd.concat(
        [
            runs("cifar10_resnet8", "response", "ce", [80.0, 90.0, 70.0]),
            runs("cifar10_resnet8", "relation", "fsp", [81.0, 93.0]),
        ]
    )
    row = survey_table(results).iloc[0]
    assert (row.ours, row.n, row.gain) == (87.0, 2, 2.0)
    assert row.gain_low == pytest.approx(2 - 12.706 * 1.0, abs=1e-2)  # t of one degree of freedom, standard error 1


def test_networks_together_count_only_for_the_runs_they_were_scored_for(ledger):
    results = runs(GIFT_SETTING, "relation", "fsp", [60.0, 62.0, 64.0])
    path = ledger.store.published / "thesis" / "relation" / GIFT_SETTING / "ensembles" / "fsp.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"runs": ["fsp0", "fsp1", "fsp2"], "test_accuracy": 66.5}))
    row = gift_table(ledger, results).iloc[-1]
    assert (row.published_ensemble, row.ours, row.n, row.ensemble) == (68.8, 62.0, 3, 66.5)
    path.write_text(json.dumps({"runs": ["fsp0", "fsp1", "older"], "test_accuracy": 66.5}))
    assert np.isnan(gift_table(ledger, results).iloc[-1].ensemble)
    path.write_text('{"runs": ["fsp0"')
    with pytest.raises(ValueError, match=r"fsp\.json is no score of an ensemble"):
        gift_table(ledger, results)


def test_an_online_number_is_held_against_the_network_that_it_is_about():
    (place,) = online_places()
    results = pd.concat(
        [
            runs(place, "online", "mutual", [74.0, 73.0, 75.0], further='{"ensemble": 99.0, "peer_1": 50.0}'),
            runs(place, "online", "kdcl_mean_large", [70.0, 72.0], further='{"ensemble": 99.0, "peer_1": 76.0}'),
            runs("elsewhere", "online", "okddip_branches", [1.0], further="{}"),
        ]
    )
    table = online_table(results).set_index(["source", "networks"])
    ours, n = table.ours.droplevel(1), table.n.droplevel(1)
    assert (ours["DML (Zhang et al. 2018)"], n["DML (Zhang et al. 2018)"]) == (74.0, 3)
    assert table.difference.droplevel(1)["DML (Zhang et al. 2018)"] == pytest.approx(74.0 - 73.68)
    assert ours["KDCL, mean of logits: ResNet-32"] == 71.0 and ours["KDCL, mean of logits: ResNet-110"] == 76.0
    assert np.isnan(ours["OKDDip (Chen et al. 2020)"]) and n["OKDDip (Chen et al. 2020)"] == 0


def test_tables_are_written_for_the_profile_that_has_their_settings(ledger, tmp_path):
    nothing = runs("none", "none", "none", [])
    assert write_tables(ledger, nothing, "quick", tmp_path) == []
    assert write_tables(ledger, nothing, "thesis", tmp_path) == ["survey", "gift", "online"]
    text = (tmp_path / "literature_survey.md").read_text()
    assert "not run" in text and "FSP (Yim et al. 2017)" in text and "+0.79" in text
    assert "69.30" in (tmp_path / "literature_gift.md").read_text()
    text = (tmp_path / "literature_online.md").read_text()
    assert "not run" in text and "73.68" in text and "ResNet-32 with ResNet-110" in text
