"""Other inputs, integers and trees are shown as the runs have them, and sentences follow from scores."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scored import line, results, row
from staged import study
from torch import nn

from kdstudy import lesson, students
from kdstudy.device import DataOnDevice, data_path
from kdstudy.image_set import ImageSet, read_image_set
from kdstudy.params import load_params
from kdstudy.quantisation import Savings
from kdstudy.study import Planner
from kdstudy.trees import DecisionTree

ROOT = Path(__file__).parent.parent
STAGES = {
    "response": {"ce": {}},
    "students": {
        "quantised": {"network": "{student}_int8", "taught_by": {"row": "ce"}},
        "tree_labels": {"method": "soft_tree", "network": "tree_3", "target": "labels"},
        "tree": {"method": "soft_tree", "network": "tree_2"},
    },
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A study whose rows are trained, its data, and the runs of seed 0 by row."""
    with study(tmp_path_factory.mktemp("study"), "resnet8", "resnet8x0.5", STAGES) as executor:
        executor.run_stage("students")
        data = DataOnDevice(read_image_set(data_path("mine")), torch.device("cpu"))
        yield executor.ledger, data, lesson.finished(executor.ledger, "mine", *STAGES["students"])


def test_products_are_those_of_a_count_by_hand():
    convolution = nn.Conv2d(2, 3, 3, padding=1)  # 3 x 4 x 5 values of 2 x 9 products each
    strided = nn.Conv2d(3, 4, 1, stride=2, groups=1)  # 4 x 2 x 3 of 3
    network = nn.Sequential(convolution, strided, nn.ReLU(), nn.Flatten(), nn.Linear(24, 7))
    assert students.multiply_adds(network, torch.zeros(1, 2, 4, 5)) == 60 * 18 + 24 * 3 + 7 * 24
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4))
    assert students.multiply_adds(grouped, torch.zeros(1, 4, 5, 5)) == 4 * 9 * 9
    assert not grouped[0]._forward_hooks


def rgb(channels: int) -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 8, channels), np.uint8)
    labels = np.arange(9) % 3
    return ImageSet("toy", pixels, labels, pixels, labels)


@pytest.mark.parametrize(("channels", "inputs"), [(3, ["grey", "edges", "low"]), (1, ["edges", "low"]), (2, [])])
def test_every_input_is_listed_with_what_it_takes(channels, inputs):
    params = load_params(ROOT / "params.yaml")
    planner = Planner(params, dict.fromkeys(params.datasets, "0" * 64))
    text = students.inputs_table(planner, "digits", rgb(channels)).data
    student = planner.setting("digits").student
    assert line(text, student)[2] == f"{channels} x 8 x 8"
    assert text.count("`") == 2 * (1 + len(inputs))
    if "low" in inputs:
        assert line(text, f"{student}@low")[2] == "1 x 4 x 4"
        full, small = (int(line(text, name)[4].replace(",", "")) for name in (f"{student}@edges", f"{student}@low"))
        assert small < full / 3


def test_crops_are_the_teacher_s_and_modalities_are_made_of_them(made):
    ledger, data, _ = made
    spec = ledger.planner.teacher("mine", 0)
    rows = students.modalities(data, spec, count=6)
    assert list(rows) == ["what the teacher sees", "edges", "half size"]
    shown, names = rows["what the teacher sees"]
    bank = data.training(spec.held_out, spec.recipe)
    crops = lesson.crops(data.images, spec.recipe, spec.seed, image=int(_first(spec, data)), epochs=1)
    np.testing.assert_array_equal(shown[0], crops[0])
    assert names[0] == data.images.class_names[bank.labels[_first(spec, data)]]
    small = rows["half size"][0]
    assert small.shape == (6, 4, 4, 1) and small.min() == 0 and small.max() == 255
    means = shown.reshape(6, 4, 2, 4, 2, 1).astype(float).mean(axis=(2, 4))
    assert np.corrcoef(means.ravel(), small.ravel())[0, 1] > 0.9999


def _first(spec, data) -> int:
    from kdstudy.data import Draws

    size = len(data.training(spec.held_out, spec.recipe))
    draws = Draws.make(
        seed=spec.seed, stream=0, epochs=1, images=size, padding=1, flip=False, device=torch.device("cpu")
    )
    return int(draws.order[0, 0])


def test_savings_are_measured_once_and_then_kept(made, monkeypatch):
    ledger, data, runs = made
    found = students.savings(ledger, runs["quantised"], data)
    assert 0 < found.int8_bytes < found.full_bytes and found.full_seconds > 0 and found.int8_seconds > 0
    monkeypatch.setattr(students, "measure", None)
    assert students.savings(ledger, runs["quantised"], data) == found
    kept = ledger.store.weights(runs["quantised"].id).with_name("savings.json")
    assert json.loads(kept.read_text())["full_bytes"] == found.full_bytes


