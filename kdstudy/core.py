"""The few types that everything else speaks in: `View`, `Phase`, `Method`; and the softened KL divergence."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class View(NamedTuple):
    """What a network shows for a batch of B images; nothing else taps a network.

    `maps` holds the output of stage 1..S and `pre_maps` the same stages before their last activation, so that
    `maps[0]` and `pre_maps[0]` belong together; `stem` is the map that enters stage 1.
    """

    logits: Tensor  # (B, C)
    stem: Tensor | None = None  # (B, c, h, w)
    maps: tuple[Tensor, ...] = ()  # S x (B, c, h, w)
    pre_maps: tuple[Tensor, ...] = ()  # S x (B, c, h, w), may be negative
    embedding: Tensor | None = None  # (B, D), what the classifier reads
    exits: tuple["View", ...] = ()  # early classifiers, shallow to deep

    def only(self, taps: Iterable[str]) -> "View":
        """The same view without the taps that are not named (the logits always stay), so that their memory is freed."""
        return View(self.logits, **{tap: getattr(self, tap) for tap in taps if tap != "logits"})

    def map(self, function: Callable[[Tensor], Tensor]) -> "View":
        """A view with `function` applied to every tensor."""
        return View(*(_map(part, function) for part in self))

    def detach(self) -> "View":
        """A view that passes no gradient on."""
        return self.map(Tensor.detach)

    def full_precision(self) -> "View":
        """Half-precision taps as float32; float32 and float64 stay as they are. Losses are computed on this."""
        return self.map(lambda x: x.float() if x.dtype in (torch.bfloat16, torch.float16) else x)


def _map(part: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if part is None:
        return None
    if isinstance(part, View):
        return part.map(function)
    if isinstance(part, tuple):
        return tuple(_map(item, function) for item in part)
    return function(part)


Objective = Callable[[View, View, Tensor, nn.ModuleDict], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Phase:
    """A stretch of training in which one objective is minimised over one set of modules.

    `objective` maps (student view, teacher view, labels, adapters) to named, weighted terms; their sum is minimised.
    `trains` names modules of the scheme ("student", "adapters", "adapters.regressor"): only they get gradient
    steps and only they are in train mode. `recipe` overrides fields of the run's recipe for this phase.
    """

    name: str
    objective: Objective
    trains: tuple[str, ...] = ("student", "adapters")
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def epochs(self, usual: int) -> int:
        """How many epochs the phase lasts at most, in a run whose recipe says `usual`."""
        return self.recipe.get("epochs", usual)


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """What knowledge is matched. Fields are the hyperparameters; `ce_weight * CE + kd_weight * loss` is minimised.

    A method holds no state and knows nothing of who plays the teacher. Subclasses are final: methods share code through
    functions, never by inheriting from each other.
    """

    kind: ClassVar[str]  # "none", "response", "feature", "relation"
    paper: ClassVar[str]  # authors, year, where
    reads: ClassVar[tuple[str, ...]] = ("logits",)  # taps of the View that the objective may touch
    needs_teacher: ClassVar[bool] = True

    ce_weight: float = 1.0
    kd_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("ce_weight", "kd_weight"):
            require_at_least_zero(name, getattr(self, name))
        if not (self.ce_weight or self.kd_weight):
            raise ValueError("ce_weight and kd_weight are both 0: there would be nothing to minimise")

    @abstractmethod
    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """The distillation term, a scalar in nats: mean over the batch, natural logarithms, without `kd_weight`."""

    def label_loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """The hard-label term, a scalar in nats, without `ce_weight`: cross-entropy of the student's logits."""
        return F.cross_entropy(student.logits, labels)

    def objective(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> dict[str, Tensor]:
        """The weighted terms of the ordinary training phase; a weight of zero leaves its term out."""
        terms = {}
        if self.ce_weight:
            terms["ce"] = self.ce_weight * self.label_loss(student, teacher, labels, adapters)
        if self.kd_weight:
            terms["kd"] = self.kd_weight * self.loss(student, teacher, labels, adapters)
        return terms

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """Extra modules (regressors, projections) sized by two sample views; trained with the student, not deployed."""
        return nn.ModuleDict()

    def calibrate(self, adapters: nn.ModuleDict, teacher_views: Iterable[View]) -> None:  # noqa: B027 - optional
        """Fill buffers of `adapters` from one pass of the teacher over the plain training images, before training."""

    def phases(self) -> tuple[Phase, ...]:
        """The training phases, in order; by default one, over student and adapters, with `objective`."""
        return (Phase("distil", self.objective),)


def softened_kl(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor, reduction: str = "mean"
) -> Tensor:
    """`T^2 KL(softmax(z_t / T) || softmax(z_s / T))` of (B, C) logits, in nats.

    `temperature` is a number or one per sample, (B,). "mean" averages over the batch to a scalar, "none" gives (B,).
    """
    scale = temperature.unsqueeze(1) if isinstance(temperature, Tensor) else temperature
    target = F.log_softmax(teacher_logits / scale, dim=1)
    prediction = F.log_softmax(student_logits / scale, dim=1)
    rows = temperature**2 * (target.exp() * (target - prediction)).sum(dim=1)
    return _reduce(rows, reduction)


def target_kl(student_logits: Tensor, target: Tensor, temperature: float, reduction: str = "mean") -> Tensor:
    """`T^2 sum_c p_c (log p_c - log softmax(z_s / T)_c)` for given targets p (B, C), with 0 log 0 = 0, in nats."""
    prediction = F.log_softmax(student_logits / temperature, dim=1)
    rows = temperature**2 * (torch.xlogy(target, target) - target * prediction).sum(dim=1)
    return _reduce(rows, reduction)


def _reduce(rows: Tensor, reduction: str) -> Tensor:
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', not {reduction!r}")
    return rows.mean() if reduction == "mean" else rows


def require_positive(name: str, value: float) -> None:
    """Raise a ValueError that names the hyperparameter unless `value` is a finite number above zero."""
    if not _is_number(value) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a finite number above 0, not {value!r}")


def require_at_least_zero(name: str, value: float) -> None:
    """Raise a ValueError that names the hyperparameter unless `value` is a finite number of at least zero."""
    if not _is_number(value) or not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number of at least 0, not {value!r}")


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ValueError that lists the allowed values unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
