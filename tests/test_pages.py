"""Which notebooks make up a report, in which order, and what stands on the README."""

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_markdown_cell, new_notebook

from kdstudy import pages

ROOT = Path(__file__).parent.parent
NAMES = ("11_tables", "2_response_cifar100_wrn_16_1", "2_response_cifar10_wrn_16_1", "1_teacher_cifar100_wrn_16_1")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text((ROOT / "params.yaml").read_text())
    return tmp_path


def write_notebooks(folder: Path, names: tuple[str, ...]) -> None:
    folder.mkdir(parents=True)
    for name in names:
        notebook = new_notebook(cells=[new_markdown_cell(f"# chapter {name}", id="c000")])
        nbformat.write(notebook, folder / f"{name}.ipynb")


def test_stages_by_number_settings_as_in_params_failures_left_out(folder):
    write_notebooks(Path("reports/thesis/notebooks"), (*NAMES, "1_teacher_cifar100_wrn_16_1.failed"))
    page = pages.report_profile("thesis").read_text()
    order = ["1_teacher_cifar100_wrn_16_1", "2_response_cifar10_wrn_16_1", "2_response_cifar100_wrn_16_1", "11_tables"]
    places = [page.rindex(f"chapter {name}<") for name in order]
    assert places == sorted(places)
    assert "failed" not in page


def test_thesis_tables_open_the_page(folder):
    write_notebooks(Path("reports/thesis/notebooks"), NAMES)
    tables = Path("reports/thesis/tables")
    tables.mkdir()
    (tables / "thesis_table_5.md").write_text("**Table 5.**\n\n| a |\n|---|\n| not run |\n")
    page = pages.report_profile("thesis").read_text()
    assert page.index("Table 5.") < page.rindex("chapter 1_teacher")


def test_nothing_to_report_yet(folder):
    with pytest.raises(ValueError, match="dvc repro report@quick"):
        pages.report_profile("quick")


def test_the_readme_takes_table_and_picture(folder):
    Path("reports/quick/tables").mkdir(parents=True)
    Path("reports/quick/figures/response_digits").mkdir(parents=True)
    Path("docs").mkdir()
    Path("reports/quick/tables/comparison_digits.md").write_text("| new \\1 |\n")
    Path("reports/quick/figures/response_digits/differences.png").write_bytes(b"picture")
    Path("README.md").write_text("before\n<!-- quick table -->\n| old |\n<!-- end -->\nafter\n")
    pages.update_readme()
    folded = "<details><summary>All methods in numbers</summary>\n\n| new \\1 |\n\n</details>\n"
    assert Path("README.md").read_text() == f"before\n<!-- quick table -->\n{folded}<!-- end -->\nafter\n"
    assert Path("docs/quick.png").read_bytes() == b"picture"
    Path("README.md").write_text("no markers")
    with pytest.raises(ValueError, match="markers"):
        pages.update_readme()
