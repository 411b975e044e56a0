"""Relations between layers against reference values and loops, and what their two phases train."""

import math
from itertools import pairwise

import pytest
import torch
from batches import TOLERANCE, deterministic, oracles
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toy import clone, difference, make_recipe, make_scheme, make_training, run_session

from kdstudy.core import View
from kdstudy.layers import FSP, GraphAttention, MultiHeadGraph, flows, graph_divergence
from kdstudy.models import build_model

NO_ADAPTERS = nn.ModuleDict()
MAPS_F = ([[[[1, 2], [0, 1]], [[0, 1], [2, 1]]]], [[[[2, 0], [1, 1]], [[1, 1], [0, 3]]]])
NEXT_F = ([[[[1, 0], [1, 2]]]], [[[[0, 1], [2, 3]]]])
SCORES = ([[[1, 0], [0, 2]]], [[[0, 1], [1, 1]]])
precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
seeds = st.integers(0, 999)


def random_view(widths=(2, 3, 4), sides=((6, 4), (6, 4), (3, 2)), batch=3, seed=0) -> View:
    """Stem and stages of these widths and sizes."""
    generator = torch.Generator().manual_seed(seed)
    layers = [
        torch.randn(batch, width, *size, generator=generator, dtype=torch.float64)
        for width, size in zip(widths, sides, strict=True)
    ]
    return View(torch.zeros(batch, 3, dtype=torch.float64), stem=layers[0], maps=tuple(layers[1:]))


def loss_of(method, student, teacher, adapters=NO_ADAPTERS):
    return method.loss(student, teacher, torch.zeros(len(student.logits), dtype=torch.int64), adapters)


def small_networks(*names):
    torch.manual_seed(0)
    networks = [build_model(name, classes=3, image_size=(6, 5)).double() for name in names]
    for network in networks:
        network(torch.randn(32, 3, 6, 5, dtype=torch.float64))  # batch statistics move off their start
    return networks


def scheme_of(method):
    names = ("resnet8x0.25", "resnet14x0.25") if isinstance(method, FSP) else ("resnet8x0.25", "resnet8x0.5")
    student, teacher = small_networks(*names)
    return make_scheme(method, student=student, teacher=teacher)


def states_between_phases(method, recipe):
    """The scheme's state before training, when the last phase begins, and at the end."""
    scheme = scheme_of(method)
    training = make_training(scheme, recipe)
    states, begin = [clone(scheme.state_dict())], training._enter_phase

    def note():
        if training.position.phase == len(training.phases) - 1:
            states.append(clone(scheme.state_dict()))
        begin()

    training._enter_phase = note
    training.run()
    return [*states, clone(scheme.state_dict())]


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@precisions
def test_flows_are_the_oracles(dtype):
    views = [
        View(torch.zeros(1, 2), stem=torch.tensor(one, dtype=dtype), maps=(torch.tensor(two, dtype=dtype),))
        for one, two in zip(MAPS_F, NEXT_F, strict=True)
    ]
    for view, key in zip(views, ("fsp_Gs", "fsp_Gt"), strict=True):
        (found,) = flows(view)
        torch.testing.assert_close(found, torch.tensor(oracles()[key], dtype=dtype))
    for reduction, key in (("sum", "fsp_sumsq_mean_batch"), ("mean", "fsp_mse")):
        loss = loss_of(FSP(reduction=reduction), *views)
        assert loss.dtype == dtype and loss.shape == ()
        assert loss.item() == pytest.approx(oracles()[key], abs=TOLERANCE[dtype])


