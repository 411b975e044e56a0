"""Early classifiers: heads that read the maps of a network's stages, and networks that carry them as exits."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kdstudy.core import View


class Head(nn.Module):
    """Layers on a stage's map, global average pooling and a linear classifier."""

    def __init__(self, layers: nn.Module, width: int, classes: int) -> None:
        """`layers` map (B, c, h, w) to (B, `width`, h', w')."""
        super().__init__()
        self.layers = layers
        self.classifier = nn.Linear(width, classes)
        for layer in layers.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, stage_map: Tensor) -> View:
        """The exit's logits (B, C) and the embedding (B, `width`) that they are read from."""
        embedding = self.layers(stage_map).mean(dim=(2, 3))
        return View(self.classifier(embedding), embedding=embedding)


def bottleneck_heads(view: View) -> nn.ModuleList:
    """A head for the map of every stage but the last, sized by a sample view (Zhang et al. 2019, ICCV).

    1x1 convolution to c/4 channels, k x k convolution of stride k without padding, 1x1 convolution to c, all with bias,
    each followed by batch norm and ReLU. c is the last stage's width, k the factor by which the map is larger than the
    last one, along each side. ValueError where c or a side is not divisible, and for fewer than two stages.
    """
    *earlier, last = _maps(view)
    width = last.shape[1]
    if width % 4:
        raise ValueError(f"the last stage must have a multiple of 4 channels for bottleneck heads, not {width}")
    heads = []
    for stage_map in earlier:
        shrink = _shrink(stage_map, last)
        layers = nn.Sequential(
            *_normed(nn.Conv2d(stage_map.shape[1], width // 4, 1)),
            *_normed(nn.Conv2d(width // 4, width // 4, shrink, shrink)),
            *_normed(nn.Conv2d(width // 4, width, 1)),
        )
        heads.append(Head(layers, width, view.logits.shape[1]))
    return nn.ModuleList(heads)


def _shrink(stage_map: Tensor, last: Tensor) -> tuple[int, ...]:
    sides, final = stage_map.shape[2:], last.shape[2:]
    if any(side % least for side, least in zip(sides, final, strict=True)):
        raise ValueError(
            f"for bottleneck heads the maps' sides must be multiples of the last one's {_times(final)} pixels, "
            f"not {_times(sides)}: choose another image size"
        )
    return tuple(side // least for side, least in zip(sides, final, strict=True))


def _normed(convolution: nn.Conv2d) -> tuple[nn.Module, ...]:
    return convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU()


def separable_heads(view: View) -> nn.ModuleList:
    """A head for the map of every stage but the last, sized by a sample view (Zhang et al. 2020, NeurIPS).

    As many separable units as stages follow; each halves the map's sides and doubles its channels. ValueError for fewer
    than two stages.
    """
    maps = _maps(view)
    heads = []
    for number, stage_map in enumerate(maps[:-1], start=1):
        units = len(maps) - number
        widths = [stage_map.shape[1] * 2**unit for unit in range(units + 1)]
        layers = nn.Sequential(*(_separable_unit(width) for width in widths[:-1]))
        heads.append(Head(layers, widths[-1], view.logits.shape[1]))
    return nn.ModuleList(heads)


def _separable_unit(width: int) -> nn.Sequential:
    """Two depthwise-separable convolutions, from `width` to twice as many channels, without bias."""
    return nn.Sequential(*_separable(width, width, stride=2), *_separable(width, 2 * width, stride=1))


def _separable(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
    depthwise = nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False)
    return depthwise, *_normed(nn.Conv2d(inputs, outputs, 1, bias=False))


def _maps(view: View) -> tuple[Tensor, ...]:
    if len(view.maps) < 2:
        raise ValueError(f"heads read the stages before the last: there must be 2 maps or more, not {len(view.maps)}")
    return view.maps


def _times(sides: Iterable[int]) -> str:
    return " x ".join(str(side) for side in sides)


HEADS: dict[str, Callable[[View], nn.ModuleList]] = {"heads": bottleneck_heads, "sepheads": separable_heads}


class HeadedNet(nn.Module):
    """A network with a head on every stage but the last: its view, and the heads' views as `exits`.

    Whatever else is asked of it, such as `stages` or `resume`, the backbone answers.
    """

    def __init__(self, backbone: nn.Module, heads: nn.ModuleList) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = heads

    def forward(self, images: Tensor) -> View:
        """The backbone's view with `exits`, shallow to deep."""
        view = self.backbone(images)
        return view._replace(exits=exits_of(self.heads, view.maps))

    def __getattr__(self, name: str) -> Any:
        """A parameter, buffer or submodule, or what the backbone has under this name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("backbone"), name)


class Exit(nn.Module):
    """One exit as a network of its own, for whatever evaluates networks."""

    def __init__(self, network: nn.Module, number: int) -> None:
        """`number` counts exits from 0, shallow to deep; -1 is the deepest."""
        super().__init__()
        self.network = network
        self.number = number

    def forward(self, images: Tensor) -> View:
        """The exit's view."""
        return self.network(images).exits[self.number]


def exits_of(heads: Iterable[nn.Module], maps: Iterable[Tensor]) -> tuple[View, ...]:
    """What heads say of the maps that they belong to, shallow to deep; the last map has no head."""
    *earlier, _ = maps
    return tuple(head(stage_map) for head, stage_map in zip(heads, earlier, strict=True))


def add_heads(backbone: nn.Module, kind: str, channels: int, sides: tuple[int, int]) -> HeadedNet:
    """A new network with new heads of a kind of `HEADS`, for images (B, `channels`, *`sides`)."""
    with torch.no_grad():
        view = backbone.eval()(torch.zeros(1, channels, *sides))
    return HeadedNet(backbone.train(), HEADS[kind](view))
