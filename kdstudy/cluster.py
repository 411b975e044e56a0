"""Cohorts made by the workers of a Ray cluster, which share no files with this machine; one GPU each, if it has any.

Files travel with the work: the data set once, with each cohort its teachers' weights and its members' checkpoints, and
back come records, weights and checkpoints as soon as they are written. A worker that is lost costs what it did since
its last checkpoint. Ray is the extra `cluster` of the package; nothing else needs it.

A Ray cluster runs whatever its drivers send it, and what passes between them is pickled: join only one that you trust,
in a network that you trust. One that is started here listens to this machine alone, and asks for a token.
"""

import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import shorten
from typing import Any, Self

import torch

from kdstudy import provenance
from kdstudy.checkpoint import remove_checkpoint
from kdstudy.device import data_path
from kdstudy.execute import Cohort, Executor, Order
from kdstudy.files import atomic_write
from kdstudy.make import OnStep
from kdstudy.memory import release
from kdstudy.records import read_record
from kdstudy.stopping import Failed, ShouldStop, Stopped
from kdstudy.store import Store
from kdstudy.study import RunSpec

POLL_SECONDS = 0.3
CONNECT_SECONDS = 5.0
FAREWELL_SECONDS = 3.0
LOSSES = 3  # of workers, one after the other, at a cohort of which nothing came
PREFIX = "kdstudy-"

LOCAL = {  # for a cluster on this machine
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # nobody from outside is listened to
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # older versions warn that this will be so
}
FAR = Store(Path("store"), Path("runs"))  # in a worker's folder

Files = dict[str, bytes]  # by name, or path


class RayCluster:
    """Has cohorts made by a Ray cluster: an `execute.Spread`.

    `address` is "local:N" for N workers on CPUs of this machine, started here and ended by `close`, or, for a cluster
    that `ray start` has made and that this machine is part of, "auto" or "host:port". Its machines have the same
    version of this package. Raises ValueError for other words or without Ray, and Failed if the cluster is not there.
    """

    def __init__(self, address: str):
        with ExitStack() as stack:
            if address.startswith("local:"):
                options = _local(address, stack)
            else:
                options = _joined(address)
            self._ray = _import_ray()
            stack.callback(self._ray.shutdown)
            try:
                with _own_sigterm():
                    self._ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
            except Exception as error:  # of any kind: Ray has none of its own for this
                raise Failed(f"the Ray cluster {address} cannot be used: {error}") from error
            found = self._ray.cluster_resources()
            self._needs = {"num_gpus": 1} if found.get("GPU", 0) >= 1 else {"num_cpus": 1}
            self.seats = int(found.get("GPU", 0)) or int(found.get("CPU", 0))
            if not self.seats:
                raise Failed(f"the Ray cluster {address} has neither a GPU nor a CPU for work")
            self._spare: list[Any] = []  # workers between two orders
            stack.callback(self._dismiss)
            self._stack = stack.pop_all()

    def __call__(self, order: Order, groups: Sequence[Sequence[Cohort]], tell: OnStep, should_stop: ShouldStop) -> None:
        """Have cohorts made, a group when the one before is done, and keep what comes back in the ledger's store.

        Runs that are finished, or that another process finishes meanwhile, are left out. The first error ends all:
        workers are asked to stop, and then it is raised. Raises Stopped when they have been asked to and their
        checkpoints are here, and Failed if workers are lost again and again at a cohort or have another version.
        """
        crew = _Crew(self._ray, order, tell, self._needs, self.seats, self._spare)
        try:
            for group in groups:
                crew.make(group, should_stop)
        finally:
            crew.leave()

    def close(self) -> None:
        """End the workers and leave the cluster; end that, too, if it was started here."""
        self._stack.close()

    def _dismiss(self) -> None:
        farewells = [worker.leave.remote() for worker in self._spare]
        if farewells:
            self._ray.wait(farewells, num_returns=len(farewells), timeout=FAREWELL_SECONDS)
        for worker in self._spare:
            self._ray.kill(worker)
        self._spare.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ValueError(f'a cluster needs Ray: pip install "kdstudy[cluster]" ({error})') from error
    return ray


