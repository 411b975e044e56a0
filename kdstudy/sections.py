"""Methods that run parts of one network on the other's maps: LIT, AdaIN transfer, residual distillation.

Maps t_j and s_j (B, c, h, w) are those of teacher and student after stage j = 1..S, t_0 those of the teacher's stem.
The scheme detaches the teacher's. The teacher is frozen and in eval mode; gradient passes through its stages to the
student. Parts that run a second time belong to the loss: they run in full precision whatever the recipe's is.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.adapters import paired_maps, widen
from kdstudy.core import Clock, Method, Phase, View, require_at_least_zero, require_positive, require_share
from kdstudy.margins import Margin, connector, partial_l2

COPIED = ("stem", "embed", "classifier")  # what LIT takes from the teacher: all but the stages


@dataclass(frozen=True, kw_only=True)
class LIT(Method):
    """Intermediate representation training: each stage of the student learns to replace its counterpart.

    Koratana, Kang, Bailis, Zaharia, "LIT: Learned Intermediate Representation Training for Model Compression", ICML
    2019, arXiv:1810.01937.

    Let S_j be stage j of the student, and `KD = ce_weight * CE(z_s, y) + kd_weight * T^2 H(softmax(z_t / T),
    softmax(z_s / T))` with the cross-entropy H, mean over the batch.

    1. "sections", 175/300 of the epochs: `(1 - section_weight) * KD + section_weight * sum_j mean (S_j(t_{j-1}) -
       t_j)^2`, mean over all elements. Stem and classifier are the teacher's and stay so; only the stages train.
    2. "fine_tune", the other 125/300, at a tenth of the learning rate: `KD`, the whole student trains.

    Student and teacher differ in the number of blocks alone. In phase 1 the student's batch norms see two kinds of
    input in turn, its own maps and the teacher's. Defaults: 0.95, 0.05, T 6, 0.25.

    Differs from the printed text:

    * A 1x1 layer for stages of other widths is left out: stem and classifier could not be copied.
    * The released code never unfreezes stem and classifier and halves the loss of phase 1; neither is done here.
    * Milestones are the run's, scaled to each phase, for 100 of 175 and 55 of 125 epochs.
    """

    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Koratana, Kang, Bailis, Zaharia 2019, ICML"
    reads: ClassVar[tuple[str, ...]] = ("logits", "stem", "maps", "network")

    ce_weight: float = 0.95
    kd_weight: float = 0.05
    temperature: float = 6.0
    section_weight: float = 0.25

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_positive("temperature", self.temperature)
        require_share("section_weight", self.section_weight)

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`T^2 H(teacher, student)`, a scalar."""
        target = (teacher.logits / self.temperature).softmax(dim=1)
        return self.temperature**2 * F.cross_entropy(student.logits / self.temperature, target)

    def section_loss(self, student: View, teacher: View) -> Tensor:
        """How far each stage of the student, given the teacher's map before it, is from the teacher's: a scalar."""
        pairs = enumerate(zip((teacher.stem, *teacher.maps[:-1]), teacher.maps, strict=True), start=1)
        return sum(F.mse_loss(student.network.section(stage, before), after) for stage, (before, after) in pairs)

    def match_sections(
        self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict
    ) -> dict[str, Tensor]:
        """The weighted terms of phase 1."""
        rest = 1 - self.section_weight
        terms = self.objective(student, teacher, labels, adapters) if rest else {}
        terms = {name: rest * term for name, term in terms.items()}
        if self.section_weight:
            terms["sections"] = self.section_weight * self.section_loss(student, teacher)
        return terms

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """None. Raises ValueError unless the student's stem, classifier and maps have the teacher's shapes."""
        _require_equal_sizes(student, teacher)
        for part in COPIED:
            one, other = (getattr(view.network, part).state_dict() for view in (student, teacher))
            if [(name, x.shape) for name, x in one.items()] != [(name, x.shape) for name, x in other.items()]:
                raise ValueError(f"LIT copies the teacher's {part}, so the student's must be built alike")
        for number, (one, other) in enumerate(zip(student.maps, teacher.maps, strict=True), start=1):
            if one.shape != other.shape:
                widths = f"{one.shape[1]} and {other.shape[1]}"
                raise ValueError(f"LIT needs stages of equal width, but stage {number} has {widths} channels")
        return nn.ModuleDict()

    def initialise(
        self, student: nn.Module, teacher: nn.Module, plain_batches: Iterable[Tensor], adapters: nn.ModuleDict
    ) -> None:
        """Copy the teacher's stem and classifier, batch statistics included."""
        for part in COPIED:
            getattr(student, part).load_state_dict(getattr(teacher, part).state_dict())

    def phases(self) -> tuple[Phase, ...]:
        """First the stages, then the whole student."""
        return (
            Phase("sections", self.match_sections, trains=("student.stages",), share=175 / 300),
            Phase("fine_tune", self.objective, trains=("student",), share=125 / 300, rate=0.1),
        )


