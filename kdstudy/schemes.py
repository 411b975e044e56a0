"""Who teaches whom. A scheme owns the networks of one run; whatever plays the teacher is frozen and detached here.

Here are the base class and the schemes with a teacher that is given; `peers`, `rivals`, `launch`, `snapshots` and
`synthetic` hold the others.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdstudy.breakdown import part
from kdstudy.core import Clock, Method, Phase, View, require_whole
from kdstudy.data import ImageBank
from kdstudy.models import Ensemble, reset


class Batch(NamedTuple):
    """What the loop hands a scheme for one step."""

    images: Tensor  # (B, channels, H, W), normalised and augmented
    labels: Tensor  # (B,) int64
    indices: Tensor | None = None  # (B,) int64, which training images these are
    strong: Tensor | None = None  # the same images, strongly augmented, for schemes that ask for them
    census: Tensor | None = None  # (N,) int64, the labels of all training images; in the sample that sizes adapters
    others: "tuple[Batch, ...]" = ()  # those of the 2nd, 3rd ... peer, for schemes that ask for several
    crop: tuple[Tensor, Tensor] | None = None  # shift (B, 2) and flip (B,) by which they were augmented
    seen: dict[nn.Module, View] | None = None  # views of its images that are known already, where runs share it


def sample_batch(bank: ImageBank, size: int) -> Batch:
    """The first `size` plain images of a bank, or all, for methods to size their adapters by."""
    images = next(iter(bank.plain(min(size, len(bank)))))
    indices = torch.arange(len(images), device=images.device)
    return Batch(images, bank.labels[: len(images)], indices, strong=images, census=bank.labels)


@dataclass(frozen=True)
class Turn:
    """One optimiser step of a batch, or several alike: which modules it trains. Turns of a phase are taken in order.

    `trains` names modules of the scheme: only they get gradient. `recipe` overrides fields of the phase's recipe for
    this turn's optimiser. With `fresh` the optimiser forgets its moments before each batch.
    """

    name: str
    trains: tuple[str, ...]
    times: int = 1
    recipe: Mapping[str, Any] = field(default_factory=dict)
    fresh: bool = False

    def __post_init__(self) -> None:
        """Refuse a count that is none."""
        require_whole("times", self.times)


@dataclass(frozen=True)
class Cast:
    """The networks that a run may use. New ones draw their weights from torch's global generator, one after another.

    `teachers` are trained; where a scheme takes one teacher, several are one `models.Ensemble`. `partners` name
    networks that are trained beside the student.
    """

    build: Callable[[str], nn.Module]
    network: str  # the student's
    partners: tuple[str, ...] = ()
    teachers: Sequence[nn.Module] = ()

    def student(self) -> nn.Module:
        """A new student."""
        return self.build(self.network)

    def teacher(self) -> nn.Module:
        """The teacher, or all of them as one. Raises ValueError if there is none."""
        if not self.teachers:
            raise ValueError("this scheme needs a trained teacher, and the run has none")
        return Ensemble(self.teachers) if len(self.teachers) > 1 else self.teachers[0]


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """The options of a scheme that has none."""


class Losses(NamedTuple):
    """What a scheme answers for a batch and a turn."""

    terms: Mapping[str, Tensor]  # named, weighted scalars; their sum is minimised
    counts: Mapping[str, Tensor]  # named numbers of images, for the history; "correct" belongs to the deployed network

    @property
    def total(self) -> Tensor:
        """What is minimised."""
        return sum(self.terms.values())

    def noted(self, images: int) -> dict[str, Tensor]:
        """Terms and counts summed over the images of the batch."""
        return {name: term * images for name, term in self.terms.items()} | dict(self.counts)


class Scheme(nn.Module, ABC):
    """All networks of a run and the rule by which they learn.

    Its state dict is what a checkpoint must hold. The loop asks for phases, for the turns of a phase, and for each
    batch and turn for the named loss terms, whose sum it minimises over `turn.trains` alone.
    """

    family: ClassVar[str]  # "none", "offline", "online", "self", "data_free"
    paper: ClassVar[str] = "none"  # authors, year, where; of the scheme, where methods of several papers use it
    options: ClassVar[type] = NoOptions  # the dataclass of its options, which a row sets under `scheme`
    needs_teacher: ClassVar[bool] = False  # whether a trained teacher must be there
    data_free: ClassVar[bool] = False  # whether training must go without the training images

    role: str = "student"  # what the deployed network is among those trained
    least_batch: int = 1  # fewer images in a batch leave a loss undefined
    wants_strong: bool = False  # whether batches need strongly augmented images beside the usual ones
    batches: int = 1  # how many batches it wants for a step
    own_images: bool = False  # whether these are of other images, too, or of other crops of the same
    acts_between_steps: bool = False  # whether `begin_step` does anything

    @classmethod
    @abstractmethod
    def assemble(cls, cast: Cast, method: Method, sample: Batch, options: Any) -> Self:
        """The scheme of a run, with new networks. `sample` are 2 or more images, best a whole batch."""

    @abstractmethod
    def phases(self) -> tuple[Phase, ...]:
        """The phases of training, in order."""

    def turns(self, phase: Phase) -> tuple[Turn, ...]:
        """The optimiser steps of each batch; by default one over `phase.trains`."""
        return (Turn(phase.name, phase.trains),)

    @abstractmethod
    def losses(self, phase: Phase, turn: Turn, batch: Batch, half: torch.dtype | None) -> Losses:
        """The losses of a batch. Networks run under autocast to `half` if it is given; the losses outside it."""

    @property
    @abstractmethod
    def deployed(self) -> nn.Module:
        """The network that is evaluated and kept."""

    def further(self) -> Mapping[str, nn.Module]:
        """Networks that are scored beside the deployed one when training has ended, by name."""
        return {}

    def prepare(self, plain_batches: Callable[[], Iterable[Tensor]]) -> None:
        """Whatever must be done once, with the plain training images, before the first phase."""

    def bank(self, phase: Phase, bank: ImageBank) -> ImageBank:
        """The images that a phase trains on; by default those that the run was given."""
        return bank

    def begin_epoch(self, epoch: int, epochs: int, held_out: ImageBank | None) -> None:
        """Whatever must be done before the first step of the 0-based `epoch` of a phase's `epochs`."""

    def begin_step(self, step: int) -> None:
        """Whatever must be done before the 0-based `step` of a phase, counted over its epochs."""

    def share(self, batch: Batch, half: torch.dtype | None) -> None:
        """Add to `batch.seen` the views that other runs of the cohort need, too."""

    def whole_student(self, phase: Phase) -> nn.Module | None:
        """The network whose view of the batch is all that the losses need of it, if it is trained as a whole."""
        return None

    def trained_parameters(self, names: Iterable[str]) -> list[nn.Parameter]:
        """Parameters of the named modules that are not frozen, in a fixed order, each once."""
        found = dict.fromkeys(p for name in names for p in self.get_submodule(name).parameters())
        return [parameter for parameter in found if parameter.requires_grad]

    def trained_networks(self, names: Iterable[str]) -> list[str]:
        """The networks that the named modules belong to; adapters are none."""
        return list(dict.fromkeys(root for name in names if (root := _root(name)) != "adapters"))

    def passes(self, phase: Phase) -> int:
        """How often a batch of a phase takes a network forward and back: what the phase costs."""
        return sum(turn.times * len(self.trained_networks(turn.trains)) for turn in self.turns(phase))

    def set_modes(self, phase: Phase) -> None:
        """Train mode for what the phase trains, eval mode for the rest: evaluation in between leaves no trace."""
        self.eval()
        for name in phase.trains:
            self.get_submodule(name).train()

    def set_clocks(self, epoch: int, epochs: int) -> None:
        """Tell losses that change with time that the 0-based `epoch` of a phase's `epochs` begins."""
        for module in self.modules():
            if isinstance(module, Clock):
                module.set(epoch, epochs)


