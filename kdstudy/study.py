"""The study as objects: the table of methods, and what each run is - its specification and its id."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from kdstudy import (
    adversarial,
    attention,
    boundaries,
    collaborative,
    collective,
    contrast,
    cross_layer,
    data_free,
    ensembles,
    exits,
    few_samples,
    generations,
    hints,
    layers,
    logits,
    mutual,
    penultimate,
    quantised,
    relative,
    response,
    reuse,
    rocket,
    samples,
    sections,
    self_taught,
    train,
    tree_students,
    virtual_teacher,
)
from kdstudy.core import Method
from kdstudy.launch import Launch
from kdstudy.params import Grid, Params, Row, Setting, TaughtBy, build, look_up
from kdstudy.peers import Peers
from kdstudy.recipe import Recipe
from kdstudy.records import run_id
from kdstudy.rivals import Rivals
from kdstudy.schemes import Alone, Batch, Cast, Collaborative, Committee, Offline, Scheme, SelfTaught
from kdstudy.snapshots import Snapshots
from kdstudy.synthetic import Impressions, Munged, ZeroShot

METHODS: dict[str, type[Method]] = {
    # response: what the teacher answers
    "ce": response.CrossEntropy,
    "kd": response.VanillaKD,
    "spherical": response.SphericalKD,
    "two_temperature": response.TwoTemperature,
    "earth_mover": relative.EarthMover,
    "relative_v1": relative.RelativeV1,
    "relative_v2": relative.RelativeV2,
    "relative_v3": relative.RelativeV3,
    "relative_v4": relative.RelativeV4,
    "logit_mimic": logits.LogitMimic,
    "class_distance_teacher": penultimate.ClassDistanceTeacher,
    "class_distance": penultimate.ClassDistance,
    "feature_normalised": penultimate.FeatureNormalised,
    "dkd": logits.DecoupledKD,
    "dist": logits.DIST,
    "logit_standardisation": logits.StandardisedKD,
    "mlkd": logits.MultiLevel,
    "ensemble": ensembles.AveragedTeachers,
    "aekd": ensembles.AdaptiveEnsemble,
    # feature: what it computes on the way
    "fitnets": hints.FitNets,
    "factor_transfer": hints.FactorTransfer,
    "variational_information": hints.VariationalInformation,
    "attention": attention.AttentionTransfer,
    "neuron_selectivity": attention.NeuronSelectivity,
    "activation_boundaries": boundaries.ActivationBoundaries,
    "overhaul": boundaries.ComprehensiveOverhaul,
    "semckd": cross_layer.SemCKD,
    "review": cross_layer.ReviewKD,
    "lit": sections.LIT,
    "adain": sections.AdaIN,
    "joint_residual": sections.JointRD,
    "reused_classifier": reuse.ReusedClassifier,
    "heads": exits.HeadTraining,
    "tofd": exits.TOFD,
    "relative_heads": exits.RelativeHeads,
    "crd": contrast.CRD,
    "crd_inbatch": contrast.InBatchCRD,
    # relation: how images, or layers, go together
    "relational": samples.Relational,
    "instance_graph": samples.InstanceGraph,
    "similarity": samples.SimilarityPreserving,
    "probabilistic": samples.Probabilistic,
    "correlation": samples.Correlation,
    "fsp": layers.FSP,
    "multi_head_graph": layers.MultiHeadGraph,
    "collaborative_teaching": collaborative.CollaborativeTeaching,
    # solved in closed form
    "few_sample": few_samples.FewSample,
    # between peers that learn at the same time
    "mutual": mutual.DeepMutualLearning,
    "codistillation": mutual.Codistillation,
    "kdcl": collective.KDCL,
    "okddip": collective.OKDDip,
    "afd": adversarial.AdversarialDistillation,
    "rocket": rocket.RocketLaunching,
    # from oneself
    "own_teacher": self_taught.BeYourOwnTeacher,
    "snapshot": self_taught.SnapshotDistillation,
    "born_again": generations.BornAgain,
    "born_again_ensemble": generations.BornAgainEnsemble,
    "teacher_free_self": virtual_teacher.TeacherFreeSelf,
    "virtual_teacher": virtual_teacher.VirtualTeacher,
    # without the training images
    "zero_shot": data_free.ZeroShotTransfer,
    "data_impressions": data_free.DataImpressions,
    # students that are not the usual networks
    "quantised": quantised.QuantisedKD,
    "soft_tree": tree_students.SoftTree,
}

# who teaches whom
SCHEMES: dict[str, type[Scheme]] = {
    "none": Alone,
    "offline": Offline,
    "collaborative": Collaborative,
    "peers": Peers,
    "rivals": Rivals,
    "launch": Launch,
    "self": SelfTaught,
    "snapshot": Snapshots,
    "committee": Committee,
    "zero_shot": ZeroShot,
    "impressions": Impressions,
    "munged": Munged,
}

BASELINE = "ce"  # what teachers and baseline students are trained with
PURPOSES = ("tuning", "final", "teaching")  # the last: runs that only teach others of their stage


def build_method(key: str, **hyperparameters: Any) -> Method:
    """The method of this key. Raises ValueError for an unknown key or hyperparameter (naming the nearest) or value."""
    cls = look_up("method", key, METHODS)
    return build(cls, hyperparameters, key)


def build_options(method: str, scheme: str, options: Mapping[str, Any]) -> Any:
    """A scheme's options. Raises ValueError for an unknown scheme, option or value, and a method bound to another."""
    cls, own = look_up("scheme", scheme, SCHEMES), METHODS[method]
    if own.bound and scheme != own.scheme:
        raise ValueError(f"{method} can only be trained under scheme {own.scheme}, not {scheme}")
    return build(cls.options, dict(options), f"scheme {scheme}")


