"""Where the time of steps goes: intervals against brute force, breakdowns by hand, and those of a toy loop."""

import gzip
import json
import re
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch.profiler import DeviceType
from toy import CPU, gpu

from kdstudy import breakdown
from kdstudy.breakdown import (
    ELSEWHERE,
    PARTS,
    Event,
    Profile,
    break_down,
    innermost,
    length,
    overlap,
    page,
    parents,
    part,
    read_events,
    union,
)
from kdstudy.models import build_model

END = 20
intervals = st.lists(st.tuples(st.integers(0, END), st.integers(0, END)), max_size=8)


def cells(spans) -> set[int]:
    """The unit cells that spans of whole numbers cover."""
    return {cell for start, end in spans for cell in range(start, end)}


def is_tidy(spans) -> bool:
    flat = [edge for span in spans for edge in span]
    return all(start < end for start, end in spans) and flat == sorted(flat)


@given(intervals)
def test_a_union_covers_the_same_once_and_in_as_few_intervals_as_can_be(spans):
    merged = union(spans)
    assert cells(merged) == cells(spans)
    assert is_tidy(merged)
    assert all(before[1] < after[0] for before, after in pairwise(merged))
    assert length(merged) == len(cells(spans))


@given(intervals, intervals)
@example([(0, 1)], [(1, 2)])  # they touch, and share nothing
def test_an_overlap_is_what_both_cover(one, other):
    shared = overlap(union(one), union(other))
    assert cells(shared) == cells(one) & cells(other)
    assert is_tidy(shared)


@given(intervals)
def test_every_moment_has_the_owner_that_began_last(spans):
    ranges = [(start, end, f"{number:02}") for number, (start, end) in enumerate(spans)]
    owned = innermost(ranges)
    assert is_tidy([(start, end) for start, end, _ in owned])
    found = {cell: name for start, end, name in owned for cell in range(start, end)}
    assert found.keys() == cells(spans)
    for cell, name in found.items():
        there = [(start, -end) for start, end, _ in ranges if start <= cell < end]
        start, end = spans[int(name)]
        assert (start, -end) == max(there)  # of those that began together the shortest is the inner one


def brackets(turns: list[bool], thread: int) -> list[Event]:
    """Events that are nested as an opening and closing of brackets is, all times distinct."""
    found, stack, clock = [], [], 0
    for opens in [*turns, *[False] * len(turns)]:
        clock += 1
        if opens:
            stack.append(clock)
        elif stack:
            found.append(Event("operation", "op", stack.pop(), clock, thread))
    return found


@given(st.lists(st.booleans(), max_size=12), st.lists(st.booleans(), max_size=12), st.randoms())
def test_a_parent_is_the_shortest_event_around_one_on_its_thread(first, second, random):
    events = brackets(first, 1) + brackets(second, 2)
    random.shuffle(events)
    for event, found in zip(events, parents(events), strict=True):
        around = [
            (other.end - other.start, index)
            for index, other in enumerate(events)
            if other.thread == event.thread and other.start < event.start and event.end < other.end
        ]
        assert found == (min(around)[1] if around else None)


def test_events_that_begin_together_or_follow_at_once_are_told_apart():
    spans = [(0, 4), (0, 9), (4, 6), (9, 12)]
    assert parents([Event("operation", "op", *span) for span in spans]) == [1, None, 1, None]


