"""The thesis's edits against reference values, against loops in exact arithmetic, and their stated properties."""

import json
from fractions import Fraction
from functools import partial

import pytest
import torch
from batches import EDITED, TOLERANCE, batch_a, deterministic, loss_of, oracles, random_logits, row, total_of
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kdstudy.edits import (
    earth_mover,
    lower,
    move_mass,
    raise_label,
    relative_v1,
    relative_v2,
    relative_v3,
    relative_v4,
)
from kdstudy.relative import EarthMover, RelativeV1, RelativeV2, RelativeV3, RelativeV4
from kdstudy.response import TwoTemperature

NO_ADAPTERS = nn.ModuleDict()
B8 = oracles("oracles_b8")
METHODS = {
    "v1": RelativeV1,
    "v1_signed": partial(RelativeV1, signed=True),
    "v2": RelativeV2,
    "v3": RelativeV3,
    "v4": RelativeV4,
    "v4_literal": partial(RelativeV4, literal=True),
    "em_conserve": EarthMover,
    "em_printed": partial(EarthMover, conserve=False),
    "two_temp_2_10": TwoTemperature,
}
TARGETS = {
    "V1": RelativeV1(),
    "V1s": RelativeV1(signed=True),
    "V2": RelativeV2(),
    "V3": RelativeV3(),
    "V4": RelativeV4(),
    "V4lit": RelativeV4(literal=True),
}
EDITS = {
    "v1": partial(relative_v1),
    "v1_signed": partial(relative_v1, signed=True),
    "v2": partial(relative_v2),
    "v2_abs": partial(relative_v2, order="abs"),
    "v3": partial(relative_v3),
    "v3_abs": partial(relative_v3, order="abs"),
    "v3_min": partial(relative_v3, fill="min"),
    "v4": partial(relative_v4),
    "v4_literal": partial(relative_v4, literal=True),
}
every_method = pytest.mark.parametrize("method", EDITED, ids=repr)
every_edit = pytest.mark.parametrize("edit", EDITS)
precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
sizes = pytest.mark.parametrize("classes", [2, 3, 5, 10, 100])
SCALES = (0.1, 1.0, 3.0, 20.0)


def method_of(key):
    name, _, temperature = key.partition("_T")
    return METHODS[name](**{"temperature": float(temperature)} if temperature else {})


@precisions
@pytest.mark.parametrize("key", B8["losses"])
def test_losses_are_the_oracles(key, dtype):
    method, expected = method_of(key), B8["losses"][key]
    student, teacher, labels = batch_a(dtype)
    loss, total = method.loss(student, teacher, labels, NO_ADAPTERS), total_of(method, student, teacher, labels)
    assert loss.dtype == dtype and loss.shape == ()
    assert loss.item() == pytest.approx(expected["mean"], abs=TOLERANCE[dtype])
    assert total.item() == pytest.approx(expected["total_alpha0.3"], abs=TOLERANCE[dtype])
    for i, value in enumerate(expected["per_sample"]):
        loss = method.loss(row(student, i), row(teacher, i), labels[i : i + 1], NO_ADAPTERS)
        assert loss.item() == pytest.approx(value, abs=TOLERANCE[dtype])


@precisions
@pytest.mark.parametrize("key", TARGETS)
def test_edited_logits_are_the_oracles(key, dtype):
    logits = torch.tensor(B8["samples"], dtype=dtype)
    labels = torch.full((len(logits),), B8["y"])
    expected = torch.tensor([targets[key] for targets in B8["targets"].values()], dtype=dtype)
    target = TARGETS[key].target(logits, labels)
    torch.testing.assert_close(target, expected, atol=TOLERANCE[dtype], rtol=0)
    assert torch.equal(TARGETS[key].target(logits.flip(1), 4 - labels), target.flip(1))


def test_all_edited_logits_with_an_oracle_are_covered():
    read_as_impossible = {"V2p"}  # the printed branch of V2
    assert {key for targets in B8["targets"].values() for key in targets} == set(TARGETS) | read_as_impossible


