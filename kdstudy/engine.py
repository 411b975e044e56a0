"""Chooses how the steps of runs that share batches are taken, by measuring, and captures them where that can be done.

Which way is fastest depends on network, count and device. The steps that are timed are steps of the training itself,
so that measuring costs nothing. In turn a run is to the bit what it is alone; the other ways differ by rounding.
"""

import json
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from kdstudy.core import require_choice
from kdstudy.files import write_json
from kdstudy.graphs import NotCapturable, capture, make_state, optimiser_tensors
from kdstudy.params import MEASURED, WAYS
from kdstudy.schemes import Batch
from kdstudy.train import Training
from kdstudy.ways import FusedInOne, Group, InTurn, OnStreams, OwnRandom, Way, why_not_apart, why_not_in_one

STEPS_TO_COMPILE_FOR = 10_000  # half a minute is won back if each is 3 ms shorter
ROUNDS, BLOCK = 4, 5  # blocks of steps by which each way is timed, of which the first does not count

MakeBatch = Callable[[Group, slice | Tensor], Batch]


class Choices:
    """The fastest way found so far for each kind of group; in a file, if one is named, for later processes."""

    def __init__(self, path: Path | None = None):
        self._path = path
        self._known: dict[str, str] = {}

    def get(self, kind: str) -> str | None:
        """The way that was found for this kind of group."""
        if self._path and self._path.exists():
            try:
                self._known |= json.loads(self._path.read_text(encoding="utf-8"))
            except (ValueError, TypeError):
                warnings.warn(f"{self._path} is torn: the ways to train are measured anew", stacklevel=2)
        return self._known.get(kind)

    def keep(self, kind: str, way: str) -> None:
        """Remember a way."""
        self.get(kind)  # and what other processes have found meanwhile
        self._known[kind] = way
        if self._path:
            write_json(self._path, self._known)


@dataclass(frozen=True)
class Engine:
    """`way` is one of `params.WAYS`, or "measured" for the fastest; `graphs` captures steps where the device can.
    With `compiles` compiled students are among the ways that are measured, if enough steps are to come.

    Runs that cannot be fused are taken in turn, steps that cannot be captured as they come, with a warning that gives
    the reason. `capture` takes a step and its state, as `graphs.capture` does; None stands for that, on a GPU.
    """

    way: str = "in_turn"
    graphs: bool = False
    compiles: bool = False
    choices: Choices = field(default_factory=Choices)
    capture: Callable[..., Callable[[], None]] | None = None

    def __post_init__(self) -> None:
        """Refuse a way that is none."""
        require_choice("way", self.way, (*WAYS, MEASURED))

    def stepper(self, group: Group, make_batch: MakeBatch, own_random: OwnRandom) -> "Stepper":
        """What takes the steps of these runs for as long as they stay together in their phases."""
        random = Switch(own_random)
        ways = self._ways(group, random)
        kind = _kind(group)
        if self.way == MEASURED and (known := self.choices.get(kind)) in ways:
            ways = {known: ways[known]}
        takers = {name: self._taker(group, way, make_batch, random) for name, way in ways.items()}
        return Stepper(group, takers, own_random, decided=lambda way: self.choices.keep(kind, way))

    def _ways(self, group: Group, own_random: OwnRandom) -> dict[str, Way]:
        """Those that are wanted and possible, or else in turn."""
        ways: dict[str, Way] = {}
        if self.way in ("fused", MEASURED) and len(group) > 1:
            if reason := why_not_in_one(group):
                warnings.warn(f"runs are trained in turn: {reason}", stacklevel=2)
            else:
                ways["fused"] = FusedInOne(group, own_random)
        if self.way in ("streams", MEASURED) and len(group) > 1 and group[0].device.type == "cuda":
            ways["streams"] = OnStreams(group)
        if self.way in ("in_turn", MEASURED) or not ways:
            ways["in_turn"] = InTurn(group, own_random)
        if self.way == MEASURED and self.compiles and _steps_left(group) >= STEPS_TO_COMPILE_FOR:
            if "fused" in ways:
                ways["fused_compiled"] = ways["fused"].compiled()
            if not why_not_apart(group):
                ways["in_turn_compiled"] = InTurn(group, own_random, compiles=True)
        return ways

    def _taker(self, group: Group, way: Way, make_batch: MakeBatch, random: "Switch") -> "Eager | Replayed":
        take = self.capture or (capture if group[0].device.type == "cuda" else None)
        if not self.graphs or take is None:
            return Eager(group, way, make_batch)
        if reason := why_not_captured(group):
            warnings.warn(f"steps are not captured: {reason}", stacklevel=2)
            return Eager(group, way, make_batch)
        return Replayed(group, way, make_batch, random, take)


