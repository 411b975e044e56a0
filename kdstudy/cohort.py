"""A cohort: runs that share data order and teacher advance in lockstep, and what they share is made once."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from kdstudy.core import View
from kdstudy.engine import Engine, Stepper
from kdstudy.logit_table import LogitTable
from kdstudy.schemes import Batch
from kdstudy.stopping import Stopped
from kdstudy.train import HALF, Diverged, Training, random_state, set_random_state


class Cohort:
    """Trains `members` together: those whose next batches are the same take their steps side by side.

    What a batch is made of, and the teacher's view of it, is paid once. Whoever has most epochs left goes first, so
    that runs with preparatory phases, or resumed from different places, meet as soon as they can. Every member keeps
    its own weights, optimiser and random numbers: on a CPU, stepped in turn, its outcome is that of `Training.run`, to
    the bit. One that diverges drops out, and the others go on.

    `engine` says how steps are taken, by default in turn. `tables` hold the answers of teachers of which all members
    read logits only. `ended(member, diverged)` is told of each member as soon as it has finished
    (None) or diverged; if it raises Stopped, it will be told again of a resumed one.
    """

    def __init__(
        self,
        members: Sequence[Training],
        engine: Engine | None = None,
        tables: Mapping[nn.Module, LogitTable] | None = None,
        ended: Callable[[Training, Diverged | None], None] = lambda member, diverged: None,
    ):
        self.members, self.engine, self.tables = list(members), engine or Engine(), tables or {}
        self._ended = ended
        self._waiting: list[Training] = []
        self._random: dict[Training, dict[str, Tensor]] = {}
        self._steppers: dict[tuple, Stepper] = {}  # the last one

    def run(self) -> None:
        """Train all members to their ends. Raises Stopped when all that are unfinished have written checkpoints."""
        for _ in self.steps():
            pass

    def steps(self) -> Iterator[None]:
        """`run`, handing over after every step that a group of members has taken."""
        self._clock = self._saved = time.monotonic()
        for member in self.members:
            with self._saving_if_stopped(), self.own_random(member):
                member.start()
            self._waiting.append(member)
            self._clock_on([member])
        self._let_go()
        while self._waiting:
            yield from self._finish_epoch(self._furthest_behind())

    @property
    def description(self) -> dict[str, Any]:
        """How steps were last taken: `Stepper.description`."""
        return next(iter(self._steppers.values())).description

    @contextmanager
    def own_random(self, member: Training) -> Iterator[None]:
        """Inside, torch's global random numbers are the member's, and go on from where it last left them."""
        if len(self.members) == 1:
            yield
            return
        if member in self._random:
            set_random_state(self._random[member], member.device)
        yield
        self._random[member] = random_state(member.device)

    def _furthest_behind(self) -> list[Training]:
        first = max(self._waiting, key=lambda member: member.epochs_left)
        return [member for member in self._waiting if member.stretch == first.stretch]

    def _finish_epoch(self, group: list[Training]) -> Iterator[None]:
        for member in group:
            with self.own_random(member):
                member.begin_epoch()
        if group[0].position.step == group[0].current.steps:  # all that this epoch lacked was its end
            # no graph of it may be captured: the first step can move the networks to where they are one
            self._end_epoch(group, lambda: torch.cat([member.tally() for member in group]))
            return
        stepper = self._stepper(group)
        stepper.begin_epoch()
        while group[0].position.step < group[0].current.steps:
            stepper.step()
            for member in group:
                member.made_by = stepper.description
                member.end_step()
            self._between_steps(group)
            yield
        self._end_epoch(group, stepper.tally)

    def _stepper(self, group: Sequence[Training]) -> Stepper:
        key = tuple((member, member.position.phase) for member in group)
        if key not in self._steppers:
            self._steppers = {key: self.engine.stepper(group, self._batch, self.own_random)}
        return self._steppers[key]

    def _batch(self, group: Sequence[Training], rows: slice | Tensor) -> Batch:
        """The batch that a group shares, with the views that are known before anyone looks."""
        leader = next((member for member in group if member.scheme.wants_strong), group[0])
        batch = leader.batch(rows)
        known = {teacher: View(table.answers(batch.indices, *batch.crop)) for teacher, table in self.tables.items()}
        batch = batch._replace(seen=known)
        if len(group) > 1:
            for member in group:
                member.scheme.share(batch, HALF[member.recipe.precision])
        return batch

    def _between_steps(self, group: Sequence[Training]) -> None:
        now = self._clock_on(group)
        # each once: whoever is asked may go by how long ago that was
        stopped = any(should_stop() for should_stop in {member.surroundings.should_stop for member in group})
        if stopped or now - self._saved > min(member.surroundings.checkpoint_seconds for member in group):
            self._save()
            self._saved = now
        if stopped:
            raise Stopped

    def _save(self) -> None:
        for member in self._waiting:
            with self.own_random(member):
                member.save()

    @contextmanager
    def _saving_if_stopped(self, group: Sequence[Training] = ()) -> Iterator[None]:
        """Inside, a stop lets all that wait be saved; the time since the last call was the group's."""
        try:
            yield
        except Stopped:
            self._clock_on(group)
            self._save()
            raise

    def _clock_on(self, group: Sequence[Training]) -> float:
        """Share out the time since the last call among those who used it."""
        now = time.monotonic()
        for member in group:
            member.seconds += (now - self._clock) / len(group)
        self._clock = now
        return now

    def _end_epoch(self, group: Sequence[Training], tally: Callable[[], Tensor]) -> None:
        with self._saving_if_stopped(group):
            tallies = tally().tolist()  # the one wait of the epoch
        self._clock_on(group)
        for member in group:
            own, tallies = tallies[: member.tally_size], tallies[member.tally_size :]
            with suppress(Diverged), self.own_random(member):
                member.end_epoch(own)
        self._let_go()

    def _let_go(self) -> None:
        for member in [member for member in self._waiting if member.ended]:
            with self._saving_if_stopped():
                self._ended(member, member.diverged)
            self._waiting.remove(member)
        self._clock = time.monotonic()  # what is done with those who have ended is not training
