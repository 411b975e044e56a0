"""Kills at random moments: the quick profile is made through DVC, and killed again and again until it is done.

A reference is made undisturbed, once. Then the same project is made anew while its processes are killed: all of them as
in a power failure, or single ones, or by signals as from a terminal or a scheduler. Whenever the profile is done before
the kills are, it is held against the reference and made anew. Everything is kept in one folder, so that a campaign that
was itself stopped goes on.
"""

import csv
import hashlib
import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median

import pandas as pd
import psutil
import yaml

from kdstudy.files import write_json

from .outcome import Outcome, missing_runs, wrong_runs
from .processes import GONE_SECONDS, POLL_SECONDS, Command, command_line, end_all
from .study import ROOT, Result, environment_of, results_of
from .witness import Event, lost_seconds, misdeeds, read_events

SHORTEST_GAP, LONGEST_GAP = 0.3, 60.0  # seconds from a start to a kill; the logarithm is uniform
CHECKPOINT_SECONDS = 0.5  # so often that most kills come between two checkpoints of a run
STUCK_SECONDS = 180.0  # without an event, after a kill that DVC survived
FAILURES_IN_A_ROW = 3  # of starts that nobody disturbed
EVERYTHING, GROUP, PIPELINE = "everything", "the group", "dvc"
RUNNER, KERNEL, WORKER, SPAWNER = "the notebook runner", "the kernel", "a worker", "the workers' parent"
Blow = tuple[str, signal.Signals]
# who is killed, how, and how often relative to the others
BLOWS: dict[Blow, int] = {
    (EVERYTHING, signal.SIGKILL): 30,
    (PIPELINE, signal.SIGKILL): 15,
    (KERNEL, signal.SIGKILL): 12,
    (WORKER, signal.SIGKILL): 12,
    (RUNNER, signal.SIGKILL): 8,
    (SPAWNER, signal.SIGKILL): 3,
    (GROUP, signal.SIGINT): 10,
    (GROUP, signal.SIGTERM): 5,
    (PIPELINE, signal.SIGTERM): 3,
    (RUNNER, signal.SIGTERM): 2,
}
# a result may differ in these, which tell how and when runs were made
TIMES = ["seconds", "commit"]


@dataclass(frozen=True)
class Plan:
    """What is to be done: `kills` in all, over the stages up to `target`; none later than after `seconds`."""

    folder: Path
    kills: int = 100
    target: str = "report@quick"
    seed: int = 0
    seconds: float = float("inf")
    longest_gap: float = LONGEST_GAP
    reference: Path | None = None


@dataclass(frozen=True)
class Kill:
    """One of them, and what came of it. `training` says whether steps were being taken at that moment."""

    number: int
    after: float
    victim: str
    signal: str
    training: bool
    settled: float
    outcome: str  # ended, went on, or the command lines that outlived DVC


class Project:
    """A copy of the project's tracked and new files, with its own history, in which nothing has been made yet."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.store, self.published = folder / ".kdstudy/runs", folder / "runs"
        self.witness = folder.with_name(f"{folder.name}.witness")

    def make(self) -> None:
        """Copy the files, and have checkpoints written often."""
        listed = self._git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
        for name in listed:
            if (ROOT / name).is_file() and not name.startswith(("runs/", "reports/thesis", "reports/quick")):
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.folder / name)
        path = self.folder / "params.yaml"
        tree = yaml.safe_load(path.read_text())
        tree["profiles"]["quick"]["checkpoint_seconds"] = CHECKPOINT_SECONDS
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        self._git(self.folder, "init", "-q")
        self._git(self.folder, "add", "-A")
        self._git(self.folder, "-c", "user.name=faults", "-c", "user.email=faults@localhost", "commit", "-qm", "clean")

    def copy_from(self, other: "Project") -> None:
        """Be another project as it was before anything was made."""
        self.remove()
        self._git(other.folder, "clone", "-q", str(other.folder), str(self.folder))

    def remove(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.witness.unlink(missing_ok=True)

    @staticmethod
    def _git(folder: Path, *words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout

    def reproduce(self, target: str, output: Path) -> Command:
        """Start what `make study` does."""
        words = ["dvc", "--wait-for-lock", "repro", target]
        return Command(words, self.folder, environment_of(self.folder, self.witness), output)

    def events(self) -> list[Event]:
        """What has been witnessed."""
        return read_events(self.witness)

    @property
    def witnessed(self) -> int:
        """How much: it grows with every event."""
        return self.witness.stat().st_size if self.witness.exists() else 0

    def results(self) -> dict[str, Result]:
        """Of all runs."""
        return results_of(self.store, self.published)

    def records(self) -> dict[str, str]:
        """Digests of the store's records, by run: from the moment at which it is there, a record must stay."""
        paths = self.store.glob("*/record.json")
        return {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}

    def tables(self) -> dict[str, str]:
        """The profile's tables as text, by place."""
        tables = {str(path.relative_to(self.folder)): path.read_text() for path in self._table_files()}
        results = self.published / "quick/results.csv"
        if results.exists():
            frame = pd.read_csv(results, dtype=str, keep_default_na=False)
            tables["results.csv"] = frame.drop(columns=[name for name in TIMES if name in frame]).to_csv()
        return tables

    def _table_files(self) -> Iterable[Path]:
        return (self.folder / "reports/quick/tables").glob("comparison_*")


