"""Several teachers at once: three plain ways to average them, and weights that follow their gradients (AE-KD).

The teacher is a `models.Ensemble`; its view's `members` are the views of its M networks, each with logits z_m (B, C).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.adapters import same_size, widen
from kdstudy.core import (
    Method,
    View,
    require_at_least_zero,
    require_choice,
    require_positive,
    require_share,
    softened_kl,
    target_kl,
)

RIDGE = 1e-10  # of the Gram matrix's trace: makes the weights unique, and equal where the gradients are
MOST_TEACHERS = 8  # `agreeing_weights` looks at 3^M faces


def _require_members(teacher: View) -> None:
    if not teacher.members:
        raise ValueError("the method needs an ensemble of teachers, not a single network: the view has no members")


@dataclass(frozen=True, kw_only=True)
class AveragedTeachers(Method):
    """Distillation from the average of several teachers.

    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", NIPS 2014 workshop, arXiv:1503.02531.

    `ce_weight * CE(z_s, y) + kd_weight * D`, where `average` says what is averaged over the M members, with sigma_T(z)
    = softmax(z / T):

    * "probabilities": `D = T^2 KL(mean_m sigma_T(z_m) || sigma_T(z_s))`, the arithmetic mean.
    * "logits": `D = T^2 KL(sigma_T(mean_m z_m) || sigma_T(z_s))`, the normalised geometric mean of the probabilities.
    * "losses": `D = mean_m T^2 KL(sigma_T(z_m) || sigma_T(z_s))`. Its gradient is that of "probabilities": the two
      differ by the teachers' disagreement, which no student can change.

    Defaults: 0.1, 0.9, T 4, as for one teacher.

    Differs from the printed text:

    * The paper names the first two means alone; the third is what weighted losses of several teachers compare with.
    """

    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Hinton, Vinyals, Dean 2015, arXiv:1503.02531"
    reads: ClassVar[tuple[str, ...]] = ("logits", "members")

    ce_weight: float = 0.1
    kd_weight: float = 0.9
    temperature: float = 4.0
    average: str = "probabilities"

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_positive("temperature", self.temperature)
        require_choice("average", self.average, ("probabilities", "logits", "losses"))

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """None; refuses a teacher that has no members."""
        _require_members(teacher)
        return nn.ModuleDict()

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`D`, a scalar."""
        logits = torch.stack([member.logits for member in teacher.members])
        if self.average == "probabilities":
            target = (logits / self.temperature).softmax(dim=2).mean(dim=0)
            return target_kl(student.logits, target, self.temperature)
        if self.average == "logits":
            return softened_kl(student.logits, logits.mean(dim=0), self.temperature)
        return torch.stack([softened_kl(student.logits, z_m, self.temperature) for z_m in logits]).mean()


