import gzip
import hashlib
import io
import os
import pickle
import socket
import tarfile
import threading
import tracemalloc
import urllib.error
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import CIFAR10, CIFAR100

from kdstudy import sources
from kdstudy.image_set import DataError, ImageSet, holdout_split, read_image_set, save_image_set
from kdstudy.sources import digits, load_source

REAL_DATA = os.environ.get("KDSTUDY_DATA")
needs_real_data = pytest.mark.skipif(not REAL_DATA, reason="KDSTUDY_DATA names no folder with the CIFAR sets")


@pytest.fixture(autouse=True)
def no_named_folder(monkeypatch):
    monkeypatch.delenv("KDSTUDY_DATA", raising=False)


def cifar_arrays(classes=10, per_class=2):
    random = np.random.default_rng(0)
    labels = np.arange(classes).repeat(per_class)
    train, test = random.integers(0, 256, (2, len(labels), 32, 32, 3), np.uint8)
    return {"x_train": train, "y_train": labels, "x_test": test, "y_test": labels[::-1].copy()}


def same_content(image_set, arrays):
    return image_set.checksum == ImageSet("expected", **arrays).checksum


# digits and kinds


def test_digits_are_all_scans_once_in_balanced_halves():
    from sklearn.datasets import load_digits

    image_set, scans = digits(), load_digits()
    assert (len(image_set.x_train), len(image_set.x_test)) == (899, 898)
    assert (image_set.image_size, image_set.channels, image_set.classes) == ((8, 8), 1, 10)
    assert np.abs(np.bincount(image_set.y_train) - np.bincount(image_set.y_test)).max() <= 1
    levels = [int(value * 255 / 16 + 0.5) for value in range(17)]
    assert np.unique(image_set.x_train).tolist() == levels
    pixels = [bytes(levels[int(value)] for value in scan) for scan in scans.data]
    images = np.concatenate([image_set.x_train, image_set.x_test])
    labels = np.concatenate([image_set.y_train, image_set.y_test])
    found = zip((image.tobytes() for image in images), labels, strict=True)
    assert sorted(found) == sorted(zip(pixels, scans.target, strict=True))


def test_digits_are_the_same_on_every_machine():
    assert digits().checksum == "748ee283695315f97a429715c70db5979a10042f42173d13709dd07a72011881"


def test_progress_is_told_what_was_loaded_and_from_where():
    told = []
    image_set = load_source("scans", "digits", progress=told.append)
    assert told == [
        "scans: 899 training and 898 test images of 8x8x1 in 10 classes, checksum "
        f"{image_set.checksum}, from scikit-learn"
    ]


def test_an_unknown_kind_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="unknown kind of data set 'cifar20'; did you mean 'cifar10'"):
        load_source("x", "cifar20")


def test_digits_take_no_location():
    with pytest.raises(DataError, match="digits come with scikit-learn; take the location here away"):
        load_source("digits", "digits", location="here")


# the user's own .npz


@pytest.mark.parametrize("by_environment", [True, False])
@pytest.mark.parametrize("place", ["mine.npz", "."])
def test_an_own_npz_is_found_by_file_or_folder(tmp_path, monkeypatch, by_environment, place):
    arrays = cifar_arrays(classes=3)
    np.savez(tmp_path / "mine.npz", **arrays, class_names=np.array(["a", "b", "c"]))
    if by_environment:
        monkeypatch.setenv("KDSTUDY_DATA", str(tmp_path / place))
    image_set = load_source("mine", "npz", None if by_environment else tmp_path / place)
    assert same_content(image_set, arrays)
    assert (image_set.name, image_set.class_names) == ("mine", ("a", "b", "c"))


def test_a_location_goes_before_the_environment(tmp_path, monkeypatch):
    np.savez(tmp_path / "mine.npz", **cifar_arrays(classes=3))
    monkeypatch.setenv("KDSTUDY_DATA", str(tmp_path / "absent"))
    assert load_source("mine", "npz", tmp_path).classes == 3


