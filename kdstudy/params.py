"""params.yaml into frozen dataclasses; whatever is misspelt, missing or of the wrong type is refused by name."""

import itertools
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from kdstudy.core import require_choice, require_whole
from kdstudy.files import unknown_name
from kdstudy.image_set import require_file_name
from kdstudy.recipe import Recipe

PARAMS_FILE = Path("params.yaml")
WAYS = ("in_turn", "fused", "streams")  # in which runs that share batches take their steps (`ways`)
MEASURED = "measured"  # stands for the fastest of them
# far above what any study asks for, and below what a slip of the keyboard would have a machine choke on
MOST_AT_ONCE = 1024  # threads, workers, runs of a cohort
MOST_TEACHERS = 100
MOST_CELLS = 10_000
LONGEST = 1000.0  # `length`
DEEPEST = 20  # levels of params.yaml, of which it has 7
MOST_VALUES = 200_000  # in all of it, with those that aliases repeat


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
    checkpoint_seconds: float = 60.0  # how often runs write checkpoints: what a kill costs at most

    def __post_init__(self) -> None:
        """Refuse numbers out of range, and a way that is none."""
        for name, least in (("threads", 0), ("workers", 0), ("cohort", 1)):
            require_whole(name, getattr(self, name), least=least)
            if getattr(self, name) > MOST_AT_ONCE:
                raise ValueError(f"{name} must be at most {MOST_AT_ONCE}, not {getattr(self, name)}")
        require_choice("way", self.way, (*WAYS, MEASURED))
        if not 0 <= self.checkpoint_seconds < float("inf"):
            raise ValueError(f"checkpoint_seconds must be a number of at least 0, not {self.checkpoint_seconds!r}")


@dataclass(frozen=True)
class Dataset:
    """Where images come from (`sources.load_source`) and how many training images are held out to choose on.

    A relative `location` is a place in the current folder, the project's; one outside is named absolutely (or by `~`).
    """

    source: str
    validation: int
    location: str | None = None  # a folder in torchvision's layout, or an .npz

    def __post_init__(self) -> None:
        """Refuse a number out of range, and a location that leaves the project unsaid."""
        require_whole("validation", self.validation, least=0)
        if self.location is not None:
            _require_inside(self.location)


def _require_inside(location: str) -> None:
    try:
        named = Path(location).expanduser()
        inside = named.is_absolute() or named.resolve().is_relative_to(Path.cwd().resolve())
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, no such user, a null character
        raise ValueError(f"location {location!r} is no place: {error}") from error
    if not inside:
        raise ValueError(f"location {location!r} leaves the project's folder; name an absolute path if you mean it")


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
        _require_pattern(pattern)
        try:
            return pattern.format_map({"teacher": self.teacher, "student": self.student} | dict(self.networks))
        except KeyError:
            return None


def _require_pattern(pattern: str) -> None:
    # more of str.format, such as {teacher:>9999999999}, is not let in
    if not re.fullmatch(r"(?:[^{}]|\{[A-Za-z_]\w*\})*", pattern):
        raise ValueError(f"network {_brief(pattern)} must read like '{{student}}' or '{{teacher}}+heads'")


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
        _require_pattern(self.network)


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
        if not 1 <= self.teachers <= MOST_TEACHERS:
            raise ValueError(f"teachers must be at least 1 and at most {MOST_TEACHERS}, not {self.teachers!r}")
        if self.teachers > 1 and self.taught_by:
            raise ValueError("teachers above 1 and taught_by exclude each other")
        _require_length(self.length)
        for pattern in self.networks:
            _require_pattern(pattern)

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
    if length > LONGEST:
        raise ValueError(f"length must be at most {LONGEST:g} times the recipe's epochs, not {length!r}")


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
        raise ValueError(f"{where} must be a mapping with a row or a method, not {_brief(values)}")
    own = {key: values[key] for key in values if key in ("row", "method", "network", "length")}
    rest = {key: value for key, value in values.items() if key not in own}
    return build(TaughtBy, own | {"hyperparameters": rest}, where)


