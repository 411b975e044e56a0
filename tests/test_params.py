"""params.yaml is read whole or refused by name."""

import copy
import itertools
from pathlib import Path

import pytest
import yaml

from kdstudy.params import Row, TaughtBy, load_params, parse_params, parse_row
from kdstudy.study import check_methods

ROOT = Path(__file__).parent.parent
TREE = yaml.safe_load((ROOT / "params.yaml").read_text())


def changed(place: str, value: object) -> dict:
    tree = copy.deepcopy(TREE)
    node = tree
    *path, last = place.split("/")
    for key in path:
        node = node[key]
    node[last] = value
    return tree


def test_the_committed_file_is_sound():
    params = load_params(ROOT / "params.yaml")
    check_methods(params)
    assert set(params.settings_of("quick")) == {"digits", "digits_equal"}
    assert len(params.settings_of("thesis")) == 7 + 9 + 1 + 1  # thesis, survey, A Gift from KD, online


def test_the_thesis_recipe_is_the_thesis_recipe():
    recipe = load_params(ROOT / "params.yaml").recipes["step"]
    assert (recipe.epochs, recipe.batch, recipe.milestones, recipe.factor) == (200, 128, (60, 120, 160), 0.2)
    assert (recipe.learning_rate, recipe.momentum, recipe.weight_decay) == (0.1, 0.9, 5e-4)