def test_a_step_on_the_cpu_by_hand():
    events = [
        Event("step", "ProfilerStep#7", 0, 1000),
        Event("step", "ProfilerStep#8", 1100, 2000),  # the profiler itself ran in between
        Event("step", "ProfilerStep#9", 2000, 2100),  # the run ended within it
        Event("part", "student", 100, 600),
        Event("part", "teacher", 200, 300),  # within the student: those 100 are the teacher's
        Event("part", "backward", 700, 900),
        Event("part", "student", 1900, 2050),  # 100 of it in the window
        Event("operation", "aten::conv2d", 120, 180),
        Event("operation", "aten::convolution", 130, 170),
        Event("operation", "aten::relu", 210, 260),
        Event("operation", "ConvolutionBackward0", 700, 860, 2),  # autograd's own thread
        Event("operation", "aten::mul", 710, 850, 2),
        Event("operation", "aten::mul", 1000, 1100),  # between the steps
        Event("operation", "aten::mul", 1500, 1580),
        Event("operation", "aten::mul", 2010, 2040),
    ]
    found = break_down(events, 2)
    assert (found.steps, found.milliseconds) == (2, pytest.approx(0.95))
    milliseconds = {name: cost.milliseconds for name, cost in found.parts.items() if cost.milliseconds}
    assert milliseconds == pytest.approx({"student": 0.25, "teacher": 0.05, "backward": 0.1, ELSEWHERE: 0.55})
    calls = {name: cost.calls for name, cost in found.parts.items() if cost.calls}
    assert calls == {"student": 0.5, "teacher": 0.5, "backward": 0.5, ELSEWHERE: 0.5}
    assert found.idle == pytest.approx(1 - (60 + 50 + 140 + 80) / 1900)
    assert not found.on_gpu
    assert [(own.name, own.part, own.calls) for own in found.dearest] == [
        ("aten::mul", "backward", 0.5),
        ("aten::mul", ELSEWHERE, 0.5),
        ("aten::relu", "teacher", 0.5),
        ("aten::convolution", "student", 0.5),
        ("aten::conv2d", "student", 0.5),
        ("ConvolutionBackward0", "backward", 0.5),
    ]
    assert [own.milliseconds for own in found.dearest] == pytest.approx([0.07, 0.04, 0.025, 0.02, 0.01, 0.01])


def gpu_events() -> list[Event]:
    return [
        Event("step", "ProfilerStep#1", 1000, 2000),
        Event("part", "student", 1100, 1200),
        Event("part", "backward", 1300, 1400),
        Event("operation", "aten::conv2d", 1110, 1190),
        Event("operation", "aten::mul", 1310, 1390, 2),
        Event("launch", "cudaLaunchKernel", 1120, 1130, 1, 5),
        Event("launch", "cudaLaunchKernel", 1320, 1330, 2, 6),
        Event("launch", "cudaGraphLaunch", 1500, 1510, 1, 7),
        Event("launch", "cudaStreamSynchronize", 1900, 1990, 1, 8),  # puts nothing on the GPU
        Event("launch", "cudaLaunchKernel", 900, 910, 1, 4),
        Event("kernel", "earlier", 950, 1050, call=4),  # 50 of it in the window, but launched before
        Event("kernel", "convolve", 1350, 1550, call=5),  # runs while the backward pass is being launched
        Event("kernel", "multiply", 1450, 1600, call=6),  # beside it, on another stream
        Event("kernel", "replayed", 1700, 1720, call=7),
        Event("kernel", "replayed", 1720, 1750, call=7),
        Event("kernel", "orphan", 1360, 1380, call=99),
        Event("kernel", "orphan", 700, 800, call=98),
    ]


def test_a_step_on_a_gpu_by_hand():
    found = break_down(gpu_events(), 5)
    assert (found.steps, found.on_gpu) == (1, True)
    assert found.idle == pytest.approx(1 - (50 + 250 + 50) / 1000)
    assert (found.launches, found.graph_launches) == (3, 1)
    kernels = {name: (cost.kernels, cost.gpu_milliseconds) for name, cost in found.parts.items() if cost.kernels}
    # who launched the orphan is not known, so it is not given to the part during which it ran
    assert kernels == {
        "student": (1, pytest.approx(0.2)),
        "backward": (1, pytest.approx(0.15)),
        ELSEWHERE: (3, pytest.approx(0.07)),
    }
    assert [(own.name, own.part, own.calls) for own in found.dearest] == [
        ("convolve", "student", 1),
        ("multiply", "backward", 1),
        ("replayed", ELSEWHERE, 2),
        ("orphan", ELSEWHERE, 1),
    ]
    assert [own.milliseconds for own in found.dearest] == pytest.approx([0.2, 0.15, 0.05, 0.02])
    assert found.parts["student"].calls == found.parts["backward"].calls == 1


