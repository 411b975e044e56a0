"""`ImageSet`: labelled images on the host, checked when made; saved and read with a checksum; split by class."""

import hashlib
import json
import lzma
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kdstudy.files import atomic_write, write_json

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
# an array larger than this that lay in a file a hundredth of its size is no image set but a trap for the memory
LARGE, MOST_COMPRESSED = 2**30, 100


class DataError(ValueError):
    """A data set that is missing, damaged or not what it should be; the message says what to do."""


def require_file_name(what: str, name: Any) -> None:
    """Raise ValueError unless a name can be a part of paths and commands without another meaning."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise ValueError(
            f"{what} becomes a file name: letters, digits, '_', '-', '.', at most 100, the first a letter or digit, "
            f"not {name!r}"
        )


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Training and test images with their labels, in memory.

    `x_*` (N, H, W, C) uint8, 0..255, with 1 to 4 channels; `y_*` (N,) of any integer type, kept as int64, in 0..K-1;
    `class_names` K strings, by default "0" to the largest training label. Arrays are kept contiguous and are not to be
    written to. Raises DataError unless all of that holds, train and test images agree in size and channels, there are
    two or more classes, and each of them occurs in the training labels.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        try:
            require_file_name("a data set's name", self.name)
        except ValueError as error:
            raise DataError(str(error)) from None
        try:
            self._check_and_store()
        except DataError as error:
            raise DataError(f"data set {self.name}: {error}") from None

    def _check_and_store(self) -> None:
        checked = {}
        for part in ("train", "test"):
            checked[f"x_{part}"] = images = _checked_images(f"x_{part}", getattr(self, f"x_{part}"))
            checked[f"y_{part}"] = labels = _checked_labels(f"y_{part}", getattr(self, f"y_{part}"))
            if len(images) != len(labels):
                raise DataError(f"x_{part} has {len(images)} images, but y_{part} has {len(labels)} labels")
        sizes = checked["x_train"].shape[1:], checked["x_test"].shape[1:]
        if sizes[0] != sizes[1]:
            raise DataError(f"x_train has (H, W, C) = {sizes[0]} and x_test {sizes[1]}; resize one to the other")
        checked["class_names"] = _checked_class_names(self.class_names, checked["y_train"], checked["y_test"])
        for field, value in checked.items():
            object.__setattr__(self, field, value)

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """How many channels an image has."""
        return self.x_train.shape[3]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.x_train.shape[1:3]

    @cached_property
    def checksum(self) -> str:
        """SHA-256 (hex) of names, types, shapes and little-endian bytes of the four arrays: the content, not a file."""
        digest = hashlib.sha256()
        for key in ARRAYS:
            array = getattr(self, key)
            digest.update(f"{key} {array.dtype.name} {array.shape}\n".encode())
            digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False))
        return digest.hexdigest()


def _checked_array(key: str, value: Any) -> np.ndarray:
    if not isinstance(value, np.ndarray) or value.dtype == object:
        found = "an array of Python objects" if isinstance(value, np.ndarray) else type(value).__name__
        raise DataError(f"{key} must be a plain numpy array, not {found}")
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise DataError(f"{key} holds values that are NaN or infinite; repair or drop those images")
    if not value.size:
        raise DataError(f"{key} is empty, shape {value.shape}; there must be at least one image")
    return value


def _checked_images(key: str, value: Any) -> np.ndarray:
    images = _checked_array(key, value)
    if images.dtype != np.uint8:
        raise DataError(
            f"{key} must be uint8, 0 to 255, not {images.dtype}; whole numbers in that range convert with "
            f"{key}.astype(np.uint8), numbers in 0 to 1 with np.rint({key} * 255).astype(np.uint8)"
        )
    if images.ndim != 4:
        hint = f"; give grey images a channel with {key}[..., np.newaxis]" if images.ndim == 3 else ""
        raise DataError(f"{key} must be (N, H, W, C), not of shape {images.shape}{hint}")
    if images.shape[3] > 4:
        raise DataError(
            f"{key} must be (N, H, W, C) with 1 to 4 channels, but shape {images.shape} has {images.shape[3]}; "
            f"if the channels come first, use {key}.transpose(0, 2, 3, 1)"
        )
    return np.ascontiguousarray(images)


def _checked_labels(key: str, value: Any) -> np.ndarray:
    labels = _checked_array(key, value)
    if labels.dtype.kind not in "iu":
        raise DataError(f"{key} must be integers, the index of each image's class, not {labels.dtype}")
    if labels.ndim != 1:
        raise DataError(f"{key} must be (N,), one label an image, not of shape {labels.shape}; try {key}.reshape(-1)")
    return np.ascontiguousarray(labels, dtype=np.int64)


def _checked_class_names(names: Any, y_train: np.ndarray, y_test: np.ndarray) -> tuple[str, ...]:
    if isinstance(names, np.ndarray) and (names.ndim != 1 or names.dtype.kind != "U"):
        raise DataError(f"class_names must be a list of strings, not {names.dtype} of shape {names.shape}")
    if not len(names) and y_train.max() >= len(y_train):
        raise DataError(
            f"y_train holds the label {y_train.max()}, but only {len(y_train)} images; number the classes without gaps "
            "from 0"
        )
    try:
        names = tuple(str(name) for name in names) or tuple(str(label) for label in range(y_train.max() + 1))
    except (ValueError, SystemError) as error:  # a character beyond Unicode's last; numpy lets Python say so
        raise DataError(f"class_names cannot be read: {error}") from None
    if len(names) < 2:
        raise DataError(f"there must be at least 2 classes, not {len(names)}")
    for key, labels in (("y_train", y_train), ("y_test", y_test)):
        if labels.min() < 0 or labels.max() >= len(names):
            raise DataError(
                f"{key} holds labels {labels.min()} to {labels.max()}, but with {len(names)} classes they must be "
                f"0 to {len(names) - 1}"
            )
    absent = np.flatnonzero(np.bincount(y_train, minlength=len(names)) == 0)
    if absent.size:
        listed = ", ".join(map(str, absent[:10])) + (", ..." if absent.size > 10 else "")
        raise DataError(f"no training image has label {listed}; number the classes without gaps from 0")
    return names


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per-channel mean and standard deviation of (N, H, W, C) uint8 on the 0..255 scale, each (C,) float64.

    Computed from exact integer sums, so equal on every machine. A constant channel gets the standard deviation 1.
    """
    histograms = np.zeros((images.shape[3], 256), np.int64)
    for block in _blocks(images):
        for channel, histogram in enumerate(histograms):
            histogram += np.bincount(block[..., channel].ravel(), minlength=256)
    values = np.arange(256)
    pixels = math.prod(images.shape[:3])
    mean, std = [], []
    for total, squares in zip((histograms @ values).tolist(), (histograms @ values**2).tolist(), strict=True):
        mean.append(total / pixels)
        std.append(math.sqrt(pixels * squares - total**2) / pixels or 1.0)
    return np.array(mean), np.array(std)