@pytest.mark.parametrize(
    ("row", "count"), [("kd", 9), ("relative_v3", 9), ("earth_mover", 9), ("two_temperature", 18), ("ce", 0)]
)
def test_the_thesis_grid_has_its_cells(row, count):
    cells = load_params(ROOT / "params.yaml").grids["thesis"].cells(row)
    assert len(cells) == count
    assert len({tuple(sorted(cell.items())) for cell in cells}) == count
    assert all(abs(cell["ce_weight"] + cell["kd_weight"] - 1) < 1e-12 for cell in cells)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("recipes/quick/epoch", 3, r"unknown key in recipes.quick: 'epoch'; did you mean 'epochs'"),
        ("recipes/quick/epochs", 0, r"recipes.quick: epochs must be a finite number above 0, not 0"),
        ("recipes/quick/epochs", 2.5, r"recipes.quick.epochs must be a whole number, not 2.5"),
        (
            "recipes/quick/learning_rate",
            "1e-1",
            r"must be a number, not '1e-1' \(YAML reads 1e-1 as text; write 1.0e-1",
        ),
        ("recipes/quick/momentum", True, r"recipes.quick.momentum must be a number, not True"),
        ("recipes/quick/flip", 1, r"recipes.quick.flip must be true or false, not 1"),
        ("recipes/quick/milestones", [24, 15], r"milestones must rise"),
        ("recipes/quick/precision", "fp8", r"precision must be one of bf16, fp32, fp64, not 'fp8'"),
        ("recipes/quick", 3, r"recipes must map names to mappings"),
        ("settings/digits/profile", "quik", r"unknown profile of setting digits: 'quik'; did you mean 'quick'"),
        ("settings/digits/dataset", "digit", r"did you mean 'digits'"),
        ("settings/digits/recipe", "stepp", r"did you mean 'step'"),
        ("settings/digits/grid", "quik", r"did you mean 'quick'"),
        ("settings/digits/seeds", [], r"settings.digits.seeds must be distinct numbers"),
        ("settings/digits/seeds", [1, 1], r"settings.digits.seeds must be distinct numbers"),
        ("settings/digits/seeds", "0", r"settings.digits.seeds must be a list"),
        ("settings/digits/methods", ["kdd"], r"did you mean 'kd'"),
        ("settings/digits", {"profile": "quick"}, r"settings.digits lacks dataset, teacher, student, recipe, seeds"),
        ("grids/quick/rows/kdd", ["temperature"], r"unknown row of grid quick: 'kdd'"),
        ("grids/quick/rows/kd", ["temprature"], r"did you mean 'temperature'"),
        ("recipe", {}, r"unknown key in params.yaml: 'recipe'; did you mean 'recipes'"),
        ("settings", [], r"settings must map names to mappings, not be \[\]"),
        ("grids", None, r"grids must map names to mappings, not be None"),
        ("profiles/quick", "fast", r"profiles must map names to mappings, but quick is 'fast'"),
        ("methods/response", ["kd"], r"methods must map names to mappings, but response is \['kd'\]"),
        ("methods/response/kd", None, r"methods.response must map names to mappings, but kd is None"),
        ("profiles/quick/threads", 10**6, r"profiles.quick: threads must be at most 1024, not 1000000"),
        ("profiles/quick/workers", 1025, r"workers must be at most 1024"),
        ("profiles/quick/cohort", 2**31, r"cohort must be at most 1024"),
        ("profiles/quick/graphs", "yes", r"profiles.quick.graphs must be true or false, not 'yes'"),
        ("datasets/digits/validation", -1, r"datasets.digits: validation must be a whole number of at least 0, not -1"),
        ("datasets/digits/validation", True, r"datasets.digits.validation must be a whole number, not True"),
        ("datasets/digits/location", 3, r"datasets.digits.location must be text, not 3"),
        ("settings/digits/networks", ["plain"], r"settings.digits.networks must be a mapping, not \['plain'\]"),
        ("settings/digits/networks", {"plain": 8}, r"settings.digits.networks.plain must be text, not 8"),
        ("settings/digits/networks", {"plain": None}, r"settings.digits.networks.plain must be text, not None"),
        ("settings/digits/overrides", {"kd": 3}, r"settings.digits.overrides.kd must be a mapping, not 3"),
        ("settings/digits/overrides", ["kd"], r"settings.digits.overrides must be a mapping"),
        ("settings/digits/without", None, r"settings.digits.without must be a list, not None"),
        ("settings/digits/seeds", [0, -1], r"settings.digits.seeds must be distinct numbers of at least 0"),
        ("settings/digits/seeds", [0, 1.0], r"settings.digits.seeds\[1\] must be a whole number, not 1.0"),
        ("grids/quick/axes", ["temperature"], r"grids.quick.axes must be a mapping, not \['temperature'\]"),
        ("grids/quick/axes/temperature", {"temperature": 2.0}, r"axes.temperature must be a list, not \{'temp"),
        ("grids/quick/axes/temperature", [2.0], r"grids.quick.axes.temperature\[0\] must be a mapping, not 2.0"),
        ("grids/quick/rows", ["kd"], r"grids.quick.rows must be a mapping"),
        ("grids/quick/rows/kd", "temperature", r"grids.quick.rows.kd must be a list, not 'temperature'"),
        ("grids/quick/rows/kd", [3], r"grids.quick.rows.kd\[0\] must be text, not 3"),
        ("grids/quick/rows/kd", ["temperature"] * 14, r"grids.quick.rows.kd has 16,384 cells; at most 10,000"),
        ("methods/response/kd/teachers", 101, r"methods.response.kd: teachers must be .* at most 100, not 101"),
        ("methods/response/kd/length", 1e308, r"methods.response.kd: length must be at most 1000 times the recipe's"),
        ("methods/response/kd/network", "{teacher.__class__}", r"network '{teacher.__class__}' must read like"),
        ("methods/response/kd/network", "{teacher:>9999999999}", r"methods.response.kd: network .* must read like"),
        ("methods/response/kd/network", "{teacher", r"must read like '{student}' or '{teacher}\+heads'"),
        ("methods/response/kd/partners", ["{student!r}"], r"network '{student!r}' must read like"),
        ("methods/response/kd/taught_by", {"method": "ce", "network": "{0}"}, r"taught_by: network '\{0\}' must read"),
        ("settings/digits/teacher", list(range(1000)), r"must be text, not \[0, 1, .*\.\.\.$"),
    ],
)
def test_a_mistake_is_refused_by_name(place, value, message):
    with pytest.raises(ValueError, match=message):
        parse_params(changed(place, value))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (
            "methods/response/kd/temperature",
            0.0,
            r"methods.response.kd: kd: temperature must be a finite number above 0",
        ),
        ("methods/response/kd/temprature", 2.0, r"unknown key in kd: 'temprature'; did you mean 'temperature'"),
        ("methods/response/kd/ce_weight", -0.1, r"ce_weight must be a finite number of at least 0"),
        ("methods/response/earth_moverr", {}, r"unknown method 'earth_moverr'; did you mean 'earth_mover'"),
        ("grids/thesis/axes/wrong", [{"temperature_wrong": -1.0}], r"methods.response.two_temperature: .*above 0"),
    ],
)
def test_a_mistake_in_a_method_is_refused_by_name(place, value, message):
    with pytest.raises(ValueError, match=message):
        check_methods(parse_params(changed(place, value)))


