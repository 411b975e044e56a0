"""Distillation that keeps the teacher's classifier: the student needs to match what that reads, and nothing else."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.adapters import require_taps, same_size
from kdstudy.core import Method, Phase, View, require_whole


def pooled_map(view: View) -> Tensor:
    """What a network averages before it classifies, `relu` of its last `pre_maps`, (B, c, h, w)."""
    return F.relu(view.pre_maps[-1])


class Projector(nn.Module):
    """Convolutions 1x1, 3x3, 1x1 without bias, each with batch norm and ReLU, in a bottleneck."""

    def __init__(self, inputs: int, outputs: int, reduction: int, sides: tuple[int, ...]) -> None:
        """`reduction` is how much narrower than `outputs` the bottleneck is; a map larger than `sides` is pooled."""
        super().__init__()
        width = outputs // reduction
        self.sides = sides
        self.layers = nn.Sequential(
            *(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
        )

    def forward(self, stage_map: Tensor) -> Tensor:
        """The map at the smaller of the two sizes, in the teacher's channels."""
        sides = tuple(map(min, stage_map.shape[2:], self.sides))
        return self.layers(F.adaptive_avg_pool2d(stage_map, sides) if stage_map.shape[2:] != sides else stage_map)


@dataclass(frozen=True, kw_only=True)
class ReusedClassifier(Method):
    """SimKD: the student imitates what the teacher's classifier reads, and is deployed with that classifier.

    Chen, Mei, Zhang, Wang, Feng, Chen, "Knowledge Distillation with the Reused Teacher Classifier", CVPR 2022.

    `loss = mean (P(F_s) - F_t)^2` over batch, channels and positions, where F is a network's last map after its ReLU,
    the larger one average-pooled to the smaller one's size, and `P` the `Projector`, with a bottleneck of `c_t /
    reduction` channels. No label enters: `ce_weight` is 0. The prediction is `W_t avgpool(P(F_s)) + b_t`: `P` and the
    teacher's classifier, which is not trained further, are part of the deployed network, its files and its count of
    parameters. The student's own linear layer is never trained nor asked, but stays in both. Defaults: 1, reduction 2;
    4 and 8 are cheaper.

    Differs from the printed text:

    * `P` ends in a ReLU, so that its target must be what the teacher's pooling sees. In wide ResNets that is the ReLU
      of the batch norm behind the last stage, not the stage's signed sum; the authors rewrite these networks instead.
      `relu(pre_maps[-1])` is that map for both families, and the student's is taken likewise.
    """

    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Chen, Mei, Zhang, Wang, Feng, Chen 2022, CVPR"
    reads: ClassVar[tuple[str, ...]] = ("logits", "pre_maps", "embedding", "network")
    deploys: ClassVar[tuple[str, ...]] = ("projector", "classifier")

    ce_weight: float = 0.0
    reduction: int = 2

    def __post_init__(self) -> None:
        """Refuse labels, and a reduction that is no whole number."""
        super().__post_init__()
        if self.ce_weight:
            raise ValueError(f"ce_weight must be 0, not {self.ce_weight!r}: no label enters")
        require_whole("reduction", self.reduction)

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """The projector and a copy of the teacher's classifier.

        Raises ValueError unless both networks classify the average of `pooled_map`, and the same classes, and the
        teacher's channels are a multiple of `reduction`.
        """
        require_taps(("pre_maps", "embedding"), student, teacher)
        _require_pooled("student", student)
        _require_pooled("teacher", teacher)
        (inputs, *_), (outputs, *sides) = pooled_map(student).shape[1:], pooled_map(teacher).shape[1:]
        if student.logits.shape[1] != teacher.logits.shape[1]:
            counts = f"{student.logits.shape[1]} and {teacher.logits.shape[1]}"
            raise ValueError(f"student and teacher must have the same classes, not {counts}")
        if outputs % self.reduction:
            raise ValueError(f"the teacher's {outputs} channels must be a multiple of reduction, not {self.reduction}")
        # no phase trains the copy; it counts as a trained part of the deployed network, as it did in the teacher
        classifier = copy.deepcopy(teacher.network.classifier).requires_grad_()
        return nn.ModuleDict(
            {"projector": Projector(inputs, outputs, self.reduction, tuple(sides)), "classifier": classifier}
        )

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """`mean (P(F_s) - F_t)^2`, a scalar."""
        return F.mse_loss(*same_size(adapters["projector"](pooled_map(student)), pooled_map(teacher)))

    def predict(self, student: View, adapters: nn.ModuleDict) -> Tensor:
        """The teacher's classifier on the average of the projected map, (B, C)."""
        return adapters["classifier"](adapters["projector"](pooled_map(student)).mean(dim=(2, 3)))

    def phases(self) -> tuple[Phase, ...]:
        """One, without the student's own linear layer and the teacher's classifier."""
        return (Phase("distil", self.objective, trains=("student.stem", "student.stages", "adapters.projector")),)


def _require_pooled(whose: str, view: View) -> None:
    if not torch.allclose(pooled_map(view).mean(dim=(2, 3)), view.embedding, rtol=1e-4, atol=1e-5):
        raise ValueError(f"the {whose} must classify the average of its last map after a ReLU, which it does not")
