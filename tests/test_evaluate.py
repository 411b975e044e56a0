"""Scores against loops over single images, and an evaluation that leaves no trace in the network."""

import math

import pytest
import torch
from toy import clone, difference, make_bank, pictures, tiny_net

from kdstudy.evaluate import calibration_error, count_hits, logits_of, score
from kdstudy.stopping import Stopped


def random_case(images: int = 400, classes: int = 5, scale: float = 2.0):
    generator = torch.Generator().manual_seed(images)
    logits, teacher = torch.randn(2, images, classes, generator=generator, dtype=torch.float64) * scale
    labels = torch.where(torch.rand(images, generator=generator) < 0.5, logits.argmax(dim=1), 0)
    return logits, labels, teacher


def softmax(row: list[float]) -> list[float]:
    exponentials = [math.exp(x - max(row)) for x in row]
    return [x / sum(exponentials) for x in exponentials]


def slow_scores(logits, labels, teacher) -> dict[str, float]:
    hits = agreed = nll = 0
    bins = [[] for _ in range(15)]
    for row, label, other in zip(logits.tolist(), labels.tolist(), teacher.tolist(), strict=True):
        probabilities = softmax(row)
        guess = row.index(max(row))
        hits += guess == label
        agreed += guess == other.index(max(other))
        nll -= math.log(probabilities[label])
        confidence = probabilities[guess]
        (place,) = [k for k in range(15) if k / 15 < confidence <= (k + 1) / 15]
        bins[place].append((guess == label, confidence))
    n = len(labels)
    ece = 0.0
    for held in filter(None, bins):
        accuracy = sum(right for right, _ in held) / len(held)
        confidence = sum(confidence for _, confidence in held) / len(held)
        ece += len(held) / n * abs(accuracy - confidence)
    return {"accuracy": 100 * hits / n, "nll": nll / n, "ece": 100 * ece, "agreement": 100 * agreed / n}


@pytest.mark.parametrize("scale", [0.1, 2.0, 8.0])
def test_scores_are_those_of_a_slow_loop(scale):
    logits, labels, teacher = random_case(scale=scale)
    expected = slow_scores(logits, labels, teacher)
    scores = score(logits, labels, teacher)
    assert vars(scores) == pytest.approx(expected, rel=1e-10)


def test_float32_logits_are_scored_in_float64():
    logits, labels, teacher = (x.float() if x.is_floating_point() else x for x in random_case())
    assert score(logits, labels, teacher) == score(logits.double(), labels, teacher.double())


def test_no_agreement_without_a_teacher():
    logits, labels, _ = random_case()
    assert score(logits, labels).agreement is None


def test_certain_logits_keep_every_score_finite():
    logits = torch.tensor([[1000.0, 0.0], [1000.0, 0.0], [0.0, 1000.0], [0.0, 1000.0]])
    scores = score(logits, torch.tensor([0, 0, 1, 0]), logits)
    # confidence exactly 1 lies in the last bin: three right of four
    assert (scores.accuracy, scores.ece, scores.nll, scores.agreement) == (75.0, 25.0, 250.0, 100.0)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    # two bins; confidences 1/2 exactly (wrong) and 3/4 (right): in one bin their gaps would cancel
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], dtype=torch.float64)
    assert calibration_error(logits, torch.tensor([1, 0]), bins=2) == pytest.approx(100 * (0.5 + 0.25) / 2)
    # thirds: 1/3 is in the first of three bins, and alone there
    logits = torch.tensor([[0.0, 0.0, 0.0], [math.log(2), 0.0, 0.0]], dtype=torch.float64)
    assert calibration_error(logits, torch.tensor([1, 0]), bins=3) == pytest.approx(100 * (1 / 3 + 1 / 2) / 2)


def test_perfectly_calibrated_logits_have_no_calibration_error():
    # confidence 3/4, right three times of four
    logits = torch.tensor([[math.log(3), 0.0]] * 4, dtype=torch.float64)
    assert calibration_error(logits, torch.tensor([0, 0, 0, 1])) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("batch", [1, 4, 11, 500])
def test_logits_are_those_of_eval_mode_in_order(batch):
    network = tiny_net(0, dropout=0.5)
    torch.nn.init.normal_(network.norm.running_mean)
    images, labels = pictures(11)
    bank = make_bank(images, labels, padding=2)
    network.eval()
    with torch.no_grad():
        expected = network(next(make_bank(images, labels).plain(11))).logits
    network.train()
    torch.testing.assert_close(logits_of(network, bank, batch), expected, rtol=1e-12, atol=1e-12)


def test_evaluation_leaves_no_trace():
    network = tiny_net(0, dropout=0.5).train()
    network.norm.eval()  # a network may hold modules in either mode
    modes = {name: module.training for name, module in network.named_modules()}
    state, random = clone(network.state_dict()), torch.get_rng_state()
    logits = logits_of(network, make_bank(*pictures(11)))
    assert not logits.requires_grad
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert difference(clone(network.state_dict()), state) is None
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(("batch", "stop_at"), [(4, 1), (4, 2), (1, 10)])
def test_an_evaluation_is_left_between_two_batches_and_leaves_no_trace(batch, stop_at):
    network, looks, asked = tiny_net(0, dropout=0.5).train(), [], []
    network.norm.eval()
    modes = {name: module.training for name, module in network.named_modules()}
    network.register_forward_hook(lambda *_: looks.append(torch.is_grad_enabled()))
    with pytest.raises(Stopped):
        logits_of(network, make_bank(*pictures(11)), batch, lambda: asked.append(1) or len(asked) == stop_at)
    assert looks == [False] * stop_at  # one before each question
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert torch.is_grad_enabled()


def test_whoever_has_but_one_batch_left_is_not_asked():
    network, asked = tiny_net(0), []
    logits = logits_of(network, make_bank(*pictures(11)), 4, lambda: bool(asked.append(1)))
    assert len(asked) == 2 and torch.equal(logits, logits_of(network, make_bank(*pictures(11)), 4))
    logits_of(network, make_bank(*pictures(11)), 11, lambda: pytest.fail("asked"))


def test_hits_are_counted_and_the_count_can_be_left():
    bank = make_bank(*pictures(1100, size=(2, 2)))
    network = tiny_net(0)
    assert count_hits(network, bank) == (logits_of(network, bank).argmax(dim=1) == bank.labels).sum() > 0
    with pytest.raises(Stopped):
        count_hits(network, bank, lambda: True)
