"""Faults that end processes: signals, kills, dead kernels and workers; and two commands at once."""

import json
import random
import signal
from collections.abc import Mapping
from pathlib import Path

import psutil

from .outcome import Outcome, judged
from .processes import GONE_SECONDS, Command, command_line, wait_until
from .study import EXECUTED, NOTEBOOK, SETTING, Result, Study
from .witness import sittings

TWO_WORKERS = {"profiles.quick.workers": 2, "profiles.quick.cohort": 2}
KILLS, MOST_EVENTS = 5, 200
Results = Mapping[str, Result]


def end_of(command: Command, code: int = 0, seconds: float = 120) -> list[str]:
    """Wait for a command to end; sentences on another exit code, and on what has outlived it."""
    ended = command.wait(seconds)
    orphans = [f"left running: {line[:80]}" for line in command.orphans()]
    return orphans if ended == code else [f"it ended with {ended}, not {code}", *orphans]


def killed(folder: Path, expected: Results) -> Outcome:
    """The processes are killed, all at the same moment, over and over, and told to go on."""
    study, chance = Study(folder, TWO_WORKERS), random.Random(0)
    for _ in range(KILLS):
        with study.train() as command:
            # the logarithm is uniform, so that beginnings are hit as well as the midst of training
            study.await_events(len(study.events) + round(MOST_EVENTS ** chance.random()))
            command.kill_all()
    said = study.complete()
    how = f"all processes killed at once, at {KILLS} random moments"
    return judged(study, expected, "SIGKILL", how, said)


def terminated(folder: Path, expected: Results) -> Outcome:
    """`run` is asked to end."""
    return _stopped(folder, expected, "SIGTERM", signal.SIGTERM)


def interrupted(folder: Path, expected: Results) -> Outcome:
    """`run` is interrupted at the terminal."""
    return _stopped(folder, expected, "Ctrl-C", signal.SIGINT)


def _stopped(folder: Path, expected: Results, fault: str, number: signal.Signals) -> Outcome:
    study = Study(folder, TWO_WORKERS)
    with study.train() as command:
        study.await_event("save", 6)
        command.signal_group(number)
        complaints = end_of(command, 128 + number, GONE_SECONDS)
    complaints += _unsaved(study)
    study.complete()
    how = f"{number.name} to `kdstudy run` and its workers in mid-training"
    says = [number.name, "the same command goes on from here", "Left"]
    return judged(study, expected, fault, how, command.text, must_say=says, complaints=complaints)


def interrupted_at_start(folder: Path, expected: Results) -> Outcome:
    """`run` is interrupted at the terminal while its workers are being started."""
    study = Study(folder, TWO_WORKERS)
    with study.train() as command:
        wait_until(lambda: _starts_workers(command), 60, lambda: f"no workers are started:\n{command.text}")
        command.signal_group(signal.SIGINT)
        complaints = end_of(command, 128 + signal.SIGINT, GONE_SECONDS)
    study.complete()
    how = "SIGINT to `kdstudy run` while its workers are being started"
    says = ["SIGINT", "the same command goes on from here"]
    return judged(study, expected, "Ctrl-C", how, command.text, must_say=says, complaints=complaints)


def _starts_workers(command: Command) -> bool:
    return any("multiprocessing.forkserver" in command_line(process) for process in command.alive())


def _unsaved(study: Study) -> list[str]:
    """Sentences on runs that were left without a checkpoint of where they stood."""
    lost = sum(sitting.unsaved_steps for sitting in sittings(study.events) if not sitting.finished)
    return [f"{lost} steps were lost, though there was time to save them"] if lost else []


def notebook_terminated(folder: Path, expected: Results) -> Outcome:
    """The notebook runner is asked to end."""
    return _notebook_stopped(folder, expected, "SIGTERM", signal.SIGTERM)


def notebook_interrupted(folder: Path, expected: Results) -> Outcome:
    """The notebook runner is interrupted at the terminal."""
    return _notebook_stopped(folder, expected, "Ctrl-C", signal.SIGINT)


def _notebook_stopped(folder: Path, expected: Results, fault: str, number: signal.Signals) -> Outcome:
    study = Study(folder)
    with study.execute() as command:
        study.await_event("save", 4)
        command.signal_group(number)
        complaints = end_of(command, 128 + number, GONE_SECONDS)
    complaints += _unsaved(study)
    complaints += completed_in_notebook(study)
    how = f"{number.name} to the notebook runner while its kernel trains"
    says = [r"interrupted|SIGTERM", "what was finished is kept"]
    return judged(study, expected, fault, how, command.text, must_say=says, complaints=complaints)


