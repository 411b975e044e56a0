"""K networks of one architecture as one network, K times as wide, that computes what they compute, in fewer kernels.

Horizontal fusion (Wang et al., "Horizontally Fused Training Array", MLSys 2021): the channels of the K networks lie
side by side, a convolution is one in K times as many groups, K batch norms are one over all channels, and K linear
layers are one batched product.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.blocks import LinearBottleneck, PlainStage, PreActivationBlock, ResidualBlock, ScaledSwish, StagedNet
from kdstudy.core import View
from kdstudy.heads import Head, HeadedNet
from kdstudy.modalities import MODALITIES, ModalityNet


class Fused(nn.Module):
    """K networks as one; from here on their parameters and buffers are views into its own.

    The networks stay what they are: an optimiser's step on one of them, `load_state_dict` and evaluation need to know
    nothing of this. Only their device and precision must not change. The fused network has a mode of its own, train or
    eval, at first theirs.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        """Raises ValueError for networks that `why_not_fused` gives a reason against."""
        super().__init__()
        if reason := why_not_fused(networks):
            raise ValueError(f"these networks cannot be fused: {reason}")
        self._networks = tuple(networks)  # in a tuple, so that they are not registered
        self._parts: list[tuple[nn.Parameter, list[nn.Parameter]]] = []  # a fused parameter, and the networks' own
        fused = {
            id(layers[0]): self._fuse(layers)
            for layers in zip(*(network.modules() for network in networks), strict=True)
            if type(layers[0]) in WIDENED
        }
        self.network = copy.deepcopy(networks[0], fused)  # where a layer stood, deepcopy puts the fused one

    def forward(self, images: Tensor) -> tuple[View, ...]:
        """The view of each network of images (B, channels, H, W) that all of them see."""
        self._require_networks()
        return _split(self.network(images), len(self._networks))

    def hand_back(self) -> None:
        """Give the gradient to the networks: each parameter's becomes its slice of the fused one, which is left None.

        Where no loss reached a fused parameter, the networks' have None. Where only some networks' losses did, the
        others' have zeros.
        """
        self._require_networks()
        for fused, parameters in self.parts():
            slices = [None] * len(parameters) if fused.grad is None else fused.grad.chunk(len(parameters))
            for parameter, gradient in zip(parameters, slices, strict=True):
                parameter.grad = gradient
            fused.grad = None

    def parts(self) -> Iterator[tuple[nn.Parameter, list[nn.Parameter]]]:
        """Every fused parameter, with the networks' own that lie in it, in their order."""
        return iter(self._parts)

    def release(self) -> None:
        """Give every network memory of its own again, with what it holds now. This ends the fused network."""
        for network in self._networks:
            for tensor in _tensors(network):
                tensor.data = tensor.detach().clone()
        self._networks = ()

    def _fuse(self, layers: Sequence[nn.Module]) -> nn.Module:
        fused = WIDENED[type(layers[0])](layers[0], len(layers)).train(layers[0].training)
        for name, _ in layers[0].named_parameters(recurse=False):
            parameters = [getattr(layer, name) for layer in layers]
            setattr(fused, name, nn.Parameter(_united(parameters)))
            self._parts.append((getattr(fused, name), parameters))
        for name, _ in layers[0].named_buffers(recurse=False):
            setattr(fused, name, _united([getattr(layer, name) for layer in layers]))
        return fused

    def _require_networks(self) -> None:
        if not self._networks:
            raise ValueError("the networks were released: fuse them anew")

    def _apply(self, *arguments, **options):
        raise ValueError("a fused network stays where it is: move its networks, and fuse them then")


