"""Runs that advance together are what they are alone, to the bit in turn, to rounding otherwise; sharing pays."""

import functools
import itertools
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from tape import capture as tape
from test_methods import HYPERPARAMETERS, TEACHER, batch_of, make_scheme, network, toy_bank, trained_network
from torch import nn
from toy import clone, difference

from kdstudy import engine, evaluate, ways
from kdstudy.checkpoint import load_checkpoint
from kdstudy.cohort import Cohort
from kdstudy.core import Method, Phase, View
from kdstudy.engine import BLOCK, ROUNDS, Choices, Engine
from kdstudy.graphs import NotCapturable
from kdstudy.logit_table import LogitTable
from kdstudy.recipe import Recipe
from kdstudy.response import SphericalKD, VanillaKD
from kdstudy.schemes import Alone, Offline, Scheme
from kdstudy.stopping import Stopped
from kdstudy.study import METHODS, SCHEMES, build_method
from kdstudy.train import Diverged, Surroundings, Training

BANK = toy_bank(50)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def teacher(seed: int = 7) -> nn.Module:
    torch.manual_seed(seed)
    return trained_network(TEACHER, torch.float64)


def scheme_with(method: Any, taught_by: nn.Module, seed: int = 0, name: str = "wrn_10_0.25") -> Scheme:
    torch.manual_seed(seed)
    student = network(name, torch.float64)
    if not method.needs_teacher:
        return Alone(student, method, batch_of(16))
    return Offline(student, taught_by, method, batch_of(16))


def training_of(scheme: Scheme, folder=None, changes: dict[str, Any] | None = None, **options: Any) -> Training:
    values = {"epochs": 3, "batch": 16, "learning_rate": 0.05, "milestones": (2,), "crop_padding": 1}
    recipe = Recipe(precision="fp64", **values | (changes or {}))
    capturable = options.pop("capturable", False)
    surroundings = Surroundings(checkpoint=folder and folder / f"{id(scheme)}.pt", **options)
    watch = {"train": BANK, "held_out": BANK}
    return Training(scheme, recipe, BANK, seed=4, watch=watch, surroundings=surroundings, capturable=capturable)


def left_behind(training: Training) -> dict[str, Any]:
    return {"history": training.history, "state": clone(training.scheme.state_dict())}


def assert_alike(one: Training, other: Training) -> None:
    assert difference(left_behind(one), left_behind(other)) is None


def assert_close(one: Training, other: Training, tolerance: float = 1e-12) -> None:
    for row, expected in zip(one.history, other.history, strict=True):
        assert row.keys() == expected.keys()
        for name in row:
            if isinstance(row[name], str):
                assert row[name] == expected[name]
            else:
                assert row[name] == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name
    state, expected = one.scheme.state_dict(), other.scheme.state_dict()
    for name in expected:
        torch.testing.assert_close(state[name], expected[name], rtol=tolerance, atol=tolerance)


ASSORTMENT = [
    build_method("kd"),
    build_method("ce"),
    build_method("kd", temperature=2.0, kd_weight=3.0),
    build_method("crd"),  # draws random numbers
    build_method("activation_boundaries"),  # two phases
    build_method("attention"),
    build_method("mlkd"),  # strongly augmented images, too
]


def in_turn(methods: Sequence[Any], taught_by: nn.Module | None = None, **options: Any) -> list[Training]:
    taught_by = taught_by or teacher()
    return [training_of(scheme_with(method, taught_by, seed), **options) for seed, method in enumerate(methods)]


def alone(methods: Sequence[Any], **options: Any) -> list[Training]:
    trainings = [training_of(scheme_with(method, teacher(), seed), **options) for seed, method in enumerate(methods)]
    for training in trainings:
        training.run()
    return trainings


def count_calls(monkeypatch, owner: Any, name: str) -> list[Any]:
    calls, usual = [], getattr(owner, name)

    def counted(*arguments, **named):
        calls.append(arguments)
        return usual(*arguments, **named)

    monkeypatch.setattr(owner, name, counted)
    return calls


