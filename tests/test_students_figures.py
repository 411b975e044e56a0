"""Figures of other students show the data that they are given."""

import numpy as np
import pytest
import torch
from scored import results, row

from kdstudy import students_figures
from kdstudy.figures import BLUE, ORANGE, SOFT, show


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_the_grid_is_that_of_torch(bits):
    values = np.linspace(-0.999, 0.999, 500, dtype=np.float32)
    most = 2 ** (bits - 1) - 1
    expected = torch.fake_quantize_per_tensor_affine(torch.from_numpy(values), 1 / most, 0, -most - 1, most)
    np.testing.assert_allclose(students_figures.rounded(values, bits), expected.numpy(), atol=1e-6)
    assert len(np.unique(students_figures.rounded(values, bits))) == 2 * most + 1


def test_grids_have_a_staircase_each_and_two_gradients(tmp_path):
    left, right = students_figures.grids((2, 4)).axes
    assert [line.get_label() for line in left.lines] == ["2 bits", "4 bits"]
    through, true = (line.get_ydata() for line in right.lines)
    assert not np.any(true) and set(through) == {0.0, 1.0}
    inside = np.abs(right.lines[0].get_xdata()) <= 1
    np.testing.assert_array_equal(through, inside)
    one, two = (show(students_figures.grids(), tmp_path / name) for name in ("one.png", "two.png"))
    assert one.data == two.data


def test_accuracy_by_bits_stands_beside_full_precision():
    (ax,) = students_figures.by_bits({8: 90.0, 4: 80.0, 2: 30.0}, full=91.0, trained=92.0).axes
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines["rounded, not trained"].get_xdata()) == [8, 4, 2]
    assert list(lines["rounded, not trained"].get_ydata()) == [90, 80, 30]
    assert lines["8 bits, trained"].get_color() == ORANGE and list(lines["8 bits, trained"].get_ydata()) == [92]
    assert list(lines["full precision"].get_ydata()) == [91, 91]


PAIRS = {"as it is": ("ce", "kd"), "edges": ("edges_ce", "edges"), "grey": ("grey_ce", "grey")}


def test_students_of_a_seed_are_joined_and_inputs_without_runs_are_left_out(tmp_path):
    accuracies = {"ce": [90, 91], "kd": [92], "edges_ce": [80, 81], "edges": [85, 83]}
    runs = [row(method, seed, float(x)) for method, values in accuracies.items() for seed, x in enumerate(values)]
    figure = students_figures.by_input(results(*runs), PAIRS)
    show(figure, tmp_path / "inputs.png")
    (ax,) = figure.axes
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["as it is", "edges"]
    joined = [list(line.get_xdata()) for line in ax.lines if line.get_color() == SOFT]
    assert joined == [[90, 92], [80, 85], [81, 83]]
    dots = [line for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert [(line.get_markerfacecolor(), list(line.get_xdata())) for line in dots] == [
        *[("white", [90, 91]), (BLUE, [92]), ("white", [80, 81]), (BLUE, [85, 83])]
    ]
    assert dots[0].get_ydata()[0] == dots[1].get_ydata()[0]  # a seed has one height


def test_without_runs_the_figure_is_empty(tmp_path):
    frame = results(row("ce", 0, 90.0)).head(0)
    figure = students_figures.by_input(frame, PAIRS)
    show(figure, tmp_path / "none.png")
    assert figure.axes[0].get_yticklabels() == []
