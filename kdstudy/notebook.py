"""Executes a notebook with named parameters, so that equal inputs give equal bytes and a failure spoils nothing.

The kernel's working folder is the current one, which is to be the project's root. Papermill and nbformat are imported
where they are used, to keep the rest of the command line quick.
"""

import argparse
import ast
import fcntl
import hashlib
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kdstudy.files import require_writable, unknown_name, write_text
from kdstudy.progress import Relay
from kdstudy.provenance import tell_command
from kdstudy.workers import end_with_parent

if TYPE_CHECKING:
    from nbformat import NotebookNode

SCRATCH = Path(".kdstudy/notebooks")
KERNEL_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # silences a warning of the debugger about frozen modules
}
KEPT = "what was finished is kept, and the stage goes on from its last checkpoints"
GRACE_SECONDS = 30.0  # twice what a kernel has to write its checkpoints: after half of it it is told again
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
_CELL_FILE = re.compile(r"[^\s\"']*ipykernel_\d+/\d+\.py")  # holds the kernel's process id


class NotebookError(RuntimeError):
    """A notebook did not run to its end; the message says where and why."""


def run_notebook(source: Path, output: Path, parameters: Mapping[str, str]) -> None:
    """Execute `source` with `parameters` and put the normalised result at `output`, in one step, once it is whole.

    On failure the old `output` stays and what was executed is kept as `<stem>.failed.ipynb` beside it, until the next
    success. Raises ValueError for parameters that `source` does not declare or lacks, OSError if `output` cannot be
    written there (both before anything runs), NotebookError if a cell fails, the kernel dies, or another process is
    writing the same `output`.
    """
    source, output = Path(source), Path(output)
    _check_parameters(source, parameters)
    require_writable(output.parent)
    failed = output.with_name(f"{output.stem}.failed.ipynb")
    with _claim(output) as scratch:
        try:
            _execute(source, scratch, parameters, label=output.stem)
        except NotebookError as error:
            _publish(scratch, failed)
            raise NotebookError(f"{error}\nwhat was executed: {failed}") from None
        _publish(scratch, output)
        failed.unlink(missing_ok=True)


