"""Weights and checkpoints come back bit for bit, or with a sentence that says which file is unusable and why."""

import errno
import hashlib
import os
import pickle
import random
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn
from toy import CPU, clone, difference, tiny_net

from kdstudy.checkpoint import (
    BadFile,
    file_checksum,
    load_checkpoint,
    load_weights,
    misfit,
    previous_checkpoint,
    remove_checkpoint,
    save_checkpoint,
    save_weights,
    told_if_full,
)
from kdstudy.logit_table import LogitTable


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run" / "file.pt"


def stirred_net(seed: int, dtype=torch.float64, **options) -> nn.Module:
    """A network after a training step's worth of changes to every buffer."""
    network = tiny_net(seed, dtype=dtype, **options).train()
    network(torch.randn(4, 3, 6, 5, dtype=dtype))
    return network


def some_state() -> dict:
    network = stirred_net(1)
    history = [{"phase": "distil", "epoch": 0, "train_accuracy": 100 / 3, "ce": 1.0986122886681098}]
    return {"scheme": network.state_dict(), "history": history, "position": {"step": 3}, "values": None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_come_back_bit_for_bit(path, dtype):
    network, other = stirred_net(0, dtype), stirred_net(1, dtype)
    state = clone(network.state_dict())
    assert difference(clone(other.state_dict()), state)
    save_weights(network, path)
    load_weights(other, path)
    assert difference(clone(other.state_dict()), state) is None
    assert other.layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert difference(clone(network.state_dict()), state) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 4}, "classifier.weight is of shape (3, 3) in the file and of shape (4, 3) in the network"),
        ({"width": 4}, "layer.weight is of shape (3, 2, 3, 3) in the file and of shape (4, 2, 3, 3) in the network"),
    ],
)
def test_weights_of_another_network_are_refused_by_their_first_difference(path, options, message):
    save_weights(tiny_net(0), path)
    network = tiny_net(0, **options)
    before = clone(network.state_dict())
    with pytest.raises(BadFile, match=re.escape(f"{path} belong to another network: {message}")):
        load_weights(network, path)
    assert difference(clone(network.state_dict()), before) is None


def test_missing_and_surplus_tensors_are_named(path):
    small, large = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, bias=False))
    save_weights(small, path)
    with pytest.raises(BadFile, match=r"1\.weight is absent in the file and of shape \(1, 2\) in the network"):
        load_weights(large, path)
    save_weights(large, path)
    with pytest.raises(BadFile, match=r"1\.weight is of shape \(1, 2\) in the file and absent in the network"):
        load_weights(small, path)


def test_absent_weights_are_refused_by_path(path):
    with pytest.raises(BadFile, match=re.escape(f"weights {path} cannot be read")):
        load_weights(tiny_net(0), path)


def damaged(raw: bytes, seed: int, tries: int):
    """Shortened copies, copies with one bit changed, and bytes that never were a file of ours."""
    generator = random.Random(seed)
    for _ in range(tries):
        yield raw[: generator.randrange(len(raw))]
        yield generator.randbytes(generator.randrange(300))
        place = generator.randrange(len(raw))
        yield raw[:place] + bytes([raw[place] ^ 1 << generator.randrange(8)]) + raw[place + 1 :]


def test_damaged_weights_are_refused_or_load_as_tensors_of_the_network(path):
    save_weights(stirred_net(0), path)
    refused = 0
    for raw in damaged(path.read_bytes(), 0, tries=100):
        path.write_bytes(raw)
        try:
            load_weights(tiny_net(0), path)
        except BadFile as error:
            assert str(path) in str(error)
            refused += 1
    assert refused >= 200  # all that are short or garbage


def test_checkpoint_comes_back_bit_for_bit(path):
    state = some_state()
    save_checkpoint(state, path)
    assert difference(clone(load_checkpoint(path, CPU)), clone(state)) is None


def test_absent_checkpoint_is_none(path):
    assert load_checkpoint(path, CPU) is None