def _root(name: str) -> str:
    """The network that a module is part of: "student" of "student.stages.0", "peers.1" of "peers.1.stem"."""
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if rest and rest[0].isdigit() and first != "adapters" else first


class Taught(Scheme):
    """One student, one method and its adapters: what `Alone` and `Offline` share."""

    def __init__(self, student: nn.Module, method: Method):
        super().__init__()
        self.student = student
        self.method = method
        self.least_batch = method.least_batch
        self.wants_strong = "strong" in method.reads

    def _size_adapters(self, sample: Batch) -> None:
        self.student.eval()  # a forward in train mode would move its batch statistics
        with torch.no_grad():
            student = look(self.student, sample, self.method.reads, None)
            adapters = self.method.adapters(student, self.teach(sample, None, student))
        self.adapters = adapters.to(device=sample.images.device, dtype=sample.images.dtype)

    def phases(self) -> tuple[Phase, ...]:
        """The method's own phases."""
        return self.method.phases()

    def whole_student(self, phase: Phase) -> nn.Module | None:
        """The student, unless the method runs it on other images, or in parts."""
        apart = {"strong", "network"} & set(self.method.reads)
        return self.student if "student" in phase.trains and not apart else None

    def losses(self, phase, turn, batch, half):
        """The method's terms of the student's view against the teacher's."""
        with torch.set_grad_enabled(any(name.split(".")[0] == "student" for name in phase.trains)):
            student = look(self.student, batch, self.method.reads, half)
        teacher = self.teach(batch, half, student)
        terms = phase.objective(student, teacher, batch.labels, self.adapters)
        return Losses(terms, {"correct": self._correct(student, batch.labels)})

    @torch.no_grad()
    def _correct(self, student: View, labels: Tensor) -> Tensor:
        with untracked(self.adapters):
            return count_correct(self.method.predict(student, self.adapters), labels)

    @abstractmethod
    def teach(self, batch: Batch, half: torch.dtype | None, student: View) -> View:
        """The detached view of whatever plays the teacher, in full precision, with the taps that the method reads."""

    @property
    def deployed(self) -> nn.Module:
        """The student, with those of its adapters that it keeps."""
        return Deployed(self.student, self.method, self.adapters) if self.method.deploys else self.student

    def further(self) -> Mapping[str, nn.Module]:
        """What the method names."""
        return self.method.further(self.student, self.adapters)


