"""Generated files that are wrong: each is refused by a sentence that names the file or the place, and none is changed.

The cases are drawn by hypothesis from a fixed seed, so that they are the same everywhere; `CASES` says how many.
"""

import copy
import gzip
import hashlib
import io
import json
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as as_safetensors
from torch import nn
from torchvision.datasets import CIFAR100

from kdstudy import sources
from kdstudy.__main__ import main
from kdstudy.checkpoint import load_checkpoint, load_weights
from kdstudy.image_set import ImageSet, read_arrays, read_card, read_image_set, save_image_set
from kdstudy.params import load_params
from kdstudy.records import FIELDS as RECORD_FIELDS
from kdstudy.records import run_id, seal
from kdstudy.sources import load_source
from kdstudy.store import Store
from kdstudy.study import Planner, RunSpec, check_methods
from kdstudy.train import REVISION

CASES = {"params": 120, "overrides": 40, "npz": 80, "cards": 60, "archives": 60}
CASES |= {"records": 80, "checkpoints": 60, "weights": 60}
SHOWN = 10  # cases of each kind that are also given to the command line
FIXED = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def test_there_are_enough_cases():
    assert sum(CASES.values()) >= 200


def draw_all(kind: str, cases: st.SearchStrategy, check: Callable[[object], None]) -> list:
    """Give at least `CASES[kind]` different cases to `check`; return them."""
    seen: dict[str, object] = {}

    @settings(FIXED, max_examples=2 * CASES[kind])
    @given(cases)
    def run(case):
        check(case)
        seen[repr(case)] = case

    run()
    assert len(seen) >= CASES[kind]
    print(f"{kind}: {len(seen)} generated cases refused")
    return list(seen.values())


