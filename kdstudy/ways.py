"""The ways to take a step of runs that share a batch: one after the other, fused into one network, or on streams."""

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from kdstudy.breakdown import part
from kdstudy.fusion import Fused, why_not_fused
from kdstudy.memory import bytes_kept, free_bytes
from kdstudy.schemes import Batch, forward
from kdstudy.train import HALF, Training

T = TypeVar("T")
Group = Sequence[Training]
OwnRandom = Callable[[Training], AbstractContextManager]

SHARE_OF_MEMORY = 0.8  # of what is free, for what steps keep for their backward passes


class Way(Protocol):
    """Takes a step of every run of a group."""

    def step(self, batch: Batch) -> None:
        """Losses, gradients, updates and sums of all runs on the batch that they share."""


class Calls:
    """How networks are called: as they are, or compiled. One that cannot be compiled is called as it is."""

    def __init__(self, compiles: bool):
        self._compiles = compiles
        self._compiled: dict[nn.Module, Callable] = {}

    def forward(self, network: nn.Module, images: Tensor, half: torch.dtype | None) -> Any:
        """What the network answers, under autocast to `half` if it is given."""
        if self._compiles and network not in self._compiled:
            self._compiled[network] = torch.compile(network)
        call = self._compiled.get(network, network)
        try:
            return forward(call, images, half)
        except Exception as error:  # compilers and their backends raise anything
            if call is network:
                raise
            warnings.warn(f"a network is not compiled: {str(error).partition(chr(10))[0]}", stacklevel=2)
            self._compiled[network] = network
            return forward(network, images, half)


class InTurn:
    """One run after the other; each is to the bit what it is alone, unless students are compiled."""

    def __init__(self, group: Group, own_random: OwnRandom, *, compiles: bool = False):
        self._group, self._own_random = group, own_random
        self._calls = Calls(compiles=True) if compiles else None

    def step(self, batch: Batch) -> None:
        """Take one."""
        for member in self._group:
            with self._own_random(member):
                if self._calls:
                    view = self._calls.forward(_student(member), batch.images, HALF[member.recipe.precision])
                    batch.seen[_student(member)] = view
                member.step(batch)


class FusedInOne:
    """All students as one network, forward and back, as many at a time as memory holds; losses and updates are each
    run's own. Losses are summed: no student's gradient has a part of another's, and one that is not finite is alone.
    """

    def __init__(self, group: Group, own_random: OwnRandom):
        self._group, self._own_random = group, own_random
        self._calls = Calls(compiles=False)
        self._parts: list[tuple[Group, Fused]] = []
        self._reached: dict[Training, set[Tensor]] = {}  # the parameters on which a run's loss depends

    def step(self, batch: Batch) -> None:
        """Take one."""
        if not self._parts:
            parts = memory_holds(self._group, batch)
            self._parts += [(members, Fused([_student(member) for member in members])) for members in parts]
        for members, fused in self._parts:
            self._step_of(members, fused, batch)

    def compiled(self) -> Self:
        """The same fused networks, compiled: to fuse anew would take the students' memory away from these."""
        twin = copy.copy(self)
        twin._calls = Calls(compiles=True)
        return twin

    def _step_of(self, members: Group, fused: Fused, batch: Batch) -> None:
        views = self._calls.forward(fused, batch.images, HALF[members[0].recipe.precision])
        batch.seen.update(zip(map(_student, members), views, strict=True))
        parameters, total = list(fused.parameters()), 0
        for member in members:
            (turn,) = member.current.turns
            with self._own_random(member):
                losses = member.losses(turn, batch)
            member.forget_gradients(turn)
            parameters += _beside(member)
            total = total + losses.total
            if member not in self._reached:
                self._reached[member] = _leaves(losses.total)
            member.note(losses.noted(len(batch.labels)))
        with part("backward"):
            total.backward(inputs=parameters)
        self._hand_back(members, fused)
        for member in members:
            member.update(member.current.turns[0])

    def _hand_back(self, members: Group, fused: Fused) -> None:
        fused.hand_back()
        for whole, parameters in fused.parts():
            for member, parameter in zip(members, parameters, strict=True):
                if whole not in self._reached[member]:
                    parameter.grad = None  # as it would be alone: zero is not nothing, weights would decay


class OnStreams:
    """Every run on a CUDA stream of its own, as many at a time as memory holds."""

    def __init__(self, group: Group):
        self._group = group
        self._streams = [torch.cuda.Stream(group[0].device) for _ in group]
        self._waves: list[Group] = []

    def step(self, batch: Batch) -> None:
        """Take one."""
        self._waves = self._waves or memory_holds(self._group, batch)
        main = torch.cuda.current_stream(self._group[0].device)
        for wave in self._waves:
            used = self._streams[: len(wave)]
            for member, stream in zip(wave, used, strict=True):
                stream.wait_stream(main)
                with torch.cuda.stream(stream):
                    member.step(batch)
            for stream in used:  # before anything that the streams read is given back
                main.wait_stream(stream)


def why_not_in_one(group: Group) -> str:
    """Why the students of these runs cannot be fused in the phases in which they are, "" if they can."""
    return "there is one run" if len(group) == 1 else why_not_apart(group) or why_not_fused(list(map(_student, group)))


def why_not_apart(group: Group) -> str:
    """Why the students' forward passes cannot be taken out of the runs' steps, "" if they can."""
    for member in group:
        current = member.current
        if member.scheme.whole_student(current.phase) is None:
            return f"{current.phase.name!r} is no phase in which one student learns as a whole from one look at a batch"
        if len(current.turns) > 1 or current.turns[0].times > 1 or current.turns[0].fresh:
            return f"{current.phase.name!r} takes several optimiser steps a batch"
    return next((reason for member in group if (reason := why_not_fused([_student(member)]))), "")


def memory_holds(group: Group, batch: Batch) -> list[Group]:
    """The group in parts, as few and as even as can be, whose steps find room side by side."""
    member = group[0]
    turn = member.current.turns[0]
    before = [(buffer, buffer.clone()) for buffer in member.scheme.buffers()]  # losses may move them on
    with torch.random.fork_rng([member.device] if member.device.type == "cuda" else []):
        _, kept = bytes_kept(lambda: member.losses(turn, batch))
    for buffer, value in before:
        buffer.copy_(value)
    room = int(SHARE_OF_MEMORY * free_bytes(member.device) // max(1, sum(kept.values())))
    return even_parts(group, max(1, room))


def even_parts(items: Sequence[T], most: int) -> list[Sequence[T]]:
    """The items in order in as few parts as can be of at most `most`, as even as can be."""
    count = -(-len(items) // most)
    bounds = [len(items) * part // count for part in range(count + 1)]
    return [items[start:stop] for start, stop in pairwise(bounds)]


def _leaves(loss: Tensor) -> set[Tensor]:
    """The parameters to which a loss passes gradient."""
    found, nodes, seen = set(), [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
        if hasattr(node, "variable"):
            found.add(node.variable)
    return found


def _student(member: Training) -> nn.Module:
    return member.scheme.whole_student(member.current.phase)


def _beside(member: Training) -> list[nn.Parameter]:
    """What a run trains beside its student."""
    own = set(_student(member).parameters())
    (trained,) = member.current.trained.values()
    return [parameter for parameter in trained if parameter not in own]
