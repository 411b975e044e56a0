"""Where the time of training steps goes: named parts of the loop, a trace of some steps, and one page about them."""

import re
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile, record_function, schedule

from kdstudy.core import require_whole
from kdstudy.files import atomic_write, require_writable, unknown_name, write_text

PARTS = ("data", "teacher", "student", "loss", "backward", "optimiser", "metrics")
ELSEWHERE = "elsewhere"  # the time that belongs to no part

PREFIX = "kdstudy::"
LABELS = {name: PREFIX + name for name in PARTS}
RUNTIME_CALL = re.compile(r"cu(da)?[A-Z]")  # cudaLaunchKernel, cuLaunchKernelEx, cudaGraphLaunch, cudaMemcpyAsync
DEAREST = 10
NAME_WIDTH = 70  # of an operation on the page; names of kernels run to hundreds of characters

TITLE = "# Where the time of a training step goes"
GPU_NOTE = """\
ms are the host's, which only launches. A kernel counts where it was launched, wherever it ran; GPU ms are the sum of
the kernels' times, copies included.
"""
GRAPH_NOTE = """\
A graph is launched whole: what is inside it cannot be told apart, so its kernels count where the launch was.
"""
ELSEWHERE_NOTE = """\
Of parts within each other the innermost counts. "elsewhere" is no part: the loop itself, the recording, and what comes
between two steps, such as an evaluation.
"""

RECORDING_NOTE = "What recording adds falls on many small operations more than on a few large ones."

_NOTHING = nullcontext()
_recording = False  # whether a Profile records; outside of it a part costs one look at this


def part(name: str) -> AbstractContextManager:
    """Mark what is done inside as one of `PARTS`. Parts may be nested: the innermost owns the time.

    Raises ValueError for another name.
    """
    if name not in LABELS:
        raise unknown_name("part", name, PARTS)
    return record_function(LABELS[name]) if _recording else _NOTHING


