import hashlib
import io
import json
import os
import struct
import warnings
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdstudy.image_set import (
    DataError,
    ImageSet,
    channel_statistics,
    holdout_split,
    read_arrays,
    read_card,
    read_image_set,
    save_image_set,
    stratified_subset,
)


def arrays(train=12, test=6, classes=3, shape=(4, 5, 3)):
    random = np.random.default_rng(0)
    return {
        "x_train": random.integers(0, 256, (train, *shape), np.uint8),
        "y_train": np.arange(train) % classes,
        "x_test": random.integers(0, 256, (test, *shape), np.uint8),
        "y_test": np.arange(test) % classes,
    }


def tiny(**changes):
    return ImageSet("tiny", **(arrays() | changes))


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


# ImageSet


def test_an_image_set_knows_its_size_and_names_its_classes():
    image_set = tiny()
    assert (image_set.classes, image_set.channels, image_set.image_size) == (3, 3, (4, 5))
    assert image_set.class_names == ("0", "1", "2")
    assert tiny(class_names=np.array(["a", "b", "c"])).class_names == ("a", "b", "c")


X, Y = arrays()["x_train"], arrays()["y_train"]
NAN = X.astype(np.float32)
NAN[3, 0, 0, 0] = np.nan
BAD = {
    "grey without channels": ({"x_train": X[..., 0]}, "x_train must be (N, H, W, C)", "x_train[..., np.newaxis]"),
    "flat images": ({"x_test": X[:6].reshape(6, -1)}, "x_test must be (N, H, W, C)", "(6, 60)"),
    "channels first": ({"x_train": X.repeat(3, 3).transpose(0, 3, 1, 2)}, "has 5", "transpose(0, 2, 3, 1)"),
    "floats": ({"x_train": X / 255}, "x_train must be uint8, 0 to 255, not float64", "np.rint(x_train * 255)"),
    "wide integers": ({"x_test": X[:6].astype(int)}, "x_test must be uint8, 0 to 255, not int64", "astype(np.uint8)"),
    "NaN": ({"x_train": NAN}, "x_train holds values that are NaN or infinite", "drop"),
    "no images": ({"x_test": X[:0], "y_test": Y[:0]}, "x_test is empty", "(0, 4, 5, 3)"),
    "no pixels": ({"x_train": X[:, :0]}, "x_train is empty", "(12, 0, 5, 3)"),
    "no channels": ({"x_train": X[..., :0]}, "x_train is empty", "(12, 4, 5, 0)"),
    "objects": ({"x_train": X.astype(object)}, "x_train must be a plain numpy array", "Python objects"),
    "a list": ({"y_train": [0, 1, 2]}, "y_train must be a plain numpy array", "list"),
    "a missing label": ({"y_train": Y[:11]}, "x_train has 12 images", "y_train has 11 labels"),
    "unlike sizes": ({"x_test": X[:6, :3]}, "(H, W, C) = (4, 5, 3)", "x_test (3, 5, 3)"),
    "unlike channels": ({"x_test": X[:6, ..., :1]}, "(H, W, C) = (4, 5, 3)", "x_test (4, 5, 1)"),
    "float labels": ({"y_train": Y.astype(float)}, "y_train must be integers", "float64"),
    "NaN labels": ({"y_train": np.where(Y == 1, np.nan, Y)}, "y_train holds values that are NaN", "repair"),
    "boolean labels": ({"y_train": Y == 1}, "y_train must be integers", "bool"),
    "labels in a column": ({"y_train": Y[:, np.newaxis]}, "y_train must be (N,)", "y_train.reshape(-1)"),
    "a negative label": ({"y_train": Y - 1}, "y_train holds labels -1 to 1", "0 to 1"),
    "a test label too large": ({"y_test": Y[:6] + 1}, "y_test holds labels 1 to 3", "0 to 2"),
    "more labels than names": ({"class_names": ("a", "b")}, "y_train holds labels 0 to 2", "with 2 classes"),
    "one class": ({"y_train": Y * 0, "y_test": Y[:6] * 0}, "at least 2 classes", "not 1"),
    "a gap in the classes": ({"y_train": np.where(Y == 1, 3, Y)}, "no training image has label 1;", "without gaps"),
    "a class that is named only": ({"class_names": "abcde"}, "no training image has label 3, 4;", "from 0"),
    "a label beyond all counting": ({"y_train": Y + 2**62}, "y_train holds the label 4611", "only 12 images"),
    "a name that is no text": (
        {"class_names": np.frombuffer(b"\xff\xff\xff\x7f" * 3, "<U1")},
        "class_names cannot be read",
        "character",
    ),
    "names that are no strings": ({"class_names": np.arange(3)}, "class_names must be a list of strings", "int64"),
}


