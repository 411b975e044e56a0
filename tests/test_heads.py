"""Heads against published sizes and a forward written out; networks that carry them against the same ones without."""

import copy

import pytest
import torch
import torch.nn.functional as F
import toy
from batches import oracles
from test_methods import toy_bank
from torch import Tensor, nn

from kdstudy.core import View
from kdstudy.evaluate import logits_of
from kdstudy.heads import Exit, bottleneck_heads, separable_heads
from kdstudy.models import build_model, count_parameters

KINDS = ("heads", "sepheads")
kinds = pytest.mark.parametrize("kind", KINDS)
backbones = pytest.mark.parametrize("name", ["wrn_10_0.5", "resnet8", "resnet18", "cnn_small"])


def build(name: str, size: int | tuple[int, int] = 8, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(name, classes=4, channels=1, image_size=size).double()


def unsettled(network: nn.Module) -> nn.Module:
    return toy.unsettled(network).eval()


def images(count: int = 3, size: tuple[int, int] = (8, 8)) -> Tensor:
    return torch.randn(count, 1, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def sample(*shapes: tuple[int, ...]) -> View:
    return View(torch.zeros(2, 4), maps=tuple(torch.zeros(2, *shape) for shape in shapes))


def sizes_of_heads(name: str) -> list[int]:
    with torch.device("meta"):
        return [count_parameters(head) for head in build_model(name, classes=100).heads]


@pytest.mark.parametrize(
    ("name", "key"),
    [("resnet20", "resnet20_C100"), ("wrn_16_2", "wrn_k2_C100"), ("resnet18", "resnet18_C100")],
)
def test_bottleneck_heads_have_the_stated_sizes(name, key):
    assert sizes_of_heads(f"{name}+heads") == oracles()[f"g_relheads_params_{key}"]


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("resnet20", ((16, 32), (32,))),
        ("wrn_16_2", ((32, 64), (64,))),
        ("resnet18", ((64, 128, 256), (128, 256), (256,))),
    ],
)
def test_separable_heads_have_one_unit_per_later_stage(name, units):
    # a unit: two 3x3 depthwise kernels, c c and 2 c c pointwise weights, two batch norms of c and 2 c channels
    expected = [sum(3 * c * c + 24 * c for c in row) + 100 * (2 * row[-1] + 1) for row in units]
    assert sizes_of_heads(f"{name}+sepheads") == expected


def settings(convolution: nn.Conv2d) -> dict:
    return {"stride": convolution.stride, "padding": convolution.padding, "groups": convolution.groups}


def literal(layer: nn.Module, x: Tensor) -> Tensor:
    """A convolution or batch norm of a network in eval mode."""
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, layer.weight, layer.bias, **settings(layer))
    mean, var, scale, shift = (
        t[:, None, None] for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    return (x - mean) / (var + layer.eps).sqrt() * scale + shift


def classified(head: nn.Module, x: Tensor) -> Tensor:
    return x.flatten(2).sum(dim=2) / x[0, 0].numel() @ head.classifier.weight.T + head.classifier.bias


def weighted(head: nn.Module) -> list[nn.Module]:
    return [layer for layer in head.layers.modules() if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d))]


@pytest.mark.parametrize(("number", "kernel"), [(0, 4), (1, 2)])
def test_a_bottleneck_head_written_out(number, kernel):
    network = unsettled(build("wrn_10_0.5+heads"))
    view, head = network(images()), network.heads[number]
    layers = weighted(head)
    shapes = [(4 * 2, 8 * 2**number, 1, 1), (8, 8, kernel, kernel), (32, 8, 1, 1)]
    assert [tuple(layer.weight.shape) for layer in layers[::2]] == shapes
    assert [settings(layer) for layer in layers[::2]] == [
        {"stride": (step, step), "padding": (0, 0), "groups": 1} for step in (1, kernel, 1)
    ]
    x = view.maps[number]
    for convolution, norm in zip(layers[::2], layers[1::2], strict=True):
        x = literal(norm, literal(convolution, x)).clamp(min=0)
    assert x.shape == view.maps[-1].shape
    torch.testing.assert_close(view.exits[number].logits, classified(head, x))
    torch.testing.assert_close(view.exits[number].embedding, x.mean(dim=(2, 3)))


@pytest.mark.parametrize(("number", "units"), [(0, 2), (1, 1)])
def test_a_separable_head_written_out(number, units):
    network = unsettled(build("wrn_10_0.5+sepheads"))
    view, head = network(images()), network.heads[number]
    layers = weighted(head)
    assert len(layers) == 6 * units
    x = view.maps[number]
    for unit in range(units):
        c = x.shape[1]
        depth1, point1, norm1, depth2, point2, norm2 = layers[6 * unit : 6 * unit + 6]
        assert [settings(layer) for layer in (depth1, depth2)] == [
            {"stride": (step, step), "padding": (1, 1), "groups": c} for step in (2, 1)
        ]
        assert (point1.weight.shape, point2.weight.shape) == ((c, c, 1, 1), (2 * c, c, 1, 1))
        x = literal(norm1, literal(point1, literal(depth1, x))).clamp(min=0)
        x = literal(norm2, literal(point2, literal(depth2, x))).clamp(min=0)
    assert x.shape == view.maps[-1].shape
    torch.testing.assert_close(view.exits[number].logits, classified(head, x))
    torch.testing.assert_close(view.exits[number].embedding, x.mean(dim=(2, 3)))