def test_an_own_npz_without_a_place_is_refused():
    with pytest.raises(DataError, match=r"data set mine: name its \.npz.*KDSTUDY_DATA"):
        load_source("mine", "npz")


def test_an_own_npz_that_is_absent_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"mine\.npz does not exist; .*correct the location or KDSTUDY_DATA"):
        load_source("mine", "npz", tmp_path)


# copies of CIFAR as .npz


@pytest.fixture
def small_cifar(monkeypatch):
    monkeypatch.setitem(sources.CIFAR_COUNTS, "cifar10", (20, 20, 10))
    monkeypatch.setitem(sources.CIFAR_COUNTS, "cifar100", (200, 200, 100))


@pytest.mark.usefixtures("small_cifar")
def test_a_copy_of_cifar10_is_taken_and_said_to_be_unproven(tmp_path):
    np.savez(tmp_path / "cifar10.npz", **cifar_arrays(), jpeg_index=np.arange(3))
    told = []
    image_set = load_source("cifar10", "cifar10", tmp_path, progress=told.append)
    assert same_content(image_set, cifar_arrays())
    assert told[0].endswith("cifar10.npz (not compared with the official files)")


@pytest.mark.usefixtures("small_cifar")
def test_a_copy_of_cifar100_must_equal_the_official_files(tmp_path, monkeypatch):
    arrays = cifar_arrays(classes=100)
    np.savez(tmp_path / "cifar100.npz", **arrays)
    monkeypatch.setitem(sources.CIFAR_CHECKSUMS, "cifar100", ImageSet("x", **arrays).checksum)
    assert same_content(load_source("cifar100", "cifar100", tmp_path), arrays)
    arrays["x_test"][7, 1, 2, 0] ^= 1
    np.savez(tmp_path / "cifar100.npz", **arrays)
    with pytest.raises(DataError, match=r"is not the official cifar100: its checksum.*give other images the kind npz"):
        load_source("cifar100", "cifar100", tmp_path)


OTHER = {
    "fewer images": cifar_arrays(),
    "fewer classes": cifar_arrays(classes=5, per_class=4),
    "other size": {key: value[:, :28] if key[0] == "x" else value for key, value in cifar_arrays().items()},
    "unbalanced": cifar_arrays() | {"y_train": np.array([0, 0, 0, *range(1, 10), *range(2, 10)])},
}


@pytest.mark.parametrize("case", OTHER)
def test_other_images_are_not_taken_for_cifar10(tmp_path, monkeypatch, case):
    if case != "fewer images":
        monkeypatch.setitem(sources.CIFAR_COUNTS, "cifar10", (20, 20, 10))
    np.savez(tmp_path / "cifar10.npz", **OTHER[case])
    with pytest.raises(DataError, match=r"cifar10\.npz is not cifar10: it holds 20 training and 20 test.*kind npz"):
        load_source("cifar10", "cifar10", tmp_path)


def test_a_folder_with_neither_form_is_refused_without_a_download(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("went to the network"))
    monkeypatch.setenv("KDSTUDY_DATA", str(tmp_path))
    with pytest.raises(DataError) as error:
        load_source("cifar10", "cifar10")
    assert "cifar10.npz does not exist" in str(error.value)
    assert "put cifar-10-batches-py/ (unpack cifar-10-python.tar.gz) or cifar10.npz into a folder" in str(error.value)


# torchvision's layout, and its download


@pytest.fixture
def official(monkeypatch):
    """The files of a small CIFAR-100 by name, whose MD5 sums torchvision is made to expect."""
    arrays = cifar_arrays(classes=3)
    names = [f"class {label}" for label in range(3)]
    files = {"meta": pickle.dumps({"fine_label_names": names})}
    for part in ("train", "test"):
        pixels = arrays[f"x_{part}"].transpose(0, 3, 1, 2).reshape(-1, 3072)
        files[part] = pickle.dumps({"data": pixels, "fine_labels": arrays[f"y_{part}"].tolist()})
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": md5["meta"]})
    return files


def lay_out(folder, files):
    for name, content in files.items():
        (folder / "cifar-100-python").mkdir(exist_ok=True, parents=True)
        (folder / "cifar-100-python" / name).write_bytes(content)


