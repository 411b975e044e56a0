"""Runs of methods that read maps, on tiny networks with stages, in float64; and a study on disk, in float32."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from toy import CLASSES, make_bank, make_recipe, make_training, pictures

from kdstudy.core import Method, View
from kdstudy.device import data_path
from kdstudy.execute import Executor, open_ledger
from kdstudy.image_set import ImageSet, save_image_set
from kdstudy.models import build_model
from kdstudy.schemes import Batch, Offline, look
from kdstudy.store import Store

EPOCHS = 3


def network(name: str, seed: int = 0, classes: int = CLASSES) -> nn.Module:
    """A network for the toy images, whose batch statistics, scales and shifts have moved off their start."""
    torch.manual_seed(seed)
    module = build_model(name, classes=classes, image_size=(6, 5)).double()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
    module(torch.randn(32, 3, 6, 5, dtype=torch.float64))
    return module.eval()


def batch(count: int = 8) -> Batch:
    """The first of the toy images."""
    bank = make_bank(*pictures())
    return Batch(next(bank.plain(count)), bank.labels[:count])


def view(module: nn.Module, method: Method, images: Batch) -> View:
    """What the method sees of the network, without a gradient."""
    with torch.no_grad():
        return look(module, images, method.reads, None)


def scheme_for(method: Method, student: str = "wrn_10_0.25", teacher: str = "resnet8", sample: int = 8) -> Offline:
    """The method between two networks, sized by so many images."""
    return Offline(network(student), network(teacher, seed=1), method, batch(sample))


def teacher_of(scheme: Offline) -> nn.Module:
    """The network that teaches."""
    return scheme._teacher[0]


def run(scheme: Offline, **changes: Any) -> list[dict]:
    """The history of a run over 22 images in batches of 8, with evaluation after every epoch."""
    return make_training(scheme, make_recipe(**{"epochs": EPOCHS, "learning_rate": 0.02} | changes)).run()


def modes_in_a_run(scheme: Offline) -> list[tuple[str, set[str], set[str]]]:
    """Run, and for every batch give the phase and the modules that are in train mode, of scheme and of teacher."""
    seen = []
    losses = scheme.losses

    def recorded(phase, *arguments):
        modules = ([name for name, module in each.named_modules() if module.training] for each in pair)
        seen.append((phase.name, *map(set, modules)))
        return losses(phase, *arguments)

    pair = (scheme, teacher_of(scheme))
    scheme.losses = recorded
    run(scheme)
    return seen


def below(scheme: Offline, *names: str) -> set[str]:
    """Names of these modules of the scheme and of all in them."""
    return {name for name, _ in scheme.named_modules() for top in names if name == top or name.startswith(top + ".")}


def state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of parameters and buffers."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    """Names of parameters and buffers that are no longer what they were."""
    return {name for name, tensor in module.state_dict().items() if not torch.equal(before[name], tensor)}


@contextmanager
def study(folder: Path, teacher: str, student: str, methods: Mapping[str, Any], **setting: Any) -> Iterator[Executor]:
    """The executor of a study of one setting, "mine": 60 and 30 random images of 8 x 8 pixels, two seeds, one epoch.

    Its files are in `folder`, which is the current one until the context is left.
    """
    recipe = {"epochs": 1, "batch": 16, "learning_rate": 0.05, "crop_padding": 1, "flip": False, "precision": "fp32"}
    pair = {"profile": "quick", "dataset": "mine", "teacher": teacher, "student": student}
    tree = {
        "profiles": {"quick": {"device": "cpu", "threads": 1, "workers": 1}},
        "datasets": {"mine": {"source": "npz", "validation": 12}},
        "recipes": {"short": recipe},
        "settings": {"mine": {**pair, "recipe": "short", "seeds": [0, 1], **setting}},
        "methods": dict(methods),
        "grids": {},
    }
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), np.uint8)
    labels = np.arange(60) % 3
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("KDSTUDY_DEVICE", raising=False)
        Path("params.yaml").write_text(yaml.safe_dump(tree))
        save_image_set(ImageSet("mine", pixels, labels, pixels[30:], labels[30:]), data_path("mine"))
        yield Executor(open_ledger(store=Store(Path("store"), Path("runs"))), "mine")
