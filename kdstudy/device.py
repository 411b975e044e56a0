"""What a run finds where it is made: the device, and a data set in its memory, cut into the parts that runs ask for."""

import os
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kdstudy.data import BlankBank, ImageBank
from kdstudy.image_set import ImageSet, channel_statistics, holdout_split, stratified_subset
from kdstudy.memory import keep_freed_memory
from kdstudy.models import build_model
from kdstudy.recipe import Recipe
from kdstudy.train import FULL

DATA_FOLDER = Path("data")


def data_path(dataset: str) -> Path:
    """Where the data stage puts a data set."""
    return DATA_FOLDER / f"{dataset}.npz"


def choose_device(wanted: str) -> torch.device:
    """The first of `choose_devices`."""
    return choose_devices(wanted)[0]


def choose_devices(wanted: str) -> list[torch.device]:
    """The devices named: "auto" for every GPU, or the CPU if there is none; "cuda" for every GPU; "cpu", "cuda:1" or a
    list of such, with commas. KDSTUDY_DEVICE in the environment comes first.

    Raises ValueError for a device that does not exist here.
    """
    wanted = os.environ.get("KDSTUDY_DEVICE", wanted)
    count = torch.cuda.device_count()
    if wanted == "auto":
        wanted = "cuda" if count else "cpu"
    if wanted == "cuda" and count:
        return [torch.device("cuda", number) for number in range(count)]
    return [_device(word, count) for word in wanted.split(",")]


def _device(word: str, count: int) -> torch.device:
    try:
        device = torch.device(word)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, or several of these with commas, not {word!r}")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device {word!r} was asked for, but torch finds {count} CUDA devices; try auto or cpu")
    return device


def make_ready(deterministic: bool = False) -> None:
    """Settings of this process for fast training, or, at the price of speed, for training that repeats to the bit.

    On a CPU training repeats either way.
    """
    keep_freed_memory()
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used


class DataOnDevice:
    """One data set in device memory, cut into the parts that runs ask for; each part is made once."""

    def __init__(self, images: ImageSet, device: torch.device):
        self.images, self.device = images, device
        self.mean, self.std = channel_statistics(images.x_train)
        self.training, self.watched = cache(self.training), cache(self.watched)

    def training(self, held_out: int, recipe: Recipe, share: float = 1.0) -> ImageBank:
        """The training images without the held-out ones; of these a stratified share, smaller ones within larger ones.

        Raises ValueError if the share has fewer images than there are classes.
        """
        index = self._split(held_out)[0]
        if share != 1:
            index = np.arange(len(self.images.y_train))[index]
            count = round(share * len(index))
            if count < self.images.classes:
                classes = self.images.classes
                raise ValueError(
                    f"{share:g} of {len(index)} training images are {count}, fewer than the {classes} classes"
                )
            index = index[stratified_subset(self.images.y_train[index], count)]
        return self._bank(self.images.x_train[index], self.images.y_train[index], recipe, recipe.crop_padding)

    def blank(self, held_out: int, recipe: Recipe, share: float = 1.0) -> BlankBank:
        """As many blank images as `training` has, for runs that must do without those."""
        images = self.images
        shape = (images.channels, *images.image_size)
        count = round(share * (len(images.y_train) - held_out))
        place = {"padding": recipe.crop_padding, "device": self.device, "dtype": FULL[recipe.precision]}
        return BlankBank(count, shape, mean=self.mean, std=self.std, **place)

    def watched(self, held_out: int, recipe: Recipe) -> dict[str, ImageBank]:
        """The sets whose accuracy is noted every epoch: the test images, and the held-out ones if there are any."""
        banks = {"test": self._bank(self.images.x_test, self.images.y_test, recipe, 0)}
        index = self._split(held_out)[1]
        if len(index):
            banks["held_out"] = self._bank(self.images.x_train[index], self.images.y_train[index], recipe, 0)
        return banks

    def build(self, network: str, recipe: Recipe) -> nn.Module:
        """A network for these images, freshly initialised, on the device."""
        module = self._unplaced(network)
        return module.to(device=self.device, dtype=FULL[recipe.precision], memory_format=torch.channels_last)

    def check(self, network: str) -> None:
        """Raise ValueError unless there is such a network and it takes these images."""
        with torch.device("meta"):  # shapes only: no memory, no random numbers
            self._unplaced(network)

    def _unplaced(self, network: str) -> nn.Module:
        images = self.images
        return build_model(network, classes=images.classes, channels=images.channels, image_size=images.image_size)

    def _split(self, held_out: int):
        everything = slice(None)
        return holdout_split(self.images.y_train, held_out) if held_out else (everything, [])

    def _bank(self, images, labels, recipe: Recipe, padding: int) -> ImageBank:
        dtype = FULL[recipe.precision]
        return ImageBank(images, labels, mean=self.mean, std=self.std, padding=padding, device=self.device, dtype=dtype)