def _scheme(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a mapping of its name and options, not {_brief(values)}")
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
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error
    tree = _read_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold a mapping")
    for override in overrides:
        _override(tree, override)
    return parse_params(tree)


class _Loader(yaml.SafeLoader):
    """YAML without what could surprise: a key twice, keys that are no text, tags, endless depth, numbers or aliases."""

    depth = 0

    def __init__(self, stream: str):
        super().__init__(stream)
        self._sizes: dict[int, tuple[int, int]] = {}  # of nodes by address: values and levels, with all that is inside

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """The next node; every node passes here, also those inside it."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) and id(self.anchors.get(event.anchor)) not in self._sizes:
            raise _refusal(f"*{event.anchor} stands for nothing that is complete before it", event)
        if getattr(event, "tag", None):
            raise _refusal(f"{event.tag} is a tag, which is not read here; leave it out", event)
        if self.depth == DEEPEST:
            raise _refusal(f"values lie more than {DEEPEST} levels deep", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if id(node) not in self._sizes:
            self._sizes[id(node)] = self._size(node)
        values, levels = self._sizes[id(node)]
        if values > MOST_VALUES or levels > DEEPEST:  # a few lines of aliases can stand for more than any memory holds
            raise _refusal(f"this stands for more than {MOST_VALUES:,} values or {DEEPEST} levels", event)
        return node

    def _size(self, node: yaml.Node) -> tuple[int, int]:
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [each for part in parts for each in (part if isinstance(part, tuple) else (part,))]
        sizes = [self._sizes[id(part)] for part in parts]
        return 1 + sum(values for values, _ in sizes), 1 + max((levels for _, levels in sizes), default=0)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        """The mapping, unless a key occurs twice, of which YAML would take the last, or is no text."""
        keys = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str" or not isinstance(key, yaml.ScalarNode):
                raise _refusal("this key is no text to YAML; put it into quotes", key)
            if key.value in keys:
                raise _refusal(f"the key {_brief(key.value)} is given twice", key)
            keys.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """The number, unless it is infinite, none, or larger than any machine counts."""
        whole = node.tag.endswith("int")
        try:
            value = self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)
        except (ValueError, OverflowError) as error:
            raise _refusal(f"{_brief(node.value)} is no number that can be read", node) from error
        if abs(value) >= 2**63 if whole else not math.isfinite(value):
            raise _refusal(f"{_brief(node.value)} is no number of a usable size", node)
        return value


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)  # a date is text here


def _refusal(problem: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def _read_yaml(text: str, where: str) -> Any:
    """What a YAML text says. Raises ValueError naming the place of what cannot be read, or is refused by `_Loader`."""
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where} is not valid YAML: {place}{error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # a character that is none, raw or by its number
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def parse_params(tree: dict[str, Any]) -> Params:
    """Build `Params` from the parsed YAML and check that every name it uses exists. Raises ValueError."""
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
            cells = math.prod(len(grid.axes[axis]) for axis in axes)
            if cells > MOST_CELLS:
                raise ValueError(f"grids.{name}.rows.{row} has {cells:,} cells; at most {MOST_CELLS:,} can be compared")


def build(cls: type, values: Any, where: str) -> Any:
    """An instance of a dataclass from a mapping. Raises ValueError naming the place, unknown keys and wrong types."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a mapping, not {_brief(values)}")
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
    if not isinstance(tree, dict):
        raise ValueError(f"{where} must map names to mappings, not be {_brief(tree)}")
    for name, value in tree.items():
        require_file_name(f"a name in {where}", name)
        if not isinstance(value, dict):
            raise ValueError(f"{where} must map names to mappings, but {name} is {_brief(value)}")
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
    if hint is Any or isinstance(value, TaughtBy):  # that one is built and checked already
        return value
    if value is None and type(None) in options:
        return None
    hint = next(option for option in options if option is not type(None))
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_typed(item, inner[0], f"{where}[{i}]") for i, item in enumerate(value))
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = dict if origin is Mapping else origin
    if not isinstance(value, expected) or (isinstance(value, bool) and origin is not bool):
        raise ValueError(f"{where} must be {_article(origin)}, not {_brief(value)}{_number_hint(value, origin)}")
    if expected is list:
        return [_typed(item, inner[0], f"{where}[{i}]") for i, item in enumerate(value)]
    if expected is dict:
        return {key: _typed(item, inner[1], f"{where}.{key}") for key, item in value.items()}
    return value


def _brief(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:97]}..."


def _article(kind: type) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", tuple: "a list"}
    return (names | {list: "a list", dict: "a mapping", Mapping: "a mapping"}).get(kind, f"a {kind.__name__}")


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
    tree[last] = _read_yaml(text, f"the value of {place}")
