"""Rounding to grids against literal recomputation; networks that keep their state; integers that agree with floats."""

import copy
import math
from functools import partial

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.ao.quantization import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
from toy import difference, make_bank, pictures

from kdstudy.blocks import StagedNet
from kdstudy.checkpoint import load_weights, save_weights
from kdstudy.core import View
from kdstudy.evaluate import logits_of
from kdstudy.models import build_model, count_parameters
from kdstudy.quantisation import (
    FakeQuantise,
    IntegerNet,
    QuantisedNet,
    calibrate,
    fake_quantisers,
    measure,
    plain_tensors,
    to_int8,
)

NETWORKS = ("wrn_10_0.5", "resnet8", "plain8", "cnn_small", "mobilenet_v2", "swish_student", "resnet20_pruned0.5")
DTYPES = (torch.float32, torch.float64)


def images_of(count: int, seed: int = 0, scale: float = 1.0, dtype=torch.float32, side: int = 8) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


def side_of(name: str) -> int:
    """The pixels that a network's pools need."""
    return 32 if name.startswith("swish") else 8


def network_of(name: str, seed: int = 0) -> nn.Module:
    """A network whose batch statistics and biases have moved off their start."""
    torch.manual_seed(seed)
    network = build_model(name, classes=4, image_size=side_of(name))
    for step in range(3):
        network(images_of(64, seed=step, side=side_of(name)))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return network.eval()


def calibrated(network: nn.Module, bits: int = 8, side: int = 8) -> QuantisedNet:
    quantised = QuantisedNet(network, bits)
    calibrate(quantised, images_of(128, seed=7, side=side).split(32))
    return quantised


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def activation_rounding(**options) -> FakeQuantise:
    return FakeQuantise(
        observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8, **options
    ).train()


