"""How a run was made: code, versions, device and command, as its record tells.

torch is imported where it is asked, so that a command which only starts others is quick.
"""

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

COMMAND = "KDSTUDY_COMMAND"  # names the command for processes that it starts
SOURCES = Path(__file__).parent


def session(device: "torch.device") -> dict[str, Any]:
    """What is to be said of a sitting that begins now on this device."""
    return {
        "started": now(),
        "command": command(),
        "commit": commit(),
        "code": code(),
        "device": device_name(device),
        "platform": f"{platform.system()} {platform.machine()}",
        **versions(),
    }


def now() -> str:
    """The time, in UTC to the second, as ISO 8601 writes it. Nothing depends on it: clocks are set."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def device_name(device: "torch.device") -> str:
    """The GPU's name, or "cpu (x86_64)"."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


@cache
def versions() -> dict[str, str | None]:
    """Of what results depend on; None for what is not there."""
    import numpy
    import torch
    import torchvision

    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # it is of a class of its own
        "torchvision": str(torchvision.__version__),
        "numpy": numpy.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "cudnn": str(cudnn) if cudnn else None,
    }


def tell_command(words: list[str]) -> None:
    """Note, for this process and those that it starts, the words after `python -m kdstudy`."""
    os.environ[COMMAND] = shlex.join(["python", "-m", "kdstudy", *map(_without_folder, words)])


def command() -> str:
    """The command that runs were made by, without the folders of the machine."""
    return os.environ.get(COMMAND) or shlex.join(["python", *map(_without_folder, sys.argv)])


def _without_folder(word: str) -> str:
    name, separator, path = word.rpartition("=")
    return f"{name}{separator}{Path(path).name}" if Path(path).is_absolute() else word


@cache
def code() -> str:
    """Digest of the package's sources, 16 hexadecimal digits: equal where the code is, whatever git says."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.py")):
        digest.update(f"{path.name}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


@cache
def commit() -> str:
    """The commit of the code that runs, with "+" if the tree has changes; KDSTUDY_COMMIT where there is no git."""
    try:
        head = _git("rev-parse", "HEAD")[:12]
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "kdstudy", "params.yaml")
        return head + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("KDSTUDY_COMMIT", "unknown")


def _git(*arguments: str) -> str:
    here = SOURCES.parent
    return subprocess.run(["git", *arguments], cwd=here, check=True, capture_output=True, text=True).stdout.strip()
