"""When work ends early: budgets on a clock that the test sets, signals that are sent indeed."""

import signal
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdstudy import stopping
from kdstudy.stopping import Stopped, StopRequest, never, until

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(stopping.time, "monotonic", lambda: self.now)


def asked_after(gaps, seconds: float) -> list[bool]:
    """What a request for so many seconds answers after each of these times."""
    with pytest.MonkeyPatch.context() as patch:
        clock, answers = Clock(patch), []
        request = StopRequest(seconds)
        for gap in gaps:
            clock.now += gap
            answers.append(request())
        return answers


def test_a_budget_ends_when_it_is_spent():
    assert asked_after([0.0, 9.0, 0.0, 0.9, 0.0, 0.2], 10) == [False, False, False, False, False, True]
    assert asked_after([0.1], 0) == asked_after([0.1], -5) == [True]


def test_without_a_budget_it_never_ends():
    assert asked_after([1e9] * 5, float("inf")) == [False] * 5
    assert not StopRequest()()


@given(gap=st.integers(1, 50), seconds=st.integers(0, 300))
def test_steady_work_ends_in_time_and_no_step_too_early(gap, seconds):
    answers = asked_after([float(gap)] * (seconds + 3), seconds)
    steps = answers.index(True) + 1
    # the first two questions cannot know how long a step takes
    assert steps * gap <= seconds or steps <= 2
    assert (steps + 1) * gap > seconds


def test_one_long_piece_of_work_does_not_end_a_sitting():
    assert asked_after([1, 1, 40, 1, 1], 80) == [False] * 5


def test_it_goes_on_saying_so():
    assert asked_after([5.0, 6.0, 0.0, 0.0], 10) == [False, True, True, True]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_asks_to_stop_and_a_later_interrupt_takes_effect_at_once(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(KeyboardInterrupt), StopRequest().listening() as request:
        assert not request()
        for heard in (number, signal.SIGTERM, signal.SIGTERM):  # a queue sends it again and again
            signal.raise_signal(heard)
            assert request() and request()
            assert (request.reason, request.exit_code) == (f"stopped by {number.name}", 128 + number)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("nothing happened")
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert request()  # as it still has to


def test_a_spent_budget_is_no_error():
    request = StopRequest(-1)
    assert request() and request.exit_code == 0 and "budget" in request.reason


def test_handlers_are_put_back_whatever_they_were(monkeypatch):
    mine = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        for error in (None, OSError):
            with pytest.raises(error) if error else StopRequest().listening():
                with StopRequest().listening():
                    assert signal.getsignal(signal.SIGTERM) != signal.SIG_IGN
                    if error:
                        raise error
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        known = signal.signal
        # of a handler that another language has set Python knows nothing
        monkeypatch.setattr(signal, "signal", lambda number, handler: known(number, handler) and None)
        with StopRequest().listening():
            pass
        assert {signal.getsignal(each) for each in SIGNALS} == {signal.SIG_DFL}
    finally:
        monkeypatch.undo()
        signal.signal(signal.SIGTERM, mine)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_in_another_thread_nothing_is_changed():
    before, seen = [signal.getsignal(each) for each in SIGNALS], []

    def work():
        with StopRequest().listening() as request:
            seen.append((request(), [signal.getsignal(each) for each in SIGNALS]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_items_come_until_it_says_so_between_two(stop_at):
    asked = []
    with pytest.raises(Stopped):
        list(until(lambda: asked.append(1) or len(asked) == stop_at, iter("abcd")))
    assert len(asked) == stop_at
    asked.clear()
    assert list(until(lambda: bool(asked.append(1)), iter("abcd"))) == [*"abcd"] and len(asked) == 3


def test_the_items_before_a_stop_have_come():
    taken = []
    with pytest.raises(Stopped):
        for item in until(lambda: len(taken) == 2, "abcd"):
            taken.append(item)
    assert taken == ["a", "b"]


def test_for_one_item_or_none_nobody_is_asked():
    assert list(until(lambda: pytest.fail("asked"), "a")) == ["a"]
    assert list(until(lambda: pytest.fail("asked"), "")) == []
    assert list(until(never, "abc")) == ["a", "b", "c"]


def test_a_stop_says_how_to_go_on():
    assert "goes on from here" in str(Stopped()) and str(Stopped("why")) == "why"
