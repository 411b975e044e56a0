"""The few types that everything else speaks in: `View`, `Phase`, `Clock`, `Method`; KL divergences and checks."""

import math
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
    members: tuple["View", ...] = ()  # the networks of which this one is composed
    # added by the scheme for methods that read them
    strong: "View | None" = None  # the logits for the batch's strongly augmented images
    indices: Tensor | None = None  # (B,) int64, which training images these are
    census: Tensor | None = None  # (N,) int64, the labels of all training images; only when adapters are sized
    network: nn.Module | None = None  # the network itself, to run parts of a `blocks.StagedNet`; a teacher's is frozen
    place: int | None = None  # of peers that teach as one: which of `members` the student itself is

    def only(self, taps: Iterable[str]) -> "View":
        """The same view without the taps that are not named (the logits always stay), so that their memory is freed."""
        taps = [tap for tap in taps if tap != "logits"]
        kept = View(self.logits, **{tap: getattr(self, tap) for tap in taps})
        return kept._replace(members=tuple(member.only(taps) for member in kept.members))

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
    if part is None or isinstance(part, (nn.Module, int)):
        return part
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
    `trains` names modules of the scheme ("student", "student.stages.0", "adapters.regressor"): only they get gradient
    steps and only they are in train mode. The phase lasts `share` of the run's epochs, at least one, with milestones
    scaled likewise, and starts at `rate` times the run's learning rate; `recipe` overrides fields of the run's recipe
    for this phase.
    """

    name: str
    objective: Objective
    trains: tuple[str, ...] = ("student", "adapters")
    recipe: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0
    rate: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a length or a learning rate that is none."""
        require_positive("share", self.share)
        require_positive("rate", self.rate)

    def epochs(self, usual: int) -> int:
        """How many epochs the phase lasts at most, in a run whose recipe says `usual`."""
        return self.recipe.get("epochs", max(1, round(self.share * usual)))


class Clock(nn.Module):
    """Where a phase stands, for losses that change with time: an adapter whose buffers the loop sets every epoch.

    The buffers are scalars on the device, so that reading them waits for nothing and a captured step stays right.
    """

    epoch: Tensor  # 0-based
    epochs: Tensor  # how many the phase has

    def __init__(self) -> None:
        """Start at the first epoch of one."""
        super().__init__()
        self.register_buffer("epoch", torch.zeros(()))
        self.register_buffer("epochs", torch.ones(()))

    def set(self, epoch: int, epochs: int) -> None:
        """Say that the 0-based `epoch` of `epochs` begins."""
        self.epoch.fill_(epoch)
        self.epochs.fill_(epochs)

    def done(self) -> Tensor:
        """The share of the phase that is over when the current epoch ends, in (0, 1]."""
        return (self.epoch + 1) / self.epochs

    def warm_up(self, share: float) -> Tensor:
        """A weight that rises linearly to 1 over the first `share` of the phase; 1 throughout for a share of 0."""
        return (self.done() / share).clamp(max=1) if share else torch.ones_like(self.epoch)


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
    scheme: ClassVar[str] = "offline"  # under which it is trained, if it needs a teacher
    least_batch: ClassVar[int] = 1  # fewer images in a batch leave the loss undefined
    deploys: ClassVar[tuple[str, ...]] = ()  # adapters that the trained student keeps
    bound: ClassVar[bool] = False  # whether it makes no sense but under its own scheme
    counts_itself: ClassVar[bool] = False  # whether peers that teach as one include the student itself

    ce_weight: float = 1.0
    kd_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("ce_weight", "kd_weight"):
            require_at_least_zero(name, getattr(self, name))
        if not (self.ce_weight or self.kd_weight):
            raise ValueError("ce_weight and kd_weight are both 0: there would be nothing to minimise")

    @abstractmethod
    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """The distillation term, a scalar without `kd_weight`; divergences in it are in nats, means over the batch."""

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
        """Extra modules (regressors, projections) sized by two sample views; only those in `deploys` are kept."""
        return nn.ModuleDict()

    def calibrate(self, adapters: nn.ModuleDict, teacher_views: Iterable[View]) -> None:  # noqa: B027 - optional
        """Fill buffers of `adapters` from one pass of the teacher over the plain training images, before training."""

    def initialise(  # noqa: B027 - optional
        self, student: nn.Module, teacher: nn.Module, plain_batches: Iterable[Tensor], adapters: nn.ModuleDict
    ) -> None:
        """Change the student's first weights, before `calibrate` and training.

        `plain_batches` are the training images, in the order of the tap `census`, which `adapters` may have kept.
        """

    def prepares(self) -> bool:
        """Whether a trained teacher or the training images are looked at before training."""
        return any(getattr(type(self), hook) is not getattr(Method, hook) for hook in ("calibrate", "initialise"))

    def unite(self, members: tuple[View, ...], labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """The logits (B, C) of several networks that teach as one: by default the log of their mean probabilities."""
        answers = torch.stack([member.logits for member in members]).log_softmax(dim=2)
        return answers.logsumexp(dim=0) - math.log(len(members))

    def needs_held_out(self) -> bool:
        """Whether held-out images must be kept back from training, for `weigh`."""
        return False

    def weigh(self, adapters: nn.ModuleDict, members: tuple[View, ...], labels: Tensor) -> None:  # noqa: B027 - optional
        """At the start of every epoch: set buffers of `adapters` from the networks' answers for the held-out images."""

    def further(self, student: nn.Module, adapters: nn.ModuleDict) -> dict[str, nn.Module]:
        """Networks that are scored beside the deployed one when training has ended, by name."""
        return {}

    def predict(self, student: View, adapters: nn.ModuleDict) -> Tensor:
        """The logits (B, C) of the deployed student, from its view and the adapters that it keeps."""
        return student.logits

    def phases(self) -> tuple[Phase, ...]:
        """The training phases, in order; by default one, over student and adapters, with `objective`."""
        return (Phase("distil", self.objective),)


def without_decay(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter as one that weight decay leaves alone; returns it."""
    parameter.kdstudy_without_decay = True
    return parameter


def is_without_decay(parameter: nn.Parameter) -> bool:
    """Whether `without_decay` has marked it."""
    return getattr(parameter, "kdstudy_without_decay", False)


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


def require_share(name: str, value: float) -> None:
    """Raise a ValueError that names the hyperparameter unless `value` is a number from 0 to 1."""
    require_at_least_zero(name, value)
    if value > 1:
        raise ValueError(f"{name} must be at most 1, not {value!r}")


def require_whole(name: str, value: int, least: int = 1) -> None:
    """Raise a ValueError that names the hyperparameter unless `value` is an int of at least `least`."""
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ValueError that lists the allowed values unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
