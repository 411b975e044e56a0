"""Teacher-free distillation (Tf-KD): a teacher that is only a formula, and one that is the student's own equal.

Shapes: logits (B, C), labels (B,); sigma_T(z) = softmax(z / T). KL sums over classes and averages over the batch.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from kdstudy.core import Method, View, require_choice, require_positive, softened_kl, target_kl


@dataclass(frozen=True, kw_only=True)
class VirtualTeacher(Method):
    """Tf-KD regularised: distillation from a made-up teacher that is always right, a kin of label smoothing.

    Yuan, Tay, Li, Wang, Feng, "Revisiting Knowledge Distillation via Label Smoothing Regularization", CVPR 2020,
    arXiv:1909.11723.

    The virtual teacher p has `confidence` on the label and the rest shared equally. `ce_weight * CE(z_s, y) +
    kd_weight * D` with, by `variant`:

    * "paper": `D = KL(p_T || sigma_T(z_s))`, where p_T is p softened: in proportion to `p^(1/T)`.
    * "code": `D = multiplier / C * KL(sigma_T(p) || softmax(z_s))`: p softened as if it were logits, which leaves the
      classes all but equal, and a student at T 1.

    These are two regularisers, not two ways to write one. Defaults as released for ResNet-18: 0.9, 0.1, T 20,
    confidence 0.99, and a multiplier of 100, which "paper" does not have.

    Differs from the printed text:

    * No variant has `T^2`, as in both sources; at T 20 "paper" is then a faint term.
    * The released code averages over classes, too: this is the `1 / C`.
    * The released runs warm up for an epoch.
    """

    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Yuan, Tay, Li, Wang, Feng 2020, CVPR, arXiv:1909.11723"
    needs_teacher: ClassVar[bool] = False
    scheme: ClassVar[str] = "self"

    ce_weight: float = 0.9
    kd_weight: float = 0.1
    temperature: float = 20.0
    confidence: float = 0.99
    variant: str = "paper"
    multiplier: float = 100.0

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        for name in ("temperature", "confidence", "multiplier"):
            require_positive(name, getattr(self, name))
        if self.confidence >= 1:
            raise ValueError(f"confidence must be below 1, not {self.confidence!r}: the other classes share the rest")
        require_choice("variant", self.variant, ("paper", "code"))

    def target(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The softened virtual teacher, (B, C), in the logits' precision."""
        classes = logits.shape[1]
        teacher = torch.zeros_like(logits).scatter(1, labels.unsqueeze(1), 1.0)
        rest = (1 - self.confidence) / (classes - 1)
        teacher = rest + (self.confidence - rest) * teacher
        scores = teacher.log() if self.variant == "paper" else teacher
        return (scores / self.temperature).softmax(dim=1)

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`D`, a scalar; the teacher's view is not read."""
        target = self.target(student.logits, labels)
        if self.variant == "paper":
            return target_kl(student.logits, target, self.temperature) / self.temperature**2
        return self.multiplier / target.shape[1] * target_kl(student.logits, target, 1.0)


@dataclass(frozen=True, kw_only=True)
class TeacherFreeSelf(Method):
    """Tf-KD self: a network is taught by one of its own architecture that was trained on the labels alone.

    Yuan, Tay, Li, Wang, Feng, "Revisiting Knowledge Distillation via Label Smoothing Regularization", CVPR 2020,
    arXiv:1909.11723.

    `ce_weight * CE(z_s, y) + kd_weight * multiplier / C * T^2 KL(sigma_T(z_t) || sigma_T(z_s))`. The defaults are those
    released for ResNet-18 on CIFAR-100: 0.05, 0.95, T 6, multiplier 50, so that the KL weighs 0.475. Others there, as
    kd_weight, T and multiplier: MobileNetV2 and ShuffleNetV2 0.95, 20, 1; ResNeXt-29 0.9, 20, 100; DenseNet-121 0.9,
    20, 50; GoogLeNet 0.4, 20, 50. The row is `taught_by` cross-entropy on the student's own network.

    Differs from the printed text:

    * The paper has neither multiplier nor `1 / C`: the released code averages the KL over classes, too, and then
      multiplies it. It is kept, as the released numbers mean nothing without; with 10 classes instead of 100 they make
      the KL ten times heavier, so that the multiplier should be a tenth. The paper's form has a multiplier of C.
    """

    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Yuan, Tay, Li, Wang, Feng 2020, CVPR, arXiv:1909.11723"

    ce_weight: float = 0.05
    kd_weight: float = 0.95
    temperature: float = 6.0
    multiplier: float = 50.0

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        for name in ("temperature", "multiplier"):
            require_positive(name, getattr(self, name))

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`multiplier / C * T^2 KL(teacher || student)`, a scalar."""
        share = self.multiplier / student.logits.shape[1]
        return share * softened_kl(student.logits, teacher.logits, self.temperature)