def scheme_of(method: type[Method]) -> str:
    """The scheme under which a method is trained by default, a key of `SCHEMES`: "none" without anyone who teaches."""
    return method.scheme if method.needs_teacher or method.scheme != "offline" else "none"


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

    `held_out` images are kept back from training (0: none), and a share of the rest, `images`, is trained on. `teacher`
    is the teacher's own run: it teaches, or, under schemes without one, is only compared with; `co_teachers` teach with
    it. `scheme` is the method's own unless it is named, and `partners` are networks that are trained beside the
    student. The id leaves out the names, and every field that has its default value, so that adding an option to a
    method or scheme makes no finished run a new one.
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
    co_teachers: "tuple[RunSpec, ...]" = ()
    images: float = 1.0
    scheme: str | None = None
    scheme_options: tuple[tuple[str, Any], ...] = ()
    partners: tuple[str, ...] = ()

    @property
    def scheme_name(self) -> str:
        """The scheme under which it is trained, a key of `SCHEMES`."""
        return self.scheme or scheme_of(METHODS[self.method])

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits."""
        return run_id(self.identity)

    @property
    def identity(self) -> dict[str, Any]:
        """All that its result depends on, as its record says it."""
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
        if self.co_teachers:
            identity["co_teachers"] = [teacher.id for teacher in self.co_teachers]
        if self.images != 1:
            identity["images"] = self.images
        if self.scheme_name != scheme_of(METHODS[self.method]):
            identity["scheme"] = self.scheme_name
        if changed := _changed(self.build_options()):
            identity["scheme_options"] = changed
        if self.partners:
            identity["partners"] = list(self.partners)
        return identity

    @property
    def teachers(self) -> "tuple[RunSpec, ...]":
        """All teachers' runs, the one that it is compared with first."""
        return (*((self.teacher,) if self.teacher else ()), *self.co_teachers)

    @property
    def depth(self) -> int:
        """How many runs must be made one after the other before this one."""
        return 1 + max(teacher.depth for teacher in self.teachers) if self.teachers else 0

    @property
    def epochs(self) -> int:
        """How many epochs training takes at most, over all phases of the method."""
        return sum(phase.epochs(self.recipe.epochs) for phase in self.build_method().phases())

    def build_method(self) -> Method:
        """The method with its hyperparameters."""
        return build_method(self.method, **dict(self.hyperparameters))

    def build_options(self) -> Any:
        """The scheme's options. Raises ValueError for an unknown scheme, option or value."""
        return build_options(self.method, self.scheme_name, dict(self.scheme_options))

    def assemble(self, build: Callable[[str], nn.Module], teachers: Sequence[nn.Module], sample: Batch) -> Scheme:
        """The scheme with new networks, whose first weights are the seed's, and these trained `teachers`."""
        torch.manual_seed(self.seed)
        cast = Cast(build, self.network, self.partners, teachers)
        return SCHEMES[self.scheme_name].assemble(cast, self.build_method(), sample, self.build_options())

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
        row = Row(BASELINE, network="{teacher}")
        recipe = self.setting(setting).teacher_recipe
        return self._spec(setting, "teacher", purpose, "teacher", row, seed, recipe=recipe)

    def teachers(self, setting: str) -> list[RunSpec]:
        """All teachers of a setting: one per seed, and one for tuning if a grid needs it."""
        specs = [self.teacher(setting, seed) for seed in self.setting(setting).seeds]
        if self._grid(setting).rows:
            specs.append(self.teacher(setting, self.tuning_seed(setting), "tuning"))
        return specs

    def rows(self, setting: str, stage: str) -> list[str]:
        """The rows of a stage that this setting trains, in the order of params.yaml."""
        known = look_up("stage", stage, self.params.methods)
        return [name for name, row in known.items() if self._wants(self.setting(setting), name, row)]

    def _can_make(self, setting: Setting, row: Row) -> bool:
        """Whether the setting has the networks, and the rows that teach, which a row asks for."""
        if any(setting.network(pattern) is None for pattern in row.networks):
            return False
        others = [teacher.row for teacher in row.taught_by if teacher.row]
        return all(self._wants(setting, other, self._find_row(other)[1]) for other in others)

    def _wants(self, setting: Setting, name: str, row: Row) -> bool:
        chosen = name not in setting.without and (setting.methods is None or name in setting.methods)
        return chosen and self._can_make(setting, row)

    def _find_row(self, name: str) -> tuple[str, Row]:
        """A row and its stage. Raises ValueError if it is unknown."""
        stages = {row: stage for stage, rows in self.params.methods.items() for row in rows}
        stage = look_up("row", name, stages)
        return stage, self.params.methods[stage][name]

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

    def _student(self, setting, stage, name, overrides, seed, purpose) -> RunSpec:
        row = self.params.methods[stage][name]
        row = row.overridden(self.setting(setting).overrides.get(name, {})).overridden(overrides)
        first, *others = self._taught_by(setting, stage, name, row, seed, purpose)
        return self._spec(setting, stage, purpose, name, row, seed, teacher=first, co_teachers=tuple(others))

    def _taught_by(self, setting, stage, name, row, seed, purpose) -> list[RunSpec]:
        """The runs that teach a row's student of this seed."""
        teacher = self.teacher(setting, seed, purpose)
        if not row.taught_by:
            others = self._other_seeds(setting, seed, row)
            return [teacher, *(self.teacher(setting, other, purpose) for other in others)]
        return [self._between(setting, stage, name, row, own, teacher) for own in row.taught_by]

    def _between(self, setting, stage, name, row, own: TaughtBy, teacher: RunSpec) -> RunSpec:
        """One of the runs that teach in the teacher's place, of the teacher's seed and purpose."""
        if own.row:
            stage = self._find_row(own.row)[0]
            spec = self._student(setting, stage, own.row, {}, teacher.seed, teacher.purpose)
            return spec if spec.purpose == "final" else replace(spec, purpose="teaching")
        between = Row(
            own.method, network=own.network, images=row.images, length=own.length, hyperparameters=own.hyperparameters
        )
        above = teacher if METHODS[own.method].needs_teacher else None
        spec = self._spec(setting, stage, teacher.purpose, f"{name}: teacher", between, teacher.seed, teacher=above)
        return replace(spec, purpose="teaching")

    def _other_seeds(self, setting: str, seed: int, row: Row) -> list[int]:
        """The seeds of a row's further teachers: those that follow in the setting's list, in a ring, then new ones."""
        seeds = self.setting(setting).seeds
        at = seeds.index(seed)
        ring = [*seeds[at + 1 :], *seeds[:at], *range(max(seeds) + 1, max(seeds) + row.teachers)]
        return ring[: row.teachers - 1]

    def _spec(self, name, stage, purpose, title, row, seed, *, teacher=None, co_teachers=(), recipe=None) -> RunSpec:
        setting = self.setting(name)
        recipe = self.params.recipes[recipe or setting.recipe].lasting(row.length)
        return RunSpec(
            profile=setting.profile,
            setting=name,
            stage=stage,
            purpose=purpose,
            row=title,
            dataset=setting.dataset,
            data_checksum=self.checksums[setting.dataset],
            held_out=self._held_out(setting, recipe, purpose, row),
            network=setting.network(row.network),
            method=row.method,
            hyperparameters=tuple(sorted(row.hyperparameters.items())),
            recipe=recipe,
            seed=seed,
            teacher=teacher,
            co_teachers=co_teachers,
            images=row.images,
            scheme=row.scheme,
            scheme_options=tuple(sorted(row.scheme_options.items())),
            partners=tuple(setting.network(partner) for partner in row.partners),
        )

    def _held_out(self, setting: Setting, recipe: Recipe, purpose: str, row: Row) -> int:
        # a plateau is found on held-out images, never on the test set, so those runs do without them to the end
        needed = purpose == "tuning" or recipe.schedule == "plateau"
        needed = needed or build_method(row.method, **row.hyperparameters).needs_held_out()
        return self.params.datasets[setting.dataset].validation if needed else 0

    def setting(self, name: str) -> Setting:
        """The setting of this name. Raises ValueError if it is unknown."""
        return look_up("setting", name, self.params.settings)

    def _grid(self, setting: str) -> Grid:
        name = self.setting(setting).grid
        return self.params.grids[name] if name else Grid()


