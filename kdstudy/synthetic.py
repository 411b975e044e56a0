"""A frozen teacher and a student that sees no real image: generated, optimised or munged ones take their place."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.core import Method, Phase, View, require_at_least_zero, require_positive, require_share, require_whole
from kdstudy.data import BlankBank, ImageBank
from kdstudy.data_free import element_mean_kl
from kdstudy.generator import Generator
from kdstudy.impressions import as_bytes, draw_targets, rescale
from kdstudy.munge import Components, munge
from kdstudy.schemes import Batch, Cast, Losses, Offline, Turn, count_correct, look

ADAM = {"optimiser": "adam", "weight_decay": 0.0, "cycles": 1}
MAKING = "impressions"  # the phase in which they are made


@dataclass(frozen=True, kw_only=True)
class ZeroShotOptions:
    """How generator and student alternate: so many steps each on a pseudo-batch, by Adam at these learning rates.

    `batch` images are one, of `noise` numbers each; the gradient's norm is cut to `clip`.
    """

    batch: int = 128
    noise: int = 100
    generator_steps: int = 1
    student_steps: int = 10
    generator_rate: float = 1e-3
    student_rate: float = 2e-3
    clip: float = 5.0

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name in ("batch", "noise", "generator_steps", "student_steps"):
            require_whole(name, getattr(self, name))
        for name in ("generator_rate", "student_rate"):
            require_positive(name, getattr(self, name))
        require_at_least_zero("clip", self.clip)


class ZeroShot(Offline):
    """A generator makes images on which student and teacher disagree, and the student learns from the teacher there.

    A step of the loop is one pseudo-batch, made of one draw of noise: `generator_steps` of the generator against `-KL`
    (`data_free.element_mean_kl`), then `student_steps` of the student by the method's objective on the images that the
    generator then makes, with one answer of the teacher. Both networks are in train mode throughout. Learning rates
    fall along half a cosine over the phase. Labels are the classes that the teacher sees, and the accuracy in training
    is the agreement with them.
    """

    family = "data_free"
    paper = "Micaelli, Storkey 2019, NeurIPS, arXiv:1905.09768"
    options = ZeroShotOptions
    data_free = True
    acts_between_steps = True

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        method: Method,
        sample: Batch,
        options: ZeroShotOptions = ZeroShotOptions(),
    ):
        """`sample` gives the images' size. Draws the generator's weights, on the CPU, from torch's global generator."""
        _require_made_images(method, ("indices", "census", "strong"))
        super().__init__(student, teacher, method, sample)
        self._options = options
        generator = Generator(sample.images.shape[1], tuple(sample.images.shape[2:]), options.noise)
        self.generator = generator.to(sample.images.device, sample.images.dtype, memory_format=torch.channels_last)
        self._noise: Tensor | None = None
        self._made: tuple[Batch, View] | None = None

    @classmethod
    def assemble(cls, cast: Cast, method: Method, sample: Batch, options: ZeroShotOptions) -> Self:
        """A new student of the teacher, or of all teachers as one, and a new generator."""
        return cls(cast.student(), cast.teacher(), method, sample, options)

    def phases(self) -> tuple[Phase, ...]:
        """The method's phases, with the generator trained in all of them; an epoch is as many images as the run has."""
        own = {**ADAM, "schedule": "cosine", "batch": self._options.batch, "clip": self._options.clip}
        phases = super().phases()
        return tuple(replace(p, trains=(*p.trains, "generator"), recipe={**p.recipe, **own}) for p in phases)

    def turns(self, phase: Phase) -> tuple[Turn, ...]:
        """The generator's steps, then the student's."""
        options = self._options
        rest = tuple(name for name in phase.trains if name != "generator")
        return (
            Turn("generator", ("generator",), options.generator_steps, {"learning_rate": options.generator_rate}),
            Turn("student", rest, options.student_steps, {"learning_rate": options.student_rate}),
        )

    def begin_step(self, step: int) -> None:
        """Ask for new noise."""
        self._noise = None

    def losses(self, phase, turn, batch, half):
        """The generator's loss, or the method's terms on what it has made."""
        if turn.name == "generator":
            self._made = None
            return Losses({"generator": self._disagreement(batch, half)}, {})
        if self._made is None:
            self._made = self._make(batch, half)
        made, teacher = self._made
        student = look(self.student, made, self.method.reads, half)
        terms = phase.objective(student, teacher, made.labels, self.adapters)
        return Losses(terms, {"correct": self._correct(student, made.labels)})

    def _disagreement(self, batch: Batch, half: torch.dtype | None) -> Tensor:
        (teacher,) = self._teacher
        seen = Batch(self._generated(batch, half), batch.labels)
        student, answer = (look(network, seen, (), half) for network in (self.student, teacher))
        return -element_mean_kl(student.logits, answer.logits)

    @torch.no_grad()
    def _make(self, batch: Batch, half: torch.dtype | None) -> tuple[Batch, View]:
        made = Batch(self._generated(batch, half), batch.labels)
        teacher = self.teach(made, half, None)
        return made._replace(labels=teacher.logits.argmax(dim=1)), teacher

    def _generated(self, batch: Batch, half: torch.dtype | None) -> Tensor:
        images = batch.images  # blank: their number, place and precision count
        if self._noise is None:
            self._noise = torch.randn(len(images), self._options.noise, device=images.device, dtype=images.dtype)
        with torch.autocast(images.device.type, dtype=half, enabled=half is not None):
            return self.generator(self._noise).to(images.dtype)