# in turn


def test_members_are_to_the_bit_what_they_are_alone():
    members = in_turn(ASSORTMENT)
    Cohort(members).run()
    for member, expected in zip(members, alone(ASSORTMENT), strict=True):
        assert_alike(member, expected)


@pytest.mark.parametrize("key", METHODS)
def test_every_method_is_the_same_beside_others(key):
    changes = {"epochs": 3 if key in HYPERPARAMETERS else 2}
    expected = training_of(make_scheme(key), changes=changes)
    expected.run()
    member = training_of(make_scheme(key), changes=changes)
    others = in_turn(ASSORTMENT[:3:2], changes=changes)
    Cohort([others[0], member, others[1]]).run()
    assert_alike(member, expected)
    for other, its_expected in zip(others, alone(ASSORTMENT[:3:2], changes=changes), strict=True):
        assert_alike(other, its_expected)


def test_batches_and_the_teachers_answers_are_made_once(monkeypatch):
    methods = [build_method("kd", temperature=float(t)) for t in range(1, 5)]
    taught_by = teacher()
    members = in_turn(methods, taught_by)
    batches = count_calls(monkeypatch, BANK, "augmented")
    looks = []
    taught_by.register_forward_hook(lambda *_: looks.append(1))
    Cohort(members).run()
    steps = 3 * math.ceil(50 / 16)
    assert len(batches) == len(looks) == steps


def test_runs_with_phases_meet_the_others_in_the_last_one(monkeypatch):
    methods = [build_method("kd"), build_method("activation_boundaries")]
    members = in_turn(methods)
    batches = count_calls(monkeypatch, BANK, "augmented")
    Cohort(members).run()
    (first, _) = members[1].phases
    epochs = first.epochs(3) + 3
    assert first.epochs(3) >= 1 and len(batches) == epochs * math.ceil(50 / 16)


def test_runs_of_other_seeds_and_batches_do_not_share(monkeypatch):
    taught_by = teacher()
    members = [training_of(scheme_with(VanillaKD(), taught_by), changes={"batch": batch}) for batch in (16, 25)]
    Cohort(members).run()
    for member, batch in zip(members, (16, 25), strict=True):
        expected = training_of(scheme_with(VanillaKD(), teacher()), changes={"batch": batch})
        expected.run()
        assert_alike(member, expected)


def test_one_that_diverges_drops_out_alone():
    methods = [build_method("kd"), build_method("kd", kd_weight=1e308), build_method("attention")]
    members, ends = in_turn(methods), {}
    Cohort(members, ended=lambda member, diverged: ends.update({members.index(member): diverged})).run()
    assert ends[0] is ends[2] is None and isinstance(ends[1], Diverged)
    assert ends[1].history == members[1].history and len(members[1].history) < 3
    expected = alone([methods[0]])[0], training_of(scheme_with(methods[2], teacher(), 2))
    expected[1].run()
    assert_alike(members[0], expected[0])
    assert_alike(members[2], expected[1])


def test_members_are_told_of_as_they_end():
    members, told = in_turn(ASSORTMENT[:2]), []
    longer = training_of(scheme_with(VanillaKD(), teacher()), changes={"epochs": 5})
    Cohort([longer, *members], ended=lambda member, _: told.append((member, len(longer.history)))).run()
    assert {member for member, _ in told} == {longer, *members}
    assert told[-1] == (longer, 5)


def stop_after(count: int) -> Callable[[], bool]:
    steps = itertools.count(1)
    return lambda: next(steps) > count


