"""What the page on speed says follows from what was measured."""

import math
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from measured import CPU, GPU, cells, cohort, naive, row, table, write
from torch.utils.flop_counter import FlopCounterMode

from kdstudy import speed
from kdstudy.logit_table import pays
from kdstudy.models import build_model
from kdstudy.params import load_params

ROOT = Path(__file__).parent.parent
NONE = Path("no/such/folder")
SPACE = "\N{NO-BREAK SPACE}"
SLOW_MEMORY = {"copy_gigabytes_per_second": 1e-6, "product_teraflops": 1e6}  # so that only bytes count
SLOW_PRODUCTS = {"copy_gigabytes_per_second": 1e9, "product_teraflops": 1e-9}  # so that only arithmetic counts


# reading


def test_all_tables_of_a_folder_are_read_and_those_on_growth_apart(tmp_path):
    write(tmp_path, "b", row(student="resnet18"), naive(), row(student="wrn_16_2"), row(ratio=2.5))
    write(tmp_path, "a", row(device=GPU, graph=True))
    write(tmp_path, "a_growth", row(series="batch"))
    (tmp_path / "README.md").write_text("what this is")
    found = speed.read_bench(tmp_path)
    assert list(found.file) == ["a", "b", "b", "b", "b"]
    assert list(found.student) == ["wrn_16_1", "wrn_16_1", "wrn_16_1", "wrn_16_2", "resnet18"]
    assert list(found.variant[1:3]) == ["naive", "one run"] and found.ratio[2] == 2.5
    grown = speed.read_growth(tmp_path)
    assert list(grown.file) == ["a_growth"] and list(grown.series) == ["batch"]


def test_a_file_that_is_no_table_is_refused_by_name(tmp_path):
    (tmp_path / "other.csv").write_text("student,teacher\na,b\n")
    with pytest.raises(ValueError, match=r"other\.csv is no table of the benchmark: it lacks variant"):
        speed.read_bench(tmp_path)


def test_what_is_not_measured_is_called_so_and_the_command_is_named():
    frame, points = speed.read_bench(NONE), speed.growth_points(speed.read_growth(NONE))
    judged = speed.judge(frame)
    assert list(judged.device) == [""] * len(speed.GOALS) and judged.ratio.isna().all()
    for text in (speed.bench_tables(frame), speed.making_table(frame), speed.limits_reading(frame)):
        assert re.search("Not measured yet: `python -m kdstudy bench", text.data)
    assert speed.work_table(frame).data.count("not measured yet") == 3
    reading = speed.goals_reading(judged).data
    assert f"0 met, 0 missed, {len(speed.GOALS)} not measured" in reading
    assert "Not measured on a GPU yet.** There, `python -m kdstudy bench --cohort 9`" in reading
    assert "Not measured on a CPU yet.** There, `python -m kdstudy bench --cohort 4`" in reading
    assert {each["the goal is"] for each in cells(speed.goals_table(judged).data)} == {"not measured"}
    assert speed.growth_reading(points).data.count("Not measured yet: `python -m kdstudy bench --growth`") == 3


@pytest.mark.parametrize("device", ["AMD EPYC, 16 threads", "Xeon, 2.1 GHz, 1 threads", "unknown, 1 thread"])
def test_a_cpu_is_told_by_its_threads(device):
    assert speed.kind_of(device) == "CPU"
    assert speed.machine(device) == device.rpartition(",")[0]


def test_a_gpu_has_none():
    assert speed.kind_of(GPU) == "GPU"
    assert speed.machine(GPU) == GPU


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (7200, "2 h"),
        (5400, "1.5 h"),
        (90, "1.5 min"),
        (60, "1 min"),
        (59.94, "59.9 s"),
        (0.25, "250 ms"),
        (1e-4, "100 µs"),
    ],
)
def test_durations_have_a_fitting_unit(seconds, text):
    assert speed.duration(seconds) == text


# the roofline of a step


@pytest.mark.parametrize(("precision", "number_bytes"), [("bf16", 2), ("fp32", 4)])
def test_limits_are_in_bytes_and_operations_per_second(precision, number_bytes):
    limits = speed.limits_of(pd.Series(row(precision=precision)))
    assert (limits.bandwidth, limits.rate, limits.number_bytes) == (20e9, 0.2e12, number_bytes)


