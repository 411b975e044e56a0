"""What was made elsewhere is taken in when all that can be checked is right; nothing else is, and nothing is harmed."""

import errno
import fcntl
import json
import os
import pickle
import random
import shutil
import signal
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from test_execute import profile, stripes, taught

from kdstudy import collect as collecting
from kdstudy.checkpoint import save_checkpoint
from kdstudy.collect import KNOWN, REFUSED, TAKEN, Finding, Intake, collect, publish_collected, summary
from kdstudy.device import data_path
from kdstudy.execute import Executor, open_ledger
from kdstudy.image_set import ImageSet, save_image_set
from kdstudy.records import run_id, seal
from kdstudy.results import Ledger
from kdstudy.stopping import Stopped
from kdstudy.store import Store
from kdstudy.train import Training

# nine runs: two teachers, two cells of a grid, one run in between, and four final ones, of which one diverges
TREE = taught(
    {
        "ce": {},
        "kd": {"temperature": 2.0},
        "assisted": {"method": "kd", "taught_by": {"method": "kd", "network": "wrn_10_0.5"}},
        "broken": {"method": "kd", "kd_weight": 1.0e38, "temperature": 10.0},
    },
    seeds=[0],
)
TREE["grids"]["small"]["rows"] = {"kd": ["temperature"]}
STAGES = ("teacher", "response")
RUNS = 9
# what records of two makings of a run may differ in
HOW_IT_WAS_MADE = {"seconds", "started", "finished", "commit", "engine", "sessions", "resumes", "sha256"}


def project(folder: Path, **options) -> Path:
    """A new project of its own, with data."""
    folder.mkdir()
    with chdir(folder):
        Path("params.yaml").write_text(yaml.safe_dump(TREE | profile(**options)))
        save_image_set(stripes(), data_path("stripes"))
    return folder


def store_of(folder: Path) -> Store:
    return Store(folder / "store", folder / "runs")


def ledger_of(folder: Path) -> Ledger:
    with chdir(folder):
        return open_ledger(store=store_of(folder))


def make(folder: Path, **options) -> None:
    """Make what a project lacks."""
    with chdir(folder):
        for stage in STAGES:
            Executor(ledger_of(folder), "stripes", **options).run_stage(stage)


def take(folder: Path, *sources: Path) -> list[Finding]:
    """Take into a project what lies in these folders."""
    with chdir(folder):
        return collect(sources, ledger_of(folder))


def publish(folder: Path, runs: set[str] = frozenset()) -> tuple[list, list]:
    with chdir(folder):
        return publish_collected(ledger_of(folder), runs)


def files(folder: Path) -> dict[str, bytes | None]:
    """All that a folder holds."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def kept(folder: Path) -> dict[str, bytes]:
    """All that a store holds but for its locks and folders."""
    return {name: data for name, data in files(folder).items() if data is not None and not name.endswith("lock")}


def results(folder: Path) -> dict[str, tuple[dict, bytes | None]]:
    """Record, as far as two makings must agree, and weights of every published run."""
    found = {}
    for path in (folder / "runs").rglob("*.json"):
        record = {name: value for name, value in json.loads(path.read_text()).items() if name not in HOW_IT_WAS_MADE}
        weights = folder / "store" / path.stem / "weights.safetensors"
        found[str(path.relative_to(folder))] = record, weights.read_bytes() if weights.exists() else None
    return found


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.delenv("KDSTUDY_DEVICE", raising=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A project that was made in one go. Not to be written to."""
    folder = project(tmp_path_factory.mktemp("whole") / "project")
    make(folder)
    return folder


@pytest.fixture(scope="module")
def halfway(tmp_path_factory) -> Path:
    """A project that was stopped after 6 of the 8 steps of its first run. Not to be written to."""
    folder = project(tmp_path_factory.mktemp("halfway") / "project")
    stop_after(folder, 6)
    return folder


@pytest.fixture
def here(tmp_path) -> Path:
    """A project in which nothing has been made."""
    return project(tmp_path / "here")


@pytest.fixture
def there(tmp_path, whole) -> Path:
    """A copy of the store of the whole project."""
    return Path(shutil.copytree(whole / "store", tmp_path / "there"))


@pytest.fixture
def begun(tmp_path, halfway) -> Path:
    """A copy of the folder of the run that was begun."""
    (checkpoint,) = (halfway / "store").glob("*/checkpoint.pt")
    return Path(shutil.copytree(checkpoint.parent, tmp_path / "begun" / checkpoint.parent.name))


@contextmanager
def steps_of_runs() -> Iterator[Counter]:
    """How many steps every run takes meanwhile."""
    steps, end_step = Counter(), Training.end_step

    def spy(self):
        steps[self.surroundings.run] += 1
        end_step(self)

    Training.end_step = spy
    try:
        yield steps
    finally:
        Training.end_step = end_step


def stop_after(folder: Path, steps: int) -> None:
    """Make a project's runs until all of them together have taken so many steps."""
    with steps_of_runs() as taken, pytest.raises(Stopped):
        make(folder, should_stop=lambda: taken.total() >= steps)


def outcomes(findings: list[Finding]) -> Counter:
    return Counter((finding.kind, finding.outcome) for finding in findings)


# two halves