@pytest.mark.parametrize(("changes", "cause", "remedy"), BAD.values(), ids=BAD)
def test_bad_arrays_are_refused_with_the_cause_and_what_to_do(changes, cause, remedy):
    with pytest.raises(DataError) as error:
        tiny(**changes)
    assert str(error.value).startswith("data set tiny: ")
    assert cause in str(error.value)
    assert remedy in str(error.value)


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".hidden", "a b", "-rf", "a\n", "é", "$(a)", "a" * 101, 3, None])
def test_a_name_that_is_no_file_name_is_refused(name):
    with pytest.raises(DataError, match="becomes a file name"):
        ImageSet(name, **arrays())


def test_checksum_is_sha256_of_what_its_docstring_says():
    expected = hashlib.sha256()
    for key, array in arrays().items():
        if key.startswith("x"):
            expected.update(f"{key} uint8 {array.shape}\n".encode() + bytes(array.flatten().tolist()))
        else:
            expected.update(f"{key} int64 {array.shape}\n".encode() + struct.pack(f"<{len(array)}q", *array.tolist()))
    assert tiny().checksum == expected.hexdigest()


def test_checksum_is_of_the_content_and_not_of_its_representation():
    same = {
        "x_train": np.asfortranarray(X),
        "x_test": np.repeat(arrays()["x_test"], 2, axis=0)[::2],
        "y_train": Y.astype(np.uint8),
        "y_test": arrays()["y_test"].astype(">i4"),
        "class_names": ("a", "b", "c"),
    }
    assert ImageSet("another", **same).checksum == tiny().checksum


def test_checksum_sees_a_pixel_a_label_and_a_shape():
    pixel = X.copy()
    pixel[0, 0, 0, 0] ^= 1
    transposed = {key: value.reshape(-1, 5, 4, 3) for key, value in arrays().items() if key.startswith("x")}
    changed = [tiny(x_train=pixel), tiny(y_test=np.array([0, 1, 2, 0, 1, 1])), tiny(**transposed)]
    assert len({tiny().checksum, *(image_set.checksum for image_set in changed)}) == 4


def test_channel_statistics_equal_numpys():
    images = np.random.default_rng(1).integers(0, 256, (2100, 3, 4, 2), np.uint8)
    images[..., 1] //= 7
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, images.mean((0, 1, 2), np.float64), rtol=1e-12)
    np.testing.assert_allclose(std, images.std((0, 1, 2), np.float64), rtol=1e-12)


def test_a_constant_channel_can_be_divided_by():
    mean, std = channel_statistics(np.full((3, 2, 2, 1), 77, np.uint8))
    assert (mean.tolist(), std.tolist()) == ([77.0], [1.0])


# save and read


