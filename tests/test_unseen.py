"""What is shown of students without real images is what their runs had, and sentences follow from scores."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from scored import line, results, row
from staged import study

from kdstudy import lesson, unseen
from kdstudy.answers import load_trained
from kdstudy.device import DataOnDevice, data_path
from kdstudy.image_set import read_image_set
from kdstudy.munge import munge
from kdstudy.synthetic import Impressions
from kdstudy.unseen import Duel, Impressed, Kind

IMPRESSIONS = {"name": "impressions", "count": 20, "batch": 20, "iterations": 4, "learning_rate": 0.05}
ROWS = {
    "zero_shot": {"scheme": {"batch": 16, "noise": 8, "student_steps": 3}},
    "data_impressions": {"scheme": IMPRESSIONS},
    "munge": {"method": "kd", "ce_weight": 0.0, "kd_weight": 1.0, "scheme": {"name": "munged", "components": 20}},
    "unmixed": {"method": "kd", "ce_weight": 0.0, "scheme": {"name": "munged", "probability": 0.0}},
    "together": {"method": "ensemble", "teachers": 2, "ce_weight": 0.0, "scheme": {"name": "munged"}},
}
STEPS = math.ceil(60 / 16)  # of an epoch


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A study whose rows are trained, its data, and the runs of seed 0 by row."""
    with study(tmp_path_factory.mktemp("study"), "resnet8", "resnet8x0.5", {"data_free": ROWS}) as executor:
        executor.run_stage("data_free")
        data = DataOnDevice(read_image_set(data_path("mine")), torch.device("cpu"))
        yield executor.ledger, data, lesson.finished(executor.ledger, "mine", *ROWS)


def test_the_first_pseudo_batches_are_those_of_the_run(made):
    ledger, data, runs = made
    duel = unseen.zero_shot(ledger, runs["zero_shot"], data, STEPS)
    assert duel.losses.turn.tolist() == ["generator", "student", "student", "student"] * STEPS
    assert duel.losses.step.tolist() == [step for step in range(STEPS) for _ in range(4)]
    # the history has, of every batch, the last loss of each turn
    last = duel.losses.groupby(["turn", "step"]).disagreement.last()
    sizes = np.array([16, 16, 16, 12]) / 60
    (epoch,) = ledger.store.record(runs["zero_shot"])["history"]
    assert (last["generator"] * sizes).sum() == pytest.approx(-epoch["generator"], rel=1e-5)
    assert (last["student"] * sizes).sum() == pytest.approx(epoch["kd"], rel=1e-5)


def test_generated_images_are_pictures_before_and_after(made):
    ledger, data, runs = made
    duel = unseen.zero_shot(ledger, runs["zero_shot"], data, 2)
    first, last = duel.made[0], duel.made[2]
    assert first.shape == last.shape == (unseen.MOST, 8, 8, 1) and first.dtype == np.uint8
    assert (first != last).any()
    clipped = ((last == 0) | (last == 255)).mean()
    assert clipped - 0.02 < duel.beyond <= clipped  # a few round to black or white
    assert (last == 0).mean() > 0.02 < (last == 255).mean()
    # a generator's last layer is a batch norm: on the scale of the training images
    assert abs(first.mean() - data.images.x_train.mean()) < 15