def slow_flow(one, two):
    """The matrix of one sample's maps; where the first is twice as large, its blocks of four pixels are averaged."""
    _, height, width = two.shape
    scale = one.shape[1] // height
    table = []
    for a in one:
        row = []
        for b in two:
            total = 0.0
            for y in range(height):
                for x in range(width):
                    block = a[scale * y : scale * (y + 1), scale * x : scale * (x + 1)].flatten().tolist()
                    total += sum(block) / len(block) * b[y, x].item()
            row.append(total / (height * width))
        table.append(row)
    return table


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_loss_on_flows_is_that_of_a_loop(reduction):
    views = [random_view(seed=seed) for seed in (1, 2)]
    expected = 0.0
    for number, (front, back) in enumerate(pairwise((2, 3, 4))):
        for sample in range(3):
            tables = []
            for view in views:
                layers = (view.stem, *view.maps)
                tables.append(slow_flow(layers[number][sample], layers[number + 1][sample]))
            squares = [(s - t) ** 2 for pair in zip(*tables, strict=True) for s, t in zip(*pair, strict=True)]
            expected += sum(squares) / 3 / (1 if reduction == "sum" else front * back)
    assert loss_of(FSP(reduction=reduction), *views).item() == pytest.approx(expected, rel=1e-12)


def test_flows_of_maps_of_other_sizes_are_compared():
    student = random_view(sides=((6, 4), (6, 4), (3, 2)))
    teacher = random_view(sides=((12, 8), (6, 4), (6, 4)))
    assert loss_of(FSP(), student, teacher).isfinite()


@pytest.mark.parametrize("change", ["signs", "channels"])
def test_flows_tell_a_map_from_one_with_other_signs_or_channels(change):
    """Unlike an attention map of it, for which such a student would be perfect."""
    teacher = random_view()
    last = teacher.maps[-1]
    other = -last if change == "signs" else last[:, [1, 0, 3, 2]]
    assert loss_of(FSP(), teacher, teacher).item() == 0
    assert loss_of(FSP(), teacher._replace(maps=(teacher.maps[0], other)), teacher).item() > 0.01


def test_the_first_phase_matches_flows_alone_and_the_second_labels_alone():
    method = FSP(ce_weight=0.5, kd_weight=2.0)
    views = [random_view(seed=seed) for seed in (1, 2)]
    flow, labels = method.phases()
    terms = flow.objective(*views, torch.tensor([0, 1, 2]), NO_ADAPTERS)
    assert list(terms) == ["kd"]
    assert terms["kd"].item() == pytest.approx(2 * loss_of(method, *views).item(), rel=1e-12)
    terms = labels.objective(views[0], None, torch.tensor([0, 1, 2]), NO_ADAPTERS)
    assert list(terms) == ["ce"]
    assert terms["ce"].item() == pytest.approx(0.5 * math.log(3), rel=1e-12)


def test_the_first_phase_trains_the_layers_but_not_the_classifier():
    assert FSP().phases()[0].trains == ("student.stem", "student.stages")
    before, between, after = states_between_phases(FSP(kd_weight=0.01, share=0.5), make_recipe())
    trained = changed(before, between)
    assert {name.split(".")[1] for name in trained} == {"stem", "stages"}
    assert trained == {name for name in before if name.split(".")[1] in ("stem", "stages")}
    assert changed(between, after) == set(before)


def test_defaults_are_the_published_ones_but_for_the_weight_of_flows():
    weights = {"ce_weight": 1.0, "kd_weight": 1.0}
    assert vars(FSP()) == weights | {"kd_weight": 0.0001, "share": 0.125, "reduction": "sum"}
    assert vars(MultiHeadGraph()) == weights | {"heads": 8, "squash": True, "share": 0.4, "reduction": "mean"}


@pytest.mark.parametrize(("method", "usual", "epochs"), [(FSP(), 240, 30), (MultiHeadGraph(), 100, 40)], ids=str)
def test_the_first_phase_is_as_long_as_published(method, usual, epochs):
    first, last = method.phases()
    assert (first.epochs(usual), last.epochs(usual)) == (epochs, usual)


@pytest.mark.parametrize(
    ("names", "channels"),
    [
        (("resnet8x0.25", "resnet14x0.5"), "[4, 4, 8, 16] and [8, 8, 16, 32]"),
        (("resnet8", "wrn_10_2"), "[16, 16, 32, 64] and [16, 32, 64, 128]"),
    ],
)
def test_networks_of_unequal_widths_have_no_flows_to_compare(names, channels):
    student, teacher = small_networks(*names)
    with pytest.raises(ValueError) as error:
        make_scheme(FSP(), student=student, teacher=teacher)
    assert str(error.value).startswith(
        f"student and teacher must have the same channels in stem and stages, not {channels}"
    )


