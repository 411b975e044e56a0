"""Networks that are trained at the same time and teach each other."""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from kdstudy.core import Method, Phase, View, require_at_least_zero, require_choice, require_whole
from kdstudy.data import ImageBank
from kdstudy.evaluate import logits_of
from kdstudy.models import Ensemble
from kdstudy.schemes import Batch, Cast, Losses, Scheme, Turn, count_correct, forward, look, shown, untracked


@dataclass(frozen=True, kw_only=True)
class PeerOptions:
    """How peers learn from each other.

    `count` peers have the student's architecture and first weights of their own; where a row names partners, these are
    the student's peers instead. Each learns from every other one, the losses averaged; with `together` the others teach
    as one, by their mean probabilities or whatever the method says. With a `leader`, the first peer learns from the
    others, which learn from each other only. `alternate` steps one peer after another, with the answers that those
    before it give after their step; otherwise all step at once. `batches` are "shared", the same images with
    "own_crops", or "own_images". For the share `burn_in` of a phase, in whole epochs, only labels teach. With an
    `exchange_interval` the teachers are frozen copies of the peers, made anew every so many steps. `shared_stages` and
    the stem before them are one for all peers, which are then branches.
    """

    count: int = 2
    together: bool = False
    leader: bool = False
    alternate: bool = False
    batches: str = "shared"
    burn_in: float = 0.0
    exchange_interval: int = 0
    shared_stages: int = 0

    def __post_init__(self) -> None:
        """Refuse values out of range, and what excludes each other."""
        require_whole("count", self.count, least=3 if self.leader else 2)
        require_choice("batches", self.batches, ("shared", "own_crops", "own_images"))
        require_at_least_zero("burn_in", self.burn_in)
        if self.burn_in >= 1:
            raise ValueError(f"burn_in must be below 1, not {self.burn_in!r}")
        require_whole("exchange_interval", self.exchange_interval, least=0)
        require_whole("shared_stages", self.shared_stages, least=0)
        if self.shared_stages and (self.alternate or self.batches != "shared"):
            raise ValueError("branches with shared stages step at once on shared batches")