@dataclass(frozen=True, kw_only=True)
class ImpressionOptions:
    """How impressions are made: `count` of them, `batch` at once, by so many `iterations` of Adam on the images.

    The teacher's answer at `temperature` is brought to the drawn one; the learning rate is that of images of 0 to 1.
    """

    count: int = 40_000
    batch: int = 100
    iterations: int = 1500
    learning_rate: float = 1e-3
    temperature: float = 20.0

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name in ("count", "batch", "iterations"):
            require_whole(name, getattr(self, name))
        for name in ("learning_rate", "temperature"):
            require_positive(name, getattr(self, name))


class Impressions(Offline):
    """Images are made for answers of the teacher that are drawn beforehand, then the student learns from them.

    In the first phase a step of the loop makes a batch: from uniform noise, `iterations` of Adam that lower the
    cross-entropy of the teacher's softened answer with `impressions.draw_targets`. Every image is brought to 0..1
    before each look at it. A last look labels the finished images, which are kept as bytes, with the class that the
    teacher sees. The method's phases, with the run's recipe and crops, follow on these.

    Differs from the printed text:

    * The release rescales a batch as a whole, and begins a new one where the last one ended.
    """

    family = "data_free"
    paper = "Nayak, Mopuri, Shaj, Babu, Chakraborty 2019, ICML, arXiv:1905.08114"
    options = ImpressionOptions
    data_free = True
    acts_between_steps = True

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        method: Method,
        sample: Batch,
        options: ImpressionOptions = ImpressionOptions(),
    ):
        """`sample` gives the images' size. Draws the targets, on the CPU, by a seed from torch's global generator."""
        _require_made_images(method, ("indices", "census"))
        super().__init__(student, teacher, method, sample)
        self._options = options
        channels, *sides = sample.images.shape[1:]
        device = sample.images.device
        generator = torch.Generator().manual_seed(_drawn_seed())
        targets = draw_targets(_classifier_weight(teacher), options.count, generator)
        self.register_buffer("targets", targets.to(sample.images))
        self.register_buffer("images", torch.zeros(options.count, *sides, channels, dtype=torch.uint8, device=device))
        self.register_buffer("labels", torch.zeros(options.count, dtype=torch.int64, device=device))
        self.canvas = nn.ParameterList([sample.images.new_zeros(options.batch, channels, *sides)])
        self._mean = self._std = sample.images.new_full((channels,), 127.5)  # until `bank` says what the teacher's are
        self._looks = 0

    @classmethod
    def assemble(cls, cast: Cast, method: Method, sample: Batch, options: ImpressionOptions) -> Self:
        """A new student of the teacher, or of all teachers as one."""
        return cls(cast.student(), cast.teacher(), method, sample, options)

    def phases(self) -> tuple[Phase, ...]:
        """The making of the images, for one epoch of them, then the method's phases."""
        own = {"epochs": 1, "batch": self._options.batch, "schedule": "constant", "clip": 0.0}
        recipe = {**ADAM, **own, "learning_rate": self._options.learning_rate}
        return (Phase(MAKING, self.impress, trains=("canvas",), recipe=recipe), *super().phases())

    def turns(self, phase: Phase) -> tuple[Turn, ...]:
        """As many steps of Adam on a batch of images, which begin anew with each, and one more for the last look."""
        if phase.name != MAKING:
            return super().turns(phase)
        return (Turn(MAKING, phase.trains, self._options.iterations + 1, fresh=True),)

    def bank(self, phase: Phase, bank: ImageBank | BlankBank) -> ImageBank | BlankBank:
        """Blank images to count by, then the impressions."""
        self._mean, self._std = bank.mean, bank.std
        place = {"padding": bank.padding, "device": bank.labels.device, "dtype": self.targets.dtype}
        scale = {"mean": bank.mean, "std": bank.std}
        if phase.name == MAKING:
            return BlankBank(len(self.labels), tuple(self.canvas[0].shape[1:]), **scale, **place)
        return ImageBank(self.images.cpu().numpy(), self.labels, **scale, **place)

    def begin_step(self, step: int) -> None:
        """Ask for new noise."""
        self._looks = 0

    def losses(self, phase, turn, batch, half):
        """How far the teacher's answers are from those drawn, or the method's terms."""
        if phase.name != MAKING:
            return super().losses(phase, turn, batch, half)
        answer, targets = self._answer(len(batch.indices), half), self.targets[batch.indices]
        terms = phase.objective(answer, View(targets), batch.labels, self.adapters)
        if self._looks == turn.times:
            self._keep(batch.indices, answer.logits)
        return Losses(terms, {"correct": count_correct(answer.logits, targets.argmax(dim=1))})

    def impress(self, answer: View, targets: View, labels: Tensor, adapters: nn.ModuleDict) -> dict[str, Tensor]:
        """The cross-entropy of the softened answer with the targets, which are probabilities."""
        return {MAKING: F.cross_entropy(answer.logits / self._options.temperature, targets.logits)}

    def _answer(self, count: int, half: torch.dtype | None) -> View:
        """The teacher's view of the images as they are, rescaled; of new noise at the first look."""
        (teacher,), (canvas,) = self._teacher, self.canvas
        with torch.no_grad():
            if not self._looks:
                canvas.uniform_()
            canvas.copy_(rescale(canvas))
        self._looks += 1
        mean, std = (x.to(canvas).view(-1, 1, 1) for x in (self._mean, self._std))
        images = (255 * canvas[:count] - mean) / std
        return look(teacher, Batch(images, self.labels[:count]), (), half)

    @torch.no_grad()
    def _keep(self, indices: Tensor, logits: Tensor) -> None:
        self.images[indices] = as_bytes(self.canvas[0][: len(indices)])
        self.labels[indices] = logits.argmax(dim=1)


