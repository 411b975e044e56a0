"""The roofline against layers counted by hand, torch's own FLOP counter, and the figures of a paper calculation."""

import subprocess
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from toy import CPU, TinyNet, difference

from kdstudy import roofline
from kdstudy.models import build_model
from kdstudy.roofline import Kernel, Limits, Work, count_work, measure_limits, roofline_seconds

PAPER = Limits(bandwidth=3e12, rate=400e12, number_bytes=2)
# of a calculation apart from this code: million multiply-adds forward, MB an image moves forward and back in bf16, and
# seconds of 50,000 images at the limits above, trained and answered
FIGURES = {
    "wrn_16_1": (26.7, 4.08, 0.071, 0.013),
    "wrn_40_1": (83.3, 11.0, 0.195, 0.035),
    "wrn_16_2": (101.1, 8.01, 0.164, 0.034),
    "wrn_40_2": (327.6, 21.8, 0.471, 0.099),
    "resnet18": (555.5, 18.4, 0.613, 0.153),
    "resnet34": (1159.4, 30.7, 1.188, 0.311),
}


def counted() -> str:
    threads = torch.get_num_threads()
    return "1 thread" if threads == 1 else f"{threads} threads"


def work_of(name: str) -> Work:
    return count_work(build_model(name, classes=100), (3, 32, 32))


@pytest.mark.parametrize("name", FIGURES)
def test_work_is_that_of_the_calculation_on_paper(name):
    multiply_adds, megabytes, training, answering = FIGURES[name]
    work = work_of(name)
    assert sum(kernel.flops for kernel in work.answering) / 2e6 == pytest.approx(multiply_adds, abs=0.05)
    assert 2 * sum(kernel.numbers for kernel in work.training) / 1e6 == pytest.approx(megabytes, rel=0.005)
    assert 50_000 * work.training_seconds(PAPER) == pytest.approx(training, rel=0.008)
    assert 50_000 * work.answer_seconds(PAPER) == pytest.approx(answering, abs=0.0006)


@pytest.mark.parametrize(
    ("name", "grouped"),
    [("wrn_16_1", False), ("resnet8", False), ("swish_student", False), ("resnext50_4", True), ("mobilenet_v2", True)],
)
def test_flops_are_those_that_torch_counts_forward_and_back(name, grouped):
    network = build_model(name, classes=10)
    images = torch.zeros(2, 3, 32, 32)
    with FlopCounterMode(display=False) as forward:
        logits = network(images).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    work = count_work(network, (3, 32, 32))
    assert 2 * sum(kernel.flops for kernel in work.answering) == forward.get_total_flops()
    both = forward.get_total_flops() + backward.get_total_flops()
    # torch forgets groups on the way back, where each product is made twice, but for the first one's input
    if grouped:
        both = 3 * forward.get_total_flops() - 2 * work.answering[0].flops
    assert 2 * sum(kernel.flops for kernel in work.training) == both


