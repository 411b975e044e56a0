"""The benchmark's baseline learns, augments as the study does, and takes the steps that the study's own loop takes."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chi2
from torch.utils.data import RandomSampler
from toy import CPU, TinyNet, difference, tiny_net

from kdstudy import naive
from kdstudy.data import ImageBank
from kdstudy.image_set import ImageSet, channel_statistics
from kdstudy.models import build_model
from kdstudy.naive import Meters, NaiveLoop, PilImages, augmentation_speed, training_loader, validation_loader
from kdstudy.response import CrossEntropy, VanillaKD
from kdstudy.schemes import Batch, Offline
from kdstudy.sources import digits


def make_images(count=22, *, size=(6, 5), channels=3, classes=3, test=10, seed=0) -> ImageSet:
    generator = np.random.default_rng(seed)
    x_train, x_test = (generator.integers(0, 256, (n, *size, channels), dtype=np.uint8) for n in (count, test))
    y_train, y_test = np.arange(count) % classes, np.arange(test) % classes
    return ImageSet("random", x_train, y_train, x_test, y_test)


def make_loop(images: ImageSet | None = None, *, seed=0, **options) -> NaiveLoop:
    plain = {"dtype": torch.float32}
    student, teacher = (net.to(memory_format=torch.contiguous_format) for net in (tiny_net(seed, **plain), taught()))
    values = {"batch": 8, "workers": 0, "device": CPU, "padding": 1}
    return NaiveLoop(student, teacher, images or make_images(), **values | options)


def taught() -> TinyNet:
    torch.manual_seed(9)
    return TinyNet(4).train()  # the loop must put it into eval mode itself


def bank_of(images: ImageSet, padding: int) -> ImageBank:
    mean, std = channel_statistics(images.x_train)
    place = {"padding": padding, "device": CPU, "dtype": torch.float32}
    return ImageBank(images.x_train, images.y_train, mean=mean, std=std, **place)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_crops_of_an_image_are_those_of_the_study_and_equally_likely(channels):
    images, padding, draws = make_images(channels=channels, size=(4, 3)), 1, 1800
    cases = list(itertools.product(range(2 * padding + 1), range(2 * padding + 1), (False, True)))
    shift = torch.tensor([case[:2] for case in cases])
    flip = torch.tensor([case[2] for case in cases])
    possible = bank_of(images, padding).augmented(torch.full((len(cases),), 5), shift, flip)
    data = training_loader(images, batch=8, workers=0, padding=padding).dataset
    torch.manual_seed(1)
    counts = torch.zeros(len(cases))
    for _ in range(draws):
        crop, label = data[5]
        near = torch.isclose(possible, crop, rtol=1e-5, atol=1e-5).flatten(1).all(dim=1)
        assert near.sum() == 1 and label == images.y_train[5]
        counts += near
    expected = draws / len(cases)
    assert ((counts - expected) ** 2 / expected).sum() < chi2.ppf(0.999, len(cases) - 1)


def test_training_images_come_shuffled_each_once_and_test_images_plain_in_order():
    images = make_images(200, size=(4, 4))
    loader = training_loader(images, batch=64, workers=0, padding=0)
    torch.manual_seed(2)
    first, second = (list(loader), list(loader))
    assert [len(labels) for _, labels in first] == [64, 64, 64, 8]
    plain = next(bank_of(images, 0).plain(200))
    everything = torch.cat([plain, plain.flip(3)])
    orders = []
    for epoch in (first, second):
        crops = torch.cat([batch for batch, _ in epoch])
        assert crops.dtype == torch.float32 and crops.is_contiguous()
        which = torch.cdist(crops.flatten(1), everything.flatten(1)).argmin(dim=1) % 200
        assert sorted(which.tolist()) == list(range(200))
        assert torch.cat([labels for _, labels in epoch]).tolist() == images.y_train[which].tolist()
        orders.append(which.tolist())
    assert orders[0] != orders[1] != sorted(orders[1])


def test_validation_is_of_plain_test_images_by_the_training_images_statistics():
    images = make_images(30, test=150)
    batches = list(validation_loader(images, workers=0))
    assert [len(labels) for _, labels in batches] == [64, 64, 22]
    mean, std = channel_statistics(images.x_train)
    expected = ((images.x_test - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(torch.cat([batch for batch, _ in batches]), expected, rtol=1e-5, atol=1e-5)
    assert torch.cat([labels for _, labels in batches]).tolist() == images.y_test.tolist()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than there may be processors
def test_loaders_are_those_of_the_field():
    loader, test = training_loader(make_images(), 8, workers=5), validation_loader(make_images(), workers=5)
    assert isinstance(loader.sampler, RandomSampler) and not loader.drop_last
    assert (loader.num_workers, test.num_workers) == (5, 2)
    assert not loader.persistent_workers  # new processes each epoch
    assert naive.PADDING == 4 and NaiveLoop.__init__.__kwdefaults__["padding"] == 4


def test_workers_make_the_same_images():
    images = make_images(size=(5, 5))
    here, there = (training_loader(images, 8, workers=workers, padding=0) for workers in (0, 1))
    torch.manual_seed(3)
    own = {tuple(labels.tolist()): batch for batch, labels in here}
    torch.manual_seed(3)
    foreign = {tuple(labels.tolist()): batch for batch, labels in there}
    assert own.keys() == foreign.keys()
    for key, batch in own.items():  # which way each image is turned was drawn elsewhere
        as_is = (batch - foreign[key]).abs().amax(dim=(1, 2, 3))
        turned = (batch - foreign[key].flip(3)).abs().amax(dim=(1, 2, 3))
        assert torch.minimum(as_is, turned).max() < 1e-6


def test_a_step_is_that_of_the_studys_own_scheme():
    loop, method = make_loop(learning_rate=0.2, momentum=0.8, weight_decay=0.01), VanillaKD()
    student, teacher = copy.deepcopy(loop.student), copy.deepcopy(loop.teacher)
    before = [parameter.detach().clone() for parameter in student.parameters()]
    images, labels = torch.randn(8, 3, 6, 5), torch.arange(8) % 3
    scheme = Offline(student, teacher, method, Batch(images, labels))
    (phase,) = scheme.phases()
    (turn,) = scheme.turns(phase)
    scheme.set_modes(phase)
    buffers = [torch.zeros_like(parameter) for parameter in before]
    loop.student.train()
    loop.teacher.eval()
    for _ in range(2):
        losses = scheme.losses(phase, turn, Batch(images, labels), None)
        student.zero_grad()
        sum(losses.terms.values()).backward()
        meters = Meters()
        loop.step(images, labels, meters)
        assert meters.loss == pytest.approx(sum(losses.terms.values()).item(), rel=1e-6)
        for own, other in zip(loop.student.parameters(), student.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad)
        with torch.no_grad():
            for parameter, buffer in zip(student.parameters(), buffers, strict=True):
                buffer.mul_(0.8).add_(parameter.grad + 0.01 * parameter)
                parameter.sub_(0.2 * buffer)
        for own, other in zip(loop.student.state_dict().values(), student.state_dict().values(), strict=True):
            torch.testing.assert_close(own, other)
    assert max((a - b).abs().max() for a, b in zip(before, loop.student.parameters(), strict=True)) > 0.01


def test_another_method_can_be_trained():
    loop = make_loop(method=CrossEntropy())
    images, labels, meters = torch.randn(8, 3, 6, 5), torch.arange(8) % 3, Meters()
    expected = F.cross_entropy(copy.deepcopy(loop.student).train()(images).logits, labels).item()
    loop.student.train()
    loop.step(images, labels, meters)
    assert meters.loss == pytest.approx(expected, rel=1e-5)


def test_an_epoch_trains_the_student_alone_in_its_mode():
    loop = make_loop(make_images(test=70))
    teacher, student = (
        {name: t.clone() for name, t in net.state_dict().items()} for net in (loop.teacher, loop.student)
    )
    modes, steps = [], 0
    loop.student.register_forward_pre_hook(lambda net, images: modes.append((net.training, torch.is_grad_enabled())))
    for meters in loop.steps():
        steps += 1
        assert meters.images == min(8 * steps, 22)
        assert loop.student.training and not loop.teacher.training
    assert steps == 3 and modes == [(True, True)] * 3
    assert difference(dict(loop.teacher.state_dict()), teacher) is None
    assert all(parameter.grad is None for parameter in loop.teacher.parameters())
    assert difference(dict(loop.student.state_dict()), student) is not None
    student = {name: tensor.clone() for name, tensor in loop.student.state_dict().items()}
    loop.validate()
    assert modes[3:] == [(False, False)] * 2 and difference(dict(loop.student.state_dict()), student) is None
    next(loop.steps())
    assert modes[5:] == [(True, True)]  # the next epoch trains again


def test_meters_are_means_over_images():
    torch.manual_seed(5)
    parts = [(torch.rand(()), torch.randn(n, 9), torch.randint(9, (n,))) for n in (80, 80, 30)]
    meters = Meters()
    for part in parts:
        meters.update(*part)
    logits, labels = (torch.cat([part[i] for part in parts]).numpy() for i in (1, 2))
    above = (logits > logits[np.arange(190), labels][:, None]).sum(axis=1)
    assert meters.images == 190
    assert meters.loss == pytest.approx(np.average([part[0] for part in parts], weights=[80, 80, 30]))
    assert meters.top1 == pytest.approx(100 * np.mean(above == 0))
    assert meters.top5 == pytest.approx(100 * np.mean(above < 5))
    assert 0 < meters.top1 < meters.top5 < 100
    two = Meters()
    two.update(torch.tensor(1.0), torch.tensor([[0.0, 1.0]]), torch.tensor([0]))
    assert (two.top1, two.top5) == (0, 100)


def test_validation_is_the_cross_entropy_and_accuracy_of_the_test_images():
    loop = make_loop(make_images(test=100))
    list(loop.steps())
    meters = loop.validate()
    images = torch.cat([batch for batch, _ in loop.validation])
    labels = torch.cat([labels for _, labels in loop.validation])
    with torch.no_grad():
        logits = loop.student.eval()(images).logits
    assert meters.images == 100
    assert meters.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert meters.top1 == pytest.approx(100 * (logits.argmax(dim=1) == labels).double().mean().item())


def test_an_epoch_tells_its_time_and_validates_unless_told_not_to(monkeypatch):
    loop = make_loop()
    ticks = iter([10.0, 12.5, 20.0, 21.0])
    monkeypatch.setattr(naive.time, "perf_counter", lambda: next(ticks))
    whole, part = loop.epoch(), loop.epoch(validate=False)
    assert (whole.seconds, part.seconds) == (2.5, 1.0)
    assert (whole.training.images, whole.validation.images, part.training.images) == (22, 10, 22)
    assert part.validation is None


def test_it_learns_digits():
    torch.manual_seed(0)
    images = digits()
    student, teacher = (build_model("cnn_small", classes=10, channels=1, image_size=8) for _ in range(2))
    alone = NaiveLoop(teacher, student, images, batch=32, workers=0, device=CPU, method=CrossEntropy(), padding=1)
    for _ in range(4):
        alone.epoch(validate=False)
    assert alone.validate().top1 > 60
    loop = NaiveLoop(student, teacher, images, batch=32, workers=0, device=CPU, padding=1)
    first, *_, last = (loop.epoch() for _ in range(4))
    assert last.training.loss < 0.7 * first.training.loss
    assert last.validation.top1 > 60  # of ten classes
    assert last.validation.top5 > 95


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"batch": 0}, "batch must be a whole number of at least 1"),
        ({"workers": -1}, "workers must be a whole number of at least 0"),
        ({"padding": -1}, "padding must be a whole number of at least 0"),
        ({"learning_rate": 0.0}, "learning_rate must be"),
        ({"momentum": -0.1}, "momentum must be"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
    ],
)
def test_numbers_out_of_range_are_refused(changes, complaint):
    with pytest.raises(ValueError, match=f"^{complaint}"):
        make_loop(**changes)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("change", [{"memory_format": torch.channels_last}, {"dtype": torch.float64}], ids=str)
def test_networks_that_the_field_would_not_train_are_refused(which, change):
    networks = [TinyNet(), TinyNet()]
    networks[which].to(**change)
    with pytest.raises(ValueError, match=r"but (layer|stem)\.weight is"):
        NaiveLoop(*networks, make_images(), batch=8, workers=0, device=CPU)


def test_pil_images_are_made_from_the_array_itself():
    images = make_images(channels=1)
    data = PilImages(images.x_train, images.y_train, lambda picture: picture)
    picture, label = data[3]
    assert len(data) == 22 and (picture.mode, picture.size) == ("L", (5, 6)) and type(label) is int
    assert np.array_equal(np.asarray(picture), images.x_train[3, ..., 0])


def test_augmentation_is_timed_in_turn_over_as_many_images_and_threads_are_set_back(monkeypatch):
    done, threads = [], torch.get_num_threads()

    class Bank(ImageBank):
        def augmented(self, index, shift, flip):
            done.append(("bank", len(index), torch.get_num_threads()))
            return super().augmented(index, shift, flip)

    class Pil(PilImages):
        def __getitem__(self, index):
            done.append(("pil", 1, torch.get_num_threads()))
            return super().__getitem__(index)

    monkeypatch.setattr(naive, "ImageBank", Bank)
    monkeypatch.setattr(naive, "PilImages", Pil)
    ticks = iter((0, 6, 10, 12, 20, 30, 40, 41, 50, 54, 60, 62))  # PIL 6, 10, 4 seconds; ours 2, 1, 2
    monkeypatch.setattr(naive.time, "perf_counter", lambda: next(ticks))
    speed = augmentation_speed(make_images(), batch=8, limit=20, rounds=3, threads=2, padding=1)
    assert (speed.pil, speed.bank, speed.ratio) == (20 / 6, 20 / 2, 3)
    turn = [("pil", 1, 2)] * 20 + [("bank", 8, 2), ("bank", 8, 2), ("bank", 4, 2)]
    assert done == 3 * turn
    assert torch.get_num_threads() == threads


def test_wrong_timings_are_refused():
    for name in ("batch", "limit", "rounds", "threads"):
        with pytest.raises(ValueError, match=f"^{name} must be a whole number of at least 1"):
            augmentation_speed(make_images(), **{name: 0})
