"""The command line of the fault campaign: `python -m tests.faults --kills 100 --out reports/faults`."""

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .campaign import KillCampaign, Plan
from .outcome import Outcome, Unable, write_table
from .scenarios import SCENARIOS
from .study import Study


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for, write the table, and return 1 if a fault did not end as promised."""
    arguments = _parser().parse_args(argv)
    # a shell has what it starts in the background ignore interrupts: a Ctrl-C would be none
    signal.signal(signal.SIGINT, signal.default_int_handler)
    names = arguments.only if arguments.only is not None else list(SCENARIOS)
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        outcomes = list(_scenarios(names, Path(temporary)))
        if arguments.kills:
            folder = (arguments.work or Path(temporary) / "campaign").resolve()
            folder.mkdir(parents=True, exist_ok=True)
            plan = Plan(
                folder,
                kills=arguments.kills,
                target=arguments.target,
                seed=arguments.seed,
                seconds=3600 * arguments.hours,
                reference=arguments.reference,
            )
            outcomes.insert(0, KillCampaign(plan, _say).run())
    write_table(outcomes, arguments.out)
    _say(f"written: {arguments.out / 'faults.md'}")
    return 0 if all(outcome.ok for outcome in outcomes) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Break a study in every way.")
    parser.add_argument("--kills", type=int, default=100, help="at random moments, over the quick profile; 0 for none")
    parser.add_argument("--hours", type=float, default=24.0, help="no more kills after so long")
    parser.add_argument("--target", default="report@quick", help="what DVC is to make while it is being killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims")
    parser.add_argument("--reference", type=Path, help="the --work folder of another campaign, for its reference")
    parser.add_argument("--work", type=Path, help="where the campaign is kept; with the same folder it goes on")
    parser.add_argument("--only", action="append", choices=["none", *SCENARIOS], help="these faults; may be repeated")
    parser.add_argument("--out", type=Path, default=Path("reports/faults"), help="folder of faults.md and faults.csv")
    return parser


def _scenarios(names: Sequence[str], folder: Path):
    wanted = [name for name in names if name != "none"]
    if not wanted:
        return
    _say("the small study, undisturbed")
    undisturbed = Study(folder / "undisturbed")
    undisturbed.complete()
    for name in wanted:
        try:
            outcome = SCENARIOS[name](folder / name, undisturbed.results)
        except Unable as reason:
            outcome = Outcome(name, "not tried", str(reason), "", 0, 0, ())
        _say(f"{name}: {outcome.row[-1]}")
        yield outcome


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
