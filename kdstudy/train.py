"""The loop: it trains whatever a scheme hands it, phase by phase, and can be stopped and resumed at any step.

`Training` is one run in pieces: beginnings and ends, which are Python, and the step, which is nothing but tensors.
`run` puts them together for a run by itself, `cohort.Cohort` for several at once. Nothing inside an epoch waits for the
device: losses and counts are summed there and copied to the host once an epoch.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdstudy.breakdown import part
from kdstudy.checkpoint import BadFile, load_checkpoint, misfit, save_checkpoint
from kdstudy.core import Phase, is_without_decay
from kdstudy.data import Draws, ImageBank
from kdstudy.evaluate import count_hits
from kdstudy.graphs import make_state
from kdstudy.recipe import Plateau, Recipe
from kdstudy.schemes import Batch, Losses, Scheme, Turn
from kdstudy.stopping import ShouldStop, Stopped, never, until

# Raised by hand when a change may alter the outcome of a run: it is part of every run's id. A test compares tiny seeded
# runs of every method with outcomes on file and fails if they move while this does not.
REVISION = 1

PEER_STREAMS = 1000  # between the random streams of one peer's phases and the next peer's

NUMBER = (int, float)
STATE: dict[str, Any] = {  # how a checkpoint is made, as `checkpoint.misfit` reads it
    "revision": int,
    "run": str,
    "position": {"phase": int, "epoch": int, "step": int},
    "diverged": bool,
    "scheme": {str: Tensor},
    "optimisers": {str: {"state": dict, "param_groups": [{"params": [int], str: object}]}},
    "rates": {str: NUMBER},
    "sums": {"names": [str], "values": (Tensor, type(None))},
    "plateau": {"best": NUMBER, "waited": int, "learning_rate": NUMBER},
    "history": [{"phase": str, "epoch": int, "learning_rate": NUMBER, "train_accuracy": float, str: float}],
    "seconds": NUMBER,
    "sessions": [{"seconds": NUMBER, str: object}],
    "made_by": {str: object},
    "random": {"cpu": Tensor, str: Tensor},
}

HALF = {"bf16": torch.bfloat16, "fp32": None, "fp64": None}
FULL = {"bf16": torch.float32, "fp32": torch.float32, "fp64": torch.float64}


class Diverged(Exception):
    """The loss of an epoch is not finite. `history` holds the epochs up to and including it."""

    def __init__(self, message: str, history: list[dict]):
        super().__init__(message)
        self.history = history


@dataclass(frozen=True)
class Surroundings:
    """What the loop shares with the outside: where to keep checkpoints, whom to tell, when to stop.

    `run` is the id of the run, by which another's checkpoint is known. `session` describes this sitting, in values that
    JSON has.
    """

    checkpoint: Path | None = None
    checkpoint_seconds: float = 60.0
    on_step: Callable[[float, str], None] = lambda epochs_done, text: None
    should_stop: ShouldStop = never
    run: str = ""
    session: Mapping[str, Any] = field(default_factory=dict)


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
        self.diverged: Diverged | None = None
        self.seconds = 0.0  # of training, over all sessions
        self._earlier: list[dict[str, Any]] = []  # sessions
        self._seconds_before = 0.0  # this session
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

        def clock_on() -> float:
            nonlocal clock
            now = time.monotonic()
            self.seconds, clock = self.seconds + now - clock, now
            return now

        self.start()
        while not self.finished:
            if self.diverged:
                raise self.diverged
            self.begin_epoch()
            while self.position.step < self.current.steps:
                self.begin_step()
                self.step(self.batch(self.rows))
                self.end_step()
                now = clock_on()
                stopped = self.surroundings.should_stop()
                if stopped or now - saved > self.surroundings.checkpoint_seconds:
                    self.save()
                    saved = now
                if stopped:
                    raise Stopped
            try:
                tally = self.tally().tolist()
            except Stopped:
                clock_on()
                self.save()
                raise
            self.end_epoch(tally)
        clock_on()
        return self.history

    def start(self) -> None:
        """Go to where the checkpoint stands, if there is one; otherwise prepare.

        Raises BadFile if the checkpoint cannot be one of this run, and Stopped, with nothing to keep, if asked to stop
        while the scheme is looking at the images.
        """
        torch.manual_seed(self.seed)  # dropout and the like; data has its own draws
        state = self._load()
        if state is None:
            self.scheme.prepare(self._plain_batches)
            self._enter_phase()
        else:
            self._restore(state)

    def _plain_batches(self) -> Iterator[Tensor]:
        return until(self.surroundings.should_stop, self.bank.plain(self.recipe.batch))

    @property
    def finished(self) -> bool:
        """Whether all phases are over."""
        return self.current is None

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to train: it has finished or diverged."""
        return self.finished or self.diverged is not None

    @property
    def sessions(self) -> list[dict[str, Any]]:
        """The sittings of this run, the last one being this: what they were, and how many "seconds" each trained."""
        return [*self._earlier, {**self.surroundings.session, "seconds": self.seconds - self._seconds_before}]

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
        sums = self.current.sums
        if sums.values is not None and list(parts) != sums.names:
            raise self._refusal(f"it sums {', '.join(sums.names)}, and the method has {', '.join(parts)}")
        with part("metrics"):
            sums.add(parts)

    def end_step(self) -> None:
        """Move on by a batch, and tell."""
        self.position.step += 1
        current, position = self.current, self.position
        done = sum(earlier.epochs(self.recipe.epochs) for earlier in self.phases[: position.phase])
        text = f"{current.phase.name} epoch {position.epoch + 1}/{current.recipe.epochs}"
        self.surroundings.on_step(done + position.epoch + position.step / current.steps, text)

    def tally(self) -> Tensor:
        """The epoch's sums and the hits in every watched set, one vector on the device for `end_epoch`.

        Raises Stopped, on a CPU; nothing has changed then.
        """
        # on a GPU it does not take long, and is captured into a graph, which must be whole
        should_stop = self.surroundings.should_stop if self.device.type == "cpu" else never
        hits = [count_hits(self.scheme.deployed, bank, should_stop) for bank in self.watch.values()]
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
            self.diverged = self._divergence()
            raise self.diverged
        self._move_on(row)

    def _divergence(self) -> Diverged:
        where = f"epoch {self.position.epoch} of {self.current.phase.name!r}"
        return Diverged(f"the loss is not finite in {where}", self.history)

    def _move_on(self, row: Mapping[str, Any]) -> None:
        recipe = self.current.recipe
        stops = recipe.schedule == "plateau" and self._plateau.update(row["held_out_accuracy"], recipe)
        self.position = replace(self.position, epoch=self.position.epoch + 1, step=0)
        if stops or self.position.epoch == recipe.epochs:
            self.position = Position(phase=self.position.phase + 1)
            self._enter_phase()

    def save(self) -> None:
        """Write the checkpoint, if there is a place for it; also of a run that has ended."""
        if self.surroundings.checkpoint is None:
            return
        state: dict[str, Any] = {
            "revision": REVISION,
            "run": self.surroundings.run,
            "position": asdict(self.position),
            "diverged": self.diverged is not None,
            "scheme": self.scheme.state_dict(),
            "optimisers": {},
            "rates": {},
            "sums": {"names": [], "values": None},
            "plateau": asdict(self._plateau),
            "history": self.history,
            "seconds": self.seconds,
            "sessions": self.sessions,
            "made_by": self.made_by,
            "random": random_state(self.device),
        }
        if current := self.current:
            state["optimisers"] = {name: optimiser.state_dict() for name, optimiser in current.optimisers.items()}
            state["rates"] = current.rates
            state["sums"] = {"names": current.sums.names, "values": current.sums.values}
        save_checkpoint(state, self.surroundings.checkpoint)

    def _load(self) -> dict[str, Any] | None:
        if self.surroundings.checkpoint is None:
            return None
        state = load_checkpoint(self.surroundings.checkpoint, self.device)
        if state is None or misfit(state.get("revision"), int) or state["revision"] != REVISION:
            return None
        # these were added later
        return {"run": self.surroundings.run, "diverged": False, "sessions": [], "made_by": self.made_by} | state

    def _restore(self, state: dict[str, Any]) -> None:
        self._check_state(state)
        self.position = Position(**state["position"])
        self.scheme.load_state_dict(state["scheme"])
        self._enter_phase()
        if self.current:
            self._check_phase_state(state)
            self._restore_phase(state)
        self.history, self.made_by, self._earlier = state["history"], state["made_by"], state["sessions"]
        self.seconds = self._seconds_before = state["seconds"]
        if state["diverged"]:
            self.diverged = self._divergence()
        try:
            set_random_state(state["random"], self.device)
        except RuntimeError as error:
            raise self._refusal(f"its random numbers are none: {error}") from error

    def _restore_phase(self, state: dict[str, Any]) -> None:
        optimisers = self.current.optimisers
        for name, optimiser in optimisers.items():
            # in groups as this session wants them: learning rates may be numbers or tensors
            optimiser.load_state_dict(optimiser.state_dict() | {"state": state["optimisers"][name]["state"]})
        for name, rate in state["rates"].items():
            set_learning_rate(optimisers[name], rate)
        self.current.rates, self.current.sums = state["rates"], Sums(**state["sums"])
        self._plateau = Plateau(**state["plateau"])

    def _check_state(self, state: dict[str, Any]) -> None:
        """Raise BadFile unless it is a state of this run, as this code writes it."""
        self._refuse_if(misfit(state, STATE))
        run, phase, last = state["run"], state["position"]["phase"], len(self.phases)
        if run != self.surroundings.run:
            raise self._refusal(f"it is of the run {run!r}, not {self.surroundings.run!r}")
        if not 0 <= phase <= last or (phase == last and (state["diverged"] or state["optimisers"])):
            raise self._refusal(f"it stands in phase {phase} of {last}")
        self._refuse_if(misfit(state["scheme"], dict(self.scheme.state_dict()), "scheme"))
        self._refuse_if(misfit(state["random"]["cpu"], torch.get_rng_state(), "random.cpu"))

    def _check_phase_state(self, state: dict[str, Any]) -> None:
        """The same for what belongs to the phase in which training stands."""
        current, epoch, step = self.current, self.position.epoch, self.position.step
        if not (0 <= epoch < current.recipe.epochs and 0 <= step <= current.steps):
            raise self._refusal(f"it stands at step {step} of epoch {epoch}, beyond the end")
        wanted = {name: _made_like(each, state["optimisers"].get(name)) for name, each in current.optimisers.items()}
        self._refuse_if(misfit(state["optimisers"], wanted, "optimisers"))
        for name, optimiser in current.optimisers.items():
            if _grouped(state["optimisers"][name]) != _grouped(optimiser.state_dict()):
                raise self._refusal(f"optimisers.{name} has other parameters")
        rates, sums = state["rates"], state["sums"]
        if set(rates) != set(wanted) and (step or rates):
            raise self._refusal(f"it has learning rates of {sorted(rates)} instead of {sorted(wanted)}")
        if step or sums["values"] is not None:
            self._refuse_if(misfit(sums["values"], torch.zeros(len(sums["names"]), dtype=torch.float64), "sums.values"))
        if step and "correct" not in sums["names"]:
            raise self._refusal("sums.correct is absent")

    def _refuse_if(self, wrong: str | None) -> None:
        if wrong:
            raise self._refusal(wrong)

    def _refusal(self, what: str) -> BadFile:
        path = self.surroundings.checkpoint
        return BadFile(f"checkpoint {path} is none of this run: {what}; remove it to start the run anew")


def position_of(state: Mapping[str, Any]) -> tuple[int, int, int]:
    """At which phase, epoch and step a checkpoint's state stands: the greater of two is further.

    Raises BadFile if the state does not say.
    """
    if wrong := misfit(state.get("position"), STATE["position"], "position"):
        raise BadFile(f"a checkpoint does not say where it stands: {wrong}")
    return astuple(Position(**state["position"]))


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


def _made_like(optimiser: torch.optim.Optimizer, found: Mapping[str, Any] | None) -> dict[str, Any]:
    """How an optimiser's state is made where those parameters have been stepped that have a state in what was found."""
    make_state(optimiser)
    stepped = found["state"] if found else ()
    made = {number: each for number, each in optimiser.state_dict()["state"].items() if number in stepped}
    return {"state": made, "param_groups": list}


def _grouped(state: Mapping[str, Any]) -> list[list[int]]:
    return [group["params"] for group in state["param_groups"]]


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
