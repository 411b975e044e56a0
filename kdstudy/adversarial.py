"""Methods in which a discriminator tells the networks' maps apart while the networks learn to look alike."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from kdstudy.adapters import require_taps, same_size, widen
from kdstudy.core import Method, View, require_positive, softened_kl


@dataclass(frozen=True, kw_only=True)
class AdversarialDistillation(Method):
    """Feature-map-level online adversarial distillation (AFD): answers and maps of networks that learn together agree.

    Chung, Park, Kim, Kwak, "Feature-map-level Online Adversarial Knowledge Distillation", ICML 2020, arXiv:2002.01775.

    Network k learns from the one before it in a cycle, n; two networks learn from each other. On every batch

    1. a step of the recipe on `ce_weight * CE(z_k, y) + kd_weight * T^2 KL(sigma_T(z_n) || sigma_T(z_k))`,
    2. a step of Adam on `mean_b (1 - D_k(f_k))^2` for what computes f_k, the discriminators frozen,
    3. a step of Adam on `mean_b ((1 - D_k(f_n))^2 + D_k(f_k)^2)` for the discriminators, the maps detached,

    each on maps of the last stage that are computed anew. f_k has passed a transfer layer, 1x1 convolution and batch
    norm, where the widths differ; larger maps are pooled. D_k: twice 3x3 convolution of stride 2, batch norm and
    leaky ReLU of slope 0.2, at f_n's width; mean over positions, linear layer, sigmoid.

    Defaults: 1, 1, T 3; Adam's `adversarial_learning_rate` 2e-5, which falls at the recipe's milestones, without weight
    decay. Steps 2 and 3 need no weight: to Adam a loss's scale is nothing.

    Differs from the printed text:

    * No code was found. D, T and the learning rate follow second-hand accounts; the order of the KL's arguments and
      Adam without weight decay are ours.
    * Not the attention-based method that has the same abbreviation.
    """

    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Chung, Park, Kim, Kwak 2020, ICML, arXiv:2002.01775"
    reads: ClassVar[tuple[str, ...]] = ("logits", "maps")
    scheme: ClassVar[str] = "rivals"
    bound: ClassVar[bool] = True
    least_batch: ClassVar[int] = 2  # the discriminator's batch norm, where its maps are single pixels

    temperature: float = 3.0
    adversarial_learning_rate: float = 2e-5

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_positive("temperature", self.temperature)
        require_positive("adversarial_learning_rate", self.adversarial_learning_rate)

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`T^2 KL(teacher || student)`, a scalar."""
        return softened_kl(student.logits, teacher.logits, self.temperature)

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """The discriminator of a network that learns from another one, and its transfer layer."""
        require_taps(self.reads, student, teacher)
        own, other = (view.maps[-1].shape[1] for view in (student, teacher))
        return nn.ModuleDict({"discriminator": discriminator(other), "transfer": widen(own, other)})

    def rival_maps(self, student: View, teacher: View, adapters: nn.ModuleDict) -> tuple[Tensor, Tensor]:
        """What the discriminator tells apart: f_k, behind the transfer layer, and f_n, of one shape."""
        own, other = same_size(student.maps[-1], teacher.maps[-1])
        return adapters["transfer"](own), other


def discriminator(width: int) -> nn.Sequential:
    """From maps (B, `width`, h, w) to (B, 1) within (0, 1), near 1 for the maps of the network that is followed."""
    return nn.Sequential(
        *_halved(width), *_halved(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1), nn.Sigmoid()
    )


def _halved(width: int) -> tuple[nn.Module, ...]:
    halve = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)
    return halve, nn.BatchNorm2d(width), nn.LeakyReLU(0.2)


def generator_loss(own: Tensor) -> Tensor:
    """`mean (1 - D(f_k))^2`, of what the discriminator says of a network's own maps."""
    return (1 - own).square().mean()


def discriminator_loss(own: Tensor, other: Tensor) -> Tensor:
    """`mean ((1 - D(f_n))^2 + D(f_k)^2)`, of what it says of a network's own maps and of those that it follows."""
    return ((1 - other).square() + own.square()).mean()
