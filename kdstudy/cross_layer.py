"""Methods whose maps do not pair by stage: semantic calibration weighs all pairs, knowledge review fuses levels."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.adapters import require_taps, same_size
from kdstudy.core import Clock, Method, View, require_at_least_zero, require_positive, require_share, softened_kl

LEAST_WIDTH = 8  # below, queries and keys have fewer than two numbers and hence no direction


class Relations(nn.Module):
    """What a map (B, c, h, w) says of which images are alike: a unit vector per image, (B, width // 4)."""

    def __init__(self, width: int) -> None:
        """`width` is the largest batch."""
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(nn.Linear(width, width // 4 * 2), nn.ReLU(), nn.Linear(width // 4 * 2, width // 4))

    def forward(self, stage_map: Tensor) -> Tensor:
        """Two layers on the rows of the (B, B) matrix of inner products, filled up with zeros to `width` columns."""
        missing = self.width - len(stage_map)
        if missing < 0:
            raise ValueError(f"a batch must have at most the {self.width} images it was sized by, not {len(stage_map)}")
        flat = stage_map.flatten(1)
        return F.normalize(self.layers(F.pad(flat @ flat.T, (0, missing))), dim=1)


def calibration(queries: Tensor, keys: Tensor) -> Tensor:
    """`softmax_t(q_s . k_t)`: how much teacher map t is worth to student map s, from (B, S, d) and (B, T, d)."""
    return (queries @ keys.transpose(1, 2)).softmax(dim=2)


@dataclass(frozen=True, kw_only=True)
class SemCKD(Method):
    """Cross-layer distillation with semantic calibration: each student map learns from all teacher maps, weighed.

    Chen, Mei, Zhang, Wang, Wang, Feng, Chen, "Cross-Layer Distillation with Semantic Calibration", AAAI 2021.

    For student maps s = 1..S, teacher maps t = 1..T and image b: `loss = 1/(B S) sum_bst w_bst mean_chw (F_t - P_st(
    F_s))^2`, with the maps at the smaller of the two sizes. Projection `P_st`: convolutions 1x1 to twice the teacher's
    channels, 3x3 and 1x1, with batch norm and ReLU in between. Weights `w_bs = softmax_t(q_bs . k_bt)`: query and key
    are unit vectors of B // 4 numbers, from an MLP per map on row b of `F F^T` (B, B), with the maps flattened. The
    gradient passes through the weights into the MLPs and into the student. In all `ce_weight * CE + kd_weight * loss +
    kl_weight * T^2 KL(softmax(z_t / T) || softmax(z_s / T))`; defaults as released: 1, 400, 1, T 4.

    The MLPs read images by their place in the batch: the loss depends on the order.

    Differs from the printed text:

    * Eq. 9 sums over the batch; here, as released, the mean over batch and student maps.
    * Eq. 10 has a KD term that includes the cross-entropy; here the two are apart.
    * MLPs are as wide as the batch, so the authors skip an odd last one. Here its missing images are columns of zeros.
    """

    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Chen, Mei, Zhang, Wang, Wang, Feng, Chen 2021, AAAI"
    reads: ClassVar[tuple[str, ...]] = ("logits", "maps")
    least_batch: ClassVar[int] = 2  # an image alone is like no other

    kd_weight: float = 400.0
    kl_weight: float = 1.0
    temperature: float = 4.0

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_at_least_zero("kl_weight", self.kl_weight)
        require_positive("temperature", self.temperature)

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """MLPs for all maps, as wide as the sample, and projections for all pairs. ValueError below 8 images."""
        require_taps(("maps",), student, teacher)
        width = len(student.logits)
        if width < LEAST_WIDTH:
            raise ValueError(f"queries and keys need a batch of at least {LEAST_WIDTH} images, not {width}")
        pairs = [(s.shape[1], t.shape[1]) for s in student.maps for t in teacher.maps]
        return nn.ModuleDict(
            {
                "query_mlps": nn.ModuleList(Relations(width) for _ in student.maps),
                "key_mlps": nn.ModuleList(Relations(width) for _ in teacher.maps),
                "projections": nn.ModuleList(_projection(*pair) for pair in pairs),
            }
        )

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`1/(B S) sum_bst w_bst mean_chw (F_t - P_st(F_s))^2`, a scalar."""
        queries = torch.stack([mlp(s) for mlp, s in zip(adapters["query_mlps"], student.maps, strict=True)], dim=1)
        keys = torch.stack([mlp(t) for mlp, t in zip(adapters["key_mlps"], teacher.maps, strict=True)], dim=1)
        pairs = [same_size(s, t) for s in student.maps for t in teacher.maps]
        projected = zip(adapters["projections"], pairs, strict=True)
        errors = torch.stack([(project(s) - t).square().mean(dim=(1, 2, 3)) for project, (s, t) in projected], dim=1)
        weights = calibration(queries, keys)
        return (weights * errors.view_as(weights)).sum(dim=2).mean()

    def objective(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> dict[str, Tensor]:
        """The usual terms, and the divergence of the logits."""
        terms = super().objective(student, teacher, labels, adapters)
        if self.kl_weight:
            terms["kl"] = self.kl_weight * softened_kl(student.logits, teacher.logits, self.temperature)
        return terms


def _projection(inputs: int, outputs: int) -> nn.Sequential:
    width = 2 * outputs
    return nn.Sequential(
        *(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        nn.Conv2d(width, outputs, 1, bias=False),
    )


def hierarchical_context_loss(one: Tensor, other: Tensor) -> Tensor:
    """Squared error of two maps (B, c, h, w) and of their average pools to 4 x 4, 2 x 2 and 1 x 1, a scalar.

    Each is a mean over its elements. The pools weigh 1/2, 1/4, 1/8 in order, those that are no smaller than the map are
    passed over, and the sum is divided by the weights used.
    """
    sides = [side for side in (4, 2, 1) if side < min(one.shape[2:])]
    errors = [F.mse_loss(one, other)]
    errors += [F.mse_loss(F.adaptive_avg_pool2d(one, side), F.adaptive_avg_pool2d(other, side)) for side in sides]
    weights = [0.5**number for number in range(len(errors))]
    return sum(weight * error for weight, error in zip(weights, errors, strict=True)) / sum(weights)


class Fusion(nn.Module):
    """Attention-based fusion of a student map with what the deeper levels made of theirs."""

    def __init__(self, inputs: int, width: int, outputs: int, deepest: bool) -> None:
        """From `inputs` channels by way of `width` to the teacher's `outputs`; the deepest level fuses nothing."""
        super().__init__()
        self.squeeze = _normed(inputs, width, size=1)
        self.attention = None if deepest else nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid())
        self.spread = _normed(width, outputs, size=3)

    def forward(self, own: Tensor, deeper: Tensor | None, sides: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """A map to compare with the teacher's, of its `sides`, and the fused map for the next level."""
        fused = self.squeeze(own)
        if self.attention is not None:
            deeper = _resized(deeper, fused.shape[2:])
            weights = self.attention(torch.cat([fused, deeper], dim=1))
            fused = fused * weights[:, :1] + deeper * weights[:, 1:]
        fused = _resized(fused, sides)
        return self.spread(fused), fused


@dataclass(frozen=True, kw_only=True)
class ReviewKD(Method):
    """Knowledge review: a student's shallow maps, together with what its deep ones know, match the teacher's.

    Chen, Liu, Zhao, Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021.

    Levels are the stages and the embedding, a 1x1 map: on the student's side its maps, on the teacher's those before
    the activation. From the deepest level up (`Fusion`): `x` = 1x1 convolution to m channels and batch norm; `r` = the
    fused map of the level below, enlarged; `(a, b) = sigmoid(1x1 convolution of [x, r])`; fused `a x + b r`, enlarged
    to the teacher's size; 3x3 convolution to the teacher's channels and batch norm. m is the width of the student's
    embedding, at most 512; enlarging is to the nearest. `loss` sums `hierarchical_context_loss` over the levels.
    `ce_weight * CE + kd_weight * min(e / (warm_up E), 1) * loss` in epoch e = 1, 2, ... of E. Defaults: 1 and 5, for
    wide networks; 0.6 to 1 suits the narrow ResNets, 8 ShuffleNet.

    Differs from the printed text:

    * The authors count epochs from 0, so that the first has no distillation, and warm up over 20 of 240; here a share
      of the run, 0.1, and the first epoch has its part.
    * The authors' teacher stays in train mode, so that its statistics drift; here they never change.
    """

    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Chen, Liu, Zhao, Jia 2021, CVPR"
    reads: ClassVar[tuple[str, ...]] = ("logits", "maps", "pre_maps", "embedding")
    least_batch: ClassVar[int] = 2  # the embedding of one image has no variance to normalise by

    kd_weight: float = 5.0
    warm_up: float = 0.1

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_share("warm_up", self.warm_up)

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """A fusion per level, shallow to deep, and the clock."""
        pairs = list(zip(*self._levels(student, teacher), strict=True))
        width = min(512, student.embedding.shape[1])
        fusions = [Fusion(s.shape[1], width, t.shape[1], deepest=False) for s, t in pairs[:-1]]
        fusions.append(Fusion(pairs[-1][0].shape[1], width, pairs[-1][1].shape[1], deepest=True))
        return nn.ModuleDict({"fusions": nn.ModuleList(fusions), "clock": Clock()})

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """The warmed-up sum of the levels' losses, a scalar."""
        losses, fused = [], None
        levels = zip(adapters["fusions"], *self._levels(student, teacher), strict=True)
        for fusion, own, target in reversed(list(levels)):
            output, fused = fusion(own, fused, target.shape[2:])
            losses.append(hierarchical_context_loss(output, target))
        weight = adapters["clock"].warm_up(self.warm_up) if "clock" in adapters else 1.0
        return weight * torch.stack(losses).sum()

    def _levels(self, student: View, teacher: View) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        require_taps(("maps", "pre_maps", "embedding"), student, teacher)
        if len(student.maps) != len(teacher.pre_maps):
            counts = f"{len(student.maps)} and {len(teacher.pre_maps)}"
            raise ValueError(f"student and teacher must have equally many stages, not {counts}")
        return (*student.maps, _as_map(student.embedding)), (*teacher.pre_maps, _as_map(teacher.embedding))


def _as_map(embedding: Tensor) -> Tensor:
    return embedding[:, :, None, None]


def _resized(stage_map: Tensor, sides: tuple[int, ...]) -> Tensor:
    return stage_map if stage_map.shape[2:] == sides else F.interpolate(stage_map, sides, mode="nearest")


def _normed(inputs: int, outputs: int, size: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))
