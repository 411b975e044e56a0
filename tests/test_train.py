"""The loop against one written out in plain PyTorch; stops, kills and resumes; faults; no waiting in an epoch."""

import itertools
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_methods import HYPERPARAMETERS, OPTIONS, OTHER_STUDENTS, OTHER_TEACHERS, PARTNERS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from toy import (
    CPU,
    IMAGES,
    PADDING,
    Plain,
    TwoPhases,
    augment_slowly,
    clone,
    difference,
    gpu,
    images_seen,
    keras_epochs,
    make_bank,
    make_recipe,
    make_scheme,
    make_training,
    pictures,
    run_session,
    tiny_net,
    tiny_teacher,
)

from kdstudy import evaluate, train
from kdstudy.checkpoint import BadFile, load_checkpoint, remove_checkpoint, save_checkpoint
from kdstudy.core import Phase
from kdstudy.data import Draws
from kdstudy.models import Ensemble, build_model
from kdstudy.response import SphericalKD, VanillaKD
from kdstudy.schemes import Cast, Losses, Scheme, Turn, sample_batch
from kdstudy.stopping import Stopped, never
from kdstudy.study import METHODS, SCHEMES, scheme_of
from kdstudy.train import Diverged, Training, position_of


def literal_loss(method, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    chosen = student_logits.log_softmax(dim=1)[torch.arange(len(labels)), labels]
    terms = {"ce": -method.ce_weight * chosen.mean()}
    if method.kd_weight:
        target = (teacher_logits / 4).softmax(dim=1)
        gap = target.log() - (student_logits / 4).log_softmax(dim=1)
        terms["kd"] = method.kd_weight * 16 * (target * gap).sum() / len(labels)
    return terms


def literal_accuracy(network, seed: int, count: int) -> float:
    images, labels = pictures(count, seed=seed)
    network.eval()
    with torch.no_grad():
        guesses = network(next(make_bank(images, labels).plain(count))).logits.argmax(dim=1)
    return 100 * float(np.mean(guesses.numpy() == labels))


def literal_run(method, recipe, student, teacher, seed: int):
    """Training as a textbook writes it: one image at a time, a plain optimiser, the learning rate by hand."""
    images, labels = pictures()
    draws = Draws.make(seed=seed, stream=0, epochs=recipe.epochs, images=IMAGES, padding=PADDING, flip=True, device=CPU)
    optimiser = torch.optim.SGD(
        student.parameters(),
        lr=math.nan,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
        foreach=False,
        fused=False,
    )
    history = []
    for epoch in range(recipe.epochs):
        rate = 0.2 if epoch < 2 else 0.04
        optimiser.param_groups[0]["lr"] = rate
        student.train()
        sums = {"train_accuracy": 0.0}
        for chosen in torch.arange(IMAGES).split(recipe.batch):
            index = draws.order[epoch, chosen].long()
            crops = [
                augment_slowly(images[i], PADDING, shift, flip)
                for i, shift, flip in zip(index, draws.shift[epoch, chosen], draws.flip[epoch, chosen], strict=True)
            ]
            batch, wanted = torch.from_numpy(np.stack(crops)), torch.from_numpy(labels)[index]
            student_logits = student(batch).logits
            with torch.no_grad():
                teacher_logits = teacher(batch).logits
            terms = literal_loss(method, student_logits, teacher_logits, wanted)
            optimiser.zero_grad()
            sum(terms.values()).backward()
            optimiser.step()
            sums["train_accuracy"] += 100 * (student_logits.argmax(dim=1) == wanted).sum().item()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.item() * len(index)
        row = {"epoch": epoch, "learning_rate": rate}
        row |= {name: total / IMAGES for name, total in sums.items()}
        row |= {"test_accuracy": literal_accuracy(student, 1, 30)}
        history.append(row | {"held_out_accuracy": literal_accuracy(student, 2, 40)})
    return history, clone(student.state_dict()), optimiser.state_dict()["state"]


@pytest.mark.parametrize("method", [Plain(), Plain(ce_weight=0.7), VanillaKD()], ids=repr)
@pytest.mark.parametrize("changes", [{}, {"nesterov": True, "batch": 22}, {"weight_decay": 0.0, "batch": 7}], ids=str)
def test_the_loop_is_a_plain_pytorch_loop(method, changes):
    recipe = make_recipe(**changes)
    session = run_session(make_scheme(method, seed=5), recipe, seed=9)
    history, state, momentum = literal_run(method, recipe, tiny_net(5), tiny_teacher().eval(), seed=9)
    for row, expected in zip(session.history, history, strict=True):
        assert row.pop("phase") == "distil"
        assert row == pytest.approx(expected, rel=1e-10)
    close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
    close(session.state, {f"student.{name}": tensor for name, tensor in state.items()})
    close(session.momentum["distil"], momentum)
    assert state["norm.num_batches_tracked"] == 3 * math.ceil(IMAGES / recipe.batch)


PLATEAU = {"schedule": "plateau", "epochs": 8, "factor": 0.5, "milestones": ()}
RUNS = {
    "cross-entropy": (Plain(), make_recipe(epochs=2), {"dropout": 0.4}),
    "measured teacher": (SphericalKD(), make_recipe(epochs=2, nesterov=True), {"dropout": 0.4}),
    "two phases": (TwoPhases(), make_recipe(), {"dropout": 0.4}),
    "two phases, plateau": (TwoPhases(), make_recipe(**PLATEAU), {"dropout": 0.4}),
    "half precision": (VanillaKD(), make_recipe(epochs=2, precision="bf16"), {"dtype": torch.float32}),
}
every_run = pytest.mark.parametrize("name", RUNS)


def session_of(name: str, checkpoint: Path | None = None, **options):
    """A session of one of the runs, with networks built anew and torch's generator wherever that left it."""
    return run_session(*new_run(name), checkpoint, **options)


def new_run(name: str):
    """Scheme and recipe of one of the runs, or of a method of the study."""
    if name not in RUNS:
        return studys_scheme(name), make_recipe(epochs=3, precision="fp32")
    method, recipe, networks = RUNS[name]
    return make_scheme(method, **networks), recipe


@every_run
def test_stopped_after_any_step_and_resumed_equals_uninterrupted(name, tmp_path):
    whole = session_of(name)
    assert not whole.stopped
    for stop in range(1, whole.steps + 1):
        checkpoint = tmp_path / f"{stop}.pt"
        first = session_of(name, checkpoint, stop_after=stop)
        assert first.stopped and first.steps == stop
        second = session_of(name, checkpoint)
        assert second.steps == whole.steps - stop
        outcome = second.outcome | {"momentum": first.momentum | second.momentum}
        assert difference(outcome, whole.outcome) is None, f"stopped after step {stop}"


@every_run
def test_stopped_after_every_step_equals_uninterrupted(name, tmp_path):
    whole = session_of(name)
    momentum, sessions = {}, 0
    while True:
        session = session_of(name, tmp_path / "checkpoint.pt", stop_after=1)
        momentum |= session.momentum
        if not session.stopped:
            break
        sessions += 1
    assert sessions == whole.steps
    assert difference(session.outcome | {"momentum": momentum}, whole.outcome) is None


# a parent that has only imported forks processes that train, so that torch is not imported anew for each
KILLED = """
import os, signal, sys, torch, toy
from pathlib import Path
from test_train import new_run

folder = Path(sys.argv[1])
torch.set_num_threads(int(sys.argv[3]))
torch.optim.SGD([torch.zeros(1)], lr=1.0)  # imports the rest of torch
write = Path.write_bytes

def train(where, count):
    def die_at(place):
        nonlocal count
        count -= place == where
        return place == where and count == 0

    def on_step(done, text):
        if die_at("step"):
            os.kill(os.getpid(), signal.SIGKILL)

    def write_or_die(path, content):
        if die_at("write"):
            write(path, bytes(content)[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, content)

    Path.write_bytes = write_or_die
    scheme, recipe = new_run(sys.argv[2])
    training = toy.make_training(
        scheme, recipe, checkpoint=folder / "checkpoint.pt", checkpoint_seconds=0.0, on_step=on_step
    )
    training.run()
    torch.save({"history": training.history, "state": scheme.state_dict()}, folder / "outcome.pt")

for where, count in (("step", int(sys.argv[4])), ("write", int(sys.argv[5])), ("nowhere", 0)):
    child = os.fork()
    if not child:
        train(where, count)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(list(folder.iterdir())))
"""


@pytest.mark.parametrize(
    ("name", "steps", "step", "write"),
    # an offline, an online, a self-taught and a data-free run
    [("two phases", 19, 8, 7), ("mutual", 9, 4, 3), ("snapshot", 9, 4, 3), ("zero_shot", 6, 3, 2)],
)
def test_killed_in_an_epoch_and_in_a_write_equals_uninterrupted(name, steps, step, write, tmp_path):
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    threads = torch.get_num_threads()
    command = [sys.executable, "-c", KILLED, *map(str, (tmp_path, name, threads, step, write))]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    # each step has a checkpoint, and the one before is kept: killed in one step, then in the write of a later one,
    # which leaves half a file beside both, and what was to be the one before; the third process finishes
    assert printed.split() == [str(-signal.SIGKILL), "2", str(-signal.SIGKILL), "4", "0", "5"]
    whole = run_session(*new_run(name))
    assert whole.steps == steps
    found = torch.load(tmp_path / "outcome.pt", weights_only=True)
    assert difference(clone(found), {"history": whole.history, "state": whole.state}) is None


def test_checkpoints_are_written_as_often_as_asked(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr("kdstudy.train.save_checkpoint", lambda state, path: written.append(state["position"]["step"]))
    for seconds, expected in ((1e9, []), (0.0, [1, 2, 3] * 3)):
        written.clear()
        checkpoint = tmp_path / "checkpoint.pt"
        make_training(make_scheme(Plain()), make_recipe(), checkpoint=checkpoint, checkpoint_seconds=seconds).run()
        assert written == expected


def test_a_stop_without_a_checkpoint_path_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Stopped):
        make_training(make_scheme(Plain()), make_recipe(), should_stop=lambda: True).run()
    assert not list(tmp_path.iterdir())


def test_seconds_add_up_over_sessions(tmp_path):
    checkpoint = tmp_path / "checkpoint.pt"
    first = make_training(make_scheme(Plain()), make_recipe(), checkpoint=checkpoint, should_stop=lambda: True)
    with pytest.raises(Stopped):
        first.run()
    state = load_checkpoint(checkpoint, CPU)
    assert 0 < state["seconds"] == first.seconds < 100
    save_checkpoint(state | {"seconds": 1000.0}, checkpoint)
    second = make_training(make_scheme(Plain()), make_recipe(), checkpoint=checkpoint)
    second.run()
    assert 1000 < second.seconds < 1100


def test_the_teacher_is_measured_once_however_often_a_run_is_resumed(tmp_path, monkeypatch):
    measured = []

    def counted(self, adapters, views, calibrate=SphericalKD.calibrate):
        measured.append(self)
        calibrate(self, adapters, views)

    monkeypatch.setattr(SphericalKD, "calibrate", counted)
    for stop in (1, 2, None):
        session_of("measured teacher", tmp_path / "checkpoint.pt", stop_after=stop)
    assert len(measured) == 1


def test_sessions_are_kept_with_what_they_were_and_took(tmp_path):
    checkpoint = tmp_path / "checkpoint.pt"
    hosts = ("first", "second", "third")
    for number, host in enumerate(hosts):
        asks = itertools.count(1)
        training = make_training(
            make_scheme(Plain()),
            make_recipe(),
            checkpoint=checkpoint,
            session={"host": host, "cores": [number]},
            should_stop=lambda asks=asks, last=host == "third": next(asks) == 2 and not last,
        )
        assert training.sessions == [{"host": host, "cores": [number], "seconds": 0.0}]
        if host != "third":
            with pytest.raises(Stopped):
                training.run()
            assert load_checkpoint(checkpoint, CPU)["sessions"] == training.sessions
    training.run()
    assert [session["host"] for session in training.sessions] == list(hosts)
    assert [session["cores"] for session in training.sessions] == [[0], [1], [2]]
    assert all(session["seconds"] > 0 for session in training.sessions)
    assert sum(session["seconds"] for session in training.sessions) == pytest.approx(training.seconds)


# leaving at any question


@pytest.fixture
def asked_often(monkeypatch):
    """Evaluations of seven images at a time, so that there is something between their batches."""
    monkeypatch.setattr(evaluate, "logits_of", partial(evaluate.logits_of, batch=7))


def asked_session(name: str, checkpoint: Path | None = None, stop_at: int | None = None) -> tuple[Training, bool, int]:
    """A session that is stopped at this question, whoever asks it; whether it was, and how many were asked."""
    scheme, recipe = new_run(name)
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == stop_at

    training = make_training(scheme, recipe, checkpoint=checkpoint, should_stop=should_stop)
    try:
        training.run()
    except Stopped:
        return training, True, asked
    return training, False, asked


def outcome_of(training: Training) -> dict:
    return {"history": training.history, "state": clone(training.scheme.state_dict())}


@pytest.mark.parametrize("name", [*RUNS, "snapshot", "mutual", "okddip", "zero_shot", "crd", "few_sample"])
def test_stopped_at_any_question_and_resumed_equals_uninterrupted(name, tmp_path, asked_often):
    whole, stopped, questions = asked_session(name)
    assert not stopped
    evaluations = len(whole.history) * (4 + 5)  # between 5 batches of the test images and 6 of the held-out ones
    steps = run_session(*new_run(name)).steps
    prepared = (math.ceil(IMAGES / 8) - 1) if name in ("measured teacher", "two phases", "two phases, plateau") else 0
    assert questions == evaluations + steps + (2 if name == "few_sample" else prepared)
    for stop_at in range(1, questions + 1, 1 if name in ("cross-entropy", "two phases") else 5):
        checkpoint = tmp_path / f"{stop_at}.pt"
        first, stopped, asked = asked_session(name, checkpoint, stop_at)
        assert stopped and asked == stop_at
        assert checkpoint.exists() == bool(first.current)  # nothing is known before the first phase
        torch.rand(stop_at)
        second, stopped, asked = asked_session(name, checkpoint)
        assert not stopped and asked + stop_at >= questions
        assert difference(outcome_of(second), outcome_of(whole)) is None, f"stopped at question {stop_at}"


@pytest.mark.usefixtures("asked_often")
def test_stopped_in_an_evaluation_no_step_is_taken_again(tmp_path):
    checkpoint = tmp_path / "checkpoint.pt"
    steps, told = 3, []
    for stop_at in (steps + 1, 1, 4 + 5):  # in the first evaluation, there again, and at its last question
        first, stopped, asked = asked_session("cross-entropy", checkpoint, stop_at)
        assert stopped and asked == stop_at
        assert position_of(load_checkpoint(checkpoint, CPU)) == (0, 0, steps) and first.history == []
    scheme, recipe = new_run("cross-entropy")
    make_training(scheme, recipe, checkpoint=checkpoint, on_step=lambda done, text: told.append(text)).run()
    assert told == ["distil epoch 2/2"] * steps
    assert difference(clone(scheme.state_dict()), outcome_of(asked_session("cross-entropy")[0])["state"]) is None


def test_an_evaluation_on_another_device_is_not_asked_about(monkeypatch):
    training = make_training(make_scheme(Plain()), make_recipe(), should_stop=lambda: pytest.fail("asked"))
    training.start()
    training.begin_epoch()
    training.begin_step()
    training.step(training.batch(training.rows))
    asks = []
    usual = train.count_hits
    monkeypatch.setattr(train, "count_hits", lambda *rest: asks.append(rest[2]) or usual(*rest[:2]))
    training.tally()
    training.device = torch.device("cuda")
    training.tally()
    assert asks == [training.surroundings.should_stop] * 2 + [never] * 2


# ends that are kept


@pytest.mark.parametrize("name", ["two phases", "two phases, plateau", "snapshot", "few_sample"])
def test_a_finished_run_is_kept_and_is_finished_at_once(name, tmp_path):
    checkpoint = tmp_path / "checkpoint.pt"
    scheme, recipe = new_run(name)
    whole = make_training(scheme, recipe, checkpoint=checkpoint)
    whole.run()
    whole.made_by = {"runs": 3, "way": "fused", "graph": True}
    whole.save()
    again = make_training(*new_run(name), checkpoint=checkpoint, on_step=lambda *_: pytest.fail("a step"))
    again.start()
    assert again.finished and again.ended and not again.diverged
    assert (again.made_by, again.seconds) == (whole.made_by, whole.seconds)
    assert again.run() == whole.history
    assert difference(outcome_of(again), outcome_of(whole)) is None
    assert position_of(load_checkpoint(checkpoint, CPU)) == (len(whole.phases), 0, 0)
    again.save()  # and once more
    third = make_training(*new_run(name), checkpoint=checkpoint)
    assert third.run() == whole.history and len(third.sessions) == 3


def test_a_diverged_run_is_kept_with_its_history(tmp_path):
    def training():
        recipe = make_recipe(milestones=(1,), factor=1e250)
        return make_training(make_scheme(Plain()), recipe, checkpoint=tmp_path / "checkpoint.pt")

    first = training()
    with pytest.raises(Diverged) as caught:
        first.run()
    assert first.diverged is caught.value and first.ended and not first.finished
    first.save()
    again = training()
    again.start()
    assert again.ended and not again.finished
    with pytest.raises(Diverged) as same:
        again.run()
    assert str(same.value) == str(caught.value)
    assert [list(row) for row in same.value.history] == [list(row) for row in caught.value.history]
    assert str(same.value.history) == str(caught.value.history) == str(again.history)  # NaN is not itself
    assert len(again.history) == 2


# checkpoints of something else


def test_a_checkpoint_of_another_revision_is_ignored(tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint.pt"
    whole = session_of("two phases")
    session_of("two phases", checkpoint, stop_after=13)
    monkeypatch.setattr("kdstudy.train.REVISION", -1)
    again = session_of("two phases", checkpoint)
    assert again.steps == whole.steps
    assert difference(again.outcome, whole.outcome) is None


def test_a_torn_checkpoint_stops_the_run_by_name_if_there_is_none_before(tmp_path):
    checkpoint = tmp_path / "checkpoint.pt"
    session_of("cross-entropy", checkpoint, stop_after=2)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(BadFile, match=f"checkpoint {checkpoint} cannot be read"):
        session_of("cross-entropy", checkpoint)


def test_after_a_torn_checkpoint_a_run_goes_on_from_the_one_before(tmp_path):
    checkpoint = tmp_path / "checkpoint.pt"
    whole = session_of("two phases")
    session_of("two phases", checkpoint, stop_after=12, checkpoint_seconds=0.0)
    raw = checkpoint.read_bytes()
    checkpoint.unlink()
    checkpoint.write_bytes(raw[:-100])
    with pytest.warns(UserWarning, match=f"checkpoint {checkpoint} cannot be read"):
        second = session_of("two phases", checkpoint)
    assert second.steps == whole.steps - 11
    assert difference(second.history, whole.history) is None and difference(second.state, whole.state) is None


def test_a_checkpoint_from_before_there_were_sessions_is_taken(tmp_path):
    checkpoint = tmp_path / "checkpoint.pt"
    whole = session_of("two phases")
    first = session_of("two phases", checkpoint, stop_after=13)
    state = load_checkpoint(checkpoint, CPU)
    for name in ("run", "diverged", "sessions", "made_by"):
        del state[name]
    save_checkpoint(state, checkpoint)
    training = make_training(*new_run("two phases"), checkpoint=checkpoint, run="any", session={"host": "here"})
    training.run()
    assert difference(outcome_of(training), {"history": whole.history, "state": whole.state}) is None
    assert [session.get("host") for session in training.sessions] == ["here"] and first.stopped


def refused(checkpoint: Path, training: Training) -> str:
    """With which words a training refuses a checkpoint, which stays as it is."""
    before = {each: each.read_bytes() for each in checkpoint.parent.iterdir()}
    with pytest.raises(BadFile) as caught:
        training.run()
    assert {each: each.read_bytes() for each in checkpoint.parent.iterdir()} == before
    head, tail = f"checkpoint {checkpoint} is none of this run: ", "; remove it to start the run anew"
    words = str(caught.value)
    assert words.startswith(head) and words.endswith(tail)
    return words.removeprefix(head).removesuffix(tail)


class Renamed(Plain):
    """The same losses under another name."""

    def objective(self, *views):
        (term,) = super().objective(*views).values()
        return {"loss": term}


class Elsewhere(Plain):
    """The same in a phase of another name."""

    def phases(self):
        return (Phase("elsewhere", self.objective),)


class Longer(TwoPhases):
    """Two phases, and one more between them."""

    def phases(self):
        first, last = super().phases()
        return first, Phase("between", last.objective, last.trains), last


def test_a_checkpoint_of_another_run_or_of_other_code_is_refused_by_name(tmp_path):
    checkpoint = tmp_path / "checkpoint.pt"
    recipe = make_recipe()

    def training(scheme=None, changes=None, run="one", **options):
        scheme, changed = scheme or make_scheme(Plain()), make_recipe(**changes or {})
        return make_training(scheme, changed, checkpoint=checkpoint, run=run, **options)

    asks = itertools.count(1)
    with pytest.raises(Stopped):
        training(should_stop=lambda: next(asks) == 4).run()  # in the second epoch
    others = {
        "it is of the run 'one', not 'another'": training(run="another"),
        "scheme.student.layer.weight is a tensor of float64 of shape (3, 2, 3, 3), not a tensor of float64 of shape "
        "(4, 2, 3, 3)": training(make_scheme(Plain(), student=tiny_net(0, 4))),
        "scheme.adapters.regressor.weight is absent": training(make_scheme(TwoPhases())),
        "it stands at step 1 of epoch 1, beyond the end": training(changes={"epochs": 1, "milestones": ()}),
        "optimisers.distil.state.0.step is absent": training(changes={"optimiser": "adam"}),
        "optimisers.elsewhere is absent": training(make_scheme(Elsewhere())),
        "it sums ce, correct, and the method has loss, correct": training(make_scheme(Renamed())),
    }
    for words, other in others.items():
        assert refused(checkpoint, other) == words
    assert training().run() == make_training(make_scheme(Plain()), recipe).run()


def test_a_checkpoint_of_a_phase_that_there_is_not_is_refused(tmp_path):
    checkpoint = tmp_path / "checkpoint.pt"
    run_session(make_scheme(Longer()), make_recipe(), checkpoint, stop_after=22)
    other = make_training(make_scheme(TwoPhases()), make_recipe(), checkpoint=checkpoint)
    assert refused(checkpoint, other) == "it stands in phase 2 of 2"  # where there is no third one, none is over
    state = load_checkpoint(checkpoint, CPU)
    for phase in (3, -1):
        save_checkpoint(state | {"position": {"phase": phase, "epoch": 0, "step": 0}}, checkpoint)
        other = make_training(make_scheme(TwoPhases()), make_recipe(), checkpoint=checkpoint)
        assert refused(checkpoint, other) == f"it stands in phase {phase} of 2"


def test_where_a_checkpoint_stands_can_be_compared(tmp_path):
    places = []
    for stop in (1, 5, 6, 10, 12, 19):
        checkpoint = tmp_path / f"{stop}.pt"
        session_of("two phases", checkpoint, stop_after=stop)
        places.append(position_of(load_checkpoint(checkpoint, CPU)))
    assert places == [(0, 0, 1), (0, 0, 5), (0, 1, 1), (0, 1, 5), (1, 0, 2), (1, 2, 3)] == sorted(places)
    for wrong in ({}, {"position": None}, {"position": {"phase": 0, "epoch": 0}}, {"position": {"phase": 0.0}}):
        with pytest.raises(BadFile, match="does not say where it stands: position"):
            position_of(wrong)


# states in which something is of a wrong kind


def places_in(value, place=()) -> list[tuple]:
    """The way to every value in nested dicts and lists."""
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list):
        inner = enumerate(value)
    else:
        return [place]
    return [place, *(way for key, part in inner for way in places_in(part, (*place, key)))]


JUNK = [None, True, 3, -1, 2.5, "x", [], [1], {}, {"x": 1}, torch.zeros(2), torch.zeros(2, dtype=torch.int64)]
NUMBERS = (int, float)


def is_of_another_kind(junk, value) -> bool:
    if isinstance(junk, Tensor) and isinstance(value, Tensor):
        return (junk.dtype, junk.shape) != (value.dtype, value.shape)
    return type(junk) is not type(value) and not (type(junk) in NUMBERS and type(value) in NUMBERS)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """States of a run of two phases in the middle of either, before an evaluation and at the end; and its outcome."""
    checkpoint, states = tmp_path_factory.mktemp("interrupted") / "checkpoint.pt", []
    for stop in (3, 10, 13):
        session_of("two phases", checkpoint, stop_after=stop)
        states.append(load_checkpoint(checkpoint, CPU))
        remove_checkpoint(checkpoint)
    whole = make_training(*new_run("two phases"), checkpoint=checkpoint)
    whole.run()
    whole.save()
    return checkpoint, [*states, load_checkpoint(checkpoint, CPU)], outcome_of(whole)


MIDDLE, BEFORE_END, END = 0, 1, 3  # of the states
ONE, TWO = torch.zeros(1, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("stands", "way", "value", "words"),
    [
        (MIDDLE, ("random", "cpu"), torch.zeros(5000), "random.cpu is a tensor of float32 of shape (5000,), not"),
        (MIDDLE, ("random", "cpu"), torch.zeros(3, dtype=torch.uint8), "random.cpu is a tensor of uint8 of shape (3,)"),
        (MIDDLE, ("random", "cpu"), torch.zeros_like(torch.get_rng_state()), "its random numbers are none: "),
        (MIDDLE, ("optimisers", "regress", "param_groups", 0, "params"), [1, 0], "optimisers.regress has other param"),
        (MIDDLE, ("optimisers",), {}, "optimisers.regress is absent"),
        (MIDDLE, ("rates",), {}, "it has learning rates of [] instead of ['regress']"),
        (MIDDLE, ("rates",), {"regress": 0.3, "x": 0.1}, "it has learning rates of ['regress', 'x'] instead"),
        (MIDDLE, ("sums",), {"names": [], "values": None}, "sums.values is NoneType, not a tensor of float64 of shape"),
        (MIDDLE, ("sums", "values"), ONE, "sums.values is a tensor of float64 of shape (1,), not"),
        (BEFORE_END, ("sums",), {"names": ["regress", "x"], "values": TWO}, "sums.correct is absent"),
        (BEFORE_END, ("position", "step"), 6, "it stands at step 6 of epoch 1, beyond the end"),
        (MIDDLE, ("position", "step"), -1, "it stands at step -1 of epoch 0, beyond the end"),
        (MIDDLE, ("position", "epoch"), 2, "it stands at step 3 of epoch 2, beyond the end"),
        (MIDDLE, ("position", "epoch"), -1, "it stands at step 3 of epoch -1, beyond the end"),
        (END, ("diverged",), True, "it stands in phase 2 of 2"),
        (MIDDLE, ("position", "phase"), 2, "it stands in phase 2 of 2"),
    ],
)
def test_a_state_that_does_not_fit_together_is_refused_by_name(stands, way, value, words, interrupted):
    checkpoint, states, _ = interrupted
    holder = state = clone(states[stands])
    for key in way[:-1]:
        holder = holder[key]
    holder[way[-1]] = value
    remove_checkpoint(checkpoint)
    save_checkpoint(state, checkpoint)
    assert refused(checkpoint, make_training(*new_run("two phases"), checkpoint=checkpoint)).startswith(words)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_state_of_wrong_kinds_is_refused_or_ends_alike(data, interrupted):
    checkpoint, states, outcome = interrupted
    state = clone(data.draw(st.sampled_from(states), label="state"))
    top = data.draw(st.sampled_from(sorted(state)), label="part")
    way = data.draw(st.sampled_from(places_in(state[top], (top,))), label="way")
    holder = state
    for key in way[:-1]:
        holder = holder[key]
    old = holder[way[-1]]
    change = data.draw(st.sampled_from(["replace", "remove", "add"]), label="change")
    if change == "add" and isinstance(old, dict):
        old["surplus"] = data.draw(st.sampled_from(JUNK), label="junk")
    elif change == "remove" and isinstance(holder, dict):
        assume(way[-1] not in ("ce", "regress"))  # only the method knows what its terms were
        del holder[way[-1]]
    else:
        junk = [each for each in JUNK if is_of_another_kind(each, old)]
        holder[way[-1]] = data.draw(st.sampled_from(junk), label="junk")
    remove_checkpoint(checkpoint)
    save_checkpoint(state, checkpoint)
    raw = checkpoint.read_bytes()
    training = make_training(*new_run("two phases"), checkpoint=checkpoint)
    try:
        training.run()
    except BadFile as error:
        assert str(checkpoint) in str(error) and "remove it" in str(error)
        assert checkpoint.read_bytes() == raw
        return
    assert difference(outcome_of(training), outcome) is None


@pytest.mark.parametrize(("milestones", "factor", "epochs"), [((), 0.2, 1), ((1,), 1e250, 2)])
def test_a_loss_that_is_not_finite_ends_the_run_with_its_history(milestones, factor, epochs):
    rate = 1e250 if not milestones else 0.2
    recipe = make_recipe(learning_rate=rate, milestones=milestones, factor=factor)
    training = make_training(make_scheme(Plain()), recipe)
    with pytest.raises(Diverged, match=f"loss is not finite in epoch {epochs - 1} of 'distil'") as caught:
        training.run()
    assert [math.isfinite(row["ce"]) for row in caught.value.history] == [True] * (epochs - 1) + [False]
    assert [row["epoch"] for row in caught.value.history] == list(range(epochs))


def test_the_plateau_schedule_is_keras_rule_on_the_held_out_accuracy():
    recipe = make_recipe(**PLATEAU | {"epochs": 40})
    history = run_session(make_scheme(Plain()), recipe).history
    rates = [row["learning_rate"] for row in history]
    accuracies = [row["held_out_accuracy"] for row in history]
    assert rates == keras_epochs(accuracies, 0.2, 0.5, 2, 3)
    assert len(set(rates)) > 1 and len(rates) < 40  # it was lowered, and it stopped


def test_the_plateau_schedule_ends_its_phase_only():
    early = {"epochs": 40, "schedule": "plateau", "batch": 22, "learning_rate": 1e-12}
    method = with_phase_recipe(early)
    history = run_session(make_scheme(method), make_recipe()).history
    # the student does not change while the regressor is trained, so the first epoch stays the best
    assert [row["phase"] for row in history] == ["regress"] * 4 + ["distil"] * 3
    assert [row["epoch"] for row in history] == [0, 1, 2, 3, 0, 1, 2]


def test_each_phase_has_a_plateau_of_its_own():
    method = with_phase_recipe({"learning_rate": 0.3, "factor": 0.1})
    history = run_session(make_scheme(method), make_recipe(**PLATEAU | {"epochs": 40})).history
    for phase, rate, factor in (("regress", 0.3, 0.1), ("distil", 0.2, 0.5)):
        rows = [row for row in history if row["phase"] == phase]
        expected = keras_epochs([row["held_out_accuracy"] for row in rows], rate, factor, 2, 3)
        assert [row["learning_rate"] for row in rows] == expected


def with_phase_recipe(recipe: dict) -> TwoPhases:
    """The two phases, the first with this recipe."""

    class Changed(TwoPhases):
        def phases(self):
            first, last = super().phases()
            return Phase(first.name, first.objective, first.trains, recipe), last

    return Changed()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 23}, "batch must be at most the 22 training images, not 23"),
        ({"crop_padding": 2}, "crop_padding must be 1 as in the bank, not 2"),
        ({"schedule": "plateau"}, "schedule 'plateau' needs held-out images"),
    ],
)
@pytest.mark.parametrize("in_phase", [False, True], ids=["run", "phase"])
def test_a_recipe_that_does_not_fit_the_data_is_refused_before_training(changes, message, in_phase):
    method, changes = (with_phase_recipe(changes), {}) if in_phase else (Plain(), changes)
    bank = make_bank(*pictures(), padding=PADDING)
    with pytest.raises(ValueError, match=message):
        Training(make_scheme(method), make_recipe(**changes), bank, seed=0, watch={"test": bank})


