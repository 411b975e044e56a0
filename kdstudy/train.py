"""The loop: it trains whatever a scheme hands it, phase by phase, and can be stopped and resumed at any step.

Nothing inside an epoch waits for the device: losses and counts are summed there and copied to the host once an epoch.
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

from kdstudy.checkpoint import load_checkpoint, save_checkpoint
from kdstudy.core import Phase, is_without_decay
from kdstudy.data import Draws, ImageBank
from kdstudy.evaluate import logits_of
from kdstudy.recipe import Plateau, Recipe
from kdstudy.schemes import Batch, Scheme, Turn

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
    """Sums over the images of an epoch, on the device: one vector, named entry by entry."""

    names: list[str] = field(default_factory=list)
    values: Tensor | None = None

    def add(self, parts: Mapping[str, Tensor]) -> None:
        """Add one batch's per-name scalars."""
        vector = torch.stack([part.detach().double() for part in parts.values()])
        if self.values is None:
            self.names, self.values = list(parts), vector
        else:
            self.values = self.values + vector

    def means(self, images: int) -> dict[str, float]:
        """Per-image means; this waits for the device."""
        return dict(zip(self.names, (self.values / images).tolist(), strict=True))


class Training:
    """One run in progress. `run()` takes it from wherever it stands to its end.

    `bank` holds the training images; `watch` names further sets whose accuracy (percent) is noted after every epoch,
    and the plateau schedule follows the one named "held_out". Networks and banks must already be on the device.
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
    ):
        self.scheme, self.recipe, self.bank, self.seed = scheme, recipe, bank, seed
        self.watch, self.surroundings = watch, surroundings
        self.device = bank.labels.device
        self.phases = scheme.phases()
        self.position = Position()
        self.history: list[dict] = []
        self.seconds = 0.0  # of training, over all sessions
        self._sums = Sums()
        self._plateau = Plateau()
        self._optimisers: dict[str, torch.optim.Optimizer] = {}
        self._trained: dict[str, list[nn.Parameter]] = {}
        self._recipes: dict[str, Recipe] = {}
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
        """Train to the end and return the history: one dict per epoch, means per image.

        Raises Diverged, or Stopped after writing the checkpoint.
        """
        torch.manual_seed(self.seed)  # dropout and the like; data has its own draws
        self._clock = self._saved = time.monotonic()
        state = self._load()
        if state is None:
            self.scheme.prepare(partial(self.bank.plain, self.recipe.batch))
        else:
            self._restore(state)
        for index in range(self.position.phase, len(self.phases)):
            self._run_phase(index)
        self._tick()
        return self.history

    def _run_phase(self, index: int) -> None:
        phase = self.phases[index]
        recipe = self._recipe_of(phase)
        self._bank = self.scheme.bank(phase, self.bank)
        draws = self._draws(index, recipe)
        if not self._optimisers:  # they exist when training resumes inside the phase
            self._begin_phase(phase, recipe)
        while self.position.epoch < recipe.epochs:
            self._run_epoch(phase, recipe, draws)
            if self._end_epoch(phase, recipe):
                break
        self.position = Position(phase=index + 1)
        self._optimisers = {}

    def _recipe_of(self, phase: Phase, turn: Turn | None = None) -> Recipe:
        recipe = self.recipe.for_phase(phase)
        return replace(recipe, **turn.recipe) if turn else recipe

    def _draws(self, index: int, recipe: Recipe) -> list[Draws]:
        """What each of the scheme's batches is drawn by."""
        # the last phase always has stream 0: methods with and without preparatory phases stay paired in it
        first = (index + 1) % len(self.phases)
        return [
            Draws.make(
                seed=self.seed,
                stream=first + number * PEER_STREAMS,
                epochs=recipe.epochs,
                images=len(self._bank),
                padding=recipe.crop_padding,
                flip=recipe.flip,
                device=self.device,
                strong=self.scheme.wants_strong,
            )
            for number in range(self.scheme.batches)
        ]

    def _begin_phase(self, phase: Phase, recipe: Recipe) -> None:
        self._plateau = Plateau(learning_rate=recipe.learning_rate)
        turns = self.scheme.turns(phase)
        self._recipes = {turn.name: self._recipe_of(phase, turn) for turn in turns}
        self._trained = {turn.name: self.scheme.trained_parameters(turn.trains) for turn in turns}
        self._optimisers = {name: _optimiser(self._trained[name], recipe) for name, recipe in self._recipes.items()}

    def _run_epoch(self, phase: Phase, recipe: Recipe, draws: Sequence[Draws]) -> None:
        self.scheme.set_modes(phase)
        self.scheme.set_clocks(self.position.epoch, recipe.epochs)
        if self.position.step == 0:
            self._sums = Sums()
            self.scheme.begin_epoch(self.position.epoch, recipe.epochs, self.watch.get("held_out"))
        steps = math.ceil(len(self._bank) / recipe.batch)
        for step in range(self.position.step, steps):
            self._set_learning_rates(recipe, step / steps)
            self.scheme.begin_step(self.position.epoch * steps + step)
            self._step(phase, recipe, self._batch(draws, recipe, step))
            self.position.step = step + 1
            self._between_steps(phase, recipe, steps)

    def _batch(self, draws: Sequence[Draws], recipe: Recipe, step: int) -> Batch:
        epoch, start = self.position.epoch, step * recipe.batch
        stop = min(start + recipe.batch, len(self._bank))
        batches = []
        for own in draws:
            # peers see the images of the first one's batch, unless the scheme wants others
            index = (own if self.scheme.own_images else draws[0]).batch(epoch, start, stop)[0]
            _, shift, flip = own.batch(epoch, start, stop)
            strong = self._bank.strong(index, own.strong_batch(epoch, start, stop)) if own.strong else None
            batches.append(Batch(self._bank.augmented(index, shift, flip), self._bank.labels[index], index, strong))
        return batches[0]._replace(others=tuple(batches[1:]))

    def _step(self, phase: Phase, recipe: Recipe, batch: Batch) -> None:
        noted = {}
        for turn in self.scheme.turns(phase):
            optimiser, parameters = self._optimisers[turn.name], self._trained[turn.name]
            if turn.fresh:
                optimiser.state.clear()
            for _ in range(turn.times):
                losses = self.scheme.losses(phase, turn, batch, HALF[recipe.precision])
                optimiser.zero_grad(set_to_none=True)
                sum(losses.terms.values()).backward(inputs=parameters)
                if clip := self._recipes[turn.name].clip:
                    nn.utils.clip_grad_norm_(parameters, clip)
                optimiser.step()
            noted |= {name: term * len(batch.labels) for name, term in losses.terms.items()} | dict(losses.counts)
        self._sums.add(noted)

    def _set_learning_rates(self, of_phase: Recipe, done: float) -> None:
        """Give every optimiser its rate; `done` is the share of the epoch that is over."""
        for name, recipe in self._recipes.items():
            if recipe.schedule == "plateau":  # the phase's, at which a turn may learn faster or slower
                rate = self._plateau.learning_rate * (recipe.learning_rate / of_phase.learning_rate)
            else:
                rate = recipe.learning_rate_at(self.position.epoch + done)
            for group in self._optimisers[name].param_groups:
                group["lr"] = rate

    def _end_epoch(self, phase: Phase, recipe: Recipe) -> bool:
        """Note the epoch in the history and move on; True says that the schedule ends the phase."""
        rate = next(iter(self._optimisers.values())).param_groups[0]["lr"]  # of the first turn's last step
        row = {"phase": phase.name, "epoch": self.position.epoch, "learning_rate": rate}
        means = self._sums.means(len(self._bank))
        row["train_accuracy"] = 100 * means.pop("correct")
        row |= means
        row |= {f"{name}_accuracy": self._accuracy(bank) for name, bank in self.watch.items()}
        self.history.append(row)
        if not all(math.isfinite(mean) for mean in means.values()):
            raise Diverged(f"the loss is not finite in epoch {self.position.epoch} of {phase.name!r}", self.history)
        self.position.epoch += 1
        self.position.step = 0
        return recipe.schedule == "plateau" and self._plateau.update(row["held_out_accuracy"], recipe)

    def _accuracy(self, bank: ImageBank) -> float:
        return 100 * (logits_of(self.scheme.deployed, bank).argmax(dim=1) == bank.labels).double().mean().item()

    def _between_steps(self, phase: Phase, recipe: Recipe, steps: int) -> None:
        done = sum(earlier.epochs(self.recipe.epochs) for earlier in self.phases[: self.position.phase])
        text = f"{phase.name} epoch {self.position.epoch + 1}/{recipe.epochs}"
        self.surroundings.on_step(done + self.position.epoch + self.position.step / steps, text)
        if self.surroundings.should_stop():
            self._save()
            raise Stopped
        if time.monotonic() - self._saved > self.surroundings.checkpoint_seconds:
            self._save()

    def _tick(self) -> None:
        now = time.monotonic()
        self.seconds += now - self._clock
        self._clock = now

    def _save(self) -> None:
        self._tick()
        self._saved = self._clock
        if self.surroundings.checkpoint is None:
            return
        state: dict[str, Any] = {
            "revision": REVISION,
            "position": asdict(self.position),
            "scheme": self.scheme.state_dict(),
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self._optimisers.items()},
            "sums": {"names": self._sums.names, "values": self._sums.values},
            "plateau": asdict(self._plateau),
            "history": self.history,
            "seconds": self.seconds,
            "random": _random_state(self.device),
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
        if self.position.phase < len(self.phases):
            phase = self.phases[self.position.phase]
            self._begin_phase(phase, self._recipe_of(phase))
        for name, optimiser in self._optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        self._sums = Sums(**state["sums"])
        self._plateau = Plateau(**state["plateau"])
        self.history = state["history"]
        self.seconds = state["seconds"]
        _set_random_state(state["random"], self.device)


def _optimiser(parameters: Sequence[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    groups = _parameter_groups(parameters)
    if recipe.optimiser == "adam":
        return torch.optim.Adam(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
    return torch.optim.SGD(
        groups,
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
        fused=True,
    )


def _parameter_groups(parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """One group, and, where some are marked by `core.without_decay`, one more for these."""
    free = [parameter for parameter in parameters if is_without_decay(parameter)]
    usual = [parameter for parameter in parameters if not is_without_decay(parameter)]
    return [{"params": usual}] + ([{"params": free, "weight_decay": 0.0}] if free else [])


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
