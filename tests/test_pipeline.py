"""The whole pipeline in a copy of the tree, shortened in params.yaml only: what a newcomer's `make study` does."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

ROOT = Path(__file__).parent.parent
# rows of every stage, with a run in between, several teachers, a kept adapter, another network, no epochs, few images
ROWS = {
    "response": ["ce", "kd", "relative_v2", "relative_v4", "ensemble_logits", "assistant"],
    "feature": ["attention", "tofd", "reused_classifier", "heads_plain", "heads_v2", "heads_v4", "heads_labels"],
    "relation": ["fsp", "similarity", "collaborative_teaching"],
    "few_data": ["ce_10", "kd_10", "few_sample_10"],
    "online": ["mutual", "rocket"],
    "self": ["own_teacher", "born_again_1"],
    "data_free": ["munge"],
    "students": ["edges", "quantised", "tree"],
    "budget": ["budget_ce", "budget_kd", "budget_mutual"],
}
pytestmark = pytest.mark.pipeline


class Clone:
    """A copy of the tracked and new files in a git repository of its own, in which even quick outputs are kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = self._output(ROOT, "git", "ls-files", "--cached", "--others", "--exclude-standard")
        for name in listed.splitlines():
            if (ROOT / name).is_file() and not name.startswith(("runs/thesis", "reports/thesis")):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        kept = (folder / ".gitignore").read_text().replace("/runs/quick/\n", "").replace("/reports/quick/\n", "")
        (folder / ".gitignore").write_text(kept)
        self.edit_params(shorten)
        self.run("git", "init", "-q")
        self.commit()

    def _output(self, folder: Path, *words: str) -> str:
        return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True).stdout

    def run(self, *words: str) -> str:
        """Output of a command that must succeed."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(self.folder), "KDSTUDY_DEVICE": "cpu"}
        done = subprocess.run(words, cwd=self.folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    def commit(self) -> None:
        self.run("git", "add", "-A")
        self.run("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "state")

    def edit_params(self, edit) -> None:
        path = self.folder / "params.yaml"
        tree = yaml.safe_load(path.read_text())
        edit(tree)
        path.write_text(yaml.safe_dump(tree, sort_keys=False))

    def results(self) -> pd.DataFrame:
        # an id or a commit of digits alone, or with one e, would be read as a number
        return pd.read_csv(self.folder / "runs/quick/results.csv", dtype={"run": str, "commit": str})


def shorten(tree: dict) -> None:
    """Two epochs, two seeds or one, and the rows above."""
    tree["recipes"]["quick"].update(epochs=2, milestones=[1])
    wanted = [row for rows in ROWS.values() for row in rows]
    tree["settings"]["digits"].update(seeds=[0, 1], methods=wanted)
    tree["settings"]["digits_equal"].update(seeds=[0], methods=["ce", "kd", "fsp"])


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Clone:
    clone = Clone(tmp_path_factory.mktemp("clone"))
    clone.run("dvc", "repro", "report@quick")
    clone.commit()
    return clone


def test_it_leaves_results_tables_figures_notebooks_and_a_page(clone):
    results = clone.results()
    final = results[(results.purpose == "final") & (results.stage != "teacher")]
    trained = {stage: set(rows.method) for stage, rows in final[final.setting == "digits"].groupby("stage")}
    assert trained == {stage: set(rows) - {"fsp"} for stage, rows in ROWS.items()}
    assert set(final[final.setting == "digits_equal"].method) == {"ce", "kd", "fsp"}
    assert (final[final.setting == "digits"].groupby("method").seed.nunique() == 2).all()
    assert set(results.status) == {"finished"}
    assert final.teacher_accuracy.notna().all() and final.agreement.notna().all()
    reports = clone.folder / "reports/quick"
    for pattern in ("tables/comparison_digits.csv", "tables/comparison_digits.md", "tables/comparison_digits.tex"):
        assert (reports / pattern).exists()
    assert len(list(reports.glob("notebooks/*.ipynb"))) == 10 + 4 + 2  # digits, digits_equal, tables and speed
    assert len(list(reports.glob("figures/**/*.png"))) >= 15
    page = (reports / "report.html").read_text()
    assert "<img" in page and 'src="http' not in page


def test_a_second_time_retrains_nothing(clone):
    assert "didn't change" in clone.run("dvc", "repro", "report@quick")
    assert clone.run("git", "status", "--porcelain") == ""


def test_a_forced_rerun_leaves_git_status_empty(clone):
    clone.run("dvc", "repro", "--force", "report@quick")
    assert clone.run("git", "status", "--porcelain") == ""


def test_an_edited_number_retrains_that_method_only(clone):
    before = clone.results().set_index("run")
    clone.edit_params(lambda tree: tree["methods"]["response"]["relative_v4"].update(temperature=3.0))
    clone.run("dvc", "repro", "report@quick")
    after = clone.results().set_index("run")
    new = after.loc[after.index.difference(before.index)]
    assert set(new.method) == {"relative_v4"} and len(new) == 2
    pd.testing.assert_frame_equal(
        after.loc[before.index.intersection(after.index)], before.loc[after.index.intersection(before.index)]
    )
    clone.run("git", "checkout", "-q", ".")


def test_a_mistake_in_params_stops_before_training(clone):
    clone.edit_params(lambda tree: tree["methods"]["response"]["kd"].update(temprature=3.0))
    with pytest.raises(AssertionError, match="unknown key in kd: 'temprature'; did you mean 'temperature'"):
        clone.run("dvc", "repro", "report@quick")
    clone.run("git", "checkout", "-q", ".")