@dataclass(frozen=True, kw_only=True)
class AdaIN(Method):
    """AdaIN transfer: the teacher's own later layers judge the student's channel statistics.

    Yang, Martinez, Bulat, Tzimiropoulos, "Knowledge Distillation via Adaptive Instance Normalization", 2020,
    arXiv:2003.04289.

    With mean and (biased) deviation of each sample and channel over h and w, the teacher's map takes on the student's
    statistics, `t'_j = std(s_j) (t_j - mean(t_j)) / std(t_j) + mean(s_j)`, and passes through the rest of the teacher:

    `ce_weight * CE(z_s, y) + kd_weight * sum_j [ mean_{b,c} (mean(s_j) - mean(t_j))^2
    + mean_{b,c} (std(s_j) - std(t_j))^2 + tail_weight * mean_{b,k} (tail_j(t'_j)_k - z_{t,k})^2 ]`

    where tail_j gives logits. Where widths differ, s_j first passes a 1x1 convolution with batch norm; sizes may
    differ. Defaults: all weights 1.

    Differs from the printed text:

    * Only the abstract could be checked: the terms' form, their equal weights and the tail's end at the logits are a
      reading of it.
    * The deviation is `sqrt(var + 1e-10)`, so that a channel without variance has a finite gradient.
    """

    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Yang, Martinez, Bulat, Tzimiropoulos 2020, arXiv:2003.04289"
    reads: ClassVar[tuple[str, ...]] = ("logits", "maps", "network")

    tail_weight: float = 1.0

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_at_least_zero("tail_weight", self.tail_weight)

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """The sum over stages of what statistics and tails differ by, a scalar."""
        loss = torch.zeros_like(student.logits[0, 0])
        for number, (own, target) in enumerate(zip(student.maps, teacher.maps, strict=True), start=1):
            own = adapters["connectors"][number - 1](own)
            loss = loss + statistics_loss(own, target)
            if self.tail_weight:
                answer = teacher.network.resume(number, adaptive_instance_norm(target, own)).logits
                loss = loss + self.tail_weight * F.mse_loss(answer, teacher.logits)
        return loss

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """One connector from the student's to the teacher's width per stage, empty where these are equal."""
        pairs = paired_maps(student, teacher)
        return nn.ModuleDict({"connectors": nn.ModuleList(widen(one.shape[1], other.shape[1]) for one, other in pairs)})


def statistics_loss(own: Tensor, target: Tensor) -> Tensor:
    """Squared differences of channel means and of channel deviations, each averaged over samples and channels."""
    return sum(F.mse_loss(one, other) for one, other in zip(_statistics(own), _statistics(target), strict=True))


def adaptive_instance_norm(content: Tensor, style: Tensor) -> Tensor:
    """`content` (B, c, h, w) with the channel means and deviations of `style` (B, c, h', w')."""
    (mean, deviation), (new_mean, new_deviation) = _statistics(content), _statistics(style)
    return new_deviation * (content - mean) / deviation + new_mean


