"""Runs made by a Ray cluster: as the serial ones to the bit, none lost or made twice, whatever becomes of workers."""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from test_execute import profile, stripes, taught

from kdstudy import cluster as module
from kdstudy.checkpoint import BadFile, save_weights
from kdstudy.cluster import RayCluster
from kdstudy.device import data_path
from kdstudy.execute import Executor, open_ledger
from kdstudy.image_set import save_image_set
from kdstudy.models import build_model
from kdstudy.records import BadRecord
from kdstudy.stopping import Failed, Stopped
from kdstudy.store import Store

LONG = 30  # times the two epochs of the others
ROWS = {
    "ce": {},
    "kd": {"temperature": 2.0, "length": LONG},
    "broken": {"method": "kd", "kd_weight": 1.0e38, "temperature": 10.0},
}


def write(**changes) -> None:
    tree = taught(ROWS) | profile(checkpoint_seconds=0.05, **changes)
    Path("params.yaml").write_text(yaml.safe_dump(tree))


def project(folder: Path) -> None:
    """A study in the current folder."""
    save_image_set(stripes(), folder / data_path("stripes"))


@pytest.fixture(scope="module")
def workers() -> Iterator[RayCluster]:
    token = Path.home() / ".ray" / "auth_token"
    before = signal.getsignal(signal.SIGTERM), token.exists()
    with RayCluster("local:4") as cluster:
        assert (signal.getsignal(signal.SIGTERM), token.exists()) == before
        yield cluster
    assert not [each for each in map(command, descendants(os.getpid())) if "ray" in each]


@pytest.fixture(scope="module")
def serial(tmp_path_factory) -> Path:
    """The store of a study whose runs were made in this process, one after the other."""
    folder = tmp_path_factory.mktemp("serial")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("KDSTUDY_DEVICE", raising=False)
        project(folder)
        write()
        executor().run_stage("response")
    return folder / "store"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KDSTUDY_DEVICE", raising=False)
    project(tmp_path)
    write()
    return tmp_path


def executor(**options) -> Executor:
    return Executor(open_ledger(store=Store(Path("store"), Path("runs"))), "stripes", **options)


def runs(row: str) -> list[str]:
    """The ids of a row's runs, by seed."""
    return [spec.id for spec in executor().ledger.runs("stripes", "response") if spec.row == row]


def records(store: Path) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in store.glob("*/record.json")}


def results(store: Path) -> dict[str, tuple]:
    """What a run's outcome is, without what it took."""
    told = ("status", "scores", "history", "weights_sha256", "identity")
    weights = {path.parent.name: path.read_bytes() for path in store.glob("*/weights.safetensors")}
    return {run: ([record[name] for name in told], weights.get(run)) for run, record in records(store).items()}


def sittings(store: Path) -> dict[str, int]:
    return {run: len(record["sessions"]) for run, record in records(store).items()}


def worker_of(run: str) -> int | None:
    """The process in whose folder there is a checkpoint of this run."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            folder = Path(os.readlink(process / "cwd"))
        except OSError:
            continue
        if folder.name.startswith("kdstudy-") and list(folder.glob(f"*/{run}/checkpoint.pt")):
            return int(process.name)
    return None


def descendants(process: int) -> list[int]:
    """All processes that a process has started, or that these have."""
    tasks = Path(f"/proc/{process}/task").iterdir()
    children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return children + [each for child in children for each in descendants(child)]


def command(process: int) -> str:
    """The command line of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def wait_until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not come to pass"
        time.sleep(0.05)


@dataclass
class Watched:
    """A cluster of whose steps someone is told first."""

    cluster: RayCluster
    watch: Callable

    @property
    def seats(self) -> int:
        return self.cluster.seats

    def __call__(self, order, groups, tell, should_stop) -> None:
        def both(*step) -> None:
            self.watch(*step)
            tell(*step)

        self.cluster(order, groups, both, should_stop)


