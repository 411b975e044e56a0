"""Methods for a network that is taught by the one before it, of the same architecture: born-again networks.

Shapes: logits (B, C), labels (B,). p_t = softmax(z_t) are the former generation's probabilities.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.core import Method, Phase, View, require_choice, softened_kl, target_kl


@dataclass(frozen=True, kw_only=True)
class BornAgain(Method):
    """Born-again networks (BAN): each generation starts afresh and learns the answers of the one before it.

    Furlanello, Lipton, Tschannen, Itti, Anandkumar, "Born Again Neural Networks", ICML 2018, arXiv:1805.04770.

    `ce_weight * CE(z_s, y) + kd_weight * D`, at temperature 1. `variant` makes D:

    * "full": `D = KL(p_t || softmax(z_s))`.
    * "cwtm", confidence weighted by teacher max: `D = sum_b w_b CE_b(z_s, y)`, `w_b = max_c p_t,b / sum_u max_c p_t,u`:
      of the teacher's answer only its sureness is left.
    * "dkpp", dark knowledge with permuted predictions: as "full", with the probabilities of all classes but the
      teacher's first shuffled among them, for each sample anew: which class is like which is lost.

    Defaults: 0 (no labels; 1 is the paper's BAN+L), 1. The first generation is trained on labels, each further row is
    `taught_by` the last one, on the same network; the paper makes 3 and lets them answer together (BANE).

    Differs from the printed text:

    * "dkpp" is a soft cross-entropy there: larger than the KL by the target's entropy, with the same gradient.
    * Nothing was checked against the authors' code. A re-implementation has T 20, a mean over classes, too, and 0.2 and
      0.8 as weights: not followed.
    """

    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Furlanello, Lipton, Tschannen, Itti, Anandkumar 2018, ICML, arXiv:1805.04770"

    ce_weight: float = 0.0
    variant: str = "full"

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_choice("variant", self.variant, ("full", "cwtm", "dkpp"))

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`D`, a scalar."""
        if self.variant == "cwtm":
            sureness = teacher.logits.softmax(dim=1).amax(dim=1)
            return sureness / sureness.sum() @ F.cross_entropy(student.logits, labels, reduction="none")
        if self.variant == "dkpp":
            return target_kl(student.logits, shuffled_rest(teacher.logits.softmax(dim=1)), 1.0)
        return softened_kl(student.logits, teacher.logits, 1.0)


def shuffled_rest(values: Tensor) -> Tensor:
    """(B, C) with all but the largest value of each row in random order, for each row anew, by torch's generator."""
    first = values.argmax(dim=1, keepdim=True)
    places = torch.arange(values.shape[1] - 1, device=values.device)
    places = places + (places >= first)  # (B, C - 1), all classes but the first
    rest = values.gather(1, places)
    return values.scatter(1, places, rest.gather(1, torch.rand_like(rest).argsort(dim=1)))


@dataclass(frozen=True, kw_only=True)
class BornAgainEnsemble(Method):
    """The generations of a born-again network answer together (BANE), by the mean of their probabilities.

    Furlanello, Lipton, Tschannen, Itti, Anandkumar, "Born Again Neural Networks", ICML 2018, arXiv:1805.04770.

    Nothing is trained: the row is `taught_by` the rows of the generations, and they are what is deployed.
    """

    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Furlanello, Lipton, Tschannen, Itti, Anandkumar 2018, ICML, arXiv:1805.04770"
    scheme: ClassVar[str] = "committee"
    bound: ClassVar[bool] = True

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """Zero, without a gradient."""
        return student.logits.new_zeros(())

    def phases(self) -> tuple[Phase, ...]:
        """None."""
        return ()