@precisions
@pytest.mark.parametrize("key", B8["em"])
def test_earth_mover_targets_are_the_oracles(key, dtype):
    name, sample = key.rsplit("_", 1)
    target = method_of(name).target(torch.tensor([json.loads(sample)], dtype=dtype), torch.tensor([B8["y"]]))
    torch.testing.assert_close(target, torch.tensor([B8["em"][key]], dtype=dtype), atol=TOLERANCE[dtype], rtol=0)


def test_earth_mover_leaves_right_samples_softened():
    _, teacher, _ = batch_a()
    target = EarthMover(temperature=4.0).target(teacher.logits, teacher.logits.argmax(1))
    torch.testing.assert_close(target, torch.tensor(oracles()["teacher_softmax_T4"], dtype=torch.float64))


def lower_loop(z, t, signed=False, own=False):
    """The downward walk, entry by entry; returns the edited list and the indices that were subtracted."""
    edited, used = list(z), []
    ascending = sorted(range(len(z)), key=z.__getitem__)
    for k in ascending:
        if k == t and not own:
            continue
        saved = edited[t]
        edited[t] -= z[k] if signed else abs(z[k])
        if edited[t] < z[ascending[-2]]:
            edited[t] = saved
            break
        used.append(k)
    return edited, used


def raise_loop(z, y, order="value"):
    """The upward walk, likewise."""
    edited, used = list(z), []
    for k in sorted(range(len(z)), key=lambda k: abs(z[k]) if order == "abs" else z[k]):
        edited[y] += abs(z[k])
        used.append(k)
        if edited[y] > max(z):
            break
    return edited, used


def move_loop(p, y, conserve):
    """The moves of probability, one donor at a time."""
    edited = list(p)
    for k in sorted(range(len(p)), key=p.__getitem__):
        if conserve and k == y:
            continue
        edited[y] += p[k]
        if conserve:
            edited[k] = 0
        if edited[y] >= max(edited if conserve else p):
            break
    return edited


def relative_loop(edit, z, y):
    """The target of one sample, by the methods' descriptions."""
    version, options, p = edit[:2], EDITS[edit].keywords, z.index(max(z))
    if version == "v4":
        return z if options.get("literal") and p != y else lower_loop(z, p)[0]
    if p == y:
        signed = options.get("signed", False)
        edited, used = lower_loop(z, y, signed, own=signed)
    elif version == "v1":
        return [0] * len(z)
    else:
        edited, used = raise_loop(z, y, options.get("order"))
    if version == "v3":
        fill = min(z) if options.get("fill") == "min" else 0
        edited = [fill if k in used and k not in (y, p) else value for k, value in enumerate(edited)]
    return edited


def exactly(logits):
    return [[Fraction(value) for value in values] for values in logits.tolist()]


def inexactly(rows):
    return torch.tensor([[float(value) for value in values] for values in rows], dtype=torch.float64)


@sizes
@every_edit
def test_edits_are_the_loops(edit, classes):
    for seed, scale in enumerate(SCALES):
        _, logits, labels = random_logits(100, classes, scale, seed)
        loops = [relative_loop(edit, z, y) for z, y in zip(exactly(logits), labels.tolist(), strict=True)]
        torch.testing.assert_close(EDITS[edit](logits, labels), inexactly(loops), atol=1e-9, rtol=0)


