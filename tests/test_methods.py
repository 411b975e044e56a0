"""What holds for every method of the table, so that a new one is tested by being listed."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdstudy import train
from kdstudy.core import Phase, View
from kdstudy.data import ImageBank
from kdstudy.models import build_model
from kdstudy.recipe import Recipe
from kdstudy.schemes import Batch, Cast, Offline, Scheme, Turn, look
from kdstudy.study import METHODS, SCHEMES, build_method, scheme_of
from kdstudy.train import Training

OUTCOMES = Path(__file__).parent / "outcomes.json"
STUDENT, TEACHER = "wrn_10_0.25", "wrn_10_0.5"  # of 4 and 8 channels in the first stage
# methods that are not defined for that pair, and what teaches them here; a number is that of the teachers
OTHER_TEACHERS: dict[str, str | int] = {
    "ensemble": 3,
    "aekd": 3,
    "lit": "wrn_16_0.25",
    "heads": "wrn_10_0.5",
    "tofd": "wrn_10_0.5+sepheads",
    "relative_heads": "wrn_10_0.5+heads",
    "few_sample": "wrn_10_0.5",
    "fsp": "resnet14x0.25",
    "quantised": "wrn_10_0.25",
    "soft_tree": "tree_4",
}
OTHER_STUDENTS: dict[str, str] = {
    "heads": "wrn_10_0.5+heads",  # the teacher itself, with heads
    "fitnets": "cnn_small",  # a wide ResNet's guided stage ends in a batch norm that the hint phase cannot train
    "few_sample": "wrn_10_0.5_pruned0.5",  # the teacher itself, with half as many channels inside its blocks
    "afd": "cnn_small",  # the discriminators read the last map, behind which a wide ResNet has a batch norm
    "quantised": "wrn_10_0.25_int8",  # the teacher itself, on grids
    "soft_tree": "tree_3",
    "fsp": "resnet8x0.25",  # as wide as its teacher; a wide ResNet's last batch norm lies behind the last map
}
# the loss of these is zero for a student that equals its teacher, and nothing they train stands in between
ZERO_FOR_EQUALS = {
    "few_sample",
    "kd",
    "soft_tree",
    "quantised",
    "born_again",
    "teacher_free_self",
    "logit_mimic",
    "dkd",
    "logit_standardisation",
    "mlkd",
    "heads",
    "spherical",
    "two_temperature",
    "attention",
    "neuron_selectivity",
    "relational",
    "instance_graph",
    "similarity",
    "probabilistic",
    "correlation",
    "fsp",
}
# their loss draws random numbers or depends on which images stand beside each other, as their papers have it
ORDER_MATTERS = {"crd", "semckd", "multi_head_graph", "data_impressions"}
# networks that are trained beside the student
PARTNERS: dict[str, tuple[str, ...]] = {"rocket": ("wrn_16_0.25",)}
OPTIONS: dict[str, dict[str, Any]] = {
    "okddip": {"count": 3, "leader": True},
    "zero_shot": {"batch": 16, "student_steps": 2},
    "data_impressions": {"count": 30, "batch": 24, "iterations": 3},
}
HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "snapshot": {"cycles": 3},  # no more than a short run has epochs
}
taught = [key for key, method in METHODS.items() if method.needs_teacher]
on_logits = [key for key in taught if METHODS[key].reads == ("logits",) and build_method(key).phases()]
offline = pytest.mark.parametrize(
    "key", [key for key in METHODS if issubclass(SCHEMES[scheme_of(METHODS[key])], Offline)]
)


def network(name: str, dtype: torch.dtype) -> nn.Module:
    return build_model(name, classes=4, channels=1, image_size=8).to(dtype)


def trained_network(name: str, dtype: torch.dtype) -> nn.Module:
    """A network whose batch statistics have moved off their start."""
    module = network(name, dtype)
    module(torch.randn(64, 1, 8, 8, dtype=dtype))
    return module


def teachers_for(key: str, dtype: torch.dtype) -> list[nn.Module]:
    wanted = OTHER_TEACHERS.get(key, TEACHER)
    if isinstance(wanted, int):
        return [trained_network(TEACHER, dtype) for _ in range(wanted)]
    return [trained_network(wanted, dtype)]


def batch_of(size: int = 24, dtype: torch.dtype = torch.float64, of: int = 60) -> Batch:
    """The first images of a data set of so many."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(of, 1, 8, 8, generator=generator, dtype=dtype)
    strong = images + torch.randn(of, 1, 8, 8, generator=generator, dtype=dtype) / 2
    return Batch(images[:size], torch.arange(size) % 4, torch.arange(size), strong[:size], torch.arange(of) % 4)