@pytest.mark.parametrize("steps", [1, 3, 4, 7, 11])
def test_stopped_and_resumed_equals_uninterrupted_together_or_apart(steps, tmp_path):
    methods = ASSORTMENT
    places = [tmp_path / str(number) for number in range(len(methods))]

    def make(**options) -> list[Training]:
        taught_by = teacher()
        made = [scheme_with(method, taught_by, seed) for seed, method in enumerate(methods)]
        trainings = [training_of(scheme, **options) for scheme in made]
        for training, place in zip(trainings, places, strict=True):
            training.surroundings = Surroundings(checkpoint=place, **options)
        return trainings

    asked = itertools.count()
    with pytest.raises(Stopped):
        Cohort(make(should_stop=lambda: next(asked) >= steps)).run()
    assert all(place.exists() for place in places)
    first, second = make(), make()
    Cohort(first[:3]).run()
    for member in first[3:5]:
        member.run()
    Cohort(second[5:]).run()
    for member, expected in zip([*first[:5], *second[5:]], alone(methods), strict=True):
        assert_alike(member, expected)


def test_a_run_that_is_behind_catches_up_before_they_go_on_together(tmp_path, monkeypatch):
    members = in_turn([VanillaKD(), VanillaKD(temperature=2.0)], should_stop=stop_after(5))
    place = tmp_path / "ahead.pt"
    members[0].surroundings = Surroundings(checkpoint=place, should_stop=stop_after(5))
    with pytest.raises(Stopped):
        members[0].run()
    ahead, behind = in_turn([VanillaKD(), VanillaKD(temperature=2.0)])
    ahead.surroundings = Surroundings(checkpoint=place)
    batches = count_calls(monkeypatch, BANK, "augmented")
    Cohort([ahead, behind]).run()
    # an epoch of four steps alone, the next one, of which the other has had two, by each alone, and the last together
    assert len(batches) == 4 + 4 + 2 + 4
    for member, expected in zip((ahead, behind), alone([VanillaKD(), VanillaKD(temperature=2.0)]), strict=True):
        assert_alike(member, expected)


def test_a_stop_saves_all_that_are_unfinished_and_nothing_else(tmp_path):
    members = in_turn([VanillaKD()] * 3, folder=tmp_path, should_stop=stop_after(4))
    short = training_of(scheme_with(VanillaKD(), teacher()), tmp_path, {"epochs": 1})
    with pytest.raises(Stopped):
        Cohort([*members, short]).run()
    saved = [member.surroundings.checkpoint.exists() for member in (*members, short)]
    assert saved == [True, True, True, not short.finished]


def test_all_are_asked_once_a_step_by_whoever_they_have_in_common():
    asked = []
    members = in_turn([VanillaKD()] * 3, should_stop=lambda: bool(asked.append("all")))
    own = Surroundings(should_stop=lambda: bool(asked.append("one")))
    members[1].surroundings = own
    Cohort(members).run()
    steps = 3 * math.ceil(50 / 16)
    assert asked.count("all") == asked.count("one") == steps


# left in an evaluation, or while its members' ends are dealt with


@pytest.fixture
def asked_often(monkeypatch):
    """Evaluations of 20 images at a time, so that there is something between their batches."""
    monkeypatch.setattr(evaluate, "logits_of", functools.partial(evaluate.logits_of, batch=20))


def session(methods, folder, engine: Engine | None = None, stop_at: int | None = None, **options) -> list[Training]:
    """Runs whose checkpoints are in a folder, trained until the end or until this question, whoever asks it."""
    asks = itertools.count(1)
    members = in_turn(methods, **options)

    def should_stop() -> bool:
        return next(asks) == stop_at

    for number, member in enumerate(members):
        member.surroundings = Surroundings(checkpoint=folder / f"{number}.pt", should_stop=should_stop)
    cohort = Cohort(members, engine)
    if stop_at:
        with pytest.raises(Stopped):
            cohort.run()
    else:
        cohort.run()
    return members


LEFT = [build_method("kd"), build_method("spherical"), build_method("activation_boundaries"), build_method("crd")]
PLATEAU = {"schedule": "plateau", "epochs": 6, "milestones": (), "factor": 0.5, "learning_rate": 0.5}


