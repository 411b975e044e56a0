"""What happens inside the processes of a study under test. Python runs this file at each start, if its folder is told.

KDSTUDY_WITNESS names a file. Every step, checkpoint and record that a process makes is appended to it as one line:
what, run, phase, epoch, step, process id, seconds on the clock that nobody sets.

KDSTUDY_FAULT is a mapping in JSON: `what` (one of FAULTS), and, for those that strike at a step, `at` (the step of the
process), `times` (how often, over all processes) and `marks` (a folder in which that is counted).
"""

import importlib.machinery
import json
import os
import time
from pathlib import Path


def after_import(name, change):
    """Call `change(module)` once the module of that name has been imported."""
    execute = importlib.machinery.SourceFileLoader.exec_module

    def exec_module(self, module):
        execute(self, module)
        if module.__name__ == name:
            change(module)

    importlib.machinery.SourceFileLoader.exec_module = exec_module


def before_each(owner, name, act):
    """Have `act(self)` called before every call of a method."""
    method = getattr(owner, name)

    def acting(self, *arguments, **options):
        act(self)
        return method(self, *arguments, **options)

    setattr(owner, name, acting)


def after_each(owner, name, act):
    """Have `act(self, *arguments)` called after every call of a method."""
    method = getattr(owner, name)

    def acting(self, *arguments, **options):
        result = method(self, *arguments, **options)
        act(self, *arguments)
        return result

    setattr(owner, name, acting)


# witnesses

monotonic = time.monotonic  # before any fault sets a clock


def tell(what, run, phase=0, epoch=0, step=0):
    """Append a line; one write of that size is never mixed with another's."""
    line = f"{what} {run} {phase} {epoch} {step} {os.getpid()} {monotonic():.6f}\n"
    handle = os.open(os.environ["KDSTUDY_WITNESS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


def watch_training(train):
    for method, what in (("start", "start"), ("end_step", "step"), ("save", "save")):
        after_each(train.Training, method, lambda self, *_, what=what: tell(what, run_of(self), *position_of(self)))


def run_of(training):
    return training.surroundings.run


def position_of(training):
    return training.position.phase, training.position.epoch, training.position.step


def watch_store(store):
    after_each(store.Store, "write_record", lambda self, record: tell("kept", record["run"]))


# faults


def strike_at_step(fault, strike):
    """Call `strike()` before the step numbered `at` of this process, `times` times over all processes."""
    steps = 0

    def count(training):
        nonlocal steps
        steps += 1
        if steps == fault["at"] and claim(Path(fault["marks"]), fault.get("times", 1)):
            strike()

    after_import("kdstudy.train", lambda train: before_each(train.Training, "step", count))


def claim(marks, times):
    """Whether there is a strike left; it is taken."""
    marks.mkdir(parents=True, exist_ok=True)
    for number in range(times):
        try:
            (marks / str(number)).touch(exist_ok=False)
        except FileExistsError:
            continue
        return True
    return False


def die(fault):
    """The process is killed, as by the kernel when memory runs out."""
    strike_at_step(fault, lambda: os.kill(os.getpid(), 9))


def lose_gpu_memory(fault):
    """torch says that a GPU has no memory left, in its words."""

    def strike():
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.11 GiB in all.")

    strike_at_step(fault, strike)


def limit_memory(fault):
    """From when runs are about to be made, the process may have `megabytes` more than it has by then."""

    def limit(maker):
        import resource

        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        held = 1024 * int(status["VmData"].split()[0])
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        if claim(Path(fault["marks"]), 1):
            resource.setrlimit(resource.RLIMIT_DATA, (held + 2**20 * fault["megabytes"], most))

    after_import("kdstudy.make", lambda make: before_each(make.Maker, "make", limit))


def set_clocks(fault):
    """Whoever asks for the time of day is told one that jumps by up to three days, back and forth."""
    import datetime
    import random

    true, chance = time.time, random.Random(0)

    def now():
        return true() + chance.uniform(-3, 3) * 86400

    class Datetime(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(now(), tz)

    time.time, time.time_ns = now, lambda: int(now() * 1e9)
    # not for all modules: compiled ones rely on the size of the class
    after_import("kdstudy.provenance", lambda provenance: setattr(provenance, "datetime", Datetime))


FAULTS = {"die": die, "gpu_memory": lose_gpu_memory, "memory": limit_memory, "clocks": set_clocks}

if "KDSTUDY_WITNESS" in os.environ:
    after_import("kdstudy.train", watch_training)
    after_import("kdstudy.store", watch_store)
if "KDSTUDY_FAULT" in os.environ:
    told = json.loads(os.environ["KDSTUDY_FAULT"])
    FAULTS[told["what"]](told)
