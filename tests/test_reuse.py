"""The reused teacher classifier: reference values, what is deployed, what is never trained, wrong use, defects."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from batches import TOLERANCE, oracles
from staged import EPOCHS, batch, below, changed, modes_in_a_run, network, run, scheme_for, state, teacher_of, view
from torch import nn
from toy import ends_alike_if_stopped, make_bank, pictures

from kdstudy.checkpoint import load_weights, save_weights
from kdstudy.core import View
from kdstudy.evaluate import logits_of
from kdstudy.models import Ensemble, build_model, count_parameters
from kdstudy.reuse import Projector, ReusedClassifier
from kdstudy.schemes import Offline

FAMILIES = ["wrn_10_0.5", "resnet8", "cnn_small"]
MAPS_F = [[[[1, 2], [0, 1]], [[0, 1], [2, 1]]]], [[[[2, 0], [1, 1]], [[1, 1], [0, 3]]]]
TRAINED = ("student.stem", "student.stages", "adapters.projector")
precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def views_of(method, student, teacher, images):
    return view(student, method, images), view(teacher, method, images)


@precisions
def test_loss_and_prediction_are_the_oracles(dtype):
    projector, classifier = Projector(2, 2, 2, (2, 2)), nn.Linear(2, 3)
    first, middle, last = (layer for layer in projector.layers if isinstance(layer, nn.Conv2d))
    first.weight.data = torch.tensor([[1, 1]], dtype=dtype).view(1, 2, 1, 1)
    nn.init.dirac_(middle.weight)
    last.weight.data = torch.tensor([[1], [0.5]], dtype=dtype).view(2, 1, 1, 1)
    for norm in projector.layers:
        if isinstance(norm, nn.BatchNorm2d):
            norm.eps = 0.0
    classifier.weight.data = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=dtype)
    classifier.bias.data = torch.tensor([0, 0.5, -1], dtype=dtype)
    adapters = nn.ModuleDict({"projector": projector, "classifier": classifier}).to(dtype).eval()
    student, teacher = (View(torch.zeros(1, 3), pre_maps=(torch.tensor(each, dtype=dtype),)) for each in MAPS_F)
    loss = ReusedClassifier().loss(student, teacher, None, adapters)
    assert loss.dtype == dtype and loss.item() == pytest.approx(oracles()["g_simkd_mse"], abs=TOLERANCE[dtype])
    logits = ReusedClassifier().predict(student, adapters)
    torch.testing.assert_close(logits, torch.tensor([oracles()["g_simkd_logits"]], dtype=dtype))


@pytest.mark.parametrize(
    ("channels", "counts"),
    [
        (256, oracles()["g_simkd_params_f2_f4_f8_256to256"]),
        (128, [53_760, 17_792, 6_720]),
        (64, [13_568, 4_544, 1_760]),
    ],
)
def test_projectors_have_the_papers_parameters(channels, counts):
    assert [count_parameters(Projector(channels, channels, f, (8, 8))) for f in (2, 4, 8)] == counts


def test_the_bottleneck_is_a_share_of_the_teachers_channels_and_the_answer_is_not_negative():
    torch.manual_seed(0)
    projector = Projector(16, 64, 2, (2, 2))
    assert count_parameters(projector) == 16 * 32 + 9 * 32 * 32 + 32 * 64 + 2 * (32 + 32 + 64)
    answer = projector(torch.randn(8, 16, 2, 2))
    assert answer.min() == 0 and answer.max() > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_the_target_is_what_the_teachers_classifier_reads(name):
    """For a wide ResNet that is not the stage's map, which is signed. A perfect student predicts as the teacher."""
    scheme = scheme_for(ReusedClassifier(), name, name)
    teacher = teacher_of(scheme)
    images = batch()
    shown, _ = views_of(scheme.method, teacher, teacher, images)
    adapters = nn.ModuleDict({"projector": nn.Identity(), "classifier": scheme.adapters["classifier"]})
    torch.testing.assert_close(scheme.method.predict(shown, adapters), teacher(images.images).logits)
    assert scheme.method.loss(shown, shown, None, adapters) == 0
    whole = teacher(images.images)
    if name.startswith("wrn"):
        assert whole.maps[-1].min() < 0
    else:
        torch.testing.assert_close(F.relu(whole.pre_maps[-1]), whole.maps[-1])


@torch.no_grad()
def test_the_loss_is_a_mean_over_everything():
    scheme = scheme_for(ReusedClassifier())
    student, teacher = views_of(scheme.method, scheme.student, teacher_of(scheme), batch(5))
    own = scheme.adapters["projector"](student.pre_maps[-1].clamp(min=0))
    squares = [(a - b) ** 2 for a, b in zip(own.flatten(), teacher.pre_maps[-1].clamp(min=0).flatten(), strict=True)]
    loss = scheme.method.loss(student, teacher, None, scheme.adapters)
    assert loss.item() == pytest.approx(float(sum(squares)) / len(squares))


@pytest.mark.parametrize(("own", "its"), [((4, 4), (2, 2)), ((2, 2), (4, 4)), ((3, 4), (4, 2))])
def test_the_larger_map_is_pooled_before_the_projector(own, its):
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(3, 4, *sides, generator=generator, dtype=torch.float64) for sides in (own, its))
    adapters = nn.ModuleDict({"projector": Projector(4, 4, 2, its), "classifier": nn.Linear(4, 3)}).double().eval()
    student, teacher = (View(torch.zeros(3, 3), pre_maps=(each,)) for each in (s, t))
    sides = tuple(map(min, own, its))
    pooled = [F.adaptive_avg_pool2d(each.relu(), sides) for each in (s, t)]
    projected = adapters["projector"].layers(pooled[0])
    assert ReusedClassifier().loss(student, teacher, None, adapters) == (projected - pooled[1]).square().mean()
    expected = adapters["classifier"](projected.flatten(2).mean(2))
    torch.testing.assert_close(ReusedClassifier().predict(student, adapters), expected)