def test_what_is_saved_is_read_again(tmp_path):
    image_set = tiny(class_names=("ant", "bee", "cat"))
    save_image_set(image_set, tmp_path / "tiny.npz")
    found = read_image_set(tmp_path / "tiny.npz")
    for key in arrays():
        np.testing.assert_array_equal(getattr(found, key), getattr(image_set, key))
        assert getattr(found, key).dtype == getattr(image_set, key).dtype
    assert (found.name, found.class_names) == ("tiny", ("ant", "bee", "cat"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.json", "tiny.npz"]


def test_two_saves_give_identical_bytes(tmp_path, monkeypatch):
    save_image_set(tiny(), tmp_path / "a" / "tiny.npz")
    monkeypatch.setattr("time.time", lambda: 2e9)
    save_image_set(tiny(), tmp_path / "b" / "tiny.npz")
    for name in ("tiny.npz", "tiny.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_card_describes_the_set_without_its_pixels(tmp_path):
    save_image_set(tiny(), tmp_path / "tiny.npz")
    (tmp_path / "tiny.npz").unlink()
    card = read_card(tmp_path / "tiny.npz")
    mean, std = channel_statistics(X)
    assert card == {
        "name": "tiny",
        "checksum": tiny().checksum,
        "train": 12,
        "test": 6,
        "image_size": [4, 5],
        "channels": 3,
        "mean": mean.tolist(),
        "std": std.tolist(),
        "class_names": ["0", "1", "2"],
    }


def flip_a_pixel(path):
    content = bytearray(path.read_bytes())
    content[content.index(X.tobytes())] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def another_set(path):
    np.savez(path, **(arrays() | {"y_train": np.roll(Y, 1)}))


DAMAGE = {
    "no npz": ("tiny.npz", lambda path: path.unlink(), "does not exist"),
    "truncated npz": ("tiny.npz", truncate, "truncated, altered"),
    "empty npz": ("tiny.npz", lambda path: path.write_bytes(b""), "truncated, altered"),
    "altered npz": ("tiny.npz", flip_a_pixel, "Bad CRC-32"),
    "other npz": ("tiny.npz", another_set, "has been altered"),
    "no card": ("tiny.json", lambda path: path.unlink(), "does not exist"),
    "truncated card": ("tiny.json", truncate, "truncated or altered"),
    "card of another kind": ("tiny.json", lambda path: path.write_text("[]"), "truncated or altered"),
    "card of another set": (
        "tiny.json",
        lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"checksum": "0" * 64})),
        "has been altered",
    ),
    "card without end": ("tiny.json", lambda path: path.write_text("[" * 100_000), "truncated or altered"),
    "card that is no text": ("tiny.json", lambda path: path.write_bytes(b"\xff\xfe{}"), "truncated or altered"),
}


@pytest.mark.parametrize(("name", "damage", "cause"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_refused_and_the_stage_that_makes_it_named(tmp_path, name, damage, cause):
    save_image_set(tiny(), tmp_path / "tiny.npz")
    damage(tmp_path / name)
    with pytest.raises(DataError) as error:
        read_image_set(tmp_path / "tiny.npz")
    assert name in str(error.value)
    assert cause in str(error.value)
    assert "`dvc repro data@tiny` makes it again" in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("name", value) for value in (3, None, "", "../tiny", "a b")),
        *(("checksum", value) for value in (3, None, "0" * 63, "0" * 65, "G" * 64)),
        *((field, value) for field in ("train", "test", "channels") for value in (0, -1, 2.0, "3", None, True)),
        *(("image_size", value) for value in (4, [4], [4, 5, 6], [4.0, 5], [0, 5], [True, 5], None, {"0": 4, "1": 5})),
        *((field, value) for field in ("mean", "std") for value in ([], [1.0], [1.0] * 4, [1.0, 2.0, "3"], 1.0, None)),
        *((field, [1.0, 1.0, value]) for field in ("mean", "std") for value in (-1.0, 255.5)),
        *((field, [1.0, 1.0, value]) for field in ("mean", "std") for value in (None, True, 10**400)),
        ("std", [1.0, 1.0, 0.0]),
        *(("class_names", value) for value in ([], ["a"], ["a", 1], "ab", None, {"a": "b", "c": "d"})),
    ],
)
def test_a_field_of_a_card_that_cannot_be_right_is_refused(tmp_path, field, value):
    save_image_set(tiny(), tmp_path / "tiny.npz")
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(DataError, match=rf"tiny\.json is truncated or altered \(its .*{field}"):
        read_card(tmp_path / "tiny.npz")


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_card_with_a_number_that_is_none_is_refused(tmp_path, word):
    save_image_set(tiny(), tmp_path / "tiny.npz")
    card = json.loads((tmp_path / "tiny.json").read_text())
    text = json.dumps(card | {"mean": [1.0, 2.0, "here"]}).replace('"here"', word)
    (tmp_path / "tiny.json").write_text(text)
    with pytest.raises(DataError, match="its mean cannot be right"):
        read_card(tmp_path / "tiny.npz")


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    path = tmp_path / "tiny.npz"
    np.savez_compressed(path, **arrays())
    content = path.read_bytes()
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=r"truncated.*; get a whole one"):
            read_arrays(path, "get a whole one")


