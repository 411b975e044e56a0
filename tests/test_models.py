"""Networks: published sizes, other people's implementations as oracles, and what every tap of a View promises."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import torchvision
import toy
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import ResNet50_Weights, ResNet152_Weights, ResNeXt50_32X4D_Weights
from torchvision.models.resnet import BasicBlock

from kdstudy.core import View
from kdstudy.models import ScaledSwish, build_model, count_parameters, known_models, reset

RESIDUAL = ("resnet18", "resnet8", "resnet14x0.5", "resnet14_pruned0.5")
WIDE = ("wrn_10_0.25", "wrn_16_1", "wrn_16_1.5", "wrn_10_0.5_pruned0.5")
NO_SHORTCUT = ("plain18", "plain8", "plain14x0.5")
LINEAR = ("mobilenet_v2",)
PLAIN = ("swish_teacher", "swish_student", "cnn_small")


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(name, classes=10)


def unsettled(name: str) -> nn.Module:
    return toy.unsettled(build(name).double())


def images(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def sides(name: str) -> tuple[int, int]:
    """The least work that shows every tap: the swish CNNs take square images of 32 only."""
    return (32, 32) if name.startswith("swish") else (16, 12)


def tensors(view: View) -> list[Tensor]:
    return [view.stem, *view.maps, *view.pre_maps, view.embedding, view.logits]


def adopt(network: nn.Module, source: nn.Module) -> None:
    """Load the weights of `source`, which defines its layers in the same order under other names."""
    theirs = source.state_dict().values()
    network.load_state_dict(dict(zip(network.state_dict(), theirs, strict=True)))


def on_meta(name: str, classes: int, channels: int = 3, size: int = 32) -> tuple[int, float]:
    """Parameters, and multiply-adds of one image."""
    with torch.device("meta"):
        network = build_model(name, classes=classes, channels=channels, image_size=size).eval()
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, channels, size, size))
    return count_parameters(network), counter.get_total_flops() / 2


@pytest.mark.parametrize(
    ("name", "classes", "millions"),
    [
        # RepDistiller's and mdistiller's models on CIFAR-100, as the KD literature quotes them
        ("resnet8x4", 100, 1.23), ("resnet32x4", 100, 7.43), ("resnet20", 100, 0.28), ("resnet56", 100, 0.86),
        ("resnet110", 100, 1.74), ("wrn_16_2", 100, 0.70), ("wrn_40_1", 100, 0.57), ("wrn_40_2", 100, 2.26),
        # CIFAR-10: He et al. 2016; Zagoruyko & Komodakis 2016 and 2017 (36.5 and 0.2); the usual ones of a 3x3 stem
        ("resnet20", 10, 0.27), ("wrn_28_10", 10, 36.48), ("wrn_16_1", 10, 0.18),
        ("resnet18", 10, 11.17), ("resnet34", 10, 21.28), ("resnet50", 10, 23.52), ("plain20", 10, 0.27),
        ("mobilenet_v2", 10, 2.24), ("mobilenet_v2", 100, 2.35),
    ],
)  # fmt: skip
def test_published_parameter_counts(name, classes, millions):
    assert round(on_meta(name, classes)[0] / 1e6, 2) == millions


def test_exact_parameter_counts():
    # the article's Keras summaries for the swish CNNs; by hand for the smallest wide ResNet: stem 36, blocks
    # 304 + 920 + 3,632, last norm 32, classifier 170
    assert on_meta("swish_teacher", 10)[0] == 550_570
    assert on_meta("swish_student", 10)[0] == 256_958
    assert on_meta("wrn_10_0.25", 10, channels=1, size=8)[0] == 5_094
    # ResNets less their 1x1 shortcuts with norms; 269,722 and 1,727,962 are also those of He et al.'s bare shortcuts
    assert on_meta("plain34", 10)[0] == 21_282_122 - (8_192 + 256) - (32_768 + 512) - (131_072 + 1_024)
    assert on_meta("plain8x4", 100)[0] == 1_233_540 - (2_048 + 128) - (8_192 + 256) - (32_768 + 512)
    assert [on_meta(name, 10)[0] for name in ("plain20", "plain110")] == [269_722, 1_727_962]
    # torchvision's ImageNet network: the stem less 7x7 plus 3x3, the classifier for 10 classes
    assert on_meta("resnext50_4", 10)[0] == 25_028_904 - 9_408 + 1_728 - 2_049_000 + 20_490


def test_a_pruned_network_lacks_half_of_what_touches_the_middle_of_a_block():
    # per block: half of 9 i o + 9 o o weights and of the first norm's 2 o numbers; i is o / 2 where a stage opens
    lost = sum(
        (9 * inputs * width + 9 * width * width + 2 * width) // 2
        for width, opening in ((16, 16), (32, 16), (64, 32))
        for inputs in (opening, width, width)
    )
    assert on_meta("resnet20", 10)[0] - on_meta("resnet20_pruned0.5", 10)[0] == lost
    outer, inner = (build(name) for name in ("wrn_16_2", "wrn_16_2_pruned0.25"))
    for stage, pruned_stage in zip(outer.stages, inner.stages, strict=True):
        for block, pruned in zip(stage, pruned_stage, strict=True):
            (first, _), _, last = block.branch
            (pruned_first, pruned_norm), _, pruned_last = pruned.branch
            width = last.out_channels
            assert (first.in_channels, width) == (pruned_first.in_channels, pruned_last.out_channels)
            assert pruned_first.out_channels == pruned_norm.num_features == pruned_last.in_channels == width // 4


@pytest.mark.parametrize(
    ("name", "weights"),
    [("resnet50", ResNet50_Weights), ("resnet152", ResNet152_Weights), ("resnext50_4", ResNeXt50_32X4D_Weights)],
)
def test_imagenet_variants_have_the_size_and_cost_that_torchvision_states(name, weights):
    stated = weights.IMAGENET1K_V1.meta
    parameters, multiply_adds = on_meta(f"{name}@224", classes=1000)
    assert (parameters, round(multiply_adds / 1e9, 3)) == (stated["num_params"], stated["_ops"])


@pytest.mark.parametrize(
    ("name", "millions"),
    [("wrn_16_1", 26.7), ("wrn_40_2", 327.6), ("wrn_16_2", 101.1), ("resnet18", 555.5), ("resnet34", 1159.4),
     ("plain34", 1153.2), ("mobilenet_v2", 88.1)],
)  # fmt: skip
def test_multiply_adds_on_cifar100(name, millions):
    # counted by layer from the papers' tables; a stride in the wrong place changes it, and no parameter count
    assert round(on_meta(name, classes=100)[1] / 1e6, 1) == millions


def test_count_parameters_leaves_frozen_ones_out():
    network = build("cnn_small")
    network.classifier.requires_grad_(False)
    assert count_parameters(network) == sum(p.numel() for p in network.parameters()) - 650


def test_every_known_name_is_built():
    for name in known_models():
        place = "cpu" if "_int" in name else "meta"  # fixed precision asks for autocast, which meta lacks
        with torch.device(place):
            view = build_model(name, classes=7).eval()(torch.zeros(2, 3, 32, 32))
        assert view.logits.shape == (2, 7), name


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_4"])
@pytest.mark.parametrize("training", [False, True])
def test_cifar_resnets_equal_torchvision_with_a_3x3_stem(name, training):
    network = unsettled(name).train(training)
    theirs = "resnext50_32x4d" if name == "resnext50_4" else name
    reference = getattr(torchvision.models, theirs)(num_classes=10).double().train(training)
    reference.conv1, reference.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False).double(), nn.Identity()
    adopt(reference, network)
    seen = []
    for stage in (reference.maxpool, reference.layer1, reference.layer2, reference.layer3, reference.layer4):
        stage.register_forward_hook(lambda module, inputs, output: seen.append(output))
    batch = images(3, 3, 16, 16)
    expected = reference(batch)
    view = network(batch)
    torch.testing.assert_close([view.logits, view.stem, *view.maps], [expected, *seen])


def plain_block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
    )  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
def test_a_plain_network_is_its_resnet_without_shortcuts(training):
    network = unsettled("plain14").train(training)
    stages = [
        nn.Sequential(plain_block(before, after, stride), plain_block(after, after, 1))
        for before, after, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
    ]
    reference = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), *stages,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    ).double().train(training)  # fmt: skip
    adopt(reference, network)
    batch = images(3, 3, 12, 20)
    torch.testing.assert_close(network(batch).logits, reference(batch))


@pytest.mark.parametrize("training", [False, True])
def test_mobilenet_equals_torchvisions_with_two_strides_less(training):
    network = unsettled("mobilenet_v2").train(training)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data *= 6  # so that many values are clipped
    reference = torchvision.models.mobilenet_v2(num_classes=10, dropout=0.0).double().train(training)
    reference.features[0][0].stride = reference.features[2].conv[1][0].stride = (1, 1)
    adopt(reference, network)
    seen = []
    for last in (0, 3, 6, 13, 17):  # of the stem and of each resolution: 24, 32, 96, 320 channels
        reference.features[last].register_forward_hook(lambda module, inputs, output: seen.append(output))
    batch = images(3, 3, 16, 24)
    expected = reference(batch)
    view = network(batch)
    torch.testing.assert_close([view.logits, view.stem, *view.maps], [expected, *seen])
    assert all(one is other and (one < 0).any() for one, other in zip(view.maps, view.pre_maps, strict=True))


def test_upscaled_resnet50_equals_torchvision_on_the_upscaled_image():
    network = unsettled("resnet50@224").eval()
    reference = torchvision.models.resnet50(num_classes=10).double().eval()
    adopt(reference, network)
    batch = images(1, 3, 32, 32)
    large = F.interpolate(batch, size=(224, 224), mode="bilinear", align_corners=False)
    with torch.no_grad():
        expected = reference(large)
        torch.testing.assert_close(network(batch).logits, expected)
        torch.testing.assert_close(network(large).logits, expected)


def test_three_stage_resnet_equals_torchvision_blocks():
    def block(inputs, outputs, stride):
        change = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        return BasicBlock(inputs, outputs, stride, change)

    network = unsettled("resnet8x4").eval()
    reference = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        block(32, 64, 1), block(64, 128, 2), block(128, 256, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10),
    ).double().eval()  # fmt: skip
    adopt(reference, network)
    torch.testing.assert_close(network(images(2, 3, 12, 20)).logits, reference(images(2, 3, 12, 20)))


def wide_resnet_of_the_paper(network: nn.Module, x: Tensor, blocks: int) -> View:
    """BN-ReLU-conv twice in every block and BN-ReLU at the end, with the layers of `network` in their order."""
    layers = iter([m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))])
    stem = x = next(layers)(x)
    maps, openings = [], []
    for _ in range(3):
        for index in range(blocks):
            opened = next(layers)(x)
            openings += [opened] if index == 0 else []
            first, norm, second = next(layers), next(layers), next(layers)
            branch = second(F.relu(norm(first(F.relu(opened)))))
            x = branch + (x if first.in_channels == first.out_channels else next(layers)(F.relu(opened)))
        maps.append(x)
    last = next(layers)(x)
    embedding = F.relu(last).mean(dim=(2, 3))
    return View(next(layers)(embedding), stem, tuple(maps), (*openings[1:], last), embedding)


@pytest.mark.parametrize(("name", "blocks"), [("wrn_10_0.25", 1), ("wrn_16_1", 2), ("wrn_22_2", 3)])
@pytest.mark.parametrize("training", [False, True])
def test_wide_resnet_equals_the_papers_order_of_layers(name, blocks, training):
    network = unsettled(name).train(training)
    batch = images(4, 3, 8, 12)
    torch.testing.assert_close(tuple(network(batch)), tuple(wide_resnet_of_the_paper(network, batch, blocks)))


@pytest.mark.parametrize(
    ("name", "layout"),
    [("swish_teacher", "c c2 c c2 c c2"), ("swish_student", "c c2 c4 c c c2 c c2")],
)
def test_swish_cnns_in_eval_mode_equal_the_article(name, layout):
    network = build(name).double().eval()
    layers = iter([m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))])
    x = batch = images(2, 3, 32, 32)
    for step in layout.split():
        layer = next(layers)
        x = F.conv2d(x, layer.weight, layer.bias, padding=1)
        x = 1.5 * x * torch.sigmoid(x)
        x = F.max_pool2d(x, int(step[1:])) if step[1:] else x
    hidden, output = layers
    x = hidden(x.flatten(1))
    torch.testing.assert_close(network(batch).logits, output(1.5 * x * torch.sigmoid(x)))


def test_scaled_swish_values():
    x = torch.tensor([-1.0, 1.0, 2.0], dtype=torch.float64)
    expected = torch.tensor([-0.403412, 1.096588, 2.642391], dtype=torch.float64)
    torch.testing.assert_close(ScaledSwish()(x), expected, atol=5e-7, rtol=0)


@pytest.mark.parametrize(
    ("name", "shape", "stem", "maps", "embedding"),
    [
        ("resnet34", (3, 32, 32), (64, 32, 32), [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)], 512),
        ("resnet50", (1, 28, 28), (64, 28, 28), [(256, 28, 28), (512, 14, 14), (1024, 7, 7), (2048, 4, 4)], 2048),
        ("resnet50@224", (3, 32, 32), (64, 56, 56), [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)], 2048),
        ("resnet20", (3, 32, 32), (16, 32, 32), [(16, 32, 32), (32, 16, 16), (64, 8, 8)], 64),
        ("resnet32x4", (3, 32, 32), (32, 32, 32), [(64, 32, 32), (128, 16, 16), (256, 8, 8)], 256),
        ("resnet38x2", (3, 32, 32), (16, 32, 32), [(32, 32, 32), (64, 16, 16), (128, 8, 8)], 128),
        ("resnet20x0.375", (3, 32, 32), (6, 32, 32), [(6, 32, 32), (12, 16, 16), (24, 8, 8)], 24),
        ("wrn_16_2", (3, 24, 40), (16, 24, 40), [(32, 24, 40), (64, 12, 20), (128, 6, 10)], 128),
        ("wrn_10_0.25", (1, 8, 8), (4, 8, 8), [(4, 8, 8), (8, 4, 4), (16, 2, 2)], 16),
        ("resnext50_4", (3, 32, 32), (64, 32, 32), [(256, 32, 32), (512, 16, 16), (1024, 8, 8), (2048, 4, 4)], 2048),
        ("plain34", (3, 32, 32), (64, 32, 32), [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)], 512),
        ("plain20x2", (1, 8, 8), (16, 8, 8), [(32, 8, 8), (64, 4, 4), (128, 2, 2)], 128),
        ("resnet20_pruned0.5", (3, 32, 32), (16, 32, 32), [(16, 32, 32), (32, 16, 16), (64, 8, 8)], 64),
        ("mobilenet_v2", (3, 32, 32), (32, 32, 32), [(24, 32, 32), (32, 16, 16), (96, 8, 8), (320, 4, 4)], 1280),
        ("mobilenet_v2", (1, 8, 8), (32, 8, 8), [(24, 8, 8), (32, 4, 4), (96, 2, 2), (320, 1, 1)], 1280),
        ("swish_teacher", (3, 32, 32), (32, 32, 32), [(32, 32, 32), (64, 16, 16), (128, 8, 8)], 128),
        ("swish_teacher", (1, 8, 8), (32, 8, 8), [(32, 8, 8), (64, 4, 4), (128, 2, 2)], 128),
        ("swish_student", (3, 64, 64), (32, 64, 64), [(32, 64, 64), (8, 32, 32), (64, 8, 8), (128, 4, 4)], 128),
        ("cnn_small", (1, 28, 28), (16, 28, 28), [(16, 28, 28), (32, 14, 14), (64, 7, 7)], 64),
        ("cnn_small", (1, 8, 8), (16, 8, 8), [(16, 8, 8), (32, 4, 4), (64, 2, 2)], 64),
    ],
)
def test_tap_shapes(name, shape, stem, maps, embedding):
    with torch.device("meta"):
        network = build_model(name, classes=7, channels=shape[0], image_size=min(shape[1:]))
        view = network(torch.empty(2, *shape))
    assert view.stem.shape == (2, *stem)
    assert [m.shape for m in view.maps] == [m.shape for m in view.pre_maps] == [(2, *m) for m in maps]
    assert (view.embedding.shape, view.logits.shape, view.exits) == ((2, embedding), (2, 7), ())


@pytest.mark.parametrize("name", [*RESIDUAL, *NO_SHORTCUT, *PLAIN])
def test_maps_of_resnets_and_cnns_are_the_activated_pre_maps(name):
    view = unsettled(name)(images(3, 3, *sides(name)))
    assert all((pre_map < 0).any() for pre_map in view.pre_maps)
    activation = ScaledSwish() if name.startswith("swish") else F.relu
    torch.testing.assert_close(view.maps, tuple(activation(pre_map) for pre_map in view.pre_maps))


@pytest.mark.parametrize("name", [*RESIDUAL, *WIDE, *NO_SHORTCUT, "cnn_small"])
def test_the_embedding_is_the_mean_of_the_last_activated_map(name):
    view = unsettled(name)(images(3, 3, 16, 12))
    torch.testing.assert_close(view.embedding, F.relu(view.pre_maps[-1]).mean(dim=(2, 3)))


@pytest.mark.parametrize("name", [*RESIDUAL, *WIDE, *NO_SHORTCUT, *LINEAR, *PLAIN])
def test_the_classifier_reads_the_embedding_also_behind_dropout(name):
    network = unsettled(name).train()
    view = network(images(2, 3, *sides(name)))
    torch.testing.assert_close(network.classifier(view.embedding), view.logits)


@pytest.mark.parametrize("name", [*RESIDUAL, *WIDE, *NO_SHORTCUT, *LINEAR, *PLAIN])
def test_taps_lie_on_the_way_to_the_logits_and_nothing_writes_into_them(name):
    batch = images(3, 3, *sides(name)).requires_grad_()
    view = unsettled(name)(batch)
    gradients = torch.autograd.grad(view.logits.square().sum(), tensors(view))
    assert all(gradient.count_nonzero() for gradient in gradients)
    assert [tensor._version for tensor in (batch, *tensors(view))] == [0] * (1 + len(gradients))


@pytest.mark.parametrize("name", [*RESIDUAL, *WIDE, *NO_SHORTCUT, *LINEAR, "cnn_small"])
def test_one_forward_updates_every_batch_norm_once(name):
    network = build(name)
    network(images(2, 3, 16, 16, dtype=torch.float32))
    assert {int(m.num_batches_tracked) for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == {1}


ALL = (*RESIDUAL, "resnet50", "resnext50_4", *WIDE, *NO_SHORTCUT, *LINEAR, *PLAIN)


def same_values(view: View, expected: View) -> None:
    for tap in ("logits", "embedding", "maps", "pre_maps"):
        for one, other in zip(tensors_of(view, tap), tensors_of(expected, tap), strict=True):
            assert torch.equal(one, other), tap


def tensors_of(view: View, tap: str) -> tuple[Tensor, ...]:
    value = getattr(view, tap)
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("name", ALL)
def test_resumed_from_its_own_maps_a_network_gives_what_it_gave(name):
    network = unsettled(name).eval()
    view = network(images(2, 3, *sides(name)))
    for number, stage_map in enumerate((view.stem, *view.maps)):
        rest = view._replace(maps=view.maps[number:], pre_maps=view.pre_maps[number:])
        same_values(network.resume(number, stage_map), rest)


@pytest.mark.parametrize("name", ALL)
def test_a_section_makes_a_map_of_the_one_before(name):
    network = unsettled(name).eval()
    view = network(images(2, 3, *sides(name)))
    for number, (before, after) in enumerate(pairwise((view.stem, *view.maps)), start=1):
        assert torch.equal(network.section(number, before), after)


@pytest.mark.parametrize("name", [*RESIDUAL, *WIDE, "cnn_small"])
def test_parts_of_a_network_in_train_mode_use_the_batch_and_give_the_same_maps(name):
    network = unsettled(name).train()
    view = network(images(4, 3, *sides(name)))
    for number, (before, after) in enumerate(pairwise((view.stem, *view.maps)), start=1):
        torch.testing.assert_close(network.section(number, before), after)
        torch.testing.assert_close(network.resume(number, after).logits, view.logits)


@pytest.mark.parametrize("name", ["resnet8", "wrn_10_0.25", "swish_student", "cnn_small"])
def test_gradient_passes_through_the_rest_to_the_given_map(name):
    network = unsettled(name).eval().requires_grad_(False)
    maps = [stage_map.requires_grad_() for stage_map in network(images(2, 3, *sides(name))).maps]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for number, stage_map in enumerate(maps, start=1):
        (gradient,) = torch.autograd.grad(network.resume(number, stage_map).logits.square().sum(), stage_map)
        assert gradient.isfinite().all() and gradient.any()
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("name", ["resnet8", "wrn_10_0.25", "cnn_small"])
@pytest.mark.parametrize("part", ["section", "resume"])
def test_a_stage_that_does_not_exist_is_refused(name, part):
    network = build(name)
    view = network(images(2, 3, 16, 12, dtype=torch.float32))
    for number in (-1, 4) if part == "resume" else (-1, 0, 4):
        with pytest.raises(IndexError):
            getattr(network, part)(number, view.maps[0])


@pytest.mark.parametrize("name", [*RESIDUAL, "resnet50", *WIDE, *NO_SHORTCUT, *LINEAR, "cnn_small"])
def test_norms_make_the_pre_maps_or_come_last_in_the_branch_that_is_added(name):
    network = unsettled(name).train()
    norms = network.norms()
    assert len(norms) == len(network.stages) == len({id(norm) for norm in norms})
    assert all(a in set(stage.modules()) for a, stage in zip(norms, network.stages, strict=True))
    made = {}
    for norm in norms:
        norm.register_forward_hook(lambda module, inputs, output: made.update({module: output}))
    view = network(images(4, 3, 16, 12))
    for norm, pre_map in zip(norms, view.pre_maps, strict=True):
        assert norm.num_features == pre_map.shape[1]
        gradient = torch.autograd.grad(pre_map.sum(), made[norm], retain_graph=True)[0]
        assert torch.equal(gradient, torch.ones_like(pre_map))  # nothing but a sum lies in between
        if name in RESIDUAL or name == "resnet50":
            assert not torch.equal(made[norm], pre_map)
        elif name not in LINEAR:  # which adds a shortcut or not, stage by stage
            assert torch.equal(made[norm], pre_map)


@pytest.mark.parametrize("name", ["swish_teacher", "swish_student"])
def test_networks_without_batch_norm_have_no_norms(name):
    with pytest.raises(ValueError, match="no batch norm before the activation that ends a stage"):
        build(name).norms()


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "swish_student", "cnn_small"])
def test_the_seed_alone_decides_the_weights(name):
    first, again, other = (build(name, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", [*RESIDUAL, *WIDE, *NO_SHORTCUT, *LINEAR, *PLAIN])
def test_a_network_that_is_reset_is_as_if_built_with_that_seed(name):
    network = unsettled(name).float()
    assert not torch.equal(network.classifier.weight, build(name, 7).classifier.weight)
    torch.manual_seed(7)
    reset(network)
    assert network.state_dict().keys() == build(name, 7).state_dict().keys()
    for key, expected in build(name, 7).state_dict().items():
        assert torch.equal(network.state_dict()[key], expected), key


@pytest.mark.parametrize("name", ["resnet18", "wrn_16_2"])
def test_convolutions_start_kaiming_normal_over_fan_out(name):
    for module in build(name).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            fan_out = module.out_channels * math.prod(module.kernel_size)
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
            assert module.weight.abs().max() > 3 * math.sqrt(2 / fan_out)  # uniform weights stop at sqrt(3)


def test_swish_cnns_start_he_uniform_with_zero_biases():
    for module in build("swish_teacher").modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            bound = math.sqrt(6 / module.weight[0].numel())
            assert module.weight.abs().max() <= bound
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.06)
            assert module.bias.count_nonzero() == 0


@pytest.mark.parametrize(
    ("name", "rates"), [("swish_teacher", [0.2, 0.2, 0.2, 0.2]), ("swish_student", [0.2, 0, 0.2, 0.2, 0.2])]
)
def test_dropout_of_the_swish_cnns_works_in_training_only(name, rates):
    network, batch, read = unsettled(name), images(16, 3, 32, 32).sigmoid(), []
    for stage in network.stages:
        stage.register_forward_hook(lambda module, inputs, output: read.append(output.onward))
    read.append(network(batch).embedding)
    assert [(x == 0).float().mean().item() for x in read] == pytest.approx(rates, abs=0.04)
    network.eval()
    assert torch.equal(network(batch).logits, network(batch).logits)


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "swish_student", "cnn_small"])
def test_memory_format_changes_no_value(name):
    network, batch = unsettled(name).eval(), images(2, 3, *sides(name))
    expected = network(batch)
    view = network.to(memory_format=torch.channels_last)(batch.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(tensors(view), tensors(expected))
    assert all(tap.is_contiguous(memory_format=torch.channels_last) for tap in (view.stem, *view.maps, *view.pre_maps))


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "swish_student", "cnn_small"])
def test_bfloat16_autocast_stays_near_float32(name):
    network, batch = build(name).eval(), images(4, 3, 32, 32, dtype=torch.float32)
    expected = network(batch).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(batch).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("name", ["resnet8", "wrn_10_0.25", "swish_student", "cnn_small"])
def test_networks_export_as_one_graph(name):
    network, batch = unsettled(name).eval(), images(2, 3, 32, 32)
    exported = torch.export.export(network, (batch,)).module()
    torch.testing.assert_close(tensors(exported(batch)), tensors(network(batch)))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("resnt18", "resnet18"), ("wrn-40-2", "wrn_40_2"), ("wrn_16_2.0", "wrn_16_2"), ("resnet50@225", "resnet50@224"),
     ("resnet18\n", "resnet18"), ("swish_techer", "swish_teacher"), ("mobilenetv2", "mobilenet_v2"),
     ("resnet20_pruned", "resnet20_pruned0.5"), ("resnext50_5", "resnext50_4"), ("plain-34", "plain34")],
)  # fmt: skip
def test_unknown_names_suggest_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"unknown model .*did you mean '{nearest}'"):
        build_model(name, classes=10)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("wrn_15_1", {}, r"depth of wrn_15_1 must be 6n \+ 4 .*not 15"),
        ("wrn_4_1", {}, r"depth of wrn_4_1 must be 6n \+ 4 with n of at least 1"),
        ("wrn_16_0.3", {}, r"stage 1 of wrn_16_0.3 must have a whole number of channels, not 4.8"),
        ("resnet8x0.1", {}, r"stage 1 of resnet8x0.1 must have a whole number of channels, not 1.6"),
        ("resnet20_pruned0.3", {}, r"stage 1 of resnet20_pruned0.3 must keep a whole number of channels, not 4.8"),
        ("resnet50_pruned0.5", {}, "resnet50_pruned0.5 cannot be: only blocks of two convolutions and a shortcut"),
        ("plain20_pruned0.5", {}, "plain20_pruned0.5 cannot be: only blocks of two convolutions and a shortcut"),
        ("mobilenet_v2", {"image_size": 7}, "image_size must be at least 8 for the 4 stages of mobilenet_v2, not 7"),
        ("cnn_small", {"classes": 1}, "classes must be at least 2, not 1"),
        ("resnet18", {"channels": 0}, "channels must be at least 1, not 0"),
        ("resnet18@224", {"image_size": 0}, "image_size must be at least 1, not 0"),
        ("resnet18", {"image_size": 7}, "image_size must be at least 8 for the 4 stages of resnet18, not 7"),
        ("wrn_16_1", {"image_size": 3}, "image_size must be at least 4 for the 3 stages of wrn_16_1, not 3"),
        ("cnn_small", {"image_size": 3}, "image_size must be at least 4 for the 3 stages of cnn_small, not 3"),
        ("swish_student", {"image_size": 28}, "multiple of 32 for the pools of swish_student, not 28"),
        ("swish_teacher", {"image_size": 28}, "multiple of 8 for the pools of swish_teacher, not 28"),
    ],
)
def test_impossible_networks_are_refused(name, shape, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, **{"classes": 10, **shape})