Interval = tuple[float, float]
Range = tuple[float, float, str]  # start, end, name


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """What lies in any of the intervals, as disjoint intervals in order; empty ones vanish."""
    merged: list[Interval] = []
    for start, end in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def overlap(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """What lies in both. Each is, and the result will be, disjoint intervals in order."""
    shared = []
    first = second = 0
    while first < len(one) and second < len(other):
        start, end = max(one[first][0], other[second][0]), min(one[first][1], other[second][1])
        if start < end:
            shared.append((start, end))
        if one[first][1] <= other[second][1]:
            first += 1
        else:
            second += 1
    return shared


def length(intervals: Iterable[Interval]) -> float:
    """How long disjoint intervals are together."""
    return sum(end - start for start, end in intervals)


def innermost(ranges: Iterable[Range]) -> list[Range]:
    """Who owns which time, disjoint and in order: of ranges that overlap, the one that began last."""
    waiting = sorted(ranges, reverse=True)
    edges = sorted({edge for start, end, _ in waiting for edge in (start, end)})
    owned, active = [], []
    for left, right in pairwise(edges):
        while waiting and waiting[-1][0] <= left:
            start, end, name = waiting.pop()
            heappush(active, (-start, end, name))
        while active and active[0][1] <= left:
            heappop(active)
        if active:
            owned.append((left, right, active[0][2]))
    return owned


class Event(NamedTuple):
    """Something that the profiler saw, in microseconds.

    `kind` is "step", "part" (then `name` is one of `PARTS`), "operation" (of PyTorch, on the host), "launch" (a call
    of the CUDA runtime) or "kernel" (whatever runs on the GPU, copies too). A kernel has the `call` of its launch.
    """

    kind: str
    name: str
    start: float
    end: float
    thread: int = 0
    call: int = 0


def parents(events: Sequence[Event]) -> list[int | None]:
    """For each event the index of the innermost other one that it lies in on its thread, None if there is none."""
    found: list[int | None] = [None] * len(events)
    open_on: dict[int, list[int]] = defaultdict(list)
    for index in sorted(range(len(events)), key=lambda index: (events[index].start, -events[index].end)):
        stack = open_on[events[index].thread]
        while stack and events[stack[-1]].end <= events[index].start:
            stack.pop()
        found[index] = stack[-1] if stack else None
        stack.append(index)
    return found


@dataclass(frozen=True)
class Cost:
    """What a part takes in a step. On a GPU the host's time is that of launching, and kernels run later."""

    milliseconds: float  # of the host
    calls: float  # ATen operations that no other one called
    kernels: float  # that were launched in it, copies too
    gpu_milliseconds: float  # sum over these


@dataclass(frozen=True)
class Operation:
    """What an operation, or on a GPU a kernel, takes of a part in a step, without the operations that it calls."""

    name: str
    part: str
    milliseconds: float
    calls: float


@dataclass(frozen=True)
class Breakdown:
    """Means over `steps` steps in a row. `parts` has all of `PARTS` and `ELSEWHERE`; their times add up to a step's."""

    steps: int
    milliseconds: float  # of wall time, a step
    parts: dict[str, Cost]
    idle: float  # share of the time in which no kernel runs; where there are none, no ATen operation
    on_gpu: bool
    launches: float  # calls that put something on the GPU, a step
    graph_launches: float  # those among them that replay a graph
    dearest: tuple[Operation, ...]  # the ten most expensive, falling


def break_down(events: Iterable[Event], most_steps: int) -> Breakdown:
    """Where the time of the first `most_steps` steps goes. Raises ValueError if there is no step among the events.

    Time is attributed by time alone: an operation belongs to the part during which it begins, on whichever thread, and
    a kernel to the part during which it was launched.
    """
    of_kind: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        of_kind[event.kind].append(event)
    spans = sorted((step.start, step.end) for step in of_kind["step"])[:most_steps]
    if not spans:
        raise ValueError("no step was recorded")
    window = union(spans)
    owners = _Owners(window, innermost((own.start, own.end, own.name) for own in of_kind["part"]))
    operations = [event for event in of_kind["operation"] if owners.at(event.start)]
    calls = [event for event in operations if event.name.startswith("aten::")]
    launched = {event.call: event for event in of_kind["launch"]}
    kernels = [(_launcher(kernel, launched, owners), kernel) for kernel in of_kind["kernel"]]
    kernels = [(owner, kernel) for owner, kernel in kernels if owner]
    launches = [launched[call].name for call in {own.call for _, own in kernels} if call in launched]
    on_gpu = bool(of_kind["kernel"])
    busy = union((event.start, event.end) for event in (of_kind["kernel"] if on_gpu else calls))
    steps = len(spans)
    return Breakdown(
        steps=steps,
        milliseconds=length(window) / steps / 1000,
        parts=_parts(owners, calls, kernels, steps),
        idle=1 - length(overlap(busy, window)) / length(window),
        on_gpu=on_gpu,
        launches=len(launches) / steps,
        graph_launches=sum("GraphLaunch" in name for name in launches) / steps,
        dearest=_dearest(kernels if on_gpu else _without_callees(operations, owners), steps),
    )


class _Owners:
    """Whose the moments of a window are; they belong to a part, or to `ELSEWHERE`."""

    def __init__(self, window: list[Interval], owned: list[Range]):
        self._window, self._owned = window, owned
        self._starts = [start for start, _ in window], [start for start, _, _ in owned]

    def at(self, moment: float) -> str | None:
        """The owner of a moment, None outside the window."""
        if _covering(self._starts[0], self._window, moment) is None:
            return None
        owned = _covering(self._starts[1], self._owned, moment)
        return owned[2] if owned else ELSEWHERE

    def durations(self) -> dict[str, float]:
        """How much of the window each has."""
        of_part: dict[str, list[Interval]] = {name: [] for name in PARTS}
        for start, end, name in self._owned:
            of_part[name].append((start, end))
        found = {name: length(overlap(own, self._window)) for name, own in of_part.items()}
        return found | {ELSEWHERE: length(self._window) - sum(found.values())}


def _covering(starts: list[float], ranges: list[tuple], moment: float) -> tuple | None:
    index = bisect_right(starts, moment) - 1
    return ranges[index] if index >= 0 and moment < ranges[index][1] else None


Owned = tuple[str, Event]


def _launcher(kernel: Event, launched: dict[int, Event], owners: _Owners) -> str | None:
    if kernel.call in launched:
        return owners.at(launched[kernel.call].start)
    return owners.at(kernel.start) and ELSEWHERE  # it runs later than what launched it: its own time says nothing


def _parts(owners: _Owners, calls: list[Event], kernels: list[Owned], steps: int) -> dict[str, Cost]:
    outer = Counter(owners.at(call.start) for call, above in zip(calls, parents(calls), strict=True) if above is None)
    launched = Counter(owner for owner, _ in kernels)
    spent: dict[str, float] = defaultdict(float)
    for owner, kernel in kernels:
        spent[owner] += kernel.end - kernel.start
    return {
        name: Cost(
            milliseconds=duration / steps / 1000,
            calls=outer[name] / steps,
            kernels=launched[name] / steps,
            gpu_milliseconds=spent[name] / steps / 1000,
        )
        for name, duration in owners.durations().items()
    }


def _without_callees(operations: list[Event], owners: _Owners) -> list[Owned]:
    """Operations with their owners, each shortened by those that it calls."""
    own = [event.end - event.start for event in operations]
    for event, above in zip(operations, parents(operations), strict=True):
        if above is not None:
            own[above] -= event.end - event.start
    return [
        (owners.at(event.start), event._replace(end=event.start + duration))
        for event, duration in zip(operations, own, strict=True)
    ]


def _dearest(owned: list[Owned], steps: int) -> tuple[Operation, ...]:
    durations: dict[tuple[str, str], list[float]] = defaultdict(list)
    for owner, event in owned:
        durations[event.name, owner].append(event.end - event.start)
    found = [
        Operation(name, owner, sum(each) / steps / 1000, len(each) / steps) for (name, owner), each in durations.items()
    ]
    return tuple(sorted(found, key=lambda operation: -operation.milliseconds)[:DEAREST])


def read_events(recorded: Iterable[Any]) -> list[Event]:
    """The events of `torch.profiler.profile.events()` that a breakdown counts."""
    found = []
    for event in recorded:
        kind, name = _kind(event)
        if kind and not event.is_async:  # it would begin on one thread and end on another
            span = event.time_range
            found.append(Event(kind, name, span.start, span.end, event.thread, event.id))
    return found


def _kind(event: Any) -> tuple[str | None, str]:
    name = event.name
    on_host = event.device_type == DeviceType.CPU
    if event.is_user_annotation:  # ranges on the GPU, too, which span kernels and are none
        if on_host and name.startswith("ProfilerStep"):
            return "step", name
        return ("part", name.removeprefix(PREFIX)) if on_host and name.startswith(PREFIX) else (None, name)
    if not on_host:
        return "kernel", name
    return ("launch" if RUNTIME_CALL.match(name) else "operation"), name


def page(breakdown: Breakdown, facts: str, usual: float) -> str:
    """The page about a breakdown, Markdown. `facts` say what was measured and where.

    `usual` is the time in milliseconds of a step that is not recorded.
    """
    return "\n".join(
        [
            TITLE,
            "",
            facts,
            f"A step took {breakdown.milliseconds:.2f} ms while it was recorded and {usual:.2f} ms before.",
            RECORDING_NOTE,
            "",
            _table_of_parts(breakdown),
            GPU_NOTE * breakdown.on_gpu + GRAPH_NOTE * (breakdown.graph_launches > 0) + ELSEWHERE_NOTE,
            _idle_sentence(breakdown, usual),
            "",
            f"## The most expensive {'kernels' if breakdown.on_gpu else 'operations, without what they call'}",
            "",
            _table_of_operations(breakdown),
        ]
    )


def _idle_sentence(breakdown: Breakdown, usual: float) -> str:
    if not breakdown.on_gpu:
        return f"No ATen operation runs during {breakdown.idle:.1%} of the time: Python, autograd and the recording do."
    busy = (1 - breakdown.idle) * breakdown.milliseconds
    return (
        f"No kernel runs during {breakdown.idle:.1%} of the time, and as kernels take {busy:.2f} ms of a step, during "
        f"{max(0, 1 - busy / usual):.1%} of a step that is not recorded. A step is {breakdown.launches:.1f} launches, "
        f"{breakdown.graph_launches:.1f} of them of a whole graph."
    )


def _table_of_parts(breakdown: Breakdown) -> str:
    header = ["part", "ms a step", "share", "ATen calls a step"]
    rows = []
    for name, cost in breakdown.parts.items():
        share = cost.milliseconds / breakdown.milliseconds
        row = [name, f"{cost.milliseconds:.3f}", f"{share:.1%}", f"{cost.calls:.1f}"]
        rows.append(row + [f"{cost.kernels:.1f}", f"{cost.gpu_milliseconds:.3f}"] * breakdown.on_gpu)
    return _table(header + ["kernels a step", "GPU ms a step"] * breakdown.on_gpu, rows)


def _table_of_operations(breakdown: Breakdown) -> str:
    rows = [
        [f"`{_short(own.name)}`", own.part, f"{own.milliseconds:.3f}", f"{own.calls:.1f}"] for own in breakdown.dearest
    ]
    return _table(["name", "part", "ms a step", "calls a step"], rows)


def _short(name: str) -> str:
    name = name.removeprefix("void ").replace("|", "/")  # a bar would end the table's cell
    return name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 1] + "…"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