def test_missing_arrays_are_named(tmp_path):
    np.savez(tmp_path / "part.npz", x_train=X, y_train=Y)
    with pytest.raises(DataError, match="has no x_test, y_test; it needs x_train, y_train, x_test, y_test; add them"):
        read_arrays(tmp_path / "part.npz", "add them")


def test_other_arrays_are_left_unread(tmp_path):
    np.savez(tmp_path / "more.npz", **arrays(), extra=np.array([{}]))
    assert list(read_arrays(tmp_path / "more.npz", "")) == ["x_train", "y_train", "x_test", "y_test"]


def test_a_single_array_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", X)
    with pytest.raises(DataError, match="holds a single array"):
        read_arrays(tmp_path / "x.npy", "")


def test_a_member_that_is_no_array_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", **{key: value for key, value in arrays().items() if key != "x_train"})
    with zipfile.ZipFile(tmp_path / "x.npz", "a") as archive:
        archive.writestr("x_train", b"pixels")
    with pytest.raises(DataError, match="has no x_train;"):
        read_arrays(tmp_path / "x.npz", "")


def test_pickled_objects_are_refused_and_not_run(tmp_path):
    bombs = np.array([Bomb(tmp_path / "ran")] * 12, dtype=object)
    np.savez(tmp_path / "x.npz", **(arrays() | {"y_train": bombs}))
    with pytest.raises(DataError, match="Object arrays cannot be loaded"):
        read_arrays(tmp_path / "x.npz", "")
    assert not (tmp_path / "ran").exists()


# archives that are made to harm


