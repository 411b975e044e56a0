"""Every network of the study, by name. Each forward returns a `View` with all its taps, none of them changed in place.

Initial weights: convolutions Kaiming normal over fan-out with ReLU gain (He et al. 2015), batch norm 1 and 0, linear
layers torch's own; the two swish CNNs Kaiming uniform over fan-in and zero biases throughout.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.core import View
from kdstudy.files import unknown_name


def build_model(name: str, *, classes: int, channels: int = 3, image_size: int | tuple[int, int] = 32) -> nn.Module:
    """A new network for images (B, channels, H, W), its initial weights drawn from torch's global generator.

    | name | network |
    |---|---|
    | `resnet18`, `resnet34`, `resnet50`, `resnet152` | He et al. 2016 with a 3x3 stem of stride 1, no max-pool |
    | `resnet50@224`, any of the four | enlarges its input to 224 x 224, bilinearly; 7x7 stem of stride 2, max-pool |
    | `resnet20`, `resnet8x4` | depth 8, 14, 20, 26, 32, 38, 44, 56, 110 or 116; 16, 32, 64 channels times the factor |
    | `wrn_40_2`, `wrn_10_0.25` | wide ResNet of any depth 6n + 4; 16, 32, 64 channels times the factor |
    | `swish_teacher`, `swish_student` | plain CNNs with dropout and `ScaledSwish`, no batch norm (Devopedia) |
    | `cnn_small` | plain CNN of four convolutions with batch norm, for tiny images |

    Taps: `stem` is what enters stage 1. ResNets and CNNs have `maps` after and `pre_maps` before the activation that
    ends a stage, ahead of any pooling. Wide ResNets have bare residual sums (signed) as `maps`, the batch norm that
    reads these as `pre_maps`, and the bare first convolution as `stem`.

    Shortcuts that change shape are 1x1 convolutions, with batch norm except in wide ResNets. The stem of a three-stage
    ResNet is as wide as stage 1, but at most 16 channels, or 32 from a factor of 4 on (Tian et al. 2020).

    `image_size` is the side of the images, or (height, width); `forward` takes any, unless it is a swish CNN's. Raises
    ValueError for an unknown name, a depth or width that the family lacks, fewer than 2 classes or 1 channel, and
    images too small for the stages or not divisible by a swish CNN's pools.
    """
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    for what, value, least in (("classes", classes, 2), ("channels", channels, 1), ("image_size", min(sides), 1)):
        if value < least:
            raise ValueError(f"{what} must be at least {least}, not {value}")
    for pattern, build in FAMILIES:
        if match := re.fullmatch(pattern, name):
            return build(match, classes, channels, sides)
    raise unknown_name("model", name, known_models())


def known_models() -> tuple[str, ...]:
    """Names that `build_model` takes: of families with free numbers only the usual ones."""
    return (
        *("resnet18", "resnet34", "resnet50", "resnet152", "resnet50@224", "resnet152@224"),
        *("resnet8", "resnet14", "resnet20", "resnet26", "resnet32", "resnet44", "resnet56", "resnet110"),
        *("resnet8x4", "resnet32x4", "wrn_10_0.25", "wrn_16_1", "wrn_16_2", "wrn_28_10", "wrn_40_1", "wrn_40_2"),
        *("swish_teacher", "swish_student", "cnn_small"),
    )


def count_parameters(module: nn.Module) -> int:
    """How many numbers of `module` are trained."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


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
        self.shortcut = nn.Identity() if same else _normed(inputs, outputs, size=1, stride=stride)

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


class Ensemble(nn.Module):
    """Several trained networks as one: its logits are the log of the mean of their probabilities, `members` they."""

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        """At least one network; all have the same classes."""
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> View:
        """All members' views, and their common answer (B, C) in float32 at least."""
        members = tuple(network(images) for network in self.networks)
        answers = torch.stack([member.logits for member in members])
        answers = answers if answers.dtype == torch.float64 else answers.float()
        logits = answers.log_softmax(dim=2).logsumexp(dim=0) - math.log(len(members))
        return View(logits, members=members)