def test_same_seed_same_result_and_another_seed_another():
    def outcome(seed: int, drawn_before: int = 0):
        scheme = make_scheme(VanillaKD(), dropout=0.4)
        torch.rand(drawn_before)
        return run_session(scheme, make_recipe(), seed=seed).outcome

    assert difference(outcome(1), outcome(1, drawn_before=5)) is None
    assert difference(outcome(1)["state"], outcome(2)["state"])


def test_runs_of_one_seed_see_the_same_images_whatever_the_method():
    wanted = images_seen(make_scheme(Plain()))
    assert len(wanted) == 9
    for method in (VanillaKD(), SphericalKD(), TwoPhases()):
        assert difference(images_seen(make_scheme(method)), wanted) is None
    assert not torch.equal(wanted[0], images_seen(make_scheme(Plain()), seed=4)[0])


def test_the_last_phase_has_stream_0_and_earlier_ones_their_own():
    scheme, seen = make_scheme(TwoPhases()), []
    scheme.student.register_forward_pre_hook(lambda network, arguments: seen.append(arguments[0].clone()))
    make_training(scheme, make_recipe(), seed=8).run()
    bank = make_bank(*pictures(), padding=PADDING)
    # the first phase's two epochs show the student five batches and two sets to be evaluated on, each
    for stream, batch, first in ((1, 5, 0), (0, 8, 14)):
        draws = Draws.make(seed=8, stream=stream, epochs=1, images=IMAGES, padding=PADDING, flip=True, device=CPU)
        starts = range(0, IMAGES, batch)
        expected = [bank.augmented(*draws.batch(draws.rows(0, start, min(start + batch, IMAGES)))) for start in starts]
        assert difference(seen[first : first + len(expected)], expected) is None


