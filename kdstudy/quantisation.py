"""Networks rounded to integers while they train, by torch's own quantisation, and what they are once they are integers.

`QuantisedNet` is a network whose weights and activations lie on the grids of integers, but are floats. `to_int8` makes
of it a network that computes in 8-bit integers on a CPU, and `measure` says what that saves.
"""

import copy
import operator
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    FusedMovingAvgObsFakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    QConfig,
    QConfigMapping,
)
from torch.ao.quantization.quantize_fx import convert_fx, fuse_fx, prepare_qat_fx
from torch.fx import GraphModule

from kdstudy.core import View

MOVING_SHARE = 0.01  # of a batch's extremes in the range of an activation
TINY = 1e-8  # the least range of a channel of weights, which may all be zero


class FakeQuantise(FusedMovingAvgObsFakeQuantize):
    """Rounds to a grid of integers, `(clamp(round(x / scale) + zero, least, most) - zero) * scale`.

    The gradient passes as if nothing were done, but for values beyond the grid, where it is zero. In train mode the
    grid follows the values, in eval mode it stays, so that evaluation leaves no trace. Weights, (channels, ...), have
    a grid per channel that spans their extremes, with the scale `max |w| / most` and zero at 0; activations one that
    spans a moving average of the extremes of batches.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The rounded values, in the precision of `x`."""
        least, most = self.activation_post_process.quant_min, self.activation_post_process.quant_max
        if self.is_per_channel:
            # not by torch's fused operation, which waits for a GPU and shifts the zero of channels of one sign
            if self.training:
                self._span(x.detach(), most)
            return torch.fake_quantize_per_channel_affine(x, self.scale, torch.zeros_like(self.scale), 0, least, most)
        if self.training and x.dtype == torch.float32:
            return super().forward(x)
        if self.training:
            super().forward(x.detach().float())  # only for the grid, which is float32 throughout
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, least, most)

    def _span(self, weights: Tensor, most: int) -> None:
        lowest, highest = weights.flatten(start_dim=1).aminmax(dim=1)
        self.activation_post_process.min_val.copy_(lowest)
        self.activation_post_process.max_val.copy_(highest)
        self.scale.copy_(torch.maximum(-lowest, highest).clamp(min=TINY) / most)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero as they are: the observer's own formula differs from the one that trains the network."""
        return self.scale, self.zero_point

    def _apply(self, *arguments, **options):
        result = super()._apply(*arguments, **options)
        for module in self.modules():  # whatever the precision of the network
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    setattr(module, name, buffer.float())
        return result


class QuantisedNet(nn.Module):
    """A network on the grids of integers: weights of `bits` bits, 8 in the first and last layer, activations of 8.

    A batch norm that follows a convolution is folded into its weights, by the running variance, before these are
    rounded (Jacob et al. 2018); in train mode it normalises by the batch all the same. Of any other, only the output is
    rounded. The mean over a last map is of floats, and rounded itself. Computed in float32 or float64, also under
    autocast: bfloat16 is too coarse for the grids.
    """

    def __init__(self, network: nn.Module, bits: int = 8) -> None:
        """A copy of `network`, with its weights; the grids are unknown until `calibrate` or training sets them.

        Raises ValueError for less than 2 or more than 8 bits, and for a network that is quantised already.
        """
        super().__init__()
        if not 2 <= bits <= 8:
            raise ValueError(f"weights must have 2 to 8 bits, not {bits}")
        if fake_quantisers(network):
            raise ValueError("this network is quantised already")
        self.bits = bits
        with _silent():
            plain = _Logits(copy.deepcopy(network).requires_grad_(True)).train()
            self.graph = prepare_qat_fx(plain, _configuration(network, bits), ())
        _share_by_name(self.graph)
        for module in self.graph.modules():
            if hasattr(module, "weight_fake_quant"):
                _size(module.weight_fake_quant, len(module.weight))

    def forward(self, images: Tensor) -> View:
        """The logits (B, C); there are no other taps."""
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=False):
            return View(self.graph(images))


class IntegerNet(nn.Module):
    """What `to_int8` makes: convolutions, sums and linear layers in integers, on a CPU, for inference alone."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, images: Tensor) -> View:
        """The logits (B, C), in float32."""
        return View(self.graph(images))


class _Logits(nn.Module):
    """A network as a function from images to logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).logits


def fake_quantisers(network: nn.Module) -> list[FakeQuantise]:
    """All modules that round, in a fixed order."""
    return [module for module in network.modules() if isinstance(module, FakeQuantise)]


@torch.no_grad()
def calibrate(network: QuantisedNet, batches: Iterable[Tensor]) -> None:
    """Set all grids from plain images; weights and batch statistics stay. Leaves the network in eval mode."""
    network.eval()
    for module in fake_quantisers(network):
        module.train()
    for images in batches:
        network(images)
    network.eval()


