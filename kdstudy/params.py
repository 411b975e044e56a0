"""params.yaml into frozen dataclasses; whatever is misspelt, missing or of the wrong type is refused by name."""

import itertools
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from kdstudy.core import require_choice, require_whole
from kdstudy.files import unknown_name
from kdstudy.recipe import Recipe

PARAMS_FILE = Path("params.yaml")
WAYS = ("in_turn", "fused", "streams")  # in which runs that share batches take their steps (`ways`)
MEASURED = "measured"  # stands for the fastest of them


@dataclass(frozen=True)
class Profile:
    """Where and how the runs of a profile are made. No field changes what a run is, but for rounding.

    On a CPU runs that are trained in turn are exact: the same to the bit however many are trained together.
    """

    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    threads: int = 0  # CPU threads of a run; 0 leaves the choice to torch
    workers: int = 1  # processes side by side on a CPU; 0 is one for each processor
    cohort: int = 1  # how many runs that share batches and teacher are trained together, at most
    way: str = "in_turn"  # how they take their steps: one of `WAYS`, or "measured" for the fastest
    graphs: bool = False  # whether steps are captured into CUDA graphs
    compiles: bool = False  # whether compiled students are among the ways that are measured
    deterministic: bool = False  # whether a GPU's results must repeat to the bit, at the price of speed
    logit_table: bool = False  # whether a teacher's logits on all crops are tabled, where they are all that is read

    def __post_init__(self) -> None:
        """Refuse numbers out of range, and a way that is none."""
        require_whole("threads", self.threads, least=0)
        require_whole("workers", self.workers, least=0)
        require_whole("cohort", self.cohort)
        require_choice("way", self.way, (*WAYS, MEASURED))


@dataclass(frozen=True)
class Dataset:
    """Where images come from (`sources.load_source`) and how many training images are held out to choose on."""

    source: str
    validation: int
    location: str | None = None  # a folder in torchvision's layout, or an .npz


@dataclass(frozen=True)
class Setting:
    """A data set with a teacher and a student.

    `methods` limits the rows, None means all of a stage; `without` names rows that are not defined for these networks.
    `networks` names further networks that rows ask for; rows that ask for one which is not named are left out.
    `teacher_recipe` is the teacher's, where it is not the students'. `ensembles` asks for the accuracy of the networks
    of all seeds together. `overrides` are fields and hyperparameters of rows that suit this setting better, before any
    grid.
    """

    profile: str
    dataset: str
    teacher: str
    student: str
    recipe: str
    seeds: tuple[int, ...]
    grid: str | None = None
    methods: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()
    networks: Mapping[str, str] = field(default_factory=dict)
    teacher_recipe: str | None = None
    ensembles: bool = False
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def network(self, pattern: str) -> str | None:
        """The network that a row means by "{teacher}" or "{plain}+heads"; None where the setting has none of the name.

        Raises ValueError for a pattern that cannot be read.
        """
        try:
            return pattern.format_map({"teacher": self.teacher, "student": self.student} | dict(self.networks))
        except KeyError:
            return None
        except (ValueError, IndexError, AttributeError, TypeError) as error:
            raise ValueError(f"network {pattern!r} must read like '{{student}}' or '{{teacher}}+heads'") from error