def weight_rounding(channels: int, bits: int = 8) -> FakeQuantise:
    found = FakeQuantise(
        observer=MovingAveragePerChannelMinMaxObserver,
        quant_min=-(2 ** (bits - 1)),
        quant_max=2 ** (bits - 1) - 1,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
    ).train()
    for name, value in (("scale", torch.ones(channels)), ("zero_point", torch.zeros(channels, dtype=torch.int32))):
        setattr(found, name, value)
    for name in ("min_val", "max_val"):
        setattr(found.activation_post_process, name, torch.zeros(channels))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_are_rounded_on_a_moving_average_of_their_extremes(dtype):
    rounding, lowest, highest = activation_rounding(averaging_constant=0.25), None, None
    for step in range(4):
        x = torch.randn(6, 5, dtype=dtype, generator=torch.Generator().manual_seed(step)) * (1 + step)
        rounded = rounding(x)
        least, most = min(x.flatten().tolist()), max(x.flatten().tolist())
        lowest = least if lowest is None else 0.75 * lowest + 0.25 * least
        highest = most if highest is None else 0.75 * highest + 0.25 * most
        scale = (highest - lowest) / 255
        zero = round(-lowest / scale)
        for value, found in zip(x.flatten().tolist(), rounded.flatten().tolist(), strict=True):
            integer = min(max(round(value / scale) + zero, 0), 255)
            assert found == pytest.approx((integer - zero) * scale, abs=1e-5 * scale * 256)
        assert rounded.dtype == dtype
    assert rounding.zero_point.item() == zero and rounding.scale.item() == pytest.approx(scale, rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_each_channel_of_weights_is_rounded_on_its_own_symmetric_grid(bits, dtype):
    weights = torch.randn(5, 3, 2, 2, dtype=dtype, generator=torch.Generator().manual_seed(0))
    weights[1] *= 100
    weights[2] = weights[2].abs() + 0.1  # a channel of one sign keeps its zero, too
    weights[3] = 0
    rounding, most = weight_rounding(5, bits), 2 ** (bits - 1) - 1
    rounded = rounding(weights)
    for channel, found in zip(weights, rounded, strict=True):
        extreme = max(abs(value) for value in channel.flatten().tolist())
        for value, result in zip(channel.flatten().tolist(), found.flatten().tolist(), strict=True):
            wanted = round(value / extreme * most) * extreme / most if extreme else 0.0
            assert result == pytest.approx(wanted, rel=1e-6, abs=1e-12)
    assert rounded.dtype == dtype and not rounding.zero_point.any()
    assert (rounding.scale > 0).all()  # of a channel of zeros, too
    assert len(rounded[0].unique()) <= 2 * most + 1


def test_the_gradient_passes_straight_through_and_stops_beyond_the_grid():
    rounding = activation_rounding()
    rounding(torch.tensor([-1.0, 1.0]))
    x = torch.tensor([-3.0, -0.7, 0.0, 0.3, 0.99, 2.0], requires_grad=True)
    rounding.eval()(x).backward(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 5.0, 0.0]
    weights = torch.randn(4, 9, requires_grad=True)
    gradient = torch.randn(4, 9)
    weight_rounding(4, bits=2)(weights).backward(gradient)
    assert torch.equal(weights.grad, gradient)


@pytest.mark.parametrize("dtype", DTYPES)
def test_grids_follow_in_train_mode_and_stay_in_eval_mode(dtype):
    for rounding in (activation_rounding(), weight_rounding(4)):
        x = torch.randn(4, 9, dtype=dtype)
        rounding(x)
        before = state_of(rounding)
        rounding.eval()(5 * x)
        assert difference(state_of(rounding), before) is None
        rounding.train()(5 * x)
        assert difference(state_of(rounding), before)


def rounded(x: Tensor, rounding: FakeQuantise) -> Tensor:
    """What a grid makes of values, in one line and without torch's quantisation."""
    shape = (-1, *[1] * (x.dim() - 1)) if rounding.is_per_channel else ()
    scale, zero = rounding.scale.to(x.dtype).reshape(shape), rounding.zero_point.to(x.dtype).reshape(shape)
    observer = rounding.activation_post_process
    return ((x / scale).round().add(zero).clamp(observer.quant_min, observer.quant_max) - zero) * scale


def literal_small_cnn(network: StagedNet, quantised: QuantisedNet, images: Tensor) -> Tensor:
    """`cnn_small` by hand: batch norm folded into the weights, these rounded, and every map."""
    roundings = fake_quantisers(quantised)
    weights = iter(module for module in roundings if module.is_per_channel)
    maps = iter(module for module in roundings if not module.is_per_channel)
    x = rounded(images, next(maps))
    for stage in (network.stem, *network.stages):
        convolution, norm = stage.layers
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        folded = rounded(convolution.weight * factor.reshape(-1, 1, 1, 1), next(weights))
        x = F.conv2d(x, folded, norm.bias - norm.running_mean * factor, padding=1)
        x = stage.onward(rounded(x.relu(), next(maps)))
    x = rounded(x.mean(dim=(2, 3)), next(maps))
    x = F.linear(x, rounded(network.classifier.weight, next(weights)), network.classifier.bias)
    return rounded(x, next(maps))


@pytest.mark.parametrize("bits", [8, 3])
def test_a_network_is_rounded_where_it_says(bits):
    network = network_of("cnn_small").double()
    quantised = calibrated(network.float(), bits).double()
    images = images_of(40, dtype=torch.float64)
    with torch.no_grad():
        expected = literal_small_cnn(network.double(), quantised, images)
        found = quantised(images).logits
    # a value on the edge between two steps may fall to either side
    step = fake_quantisers(quantised)[-1].scale.item()
    assert (found - expected).abs().max() <= 1.01 * step
    assert ((found - expected).abs() < step / 1e3).double().mean() > 0.97
    assert not torch.equal(expected, network(images).logits)


@pytest.mark.parametrize("bits", [8, 4])
def test_first_and_last_layer_have_8_bits_whatever_the_others_have(bits):
    quantised = QuantisedNet(network_of("wrn_10_0.5"), bits)
    layers = [module.activation_post_process for module in fake_quantisers(quantised) if module.is_per_channel]
    spans = [(layer.quant_min, layer.quant_max) for layer in layers]
    inner = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert spans == [(-128, 127), *[inner] * (len(spans) - 2), (-128, 127)] and len(spans) == 10
    named = {name for name, module in quantised.graph.named_modules() if hasattr(module, "weight_fake_quant")}
    assert {"network.stem.layers", "network.classifier"} <= named


def spread_in_steps(difference: Tensor, quantised: QuantisedNet) -> float:
    """A root mean square in steps of the grid of the logits."""
    return difference.square().mean().sqrt().item() / fake_quantisers(quantised)[-1].scale.item()


@pytest.mark.parametrize("name", NETWORKS)
def test_eight_bits_are_nearer_to_full_precision_than_four(name):
    network, images = network_of(name), images_of(256, side=side_of(name))
    with torch.no_grad():
        fine, coarse = (
            spread_in_steps(network(images).logits - quantised(images).logits, quantised)
            for quantised in (calibrated(network, bits, side_of(name)) for bits in (8, 4))
        )
    assert fine < 6 and fine < coarse / 2
    assert count_parameters(QuantisedNet(network)) == count_parameters(network)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_integers_say_what_the_rounded_floats_say(name, bits):
    quantised = calibrated(network_of(name), bits, side_of(name))
    before, images = state_of(quantised), images_of(256, side=side_of(name))
    integer = to_int8(quantised)
    with torch.no_grad():
        fake, found = quantised(images).logits, integer(images).logits
    # roundings on the way may fall to either side, the more the deeper; dropout is rounded once less
    most = {"mobilenet_v2": 1.5, "swish_student": 4.0}.get(name, 0.75)
    assert spread_in_steps(fake - found, quantised) < most
    assert difference(state_of(quantised), before) is None
    left = [module for module in integer.modules() if type(module) in (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ReLU)]
    assert not left, "these are not computed in integers"


def test_the_numbers_of_an_integer_network_are_all_that_it_needs():
    integer, images = to_int8(calibrated(network_of("cnn_small"))), images_of(64)
    numbers = {name.removeprefix("network."): value.double() for name, value in plain_tensors(integer)}

    def quantise(x, key):
        steps = (x / numbers[f"{key}scale{'' if key.endswith('.') else '_0'}"]).round()
        return (steps + numbers[f"{key}zero_point{'' if key.endswith('.') else '_0'}"]).clamp(0, 255)

    def spread(key):
        return numbers[f"{key}.scale"], numbers[f"{key}.zero_point"]

    steps = quantise(images.double(), "network_stem_layers_0_input_")
    scale, zero = (numbers[f"network_stem_layers_0_input_{what}_0"] for what in ("scale", "zero_point"))
    for key, pool in (("stem", 1), ("stages.0", 2), ("stages.1", 2), ("stages.2", 1)):
        layer = f"{key}.layers.0"
        sums = F.conv2d(steps - zero, numbers[f"{layer}.weight"], padding=1)  # of whole numbers
        x = sums * scale * numbers[f"{layer}.weight.scales"].reshape(-1, 1, 1) + numbers[f"{layer}.bias"][:, None, None]
        scale, zero = spread(layer)
        steps = F.max_pool2d(((x / scale).round() + zero).clamp(zero.item(), 255), pool)
    embedding = ((steps - zero) * scale).mean(dim=(2, 3))
    scale, zero = (numbers[f"network_embed_1_{what}_0"] for what in ("scale", "zero_point"))
    steps = ((embedding / scale).round() + zero).clamp(0, 255)
    packed = "classifier._packed_params._packed_params"
    logits = F.linear(steps - zero, numbers[f"{packed}.0"]) * scale * numbers[f"{packed}.0.scales"]
    scale, zero = spread("classifier")
    logits = (((logits + numbers[f"{packed}.1"]) / scale).round() + zero).clamp(0, 255)
    found = integer(images).logits.double()
    assert ((logits - zero) * scale - found).abs().max() <= 1.01 * scale
    assert (((logits - zero) * scale - found).abs() < scale / 100).double().mean() > 0.95


def test_weights_take_a_quarter_of_the_bytes():
    network = network_of("wrn_10_0.5")
    integer = to_int8(calibrated(network))
    weights = {
        name: module.weight for name, module in network.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    kept = [tensor for _, tensor in plain_tensors(integer) if tensor.dtype == torch.int8]
    assert sorted(tensor.numel() for tensor in kept) == sorted(weight.numel() for weight in weights.values())
    sizes = {"full": build_model("wrn_16_2", classes=100, image_size=8)}
    saved = measure(sizes["full"], calibrated(sizes["full"]), images_of(8), repeats=1)
    assert 3.7 < saved.full_bytes / saved.int8_bytes < 4


def test_bits_are_part_of_the_name_and_the_first_weights_those_of_the_plain_network():
    torch.manual_seed(3)
    plain = build_model("resnet8", classes=5, channels=1, image_size=8)
    torch.manual_seed(3)
    quantised = build_model("resnet8_int5", classes=5, channels=1, image_size=8)
    assert isinstance(quantised, QuantisedNet) and quantised.bits == 5
    theirs = sorted(parameter.sum().item() for parameter in plain.parameters())
    assert sorted(parameter.sum().item() for parameter in quantised.parameters()) == theirs
    view = quantised(torch.randn(6, 1, 8, 8))
    assert isinstance(view, View) and view.logits.shape == (6, 5) and view.maps == ()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet8_int8_int8", "this network is quantised already"),
        ("resnet8_int8+heads", "heads read the stages before the last"),
        ("resnet8_int9", "unknown model"),
        ("resnet9_int8", "unknown model"),
    ],
)
def test_names_that_cannot_be_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, classes=4, image_size=8)


