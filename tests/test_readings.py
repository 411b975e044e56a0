"""What a notebook says of its results follows from them, and what it shows of the data is what the loop trains on."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from kdstudy import lesson, readings, table_files
from kdstudy.answers import Answers, edited, example, example_samples, surest
from kdstudy.data import Draws, ImageBank
from kdstudy.image_set import ImageSet, channel_statistics
from kdstudy.params import load_params
from kdstudy.recipe import Recipe
from kdstudy.relative import EarthMover, RelativeV1
from kdstudy.results import RESULT_COLUMNS
from kdstudy.study import Planner, build_method
from kdstudy.tables import comparison_table, label, share_table


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


NAN = float("nan")
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
        index, shift, mirrored = draws.batch(draws.rows(epoch, 0, 12))
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
    assert text.startswith("```python\ndef learning_rate_at(self") and text.endswith("\n```")
    assert ".py" not in text


def on_shares(*rows: tuple[float, str, str, str, list[float]]) -> pd.DataFrame:
    """Runs of (share, method, student, scheme, accuracies), as `table_files.by_share` gives them."""
    runs = [
        run | {"student": student, "scheme": scheme, "student_parameters": 1, "teacher_accuracy": 97.0, "share": share}
        for share, method, student, scheme, accuracies in rows
        for run in paired(method, accuracies)
    ]
    return results(*runs).assign(share=[run["share"] for run in runs])


FEW = (
    (10.0, "ce", "small", "none", [60.0, 61.0, 62.0]),
    (10.0, "dist", "small", "offline", [60.5, 62.5, 61.5]),
    (10.0, "kd", "small", "offline", [64.0, 65.1, 66.0]),
    (100.0, "ce", "small", "none", [90.0, 91.0, 92.0]),
    (100.0, "kd", "small", "offline", [90.0, 92.0, 91.0]),
    (10.0, "few_sample", "pruned", "offline", [80.0, 81.0, 82.0]),
)


def test_what_a_teacher_is_worth_is_told_share_by_share():
    text = readings.share_reading(share_table(on_shares(*FEW), "digits"), "thesis").data
    assert "CE student: 61.00 % on 10 %, 91.00 % on 100 %\n" in text
    assert "Vanilla KD: 65.03 % on 10 % (+4.03), 91.00 % on 100 % (+0.00)\n" in text
    assert "FSKD: 81.00 % on 10 %\n" in text
    assert (
        "From 100 % to 10 % of the images labels alone lose 30.00 points. Vanilla KD makes up for most: +4.03." in text
    )
    assert "Not by chance (p below 0.05 in 3 comparisons" in text and "Vanilla KD on 10 % (+4.03 points)." in text
    assert "machinery" not in text


def test_a_teacher_that_is_worth_nothing_on_few_images_is_not_praised():
    worse = [(share, method, *rest, [50.0, 52.0]) for share, method, *rest, _ in FEW if method == "kd"]
    labels = [row for row in FEW if row[1] == "ce"]
    text = readings.share_reading(share_table(on_shares(*labels, *worse), "digits"), "quick").data
    assert "No method makes up for any of that." in text and "machinery" in text
    assert "makes up for most" not in text


def test_a_reading_of_shares_without_runs_or_pairs_says_so():
    empty = share_table(results().assign(share=[]), "digits")
    assert "No student has finished" in readings.share_reading(empty, "thesis").data
    alone = readings.share_reading(share_table(on_shares(FEW[0]), "digits"), "thesis").data
    assert "no paired runs yet" in alone and "lose" not in alone


def test_what_alignment_repaired_is_told_for_one_seed():
    whole = (100.0, "few_sample", "pruned", "offline", [83.0, 84.0, 85.0])
    rows = on_shares(whole, *FEW, (10.0, "pruned", "pruned", "none", [70.0, 71.0, 72.0]))
    text = readings.alignment_reading({"pruned": 20.5}, rows, seed=1).data
    assert "The teacher of seed 1 gets 97.00 %" in text and "Pruned, as `pruned`, it gets 20.50 %." in text
    assert "Aligned: 81.00 % (10 % of the images), 84.00 % (100 % of the images)." in text
    assert "is pruned" in readings.alignment_reading({}, rows, seed=1).data


def test_a_share_leaves_the_name_of_its_row_only_if_it_stands_there():
    specs = [SimpleNamespace(id=str(number), images=images) for number, images in enumerate((0.01, 0.1, 1.0, 1.0))]
    frame = results(*({"method": method} for method in ("ce_1", "kd_10", "few_sample_100", "few_sample_20")))
    found = table_files.by_share(frame, specs)
    assert list(found.share) == [1.0, 10.0, 100.0, 100.0]
    assert list(found.method) == ["ce", "kd", "few_sample", "few_sample_20"]
    assert list(table_files.by_share(pd.DataFrame(), []).columns) == ["share"]


@pytest.fixture(scope="module")
def planner() -> Planner:
    params = load_params(Path(__file__).parent.parent / "params.yaml")
    return Planner(params, dict.fromkeys(params.datasets, ""))


@pytest.mark.parametrize("flip", [False, True])
def test_the_strong_views_shown_are_those_that_training_sees(flip):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    images = ImageSet("mine", pixels, np.arange(12) % 2, pixels[:2], np.arange(2))
    recipe = Recipe(epochs=9, batch=4, learning_rate=0.1, crop_padding=1, flip=flip)
    shown = lesson.crops(images, recipe, seed=7, image=3, epochs=5, strong=True)
    mean, std = channel_statistics(pixels)
    cpu = torch.device("cpu")
    bank = ImageBank(pixels, images.y_train, mean=mean, std=std, padding=1, device=cpu, dtype=torch.float64)
    draws = Draws.make(seed=7, stream=0, epochs=9, images=12, padding=1, flip=flip, device=cpu, strong=True)
    for epoch in range(5):
        index, *_ = draws.batch(draws.rows(epoch, 0, 12))
        batch = (
            bank.strong(index, draws.strong_batch(draws.rows(epoch, 0, 12))).permute(0, 2, 3, 1).numpy() * std + mean
        )
        assert np.abs(shown[epoch] - batch[index.tolist().index(3)]).max() < 0.5 + 1e-6
    assert not np.array_equal(shown, lesson.crops(images, recipe, seed=7, image=3, epochs=5))


def test_who_else_teaches_is_read_off_the_runs_themselves(planner):
    lines = lesson.teachers_table(planner, "cifar10_wrn_16_1", "response").data.split("\n")
    cells = {row[1]: row[2:-1] for row in ([cell.strip() for cell in line.split("|")] for line in lines if "`" in line)}
    assert "`kd`" not in cells and "`dkd`" not in cells
    assert cells["`ensemble_logits`"] == ["wrn_16_1", "3 x wrn_40_1", "0, 1, 2", "the labels, `CrossEntropy`"]
    assert cells["`assistant`"] == ["wrn_16_1", "wrn_28_1", "0", "wrn_40_1, `VanillaKD`"]
    assert cells["`class_distance`"][-1] == "the labels, `ClassDistanceTeacher`"
    assert "alone" in lesson.teachers_table(planner, "digits_equal", "response").data


def test_a_row_is_held_against_its_control_seed_by_seed():
    strong, standardised = paired("kd_strong", [90.0, 91.0]), paired("logit_standardisation", [92.5, 93.0, 99.0])
    controls = {"logit_standardisation": "kd_strong", "mlkd_masked": "mlkd"}
    lines = readings.control_reading(results(*strong, *standardised), "digits", controls).data.split("\n")
    assert len(lines) == 1
    assert "Logit standardisation, less its control Vanilla KD, strong: +2.25 points (95 % interval" in lines[0]
    assert "n = 2)" in lines[0]
    assert "None of these pairs" in readings.control_reading(results(*strong), "digits", controls).data
    other = [run | {"seed": 7} for run in strong[:1]]
    assert "no seed has both" in readings.control_reading(results(*other, *standardised), "digits", controls).data


def test_networks_that_only_teach_are_named_with_their_accuracy_and_are_no_students():
    own = {"method": "assistant: teacher", "student": "wrn_28_1", "purpose": "teaching"}
    rows = results(*KD, *(own | {"seed": seed, "test_accuracy": 95.0 + seed} for seed in range(3)))
    text = readings.teaching_reading(rows).data
    assert text.startswith("- Teacher assistant is taught by a wrn_28_1 of its own, test accuracy 96.00 % (95 %")
    assert comparison_table(rows, "digits").method.tolist() == ["kd"]
    assert "No row" in readings.teaching_reading(results(*KD)).data


def test_a_setting_without_edits_says_so_in_place_of_an_empty_table():
    right, _ = example_samples()
    text = lesson.edits_table(right, {}).data
    assert text.startswith("**Made up: the teacher is right**: no row") and "|" not in text


def test_the_open_question_is_answered_against_plain_targets_on_the_same_heads():
    plain, better = paired("heads_plain", [90.0, 91.0, 92.0]), paired("heads_v2", [92.0, 93.1, 94.0])
    unsure, labels = paired("heads_v4", [89.0, 93.0, 92.5]), paired("heads_labels", [88.0, 88.0, 91.0])
    text = readings.heads_reading(results(*KD, *plain, *better, *unsure, *labels), "digits").data
    assert "Heads, Relative V2, less its control Heads, plain KD: +2.03 points" in text
    assert "Heads, plain KD, less its control Heads, labels: +2.00 points" in text
    verdict = text.split("\n")[-1]
    assert "hardly make: Heads, Relative V2 (" in verdict
    assert "Heads, Relative V2 0.00054; Heads, Relative V4 0.62)" in verdict
    alone = readings.heads_reading(results(*plain, *unsure), "digits").data
    assert "no difference that can be told from chance" in alone and "Relative V2" not in alone
    assert "None of these pairs" in readings.heads_reading(results(*plain), "digits").data


def test_networks_of_another_size_are_named_with_their_size():
    sized = [
        run | {"student_parameters": size}
        for row, size in (("ce", 1000), ("kd", 1000), ("reused_classifier", 1500))
        for run in paired(row, [90.0, 91.0])
    ]
    text = readings.sizes_reading(results(*sized)).data
    assert text == "- The CE student has 1,000 parameters. Other sizes are deployed by: SimKD 1,500 (+50%)."
    assert "All rows deploy a network of 1,000" in readings.sizes_reading(results(*sized[:4])).data
    assert "no CE student" in readings.sizes_reading(results(*sized[2:])).data


def test_a_comparison_says_whether_vanilla_kd_was_tuned(planner):
    cells = len(planner.tuning("digits", "response", "kd"))
    assert cells > 1
    assert f"out of {cells} cells" in readings.weights_reading(planner, "digits", "feature").data
    assert "not tuned" in readings.weights_reading(planner, "digits_equal", "feature").data
    rows = readings.weights_reading(planner, "digits", "response").data
    assert "The rows of this stage but Vanilla KD, Relative KD V2" in rows


def test_numbers_set_by_hand_for_a_setting_are_not_called_those_of_a_paper(planner):
    by_hand = [row for row in planner.rows("digits", "feature") if row in planner.setting("digits").overrides]
    assert "attention" in by_hand
    names = ", ".join(label(row) for row in by_hand)
    text = readings.weights_reading(planner, "digits", "feature").data
    assert f"this stage but {names} have" in text and f"by hand for this setting, in `params.yaml`: {names}." in text
    assert "by hand" not in readings.weights_reading(planner, "digits_equal", "feature").data
    assert set(planner.rows("digits", "data_free")) <= set(planner.setting("digits").overrides)
    everything = readings.weights_reading(planner, "digits", "data_free").data
    assert "papers" not in everything and "by hand for this setting" in everything


def test_an_exit_is_scored_on_test_images_and_its_edits_counted_on_those_that_a_student_sees():
    seen = answers([[6.0, 5.0, 0.5], [0.5, 5.0, 5.4], [1.5, 3.0, 2.0], [9.0, 0.1, 0.2]], [0, 2, 0, 0])
    test = answers([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [0, 0])
    text = lesson.heads_table([{"augmented": seen, "test": test}]).data
    cells = [cell.strip() for cell in text.splitlines()[-1].split("|")][1:-1]
    # V2 raises the third, which is wrong, and cannot lower the second: 5.4 - 0.5 < 5; nor can V4 the third: 3 - 1.5 < 2
    assert cells == ["classifier", "50.00", "25.00", "25.00", "50.00"]


def closeness(**rows: tuple[float, float, float, float]) -> pd.DataFrame:
    """By method, maps, distances, cosines and flows of one run, and as much above them of another."""
    columns = ["method", "seed", "maps", "distances", "cosines", "flows"]
    return pd.DataFrame(
        [(name, seed, *(gap + seed / 50 for gap in gaps)) for name, gaps in rows.items() for seed in (0, 1)],
        columns=columns,
    )


def test_closeness_is_told_in_the_measure_of_the_method_beside_that_of_the_ce_student():
    near = closeness(ce=(0.5, 0.4, 0.3, 0.2), similarity=(0.1, 0.6, 0.7, 0.8), relational_distance=(0.5, 0.11, 0.9, 1))
    text = readings.closeness_reading(near, results()).data
    assert "0.110 off the teacher there, the CE students 0.510" in text
    assert "cosines are 0.710 off, those of the CE students 0.310" in text
    assert "its students are 0.120 off, the CE students 0.410; in the cosines 0.910 and 0.310" in text
    assert "FSP" not in text and "rank" not in text


@pytest.mark.parametrize("flows", [0.4, NAN])
def test_flows_are_told_of_networks_of_equal_widths_alone(flows):
    text = readings.closeness_reading(closeness(ce=(1, 1, 1, 0.9), fsp=(1, 1, 1, flows)), results()).data
    assert ("41 % off the teacher's, of the CE students 91 %" in text) == (flows == 0.4)
    assert text.startswith("- ")


def test_closeness_and_accuracy_are_ranked_over_all_rows_and_equal_orders_give_one():
    names = ["ce", "kd", "fsp", "similarity", "relational"]
    near = closeness(**{name: (1, 1, 0.1 * place, 1) for place, name in enumerate(names, start=1)})
    worse = [row for place, name in enumerate(names) for row in paired(name, [90.0 - place, 92.0 - place])]
    text = readings.closeness_reading(near, results(*worse)).data
    assert "those of CE student, rank 1 of 5" in text and "rank correlation of 1.00" in text
    better = [row for place, name in enumerate(names) for row in paired(name, [90.0 + place, 92.0 + place])]
    text = readings.closeness_reading(near, results(*better)).data
    assert "those of CE student, rank 5 of 5" in text and "rank correlation of -1.00" in text


def test_the_closest_students_come_first_and_a_column_without_numbers_is_left_out():
    near = closeness(ce=(0.5, 0.4, 0.3, NAN), fsp=(0.5, 0.4, 0.2, NAN))
    rows = results(*paired("ce", [90.0, 91.0]), *paired("fsp", [80.0, 81.0]))
    lines = lesson.closeness_table(near, rows).data.splitlines()
    assert "flows" not in lines[2] and "cosines of embeddings" in lines[2]
    assert [cell.strip() for cell in lines[4].split("|")[1:-1]] == ["FSP", "0.510", "0.410", "0.210", "80.50"]
    assert "CE student" in lines[5]
    assert "no finished students" in lesson.closeness_table(near.head(0), rows).data
    assert readings.closeness_reading(near.head(0), rows).data.startswith("- ")
