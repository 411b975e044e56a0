"""Whether a record makes sense: by itself, and beside the run that was asked for. Each check gives what is wrong."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from itertools import groupby
from typing import Any

from kdstudy.recipe import Plateau, Recipe
from kdstudy.records import RUN, Record
from kdstudy.study import RunSpec

EXACT = 1e-5  # percent; records keep six decimals
ROUNDING = 0.3  # percent of the test images whose class may turn with the last bits of the logits
SITTING = ("started", "command", "commit", "code", "device", "torch")  # what is read of each


def is_cpu(device: str) -> bool:
    """Whether a record's device is a CPU, on which training repeats to the bit."""
    return device.startswith("cpu")


def latitude(*records: Record) -> float:
    """How far the accuracies of one network may lie apart that these runs found, in percent."""
    devices = {record["device"] for record in records}
    return EXACT if len(devices) == 1 and all(map(is_cpu, devices)) else ROUNDING


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def is_earlier(one: str, other: str) -> bool:
    """Of two times as records tell them. Raises ValueError or TypeError for what is none."""
    return datetime.fromisoformat(one) < datetime.fromisoformat(other)


def malformed(record: Record) -> list[str]:
    """What of a record cannot be read as what it should be."""
    above = [record.get("teacher_run"), *_listed(record.get("co_teacher_runs", []))]
    if not all(run is None or (isinstance(run, str) and RUN.fullmatch(run)) for run in above):
        return [f"its teachers are {above!r:.80}, which are no ids of runs"]
    if not all(isinstance(epoch.get("phase"), str) and type(epoch.get("epoch")) is int for epoch in record["history"]):
        return ["an epoch of its history has no phase or number"]
    for sitting in record["sessions"]:
        if not isinstance(sitting, dict) or not all(isinstance(sitting.get(name), str) for name in SITTING):
            return [f"a sitting does not tell {', '.join(SITTING)}"]
    try:
        is_earlier(record["finished"], record["started"])
    except (ValueError, TypeError):
        return [f"started {record['started']!r:.40} and finished {record['finished']!r:.40} are no times in one form"]
    last = record["sessions"][-1]
    told = {"started": record["sessions"][0]["started"], **{name: last[name] for name in ("device", "torch", "commit")}}
    return [
        f"{name} is {record[name]}, but by its sittings {told[name]}" for name in told if record[name] != told[name]
    ]


def out_of_range(record: Record) -> list[str]:
    """Accuracies that are none, and negative numbers of what there can be none less than none of."""
    measured = [*record["scores"].items(), *((f"further {name}", value) for name, value in record["further"].items())]
    if record["status"] == "diverged" and measured:
        return ["it diverged, and yet has scores"]
    for number, epoch in enumerate(record["history"]):
        measured += [(f"{name} of epoch {number}", value) for name, value in epoch.items() if name.endswith("accuracy")]
    wrong = [f"{name} is {value}" for name, value in measured if not _is_within(name, value)]
    counts = [(name, record[name]) for name in ("seconds", "resumes", "network_epochs", "student_parameters")]
    return wrong[:1] + [f"{name} is {value}" for name, value in counts if not value >= 0]


def _is_within(name: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value >= 0 if name == "nll" else 0 <= value <= 100


def other_than_asked(record: Record, spec: RunSpec) -> list[str]:
    """What a record says beyond its id, against what was asked for; fields that came later are not in it."""
    wanted = {
        "dataset": spec.dataset,
        "images": spec.images,
        "scheme": spec.scheme_name,
        "co_teacher_runs": [teacher.id for teacher in spec.co_teachers],
        "partners": list(spec.partners),
        **_in_parts("hyperparameters", asdict(spec.build_method())),
        **_in_parts("recipe", asdict(spec.recipe)),
    }
    said = record | _in_parts("hyperparameters", record["hyperparameters"]) | _in_parts("recipe", record["recipe"])
    return [
        f"{name} is {said[name]!r:.80}, but by its id {wanted[name]!r:.80}"
        for name in wanted
        if name in said and said[name] != wanted[name]
    ]


def _in_parts(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    # a tuple is a list in JSON
    return {f"{name}.{key}": list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def other_length(record: Record, spec: RunSpec) -> list[str]:
    """Whether the history has the epochs of the method's phases; the scheme may have put phases of its own before."""
    history = record["history"]
    stretches = [(name, list(epochs)) for name, epochs in groupby(history, key=lambda epoch: epoch.get("phase"))]
    for name, epochs in stretches:
        if [epoch.get("epoch") for epoch in epochs] != list(range(len(epochs))):
            return [f"the epochs of phase {name} in its history do not follow one another"]
    recipes = {phase.name: spec.recipe.for_phase(phase) for phase in spec.build_method().phases()}
    own = [(name, epochs) for name, epochs in stretches if name in recipes]
    diverged, untrained = record["status"] == "diverged", not history and not record.get("trained_parameters")
    complete = own[:-1] if diverged else own
    wanted = list(recipes)[: len(own)] if diverged or untrained else list(recipes)
    if [name for name, _ in own] != wanted:
        return [f"its history has the phases {[name for name, _ in own]}, but its method {list(recipes)}"]
    for name, epochs in own:
        recipe = recipes[name]
        if len(epochs) > recipe.epochs or ((name, epochs) in complete and not _is_over(epochs, recipe)):
            return [f"its history has {len(epochs)} of the {recipe.epochs} epochs of phase {name}"]
    return []


def _is_over(epochs: Sequence[Mapping[str, Any]], recipe: Recipe) -> bool:
    """Whether a phase ends after these epochs: all have been taken, or a plateau was found after the last one."""
    if len(epochs) == recipe.epochs:
        return True
    plateau = Plateau(learning_rate=recipe.learning_rate)
    stops = [plateau.update(epoch.get("held_out_accuracy", -1.0), recipe) for epoch in epochs]
    return recipe.schedule == "plateau" and True in stops and stops.index(True) == len(epochs) - 1


def ends_differently(record: Record) -> list[str]:
    """The last epoch's accuracies against the scores."""
    if record["status"] == "diverged" or not record["history"]:
        return []
    last, scores = record["history"][-1], record["scores"]
    for name, in_history in (("test_accuracy", "test_accuracy"), ("val_accuracy", "held_out_accuracy")):
        said, noted = scores.get(name), last.get(in_history)
        if (said is None) != (noted is None) or (said is not None and abs(said - noted) > latitude(record)):
            return [f"{name} is {said}, but after the last epoch of its history it is {noted}"]
    return []