def completed_in_notebook(study: Study) -> list[str]:
    """Have the notebook executed to its end; sentences on what went wrong."""
    with study.execute() as command:
        failed = command.wait(120) != 0 or not (study.folder / EXECUTED).exists()
        return [f"the notebook fails: {command.text[-300:]}"] if failed else end_of(command)


def kernel_died(folder: Path, expected: Results) -> Outcome:
    """The kernel is killed while a notebook trains in it."""
    study = Study(folder)
    with study.execute() as command:
        pid = study.await_event("save", 4).process
        psutil.Process(pid).kill()
        complaints = end_of(command, 1, GONE_SECONDS) + completed_in_notebook(study)
    says = ["the kernel died in .*train.ipynb", "kept"]
    how = "the kernel killed while a notebook trains"
    return judged(study, expected, "dead kernel", how, command.text, must_say=says, complaints=complaints)


def runner_killed(folder: Path, expected: Results) -> Outcome:
    """The notebook runner is killed by itself; its kernel must not go on."""
    study = Study(folder)
    with study.execute() as command:
        study.await_event("save", 4)
        command.process.kill()
        complaints = end_of(command, -signal.SIGKILL, 5) + completed_in_notebook(study)
    how = "the notebook runner killed alone: its kernel must end, too"
    return judged(study, expected, "dead kernel", how, "(nothing: it was killed)", complaints=complaints)


def worker_killed(folder: Path, expected: Results) -> Outcome:
    """A worker process is killed as the kernel does it when memory runs out; it is replaced."""
    study = Study(folder, TWO_WORKERS)
    with study.train(fault={"what": "die", "at": 60}) as command:
        complaints = end_of(command)
    how = "SIGKILL to one of two workers, once, in mid-training"
    says = ["a worker process died", "taken up again"]
    return judged(study, expected, "dead worker", how, command.text, must_say=says, complaints=complaints)


def workers_killed_always(folder: Path, expected: Results) -> Outcome:
    """Whoever takes up the work is killed before a checkpoint, again and again: the study gives up and says so."""
    study = Study(folder, TWO_WORKERS)
    with study.train(fault={"what": "die", "at": 3, "times": 1000}) as command:
        complaints = end_of(command, 1)
    study.complete()
    how = "SIGKILL to every worker at its third step"
    says = ["error: a worker process died .*again and again, at stripes teacher", "what was finished is kept"]
    return judged(study, expected, "dead worker", how, command.text, must_say=says, complaints=complaints)


def two_runs(folder: Path, expected: Results) -> Outcome:
    """Two commands make the same runs in the same folder at the same time."""
    study = Study(folder)
    with study.train() as first, study.train() as second:
        complaints = end_of(first) + end_of(second) + _repeated(study)
    how = "two `kdstudy run` at once in one folder"
    return judged(study, expected, "two at once", how, second.text, complaints=complaints)


def _repeated(study: Study) -> list[str]:
    """Sentences on steps that were made more than once."""
    made = [(event.run, event.position) for event in study.events if event.what == "step"]
    return [f"{len(made) - len(set(made))} steps were made twice"] if len(made) > len(set(made)) else []


def two_pipelines(folder: Path, expected: Results) -> Outcome:
    """`dvc repro` is started while another one runs: it ends at once, and has nothing to do afterwards."""
    study = Study(folder)
    command = f"python -m kdstudy notebook {NOTEBOOK} {EXECUTED} setting={SETTING}"
    outs = [{place: {"cache": False, "persist": True}} for place in ("runs/quick", str(EXECUTED))]
    stages = {"train": {"cmd": command, "deps": ["params.yaml"], "outs": outs}}
    (folder / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    with study.start("dvc", "init", "--no-scm", "--quiet") as initialised:
        complaints = end_of(initialised)
    words = ("dvc", "--wait-for-lock", "repro")
    with study.start(*words) as first:
        study.await_event("step")
        with study.start(*words) as second:
            complaints += end_of(second, 255)
        complaints += end_of(first)
    with study.start(*words) as third:
        complaints += end_of(third) + _repeated(study)
    if "didn't change" not in third.text:
        complaints.append("a third one does not see that all is done")
    how = "two `dvc --wait-for-lock repro` at once, as `make study` calls it; then a third"
    return judged(study, expected, "two at once", how, second.text, must_say=["is busy"], complaints=complaints)
