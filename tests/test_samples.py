"""Relations between samples against reference values and loops, and their invariances."""

import math

import pytest
import torch
from batches import LABELS_A, STUDENT_A, TEACHER_A, TOLERANCE, deterministic, oracles, total_of
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from kdstudy.core import View
from kdstudy.samples import (
    Correlation,
    InstanceGraph,
    Probabilistic,
    Relational,
    SimilarityPreserving,
    cosines,
    edges,
    neighbours,
    relative_distances,
    transformation,
)

NO_ADAPTERS = nn.ModuleDict()
IDENTITIES = nn.ModuleDict({"student": nn.Identity(), "teacher": nn.Identity()})
EMBEDDINGS = ([[0, 0], [3, 4], [0, 4]], [[0, 0], [1, 0], [0, 2]])
EMBEDDINGS_E = ([[3, 4], [0, 4], [1, -1]], [[1, 0], [0, 2], [2, 1]])
METHODS = [
    Relational(distance_weight=1.0, angle_weight=0.0),
    Relational(distance_weight=0.0, angle_weight=1.0),
    Relational(),
    InstanceGraph(vertex_weight=1.0, edge_weight=0.0, transformation_weight=0.0),
    InstanceGraph(vertex_weight=0.0, edge_weight=1.0, transformation_weight=0.0),
    InstanceGraph(vertex_weight=0.0, edge_weight=0.0, transformation_weight=1.0),
    InstanceGraph(),
    SimilarityPreserving(),
    Probabilistic(),
    Correlation(),
]
every_method = pytest.mark.parametrize("method", METHODS, ids=repr)
precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
seeds = st.integers(0, 999)


def view_of(embedding, dtype=torch.float64) -> View:
    """A network with this embedding, and a last map that holds it in one pixel."""
    embedding = torch.tensor(embedding, dtype=dtype)
    return View(torch.zeros(len(embedding), 3, dtype=dtype), embedding=embedding, maps=(embedding[:, :, None, None],))


