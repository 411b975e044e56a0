"""Quantised distillation: vanilla KD's numbers, the teacher's weights at first, runs that stop and go on exactly."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from batches import LABELS_A, STUDENT_A, TEACHER_A, TOLERANCE, batch_a, oracles, total_of
from sklearn.datasets import load_digits
from torch import nn
from toy import clone, difference, make_bank, make_recipe, make_scheme, make_training, pictures, run_session, tiny_net

from kdstudy.data import ImageBank
from kdstudy.evaluate import logits_of
from kdstudy.models import Ensemble, build_model
from kdstudy.quantisation import QuantisedNet, fake_quantisers, to_int8
from kdstudy.quantised import QuantisedKD
from kdstudy.recipe import Recipe
from kdstudy.schemes import Batch, Offline
from kdstudy.train import Training

CE_A = 1.2107697927264733  # cross-entropy of batch A


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_terms_are_those_of_vanilla_kd(dtype):
    method = QuantisedKD()
    assert (method.ce_weight, method.kd_weight, method.temperature) == (0.5, 0.5, 4.0)
    terms = method.objective(*batch_a(dtype), nn.ModuleDict())
    assert terms["kd"].item() == pytest.approx(oracles()["kd_T4"] / 2, abs=TOLERANCE[dtype])
    assert terms["ce"].item() == pytest.approx(CE_A / 2, abs=TOLERANCE[dtype])
    other = QuantisedKD(ce_weight=0.1, kd_weight=0.9, temperature=2.0)
    kd = 0
    for student, teacher in zip(STUDENT_A, TEACHER_A, strict=True):
        p, q = (np.exp(np.array(z) / 2) / np.exp(np.array(z) / 2).sum() for z in (teacher, student))
        kd += 4 * (p * np.log(p / q)).sum() / len(LABELS_A)
    expected = 0.9 * kd + 0.1 * CE_A
    assert total_of(other, *batch_a(dtype)).item() == pytest.approx(expected, abs=TOLERANCE[dtype])


def test_the_phase_is_a_quarter_as_long_at_a_tenth_of_the_rate():
    (phase,) = QuantisedKD().phases()
    recipe = Recipe(epochs=200, batch=8, learning_rate=0.1, milestones=(60, 120, 160)).for_phase(phase)
    assert (recipe.epochs, recipe.milestones, recipe.learning_rate) == (50, (15, 30, 40), pytest.approx(0.01))
    assert phase.trains == ("student", "adapters")


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_hyperparameters_out_of_range_are_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be a finite number above 0"):
        QuantisedKD(temperature=temperature)


def network(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    module = build_model(name, classes=3, image_size=8)
    module(torch.randn(64, 3, 8, 8))
    return module.eval()


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("wrn_10_0.5", lambda: network("wrn_10_0.5")),
        ("wrn_10_0.5_int8", lambda: network("wrn_10_1")),
        ("wrn_10_0.5_int8", lambda: network("cnn_small")),
        ("wrn_10_0.5_int8", lambda: network("wrn_10_0.5_int8")),
        ("wrn_10_0.5_int8", lambda: Ensemble([network("wrn_10_0.5")])),
    ],
)
def test_another_network_than_the_quantised_teacher_is_refused(student, teacher):
    message = "the student must be the teacher's own network, quantised: wrn_16_1_int8 for wrn_16_1"
    with pytest.raises(ValueError, match=message):
        QuantisedKD().initialise(network(student), teacher(), [torch.randn(4, 3, 8, 8)], nn.ModuleDict())


def test_a_pruned_network_is_not_taken_for_the_plain_one():
    with pytest.raises(ValueError, match="the student must be the teacher's own network"):
        networks = network("resnet8_int8"), network("resnet8_pruned0.5")
        QuantisedKD().initialise(*networks, [torch.randn(4, 3, 8, 8)], nn.ModuleDict())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_student_begins_as_its_teacher_rounded(bits, dtype):
    teacher, student = network("wrn_10_0.5", 1).to(dtype), network(f"wrn_10_0.5_int{bits}", 2).to(dtype)
    teacher.requires_grad_(False)
    before = clone(teacher.state_dict())
    batches = torch.randn(60, 3, 8, 8, dtype=dtype).split(20)
    QuantisedKD().initialise(student, teacher, batches, nn.ModuleDict())
    expected = QuantisedNet(copy.deepcopy(teacher), bits)
    mine = dict(student.named_parameters())
    assert set(mine) == {name for name, _ in expected.named_parameters()}
    for name, parameter in expected.named_parameters():
        assert torch.equal(mine[name], parameter) and mine[name].requires_grad, name
    statistics = [name for name in student.state_dict() if "running_" in name]
    assert statistics and all(
        torch.equal(student.state_dict()[name], expected.state_dict()[name]) for name in statistics
    )
    assert all(module.activation_post_process.max_val.isfinite().all() for module in fake_quantisers(student))
    assert {parameter.dtype for parameter in student.parameters()} == {dtype}
    assert difference(clone(teacher.state_dict()), before) is None
    if bits == 8:
        ours, theirs = student.eval()(batches[0]).logits, teacher(batches[0]).logits
        assert (ours - theirs).norm() < 0.2 * (theirs - theirs.mean(dim=0)).norm()


PRECISIONS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.float32}


def scheme_of(precision: str, seed: int = 0, method: QuantisedKD | None = None) -> Offline:
    """Tiny networks; as torch's grids are not of float64's precision, neither is anything compared but with itself."""
    dtype = PRECISIONS[precision]
    teacher = tiny_net(7, dtype=torch.float32)
    nn.init.uniform_(teacher.norm.running_var, 0.5, 1.5)
    student = QuantisedNet(tiny_net(seed, dtype=torch.float32)).to(dtype=dtype, memory_format=torch.channels_last)
    return make_scheme(method or QuantisedKD(), dtype=dtype, student=student, teacher=teacher.to(dtype))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_stopped_and_resumed_equals_uninterrupted(precision, tmp_path):
    recipe = make_recipe(precision=precision, epochs=8, milestones=(4,))
    whole = run_session(scheme_of(precision), recipe)
    assert whole.steps == 6 and [row["learning_rate"] for row in whole.history] == pytest.approx([0.02, 0.004])
    for stop in range(1, whole.steps):
        checkpoint = tmp_path / f"{stop}.pt"
        first = run_session(scheme_of(precision), recipe, checkpoint, stop_after=stop)
        assert first.stopped
        second = run_session(scheme_of(precision, seed=50 + stop), recipe, checkpoint)
        outcome = second.outcome | {"momentum": first.momentum | second.momentum}
        assert difference(outcome, whole.outcome) is None


def test_same_seed_same_result_and_another_seed_another():
    outcome = partial(run_session, recipe=make_recipe(epochs=8))
    one, same, other = (outcome(scheme_of("fp64"), seed=seed).state for seed in (1, 1, 2))
    assert difference(one, same) is None
    assert difference(one, other)


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_evaluation_in_between_leaves_no_trace(precision):
    dtype, states = PRECISIONS[precision], []
    for watched in (True, False):
        scheme = scheme_of(precision)
        training = make_training(scheme, make_recipe(precision=precision, epochs=12))
        if not watched:
            training.watch = {}
        training.run()
        states.append(clone(scheme.state_dict()))
    assert difference(*states) is None
    assert {tensor.dtype for name, tensor in states[0].items() if name.endswith(".weight")} == {dtype}


def test_weights_and_grids_move_and_the_teacher_does_not():
    scheme = scheme_of("fp32")
    (teacher,) = scheme._teacher
    before = clone(teacher.state_dict())
    scheme.prepare(lambda: make_bank(*pictures(), dtype=torch.float32).plain(8))
    start = clone(scheme.student.state_dict())
    run_session(scheme, make_recipe(precision="fp32", epochs=8))
    assert difference(clone(teacher.state_dict()), before) is None
    assert not teacher.training and not any(parameter.grad is not None for parameter in teacher.parameters())
    moved = {name for name, tensor in scheme.student.state_dict().items() if not torch.equal(tensor, start[name])}
    assert {name for name, _ in scheme.student.named_parameters()} <= moved
    assert sum(name.endswith("scale") for name in moved) == len(fake_quantisers(scheme.student))


def test_on_digits_training_repairs_what_rounding_broke():
    digits = load_digits()

    def bank(part: slice) -> ImageBank:
        images = (digits.images[part] * 15).astype(np.uint8)[..., None]
        return ImageBank(
            *(images, digits.target[part].astype(np.int64)),
            **{"mean": [75.0], "std": [90.0], "padding": 1, "device": torch.device("cpu"), "dtype": torch.float32},
        )

    def accuracy(module: nn.Module) -> float:
        return 100 * (logits_of(module, test).argmax(dim=1) == test.labels).double().mean().item()

    train, test = bank(slice(1200)), bank(slice(1200, None))
    torch.manual_seed(0)
    teacher, student = (build_model(name, classes=10, channels=1, image_size=8) for name in ("resnet8", "resnet8_int2"))
    optimiser = torch.optim.SGD(teacher.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        for index in torch.randperm(1200).split(60):
            batch = train.augmented(index, torch.ones(60, 2, dtype=torch.int64), torch.zeros(60, dtype=torch.bool))
            optimiser.zero_grad()
            F.cross_entropy(teacher(batch).logits, train.labels[index]).backward()
            optimiser.step()
    scheme = Offline(student, teacher, QuantisedKD(), Batch(next(train.plain(4)), train.labels[:4]))
    scheme.prepare(partial(train.plain, 60))
    broken = accuracy(to_int8(student))
    recipe = Recipe(epochs=12, batch=60, learning_rate=0.1, crop_padding=1, flip=False, precision="fp32")
    history = Training(scheme, recipe, train, seed=0, watch={}).run()
    assert len(history) == 3
    assert accuracy(teacher) > 90 and accuracy(to_int8(student)) > max(broken + 20, 85)
