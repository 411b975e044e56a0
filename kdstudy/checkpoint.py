"""Weights as safetensors, and checkpoints from which a run goes on exactly."""

import errno
import hashlib
import io
import os
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as as_safetensors
from torch import Tensor, nn

from kdstudy.files import atomic_write

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class BadFile(ValueError):
    """A weights or checkpoint file that cannot be used; the message says which and why."""


def save_weights(module: nn.Module, path: Path) -> None:
    """Write a module's parameters and buffers, atomically. Raises OSError naming the folder if the disk is full."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    with told_if_full(path.parent), atomic_write(path) as temporary:
        temporary.write_bytes(as_safetensors(tensors))


def load_weights(module: nn.Module, path: Path) -> None:
    """Load weights into a module of the same architecture. Raises BadFile for an absent or torn file, or another's."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadFile(f"weights {path} cannot be read: {error}; remove them to have the run made again") from error
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


def file_checksum(path: Path) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a nested dict of tensors, numbers and strings, atomically, and keep the one before as the previous.

    At every moment, also when the power fails, one of the two is whole. Raises OSError naming the folder if the disk is
    full; then both are as they were.
    """
    content = io.BytesIO()  # torch's writer to a disk hides that it is full behind errors of its own
    torch.save(_without_neighbours(state), content)
    previous = previous_checkpoint(path)
    with told_if_full(path.parent), ExitStack() as stack:
        if path.exists():  # takes the previous one's place only after the new one is at its own
            _link_or_copy(path, stack.enter_context(atomic_write(previous)))
        else:
            previous.unlink(missing_ok=True)  # of a run that was to start anew
        with atomic_write(path) as temporary:
            temporary.write_bytes(content.getbuffer())


def previous_checkpoint(path: Path) -> Path:
    """Where the checkpoint before the last one is: `checkpoint.previous.pt` for `checkpoint.pt`."""
    return path.with_stem(f"{path.stem}.previous")


def remove_checkpoint(path: Path) -> None:
    """Remove the last checkpoint and the one before, if there are any."""
    previous_checkpoint(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _link_or_copy(source: Path, target: Path) -> None:
    """Put the file under another name, in the place of the one that is there; on some file systems, as a copy."""
    target.unlink()
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def told_if_full(folder: Path) -> Iterator[None]:
    """Inside, a full disk, by whatever library it is met, raises an OSError that says so and names the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if number not in FULL_DISK and not any(f"os error {each}" in str(error) for each in FULL_DISK):
            raise
        words = "the disk is full; what was saved before is as it was: make room and go on"
        raise OSError(number or errno.ENOSPC, words, str(folder)) from error


def _without_neighbours(value: Any) -> Any:
    """The same with tensors that are part of a larger memory copied out of it, which torch would write whole."""
    if isinstance(value, Tensor):
        return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
    if isinstance(value, dict):
        return {name: _without_neighbours(part) for name, part in value.items()}
    return [_without_neighbours(part) for part in value] if isinstance(value, list) else value


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The state that `save_checkpoint` wrote last, None if there is no file. No code in it is ever run.

    If the file is torn, the state before, with a warning. Raises BadFile if that is torn, too, or absent.
    """
    if not path.exists():
        return None
    try:
        return _read(path, device)
    except BadFile as torn:
        previous = previous_checkpoint(path)
        if not previous.exists():
            raise BadFile(f"checkpoint {torn}; remove it to start the run anew") from torn
        try:
            state = _read(previous, device)
        except BadFile as also_torn:
            raise BadFile(f"checkpoint {torn}; and {also_torn}; remove both to start the run anew") from torn
        warnings.warn(f"checkpoint {torn}; the run goes on from the one before, {previous}", stacklevel=2)
        return state


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums but does not compare them when it loads
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} is damaged")
        state = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}")
    except (MemoryError, torch.OutOfMemoryError):  # the file may be whole
        raise
    except UnpicklingError as error:  # torch's own words tell how to run the code in it
        raise BadFile(f"{path} cannot be read: it is torn, or holds more than tensors, numbers and text") from error
    except Exception as error:  # damaged bytes make zipfile, torch and the unpickler raise nearly anything
        raise BadFile(f"{path} cannot be read: {error}") from error
    return state


def misfit(found: Any, wanted: Any, place: str = "") -> str | None:
    """Where a value that was read from a file is not made as it should be, in words; None if nowhere.

    `wanted` is a type or several, of which it must be exactly one; a tensor, whose dtype and shape it must have; a list
    of one of these, for any number of values; or a dict of these by name, where `str` stands for all other names.
    """
    if wanted is object:
        return None
    if isinstance(wanted, dict) and isinstance(found, dict):
        return _misfit_by_name(found, wanted, place)
    if isinstance(wanted, list) and type(found) is list:
        parts = (misfit(value, wanted[0], f"{place}[{number}]") for number, value in enumerate(found))
        return next(filter(None, parts), None)
    if isinstance(wanted, Tensor):
        fits = isinstance(found, Tensor) and (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    else:
        fits = type(found) in (wanted if isinstance(wanted, tuple) else (wanted,))
    return None if fits else f"{place} is {_make(found)}, not {_make(wanted)}"


def _misfit_by_name(found: dict, wanted: dict, place: str) -> str | None:
    places = {name: f"{place}.{name}" if place else str(name) for name in wanted | found}
    for name in wanted:
        if name is not str and name not in found:
            return f"{places[name]} is absent"
    for name, value in found.items():
        if name not in wanted and (str not in wanted or not isinstance(name, str)):
            return f"{places[name]} is unknown"
        if wrong := misfit(value, wanted.get(name, wanted.get(str)), places[name]):
            return wrong
    return None


def _make(value: Any) -> str:
    """What a value, or one that is wanted, is made as."""
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    if isinstance(value, tuple):
        return " or ".join(map(_make, value))
    return (value if isinstance(value, type) else type(value)).__name__