class Ends(nn.Module):
    """Two convolutions, the first of the images, with a batch norm, an activation, a sum and a pooling."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1, stride=2)
        self.norm, self.classifier = nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, images):
        opened = F.relu(self.norm(self.first(images)))
        halved = self.second(opened)
        summed = halved + F.relu(halved) + 1.0
        return self.classifier(F.adaptive_avg_pool2d(summed, 1).flatten(1))


def test_kernels_of_a_small_network_are_those_counted_by_hand():
    work = count_work(Ends(), (3, 8, 6))
    full, half = 8 * 6, 4 * 3
    first = Kernel(2 * 4 * full * 27, 3 * full + 4 * full)
    second = Kernel(2 * 4 * half * 4, 4 * full + 4 * half)
    last = Kernel(2 * 5 * 4, 4 + 5)
    added, pooled = 4 * half, 4 * half + 4
    assert work.answering == (first, second, Kernel(0, added), Kernel(0, pooled), last)
    # the gradient of the images is not asked for; the constant that is added is no map
    norm = Kernel(0, 8 * 4 * full)
    passes = (Kernel(0, 2 * added), Kernel(0, 2 * pooled))
    assert work.training == (first, first, norm, second, second, second, *passes, last, last, last)


def test_frozen_parts_have_no_backward():
    network = Ends().requires_grad_(False)
    network.classifier.requires_grad_(True)
    thawed = count_work(Ends(), (3, 8, 6))
    work = count_work(network, (3, 8, 6))
    assert work.answering == thawed.answering
    first, second, added, pooled, last = work.answering
    assert work.training == (first, Kernel(0, 3 * 4 * 48), second, added, pooled, last, last)
    with torch.no_grad():
        assert count_work(Ends(), (3, 8, 6)) == thawed


def test_an_image_of_one_pixel_can_be_counted():
    # a batch norm that trains refuses it
    assert len(count_work(Ends(), (3, 1, 1)).answering) == 4  # the pooling has nothing to do


def test_counting_leaves_the_network_and_the_random_numbers_alone():
    network = TinyNet(dropout=0.5).train()
    network.norm.eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    random = torch.get_rng_state()
    count_work(network, (3, 6, 5))
    assert difference(dict(network.state_dict()), before) is None
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_kernel_lasts_as_long_as_the_slower_of_its_two_limits():
    limits = Limits(bandwidth=100.0, rate=10.0, number_bytes=4)
    assert Kernel(30, 25).seconds(limits) == 3.0
    assert Kernel(30, 100).seconds(limits) == 4.0
    work = Work((Kernel(30, 25),), (Kernel(30, 25), Kernel(30, 100)))
    assert work.answer_seconds(limits) == 3.0
    assert work.training_seconds(limits) == 7.0  # not the 6 and 5 of all kernels as one


def test_a_batch_is_answered_once_for_all_its_students():
    limits = Limits(bandwidth=100.0, rate=10.0, number_bytes=4)
    student, teacher = Work((Kernel(10, 0),), (Kernel(40, 0),)), Work((Kernel(70, 0),), (Kernel(500, 0),))
    assert roofline_seconds([student], [teacher], limits) == 4 + 7
    assert roofline_seconds([student] * 9, [teacher], limits) == 9 * 4 + 7
    assert roofline_seconds([student] * 9, [], limits) == 9 * 4


@pytest.mark.parametrize("field", ["bandwidth", "rate", "number_bytes"])
def test_limits_of_nothing_are_refused(field):
    with pytest.raises(ValueError, match=f"^{field} must be"):
        Limits(**{"bandwidth": 1.0, "rate": 1.0, "number_bytes": 2} | {field: 0})


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp64"])
def test_measured_limits_are_those_of_a_clock_that_is_read_here(precision, monkeypatch):
    """Each copy and each product is given a made-up time, so that the rates are known."""
    now, seen = [0.0], []

    def copied(target, source):
        seen.append((target.numel(), target.dtype, source.dtype))
        now[0] += 0.9 if len(seen) < 4 else 0.5  # the first of two rounds is the slower one

    def multiplied(one, other):
        seen.append((*one.shape, *other.shape, one.dtype, bool(one.any())))
        now[0] += 0.001 if len(one) < 512 else 0.25

    monkeypatch.setattr(roofline, "CALLS", {"cpu": 2})
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    monkeypatch.setattr(torch.Tensor, "__matmul__", multiplied)
    limits = measure_limits(CPU, precision, megabytes=0.003, rounds=2)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[precision]
    assert limits.bandwidth == pytest.approx(2 * 3000 / 0.5)
    assert limits.rate == pytest.approx(2 * 256**3 / 0.001)
    assert limits.number_bytes == dtype.itemsize
    assert seen[0] == (3000, torch.uint8, torch.uint8)
    assert seen[-1] == (512, 512, 512, 512, dtype, True)  # the longer one was the last, and not the best


@pytest.mark.parametrize(
    ("rate", "product_seconds", "last"),
    [(None, 0.01, 64), (1e6, 0.01, 32), (1e6, 0.1, 64)],  # of None: as long whatever the size
)
def test_products_grow_until_they_last_and_the_rate_rises_no_more(rate, product_seconds, last, monkeypatch):
    now, sides = [0.0], set()

    def multiplied(one, other):
        sides.add(len(one))
        now[0] += 2 * len(one) ** 3 / rate if rate else 1.0

    monkeypatch.setattr(roofline, "SMALLEST_SIDE", 16)
    monkeypatch.setattr(roofline, "LARGEST_SIDE", {"cpu": 64})
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.Tensor, "__matmul__", multiplied)
    monkeypatch.setattr(roofline, "_bandwidth", lambda *arguments: 1.0)
    measured = measure_limits(CPU, "fp32", product_seconds=product_seconds, rounds=1).rate
    assert measured == pytest.approx(rate or 2 * 64**3)
    assert sides == {side for side in (16, 32, 64) if side <= last}


def test_a_real_measurement_of_this_machine_is_of_a_plausible_size():
    limits = measure_limits(CPU, "fp32", megabytes=8, product_seconds=1e-4, rounds=3)
    assert 1e8 < limits.bandwidth < 1e13
    assert 1e7 < limits.rate < 1e14
    assert limits.number_bytes == 4 and limits.device.endswith(f"{counted()}")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"precision": "fp16"}, "precision must be one of bf16, fp32, fp64, not 'fp16'"),
        ({"rounds": 0}, "rounds must be a whole number of at least 1"),
        ({"megabytes": 0}, "megabytes must be a finite number above 0"),
        ({"product_seconds": 0.0}, "product_seconds must be a finite number above 0"),
    ],
)
def test_wrong_measurements_are_refused(changes, complaint):
    with pytest.raises(ValueError, match=f"^{complaint}"):
        measure_limits(CPU, **changes)


def test_device_and_clock_of_a_cpu_are_read_from_the_system(tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(roofline, "CPU_INFO", info)
    assert roofline._clock(CPU) == "unknown"
    assert roofline._name(CPU) == f"unknown, {counted()}"
    info.write_text("model name\t: A Chip\ncpu MHz\t\t: 1000.4\n\nmodel name\t: A Chip\ncpu MHz\t\t: 3000.0\n" * 2)
    assert roofline._clock(CPU) == "2000 MHz"
    assert roofline._name(CPU) == f"A Chip, {counted()}"


def test_the_clock_of_a_gpu_is_asked_of_its_driver_and_unknown_without(monkeypatch):
    asked = []

    def answer(text):
        def run(command, **options):
            asked.append((command, options["timeout"], options["check"]))
            return SimpleNamespace(stdout=text)

        return run

    def fail(error):
        def run(command, **options):
            raise error

        return run

    monkeypatch.setattr(subprocess, "run", answer("1980, 2619\n"))
    assert roofline._gpu_clock("12ab") == "1980 MHz, memory 2619 MHz"
    ((command, timeout, check),) = asked
    assert command[:2] == ["nvidia-smi", "--id=GPU-12ab"] and timeout and check
    monkeypatch.setattr(subprocess, "run", answer("[N/A], [N/A]\n"))
    assert roofline._gpu_clock("12ab") == "unknown"
    for error in (FileNotFoundError(), subprocess.CalledProcessError(9, "x"), subprocess.TimeoutExpired("x", 10)):
        monkeypatch.setattr(subprocess, "run", fail(error))
        assert roofline._gpu_clock("12ab") == "unknown"
