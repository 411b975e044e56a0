"""Semantic calibration and knowledge review: reference values, literal computations, wrong use, defects."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from batches import TOLERANCE, batch_a, oracles
from staged import EPOCHS, batch, below, changed, modes_in_a_run, network, run, scheme_for, state, teacher_of
from torch import nn
from toy import ends_alike_if_stopped

from kdstudy.core import View
from kdstudy.cross_layer import Fusion, Relations, ReviewKD, SemCKD, calibration, hierarchical_context_loss
from kdstudy.models import Ensemble, build_model, count_parameters
from kdstudy.schemes import Offline

MAPS_F = [[[[1, 2], [0, 1]], [[0, 1], [2, 1]]]], [[[[2, 0], [1, 1]], [[1, 1], [0, 3]]]]
precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
both = pytest.mark.parametrize("method", [SemCKD(), ReviewKD()], ids=lambda m: type(m).__name__)


def random_maps(count, *shapes, seed=0):
    """A View of `count` images with maps of these shapes (c, h, w), other maps before the activation, and logits."""
    generator = torch.Generator().manual_seed(seed)
    maps, pre_maps = (
        tuple(torch.randn(count, *shape, generator=generator, dtype=torch.float64) for shape in shapes) for _ in "ab"
    )
    logits, embedding = torch.randn(2, count, 5, generator=generator, dtype=torch.float64)
    return View(logits, maps=maps, pre_maps=pre_maps, embedding=embedding)


class Fixed(nn.Module):
    """Says the same of every image."""

    def __init__(self, *vector):
        super().__init__()
        self.vector = vector

    def forward(self, stage_map):
        return stage_map.new_tensor([self.vector] * len(stage_map))


@precisions
def test_semantic_calibration_is_the_oracles(dtype):
    keys = torch.tensor([[[1, 0], [0, 1]]], dtype=dtype)
    weights = calibration(keys[:, :1], keys)
    torch.testing.assert_close(weights, torch.tensor([oracles()["semckd_alpha"]], dtype=dtype))
    student = View(torch.zeros(1, 3), maps=(torch.zeros(1, 1, 1, 2, dtype=dtype),))
    maps = (torch.tensor([[1.0, 0.0]], dtype=dtype), torch.tensor([[2.0, 0.0]], dtype=dtype))
    teacher = View(torch.zeros(1, 3), maps=tuple(each[:, None, None] for each in maps))
    adapters = nn.ModuleDict(
        {
            "query_mlps": nn.ModuleList([Fixed(1, 0)]),
            "key_mlps": nn.ModuleList([Fixed(1, 0), Fixed(0, 1)]),
            "projections": nn.ModuleList([nn.Identity()] * 2),
        }
    )
    loss = SemCKD().loss(student, teacher, None, adapters)
    assert loss.dtype == dtype and loss.item() == pytest.approx(oracles()["semckd_loss"], abs=TOLERANCE[dtype])


def literal_relation(mlp, stage_map):
    """One image's inner products with all, through as many columns of the first layer as there are images."""
    first, _, second = mlp.layers
    rows = []
    for image in stage_map:
        products = torch.stack([(image * other).sum() for other in stage_map])
        hidden = (first.weight[:, : len(stage_map)] @ products + first.bias).clamp(min=0)
        vector = second.weight @ hidden + second.bias
        rows.append(vector / vector.square().sum().sqrt())
    return torch.stack(rows)


def literal_semckd(adapters, student, teacher):
    total, pairs = 0.0, len(student.maps) * len(teacher.maps)
    assert len(adapters["projections"]) == pairs
    queries = [literal_relation(*pair) for pair in zip(adapters["query_mlps"], student.maps, strict=True)]
    keys = [literal_relation(*pair) for pair in zip(adapters["key_mlps"], teacher.maps, strict=True)]
    count = len(student.logits)
    for number, s in enumerate(student.maps):
        for b in range(count):
            scores = [math.exp((queries[number][b] * key[b]).sum().item()) for key in keys]
            for other, t in enumerate(teacher.maps):
                side = min(s.shape[2], t.shape[2])
                own, target = F.adaptive_avg_pool2d(s, side), F.adaptive_avg_pool2d(t, side)
                projected = adapters["projections"][number * len(teacher.maps) + other](own)
                error = (projected[b] - target[b]).square().mean().item()
                total += scores[other] / sum(scores) * error
    return total / (count * len(student.maps))


