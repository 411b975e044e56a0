"""Methods on the relations between a network's layers: what flows from one map to the next, and graphs across them.

Maps are (B, c, h, w). Both methods train in two phases, the first without labels.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from kdstudy.adapters import require_samples, require_taps, same_size, unit_length, widen
from kdstudy.core import Method, Phase, View, require_choice, require_positive, require_whole, softened_kl


@dataclass(frozen=True, kw_only=True)
class FSP(Method):
    """Flow of the solution procedure: the student starts from layers that turn maps into maps as the teacher's do.

    Yim, Joo, Bae, Kim, "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer
    Learning", CVPR 2017.

    Phase "flow" minimises `kd_weight * sum_l mean_b ||G_l(t) - G_l(s)||_F^2` over stem and stages, phase "labels"
    `ce_weight * CE(z_s, y)` over the whole student; nothing of the teacher is left in it. `G_l = (1 / hw) sum_xy
    f_l f_(l+1)^T`, (B, m, n), of the maps of stem and stages, each with the next, at the smaller size of the two.
    `reduction` "mean" averages over m n where "sum" adds up. Both networks need the same widths.

    The first phase lasts `share` of the run's epochs: 0.125, that is 30 epochs for the usual 240. `kd_weight` has to
    fit the networks, as the sum grows with m n: 0.0001 suits stages of up to 128 channels at a learning rate of 0.1,
    where five times as much can diverge; with "mean", 0.1 suits them.

    Differs from the printed text:

    * Three matrices are printed, of the first and last map of each stage: equal where a stage has one block. Here each
      stage's last map with that of the stage before, as is usual.
    * Of two maps of different sizes the larger is average-pooled; other code takes the maximum.
    """

    kind: ClassVar[str] = "relation"
    paper: ClassVar[str] = "Yim, Joo, Bae, Kim 2017, CVPR"
    reads: ClassVar[tuple[str, ...]] = ("stem", "maps")

    kd_weight: float = 0.0001
    share: float = 0.125
    reduction: str = "sum"

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range: either phase needs its weight."""
        super().__post_init__()
        for name in ("ce_weight", "kd_weight", "share"):
            require_positive(name, getattr(self, name))
        require_choice("reduction", self.reduction, ("sum", "mean"))

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """None. Raises ValueError unless stem and stages are as many and as wide in both networks."""
        require_taps(self.reads, student, teacher)
        widths = [[layer.shape[1] for layer in (view.stem, *view.maps)] for view in (student, teacher)]
        if widths[0] != widths[1]:
            raise ValueError(
                "student and teacher must have the same channels in stem and stages, not {} and {}: "
                "choose networks of one width that differ in depth".format(*widths)
            )
        return nn.ModuleDict()

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`sum_l mean_b ||G_l(t) - G_l(s)||_F^2`, a scalar."""
        pairs = zip(flows(student), flows(teacher), strict=True)
        gaps = [(ours - theirs).square().flatten(1) for ours, theirs in pairs]
        return sum((gap.sum(dim=1) if self.reduction == "sum" else gap).mean() for gap in gaps)

    def match_flows(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> dict[str, Tensor]:
        """What phase "flow" minimises."""
        return {"kd": self.kd_weight * self.loss(student, teacher, labels, adapters)}

    def objective(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> dict[str, Tensor]:
        """What phase "labels" minimises: cross-entropy alone."""
        return {"ce": self.ce_weight * self.label_loss(student, teacher, labels, adapters)}

    def phases(self) -> tuple[Phase, ...]:
        """The layers by the teacher's flows, without the classifier; then the whole student by the labels."""
        layers = ("student.stem", "student.stages")
        return (Phase("flow", self.match_flows, layers, share=self.share), Phase("labels", self.objective))


def flows(view: View) -> list[Tensor]:
    """The matrices G_l (B, m, n) of stem and stages, each with the next: products of channels, averaged over pixels."""
    layers = [same_size(*pair) for pair in pairwise((view.stem, *view.maps))]
    return [(one.flatten(2) @ two.flatten(2).mT) / one[0, 0].numel() for one, two in layers]


class GraphAttention(nn.Module):
    """Attention between the samples' vectors of two layers: a graph (heads, B, B), and what it makes of the front."""

    def __init__(self, front: int, back: int, heads: int) -> None:
        """`front` and `back`: widths of the vectors of the shallower and the deeper layer."""
        super().__init__()
        width = (front + back) // 2
        self.heads = heads
        self.query = _normed(back, heads * width)
        self.key = _normed(front, heads * width)
        self.value = nn.Sequential(_normed(front, width), nn.ReLU())
        self.merge = nn.Linear(heads * width, back)

    def scores(self, front: Tensor, back: Tensor) -> Tensor:
        """`<query_a(back_i), key_a(front_j)>`, (heads, B, B)."""
        query, key = (x.unflatten(1, (self.heads, -1)).transpose(0, 1) for x in (self.query(back), self.key(front)))
        return query @ key.mT

    def estimate(self, front: Tensor, back: Tensor) -> Tensor:
        """The back's vectors (B, back), of length 1, from the front's by the graph, with a random half of its heads."""
        graph = self.scores(front, back).softmax(dim=2)
        drawn = torch.randn_like(graph[:, :, :1])
        kept = graph * (drawn > drawn.mean(dim=0))
        return unit_length(self.merge((kept @ self.value(front)).transpose(0, 1).flatten(1)))


