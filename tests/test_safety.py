"""No code from outside is run, no file leaves its folder, and nothing in params.yaml becomes a word of a command."""

import ast
import hashlib
import io
import os
import pickle
import re
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torchvision.datasets import CIFAR100

from kdstudy.checkpoint import BadFile, load_checkpoint, load_weights
from kdstudy.image_set import DataError, read_arrays
from kdstudy.params import load_params
from kdstudy.sources import load_source

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "kdstudy").rglob("*.py"))
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

# what the package's own code says

NEVER_IMPORTED = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pty", "code"}
NEVER_CALLED = {
    *("getoutput", "getstatusoutput", "popen", "startfile"),
    *("spawnl", "spawnv", "spawnlp", "spawnvp", "execl", "execv", "execlp", "execvp", "create_subprocess_shell"),
    *("extractall", "extract", "unpack_archive", "extract_archive", "download_and_extract_archive"),
    *("read_pickle", "unsafe_load", "full_load", "unsafe_load_all", "full_load_all", "load_state_dict_from_url"),
}
BUILT_IN = {"eval", "exec", "compile", "__import__"}  # networks and regular expressions have methods of these names
PROCESS_CALLS = {"run", "Popen", "call", "check_call", "check_output"}


def offences(source: str) -> Iterator[str]:
    """Every place of a source that could run what it is given."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            words = [alias.name for alias in node.names]
            named = words if isinstance(node, ast.Import) else [node.module or ""]
            if words != ["UnpicklingError"]:  # to catch it is no harm
                yield from (f"import {name}" for name in named if name.split(".")[0] in NEVER_IMPORTED)
        if isinstance(node, ast.Call):
            yield from _offences_of_call(node)


def _offences_of_call(node: ast.Call) -> Iterator[str]:
    called = ast.unparse(node.func)
    owner, _, name = called.rpartition(".")
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if name in NEVER_CALLED or called == "os.system" or (name in BUILT_IN and owner in ("", "builtins")):
        yield called
    if keywords.get("shell", "False") != "False":
        yield f"{called} with a shell"
    if owner.split(".")[-1] == "subprocess" and name in PROCESS_CALLS and is_text(node.args[0]):
        yield f"{called} of one text"
    if called == "torch.load" and keywords.get("weights_only") != "True":
        yield "torch.load of any object"
    unknown = None in keywords and called in ("np.load", "numpy.load")
    if keywords.get("allow_pickle", "False") != "False" or unknown:
        yield f"{called} of pickles"
    if owner == "yaml" and name in ("load", "load_all") and "Safe" not in ast.unparse(node):
        yield f"{called} of any object"


def is_text(node: ast.AST) -> bool:
    """Whether an expression is one text, and not a list of words."""
    return isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp) or ast.unparse(node).endswith(")")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_source_runs_what_it_is_given(path):
    assert list(offences(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "from pickle import UnpicklingError, loads",
        "import os.path, dill",
        "eval('1')",
        "exec(text)",
        "os.system('ls')",
        "os.popen(text)",
        "subprocess.run('ls', shell=True)",
        "subprocess.run(words, shell=1)",
        "subprocess.run(f'ls {name}')",
        "subprocess.run('ls ' + name)",
        "subprocess.Popen(' '.join(words))",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=safe)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=trusted)",
        "np.load(path, **options)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "tar.extractall(folder)",
        "tar.extract(member, folder, filter='data')",
        "shutil.unpack_archive(path)",
        "utils.download_and_extract_archive(url, folder)",
        "pd.read_pickle(path)",
        "asyncio.create_subprocess_shell(text)",
    ],
)
def test_what_runs_what_it_is_given_is_found(source):
    assert list(offences(source))


@pytest.mark.parametrize(
    "source",
    [
        "from pickle import UnpicklingError",
        "network.eval()",
        "re.compile(text)",
        "subprocess.run(['git', *words], check=True)",
        "subprocess.run(words, shell=False)",
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=False)",
        "yaml.safe_load(text)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "ast.literal_eval(text)",
        "tar.extractfile(member).read()",
    ],
)
def test_what_does_not_is_left_alone(source):
    assert not list(offences(source))


# the pipeline's commands

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())
STAGES = PIPELINE["stages"]
PARAMS = load_params(ROOT / "params.yaml")


def axis_of(stage: dict) -> list | dict:
    return stage["matrix"]["profile"] if "matrix" in stage else stage["foreach"]


def test_the_axes_are_those_of_params():
    axes = {name: axis for entry in PIPELINE["vars"] for name, axis in entry.items()}
    assert axes["profiles_axis"] == list(PARAMS.profiles)
    assert axes["datasets_axis"] == list(PARAMS.datasets)
    named = {name: {"profile": each.profile, "dataset": each.dataset} for name, each in PARAMS.settings.items()}
    assert axes["settings_axis"] == named
    assert list(axes["settings_axis"]) == list(named)
    assert axes["scheme_settings_axis"].items() <= named.items()


@pytest.mark.parametrize("name", STAGES)
def test_what_becomes_a_word_of_a_command_is_written_out_and_has_a_safe_name(name):
    stage = STAGES[name]
    axis, command = axis_of(stage), stage.get("do", stage)["cmd"]
    assert isinstance(axis, list | dict) and "$" not in repr(axis)  # no word that DVC would look up
    words = axis if isinstance(axis, list) else [*axis, *(word for item in axis.values() for word in item.values())]
    assert words and all(SAFE_NAME.fullmatch(word) for word in words)
    looked_up = {"item"} if "foreach" in stage and isinstance(axis, list) else {"key", "item.profile"}
    assert set(re.findall(r"\$\{(.*?)\}", command)) <= looked_up
    assert re.fullmatch(r"(?:[A-Za-z0-9_./= -]|\$\{[a-z.]+\})+", command)


def commands(folder: Path) -> dict[str, str]:
    from dvc.repo import Repo

    with Repo(folder) as repo:
        return {stage.addressing: stage.cmd for stage in repo.index.stages}


def test_nothing_in_params_becomes_a_word_of_a_command(tmp_path, monkeypatch):
    from dvc.repo import Repo

    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    Repo.init(tmp_path, no_scm=True).close()
    sound = commands(tmp_path)
    assert sound["teacher@digits"].endswith("reports/quick/notebooks/1_teacher_digits.ipynb setting=digits")
    axes = [name for entry in PIPELINE["vars"] for name in entry]
    tree = yaml.safe_load((ROOT / "params.yaml").read_text())
    evil = {"x; touch out": {"profile": "$(touch out)", "dataset": "`touch out`"}}
    for name in ("settings", "datasets", "profiles"):
        tree[name] |= evil
    tree |= {axis: dict(evil) for axis in axes if isinstance(axis_named(axis), dict)}
    tree |= {"item": {"profile": "$(touch out)"}, "key": "; touch out", "profile": ["; touch out"]}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree))
    assert commands(tmp_path) == sound


def axis_named(name: str) -> list | dict:
    return next(entry[name] for entry in PIPELINE["vars"] if name in entry)


# files from outside


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path) -> Iterator[Path]:
    """A folder that none of the files may make; each would make it, were it read as it asks to be."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists()
    pickle.loads(pickle.dumps(Bomb(path)))
    assert path.exists(), "the bomb would not have gone off, so this test proves nothing"