def random_view(batch=5, width=6, seed=0, dtype=torch.float64) -> View:
    """A network with two stages, the second twice as wide and half the size."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, 4), (batch, width, 4, 6), (batch, 2 * width, 2, 3), (batch, 2 * width))
    logits, first, second, embedding = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    return View(logits, maps=(first, second), embedding=embedding).map(lambda x: x.to(dtype))


def loss_of(method, student, teacher, adapters=NO_ADAPTERS):
    return method.loss(student, teacher, torch.zeros(len(student.logits), dtype=torch.int64), adapters)


@precisions
@pytest.mark.parametrize(
    ("method", "embeddings", "key"),
    [
        (Relational(distance_weight=1.0, angle_weight=0.0), EMBEDDINGS, "rkd_D"),
        (Relational(distance_weight=0.0, angle_weight=1.0), EMBEDDINGS, "rkd_A"),
        (Relational(), EMBEDDINGS, "rkd_25D_50A"),
        (SimilarityPreserving(), EMBEDDINGS, "sp"),
        (Probabilistic(), EMBEDDINGS_E, "g_pkt"),
        (Correlation(), EMBEDDINGS_E, "g_cc_paper_rbf_mse"),
        (Correlation(order=30), EMBEDDINGS_E, "g_cc_exact_rbf_mse"),
        (Correlation(variant="consecutive"), EMBEDDINGS_E, "g_cc_repdistiller"),
    ],
    ids=str,
)
def test_loss_is_the_oracles(method, embeddings, key, dtype):
    loss = loss_of(method, *(view_of(each, dtype) for each in embeddings), IDENTITIES)
    assert loss.dtype == dtype and loss.shape == ()
    assert loss.item() == pytest.approx(oracles()[key], abs=TOLERANCE[dtype])


@precisions
def test_the_tables_that_are_compared_are_the_oracles(dtype):
    distances = relative_distances(view_of(EMBEDDINGS[0], dtype).embedding)
    expected = torch.tensor(oracles()["rkd_dist_norm_s"], dtype=dtype)
    torch.testing.assert_close(distances, expected, atol=TOLERANCE[dtype], rtol=0)
    for embedding, key in zip(EMBEDDINGS_E, ("g_cc_rbf_s", "g_cc_rbf_t"), strict=True):
        correlations = Correlation().correlations(view_of(embedding, dtype).embedding)
        expected = torch.tensor(oracles()[key], dtype=dtype)
        torch.testing.assert_close(correlations, expected, atol=TOLERANCE[dtype], rtol=0)


@precisions
def test_the_parts_of_the_instance_graph_are_the_oracles(dtype):
    student, teacher = (edges(view_of(each, dtype).embedding) for each in EMBEDDINGS)
    assert (student - teacher).square().mean().item() == pytest.approx(oracles()["irg_edge"], abs=TOLERANCE[dtype])
    student, teacher = (View(torch.tensor(logits, dtype=dtype)) for logits in (STUDENT_A, TEACHER_A))
    vertices = InstanceGraph(vertex_weight=1.0, edge_weight=0.0, transformation_weight=0.0)
    assert loss_of(vertices, student, teacher).item() == pytest.approx(oracles()["irg_vertex"], abs=TOLERANCE[dtype])


def slow_distance(one, other):
    return math.dist(one.flatten().tolist(), other.flatten().tolist())


def slow_edges(features):
    table = [[slow_distance(one, other) ** 2 for other in features] for one in features]
    largest = max(map(max, table))
    return [[x / largest for x in row] for row in table]


def slow_transformation(before, after):
    batch, _, height, width = after.shape
    moves = []
    for b in range(batch):
        move = 0.0
        for c in range(before.shape[1]):
            for y in range(height):
                for x in range(width):
                    pixels = [before[b, c, 2 * y + i, 2 * x + j].item() for i in (0, 1) for j in (0, 1)]
                    pair = (after[b, 2 * c, y, x].item() + after[b, 2 * c + 1, y, x].item()) / 2
                    move += (sum(pixels) / 4 - pair) ** 2
        moves.append(move)
    return [move / max(moves) for move in moves]


def mean_square(one, other):
    gaps = (torch.tensor(one, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)).flatten()
    return sum(gap**2 for gap in gaps.tolist()) / len(gaps)


def test_the_instance_graph_is_that_of_a_loop():
    student, teacher = random_view(width=2, seed=1), random_view(width=4, seed=2)
    taps = [(view.embedding, *view.maps) for view in (student, teacher)]
    edge = sum(mean_square(slow_edges(s), slow_edges(t)) for s, t in zip(*taps, strict=True)) / 3
    change = mean_square(slow_transformation(*student.maps), slow_transformation(*teacher.maps))
    vertex = mean_square(student.logits.tolist(), teacher.logits.tolist())
    loss = loss_of(InstanceGraph(), student, teacher)
    assert loss.item() == pytest.approx(0.1 * vertex + 5 * edge + 5 * change, rel=1e-12)


def test_the_instance_graph_reads_the_last_two_maps():
    student, teacher = random_view(seed=1), random_view(seed=2)
    longer = student._replace(maps=(torch.randn(5, 3, 8, 12, dtype=torch.float64), *student.maps))
    assert loss_of(InstanceGraph(), longer, teacher) == loss_of(InstanceGraph(), student, teacher)


def test_stages_of_one_width_and_size_are_compared_as_they_are():
    before, after = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    moves = (before - after).square().sum(dim=(1, 2, 3))
    torch.testing.assert_close(transformation(before, after), moves / moves.max())


def slow_angle(vertex, one, other):
    if slow_distance(vertex, one) == 0 or slow_distance(vertex, other) == 0:
        return 0.0
    dot = sum(a * b for a, b in zip((one - vertex).tolist(), (other - vertex).tolist(), strict=True))
    return dot / (slow_distance(vertex, one) * slow_distance(vertex, other))


def huber(gap):
    return gap * gap / 2 if abs(gap) <= 1 else abs(gap) - 0.5


def slow_relative_distances(rows):
    others = [slow_distance(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
    return [[slow_distance(a, b) / (sum(others) / len(others)) for b in rows] for a in rows]


@deterministic
@given(seeds)
def test_distances_and_angles_are_those_of_loops(seed):
    student, teacher = random_view(4, 2, seed), random_view(4, 3, seed + 1)
    student.embedding[0] *= 20  # some gaps lie in the straight part of the Huber loss
    student.embedding[3] = student.embedding[2]  # and some triples have no angle
    rows = [student.embedding, teacher.embedding]
    gaps = [s - t for pair in zip(*map(slow_relative_distances, rows), strict=True) for s, t in zip(*pair, strict=True)]
    distance = loss_of(Relational(distance_weight=1.0, angle_weight=0.0), student, teacher)
    assert distance.item() == pytest.approx(sum(map(huber, gaps)) / 16, abs=1e-6)
    gaps = []
    for j in range(4):
        for i in range(4):
            gaps += [
                slow_angle(*(rows[0][x] for x in (j, i, k))) - slow_angle(*(rows[1][x] for x in (j, i, k)))
                for k in range(4)
            ]
    angle = loss_of(Relational(distance_weight=0.0, angle_weight=1.0), student, teacher)
    assert angle.item() == pytest.approx(sum(map(huber, gaps)) / 64, abs=1e-12)


def test_the_mean_distance_is_taken_over_pairs_of_different_samples_only():
    distances = relative_distances(torch.randn(7, 3, dtype=torch.float64))
    assert not distances.diagonal().any()
    assert distances[~torch.eye(7, dtype=torch.bool)].mean().item() == pytest.approx(1, rel=1e-12)


def test_a_pair_of_equal_samples_counts_in_the_mean_distance():
    distances = relative_distances(torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64))
    assert distances[0, 2].item() == pytest.approx(1.5, rel=1e-5)


@pytest.mark.parametrize(
    ("cls", "weight", "part"),
    [
        (Relational, "distance_weight", "relative_distances"),
        (Relational, "angle_weight", "angles"),
        (InstanceGraph, "edge_weight", "edges"),
        (InstanceGraph, "transformation_weight", "transformation"),
    ],
)
def test_a_weight_of_zero_leaves_its_part_out(cls, weight, part, monkeypatch):
    def computed(*arguments):
        raise RuntimeError("computed")

    views = [random_view(seed=seed) for seed in (1, 2)]
    monkeypatch.setattr(f"kdstudy.samples.{part}", computed)
    with pytest.raises(RuntimeError, match="computed"):
        loss_of(cls(), *views)
    assert loss_of(cls(**{weight: 0.0}), *views) > 0


def test_a_vertex_weight_of_zero_leaves_the_logits_out():
    views = [random_view(seed=seed) for seed in (1, 2)]
    wrong = [view._replace(logits=view.logits * math.nan) for view in views]
    method = InstanceGraph(vertex_weight=0.0)
    assert loss_of(method, *wrong) == loss_of(method, *views)


def test_the_parts_of_the_relational_loss_are_weighted():
    views = [random_view(seed=seed) for seed in (1, 2)]
    distance, angle = (
        loss_of(Relational(distance_weight=1.0 - x, angle_weight=float(x)), *views).item() for x in (0, 1)
    )
    both = loss_of(Relational(distance_weight=2.0, angle_weight=3.0), *views).item()
    assert both == pytest.approx(2 * distance + 3 * angle, rel=1e-12)


@deterministic
@given(seeds)
def test_similarities_are_those_of_a_loop(seed):
    views = [random_view(4, width, seed) for width in (2, 3)]
    tables = []
    for view in views:
        rows = view.maps[-1].flatten(1)
        table = [[sum((a * b).tolist()) for b in rows] for a in rows]
        tables.append([[x / math.hypot(*row) for x in row] for row in table])
    loss = loss_of(SimilarityPreserving(), *views)
    assert loss.item() == pytest.approx(mean_square(*tables), rel=1e-10)


@deterministic
@given(seeds)
def test_neighbours_are_those_of_a_loop(seed):
    views = [random_view(4, width, seed) for width in (2, 3)]
    tables = []
    for view in views:
        rows = view.embedding
        close = [[(sum((a * b).tolist()) / math.hypot(*a) / math.hypot(*b) + 1) / 2 for b in rows] for a in rows]
        tables.append([[x / sum(row) for x in row] for row in close])
    q, p = (torch.tensor(table, dtype=torch.float64).flatten().tolist() for table in tables)
    expected = sum(a * math.log((a + 1e-7) / (b + 1e-7)) for a, b in zip(p, q, strict=True)) / 16
    assert loss_of(Probabilistic(), *views).item() == pytest.approx(expected, rel=1e-9)


@deterministic
@given(seeds, st.floats(0.05, 2))
def test_many_terms_of_the_series_are_the_gaussian_kernel(seed, gamma):
    embedding = random_view(seed=seed).embedding
    directions = [row / math.hypot(*row) for row in embedding]
    kernel = [[math.exp(-gamma * slow_distance(a, b) ** 2) for b in directions] for a in directions]
    found = Correlation(gamma=gamma, order=60).correlations(embedding)
    torch.testing.assert_close(found, torch.tensor(kernel, dtype=torch.float64), atol=1e-9, rtol=0)


def test_the_consecutive_form_multiplies_the_gaps_of_neighbours_in_the_batch():
    gaps = [[1.0, 2.0], [3.0, 0.5], [4.0, 7.0]]
    student, teacher = view_of([[10 + a, 20 - b] for a, b in gaps]), view_of([[10.0, 20.0]] * 3)
    loss = loss_of(Correlation(variant="consecutive"), student, teacher, IDENTITIES)
    assert loss.item() == pytest.approx(((3 + 1) + (12 + 3.5)) / 2, rel=1e-12)


def test_the_consecutive_form_has_two_trained_embeddings_and_the_default_none():
    student, teacher = random_view(width=3), random_view(width=5)
    adapters = Correlation(variant="consecutive").adapters(student, teacher).double()
    assert {name: tuple(p.shape) for name, p in adapters.named_parameters()} == {
        "student.weight": (128, 6),
        "student.bias": (128,),
        "teacher.weight": (128, 10),
        "teacher.bias": (128,),
    }
    loss_of(Correlation(variant="consecutive"), student, teacher, adapters).backward()
    assert all(parameter.grad.any() for parameter in adapters.parameters())
    assert not list(Correlation().adapters(student, teacher).parameters())


@every_method
def test_zero_for_equal_networks_and_above_for_others(method):
    student, teacher = random_view(seed=1), random_view(seed=2)
    assert loss_of(method, teacher, teacher).item() == pytest.approx(0, abs=1e-12)
    assert loss_of(method, student, teacher).item() > 1e-6


@pytest.mark.parametrize("method", [method for method in METHODS if not getattr(method, "vertex_weight", 0)], ids=repr)
def test_relations_know_neither_axes_nor_scale_nor_the_other_networks_width(method):
    """A rotation of all samples changes no relation, a common factor none that is taken relative to the batch."""
    student, teacher = random_view(width=3, seed=1), random_view(width=5, seed=2)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    turned = student._replace(embedding=3.7 * student.embedding @ rotation, maps=tuple(3.7 * x for x in student.maps))
    losses = [loss_of(method, each, teacher).item() for each in (student, turned)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.parametrize(
    "method", [Relational(), InstanceGraph(vertex_weight=0.0, transformation_weight=0.0)], ids=repr
)
def test_distances_and_angles_know_no_origin(method):
    student, teacher = random_view(seed=1), random_view(seed=2)
    moved = student._replace(embedding=student.embedding + 5, maps=tuple(x - 3 for x in student.maps))
    assert loss_of(method, moved, teacher).item() == pytest.approx(loss_of(method, student, teacher).item(), rel=1e-9)


def test_distances_of_far_off_samples_keep_their_digits_in_single_precision():
    rows = torch.randn(6, 300, dtype=torch.float64)
    expected = edges(rows)
    torch.testing.assert_close(edges((rows + 1000).float()).double(), expected, atol=1e-3, rtol=0)


@every_method
def test_the_order_of_the_batch_is_irrelevant_but_who_belongs_to_whom_is_not(method):
    student, teacher = random_view(seed=1), random_view(seed=2)
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = [view.map(lambda x: x[order]) for view in (student, teacher)]
    loss = loss_of(method, student, teacher).item()
    assert loss_of(method, *shuffled).item() == pytest.approx(loss, rel=1e-10)
    assert loss_of(method, shuffled[0], teacher).item() != pytest.approx(loss, rel=1e-3)


def test_a_sample_has_no_edge_to_itself_even_where_no_two_differ():
    expected = 1 - torch.eye(3)
    torch.testing.assert_close(edges(torch.ones(3, 2)), expected)


def test_cosines_of_a_zero_vector_are_zero():
    table = cosines(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    assert table.tolist() == [[0, 0], [0, pytest.approx(1)]]


def test_neighbours_are_distributions_of_each_row_also_where_rounding_takes_a_cosine_below_minus_one():
    embedding = torch.randn(100, 30, generator=torch.Generator().manual_seed(0))
    embedding = torch.cat([embedding, -embedding])
    assert cosines(embedding).min() < -1
    table = neighbours(embedding)
    assert (table >= 0).all()
    torch.testing.assert_close(table.sum(dim=1), torch.ones(200))


def test_opposite_embeddings_have_finite_logarithms():
    student = View(torch.zeros(2, 3), embedding=torch.tensor([[3.0, 1.0], [-3.0, -1.0]], requires_grad=True))
    loss = loss_of(Probabilistic(), student, view_of([[1.0, 0.0], [0.0, 1.0]], torch.float32))
    loss.backward()
    assert loss.isfinite() and student.embedding.grad.isfinite().all()


def gradients(method, student, teacher):
    """The gradients of the student's taps in float32, and the largest entry of each."""
    student = student.map(lambda x: x.float().clone().requires_grad_())
    adapters = method.adapters(student, teacher)
    loss_of(method, student, teacher.map(torch.Tensor.float), adapters).backward()
    taps = (student.logits, student.embedding, *student.maps)
    return [tap.grad for tap in taps if tap.grad is not None]


