"""Every entry of a table against the teacher on a crop made by slicing, and files that are another's refused."""

import itertools
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from toy import CPU, PADDING, TwoPhases, augment_slowly, clone, difference, gpu, make_bank, pictures, tiny_teacher

from kdstudy.checkpoint import BadFile, save_weights
from kdstudy.core import View
from kdstudy.data import ImageBank
from kdstudy.logit_table import LogitTable, bytes_needed, pays, reads_logits_only, views_of
from kdstudy.logits import MultiLevel
from kdstudy.response import VanillaKD

NAMES = {"teacher": "t1", "data": "d1"}


class Mirror(nn.Module):
    """A teacher whose logits are the pixels it is shown, and that notes how it was asked."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale, self.batches, self.grad, self.trained = scale, [], [], []

    def forward(self, images: Tensor) -> View:
        self.batches.append(len(images))
        self.grad.append(torch.is_grad_enabled())
        self.trained.append(self.training)
        return View(self.scale * images.flatten(1))


class Speaker(nn.Module):
    """A teacher whose logits for an image of one pixel are the row of that number."""

    def __init__(self, rows: Tensor):
        super().__init__()
        self.rows = rows

    def forward(self, images: Tensor) -> View:
        return View(self.rows[images.flatten().long()])


def raw_bank(images: np.ndarray, padding: int, dtype=torch.float32, device=CPU) -> ImageBank:
    """A bank whose images come out as whole numbers from 0 to 255, all of which float16 holds exactly."""
    channels = images.shape[3]
    labels = np.zeros(len(images), dtype=np.int64)
    zeros, ones = np.zeros(channels), np.ones(channels)
    return ImageBank(images, labels, mean=zeros, std=ones, padding=padding, device=device, dtype=dtype)


def all_views(images: int, padding: int, flip: bool) -> list[tuple[int, int, int, bool]]:
    shifts = range(2 * padding + 1)
    return list(itertools.product(range(images), shifts, shifts, (False, True) if flip else (False,)))


def asked(views: list[tuple[int, int, int, bool]], device=CPU) -> tuple[Tensor, Tensor, Tensor]:
    """Views as `ImageBank.augmented` takes them."""
    index, down, right, flip = (torch.tensor(part, device=device) for part in zip(*views, strict=True))
    return index, torch.stack((down, right), dim=1), flip


def cut_out(image: np.ndarray, padding: int, down: int, right: int, flip: bool) -> np.ndarray:
    """One crop of an image with a black border, mirrored if told, as (C, H, W)."""
    height, width, _ = image.shape
    crop = np.pad(image, ((padding,) * 2, (padding,) * 2, (0, 0)))[down : down + height, right : right + width]
    return (crop[:, ::-1] if flip else crop).transpose(2, 0, 1)


def small_table(teacher: nn.Module | None = None, *, flip: bool = True, half=None, **options) -> LogitTable:
    return LogitTable.build(teacher or Mirror(), raw_bank(pictures(3)[0], PADDING), flip=flip, half=half, **options)


@pytest.mark.parametrize("batch", [1, 7, 1000])
@pytest.mark.parametrize(
    ("padding", "flip", "channels"), [(0, True, 3), (0, False, 1), (1, True, 1), (1, False, 3), (4, True, 3)]
)
def test_every_view_has_the_teachers_answer_for_exactly_that_crop(padding, flip, channels, batch):
    images, _ = pictures(2 if padding == 4 else 3, channels=channels)
    table = LogitTable.build(Mirror(), raw_bank(images, padding), flip=flip, half=None, batch=batch)
    views = all_views(len(images), padding, flip)
    random.Random(0).shuffle(views)
    answers = table.answers(*asked(views))
    assert answers.dtype == torch.float32
    expected = [cut_out(images[i], padding, down, right, mirrored).ravel() for i, down, right, mirrored in views]
    np.testing.assert_array_equal(answers, np.array(expected, dtype=np.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_answers_are_the_live_teachers_within_half_precision(dtype):
    images, labels = pictures(9)
    teacher = tiny_teacher(dtype=dtype).eval()
    with torch.no_grad():  # so that rows differ by far more than rounding
        teacher.norm.weight.mul_(20)
    table = LogitTable.build(teacher, make_bank(images, labels, padding=2, dtype=dtype), flip=True, half=None, batch=64)
    views = all_views(9, 2, True)
    answers = table.answers(*asked(views))
    assert answers.dtype == dtype
    with torch.no_grad():
        live = [teacher(torch.tensor(augment_slowly(images[i], 2, at, mirrored)[None], dtype=dtype)).logits
                for i, *at, mirrored in views]  # fmt: skip
    live = torch.cat(live)
    error = (answers - live).abs().amax(dim=1) / live.abs().amax(dim=1)
    assert 0 < error.max() < 2**-11 * 1.01  # float16 has 11 binary digits
    assert (live.amax(dim=0) - live.amin(dim=0)).min() > 0.5
    sure = live.sort(dim=1).values.diff(dim=1)[:, -1] > 2e-3 * live.abs().amax(dim=1)
    assert sure.double().mean() > 0.9 and torch.equal(answers.argmax(dim=1)[sure], live.argmax(dim=1)[sure])


def test_teacher_is_asked_in_eval_mode_without_gradient_in_batches_of_at_most_the_size():
    teacher = Mirror()
    small_table(teacher, batch=20)
    assert sorted(teacher.batches, reverse=True)[:3] == [20, 20, 14] and sum(teacher.batches[3:]) <= 14 + 1
    assert not any(teacher.grad) and not any(teacher.trained)


def test_modes_and_batch_statistics_of_the_teacher_stay():
    teacher = tiny_teacher(dtype=torch.float32).train()
    teacher.classifier.eval()
    before = clone(teacher.state_dict())
    modes = [module.training for module in teacher.modules()]
    for stop in (False, True):
        LogitTable.build(
            teacher, raw_bank(pictures(3)[0], 0), flip=False, half=None, should_stop=lambda stop=stop: stop
        )
        assert [module.training for module in teacher.modules()] == modes
        assert difference(clone(teacher.state_dict()), before) is None
    with pytest.raises(RuntimeError):  # a channel too few
        LogitTable.build(teacher, raw_bank(pictures(3, channels=1)[0], 0), flip=False, half=None)
    assert [module.training for module in teacher.modules()] == modes


def test_half_runs_the_teacher_under_autocast():
    images, labels = pictures(6)
    teacher, bank = tiny_teacher(dtype=torch.float32).eval(), make_bank(images, labels, padding=1, dtype=torch.float32)
    views = asked(all_views(6, 1, True))
    table = LogitTable.build(teacher, bank, flip=True, half=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        live = teacher(bank.augmented(*views)).logits
    answers = table.answers(*views)
    assert live.dtype == torch.bfloat16 and answers.dtype == torch.float32
    torch.testing.assert_close(answers, live.float(), rtol=0.02, atol=0.01)  # another batch may sum in another order
    assert torch.equal(answers, answers.bfloat16().float())  # float16 holds what bfloat16 does
    whole = LogitTable.build(teacher, bank, flip=True, half=None).answers(*views)
    assert not torch.equal(whole, whole.bfloat16().float())


def test_progress_is_told_and_a_stop_leaves_nothing():
    told, teacher = [], Mirror()
    small_table(batch=20, tell=lambda done, total: told.append((done, total)))
    assert told == [(20, 54), (40, 54), (54, 54)]
    answers = iter([False, True])
    table = small_table(teacher, batch=20, tell=lambda *_: told.append("more"), should_stop=lambda: next(answers))
    assert table is None and told[3:] == ["more"] and 40 not in teacher.batches and teacher.batches.count(20) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_largest_logit_stays_that_of_the_same_class_however_near_others_are(dtype):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(256, 1, generator=generator, dtype=dtype) * 5
    rows[:8] = 2.0 ** torch.arange(-3, 5).unsqueeze(1)  # where the numbers of float16 grow sparse
    rows[8:16] = -rows[:8]
    rows = rows * (1 + 3e-4 * torch.randn(256, 6, generator=generator, dtype=dtype))
    rows[200, 4] = rows[200, 2] = rows[200].max()  # the first of two equal ones
    assert (rows.half().argmax(dim=1) != rows.argmax(dim=1)).sum() > 50
    images = np.arange(256, dtype=np.uint8).reshape(256, 1, 1, 1)
    table = LogitTable.build(Speaker(rows), raw_bank(images, 0, dtype), flip=False, half=None, batch=100)
    answers = table.answers(*asked(all_views(256, 0, False)))
    assert torch.equal(answers.argmax(dim=1), rows.argmax(dim=1))
    error = (answers - rows).abs().amax(dim=1) / rows.abs().amax(dim=1)
    assert 2**-11 < error.max() < 2**-10 * 1.001
    safe = rows.half().argmax(dim=1) == rows.argmax(dim=1)
    assert torch.equal(answers[safe], rows[safe].half().to(dtype))


def test_in_a_row_of_a_tie_the_largest_goes_up_and_all_others_down_unless_they_are_exact():
    rows = torch.tensor([[1.0, 1.0001, 0.0, -3.0], [-2.0, -1.9996, -1.9999, -2.6669]])
    bank = raw_bank(np.arange(2, dtype=np.uint8).reshape(2, 1, 1, 1), 0)
    answers = LogitTable.build(Speaker(rows), bank, flip=False, half=None).answers(*asked(all_views(2, 0, False)))
    step = 2**-10  # between numbers of float16 from 1 to 2; twice that from 2 to 4
    assert answers.tolist() == [[1, 1 + step, 0, -3], [-2, -2 + step, -2, -2.66796875]]


@pytest.mark.parametrize("rows", [[70_000.0, 75_000.0], [-75_000.0, -70_000.0]], ids=str)
def test_ties_beyond_the_largest_number_are_refused(rows):
    images = np.zeros((1, 1, 1, 1), dtype=np.uint8)
    with pytest.raises(ValueError, match="half precision"):
        LogitTable.build(Speaker(torch.tensor([rows])), raw_bank(images, 0), flip=False, half=None)


@pytest.mark.parametrize("scale", [300.0, float("nan"), float("inf"), 1e-9, -1e30], ids=str)
def test_logits_that_half_precision_cannot_hold_are_refused(scale):
    images = np.full((1, 2, 2, 1), 250, dtype=np.uint8)  # 250 * 300 is beyond 65504
    with pytest.raises(ValueError, match="do not fit a table of half precision"):
        LogitTable.build(Mirror(scale), raw_bank(images, 0), flip=False, half=None)


def test_one_bad_view_of_many_is_refused_wherever_it_is():
    for place in (0, 2, 4):
        images = np.full((5, 2, 2, 1), 100, dtype=np.uint8)
        images[place, 1, 0] = 250
        with pytest.raises(ValueError, match="half precision"):
            LogitTable.build(Mirror(300.0), raw_bank(images, 0), flip=False, half=None, batch=2)


def test_one_row_too_near_zero_is_refused_however_many_are_not():
    images = np.full((100, 1, 1, 1), 200, dtype=np.uint8)
    LogitTable.build(Mirror(1e-6), raw_bank(images, 0), flip=False, half=None)
    images[50] = 1  # 1e-6 lies between two numbers of float16 that are 6e-8 apart
    with pytest.raises(ValueError, match=r"changes a row by 1\.3e-02 of its largest magnitude, and 0\.001 is allowed"):
        LogitTable.build(Mirror(1e-6), raw_bank(images, 0), flip=False, half=None)
    rows = torch.zeros(1, 100)
    rows[0, 7] = 1e-6
    with pytest.raises(ValueError, match="half precision"):
        LogitTable.build(Speaker(rows), raw_bank(images[:1] * 0, 0), flip=False, half=None)


def test_the_largest_logits_that_fit_and_rows_of_zeros_are_kept():
    images = np.array([0, 250], dtype=np.uint8).reshape(2, 1, 1, 1)
    table = LogitTable.build(Mirror(65504 / 250), raw_bank(images, 0), flip=False, half=None)
    assert table.answers(*asked([(0, 0, 0, False), (1, 0, 0, False)])).flatten().tolist() == [0, 65504]


@pytest.mark.parametrize("batch", [0, -3, 2.5])
def test_a_batch_that_is_none_is_refused(batch):
    with pytest.raises(ValueError, match="batch must be a whole number of at least 1"):
        small_table(batch=batch)


def test_views_that_the_table_lacks_are_refused():
    table = small_table(flip=False)
    for view in [(0, 0, 0, True), (3, 0, 0, False), (0, 3, 0, False), (0, 0, 3, False)]:
        with pytest.raises(IndexError):
            table.answers(*asked([view]))


@pytest.mark.parametrize("flip", [False, True])
def test_bytes_needed_are_those_of_a_table(flip):
    table = small_table(flip=flip)
    assert table.values.nbytes == bytes_needed(3, 6 * 5 * 3, PADDING, flip) == 3 * 9 * (1 + flip) * 90 * 2


def test_sizes_of_the_cifars():
    assert views_of(4, True) == 162 and views_of(4, False) == 81 and views_of(0, False) == 1
    assert bytes_needed(50_000, 10, 4, True) == 162_000_000
    assert bytes_needed(50_000, 100, 4, True) == 1_620_000_000


def test_a_table_pays_from_more_passes_than_views_if_it_fits():
    case = {"images": 50_000, "classes": 10, "padding": 4, "flip": True}
    assert pays(163, **case, memory=162_000_000) and pays(20_000, **case, memory=10**9)
    assert not pays(162, **case, memory=10**9) and not pays(20_000, **case, memory=161_999_999)
    assert pays(82, **case | {"flip": False}, memory=10**9) and pays(
        2, **case | {"padding": 0, "flip": False}, memory=10**8
    )


def test_only_methods_that_read_nothing_but_logits_may_use_a_table():
    assert reads_logits_only(VanillaKD())
    assert not reads_logits_only(TwoPhases())  # the embedding
    assert not reads_logits_only(MultiLevel())  # logits of the strongly augmented images


def load(path: Path, **changes) -> LogitTable:
    values = {"images": pictures(3)[0], "padding": PADDING, "flip": True, "half": None, "dtype": torch.float32}
    values |= NAMES | changes
    bank = raw_bank(values.pop("images"), values.pop("padding"), values.pop("dtype"))
    return LogitTable.load(path, bank, **values)


@pytest.mark.parametrize("flip", [False, True])
def test_a_table_comes_back_bit_for_bit(tmp_path, flip):
    path, table = tmp_path / "run" / "table.safetensors", small_table(flip=flip)
    table.save(path, **NAMES)
    loaded = load(path, flip=flip)
    assert torch.equal(loaded.values, table.values) and loaded.values.dtype == torch.float16
    assert (loaded.dtype, loaded.precision) == (table.dtype, table.precision) == (torch.float32, "float32")
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    loaded.save(path, **NAMES)  # over itself
    assert torch.equal(load(path, flip=flip).values, table.values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "t2"}, "teacher 't1', not 't2'"),
        ({"data": "d2"}, "data 'd1', not 'd2'"),
        ({"images": pictures(2)[0]}, "images '3', not '2'"),
        ({"padding": 0}, "padding '1', not '0'"),
        ({"flip": False}, "flip 'True', not 'False'"),
        ({"half": torch.bfloat16}, "precision 'float32', not 'bfloat16'"),
        ({"dtype": torch.float64}, "precision 'float32', not 'float64'"),
    ],
    ids=lambda part: next(iter(part)) if isinstance(part, dict) else "",
)
def test_the_table_of_another_is_refused(tmp_path, changes, message):
    path = tmp_path / "table.safetensors"
    small_table().save(path, **NAMES)
    with pytest.raises(BadFile, match=re.escape(f"logit table {path} is another: {message}")):
        load(path, **changes)


def test_a_table_of_half_precision_says_so(tmp_path):
    path = tmp_path / "table.safetensors"
    small_table(half=torch.bfloat16).save(path, **NAMES)
    assert load(path, half=torch.bfloat16).precision == "bfloat16"
    with pytest.raises(BadFile, match="precision 'bfloat16', not 'float32'"):
        load(path)


def test_absent_and_foreign_files_are_refused_by_path(tmp_path):
    path = tmp_path / "table.safetensors"
    with pytest.raises(BadFile, match=re.escape(f"logit table {path} cannot be read")):
        load(path)
    save_weights(nn.Linear(2, 2), path)
    with pytest.raises(BadFile, match=re.escape(f"logit table {path} cannot be read")):
        load(path)
    save_file({"logits": small_table().values}, path)
    with pytest.raises(BadFile, match=re.escape(f"logit table {path} is another: teacher None, not 't1'")):
        load(path)
    path.write_bytes(b"no table at all")
    with pytest.raises(BadFile, match=re.escape(f"logit table {path} cannot be read")):
        load(path)


def test_torn_and_damaged_files_are_refused(tmp_path):
    path = tmp_path / "table.safetensors"
    table = LogitTable.build(Mirror(), raw_bank(pictures(3, size=(2, 1))[0], PADDING), flip=True, half=None)
    table.save(path, **NAMES)
    whole = path.read_bytes()
    generator = random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [generator.randrange(header) for _ in range(150)] + [
        generator.randrange(header, len(whole)) for _ in range(50)
    ]
    refused = 0
    for place in places:
        path.write_bytes(whole[:place])
        with pytest.raises(BadFile):
            load(path, images=pictures(3, size=(2, 1))[0])
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << generator.randrange(8)]) + whole[place + 1 :])
        try:  # a bit of a blank in the header may mean nothing
            loaded = load(path, images=pictures(3, size=(2, 1))[0])
        except BadFile:
            refused += 1
        else:
            assert place < header and torch.equal(loaded.values, table.values)
    assert refused > 190
    path.write_bytes(whole)
    assert torch.equal(load(path, images=pictures(3, size=(2, 1))[0]).values, table.values)


@pytest.mark.parametrize(("old", "new"), [(b"[3,3,3,2,90]", b"[3,3,3,5,36]"), (b'"F16"', b'"I16"')])
def test_a_file_that_says_another_shape_or_type_of_the_same_bytes_is_refused(tmp_path, old, new):
    path = tmp_path / "table.safetensors"
    small_table().save(path, **NAMES)
    whole = path.read_bytes()
    assert whole.count(old) == 1
    path.write_bytes(whole.replace(old, new))
    with pytest.raises(BadFile, match=re.escape(f"logit table {path} is damaged")):
        load(path)


@gpu
def test_answers_can_be_captured_in_a_graph():
    device = torch.device("cuda")
    images, _ = pictures(5)
    table = LogitTable.build(Mirror(), raw_bank(images, 2, device=device), flip=True, half=None)
    views = asked(all_views(5, 2, True), device)
    first, second = ([part[at].clone() for part in views] for at in (slice(0, 8), slice(100, 108)))
    table.answers(*first)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = table.answers(*first)
    for part, other in zip(first, second, strict=True):
        part.copy_(other)
    graph.replay()
    assert torch.equal(captured, table.answers(*second))
    expected = [cut_out(images[i], 2, *at).ravel() for i, *at in all_views(5, 2, True)[100:108]]
    np.testing.assert_array_equal(captured.cpu(), np.array(expected, dtype=np.float32))
