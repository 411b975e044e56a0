"""The command line: `python -m kdstudy COMMAND`; `--help` after any command says more."""

import argparse
import json
import math
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from kdstudy import __version__
from kdstudy.provenance import tell_command
from kdstudy.stopping import Failed, Stopped, StopRequest

SHOWN_AT_MOST = 60  # runs that a command lists, if it has not made more


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. What the user can mend is told in one line, without a traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["notebook"]:
        from kdstudy import notebook

        return notebook.main(argv[1:])
    arguments = _parser().parse_args(argv)
    tell_command(argv)
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        return arguments.command(arguments) or 0
    except (ValueError, OSError, Failed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept, and the run goes on from its last checkpoint", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kdstudy", description="A reproducible study of knowledge distillation.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    methods = commands.add_parser("methods", help="list every method: key, kind, scheme, phases, parameters, paper")
    methods.add_argument("--json", action="store_true", help="for machines: a list of objects")
    methods.set_defaults(command=_methods)

    data = commands.add_parser("data", help="fetch or embed a data set, check it, and write data/NAME.npz")
    data.add_argument("name", help="a data set of params.yaml")
    data.set_defaults(command=_data)

    run = commands.add_parser("run", help="train runs that have no record yet, without DVC and Jupyter")
    run.add_argument("--profile", help="the settings of this profile, all of them unless some are named")
    run.add_argument("--setting", action="append", metavar="NAME", help="only this setting; may be repeated")
    run.add_argument("--stage", action="append", help="only teacher, or this stage of params.yaml; may be repeated")
    run.add_argument("--method", action="append", metavar="ROW", help="only this row; may be repeated")
    run.add_argument("--seed", action="append", type=int, help="only this seed; may be repeated")
    run.add_argument("--order", choices=["cheapest", "named"], default="cheapest", help="which runs come first")
    run.add_argument("--set", action="append", default=[], metavar="PLACE=VALUE", help="override params.yaml")
    run.add_argument("--device", help="auto, cpu, cuda or cuda:N, several with commas; by default the profile's")
    run.add_argument("--cluster", metavar="ADDRESS", help="by the workers of a Ray cluster; local:N starts N of them")
    run.add_argument("--budget", type=_seconds, metavar="TIME", help="stop after 90s, 25m or 2h; call again to go on")
    run.add_argument("--trace", type=Path, metavar="FOLDER", help="write a trace and a breakdown of some steps there")
    run.add_argument("--deterministic", action="store_true", help="repeat to the bit on a GPU, at the price of speed")
    run.add_argument("--out", type=Path, metavar="FOLDER", help="keep new runs there, for `collect`, not in the store")
    run.set_defaults(command=_run)

    collect = commands.add_parser("collect", help="check and take in runs that were made elsewhere")
    collect.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="what `run --out` wrote, or any store")
    collect.set_defaults(command=_collect)

    verify = commands.add_parser("verify", help="check results against records and tables; what cannot be reproduced")
    verify.add_argument("profiles", nargs="*", metavar="PROFILE", help="by default all that are on disk")
    verify.add_argument("--rescore", action="store_true", help="also score the weights again, where they are here")
    verify.set_defaults(command=_verify)

    costs = commands.add_parser("costs", help="time and memory of every method's training step, beside vanilla KD's")
    costs.add_argument("setting", help="a setting of params.yaml")
    costs.add_argument("--batch", type=int, default=64, help="images in the step")
    costs.add_argument("--repeats", type=int, default=5, help="steps that the median is taken of")
    costs.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    costs.add_argument("--out", type=Path, default=Path("reports/costs"), help="folder of the table SETTING.csv")
    costs.set_defaults(command=_costs)

    bench = commands.add_parser("bench", help="images per second beside the usual loop, alone and in cohorts")
    bench.add_argument("--student", action="append", metavar="NAME", help="only this pair's; may be repeated")
    bench.add_argument("--precision", default="bf16", choices=["bf16", "fp32"], help="of all but the usual loop")
    bench.add_argument("--cohort", type=int, default=9, help="students that are trained together")
    bench.add_argument("--way", default="measured", help="in_turn, fused, streams, or measured for the fastest")
    bench.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True, help="CUDA graphs, on a GPU")
    bench.add_argument("--table", action="store_true", help="also with a table of the teacher's logits")
    bench.add_argument("--growth", action="store_true", help="how cost grows with students, batch and threads instead")
    bench.add_argument("--batch", type=int, default=128, help="images in a step")
    bench.add_argument("--images", type=int, default=12800, help="images in an epoch")
    bench.add_argument("--steps", type=int, default=10, help="steps that a variant takes in a round")
    bench.add_argument("--rounds", type=int, default=5, help="rounds that medians are taken of")
    bench.add_argument("--workers", type=int, default=8, help="processes of the usual loop that load images")
    bench.add_argument("--threads", type=int, help="CPU threads; by default torch's own number")
    bench.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    bench.add_argument("--deterministic", action="store_true", help="with results that repeat to the bit on a GPU")
    bench.add_argument("--out", type=Path, default=Path("reports/bench"), help="folder of the table DEVICE.csv")
    bench.set_defaults(command=_bench)

    commands.add_parser("notebook", help="execute a notebook: SOURCE OUTPUT NAME=VALUE ...")

    form = commands.add_parser("format", help="bring the source notebooks into their canonical form")
    form.add_argument("--check", action="store_true", help="change nothing; fail if one is not canonical")
    form.set_defaults(command=_format)

    report = commands.add_parser("report", help="join a profile's executed notebooks into one self-contained page")
    report.add_argument("profile")
    report.set_defaults(command=_report)

    readme = commands.add_parser("readme", help="put the quick profile's table and picture into README.md")
    readme.set_defaults(command=_readme)
    return parser


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not found:
        raise argparse.ArgumentTypeError(f"a time reads 90s, 25m or 2h, not {text!r}")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def _methods(arguments: argparse.Namespace) -> None:
    from kdstudy.costs import extra_parameters
    from kdstudy.params import load_params
    from kdstudy.study import METHODS, Planner, describe_method

    params = load_params()
    extra = extra_parameters(Planner(params, dict.fromkeys(params.datasets, "")))
    rows = [describe_method(key) | {"extra_parameters": extra[key]} for key in METHODS]
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    print("extra: numbers trained beside the student, for WRN-40-2 and WRN-16-2 with 100 classes\n")
    print(f"{'key':<24} {'kind':<9} {'scheme':<14} {'phases':<22} {'extra':>9}  paper")
    for row in rows:
        number = "-" if row["extra_parameters"] is None else f"{row['extra_parameters']:,}"
        phases = ", ".join(row["phases"]) or "none"
        print(f"{row['key']:<24} {row['kind']:<9} {row['scheme']:<14} {phases:<22} {number:>9}  {row['paper']}")


