"""Who teaches whom. A scheme owns the networks of one run; whatever plays the teacher is frozen and detached here."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.core import Clock, Method, Phase, View
from kdstudy.models import reset


class Batch(NamedTuple):
    """What the loop hands a scheme for one step."""

    images: Tensor  # (B, channels, H, W), normalised and augmented
    labels: Tensor  # (B,) int64
    indices: Tensor | None = None  # (B,) int64, which training images these are
    strong: Tensor | None = None  # the same images, strongly augmented, for schemes that ask for them
    census: Tensor | None = None  # (N,) int64, the labels of all training images; in the sample that sizes adapters


@dataclass(frozen=True)
class Turn:
    """One optimiser step of a batch: which modules it trains. A phase has one turn or several, taken in order."""

    name: str
    trains: tuple[str, ...]


class Losses(NamedTuple):
    """What a scheme answers for a batch and a turn."""

    terms: Mapping[str, Tensor]  # named, weighted scalars; their sum is minimised
    counts: Mapping[str, Tensor]  # named numbers of images, for the history; "correct" belongs to the deployed network


class Scheme(nn.Module, ABC):
    """All networks of a run and the rule by which they learn.

    Its state dict is what a checkpoint must hold. The loop asks for phases, for the turns of a phase, and for each
    batch and turn for the named loss terms, whose sum it minimises over `turn.trains` alone.
    """

    least_batch: int = 1  # fewer images in a batch leave a loss undefined
    wants_strong: bool = False  # whether batches need strongly augmented images beside the usual ones

    @abstractmethod
    def phases(self) -> tuple[Phase, ...]:
        """The phases of training, in order."""

    def turns(self, phase: Phase) -> tuple[Turn, ...]:
        """The optimiser steps of each batch; by default one over `phase.trains`."""
        return (Turn(phase.name, phase.trains),)

    @abstractmethod
    def losses(self, phase: Phase, turn: Turn, batch: Batch, half: torch.dtype | None) -> Losses:
        """The losses of a batch. Networks run under autocast to `half` if it is given; the losses outside it."""

    @property
    @abstractmethod
    def deployed(self) -> nn.Module:
        """The network that is evaluated and kept."""

    def prepare(self, plain_batches: Callable[[], Iterable[Tensor]]) -> None:
        """Whatever must be done once, with the plain training images, before the first phase."""

    def trained_parameters(self, names: Iterable[str]) -> list[nn.Parameter]:
        """Parameters of the named modules, in a fixed order."""
        return [p for name in names for p in self.get_submodule(name).parameters()]

    def set_modes(self, phase: Phase) -> None:
        """Train mode for what the phase trains, eval mode for the rest: evaluation in between leaves no trace."""
        self.eval()
        for name in phase.trains:
            self.get_submodule(name).train()

    def set_clocks(self, epoch: int, epochs: int) -> None:
        """Tell losses that change with time that the 0-based `epoch` of a phase's `epochs` begins."""
        for module in self.modules():
            if isinstance(module, Clock):
                module.set(epoch, epochs)


class _Taught(Scheme):
    """One student, one method and its adapters: what `Alone` and `Offline` share."""

    def __init__(self, student: nn.Module, method: Method):
        super().__init__()
        self.student = student
        self.method = method
        self.least_batch = method.least_batch
        self.wants_strong = "strong" in method.reads

    def _size_adapters(self, sample: Batch) -> None:
        self.student.eval()  # a forward in train mode would move its batch statistics
        with torch.no_grad():
            student = look(self.student, sample, self.method.reads, None)
            adapters = self.method.adapters(student, self.teach(sample, None, student))
        self.adapters = adapters.to(device=sample.images.device, dtype=sample.images.dtype)

    def phases(self) -> tuple[Phase, ...]:
        """The method's own phases."""
        return self.method.phases()

    def losses(self, phase, turn, batch, half):
        """The method's terms of the student's view against the teacher's."""
        with torch.set_grad_enabled(any(name.split(".")[0] == "student" for name in phase.trains)):
            student = look(self.student, batch, self.method.reads, half)
        teacher = self.teach(batch, half, student)
        terms = phase.objective(student, teacher, batch.labels, self.adapters)
        return Losses(terms, {"correct": self._correct(student, batch.labels)})

    @torch.no_grad()
    def _correct(self, student: View, labels: Tensor) -> Tensor:
        return count_correct(self.method.predict(student, self.adapters), labels)

    @abstractmethod
    def teach(self, batch: Batch, half: torch.dtype | None, student: View) -> View:
        """The detached view of whatever plays the teacher, in full precision, with the taps that the method reads."""

    @property
    def deployed(self) -> nn.Module:
        """The student, with those of its adapters that it keeps."""
        return Deployed(self.student, self.method, self.adapters) if self.method.deploys else self.student