class Peers(Scheme):
    """K networks, each with its labels and with all others as its teachers (Zhang et al. 2018).

    Any offline method serves between two of them that asks for no more than views: every peer is student and teacher in
    turn, and whoever teaches is detached. The first peer is the one that is deployed; it has the first weights, the
    data order and the crops of a student trained alone.
    """

    family = "online"
    paper = "Zhang, Xiang, Hospedales, Lu 2018, CVPR; options after the methods' papers"
    options = PeerOptions

    def __init__(self, peers: Sequence[nn.Module], method: Method, sample: Batch, options: PeerOptions = PeerOptions()):
        """`sample` are 2 or more images by whose views the method sizes its adapters. Raises ValueError for a method
        that needs a teacher which is finished, and for branches of networks that cannot share their stages."""
        super().__init__()
        self.method, self._options = method, options
        self._together = options.together or "members" in method.reads
        self._check()
        self.peers = nn.ModuleList(peers)
        self.role = "leader" if options.leader else "first peer"
        self.least_batch, self.wants_strong = method.least_batch, "strong" in method.reads
        self.batches = 1 if options.batches == "shared" else len(peers)
        self.own_images = options.batches == "own_images"
        self.acts_between_steps = bool(options.exchange_interval)
        if options.shared_stages:
            _share(peers, options.shared_stages)
        self._size_adapters(sample)
        if options.exchange_interval:
            self.stale = copy.deepcopy(self.peers).requires_grad_(False)
        self.register_buffer("taught", torch.ones((), device=sample.images.device))

    @classmethod
    def assemble(cls, cast: Cast, method: Method, sample: Batch, options: PeerOptions) -> Self:
        """New students, or one and its partners."""
        if cast.partners and options.count not in (2, 1 + len(cast.partners)):
            raise ValueError(f"count is {options.count}, but the student and its partners are {1 + len(cast.partners)}")
        names = cast.partners or (cast.network,) * (options.count - 1)
        return cls([cast.student(), *map(cast.build, names)], method, sample, options)

    def _check(self) -> None:
        method, name = self.method, type(self.method).__name__
        if not method.needs_teacher or method.prepares() or method.deploys or "network" in method.reads:
            raise ValueError(f"{name} cannot be used between peers: it needs a teacher that is finished, or none")
        shown = {"logits", "members", "embedding"} if "members" in method.reads else {"logits"}
        if self._together and not set(method.reads) <= shown:
            raise ValueError(f"peers that teach as one show no more than logits, and {name} reads more")

    def _size_adapters(self, sample: Batch) -> None:
        self.peers.eval()
        with torch.no_grad():
            views = self._own_views(sample, None, self._numbers)
        if self._together:
            student = 1 if self._options.leader else 0
            group = self._group(student)
            members = tuple(views[number] for number in group)
            place = group.index(student) if student in group else None
            answer = Method.unite(self.method, members, sample.labels, nn.ModuleDict())
            adapters = self.method.adapters(views[student], View(answer, members=members, place=place))
        else:
            pairs = [(one, other) for one in self._numbers for other in self._group(one)]
            sized = {_pair(*pair): self.method.adapters(*(views[number] for number in pair)) for pair in pairs}
            adapters = nn.ModuleDict(sized)
        self.adapters = adapters.to(device=sample.images.device, dtype=sample.images.dtype)

    @property
    def _numbers(self) -> range:
        return range(len(self.peers))

    @property
    def _teaching(self) -> range:
        """All peers that teach: a leader does not."""
        return self._numbers[1:] if self._options.leader else self._numbers

    def _group(self, student: int) -> tuple[int, ...]:
        """The peers that teach one of them."""
        itself = self._together and self.method.counts_itself
        return tuple(number for number in self._teaching if number != student or itself)

    def phases(self) -> tuple[Phase, ...]:
        """The method's phases, for every peer."""
        return tuple(replace(phase, trains=self._everyones(phase.trains)) for phase in self.method.phases())

    def _everyones(self, trains: Sequence[str]) -> tuple[str, ...]:
        pairs = ["adapters"] if self._together else [f"adapters.{pair}" for pair in self.adapters]
        modules = {"student": [f"peers.{number}" for number in self._numbers], "adapters": pairs}
        parts = [name.partition(".") for name in trains]
        return tuple(module + dot + rest for root, dot, rest in parts for module in modules[root])

    def turns(self, phase: Phase) -> tuple[Turn, ...]:
        """One step of all peers, or one of each."""
        if not self._options.alternate:
            return super().turns(phase)
        return tuple(Turn(f"{phase.name} {number}", _own(phase.trains, number)) for number in self._numbers)

    def begin_epoch(self, epoch: int, epochs: int, held_out: ImageBank | None) -> None:
        """End the burn-in when it is time, and let the method weigh the peers by their answers for held-out images."""
        self.taught.fill_(float(epoch >= round(self._options.burn_in * epochs)))
        if self.method.needs_held_out():
            if held_out is None:
                raise ValueError("the peers are weighed on held-out images: set the data set's `validation` above 0")
            answers = tuple(View(logits_of(self.peers[number], held_out)) for number in self._teaching)
            self.method.weigh(self.adapters, answers, held_out.labels)

    def begin_step(self, step: int) -> None:
        """Exchange the peers' copies when it is time."""
        interval = self._options.exchange_interval
        if interval and step % interval == 0:
            self.stale.load_state_dict(self.peers.state_dict())

    def losses(self, phase, turn, batch, half):
        """The method's terms of every peer that the turn trains, against those that teach it."""
        students = sorted({_owner(name) for name in turn.trains} - {None})
        views = self._own_views(batch, half, students)
        united: dict[tuple[int, ...], Tensor] = {}
        terms: dict[str, Tensor] = {}
        for student in students:
            labels = self._batch_of(student, batch).labels
            teachers = {each: self._teacher(each, student, views, batch, half) for each in self._group(student)}
            found = self._terms(phase, student, views[student], teachers, labels, united)
            for name, term in found.items():
                terms[f"peer{student}_{name}"] = term if name == "ce" else self.taught * term
        if 0 not in students:
            return Losses(terms, {})
        return Losses(terms, {"correct": count_correct(views[0].logits.detach(), batch.labels)})

    def _terms(
        self,
        phase: Phase,
        student: int,
        view: View,
        teachers: Mapping[int, View],
        labels: Tensor,
        united: dict[tuple[int, ...], Tensor],
    ) -> Mapping[str, Tensor]:
        """The weighted terms of one peer; `united` keeps what a group answers together."""
        if not self._together:
            found = [
                phase.objective(view, teacher, labels, self.adapters[_pair(student, number)])
                for number, teacher in teachers.items()
            ]
            return {name: sum(terms[name] for terms in found) / len(found) for name in found[0]}
        group, members = tuple(teachers), tuple(teachers.values())
        if group not in united or self.own_images:
            united[group] = self.method.unite(members, labels, self.adapters)
        place = group.index(student) if student in group else None
        teacher = View(united[group], members=members, place=place)
        return phase.objective(view, teacher, labels, self.adapters)

    def _own_views(self, batch: Batch, half: torch.dtype | None, students: Sequence[int]) -> dict[int, View]:
        """What peers show, each for its own batch."""
        if self._options.shared_stages:
            return self._branch_views(batch, half)
        taps = self.method.reads
        return {number: look(self.peers[number], self._batch_of(number, batch), taps, half) for number in students}

    def _branch_views(self, batch: Batch, half: torch.dtype | None) -> dict[int, View]:
        taps, shared, (first, *others) = self.method.reads, self._options.shared_stages, self.peers
        trunk = forward(first, batch.images, half)
        views = {0: shown(trunk, first, batch, taps, half)}
        for number, peer in enumerate(others, start=1):
            # the trunk has seen the batch already: its batch norms must not count it again
            with untracked(peer.stem, *peer.stages[:shared]):
                view = forward(partial(peer.resume, shared), trunk.maps[shared - 1], half)
                maps, pre_maps = trunk.maps[:shared] + view.maps, trunk.pre_maps[:shared] + view.pre_maps
                view = view._replace(stem=trunk.stem, maps=maps, pre_maps=pre_maps)
                views[number] = shown(view, peer, batch, taps, half)
        return views

    def _teacher(
        self, number: int, student: int, views: Mapping[int, View], batch: Batch, half: torch.dtype | None
    ) -> View:
        """The detached view of a peer that teaches another."""
        seen = self._batch_of(student if self.own_images else number, batch)
        if self._options.exchange_interval:
            with torch.no_grad():
                return look(self.stale[number], seen, self.method.reads, half)
        if number in views and (number == student or not self.own_images):
            return views[number].detach()
        with torch.no_grad(), untracked(self.peers[number]):
            return look(self.peers[number], seen, self.method.reads, half)

    def _batch_of(self, number: int, batch: Batch) -> Batch:
        return (batch, *batch.others)[number] if batch.others else batch

    @property
    def deployed(self) -> nn.Module:
        """The first peer."""
        return self.peers[0]

    def further(self) -> dict[str, nn.Module]:
        """All other peers, and all peers as one."""
        others = {f"peer_{number}": self.peers[number] for number in self._numbers[1:]}
        return others | {"ensemble": Ensemble(self.peers)}


