"""The figures of the page on speed show what was measured, beside goals and predictions."""

import pandas as pd
import pytest
from measured import CPU, GPU, cohort, naive, row, table

from kdstudy import bench_figures, speed
from kdstudy.figures import BLUE, ORANGE, show

SPACE = "\N{NO-BREAK SPACE}"
MEASURED = table(
    *(naive(), row(precision="fp32", ratio=1.2), row(ratio=2.0), cohort(4, ratio=2.5)),
    *(naive(student="resnet18"), row(student="resnet18", ratio=0.8)),
    *(naive(device=GPU), row(device=GPU, ratio=7.0), cohort(9, device=GPU, variant="cohort of 9, table", ratio=30.0)),
)


def marks(ax, marker: str) -> list[float]:
    """Where the single points with this marker are."""
    return [
        float(line.get_xdata()[0]) for line in ax.lines if line.get_marker() == marker and len(line.get_xdata()) == 1
    ]


def test_every_variant_is_a_dot_on_its_devices_panel_and_the_naive_loop_is_where_they_begin(tmp_path):
    figure = bench_figures.ratios(MEASURED)
    show(figure, tmp_path / "ratios.png")
    one, other = figure.axes
    assert [ax.get_title(loc="left") for ax in figure.axes] == [CPU, GPU]
    assert marks(one, "o") == [1.2, 2.0, 2.5, 0.8] and marks(other, "o") == [7.0, 30.0]
    assert [label.get_text() for label in one.get_yticklabels()] == [
        *("one run, fp32", "one run, bf16", "cohort of 4, bf16", "one run, bf16")
    ]
    bars = [list(line.get_xdata()) for line in one.lines if len(line.get_xdata()) == 2 and line.get_color() == BLUE]
    assert bars == [[1, 1.2], [1, 2.0], [1, 2.5], [1, 0.8]]
    assert {text.get_text() for text in one.texts} == {"wrn_16_1", "resnet18", "1.20", "2.00", "2.50", "0.80"}
    low, high = other.get_xlim()
    assert low < 0.8 and high > 30


def test_goals_stand_on_the_rows_that_they_are_for():
    one, other = bench_figures.ratios(MEASURED).axes
    assert marks(one, "|") == [1.0, 1.7, 2.4, 1.7] and marks(other, "|") == [6.0]  # none for a table
    heights = {line.get_marker(): [] for line in one.lines}
    for line in one.lines:
        heights[line.get_marker()].append(line.get_ydata()[0])
    assert heights["|"] == heights["o"]
    assert {line.get_color() for line in one.lines if line.get_marker() == "|"} == {ORANGE}


def test_a_missed_goal_is_within_the_axis():
    (ax,) = bench_figures.ratios(table(naive(device=GPU), cohort(9, device=GPU, ratio=2.0))).axes
    assert ax.get_xlim()[1] > 10


def grown() -> pd.DataFrame:
    rows = [
        row(series="students", students=count, way=way, images_per_second=found)
        for count, way, found in ((1, "in_turn", 100.0), (4, "fused", 150.0), (9, "fused_compiled", 180.0))
    ]
    rows += [row(series="threads", threads=count, images_per_second=100.0 * count**0.5) for count in (1, 4)]
    other = [row(series="students", device=GPU, students=count, images_per_second=100.0 * count) for count in (1, 2)]
    return speed.growth_points(pd.concat([table(*rows, file="one"), table(*other, file="two")]))


def test_a_panel_for_each_series_with_lines_as_measured_and_as_predicted(tmp_path):
    points = grown()
    figure = bench_figures.growth(points)
    show(figure, tmp_path / "growth.png")
    students, batch, threads = figure.axes
    lines = {style: [line for line in students.lines if line.get_linestyle() == style] for style in ("-", "--", ":")}
    assert [list(line.get_ydata()) for line in lines["-"]] == [pytest.approx([1, 100 / 150, 100 / 180])]
    assert [list(line.get_ydata()) for line in lines["--"]] == [pytest.approx([1, 0.5])]
    assert list(lines[":"][0].get_ydata()) == list(points.predicted[:3])
    assert list(lines[":"][0].get_xdata()) == [1, 4, 9]
    colour = lines["-"][0].get_color()
    markers = {(line.get_marker(), line.get_mfc()): list(line.get_xdata()) for line in students.lines[:5]}
    assert markers.items() >= {("o", colour): [1], ("s", colour): [4], ("s", "white"): [9]}.items()
    assert [text.get_text() for text in batch.texts] == ["not measured yet"]
    assert list(threads.lines[1].get_ydata()) == pytest.approx([1, 0.5])
    assert [label.get_text() for label in threads.get_xticklabels()] == ["1", "4"]
    low, high = students.get_ylim()
    assert low < points[["cost", "predicted"]].min().min() and high > 1
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["wrn_16_1", f"in{SPACE}turn", "fused", "fused, compiled", "predicted", CPU, GPU]


def test_without_measurements_the_figures_say_so(tmp_path):
    ratios = bench_figures.ratios(speed.read_bench(tmp_path))
    growth = bench_figures.growth(speed.growth_points(speed.read_growth(tmp_path)))
    for figure in (ratios, growth):
        show(figure, tmp_path / "none.png")
        assert {text.get_text() for ax in figure.axes for text in ax.texts} == {"not measured yet"}
    assert len(growth.axes) == 3


def test_equal_tables_give_equal_bytes(tmp_path):
    one, two = (show(bench_figures.ratios(MEASURED), tmp_path / name).data for name in ("1.png", "2.png"))
    assert one == two
    one, two = (show(bench_figures.growth(grown()), tmp_path / name).data for name in ("1.png", "2.png"))
    assert one == two