@dataclass(frozen=True)
class TaughtBy:
    """A run that teaches a row's students in the place of the setting's teacher.

    Either a `row`: its run of the same seed, with the hyperparameters of params.yaml. Or a run in between: a `method`
    with its `hyperparameters` and a `network`, trained for `length` times the recipe's epochs; the teacher teaches it,
    unless its method needs none.
    """

    row: str | None = None
    method: str | None = None
    network: str = "{teacher}"
    length: float = 1.0
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse neither or both, and a length that is none."""
        if (self.row is None) == (self.method is None):
            raise ValueError("a run that teaches is said by a row or by a method, by one of them")
        if self.row is not None and (self.network != "{teacher}" or self.length != 1 or self.hyperparameters):
            raise ValueError("a row that teaches is taken as it is: nothing else can be said of it")
        _require_length(self.length)


@dataclass(frozen=True)
class Row:
    """What is trained under one name. All but these fields are `hyperparameters` of the method.

    `method` is by default the row's own name; `teachers` of the setting, of different seeds, teach together; `images`
    is the share of the training images that is used, a fixed stratified subset; `length` multiplies the recipe's
    epochs. `scheme` says who teaches whom, by default what the method says, with `scheme_options`, and `partners` are
    networks that are trained beside the student.
    """

    method: str
    network: str = "{student}"
    taught_by: tuple[TaughtBy, ...] = ()
    teachers: int = 1
    images: float = 1.0
    length: float = 1.0
    scheme: str | None = None
    scheme_options: Mapping[str, Any] = field(default_factory=dict)
    partners: tuple[str, ...] = ()
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        if not 0 < self.images <= 1:
            raise ValueError(f"images must be above 0 and at most 1, not {self.images!r}")
        if self.teachers < 1:
            raise ValueError(f"teachers must be at least 1, not {self.teachers!r}")
        if self.teachers > 1 and self.taught_by:
            raise ValueError("teachers above 1 and taught_by exclude each other")
        _require_length(self.length)

    def overridden(self, values: Mapping[str, Any]) -> "Row":
        """This row with other values of some of its fields or hyperparameters. Raises ValueError for a wrong one."""
        if not values:
            return self
        own, rest = _split(values, "overrides")
        now = {f.name: getattr(self, f.name) for f in fields(self)}
        return build(Row, now | own | {"hyperparameters": {**self.hyperparameters, **rest}}, "overrides")

    @property
    def networks(self) -> tuple[str, ...]:
        """The patterns of all networks that the row asks for."""
        return (self.network, *self.partners, *(teacher.network for teacher in self.taught_by))


def _require_length(length: float) -> None:
    if not 0 < length < float("inf"):
        raise ValueError(f"length must be a finite number above 0, not {length!r}")


def parse_row(name: str, values: Mapping[str, Any], where: str) -> Row:
    """The row of this name from its mapping in params.yaml. Raises ValueError naming the place of what is wrong."""
    own, rest = _split(values, where)
    return build(Row, {"method": name} | own | {"hyperparameters": rest}, where)


def _split(values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row's own fields, and its hyperparameters."""
    own = {key: values[key] for key in values if key in _ROW_KEYS}
    if "taught_by" in own:
        entries = own["taught_by"] if isinstance(own["taught_by"], list) else [own["taught_by"]]
        own["taught_by"] = [_taught_by(entry, f"{where}.taught_by") for entry in entries]
    if "scheme" in own:
        own |= _scheme(own["scheme"], f"{where}.scheme")
    return own, {key: value for key, value in values.items() if key not in _ROW_KEYS}


def _taught_by(values: Any, where: str) -> TaughtBy:
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a mapping with a row or a method, not {values!r}")
    own = {key: values[key] for key in values if key in ("row", "method", "network", "length")}
    rest = {key: value for key, value in values.items() if key not in own}
    return build(TaughtBy, own | {"hyperparameters": rest}, where)


