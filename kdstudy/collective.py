"""Methods for peers that teach as one, each peer itself among them: collaborative learning (KDCL) and OKDDip.

Shapes: logits (B, C), labels (B,). The teacher's view has as `members` the m peers, detached, with logits z_i. KL and
CE sum over classes and average over the batch, in nats; sigma_T(z) = softmax(z / T).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.core import Clock, Method, View, require_choice, require_positive, require_share, softened_kl

STEPS = 100  # of the search for the best mixture
RIDGE = 1e-6  # of the mean diagonal of a singular error matrix


def _require_members(teacher: View, name: str) -> None:
    if not teacher.members:
        raise ValueError(f"{name} needs peers that teach as one, and the teacher has no members: train it under peers")


def _logits_of(members: tuple[View, ...]) -> Tensor:
    return torch.stack([member.logits for member in members])


class HeldOutWeights(nn.Module):
    """The weights of m peers from their errors on held-out images; NaN, which no run survives, until measured."""

    def __init__(self, count: int) -> None:
        """For so many peers."""
        super().__init__()
        self.register_buffer("value", torch.full((count,), float("nan")))


@dataclass(frozen=True, kw_only=True)
class KDCL(Method):
    """KDCL: several networks, each on an augmentation of its own, follow one teacher made of all their logits.

    Guo, Wang, Wu, Yu, Liang, Hu, Luo, "Online Knowledge Distillation via Collaborative Learning", CVPR 2020.

    For every peer i: `ce_weight * CE(z_i, y) + kd_weight * T^2 KL(sigma_T(z) || sigma_T(z_i))`. `mode` makes z:

    * "min_logit": `z_c = min_i (z_i,c - z_i,y)`, sample by sample: 0 for the label, others as low as any peer has them.
    * "naive": the logits of the peer with the smallest CE, chosen `per` "sample" or "batch".
    * "linear": `z = sum_i a_i z_i` with `a >= 0`, `sum a = 1` of the least CE(z, y) on the batch: 100 steps of
      exponentiated gradient from equal weights, with steps of 1, halved where one would raise the CE.
    * "general": `z = sum_i w_i z_i` with `w = C^-1 1 / (1' C^-1 1)`, `C_ij = mean_n (p_i - t)_n . (p_j - t)_n` over the
      held-out images n with probabilities p and one-hot t; w minimises `w' C w` and may be negative. It is measured
      before each epoch. `combine` "probabilities" mixes these instead, with w clipped at 0 and rescaled to sum 1, and
      softens them as `p^(1/T)`. A singular C gets a ridge of 1e-6 of its mean diagonal.
    * "mean": the mean logits, which a public re-implementation calls by this name.

    Defaults: 1, 1, T 2. Scheme: batches "own_crops", `count` 2; "general" needs held-out images.

    Differs from the printed text:

    * T and the weights are those of a re-implementation of "min_logit", and the choice per sample is read off the
      paper's figure; none of this could be checked against the authors' code.
    * D'Amicantonio 2021 measures the weights after every step and mixes probabilities; here they are the paper's, once
      per epoch, and mix logits by default.
    """

    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Guo, Wang, Wu, Yu, Liang, Hu, Luo 2020, CVPR"
    reads: ClassVar[tuple[str, ...]] = ("logits", "members")
    scheme: ClassVar[str] = "peers"
    counts_itself: ClassVar[bool] = True

    temperature: float = 2.0
    mode: str = "min_logit"
    per: str = "sample"
    combine: str = "logits"

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_positive("temperature", self.temperature)
        require_choice("mode", self.mode, ("min_logit", "naive", "linear", "general", "mean"))
        require_choice("per", self.per, ("sample", "batch"))
        require_choice("combine", self.combine, ("logits", "probabilities"))

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """A buffer for the measured weights, if the mode has any; refuses a teacher that is not made of peers."""
        _require_members(teacher, "KDCL")
        measured = {"weights": HeldOutWeights(len(teacher.members))} if self.needs_held_out() else {}
        return nn.ModuleDict(measured)

    def needs_held_out(self) -> bool:
        """Whether weights are measured."""
        return self.mode == "general"

    @torch.no_grad()
    def weigh(self, adapters: nn.ModuleDict, members: tuple[View, ...], labels: Tensor) -> None:
        """Measure the weights, if the mode has any."""
        if self.needs_held_out():
            adapters["weights"].value.copy_(least_error_weights(_logits_of(members), labels))

    @torch.no_grad()
    def unite(self, members: tuple[View, ...], labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """The common teacher's logits (B, C)."""
        logits = _logits_of(members)
        if self.mode == "min_logit":
            return (logits - logits.gather(2, labels.view(1, -1, 1).expand(len(logits), -1, 1))).amin(dim=0)
        if self.mode == "naive":
            return best_logits(logits, labels, self.per)
        if self.mode == "linear":
            return torch.einsum("m,mbc->bc", best_mixture(logits, labels), logits)
        if self.mode == "general":
            return self._mixed(logits, adapters["weights"].value)
        return logits.mean(dim=0)

    def _mixed(self, logits: Tensor, weights: Tensor) -> Tensor:
        if self.combine == "logits":
            return torch.einsum("m,mbc->bc", weights, logits)
        shares = weights.clamp(min=0)  # their sum is lost in the softmax of whoever reads the logits
        return (shares.log().view(-1, 1, 1) + logits.log_softmax(dim=2)).logsumexp(dim=0)

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`T^2 KL(all as one || student)`, a scalar."""
        return softened_kl(student.logits, teacher.logits, self.temperature)


def _cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Of every network on every sample, (m, B)."""
    count, batch, classes = logits.shape
    return F.cross_entropy(logits.view(-1, classes), labels.repeat(count), reduction="none").view(count, batch)


