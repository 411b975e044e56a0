"""A light network that is trained inside a larger one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import nn

from kdstudy.core import Method, Phase, View
from kdstudy.schemes import Batch, Cast, Losses, Taught, look


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """`share`: whether the booster has the light net's convolutions in the places that both nets have."""

    share: bool = True


class Launch(Taught):
    """A light net, and a booster that is trained from nothing beside it and teaches it (Zhou et al. 2018).

    The booster learns from the labels alone; where it teaches it is detached. Every convolution of the light net that
    has its like at the same place of the booster (in the stem, or by the same path in block i of stage s) is that of
    the booster, too, and gets the gradient of both. Its first weights are those of a student trained alone. All else,
    batch norms and classifiers among it, is each net's own.
    """

    family = "online"
    paper = "Zhou, Fan, Cui, Bian, Zhu, Gai 2018, AAAI, arXiv:1708.04106"
    options = LaunchOptions
    role = "light net"

    def __init__(
        self,
        light: nn.Module,
        booster: nn.Module,
        method: Method,
        sample: Batch,
        options: LaunchOptions = LaunchOptions(),
    ):
        """`sample` are 2 or more images by whose views the method sizes its adapters.

        Raises ValueError for a method whose teacher must be finished, and for nets that cannot share a convolution.
        """
        super().__init__(light, method)
        if not method.needs_teacher or method.prepares() or "network" in method.reads:
            raise ValueError(f"{type(method).__name__} needs a teacher that is finished, or none: a booster is neither")
        self.booster = booster.eval()
        if options.share:
            share_convolutions(light, booster)
        self._size_adapters(sample)

    @classmethod
    def assemble(cls, cast: Cast, method: Method, sample: Batch, options: LaunchOptions) -> Self:
        """A new student as light net, and its partner as booster."""
        if len(cast.partners) != 1:
            raise ValueError(f"a light net has one partner, the booster: name one under partners, not {cast.partners}")
        return cls(cast.student(), cast.build(cast.partners[0]), method, sample, options)

    def phases(self) -> tuple[Phase, ...]:
        """The method's phases, with the booster trained in all of them."""
        return tuple(replace(phase, trains=(*phase.trains, "booster")) for phase in super().phases())

    def teach(self, batch: Batch, half: torch.dtype | None, student: View) -> View:
        """The booster's view."""
        return look(self.booster, batch, self.method.reads, half).detach()

    def losses(self, phase, turn, batch, half):
        """The method's terms against the booster of the moment, and the booster's cross-entropy."""
        booster = look(self.booster, batch, self.method.reads, half)
        with torch.set_grad_enabled(any(name.split(".")[0] == "student" for name in phase.trains)):
            student = look(self.student, batch, self.method.reads, half)
        terms = dict(phase.objective(student, booster.detach(), batch.labels, self.adapters))
        terms["booster"] = F.cross_entropy(booster.logits, batch.labels)
        return Losses(terms, {"correct": self._correct(student, batch.labels)})

    @property
    def shared(self) -> float:
        """The share of the light net's trained numbers that are the booster's, too."""
        theirs = {id(parameter) for parameter in self.booster.parameters()}
        own = list(self.student.parameters())
        return sum(p.numel() for p in own if id(p) in theirs) / sum(p.numel() for p in own)

    def further(self) -> Mapping[str, nn.Module]:
        """The booster, and what the method names."""
        return {"booster": self.booster, **super().further()}


def share_convolutions(light: nn.Module, booster: nn.Module) -> list[str]:
    """Put the light net's convolutions into the booster wherever it has their like at the same place; returns where.

    Raises ValueError if the first one, on which all others stand, cannot be shared.
    """
    ours, theirs = (
        {name: module for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}
        for net in (light, booster)
    )
    # the representation names channels, kernel, stride, padding, groups and bias
    shared = [name for name, own in ours.items() if repr(own) == repr(theirs.get(name))]
    if list(ours)[:1] != shared[:1]:
        raise ValueError(
            "light net and booster differ in their first convolution and so can share none: choose two of a family "
            "that are equally wide, or set share to false"
        )
    for name in shared:
        booster.set_submodule(name, ours[name])
    return shared
