"""Methods on the logits of two networks: cross-entropy, plain, spherical and two-temperature distillation.

Shapes: logits (B, C), labels (B,). `KL(p || q)` sums over classes and averages over the batch, in nats; the teacher's
distribution is `p`. The scheme detaches the teacher.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.core import Method, View, require_choice, require_positive, require_share, softened_kl


def hard_soft_weights(weight: float, weighs_kd: bool = False) -> dict[str, float]:
    """`ce_weight` and `kd_weight` that sum to 1, as one number gives them in `w * CE + (1 - w) * KD`.

    Texts disagree on which term the number weighs: D'Amicantonio 2021 has it on the labels in eq. 2, 45 and 48 (the
    default here) and on the teacher in algorithm box 1 and eq. 28 (`weighs_kd`). ValueError unless 0 <= weight <= 1.
    """
    require_share("weight", weight)
    rest = round(1 - weight, 12)  # 0.1, not 0.09999999999999998: the weights are part of a run's identity
    return {"ce_weight": rest, "kd_weight": weight} if weighs_kd else {"ce_weight": weight, "kd_weight": rest}


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Method):
    """The baseline that no teacher helps: `mean_b -log softmax(z_s)_y`, in nats. It has no distillation term."""

    kind: ClassVar[str] = "none"
    paper: ClassVar[str] = "none (baseline)"
    needs_teacher: ClassVar[bool] = False

    kd_weight: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a weight on a term that does not exist."""
        super().__post_init__()
        if self.kd_weight:
            raise ValueError(f"kd_weight must be 0, not {self.kd_weight!r}: cross-entropy has no distillation term")

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """Zero, without a gradient."""
        return student.logits.new_zeros(())


@dataclass(frozen=True, kw_only=True)
class VanillaKD(Method):
    """Knowledge distillation: the student matches the teacher's softened distribution.

    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", NIPS 2014 workshop, arXiv:1503.02531.

    `ce_weight * CE(z_s, y) + kd_weight * T^2 KL(softmax(z_t / T) || softmax(z_s / T))`, CE at T 1. `T^2` makes up for
    gradients that shrink with the temperature T. The defaults are those usual on CIFAR: 0.1, 0.9, T 4.
    """

    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Hinton, Vinyals, Dean 2015, arXiv:1503.02531"

    ce_weight: float = 0.1
    kd_weight: float = 0.9
    temperature: float = 4.0

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_positive("temperature", self.temperature)

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`T^2 KL(teacher || student)`, a scalar."""
        return softened_kl(student.logits, teacher.logits, self.temperature)


EPSILON = 1e-7  # under the root of a squared norm or variance, so that a row of equal logits has a finite gradient


class TeacherNorm(nn.Module):
    """The mean l2 norm of the teacher's logits over the training set; NaN, which no run survives, until measured."""

    def __init__(self) -> None:
        """Start without a value."""
        super().__init__()
        self.register_buffer("mean", torch.tensor(float("nan")))