@pytest.mark.parametrize("changes", [{}, PLATEAU], ids=["step", "plateau"])
def test_left_at_any_question_and_resumed_equals_uninterrupted(changes, tmp_path, asked_often):
    expected = alone(LEFT, changes=changes)
    asks = itertools.count()
    whole = in_turn(LEFT, changes=changes, should_stop=lambda: bool(next(asks) < 0))
    Cohort(whole).run()
    questions, in_tallies = next(asks), 0
    for stop_at in range(1, questions + 1, 9):
        (folder := tmp_path / str(stop_at)).mkdir()
        stopped = session(LEFT, folder, stop_at=stop_at, changes=changes)
        # what is under way has been kept
        under_way = [member.current is not None for member in stopped]
        assert [(folder / f"{number}.pt").exists() for number in range(len(LEFT))] == under_way
        in_tallies += any(each.position.step == each.current.steps for each in stopped if each.current)
        for member, each in zip(session(LEFT, folder, changes=changes), expected, strict=True):
            assert_alike(member, each)
    assert in_tallies > 2


@pytest.mark.parametrize("way", ["in_turn", "fused"])
def test_a_replayed_run_is_left_in_an_evaluation(way, tmp_path, asked_often):
    methods = [VanillaKD(), build_method("attention")]
    options = {"capturable": True, "changes": {"epochs": 2, "milestones": (1,)}}
    engine = Engine(way, graphs=True, capture=tape)
    expected = in_turn(methods, **options)
    Cohort(expected, engine).run()
    steps = math.ceil(50 / 16)
    # of the four questions of an evaluation, in which it is taken, rehearsed and recorded for both runs
    for stop_at in (steps + 1, steps + 2, steps + 4, steps + 9, steps + 21, steps + 40):
        (folder := tmp_path / str(stop_at)).mkdir()
        stopped = session(methods, folder, engine, stop_at, **options)
        for member in stopped:
            assert member.position.step == member.current.steps and member.history == []
            assert all(module.training for module in member.scheme.student.modules())
        again = session(methods, folder, engine, **options)
        for member, each in zip(again, expected, strict=True):
            assert_alike(member, each)


def test_members_who_are_prepared_are_kept_when_the_next_ones_preparation_is_left(tmp_path, monkeypatch):
    methods = [build_method("spherical"), build_method("spherical", temperature=3.0), VanillaKD()]
    calibrated = count_calls(monkeypatch, SphericalKD, "calibrate")
    session(methods, tmp_path, stop_at=4)  # three questions between four batches, for each
    assert len(calibrated) == 2
    assert [(tmp_path / f"{number}.pt").exists() for number in range(3)] == [True, False, False]
    again = session(methods, tmp_path)
    assert len(calibrated) == 3
    for member, each in zip(again, alone(methods), strict=True):
        assert_alike(member, each)


def test_the_time_of_an_evaluation_that_is_left_counts(tmp_path, monkeypatch):
    now = 0.0

    def leave(*_):
        nonlocal now
        now += 10
        raise Stopped

    monkeypatch.setattr("kdstudy.train.count_hits", leave)
    monkeypatch.setattr("kdstudy.cohort.time.monotonic", lambda: now)
    stopped = in_turn([VanillaKD()] * 2, folder=tmp_path)
    with pytest.raises(Stopped):
        Cohort(stopped).run()
    for member in stopped:
        state = load_checkpoint(member.surroundings.checkpoint, torch.device("cpu"))
        assert state["seconds"] == state["sessions"][0]["seconds"] == member.seconds == 5


class Ends:
    """Takes down who has ended with what; the first of them is left in the midst of it."""

    def __init__(self, members: Sequence[Training], stops: bool):
        self.members, self.stops, self.told = members, stops, {}

    def __call__(self, member: Training, diverged: Diverged | None) -> None:
        torch.rand(3)  # whoever deals with it may use random numbers
        if self.stops:
            raise Stopped
        self.told[self.members.index(member)] = (diverged, member.seconds, len(member.sessions), member.made_by)