def test_damaged_checkpoint_is_refused_by_path_and_never_loaded_wrong(path):
    save_checkpoint(some_state(), path)
    raw = path.read_bytes()
    intact = clone(load_checkpoint(path, CPU))
    refused = 0
    for changed in damaged(raw, 1, tries=150):
        path.write_bytes(changed)
        try:
            state = load_checkpoint(path, CPU)
        except BadFile as error:
            assert str(error).startswith(f"checkpoint {path} cannot be read: ")
            refused += 1
        else:  # the bit was in padding between the tensors
            assert difference(clone(state), intact) is None
    assert refused >= 300


@pytest.mark.parametrize("content", [[1, 2], torch.ones(3), "text"], ids=["list", "tensor", "text"])
def test_a_file_of_something_else_is_refused(path, content):
    path.parent.mkdir()
    torch.save(content, path)
    with pytest.raises(BadFile, match=f"it holds a {type(content).__name__}"):
        load_checkpoint(path, CPU)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("write", [lambda x, path: path.write_bytes(pickle.dumps(x)), torch.save], ids=["bare", "zip"])
def test_code_in_a_checkpoint_is_never_run(path, write):
    path.parent.mkdir()
    target = path.parent / "trapped"
    pickle.loads(pickle.dumps(Trap(target)))
    target.unlink()  # so the trap works
    write({"revision": 1, "scheme": Trap(target)}, path)
    with pytest.raises(BadFile, match=re.escape(str(path))):
        load_checkpoint(path, CPU)
    assert not target.exists()


def write(save, path: Path, value: float) -> bytes:
    """Save something of this value; returns the bytes that lie there."""
    if save is save_weights:
        network = tiny_net(0)
        nn.init.constant_(network.classifier.bias, value)
        save(network, path)
    else:
        save({"value": value, "tensor": torch.full((3,), value)}, path)
    return path.read_bytes()


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["pathlib.Path.write_bytes", "os.fsync", "os.replace", "tempfile.mkstemp"])
@pytest.mark.parametrize("save", [save_checkpoint, save_weights])
def test_a_full_disk_is_told_in_words_and_leaves_the_files_as_they_were(path, save, where, monkeypatch):
    for value in (1.0, 2.0):
        write(save, path, value)
    before = {each: each.read_bytes() for each in path.parent.iterdir()}

    def full(*_, **__):
        raise FULL

    monkeypatch.setattr(where, full)
    with pytest.raises(OSError, match="the disk is full") as caught:
        write(save, path, 3.0)
    assert str(path.parent) in str(caught.value)
    assert {each: each.read_bytes() for each in path.parent.iterdir()} == before


def test_without_links_and_room_for_a_copy_both_stay_as_they_were(path, monkeypatch):
    for value in (1.0, 2.0):
        write(save_checkpoint, path, value)
    before = {each: each.read_bytes() for each in path.parent.iterdir()}

    def refuse(number, *_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", partial(refuse, errno.EPERM))
    monkeypatch.setattr(shutil, "copyfile", partial(refuse, errno.ENOSPC))
    with pytest.raises(OSError, match="the disk is full"):
        write(save_checkpoint, path, 3.0)
    assert {each: each.read_bytes() for each in path.parent.iterdir()} == before


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("needs a file system that may be mounted")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_full_indeed(small_disk):
    path = small_disk / "run" / "checkpoint.pt"
    weights, table = path.with_name("weights.safetensors"), path.with_name("table.safetensors")
    save_weights(tiny_net(0), weights)
    states = [{"tensor": torch.full((40_000,), float(number))} for number in range(3)]
    for state in states[:2]:
        save_checkpoint(state, path)
    before = {each: each.read_bytes() for each in path.parent.iterdir()}
    whole = LogitTable(torch.zeros(400_000, 1, 1, 1, 2, dtype=torch.float16), torch.float32, "float32")
    for save in (
        lambda: save_checkpoint({"tensor": torch.zeros(250_000)}, path),
        lambda: save_weights(nn.Linear(1000, 1000), weights),
        lambda: whole.save(table, teacher="t", data="d"),
    ):
        with pytest.raises(OSError, match=f"the disk is full.*{path.parent}"):
            save()
        assert {each: each.read_bytes() for each in path.parent.iterdir()} == before
    assert difference(load_checkpoint(path, CPU), states[1]) is None
    save_checkpoint(states[2], path)  # for which there is room
    assert difference(load_checkpoint(path, CPU), states[2]) is None


def test_errors_that_are_no_full_disk_stay_what_they_are(tmp_path):
    for error in (OSError(errno.EACCES, "Permission denied"), SafetensorError("invalid"), ValueError("wrong")):
        with pytest.raises(type(error)) as caught, told_if_full(tmp_path):
            raise error
        assert caught.value is error


# the one before


@pytest.fixture(params=["links", "no links"])
def linking(request, monkeypatch):
    if request.param == "no links":

        def refuse(*_):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)