@pytest.mark.parametrize("widths", [(5, 3, 4), (2, 5, 4), (2, 3, 5), (2, 3)])
def test_every_layer_must_be_as_wide_as_the_teachers(widths):
    with pytest.raises(ValueError, match="the same channels in stem and stages"):
        FSP().adapters(random_view(), random_view(widths, ((6, 4), (6, 4), (3, 2))[: len(widths)]))


@pytest.mark.parametrize("tap", ["stem", "maps"])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_network_without_layers_to_see_is_refused(tap, who):
    views = {"student": random_view(), "teacher": random_view()}
    views[who] = views[who]._replace(**{tap: View._field_defaults[tap]})
    with pytest.raises(ValueError, match=f"the {who} shows no {tap}"):
        FSP().adapters(**views)


@precisions
@pytest.mark.parametrize(("squash", "key"), [(False, "mhgd_KL_S||T_sum"), (True, "mhgd_tanh_KL_sum")])
def test_the_divergence_of_graphs_is_the_oracles(squash, key, dtype):
    scores = [torch.tensor(each, dtype=dtype) for each in SCORES]
    total = graph_divergence(*scores, squash, "sum")
    assert total.dtype == dtype and total.shape == ()
    assert total.item() == pytest.approx(oracles()[key], abs=TOLERANCE[dtype])
    assert graph_divergence(*scores, squash).item() == pytest.approx(oracles()[key] / 2, abs=TOLERANCE[dtype])


class Stub(nn.Module):
    """An attention network that answers what it is told, one answer after the other."""

    def __init__(self, *answers):
        super().__init__()
        self.answers = list(answers)

    def scores(self, front, back):
        return self.answers.pop(0)

    def estimate(self, front, back):
        (estimate,) = self.answers
        return estimate


def vectors(*rows) -> View:
    """A network whose pooled maps point along these rows."""
    maps = [torch.tensor(row, dtype=torch.float64)[:, :, None, None].expand(-1, -1, 2, 3) for row in rows]
    return View(torch.zeros(len(rows[0]), 3, dtype=torch.float64), maps=tuple(maps))


@pytest.mark.parametrize(
    ("method", "key"),
    [
        (MultiHeadGraph(reduction="sum"), "mhgd_tanh_KL_sum"),
        (MultiHeadGraph(reduction="sum", squash=False), "mhgd_KL_S||T_sum"),
    ],
)
def test_the_transfer_is_the_oracles(method, key):
    scores = [torch.tensor(each, dtype=torch.float64) for each in SCORES]
    view = vectors([[1.0], [2.0]], [[1.0], [2.0]])
    adapters = nn.ModuleDict({"attention": nn.ModuleList([Stub(*scores)]), "widen": nn.ModuleList([nn.Identity()] * 2)})
    assert loss_of(method, view, view, adapters).item() == pytest.approx(oracles()[key], abs=1e-6)


def test_what_fits_the_attention_is_the_oracles():
    estimate = nn.functional.normalize(torch.tensor([[1.0, 1.0], [0.0, 2.0]], dtype=torch.float64))
    teacher = vectors([[1.0], [1.0]], [[1.0, 0.0], [1.0, 1.0]])
    adapters = nn.ModuleDict({"attention": nn.ModuleList([Stub(estimate)])})
    terms = MultiHeadGraph().fit_attention(None, teacher, None, adapters)
    assert list(terms) == ["attention"]
    assert terms["attention"].item() == pytest.approx(oracles()["mhgd_1-cos"], abs=1e-6)


def shaken(module):
    """The module in float64 and eval mode, with batch norms whose numbers are no longer those of new ones."""
    for layer in module.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor in (layer.running_var, layer.weight, layer.bias, layer.running_mean):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return module.double().eval()


def slow_normed(layers, row):
    linear, norm = layers
    images = [sum(w * x for w, x in zip(weights, row, strict=True)) for weights in linear.weight.tolist()]
    numbers = zip(*(t.tolist() for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)), strict=True)
    return [
        (x - mean) / math.sqrt(var + norm.eps) * scale + shift
        for x, (mean, var, scale, shift) in zip(images, numbers, strict=True)
    ]


