"""What the notebook on self-distillation shows: who a network's teacher is, its exits, its generations."""

from collections.abc import Sequence

import pandas as pd
import torch
from IPython.display import Markdown

from kdstudy.companions import DEPLOYED, TOGETHER, means, networks
from kdstudy.image_set import ImageSet
from kdstudy.lesson import table
from kdstudy.models import build_model, count_parameters
from kdstudy.readings import control_reading
from kdstudy.study import SCHEMES, Planner, RunSpec
from kdstudy.tables import label

STAGE = "self"
OWN = {
    "own_teacher": "its own last classifier",
    "snapshot": "what it was at the end of its last cycle",
    "virtual_teacher": "a formula",
}
GENERATIONS = ("ce", "born_again_1", "born_again_2", "born_again_3", "born_again_ensemble")
UNSURE = 10.0  # points of ECE more than the CE student's


def lineage_table(planner: Planner, setting: str) -> Markdown:
    """Who taught the rows that a setting trains in this stage, and their teachers; a sentence if there are none."""
    specs = [planner.final(setting, STAGE, row, {})[0] for row in planner.rows(setting, STAGE)]
    if not specs:
        return Markdown(f"The setting `{setting}` trains no network that teaches itself.")
    rows = [(f"`{spec.row}`", spec.network, _teacher(spec)) for spec in specs]
    return table(pd.DataFrame(rows, columns=["row", "network", "taught by"]))


def _teacher(spec: RunSpec) -> str:
    if spec.method in OWN:
        return OWN[spec.method]
    if not SCHEMES[spec.scheme_name].needs_teacher:
        return "the labels alone"
    return "; ".join(_lineage(teacher) for teacher in spec.teachers)


def _lineage(spec: RunSpec) -> str:
    """A run that teaches and, before arrows, those that taught it."""
    length = f"{spec.epochs} epoch{'s' * (spec.epochs != 1)}"
    name = f"{spec.network} after {length} of labels" if ":" in spec.row else label(spec.row)
    return f"{_teacher(spec)} \N{RIGHTWARDS ARROW} {name}" if SCHEMES[spec.scheme_name].needs_teacher else name


def exits_table(network: str, images: ImageSet) -> Markdown:
    """How many of its numbers a network with heads needs until each exit answers, and what share of the last's."""
    headed = build_model(
        f"{network}+heads", classes=images.classes, channels=images.channels, image_size=images.image_size
    )
    needed = [_until(headed, number) for number in range(len(headed.heads))]
    needed.append(count_parameters(headed.backbone))
    names = [*(f"exit {number}" for number in range(1, len(needed))), "last classifier"]
    rows = [(name, f"{count:,}", f"{count / needed[-1]:.0%}") for name, count in zip(names, needed, strict=True)]
    return table(pd.DataFrame(rows, columns=["answers", "parameters", "of the last classifier's"]), network)


def _until(headed: torch.nn.Module, number: int) -> int:
    parts = [headed.backbone.stem, *headed.backbone.stages[: number + 1], headed.heads[number]]
    return sum(count_parameters(part) for part in parts)


def exit_scores(results: pd.DataFrame, row: str = "own_teacher") -> dict[str, pd.Series]:
    """By seed, the test accuracy of each exit, shallow to deep, of the last classifier, and of all together."""
    scores = networks(results[results.method == row]).replace({"network": {DEPLOYED: "last", TOGETHER: "together"}})
    return {f"seed {seed}": _by_name(runs) for seed, runs in scores.groupby("seed")}


def _by_name(runs: pd.DataFrame) -> pd.Series:
    return runs.set_index("network").test_accuracy.rename(lambda name: name.replace("_", " "))


def exit_names(scores: dict[str, pd.Series]) -> list[str]:
    """The exits of `exit_scores`, shallow to deep, then the last classifier and all together."""
    early = sorted({name for seed in scores.values() for name in seed.index if name.startswith("exit")})
    return [*early, "last", "together"]


