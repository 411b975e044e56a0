"""Methods for a light network and a larger one that are launched together."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from kdstudy.core import Method, View


@dataclass(frozen=True, kw_only=True)
class RocketLaunching(Method):
    """Rocket launching: a light net follows the logits of a booster that learns beside it, on shared convolutions.

    Zhou, Fan, Cui, Bian, Zhu, Gai, "Rocket Launching: A Universal and Efficient Framework for Training Well-performing
    Light Net", AAAI 2018, arXiv:1708.04106.

    `ce_weight * CE(z_l, y) + CE(z_b, y) + kd_weight * mean_b sum_c (z_l - z_b)^2`. The booster's logits z_b are
    constants in the last term ("gradient block"), the hint: the booster learns from the labels alone. Convolutions that
    both nets share learn from all three terms; batch norms and classifiers are each net's own. Only the light net is
    deployed. The mean is over the images that a batch has.

    Defaults: 1, 0.03. Scheme: the one partner is the booster; `share` false keeps the nets apart. Interval version:
    `wrn_16_k` within `wrn_40_k`, the first two blocks of each stage. Bottom version: `wrn_40_k_bottom2`, the lower two
    stages with batch norms and a classifier of their own.

    Differs from the printed text:

    * D'Amicantonio 2021 garbles the hint in eq. 12. Half of it ("1/2 ||z_l - z_b||^2") is absorbed in the weight.
    * The released code divides a last, smaller batch by the size of the usual ones.
    * Distillation from a booster trained before, which the authors add in some rows, is not part of it.
    """

    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Zhou, Fan, Cui, Bian, Zhu, Gai 2018, AAAI, arXiv:1708.04106"
    scheme: ClassVar[str] = "launch"

    kd_weight: float = 0.03

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """The hint `mean_b sum_c (z_l - z_b)^2`, a scalar."""
        return (student.logits - teacher.logits).square().sum(dim=1).mean()
