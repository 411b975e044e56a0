"""What the classifier reads: class distances and normalised features, against reference values and loops."""

import math

import pytest
import torch
from batches import TOLERANCE, oracles
from test_methods import batch_of, make_scheme, network, toy_bank, trained_network
from torch import nn
from toy import make_recipe, run_session
from toy import make_scheme as tiny_scheme

from kdstudy.core import View
from kdstudy.penultimate import ClassDistance, ClassDistanceTeacher, ClassMeans, FeatureNormalised
from kdstudy.recipe import Recipe
from kdstudy.schemes import Alone, Offline
from kdstudy.train import Training

NO_ADAPTERS = nn.ModuleDict()
precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def seeing(embedding, classes: int = 3, dtype=torch.float64) -> View:
    """A view of which only the embedding matters."""
    embedding = torch.as_tensor(embedding, dtype=dtype)
    return View(embedding.new_zeros(len(embedding), classes), embedding=embedding)


def random_embedding(batch: int, width: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, width, generator=generator, dtype=torch.float64) * scale


# the student's class distance


@precisions
def test_the_students_distance_is_the_oracles(dtype):
    student, teacher = seeing([[1, 2], [0, 1]], dtype=dtype), seeing([[1, 0], [1, 1]], dtype=dtype)
    adapters = ClassDistance().adapters(student, teacher)
    loss = ClassDistance().loss(student, teacher, None, adapters)
    assert loss.dtype == dtype and not list(adapters.parameters())
    assert loss.item() == pytest.approx(oracles()["cd_student_l2sq"], abs=TOLERANCE[dtype])


def test_unequal_widths_are_joined_by_a_linear_layer_on_the_student():
    student, teacher = seeing(random_embedding(4, 3)), seeing(random_embedding(4, 5, seed=1))
    adapters = ClassDistance().adapters(student, teacher).double()
    weight, bias = adapters["regressor"].weight, adapters["regressor"].bias
    expected = 0.0
    for f_s, f_t in zip(student.embedding.tolist(), teacher.embedding.tolist(), strict=True):
        for row, shift, target in zip(weight.tolist(), bias.tolist(), f_t, strict=True):
            expected += (sum(w * x for w, x in zip(row, f_s, strict=True)) + shift - target) ** 2
    assert ClassDistance().loss(student, teacher, None, adapters).item() == pytest.approx(expected / 4)


def class_distance_scheme(method, student="wrn_10_0.5"):
    torch.manual_seed(0)
    teacher = trained_network("wrn_10_0.5", torch.float64)
    return Offline(network(student, torch.float64), teacher, method, batch_of(16)), teacher


def toy_run(scheme, epochs=3, **options):
    recipe = Recipe(epochs=epochs, batch=16, learning_rate=0.05, crop_padding=1, precision="fp64", **options)
    return Training(scheme, recipe, toy_bank(50), seed=0, watch={})


@pytest.mark.parametrize("reuse", [True, False])
def test_the_teachers_classifier_is_taken_and_kept_only_if_asked_for(reuse):
    scheme, teacher = class_distance_scheme(ClassDistance(reuse_classifier=reuse))
    before = {name: x.clone() for name, x in scheme.student.state_dict().items()}
    history = toy_run(scheme, epochs=6, weight_decay=0.1).run()
    assert history[-1]["kd"] < 0.9 * history[0]["kd"]
    after = scheme.student.state_dict()
    same = {name for name, x in before.items() if torch.equal(after[name], x)}
    assert not same
    for name, x in teacher.classifier.state_dict().items():
        assert torch.equal(after[f"classifier.{name}"], x) == reuse


def test_a_reused_classifier_is_no_copy_by_reference_and_leaves_the_teacher_alone():
    scheme, teacher = class_distance_scheme(ClassDistance(reuse_classifier=True))
    scheme.prepare(lambda: [])
    assert scheme.student.classifier.weight.data_ptr() != teacher.classifier.weight.data_ptr()
    assert scheme.student.classifier.weight.requires_grad and not teacher.classifier.weight.requires_grad


def test_a_classifier_of_another_width_cannot_be_reused():
    with pytest.raises(ValueError, match="reuse_classifier needs embeddings of one width, not 16 and 32"):
        class_distance_scheme(ClassDistance(reuse_classifier=True), student="wrn_10_0.25")


# the teacher's class distance