SAFE = ["a", "A", "7", "wrn_16_0.25", "a-b", "a..b", "x" * 100]
UNSAFE = [
    "",
    ".",
    "..",
    ".a",
    "-a",
    "_a",
    "a/b",
    "a\\b",
    "a b",
    "a\n",
    "a;b",
    "$(a)",
    "`a`",
    "a'b",
    'a"b',
    "a&b",
    "a|b",
]
UNSAFE += ["é", "a\0", "~", "a:b", "{a}", "${item}", "x" * 101, 3, None, True, ("a",)]


def with_name(place: str, name: object) -> dict:
    """The tree with another entry of this name, a copy of the first."""
    tree = copy.deepcopy(TREE)
    node = tree[place] if place in tree else tree["methods"][place.removeprefix("methods.")]
    node[name] = copy.deepcopy(next(iter(node.values())))
    return tree


@pytest.mark.parametrize(
    "place", ["profiles", "datasets", "recipes", "settings", "methods", "methods.response", "grids"]
)
@pytest.mark.parametrize("name", UNSAFE, ids=repr)
def test_a_name_that_would_mean_more_in_a_path_or_a_command_is_refused(place, name):
    with pytest.raises(ValueError, match=rf"^a name in {place} becomes a file name: letters, digits"):
        parse_params(with_name(place, name))


@pytest.mark.parametrize("place", ["profiles", "datasets", "recipes", "settings", "grids"])
@pytest.mark.parametrize("name", SAFE)
def test_other_names_are_taken(place, name):
    assert name in getattr(parse_params(with_name(place, name)), place)


# locations


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project's folder as the current one, with a link that leads out of it and one that does not."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    (folder / "out").symlink_to(tmp_path)
    (folder / "in").symlink_to(folder / "data")
    (folder / "round").symlink_to("round")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    return folder


@pytest.mark.parametrize(
    "location",
    ["data", "data/mine.npz", "./data/../mine.npz", "in/mine.npz", ".", "../project/data", "/", "/a/../b", "~/a"],
)
def test_a_location_inside_the_project_or_named_absolutely_is_taken(project, location):
    assert parse_params(changed("datasets/digits/location", location)).datasets["digits"].location == location


@pytest.mark.parametrize("location", ["..", "../mine.npz", "data/../../mine.npz", "out", "out/mine.npz", "../project2"])
def test_a_location_that_leaves_the_project_unsaid_is_refused(project, location):
    with pytest.raises(
        ValueError, match=r"^datasets.digits: location .* leaves .*; name an absolute path if you mean it"
    ):
        parse_params(changed("datasets/digits/location", location))


@pytest.mark.parametrize("location", ["round/mine.npz", "data/\0", "~nobody-of-this-name/mine.npz"])
def test_a_location_that_is_no_place_is_refused(project, location):
    with pytest.raises(ValueError, match=r"^datasets.digits: location .* is no place"):
        parse_params(changed("datasets/digits/location", location))


# the text


