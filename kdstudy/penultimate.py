"""Methods on what the classifier reads, the embedding f (B, D): class-distance loss and feature normalisation."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.adapters import require_taps
from kdstudy.core import Method, Phase, View, require_positive

CLASS_DISTANCE = "Kim, Kim 2017, ICLR workshop"


@dataclass(frozen=True, kw_only=True)
class ClassDistance(Method):
    """Class-distance distillation: the student regresses the teacher's embedding.

    S. W. Kim, H.-E. Kim, "Transferring Knowledge to Smaller Network with Class-Distance Loss", ICLR workshop 2017.

    `ce_weight * CE(z_s, y) + kd_weight * mean_b ||r(f_s) - f_t||_2^2`, a sum over the D values of the embedding; r is a
    linear layer where the widths differ, else nothing. The teacher is meant to be trained with `ClassDistanceTeacher`.
    By default the student trains a classifier of its own. With `reuse_classifier` it starts with the teacher's last
    layer and keeps that as it is. The weight is ours: the paper's is not known.

    Differs from the printed text:

    * Both terms are minimised at once; the paper regresses first.
    """

    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = CLASS_DISTANCE
    reads: ClassVar[tuple[str, ...]] = ("embedding",)

    kd_weight: float = 0.1
    reuse_classifier: bool = False

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """A linear layer from the student's embedding to the teacher's, if the widths differ."""
        require_taps(("embedding",), student, teacher)
        widths = student.embedding.shape[1], teacher.embedding.shape[1]
        if widths[0] == widths[1]:
            return nn.ModuleDict({"regressor": nn.Identity()})
        if self.reuse_classifier:
            raise ValueError(f"reuse_classifier needs embeddings of one width, not {widths[0]} and {widths[1]}")
        return nn.ModuleDict({"regressor": nn.Linear(*widths)})

    @torch.no_grad()
    def initialise(
        self, student: nn.Module, teacher: nn.Module, plain_batches: Iterable[Tensor], adapters: nn.ModuleDict
    ) -> None:
        """Give the student the teacher's classifier, if it is to reuse it."""
        if self.reuse_classifier:
            student.classifier.load_state_dict(teacher.classifier.state_dict())

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`mean_b ||r(f_s) - f_t||_2^2`, a scalar."""
        difference = adapters["regressor"](student.embedding) - teacher.embedding
        return difference.square().sum(dim=1).mean()

    def phases(self) -> tuple[Phase, ...]:
        """One; a classifier that is reused is not trained in it."""
        if not self.reuse_classifier:
            return super().phases()
        return (Phase("distil", self.objective, trains=("student.stem", "student.stages", "student.embed")),)


class ClassMeans(nn.Module):
    """Running means of the embeddings of each class, and whether the class has been seen: buffers, no parameters."""

    means: Tensor  # (C, D)
    seen: Tensor  # (C,) 1 or 0

    def __init__(self, classes: int, width: int, momentum: float) -> None:
        """`momentum` is the share of the old mean that a batch leaves."""
        super().__init__()
        self.momentum = momentum
        self.register_buffer("means", torch.zeros(classes, width))
        self.register_buffer("seen", torch.zeros(classes))

    @torch.no_grad()
    def started(self, embedding: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The means (C, D), those of classes that are new in this batch taken from it, and which are known (C,)."""
        batch_means, present = self._of_batch(embedding, labels)
        return torch.where(self.seen.unsqueeze(1) > 0, self.means, batch_means), self.seen.maximum(present)

    @torch.no_grad()
    def update(self, embedding: Tensor, labels: Tensor) -> None:
        """Move the means of the batch's classes towards the batch's; nothing in eval mode."""
        if not self.training:
            return
        batch_means, present = self._of_batch(embedding, labels)
        means, seen = self.started(embedding, labels)
        self.means.copy_(means + (1 - self.momentum) * present.unsqueeze(1) * (batch_means - means))
        self.seen.copy_(seen)

    def _of_batch(self, embedding: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        member = _memberships(labels, len(self.seen)).to(embedding)
        counts = member.sum(dim=0)
        return member.T @ embedding / counts.clamp(min=1).unsqueeze(1), counts.clamp(max=1)


@dataclass(frozen=True, kw_only=True)
class ClassDistanceTeacher(Method):
    """Class-distance loss for the teacher: embeddings that are dense within a class and apart between classes.

    S. W. Kim, H.-E. Kim, "Transferring Knowledge to Smaller Network with Class-Distance Loss", ICLR workshop 2017.

    `ce_weight * CE(z, y) + kd_weight * mean_b [||f_b - mu_y||_2^2 + mean_{c != y} relu(margin - ||f_b - mu_c||_2)^2]`.
    mu_c is the running mean of class c's embeddings, without a gradient: it starts at the class's mean in the first
    batch that holds the class and is moved after each step's loss by `1 - momentum` of the way to the batch's mean.
    Classes not seen yet are left out of the mean over c. Defaults, all but the first ours: 1, 1e-3, 10, 0.9.

    Differs from the printed text:

    * No formula could be had: this is a reconstruction from the abstract (dense clusters per class) and from a thesis's
      sentence (a distance to the other classes' mean, minus a threshold of the class), which leaves the sign open.
    * One margin for all classes, not one per class.
    """

    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = CLASS_DISTANCE
    reads: ClassVar[tuple[str, ...]] = ("embedding",)
    needs_teacher: ClassVar[bool] = False

    kd_weight: float = 1e-3
    margin: float = 10.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_positive("margin", self.margin)
        require_positive("momentum", self.momentum)
        if self.momentum >= 1:
            raise ValueError(f"momentum must be below 1, not {self.momentum!r}")

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """Buffers for the class means, as wide as the network's own embedding."""
        require_taps(("embedding",), student, student)  # there is no teacher
        classes, width = student.logits.shape[1], student.embedding.shape[1]
        return nn.ModuleDict({"class_means": ClassMeans(classes, width, self.momentum)})

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """The mean of the pull to the own class's mean and the push from the others', a scalar."""
        embedding, class_means = student.embedding, adapters["class_means"]
        means, known = class_means.started(embedding, labels)
        pull = (embedding - means[labels]).square().sum(dim=1)
        distances = torch.cdist(embedding, means, compute_mode="donot_use_mm_for_euclid_dist")
        others = known * ~_memberships(labels, len(known))
        push = (others * (self.margin - distances).relu().square()).sum(dim=1) / others.sum(dim=1).clamp(min=1)
        loss = (pull + push).mean()
        class_means.update(embedding, labels)
        return loss


@dataclass(frozen=True, kw_only=True)
class FeatureNormalised(Method):
    """Feature-normalised distillation: the length of the embedding takes the temperature's place, sample by sample.

    Xu, Rui, Li, Gu, "Feature Normalized Knowledge Distillation for Image Classification", ECCV 2020.

    `n(z) = W min(||f||_2, tau) f / ||f||_2 + b` with each network's own classifier W, b and embedding f;
    `ce_weight * CE(z_s, y) + kd_weight * mean_b -sum_c softmax(n(z_t))_c log softmax(n(z_s))_c`, at temperature 1.
    Gradient goes through the student's length, unless it is cut, and its classifier; CE and prediction use its ordinary
    logits. Defaults as released: 1, 9, tau 2.

    Differs from the printed text:

    * Embeddings shorter than tau stay as they are, as released; the paper divides all by their length.
    """

    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Xu, Rui, Li, Gu 2020, ECCV"
    reads: ClassVar[tuple[str, ...]] = ("embedding", "network")

    kd_weight: float = 9.0
    tau: float = 2.0

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_positive("tau", self.tau)

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """None; refuses networks without an embedding or a classifier on it."""
        require_taps(("embedding",), student, teacher)
        for view in (student, teacher):
            if not hasattr(view.network, "classifier"):
                raise ValueError("the method needs networks that end in a `classifier` on their embedding")
        return nn.ModuleDict()

    def normalised_logits(self, view: View) -> Tensor:
        """What the view's classifier makes of its shortened embedding, (B, C)."""
        # this form has a gradient at 0, too
        scale = self.tau / view.embedding.norm(dim=1, keepdim=True).clamp(min=self.tau)
        return view.network.classifier(scale * view.embedding)

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """The soft cross-entropy of the normalised logits, a scalar in nats."""
        target = self.normalised_logits(teacher).softmax(dim=1)
        return F.cross_entropy(self.normalised_logits(student), target)


def _memberships(labels: Tensor, classes: int) -> Tensor:
    # (B, C) bool; `F.one_hot` would wait for the device
    return labels.unsqueeze(1) == torch.arange(classes, device=labels.device)
