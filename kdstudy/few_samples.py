"""Distillation that trains nothing: a pruned network is aligned with its teacher in closed form on a few images."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.blocks import PreActivationBlock, ResidualBlock, StagedNet, Taps
from kdstudy.core import Method, Phase, View, require_at_least_zero, require_whole

BLOCKS = (ResidualBlock, PreActivationBlock)


@dataclass(frozen=True, kw_only=True)
class FewSample(Method):
    """Few-sample knowledge distillation (FSKD): a pruned teacher is repaired with 1x1 convolutions, by least squares.

    T. Li, J. Li, Z. Liu, C. Zhang, "Few Sample Knowledge Distillation for Efficient Network Compression", CVPR 2020,
    arXiv:1812.01839.

    The student, such as `resnet20_pruned0.5`, takes the teacher's weights: of each block's first convolution the
    filters of largest L1 norm (Li et al. 2017), and what belongs to them in its batch norm and in the second
    convolution. Then, block after block on top of the aligned ones, a 1x1 convolution Q is fitted to n unlabelled
    training images and merged into the convolution and batch norm that it follows. By least squares of `Q X_s - X_t`,
    X (c, n * h * w): `Q = X_t X_s^T (X_s X_s^T + r I)^-1`, r = `ridge` times the mean diagonal of X_s X_s^T. First,
    ahead of the block's inner ReLU, X_t are the teacher's values of the kept channels; then, at the end of its branch,
    X_t is what the teacher's block has ahead of its last ReLU, less the student's shortcut.

    No gradient is followed and no label read. `loss` is what remains: the mean squared error of the stages' maps ahead
    of their last ReLU, averaged over the stages. Defaults: `samples` n = 500, drawn at random; a ridge of 1e-6.

    Differs from the printed text:

    * The paper has one Q at the end of a block; its code, for networks without shortcuts, one behind every convolution.
      Here two per block, as in the code; the second within the branch, since behind the sum it could not be merged.
    * The code has no ridge and takes the first n images.
    """

    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "Li, Li, Liu, Zhang 2020, CVPR"
    reads: ClassVar[tuple[str, ...]] = ("pre_maps", "network")

    ce_weight: float = 0.0
    samples: int = 500
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range, a weight on labels that are not read, and one that would do nothing."""
        super().__post_init__()
        require_whole("samples", self.samples)
        require_at_least_zero("ridge", self.ridge)
        if self.ce_weight:
            raise ValueError(f"ce_weight must be 0, not {self.ce_weight!r}: few-sample distillation reads no labels")
        if self.kd_weight != 1:
            raise ValueError(f"kd_weight must be 1, not {self.kd_weight!r}: a closed form has nothing to weigh")

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """The mean squared error of the maps before a stage's last ReLU, averaged over the stages, a scalar."""
        pairs = zip(student.pre_maps, teacher.pre_maps, strict=True)
        return torch.stack([F.mse_loss(ours, theirs) for ours, theirs in pairs]).mean()

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """None; ValueError unless the student is a pruned version of the teacher."""
        pruned_state(student.network, teacher.network)
        return nn.ModuleDict()

    def phases(self) -> tuple[Phase, ...]:
        """None: `initialise` does it all."""
        return ()

    @torch.no_grad()
    def initialise(
        self, student: nn.Module, teacher: nn.Module, plain_batches: Iterable[Tensor], adapters: nn.ModuleDict
    ) -> None:
        """Prune, then align block by block."""
        student.load_state_dict(pruned_state(student, teacher))
        student.eval()
        batches = _drawn(plain_batches, self.samples).split(100)
        for number in range(len(_blocks(student))):
            align(student, teacher, number, batches, self.ridge)


def pruned_state(student: StagedNet, teacher: StagedNet) -> dict[str, Tensor]:
    """The teacher's weights for a student with fewer channels between a block's two convolutions.

    Of each first convolution the filters of largest L1 norm are kept, in their order. Raises ValueError if anything
    else differs, and for networks of other blocks.
    """
    refusal = ValueError(
        "few-sample distillation needs a student that is its teacher with fewer channels inside its blocks of two "
        "convolutions, such as resnet20_pruned0.5 for resnet20"
    )
    state, blocks = dict(teacher.state_dict()), dict(student.named_modules())
    pruned = [(name, module) for name, module in teacher.named_modules() if isinstance(module, BLOCKS)]
    for name, model in pruned:
        block = blocks.get(name)
        if type(block) is not type(model) or not len(block.branch) == len(model.branch) == 3:
            raise refusal
        kept = _kept(block, model)
        for key in state:
            if key.startswith(f"{name}.branch.0.") and state[key].ndim:
                state[key] = state[key][kept]
            elif key.startswith(f"{name}.branch.2.") and state[key].ndim == 4:
                state[key] = state[key][:, kept]
    wanted = {key: tensor.shape for key, tensor in student.state_dict().items()}
    if not pruned or wanted != {key: tensor.shape for key, tensor in state.items()}:
        raise refusal
    return state


