"""Methods for a network that teaches itself: its early classifiers by its last, its later self by its earlier one.

Shapes: logits (B, C), labels (B,), embeddings (B, d). KL and CE sum over classes and average over the batch, in nats;
sigma_T(z) = softmax(z / T).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.core import Clock, Method, Phase, View, require_at_least_zero, require_positive, require_whole, softened_kl
from kdstudy.heads import Exit, HeadedNet, bottleneck_heads, exits_of
from kdstudy.models import Ensemble


@dataclass(frozen=True, kw_only=True)
class BeYourOwnTeacher(Method):
    """Be Your Own Teacher (BYOT): classifiers on the early stages follow the answer and the features of the last one.

    Zhang, Song, Gao, Chen, Bao, Ma, "Be Your Own Teacher: Improve the Performance of Convolutional Neural Networks via
    Self Distillation", ICCV 2019, arXiv:1905.08094.

    With z and F the logits and embedding of the network, h_i and F_i those of the head on stage i < S: `ce_weight *
    (CE(z, y) + sum_i CE(h_i, y)) + sum_i [kd_weight * T^2 KL(sigma_T(z) || sigma_T(h_i)) + feature_weight * sum_b
    ||F_i - F||_2^2]`. z and F are constants wherever they teach. Heads are `bottleneck_heads`; the deployed network
    is without them, but each exit, and the mean of all classifiers' probabilities, is scored beside it.

    The features' term is a sum over the batch: as B times the mean over it, its weight is `1e-6 B`, so that it grows
    with the batch. Defaults, those of a re-implementation: 0.9, 0.1, 1e-6, T 3.

    Differs from the printed text:

    * The paper is said to have 0.7, 0.3 and a feature weight of 0.03 (unverified; 0.03 / B for a mean over the batch).
    * The sources print KL(head || last), and leave open whether the last classifier's CE weighs 1: here the last
      answer is the target, as in every implementation, and each CE weighs `ce_weight`, as re-implemented.
    * The re-implementation has soft cross-entropy for KL, with the same gradient, and squares only where a feature is
      above 0, which none that follows a ReLU can tell apart.
    """

    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Zhang, Song, Gao, Chen, Bao, Ma 2019, ICCV, arXiv:1905.08094"
    reads: ClassVar[tuple[str, ...]] = ("logits", "maps", "embedding", "exits")
    needs_teacher: ClassVar[bool] = False
    scheme: ClassVar[str] = "self"

    ce_weight: float = 0.9
    kd_weight: float = 0.1
    feature_weight: float = 1e-6
    temperature: float = 3.0

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_at_least_zero("feature_weight", self.feature_weight)
        require_positive("temperature", self.temperature)

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """The heads. ValueError for a network that brings some, or whose embedding is not as wide as its last map."""
        if student.exits:
            raise ValueError("the student must be a network without heads: they are trained beside it and dropped")
        heads = bottleneck_heads(student)
        width, own = student.maps[-1].shape[1], student.embedding.shape[1]
        if width != own:
            raise ValueError(f"heads match the last stage's {width} channels, but this network's embedding has {own}")
        if teacher.embedding.shape[1] != own:
            raise ValueError("the network is its own teacher: no other's embedding can take the place of its own")
        return nn.ModuleDict({"heads": heads})

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`sum_i T^2 KL_i`, a scalar."""
        exits = exits_of(adapters["heads"], student.maps)
        return sum(softened_kl(head.logits, teacher.logits, self.temperature) for head in exits)

    def objective(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> dict[str, Tensor]:
        """The weighted terms of the last classifier and, numbered from 1, of each head."""
        terms = {"ce": self.ce_weight * F.cross_entropy(student.logits, labels)} if self.ce_weight else {}
        for number, head in enumerate(exits_of(adapters["heads"], student.maps), start=1):
            if self.ce_weight:
                terms[f"exit{number}_ce"] = self.ce_weight * F.cross_entropy(head.logits, labels)
            if self.kd_weight:
                kl = softened_kl(head.logits, teacher.logits, self.temperature)
                terms[f"exit{number}_kd"] = self.kd_weight * kl
            if self.feature_weight:
                gap = (head.embedding - teacher.embedding).square().sum()
                terms[f"exit{number}_feature"] = self.feature_weight * gap
        return terms

    def further(self, student: nn.Module, adapters: nn.ModuleDict) -> dict[str, nn.Module]:
        """Every early exit, and all classifiers together, that of the network among them."""
        headed = HeadedNet(student, adapters["heads"])
        exits = [Exit(headed, number) for number in range(len(headed.heads))]
        named = {f"exit_{number}": each for number, each in enumerate(exits, start=1)}
        return named | {"ensemble": Ensemble([*exits, headed])}


@dataclass(frozen=True, kw_only=True)
class SnapshotDistillation(Method):
    """Snapshot distillation (SD): in one training of several cycles, the end of each cycle teaches the next one.

    Yang, Xie, Su, Yuille, "Snapshot Distillation: Teacher-Student Optimization in One Generation", CVPR 2019,
    arXiv:1812.00123.

    `ce_weight * CE(z_s, y) + kd_weight * KL(sigma_T(z_t) || softmax(z_s))`; in the first cycle CE alone, with weight 1.
    Only the teacher is softened, hence no `T^2`. The learning rate falls along half a cosine in each of the `cycles`
    and starts again; the scheme freezes a copy of the network when one ends (cycle k of K begins with epoch `round(k *
    epochs / K)`), which teaches until the next ends. Defaults: `1 + 1 / T` = 4/3, 1, T 3, 4 cycles.

    Differs from the printed text:

    * Defaults are those of a script that is not the authors', which has soft cross-entropy for KL, with the same
      gradient; the paper is said to have T 2 (unverified).
    * D'Amicantonio 2021 prints a minus before the KL (eq. 44) and makes the teacher one step old; a teacher that near
      has nothing to say, and the paper's is the end of the last cycle.
    """

    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Yang, Xie, Su, Yuille 2019, CVPR, arXiv:1812.00123"
    scheme: ClassVar[str] = "snapshot"
    bound: ClassVar[bool] = True

    ce_weight: float = 4 / 3
    kd_weight: float = 1.0
    temperature: float = 3.0
    cycles: int = 4

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range, and a single cycle, in which nobody would teach."""
        super().__post_init__()
        require_positive("temperature", self.temperature)
        require_whole("cycles", self.cycles, least=2)

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """The clock."""
        return nn.ModuleDict({"clock": Clock()})

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`KL(sigma_T(z_t) || softmax(z_s))`, a scalar."""
        return softened_kl(student.logits, teacher.logits / self.temperature, 1.0)

    def objective(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> dict[str, Tensor]:
        """The terms as weighted in this epoch; without a clock those of a cycle that is taught."""
        taught = self.taught(adapters["clock"]) if "clock" in adapters else 1
        terms = {}
        if self.ce_weight:
            terms["ce"] = (1 + (self.ce_weight - 1) * taught) * F.cross_entropy(student.logits, labels)
        if self.kd_weight:
            terms["kd"] = self.kd_weight * taught * self.loss(student, teacher, labels, adapters)
        return terms

    def taught(self, clock: Clock) -> Tensor:
        """0 in the first cycle, 1 from then on, a scalar."""
        return (clock.epoch >= (clock.epochs / self.cycles).round()).to(clock.epoch)

    def phases(self) -> tuple[Phase, ...]:
        """One phase, whose learning rate restarts with each cycle."""
        return (Phase("distil", self.objective, recipe={"schedule": "cosine", "cycles": self.cycles}),)
