"""Distillation of a network into itself in integers."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.fx.proxy import TraceError

from kdstudy.core import Method, Phase, View, require_positive, softened_kl
from kdstudy.quantisation import QuantisedNet, calibrate


@dataclass(frozen=True, kw_only=True)
class QuantisedKD(Method):
    """Quantised distillation: a network taught by itself in full precision, while its numbers are rounded to integers.

    Polino, Pascanu, Alistarh, "Model compression via distillation and quantization", ICLR 2018, arXiv:1802.05668; the
    rounding is that of Jacob et al. 2018, arXiv:1712.05877.

    The student, such as `wrn_16_1_int8` for `wrn_16_1`, computes with rounded weights `s round(w / s)` and activations,
    and takes the gradient as if they were not rounded (straight-through); what is stepped are the weights in full
    precision. It begins with its teacher's weights and with grids set by the plain training images.
    `ce_weight * CE(z_s, y) + kd_weight * T^2 KL(softmax(z_t / T) || softmax(z_s / T))`, in nats, over a quarter of the
    epochs at a tenth of the learning rate. Defaults: 0.5, 0.5, T 4.

    Differs from the printed text:

    * Polino et al. have a shallower student that starts from nothing, and buckets of weights with a grid each; here the
      teacher's own architecture and, as torch has it, a grid per output channel. Activations are rounded, too.
    """

    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "Polino, Pascanu, Alistarh 2018, ICLR"

    ce_weight: float = 0.5
    kd_weight: float = 0.5
    temperature: float = 4.0

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range."""
        super().__post_init__()
        require_positive("temperature", self.temperature)

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`T^2 KL(teacher || student)`, a scalar."""
        return softened_kl(student.logits, teacher.logits, self.temperature)

    def phases(self) -> tuple[Phase, ...]:
        """One, a quarter as long as usual."""
        return (Phase("distil", self.objective, share=0.25, rate=0.1),)

    def initialise(
        self, student: nn.Module, teacher: nn.Module, plain_batches: Iterable[Tensor], adapters: nn.ModuleDict
    ) -> None:
        """Copy the teacher's weights and set all grids. ValueError unless the student is the teacher, quantised."""
        refusal = "the student must be the teacher's own network, quantised: wrn_16_1_int8 for wrn_16_1"
        if not isinstance(student, QuantisedNet) or isinstance(teacher, QuantisedNet):
            raise ValueError(refusal)
        try:
            state = QuantisedNet(copy.deepcopy(teacher).cpu()).state_dict()
        except TraceError:  # several networks as one
            raise ValueError(refusal) from None
        if _shapes(state) != _shapes(student.state_dict()):
            raise ValueError(refusal)
        student.load_state_dict(state)
        calibrate(student, plain_batches)


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
