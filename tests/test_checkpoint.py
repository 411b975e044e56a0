"""Weights and checkpoints come back bit for bit, or with a sentence that says which file is unusable and why."""

import pickle
import random
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from toy import CPU, clone, difference, tiny_net

from kdstudy.checkpoint import BadFile, load_checkpoint, load_weights, save_checkpoint, save_weights


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


@pytest.mark.parametrize("save", [save_checkpoint, save_weights])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(path, save, monkeypatch):
    def full_disk(content, target):
        Path(target).write_bytes(b"half of")
        raise OSError(28, "No space left on device")

    network = tiny_net(0)
    save_weights(network, path) if save is save_weights else save_checkpoint({"a": 1}, path)
    raw = path.read_bytes()
    monkeypatch.setattr(torch, "save", full_disk)
    monkeypatch.setattr("kdstudy.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(network if save is save_weights else {"a": 2}, path)
    assert path.read_bytes() == raw
    assert list(path.parent.iterdir()) == [path]