def _statistics(stage_map: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(stage_map, dim=(2, 3), correction=0, keepdim=True)
    return mean, (variance + 1e-10).sqrt()


@dataclass(frozen=True, kw_only=True)
class JointRD(Method):
    """Residual distillation: the teacher's later stages finish what the student's earlier ones begin.

    Li, Zhang, Wang, Liu, Tan, Lin, Zhang, Feng, Zhang, "Residual Distillation: Towards Portable Deep Neural Networks
    without Shortcuts", NeurIPS 2020.

    Branch i = 1..S-1 is s_i passed through the teacher's stages i+1..S, which gives logits z_i and a last map p_i
    before its activation; p_s and p_t are the student's and the teacher's. Gradients thus reach a student without
    shortcuts through the teacher's:

    `ce_weight * CE(z_s, y) + kd_weight * (m sum_i CE(z_i, y) + margin_weight * [ D(p_s) + m sum_i D(p_i) ])`

    D is the partial L2 distance of the comprehensive overhaul to p_t (`margins`), summed over c, h and w, mean over the
    batch, behind a 1x1 convolution with batch norm for each p. `m` falls from 1 to `floor` along half a cosine over the
    first `decay_share` of the epochs. Where widths differ, s_i enters its branch through a 1x1 convolution with batch
    norm. Defaults: 1e-3, which suits images of 32 x 32; floor 0.5 of CIFAR; 60 of 200 epochs.

    Differs from the printed text:

    * The teacher is trained beforehand and in eval mode; training it together with the student is left out, and with it
      the released code's division of all terms by 4.
    * Branches learn from labels; the released code can teach them by KD, which is switched off there.
    """

    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Li, Zhang, Wang et al. 2020, NeurIPS"
    reads: ClassVar[tuple[str, ...]] = ("logits", "maps", "pre_maps", "network")

    margin_weight: float = 1e-3
    floor: float = 0.5
    decay_share: float = 0.3

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_at_least_zero("margin_weight", self.margin_weight)
        require_share("floor", self.floor)
        require_positive("decay_share", self.decay_share)

    def branch_weight(self, clock: Clock) -> Tensor:
        """The weight m of the branches in the epoch that the clock shows: 1 in the first."""
        over = (clock.epoch / (self.decay_share * clock.epochs)).clamp(max=1)
        return self.floor + (1 - self.floor) * (1 + torch.cos(torch.pi * over)) / 2

    def branches(self, student: View, teacher: View, adapters: nn.ModuleDict) -> list[View]:
        """What the rest of the teacher makes of each of the student's maps but the last."""
        entered = zip(adapters["entries"], student.maps[:-1], strict=True)
        return [teacher.network.resume(stage, entry(own)) for stage, (entry, own) in enumerate(entered, start=1)]

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """The branches' cross-entropies and all weighted distances, a scalar."""
        branches = self.branches(student, teacher, adapters)
        weight = self.branch_weight(adapters["clock"])
        loss = weight * sum(F.cross_entropy(branch.logits, labels) for branch in branches)
        if self.margin_weight:
            ends = [view.pre_maps[-1] for view in (student, *branches)]
            target, margin = teacher.pre_maps[-1], adapters["margin"].value
            connected = [connect(end) for connect, end in zip(adapters["connectors"], ends, strict=True)]
            own, *others = (partial_l2(end, target, margin).sum() / len(target) for end in connected)
            loss = loss + self.margin_weight * (own + weight * sum(others))
        return loss

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """A clock, the teacher's margin, and connectors of what enters and ends the branches."""
        _require_equal_sizes(student, teacher)
        widths = [(one.shape[1], other.shape[1]) for one, other in zip(student.maps, teacher.maps, strict=True)]
        adapters = {"clock": Clock(), "entries": nn.ModuleList(widen(*pair) for pair in widths[:-1])}
        if self.margin_weight:
            own, width = widths[-1]
            inputs = (own, *[width] * len(widths[:-1]))
            adapters["connectors"] = nn.ModuleList(connector(channels, width) for channels in inputs)
            adapters["margin"] = Margin(teacher.network.norms()[-1])
        return nn.ModuleDict(adapters)


def _require_equal_sizes(student: View, teacher: View) -> None:
    paired_maps(student, teacher)  # as many stages
    for number, (one, other) in enumerate(zip(student.maps, teacher.maps, strict=True), start=1):
        if one.shape[2:] != other.shape[2:]:
            sides = "{} x {} and {} x {}".format(*one.shape[2:], *other.shape[2:])
            raise ValueError(f"maps of both networks must have equal sides, but stage {number} has {sides} pixels")