@pytest.mark.parametrize("epochs", [3, 5])
def test_a_member_that_has_ended_is_kept_if_dealing_with_it_is_left(epochs, tmp_path, monkeypatch):
    methods = [build_method("crd"), build_method("kd", kd_weight=1e308), build_method("attention")]

    def members(folder=tmp_path) -> list[Training]:
        made = in_turn(methods, changes={"epochs": 3})
        longer = training_of(scheme_with(build_method("crd"), teacher(), 5), changes={"epochs": epochs})
        for number, member in enumerate([*made, longer]):
            checkpoint = folder and folder / f"{number}.pt"
            member.surroundings = Surroundings(checkpoint=checkpoint, session={"sitting": 1})
        return [*made, longer]

    expected = members(folder=None)
    ends = Ends(expected, stops=False)
    Cohort(expected, Engine(), ended=ends).run()
    assert {number: bool(diverged) for number, (diverged, *_) in ends.told.items()} == {0: 0, 1: 1, 2: 0, 3: 0}
    steps = count_calls(monkeypatch, Training, "step")
    taken = []
    for first_stops in (True, True, False):
        resumed = members()
        again = Ends(resumed, stops=first_stops)
        if first_stops:
            with pytest.raises(Stopped):
                Cohort(resumed, ended=again).run()
            taken.append(len(steps))
        else:
            Cohort(resumed, ended=again).run()
    assert taken[0] == taken[1] > 0  # the second time it has ended from the first
    assert again.told.keys() == ends.told.keys()
    for number, (member, each) in enumerate(zip(resumed, expected, strict=True)):
        assert str(member.history) == str(each.history)  # one has NaN in it
        diverged, seconds, sessions, made_by = again.told[number]
        assert str(diverged) == str(ends.told[number][0]) and sessions == 3 and seconds > 0
        assert made_by["way"] == "in_turn" and made_by["runs"] >= 1
        if number != 1:
            assert_alike(member, each)


def test_how_a_finished_member_was_made_is_known_after_a_stop(tmp_path):
    def members() -> list[Training]:
        made = in_turn(FUSED[:2], changes={"epochs": 1})
        for number, member in enumerate(made):
            member.surroundings = Surroundings(checkpoint=tmp_path / f"{number}.pt")
        return made

    def leave(member, diverged):
        raise Stopped

    with pytest.raises(Stopped):
        Cohort(members(), Engine("fused"), ended=leave).run()
    again = members()
    Cohort(again, Engine("in_turn")).run()
    assert [member.made_by for member in again] == [{"runs": 2, "way": "fused", "graph": False}] * 2


def test_time_is_shared_out():
    members = in_turn(ASSORTMENT[:3])
    clock = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdstudy.cohort.time.monotonic", lambda: float(next(clock)))
        Cohort(members).run()
    assert 0 < sum(member.seconds for member in members) <= next(clock)
    assert max(member.seconds for member in members) < 2 * min(member.seconds for member in members)


# fused


@dataclass(frozen=True, kw_only=True)
class Headless(Method):
    """Fits the embedding and leaves the classifier alone."""

    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "none"
    reads: ClassVar[tuple[str, ...]] = ("embedding",)

    ce_weight: float = 0.0

    def loss(self, student: View, teacher: View, labels: torch.Tensor, adapters: nn.ModuleDict) -> torch.Tensor:
        return (student.embedding.mean(dim=1) - teacher.embedding.mean(dim=1)).square().mean()


FUSED = [
    VanillaKD(),
    VanillaKD(temperature=2.0, kd_weight=0.3),
    SphericalKD(),
    build_method("ce"),
    build_method("similarity"),
    build_method("crd"),
    Headless(),
]


def test_fused_members_are_what_they_are_alone_to_rounding():
    members = in_turn(FUSED)
    Cohort(members, Engine("fused")).run()
    assert {member.made_by["way"] for member in members} == {"fused"}
    for member, expected in zip(members, alone(FUSED), strict=True):
        assert_close(member, expected)