def slow_scores(attention, front, back):
    """One table per head: the back's samples are the rows."""
    queries, keys = (
        [slow_normed(layers, row) for row in rows] for layers, rows in ((attention.query, back), (attention.key, front))
    )
    width = len(queries[0]) // attention.heads
    parts = [slice(width * head, width * (head + 1)) for head in range(attention.heads)]
    return [
        [[sum(a * b for a, b in zip(q[part], k[part], strict=True)) for k in keys] for q in queries] for part in parts
    ]


def softmax(row):
    return [math.exp(x - max(row)) / sum(math.exp(y - max(row)) for y in row) for x in row]


def unit(row):
    return [x / math.hypot(*row) for x in row]


def pooled(stage_map):
    return [unit([sum(channel.flatten().tolist()) / channel.numel() for channel in sample]) for sample in stage_map]


def test_scores_are_those_of_a_loop():
    torch.manual_seed(0)
    attention = shaken(GraphAttention(3, 6, heads=2))
    assert attention.query[0].weight.shape == (2 * 4, 6) and attention.key[0].weight.shape == (2 * 4, 3)
    front, back = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    expected = torch.tensor(slow_scores(attention, front.tolist(), back.tolist()), dtype=torch.float64)
    torch.testing.assert_close(attention.scores(front, back), expected)


def test_estimates_are_those_of_a_loop_over_the_heads_that_are_kept():
    torch.manual_seed(0)
    attention = shaken(GraphAttention(3, 6, heads=4))
    front, back = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    tables = slow_scores(attention, front.tolist(), back.tolist())
    values = [[max(x, 0) for x in slow_normed(attention.value[0], row)] for row in front.tolist()]
    torch.manual_seed(7)
    drawn = torch.randn(4, 5, 1, dtype=torch.float64)[:, :, 0].tolist()
    expected = []
    for sample in range(5):
        level = sum(drawn[head][sample] for head in range(4)) / 4
        joined = []
        for head in range(4):
            weights = softmax(tables[head][sample]) if drawn[head][sample] > level else [0] * 5
            joined += [
                sum(w * value[k] for w, value in zip(weights, values, strict=True)) for k in range(len(values[0]))
            ]
        rows = zip(attention.merge.weight.tolist(), attention.merge.bias.tolist(), strict=True)
        expected.append(
            unit([sum(w * x for w, x in zip(weights, joined, strict=True)) + bias for weights, bias in rows])
        )
    torch.manual_seed(7)
    torch.testing.assert_close(attention.estimate(front, back), torch.tensor(expected, dtype=torch.float64))


def graph_networks(student=(3, 4, 5), teacher=(4, 6, 7), heads=3, batch=5, **options):
    """A method, its two views, and adapters in eval mode whose batch norms have seen something."""
    sides = ((4, 6), (4, 6), (2, 3), (2, 3))
    views = [random_view((1, *widths), sides, batch, seed) for seed, widths in enumerate((student, teacher))]
    method = MultiHeadGraph(heads=heads, **options)
    torch.manual_seed(0)
    return method, *views, shaken(method.adapters(*views))


def test_the_transfer_is_that_of_a_loop():
    method, student, teacher, adapters = graph_networks(reduction="sum")
    expected = 0.0
    ours = []
    for (convolution, norm), stage_map in zip(adapters["widen"], student.maps, strict=True):
        linear = nn.Linear(1, 1, bias=False)
        linear.weight = nn.Parameter(convolution.weight[:, :, 0, 0])
        means = [[sum(c.flatten().tolist()) / c.numel() for c in sample] for sample in stage_map]
        ours.append([unit(slow_normed((linear, norm), row)) for row in means])
    theirs = [pooled(stage_map) for stage_map in teacher.maps]
    for attention, one, other in zip(adapters["attention"], pairwise(ours), pairwise(theirs), strict=True):
        for tables in zip(slow_scores(attention, *one), slow_scores(attention, *other), strict=True):
            for rows in zip(*tables, strict=True):
                g_s, g_t = (softmax([math.tanh(x) for x in row]) for row in rows)
                expected += sum(s * math.log(s / t) for s, t in zip(g_s, g_t, strict=True))
    assert loss_of(method, student, teacher, adapters).item() == pytest.approx(expected, rel=1e-10)
    mean = loss_of(MultiHeadGraph(heads=3), student, teacher, adapters)
    assert mean.item() == pytest.approx(expected / (3 * 5), rel=1e-10)


