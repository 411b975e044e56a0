"""Networks that are trained at the same time, and discriminators that tell one's maps from another's."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from kdstudy.adversarial import discriminator_loss, generator_loss
from kdstudy.core import Method, Phase, View, require_whole
from kdstudy.models import Ensemble
from kdstudy.schemes import Batch, Cast, Losses, Scheme, Turn, count_correct, look, untracked


@dataclass(frozen=True, kw_only=True)
class RivalOptions:
    """`count` networks have the student's architecture and first weights of their own.

    Where a row names partners, these are what the student learns with instead.
    """

    count: int = 2

    def __post_init__(self) -> None:
        """Refuse fewer than two."""
        require_whole("count", self.count, least=2)


class Rivals(Scheme):
    """K networks in a cycle, each learning from the one before it, and K discriminators (Chung et al. 2020).

    A batch has three turns: the networks on the method's terms, with the recipe; with Adam, their stem and stages
    against the discriminators, which are frozen; with another Adam, the discriminators, all maps detached. Networks are
    run anew in each; in the last without a trace in their batch statistics. The first network is deployed.
    """

    family = "online"
    paper = "Chung, Park, Kim, Kwak 2020, ICML, arXiv:2002.01775"
    options = RivalOptions
    role = "first peer"

    def __init__(self, peers: Sequence[nn.Module], method: Method, sample: Batch):
        """`sample` are 2 or more images by whose views the method sizes its discriminators.

        Raises ValueError for a method without any, and for a single network.
        """
        super().__init__()
        if not hasattr(method, "rival_maps"):
            raise ValueError(f"{type(method).__name__} has no discriminators: train its networks under peers")
        if len(peers) < 2:
            raise ValueError("a network needs another one to learn from: rivals are two or more")
        self.method, self.least_batch = method, method.least_batch
        self.peers = nn.ModuleList(peers)
        self._size_adapters(sample)

    @classmethod
    def assemble(cls, cast: Cast, method: Method, sample: Batch, options: RivalOptions) -> Self:
        """New students, or one and its partners."""
        if cast.partners and options.count not in (2, 1 + len(cast.partners)):
            raise ValueError(f"count is {options.count}, but the student and its partners are {1 + len(cast.partners)}")
        names = cast.partners or (cast.network,) * (options.count - 1)
        return cls([cast.student(), *map(cast.build, names)], method, sample)

    def _size_adapters(self, sample: Batch) -> None:
        self.peers.eval()
        with torch.no_grad():
            views = self._views(sample, None)
        # Python's view -1 closes the cycle
        sized = {f"peer{k}": self.method.adapters(view, views[k - 1]) for k, view in enumerate(views)}
        self.adapters = nn.ModuleDict(sized).to(device=sample.images.device, dtype=sample.images.dtype)

    def _views(self, batch: Batch, half: torch.dtype | None) -> list[View]:
        return [look(peer, batch, self.method.reads, half) for peer in self.peers]

    def phases(self) -> tuple[Phase, ...]:
        """The method's phases, for every network and discriminator."""
        return tuple(replace(phase, trains=(*self._of_all("peers.{}"), "adapters")) for phase in self.method.phases())

    def _of_all(self, *patterns: str) -> tuple[str, ...]:
        return tuple(pattern.format(k) for pattern in patterns for k in range(len(self.peers)))

    def turns(self, phase: Phase) -> tuple[Turn, ...]:
        """The networks on answers, the networks on maps, the discriminators."""
        rate = self.method.adversarial_learning_rate
        adam = {"optimiser": "adam", "learning_rate": rate, "weight_decay": 0.0}
        generators = self._of_all("peers.{}.stem", "peers.{}.stages", "adapters.peer{}.transfer")
        return (
            Turn("logits", self._of_all("peers.{}")),
            Turn("generators", generators, recipe=adam),
            Turn("discriminators", self._of_all("adapters.peer{}.discriminator"), recipe=adam),
        )

    def losses(self, phase, turn, batch, half):
        """The terms of a turn, for every network or discriminator."""
        if turn.name == "logits":
            return self._method_losses(phase, batch, half)
        if turn.name == "generators":
            return Losses(self._generator_terms(batch, half), {})
        return Losses(self._discriminator_terms(batch, half), {})

    def _method_losses(self, phase: Phase, batch: Batch, half: torch.dtype | None) -> Losses:
        views = self._views(batch, half)
        terms = {}
        for k, view in enumerate(views):
            found = phase.objective(view, views[k - 1].detach(), batch.labels, self.adapters[f"peer{k}"])
            terms |= {f"peer{k}_{name}": term for name, term in found.items()}
        return Losses(terms, {"correct": count_correct(views[0].logits.detach(), batch.labels)})

    def _generator_terms(self, batch: Batch, half: torch.dtype | None) -> dict[str, Tensor]:
        views = self._views(batch, half)
        terms = {}
        for k in range(len(views)):
            own, _ = self._rival_maps(k, views)
            judge = self.adapters[f"peer{k}"]["discriminator"]
            with frozen(judge):
                terms[f"peer{k}_generator"] = generator_loss(judge(own))
        return terms

    def _discriminator_terms(self, batch: Batch, half: torch.dtype | None) -> dict[str, Tensor]:
        transfers = [adapters["transfer"] for adapters in self.adapters.values()]
        with torch.no_grad(), untracked(self.peers, *transfers):
            views = self._views(batch, half)
            judged = [self._rival_maps(k, views) for k in range(len(views))]
        return {
            f"peer{k}_discriminator": discriminator_loss(*map(self.adapters[f"peer{k}"]["discriminator"], maps))
            for k, maps in enumerate(judged)
        }

    def _rival_maps(self, k: int, views: Sequence[View]) -> tuple[Tensor, Tensor]:
        return self.method.rival_maps(views[k], views[k - 1].detach(), self.adapters[f"peer{k}"])

    @property
    def deployed(self) -> nn.Module:
        """The first network."""
        return self.peers[0]

    def further(self) -> dict[str, nn.Module]:
        """All other networks, and all as one."""
        others = {f"peer_{k}": peer for k, peer in enumerate(self.peers) if k}
        return others | {"ensemble": Ensemble(self.peers)}


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, gradient passes through a module without reaching its parameters, and it keeps no batch statistics."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        with untracked(module):
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