def best_logits(logits: Tensor, labels: Tensor, per: str) -> Tensor:
    """Of logits (m, B, C) those of the network with the smallest cross-entropy, for each sample or for all, (B, C)."""
    losses = _cross_entropies(logits, labels)
    if per == "batch":
        losses = losses.mean(dim=1, keepdim=True).expand_as(losses)
    chosen = losses.argmin(dim=0).view(1, -1, 1)
    return logits.gather(0, chosen.expand(1, *logits.shape[1:])).squeeze(0)


def best_mixture(logits: Tensor, labels: Tensor) -> Tensor:
    """The shares a (m,) for which `sum_i a_i z_i` has the least cross-entropy, for logits (m, B, C); approximate."""
    exact = logits.double()  # near the optimum, rounding would pass for a rise
    onehot = torch.zeros_like(logits[0]).scatter(1, labels.unsqueeze(1), 1.0)
    scores, step = exact.new_zeros(len(exact)), exact.new_ones(())

    def look(scores: Tensor) -> tuple[Tensor, Tensor]:
        mixed = torch.einsum("m,mbc->bc", scores.softmax(dim=0), exact)
        slope = torch.einsum("bc,mbc->m", mixed.softmax(dim=1) - onehot, exact) / len(labels)
        return F.cross_entropy(mixed, labels), slope

    value, slope = look(scores)
    for _ in range(STEPS):
        trial = scores - step * slope
        found, there = look(trial)
        better = found <= value
        step = torch.where(better, step, step / 2)
        scores, slope = torch.where(better, trial, scores), torch.where(better, there, slope)
        value = torch.where(better, found, value)
    return scores.softmax(dim=0).to(logits)


def least_error_weights(logits: Tensor, labels: Tensor) -> Tensor:
    """The w (m,), of sum 1, by which probabilities of logits (m, N, C) have the least squared error; float64."""
    exact = logits.double()
    gaps = exact.softmax(dim=2) - F.one_hot(labels, exact.shape[2])
    errors = torch.einsum("inc,jnc->ij", gaps, gaps) / len(labels)
    spectrum = torch.linalg.eigvalsh(errors)
    singular = spectrum[0] <= len(errors) * torch.finfo(errors.dtype).eps * spectrum[-1]
    ridge = (RIDGE * errors.diagonal().mean()).clamp(min=1e-30)  # even where nobody errs
    weights = torch.linalg.solve(
        errors + torch.diag_embed((singular * ridge).expand(len(errors))), errors.new_ones(len(errors))
    )
    return weights / weights.sum()