class KillCampaign:
    """Carries out a plan. `say` is told how it goes."""

    def __init__(self, plan: Plan, say: Callable[[str], None] = print):
        self.plan, self._say = plan, say
        self._clean = Project(plan.folder / "clean")
        self._reference = Project(plan.folder / "reference")
        self._disturbed = Project(plan.folder / "disturbed")
        self._kills_file = plan.folder / "kills.csv"
        self._complaints_file = plan.folder / "complaints.txt"
        self._end = time.monotonic() + plan.seconds
        self._records: dict[str, str] = {}
        self._reached = 0

    def run(self) -> Outcome:
        """Make what is not made yet, kill, compare."""
        self._end_survivors()
        self._make_reference()
        missing = wrong = 0
        while True:
            if not self._disturbed.folder.exists():
                self._disturbed.copy_from(self._clean)
            self._records = self._disturbed.records()
            self._reproduce()
            missing, wrong = missing + self._missing(), wrong + self._wrong()
            self._judge_events()
            if self._kills_left() <= 0:
                return self._outcome(missing, wrong)
            self._disturbed.remove()

    def _end_survivors(self) -> None:
        """End what an earlier sitting of this campaign, killed itself, has left."""
        places = (self._reference.folder, self._disturbed.folder)

        def alive() -> list[psutil.Process]:
            return [process for process in psutil.process_iter() if _working_folder(process) in places]

        end_all(alive)

    def _make_reference(self) -> None:
        done = self.plan.folder / "reference.json"
        if done.exists():
            return
        if self.plan.reference:
            shutil.copytree(self.plan.reference / "clean", self._clean.folder)
            shutil.copytree(self.plan.reference / "reference", self._reference.folder, symlinks=True)
            shutil.copy(self.plan.reference / "reference.json", done)
            return
        self._say("making the reference, undisturbed")
        self._clean.remove()
        self._clean.make()
        self._reference.copy_from(self._clean)
        began = time.monotonic()
        with self._reference.reproduce(self.plan.target, self.plan.folder / "reference.log") as command:
            if command.wait(24 * 3600):
                raise ChildProcessError(f"it fails undisturbed:\n{command.text[-3000:]}")
        seconds = time.monotonic() - began
        write_json(done, {"seconds": seconds, "runs": len(self._reference.results())})
        self._say(f"reference: {len(self._reference.results())} runs in {seconds:.0f} s")

    def _kills_left(self) -> int:
        return 0 if time.monotonic() > self._end else self.plan.kills - len(self._kills())

    def _kills(self) -> list[dict[str, str]]:
        if not self._kills_file.exists():
            return []
        with open(self._kills_file, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def _reproduce(self) -> None:
        """Start DVC and kill, until the profile is done."""
        failures = 0
        while True:
            log = self.plan.folder / f"disturbed_{len(self._kills())}.log"
            with self._disturbed.reproduce(self.plan.target, log) as command:
                disturbed = self._disturb(command)
                code = command.process.poll()
                self._check_records()
            if code == 0:
                return
            failures = 0 if disturbed else failures + 1
            if failures:
                self._complain(f"it failed undisturbed: {command.text[-800:]}")
            if failures == FAILURES_IN_A_ROW:
                raise ChildProcessError(f"it cannot go on after a kill:\n{command.text[-3000:]}")

    def _disturb(self, command: Command) -> bool:
        """Kill, now and then, until the command has ended. Returns whether it was disturbed at all."""
        disturbed = False
        while self._kills_left() > 0:
            chance = random.Random(f"{self.plan.seed}-{len(self._kills())}")
            gap = SHORTEST_GAP * (self.plan.longest_gap / SHORTEST_GAP) ** chance.random()
            if _ends_within(command, gap):
                return disturbed
            self._kill(command, chance, gap)
            disturbed = True
            if command.ended:
                return True
        _ends_within(command, 24 * 3600)
        return disturbed

    def _kill(self, command: Command, chance: random.Random, after: float) -> None:
        (victim, number), *_ = chance.choices(list(BLOWS), weights=list(BLOWS.values()))
        training = self._is_training()
        victim, number = _strike(command, victim, number, chance)
        began = time.monotonic()
        outcome = self._settle(command, victim)
        if outcome == "went on":
            self._require_progress(command, f"{number.name} to {victim}")
        settled = time.monotonic() - began
        if outcome not in ("ended", "went on"):
            self._complain(f"left running {GONE_SECONDS:.0f} s after {number.name} to {victim}: {outcome}")
        kill = Kill(len(self._kills()) + 1, round(after, 2), victim, number.name, training, round(settled, 2), outcome)
        self._note(kill)

    def _is_training(self) -> bool:
        """Whether a step was taken within the last second."""
        steps = [event.seconds for event in self._disturbed.events() if event.what == "step"]
        return bool(steps) and time.monotonic() - steps[-1] < 1

    def _settle(self, command: Command, victim: str) -> str:
        """Wait until all have ended, or, where a worker can be replaced, it is clear that they go on."""
        end = time.monotonic() + GONE_SECONDS
        while time.monotonic() < end:
            if not command.alive():
                return "ended"
            if victim in (WORKER, SPAWNER) and time.monotonic() > end - GONE_SECONDS + 3 and not command.ended:
                return "went on"
            time.sleep(POLL_SECONDS)
        if not command.ended:
            return "went on"
        return "; ".join(command_line(process)[:100] for process in command.alive()) or "ended"

    def _require_progress(self, command: Command, blow: str) -> None:
        """What goes on must come to something: the next kill would hide that it hangs."""
        before, end = self._disturbed.witnessed, time.monotonic() + STUCK_SECONDS
        while not command.ended and self._disturbed.witnessed == before:
            if time.monotonic() > end:
                self._complain(f"nothing has happened for {STUCK_SECONDS:.0f} s after {blow}")
                return
            time.sleep(POLL_SECONDS)

    def _note(self, kill: Kill) -> None:
        is_new = not self._kills_file.exists()
        with open(self._kills_file, "a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, [each.name for each in fields(Kill)], lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(asdict(kill))
        self._say(
            f"kill {kill.number} of {self.plan.kills}: {kill.signal} to {kill.victim} after {kill.after:.1f} s"
            f"{', in training' if kill.training else ''}; {kill.outcome} ({kill.settled:.1f} s); "
            f"{len(self._disturbed.records())} runs on record"
        )

    def _check_records(self) -> None:
        """What has a record keeps it, unaltered."""
        now = self._disturbed.records()
        for run, digest in self._records.items():
            if now.get(run) != digest:
                self._complain(f"the record of {run} was {'replaced' if run in now else 'lost'}")
        self._records = now

    def _missing(self) -> int:
        return missing_runs(self._disturbed.results(), self._reference.results())

    def _wrong(self) -> int:
        found, expected = self._disturbed.tables(), self._reference.tables()
        for name in sorted(set(found) | set(expected)):
            if found.get(name) != expected.get(name):
                self._complain(f"{name} is not what it is undisturbed")
        return wrong_runs(self._disturbed.results(), self._reference.results())

    def _judge_events(self) -> None:
        events = self._disturbed.events()
        for misdeed in misdeeds(events, CHECKPOINT_SECONDS):
            self._complain(misdeed)
        write_json(self.plan.folder / f"lost_{len(self._kills())}.json", {"seconds": lost_seconds(events)})

    def _complain(self, sentence: str) -> None:
        with open(self._complaints_file, "a", encoding="utf-8") as file:
            file.write(" ".join(sentence.split()) + "\n")
        self._say(f"COMPLAINT: {sentence}")

    def _outcome(self, missing: int, wrong: int) -> Outcome:
        kills = self._kills()
        training = sum(kill["training"] == "True" for kill in kills)
        lost = [json.loads(path.read_text())["seconds"] for path in self.plan.folder.glob("lost_*.json")]
        settled = median(float(kill["settled"]) for kill in kills) if kills else 0
        complaints = self._complaints_file.read_text().splitlines() if self._complaints_file.exists() else []
        return Outcome(
            "kills at random",
            f"{len(kills)} while DVC makes {self.plan.target}, {training} of them in training; checkpoints every "
            f"{CHECKPOINT_SECONDS} s; seed {self.plan.seed}",
            f"all processes gone, or at work again, after {settled:.1f} s (median)",
            f"{max(lost, default=0):.1f} s of training",
            missing,
            wrong,
            tuple(dict.fromkeys(complaints)),
        )


def _working_folder(process: psutil.Process) -> Path | None:
    try:
        return Path(process.cwd())
    except psutil.Error:
        return None


def _ends_within(command: Command, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if command.ended:
            return True
        time.sleep(POLL_SECONDS)
    return False


def _strike(command: Command, victim: str, number: signal.Signals, chance: random.Random) -> Blow:
    """Send a signal to the victim, or kill everything if it is not there; who was struck, and how."""
    if victim == GROUP:
        command.signal_group(number)
        return victim, number
    found = [process for process in command.alive() if kind_of(process, command) == victim]
    if not found:
        command.kill_all()
        return EVERYTHING, signal.SIGKILL
    try:
        chance.choice(sorted(found, key=lambda process: process.pid)).send_signal(number)
    except psutil.NoSuchProcess:
        pass  # it has ended by itself meanwhile
    return victim, number


def kind_of(process: psutil.Process, command: Command) -> str:
    """What a process is to the pipeline."""
    line = command_line(process)
    if process.pid == command.process.pid:
        return PIPELINE
    if "ipykernel_launcher" in line:
        return KERNEL
    if "kdstudy notebook" in line:
        return RUNNER
    if "multiprocessing.forkserver" in line:
        try:
            return WORKER if "multiprocessing.forkserver" in command_line(process.parent()) else SPAWNER
        except (psutil.Error, AttributeError):
            return SPAWNER
    return "another"