class Profile:
    """Records some training steps and writes `trace.json.gz` and `breakdown.md` into `folder`.

    Used as a context; `step()` is called after each training step. The first `wait` steps run as ever, and the latter
    half of them is timed; during the `warm_up` after them the profiler is on but keeps nothing; then come the `steps`
    that are recorded, and the files are written. A run that ends before that leaves what was recorded. The device is
    waited for where the timed and the recorded stretch begin and end. `subject` says on the page what was trained.
    The trace is in Chrome's format, for chrome://tracing and ui.perfetto.dev. Raises ValueError for a number of steps
    that is none, OSError if the folder cannot be written to.
    """

    def __init__(
        self, folder: Path, device: torch.device, *, subject: str, steps: int = 20, wait: int = 10, warm_up: int = 3
    ):
        require_whole("steps", steps)
        require_whole("wait", wait, least=2)
        require_whole("warm_up", warm_up)
        self._folder, self._device, self._subject = Path(folder), device, subject
        self._steps, self._wait, self._skipped = steps, wait, wait + warm_up
        self._count = 0
        self._clock = self._usual = 0.0  # ms: when the timed stretch began, what a step of it took
        require_writable(self._folder)  # better now than after all the steps
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._profiler: profile | None = profile(  # None once the files are written
            activities=activities, schedule=schedule(wait=wait, warmup=warm_up, active=steps)
        )
        self._profiler.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def step(self) -> None:
        """Say that a training step has ended. After the last recorded one this does nothing."""
        global _recording
        if self._profiler is None:
            return
        self._count += 1
        if self._count in (self._wait // 2, self._wait, self._skipped, self._skipped + self._steps):
            self._synchronise()
        self._time()
        if self._count == self._skipped + self._steps:
            self.close()
        else:
            self._profiler.step()
            _recording = self._count >= self._wait

    def close(self) -> None:
        """Stop recording and write the files, unless that is done."""
        global _recording
        if self._profiler is None:
            return
        _recording = False
        profiler, self._profiler = self._profiler, None  # what it holds is large, and training goes on
        profiler.stop()
        recorded = self._count - self._skipped
        events = read_events(profiler.events()) if recorded > 0 else []
        if any(event.kind == "step" for event in events):
            with atomic_write(self._folder / "trace.json.gz") as temporary:
                profiler.export_chrome_trace(str(temporary))
            breakdown = break_down(events, recorded)
            text = page(breakdown, self._facts(breakdown), self._usual)
        else:
            text = (
                f"{TITLE}\n\n{self._subject}. No step was recorded. The run ended after {self._count} steps, and the "
                f"first {self._skipped} are never recorded.\n"
            )
        write_text(self._folder / "breakdown.md", text)

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _time(self) -> None:
        now = 1000 * time.perf_counter()
        if self._count == self._wait // 2:
            self._clock = now
        elif self._count == self._wait:
            self._usual = (now - self._clock) / (self._wait - self._wait // 2)

    def _facts(self, breakdown: Breakdown) -> str:
        facts = [
            f"{self._subject}. {breakdown.steps} steps in a row, on {_device_name(self._device)}, "
            f"torch {torch.__version__}.",
        ]
        if breakdown.steps < self._steps:
            facts.append(f"The run ended before {self._steps} steps were recorded.")
        if self._device.type == "cuda" and not breakdown.on_gpu:
            facts.append("The profiler was shown no kernel by the GPU's driver: what follows is the host's side alone.")
        return "\n".join(facts)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU ({torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()})"
