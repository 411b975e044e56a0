"""Methods that match where a stage responds: attention transfer and neuron selectivity transfer.

Shapes: stage maps (B, c, h, w). Stages are compared one to one, the larger map average-pooled to the smaller's size;
widths may differ. Neither method trains an extra module. The scheme detaches the teacher.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.adapters import paired_maps
from kdstudy.core import Method, View, require_choice, require_positive

MAPS = ("sum", "sum_power", "max_power")


def attention_map(stage_map: Tensor, kind: str = "sum_power", power: float = 2.0) -> Tensor:
    """`vec(G) / ||vec(G)||_2` per sample, (B, h w), of the attention map G (B, h, w) of a stage map A (B, c, h, w).

    `kind` "sum": `G = sum_c |A_c|`; "sum_power": `sum_c |A_c|^power`; "max_power": `max_c |A_c|^power`. The mean over c
    instead of the sum would change nothing. A sample without any response stays zero.
    """
    require_choice("kind", kind, MAPS)
    magnitude = stage_map.abs() if kind == "sum" else stage_map.abs().pow(power)
    attention = magnitude.amax(dim=1) if kind == "max_power" else magnitude.sum(dim=1)
    return F.normalize(attention.flatten(start_dim=1), dim=1)


@dataclass(frozen=True, kw_only=True)
class AttentionTransfer(Method):
    """Attention transfer: the student looks where the teacher looks.

    Zagoruyko, Komodakis, "Paying More Attention to Attention: Improving the Performance of Convolutional Neural
    Networks via Attention Transfer", ICLR 2017, arXiv:1612.03928.

    `ce_weight * CE(z_s, y) + kd_weight * sum_j mean_{b,i} (Q_s^j - Q_t^j)^2`, over stages j and positions i, where Q is
    the normalised `attention_map` of kind `map` with exponent `power`, at least 1. Wide ResNets are read at their bare
    residual sums, ResNets after the ReLU. `distance` "norm" is the printed `sum_j mean_b ||Q_s^j - Q_t^j||_2`, with
    `kd_weight` beta / 2. Defaults as in the authors' code: sum of squares, 1000.

    Differs from the printed text:

    * Eq. 2 has the norm, not squared, weighted by beta / 2; the authors' code the mean square weighted by beta: the
      default.
    * Where maps differ in size, the features are pooled before their attention is taken.
    """

    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Zagoruyko, Komodakis 2017, ICLR, arXiv:1612.03928"
    reads: ClassVar[tuple[str, ...]] = ("logits", "maps")

    ce_weight: float = 1.0
    kd_weight: float = 1000.0
    map: str = "sum_power"
    power: float = 2.0
    distance: str = "mean_square"

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_choice("map", self.map, MAPS)
        require_choice("distance", self.distance, ("mean_square", "norm"))
        require_positive("power", self.power)
        if self.power < 1:  # the gradient would be infinite where a channel is silent
            raise ValueError(f"power must be at least 1, not {self.power!r}")

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """The distances of the attention maps, summed over the stages, a scalar."""
        return sum(self._distance(*pair) for pair in paired_maps(student, teacher))

    def _distance(self, student_map: Tensor, teacher_map: Tensor) -> Tensor:
        difference = attention_map(student_map, self.map, self.power) - attention_map(teacher_map, self.map, self.power)
        if self.distance == "norm":
            return torch.linalg.vector_norm(difference, dim=1).mean()
        return difference.square().mean()

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """None. Raises ValueError unless the networks have equally many stages."""
        paired_maps(student, teacher)
        return nn.ModuleDict()


@dataclass(frozen=True, kw_only=True)
class NeuronSelectivity(Method):
    """Neuron selectivity transfer: the student's channels are distributed over patterns as the teacher's are.

    Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017, arXiv:1707.01219.

    `ce_weight * CE(z_s, y) + kd_weight * sum_j mean_b MMD^2`, over stages j, with
    `MMD^2 = mean_{i,i'} k(t_i, t_i') + mean_{i,i'} k(s_i, s_i') - 2 mean_{i,i'} k(t_i, s_i')`: t_i and s_i are the
    channels of a sample, each of its h w positions normalised to length 1, and `k(x, y) = <x, y>^2`. A silent channel
    stays zero. Default weight: 50.

    Differs from the printed text:

    * Of the paper's three kernels only the polynomial one, with degree 2 and offset 0.
    * Where maps differ in size, they are pooled before their channels are normalised.
    """

    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Huang, Wang 2017, arXiv:1707.01219"
    reads: ClassVar[tuple[str, ...]] = ("logits", "maps")

    ce_weight: float = 1.0
    kd_weight: float = 50.0

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """The squared discrepancies, summed over the stages, a scalar."""
        return sum(_discrepancy(*pair) for pair in paired_maps(student, teacher))

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """None. Raises ValueError unless the networks have equally many stages."""
        paired_maps(student, teacher)
        return nn.ModuleDict()


def _discrepancy(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    s, t = (F.normalize(each.flatten(start_dim=2), dim=2) for each in (student_map, teacher_map))
    return _mean_kernel(t, t) + _mean_kernel(s, s) - 2 * _mean_kernel(t, s)


def _mean_kernel(x: Tensor, y: Tensor) -> Tensor:
    # inner products first: (B, c, c') instead of (B, c, c', h w) in memory
    return torch.bmm(x, y.transpose(1, 2)).square().mean()