@kinds
@backbones
def test_a_network_with_heads_is_the_network_and_heads(name, kind):
    plain, headed = unsettled(build(name)), build(f"{name}+{kind}")
    headed.backbone.load_state_dict(plain.state_dict())
    views = [network(images()) for network in (plain, headed.eval())]
    assert len(views[1].exits) == len(views[0].maps) - 1
    for one, other in zip(views[0]._replace(exits=()), views[1]._replace(exits=()), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert [view.logits.shape for view in views[1].exits] == [(3, 4)] * len(views[1].exits)


@kinds
@backbones
def test_heads_change_neither_the_backbones_first_weights_nor_its_mode(name, kind):
    plain, headed = build(name), build(f"{name}+{kind}")
    assert all(module.training for module in headed.modules())
    states = [network.state_dict() for network in (plain, headed.backbone)]
    torch.testing.assert_close(*states, rtol=0, atol=0)  # sizing the heads has moved no batch statistics


@kinds
def test_heads_of_a_network_are_new_with_every_seed(kind):
    one, other = (build(f"wrn_10_0.5+{kind}", seed=seed).heads[0].classifier.weight for seed in (0, 1))
    assert not torch.equal(one, other)


@kinds
def test_convolutions_of_heads_start_like_those_of_networks(kind):
    head = build(f"resnet18+{kind}").heads[-1]
    pointwise = [layer for layer in weighted(head) if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)]
    for layer in pointwise:
        assert layer.weight.std().item() == pytest.approx((2 / layer.out_channels) ** 0.5, rel=0.05)


@kinds
@pytest.mark.parametrize("number", [0, 1])
def test_a_head_reads_its_stage_and_nothing_behind_it(kind, number):
    network = build(f"wrn_10_0.5+{kind}").train()
    network(images()).exits[number].logits.square().sum().backward()
    reached = [any(p.grad is not None and p.grad.any() for p in stage.parameters()) for stage in network.stages]
    assert reached == [True] * (number + 1) + [False] * (2 - number)
    assert [head.classifier.weight.grad is not None for head in network.heads] == [number == 0, number == 1]
    assert network.classifier.weight.grad is None


@kinds
def test_the_backbone_answers_for_a_network_with_heads(kind):
    network = unsettled(build(f"wrn_10_0.5+{kind}"))
    view = network(images())
    torch.testing.assert_close(network.resume(1, view.maps[0]).logits, view.logits)
    torch.testing.assert_close(network.section(2, view.maps[0]), view.maps[1])
    assert network.norms() == network.backbone.norms()
    assert network.get_submodule("stages.0") is network.backbone.stages[0]
    assert len(list(network.parameters())) == sum(len(list(part.parameters())) for part in network.children())
    with pytest.raises(AttributeError, match="no attribute 'stagse'"):
        network.stagse  # noqa: B018


@kinds
def test_a_network_with_heads_is_copied_and_saved_whole(kind):
    network, other = (unsettled(build(f"wrn_10_0.5+{kind}", seed=seed)) for seed in (0, 1))
    other.load_state_dict(network.state_dict())
    for copied in (other, copy.deepcopy(network)):
        for one, its in zip(network(images()).exits, copied(images()).exits, strict=True):
            assert torch.equal(one.logits, its.logits)


@kinds
@pytest.mark.parametrize("number", [0, 1, -1])
def test_an_exit_can_be_evaluated_like_a_network(kind, number):
    network, bank = unsettled(build(f"wrn_10_0.5+{kind}")), toy_bank(10)
    with torch.no_grad():
        expected = network(next(bank.plain(10))).exits[number].logits
    torch.testing.assert_close(logits_of(Exit(network, number), bank), expected)


def test_bottleneck_heads_shrink_each_side_by_its_own_factor():
    heads = bottleneck_heads(sample((6, 8, 12), (8, 2, 4)))
    assert heads[0].layers[3].kernel_size == heads[0].layers[3].stride == (4, 3)


def test_separable_heads_take_any_size():
    view = build("wrn_10_0.5+sepheads", size=(9, 5))(images(2, (9, 5)))
    assert [tuple(early.embedding.shape) for early in view.exits] == [(2, 32)] * 2


@pytest.mark.parametrize("name", ["wrn_10_1+head", "wrn_10_1+heads+heads", "wrn_10_1+", "+heads", "wrn_10_1 +heads"])
def test_other_suffixes_are_unknown(name):
    with pytest.raises(ValueError, match="unknown model"):
        build(name)


def test_a_near_miss_of_a_suffix_is_told():
    with pytest.raises(ValueError, match=r"did you mean 'wrn_40_2\+heads'"):
        build("wrn_40_2+head")


@pytest.mark.parametrize("heads", [bottleneck_heads, separable_heads])
@pytest.mark.parametrize("shapes", [(), ((8, 4, 4),)])
def test_a_network_of_one_stage_has_no_place_for_heads(heads, shapes):
    with pytest.raises(ValueError, match=f"there must be 2 maps or more, not {len(shapes)}"):
        heads(sample(*shapes))


def test_bottleneck_heads_refuse_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="multiples of the last one's 2 x 2 pixels, not 3 x 3"):
        bottleneck_heads(sample((4, 6, 6), (8, 3, 3), (8, 2, 2)))
    with pytest.raises(ValueError, match="multiple of 4 channels for bottleneck heads, not 6"):
        bottleneck_heads(sample((4, 4, 4), (6, 2, 2)))
