"""Faults of what a study runs on: memory, the clock, and losses that overflow."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from .interruptions import TWO_WORKERS, end_of
from .outcome import Outcome, judged
from .study import SETTING, Result, Study

Results = Mapping[str, Result]
# a student of which two fit into memory and four do not, trained for an epoch
LARGE = {
    **{"recipes.short.epochs": 1, "recipes.short.milestones": [], "recipes.short.batch": 30},
    **{f"settings.{SETTING}.student": "wrn_16_8", f"settings.{SETTING}.seeds": [0]},
}
FOUR = {**LARGE, "methods.response.spherical": {}, "methods.response.dist": {}}
MEGABYTES_OF_ONE = 132  # 11 million numbers, their gradients and momentum; a checkpoint, while it is written, takes 200


def host_memory(folder: Path, expected: Results) -> Outcome:
    """A cohort does not fit into memory: halves of it are made, and go on from its checkpoints."""
    undisturbed = Study(folder / "undisturbed", FOUR)
    undisturbed.complete()
    study = Study(folder / "disturbed", FOUR)
    fault = {"what": "memory", "megabytes": 9 * MEGABYTES_OF_ONE // 2}
    with study.train(fault=fault) as command:
        complaints = end_of(command)
    how = "a limit on memory (RLIMIT_DATA) that a cohort of four students exceeds"
    says = ["runs together ran out of memory, now half as many"]
    return judged(study, undisturbed.results, "host memory", how, command.text, must_say=says, complaints=complaints)


def host_memory_of_one(folder: Path, expected: Results) -> Outcome:
    """Not even one run fits into memory."""
    undisturbed = Study(folder / "undisturbed", LARGE)
    undisturbed.complete()
    study = Study(folder / "disturbed", LARGE)
    with study.train(fault={"what": "memory", "megabytes": MEGABYTES_OF_ONE // 2}) as command:
        complaints = end_of(command, 1)
    study.complete()
    how = "a limit on memory (RLIMIT_DATA) that a single student exceeds; then lifted"
    says = ["error: stripes kd seed 0 .*ran out of memory", "Free some", "goes on from its last checkpoint"]
    return judged(study, undisturbed.results, "host memory", how, command.text, must_say=says, complaints=complaints)


def system_memory(folder: Path, expected: Results) -> Outcome:
    """The system has no memory left and kills the largest process, a worker."""
    study = Study(folder, TWO_WORKERS)
    with study.train() as command:
        study.await_event("save", 4)
        workers = [process for process in command.alive() if _is_worker(process)]
        max(workers, key=lambda process: process.memory_info().rss).kill()
        complaints = end_of(command)
    how = "SIGKILL to the largest worker, which is how the kernel frees memory"
    says = ["a worker process died", "did the system run out of memory", "taken up again"]
    return judged(study, expected, "host memory", how, command.text, must_say=says, complaints=complaints)


def _is_worker(process: psutil.Process) -> bool:
    parent = process.parent()
    return parent is not None and all("multiprocessing.forkserver" in " ".join(p.cmdline()) for p in (process, parent))


def gpu_memory(folder: Path, expected: Results) -> Outcome:
    """torch finds no memory on a GPU in mid-training. The only fault that is not real: its error is raised by hand."""
    study = Study(folder)
    with study.train(fault={"what": "gpu_memory", "at": 300}) as command:
        complaints = end_of(command)
    how = "torch.OutOfMemoryError raised by hand in a step in mid-training"
    says = ["runs together ran out of memory, now half as many"]
    return judged(study, expected, "GPU memory", how, command.text, must_say=says, complaints=complaints)


def gpu_memory_of_one(folder: Path, expected: Results) -> Outcome:
    """The same at a run by itself."""
    study = Study(folder)
    with study.train(fault={"what": "gpu_memory", "at": 50}) as command:
        complaints = end_of(command, 1)
    study.complete()
    how = "torch.OutOfMemoryError raised by hand in a step of a run by itself; then not again"
    says = ["error: stripes teacher seed . ran out of memory", "goes on from its last checkpoint"]
    return judged(study, expected, "GPU memory", how, command.text, must_say=says, complaints=complaints)


def diverging(folder: Path, expected: Results) -> Outcome:
    """One student of a cohort has a loss that overflows."""
    study = Study(folder, {"methods.response.poisoned": {"method": "kd", "kd_weight": 1.0e38, "temperature": 10.0}})
    said = study.complete()
    results = study.results
    others = {run: results.pop(run) for run in set(results) - set(expected)}
    complaints = []
    if [record["status"] for _, record in others.values()] != ["diverged"] * 2:
        complaints.append("the poisoned students are not recorded as diverged")
    how = "a student whose loss overflows (kd_weight 1e38) in a cohort with healthy ones"
    return judged(
        *(study, {**expected, **others}, "diverging student", how, said),
        must_say=[r"poisoned .*NaN +diverged"],
        complaints=complaints,
    )


def jumping_clock(folder: Path, expected: Results) -> Outcome:
    """The time of day jumps by days, back and forth, while a budget runs and while the study is completed."""
    study = Study(folder)
    clocks = {"what": "clocks"}
    began = time.monotonic()
    with study.train("--budget", "4s", fault=clocks) as command:
        command.wait(60)
        took = time.monotonic() - began
        complaints = end_of(command)
    if took > 20:
        complaints.append(f"a budget of 4 s took {took:.0f} s")
    with study.train(fault=clocks) as second:
        complaints += end_of(second)
    how = "a clock that jumps by up to three days at each look, under a budget of 4 s, then without"
    says = ["the budget is spent; the same command goes on from here"]
    return judged(study, expected, "clock jumps", how, command.text, must_say=says, complaints=complaints)


def files_from_the_future(folder: Path, expected: Results) -> Outcome:
    """The clock was set back: all files of an interrupted study are newer than now."""
    study = Study(folder)
    study.interrupt_midway()
    ahead = time.time() + 10 * 86400
    for place in (study.store, folder / "data", folder / "notebooks"):
        for path in place.rglob("*"):
            os.utime(path, (ahead, ahead))
    said = study.complete()
    how = "all files of an interrupted study dated ten days ahead"
    return judged(study, expected, "clock jumps", how, said)
