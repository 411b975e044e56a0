"""Methods on the relations between the samples of a batch: distances, angles, graphs, similarities, correlations.

Each network's samples are compared with one another first, and then the tables that this gives, (B, B) for most: widths
and sizes of the networks need not agree. Embeddings are (B, D), maps (B, c, h, w). A batch must hold 2 samples or more,
and how many it holds changes the values. Gradients are finite for equal samples and zero vectors, too.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.adapters import require_samples, same_size, unit_length
from kdstudy.core import Method, View, require_at_least_zero, require_choice, require_positive, require_whole

FLOOR = 1e-12  # the least squared distance, so that equal samples have a finite gradient


@dataclass(frozen=True, kw_only=True)
class Relational(Method):
    """Relational distillation: distances and angles between the samples' embeddings are matched.

    Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019, arXiv:1904.05068.

    `ce_weight * CE(z_s, y) + kd_weight * (distance_weight * L_D + angle_weight * L_A)`, with the Huber loss h of
    threshold 1 and embeddings e:

    * `L_D = mean_ij h(d_ij(s) - d_ij(t))` over all B^2 pairs, `d_ij = ||e_i - e_j||_2 / mu`; mu is the mean distance in
      the same network, over the pairs with i != j only.
    * `L_A = mean_ijk h(a_ijk(s) - a_ijk(t))` over all B^3 triples, `a_ijk` the cosine of the angle at e_j between e_i
      and e_k; 0 where one of these coincides with e_j.

    A weight of 0 leaves its term out. Defaults: 25 and 50, usual for classification; the authors' metric learning has 1
    and 2.

    Differs from the printed text:

    * Sums over distinct samples are printed. Here, as released, means over all pairs and triples, those in which a
      sample meets itself included; only mu leaves them out.
    * Squared distances are at least 1e-12, so that equal samples have a finite gradient.
    """

    kind: ClassVar[str] = "relation"
    paper: ClassVar[str] = "Park, Kim, Lu, Cho 2019, CVPR, arXiv:1904.05068"
    reads: ClassVar[tuple[str, ...]] = ("embedding",)
    least_batch: ClassVar[int] = 2

    distance_weight: float = 25.0
    angle_weight: float = 50.0

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_at_least_zero("distance_weight", self.distance_weight)
        require_at_least_zero("angle_weight", self.angle_weight)
        if not (self.distance_weight or self.angle_weight):
            raise ValueError("distance_weight and angle_weight are both 0: there would be nothing to match")

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """None. Raises ValueError for a network without an embedding and for a batch of one."""
        require_samples(self, student, teacher)
        return nn.ModuleDict()

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`distance_weight * L_D + angle_weight * L_A`, a scalar."""
        relations = ((self.distance_weight, relative_distances), (self.angle_weight, angles))
        return sum(
            weight * F.smooth_l1_loss(relation(student.embedding), relation(teacher.embedding))
            for weight, relation in relations
            if weight
        )


def relative_distances(embedding: Tensor) -> Tensor:
    """Distances of all pairs, (B, B), as multiples of their mean over the pairs of two different samples."""
    squares = (embedding.unsqueeze(0) - embedding.unsqueeze(1)).square().sum(dim=2)
    distances = _off_diagonal(squares.clamp(min=FLOOR).sqrt())
    batch = len(distances)
    return distances * (batch * (batch - 1) / distances.sum())


def angles(embedding: Tensor) -> Tensor:
    """Cosine of the angle at sample j between samples i and k, (B, B, B) indexed j, i, k."""
    directions = unit_length(embedding.unsqueeze(0) - embedding.unsqueeze(1))
    return directions @ directions.mT


def _off_diagonal(table: Tensor) -> Tensor:
    return table * (1 - torch.eye(len(table), dtype=table.dtype, device=table.device))