def test_an_equal_student_has_the_same_graphs_and_needs_no_widening():
    method, _, teacher, adapters = graph_networks((4, 6, 7), (4, 6, 7))
    assert not list(adapters["widen"].parameters())
    assert loss_of(method, teacher, teacher, adapters).item() == pytest.approx(0, abs=1e-14)


def test_the_adapters_have_the_teachers_widths():
    _, _, _, adapters = graph_networks((3, 6, 5), (4, 6, 7), heads=3)
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in adapters.named_parameters()
        if "weight" in name and parameter.ndim > 1
    }
    assert shapes == {
        "attention.0.query.0.weight": (15, 6),
        "attention.0.key.0.weight": (15, 4),
        "attention.0.value.0.0.weight": (5, 4),
        "attention.0.merge.weight": (6, 15),
        "attention.1.query.0.weight": (18, 7),
        "attention.1.key.0.weight": (18, 6),
        "attention.1.value.0.0.weight": (6, 6),
        "attention.1.merge.weight": (7, 18),
        "widen.0.0.weight": (4, 3, 1, 1),
        "widen.2.0.weight": (7, 5, 1, 1),
    }


def test_the_attention_is_fitted_to_the_teacher_alone():
    method, student, teacher, adapters = graph_networks()
    adapters["attention"].train()

    def fitted(view):
        torch.manual_seed(1)
        return method.phases()[0].objective(view, teacher, None, adapters)["attention"]

    assert fitted(None).item() == fitted(student).item()
    fitted(student).backward()
    assert all(parameter.grad is not None for parameter in adapters["attention"].parameters())
    assert all(parameter.grad is None for parameter in adapters["widen"].parameters())


def test_every_sample_keeps_some_heads_and_drops_some_at_random():
    torch.manual_seed(0)
    attention = shaken(GraphAttention(3, 4, heads=8))
    attention.merge = nn.Identity()  # shows what each head adds
    front, back = torch.randn(200, 3, dtype=torch.float64), torch.randn(200, 4, dtype=torch.float64)
    nn.init.constant_(attention.value[0][1].bias, 50.0)  # no head adds nothing
    kept = attention.estimate(front, back).unflatten(1, (8, 3)).any(dim=2)
    assert (kept.any(dim=1) & ~kept.all(dim=1)).all()
    assert kept.double().mean().item() == pytest.approx(0.5, abs=0.05)
    assert (kept.double().mean(dim=0) - 0.5).abs().max() < 0.15
    assert not torch.equal(attention.estimate(front, back).unflatten(1, (8, 3)).any(dim=2), kept)


def test_the_attention_learns_first_and_stays_as_it_is_while_the_student_learns():
    method = MultiHeadGraph(heads=3)
    assert [phase.trains for phase in method.phases()] == [("adapters.attention",), ("student", "adapters.widen")]
    before, between, after = states_between_phases(method, make_recipe())
    attention = {name for name in before if name.startswith("adapters.attention")}
    assert changed(before, between) == attention
    assert changed(between, after) == set(before) - attention
    assert any(name.startswith("adapters.widen") for name in changed(between, after))


@pytest.mark.parametrize("stop_after", [1, 4])
def test_a_run_that_stops_while_heads_are_dropped_goes_on_exactly(stop_after, tmp_path):
    method, recipe = MultiHeadGraph(heads=3, share=0.7), make_recipe()
    whole = run_session(scheme_of(method), recipe)
    checkpoint = tmp_path / "checkpoint.pt"
    first = run_session(scheme_of(method), recipe, checkpoint, stop_after=stop_after)
    assert first.stopped and first.steps == stop_after < 6
    rest = run_session(scheme_of(method), recipe, checkpoint)
    assert difference(rest.outcome, whole.outcome) is None


