"""All faults but the kills at random, in the order of the table."""

from collections.abc import Callable, Mapping
from pathlib import Path

from .interruptions import (
    interrupted,
    interrupted_at_start,
    kernel_died,
    killed,
    notebook_interrupted,
    notebook_terminated,
    runner_killed,
    terminated,
    two_pipelines,
    two_runs,
    worker_killed,
    workers_killed_always,
)
from .outcome import Outcome
from .shortages import (
    diverging,
    files_from_the_future,
    gpu_memory,
    gpu_memory_of_one,
    host_memory,
    host_memory_of_one,
    jumping_clock,
    system_memory,
)
from .storage import (
    full_reports,
    full_store,
    too_large_file,
    torn_checkpoint,
    torn_checkpoints,
    torn_data,
    torn_notebook,
    torn_only_record,
    torn_record,
    torn_weights,
)
from .study import Result

# takes a folder that is not there yet, and the small study's results when nothing happens
Scenario = Callable[[Path, Mapping[str, Result]], Outcome]

SCENARIOS: dict[str, Scenario] = {
    scenario.__name__: scenario
    for scenario in (
        killed,
        *(terminated, notebook_terminated, interrupted, interrupted_at_start, notebook_interrupted),
        *(torn_checkpoint, torn_checkpoints, torn_record, torn_only_record, torn_weights, torn_data, torn_notebook),
        *(full_store, full_reports, too_large_file),
        *(host_memory, host_memory_of_one, system_memory, gpu_memory, gpu_memory_of_one),
        *(kernel_died, runner_killed, diverging, worker_killed, workers_killed_always),
        *(two_pipelines, two_runs, jumping_clock, files_from_the_future),
    )
}
