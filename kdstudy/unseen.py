"""What students without real images are trained on, made again from the seeds of their runs, and what came of it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown
from torch import Tensor, nn

from kdstudy.answers import load_trained
from kdstudy.data import BlankBank, ImageBank
from kdstudy.device import DataOnDevice
from kdstudy.impressions import BETAS, as_bytes, class_similarity, draw_targets
from kdstudy.lesson import table
from kdstudy.relations import spread
from kdstudy.results import Ledger
from kdstudy.schemes import Losses, Scheme, sample_batch
from kdstudy.stopping import Stopped
from kdstudy.study import SCHEMES, Planner, RunSpec
from kdstudy.tables import BASELINE_STAGE, label
from kdstudy.train import Surroundings, Training

EXACT = "donot_use_mm_for_euclid_dist"  # products of bright images would round small distances away
MOST = 200  # images of a kind that are measured
GENERATOR = "generator"
Bank = ImageBank | BlankBank
Rows = dict[str, tuple[np.ndarray, list[str]]]  # images (N, H, W, C) uint8 and their captions
# the fastest algorithm may be another one each time, and the last bits with it
repeatable = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)


class Impressed(NamedTuple):
    """Data impressions (N, H, W, C) uint8 of one batch, with softened probabilities (N, C)."""

    images: np.ndarray
    targets: Tensor  # asked for
    said: Tensor  # what the teacher answers to the impressions
    noise: Tensor  # and to noise


@dataclass(frozen=True)
class Kind:
    """Images (N, H, W, C) uint8 of one origin, and a teacher's probabilities (N, C) for them."""

    images: np.ndarray
    probabilities: Tensor

    @property
    def seen(self) -> Tensor:
        """The class that the teacher sees in each."""
        return self.probabilities.argmax(dim=1)

    def sample(self, classes: Sequence[int]) -> list[int]:
        """One image for each of the classes: the first in which the teacher sees it, else the first that is left."""
        left, picked = list(range(len(self.images))), []
        for wanted in classes:
            fitting = [index for index in left if self.seen[index] == wanted] or left
            picked += fitting[:1]
            left = [index for index in left if index not in picked]
        return picked


@dataclass(frozen=True)
class Duel:
    """The first pseudo-batches of a run of zero-shot transfer.

    `losses` has a row for every optimiser step: step (of the loop), turn, disagreement (nats, before it). `made` are
    images (N, H, W, C) uint8 by the number of pseudo-batches after which the generator made them, all from one noise.
    `beyond` is the share of their values that no picture can show, because they are darker or brighter.
    """

    losses: pd.DataFrame
    made: Mapping[int, np.ndarray]
    beyond: float


def schemes_table(planner: Planner, setting: str, stage: str) -> Markdown:
    """Who teaches in each row of a stage, on what, with all options of its scheme."""
    specs = [planner.final(setting, stage, row, {})[0] for row in planner.rows(setting, stage)]
    rows = [(f"`{spec.row}`", label(spec.row), _teachers(spec), _scheme(spec)) for spec in specs]
    if not rows:
        return Markdown(f"The setting `{setting}` trains no row of the stage `{stage}`.")
    return table(pd.DataFrame(rows, columns=["row", "called", "taught by", "scheme and its options"]))


def _teachers(spec: RunSpec) -> str:
    first, *others = (teacher.network for teacher in spec.teachers)
    return f"{1 + len(others)} x {first}" if others else first


def _scheme(spec: RunSpec) -> str:
    options = asdict(spec.build_options()).items()
    return f"`{spec.scheme_name}`: " + ", ".join(f"{name} {value:g}" for name, value in options)


def before_training(ledger: Ledger, spec: RunSpec, data: DataOnDevice) -> tuple[Scheme, Bank]:
    """The scheme of a run as its seed makes it, and the images that the loop has for it.

    Raises FileNotFoundError if a teacher's weights are not on this machine.
    """
    given = data.blank if SCHEMES[spec.scheme_name].data_free else data.training
    bank = given(spec.held_out, spec.recipe, spec.images)
    teachers = [load_trained(ledger, teacher, data) for teacher in spec.teachers]
    build = partial(data.build, recipe=spec.recipe)
    return spec.assemble(build, teachers, sample_batch(bank, spec.recipe.batch)), bank