@dataclass(frozen=True, kw_only=True)
class AdaptiveEnsemble(Method):
    """AE-KD: the teachers' losses are weighted, batch by batch, so that no teacher is followed against the others.

    Du, You, Li, Wu, Wang, Qian, Zhang, "Agree to Disagree: Adaptive Ensemble Knowledge Distillation in Gradient Space",
    NeurIPS 2020.

    `ce_weight * CE + kd_weight * sum_m w_m T^2 KL(sigma_T(z_m) || sigma_T(z_s)) + hint_weight * sum_m v_m MSE_m`. With
    g_m (C,) the batch mean of the gradient of teacher m's KL term in z_s, the weights w minimise `||sum_m w_m g_m||^2`
    subject to `sum_m w_m = 1` and `0 <= w_m <= tolerance`; they are constants for the student's gradient. A `tolerance`
    of 1/M is the plain average, one of 1 allows any weights. `normalise` solves for `g_m / ||g_m||`, divides each
    weight by `||g_m||` and rescales the sum to 1; a weight may then exceed `tolerance`.

    `MSE_m` (mean over B, c, h, w) compares the map after stage 2, through a regressor per teacher (`widen`), with that
    teacher's; v comes in the same way from the gradients in the student's map, always normalised. Defaults: 1, 0.9, no
    hints (100 where they are used), T 4, tolerance 0.6, as released.

    Differs from the printed text:

    * The release solves for the weights with a support vector machine, on the host; here the solution is exact.
    * The regressor is this project's usual one; the hints begin in the first epoch, in the release in the second.
    """

    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Du, You, Li, Wu, Wang, Qian, Zhang 2020, NeurIPS"
    reads: ClassVar[tuple[str, ...]] = ("logits", "members", "maps")

    kd_weight: float = 0.9
    hint_weight: float = 0.0
    temperature: float = 4.0
    tolerance: float = 0.6
    normalise: bool = False

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_at_least_zero("hint_weight", self.hint_weight)
        require_positive("temperature", self.temperature)
        require_positive("tolerance", self.tolerance)
        require_share("tolerance", self.tolerance)

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """A regressor per teacher for the map after stage 2, if hints have a weight."""
        _require_members(teacher)
        count = len(teacher.members)
        if count > MOST_TEACHERS:
            raise ValueError(f"there must be at most {MOST_TEACHERS} teachers, not {count}")
        if self.tolerance * count < 1 - RIDGE:
            raise ValueError(f"tolerance must be at least 1/{count} for {count} teachers, not {self.tolerance!r}")
        if not self.hint_weight:
            return nn.ModuleDict()
        for view in (student, *teacher.members):
            if len(view.maps) < 2:
                raise ValueError("hints need networks that show the maps of two stages at least")
        width = student.maps[1].shape[1]
        regressors = [widen(width, member.maps[1].shape[1]) for member in teacher.members]
        return nn.ModuleDict({"regressors": nn.ModuleList(regressors)})

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`sum_m w_m T^2 KL_m`, a scalar."""
        logits = [member.logits for member in teacher.members]
        terms = torch.stack([softened_kl(student.logits, z_m, self.temperature) for z_m in logits])
        return self.weights(self.gradients(student.logits, logits), self.normalise) @ terms

    def hint(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`sum_m v_m MSE_m`, a scalar."""
        pairs = zip(adapters["regressors"], teacher.members, strict=True)
        pooled = [same_size(regressor(student.maps[1]), member.maps[1]) for regressor, member in pairs]
        terms = torch.stack([F.mse_loss(*pair) for pair in pooled])
        slopes = [torch.autograd.grad(term, student.maps[1], retain_graph=True)[0] for term in terms]
        return self.weights(torch.stack([slope.mean(dim=0).flatten() for slope in slopes]), True) @ terms

    def objective(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> dict[str, Tensor]:
        """The usual terms, and the hints if they have a weight."""
        terms = super().objective(student, teacher, labels, adapters)
        if self.hint_weight:
            terms["hint"] = self.hint_weight * self.hint(student, teacher, labels, adapters)
        return terms

    @torch.no_grad()
    def gradients(self, student_logits: Tensor, teacher_logits: list[Tensor]) -> Tensor:
        """Batch means (M, C) of the KL terms' gradients in the student's logits, `T (sigma_T(z_s) - sigma_T(z_m))`."""
        answers = torch.stack([student_logits, *teacher_logits]) / self.temperature
        student, teachers = answers.softmax(dim=2).mean(dim=1).split([1, len(teacher_logits)])
        return self.temperature * (student - teachers)

    @torch.no_grad()
    def weights(self, gradients: Tensor, normalise: bool) -> Tensor:
        """The teachers' weights (M,) from their gradients (M, ...), in their precision."""
        exact = gradients.double()
        if not normalise:
            return agreeing_weights(exact @ exact.T, self.tolerance).to(gradients)
        lengths = exact.norm(dim=1).clamp(min=torch.finfo(exact.dtype).tiny)
        directions = exact / lengths.unsqueeze(1)
        shares = agreeing_weights(directions @ directions.T, self.tolerance) / lengths
        return (shares / shares.sum()).to(gradients)


def agreeing_weights(gram: Tensor, ceiling: float) -> Tensor:
    """The w (M,) that minimises `w' G w` for a Gram matrix G (M, M), with `sum w = 1` and `0 <= w <= ceiling`.

    Exact, without waiting for the device: each w_m is at 0, at the ceiling or in between. For all 3^M such faces at
    once the stationary point is solved for; the best that lies within the bounds is the minimum. For two teachers this
    is `w_1 = clip(g_2.(g_2 - g_1) / ||g_1 - g_2||^2, 1 - ceiling, ceiling)`. Equal gradients get equal weights.
    """
    count = len(gram)
    one = torch.eye(count, dtype=gram.dtype, device=gram.device)
    gram = gram / gram.trace().clamp(min=torch.finfo(gram.dtype).tiny) + RIDGE * one
    places = 3 ** torch.arange(count, device=gram.device)
    faces = torch.arange(3**count, device=gram.device).unsqueeze(1) // places % 3
    free, bound = (faces == 2).to(gram), ceiling * (faces == 1).to(gram)
    points = _stationary(gram, free, bound)
    allowed = ((points > -1e-9) & (points < ceiling + 1e-9)).all(dim=1) & free.any(dim=1)
    values = ((points @ gram) * points).sum(dim=1)
    best = torch.where(allowed, values, torch.inf).argmin(dim=0, keepdim=True)
    return points.index_select(0, best).squeeze(0).clamp(0, ceiling)


def _stationary(gram: Tensor, free: Tensor, bound: Tensor) -> Tensor:
    """The points (P, M) at which `w' G w` is stationary with sum 1: where `free` is 0, w is `bound` (P, M each)."""
    faces, count = free.shape
    rows = free.unsqueeze(2) * gram + torch.diag_embed(1 - free)
    system = torch.cat([rows, free.unsqueeze(2), bound.unsqueeze(2)], dim=2)  # w, multiplier, right-hand side
    last = torch.ones(faces, 1, count + 2, dtype=gram.dtype, device=gram.device)
    last[:, :, count] = 0
    system = torch.cat([system, last], dim=1)
    # Gauss-Jordan elimination; the Gram matrix is positive definite, so the pivots need no choice
    one = torch.eye(count + 1, dtype=gram.dtype, device=gram.device)
    for column in range(count + 1):
        pivot = system[:, column] / system[:, column, column].unsqueeze(1)
        system = system - (system[:, :, column] - one[column]).unsqueeze(2) * pivot.unsqueeze(1)
    return system[:, :count, -1]
