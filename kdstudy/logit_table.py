"""The teacher's logits on every view that crop and flip can make of a set of images, so that it need not run again."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kdstudy.checkpoint import BadFile, told_if_full
from kdstudy.core import Method, require_whole
from kdstudy.data import ImageBank
from kdstudy.evaluate import evaluating
from kdstudy.files import atomic_write
from kdstudy.schemes import forward

STORED = torch.float16  # bfloat16 has three binary digits fewer
TOLERANCE = 1e-3  # what rounding may change a row of logits by, relative to its largest magnitude
TENSOR = "logits"


@dataclass(frozen=True, eq=False)
class LogitTable:
    """A frozen network's logits on all crops and mirrorings of N images.

    `values` (N, 2 padding + 1, 2 padding + 1, 1 or 2, C) float16 are on the device of the images, `dtype` is that of
    the answers, and `precision` says in what the network computed. No row differs from what the network said by more
    than `TOLERANCE` of the row's largest magnitude, and its largest logit is that of the same class.
    """

    values: Tensor
    dtype: torch.dtype
    precision: str

    @classmethod
    def build(
        cls,
        teacher: nn.Module,
        bank: ImageBank,
        *,
        flip: bool,
        half: torch.dtype | None,
        batch: int = 1000,
        tell: Callable[[int, int], None] = lambda done, total: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Self | None:
        """Ask the teacher, in eval mode and under autocast to `half` if given, for `batch` views at a time.

        Its modes are restored and its batch statistics stay. `tell` hears how many views of how many are done.
        Returns None if `should_stop` says so before the end. Raises ValueError if float16 cannot hold the logits within
        `TOLERANCE`: they are not finite, beyond 65504, or a whole row is nearly 0. Nothing is clamped.
        """
        require_whole("batch", batch)
        shape = _shape(len(bank), bank.padding, flip)

        def ask(start: int, stop: int) -> Tensor:
            views = torch.arange(start, stop, device=bank.labels.device)
            index, down, right, mirrored = torch.unravel_index(views, shape)
            images = bank.augmented(index, torch.stack((down, right), dim=1), mirrored.bool())
            return forward(teacher, images, half).logits

        total = math.prod(shape)
        with evaluating(teacher):
            first = ask(0, 1)
            values = first.new_empty((*shape, first.shape[1]), dtype=STORED)
            rows = values.flatten(end_dim=-2)
            worst = torch.zeros((), device=values.device)
            # in the order of storage, an image's views side by side: all batches are full and all writes contiguous
            for start in range(0, total, batch):
                if should_stop():
                    return None
                stop = min(start + batch, total)
                logits = ask(start, stop)
                rows[start:stop] = _rounded(logits)
                worst = torch.maximum(worst, _change(rows[start:stop], logits))
                tell(stop, total)
        if not worst <= TOLERANCE:  # nor is NaN
            raise ValueError(
                f"the teacher's logits do not fit a table of half precision: it changes a row by {worst:.1e} of its "
                f"largest magnitude, and {TOLERANCE} is allowed; let the teacher run beside the students"
            )
        return cls(values, bank.mean.dtype, _precision(bank, half))

    def answers(self, index: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
        """The logits (B, C) of the views that `ImageBank.augmented` makes of the same arguments.

        Pure tensor work. A view that the table lacks raises IndexError on the CPU, as does a flip in a table without.
        """
        return self.values[index, shift[:, 0], shift[:, 1], flip.long()].to(self.dtype)

    def save(self, path: Path, *, teacher: str, data: str) -> None:
        """Write the table, atomically. `teacher` and `data` name the network and the images, in their order.

        Raises OSError naming the folder if the disk is full.
        """
        images, shifts, _, flips, _ = self.values.shape
        values = self.values.cpu()
        described = _description(teacher, data, images, shifts // 2, flips == 2, self.precision)
        with told_if_full(path.parent), atomic_write(path) as temporary:
            save_file({TENSOR: values}, temporary, metadata=described | {"sha256": _checksum(values)})

    @classmethod
    def load(
        cls, path: Path, bank: ImageBank, *, teacher: str, data: str, flip: bool, half: torch.dtype | None
    ) -> Self:
        """The table that `build` would make for these arguments and `save` wrote, on the device of the bank.

        Raises BadFile if the file is absent, damaged, no table, or one of another teacher, data or precision.
        """
        precision = _precision(bank, half)
        wanted = _description(teacher, data, len(bank), bank.padding, flip, precision)
        try:
            with safe_open(path, framework="pt") as file:
                found, values = file.metadata() or {}, file.get_tensor(TENSOR)
        except (OSError, SafetensorError) as error:
            raise BadFile(f"logit table {path} cannot be read: {error}; remove it to have it made again") from error
        for name, value in wanted.items():
            if found.get(name) != value:
                raise BadFile(f"logit table {path} is another: {name} {found.get(name)!r}, not {value!r}")
        whole = values.dtype == STORED and values.shape[:-1] == _shape(len(bank), bank.padding, flip)
        if not whole or found.get("sha256") != _checksum(values):
            raise BadFile(f"logit table {path} is damaged; remove it to have it made again")
        return cls(values.to(bank.labels.device), bank.mean.dtype, precision)


def views_of(padding: int, flip: bool) -> int:
    """How many views crop and flip make of an image: 162 for a padding of 4 with flips."""
    return math.prod(_shape(1, padding, flip))


def bytes_needed(images: int, classes: int, padding: int, flip: bool) -> int:
    """The size of a table in memory."""
    return images * views_of(padding, flip) * classes * STORED.itemsize


def pays(passes: int, *, images: int, classes: int, padding: int, flip: bool, memory: int) -> bool:
    """Whether a table takes less of the teacher's time than doing without, and no more than `memory` bytes.

    `passes` is how often the teacher would otherwise be taken over the images: the epochs of all runs that it teaches,
    those of a cohort once.
    """
    return views_of(padding, flip) < passes and bytes_needed(images, classes, padding, flip) <= memory


def reads_logits_only(method: Method) -> bool:
    """Whether a table can stand for a frozen teacher that sees the usual augmented images."""
    return set(method.reads) <= {"logits", "indices", "census"}


def _shape(images: int, padding: int, flip: bool) -> tuple[int, int, int, int]:
    return images, 2 * padding + 1, 2 * padding + 1, 1 + flip


def _precision(bank: ImageBank, half: torch.dtype | None) -> str:
    return str(half or bank.mean.dtype).removeprefix("torch.")


def _rounded(logits: Tensor) -> Tensor:
    """(B, C) in float16. A row whose largest logit would tie with another's is not rounded to nearest, but apart."""
    nearest = logits.to(STORED)
    top = logits.argmax(dim=1, keepdim=True)
    tied = nearest.argmax(dim=1, keepdim=True) != top
    lost = logits - nearest
    wanted = torch.full_like(lost, -1).scatter(1, top, 1)  # the largest goes up, all others down
    # one bit pattern on is one number further from zero
    step = torch.where(tied & (lost * wanted > 0), wanted * nearest.sign(), 0).to(torch.int16)
    return (nearest.view(torch.int16) + step).view(STORED)


def _change(stored: Tensor, logits: Tensor) -> Tensor:
    """The largest difference of two (B, C), relative to the largest magnitude of its row of `logits`; a scalar."""
    largest = logits.abs().amax(dim=1).clamp(min=torch.finfo(logits.dtype).tiny)  # a row of zeros is kept exactly
    return ((stored - logits).abs().amax(dim=1) / largest).max()


def _description(teacher: str, data: str, images: int, padding: int, flip: bool, precision: str) -> dict[str, str]:
    described = {"teacher": teacher, "data": data, "images": images, "padding": padding, "flip": flip}
    return {name: str(value) for name, value in described.items()} | {"precision": precision}


def _checksum(values: Tensor) -> str:
    return hashlib.sha256(values.numpy()).hexdigest()
