"""Augmented batches against a crop of one image at a time, and what the random numbers of a run promise."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from toy import CPU, MEAN, STD, augment_slowly, gpu, make_bank, pictures

from kdstudy.data import BlankBank, Draws, ImageBank

SHAPES = [((6, 5), 3, 2), ((4, 7), 1, 1), ((3, 3), 2, 4), ((6, 5), 3, 0)]


def make_draws(**changes) -> Draws:
    values = {"seed": 3, "stream": 0, "epochs": 2, "images": 50, "padding": 4, "flip": True, "device": CPU}
    return Draws.make(**values | changes)


def same(one: Draws, other: Draws) -> bool:
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in ("order", "shift", "flip"))


@pytest.mark.parametrize(("size", "channels", "padding"), SHAPES)
def test_augmented_batch_is_pad_crop_flip_of_every_image_for_every_shift(size, channels, padding):
    images, labels = pictures(3, size=size, channels=channels)
    shifts = range(2 * padding + 1)
    cases = list(itertools.product((2, 0, 1), shifts, shifts, (False, True)))
    index, shift = torch.tensor([case[0] for case in cases]), torch.tensor([case[1:3] for case in cases])
    batch = make_bank(images, labels, padding=padding).augmented(
        index, shift, torch.tensor([case[3] for case in cases])
    )
    expected = [augment_slowly(images[i], padding, (down, right), flip) for i, down, right, flip in cases]
    assert batch.dtype == torch.float64
    np.testing.assert_allclose(batch, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_batches_are_channels_last_in_memory(channels, dtype):
    bank = make_bank(*pictures(9, channels=channels), padding=2, dtype=dtype)
    augmented = bank.augmented(torch.arange(4), torch.ones(4, 2, dtype=torch.long), torch.tensor([True, False] * 2))
    for batch in (augmented, *bank.plain(4)):
        assert batch.dtype == dtype
        assert batch.shape[1:] == (channels, 6, 5)
        assert batch.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("padding", [0, 3])
def test_plain_batches_are_all_images_in_order_normalised(padding):
    images, labels = pictures(11)
    bank = make_bank(images, labels, padding=padding)
    batches = list(bank.plain(4))
    assert [len(batch) for batch in batches] == [4, 4, 3] and len(bank) == 11
    expected = ((images - np.array(MEAN)) / np.array(STD)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(torch.cat(batches), expected, rtol=1e-12, atol=1e-12)
    assert bank.labels.tolist() == labels.tolist() and bank.labels.dtype == torch.int64


def test_every_epoch_visits_every_image_once_in_an_order_of_its_own():
    draws = make_draws(epochs=20)
    assert draws.order.sort(dim=1).values.tolist() == [list(range(50))] * 20
    assert len({tuple(order) for order in draws.order.tolist()}) == 20
    assert len({tuple(flips) for flips in draws.flip.tolist()}) == 20


def test_an_epoch_does_not_depend_on_how_many_follow():
    few, many = make_draws(epochs=2), make_draws(epochs=7)
    assert same(few, Draws(many.order[:2], many.shift[:2], many.flip[:2]))


@pytest.mark.parametrize("changes", [{"seed": 4}, {"stream": 1}, {"seed": 0, "stream": 3}], ids=str)
def test_seeds_and_streams_are_unrelated(changes):
    one, other = make_draws(images=400), make_draws(images=400, **changes)
    # unrelated orders agree at a position with probability 1/400, unrelated flips with 1/2, shifts with 1/81
    assert (one.order == other.order).double().mean() < 0.02
    assert 0.4 < (one.flip == other.flip).double().mean() < 0.6
    assert (one.shift == other.shift).all(dim=2).double().mean() < 0.05
    # nor is one the other by an epoch or a position later
    assert not torch.equal(one.order[1], other.order[0]) and not torch.equal(one.order[0], other.order[1])


def test_augmentation_does_not_change_order_and_flip_does_not_change_shift():
    drawn = make_draws()
    plain = make_draws(padding=0, flip=False)
    assert torch.equal(plain.order, drawn.order)
    assert not plain.shift.any() and not plain.flip.any()
    unflipped = make_draws(flip=False)
    assert torch.equal(unflipped.shift, drawn.shift) and not unflipped.flip.any()


def improbable(counts: torch.Tensor) -> bool:
    """Whether equally likely outcomes give counts this uneven less than once in 1,000 times."""
    expected = counts.double().mean()
    return bool(((counts - expected) ** 2 / expected).sum() > chi2.ppf(0.999, len(counts) - 1))


@pytest.mark.parametrize("padding", [1, 4])
def test_shifts_flips_and_first_images_are_uniform_and_unrelated(padding):
    draws = make_draws(images=400, epochs=50, padding=padding)
    shifts = 2 * padding + 1
    cells = (draws.shift[..., 0].long() * shifts + draws.shift[..., 1]) * 2 + draws.flip
    assert not improbable(torch.bincount(cells.flatten(), minlength=2 * shifts**2))
    assert draws.shift.max() == 2 * padding
    # where in an epoch images stand, in tenths: over epochs each image, here in 8 groups of 50, stands everywhere
    tenth = torch.arange(400) // 40
    places = (draws.order.long() // 50) * 10 + tenth
    assert not improbable(torch.bincount(places.flatten(), minlength=80))
    # an image's crop has nothing to do with which image it is
    assert not improbable(torch.bincount((draws.order.long() // 50 * shifts + draws.shift[..., 0]).flatten()))


# np.random.Philox(np.random.SeedSequence([7, 1, 2])).random_raw(12), whose stream numpy promises never to change: six
# numbers to sort the images by, then six with the bits of their shifts (bits 0-15 and 16-31) and flips (bit 63)
SORTED_BY = (0xD3E8AD8BFF0C943E, 0x81735DC029F6DD7C, 0xC96C3A422643983B, 0x029A9161B6B8F1BB, 0x28BFFD6562BA322D,
             0xAECAC5347FE64F37)  # fmt: skip
BITS = (0x4E9B1A1264D1F6D1, 0x2D3323F715263C8F, 0xBCE01AAAE276EB65, 0x5BC792886CD0F945, 0x00781445AFCB057A,
        0xAB7AAA3554F9CF5A)  # fmt: skip


def test_draws_are_those_on_file():
    draws = make_draws(seed=7, stream=1, epochs=3, images=6)
    assert draws.order[2].tolist() == [3, 4, 1, 5, 2, 0]
    assert draws.shift[2].tolist() == [[8, 3], [2, 0], [8, 7], [8, 3], [0, 6], [7, 2]]
    assert draws.flip[2].tolist() == [False, False, True, False, False, True]


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_draws_follow_from_the_raw_stream(padding):
    draws = make_draws(seed=7, stream=1, epochs=3, images=6, padding=padding)
    assert draws.order[2].tolist() == sorted(range(6), key=SORTED_BY.__getitem__)
    shifts = [[part * (2 * padding + 1) // 2**16 for part in (bits % 2**16, bits // 2**16 % 2**16)] for bits in BITS]
    assert draws.shift[2].tolist() == shifts
    assert draws.flip[2].tolist() == [bits >= 2**63 for bits in BITS]


def test_a_long_order_sorts_by_whole_numbers_of_the_raw_stream():
    raw = np.random.Philox(np.random.SeedSequence([3, 0, 1])).random_raw(500).tolist()
    assert make_draws(images=500).order[1].tolist() == sorted(range(500), key=raw.__getitem__)


def test_batch_holds_an_epochs_positions_ready_to_index_with():
    draws = make_draws()
    index, shift, flip = draws.batch(draws.rows(1, 8, 20))
    assert index.dtype == shift.dtype == torch.long and flip.dtype == torch.bool
    assert index.tolist() == draws.order[1].tolist()[8:20]
    assert shift.tolist() == draws.shift[1].tolist()[8:20]
    assert flip.tolist() == draws.flip[1].tolist()[8:20]


@gpu
def test_draws_and_batches_are_the_same_on_the_gpu():
    cuda = torch.device("cuda")
    here, there = make_draws(), make_draws(device=cuda)
    assert same(here, Draws(there.order.cpu(), there.shift.cpu(), there.flip.cpu()))
    images, labels = pictures(50)
    batches = []
    for draws, device in ((here, CPU), (there, cuda)):
        bank = make_bank(images, labels, padding=4, device=device)
        batches.append(bank.augmented(*draws.batch(draws.rows(1, 0, 50))).cpu())
    torch.testing.assert_close(*batches, rtol=1e-14, atol=1e-14)


def blank_bank(count=11, **options) -> BlankBank:
    place = {"mean": MEAN, "std": STD, "padding": 2, "device": CPU, "dtype": torch.float64}
    return BlankBank(count, (3, 6, 5), **place | options)


def test_a_blank_bank_has_the_shapes_of_a_bank_and_nothing_in_them():
    bank, blank = make_bank(*pictures(11), padding=2), blank_bank()
    draws = make_draws(images=11, padding=2, strong=True)
    index, shift, flip = draws.batch(draws.rows(0, 0, 7))
    assert (len(blank), blank.padding) == (len(bank), bank.padding)
    assert [len(batch) for batch in blank.plain(4)] == [len(batch) for batch in bank.plain(4)] == [4, 4, 3]
    pairs = list(zip(blank.plain(4), bank.plain(4), strict=True))
    pairs.append((blank.augmented(index, shift, flip), bank.augmented(index, shift, flip)))
    strong = draws.strong_batch(draws.rows(0, 0, 7))
    pairs.append((blank.strong(index, strong), bank.strong(index, strong)))
    pairs.append((blank.labels, bank.labels))
    for nothing, images in pairs:
        assert (nothing.shape, nothing.dtype, nothing.device) == (images.shape, images.dtype, images.device)
        assert not nothing.any() and images.any()


def test_a_blank_bank_offers_all_that_a_bank_does():
    def offered(cls):
        return {name for name in vars(cls) if not name.startswith("_")}

    assert offered(BlankBank) == offered(ImageBank)
    bank, blank = make_bank(*pictures(3)), blank_bank()
    given = {name for name in vars(bank) if not name.startswith("_")}
    assert given == {name for name in vars(blank) if not name.startswith("_")}
    for each in ("mean", "std"):  # by which the teacher's images are normalised
        assert torch.equal(getattr(blank, each), getattr(bank, each)) and getattr(bank, each).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_blank_images_of_another_precision_and_shape(dtype):
    blank = BlankBank(2, (1, 4, 7), mean=MEAN[:1], std=STD[:1], padding=0, device=CPU, dtype=dtype)
    (images,) = blank.plain(5)
    assert images.shape == (2, 1, 4, 7) and images.dtype == dtype
