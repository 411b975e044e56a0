"""Every network of the study, by name. Each forward returns a `View` with all its taps, none of them changed in place.

Initial weights: convolutions Kaiming normal over fan-out with ReLU gain (He et al. 2015), batch norm 1 and 0, linear
layers torch's own; the two swish CNNs Kaiming uniform over fan-in and zero biases throughout.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from kdstudy.blocks import (
    LinearBottleneck,
    PlainStage,
    PreActivationBlock,
    ScaledSwish,
    StagedNet,
    basic_block,
    bottleneck_block,
    convolution,
    normed,
    plain_block,
)
from kdstudy.core import View
from kdstudy.files import unknown_name
from kdstudy.heads import HEADS, HeadedNet, add_heads
from kdstudy.modalities import MODALITIES, ModalityNet
from kdstudy.quantisation import QuantisedNet
from kdstudy.trees import DecisionTree


def build_model(name: str, *, classes: int, channels: int = 3, image_size: int | tuple[int, int] = 32) -> nn.Module:
    """A new network for images (B, channels, H, W), its initial weights drawn from torch's global generator.

    | name | network |
    |---|---|
    | `resnet18`, `resnet34`, `resnet50`, `resnet152` | He et al. 2016 with a 3x3 stem of stride 1, no max-pool |
    | `resnext50_4` | ResNeXt-50 32x4d (Xie et al. 2017) with the same stem |
    | `plain18`, `plain34` | `resnet18` and `resnet34` without their shortcuts (He et al. 2016) |
    | `resnet50@224`, any of these | enlarges its input to 224 x 224, bilinearly; 7x7 stem of stride 2, max-pool |
    | `resnet20`, `resnet8x4` | depth 8, 14, 20, 26, 32, 38, 44, 56, 110 or 116; 16, 32, 64 channels times the factor |
    | `plain20`, `plain8x4` | the same without shortcuts |
    | `wrn_40_2`, `wrn_10_0.25` | wide ResNet of any depth 6n + 4; 16, 32, 64 channels times the factor |
    | `resnet20_pruned0.5`, `wrn_16_1_pruned0.5` | half the channels between the two convolutions of every block |
    | `mobilenet_v2` | Sandler et al. 2018, its first stride of 2 in the block run of 32 channels |
    | `swish_teacher`, `swish_student` | plain CNNs with dropout and `ScaledSwish`, no batch norm (Devopedia) |
    | `cnn_small` | plain CNN of four convolutions with batch norm, for tiny images |
    | `wrn_40_2_bottom2` | stem and first two stages of `wrn_40_2`, or of any of these, pooled, with a classifier |
    | `tree_6` | decision tree on the pixels, of a depth from 1 to 12; only `soft_tree` fits it, and it has no taps |

    Any of them with `@grey`, `@edges` or `@low` behind its name sees another modality of the images (`modalities.py`):
    their luma, the length of its gradient, or its means over 2 x 2 pixels. It is built for one channel, and with `@low`
    for half of `image_size`, rounded up. Images of one channel are their own luma.

    Any of these with `+heads` or `+sepheads` behind its name has a head on every stage but the last (`heads.py`): its
    `exits` are their views. The backbone comes first, so that its initial weights are those of the plain network.

    With `_int8` behind its name a network is on the grids of integers (`quantisation.py`), and shows logits alone;
    `_int2` to `_int7` have coarser weights between the first and the last layer.

    Taps: `stem` is what enters stage 1. ResNets and CNNs have `maps` after and `pre_maps` before the activation that
    ends a stage, ahead of any pooling. Wide ResNets have bare residual sums (signed) as `maps`, the batch norm that
    reads these as `pre_maps`, and the bare first convolution as `stem`. MobileNetV2's blocks end in no activation: its
    `pre_maps` are its `maps`, signed. Its stages are the blocks of one resolution, of 24, 32, 96 and 320 channels; the
    1x1 convolution to 1280 lies between the last map and the embedding. Stem and the run of 24 channels have stride 1,
    as usual for images of 32 pixels.

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