def test_fused_one_that_is_not_finite_drops_out_alone():
    methods = [FUSED[0], build_method("kd", kd_weight=1e308), FUSED[2]]
    members = in_turn(methods)
    Cohort(members, Engine("fused")).run()
    expected = [alone(methods[:1])[0], training_of(scheme_with(methods[2], teacher(), 2))]
    expected[1].run()
    assert len(members[1].history) < 3
    for member, each in zip(members[::2], expected, strict=True):
        assert_close(member, each)


def test_what_cannot_be_fused_is_taken_in_turn_and_the_reason_told():
    methods = [VanillaKD(), build_method("mlkd")]
    members = in_turn(methods)
    with pytest.warns(UserWarning, match="no phase in which one student learns as a whole"):
        Cohort(members, Engine("fused")).run()
    for member, expected in zip(members, alone(methods), strict=True):
        assert_alike(member, expected)


def test_only_as_many_are_fused_as_memory_holds(monkeypatch):
    members = in_turn(FUSED[:5])
    sizes = []
    monkeypatch.setattr("kdstudy.ways.free_bytes", lambda device: 0)
    fused = ways.Fused
    monkeypatch.setattr("kdstudy.ways.Fused", lambda networks: sizes.append(len(networks)) or fused(networks))
    Cohort(members, Engine("fused")).run()
    assert sizes == [1] * 5
    for member, expected in zip(members, alone(FUSED[:5]), strict=True):
        assert_close(member, expected)


def test_a_fused_runs_checkpoint_holds_that_run_alone(tmp_path):
    sizes = []
    for count in (1, 6):
        (folder := tmp_path / str(count)).mkdir()
        members = in_turn([VanillaKD()] * count, folder=folder, should_stop=stop_after(5))
        with pytest.raises(Stopped):
            Cohort(members, Engine("fused")).run()
        sizes.append(members[0].surroundings.checkpoint.stat().st_size)
    assert sizes[1] < 1.1 * sizes[0]


# captured

CAPTURED = Engine(graphs=True, capture=tape)


@pytest.mark.parametrize("way", ["in_turn", "fused"])
def test_replayed_steps_are_those_of_python_to_the_bit(way):
    methods = [VanillaKD(), build_method("ce"), build_method("attention")]
    changes = {"epochs": 4, "milestones": (1, 3)}
    members = in_turn(methods, capturable=True, changes=changes)
    Cohort(members, Engine(way, graphs=True, capture=tape)).run()
    assert all(member.made_by == {"runs": 3, "way": way, "graph": True} for member in members)
    expected = in_turn(methods, capturable=True, changes=changes)
    Cohort(expected, Engine(way)).run()
    for member, each in zip(members, expected, strict=True):
        assert_alike(member, each)


@dataclass(frozen=True, kw_only=True)
class OtherBatches(Method):
    """Two phases, the first of larger batches than the recipe's."""

    kind: ClassVar[str] = "none"
    paper: ClassVar[str] = "none"
    needs_teacher: ClassVar[bool] = False

    kd_weight: float = 0.0

    def loss(self, student: View, teacher: View, labels: torch.Tensor, adapters: nn.ModuleDict) -> torch.Tensor:
        raise AssertionError("a term without weight was computed")

    def phases(self) -> tuple[Phase, ...]:
        return Phase("first", self.objective, recipe={"batch": 30}), Phase("second", self.objective)


def test_phases_of_other_batches_are_replayed_too():
    member, expected = (training_of(scheme_with(OtherBatches(), teacher()), capturable=True) for _ in range(2))
    Cohort([member], CAPTURED).run()
    expected.run()
    assert member.made_by["graph"]
    assert_alike(member, expected)


