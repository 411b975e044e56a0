"""Other modalities of the very same crop, and networks that see one of them in the place of the images.

Cross-modal distillation (Aytar, Vondrick, Torralba, "SoundNet: Learning Sound Representations from Unlabeled Video",
NIPS 2016) pairs a teacher of one modality with a student of another. Here the pairs are made: a modality is the first
layer of the student and has neither parameters nor buffers. It is computed from the images as they are given, so
normalised, cropped and mirrored: the student sees the place that its teacher sees.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.core import View

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601
EPSILON = 1e-8  # under the root of a squared gradient, so that a flat patch has a finite derivative


class Grey(nn.Module):
    """The luma of the normalised channels, `0.299 R + 0.587 G + 0.114 B`; images of one channel stay as they are."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3 or 1, H, W) to (B, 1, H, W)."""
        return luma(images)


class Edges(nn.Module):
    """How steep the grey image is: the length of its gradient by Sobel's filters, without its direction.

    Divided by 4, so that a step of 1 between two halves of an image gives 1 on both sides of it. The outermost pixels
    are replicated.
    """

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3 or 1, H, W) to (B, 1, H, W), positive."""
        padded = F.pad(luma(images), (1, 1, 1, 1), mode="replicate")
        across = _blur(padded[..., 2:] - padded[..., :-2], dim=2)
        down = _blur(padded[:, :, 2:] - padded[:, :, :-2], dim=3)
        return (across.square() + down.square() + EPSILON).sqrt()


class LowResolution(nn.Module):
    """The grey image at half of its sides, rounded up: means of 2 x 2 pixels, in overlapping windows on odd sides.

    It is not enlarged again: a network behind it gets a quarter of the pixels, 16 x 16 of 32 x 32 and 4 x 4 of the
    digits' 8 x 8, and all its maps are smaller accordingly.
    """

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3 or 1, H, W) to (B, 1, ceil(H / 2), ceil(W / 2))."""
        return F.adaptive_avg_pool2d(luma(images), [(side + 1) // 2 for side in images.shape[2:]])


MODALITIES: dict[str, type[nn.Module]] = {"grey": Grey, "edges": Edges, "low": LowResolution}


class ModalityNet(nn.Module):
    """A network behind a modality. Whatever else is asked of it, such as `stages` or `resume`, the network answers."""

    def __init__(self, modality: nn.Module, backbone: nn.Module) -> None:
        """`backbone` takes images of the channels and sides that `modality` makes."""
        super().__init__()
        self.modality = modality
        self.backbone = backbone

    def forward(self, images: Tensor) -> View:
        """The network's view of what the modality makes of the images."""
        return self.backbone(self.modality(images))

    def __getattr__(self, name: str) -> Any:
        """A parameter, buffer or submodule, or what the backbone has under this name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("backbone"), name)


def luma(images: Tensor) -> Tensor:
    """(B, 3 or 1, H, W) to (B, 1, H, W). Raises ValueError for any other number of channels."""
    channels = images.shape[1]
    if channels not in (1, 3):
        raise ValueError(f"other modalities are made of images of 1 or 3 channels, not {channels}")
    if channels == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def _blur(values: Tensor, dim: int) -> Tensor:
    """Means of three neighbours along a side, weighted 1, 2, 1; of the outermost values there are none."""
    before, middle, after = (values.narrow(dim, start, values.shape[dim] - 2) for start in range(3))
    return (before + 2 * middle + after) / 4