def test_a_killed_worker_costs_what_it_did_since_its_checkpoint(folder, serial, workers):
    victim, killed = runs("kd")[1], []
    told: dict[str, list[float]] = {}
    store = Store(Path("store"))

    def watch(spec, epochs, text) -> None:
        told.setdefault(spec.id, []).append(epochs)
        if spec.id == victim and epochs > 10 and not killed and store.checkpoint(victim).exists():
            assert store.is_held(victim) and not store.is_held(spec.teacher.id)
            os.kill(worker_of(victim), signal.SIGKILL)
            killed.append(len(told[victim]))

    with pytest.warns(UserWarning, match="a worker of the cluster was lost .*another takes up its work"):
        executor(spread=Watched(workers, watch)).run_stage("response")
    assert killed and len(results(serial)) == 2 + 2 * len(ROWS)
    assert results(Path("store")) == results(serial)
    assert sittings(Path("store")) == sittings(serial) | {victim: 2}
    assert 1 < told[victim][killed[0]] < 2 * LONG - 1  # it went on from its checkpoint
    del told[victim]
    assert all(epochs == sorted(epochs) for epochs in told.values())  # and nobody else began again
    assert {record["status"] for run, record in records(Path("store")).items() if run in runs("broken")} == {"diverged"}
    assert not list(Path("store").glob("*/checkpoint*"))
    assert not any(map(store.is_held, results(serial)))
    said = [record["sessions"][0] for record in records(Path("store")).values()]
    assert {session["command"] for session in said} == {records(serial)[victim]["sessions"][0]["command"]}


class Budget:
    """Says to stop when there are checkpoints of both runs in the store."""

    def __init__(self, names):
        self._paths = [Path("store", run, "checkpoint.pt") for run in names]

    def __call__(self) -> bool:
        return all(path.exists() for path in self._paths)


def test_stopped_and_resumed_beside_another_process(folder, serial, workers):
    write(cohort=2)
    both, ours = runs("kd"), Store(Path("store"))
    with pytest.raises(Stopped):
        executor(spread=workers, should_stop=Budget(both)).run_stage("response")
    stopped = records(Path("store"))
    assert not set(both) & set(stopped)
    for run in both:  # nothing that was done is lost
        there = Path(f"/proc/{worker_of(run)}/cwd/store/{run}/checkpoint.pt")
        assert ours.checkpoint(run).read_bytes() == there.read_bytes()

    # meanwhile another process makes one of them
    other, left = both
    lock = open(ours.record_path(other).with_name("lock"))
    fcntl.flock(lock, fcntl.LOCK_EX)

    def finish() -> None:
        with lock:
            wait_until(lambda: ours.record_path(left).exists(), 60)
            for path in (serial / other).glob("[rw]*"):
                shutil.copyfile(path, ours.record_path(other).with_name(path.name))

    thread = threading.Thread(target=finish)
    thread.start()
    executor(spread=workers).run_stage("response")
    thread.join()
    assert results(Path("store")) == results(serial)
    assert {run: records(Path("store"))[run] for run in stopped} == stopped  # what was finished stays
    counts = sittings(Path("store"))
    assert counts.pop(left) == 2 and set(counts.values()) == {1}


def test_an_error_in_a_worker_ends_all_and_is_raised_here(folder, serial, workers):
    shutil.copytree(serial, "store", ignore=shutil.ignore_patterns("record.json"))
    teachers = [spec.id for spec in executor().ledger.runs("stripes", "teacher")]
    for run in runs("ce") + runs("kd") + runs("broken"):
        shutil.rmtree(Path("store", run))
    save_weights(
        build_model("cnn_small", classes=4, channels=1, image_size=8), Path("store", teachers[0], "weights.safetensors")
    )
    with pytest.raises(BadFile, match=f"{teachers[0]}/weights.safetensors belong to another network: "):
        executor(spread=workers).run_stage("response")


@pytest.mark.parametrize(
    ("seconds", "place"),
    [(0.0, "before it began .is this kdstudy installed there.."), (0.5, r"at stripes teacher seed \d")],
)
def test_workers_that_are_lost_again_and_again_are_given_up(folder, workers, monkeypatch, seconds, place):
    class Mortal:  # of no module that a process would have to import first
        def begin(self, *_):
            if not seconds:
                os._exit(1)
            threading.Timer(seconds, os._exit, [1]).start()

        def make(self, *_): ...

    workers._dismiss()
    monkeypatch.setattr(module, "_Worker", Mortal)
    with (
        pytest.warns(UserWarning, match="a worker of the cluster was lost"),
        pytest.raises(Failed, match=f"a worker was lost {place}, 3 times; what was finished is kept"),
    ):
        executor(spread=workers).run_stage("teacher")


def test_a_local_cluster_listens_to_this_machine_only(workers):
    assert workers.seats == 4
    (node,) = workers._ray.nodes()
    assert node["NodeManagerAddress"] == "127.0.0.1"


def test_other_code_is_refused():
    with pytest.raises(Failed, match=r"another kdstudy .* than its driver .code 0123456789abcdef.: install the same"):
        module._Worker().begin("0123456789abcdef", {}, "cpu", [])


def test_ray_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r'pip install "kdstudy\[cluster\]"'):
        RayCluster("auto")