def _owner(name: str) -> int | None:
    """The peer that a module belongs to: 1 for "peers.1.stem" and "adapters.1_0"; None for adapters of all."""
    found = re.match(r"(?:peers|adapters)\.(\d+)", name)
    return int(found[1]) if found else None


def _own(trains: Iterable[str], student: int) -> tuple[str, ...]:
    """What of a phase's modules one peer trains: its own, and adapters of all."""
    return tuple(name for name in trains if _owner(name) in (student, None))


def _pair(student: int, teacher: int) -> str:
    return f"{student}_{teacher}"


def _share(peers: Sequence[nn.Module], stages: int) -> None:
    """Make the stem and the first stages of all peers those of the first one."""
    if any(len(getattr(peer, "stages", ())) <= stages for peer in peers):
        raise ValueError(f"branches that share {stages} stages need networks with a stem and more stages than that")
    first, *others = peers
    for peer in others:
        if _shapes(peer, stages) != _shapes(first, stages):
            raise ValueError(f"branches that share {stages} stages need networks whose first {stages} are alike")
        peer.stem = first.stem
        for number in range(stages):
            peer.stages[number] = first.stages[number]


def _shapes(network: nn.Module, stages: int) -> list[torch.Size]:
    shared = (network.stem, *network.stages[:stages])
    return [parameter.shape for module in shared for parameter in module.parameters()]
