"""A data set by name: scikit-learn's digits, CIFAR-10 and CIFAR-100 from torchvision or a copy, a user's own `.npz`."""

import gzip
import hashlib
import io
import os
import socket
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np

from kdstudy.files import atomic_write, unknown_name
from kdstudy.image_set import DataError, ImageSet, holdout_split, read_arrays

KINDS = ("digits", "cifar10", "cifar100", "npz")
ENVIRONMENT_VARIABLE = "KDSTUDY_DATA"
STALL_SECONDS = 60.0
MOST_UNPACKED = 2**28  # bytes of an archive; those of CIFAR have 187 million

# training images, test images, classes; each class has the same number of both
CIFAR_COUNTS = {"cifar10": (50_000, 10_000, 10), "cifar100": (50_000, 10_000, 100)}
# `ImageSet.checksum` of the official files, taken when their MD5 sums had passed; CIFAR-10's is not known here
CIFAR_CHECKSUMS = {"cifar100": "1638bddff52995f84a450c0f0c0d8adfc37600f96f934473ffa064911348ec26"}


def load_source(
    name: str,
    kind: str,
    location: str | Path | None = None,
    download: bool = True,
    download_folder: str | Path = "data/download",
    progress: Callable[[str], None] = print,
) -> ImageSet:
    """The data set `name` of a kind in `KINDS`; `progress` is told where it came from, its size and its checksum.

    "digits" is `digits`. "npz" is the user's own file. "cifar10" and "cifar100" are downloaded by torchvision into
    `download_folder`, unless they are there or `location` names a copy. `location`, or else the environment variable
    KDSTUDY_DATA, is an `.npz` (keys of `ImageSet`; class_names optional) or a folder that holds <name>.npz (<kind>.npz
    for CIFAR) or, for CIFAR, the unpacked official folder. Where one is named nothing is downloaded.

    Raises ValueError for an unknown kind, DataError for a set that is missing, damaged or not what `kind` says.
    """
    if kind not in KINDS:
        raise unknown_name("kind of data set", kind, KINDS)
    named = location or os.environ.get(ENVIRONMENT_VARIABLE)
    place = Path(named).expanduser() if named else None
    if kind == "digits":
        if location:
            raise DataError(f"data set {name}: digits come with scikit-learn; take the location {location} away")
        image_set, origin = digits(name), "scikit-learn"
    elif kind == "npz":
        image_set, origin = _own_npz(name, place)
    else:
        image_set, origin = _cifar(name, kind, place, download, Path(download_folder))
    progress(f"{name}: {_size(image_set)}, checksum {image_set.checksum}, from {origin}")
    return image_set


def _size(image_set: ImageSet) -> str:
    shape = "x".join(map(str, (*image_set.image_size, image_set.channels)))
    train, test = len(image_set.y_train), len(image_set.y_test)
    return f"{train:,} training and {test:,} test images of {shape} in {image_set.classes} classes"


def digits(name: str = "digits") -> ImageSet:
    """scikit-learn's 1,797 grey scans of handwritten digits, 8x8; a fixed stratified half, 898, is for testing.

    The scans have values v of 0 to 16, stored as 255 v / 16, rounded to the nearest and halves up.
    """
    from sklearn.datasets import load_digits

    scans = load_digits()
    images = np.floor(scans.images * (255 / 16) + 0.5).astype(np.uint8)[..., np.newaxis]
    train, test = holdout_split(scans.target, len(images) // 2)
    return ImageSet(name, images[train], scans.target[train], images[test], scans.target[test])


def _own_npz(name: str, place: Path | None) -> tuple[ImageSet, str]:
    if place is None:
        raise DataError(
            f"data set {name}: name its .npz, or the folder that holds {name}.npz, as the location or in "
            f"{ENVIRONMENT_VARIABLE}"
        )
    path = place / f"{name}.npz" if place.is_dir() else place
    arrays = read_arrays(path, f"data set {name} needs it: correct the location or {ENVIRONMENT_VARIABLE}")
    return ImageSet(name, **arrays), str(path)


def _cifar(name: str, kind: str, place: Path | None, download: bool, folder: Path) -> tuple[ImageSet, str]:
    from torchvision import datasets

    dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind]
    remedy = (
        f"put {dataset.base_folder}/ (unpack {dataset.filename}) or {kind}.npz into a folder and name that folder as "
        f"the location or in {ENVIRONMENT_VARIABLE}"
    )
    if place is None:
        if download and _damaged(dataset, folder):
            _download(dataset, folder, remedy)
        return _official(name, dataset, folder, f"allow the download, or {remedy}")
    remedy = f"{remedy}, or name none to have it downloaded"
    if (place / dataset.base_folder).is_dir():
        return _official(name, dataset, place, remedy)
    return _cifar_npz(name, kind, place, remedy)