def class_distance_slowly(batches, margin, momentum, classes):
    """The loss of each batch in turn, in loops, and the means after the last."""
    means, losses = {}, []
    for rows, labels in batches:
        members = {c: [row for row, label in zip(rows, labels, strict=True) if label == c] for c in set(labels)}
        centres = {c: [sum(x) / len(group) for x in zip(*group, strict=True)] for c, group in members.items()}
        for c, centre in centres.items():
            means.setdefault(c, centre)
        loss = 0.0
        for row, label in zip(rows, labels, strict=True):
            loss += math.dist(row, means[label]) ** 2
            pushes = [max(0.0, margin - math.dist(row, mean)) ** 2 for c, mean in means.items() if c != label]
            loss += sum(pushes) / len(pushes) if pushes else 0.0
        losses.append(loss / len(rows))
        for c, centre in centres.items():
            means[c] = [momentum * old + (1 - momentum) * new for old, new in zip(means[c], centre, strict=True)]
    return losses, means


# a class that comes later, one that never comes, a batch of one class
LABELS = ([0, 0, 1, 1, 0], [2, 0, 2, 1, 0], [1, 1, 1, 1, 1], [0, 2, 1, 0, 0])


@pytest.mark.parametrize(("margin", "momentum"), [(10.0, 0.9), (2.0, 0.5)])
def test_the_teachers_distance_is_what_loops_give_while_the_means_move(margin, momentum):
    method = ClassDistanceTeacher(margin=margin, momentum=momentum)
    embeddings = [random_embedding(5, 3, seed=number) for number in range(len(LABELS))]
    batches = [(x.tolist(), labels) for x, labels in zip(embeddings, LABELS, strict=True)]
    expected, means = class_distance_slowly(batches, margin, momentum, 4)
    adapters = method.adapters(seeing(embeddings[0], 4), None).double()
    losses = []
    for x, labels in zip(embeddings, LABELS, strict=True):
        losses.append(method.loss(seeing(x, 4), None, torch.tensor(labels), adapters).item())
    assert losses == pytest.approx(expected, rel=1e-10)
    class_means = adapters["class_means"]
    for c, mean in means.items():
        assert class_means.means[c].tolist() == pytest.approx(mean, rel=1e-10)
    assert class_means.seen.tolist() == [1, 1, 1, 0] and not class_means.means[3].any()


def test_the_means_move_after_the_loss_and_only_in_train_mode():
    method = ClassDistanceTeacher()
    view, labels = seeing(random_embedding(6, 3)), torch.tensor([0, 1, 2, 0, 1, 2])
    adapters = method.adapters(view, None).double()
    method.loss(view, None, labels, adapters)
    state = {name: x.clone() for name, x in adapters.state_dict().items()}
    other = seeing(random_embedding(6, 3, seed=1))
    adapters.eval()
    in_eval = method.loss(other, None, labels, adapters)
    assert all(torch.equal(x, state[name]) for name, x in adapters.state_dict().items())
    adapters.train()
    assert torch.equal(method.loss(other, None, labels, adapters), in_eval)  # still against the means before
    assert not torch.equal(adapters["class_means"].means, state["class_means.means"])
    assert method.loss(other, None, labels, adapters) < in_eval


def test_no_gradient_passes_through_the_means_and_that_of_the_embedding_is_right():
    method = ClassDistanceTeacher(margin=2.0)
    start, labels = seeing(random_embedding(6, 3)), torch.tensor([0, 1, 2, 0, 1, 2])
    adapters = method.adapters(start, None).double()
    method.loss(start, None, labels, adapters)
    adapters.eval()
    x = random_embedding(6, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: method.loss(seeing(x), None, labels, adapters), x)
    fresh = method.adapters(start, None).double()
    (gradient,) = torch.autograd.grad(method.loss(seeing(x), None, labels[[0, 0, 0, 0, 0, 0]], fresh), x)
    # of one class: twice the way from a mean that stands still, over B
    torch.testing.assert_close(gradient, 2 * (x - x.mean(dim=0)).detach() / 6)
    assert not list(adapters.parameters())


def test_an_embedding_on_another_classs_mean_has_a_finite_gradient():
    method = ClassDistanceTeacher()
    x = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 0, 1])
    loss = method.loss(seeing(x), None, labels, method.adapters(seeing(x), None).double())
    loss.backward()
    assert loss.item() == pytest.approx(100.0) and x.grad.isfinite().all()


def test_the_teachers_distance_is_never_in_the_way_of_a_network_that_is_far_apart_and_dense():
    x = torch.eye(3, dtype=torch.float64).repeat(2, 1) * 20
    labels = torch.tensor([0, 1, 2] * 2)
    method = ClassDistanceTeacher()
    assert method.loss(seeing(x), None, labels, method.adapters(seeing(x), None).double()).item() == 0
    near = ClassDistanceTeacher(margin=30.0)
    push = (30 - 20 * math.sqrt(2)) ** 2
    assert near.loss(seeing(x), None, labels, near.adapters(seeing(x), None).double()).item() == pytest.approx(push)