def _local(address: str, stack: ExitStack) -> dict[str, Any]:
    count = address.removeprefix("local:")
    if not count.isdecimal() or not int(count):
        raise ValueError(f"a cluster on this machine is local:N, with N workers, not {address!r}")
    if "ray" not in sys.modules:  # which looks at the environment when it is imported
        for name, value in (LOCAL | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}).items():
            os.environ.setdefault(name, value)
    folder = stack.enter_context(_own_folder())
    return {"num_cpus": int(count), "num_gpus": 0, "include_dashboard": False, "_temp_dir": str(folder)}


def _joined(address: str) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    if address != "auto":
        if not host or "/" in host or not port.isdecimal() or int(port) >= 2**16:
            raise ValueError(f"the address of a Ray cluster is local:N, auto or host:port, not {address!r}")
        try:  # Ray itself would wait for minutes
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        except OSError as error:
            raise Failed(f"no Ray cluster answers at {address} ({error}); `ray start --head` starts one") from error
    return {"address": address}


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """What SIGTERM does to this process stays as it is, though Ray changes it."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _own_folder() -> Iterator[Path]:
    """A temporary folder of this process alone. Those of processes that were killed are swept away."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*.lock"):
        with suppress(OSError), open(path) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_folder(path)
    handle, name = tempfile.mkstemp(prefix=PREFIX, suffix=".lock")
    with open(handle) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = Path(name).with_suffix("")
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            _remove_folder(Path(name))


def _remove_folder(lock: Path) -> None:
    shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
    lock.unlink(missing_ok=True)


@dataclass(eq=False)
class _Task:
    """A cohort, and how many workers were lost at it since anything came of it."""

    cohort: Cohort
    losses: int = 0


@dataclass(eq=False)
class _Seat:
    """A worker, what it is doing, and what keeps other processes of this machine from doing the same."""

    worker: Any
    task: _Task
    locks: ExitStack = field(default_factory=ExitStack)