class Switch:
    """Every run's own random numbers, which can be switched off while steps are captured that draw none."""

    def __init__(self, own_random: OwnRandom):
        self._own_random = own_random
        self.on = True

    def __call__(self, member: Training) -> AbstractContextManager:
        """A context in which they are in force."""
        return self._own_random(member) if self.on else nullcontext()


class Stepper:
    """Takes the steps of all runs of a group: in the fastest of several ways, once they have all been timed."""

    def __init__(
        self,
        group: Group,
        takers: "dict[str, Eager | Replayed]",
        own_random: OwnRandom,
        decided: Callable[[str], None] = lambda way: None,
    ):
        self._group, self._takers, self._own_random, self._decided = group, takers, own_random, decided
        self._blocks = [name for _ in range(ROUNDS) for name in takers] if len(takers) > 1 else []
        self._seconds: dict[str, list[float]] = {name: [] for name in takers}
        self._in_block = 0
        self._start = self._spent = 0.0  # of the block: since when it has gone on, and what it took before

    @property
    def description(self) -> dict[str, str | int]:
        """How many runs are trained together, the way they are, and whether from a graph."""
        way = MEASURED if len(self._takers) > 1 else next(iter(self._takers))
        captured = all(isinstance(taker, Replayed) and taker.works for taker in self._takers.values())
        return {"runs": len(self._group), "way": way, "graph": captured}

    def begin_epoch(self) -> None:
        """Whatever ways need before the first step of an epoch, or of a session."""
        for taker in self._takers.values():
            taker.begin_epoch()
        if self._in_block:
            self._start = self._now()

    def step(self) -> None:
        """Take one."""
        for member in self._group:
            # only such a scheme may draw numbers between steps: the others are spared the exchange in every step
            with self._own_random(member) if member.scheme.acts_between_steps else nullcontext():
                member.begin_step()
        if self._blocks:
            self._timed_step()
            return
        if len(self._takers) > 1:
            self._decide()
        next(iter(self._takers.values())).step()

    def _timed_step(self) -> None:
        name = self._blocks[0]
        if self._in_block == 0:
            self._takers[name].begin_epoch()  # others have moved on meanwhile
            self._start, self._spent = self._now(), 0.0
        self._takers[name].step()
        self._in_block += 1
        if self._in_block == BLOCK:
            self._seconds[name].append(self._spent + self._now() - self._start)
            del self._blocks[0]
            self._in_block = 0

    def _decide(self) -> None:
        # before a step: after one, the runs have not yet been told that it is done
        fastest = min(self._seconds, key=lambda way: median(self._seconds[way][1:]))
        self._takers = {fastest: self._takers[fastest]}
        self._takers[fastest].begin_epoch()
        self._decided(fastest)

    def _now(self) -> float:
        if self._group[0].device.type == "cuda":
            torch.cuda.synchronize(self._group[0].device)
        return time.perf_counter()

    def tally(self) -> Tensor:
        """The tallies of all runs, one after the other."""
        if self._in_block:
            self._spent += self._now() - self._start  # what comes between two epochs is no step
        return next(iter(self._takers.values())).tally()


class Eager:
    """Python launches every kernel of every step."""

    def __init__(self, group: Group, way: Way, make_batch: MakeBatch):
        self._group, self._way, self._make_batch = group, way, make_batch

    def begin_epoch(self) -> None:
        """Nothing."""

    def step(self) -> None:
        """Take one."""
        self._way.step(self._make_batch(self._group, self._group[0].rows))

    def tally(self) -> Tensor:
        """Of all runs."""
        return torch.cat([member.tally() for member in self._group])


