"""Faults of files and disks: what a power failure leaves torn, and disks that fill up."""

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from kdstudy.checkpoint import previous_checkpoint
from kdstudy.device import data_path

from .interruptions import completed_in_notebook, end_of
from .outcome import Outcome, Unable, judged
from .processes import Command
from .study import EXECUTED, SETTING, Result, Study

Results = Mapping[str, Result]
TORN = "torn file"
FULL = "full disk"
DISK_BYTES = 8 * 2**20
LARGEST_FILE = 60_000  # less than a checkpoint of the teacher's


def tear(path: Path) -> None:
    """Leave the first half of a file, as when the power fails before all of it is on the disk."""
    os.truncate(path, path.stat().st_size // 2)


def refused(study: Study) -> tuple[str, list[str]]:
    """What `run` says when it cannot go on, and sentences on what is wrong with how it ended."""
    with study.train() as command:
        complaints = end_of(command, 1)
        return command.text, complaints


def _interrupted(folder: Path) -> tuple[Study, list[Path]]:
    """A study that was killed in mid-training, and its checkpoints that have a previous one."""
    study = Study(folder)
    study.interrupt_midway()
    found = [path for path in study.store.glob("*/checkpoint.pt") if previous_checkpoint(path).exists()]
    if not found:
        raise AssertionError(f"no run of {folder} was killed after its second checkpoint")
    return study, found


def torn_checkpoint(folder: Path, expected: Results) -> Outcome:
    """The last checkpoint is torn: the one before it is taken."""
    study, checkpoints = _interrupted(folder)
    tear(checkpoints[0])
    said = study.complete()
    how = "half of the last checkpoint"
    says = [r"checkpoint\.pt cannot be read", "goes on from the one before"]
    lost = "from one checkpoint to the next"
    return judged(study, expected, TORN, how, said, must_say=says, forgiven="went on from", lost=lost)


def torn_checkpoints(folder: Path, expected: Results) -> Outcome:
    """Both checkpoints are torn: the run is refused, and starts anew when they are removed."""
    study, checkpoints = _interrupted(folder)
    pair = [checkpoints[0], previous_checkpoint(checkpoints[0])]
    for path in pair:
        tear(path)
    said, complaints = refused(study)
    for path in pair:
        path.unlink()
    study.complete()
    how = "half of the last checkpoint and of the one before; then both removed"
    says = [r"checkpoint\.pt", r"checkpoint\.previous\.pt", "remove both to start the run anew"]
    return judged(
        *(study, expected, TORN, how, said),
        **{"must_say": says, "complaints": complaints, "forgiven": "went on from", "lost": "that run"},
    )


def torn_record(folder: Path, expected: Results) -> Outcome:
    """A record of the store is torn, and there is a published copy."""
    study = Study(folder)
    complaints = completed_in_notebook(study)
    tear(sorted(study.store.glob("*/record.json"))[0])
    said = study.complete()
    how = "half of a record whose copy is published"
    says = ["is no record of a run", "its other copy, .* is taken"]
    return judged(_healed(study), expected, TORN, how, said, must_say=says, complaints=complaints)


def _healed(study: Study) -> Study:
    """The study without torn records that have another copy."""
    for path in study.store.glob("*/record.json"):
        if not path.read_text().endswith("}\n"):
            path.unlink()
    return study


def torn_only_record(folder: Path, expected: Results) -> Outcome:
    """A record is torn that has no copy: refused with its name, made again when it is removed."""
    study = Study(folder)
    study.complete()
    path = sorted(study.store.glob("*/record.json"))[0]
    tear(path)
    said, complaints = refused(study)
    path.unlink()
    path.with_name("weights.safetensors").unlink()
    study.complete()
    how = "half of a record that has no copy; then removed"
    says = [r"record\.json is no record of a run", "remove it to have the run made again"]
    return judged(
        *(study, expected, TORN, how, said),
        **{"must_say": says, "complaints": complaints, "forgiven": f"{path.parent.name} was trained again"},
        lost="that run",
    )


def torn_weights(folder: Path, expected: Results) -> Outcome:
    """The weights of a teacher are torn before its students are made."""
    study = Study(folder)
    with study.train("--stage", "teacher") as command:
        command.wait(60)
    path = sorted(study.store.glob("*/weights.safetensors"))[0]
    tear(path)
    said, complaints = refused(study)
    path.unlink()
    study.complete()
    how = "half of a teacher's weights; then removed"
    says = [r"weights\.safetensors are torn", "remove it|made again|trained again"]
    return judged(
        *(study, expected, TORN, how, said),
        **{"must_say": says, "complaints": complaints, "forgiven": f"{path.parent.name} was trained again"},
        lost="that run",
    )


def torn_data(folder: Path, expected: Results) -> Outcome:
    """The images are torn."""
    study = Study(folder)
    path = folder / data_path(SETTING)
    whole = path.read_bytes()
    tear(path)
    said, complaints = refused(study)
    path.write_bytes(whole)
    study.complete()
    how = "half of the data set's npz; then made again"
    says = [rf"{SETTING}\.npz", f"dvc repro data@{SETTING}"]
    return judged(study, expected, TORN, how, said, must_say=says, complaints=complaints)


def torn_notebook(folder: Path, expected: Results) -> Outcome:
    """An executed notebook is torn: the stage is executed again and trains nothing."""
    study = Study(folder)
    complaints = completed_in_notebook(study)
    whole = (folder / EXECUTED).read_bytes()
    tear(folder / EXECUTED)
    complaints += completed_in_notebook(study)
    if (folder / EXECUTED).read_bytes() != whole:
        complaints.append("the notebook is not what it was")
    how = "half of an executed notebook; its stage is executed again"
    return judged(study, expected, TORN, how, "(nothing)", complaints=complaints)


# full disks


@contextmanager
def disk(place: Path) -> Iterator[None]:
    """Inside, a folder is a disk of its own, of DISK_BYTES. Raises Unable where none can be mounted."""
    place.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(words, capture_output=True).returncode:
        raise Unable("no file system may be mounted here (it takes root, or `unshare --map-root-user --mount`)")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path) -> Path:
    """Write to a disk until there is no room left; the file that fills it."""
    filler = place / "filler"
    with open(filler, "wb", buffering=0) as file:
        for size in (65536, 512):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue
    return filler