def _official(name: str, dataset: Any, folder: Path, remedy: str) -> tuple[ImageSet, str]:
    damaged = _damaged(dataset, folder)
    if damaged:
        raise DataError(
            f"{folder / dataset.base_folder / damaged[0]} is missing or its MD5 sum is not the official one; {remedy}"
        )
    # torchvision unpickles only files that have passed the same test
    train, test = (dataset(folder, train=part, download=False) for part in (True, False))
    arrays = (train.data, np.array(train.targets), test.data, np.array(test.targets))
    return ImageSet(name, *arrays, tuple(train.classes)), f"the official files (MD5 checked) in {folder}"


def _damaged(dataset: Any, folder: Path) -> list[str]:
    """Names of the official files that are missing or altered; torchvision, before a download, forgets to test meta."""
    from torchvision.datasets.utils import check_integrity

    place = folder / dataset.base_folder
    return [name for name, md5 in _official_files(dataset).items() if not check_integrity(place / name, md5)]


def _download(dataset: Any, folder: Path, remedy: str) -> None:
    from torchvision.datasets.utils import download_url

    archive = folder / dataset.filename
    try:
        with _stall_limit(STALL_SECONDS):
            download_url(dataset.url, folder, filename=dataset.filename, md5=dataset.tgz_md5)
    except (OSError, RuntimeError, HTTPException) as error:
        archive.unlink(missing_ok=True)
        raise DataError(f"the download of {dataset.url} failed ({error}); try again, or {remedy}") from error
    for name, content in _unpacked(dataset, archive, remedy).items():
        with atomic_write(folder / dataset.base_folder / name) as temporary:
            temporary.write_bytes(content)
    archive.unlink()


def _official_files(dataset: Any) -> dict[str, str]:
    """The MD5 sum of every file of a data set of torchvision."""
    return dict([*dataset.train_list, *dataset.test_list, (dataset.meta["filename"], dataset.meta["md5"])])


def _unpacked(dataset: Any, archive: Path, remedy: str) -> dict[str, bytes]:
    """The official files from their .tar.gz, by name, after their MD5 sums have passed. Nothing is written.

    So the archive has no say in where anything goes, and whatever else is in it stays there. Raises DataError naming
    the archive, and ending in `remedy`, unless each of them is in it once, as a regular file.
    """
    sums = _official_files(dataset)
    found: dict[str, bytes] = {}
    try:
        with gzip.open(archive) as file:
            content = file.read(MOST_UNPACKED + 1)
        if len(content) > MOST_UNPACKED:
            raise ValueError(f"it unfolds to more than {MOST_UNPACKED:,} bytes")
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in _members(tar):
                folder, _, name = member.name.rpartition("/")
                if folder != dataset.base_folder or name not in sums:
                    continue
                if name in found:
                    raise ValueError(f"{member.name} is in it twice")
                found[name] = _regular(tar, member)
    except (OSError, ValueError, EOFError, RecursionError, OverflowError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{archive} cannot be unpacked ({error}); remove it and try again, or {remedy}") from error
    wrong = [name for name, md5 in sums.items() if _md5(found.get(name, b"")) != md5]
    if wrong:
        raise DataError(
            f"{archive} cannot be unpacked ({wrong[0]} is not in it, or its MD5 sum is not the official one); remove "
            f"it and try again, or {remedy}"
        )
    return found


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members one after the other. Raises ValueError where one lies before the last, which would never end."""
    last = -1
    for member in tar:
        if member.offset <= last or member.size < 0:
            raise ValueError(f"{member.name} lies before what it follows")
        last = member.offset
        yield member


def _regular(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        raise ValueError(f"{member.name} is no regular file")
    if member.size > MOST_UNPACKED:
        raise ValueError(f"{member.name} would have {member.size:,} bytes")
    return tar.extractfile(member).read()


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@contextmanager
def _stall_limit(seconds: float) -> Iterator[None]:
    # torchvision opens its connections without a time limit, so a network that goes silent would hang the stage
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(previous)


def _cifar_npz(name: str, kind: str, place: Path, remedy: str) -> tuple[ImageSet, str]:
    path = place / f"{kind}.npz" if place.is_dir() else place
    image_set = ImageSet(name, **read_arrays(path, remedy))
    remedy = f"give other images the kind npz, or {remedy}"
    train, test, classes = CIFAR_COUNTS[kind]
    if image_set.x_train.shape[1:] != (32, 32, 3) or not (
        _balanced(image_set.y_train, train, classes) and _balanced(image_set.y_test, test, classes)
    ):
        raise DataError(
            f"{path} is not {kind}: it holds {_size(image_set)}; {kind} has {train:,} and {test:,} of 32x32x3, equally "
            f"many in each of {classes} classes; {remedy}"
        )
    official = CIFAR_CHECKSUMS.get(kind)
    if official and image_set.checksum != official:
        raise DataError(
            f"{path} is not the official {kind}: its checksum is {image_set.checksum}, not {official}, so pixels, "
            f"labels or their order differ; {remedy}"
        )
    return image_set, f"{path} ({'equal to' if official else 'not compared with'} the official files)"


def _balanced(labels: np.ndarray, count: int, classes: int) -> bool:
    return np.array_equal(np.bincount(labels), np.full(classes, count // classes))
