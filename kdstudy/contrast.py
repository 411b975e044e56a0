"""Contrastive methods: the two networks' embeddings of an image are told from those of other images."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.adapters import require_taps
from kdstudy.core import Method, View, require_at_least_zero, require_positive, require_whole


class Bank(nn.Module):
    """The latest embeddings of all N training images, by one network; and the constant that scores against them share.

    `log_z` is NaN until the first batch in train mode has fixed it.
    """

    rows: Tensor  # (N, D), of length 1 but for the first ones
    log_z: Tensor

    def __init__(self, images: int, dimension: int) -> None:
        """Rows are uniform in -s..s with s = (D / 3)^-1/2, so that their mean squared length is 1."""
        super().__init__()
        bound = (dimension / 3) ** -0.5
        self.register_buffer("rows", torch.empty(images, dimension).uniform_(-bound, bound))
        self.register_buffer("log_z", torch.tensor(float("nan")))

    def log_scores(self, embedding: Tensor, chosen: Tensor, temperature: float) -> Tensor:
        """`v . M[j] / temperature - log Z` of embeddings v (B, D) for the rows j in `chosen` (B, J), (B, J)."""
        # all N products and then J of them: the J rows themselves would be D times as large. The copy is what the
        # backward pass reads, as `update` writes into the rows before it
        scores = (embedding @ self.rows.clone().T / temperature).gather(1, chosen)
        return scores - self._constant(scores.detach())

    def _constant(self, scores: Tensor) -> Tensor:
        fresh = scores.logsumexp(dim=(0, 1)) - math.log(scores.numel()) + math.log(len(self.rows))
        log_z = torch.where(self.log_z.isnan(), fresh, self.log_z)
        if self.training:
            self.log_z.copy_(log_z)
        return log_z

    @torch.no_grad()
    def update(self, indices: Tensor, embedding: Tensor, momentum: float) -> None:
        """Move the rows of these images towards their new embeddings, to length 1 again; not in eval mode."""
        if self.training:
            moved = momentum * self.rows.index_select(0, indices) + (1 - momentum) * embedding
            self.rows.index_copy_(0, indices, F.normalize(moved, dim=1))


class Negatives(nn.Module):
    """Draws images of other classes, as a buffer of all training labels knows them."""

    census: Tensor  # (N,) int64

    def __init__(self, census: Tensor, wanted: int) -> None:
        """`count` is `wanted`, or what the largest class leaves if that is less; ValueError if it leaves nothing."""
        super().__init__()
        self.register_buffer("census", census)
        self.count = min(wanted, len(census) - int(census.bincount().max()))
        if self.count < 1:
            raise ValueError("contrastive distillation needs training images of at least two classes")

    def draw(self, labels: Tensor) -> Tensor:
        """For each of `labels` (B,) so many different images of other classes, (B, count), uniformly."""
        order = torch.rand(len(labels), len(self.census), device=labels.device)
        return order.masked_fill_(self.census == labels.unsqueeze(1), -1.0).topk(self.count, sorted=False).indices


@dataclass(frozen=True, kw_only=True)
class CRD(Method):
    """Contrastive representation distillation (CRD): an image's embeddings by both networks, told from other classes'.

    Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020.

    Linear maps take both embeddings to `dimension` D, then length 1: v_s and v_t (B, D); both are trained. Two banks
    M_s, M_t (N, D) hold these for all N training images. An image i is compared with itself, j_0 = i, and with K =
    `negatives` images j_1..j_K of other classes, drawn without replacement. Each side is scored against the other's
    bank: with `a_k = exp(v_s . M_t[j_k] / temperature) / Z` and c = K / N,
    `L_s = mean_b [-log(a_0 / (a_0 + c)) - sum_k log(c / (a_k + c))]`, in nats; L_t likewise of v_t and M_s.
    `ce_weight * CE + kd_weight * (L_s + L_t)`. Z, one per side, is N times the mean exponential of the first batch,
    fixed. After the scores `M[i] <- momentum M[i] + (1 - momentum) v`, to length 1. Where the largest class leaves
    fewer than K others, K is that many. Defaults as released: 0.8, K 16384, temperature 0.07, momentum 0.5, D 128.

    Differs from the printed text:

    * Z is an estimate from one batch, c uses N: as released. The paper's critic has no such constant.
    * In logarithms, `-log sigmoid(log a_0 - log c) - sum_k log sigmoid(log c - log a_k)`; the release adds 1e-7.
    * All (B, N) products are made, then the K + 1 that count taken: the same values as from a (B, K + 1, D) gather.
    """

    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Tian, Krishnan, Isola 2020, ICLR"
    reads: ClassVar[tuple[str, ...]] = ("embedding", "indices", "census")

    kd_weight: float = 0.8
    negatives: int = 16384
    temperature: float = 0.07
    momentum: float = 0.5
    dimension: int = 128

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        for name in ("negatives", "dimension"):
            require_whole(name, getattr(self, name))
        require_positive("temperature", self.temperature)
        require_at_least_zero("momentum", self.momentum)
        if self.momentum >= 1:
            raise ValueError(f"momentum must be below 1, not {self.momentum!r}: the banks would never change")

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """The linear maps, the banks and the labels of all training images, from which negatives are drawn."""
        if student.census is None:
            raise ValueError("contrastive distillation needs the labels of all training images (the tap `census`)")
        banks = {name: Bank(len(student.census), self.dimension) for name in ("student_bank", "teacher_bank")}
        negatives = Negatives(student.census, self.negatives)
        return nn.ModuleDict({**_embedders(student, teacher, self.dimension), **banks, "negatives": negatives})

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`L_s + L_t`, a scalar; in train mode the banks move on."""
        v_s, v_t = _embedded(student, teacher, adapters)
        chosen = torch.cat([student.indices.unsqueeze(1), adapters["negatives"].draw(labels)], dim=1)
        sides = ((v_s, adapters["teacher_bank"]), (v_t, adapters["student_bank"]))
        total = sum(_contrast(bank.log_scores(v, chosen, self.temperature), len(bank.rows)) for v, bank in sides)
        adapters["student_bank"].update(student.indices, v_s.detach(), self.momentum)
        adapters["teacher_bank"].update(student.indices, v_t.detach(), self.momentum)
        return total