def to_int8(network: QuantisedNet) -> IntegerNet:
    """The network in integers, with the grids that it was trained with; the given one stays as it is.

    It computes what the given one does in eval mode, but for values on the edge between two steps; behind dropout,
    where torch rounds once less; and on x86 CPUs without VNNI, where the sum of two large products is cut off at 16
    bits. Weights of less than 8 bits fill bytes, too. Raises ValueError if the grids are not known yet.
    """
    ranges = [module.activation_post_process.max_val for module in fake_quantisers(network)]
    if not all(extreme.isfinite().all() for extreme in ranges):
        raise ValueError("the grids of this network are not known: calibrate or train it first")
    with _silent():
        return IntegerNet(convert_fx(copy.deepcopy(network.graph).cpu().float().eval()))


@dataclass(frozen=True)
class Savings:
    """A network in full precision beside itself in integers; see `measure`."""

    full_bytes: int
    int8_bytes: int
    full_seconds: float
    int8_seconds: float
    agreement: float


@torch.no_grad()
def measure(network: nn.Module, quantised: QuantisedNet, images: Tensor, repeats: int = 15) -> Savings:
    """Size and speed of `network` and of `quantised` in integers, on the CPU.

    Bytes are those of a safetensors file with all the numbers of each. Seconds are for the batch `images`, median of
    `repeats`, measured in turn, with one thread; the network in full precision has its batch norms folded into its
    convolutions, too, where that is possible. Agreement is the percentage of the images for which integers and
    fake-quantised floats predict the same class.
    """
    images = images.cpu().float()
    with _silent():
        full = fuse_fx(_Logits(copy.deepcopy(network).cpu().float()).eval())
    fake, integer = copy.deepcopy(quantised).cpu().float().eval(), to_int8(quantised)
    same = fake(images).logits.argmax(dim=1) == integer(images).logits.argmax(dim=1)
    full_seconds, int8_seconds = _seconds_in_turn((full, integer.graph), images, repeats)
    return Savings(
        full_bytes=_file_bytes(full.state_dict()),
        int8_bytes=_file_bytes(dict(plain_tensors(integer))),
        full_seconds=full_seconds,
        int8_seconds=int8_seconds,
        agreement=100 * same.double().mean().item(),
    )


def plain_tensors(network: IntegerNet) -> Iterator[tuple[str, Tensor]]:
    """All numbers of a network in integers as ordinary tensors: weights as bytes, with a scale for each channel."""
    for name, value in network.graph.state_dict().items():
        parts = value if isinstance(value, tuple) else (value,)  # a linear layer keeps weight and bias together
        for number, part in enumerate(part for part in parts if isinstance(part, Tensor)):
            key = f"{name}.{number}" if len(parts) > 1 else name
            if part.is_quantized:
                yield f"{key}.scales", part.q_per_channel_scales().float()
            yield key, part.int_repr() if part.is_quantized else part


def _file_bytes(state: dict[str, Tensor]) -> int:
    return len(safetensors.torch.save({name: tensor.detach().contiguous() for name, tensor in state.items()}))


def _seconds_in_turn(networks: Iterable[nn.Module], images: Tensor, repeats: int) -> list[float]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rounds = [[_seconds(network, images) for network in networks] for _ in range(repeats + 2)]
    finally:
        torch.set_num_threads(threads)
    return [median(column) for column in zip(*rounds[2:], strict=True)]  # the first two warm up


def _seconds(network: nn.Module, images: Tensor) -> float:
    start = time.perf_counter()
    network(images)
    return time.perf_counter() - start


def _configuration(network: nn.Module, bits: int) -> QConfigMapping:
    layers = [name for name, module in network.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    mapping = QConfigMapping().set_global(_grids(bits))
    # in floats: torch would scale a swish, or average a map, on the grid of what these read
    for operation in (operator.mul, nn.AdaptiveAvgPool2d):
        mapping.set_object_type(operation, None)
    for name in (layers[0], layers[-1]):
        mapping.set_module_name(f"network.{name}", _grids(8))
    return mapping


def _grids(bits: int) -> QConfig:
    activation = FakeQuantise.with_args(
        observer=MovingAverageMinMaxObserver,
        quant_min=0,
        quant_max=255,
        dtype=torch.quint8,
        averaging_constant=MOVING_SHARE,
    )
    weight = FakeQuantise.with_args(
        observer=MovingAveragePerChannelMinMaxObserver,
        quant_min=-(2 ** (bits - 1)),
        quant_max=2 ** (bits - 1) - 1,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
    )
    return QConfig(activation=activation, weight=weight)


def _share_by_name(graph: GraphModule) -> None:
    """Let nodes that share a module call it by one name, so that it stands in the state once."""
    names: dict[int, str] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            name = names.setdefault(id(graph.get_submodule(node.target)), node.target)
            if name != node.target:
                graph.delete_submodule(node.target)
                node.target = name
    graph.recompile()


def _size(quantiser: FakeQuantise, channels: int) -> None:
    """Give the buffers the shapes that they will have, in place of those that torch finds out from the first batch."""
    quantiser.scale = torch.ones(channels)
    quantiser.zero_point = torch.zeros(channels, dtype=torch.int32)
    quantiser.activation_post_process.min_val = torch.full((channels,), float("inf"))
    quantiser.activation_post_process.max_val = torch.full((channels,), float("-inf"))


def _silent() -> warnings.catch_warnings:
    """Torch announces that its quantisation, modules and tensors alike, will leave for a package of its own."""
    return warnings.catch_warnings(action="ignore")
