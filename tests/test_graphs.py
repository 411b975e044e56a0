"""Training steps as CUDA graphs: on a tape that does what graphs do, and, where there is a GPU, in real ones."""

import copy
import itertools
import math
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.core import softened_kl
from kdstudy.graphs import Captured, NotCapturable, capture, make_state, optimiser_tensors, rates_on_device
from kdstudy.models import build_model
from kdstudy.schemes import Batch, Scheme
from kdstudy.study import METHODS, build_method
from tests import tape
from tests.test_methods import batch_of, make_scheme, toy_bank
from tests.toy import CPU, clone, difference, gpu

IMAGES, BATCH, CLASSES = 12, 4, 4
SGD = {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": True, "fused": True}
# the phases in which a method draws random numbers in its steps
RANDOM = {
    ("multi_head_graph", "attention"),
    ("crd", "distil"),
    ("zero_shot", "distil"),
    ("data_impressions", "impressions"),
}


class Toy:
    """A student, a teacher and all that a captured step needs; `step` is fit for a graph."""

    def __init__(self, *, adam: bool = False, half: torch.dtype | None = None, device=CPU):
        torch.manual_seed(0)
        form = {"device": device, "memory_format": torch.channels_last}
        networks = [build_model(name, classes=CLASSES, channels=1, image_size=8) for name in ("wrn_10_0.25",) * 2]
        self.student, self.teacher = (network.to(**form) for network in networks)
        self.teacher.eval().requires_grad_(False)
        self.images = torch.randn(IMAGES, 1, 8, 8).to(**form)
        self.labels = (torch.arange(IMAGES) % CLASSES).to(device)
        self.order = torch.cat([torch.randperm(IMAGES) for _ in range(8)]).to(device)  # of eight epochs
        self.within = torch.arange(BATCH, device=device)
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.half, self.device = half, device
        self.count = 0  # of runs of the step
        parameters = self.student.parameters()
        if adam:
            self.optimiser = torch.optim.Adam(parameters, 0.01, weight_decay=1e-2, fused=True, capturable=True)
        else:
            self.optimiser = torch.optim.SGD(parameters, 0.1, **SGD)
        make_state(self.optimiser)
        (self.rate,) = rates_on_device(self.optimiser)

    @property
    def state(self) -> list[Tensor]:
        own = [*self.student.parameters(), *self.student.buffers(), self.position, self.sums]
        return own + optimiser_tensors(self.optimiser)

    def rows(self) -> Tensor:
        return self.order[self.position + self.within]

    def loss(self, index: Tensor) -> Tensor:
        images, labels = self.images[index], self.labels[index]
        with torch.autocast(self.device.type, dtype=self.half or torch.bfloat16, enabled=self.half is not None):
            student = self.student(images).logits.float()
            with torch.no_grad():
                teacher = self.teacher(images).logits.float()
        return F.cross_entropy(student, labels) + softened_kl(student, teacher, 4.0)

    def add(self, loss: Tensor) -> None:
        self.sums[0] += loss.detach()
        self.sums[1] += 1

    def step(self) -> None:
        self.count += 1
        loss = self.loss(self.rows())
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.add(loss)
        self.position += BATCH


def rates(step: int) -> float:
    return 0.1 * math.cos(step / 9)


def run(toy: Toy, step: Callable[[], None], steps: int) -> list[list[Tensor]]:
    """The state after each of so many steps, with another learning rate for each."""
    seen = []
    for number in range(steps):
        toy.rate.fill_(rates(number))
        step()
        seen.append(clone(toy.state))
    return seen


@pytest.mark.parametrize("options", [{}, {"adam": True}, {"half": torch.bfloat16}], ids=["sgd", "adam", "bf16"])
def test_a_replay_is_a_step(options):
    stepped, replayed = Toy(**options), Toy(**options)
    expected = run(stepped, stepped.step, 10)
    assert difference(run(replayed, tape.capture(replayed.step, replayed.state), 10), expected) is None
    assert difference(expected[-1], expected[-2]) is not None
    assert stepped.position == 10 * BATCH and stepped.sums[1] == 10


def test_a_full_and_an_odd_batch_take_turns():
    """As an epoch does: two recordings over the same networks, optimiser and sums."""

    def steps(toy: Toy) -> list[Callable[[], None]]:
        odd = copy.copy(toy)  # shares all tensors
        odd.within = toy.within[:3]
        return [toy.step, odd.step]

    stepped, replayed = Toy(), Toy()
    expected = [run(stepped, step, 3) for step in steps(stepped) * 2]
    replays = [tape.capture(step, replayed.state) for step in steps(replayed)]
    assert difference([run(replayed, replay, 3) for replay in replays * 2], expected) is None


@pytest.mark.parametrize("warm_up", [1, 4])
def test_recording_runs_the_step_and_leaves_no_trace(warm_up):
    toy = Toy()
    run(toy, toy.step, 2)
    before, addresses, random = clone(toy.state), [each.data_ptr() for each in toy.state], torch.get_rng_state()
    toy.count = 0
    tape.capture(toy.step, toy.state, warm_up=warm_up)
    assert toy.count == warm_up + 1
    assert difference(clone(toy.state), before) is None
    assert [each.data_ptr() for each in toy.state] == addresses
    assert torch.equal(torch.get_rng_state(), random)


def test_a_step_is_warmed_up_at_least_once():
    toy = Toy()
    with pytest.raises(ValueError, match="warm_up must be a whole number of at least 1, not 0"):
        tape.capture(toy.step, toy.state, warm_up=0)


def test_warming_up_at_the_end_of_the_data_passes_no_end():
    stepped, replayed = Toy(), Toy()
    steps = len(stepped.order) // BATCH
    for toy in (stepped, replayed):
        run(toy, toy.step, steps - 1)
    replay = tape.capture(replayed.step, replayed.state)
    assert difference(run(replayed, replay, 1), run(stepped, stepped.step, 1)) is None
    with pytest.raises(IndexError):
        stepped.step()


class Sliced(Toy):
    def rows(self):
        start = (self.count - 1) * BATCH
        return self.order[start : start + BATCH]


class Replaced(Toy):
    def add(self, loss):
        self.sums = self.sums + torch.stack([loss.detach(), torch.ones_like(loss)])


class Counted(Toy):
    def loss(self, index):
        return super().loss(index) * (1 + self.count / 10)


class Floating(Toy):
    def step(self):
        self.optimiser.param_groups[0]["lr"] = self.rate.new_zeros(()) + rates(self.count)
        super().step()


class Forgetful(Toy):
    """Its optimiser makes its momentum in the first step, unknown to `state`."""

    def __init__(self):
        super().__init__()
        self.optimiser = torch.optim.SGD(self.student.parameters(), 0.1, **SGD)
        (self.rate,) = rates_on_device(self.optimiser)
        self.before = super().state

    @property
    def state(self):
        return self.before


@pytest.mark.parametrize("cls", [Sliced, Replaced, Counted, Floating, Forgetful])
def test_a_step_that_leans_on_the_host_replays_otherwise(cls):
    stepped, replayed = cls(), cls()
    expected = run(stepped, stepped.step, 4)
    replay = tape.capture(replayed.step, replayed.state)
    assert difference(run(replayed, replay, 4), expected) is not None


# what a loss may be multiplied by without a change, done in ways that no graph can hold
REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "item": (lambda x: x.sum().item(), "_local_scalar_dense waits for the device"),
    "float": (lambda x: float(x.sum()), "_local_scalar_dense waits for the device"),
    "branch": (lambda x: 1 if x.sum() > 0 else 2, "waits for the device"),
    "list": (lambda x: x.tolist()[0][0], "tolist waits for the device"),
    "numpy": (lambda x: x.detach().numpy().sum(), "numpy waits for the device"),
    "host": (lambda x: x.cpu().sum(), "cpu waits for the device"),
    "equal": (lambda x: torch.equal(x, x), "equal waits for the device"),
    "constant": (lambda x: torch.tensor(1.0), "makes a tensor from numbers of the host"),
    "list index": (lambda x: x[[0, 1]], "makes a tensor from numbers of the host"),
    "mask": (lambda x: x[x > 0].sum(), "the shape of what index gives depends on values"),
    "mask put": (
        lambda x: x.clone().index_put_((x > 0,), x.sum()),
        "the shape of what index_put_ gives depends on values",
    ),
    "select": (lambda x: x.masked_select(x > 0).sum(), "shape of what masked_select gives"),
    "nonzero": (lambda x: x.nonzero(), "shape of what nonzero gives"),
    "unique": (lambda x: x.unique(), "shape of what _unique2 gives"),
    "bincount": (lambda x: x.argmax(dim=1).bincount(), "shape of what bincount gives"),
    "eigenvalues": (lambda x: torch.linalg.eigvalsh(x @ x.T), "_linalg_eigh waits for the device"),
    "solve": (lambda x: torch.linalg.solve(torch.eye(4), x), "_linalg_check_errors waits for the device"),
    "noise": (lambda x: torch.randn_like(x), "it draws random numbers"),
    "dropout": (lambda x: F.dropout(x, 0.5), "it draws random numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_graph_can_hold_is_refused_and_the_step_goes_on(name):
    harm, reason = REFUSED[name]

    class Harmful(Toy):
        def loss(self, index):
            harm(self.images[index].flatten(1))
            return super().loss(index)

    toy, harmless = Harmful(), Toy()
    before, random = clone(toy.state), torch.get_rng_state()
    with pytest.raises(NotCapturable, match=f"^the step cannot be captured: .*{reason}") as refusal:
        tape.capture(toy.step, toy.state)
    assert reason in refusal.value.reason
    assert difference(clone(toy.state), before) is None
    assert torch.equal(torch.get_rng_state(), random)
    assert difference(run(toy, toy.step, 2), run(harmless, harmless.step, 2)) is None


def test_an_error_of_the_step_is_its_own_and_the_state_is_put_back():
    toy = Toy()
    before = clone(toy.state)

    def fails():
        toy.step()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        tape.capture(fails, toy.state)
    assert difference(clone(toy.state), before) is None


def test_a_tape_repeats_memory_numbers_and_order():
    """By hand: x becomes 2 x + y, through a view, a new tensor and an operation in place."""
    x, y, factor = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([10.0, 20.0]), [2.0]

    def step():
        new = x.T * factor[0]
        new += y[:, None]
        x.copy_(new.T)

    with tape.Tape() as recorded:
        step()
    assert x.tolist() == [[12, 24], [16, 28]]
    factor[0] = 100.0
    y.fill_(1)
    recorded.replay()
    assert x.tolist() == [[25, 49], [33, 57]]


def test_a_tape_keeps_memory_that_the_step_has_let_go():
    weight = torch.ones(1000, requires_grad=True)
    total = torch.zeros(())

    def step():
        weight.grad = None
        (weight.exp() * weight).sum().backward()
        total.add_(weight.grad.sum())

    with tape.Tape() as recorded:
        step()
    weight.grad = None
    others = [torch.full((1000,), 7.0) for _ in range(20)]
    with torch.no_grad():
        weight.fill_(0)
    recorded.replay()
    assert total.item() == pytest.approx(1000 * (2 * math.e) + 1000, rel=1e-5)  # (x e^x)' at 1 and at 0
    assert all((other == 7).all() for other in others)


def test_a_tape_sees_the_way_back():
    toy = Toy()
    with tape.Tape() as recorded:
        toy.step()
    names = {function._schema.name for function, *_ in recorded.entries}
    assert {"aten::convolution_backward", "aten::native_batch_norm_backward", "aten::_fused_sgd_"} <= names


def test_one_hot_is_what_it_is_on_a_gpu():
    labels, out = torch.tensor([0, 3, 1]), torch.zeros(3, 4, dtype=torch.int64)
    replay = tape.capture(lambda: out.copy_(F.one_hot(labels, 4)), [out])
    assert not out.any()
    replay()
    assert torch.equal(out, F.one_hot(labels, 4))


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.int32)


def small_network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3, 2)).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_first_step_is_torchs_to_the_bit(momentum, nesterov, decay):
    ends = []
    for prepared in (False, True):
        network = small_network()
        options = {"momentum": momentum, "nesterov": nesterov, "weight_decay": decay}
        optimiser = torch.optim.SGD(network.parameters(), 0.1, fused=True, **options)
        if prepared:
            make_state(optimiser)
        for number in range(3):
            network(torch.ones(2, 2, 3, 3)).square().sum().backward()
            network[0].weight.grad[0] = -0.0 if number == 0 else 0.5
            optimiser.step()
            optimiser.zero_grad()
            ends.append([bits(each) for each in (*network.parameters(), *optimiser_tensors(optimiser))])
    for ours, torchs in zip(ends[3:], ends[:3], strict=True):
        assert len(ours) == len(torchs) == (8 if momentum else 4)
        assert all(map(torch.equal, ours, torchs))