def test_the_table_of_savings_has_both_networks(made):
    spec = made[2]["quantised"]
    accuracies = {spec.teacher.id: 91.5, spec.id: 90.25}
    store = SimpleNamespace(record=lambda run: {"scores": {"test_accuracy": accuracies[run.id]}})
    found = Savings(4000, 1200, 0.002, 0.0005, 97.0)
    text = students.savings_table(found, SimpleNamespace(store=store), spec).data
    assert line(text, "resnet8x0.5")[1:] == ["4,000", "2.00", "91.50"]
    assert line(text, "resnet8x0.5_int8")[1:] == ["1,200", "0.50", "90.25"]
    text = students.savings_reading(found).data
    assert "30 % as large" in text and "25 % of the time" in text and "97 % of these images" in text


def test_the_finished_network_is_rounded_and_its_grids_are_set_from_training_images(made, monkeypatch):
    ledger, data, runs = made
    spec, seen = runs["quantised"], []
    usual = students.calibrate

    def noted(network, batches):
        batches = list(batches)
        seen.append((network.bits, torch.cat(batches)))
        usual(network, batches)

    monkeypatch.setattr(students, "calibrate", noted)
    accuracies = students.untrained_bits(ledger, spec, data)
    assert list(accuracies) == [bits for bits, _ in seen] == list(students.BITS)
    training = torch.cat(list(data.training(0, spec.recipe).plain(60)))
    assert all(torch.equal(images, training) for _, images in seen)
    full = ledger.store.record(spec.teacher)["scores"]["test_accuracy"]
    assert accuracies[8] == pytest.approx(full, abs=10.1)  # 3 of 30 images


def test_the_top_of_a_tree_has_the_teacher_s_probabilities(made):
    ledger, data, runs = made
    nodes = students.tree_nodes(ledger, runs["tree"], data, levels=1)
    assert [node.place for node in nodes] == [0, 1, 2] and nodes[0].share == 1
    assert nodes[1].share + nodes[2].share == pytest.approx(1)
    teacher = students.load_trained(ledger, runs["tree"].teacher, data)
    bank = data.training(0, runs["tree"].recipe)
    with torch.no_grad():
        said = torch.cat([teacher(images).logits for images in bank.plain(60)]).softmax(dim=1)
    torch.testing.assert_close(nodes[0].distribution, said.mean(dim=0))


def test_questions_are_counted_on_the_way(made):
    ledger, data, runs = made
    tree = DecisionTree(depth=2, classes=2, shape=(1, 1, 2))
    with torch.no_grad():
        tree.threshold.copy_(torch.tensor([0.5, torch.inf, 0.5]))
        tree.pixel.copy_(torch.tensor([0, 0, 1]))
    images = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]).view(4, 1, 1, 2)
    assert students.questions(tree, images) == 1.5
    assert students.questions(tree, images[2:]) == 2
    cells = line(students.trees_table(ledger, {"tree": runs["tree"]}, data).data, "tree")
    scores = ledger.store.record(runs["tree"])["scores"]
    assert 1 <= int(cells[2]) <= 3 and float(cells[3]) <= 2
    assert cells[4:] == [f"{scores['test_accuracy']:.2f}", f"{scores['agreement']:.2f}"]


def run(method: str, accuracies: list[float], agreements: list[float] | None = None) -> list[dict]:
    agreements = agreements or accuracies
    return [
        row(method, seed, accuracy, setting="digits", agreement=agreement)
        for seed, (accuracy, agreement) in enumerate(zip(accuracies, agreements, strict=True))
    ]


def test_what_an_input_costs_and_a_teacher_gives_back():
    frame = results(*run("ce", [90.0, 92.0]), *run("kd", [91.0, 93.0]))
    frame = results(*frame.to_dict("records"), *run("edges_ce", [80.0, 82.0]), *run("edges", [82.0, 85.0]))
    text = students.inputs_reading(frame, "digits").data
    assert "As it is: 91.00 % by labels alone, +1.00 by the teacher." in text
    assert "Edges: 81.00 % by labels alone, +2.50 by the teacher. The input costs 10.00 points" in text
    assert "the teacher gives back 25 %" in text and "Grey" not in text
    worse = results(*run("ce", [80.0]), *run("low_ce", [82.0]), *run("low", [81.0]))
    text = students.inputs_reading(worse, "digits").data
    assert text == "- Half size: 82.00 % by labels alone, -1.00 by the teacher. The input costs nothing."
    assert "No student" in students.inputs_reading(frame[frame.method == "kd"], "digits").data


def test_trees_are_compared_in_accuracy_and_fidelity():
    frame = results(*run("tree", [70.0, 74.0], [75.0, 77.0]), *run("tree_labels", [71.0, 74.0], [73.0, 76.0]))
    text = students.trees_reading(frame, "digits").data
    assert "72.00 % of test images right, -0.50 points against the same tree on labels (n = 2)" in text
    assert "the teacher says on 76.00 % of them, +1.50 points" in text
    assert "No trees" in students.trees_reading(frame[frame.method == "tree"], "digits").data