class _Crew:
    """The workers of an order, as the process sees them that gives it. One call at a time is under way at each."""

    def __init__(self, ray: Any, order: Order, tell: OnStep, needs: dict[str, int], most: int, spare: list[Any]):
        self._ray, self._tell, self._needs, self._most, self._spare = ray, tell, needs, most, spare
        self._store = order.ledger.store
        self._device = "cuda:0" if "num_gpus" in needs else "cpu"
        data = data_path(order.ledger.planner.setting(order.setting).dataset)
        files = {str(path): path.read_bytes() for path in (data, data.with_suffix(".json"))}
        self._shared = [ray.put(order), ray.put(files)]
        self._beginning = _Task(())
        self._seats: list[_Seat] = []
        self._idle: list[_Seat] = []
        self._calls: dict[Any, _Seat] = {}
        self._waiting: list[_Task] = []
        self._error: Exception | None = None
        self._stopping = False

    def make(self, cohorts: Sequence[Cohort], should_stop: ShouldStop) -> None:
        """Have cohorts made. Raises as `RayCluster` does."""
        self._waiting = [_Task(cohort) for cohort in cohorts]
        while self._waiting or self._busy:
            self._stopping = self._stopping or should_stop()
            if not self._stopping:
                self._hire()
                self._hand_out()
            elif not self._busy:
                raise self._error or Stopped
            self._listen()

    @property
    def _busy(self) -> int:
        return sum(bool(seat.task.cohort) for seat in self._seats)

    def _hire(self) -> None:
        while len(self._seats) < min(self._most, self._busy + len(self._waiting)):
            worker = self._spare.pop() if self._spare else self._ray.remote(_Worker).options(**self._needs).remote()
            self._seats.append(seat := _Seat(worker, self._beginning))
            self._call(seat, worker.begin, provenance.code(), _environment(), self._device, self._shared)

    def _hand_out(self) -> None:
        for task in list(self._waiting):
            if self._idle and not any(self._store.is_held(spec.id) for spec in task.cohort):
                self._waiting.remove(task)
                self._begin(task, self._idle.pop())

    def _begin(self, task: _Task, seat: _Seat) -> None:
        seat.task = task
        for run in sorted(spec.id for spec in task.cohort):
            seat.locks.enter_context(self._store.lock(run))
        task.cohort = tuple(spec for spec in task.cohort if not self._store.is_made(spec))
        if task.cohort:
            self._call(seat, seat.worker.make, task.cohort, self._needed(task.cohort))
        else:
            self._rest(seat)

    def _needed(self, cohort: Cohort) -> Files:
        """What is here of what a worker needs for a cohort."""
        files = {}
        for spec in cohort:
            self._store.take_up_checkpoint(spec.id)
            found = {FAR.checkpoint(spec.id): self._store.checkpoint(spec.id)}
            found |= {FAR.weights(teacher.id): self._store.weights(teacher.id) for teacher in spec.teachers}
            files |= {str(there): here.read_bytes() for there, here in found.items() if here.exists()}
            for teacher in spec.teachers:
                if record := self._store.record(teacher):  # which may say that there is nothing to wait for
                    files[str(FAR.record_path(teacher.id))] = json.dumps(record).encode()
        return files

    def _call(self, seat: _Seat, method: Any, *arguments: Any) -> None:
        self._calls[method.remote(*arguments)] = seat

    def _listen(self) -> None:
        """Wait a little for answers, and act on them."""
        if not self._calls:
            time.sleep(POLL_SECONDS)
            return
        for call in self._ray.wait(list(self._calls), timeout=POLL_SECONDS)[0]:
            seat = self._calls.pop(call)
            try:
                self._hear(seat, self._ray.get(call))
            except self._ray.exceptions.RayTaskError as error:
                self._put_back(seat.task)
                self._rest(seat)
                error.cause.__cause__ = error  # which tells where in the worker it was raised
                self._end(error.cause)
            except self._ray.exceptions.RayError as error:
                self._lose(seat, error)

    def _hear(self, seat: _Seat, news: "_News | None") -> None:
        if news:
            specs = {spec.id: spec for spec in seat.task.cohort}
            for run, (epochs, text) in news.steps.items():
                self._tell(specs[run], epochs, text)
            for run, files in news.files.items():
                seat.task.losses = 0
                _take_in(files, run, self._store)
            if not news.over:
                self._call(seat, seat.worker.look, self._stopping)
                return
            self._ray.get(seat.worker.outcome.remote())
        seat.task.losses = 0
        self._rest(seat)

    def _rest(self, seat: _Seat) -> None:
        seat.locks.close()
        seat.task = self._beginning
        self._idle.append(seat)

    def _end(self, error: Exception) -> None:
        """Have everyone stop, for the first reason that is not that they were asked to."""
        if not isinstance(error, Stopped):
            self._error = self._error or error
        self._stopping = True

    def _lose(self, seat: _Seat, error: Exception) -> None:
        task, reason = seat.task, shorten(str(error).splitlines()[-1], 150)
        self._ray.kill(seat.worker)  # it may only be out of reach
        seat.locks.close()
        self._seats.remove(seat)
        self._put_back(task)
        task.losses += 1
        if task.losses < LOSSES:
            warnings.warn(f"a worker of the cluster was lost ({reason}); another takes up its work", stacklevel=2)
            return
        named = ", ".join(map(str, task.cohort))
        place = f"at {named}" if named else "before it began (is this kdstudy installed there?)"
        self._end(Failed(f"a worker was lost {place}, {LOSSES} times; what was finished is kept: {reason}"))

    def _put_back(self, task: _Task) -> None:
        if task.cohort:
            self._waiting.insert(0, task)

    def leave(self) -> None:
        """Let go of all runs, and of the workers: those that are busy end."""
        for seat in self._seats:
            seat.locks.close()
            if seat in self._idle:
                self._spare.append(seat.worker)
            else:
                self._ray.kill(seat.worker)


def _environment() -> dict[str, str]:
    """Environment by which records made elsewhere say what was asked here, and of which commit."""
    return {provenance.COMMAND: provenance.command(), "KDSTUDY_COMMIT": provenance.commit()}