def check_methods(params: Params) -> None:
    """Build every row of every stage once, alone and with every setting's overrides and every cell of every grid.

    Raises ValueError naming the row.
    """
    for stage, rows in params.methods.items():
        for name, row in rows.items():
            cells = [cell for grid in params.grids.values() for cell in grid.cells(name)]
            own = [setting.overrides[name] for setting in params.settings.values() if name in setting.overrides]
            try:
                for each in [row, *(row.overridden(values) for values in [*own, *cells])]:
                    _check_row(params, name, each)
            except ValueError as error:
                raise ValueError(f"methods.{stage}.{name}: {error}") from error


def _check_row(params: Params, name: str, row: Row) -> None:
    """Raise ValueError unless method, scheme and whoever teaches can be had."""
    build_method(row.method, **row.hyperparameters)
    build_options(row.method, row.scheme or scheme_of(METHODS[row.method]), row.scheme_options)
    for teacher in row.taught_by:
        _check_teacher(params, name, teacher)


def _check_teacher(params: Params, name: str, teacher: TaughtBy) -> None:
    """Raise ValueError for a method or row that cannot teach the row of this name."""
    if teacher.method:
        build_method(teacher.method, **teacher.hyperparameters)
        return
    rows = {row: values for stage in params.methods.values() for row, values in stage.items()}
    grids = [grid for grid, values in params.grids.items() if teacher.row in values.rows]
    if look_up("row", teacher.row, rows) and grids:
        raise ValueError(f"row {teacher.row} cannot teach: which of its runs is meant depends on grid {grids[0]}")
    above, known = [teacher.row], set()
    while above:
        found = above.pop()
        if found == name:
            raise ValueError(f"row {name} teaches itself, by way of {teacher.row}")
        if found not in known:
            known.add(found)
            above += [other.row for other in look_up("row", found, rows).taught_by if other.row]