@pytest.mark.parametrize("bits", [1, 9, 0])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match=f"weights must have 2 to 8 bits, not {bits}"):
        QuantisedNet(network_of("cnn_small"), bits)


def test_a_network_without_grids_is_not_made_into_integers():
    with pytest.raises(ValueError, match="the grids of this network are not known: calibrate or train it first"):
        to_int8(QuantisedNet(network_of("cnn_small")))


def test_the_network_that_is_copied_and_the_one_that_is_converted_stay_as_they_are():
    network = network_of("wrn_10_0.5").requires_grad_(False)
    before = state_of(network)
    quantised = calibrated(network)
    assert all(parameter.requires_grad for parameter in quantised.parameters())
    nn.init.zeros_(quantised.graph.network.classifier.weight)
    quantised.train()(images_of(32))
    assert difference(state_of(network), before) is None
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())
    grids = state_of(quantised)
    to_int8(quantised.train())
    assert difference(state_of(quantised), grids) is None and quantised.training


def test_calibration_sets_grids_and_nothing_else():
    network = network_of("wrn_10_0.5")
    quantised = QuantisedNet(network)
    before = state_of(quantised)
    calibrate(quantised, images_of(128, seed=7).split(32))
    after = state_of(quantised)
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"scale", "zero_point", "min_val", "max_val"}
    assert not any(module.training for module in quantised.modules())
    assert all(tensor.isfinite().all() for name, tensor in after.items())
    first = fake_quantisers(quantised)[0]  # of the images
    lowest = [batch.min().item() for batch in images_of(128, seed=7).split(32)]
    expected = lowest[0]
    for value in lowest[1:]:
        expected += 0.01 * (value - expected)
    assert first.activation_post_process.min_val.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_evaluation_leaves_no_trace(dtype):
    quantised = calibrated(network_of("wrn_10_0.5")).to(dtype).train()
    quantised(images_of(32, dtype=dtype))
    before = state_of(quantised)
    bank = make_bank(*pictures(30, size=(8, 8)), dtype=dtype)
    logits_of(quantised, bank)
    assert difference(state_of(quantised), before) is None
    assert all(module.training for module in fake_quantisers(quantised))
    quantised.eval()(images_of(32, scale=20.0, dtype=dtype))
    assert difference(state_of(quantised), before) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_weights_bring_everything_back(dtype, tmp_path):
    quantised = calibrated(network_of("wrn_10_0.5")).to(dtype)
    quantised.train()(images_of(32, dtype=dtype))
    save_weights(quantised, tmp_path / "weights.safetensors")
    other = build_model("wrn_10_0.5_int8", classes=4, image_size=8).to(dtype)
    load_weights(other, tmp_path / "weights.safetensors")
    assert difference(state_of(other), state_of(quantised)) is None
    images = images_of(64, dtype=dtype)
    assert torch.equal(other.eval()(images).logits, quantised.eval()(images).logits)
    assert torch.equal(to_int8(other)(images.float()).logits, to_int8(quantised)(images.float()).logits)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_state_has_one_shape_from_first_to_last_and_no_tensor_twice(name):
    fresh = {key: tuple(tensor.shape) for key, tensor in QuantisedNet(network_of(name)).state_dict().items()}
    quantised = calibrated(network_of(name), side=side_of(name))
    quantised.train()(images_of(32, side=side_of(name))).logits.sum().backward()
    assert {key: tuple(tensor.shape) for key, tensor in quantised.state_dict().items()} == fresh
    storages = [tensor.untyped_storage().data_ptr() for tensor in quantised.state_dict().values()]
    assert len(set(storages)) == len(storages)