def broken_views(how):
    view = random_view(6, seed=3)
    if how == "one image twice":
        return view.map(lambda x: x[[0, 0, 1, 2, 3, 4]])
    if how == "one image in all places":
        return view.map(lambda x: x[[0] * 6])
    if how == "images that all but coincide":
        return view.map(lambda x: x[[0] * 6] + 1e-6 * x)
    if how == "one zero vector":
        return view.map(lambda x: torch.cat([torch.zeros_like(x[:1]), x[1:]]))
    return view.map(torch.zeros_like)


@pytest.mark.parametrize("method", [*METHODS, Correlation(variant="consecutive")], ids=repr)
@pytest.mark.parametrize(
    "how",
    [
        "one image twice",
        "one image in all places",
        "images that all but coincide",
        "one zero vector",
        "zero vectors only",
    ],
)
def test_gradients_stay_finite_and_bounded_for_equal_samples_and_zero_vectors(method, how):
    teacher = random_view(6, seed=4)
    found = gradients(method, broken_views(how), teacher)
    assert found and all(gradient.isfinite().all() for gradient in found)
    assert all(gradient.abs().max() <= 1e9 for gradient in found)
    found = gradients(method, teacher, broken_views(how))
    assert all(gradient.isfinite().all() for gradient in found)


@pytest.mark.parametrize("method", [Relational(), Probabilistic(), SimilarityPreserving(), Correlation()], ids=repr)
def test_what_has_no_direction_gets_no_gradient_but_the_rest_its_own(method):
    student = broken_views("one zero vector")
    if isinstance(method, Relational):
        student = broken_views("one image twice")
    gradient = gradients(method, student, random_view(6, seed=4))[0].flatten(1)
    assert gradient[2:].any(dim=1).all()
    if not isinstance(method, Relational):
        assert gradient[0].abs().max() <= 10 * gradient[1:].abs().max()
    ordinary = gradients(method, random_view(6, seed=3), random_view(6, seed=4))[0]
    assert gradient.abs().max() <= 50 * ordinary.abs().max()