def read(tmp_path, content):
    path = tmp_path / "params.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_params(path)


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}]\n" for old, new in itertools.pairwise("abcdefghijklmnopqrstuvw")
)
MALFORMED = {
    "nothing": ("", r"params.yaml must hold a mapping"),
    "only a comment": ("# nothing\n", r"params.yaml must hold a mapping"),
    "laughs": (
        LAUGHS,
        r"not valid YAML: line 17, column 4: this stands for more than 200,000 values or 20 levels",
    ),
    "itself": ("a: &a\n  b: *a\n", r"line 2, column 6: \*a stands for nothing that is complete"),
    "a chain of laughs": (
        "a: &a [x]\n" + "".join(f"b{n}: &b{n} [*{f'b{n - 1}' if n else 'a'}]\n" for n in range(3000)),
        r"line 20, column 6: this stands for more than 200,000 values or 20 levels",
    ),
    "merged": (
        "a: &a {b: 1}\nc: {<<: *a}\n",
        r"line 2, column 5: this key is no text",
    ),
    "depth": ("a: " + "[" * 5000 + "]" * 5000, r"line 1, column 23: values lie more than 20 levels deep"),
    "depth of mappings": (
        "".join(" " * i + "a:\n" for i in range(2000)),
        r"line 20, column 20: .* more than 20 levels",
    ),
    "a key twice": ("recipes: {}\ngrids: {}\nrecipes: {}\n", r"line 3, column 1: the key 'recipes' is given twice"),
    "a key twice, inside": ("a: {b: 1, 'b': 2}", r"line 1, column 11: the key 'b' is given twice"),
    "a number as a key": ("a: {7: 1}", r"line 1, column 5: this key is no text to YAML; put it into quotes"),
    "null as a key": ("a: {~: 1}", r"this key is no text"),
    "a truth as a key": ("a: {on: 1}", r"this key is no text"),
    "a list as a key": ("a:\n  ? [b]\n  : c\n", r"line 2, column 5: this key is no text"),
    "a mapping as a key": ("a: {{b: c}: d}", r"this key is no text"),
    "NaN": ("a: .nan", r"line 1, column 4: '.nan' is no number of a usable size"),
    "infinity": ("a: [-.inf]", r"'-.inf' is no number of a usable size"),
    "beyond floats": ("a: 1.0e+999", r"'1.0e\+999' is no number of a usable size"),
    "beyond 64 bits": ("a: 9223372036854775808", r"is no number of a usable size"),
    "a thousand digits": ("a: -" + "9" * 1000, r"column 4: '-9+\.\.\. is no number of a usable size"),
    "ten thousand digits": ("a: " + "9" * 10_000, r"is no number that can be read"),
    "hexadecimal": ("a: 0x" + "f" * 10_000, r"is no number of a usable size"),
    "no digits": ("a: 0b_", r"'0b_' is no number that can be read"),
    "a tag": (
        "a: !!python/object/apply:os.mkdir [out]",
        r"line 1, column 4: .*os.mkdir is a tag, which is not read here",
    ),
    "a tag that needs a value": ("a: !!int ''", r"is a tag"),
    "a tag that knows two values": ("a: !!bool perhaps", r"is a tag"),
    "a merge as a value": ("a: <<", r"params.yaml is not valid YAML: line 1, column 4"),
    "a tab": ("a:\n\tb: 1\n", r"not valid YAML: line 2, column 1: found character '\\t'"),
    "two documents": ("a: 1\n---\nb: 2\n", r"not valid YAML: line 2, column 1: but found another document"),
    "a null character": ("a: b\0", r"params.yaml is not valid YAML: .*#x0000"),
    "no text": (b"a: \xff\xfe", r"params.yaml is not text in UTF-8: .* byte 0xff"),
    "another coding": ("a: é".encode("latin-1"), r"params.yaml is not text in UTF-8"),
    "no character": (r'a: "\UFFFFFFFF"', r"params.yaml is not valid YAML"),
    "half a mapping": ("a: {b: 1", r"params.yaml is not valid YAML: line 1"),
}