def test_an_evaluation_that_cannot_be_captured_is_done_as_it_comes(monkeypatch):
    def capture(step, state, **options):
        if len(state) == 1:
            raise NotCapturable("it waits for the device")
        return tape(step, state, **options)

    members = in_turn(FUSED[:2], capturable=True)
    with pytest.warns(UserWarning, match="of the evaluation: the step cannot be captured: it waits"):
        Cohort(members, Engine(graphs=True, capture=capture)).run()
    expected = in_turn(FUSED[:2], capturable=True)
    Cohort(expected).run()
    for member, each in zip(members, expected, strict=True):
        assert_alike(member, each)


# draw random numbers in their steps, or act between them
UNFIT = {"crd", "zero_shot", "data_impressions"}


@pytest.mark.filterwarnings("ignore:.*steps are not captured|.*cannot be captured")
@pytest.mark.parametrize("key", METHODS)
def test_every_methods_steps_can_be_replayed_or_are_known_not_to_be(key):
    # slow, so that rounding stays rounding
    changes = {"epochs": 3, "schedule": "cosine", "milestones": (), "learning_rate": 0.005}
    if key == "snapshot":
        changes["cycles"] = 3
    member = training_of(make_scheme(key), capturable=True, changes=changes)
    Cohort([member], CAPTURED).run()
    expected = training_of(make_scheme(key), capturable=True, changes=changes)
    expected.run()
    # replayed, a sum may be taken in another order; a number that was baked in would show in the first digits
    assert_close(member, expected, 1e-9)
    if member.history:
        assert member.made_by["graph"] == (key not in UNFIT)


@pytest.mark.parametrize("steps", [2, 4, 7])
def test_a_replayed_run_is_stopped_and_resumed_exactly(steps, tmp_path):
    methods = [VanillaKD(), build_method("attention")]

    def session(should_stop: Callable[[], bool] = lambda: False) -> list[Training]:
        members = in_turn(methods, capturable=True)
        for number, member in enumerate(members):
            member.surroundings = Surroundings(checkpoint=tmp_path / f"{number}.pt", should_stop=should_stop)
        Cohort(members, CAPTURED).run()
        return members

    with pytest.raises(Stopped):
        session(stop_after(steps))
    expected = in_turn(methods, capturable=True)
    Cohort(expected).run()
    for member, each in zip(session(), expected, strict=True):
        assert_alike(member, each)


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
@pytest.mark.parametrize("first", [False, True], ids=["then replayed", "first replayed"])
def test_a_run_goes_on_replayed_or_not_whatever_it_was_before(first, optimiser, tmp_path):
    changes = {"optimiser": optimiser, "learning_rate": 0.01, "schedule": "cosine", "milestones": ()}

    def member(capturable: bool, **options) -> Training:
        made = training_of(scheme_with(VanillaKD(), teacher()), capturable=capturable, changes=changes)
        made.surroundings = Surroundings(**options)
        return made

    engines = {False: Engine(), True: CAPTURED}
    with pytest.raises(Stopped):
        stopped = member(first, checkpoint=tmp_path / "checkpoint.pt", should_stop=stop_after(5))
        Cohort([stopped], engines[first]).run()
    again, expected = member(not first, checkpoint=tmp_path / "checkpoint.pt"), member(False)
    again.start()
    (group,) = again.current.optimisers["distil"].param_groups
    assert isinstance(group["lr"], torch.Tensor) != first
    Cohort([again], engines[not first]).run()
    assert again.made_by["graph"] != first
    Cohort([expected]).run()
    assert_close(again, expected, 1e-6)  # a learning rate on a device has single precision


# measured


def test_the_fastest_way_is_found_by_timing_steps_of_the_training_itself(tmp_path, monkeypatch):
    changes = {"epochs": 12, "milestones": (6,)}
    choices = Choices(tmp_path / "choices.json")
    members = in_turn(FUSED, changes=changes)
    Cohort(members, Engine("measured", choices=choices)).run()
    found = members[0].made_by["way"]
    assert found in ("fused", "in_turn")
    for member, expected in zip(members, alone(FUSED, changes=changes), strict=True):
        assert_close(member, expected, 1e-10)
    again = in_turn(FUSED, changes={"epochs": 1})
    blocks = count_calls(monkeypatch, engine.Stepper, "_timed_step")
    Cohort(again, Engine("measured", choices=Choices(tmp_path / "choices.json"))).run()
    assert not blocks and again[0].made_by["way"] == found


