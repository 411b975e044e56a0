"""What goes into a figure is what the data say, and equal data give equal bytes."""

from itertools import count

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

from kdstudy import figures
from kdstudy.answers import Sample, Target, edited, example_samples
from kdstudy.study import build_method
from kdstudy.tables import COMPARISON_COLUMNS, THESIS_COLUMNS

NAN = float("nan")


def histories(*runs: tuple[str, int, str], epochs: int = 6) -> pd.DataFrame:
    rows = []
    for run, (method, seed, purpose) in zip(count(), runs, strict=False):
        for epoch in range(epochs):
            accuracy = 60 + 5 * epoch + run
            rows.append((f"run{run}", method, seed, purpose, epoch, 0.1 / (1 + epoch // 3), accuracy + 1.5, accuracy))
    names = ["run", "method", "seed", "purpose", "epoch", "learning_rate", "train_accuracy", "test_accuracy"]
    return pd.DataFrame(rows, columns=names)


def comparison(*rows: tuple[str, float, float, float, float]) -> pd.DataFrame:
    """Rows of (method, difference, its limits, p)."""
    filler = {"stage": "response", "scheme": "offline", "test_accuracy": 90.0, "n": 3, "pairs": 3, "diverged": 0}
    names = ["method", "difference_to_kd", "difference_low", "difference_high", "p_holm"]
    frame = pd.DataFrame([filler | dict(zip(names, row, strict=True)) for row in rows])
    return frame.reindex(columns=list(COMPARISON_COLUMNS))


def thesis(*rows: tuple[str, float, float, float, float, int, int]) -> pd.DataFrame:
    """Rows of (method, published, ours, its limits, n, diverged)."""
    names = ["method", "published", "ours", "ci_low", "ci_high", "n", "diverged"]
    return pd.DataFrame(rows, columns=names).reindex(columns=list(THESIS_COLUMNS))


def texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def ticks(axis) -> list[str]:
    return [tick.get_text() for tick in axis.get_ticklabels()]


def segments(ax) -> list[tuple[float, float]]:
    """The x limits of the interval lines."""
    lines = [line.get_xdata() for line in ax.lines if len(line.get_xdata()) == 2 and line.get_linewidth() == 1.6]
    return [(float(x[0]), float(x[1])) for x in lines]


def dots(ax, marker: str) -> list[float]:
    return [float(line.get_xdata()[0]) for line in ax.lines if line.get_marker() == marker]


def test_equal_data_give_equal_files_and_the_notebook_gets_the_same_bytes(tmp_path):
    table = comparison(("ce", -1.0, -2.0, 0.0, 0.3))
    first = figures.show(figures.forest(table), tmp_path / "a" / "one.png")
    second = figures.show(figures.forest(table), tmp_path / "two.png")
    assert first.data == second.data == (tmp_path / "a" / "one.png").read_bytes()
    assert first.data.startswith(b"\x89PNG")
    assert b"Software" not in first.data and b"tEXt" not in first.data.replace(b"IDAT", b"")


def test_a_figure_does_not_depend_on_the_session_s_style(tmp_path):
    run = histories(("teacher", 0, "final"))
    plain = figures.show(figures.learning_curves(run), tmp_path / "plain.png")
    with matplotlib.rc_context({"font.size": 20, "axes.edgecolor": "red", "axes.spines.top": True}):
        styled = figures.show(figures.learning_curves(run), tmp_path / "styled.png")
    assert plain.data == styled.data


def test_the_forest_shows_each_difference_with_its_interval_and_n():
    table = comparison(("kd", NAN, NAN, NAN, NAN), ("ce", -1.0, -2.5, 0.5, 0.2), ("relative_v1", 0.4, 0.1, 0.7, 0.01))
    ax = figures.forest(table).axes[0]
    assert ticks(ax.yaxis) == ["CE student  (n = 3)", "Relative KD V1  (n = 3)"]
    assert dots(ax, "o") == [-1.0, 0.4]
    assert segments(ax) == [(-2.5, 0.5), (0.1, 0.7)]
    assert "\N{MINUS SIGN}1.00 [\N{MINUS SIGN}2.50, +0.50]  0.2" in texts(ax)


def test_the_forest_colours_only_what_the_correction_leaves():
    table = comparison(
        ("ce", -1.0, -2.0, -0.1, 0.2), ("relative_v1", 0.4, 0.1, 0.7, 0.01), ("relative_v2", -0.4, -0.7, -0.1, 0.01)
    )
    ax = figures.forest(table).axes[0]
    colors = [line.get_color() for line in ax.lines if line.get_marker() == "o"]
    assert colors == [figures.SOFT, figures.BLUE, figures.ORANGE]


def test_an_interval_beyond_the_axis_ends_in_an_arrow_and_one_collapse_does_not_hide_the_rest():
    rows = [("ce", 0.5, 0.0, 1.0, 0.5), ("spherical", -0.5, -1.0, 0.0, 0.5), ("earth_mover", -60.0, -90.0, -30.0, 0.5)]
    ax = figures.forest(comparison(*rows)).axes[0]
    left, right = ax.get_xlim()
    assert -10 < left < -1 and 1 < right < 10
    assert dots(ax, "<") == [left]
    assert dots(ax, "o") == [0.5, -0.5]


@pytest.mark.parametrize("table", [comparison().head(0), comparison(("kd", NAN, NAN, NAN, NAN))])
def test_a_forest_without_a_comparison_says_so(table, tmp_path):
    figure = figures.forest(table)
    figures.show(figure, tmp_path / "empty.png")
    (text,) = texts(figure.axes[0])
    assert text.startswith("No method has runs")


def test_one_pair_has_a_difference_but_no_interval(tmp_path):
    figure = figures.forest(comparison(("ce", -1.0, NAN, NAN, NAN)))
    figures.show(figure, tmp_path / "one.png")
    assert dots(figure.axes[0], "o") == [-1.0] and segments(figure.axes[0]) == []
    assert "\N{MINUS SIGN}1.00" in texts(figure.axes[0])


def test_learning_curves_have_a_line_per_final_run_and_none_for_tuning():
    frame = histories(("teacher", 0, "final"), ("teacher", 1, "final"), ("teacher", 0, "tuning"))
    top, bottom = figures.learning_curves(frame).axes
    assert len(top.lines) == 4 and len(bottom.lines) == 2
    shown = sorted(tuple(line.get_ydata()) for line in top.lines)
    final = frame[frame.purpose == "final"].groupby("run")
    wanted = sorted(tuple(run[column]) for _, run in final for column in ("train_accuracy", "test_accuracy"))
    assert shown == wanted
    assert {text.get_text() for text in top.texts} == {"training", "test"}


def test_an_epoch_of_a_later_phase_follows_the_last_of_the_one_before():
    frame = pd.concat([histories(("fitnets", 0, "final"), epochs=3), histories(("fitnets", 0, "final"), epochs=2)])
    (line,) = (line for line in figures.method_curves(frame).axes[0].lines if line.get_color() == figures.BLUE)
    assert list(line.get_xdata()) == [1, 2, 3, 4, 5]


def test_every_method_gets_a_panel_with_its_seeds_over_the_means_of_both_references():
    runs = [(method, seed, "final") for method in ("ce", "kd", "mine") for seed in (0, 1)]
    axes = figures.method_curves(histories(*runs, ("kd", 0, "tuning"))).axes
    panels = [ax for ax in axes if ax.get_title(loc="left")]
    assert [ax.get_title(loc="left") for ax in panels] == ["CE student", "Vanilla KD", "mine"]
    for ax in panels:
        assert [line.get_color() for line in ax.lines] == [figures.SOFT] * 2 + [figures.BLUE] * 2
    kd_mean = panels[2].lines[1].get_ydata()
    assert list(kd_mean) == [60 + 5 * epoch + 2.5 for epoch in range(6)]


def test_the_lowest_accuracies_are_left_out_unless_they_are_asked_for():
    frame = histories(("mine", 0, "final"), epochs=9)
    assert figures.method_curves(frame).axes[0].get_ylim()[0] > frame.test_accuracy.min()
    assert figures.method_curves(frame, lowest=0.0).axes[0].get_ylim()[0] == 0


@pytest.mark.parametrize("draw", [figures.learning_curves, figures.method_curves])
def test_curves_of_no_runs_at_all_can_be_drawn(draw, tmp_path):
    figures.show(draw(pd.DataFrame()), tmp_path / "none.png")


@pytest.mark.parametrize("classes", [5, 37])
def test_an_edit_moves_the_dots_it_changed_and_marks_the_label(classes):
    before = np.linspace(-3, 6, classes)
    after = before.copy()
    after[[1, 4]] = 0.5, 2.0
    sample = Sample("made up", torch.tensor(before), 4, [str(c) for c in range(classes)])
    figure = figures.target_edits(sample, {"relative_v2": Target(before, after, "logit")})
    ax = figure.axes[1]
    old, new = (np.asarray(dots.get_offsets()) for dots in ax.collections[1:])
    assert sorted(old[:, 1]) == pytest.approx(sorted(before))
    assert list(new[:, 1]) == [0.5, 2.0]
    assert "Relative KD V2" in ax.get_title(loc="left")
    (marked,) = {t.get_text() for t in ax.get_xticklabels() if t.get_color() == figures.ORANGE}
    assert marked == "4"
    order = np.arange(classes) if classes == 5 else np.argsort(-before)
    assert list(new[:, 0]) == [list(order).index(1), list(order).index(4)]


def test_targets_in_one_unit_share_their_axis_and_an_equal_target_is_called_unchanged():
    _, wrong = example_samples()
    methods = {
        "relative_v1": build_method("relative_v1"),
        "earth_mover": build_method("earth_mover", temperature=2.0),
        "relative_v4_literal": build_method("relative_v4", literal=True),
    }
    axes = figures.target_edits(wrong, edited(wrong, methods)).axes
    panels = {ax.get_title(loc="left"): ax for ax in axes if ax.get_title(loc="left")}
    assert list(panels) == ["Relative KD V1", "Relative KD V4, as printed (unchanged)", "Earth Mover"]
    logits = [panels[name].get_ylim() for name in list(panels)[:2]]
    assert logits[0] == logits[1] != panels["Earth Mover"].get_ylim()


@pytest.mark.parametrize("classes", [3, 100])
def test_softened_probabilities_are_drawn_row_by_row(classes, tmp_path):
    cold, warm = np.eye(classes), np.full((classes, classes), 1 / classes)
    figure = figures.softened({1: cold, 2.5: warm}, [f"class {c}" for c in range(classes)])
    figures.show(figure, tmp_path / "softened.png")
    first, second = figure.axes
    assert np.array_equal(first.collections[0].get_array().reshape(classes, classes), cold)
    assert second.get_title(loc="left").startswith("T = 2.5")
    assert texts(first).count("100") == (classes if classes <= 12 else 0)


def test_a_thesis_table_shows_published_and_ours_and_names_what_is_missing():
    table = thesis(
        ("teacher", 95.0, 94.5, 94.0, 95.0, 3, 0), ("ce", 91.0, NAN, NAN, NAN, 0, 0), ("kd", 93.0, NAN, NAN, NAN, 0, 2)
    )
    ax = figures.published_and_ours(table, "Table 3").axes[0]
    assert ticks(ax.yaxis) == ["Teacher", "CE student", "Vanilla KD"]
    assert dots(ax, "D") == [95.0, 91.0, 93.0] and dots(ax, "o") == [94.5]
    assert segments(ax) == [(94.0, 95.0)]
    assert {"94.50  (n = 3)", "not run", "diverged", "91.00"} <= set(texts(ax))


def test_a_published_collapse_is_an_arrow_at_the_edge_with_its_number():
    published = {"kd": 70.0, "ce": 68.0, "earth_mover": 6.98}
    table = thesis(*((method, accuracy, NAN, NAN, NAN, 0, 0) for method, accuracy in published.items()))
    ax = figures.published_and_ours(table, "Table 6").axes[0]
    assert dots(ax, "<") == [ax.get_xlim()[0]] and ax.get_xlim()[0] > 60
    assert dots(ax, "D") == [70.0, 68.0]
    assert "6.98" in texts(ax)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_of_any_channels_are_shown_under_their_captions(channels, tmp_path):
    images = np.arange(3 * 4 * 4 * channels, dtype=np.uint8).reshape(3, 4, 4, channels)
    figure = figures.image_grid(images, ["a", "b", "c"], columns=2)
    figures.show(figure, tmp_path / "grid.png")
    assert [ax.get_title() for ax in figure.axes] == ["a", "b", "c", ""]
    shown = np.asarray(figure.axes[1].images[0].get_array())
    assert np.array_equal(shown, images[1] if channels > 2 else images[1, ..., 0])


def on_shares(**accuracies: dict[float, list[float]]) -> pd.DataFrame:
    """Final runs by method and share (percent); seeds counted from 0."""
    rows = [
        (method, share, seed, "final", accuracy, 95.0 + seed)
        for method, by_share in accuracies.items()
        for share, values in by_share.items()
        for seed, accuracy in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=["method", "share", "seed", "purpose", "test_accuracy", "teacher_accuracy"])


def test_each_method_has_a_line_through_its_means_over_shares_and_a_bar_over_its_seeds():
    runs = on_shares(ce={100.0: [90.0, 92.0], 1.0: [40.0, 50.0]}, kd={100.0: [93.0, 95.0]}, mine={1.0: [60.0, NAN]})
    tuning = runs.head(1).assign(purpose="tuning", test_accuracy=0.0)
    figure = figures.share_curves(pd.concat([runs, tuning]))
    (ax,) = figure.axes
    lines = {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}
    assert {name: list(line.get_ydata()) for name, line in lines.items()} == {
        "Teacher": [95.5, 95.5],
        "CE student": [45.0, 91.0],
        "Vanilla KD": [94.0],
        "mine": [60.0],
    }
    assert lines["CE student"].get_xdata() == pytest.approx([1, 100], rel=0.1)
    assert len({line.get_xdata()[-1] for line in lines.values()}) == 4  # side by side
    bars = [[segment[:, 1].tolist() for segment in bar.get_segments()] for bar in ax.collections]
    assert bars == [[[40.0, 50.0], [90.0, 92.0]], [[93.0, 95.0]], [[60.0, 60.0]]]
    assert ticks(ax.xaxis) == ["1 %", "100 %"]
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == ["Teacher", "Vanilla KD", "CE student", "mine"]


def test_shares_without_a_finished_run_can_be_drawn(tmp_path):
    figures.show(figures.share_curves(on_shares(ce={1.0: [NAN]})), tmp_path / "none.png")


def test_more_methods_than_looks_are_all_drawn():
    figure = figures.share_curves(on_shares(**{f"m{number}": {1.0: [50.0]} for number in range(9)}))
    assert len(figure.legends[0].get_texts()) == 10


def test_learning_curves_of_each_small_share_stand_by_themselves(tmp_path):
    runs = [("ce", 0, "final"), ("kd", 0, "final"), ("ce", 1, "final")]
    shares = {"run0": 100.0, "run1": 10.0, "run2": 1.0}
    frame = histories(*runs)
    images = figures.show_curves_by_share(frame.assign(share=frame.run.map(shares)), tmp_path)
    assert len(images) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"learning_curves_1.png", "learning_curves_10.png"}
    assert figures.show_curves_by_share(pd.DataFrame().assign(share=[]), tmp_path) == []


def test_relations_between_images_are_drawn_with_their_distance_to_the_teacher_and_classes_by_name(tmp_path):
    torch.manual_seed(0)
    maps, cosines = (torch.rand(6, 6).fill_diagonal_(100) for _ in range(2))  # an image's likeness to itself
    tables = {
        "teacher": {"maps": maps, "cosines": cosines},
        "similarity": {"maps": maps, "cosines": cosines + 0.25},
    }
    figure = figures.image_relations(tables, ["cat", "cat", "dog", "dog", "dog", "eel"])
    figures.show(figure, tmp_path / "relations.png")
    panels = [ax for ax in figure.axes if ax.get_title(loc="left")]
    titles = ["Teacher", "Similarity preserving: 0.000 off", "Teacher", "Similarity preserving: 0.250 off"]
    assert [ax.get_title(loc="left") for ax in panels] == titles
    assert np.array_equal(panels[3].images[0].get_array(), tables["similarity"]["cosines"].numpy())
    first, second, third, fourth = (ax.images[0].get_clim() for ax in panels)
    assert first == second and third == fourth and first[1] < 1 < third[1] < 1.25
    assert ticks(panels[0].xaxis) == ["cat", "dog", "eel"] and list(panels[0].get_xticks()) == [0.5, 3.0, 5.0]


def test_flows_are_drawn_on_one_scale_with_their_distance_as_a_share_of_the_teachers(tmp_path):
    teacher = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    figure = figures.flow_matrices({"teacher": teacher, "fsp": teacher * 1.5}, stage=1)
    figures.show(figure, tmp_path / "flows.png")
    panels = figure.axes[:2]
    assert [ax.get_title(loc="left") for ax in panels] == ["Teacher", "FSP: 50 % off"]
    assert {ax.images[0].get_clim() for ax in panels} == {(0.0, 6.0)}