def _blocks(images: np.ndarray) -> Iterator[np.ndarray]:
    # bincount widens its input to int64, eight times the images, so it gets them in pieces
    for start in range(0, len(images), 1000):
        yield images[start : start + 1000]


def save_image_set(image_set: ImageSet, path: Path) -> None:
    """Write `path` (.npz, uncompressed) and beside it the card `path` with suffix .json, each atomically.

    Equal sets give equal bytes. The card holds what `read_card` returns.
    """
    path = Path(path)
    arrays = {key: getattr(image_set, key) for key in ARRAYS}
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays, class_names=np.array(image_set.class_names))
    mean, std = channel_statistics(image_set.x_train)
    card = {
        "name": image_set.name,
        "checksum": image_set.checksum,
        "train": len(image_set.y_train),
        "test": len(image_set.y_test),
        "image_size": list(image_set.image_size),
        "channels": image_set.channels,
        "mean": mean.tolist(),
        "std": std.tolist(),
        "class_names": list(image_set.class_names),
    }
    write_json(path.with_suffix(".json"), card)


def read_image_set(path: Path) -> ImageSet:
    """The set that `save_image_set` wrote at `path`, its checksum compared with the card's.

    Raises DataError if either file is missing, truncated or altered.
    """
    path = Path(path)
    card = read_card(path)
    image_set = ImageSet(name=card["name"], **read_arrays(path, _remedy(path)))
    if image_set.checksum != card["checksum"]:
        raise DataError(
            f"{path} has been altered: its checksum is {image_set.checksum}, but {path.with_suffix('.json').name} says "
            f"{card['checksum']}; {_remedy(path)}"
        )
    return image_set


def read_card(path: Path) -> dict[str, Any]:
    """What is known of the set at `path` (.npz) without its pixels, which may be absent.

    Keys: name, checksum, train and test (counts), image_size [H, W], channels, mean and std (of the training images, as
    in `channel_statistics`), class_names. Raises DataError if the card is missing or damaged.
    """
    card_path = Path(path).with_suffix(".json")
    try:
        card = json.loads(card_path.read_text(encoding="utf-8"))
        _check_card(card)
    except FileNotFoundError:
        raise DataError(f"{card_path} does not exist; {_remedy(card_path)}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{card_path} is truncated or altered ({error}); {_remedy(card_path)}") from None
    return card


