"""Fused networks do what each does alone: taps, gradients, statistics, training, evaluation, weights on disk."""

import copy
import math
from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy import CLASSES, gpu, make_bank, pictures, tiny_net, unsettled

from kdstudy.attention import AttentionTransfer
from kdstudy.blocks import PlainStage, ScaledSwish, StagedNet, bottleneck_block, convolution
from kdstudy.boundaries import ActivationBoundaries
from kdstudy.checkpoint import load_checkpoint, load_weights, save_checkpoint, save_weights
from kdstudy.core import View
from kdstudy.evaluate import logits_of
from kdstudy.fusion import Fused, why_not_fused
from kdstudy.hints import FitNets
from kdstudy.models import Ensemble, build_model
from kdstudy.penultimate import ClassDistance
from kdstudy.response import VanillaKD
from kdstudy.schemes import Batch, Offline

SIZE = 8
SMALL = "wrn_10_0.25"


def grouped_net(name: str, classes: int, image_size: int) -> nn.Module:
    """Bottlenecks in groups; and layers that no network of the study has: images in groups, a classifier without bias.

    Between the last map and the classifier the sides are not pooled away.
    """
    stem = PlainStage(nn.Conv2d(3, 6, 3, padding="same", dilation=2, groups=3), ScaledSwish(), nn.MaxPool2d(2))
    stages = [bottleneck_block(6, 16, 1, groups=2), bottleneck_block(16, 16, 2, groups=2)]
    embed = nn.Sequential(nn.Conv2d(16, 5, 2, stride=2), nn.Flatten())
    return StagedNet(stem, stages, embed, nn.Linear(5 * (image_size // 8) ** 2, classes, bias=False))


def same_sized_net(name: str, classes: int, image_size: int) -> nn.Module:
    """Each of its layers has as many inputs as there are image channels in three networks together.

    No network of the study has a bias or gaps in its first convolution and in no other.
    """
    stem = PlainStage(nn.Conv2d(3, 9, 3, padding=2, dilation=2), nn.ReLU())
    return StagedNet(stem, [PlainStage(convolution(9, 9), nn.ReLU())], nn.Flatten(), nn.Linear(9 * image_size**2, 3))


OWN = {"grouped": grouped_net, "same_sized": same_sized_net}


def networks(name: str, count: int = 3, size: int = SIZE, dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    """Networks of one architecture with other weights and statistics each, placed as the study places them."""
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        network = unsettled(OWN.get(name, build_model)(name, classes=CLASSES, image_size=size))
        made.append(network.to(dtype=dtype, memory_format=torch.channels_last))
    return made


def images(count: int = 6, size: int = SIZE, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator, dtype=dtype).to(memory_format=torch.channels_last)


def labels(seed: int, count: int = 6) -> Tensor:
    return torch.randint(0, CLASSES, (count,), generator=torch.Generator().manual_seed(seed))


def tensors(view: View) -> dict[str, Tensor]:
    """Every tap by name, those of exits too."""
    taps = {"logits": view.logits, "stem": view.stem, "embedding": view.embedding}
    for name in ("maps", "pre_maps"):
        taps |= {f"{name}.{number}": tap for number, tap in enumerate(getattr(view, name))}
    for number, early in enumerate(view.exits):
        taps |= {f"exits.{number}.{name}": tap for name, tap in tensors(early).items()}
    return {name: tap for name, tap in taps.items() if tap is not None}


def agree(views: Iterable[View], alone: Iterable[View], tolerance: float = 1e-12) -> None:
    for view, other in zip(views, alone, strict=True):
        assert isinstance(view, View)
        found, wanted = tensors(view), tensors(other)
        assert list(found) == list(wanted)
        for name in wanted:
            assert found[name].dtype == wanted[name].dtype, name
            torch.testing.assert_close(found[name], wanted[name], rtol=tolerance, atol=tolerance, msg=name)


def same_state(one: nn.Module, other: nn.Module, tolerance: float = 1e-12) -> None:
    state = other.state_dict()
    assert list(one.state_dict()) == list(state)
    for name, tensor in one.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, state[name], rtol=tolerance, atol=tolerance, msg=name)
        else:
            assert torch.equal(tensor, state[name]), name


def optimiser(network: nn.Module, rate: float = 0.02) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9, weight_decay=1e-3, fused=True)


def own_loss(view: View, number: int, seed: int = 0, count: int = 6) -> Tensor:
    """Another loss for every network, of logits, exits and one further tap."""
    answers = [view.logits, *(early.logits for early in view.exits)]
    entropy = sum(F.cross_entropy(answer / (1 + number), labels(10 * seed + number, count)) for answer in answers)
    taps = (*view.pre_maps, view.stem, view.embedding)
    return entropy + 0.1 * taps[number % len(taps)].tanh().square().mean()


def train(members: Sequence[nn.Module], views_of: Callable[[Tensor], Iterable[View]], steps: int, size: int) -> None:
    """SGD on each network's own loss; `views_of` looks at images through a fused network, or through all in turn."""
    optimisers = [optimiser(network) for network in members]
    for step in range(steps):
        losses = [own_loss(view, number, step) for number, view in enumerate(views_of(images(6, size, seed=step)))]
        for each in optimisers:
            each.zero_grad()
        sum(losses).backward()
        if isinstance(views_of, Fused):
            views_of.hand_back()
        for each in optimisers:
            each.step()


def in_turn(members: Iterable[nn.Module]) -> Callable[[Tensor], list[View]]:
    return lambda batch: [network(batch) for network in members]


@pytest.mark.parametrize(
    ("name", "count", "size", "steps"),
    [
        ("wrn_16_1", 3, 8, 4), ("wrn_16_1", 3, 32, 3), ("wrn_16_1", 4, 8, 4), (SMALL, 1, 8, 4), (SMALL, 4, 8, 4),
        ("resnet8x4", 3, 8, 4), ("resnet14x0.5", 4, 16, 4), ("plain8x0.5", 3, 8, 4), ("cnn_small", 4, 8, 4),
        ("resnet18_pruned0.5", 3, 8, 1), ("mobilenet_v2", 3, 16, 1), ("grouped", 3, 16, 4), ("same_sized", 3, 8, 4),
        ("wrn_10_0.5_pruned0.5", 3, 8, 4), ("cnn_small_bottom2", 3, 8, 4), (f"{SMALL}@low", 3, 16, 4),
        (f"{SMALL}@grey", 3, 8, 4), (f"{SMALL}@edges", 3, 8, 4), (f"{SMALL}+sepheads", 4, 8, 4),
        ("resnet8+heads", 3, 8, 4),
    ],
)  # fmt: skip
def test_training_ends_as_each_alone(name, count, size, steps):
    members = networks(name, count, size)
    alone = copy.deepcopy(members)
    fused = Fused(members)
    agree(fused.eval()(images(4, size)), in_turn([network.eval() for network in alone])(images(4, size)))
    fused.train()
    train(members, fused, steps, size)
    train([network.train() for network in alone], in_turn(alone), steps, size)
    for one, other in zip(members, alone, strict=True):
        same_state(one, other)
    # deep batch norms over 6 values amplify rounding: a lone network in another memory format is no closer
    agree(fused(images(6, size, seed=99)), in_turn(alone)(images(6, size, seed=99)), 1e-10)
    counts = [buffer.item() for key, buffer in members[0].state_dict().items() if key.endswith("tracked")]
    assert counts == [steps + 1] * len(counts)


def test_taps_are_those_of_the_network_itself_even_where_nets_see_enlarged_images():
    members = networks("plain18@224", 2, 4, torch.float32)
    for network in members:
        network.stages = network.stages[:0]  # what follows the stem is tried elsewhere
        network.embed = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        network.classifier = nn.Linear(64, 2)
    alone = copy.deepcopy(members)
    agree(Fused(members)(images(2, 4, dtype=torch.float32)), in_turn(alone)(images(2, 4, dtype=torch.float32)), 1e-5)


STUDENTS = {
    "temperatures": [VanillaKD(temperature=temperature, kd_weight=0.4) for temperature in (1.0, 4.0, 12.0)],
    "of several kinds": [
        AttentionTransfer(),  # maps
        FitNets(two_stage=False, kd_weight=3.0),  # one map, through a regressor
        ActivationBoundaries(ce_weight=1.0),  # stem and pre_maps
        ClassDistance(),  # embedding
    ],
}


@pytest.mark.parametrize("methods", STUDENTS.values(), ids=STUDENTS)
def test_methods_and_their_adapters_learn_as_alone(methods):
    (teacher,) = networks("wrn_10_0.5", 1)
    schemes = []
    for student, method in zip(networks(SMALL, len(methods)), methods, strict=True):
        torch.manual_seed(5)
        scheme = Offline(student, teacher, method, Batch(images(), labels(0)))
        scheme.set_modes(scheme.phases()[-1])
        schemes.append(scheme)
    alone = copy.deepcopy(schemes)
    distil(schemes, Fused([scheme.student for scheme in schemes]))
    distil(alone, None)
    for one, other in zip(schemes, alone, strict=True):
        same_state(one, other)


def distil(schemes: Sequence[Offline], fused: Fused | None, steps: int = 3) -> None:
    optimisers = [optimiser(scheme, 1e-3) for scheme in schemes]
    for step in range(steps):
        batch = Batch(images(seed=step), labels(step))
        if fused:
            for scheme, view in zip(schemes, fused(batch.images), strict=True):
                scheme.student.forward = lambda images, view=view: view  # what the fused network saw is its own look
        loss = sum(
            sum(scheme.losses(phase, scheme.turns(phase)[0], batch, None).terms.values())
            for scheme in schemes
            for phase in scheme.phases()[-1:]
        )
        for each in optimisers:
            each.zero_grad()
        loss.backward()
        if fused:
            fused.hand_back()
        for each in optimisers:
            each.step()


@pytest.mark.parametrize(("half", "tolerance"), [(None, 2e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("name", ["wrn_16_1", "resnet8+heads"])
def test_lower_precision_is_that_of_each_alone(name, half, tolerance):
    members = networks(name, 3, dtype=torch.float32)
    alone, fused = copy.deepcopy(members), Fused(members)
    batch = images(32, dtype=torch.float32)
    with torch.autocast("cpu", dtype=half, enabled=half is not None):
        views, seen = fused(batch), in_turn(alone)(batch)
    agree(views, seen, tolerance)
    assert views[0].logits.dtype == (half or torch.float32)
    for look in (views, seen):
        sum(own_loss(view.full_precision(), number, count=32) for number, view in enumerate(look)).backward()
    fused.hand_back()
    for one, other in zip(members, alone, strict=True):
        found, wanted = (torch.cat([p.grad.flatten() for p in network.parameters()]) for network in (one, other))
        assert found.dtype == torch.float32
        assert (found - wanted).norm() < tolerance * wanted.norm()


def diverge(device: str, dtype: torch.dtype, poison: str) -> None:
    """Assert that the others of three networks neither see nor learn anything else when the second one diverges."""
    outcomes = []
    for bad in (math.nan, None):
        members = [network.to(device) for network in networks("resnet8", 3, dtype=dtype)]
        fused = Fused(members)
        if bad and poison == "weights":
            with torch.no_grad():
                for parameter in members[1].parameters():
                    parameter.fill_(bad)
        factors = torch.tensor([1.0, bad if bad and poison == "loss" else 1.0, 1.0], device=device)
        optimisers = [optimiser(network) for network in members]
        for step in range(2):
            views = fused(images(seed=step, dtype=dtype).to(device))
            wanted = [labels(number).to(device) for number in range(3)]
            losses = [F.cross_entropy(view.logits, y) for view, y in zip(views, wanted, strict=True)]
            (torch.stack(losses) * factors).sum().backward()
            fused.hand_back()
            for each in optimisers:
                each.step()
        outcomes.append([{name: tensor.cpu() for name, tensor in network.state_dict().items()} for network in members])
    spoilt, sound = outcomes
    assert not spoilt[1]["classifier.weight"].isfinite().any()
    for number in (0, 2):
        for name, tensor in sound[number].items():
            assert torch.equal(spoilt[number][name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("poison", ["loss", "weights"])
def test_a_network_that_diverges_leaves_the_others_alone(dtype, poison):
    diverge("cpu", dtype, poison)


@gpu
@pytest.mark.parametrize("poison", ["loss", "weights"])
def test_a_network_that_diverges_leaves_the_others_alone_on_a_gpu(poison, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    diverge("cuda", torch.float32, poison)


@gpu
def test_a_captured_step_is_the_step():
    taken, members = [], [network.cuda() for network in networks("wrn_16_1", 3, dtype=torch.float32)]
    batch, wanted = images(dtype=torch.float32).cuda(), [labels(number).cuda() for number in range(3)]
    before = copy.deepcopy([network.state_dict() for network in members])
    fused = Fused(members)
    optimisers = [optimiser(network) for network in members]

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            views = fused(batch)
        sum(F.cross_entropy(view.logits.float(), y) for view, y in zip(views, wanted, strict=True)).backward()
        fused.hand_back()
        for each in optimisers:
            each.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for run in (graph.replay, step):
        for network, state, each in zip(members, before, optimisers, strict=True):
            network.load_state_dict(state)
            for momentum in each.state.values():
                momentum["momentum_buffer"].zero_()
        for _ in range(2):
            run()
        taken.append([{name: tensor.clone() for name, tensor in n.state_dict().items()} for n in members])
    for captured, eager in zip(*taken, strict=True):
        for name, tensor in eager.items():
            torch.testing.assert_close(captured[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
        assert eager["stages.0.0.norm.num_batches_tracked"] == 2 == captured["stages.0.0.norm.num_batches_tracked"]


def test_a_tap_passes_gradient_to_its_own_network_only():
    members = networks(f"{SMALL}+sepheads", 3)
    fused = Fused(members)
    count = len(tensors(fused(images())[0]))
    assert count == 13  # logits, stem, embedding, maps and pre_maps of 3 stages, logits and embedding of 2 exits
    for tap in range(count):
        for number, network in enumerate(members):
            list(tensors(fused(images())[number]).values())[tap].square().sum().backward()
            fused.hand_back()
            for other in members:
                reached = any(p.grad is not None and p.grad.any() for p in other.parameters())
                assert reached == (other is network)


def test_gradients_are_handed_back_as_slices_and_none_stays_behind():
    members = networks(SMALL)
    fused = Fused(members)
    views = fused(images())
    sum(view.maps[0].square().sum() for view in views[:2]).backward()
    storages = {p.grad.untyped_storage().data_ptr() for p in fused.parameters() if p.grad is not None}
    fused.hand_back()
    assert all(parameter.grad is None for parameter in fused.parameters())
    for network in members:
        assert network.stages[1][0].branch[0][0].weight.grad is None
        assert network.classifier.bias.grad is None
        reached = [p.grad for p in network.parameters() if p.grad is not None]
        assert {gradient.untyped_storage().data_ptr() for gradient in reached} == storages
    assert not members[2].stem.layers.weight.grad.any()
    assert members[1].stem.layers.weight.grad.any()
    members[0].stem.layers.weight.grad = torch.ones_like(members[0].stem.layers.weight)
    fused.hand_back()  # there is none by now
    assert members[0].stem.layers.weight.grad is None


def test_networks_are_views_and_keep_their_parameters_and_strides():
    members = networks("mobilenet_v2", 2, dtype=torch.float32)
    kept = [list(network.parameters()) for network in members]
    before = [copy.deepcopy(network) for network in members]
    fused = Fused(members)
    memory = {tensor.untyped_storage().data_ptr() for tensor in fused.state_dict().values()}
    for network, parameters, earlier in zip(members, kept, before, strict=True):
        assert all(now is then for now, then in zip(network.parameters(), parameters, strict=True))
        for name, tensor in network.state_dict().items():
            assert tensor.untyped_storage().data_ptr() in memory, name
            assert tensor.shape == earlier.state_dict()[name].shape, name
            assert tensor.stride() == earlier.state_dict()[name].stride(), name
            assert torch.equal(tensor, earlier.state_dict()[name]), name
    assert sum(p.numel() for p in fused.parameters()) == 2 * sum(p.numel() for p in kept[0])
    own, spread = members[1].stem.layers[0].weight, fused.network.stem.layers[0].weight
    with torch.no_grad():
        own.add_(1)
    assert torch.equal(spread[32:], own) and torch.equal(spread[:32], members[0].stem.layers[0].weight)


def test_fusing_draws_no_random_number_and_copies_no_gradient():
    members = networks(SMALL)
    for network in members:
        network(images()).logits.sum().backward()
    state = torch.get_rng_state()
    fused = Fused(members)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in fused.parameters())


def test_weights_go_to_disk_and_back_while_fused(tmp_path):
    members, others = networks(SMALL, 3), networks(SMALL, 5)[3:]
    fused = Fused(members)
    fused(images())
    save_weights(members[1], tmp_path / "weights.safetensors")
    load_weights(others[0], tmp_path / "weights.safetensors")
    same_state(others[0], members[1], 0)
    save_checkpoint(members[2].state_dict(), tmp_path / "checkpoint.pt")
    others[1].load_state_dict(load_checkpoint(tmp_path / "checkpoint.pt", torch.device("cpu")))
    same_state(others[1], members[2], 0)
    untouched = copy.deepcopy(members[1])
    save_weights(others[1], tmp_path / "weights.safetensors")
    load_weights(members[0], tmp_path / "weights.safetensors")
    same_state(members[1], untouched, 0)
    agree(fused.eval()(images()), in_turn([n.eval() for n in (others[1], others[0], others[1])])(images()))


def test_a_network_is_evaluated_while_fused_and_the_modes_are_apart():
    members = networks(SMALL)
    alone, fused = copy.deepcopy(members), Fused(members)
    bank = make_bank(*pictures(size=(SIZE, SIZE)))
    train(members, fused, 2, SIZE)
    train(alone, in_turn(alone), 2, SIZE)
    torch.testing.assert_close(logits_of(members[2], bank), logits_of(alone[2], bank), rtol=1e-12, atol=1e-12)
    assert members[0].training
    members[0].eval()
    assert all(module.training for module in fused.modules())
    fused.eval()
    assert not any(module.training for module in fused.modules()) and members[1].training
    before = copy.deepcopy(members)
    fused(images())
    for network, earlier in zip(members, before, strict=True):
        same_state(network, earlier, 0)


def test_stages_that_rest_in_eval_mode_rest_in_the_fused_network():
    members = networks(SMALL)
    for network in members:
        network.stages[1].eval()
    alone, fused = copy.deepcopy(members), Fused(members)
    agree(fused(images()), in_turn(alone)(images()))
    for one, other in zip(members, alone, strict=True):
        same_state(one, other)


def test_released_networks_own_their_memory():
    members = networks("resnet8+heads")
    fused = Fused(members)
    train(members, fused, 1, SIZE)
    before = copy.deepcopy(members)
    fused.release()
    addresses = [tensor.untyped_storage().data_ptr() for network in members for tensor in network.state_dict().values()]
    assert len(set(addresses)) == len(addresses)
    for network, earlier in zip(members, before, strict=True):
        same_state(network, earlier, 0)
        for tensor, other in zip(network.parameters(), earlier.parameters(), strict=True):
            assert tensor.stride() == other.stride()
    weights = copy.deepcopy(fused.state_dict())
    train(members[:1], in_turn(members[:1]), 1, SIZE)
    for network, earlier in zip(members[1:], before[1:], strict=True):
        same_state(network, earlier, 0)
    assert all(torch.equal(weights[name], tensor) for name, tensor in fused.state_dict().items())
    for use in (lambda: fused(images()), fused.hand_back):
        with pytest.raises(ValueError, match=r"^the networks were released: fuse them anew$"):
            use()


@pytest.mark.parametrize("released", [True, False])
def test_the_rest_goes_on_without_one(released):
    members = networks(SMALL)
    alone, fused = copy.deepcopy(members), Fused(members)
    train(members, fused, 2, SIZE)
    train(alone, in_turn(alone), 2, SIZE)
    if released:
        fused.release()
    left, others = (members[0], members[2]), (alone[0], alone[2])
    train(left, Fused(left), 2, SIZE)
    train(others, in_turn(others), 2, SIZE)
    for network, other in zip(members, alone, strict=True):
        same_state(network, other)


def frozen() -> list[nn.Module]:
    members = networks(SMALL)
    members[1].stages[0].requires_grad_(False)
    return members


def evaluating() -> list[nn.Module]:
    members = networks(SMALL)
    members[2].stages[1].eval()
    return members


def tied() -> list[nn.Module]:
    members = networks(SMALL)
    members[0].stages[0] = members[1].stages[0]
    return members


def tied_within() -> list[nn.Module]:
    members = networks("same_sized")
    for network in members:
        network.stages.append(PlainStage(convolution(9, 9), nn.ReLU()))
        network.stages[1].layers.weight = network.stages[0].layers.weight
    return members


def altered(change: Callable[[nn.Module], None], **options) -> Callable[[], list[nn.Module]]:
    """Networks that are all changed."""

    def make() -> list[nn.Module]:
        members = networks(SMALL, **options)
        for network in members:
            change(network)
        return members

    return make


def reflect(network: nn.Module) -> None:
    network.stem.layers.padding_mode = "reflect"


def accumulate(network: nn.Module) -> None:
    network.stages[0][0].norm.momentum = None


def subclass(network: nn.Module) -> None:
    network.stages[0] = type("Other", (nn.Sequential,), {})(*network.stages[0])


UNFUSED = {
    "there is none": list,
    "TinyNet is no network of which that is known": lambda: [tiny_net(0), tiny_net(1)],
    "DecisionTree is no network": lambda: networks("tree_2"),
    "QuantisedNet is no network": lambda: networks("cnn_small_int8", dtype=torch.float32),
    "Ensemble is no network": lambda: [Ensemble(networks(SMALL))],
    "stages.0.onward.1 is a Dropout": lambda: networks("swish_teacher"),
    "stages.0 is a Other": altered(subclass),
    "stem.layers is a convolution that pads with other values than zeros": altered(reflect),
    "stages.0.0.norm is a batch norm with cumulative statistics": altered(accumulate),
    r"they differ, stem.layers: Conv2d\(3, 4.* and stem.layers: Conv2d\(3, 8": lambda: (
        networks(SMALL, 1) + networks("wrn_10_0.5", 1)
    ),
    "they differ, stages.0.1: Pre.* and stages.1: ": lambda: networks("wrn_16_1", 1) + networks("wrn_10_1", 1),
    "they differ, .* of torch.float64 on cpu and .* of torch.float32 on cpu": lambda: (
        networks(SMALL, 1) + networks(SMALL, 1, dtype=torch.float32)
    ),
    "they differ, stages.1: Sequential.* in train mode and stages.1: Sequential.* in eval mode": evaluating,
    "stages.0.0.branch.0.0.weight is frozen": frozen,
    "they share parameters or buffers": tied,
    "they share parameters": tied_within,
    "they share parameters or": lambda: networks(SMALL, 1) * 2,
}


@pytest.mark.parametrize("reason", UNFUSED)
def test_other_networks_are_refused_and_stay_as_they_were(reason):
    members = UNFUSED[reason]()
    before = [tensor.data_ptr() for network in members for tensor in network.state_dict().values()]
    with pytest.raises(ValueError, match=f"^these networks cannot be fused: {reason}"):
        Fused(members)
    assert [tensor.data_ptr() for network in members for tensor in network.state_dict().values()] == before
    assert why_not_fused(members) and why_not_fused(networks(SMALL)) == ""


def test_the_deeper_of_two_networks_is_told_from_one_that_is_its_beginning():
    members = networks("same_sized")
    members[1].classifier.register_buffer("further", torch.ones(1, dtype=torch.float64))
    assert why_not_fused(members) == "they differ, nothing there and classifier.further: (1,) of torch.float64 on cpu"


@pytest.mark.parametrize("move", [lambda fused: fused.float(), lambda fused: fused.to("cpu")])
def test_a_fused_network_is_not_moved(move):
    with pytest.raises(ValueError, match="move its networks"):
        move(Fused(networks(SMALL)))
