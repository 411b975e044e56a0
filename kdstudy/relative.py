"""Methods that edit the teacher's target: Earth Mover and Relative V1 to V4; the edits themselves are in `edits.py`.

D'Amicantonio, "Improvements to knowledge distillation on deep neural networks", master thesis, Bologna 2021, chapter 2.
All minimise `ce_weight * CE(z_s, y) + kd_weight * T^2 KL(target || softmax(z_s / T))`, in nats, summed over classes
and averaged over the batch. They differ in the target alone: a function of the frozen teacher's logits z (B, C) and the
labels y (B,). The thesis has no defaults but a grid, CE 0.1, 0.3, 0.5 with the rest for KD, and T 2, 5, 10; here 0.3,
0.7 and T 2.

Differs from the printed text, in all of them:

* The weight multiplies CE, as in eq. 2, not KD as in box 1. `T^2` stands in eq. 2 only; it is used throughout.
* The teacher is right if the argmax of z is y; the boxes compare a probability with an index.
* All walks are ascending and stable, over the logits as they were before the edit, with thresholds that stay fixed.
* Logarithms are natural; eq. 46-48 print base 2.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from kdstudy.core import Method, View, require_choice, require_positive, softened_kl, target_kl
from kdstudy.edits import FILLS, ORDERS, earth_mover, relative_v1, relative_v2, relative_v3, relative_v4

PAPER = "D'Amicantonio 2021, master thesis, Bologna"


@dataclass(frozen=True, kw_only=True)
class EarthMover(Method):
    """Earth Mover distillation (chapter 2): where the teacher is wrong, probability is moved to the label.

    The target is `softmax(z / T)`. For a wrong sample the other classes, the least likely first, give all their mass to
    the label until no class is more likely (`move_mass`). A prediction with more than half of the mass thus ends in a
    one-hot target; a higher T avoids that. `renormalise` divides each row by its sum, with `conserve=False` only.

    Differs from the printed text:

    * The stop condition is garbled: read as "the label is the most likely class", tested after each move.
    * The box adds and takes nothing away, so a row sums to up to 2 and the term is no divergence. Name and text say
      that mass is moved: the default. `conserve=False` is the box.
    * The box hands logits to the loss, which would drop the edit. The edited probabilities are the target at T as they
      are, without a second softmax.
    """

    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = PAPER
    ce_weight: float = 0.3
    kd_weight: float = 0.7
    temperature: float = 2.0
    conserve: bool = True
    renormalise: bool = False

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_positive("temperature", self.temperature)
        if self.conserve and self.renormalise:
            raise ValueError("renormalise must be False, not True, where conserve is True: rows sum to 1 already")

    def target(self, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """The edited probabilities at the method's temperature, (B, C)."""
        return earth_mover(teacher_logits, labels, self.temperature, self.conserve, self.renormalise)

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`T^2 sum_c p_c (log p_c - log softmax(z_s / T)_c)` for target p, a scalar."""
        return target_kl(student.logits, self.target(teacher.logits, labels), self.temperature)


@dataclass(frozen=True, kw_only=True)
class RelativeV1(Method):
    """Relative distillation V1 (chapter 2): less confidence where the teacher is right, none where it is wrong.

    Right: the label's logit is lowered towards the second highest (`lower`). Wrong: all zero, a uniform target.

    Differs from the printed text:

    * The box subtracts signed logits, so that negative ones raise the label's; the section, the caption of fig. 11 and
      V2 say absolute values: the default. `signed=True` is the box.
    * The label's own logit is passed over: for 3 classes or more this changes nothing but exact ties.
    * "Remains the highest" but for a tie with the second highest, which the box's `<` allows.
    * "Randomly chosen" for wrong samples: nothing is drawn, the target is uniform.
    """

    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = PAPER
    ce_weight: float = 0.3
    kd_weight: float = 0.7
    temperature: float = 2.0
    signed: bool = False

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_positive("temperature", self.temperature)

    def target(self, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """The edited logits, (B, C)."""
        return relative_v1(teacher_logits, labels, self.signed)

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`T^2 KL(softmax(target / T) || softmax(z_s / T))`, a scalar."""
        return softened_kl(student.logits, self.target(teacher.logits, labels), self.temperature)


@dataclass(frozen=True, kw_only=True)
class RelativeV2(Method):
    """Relative distillation V2 (chapter 2): the teacher's mistakes are corrected.

    Right: as V1. Wrong: the label's logit is raised just above the predicted one, which stays (`raise_label`; `order`
    "abs" adds the smallest absolute values first).

    Differs from the printed text:

    * For wrong samples the box steps upwards but keeps the comparison and the restore of the downward walk, so that it
      stops below the predicted class or adds everything. The caption of fig. 13 settles the aim: the label is highest
      and close to the predicted class. So the walk stops once it is above, and the last step is kept.
    """

    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = PAPER
    ce_weight: float = 0.3
    kd_weight: float = 0.7
    temperature: float = 2.0
    order: str = "value"

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_positive("temperature", self.temperature)
        require_choice("order", self.order, ORDERS)

    def target(self, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """The edited logits, (B, C)."""
        return relative_v2(teacher_logits, labels, self.order)

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`T^2 KL(softmax(target / T) || softmax(z_s / T))`, a scalar."""
        return softened_kl(student.logits, self.target(teacher.logits, labels), self.temperature)


@dataclass(frozen=True, kw_only=True)
class RelativeV3(Method):
    """Relative distillation V3 (chapter 2): V2, and the logits that were used for it are dropped.

    Every logit that was subtracted or added becomes 0. That is no masking: a negative logit becomes more likely. `fill`
    "min" puts them at the row's least logit instead, an ablation. `order` as in V2.

    Differs from the printed text:

    * On overshoot the box restores from an entry that it has just zeroed. Here the step is undone in full and its entry
      is not dropped; the last step of the upward walk is kept and its entry is dropped.
    * The box can zero the label's or the predicted entry; both stay, as V2's caption says of the predicted one.
    * The threshold is the second highest logit before the edit, also where that entry is dropped.
    """

    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = PAPER
    ce_weight: float = 0.3
    kd_weight: float = 0.7
    temperature: float = 2.0
    order: str = "value"
    fill: str = "zero"

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_positive("temperature", self.temperature)
        require_choice("order", self.order, ORDERS)
        require_choice("fill", self.fill, FILLS)

    def target(self, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """The edited logits, (B, C)."""
        return relative_v3(teacher_logits, labels, self.order, self.fill)

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`T^2 KL(softmax(target / T) || softmax(z_s / T))`, a scalar."""
        return softened_kl(student.logits, self.target(teacher.logits, labels), self.temperature)


@dataclass(frozen=True, kw_only=True)
class RelativeV4(Method):
    """Relative distillation V4 (chapter 2): less confidence, whether the teacher is right or wrong.

    The predicted class's logit is lowered towards the second highest (`lower`); the label is not used.

    Differs from the printed text:

    * The box lowers the label's logit, which leaves wrong samples as they are; three sentences of the section say the
      predicted class: the default. `literal=True` is the box. On right samples the two agree.
    """

    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = PAPER
    ce_weight: float = 0.3
    kd_weight: float = 0.7
    temperature: float = 2.0
    literal: bool = False

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_positive("temperature", self.temperature)

    def target(self, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """The edited logits, (B, C)."""
        return relative_v4(teacher_logits, labels, self.literal)

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`T^2 KL(softmax(target / T) || softmax(z_s / T))`, a scalar."""
        return softened_kl(student.logits, self.target(teacher.logits, labels), self.temperature)