def _normed(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs))


@dataclass(frozen=True, kw_only=True)
class MultiHeadGraph(Method):
    """Multi-head graph distillation: which samples attend to which from layer to layer is matched.

    Lee, Song, "Graph-based Knowledge Distillation by Multi-head Attention Network", BMVC 2019, arXiv:1907.02226.

    Each map gives a vector per sample, V (B, c) of length 1. For each stage F and the next one B, an attention network
    of `heads` heads has scores `S_aij = <query_a(V^B_i), key_a(V^F_j)>`, query and key linear with batch norm.

    * Phase "attention" trains it on the teacher: `sum_pairs mean_b 1 - <V'_b, V^B_b>`, where V' estimates V^B from
      `softmax_j(S_a) value(V^F)` of all heads. In each sample, heads are dropped whose normal draw is below their mean.
    * Phase "distil": it is frozen, in eval mode, and reads both networks. `ce_weight * CE(z_s, y) + kd_weight *
      sum_pairs mean_ai KL(G^S_ai || G^T_ai)`, in nats, with `G = softmax_j(tanh(S))`; note the student in front.
      `reduction` "sum" adds up over heads and rows; `squash=False` leaves the tanh out.

    Where the student has another width, a 1x1 convolution with batch norm takes its averaged maps to the teacher's; it
    learns with the student. The first phase lasts `share` of the run's epochs, 0.4: 40 epochs for the authors' 100.
    Defaults: 8 heads, weight 1.

    Differs from the printed text:

    * V is the averaged map instead of its first singular vectors, whose gradient is fragile where two values are close.
    * D'Amicantonio 2021 prints the inner product as the first phase's loss; it has to grow, so 1 minus it is minimised.
    * The authors add up over heads and rows and clip the gradient by that of CE; here the mean, without clipping.
    """

    kind: ClassVar[str] = "relation"
    paper: ClassVar[str] = "Lee, Song 2019, BMVC, arXiv:1907.02226"
    reads: ClassVar[tuple[str, ...]] = ("maps",)
    least_batch: ClassVar[int] = 2

    heads: int = 8
    squash: bool = True
    share: float = 0.4
    reduction: str = "mean"

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_positive("share", self.share)
        require_choice("reduction", self.reduction, ("mean", "sum"))
        require_whole("heads", self.heads, least=2)  # some are dropped

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """The attention networks of the teacher's widths, and the student's way there.

        Raises ValueError unless both networks have equally many stages, at least two, and for a batch of one.
        """
        require_samples(self, student, teacher)
        ours, theirs = ([stage_map.shape[1] for stage_map in view.maps] for view in (student, teacher))
        if len(ours) != len(theirs) or len(ours) < 2:
            raise ValueError(f"both networks must have the same stages, 2 or more, not {len(ours)} and {len(theirs)}")
        return nn.ModuleDict(
            {
                "attention": nn.ModuleList(GraphAttention(*pair, self.heads) for pair in pairwise(theirs)),
                "widen": nn.ModuleList(widen(*pair) for pair in zip(ours, theirs, strict=True)),
            }
        )

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`sum_pairs KL(G^S || G^T)`, a scalar."""
        widenings = zip(adapters["widen"], _pooled(student.maps), strict=True)
        ours = _directions(widening(vectors) for widening, vectors in widenings)
        theirs = _directions(_pooled(teacher.maps))
        pairs = zip(adapters["attention"], pairwise(ours), pairwise(theirs), strict=True)
        scores = ((attention.scores(*one), attention.scores(*other)) for attention, one, other in pairs)
        return sum(graph_divergence(*each, self.squash, self.reduction) for each in scores)

    def fit_attention(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> dict[str, Tensor]:
        """What phase "attention" minimises: `sum_pairs mean_b 1 - cos(V', V^B)` on the teacher."""
        pairs = pairwise(_directions(_pooled(teacher.maps)))
        gaps = [
            1 - (attention.estimate(front, back) * back).sum(dim=1)
            for attention, (front, back) in zip(adapters["attention"], pairs, strict=True)
        ]
        return {"attention": sum(gap.mean() for gap in gaps)}

    def phases(self) -> tuple[Phase, ...]:
        """The attention networks on the teacher; then student and widening by graphs and labels."""
        return (
            Phase("attention", self.fit_attention, ("adapters.attention",), share=self.share),
            Phase("distil", self.objective, ("student", "adapters.widen")),
        )


def _pooled(maps: Iterable[Tensor]) -> list[Tensor]:
    return [stage_map.mean(dim=(2, 3), keepdim=True) for stage_map in maps]


def _directions(pooled: Iterable[Tensor]) -> list[Tensor]:
    return [unit_length(vectors.flatten(1)) for vectors in pooled]


def graph_divergence(
    student_scores: Tensor, teacher_scores: Tensor, squash: bool = True, reduction: str = "mean"
) -> Tensor:
    """`KL(softmax_j S || softmax_j T)` of scores (heads, B, B), or of their tanh, over heads and rows, in nats."""
    ours, theirs = (scores.tanh() if squash else scores for scores in (student_scores, teacher_scores))
    # the student's graph is the first argument of this divergence, where others have the teacher's
    rows = softened_kl(theirs.flatten(0, 1), ours.flatten(0, 1), 1.0, reduction="none")
    return rows.mean() if reduction == "mean" else rows.sum()
