"""The two pages that present the study: the report of a profile, and the result on the README's first screen."""

import re
import shutil
from pathlib import Path

from kdstudy.files import write_text
from kdstudy.params import load_params
from kdstudy.report import build_report

REPORTS = Path("reports")
TITLES = {"quick": "kdstudy: the quick profile", "thesis": "kdstudy: the tables of the thesis and of others, run anew"}
QUICK = """> This profile trains tiny networks on scikit-learn's digits. It proves that the machinery works from data to
> table; its numbers say nothing about the methods."""
FULL = """Published numbers stand beside ours: the mean over seeds of the last epoch's test accuracy, with its 95 %
interval. "not run" means that no such run is on record."""
README = Path("README.md")
PICTURE = Path("docs/quick.png")


def report_profile(profile: str) -> Path:
    """Join the executed notebooks of a profile, stage by stage, into reports/<profile>/report.html; return its path.

    Raises ValueError for an unknown profile or one without executed notebooks.
    """
    settings = load_params().settings_of(profile)
    folder = REPORTS / profile
    found = sorted((folder / "notebooks").glob("[0-9]*.ipynb"))
    wanted = [path for path in found if not path.stem.endswith(".failed")]
    if not wanted:
        raise ValueError(f"profile {profile} has no executed notebooks yet; `dvc repro report@{profile}` makes them")
    output = folder / "report.html"
    ordered = sorted(wanted, key=lambda path: _place(path, list(settings)))
    build_report(ordered, output, TITLES.get(profile, f"kdstudy: {profile}"), profile, _summary(folder, profile))
    return output


def _place(path: Path, settings: list[str]) -> tuple[int, int]:
    """By the stage's number, then by the setting's place in params.yaml."""
    stage, _, rest = path.stem.partition("_")
    places = [number for number, setting in enumerate(settings) if rest.endswith(setting)]
    return int(stage), places[0] if places else -1


def _summary(folder: Path, profile: str) -> str:
    """Markdown: what the profile is, then the tables that the study is made for."""
    written = folder / "tables"
    published = [*sorted(written.glob("thesis_table_*.md")), *sorted(written.glob("literature_*.md"))]
    tables = published or sorted(written.glob("comparison_*.md"))
    return "\n\n".join([QUICK if profile == "quick" else FULL, *(path.read_text(encoding="utf-8") for path in tables)])


def update_readme(setting: str = "digits") -> None:
    """Put the quick profile's comparison table, folded, and the response stage's picture into README.md.

    Raises ValueError if its markers are gone, FileNotFoundError if the quick profile has not been run.
    """
    table = (REPORTS / "quick" / "tables" / f"comparison_{setting}.md").read_text(encoding="utf-8")
    folded = f"<details><summary>All methods in numbers</summary>\n\n{table}\n</details>\n"
    shutil.copyfile(REPORTS / "quick" / "figures" / f"response_{setting}" / "differences.png", PICTURE)
    text, count = re.subn(
        r"(<!-- quick table -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{folded}{match[2]}",
        README.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    if not count:
        raise ValueError(f"{README} has lost its markers <!-- quick table --> and <!-- end -->")
    write_text(README, text)
