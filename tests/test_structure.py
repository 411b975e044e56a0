"""The house stands as drawn: floors, a training half that stands alone, pipeline and notebooks in step."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kdstudy"
FLOORS = tuple(
    set(floor.split())
    for floor in (
        "core file_difference files stopping",
        "adapters augment blocks breakdown edits generator graphs heads image_set impressions margins memory "
        "modalities munge progress provenance quantisation recipe records roofline trees workers",
        "adversarial attention boundaries collective contrast cross_layer data ensembles exits few_samples fusion "
        "generations hints layers logits models mutual penultimate quantised relative response reuse rocket samples "
        "sections sources tree_students virtual_teacher",
        "checkpoint collaborative data_free evaluate naive params schemes self_taught",
        "launch logit_table peers rivals snapshots synthetic train",
        "device study ways",
        "costs engine store",
        "cohort results",
        "bench make",
        "execute",
        "campaign collect plausibility",
        "answers cluster equations notebook statistics",
        "insides relations tables",
        "companions table_files",
        "figures lesson literature readings report",
        "budget combinations oneself pages scheme_figures speed students students_figures together tree_figures unseen "
        "unseen_figures verify",
        "bench_figures budget_figures",
        "__main__",
    )
)
TRAINING_HALF = set().union(*FLOORS[:11])
ALLOWED_THERE = {"torch", "torchvision", "PIL", "numpy", "pandas", "yaml", "safetensors", "sklearn"}


def imported(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_modules(path: Path) -> set[str]:
    found = {name.split(".")[1] for name in imported(path) if name.startswith("kdstudy.")}
    return found - {"__version__"}


def test_every_module_has_a_floor_and_imports_only_from_below():
    floor = {module: number for number, modules in enumerate(FLOORS) for module in modules}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert modules == set(floor)
    wrong = [
        f"{module} (floor {floor[module]}) imports {other} (floor {floor[other]})"
        for module in sorted(modules)
        for other in sorted(own_modules(PACKAGE / f"{module}.py"))
        if floor[other] >= floor[module]
    ]
    assert not wrong


def test_training_half_names_no_other_library():
    for module in sorted(TRAINING_HALF):
        top = {name.split(".")[0] for name in imported(PACKAGE / f"{module}.py")}
        foreign = top - sys.stdlib_module_names - ALLOWED_THERE - {"kdstudy"}
        # progress draws its bar itself, but a terminal is no notebook either way
        assert not foreign, f"{module} imports {foreign}"


def test_training_half_imports_without_notebook_pipeline_and_plots():
    blocked = [
        "IPython",
        "ipykernel",
        "jupyterlab",
        "papermill",
        "nbformat",
        "nbconvert",
        "dvc",
        "matplotlib",
        "seaborn",
    ]
    program = (
        f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
        f"import importlib\nfor name in {sorted(TRAINING_HALF)}: importlib.import_module('kdstudy.' + name)\n"
        "from kdstudy.__main__ import main\nsys.exit(main(['methods']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "relative_v4" in done.stdout


def test_matplotlib_is_imported_in_one_place():
    users = {path.stem for path in PACKAGE.glob("*.py") if "matplotlib" in path.read_text()}
    assert {name for name in users if not name.endswith("figures")} == set()


@pytest.mark.parametrize("module", ["train", "cohort", "make", "execute", "schemes", "evaluate", "checkpoint"])
def test_the_loop_knows_no_method_by_name(module):
    from kdstudy.study import METHODS

    strings = {
        node.value
        for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert not strings & (set(METHODS) - {"ce", "kd"})


def test_stages_depend_on_the_code_that_they_run():
    """A stage that runs again after an edit is cheap; one that does not is wrong. The training half counts as one."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    trained_by = {
        f"kdstudy/{module}.py" for module in ("core", "data", "device", "evaluate", "execute", "models", "recipe")
    }
    trained_by |= {f"kdstudy/{module}.py" for module in ("schemes", "study", "train")}
    for name in ("teacher", "response"):
        assert trained_by <= set(stages[name]["do"]["deps"])
    for stage in stages.values():
        for dep in stage.get("do", stage)["deps"]:
            if dep.startswith(("kdstudy/", "notebooks/")):
                assert (ROOT / dep).exists(), dep


def test_stages_depend_on_the_methods_of_their_rows_and_on_no_others():
    from kdstudy.params import load_params
    from kdstudy.study import METHODS

    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    files = {cls.__module__.rpartition(".")[2] for cls in METHODS.values()}
    for stage, rows in load_params(ROOT / "params.yaml").methods.items():
        keys = {row.method for row in rows.values()} | {
            own.method for row in rows.values() for own in row.taught_by if own.method
        }
        needed = {METHODS[key].__module__.rpartition(".")[2] for key in keys}
        shown = {name for file in needed for name in own_modules(PACKAGE / f"{file}.py")} & files
        listed = {Path(dep).stem for dep in stages[stage]["do"]["deps"] if dep.startswith("kdstudy/")} & files
        assert needed <= listed <= needed | shown | {"response", "relative"}, stage


def test_stages_give_notebooks_exactly_their_parameters():
    import nbformat

    from kdstudy.notebook import declared_parameters

    for stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values():
        command = stage.get("do", stage)["cmd"].split()
        if command[3] != "notebook":
            continue
        given = {word.split("=")[0] for word in command[6:]}
        source = ROOT / command[4]
        assert given == set(declared_parameters(nbformat.read(source, as_version=4), source)), source


def test_source_notebooks_are_canonical_and_define_nothing():
    from kdstudy.notebook import format_sources

    assert format_sources(ROOT / "notebooks", check=True) == []
    import nbformat

    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                assert not re.search(r"^\s*(def|class) ", cell.source, re.MULTILINE), path


def test_environments_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lock = (ROOT / "requirements.lock").read_text()
    pinned = {line.split("==")[0] for line in lock.splitlines() if re.match(r"[a-z].*==", line)}
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.match(r"[A-Za-z0-9-]+", entry)[0] for entry in wanted}
    assert names <= pinned
    assert lock.count("--hash=sha256:") > len(pinned)
    assert "://" not in lock

    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    python = next(entry for entry in conda if isinstance(entry, str) and entry.startswith("python="))
    assert project["requires-python"].startswith(f">={python.removeprefix('python=')},")
    assert {"pip": ["-r requirements.lock"]} in conda


def test_dvc_calls_nobody():
    config = (ROOT / ".dvc" / "config").read_text()
    assert re.search(r"analytics\s*=\s*false", config)
    assert re.search(r"check_update\s*=\s*false", config)