@dataclass(frozen=True, kw_only=True)
class InstanceGraph(Method):
    """Instance relationship graph: samples are vertices, distances edges; both are matched, and what a stage changes.

    Liu, Cao, Li, Yuan, Hu, Li, Duan, "Knowledge Distillation via Instance Relationship Graph", CVPR 2019.

    `ce_weight * CE(z_s, y) + kd_weight * (vertex_weight * L_V + edge_weight * L_E + transformation_weight * L_T)`:

    * `L_V = mean (z_s - z_t)^2` over the B C logits.
    * `L_E`: the mean over three taps (embedding, the last two maps) of `mean_ij (E_ij(s) - E_ij(t))^2`, with squared
      distances of the flattened features divided by the largest, `E_ij = ||f_i - f_j||^2 / max`.
    * `L_T = mean_b (T_b(s) - T_b(t))^2`, `T_b = ||pool(g_b) - f_b||^2 / max_b` between the last two maps g and f; pool
      averages down to f's sides, and f's channels are averaged in groups of neighbours to as many as g has.

    A weight of 0 leaves its term out. Defaults: 0.1, 5 and 5. With a batch of 2, L_E is 0.

    Differs from the printed text:

    * The authors' weights were not checked; the defaults, taps and scaling by the largest are those of a public
      implementation. Networks with more than three stages are tapped at their last two, too.
    """

    kind: ClassVar[str] = "relation"
    paper: ClassVar[str] = "Liu, Cao, Li, Yuan, Hu, Li, Duan 2019, CVPR"
    reads: ClassVar[tuple[str, ...]] = ("maps", "embedding")
    least_batch: ClassVar[int] = 2

    vertex_weight: float = 0.1
    edge_weight: float = 5.0
    transformation_weight: float = 5.0

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        weights = ("vertex_weight", "edge_weight", "transformation_weight")
        for name in weights:
            require_at_least_zero(name, getattr(self, name))
        if not any(getattr(self, name) for name in weights):
            raise ValueError(f"{', '.join(weights)} are all 0: there would be nothing to match")

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """None. Raises ValueError for a network without what is compared, and for a batch of one."""
        require_samples(self, student, teacher)
        for view in (student, teacher):
            widths = [stage_map.shape[1] for stage_map in view.maps]
            if len(widths) < 2 or widths[-1] % widths[-2]:
                raise ValueError(f"the last map must have a multiple of the channels of the one before, not {widths}")
        return nn.ModuleDict()

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`vertex_weight * L_V + edge_weight * L_E + transformation_weight * L_T`, a scalar."""
        parts = (
            (self.vertex_weight, lambda view: (view.logits,)),
            (self.edge_weight, lambda view: [edges(tap) for tap in (view.embedding, *view.maps[-2:])]),
            (self.transformation_weight, lambda view: (transformation(*view.maps[-2:]),)),
        )
        return sum(weight * _mean_square(part(student), part(teacher)) for weight, part in parts if weight)


def _mean_square(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    return torch.stack([F.mse_loss(*pair) for pair in zip(student, teacher, strict=True)]).mean()


def edges(features: Tensor) -> Tensor:
    """Squared distances of all pairs of samples (B, ...), as shares of the largest, (B, B)."""
    rows = features.flatten(1)
    rows = rows - rows.mean(dim=0)  # changes no distance, but keeps the differences below exact
    squares = rows.square().sum(dim=1)
    distances = _off_diagonal((squares[:, None] + squares - 2 * rows @ rows.mT).clamp(min=FLOOR))
    return distances / distances.amax()


def transformation(before: Tensor, after: Tensor) -> Tensor:
    """By how much a stage moves each sample, squared, as a share of the batch's largest, (B,)."""
    before, after = same_size(before, after)
    after = after.unflatten(1, (before.shape[1], -1)).mean(dim=2)
    moves = (before - after).flatten(1).square().sum(dim=1).clamp(min=FLOOR)
    return moves / moves.amax()


@dataclass(frozen=True, kw_only=True)
class SimilarityPreserving(Method):
    """Similarity-preserving distillation: samples alike to the teacher shall be alike to the student.

    Tung, Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, arXiv:1907.09682.

    `ce_weight * CE(z_s, y) + kd_weight * 1/B^2 ||G_s - G_t||_F^2`, G the inner products `F F^T` of the flattened last
    maps F (B, chw), each row at length 1. Default: 3000, usual since Tian et al. 2020.

    Differs from the printed text:

    * A sum over several pairs of layers is printed; here the last maps alone, as is usual. Those of wide ResNets are
      bare residual sums.
    * A row shorter than 1e-6, of an image without any response, counts as zero and gets no gradient.
    """

    kind: ClassVar[str] = "relation"
    paper: ClassVar[str] = "Tung, Mori 2019, ICCV, arXiv:1907.09682"
    reads: ClassVar[tuple[str, ...]] = ("maps",)
    least_batch: ClassVar[int] = 2

    kd_weight: float = 3000.0

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """None. Raises ValueError for a network without maps and for a batch of one."""
        require_samples(self, student, teacher)
        return nn.ModuleDict()

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`mean_ij (G_ij(s) - G_ij(t))^2`, a scalar."""
        return F.mse_loss(similarities(student.maps[-1]), similarities(teacher.maps[-1]))


def similarities(features: Tensor) -> Tensor:
    """Inner products of all pairs of samples (B, ...), (B, B), each row at length 1."""
    rows = features.flatten(1)
    return unit_length(rows @ rows.mT)


EPSILON = 1e-7  # added to probabilities in a logarithm


@dataclass(frozen=True, kw_only=True)
class Probabilistic(Method):
    """Probabilistic knowledge transfer: for each sample, the distribution of its neighbours is matched.

    Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018, arXiv:1803.10837.

    `ce_weight * CE(z_s, y) + kd_weight * mean_ij p_ij log((p_ij + 1e-7) / (q_ij + 1e-7))`, in nats, p of the teacher, q
    of the student: `(cos(e_i, e_j) + 1) / 2` divided by its sum over j, j = i included. The mean is that over rows of
    their divergence, divided by B once more. Default: 30000, for batches of 64; it has to grow with the batch.

    Differs from the printed text:

    * Printed: a sum over all pairs without j = i. Here as in the authors' code.
    * That code adds 1e-7 to lengths and overwrites what is not a number by 0, in place. Here an embedding shorter than
      1e-6 counts as zero, with cosine 0, and nothing is overwritten.
    """

    kind: ClassVar[str] = "relation"
    paper: ClassVar[str] = "Passalis, Tefas 2018, ECCV, arXiv:1803.10837"
    reads: ClassVar[tuple[str, ...]] = ("embedding",)
    least_batch: ClassVar[int] = 2

    kd_weight: float = 30000.0

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """None. Raises ValueError for a network without an embedding and for a batch of one."""
        require_samples(self, student, teacher)
        return nn.ModuleDict()

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`mean_ij p_ij log(p_ij / q_ij)`, a scalar."""
        p, q = neighbours(teacher.embedding), neighbours(student.embedding)
        return (p * ((p + EPSILON).log() - (q + EPSILON).log())).mean()