def test_a_copy_is_the_same_network_and_its_own():
    quantised = calibrated(network_of("wrn_10_0.5"))
    other, images = copy.deepcopy(quantised), images_of(32)
    assert torch.equal(other(images).logits, quantised(images).logits)
    before = state_of(quantised)
    other.train()(images * 3)
    assert difference(state_of(quantised), before) is None
    assert difference(state_of(other), before)
    assert torch.equal(to_int8(quantised)(images).logits, to_int8(copy.deepcopy(quantised))(images).logits)


def test_channels_last_and_double_precision_change_no_grid():
    quantised = calibrated(network_of("wrn_10_0.5"))
    images = images_of(64)
    expected = quantised(images).logits
    last = copy.deepcopy(quantised).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(images).logits, expected, atol=5e-2, rtol=0)
    double = copy.deepcopy(quantised).double()
    assert {buffer.dtype for rounding in fake_quantisers(double) for buffer in rounding.buffers()} <= {
        *(torch.float32, torch.int32, torch.int64)
    }
    assert double(images.double()).logits.dtype == torch.float64
    back = copy.deepcopy(double).float()
    assert torch.equal(back(images).logits, expected)


@pytest.mark.parametrize("training", [False, True])
def test_autocast_makes_nothing_coarser(training):
    quantised = calibrated(network_of("wrn_10_0.5")).train(training)
    expected = copy.deepcopy(quantised)(images_of(32)).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = quantised(images_of(32)).logits
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_measuring_changes_nothing_and_counts_what_is_saved(tmp_path, request):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(2)
    network = network_of("wrn_10_0.5")
    quantised = calibrated(network)
    quantised.train()
    before = state_of(network), state_of(quantised)
    images = images_of(50)
    saved = measure(network, quantised, images, repeats=3)
    assert difference([*before], [state_of(network), state_of(quantised)]) is None
    assert quantised.training and not network.training and torch.get_num_threads() == 2
    save_weights(network, tmp_path / "weights.safetensors")
    assert saved.full_bytes == pytest.approx((tmp_path / "weights.safetensors").stat().st_size, rel=0.1)
    numbers = {name: tensor.contiguous() for name, tensor in plain_tensors(to_int8(quantised))}
    assert saved.int8_bytes == len(safetensors.torch.save(numbers))
    fake, integer = quantised.eval()(images).logits, to_int8(quantised)(images).logits
    assert saved.agreement == 100 * sum(fake.argmax(dim=1) == integer.argmax(dim=1)).item() / 50
    assert saved.full_seconds > 0 and saved.int8_seconds > 0