@pytest.mark.parametrize("wrap", [lambda bomb: bomb, lambda bomb: {"state": bomb}, lambda bomb: [torch.ones(1), bomb]])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, marker, wrap, zipped):
    path = tmp_path / "checkpoint.pt"
    torch.save(wrap(Bomb(marker)), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(BadFile, match=r"checkpoint.pt"):
        load_checkpoint(path, torch.device("cpu"))


def test_a_checkpoint_whose_pickle_was_exchanged_is_refused(tmp_path, marker):
    sound, path = tmp_path / "sound.pt", tmp_path / "checkpoint.pt"
    torch.save({"a": torch.ones(3)}, sound)
    with zipfile.ZipFile(sound) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            is_pickle = info.filename.endswith("data.pkl")
            new.writestr(info.filename, pickle.dumps(Bomb(marker)) if is_pickle else old.read(info))
    with pytest.raises(BadFile, match=r"checkpoint.pt"):
        load_checkpoint(path, torch.device("cpu"))


@pytest.mark.parametrize("write", [pickle.dumps, lambda bomb: saved(bomb), lambda bomb: saved({"weight": bomb})])
def test_weights_that_would_run_code_are_refused(tmp_path, marker, write):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(write(Bomb(marker)))
    with pytest.raises(BadFile, match=r"weights.safetensors"):
        load_weights(nn.Linear(2, 2), path)


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


ARRAYS = {
    "x_train": np.zeros((4, 2, 2, 1), np.uint8),
    "y_train": np.arange(4) % 2,
    "x_test": np.zeros((2, 2, 2, 1), np.uint8),
    "y_test": np.arange(2),
    "class_names": np.array(["a", "b"]),
}


@pytest.mark.parametrize("key", ARRAYS)
def test_an_array_that_would_run_code_is_refused(tmp_path, marker, key):
    np.savez(tmp_path / "x.npz", **(ARRAYS | {key: np.array([Bomb(marker)] * 4, dtype=object)}))
    with pytest.raises(DataError, match="which is never run"):
        read_arrays(tmp_path / "x.npz", "")


def test_an_npz_that_is_a_pickle_is_refused(tmp_path, marker):
    (tmp_path / "x.npz").write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(DataError, match=r"x\.npz is truncated, altered or no \.npz"):
        read_arrays(tmp_path / "x.npz", "")


@pytest.mark.parametrize("name", ["../ran", "{folder}/ran", "x/../../ran", "x_train.npy/../../ran"])
def test_members_of_an_npz_cannot_leave_their_folder(tmp_path, marker, name):
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "x.npz"
    np.savez(path, **ARRAYS)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name.format(folder=tmp_path), b"x")
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "../ran")
    assert set(read_arrays(path, "")) == set(ARRAYS)
    assert [entry.name for entry in (tmp_path / "folder").iterdir()] == ["x.npz"]


