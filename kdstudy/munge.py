"""MUNGE: synthetic rows from real ones, by exchanging attributes with the nearest neighbour; and images as rows.

Bucila, Caruana, Niculescu-Mizil, "Model Compression", KDD 2006.
"""

import numpy as np
import torch
from torch import Tensor

from kdstudy.core import require_positive, require_share, require_whole

AT_ONCE = 500  # rows whose distances to all others are held in memory


def munge(rows: Tensor, passes: int, probability: float, local_variance: float, generator: torch.Generator) -> Tensor:
    """`passes * N` synthetic rows, float64 on the CPU, from N rows (N, d) of continuous attributes.

    Every pass begins with a copy of the rows and visits each row e with its nearest neighbour e' in turn: with this
    probability an attribute a of the two is drawn anew, `e_a ~ N(e'_a, sd)` and `e'_a ~ N(e_a, sd)` with `sd = |e_a -
    e'_a| / local_variance` of their values before. Later visits of the pass find the values that earlier ones left.
    ValueError for fewer than 2 rows and for parameters out of range.

    Differs from the printed text:

    * The paper's loop looks for the neighbour in the copy, as it then is; here it is looked for once, in the real rows.
      That makes the work of all passes that of one search.
    * Nominal attributes, which the paper swaps, are not provided for; attributes are not scaled to 0..1.
    """
    require_whole("passes", passes)
    require_share("probability", probability)
    require_positive("local_variance", local_variance)
    if len(rows) < 2:
        raise ValueError(f"there must be at least 2 rows to munge, not {len(rows)}")
    neighbours = nearest(rows).tolist()
    real = rows.detach().cpu().double()
    munged = [_munged_once(real, neighbours, probability, local_variance, generator) for _ in range(passes)]
    return torch.cat(munged)


def _munged_once(
    real: Tensor, neighbours: list[int], probability: float, local_variance: float, generator: torch.Generator
) -> Tensor:
    exchanged = (torch.rand(real.shape, generator=generator) < probability).numpy()
    noise = torch.randn((2, *real.shape), generator=generator, dtype=torch.float64).numpy()
    copy = real.clone()
    rows = copy.numpy()
    for number, neighbour in enumerate(neighbours):
        pair = rows[[number, neighbour]]
        deviation = np.abs(pair[0] - pair[1]) / local_variance
        rows[[number, neighbour]] = np.where(exchanged[number], pair[::-1] + deviation * noise[:, number], pair)
    return copy


def nearest(rows: Tensor) -> Tensor:
    """For each of the rows (N, d), the index of the other row at the least Euclidean distance, the first of several."""
    exact, found = rows.double(), []
    for start in range(0, len(rows), AT_ONCE):
        # by differences: products of rows far from zero would round small distances away
        distances = torch.cdist(exact[start : start + AT_ONCE], exact, compute_mode="donot_use_mm_for_euclid_dist")
        own = torch.arange(len(distances), device=rows.device)
        distances[own, start + own] = torch.inf
        found.append(distances.argmin(dim=1))
    return torch.cat(found)


class Components:
    """The principal components of images (N, H, W, C) uint8: a few numbers for each image, and images from these."""

    def __init__(self, images: Tensor, count: int) -> None:
        """Keeps so many components, at most all. They are exact up to rounding, of variances that fall."""
        require_whole("components", count)
        flat = images.flatten(start_dim=1).double()
        self._shape = images.shape[1:]
        self._mean = flat.mean(dim=0)
        centred = flat - self._mean
        _, vectors = torch.linalg.eigh(centred.T @ centred)  # of variances that rise
        basis = vectors[:, -count:].flip(1)
        # the sign of an eigenvector is the library's choice: the largest entry becomes positive
        largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
        self._basis = basis * largest.sign()

    def encode(self, images: Tensor) -> Tensor:
        """The images as rows (N, count), float64."""
        return (images.flatten(start_dim=1).double() - self._mean) @ self._basis

    def decode(self, rows: Tensor) -> Tensor:
        """Images (N, H, W, C) uint8 of rows (N, count), on any device: rounded, and cut off at 0 and 255."""
        flat = self._mean + rows.to(self._mean) @ self._basis.T
        return flat.round().clamp(0, 255).to(torch.uint8).unflatten(1, self._shape)
