"""The skeleton of all networks, `StagedNet`, and the blocks from which the families are made."""

from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.core import View


class Taps(NamedTuple):
    """What a stem, a block or a stage hands on: the tensor that the next one reads, and the two taps beside it."""

    onward: Tensor
    map: Tensor
    pre_map: Tensor


class StagedNet(nn.Module):
    """Stem, stages 1..S, embedding and classifier: the skeleton, and the forward, of all networks."""

    def __init__(self, stem: nn.Module, stages: Iterable[nn.Module], embed: nn.Module, classifier: nn.Linear) -> None:
        """`stem` and stages map `Taps` to `Taps`, `embed` the last `onward` to (B, D), `classifier` that to (B, C)."""
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.embed = embed
        self.classifier = classifier

    def forward(self, images: Tensor) -> View:
        """All taps for images (B, channels, H, W); there are no early exits."""
        taps = [self.stem(Taps(images, images, images))]
        for stage in self.stages:
            taps.append(stage(taps[-1]))
        embedding = self.embed(taps[-1].onward)
        return View(
            logits=self.classifier(embedding),
            stem=taps[0].map,
            maps=tuple(tap.map for tap in taps[1:]),
            pre_maps=tuple(tap.pre_map for tap in taps[1:]),
            embedding=embedding,
        )

    def section(self, number: int, before: Tensor) -> Tensor:
        """The map of stage `number` (from 1) when it is given the map of the stage before it (of the stem, for 1)."""
        return self.stages[number - 1](self._leave(number - 1, before)).map

    def resume(self, number: int, stage_map: Tensor) -> View:
        """What the rest makes of a map in the place of stage `number`'s: logits, embedding and later maps."""
        taps = [self._leave(number, stage_map)]
        for stage in self.stages[number:]:
            taps.append(stage(taps[-1]))
        embedding = self.embed(taps[-1].onward)
        later = taps[1:]
        return View(
            logits=self.classifier(embedding),
            maps=tuple(tap.map for tap in later),
            pre_maps=tuple(tap.pre_map for tap in later),
            embedding=embedding,
        )

    def norms(self) -> tuple[nn.BatchNorm2d, ...]:
        """For every stage, the batch norm whose output its `pre_maps` hold, or that is the last one added into it.

        Raises ValueError for a network without batch norm.
        """
        found = [_last_block(stage).last_norm() for stage in self.stages]
        if None in found:
            raise ValueError("this network has no batch norm before the activation that ends a stage")
        return tuple(found)

    def _leave(self, number: int, stage_map: Tensor) -> Taps:
        if number < 0:
            raise IndexError("stages are numbered from 1, and 0 stands for the stem")
        return _last_block(self.stages[number - 1] if number else self.stem).leave(stage_map)


def _last_block(stage: nn.Module) -> nn.Module:
    return stage[-1] if isinstance(stage, nn.Sequential) else stage


def _last_norm(layers: nn.Module) -> nn.BatchNorm2d | None:
    found = [layer for layer in layers.modules() if isinstance(layer, nn.BatchNorm2d)]
    return found[-1] if found else None


class PlainStage(nn.Module):
    """Layers, the activation that ends them, and what lies between it and the next layer."""

    def __init__(self, layers: nn.Module, activation: nn.Module, onward: nn.Module | None = None) -> None:
        """`onward` (pooling, dropout) makes what the next layer reads out of the map; by default that is the map."""
        super().__init__()
        self.layers = layers
        self.activation = activation
        self.onward = onward or nn.Identity()

    def forward(self, before: Taps) -> Taps:
        """The taps around the activation."""
        pre_map = self.layers(before.onward)
        return self.leave(self.activation(pre_map))._replace(pre_map=pre_map)

    def leave(self, stage_map: Tensor) -> Taps:
        """What goes on from a given map; it stands for the map before the activation, too."""
        return Taps(self.onward(stage_map), stage_map, stage_map)

    def last_norm(self) -> nn.BatchNorm2d | None:
        """The batch norm before the activation, if there is one."""
        return _last_norm(self.layers)


class ResidualBlock(nn.Module):
    """`relu(branch(x) + shortcut(x))` (He et al. 2016)."""

    def __init__(self, branch: nn.Module, inputs: int, outputs: int, stride: int) -> None:
        """`branch` goes from `inputs` to `outputs` channels; the shortcut is the identity unless the shape changes."""
        super().__init__()
        self.branch = branch
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else normed(inputs, outputs, size=1, stride=stride)

    def forward(self, before: Taps) -> Taps:
        """The taps around the block's last ReLU."""
        pre_map = self.branch(before.onward) + self.shortcut(before.onward)
        return self.leave(F.relu(pre_map))._replace(pre_map=pre_map)

    def leave(self, stage_map: Tensor) -> Taps:
        """What goes on from a given map; it stands for the map before the ReLU, too."""
        return Taps(stage_map, stage_map, stage_map)

    def last_norm(self) -> nn.BatchNorm2d | None:
        """The batch norm that ends the branch."""
        return _last_norm(self.branch)


