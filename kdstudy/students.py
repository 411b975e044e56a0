"""What students see, and compute with, that are not simply smaller networks: other inputs, 8-bit integers, a tree."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from itertools import islice

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown
from torch import Tensor, nn

from kdstudy.answers import load_trained
from kdstudy.data import Draws
from kdstudy.device import DataOnDevice
from kdstudy.evaluate import logits_of, score
from kdstudy.files import write_json
from kdstudy.image_set import ImageSet
from kdstudy.lesson import table
from kdstudy.modalities import MODALITIES
from kdstudy.models import build_model, count_parameters
from kdstudy.quantisation import QuantisedNet, Savings, calibrate, measure
from kdstudy.results import Ledger
from kdstudy.statistics import paired_difference
from kdstudy.study import Planner, RunSpec
from kdstudy.tables import label
from kdstudy.trees import DecisionTree, Node, first_nodes

PLAIN = "as it is"
TITLES = {PLAIN: "as it is", "grey": "grey", "edges": "edges", "low": "half size"}
PAIRS = {PLAIN: ("ce", "kd")} | {name: (f"{name}_ce", name) for name in MODALITIES}  # labels alone, and with a teacher
BITS = (8, 6, 5, 4, 3, 2)
CALIBRATED = 20  # batches that set the grids of a network which is not trained
AT_ONCE = 32  # images of the batch that latency is measured on
# the fastest algorithm may be another one each time, and the last bits with it
repeatable = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)


def inputs_table(planner: Planner, setting: str, images: ImageSet) -> Markdown:
    """What a student of each input gets, how many parameters it has, and what an image takes it."""
    student = planner.setting(setting).student
    names = {PLAIN: student} | {name: f"{student}@{name}" for name in _other_inputs(images)}
    rows = [(TITLES[name], f"`{network}`", *_size(network, images)) for name, network in names.items()]
    return table(
        pd.DataFrame(rows, columns=["input", "network", "values", "parameters", "multiply-adds"]), floatfmt=",.0f"
    )


def _other_inputs(images: ImageSet) -> list[str]:
    """The modalities that differ from the images: of those of one channel, grey does not."""
    if images.channels not in (1, 3):
        return []
    return [name for name in MODALITIES if images.channels == 3 or name != "grey"]


def _size(network: str, images: ImageSet) -> tuple[str, str, str]:
    module = build_model(network, classes=images.classes, channels=images.channels, image_size=images.image_size)
    one = torch.zeros(1, images.channels, *images.image_size)
    shape = getattr(module, "modality", nn.Identity())(one).shape[1:]
    return " x ".join(map(str, shape)), f"{count_parameters(module):,}", f"{multiply_adds(module, one):,}"


@torch.no_grad()
def multiply_adds(network: nn.Module, image: Tensor) -> int:
    """How many products the convolutions and linear layers of a network add up for one image (1, C, H, W)."""
    counts = []

    def count(layer: nn.Module, given: tuple, out: Tensor) -> None:
        counts.append(out.numel() * layer.weight[0].numel())

    layers = [layer for layer in network.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    network.eval()(image)
    for hook in hooks:
        hook.remove()
    return sum(counts)


def modalities(data: DataOnDevice, spec: RunSpec, count: int = 10) -> dict[str, tuple[np.ndarray, list[str]]]:
    """The first crops of a run as images (N, H, W, C) uint8 with their labels, as they are and in every modality.

    As they are they have their own colours; a modality is stretched over all grey levels, the same for all its images.
    """
    bank = data.training(spec.held_out, spec.recipe, spec.images)
    augmentation = {"padding": spec.recipe.crop_padding, "flip": spec.recipe.flip}
    draws = Draws.make(seed=spec.seed, stream=0, epochs=1, images=len(bank), device=data.device, **augmentation)
    drawn = draws.batch(draws.rows(0, 0, count))
    crops = bank.augmented(*drawn).double()
    names = [data.images.class_names[label] for label in bank.labels[drawn[0]].tolist()]
    mean, std = (torch.as_tensor(each, device=data.device).view(-1, 1, 1) for each in (data.mean, data.std))
    rows = {"what the teacher sees": (_bytes(crops * std + mean), names)}
    for name in _other_inputs(data.images):
        rows[TITLES[name]] = _stretched(MODALITIES[name]()(crops)), [""] * count
    return rows


def _bytes(pixels: Tensor) -> np.ndarray:
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _stretched(values: Tensor) -> np.ndarray:
    low, high = values.amin(), values.amax()
    return _bytes(255 * (values - low) / (high - low))


def savings(ledger: Ledger, spec: RunSpec, data: DataOnDevice) -> Savings:
    """`quantisation.measure` of a quantised run beside the network that it was made of, on test images.

    Measured once: it is kept beside the run's weights, so that a page made again shows the same times. Raises
    FileNotFoundError if the weights are not on this machine.
    """
    path = ledger.store.weights(spec.id).with_name("savings.json")
    if not path.exists():
        full, quantised = load_trained(ledger, spec.teacher, data), load_trained(ledger, spec, data)
        images = next(iter(data.watched(0, spec.recipe)["test"].plain(AT_ONCE)))
        write_json(path, asdict(measure(full, quantised, images)))
    return Savings(**json.loads(path.read_text(encoding="utf-8")))


def savings_table(found: Savings, ledger: Ledger, spec: RunSpec) -> Markdown:
    """Size, time and accuracy of a network in full precision and in integers."""
    accuracies = [ledger.store.record(each)["scores"]["test_accuracy"] for each in (spec.teacher, spec)]
    names = (f"`{spec.teacher.network}`, full precision", f"`{spec.network}`, in integers")
    sizes, seconds = (found.full_bytes, found.int8_bytes), (found.full_seconds, found.int8_seconds)
    rows = [
        (name, f"{size:,}", 1000 * time, accuracy)
        for name, size, time, accuracy in zip(names, sizes, seconds, accuracies, strict=True)
    ]
    heads = ["network", "file (bytes)", f"{AT_ONCE} images (ms)", "test accuracy (%)"]
    caption = f"Size, time on one CPU thread (median) and accuracy, seed {spec.seed}"
    return table(pd.DataFrame(rows, columns=heads), caption)


def savings_reading(found: Savings) -> Markdown:
    """What integers save."""
    size, time = found.int8_bytes / found.full_bytes, found.int8_seconds / found.full_seconds
    return Markdown(
        f"- The file is {100 * size:.0f} % as large as in full precision, and a batch takes {100 * time:.0f} % of the "
        "time.\n- Integers, and the floats on their grids on which the accuracy is measured, name the same class for "
        f"{found.agreement:.0f} % of these images."
    )


@repeatable
def untrained_bits(ledger: Ledger, spec: RunSpec, data: DataOnDevice) -> dict[int, float]:
    """Test accuracy (percent) of the network that a quantised run was made of, rounded to so many bits, not trained.

    Grids are set from some training images. Raises FileNotFoundError if the weights are not on this machine.
    """
    full, test = load_trained(ledger, spec.teacher, data), data.watched(0, spec.recipe)["test"]
    accuracies = {}
    for bits in BITS:
        rounded = QuantisedNet(full, bits).to(data.device)
        batches = data.training(spec.held_out, spec.recipe).plain(spec.recipe.batch)
        calibrate(rounded, islice(batches, CALIBRATED))
        accuracies[bits] = score(logits_of(rounded, test), test.labels).accuracy
    return accuracies


def tree_nodes(ledger: Ledger, spec: RunSpec, data: DataOnDevice, levels: int = 3) -> list[Node]:
    """The first levels of a fitted tree, with the training images that come by and their teacher's probabilities.

    Raises FileNotFoundError if weights are not on this machine.
    """
    tree, teacher = load_trained(ledger, spec, data), load_trained(ledger, spec.teacher, data)
    bank = data.training(spec.held_out, spec.recipe, spec.images)
    targets = logits_of(teacher, bank).softmax(dim=1)
    return first_nodes(tree, torch.cat(list(bank.plain(500))), targets, levels)


def trees_table(ledger: Ledger, specs: Mapping[str, RunSpec], data: DataOnDevice) -> Markdown:
    """Trees beside each other: how many questions and leaves they have, their accuracy and their fidelity."""
    rows = [(f"`{row}`", label(row), *_shape(ledger, spec, data)) for row, spec in specs.items()]
    heads = ["row", "called", "splits", "questions an image", "test accuracy (%)", "fidelity (%)"]
    return table(pd.DataFrame(rows, columns=heads), floatfmt=("", "", "", ".2f", ".2f", ".2f"))


def _shape(ledger: Ledger, spec: RunSpec, data: DataOnDevice) -> tuple[int, float, float, float]:
    tree, scores = load_trained(ledger, spec, data), ledger.store.record(spec)["scores"]
    test = torch.cat(list(data.watched(0, spec.recipe)["test"].plain(500)))
    return int(tree.threshold.isfinite().sum()), questions(tree, test), scores["test_accuracy"], scores["agreement"]


def questions(tree: DecisionTree, images: Tensor) -> float:
    """How many splits an image comes by, in the mean."""
    on_the_way = tree.path(images)[:, :-1]
    return tree.threshold[on_the_way].isfinite().sum(dim=1).double().mean().item()


def _by_seed(results: pd.DataFrame, setting: str, column: str = "test_accuracy") -> dict[str, pd.Series]:
    final = results[(results.setting == setting) & (results.purpose == "final") & (results.status == "finished")]
    return {row: runs.set_index("seed")[column] for row, runs in final.groupby("method", sort=False)}


def inputs_reading(results: pd.DataFrame, setting: str) -> Markdown:
    """What another input costs a student, and what a teacher who sees the image gives back of that."""
    scores, lines = _by_seed(results, setting), []
    for name, (alone, taught) in PAIRS.items():
        if alone not in scores or taught not in scores:
            continue
        gain = paired_difference(scores[taught], scores[alone])[0].mean
        text = f"{TITLES[name].capitalize()}: {scores[alone].mean():.2f} % by labels alone, {gain:+.2f} by the teacher"
        if name != PLAIN and "ce" in scores:
            lost = -paired_difference(scores[alone], scores["ce"])[0].mean
            text += f". The input costs {lost:.2f} points" if lost > 0 else ". The input costs nothing"
            text += f", of which the teacher gives back {100 * gain / lost:.0f} %" if lost > 0 and gain > 0 else ""
        lines.append(f"- {text}.")
    return Markdown("\n".join(lines) or "- No student of this setting sees another input.")


def trees_reading(results: pd.DataFrame, setting: str) -> Markdown:
    """What a tree gains from the teacher's targets: right answers, and answers like the teacher's."""
    accuracy, fidelity = (_by_seed(results, setting, column) for column in ("test_accuracy", "agreement"))
    if not {"tree", "tree_labels"} <= accuracy.keys():
        return Markdown("- No trees have been grown.")
    gains = [paired_difference(each["tree"], each["tree_labels"])[0] for each in (accuracy, fidelity)]
    right, alike = (gain.mean for gain in gains)
    return Markdown(
        f"- On the teacher's targets a tree gets {accuracy['tree'].mean():.2f} % of test images right, {right:+.2f} "
        f"points against the same tree on labels (n = {gains[0].n}).\n"
        f"- It says what the teacher says on {fidelity['tree'].mean():.2f} % of them, {alike:+.2f} points."
    )