def _contrast(log_scores: Tensor, images: int) -> Tensor:
    """The loss of one side, a scalar, from `log a` (B, K + 1), the positive first."""
    log_c = math.log((log_scores.shape[1] - 1) / images)
    positive, negative = log_scores[:, 0], log_scores[:, 1:]
    return -(F.logsigmoid(positive - log_c) + F.logsigmoid(log_c - negative).sum(dim=1)).mean()


@dataclass(frozen=True, kw_only=True)
class InBatchCRD(Method):
    """Contrastive distillation without a memory: an image's embedding by the one network finds that by the other.

    Loss of van den Oord, Li, Vinyals, "Representation Learning with Contrastive Predictive Coding", arXiv:1807.03748
    (2018), on the embeddings of Tian et al. 2020 (CRD); not the method of either.

    With v_s and v_t (B, D) as in CRD, `L = mean_i -log softmax_j(v_s,i . v_t,j / temperature)_i`, in nats, plus the
    same with student and teacher exchanged; `ce_weight * CE + kd_weight * L`. The other images of the batch are the
    negatives, those of the same class among them. No text has defaults: here 0.8, temperature 0.1, D 128.
    """

    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "after van den Oord, Li, Vinyals 2018, arXiv:1807.03748"
    reads: ClassVar[tuple[str, ...]] = ("embedding",)
    least_batch: ClassVar[int] = 2

    kd_weight: float = 0.8
    temperature: float = 0.1
    dimension: int = 128

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_positive("temperature", self.temperature)
        require_whole("dimension", self.dimension)

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """The linear maps."""
        return nn.ModuleDict(_embedders(student, teacher, self.dimension))

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """InfoNCE in both directions, summed, a scalar."""
        v_s, v_t = _embedded(student, teacher, adapters)
        scores = v_s @ v_t.T / self.temperature
        itself = torch.arange(len(scores), device=scores.device)
        return F.cross_entropy(scores, itself) + F.cross_entropy(scores.T, itself)


def _embedders(student: View, teacher: View, dimension: int) -> dict[str, nn.Module]:
    require_taps(("embedding",), student, teacher)
    sides = {"student": student, "teacher": teacher}
    return {f"{side}_embedder": nn.Linear(view.embedding.shape[1], dimension) for side, view in sides.items()}


def _embedded(student: View, teacher: View, adapters: nn.ModuleDict) -> tuple[Tensor, Tensor]:
    """Both embeddings in the common space, of length 1."""
    v_s = adapters["student_embedder"](student.embedding)
    v_t = adapters["teacher_embedder"](teacher.embedding)
    return F.normalize(v_s, dim=1), F.normalize(v_t, dim=1)