class Alone(Taught):
    """One network and its labels: baselines and teachers."""

    family = "none"

    @classmethod
    def assemble(cls, cast: Cast, method: Method, sample: Batch, options: NoOptions) -> Self:
        """A new student."""
        return cls(cast.student(), method, sample)

    def __init__(self, student: nn.Module, method: Method, sample: Batch):
        """`sample` are 2 or more images by whose view the method sizes its adapters."""
        super().__init__(student, method)
        self._size_adapters(sample)

    def teach(self, batch: Batch, half: torch.dtype | None, student: View) -> View:
        """The student's own view: nothing else is there."""
        return student.detach()


class SelfTaught(Alone):
    """One network that teaches itself, by deeper classifiers or by a teacher that is only a formula."""

    family = "self"


class Offline(Taught):
    """A trained, frozen teacher and one student (Hinton et al. 2015).

    The teacher is no submodule: it cannot be trained, saved or put into train mode with the rest, and its batch-norm
    statistics never change. Student and teacher see the same augmented images.
    """

    family = "offline"
    needs_teacher = True

    @classmethod
    def assemble(cls, cast: Cast, method: Method, sample: Batch, options: NoOptions) -> Self:
        """A new student of the teacher, or of all teachers as one."""
        return cls(cast.student(), cast.teacher(), method, sample)

    def __init__(self, student: nn.Module, teacher: nn.Module, method: Method, sample: Batch):
        """`sample` are 2 or more images, best a whole batch, by whose views the method sizes its adapters."""
        super().__init__(student, method)
        self._teacher = (teacher.eval().requires_grad_(False),)  # in a tuple, so that it is not registered
        self._size_adapters(sample)

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher."""
        return self._teacher[0]

    def teach(self, batch: Batch, half: torch.dtype | None, student: View) -> View:
        """The teacher's view."""
        with torch.no_grad():
            return look(self.teacher, batch, self.method.reads, half)

    @torch.no_grad()
    def share(self, batch: Batch, half: torch.dtype | None) -> None:
        """The teacher's view, for all of its students."""
        if self.teacher not in batch.seen:
            batch.seen[self.teacher] = forward(self.teacher, batch.images, half)

    def prepare(self, plain_batches: Callable[[], Iterable[Tensor]]) -> None:
        """Let the method change the student's first weights and measure the teacher, if it wants to."""
        with torch.no_grad():
            self.method.initialise(self.student, self.teacher, plain_batches(), self.adapters)

        def views() -> Iterator[View]:
            with torch.no_grad():
                for images in plain_batches():
                    yield look(self.teacher, Batch(images, images.new_empty(0)), self.method.reads, None)

        self.method.calibrate(self.adapters, views())


