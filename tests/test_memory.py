"""What a step keeps is counted by hand, what is free is read as the system writes it, freed memory stays."""

import ctypes
import os

import pytest
import torch
from torch import Tensor, nn
from toy import CPU

from kdstudy import memory
from kdstudy.memory import bytes_kept, free_bytes, is_out_of_memory, keep_freed_memory


def test_what_a_product_keeps_is_its_factors():
    one, other = torch.randn(7, 5, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    product, kept = bytes_kept(lambda: one @ other)
    assert torch.equal(product, one @ other)
    assert kept == {one.data_ptr(): 7 * 5 * 4, other.data_ptr(): 5 * 3 * 4}


def test_memory_that_is_kept_twice_or_in_part_counts_once_and_whole():
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def function() -> Tensor:
        squared = x.square().sum() + x.sin().sum()  # both keep x
        return squared + x[:2].square().sum()  # and this a part of it

    _, kept = bytes_kept(function)
    assert kept == {x.data_ptr(): 6 * 4 * 8}


def test_what_a_layer_keeps_grows_with_the_batch_and_without_gradient_nothing_is_kept():
    layer = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 2))
    weights = 4 * 6 * 2  # bytes; the first layer's are not needed, since images have no gradient
    for batch in (1, 9):
        _, kept = bytes_kept(lambda batch=batch: layer(torch.randn(batch, 4)))
        assert sum(kept.values()) == weights + batch * 4 * (4 + 6)
    with torch.no_grad():
        assert bytes_kept(lambda: layer(torch.randn(3, 4)))[1] == {}


def test_gradients_are_those_of_a_step_that_is_not_counted():
    x = torch.randn(5, requires_grad=True)
    value, _ = bytes_kept(lambda: (x.exp() * x).sum())
    value.backward()
    torch.testing.assert_close(x.grad, x.detach().exp() * (x.detach() + 1))


def test_what_is_free_is_what_linux_says(tmp_path, monkeypatch):
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:  65775104 kB\nMemFree:  4711 kB\nMemAvailable:    1234567 kB\nHugePages_Total:  0\n")
    monkeypatch.setattr(memory, "AVAILABLE", file)
    monkeypatch.setattr(memory, "CONTAINER", tmp_path / "absent")
    assert free_bytes(CPU) == 1234567 * 1024


@pytest.mark.parametrize(
    ("limit", "free"), [("max", 1234567 * 1024), ("1000000", 1000000 - 700000 + 2000), ("9" * 15, 1234567 * 1024)]
)
def test_a_container_may_have_less(limit, free, tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal:  65775104 kB\nMemAvailable:    1234567 kB\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 4\ninactive_file 2000\nactive_file 8\n")
    monkeypatch.setattr(memory, "AVAILABLE", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CONTAINER", tmp_path)
    assert free_bytes(CPU) == free


def test_what_says_that_memory_is_short_is_known_from_other_errors():
    with pytest.raises((RuntimeError, MemoryError)) as found:
        torch.empty(2**55, dtype=torch.uint8)
    assert is_out_of_memory(found.value)
    with pytest.raises(MemoryError) as found:
        bytearray(2**55)
    assert is_out_of_memory(found.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    with pytest.raises(RuntimeError) as found:
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert not is_out_of_memory(found.value) and not is_out_of_memory(ValueError("out of memory"))


def test_where_the_system_does_not_say_it_is_half_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "AVAILABLE", tmp_path / "absent")
    pages = {"SC_PHYS_PAGES": 1001, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    assert free_bytes(CPU) == 1001 * 2048


def test_here_some_memory_is_free_and_no_more_than_there_is():
    assert 2**20 < free_bytes(CPU) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Library:
    """A C library whose `mallopt` takes notes; it answers 0 for what it refuses."""

    def __init__(self, refused: int | None = None):
        self.calls: dict[int, int] = {}
        self._refused = refused

    def mallopt(self, what: int, value: int) -> int:
        self.calls[what] = value
        return int(what != self._refused)


def test_thresholds_of_glibc_are_raised_to_where_they_may_be(monkeypatch):
    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert keep_freed_memory() is True
    # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, whose largest value is HEAP_MAX_SIZE / 2, 32 MiB
    assert library.calls == {-1: 2**31 - 1, -3: 32 * 2**20}


@pytest.mark.parametrize("refused", [-1, -3])
def test_a_library_that_refuses_is_told(refused, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library(refused))
    assert keep_freed_memory() is False


@pytest.mark.parametrize("error", [OSError, TypeError, None])
def test_another_c_library_is_left_alone(error, monkeypatch):
    def load(name: None) -> object:
        if error:
            raise error("no such library")
        return object()  # without mallopt

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert keep_freed_memory() is False


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc")
def test_glibc_takes_the_thresholds():
    assert keep_freed_memory() is True