def test_adam_starts_as_torchs_to_the_bit():
    networks = small_network(), small_network()
    ours, torchs = (torch.optim.Adam(each.parameters(), 0.1, weight_decay=0.1, fused=True) for each in networks)
    make_state(ours)
    for network, optimiser in zip(networks, (ours, torchs), strict=True):
        network(torch.ones(2, 2, 3, 3)).square().sum().backward()
        optimiser.step()
    assert difference(clone(ours.state_dict()), clone(torchs.state_dict())) is None
    assert all(torch.equal(*pair) for pair in zip(networks[0].parameters(), networks[1].parameters(), strict=True))
    assert len(optimiser_tensors(ours)) == 3 * 4


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
def test_state_that_is_there_is_made_new_in_place(cls):
    network = small_network()
    optimiser = cls(network.parameters(), 0.1, **({"momentum": 0.9} if cls is torch.optim.SGD else {}))
    make_state(optimiser)
    fresh, addresses = clone(optimiser.state_dict()), [each.data_ptr() for each in optimiser_tensors(optimiser)]
    network(torch.ones(2, 2, 3, 3)).sum().backward()
    optimiser.step()
    assert difference(clone(optimiser.state_dict()), fresh) is not None
    make_state(optimiser)
    assert difference(clone(optimiser.state_dict()), fresh) is None
    assert [each.data_ptr() for each in optimiser_tensors(optimiser)] == addresses
    assert not any(each.requires_grad for each in optimiser_tensors(optimiser))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.1),
        lambda p: torch.optim.Adam(p, 0.1, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, 0.1),
    ],
    ids=["dampening", "amsgrad", "rmsprop"],
)
def test_an_optimiser_that_starts_otherwise_is_refused(make):
    with pytest.raises(ValueError, match="only SGD without dampening and Adam without AMSGrad"):
        make_state(make(small_network().parameters()))


