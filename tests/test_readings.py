"""What a notebook says of its results follows from them, and what it shows of the data is what the loop trains on."""

import numpy as np
import pandas as pd
import pytest
import torch

from kdstudy import lesson, readings
from kdstudy.answers import Answers, edited, example, example_samples, surest
from kdstudy.data import Draws, ImageBank
from kdstudy.image_set import ImageSet
from kdstudy.recipe import Recipe
from kdstudy.relative import EarthMover, RelativeV1
from kdstudy.results import RESULT_COLUMNS
from kdstudy.study import build_method
from kdstudy.tables import comparison_table


def results(*rows: dict) -> pd.DataFrame:
    filler = {
        "stage": "response",
        "scheme": "offline",
        "setting": "digits",
        "purpose": "final",
        "status": "finished",
        "hyperparameters": "{}",
    }
    return pd.DataFrame([filler | {"run": str(i)} | row for i, row in enumerate(rows)], columns=list(RESULT_COLUMNS))


def paired(method: str, accuracies: list[float]) -> list[dict]:
    return [{"method": method, "seed": seed, "test_accuracy": accuracy} for seed, accuracy in enumerate(accuracies)]


KD = paired("kd", [90.0, 91.0, 92.0, 93.0])


def comparison(*rows: dict) -> pd.DataFrame:
    return comparison_table(results(*rows), "digits")


def read(table: pd.DataFrame, profile: str = "thesis") -> str:
    return readings.comparison_reading(table, profile).data


def test_a_sure_difference_is_named_with_its_sign_and_an_unsure_one_is_not():
    worse, better = paired("relative_v1", [88.0, 89.1, 90.0, 91.1]), paired("relative_v2", [93.0, 94.1, 95.0, 96.1])
    unsure = paired("spherical", [89.0, 92.0, 91.5, 93.5])
    text = read(comparison(*KD, *worse, *better, *unsure))
    assert "Better than vanilla KD (p below 0.05 in 3 comparisons" in text
    assert "Relative KD V2 (+3.05 points)" in text
    assert "Worse than vanilla KD" in text and "Relative KD V1 (-1.95 points)" in text
    assert "Spherical KD (" not in text
    assert "Highest mean: Relative KD V2, 94.55 %" in text


def test_no_sure_difference_is_not_called_an_equality():
    text = read(comparison(*KD, *paired("spherical", [89.0, 92.0, 91.5, 93.5])))
    assert "No difference to vanilla KD can be told from chance" in text
    assert "Better" not in text and "Worse" not in text


def test_without_pairs_nothing_is_compared():
    assert "no paired runs" in read(comparison(*paired("spherical", [89.0, 92.0])))
    assert "No student has finished" in read(comparison(*KD).head(0))


def test_only_the_quick_profile_s_numbers_are_said_to_prove_the_machinery():
    table = comparison(*KD)
    assert "machinery" in read(table, "quick") and "machinery" not in read(table, "thesis")


def test_optimism_is_the_best_test_accuracy_less_that_of_the_cell_chosen_on_validation():
    cells = [("kd", 2.0, 80.0, 90.0), ("kd", 4.0, 79.0, 91.5), ("ce", 2.0, 80.0, 90.0), ("ce", 4.0, 70.0, 60.0)]
    rows = [
        {
            "method": method,
            "purpose": "tuning",
            "seed": 0,
            "hyperparameters": f'{{"temperature": {temperature}}}',
            "val_accuracy": validation,
            "test_accuracy": test,
        }
        for method, temperature, validation, test in cells
    ]
    text = readings.optimism_reading(results(*rows)).data
    assert "In 2 grids" in text and "0.75 points" in text and "at most 1.50" in text
    assert "nothing to be picked" in readings.optimism_reading(results(*KD)).data


def answers(logits: list[list[float]], labels: list[int]) -> Answers:
    images = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1)
    names = ["cat", "dog", "eel"][: len(logits[0])]
    return Answers(torch.tensor(logits, dtype=torch.float64), torch.tensor(labels), images, names)


