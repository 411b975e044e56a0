"""What a trained teacher answers to its images, and what the edits make of single answers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kdstudy.checkpoint import load_weights
from kdstudy.core import Method
from kdstudy.data import Draws, ImageBank
from kdstudy.device import DataOnDevice, data_path
from kdstudy.evaluate import logits_of, score
from kdstudy.few_samples import pruned_state
from kdstudy.heads import Exit
from kdstudy.image_set import holdout_split, read_image_set
from kdstudy.relative import EarthMover
from kdstudy.results import Ledger
from kdstudy.study import RunSpec


class Sample(NamedTuple):
    """One image's logits (C,) of the teacher, its label, and the image (H, W, C) uint8 if there is one."""

    title: str
    logits: Tensor
    label: int
    class_names: Sequence[str]
    image: np.ndarray | None = None


class Target(NamedTuple):
    """What a method makes of a sample's target: (C,) before and after the edit, and what is measured."""

    before: np.ndarray
    after: np.ndarray
    unit: str


def edited(sample: Sample, methods: Mapping[str, Method]) -> dict[str, Target]:
    """The target of a sample under each of the methods, which must have a `target`; one unit after the other."""
    targets = {row: _edited(sample, method) for row, method in methods.items()}
    return dict(sorted(targets.items(), key=lambda item: item[1].unit))


def _edited(sample: Sample, method: Method) -> Target:
    before, unit = sample.logits, "logit"
    if isinstance(method, EarthMover):
        before, unit = (before / method.temperature).softmax(dim=0), f"probability, T = {method.temperature:g}"
    after = method.target(sample.logits.unsqueeze(0), torch.tensor([sample.label]))[0]
    return Target(before.numpy(), after.numpy(), unit)


def example() -> tuple[Tensor, Tensor, Tensor]:
    """A batch small enough to follow by hand: teacher and student logits (2, 5), and labels (2,).

    The teacher is right on the first sample and wrong on the second.
    """
    teacher = torch.tensor([[6.2, 3.0, 0.5, -1.0, -2.0], [1.0, 3.4, 2.0, 0.5, -1.1]], dtype=torch.float64)
    student = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0], [0.5, 1.0, 1.5, -0.5, 0.0]], dtype=torch.float64)
    return teacher, student, torch.tensor([0, 0])


def example_samples() -> tuple[Sample, Sample]:
    """The two samples of `example`, the one that the teacher gets right first."""
    teacher, _, labels = example()
    names = [str(c) for c in range(teacher.shape[1])]
    right = Sample("Made up: the teacher is right", teacher[0], int(labels[0]), names)
    wrong = Sample("Made up: the teacher is wrong", teacher[1], int(labels[1]), names)
    return right, wrong


@dataclass(frozen=True)
class Answers:
    """A network's logits (N, C), float64 on the CPU, for labelled images."""

    logits: Tensor
    labels: Tensor
    images: np.ndarray
    class_names: Sequence[str]

    @property
    def wrong(self) -> Tensor:
        """Which predictions are wrong, bool (N,)."""
        return self.logits.argmax(dim=1) != self.labels

    def softened(self, temperature: float) -> np.ndarray:
        """The mean of softmax(z / T) over the images of each class, (C, C): row = true class. NaN without an image."""
        probabilities = (self.logits / temperature).softmax(dim=1)
        classes = range(self.logits.shape[1])
        return torch.stack([probabilities[self.labels == c].mean(dim=0) for c in classes]).numpy()

    def surest(self, wrong: bool, part: str) -> Sample | None:
        """The right or wrong prediction with the widest gap between the two highest logits, the first of equals."""
        chosen = self.wrong == wrong
        if not chosen.any():
            return None
        highest = self.logits.topk(2, dim=1).values
        index = int((highest[:, 0] - highest[:, 1]).masked_fill(~chosen, -1.0).argmax())
        logits, label = self.logits[index], int(self.labels[index])
        percent = 100 * float(logits.softmax(dim=0).max())
        predicted = self.class_names[int(logits.argmax())]
        found = "wrong" if wrong else "right"
        says = f"predicts {predicted} with {percent:.1f} %, label {self.class_names[label]}"
        return Sample(f"Teacher {found}: {says} ({part} image)", logits, label, self.class_names, self.images[index])


def surest(answers: Mapping[str, Answers], wrong: bool, parts: Iterable[str] = ("training", "test")) -> Sample:
    """The surest right or wrong prediction on the first of the `parts` that has one.

    If there is none (a teacher without a mistake), the sample made by hand, whose title says so.
    """
    for part in parts:
        if sample := answers[part].surest(wrong, part):
            return sample
    return example_samples()[wrong]