def npy(array, shape=None, **header):
    """An .npy of an array, whose header may say something else."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array)
    if shape is None and not header:
        return stream.getvalue()
    told = io.BytesIO()
    described = {"descr": array.dtype.str, "fortran_order": False, "shape": shape or array.shape}
    np.lib.format.write_array_header_1_0(told, described | header)
    return told.getvalue() + array.tobytes()


def write_npz(path, members=(), compression=zipfile.ZIP_DEFLATED, **changes):
    """A sound .npz, but for changed members (None leaves one out) and further ones."""
    contents = {f"{key}.npy": npy(array) for key, array in arrays().items()}
    contents |= {f"{key}.npy": content for key, content in changes.items()}
    with zipfile.ZipFile(path, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there already
        for name, content in [*contents.items(), *members]:
            if content is not None:
                archive.writestr(name, content)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_every_compression_that_python_knows_is_read(tmp_path, compression):
    write_npz(tmp_path / "x.npz", compression=compression)
    assert ImageSet("tiny", **read_arrays(tmp_path / "x.npz", "")).checksum == tiny().checksum


HUGE = (2**40, 4, 5, 3)
HARM = {
    "a shape that its bytes are not": (
        {"x_train": npy(X, HUGE)},
        r"x_train.npy says \(1099511627776, 4, 5, 3\) of uint8",
    ),
    "a shape beyond 64 bits": ({"x_train": npy(X, (2**40, 2**40))}, "x_train.npy says"),
    "a shape with a negative side": ({"x_train": npy(X, (-12, -4, 5, 3))}, "no .npz of plain arrays"),
    "items of no size": ({"class_names": npy(np.zeros(0, "<U1"), (2**40,), descr="<U0")}, "class_names.npy says"),
    "bytes left over": ({"x_train": npy(X) + b"more"}, "x_train.npy says"),
    "bytes missing": ({"x_train": npy(X)[:-1]}, "x_train.npy says"),
    "a header without end": ({"x_train": b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535}, "no .npz of plain arrays"),
    "a header of another version": ({"x_train": b"\x93NUMPY\x09\x00" + npy(X)[8:]}, "no .npz of plain arrays"),
    "no header": ({"x_train": X.tobytes()}, "no .npz of plain arrays"),
    "an empty member": ({"x_train": b""}, "no .npz of plain arrays"),
    "a member twice": ({"members": [("x_train.npy", npy(X))]}, "x_train is in it 2 times"),
    "members in a folder": ({"x_train": None, "members": [("set/x_train.npy", npy(X))]}, "has no x_train;"),
}


@pytest.mark.parametrize(("changes", "cause"), HARM.values(), ids=HARM)
def test_a_harmful_archive_is_refused(tmp_path, changes, cause):
    write_npz(tmp_path / "x.npz", **changes)
    with pytest.raises(DataError, match=cause) as error:
        read_arrays(tmp_path / "x.npz", "get a sound one")
    assert str(error.value).startswith(f"{tmp_path / 'x.npz'} ") and str(error.value).endswith("get a sound one")


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damaged_compressed_bytes_are_refused(tmp_path, compression):
    write_npz(tmp_path / "x.npz", compression=compression)
    sound = (tmp_path / "x.npz").read_bytes()
    start = 30 + len("x_train.npy") + 9  # after what lzma does not look at
    for position in range(start, start + 200):
        (tmp_path / "x.npz").write_bytes(sound[:position] + bytes([sound[position] ^ 0xFF]) + sound[position + 1 :])
        with pytest.raises(DataError, match=r"no \.npz of plain arrays"):
            read_arrays(tmp_path / "x.npz", "")


def test_a_member_that_goes_on_beyond_the_end_of_its_file_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    told = npy(X, (2**20, 4, 5, 3))
    size = len(told) - X.size + 2**20 * 60
    write_npz(path, compression=zipfile.ZIP_STORED, x_train=told)
    content = bytearray(path.read_bytes())
    entry = content.find(b"PK\x01\x02")  # in the list at the end: the sizes are 20 bytes on
    content[entry + 20 : entry + 28] = struct.pack("<II", size, size)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"no \.npz of plain arrays"):
        read_arrays(path, "")


def test_a_bomb_is_not_unfolded(tmp_path, monkeypatch):
    monkeypatch.setattr("kdstudy.image_set.LARGE", 10_000)
    blank, noise = (
        np.zeros((5000, 4, 5, 3), np.uint8),
        np.random.default_rng(0).integers(0, 256, (200, 4, 5, 3), np.uint8),
    )
    write_npz(tmp_path / "bomb.npz", x_train=npy(blank), y_train=npy(np.arange(5000) % 3))
    opened = []
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *arguments, **_: opened.append(arguments))
    with pytest.raises(DataError, match=r"x_train\.npy would unfold from [\d,]+ to 300,128 bytes"):
        read_arrays(tmp_path / "bomb.npz", "")
    assert not opened
    monkeypatch.undo()
    monkeypatch.setattr("kdstudy.image_set.LARGE", 10_000)
    write_npz(tmp_path / "large.npz", x_train=npy(noise), y_train=npy(np.arange(200) % 3))
    assert len(read_arrays(tmp_path / "large.npz", "")["x_train"]) == 200


@pytest.mark.parametrize(("offset", "value"), [(6, 1), (8, 99), (8, 97)], ids=["encrypted", "AES", "unknown method"])
def test_members_that_zipfile_cannot_open_are_refused(tmp_path, offset, value):
    write_npz(tmp_path / "x.npz")
    content = bytearray((tmp_path / "x.npz").read_bytes())
    for signature, shift in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):  # of each member, and of its entry in the list
        start = -1
        while (start := content.find(signature, start + 1)) >= 0:
            content[start + offset + shift] = value
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"encrypted|not supported"):
        read_arrays(tmp_path / "x.npz", "")


# splits

class_sizes = st.lists(st.integers(1, 30), min_size=2, max_size=8)


def shuffled_labels(sizes):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return np.random.default_rng(0).permutation(labels)


@settings(deadline=None)
@given(class_sizes, st.integers(0, 5))
def test_subsets_are_proportional_and_nested(sizes, seed):
    labels = shuffled_labels(sizes)
    sizes = np.array(sizes)
    smaller = set()
    for count in range(1, len(labels) + 1):
        index = stratified_subset(labels, count, seed)
        assert index.dtype == np.int64
        assert np.all(np.diff(index) > 0)
        assert len(index) == count
        assert smaller <= set(index.tolist())
        smaller = set(index.tolist())
        # the min-max inequality that characterises Webster's apportionment (Balinski and Young)
        chosen = np.bincount(labels[index], minlength=len(sizes))
        assert np.min((chosen + 0.5) / sizes) >= np.max((chosen - 0.5) / sizes) - 1e-12


@settings(deadline=None)
@given(class_sizes, st.integers(0, 5), st.data())
def test_a_split_parts_the_images(sizes, seed, data):
    labels = shuffled_labels([size + 3 for size in sizes])
    size = data.draw(st.integers(1, len(labels) // 2))
    train, held_out = holdout_split(labels, size, seed)
    assert len(held_out) == size
    assert np.all(np.diff(train) > 0)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held_out])), np.arange(len(labels)))


@pytest.mark.parametrize("classes", [10, 100])
def test_every_class_of_cifar_gives_a_tenth(classes):
    labels = shuffled_labels([50_000 // classes] * classes)
    train, held_out = holdout_split(labels, 5_000)
    np.testing.assert_array_equal(np.bincount(labels[held_out]), np.full(classes, 5_000 // classes))
    np.testing.assert_array_equal(np.bincount(labels[train]), np.full(classes, 45_000 // classes))


def test_a_split_is_fixed_by_its_seed_on_every_machine():
    labels = np.arange(1000) % 10
    held_out = holdout_split(labels, 20)[1]
    expected = [11, 92, 108, 196, 269, 403, 504, 523, 569, 600, 608, 632, 657, 744, 777, 836, 850, 855, 921, 935]
    assert held_out.tolist() == expected
    assert not np.array_equal(held_out, holdout_split(labels, 20, seed=1)[1])


@pytest.mark.parametrize("size", [0, -1, 8, 10])
def test_a_size_that_leaves_too_little_is_refused(size):
    with pytest.raises(ValueError, match=f"of 10 images in 3 classes 1 to 7 can be held out, not {size}"):
        holdout_split(np.array([0, 0, 0, 0, 1, 1, 1, 1, 2, 2]), size)


def test_a_class_is_never_held_out_whole():
    with pytest.raises(ValueError, match="leaves none of class 1 for training"):
        holdout_split(np.array([0] * 9 + [1]), 8)


@pytest.mark.parametrize("count", [0, 11])
def test_a_subset_of_too_few_or_too_many_is_refused(count):
    with pytest.raises(ValueError, match=f"can have 1 to 10, not {count}"):
        stratified_subset(np.arange(10) % 2, count)