def _take_in(files: Files, run: str, store: Store) -> None:
    """Keep what a worker wrote of a run: its checkpoint, or its record and weights. The run's lock is held.

    Raises BadRecord or Failed if they are not the run's or do not fit each other.
    """
    store = store.own
    record, weights, checkpoint = store.record_path(run), store.weights(run), store.checkpoint(run)
    if checkpoint.name in files:
        with atomic_write(checkpoint) as temporary:
            temporary.write_bytes(files[checkpoint.name])
        return
    with atomic_write(record) as temporary:
        temporary.write_bytes(files[record.name])
        vouched = read_record(temporary, run)["weights_sha256"]
        if vouched:
            if hashlib.sha256(files[weights.name]).hexdigest() != vouched:
                raise Failed(f"the weights of run {run} that a worker sent do not fit its record")
            with atomic_write(weights) as temporary_weights:
                temporary_weights.write_bytes(files[weights.name])
    remove_checkpoint(checkpoint)


@dataclass
class _News:
    """What a worker has done: how far its runs are, what it wrote of them since it was last asked, if it is over."""

    steps: dict[str, tuple[float, str]]
    files: dict[str, Files]
    over: bool


class _Worker:
    """In a process of the cluster: makes cohorts, one at a time, in a folder of its own."""

    def __init__(self) -> None:
        self._folder = ExitStack()
        self._thread = ThreadPoolExecutor(1)  # where work goes on while questions are answered
        self._stop = False

    def begin(self, code: str, environment: dict[str, str], device: str, shared: Sequence[Any]) -> None:
        """Take an order and its data. Raises Failed if the code here is another than the driver's."""
        if code != provenance.code():
            raise Failed(
                f"a worker of the cluster has another kdstudy (code {provenance.code()}, commit {provenance.commit()}) "
                f"than its driver (code {code}): install the same on all machines"
            )
        import ray

        self._order, data = ray.get(list(shared))  # not earlier: other code might not read it
        os.environ.update(environment)
        self.leave()
        os.chdir(self._folder.enter_context(_own_folder()))
        _unpack(data)
        self._executor = None
        release(torch.device(device))
        self._executor = Executor(
            replace(self._order.ledger, store=FAR),
            self._order.setting,
            should_stop=lambda: self._stop,
            device=torch.device(device),
            deterministic=self._order.deterministic,
        )

    def make(self, cohort: Cohort, files: Files) -> _News:
        """Begin with a cohort, from the checkpoints among the files."""
        _unpack(files)
        self._steps: dict[str, tuple[float, str]] = {}
        self._sent = {spec.id: _stamp(FAR.checkpoint(spec.id)) for spec in cohort}  # by run that has not ended
        self._making = self._thread.submit(self._make, cohort)
        return self.look(False)

    def _make(self, cohort: Cohort) -> None:
        maker = self._executor.maker
        maker.teaching = self._order.teaching
        maker.make(cohort, self._note)

    def _note(self, spec: RunSpec, epochs: float, text: str) -> None:
        self._steps[spec.id] = (epochs, text)

    def look(self, stop: bool) -> _News:
        """What is new, after a little while; with `stop` the work is to end soon."""
        self._stop = stop
        wait([self._making], POLL_SECONDS)
        over = self._making.done()  # before files are looked at, so that none comes after
        files = {run: files for run in list(self._sent) if (files := self._written(run))}
        return _News(dict(self._steps), files, over)

    def _written(self, run: str) -> Files:
        """The record and weights of a run that has ended, otherwise its checkpoint; only what was not sent yet."""
        record, weights, checkpoint = FAR.record_path(run), FAR.weights(run), FAR.checkpoint(run)
        if record.exists():
            del self._sent[run]
            return {path.name: path.read_bytes() for path in (record, weights) if path.exists()}
        stamp = _stamp(checkpoint)
        if stamp in (None, self._sent[run]):
            return {}
        with suppress(FileNotFoundError):  # the run has ended just now
            files = {checkpoint.name: checkpoint.read_bytes()}
            self._sent[run] = stamp
            return files
        return {}

    def outcome(self) -> None:
        """Raises what has ended the work, if it did not come to its own end."""
        self._making.result()

    def leave(self) -> None:
        """Remove the folder."""
        self._folder.close()


def _unpack(files: Files) -> None:
    for path, content in files.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)


def _stamp(path: Path) -> tuple[int, int] | None:
    """What differs after each write of a file; None if there is none."""
    with suppress(FileNotFoundError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns
    return None
