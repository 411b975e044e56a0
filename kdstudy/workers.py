"""Work done side by side in processes of their own, stopped together and never outliving the process that asked."""

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from typing import Any

Tell = Callable[[float, str], None]
Work = Callable[[Any, Any, Tell, Callable[[], bool]], None]

POLL_SECONDS = 0.2

_surroundings: dict[str, Any] = {}  # of a worker process


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def side_by_side(
    work: Work,
    shared: Any,
    groups: Sequence[Sequence[Any]],
    workers: int,
    *,
    tell: Callable[[Any, float, str], None],
    should_stop: Callable[[], bool],
    preload: Sequence[str] = (),
) -> None:
    """Call `work(shared, task, tell, should_stop)` for every task of every group, in `workers` processes.

    A group begins when the one before it is done. `work` is a function of a module, `shared` and the tasks can be
    pickled; `shared` reaches a worker once. What a worker tells arrives here as (task, how much is done, text). The
    first error ends all workers: they are asked to stop and then it is raised. An interrupt from the keyboard is an
    error of this process.

    Workers are forked from a process of its own that has imported the module of `work` and the modules `preload`. It
    serves all later calls, too, and has the environment variables of the first.
    """
    # not forked from this process, whose threads they would lack, nor spawned, as each would import torch for seconds
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__, *preload])
    told, stop = context.Queue(), context.Event()
    with ProcessPoolExecutor(workers, context, _begin, (work, shared, told, stop)) as pool:
        try:
            tasks = []
            for group in groups:
                pending = {pool.submit(_do, number, task) for number, task in enumerate(group, start=len(tasks))}
                tasks += group
                while pending:
                    done, pending = wait(pending, timeout=POLL_SECONDS, return_when="FIRST_EXCEPTION")
                    _pass_on(told, tasks, tell)
                    for future in done:
                        future.result()
                    if should_stop():
                        stop.set()
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            told.close()


def _pass_on(told: Any, tasks: Sequence[Any], tell: Callable[[Any, float, str], None]) -> None:
    try:
        while True:
            number, done, text = told.get_nowait()
            tell(tasks[number], done, text)
    except queue.Empty:
        pass


def _begin(work: Work, shared: Any, told: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too and asks for a stop
    threading.Thread(target=_follow_parent, daemon=True).start()
    _surroundings.update(work=work, shared=shared, told=told, stop=stop)


def _follow_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _do(number: int, task: Any) -> None:
    def tell(done: float, text: str) -> None:
        _surroundings["told"].put((number, done, text))

    _surroundings["work"](_surroundings["shared"], task, tell, _surroundings["stop"].is_set)
