"""Work done side by side in processes of their own, stopped together and never outliving the process that asked."""

import ctypes
import multiprocessing
import os
import queue
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker
from typing import Any

from kdstudy.stopping import Failed, ShouldStop

Tell = Callable[[Any, str], None]
Work = Callable[[Any, Any, Any, Tell, ShouldStop], None]

POLL_SECONDS = 0.2
HEARD = (signal.SIGINT, signal.SIGTERM)

_surroundings: dict[str, Any] = {}  # of a worker process


class WorkerDied(Failed):
    """Workers died, again and again, at the same tasks."""


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent() -> None:
    """End this process, at once, when the one that started it has gone, however it went."""
    parent = os.getppid()

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, name="end-with-parent", daemon=True).start()


def side_by_side(
    work: Work,
    shared: Any,
    groups: Sequence[Sequence[Any]],
    seats: Sequence[Any],
    *,
    tell: Callable[[Any, Any, str], None],
    should_stop: ShouldStop,
    preload: Sequence[str] = (),
) -> None:
    """Call `work(shared, seat, task, tell, should_stop)` for every task of every group, in one process for each seat.

    A group begins when the one before it is done. A seat is what a worker has for itself, such as a device. `work` is a
    function of a module; `shared`, seats and tasks can be pickled, and `shared` reaches a worker once. What a worker
    tells arrives here as (task, what is told, text). The first error ends all workers: they are asked to stop and then
    it is raised. An interrupt from the keyboard is an error of this process.

    When a worker dies (killed, or the system had no memory left for it), all are replaced and tasks that were not done
    are begun again; it is for `work` to continue where they were. From the second time on that this happens without a
    task having been done in between, half of the seats are given up, and with the last one WorkerDied is raised.

    Workers are forked from a process of its own that has imported the module of `work` and the modules `preload`. It
    serves all later calls, too, and has the environment variables of the first.
    """
    # not forked from this process, whose threads they would lack, nor spawned, as each would import torch for seconds
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__, *preload])
    _start_server()
    waiting = [list(group) for group in groups if group]
    seats, fruitless = list(seats), 0
    while waiting:
        before = sum(map(len, waiting))
        with _crew(context, work, shared, seats) as crew:
            alive = True
            while alive and waiting:
                alive = crew.do(waiting[0], tell, should_stop)
                waiting = [group for group in waiting if group]
        if not alive:
            fruitless = 0 if sum(map(len, waiting)) < before else fruitless + 1
            seats = seats if fruitless < 2 else seats[: len(seats) // 2]
            _tell_of_death(waiting[0], seats)


def _start_server() -> None:
    """Start the process that workers are forked from. It ends with this one, not by signals meant for the group."""
    resource_tracker.ensure_running()  # which would let signals through again if it were started inside
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)  # not ignored: what comes now is heard afterwards
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _tell_of_death(tasks: Sequence[Any], seats: Sequence[Any]) -> None:
    died = "a worker process died (was it killed, or did the system run out of memory?)"
    if not seats:
        listed = ", ".join(map(_named, tasks[:3])) + (", ..." if len(tasks) > 3 else "")
        raise WorkerDied(f"{died}, again and again, at {listed}; what was finished is kept")
    warnings.warn(f"{died}; its work is taken up again, by {len(seats)} at a time", stacklevel=3)


def _named(task: Any) -> str:
    return ", ".join(map(str, task)) if isinstance(task, tuple) else str(task)


@contextmanager
def _crew(context: Any, work: Work, shared: Any, seats: Sequence[Any]) -> Iterator["_Crew"]:
    told, free = context.Queue(), context.Queue()
    for seat in seats:
        free.put(seat)
    # a bare byte, as a process that is killed while it holds a lock never gives that back
    stop = context.RawValue(ctypes.c_bool, False)
    pool = ProcessPoolExecutor(len(seats), context, _begin, (work, shared, free, told, stop))
    try:
        yield _Crew(pool, told, stop)
    finally:
        stop.value = True
        pool.shutdown(wait=True, cancel_futures=True)
        for each in (told, free):
            each.cancel_join_thread()
            each.close()


@dataclass
class _Crew:
    """Workers that live together: when one dies, all do."""

    pool: ProcessPoolExecutor
    told: Any
    stop: Any
    tasks: list[Any] = field(default_factory=list)  # all so far, by number: news of one may come late

    def do(self, tasks: list[Any], tell: Callable[[Any, Any, str], None], should_stop: ShouldStop) -> bool:
        """Have tasks done, which leave the list as they are; False if a worker has died. Raises the first error."""
        alive, pending = True, {}
        try:
            for task in list(tasks):
                pending[self.pool.submit(_do, len(self.tasks), task)] = task
                self.tasks.append(task)
        except BrokenProcessPool:
            alive = False
        while pending:
            done, _ = wait(pending, timeout=POLL_SECONDS, return_when="FIRST_EXCEPTION")
            self._pass_on(tell)
            for future in done:
                made = pending.pop(future)
                try:
                    future.result()
                    tasks[:] = [task for task in tasks if task is not made]
                except BrokenProcessPool:
                    alive = False
            if should_stop():
                self.stop.value = True
        return alive

    def _pass_on(self, tell: Callable[[Any, Any, str], None]) -> None:
        try:
            while True:
                number, news, text = self.told.get_nowait()
                tell(self.tasks[number], news, text)
        except queue.Empty:
            pass


def _begin(work: Work, shared: Any, free: Any, told: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too and asks for a stop
    signal.signal(signal.SIGTERM, _hear)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)  # as they are where it was forked from
    threading.Thread(target=_follow_parent, daemon=True).start()
    _surroundings.update(work=work, shared=shared, seat=free.get(), told=told, stop=stop)


def _follow_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _hear(number: int, frame: Any) -> None:
    """Asked to end: by a scheduler, as all of a job are, or by the pool, because another worker has died."""
    _surroundings["asked"] = True
    if not _surroundings.get("busy"):
        os._exit(128 + number)


def _do(number: int, task: Any) -> None:
    def tell(news: Any, text: str) -> None:
        _surroundings["told"].put((number, news, text))

    def should_stop() -> bool:
        return _surroundings["stop"].value or _surroundings.get("asked", False)

    _surroundings["busy"] = True
    try:
        _surroundings["work"](_surroundings["shared"], _surroundings["seat"], task, tell, should_stop)
    finally:
        _surroundings["busy"] = False
        if _surroundings.get("asked"):  # once the outcome has been handed over
            threading.Timer(1.0, os._exit, (128 + signal.SIGTERM,)).start()
