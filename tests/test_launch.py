"""Launch: which convolutions two nets share, whom each term trains, and a light net that stands alone afterwards."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy import PADDING, clone, difference, make_bank, make_recipe, make_training, pictures, run_session

from kdstudy.checkpoint import load_weights, save_weights
from kdstudy.core import Method, Phase
from kdstudy.evaluate import logits_of
from kdstudy.launch import Launch, LaunchOptions, share_convolutions
from kdstudy.models import build_model, count_parameters
from kdstudy.mutual import Codistillation
from kdstudy.recipe import Recipe
from kdstudy.response import CrossEntropy, SphericalKD, VanillaKD
from kdstudy.reuse import ReusedClassifier
from kdstudy.rocket import RocketLaunching
from kdstudy.schemes import Alone, Batch, Cast
from kdstudy.sections import AdaIN
from kdstudy.train import Training

WIDE, RESIDUAL = ("wrn_16_0.25", "wrn_28_0.25"), ("resnet14x0.25", "resnet20x0.25")
BOTTOM = ("wrn_16_0.25_bottom2", "wrn_16_0.25")
families = pytest.mark.parametrize("pair", [WIDE, RESIDUAL, BOTTOM], ids=str)


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return build_model(name, classes=3, channels=3, image_size=(6, 5)).to(dtype)


def a_batch(count: int = 6) -> Batch:
    bank = make_bank(*pictures(count))
    return Batch(next(bank.plain(count)), bank.labels)


def launched(pair=WIDE, method=None, seed: int = 0, share: bool = True) -> Launch:
    """A light net and a booster with the weights of this seed."""
    torch.manual_seed(seed)
    cast = Cast(build, pair[0], (pair[1],))
    return Launch.assemble(cast, method or RocketLaunching(), a_batch(), LaunchOptions(share=share))


def losses_of(scheme: Launch, batch: Batch | None = None):
    (phase,) = scheme.phases()
    (turn,) = scheme.turns(phase)
    scheme.set_modes(phase)
    return scheme.losses(phase, turn, batch or a_batch(), None)


def convolutions(network: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}


# what is shared


@families
def test_all_convolutions_of_the_light_net_are_the_boosters_and_nothing_else_is(pair):
    scheme = launched(pair)
    light, booster = convolutions(scheme.student), convolutions(scheme.booster)
    assert all(booster[name] is own for name, own in light.items())
    ours, theirs = ({id(x) for x in (*net.parameters(), *net.buffers())} for net in (scheme.student, scheme.booster))
    assert ours & theirs == {id(own.weight) for own in light.values()}
    wanted = sum(own.weight.numel() for own in light.values())
    assert scheme.shared == pytest.approx(wanted / count_parameters(build(pair[0])))
    assert 0.8 < scheme.shared < 1


def test_the_first_blocks_of_every_stage_are_shared():
    scheme = launched(WIDE)  # of 2 and 4 blocks
    for own, other in zip(scheme.student.stages, scheme.booster.stages, strict=True):
        assert (len(own), len(other)) == (2, 4)
        for number in range(2):
            assert other[number].branch[0][0] is own[number].branch[0][0]
            assert other[number].branch[2] is own[number].branch[2]
            assert other[number].shortcut is own[number].shortcut or number == 0
            assert other[number].norm is not own[number].norm
    shortcuts = [stage[0].shortcut for stage in scheme.student.stages]
    assert shortcuts[0] is None and shortcuts[1] is scheme.booster.stages[1][0].shortcut
    assert scheme.student.stem.layers is scheme.booster.stem.layers


def test_the_published_pair_shares_all_of_its_convolutions():
    with torch.device("meta"):
        light, booster = (build_model(name, classes=10) for name in ("wrn_16_2", "wrn_40_2"))
    shared = share_convolutions(light, booster)
    # a stem, and per stage four convolutions and, where it widens, a shortcut: in WRN-16-2 all of them do
    assert len(shared) == 1 + 3 * (4 + 1) == len(convolutions(light))
    assert len(convolutions(booster)) == 1 + 3 * (12 + 1)


def test_of_other_widths_only_what_is_equally_shaped_is_shared():
    light, booster = build("wrn_10_1"), build("wrn_10_2")  # both stems have 16 channels
    assert share_convolutions(light, booster) == ["stem.layers"]
    assert booster.stem.layers is light.stem.layers


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1, stride=2, bias=False),
        nn.Conv2d(4, 4, 3, padding=0, bias=False),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=False),
        nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False),
        nn.Conv2d(4, 8, 3, padding=1, bias=False),
        nn.Identity(),
    ],
    ids=str,
)
def test_a_convolution_is_shared_only_with_its_like(other):
    def stem():
        return nn.Conv2d(3, 4, 3, padding=1, bias=False)

    light = nn.Sequential(stem(), nn.Conv2d(4, 4, 3, padding=1, bias=False))
    assert share_convolutions(light, nn.Sequential(stem(), other)) == ["0"]
    booster = nn.Sequential(stem(), nn.Conv2d(4, 4, 3, padding=1, bias=False))
    assert share_convolutions(light, booster) == ["0", "1"] and list(booster) == list(light)


@pytest.mark.parametrize("pair", [("wrn_10_0.25", "wrn_10_0.5"), ("wrn_10_1", "resnet14")], ids=str)
def test_nets_without_anything_to_share_are_refused(pair):
    with pytest.raises(ValueError, match="differ in their first convolution and so can share none"):
        launched(pair)
    assert launched(pair, share=False).shared == 0


def test_without_sharing_the_nets_have_no_number_in_common():
    scheme = launched(WIDE, share=False)
    ours, theirs = ({id(p) for p in net.parameters()} for net in (scheme.student, scheme.booster))
    assert not ours & theirs and scheme.shared == 0


@families
@pytest.mark.parametrize("share", [False, True])
def test_the_light_net_starts_as_a_student_alone_and_the_booster_otherwise(pair, share):
    scheme = launched(pair, seed=3, share=share)
    torch.manual_seed(3)
    alone, booster = build(pair[0]), build(pair[1])
    assert difference(clone(scheme.student.state_dict()), clone(alone.state_dict())) is None
    light, found, drawn = (convolutions(net) for net in (alone, scheme.booster, booster))
    for name, own in found.items():
        shared = share and name in light
        assert torch.equal(own.weight, (light if shared else drawn)[name].weight), name
        assert name not in light or not torch.equal(light[name].weight, drawn[name].weight)


# the bottom version


@pytest.mark.parametrize("name", ["wrn_16_1", "resnet14x0.5", "resnet18", "mobilenet_v2", "cnn_small", "swish_teacher"])
@pytest.mark.parametrize("kept", [1, 2])
def test_a_bottom_is_the_lower_stages_pooled_with_a_classifier(name, kept):
    torch.manual_seed(0)
    whole = build_model(name, classes=5).double().eval()
    bottom = build_model(f"{name}_bottom{kept}", classes=5).double()
    assert all(module.training for module in bottom.modules())
    bottom.eval()
    lower = {key: x for key, x in whole.state_dict().items() if key in bottom.state_dict() and "classifier" not in key}
    assert lower and {key.split(".")[0] for key in lower} == {"stem", "stages"}
    assert set(bottom.state_dict()) - set(lower) == {"classifier.weight", "classifier.bias"}
    bottom.load_state_dict(lower, strict=False)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    view, reference = bottom(images), whole(images)
    torch.testing.assert_close(view.maps, reference.maps[:kept])
    torch.testing.assert_close(view.pre_maps, reference.pre_maps[:kept])
    if "wrn" in name or "resnet" in name:
        embedding = F.relu(reference.pre_maps[kept - 1]).mean(dim=(2, 3))
        torch.testing.assert_close(view.embedding, embedding)
        torch.testing.assert_close(view.logits, bottom.classifier(embedding))
    assert view.logits.shape == (2, 5)


def test_a_bottoms_size_is_that_of_its_parts():
    with torch.device("meta"):
        bottom, whole = (build_model(name, classes=10) for name in ("wrn_40_2_bottom2", "wrn_40_2"))
    last = count_parameters(whole.stages[2]) + count_parameters(whole.classifier)
    assert count_parameters(bottom) == count_parameters(whole) - last + 64 * 10 + 10


def test_a_bottoms_convolutions_are_drawn_for_relu():
    torch.manual_seed(0)
    bottom = build_model("wrn_16_4_bottom2", classes=10)
    for name, convolution in convolutions(bottom).items():
        fan_out = convolution.out_channels * convolution.kernel_size[0] ** 2
        assert convolution.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), name


@pytest.mark.parametrize("name", ["wrn_16_1_bottom3", "cnn_small_bottom4", "resnet18_bottom9"])
def test_a_bottom_that_leaves_nothing_out_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name} cannot be: .* has [34] stages, and one at least must go"):
        build_model(name, classes=10)


@pytest.mark.parametrize("name", ["wrn_16_1_bottom0", "wrn_16_1_bottom", "wrn_15_1_bottom2"])
def test_other_bottoms_are_unknown(name):
    with pytest.raises(ValueError, match=r"unknown model|depth"):
        build_model(name, classes=10)


# gradients


def parts_of(scheme: Launch) -> dict[str, list[nn.Parameter]]:
    """The parameters of the light net alone, of the booster alone, and of both."""
    ours, theirs = ({id(p): p for p in net.parameters()} for net in (scheme.student, scheme.booster))
    return {
        "light": [p for key, p in ours.items() if key not in theirs],
        "booster": [p for key, p in theirs.items() if key not in ours],
        "both": [p for key, p in ours.items() if key in theirs],
    }


@families
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(("term", "net"), [("ce", "light"), ("kd", "light"), ("booster", "booster")])
def test_every_term_moves_its_own_net_and_what_both_share(pair, share, term, net):
    scheme = launched(pair, share=share)
    terms = losses_of(scheme).terms
    assert list(terms) == ["ce", "kd", "booster"]
    for part, parameters in parts_of(scheme).items():
        gradients = (
            torch.autograd.grad(terms[term], parameters, retain_graph=True, allow_unused=True) if parameters else ()
        )
        reached = [gradient is not None and gradient.any().item() for gradient in gradients]
        if part in (net, "both"):
            assert all(reached), part
        else:
            assert not any(gradient is not None for gradient in gradients), part
    assert bool(parts_of(scheme)["both"]) == share


@families
def test_the_terms_are_those_of_two_nets_that_see_the_same_batch(pair):
    scheme, batch = launched(pair), a_batch()
    light, booster = scheme.student.train()(batch.images), scheme.booster.train()(batch.images)
    losses = losses_of(scheme, batch)
    expected = {
        "ce": F.cross_entropy(light.logits, batch.labels),
        "kd": 0.03 * ((light.logits - booster.logits) ** 2).sum() / 6,
        "booster": F.cross_entropy(booster.logits, batch.labels),
    }
    assert {name: term.item() for name, term in losses.terms.items()} == pytest.approx(
        {name: term.item() for name, term in expected.items()}, rel=1e-12
    )
    assert losses.counts["correct"] == (light.logits.argmax(dim=1) == batch.labels).sum()


def test_batch_norms_count_every_batch_once_in_each_net():
    scheme = launched(WIDE)
    losses_of(scheme)
    norms = [module for module in scheme.modules() if isinstance(module, nn.BatchNorm2d)]
    light = [module for module in scheme.student.modules() if isinstance(module, nn.BatchNorm2d)]
    assert 0 < len(light) < len(norms)
    assert {int(norm.num_batches_tracked) for norm in norms} == {1}
    means = [net.stages[0][0].norm.running_mean for net in (scheme.student, scheme.booster)]
    assert torch.equal(*means)  # behind convolutions that are shared and norms that have not been trained yet
    assert not torch.equal(*(net.stages[1][1].norm.running_mean for net in (scheme.student, scheme.booster)))


def test_sizing_adapters_leaves_no_trace():
    scheme = launched(WIDE)
    norms = [module for module in scheme.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {int(norm.num_batches_tracked) for norm in norms} == {0}


# a run


def test_a_step_follows_the_sum_of_all_gradients_where_both_nets_share():
    scheme = launched(WIDE)
    (phase,) = scheme.phases()
    parameters = scheme.trained_parameters(phase.trains)
    assert len(parameters) == len({id(p) for p in parameters}) == len(list(scheme.parameters()))
    recipe = make_recipe(epochs=1, batch=22, crop_padding=PADDING, momentum=0.0, weight_decay=0.0)
    before = [p.detach().clone() for p in parameters]
    seen = []
    losses = scheme.losses

    def watched(*arguments):
        answer = losses(*arguments)
        terms = answer.terms.values()
        seen.append([torch.autograd.grad(t, parameters, retain_graph=True, allow_unused=True) for t in terms])
        return answer

    scheme.losses = watched
    make_training(scheme, recipe).run()
    (gradients,) = seen
    for parameter, start, *own in zip(parameters, before, *gradients, strict=True):
        whole = sum(gradient for gradient in own if gradient is not None)
        torch.testing.assert_close(parameter, start - 0.2 * whole)


def test_a_booster_that_shares_nothing_learns_as_if_it_were_alone():
    scheme, recipe = launched(WIDE, share=False), make_recipe(epochs=2)
    twin = build(WIDE[1])
    twin.load_state_dict(scheme.booster.state_dict())
    history = make_training(scheme, recipe).run()
    alone = make_training(Alone(twin, CrossEntropy(), a_batch()), recipe).run()
    assert [row["booster"] for row in history] == [row["ce"] for row in alone]
    assert difference(clone(scheme.booster.state_dict()), clone(twin.state_dict())) is None


@families
def test_convolutions_stay_shared_through_training(pair):
    scheme = launched(pair)
    before = clone(scheme.student.state_dict())
    make_training(scheme, make_recipe(epochs=1)).run()
    light, booster = convolutions(scheme.student), convolutions(scheme.booster)
    assert all(booster[name] is own for name, own in light.items())
    assert not any(torch.equal(own.weight, before[f"{name}.weight"]) for name, own in light.items())


@pytest.mark.parametrize("stop_after", range(1, 6))
def test_a_run_that_is_stopped_at_any_step_goes_on_exactly(tmp_path, stop_after):
    recipe, checkpoint = make_recipe(epochs=2, milestones=(1,)), tmp_path / "checkpoint.pt"
    whole = run_session(launched(WIDE), recipe)
    assert run_session(launched(WIDE), recipe, checkpoint, stop_after=stop_after).stopped
    scheme = launched(WIDE)
    resumed = run_session(scheme, recipe, checkpoint)
    assert (whole.steps, resumed.steps) == (6, 6 - stop_after)
    assert difference(resumed.outcome, whole.outcome) is None
    assert scheme.shared == launched(WIDE).shared
    for name in convolutions(scheme.student):
        assert torch.equal(whole.state[f"student.{name}.weight"], whole.state[f"booster.{name}.weight"])


@families
def test_the_light_nets_weights_fill_a_plain_student(tmp_path, pair):
    scheme = launched(pair)
    make_training(scheme, make_recipe(epochs=1)).run()
    path = tmp_path / "weights.safetensors"
    save_weights(scheme.deployed, path)
    student = build(pair[0])
    load_weights(student, path)
    bank = make_bank(*pictures(30, seed=1))
    assert torch.equal(logits_of(student, bank), logits_of(scheme.deployed, bank))
    assert count_parameters(scheme.deployed) == count_parameters(student)


def test_the_light_net_is_deployed_and_the_booster_scored_beside_it():
    scheme = launched(WIDE)
    assert scheme.deployed is scheme.student and scheme.role == "light net"
    assert list(scheme.further()) == ["booster"] and scheme.further()["booster"] is scheme.booster
    (phase,) = scheme.phases()
    assert scheme.trained_networks(phase.trains) == ["student", "booster"] and scheme.passes(phase) == 2


def test_both_nets_learn():
    scheme = launched(WIDE)
    recipe = Recipe(epochs=40, batch=22, learning_rate=0.1, crop_padding=0, precision="fp64", flip=False)
    history = Training(scheme, recipe, make_bank(*pictures()), seed=0, watch={}).run()
    for name in ("ce", "booster"):
        assert history[-1][name] < 0.5 * history[0][name], name


# other methods between the two nets, and wrong use


def test_a_method_of_the_offline_table_serves_between_the_two():
    scheme = launched(WIDE, method=VanillaKD())
    terms = losses_of(scheme).terms
    assert list(terms) == ["ce", "kd", "booster"]
    (phase,) = scheme.phases()
    assert phase.trains == ("student", "adapters", "booster")
    own = parts_of(scheme)["booster"]
    assert not any(g is not None for g in torch.autograd.grad(terms["kd"], own, allow_unused=True))


@dataclass(frozen=True, kw_only=True)
class FitsFirst(Method):
    """Fits a regressor between the embeddings, then trains the student through it."""

    kind: ClassVar[str] = "feature"
    paper: ClassVar[str] = "none"
    reads: ClassVar[tuple[str, ...]] = ("embedding",)

    def adapters(self, student, teacher):
        return nn.ModuleDict({"regressor": nn.Linear(student.embedding.shape[1], teacher.embedding.shape[1])})

    def loss(self, student, teacher, labels, adapters):
        return F.mse_loss(adapters["regressor"](student.embedding), teacher.embedding)

    def fit(self, *views):
        return {"fit": self.loss(*views)}

    def phases(self):
        return (Phase("fit", self.fit, trains=("adapters",), share=0.5), Phase("distil", self.objective))


def test_a_phase_that_trains_no_light_net_sends_it_no_gradient_though_both_share():
    scheme = launched(WIDE, method=FitsFirst())
    first, last = scheme.phases()
    assert (first.trains, last.trains) == (("adapters", "booster"), ("student", "adapters", "booster"))
    nets = [*scheme.student.parameters(), *scheme.booster.parameters()]
    for phase, term, moved in ((first, "fit", False), (first, "booster", True), (last, "kd", True)):
        scheme.set_modes(phase)
        terms = scheme.losses(phase, scheme.turns(phase)[0], a_batch(), None).terms
        gradients = torch.autograd.grad(terms[term], nets, allow_unused=True)
        assert any(gradient is not None for gradient in gradients) == moved, (phase.name, term)
    history = make_training(scheme, make_recipe(epochs=2)).run()
    assert [row["phase"] for row in history] == ["fit", "distil", "distil"]


@pytest.mark.parametrize("method", [CrossEntropy, SphericalKD, ReusedClassifier, AdaIN])
def test_methods_whose_teacher_must_be_finished_or_that_have_none_are_refused(method):
    with pytest.raises(ValueError, match=f"{method.__name__} needs a teacher that is finished, or none"):
        launched(WIDE, method=method())


def test_a_method_for_several_peers_is_refused():
    with pytest.raises(ValueError, match="the teacher has no members"):
        launched(WIDE, method=Codistillation())


@pytest.mark.parametrize("partners", [(), ("wrn_28_0.25", "wrn_28_0.25")], ids=str)
def test_there_is_one_booster(partners):
    with pytest.raises(ValueError, match="a light net has one partner, the booster"):
        Launch.assemble(Cast(build, WIDE[0], partners), RocketLaunching(), a_batch(), LaunchOptions())