def test_the_first_impressions_are_those_of_the_run(made, monkeypatch):
    ledger, data, runs = made
    spec = runs["data_impressions"]
    shown = unseen.impressions(ledger, spec, data)
    assert shown.images.shape == (20, 8, 8, 1) and shown.targets.shape == (20, 3)
    making = ledger.store.record(spec)["history"][0]
    assert making["phase"] == "impressions"
    distance = -(shown.targets * shown.said.log()).sum(dim=1).mean().item()  # after rounding to bytes
    assert distance == pytest.approx(making["impressions"], abs=0.01)
    right = (shown.said.argmax(dim=1) == shown.targets.argmax(dim=1)).double().mean().item()
    assert 100 * right == pytest.approx(making["train_accuracy"], abs=10.1)  # two of twenty may flip by rounding
    teacher = load_trained(ledger, spec.teacher, data)
    temperature = spec.build_options().temperature
    inputs = torch.from_numpy((shown.images - data.mean) / data.std).permute(0, 3, 1, 2)
    expected = F.softmax(teacher(inputs.float()).logits.double() / temperature, dim=1)
    torch.testing.assert_close(shown.said, expected, atol=1e-5, rtol=0)

    whole = []
    usual = Impressions.bank

    def kept(self, phase, bank):
        whole.append(self.images.clone())
        return usual(self, phase, bank)

    monkeypatch.setattr(Impressions, "bank", kept)
    scheme, bank = unseen.before_training(ledger, spec, data)
    unseen._begin(scheme, bank, spec, steps=5)  # into the next phase
    assert torch.equal(whole[1], torch.from_numpy(shown.images))


def test_munged_images_stand_beside_those_that_they_were_made_from(made):
    ledger, data, runs = made
    real, mixed = unseen.munged(ledger, runs["munge"], data)
    np.testing.assert_array_equal(real, data.images.x_train)
    assert mixed.shape == real.shape and (mixed != real).mean() > 0.5
    again, same = unseen.munged(ledger, runs["unmixed"], data)
    np.testing.assert_array_equal(again, same)


def test_a_data_free_run_is_begun_on_blank_images_and_with_all_of_its_teachers(made):
    ledger, data, runs = made
    for name in ("zero_shot", "data_impressions"):
        _, bank = unseen.before_training(ledger, runs[name], data)
        assert not torch.cat(list(bank.plain(60))).any() and not bank.labels.any()
    scheme, bank = unseen.before_training(ledger, runs["together"], data)
    assert torch.cat(list(bank.plain(60))).any()
    (teacher,) = scheme._teacher
    assert len(teacher.networks) == 2


def test_who_teaches_and_under_which_options(made):
    ledger, _, _ = made
    text = unseen.schemes_table(ledger.planner, "mine", "data_free").data
    assert line(text, "together")[1:3] == ["together", "2 x resnet8"]
    cells = line(text, "zero_shot")
    assert cells[2] == "resnet8" and cells[3].startswith(
        "`zero_shot`: batch 16, noise 8, generator_steps 1, student_steps 3"
    )


def kind(*seen: int, classes: int = 4) -> Kind:
    """One-pixel images that are numbered, in which these classes are seen."""
    images = np.arange(len(seen), dtype=np.uint8).reshape(-1, 1, 1, 1)
    return Kind(images, F.one_hot(torch.tensor(seen), classes).double() * 0.6 + 0.1)


def test_of_each_class_the_first_image_is_picked_and_gaps_are_filled():
    assert kind(2, 0, 0, 1, 3).sample([0, 1, 2, 3]) == [1, 3, 0, 4]
    assert kind(2, 2, 0).sample([0, 1, 2]) == [2, 0, 1]
    assert kind(1, 1).sample([0, 1, 2]) == [0, 1]
    rows = unseen.samples({"a": kind(1, 0), "b": kind(3, 3)}, list("wxyz"), of={"b": "a"})
    assert rows["a"][0].ravel().tolist() == rows["b"][0].ravel().tolist() == [1, 0]
    assert rows["a"][1] == ["w: 70 %", "x: 70 %"] and rows["b"][1] == ["z: 70 %", "z: 70 %"]


def test_the_gap_is_to_the_nearest_image():
    real = np.array([[0, 0], [100, 200]], np.uint8).reshape(2, 1, 2, 1)
    images = np.array([[0, 0], [3, 4], [100, 190]], np.uint8).reshape(3, 1, 2, 1)
    assert unseen.gaps(images, real).tolist() == pytest.approx([0, 5 / 2**0.5, 10 / 2**0.5])


