"""Weights as safetensors, and checkpoints from which a run goes on exactly."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from kdstudy.files import atomic_write


class BadFile(ValueError):
    """A weights or checkpoint file that cannot be used; the message says which and why."""


def save_weights(module: nn.Module, path: Path) -> None:
    """Write a module's parameters and buffers, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary)


def load_weights(module: nn.Module, path: Path) -> None:
    """Load weights into a module of the same architecture. Raises BadFile for an absent or torn file, or another's."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadFile(f"weights {path} cannot be read: {error}") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        raise BadFile(f"weights {path} belong to another network: {_first_difference(wanted, found)}")
    module.load_state_dict(tensors)


def _first_difference(wanted: dict[str, tuple], found: dict[str, tuple]) -> str:
    for name in wanted | found:
        if wanted.get(name) != found.get(name):
            return f"{name} is {_shape(found.get(name))} in the file and {_shape(wanted.get(name))} in the network"
    raise AssertionError("the two are equal")


def _shape(shape: tuple | None) -> str:
    return "absent" if shape is None else f"of shape {shape}"


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a nested dict of tensors, numbers and strings, atomically."""
    with atomic_write(path) as temporary:
        torch.save(_without_neighbours(state), temporary)


def _without_neighbours(value: Any) -> Any:
    """The same with tensors that are part of a larger memory copied out of it, which torch would write whole."""
    if isinstance(value, torch.Tensor):
        return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
    if isinstance(value, dict):
        return {name: _without_neighbours(part) for name, part in value.items()}
    return [_without_neighbours(part) for part in value] if isinstance(value, list) else value


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The state that `save_checkpoint` wrote, None if there is no file. No code in it is ever run.

    Raises BadFile if the file is torn or is no checkpoint.
    """
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums but does not compare them when it loads
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} is damaged")
        state = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}")
    except Exception as error:  # damaged bytes make zipfile, torch and the unpickler raise nearly anything
        raise BadFile(f"checkpoint {path} cannot be read: {error}; remove it to start the run anew") from error
    return state