class Collaborative(Offline):
    """Offline, and beside it a scratch teacher: the teacher's architecture, trained from nothing (Zhao et al. 2020).

    It learns from the labels alone, at the student's side. Its detached view is the one member of the teacher's view,
    except where adapters are sized. One optimiser serves both networks: they share no parameter and no gradient.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, method: Method, sample: Batch):
        """Draws the scratch teacher's first weights, on the CPU, from torch's global generator."""
        super().__init__(student, teacher, method, sample)
        scratch = copy.deepcopy(teacher).cpu().requires_grad_(True)
        reset(scratch)
        self.scratch = scratch.to(sample.images.device)

    def phases(self) -> tuple[Phase, ...]:
        """The method's phases, with the scratch teacher trained in all of them."""
        return tuple(replace(phase, trains=(*phase.trains, "scratch")) for phase in super().phases())

    def losses(self, phase, turn, batch, half):
        """The method's terms, and the scratch teacher's cross-entropy."""
        scratch = look(self.scratch, batch, (), half)
        student = look(self.student, batch, self.method.reads, half)
        teacher = self.teach(batch, half, student)._replace(members=(scratch.detach(),))
        terms = dict(phase.objective(student, teacher, batch.labels, self.adapters))
        terms["scratch"] = F.cross_entropy(scratch.logits, batch.labels)
        return Losses(terms, {"correct": self._correct(student, batch.labels)})


class Deployed(nn.Module):
    """A student together with the adapters that it keeps after training."""

    def __init__(self, student: nn.Module, method: Method, adapters: nn.ModuleDict):
        super().__init__()
        self.student = student
        self.adapters = nn.ModuleDict({name: adapters[name] for name in method.deploys})
        self._method = method

    def forward(self, images: Tensor) -> View:
        """The student's view with the logits that the method predicts by."""
        view = self.student(images)
        return view._replace(logits=self._method.predict(view, self.adapters))


class Committee(Scheme):
    """Trained networks that answer together, by the mean of their probabilities; nothing is trained any more."""

    family = "self"
    needs_teacher = True
    role = "committee"

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        self.student = Ensemble(networks)
        self.adapters = nn.ModuleDict()

    @classmethod
    def assemble(cls, cast: Cast, method: Method, sample: Batch, options: NoOptions) -> Self:
        """The teachers themselves."""
        return cls(cast.teachers)

    def phases(self) -> tuple[Phase, ...]:
        """None."""
        return ()

    def losses(self, phase, turn, batch, half):
        """Never asked for."""
        raise RuntimeError("a committee is not trained")

    @property
    def deployed(self) -> nn.Module:
        """All of them."""
        return self.student


@contextmanager
def untracked(*modules: nn.Module) -> Iterator[None]:
    """Inside, batch norms in train mode use their batch's statistics but do not keep them: a look leaves no trace."""
    norms = [each for module in modules for each in module.modules() if isinstance(each, _BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """How many of a batch the logits get right, a scalar on the device."""
    return (logits.argmax(dim=1) == labels).sum()


def look(network: nn.Module, batch: Batch, taps: Iterable[str], half: torch.dtype | None) -> View:
    """The network's view of a batch, run under autocast to `half` if given; only `taps` are kept, in full precision."""
    known = batch.seen.get(network) if batch.seen else None
    return shown(known or forward(network, batch.images, half), network, batch, taps, half)


def shown(view: View, network: nn.Module, batch: Batch, taps: Iterable[str], half: torch.dtype | None) -> View:
    """Of a network's view of a batch only `taps`, in full precision, with those that are not the network's own."""
    taps = tuple(taps)
    view = view.only(taps)
    added = {"indices": batch.indices, "census": batch.census, "network": network}
    if "strong" in taps:
        # one after the other, so that batch norm sees each kind of image by itself
        added["strong"] = forward(network, batch.strong, half).only(())
    return view._replace(**{tap: added[tap] for tap in added if tap in taps}).full_precision()


def forward(network: Callable[[Tensor], View], x: Tensor, half: torch.dtype | None) -> View:
    """The network's view under autocast to `half` if it is given."""
    with part("student" if torch.is_grad_enabled() else "teacher"):
        with torch.autocast(x.device.type, dtype=half, enabled=half is not None):
            return network(x)