def neighbours(embedding: Tensor) -> Tensor:
    """Probabilities (B, B) that sample i picks j, proportional to `(cos + 1) / 2`; rows sum to 1."""
    closeness = ((cosines(embedding) + 1) / 2).clamp(min=0)  # rounding may take a cosine below -1
    return closeness / closeness.sum(dim=1, keepdim=True)


def cosines(embedding: Tensor) -> Tensor:
    """Cosines of all pairs of samples, (B, B); 0 for a zero vector."""
    directions = unit_length(embedding)
    return directions @ directions.mT


EMBEDDED = 128  # the width in which the consecutive form compares


@dataclass(frozen=True, kw_only=True)
class Correlation(Method):
    """Correlation congruence: the samples' correlations, by a Gaussian kernel, are matched.

    Peng, Jin, Liu, Li, Wu, Liu, Zhou, Zhang, "Correlation Congruence for Knowledge Distillation", ICCV 2019,
    arXiv:1904.01802.

    `ce_weight * CE(z_s, y) + kd_weight * L`, with L by `variant`:

    * "rbf": `mean_ij (C_ij(s) - C_ij(t))^2`, C the Gaussian kernel `exp(-gamma ||x_i - x_j||^2)` of embeddings x at
      length 1, as its Taylor series `e^(-2 gamma) sum_(p = 0..order) (2 gamma)^p / p! <x_i, x_j>^p`.
    * "consecutive": `mean_b sum_k |s_bk - t_bk| |s_(b+1)k - t_(b+1)k|` over neighbours in the batch; s and t, of 128
      entries, are linear images of the two embeddings, both learned. Its usual weight is 0.02.

    Defaults: "rbf" with gamma 0.4, order 2 and weight 100, that of a public implementation.

    Differs from the printed text:

    * The paper adds plain distillation, and draws batches with several images of a class. Neither is done here, so that
      a row of a table shows the correlations alone.
    * "consecutive" is what a much-used code base has under this name: no kernel and no correlation. It depends on the
      order of the batch and, since both images are trained, is least where both are 0.
    """

    kind: ClassVar[str] = "relation"
    paper: ClassVar[str] = "Peng, Jin, Liu, Li, Wu, Liu, Zhou, Zhang 2019, ICCV, arXiv:1904.01802"
    reads: ClassVar[tuple[str, ...]] = ("embedding",)
    least_batch: ClassVar[int] = 2

    kd_weight: float = 100.0
    variant: str = "rbf"
    gamma: float = 0.4
    order: int = 2

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_choice("variant", self.variant, ("rbf", "consecutive"))
        require_positive("gamma", self.gamma)
        require_whole("order", self.order)

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """The two linear images of "consecutive". ValueError for a network without an embedding and a batch of one."""
        require_samples(self, student, teacher)
        if self.variant == "rbf":
            return nn.ModuleDict()
        views = {"student": student, "teacher": teacher}
        return nn.ModuleDict({who: nn.Linear(view.embedding.shape[1], EMBEDDED) for who, view in views.items()})

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """The variant's L, a scalar."""
        if self.variant == "rbf":
            return F.mse_loss(self.correlations(student.embedding), self.correlations(teacher.embedding))
        gaps = (adapters["student"](student.embedding) - adapters["teacher"](teacher.embedding)).abs()
        return (gaps[:-1] * gaps[1:]).sum(dim=1).mean()

    def correlations(self, embedding: Tensor) -> Tensor:
        """The kernel of all pairs of samples, (B, B)."""
        exponents = 2 * self.gamma * cosines(embedding)
        series = torch.ones_like(exponents)
        for power in range(self.order, 0, -1):
            series = 1 + exponents / power * series
        return math.exp(-2 * self.gamma) * series