def test_rates_are_tensors_that_steps_read():
    network = small_network()
    groups = [{"params": network[0].parameters()}, {"params": network[2].parameters(), "lr": 0.25}]
    optimiser = torch.optim.SGD(groups, 0.5, fused=True)
    first, second = rates_on_device(optimiser)
    assert [first.item(), second.item()] == [0.5, 0.25]
    assert first.dtype == torch.float32 and first.shape == ()
    first.fill_(0)
    before = clone(list(network.parameters()))
    network(torch.ones(2, 2, 3, 3)).sum().backward()
    optimiser.step()
    same = [torch.equal(*pair) for pair in zip(before, network.parameters(), strict=True)]
    assert same == [True, True, False, False]


STRANGE: dict[str, tuple[Callable[[Tensor], Any], str | None]] = {
    "nothing": (lambda x: x.sum() * 2 + torch.zeros_like(x) + torch.arange(4, device=x.device), None),
    "no device": (lambda x: torch.arange(4), "arange touches a tensor of the host"),
    "mixed": (lambda x: x + HOST, "add touches a tensor of the host"),
    "scalar": (lambda x: x * HOST[0], "select touches a tensor of the host"),
    "moved": (lambda x: HOST.to(x.device), "_to_copy touches a tensor of the host"),
    "item": (lambda x: x.sum().item(), "_local_scalar_dense waits"),
    "mask": (lambda x: x[x > 0], "depends on values"),
    "constant": (lambda x: torch.tensor(1.0, device=x.device), "from numbers of the host"),
    "host": (lambda x: x.cpu(), "cpu waits"),
}
HOST = torch.ones(4)


