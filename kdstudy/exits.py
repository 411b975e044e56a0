"""Methods on auxiliary classifiers: training a teacher's heads, task-oriented features, relative targets per head.

The heads read the maps of all stages but the last; a network's own classifier counts as the deepest head. A teacher
brings its heads as `exits`; a student's are adapters, trained with it and dropped afterwards. Shapes: logits (B, C),
labels (B,), embeddings (B, d). `KL` and `CE` average over the batch, in nats.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.core import (
    Clock,
    Method,
    Phase,
    View,
    require_at_least_zero,
    require_choice,
    require_positive,
    softened_kl,
)
from kdstudy.edits import relative_v2, relative_v4
from kdstudy.heads import HEADS, exits_of


@dataclass(frozen=True, kw_only=True)
class HeadTraining(Method):
    """Heads for a finished teacher: no distillation, but what makes a teacher for methods that read its `exits`.

    `ce_weight * sum_i CE(h_i, y)` over the heads h_i: independent problems. The student is the teacher's network with
    heads, such as wrn_40_2+heads for wrn_40_2. Its backbone becomes a copy of the teacher that stays as it is, batch
    statistics included. The phase lasts 0.3 of the run's epochs: 60 of 200, milestones likewise.
    """

    kind: ClassVar[str] = "none"
    paper: ClassVar[str] = "none (prepares a teacher)"
    reads: ClassVar[tuple[str, ...]] = ("exits",)

    kd_weight: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a weight on a term that does not exist."""
        super().__post_init__()
        if self.kd_weight:
            raise ValueError(f"kd_weight must be 0, not {self.kd_weight!r}: heads are trained on the labels alone")

    def initialise(
        self, student: nn.Module, teacher: nn.Module, plain_batches: Iterable[Tensor], adapters: nn.ModuleDict
    ) -> None:
        """Copy the teacher into the student's backbone and freeze that. Raises ValueError if there is no such copy."""
        weights, backbone = teacher.state_dict(), getattr(student, "backbone", None)
        if backbone is None or _shapes(weights) != _shapes(backbone.state_dict()):
            raise ValueError("the student must be the teacher's own network with heads: wrn_40_2+heads for wrn_40_2")
        backbone.load_state_dict(weights)
        backbone.requires_grad_(False)

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """Zero, without a gradient."""
        return student.logits.new_zeros(())

    def objective(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> dict[str, Tensor]:
        """The weighted cross-entropy of each head."""
        return {
            f"head{number}_ce": self.ce_weight * F.cross_entropy(head.logits, labels)
            for number, head in enumerate(student.exits, start=1)
        }

    def phases(self) -> tuple[Phase, ...]:
        """One phase, over the heads."""
        return (Phase("heads", self.objective, trains=("student.heads",), share=0.3),)


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def _heads_for(kind: str, student: View, teacher: View) -> nn.ModuleList:
    """Heads for a student whose teacher has one for each of them."""
    if student.exits:
        raise ValueError("the student must be a network without heads: they are trained beside it and dropped")
    heads = HEADS[kind](student)
    if len(teacher.exits) != len(heads):
        raise ValueError(
            f"heads pair by stage, so the teacher must have {len(heads)}, not {len(teacher.exits)}: it must be a "
            f"network like wrn_40_2+{kind}, trained by the method heads"
        )
    return heads


def _with_exits(student: View, adapters: nn.ModuleDict) -> View:
    """The view with what the student's heads say; unchanged if they have been asked already."""
    return student if student.exits else student._replace(exits=exits_of(adapters["heads"], student.maps))


@dataclass(frozen=True, kw_only=True)
class TOFD(Method):
    """Task-oriented feature distillation: features are matched where heads have made them serve the task.

    Zhang, Shi, Shi, Ma, Bao, "Task-Oriented Feature Distillation", NeurIPS 2020.

    With heads i of both networks, their logits `h`, embeddings `v` and the classifier as the deepest of them:
    `sum_i [ce_weight * CE(h_s,i, y) + kd_weight * CE(softmax(h_s,i / T), softmax(h_t,i / T))
    + feature_weight * ||v_s,i W_i^T - v_t,i||_F + orthogonal_weight * (||W_i W_i^T - I||_F + ||W_i^T W_i - I||_F)]`,
    where the projections W_i (d_t, d_s) are trained with the student. The feature norm is that of the whole (B, d_t)
    difference, not squared. T rises linearly from 1 to `temperature` over the run, without a factor `T^2`. The
    student's heads are `separable_heads`, as the teacher's should be. Defaults as released: 1, 1, 0.05, 0.03, T 4.

    The feature norm is no mean: it grows with the root of the batch size, so that 0.05 holds for the 128 images of the
    paper. Where d_s and d_t differ, the larger of the two orthogonal norms cannot fall below `sqrt(|d_s - d_t|)`.

    Differs from the printed text:

    * The teacher's heads are trained on the finished, frozen teacher (method heads), and it stays in eval mode; the
      released code leaves it in train mode.
    * T is 1 + 3 (e + 1) / 250 in epoch e; here the run's own length stands for 250.
    * A head has one unit per later stage: 3, 2, 1 for four stages, as in the paper, and 2, 1 for three. Global average
      pooling replaces that over 4 x 4, which is the same for images of 32 pixels.
    * The released loop makes one step per epoch, with an optimiser that it makes anew: taken for slips.
    """

    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Zhang, Shi, Shi, Ma, Bao 2020, NeurIPS"
    reads: ClassVar[tuple[str, ...]] = ("maps", "embedding", "exits")

    feature_weight: float = 0.05
    orthogonal_weight: float = 0.03
    temperature: float = 4.0

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        for name in ("feature_weight", "orthogonal_weight"):
            require_at_least_zero(name, getattr(self, name))
        require_positive("temperature", self.temperature)

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`sum_i CE(softmax(h_s,i / T), softmax(h_t,i / T))`, a scalar; without a clock at the final T."""
        done = adapters["clock"].done() if "clock" in adapters else 1
        temperature = 1 + (self.temperature - 1) * done
        pairs = self.pairs(_with_exits(student, adapters), teacher)
        return sum(F.cross_entropy(s.logits / temperature, (t.logits / temperature).softmax(dim=1)) for s, t in pairs)

    def label_loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`sum_i CE(h_s,i, y)`, a scalar."""
        pairs = self.pairs(_with_exits(student, adapters), teacher)
        return sum(F.cross_entropy(s.logits, labels) for s, _ in pairs)

    def objective(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> dict[str, Tensor]:
        """The weighted terms, each summed over the heads."""
        student = _with_exits(student, adapters)
        terms = super().objective(student, teacher, labels, adapters)
        links = adapters["links"]
        if self.feature_weight:
            triples = zip(links, self.pairs(student, teacher), strict=True)
            distances = [torch.linalg.matrix_norm(link(s.embedding) - t.embedding) for link, (s, t) in triples]
            terms["feature"] = self.feature_weight * sum(distances)
        if self.orthogonal_weight:
            terms["orthogonal"] = self.orthogonal_weight * sum(distance_from_orthogonal(link.weight) for link in links)
        return terms

    def pairs(self, student: View, teacher: View) -> list[tuple[View, View]]:
        """The views of the student's and the teacher's heads, shallow to deep, the classifiers' last."""
        return list(zip((*student.exits, student), (*teacher.exits, teacher), strict=True))

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """Heads, one projection per head and for the classifier, and the clock. ValueError if heads do not pair."""
        heads = _heads_for("sepheads", student, teacher)
        own = [head.classifier.in_features for head in heads] + [student.embedding.shape[1]]
        given = [view.embedding.shape[1] for view in (*teacher.exits, teacher)]
        links = [nn.Linear(d_s, d_t, bias=False) for d_s, d_t in zip(own, given, strict=True)]
        return nn.ModuleDict({"heads": heads, "links": nn.ModuleList(links), "clock": Clock()})


def distance_from_orthogonal(weight: Tensor) -> Tensor:
    """`||W W^T - I||_F + ||W^T W - I||_F` of a matrix W (m, n), a scalar."""
    products = weight @ weight.T, weight.T @ weight
    return sum(torch.linalg.matrix_norm(x - torch.eye(len(x), dtype=x.dtype, device=x.device)) for x in products)


Edit = Callable[[Tensor, Tensor], Tensor]


def _unedited(logits: Tensor, labels: Tensor) -> Tensor:
    return logits


EDITS: dict[str, Edit] = {"none": _unedited, "relative_v2": relative_v2, "relative_v4": relative_v4}


@dataclass(frozen=True, kw_only=True)
class RelativeHeads(Method):
    """Relative distillation on heads: does editing the teacher's target help intermediate predictions?

    A proposal of this study: the edits of D'Amicantonio 2021 (`edits.py`) on heads as in Zhang et al. 2019.

    `ce_weight * CE(z_s, y) + kd_weight * T^2 KL(softmax(z_t / T) || softmax(z_s / T)) + sum_i [head_ce_weight *
    CE(h_s,i, y) + head_kd_weight * T^2 KL(softmax(E(h_t,i, y) / T) || softmax(h_s,i / T))]`, heads i paired by stage.
    E edits the raw logits of its own head alone, sample by sample, and judges right and wrong by that head's own
    argmax: `edit` "relative_v2", "relative_v4", or "none", the control, which is plain distillation on the same heads.
    `edit_final` edits the target z_t, too. The student's heads are `bottleneck_heads`, as the teacher's should be.
    Defaults: 0.3, 0.7 and T 2 as for the edits on the logits, and the same weights on each head.

    `head_kd_weight=0` trains the heads on labels alone. `edit_rates` tells how often an edit does what.
    """

    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "none (proposed here)"
    reads: ClassVar[tuple[str, ...]] = ("maps", "exits")

    ce_weight: float = 0.3
    kd_weight: float = 0.7
    head_ce_weight: float = 0.3
    head_kd_weight: float = 0.7
    temperature: float = 2.0
    edit: str = "relative_v2"
    edit_final: bool = False

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        for name in ("head_ce_weight", "head_kd_weight"):
            require_at_least_zero(name, getattr(self, name))
        if not (self.head_ce_weight or self.head_kd_weight):
            raise ValueError("head_ce_weight and head_kd_weight are both 0: without heads the method is kd")
        require_positive("temperature", self.temperature)
        require_choice("edit", self.edit, tuple(EDITS))

    def target(self, head_logits: Tensor, labels: Tensor) -> Tensor:
        """The edited logits of one of the teacher's heads, (B, C)."""
        return EDITS[self.edit](head_logits, labels)

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`T^2 KL(softmax(z_t / T) || softmax(z_s / T))` of the classifiers, a scalar."""
        target = self.target(teacher.logits, labels) if self.edit_final else teacher.logits
        return softened_kl(student.logits, target, self.temperature)

    def objective(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> dict[str, Tensor]:
        """The weighted terms of the classifier and, numbered from 1, of each head."""
        terms = super().objective(student, teacher, labels, adapters)
        pairs = zip(_with_exits(student, adapters).exits, teacher.exits, strict=True)
        for number, (s, t) in enumerate(pairs, start=1):
            if self.head_ce_weight:
                terms[f"head{number}_ce"] = self.head_ce_weight * F.cross_entropy(s.logits, labels)
            if self.head_kd_weight:
                kl = softened_kl(s.logits, self.target(t.logits, labels), self.temperature)
                terms[f"head{number}_kd"] = self.head_kd_weight * kl
        return terms

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """The student's heads. Raises ValueError if they do not pair with the teacher's."""
        return nn.ModuleDict({"heads": _heads_for("heads", student, teacher)})


class EditRates(NamedTuple):
    """How often an edit does what to the targets of one head, as shares of 0 to 1."""

    raised: float  # of all samples: the head is wrong and its logit for the label is raised
    lowered: float  # of all samples: a logit is to be lowered
    unchanged: float  # of the lowered ones: not even the first step fits, so that the target stays; NaN without any


@torch.no_grad()
def edit_rates(edit: str, exits: Sequence[View], labels: Tensor) -> list[EditRates]:
    """What an edit of `RelativeHeads` does to the targets of a teacher's exits, for labels (B,). Waits for the device.

    ValueError for an unknown edit, and for "none", which does nothing.
    """
    require_choice("edit", edit, tuple(name for name in EDITS if name != "none"))
    rates = []
    for logits in (view.logits for view in exits):
        wrong = logits.argmax(dim=1) != labels
        raised = wrong if edit == "relative_v2" else torch.zeros_like(wrong)
        same = (EDITS[edit](logits, labels) == logits).all(dim=1)
        shares = raised.double().mean(), (~raised).double().mean(), same[~raised].double().mean()
        rates.append(EditRates(*(share.item() for share in shares)))
    return rates