@pytest.mark.parametrize(("content", "message"), MALFORMED.values(), ids=MALFORMED)
def test_text_that_is_no_sound_yaml_is_refused_by_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, content)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "params.yaml"]


def test_dates_are_text_and_numbers_up_to_64_bits_are_numbers(tmp_path):
    text = (ROOT / "params.yaml").read_text()
    with pytest.raises(ValueError, match=r"settings.digits.student must be text, not 9223372036854775807"):
        read(tmp_path, text.replace("student: wrn_10_0.25", "student: 9223372036854775807"))
    params = read(tmp_path, text.replace("student: wrn_10_0.25", "student: 2026-13-45"))
    assert params.settings["digits"].student == "2026-13-45"


def test_overrides(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text())
    params = load_params(path, ["recipes.step.epochs=5", "recipes.step.milestones=[2, 3]", "settings.digits.seeds=[7]"])
    assert (params.recipes["step"].epochs, params.recipes["step"].milestones) == (5, (2, 3))
    assert params.settings["digits"].seeds == (7,)
    with pytest.raises(ValueError, match="did you mean 'recipes'"):
        load_params(path, ["recipe.step.epochs=5"])
    with pytest.raises(ValueError, match=r"unknown key in recipes\.step: 'epoch'"):
        load_params(path, ["recipes.step.epoch=5"])
    with pytest.raises(ValueError, match="PLACE=VALUE"):
        load_params(path, ["recipes.step.epochs"])
    with pytest.raises(ValueError, match="holds a value"):
        load_params(path, ["recipes.step.epochs.x=5"])
    with pytest.raises(ValueError, match="holds a value"):
        load_params(path, ["settings.digits.seeds.0=5"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("recipes.step.epochs=[", r"^the value of recipes.step.epochs is not valid YAML: line 1"),
        ("recipes.step.epochs={a: 1, a: 2}", r"the key 'a' is given twice"),
        ("recipes.step.epochs=.nan", r"^the value of recipes.step.epochs is not valid YAML: .*'.nan' is no number"),
        ("recipes.step.epochs=*a", r"\*a stands for nothing"),
        ("recipes.step.epochs=!!python/name:os.system", r"is a tag"),
        ("recipes.step.epochs=a: b: c", r"is not valid YAML"),
        ("recipes.step.epochs=", r"recipes.step.epochs must be a whole number, not None"),
        ("=5", r"unknown key in params.yaml: ''"),
        (".=5", r"unknown place '.' in params.yaml: ''"),
        ("recipes..epochs=5", r"unknown place 'recipes..epochs' in params.yaml: ''"),
        ("recipes=5", r"recipes must map names to mappings, not be 5"),
        ("recipes.a/b={epochs: 1, batch: 1, learning_rate: 1}", r"a name in recipes becomes a file name"),
        ("datasets.digits.location=../out", r"name an absolute path if you mean it"),
    ],
)
def test_an_override_that_cannot_be_is_refused_by_name(override, message):
    with pytest.raises(ValueError, match=message):
        load_params(ROOT / "params.yaml", [override])


def test_an_override_may_name_a_field_that_had_its_default():
    params = load_params(ROOT / "params.yaml", ["settings.digits.methods=[ce]"])
    assert params.settings["digits"].methods == ("ce",)