@pytest.mark.parametrize("name", STRANGE)
def test_a_strange_device_shows_what_touches_the_host(name):
    harm, reason = STRANGE[name]
    network = build_model("wrn_10_0.25", classes=CLASSES, channels=1, image_size=8)
    batch = Batch(torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))

    def step(network: nn.Module, batch: Batch) -> None:
        harm(batch.images.mean(dim=(1, 2)).mean(dim=1) + torch.zeros(4, device=batch.images.device))
        F.cross_entropy(network(batch.images).logits, batch.labels).backward()
        assert all(each.grad.shape == each.shape for each in network.parameters())

    if reason is None:
        tape.step_on_a_stranger(step, network, batch)
    else:
        with pytest.raises(NotCapturable, match=reason):
            tape.step_on_a_stranger(step, network, batch)
    assert all(each.grad is None for each in network.parameters())


class Lesson:
    """A phase of a method, stepped as the loop does, on a batch whose memory stays while its images change."""

    def __init__(self, key: str, number: int):
        self.scheme = make_scheme(key)
        self.phase = self.scheme.phases()[number]
        self.scheme.set_modes(self.phase)
        self.batch = batch_of()
        self.held_out = toy_bank(16)
        self.sums = torch.zeros(1, dtype=torch.float64)
        self.turns = []
        for turn in self.scheme.turns(self.phase):
            parameters = self.scheme.trained_parameters(turn.trains)
            if (dict(self.phase.recipe) | dict(turn.recipe)).get("optimiser") == "adam":
                optimiser = torch.optim.Adam(parameters, 0.01, fused=True, capturable=True)
            else:
                optimiser = torch.optim.SGD(parameters, 0.01, **SGD)
            make_state(optimiser)
            rates_on_device(optimiser)
            self.turns.append((turn, optimiser, parameters))

    @property
    def state(self) -> list[Tensor]:
        moments = [tensor for _, optimiser, _ in self.turns for tensor in optimiser_tensors(optimiser)]
        return [*self.scheme.parameters(), *self.scheme.buffers(), *moments, self.sums]

    def step(self) -> None:
        for turn, optimiser, parameters in self.turns:
            if turn.fresh:
                make_state(optimiser)
            for _ in range(turn.times):
                losses = self.scheme.losses(self.phase, turn, self.batch, None)
                optimiser.zero_grad(set_to_none=True)
                loss = sum(losses.terms.values())
                loss.backward(inputs=parameters)
                nn.utils.clip_grad_norm_(parameters, 5.0)
                optimiser.step()
                self.sums += loss.detach() + sum(losses.counts.values())

    def epochs(self, step: Callable[[], None]) -> list[Tensor]:
        for epoch, numbers in enumerate([[0], [1, 2]]):
            self.scheme.set_clocks(epoch, 2)
            self.scheme.begin_epoch(epoch, 2, self.held_out)
            for number in numbers:
                self.scheme.begin_step(number)
                self.batch.images.copy_(self.batch.images.roll(1, dims=0).flip(3))
                step()
        return clone(self.state)