def torn(path: Path) -> None:
    """Leave half of a file. It may be known under two names: the other is not touched."""
    raw = path.read_bytes()
    path.unlink()
    path.write_bytes(raw[: len(raw) // 2])


def value_in(path: Path) -> float:
    return load_checkpoint(path, CPU)["value"]


def test_the_one_before_is_kept_beside(path, linking):
    for value in (1.0, 2.0, 3.0):
        write(save_checkpoint, path, value)
    assert {each.name for each in path.parent.iterdir()} == {"file.pt", "file.previous.pt"}
    assert previous_checkpoint(path) == path.parent / "file.previous.pt"
    assert (value_in(path), value_in(previous_checkpoint(path))) == (3.0, 2.0)


def test_the_one_before_is_not_written_again(path):
    write(save_checkpoint, path, 1.0)
    number = path.stat().st_ino
    write(save_checkpoint, path, 2.0)
    assert previous_checkpoint(path).stat().st_ino == number != path.stat().st_ino


def test_a_torn_one_is_told_of_and_the_one_before_taken(path, linking):
    for value in (1.0, 2.0):
        write(save_checkpoint, path, value)
    torn(path)
    left = {each: each.read_bytes() for each in path.parent.iterdir()}
    with pytest.warns(UserWarning, match=re.escape(f"checkpoint {path} cannot be read: ")) as told:
        assert value_in(path) == 1.0
    assert str(previous_checkpoint(path)) in str(told[0].message)
    assert {each: each.read_bytes() for each in path.parent.iterdir()} == left
    write(save_checkpoint, path, 3.0)
    assert value_in(path) == 3.0


def test_two_torn_ones_are_refused_by_name(path):
    for value in (1.0, 2.0):
        write(save_checkpoint, path, value)
    torn(path)
    torn(previous_checkpoint(path))
    wanted = f"checkpoint {path} cannot be read: .*; and {previous_checkpoint(path)}.* remove both to start"
    with pytest.raises(BadFile, match=wanted):
        load_checkpoint(path, CPU)


def test_without_the_last_one_a_run_starts_anew_and_for_good(path):
    for value in (1.0, 2.0):
        write(save_checkpoint, path, value)
    path.unlink()
    assert load_checkpoint(path, CPU) is None
    write(save_checkpoint, path, 3.0)
    assert list(path.parent.iterdir()) == [path]


def test_both_are_removed_also_where_there_are_none(path):
    for value in (1.0, 2.0):
        write(save_checkpoint, path, value)
    other = path.with_name("other.pt")
    write(save_checkpoint, other, 1.0)
    for _ in range(2):
        remove_checkpoint(path)
        assert list(path.parent.iterdir()) == [other]


@pytest.mark.parametrize("last_is_torn", [False, True])
def test_at_every_moment_of_a_save_a_whole_one_is_on_disk(path, linking, last_is_torn, tmp_path, monkeypatch):
    for value in (1.0, 2.0):
        write(save_checkpoint, path, value)
    if last_is_torn:
        torn(path)
    moments = []

    def watched(owner, name):
        usual = getattr(owner, name)

        def call(*arguments, **named):
            moments.append(shutil.copytree(path.parent, tmp_path / f"{len(moments)} before {name}"))
            result = usual(*arguments, **named)
            moments.append(shutil.copytree(path.parent, tmp_path / f"{len(moments)} after {name}"))
            return result

        monkeypatch.setattr(owner, name, call)

    copyfile = shutil.copyfile  # which copies the folder, too
    for owner, name in ((os, "link"), (os, "replace"), (os, "fsync"), (Path, "unlink"), (Path, "write_bytes")):
        watched(owner, name)
    monkeypatch.setattr(shutil, "copyfile", copyfile)
    write(save_checkpoint, path, 3.0)
    assert len(moments) >= 12
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if last_is_torn else "error")
        for moment in moments:
            found.append(value_in(moment / path.name))
    before = 1.0 if last_is_torn else 2.0
    assert found == sorted(found) and set(found) == {before, 3.0}


def test_a_file_for_which_there_is_no_memory_is_not_called_torn(path, monkeypatch):
    for value in (1.0, 2.0):
        write(save_checkpoint, path, value)
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):

        def load(*_, error=error, **__):
            raise error

        monkeypatch.setattr(torch, "load", load)
        with pytest.raises(type(error)):
            load_checkpoint(path, CPU)