def test_a_step_is_asked_for_the_arithmetic_of_student_and_teacher():
    (asked, *_) = cells(speed.work_table(table()).data)
    counts = {}
    for name in ("wrn_16_1", "wrn_40_1"):
        network = build_model(name, classes=100).eval()
        first = 9 * network(torch.zeros(1, 3, 32, 32)).stem[0, 0].numel() * 3 * 16
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 3, 32, 32))
        counts[name] = counter.get_total_flops() // 2, first
    (student, first), (teacher, _) = counts.values()
    # the gradient of the images is not asked for
    assert asked["multiply-adds of an image (millions)"] == f"{(3 * student - first + teacher) / 1e6:.0f}"


def test_the_least_time_of_a_step_is_that_of_its_bytes_where_memory_is_slow():
    lone = row(batch=10, **SLOW_MEMORY)
    usual = [naive(**SLOW_MEMORY), lone | {"precision": "fp32"}, lone, cohort(4, batch=10)]
    (found,) = [each for each in cells(speed.work_table(table(*usual)).data) if each["device"] == CPU]
    kernels = [*speed.work_of("wrn_16_1").training, *speed.work_of("wrn_40_1").answering]
    seconds = 10 * 2 * sum(kernel.numbers for kernel in kernels) / 1e3  # 2 bytes a number, 1 kB/s
    assert found["precision"] == "bf16"  # the last
    assert found["kernels"] == str(len(kernels))
    assert found["a step takes at least"] == f"{seconds / 3600:.3g} h"
    assert found["a kernel, on average"] == f"{seconds / len(kernels) / 60:.3g} min"


# the table


def test_a_device_has_its_conditions_and_a_row_for_each_variant():
    frame = table(
        naive(copy_gigabytes_per_second=19.0, product_teraflops=0.1, images_per_second=1000.4),
        row(images_per_second=2345.6, ratio=2.345, roofline_share=0.256, outside_kernels=0.0512, peak_megabytes=1234.4),
        cohort(4, way="in_turn_compiled", graph=True, startup_seconds=12.34),
        row(device=GPU, clock="1980 MHz", batch=256),
    )
    one, other = speed.bench_tables(frame).data.split(f"**{GPU}.**")
    assert one.startswith(
        f"**{CPU}.** Clock 2000 MHz; copies 19 to 20 GB/s; products 0.1 TFLOP/s in fp32, 0.2 TFLOP/s in bf16; batch "
        "128; 8 workers load the naive loop's images; torch 2.15.0; Python 3.11.7."
    )
    assert "Clock 1980 MHz" in other and "batch 256" in other
    usual, lone, together = cells(one)
    assert usual["variant"] == "naive, fp32" and usual["images/s"] == "1,000"
    shown = {
        "student": "`wrn_16_1`",
        "variant": "one run, bf16",
        "way": f"in{SPACE}turn",
        "images/s": "2,346",
        "ratio": "2.35",
    }
    shown |= {"of roofline (%)": "26", "outside kernels (%)": "5.1", "peak (MB)": "1,234", "start-up (s)": "2.0"}
    assert lone == shown | {"ratio": f"{2.345:.2f}"}
    assert together["way"] == f"in{SPACE}turn, compiled, graph" and together["start-up (s)"] == "12.3"
    assert len(cells(other)) == 1
    (rule,) = [line for line in one.splitlines() if line.startswith("|:")]
    assert [side.endswith(":") for side in rule.strip("|").split("|")] == [False] * 3 + [True] * 6  # numbers right


# goals


def test_the_goals_are_those_that_the_study_set_itself():
    least = {(goal.kind, goal.student, goal.students, goal.precision): goal.least for goal in speed.GOALS}
    assert len(least) == len(speed.GOALS) == 13
    pairs = ("wrn_16_1", "wrn_16_2", "resnet18")
    assert [least["GPU", student, 9, "bf16"] for student in pairs] == [10, 6, 4]
    assert [least["GPU", student, 1, "bf16"] for student in pairs] == [6, 4, 3]
    assert [least["CPU", student, 1, "bf16"] for student in pairs] == [1.7] * 3
    assert [least["CPU", student, 1, "fp32"] for student in pairs] == [1] * 3
    assert least["CPU", "wrn_16_1", 4, "bf16"] == 2.4


def verdicts(*rows: dict) -> dict[tuple, str]:
    """What `goals_table` says of goals that something was measured for, by device, student, what and precision."""
    found = cells(speed.goals_table(speed.judge(table(*rows))).data)
    heads = ("device", "student", "trained", "precision")
    return {
        tuple(each[head].strip("`") for head in heads): f"{each['measured']} {each['the goal is']}"
        for each in found
        if each["the goal is"] != "not measured"
    }


