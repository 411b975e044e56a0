"""A look at how much memory steps need leaves no trace; parts are few and even; reasons against fusing are told."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_cohort import in_turn, scheme_with, teacher, training_of
from test_methods import batch_of, make_scheme, network
from torch import Tensor, nn

from kdstudy import ways
from kdstudy.core import Phase
from kdstudy.response import CrossEntropy, VanillaKD
from kdstudy.schemes import Batch, Offline, Turn
from kdstudy.study import METHODS, SCHEMES, build_method, scheme_of
from kdstudy.train import Training
from kdstudy.ways import memory_holds, why_not_in_one


def started(members: Sequence[Training]) -> Sequence[Training]:
    for member in members:
        member.start()
        member.begin_epoch()
    return members


def first_batch(member: Training) -> Batch:
    return member.batch(member.rows)._replace(seen={})


def bits(module: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in module.state_dict().items()}


# memory


@given(count=st.integers(1, 12), needed=st.integers(1, 1000), free=st.integers(0, 10_000))
def test_parts_are_as_few_as_find_room_and_as_even_as_can_be(count, needed, free):
    group = MEMBERS * count  # whom they hold does not matter here
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ways, "bytes_kept", lambda losses: (None, {1: needed // 2, 2: needed - needed // 2}))
        patch.setattr(ways, "free_bytes", lambda device: free)
        parts = memory_holds(group, BATCH)
    sizes = [len(part) for part in parts]
    assert sum(sizes) == count and max(sizes) - min(sizes) <= 1

    def fits(size: int) -> bool:
        return size == 1 or size * needed <= 0.8 * free  # one run at a time has to find room

    assert fits(max(sizes))
    fewer = len(sizes) - 1
    assert fewer == 0 or not fits(-(-count // fewer))


def test_parts_are_stretches_of_the_group_in_its_order(monkeypatch):
    group = started(in_turn([VanillaKD(temperature=float(number)) for number in range(1, 6)]))
    monkeypatch.setattr(ways, "bytes_kept", lambda losses: (None, {1: 100}))
    monkeypatch.setattr(ways, "free_bytes", lambda device: 250)
    parts = memory_holds(group, first_batch(group[0]))
    assert [len(part) for part in parts] == [1, 2, 2]
    assert [member for part in parts for member in part] == list(group)


def test_room_is_for_what_the_losses_of_a_run_keep(monkeypatch):
    group = started(in_turn([VanillaKD()] * 4))
    batch, kept = first_batch(group[0]), {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = len(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        (turn,) = group[0].current.turns
        losses = group[0].losses(turn, batch)
    needed = sum(kept.values())
    del losses
    for runs in (1, 2, 4):
        monkeypatch.setattr(ways, "free_bytes", lambda device, runs=runs: int(runs * needed / 0.8) + 2)
        assert [len(part) for part in memory_holds(group, batch)] == [runs] * (4 // runs)
        monkeypatch.setattr(ways, "free_bytes", lambda device, runs=runs: int(runs * needed / 0.8) - 2)
        assert max(map(len, memory_holds(group, batch))) < max(2, runs)


# methods whose runs can share a batch with others: one student, on the training images
SHARING = [
    key
    for key, method in METHODS.items()
    if SCHEMES[scheme_of(method)].family in ("none", "offline", "self") and build_method(key).phases()
]
MEMBERS = started([training_of(scheme_with(CrossEntropy(), teacher()))])
BATCH = first_batch(MEMBERS[0])


@pytest.mark.parametrize("key", SHARING)
def test_asking_for_memory_leaves_no_trace(key):
    (member,) = started([training_of(make_scheme(key))])
    batch = first_batch(member)
    modes = {name: module.training for name, module in member.scheme.named_modules()}
    before, random = bits(member.scheme), torch.get_rng_state()
    memory_holds([member, member], batch)
    assert bits(member.scheme) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in member.scheme.parameters())
    assert modes == {name: module.training for name, module in member.scheme.named_modules()}
    assert member.current.sums.values is None and batch.seen == {}


# what stands against one network


class Twice(Offline):
    """Takes other optimiser steps than one."""

    turn: dict[str, Any]

    def turns(self, phase: Phase) -> tuple[Turn, ...]:
        (usual,) = super().turns(phase)
        return (usual,) * self.turn["count"] if "count" in self.turn else (replace(usual, **self.turn),)


@pytest.mark.parametrize("turn", [{"times": 2}, {"fresh": True}, {"count": 2}])
def test_several_optimiser_steps_are_not_taken_in_one(turn):
    taught_by, members = teacher(), []
    for _ in range(2):
        scheme = Twice(network("wrn_10_0.25", torch.float64), taught_by, VanillaKD(), batch_of(16))
        scheme.turn = turn
        members.append(training_of(scheme))
    reason = why_not_in_one(started(members))
    assert reason == "'distil' takes several optimiser steps a batch"


def pair(first: Any, second: Any, names=("wrn_10_0.25", "wrn_10_0.25")) -> Sequence[Training]:
    taught_by = teacher()
    schemes = [scheme_with(method, taught_by, seed, names[seed]) for seed, method in enumerate((first, second))]
    return started([training_of(scheme) for scheme in schemes])


def test_a_phase_that_leaves_the_student_alone_is_none_in_which_it_learns():
    members = pair(VanillaKD(), build_method("factor_transfer"))
    name = members[1].current.phase.name
    assert "student" not in members[1].current.phase.trains
    assert why_not_in_one(members).startswith(f"{name!r} is no phase in which one student learns as a whole")


def test_networks_that_differ_are_told_and_equal_ones_are_not():
    reason = why_not_in_one(pair(VanillaKD(), VanillaKD(), ("wrn_10_0.25", "wrn_10_0.5")))
    assert reason.startswith("they differ, ")
    assert why_not_in_one(pair(VanillaKD(), CrossEntropy())) == ""


def test_one_run_is_none_to_fuse():
    assert why_not_in_one(MEMBERS) == "there is one run"
