"""What several tests share: batch A, maps F, random batches, reference values of `oracles/`, methods to run over."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import settings
from torch import Tensor, nn

from kdstudy.core import Method, View
from kdstudy.relative import EarthMover, RelativeV1, RelativeV2, RelativeV3, RelativeV4

TEACHER_A = [[6.2, 3.0, 0.5, -1.0, -2.0], [1.0, 3.4, 2.0, 0.5, -1.1]]  # right, wrong
STUDENT_A = [[2.0, 1.0, 0.5, 0.0, -1.0], [0.5, 1.0, 1.5, -0.5, 0.0]]
LABELS_A = [0, 0]
STUDENT_F = [[[[1, 2], [0, 1]], [[0, 1], [2, 1]]]]
TEACHER_F = [[[[2, 0], [1, 1]], [[1, 1], [0, 3]]]]

deterministic = settings(deadline=None, derandomize=True, database=None)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}

# every reading of the methods that edit the teacher's target
EDITED = [
    RelativeV1(),
    RelativeV1(signed=True),
    RelativeV2(),
    RelativeV2(order="abs"),
    RelativeV3(),
    RelativeV3(order="abs"),
    RelativeV3(fill="min"),
    RelativeV4(),
    RelativeV4(literal=True),
    EarthMover(),
    EarthMover(conserve=False),
    EarthMover(conserve=False, renormalise=True),
]


@cache
def oracles(name: str = "oracles") -> dict[str, Any]:
    """The reference values of `oracles/<name>.json`."""
    return json.loads((Path(__file__).parent / "oracles" / f"{name}.json").read_text())


def batch_a(dtype: torch.dtype = torch.float64) -> tuple[View, View, Tensor]:
    """Student, teacher and labels of batch A."""
    student, teacher = (View(torch.tensor(logits, dtype=dtype)) for logits in (STUDENT_A, TEACHER_A))
    return student, teacher, torch.tensor(LABELS_A)


def maps_f(dtype: torch.dtype = torch.float64) -> tuple[View, View, Tensor]:
    """Student, teacher and label of the maps F: one sample, one stage, (1, 2, 2, 2)."""
    student, teacher = (
        View(torch.zeros(1, 5, dtype=dtype), maps=(torch.tensor(maps, dtype=dtype),)) for maps in (STUDENT_F, TEACHER_F)
    )
    return student, teacher, torch.tensor([0])


def row(view: View, index: int) -> View:
    """A batch of one sample, of the logits alone."""
    return View(view.logits[index : index + 1])


def random_logits(
    batch: int, classes: int, scale: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits (batch, classes) and labels; the teacher is right on at least half of the rows."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, batch, classes, generator=generator, dtype=torch.float64) * scale
    teacher += torch.randn(batch, 1, generator=generator, dtype=torch.float64) * scale
    labels = torch.randint(classes, (batch,), generator=generator)
    labels[: batch // 2] = teacher[: batch // 2].argmax(dim=1)
    return student.to(dtype), teacher.to(dtype), labels


def loss_of(method: Method, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The distillation term of a method that reads logits only and has no adapters."""
    return method.loss(View(student), View(teacher), labels, nn.ModuleDict())


def total_of(
    method: Method, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict | None = None
) -> Tensor:
    """The sum of the weighted terms."""
    return sum(method.objective(student, teacher, labels, adapters or nn.ModuleDict()).values())