def test_each_phase_changes_what_it_trains_and_nothing_else():
    scheme = make_scheme(TwoPhases())
    states = [("start", clone(scheme.state_dict()))]
    make_training(
        scheme, make_recipe(), on_step=lambda done, text: states.append((text.split()[0], clone(scheme.state_dict())))
    ).run()
    by_phase = {phase: [state for name, state in states if name == phase] for phase in ("start", "regress", "distil")}
    start, regress, distil = by_phase["start"][0], by_phase["regress"], by_phase["distil"]
    assert (len(regress), len(distil)) == (10, 9)

    def changed(before, after) -> set[str]:
        return {name for name in before if not torch.equal(before[name], after[name])}

    regressor = {"adapters.regressor.weight", "adapters.regressor.bias"}
    assert changed(start, regress[-1]) - {"adapters.spread.running_mean"} == regressor
    assert changed(regress[-1], distil[-1]) == {name for name in start if name.startswith("student.")}


class TakingTurns(Scheme):
    """Two networks that take turns, each pulled towards what the other says by then."""

    names = ("left", "right")

    def __init__(self):
        super().__init__()
        self.left, self.right = tiny_net(1), tiny_net(2)

    @classmethod
    def assemble(cls, cast, method, sample, options):
        return cls()

    def phases(self):
        return (Phase("mutual", self.objective, trains=self.names),)

    def turns(self, phase):
        return tuple(Turn(name, (name,)) for name in self.names)

    def objective(self, own, other, labels, adapters):
        return F.cross_entropy(own, labels) + (own - other).square().mean()

    def losses(self, phase, turn, batch, half):
        logits = {name: self.get_submodule(name)(batch.images).logits for name in self.names}
        own, other = (logits[name] for name in sorted(self.names, key=turn.name.__ne__))
        loss = self.objective(own, other, batch.labels, None)  # not detached: a gradient is left in the other network
        return Losses({turn.name: loss}, {"correct": (own.argmax(dim=1) == batch.labels).sum()})

    @property
    def deployed(self):
        return self.left