class Replayed(Eager):
    """One launch per step: a graph for whole batches and one for the odd last one, and one for the tally.

    The position is a counter on the device that the step itself advances. If the first capture fails, all goes on as
    in `Eager`, with a warning.
    """

    def __init__(
        self,
        group: Group,
        way: Way,
        make_batch: MakeBatch,
        random: Switch,
        capture: Callable[..., Callable[[], None]],
    ):
        super().__init__(group, way, make_batch)
        self.works = True
        self._random, self._capture = random, capture
        self._graphs: dict[int | str, Callable[[], None]] = {}  # by the size of the batch
        self._counter = torch.zeros((), dtype=torch.int64, device=group[0].device)
        self._offsets = torch.arange(group[0].current.recipe.batch, device=group[0].device)
        self._tally: Tensor | None = None
        # one for all graphs of a group: they are replayed one after the other
        self._pool = torch.cuda.graph_pool_handle() if group[0].device.type == "cuda" else None

    def begin_epoch(self) -> None:
        """Set the counter to where the runs stand."""
        self._counter.fill_(self._group[0].rows.start)

    def step(self) -> None:
        """Replay it; capture it first, if it is the first of its size."""
        rows = self._group[0].rows
        size = rows.stop - rows.start
        if self.works and size not in self._graphs:
            self._try_to_capture(size)
        if self.works:
            self._graphs[size]()
        else:
            super().step()

    def _try_to_capture(self, size: int) -> None:
        fresh = [member for member in self._group if member.current.sums.values is None]
        for member in self._group:
            for optimiser in member.current.optimisers.values():
                if not optimiser.state:
                    make_state(optimiser)
        self._random.on = False
        try:
            self._graphs[size] = self._capture(lambda: self._step(size), self._state(), pool=self._pool)
        except NotCapturable as error:
            warnings.warn(str(error), stacklevel=2)
            self.works = False
        self._random.on = True
        for member in fresh:
            member.current.sums.clear()

    def _step(self, size: int) -> None:
        self._way.step(self._make_batch(self._group, self._counter + self._offsets[:size]))
        self._counter += size

    def _state(self) -> list[Tensor]:
        """All that a step changes in place."""
        found = [self._counter]
        for member in self._group:
            found += [*member.scheme.parameters(), *member.scheme.buffers()]
            for optimiser in member.current.optimisers.values():
                found += optimiser_tensors(optimiser)
            if member.current.sums.values is not None:
                found.append(member.current.sums.values)
        return found

    def tally(self) -> Tensor:
        """Of all runs, from a graph."""
        if not self.works:
            return super().tally()
        if self._tally is None:
            self._tally = super().tally()  # in its own memory, which the graph then writes
            take = partial(self._take_tally, self._tally)
            try:
                self._graphs["tally"] = self._capture(take, [self._tally], pool=self._pool)
            except NotCapturable as error:  # networks that learn by one are not always judged by one
                warnings.warn(f"of the evaluation: {error}", stacklevel=2)
                self._graphs["tally"] = take
        self._graphs["tally"]()
        return self._tally

    def _take_tally(self, into: Tensor) -> None:
        into.copy_(super().tally())


def _steps_left(group: Group) -> float:
    return min(member.epochs_left * member.current.steps for member in group)


def why_not_captured(group: Group) -> str:
    """What these runs do between the tensor operations of a step, which a graph could not repeat; "" for nothing."""
    for member in group:
        if member.scheme.acts_between_steps:
            return f"{type(member.scheme).__name__} acts between steps"
        if any(turn.fresh for turn in member.current.turns):
            return f"{member.current.phase.name!r} forgets momentum before each batch"
    return ""


def _kind(group: Group) -> str:
    """What the fastest way depends on, in words."""
    first = group[0]
    device = torch.cuda.get_device_name(first.device) if first.device.type == "cuda" else "cpu"
    students = sorted({_sizes(member) for member in group})
    recipe = first.recipe
    threads = f"{torch.get_num_threads()} threads, " if first.device.type == "cpu" else ""
    return f"{device}, {threads}{recipe.precision}, batch {recipe.batch}, {len(group)} runs of {'; '.join(students)}"


def _sizes(member: Training) -> str:
    parameters = list(member.scheme.deployed.parameters())
    return f"{len(parameters)} tensors, {sum(map(torch.numel, parameters))} numbers"