@every_method
def test_only_the_student_gets_a_gradient_and_it_points_downhill(method):
    student, teacher = random_view(seed=1).map(torch.Tensor.requires_grad_), random_view(seed=2)
    taps = [student.logits, student.embedding, *student.maps]
    before = loss_of(method, student, teacher)
    steps = torch.autograd.grad(before, taps, allow_unused=True)
    length = sum(step.square().sum() for step in steps if step is not None)
    moved = [tap if step is None else tap - 1e-6 / length * step for tap, step in zip(taps, steps, strict=True)]
    after = loss_of(method, View(moved[0], embedding=moved[1], maps=tuple(moved[2:])), teacher)
    assert (before - after).item() == pytest.approx(1e-6, rel=1e-2)


@pytest.mark.parametrize(
    ("method", "values"),
    [
        (Relational(), {"kd_weight": 1.0, "distance_weight": 25.0, "angle_weight": 50.0}),
        (InstanceGraph(), {"kd_weight": 1.0, "vertex_weight": 0.1, "edge_weight": 5.0, "transformation_weight": 5.0}),
        (SimilarityPreserving(), {"kd_weight": 3000.0}),
        (Probabilistic(), {"kd_weight": 30000.0}),
        (Correlation(), {"kd_weight": 100.0, "variant": "rbf", "gamma": 0.4, "order": 2}),
    ],
    ids=repr,
)
def test_defaults_are_the_published_ones(method, values):
    assert vars(method) == {"ce_weight": 1.0} | values