def test_turns_are_taken_in_order_and_each_trains_its_own_modules(tmp_path):
    recipe = make_recipe(epochs=1, milestones=())
    session = run_session(TakingTurns(), recipe, seed=6)
    peers = TakingTurns().train()
    optimisers = {
        name: torch.optim.SGD(peers.get_submodule(name).parameters(), 0.2, 0.9, 0, 5e-4) for name in peers.names
    }
    draws = Draws.make(seed=6, stream=0, epochs=1, images=IMAGES, padding=PADDING, flip=True, device=CPU)
    bank = make_bank(*pictures(), padding=PADDING)
    for start in range(0, IMAGES, 8):
        index, shift, flip = draws.batch(draws.rows(0, start, min(start + 8, IMAGES)))
        images, labels = bank.augmented(index, shift, flip), bank.labels[index]
        for own, optimiser in optimisers.items():
            logits = {name: peers.get_submodule(name)(images).logits for name in peers.names}
            (other,) = set(peers.names) - {own}
            peers.zero_grad()
            peers.objective(logits[own], logits[other], labels, None).backward()
            optimiser.step()
    torch.testing.assert_close(session.state, clone(peers.state_dict()), rtol=1e-10, atol=1e-12)
    assert {"left", "right"} < set(session.history[0])
    run_session(TakingTurns(), recipe, tmp_path / "checkpoint.pt", seed=6, stop_after=2)
    resumed = run_session(TakingTurns(), recipe, tmp_path / "checkpoint.pt", seed=6)
    assert difference(resumed.outcome, session.outcome) is None