def make_scheme(key: str, dtype: torch.dtype = torch.float64) -> Scheme:
    """A small student and a wider teacher, on 8 x 8 grey images of 4 classes; ready for the first step."""
    torch.manual_seed(0)
    cls, name = SCHEMES[scheme_of(METHODS[key])], OTHER_STUDENTS.get(key, STUDENT)
    first = [network(name, dtype)]  # before its teacher
    teachers = teachers_for(key, dtype) if cls.needs_teacher else []

    def build(wanted: str) -> nn.Module:
        return first.pop() if first else network(wanted, dtype)

    cast = Cast(build, name, PARTNERS.get(key, ()), teachers)
    method = build_method(key, **HYPERPARAMETERS.get(key, {}))
    scheme = cls.assemble(cast, method, batch_of(24, dtype), cls.options(**OPTIONS.get(key, {})))
    scheme.prepare(lambda: [batch_of(32, dtype).images])
    scheme.begin_epoch(0, 1, None)
    scheme.begin_step(0)
    return scheme


def value(scheme: Scheme, phase: Phase, turn: Turn, batch: Batch, half: torch.dtype | None = None) -> torch.Tensor:
    scheme.set_modes(phase)
    torch.manual_seed(5)
    return sum(scheme.losses(phase, turn, batch, half).terms.values())


def steps(scheme: Scheme) -> Iterator[tuple[Phase, Turn]]:
    return ((phase, turn) for phase in scheme.phases() for turn in scheme.turns(phase))


def teacher_of(scheme: Scheme) -> nn.Module:
    (teacher,) = scheme._teacher
    return teacher


@offline
def test_the_teacher_is_never_touched(key):
    scheme = make_scheme(key)
    teacher = teacher_of(scheme)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    for phase, turn in steps(scheme):
        value(scheme, phase, turn, batch_of()).backward()
        assert not any(module.training for module in teacher.modules())
    after = teacher.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("key", METHODS)
def test_gradient_reaches_everything_that_a_phase_trains(key):
    scheme = make_scheme(key)
    names = {id(parameter): name for name, parameter in scheme.named_parameters()}
    trained = set()
    for phase, turn in steps(scheme):
        scheme.zero_grad(set_to_none=True)
        value(scheme, phase, turn, batch_of()).backward()
        for parameter in scheme.trained_parameters(turn.trains):
            assert parameter.grad is not None and parameter.grad.any(), f"{turn.name}: {names[id(parameter)]}"
            trained.add(names[id(parameter)])
    deployed = {id(parameter) for parameter in scheme.deployed.parameters() if parameter.requires_grad}
    wanted = {name for number, name in names.items() if number in deployed}
    if scheme.phases():
        assert wanted <= trained | {name for name in wanted if METHODS[key].deploys and "classifier" in name}


@pytest.mark.parametrize("key", sorted(set(METHODS) - ORDER_MATTERS))
def test_batch_order_is_irrelevant(key):
    batch = batch_of()
    order = torch.randperm(len(batch.labels), generator=torch.Generator().manual_seed(2))
    shuffled = Batch(*(part[order] for part in batch[:4]), batch.census)
    for number, (_, turn) in enumerate(steps(make_scheme(key))):
        values = []
        for each in (batch, shuffled):
            scheme = make_scheme(key)
            values.append(value(scheme, *list(steps(scheme))[number], each).item())
        assert values[0] == pytest.approx(values[1], rel=1e-10), turn.name