@sizes
@pytest.mark.parametrize("conserve", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_earth_mover_is_the_loop(temperature, conserve, classes):
    for seed, scale in enumerate(SCALES):
        _, logits, labels = random_logits(100, classes, scale, seed)
        rows = zip(exactly((logits / temperature).softmax(1)), labels.tolist(), strict=True)
        loops = [p if p[y] == max(p) else move_loop(p, y, conserve) for p, y in rows]
        target = earth_mover(logits, labels, temperature, conserve)
        torch.testing.assert_close(target, inexactly(loops), atol=1e-12, rtol=0)


@pytest.mark.parametrize("classes", [3, 5, 10, 100])
def test_in_lowering_the_own_entry_is_immaterial(classes):
    for seed, scale in enumerate(SCALES):
        _, logits, _ = random_logits(100, classes, scale, seed)
        top = logits.argmax(1)
        loops = [lower_loop(z, t, own=True)[0] for z, t in zip(exactly(logits), top.tolist(), strict=True)]
        torch.testing.assert_close(lower(logits, top)[0], inexactly(loops), atol=1e-9, rtol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_lowering_any_entry_is_the_loop(signed):
    for seed, scale in enumerate(SCALES):
        _, logits, labels = random_logits(100, 5, scale, seed)
        loops = [lower_loop(z, y, signed, own=signed) for z, y in zip(exactly(logits), labels.tolist(), strict=True)]
        edited, consumed = lower(logits, labels, signed)
        torch.testing.assert_close(edited, inexactly(z for z, _ in loops), atol=1e-9, rtol=0)
        assert [set(row.nonzero().flatten().tolist()) for row in consumed] == [set(used) for _, used in loops]


def eighths(largest):
    """2 to 12 multiples of 1/8, whose sums are exact, so that ties are; and a class."""
    numbers = st.integers(-8 * largest, 8 * largest).map(lambda n: n / 8)
    rows = st.lists(numbers, min_size=2, max_size=12)
    return rows.flatmap(lambda z: st.tuples(st.just(z), st.integers(0, len(z) - 1)))


def one(z, y):
    return torch.tensor([z], dtype=torch.float64), torch.tensor([y])


def indices(mask):
    return set(mask[0].nonzero().flatten().tolist())


@every_edit
@deterministic
@given(sample=eighths(2))
def test_edits_are_the_loops_under_ties(edit, sample):
    assert EDITS[edit](*one(*sample)).tolist() == [relative_loop(edit, *sample)]


@deterministic
@given(eighths(20))
def test_lowering_ends_between_the_run_up_and_the_top(sample):
    z, _ = sample
    t = z.index(max(z))
    (edited,), consumed = lower(*one(z, t))
    used = indices(consumed)
    assert sorted(z)[-2] <= edited[t] <= z[t]
    assert edited[t] == z[t] - sum(abs(z[k]) for k in used)
    assert t not in used and all(edited[k] == z[k] for k in range(len(z)) if k != t)


@deterministic
@given(eighths(20), st.sampled_from(["value", "abs"]))
def test_raising_ends_just_above_the_top(sample, order):
    z, y = sample
    (edited,), consumed = raise_label(*one(z, y), order)
    steps = [abs(z[k]) for k in indices(consumed)]
    others = [z[k] for k in range(len(z)) if k not in (y, z.index(max(z)))]
    assert edited[y] == z[y] + sum(steps)
    assert all(edited[k] == z[k] for k in range(len(z)) if k != y)
    if any(others) or z[y] > 0 or max(z) < 0:
        assert 0 < edited[y] - max(z) <= max(steps)
    else:
        assert edited[y] == max(z)


@deterministic
@given(eighths(20), st.sampled_from([1.0, 4.0]))
def test_moved_mass_is_a_distribution_with_the_label_on_top(sample, temperature):
    logits, label = one(*sample)
    p = (logits / temperature).softmax(1)
    (edited,), donors = move_mass(p, label)
    gave = indices(donors)
    kept = set(range(len(edited))) - gave - {label.item()}
    assert edited.sum().item() == pytest.approx(1, abs=1e-14)
    assert edited[label] == edited.max()
    assert label.item() not in gave and all(edited[k] == 0 for k in gave)
    assert all(edited[k] == p[0, k] for k in kept)
    assert all(p[0, k] >= p[0, d] for k in kept for d in gave)


@pytest.mark.parametrize("classes", [3, 5, 10, 100])
def test_what_the_edits_do_to_the_prediction(classes):
    for scale in SCALES:
        _, logits, labels = random_logits(500, classes, scale)
        predicted = logits.argmax(1)
        wrong = predicted != labels
        assert torch.equal(relative_v2(logits, labels).argmax(1), labels)
        assert torch.equal(relative_v4(logits, labels).argmax(1), predicted)
        assert torch.equal(relative_v4(logits, labels)[~wrong], relative_v1(logits, labels)[~wrong])
        assert torch.equal(relative_v4(logits, labels, literal=True)[wrong], logits[wrong])


def test_a_tie_with_the_run_up_is_left_a_tie():
    assert lower(*one([5.0, 1.0, 0.0, -1.0, -2.0], 0))[0].tolist() == [[1.0, 1.0, 0.0, -1.0, -2.0]]


@pytest.mark.parametrize(("conserve", "expected"), [(True, [0.5, 0.0, 0.5]), (False, [0.5, 0.25, 0.5])])
def test_mass_stops_moving_at_a_tie(conserve, expected):
    probabilities = torch.tensor([[0.25, 0.25, 0.5]])
    assert move_mass(probabilities, torch.tensor([0]), conserve)[0].tolist() == [expected]


def test_rounding_does_not_decide_a_climb_to_a_tie():
    """A negative label's own step and the highest logit's end exactly at the latter; only a third entry gets above."""
    generator = torch.Generator().manual_seed(0)
    label, highest = torch.rand(2, 1000, generator=generator, dtype=torch.float64)
    logits = torch.stack([-label, highest, torch.full_like(label, -9.0)], dim=1)
    edited, consumed = raise_label(logits, torch.zeros(1000, dtype=torch.long), "abs")
    assert consumed.all()
    torch.testing.assert_close(edited[:, 0], highest + 9)


@pytest.mark.parametrize("z", [[0.0] * 5, [3.0] * 5, [-3.0] * 5, [0.0, 0.0], [2.0, -1.0], [-1.0, -2.0]], ids=str)
@every_method
def test_edge_rows_give_finite_losses(method, z):
    for y in range(len(z)):
        logits, label = one(z, y)
        student = torch.zeros_like(logits).requires_grad_()
        loss = loss_of(method, student, logits, label)
        loss.backward()
        assert loss.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize(("classes", "rows"), [(10, 50_000), (100, 10_000)])
def test_single_precision_takes_the_same_steps(classes, rows):
    _, logits, labels = random_logits(rows, classes, 2.0, dtype=torch.float32)
    for edit in EDITS.values():
        single, double = edit(logits, labels), edit(logits.double(), labels)
        assert single.dtype == torch.float32
        assert (single - double).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_method
def test_half_precision_logits_are_edited_in_single(method, dtype):
    _, logits, labels = random_logits(64, 100, 3.0, dtype=dtype)
    target = method.target(logits, labels)
    assert target.dtype == torch.float32
    assert torch.equal(target, method.target(logits.float(), labels))


@every_method
def test_the_gradient_reaches_the_student_only(method):
    """For rows p of the target and temperature T it is T (sum(p) softmax(z_s / T) - p) / B."""
    student, teacher, labels = random_logits(16, 7, 3.0)
    student.requires_grad_()
    teacher.requires_grad_()
    loss_of(method, student, teacher, labels).backward()
    t, target = method.temperature, method.target(teacher, labels)
    assert teacher.grad is None and not target.requires_grad
    p = target if isinstance(method, EarthMover) else (target / t).softmax(1)
    expected = t * (p.sum(1, keepdim=True) * (student.detach() / t).softmax(1) - p) / 16
    torch.testing.assert_close(student.grad, expected)


@pytest.mark.parametrize("method", [method for method in EDITED if method != EarthMover(conserve=False)], ids=repr)
def test_a_divergence_from_a_distribution_is_never_negative(method):
    for seed in range(20):
        assert loss_of(method, *random_logits(1, 6, 3.0, seed)) >= 0


@pytest.mark.parametrize(
    ("edit", "options", "message"),
    [
        (relative_v2, {"order": "random"}, "order must be one of value, abs, not 'random'"),
        (relative_v3, {"order": "random"}, "order must be one of value, abs, not 'random'"),
        (relative_v3, {"fill": "mean"}, "fill must be one of zero, min, not 'mean'"),
    ],
)
def test_an_unknown_option_is_named(edit, options, message):
    _, logits, labels = random_logits(4, 5)
    with pytest.raises(ValueError, match=message):
        edit(logits, labels, **options)