@pytest.mark.parametrize("count", [12, 9, 2])
@torch.no_grad()
def test_semckd_is_the_literal_computation(count):
    """Also for a last batch that is smaller than the others, whose missing images count as zeros."""
    torch.manual_seed(0)
    shapes = ((4, 4, 4), (6, 2, 2)), ((3, 4, 4), (5, 4, 4), (7, 2, 2))
    adapters = SemCKD().adapters(random_maps(12, *shapes[0]), random_maps(12, *shapes[1])).double()
    student, teacher = random_maps(count, *shapes[0], seed=1), random_maps(count, *shapes[1], seed=2)
    loss = SemCKD().loss(student, teacher, None, adapters)
    assert loss.item() == pytest.approx(literal_semckd(adapters, student, teacher), rel=1e-10)


def test_semckds_modules_have_the_papers_sizes():
    student, teacher = random_maps(13, (4, 2, 2), (6, 1, 1)), random_maps(13, (3, 2, 2), (5, 1, 1), (7, 1, 1))
    adapters = SemCKD().adapters(student, teacher)
    mlps = [*adapters["query_mlps"], *adapters["key_mlps"]]
    assert len(mlps) == 5
    assert {count_parameters(mlp) for mlp in mlps} == {13 * 6 + 6 + 6 * 3 + 3}
    expected = [2 * t * s + 36 * t * t + 2 * t * t + 8 * t for s in (4, 6) for t in (3, 5, 7)]
    assert [count_parameters(projection) for projection in adapters["projections"]] == expected


def test_a_projections_answer_may_be_negative():
    torch.manual_seed(0)
    student, teacher = random_maps(8, (4, 2, 2)), random_maps(8, (3, 2, 2))
    (projection,) = SemCKD().adapters(student, teacher).double()["projections"]
    assert projection(student.maps[0]).min() < 0


def test_the_students_maps_are_moved_through_the_weights_too():
    """With projections that answer zero, nothing else depends on them."""
    torch.manual_seed(0)
    student, teacher = random_maps(8, (4, 2, 2)), random_maps(8, (3, 2, 2), (5, 2, 2))
    adapters = SemCKD().adapters(student, teacher).double()
    for projection in adapters["projections"]:
        nn.init.zeros_(projection[-1].weight)
    student.maps[0].requires_grad_()
    SemCKD().loss(student, teacher, None, adapters).backward()
    assert student.maps[0].grad.any()
    assert all(p.grad.any() for name in ("query_mlps", "key_mlps") for p in adapters[name].parameters())


def test_semckd_adds_the_divergence_of_the_logits():
    student, teacher = random_maps(8, (4, 2, 2)), random_maps(8, (3, 2, 2), seed=1)
    (z_s, z_t, labels), method = batch_a(), SemCKD()
    student, teacher = (each._replace(logits=z.logits.repeat(4, 1)) for each, z in ((student, z_s), (teacher, z_t)))
    adapters = method.adapters(student, teacher).double()
    terms = method.objective(student, teacher, labels.repeat(4), adapters)
    assert {name: term.item() for name, term in terms.items()} == {
        "ce": pytest.approx(oracles()["ce"], abs=1e-6),
        "kd": pytest.approx(400 * method.loss(student, teacher, None, adapters).item()),
        "kl": pytest.approx(oracles()["kd_T4"], abs=1e-6),
    }
    terms = SemCKD(kl_weight=0.0).objective(student, teacher, labels.repeat(4), adapters)
    assert set(terms) == {"ce", "kd"}


