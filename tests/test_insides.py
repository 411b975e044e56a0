"""What notebooks show of networks' insides is what the trained networks have there."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from staged import study
from torch import Tensor

from kdstudy import answers, figures, insides, lesson
from kdstudy.adapters import paired_maps
from kdstudy.checkpoint import BadFile
from kdstudy.core import View
from kdstudy.insides import Looks
from kdstudy.results import Ledger
from kdstudy.store import Store

CPU = torch.device("cpu")
COUNT = 450  # more than two batches
TAUGHT_BY_HEADS = {"taught_by": {"method": "heads", "network": "{teacher}+heads"}}
METHODS = {
    "response": {"ce": {}, "kd": {}, "spherical": {}},
    "feature": {
        **{"attention": {}, "reused_classifier": {}, "crd": {}},
        "heads_v2": {"method": "relative_heads", "edit": "relative_v2", **TAUGHT_BY_HEADS},
    },
}


@pytest.fixture(scope="module")
def ledger(tmp_path_factory) -> Ledger:
    folder = tmp_path_factory.mktemp("study")
    with study(folder, "wrn_10_0.5", "wrn_10_0.25", METHODS, without=["crd"]) as executor:
        executor.run_stage("teacher")
        executor.make_chosen("response", ["ce", "kd"], seeds=[0])
        executor.make_chosen("feature", seeds=[0])
        yield executor.ledger


def views(ledger: Ledger, row: str) -> tuple[View, View]:
    """Of the student of a row and of its teacher, for the test images."""
    spec = lesson.finished(ledger, "mine", row)[row]
    pair = []
    for each in (spec, spec.teacher):
        network, data = answers.trained(ledger, each, CPU)
        with torch.no_grad():
            pair.append(network(next(data.watched(0, spec.recipe)["test"].plain(30))))
    return tuple(pair)


def test_likeness_is_the_cosine_of_the_summed_squares_over_all_channels(ledger):
    seen = insides.looks(ledger, lesson.finished(ledger, "mine", "ce", "attention"), CPU)
    assert list(seen.students) == ["ce", "attention"] and len(seen.images) == 30
    for name, likeness in seen.likeness.items():
        for stage, (s, t) in enumerate(paired_maps(*views(ledger, name))):
            a, b = ((each.double() ** 2).sum(dim=1).flatten(1).numpy() for each in (s, t))
            cosines = [x @ y / np.sqrt((x @ x) * (y @ y)) for x, y in zip(a, b, strict=True)]
            assert likeness[stage] == pytest.approx(np.mean(cosines), abs=1e-5)
            assert seen.students[name][stage].shape == (30, *s.shape[2:])


def test_a_map_is_like_itself_and_unlike_one_elsewhere():
    one = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    seen = Looks(np.zeros((1, 2, 2, 1), np.uint8), (one, one), {"same": (one, one), "mixed": (one, one.flip(2))})
    assert seen.likeness == {"same": [1.0, 1.0], "mixed": [1.0, 0.0]}


class Neurons(torch.nn.Module):
    """The neurons of its second stage are linear in the image, `shift` above it."""

    def __init__(self, weights: Tensor, shift: float = 0.0):
        super().__init__()
        self.weights, self.shift = weights, shift

    def forward(self, images: Tensor) -> View:
        """Neurons (B, c, h, w) of images (B, channels, h, w)."""
        second = torch.einsum("oc,bchw->bohw", self.weights, images) + self.shift
        return View(images[:, :1, 0, 0], pre_maps=(images[:, :1], second))


@pytest.fixture
def sides_of(monkeypatch):
    """The sides of a teacher of 3 linear neurons, as read off students of given weights for 4 random numbers."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -4.0]])
    banks = {part: torch.randn(COUNT, 4, 2, 3, generator=generator) for part in ("test", "training")}
    bank = {part: SimpleNamespace(plain=all_of.split) for part, all_of in banks.items()}
    data = SimpleNamespace(watched=lambda *_: {"test": bank["test"]}, training=lambda *_: bank["training"])

    def sides(**students: list[list[float]]) -> tuple[insides.Sides, Tensor]:
        nets = {name: Neurons(torch.tensor(rows)) for name, rows in students.items()}
        nets["teacher"] = Neurons(weights, shift=0.5)
        monkeypatch.setattr(insides, "trained", lambda ledger, spec, device: (nets[getattr(spec, "name", spec)], data))
        monkeypatch.setattr(insides, "_test_images", lambda spec: np.zeros((COUNT, 2, 3, 1), np.uint8))
        specs = {name: SimpleNamespace(name=name, teacher="teacher", recipe=None, held_out=0) for name in students}
        return insides.sides(None, specs, CPU), banks["test"]

    return sides