@given(
    st.lists(st.integers(0, 5), min_size=2, max_size=6),
    st.lists(st.tuples(st.integers(0, END), st.integers(0, END), st.sampled_from(PARTS)), max_size=10),
)
def test_the_parts_add_up_to_the_step(lengths, ranges):
    edges = [sum(lengths[: n + 1]) for n in range(len(lengths))]
    steps = [Event("step", "s", start, end) for start, end in pairwise(edges) if start < end]
    assume(steps)
    found = break_down([*steps, *(Event("part", name, *sorted(span)) for *span, name in ranges)], len(steps))
    assert list(found.parts) == [*PARTS, ELSEWHERE]
    costs = [cost.milliseconds for cost in found.parts.values()]
    assert min(costs) > -1e-12
    assert sum(costs) == pytest.approx(found.milliseconds)


def test_without_a_step_there_is_no_breakdown():
    with pytest.raises(ValueError, match="no step was recorded"):
        break_down([Event("part", "loss", 0, 1)], 3)


def test_what_the_profiler_records_is_told_apart():
    def recorded(name, *, on=DeviceType.CPU, annotation=False, is_async=False):
        span = SimpleNamespace(start=1.5, end=2.5)
        return SimpleNamespace(
            name=name, device_type=on, is_user_annotation=annotation, is_async=is_async, time_range=span, thread=3, id=4
        )

    kept = {
        "step": recorded("ProfilerStep*", annotation=True),
        "part": recorded("kdstudy::loss", annotation=True),
        "operation": recorded("aten::mul"),
        "launch": recorded("cudaLaunchKernel"),
        "kernel": recorded("void at::native::multiply<float>", on=DeviceType.CUDA),
    }
    ignored = [
        recorded("ProfilerStep*", annotation=True, on=DeviceType.CUDA),  # the step again, on the GPU's time line
        recorded("kdstudy::loss", annotation=True, on=DeviceType.CUDA),
        recorded("Optimizer.step#SGD.step", annotation=True),
        recorded("aten::mul", is_async=True),
    ]
    events = read_events([*ignored, *kept.values()])
    assert [event.kind for event in events] == list(kept)
    assert all(event[2:] == (1.5, 2.5, 3, 4) for event in events)
    assert events[1].name == "loss"
    launches = ["cuLaunchKernelEx", "cudaGraphLaunch", "cudaMemcpyAsync"]
    assert {event.kind for event in read_events(map(recorded, launches))} == {"launch"}
    no_launches = [
        "cudnn_convolution",
        "vendor::cudaCopy",
        "CudnnBatchNormBackward0",
        "autograd::engine::evaluate_function: MulBackward0",
    ]
    assert {event.kind for event in read_events(map(recorded, no_launches))} == {"operation"}


