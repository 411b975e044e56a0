"""How a network is trained: optimiser, schedule, length, batch, augmentation, precision."""

import math
from dataclasses import dataclass, replace

from kdstudy.core import Phase, require_at_least_zero, require_choice, require_positive, require_whole

PRECISIONS = ("bf16", "fp32", "fp64")
SCHEDULES = ("step", "plateau", "cosine", "constant")
OPTIMISERS = ("sgd", "adam")
MOST_PADDING = 127  # a run's shifts, 0 to twice the padding, are drawn as bytes


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An optimiser under one of four schedules: SGD with momentum, or Adam with its usual betas.

    "step" multiplies the learning rate by `factor` at the start of each epoch in `milestones` (0-based) and reports the
    last of `epochs` epochs. "plateau" needs held-out images: it multiplies by `factor` after `patience` epochs in a row
    without a better accuracy on them and stops after `stop_patience` such epochs, or after `epochs` at the latest.
    "cosine" falls step by step along half a cosine to zero, `cycles` times from the start (Loshchilov & Hutter 2017);
    a cycle begins with an epoch. "constant" stays. Weight decay acts on every trained parameter that
    `core.without_decay` has not marked. Raises ValueError naming the field that is out of range.
    """

    epochs: int
    batch: int  # images per step; an odd last batch is kept
    learning_rate: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    schedule: str = "step"
    milestones: tuple[int, ...] = ()
    factor: float = 0.2
    patience: int = 2
    stop_patience: int = 3
    crop_padding: int = 4  # pixels of zeros on each side before the random crop; 0 turns it off
    flip: bool = True  # mirror left-right half of the time
    precision: str = "bf16"  # of the forward and backward pass; losses and weights are at least float32
    optimiser: str = "sgd"
    cycles: int = 1
    clip: float = (
        0.0  # the largest norm of a step's gradient, longer ones are shortened to it; 0 leaves all as they are
    )

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "learning_rate", "factor", "patience", "stop_patience"):
            require_positive(name, getattr(self, name))
        for name in ("momentum", "weight_decay", "crop_padding", "clip"):
            require_at_least_zero(name, getattr(self, name))
        if self.crop_padding > MOST_PADDING:
            raise ValueError(f"crop_padding must be at most {MOST_PADDING} pixels, not {self.crop_padding}")
        require_choice("precision", self.precision, PRECISIONS)
        require_choice("schedule", self.schedule, SCHEDULES)
        require_choice("optimiser", self.optimiser, OPTIMISERS)
        require_whole("cycles", self.cycles)
        if self.cycles > 1 and (self.schedule != "cosine" or self.cycles > self.epochs):
            raise ValueError(f"cycles must be 1 unless the schedule is cosine, at most one an epoch, not {self.cycles}")
        object.__setattr__(self, "milestones", tuple(self.milestones))
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones must rise, not {list(self.milestones)}")
        if self.milestones and self.milestones[0] < 0:
            raise ValueError(f"milestones must be epochs, counted from 0, not {list(self.milestones)}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")

    def learning_rate_at(self, epoch: float) -> float:
        """The learning rate at this 0-based epoch, with its fraction that is done, under any schedule but plateau."""
        if self.schedule == "cosine":
            starts = cycle_starts(self.epochs, self.cycles)
            start = max(begin for begin in starts if begin <= epoch)
            stop = min(begin for begin in (*starts, self.epochs) if begin > epoch)
            return self.learning_rate / 2 * (1 + math.cos(math.pi * (epoch - start) / (stop - start)))
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * self.factor ** sum(epoch >= milestone for milestone in self.milestones)

    def lasting(self, length: float) -> "Recipe":
        """This recipe with `length` times its epochs, at least one, and its milestones scaled likewise."""
        if length == 1:
            return self
        require_positive("length", length)
        epochs = max(1, round(length * self.epochs))
        return replace(self, epochs=epochs, milestones=_scaled(self.milestones, length))

    def for_phase(self, phase: Phase) -> "Recipe":
        """This recipe over a phase: its share of the epochs and milestones, its rate, and what it overrides.

        A phase that lasts a share of the run runs it out: a plateau is that of the whole run's accuracy.
        """
        epochs = phase.epochs(self.epochs)
        milestones = _scaled(self.milestones, phase.share)
        schedule = "step" if phase.share != 1 and self.schedule == "plateau" else self.schedule
        own = {"epochs": epochs, "milestones": milestones, "schedule": schedule}
        own["learning_rate"] = phase.rate * self.learning_rate
        return replace(self, **own | dict(phase.recipe))


def cycle_starts(epochs: int, cycles: int) -> tuple[int, ...]:
    """The 0-based epochs with which the cosine schedule's cycles begin."""
    return tuple(round(cycle * epochs / cycles) for cycle in range(cycles))


def _scaled(milestones: tuple[int, ...], length: float) -> tuple[int, ...]:
    return tuple(sorted({max(1, round(length * milestone)) for milestone in milestones}))


@dataclass
class Plateau:
    """The plateau schedule's memory: a plain dataclass of numbers, so that a checkpoint can hold it."""

    best: float = -1.0
    waited: int = 0
    learning_rate: float = 0.0

    def update(self, accuracy: float, recipe: Recipe) -> bool:
        """Take in an epoch's held-out accuracy; True says that training should stop."""
        if accuracy > self.best:
            self.best, self.waited = accuracy, 0
            return False
        self.waited += 1
        if self.waited >= recipe.stop_patience:
            return True
        if self.waited % recipe.patience == 0:
            self.learning_rate *= recipe.factor
        return False