@pytest.mark.parametrize("key", METHODS)
def test_methods_are_fit_for_graphs_unless_they_draw_random_numbers(key):
    for number in range(len(build_method(key).phases())):
        replayed = Lesson(key, number)
        if key != "quantised":  # which holds functions that cannot be copied
            tape.step_on_a_stranger(losses_of_a_step, replayed.scheme, replayed.batch, number)
        if (key, replayed.phase.name) in RANDOM:
            with pytest.raises(NotCapturable, match="it draws random numbers"):
                tape.capture(replayed.step, replayed.state, warm_up=1)
            continue
        replay = tape.capture(replayed.step, replayed.state, warm_up=1)
        stepped = Lesson(key, number)
        expected = stepped.epochs(stepped.step)
        assert difference(replayed.epochs(replay), expected) is None, replayed.phase.name


def losses_of_a_step(scheme: Scheme, batch: Batch, number: int) -> None:
    phase = scheme.phases()[number]
    scheme.set_modes(phase)
    for turn in scheme.turns(phase):
        losses = scheme.losses(phase, turn, batch, None)
        sum(losses.terms.values()).backward(inputs=scheme.trained_parameters(turn.trains))


class Device:
    """Stands for torch.cuda on a host without a GPU: notes what is asked of it, in order."""

    def __init__(self, monkeypatch, *, ends: str | None = None):
        self.notes, self.mode, self.ends = [], 0, ends
        for name in ("Stream", "current_stream", "CUDAGraph", "set_sync_debug_mode", "stream", "graph", "device"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.mode)

    def Stream(self):
        return self.stream_named("side")

    def current_stream(self):
        return self.stream_named("current")

    def stream_named(self, name):
        stream = type("Stream", (), {"name": name})()
        stream.wait_stream = lambda other: self.notes.append(f"{name} waits for {other.name}")
        return stream

    def CUDAGraph(self):
        return type("Graph", (), {"replay": lambda _: self.notes.append("replay")})()

    def set_sync_debug_mode(self, mode):
        self.mode = mode

    @contextmanager
    def device(self, device):
        self.notes.append(f"at {device}")
        yield

    @contextmanager
    def stream(self, stream):
        self.notes.append(f"on {stream.name}")
        try:
            yield
        finally:
            self.notes.append(f"off {stream.name}")

    @contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        self.notes.append(f"begin {pool} {stream.name} {capture_error_mode}")
        try:
            yield
        finally:
            self.notes.append("end")
            if self.ends:
                raise RuntimeError(self.ends)