def test_agreement_is_that_of_predictions():
    network = network_of("cnn_small")
    quantised = calibrated(network)
    with torch.no_grad():  # every image is of class 2 for both
        quantised.graph.network.classifier.bias.copy_(torch.tensor([0.0, 0.0, 50.0, 0.0]))
    calibrate(quantised, [images_of(32)])
    assert measure(network, quantised, images_of(20), repeats=1).agreement == 100.0


@pytest.mark.parametrize("name", ["wrn_10_0.5", "resnet8"])
def test_on_digits_integers_predict_what_the_rounded_floats_predict(name):
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 4 - 2
    labels = torch.from_numpy(digits.target)
    torch.manual_seed(0)
    network = build_model(name, classes=10, channels=1, image_size=8)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(4):
        for index in torch.randperm(1200).split(60):
            optimiser.zero_grad()
            F.cross_entropy(network(images[index]).logits, labels[index]).backward()
            optimiser.step()
    network.eval()
    quantised = QuantisedNet(network)
    calibrate(quantised, images[:1200].split(200))
    integer, test = to_int8(quantised), images[1200:]
    assert isinstance(integer, IntegerNet)
    with torch.no_grad():
        predictions = [each(test).logits.argmax(dim=1) for each in (network, quantised, integer)]
    full, fake, whole = ((each == labels[1200:]).double().mean().item() for each in predictions)
    assert (predictions[1] == predictions[2]).double().mean() >= 0.99
    assert full > 0.85 and abs(full - whole) < 0.03 and math.isclose(fake, whole, abs_tol=0.01)