def test_dark_knowledge_names_the_likeliest_wrong_class_and_the_share_of_all():
    said = answers([[4.0, 2.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 4.0]], [0, 1, 2])
    text = readings.dark_knowledge(said, 2.0, pairs=1).data
    weights = np.exp([2.0, 1.0, 0.0])
    assert f"an image of cat is dog with {100 * weights[1] / weights.sum():.1f} %" in text
    own = np.mean([np.exp(4) / np.exp([4, 2, 0]).sum(), *[np.exp(4) / np.exp([4, 0, 0]).sum()] * 2])
    assert f"share {100 * (1 - own):.2f} % of the probability at T = 1" in text


def test_the_mean_over_a_class_is_that_of_its_images_only():
    said = answers([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]], [0, 0, 1])
    first = (torch.tensor([[1.0, 0.0], [3.0, 0.0]]) / 2).softmax(dim=1).mean(dim=0)
    assert said.softened(2.0)[0] == pytest.approx(first.numpy())


def test_wrong_answers_are_counted_where_a_student_meets_them():
    right, mixed = answers([[1.0, 0.0]] * 4, [0] * 4), answers([[1.0, 0.0]] * 4, [0, 0, 0, 1])
    text = readings.where_edits_act({"training": right, "augmented": mixed, "test": right}).data
    assert "a student gets 4 targets; 1 of them (25.00 %)" in text
    assert "On the other 75.00 %" in text


def test_the_surest_answer_has_the_widest_margin_and_a_perfect_teacher_falls_back_on_the_example():
    logits = [[3.0, 0.0], [9.0, 0.0], [5.0, 1.0], [4.0, 1.0]]
    mixed, perfect = answers(logits, [0, 0, 1, 1]), answers(logits, [0, 0, 0, 0])
    parts = {"training": perfect, "test": mixed}
    assert surest(parts, wrong=False).image.item() == 1
    wrong = surest(parts, wrong=True)
    assert (wrong.image.item(), wrong.label) == (2, 1) and "test image" in wrong.title
    assert surest({"training": perfect, "test": perfect}, wrong=True).title == example_samples()[1].title


def test_the_example_is_right_and_wrong_once_and_its_edits_are_those_of_the_methods():
    teacher, _, labels = example()
    assert (teacher.argmax(dim=1) == labels).tolist() == [True, False]
    method = build_method("earth_mover", temperature=2.0)
    target = edited(example_samples()[1], {"earth_mover": method})["earth_mover"]
    assert target.after == pytest.approx(method.target(teacher, labels)[1].numpy())
    assert target.before == pytest.approx((teacher[1] / 2).softmax(dim=0).numpy())
    assert target.unit == "probability, T = 2"


@pytest.mark.parametrize("flip", [False, True])
def test_the_crops_shown_are_those_that_training_sees(flip):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (12, 5, 5, 3), dtype=np.uint8)
    images = ImageSet("mine", pixels, np.arange(12) % 2, pixels[:2], np.arange(2))
    recipe = Recipe(epochs=9, batch=4, learning_rate=0.1, crop_padding=2, flip=flip)
    shown = lesson.crops(images, recipe, seed=7, image=3, epochs=4)
    cpu = torch.device("cpu")
    bank = ImageBank(pixels, images.y_train, mean=[0] * 3, std=[1] * 3, padding=2, device=cpu, dtype=torch.float64)
    draws = Draws.make(seed=7, stream=0, epochs=9, images=12, padding=2, flip=flip, device=cpu)
    for epoch in range(4):
        index, shift, mirrored = draws.batch(epoch, 0, 12)
        batch = bank.augmented(index, shift, mirrored).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(shown[epoch], batch[index.tolist().index(3)])


def test_the_lists_of_differences_come_from_the_docstrings_and_a_missing_one_is_refused():
    text = lesson.differences(EarthMover, RelativeV1).data
    assert text.startswith("**Earth Mover**") and "**Relative KD V1**" in text
    assert text.count("\n* ") >= 4 and "kind" not in text
    with pytest.raises(ValueError, match="ImageSet has no list"):
        lesson.differences(ImageSet)


def test_source_is_shown_without_the_place_it_comes_from():
    text = lesson.source(Recipe.learning_rate_at).data
    assert text.startswith("```python\ndef learning_rate_at(self") and text.endswith("\n```") and "/" not in text