def test_a_capture_warms_up_rehearses_and_records_on_one_stream(monkeypatch):
    device, x = Device(monkeypatch), torch.zeros(())

    def step():
        x.add_(1)
        device.notes.append(f"step {device.mode}")

    captured = capture(step, iter([x]), warm_up=2, pool=(0, 7))
    captured()
    assert device.notes == [
        "at cpu",
        "side waits for current",
        "on side",
        "step 0",
        "step 0",
        "step error",
        "begin (0, 7) side thread_local",
        "step 0",
        "end",
        "off side",
        "current waits for side",
        "replay",
    ]
    assert isinstance(captured, Captured) and captured.step is step and x == 0 and device.mode == 0


@pytest.mark.parametrize("ends", [None, "the end fails, too"])
@pytest.mark.parametrize(
    "at, error, expected, message",
    [
        (2, RuntimeError("waits\nand more"), NotCapturable, "^the step cannot be captured: waits$"),
        (3, RuntimeError("not while capturing\nand more"), NotCapturable, "captured: not while capturing$"),
        (1, RuntimeError("a mistake in the step"), RuntimeError, "^a mistake in the step$"),
        (2, torch.OutOfMemoryError("full"), torch.OutOfMemoryError, "full"),
        (3, torch.OutOfMemoryError("full"), torch.OutOfMemoryError, "full"),
    ],
    ids=["rehearsal", "capture", "warm-up", "memory in the rehearsal", "memory in the capture"],
)
def test_a_capture_that_fails_says_what_failed_first(monkeypatch, ends, at, error, expected, message):
    device, x, count = Device(monkeypatch, ends=ends), torch.zeros(()), itertools.count(1)

    def step():
        x.add_(1)
        if next(count) == at:
            raise error

    with pytest.raises(expected, match=message):
        try:
            raise RuntimeError("handled, and nothing to do with it")
        except RuntimeError:
            capture(step, [x], warm_up=1)
    assert x == 0 and device.mode == 0
    assert device.notes[-2:] == ["off side", "current waits for side"]


def test_a_capture_that_only_fails_to_end_is_refused(monkeypatch):
    device = Device(monkeypatch, ends="the end fails")
    with pytest.raises(NotCapturable, match=r"captured: the end fails$"):
        capture(lambda: None, [], warm_up=1)
    assert device.notes[0] == "at 0"  # where there is no state, the current one


GPU = torch.device("cuda")


@gpu
@pytest.mark.parametrize("options", [{}, {"adam": True}, {"half": torch.bfloat16}], ids=["sgd", "adam", "bf16"])
def test_a_graph_is_a_step(options):
    stepped, replayed = Toy(device=GPU, **options), Toy(device=GPU, **options)
    before = clone(replayed.state)
    replay = capture(replayed.step, replayed.state)
    assert difference(clone(replayed.state), before) is None
    for ours, theirs in zip(run(replayed, replay, 10), run(stepped, stepped.step, 10), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@gpu
def test_graphs_of_a_full_and_an_odd_batch_share_a_pool():
    stepped, replayed = Toy(device=GPU), Toy(device=GPU)
    pool = torch.cuda.graph_pool_handle()
    odd, odd_stepped = copy.copy(replayed), copy.copy(stepped)
    odd.within, odd_stepped.within = replayed.within[:3], stepped.within[:3]
    replays = [capture(each.step, each.state, pool=pool) for each in (replayed, odd)]
    for replay, step in zip(replays * 3, [stepped.step, odd_stepped.step] * 3, strict=True):
        ours, theirs = run(replayed, replay, 1), run(stepped, step, 1)
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@gpu
@pytest.mark.parametrize("name", ["item", "mask", "noise", "numpy"])
def test_a_refused_graph_leaves_all_usable(name):
    harms = {
        "item": lambda x: x.sum().item(),
        "mask": lambda x: x[x > 0],
        "noise": torch.randn_like,
        "numpy": lambda x: x.cpu().numpy(),
    }

    class Harmful(Toy):
        def loss(self, index):
            harms[name](self.images[index])
            return super().loss(index)

    toy = Harmful(device=GPU)
    before, random, stream = clone(toy.state), torch.cuda.get_rng_state(), torch.cuda.current_stream()
    with pytest.raises(NotCapturable):
        capture(toy.step, toy.state)
    assert difference(clone(toy.state), before) is None
    assert torch.equal(torch.cuda.get_rng_state(), random)
    assert torch.cuda.current_stream() == stream and torch.cuda.get_sync_debug_mode() == 0
    run(toy, toy.step, 2)
    torch.cuda.empty_cache()
    fit = Toy(device=GPU)
    capture(fit.step, fit.state)()
    assert fit.position == BATCH