def test_a_goal_is_met_from_its_number_on():
    rows = [naive(), row(ratio=1.7), row(precision="fp32", ratio=0.99), cohort(4, ratio=2.39)]
    assert verdicts(*rows) == {
        ("CPU", "wrn_16_1", "cohort of 4", "bf16"): f"2.39 missed, on {CPU}",
        ("CPU", "wrn_16_1", "one run", "bf16"): f"1.70 met, on {CPU}",
        ("CPU", "wrn_16_1", "one run", "fp32"): f"0.99 missed, on {CPU}",
    }


def test_other_variants_and_devices_do_not_count_for_it():
    tabled = cohort(4, variant="cohort of 4, table", ratio=9.0)
    assert verdicts(naive(ratio=1.0), tabled, cohort(9, ratio=99.0), cohort(4, precision="fp32", ratio=9.0)) == {}
    assert verdicts(naive(device=GPU), cohort(4, device=GPU, ratio=9.0), row(device=GPU, precision="fp32")) == {}
    assert list(verdicts(cohort(9, device=GPU, ratio=10.0))) == [("GPU", "wrn_16_1", "cohort of 9", "bf16")]


def test_each_device_is_judged_and_the_sentence_counts():
    frame = table(row(ratio=2.0), row(ratio=1.5, device="Xeon, 4 threads"))
    judged = speed.judge(frame)
    assert len(judged) == len(speed.GOALS) + 1
    reading = speed.goals_reading(judged).data
    assert "1 met, 1 missed, 12 not measured" in reading
    assert "Missed: 1.7 for `wrn_16_1`, one run in bf16, on Xeon, 4 threads: 1.50 was measured." in reading
    assert reading.count("Missed") == 1
    assert "Not measured on a GPU yet" in reading and "on a CPU yet" not in reading
    both = speed.goals_reading(speed.judge(table(row(), cohort(9, device=GPU, ratio=8.0)))).data
    assert "yet" not in both and "cohort of 9 in bf16, on NVIDIA H100: 8.00" in both


# growth


def grown(series: str, speeds: dict[int, float], file: str = "device", **values) -> pd.DataFrame:
    rows = [row(series=series, images_per_second=found, **({series: at} | values)) for at, found in speeds.items()]
    return table(*rows, file=file)


def test_cost_is_relative_to_the_first_point_whatever_the_order():
    points = speed.growth_points(grown("batch", {256: 160.0, 64: 80.0, 128: 100.0}))
    assert list(points["at"]) == [64, 128, 256]
    assert list(points.cost) == pytest.approx([1, 0.8, 0.5])
    assert list(points.predicted) == [1, 1, 1]
    reading = speed.growth_reading(points).data
    assert f"`wrn_16_1` on {CPU}, 64 to 256: 0.50 (predicted 1.00)." in reading and "least" not in reading


def test_the_least_is_named_where_it_is_not_the_last():
    points = speed.growth_points(grown("batch", {64: 80.0, 128: 160.0, 256: 100.0}))
    assert "64 to 256: 0.80 (predicted 1.00), least 0.50 at 128." in speed.growth_reading(points).data


@pytest.mark.parametrize(("limits", "count"), [(SLOW_MEMORY, "numbers"), (SLOW_PRODUCTS, "flops")])
def test_students_are_predicted_to_share_the_answers_of_the_teacher(limits, count):
    points = speed.growth_points(grown("students", {1: 100.0, 2: 130.0, 9: 150.0}, **limits))
    own = sum(getattr(kernel, count) for kernel in speed.work_of("wrn_16_1").training)
    taught = sum(getattr(kernel, count) for kernel in speed.work_of("wrn_40_1").answering)
    expected = [(own + taught / students) / (own + taught) for students in (1, 2, 9)]
    assert list(points.predicted) == pytest.approx(expected)
    assert expected[-1] < 0.9  # so that it is no mere 1


def test_a_line_that_begins_later_is_predicted_from_there():
    points = speed.growth_points(grown("threads", {2: 100.0, 8: 300.0}))
    assert list(points.predicted) == [1, 0.25]
    students = speed.growth_points(grown("students", {4: 100.0, 8: 300.0}))
    assert students.predicted[0] == 1 and students.predicted[1] < 1


def test_lines_are_those_of_a_file_and_a_student_and_a_point_is_none():
    frames = [
        grown("students", {1: 1.0, 2: 2.0}, "one"),
        grown("students", {1: 1.0, 2: 8.0}, "one", student="wrn_16_2"),
        grown("students", {1: 1.0, 2: 16.0}, "two", device=GPU),
        grown("threads", {1: 1.0}, "one"),
    ]
    points = speed.growth_points(pd.concat(frames))
    ends = points[points["at"] == 2]
    assert list(ends.cost) == pytest.approx([1 / 2, 1 / 8, 1 / 16])
    assert list(ends.device) == [CPU, CPU, GPU]
    assert set(points.series) == {"students"}