def full_store(folder: Path, expected: Results) -> Outcome:
    """The disk of the run store fills up in mid-training."""
    study = Study(folder)
    with disk(study.store.parent):
        with study.train() as command:
            study.await_event("save", 3)
            filler = fill(study.store.parent)
            complaints = end_of(command, 1) + _unreadable(study)
        filler.unlink()
        study.complete()
        how = "a small disk as the run store, filled in mid-training; then room made"
        says = ["error: .*the disk is full", "make room and go on", r"\.kdstudy/runs"]
        return judged(study, expected, FULL, how, command.text, must_say=says, complaints=complaints)


def _unreadable(study: Study) -> list[str]:
    """Sentences on checkpoints that are torn."""
    import torch

    from kdstudy.checkpoint import BadFile, load_checkpoint

    try:
        for path in study.store.glob("*/checkpoint*.pt"):
            load_checkpoint(path, torch.device("cpu"))
    except BadFile as error:
        return [str(error)]
    return []


def full_reports(folder: Path, expected: Results) -> Outcome:
    """The disk on which notebooks are put fills up while one is executed."""
    study = Study(folder)
    place = (folder / EXECUTED).parent
    with disk(place):
        with study.execute() as command:
            study.await_event("step")
            filler = fill(place)
            complaints = end_of(command, 1)
        filler.unlink()
        complaints += completed_in_notebook(study)
        how = "a small disk for executed notebooks, filled while one runs; then room made"
        says = ["error: .*the disk is full|No space left", "reports/quick/notebooks"]
        return judged(study, expected, FULL, how, command.text, must_say=says, complaints=complaints)


def too_large_file(folder: Path, expected: Results) -> Outcome:
    """No file may be written any longer, as when a quota is used up."""

    def limit(command: Command) -> None:
        for process in command.alive():
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (LARGEST_FILE, resource.RLIM_INFINITY))

    study = Study(folder)
    with study.train() as command:
        study.await_event("save", 3)
        limit(command)
        complaints = end_of(command, 1) + _unreadable(study)
    study.complete()
    how = f"a limit of {LARGEST_FILE} bytes on the size of files, set in mid-training; then lifted"
    says = ["error: ", "File too large", r"\.kdstudy/runs"]
    return judged(study, expected, FULL, how, command.text, must_say=says, complaints=complaints)
