"""The baseline of the benchmark: distillation trained the way the field usually writes it, image by image in PIL.

The form is that of RepDistiller (Tian et al. 2020) and its descendants: a DataLoader whose workers start anew every
epoch, the teacher's forward in every step, float32 in PyTorch's default layout, and numbers fetched from the device
in every step. Nothing in it is slower than that form asks for. cuDNN's choice of algorithms by measurement, which
the field turns on, is a setting of the process and so the caller's.
"""

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from kdstudy.core import Method, require_at_least_zero, require_positive, require_whole
from kdstudy.data import Draws, ImageBank
from kdstudy.image_set import ImageSet, channel_statistics
from kdstudy.response import VanillaKD

PADDING = 4  # pixels on each side before the random crop
VALIDATION_BATCH = 64


class PilImages(Dataset):
    """Images (N, H, W, C) uint8 and their labels, each made a PIL image and transformed when it is asked for."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: Callable[[Image.Image], Tensor]):
        self._images = images[..., 0] if images.shape[-1] == 1 else images
        self._labels = labels.tolist()
        self._transform = transform

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(Image.fromarray(self._images[index])), self._labels[index]


def training_loader(images: ImageSet, batch: int, workers: int, padding: int = PADDING) -> DataLoader:
    """Shuffled training images with random crop and flip, normalised, in batches (B, C, H, W); the odd last one stays.

    `workers` processes start anew with every epoch; 0 makes the images in this process.
    """
    augmentation = [transforms.RandomCrop(images.image_size, padding=padding), transforms.RandomHorizontalFlip()]
    transform = transforms.Compose([*augmentation, *_normalisation(images)])
    data = PilImages(images.x_train, images.y_train, transform)
    return DataLoader(data, batch_size=batch, shuffle=True, num_workers=workers)


def validation_loader(images: ImageSet, workers: int) -> DataLoader:
    """The plain test images, normalised, in order, in batches of 64, made by half as many workers."""
    data = PilImages(images.x_test, images.y_test, transforms.Compose(_normalisation(images)))
    return DataLoader(data, batch_size=VALIDATION_BATCH, num_workers=workers // 2)


def _normalisation(images: ImageSet) -> list[Callable]:
    mean, std = ((statistic / 255).tolist() for statistic in channel_statistics(images.x_train))
    return [transforms.ToTensor(), transforms.Normalize(mean, std)]  # ToTensor maps 0..255 to 0..1


class Meters:
    """Running means over images: `loss` in nats, accuracies `top1` and `top5` in percent; of `images` so far."""

    def __init__(self) -> None:
        self.images = 0
        self.loss = self.top1 = self.top5 = 0.0

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Take in a batch's mean loss, a scalar, and its logits (B, K) and labels (B,); waits for the device."""
        hits = logits.topk(min(5, logits.shape[1])).indices == labels.unsqueeze(1)
        self.images += len(labels)
        share = len(labels) / self.images
        self.loss += share * (loss.item() - self.loss)
        self.top1 += share * (100 * hits[:, 0].float().mean().item() - self.top1)
        self.top5 += share * (100 * hits.any(dim=1).float().mean().item() - self.top5)


class Epoch(NamedTuple):
    """What an epoch took, its workers' start and validation included, and what its meters showed at its end."""

    seconds: float
    training: Meters
    validation: Meters | None


