"""Collaborative teaching: one teacher that is trained, and one that learns beside the student."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from kdstudy.adapters import paired_maps
from kdstudy.attention import attention_map
from kdstudy.core import Method, View, require_at_least_zero


@dataclass(frozen=True, kw_only=True)
class CollaborativeTeaching(Method):
    """Collaborative teaching: follow a teacher from scratch step by step, and look where a trained expert looks.

    Zhao, Sun, Dong, Chen, Dong, "Highlight Every Step: Knowledge Distillation via Collaborative Teaching", IEEE
    Transactions on Cybernetics 2020, arXiv:1907.09643.

    `ce_weight * CE(z_s, y) + kd_weight * mean_b ||z_s - z_scratch||_2^2 + attention_weight / 2 * sum_j mean_{b,i}
    (Q_s^j - Q_t^j)^2`. The scratch teacher has the expert's architecture and is trained at the same time, by its own
    cross-entropy; z_scratch are its logits of the moment, detached. Q (B, h w) are the normalised attention maps, sums
    of squares over the channels, of student and expert after each stage j, at positions i.

    Not the later "CTKD", curriculum temperature.

    Differs from the printed text:

    * The weights are ours, as the paper's could not be had: 1, 0.03 (that of rocket launching) and 1000 (that of
      attention transfer, whose mean square is taken for the distance of the maps).
    """

    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Zhao, Sun, Dong, Chen, Dong 2020, IEEE Trans. Cybernetics, arXiv:1907.09643"
    reads: ClassVar[tuple[str, ...]] = ("logits", "maps")
    scheme: ClassVar[str] = "collaborative"
    bound: ClassVar[bool] = True

    kd_weight: float = 0.03
    attention_weight: float = 1000.0

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_at_least_zero("attention_weight", self.attention_weight)

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """None; refuses networks whose stages do not pair up."""
        paired_maps(student, teacher)
        return nn.ModuleDict()

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`mean_b ||z_s - z_scratch||_2^2`, a scalar; the scratch teacher is the teacher's one member."""
        if not teacher.members:
            raise ValueError("collaborative teaching needs a scratch teacher: train it under the collaborative scheme")
        (scratch,) = teacher.members
        return (student.logits - scratch.logits).square().sum(dim=1).mean()

    def attention(self, student: View, teacher: View) -> Tensor:
        """`sum_j mean (Q_s^j - Q_t^j)^2` against the expert, a scalar."""
        pairs = paired_maps(student, teacher)
        return sum((attention_map(one) - attention_map(other)).square().mean() for one, other in pairs)

    def objective(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> dict[str, Tensor]:
        """The usual terms, and that of the expert's attention."""
        terms = super().objective(student, teacher, labels, adapters)
        if self.attention_weight:
            terms["attention"] = self.attention_weight / 2 * self.attention(student, teacher)
        return terms
