"""What witnesses inside the processes saw: steps, checkpoints and records, in the order in which they happened."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

WORDS = 7  # of a line
CLOCK_SECONDS = 0.1  # between two looks at the clock that mean the same moment
Position = tuple[int, int, int]  # phase, epoch, step


@dataclass(frozen=True)
class Event:
    """`what` is start, step, save or kept; `position` is where the run stood afterwards."""

    what: str
    run: str
    position: Position
    process: int
    seconds: float


def read_events(path: Path) -> list[Event]:
    """All events of runs so far; a line that is not whole yet is left out.

    So is training that belongs to no run: the notebook on data-free distillation repeats some to show its images.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [
        _event(line) for line in text.splitlines(keepends=True) if line.endswith("\n") and len(line.split()) == WORDS
    ]


def _event(line: str) -> Event:
    what, run, *numbers, process, seconds = line.split()
    return Event(what, run, tuple(map(int, numbers)), int(process), float(seconds))


@dataclass(frozen=True)
class Sitting:
    """What one process did for one run: from where it started, what was saved, and whether it kept a record.

    Seconds are those since its last checkpoint, or since its start.
    """

    run: str
    began: Position
    saved: Position
    unsaved_steps: int
    unsaved_seconds: float  # up to its last step
    due_seconds: float  # up to the step before that, after which a checkpoint would have been written, had one been due
    finished: bool


def sittings(events: Iterable[Event]) -> Iterator[Sitting]:
    """Every sitting, in the order of starts."""
    parts: list[list[Event]] = []
    current: dict[tuple[str, int], list[Event]] = {}
    for event in events:
        key = (event.run, event.process)
        if event.what == "start":
            current[key] = []
            parts.append(current[key])
        if key in current:
            current[key].append(event)
    return map(_sitting, parts)


def _sitting(events: list[Event]) -> Sitting:
    last = max(number for number, event in enumerate(events) if event.what in ("start", "save"))
    unsaved = [event.seconds - events[last].seconds for event in events[last:] if event.what == "step"]
    return Sitting(
        run=events[0].run,
        began=events[0].position,
        saved=events[last].position,
        unsaved_steps=len(unsaved),
        unsaved_seconds=unsaved[-1] if unsaved else 0.0,
        due_seconds=unsaved[-2] if len(unsaved) > 1 else 0.0,
        finished=events[-1].what == "kept",
    )


def misdeeds(events: Iterable[Event], checkpoint_seconds: float) -> list[str]:
    """Sentences on runs that wrote checkpoints too rarely, went on from before their last one, or were begun again
    after they had a record."""
    told = []
    reached: dict[str, Position] = {}
    kept: set[str] = set()
    for sitting in sittings(events):
        if sitting.run in kept:
            told.append(f"{sitting.run} was trained again after it had a record")
        elif sitting.began < reached.get(sitting.run, (0, 0, 0)):
            told.append(f"{sitting.run} went on from {sitting.began}, but had saved {reached[sitting.run]}")
        if sitting.due_seconds > checkpoint_seconds + CLOCK_SECONDS:
            told.append(f"{sitting.run} had no checkpoint for {sitting.due_seconds:.1f} s")
        reached[sitting.run] = max(sitting.saved, reached.get(sitting.run, (0, 0, 0)))
        if sitting.finished:
            kept.add(sitting.run)
    return told


def lost_seconds(events: Iterable[Event]) -> float:
    """The most training time that a sitting which did not finish its run had done since its last checkpoint."""
    return max((sitting.unsaved_seconds for sitting in sittings(events) if not sitting.finished), default=0.0)