def reset(network: nn.Module) -> None:
    """Draw a network's weights anew, in place, as `build_model` draws them; its batch statistics start again, too."""
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    _drawn(network)


def known_models() -> tuple[str, ...]:
    """Names that `build_model` takes: of families with free numbers only the usual ones."""
    return (
        *("resnet18", "resnet34", "resnet50", "resnet152", "resnet50@224", "resnet152@224", "resnext50_4"),
        *("resnet8", "resnet14", "resnet20", "resnet26", "resnet32", "resnet44", "resnet56", "resnet110"),
        *("resnet8x4", "resnet32x4", "wrn_10_0.25", "wrn_16_1", "wrn_16_2", "wrn_28_10", "wrn_40_1", "wrn_40_2"),
        *("plain18", "plain34", "plain8", "plain20", "plain32", "plain44", "plain56", "plain110"),
        *("resnet20_pruned0.5", "resnet56_pruned0.5", "wrn_16_1_pruned0.5", "wrn_40_2_pruned0.5"),
        *("mobilenet_v2", "swish_teacher", "swish_student", "cnn_small", "tree_6", "wrn_40_2_bottom2", "wrn_40_2_int8"),
        *("wrn_40_2@grey", "wrn_40_2@edges", "wrn_40_2@low", "wrn_40_2+heads", "wrn_40_2+sepheads"),
    )


