"""What holds for every method of the table, so that a new one is tested by being listed."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from kdstudy import train
from kdstudy.core import View
from kdstudy.data import ImageBank
from kdstudy.models import build_model
from kdstudy.recipe import Recipe
from kdstudy.schemes import Alone, Batch, Offline, Scheme
from kdstudy.study import METHODS, build_method
from kdstudy.train import Training

OUTCOMES = Path(__file__).parent / "outcomes.json"
# the loss of these is zero for a student that equals its teacher; the others edit the target
ZERO_FOR_EQUALS = {"kd", "spherical", "two_temperature"}
offline = pytest.mark.parametrize("key", [key for key, method in METHODS.items() if method.needs_teacher])


def scheme_of(key: str, dtype: torch.dtype = torch.float64) -> Scheme:
    """A student of 4 channels and a wider teacher with batch statistics of its own, 8 x 8 grey images, 4 classes."""
    torch.manual_seed(0)
    student = build_model("wrn_10_0.25", classes=4, channels=1, image_size=8).to(dtype)
    teacher = build_model("wrn_10_0.5", classes=4, channels=1, image_size=8).to(dtype)
    method = build_method(key)
    if not method.needs_teacher:
        return Alone(student, method)
    teacher(torch.randn(64, 1, 8, 8, dtype=dtype))  # in train mode: moves its batch statistics off their start
    scheme = Offline(student, teacher, method, torch.randn(2, 1, 8, 8, dtype=dtype))
    scheme.prepare([torch.randn(32, 1, 8, 8, dtype=dtype)])
    return scheme


def batch_of(size: int = 24, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 1, 8, 8, generator=generator, dtype=dtype)
    return Batch(images, torch.arange(size) % 4)


def total(scheme: Scheme, batch: Batch, half: torch.dtype | None = None) -> torch.Tensor:
    phase = scheme.phases()[-1]
    scheme.set_modes(phase)
    (turn,) = scheme.turns(phase)
    return sum(scheme.losses(phase, turn, batch, half).terms.values())


def teacher_of(scheme: Offline) -> nn.Module:
    (teacher,) = scheme._teacher
    return teacher


@offline
def test_the_teacher_is_never_touched(key):
    scheme = scheme_of(key)
    before = {name: tensor.clone() for name, tensor in teacher_of(scheme).state_dict().items()}
    total(scheme, batch_of()).backward()
    after = teacher_of(scheme).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in teacher_of(scheme).parameters())


@pytest.mark.parametrize("key", METHODS)
def test_gradient_reaches_everything_that_is_trained(key):
    scheme = scheme_of(key)
    total(scheme, batch_of()).backward()
    for name, parameter in scheme.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("key", METHODS)
def test_batch_order_is_irrelevant(key):
    scheme, batch = scheme_of(key), batch_of()
    order = torch.randperm(len(batch.labels), generator=torch.Generator().manual_seed(2))
    shuffled = Batch(batch.images[order], batch.labels[order])
    assert total(scheme, batch).item() == pytest.approx(total(scheme, shuffled).item(), rel=1e-12)


@pytest.mark.parametrize("key", METHODS)
def test_finite_in_half_precision(key):
    scheme, batch = scheme_of(key, torch.float32), batch_of(dtype=torch.float32)
    loss = total(scheme, batch, torch.bfloat16)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in scheme.parameters())


@offline
@pytest.mark.parametrize("gap", [30.0, 600.0])
def test_finite_for_a_teacher_beyond_doubt(key, gap):
    method = build_method(key)
    logits = (torch.randn(8, 10) * 0.1).requires_grad_()
    teacher = torch.zeros(8, 10)
    teacher[torch.arange(8), torch.arange(8)] = gap
    labels = torch.tensor([0, 1, 2, 3, 0, 0, 0, 0])  # right on half of them
    method.loss(View(logits), View(teacher), labels, nn.ModuleDict()).backward()
    assert logits.grad.isfinite().all()


@offline
def test_zero_for_equal_networks_where_the_formula_says_so(key):
    logits = torch.randn(16, 10, dtype=torch.float64)
    loss = build_method(key).loss(View(logits), View(logits), torch.arange(16) % 10, nn.ModuleDict())
    if key in ZERO_FOR_EQUALS:
        assert abs(loss.item()) < 1e-12
    else:
        assert loss.item() > 1e-3


@offline
def test_only_declared_taps_reach_the_loss(key, monkeypatch):
    scheme, seen = scheme_of(key), []
    inner = type(scheme.method).loss

    def spy(self, student, teacher, labels, adapters):
        seen.extend([student, teacher])
        return inner(self, student, teacher, labels, adapters)

    monkeypatch.setattr(type(scheme.method), "loss", spy)
    total(scheme, batch_of())
    for view in seen:
        kept = {tap for tap in View._fields if getattr(view, tap) not in (None, ())}
        assert kept == set(scheme.method.reads)


def outcome(key: str) -> dict[str, float]:
    """The end of a tiny run in float64: three epochs of a structured toy set with an odd last batch."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(50) % 4
    images = torch.randint(0, 100, (50, 8, 8, 1), generator=generator)
    images[torch.arange(50), labels * 2] += 120
    bank = ImageBank(
        images.to(torch.uint8).numpy(),
        labels.numpy(),
        mean=[80.0],
        std=[60.0],
        padding=1,
        device=torch.device("cpu"),
        dtype=torch.float64,
    )
    recipe = Recipe(epochs=3, batch=16, learning_rate=0.05, milestones=(2,), crop_padding=1, precision="fp64")
    history = Training(scheme_of(key), recipe, bank, seed=4, watch={"train": bank}).run()
    return {name: history[-1][name] for name in ("ce", "kd", "train_accuracy") if name in history[-1]}


def test_an_outcome_that_moves_raises_the_revision():
    """Fails if training gives other numbers than those on file while `train.REVISION` is the one on file.

    If the change is meant, raise REVISION, which makes every finished run a thing of the past, and write the file anew
    with `python -m tests.test_methods`.
    """
    filed = json.loads(OUTCOMES.read_text())
    assert filed["revision"] == train.REVISION, "write tests/outcomes.json anew: see this test's docstring"
    assert set(filed["outcomes"]) == set(METHODS)
    for key, expected in filed["outcomes"].items():
        assert outcome(key) == pytest.approx(expected, rel=1e-7), key


if __name__ == "__main__":
    outcomes = {key: outcome(key) for key in METHODS}
    OUTCOMES.write_text(json.dumps({"revision": train.REVISION, "outcomes": outcomes}, indent=1) + "\n")