def _kept(block: nn.Module, model: nn.Module) -> Tensor:
    """Which of the teacher's channels between two convolutions the student keeps, ascending."""
    norms = model.branch[0][0].weight.abs().sum(dim=(1, 2, 3))
    return norms.topk(min(block.branch[0][0].out_channels, len(norms))).indices.sort().values


def _drawn(batches: Iterable[Tensor], count: int) -> Tensor:
    """So many of all images, at random and without replacement; all of them if they are fewer."""
    kept, keys = [], torch.empty(0)
    for batch in batches:
        keys = torch.cat([keys, torch.rand(len(batch))])
        chosen = keys.topk(min(count, len(keys))).indices
        kept, keys = [torch.cat([*kept, batch])[chosen.to(batch.device)]], keys[chosen]
    return kept[0]


def align(student: StagedNet, teacher: StagedNet, number: int, batches: Sequence[Tensor], ridge: float) -> None:
    """Put a 1x1 convolution behind both convolutions of the block of this number, one after the other."""
    block, model = _blocks(student)[number], _blocks(teacher)[number]
    first, _, last = block.branch
    kept = _kept(block, model)

    def entering() -> Iterator[tuple[Taps, Taps]]:
        for images in batches:
            yield _before(student, number, images), _before(teacher, number, images)

    def middle(ours: Taps, theirs: Taps) -> tuple[Tensor, Tensor]:
        return first(ours.onward), model.branch[0](theirs.onward)[:, kept]

    def end(ours: Taps, theirs: Taps) -> tuple[Tensor, Tensor]:
        branch = block.branch(ours.onward)
        shortcut = _sum(block, ours) - branch
        return branch, _sum(model, theirs) - shortcut

    absorb(first, least_squares(starmap(middle, entering()), ridge))
    absorb(last, least_squares(starmap(end, entering()), ridge))


def _blocks(network: StagedNet) -> list[nn.Module]:
    return [block for stage in network.stages for block in stage]


def _before(network: StagedNet, number: int, images: Tensor) -> Taps:
    """What enters the block of this number."""
    taps = network.stem(Taps(images, images, images))
    for block in _blocks(network)[:number]:
        taps = block(taps)
    return taps


def _sum(block: nn.Module, before: Taps) -> Tensor:
    """Branch plus shortcut, ahead of everything that follows."""
    taps = block(before)
    return taps.map if isinstance(block, PreActivationBlock) else taps.pre_map


def least_squares(pairs: Iterable[tuple[Tensor, Tensor]], ridge: float) -> Tensor:
    """The Q (c', c) that minimises `||Q X_s - X_t||_F^2` over all pairs of maps (B, c, h, w) and (B, c', h, w).

    Float64. `ridge` is a share of the mean diagonal of X_s X_s^T; where that is singular, Q is the smallest solution.
    """
    gram, cross = 0.0, 0.0
    for pair in pairs:
        ours, theirs = (each.transpose(0, 1).flatten(1).double() for each in pair)
        gram, cross = gram + ours @ ours.T, cross + theirs @ ours.T
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return cross @ torch.linalg.pinv(gram, hermitian=True)


def absorb(layers: nn.Module, mix: Tensor) -> None:
    """Merge a 1x1 convolution `mix` (c', c) into the convolution, alone or with its batch norm, that it follows.

    In eval mode the result is the same; the norm's scale over its deviation becomes 1.
    """
    convolution, norm = layers if isinstance(layers, nn.Sequential) else (layers, None)
    if norm is not None:
        deviation = (norm.running_var.double() + norm.eps).sqrt()
        scale = norm.weight.double() / deviation
        norm.bias.copy_(mix @ norm.bias.double())
        norm.running_mean.copy_(mix @ (scale * norm.running_mean.double()))
        norm.weight.copy_(deviation)
        mix = mix * scale
    convolution.weight.copy_(torch.einsum("oi,ichw->ochw", mix, convolution.weight.double()))
