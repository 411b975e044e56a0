"""A decision tree as a network: it asks one pixel after another and answers by the leaf that it ends in."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from kdstudy.core import View


class DecisionTree(nn.Module):
    """A complete binary tree of a depth, whose splits and leaves are written by whoever fits it.

    In heap order: the children of split k are 2k + 1, where its pixel is at most its threshold, and 2k + 2, where it is
    above. A leaf that lies higher than the last level is continued by splits of threshold infinity.

    Thresholds and the leaves' logits count as parameters, a number for each split and C for each leaf of the complete
    tree, although the former get no gradient. Which pixel a split asks is one whole number more, and is not counted.
    """

    pixel: Tensor  # (S,) int64, which of the flattened (channels, H, W) a split asks

    def __init__(self, depth: int, classes: int, shape: tuple[int, int, int]) -> None:
        """`shape` is that of an image: channels, height, width. Until it is fitted, the tree has the same for all."""
        super().__init__()
        self.depth, self.shape = depth, shape
        splits = 2**depth - 1
        self.register_buffer("pixel", torch.empty(splits, dtype=torch.int64))
        self.threshold = nn.Parameter(torch.empty(splits))  # on the scale of the normalised images
        self.leaf = nn.Parameter(torch.empty(splits + 1, classes))  # logits
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forget what was fitted."""
        self.pixel.zero_()
        self.threshold.fill_(torch.inf)
        self.leaf.zero_()

    def forward(self, images: Tensor) -> View:
        """The logits (B, C) of the leaves that the images end in; other taps do not exist."""
        ends = self.path(images)[:, -1] - len(self.threshold)
        return View(self.leaf[ends])

    def path(self, images: Tensor) -> Tensor:
        """The places (B, depth + 1) that images come by, from the root, which is 0, to a leaf."""
        pixels = images.flatten(1)
        places = [torch.zeros(len(images), dtype=torch.int64, device=images.device)]
        for _ in range(self.depth):
            asked = pixels.gather(1, self.pixel[places[-1]].unsqueeze(1)).squeeze(1)
            places.append(2 * places[-1] + 1 + (asked > self.threshold[places[-1]]))
        return torch.stack(places, dim=1)


class Node(NamedTuple):
    """A place in a tree, and the images that come by it."""

    place: int  # in heap order
    share: float  # of all images
    picture: Tensor  # (channels, H, W), the mean of the images
    distribution: Tensor  # (classes,), the mean of their targets
    asks: tuple[int, int, int] | None  # channel, row and column of the pixel that decides; None where the tree ends
    threshold: float  # above which images go to the second child; infinite where the tree ends


@torch.no_grad()
def first_nodes(tree: DecisionTree, images: Tensor, targets: Tensor, levels: int) -> list[Node]:
    """The tree as far as its first `levels` of splits, in heap order, without places that no image comes by.

    `targets` (N, classes) says how each of `images` (N, channels, H, W) is spread over the classes.
    """
    path = tree.path(images)
    nodes, places = [], [0]
    for place in places:
        here = (path == place).any(dim=1)
        if not here.any():
            continue
        splits = place < len(tree.threshold) and bool(tree.threshold[place].isfinite())
        if splits and place < 2**levels - 1:
            places += [2 * place + 1, 2 * place + 2]
        share, picture = here.double().mean().item(), images[here].mean(dim=0)
        asks = _place_of(int(tree.pixel[place]), tree.shape) if splits else None
        threshold = tree.threshold[place].item() if splits else torch.inf
        nodes.append(Node(place, share, picture, targets[here].mean(dim=0), asks, threshold))
    return nodes


def _place_of(pixel: int, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Channel, row and column of a pixel of the flattened image."""
    _, height, width = shape
    return pixel // (height * width), pixel // width % height, pixel % width