class Duel(TakingTurns):
    """As above, with turns of several steps and of another recipe; notes what the loop tells it."""

    def __init__(self, turns, bank=None):
        super().__init__()
        self._turns, self._own_bank, self.told = turns, bank, []

    def turns(self, phase):
        return self._turns

    def bank(self, phase, bank):
        return self._own_bank or bank

    def begin_epoch(self, epoch, epochs, held_out):
        self.told.append(("epoch", epoch, epochs, held_out))

    def begin_step(self, step):
        self.told.append(("step", step))


class AdamByHand:
    """Kingma & Ba 2015 with weight decay as part of the gradient, one number after another's formula."""

    def __init__(self, parameters, weight_decay):
        self.parameters, self.weight_decay = list(parameters), weight_decay
        self.forget()

    def forget(self):
        self.count = 0
        self.means = [[torch.zeros_like(p) for p in self.parameters] for _ in range(2)]

    @torch.no_grad()
    def step(self, rate):
        self.count += 1
        for place, p in enumerate(self.parameters):
            g = p.grad + self.weight_decay * p
            m, v = (means[place] for means in self.means)
            m.copy_(0.9 * m + 0.1 * g)
            v.copy_(0.999 * v + 0.001 * g * g)
            p -= rate * (m / (1 - 0.9**self.count)) / ((v / (1 - 0.999**self.count)).sqrt() + 1e-8)


