"""Scores of a trained network on a fixed set of images."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.data import ImageBank
from kdstudy.stopping import ShouldStop, never, until

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Scores:
    """How good a network's logits are; see `score` for each field."""

    accuracy: float
    nll: float
    ece: float
    agreement: float | None


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Inside, the network is in eval mode and passes no gradient; then all of its modules have their modes again."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def logits_of(network: nn.Module, images: ImageBank, batch: int = 500, should_stop: ShouldStop = never) -> Tensor:
    """(N, C) logits of all plain images in eval mode, in the dtype of the images; the network's modes are restored.

    Raises Stopped between two batches if `should_stop` says so.
    """
    with evaluating(network):
        return torch.cat([network(x).logits for x in until(should_stop, images.plain(batch))])


def count_hits(network: nn.Module, images: ImageBank, should_stop: ShouldStop = never) -> Tensor:
    """How many images' largest logit is the label's, a scalar on the device. Raises Stopped as `logits_of` does."""
    return (logits_of(network, images, should_stop=should_stop).argmax(dim=1) == images.labels).sum()


def score(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None) -> Scores:
    """Score (N, C) logits against (N,) labels.

    accuracy: percent of images whose largest logit is the label's. nll: mean negative log-likelihood, nats. ece:
    expected calibration error, percent, 15 bins of equal width of the top probability (Guo et al. 2017, eq. 3).
    agreement: percent of images on which teacher and student predict the same class, None without a teacher.
    """
    logits = logits.double()
    predicted = logits.argmax(dim=1)
    agreement = None if teacher_logits is None else _percent(predicted == teacher_logits.argmax(dim=1))
    return Scores(
        accuracy=_percent(predicted == labels),
        nll=F.cross_entropy(logits, labels).item(),
        ece=calibration_error(logits, labels),
        agreement=agreement,
    )


def calibration_error(logits: Tensor, labels: Tensor, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error of (N, C) logits, percent: sum over bins of (n_b / N) |accuracy_b - confidence_b|."""
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    gap = (predicted == labels).to(confidence.dtype) - confidence
    # bin k holds confidences in (k / bins, (k + 1) / bins]
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    sums = torch.zeros(bins, dtype=gap.dtype, device=gap.device).index_add_(0, index, gap)
    return 100 * sums.abs().sum().item() / len(labels)


def _percent(hits: Tensor) -> float:
    return 100 * hits.double().mean().item()