@pytest.mark.parametrize(
    ("first", "then", "steps"), [({}, {"cohort": 3}, 37), ({"cohort": 3}, {}, 30), ({"cohort": 3}, {}, 46)], ids=str
)
def test_a_run_made_in_two_halves_in_two_folders_equals_one_made_in_one_go(tmp_path, whole, first, then, steps):
    one, other = project(tmp_path / "one", **first), project(tmp_path / "other", **then)
    with steps_of_runs() as taken:
        stop_after(one, steps)
        begun = {path.parent.name for path in (one / "store").glob("*/checkpoint.pt")}
        done = {path.parent.name for path in (one / "store").glob("*/record.json")}
        assert begun and done and not begun & done
        before = files(one)
        found = take(other, one / "store")
        assert {finding.run for finding in found if finding.kind == "record"} == done
        assert {finding.run for finding in found if finding.kind == "checkpoint"} == begun
        assert all(finding.taken and not finding.text and not finding.remarks for finding in found)
        first_half = Counter(taken)
        make(other)
    assert files(one) == before
    with steps_of_runs() as expected:
        make(project(tmp_path / "in_one_go"))
    assert taken == expected  # no step twice
    assert not (taken - first_half).keys() & done
    assert results(other) == results(whole) == results(tmp_path / "in_one_go")
    assert {record["resumes"] for record in records(other / "store") if record["run"] in begun} == {1}


def records(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in folder.glob("*/record.json")]


@pytest.mark.parametrize("part", ["store", "runs", "."])
def test_nothing_is_trained_that_was_collected(here, whole, part):
    found = take(here, whole / part)
    assert outcomes(found) == {("record", TAKEN): RUNS}
    published, foreign = publish(here, {finding.run for finding in found})
    assert len(published) == RUNS and not foreign
    assert files(here / "runs") == files(whole / "runs")  # to the byte
    assert kept(here / "store") == {
        name: data for name, data in kept(whole / "store").items() if part != "runs" or "weights" not in name
    }
    with steps_of_runs() as taken:
        make(here)
    assert not taken and files(here / "runs") == files(whole / "runs")


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("spoilt", ["own", "published"])
def test_of_two_copies_of_a_record_one_may_be_torn(here, whole, tmp_path, names, spoilt):
    own, published = (tmp_path / "out" / name for name in names)
    shutil.copytree(whole / "store", own)
    shutil.copytree(whole / "runs", published)
    run = finished_run(own)
    (other,) = published.rglob(f"{run.name}.json")
    (run / "record.json" if spoilt == "own" else other).write_text("torn")
    found = take(here, tmp_path / "out")
    assert [finding.path.stem for finding in found if finding.outcome == REFUSED] in (
        [],
        ["record" if spoilt == "own" else run.name],
    )
    assert {finding.run for finding in found if finding.taken} == {path.name for path in own.iterdir()}
    assert kept(here / "store") == kept(whole / "store")  # the other copy of the record vouched for the weights


def record_at(path: Path) -> dict:
    return json.loads(path.read_text())


def test_what_is_here_is_known_and_left(here, there):
    take(here, there)
    before = files(here)
    assert outcomes(take(here, there)) == {("record", KNOWN): RUNS}
    assert outcomes(take(here, here)) == {("record", KNOWN): RUNS}  # oneself
    assert files(here) == before


def test_another_making_with_the_same_result_is_known(here, there, whole):
    take(here, whole)
    before = files(here)
    for path in there.glob("*/record.json"):
        rewrite(path, started="2001-01-01T00:00:00+00:00", seconds=9.0)
    assert outcomes(take(here, there)) == {("record", KNOWN): RUNS}
    assert files(here) == before


def test_weights_are_added_to_records_that_came_without(here, there, whole):
    found = take(here, whole / "runs")
    assert all(finding.remarks == (("without weights",) if not_diverged(finding) else ()) for finding in found)
    found = take(here, there)
    assert outcomes(found) == {("record", TAKEN): RUNS - 1, ("record", KNOWN): 1}
    assert not any(finding.remarks for finding in found)
    assert kept(here / "store") == kept(there)


def not_diverged(finding: Finding) -> bool:
    return record_at(finding.path)["status"] == "finished"


def test_weights_that_are_added_leave_the_record_as_it_is(here, there):
    run = finished_run(there)
    rewrite(Path(shutil.copytree(run, here / "store" / run.name)) / "record.json", seconds=9.0)
    (here / "store" / run.name / "weights.safetensors").unlink()
    before = kept(here / "store")
    assert take(here, run)[0].taken
    weights = f"{run.name}/weights.safetensors"
    assert kept(here / "store") == before | {weights: (there / weights).read_bytes()}