# checksums and forms


@pytest.mark.parametrize("size", [0, 1, 3_000_001])
def test_a_files_checksum_is_that_of_its_bytes(tmp_path, size):
    path, raw = tmp_path / "file", random.Random(size).randbytes(size)
    path.write_bytes(raw)
    assert file_checksum(path) == hashlib.sha256(raw).hexdigest()


FORM = {"one": int, "both": (int, float), "nets": {str: torch.zeros(2)}, "rows": [{"name": str, str: float}]}


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({}, None),
        ({"both": 2.5, "nets": {}, "rows": []}, None),
        ({"rows": [{"name": "x", "a": 1.0}, {"name": "y"}]}, None),
        ({"one": 1.0}, "one is float, not int"),
        ({"one": True}, "one is bool, not int"),
        ({"both": "x"}, "both is str, not int or float"),
        ({"more": 1}, "more is unknown"),
        ({"nets": {"a": torch.zeros(3)}}, "nets.a is a tensor of float32 of shape (3,), not a tensor"),
        (
            {"nets": {"a": torch.zeros(2, dtype=torch.float64)}},
            "nets.a is a tensor of float64 of shape (2,), not a tensor",
        ),
        ({"nets": {"a": [0.0, 0.0]}}, "nets.a is list, not a tensor of float32 of shape (2,)"),
        ({"nets": {1: torch.zeros(2)}}, "nets.1 is unknown"),
        ({"nets": []}, "nets is list, not dict"),
        ({"rows": {}}, "rows is dict, not list"),
        ({"rows": [{"name": "x"}, {}]}, "rows[1].name is absent"),
        ({"rows": [{"name": "x", "a": 1}]}, "rows[0].a is int, not float"),
    ],
)
def test_what_is_not_made_as_it_should_be_is_named(change, wrong):
    found = misfit({"one": 1, "both": 1, "nets": {"a": torch.ones(2)}, "rows": []} | change, FORM)
    assert found is None if wrong is None else found.startswith(wrong)


def test_what_is_absent_is_named():
    assert misfit({}, {"a": {"b": int}}, "state") == "state.a is absent"
    assert misfit({"a": {}}, {"a": {"b": int}}, "state") == "state.a.b is absent"
    assert misfit(None, int) and misfit(None, {"a": int}) and misfit(None, (int, type(None))) is None
    assert misfit(torch.ones(1), object) is None