class PreActivationBlock(nn.Module):
    """A wide ResNet's block (Zagoruyko & Komodakis 2016), with the batch norm and ReLU that open the next one."""

    def __init__(self, inputs: int, outputs: int, stride: int, kept: Fraction = Fraction(1)) -> None:
        """From `inputs` to `outputs` channels; only where they differ is the shortcut a convolution.

        Between its two convolutions the branch has the share `kept` of the outputs as width.
        """
        super().__init__()
        inner = int(kept * outputs)
        self.branch = nn.Sequential(normed(inputs, inner, stride=stride), nn.ReLU(), convolution(inner, outputs))
        self.shortcut = convolution(inputs, outputs, size=1, stride=stride) if inputs != outputs else None
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, before: Taps) -> Taps:
        """The residual sum, its batch norm, and the ReLU of that."""
        kept = before.map if self.shortcut is None else self.shortcut(before.onward)
        return self.leave(self.branch(before.onward) + kept)

    def leave(self, stage_map: Tensor) -> Taps:
        """The given residual sum, its batch norm, and the ReLU of that."""
        pre_map = self.norm(stage_map)
        return Taps(F.relu(pre_map), stage_map, pre_map)

    def last_norm(self) -> nn.BatchNorm2d:
        """The batch norm that reads the sum."""
        return self.norm


class LinearBottleneck(nn.Module):
    """A MobileNetV2's inverted residual block (Sandler et al. 2018): no activation follows its last batch norm."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        """The middle has `expansion` times the inputs; where the shape changes there is no shortcut."""
        super().__init__()
        middle = expansion * inputs
        opening = [normed(inputs, middle, size=1), nn.ReLU6()] if expansion > 1 else []
        spread = normed(middle, middle, stride=stride, groups=middle)
        self.branch = nn.Sequential(*opening, spread, nn.ReLU6(), normed(middle, outputs, size=1))
        self.has_shortcut = inputs == outputs and stride == 1

    def forward(self, before: Taps) -> Taps:
        """The block's output, which is its map before and after the activation that is not there."""
        branch = self.branch(before.onward)
        return self.leave(branch + before.onward if self.has_shortcut else branch)

    def leave(self, stage_map: Tensor) -> Taps:
        """What goes on from a given map."""
        return Taps(stage_map, stage_map, stage_map)

    def last_norm(self) -> nn.BatchNorm2d | None:
        """The batch norm that ends the branch."""
        return _last_norm(self.branch)


class ScaledSwish(nn.Module):
    """`1.5 x sigmoid(x)`: its scale stands outside, unlike that of `x sigmoid(beta x)` (Ramachandran et al. 2017)."""

    def forward(self, x: Tensor) -> Tensor:
        """The activation, elementwise."""
        return 1.5 * F.silu(x)


def convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the sides, but for the stride."""
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)


def normed(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution and its batch norm."""
    return nn.Sequential(convolution(inputs, outputs, size, stride, groups), nn.BatchNorm2d(outputs))


def basic_block(inputs: int, outputs: int, stride: int, kept: Fraction = Fraction(1)) -> ResidualBlock:
    """Two 3x3 convolutions, with the share `kept` of the outputs as width between them."""
    inner = int(kept * outputs)
    branch = nn.Sequential(normed(inputs, inner, stride=stride), nn.ReLU(), normed(inner, outputs))
    return ResidualBlock(branch, inputs, outputs, stride)


def bottleneck_block(inputs: int, outputs: int, stride: int, shrink: int = 4, groups: int = 1) -> ResidualBlock:
    """A 3x3 convolution in `groups` between two 1x1 ones, on `1 / shrink` of the outputs (Xie et al. 2017)."""
    width = outputs // shrink
    squeeze, spread = normed(inputs, width, size=1), normed(width, width, stride=stride, groups=groups)
    branch = nn.Sequential(squeeze, nn.ReLU(), spread, nn.ReLU(), normed(width, outputs, size=1))
    return ResidualBlock(branch, inputs, outputs, stride)


def plain_block(inputs: int, outputs: int, stride: int) -> PlainStage:
    """A basic block's two convolutions without its shortcut."""
    return PlainStage(
        nn.Sequential(normed(inputs, outputs, stride=stride), nn.ReLU(), normed(outputs, outputs)), nn.ReLU()
    )
