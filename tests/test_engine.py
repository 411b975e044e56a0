"""Ways to take steps are timed as they should be, remembered for later processes, and told of where impossible."""

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tape import capture as tape
from test_cohort import assert_alike, assert_close, in_turn, training_of
from test_methods import make_scheme
from torch import Tensor
from toy import CPU

from kdstudy import engine
from kdstudy.cohort import Cohort
from kdstudy.engine import BLOCK, ROUNDS, Choices, Engine, Stepper
from kdstudy.graphs import NotCapturable
from kdstudy.response import SphericalKD, VanillaKD
from kdstudy.study import build_method

METHODS = [VanillaKD(), SphericalKD(), VanillaKD(temperature=2.0)]
LONG = {"epochs": 12, "milestones": (6,)}  # of four steps each


# what is remembered


def test_choices_of_two_processes_stand_beside_each_other(tmp_path):
    one, other = Choices(tmp_path / "ways.json"), Choices(tmp_path / "ways.json")
    one.keep("small", "in_turn")
    other.keep("large", "fused")
    one.keep("middle", "streams")
    for choices in (one, other, Choices(tmp_path / "ways.json")):
        found = [choices.get(kind) for kind in ("small", "middle", "large", "unknown")]
        assert found == ["in_turn", "streams", "fused", None]
    other.keep("small", "fused")
    assert one.get("small") == "fused"