def test_the_table_of_origins_names_gaps_and_classes(made):
    _, data, _ = made
    images = data.images.x_train
    kinds = {"real,\nas is": Kind(images[:4], kind(0, 0, 1, 1, classes=3).probabilities)}
    cells = unseen.kinds_table(kinds, data).data.splitlines()[-1].strip("|").split("|")
    assert [cell.strip() for cell in cells] == ["real, as is", "4", "0.0", "0.0", "70.0", "2"]


def test_what_impressions_reach_is_read_off_their_answers():
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double()
    said, noise = torch.tensor([[0.9, 0.1], [0.6, 0.4]]).double(), torch.full((2, 2), 0.5).double()
    text = unseen.impressions_reading(Impressed(np.zeros((2, 1, 1, 1), np.uint8), targets, said, noise)).data
    assert "over 2 images: 0.50 on noise, 0.35 on the impressions" in text and "In 50 % of them" in text


def test_the_duel_is_read_off_its_first_and_last_steps():
    rows = [(0, "generator", 0.1), (0, "student", 0.4), (0, "student", 0.2)]
    rows += [(1, "generator", 0.3), (1, "student", 0.6), (1, "student", 0.5)]
    text = unseen.duel_reading(Duel(pd.DataFrame(rows, columns=["step", "turn", "disagreement"]), {}, 0.25)).data
    assert "first 2 pseudo-batches" in text and "begin at 0.200" in text
    assert "moves that to 0.500" in text and "images to 0.350" in text and "25.0 % of the values" in text


def test_classes_are_like_those_to_which_their_weights_point(made):
    classifier = torch.nn.Module()
    classifier.classifier = torch.nn.Linear(2, 3)
    classifier.classifier.weight.data = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    similarity = unseen.likeness(classifier)
    torch.testing.assert_close(similarity[1], torch.tensor([0.0, 1.0, 0.5]).double(), atol=1e-6, rtol=0)
    text = unseen.likeness_reading(similarity, "abc", pairs=2).data
    assert "b for c (0.80), b for a (0.60)" in text
    drawn = unseen.drawn_targets(classifier, "abc", count=2000)
    assert list(drawn) == ["targets of c, beta 1", "targets of c, beta 0.1"]
    for each in drawn.values():
        assert each.shape == (2000, 3)
        assert each.mean(dim=0).tolist() == pytest.approx([0, 4 / 9, 5 / 9], abs=0.04)
    wide, narrow = (each[:, 2].var().item() for each in drawn.values())
    assert wide < 0.12 < 0.18 < narrow


def run(method: str, accuracies: list[float], stage: str = "data_free", **more) -> list[dict]:
    usual = {"setting": "digits", "stage": stage, "agreement": 50.0, **more}
    return [row(method, seed, accuracy, **usual) for seed, accuracy in enumerate(accuracies)]


def test_results_are_held_against_chance_and_vanilla_kd():
    frame = results(*run("kd", [89.0, 91.0], "response"), *run("zero_shot", [40.0, 60.0]), *run("kd", [1.0], "other"))
    text = unseen.result_reading(frame, "digits", "data_free", 10.0).data
    assert "gets 10 % right. Vanilla KD on real images reaches 90.00 %" in text
    assert (
        "Zero-shot transfer: 50.00 % (lowest seed 40.00 %), 50 % of the way. It agrees with the teacher on 50.00 %"
        in text
    )
    alone = unseen.result_reading(frame[frame.stage == "data_free"], "digits", "data_free", 10.0).data
    assert "of the way" not in alone and "Zero-shot transfer: 50.00 %" in alone
    diverged = frame.assign(status="diverged")
    assert "No such student" in unseen.result_reading(diverged, "digits", "data_free", 10.0).data


def test_the_scheme_and_the_function_have_names_in_the_list_of_differences():
    text = lesson.differences(Impressions, munge).data
    assert "**Scheme `impressions`**" in text and "**`munge`**" in text
