"""Modalities against loops in numpy; networks behind them against the same networks without."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdstudy.checkpoint import load_weights, save_weights
from kdstudy.modalities import MODALITIES, ModalityNet, luma
from kdstudy.models import build_model, count_parameters, reset

every_modality = pytest.mark.parametrize("kind", MODALITIES)
odd_and_even = pytest.mark.parametrize("size", [(8, 8), (7, 5), (4, 9)])
SOBEL = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])


def images(channels: int = 3, size: tuple[int, int] = (7, 5), count: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, *size, generator=generator, dtype=torch.float64)


def grey_slowly(image: np.ndarray) -> np.ndarray:
    """(C, H, W) to (H, W)."""
    return image[0] if len(image) == 1 else np.tensordot([0.299, 0.587, 0.114], image, axes=1)


def edges_slowly(image: np.ndarray) -> np.ndarray:
    padded = np.pad(grey_slowly(image), 1, mode="edge")
    height, width = image.shape[1:]
    steep = np.empty((height, width))
    for row in range(height):
        for column in range(width):
            patch = padded[row : row + 3, column : column + 3]
            steep[row, column] = np.hypot((patch * SOBEL).sum(), (patch * SOBEL.T).sum()) / 4
    return steep


def low_slowly(image: np.ndarray) -> np.ndarray:
    grey = grey_slowly(image)
    height, width = grey.shape
    rows, columns = -(-height // 2), -(-width // 2)
    small = np.empty((rows, columns))
    for row in range(rows):
        for column in range(columns):
            # every pixel that lies, be it in part, in this one of `rows` x `columns` equal fields
            top, left = int(row * height / rows), int(column * width / columns)
            bottom = int(np.ceil((row + 1) * height / rows - 1e-9))
            right = int(np.ceil((column + 1) * width / columns - 1e-9))
            small[row, column] = grey[top:bottom, left:right].mean()
    return small


SLOWLY = {"grey": grey_slowly, "edges": edges_slowly, "low": low_slowly}


@every_modality
@odd_and_even
@pytest.mark.parametrize("channels", [1, 3])
def test_a_modality_is_what_a_loop_over_pixels_makes_of_each_image(kind, size, channels):
    batch = images(channels, size)
    made = MODALITIES[kind]()(batch)
    expected = np.stack([SLOWLY[kind](image) for image in batch.numpy()])[:, None]
    np.testing.assert_allclose(made.numpy(), expected, atol=1e-5)  # the edges' root has 1e-8 under it


def test_white_has_the_luma_of_its_channels_and_grey_images_are_their_own():
    assert luma(torch.ones(1, 3, 2, 2, dtype=torch.float64)).numpy() == pytest.approx(1)
    batch = images(channels=1)
    assert MODALITIES["grey"]()(batch) is batch


def test_a_step_has_edges_of_its_height_on_both_sides_and_none_elsewhere():
    image = torch.zeros(1, 1, 6, 6)
    image[..., 3:] = 1
    for turned in (image, image.transpose(2, 3)):
        edges = MODALITIES["edges"]()(turned)[0, 0]
        across = edges if turned is image else edges.T
        torch.testing.assert_close(across, torch.tensor([0.0, 0, 1, 1, 0, 0]).expand(6, 6), atol=1e-3, rtol=0)


def test_low_resolution_of_even_sides_is_the_mean_of_four_pixels():
    batch = images(1, (8, 6))
    corners = [batch[..., row::2, column::2] for row in range(2) for column in range(2)]
    torch.testing.assert_close(MODALITIES["low"]()(batch), sum(corners) / 4)


@every_modality
@odd_and_even
def test_the_modality_of_a_mirrored_image_is_the_mirrored_modality(kind, size):
    modality, batch = MODALITIES[kind](), images(size=size)
    for dims in ([3], [2]):
        torch.testing.assert_close(modality(batch.flip(dims)), modality(batch).flip(dims))


@pytest.mark.parametrize("kind", ["grey", "edges"])
def test_the_modality_of_a_crop_is_the_crop_of_the_modality_but_at_its_border(kind):
    modality, batch = MODALITIES[kind](), images(size=(9, 9))
    inner = modality(batch[..., 2:8, 1:7])[..., 1:-1, 1:-1]
    torch.testing.assert_close(inner, modality(batch)[..., 3:7, 2:6])


@every_modality
@pytest.mark.parametrize("channels", [1, 3])
def test_the_gradient_is_that_of_finite_differences(kind, channels):
    assert torch.autograd.gradcheck(MODALITIES[kind](), images(channels, (4, 3), 1).requires_grad_())


@every_modality
def test_the_gradient_is_finite_on_a_flat_image(kind):
    flat = torch.full((1, 3, 4, 4), 0.7, requires_grad=True)
    MODALITIES[kind]()(flat).sum().backward()
    assert flat.grad.isfinite().all()


@every_modality
def test_a_modality_has_nothing_to_save_or_train(kind):
    assert not MODALITIES[kind]().state_dict()


@every_modality
def test_two_channels_are_refused(kind):
    with pytest.raises(ValueError, match="made of images of 1 or 3 channels, not 2"):
        MODALITIES[kind]()(images(channels=2))
    with pytest.raises(ValueError, match="made of images of 1 or 3 channels, not 2"):
        build_model(f"wrn_10_0.25@{kind}", classes=4, channels=2, image_size=8)


def build(name: str, channels: int = 3, size: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, classes=4, channels=channels, image_size=size).double()


@every_modality
@pytest.mark.parametrize("channels", [1, 3])
def test_the_network_is_the_plain_one_for_one_channel_on_the_modality(kind, channels):
    seeing = build(f"wrn_10_0.5@{kind}", channels).eval()
    plain = build("wrn_10_0.5", channels=1, size=8 if kind == "low" else 16).eval()
    assert count_parameters(seeing) == count_parameters(plain)
    assert {f"backbone.{name}" for name in plain.state_dict()} == set(seeing.state_dict())
    batch = images(channels, (16, 16))
    ours, theirs = seeing(batch), plain(MODALITIES[kind]()(batch))
    for mine, other in zip(
        (ours.logits, ours.stem, *ours.maps), (theirs.logits, theirs.stem, *theirs.maps), strict=True
    ):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(("kind", "side"), [("grey", 32), ("edges", 32), ("low", 16)])
def test_low_resolution_reaches_the_network_small(kind, side):
    with torch.device("meta"):
        view = build_model(f"wrn_10_1@{kind}", classes=4).eval()(torch.empty(2, 3, 32, 32))
    assert [tuple(each.shape[2:]) for each in view.maps] == [(side // k, side // k) for k in (1, 2, 4)]


def test_a_network_that_is_made_for_a_size_is_made_for_what_it_sees():
    batch = images(1, (32, 16))
    torch.manual_seed(0)
    network = build_model("swish_teacher@low", classes=4, channels=1, image_size=(32, 16)).double().eval()
    torch.manual_seed(0)
    plain = build_model("swish_teacher", classes=4, channels=1, image_size=(16, 8)).double().eval()
    assert torch.equal(network(batch).logits, plain(MODALITIES["low"]()(batch)).logits)


def test_the_enlarging_network_enlarges_what_the_modality_made():
    with torch.device("meta"):
        view = build_model("resnet50@224@low", classes=4).eval()(torch.empty(2, 3, 32, 32))
    assert view.maps[0].shape == (2, 256, 56, 56)


def test_whatever_else_is_asked_the_backbone_answers():
    network = build("wrn_10_0.5@edges").eval()
    assert isinstance(network, ModalityNet)
    assert network.stages is network.backbone.stages and network.classifier is network.backbone.classifier
    view = network(images(size=(16, 16)))
    torch.testing.assert_close(network.resume(2, view.maps[1]).logits, view.logits)
    torch.testing.assert_close(network.section(2, view.maps[0]), view.maps[1])
    assert not hasattr(network, "heads")


def test_copies_weights_and_new_draws_work_as_for_any_network(tmp_path):
    network = build("wrn_10_0.5@grey").eval()
    batch = images(size=(16, 16))
    before = network(batch).logits
    twin = copy.deepcopy(network)
    assert torch.equal(twin(batch).logits, before)
    save_weights(network, tmp_path / "weights.safetensors")
    reset(twin)
    assert not torch.equal(twin(batch).logits, before)
    load_weights(twin, tmp_path / "weights.safetensors")
    assert torch.equal(twin(batch).logits, before)


def test_heads_read_the_maps_behind_the_modality():
    network = build("wrn_10_0.5@low+heads").eval()
    view = network(images(size=(16, 16)))
    assert len(view.exits) == 2 and view.maps[0].shape[2:] == (8, 8)


def test_gradient_reaches_the_whole_network_behind_the_modality():
    network = build("wrn_10_0.5@edges")
    network(images(size=(16, 16), count=4)).logits.square().sum().backward()
    assert all(parameter.grad.any() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("wrn_10_1@gray", 32, "unknown model 'wrn_10_1@gray'; did you mean 'wrn_40_2@grey'"),
        ("wrn_10_1@", 32, "unknown model 'wrn_10_1@'"),
        ("@grey", 32, "unknown model '@grey'"),
        ("wrn_10_1@grey@low", 32, "unknown model 'wrn_10_1@grey@low'"),
        ("wrn_10_1+heads@low", 32, r"unknown model 'wrn_10_1\+heads@low'"),
        ("resnet50@low@224", 32, "unknown model 'resnet50@low@224'"),
        ("wrn_11_1@grey", 32, "the depth of wrn_11_1 must be"),
        ("wrn_10_1@grey", 3, "^image_size must be at least 4 for the 3 stages of wrn_10_1, not 3"),
        ("wrn_10_1@low", 6, "wrn_10_1@low sees 3 x 3 of 6 x 6 pixels: image_size must be at least 4"),
    ],
)
def test_names_and_sizes_that_cannot_be_are_refused(name, size, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, classes=4, image_size=size)