def test_networks_of_unequal_depth_can_be_calibrated():
    shapes = ((4, 4, 4), (6, 2, 2)), ((3, 8, 8), (5, 4, 4), (7, 2, 2), (9, 1, 1))
    student, teacher = (random_maps(8, *each) for each in shapes)
    assert SemCKD().loss(student, teacher, None, SemCKD().adapters(student, teacher).double()).isfinite()


def test_a_batch_below_8_gives_queries_no_direction():
    student, teacher = random_maps(7, (4, 2, 2)), random_maps(7, (3, 2, 2))
    with pytest.raises(ValueError, match="at least 8 images, not 7"):
        SemCKD().adapters(student, teacher)


def test_a_batch_larger_than_the_sample_is_refused():
    with pytest.raises(ValueError, match="at most the 8 images it was sized by, not 9"):
        Relations(8)(torch.zeros(9, 2, 2, 2))


@both
def test_an_image_alone_is_refused_before_training(method):
    with pytest.raises(ValueError, match="at least 2 in a batch"):
        run(scheme_for(method, sample=21), batch=21)


@precisions
def test_hierarchical_losses_are_the_oracles(dtype):
    loss = hierarchical_context_loss(*(torch.tensor(each, dtype=dtype) for each in MAPS_F))
    assert loss.dtype == dtype and loss.item() == pytest.approx(oracles()["g_review_hcl_mapsF"], abs=TOLERANCE[dtype])
    ramp = torch.arange(64, dtype=dtype).view(1, 1, 8, 8) / 10
    loss = hierarchical_context_loss(ramp, 2 * ramp.frac())
    assert loss.item() == pytest.approx(oracles()["g_review_hcl_8x8"], rel=TOLERANCE[dtype])


def literal_context_loss(a, b):
    """Means of blocks, for maps whose sides are powers of two."""
    parts = [((a - b) ** 2).mean().item()]
    height = a.shape[2]
    for side in (4, 2, 1):
        if side < height:
            step = height // side
            pooled = [each.unfold(2, step, step).unfold(3, step, step).mean(dim=(4, 5)) for each in (a, b)]
            parts.append(((pooled[0] - pooled[1]) ** 2).mean().item())
    weights = [2.0**-number for number in range(len(parts))]
    return math.fsum(w * part for w, part in zip(weights, parts, strict=True)) / math.fsum(weights)


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16])
def test_hierarchical_loss_is_the_literal_computation(side):
    a, b = torch.randn(2, 3, 2, side, side, generator=torch.Generator().manual_seed(side), dtype=torch.float64)
    assert hierarchical_context_loss(a, b).item() == pytest.approx(literal_context_loss(a, b), rel=1e-12)


@precisions
def test_the_fused_map_is_the_oracles(dtype):
    fusion = Fusion(1, 1, 1, deepest=False).to(dtype).eval()
    for convolution, norm in (fusion.squeeze, fusion.spread):
        nn.init.dirac_(convolution.weight)
        norm.eps = 0.0
    nn.init.eye_(fusion.attention[0].weight.data.view(2, 2))
    nn.init.zeros_(fusion.attention[0].bias)
    own, deeper = torch.tensor([[[[1, 2], [0, 1]]]], dtype=dtype), torch.full((1, 1, 1, 1), 2, dtype=dtype)
    output, fused = fusion(own, deeper, (2, 2))
    expected = torch.tensor([[oracles()["g_review_abf_res"]]], dtype=dtype)
    torch.testing.assert_close(fused, expected)
    torch.testing.assert_close(output, expected)


