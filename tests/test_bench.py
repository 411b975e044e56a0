"""The benchmark counts steps, images and seconds as it says, against a clock that is read by hand."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
from toy import CPU

from kdstudy import bench
from kdstudy.bench import COLUMNS, PROFILED_STEPS, Plan, Variant, growth, measure, naive, own, usual_variants
from kdstudy.engine import Engine
from kdstudy.models import build_model
from kdstudy.roofline import Limits, count_work
from kdstudy.train import Training

LIMITS = Limits(bandwidth=2e9, rate=5e9, number_bytes=4, device="an abacus", clock="1 MHz")
TINY = Plan(student="wrn_10_0.25", teacher="wrn_10_0.5", device=CPU, batch=4, images=100, steps=2, rounds=3, workers=0)
REAL = replace(TINY, batch=50)  # two steps an epoch
LONE = Engine()


@pytest.fixture(autouse=True)
def limits(monkeypatch) -> list[str]:
    """The precisions in which the device's limits are asked for; they are always the same."""
    asked = []
    monkeypatch.setattr(bench, "measure_limits", lambda device, precision: asked.append(precision) or LIMITS)
    return asked


class Clock:
    """Stands still but for what variants spend; knows who took steps in which order."""

    def __init__(self, monkeypatch):
        self.now, self.taken = 0.0, []
        monkeypatch.setattr(bench.time, "perf_counter", lambda: self.now)

    def variant(self, name: str, seconds: Callable[[int], float], *, startup=0.0, unsettled=0, **options) -> Variant:
        """Its n-th step takes `seconds(n)`; its way is measured during the first `unsettled` steps."""
        number = count()

        def step() -> None:
            torch.ones(1).add_(1)
            self.now += seconds(next(number))
            self.taken.append(name)

        def build(plan: Plan):
            self.now += startup
            return step, lambda: {
                "way": "measured" if self.taken.count(name) < unsettled else "in_turn",
                "graph": False,
            }

        return Variant(name, **{"precision": "fp32", "students": 1, "live_teacher": True} | options, build=build)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def test_figures_are_those_of_the_clock(clock):
    slow = clock.variant("slow", lambda number: 2.0, startup=7.0)
    fast = clock.variant("fast", lambda number: 0.5, students=3)
    table = measure(TINY, [slow, fast])
    assert tuple(table.columns) == COLUMNS and not table.isna().any(axis=None)
    assert list(table.images_per_second) == [4 / 2.0, 3 * 4 / 0.5]
    assert list(table.ratio) == [1.0, 2.0 / (0.5 / 3)]  # of a student's seconds
    assert list(table.startup_seconds) == [7.0 + 2.0, 0.5]
    assert list(table.students) == [1, 3] and set(table.batch) == {4} and set(table.graph) == {False}
    assert (table.device.unique(), table.clock.unique()) == ("an abacus", "1 MHz")
    assert set(table.copy_gigabytes_per_second) == {2.0} and set(table.product_teraflops) == {0.005}
    assert table.outside_kernels.between(0, 1).all()


def test_variants_take_turns_and_every_round_as_many_steps(clock):
    one, other = clock.variant("one", lambda number: 1.0), clock.variant("other", lambda number: 1.0, unsettled=9)
    told = []
    measure(TINY, [one, other], told.append)
    before = ["one"] * (1 + TINY.warm_up) + ["other"] * (9 + TINY.warm_up)  # once its way is settled
    rounds = (["one"] * TINY.steps + ["other"] * TINY.steps) * TINY.rounds
    assert clock.taken == before + rounds + ["one"] * PROFILED_STEPS + ["other"] * PROFILED_STEPS
    assert len(told) == 2 + TINY.rounds and all(text.startswith("wrn_10_0.25: ") for text in told)


def test_a_hiccup_in_one_round_changes_nothing(clock):
    first = 1 + TINY.warm_up  # the step with which rounds begin

    def with_hiccup(number: int) -> float:
        return 100.0 if number == first else 1.0

    table = measure(TINY, [clock.variant("steady", lambda number: 4.0), clock.variant("hiccup", with_hiccup)])
    assert list(table.images_per_second) == [1.0, 4.0] and list(table.ratio) == [1.0, 4.0]