def _united(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors in one, side by side along dimension 0, in their memory format; they become views of it."""
    whole = torch.cat([torch.atleast_1d(tensor.detach()) for tensor in tensors])
    for tensor, part in zip(tensors, whole.chunk(len(tensors)), strict=True):
        tensor.data = part if tensor.dim() else part[0]
    return whole


def _split(part: Any, count: int) -> tuple:
    """A view whose tensors are (B, `count` times as many, ...) as `count` views."""
    if part is None:
        return (None,) * count
    if isinstance(part, Tensor):
        return part.chunk(count, dim=1)
    make = View._make if isinstance(part, View) else tuple
    pieces = [_split(item, count) for item in part]
    return tuple(make(piece[number] for piece in pieces) for number in range(count))


class _Convolutions(nn.Conv2d):
    """`count` convolutions like `one` on as many times the channels, or on images that all of them read."""

    def __init__(self, one: nn.Conv2d, count: int) -> None:
        inputs, outputs, groups = (count * each for each in (one.in_channels, one.out_channels, one.groups))
        options = {"groups": groups, "bias": one.bias is not None, "device": "meta"}
        super().__init__(inputs, outputs, one.kernel_size, one.stride, one.padding, one.dilation, **options)
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        """(B, count x inputs, H, W), or (B, inputs, H, W), to (B, count x outputs, h, w)."""
        if x.shape[1] == self.in_channels:
            return super().forward(x)
        if self.groups == self.count:  # every output reads all inputs: one convolution with more outputs
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation)
        return super().forward(x.repeat(1, self.count, 1, 1))


class _LinearLayers(nn.Linear):
    """`count` linear layers like `one`, each on its own inputs."""

    def __init__(self, one: nn.Linear, count: int) -> None:
        super().__init__(count * one.in_features, count * one.out_features, bias=one.bias is not None, device="meta")
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        """(B, count x inputs) to (B, count x outputs)."""
        inputs = x.unflatten(1, (self.count, -1)).transpose(0, 1)
        weight = self.weight.unflatten(0, (self.count, -1)).transpose(1, 2)
        if self.bias is None:
            outputs = torch.bmm(inputs, weight)
        else:
            outputs = torch.baddbmm(self.bias.view(self.count, 1, -1), inputs, weight)
        return outputs.transpose(0, 1).flatten(1)


def _batch_norms(one: nn.BatchNorm2d, count: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(
        count * one.num_features, one.eps, one.momentum, one.affine, one.track_running_stats, device="meta"
    )


WIDENED: dict[type, Callable[[nn.Module, int], nn.Module]] = {
    nn.Conv2d: _Convolutions,
    nn.BatchNorm2d: _batch_norms,
    nn.Linear: _LinearLayers,
}
NETWORKS = (StagedNet, HeadedNet, ModalityNet)
PASSED_THROUGH = (  # whatever treats every channel by itself, and whatever only holds other modules
    *(nn.ReLU, nn.ReLU6, ScaledSwish, nn.Identity, nn.Flatten, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Upsample),
    *(nn.Sequential, nn.ModuleList, PlainStage, ResidualBlock, PreActivationBlock, LinearBottleneck, Head),
    *MODALITIES.values(),  # they see the images, which are not split
)
KNOWN = {*NETWORKS, *WIDENED, *PASSED_THROUGH}


def why_not_fused(networks: Sequence[nn.Module]) -> str:
    """Why these networks cannot be one, "" if they can.

    They must have one architecture, precision, device and mode, and be trained in all their parameters, of which they
    share none. Dropout is refused because its random numbers would be others.
    """
    if not networks:
        return "there is none"
    return next(_obstacles(networks), "")


def _obstacles(networks: Sequence[nn.Module]) -> Iterator[str]:
    first = networks[0]
    if type(first) not in NETWORKS:
        yield f"{type(first).__name__} is no network of which that is known"
    for name, module in first.named_modules():
        if reason := _unfit(module):
            yield f"{name} is {reason}"
    for network in networks[1:]:
        if difference := _difference(first, network):
            yield f"they differ, {difference}"
    for name, parameter in (item for network in networks for item in network.named_parameters()):
        if not parameter.requires_grad:
            yield f"{name} is frozen"
    places = [tensor.data_ptr() for network in networks for tensor in _tensors(network)]
    if len(set(places)) < len(places):
        yield "they share parameters or buffers"


def _unfit(module: nn.Module) -> str:
    if type(module) not in KNOWN:
        return f"a {type(module).__name__}"
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return "a convolution that pads with other values than zeros"
    if isinstance(module, nn.BatchNorm2d) and module.momentum is None:
        return "a batch norm with cumulative statistics"
    return ""


def _difference(one: nn.Module, other: nn.Module) -> str:
    """Where two networks do so in layers, tensors or modes, "" if nowhere."""
    for described, counterpart in zip_longest(_described(one), _described(other), fillvalue="nothing there"):
        if described != counterpart:
            return f"{described} and {counterpart}"
    return ""


def _described(network: nn.Module) -> Iterator[str]:
    """A line for the network and every layer: settings, mode, and the tensors' shapes, precision and device."""
    for name, module in network.named_modules():
        mode = "in train mode" if module.training else "in eval mode"
        settings = module.extra_repr()
        yield f"{name or 'network'}: {type(module).__name__}({settings}) {mode}"
    for name, tensor in network.state_dict().items():
        yield f"{name}: {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of every module, one that two modules share twice."""
    for module in network.modules():
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)