@dataclass(frozen=True, kw_only=True)
class MungeOptions:
    """How images are munged, see `munge.munge`: on this many principal `components`, in so many `passes`."""

    components: int = 64
    passes: int = 1
    probability: float = 0.5
    local_variance: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        require_whole("components", self.components)
        require_whole("passes", self.passes)
        require_share("probability", self.probability)
        require_positive("local_variance", self.local_variance)


class Munged(Offline):
    """The student learns from the teacher, best an ensemble, on munged images (Bucila et al. 2006).

    Before training the real images are munged in the space of their principal components. Labels are the classes that
    the teacher sees in the images that come out; neither the real images nor their labels reach the student.
    """

    family = "data_free"
    paper = "Bucila, Caruana, Niculescu-Mizil 2006, KDD"
    options = MungeOptions

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        method: Method,
        sample: Batch,
        options: MungeOptions = MungeOptions(),
    ):
        """`sample` gives the images' size. Munges by a seed from torch's global generator."""
        _require_made_images(method, ("indices", "census"))
        blank = torch.zeros_like(sample.images)
        super().__init__(student, teacher, method, Batch(blank, torch.zeros_like(sample.labels), strong=blank))
        self._options = options
        self.register_buffer("seed", torch.tensor(_drawn_seed()))
        self._munged: ImageBank | None = None

    @classmethod
    def assemble(cls, cast: Cast, method: Method, sample: Batch, options: MungeOptions) -> Self:
        """A new student of the teacher, or of all teachers as one."""
        return cls(cast.student(), cast.teacher(), method, sample, options)

    def bank(self, phase: Phase, bank: ImageBank) -> ImageBank:
        """The munged images, made once from those of the run."""
        if self._munged is None:
            images = self._munge(_pixels(bank))
            blank = torch.zeros(len(images), dtype=torch.int64)
            self._munged = _like(bank, images, self._labels(_like(bank, images, blank)))
        return self._munged

    def _munge(self, images: Tensor) -> Tensor:
        options = self._options
        components = Components(images, options.components)
        generator = torch.Generator().manual_seed(self.seed.item())
        rows = components.encode(images)
        return components.decode(munge(rows, options.passes, options.probability, options.local_variance, generator))

    @torch.no_grad()
    def _labels(self, bank: ImageBank) -> Tensor:
        (teacher,) = self._teacher
        return torch.cat([teacher(images).logits.argmax(dim=1) for images in bank.plain(500)])


def _require_made_images(method: Method, taps: Iterable[str]) -> None:
    """Raise a ValueError for a method that measures the real images before training, or reads one of these taps."""
    name = type(method).__name__
    if method.prepares():
        raise ValueError(f"{name} measures the training images before training, and here the student has none")
    wanted = [tap for tap in taps if tap in method.reads]
    if wanted:
        raise ValueError(f"{name} reads {wanted[0]}, which made-up images do not have")


def _drawn_seed() -> int:
    return int(torch.randint(2**62, ()))


def _classifier_weight(teacher: nn.Module) -> Tensor:
    """The weight (C, D) of what classifies; of several teachers side by side."""
    networks = getattr(teacher, "networks", [teacher])
    return torch.cat([network.classifier.weight.detach() for network in networks], dim=1)


def _pixels(bank: ImageBank) -> Tensor:
    """A bank's images as they were before normalisation, (N, H, W, C) uint8."""
    std, mean = (x.view(-1, 1, 1) for x in (bank.std, bank.mean))
    plain = [(images * std + mean).round().to(torch.uint8) for images in bank.plain(500)]
    return torch.cat(plain).permute(0, 2, 3, 1)


def _like(bank: ImageBank, images: Tensor, labels: Tensor) -> ImageBank:
    """A bank of other images (N, H, W, C) uint8, normalised and padded as this one."""
    place = {"padding": bank.padding, "device": bank.labels.device, "dtype": bank.mean.dtype}
    return ImageBank(images.cpu().numpy(), labels, mean=bank.mean, std=bank.std, **place)