@dataclass(frozen=True, kw_only=True)
class OKDDip(Method):
    """OKDDip: peers that each weigh all peers by attention, so that they stay diverse, and a leader who learns of them.

    Chen, Mei, Wang, Feng, Chen, "Online Knowledge Distillation with Diverse Peers", AAAI 2020, arXiv:1912.00350.

    `ce_weight * CE(z_a, y) + kd_weight * r T^2 KL(t_a || sigma_T(z_a))`, for the auxiliary peers a = 1..m and for the
    leader. A peer's target is `t_a = sum_b alpha_ab sigma_T(z_b)`, itself among the b, with `alpha_ab =
    softmax_b(W_L h_a . W_E h_b)` per sample; h (B, d) are the embeddings, and all peers share the bias-free projections
    W_L and W_E to d // 8. The leader's target is the plain mean over the peers; he is deployed and teaches nobody.
    `form` "logits" averages the logits z_b with these weights instead of the probabilities.

    `r = exp(-5 (1 - min(e, R) / R)^2)` in the 0-based epoch e rises to 1 over the first R, a share `ramp` of the
    epochs. Defaults: 1, 1, T 3, ramp 80 / 300. Scheme: `leader` with `count` 4, he among them, batches "shared";
    `shared_stages` 2 for the branches, 0 for separate networks.

    Of what enters t_a only alpha is not constant: the gradient trains W_L and W_E, and, through query and key of h_a,
    the peer's own features, as released. It reaches no other peer, neither by features nor by predictions.

    Differs from the printed text:

    * The released code averages logits, adds 1e-7 to the targets and detaches nothing; the paper averages
      probabilities, which is the default, and here predictions and the others' features are constants.
    * Whether a counts among the b: as released, yes.
    * D'Amicantonio 2021 has the leader in the peers' sum (eq. 36) and writes the leader's term as one between each peer
      and the leader; here both are as in the paper.
    """

    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Chen, Mei, Wang, Feng, Chen 2020, AAAI, arXiv:1912.00350"
    reads: ClassVar[tuple[str, ...]] = ("logits", "members", "embedding")
    scheme: ClassVar[str] = "peers"
    counts_itself: ClassVar[bool] = True

    temperature: float = 3.0
    form: str = "probabilities"
    ramp: float = 80 / 300

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_positive("temperature", self.temperature)
        require_choice("form", self.form, ("probabilities", "logits"))
        require_share("ramp", self.ramp)

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """Both projections and the clock. ValueError without peers, and where their embeddings do not suit."""
        _require_members(teacher, "OKDDip")
        widths = {member.embedding.shape[1] for member in teacher.members}
        if len(widths) > 1 or min(widths) < 8:
            raise ValueError(
                f"peers that share projections must have embeddings of one width of 8 or more, not {widths}"
            )
        (width,) = widths
        query, key = (nn.Linear(width, width // 8, bias=False) for _ in range(2))
        return nn.ModuleDict({"query": query, "key": key, "clock": Clock()})

    def unite(self, members: tuple[View, ...], labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """The leader's target as logits (B, C): softened, they are the plain mean."""
        logits = _logits_of(members)
        return self._mixed(logits, torch.full_like(logits[:, :, 0], 1 / len(members)).log())

    def attention(self, student: View, teacher: View, adapters: nn.ModuleDict) -> Tensor:
        """`log alpha_ab` of the student a for all peers b, (m, B)."""
        features = [member.embedding for member in teacher.members]
        features[teacher.place] = student.embedding
        query, keys = adapters["query"](student.embedding), adapters["key"](torch.stack(features))
        return (keys * query).sum(dim=2).log_softmax(dim=0)

    def _mixed(self, logits: Tensor, log_weights: Tensor) -> Tensor:
        log_weights = log_weights.unsqueeze(2)
        if self.form == "logits":
            return (log_weights.exp() * logits).sum(dim=0)
        # the log of a mean of probabilities, and its gradient, stay finite where these vanish
        softened = (logits / self.temperature).log_softmax(dim=2)
        return self.temperature * (log_weights + softened).logsumexp(dim=0)

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`r T^2 KL(t_a || student)`, a scalar; without a clock at the full weight."""
        target = teacher.logits  # the leader's, who has no place among the peers
        if teacher.place is not None:
            target = self._mixed(_logits_of(teacher.members), self.attention(student, teacher, adapters))
        distance = softened_kl(student.logits, target, self.temperature)
        return self.ramped(adapters["clock"]) * distance if "clock" in adapters else distance

    def ramped(self, clock: Clock) -> Tensor:
        """`r`, a scalar."""
        if not self.ramp:
            return torch.ones_like(clock.epoch)
        left = 1 - (clock.epoch / (self.ramp * clock.epochs)).clamp(max=1)
        return (-5 * left.square()).exp()