def test_the_official_files_are_taken_before_an_npz(tmp_path, official):
    lay_out(tmp_path, official)
    (tmp_path / "cifar100.npz").write_bytes(b"never read")
    told = []
    image_set = load_source("cifar100", "cifar100", tmp_path, progress=told.append)
    assert same_content(image_set, cifar_arrays(classes=3))
    assert image_set.class_names == ("class 0", "class 1", "class 2")
    assert told[0].endswith(f"from the official files (MD5 checked) in {tmp_path}")


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_a_file_with_a_wrong_checksum_is_refused_and_not_unpickled(tmp_path, official, name):
    bomb = f"cos\nmkdir\n(V{tmp_path / 'ran'}\ntR.".encode()
    lay_out(tmp_path, official | {name: bomb})
    with pytest.raises(DataError) as error:
        load_source("cifar100", "cifar100", tmp_path)
    assert f"{Path('cifar-100-python') / name} is missing or its MD5 sum is not the official one" in str(error.value)
    assert not (tmp_path / "ran").exists()
    pickle.loads(bomb)
    assert (tmp_path / "ran").exists(), "the bomb would not have gone off, so this test proves nothing"


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_an_absent_file_is_named(tmp_path, official, name):
    lay_out(tmp_path, {key: content for key, content in official.items() if key != name})
    with pytest.raises(DataError, match=f"{name} is missing"):
        load_source("cifar100", "cifar100", tmp_path)


def test_without_a_download_the_official_files_must_be_there(tmp_path, official):
    with pytest.raises(DataError, match=r"train is missing .*; allow the download, or put cifar-100-python/"):
        load_source("cifar100", "cifar100", download=False, download_folder=tmp_path)
    lay_out(tmp_path, official)
    assert load_source("cifar100", "cifar100", download=False, download_folder=tmp_path).classes == 3


def entry(name, content=b"", **fields):
    """A member of an archive, a regular file unless its fields say otherwise."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    return member, content


def packed(*entries):
    """The bytes of a .tar.gz with these members, in which sizes may be wrong."""
    stream = io.BytesIO()
    for member, content in entries:
        stream.write(member.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512))
    return gzip.compress(stream.getvalue() + bytes(1024), 1)


def sound(official):
    return [entry(f"cifar-100-python/{name}", content) for name, content in official.items()]


@pytest.fixture
def archive(official, monkeypatch):
    """The .tar.gz of the small CIFAR-100, whose MD5 sum torchvision is made to expect."""
    content = packed(*sound(official))
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(content).hexdigest())
    return content


@contextmanager
def serving(monkeypatch, content, *, announced=None, released=None):
    """Serve `content` as CIFAR-100's archive on this machine; with `released`, only after that event."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if released:
                released.wait(20)
            self.send_response(200)
            self.send_header("Content-Length", str(announced or len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(CIFAR100, "url", f"http://127.0.0.1:{server.server_port}/cifar-100-python.tar.gz")
        try:
            yield
        finally:
            if released:
                released.set()
            server.shutdown()
            thread.join()


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_download_is_unpacked_and_not_repeated(tmp_path, archive, monkeypatch):
    with serving(monkeypatch, archive):
        image_set = load_source("cifar100", "cifar100", download_folder=tmp_path)
    assert same_content(image_set, cifar_arrays(classes=3))
    assert files_in(tmp_path) == [f"cifar-100-python/{name}" for name in ("meta", "test", "train")]
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("went to the network"))
    assert load_source("cifar100", "cifar100", download_folder=tmp_path).checksum == image_set.checksum


@pytest.mark.parametrize("present", [[], ["train"], ["train", "test"]], ids=["writing", "unpacking", "without meta"])
def test_a_download_that_was_killed_is_taken_up(tmp_path, official, archive, monkeypatch, present):
    lay_out(tmp_path, {name: official[name] for name in present})
    (tmp_path / CIFAR100.filename).write_bytes(archive if present else archive[:500])
    with serving(monkeypatch, archive):
        assert load_source("cifar100", "cifar100", download_folder=tmp_path).classes == 3


def test_a_truncated_download_is_refused_and_removed(tmp_path, archive, monkeypatch):
    with (
        serving(monkeypatch, archive[:-50], announced=len(archive)),
        pytest.raises(DataError, match=r"download of http.*failed \(File not found or corrupted.\); try again, or put"),
    ):
        load_source("cifar100", "cifar100", download_folder=tmp_path)
    assert files_in(tmp_path) == []


def test_a_network_that_goes_silent_is_given_up(tmp_path, archive, monkeypatch):
    monkeypatch.setattr(sources, "STALL_SECONDS", 0.2)
    released = threading.Event()
    with serving(monkeypatch, archive, released=released), pytest.raises(DataError, match=r"failed .*timed out"):
        load_source("cifar100", "cifar100", download_folder=tmp_path)
    assert socket.getdefaulttimeout() is None
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_no_network_gives_a_sentence_that_says_what_to_do(tmp_path, monkeypatch, kind):
    def unreachable(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(DataError) as error:
        load_source(kind, kind, download_folder=tmp_path)
    dataset = {"cifar10": CIFAR10, "cifar100": CIFAR100}[kind]
    causes = (dataset.url, "Name or service not known")
    for part in (*causes, "try again", dataset.base_folder, f"{kind}.npz", "KDSTUDY_DATA"):
        assert part in str(error.value)
    assert files_in(tmp_path) == []


# archives whose MD5 sum is the official one, but which are made to harm


@pytest.fixture
def take(tmp_path, monkeypatch):
    """Load CIFAR-100 from an archive that is downloaded already."""

    def load(content):
        folder = tmp_path / "data" / "download"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CIFAR100.filename).write_bytes(content)
        monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(content).hexdigest())
        monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("went to the network"))
        return load_source("cifar100", "cifar100", download_folder=folder)

    return load


