"""The table of faults and what became of the study."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from kdstudy.files import write_text

from .study import CHECKPOINT_SECONDS, SETTING, Result, Study
from .witness import lost_seconds, misdeeds

COLUMNS = ("fault", "how", "what the user sees", "lost at most", "runs lost", "runs wrong", "result")
LONGEST_SHOWN = 600


class Unable(Exception):
    """A fault cannot be made here; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """What a fault did. `complaints` say, in sentences, what should not have been; with none, all is well."""

    fault: str
    how: str
    message: str
    lost: str
    runs_lost: int
    runs_wrong: int
    complaints: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the fault ended as promised."""
        return not (self.runs_lost or self.runs_wrong or self.complaints)

    @property
    def row(self) -> tuple:
        """Its line of the table."""
        result = "as promised" if self.ok else "; ".join(self.complaints) or "runs are not what they were"
        return (self.fault, self.how, self.message, self.lost, self.runs_lost, self.runs_wrong, result)


def missing_runs(results: Mapping[str, Result], expected: Mapping[str, Result]) -> int:
    """How many runs have no result."""
    return len(set(expected) - set(results))


def wrong_runs(results: Mapping[str, Result], expected: Mapping[str, Result]) -> int:
    """How many runs have another result than undisturbed, or were not asked for."""
    return sum(run not in expected or results[run] != expected[run] for run in results)


def judged(
    study: Study,
    expected: Mapping[str, Result],
    fault: str,
    how: str,
    message: str,
    *,
    must_say: Sequence[str] = (),
    complaints: Sequence[str] = (),
    forgiven: str = "^$",
    lost: str = "",
) -> Outcome:
    """The outcome of a fault, once the study has gone on to its end.

    The message is to hold every pattern of `must_say` and no traceback. No run may have lost more training than there
    is between two checkpoints, nor any other of `misdeeds`, but for those that match `forgiven`: a torn file costs what
    was in it, which `lost` then names.
    """
    events, results = study.events, study.results
    seconds = lost_seconds(events)
    found = [
        *complaints,
        *(misdeed for misdeed in misdeeds(events, CHECKPOINT_SECONDS) if not re.search(forgiven, misdeed)),
    ]
    found += [f"the message lacks {pattern!r}" for pattern in must_say if not re.search(pattern, message)]
    if "Traceback" in message:
        found.append("a traceback is shown")
    return Outcome(
        fault,
        how,
        shown(message, study.folder),
        lost or (f"{seconds:.1f} s of training" if seconds else "nothing"),
        missing_runs(results, expected),
        wrong_runs(results, expected),
        tuple(found),
    )


def shown(message: str, folder: Path) -> str:
    """A message on one line, without the machine's folders, run ids, progress and tables of results."""
    lines = [line.strip() for line in message.replace(str(folder), ".").splitlines()]
    lines = [line for line in lines if line and not re.search(rf"\d+ %  |^(setting|{SETTING}) ", line)]
    text = re.sub(r"\b[0-9a-f]{16}\b", "RUN", " / ".join(lines))
    text = re.sub(r"(?<![\w.])(/[\w.+-]+)+/([\w.+-]+)", r"\2", text)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 106]} [...] {text[-99:]}"


def write_table(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Write faults.csv and faults.md into a folder."""
    table = pd.DataFrame([outcome.row for outcome in outcomes], columns=list(COLUMNS))
    write_text(folder / "faults.csv", table.to_csv(index=False, lineterminator="\n"))
    escaped = table.map(lambda cell: str(cell).replace("|", "\\|"))
    write_text(folder / "faults.md", escaped.to_markdown(index=False) + "\n")