@pytest.mark.parametrize("key", METHODS)
def test_finite_in_half_precision(key):
    scheme, batch = make_scheme(key, torch.float32), batch_of(dtype=torch.float32)
    for phase, turn in steps(scheme):
        loss = value(scheme, phase, turn, batch, torch.bfloat16)
        assert loss.dtype == torch.float32 and loss.isfinite()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in scheme.parameters() if p.grad is not None)


@pytest.mark.parametrize("key", METHODS)
def test_each_turn_lowers_its_loss_on_a_batch_that_stays_the_same(key):
    scheme, batch = make_scheme(key), batch_of()
    for phase, turn in steps(scheme):
        parameters = scheme.trained_parameters(turn.trains)
        is_adam = (phase.recipe | turn.recipe).get("optimiser") == "adam"
        optimiser = torch.optim.Adam(parameters, 0.01) if is_adam else torch.optim.SGD(parameters, 0.01, momentum=0.9)
        first = None
        for _ in range(25):
            loss = value(scheme, phase, turn, batch)
            first = loss.item() if first is None else first
            optimiser.zero_grad()
            loss.backward(inputs=parameters)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
        assert value(scheme, phase, turn, batch).item() < first - 1e-3 * abs(first), turn.name


@pytest.mark.parametrize("key", on_logits)
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
    scheme = make_scheme(key)
    if any(p.requires_grad for p in scheme.adapters.parameters()) or scheme_of(METHODS[key]) != "offline":
        assert key not in ZERO_FOR_EQUALS
        return
    teacher, batch, method = teacher_of(scheme), batch_of(), scheme.method
    if key in on_logits:
        views = [View(torch.randn(24, 10, dtype=torch.float64))] * 2
    else:
        with torch.no_grad():
            views = [look(each, batch, method.reads, None) for each in (copy.deepcopy(teacher), teacher)]
    adapters = method.adapters(*views)
    method.calibrate(adapters, [views[1]])
    loss = method.loss(*views, batch.labels, adapters)
    if key in ZERO_FOR_EQUALS:
        assert abs(loss.item()) < 1e-10
    else:
        assert loss.item() > 1e-6


@pytest.mark.parametrize("key", METHODS)
def test_taps_exist(key):
    assert set(METHODS[key].reads) <= set(View._fields)


@pytest.mark.parametrize("key", [key for key, method in METHODS.items() if method.least_batch > 1])
def test_a_batch_that_is_too_small_is_refused_before_training(key):
    scheme = make_scheme(key)
    images = METHODS[key].least_batch * 2 - 1
    recipe = Recipe(epochs=1, batch=METHODS[key].least_batch, learning_rate=0.1, crop_padding=1, precision="fp64")
    bank = toy_bank(images)
    with pytest.raises(ValueError, match=f"at least {METHODS[key].least_batch} in a batch"):
        Training(scheme, recipe, bank, seed=0, watch={})


def toy_bank(count: int) -> ImageBank:
    """So many grey images of 4 classes that a network can tell apart."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(count) % 4
    images = torch.randint(0, 100, (count, 8, 8, 1), generator=generator)
    images[torch.arange(count), labels * 2] += 120
    return ImageBank(
        images.to(torch.uint8).numpy(),
        labels.numpy(),
        mean=[80.0],
        std=[60.0],
        padding=1,
        device=torch.device("cpu"),
        dtype=torch.float64,
    )


def outcome(key: str) -> dict[str, float]:
    """The end of a tiny run in float64: three epochs of a structured toy set with an odd last batch."""
    torch.set_num_threads(1)
    bank = toy_bank(50)
    recipe = Recipe(epochs=3, batch=16, learning_rate=0.05, milestones=(2,), crop_padding=1, precision="fp64")
    history = Training(make_scheme(key), recipe, bank, seed=4, watch={"train": bank}).run()
    names = ("phase", "epoch", "learning_rate")
    return {name: value for name, value in history[-1].items() if name not in names} if history else {}


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