def test_a_line_over_threads_is_one_device():
    frame = table(
        *(row(series="batch", batch=batch, images_per_second=1.0) for batch in (64, 128)),
        row(series="threads", threads=1, device="AMD EPYC, 1 threads", images_per_second=10.0),
        row(series="threads", threads=2, device="AMD EPYC, 2 threads", images_per_second=16.0),
    )
    points = speed.growth_points(frame)
    assert set(points.device) == {CPU}
    reading = speed.growth_reading(points).data
    assert "`wrn_16_1` on AMD EPYC, 1 to 2: 0.62 (predicted 0.50)" in reading
    assert "**Students.** Not measured yet" in reading


# the table of logits


def test_a_table_pays_from_the_runs_whose_epochs_are_more_than_its_views():
    params = load_params(ROOT / "params.yaml")
    found = cells(speed.size_table(params).data)
    assert {(each["data set"], each["recipe"]) for each in found} == {
        (f"`{setting.dataset}`", f"`{setting.recipe}`")
        for setting in params.settings.values()
        if setting.dataset != "digits"
    }
    for each in found:
        recipe, classes = params.recipes[each["recipe"].strip("`")], int(each["classes"])
        place = {"padding": recipe.crop_padding, "flip": recipe.flip, "memory": math.inf}
        paying = [runs for runs in range(1, 50) if pays(runs * recipe.epochs, images=1, classes=classes, **place)]
        assert each["runs from which it pays"] == str(paying[0])
        assert each["epochs of a run"] == str(recipe.epochs)
        assert each["table (MB)"] == {10: "162", 100: "1,620"}[classes]
        assert each["images"] == "50000" and each["views of an image"] == "162"


def test_an_answer_costs_what_a_table_saves():
    # two students, 10 ms a step and image with the teacher, 8 ms without
    live = cohort(2, images_per_second=200.0, **SLOW_MEMORY)
    tabled = cohort(2, variant="cohort of 2, table", images_per_second=2 / 8e-3, **SLOW_MEMORY)
    others = [row(), cohort(2, precision="fp32"), cohort(2, device=GPU), cohort(4)]
    (found,) = cells(speed.making_table(table(live, tabled, *others)).data)
    assert found["an answer, measured"] == "2 ms" and found["share of the step (%)"] == "20"
    assert found["table, from that"] == f"{50_000 * 162 * 2e-3 / 3600} h"
    numbers = sum(kernel.numbers for kernel in speed.work_of("wrn_40_1").answering)
    assert found["table, at least (roofline)"] == f"{50_000 * 162 * 2 * numbers / 1e3 / 3600:.3g} h"


def test_a_table_that_saved_nothing_says_nothing_of_the_answer():
    rows = [cohort(2, images_per_second=200.0), cohort(2, variant="cohort of 2, table", images_per_second=199.0)]
    (found,) = cells(speed.making_table(table(*rows)).data)
    assert [found[head] for head in ("an answer, measured", "share of the step (%)", "table, from that")] == ["-"] * 3


# what limits


def test_the_fastest_variant_is_held_against_the_roofline():
    rows = [naive(ratio=99.0), row(ratio=3.0, roofline_share=0.4, outside_kernels=0.2)]
    rows.append(cohort(4, ratio=2.0, images_per_second=900.0))
    reading = speed.limits_reading(table(*rows)).data
    assert reading == (
        f'- `wrn_16_1` on {CPU}: the fastest is "one run" in bf16 (in{SPACE}turn), 3.0 times the naive loop. It '
        "reaches 40 % of the roofline. In 20 % of the time nothing is computed; kernels that are slower than the "
        "device could be lose more, 40 %."
    )


def test_idle_time_that_outweighs_slow_kernels_is_said_and_a_gpu_has_a_goal_for_it():
    slow = row(device=GPU, roofline_share=0.4, outside_kernels=0.31, graph=True)
    reading = speed.limits_reading(table(slow, row(student="resnet18"))).data
    first, second = reading.splitlines()
    assert (
        f"(in{SPACE}turn, graph)" in first
        and "In 31 % of the time nothing is computed (the goal: at most 5 %)" in first
    )
    assert first.endswith("that is more than kernels lose by being slower than the device could be.")
    assert second.startswith("- `resnet18`") and "the goal" not in second