@dataclass(frozen=True, kw_only=True)
class SphericalKD(Method):
    """Spherical distillation: directions of the logits are matched, their lengths are not.

    Guo, Chen, Hu, Zhu, He, Cai, "Reducing the Teacher-Student Gap via Spherical Knowledge Distillation", 2020,
    arXiv:2010.07485.

    `ce_weight * CE(n_s, y) + kd_weight * T^2 KL(softmax(n_t / T) || softmax(n_s / T))`, with logits `n` rescaled by
    `mode`:

    * "norm": `n = l z / ||z||_2` on both sides, where l is the teacher's mean norm: over the training set, measured
      before training (`teacher_norm` "train_set"), or over the batch ("batch", and wherever there are no adapters).
    * "layernorm": `n = multiplier (z - mean) / std` per sample on both sides; 2 to 3 suits `multiplier`.
    * "stdmatch": `n_s = z_s std(z_t) / std(z_s)` per sample, `n_t = z_t`.

    CE takes the rescaled student logits at temperature 1; the class that is predicted stays the same. The gradient
    passes through the student's own norm or deviation. Defaults: 0.1, 0.9, T 4, as released.

    Differs from the printed text:

    * D'Amicantonio 2021 prints a squared norm in eq. 24-25 and none in the algorithm box, and omits `T^2` and the signs
      of eq. 28: here the plain norm, `T^2`, and eq. 28's weight read as that of KD.
    * The authors let `kd_weight` fall from 0.9 to 0.1 in steps; here it is constant.
    * The authors' readme has "layernorm", the code that they ran "stdmatch"; the thesis describes "norm", the default.
    """

    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Guo, Chen, Hu, Zhu, He, Cai 2020, arXiv:2010.07485"

    ce_weight: float = 0.1
    kd_weight: float = 0.9
    temperature: float = 4.0
    mode: str = "norm"
    teacher_norm: str = "train_set"
    multiplier: float = 2.0

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_positive("temperature", self.temperature)
        require_positive("multiplier", self.multiplier)
        require_choice("mode", self.mode, ("norm", "layernorm", "stdmatch"))
        require_choice("teacher_norm", self.teacher_norm, ("train_set", "batch"))

    def rescaled(self, student: View, teacher: View, adapters: nn.ModuleDict) -> tuple[Tensor, Tensor]:
        """The logits `n_s` and `n_t` that the terms compare, (B, C) each."""
        z_s, z_t = student.logits, teacher.logits
        if self.mode == "layernorm":
            return self.multiplier * _standardised(z_s), self.multiplier * _standardised(z_t)
        if self.mode == "stdmatch":
            return z_s * (_deviation(z_t) / _deviation(z_s)), z_t
        length = adapters["teacher_norm"].mean if "teacher_norm" in adapters else _norm(z_t).mean()
        return length * z_s / _norm(z_s), length * z_t / _norm(z_t)

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`T^2 KL` of the rescaled logits, a scalar."""
        return softened_kl(*self.rescaled(student, teacher, adapters), self.temperature)

    def label_loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """Cross-entropy of the rescaled student logits, a scalar."""
        return F.cross_entropy(self.rescaled(student, teacher, adapters)[0], labels)

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """A buffer for the teacher's mean norm, if the training set is to give it; no parameters."""
        if self.mode == "norm" and self.teacher_norm == "train_set":
            return nn.ModuleDict({"teacher_norm": TeacherNorm()})
        return nn.ModuleDict()

    @torch.no_grad()
    def calibrate(self, adapters: nn.ModuleDict, teacher_views: Iterable[View]) -> None:
        """Average the norm over all samples; without a buffer to fill, the views are not asked for."""
        if "teacher_norm" in adapters:
            norms = torch.cat([_norm(view.logits) for view in teacher_views])
            adapters["teacher_norm"].mean.copy_(norms.mean())


def _norm(logits: Tensor) -> Tensor:
    return (logits.square().sum(dim=1, keepdim=True) + EPSILON).sqrt()


def _deviation(logits: Tensor) -> Tensor:
    return (logits.var(dim=1, keepdim=True, correction=0) + EPSILON).sqrt()


def _standardised(logits: Tensor) -> Tensor:
    return (logits - logits.mean(dim=1, keepdim=True)) / _deviation(logits)


@dataclass(frozen=True, kw_only=True)
class TwoTemperature(Method):
    """Two-temperature distillation: samples that the teacher gets wrong are softened with a temperature of their own.

    D'Amicantonio, "Improvements to knowledge distillation on deep neural networks", master thesis, Bologna 2021,
    chapter 2.

    `T_i = temperature_right if argmax(z_t,i) == y_i else temperature_wrong`, for teacher and student alike;
    `ce_weight * CE(z_s, y) + kd_weight * mean_i T_i^2 KL(softmax(z_t,i / T_i) || softmax(z_s,i / T_i))`. For large
    T the term tends to a squared error of centred logits: a high `temperature_wrong` does not weaken wrong samples.
    Defaults: 0.3, 0.7, and 2 and 10 of the grid {2, 5} x {10, 20, 50}.

    Differs from the printed text:

    * The test for a wrong sample compares the largest probability with the label's index: read as the argmax.
    * `T^2` is not shown here but motivated in eq. 2; it stands inside the mean, as it differs by sample.
    """

    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "D'Amicantonio 2021, master thesis, Bologna"

    ce_weight: float = 0.3
    kd_weight: float = 0.7
    temperature_right: float = 2.0
    temperature_wrong: float = 10.0

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_positive("temperature_right", self.temperature_right)
        require_positive("temperature_wrong", self.temperature_wrong)

    def temperatures(self, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """The temperature of each sample, (B,), in the logits' precision."""
        right = teacher_logits.argmax(dim=1) == labels
        wrong = teacher_logits.new_full(labels.shape, self.temperature_wrong)
        return wrong.masked_fill(right, self.temperature_right)

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`mean_i T_i^2 KL_i(teacher || student)`, a scalar."""
        return softened_kl(student.logits, teacher.logits, self.temperatures(teacher.logits, labels))
