"""Images on the device as uint8, a run's random numbers, and crop, flip and normalisation as one batched gather."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from kdstudy.augment import LEVELS, OPERATIONS, StrongDraw, cut_out, rand_augment


class ImageBank:
    """Images that stay on the device as uint8, padded once, and come out as normalised batches.

    `images` (N, H, W, C) uint8, `labels` (N,) int64, as numpy arrays; `mean` and `std` (C,) on the 0..255 scale.
    """

    def __init__(self, images, labels, *, mean, std, padding: int, device: torch.device, dtype: torch.dtype):
        self.padding = padding
        self.labels = torch.as_tensor(labels, device=device)
        self._size = images.shape[1:3]
        padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        self._windows = _windows(torch.from_numpy(padded).to(device), self._size, padding)
        self.mean, self.std = (torch.as_tensor(x, device=device, dtype=dtype) for x in (mean, std))
        self._scale = 1 / self.std

    def __len__(self) -> int:
        return len(self.labels)

    def plain(self, batch: int) -> Iterator[Tensor]:
        """All images in order, not augmented, as normalised batches (B, C, H, W)."""
        for start in range(0, len(self), batch):
            index = torch.arange(start, min(start + batch, len(self)), device=self.labels.device)
            centre = torch.full_like(index, self.padding)
            yield self._normalise(self._windows[index, centre, centre])

    def augmented(self, index: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
        """Crops of the images `index` (B,), moved by `shift` (B, 2) in 0..2 padding, mirrored where `flip` (B,).

        Returns normalised (B, C, H, W) in channels-last memory order. One gather: the bank is seen as a tensor of all
        its crops without a copy being made of any.
        """
        return self._normalise(self._crops(index, shift, flip))

    def strong(self, index: Tensor, draw: StrongDraw) -> Tensor:
        """The images `index` (B,) with a crop and mirroring of their own, RandAugment and cutout, in this order.

        Returns normalised (B, C, H, W) in channels-last memory order. Images must have 1 or 3 channels.
        """
        crops = self._crops(index, draw.shift.long(), draw.flip).permute(0, 3, 1, 2)
        changed = rand_augment(crops, draw.operations, draw.strengths)
        return cut_out(self._normalise(changed.permute(0, 2, 3, 1).contiguous()), draw.cut)

    def _crops(self, index: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
        crops = self._windows[index, shift[:, 0], shift[:, 1]]
        return torch.where(flip[:, None, None, None], crops.flip(2), crops)

    def _normalise(self, crops: Tensor) -> Tensor:
        return ((crops.to(self.mean.dtype) - self.mean) * self._scale).permute(0, 3, 1, 2)


class BlankBank:
    """Stands where training images must not be seen: as many of them, each blank, with labels that say nothing."""

    def __init__(self, count: int, shape: tuple[int, int, int], *, mean, std, padding: int, device, dtype: torch.dtype):
        """`shape` is (channels, H, W); `mean` and `std` (C,) are those by which the teacher's images are normalised."""
        self.padding = padding
        self.mean, self.std = (torch.as_tensor(x, device=device, dtype=dtype) for x in (mean, std))
        self.labels = torch.zeros(count, dtype=torch.int64, device=device)
        self._blank = torch.zeros(1, *shape, device=device, dtype=dtype)

    def __len__(self) -> int:
        return len(self.labels)

    def plain(self, batch: int) -> Iterator[Tensor]:
        """Zeros, as `ImageBank.plain` would give them."""
        for start in range(0, len(self), batch):
            yield self._blank.expand(min(batch, len(self) - start), -1, -1, -1)

    def augmented(self, index: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
        """Zeros (B, C, H, W) for B images."""
        return self._blank.expand(len(index), -1, -1, -1)

    def strong(self, index: Tensor, draw: StrongDraw) -> Tensor:
        """Zeros (B, C, H, W) for B images."""
        return self._blank.expand(len(index), -1, -1, -1)


def _windows(padded: Tensor, size: tuple[int, int], padding: int) -> Tensor:
    """All crops of (N, H + 2p, W + 2p, C) as a strided view (N, 2p + 1, 2p + 1, H, W, C)."""
    n, row, column, channel = padded.stride()
    shifts = 2 * padding + 1
    shape = (len(padded), shifts, shifts, *size, padded.shape[3])
    return padded.as_strided(shape, (n, row, column, row, column, channel))


@dataclass(frozen=True)
class Draws:
    """All random numbers that the data of a training phase needs, for every epoch, drawn before it starts.

    `order` (E, N) int32 visits every image once an epoch; `shift` (E, N, 2) uint8 and `flip` (E, N) bool belong to the
    image visited at that position, as does what `strong` holds, (E, N, ...), for runs that need it. They depend on
    seed, stream, N and augmentation only, and epoch e does not depend on how many epochs follow, so runs of one seed
    are paired whatever their method and device.
    """

    order: Tensor
    shift: Tensor
    flip: Tensor
    strong: StrongDraw | None = None

    @classmethod
    def make(
        cls,
        *,
        seed: int,
        stream: int,
        epochs: int,
        images: int,
        padding: int,
        flip: bool,
        device: torch.device,
        strong: bool = False,
    ) -> "Draws":
        """Draw on the CPU, then move to the device. Streams of one seed are unrelated; `strong` changes no other."""
        return _draw(seed, stream, epochs, images, padding, flip, device, strong)

    def rows(self, epoch: int, start: int, stop: int) -> slice:
        """Positions start..stop of an epoch, counted over all epochs."""
        before = epoch * self.order.shape[1]
        return slice(before + start, before + stop)

    def batch(self, rows: slice | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(index, shift, flip) of these rows, ready for `ImageBank.augmented`.

        `rows` counts positions over all epochs; as a tensor (B,) on the device it can change inside a captured step.
        """
        order, shift, flip = (part.flatten(0, 1)[rows] for part in (self.order, self.shift, self.flip))
        return order.long(), shift.long(), flip

    def strong_batch(self, rows: slice | Tensor) -> StrongDraw | None:
        """What `ImageBank.strong` needs for the same rows; None if it was not drawn."""
        return self.strong and StrongDraw(*(part.flatten(0, 1)[rows] for part in self.strong))


@lru_cache(maxsize=4)  # runs of one seed take the same draws, one after the other and side by side
def _draw(
    seed: int, stream: int, epochs: int, images: int, padding: int, flip: bool, device: torch.device, strong: bool
) -> Draws:
    parts = [_epoch_draws(seed, stream, epoch, images, padding, flip, strong) for epoch in range(epochs)]
    drawn = [torch.from_numpy(np.stack(part)).to(device) for part in zip(*parts, strict=True)]
    return Draws(*drawn[:3], StrongDraw(*drawn[3:]) if strong else None)


def _epoch_draws(
    seed: int, stream: int, epoch: int, images: int, padding: int, flip: bool, strong: bool
) -> tuple[np.ndarray, ...]:
    # numpy promises the raw stream of a bit generator, but not what a Generator makes of it
    generator = np.random.Philox(np.random.SeedSequence([seed, stream, epoch]))
    order = np.argsort(generator.random_raw(images), kind="stable").astype(np.int32)
    drawn = (order, *_crop(generator.random_raw(images), padding, flip))
    if not strong:
        return drawn
    where, how, cut = (generator.random_raw(images) for _ in range(3))
    operations = _below(len(OPERATIONS), how, how >> 16)
    strengths = _below(LEVELS, how >> 32, how >> 48)
    return (*drawn, *_crop(where, padding, flip), operations, strengths, _below(LEVELS, cut, cut >> 16, cut >> 32))


def _crop(bits: np.ndarray, padding: int, flip: bool) -> tuple[np.ndarray, np.ndarray]:
    """Shift and flip of images, from 64 random bits each: those from 0, from 16, and the last."""
    return _below(2 * padding + 1, bits, bits >> 16), (bits >> 63).astype(bool) & flip


def _below(limit: int, *bits: np.ndarray) -> np.ndarray:
    """Whole numbers under `limit`, one column for each array, from its last 16 bits."""
    return np.stack([(part & 0xFFFF) * limit >> 16 for part in bits], axis=1).astype(np.uint8)
