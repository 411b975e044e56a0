"""Methods that fit modules to a teacher's maps: hints (FitNets), factor transfer and variational information.

Shapes: stage maps (B, c, h, w); stages are counted from 1. The scheme detaches the teacher.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.adapters import paired_maps, require_taps, same_size
from kdstudy.core import (
    Clock,
    Method,
    Phase,
    View,
    require_at_least_zero,
    require_choice,
    require_positive,
    require_whole,
    softened_kl,
    without_decay,
)


@dataclass(frozen=True, kw_only=True)
class FitNets(Method):
    """FitNets: a regressor r on the student's map of one stage predicts the teacher's map of that stage, the hint.

    Romero, Ballas, Kahou, Chassang, Gatta, Bengio, "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv:1412.6550.

    With `hint = mean_{b,c,h,w} (r(F_s) - F_t)^2` at `stage` of both networks:

    * `two_stage`: `kd_weight * hint` trains r and the student up to that stage, for `hint_share` of the epochs; then
      `ce_weight * CE(z_s, y) + w * T^2 KL(softmax(z_t / T) || softmax(z_s / T))` trains the student without r, for all
      of them. w goes linearly from `first_kl_weight` in the first epoch to `kl_weight` in the last.
    * Otherwise `ce_weight * CE + kd_weight * hint` in one phase, the usual form in later comparisons.

    Defaults: 100; KL from 4 to 1, T 3. r is `hint_regressor`.

    Differs from the printed text:

    * The hint is half the sum of squares there, here the mean, as in all public code; 100 is its weight there.
    * The paper ends its phases by the error on held-out images. A `hint_share` of 0.125 is 30 epochs to a main phase
      of 240, the default of later comparisons for first phases.
    * The batch norm that opens the block behind the guided map of a wide ResNet counts as part of the guided stage: in
      the hint phase its batch statistics follow, its weights rest.
    """

    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Romero, Ballas, Kahou, Chassang, Gatta, Bengio 2015, ICLR, arXiv:1412.6550"
    reads: ClassVar[tuple[str, ...]] = ("logits", "maps")

    ce_weight: float = 1.0
    kd_weight: float = 100.0
    two_stage: bool = True
    stage: int = 2
    hint_share: float = 0.125
    first_kl_weight: float = 4.0
    kl_weight: float = 1.0
    temperature: float = 3.0

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        for name in ("first_kl_weight", "kl_weight"):
            require_at_least_zero(name, getattr(self, name))
        for name in ("hint_share", "temperature"):
            require_positive(name, getattr(self, name))
        require_whole("stage", self.stage)
        if self.two_stage and not self.kd_weight:
            raise ValueError("kd_weight must be above 0, not 0: the hint phase has no other term")
        if self.two_stage and not (self.ce_weight or self.kl_weight):
            raise ValueError("ce_weight and kl_weight are both 0: the second phase would have nothing to minimise")

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """The mean squared error of the regressed map, a scalar."""
        return F.mse_loss(adapters["regressor"](student.maps[self.stage - 1]), teacher.maps[self.stage - 1])

    def hint(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> dict[str, Tensor]:
        """The only term of the hint phase."""
        return {"hint": self.kd_weight * self.loss(student, teacher, labels, adapters)}

    def objective(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> dict[str, Tensor]:
        """The terms of the only, or of the second phase."""
        if not self.two_stage:
            return super().objective(student, teacher, labels, adapters)
        terms = {"ce": self.ce_weight * self.label_loss(student, teacher, labels, adapters)} if self.ce_weight else {}
        if self.first_kl_weight or self.kl_weight:
            softened = softened_kl(student.logits, teacher.logits, self.temperature)
            terms["kl"] = self._kl_weight_now(adapters) * softened
        return terms

    def _kl_weight_now(self, adapters: nn.ModuleDict) -> float | Tensor:
        if "clock" not in adapters:
            return self.kl_weight
        clock = adapters["clock"]
        over = clock.epoch / (clock.epochs - 1).clamp(min=1)
        return self.first_kl_weight + over * (self.kl_weight - self.first_kl_weight)

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """The regressor, and a clock for two phases. Raises ValueError if a network lacks the stage."""
        for role, view in (("student", student), ("teacher", teacher)):
            if self.stage > len(view.maps):
                raise ValueError(f"stage must be at most the {len(view.maps)} stages of the {role}, not {self.stage}")
        regressor = hint_regressor(student.maps[self.stage - 1], teacher.maps[self.stage - 1])
        return nn.ModuleDict({"regressor": regressor} | ({"clock": Clock()} if self.two_stage else {}))

    def phases(self) -> tuple[Phase, ...]:
        """The hint phase and the distillation of the whole student, or one phase."""
        if not self.two_stage:
            return super().phases()
        guided = ("student.stem", *(f"student.stages.{number}" for number in range(self.stage)))
        return (
            Phase("hint", self.hint, trains=(*guided, "adapters.regressor"), share=self.hint_share),
            Phase("distil", self.objective, trains=("student",)),
        )


def hint_regressor(student_map: Tensor, teacher_map: Tensor) -> nn.Sequential:
    """Convolution, batch norm and, unless the teacher's map has negative entries, ReLU; from one map to the other.

    A map twice the teacher's sides is halved (3x3, stride 2), one half of them doubled (4x4 transposed, stride 2), any
    other larger one cut by the kernel alone, `1 + h_s - h_t`: 1x1 for equal sides. ValueError for other smaller ones.
    """
    channels, sides = (student_map.shape[1], teacher_map.shape[1]), student_map.shape[2:]
    wanted = teacher_map.shape[2:]
    if all(side == 2 * other for side, other in zip(sides, wanted, strict=True)):
        layer = nn.Conv2d(*channels, 3, stride=2, padding=1, bias=False)
    elif all(2 * side == other for side, other in zip(sides, wanted, strict=True)):
        layer = nn.ConvTranspose2d(*channels, 4, stride=2, padding=1, bias=False)
    elif all(side >= other for side, other in zip(sides, wanted, strict=True)):
        kernel = tuple(1 + side - other for side, other in zip(sides, wanted, strict=True))
        layer = nn.Conv2d(*channels, kernel, bias=False)
    else:
        raise ValueError(
            f"the student's map must be half the teacher's size or at least as large, not {tuple(sides)} for "
            f"{tuple(wanted)}: choose another stage"
        )
    # a wide ResNet's maps are signed sums, which a ReLU could not meet
    signed = bool((teacher_map < 0).any())
    return nn.Sequential(layer, nn.BatchNorm2d(channels[1]), *([] if signed else [nn.ReLU()]))


SLOPE = 0.1  # of the leaky ReLU behind every layer of paraphraser and translator


@dataclass(frozen=True, kw_only=True)
class FactorTransfer(Method):
    """Factor transfer: the student's translator imitates a compressed form, the factor, of the teacher's last map.

    Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018,
    arXiv:1802.04977.

    First, for `paraphraser_share` of the epochs, an autoencoder P, the `Paraphraser`, learns the teacher's last map x:
    `mean |x - P(x)|`. Its code of `round(rate * channels)` channels is the teacher's factor; from then on P is frozen.
    Then student and translator are trained: `ce_weight * CE(z_s, y) + kd_weight * mean |f_s - f_t|`, over batch and
    entries. The translator makes a factor of the student's last map; f is a whole factor (c h w) of a sample divided by
    its l2 norm. Of two sizes the larger factor is average-pooled before that. Defaults as in the authors' code: 500,
    rate 0.5, and 5 epochs to a main phase of 164, a share of 0.03.

    Differs from the printed text:

    * The paraphraser minimises the squared error there, the absolute one in the authors' code: the default.
      `reconstruction` "l2" is the mean squared error.
    * The factors' distance is a norm there (p 1 in the experiments), here its mean over all entries, as in the code.
    """

    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Kim, Park, Kwak 2018, NeurIPS, arXiv:1802.04977"
    reads: ClassVar[tuple[str, ...]] = ("logits", "maps")

    ce_weight: float = 1.0
    kd_weight: float = 500.0
    rate: float = 0.5
    reconstruction: str = "l1"
    paraphraser_share: float = 0.03

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_positive("rate", self.rate)
        require_positive("paraphraser_share", self.paraphraser_share)
        require_choice("reconstruction", self.reconstruction, ("l1", "l2"))

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """The mean absolute difference of the normalised factors, a scalar."""
        with torch.no_grad():
            target = adapters["paraphraser"].encoder(teacher.maps[-1])
        factors = same_size(adapters["translator"](student.maps[-1]), target)
        f_s, f_t = (F.normalize(factor.flatten(start_dim=1), dim=1) for factor in factors)
        return F.l1_loss(f_s, f_t)

    def paraphrase(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> dict[str, Tensor]:
        """The only term of the first phase, the error of the reconstruction."""
        distance = F.l1_loss if self.reconstruction == "l1" else F.mse_loss
        return {"paraphrase": distance(adapters["paraphraser"](teacher.maps[-1]), teacher.maps[-1])}

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """Paraphraser and translator. Raises ValueError for networks without maps or a factor without channels."""
        require_taps(("maps",), student, teacher)
        channels = teacher.maps[-1].shape[1]
        code = round(self.rate * channels)
        if not code:
            raise ValueError(f"rate must leave the factor a channel of the teacher's {channels}, not {self.rate!r}")
        translator = _encoder(student.maps[-1].shape[1], code)
        return nn.ModuleDict({"paraphraser": Paraphraser(channels, code), "translator": translator})

    def phases(self) -> tuple[Phase, ...]:
        """The paraphraser by itself, then the student and its translator."""
        return (
            Phase("paraphrase", self.paraphrase, trains=("adapters.paraphraser",), share=self.paraphraser_share),
            Phase("distil", self.objective, trains=("student", "adapters.translator")),
        )


class Paraphraser(nn.Module):
    """An autoencoder of maps (B, channels, h, w): three 3x3 convolutions, three transposed ones, all of stride 1."""

    def __init__(self, channels: int, code: int) -> None:
        """`code` channels in between."""
        super().__init__()
        self.encoder = _encoder(channels, code)
        widths = ((code, code), (code, channels), (channels, channels))
        self.decoder = _leaky(nn.ConvTranspose2d(*width, 3, padding=1) for width in widths)

    def forward(self, stage_map: Tensor) -> Tensor:
        """The reconstruction."""
        return self.decoder(self.encoder(stage_map))


def _encoder(inputs: int, code: int) -> nn.Sequential:
    return _leaky(nn.Conv2d(*width, 3, padding=1) for width in ((inputs, inputs), (inputs, code), (code, code)))


def _leaky(layers: Iterable[nn.Module]) -> nn.Sequential:
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.LeakyReLU(SLOPE))))


FIRST_VARIANCE = 5.0
LEAST_VARIANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class VariationalInformation(Method):
    """Variational information distillation: a lower bound on the mutual information of both networks' maps is raised.

    Ahn, Hu, Damianou, Lawrence, Dai, "Variational Information Distillation for Knowledge Transfer", CVPR 2019,
    arXiv:1904.05835.

    `ce_weight * CE(z_s, y) + kd_weight * sum_l mean_{b,c,h,w} ((t - mu(s))^2 / v_c + log v_c) / 2` over stages l: the
    negative log-likelihood, in nats, of the teacher's map t under a `Gaussian` whose mean mu is regressed on the
    student's map s; the larger map is average-pooled. Without its constant `log(2 pi) / 2` it can be negative. Default
    weight: 1.

    Differs from the printed text:

    * The variances, which are learnt, are left out of weight decay: it would pull each towards 0.69.
    """

    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Ahn, Hu, Damianou, Lawrence, Dai 2019, CVPR, arXiv:1904.05835"
    reads: ClassVar[tuple[str, ...]] = ("logits", "maps")

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """The negative log-likelihoods, summed over the stages, a scalar."""
        pairs = paired_maps(student, teacher)
        return sum(gaussian(*pair) for gaussian, pair in zip(adapters["gaussians"], pairs, strict=True))

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """One Gaussian for each stage. Raises ValueError unless the networks have equally many."""
        gaussians = [Gaussian(s.shape[1], t.shape[1]) for s, t in paired_maps(student, teacher)]
        return nn.ModuleDict({"gaussians": nn.ModuleList(gaussians)})


class Gaussian(nn.Module):
    """`N(mu(s), v)`: the mean by three 1x1 convolutions with ReLU between, the variance one per teacher's channel."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """From `inputs` of the student's channels to `outputs` of the teacher's; all variances start at 5."""
        super().__init__()
        widths = ((inputs, outputs), (outputs, outputs), (outputs, outputs))
        first, second, third = (nn.Conv2d(*width, 1, bias=False) for width in widths)
        self.mean = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        rho = math.log(math.expm1(FIRST_VARIANCE - LEAST_VARIANCE))
        self.rho = without_decay(nn.Parameter(torch.full((outputs,), rho)))

    def variance(self) -> Tensor:
        """`softplus(rho) + 1e-5`, (outputs,)."""
        return F.softplus(self.rho) + LEAST_VARIANCE

    def forward(self, student_map: Tensor, teacher_map: Tensor) -> Tensor:
        """The mean negative log-likelihood of the teacher's map, less `log(2 pi) / 2`, a scalar."""
        variance = self.variance().view(1, -1, 1, 1)
        squares = (teacher_map - self.mean(student_map)).square()
        return (squares / variance + variance.log()).mean() / 2