def test_ratios_are_of_the_same_round(clock):
    def by_round(*seconds: float) -> Callable[[int], float]:
        return lambda number: seconds[max(0, number - 1 - TINY.warm_up) // TINY.steps % 3]

    table = measure(TINY, [clock.variant("a", by_round(9.0, 1.0, 2.0)), clock.variant("b", by_round(1.0, 1.0, 8.0))])
    assert list(table.ratio) == [1.0, 1.0]  # the median of 9, 1 and 1/4, where that of seconds is 2 to 1
    assert list(table.images_per_second) == [4 / 2.0, 4 / 1.0]


@pytest.mark.parametrize(("students", "live_teacher"), [(1, True), (3, True), (3, False)])
def test_in_the_roofline_every_student_is_trained_and_the_teacher_answers_once(students, live_teacher, clock):
    variant = clock.variant("own", lambda number: 0.25, students=students, live_teacher=live_teacher)
    (share,) = measure(TINY, [variant]).roofline_share
    student, teacher = (count_work(build_model(n, classes=100), (3, 32, 32)) for n in (TINY.student, TINY.teacher))

    def least(kernels: Sequence) -> float:
        return sum(max(kernel.flops / 5e9, 4 * kernel.numbers / 2e9) for kernel in kernels)

    expected = TINY.batch * (students * least(student.training) + live_teacher * least(teacher.answering))
    assert share == pytest.approx(expected / 0.25)


def test_limits_are_measured_once_in_each_precision(clock, limits):
    variants = [clock.variant(str(n), lambda number: 1.0, precision=p) for n, p in enumerate(("fp32", "bf16", "bf16"))]
    assert list(measure(TINY, variants).precision) == ["fp32", "bf16", "bf16"]
    assert sorted(limits) == ["bf16", "fp32"]


def test_time_without_operations_is_told_from_time_with_them():
    idle = Variant("idle", "fp32", 1, True, lambda plan: (lambda: nap(torch.ones(1)), settled))
    square = torch.randn(700, 700)
    busy = Variant("busy", "fp32", 1, True, lambda plan: (lambda: [square @ square for _ in range(5)], settled))
    table = measure(replace(TINY, rounds=1, steps=1), [idle, busy])
    assert 0.9 < table.outside_kernels[0] <= 1 and 0 <= table.outside_kernels[1] < 0.3


def settled() -> dict[str, Any]:
    return {"way": "in_turn", "graph": False}


def nap(_: torch.Tensor) -> None:
    time.sleep(0.02)


def test_the_peak_is_of_what_lies_there_at_the_same_time():
    def step() -> None:
        first = torch.zeros(500_000)  # 2 MB
        del first
        _ = torch.zeros(250_000), torch.zeros(500_000)  # 3 MB together

    table = measure(TINY, [Variant("own", "fp32", 1, True, lambda plan: (step, settled))])
    assert table.peak_megabytes[0] == pytest.approx(3, abs=0.01)


# the loops themselves


@pytest.fixture
def small(monkeypatch) -> None:
    """Images, tables of their logits and profiles that take less time."""
    monkeypatch.setattr(bench, "SHAPE", (3, 8, 8))
    monkeypatch.setattr(bench, "PROFILED_STEPS", 1)
    monkeypatch.setattr(bench, "Recipe", partial(bench.Recipe, crop_padding=1))


def test_all_usual_variants_are_measured(small):
    engine = Engine("fused")
    variants = usual_variants("bf16", 3, engine)
    names = ["naive", "one run", "one run", "cohort of 3", "cohort of 3, table"]
    assert [variant.name for variant in variants] == names
    table = measure(REAL, variants)
    assert list(table.variant) == names and list(table.precision) == ["fp32", "fp32", *["bf16"] * 3]
    assert list(table.students) == [1, 1, 1, 3, 3] and list(table.workers) == [0, "", "", "", ""]
    assert list(table.way) == ["in_turn", "in_turn", "in_turn", "fused", "fused"] and not table.graph.any()
    assert [variant.live_teacher for variant in variants] == [True, True, True, True, False]
    assert (table[["images_per_second", "ratio", "roofline_share", "peak_megabytes", "startup_seconds"]] > 0).all(
        axis=None
    )
    assert table.ratio[0] == 1 and table.outside_kernels.between(0, 1).all()


@pytest.mark.parametrize(("tabled", "expected"), [(False, 1), (True, 0)])
def test_the_teacher_looks_once_at_a_batch_or_not_at_all(tabled, expected, small, monkeypatch):
    members, start, looks = [], Training.start, []
    monkeypatch.setattr(Training, "start", lambda member: members.append(member) or start(member))
    step, _ = own("cohort of 3", 3, "fp32", LONE, tabled=tabled).build(REAL)
    step()
    members[0].scheme.teacher.register_forward_hook(lambda *_: looks.append(1))
    for number in range(1, 4):
        step()
        assert len(members) == 3 and len(looks) == number * expected


def test_without_a_table_and_in_full_precision_there_are_fewer():
    found = usual_variants("fp32", 9, LONE, table=False)
    assert [(variant.name, variant.precision) for variant in found] == [
        *(("naive", "fp32"), ("one run", "fp32"), ("cohort of 9", "fp32")),
    ]


def test_both_loops_start_from_the_same_networks(monkeypatch, small):
    loops, members, usual = [], [], bench.NaiveLoop
    monkeypatch.setattr(bench, "NaiveLoop", lambda *a, **o: loops.append(usual(*a, **o)) or loops[-1])
    start = Training.start
    monkeypatch.setattr(Training, "start", lambda member: members.append(member) or start(member))
    states = []
    for variant in (naive(), own("own", 2, "fp32", LONE)):
        monkeypatch.setattr(torch.optim.SGD, "step", lambda *a, **o: None)
        variant.build(REAL)[0]()
    for student, teacher in [
        (loops[0].student, loops[0].teacher),
        *((m.scheme.student, m.scheme.teacher) for m in members),
    ]:
        states.append([dict(student.named_parameters()), dict(teacher.named_parameters())])
    naive_one, first, second = states
    for one, other in zip(naive_one, first, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(first[0][name], second[0][name]) for name in first[0])
    assert members[0].scheme.teacher is members[1].scheme.teacher
    assert [member.scheme.method.temperature for member in members] == [1.0, 2.0]


def test_the_naive_loop_goes_on_through_its_epochs(small):
    step, description = naive().build(REAL)
    for _ in range(5):  # of two steps each epoch
        step()
    assert description() == {"way": "in_turn", "graph": False}


@pytest.mark.parametrize("batch", [50, 100])
def test_epochs_last_for_the_whole_sitting(batch, small):
    plan = replace(REAL, batch=batch, rounds=1)
    (row,) = measure(plan, [own("cohort of 2", 2, "fp32", Engine("measured"))]).to_dict("records")
    assert row["way"] in ("in_turn", "fused")


def test_random_images_are_of_cifars_size_and_always_the_same():
    one, other = REAL.data(), REAL.data()
    assert one.x_train.shape == (100, 32, 32, 3) and one.x_test.shape == (100, 32, 32, 3)
    assert (one.x_train == other.x_train).all() and one.classes == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 110}, "images must be whole batches of 50, so that steps are alike, not 110"),
        ({"images": 50}, "images"),
        ({"batch": 0}, "batch"),
        ({"rounds": 0}, "rounds"),
        ({"steps": 0}, "steps"),
    ],
)
def test_plans_that_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(REAL, **options)