def test_a_file_that_is_no_yaml_or_no_mapping(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("a: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_params(path)
    path.write_text("- a")
    with pytest.raises(ValueError, match="must hold a mapping"):
        load_params(path)


def read_row(text: str) -> Row:
    return parse_row("own", yaml.safe_load(text), "methods.response.own")


def test_a_row_is_read_word_by_word():
    row = read_row(
        """
        method: mutual
        network: "{plain}"
        images: 0.5
        length: 2
        scheme: {name: peers, count: 3, alternate: true}
        partners: ["{teacher}", wrn_10_0.5]
        temperature: 3.0
        """
    )
    assert row == Row(
        "mutual",
        network="{plain}",
        images=0.5,
        length=2.0,
        scheme="peers",
        scheme_options={"count": 3, "alternate": True},
        partners=("{teacher}", "wrn_10_0.5"),
        hyperparameters={"temperature": 3.0},
    )
    assert isinstance(row.length, float)
    assert row.networks == ("{plain}", "{teacher}", "wrn_10_0.5")


def test_a_row_says_nothing_by_default():
    assert read_row("{}") == Row("own", network="{student}", length=1.0, scheme=None, scheme_options={}, partners=())
    assert read_row("{scheme: {count: 4}}") == Row("own", scheme_options={"count": 4})  # of the method's own scheme
    assert read_row("{scheme: {name: peers}}") == Row("own", scheme="peers")


def test_who_teaches_is_one_or_several_rows_or_methods():
    one = read_row("{method: kd, taught_by: {method: ce, network: wrn_10_0.5, length: 0.5, ce_weight: 2.0}}")
    between = TaughtBy(method="ce", network="wrn_10_0.5", length=0.5, hyperparameters={"ce_weight": 2.0})
    assert one == Row("kd", taught_by=(between,)) and one.networks == ("{student}", "wrn_10_0.5")
    several = read_row("{method: kd, taught_by: [{row: ce}, {method: kd, temperature: 3.0}]}")
    assert several.taught_by == (TaughtBy(row="ce"), TaughtBy(method="kd", hyperparameters={"temperature": 3.0}))
    assert several.networks == ("{student}", "{teacher}", "{teacher}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{taught_by: ce}", r"own.taught_by must be a mapping with a row or a method, not 'ce'"),
        ("{taught_by: [ce]}", r"own.taught_by must be a mapping with a row or a method, not 'ce'"),
        ("{taught_by: null}", r"own.taught_by must be a mapping with a row or a method, not None"),
        ("{taught_by: {}}", r"own.taught_by: a run that teaches is said by a row or by a method, by one of them"),
        ("{taught_by: {row: ce, method: kd}}", r"said by a row or by a method, by one of them"),
        ("{taught_by: {row: ce, temperature: 2.0}}", r"a row that teaches is taken as it is"),
        ("{taught_by: {row: ce, network: wrn_10_0.5}}", r"a row that teaches is taken as it is"),
        ("{taught_by: {row: ce, length: 0.5}}", r"a row that teaches is taken as it is"),
        ("{taught_by: {row: 3}}", r"own.taught_by.row must be text, not 3"),
        ("{taught_by: {method: ce, length: 0}}", r"own.taught_by: length must be a finite number above 0, not 0"),
        ("{taught_by: {method: ce, length: long}}", r"own.taught_by.length must be a number, not 'long'"),
        ("{taught_by: {method: ce}, teachers: 2}", r"teachers above 1 and taught_by exclude each other"),
        ("{length: 0}", r"response.own: length must be a finite number above 0, not 0.0"),
        ("{length: -1.0}", r"length must be a finite number above 0"),
        ("{length: .inf}", r"length must be a finite number above 0"),
        ("{length: .nan}", r"length must be a finite number above 0"),
        ("{length: true}", r"own.length must be a number, not True"),
        ("{scheme: peers}", r"own.scheme must be a mapping of its name and options, not 'peers'"),
        ("{scheme: [peers]}", r"own.scheme must be a mapping of its name and options"),
        ("{scheme: {name: 3}}", r"own.scheme must be text, not 3"),
        ("{partners: wrn_10_0.5}", r"own.partners must be a list, not 'wrn_10_0.5'"),
        ("{partners: [3]}", r"own.partners\[0\] must be text, not 3"),
        ("{network: 3}", r"own.network must be text, not 3"),
    ],
)
def test_a_row_that_cannot_be_read_is_refused_by_name(text, message):
    with pytest.raises(ValueError, match=message):
        read_row(text)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"own": "{method: mutual, scheme: {name: pears}}"}, "own: unknown scheme 'pears'; did you mean 'peers'"),
        ({"own": "{method: mutual, scheme: {cuont: 3}}"}, r"own: .*'cuont'; did you mean 'count'"),
        ({"own": "{method: mutual, scheme: {count: 1}}"}, "own: .*count must be a whole number of at least 2, not 1"),
        ({"own": "{method: mutual, scheme: {burn_in: often}}"}, "burn_in must be a number, not 'often'"),
        ({"own": "{method: kd, scheme: {count: 2}}"}, r"own: .*'count'"),  # an offline run has no options
        ({"own": "{method: kd, scheme: {name: peers, count: 2.0}}"}, "count must be a whole number"),
        ({"own": "{method: kd, taught_by: {row: nobody}}"}, "own: unknown row 'nobody'"),
        ({"own": "{method: kd, taught_by: {method: cee}}"}, "own: unknown method 'cee'; did you mean 'ce'"),
        ({"own": "{method: kd, taught_by: {method: ce, temprature: 2.0}}"}, r"own: .*'temprature'"),
        ({"own": "{method: kd, taught_by: {row: own}}"}, "own: row own teaches itself, by way of own"),
        (
            {"own": "{method: kd, taught_by: {row: next}}", "next": "{method: kd, taught_by: {row: own}}"},
            "own: row own teaches itself, by way of next",
        ),
        (
            {
                "own": "{method: kd, taught_by: [{row: spare}, {row: next}]}",
                "spare": "{method: ce}",
                "next": "{method: kd, taught_by: [{row: spare}, {row: last}]}",
                "last": "{method: kd, taught_by: {row: own}}",
            },
            "own: row own teaches itself, by way of next",
        ),
        # one that is not itself part of the circle is no way round it
        (
            {
                "before": "{method: kd, taught_by: {row: own}}",
                "own": "{method: kd, taught_by: {row: next}}",
                "next": "{method: kd, taught_by: {row: own}}",
            },
            "own: row own teaches itself, by way of next",
        ),
        (
            {"own": "{method: kd, taught_by: {row: kd}}"},
            "own: row kd cannot teach: which of its runs is meant depends on grid",
        ),
        (
            {"own": "{method: kd, taught_by: [{row: ce}, {row: kd}]}"},
            "own: row kd cannot teach: which of its runs is meant depends on grid",
        ),
    ],
)
def test_rows_that_cannot_be_made_are_refused_by_name(rows, message):
    tree = copy.deepcopy(TREE)
    tree["methods"]["response"] |= {name: yaml.safe_load(text) for name, text in rows.items()}
    with pytest.raises(ValueError, match=message):
        check_methods(parse_params(tree))