def count_parameters(module: nn.Module) -> int:
    """How many numbers of `module` are trained."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


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


Block = Callable[[int, int, int], nn.Module]  # from input channels, output channels, stride


def _stacked(stem: nn.Module, block: Block, widths: Sequence[int], counts: Sequence[int], classes: int) -> StagedNet:
    """`widths`: channels of stem and stages; `counts`: blocks of the stages, which halve from the second on."""
    stages = []
    for stage, ((inputs, outputs), count) in enumerate(zip(pairwise(widths), counts, strict=True)):
        first = block(inputs, outputs, 2 if stage else 1)
        stages.append(nn.Sequential(first, *(block(outputs, outputs, 1) for _ in range(count - 1))))
    return _globally_pooled(stem, stages, (), widths[-1], classes)


def _globally_pooled(
    stem: nn.Module, stages: Iterable[nn.Module], head: Iterable[nn.Module], width: int, classes: int
) -> StagedNet:
    """`head`: layers before the pooling, after the last stage."""
    embed = nn.Sequential(*head, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return _drawn(StagedNet(stem, stages, embed, nn.Linear(width, classes)))


def _drawn(network: nn.Module) -> nn.Module:
    swish = any(isinstance(module, ScaledSwish) for module in network.modules())
    for module in network.modules():
        if swish and isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


NARROW, BROAD = (64, 64, 128, 256, 512), (64, 256, 512, 1024, 2048)
FOUR_STAGES = {  # block, channels of stem and stages, blocks of the stages
    "resnet18": (basic_block, NARROW, (2, 2, 2, 2)),
    "resnet34": (basic_block, NARROW, (3, 4, 6, 3)),
    "resnet50": (bottleneck_block, BROAD, (3, 4, 6, 3)),
    "resnet152": (bottleneck_block, BROAD, (3, 8, 36, 3)),
    "resnext50_4": (partial(bottleneck_block, shrink=2, groups=32), BROAD, (3, 4, 6, 3)),
    "plain18": (plain_block, NARROW, (2, 2, 2, 2)),
    "plain34": (plain_block, NARROW, (3, 4, 6, 3)),
}


def _four_stages(match: re.Match[str], classes: int, channels: int, sides: tuple[int, int]) -> StagedNet:
    block, widths, counts = FOUR_STAGES[match["base"]]
    if match["upscaled"]:
        upscale = nn.Upsample(size=(224, 224), mode="bilinear")
        layers = nn.Sequential(upscale, normed(channels, widths[0], size=7, stride=2))
        stem = PlainStage(layers, nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)))
    else:
        _require_size(match, sides, stages=4)
        stem = PlainStage(normed(channels, widths[0]), nn.ReLU())
    return _stacked(stem, _pruned(match, block, widths), widths, counts, classes)


def _three_stages(match: re.Match[str], classes: int, channels: int, sides: tuple[int, int]) -> StagedNet:
    _require_size(match, sides, stages=3)
    widths = _three_stage_widths(match, stem_limit=32 if Fraction(match["factor"] or 1) >= 4 else 16)
    stem = PlainStage(normed(channels, widths[0]), nn.ReLU())
    block = basic_block if match["base"] == "resnet" else plain_block
    return _stacked(stem, _pruned(match, block, widths), widths, [(int(match["depth"]) - 2) // 6] * 3, classes)


def _wide_resnet(match: re.Match[str], classes: int, channels: int, sides: tuple[int, int]) -> StagedNet:
    _require_size(match, sides, stages=3)
    depth = int(match["depth"])
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"the depth of {match[0]} must be 6n + 4 with n of at least 1 (10, 16, 22, ...), not {depth}")
    widths = _three_stage_widths(match, stem_limit=16)
    # the bare convolution is the map; the batch norm and ReLU behind it belong to block 1
    opening = nn.Sequential(nn.BatchNorm2d(widths[0]), nn.ReLU())
    stem = PlainStage(convolution(channels, widths[0]), nn.Identity(), opening)
    return _stacked(stem, _pruned(match, PreActivationBlock, widths), widths, [(depth - 4) // 6] * 3, classes)


def _three_stage_widths(match: re.Match[str], stem_limit: int) -> tuple[int, ...]:
    width = 16 * Fraction(match["factor"] or 1)
    if width.denominator != 1:
        raise ValueError(f"stage 1 of {match[0]} must have a whole number of channels, not {float(width)}")
    return tuple(int(channels) for channels in (min(width, stem_limit), width, 2 * width, 4 * width))


def _pruned(match: re.Match[str], block: Block, widths: Sequence[int]) -> Block:
    """The block with the share of its inner width that the name says is kept."""
    if not match["kept"]:
        return block
    if block not in (basic_block, PreActivationBlock):
        raise ValueError(f"{match[0]} cannot be: only blocks of two convolutions and a shortcut are pruned")
    kept = Fraction(match["kept"])
    if (kept * widths[1]).denominator != 1:
        inner = float(kept * widths[1])
        raise ValueError(f"blocks of stage 1 of {match[0]} must keep a whole number of channels, not {inner}")
    return partial(block, kept=kept)


MOBILE_STAGES = (  # of each run of blocks: expansion, channels, blocks, stride of the first
    ((1, 16, 1, 1), (6, 24, 2, 1)),
    ((6, 32, 3, 2),),
    ((6, 64, 4, 2), (6, 96, 3, 1)),
    ((6, 160, 3, 2), (6, 320, 1, 1)),
)


def _mobilenet(match: re.Match[str], classes: int, channels: int, sides: tuple[int, int]) -> StagedNet:
    _require_size(match, sides, stages=4)
    width, stages = 32, []
    for runs in MOBILE_STAGES:
        blocks = []
        for expansion, outputs, count, stride in runs:
            for number in range(count):
                blocks.append(LinearBottleneck(width, outputs, 1 if number else stride, expansion))
                width = outputs
        stages.append(nn.Sequential(*blocks))
    stem = PlainStage(normed(channels, 32), nn.ReLU6())
    return _globally_pooled(stem, stages, (normed(width, 1280, size=1), nn.ReLU6()), 1280, classes)


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
    return _drawn(StagedNet(stem, stages, embed, nn.Linear(128, classes)))


def _swish_stage(inputs: int, widths: Sequence[int], pool: int, dropout: float) -> PlainStage:
    convolutions = [nn.Conv2d(before, after, 3, padding=1) for before, after in pairwise((inputs, *widths))]
    layers = [layer for convolution in convolutions for layer in (convolution, ScaledSwish())]
    return PlainStage(nn.Sequential(*layers[:-1]), layers[-1], nn.Sequential(nn.MaxPool2d(pool), nn.Dropout(dropout)))


def _small_cnn(match: re.Match[str], classes: int, channels: int, sides: tuple[int, int]) -> StagedNet:
    _require_size(match, sides, stages=3)
    stem = PlainStage(normed(channels, 16), nn.ReLU())
    first = PlainStage(normed(16, 16), nn.ReLU(), nn.MaxPool2d(2))
    second = PlainStage(normed(16, 32), nn.ReLU(), nn.MaxPool2d(2))
    third = PlainStage(normed(32, 64), nn.ReLU())
    return _globally_pooled(stem, (first, second, third), (), 64, classes)


def _tree(match: re.Match[str], classes: int, channels: int, sides: tuple[int, int]) -> DecisionTree:
    return DecisionTree(int(match["depth"]), classes, (channels, *sides))


def _bottom(match: re.Match[str], classes: int, channels: int, sides: tuple[int, int]) -> StagedNet:
    whole = build_model(match["base"], classes=classes, channels=channels, image_size=sides)
    kept, stages = int(match["kept"]), getattr(whole, "stages", ())
    if kept >= len(stages):
        raise ValueError(f"{match[0]} cannot be: {match['base']} has {len(stages)} stages, and one at least must go")
    with torch.no_grad():
        view = whole.eval()(torch.zeros(1, channels, *sides))
    return _globally_pooled(whole.stem, stages[:kept], (), view.maps[kept - 1].shape[1], classes).train()


def _quantised(match: re.Match[str], classes: int, channels: int, sides: tuple[int, int]) -> QuantisedNet:
    backbone = build_model(match["base"], classes=classes, channels=channels, image_size=sides)
    return QuantisedNet(backbone, int(match["bits"]))


def _behind_modality(match: re.Match[str], classes: int, channels: int, sides: tuple[int, int]) -> ModalityNet:
    modality = MODALITIES[match["modality"]]()
    _, channels, *seen = modality(torch.zeros(1, channels, *sides)).shape
    try:
        backbone = build_model(match["base"], classes=classes, channels=channels, image_size=tuple(seen))
    except ValueError as error:
        if tuple(seen) == sides:
            raise
        raise ValueError(f"{match[0]} sees {seen[0]} x {seen[1]} of {sides[0]} x {sides[1]} pixels: {error}") from error
    return ModalityNet(modality, backbone)


def _with_heads(match: re.Match[str], classes: int, channels: int, sides: tuple[int, int]) -> HeadedNet:
    backbone = build_model(match["base"], classes=classes, channels=channels, image_size=sides)
    return add_heads(backbone, match["heads"], channels, sides)


FACTOR = r"(?P<factor>[1-9]\d*|(?:0|[1-9]\d*)\.\d*[1-9])"  # a width is written in one way only
PRUNED = r"(?:_pruned(?P<kept>0\.\d*[1-9]))?"
FAMILIES = (
    (rf"(?P<base>resnet(?:18|34|50|152)|resnext50_4|plain(?:18|34))(?P<upscaled>@224)?{PRUNED}", _four_stages),
    (rf"(?P<base>resnet|plain)(?P<depth>8|14|20|26|32|38|44|56|110|116)(?:x{FACTOR})?{PRUNED}", _three_stages),
    (rf"wrn_(?P<depth>[1-9]\d*)_{FACTOR}{PRUNED}", _wide_resnet),
    (r"mobilenet_v2", _mobilenet),
    (r"swish_(?P<role>teacher|student)", _swish_cnn),
    (r"cnn_small", _small_cnn),
    (r"tree_(?P<depth>[1-9]|1[0-2])", _tree),
    # what is made of them
    (r"(?P<base>[^@+]+(?:@224)?)_bottom(?P<kept>[1-9])", _bottom),
    (r"(?P<base>[^+]+)_int(?P<bits>[2-8])", _quantised),
    (rf"(?P<base>[^@+]+(?:@224)?)@(?P<modality>{'|'.join(MODALITIES)})", _behind_modality),
    (rf"(?P<base>[^+]+)\+(?P<heads>{'|'.join(HEADS)})", _with_heads),
)
