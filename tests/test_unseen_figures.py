"""Figures of students without real images show the data that they are given."""

import numpy as np
import pandas as pd
import pytest
import torch
from scored import results, row

from kdstudy import unseen_figures
from kdstudy.figures import BLUE, INK, ORANGE, show


def titles(figure) -> list[str]:
    return [ax.get_title(loc="left") or ax.get_title() for ax in figure.axes]


def test_every_origin_has_a_row_of_captioned_images(tmp_path):
    grey, colour = np.zeros((2, 4, 4, 1), np.uint8), np.full((3, 4, 4, 3), 7, np.uint8)
    rows = {"a": (grey, ["x", "y"]), "b": (colour, ["u", "v", "w"])}
    figure = unseen_figures.rows_of_images(rows)
    assert [text.get_text() for ax in figure.axes for text in ax.texts] == ["a", "b"]
    shown = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title() for ax in shown] == ["x", "y", "u", "v", "w"]
    assert shown[0].images[0].get_array().shape == (4, 4) and shown[2].images[0].get_array().shape == (4, 4, 3)
    again = unseen_figures.rows_of_images(rows)
    assert show(figure, tmp_path / "one.png").data == show(again, tmp_path / "two.png").data


@pytest.mark.parametrize("classes", [3, 30])
def test_targets_stand_beside_the_likeness_that_they_are_drawn_from(classes, tmp_path):
    names = [f"class {number}" for number in range(classes)]
    similarity, drawn = torch.eye(classes), {"first": torch.rand(5, classes), "second": torch.rand(4, classes)}
    figure = unseen_figures.targets(similarity, drawn, names)
    show(figure, tmp_path / "targets.png")
    assert titles(figure)[1:] == ["first", "second"]
    values = [np.asarray(ax.collections[0].get_array()).reshape(-1, classes) for ax in figure.axes]
    for shown, wanted in zip(values, [similarity, *drawn.values()], strict=True):
        np.testing.assert_allclose(shown, wanted.numpy())
    named = [tick.get_text() for tick in figure.axes[1].get_xticklabels()]
    assert named == (names if classes == 3 else [])


def test_made_points_are_blue_and_those_far_off_do_not_shrink_the_rest():
    real = torch.tensor([[0.0, 0.0], [4.0, 2.0]])
    made = {"near": real + 0.1, "far": torch.tensor([[1e6, 0.0]])}
    near, far = unseen_figures.points(real, made).axes
    assert [line.get_color() for line in near.lines] == [BLUE, INK]
    np.testing.assert_allclose(np.stack(near.lines[0].get_data()).T, real + 0.1, rtol=1e-6)
    assert near.get_xlim() == far.get_xlim() == pytest.approx((-1, 5)) and near.get_ylim() == pytest.approx((-0.5, 2.5))


def test_the_duel_has_a_dot_for_every_step_and_a_line_for_every_run():
    losses = pd.DataFrame({"step": [0, 0, 1], "turn": ["generator", "student", "generator"], "disagreement": [1, 3, 2]})
    epochs = pd.DataFrame(
        {"run": ["a", "a", "b", "b"], "generator": [-4.0, -3.0, -2.0, -1.0], "kd": [1.0, 0.5, 0.2, 0.1]}
    )
    left, right = unseen_figures.duel(losses, epochs).axes
    dots = {line.get_color(): line for line in left.lines if line.get_marker() == "o"}
    assert list(dots[ORANGE].get_xdata()) == [0, 2] and list(dots[ORANGE].get_ydata()) == [1, 2]
    assert list(dots[BLUE].get_xdata()) == [1] and list(dots[BLUE].get_ydata()) == [3]
    lines = [(line.get_color(), list(line.get_ydata())) for line in right.lines]
    assert lines == [(ORANGE, [4, 3]), (BLUE, [1, 0.5]), (ORANGE, [2, 1]), (BLUE, [0.2, 0.1])]
    assert left.get_ylim()[0] == 0


def test_accuracies_stand_between_chance_and_the_teacher(tmp_path):
    kinds = (("ce", "response", 90.0), ("zero_shot", "data_free", 40.0), ("mutual", "online", 80.0))
    runs = [
        row(method, seed, accuracy + 2 * seed, stage=stage, agreement=30.0, teacher_accuracy=95.0 + seed)
        for method, stage, accuracy in kinds
        for seed in (0, 1)
    ]
    figure = unseen_figures.beside_chance(results(*runs), "data_free", 10.0)
    show(figure, tmp_path / "chance.png")
    (ax,) = figure.axes
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["CE student", "Zero-shot transfer"]
    means = {
        line.get_color(): line.get_xdata() for line in ax.lines if line.get_markersize() == 6 and len(line.get_xdata())
    }
    assert list(means[INK]) == [91.0] and list(means[BLUE]) == [41.0]
    agreed = [
        line.get_xdata()[0] for line in ax.lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())
    ]
    assert agreed == [30.0, 30.0]
    places = {text.get_text(): text.xy[0] for text in ax.texts}
    assert places == {"chance": 10.0, "teacher": 95.5}


def test_without_runs_there_is_only_chance(tmp_path):
    columns = ["stage", "method", "purpose", "test_accuracy", "teacher_accuracy", "seed"]
    figure = unseen_figures.beside_chance(pd.DataFrame(columns=columns), "data_free", 1.0)
    show(figure, tmp_path / "none.png")
    assert [text.get_text() for text in figure.axes[0].texts] == ["chance"]