def test_the_teacher_is_trained_alone_and_its_means_go_with_the_checkpoint(tmp_path):
    def scheme():
        return tiny_scheme(ClassDistanceTeacher(kd_weight=0.1))

    recipe = make_recipe()
    whole = run_session(scheme(), recipe)
    assert isinstance(scheme(), Alone) and {"ce", "kd"} < set(whole.history[-1])
    assert whole.state["adapters.class_means.means"].any() and whole.state["adapters.class_means.seen"].all()
    first = run_session(scheme(), recipe, tmp_path / "checkpoint.pt", stop_after=5)
    assert first.stopped
    second = run_session(scheme(), recipe, tmp_path / "checkpoint.pt")
    for name, value in whole.state.items():
        assert torch.equal(second.state[name], value), name
    assert second.history == whole.history


def test_class_means_are_no_part_of_the_network_that_is_kept():
    scheme = make_scheme("class_distance_teacher")
    assert scheme.deployed is scheme.student
    assert isinstance(scheme.adapters["class_means"], ClassMeans)


def test_the_loss_makes_classes_dense():
    spreads = []
    for weight in (0.0, 0.1):
        torch.manual_seed(0)
        method = ClassDistanceTeacher(kd_weight=weight)
        scheme = Alone(network("cnn_small", torch.float64), method, batch_of(16))
        toy_run(scheme, epochs=8).run()
        bank = toy_bank(50)
        with torch.no_grad():
            f = scheme.student.eval()(next(bank.plain(50))).embedding
        within = torch.stack([f[bank.labels == c].var(dim=0).sum() for c in range(4)]).mean()
        spreads.append((within / f.var(dim=0).sum()).item())
    assert spreads[1] < 0.8 * spreads[0]


# normalised features


class Classified(nn.Module):
    """A network as far as this method runs it."""

    def __init__(self, weight, bias):
        super().__init__()
        weight, bias = (torch.as_tensor(x, dtype=torch.float64) for x in (weight, bias))
        self.classifier = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
        self.classifier.weight.data.copy_(weight)
        self.classifier.bias.data.copy_(bias)


def classified(embedding, weight, bias) -> View:
    module = Classified(weight, bias)
    embedding = torch.as_tensor(embedding, dtype=torch.float64)
    return View(module.classifier(embedding), embedding=embedding, network=module)


def the_target() -> View:
    """A teacher that answers .7, .3 to everything, by its bias alone."""
    return classified([[5.0, 1.0]], torch.zeros(2, 2), torch.tensor([0.7, 0.3]).double().log())


@pytest.mark.parametrize(
    ("tau", "expected"),
    [(1.0, "fn_softce_tau1"), (2.0, "fn_softce_tau2"), (10.0, 1.013262)],
)
def test_feature_normalisation_is_the_oracles(tau, expected):
    student = classified([[3.0, 4.0]], torch.eye(2), torch.zeros(2))
    loss = FeatureNormalised(tau=tau).loss(student, the_target(), None, NO_ADAPTERS)
    value = oracles()[expected] if isinstance(expected, str) else expected
    assert loss.item() == pytest.approx(value, abs=1e-6)


def random_classified(seed: int, width: int, scale: float) -> View:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, width, generator=generator, dtype=torch.float64)
    bias = torch.randn(3, generator=generator, dtype=torch.float64)
    return classified(random_embedding(6, width, seed, scale), weight, bias)


