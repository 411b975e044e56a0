"""The generator: its size is the paper's, its images come out normalised, its first weights are the seed's."""

import math

import pytest
import torch
from torch import nn

from kdstudy.generator import Generator
from kdstudy.models import count_parameters


def parameters_by_hand(channels: int, height: int, width: int, noise: int) -> int:
    first = 128 * (height // 4) * (width // 4)
    linear = noise * first + first
    convolutions = (128 * 9 + 1) * 128 + (128 * 9 + 1) * 64 + (64 * 9 + 1) * channels
    norms = 2 * (128 + 128 + 64 + channels)
    return linear + convolutions + norms


def test_it_is_as_large_as_the_papers():
    assert count_parameters(Generator(3, 32)) == 1_051_145
    assert count_parameters(Generator(1, 8)) == parameters_by_hand(1, 8, 8, 100)
    assert count_parameters(Generator(2, (12, 20), noise=7)) == parameters_by_hand(2, 12, 20, 7)


@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 8), (4, (4, 12))])
def test_images_have_the_size_asked_for_and_are_normalised_in_every_channel(channels, size):
    torch.manual_seed(0)
    generator = Generator(channels, size)
    images = generator(torch.randn(40, 100))
    height, width = (size, size) if isinstance(size, int) else size
    assert images.shape == (40, channels, height, width)
    torch.testing.assert_close(images.mean(dim=(0, 2, 3)), torch.zeros(channels), atol=1e-5, rtol=0)
    deviation = images.var(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(deviation, torch.ones(channels), atol=1e-3, rtol=0)


def test_the_layers_are_in_the_papers_order():
    names = [type(layer).__name__ for layer in Generator(3, 32).layers]
    doubled = ["Upsample", "Conv2d", "BatchNorm2d", "LeakyReLU"]
    assert names == ["Linear", "Unflatten", "BatchNorm2d", *doubled, *doubled, "Conv2d", "BatchNorm2d"]
    layers = Generator(3, 32).layers
    assert [x.negative_slope for x in layers if isinstance(x, nn.LeakyReLU)] == [0.2, 0.2]
    assert {x.mode for x in layers if isinstance(x, nn.Upsample)} == {"nearest"}
    assert all(x.bias is not None for x in layers if isinstance(x, (nn.Conv2d, nn.Linear)))


def test_first_weights_are_the_seeds_and_spread_as_in_the_other_networks():
    torch.manual_seed(3)
    one = Generator(3, 32)
    torch.manual_seed(3)
    other = Generator(3, 32).state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.state_dict().items())
    middle = one.layers[4]  # 128 to 128 channels
    assert middle.weight.std().item() == pytest.approx(math.sqrt(2 / (128 * 9)), rel=0.02)
    assert middle.weight.abs().max() > 3 * middle.weight.std()  # normal, not uniform
    assert not torch.equal(middle.weight, Generator(3, 32).layers[4].weight)


def test_every_weight_and_the_noise_matter():
    torch.manual_seed(0)
    generator = Generator(1, 8, noise=5).double()
    noise = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    images = generator(noise)
    (images * torch.randn_like(images)).sum().backward()
    swallowed = {"4.bias", "8.bias", "11.bias"}  # by the batch norms behind them
    for name, parameter in generator.layers.named_parameters():
        assert (parameter.grad.abs().max() > 1e-8) == (name not in swallowed), name
    assert noise.grad.any()


@pytest.mark.parametrize("size", [30, (8, 6), 2, 0])
def test_sides_that_cannot_be_doubled_to_are_refused(size):
    with pytest.raises(ValueError, match="image_size must be a multiple of 4 for a generator, not"):
        Generator(3, size)


def test_no_channels_and_no_noise_are_refused():
    with pytest.raises(ValueError, match="channels must be at least 1, not 0"):
        Generator(0, 8)
    with pytest.raises(ValueError, match="noise must be at least 1, not 0"):
        Generator(1, 8, noise=0)