def _scheme(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a mapping of its name and options, not {values!r}")
    options = {key: value for key, value in values.items() if key != "name"}
    return {"scheme": values.get("name"), "scheme_options": options}


_ROW_KEYS = ("method", "network", "taught_by", "teachers", "images", "length", "scheme", "partners")


@dataclass(frozen=True)
class Grid:
    """Cells per row: the product of the row's axes, each a list of hyperparameters to override."""

    axes: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    rows: Mapping[str, list[str]] = field(default_factory=dict)

    def cells(self, row: str) -> list[dict[str, Any]]:
        """The overrides of every cell of a row, in a fixed order; empty if the row has no grid."""
        if row not in self.rows:
            return []
        product = itertools.product(*(self.axes[axis] for axis in self.rows[row]))
        return [{name: value for part in cell for name, value in part.items()} for cell in product]


@dataclass(frozen=True)
class Params:
    """The whole file. `methods` maps stage to row."""

    profiles: Mapping[str, Profile]
    datasets: Mapping[str, Dataset]
    recipes: Mapping[str, Recipe]
    settings: Mapping[str, Setting]
    methods: Mapping[str, Mapping[str, Row]]
    grids: Mapping[str, Grid]

    def settings_of(self, profile: str) -> dict[str, Setting]:
        """The settings of a profile. Raises ValueError for an unknown profile."""
        look_up("profile", profile, self.profiles)
        return {name: setting for name, setting in self.settings.items() if setting.profile == profile}


def look_up(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    """`known[name]`, or a ValueError with the nearest known name."""
    if name not in known:
        raise unknown_name(kind, name, known)
    return known[name]


def load_params(path: Path = PARAMS_FILE, overrides: Sequence[str] = ()) -> Params:
    """Read and check params.yaml. `overrides` are "recipes.step.epochs=5": an existing place and a YAML value.

    Raises FileNotFoundError if there is no file, ValueError naming the place of whatever is wrong in it.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold a mapping")
    for override in overrides:
        _override(tree, override)
    return parse_params(tree)


def parse_params(tree: dict[str, Any]) -> Params:
    """Build `Params` from the parsed YAML and check that every name it uses exists. Raises ValueError."""
    tree = {key: value for key, value in tree.items() if key != "profile"}
    _check_keys("params.yaml", tree, {f.name: f for f in fields(Params)})
    params = Params(
        profiles=_build_all(Profile, tree["profiles"], "profiles"),
        datasets=_build_all(Dataset, tree["datasets"], "datasets"),
        recipes=_build_all(Recipe, tree["recipes"], "recipes"),
        settings=_build_all(Setting, tree["settings"], "settings"),
        methods={
            stage: {
                row: parse_row(row, values, f"methods.{stage}.{row}")
                for row, values in _mapping_of_mappings(rows, f"methods.{stage}").items()
            }
            for stage, rows in _mapping_of_mappings(tree["methods"], "methods").items()
        },
        grids=_build_all(Grid, tree["grids"], "grids"),
    )
    _check_names(params)
    return params


def _check_names(params: Params) -> None:
    rows = {row for stage in params.methods.values() for row in stage}
    for name, setting in params.settings.items():
        look_up(f"profile of setting {name}:", setting.profile, params.profiles)
        look_up(f"dataset of setting {name}:", setting.dataset, params.datasets)
        look_up(f"recipe of setting {name}:", setting.recipe, params.recipes)
        if setting.grid is not None:
            look_up(f"grid of setting {name}:", setting.grid, params.grids)
        if setting.teacher_recipe is not None:
            look_up(f"teacher_recipe of setting {name}:", setting.teacher_recipe, params.recipes)
        for row in (*(setting.methods or ()), *setting.without, *setting.overrides):
            look_up(f"method of setting {name}:", row, dict.fromkeys(rows))
        if not setting.seeds or len(set(setting.seeds)) != len(setting.seeds) or min(setting.seeds) < 0:
            raise ValueError(f"settings.{name}.seeds must be distinct numbers of at least 0, not {list(setting.seeds)}")
    for name, grid in params.grids.items():
        for row, axes in grid.rows.items():
            look_up(f"row of grid {name}:", row, dict.fromkeys(rows))
            for axis in axes:
                look_up(f"axis of grid {name}:", axis, grid.axes)


def build(cls: type, values: Any, where: str) -> Any:
    """An instance of a dataclass from a mapping. Raises ValueError naming the place, unknown keys and wrong types."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a mapping, not {values!r}")
    known = {f.name: f for f in fields(cls)}
    _check_keys(where, values, known)
    hints = typing.get_type_hints(cls)
    checked = {name: _typed(value, hints[name], f"{where}.{name}") for name, value in values.items()}
    try:
        return cls(**checked)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _build_all(cls: type, tree: Any, where: str) -> dict[str, Any]:
    return {name: build(cls, values, f"{where}.{name}") for name, values in _mapping_of_mappings(tree, where).items()}


def _mapping_of_mappings(tree: Any, where: str) -> dict[str, dict]:
    if not isinstance(tree, dict) or not all(isinstance(value, dict) for value in tree.values()):
        raise ValueError(f"{where} must map names to mappings")
    return tree


def _check_keys(where: str, values: dict, known: dict[str, Any]) -> None:
    for key in values:
        if key not in known:
            raise unknown_name(f"key in {where}:", key, known)
    required = [name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")


def _typed(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotated type; lists become tuples and whole numbers floats, nothing else is converted."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    if isinstance(value, TaughtBy):
        return value  # built and checked already
    hint = next(option for option in options if option is not type(None))
    origin = typing.get_origin(hint) or hint
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_typed(item, typing.get_args(hint)[0], f"{where}[{i}]") for i, item in enumerate(value))
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = dict if origin is Mapping else origin
    if not isinstance(value, expected) or (isinstance(value, bool) and origin is not bool):
        raise ValueError(f"{where} must be {_article(origin)}, not {value!r}{_number_hint(value, origin)}")
    return value


def _article(kind: type) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", tuple: "a list"}
    return names.get(kind, f"a {kind.__name__}")


def _number_hint(value: Any, kind: type) -> str:
    if kind is float and isinstance(value, str) and "e" in value.lower():
        return " (YAML reads 1e-1 as text; write 1.0e-1)"
    return ""


def _override(tree: dict[str, Any], override: str) -> None:
    place, separator, text = override.partition("=")
    if not separator:
        raise ValueError(f"an override must read PLACE=VALUE, such as recipes.step.epochs=5, not {override!r}")
    *path, last = place.split(".")
    for key in path:
        tree = look_up(f"place {place!r} in params.yaml:", key, tree)
        if not isinstance(tree, dict):
            raise ValueError(f"{place!r} is no place in params.yaml: {key!r} holds a value")
    tree[last] = yaml.safe_load(text)