def test_the_terms_are_cross_entropy_and_the_weighted_relation():
    student, teacher = random_view(2, seed=1), random_view(2, seed=2)
    student = student._replace(logits=torch.tensor(STUDENT_A, dtype=torch.float64))
    labels = torch.tensor(LABELS_A)
    method = SimilarityPreserving(ce_weight=0.5)
    expected = 0.5 * cross_entropy(student.logits, labels) + 3000 * loss_of(method, student, teacher)
    torch.testing.assert_close(total_of(method, student, teacher, labels), expected)


@pytest.mark.parametrize("method", [*METHODS, Correlation(variant="consecutive")], ids=repr)
def test_a_batch_of_one_is_refused(method):
    views = [random_view(1), random_view(1)]
    with pytest.raises(ValueError, match="relations between samples need a batch of at least 2, not of 1"):
        method.adapters(*views)
    assert method.least_batch == 2
    views = [random_view(2, seed=1), random_view(2, seed=2)]
    assert loss_of(method, *views, method.adapters(*views).double()).isfinite()


@pytest.mark.parametrize("method", [Relational(), InstanceGraph(), Probabilistic(), Correlation()], ids=repr)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_network_without_an_embedding_is_refused(method, who):
    views = {"student": random_view(), "teacher": random_view()}
    views[who] = views[who]._replace(embedding=None)
    with pytest.raises(ValueError, match=f"the {who} shows no embedding"):
        method.adapters(**views)