@pytest.mark.parametrize("address", ["", "local", "host", "host:port", ":6379", "ray://host:10001", "host:70000"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(ValueError, match=f"local:N, auto or host:port, not '{address}'"):
        RayCluster(address)


@pytest.mark.parametrize("address", ["local:", "local:0", "local:-1", "local:two", "local:1.5"])
def test_a_number_of_workers_that_is_none_is_refused(address):
    with pytest.raises(ValueError, match=f"local:N, with N workers, not '{address}'"):
        RayCluster(address)


def test_an_address_where_nobody_answers_is_told_soon():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(Failed, match=f"no Ray cluster answers at {address} .*ray start --head"):
            RayCluster(address)
        assert time.monotonic() - started < 8


@pytest.fixture
def sent(serial, tmp_path, monkeypatch) -> tuple[dict[str, bytes], str, Store]:
    """What a worker sends of a finished run, its id, and a store that has a checkpoint of it."""
    record = next(record for record in records(serial).values() if record["status"] == "finished")
    files = {path.name: path.read_bytes() for path in (serial / record["run"]).glob("[rw]*")}
    store = Store(tmp_path / "store")
    module._take_in({"checkpoint.pt": b"far"}, record["run"], store)
    assert store.checkpoint(record["run"]).read_bytes() == b"far"
    return files, record["run"], store


def test_what_a_worker_sends_is_kept_as_it_is(sent):
    files, run, store = sent
    module._take_in(files, run, store)
    assert {path.name: path.read_bytes() for path in (store.root / run).iterdir()} == files


@pytest.mark.parametrize("damage", ["weights", "record", "run"])
def test_what_does_not_fit_is_not_kept(sent, damage):
    files, run, store = sent
    if damage == "weights":
        files["weights.safetensors"] += b" "
    elif damage == "record":
        files["record.json"] = files["record.json"].replace(b'"test_accuracy": ', b'"test_accuracy": 1')
    else:
        run = "0" * 16
    with pytest.raises((Failed, BadRecord)):
        module._take_in(files, run, store)
    assert not store.record_path(run).exists() and not store.weights(run).exists()


def test_a_worker_sends_what_is_new_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    worker, ended = module._Worker(), threading.Event()
    monkeypatch.setattr(worker, "_make", lambda cohort: ended.wait(20))

    class Spec:
        id = "run"

    news = worker.make((Spec(),), {"store/run/checkpoint.pt": b"first"})
    assert (news.files, news.over) == ({}, False)  # it is where it came from
    Path("new").write_bytes(b"second")
    os.replace("new", "store/run/checkpoint.pt")
    assert [worker.look(False).files for _ in range(2)] == [{"run": {"checkpoint.pt": b"second"}}, {}]
    for name in ("record.json", "weights.safetensors"):
        Path("store/run", name).write_bytes(b"done")
    assert worker.look(False).files == {"run": {"record.json": b"done", "weights.safetensors": b"done"}}
    ended.set()
    news = worker.look(False)
    assert (news.files, news.over) == ({}, True)


def test_folders_of_processes_that_were_killed_are_swept_away(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("kdstudy-dead", "kdstudy-alive"):
        (tmp_path / f"{name}.lock").touch()
        (tmp_path / name / "store").mkdir(parents=True)
    with open(tmp_path / "kdstudy-alive.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with module._own_folder() as own:
            assert own.is_dir()
            names = {path.name for path in tmp_path.iterdir()}
            assert names == {"kdstudy-alive", "kdstudy-alive.lock", own.name, f"{own.name}.lock"}
    assert {path.name for path in tmp_path.iterdir()} == {"kdstudy-alive", "kdstudy-alive.lock"}


def test_nothing_of_a_local_cluster_outlives_its_driver(folder):
    program = (
        "from test_cluster import *\n"
        "with RayCluster('local:1') as workers:\n"
        "    print('started', flush=True)\n"
        "    executor(spread=workers, report=lambda *_: print('works', flush=True)).run_stage('response')\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    with subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE) as driver:
        try:
            assert [driver.stdout.readline() for _ in range(2)] == [b"started\n", b"works\n"]
            before = descendants(driver.pid)
            commands = list(map(command, before))
            assert [each for each in commands if each.startswith("ray::_Worker")]
        finally:
            driver.kill()
    # two that only look after the others notice it a minute later
    wait_until(lambda: {command(each) for each in before} <= {"", "ray::DashboardAgent", "ray::RuntimeEnvAgent"})
    left = [Path(each.split("--log_dir=")[1].split("/session_")[0]) for each in commands if "--log_dir=" in each]
    assert left and left[0].is_dir()
    with module._own_folder():
        assert not left[0].exists()  # whoever comes next sweeps up
