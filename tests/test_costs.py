"""Costs are counted on the networks that a row names, and measured beside vanilla KD."""

from pathlib import Path

import pytest
import torch

from kdstudy.costs import extra_parameters, step_costs
from kdstudy.params import load_params
from kdstudy.schemes import Batch
from kdstudy.study import METHODS, Planner

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def planner() -> Planner:
    params = load_params(ROOT / "params.yaml")
    return Planner(params, dict.fromkeys(params.datasets, ""))


def test_extra_parameters_are_those_that_the_papers_modules_have(planner):
    counts = extra_parameters(planner)
    assert set(counts) == set(METHODS)
    assert counts["kd"] == counts["attention"] == counts["relational"] == counts["fsp"] == 0
    # two linear embeddings from 128 to 128 with bias
    assert counts["crd"] == 2 * (128 * 128 + 128)
    # heads of width-2 wide ResNets with 100 classes (34,980 and 23,716)
    assert counts["relative_heads"] == 34980 + 23716
    # 1x1 to 64, 3x3, 1x1 back to 128, three batch norms, and the classifier is the teacher's
    assert counts["reused_classifier"] == 128 * 64 + 64 * 64 * 9 + 64 * 128 + 2 * (64 + 64 + 128)


def test_a_step_of_every_row_is_measured_beside_vanilla_kd(planner):
    labels = torch.arange(16)
    images = torch.randn(16, 1, 8, 8)
    batch = Batch(images, labels % 10, labels, strong=images, census=torch.arange(100) % 10)
    table = step_costs(planner, "digits_equal", batch, 10, repeats=1)
    assert set(table.method) == {row for stage in planner.params.methods for row in planner.rows("digits_equal", stage)}
    assert table.finite.all()
    kd = table[table.method == "kd"].iloc[0]
    assert kd.memory == 1 and kd.extra_parameters == 0
    ce = table[table.method == "ce"].iloc[0]
    assert 0.9 < ce.memory <= 1  # no teacher's logits are kept
    fsp = table[table.method == "fsp"]
    assert len(fsp) == 2 and fsp.memory.max() > 1
