"""Tiny images, networks, methods and runs that the tests of the training half share. All in float64 unless told."""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.core import Method, Phase, View
from kdstudy.data import ImageBank
from kdstudy.recipe import Recipe
from kdstudy.schemes import Alone, Batch, Offline, Scheme
from kdstudy.stopping import Stopped
from kdstudy.train import FULL, Surroundings, Training

CLASSES = 3
IMAGES = 22  # three steps of 8, the last one odd
PADDING = 1
MEAN, STD = (120.0, 130.0, 110.0), (60.0, 70.0, 75.0)
CPU = torch.device("cpu")


def gpu(test):
    """Mark a test that needs a CUDA device, and skip it where there is none."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(skip(test))


def pictures(count: int = IMAGES, *, size=(6, 5), channels: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random images (N, H, W, C) uint8 and labels (N,) int64."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, *size, channels), dtype=np.uint8)
    return images, generator.integers(0, CLASSES, count)


def make_bank(
    images: np.ndarray, labels: np.ndarray, *, padding: int = 0, dtype=torch.float64, device=CPU
) -> ImageBank:
    channels = images.shape[3]
    return ImageBank(
        images, labels, mean=MEAN[:channels], std=STD[:channels], padding=padding, device=device, dtype=dtype
    )


def augment_slowly(image: np.ndarray, padding: int, shift: Iterable[int], flip: bool) -> np.ndarray:
    """One (H, W, C) image after pad, crop, mirror and normalisation, as (C, H, W) float64."""
    height, width, channels = image.shape
    padded = np.zeros((height + 2 * padding, width + 2 * padding, channels))
    padded[padding : padding + height, padding : padding + width] = image
    down, right = (int(x) for x in shift)
    crop = padded[down : down + height, right : right + width]
    if flip:
        crop = crop[:, ::-1]
    return ((crop - np.array(MEAN[:channels])) / np.array(STD[:channels])).transpose(2, 0, 1)


class TinyNet(nn.Module):
    """A convolution with batch norm and a linear classifier; shows every tap but the exits."""

    def __init__(self, width: int = 3, *, dropout: float = 0.0, classes: int = CLASSES):
        super().__init__()
        self.stem = nn.Conv2d(3, 2, 1)
        self.layer = nn.Conv2d(2, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> View:
        stem = self.stem(images)
        pre_map = self.norm(self.layer(stem))
        activated = F.relu(pre_map)
        embedding = self.dropout(activated.mean(dim=(2, 3)))
        return View(self.classifier(embedding), stem, (activated,), (pre_map,), embedding)


def tiny_net(seed: int, width: int = 3, *, dtype=torch.float64, device=CPU, **options) -> TinyNet:
    torch.manual_seed(seed)
    return TinyNet(width, **options).to(device=device, dtype=dtype, memory_format=torch.channels_last)


def tiny_teacher(*, dtype=torch.float64, device=CPU) -> TinyNet:
    """A teacher whose batch statistics are no longer those of a new network, so that a change of them shows."""
    teacher = tiny_net(100, 5, dtype=torch.float32)
    nn.init.uniform_(teacher.norm.running_var, 0.5, 1.5)
    nn.init.normal_(teacher.norm.running_mean, std=0.3)
    return teacher.to(device=device, dtype=dtype)


def unsettled(network: nn.Module) -> nn.Module:
    """The network itself, its batch norms no longer the identity, so that a swapped or skipped one shows."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.3)
    return network


@dataclass(frozen=True, kw_only=True)
class Plain(Method):
    """Cross-entropy alone."""

    kind: ClassVar[str] = "none"
    paper: ClassVar[str] = "none"
    needs_teacher: ClassVar[bool] = False

    kd_weight: float = 0.0

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        raise AssertionError("a term without weight was computed")


@dataclass(frozen=True, kw_only=True)
class TwoPhases(Method):
    """Fits a regressor between the embeddings first, then trains the student alone through it.

    Phase 1 has a recipe of its own; the adapters hold a buffer that is measured before training.
    """

    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "none"
    reads: ClassVar[tuple[str, ...]] = ("embedding",)

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        regressor = nn.Linear(student.embedding.shape[1], teacher.embedding.shape[1])
        spread = nn.BatchNorm1d(teacher.embedding.shape[1], affine=False)  # only for its buffer of the teacher's mean
        return nn.ModuleDict({"regressor": regressor, "spread": spread})

    def calibrate(self, adapters: nn.ModuleDict, teacher_views: Iterable[View]) -> None:
        adapters["spread"].running_mean.copy_(torch.cat([view.embedding for view in teacher_views]).mean(dim=0))

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        target = teacher.embedding - adapters["spread"].running_mean
        return F.mse_loss(adapters["regressor"](student.embedding), target)

    def regress(self, *views: Any) -> dict[str, Tensor]:
        return {"regress": self.loss(*views)}

    def phases(self) -> tuple[Phase, ...]:
        own = {"epochs": 2, "batch": 5, "learning_rate": 0.3, "schedule": "step", "milestones": (1,)}
        return (
            Phase("regress", self.regress, trains=("adapters.regressor",), recipe=own),
            Phase("distil", self.objective, trains=("student",)),
        )


def make_recipe(**changes: Any) -> Recipe:
    values = {"epochs": 3, "batch": 8, "learning_rate": 0.2, "milestones": (2,), "crop_padding": PADDING}
    return Recipe(**{"precision": "fp64"} | values | changes)