def cells_of(text: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def test_the_page_says_what_was_found():
    text = page(break_down(gpu_events(), 1), "Nine students.", 0.5)
    assert "Nine students." in text
    assert "A step took 1.00 ms while it was recorded and 0.50 ms before." in text
    assert "No kernel runs during 65.0% of the time, and as kernels take 0.35 ms of a step, during 30.0%" in text
    assert "A step is 3.0 launches, 1.0 of them of a whole graph." in text
    assert "what is inside it cannot be told apart" in text
    rows = cells_of(text)
    assert rows["student"] == ["0.100", "10.0%", "1.0", "1.0", "0.200"]
    assert rows["metrics"] == ["0.000", "0.0%", "0.0", "0.0", "0.000"]
    assert rows["`convolve`"] == ["student", "0.200", "1.0"]

    without = [event for event in gpu_events() if event.kind not in ("kernel", "launch")]
    text = page(break_down(without, 1), "One student.", 0.5)
    assert "No ATen operation runs during 84.0% of the time" in text
    assert "graph" not in text and "kernel" not in text and "GPU" not in text
    assert cells_of(text)["student"] == ["0.100", "10.0%", "1.0"]


def test_the_page_stays_a_page_whatever_ran():
    events = [Event("step", "s", 0, 1000)]
    events += [Event("kernel", f"void fused{n:02}|<{'float, ' * 40}>", 10 * n, 10 * n + n) for n in range(30)]
    found = break_down(events, 1)
    assert [re.search(r"\d\d", own.name)[0] for own in found.dearest] == [f"{n}" for n in range(29, 19, -1)]
    text = page(found, "All of it.", 0.01)
    assert "during 0.0% of a step" in text  # the clock's noise is no negative share
    assert text.count("\n") < 60
    assert max(len(line) for line in text.splitlines() if line.startswith("|")) <= 120
    assert "`fused29/<float" in text
    assert {line.count("|") for line in text.splitlines() if "fused" in line} == {5}


def toy_step(student, teacher, optimiser, images):
    """A training step in all parts but the metrics; the teacher is asked while the student's part is open."""
    with part("data"):
        images = images.flip(3)
    with part("student"):
        logits = student(images).logits
        with part("teacher"), torch.no_grad():
            target = teacher(images).logits
    with part("loss"):
        loss = F.mse_loss(logits, target)
    with part("backward"):
        loss.backward()
    with part("optimiser"):
        optimiser.step()
        optimiser.zero_grad()


def toy_loop(device=CPU):
    torch.manual_seed(0)
    student = build_model("wrn_10_1", classes=3, image_size=8).to(device)
    teacher = build_model("wrn_16_1", classes=3, image_size=8).to(device).eval()
    optimiser = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, fused=True)
    images = torch.randn(8, 3, 8, 8, device=device)
    return lambda: toy_step(student, teacher, optimiser, images)


def ranges_of(trace: dict, name: str) -> list[dict]:
    return [event for event in trace["traceEvents"] if event["name"] == name and event["ph"] == "X"]


