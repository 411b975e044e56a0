"""The strong augmentation: RandAugment's operations and cutout, on whole batches of uint8 images on their device.

Cubuk, Zoph, Shlens, Le, "RandAugment: Practical Automated Data Augmentation with a Reduced Search Space", NeurIPS 2020,
arXiv:1909.13719, with the operations and ranges of Sohn et al., "FixMatch", NeurIPS 2020, arXiv:2001.07685; DeVries,
Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017, arXiv:1708.04552.

Every operation is computed for every image, and each image takes the result of its own: some 350 kernels per batch
whatever its size, none of which waits for the device. torchvision's functions have one strength for a whole batch, so
that they would run image by image; only `equalize`, which has none, is taken from there.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 256  # of a strength or a place: they are drawn as bytes


class StrongDraw(NamedTuple):
    """How each of B images is augmented strongly."""

    shift: Tensor  # (B, 2) uint8 and
    flip: Tensor  # (B,) bool: the crop and mirroring that come first, as in `data.Draws`
    operations: Tensor  # (B, 2) uint8, places in `OPERATIONS`, taken in order
    strengths: Tensor  # (B, 2) uint8, for each operation where in its range it is, from 0 to `LEVELS` - 1
    cut: Tensor  # (B, 3) uint8, likewise: side, row and column of the cutout


def rand_augment(images: Tensor, operations: Tensor, strengths: Tensor) -> Tensor:
    """uint8 images (B, 1 or 3, H, W) after their `operations` (B, n) with `strengths` (B, n), see `StrongDraw`.

    Areas that come into the image from outside are black. Raises ValueError for another number of channels.
    """
    if images.shape[1] not in (1, 3):
        raise ValueError(f"strong augmentation is for images of 1 or 3 channels, not {images.shape[1]}")
    for operation, level in zip(operations.unbind(1), strengths.unbind(1), strict=True):
        images = _operate(images, operation, _fraction(level))
    return images


def cut_out(images: Tensor, cut: Tensor) -> Tensor:
    """Normalised images (B, channels, H, W) with a square of zeros, the mean colour, see `StrongDraw.cut`.

    Its side is up to half the image's shorter one. Its centre is anywhere in the image, so that a part may be cut off.
    """
    height, width = images.shape[2:]
    side, row, column = (_fraction(part)[:, None] for part in cut.unbind(1))
    reach = side * min(height, width) / 4
    rows = (torch.arange(height, device=images.device) + 0.5 - row * height).abs() < reach
    columns = (torch.arange(width, device=images.device) + 0.5 - column * width).abs() < reach
    return images * ~(rows[:, :, None] & columns[:, None, :])[:, None]


def _fraction(level: Tensor) -> Tensor:
    """The middle of a level's share of 0..1: ranges that are symmetric about 0 stay so."""
    return (level.float() + 0.5) / LEVELS


def _operate(images: Tensor, operation: Tensor, fraction: Tensor) -> Tensor:
    moved = _moved(images, operation, fraction)
    operation, fraction = operation[:, None, None, None], fraction[:, None, None, None]
    for name, change in TONES.items():
        moved = torch.where(operation == OPERATIONS.index(name), change(images, fraction), moved)
    return moved


def _autocontrast(images: Tensor, fraction: Tensor) -> Tensor:
    low, high = (extreme(dim=(2, 3), keepdim=True).float() for extreme in (images.amin, images.amax))
    stretched = (images - low) * (255 / (high - low).clamp(min=1))
    return torch.where(high > low, stretched.round().to(torch.uint8), images)


def _equalize(images: Tensor, fraction: Tensor) -> Tensor:
    from torchvision.transforms.v2.functional import equalize  # here, as it takes seconds to import

    return equalize(images)


def _posterize(images: Tensor, fraction: Tensor) -> Tensor:
    drop = 8 - (4 + 4 * fraction).to(torch.uint8)  # 4 to 7 bits stay
    return images >> drop << drop


def _solarize(images: Tensor, fraction: Tensor) -> Tensor:
    return torch.where(images >= 256 * fraction, 255 - images, images)


def _brightness(images: Tensor, fraction: Tensor) -> Tensor:
    return _blended(images, torch.zeros_like(images), fraction)


def _colour(images: Tensor, fraction: Tensor) -> Tensor:
    return _blended(images, _grey(images), fraction)


def _contrast(images: Tensor, fraction: Tensor) -> Tensor:
    return _blended(images, _grey(images).mean(dim=(1, 2, 3), keepdim=True), fraction)


def _sharpness(images: Tensor, fraction: Tensor) -> Tensor:
    smooth = images.float()  # the outermost pixels have too few neighbours and stay
    inner = smooth[:, :, 1:-1, 1:-1]
    inner.copy_((9 * F.avg_pool2d(smooth, 3, stride=1) + 4 * inner) / 13)
    return _blended(images, smooth, fraction)


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = images.split(1, dim=1)
    return (0.299 * red + 0.587 * green + 0.114 * blue).round()


def _blended(images: Tensor, poorest: Tensor, fraction: Tensor) -> Tensor:
    kept = 0.05 + 0.9 * fraction
    return (kept * images + (1 - kept) * poorest).round().to(torch.uint8)


TONES = {
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "posterize": _posterize,
    "solarize": _solarize,
    "brightness": _brightness,
    "colour": _colour,
    "contrast": _contrast,
    "sharpness": _sharpness,
}
MOVES = {  # the largest rotation in radians, shear, and shift as a share of the side, to either side
    "rotate": math.radians(30),
    "shear_x": 0.3,
    "shear_y": 0.3,
    "translate_x": 0.3,
    "translate_y": 0.3,
}
OPERATIONS = ("identity", *TONES, *MOVES)


def _moved(images: Tensor, operation: Tensor, fraction: Tensor) -> Tensor:
    """The images after the one of `MOVES` that is theirs, or as they are; nearest pixels."""
    height, width = images.shape[2:]
    signed = 2 * fraction - 1
    turn, shear_x, shear_y, right, down = (
        torch.where(operation == OPERATIONS.index(name), signed * most, 0) for name, most in MOVES.items()
    )
    # where a pixel comes from, in half sides from the centre; shears leave the upper left corner where it is
    ratio = height / width
    across = (turn.cos(), (shear_x - turn.sin()) * ratio, shear_x * ratio + 2 * right)
    along = ((shear_y + turn.sin()) / ratio, turn.cos(), shear_y / ratio + 2 * down)
    matrix = torch.stack([torch.stack(across, dim=1), torch.stack(along, dim=1)], dim=1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, mode="nearest", align_corners=False).to(torch.uint8)