KINDS = {
    "a file": (tarfile.REGTYPE, ""),
    "a symbolic link": (tarfile.SYMTYPE, ".."),
    "a link to a file": (tarfile.SYMTYPE, "/etc/passwd"),
    "a hard link": (tarfile.LNKTYPE, "../../precious"),
    "a character device": (tarfile.CHRTYPE, ""),
    "a block device": (tarfile.BLKTYPE, ""),
    "a queue": (tarfile.FIFOTYPE, ""),
}


def packed(*members: tuple[str, bytes, bytes, str]) -> bytes:
    """A .tar.gz of members, each with name, content, type and target."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content, kind, target in members:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), kind, target
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


@pytest.mark.parametrize(("kind", "target"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", ["../../ran", "cifar-100-python/../../ran", "cifar-100-python/more", "{folder}/ran"])
def test_members_of_an_archive_cannot_leave_their_folder(tmp_path, monkeypatch, kind, target, name):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), np.uint8)
    part = pickle.dumps({"data": pixels, "fine_labels": [0, 1, 0, 1]})
    files = {"train": part, "test": part, "meta": pickle.dumps({"fine_label_names": ["a", "b"]})}
    sound = [(f"cifar-100-python/{key}", raw, tarfile.REGTYPE, "") for key, raw in files.items()]
    content = packed((name.format(folder=tmp_path), b"", kind, target), *sound)
    monkeypatch.setattr(CIFAR100, "tgz_md5", md5(content))
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5(part)]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5(part)]])
    monkeypatch.setattr(CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": md5(files["meta"])})
    monkeypatch.delenv("KDSTUDY_DATA", raising=False)
    (tmp_path / "precious").write_text("mine")
    folder = tmp_path / "data" / "download"
    folder.mkdir(parents=True)
    (folder / CIFAR100.filename).write_bytes(content)
    assert load_source("cifar100", "cifar100", download_folder=folder).classes == 2
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir() or path.is_symlink()}
    assert found == {"precious", *(f"data/download/cifar-100-python/{key}" for key in files)}
    assert (tmp_path / "precious").read_text() == "mine"