def test_choices_outlive_the_process(tmp_path):
    program = "import sys; from kdstudy.engine import Choices; from pathlib import Path\n"
    program += "Choices(Path('ways.json')).keep(sys.argv[1], 'fused')"
    environment = {"PYTHONPATH": str(Path(engine.__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", program, "a kind"], cwd=tmp_path, env=environment, check=True)
    assert Choices(tmp_path / "ways.json").get("a kind") == "fused"


def test_without_a_file_choices_are_of_this_process_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    choices = Choices()
    choices.keep("a kind", "fused")
    assert choices.get("a kind") == "fused" and Choices().get("a kind") is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ['{"a kind": "fus', "[1, 2]", "17", ""])
def test_a_file_that_holds_no_choices_is_told_of_and_replaced(content, tmp_path):
    path = tmp_path / "ways.json"
    path.write_text(content)
    with pytest.warns(UserWarning, match="ways.json is torn: the ways to train are measured anew"):
        Choices(path).keep("a kind", "in_turn")
    assert json.loads(path.read_text()) == {"a kind": "in_turn"}


# the rule


class Taker:
    """Its n-th step takes `seconds(n)` of a clock that stands still otherwise."""

    def __init__(self, name: str, clock: list[float], log: list[str], seconds: Callable[[int], float]):
        self.name, self.clock, self.log, self.seconds, self.steps = name, clock, log, seconds, 0

    def begin_epoch(self) -> None:
        self.log.append(f"{self.name} begins")

    def step(self) -> None:
        self.clock[0] += self.seconds(self.steps)
        self.steps += 1
        self.log.append(self.name)

    def tally(self) -> Tensor:
        return torch.tensor(float(ord(self.name)))


class Race:
    """A stepper of takers by name, whose steps take so many seconds, and what it does."""

    def __init__(self, monkeypatch, **seconds: Callable[[int], float]):
        self.clock, self.log, self.decided = [0.0], [], []
        monkeypatch.setattr(engine.time, "perf_counter", lambda: self.clock[0])
        takers = {name: Taker(name, self.clock, self.log, each) for name, each in seconds.items()}
        member = SimpleNamespace(
            device=CPU, scheme=SimpleNamespace(acts_between_steps=True), begin_step=lambda: self.log.append(".")
        )
        self.stepper = Stepper([member], takers, lambda member: nullcontext(), self.decided.append)

    def take(self, steps: int, epoch: int = 10**6, between: float = 0.0) -> "Race":
        """So many steps; an epoch has `epoch`, and between two epochs time passes that is no step's."""
        for number in range(steps):
            if number % epoch == 0:
                self.stepper.begin_epoch()
            self.stepper.step()
            if number % epoch == epoch - 1:
                self.stepper.tally()
                self.clock[0] += between
        return self

    @property
    def steps(self) -> list[str]:
        """Who took them."""
        return [name for name in self.log if len(name) == 1 and name != "."]


def test_ways_take_turns_in_blocks_and_the_fastest_takes_the_rest(monkeypatch):
    race = Race(monkeypatch, a=lambda n: 3.0, b=lambda n: 1.0, c=lambda n: 2.0).take(70)
    blocks = ["a"] * BLOCK + ["b"] * BLOCK + ["c"] * BLOCK
    assert race.steps == blocks * ROUNDS + ["b"] * 10
    assert race.decided == ["b"] and race.log.count(".") == 70
    assert race.stepper.tally() == ord("b")


def test_a_way_is_told_where_runs_stand_before_its_block_and_before_it_goes_on_alone(monkeypatch):
    race = Race(monkeypatch, a=lambda n: 2.0, b=lambda n: 1.0).take(2 * ROUNDS * BLOCK + 1)
    log = race.log[2:]  # at the epoch's beginning all are told
    for number, name in enumerate(["a", "b"] * ROUNDS):
        block = log[number * (2 * BLOCK + 1) :][: 2 * BLOCK + 1]
        assert block == [".", f"{name} begins", name, *[".", name] * (BLOCK - 1)]
    # what comes before the step has been done by then, and the steps before have been counted
    assert log[-3:] == [".", "b begins", "b"]


def test_first_blocks_do_not_count(monkeypatch):
    # the second and third of the others are its usual ones: with the first, a middle one would be slow
    seconds = [100.0] * BLOCK + [1.0] * 2 * BLOCK + [4.0] * BLOCK
    race = Race(monkeypatch, a=lambda n: [*seconds, *[1.0] * 60][n], b=lambda n: 1.5).take(60)
    assert race.decided == ["a"] and set(race.steps[2 * ROUNDS * BLOCK :]) == {"a"}


def test_one_slow_block_does_not_decide(monkeypatch):
    race = Race(monkeypatch, a=lambda n: 50.0 if n == 7 else 1.0, b=lambda n: 1.5).take(60)
    assert race.decided == ["a"]


@pytest.mark.parametrize("epoch", [1, 2, 3, 4, 6, 7, 9])
def test_what_passes_between_epochs_is_no_ways_time(epoch, monkeypatch):
    race = Race(monkeypatch, a=lambda n: 1.0, b=lambda n: 1.01, c=lambda n: 1.02).take(70, epoch, between=10.0 * epoch)
    assert race.decided == ["a"]
    race = Race(monkeypatch, a=lambda n: 1.02, b=lambda n: 1.01, c=lambda n: 1.0).take(70, epoch, between=10.0 * epoch)
    assert race.decided == ["c"]


def test_one_way_is_not_timed(monkeypatch):
    race = Race(monkeypatch, a=lambda n: 1.0).take(3)
    assert race.decided == [] and race.steps == ["a"] * 3
    assert race.stepper.description == {"runs": 1, "way": "a", "graph": False}


def test_until_it_is_decided_the_way_is_measured(monkeypatch):
    race = Race(monkeypatch, a=lambda n: 2.0, b=lambda n: 1.0)
    assert race.stepper.description["way"] == "measured"
    race.take(2 * ROUNDS * BLOCK - 1)
    assert race.stepper.description["way"] == "measured" and race.decided == []
    race.take(1)
    assert race.stepper.description["way"] == "measured"
    race.take(1)
    assert race.stepper.description["way"] == "b" and race.decided == ["b"]


# runs


@pytest.mark.parametrize("way", ["fastest", "in-turn", "", None])
def test_a_way_that_is_none_is_refused(way):
    with pytest.raises(ValueError, match="way must be"):
        Engine(way)


@pytest.mark.parametrize("fastest", ["FusedInOne", "InTurn"])
def test_ways_that_are_timed_from_graphs_miss_no_batch_and_repeat_none(fastest, monkeypatch):
    clock, replayed = [0.0], engine.Replayed.step

    def counted(self) -> None:
        clock[0] += 1.0 if type(self._way).__name__ == fastest else 2.0
        replayed(self)

    monkeypatch.setattr(engine.Replayed, "step", counted)
    monkeypatch.setattr(engine.time, "perf_counter", lambda: clock[0])
    # three steps an epoch: it is in the middle of one that the choice is made
    changes = {"batch": 20, "epochs": 15, "milestones": (6,)}
    members, expected = (in_turn(METHODS[:2], capturable=True, changes=changes) for _ in range(2))
    Cohort(members, Engine("measured", graphs=True, capture=tape)).run()
    way = {"FusedInOne": "fused", "InTurn": "in_turn"}[fastest]
    assert members[0].made_by == {"runs": 2, "way": way, "graph": True}
    Cohort(expected).run()
    for member, each in zip(members, expected, strict=True):
        assert_close(member, each, 1e-9)


def test_a_choice_that_is_not_possible_here_is_not_followed(monkeypatch):
    monkeypatch.setattr(Choices, "get", lambda self, kind: "streams")
    members = in_turn(METHODS, changes=LONG)
    timed = []
    usual = Stepper._timed_step
    monkeypatch.setattr(Stepper, "_timed_step", lambda self: timed.append(1) or usual(self))
    Cohort(members, Engine("measured")).run()
    assert len(timed) == 2 * ROUNDS * BLOCK and members[0].made_by["way"] in ("fused", "in_turn")


def kinds(monkeypatch) -> list[str]:
    """The kinds of groups that are asked for from now on."""
    asked = []
    monkeypatch.setattr(Choices, "get", lambda self, kind: asked.append(kind) or "in_turn")
    return asked


def test_the_kind_of_a_group_is_what_speed_depends_on(monkeypatch):
    asked = kinds(monkeypatch)

    def kind(methods: list[Any] = METHODS, **changes: Any) -> str:
        Cohort(in_turn(methods, changes={"epochs": 1} | changes), Engine("measured")).run()
        return asked[-1]

    usual = kind()
    assert kind([build_method("ce"), VanillaKD(), VanillaKD()], learning_rate=0.01) == usual
    assert len({usual, kind(METHODS[:2]), kind(batch=25)}) == 3
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert "7 threads" in kind() != usual


@pytest.mark.parametrize("way", ["fused", "streams", "measured"])
def test_one_run_is_taken_as_it_is(way):
    (member,), (expected,) = in_turn(METHODS[:1]), in_turn(METHODS[:1])
    Cohort([member], Engine(way, graphs=True)).run()  # without a GPU there is no graph to speak of
    expected.run()
    assert member.made_by == {"runs": 1, "way": "in_turn", "graph": False}
    assert_alike(member, expected)


def test_streams_need_a_gpu():
    members, expected = in_turn(METHODS), in_turn(METHODS)
    Cohort(members, Engine("streams")).run()
    Cohort(expected).run()
    for member, each in zip(members, expected, strict=True):
        assert member.made_by["way"] == "in_turn"
        assert_alike(member, each)


def never(step: Callable[[], None], state: Any, **options: Any) -> Callable[[], None]:
    """A capture that fails."""
    raise NotCapturable("this cannot be captured: it is Friday")


@pytest.mark.parametrize("way", ["in_turn", "fused"])
def test_a_capture_that_fails_is_told_once_and_all_goes_on(way):
    members, expected = in_turn(METHODS, capturable=True), in_turn(METHODS, capturable=True)
    with pytest.warns(UserWarning, match="it is Friday") as told:
        Cohort(members, Engine(way, graphs=True, capture=never)).run()
    assert len(told) == 1
    Cohort(expected, Engine(way)).run()
    for member, each in zip(members, expected, strict=True):
        assert member.made_by["graph"] is False
        assert_alike(member, each)


def test_steps_between_which_a_scheme_acts_are_not_captured():
    changes = {"epochs": 1, "milestones": ()}
    training = training_of(make_scheme("zero_shot"), capturable=True, changes=changes)
    with pytest.warns(UserWarning, match="steps are not captured: ZeroShot acts between steps"):
        Cohort([training], Engine(graphs=True, capture=tape)).run()
    assert training.made_by["graph"] is False and training.history
