"""The loop: it trains whatever a scheme hands it, phase by phase, and can be stopped and resumed at any step.

`Training` is one run in pieces: beginnings and ends, which are Python, and the step, which is nothing but tensors.
`run` puts them together for a run by itself, `cohort.Cohort` for several at once. Nothing inside an epoch waits for the
device: losses and counts are summed there and copied to the host once an epoch.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdstudy.breakdown import part
from kdstudy.checkpoint import load_checkpoint, save_checkpoint
from kdstudy.core import Phase, is_without_decay
from kdstudy.data import Draws, ImageBank
from kdstudy.evaluate import count_hits
from kdstudy.recipe import Plateau, Recipe
from kdstudy.schemes import Batch, Losses, Scheme, Turn

# Raised by hand when a change may alter the outcome of a run: it is part of every run's id. A test compares tiny seeded
# runs of every method with outcomes on file and fails if they move while this does not.
REVISION = 1

PEER_STREAMS = 1000  # between the random streams of one peer's phases and the next peer's

HALF = {"bf16": torch.bfloat16, "fp32": None, "fp64": None}
FULL = {"bf16": torch.float32, "fp32": torch.float32, "fp64": torch.float64}


class Stopped(Exception):
    """Training was asked to stop; the checkpoint holds everything needed to go on."""


class Diverged(Exception):
    """The loss of an epoch is not finite. `history` holds the epochs up to and including it."""

    def __init__(self, message: str, history: list[dict]):
        super().__init__(message)
        self.history = history


@dataclass(frozen=True)
class Surroundings:
    """What the loop shares with the outside: where to keep checkpoints, whom to tell, when to stop."""

    checkpoint: Path | None = None
    checkpoint_seconds: float = 60.0
    on_step: Callable[[float, str], None] = lambda epochs_done, text: None
    should_stop: Callable[[], bool] = lambda: False


@dataclass
class Position:
    """Where training stands: `step` batches of epoch `epoch` of phase `phase` are done."""

    phase: int = 0
    epoch: int = 0
    step: int = 0


@dataclass
class Sums:
    """Sums over the images of an epoch, on the device: one vector that stays where it is, named entry by entry."""

    names: list[str] = field(default_factory=list)
    values: Tensor | None = None

    def clear(self) -> None:
        """Start again from zero."""
        if self.values is not None:
            self.values.zero_()

    def add(self, parts: Mapping[str, Tensor]) -> None:
        """Add one batch's per-name scalars."""
        vector = torch.stack([part.detach().double() for part in parts.values()])
        if self.values is None:
            self.names, self.values = list(parts), torch.zeros_like(vector)
        self.values += vector


@dataclass
class Current:
    """What the phase in progress works with; mappings go by the names of its turns."""

    phase: Phase
    recipe: Recipe
    bank: ImageBank
    stream: int  # of the seed's random numbers, for the first of the scheme's batches
    draws: Sequence[Draws]  # of each of them
    turns: tuple[Turn, ...]
    recipes: Mapping[str, Recipe]
    trained: Mapping[str, list[nn.Parameter]]
    optimisers: Mapping[str, torch.optim.Optimizer]
    rates: dict[str, float] = field(default_factory=dict)  # the optimisers' learning rates, as they were last set
    sums: Sums = field(default_factory=Sums)

    @property
    def steps(self) -> int:
        """How many batches an epoch has."""
        return math.ceil(len(self.bank) / self.recipe.batch)


