"""More methods on logits: mimicked, decoupled, correlated, standardised and multi-level logits.

Shapes: logits (B, C), labels (B,). Divergences sum over classes and average over the batch, in nats, as in
`response.py`; z_s and z_t are the student's and the teacher's logits, T is the temperature.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.core import (
    Clock,
    Method,
    View,
    require_at_least_zero,
    require_choice,
    require_positive,
    require_share,
    softened_kl,
)


class Spread(nn.Module):
    """The standard deviation of each logit of the teacher over the training set; NaN until measured."""

    def __init__(self, classes: int) -> None:
        """For so many logits."""
        super().__init__()
        self.register_buffer("deviation", torch.full((classes,), float("nan")))


@dataclass(frozen=True, kw_only=True)
class LogitMimic(Method):
    """Mimic learning: regression on the teacher's logits, without labels.

    Ba, Caruana, "Do Deep Nets Really Need to be Deep?", NIPS 2014, arXiv:1312.6184.

    `ce_weight * CE(z_s, y) + kd_weight * mean_b ||z_s - z_t||^2 / 2`, summed over classes. It is C times the limit of
    `T^2 KL` for a high T, but for the logits' means, which the KL does not see. Defaults: 0, 1.

    Differs from the printed text:

    * The paper's targets are z-scored, each logit over the training set, which it finds to help a little. Here logits
      stay as they are unless `normalise` is set: then the difference is divided by the deviation of the teacher's
      logit over the training set. The last layer's bias takes up the mean, and the student's logits need no undoing.
    * The paper's student is one wide hidden layer, trained on filter-bank frames; here any network.
    """

    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Ba, Caruana 2014, NIPS"

    ce_weight: float = 0.0
    kd_weight: float = 1.0
    normalise: bool = False

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """Half the squared distance, a scalar."""
        gap = student.logits - teacher.logits
        if self.normalise:
            gap = gap / adapters["spread"].deviation
        return gap.square().sum(dim=1).mean() / 2

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """A buffer for the teacher's deviations, if they are needed; no parameters."""
        return nn.ModuleDict({"spread": Spread(teacher.logits.shape[1])} if self.normalise else {})

    @torch.no_grad()
    def calibrate(self, adapters: nn.ModuleDict, teacher_views: Iterable[View]) -> None:
        """Measure the deviations over all samples; without a buffer to fill, the views are not asked for."""
        if self.normalise:
            logits = torch.cat([view.logits for view in teacher_views])
            adapters["spread"].deviation.copy_(logits.std(dim=0, correction=0))


@dataclass(frozen=True, kw_only=True)
class DecoupledKD(Method):
    """Decoupled distillation (DKD): how likely the label is and how the other classes share the rest, each weighed.

    B. Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", CVPR 2022, arXiv:2203.08679.

    `ce_weight * CE(z_s, y) + kd_weight * w * (target_weight * TCKD + other_weight * NCKD)`, with p the softmax of
    `z / T`: TCKD is `T^2 KL` of `(p_y, 1 - p_y)`, NCKD `T^2 KL` of the softmax over the C - 1 other classes. Plain KD
    is `TCKD + (1 - p_y) NCKD` with the teacher's p_y: a sure teacher mutes NCKD there, but not here. w rises linearly
    to 1 over the first `warm_up` of the epochs. Defaults: 1, 1, T 4, target 1, other 8; for some pairs the authors take
    2, and for wide ResNets 6.

    With `standardise` the logits of both terms, not those of CE, are standardised first as in `StandardisedKD`, whose
    authors then raise `kd_weight` to 9 and more and take T 2.

    Differs from the printed text:

    * The warm-up lasts 20 epochs there, of 240; here a share, 0.1: 20 epochs of 200.
    * The released code takes the logarithm of sums of probabilities, and hides the label's class by subtracting 1000;
      here only logits are summed (`logsumexp`) and the others are gathered, so that a sure network has a finite loss.
    """

    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Zhao, Cui, Song, Qiu, Liang 2022, CVPR"

    ce_weight: float = 1.0
    kd_weight: float = 1.0
    temperature: float = 4.0
    target_weight: float = 1.0
    other_weight: float = 8.0
    warm_up: float = 0.1
    standardise: bool = False

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_positive("temperature", self.temperature)
        for name in ("target_weight", "other_weight"):
            require_at_least_zero(name, getattr(self, name))
        require_share("warm_up", self.warm_up)

    def parts(self, student: View, teacher: View, labels: Tensor) -> tuple[Tensor, Tensor]:
        """TCKD and NCKD, scalars without weights."""
        z_s, z_t = (_prepared(view.logits, self.standardise) for view in (student, teacher))
        (pair_s, others_s), (pair_t, others_t) = (_decoupled(z, labels, self.temperature) for z in (z_s, z_t))
        return softened_kl(pair_s, pair_t, self.temperature), softened_kl(others_s, others_t, self.temperature)

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """The weighted sum of TCKD and NCKD, in its warm-up if there is a clock, a scalar."""
        target, others = self.parts(student, teacher, labels)
        total = self.target_weight * target + self.other_weight * others
        return adapters["clock"].warm_up(self.warm_up) * total if "clock" in adapters else total

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """The clock of the warm-up."""
        return nn.ModuleDict({"clock": Clock()})


