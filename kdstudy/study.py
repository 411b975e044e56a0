"""The study as objects: the table of methods, and what each run is - its specification and its id."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from typing import Any

from kdstudy import relative, response, train
from kdstudy.core import Method
from kdstudy.params import Grid, Params, Setting, build, look_up
from kdstudy.recipe import Recipe
from kdstudy.schemes import Alone, Offline, Scheme

METHODS: dict[str, type[Method]] = {
    "ce": response.CrossEntropy,
    "kd": response.VanillaKD,
    "spherical": response.SphericalKD,
    "two_temperature": response.TwoTemperature,
    "earth_mover": relative.EarthMover,
    "relative_v1": relative.RelativeV1,
    "relative_v2": relative.RelativeV2,
    "relative_v3": relative.RelativeV3,
    "relative_v4": relative.RelativeV4,
}

# each built from student, teacher (not for "none"), method, sample batch
SCHEMES: dict[str, type[Scheme]] = {"none": Alone, "offline": Offline}

BASELINE = "ce"  # what teachers and baseline students are trained with
PURPOSES = ("tuning", "final")


def build_method(key: str, **hyperparameters: Any) -> Method:
    """The method of this key. Raises ValueError for an unknown key or hyperparameter (naming the nearest) or value."""
    cls = look_up("method", key, METHODS)
    return build(cls, hyperparameters, key)


def scheme_of(method: type[Method]) -> str:
    """The scheme under which a method is trained, a key of `SCHEMES`: "none" without a teacher."""
    return method.scheme if method.needs_teacher else "none"


def describe_method(key: str) -> dict[str, Any]:
    """What the list of methods says of one: key, kind, scheme, phases, hyperparameters with defaults, paper."""
    method = build_method(key)
    return {
        "key": key,
        "kind": method.kind,
        "scheme": scheme_of(type(method)),
        "phases": [phase.name for phase in method.phases()],
        "hyperparameters": asdict(method),
        "paper": method.paper,
    }


@dataclass(frozen=True)
class RunSpec:
    """Everything that a run's result depends on, and the names under which the study files it.

    `held_out` images are kept back from training (0: none). `teacher` is the teacher's own run: it teaches, or, for
    methods without one, is only compared with. The id leaves out the names, and every field that has its default value,
    so that adding an option to a method makes no finished run a new one.
    """

    profile: str
    setting: str
    stage: str
    purpose: str
    row: str  # the method's name in the tables
    dataset: str
    data_checksum: str
    held_out: int
    network: str
    method: str
    hyperparameters: tuple[tuple[str, Any], ...]
    recipe: Recipe
    seed: int
    teacher: "RunSpec | None" = None

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits."""
        identity = {
            "data": self.data_checksum,
            "held_out": self.held_out,
            "network": self.network,
            "method": self.method,
            "hyperparameters": _changed(self.build_method()),
            "recipe": _changed(self.recipe),
            "seed": self.seed,
            "teacher": self.teacher.id if self.teacher else None,
            "revision": train.REVISION,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def epochs(self) -> int:
        """How many epochs training takes at most, over all phases of the method."""
        return sum(phase.epochs(self.recipe.epochs) for phase in self.build_method().phases())

    def build_method(self) -> Method:
        """The method with its hyperparameters."""
        return build_method(self.method, **dict(self.hyperparameters))

    def __str__(self) -> str:
        return f"{self.setting} {self.row} seed {self.seed}" + (" (tuning)" if self.purpose == "tuning" else "")


def _changed(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their default; fields without a default always."""
    defaults = {f.name: f.default for f in fields(value)}
    return {name: x for name, x in asdict(value).items() if defaults[name] is MISSING or x != defaults[name]}


@dataclass(frozen=True)
class Planner:
    """Turns params.yaml into run specifications. `checksums` maps every data set's name to its checksum."""

    params: Params
    checksums: Mapping[str, str]

    def teacher(self, setting: str, seed: int, purpose: str = "final") -> RunSpec:
        """The teacher that all students of this setting, seed and purpose share."""
        return self._spec(setting, "teacher", purpose, "teacher", BASELINE, {}, seed, teacher=None)

    def teachers(self, setting: str) -> list[RunSpec]:
        """All teachers of a setting: one per seed, and one for tuning if a grid needs it."""
        specs = [self.teacher(setting, seed) for seed in self.setting(setting).seeds]
        if self._grid(setting).rows:
            specs.append(self.teacher(setting, self.tuning_seed(setting), "tuning"))
        return specs

    def rows(self, setting: str, stage: str) -> list[str]:
        """The rows of a stage that this setting trains, in the order of params.yaml."""
        wanted = self.setting(setting).methods
        return [row for row in look_up("stage", stage, self.params.methods) if wanted is None or row in wanted]

    def tuning(self, setting: str, stage: str, row: str) -> list[RunSpec]:
        """One run per cell of the row's grid, on all but the held-out images; empty without a grid."""
        seed = self.tuning_seed(setting)
        return [self._student(setting, stage, row, cell, seed, "tuning") for cell in self._grid(setting).cells(row)]

    def final(self, setting: str, stage: str, row: str, chosen: Mapping[str, Any]) -> list[RunSpec]:
        """One run per seed on all training images, with the hyperparameters `chosen` over those of params.yaml."""
        return [self._student(setting, stage, row, chosen, seed, "final") for seed in self.setting(setting).seeds]

    def tuning_seed(self, setting: str) -> int:
        """The one seed that the cells of a grid are compared on."""
        return self.setting(setting).seeds[0]

    def _student(self, setting, stage, row, overrides, seed, purpose) -> RunSpec:
        values = dict(self.params.methods[stage][row])
        method = values.pop("method", row)
        teacher = self.teacher(setting, seed, purpose)
        return self._spec(setting, stage, purpose, row, method, values | dict(overrides), seed, teacher)

    def _spec(self, name, stage, purpose, row, method, hyperparameters, seed, teacher) -> RunSpec:
        setting = self.setting(name)
        recipe = self.params.recipes[setting.recipe]
        return RunSpec(
            profile=setting.profile,
            setting=name,
            stage=stage,
            purpose=purpose,
            row=row,
            dataset=setting.dataset,
            data_checksum=self.checksums[setting.dataset],
            held_out=self._held_out(setting, recipe, purpose),
            network=setting.student if teacher else setting.teacher,
            method=method,
            hyperparameters=tuple(sorted(hyperparameters.items())),
            recipe=recipe,
            seed=seed,
            teacher=teacher,
        )

    def _held_out(self, setting: Setting, recipe: Recipe, purpose: str) -> int:
        # a plateau is found on held-out images, never on the test set, so those runs do without them to the end
        needed = purpose == "tuning" or recipe.schedule == "plateau"
        return self.params.datasets[setting.dataset].validation if needed else 0

    def setting(self, name: str) -> Setting:
        """The setting of this name. Raises ValueError if it is unknown."""
        return look_up("setting", name, self.params.settings)

    def _grid(self, setting: str) -> Grid:
        name = self.setting(setting).grid
        return self.params.grids[name] if name else Grid()


def check_methods(params: Params) -> None:
    """Build every row of every stage, and every cell of every grid, once. Raises ValueError naming the row."""
    for stage, rows in params.methods.items():
        for row, values in rows.items():
            cells = [cell for grid in params.grids.values() for cell in grid.cells(row)]
            for cell in [{}, *cells]:
                hyperparameters = {"method": row} | values | cell
                try:
                    build_method(hyperparameters.pop("method"), **hyperparameters)
                except ValueError as error:
                    raise ValueError(f"methods.{stage}.{row}: {error}") from error