class Training:
    """One run in progress.

    `bank` holds the training images; `watch` names further sets whose accuracy (percent) is noted after every epoch,
    and the plateau schedule follows the one named "held_out". Networks and banks must already be on the device. With
    `capturable` learning rates are tensors there, so that a captured step follows them.
    Raises ValueError if a phase has a batch larger than the data, another padding than the bank, or a plateau without
    held-out images.
    """

    def __init__(
        self,
        scheme: Scheme,
        recipe: Recipe,
        bank: ImageBank,
        *,
        seed: int,
        watch: Mapping[str, ImageBank],
        surroundings: Surroundings = Surroundings(),
        capturable: bool = False,
    ):
        self.scheme, self.recipe, self.bank, self.seed = scheme, recipe, bank, seed
        self.watch, self.surroundings, self.capturable = watch, surroundings, capturable
        self.device = bank.labels.device
        self.phases = scheme.phases()
        self.position = Position()
        self.current: Current | None = None
        self.history: list[dict] = []
        self.seconds = 0.0  # of training, over all sessions
        self.made_by: dict[str, Any] = {"runs": 1, "way": "in_turn", "graph": False}  # how its steps were last taken
        self._plateau = Plateau()
        for phase in self.phases:
            for turn in self.scheme.turns(phase):
                self._check(self._recipe_of(phase, turn))

    def _check(self, recipe: Recipe) -> None:
        if recipe.batch > len(self.bank):
            raise ValueError(f"batch must be at most the {len(self.bank)} training images, not {recipe.batch}")
        last = len(self.bank) % recipe.batch or recipe.batch
        if last < self.scheme.least_batch:
            raise ValueError(
                f"batches of {recipe.batch} leave a last one of {last} of the {len(self.bank)} training images, "
                f"but the method needs at least {self.scheme.least_batch} in a batch: choose another batch size"
            )
        if recipe.crop_padding != self.bank.padding:
            raise ValueError(f"crop_padding must be {self.bank.padding} as in the bank, not {recipe.crop_padding}")
        if recipe.schedule == "plateau" and "held_out" not in self.watch:
            raise ValueError("schedule 'plateau' needs held-out images: set the data set's `validation` above 0")

    def run(self) -> list[dict]:
        """Train to the end, by itself, and return the history: one dict per epoch, means per image.

        Raises Diverged, or Stopped after writing the checkpoint.
        """
        clock = saved = time.monotonic()
        self.start()
        while not self.finished:
            self.begin_epoch()
            while self.position.step < self.current.steps:
                self.begin_step()
                self.step(self.batch(self.rows))
                self.end_step()
                now = time.monotonic()
                self.seconds, clock = self.seconds + now - clock, now
                stopped = self.surroundings.should_stop()
                if stopped or now - saved > self.surroundings.checkpoint_seconds:
                    self.save()
                    saved = now
                if stopped:
                    raise Stopped
            self.end_epoch(self.tally().tolist())
        self.seconds += time.monotonic() - clock
        return self.history

    def start(self) -> None:
        """Go to where the checkpoint stands, if there is one; otherwise prepare."""
        torch.manual_seed(self.seed)  # dropout and the like; data has its own draws
        state = self._load()
        if state is None:
            self.scheme.prepare(partial(self.bank.plain, self.recipe.batch))
            self._enter_phase()
        else:
            self._restore(state)

    @property
    def finished(self) -> bool:
        """Whether all phases are over."""
        return self.current is None

    @property
    def epochs_left(self) -> float:
        """How many epochs are still to come, at most."""
        later = sum(phase.epochs(self.recipe.epochs) for phase in self.phases[self.position.phase + 1 :])
        return later + self.current.recipe.epochs - self.position.epoch - self.position.step / self.current.steps

    @property
    def stretch(self) -> tuple:
        """What the batches of the rest of this epoch depend on: runs in which it is equal can share them."""
        current, recipe = self.current, self.current.recipe
        drawn = (self.seed, current.stream, recipe.batch, recipe.crop_padding, recipe.flip, recipe.precision)
        alone = None if self.scheme.batches == 1 else id(self)
        return (id(current.bank), *drawn, self.position.epoch, self.position.step, alone)

    @property
    def rows(self) -> slice:
        """Which rows of the phase's draws the next batch takes."""
        start = self.position.step * self.current.recipe.batch
        stop = min(start + self.current.recipe.batch, len(self.current.bank))
        return self.current.draws[0].rows(self.position.epoch, start, stop)

    def _enter_phase(self) -> None:
        """Make ready for the phase at which training stands; there may be none any more."""
        index = self.position.phase
        if index == len(self.phases):
            self.current = None
            return
        phase = self.phases[index]
        recipe, bank, turns = self._recipe_of(phase), self.scheme.bank(phase, self.bank), self.scheme.turns(phase)
        recipes = {turn.name: self._recipe_of(phase, turn) for turn in turns}
        trained = {turn.name: self.scheme.trained_parameters(turn.trains) for turn in turns}
        optimisers = {name: self._optimiser(trained[name], own) for name, own in recipes.items()}
        # the last phase always has stream 0: methods with and without preparatory phases stay paired in it
        stream = (index + 1) % len(self.phases)
        draws = self._draws(stream, recipe, len(bank))
        self.current = Current(phase, recipe, bank, stream, draws, turns, recipes, trained, optimisers)
        self._plateau = Plateau(learning_rate=recipe.learning_rate)

    def _recipe_of(self, phase: Phase, turn: Turn | None = None) -> Recipe:
        recipe = self.recipe.for_phase(phase)
        return replace(recipe, **turn.recipe) if turn else recipe

    def _draws(self, stream: int, recipe: Recipe, images: int) -> list[Draws]:
        return [
            Draws.make(
                seed=self.seed,
                stream=stream + number * PEER_STREAMS,
                epochs=recipe.epochs,
                images=images,
                padding=recipe.crop_padding,
                flip=recipe.flip,
                device=self.device,
                strong=self.scheme.wants_strong,
            )
            for number in range(self.scheme.batches)
        ]

    def _optimiser(self, parameters: Sequence[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
        rate = torch.tensor(recipe.learning_rate, device=self.device) if self.capturable else recipe.learning_rate
        return make_optimiser(parameters, recipe, rate)

    def begin_epoch(self) -> None:
        """Modes, clocks, sums and what the scheme does before an epoch; also where training resumes inside one."""
        self.scheme.set_modes(self.current.phase)
        self.scheme.set_clocks(self.position.epoch, self.current.recipe.epochs)
        if self.position.step == 0:
            self.current.sums.clear()
            self.scheme.begin_epoch(self.position.epoch, self.current.recipe.epochs, self.watch.get("held_out"))

    def begin_step(self) -> None:
        """What comes before a step: the learning rates, and what the scheme does between steps."""
        self._set_learning_rates()
        self.scheme.begin_step(self.position.epoch * self.current.steps + self.position.step)

    def _set_learning_rates(self) -> None:
        current = self.current
        for name, recipe in current.recipes.items():
            if recipe.schedule == "plateau":  # the phase's, at which a turn may learn faster or slower
                rate = self._plateau.learning_rate * (recipe.learning_rate / current.recipe.learning_rate)
            else:
                rate = recipe.learning_rate_at(self.position.epoch + self.position.step / current.steps)
            if current.rates.get(name) != rate:
                current.rates[name] = rate
                set_learning_rate(current.optimisers[name], rate)

    def batch(self, rows: slice | Tensor) -> Batch:
        """The images of these rows of the phase's draws, augmented."""
        with part("data"):
            return self._batch(rows)

    def _batch(self, rows: slice | Tensor) -> Batch:
        bank, batches = self.current.bank, []
        for own in self.current.draws:
            # peers see the images of the first one's batch, unless the scheme wants others
            index = (own if self.scheme.own_images else self.current.draws[0]).batch(rows)[0]
            _, shift, flip = own.batch(rows)
            strong = bank.strong(index, own.strong_batch(rows)) if own.strong else None
            batches.append(
                Batch(bank.augmented(index, shift, flip), bank.labels[index], index, strong, crop=(shift, flip))
            )
        return batches[0]._replace(others=tuple(batches[1:]))

    def step(self, batch: Batch) -> None:
        """All tensor work of a batch: losses, gradients, updates, sums. It waits for nothing."""
        noted = {}
        for turn in self.current.turns:
            if turn.fresh:
                self.current.optimisers[turn.name].state.clear()
            for _ in range(turn.times):
                losses = self.losses(turn, batch)
                self.forget_gradients(turn)
                with part("backward"):
                    losses.total.backward(inputs=self.current.trained[turn.name])
                self.update(turn)
            noted |= losses.noted(len(batch.labels))
        self.note(noted)

    def losses(self, turn: Turn, batch: Batch) -> Losses:
        """What a turn minimises on a batch."""
        with part("loss"):  # but for the networks' forward passes, which are parts of their own
            return self.scheme.losses(self.current.phase, turn, batch, HALF[self.recipe.precision])

    def forget_gradients(self, turn: Turn) -> None:
        """Let go of those of the step before."""
        self.current.optimisers[turn.name].zero_grad(set_to_none=True)

    def update(self, turn: Turn) -> None:
        """Take the optimiser's step along the gradients at hand."""
        with part("optimiser"):
            if clip := self.current.recipes[turn.name].clip:
                nn.utils.clip_grad_norm_(self.current.trained[turn.name], clip)
            self.current.optimisers[turn.name].step()

    def note(self, parts: Mapping[str, Tensor]) -> None:
        """Add a batch's sums to those of the epoch."""
        with part("metrics"):
            self.current.sums.add(parts)

    def end_step(self) -> None:
        """Move on by a batch, and tell."""
        self.position.step += 1
        current, position = self.current, self.position
        done = sum(earlier.epochs(self.recipe.epochs) for earlier in self.phases[: position.phase])
        text = f"{current.phase.name} epoch {position.epoch + 1}/{current.recipe.epochs}"
        self.surroundings.on_step(done + position.epoch + position.step / current.steps, text)

    def tally(self) -> Tensor:
        """The epoch's sums and the hits in every watched set, one vector on the device for `end_epoch`."""
        hits = [count_hits(self.scheme.deployed, bank) for bank in self.watch.values()]
        return torch.cat([self.current.sums.values, *(count.double().view(1) for count in hits)])

    @property
    def tally_size(self) -> int:
        """How many numbers `tally` has."""
        return len(self.current.sums.names) + len(self.watch)

    def end_epoch(self, tally: Sequence[float]) -> None:
        """Note the epoch in the history and move on, perhaps to the next phase. Raises Diverged."""
        phase, images = self.current.phase, len(self.current.bank)
        sums = dict(zip(self.current.sums.names, tally, strict=False))
        rate = next(iter(self.current.rates.values()))  # of the first turn's last step
        row = {"phase": phase.name, "epoch": self.position.epoch, "learning_rate": rate}
        row["train_accuracy"] = 100 * (sums.pop("correct") / images)
        row |= {name: total / images for name, total in sums.items()}
        hits = zip(self.watch.items(), tally[len(tally) - len(self.watch) :], strict=True)
        row |= {f"{name}_accuracy": 100 * (count / len(bank)) for (name, bank), count in hits}
        self.history.append(row)
        if not all(map(math.isfinite, sums.values())):
            raise Diverged(f"the loss is not finite in epoch {self.position.epoch} of {phase.name!r}", self.history)
        self._move_on(row)

    def _move_on(self, row: Mapping[str, Any]) -> None:
        recipe = self.current.recipe
        stops = recipe.schedule == "plateau" and self._plateau.update(row["held_out_accuracy"], recipe)
        self.position = replace(self.position, epoch=self.position.epoch + 1, step=0)
        if stops or self.position.epoch == recipe.epochs:
            self.position = Position(phase=self.position.phase + 1)
            self._enter_phase()

    def save(self) -> None:
        """Write the checkpoint, if there is a place for it."""
        if self.surroundings.checkpoint is None:
            return
        current = self.current
        state: dict[str, Any] = {
            "revision": REVISION,
            "position": asdict(self.position),
            "scheme": self.scheme.state_dict(),
            "optimisers": {name: optimiser.state_dict() for name, optimiser in current.optimisers.items()},
            "rates": current.rates,
            "sums": {"names": current.sums.names, "values": current.sums.values},
            "plateau": asdict(self._plateau),
            "history": self.history,
            "seconds": self.seconds,
            "random": random_state(self.device),
        }
        save_checkpoint(state, self.surroundings.checkpoint)

    def _load(self) -> dict[str, Any] | None:
        if self.surroundings.checkpoint is None:
            return None
        state = load_checkpoint(self.surroundings.checkpoint, self.device)
        return state if state and state.get("revision") == REVISION else None

    def _restore(self, state: dict[str, Any]) -> None:
        self.position = Position(**state["position"])
        self.scheme.load_state_dict(state["scheme"])
        self._enter_phase()
        for name, optimiser in self.current.optimisers.items():
            kept = [group["lr"] for group in optimiser.param_groups]
            optimiser.load_state_dict(state["optimisers"][name])
            for group, rate in zip(optimiser.param_groups, kept, strict=True):
                group["lr"] = rate  # a number or a tensor, as this session wants it
            set_learning_rate(optimiser, state["rates"][name])
        self.current.rates = state["rates"]
        self.current.sums = Sums(**state["sums"])
        self._plateau = Plateau(**state["plateau"])
        self.history = state["history"]
        self.seconds = state["seconds"]
        set_random_state(state["random"], self.device)


def make_optimiser(parameters: Sequence[nn.Parameter], recipe: Recipe, rate: float | Tensor) -> torch.optim.Optimizer:
    """The recipe's optimiser; a `rate` on a GPU makes it one whose steps can be captured."""
    groups = _parameter_groups(parameters)
    if recipe.optimiser == "adam":
        on_device = isinstance(rate, Tensor) and rate.is_cuda
        return torch.optim.Adam(groups, lr=rate, weight_decay=recipe.weight_decay, fused=True, capturable=on_device)
    return torch.optim.SGD(
        groups,
        lr=rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
        fused=True,
    )


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of all groups, in place where it is a tensor."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _parameter_groups(parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """One group, and, where some are marked by `core.without_decay`, one more for these."""
    free = [parameter for parameter in parameters if is_without_decay(parameter)]
    usual = [parameter for parameter in parameters if not is_without_decay(parameter)]
    return [{"params": usual}] + ([{"params": free, "weight_decay": 0.0}] if free else [])


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Where torch's global random numbers stand, for this device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Go on from where `random_state` was."""
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
