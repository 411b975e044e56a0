"""How fast training is: beside the loop that the field uses, for one run and for a cohort, in one sitting.

Variants take turns, so that whatever else the machine does falls on all of them; figures are medians over the rounds.
Images are random ones of CIFAR's size, since speed does not depend on what they show. Both loops run with the same
settings of the process.
"""

import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, count
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.autograd.profiler_util import MEMORY_EVENT_NAME
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from kdstudy.breakdown import break_down, read_events
from kdstudy.cohort import Cohort
from kdstudy.core import require_whole
from kdstudy.device import DataOnDevice
from kdstudy.engine import BLOCK, ROUNDS, Engine
from kdstudy.image_set import ImageSet
from kdstudy.logit_table import LogitTable
from kdstudy.models import build_model
from kdstudy.naive import NaiveLoop
from kdstudy.params import MEASURED, WAYS
from kdstudy.recipe import Recipe
from kdstudy.response import VanillaKD
from kdstudy.roofline import Limits, count_work, measure_limits, roofline_seconds
from kdstudy.schemes import Offline, sample_batch
from kdstudy.train import HALF, Training
from kdstudy.workers import cores

PAIRS = {"wrn_16_1": "wrn_40_1", "wrn_16_2": "wrn_40_2", "resnet18": "resnet34"}  # student: teacher
CLASSES = 100
SHAPE = (3, 32, 32)
PROFILED_STEPS = 5
COLUMNS = (
    *("student", "teacher", "variant", "precision", "students", "batch", "threads", "workers", "way", "graph"),
    *("images_per_second", "ratio", "roofline_share", "outside_kernels", "peak_megabytes", "startup_seconds"),
    *("device", "clock", "copy_gigabytes_per_second", "product_teraflops", "torch", "python"),
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One sitting: `rounds` rounds in which every variant takes `steps` steps, after `warm_up` of each.

    `workers` are those of the naive loop; `images` make an epoch. Raises ValueError unless they are whole batches.
    """

    student: str
    teacher: str
    device: torch.device
    batch: int = 128
    workers: int = 8
    images: int = 12800
    steps: int = 10
    rounds: int = 5
    warm_up: int = 3

    def __post_init__(self) -> None:
        """Refuse numbers out of range, and an odd last batch, whose step would count as a whole one."""
        for name in ("batch", "steps", "rounds"):
            require_whole(name, getattr(self, name))
        require_whole("images", self.images, least=CLASSES)
        if self.images % self.batch:
            raise ValueError(
                f"images must be whole batches of {self.batch}, so that steps are alike, not {self.images}"
            )

    def data(self) -> ImageSet:
        """Random images of CIFAR's size, of 100 classes."""
        generator = np.random.default_rng(0)

        def part(size: int) -> tuple[np.ndarray, np.ndarray]:
            shape = (size, *SHAPE[1:], SHAPE[0])
            return generator.integers(0, 256, shape, dtype=np.uint8), np.arange(size) % CLASSES

        return ImageSet("random", *part(self.images), *part(CLASSES))

    @property
    def epochs(self) -> int:
        """How many at most are begun in the sitting."""
        choosing = (ROUNDS * BLOCK + 1) * len(WAYS)
        steps = choosing + self.warm_up + self.rounds * self.steps + PROFILED_STEPS + 1
        return math.ceil(steps / math.ceil(self.images / self.batch))


@dataclass
class Variant:
    """A way to train `students` students, with what is found out about it.

    `step` takes a step of all of them; `description` says how steps are taken, as `Stepper.description` does.
    """

    name: str
    precision: str
    students: int
    live_teacher: bool
    build: Callable[[Plan], "tuple[Callable[[], None], Callable[[], Mapping[str, Any]]]"]
    step: Callable[[], None] = lambda: None
    description: Callable[[], Mapping[str, Any]] = dict
    found: dict[str, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)  # of a student's image, round by round


def naive() -> Variant:
    """The field's loop: one student, in float32."""

    def build(plan: Plan):
        torch.manual_seed(0)
        teacher, student = (build_model(name, classes=CLASSES) for name in (plan.teacher, plan.student))
        loop = NaiveLoop(student, teacher, plan.data(), batch=plan.batch, workers=plan.workers, device=plan.device)
        steps = (None for _ in count() for _ in loop.steps())  # between epochs workers end and start anew
        return lambda: next(steps), lambda: {"way": "in_turn", "graph": False}

    return Variant("naive", "fp32", 1, True, build)


def own(name: str, students: int, precision: str, engine: Engine, *, tabled: bool = False) -> Variant:
    """The study's loop: students of one teacher and of as many temperatures; `tabled` has its logits beforehand.

    Raises ValueError without students.
    """
    require_whole("students", students)

    def build(plan: Plan):
        recipe = Recipe(epochs=plan.epochs, batch=plan.batch, learning_rate=0.05, precision=precision)
        data = DataOnDevice(plan.data(), plan.device)
        torch.manual_seed(0)
        bank, teacher = data.training(0, recipe), data.build(plan.teacher, recipe)
        sample = sample_batch(bank, plan.batch)
        schemes = [
            Offline(data.build(plan.student, recipe), teacher, VanillaKD(temperature=1.0 + number), sample)
            for number in range(students)
        ]
        place = {"seed": 0, "watch": {}, "capturable": engine.graphs and plan.device.type == "cuda"}
        members = [Training(scheme, recipe, bank, **place) for scheme in schemes]
        tables = _table(teacher, bank, recipe) if tabled else {}
        cohort = Cohort(members, engine, tables)
        steps = cohort.steps()
        return lambda: next(steps), lambda: cohort.description

    return Variant(name, precision, students, not tabled, build)


def _table(teacher: nn.Module, bank: Any, recipe: Recipe) -> dict[nn.Module, LogitTable]:
    return {teacher: LogitTable.build(teacher, bank, flip=recipe.flip, half=HALF[recipe.precision])}


def usual_variants(precision: str, students: int, engine: Engine, *, table: bool = True) -> list[Variant]:
    """The naive loop, one run in both precisions, a cohort, and the cohort with a table of the teacher's logits."""
    lone = Engine(graphs=engine.graphs)
    found = [naive(), own("one run", 1, "fp32", lone)]
    if precision != "fp32":
        found.append(own("one run", 1, precision, lone))
    found.append(own(f"cohort of {students}", students, precision, engine))
    if table:
        found.append(own(f"cohort of {students}, table", students, precision, engine, tabled=True))
    return found


def growth(
    plan: Plan,
    precision: str,
    engine: Engine,
    *,
    students: Sequence[int] = (1, 2, 4, 9, 18, 36),
    batches: Sequence[int] = (64, 128, 256, 512, 1024),
    threads: Sequence[int] = (1, 2, 4, 8, 16),
    tell: Callable[[str], None] = lambda text: None,
) -> pd.DataFrame:
    """How the cost of one run grows with students at its side, with the batch, and on a CPU with threads.

    `COLUMNS` after one more: `series`, which names what is varied. More threads than processors are left out. Ratios
    are against the first of each series that is measured in one sitting: students; the rest stand by themselves.
    """
    cohorts = [own(f"cohort of {count}", count, precision, engine) for count in students]
    frames = [measure(plan, cohorts, tell).assign(series="students")]
    for batch in batches:
        sized = replace(plan, batch=batch, images=batch * math.ceil(plan.images / batch))
        frames.append(measure(sized, [own("one run", 1, precision, engine)], tell).assign(series="batch"))
    usual = torch.get_num_threads()
    try:
        for number in threads if plan.device.type == "cpu" else ():
            if number <= cores():
                torch.set_num_threads(number)
                frames.append(measure(plan, [own("one run", 1, precision, engine)], tell).assign(series="threads"))
    finally:
        torch.set_num_threads(usual)
    return pd.concat(frames)[["series", *COLUMNS]]


def measure(plan: Plan, variants: Sequence[Variant], tell: Callable[[str], None] = lambda text: None) -> pd.DataFrame:
    """A row for each variant, with `COLUMNS`.

    images_per_second counts every student's images. ratio is against the first variant, per student, the median of the
    rounds' ratios. roofline_share: the least time that the device could need (`roofline`), with its limits as measured
    here in the variant's precision, over the time taken. outside_kernels: the share of time in which no kernel runs
    (no ATen operation, on a CPU). peak_megabytes: of tensors, beyond what lies there between steps. startup_seconds:
    until the first step is done.
    """
    limits = {precision: measure_limits(plan.device, precision) for precision in {v.precision for v in variants}}
    for variant in variants:
        tell(f"{plan.student}: {variant.name}, {variant.precision}: start")
        _start(variant, plan)
    for number in range(plan.rounds):
        tell(f"{plan.student}: round {number + 1} of {plan.rounds}")
        for variant in variants:
            seconds = _timed(variant, plan.steps, plan.device)
            variant.seconds.append(seconds / (plan.steps * plan.batch * variant.students))
    for variant in variants:
        variant.found |= _profiled(variant, plan.device)
    return pd.DataFrame([_row(variant, variants[0], plan, limits[variant.precision]) for variant in variants])


def _start(variant: Variant, plan: Plan) -> None:
    start = time.perf_counter()
    variant.step, variant.description = variant.build(plan)
    variant.step()
    _wait(plan.device)
    variant.found["startup_seconds"] = time.perf_counter() - start
    for _ in _until_settled(variant):
        variant.step()
    for _ in range(plan.warm_up):
        variant.step()


def _until_settled(variant: Variant) -> Iterator[None]:
    while variant.description()["way"] == MEASURED:
        yield


def _timed(variant: Variant, steps: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(steps):
        variant.step()
    _wait(device)
    return time.perf_counter() - start


def _profiled(variant: Variant, device: torch.device) -> dict[str, float]:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    always = {"schedule": lambda step: ProfilerAction.RECORD, "profile_memory": device.type == "cpu"}
    with profile(activities=activities, **always) as profiler:  # without a schedule steps are not told apart
        for _ in range(PROFILED_STEPS):
            variant.step()
            profiler.step()
        _wait(device)
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else _peak_on_host(profiler)
    idle = break_down(read_events(profiler.events()), PROFILED_STEPS).idle
    return {"outside_kernels": idle, "peak_megabytes": peak / 1e6}


def _peak_on_host(profiler: profile) -> int:
    """The most bytes that tensors took at the same time, beyond those that were there before."""
    # not from `profiler.events()`: there, what Python lets go between operations counts where the step ends
    recorded = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in recorded if event.name() == MEMORY_EVENT_NAME)
    return max(accumulate(size for _, size in changes))


def _row(variant: Variant, first: Variant, plan: Plan, limits: Limits) -> dict[str, Any]:
    per_image = median(variant.seconds)
    student, teacher = (count_work(build_model(n, classes=CLASSES), SHAPE) for n in (plan.student, plan.teacher))
    least = roofline_seconds([student] * variant.students, [teacher] * variant.live_teacher, limits)
    row = {
        "student": plan.student,
        "teacher": plan.teacher,
        "variant": variant.name,
        "precision": variant.precision,
        "students": variant.students,
        "batch": plan.batch,
        "threads": torch.get_num_threads(),
        "workers": plan.workers if variant.name == "naive" else "",
        "way": variant.description()["way"],
        "graph": variant.description()["graph"],
        "images_per_second": 1 / per_image,
        "ratio": median(slow / fast for slow, fast in zip(first.seconds, variant.seconds, strict=True)),
        "roofline_share": least / (per_image * variant.students),
        "device": limits.device,
        "clock": limits.clock,
        "copy_gigabytes_per_second": limits.bandwidth / 1e9,
        "product_teraflops": limits.rate / 1e12,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    row |= variant.found
    return {name: row[name] for name in COLUMNS}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