def some(cases: list) -> list:
    """`SHOWN` of the cases, of all kinds."""
    return cases[:: len(cases) // SHOWN][:SHOWN]


def content_of(folder: Path) -> dict[str, bytes]:
    """What lies in a folder, with the bytes of its files."""
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


@contextmanager
def refused(folder: Path, *names: str) -> Iterator[None]:
    """Inside, a ValueError or OSError that names one of these must be raised, and nothing in the folder changed."""
    before = content_of(folder)
    with pytest.raises((ValueError, OSError)) as error:
        yield
    assert any(name in str(error.value) for name in names), (names, str(error.value))
    assert "\n" not in str(error.value)
    assert content_of(folder) == before


def refused_by_command(capsys, folder: Path, *words: str) -> None:
    """The command ends with 1 and one line, and changes nothing."""
    before = content_of(folder)
    capsys.readouterr()
    assert main(words) == 1
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and "Traceback" not in told.err + told.out
    assert told.err.count("\n") == 1
    assert content_of(folder) == before


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project's folder, the current one; nothing goes to the network, whatever is asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KDSTUDY_DATA", raising=False)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("went to the network"))
    Path("params.yaml").write_text(SOUND)
    return tmp_path


# params.yaml

SOUND = """
profiles:
  quick: {device: cpu, threads: 1, workers: 1, cohort: 4, way: in_turn, graphs: false}
datasets:
  mine: {source: npz, validation: 2, location: mine.npz}
  cifar100: {source: cifar100, validation: 5}
recipes:
  short:
    {epochs: 2, batch: 4, learning_rate: 0.1, momentum: 0.9, milestones: [1], factor: 0.2, flip: false, precision: fp32}
settings:
  pair: {profile: quick, dataset: mine, teacher: wrn_10_1, student: wrn_10_0.25, recipe: short, grid: few,
         seeds: [0, 1], networks: {assistant: wrn_10_0.5}, without: [dist], overrides: {kd: {temperature: 3.0}},
         ensembles: true}
methods:
  response:
    ce: {}
    kd: {ce_weight: 0.1, kd_weight: 0.9, temperature: 4.0}
    dist: {teachers: 2, images: 0.5, length: 2.0}
    between: {method: kd, network: "{student}", temperature: 2.0,
              taught_by: {method: kd, network: "{assistant}", length: 0.5}}
  online:
    mutual: {scheme: {name: peers, count: 3, alternate: true}, partners: ["{teacher}"]}
grids:
  few:
    axes: {temperature: [{temperature: 2.0}, {temperature: 4.0}]}
    rows: {kd: [temperature]}
"""
TREE = yaml.safe_load(SOUND)


def places(node: object, path: tuple = ()) -> Iterator[tuple]:
    """Every place in a tree, as the keys and indices that lead there."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def at(tree: object, path: tuple) -> object:
    for key in path:
        tree = tree[key]
    return tree


PLACES = list(places(TREE))
NUMBERS = [path for path in PLACES if type(at(TREE, path)) in (int, float)]
FIELDS = [path for path in PLACES if len(path) == (3 if path[0] == "methods" else 2)]
MAPS_OF_NAMES = [
    ("profiles",),
    ("datasets",),
    ("recipes",),
    ("settings",),
    ("methods",),
    ("methods", "response"),
    ("grids",),
]
OTHER_KINDS = {
    int: ["word", 2.5, True, [1], {"a": 1}, None],
    float: ["word", True, [1.0], {"a": 1.0}, None],
    str: [3, 2.5, True, ["word"], {"a": "word"}],
    bool: ["yes", 0, 1.0, [True], {"a": True}, None],
    list: ["word", 3, True, {"a": 1}],
    dict: ["word", 3, True, ["word"]],
}
NO_NUMBERS = [
    ".nan",
    ".inf",
    "-.inf",
    "-1",
    "-0.5",
    "1.0e+999",
    str(2**63),
    "-" + "9" * 30,
    "0x" + "f" * 30,
    "9" * 5000,
]
ODD_NAMES = st.one_of(
    st.sampled_from(
        ["", "..", "a/b", "/etc", "-rf", "a b", "$(touch out)", "; touch out", "`touch out`", "a\nb", ".a", "~"]
    ),
    st.text(min_size=1, max_size=8).filter(lambda name: not name[0].isalnum() and name.isprintable()),
)


def put(path: tuple, value: object) -> tuple[bytes, tuple[str, ...]]:
    """params.yaml with another value at a place, and words one of which the refusal must name."""
    tree = copy.deepcopy(TREE)
    at(tree, path[:-1])[path[-1]] = value
    return dumped(tree), tuple([key for key in path if isinstance(key, str)][-2:])


def dumped(tree: object) -> bytes:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode()


def unsound(value: object) -> st.SearchStrategy:
    return st.sampled_from(OTHER_KINDS[type(value)])


def with_number(path: tuple, word: str) -> tuple[bytes, tuple[str, ...]]:
    content, names = put(path, "HERE")
    return content.replace(b"HERE", word.encode()), (*names, "params.yaml is not valid YAML: line")


def with_line(line: int, word: str) -> tuple[bytes, tuple[str, ...]]:
    """One more line of the same depth as the one before it."""
    lines = SOUND.split("\n")
    indent = len(lines[line]) - len(lines[line].lstrip())
    return "\n".join([*lines[: line + 1], " " * indent + word, *lines[line + 1 :]]).encode(), ("params.yaml",)


def cut(stop: int) -> tuple[bytes, tuple[str, ...]]:
    return SOUND.encode()[:stop], ("params.yaml", "unknown", "lacks")


def with_bytes(start: int, raw: bytes) -> tuple[bytes, tuple[str, ...]]:
    content = SOUND.encode()
    return content[:start] + raw + content[start:], ("params.yaml",)


FLOW_ENDS = [i for i, letter in enumerate(SOUND) if letter == "}" and "}" in SOUND[i + 1 :]]
LINES = [i for i, line in enumerate(SOUND.split("\n")) if line and i]
MALFORMED_PARAMS = st.one_of(
    st.sampled_from([path for path in PLACES if type(at(TREE, path)) in OTHER_KINDS])
    .filter(lambda path: path[-1] != "kd" or len(path) == 3)
    .flatmap(lambda path: unsound(at(TREE, path)).map(lambda value: put(path, value))),
    st.builds(with_number, st.sampled_from(NUMBERS), st.sampled_from(NO_NUMBERS)),
    st.builds(put, st.sampled_from([(*path, "lenght") for path in FIELDS]), st.sampled_from([1, "word", None])),
    st.builds(
        lambda path, name: (put((*path, name), {})[0], (f"a name in {'.'.join(path)} becomes a file name",)),
        st.sampled_from(MAPS_OF_NAMES),
        ODD_NAMES,
    ),
    st.builds(
        with_line, st.sampled_from(LINES), st.sampled_from(["? [a]\n: b", "7: {}", "~: {}", "yes: 1", "x: &x [*x]"])
    ),
    st.builds(
        with_line, st.sampled_from(LINES), st.sampled_from(["x: !!python/name:os.system", "\tx: 1", "x: {", "x: 'a"])
    ),
    st.builds(cut, st.sampled_from([end for end in FLOW_ENDS if SOUND[end - 1] not in "{"])),
    st.builds(
        with_bytes,
        st.integers(0, len(SOUND) - 1),
        st.sampled_from([b"\xff", b"\x00", b"\xc3(", b"\x07", b"\xed\xa0\x80"]),
    ),
)


def read_params(content: bytes) -> None:
    Path("params.yaml").write_bytes(content)
    check_methods(load_params())


def test_the_params_that_are_spoilt_here_are_sound(project):
    read_params(SOUND.encode())
    read_params(dumped(TREE))


def test_malformed_params_are_refused(project, capsys):
    def check(case):
        content, names = case
        Path("params.yaml").write_bytes(content)
        with refused(project, *names):
            check_methods(load_params())

    for content, _ in some(draw_all("params", MALFORMED_PARAMS, check)):
        Path("params.yaml").write_bytes(content)
        refused_by_command(capsys, project, "run", "--setting", "pair", "--stage", "teacher")


MALFORMED_OVERRIDES = st.one_of(
    st.builds(
        lambda path, word: f"{'.'.join(map(str, path))}={word}",
        st.sampled_from([path for path in NUMBERS if all(isinstance(key, str) for key in path)]),
        st.sampled_from(
            [*NO_NUMBERS, "word", "[", "{a: 1, a: 2}", "*a", "!!python/name:os.system", "", "[1, 2]", "true"]
        ),
    ),
    st.builds(
        lambda path, key: f"{'.'.join(map(str, path))}.{key}=1",
        st.sampled_from([path for path in PLACES if not isinstance(at(TREE, path), dict)]),
        st.sampled_from(["0", "x", "", "epochs"]),
    ),
    st.text(max_size=10).filter(lambda text: "=" not in text),
)


def test_malformed_overrides_are_refused(project, capsys):
    def check(override):
        place, separator, _ = override.partition("=")
        named = [name for name in (place, place.split(".")[-1]) if name] if separator else [repr(override)]
        with refused(project, *named):
            check_methods(load_params(overrides=[override]))

    for override in some(draw_all("overrides", MALFORMED_OVERRIDES, check)):
        refused_by_command(capsys, project, "run", "--setting", "pair", "--stage", "teacher", f"--set={override}")


# .npz files of images, and the cards beside them

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "x_train": RANDOM.integers(0, 256, (12, 4, 5, 3), np.uint8),
    "y_train": np.arange(12) % 3,
    "x_test": RANDOM.integers(0, 256, (6, 4, 5, 3), np.uint8),
    "y_test": np.arange(6) % 3,
    "class_names": np.array(["ant", "bee", "cat"]),
}
NEEDED = [key for key in ARRAYS if key != "class_names"]
WRONG_ARRAYS = {
    "x_train": [np.zeros((12, 4, 5), np.uint8), np.zeros((12, 4, 5, 3)), np.zeros((0, 4, 5, 3), np.uint8)],
    "y_train": [np.full(12, np.nan), np.arange(12), np.arange(12) % 3 - 1, np.zeros(12, "<U3"), np.full(12, 2**62)],
    "x_test": [np.zeros((6, 4, 5, 4), np.uint8), np.zeros((6, 2, 2, 3), np.uint8), np.zeros((6, 4, 5, 3), "M8[s]")],
    "y_test": [np.arange(6) + 7, np.arange(5), np.zeros((6, 1), int), np.zeros(6, bool), np.array([{}] * 6, object)],
    "class_names": [np.arange(3), np.array([["a", "b", "c"]]), np.array(["a", "b"]), np.array([b"a", b"b", b"c"])],
}


def npy(array: np.ndarray, **header: object) -> bytes:
    """An array as .npy, whose header may say something else."""
    stream = io.BytesIO()
    if not header:
        np.lib.format.write_array(stream, array)
        return stream.getvalue()
    described = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape} | header
    np.lib.format.write_array_header_1_0(stream, described)
    return stream.getvalue() + array.tobytes()


def npz(compression: int = zipfile.ZIP_DEFLATED, **changes: bytes | None) -> bytes:
    """A sound .npz, but for members with other bytes, or none."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for key, content in ({key: npy(array) for key, array in ARRAYS.items()} | changes).items():
            if content is not None:
                archive.writestr(f"{key}.npy", content)
    return stream.getvalue()


COMPRESSIONS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
SOUND_NPZ = {compression: npz(compression) for compression in COMPRESSIONS}
DATA_START = 30 + len("x_train.npy")  # of the first member, after its header in the .zip


def flipped(content: bytes, position: int, mask: int) -> bytes:
    position %= len(content)
    return content[:position] + bytes([content[position] ^ mask]) + content[position + 1 :]


MALFORMED_NPZ = st.one_of(
    st.builds(
        lambda kind, share: SOUND_NPZ[kind][: int(share * len(SOUND_NPZ[kind]))],
        st.sampled_from(COMPRESSIONS),
        st.floats(0, 0.99),
    ),
    # within the data of the first array, which its checksum covers
    st.builds(
        lambda position, mask: flipped(SOUND_NPZ[0], DATA_START + position, mask),
        st.integers(0, 700),
        st.integers(1, 255),
    ),
    st.binary(max_size=200),
    st.builds(lambda key: npz(**{key: None}), st.sampled_from(NEEDED)),
    st.builds(lambda key, raw: npz(**{key: raw}), st.sampled_from(list(ARRAYS)), st.binary(max_size=50)),
    st.builds(
        lambda key, shape: npz(**{key: npy(ARRAYS[key], shape=shape)}),
        st.sampled_from(list(ARRAYS)),
        st.lists(st.integers(-(2**40), 2**62), max_size=5).map(tuple),
    ),
    st.builds(
        lambda key, descr: npz(**{key: npy(ARRAYS[key], descr=descr)}),
        st.sampled_from(NEEDED),
        st.sampled_from(["|O", "<U0", "|V0", "<f8", "<c16", "<i3", "?", "nonsense", [("a", "|u1")], [("a", "|O")], ""]),
    ).filter(lambda content: content not in SOUND_NPZ.values()),
    st.sampled_from([(key, wrong) for key, all_wrong in WRONG_ARRAYS.items() for wrong in all_wrong]).map(
        lambda case: npz(**{case[0]: pickled(case[1]) if case[1].dtype == object else npy(case[1])})
    ),
)


def pickled(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def test_malformed_npz_files_are_refused(project, capsys):
    path = project / "mine.npz"
    for content in SOUND_NPZ.values():
        path.write_bytes(content)
        ImageSet("mine", **read_arrays(path, ""))

    def check(content):
        path.write_bytes(content)
        with refused(project, str(path), "data set mine: "):
            load_source("mine", "npz", path)

    for content in some(draw_all("npz", MALFORMED_NPZ, check)):
        path.write_bytes(content)
        refused_by_command(capsys, project, "data", "mine")


CARD_FIELDS = ["name", "checksum", "train", "test", "image_size", "channels", "mean", "std", "class_names"]
NO_FIELDS = [
    None,
    True,
    -1,
    0,
    2.5,
    10**400,
    "",
    "../a",
    [],
    [1],
    ["a"],
    {},
    {"a": 1},
    [[1, 2, 3]],
    [None] * 3,
    [0] * 3,
]
IN_RANGE = {"mean": [[0] * 3]}


@st.composite
def malformed_card(draw: st.DrawFn, sound: dict) -> bytes:
    kind = draw(st.sampled_from(["other", "without", "NaN", "cut", "flipped", "no object"]))
    field, text = draw(st.sampled_from(CARD_FIELDS)), json.dumps(sound)
    if kind == "other":
        value = draw(st.sampled_from(NO_FIELDS).filter(lambda value: value not in IN_RANGE.get(field, [])))
        return json.dumps(sound | {field: value}).encode()
    if kind == "without":
        return json.dumps({key: value for key, value in sound.items() if key != field}).encode()
    if kind == "NaN":
        word = draw(st.sampled_from(["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000]))
        return json.dumps(sound | {field: "HERE"}).replace('"HERE"', word).encode()
    if kind == "cut":
        return text[: draw(st.integers(0, len(text) - 1))].encode()
    if kind == "flipped":  # to a byte that no text in UTF-8 has
        position = draw(st.integers(0, len(text) - 1))
        return text[:position].encode() + b"\xff" + text[position + 1 :].encode()
    return draw(st.sampled_from([b"[]", b"3", b"null", b"{}", b'"card"', b"[" * 50_000, b'{"a":' * 50_000, b"\x00"]))


def test_malformed_cards_are_refused(project, capsys):
    path = project / "data" / "mine.npz"
    save_image_set(ImageSet("mine", **ARRAYS), path)
    sound = read_card(path)
    assert set(sound) == set(CARD_FIELDS)

    def check(content):
        path.with_suffix(".json").write_bytes(content)
        for read in (read_card, read_image_set):
            with refused(project, str(path.with_suffix(".json"))):
                read(path)

    for content in some(draw_all("cards", malformed_card(sound), check)):
        path.with_suffix(".json").write_bytes(content)
        refused_by_command(capsys, project, "costs", "pair")


# the archives that torchvision's data sets come in

FILES = {name: RANDOM.bytes(700) for name in ("train", "test", "meta")}


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def small_cifar(monkeypatch):
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5(FILES["train"])]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5(FILES["test"])]])
    monkeypatch.setattr(CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": md5(FILES["meta"])})
    monkeypatch.setattr(sources, "MOST_UNPACKED", 50_000)


def member(name: str, content: bytes = b"", **fields: object) -> bytes:
    """A member of a .tar, a regular file unless its fields say otherwise."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


TRAIN = "cifar-100-python/train"
OTHERS = [member(f"cifar-100-python/{name}", FILES[name]) for name in ("test", "meta")]
LINKS = [tarfile.SYMTYPE, tarfile.LNKTYPE]
NO_FILES = [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.GNUTYPE_SPARSE, b"z"]
TARGETS = st.sampled_from(["../../out", "/etc/passwd", "test", "cifar-100-python/test", "..", ""])
SIZES = st.one_of(st.integers(-(2**60), -1), st.integers(1025, 2**60))
NAMES = st.sampled_from(
    ["train", "../train", "cifar-100-python/../train", "/cifar-100-python/train", "x/" * 150 + "train"]
)


def packed(*members: bytes) -> bytes:
    return gzip.compress(b"".join(members) + bytes(1024), 1, mtime=0)


SOUND_ARCHIVE = packed(*OTHERS, member(TRAIN, FILES["train"]))
MALFORMED_ARCHIVES = st.one_of(
    st.builds(lambda kind, to: packed(*OTHERS, member(TRAIN, type=kind, linkname=to)), st.sampled_from(LINKS), TARGETS),
    st.builds(lambda kind: packed(*OTHERS, member(TRAIN, type=kind)), st.sampled_from(NO_FILES)),
    st.builds(lambda size: packed(*OTHERS, member(TRAIN, FILES["train"], size=size)), SIZES),
    st.builds(lambda name: packed(*OTHERS, member(name, FILES["train"])), NAMES),
    st.builds(lambda raw: packed(*OTHERS, member(TRAIN, raw)), st.binary(max_size=300)),
    st.builds(lambda raw: packed(*OTHERS, member(TRAIN, FILES["train"]), member(TRAIN, raw)), st.binary(max_size=20)),
    st.builds(lambda stop: SOUND_ARCHIVE[:stop], st.integers(0, len(SOUND_ARCHIVE) - 1)),
    # within the compressed data, which gzip's checksum covers
    st.builds(lambda i, mask: flipped(SOUND_ARCHIVE, 20 + i, mask), st.integers(0, 1500), st.integers(1, 255)),
    st.binary(max_size=100),
    st.builds(lambda raw: gzip.compress(raw, mtime=0), st.binary(max_size=1500)),
    st.builds(lambda size: gzip.compress(bytes(size), 1, mtime=0), st.integers(50_001, 10**6)),
)


def unfolds_alike(content: bytes) -> bool:
    """Whether a flipped bit, such as one that fills up a byte, has no meaning."""
    try:
        return gzip.decompress(content) == gzip.decompress(SOUND_ARCHIVE)
    except (OSError, EOFError, zlib.error):
        return False


@pytest.mark.usefixtures("small_cifar")
def test_malformed_archives_are_refused(project, capsys, monkeypatch):
    folder = project / "data" / "download"
    path = folder / CIFAR100.filename
    folder.mkdir(parents=True)

    def place(content):
        path.write_bytes(content)
        monkeypatch.setattr(CIFAR100, "tgz_md5", md5(content))  # as if it were the official one

    def check(content):
        assume(not unfolds_alike(content))
        place(content)
        with refused(project, str(path)):
            load_source("cifar100", "cifar100", download_folder=folder)

    for content in some(draw_all("archives", MALFORMED_ARCHIVES, check)):
        place(content)
        refused_by_command(capsys, project, "data", "cifar100")


@pytest.mark.usefixtures("small_cifar")
def test_the_archive_that_is_spoilt_here_is_sound(project):
    (project / CIFAR100.filename).write_bytes(SOUND_ARCHIVE)
    assert sources._unpacked(CIFAR100, project / CIFAR100.filename, "") == FILES


# records of runs, made elsewhere or torn


@pytest.fixture
def spec(project) -> RunSpec:
    """A run that params.yaml asks for, with its data set."""
    path = project / "data" / "mine.npz"
    save_image_set(ImageSet("mine", **ARRAYS), path)
    return Planner(load_params(), {"mine": read_card(path)["checksum"], "cifar100": ""}).teacher("pair", 0)


def record_of(spec: RunSpec) -> dict:
    """A record that could be its."""
    sitting = {"started": "2026-01-02T03:04:05+00:00", "commit": "0123456789ab", "device": "cpu (x86_64)"}
    return seal(
        {
            **{"run": spec.id, "status": "finished", "identity": spec.identity, "revision": REVISION, "resumes": 0},
            **{"dataset": "mine", "data_checksum": spec.data_checksum, "held_out": spec.held_out, "seed": spec.seed},
            **{"network": spec.network, "method": spec.method, "hyperparameters": {}, "recipe": {"epochs": 2}},
            **{"scheme": "none", "teacher_run": None, "deployed": "student", "student_parameters": 100},
            **{"scores": {"test_accuracy": 51.5, "nll": 1.25, "ece": 0.5}, "further": {}, "weights_sha256": "0" * 64},
            **{"history": [{"epoch": 0, "loss": 1.5}, {"epoch": 1, "loss": 1.25}], "network_epochs": 2, "seconds": 1.5},
            **{"started": sitting["started"], "finished": "2026-01-02T03:05:05+00:00", "sessions": [sitting]},
            **{"device": "cpu (x86_64)", "torch": "2", "commit": "0123456789ab"},
        }
    )


OTHER_VALUES = [None, True, -1, 2.5, 10**400, "", "other", [], [1], {}, {"a": 1}, {"a": None}, [None], "\ud800"]


@st.composite
def malformed_record(draw: st.DrawFn, sound: dict) -> bytes:
    """Torn or altered; altered and sealed anew, so that only what it says can show it; no record at all."""
    text = json.dumps(sound, indent=1)
    kind = draw(st.sampled_from(["other", "without", "NaN", "cut", "bytes", "no object", "forged", "of another run"]))
    field = draw(st.sampled_from(sorted(sound)))
    if kind in ("other", "forged"):
        if kind == "forged":  # fields that no reader of the study could do with
            field = draw(st.sampled_from([*NEEDED_FIELDS]))
        value = draw(st.sampled_from([value for value in OTHER_VALUES if not looks_sound(field, value)]))
        changed = sound | {field: value}
        return json.dumps(seal(changed) if kind == "forged" and field != "sha256" else changed).encode()
    if kind == "without":
        changed = {name: value for name, value in sound.items() if name != field}
        return json.dumps(changed).encode()
    if kind == "NaN":
        word = draw(st.sampled_from(["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "9" * 400]))
        return text.replace("51.5", word).encode()
    if kind == "cut":
        return text[: draw(st.integers(0, len(text) - 1))].encode()
    if kind == "bytes":
        spoilt = flipped(text.encode(), draw(st.integers(0, len(text) - 1)), draw(st.integers(1, 255)))
        assume(not says(spoilt, sound))
        return spoilt
    if kind == "of another run":
        return json.dumps(seal(of_another_run(sound, draw(st.sampled_from(["seed", "network", "data"]))))).encode()
    return draw(
        st.sampled_from([b"[]", b"3", b"null", b"{}", b'"run"', b"[" * 50_000, b'{"a":' * 50_000, b"", b"\x00"])
    )


NEEDED_FIELDS = [
    name for name in RECORD_FIELDS if name not in ("sha256", "torch", "commit", "device", "started", "finished")
]


def looks_sound(field: str, value: object) -> bool:
    """Whether a field of a record may hold this, as far as one can tell without the run."""
    texts = ("dataset", "scheme", "deployed", "torch", "commit", "device", "started", "finished", "weights_sha256")
    numbers = ("student_parameters", "network_epochs", "seconds")
    empty = {"hyperparameters": dict, "recipe": dict, "further": dict, "history": list}
    return (
        (field in texts and isinstance(value, str))
        or (field in numbers and type(value) in (int, float))
        or (field in empty and isinstance(value, empty[field]) and value not in ({"a": None}, [1], [None]))
        or (field in ("hyperparameters", "recipe") and isinstance(value, dict))
        or (field == "weights_sha256" and value is None)
        or (field == "teacher_run" and value is None)
    )


def of_another_run(sound: dict, word: str) -> dict:
    """A sound record of another run."""
    identity = sound["identity"] | {word: 7 if word == "seed" else "other"}
    own = {"seed": "seed", "network": "network", "data": "data_checksum"}[word]
    return sound | {"identity": identity, "run": run_id(identity), own: identity[word]}


def says(content: bytes, record: dict) -> bool:
    try:
        return json.loads(content) == record
    except ValueError:
        return False


def test_malformed_records_are_refused(project, spec, capsys):
    store, sound = Store(), json.loads(json.dumps(record_of(spec)))
    path = store.record_path(spec.id)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(sound))
    assert store.record(spec) == sound

    def check(content):
        path.write_bytes(content)
        with refused(project, str(path)):
            store.record(spec)

    for content in some(draw_all("records", malformed_record(sound), check)):
        path.write_bytes(content)
        refused_by_command(capsys, project, "run", "--setting", "pair", "--stage", "teacher", "--seed", "0")


# checkpoints and weights

STATE = {"epoch": 1, "name": "word", "weights": {"a": torch.arange(600.0), "b": torch.ones(3, 2)}, "rates": [0.1, 0.2]}


class Bomb:
    """Unpickling it makes a folder."""

    def __reduce__(self):
        return Path.mkdir, (Path("ran"),)


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def data_ranges(content: bytes) -> list[int]:
    """The positions of bytes of a .zip that belong to stored members, and are covered by checksums."""
    found = []
    for info in zipfile.ZipFile(io.BytesIO(content)).infolist():
        lengths = content[info.header_offset + 26 : info.header_offset + 30]
        start = info.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        found += range(start, start + info.compress_size)
    return found


SAVED = saved(STATE)
MALFORMED_CHECKPOINTS = st.one_of(
    st.builds(lambda stop: SAVED[:stop], st.integers(0, len(SAVED) - 1)),
    st.builds(lambda at, mask: flipped(SAVED, at, mask), st.sampled_from(data_ranges(SAVED)), st.integers(1, 255)),
    st.binary(max_size=200),
    st.builds(lambda raw: npz(data=raw), st.binary(max_size=50)),
    st.sampled_from([[STATE], torch.ones(3), 3, "state", None, {"state": Bomb()}, [Bomb()], {"path": Path("a")}]).map(
        saved
    ),
    st.sampled_from([STATE, Bomb()]).map(pickle.dumps),
)


def test_malformed_checkpoints_are_refused(project, spec, capsys):
    path = Store().checkpoint(spec.id)
    path.parent.mkdir(parents=True)
    path.write_bytes(SAVED)
    assert load_checkpoint(path, torch.device("cpu"))["name"] == "word"

    def check(content):
        path.write_bytes(content)
        with refused(project, str(path)):
            load_checkpoint(path, torch.device("cpu"))

    cases = draw_all("checkpoints", MALFORMED_CHECKPOINTS, check)
    assert not (project / "ran").exists()
    pickle.loads(pickle.dumps(Bomb()))
    assert (project / "ran").exists(), "the bomb would not have gone off, so this test proves nothing"
    for content in some(cases):
        path.write_bytes(content)
        capsys.readouterr()
        assert main(["run", "--setting", "pair", "--stage", "teacher", "--seed", "0"]) == 1
        told = capsys.readouterr().err
        assert told.splitlines()[-1].startswith("error: ") and str(path) in told and "Traceback" not in told
        assert path.read_bytes() == content
        assert not Store().record_path(spec.id).exists()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


WEIGHTS = as_safetensors(network().state_dict())
HEADER_END = 8 + int.from_bytes(WEIGHTS[:8], "little")
OTHER_NETWORKS = [
    {},
    {"0.weight": torch.ones(4, 3)},
    network().state_dict() | {"more": torch.ones(1)},
    network().state_dict() | {"0.weight": torch.ones(3, 4)},
    network().state_dict() | {"0.weight": torch.ones(12)},
]
MALFORMED_WEIGHTS = st.one_of(
    st.builds(lambda stop: WEIGHTS[:stop], st.integers(0, len(WEIGHTS) - 1)),
    st.builds(lambda raw: WEIGHTS + raw, st.binary(min_size=1, max_size=20)),
    st.builds(lambda at, mask: flipped(WEIGHTS, at, mask), st.integers(0, HEADER_END - 1), st.integers(128, 255)),
    st.binary(max_size=200),
    st.builds(
        lambda size: size.to_bytes(8, "little") + WEIGHTS[8:],
        st.integers(0, 2**64 - 1).filter(lambda n: n + 8 != HEADER_END),
    ),
    st.sampled_from(OTHER_NETWORKS).map(as_safetensors),
    st.sampled_from([STATE, Bomb()]).map(saved),
)


def test_malformed_weights_are_refused(project):
    path = project / "weights.safetensors"
    path.write_bytes(WEIGHTS)
    load_weights(network(), path)

    def check(content):
        path.write_bytes(content)
        module = network()
        with refused(project, str(path)):
            load_weights(module, path)
        for name, tensor in network().state_dict().items():
            assert torch.equal(tensor, module.state_dict()[name])

    draw_all("weights", MALFORMED_WEIGHTS, check)