def _begin(
    scheme: Scheme,
    bank: ImageBank | BlankBank,
    spec: RunSpec,
    steps: int,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Train as the run did, but only so many steps of the loop."""
    left = steps

    def stop() -> bool:
        nonlocal left
        left -= 1
        after_step()
        return left <= 0

    with suppress(Stopped):
        Training(scheme, spec.recipe, bank, seed=spec.seed, watch={}, surroundings=Surroundings(should_stop=stop)).run()


@repeatable
def zero_shot(ledger: Ledger, spec: RunSpec, data: DataOnDevice, steps: int = 24) -> Duel:
    """Train a run of zero-shot transfer again, for so many pseudo-batches."""
    scheme, bank = before_training(ledger, spec, data)
    usual, weight, losses, step = scheme.losses, scheme.method.kd_weight, [], 0
    noise = torch.randn(MOST, scheme.generator.noise, generator=torch.Generator().manual_seed(0))

    def recorded(phase, turn, batch, half) -> Losses:
        found = usual(phase, turn, batch, half)
        gap = -found.terms[GENERATOR] if turn.name == GENERATOR else found.terms["kd"] / weight
        losses.append((step, turn.name, gap.item()))
        return found

    def count() -> None:
        nonlocal step
        step += 1

    def drawn() -> Tensor:
        scheme.set_modes(scheme.phases()[0])
        with torch.no_grad():
            return _pixels(scheme.generator(noise.to(next(scheme.parameters()))), data)

    scheme.losses = recorded
    first = drawn()
    _begin(scheme, bank, spec, steps, count)
    last = drawn()
    beyond = ((last < 0) | (last > 255)).double().mean().item()
    frame = pd.DataFrame(losses, columns=["step", "turn", "disagreement"])
    return Duel(frame, {0: _bytes(first), step: _bytes(last)}, beyond)


@repeatable
def impressions(ledger: Ledger, spec: RunSpec, data: DataOnDevice) -> Impressed:
    """Make the first batch of a run's data impressions again, exactly as the run did."""
    scheme, bank = before_training(ledger, spec, data)
    _begin(scheme, bank, spec, steps=1)
    made = scheme.images.flatten(start_dim=1).any(dim=1).nonzero().flatten()[:MOST]
    images = scheme.images[made].cpu()
    noise = as_bytes(torch.rand(images.permute(0, 3, 1, 2).shape, generator=torch.Generator().manual_seed(0)))
    teacher, temperature = load_trained(ledger, spec.teacher, data), spec.build_options().temperature
    said, before = (answers(teacher, each.numpy(), data, temperature) for each in (images, noise))
    return Impressed(images.numpy(), scheme.targets[made].double().cpu(), said, before)


@repeatable
def munged(ledger: Ledger, spec: RunSpec, data: DataOnDevice) -> tuple[np.ndarray, np.ndarray]:
    """The first images that a run munges, and what it makes of them: that alone is what its student learns from."""
    scheme, bank = before_training(ledger, spec, data)
    made = scheme.bank(scheme.phases()[0], bank)
    return tuple(_bytes(_pixels(next(iter(each.plain(MOST))), data)) for each in (bank, made))


@torch.no_grad()
def answers(network: nn.Module, images: np.ndarray, data: DataOnDevice, temperature: float = 1.0) -> Tensor:
    """A network's probabilities (N, C), float64 on the CPU, for images (N, H, W, C) uint8."""
    mean, std = (torch.as_tensor(each, dtype=torch.float64).view(-1, 1, 1) for each in (data.mean, data.std))
    inputs = (torch.from_numpy(images).permute(0, 3, 1, 2) - mean) / std
    logits = network.eval()(inputs.to(next(network.parameters()))).logits.double().cpu()
    return (logits / temperature).softmax(dim=1)


def gaps(images: np.ndarray, real: np.ndarray) -> np.ndarray:
    """How far each image (N, H, W, C) is from the nearest of real ones: root mean square over its values, 0 to 255."""
    rows, others = (torch.from_numpy(each).flatten(start_dim=1).double() for each in (images, real))
    nearest = [torch.cdist(row.unsqueeze(0), others, compute_mode=EXACT).min() for row in rows]
    return torch.stack(nearest).numpy() / rows.shape[1] ** 0.5


def samples(
    kinds: Mapping[str, Kind], class_names: Sequence[str], of: Mapping[str, str] | None = None, columns: int = 10
) -> Rows:
    """Images of each origin, of up to `columns` classes as the teacher sees them, with what it sees as captions.

    `of` names origins whose images belong to those of another one: the same are picked.
    """
    classes, rows = spread(len(class_names), columns), {}
    for name, kind in kinds.items():
        picked = kinds[(of or {}).get(name, name)].sample(classes)
        sure = kind.probabilities.amax(dim=1)
        captions = [f"{class_names[kind.seen[index]]}: {100 * sure[index]:.0f} %" for index in picked]
        rows[name] = kind.images[picked], captions
    return rows


def kinds(origins: Mapping[str, np.ndarray], teacher: nn.Module, data: DataOnDevice) -> dict[str, Kind]:
    """Images of several origins with what a teacher says of them."""
    return {name: Kind(images, answers(teacher, images, data)) for name, images in origins.items()}


def kinds_table(kinds: Mapping[str, Kind], data: DataOnDevice) -> Markdown:
    """How near to a training image, how clear to the teacher and how evenly spread images of several origins are."""
    rows = []
    for name, kind in kinds.items():
        apart = gaps(kind.images, data.images.x_train)
        counts = np.bincount(kind.seen, minlength=data.images.classes)
        sure = 100 * kind.probabilities.amax(dim=1).mean().item()
        rows.append(
            (name.replace("\n", " "), len(apart), apart.min(), float(np.median(apart)), sure, np.count_nonzero(counts))
        )
    heads = ["images", "how many", "nearest to a training image", "median", "teacher's confidence (%)", "classes seen"]
    return table(pd.DataFrame(rows, columns=heads), floatfmt=("", "", ".1f", ".1f", ".1f", ""))


def _pixels(normalised: Tensor, data: DataOnDevice) -> Tensor:
    """Normalised images (N, C, H, W) on the scale of 0 to 255, float64 on the CPU."""
    mean, std = (torch.as_tensor(each, dtype=torch.float64).view(-1, 1, 1) for each in (data.mean, data.std))
    return normalised.double().cpu() * std + mean


def _bytes(pixels: Tensor) -> np.ndarray:
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def impressions_reading(made: Impressed) -> Markdown:
    """How far the teacher's answers are from those that the impressions were made for."""
    found, before = (0.5 * (made.targets - each).abs().sum(dim=1).mean().item() for each in (made.said, made.noise))
    right = (made.said.argmax(dim=1) == made.targets.argmax(dim=1)).double().mean().item()
    return Markdown(
        f"- Half the summed differences of the probabilities asked for and given (0: the same, 1: nothing in common), "
        f"mean over {len(made.images)} images: {before:.2f} on noise, {found:.2f} on the impressions. In "
        f"{100 * right:.0f} % of them the teacher sees most what was asked for most."
    )


def duel_reading(duel: Duel) -> Markdown:
    """What generator and student each do to the disagreement in the first pseudo-batches."""
    turns = duel.losses.groupby(["turn", "step"]).disagreement
    first, last = turns.first(), turns.last()
    before, raised, lowered = first[GENERATOR].mean(), first["student"].mean(), last["student"].mean()
    return Markdown(
        f"- Over the first {len(last['student'])} pseudo-batches: images of new noise begin at {before:.3f} nats, "
        f"the generator's step moves that to {raised:.3f}, and the student's steps on these images to {lowered:.3f}.\n"
        f"- At the end {100 * duel.beyond:.1f} % of the values that the generator makes are darker than black or "
        "brighter than white. Nothing holds it to what a picture can be."
    )


def likeness(teacher: nn.Module) -> Tensor:
    """`impressions.class_similarity` of a trained network's classifier, (C, C)."""
    return class_similarity(teacher.classifier.weight.detach().double().cpu())


def _partners(similarity: Tensor) -> torch.return_types.max:
    """For each class, how much like it the likest other one is, and which that is."""
    return similarity.masked_fill(torch.eye(len(similarity), dtype=torch.bool), -1.0).max(dim=1)


def drawn_targets(teacher: nn.Module, class_names: Sequence[str], count: int = 20) -> dict[str, Tensor]:
    """So many targets (N, C) as impressions are made for, with each beta, of the class that is most like another."""
    weight, classes = teacher.classifier.weight.detach().double().cpu(), len(class_names)
    of = int(_partners(likeness(teacher)).values.argmax())
    drawn = draw_targets(weight, count * len(BETAS) * classes, torch.Generator().manual_seed(0))[of::classes]
    return {f"targets of {class_names[of]}, beta {b:g}": drawn[k :: len(BETAS)] for k, b in enumerate(BETAS)}


def likeness_reading(similarity: Tensor, class_names: Sequence[str], pairs: int = 3) -> Markdown:
    """Which other class is most like a class, by the classifier's weights."""
    values, partners = _partners(similarity)
    first = values.argsort(descending=True, stable=True)[:pairs].tolist()
    listed = ", ".join(f"{class_names[partners[c]]} for {class_names[c]} ({values[c]:.2f})" for c in first)
    return Markdown(f"- Most like another class, of 0 to 1: {listed}.")


def result_reading(results: pd.DataFrame, setting: str, stage: str, chance: float) -> Markdown:
    """What students that saw no real image reach, beside chance and the student of vanilla KD. `chance` in percent."""
    final = results[(results.setting == setting) & (results.purpose == "final") & (results.status == "finished")]
    rows = final[final.stage == stage].groupby("method", sort=False)
    if not len(rows):
        return Markdown("- No such student has finished.")
    kd = final[(final.method == "kd") & (final.stage == BASELINE_STAGE)].test_accuracy.mean()
    lines = [f"- Always naming one class gets {chance:g} % right."]
    for method, runs in rows:
        won = "" if np.isnan(kd) else f", {100 * (runs.test_accuracy.mean() - chance) / (kd - chance):.0f} % of the way"
        lines.append(
            f"- {label(method)}: {runs.test_accuracy.mean():.2f} % (lowest seed {runs.test_accuracy.min():.2f} %)"
            f"{won}. It agrees with the teacher on {runs.agreement.mean():.2f} % of the test images."
        )
    if not np.isnan(kd):
        lines[0] += f" Vanilla KD on real images reaches {kd:.2f} %. The way from the one to the other is 100 %:"
    return Markdown("\n".join(lines))