def test_a_record_ends_what_was_begun_here(here, halfway, there, begun):
    for end in ("checkpoint.pt", "checkpoint.previous.pt"):
        (here / "store" / begun.name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(begun / "checkpoint.pt", here / "store" / begun.name / end)
    assert take(here, there / begun.name)[0].taken
    assert kept(here / "store" / begun.name) == kept(there / begun.name)


def test_weights_are_added_to_records_that_are_only_published_here(here, there, whole):
    shutil.copytree(whole / "runs", here / "runs")
    assert outcomes(take(here, there)) == {("record", TAKEN): RUNS - 1, ("record", KNOWN): 1}
    diverged = next(record["run"] for record in records(there) if record["status"] == "diverged")
    assert kept(here / "store") == {name: data for name, data in kept(there).items() if diverged not in name}


def test_a_diverged_run_is_taken_and_weights_beside_its_record_are_not(here, there):
    run = next(record["run"] for record in records(there) if record["status"] == "diverged")
    (there / run / "weights.safetensors").write_bytes(b"of a run that broke")
    (finding,) = take(here, there / run)
    assert finding.taken and not any("weights" in remark for remark in finding.remarks)
    assert kept(here / "store").keys() == {f"{run}/record.json"}


def test_weights_without_a_record_give_way_to_those_that_have_one(here, whole, there):
    run = finished_run(there).name
    weights = here / "store" / run / "weights.safetensors"
    for source, left in ((whole / "runs", None), (there, (there / run / weights.name).read_bytes())):
        shutil.rmtree(here / "store", ignore_errors=True)
        weights.parent.mkdir(parents=True)
        weights.write_bytes(b"of a run that was killed before it had a record")
        take(here, source)
        assert (weights.read_bytes() if weights.exists() else None) == left
        assert (here / "store" / run / "record.json").exists()


# what is refused


def rewrite(path: Path, **changes) -> Path:
    """Change a record, with a seal that fits. Returns the file, in a folder that fits, too."""
    record = record_at(path) | changes
    record["run"] = run_id(record["identity"])
    folder = path.parent.rename(path.parent.with_name(record["run"]))
    (folder / path.name).write_text(json.dumps(seal(record)))
    return folder / path.name


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def altered(path: Path) -> None:
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))


def of_another_seed(path: Path) -> None:
    """An id, a folder and a seal that fit, and a seed that does not."""
    identity = record_at(path)["identity"]
    rewrite(path, identity=identity | {"seed": 7})


def of_another_id(path: Path) -> None:
    record = record_at(path)
    path.write_text(json.dumps(seal(record | {"identity": record["identity"] | {"seed": 1}, "seed": 1})))


def in_another_folder(path: Path) -> None:
    path.parent.rename(path.parent.with_name("0123456789abcdef"))


def in_a_folder_of_no_run(path: Path) -> None:
    path.parent.rename(path.parent.with_name("mine"))


def of_another_revision(path: Path) -> None:
    rewrite(path, revision=0, identity=record_at(path)["identity"] | {"revision": 0})


def of_other_images(path: Path) -> None:
    rewrite(path, data_checksum="5" * 64, identity=record_at(path)["identity"] | {"data": "5" * 64})


def with_torn_weights(path: Path) -> None:
    torn(path.with_name("weights.safetensors"))


def with_anothers_weights(path: Path) -> None:
    others = [each for each in path.parent.parent.glob("*/weights.safetensors") if each.parent != path.parent]
    shutil.copyfile(others[0], path.with_name("weights.safetensors"))


def with_weights_it_does_not_know(path: Path) -> None:
    rewrite(path, weights_sha256=None)


def a_link(path: Path) -> None:
    path.rename(path.with_name("other.json"))
    path.symlink_to("other.json")


def a_link_to_a_folder(path: Path) -> None:
    outside = path.parent.parent.with_name("outside")
    path.parent.rename(outside)
    path.parent.symlink_to(outside)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def no_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


def too_deep(path: Path) -> None:
    path.write_text("[" * 100_000)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (torn, "no record of a run"),
        (altered, "altered or torn"),
        (of_another_seed, "seed is 0, but by its id it is 7"),
        (of_another_id, "its id is not that of what it says"),
        (in_another_folder, "is the record of run .*, not 0123456789abcdef"),
        (in_a_folder_of_no_run, "is the record of run .*, not mine"),
        (of_another_revision, "revision 0 of the training code, and this is 1"),
        (of_other_images, "other images: the checksum of 'stripes' is '5555"),
        (with_torn_weights, "do not fit its weights_sha256"),
        (with_anothers_weights, "do not fit its weights_sha256"),
        (with_weights_it_does_not_know, "it is finished, and weights_sha256 is None"),
        (a_link, "is a link"),
        (a_link_to_a_folder, "is a link"),
        (a_pipe, "no plain file"),
        (no_text, "no record of a run"),
        (too_deep, "no record of a run"),
    ],
)
def test_a_record_that_is_not_right_is_refused_and_left(here, there, spoil, reason):
    source = finished_run(there)
    alone = source.parent.with_name("alone") / source.name
    shutil.copytree(source, alone)
    if spoil is with_anothers_weights:
        other = next(path.parent for path in there.glob("*/weights.safetensors") if path.parent != source)
        shutil.copytree(other, alone.with_name("other"))
        (alone.with_name("other") / "record.json").unlink()
    spoil(alone / "record.json")
    ours, theirs = files(here), tree_of(alone.parent)
    (finding,) = take(here, alone.parent)
    assert finding.outcome == REFUSED and not finding.taken
    assert_reason(finding, reason)
    assert files(here) == ours and tree_of(alone.parent) == theirs


