"""Data impressions: the targets that images are made for, drawn from what a classifier thinks alike, and their bytes.

Nayak, Mopuri, Shaj, Babu, Chakraborty, "Zero-Shot Knowledge Distillation in Deep Networks", ICML 2019,
arXiv:1905.08114.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BETAS = (1.0, 0.1)  # scales of the concentration, of half of the targets each
LEAST = 1e-4  # under every concentration


def class_similarity(weight: Tensor) -> Tensor:
    """How alike the classes are to a classifier of this weight (C, D): rows (C, C) of 0 to 1, the class itself at 1.

    The cosine of the classes' weights, each row then brought to 0..1 by its smallest and largest value.
    """
    directions = F.normalize(weight, dim=1)
    return stretched(directions @ directions.T)


def stretched(rows: Tensor) -> Tensor:
    """Rows (N, D) brought to 0..1, each by its smallest and largest value; a constant row becomes 0."""
    low, high = rows.amin(dim=1, keepdim=True), rows.amax(dim=1, keepdim=True)
    span = high - low
    return (rows - low) / torch.where(span > 0, span, 1)


def concentrations(weight: Tensor, count: int) -> Tensor:
    """The concentrations (count, C) of the Dirichlet distributions of so many targets: `beta c_k + 1e-4`.

    c_k is class k's row of `class_similarity`. Classes take turns, and after each round of them the betas 1 and 0.1:
    the smaller one spreads the targets towards the corners. In the release the rows are brought to 0..1 once more after
    the multiplication, which undoes it.
    """
    similarity = class_similarity(weight)
    classes = len(similarity)
    number = torch.arange(count, device=weight.device)
    betas = torch.tensor(BETAS, dtype=weight.dtype, device=weight.device)[number // classes % len(BETAS)]
    return betas.unsqueeze(1) * similarity[number % classes] + LEAST


def draw_targets(weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """So many softened answers (count, C), each drawn from the Dirichlet distribution of its `concentrations`.

    Drawn on the CPU in float64, where no draw of a small concentration vanishes; returned like `weight`.
    """
    drawn = torch._standard_gamma(concentrations(weight.detach().cpu().double(), count), generator=generator)
    return (drawn / drawn.sum(dim=1, keepdim=True)).to(weight)


def rescale(images: Tensor) -> Tensor:
    """Images (B, C, H, W) brought to 0..1, each by its smallest and largest value over all channels."""
    return stretched(images.flatten(start_dim=1)).view_as(images)


def as_bytes(images: Tensor) -> Tensor:
    """Rescaled images (B, C, H, W) as (B, H, W, C) uint8."""
    return (255 * rescale(images)).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
