"""What trained networks show inside for the same images: where they look, and which of their neurons are on."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from kdstudy.adapters import paired_maps
from kdstudy.answers import trained
from kdstudy.attention import attention_map
from kdstudy.boundaries import paired_pre_maps
from kdstudy.core import View
from kdstudy.data import ImageBank
from kdstudy.device import data_path
from kdstudy.image_set import read_image_set
from kdstudy.results import Ledger
from kdstudy.study import RunSpec

MEASURED = 1000  # images: enough for a share to be known to a point or two
BATCH = 200
# the fastest algorithm may be another one each time, and the last bits of the maps with it
repeatable = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)

Pairs = list[tuple[Tensor, Tensor]]  # of a student and its teacher


@dataclass(frozen=True)
class Looks:
    """Attention maps (N, h, w) of every stage, each of length 1, of a teacher and its students for N test images."""

    images: np.ndarray  # (N, H, W, C) uint8
    teacher: tuple[Tensor, ...]
    students: Mapping[str, tuple[Tensor, ...]]

    @property
    def likeness(self) -> dict[str, list[float]]:
        """By student, for every stage: the cosine of its maps and the teacher's, mean over the images."""
        return {
            name: [float((s * t).sum(dim=(1, 2)).mean()) for s, t in zip(maps, self.teacher, strict=True)]
            for name, maps in self.students.items()
        }


@repeatable
def looks(ledger: Ledger, students: Mapping[str, RunSpec], device: torch.device) -> Looks:
    """Where students look, and where the one teacher of them all looks, as attention transfer measures it.

    Raises FileNotFoundError for weights that are not on this machine.
    """
    maps = {}
    for name, spec in students.items():
        maps[name], teacher = zip(*_compared(ledger, spec, device, "test", _attention_maps), strict=True)
    return Looks(_test_images(spec), teacher, maps)


def _attention_maps(student: View, teacher: View) -> Pairs:
    return [(_attention(s), _attention(t)) for s, t in paired_maps(student, teacher)]


def _attention(stage_map: Tensor) -> Tensor:
    return attention_map(stage_map).view(len(stage_map), *stage_map.shape[2:])


@dataclass(frozen=True)
class Sides:
    """Which of the teacher's neurons of the last stage are on, bool (N, positions, channels), for N test images.

    `students` holds what can be read off each student. `constant` is the share of the teacher's neurons (percent) that
    are named right by always saying of each what is more frequent.
    """

    images: np.ndarray  # (N, H, W, C) uint8
    teacher: Tensor
    students: Mapping[str, Tensor]
    constant: float

    @property
    def agreement(self) -> dict[str, float]:
        """By student, the share of the teacher's neurons (percent) whose side is read off right."""
        return {name: 100 * float((on == self.teacher).double().mean()) for name, on in self.students.items()}


@repeatable
def sides(ledger: Ledger, students: Mapping[str, RunSpec], device: torch.device) -> Sides:
    """On which side of its boundary each neuron of the teacher's last stage is, and what its students know of that.

    A student numbers its neurons in its own way, and may have fewer. So a 1x1 layer is fitted for every student, from
    its values before the activation, by least squares to the teacher's sides (-1 or 1) on training images. The layer's
    sign on test images is what the student says. Raises FileNotFoundError for weights that are not on this machine.
    """
    read = {}
    for name, spec in students.items():
        ((own, its),) = _compared(ledger, spec, device, "training", _last_pre_maps)
        ((new, wanted),) = _compared(ledger, spec, device, "test", _last_pre_maps)
        read[name], teacher = _told(_with_one(own), its > 0, _with_one(new)), wanted > 0
    usual = (its > 0).double().mean(dim=(0, 1)) > 0.5
    return Sides(_test_images(spec), teacher, read, 100 * float((teacher == usual).double().mean()))


def _last_pre_maps(student: View, teacher: View) -> Pairs:
    return [tuple(stage_map.permute(0, 2, 3, 1).flatten(1, 2) for stage_map in paired_pre_maps(student, teacher)[-1])]


def _with_one(neurons: Tensor) -> Tensor:
    """A further neuron that is always 1, in double precision."""
    return torch.cat([neurons.double(), torch.ones(*neurons.shape[:2], 1, dtype=torch.float64)], dim=2)


def _told(known: Tensor, on: Tensor, new: Tensor) -> Tensor:
    targets = torch.where(on, 1.0, -1.0).double().flatten(end_dim=1)
    # this driver bears neurons that are always off, or depend on each other
    weights = torch.linalg.lstsq(known.flatten(end_dim=1), targets, driver="gelsd").solution
    return new @ weights > 0


def _compared(
    ledger: Ledger, spec: RunSpec, device: torch.device, part: str, measure: Callable[[View, View], Pairs]
) -> Pairs:
    """What is measured on the views of a student and its teacher for the first images of a part."""
    student, data = trained(ledger, spec, device)
    teacher, _ = trained(ledger, spec.teacher, device)
    bank = data.watched(0, spec.recipe)["test"] if part == "test" else data.training(spec.held_out, spec.recipe)
    views = zip(_views(student, bank), _views(teacher, bank), strict=True)
    batches = [[tuple(each.cpu() for each in pair) for pair in measure(*both)] for both in views]
    return [tuple(map(torch.cat, zip(*stage, strict=True))) for stage in zip(*batches, strict=True)]


def _test_images(spec: RunSpec) -> np.ndarray:
    return read_image_set(data_path(spec.dataset)).x_test[:MEASURED]


@torch.no_grad()
def _views(network: nn.Module, bank: ImageBank) -> Iterator[View]:
    for _, images in zip(range(MEASURED // BATCH), bank.plain(BATCH), strict=False):
        yield network(images)