def _data(arguments: argparse.Namespace) -> None:
    from kdstudy.device import data_path
    from kdstudy.image_set import save_image_set
    from kdstudy.params import load_params, look_up
    from kdstudy.sources import load_source

    dataset = look_up("data set", arguments.name, load_params().datasets)
    save_image_set(load_source(arguments.name, dataset.source, dataset.location), data_path(arguments.name))


def _run(arguments: argparse.Namespace) -> int:
    request = StopRequest(arguments.budget or math.inf)  # first: importing torch is part of the budget

    from kdstudy.campaign import Campaign, Choice
    from kdstudy.execute import Executor, open_ledger
    from kdstudy.progress import reporter
    from kdstudy.store import Store

    out = arguments.out
    store = Store(out / "runs", out / "published", beneath=Store()) if out else Store()
    ledger = open_ledger(arguments.set, store)
    settings = _settings(ledger.planner.params, arguments.profile, arguments.setting)
    wanted = (arguments.stage or (), arguments.method or (), arguments.seed or ())
    campaign = Campaign(ledger, Choice(settings, *wanted, as_named=arguments.order == "named"))
    had = {spec.id for spec in campaign.recorded()}
    with ExitStack() as stack:
        progress = stack.enter_context(reporter(arguments.profile or settings[0]))
        spread = stack.enter_context(_cluster(arguments.cluster)) if arguments.cluster else None
        stack.enter_context(request.listening())

        def executor_of(setting: str) -> Executor:
            return Executor(
                ledger,
                setting,
                report=progress.update,
                should_stop=request,
                device=arguments.device,
                profile_into=arguments.trace,
                deterministic=arguments.deterministic,
                spread=spread,
            )

        try:
            campaign.make(executor_of)
            stopped = False
        except Stopped:
            stopped = True
    if arguments.trace:
        print(f"where the time of a step goes: {arguments.trace / 'breakdown.md'}")
    recorded = campaign.recorded()
    shown = recorded if len(recorded) <= SHOWN_AT_MOST else [spec for spec in recorded if spec.id not in had]
    columns = ["setting", "stage", "method", "purpose", "seed", "test_accuracy", "status", "run"]
    if shown:
        print(ledger.frame(shown)[columns].to_string(index=False))
    print(f"{len(recorded)} of the wanted runs are on record, {len(recorded) - len(had)} of them new")
    if stopped:
        left = campaign.left()
        print(f"{request.reason}; the same command goes on from here. Left (hours at the speed so far):")
        print(left.round(1).to_string(index=False, na_rep="?"))
        print(f"in all {left.runs.sum():,} runs of {left.epochs.sum():,} epochs at most")
    return request.exit_code if stopped else 0


def _settings(params, profile: str | None, named: Sequence[str] | None) -> list[str]:
    """The settings named, or else all of a profile. Raises ValueError for none, and for one of another profile."""
    from kdstudy.params import look_up

    known = params.settings_of(profile) if profile else params.settings
    if not profile and not named:
        raise ValueError("name a --setting, or a --profile for all of its settings")
    for name in named or ():
        look_up(f"setting of profile {profile}:" if profile else "setting", name, known)
    return list(named or known)


