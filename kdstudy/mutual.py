"""Methods for peers that all learn: each follows the answers of the others (deep mutual learning, codistillation).

Shapes: logits (B, C), labels (B,). z_k are the logits of the peer that learns, z_l those of another one, which the
scheme detaches; sigma_T(z) = softmax(z / T). KL and CE sum over classes and average over the batch, in nats.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.core import Method, View, require_choice, require_positive, softened_kl


@dataclass(frozen=True, kw_only=True)
class DeepMutualLearning(Method):
    """Deep mutual learning (DML): networks that start differently and pull each other's answers together.

    Zhang, Xiang, Hospedales, Lu, "Deep Mutual Learning", CVPR 2018, arXiv:1706.00384.

    For peer k of K: `ce_weight * CE(z_k, y) + kd_weight * D_k`. The scheme's option `together` says which of two forms
    is meant. The second is never larger (Jensen), but their gradients are the same: they differ by how much the others
    disagree, which peer k cannot change.

    * false, the paper's: `D_k = 1/(K-1) sum_{l != k} T^2 KL(sigma_T(z_l) || sigma_T(z_k))`.
    * true ("DML_e"): `D_k = T^2 KL(1/(K-1) sum_{l != k} sigma_T(z_l) || sigma_T(z_k))`, the mean of probabilities.

    Defaults: 1, 1, T 1. Scheme: `count` 2, `alternate` for the paper's order of updates, batches "shared".

    Differs from the printed text:

    * The paper updates one network after the other, each against new answers; the scheme's default is all at once.
    * D'Amicantonio 2021 prints the second form as the method (eq. 30); the default is the paper's.
    * A re-implementation has T 3, lets the gradient reach the peers and averages their logits in the second form; here
      T is 1 as in the paper, peers are constants, and probabilities are averaged.
    """

    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Zhang, Xiang, Hospedales, Lu 2018, CVPR, arXiv:1706.00384"
    scheme: ClassVar[str] = "peers"

    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_positive("temperature", self.temperature)

    def unite(self, members: tuple[View, ...], labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """Logits (B, C) whose softened probabilities are the mean of the members' softened ones."""
        softened = tuple(View(member.logits / self.temperature) for member in members)
        return self.temperature * super().unite(softened, labels, adapters)

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`T^2 KL(teacher || student)`, a scalar; the teacher is another peer, or all others as one."""
        return softened_kl(student.logits, teacher.logits, self.temperature)


@dataclass(frozen=True, kw_only=True)
class Codistillation(Method):
    """Codistillation: copies of a network, each on batches of its own, follow the average answer of the others.

    Anil, Pereyra, Passos, Ormandi, Dahl, Hinton, "Large scale distributed neural network training through online
    distillation", ICLR 2018, arXiv:1804.03235.

    For copy k of N: `ce_weight * CE(z_k, y) + kd_weight * psi`, by `variant`:

    * "cross_entropy": `psi = CE(1/(N-1) sum_{l != k} softmax(z_l), softmax(z_k))`, the paper's. Its gradient is that of
      the second form of deep mutual learning; its value is larger by the entropy of the target.
    * "logits": `psi = mean_{b,c} (1/(N-1) sum_{l != k} z_l - z_k)^2`.

    Defaults: 1, 1. Scheme: `count` 2, `burn_in` 0.1 (labels alone until then), `exchange_interval` above 0 for the
    paper's stale copies, batches "own_images".

    Differs from the printed text:

    * Defaults and the mean of "logits" are ours: the paper names a squared error of logits without its reduction, and
      its burn-in is a number of steps. Nothing here was checked against code, since none was found.
    """

    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Anil, Pereyra, Passos, Ormandi, Dahl, Hinton 2018, ICLR, arXiv:1804.03235"
    reads: ClassVar[tuple[str, ...]] = ("logits", "members")
    scheme: ClassVar[str] = "peers"

    variant: str = "cross_entropy"

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_choice("variant", self.variant, ("cross_entropy", "logits"))

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """None; refuses a teacher that is not made of peers."""
        if not teacher.members:
            raise ValueError("codistillation averages the answers of peers, and the teacher has no members: use peers")
        return nn.ModuleDict()

    def unite(self, members: tuple[View, ...], labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """The log of the members' mean probabilities, or the mean of their logits, (B, C)."""
        if self.variant == "logits":
            return torch.stack([member.logits for member in members]).mean(dim=0)
        return super().unite(members, labels, adapters)

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`psi`, a scalar."""
        if self.variant == "logits":
            return F.mse_loss(student.logits, teacher.logits)
        return F.cross_entropy(student.logits, teacher.logits.softmax(dim=1))
