"""What a method costs: extra parameters, time and memory of a training step, beside those of vanilla KD.

Nothing is trained to an end here: networks have their first weights, and the images of a batch are real ones where a
setting's data set is given.
"""

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import pandas as pd
import torch
from torch import Tensor, nn

from kdstudy.core import Phase
from kdstudy.memory import bytes_kept
from kdstudy.models import build_model
from kdstudy.schemes import Batch, Scheme
from kdstudy.study import METHODS, SCHEMES, Planner, RunSpec
from kdstudy.train import HALF

REFERENCE_SETTING = "cifar100_wrn_16_2"  # the pair for which extra parameters are counted
REFERENCE_CLASSES = 100
COLUMNS = ("stage", "method", "phase", "finite", "time", "memory", "seconds", "megabytes", "extra_parameters")


def untrained_scheme(spec: RunSpec, batch: Batch, classes: int) -> Scheme:
    """The scheme of a run for images like those of `batch`, all networks with first weights of the run's seed."""
    teachers = [_network(teacher.network, batch.images, classes) for teacher in spec.teachers]
    return spec.assemble(partial(_network, images=batch.images, classes=classes), teachers, batch)


def _network(name: str, images: Tensor, classes: int) -> nn.Module:
    network = build_model(name, classes=classes, channels=images.shape[1], image_size=tuple(images.shape[2:]))
    return network.to(device=images.device, dtype=images.dtype, memory_format=torch.channels_last)


def extra_parameters(planner: Planner) -> dict[str, int | None]:
    """How many numbers each method of the table trains beside the student, for WRN-40-2 and WRN-16-2 with 100 classes.

    None for a method that no row of params.yaml can train on that pair.
    """
    images = torch.zeros(16, 3, 8, 8)  # the counts are those of 32 x 32 pixels, at a sixteenth of the work
    labels = torch.arange(16)
    batch = Batch(images, labels, labels, strong=images, census=torch.arange(2 * REFERENCE_CLASSES) % REFERENCE_CLASSES)
    specs = _specs_by_method(planner, REFERENCE_SETTING)
    counts = dict.fromkeys(METHODS)
    for key, spec in specs.items():
        counts[key] = _count(untrained_scheme(spec, batch, REFERENCE_CLASSES))
    return counts


def _specs_by_method(planner: Planner, setting: str) -> dict[str, RunSpec]:
    specs: dict[str, RunSpec] = {}
    for stage in planner.params.methods:
        for row in planner.rows(setting, stage):
            spec = planner.final(setting, stage, row, {})[0]
            for run in (spec, *spec.teachers):
                specs.setdefault(run.method, run)
    return specs


def _count(scheme: Scheme) -> int:
    """How many numbers the phases train that are not the student's, those of its peers among them."""
    student = getattr(scheme, "student", scheme.deployed)
    own = {id(parameter) for parameter in student.parameters()}
    trained = {id(p): p for phase in scheme.phases() for p in scheme.trained_parameters(phase.trains)}
    return sum(p.numel() for key, p in trained.items() if p.requires_grad and key not in own)


def step_costs(
    planner: Planner,
    setting: str,
    batch: Batch,
    classes: int,
    *,
    repeats: int = 5,
    tell: Callable[[str], None] = lambda text: None,
) -> pd.DataFrame:
    """Cost of a step of every phase of a setting's rows, in the precision of its recipe, from one batch.

    Columns: stage, method (the row), phase; finite (loss and all gradients); time and memory relative to a step of
    vanilla KD, which is measured in turn with it (median of `repeats` ratios); seconds; megabytes kept for the
    backward pass and by adapters with gradient and momentum; extra_parameters. What cannot be made for this pair is
    left out.
    """
    reference = _Step(planner.final(setting, "response", "kd", {})[0], batch, classes)
    rows = []
    for stage in planner.params.methods:
        for row in planner.rows(setting, stage):
            spec = planner.final(setting, stage, row, {})[0]
            if spec.images != 1 or SCHEMES[spec.scheme_name].family not in ("none", "offline"):
                continue  # a step costs what it costs on all images, and is compared where one network is trained
            tell(f"{stage} {row}")
            step = _Step(spec, batch, classes)
            for phase in step.scheme.phases():
                rows.append((stage, row, phase.name, *_cost(step, phase, reference, repeats)))
    return pd.DataFrame(rows, columns=COLUMNS)


def _cost(step: "_Step", phase: Phase, reference: "_Step", repeats: int) -> tuple:
    (plain,) = reference.scheme.phases()
    finite, kept = step.look(phase)
    _, plain_kept = reference.look(plain)
    pairs = [(step.seconds(phase), reference.seconds(plain)) for _ in range(repeats)]
    seconds, ratio = median(own for own, _ in pairs), median(own / other for own, other in pairs)
    megabytes, extra = (kept + step.owned()) / 1e6, _count(step.scheme)
    return finite, ratio, 1e6 * megabytes / plain_kept, seconds, megabytes, extra


class _Step:
    """A training step that can be taken again and again from the same batch."""

    def __init__(self, spec: RunSpec, batch: Batch, classes: int):
        self.half = HALF[spec.recipe.precision]
        self.batch = batch
        self.scheme = untrained_scheme(spec, batch, classes)
        self.scheme.prepare(lambda: [batch.images])

    def loss(self, phase: Phase) -> Tensor:
        self.scheme.set_modes(phase)
        self.scheme.set_clocks(0, 1)
        (turn,) = self.scheme.turns(phase)
        return sum(self.scheme.losses(phase, turn, self.batch, self.half).terms.values())

    def look(self, phase: Phase) -> tuple[bool, int]:
        """Whether loss and gradients are finite, and how many bytes the backward pass needs kept."""
        loss, kept = bytes_kept(lambda: self.loss(phase))
        loss.backward()
        gradients = [p.grad for p in self.scheme.parameters() if p.grad is not None]
        finite = bool(loss.isfinite()) and all(bool(gradient.isfinite().all()) for gradient in gradients)
        own = {p.untyped_storage().data_ptr() for p in self.scheme.parameters()}
        self.scheme.zero_grad(set_to_none=True)
        return finite, sum(size for pointer, size in kept.items() if pointer not in own)

    def owned(self) -> int:
        """Bytes of the adapters: parameters three times, with gradient and momentum, and buffers."""
        adapters = self.scheme.adapters
        trained = sum(p.numel() * p.element_size() * (3 if p.requires_grad else 1) for p in adapters.parameters())
        return trained + sum(buffer.numel() * buffer.element_size() for buffer in adapters.buffers())

    def seconds(self, phase: Phase) -> float:
        """The time of forward, backward and update."""
        parameters = [p for p in self.scheme.trained_parameters(phase.trains) if p.requires_grad]
        optimiser = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9)
        _wait(self.batch.images)
        start = time.perf_counter()
        self.loss(phase).backward()
        optimiser.step()
        _wait(self.batch.images)
        self.scheme.zero_grad(set_to_none=True)
        return time.perf_counter() - start


def _wait(images: Tensor) -> None:
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