class NaiveLoop:
    """A student trained by a frozen teacher in the usual way, a step, or an epoch, at a time.

    The networks, float32 in PyTorch's default layout, are moved to `device`. Raises ValueError for other networks and
    for numbers out of range.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        images: ImageSet,
        *,
        batch: int,
        workers: int,
        device: torch.device,
        method: Method | None = None,
        learning_rate: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        padding: int = PADDING,
    ):
        """`method` reads logits and has no adapters; by default it is vanilla distillation."""
        require_whole("batch", batch)
        for name, value in (("workers", workers), ("padding", padding)):
            require_whole(name, value, least=0)
        require_positive("learning_rate", learning_rate)
        for name, value in (("momentum", momentum), ("weight_decay", weight_decay)):
            require_at_least_zero(name, value)
        for network in (student, teacher):
            _require_plain(network)
        self.device = device
        self.student, self.teacher = student.to(device), teacher.to(device)
        self.method = method or VanillaKD()
        self.training = training_loader(images, batch, workers, padding)
        self.validation = validation_loader(images, workers)
        self._adapters = nn.ModuleDict()
        self._optimiser = torch.optim.SGD(
            student.parameters(), lr=learning_rate, momentum=momentum, weight_decay=weight_decay
        )

    def epoch(self, validate: bool = True) -> Epoch:
        """Train on every image once, then look at the test images unless that is left out."""
        start = time.perf_counter()
        for meters in self.steps():
            training = meters
        validation = self.validate() if validate else None
        return Epoch(time.perf_counter() - start, training, validation)

    def steps(self) -> Iterator[Meters]:
        """An epoch's steps: the meters, which go on being the same object, after each. The first waits for workers.

        With workers, images for later steps are being made between steps as well: time stretches, not single steps.
        """
        meters = Meters()
        self.student.train()
        self.teacher.eval()
        for images, labels in self.training:
            self.step(images, labels, meters)
            yield meters

    def step(self, images: Tensor, labels: Tensor, meters: Meters) -> None:
        """One step from normalised images (B, C, H, W) and labels (B,) on the host."""
        images, labels = images.to(self.device), labels.to(self.device)
        view = self.student(images)
        with torch.no_grad():
            taught = self.teacher(images)
        loss = sum(self.method.objective(view, taught, labels, self._adapters).values())
        self._optimiser.zero_grad()
        loss.backward()
        self._optimiser.step()
        meters.update(loss, view.logits, labels)

    @torch.no_grad()
    def validate(self) -> Meters:
        """Cross-entropy and accuracies of the student on the test images."""
        meters = Meters()
        self.student.eval()
        for images, labels in self.validation:
            images, labels = images.to(self.device), labels.to(self.device)
            logits = self.student(images).logits
            meters.update(nn.functional.cross_entropy(logits, labels), logits, labels)
        return meters


def _require_plain(network: nn.Module) -> None:
    for name, parameter in network.named_parameters():
        if parameter.dtype != torch.float32 or not parameter.is_contiguous():
            raise ValueError(
                f"the usual loop trains float32 networks in PyTorch's default layout, but {name} is {parameter.dtype} "
                f"with strides {parameter.stride()}: give it a network as build_model makes it"
            )


class AugmentationSpeed(NamedTuple):
    """Augmented images per second, medians over rounds, and the median over rounds of the second over the first."""

    pil: float
    bank: float
    ratio: float


def augmentation_speed(
    images: ImageSet, *, batch: int = 128, limit: int = 2048, rounds: int = 5, threads: int = 1, padding: int = PADDING
) -> AugmentationSpeed:
    """One core's PIL pipeline beside `ImageBank.augmented` in `threads` threads, on the host, without a network.

    Every round makes one epoch of the first `limit` training images each way, one after the other, the random numbers
    and the assembly of batches included. Raises ValueError for numbers out of range.
    """
    for name, value in (("batch", batch), ("limit", limit), ("rounds", rounds), ("threads", threads)):
        require_whole(name, value)
    some = ImageSet(images.name, images.x_train[:limit], images.y_train[:limit], images.x_test, images.y_test)
    loader = training_loader(some, batch, workers=0, padding=padding)
    mean, std = channel_statistics(some.x_train)
    place = {"padding": padding, "device": torch.device("cpu")}
    bank = ImageBank(some.x_train, some.y_train, mean=mean, std=std, dtype=torch.float32, **place)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        taken = [(_seconds(_pil_epoch, loader), _seconds(_bank_epoch, bank, batch, seed)) for seed in range(rounds)]
    finally:
        torch.set_num_threads(before)
    pil, own = (len(bank) / median(column) for column in zip(*taken, strict=True))
    return AugmentationSpeed(pil, own, median(slow / fast for slow, fast in taken))


def _pil_epoch(loader: DataLoader) -> None:
    for _ in loader:
        pass


def _bank_epoch(bank: ImageBank, batch: int, seed: int) -> None:
    place = {"padding": bank.padding, "device": bank.labels.device}
    draws = Draws.make(seed=seed, stream=0, epochs=1, images=len(bank), flip=True, **place)
    for start in range(0, len(bank), batch):
        index, shift, flip = draws.batch(draws.rows(0, start, start + batch))
        bank.augmented(index, shift, flip)
        bank.labels[index]


def _seconds(function: Callable, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start