def _check_card(card: Any) -> None:
    """Raise ValueError unless it is what `save_image_set` writes."""
    if not isinstance(card, dict) or not {"name", "checksum"} <= card.keys():
        raise ValueError("no name or checksum")
    require_file_name("its name", card["name"])
    channels, names = card.get("channels"), card.get("class_names")
    sizes = [card.get("train"), card.get("test"), channels]
    wrong = {
        "checksum": not isinstance(card["checksum"], str) or not re.fullmatch("[0-9a-f]{64}", card["checksum"]),
        "train, test or channels": not all(map(_is_size, sizes)),
        "image_size": not _is_list(card.get("image_size"), 2, _is_size),
        "mean": not _is_list(card.get("mean"), channels, _is_brightness),
        "std": not _is_list(card.get("std"), channels, lambda value: _is_brightness(value) and value > 0),
        "class_names": not _is_list(names, None, lambda name: isinstance(name, str)) or len(names) < 2,
    }
    if any(wrong.values()):
        raise ValueError(f"its {', its '.join(field for field, is_wrong in wrong.items() if is_wrong)} cannot be right")


def _is_list(value: Any, length: int | None, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and length in (None, len(value)) and all(map(holds, value))


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**63


def _is_brightness(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 255


def _remedy(path: Path) -> str:
    return f"`dvc repro data@{path.stem}` makes it again"


def read_arrays(path: Path, remedy: str) -> dict[str, np.ndarray]:
    """The arrays x_train, y_train, x_test, y_test and, where there is one, class_names of an .npz; others are ignored.

    Nothing is unpickled, and no array is made that its file does not hold. Raises DataError, ending in `remedy`, if the
    file or one of the four is missing or unreadable.
    """
    try:
        with open(path, "rb") as file:
            if file.read(6) == np.lib.format.MAGIC_PREFIX:
                raise ValueError("it holds a single array")
            with zipfile.ZipFile(file) as archive:
                members = _members(archive)
                arrays = {key: _read_array(archive, member) for key, member in members.items()}
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; {remedy}") from None
    except _UNREADABLE as error:
        raise DataError(f"{path} is truncated, altered or no .npz of plain arrays ({error}); {remedy}") from None
    absent = [key for key in ARRAYS if key not in arrays]
    if absent:
        raise DataError(f"{path} has no {', '.join(absent)}; it needs {', '.join(ARRAYS)}; {remedy}")
    return arrays


# what zipfile and numpy raise for damaged bytes, encrypted members, unknown compressions and sizes beyond the memory
_UNREADABLE = (
    *(OSError, ValueError, EOFError, RuntimeError, MemoryError, OverflowError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The members that hold the arrays. Raises ValueError for one that is there twice."""
    found = {}
    for key in (*ARRAYS, "class_names"):
        named = [member for member in archive.infolist() if member.filename == f"{key}.npy"]
        if len(named) > 1:
            raise ValueError(f"{key} is in it {len(named)} times")
        if named:
            found[key] = named[0]
    return found


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """An array of an .npz whose header and size agree. Raises one of `_UNREADABLE`."""
    if member.file_size > max(LARGE, MOST_COMPRESSED * member.compress_size):
        raise ValueError(f"{member.filename} would unfold from {member.compress_size:,} to {member.file_size:,} bytes")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        if dtype.hasobject:
            raise ValueError(f"Object arrays cannot be loaded: {member.filename} is a pickle, which is never run")
        if not dtype.itemsize or file.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
            raise ValueError(f"{member.filename} says {shape} of {dtype}, which its {member.file_size:,} bytes are not")
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def stratified_subset(labels: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Sorted int64 indices of `count` of the (N,) labels, in which each class has the share that it has in all.

    Remainders go to classes by Webster's method, so of one seed a smaller subset is part of every larger one.
    The choice within a class is random but the same on every machine. Raises ValueError unless 1 <= count <= N.
    """
    if not 1 <= count <= len(labels):
        raise ValueError(f"a subset of {len(labels)} images can have 1 to {len(labels)}, not {count}")
    # numpy promises the raw stream of a bit generator, but not what a Generator makes of it
    keys = np.random.PCG64(seed).random_raw(len(labels))
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        position[members[np.argsort(keys[members])]] = (np.arange(len(members)) + 0.5) / len(members)
    return np.sort(np.lexsort((keys, position))[:count])


def holdout_split(labels: np.ndarray, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(train, held out): sorted int64 indices that part the (N,) labels, `stratified_subset` being held out.

    Raises ValueError unless 1 <= size <= N - K for K classes, and if a class would have no training image left.
    """
    classes = len(np.unique(labels))
    if not 1 <= size <= len(labels) - classes:
        raise ValueError(
            f"of {len(labels)} images in {classes} classes 1 to {len(labels) - classes} can be held out, not {size}"
        )
    held_out = stratified_subset(labels, size, seed)
    train = np.setdiff1d(np.arange(len(labels)), held_out, assume_unique=True)
    lost = np.setdiff1d(labels, labels[train])
    if lost.size:
        raise ValueError(f"holding out {size} images leaves none of class {lost[0]} for training; hold out fewer")
    return train, held_out