class MomentumByHand:
    def __init__(self, parameters, weight_decay):
        self.parameters, self.weight_decay = list(parameters), weight_decay
        self.forget()

    def forget(self):
        self.momenta = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, rate):
        for p, momentum in zip(self.parameters, self.momenta, strict=True):
            momentum.copy_(0.9 * momentum + p.grad + self.weight_decay * p)
            p -= rate * momentum


def shorten(parameters, clip):
    """By hand: all gradients together are no longer than `clip`."""
    length = math.sqrt(sum(p.grad.square().sum().item() for p in parameters))
    if clip and length > clip:
        for p in parameters:
            p.grad *= clip / (length + 1e-6)
    return length


SGD_COSINE = {"schedule": "cosine", "epochs": 4, "milestones": ()}
DUELS = {
    "several adam steps": ((3, {"optimiser": "adam", "learning_rate": 0.02, "weight_decay": 0.0}, False), {}),
    "adam that forgets": ((3, {"optimiser": "adam", "learning_rate": 0.02}, True), {}),
    "momentum that is forgotten": ((2, {"learning_rate": 0.05}, True), {}),
    "cosine": ((1, {}, False), SGD_COSINE),
    "cosine in cycles": ((1, {}, False), SGD_COSINE | {"cycles": 2}),
    "clipped": ((2, {"clip": 0.8}, False), {"clip": 0.3}),
    "one turn's own schedule": ((1, {"schedule": "constant", "learning_rate": 0.1}, False), SGD_COSINE),
}


def duel(name, **options):
    (times, own, fresh), changes = DUELS[name]
    turns = Turn("left", ("left",), times=times, recipe=own, fresh=fresh), Turn("right", ("right",))
    return Duel(turns, **options), make_recipe(**{"epochs": 2, "milestones": (1,)} | changes)


def rate_by_hand(recipe, epoch, step):
    if recipe.schedule == "constant":
        return recipe.learning_rate
    if recipe.schedule == "cosine":
        length = recipe.epochs / recipe.cycles
        done = (epoch % length + step / 3) / length
        return recipe.learning_rate * (1 + math.cos(math.pi * done)) / 2
    return recipe.learning_rate * (0.2 if epoch >= 1 else 1)


@pytest.mark.parametrize("name", DUELS)
def test_turns_with_a_recipe_several_steps_and_a_short_memory_are_a_plain_loop(name):
    scheme, recipe = duel(name)
    (times, own, fresh), _ = DUELS[name]
    session = run_session(scheme, recipe, seed=6)
    peers = TakingTurns().train()
    recipes = {"left": replace(recipe, **own), "right": recipe}
    kinds = {"adam": AdamByHand, "sgd": MomentumByHand}
    optimisers = {
        each: kinds[chosen.optimiser](peers.get_submodule(each).parameters(), chosen.weight_decay)
        for each, chosen in recipes.items()
    }
    draws = Draws.make(seed=6, stream=0, epochs=recipe.epochs, images=IMAGES, padding=PADDING, flip=True, device=CPU)
    bank, lengths, last = make_bank(*pictures(), padding=PADDING), [], {}
    for epoch in range(recipe.epochs):
        last = {"left": 0.0, "right": 0.0}
        for step, start in enumerate(range(0, IMAGES, 8)):
            index, shift, flip = draws.batch(draws.rows(epoch, start, min(start + 8, IMAGES)))
            images, labels = bank.augmented(index, shift, flip), bank.labels[index]
            for each, optimiser in optimisers.items():
                if each == "left" and fresh:
                    optimiser.forget()
                for _ in range(times if each == "left" else 1):
                    logits = {other: peers.get_submodule(other)(images).logits for other in peers.names}
                    (other,) = set(peers.names) - {each}
                    peers.zero_grad()
                    loss = peers.objective(logits[each], logits[other], labels, None)
                    loss.backward()
                    lengths.append(shorten(optimiser.parameters, recipes[each].clip))
                    optimiser.step(rate_by_hand(recipes[each], epoch, step))
                last[each] += loss.item() * len(index) / IMAGES  # that of the last step of a turn
    torch.testing.assert_close(session.state, clone(peers.state_dict()), rtol=1e-8, atol=1e-10)
    assert {each: session.history[-1][each] for each in last} == pytest.approx(last, rel=1e-7)
    if recipe.clip:
        assert min(lengths) < 0.8 < max(lengths)


@pytest.mark.parametrize("name", ["adam that forgets", "cosine in cycles", "several adam steps", "clipped"])
def test_turns_are_stopped_and_resumed_at_any_step(name, tmp_path):
    scheme, recipe = duel(name)
    whole = run_session(scheme, recipe, seed=6)
    for stop in range(1, whole.steps + 1):
        checkpoint = tmp_path / f"{stop}.pt"
        first = run_session(duel(name)[0], recipe, checkpoint, seed=6, stop_after=stop)
        second = run_session(duel(name)[0], recipe, checkpoint, seed=6)
        assert first.stopped and first.steps + second.steps == whole.steps
        outcome = second.outcome | {"momentum": first.momentum | second.momentum}
        assert difference(outcome, whole.outcome) is None, f"stopped after step {stop}"


