"""Methods on which side of zero a neuron is: activation boundaries and the comprehensive overhaul.

Both compare the maps before a stage's last activation, `pre_maps`: s of the student and t of the teacher, (B, c, h, w).
Stages pair by number; where two maps differ in size the larger is average-pooled. Of L stages, stage l weighs
`2^(l - L)`. Elements are summed, not averaged: the weights suit images of 32 x 32.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.adapters import paired_maps, widen
from kdstudy.core import Method, Phase, View, require_at_least_zero, require_positive, softened_kl
from kdstudy.margins import Margin, connector, partial_l2


def paired_pre_maps(student: View, teacher: View) -> list[tuple[Tensor, Tensor]]:
    """The maps before the activation as `paired_maps` pairs those after it."""
    return paired_maps(*(view._replace(maps=view.pre_maps) for view in (student, teacher)))


def summed_over_stages(stages: Iterable[Tensor]) -> Tensor:
    """`sum_l 2^(l - L) sum_chw` of elementwise losses (B, c, h, w), averaged over the batch: a scalar."""
    means = [elements.sum() / len(elements) for elements in stages]
    return sum(mean / 2 ** (len(means) - stage) for stage, mean in enumerate(means, start=1))


def boundary_disagreement(student: Tensor, teacher: Tensor) -> Tensor:
    """`|1[t > 0] - 1[s > 0]|`, elementwise: what activation boundaries aim at. It has no gradient."""
    return ((student > 0) != (teacher > 0)).to(student.dtype)


def boundary_loss(student: Tensor, teacher: Tensor, margin: float) -> Tensor:
    """`relu(margin - s)^2` where t > 0 and `relu(margin + s)^2` elsewhere, elementwise."""
    return F.relu(margin - torch.where(teacher > 0, student, -student)).square()


@dataclass(frozen=True, kw_only=True)
class ActivationBoundaries(Method):
    """Activation boundaries: first the student's neurons learn when to fire, then the student learns its task.

    Heo, Lee, Yun, Choi, "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons", AAAI
    2019.

    The aim is `sum_l ||1[t > 0] - 1[s > 0]||_1`, which has no gradient. Phase "boundaries" minimises `kd_weight *
    mean_b sum_l 2^(l - L) sum_chw loss`, where `loss` is `relu(margin - s)^2` if t > 0 and `relu(margin + s)^2`
    otherwise, over stem, stages and connectors: 1x1 convolution and batch norm on s, where the widths differ. It lasts
    `share` of the run: 30 epochs before 240. Phase "distil" trains the whole student by `ce_weight * CE + kl_weight
    * KL(softmax(z_t / T) || softmax(z_s / T))`. Defaults as released: 3e-3, margin 1, then 0 and 1 at T 3, without
    `T^2`. Cross-entropy alone is the other common form: `ce_weight` 1, `kl_weight` 0.

    Differs from the printed text:

    * Slides print the squared norm of the whole sum; the two masks are disjoint, so that it is the same.
    * The released script lets both phases last one epoch, a placeholder; 30 and 240 are usual since Tian et al. 2020.
    * The authors' teacher normalises by the batch in the first phase, so that its statistics drift; here it never does.
    * Both phases follow the run's recipe, the first with milestones scaled to its length.
    """

    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Heo, Lee, Yun, Choi 2019, AAAI"
    reads: ClassVar[tuple[str, ...]] = ("logits", "pre_maps")

    ce_weight: float = 0.0
    kd_weight: float = 3e-3
    kl_weight: float = 1.0
    temperature: float = 3.0
    margin: float = 1.0
    share: float = 0.125

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range, and a phase without a term."""
        super().__post_init__()
        require_at_least_zero("kl_weight", self.kl_weight)
        for name in ("kd_weight", "temperature", "margin", "share"):
            require_positive(name, getattr(self, name))
        if not (self.ce_weight or self.kl_weight):
            raise ValueError("ce_weight and kl_weight are both 0: the second phase would have nothing to minimise")

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """A connector per stage."""
        pairs = paired_pre_maps(student, teacher)
        return nn.ModuleDict({"connectors": nn.ModuleList(widen(s.shape[1], t.shape[1]) for s, t in pairs)})

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """The boundary loss of all stages, a scalar."""
        stages = zip(adapters["connectors"], paired_pre_maps(student, teacher), strict=True)
        return summed_over_stages(boundary_loss(connect(s), t, self.margin) for connect, (s, t) in stages)

    def boundaries(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> dict[str, Tensor]:
        """The first phase's only term."""
        return {"boundaries": self.kd_weight * self.loss(student, teacher, labels, adapters)}

    def objective(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> dict[str, Tensor]:
        """The second phase's terms: boundaries have no part in it."""
        terms = {}
        if self.ce_weight:
            terms["ce"] = self.ce_weight * self.label_loss(student, teacher, labels, adapters)
        if self.kl_weight:
            divergence = softened_kl(student.logits, teacher.logits, self.temperature) / self.temperature**2
            terms["kl"] = self.kl_weight * divergence
        return terms

    def phases(self) -> tuple[Phase, ...]:
        """Boundaries without the classifier; then the student without the connectors."""
        features = ("student.stem", "student.stages", "adapters.connectors")
        return (
            Phase("boundaries", self.boundaries, trains=features, share=self.share),
            Phase("distil", self.objective, trains=("student",)),
        )


@dataclass(frozen=True, kw_only=True)
class ComprehensiveOverhaul(Method):
    """The comprehensive overhaul of feature distillation (OFD): the teacher's positive activations, and little else.

    Heo, Kim, Yun, Park, Kwak, Choi, "A Comprehensive Overhaul of Feature Distillation", ICCV 2019.

    `ce_weight * CE + kd_weight * mean_b sum_l 2^(l - L) sum_chw d(r(s), max(t, m))`. Connector `r`: 1x1 convolution,
    initially N(0, 2 / c_t), and batch norm, at every stage. Margin `m` < 0: per channel the mean of the teacher's
    negative values (`negative_means`), fixed when training begins. Partial distance `d`: a square, skipped where `t <=
    0` and `r(s) <= max(t, m)`, since neither neuron fires. Defaults as released: 1, 1e-3.

    Differs from the printed text:

    * The authors' teacher normalises by the batch and lets its statistics drift. Here its statistics never change, and
      it has no option to normalise by the batch: a frozen teacher's view is that of evaluation.
    * Margins take a stage's values for the outputs of its last batch norm. For ResNets, whose shortcut is added
      behind it, that is an approximation, also the authors'.
    * The authors restart the momentum at each drop of the learning rate; here the run's recipe holds.
    """

    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Heo, Kim, Yun, Park, Kwak, Choi 2019, ICCV"
    reads: ClassVar[tuple[str, ...]] = ("logits", "pre_maps", "network")

    kd_weight: float = 1e-3

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """A connector per stage, and the teacher's margins. ValueError for a teacher without batch norm."""
        pairs = paired_pre_maps(student, teacher)
        connectors = [connector(s.shape[1], t.shape[1]) for s, t in pairs]
        margins = [Margin(norm) for norm in teacher.network.norms()]
        return nn.ModuleDict({"connectors": nn.ModuleList(connectors), "margins": nn.ModuleList(margins)})

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """The partial squared distance of all stages, a scalar."""
        pairs = paired_pre_maps(student, teacher)
        stages = zip(adapters["connectors"], adapters["margins"], pairs, strict=True)
        return summed_over_stages(partial_l2(connect(s), t, margin.value) for connect, margin, (s, t) in stages)