def normalised_slowly(view, tau):
    rows = []
    weight, bias = view.network.classifier.weight.tolist(), view.network.classifier.bias.tolist()
    for f in view.embedding.tolist():
        length = math.hypot(*f)
        f = [x * min(length, tau) / length for x in f]
        z = [sum(w * x for w, x in zip(row, f, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
        total = sum(math.exp(x) for x in z)
        rows.append([math.exp(x) / total for x in z])
    return rows


def test_both_networks_are_shortened_and_classified_with_weights_and_bias_of_their_own():
    student, teacher = random_classified(0, 4, 1.0), random_classified(1, 5, 1.2)
    lengths = torch.cat([student.embedding.norm(dim=1), teacher.embedding.norm(dim=1)])
    assert lengths.min() < 2 < lengths.max()
    p, q = normalised_slowly(teacher, 2.0), normalised_slowly(student, 2.0)
    expected = -sum(a * math.log(b) for one, other in zip(p, q, strict=True) for a, b in zip(one, other, strict=True))
    loss = FeatureNormalised().loss(student, teacher, None, NO_ADAPTERS)
    assert loss.item() == pytest.approx(expected / 6, rel=1e-10)


def test_only_what_exceeds_the_length_is_cut():
    student, teacher = random_classified(0, 4, 1.0), random_classified(1, 4, 9.0)
    method = FeatureNormalised(tau=2.0)
    assert teacher.embedding.norm(dim=1).min() > 2
    longer = teacher._replace(embedding=3 * teacher.embedding)
    torch.testing.assert_close(method.normalised_logits(longer), method.normalised_logits(teacher))
    within = student._replace(embedding=student.embedding / 10)
    torch.testing.assert_close(
        method.normalised_logits(within), within.network.classifier(within.embedding), rtol=0, atol=0
    )


def test_gradient_goes_through_length_and_cut_and_the_students_classifier_but_not_to_the_teacher():
    student, teacher = random_classified(0, 4, 1.5), random_classified(1, 4, 1.5)
    method = FeatureNormalised()
    f = student.embedding.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: method.loss(student._replace(embedding=f), teacher, None, NO_ADAPTERS), f)
    scheme = make_scheme("feature_normalised")
    (phase,) = scheme.phases()
    (turn,) = scheme.turns(phase)
    terms = scheme.losses(phase, turn, batch_of(), None).terms
    terms["kd"].backward()
    classifier = scheme.student.classifier
    assert classifier.weight.grad.any() and classifier.bias.grad.any() and scheme.student.stem.layers.weight.grad.any()
    (expert,) = scheme._teacher
    assert expert.classifier.weight.grad is None


def test_labels_are_learned_on_the_ordinary_logits():
    student, teacher = random_classified(0, 4, 3.0), random_classified(1, 4, 3.0)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    terms = FeatureNormalised().objective(student, teacher, labels, NO_ADAPTERS)
    plain = -student.logits.log_softmax(dim=1)[torch.arange(6), labels].mean()
    assert terms["ce"].item() == pytest.approx(plain.item())
    loss = FeatureNormalised().loss(student, teacher, labels, NO_ADAPTERS)
    assert terms["kd"].item() == pytest.approx(9 * loss.item())
    assert FeatureNormalised().predict(student, NO_ADAPTERS) is student.logits


def test_an_embedding_of_zeros_has_a_finite_gradient():
    student = random_classified(0, 4, 1.0)
    f = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    loss = FeatureNormalised().loss(student._replace(embedding=f), random_classified(1, 4, 1.0), None, NO_ADAPTERS)
    loss.backward()
    assert loss.isfinite() and f.grad.isfinite().all() and f.grad.any()


# wrong use


@pytest.mark.parametrize("method", [ClassDistance(), FeatureNormalised(), ClassDistanceTeacher()], ids=repr)
def test_networks_without_an_embedding_are_refused(method):
    with pytest.raises(ValueError, match="the student shows no embedding"):
        method.adapters(View(torch.zeros(2, 3)), seeing(random_embedding(2, 3)))


@pytest.mark.parametrize("bare", [0, 1], ids=["student", "teacher"])
def test_networks_without_a_classifier_cannot_be_normalised(bare):
    views = [random_classified(0, 4, 1.0), random_classified(1, 4, 1.0)]
    views[bare] = views[bare]._replace(network=nn.Identity())
    with pytest.raises(ValueError, match="networks that end in a `classifier`"):
        FeatureNormalised().adapters(*views)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (ClassDistance, "kd_weight", -1.0),
        (ClassDistanceTeacher, "margin", 0.0),
        (ClassDistanceTeacher, "momentum", 1.0),
        (ClassDistanceTeacher, "momentum", -0.1),
        (FeatureNormalised, "tau", 0.0),
    ],
)
def test_a_bad_hyperparameter_is_named(kind, field, value):
    with pytest.raises(ValueError, match=rf"{field} must be .* not {value!r}"):
        kind(**{field: value})


def test_networks_of_unequal_width_train_to_the_end():
    torch.manual_seed(0)
    teacher = network("wrn_10_0.5", torch.float64)
    toy_run(Alone(teacher, ClassDistanceTeacher(), batch_of(16)), epochs=8).run()
    for method in (ClassDistance(), FeatureNormalised()):
        scheme = Offline(network("wrn_10_0.25", torch.float64), teacher, method, batch_of(16))
        history = toy_run(scheme, epochs=8).run()
        assert history[-1]["ce"] < history[0]["ce"] and history[-1]["kd"] < history[0]["kd"]