def test_labels_have_no_part_in_training():
    method = ReusedClassifier()
    scheme = scheme_for(method)
    terms = method.objective(*views_of(method, scheme.student, teacher_of(scheme), batch()), None, scheme.adapters)
    assert list(terms) == ["kd"]
    with pytest.raises(ValueError, match=r"ce_weight must be 0, not 0\.5: no label enters"):
        ReusedClassifier(ce_weight=0.5)


def test_neither_classifier_is_trained():
    scheme = scheme_for(ReusedClassifier())
    names = {id(parameter): name for name, parameter in scheme.named_parameters()}
    (phase,) = scheme.phases()
    assert not any("classifier" in names[id(parameter)] for parameter in scheme.trained_parameters(phase.trains))
    before, teacher = state(scheme), state(teacher_of(scheme))
    run(scheme)
    assert not changed(teacher, teacher_of(scheme))
    moved = changed(before, scheme)
    assert moved == {name for name in before if "classifier" not in name}
    assert scheme.adapters["classifier"].weight is not teacher_of(scheme).classifier.weight


def test_the_run_is_scored_by_the_deployed_network():
    scheme = scheme_for(ReusedClassifier())
    history = run(scheme)
    images, labels = pictures(30, seed=1)
    bank = make_bank(images, labels)
    logits = logits_of(scheme.deployed, bank)
    seen = view(scheme.student.eval(), scheme.method, batch(30)._replace(images=next(bank.plain(30))))
    torch.testing.assert_close(logits, scheme.method.predict(seen, scheme.adapters.eval()))
    assert history[-1]["test_accuracy"] == 100 * (logits.argmax(1) == bank.labels).double().mean().item()
    assert not torch.equal(logits.argmax(1), logits_of(scheme.student, bank).argmax(1))


def test_the_deployed_network_is_filed_and_counted_as_a_whole(tmp_path):
    scheme, other = scheme_for(ReusedClassifier()), scheme_for(ReusedClassifier())
    run(scheme)
    save_weights(scheme.deployed, tmp_path / "weights.safetensors")
    load_weights(other.deployed, tmp_path / "weights.safetensors")
    bank = make_bank(*pictures(30, seed=1))
    assert torch.equal(logits_of(other.deployed, bank), logits_of(scheme.deployed, bank))
    parts = (scheme.student, Projector(16, 64, 2, (2, 2)), teacher_of(scheme).classifier)
    assert count_parameters(scheme.deployed) == sum(p.numel() for part in parts for p in part.parameters())


def test_counting_right_answers_leaves_no_trace_in_the_projector():
    scheme = scheme_for(ReusedClassifier())
    (phase,) = scheme.phases()
    norm = next(layer for layer in scheme.adapters["projector"].layers if isinstance(layer, nn.BatchNorm2d))
    scheme.set_modes(phase)
    images = batch()
    projected = scheme.adapters["projector"].layers[0](scheme.student(images.images).pre_maps[-1].relu())
    scheme.losses(phase, scheme.turns(phase)[0], images, None)
    assert norm.num_batches_tracked == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * projected.mean(dim=(0, 2, 3)))


def test_public_defect_a_teacher_in_train_mode():
    scheme = scheme_for(ReusedClassifier())
    before = state(teacher_of(scheme))
    assert not any(teacher for _, _, teacher in modes_in_a_run(scheme))
    assert not changed(before, teacher_of(scheme))


def test_public_defect_a_student_in_eval_mode_from_the_second_epoch():
    scheme = scheme_for(ReusedClassifier())
    seen = modes_in_a_run(scheme)
    assert len(seen) == 3 * EPOCHS
    assert all(in_train_mode == below(scheme, *TRAINED) for _, in_train_mode, _ in seen)


def test_a_run_stopped_anywhere_ends_as_one_that_is_not(tmp_path):
    ends_alike_if_stopped(lambda: scheme_for(ReusedClassifier()), (1, 5), tmp_path)


def test_networks_that_do_not_fit_are_refused():
    method = ReusedClassifier()
    torch.manual_seed(0)
    swish = build_model("swish_teacher", classes=3, image_size=16).double()
    images = batch()._replace(images=torch.randn(8, 3, 16, 16, dtype=torch.float64))
    pair = network("resnet8"), network("wrn_10_0.25")
    with pytest.raises(ValueError, match="the teacher must classify the average of its last map after a ReLU"):
        Offline(pair[0], swish, method, images)
    with pytest.raises(ValueError, match="the student must classify the average of its last map after a ReLU"):
        Offline(swish, pair[0], method, images)
    with pytest.raises(ValueError, match="the teacher shows no pre_maps"):
        Offline(pair[0], Ensemble(pair), method, batch())
    with pytest.raises(ValueError, match="the same classes, not 3 and 4"):
        Offline(pair[0], network("wrn_10_0.25", classes=4), method, batch())
    with pytest.raises(ValueError, match="the teacher's 16 channels must be a multiple of reduction, not 3"):
        Offline(*pair, replace(method, reduction=3), batch())


@pytest.mark.parametrize(
    ("field", "value"), [("reduction", 0), ("reduction", 2.0), ("reduction", True), ("kd_weight", 0)]
)
def test_a_bad_hyperparameter_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        ReusedClassifier(**{field: value})