def assert_reason(finding: Finding, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        raise ValueError(finding.text)
    assert str(finding.path) not in finding.text  # it is named beside the text


def tree_of(folder: Path) -> dict[str, tuple]:
    """Contents, kinds and times of all that a folder holds, links not followed, pipes not read."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        found[str(path)] = (status.st_mode, status.st_mtime_ns, status.st_ino, content)
    return found


def finished_run(store: Path) -> Path:
    """The folder of a student that finished."""
    return next(
        store / record["run"] for record in records(store) if record["method"] == "ce" and record["teacher_run"]
    )


@pytest.mark.parametrize("changed", ["scores", "weights", "further", "status"])
@pytest.mark.parametrize("published", [False, True])
def test_a_record_that_contradicts_ours_is_refused_and_ours_stays(here, there, whole, changed, published):
    run = finished_run(there).name
    if published:
        shutil.copytree(whole / "runs", here / "runs")
    else:
        take(here, whole)
    path = there / run / "record.json"
    record = record_at(path)
    if changed == "scores":
        rewrite(path, scores=record["scores"] | {"nll": record["scores"]["nll"] + 1e-6})
    elif changed == "further":
        rewrite(path, further={"peer_1": 50.0})
    elif changed == "status":
        rewrite(path, status="diverged", scores={}, weights_sha256=None)
    else:
        weights = path.with_name("weights.safetensors")
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
        rewrite(path, weights_sha256=collecting.file_checksum(weights))
    ours, theirs = files(here), files(there)
    found = take(here, there / run)
    assert files(here) == ours and files(there) == theirs
    (finding,) = found
    own = next((here / "runs").rglob(f"{run}.json")) if published else here / "store" / run / "record.json"
    assert finding.outcome == REFUSED and f"contradicts {own}, which stays" in finding.text
    assert (changed if changed != "weights" else "weights_sha256") in finding.text


def test_students_of_a_teacher_that_was_refused_are_taken_with_a_word(here, there, whole):
    student = finished_run(there)
    teacher = record_at(student / "record.json")["teacher_run"]
    take(here, whole / "store" / teacher)
    path = there / teacher / "record.json"
    rewrite(path, scores=record_at(path)["scores"] | {"nll": 0.5})
    found = {finding.run: finding for finding in take(here, there)}
    assert found[teacher].outcome == REFUSED
    students = {record["run"] for record in records(there) if record["teacher_run"] == teacher}
    assert len(students) > 1
    for run, finding in found.items():
        assert any("another making of the teacher" in remark for remark in finding.remarks) == (run in students)


@pytest.mark.parametrize("place", ["store", "runs"])
def test_ours_is_kept_even_if_it_is_torn(here, there, whole, place):
    run = finished_run(there).name
    path = here / "store" / run / "record.json"
    if place == "runs":
        shutil.copytree(whole / "runs", here / "runs")
        (path,) = (here / "runs").rglob(f"{run}.json")
    else:
        path.parent.mkdir(parents=True)
    path.write_text("torn")
    ours = files(here)
    (finding,) = take(here, there / run)
    assert finding.outcome == REFUSED and f"{path} is no record" in finding.text
    assert files(here) == ours


def test_one_torn_copy_of_ours_gives_way_to_the_other(here, there, whole):
    run = finished_run(there).name
    shutil.copytree(whole / "runs", here / "runs")
    take(here, there)
    (here / "store" / run / "record.json").write_text("torn")
    (finding,) = take(here, there / run)
    assert finding.outcome == KNOWN


def test_a_record_is_taken_without_the_images_and_without_its_teacher_and_said_so(here, there):
    student = finished_run(there)
    teacher = record_at(student / "record.json")["teacher_run"]
    ledger = ledger_of(here)
    shutil.rmtree(here / "data")
    with chdir(here):
        (finding,) = collect([student], ledger)
    unchecked = "unchecked against the images: data set 'stripes' is not here"
    assert finding.taken and finding.remarks == (unchecked, "a teacher's record is not here")
    with chdir(here):  # the student's folder comes first, the teacher's afterwards
        found = collect([student, there / teacher], ledger)
    assert [finding.outcome for finding in found] == [KNOWN, TAKEN]
    assert {finding.remarks for finding in found} == {(unchecked,)}


@pytest.mark.parametrize("others", [5, "teachers", [None, 5, "../x", []], {"a": 1}])
def test_a_record_that_names_nobody_as_a_teacher_does_no_harm(here, there, others):
    path = finished_run(there) / "record.json"
    path = rewrite(path, identity=record_at(path)["identity"] | {"co_teachers": others})
    found = take(here, there)
    assert all(finding.taken and not finding.remarks for finding in found)
    assert path.parent.name in {finding.run for finding in found}


def test_records_of_data_sets_that_params_does_not_name_are_taken_unchecked(here, there):
    path = rewrite(finished_run(there) / "record.json", dataset="../stripes")
    (finding,) = take(here, path.parent)
    assert finding.taken and "data set '../stripes' is not here" in finding.remarks[0]


@pytest.mark.parametrize("name", ["none", "params.yaml"])
def test_what_is_no_folder_is_refused_before_anything_is_taken(here, there, name):
    with pytest.raises(ValueError, match=f"{name} is no folder"):
        take(here, there, here / name)
    assert not (here / "store").exists()


def test_a_folder_without_runs_is_told(here, there, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "runs").symlink_to(there)
    found = take(here, there, here / "data", tmp_path / "linked")
    assert outcomes(found) == {("record", TAKEN): RUNS, ("folder", REFUSED): 2}
    assert {finding.path for finding in found if finding.kind == "folder"} == {here / "data", tmp_path / "linked"}


def test_a_folder_may_be_named_by_a_link(here, there, tmp_path):
    (tmp_path / "link").symlink_to(there)
    assert outcomes(take(here, tmp_path / "link")) == {("record", TAKEN): RUNS}


def test_of_two_copies_of_a_run_each_record_goes_with_its_own_weights(here, there, tmp_path):
    first = Path(shutil.copytree(there, tmp_path / "both" / "a"))
    shutil.copytree(there, tmp_path / "both" / "b")
    run = finished_run(first).name
    torn(first / run / "weights.safetensors")
    found = take(here, tmp_path / "both")
    assert outcomes(found) == {("record", TAKEN): RUNS, ("record", REFUSED): 1}
    assert kept(here / "store") == kept(there)


# checkpoints


def test_a_checkpoint_that_is_further_is_taken_and_ours_kept_as_the_one_before(here, begun):
    stop_after(here, 3)
    own = here / "store" / begun.name / "checkpoint.pt"
    before, theirs = own.read_bytes(), files(begun)
    (finding,) = take(here, begun)
    assert finding.taken and finding.kind == "checkpoint" and finding.run == begun.name
    assert own.with_name("checkpoint.previous.pt").read_bytes() == before and files(begun) == theirs
    with steps_of_runs() as taken:
        make(here)
    assert taken[begun.name] == 2
    ours = files(here)
    (finding,) = take(here, begun)
    assert finding.outcome == KNOWN and "finished here" in finding.text and files(here) == ours


def test_a_checkpoint_that_is_no_further_is_left(here, begun):
    take(here, begun)
    ours = files(here)
    (finding,) = take(here, begun)
    assert finding.outcome == KNOWN and "as far" in finding.text and files(here) == ours
    further = here / "store" / begun.name / "checkpoint.pt"
    state = torch.load(further, weights_only=True)
    save_checkpoint(state | {"position": {"phase": 0, "epoch": 0, "step": 3}}, begun / "checkpoint.pt")
    (finding,) = take(here, begun)
    assert finding.outcome == KNOWN and files(here) == ours


def test_a_checkpoint_takes_the_place_of_one_that_is_torn(here, begun):
    own = here / "store" / begun.name / "checkpoint.pt"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"torn")
    (finding,) = take(here, begun)
    assert finding.taken
    with steps_of_runs() as taken:
        make(here)
    assert taken[begun.name] == 2


def test_of_a_torn_checkpoint_the_one_before_is_taken(here, begun):
    path = begun / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    save_checkpoint(state | {"seconds": 1234.0}, path)
    torn(path)
    theirs = files(begun)
    (finding,) = take(here, begun)
    assert finding.taken and "the last one is torn" in finding.text and files(begun) == theirs
    taken = torch.load(here / "store" / begun.name / "checkpoint.pt", weights_only=True)
    assert taken["seconds"] == state["seconds"] != 1234.0


class Harm:
    """What a pickle could do."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


def changed(**changes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        state = torch.load(path, weights_only=True) | changes
        path.unlink()
        save_checkpoint({name: value for name, value in state.items() if value is not None}, path)

    return change


def with_code(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, pickle.dumps(Harm()) if name.endswith("data.pkl") else content)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (torn, "cannot be read"),
        (changed(run="0123456789abcdef"), "its run is '0123456789abcdef', not"),
        (changed(run=None), "its run is None, not"),
        (changed(revision=0), "revision 0 of the training code, and this is 1"),
        (changed(revision=None), "revision None of the training code"),
        (changed(position=None), "where it stands"),
        (changed(position={"phase": 0, "epoch": "1", "step": 0}), "where it stands"),
        (in_a_folder_of_no_run, "the name of its folder is no run's id"),
        (in_another_folder, "not 0123456789abcdef"),
        (with_code, "cannot be read"),
        (a_link, "is a link"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_checkpoint_that_is_not_right_is_refused_and_left(here, begun, spoil, reason):
    spoil(begun / "checkpoint.pt")
    ours, theirs = files(here), tree_of(begun.parent)
    (finding,) = take(here, begun.parent)
    assert finding.outcome == REFUSED and finding.kind == "checkpoint"
    assert_reason(finding, reason)
    assert files(here) == ours and tree_of(begun.parent) == theirs
    assert not (here / "harm").exists()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """A run's folder, locked as by who trains it."""
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_a_checkpoint_of_a_run_that_is_being_trained_is_left(here, begun):
    with held(begun):
        ours = files(here)
        (finding,) = take(here, begun)
    assert finding.outcome == REFUSED and "being trained there at this moment" in finding.text
    assert files(here) == ours
    assert take(here, begun)[0].taken


def test_runs_that_are_being_made_here_are_left_and_the_others_taken(here, there, begun, monkeypatch):
    monkeypatch.setattr(collecting, "PATIENCE", 0.2)
    runs = [finished_run(there).name, begun.name]
    shutil.rmtree(there / begun.name)
    for run in runs:
        (here / "store" / run).mkdir(parents=True)
    with held(here / "store" / runs[0]), held(here / "store" / runs[1]):
        found = take(here, there, begun)
    refused = {finding.run for finding in found if finding.outcome == REFUSED}
    assert refused == set(runs) and outcomes(found)["record", TAKEN] == RUNS - 2
    assert all("made here at this moment" in finding.text for finding in found if finding.run in refused)
    assert not [name for name in kept(here / "store") if name.split("/")[0] in runs]


@pytest.fixture
def holding(monkeypatch) -> Iterator[Callable]:
    """Have a run's folder held by another, who ends after a while, having done something."""
    holders = []

    def hold(folder: Path, then: Callable[[], None] = lambda: None) -> None:
        folder.mkdir(parents=True)
        holder = held(folder)
        holder.__enter__()
        holders.append(holder)

        def sleep(seconds: float) -> None:
            hold.naps += 1
            if hold.naps == 3:
                then()
                holder.__exit__(None, None, None)

        hold.naps = 0
        monkeypatch.setattr(collecting.time, "sleep", sleep)

    yield hold


def test_one_who_writes_here_for_a_moment_is_waited_for(here, there, holding):
    run = finished_run(there)
    holding(here / "store" / run.name)
    assert take(here, run)[0].taken and holding.naps == 3


@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("agrees", [False, True])
def test_what_another_has_finished_meanwhile_stays(here, there, holding, agrees, with_weights):
    run = finished_run(there)
    own = here / "store" / run.name
    before, record = {}, record_at(run / "record.json")

    def finish() -> None:
        record["scores"]["nll"] += 0.0 if agrees else 0.1
        (own / "record.json").write_text(json.dumps(seal(record | {"seconds": 9.0})))
        (own / "weights.safetensors").write_bytes(b"whatever they are")
        before.update(kept(own))

    holding(own, finish)
    if not with_weights:
        (run / "weights.safetensors").unlink()
    (finding,) = take(here, run)
    assert finding.outcome == (TAKEN if agrees else REFUSED)
    assert kept(own) == before and holding.naps == 3


@pytest.mark.parametrize("seed", range(4))
def test_no_damage_to_a_file_is_taken_in_or_crashes(here, there, begun, seed):
    """Bytes that are altered, dropped or added; what is taken in is what was there before they were."""
    generator = random.Random(seed)
    record = finished_run(there) / "record.json"
    checkpoint = begun / "checkpoint.pt"
    sound = {path: path.read_bytes() for path in (record, checkpoint)}
    state = torch.load(checkpoint, weights_only=True)
    for number in range(40):
        path = (record, checkpoint)[number % 2]
        path.write_bytes(damaged(sound[path], generator))
        (finding,) = take(here, path.parent)
        own = here / "store" / path.parent.name / path.name
        if finding.taken:
            if path == record:
                assert record_at(own) == json.loads(sound[path])
            else:
                found = torch.load(own, weights_only=True)
                assert str(found) == str(state)
            shutil.rmtree(own.parent)
        else:
            assert finding.outcome == REFUSED and not own.exists()
        path.write_bytes(sound[path])


def damaged(content: bytes, generator: random.Random) -> bytes:
    start = generator.randrange(len(content))
    kind = generator.choice(["alter", "cut", "drop", "add", "zeros"])
    if kind == "cut":
        return content[:start]
    stop = min(start + generator.choice([1, 1, 16, 4096]), len(content))
    instead = {"alter": bytes(generator.randrange(256) for _ in range(stop - start)), "drop": b""}
    instead |= {"add": content[start:stop] + b"7", "zeros": bytes(stop - start)}
    return content[:start] + instead[kind] + content[stop:]


# kills and full disks


@pytest.fixture
def mixed(tmp_path, whole, begun) -> Path:
    """Finished runs and one that was begun."""
    shutil.copytree(whole / "store", begun.parent, dirs_exist_ok=True, ignore=shutil.ignore_patterns(begun.name))
    return begun.parent


CALLS = ("replace", "fsync", "link", "unlink")


def interrupt(at: int, how: Callable[[], None]) -> None:
    """Have the call of this number, of those that change a disk, go wrong."""
    calls = iter(range(at))

    def wrapped(call: Callable) -> Callable:
        def spy(*arguments, **options):
            if next(calls, None) is None:
                how()
            return call(*arguments, **options)

        return spy

    for name in CALLS:
        setattr(os, name, wrapped(getattr(os, name)))


def in_a_process(work: Callable[[], None]) -> int:
    """Exit status, below 0 for a signal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child does not need
        child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def assert_sound(store: Path) -> None:
    """All that is named as finished is whole."""
    for record in records(store):
        weights = store / record["run"] / "weights.safetensors"
        assert record == seal(record)
        assert record["status"] == "diverged" or collecting.file_checksum(weights) == record["weights_sha256"]
    for path in store.glob("*/checkpoint.pt"):
        assert zipfile.ZipFile(path).testzip() is None


def test_a_kill_at_any_moment_loses_nothing_and_the_same_call_goes_on(tmp_path, mixed):
    expected = project(tmp_path / "expected")
    take(expected, mixed)
    assert_sound(expected / "store")
    theirs = tree_of(mixed)
    here = project(tmp_path / "here")
    generator, kills, at = random.Random(0), 0, 0
    while True:
        at += generator.randrange(1, 4)

        def killed(at=at) -> None:
            interrupt(at, lambda: os.kill(os.getpid(), signal.SIGKILL))
            take(here, mixed)

        status = in_a_process(killed)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
        assert_sound(here / "store")
        if kills % 3:  # go on from there; otherwise from nothing
            continue
        shutil.rmtree(here / "store", ignore_errors=True)
    assert kills > 10
    assert kept(here / "store") == kept(expected / "store") and tree_of(mixed) == theirs


def test_every_single_write_may_be_the_last(tmp_path, mixed):
    expected = project(tmp_path / "expected")
    take(expected, mixed)
    run = finished_run(mixed)
    here = project(tmp_path / "here")
    for source in (run, mixed / next(mixed.glob("*/checkpoint.pt")).parent.name):
        for at in range(100):
            shutil.rmtree(here / "store", ignore_errors=True)

            def killed(at=at, source=source) -> None:
                interrupt(at, lambda: os.kill(os.getpid(), signal.SIGKILL))
                take(here, source)

            status = in_a_process(killed)
            if status == 0:
                break
            assert_sound(here / "store")
            take(here, source)
            own = kept(here / "store" / source.name)
            assert own == kept(expected / "store" / source.name)
        assert at > 3


@pytest.mark.parametrize("at", [4, 5, 6, 7, 9, 11])
def test_a_full_disk_is_told_and_leaves_nothing_half_taken(here, mixed, monkeypatch, at):
    calls, fsync = iter(range(at)), os.fsync

    def full(handle: int) -> None:
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=rf"the disk is full.*{here / 'store'}"):
            take(here, mixed)
    assert_sound(here / "store")
    assert 0 < len(records(here / "store")) < RUNS - 1
    assert not [name for name in kept(here / "store") if "torn" in name]
    take(here, mixed)
    assert_sound(here / "store")
    assert len(records(here / "store")) == RUNS - 1


def test_a_store_that_cannot_be_written_is_named(here, there):
    (here / "store").write_text("in the way")
    with pytest.raises(OSError, match="store"):
        take(here, there)


@pytest.mark.parametrize("name", ["weights.safetensors", "record.json"])
def test_what_changes_while_it_is_copied_is_refused(here, there, monkeypatch, name):
    run, pieces = finished_run(there), collecting._pieces
    theirs = (run / name).read_bytes()

    def changing(source: Path) -> Iterator[bytes]:
        if source.name == name:
            source.write_bytes(theirs[:-9] + theirs[-8:])
        return pieces(source)

    with monkeypatch.context() as patch:
        patch.setattr(collecting, "_pieces", changing)
        (finding,) = take(here, run)
    assert finding.outcome == REFUSED and f"{name} has changed while it was copied" in finding.text
    assert f"{run.name}/{name}" not in kept(here / "store")
    (run / name).write_bytes(theirs)
    assert take(here, run)[0].taken
    assert kept(here / "store" / run.name) == kept(run)


@pytest.mark.parametrize("name", ["read_record", "file_checksum", "open", "load_checkpoint"])
def test_a_file_that_cannot_be_read_is_refused_and_the_rest_is_taken(here, mixed, begun, monkeypatch, name):
    run = begun if name == "load_checkpoint" else finished_run(mixed)
    read = getattr(collecting, name, open)

    def unreadable(path: Path, *arguments, **options):
        if Path(path).parent == run and Path(path).name != "lock":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path, *arguments, **options)

    ours, theirs = files(here), files(mixed)
    monkeypatch.setattr(collecting, name, unreadable, raising=False)
    found = take(here, mixed)
    (refused,) = (finding for finding in found if finding.outcome == REFUSED)
    assert refused.run == run.name and "cannot be read: Input/output error" in refused.text
    assert len(found) == RUNS and files(mixed) == theirs
    assert kept(here / "store").keys() == {each for each in kept(mixed) if not each.startswith(run.name)}
    assert ours.items() <= files(here).items()


def test_a_folder_that_cannot_be_looked_into_is_named_and_the_rest_is_taken(here, there, monkeypatch):
    run, scandir = finished_run(there), os.scandir

    def closed(place: str):
        if Path(place) == run:
            raise PermissionError(errno.EACCES, "Permission denied", place)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", closed)
    found = take(here, there)
    assert outcomes(found) == {("record", TAKEN): RUNS - 1, ("folder", REFUSED): 1}
    assert Finding(run, "", "folder", REFUSED, "cannot be looked into: Permission denied") in found


def test_two_at_once_do_what_one_does(tmp_path, here, mixed):
    expected = project(tmp_path / "expected")
    take(expected, mixed)
    ledger = ledger_of(here)  # before the children, which must not be later by the time that it takes
    start, go = os.pipe()
    children = []
    for _ in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            try:
                os.read(start, 1)
                with chdir(here):
                    refused = [finding for finding in collect([mixed], ledger) if finding.outcome == REFUSED]
                os._exit(2 if refused else 0)
            except BaseException:
                os._exit(1)
        children.append(child)
    os.write(go, b"...")
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert kept(here / "store") == kept(expected / "store")


# publishing and telling


def test_final_runs_behind_a_grid_are_published_when_its_cells_have_come(here, there):
    cells = {record["run"] for record in records(there) if record["held_out"] and record["teacher_run"]}
    first = [path for path in there.iterdir() if path.name not in cells]
    found = take(here, *first)
    published, foreign = publish(here, {finding.run for finding in found})
    assert len(published) == RUNS - 3
    (final,) = foreign
    assert record_at(there / final / "record.json")["hyperparameters"]["temperature"] in (2.0, 5.0)
    found = take(here, *(there / run for run in cells))
    published, foreign = publish(here, {finding.run for finding in found})
    assert {spec.id for spec in published} == {*cells, final} and not foreign
    assert publish(here) == ([], [])


def test_publishing_removes_nothing_and_leaves_what_is_as_it_is(here, whole):
    take(here, whole / "store")
    publish(here)
    stray = here / "runs" / "quick" / "response" / "stripes" / "0123456789abcdef.json"
    shutil.copyfile(next((here / "runs").rglob("*.json")), stray)
    torn_one = next(path for path in (here / "runs").rglob("*.json") if path != stray)
    before = {path: path.stat().st_ino for path in (here / "runs").rglob("*.json")}
    whole_one = torn_one.read_bytes()
    torn(torn_one)
    published, _ = publish(here)
    assert [spec.id for spec in published] == [torn_one.stem] and torn_one.read_bytes() == whole_one
    after = {path: path.stat().st_ino for path in (here / "runs").rglob("*.json")}
    assert before.keys() == after.keys()
    assert {path for path in before if before[path] != after[path]} == {torn_one}


def test_what_params_does_not_ask_for_stays_in_the_store_and_is_said(here, there):
    tree = yaml.safe_load((here / "params.yaml").read_text())
    del tree["methods"]["response"]["assisted"]
    (here / "params.yaml").write_text(yaml.safe_dump(tree))
    found = take(here, there)
    published, foreign = publish(here, {finding.run for finding in found})
    assert len(published) == RUNS - 2 and len(foreign) == 2
    assert {path.parent.name for path in (here / "store").glob("*/record.json")} >= set(foreign)
    assert not {path.stem for path in (here / "runs").rglob("*.json")} & set(foreign)


def test_teachers_of_further_seeds_are_asked_for_but_no_stage_publishes_them(tmp_path, here):
    tree = yaml.safe_load((here / "params.yaml").read_text())
    tree["methods"]["response"] = {"kd": {"teachers": 2}}
    tree["grids"]["small"]["rows"] = {}
    (here / "params.yaml").write_text(yaml.safe_dump(tree))
    other = project(tmp_path / "other")
    (other / "params.yaml").write_text(yaml.safe_dump(tree))
    make(here)
    found = take(other, here / "store")
    assert outcomes(found) == {("record", TAKEN): 3}
    published, foreign = publish(other, {finding.run for finding in found})
    assert len(published) == 2 and not foreign and files(other / "runs") == files(here / "runs")


def test_all_that_teach_the_cells_of_a_grid_are_published(tmp_path, here):
    tree = yaml.safe_load((here / "params.yaml").read_text())
    tree["methods"]["response"] = {
        "first": {"method": "ce"},
        "middle": {"method": "born_again", "taught_by": {"row": "first"}},
        "kd": {"taught_by": {"row": "middle"}},
    }
    (here / "params.yaml").write_text(yaml.safe_dump(tree))
    other = project(tmp_path / "other")
    (other / "params.yaml").write_text(yaml.safe_dump(tree))
    make(here)
    found = take(other, here / "store")
    published, foreign = publish(other, {finding.run for finding in found})
    assert len(published) == len(found) == 2 + 2 + 2 + 3 and not foreign
    assert files(other / "runs") == files(here / "runs")


def test_other_images_of_the_name_are_refused_all(here, there):
    images = stripes()
    other = ImageSet("stripes", 255 - images.x_train, images.y_train, images.x_test, np.array(images.y_test))
    with chdir(here):
        save_image_set(other, data_path("stripes"))
    assert outcomes(take(here, there)) == {("record", REFUSED): RUNS}
    assert not (here / "store").exists()


def test_an_intake_takes_single_folders_as_they_arrive(here, whole):
    ledger = ledger_of(here)
    with chdir(here):
        intake = Intake(ledger)
    for folder in sorted((whole / "store").iterdir()):
        (finding,) = intake.take_in(folder)
        assert finding.taken and finding.run == folder.name
        assert intake.take_in(folder)[0].outcome == KNOWN
    assert kept(here / "store") == kept(whole / "store")


def test_a_store_beneath_is_not_written_to(here, there, tmp_path):
    take(here, there)
    before = files(here)
    with chdir(here):
        ledger = open_ledger(store=Store(tmp_path / "out", tmp_path / "published", beneath=store_of(here)))
        found = collect([there], ledger)
    assert outcomes(found) == {("record", TAKEN): RUNS}
    assert files(here) == before and kept(tmp_path / "out") == kept(there)


def test_the_summary_names_what_was_refused_and_counts_the_rest(here, there, whole):
    path = finished_run(there) / "record.json"
    torn(path)
    (there / os.fsdecode(b"odd\xff")).mkdir()
    (there / os.fsdecode(b"odd\xff") / "record.json").write_text("{}")
    found = take(here, there, whole / "runs")
    lines = list(summary(found))
    "\n".join(lines).encode()
    refused = [line for line in lines if line.startswith("refused: ")]
    assert len(refused) == 2 and any(f"{path} (record): is no record of a run" in line for line in refused)
    assert any(r"odd\udcff/record.json" in line for line in refused)
    assert [line for line in lines if line.startswith("without weights: ")] == [f"without weights: {path.parent.name}"]
    assert lines[-1] == (
        f"{RUNS} records taken, {RUNS - 1} records known, 0 checkpoints taken, 0 checkpoints known, "
        "2 refused and left where they are"
    )


def test_a_remark_on_many_runs_is_one_line(here, whole):
    lines = list(summary(take(here, whole / "runs")))
    (line,) = (line for line in lines if line.startswith("without weights"))
    assert line.endswith(" and 3 more") and line.count(", ") == 4


def test_a_student_whose_copy_is_published_here_knows_its_teacher(here, there, whole):
    shutil.copytree(whole / "runs", here / "runs")
    (finding,) = take(here, finished_run(there))
    assert finding.taken and not finding.remarks