def test_a_turn_computes_no_gradient_for_what_it_does_not_train():
    scheme, recipe = duel("cosine")
    touched, turn_of = [], []
    for each in scheme.names:
        for parameter in scheme.get_submodule(each).parameters():
            parameter.register_hook(lambda gradient, each=each: touched.append((turn_of[-1], each)))
    losses = scheme.losses
    scheme.losses = lambda phase, turn, *rest: turn_of.append(turn.name) or losses(phase, turn, *rest)
    make_training(scheme, recipe).run()
    assert set(touched) == {("left", "left"), ("right", "right")}


@pytest.mark.parametrize("stop", [None, 1, 3, 4, 5])
def test_a_scheme_is_told_of_every_epoch_and_step_once(stop, tmp_path):
    scheme, recipe = duel("several adam steps")
    if stop:
        session = run_session(scheme, recipe, tmp_path / "checkpoint.pt", stop_after=stop)
        assert session.stopped
        told = scheme.told
        scheme, _ = duel("several adam steps")
        run_session(scheme, recipe, tmp_path / "checkpoint.pt")
        told += scheme.told
    else:
        run_session(scheme, recipe)
        told = scheme.told
    assert [entry[:3] for entry in told] == [
        *(("epoch", 0, 2), ("step", 0), ("step", 1), ("step", 2)),
        *(("epoch", 1, 2), ("step", 3), ("step", 4), ("step", 5)),
    ]
    (held_out,) = {len(entry[3]) for entry in told if entry[0] == "epoch"}
    assert held_out == 40


def test_without_held_out_images_the_scheme_is_given_none():
    scheme, recipe = duel("cosine")
    Training(scheme, recipe, make_bank(*pictures(), padding=PADDING), seed=0, watch={}).run()
    assert {entry[3] for entry in scheme.told if entry[0] == "epoch"} == {None}


def test_a_phase_is_trained_on_the_images_that_the_scheme_names():
    own = make_bank(*pictures(10, seed=8), padding=PADDING)
    scheme, recipe = duel("cosine", bank=own)
    seen, found, losses = [], [], scheme.losses

    def note(phase, turn, batch, half):
        answer = losses(phase, turn, batch, half)
        seen.append(batch)
        found.append(len(batch.labels) * next(iter(answer.terms.values())).item())
        return answer

    scheme.losses = note
    history = make_training(scheme, recipe, seed=6).run()
    left = seen[::2]
    assert [len(batch.labels) for batch in left] == [8, 2] * 4
    draws = Draws.make(seed=6, stream=0, epochs=4, images=10, padding=PADDING, flip=True, device=CPU)
    for number, batch in enumerate(left):
        place = (number // 2, 8 * (number % 2), 8 * (number % 2) + len(batch.labels))
        index, shift, flip = draws.batch(draws.rows(*place))
        assert torch.equal(batch.images, own.augmented(index, shift, flip))
        assert torch.equal(batch.labels, own.labels[index])
    for epoch, row in enumerate(history):  # means are over these images
        assert row["left"] == pytest.approx((found[4 * epoch] + found[4 * epoch + 2]) / 10, rel=1e-12)
    assert len(scheme.told) == 4 + 8


def test_under_the_plateau_schedule_a_turn_keeps_its_own_pace():
    turns = (
        Turn("left", ("left",)),
        Turn("right", ("right",), recipe={"optimiser": "adam", "learning_rate": 0.002}),
        Turn("third", ("right",), recipe={"schedule": "constant", "learning_rate": 0.004}),
    )
    scheme = Duel(turns)
    scheme.losses = lambda phase, turn, batch, half: TakingTurns.losses(
        scheme, phase, turn if turn.name != "third" else turns[1], batch, half
    )
    rates = []

    def note(done, text):
        rates.append([training.current.optimisers[turn.name].param_groups[0]["lr"] for turn in turns])

    training = make_training(scheme, make_recipe(**PLATEAU | {"epochs": 40}), on_step=note)
    history = training.run()
    expected = keras_epochs([row["held_out_accuracy"] for row in history], 0.2, 0.5, 2, 3)
    assert len(set(expected)) > 1
    assert [row["learning_rate"] for row in history] == expected
    for number, (left, right, third) in enumerate(rates):
        assert left == expected[number // 3]
        assert right == pytest.approx(left / 100) and third == 0.004


@pytest.mark.parametrize("times", [0, -1, 1.5, True])
def test_a_turn_of_no_steps_is_refused(times):
    with pytest.raises(ValueError, match="times must be a whole number of at least 1"):
        Turn("one", ("student",), times=times)


def test_a_turns_recipe_that_does_not_fit_is_refused_before_training():
    for wrong, message in (({"batch": 23}, "batch must be at most"), ({"optimiser": "adamw"}, "optimiser must be one")):
        with pytest.raises(ValueError, match=message):
            make_training(Duel((Turn("left", ("left",), recipe=wrong),)), make_recipe())


class Crowd(TakingTurns):
    """Notes the batches that it is given; has three."""

    batches = 3

    def __init__(self, own_images, strong=False):
        super().__init__()
        self.own_images, self.wants_strong, self.seen = own_images, strong, []

    def losses(self, phase, turn, batch, half):
        if turn.name == "left":
            self.seen.append(batch)
        return super().losses(phase, turn, batch, half)


@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("own_images", [False, True])
def test_several_batches_are_of_the_same_images_or_of_others(own_images, strong):
    scheme = Crowd(own_images, strong)
    make_training(scheme, make_recipe(epochs=2, milestones=()), seed=6).run()
    plain = Crowd(own_images)
    plain.batches = 1
    make_training(plain, make_recipe(epochs=2, milestones=()), seed=6).run()
    assert len(scheme.seen) == 6
    for batch, alone in zip(scheme.seen, plain.seen, strict=True):
        assert alone.others == () and len(batch.others) == 2
        assert torch.equal(batch.images, alone.images) and torch.equal(batch.labels, alone.labels)
        bank = make_bank(*pictures())
        for other in batch.others:
            assert torch.equal(other.indices, batch.indices) != own_images
            assert torch.equal(other.labels, bank.labels[other.indices])
            assert not torch.equal(other.images, batch.images)
            assert (other.strong is not None) == strong and other.others == ()
            assert not strong or not torch.equal(other.strong, batch.strong)
        assert not torch.equal(batch.others[0].images, batch.others[1].images)
    if own_images:  # each sees every image once an epoch
        for number in range(2):
            seen = torch.cat([batch.others[number].indices for batch in scheme.seen[:3]])
            assert sorted(seen.tolist()) == list(range(IMAGES))


@gpu
@pytest.mark.parametrize("name", DUELS)
def test_turns_on_a_gpu_are_those_on_the_cpu(name):
    sessions = []
    with torch.backends.cudnn.flags(enabled=False):
        for device in (CPU, torch.device("cuda")):
            scheme, recipe = duel(name)
            sessions.append(run_session(scheme.to(device), recipe, device=device, seed=6))
    torch.testing.assert_close(*(session.state for session in sessions), rtol=1e-7, atol=1e-9)


def test_progress_is_told_in_epochs_over_all_phases():
    told = []
    make_training(make_scheme(TwoPhases()), make_recipe(), on_step=lambda *progress: told.append(progress)).run()
    epochs = [k / 5 for k in range(1, 11)] + [2 + k / 3 for k in range(1, 10)]
    assert [done for done, _ in told] == pytest.approx(epochs)
    assert (told[0][1], told[9][1], told[-1][1]) == ("regress epoch 1/2", "regress epoch 2/2", "distil epoch 3/3")


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp64"])
def test_precision_is_that_of_the_training_passes_and_nothing_else(precision):
    dtype = torch.float64 if precision == "fp64" else torch.float32
    scheme, dtypes = make_scheme(VanillaKD(), dtype=dtype), set()

    def note(module, arguments, output):
        dtypes.add((module.training, output.dtype))

    scheme.student.layer.register_forward_hook(note)
    history = run_session(scheme, make_recipe(precision=precision)).history
    assert dtypes == {(True, torch.bfloat16 if precision == "bf16" else dtype), (False, dtype)}
    assert {parameter.dtype for parameter in scheme.parameters()} == {dtype}
    exact = run_session(make_scheme(VanillaKD()), make_recipe(precision="fp64")).history
    for term in ("ce", "kd"):
        losses, expected = ([row[term] for row in rows] for rows in (history, exact))
        assert losses == pytest.approx(expected, rel={"bf16": 0.05, "fp32": 1e-3, "fp64": 0.0}[precision])


def test_the_loop_lowers_the_loss_it_is_given():
    history = run_session(make_scheme(Plain()), make_recipe(epochs=40, milestones=(30,), batch=11)).history
    assert history[-1]["ce"] < 0.9 * history[0]["ce"]


class NoTraffic(TorchDispatchMode):
    """Refuses every operation that on a GPU would make the host wait, also inside the backward pass."""

    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "lift_fresh")

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        name = operation.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in arguments[1]
        )
        if name in self.waiting or masked or (keywords or {}).get("device", CPU) != CPU:
            raise AssertionError(f"{operation} in an epoch")
        return operation(*arguments, **keywords or {})