# the fastest algorithm may be another one each time, and the last bits of the logits with it
@torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
def teacher_answers(ledger: Ledger, spec: RunSpec, device: torch.device) -> dict[str, Answers]:
    """A trained teacher's answers to three sets of images.

    "training": those it was trained on, as they are; "augmented": their crops that a student of its seed sees in the
    first epoch; "test". Raises FileNotFoundError if its weights are not on this machine: a record says how good it was,
    but not what it answers.
    """
    return _parts(*trained(ledger, spec, device), spec)


@torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
def exit_answers(ledger: Ledger, spec: RunSpec, device: torch.device) -> list[dict[str, Answers]]:
    """`teacher_answers` of every head of a teacher with heads, shallow to deep, and last those of its classifier."""
    network, data = trained(ledger, spec, device)
    exits = (Exit(network, number) for number in range(len(network.heads)))
    return [_parts(each, data, spec) for each in (*exits, network)]


def trained(ledger: Ledger, spec: RunSpec, device: torch.device) -> tuple[nn.Module, DataOnDevice]:
    """The network of a finished run, in eval mode, and its data.

    Raises FileNotFoundError if its weights are not on this machine, BadFile if it keeps adapters.
    """
    data = DataOnDevice(read_image_set(data_path(spec.dataset)), device)
    return load_trained(ledger, spec, data), data


def load_trained(ledger: Ledger, spec: RunSpec, data: DataOnDevice) -> nn.Module:
    """The network of a finished run on its data, in eval mode; raises as `trained` does."""
    weights = _weights(ledger, spec)
    network = data.build(spec.network, spec.recipe)
    load_weights(network, weights)
    return network.eval()


def _parts(network: nn.Module, data: DataOnDevice, spec: RunSpec) -> dict[str, Answers]:
    images = data.images
    bank, test = data.training(spec.held_out, spec.recipe), data.watched(0, spec.recipe)["test"]
    kept = holdout_split(images.y_train, spec.held_out)[0] if spec.held_out else np.arange(len(images.y_train))
    order, moved = _first_epoch(network, bank, spec)
    parts = {
        "training": (logits_of(network, bank), bank.labels, images.x_train[kept]),
        "augmented": (moved, bank.labels[order], images.x_train[kept[order.cpu()]]),
        "test": (logits_of(network, test), test.labels, images.x_test),
    }
    return {
        part: Answers(logits.double().cpu(), labels.cpu(), pixels, images.class_names)
        for part, (logits, labels, pixels) in parts.items()
    }


def _weights(ledger: Ledger, spec: RunSpec) -> Path:
    weights = ledger.store.weights(spec.id)
    if not weights.exists():
        raise FileNotFoundError(
            f"what {spec} answers cannot be shown without its weights: bring {weights} from where it was "
            f"trained, or remove its record {ledger.store.published_path(spec)} to have it trained here"
        )
    return weights


def before_alignment(ledger: Ledger, spec: RunSpec, device: torch.device) -> float:
    """Test accuracy (percent) of the pruned teacher that a few-sample run starts from, before anything is aligned.

    Raises FileNotFoundError if the teacher's weights are not on this machine.
    """
    weights = _weights(ledger, spec.teacher)
    data = DataOnDevice(read_image_set(data_path(spec.dataset)), device)
    teacher, student = (data.build(network, spec.recipe) for network in (spec.teacher.network, spec.network))
    load_weights(teacher, weights)
    student.load_state_dict(pruned_state(student, teacher))
    test = data.watched(0, spec.recipe)["test"]
    return score(logits_of(student, test), test.labels).accuracy


@torch.no_grad()
def _first_epoch(network: nn.Module, bank: ImageBank, spec: RunSpec, batch: int = 500) -> tuple[Tensor, Tensor]:
    """The order of a student's first epoch (N,), and the logits (N, C) of its crops in that order."""
    recipe, device = spec.recipe, bank.labels.device
    augmentation = {"padding": recipe.crop_padding, "flip": recipe.flip}
    draws = Draws.make(seed=spec.seed, stream=0, epochs=1, images=len(bank), device=device, **augmentation)
    network.eval()
    batches = [draws.batch(draws.rows(0, start, start + batch)) for start in range(0, len(bank), batch)]
    return draws.order[0].long(), torch.cat([network(bank.augmented(*drawn)).logits for drawn in batches])