class Alone(_Taught):
    """One network and its labels: baselines and teachers."""

    def __init__(self, student: nn.Module, method: Method, sample: Batch):
        """`sample` are 2 or more images by whose view the method sizes its adapters."""
        super().__init__(student, method)
        self._size_adapters(sample)

    def teach(self, batch: Batch, half: torch.dtype | None, student: View) -> View:
        """The student's own view: nothing else is there."""
        return student.detach()


class Offline(_Taught):
    """A trained, frozen teacher and one student (Hinton et al. 2015).

    The teacher is no submodule: it cannot be trained, saved or put into train mode with the rest, and its batch-norm
    statistics never change. Student and teacher see the same augmented images.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, method: Method, sample: Batch):
        """`sample` are 2 or more images, best a whole batch, by whose views the method sizes its adapters."""
        super().__init__(student, method)
        self._teacher = (teacher.eval().requires_grad_(False),)  # in a tuple, so that it is not registered
        self._size_adapters(sample)

    def teach(self, batch: Batch, half: torch.dtype | None, student: View) -> View:
        """The teacher's view."""
        (teacher,) = self._teacher
        with torch.no_grad():
            return look(teacher, batch, self.method.reads, half)

    def prepare(self, plain_batches: Callable[[], Iterable[Tensor]]) -> None:
        """Let the method change the student's first weights and measure the teacher, if it wants to."""
        (teacher,) = self._teacher
        with torch.no_grad():
            self.method.initialise(self.student, teacher, plain_batches())

        def views() -> Iterator[View]:
            with torch.no_grad():
                for images in plain_batches():
                    yield look(teacher, Batch(images, images.new_empty(0)), self.method.reads, None)

        self.method.calibrate(self.adapters, views())


class Collaborative(Offline):
    """Offline, and beside it a scratch teacher: the teacher's architecture, trained from nothing (Zhao et al. 2020).

    It learns from the labels alone, at the student's side. Its detached view is the one member of the teacher's view,
    except where adapters are sized. One optimiser serves both networks: they share no parameter and no gradient.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, method: Method, sample: Batch):
        """Draws the scratch teacher's first weights, on the CPU, from torch's global generator."""
        super().__init__(student, teacher, method, sample)
        scratch = copy.deepcopy(teacher).cpu().requires_grad_(True)
        reset(scratch)
        self.scratch = scratch.to(sample.images.device)

    def phases(self) -> tuple[Phase, ...]:
        """The method's phases, with the scratch teacher trained in all of them."""
        return tuple(replace(phase, trains=(*phase.trains, "scratch")) for phase in super().phases())

    def losses(self, phase, turn, batch, half):
        """The method's terms, and the scratch teacher's cross-entropy."""
        scratch = look(self.scratch, batch, (), half)
        student = look(self.student, batch, self.method.reads, half)
        teacher = self.teach(batch, half, student)._replace(members=(scratch.detach(),))
        terms = dict(phase.objective(student, teacher, batch.labels, self.adapters))
        terms["scratch"] = F.cross_entropy(scratch.logits, batch.labels)
        return Losses(terms, {"correct": self._correct(student, batch.labels)})


class Deployed(nn.Module):
    """A student together with the adapters that it keeps after training."""

    def __init__(self, student: nn.Module, method: Method, adapters: nn.ModuleDict):
        super().__init__()
        self.student = student
        self.adapters = nn.ModuleDict({name: adapters[name] for name in method.deploys})
        self._method = method

    def forward(self, images: Tensor) -> View:
        """The student's view with the logits that the method predicts by."""
        view = self.student(images)
        return view._replace(logits=self._method.predict(view, self.adapters))


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """How many of a batch the logits get right, a scalar on the device."""
    return (logits.argmax(dim=1) == labels).sum()


def look(network: nn.Module, batch: Batch, taps: Iterable[str], half: torch.dtype | None) -> View:
    """The network's view of a batch, run under autocast to `half` if given; only `taps` are kept, in full precision."""
    taps = tuple(taps)
    view = _forward(network, batch.images, half).only(taps)
    added = {"indices": batch.indices, "census": batch.census, "network": network}
    if "strong" in taps:
        # one after the other, so that batch norm sees each kind of image by itself
        added["strong"] = _forward(network, batch.strong, half).only(())
    return view._replace(**{tap: added[tap] for tap in added if tap in taps}).full_precision()


def _forward(network: nn.Module, images: Tensor, half: torch.dtype | None) -> View:
    with torch.autocast(images.device.type, dtype=half, enabled=half is not None):
        return network(images)
