"""Born-again networks: reference values, what the teacher's sureness and its shuffled answers leave."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from batches import TOLERANCE, batch_a, deterministic, loss_of, oracles, random_logits, total_of
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kdstudy.core import View
from kdstudy.generations import BornAgain, shuffled_rest

NO_ADAPTERS = nn.ModuleDict()
VARIANTS = ("full", "cwtm", "dkpp")
precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@precisions
def test_the_full_variant_is_the_oracles_cross_entropy_less_the_targets_entropy(dtype):
    student, teacher, labels = batch_a(dtype)
    loss = BornAgain().loss(student, teacher, labels, NO_ADAPTERS)
    p_t = teacher.logits.softmax(dim=1)
    entropy = -(p_t * p_t.log()).sum(dim=1).mean().item()
    assert loss.dtype == dtype and loss.shape == ()
    assert loss.item() + entropy == pytest.approx(oracles()["ban_softce"], abs=TOLERANCE[dtype])
    assert loss.item() == pytest.approx(oracles()["kd_T1"], abs=TOLERANCE[dtype])


@precisions
def test_weighted_by_the_teachers_sureness_the_loss_is_the_oracle(dtype):
    student, teacher, labels = batch_a(dtype)
    loss = BornAgain(variant="cwtm").loss(student, teacher, labels, NO_ADAPTERS)
    assert loss.item() == pytest.approx(oracles()["ban_cwtm_loss"], abs=TOLERANCE[dtype])
    each = F.cross_entropy(student.logits, labels, reduction="none").tolist()
    weighed = sum(w * ce for w, ce in zip(oracles()["ban_cwtm_w"], each, strict=True))
    assert loss.item() == pytest.approx(weighed, abs=TOLERANCE[dtype])


def test_no_labels_are_read_unless_they_are_asked_for():
    student, teacher, labels = batch_a()
    assert list(BornAgain().objective(student, teacher, labels, NO_ADAPTERS)) == ["kd"]
    with_labels = total_of(BornAgain(ce_weight=1.0), student, teacher, labels).item()
    assert with_labels == pytest.approx(oracles()["kd_T1"] + oracles()["ce"], abs=1e-6)
    others = labels + 3
    for variant in ("full", "dkpp"):
        method = BornAgain(variant=variant)
        torch.manual_seed(0)
        loss = method.loss(student, teacher, labels, NO_ADAPTERS)
        torch.manual_seed(0)
        assert loss == method.loss(student, teacher, others, NO_ADAPTERS)


def test_of_the_teachers_answer_only_its_sureness_counts_in_cwtm():
    student, teacher, labels = random_logits(16, 6, 3.0)
    moved = teacher.roll(1, dims=1)
    method = BornAgain(variant="cwtm")
    assert loss_of(method, student, teacher, labels) == loss_of(method, student, moved, labels)
    equal = F.cross_entropy(student, labels)
    torch.testing.assert_close(loss_of(method, student, torch.zeros_like(teacher), labels), equal)


@deterministic
@given(st.integers(0, 99))
def test_shuffling_keeps_the_first_where_it_is_and_all_others_somewhere(seed):
    values, _, _ = random_logits(16, 7, seed=seed)
    torch.manual_seed(seed)
    shuffled = shuffled_rest(values)
    first = values.argmax(dim=1)
    assert torch.equal(shuffled.argmax(dim=1), first)
    assert torch.equal(shuffled.sort(dim=1).values, values.sort(dim=1).values)


def test_every_order_of_the_rest_is_as_likely_and_rows_are_shuffled_apart():
    row = torch.tensor([1.0, 9, 2, 3])
    torch.manual_seed(0)
    found = [tuple(x) for x in shuffled_rest(row.repeat(6000, 1))[:, [0, 2, 3]].tolist()]
    counts = {order: found.count(order) for order in itertools.permutations([1.0, 2.0, 3.0])}
    assert sum(counts.values()) == 6000
    assert all(abs(count - 1000) < 5 * math.sqrt(1000 * 5 / 6) for count in counts.values())


def test_the_seed_decides_the_shuffling_and_each_call_draws_anew():
    values, _, _ = random_logits(16, 7)
    torch.manual_seed(3)
    one, other = shuffled_rest(values), shuffled_rest(values)
    torch.manual_seed(3)
    assert torch.equal(shuffled_rest(values), one) and not torch.equal(one, other)


def test_permuted_probabilities_are_a_target_for_the_kl():
    student, teacher, labels = random_logits(16, 6, 3.0)
    torch.manual_seed(1)
    loss = loss_of(BornAgain(variant="dkpp"), student, teacher, labels)
    torch.manual_seed(1)
    target = shuffled_rest(teacher.softmax(dim=1))
    expected = F.kl_div(student.log_softmax(dim=1), target, reduction="batchmean")
    torch.testing.assert_close(loss, expected)
    assert abs(loss - loss_of(BornAgain(), student, teacher, labels)) > 0.01


def test_where_the_rest_is_equal_permuting_changes_nothing():
    _, _, labels = random_logits(16, 6)
    student, _, _ = random_logits(16, 6, 3.0)
    teacher = 3 * F.one_hot(labels, 6).double()
    full, permuted = (loss_of(BornAgain(variant=v), student, teacher, labels) for v in ("full", "dkpp"))
    torch.testing.assert_close(full, permuted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_finite_for_logits_hundreds_apart(variant):
    student, teacher, labels = random_logits(24, 10, 600.0, dtype=torch.float32)
    loss = loss_of(BornAgain(variant=variant), student.requires_grad_(), teacher, labels)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_value_decides_what_is_run(variant):
    student, teacher = torch.empty(2, 8, 10, device="meta")
    labels = torch.empty(8, dtype=torch.long, device="meta")
    assert BornAgain(variant=variant).loss(View(student), View(teacher), labels, NO_ADAPTERS).shape == ()


def test_wrong_values_are_named():
    with pytest.raises(ValueError, match="variant must be one of full, cwtm, dkpp, not 'half'"):
        BornAgain(variant="half")
    with pytest.raises(ValueError, match=r"kd_weight must be .* not -0.5"):
        BornAgain(kd_weight=-0.5)
    with pytest.raises(ValueError, match="both 0"):
        BornAgain(kd_weight=0.0)