class PreActivationBlock(nn.Module):
    """A wide ResNet's block (Zagoruyko & Komodakis 2016), with the batch norm and ReLU that open the next one."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """From `inputs` to `outputs` channels; only where they differ is the shortcut a convolution."""
        super().__init__()
        self.branch = nn.Sequential(_normed(inputs, outputs, stride=stride), nn.ReLU(), _convolution(outputs, outputs))
        self.shortcut = _convolution(inputs, outputs, size=1, stride=stride) if inputs != outputs else None
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


class ScaledSwish(nn.Module):
    """`1.5 x sigmoid(x)`: its scale stands outside, unlike that of `x sigmoid(beta x)` (Ramachandran et al. 2017)."""

    def forward(self, x: Tensor) -> Tensor:
        """The activation, elementwise."""
        return 1.5 * F.silu(x)


def _convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


def _normed(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(_convolution(inputs, outputs, size, stride), nn.BatchNorm2d(outputs))


def _basic_block(inputs: int, outputs: int, stride: int) -> ResidualBlock:
    branch = nn.Sequential(_normed(inputs, outputs, stride=stride), nn.ReLU(), _normed(outputs, outputs))
    return ResidualBlock(branch, inputs, outputs, stride)


def _bottleneck_block(inputs: int, outputs: int, stride: int) -> ResidualBlock:
    width = outputs // 4
    squeeze, spread = _normed(inputs, width, size=1), _normed(width, width, stride=stride)
    branch = nn.Sequential(squeeze, nn.ReLU(), spread, nn.ReLU(), _normed(width, outputs, size=1))
    return ResidualBlock(branch, inputs, outputs, stride)


def _residual_net(
    stem: nn.Module, block: Callable[..., nn.Module], widths: Sequence[int], counts: Sequence[int], classes: int
) -> StagedNet:
    """`widths`: channels of stem and stages; `counts`: blocks of the stages, which halve from the second on."""
    stages = []
    for stage, ((inputs, outputs), count) in enumerate(zip(pairwise(widths), counts, strict=True)):
        first = block(inputs, outputs, 2 if stage else 1)
        stages.append(nn.Sequential(first, *(block(outputs, outputs, 1) for _ in range(count - 1))))
    return _globally_pooled(stem, stages, widths[-1], classes)


def _globally_pooled(stem: nn.Module, stages: Iterable[nn.Module], width: int, classes: int) -> StagedNet:
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = StagedNet(stem, stages, pool, nn.Linear(width, classes))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


FOUR_STAGES = {  # depth: block, channels of stem and stages, blocks of the stages
    "18": (_basic_block, (64, 64, 128, 256, 512), (2, 2, 2, 2)),
    "34": (_basic_block, (64, 64, 128, 256, 512), (3, 4, 6, 3)),
    "50": (_bottleneck_block, (64, 256, 512, 1024, 2048), (3, 4, 6, 3)),
    "152": (_bottleneck_block, (64, 256, 512, 1024, 2048), (3, 8, 36, 3)),
}


def _four_stage_resnet(match: re.Match[str], classes: int, channels: int, sides: tuple[int, int]) -> StagedNet:
    block, widths, counts = FOUR_STAGES[match["depth"]]
    if match["upscaled"]:
        upscale = nn.Upsample(size=(224, 224), mode="bilinear")
        layers = nn.Sequential(upscale, _normed(channels, widths[0], size=7, stride=2))
        stem = PlainStage(layers, nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)))
    else:
        _require_size(match, sides, stages=4)
        stem = PlainStage(_normed(channels, widths[0]), nn.ReLU())
    return _residual_net(stem, block, widths, counts, classes)


def _three_stage_resnet(match: re.Match[str], classes: int, channels: int, sides: tuple[int, int]) -> StagedNet:
    _require_size(match, sides, stages=3)
    widths = _three_stage_widths(match, stem_limit=32 if Fraction(match["factor"] or 1) >= 4 else 16)
    stem = PlainStage(_normed(channels, widths[0]), nn.ReLU())
    return _residual_net(stem, _basic_block, widths, [(int(match["depth"]) - 2) // 6] * 3, classes)


def _wide_resnet(match: re.Match[str], classes: int, channels: int, sides: tuple[int, int]) -> StagedNet:
    _require_size(match, sides, stages=3)
    depth = int(match["depth"])
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"the depth of {match[0]} must be 6n + 4 with n of at least 1 (10, 16, 22, ...), not {depth}")
    widths = _three_stage_widths(match, stem_limit=16)
    # the bare convolution is the map; the batch norm and ReLU behind it belong to block 1
    opening = nn.Sequential(nn.BatchNorm2d(widths[0]), nn.ReLU())
    stem = PlainStage(_convolution(channels, widths[0]), nn.Identity(), opening)
    return _residual_net(stem, PreActivationBlock, widths, [(depth - 4) // 6] * 3, classes)


def _three_stage_widths(match: re.Match[str], stem_limit: int) -> tuple[int, ...]:
    width = 16 * Fraction(match["factor"] or 1)
    if width.denominator != 1:
        raise ValueError(f"stage 1 of {match[0]} must have a whole number of channels, not {float(width)}")
    return tuple(int(channels) for channels in (min(width, stem_limit), width, 2 * width, 4 * width))


def _require_size(match: re.Match[str], sides: tuple[int, int], stages: int) -> None:
    least = 2 ** (stages - 1)
    if min(sides) < least:
        raise ValueError(f"image_size must be at least {least} for the {stages} stages of {match[0]}, not {min(sides)}")


SWISH_STAGES = {  # channels of a stage's convolutions (the stem's 32 come first), max-pool after them, then dropout
    "teacher": (((32,), 2, 0.2), ((64, 64), 2, 0.2), ((128, 128), 2, 0.2)),
    "student": (((32,), 2, 0.2), ((8,), 4, 0.0), ((4, 8, 64), 2, 0.2), ((128, 128), 2, 0.2)),
}


def _swish_cnn(match: re.Match[str], classes: int, channels: int, sides: tuple[int, int]) -> StagedNet:
    layout = SWISH_STAGES[match["role"]]
    shrink = math.prod(pool for _, pool, _ in layout)
    for side in sides:
        if side % shrink:
            raise ValueError(f"image_size must be a multiple of {shrink} for the pools of {match[0]}, not {side}")
    inputs = (32, *(widths[-1] for widths, _, _ in layout))
    stem = PlainStage(nn.Conv2d(channels, inputs[0], 3, padding=1), ScaledSwish())
    stages = [_swish_stage(width, *stage) for width, stage in zip(inputs[:-1], layout, strict=True)]
    flat = inputs[-1] * math.prod(side // shrink for side in sides)
    embed = nn.Sequential(nn.Flatten(), nn.Linear(flat, 128), ScaledSwish(), nn.Dropout(0.2))
    network = StagedNet(stem, stages, embed, nn.Linear(128, classes))
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return network


def _swish_stage(inputs: int, widths: Sequence[int], pool: int, dropout: float) -> PlainStage:
    convolutions = [nn.Conv2d(before, after, 3, padding=1) for before, after in pairwise((inputs, *widths))]
    layers = [layer for convolution in convolutions for layer in (convolution, ScaledSwish())]
    return PlainStage(nn.Sequential(*layers[:-1]), layers[-1], nn.Sequential(nn.MaxPool2d(pool), nn.Dropout(dropout)))


def _small_cnn(match: re.Match[str], classes: int, channels: int, sides: tuple[int, int]) -> StagedNet:
    _require_size(match, sides, stages=3)
    stem = PlainStage(_normed(channels, 16), nn.ReLU())
    first = PlainStage(_normed(16, 16), nn.ReLU(), nn.MaxPool2d(2))
    second = PlainStage(_normed(16, 32), nn.ReLU(), nn.MaxPool2d(2))
    third = PlainStage(_normed(32, 64), nn.ReLU())
    return _globally_pooled(stem, (first, second, third), 64, classes)


FACTOR = r"(?P<factor>[1-9]\d*|(?:0|[1-9]\d*)\.\d*[1-9])"  # a width is written in one way only
FAMILIES = (
    (r"resnet(?P<depth>18|34|50|152)(?P<upscaled>@224)?", _four_stage_resnet),
    (rf"resnet(?P<depth>8|14|20|26|32|38|44|56|110|116)(?:x{FACTOR})?", _three_stage_resnet),
    (rf"wrn_(?P<depth>[1-9]\d*)_{FACTOR}", _wide_resnet),
    (r"swish_(?P<role>teacher|student)", _swish_cnn),
    (r"cnn_small", _small_cnn),
)
