"""What is drawn of networks that learn together or from themselves is what was measured."""

import numpy as np
import pandas as pd
import pytest

from kdstudy.figures import BLUE, ORANGE, show
from kdstudy.scheme_figures import companions, cycles, distances, steps


def scores(**rows: dict[str, float]) -> pd.DataFrame:
    named = [(method, 0, name, value) for method, row in rows.items() for name, value in row.items()]
    return pd.DataFrame(named, columns=["method", "seed", "network", "test_accuracy"])


def marks(ax, marker: str, color: str | None = None) -> list[tuple[float, float]]:
    lines = [line for line in ax.lines if line.get_marker() == marker and len(line.get_xdata())]
    lines = [line for line in lines if color is None or line.get_mfc() == color]
    return [(float(x), float(y)) for line in lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]


def texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_networks_of_a_row_lie_in_their_places_and_rows_of_one_network_are_lines(tmp_path):
    found = scores(
        ce={"deployed": 90.0},
        kd={"deployed": 92.0},
        mutual={"deployed": 91.0, "peer_1": 89.5, "ensemble": 93.0},
        rocket={"deployed": 91.5, "booster": 94.0},
    )
    figure = companions(found)
    ax = figure.axes[0]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["DML", "Rocket launching"]
    assert marks(ax, "o", BLUE) == [(91.0, 0), (91.5, 1)]
    assert marks(ax, "o", "white") == [(89.5, 0), (94.0, 1)]
    assert marks(ax, "D", ORANGE) == [(93.0, 0)]
    assert sorted(line.get_xdata()[0] for line in ax.lines if list(line.get_xdata()) in ([90.0] * 2, [92.0] * 2)) == [
        90,
        92,
    ]
    show(figure, tmp_path / "companions.png")


def test_a_network_far_below_the_rest_is_an_arrow_with_its_number():
    ax = companions(scores(a={"deployed": 90.0, "peer_1": 91.0}, b={"deployed": 10.0, "peer_1": 92.0})).axes[0]
    assert texts(ax) == ["10.0"] and len(marks(ax, "<")) == 1
    assert ax.get_xlim()[0] > 80


@pytest.mark.parametrize("found", [scores(), scores(ce={"deployed": 90.0})])
def test_rows_without_companions_leave_a_sentence(found, tmp_path):
    figure = companions(found)
    assert "No row has more networks" in texts(figure.axes[0])[0]
    show(figure, tmp_path / "none.png")


def history(method: str, seed: int, purpose: str = "final", **terms: list[float]) -> pd.DataFrame:
    epochs = len(next(iter(terms.values())))
    names = {"run": f"{method}{seed}", "method": method, "seed": seed, "purpose": purpose}
    return pd.DataFrame({"epoch": range(epochs), **terms}).assign(**names)


def test_distances_are_means_over_seeds_the_deployed_network_in_blue(tmp_path):
    runs = [
        history("mutual", 0, peer0_kd=[1.0, 3.0], peer1_kd=[2.0, 2.0], peer0_ce=[9.0, 9.0]),
        history("mutual", 1, peer0_kd=[3.0, 5.0], peer1_kd=[4.0, 4.0], peer0_ce=[9.0, 9.0]),
        history("mutual", 2, purpose="tuning", peer0_kd=[99.0, 99.0]),
        history("rocket", 0, kd=[0.5, 0.25]),
    ]
    figure = distances(pd.concat(runs), ["mutual", "afd", "rocket"])
    first, second, *rest = figure.axes
    assert [ax.get_title(loc="left") for ax in (first, second)] == ["DML", "Rocket launching"]
    drawn = {line.get_color(): list(line.get_ydata()) for line in first.lines}
    assert drawn.pop(BLUE) == [2.0, 4.0] and list(drawn.values()) == [[3.0, 3.0]]
    assert [list(line.get_ydata()) for line in second.lines] == [[0.5, 0.25]]
    assert not any(ax.lines for ax in rest)
    show(figure, tmp_path / "distances.png")


def test_no_history_can_be_drawn(tmp_path):
    show(distances(pd.DataFrame(), ["mutual"]), tmp_path / "none.png")


def test_cycles_show_where_snapshots_teach_and_the_rate_starts_anew(tmp_path):
    rate = [0.2, 0.0, 0.2, 0.0]
    own = history("snapshot", 0, test_accuracy=[50.0, 60.0, 55.0, 70.0], kd=[0.0, 0.0, 0.3, 0.2], learning_rate=rate)
    alone = history("ce", 0, test_accuracy=[40.0, 50.0, 60.0, 65.0], learning_rate=[0.1] * 4)
    figure = cycles(pd.concat([own, alone]), (0, 2))
    top, middle, bottom = figure.axes
    assert texts(top) == ["labels alone", "snapshot 1 teaches"]
    for ax in figure.axes:
        assert [list(line.get_xdata()) for line in ax.lines if line.get_linestyle() == ":"] == [[2.5, 2.5]]
    assert [list(line.get_ydata()) for line in bottom.lines[:2]] == [[0.2, 0.0], [0.2, 0.0]]
    assert list(middle.lines[0].get_ydata()) == [0.0, 0.0, 0.3, 0.2]
    assert list(top.lines[0].get_ydata()) == [40.0, 50.0, 60.0, 65.0]
    show(figure, tmp_path / "cycles.png")


def test_steps_go_through_the_means_of_what_is_there(tmp_path):
    seeds = {"seed 0": pd.Series({"exit 1": 60.0, "last": 80.0}), "seed 1": pd.Series({"exit 1": 70.0, "last": 84.0})}
    figure = steps(seeds, ["exit 1", "exit 2", "last"], "Exits")
    ax = figure.axes[0]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["exit 1", "last"]
    (mean,) = [line for line in ax.lines if line.get_color() == BLUE]
    np.testing.assert_allclose(mean.get_ydata(), [65.0, 82.0])
    show(figure, tmp_path / "steps.png")
