"""Methods for students that see no real image: zero-shot transfer and data impressions.

Shapes: logits (B, C), stage maps (B, c, h, w). `sigma_T(z) = softmax(z / T)`. The images are the scheme's affair, see
`synthetic.py`; it detaches the teacher.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.adapters import paired_maps
from kdstudy.attention import attention_map
from kdstudy.core import Method, View, require_at_least_zero, require_positive, softened_kl


def element_mean_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """`mean_{b,c} p_t (log p_t - log p_s)` at T 1, in nats: KL(teacher || student) over the number of classes."""
    return softened_kl(student_logits, teacher_logits, 1.0) / student_logits.shape[1]


@dataclass(frozen=True, kw_only=True)
class ZeroShotTransfer(Method):
    """Zero-shot knowledge transfer: student and teacher are compared on images that a generator makes for it.

    Micaelli, Storkey, "Zero-shot Knowledge Transfer via Adversarial Belief Matching", NeurIPS 2019, arXiv:1905.09768.

    The student minimises `kd_weight * mean_{b,c} p_t (log p_t - log p_s) + attention_weight * sum_j mean_{b,i} (Q_s^j -
    Q_t^j)^2`, with p = softmax(z) and, over stages j and positions i, the normalised sums of squares Q of
    `attention.attention_map`. The generator maximises the first term. No label is read. Defaults as released: 1, 250.

    Differs from the printed text:

    * The paper has the divergence, a sum over classes; the release divides it by the number of classes, which keeps the
      ratio to the attention term that its 250 is meant for. A `kd_weight` of C is the printed form.
    * Where maps differ in size, the features are pooled before their attention is taken.
    """

    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Micaelli, Storkey 2019, NeurIPS, arXiv:1905.09768"
    reads: ClassVar[tuple[str, ...]] = ("logits", "maps")
    scheme: ClassVar[str] = "zero_shot"

    ce_weight: float = 0.0
    attention_weight: float = 250.0

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range, and a weight on labels, which generated images do not have."""
        super().__post_init__()
        require_at_least_zero("attention_weight", self.attention_weight)
        if self.ce_weight:
            raise ValueError(f"ce_weight must be 0, not {self.ce_weight!r}: generated images have no labels")

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """The divergence over the number of classes, a scalar."""
        return element_mean_kl(student.logits, teacher.logits)

    def attention(self, student: View, teacher: View) -> Tensor:
        """The squared differences of the attention maps, summed over the stages, a scalar."""
        maps = [[attention_map(each) for each in pair] for pair in paired_maps(student, teacher)]
        return sum(F.mse_loss(*pair) for pair in maps)

    def objective(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> dict[str, Tensor]:
        """The usual terms, and that of attention if it has a weight."""
        terms = super().objective(student, teacher, labels, adapters)
        if self.attention_weight:
            terms["attention"] = self.attention_weight * self.attention(student, teacher)
        return terms

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """None. Raises ValueError unless the networks have equally many stages, where attention is compared."""
        if self.attention_weight:
            paired_maps(student, teacher)
        return nn.ModuleDict()


@dataclass(frozen=True, kw_only=True)
class DataImpressions(Method):
    """Zero-shot distillation: the student learns from images that were made for answers of the teacher.

    Nayak, Mopuri, Shaj, Babu, Chakraborty, "Zero-Shot Knowledge Distillation in Deep Networks", ICML 2019,
    arXiv:1905.08114.

    `ce_weight * CE(z_s, y) + kd_weight * T^2 KL(sigma_T(z_t) || sigma_T(z_s))`, where y is the class that the teacher
    sees in the impression. Defaults as released: 0, 1, T 20.

    Differs from the printed text:

    * Paper and release have a soft cross-entropy for the KL: larger by the teacher's entropy, with the same gradient.
    * The paper weighs the term of labels by 0.3, as the release does for real images; there impressions have none.
    * The teacher answers for the crop that the student sees; the release keeps its answer for the whole impression.
    """

    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Nayak, Mopuri, Shaj, Babu, Chakraborty 2019, ICML, arXiv:1905.08114"
    scheme: ClassVar[str] = "impressions"

    ce_weight: float = 0.0
    temperature: float = 20.0

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_positive("temperature", self.temperature)

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`T^2 KL(teacher || student)`, a scalar."""
        return softened_kl(student.logits, teacher.logits, self.temperature)