def test_a_student_with_the_teacher_s_neurons_in_another_order_size_and_sign_knows_all_sides(sides_of):
    other = [[0.0, 0.0, 3.0, -12.0], [-2.0, 0.0, 0.0, 0.0], [0.0, 0.1, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    seen, images = sides_of(other=other)
    assert seen.teacher.shape == (COUNT, 6, 3)
    assert torch.equal(seen.teacher[0, :, 1], images[0, 1].flatten() > -0.5)
    assert seen.agreement["other"] > 96
    often = (
        float((images[:, :2] > -0.5).double().mean()),
        float((images[:, 2] - 4 * images[:, 3] > -0.5).double().mean()),
    )
    assert seen.constant == pytest.approx(100 * (2 * often[0] + often[1]) / 3)


def test_a_student_knows_of_sides_what_its_neurons_tell_and_no_more(sides_of):
    seen, _ = sides_of(blind=[[0.0] * 4], half=[[1.0, 0.0, 0.0, 0.0]])
    shares = (seen.students["half"] == seen.teacher).double().mean(dim=(0, 1))
    assert shares[0] > 0.96 and shares[1:].max() < 0.73
    assert seen.agreement["half"] == pytest.approx(100 * float(shares.mean()))
    assert seen.agreement["blind"] == pytest.approx(seen.constant)


def test_the_layer_that_reads_sides_off_is_fitted_on_other_images_than_it_is_asked_about(ledger, monkeypatch):
    asked = []
    compared = insides._compared
    monkeypatch.setattr(insides, "_compared", lambda *given: asked.append(given[3]) or compared(*given))
    insides.sides(ledger, lesson.finished(ledger, "mine", "kd"), CPU)
    assert asked == ["training", "test"]


def test_the_answers_of_exits_are_those_of_the_heads_and_last_of_the_unchanged_teacher(ledger):
    spec = lesson.finished(ledger, "mine", "heads_v2")["heads_v2"].teacher
    exits = answers.exit_answers(ledger, spec, CPU)
    network, data = answers.trained(ledger, spec, CPU)
    with torch.no_grad():
        view = network(next(data.watched(0, spec.recipe)["test"].plain(30)))
    for said, each in zip(exits, (*view.exits, view), strict=True):
        torch.testing.assert_close(said["test"].logits, each.logits.double(), atol=1e-5, rtol=1e-5)
    teacher = answers.teacher_answers(ledger, spec.teacher, CPU)
    for part in ("training", "augmented", "test"):
        torch.testing.assert_close(exits[-1][part].logits, teacher[part].logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(exits[0][part].labels, teacher[part].labels)
    text = lesson.heads_table(exits).data
    assert [line.split("|")[1].strip() for line in text.splitlines()[4:]] == ["head 1", "head 2", "classifier"]


def test_only_runs_that_are_there_are_shown(ledger, monkeypatch):
    found = lesson.finished(ledger, "mine", "ce", "attention", "crd", "no_such_row")
    assert list(found) == ["ce", "attention"] and {spec.seed for spec in found.values()} == {0}
    assert lesson.finished(ledger, "mine", "spherical") == {}  # known, but not trained
    monkeypatch.setattr(Store, "record", lambda self, spec: {"status": "diverged"})
    assert lesson.finished(ledger, "mine", "ce") == {}


def test_baselines_are_the_final_runs_of_labels_and_of_vanilla_kd_alone(ledger):
    specs = lesson.baselines(ledger, "mine")
    assert [(spec.row, spec.seed, spec.purpose) for spec in specs] == [
        (row, seed, "final") for row in ("ce", "kd") for seed in (0, 1)
    ]


def test_a_student_that_keeps_adapters_is_not_taken_for_its_network_alone(ledger):
    spec = lesson.finished(ledger, "mine", "reused_classifier")["reused_classifier"]
    with pytest.raises(BadFile, match="belong to another network"):
        answers.trained(ledger, spec, CPU)


def test_strips_mark_where_a_student_says_the_opposite(tmp_path):
    teacher = torch.tensor([[[True, False, True]], [[True, True, False]]])
    student = torch.tensor([[[True, True, True]], [[True, True, False]]])
    seen = insides.Sides(np.zeros((2, 4, 4, 1), np.uint8), teacher, {"ce": student}, 50.0)
    figure = figures.boundaries(seen)
    figures.show(figure, tmp_path / "boundaries.png")
    strips = [ax for ax in figure.axes if ax.get_ylabel()]
    assert [ax.get_ylabel() for ax in strips][:2] == ["Teacher\n67 % on", "CE student\n67 % agree"]
    assert [ax.images[0].get_array().tolist() for ax in strips] == [[[1, 0, 1]], [[1, 2, 1]], [[1, 1, 0]], [[1, 1, 0]]]


def test_attention_is_drawn_over_its_image_stage_by_stage_with_the_teacher_first(tmp_path):
    shallow, deep = torch.rand(2, 4, 4), torch.rand(2, 2, 2)
    students = {"ce": (shallow + 1, deep + 1), "attention": (shallow + 2, deep + 2)}
    images = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 8, 8, 1)
    figure = figures.attention_maps(Looks(images, (shallow, deep), students))
    figures.show(figure, tmp_path / "attention.png")
    first = [ax for ax in figure.axes if len(ax.images) == 2][:6]
    names = [ax.get_title().replace("\n", " ") for ax in first]
    assert names == ["Teacher", "CE student", "Attention transfer"] * 2
    for ax, shown in zip(first, (shallow, *students["ce"][:1], shallow + 2, deep, deep + 1, deep + 2), strict=True):
        assert np.array_equal(ax.images[0].get_array(), images[0, ..., 0])
        assert np.array_equal(ax.images[1].get_array(), shown[0].numpy())
        assert ax.images[0].get_extent() == ax.images[1].get_extent()