@pytest.mark.parametrize("fastest", ["fused", "in_turn"])
def test_the_way_with_the_least_median_is_kept(fastest, monkeypatch):
    changes = {"epochs": 12, "milestones": (6,)}
    clock, seen = [0.0], []

    def slow(cls: str, seconds: float) -> None:
        owner = getattr(engine, cls)
        usual = owner.step

        def step(self, batch):
            seen.append(cls)
            clock[0] += seconds if len(seen) != 33 else 50.0  # one hiccup
            usual(self, batch)

        monkeypatch.setattr(owner, "step", step)

    slow("FusedInOne", 1.0 if fastest == "fused" else 2.0)
    slow("InTurn", 2.0 if fastest == "fused" else 1.0)
    monkeypatch.setattr("kdstudy.engine.time.perf_counter", lambda: clock[0])
    members = in_turn(FUSED, changes=changes)
    Cohort(members, Engine("measured")).run()
    assert members[0].made_by["way"] == fastest
    assert seen.count({"fused": "InTurn", "in_turn": "FusedInOne"}[fastest]) == ROUNDS * BLOCK


def test_a_torn_file_of_choices_is_told_of_and_made_anew(tmp_path):
    path = tmp_path / "choices.json"
    path.write_text('{"cpu')
    with pytest.warns(UserWarning, match="torn"):
        assert Choices(path).get("anything") is None
        Choices(path).keep("anything", "fused")
    assert Choices(path).get("anything") == "fused"


# the table of the teacher's logits


def test_a_table_stands_for_the_teacher():
    methods = [VanillaKD(), VanillaKD(temperature=2.0), build_method("relative_v2")]
    taught_by = teacher()
    table = LogitTable.build(taught_by, BANK, flip=True, half=None)
    members = in_turn(methods, taught_by)
    looks = []
    taught_by.register_forward_hook(lambda *_: looks.append(1))
    Cohort(members, tables={taught_by: table}).run()
    assert not looks
    for member, expected in zip(members, alone(methods), strict=True):
        assert_close(member, expected, 0.02)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_scheme_that_acts_between_steps_says_so(scheme):
    own = scheme.begin_step is not Scheme.begin_step
    assert own == ("acts_between_steps" in vars(scheme) or scheme is SCHEMES["peers"])


# compiled


@pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles by a C++ compiler")
def test_compiled_students_are_among_the_ways_and_train_to_the_same_end(monkeypatch):
    monkeypatch.setattr(engine, "STEPS_TO_COMPILE_FOR", 1)
    taken = count_calls(monkeypatch, torch, "compile")
    changes = {"batch": 25, "epochs": 42, "milestones": (19,)}
    members = in_turn(FUSED[:2], changes=changes)
    Cohort(members, Engine("measured", compiles=True)).run()
    assert len(taken) == 3  # two students and both in one
    for member, expected in zip(members, alone(FUSED[:2], changes=changes), strict=True):
        assert_close(member, expected, 1e-9)


def test_what_cannot_be_compiled_goes_on_as_it_is(monkeypatch):
    def broken(network):
        def call(images):
            raise RuntimeError("no compiler\nand a long story")

        return call

    monkeypatch.setattr(engine, "STEPS_TO_COMPILE_FOR", 1)
    monkeypatch.setattr(torch, "compile", broken)
    changes = {"batch": 25, "epochs": 42, "milestones": (19,)}
    members = in_turn(FUSED[:2], changes=changes)
    with pytest.warns(UserWarning, match="a network is not compiled: no compiler$"):
        Cohort(members, Engine("measured", compiles=True)).run()
    for member, expected in zip(members, alone(FUSED[:2], changes=changes), strict=True):
        assert_close(member, expected, 1e-9)