@pytest.mark.parametrize("method", [InstanceGraph(), SimilarityPreserving()], ids=repr)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_network_without_maps_is_refused(method, who):
    views = {"student": random_view(), "teacher": random_view()}
    views[who] = views[who]._replace(maps=())
    with pytest.raises(ValueError, match=f"the {who} shows no maps"):
        method.adapters(**views)


@pytest.mark.parametrize("widths", [(4,), (4, 6), (6, 4)])
def test_an_instance_graph_of_stages_that_do_not_fit_is_refused(widths):
    student = random_view()
    teacher = student._replace(maps=tuple(torch.zeros(5, width, 2, 2) for width in widths))
    with pytest.raises(ValueError, match="the last map must have a multiple of the channels of the one before"):
        InstanceGraph().adapters(student, teacher)


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (Relational, {"distance_weight": -1.0}, "distance_weight must be .* not -1.0"),
        (Relational, {"angle_weight": math.nan}, "angle_weight must be .* not nan"),
        (Relational, {"distance_weight": 0.0, "angle_weight": 0.0}, "distance_weight and angle_weight are both 0"),
        (InstanceGraph, {"vertex_weight": -1.0}, "vertex_weight must be .* not -1.0"),
        (InstanceGraph, {"edge_weight": math.inf}, "edge_weight must be .* not inf"),
        (InstanceGraph, {"transformation_weight": "5"}, "transformation_weight must be .* not '5'"),
        (
            InstanceGraph,
            {"vertex_weight": 0.0, "edge_weight": 0.0, "transformation_weight": 0.0},
            "vertex_weight, edge_weight, transformation_weight are all 0",
        ),
        (Correlation, {"variant": "gaussian"}, "variant must be one of rbf, consecutive, not 'gaussian'"),
        (Correlation, {"gamma": 0.0}, "gamma must be .* not 0.0"),
        (Correlation, {"order": 0}, "order must be .* not 0"),
        (Correlation, {"order": 1.5}, "order must be a whole number of at least 1, not 1.5"),
        (SimilarityPreserving, {"kd_weight": -1.0}, "kd_weight must be .* not -1.0"),
    ],
)
def test_hyperparameters_out_of_range_are_refused_by_name(cls, values, message):
    with pytest.raises(ValueError, match=message):
        cls(**values)
