"""Which method can serve under which scheme is what the code does, and every scheme is described as it is."""

import re
from pathlib import Path

import pandas as pd
import pytest

from kdstudy import budget_figures, combinations
from kdstudy.figures import BLUE, show
from kdstudy.params import load_params
from kdstudy.study import METHODS, SCHEMES, scheme_of

PARAMS = load_params(Path(__file__).parent.parent / "params.yaml")


@pytest.fixture(scope="module")
def cells() -> pd.DataFrame:
    return combinations.combinations(PARAMS)


def refusal(cells: pd.DataFrame, method: str, scheme: str) -> str:
    (found,) = cells.refusal[(cells.method == method) & (cells.scheme == scheme)]
    return found


def test_every_pair_is_there_once(cells):
    assert len(cells) == len(METHODS) * len(combinations.SHARED)
    assert not cells.duplicated(["method", "scheme"]).any()
    assert set(combinations.SHARED) <= set(SCHEMES)
    assert (cells.possible == (cells.refusal == "")).all()


def test_what_was_tried_is_possible_and_what_a_method_is_made_for_too(cells):
    assert cells.possible[cells.rows != ""].all()
    own = [scheme_of(METHODS[method]) == scheme for method, scheme in zip(cells.method, cells.scheme, strict=True)]
    assert cells.possible[own].all() and sum(own) >= 8


@pytest.mark.parametrize(
    ("method", "scheme", "words"),
    [
        ("ce", "peers", "a teacher that is finished, or none"),
        ("spherical", "zero_shot", "measures the training images"),
        ("mlkd", "zero_shot", "reads strong"),
        ("kd", "snapshot", "no cycles"),
        ("ensemble", "launch", "ensemble of teachers"),
        ("crd", "munged", "reads indices"),
        ("few_sample", "impressions", "trains nothing"),
        ("collaborative_teaching", "peers", "only be trained under scheme collaborative"),
        ("kd", "peers", ""),
        ("attention", "impressions", ""),
        ("mlkd", "munged", ""),
        ("own_teacher", "zero_shot", ""),
        ("dkd", "launch", ""),
    ],
)
def test_refusals_are_those_of_the_code(cells, method, scheme, words):
    found = refusal(cells, method, scheme)
    assert words in found and bool(words) == bool(found)
    assert METHODS[method].__name__ not in found  # so that equal reasons are equal


def test_rows_are_named_with_the_scheme_they_ask_for(cells):
    rows = cells.set_index(["method", "scheme"]).rows
    assert "peers_attention" in rows["attention", "peers"].split(", ")
    assert "impressions_attention" in rows["attention", "impressions"].split(", ")
    assert "budget_mutual" in rows["mutual", "peers"].split(", ")
    assert rows["kd", "peers"] == ""


def test_each_reason_is_told_once_and_the_summary_counts(cells):
    text = combinations.refusals_table(cells).data
    assert text.count("no cycles") == 1 and re.search(r"\| \d+ methods +\|", text)
    assert len(text.splitlines()) == 2 + cells[~cells.possible].refusal.nunique()
    summary = combinations.combinations_reading(cells).data
    assert f"are {len(cells)} pairs. {cells.possible.sum()} are possible" in summary
    assert all(f"`{scheme}`" in summary for scheme in combinations.SHARED)


def scheme_rows() -> dict[str, list[str]]:
    lines = combinations.schemes_table(PARAMS).data.splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {name.strip("`"): rest for name, *rest in cells}


def test_every_scheme_is_described_by_what_it_is_and_does():
    rows = scheme_rows()
    assert list(rows) == list(SCHEMES)
    needs = {name: set(cells[-1].split(", ")) for name, cells in rows.items()}
    assert {name for name, what in needs.items() if "a trained teacher" in what} == {
        name for name, cls in SCHEMES.items() if cls.needs_teacher
    }
    assert {name for name, what in needs.items() if "labels" not in what} == {
        *("committee", "zero_shot", "impressions", "munged"),
    }
    assert {name for name, what in needs.items() if "images" in what} == set(SCHEMES) - {
        *("committee", "zero_shot", "impressions"),
    }
    trained = {name: cells[2] for name, cells in rows.items()}
    assert trained["peers"] == "2 peers" and trained["committee"] == "nothing"
    assert trained["zero_shot"] == "student, generator" and trained["launch"] == "student, booster"
    assert rows["launch"][3] == "light net" and "boost" in rows["launch"][1]


def test_the_chart_has_the_colours_of_the_cells(cells, tmp_path):
    figure = budget_figures.possible(cells)
    charts = [ax for ax in figure.axes if ax.collections]
    assert sum(len(ax.get_yticklabels()) for ax in charts) == len(METHODS)
    names = [tick.get_text() for ax in charts for tick in ax.get_yticklabels()]
    assert names == list(METHODS)
    values = [value for ax in charts for value in ax.collections[0].get_array().ravel()]
    state = [2 if rows else int(can) for can, rows in zip(cells.possible, cells.rows, strict=True)]
    assert values == state
    assert budget_figures.STATES["tried: a row of params.yaml"] == BLUE
    show(figure, tmp_path / "chart.png")