def make_scheme(
    method: Method, *, seed: int = 0, dropout: float = 0.0, dtype=torch.float64, device=CPU, student=None, teacher=None
) -> Scheme:
    """`method` on tiny networks, under the scheme it needs."""
    student = student or tiny_net(seed, dropout=dropout, dtype=dtype, device=device)
    bank = make_bank(*pictures(), dtype=dtype, device=device)
    sample = Batch(next(bank.plain(2)), bank.labels[:2])
    if not method.needs_teacher:
        return Alone(student, method, sample)
    return Offline(student, teacher or tiny_teacher(dtype=dtype, device=device), method, sample)


def make_training(scheme: Scheme, recipe: Recipe, *, seed: int = 0, device=CPU, **surroundings: Any) -> Training:
    """A run on the tiny images that watches a test and a held-out set."""
    dtype = FULL[recipe.precision]
    watch = {
        "test": make_bank(*pictures(30, seed=1), dtype=dtype, device=device),
        "held_out": make_bank(*pictures(40, seed=2), dtype=dtype, device=device),
    }
    bank = make_bank(*pictures(), padding=recipe.crop_padding, dtype=dtype, device=device)
    return Training(scheme, recipe, bank, seed=seed, watch=watch, surroundings=Surroundings(**surroundings))


@dataclass(frozen=True)
class Session:
    """What a session of a run left behind. `momentum` is that of its last step; `steps` is how many it made."""

    stopped: bool
    history: list[dict]
    state: dict[str, Tensor]
    momentum: dict[str, Any]
    steps: int

    @property
    def outcome(self) -> dict[str, Any]:
        return {"history": self.history, "state": self.state, "momentum": self.momentum}


def run_session(
    scheme: Scheme, recipe: Recipe, checkpoint: Path | None = None, *, stop_after=None, **options
) -> Session:
    """Run with the given new networks until done, or until asked to stop after so many steps."""
    momentum, count = {}, itertools.count(1)
    steps = 0

    def on_step(done: float, text: str) -> None:
        nonlocal steps
        steps = next(count)
        for name, optimiser in training.current.optimisers.items():
            momentum[name] = clone(optimiser.state_dict()["state"])

    def should_stop() -> bool:
        return steps == stop_after

    training = make_training(scheme, recipe, checkpoint=checkpoint, on_step=on_step, should_stop=should_stop, **options)
    stopped = False
    try:
        training.run()
    except Stopped:
        stopped = True
    return Session(stopped, training.history, clone(scheme.state_dict()), momentum, steps)


def ends_alike_if_stopped(make: Callable[[], Scheme], stops: Iterable[int], folder: Path) -> None:
    """Assert that a run of new networks, stopped after a step and resumed by others, ends as one that is not stopped.

    That is: with the same history, weights, buffers and momentum, to the bit. `stops` below 0 count from the end.
    """
    recipe = make_recipe(learning_rate=0.02)  # the toy recipe's is too high for terms of large weight
    whole = run_session(make(), recipe)
    for stop in stops:
        stop %= whole.steps
        checkpoint = folder / f"{stop}.pt"
        first = run_session(make(), recipe, checkpoint, stop_after=stop)
        assert first.stopped and first.steps == stop
        torch.rand(stop)  # another process's generator would stand elsewhere, too
        second = run_session(make(), recipe, checkpoint)
        assert second.steps == whole.steps - stop
        outcome = second.outcome | {"momentum": first.momentum | second.momentum}
        assert difference(outcome, whole.outcome) is None, f"stopped after step {stop}"


def images_seen(scheme: Scheme, seed: int = 3) -> list[Tensor]:
    """What a short run shows the student in train mode, step by step."""
    seen = []

    def note(network, arguments):
        if network.training:
            seen.append(arguments[0].clone())

    scheme.student.register_forward_pre_hook(note)
    make_training(scheme, make_recipe(), seed=seed).run()
    return seen


def clone(value: Any) -> Any:
    """A copy of nested dicts, lists and tensors that later training does not change."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: clone(item) for key, item in value.items()}
    return [clone(item) for item in value] if isinstance(value, (list, tuple)) else value


def difference(one: Any, other: Any, where: str = "") -> str | None:
    """Where two nested values differ by a bit, None if nowhere."""
    if type(one) is not type(other):
        return f"{where}: {type(one)} and {type(other)}"
    if isinstance(one, dict):
        if list(one) != list(other):
            return f"{where}: keys {list(one)} and {list(other)}"
        parts = (difference(one[key], other[key], f"{where}.{key}") for key in one)
        return next((part for part in parts if part), None)
    if isinstance(one, list):
        if len(one) != len(other):
            return f"{where}: {len(one)} and {len(other)} entries"
        parts = (difference(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(one, other, strict=True)))
        return next((part for part in parts if part), None)
    same = one.dtype == other.dtype and torch.equal(one, other) if isinstance(one, Tensor) else one == other
    return None if same else f"{where}: {one} and {other}"


def keras_epochs(accuracies, rate, factor, patience, stop_patience):
    """Learning rate of each epoch that is trained, as Keras's two callbacks decide it, each with its own memory."""
    rates = []
    best_to_reduce = best_to_stop = -math.inf
    wait_to_reduce = wait_to_stop = 0
    for accuracy in accuracies:
        rates.append(rate)
        if accuracy > best_to_reduce:
            best_to_reduce, wait_to_reduce = accuracy, 0
        else:
            wait_to_reduce += 1
            if wait_to_reduce >= patience:
                rate *= factor
                wait_to_reduce = 0
        if accuracy > best_to_stop:
            best_to_stop, wait_to_stop = accuracy, 0
        else:
            wait_to_stop += 1
            if wait_to_stop >= stop_patience:
                break
    return rates