def _cluster(address: str):
    from kdstudy.cluster import RayCluster

    return RayCluster(address)


def _collect(arguments: argparse.Namespace) -> int:
    from kdstudy.collect import REFUSED, collect, publish_collected, summary
    from kdstudy.execute import open_ledger

    ledger = open_ledger()
    findings = collect(arguments.folders, ledger)
    for line in summary(findings):
        print(line)
    published, unasked = publish_collected(ledger, {each.run for each in findings if each.outcome != REFUSED})
    print(f"{len(published)} records published under {ledger.store.published}; `make tables` puts them into the tables")
    if unasked:
        print(f"params.yaml does not ask for {len(unasked)} of them, or not before their grids are done")
    return 1 if any(finding.outcome == REFUSED for finding in findings) else 0


def _verify(arguments: argparse.Namespace) -> int:
    from kdstudy.verify import verify

    report = verify(arguments.profiles, rescore=arguments.rescore)
    print(report.text)
    return 1 if report.wrong else 0


def _costs(arguments: argparse.Namespace) -> None:
    from kdstudy.costs import step_costs
    from kdstudy.device import DataOnDevice, choose_device, data_path
    from kdstudy.files import write_text
    from kdstudy.image_set import read_image_set
    from kdstudy.params import load_params
    from kdstudy.schemes import sample_batch
    from kdstudy.study import Planner

    params = load_params()
    planner = Planner(params, dict.fromkeys(params.datasets, ""))
    setting = planner.setting(arguments.setting)
    images = read_image_set(data_path(setting.dataset))
    data = DataOnDevice(images, choose_device(arguments.device))
    bank = data.training(0, params.recipes[setting.recipe])
    batch = sample_batch(bank, arguments.batch)
    table = step_costs(planner, arguments.setting, batch, images.classes, repeats=arguments.repeats, tell=print)
    path = arguments.out / f"{arguments.setting}.csv"
    write_text(path, table.round(4).to_csv(index=False, lineterminator="\n"))
    print(table.drop(columns="seconds").round(2).to_string(index=False))
    print(f"written: {path}")


def _bench(arguments: argparse.Namespace) -> None:
    from io import StringIO

    import pandas as pd
    import torch

    from kdstudy.bench import PAIRS, Plan, growth, measure, usual_variants
    from kdstudy.device import choose_device, make_ready
    from kdstudy.engine import Engine
    from kdstudy.files import write_text
    from kdstudy.params import look_up

    device = choose_device(arguments.device)
    make_ready(arguments.deterministic)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    engine = Engine(arguments.way, arguments.graphs)
    sizes = {name: getattr(arguments, name) for name in ("batch", "images", "steps", "rounds", "workers")}
    tables = []
    for student in arguments.student or PAIRS:
        plan = Plan(student=student, teacher=look_up("student", student, PAIRS), device=device, **sizes)
        if arguments.growth:
            tables.append(growth(plan, arguments.precision, engine, tell=print))
        else:
            variants = usual_variants(arguments.precision, arguments.cohort, engine, table=arguments.table)
            tables.append(measure(plan, variants, print))
    table = pd.concat(tables)
    name = re.sub(r"\W+", "_", table.device.iloc[0]).strip("_") + ("_growth" if arguments.growth else "")
    path = arguments.out / f"{name}.csv"
    new = StringIO(table.round(6).to_csv(index=False))
    # as text, so that rows which stay are what they were, to the byte
    tables = [
        pd.read_csv(file, dtype=str, keep_default_na=False) for file in (path, new) if file is new or path.exists()
    ]
    same = [name for name in ("series", "student", "variant", "precision", "batch", "threads") if name in table]
    kept = pd.concat(tables).drop_duplicates(same, keep="last")
    write_text(path, kept.to_csv(index=False, lineterminator="\n"))
    shown = ["student", "variant", "precision", "way", "graph", "batch", "threads", "images_per_second", "ratio"]
    print(table[[*shown, "roofline_share", "outside_kernels"]].round(2).to_string(index=False))
    print(f"written: {path}")


def _format(arguments: argparse.Namespace) -> None:
    from kdstudy.notebook import format_sources

    changed = format_sources(Path("notebooks"), check=arguments.check)
    if changed and arguments.check:
        raise ValueError(f"not canonical: {', '.join(map(str, changed))}; `make fmt` mends it")


def _report(arguments: argparse.Namespace) -> None:
    from kdstudy.pages import report_profile

    print(f"report: {report_profile(arguments.profile)}")


def _readme(arguments: argparse.Namespace) -> None:
    from kdstudy.pages import update_readme

    update_readme()


if __name__ == "__main__":
    sys.exit(main())
