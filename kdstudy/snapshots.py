"""A network that is taught by what it was at the end of its last cycle."""

import copy
from typing import Self

import torch
from torch import nn

from kdstudy.core import Method, View
from kdstudy.data import ImageBank
from kdstudy.recipe import cycle_starts
from kdstudy.schemes import Batch, Cast, NoOptions, Taught, look


class Snapshots(Taught):
    """One network, trained in cycles; a frozen copy from the end of each teaches in the next (Yang et al. 2019)."""

    family = "self"
    paper = "Yang, Xie, Su, Yuille 2019, CVPR, arXiv:1812.00123"

    def __init__(self, student: nn.Module, method: Method, sample: Batch):
        """`sample` are 2 or more images by whose view the method sizes its adapters.

        Raises ValueError for a method that has no cycles.
        """
        super().__init__(student, method)
        if not hasattr(method, "cycles"):
            raise ValueError(f"{type(method).__name__} has no cycles: snapshots are taken at their ends")
        self.snapshot = copy.deepcopy(student).requires_grad_(False)
        self._size_adapters(sample)

    @classmethod
    def assemble(cls, cast: Cast, method: Method, sample: Batch, options: NoOptions) -> Self:
        """A new student."""
        return cls(cast.student(), method, sample)

    def begin_epoch(self, epoch: int, epochs: int, held_out: ImageBank | None) -> None:
        """Take a snapshot where a cycle has ended."""
        if epoch in cycle_starts(epochs, self.method.cycles):
            self.snapshot.load_state_dict(self.student.state_dict())

    def teach(self, batch: Batch, half: torch.dtype | None, student: View) -> View:
        """The last snapshot's view; in the first cycle that of the network's first weights."""
        with torch.no_grad():
            return look(self.snapshot.eval(), batch, self.method.reads, half)
