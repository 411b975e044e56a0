"""Writes that a kill cannot tear, and errors that name the nearest known word."""

import difflib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to the disk and renamed over `path`.

    Whoever reads `path` sees the old file or the whole new one. Raises OSError with the folder's name if it cannot be
    written to; on any error the temporary file is removed and `path` stays as it was.
    """
    path = Path(path)
    temporary = _temporary_beside(path)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.filename is not None:
            raise
        # as from a write: the system does not say where
        raise type(error)(error.errno, f"cannot write into this folder ({error.strerror})", str(path.parent)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _temporary_beside(path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.torn-", suffix=path.suffix)
    except OSError as error:
        raise type(error)(error.errno, f"cannot write into this folder ({error.strerror})", str(path.parent)) from None
    os.close(handle)
    os.chmod(name, 0o666 & ~_umask())
    return Path(name)


def remove_torn_writes(folder: Path) -> None:
    """Remove what a killed `atomic_write` left in a folder. Only for whoever alone writes there at the moment."""
    for path in folder.glob(".*.torn-*"):
        path.unlink(missing_ok=True)


def is_locked(path: Path) -> bool:
    """Whether a process holds this lock file. Nothing is written, and a file that is not there is not held."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none, or it cannot be asked
        return False
    return False


def require_writable(folder: Path) -> None:
    """Make the folder if need be. Raises OSError with its name unless files can be written into it."""
    _temporary_beside(Path(folder) / "probe").unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    # a rename is durable only when the folder that holds the name is
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with `\\n` line ends, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN is refused: JSON has none."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error to raise for a name that is not known: it suggests the nearest one and lists all.

    `kind` says what is named ("model", "method", "profile").
    """
    known = [str(word) for word in known]
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ValueError(f"unknown {kind} {name!r}; {hint}known: {', '.join(known)}")