def lies_in(event: dict, other: dict) -> bool:
    return other["ts"] <= event["ts"] and event["ts"] + event["dur"] <= other["ts"] + other["dur"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The folder of a profile of 4 steps of a loop that goes on for longer."""
    folder = tmp_path_factory.mktemp("profile") / "run"
    step = toy_loop()
    with Profile(folder, CPU, subject="A toy", steps=4, wait=2, warm_up=1) as profile:
        for _ in range(9):
            step()
            profile.step()
            assert breakdown._recording == (2 <= profile._count < 7)
    return folder


def test_a_profile_leaves_a_trace_that_viewers_open(recorded):
    assert sorted(path.name for path in recorded.iterdir()) == ["breakdown.md", "trace.json.gz"]
    with gzip.open(recorded / "trace.json.gz", "rt") as file:
        trace = json.load(file)
    complete = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    for event in complete:
        assert isinstance(event["ts"], (int, float)) and event["dur"] >= 0
    for name in ("data", "teacher", "student", "loss", "backward", "optimiser"):
        assert len(ranges_of(trace, f"kdstudy::{name}")) == 4
    assert not ranges_of(trace, "kdstudy::metrics")
    assert len([event for event in complete if event["name"].startswith("ProfilerStep#")]) == 4


def test_the_page_agrees_with_the_trace(recorded):
    """The trace is what another writer makes of the same steps: sums over it are the page's, to what it rounds."""
    text = (recorded / "breakdown.md").read_text()
    assert "A toy. 4 steps in a row, on the CPU" in text and "ended" not in text and "driver" not in text
    assert text.count("\n") < 60
    rows = cells_of(text)
    with gzip.open(recorded / "trace.json.gz", "rt") as file:
        trace = json.load(file)

    def spent(name):
        return sum(event["dur"] for event in ranges_of(trace, name)) / 4 / 1000

    steps = [event for event in trace["traceEvents"] if event["name"].startswith("ProfilerStep#")]
    whole = sum(event["dur"] for event in steps if event["ph"] == "X") / 4 / 1000
    page_says = {name: float(rows[name][0]) for name in (*PARTS, ELSEWHERE)}
    for name in ("data", "teacher", "loss", "backward", "optimiser"):
        assert page_says[name] == pytest.approx(spent(f"kdstudy::{name}"), abs=0.002)
    assert page_says["student"] == pytest.approx(spent("kdstudy::student") - spent("kdstudy::teacher"), abs=0.002)
    assert page_says["metrics"] == 0
    assert sum(page_says.values()) == pytest.approx(whole, abs=0.01)
    says_whole = re.search(r"took ([\d.]+) ms while it was recorded", text)[1]
    assert float(says_whole) == pytest.approx(whole, abs=0.006)
    assert sum(float(rows[name][1].rstrip("%")) for name in page_says) == pytest.approx(100, abs=0.5)

    calls = [event for event in trace["traceEvents"] if event["name"].startswith("aten::") and event["ph"] == "X"]
    for name in ("data", "teacher", "loss", "backward", "optimiser"):
        own = [call for span in ranges_of(trace, f"kdstudy::{name}") for call in calls if lies_in(call, span)]
        outer = [call for call in own if not any(lies_in(call, other) for other in own if other is not call)]
        assert float(rows[name][2]) == pytest.approx(len(outer) / 4, abs=0.05), name


@pytest.mark.parametrize(
    ("ends_after", "steps", "trace"), [(0, 0, False), (2, 0, False), (3, 0, False), (4, 1, True), (6, 3, True)]
)
def test_a_run_that_ends_early_leaves_what_was_recorded(tmp_path, ends_after, steps, trace):
    with pytest.raises(KeyboardInterrupt), Profile(tmp_path, CPU, subject="A toy", steps=4, wait=2, warm_up=1) as own:
        for _ in range(ends_after):
            with part("loss"):
                torch.ones(2).mul(2)
            own.step()
        with part("loss"):  # the step that is never finished
            torch.ones(2).mul(2).mul(2)
            raise KeyboardInterrupt
    text = (tmp_path / "breakdown.md").read_text()
    assert (tmp_path / "trace.json.gz").exists() == trace
    if steps:
        assert f"{steps} steps in a row" in text and "ended before 4 steps" in text
        assert cells_of(text)["loss"][2] == "2.0"  # ones and mul, no third of the unfinished step
    else:
        assert f"No step was recorded. The run ended after {ends_after} steps, and the first 3" in text
    assert not breakdown._recording


def test_the_time_before_recording_is_that_of_the_latter_half_of_the_wait(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(breakdown.time, "perf_counter", lambda: now)
    with Profile(tmp_path, CPU, subject="A toy", steps=1, wait=5, warm_up=1) as own:
        for seconds in (50, 40, 1, 2, 6, 30, 1):  # the first two settle, the last two are the profiler's
            now += seconds
            own.step()
    assert "and 3000.00 ms before" in (tmp_path / "breakdown.md").read_text()


def test_parts_are_free_unless_recorded():
    assert part("data") is part("loss")  # nothing is made
    with part("data"), part("data"):
        pass
    with pytest.raises(ValueError, match="unknown part 'optimizer'; did you mean 'optimiser'"):
        part("optimizer")


def test_numbers_of_steps_that_are_none_are_refused(tmp_path):
    for wrong in ({"steps": 0}, {"wait": 1}, {"warm_up": 0}, {"steps": 2.5}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be a whole number"):
            Profile(tmp_path, CPU, subject="A toy", **wrong)


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Profile(tmp_path / "file", CPU, subject="A toy")


@gpu
def test_kernels_and_graphs_are_seen_on_a_gpu(tmp_path):
    device = torch.device("cuda")
    step = toy_loop(device)
    images = torch.ones(64, 64, device=device)
    images @ images  # cuBLAS makes its workspace before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        images @ images
    with Profile(tmp_path, device, subject="A toy", steps=3) as profile:
        for _ in range(16):
            step()
            graph.replay()
            profile.step()
    text = (tmp_path / "breakdown.md").read_text()
    rows = cells_of(text)
    assert "1.0 of them of a whole graph" in text
    for name in ("data", "teacher", "student", "loss", "backward", "optimiser"):
        assert float(rows[name][3]) > 0 and float(rows[name][4]) > 0, name
    assert float(rows[ELSEWHERE][3]) > 0  # the graph's
