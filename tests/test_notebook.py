"""Executed notebooks: equal bytes, refused parameters, failures that spoil nothing, kernels that do not outlive us."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat import v4

from kdstudy.notebook import KEPT, NotebookError, canonical, format_sources, main, normalise, run_notebook


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_notebook(*cells: str, parameters: str = 'name = "nobody"') -> Path:
    first = v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    notebook = v4.new_notebook(cells=[v4.new_markdown_cell("# Title"), first, *map(v4.new_code_cell, cells)])
    path = Path("notebooks/source.ipynb")
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)
    return path


def printed(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


TALKATIVE = """
import random, sys, time, warnings
from kdstudy.progress import reporter
with reporter() as progress:
    for epoch in range(5):
        print(epoch, flush=True)
        time.sleep(random.random() / 50)
        print("note", file=sys.stderr, flush=True)
        progress.update(epoch, 5, "epoch-in-the-terminal")
print("half\\rwhole")
warnings.warn("beware")
display({"name": name, "type": type(name).__name__})
hash("a string")
"""


def test_a_forced_rerun_gives_equal_bytes_and_progress_goes_to_the_terminal_only(capfd):
    source = write_notebook(TALKATIVE)
    output = Path("reports/quick/notebooks/out.ipynb")
    texts = []
    for _ in range(2):
        run_notebook(source, output, {"name": "010"})
        texts.append(output.read_text())
    assert texts[0] == texts[1]
    assert "{'name': '010', 'type': 'str'}" in texts[0]
    assert printed(output).startswith("0\n1\n2\n3\n4\nwhole\nnote\n")
    assert not any(word in printed(output) for word in ("epoch-in-the-terminal", "half"))
    assert not any(word in texts[0] for word in (str(Path.cwd()), "papermill"))
    assert "out    0 %  epoch-in-the-terminal" in capfd.readouterr().err
    assert [path.name for path in output.parent.iterdir()] == ["out.ipynb"]


@pytest.mark.parametrize(
    ("parameters", "given", "message"),
    [
        ('setting = "digits"', {"seting": "x"}, "'seting'.*did you mean 'setting'"),
        ("setting: str\nprofile: str = 'quick'", {"profile": "x"}, "needs a value for setting"),
    ],
)
def test_parameters_that_do_not_fit_are_refused_before_anything_runs(parameters, given, message):
    source = write_notebook("open('it_ran', 'w')", parameters=parameters)
    with pytest.raises(ValueError, match=message):
        run_notebook(source, Path("out.ipynb"), given)
    assert not Path("it_ran").exists() and not Path("out.ipynb").exists()


@pytest.mark.parametrize("count", [0, 2])
def test_there_is_one_parameters_cell(count):
    cells = [v4.new_code_cell("name = 1", metadata={"tags": ["parameters"]}) for _ in range(count)]
    source = Path("source.ipynb")
    nbformat.write(v4.new_notebook(cells=cells), source)
    with pytest.raises(ValueError, match=f"exactly one cell tagged 'parameters', not {count}"):
        run_notebook(source, Path("out.ipynb"), {})


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(capsys):
    source = write_notebook("open('it_ran', 'w')")
    Path("reports").write_text("a file")
    assert main([str(source), "reports/out.ipynb"]) == 1
    assert "cannot write into this folder" in (message := capsys.readouterr().err)
    assert "'reports'" in message
    assert not Path("it_ran").exists()


@pytest.mark.parametrize("words", [["name"], ["name=a", "name=b"]])
def test_a_parameter_is_given_once_with_its_value(words, capsys):
    assert main([str(write_notebook()), "out.ipynb", *words]) == 1
    assert f"not {words[-1]!r}" in capsys.readouterr().err


def test_a_failing_cell_is_reported_and_the_good_notebook_stays(capsys):
    output = Path("out.ipynb")
    output.write_text("the good one")
    source = write_notebook("print('so far')", "raise ValueError('the reason')")
    assert main([str(source), str(output), "name=x"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: In [4] of notebooks/source.ipynb raised ValueError: the reason\n")
    assert "out.failed.ipynb" in message and "Traceback" not in message
    assert output.read_text() == "the good one"
    assert "so far" in printed(Path("out.failed.ipynb"))

    source = write_notebook("print('repaired')")
    assert main([str(source), str(output)]) == 0
    assert printed(output) == "repaired\n"
    assert not Path("out.failed.ipynb").exists()


def test_a_kernel_that_dies_is_reported_with_its_cell():
    source = write_notebook("print('so far')", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(NotebookError, match=r"the kernel died in In \[3\] of notebooks/source.ipynb"):
        run_notebook(source, Path("out.ipynb"), {})
    assert not Path("out.ipynb").exists()
    assert "so far" in printed(Path("out.failed.ipynb"))


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_runner_that_is_ended_takes_its_kernel_along_and_keeps_others_out_until_then(number, capsys):
    pid = "import os; open('new', 'w').write(str(os.getpid())); os.rename('new', 'pid')"
    source = write_notebook(pid, "import time; time.sleep(600)")
    Path("out.ipynb").write_text("the good one")
    code = "import sys; from kdstudy.notebook import main; sys.exit(main(sys.argv[1:]))"
    runner = subprocess.Popen([sys.executable, "-c", code, str(source), "out.ipynb"], stderr=subprocess.PIPE, text=True)
    wait_for(Path("pid").exists)
    kernel = int(Path("pid").read_text())

    assert main([str(source), "out.ipynb"]) == 1
    assert f"out.ipynb is being written by process {runner.pid}" in capsys.readouterr().err

    runner.send_signal(number)
    _, message = runner.communicate(timeout=60)
    assert runner.returncode == (-number if number == signal.SIGKILL else 128 + number)
    first = {signal.SIGINT: "interrupted; ", signal.SIGTERM: "stopped by SIGTERM; ", signal.SIGKILL: ""}[number]
    assert message == (f"{first}{KEPT}\n" if first else "")
    wait_for(lambda: not is_running(kernel), seconds=5)
    assert Path("out.ipynb").read_text() == "the good one"
    assert not Path("out.failed.ipynb").exists()


def stream(name: str, text: str):
    return v4.new_output("stream", name=name, text=text)


def test_normalising_joins_streams_between_displays_and_hides_the_process_id():
    shown = v4.new_output("display_data", {"text/plain": "shown"})
    outputs = [stream("stderr", "/tmp/ipykernel_77/123.py:1: UserWarning: x\n"), stream("stdout", "10 %\r"), shown]
    outputs += [stream("stdout", "a\r\nb"), stream("stderr", "e"), stream("stdout", "c\n")]
    notebook = v4.new_notebook(
        cells=[v4.new_code_cell("x", outputs=outputs, metadata={"papermill": {"duration": 1}, "tags": ["keep"]})],
        metadata={"papermill": {"input_path": "/home/me/x.ipynb"}, "language_info": {"name": "python", "version": "3"}},
    )
    normalise(notebook)
    nbformat.validate(notebook)
    assert [output.get("text", "shown") for output in notebook.cells[0].outputs] == [
        "10 %",
        "<cell>:1: UserWarning: x\n",
        "shown",
        "a\nbc\n",
        "e",
    ]
    assert notebook.cells[0].metadata == {"tags": ["keep"]}
    assert notebook.cells[0].id == "c000"
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}


def test_the_canonical_form_is_one_and_keeps_the_cells():
    source = write_notebook("x = 'é'\ny")
    notebook = nbformat.read(source, as_version=4)
    notebook.cells[2].update(execution_count=7, outputs=[stream("stdout", "old")])
    del notebook.cells[0]["id"]
    touched = json.dumps(notebook, indent=4)
    text = canonical(touched)
    assert text == canonical(text) == canonical(source.read_text())
    assert text.endswith("}\n") and '\n "cells"' in text and "é" in text
    assert [cell.source for cell in nbformat.reads(text, as_version=4).cells] == [c.source for c in notebook.cells]
    assert "old" not in text and '"execution_count": 7' not in text
    assert nbformat.reads(text, as_version=4).cells[1].metadata.tags == ["parameters"]


def test_sources_are_listed_or_rewritten():
    source = write_notebook("x")
    before = source.read_bytes()
    assert format_sources(Path("notebooks"), check=True) == [source]
    assert source.read_bytes() == before
    assert format_sources(Path("notebooks")) == [source]
    assert format_sources(Path("notebooks"), check=True) == []