@contextmanager
def no_traffic() -> Iterator[None]:
    def refuse(tensor, *arguments, **keywords):
        raise AssertionError("a tensor is read on the host in an epoch")

    with pytest.MonkeyPatch.context() as patch, NoTraffic():
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__"):
            patch.setattr(Tensor, name, refuse)
        yield


@pytest.mark.parametrize(
    "wait",
    [
        *("x.item()", "x.tolist()", "x.numpy()", "x.cpu()", "bool(x)", "float(x)", "np.asarray(x)", "x[x > 0]"),
        *("torch.nonzero(x)", "torch.unique(x)", "torch.equal(x, x)", "x + torch.tensor(4.0)", "torch.as_tensor(4.0)"),
        "(x * y).masked_select(x > 0)",
    ],
)
def test_the_guard_refuses_what_would_wait(wait):
    names = {"x": torch.ones(2)[0], "y": torch.ones((), requires_grad=True), "torch": torch, "np": np}
    with pytest.raises(AssertionError, match="in an epoch"), no_traffic():
        eval(wait, names)


METHODS_OF_TESTS = {"two_phases": TwoPhases, "plain": Plain}


def studys_network(wanted: str | int) -> nn.Module:
    if isinstance(wanted, int):
        return Ensemble(studys_network("cnn_small") for _ in range(wanted))
    return build_model(wanted, classes=3, image_size=8)


def studys_scheme(key: str, device=CPU):
    """A method of the study on two of its networks, on 8 x 8 images."""
    torch.manual_seed(0)
    method = (METHODS | METHODS_OF_TESTS)[key](**HYPERPARAMETERS.get(key, {}))
    cls = SCHEMES[scheme_of(type(method))]
    teachers = [studys_network(OTHER_TEACHERS.get(key, "cnn_small")).to(device)] if cls.needs_teacher else []
    bank = make_bank(*pictures(size=(8, 8)), dtype=torch.float32, device=device)

    def build(name: str) -> nn.Module:
        return studys_network(name).to(device)

    cast = Cast(build, OTHER_STUDENTS.get(key, "wrn_10_0.25"), PARTNERS.get(key, ()), teachers)
    options = OPTIONS.get(key, {})
    options = options | ({"batch": 16} if "batch" in options else {})  # there are 22 images
    return cls.assemble(cast, method, sample_batch(bank, 8), cls.options(**options))


def guard(monkeypatch, guarded) -> list[int]:
    """Run all pieces of an epoch but its end inside `guarded(training)`; returns the steps that were taken so."""
    steps = []

    def replaced(piece: str):
        usual = getattr(Training, piece)

        def run(self, *arguments):
            with guarded(self):
                done = usual(self, *arguments)
            if piece == "step":
                steps.append(self.position.step)
            return done

        monkeypatch.setattr(Training, piece, run)

    for piece in ("begin_epoch", "begin_step", "batch", "step", "end_step"):
        replaced(piece)
    return steps


@pytest.mark.parametrize("key", METHODS | METHODS_OF_TESTS)
def test_nothing_in_an_epoch_waits_for_the_device(key, monkeypatch):
    steps = guard(monkeypatch, lambda training: no_traffic())
    epochs_needed = HYPERPARAMETERS.get(key, {}).get("cycles", 1)
    recipe = make_recipe(precision="bf16", epochs=epochs_needed, milestones=())
    training = make_training(studys_scheme(key), recipe)
    training.run()
    assert len(training.history) <= len(steps)


@gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("key", METHODS | METHODS_OF_TESTS)
def test_nothing_in_an_epoch_waits_for_the_gpu(key, monkeypatch):
    cuda = torch.device("cuda")

    @contextmanager
    def refused(training):
        # the first epoch may: libraries load their kernels
        torch.cuda.set_sync_debug_mode("error" if training.position.epoch else "default")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    guard(monkeypatch, refused)
    scheme = studys_scheme(key, cuda)
    history = make_training(scheme, make_recipe(precision="bf16"), device=cuda).run()
    assert all(math.isfinite(value) for row in history for value in row.values() if not isinstance(value, str))


@gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("fp64", 1e-9)])
@pytest.mark.parametrize("method", [Plain(), VanillaKD(), TwoPhases()], ids=lambda m: type(m).__name__)
def test_the_loop_on_a_gpu_is_that_on_the_cpu(method, precision, tolerance):
    dtype = {"fp32": torch.float32, "fp64": torch.float64}[precision]
    sessions = []
    with torch.backends.cudnn.flags(enabled=False):  # its convolutions may round to TF32
        for device in (CPU, torch.device("cuda")):
            scheme = make_scheme(method, dtype=dtype, device=device)
            sessions.append(run_session(scheme, make_recipe(precision=precision), device=device))
    for row, other in zip(*(session.history for session in sessions), strict=True):
        for term in {"ce", "kd", "regress"} & set(row):
            assert row[term] == pytest.approx(other[term], rel=tolerance)
    torch.testing.assert_close(*(session.state for session in sessions), rtol=tolerance, atol=tolerance)


@gpu
@pytest.mark.parametrize("name", ["cross-entropy", "two phases"])
def test_stopped_and_resumed_on_a_gpu_equals_uninterrupted(name, tmp_path):
    method, recipe, networks = RUNS[name]
    cuda = torch.device("cuda")

    def session(*arguments, **options):
        scheme = make_scheme(method, device=cuda, **networks)
        return run_session(scheme, recipe, *arguments, device=cuda, **options)

    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        whole = session()
        for stop in (1, 3, whole.steps - 1):
            checkpoint = tmp_path / f"{stop}.pt"
            first = session(checkpoint, stop_after=stop)
            second = session(checkpoint)
            outcome = second.outcome | {"momentum": first.momentum | second.momentum}
            assert difference(outcome, whole.outcome) is None