@pytest.mark.parametrize("how", ["one image twice", "one image in all places", "one zero vector", "zero vectors only"])
@pytest.mark.parametrize("phase", [0, 1])
def test_graphs_of_equal_samples_and_zero_vectors_have_finite_gradients(how, phase):
    method, student, teacher, adapters = graph_networks((4, 6, 7), (4, 6, 7), batch=6)
    order = {"one image twice": [0, 0, 1, 2, 3, 4], "one image in all places": [0] * 6}.get(how, [*range(6)])
    rows = torch.ones(6, 1, 1, 1)
    rows[: {"one zero vector": 1, "zero vectors only": 6}.get(how, 0)] = 0

    def broken(view):
        return view.map(lambda x: ((x[order] * rows) if x.ndim == 4 else x).float().requires_grad_())

    adapters = adapters.float()
    adapters["attention"].train(phase == 0)
    for views in (
        (broken(student), teacher.map(torch.Tensor.float)),
        (student.map(torch.Tensor.float), broken(teacher)),
    ):
        adapters.zero_grad()
        objective = method.phases()[phase].objective
        sum(objective(*views, torch.zeros(6, dtype=torch.int64), adapters).values()).backward()
        found = [tensor.grad for view in views for tensor in view.maps] + [p.grad for p in adapters.parameters()]
        found = [gradient for gradient in found if gradient is not None]
        assert found and all(gradient.isfinite().all() and gradient.abs().max() < 1e5 for gradient in found)


@deterministic
@given(seeds)
def test_gradients_of_flows_are_finite_for_zero_maps(seed):
    student = random_view(seed=seed).map(lambda x: torch.zeros_like(x).requires_grad_())
    loss_of(FSP(), student, random_view(seed=seed + 1)).backward()
    assert all(layer.grad.isfinite().all() for layer in (student.stem, *student.maps))


def test_a_graph_of_one_sample_is_refused():
    view = random_view(batch=1)
    with pytest.raises(ValueError, match="need a batch of at least 2, not of 1"):
        MultiHeadGraph().adapters(view, view)
    assert MultiHeadGraph.least_batch == 2
    view = random_view(batch=2)
    method = MultiHeadGraph()
    adapters = method.adapters(view, random_view((2, 5, 6), batch=2)).double()
    assert loss_of(method, view, random_view((2, 5, 6), batch=2), adapters).isfinite()


@pytest.mark.parametrize(("ours", "theirs"), [(1, 1), (1, 2), (2, 1)])
def test_graphs_need_the_same_stages(ours, theirs):
    view = random_view()
    with pytest.raises(ValueError, match=f"the same stages, 2 or more, not {ours} and {theirs}"):
        MultiHeadGraph().adapters(view._replace(maps=view.maps[:ours]), view._replace(maps=view.maps[:theirs]))


def test_graphs_need_maps():
    with pytest.raises(ValueError, match="the teacher shows no maps"):
        MultiHeadGraph().adapters(random_view(), random_view()._replace(maps=()))


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (FSP, {"ce_weight": 0.0}, "ce_weight must be .* above 0, not 0.0"),
        (FSP, {"kd_weight": 0.0}, "kd_weight must be .* above 0, not 0.0"),
        (FSP, {"share": 0.0}, "share must be .* not 0.0"),
        (FSP, {"reduction": "none"}, "reduction must be one of sum, mean, not 'none'"),
        (MultiHeadGraph, {"share": -1.0}, "share must be .* not -1.0"),
        (MultiHeadGraph, {"heads": 1}, "heads must be a whole number of at least 2, not 1"),
        (MultiHeadGraph, {"heads": 2.5}, "heads must be .* not 2.5"),
        (MultiHeadGraph, {"reduction": "none"}, "reduction must be one of mean, sum, not 'none'"),
        (MultiHeadGraph, {"kd_weight": -1.0}, "kd_weight must be .* not -1.0"),
    ],
)
def test_hyperparameters_out_of_range_are_refused_by_name(cls, values, message):
    with pytest.raises(ValueError, match=message):
        cls(**values)