OUT = "../../out"


def test_members_that_are_not_asked_for_have_no_effect(tmp_path, official, take):
    others = [
        entry(OUT, b"x"),
        entry(str(tmp_path / "out"), b"x"),
        entry("cifar-100-python/../../../out", b"x"),
        entry("cifar-100-python/more", b"x"),
        entry("train", b"x"),
        entry("cifar-100-python", type=tarfile.SYMTYPE, linkname=str(tmp_path)),
        entry("cifar-100-python/link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        entry("cifar-100-python/device", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
    ]
    assert same_content(take(packed(*others, *sound(official), *others)), cifar_arrays(classes=3))
    assert files_in(tmp_path) == [f"data/download/cifar-100-python/{name}" for name in ("meta", "test", "train")]
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(tmp_path, official, take):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "data" / "download" / "cifar-100-python").mkdir(parents=True)
    (tmp_path / "data" / "download" / "cifar-100-python" / "train").symlink_to(tmp_path / "precious")
    take(packed(*sound(official)))
    assert (tmp_path / "precious").read_text() == "mine"


TRAIN = "cifar-100-python/train"
HARM = {
    "a symbolic link": ([entry(TRAIN, type=tarfile.SYMTYPE, linkname=OUT)], "train is no regular file"),
    "a hard link": ([entry(TRAIN, type=tarfile.LNKTYPE, linkname="cifar-100-python/meta")], "train is no regular file"),
    "a character device": ([entry(TRAIN, type=tarfile.CHRTYPE, devmajor=1, devminor=5)], "train is no regular file"),
    "a block device": ([entry(TRAIN, type=tarfile.BLKTYPE)], "train is no regular file"),
    "a queue": ([entry(TRAIN, type=tarfile.FIFOTYPE)], "train is no regular file"),
    "a folder": ([entry(TRAIN, type=tarfile.DIRTYPE)], "train is no regular file"),
    "a file with holes": ([entry(TRAIN, type=tarfile.GNUTYPE_SPARSE)], "train is no regular file"),
    "a size beyond all": ([entry(TRAIN, b"x", size=2**60)], r"train would have 1,152,921,504,606,846,976 bytes"),
    "a size beyond its bytes": ([entry(TRAIN, b"x", size=2**20)], "unexpected end of data"),
    "a size below nothing": ([entry(TRAIN, b"x", size=-512)], "lies before what it follows"),
    "a size that leads back": ([entry("more", size=-1024)], "lies before what it follows"),
    "another file": ([entry(TRAIN, b"cos\nsystem\n(Vtouch out\ntR.")], "train is not in it, or its MD5 sum is not"),
    "no such file": ([], "train is not in it, or its MD5 sum is not"),
    "a file in another folder": ([entry("train", b"x")], "train is not in it, or its MD5 sum is not"),
}