def test_rows_may_teach_rows_of_other_stages_and_one_of_them_twice():
    tree = copy.deepcopy(TREE)
    rows = {
        "first": {"method": "kd", "taught_by": {"row": "ce"}},
        "second": {"method": "kd", "taught_by": [{"row": "ce"}, {"row": "first"}, {"row": "ce"}]},
    }
    tree["methods"]["feature"] |= rows
    params = parse_params(tree)
    check_methods(params)
    assert params.methods["feature"]["second"].taught_by[1] == TaughtBy(row="first")


def test_an_anchor_stands_for_its_value(tmp_path):
    text = yaml.safe_dump(TREE)
    plain = read(tmp_path, text)
    assert "&id" not in text
    first, second = "seeds: &mine [0, 1]", "seeds: *mine"
    tree = copy.deepcopy(TREE)
    setting = next(iter(tree["settings"].values()))
    tree["settings"] = {"one": setting | {"seeds": "FIRST"}, "two": setting | {"seeds": "SECOND"}}
    anchored = yaml.safe_dump(tree).replace("seeds: FIRST", first).replace("seeds: SECOND", second)
    found = read(tmp_path, anchored).settings
    assert found["one"] == found["two"] and found["one"].seeds == (0, 1)
    assert plain.recipes == read(tmp_path, anchored).recipes
