"""Who teaches whom. A scheme owns the networks of one run; whatever plays the teacher is frozen and detached here."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kdstudy.core import Method, Phase, View


class Batch(NamedTuple):
    """What the loop hands a scheme for one step."""

    images: Tensor  # (B, channels, H, W), normalised and augmented
    labels: Tensor  # (B,) int64


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

    def prepare(self, plain_batches: Iterable[Tensor]) -> None:
        """Whatever must be measured once over the plain training images before the first phase."""

    def trained_parameters(self, names: Iterable[str]) -> list[nn.Parameter]:
        """Parameters of the named modules, in a fixed order."""
        return [p for name in names for p in self.get_submodule(name).parameters()]

    def set_modes(self, phase: Phase) -> None:
        """Train mode for what the phase trains, eval mode for the rest: evaluation in between leaves no trace."""
        self.eval()
        for name in phase.trains:
            self.get_submodule(name).train()


class Alone(Scheme):
    """One network and its labels: baselines and teachers."""

    def __init__(self, student: nn.Module, method: Method):
        super().__init__()
        self.student = student
        self.adapters = nn.ModuleDict()
        self.method = method

    def phases(self) -> tuple[Phase, ...]:
        """The method's own phases."""
        return self.method.phases()

    def losses(self, phase, turn, batch, half):
        """The method's terms; where it asks for a teacher's view it is given the student's own, detached."""
        view = look(self.student, batch.images, self.method.reads, half)
        terms = phase.objective(view, view.detach(), batch.labels, self.adapters)
        return Losses(terms, {"correct": count_correct(view, batch.labels)})

    @property
    def deployed(self) -> nn.Module:
        """The network."""
        return self.student


class Offline(Scheme):
    """A trained, frozen teacher and one student (Hinton et al. 2015).

    The teacher is no submodule: it cannot be trained, saved or put into train mode with the rest, and its batch-norm
    statistics never change. Student and teacher see the same augmented images.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, method: Method, sample: Tensor):
        """`sample` (2 or more, channels, H, W) are images by whose views the method sizes its adapters."""
        super().__init__()
        self.student = student
        self.method = method
        self._teacher = (teacher.eval().requires_grad_(False),)  # in a tuple, so that it is not registered
        self.adapters = self._sized_adapters(sample)

    def _sized_adapters(self, sample: Tensor) -> nn.ModuleDict:
        self.student.eval()  # a forward in train mode would move its batch statistics
        with torch.no_grad():
            student_view = look(self.student, sample, self.method.reads, None)
        adapters = self.method.adapters(student_view, self.teach(sample, None))
        return adapters.to(device=sample.device, dtype=sample.dtype)

    def teach(self, images: Tensor, half: torch.dtype | None) -> View:
        """The teacher's detached view of a batch, in full precision, with the taps that the method reads."""
        (teacher,) = self._teacher
        with torch.no_grad():
            return look(teacher, images, self.method.reads, half)

    def prepare(self, plain_batches: Iterable[Tensor]) -> None:
        """Let the method measure the teacher, if it wants to."""

        def views() -> Iterator[View]:
            for images in plain_batches:
                yield self.teach(images, None)

        self.method.calibrate(self.adapters, views())

    def phases(self) -> tuple[Phase, ...]:
        """The method's own phases."""
        return self.method.phases()

    def losses(self, phase, turn, batch, half):
        """The method's terms of the student's view against the teacher's."""
        teacher = self.teach(batch.images, half)
        student = look(self.student, batch.images, self.method.reads, half)
        terms = phase.objective(student, teacher, batch.labels, self.adapters)
        return Losses(terms, {"correct": count_correct(student, batch.labels)})

    @property
    def deployed(self) -> nn.Module:
        """The student, without its adapters."""
        return self.student


def count_correct(view: View, labels: Tensor) -> Tensor:
    """How many of a batch the logits get right, a scalar on the device."""
    return (view.logits.detach().argmax(dim=1) == labels).sum()


def look(network: nn.Module, images: Tensor, taps: Iterable[str], half: torch.dtype | None) -> View:
    """The network's view of a batch, run under autocast to `half` if given; only `taps` are kept, in full precision."""
    with torch.autocast(images.device.type, dtype=half, enabled=half is not None):
        view = network(images)
    return view.only(taps).full_precision()