def generation_scores(results: pd.DataFrame) -> dict[str, pd.Series]:
    """By seed, the test accuracy of the CE student, of each generation, and of the generations together."""
    scores = networks(results[results.method.isin(GENERATIONS)])
    scores = scores[scores.network == DEPLOYED].assign(
        network=[label(m) for m in scores.method[scores.network == DEPLOYED]]
    )
    return {f"seed {seed}": runs.set_index("network").test_accuracy for seed, runs in scores.groupby("seed")}


def generation_names() -> list[str]:
    """The generations as `generation_scores` names them, in their order."""
    return [label(row) for row in GENERATIONS]


def self_reading(results: pd.DataFrame, setting: str) -> Markdown:
    """What a network's exits, generations and weak teachers come to, and who has become unsure of itself."""
    finals = results[(results.purpose == "final") & (results.status == "finished") & (results.setting == setting)]
    lines = [*_exits(finals), *_generations(finals), *_poor(finals), *_unsure(finals)]
    return Markdown("\n".join(lines) or "- No network that teaches itself has finished.")


def _exits(finals: pd.DataFrame) -> list[str]:
    mean = means(networks(finals[finals.method == "own_teacher"])).get("own_teacher")
    if mean is None:
        return []
    early = mean.drop([DEPLOYED, TOGETHER])
    listed = ", ".join(f"{name.replace('_', ' ')} {accuracy:.2f} %" for name, accuracy in early.items())
    gain = mean[TOGETHER] - mean[DEPLOYED]
    verdict = "helps" if gain > 0 else "does not help"
    return [
        f"- {label('own_teacher')}: {listed}, the last classifier {mean[DEPLOYED]:.2f} %, all together "
        f"{mean[TOGETHER]:.2f} %. To ask the early exits, too, {verdict} here ({gain:+.2f} points)."
    ]


def _generations(finals: pd.DataFrame) -> list[str]:
    mean = finals.groupby("method").test_accuracy.mean()
    chain = [row for row in GENERATIONS[:-1] if row in mean]
    if len(chain) < 2:
        return []
    listed = ", ".join(f"{mean[row]:.2f} %" for row in chain)
    lines = [f"- From the CE student, generation by generation: {listed}."]
    if GENERATIONS[-1] in mean:
        best = max(chain[1:], key=mean.__getitem__)
        lines.append(
            f"- The generations together reach {mean[GENERATIONS[-1]]:.2f} %, "
            f"{mean[GENERATIONS[-1]] - mean[best]:+.2f} points against the best of them alone ({label(best)})."
        )
    return lines


def _poor(finals: pd.DataFrame) -> list[str]:
    lines = []
    for row in ("bigger_taught", "poorly_taught"):
        runs = finals[finals.method == row]
        if len(runs):
            student, teacher = runs.test_accuracy.mean(), runs.teacher_accuracy.astype(float).mean()
            lines.append(
                f"- {label(row)}: {student:.2f} %, by a teacher that has {teacher:.2f} %. The student is "
                f"{'ahead of' if student > teacher else 'not ahead of'} its teacher."
            )
    return lines


def _unsure(finals: pd.DataFrame) -> list[str]:
    errors = finals.groupby("method", sort=False).ece.mean()
    if "ce" not in errors:
        return []
    off = errors[errors > errors["ce"] + UNSURE]
    if off.empty:
        return []
    listed = ", ".join(f"{label(row)} {error:.1f}" for row, error in off.items())
    return [
        f"- Confidence and accuracy are far apart (ECE in points; CE student {errors['ce']:.1f}): {listed}. Accuracy "
        "does not show it. A target that is unsure makes an unsure student, and more so where it alone is softened."
    ]


def controls_reading(results: pd.DataFrame, setting: str, rows: Sequence[str]) -> Markdown:
    """The mean paired difference of these rows to what they were before, or would be without a teacher."""
    pairs = {
        **{row: "ce" for row in ("own_teacher", "snapshot", "virtual_teacher", "teacher_free_self")},
        **dict(zip(GENERATIONS[1:-1], GENERATIONS[:-2], strict=True)),
        "born_again_cwtm": "born_again_1",
        "born_again_dkpp": "born_again_1",
        "virtual_teacher_code": "virtual_teacher",
        "bigger_taught": "bigger",
        "poorly_taught": "ce",
    }
    return control_reading(results, setting, {row: pairs[row] for row in rows if row in pairs})
