"""Costs are those of all that was trained, and what is said of schemes under one budget follows from the runs."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from torch import nn

from kdstudy import budget, budget_figures
from kdstudy.core import Phase
from kdstudy.costs import untrained_scheme
from kdstudy.device import DataOnDevice, data_path
from kdstudy.execute import Executor, open_ledger
from kdstudy.figures import show
from kdstudy.image_set import ImageSet, save_image_set
from kdstudy.params import load_params, parse_params
from kdstudy.results import RESULT_COLUMNS
from kdstudy.schemes import Batch, Scheme
from kdstudy.statistics import holm, paired_difference
from kdstudy.store import Store
from kdstudy.study import Planner, RunSpec

ROOT = Path(__file__).parent.parent
NAN = float("nan")
TEACHER, STUDENT = "wrn_10_0.5", "wrn_10_0.25"
KD = {"method": "kd", "ce_weight": 0.1, "kd_weight": 0.9, "temperature": 4.0}
TREE = {
    "profiles": {"quick": {"device": "cpu", "threads": 1}},
    "datasets": {"stripes": {"source": "npz", "validation": 12}},
    "recipes": {
        "short": {
            **{"epochs": 2, "batch": 16, "learning_rate": 0.05, "milestones": [1]},
            **{"crop_padding": 1, "flip": False, "precision": "fp32"},
        }
    },
    "settings": {
        "stripes": {
            **{"profile": "quick", "dataset": "stripes", "teacher": TEACHER, "student": STUDENT},
            **{"recipe": "short", "seeds": [0, 1]},
        }
    },
    "methods": {
        "response": {"ce": {}, "kd": KD, "kd_half": {**KD, "images": 0.5}},
        "online": {
            "peers_kd_half": {**KD, "images": 0.5, "scheme": {"name": "peers"}},
            "peers_kd_wide": {**KD, "network": "{teacher}", "scheme": {"name": "peers"}},
            "peers_kd": {**KD, "scheme": {"name": "peers"}},
        },
        "budget": {
            "budget_ce": {"method": "ce", "length": 2.0},
            "budget_kd": KD,
            "budget_equal_teacher": {**KD, "taught_by": {"row": "ce"}},
            "budget_mutual": {"method": "mutual"},
            "budget_zero_shot": {"method": "zero_shot", "length": 0.5, "scheme": {"batch": 16, "student_steps": 3}},
        },
    },
    "grids": {},
}


def planner(tree: dict = TREE) -> Planner:
    return Planner(parse_params(tree), {"stripes": "checksum"})


def batch_of(count: int, channels: int = 1) -> Batch:
    images = torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % 3
    return Batch(images, labels, torch.arange(count), images, labels)


def stripes() -> ImageSet:
    generator = np.random.default_rng(0)

    def part(count):
        labels = np.arange(count) % 3
        images = generator.integers(0, 120, (count, 8, 8, 1), np.uint8)
        images[np.arange(count), 2 + 2 * labels] += 100
        return images, labels

    return ImageSet("stripes", *part(60), *part(30))


# multiply-adds, held against a count by hand


def products(network: nn.Module, x: torch.Tensor) -> tuple[int, int]:
    """The multiply-adds of a forward pass for one of the images, and those of its first layer alone."""
    found: list[int] = []

    def note(layer, _, y):
        if isinstance(layer, nn.Linear):
            found.append(layer.in_features * layer.out_features)
        else:
            reach = layer.kernel_size[0] * layer.kernel_size[1]
            found.append(y[0].numel() * layer.in_channels // layer.groups * reach)

    hooks = [m.register_forward_hook(note) for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    return sum(found), found[0]


def counted(row: str) -> tuple[float, Scheme]:
    spec = planner().final("stripes", "budget", row, {})[0]
    scheme = untrained_scheme(spec, batch_of(4), 3)
    (phase,) = scheme.phases()
    return budget.multiply_adds(scheme, phase, batch_of(4)), scheme


def trained(network: nn.Module) -> int:
    """Forward, gradient of the weights, gradient of the input but for the images."""
    forward, first = products(network, batch_of(4).images)
    return 3 * forward - first


def test_multiply_adds_of_one_network_are_three_forward_passes_without_the_gradient_of_the_images():
    found, scheme = counted("budget_ce")
    assert found == trained(scheme.student)


def test_a_teacher_that_is_finished_adds_its_forward_pass():
    found, scheme = counted("budget_kd")
    (teacher,) = scheme._teacher
    assert found == trained(scheme.student) + products(teacher, batch_of(4).images)[0]


def test_peers_are_counted_each():
    found, scheme = counted("budget_mutual")
    assert found == sum(trained(peer) for peer in scheme.peers) == 2 * trained(scheme.peers[0])


def test_steps_of_a_turn_are_counted_as_often_as_they_are_taken():
    found, scheme = counted("budget_zero_shot")
    (teacher,) = scheme._teacher
    images = batch_of(4).images
    student, taught = products(scheme.student, images)[0], products(teacher, images)[0]
    draws, first = products(scheme.generator, torch.randn(4, 100))
    # the generator learns through both networks, to their input; then it draws once for three steps of the student
    generator_step = (3 * draws - first) + 2 * (student + taught)
    assert found == generator_step + draws + taught + 3 * trained(scheme.student)


# network-epochs


def planned(*runs: RunSpec) -> list[int]:
    return [budget.planned_in_all(run, batch_of(2), 3) for run in runs]


def test_generations_cost_what_all_before_them_cost_each_once():
    first = budget.generation(planner(), "stripes", 4)
    second = budget.generation(planner(), "stripes", 4, first)
    third = budget.generation(planner(), "stripes", 4, second)
    fourth = budget.generation(planner(), "stripes", 4, second, third)
    assert planned(first, second, third, fourth) == [4, 8, 12, 16]


def test_the_plan_counts_turns_peers_and_teachers():
    frame = budget.plan(planner(), "stripes", batch_of(2), 3).set_index("method")
    assert frame.network_epochs.to_dict() == {
        "budget_ce": 4,
        "budget_kd": 2,
        "budget_equal_teacher": 2,
        "budget_mutual": 4,
        "budget_zero_shot": 4,  # one epoch of the generator and three of the student
    }
    assert (frame.all_network_epochs - frame.network_epochs).to_dict() == {
        "budget_ce": 0,
        "budget_kd": 2,
        "budget_equal_teacher": 2,
        "budget_mutual": 0,
        "budget_zero_shot": 2,
    }
    text = budget.plan_table(frame.reset_index()).data
    assert "-2" in next(line for line in text.splitlines() if "`budget_zero_shot`" in line)
    assert "no row" in budget.plan_table(frame.head(0)).data


def test_the_budget_is_that_of_a_teacher_and_a_student_with_recipes_of_their_own():
    assert budget.allowance(planner(), "stripes") == 4
    longer = {**TREE, "recipes": {**TREE["recipes"], "long": {**TREE["recipes"]["short"], "epochs": 7}}}
    setting = {**TREE["settings"]["stripes"], "teacher_recipe": "long"}
    assert budget.allowance(planner({**longer, "settings": {"stripes": setting}}), "stripes") == 9


@pytest.mark.parametrize("setting", ["digits", "cifar10_wrn_16_1"])
def test_the_rows_of_the_study_keep_to_the_budget_as_near_as_whole_epochs_come(setting):
    params = load_params(ROOT / "params.yaml")
    study = Planner(params, dict.fromkeys(params.datasets, "checksum"))
    frame = budget.plan(study, setting, batch_of(2, channels=1 if setting == "digits" else 3), 10)
    assert len(frame) == len(params.methods["budget"])
    left = frame.budget - frame.all_network_epochs
    assert (left >= 0).all()
    assert (left < frame.network_epochs / frame.epochs).all(), "one epoch more would fit in"


# runs that were made


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A ledger whose stages have all been trained, but for `online`; with the data."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("params.yaml").write_text(yaml.safe_dump(TREE))
        save_image_set(stripes(), data_path("stripes"))
        ledger = open_ledger(store=Store(folder / "store", folder / "runs"))
        executor = Executor(ledger, "stripes", device="cpu")
        executor.make_chosen("response")
        executor.make_chosen("budget")
    return ledger, DataOnDevice(stripes(), torch.device("cpu"))


def test_costs_are_those_of_the_records_with_all_that_taught(made):
    ledger, data = made
    frame = budget.cost_table(ledger, "stripes", data).set_index("method")
    for row in frame.index:
        spec = ledger.final("stripes", "budget", row)[0]
        assert frame.all_network_epochs[row] == ledger.network_epochs(spec)
        assert frame.network_epochs[row] == ledger.store.record(spec)["network_epochs"]
    assert frame.networks.to_dict() == {
        "budget_ce": 1,
        "budget_kd": 2,
        "budget_equal_teacher": 2,
        "budget_mutual": 2,
        "budget_zero_shot": 3,
    }
    assert frame.family.tolist() == ["none", "offline", "offline", "online", "data_free"]


def test_multiply_adds_of_a_run_are_those_of_its_images_and_epochs(made):
    ledger, data = made
    frame = budget.cost_table(ledger, "stripes", data).set_index("method")
    student, teacher = (data.build(name, ledger.planner.params.recipes["short"]) for name in (STUDENT, TEACHER))
    images, epochs = 60, 2
    assert frame.multiply_adds["budget_ce"] == images * 2 * epochs * trained(student)
    forward, _ = products(teacher, batch_of(4).images)
    expected = images * epochs * (trained(teacher) + trained(student) + forward)
    assert frame.multiply_adds["budget_kd"] == expected
    assert frame.multiply_adds["budget_mutual"] == frame.multiply_adds["budget_ce"]


def test_a_row_whose_teacher_has_no_record_has_no_cost(made, tmp_path):
    ledger, data = made
    empty = type(ledger)(ledger.planner, Store(tmp_path / "store", tmp_path / "runs"))
    assert budget.cost_table(empty, "stripes", data).empty
    assert budget.points(empty, "stripes").empty


def test_points_are_all_rows_that_were_run_whatever_their_stage(made):
    ledger, _ = made
    frame = budget.points(ledger, "stripes").set_index("method")
    assert set(frame.index) == {"ce", "kd", "kd_half", *TREE["methods"]["budget"]}
    assert frame.all_network_epochs["kd"] == 4 and frame.all_network_epochs["ce"] == 2
    assert frame.few.to_dict() == {row: row == "kd_half" for row in frame.index}
    specs = ledger.final("stripes", "response", "kd")
    assert frame.test_accuracy["kd"] == pytest.approx(ledger.frame(specs).test_accuracy.mean())


def test_all_of_it_can_be_shown(made, tmp_path):
    ledger, data = made
    spent = budget.cost_table(ledger, "stripes", data)
    results = ledger.frame(ledger.runs("stripes", "budget"))
    frame = budget.budget_table(results, spent)
    points = budget.points(ledger, "stripes")
    show(budget_figures.accuracy_by_budget(points, frame, 4), tmp_path / "one.png")
    assert "Less: Budget" not in budget.spending_reading(frame, 4).data
    assert "More: Budget: zero-shot (6)" in budget.spending_reading(frame, 4).data
    for text in (budget.costs_printed(frame).data, budget.results_printed(frame).data):
        assert text.count("Budget: ") >= len(frame)


# tables and readings, from numbers


def runs(**rows: list[float]) -> pd.DataFrame:
    """Final runs by row, one for each seed."""
    filler = {"purpose": "final", "setting": "stripes", "status": "finished", "student_parameters": 5094}
    filler |= {"scheme": "offline", "all_network_epochs": 32}
    cells = [
        filler | {"run": f"{row}{seed}", "method": row, "seed": seed, "test_accuracy": accuracy}
        for row, accuracies in rows.items()
        for seed, accuracy in enumerate(accuracies)
    ]
    return pd.DataFrame(cells, columns=list(RESULT_COLUMNS))


def costs(**multiply_adds: float) -> pd.DataFrame:
    rows = [(row, "self", "self", 1, 32, 32, count) for row, count in multiply_adds.items()]
    heads = ["method", "family", "scheme", "networks", "network_epochs", "all_network_epochs", "multiply_adds"]
    return pd.DataFrame(rows, columns=heads)


RUNS = {
    "ce": [88.0, 88.5, 89.5, 90.0],
    "budget_ce": [90.0, 91.0, 92.0, 93.0],
    "budget_kd": [92.0, 93.1, 94.0, 95.3],
    "budget_mutual": [90.5, 90.0, 92.9, 92.2],
}
COSTS = {"budget_ce": 1e9, "budget_kd": 4e9, "budget_mutual": 1e9}


def test_differences_are_paired_with_both_references_and_corrected_together():
    frame = budget.budget_table(runs(**RUNS), costs(**COSTS)).set_index("method")
    assert list(frame.index) == ["budget_kd", "budget_ce", "budget_mutual"]
    assert frame.ce["budget_kd"] == pytest.approx(2.1)
    assert frame.kd["budget_ce"] == -frame.ce["budget_kd"]
    assert np.isnan(frame.ce["budget_ce"]) and np.isnan(frame.kd["budget_kd"])
    series = {row: pd.Series(values) for row, values in RUNS.items()}
    pairs = [("budget_kd", "budget_ce"), ("budget_mutual", "budget_ce"), ("budget_ce", "budget_kd"),
             ("budget_mutual", "budget_kd")]  # fmt: skip
    expected = holm([paired_difference(series[one], series[other])[1] for one, other in pairs])
    found = [frame.ce_p["budget_kd"], frame.ce_p["budget_mutual"], frame.kd_p["budget_ce"], frame.kd_p["budget_mutual"]]
    np.testing.assert_allclose(found, expected)


def test_without_a_reference_there_is_no_difference():
    frame = budget.budget_table(runs(budget_mutual=[90.0, 91.0]), costs(budget_mutual=1e9))
    assert frame[["ce", "kd", "ce_p", "kd_p"]].isna().all(axis=None)
    assert " - " in budget.results_printed(frame).data


def test_tables_print_each_row_once_with_its_units():
    frame = budget.budget_table(runs(**RUNS), costs(**{row: 1e3 * count for row, count in COSTS.items()}))
    text = budget.costs_printed(frame).data
    assert "tera" in text and "| Budget: vanilla KD" in text
    cells = [cell.strip() for cell in next(line for line in text.splitlines() if "mutual" in line).split("|")]
    assert cells[1:-1] == ["Budget: mutual learning", "self", "self", "1", "32", "32", "1", "5,094"]
    text = budget.results_printed(frame).data
    assert "+2.10 [" in text and "less Budget: labels" in text
    empty = frame.head(0)
    assert all("has been run" in each(empty).data for each in (budget.costs_printed, budget.results_printed))


@pytest.mark.parametrize(
    ("largest", "unit"), [(5e15, "peta"), (5e14, "tera"), (1e12, "tera"), (9e11, "giga"), (5e6, "giga")]
)
def test_units(largest, unit):
    scale, name = budget.unit_of(largest)
    assert name == unit and scale == {"peta": 1e15, "tera": 1e12, "giga": 1e9}[unit]


def test_the_spending_names_who_stays_below_and_what_a_teacher_adds_to_the_bill():
    frame = budget.budget_table(runs(**RUNS), costs(**COSTS))
    frame.loc[frame.method == "budget_mutual", "all_network_epochs"] = 27
    text = budget.spending_reading(frame, 32).data
    assert "2 of 3 rows spend all of it. Less: Budget: mutual learning (27)." in text and "More" not in text
    assert "Budget: vanilla KD takes 4.0 times those of Budget: labels" in text
    assert "4.0 times as dear" in text and "for 128 epochs" in text
    assert "has been run" in budget.spending_reading(frame.head(0), 32).data


def test_the_reading_names_what_is_sure_with_its_sign_and_how_many_tests_there_were():
    results = runs(**RUNS)
    frame = budget.budget_table(results, costs(**COSTS))
    text = budget.budget_reading(frame, results, 10, "thesis").data
    assert (
        "Not by chance other than Budget: labels (points; p below 0.05 of 4 tests): Budget: vanilla KD (+2.10)" in text
    )
    assert "Not by chance other than Budget: vanilla KD" in text and "Budget: labels (-2.10)" in text
    assert "from 91.40 % (Budget: mutual learning) to 93.60 % (Budget: vanilla KD)" in text
    assert "(Budget: labels less CE student): +2.50 points (n = 4, 95 % interval" in text
    assert "generated ones" not in text  # that row was not run
    assert "machinery" not in text
    assert "machinery" in budget.budget_reading(frame, results, 10, "quick").data
    assert "has been run" in budget.budget_reading(frame.head(0), results, 10, "quick").data


def test_who_only_guesses_is_named():
    rows = {"budget_ce": [90.0, 91.0], "budget_zero_shot": [10.0, 11.0]}
    frame, results = budget.budget_table(runs(**rows), costs(budget_ce=1e9, budget_zero_shot=1e9)), runs(**rows)
    text = budget.budget_reading(frame, results, 10, "thesis").data
    assert "Budget: zero-shot is near guessing (10.50 %, where 10.00 % is chance)" in text
    assert text.count("guessing") == 1
    assert "guessing" not in budget.budget_reading(frame, results, 100, "thesis").data


def test_no_sure_difference_is_not_called_an_equality():
    rows = {"budget_ce": [90.0, 91.0, 92.0], "budget_kd": [90.5, 90.0, 93.0]}
    frame = budget.budget_table(runs(**rows), costs(budget_ce=1e9, budget_kd=1e9))
    text = budget.budget_reading(frame, runs(**rows), 10, "thesis").data
    assert (
        "No difference to Budget: labels can be told from chance: of 1, none has p below 0.05, corrected for 2" in text
    )


# one loss under several schemes


def test_losses_are_shared_by_rows_of_several_schemes_and_by_those_that_match_answers():
    shared = budget.shared_losses(planner(), "stripes")
    assert shared == {
        "Answers, by a divergence": ["budget_kd", "budget_equal_teacher", "budget_mutual", "budget_zero_shot"],
        "Vanilla KD": ["kd", "peers_kd"],
    }


def test_worth_is_the_paired_difference_to_labels_alone_of_rows_that_were_run():
    results = runs(**RUNS, kd=[91.0, 91.5, 93.0, 94.0])
    results.loc[results.method == "budget_mutual", "scheme"] = "peers"
    frame = budget.worth(planner(), results, "stripes")
    assert frame.method.tolist() == ["budget_kd", "budget_mutual"]  # of vanilla KD only one scheme was run
    assert frame.scheme.tolist() == ["offline", "peers"]
    assert frame.difference[0] == pytest.approx(2.1) and frame.pairs[0] == 4
    text = budget.worth_reading(frame).data
    assert "most by Budget: vanilla KD under `offline` (+2.10 points, 32 network-epochs)" in text
    assert "least by Budget: mutual learning under `peers`" in text and "of 2 rows" in text
    without = budget.worth(planner(), results[results.method != "budget_ce"], "stripes")
    assert without.empty and "more than one scheme" in budget.worth_reading(without).data


# figures


POINTS = pd.DataFrame(
    [
        ("response", "ce", "none", 16.0, 95.0, False),
        ("response", "kd", "offline", 32.0, 94.0, False),
        ("few_data", "kd_10", "offline", 32.0, 93.0, True),
        ("budget", "budget_kd", "offline", 32.0, 94.5, False),
        ("budget", "budget_zero_shot", "data_free", 27.0, 12.0, False),
    ],
    columns=["stage", "method", "family", "all_network_epochs", "test_accuracy", "few"],
)


def drawn() -> tuple:
    frame = budget.budget_table(runs(**RUNS), costs(**COSTS))
    return budget_figures.accuracy_by_budget(POINTS, frame, 32).axes


def marks(ax) -> list:
    return [line for line in ax.lines if line.get_marker() not in ("None", None, "")]


def test_every_row_is_a_point_at_its_cost_and_those_on_the_budget_stand_out():
    above, _ = drawn()
    points = marks(above)
    assert len(points) == len(POINTS)
    sizes = {round(float(line.get_ydata()[0]), 1): line.get_markersize() for line in points}
    assert sizes[94.5] > sizes[94.0] == sizes[95.0]
    places = {round(float(line.get_ydata()[0]), 1): float(line.get_xdata()[0]) for line in points}
    assert places[95.0] == 16 and all(abs(places[y] / 32 - 1) < 0.07 for y in (94.0, 93.0, 94.5))
    assert len({places[y] for y in (94.0, 93.0, 94.5)}) == 3  # side by side
    open_ones = [round(float(line.get_ydata()[0]), 1) for line in points if line.get_markerfacecolor() == "white"]
    assert open_ones == [93.0]


def test_what_lies_far_below_ends_in_an_arrow_at_the_axis_and_does_not_squeeze_the_rest():
    above, _ = drawn()
    (arrow,) = [line for line in marks(above) if line.get_marker() == "v"]
    assert float(arrow.get_xdata()[0]) == 27 and float(arrow.get_ydata()[0]) == above.get_ylim()[0] > 80


def test_the_rows_of_the_stage_are_named_with_their_accuracy_and_names_do_not_overlap():
    _, below = drawn()
    names = [text for text in below.texts if "Budget" in text.get_text()]
    assert sorted(text.get_text() for text in names) == [
        "91.4  Budget: mutual learning",
        "91.5  Budget: labels",
        "93.6  Budget: vanilla KD",
    ]
    heights = sorted(text.xyann[1] for text in names)
    low, high = below.get_ylim()
    assert min(np.diff(heights)) >= 0.064 * (high - low)


def test_the_worth_of_a_loss_has_a_line_per_row_and_arrows_beyond_the_axis():
    rows = [("A", "kd", "offline", 32, 1.0, 0.5, 1.5, 3), ("A", "munge", "munged", 32, -80.0, NAN, NAN, 1),
            ("A", "mutual", "peers", 32, -1.0, -1.5, -0.5, 3)]  # fmt: skip
    heads = ["shared", "method", "scheme", "all_network_epochs", "difference", "low", "high", "pairs"]
    ax = budget_figures.worth_by_scheme(pd.DataFrame(rows, columns=heads)).axes[0]
    assert [float(line.get_xdata()[0]) for line in marks(ax) if line.get_marker() == "o"] == [1.0, -1.0]
    (arrow,) = [line for line in marks(ax) if line.get_marker() == "<"]
    assert float(arrow.get_xdata()[0]) == ax.get_xlim()[0] > -40
    assert "\N{MINUS SIGN}80.00" in [text.get_text() for text in ax.texts]
    assert next(tick.get_text() for tick in ax.get_yticklabels()).endswith("(offline, 32)")


def test_names_are_moved_apart_and_keep_their_order():
    moved = budget_figures._spread([5.0, 5.1, 1.0, 9.9, 9.8], 1.0, (0.0, 10.0))
    assert min(np.diff(np.sort(moved))) >= 1.0 - 1e-9 and moved.max() <= 10.0
    assert list(np.argsort(moved)) == [2, 0, 1, 4, 3]
    assert budget_figures._spread([0.1, 0.0, 0.2], 1.0, (0.0, 10.0)).tolist() == [1.0, 0.0, 2.0]  # not below the axis
    assert len(budget_figures._spread([], 1.0, (0.0, 1.0))) == 0


def test_equal_data_give_equal_files(tmp_path):
    frame = budget.budget_table(runs(**RUNS), costs(**COSTS))
    one, two = (show(budget_figures.accuracy_by_budget(POINTS, frame, 32), tmp_path / name) for name in ("a", "b"))
    assert one.data == two.data


def test_without_rows_of_the_stage_the_others_are_shown(tmp_path):
    frame = budget.budget_table(runs(**RUNS), costs()).head(0)
    show(budget_figures.accuracy_by_budget(POINTS[:3], frame, 32), tmp_path / "few.png")


def test_a_phase_without_gradient_costs_nothing():
    class Nothing(Scheme):
        def phases(self):
            return ()

        def turns(self, phase):
            return ()

        assemble = losses = deployed = None

    assert budget.multiply_adds(Nothing(), Phase("none", lambda *_: {}, trains=()), batch_of(2)) == 0