def literal_normed(layers, x):
    """Convolution and batch norm by the batch, written out."""
    convolution, norm = layers
    size = convolution.kernel_size[0]
    padded = F.pad(x, [size // 2] * 4)
    height, width = x.shape[2:]
    out = sum(
        torch.einsum("oi,bihw->bohw", convolution.weight[:, :, i, j], padded[:, :, i : i + height, j : j + width])
        for i in range(size)
        for j in range(size)
    )
    out = out - out.mean(dim=(0, 2, 3), keepdim=True)
    out = out / (out.square().mean(dim=(0, 2, 3), keepdim=True) + norm.eps).sqrt()
    return out * norm.weight[:, None, None] + norm.bias[:, None, None]


def literal_resized(x, sides):
    rows, columns = ([k * old // new for k in range(new)] for old, new in zip(x.shape[2:], sides, strict=True))
    return x[:, :, rows][:, :, :, columns]


def literal_review(adapters, student, teacher):
    """From the embeddings up; what goes up is fused and resized, but has not been through the 3x3 convolution."""
    levels = [(student.embedding, teacher.embedding)]
    levels = [tuple(each[:, :, None, None] for each in levels[0])]
    levels += [(s, t) for s, t in zip(reversed(student.maps), reversed(teacher.pre_maps), strict=True)]
    total, carried = 0.0, None
    for fusion, (s, t) in zip(reversed(adapters["fusions"]), levels, strict=True):
        x = literal_normed(fusion.squeeze, s)
        if carried is not None:
            r = literal_resized(carried, x.shape[2:])
            weight, bias = fusion.attention[0].weight[:, :, 0, 0], fusion.attention[0].bias
            scores = torch.einsum("oi,bihw->bohw", weight, torch.cat([x, r], dim=1)) + bias[:, None, None]
            a, b = (1 / (1 + (-scores).exp())).chunk(2, dim=1)
            x = x * a + r * b
        carried = literal_resized(x, t.shape[2:])
        total += literal_context_loss(literal_normed(fusion.spread, carried), t)
    return total


@pytest.mark.parametrize("sides", [(8, 4, 2), (16, 8, 4), (4, 4, 2), (4, 2, 1)])
@torch.no_grad()
def test_review_is_the_literal_computation(sides):
    torch.manual_seed(0)
    student = random_maps(4, (3, 8, 8), (4, 4, 4), (6, 2, 2))
    teacher = random_maps(4, *((channels, side, side) for channels, side in zip((5, 7, 9), sides, strict=True)), seed=1)
    adapters = ReviewKD().adapters(student, teacher).double()
    for module in adapters.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
            nn.init.normal_(module.bias)
    loss = ReviewKD().loss(student, teacher, None, adapters)
    assert loss.item() == pytest.approx(literal_review(adapters, student, teacher), rel=1e-10)


def test_review_needs_as_many_parameters_as_the_release():
    views = []
    for name in ("resnet8x4", "resnet32x4"):
        with torch.device("meta"):
            views.append(build_model(name, classes=100).eval()(torch.empty(2, 3, 32, 32)))
    adapters = ReviewKD().adapters(*views)
    assert count_parameters(adapters) == oracles()["g_review_extra_params_x4"]
    # Kaiming-uniform with a = 1: variance 1 / fan-in
    for fusion in adapters["fusions"]:
        for convolution in (fusion.squeeze[0], fusion.spread[0]):
            assert convolution.weight.std().item() == pytest.approx(convolution.weight[0].numel() ** -0.5, rel=0.02)


def test_fusions_are_as_wide_as_the_students_embedding_but_at_most_512():
    for embedding, width in ((24, 24), (600, 512)):
        student = random_maps(2, (4, 2, 2))._replace(embedding=torch.zeros(2, embedding))
        fusions = ReviewKD().adapters(student, random_maps(2, (3, 2, 2)))["fusions"]
        assert [fusion.squeeze[0].out_channels for fusion in fusions] == [width] * 2


def test_review_warms_up_over_a_share_of_the_run():
    student, teacher = random_maps(4, (3, 8, 8)), random_maps(4, (5, 8, 8), seed=1)
    adapters = ReviewKD().adapters(student, teacher).double()
    full = ReviewKD().loss(student, teacher, None, nn.ModuleDict({"fusions": adapters["fusions"]}))

    def weights(warm_up, epochs):
        for epoch in epochs:
            adapters["clock"].set(epoch, 40)
            yield (ReviewKD(warm_up=warm_up).loss(student, teacher, None, adapters) / full).item()

    assert list(weights(0.1, (0, 1, 3, 4, 39))) == pytest.approx([0.25, 0.5, 1, 1, 1])
    assert list(weights(0.0, (0, 39))) == pytest.approx([1, 1])
    assert list(weights(1.0, (0, 19, 39))) == pytest.approx([1 / 40, 0.5, 1])


@torch.no_grad()
def test_review_weighs_5_and_warms_up_over_a_tenth_of_the_run_by_default():
    method, labels = ReviewKD(), torch.zeros(4, dtype=torch.long)
    student, teacher = random_maps(4, (3, 8, 8)), random_maps(4, (5, 8, 8), seed=1)
    adapters = method.adapters(student, teacher).double()
    full = ReviewKD(warm_up=0.0).loss(student, teacher, None, adapters)
    for epoch, weight in ((0, 1 / 3), (1, 2 / 3), (2, 1), (29, 1)):
        adapters["clock"].set(epoch, 30)
        terms = method.objective(student, teacher, labels, adapters)
        assert terms["kd"].item() == pytest.approx(5 * weight * full.item())
        assert terms["ce"] == F.cross_entropy(student.logits, labels)


def test_review_weighs_its_loss_in_a_run_by_the_clock():
    rows = {share: run(scheme_for(ReviewKD(warm_up=share)), epochs=4, milestones=()) for share in (0.0, 1.0)}
    assert rows[1.0][0]["kd"] < 0.5 * rows[0.0][0]["kd"]


@torch.no_grad()
def test_the_teachers_maps_after_the_activation_have_no_part_in_review():
    student, teacher = random_maps(4, (3, 4, 4)), random_maps(4, (3, 4, 4), seed=1)
    adapters = ReviewKD().adapters(student, teacher).double()
    swapped = student._replace(pre_maps=teacher.maps), teacher._replace(maps=student.maps)
    assert ReviewKD().loss(*swapped, None, adapters) == ReviewKD().loss(student, teacher, None, adapters)


@both
def test_networks_that_do_not_fit_are_refused(method):
    ensemble = Ensemble([network("resnet8")] * 2)
    with pytest.raises(ValueError, match="the teacher shows no maps"):
        Offline(network("wrn_10_0.25"), ensemble, method, batch())


def test_review_needs_equally_many_stages():
    with pytest.raises(ValueError, match="equally many stages, not 1 and 2"):
        ReviewKD().adapters(random_maps(2, (3, 4, 4)), random_maps(2, (3, 4, 4), (3, 4, 4)))


@both
def test_public_defect_a_teacher_in_train_mode(method):
    scheme = scheme_for(method)
    before = state(teacher_of(scheme))
    assert not any(teacher for _, _, teacher in modes_in_a_run(scheme))
    assert not changed(before, teacher_of(scheme))


@both
def test_public_defect_a_student_in_eval_mode_from_the_second_epoch(method):
    scheme = scheme_for(method)
    seen = modes_in_a_run(scheme)
    assert len(seen) == 3 * EPOCHS
    assert all(in_train_mode == below(scheme, "student", "adapters") for _, in_train_mode, _ in seen)


@both
def test_a_run_stopped_anywhere_ends_as_one_that_is_not(method, tmp_path):
    ends_alike_if_stopped(lambda: scheme_for(method), (1, 5), tmp_path)


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        (SemCKD(), "temperature", 0.0),
        *((SemCKD(), field, -1.0) for field in ("ce_weight", "kd_weight", "kl_weight")),
        *((ReviewKD(), "warm_up", value) for value in (-0.1, 1.5, "0.1")),
        *((ReviewKD(), field, -1.0) for field in ("ce_weight", "kd_weight")),
    ],
)
def test_a_bad_hyperparameter_is_named(method, field, value):
    with pytest.raises(ValueError, match=field):
        replace(method, **{field: value})
