"""Learning rates of both schedules against rules written out by hand, and fields out of range."""

import itertools
import math

import pytest
from toy import keras_epochs

from kdstudy.core import Phase
from kdstudy.recipe import Plateau, Recipe, cycle_starts

VALID = {"epochs": 200, "batch": 128, "learning_rate": 0.1}


def test_step_schedule_at_the_thesis_milestones():
    recipe = Recipe(**VALID, milestones=[60, 120, 160], factor=0.2)
    expected = [0.1] * 60 + [0.02] * 60 + [0.004] * 40 + [0.0008] * 40
    assert [recipe.learning_rate_at(epoch) for epoch in range(200)] == pytest.approx(expected, rel=1e-12)


def test_step_schedule_without_milestones_is_constant():
    assert {Recipe(**VALID).learning_rate_at(epoch) for epoch in range(200)} == {0.1}


def plateau_epochs(accuracies, recipe):
    plateau, rates = Plateau(learning_rate=recipe.learning_rate), []
    for accuracy in accuracies:
        rates.append(plateau.learning_rate)
        if plateau.update(accuracy, recipe):
            break
    return rates


def test_plateau_halves_after_two_epochs_without_improvement_and_stops_after_three():
    recipe = Recipe(**VALID, schedule="plateau", factor=0.5)
    # better, better, equal, worse -> halved; better; three not better -> halved at the second, stopped at the third
    accuracies = [50, 60, 60, 59, 61, 61, 60, 58, 99]
    assert plateau_epochs(accuracies, recipe) == [0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.025]
    assert plateau_epochs([0, 0, 0, 0, 0], recipe) == [0.1, 0.1, 0.1, 0.05]
    assert plateau_epochs(range(9), recipe) == [0.1] * 9


@pytest.mark.parametrize(("patience", "stop_patience"), [(2, 3), (1, 3), (2, 5), (2, 4), (3, 3), (3, 2)])
def test_plateau_is_keras_rule_on_every_short_sequence(patience, stop_patience):
    recipe = Recipe(**VALID, schedule="plateau", factor=0.5, patience=patience, stop_patience=stop_patience)
    for accuracies in itertools.product((10.0, 20.0, 30.0), repeat=7):
        expected = keras_epochs(accuracies, 0.1, 0.5, patience, stop_patience)
        assert plateau_epochs(accuracies, recipe) == expected, accuracies


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, 0) for name in ("epochs", "batch", "learning_rate", "factor", "patience", "stop_patience")),
        *((name, -1) for name in ("epochs", "batch", "momentum", "weight_decay", "crop_padding")),
        *((name, math.nan) for name in ("learning_rate", "momentum")),
        ("learning_rate", "0.1"),
        ("precision", "fp16"),
        ("schedule", "linear"),
        ("optimiser", "lamb"),
        ("clip", -1.0),
        ("cycles", 0),
        ("cycles", 2),
        ("milestones", (160, 60)),
        ("milestones", (60, 60)),
    ],
)
def test_field_out_of_range_is_named(field, value):
    shown = list(value) if isinstance(value, tuple) else value
    with pytest.raises(ValueError, match=rf"^{field} must .*") as caught:
        Recipe(**VALID | {field: value})
    assert repr(shown) in str(caught.value)


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(ValueError, match="nesterov needs a momentum above 0"):
        Recipe(**VALID, nesterov=True, momentum=0.0)


def test_a_phase_scales_milestones_and_runs_out_a_plateau():
    recipe = Recipe(epochs=200, batch=8, learning_rate=0.1, milestones=(60, 120, 160))
    short = recipe.for_phase(Phase("heads", lambda *_: {}, share=0.3, recipe={"learning_rate": 0.5}))
    assert (short.epochs, short.milestones, short.learning_rate) == (60, (18, 36, 48), 0.5)
    assert recipe.for_phase(Phase("distil", lambda *_: {})) == recipe
    plateau = Recipe(epochs=20, batch=8, learning_rate=0.1, schedule="plateau")
    assert plateau.for_phase(Phase("heads", lambda *_: {}, share=0.5)).schedule == "step"
    assert plateau.for_phase(Phase("distil", lambda *_: {})).schedule == "plateau"


def test_milestones_that_fall_together_in_a_short_phase_count_once():
    recipe = Recipe(epochs=20, batch=8, learning_rate=0.1, milestones=(10, 12))
    assert recipe.for_phase(Phase("heads", lambda *_: {}, share=0.1)).milestones == (1,)
    # never at the first epoch: that would be another learning rate to begin with
    assert recipe.for_phase(Phase("heads", lambda *_: {}, share=0.01)).milestones == (1,)


def test_a_phase_has_its_share_of_epochs_and_milestones_and_its_rate():
    recipe = Recipe(**VALID, milestones=(60, 120, 160), weight_decay=1e-4)
    assert recipe.for_phase(Phase("all of it", dict)) == recipe
    part = recipe.for_phase(Phase("part", dict, share=0.25, rate=0.1, recipe={"weight_decay": 0.0}))
    assert part.learning_rate == pytest.approx(0.01)
    assert part == Recipe(
        epochs=50, batch=128, learning_rate=part.learning_rate, milestones=(15, 30, 40), weight_decay=0.0
    )


def test_what_a_phase_overrides_is_absolute():
    phase = Phase("own", dict, share=0.5, rate=0.5, recipe={"epochs": 3, "milestones": (), "learning_rate": 0.7})
    part = Recipe(**VALID, milestones=(60,)).for_phase(phase)
    assert (part.epochs, part.milestones, part.learning_rate) == (3, (), 0.7)


@pytest.mark.parametrize("name", ["share", "rate"])
@pytest.mark.parametrize("value", [0, -0.1, math.inf])
def test_a_phase_without_length_or_learning_rate_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be a finite number above 0, not {value!r}"):
        Phase("none", dict, **{name: value})


def test_cosine_falls_from_the_rate_to_nothing_once_in_each_cycle():
    recipe = Recipe(epochs=10, batch=4, learning_rate=0.2, schedule="cosine", cycles=4)
    assert cycle_starts(10, 4) == (0, 2, 5, 8)  # round half to even
    steps = 3
    rates = [recipe.learning_rate_at(epoch + step / steps) for epoch in range(10) for step in range(steps)]
    literal = []
    for epochs in (2, 3, 3, 2):
        iterations = epochs * steps
        literal += [0.1 * (1 + math.cos(math.pi * i / iterations)) for i in range(iterations)]
    assert rates == pytest.approx(literal, rel=1e-12)


def test_a_longer_recipe_has_its_milestones_further_apart():
    recipe = Recipe(epochs=16, batch=4, learning_rate=0.1, milestones=(8, 13))
    assert recipe.lasting(1.0) is recipe
    longer, shorter = recipe.lasting(2.0), recipe.lasting(0.01)
    assert (longer.epochs, longer.milestones) == (32, (16, 26))
    assert (shorter.epochs, shorter.milestones) == (1, (1,))
    with pytest.raises(ValueError, match="length must be"):
        recipe.lasting(-1.0)