def declared_parameters(notebook: "NotebookNode", name: object) -> dict[str, bool]:
    """The names that the cell tagged `parameters` assigns, and whether each has a default (`stage: str` has none).

    Raises ValueError, with the notebook's `name`, unless there is exactly one such cell.
    """
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ValueError(f"{name} must have exactly one cell tagged 'parameters', not {len(cells)}")
    declared = {}
    for node in ast.parse(cells[0].source).body:
        if isinstance(node, ast.Assign):
            declared |= {target.id: True for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            declared[node.target.id] = node.value is not None
    return declared


def _check_parameters(source: Path, parameters: Mapping[str, str]) -> None:
    import nbformat

    declared = declared_parameters(nbformat.read(source, as_version=4), source)
    for name in parameters:
        if name not in declared:
            raise unknown_name(f"parameter of {source}", name, declared)
    missing = [name for name, has_default in declared.items() if not has_default and name not in parameters]
    if missing:
        raise ValueError(f"{source} needs a value for {', '.join(missing)}")


@contextmanager
def _claim(output: Path) -> Iterator[Path]:
    """Yield a scratch path that belongs to `output`, under a lock which the system drops with the process."""
    name = f"{output.stem}-{hashlib.sha256(os.fsencode(output.resolve())).hexdigest()[:12]}"
    SCRATCH.mkdir(parents=True, exist_ok=True)
    scratch = SCRATCH / f"{name}.ipynb"
    with open(SCRATCH / f"{name}.lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise NotebookError(f"{output} is being written by process {lock.read().strip()}: wait or end it") from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        try:
            yield scratch
        finally:
            scratch.unlink(missing_ok=True)


def _execute(source: Path, scratch: Path, parameters: Mapping[str, str], label: str) -> None:
    import papermill
    from jupyter_client.manager import AsyncKernelManager
    from papermill.exceptions import PapermillExecutionError

    class PatientManager(AsyncKernelManager):
        shutdown_wait_time = GRACE_SECONDS

    for name in ("papermill", "asyncio"):  # what they would log is checked or raised here
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with Relay(label) as relay, _environment(KERNEL_ENVIRONMENT | relay.environment):
        try:
            papermill.execute_notebook(
                source,
                scratch,
                parameters=dict(parameters),
                kernel_name="python3",
                language="python",
                progress_bar=False,
                kernel_manager_class=PatientManager,
                extra_arguments=["--log-level=CRITICAL"],
            )
        except PapermillExecutionError as error:
            where = f"In [{error.exec_count}] of {source}"
            raise NotebookError(f"{where} raised {error.ename}: {error.evalue}") from None
        except RuntimeError:  # what nbclient raises for a kernel that died or did not start
            where = f"{_last_started(scratch)} of {source}"
            raise NotebookError(f"the kernel died in {where} (killed, or out of memory?); {KEPT}") from None


def _last_started(scratch: Path) -> str:
    import nbformat

    # a kernel may die before it has told the number of its cell, so the cells that papermill started are counted
    code = [cell for cell in nbformat.read(scratch, as_version=4).cells if cell.cell_type == "code" and cell.source]
    started = sum(cell.metadata.papermill.start_time is not None for cell in code)
    return f"In [{started}]" if started else "the start"


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _publish(scratch: Path, output: Path) -> None:
    import nbformat

    notebook = nbformat.read(scratch, as_version=4)
    normalise(notebook)
    write_text(output, _dumps(notebook))


def normalise(notebook: "NotebookNode") -> None:
    """Take from an executed notebook, in place, all that differs between two runs of equal outcome.

    That is: times and paths in the metadata, cell ids, how the outputs were cut into pieces, what a carriage return has
    overwritten, and the kernel's process id in warnings.
    """
    _strip(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _merge_streams(cell.outputs)


def _strip(notebook: "NotebookNode") -> None:
    from nbformat import from_dict

    notebook.update(nbformat=4, nbformat_minor=5, metadata=from_dict(_METADATA))
    for number, cell in enumerate(notebook.cells):
        cell.id = f"c{number:03d}"
        tags = cell.metadata.get("tags")
        cell.metadata = from_dict({"tags": tags} if tags else {})


def _merge_streams(outputs: list["NotebookNode"]) -> list["NotebookNode"]:
    # within a stretch of stream outputs the order of stdout and stderr is a race, so stdout goes first
    merged: list[NotebookNode] = []
    stretch: dict[str, NotebookNode] = {}
    for output in outputs:
        if output.output_type != "stream":
            merged += [stretch[name] for name in sorted(stretch, reverse=True)]
            stretch = {}
            merged.append(output)
        elif output.name in stretch:
            stretch[output.name].text += output.text
        else:
            stretch[output.name] = output
    merged += [stretch[name] for name in sorted(stretch, reverse=True)]
    for output in merged:
        if output.output_type == "stream":
            output.text = _CELL_FILE.sub("<cell>", _overwrite(output.text))
    return merged


def _overwrite(text: str) -> str:
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))


def canonical(text: str) -> str:
    """The one form in which a source notebook is kept, so that its bytes change only when its cells do.

    No outputs, no execution counts, ids c000, c001, ..., metadata that names python3 and nothing else, tags as the only
    metadata of a cell.
    """
    from nbformat import v4

    notebook = v4.reads(text)  # unlike nbformat.reads it says nothing of missing or repeated ids, which are set here
    _strip(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
    return _dumps(notebook)


def format_sources(folder: Path, check: bool = False) -> list[Path]:
    """Rewrite the notebooks of `folder` that are not in canonical form, or with `check` only list them."""
    changed = []
    for path in sorted(Path(folder).glob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        if (formatted := canonical(text)) != text:
            changed.append(path)
            if not check:
                write_text(path, formatted)
    return changed


def _dumps(notebook: "NotebookNode") -> str:
    import nbformat

    return nbformat.writes(notebook, version=4) + "\n"


def main(argv: Sequence[str]) -> int:
    """Run `notebook SOURCE OUTPUT [NAME=VALUE ...]` and return the exit code; values are passed on as strings."""
    parser = argparse.ArgumentParser(prog="kdstudy notebook", description="Execute a notebook with parameters.")
    parser.add_argument("source", type=Path, help="the notebook to execute")
    parser.add_argument("output", type=Path, help="where the executed notebook goes")
    parser.add_argument("parameters", nargs="*", metavar="NAME=VALUE", help="values for its parameters cell")
    arguments = parser.parse_args(argv)
    tell_command(["notebook", *argv])
    if "DVC_STAGE" in os.environ:
        end_with_parent()  # a killed DVC must not leave a stage behind that keeps the GPU
    before = signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        run_notebook(arguments.source, arguments.output, _parse_parameters(arguments.parameters))
    except (ValueError, OSError, NotebookError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; {KEPT}", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _parse_parameters(words: Sequence[str]) -> dict[str, str]:
    parameters: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name in parameters:
            raise ValueError(f"a parameter is given once and as NAME=VALUE, not {word!r}")
        parameters[name] = value
    return parameters


def _exit_on_signal(number: int, frame: object) -> None:
    # an exception, unlike the default action, lets papermill shut its kernel down on the way out
    print(f"stopped by {signal.Signals(number).name}; {KEPT}", file=sys.stderr)
    raise SystemExit(128 + number)