@pytest.mark.parametrize(("members", "cause"), HARM.values(), ids=HARM)
def test_a_harmful_archive_is_refused_and_leaves_nothing(tmp_path, official, take, members, cause):
    others = [member for member in sound(official) if member[0].name != TRAIN]
    content = packed(*others, *members)
    with pytest.raises(DataError, match=cause) as error:
        take(content)
    assert str(error.value).startswith(f"{tmp_path}/data/download/cifar-100-python.tar.gz cannot be unpacked (")
    assert "remove it and try again, or put cifar-100-python/" in str(error.value)
    assert files_in(tmp_path) == ["data/download/cifar-100-python.tar.gz"]
    assert (tmp_path / "data/download/cifar-100-python.tar.gz").read_bytes() == content


def test_a_file_that_is_there_twice_is_refused(tmp_path, official, take):
    with pytest.raises(DataError, match="cifar-100-python/train is in it twice"):
        take(packed(*sound(official), entry(TRAIN, official["train"])))


@pytest.mark.parametrize("damage", ["no gzip", "truncated", "altered", "no tar", "a bomb"])
def test_an_archive_that_cannot_be_unfolded_is_refused(tmp_path, official, take, damage, monkeypatch):
    content = packed(*sound(official))
    monkeypatch.setattr(sources, "MOST_UNPACKED", 100_000)
    damaged = {
        "no gzip": b"PK" + content,
        "truncated": content[:-100],
        "altered": content[:-6] + b"xxxxxx",
        "no tar": gzip.compress(b"x" * 5000),
        "a bomb": gzip.compress(bytes(10**8), 1),
    }
    with pytest.raises(DataError, match=r"cifar-100-python\.tar\.gz cannot be unpacked"):
        take(damaged[damage])
    assert files_in(tmp_path) == ["data/download/cifar-100-python.tar.gz"]


def test_of_a_bomb_only_as_much_is_unfolded_as_is_allowed(tmp_path, take, monkeypatch):
    monkeypatch.setattr(sources, "MOST_UNPACKED", 100_000)
    bomb = gzip.compress(bytes(10**8), 1)
    tracemalloc.start()
    with pytest.raises(DataError, match="it unfolds to more than 100,000 bytes"):
        take(bomb)
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


# the real images


@needs_real_data
@pytest.mark.parametrize(("kind", "per_class"), [("cifar10", 500), ("cifar100", 50)])
def test_real_cifar_is_loaded_saved_and_split(tmp_path, kind, per_class):
    image_set = load_source(kind, kind, REAL_DATA)
    assert (len(image_set.x_train), len(image_set.x_test)) == (50_000, 10_000)
    save_image_set(image_set, tmp_path / f"{kind}.npz")
    assert read_image_set(tmp_path / f"{kind}.npz").checksum == image_set.checksum
    train, held_out = holdout_split(image_set.y_train, 5_000)
    assert set(np.bincount(image_set.y_train[held_out])) == {per_class}
    assert len(train) == 45_000


@needs_real_data
def test_the_recorded_checksum_is_that_of_the_official_files():
    if not (Path(REAL_DATA) / CIFAR100.base_folder).is_dir():
        pytest.skip("KDSTUDY_DATA holds no official CIFAR-100 files")
    assert load_source("cifar100", "cifar100", REAL_DATA).checksum == sources.CIFAR_CHECKSUMS["cifar100"]