def _decoupled(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Logits (B, 2) whose softmax at the temperature is `(p_y, 1 - p_y)`, and the other classes' own, (B, C - 1)."""
    label = labels.unsqueeze(1)
    other = torch.arange(logits.shape[1] - 1, device=logits.device)
    others = logits.gather(1, other + (other >= label))
    rest = temperature * (others / temperature).logsumexp(dim=1, keepdim=True)
    return torch.cat([logits.gather(1, label), rest], dim=1), others


@dataclass(frozen=True, kw_only=True)
class DIST(Method):
    """DIST: probabilities need not be equal, only correlated, over the classes of an image and over images.

    T. Huang, You, F. Wang, Qian, C. Xu, "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022,
    arXiv:2205.10536.

    `ce_weight * CE(z_s, y) + kd_weight * T^2 (inter_weight * (1 - mean_b r(p_t[b], p_s[b])) + intra_weight * (1 -
    mean_c r(p_t[:, c], p_s[:, c])))`, with p the softmax of `z / T` and r Pearson's correlation: over the C classes of
    an image ("inter-class"), over the B images of a batch ("intra-class"). Defaults: 1, 1, T 4, 2, 2.

    Differs from the printed text:

    * r has 1e-8 added under its fraction bar, as released. Deviations over a batch are small, so equal networks have
      a loss of up to 1e-4, not 0.
    * One image has no correlation and is refused. Two always correlate by 1 or -1: batches should hold 32 or more.
    * T and `T^2` are those of the CIFAR experiments; the released ImageNet code has neither and weights of 1.
    """

    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Huang, You, Wang, Qian, Xu 2022, NeurIPS"
    least_batch: ClassVar[int] = 2

    ce_weight: float = 1.0
    kd_weight: float = 1.0
    temperature: float = 4.0
    inter_weight: float = 2.0
    intra_weight: float = 2.0

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_positive("temperature", self.temperature)
        require_at_least_zero("inter_weight", self.inter_weight)
        require_at_least_zero("intra_weight", self.intra_weight)

    def parts(self, student: View, teacher: View) -> tuple[Tensor, Tensor]:
        """The terms over classes and over images, scalars without weights."""
        p_s, p_t = ((view.logits / self.temperature).softmax(dim=1) for view in (student, teacher))
        return tuple(self.temperature**2 * (1 - _correlation(p_s, p_t, dim).mean()) for dim in (1, 0))

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """The weighted sum of both terms, a scalar."""
        inter, intra = self.parts(student, teacher)
        return self.inter_weight * inter + self.intra_weight * intra


def _correlation(one: Tensor, other: Tensor, dim: int) -> Tensor:
    one, other = (x - x.mean(dim=dim, keepdim=True) for x in (one, other))
    return (one * other).sum(dim=dim) / (one.norm(dim=dim) * other.norm(dim=dim) + 1e-8)


def standardised(logits: Tensor) -> Tensor:
    """`(z - mean) / (std + 1e-7)` over the classes of each sample, with the unbiased deviation (divisor C - 1)."""
    return (logits - logits.mean(dim=1, keepdim=True)) / (logits.std(dim=1, keepdim=True) + 1e-7)


def _prepared(logits: Tensor, standardise: bool) -> Tensor:
    return standardised(logits) if standardise else logits


@dataclass(frozen=True, kw_only=True)
class StandardisedKD(Method):
    """Logit standardisation: distillation that sees neither the mean nor the scale of either network's logits.

    S. Sun, Ren, J. Li, R. Wang, Cao, "Logit Standardization in Knowledge Distillation", CVPR 2024, arXiv:2403.01427.

    `ce_weight * CE(z_s, y) + kd_weight * T^2 KL(softmax(n_t / T) || softmax(n_s / T))`, with `n = (z - mean) / (std +
    1e-7)` over the classes of each sample and C - 1 as divisor. CE takes the logits as they are; the gradient passes
    through the student's own mean and deviation. Defaults: 0.1, 9, T 2, as released for most pairs.

    `kd_weight` is ten times that of `VanillaKD`: a comparison needs plain distillation with 9 and T 2, too.

    Differs from the printed text:

    * The paper's temperature is a multiple of the deviation; here the deviation stands in n and T is that multiple.
    """

    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Sun, Ren, Li, Wang, Cao 2024, CVPR"

    ce_weight: float = 0.1
    kd_weight: float = 9.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_positive("temperature", self.temperature)

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`T^2 KL` of the standardised logits, a scalar."""
        return softened_kl(standardised(student.logits), standardised(teacher.logits), self.temperature)


@dataclass(frozen=True, kw_only=True)
class MultiLevel(Method):
    """Multi-level logit distillation (MLKD): images, pairs of images and pairs of classes, at five temperatures.

    Y. Jin, J. Wang, D. Lin, "Multi-Level Logit Distillation", CVPR 2023.

    Each image is seen weakly and strongly augmented (`augment.py`): two passes of both networks. `ce_weight * CE +
    kd_weight * (sum of four terms)`; CE is the sum over both views. With p the softmax of the weak `z / T`, P (B, C)
    its rows, the four terms sum over T 2, 3, 5, 6 and `temperature`: `T^2 KL(p_t || p_s)` (weak), the same for the
    strong view, `||P_t P_t' - P_s P_s'||^2 / B` between images and `||P_t' P_t - P_s' P_s||^2 / C` between classes. The
    three weak terms are for images whose top probability by the teacher, and for classes whose sum over the batch, is
    not above the batch's median (T 1).

    * `variant` "code" is what the released code computes: its masks come after the sums, so that a term is multiplied
      by the share of images or classes that pass, and its strong term takes the weak logits at T 2 and 6.
    * "masked" is what it seems to mean: masked images and classes count 0 in their mean, and the strong term has
      strong logits throughout.

    `standardise` has the logits of both KL terms standardised as in `StandardisedKD`, not those of the other two.
    Defaults: CE 0.1, all else 0.9, T 4.

    Differs from the printed text:

    * "code" is the default, as it gave the published results. Between images and classes, neither has a strong term.
    * Medians are those of a sort on the device; the release copies each batch to the host.
    * Published runs last 240 or 480 epochs (two repositories differ); here as long as all others. A fair control sees
      the same strong images in as many passes.
    """

    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Jin, Wang, Lin 2023, CVPR"
    reads: ClassVar[tuple[str, ...]] = ("logits", "strong")

    ce_weight: float = 0.1
    kd_weight: float = 0.9
    temperature: float = 4.0
    variant: str = "code"
    standardise: bool = False

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_positive("temperature", self.temperature)
        require_choice("variant", self.variant, ("code", "masked"))

    def label_loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """The sum of both views' cross-entropies, a scalar."""
        return F.cross_entropy(student.logits, labels) + F.cross_entropy(student.strong.logits, labels)

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """The sum of the four terms over the temperatures, a scalar."""
        images, classes = unsure(teacher.logits)
        if self.variant == "code":
            images, classes = images.mean(), classes.mean()
        total = 0.0
        for place, temperature in enumerate((self.temperature, 3.0, 5.0, 2.0, 6.0)):
            weak = self._instance(student, teacher, temperature)
            slip = self.variant == "code" and place > 2  # the weak logits once more
            strong = weak if slip else self._instance(student.strong, teacher.strong, temperature)
            p_s, p_t = ((view.logits / temperature).softmax(dim=1) for view in (student, teacher))
            total = total + (images * weak).mean() + strong.mean()
            total = total + (images * _gram_gap(p_s, p_t)).mean() + (classes * _gram_gap(p_s.T, p_t.T)).mean()
        return total

    def _instance(self, student: View, teacher: View, temperature: float) -> Tensor:
        """`T^2 KL` of each image, (B,)."""
        z_s, z_t = (_prepared(view.logits, self.standardise) for view in (student, teacher))
        return softened_kl(z_s, z_t, temperature, reduction="none")


def unsure(logits: Tensor) -> tuple[Tensor, Tensor]:
    """1 or 0 for the images (B,) and classes (C,) whose confidence at T 1 is at most the median of theirs."""
    probabilities = logits.softmax(dim=1)
    return tuple(_upto_median(confidence) for confidence in (probabilities.amax(dim=1), probabilities.sum(dim=0)))


def _upto_median(values: Tensor) -> Tensor:
    # the lower of two middle values selects the same as their mean
    return (values <= values.sort().values[(len(values) - 1) // 2]).to(values.dtype)


def _gram_gap(one: Tensor, other: Tensor) -> Tensor:
    """The squared differences of (n, m) matrices' products of rows, summed for each row, (n,)."""
    return (one @ one.T - other @ other.T).square().sum(dim=1)