# growth


def test_growth_is_of_students_batch_and_threads_one_after_the_other(monkeypatch, small):
    monkeypatch.setattr(bench, "cores", lambda: 2)
    usual, seen = torch.get_num_threads(), []
    plan = replace(REAL, images=100, rounds=1, steps=1)
    table = growth(plan, "fp32", LONE, students=(1, 3), batches=(50, 80), threads=(1, 2, 16), tell=seen.append)
    assert tuple(table.columns) == ("series", *COLUMNS) and torch.get_num_threads() == usual
    assert list(table.series) == ["students"] * 2 + ["batch"] * 2 + ["threads"] * 2
    assert list(table.students) == [1, 3, 1, 1, 1, 1]
    assert list(table.batch) == [50, 50, 50, 80, 50, 50]
    assert list(table.threads) == [usual] * 4 + [1, 2]
    assert list(table.ratio[table.series != "students"]) == [1.0] * 4 and table.ratio.iloc[0] == 1
    assert seen


def test_threads_are_put_back_when_a_measurement_fails(monkeypatch, small):
    usual = torch.get_num_threads()
    monkeypatch.setattr(bench, "cores", lambda: usual + 1)
    real = bench.measure

    def fail(plan: Plan, *arguments: Any):
        if torch.get_num_threads() != usual:
            raise RuntimeError("the machine is on fire")
        return real(plan, *arguments)

    monkeypatch.setattr(bench, "measure", fail)
    with pytest.raises(RuntimeError, match="on fire"):
        growth(replace(REAL, rounds=1), "fp32", LONE, students=(1,), batches=(), threads=(usual + 1,))
    assert torch.get_num_threads() == usual


def test_a_cohort_of_nobody_is_refused():
    with pytest.raises(ValueError, match="students must be a whole number of at least 1, not 0"):
        usual_variants("fp32", 0, LONE)
