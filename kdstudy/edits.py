"""Edits of a teacher's target, sample by sample: the walks of D'Amicantonio 2021 (chapter 2), on any logits.

All are functions of frozen logits (B, C) and labels (B,), without a gradient, in float32 or better. All is vectorised,
with static shapes, so that nothing waits for the device: a walk that ends at a first failure or success is a prefix of
the sorted entries, and cumulative sums tell its length. Walks are ascending and stable, over the logits as they were
before the edit, with thresholds that stay fixed.
"""

import torch
from torch import Tensor

from kdstudy.core import require_choice

ORDERS = ("value", "abs")
FILLS = ("zero", "min")


@torch.no_grad()
def lower(logits: Tensor, target: Tensor, signed: bool = False) -> tuple[Tensor, Tensor]:
    """Lower one entry per row towards the second highest logit, the run-up, and never below it.

    Walks the other entries upwards and subtracts the absolute value of each from entry `target` (B,), until that would
    put it strictly below the run-up; that step is not made and ends the walk, although a later one might fit. So only
    the highest entry can change. `signed` subtracts the logits as they are, the own entry included.

    Returns the edited logits (B, C), and which entries were subtracted, bool (B, C).
    """
    logits = _full_precision(logits)
    target = target.unsqueeze(1)
    ascending, walk = logits.sort(dim=1, stable=True)
    # With its own entry the target falls below the run-up anyway for C > 2; for C = 2 rounding would decide.
    steps = ascending if signed else ascending.abs().masked_fill(walk == target, float("inf"))
    start = logits.gather(1, target)
    path = torch.cat([start, start - steps.cumsum(dim=1)], dim=1)
    accepted = _leading(path[:, 1:] >= ascending[:, -2:-1])
    end = path.gather(1, accepted.sum(dim=1, keepdim=True))
    return logits.scatter(1, target, end), _in_class_order(accepted, walk, logits)


@torch.no_grad()
def raise_label(logits: Tensor, labels: Tensor, order: str = "value") -> tuple[Tensor, Tensor]:
    """Raise the label's entry just above the highest logit.

    Walks all entries upwards, the label's own and the highest included, and adds the absolute value of each to entry
    `labels` (B,), until that is strictly above the highest logit; the step that gets there is kept, an overshoot of at
    most that step. If all logits but these two are 0, or there are none, and the label's is not positive, the walk can
    end in a tie. `order` "abs" walks by absolute value instead.

    Returns the edited logits (B, C), and which entries were added, bool (B, C). ValueError for another `order`.
    """
    require_choice("order", order, ORDERS)
    logits = _full_precision(logits)
    labels = labels.unsqueeze(1)
    walk = (logits.abs() if order == "abs" else logits).argsort(dim=1, stable=True)
    start = logits.gather(1, labels)
    climbed = logits.abs().gather(1, walk).cumsum(dim=1)
    # Own and highest logit alone climb from below 0 to a tie exactly: compared like this, rounding does not decide it.
    added, last = _up_to_goal(climbed > logits.amax(dim=1, keepdim=True) - start)
    return logits.scatter(1, labels, start + climbed.gather(1, last)), _in_class_order(added, walk, logits)


@torch.no_grad()
def move_mass(probabilities: Tensor, labels: Tensor, conserve: bool = True) -> tuple[Tensor, Tensor]:
    """Move probability to the label, from the least likely class upwards, until none is more likely.

    `conserve`: the donors are all other classes; each gives all it has and is left with exactly 0, so that rows still
    sum to 1. Otherwise all C values, the label's own included, are added to the label and nobody loses any.

    Returns the edited rows (B, C), and which entries were given (at least one), bool (B, C).
    """
    probabilities = _full_precision(probabilities)
    labels = labels.unsqueeze(1)
    # Infinity sorts the label last, where the walk never comes: with the highest entry the goal is reached.
    keys = probabilities.scatter(1, labels, float("inf")) if conserve else probabilities
    walk = keys.argsort(dim=1, stable=True)
    path = probabilities.gather(1, labels) + probabilities.gather(1, walk).cumsum(dim=1)
    given, last = _up_to_goal(path >= probabilities.amax(dim=1, keepdim=True))
    given = _in_class_order(given, walk, probabilities)
    remaining = probabilities.masked_fill(given, 0.0) if conserve else probabilities
    return remaining.scatter(1, labels, path.gather(1, last)), given


@torch.no_grad()
def earth_mover(
    logits: Tensor, labels: Tensor, temperature: float, conserve: bool = True, renormalise: bool = False
) -> Tensor:
    """Probabilities (B, C) at `temperature`; where the teacher is wrong, mass is moved to the label (`move_mass`)."""
    logits = _full_precision(logits)
    probabilities = (logits / temperature).softmax(dim=1)
    moved, _ = move_mass(probabilities, labels, conserve)
    edited = torch.where(_right(logits, labels), probabilities, moved)
    return edited / edited.sum(dim=1, keepdim=True) if renormalise else edited


@torch.no_grad()
def relative_v1(logits: Tensor, labels: Tensor, signed: bool = False) -> Tensor:
    """Logits (B, C): `lower` at the label where the teacher is right, all zero where it is wrong."""
    lowered, _ = lower(logits, labels, signed)
    return lowered.masked_fill(~_right(logits, labels), 0.0)


@torch.no_grad()
def relative_v2(logits: Tensor, labels: Tensor, order: str = "value") -> Tensor:
    """Logits (B, C): `lower` at the label where the teacher is right, `raise_label` where it is wrong."""
    edited, _ = _lower_or_raise(logits, labels, order)
    return edited


@torch.no_grad()
def relative_v3(logits: Tensor, labels: Tensor, order: str = "value", fill: str = "zero") -> Tensor:
    """Logits (B, C): V2, then 0 (or, with `fill` "min", the row's least logit) at the entries that were used.

    The label's entry and the predicted one keep their values. ValueError for another `order` or `fill`.
    """
    require_choice("fill", fill, FILLS)
    edited, used = _lower_or_raise(logits, labels, order)
    dropped = used.scatter(1, logits.argmax(dim=1, keepdim=True), False).scatter(1, labels.unsqueeze(1), False)
    if fill == "min":
        return torch.where(dropped, logits.amin(dim=1, keepdim=True), edited)
    return edited.masked_fill(dropped, 0.0)


@torch.no_grad()
def relative_v4(logits: Tensor, labels: Tensor, literal: bool = False) -> Tensor:
    """Logits (B, C): `lower` at the predicted class, or with `literal` at the label, which spares wrong samples."""
    edited, _ = lower(logits, labels if literal else logits.argmax(dim=1))
    return edited


def _lower_or_raise(logits: Tensor, labels: Tensor, order: str) -> tuple[Tensor, Tensor]:
    right = _right(logits, labels)
    lowered, subtracted = lower(logits, labels)
    raised, added = raise_label(logits, labels, order)
    return torch.where(right, lowered, raised), torch.where(right, subtracted, added)


def _full_precision(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(dim=1, keepdim=True) == labels.unsqueeze(1)


def _leading(mask: Tensor) -> Tensor:
    return mask.long().cumprod(dim=1).bool()


def _up_to_goal(reached: Tensor) -> tuple[Tensor, Tensor]:
    """The steps up to the first that reaches the goal, all if none does; and the rank (B, 1) of the last of them."""
    steps = reached.shape[1]
    last = _leading(~reached).sum(dim=1, keepdim=True).clamp(max=steps - 1)
    return torch.arange(steps, device=reached.device) <= last, last


def _in_class_order(mask: Tensor, walk: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.bool).scatter(1, walk, mask)
