"""Strong augmentation against Pillow, image by image; its random numbers; the second view in training."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy.stats import chi2
from toy import (
    CPU,
    IMAGES,
    MEAN,
    PADDING,
    STD,
    Plain,
    augment_slowly,
    difference,
    ends_alike_if_stopped,
    gpu,
    images_seen,
    make_bank,
    make_recipe,
    make_training,
    pictures,
    tiny_net,
    tiny_teacher,
)

from kdstudy.augment import LEVELS, OPERATIONS, StrongDraw, cut_out, rand_augment
from kdstudy.data import Draws
from kdstudy.logits import MultiLevel
from kdstudy.schemes import Alone, Batch, Offline

SHAPES = [(3, (32, 32)), (1, (8, 8)), (3, (9, 6)), (1, (6, 9))]
every_shape = pytest.mark.parametrize(("channels", "size"), SHAPES, ids=str)


def sloping_pictures(count: int, channels: int, size: tuple[int, int]) -> torch.Tensor:
    """uint8 (count, channels, H, W): noise on a slope, so that neither the tones nor the places are all alike."""
    noise, _ = pictures(count, size=size, channels=channels)
    slope = np.add.outer(np.arange(size[0]) * 3, np.arange(size[1]) * 2)[:, :, None]
    return torch.from_numpy((noise // 3 + slope % 120 + 20).astype(np.uint8)).permute(0, 3, 1, 2)


def with_pillow(name: str, image: Image.Image, fraction: float) -> Image.Image:
    """The operation at a place in its range, 0 to 1, as the FixMatch and MLKD authors take it from Pillow."""
    signed, kept = 2 * fraction - 1, 0.05 + 0.9 * fraction
    width, height = image.size

    def affine(*matrix):
        return image.transform(image.size, Image.Transform.AFFINE, matrix)

    operations = {
        "identity": lambda: image,
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "posterize": lambda: ImageOps.posterize(image, int(4 + 4 * fraction)),
        "solarize": lambda: ImageOps.solarize(image, 256 * fraction),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(kept),
        "colour": lambda: ImageEnhance.Color(image).enhance(kept),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(kept),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(kept),
        "rotate": lambda: image.rotate(30 * signed),
        "shear_x": lambda: affine(1, 0.3 * signed, 0, 0, 1, 0),
        "shear_y": lambda: affine(1, 0, 0, 0.3 * signed, 1, 0),
        "translate_x": lambda: affine(1, 0, 0.3 * signed * width, 0, 1, 0),
        "translate_y": lambda: affine(1, 0, 0, 0, 1, 0.3 * signed * height),
    }
    assert set(operations) == set(OPERATIONS)
    return operations[name]()


def pillow(image: torch.Tensor) -> Image.Image:
    pixels = image.permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[:, :, 0] if len(image) == 1 else pixels)


def unpillow(image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def draw_of(count: int, operations=(0, 0), strengths=(0, 0), cut=(0, 0, 0), shift=(0, 0), flip=False) -> StrongDraw:
    parts = (shift, operations, strengths, cut)
    shift, operations, strengths, cut = (torch.tensor([part] * count, dtype=torch.uint8) for part in parts)
    return StrongDraw(shift, torch.full((count,), flip), operations, strengths, cut)


@every_shape
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_at_every_strength_is_pillows(name, channels, size):
    images = sloping_pictures(LEVELS, channels, size)
    levels = torch.arange(LEVELS, dtype=torch.uint8)[:, None]
    changed = rand_augment(images, torch.full_like(levels, OPERATIONS.index(name)), levels)
    assert changed.dtype == torch.uint8 and changed.shape == images.shape
    expected = [
        unpillow(with_pillow(name, pillow(image), (level + 0.5) / LEVELS)) for level, image in enumerate(images)
    ]
    gap = (changed.int() - torch.stack(expected).int()).abs()
    # Pillow cuts off what is here rounded; a grey value, and where a rotated pixel comes from, may be between two
    assert (gap > 1).float().mean() < (1e-3 if name in ("rotate", "colour") else 1e-9)
    assert name == "rotate" or gap.max() <= 2
    if name not in ("autocontrast", "brightness", "colour", "contrast", "sharpness", "rotate"):
        assert not gap.any()


def test_images_of_neither_one_nor_three_channels_are_refused():
    levels = torch.zeros(2, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="1 or 3 channels, not 4"):
        rand_augment(torch.zeros(2, 4, 8, 8, dtype=torch.uint8), levels, levels)


def test_there_are_fourteen_operations():
    assert len(OPERATIONS) == len(set(OPERATIONS)) == 14


def test_operations_are_taken_in_order_and_each_image_has_its_own():
    images = sloping_pictures(len(OPERATIONS) ** 2, 3, (8, 8))
    pairs = torch.cartesian_prod(*[torch.arange(len(OPERATIONS), dtype=torch.uint8)] * 2)
    strengths = torch.tensor([200, 40], dtype=torch.uint8).expand(len(pairs), 2)
    together = rand_augment(images, pairs, strengths)
    for image, pair, expected in zip(images, pairs, together, strict=True):
        for operation, strength in zip(pair, (200, 40), strict=True):
            level = torch.tensor([[strength]], dtype=torch.uint8)
            image = rand_augment(image[None], operation.reshape(1, 1), level)[0]
        assert torch.equal(image, expected)


@pytest.mark.parametrize("value", [0, 7, 255])
@every_shape
def test_tones_leave_an_even_image_even(channels, size, value):
    """No division by a range of zero, and no rounding downwards with every blend."""
    images = torch.full((LEVELS, channels, *size), value, dtype=torch.uint8)
    levels = torch.arange(LEVELS, dtype=torch.uint8)[:, None]
    for name in ("identity", "autocontrast", "equalize", "colour", "contrast", "sharpness"):
        changed = rand_augment(images, torch.full_like(levels, OPERATIONS.index(name)), levels)
        assert torch.equal(changed, images), name


def test_the_images_are_left_alone():
    images = sloping_pictures(14, 3, (8, 8))
    copy = images.clone()
    rand_augment(images, torch.arange(14, dtype=torch.uint8)[:, None], torch.full((14, 1), 99, dtype=torch.uint8))
    normal = copy.double()
    cut_out(normal, torch.full((14, 3), 128, dtype=torch.uint8))
    assert torch.equal(images, copy) and torch.equal(normal, copy.double())


def literally_cut(height: int, width: int, cut: list[int]) -> np.ndarray:
    side, row, column = ((level + 0.5) / 256 for level in cut)
    mask = np.zeros((height, width), dtype=bool)
    half = side * 0.5 * min(height, width) / 2
    for y in range(height):
        for x in range(width):
            mask[y, x] = abs(y + 0.5 - row * height) < half and abs(x + 0.5 - column * width) < half
    return mask


@every_shape
def test_the_cutout_is_a_square_of_zeros_of_up_to_half_a_side(channels, size):
    generator = torch.Generator().manual_seed(0)
    cuts = torch.randint(0, 256, (200, 3), dtype=torch.uint8, generator=generator)
    cuts[:4] = torch.tensor([[255, 128, 128], [255, 0, 255], [0, 128, 128], [255, 255, 0]])
    images = torch.ones(200, channels, *size, dtype=torch.float64)
    zeros = cut_out(images, cuts) == 0
    for mask, cut in zip(zeros, cuts.tolist(), strict=True):
        assert np.array_equal(mask.numpy(), np.broadcast_to(literally_cut(*size, cut), mask.shape))
    most = (min(size) + 1) // 2
    assert zeros[0, 0].any(0).sum() in (most, most - 1) and zeros[0, 0].any(1).sum() in (most, most - 1)
    assert not zeros[2].any()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_strong_view_is_crop_flip_operations_normalisation_and_cutout_in_this_order(channels, dtype):
    images, labels = pictures(9, size=(8, 9), channels=channels)
    bank = make_bank(images, labels, padding=2, dtype=dtype)
    index = torch.tensor([4, 0, 8])
    for name in ("identity", "translate_y", "equalize"):
        operations = (OPERATIONS.index(name), OPERATIONS.index("solarize"))
        draw = draw_of(3, operations, (255, 77), (250, 60, 200), shift=(3, 1), flip=True)
        batch = bank.strong(index, draw)
        assert batch.dtype == dtype and batch.is_contiguous(memory_format=torch.channels_last)
        mean, std = np.array(MEAN[:channels]), np.array(STD[:channels])
        for image, found in zip(images[index], batch, strict=True):
            crop = augment_slowly(image, 2, (3, 1), True).transpose(1, 2, 0) * std + mean
            crop = torch.from_numpy(np.rint(crop).astype(np.uint8)).permute(2, 0, 1)
            changed = with_pillow(name, pillow(crop), 255.5 / 256)
            changed = unpillow(with_pillow("solarize", changed, 77.5 / 256)).permute(1, 2, 0).numpy()
            expected = ((changed - mean) / std) * ~literally_cut(8, 9, [250, 60, 200])[:, :, None]
            np.testing.assert_allclose(found.permute(1, 2, 0), expected, rtol=1e-5, atol=1e-6)


# ---- random numbers


def make_draws(**changes) -> Draws:
    values = {"seed": 3, "stream": 0, "epochs": 2, "images": 50, "padding": 4, "flip": True, "device": CPU}
    return Draws.make(**{"strong": True} | values | changes)


def test_strong_draws_change_no_other_and_no_generator():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global one is what must stay
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    with_strong, without = make_draws(), make_draws(strong=False)
    for part in ("order", "shift", "flip"):
        assert torch.equal(getattr(with_strong, part), getattr(without, part))
    assert without.strong is None and without.strong_batch(without.rows(0, 0, 8)) is None
    bank = make_bank(*pictures(50, size=(8, 8)), padding=4)
    bank.strong(with_strong.batch(with_strong.rows(1, 0, 8))[0], with_strong.strong_batch(with_strong.rows(1, 0, 8)))
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002


def test_strong_draws_depend_on_seed_stream_epoch_and_position_alone():
    few, many = make_draws(epochs=2).strong, make_draws(epochs=5).strong
    assert all(torch.equal(one, other[:2]) for one, other in zip(few, many, strict=True))
    for changes in ({"seed": 4}, {"stream": 1}):
        other = make_draws(**changes).strong
        assert not any(torch.equal(one, two) for one, two in zip(few, other, strict=True))
    assert not any(torch.equal(part[0], part[1]) for part in few)
    batch = make_draws().strong_batch(make_draws().rows(1, 8, 20))
    assert all(torch.equal(part, whole[1, 8:20]) for part, whole in zip(batch, few, strict=True))


def test_strong_draws_follow_from_the_raw_stream():
    """Numbers 2N to 5N of each epoch's stream, whose first 2N are those of `Draws`."""
    raw = np.random.Philox(np.random.SeedSequence([7, 1, 2])).random_raw(30).reshape(5, 6).tolist()
    strong = make_draws(seed=7, stream=1, epochs=3, images=6).strong

    def below(limit: int, bits: int, start: int) -> int:
        return (bits // 2**start % 2**16) * limit // 2**16

    for image, (where, how, cut) in enumerate(zip(*raw[2:], strict=True)):
        assert strong.shift[2, image].tolist() == [below(9, where, 0), below(9, where, 16)]
        assert strong.flip[2, image].item() == (where >= 2**63)
        assert strong.operations[2, image].tolist() == [below(14, how, 0), below(14, how, 16)]
        assert strong.strengths[2, image].tolist() == [below(256, how, 32), below(256, how, 48)]
        assert strong.cut[2, image].tolist() == [below(256, cut, start) for start in (0, 16, 32)]


def test_a_recipe_without_crop_and_flip_has_neither_in_the_strong_view():
    strong, usual = make_draws(padding=0, flip=False).strong, make_draws().strong
    assert not strong.shift.any() and not strong.flip.any()
    assert torch.equal(strong.operations, usual.operations) and torch.equal(strong.cut, usual.cut)


def improbable(counts: torch.Tensor) -> bool:
    """Whether equally likely outcomes give counts this uneven less than once in 1,000 times."""
    expected = counts.double().mean()
    return bool(((counts - expected) ** 2 / expected).sum() > chi2.ppf(0.999, len(counts) - 1))


def test_strong_draws_are_uniform_and_unrelated():
    draws = make_draws(images=400, epochs=50)
    strong = StrongDraw(*(part.long() for part in draws.strong))
    pairs = strong.operations[..., 0] * 14 + strong.operations[..., 1]
    assert not improbable(torch.bincount(pairs.flatten(), minlength=14**2))
    for part in (*strong.strengths.unbind(2), *strong.cut.unbind(2)):
        assert not improbable(torch.bincount(part.flatten(), minlength=256))
        # in eighths, against the operation, the own shift and flip, and the usual shift
        for other, count in (
            (strong.operations[..., 0], 14),
            (strong.shift[..., 0], 9),
            (strong.flip, 2),
            (draws.shift[..., 1].long(), 9),
        ):
            assert not improbable(torch.bincount((part // 32 * count + other).flatten(), minlength=8 * count))
    both = torch.stack([draws.shift.long(), strong.shift])
    cells = both[0, ..., 0] * 9 + both[1, ..., 0]
    assert not improbable(torch.bincount(cells.flatten(), minlength=81))


# ---- in training


def two_view_scheme(seed: int = 0, student=None) -> Offline:
    bank = make_bank(*pictures(), dtype=torch.float64)
    images = next(bank.plain(2))
    student = student or tiny_net(seed)
    return Offline(student, tiny_teacher(), MultiLevel(), Batch(images, bank.labels[:2], strong=images))


def test_each_step_has_both_views_and_the_weak_one_is_that_of_all_methods():
    images = next(make_bank(*pictures()).plain(2))
    plain = Alone(tiny_net(0), Plain(), Batch(images, torch.zeros(2, dtype=torch.long)))
    usual = images_seen(plain)
    seen = images_seen(two_view_scheme())
    assert difference(seen[0::2], usual) is None
    assert not torch.equal(seen[1], seen[0])
    bank = make_bank(*pictures(), padding=PADDING)
    draws = make_draws(epochs=3, images=IMAGES, padding=PADDING)
    starts = range(0, IMAGES, 8)  # the last one is odd
    expected = [
        bank.strong(
            draws.batch(draws.rows(epoch, start, min(start + 8, IMAGES)))[0],
            draws.strong_batch(draws.rows(epoch, start, min(start + 8, IMAGES))),
        )
        for epoch in range(3)
        for start in starts
    ]
    assert difference(seen[1::2], expected) is None


def test_methods_with_one_view_have_no_second_one_made(monkeypatch):
    monkeypatch.setattr("kdstudy.data.ImageBank.strong", lambda *arguments: pytest.fail("a strong view was made"))
    images = next(make_bank(*pictures()).plain(2))
    make_training(Alone(tiny_net(0), Plain(), Batch(images, torch.zeros(2, dtype=torch.long))), make_recipe()).run()


def test_two_views_stopped_after_any_step_and_resumed_equal_uninterrupted(tmp_path):
    ends_alike_if_stopped(two_view_scheme, (1, 3, 5), tmp_path)


@gpu
def test_the_strong_view_is_the_same_on_the_gpu():
    cuda = torch.device("cuda")
    batches = []
    for device in (CPU, cuda):
        draws = make_draws(device=device)
        bank = make_bank(*pictures(50, size=(8, 8)), padding=4, device=device)
        batches.append(
            bank.strong(draws.batch(draws.rows(1, 0, 50))[0], draws.strong_batch(draws.rows(1, 0, 50))).cpu()
        )
    # a pixel that comes from between two may come from either
    assert ((batches[0] - batches[1]).abs() > 0.1).double().mean() < 1e-2
