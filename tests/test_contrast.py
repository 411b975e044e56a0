"""Contrastive losses against reference values and slow loops, and what banks, constant and negatives promise."""

import math

import pytest
import torch
import torch.nn.functional as F
from batches import TOLERANCE, oracles
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdstudy.contrast import CRD, Bank, InBatchCRD, Negatives
from kdstudy.core import View
from kdstudy.data import ImageBank
from kdstudy.models import build_model
from kdstudy.recipe import Recipe
from kdstudy.schemes import Batch, Offline
from kdstudy.stopping import Stopped
from kdstudy.train import Surroundings, Training

precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
V_S, V_T = [[1.0, 2.0], [2.0, -1.0]], [[1.0, 0.0], [1.0, 3.0]]
M_S = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 1.0]]
M_T = [[1.0, 1.0], [0.0, -1.0], [-1.0, 1.0], [1.0, 0.0]]
LABELS = torch.tensor([0, 1])  # of images 0 and 1; the draws below are the reference's
DRAWN = torch.tensor([[1, 2], [3, 0]])


class Drawn(Negatives):
    """Negatives that somebody else has drawn."""

    def __init__(self, drawn: Tensor):
        nn.Module.__init__(self)
        self.drawn = drawn

    def draw(self, labels: Tensor) -> Tensor:
        return self.drawn


def hand_sized(dtype: torch.dtype = torch.float64) -> tuple[View, View, nn.ModuleDict]:
    """The reference's vectors as embeddings, and adapters that leave them as they are."""
    student, teacher = (
        View(torch.zeros(2, 2), embedding=torch.tensor(v, dtype=dtype), indices=torch.arange(2)) for v in (V_S, V_T)
    )
    banks = {name: Bank(4, 2) for name in ("student_bank", "teacher_bank")}
    for bank, rows in zip(banks.values(), (M_S, M_T), strict=True):
        bank.rows.copy_(F.normalize(torch.tensor(rows), dim=1))
    embedders = {f"{side}_embedder": nn.Identity() for side in ("student", "teacher")}
    adapters = nn.ModuleDict({**embedders, **banks, "negatives": Drawn(DRAWN)}).to(dtype)
    for bank, rows in zip(banks.values(), (M_S, M_T), strict=True):
        bank.rows.copy_(F.normalize(torch.tensor(rows, dtype=dtype), dim=1))
    return student, teacher, adapters


def oracle_of(key: str) -> float:
    return pytest.approx(oracles()[f"g_crd_{key}"], abs=1e-6)


@precisions
def test_loss_is_the_oracles(dtype):
    student, teacher, adapters = hand_sized(dtype)
    loss = CRD(temperature=0.5).loss(student, teacher, LABELS, adapters)
    assert loss.dtype == dtype and loss.shape == ()
    assert loss.item() == pytest.approx(oracles()["g_crd_loss_logform"], abs=TOLERANCE[dtype])
    assert loss.item() == pytest.approx(oracles()["g_crd_loss"], abs=1e-5 + TOLERANCE[dtype])


def test_each_side_scores_against_the_others_bank_with_its_own_constant():
    student, teacher, adapters = hand_sized()
    CRD(temperature=0.5).loss(student, teacher, LABELS, adapters)
    # Z_s is the constant of the student's scores, which are taken against the teacher's bank
    assert adapters["teacher_bank"].log_z.exp().item() == oracle_of("Z_s")
    assert adapters["student_bank"].log_z.exp().item() == oracle_of("Z_t")


def test_banks_move_after_the_scores_to_length_one_and_only_where_the_batch_is():
    student, teacher, adapters = hand_sized()
    before = adapters["student_bank"].rows.clone()
    CRD(temperature=0.5).loss(student, teacher, LABELS, adapters)
    after = adapters["student_bank"].rows
    expected = torch.tensor(oracles()["g_crd_mem_s_after"], dtype=torch.float64)
    torch.testing.assert_close(after[:2], expected, atol=1e-9, rtol=0)
    assert torch.equal(after[2:], before[2:])
    torch.testing.assert_close(adapters["teacher_bank"].rows.norm(dim=1), torch.ones(4, dtype=torch.float64))


def test_momentum_weighs_the_old_row():
    student, teacher, adapters = hand_sized()
    method = CRD(temperature=0.5, momentum=0.9)
    old = adapters["teacher_bank"].rows[1].clone()
    method.loss(student, teacher, LABELS, adapters)
    moved = 0.9 * old + 0.1 * F.normalize(teacher.embedding[1], dim=0)
    torch.testing.assert_close(adapters["teacher_bank"].rows[1], moved / moved.norm())


@precisions
def test_in_batch_loss_is_the_oracle(dtype):
    student, teacher, adapters = hand_sized(dtype)
    loss = InBatchCRD(temperature=0.5).loss(student, teacher, LABELS, adapters)
    assert loss.dtype == dtype and loss.shape == ()
    assert loss.item() == pytest.approx(oracles()["g_crd_inbatch_infonce_T.5"], abs=TOLERANCE[dtype])


def test_in_batch_loss_is_twice_log_b_where_nothing_tells_images_apart():
    view = View(torch.zeros(6, 2), embedding=torch.ones(6, 3, dtype=torch.float64))
    adapters = nn.ModuleDict({f"{side}_embedder": nn.Identity() for side in ("student", "teacher")})
    loss = InBatchCRD().loss(view, view, torch.zeros(6, dtype=torch.int64), adapters)
    assert loss.item() == pytest.approx(2 * math.log(6))


def sized(
    method, images: int = 40, classes: int = 4, batch: int = 8, dimensions: tuple[int, int] = (5, 7)
) -> tuple[View, View, Tensor, nn.ModuleDict]:
    """Random embeddings of a batch that is strewn over the data set, and the method's own adapters, in float64."""
    torch.manual_seed(0)
    census = torch.arange(images) % classes
    indices = torch.randperm(images)[:batch]
    views = [
        View(
            torch.randn(batch, classes),
            embedding=torch.randn(batch, dimension, dtype=torch.float64).requires_grad_(),
            indices=indices,
            census=census,
        )
        for dimension in dimensions
    ]
    adapters = method.adapters(*views).double()
    return *(view._replace(census=None) for view in views), census[indices], adapters


def slow_loss(method: CRD, student: View, teacher: View, adapters: nn.ModuleDict, chosen: list[list[int]]) -> Tensor:
    """Both sides from the gathered rows, with the quotients and the constant as the formula has them."""
    total = 0.0
    sides = (("student", student, "teacher_bank"), ("teacher", teacher, "student_bank"))
    for side, view, name in sides:
        rows = adapters[name].rows.clone()
        n, k = len(rows), len(chosen[0]) - 1
        exponentials = []
        for embedding, own in zip(view.embedding, chosen, strict=True):
            v = adapters[f"{side}_embedder"](embedding)
            v = v / v.square().sum().sqrt()
            exponentials.append([torch.exp((rows[j] * v).sum() / method.temperature) for j in own])
        z = n * sum(x.detach() for line in exponentials for x in line) / (len(chosen) * (k + 1))
        c = k / n
        for first, *others in exponentials:
            a = first / z
            total = total - torch.log(a / (a + c)) / len(chosen)
            for other in others:
                total = total - torch.log(c / (other / z + c)) / len(chosen)
    return total


def test_the_bounded_form_equals_the_gathered_one_in_value_and_gradient():
    method = CRD(negatives=11, dimension=6)
    student, teacher, labels, adapters = sized(method)
    adapters.eval()  # so that nothing moves between the two
    torch.manual_seed(3)
    drawn = adapters["negatives"].draw(labels)
    chosen = torch.cat([student.indices.unsqueeze(1), drawn], dim=1).tolist()
    leaves = [student.embedding, teacher.embedding, *adapters.parameters()]
    slow = slow_loss(method, student, teacher, adapters, chosen)
    expected = torch.autograd.grad(slow, leaves)
    torch.manual_seed(3)
    loss = method.loss(student, teacher, labels, adapters)
    torch.testing.assert_close(loss, slow, rtol=1e-11, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), expected)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        output = operation(*arguments, **keywords or {})
        made = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *made])
        return output


def test_no_tensor_of_the_size_of_the_published_gather_is_ever_made():
    method = CRD(negatives=300, dimension=16)
    student, teacher, labels, adapters = sized(method, images=500, batch=32)
    with Largest() as largest:
        method.loss(student, teacher, labels, adapters).backward()
    assert 32 * 301 * 16 > 9 * largest.elements
    assert largest.elements == 32 * 500


def test_negatives_are_of_other_classes_and_never_the_same_twice():
    torch.manual_seed(0)
    census = torch.randint(5, (200,))
    labels = census[:64]
    drawn = Negatives(census, 90).draw(labels)
    assert drawn.shape == (64, 90)
    assert not (census[drawn] == labels.unsqueeze(1)).any()
    assert all(len(set(row)) == 90 for row in drawn.tolist())


def test_negatives_are_uniform_over_the_images_of_other_classes():
    torch.manual_seed(0)
    census = torch.tensor([0] * 2 + [1] * 3 + [2] * 5)
    drawn = Negatives(census, 4).draw(torch.zeros(20_000, dtype=torch.int64))
    shares = drawn.flatten().bincount(minlength=10) / 20_000
    assert shares[:2].count_nonzero() == 0
    torch.testing.assert_close(shares[2:], torch.full((8,), 0.5), atol=0.02, rtol=0)


def test_negatives_are_drawn_on_the_device_for_the_whole_batch_at_once():
    """One draw of random numbers, whatever the batch: none per image, none on the host."""
    draws = []

    class Draws(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
            if operation.overloadpacket.__name__ in ("rand", "randperm", "randint", "multinomial", "uniform_"):
                draws.append((operation.overloadpacket.__name__, (keywords or {}).get("device")))
            return operation(*arguments, **keywords or {})

    method = CRD(negatives=20)
    student, teacher, labels, adapters = sized(method, batch=16)
    with Draws():
        method.loss(student, teacher, labels, adapters)
    assert draws == [("rand", labels.device)]


def test_there_are_at_most_as_many_negatives_as_the_largest_class_leaves():
    census = torch.tensor([0] * 7 + [1] * 2 + [2])
    negatives = Negatives(census, 16384)
    assert negatives.count == 3
    assert set(negatives.draw(torch.tensor([0]))[0].tolist()) == {7, 8, 9}
    # c goes with the number there is: for scores of 1 / Z each, Z = N, so log a = -log N
    method, (student, teacher, adapters) = CRD(temperature=1e9), hand_sized()
    expected = 2 * (math.log1p(2) + 2 * math.log1p(1 / 2))
    assert method.loss(student, teacher, LABELS, adapters).item() == pytest.approx(expected, abs=1e-6)


def test_the_constant_is_that_of_the_first_batch_in_train_mode_for_ever():
    method = CRD(negatives=11, dimension=6)
    student, teacher, labels, adapters = sized(method)
    bank = adapters["teacher_bank"]
    adapters.eval()
    method.loss(student, teacher, labels, adapters)
    assert bank.log_z.isnan()
    adapters.train()
    method.loss(student, teacher, labels, adapters)
    first = bank.log_z.clone()
    assert first.isfinite()
    for _ in range(3):
        method.loss(student, teacher, labels, adapters)
        assert torch.equal(bank.log_z, first)
    # and it is used: a constant of another size moves the loss
    adapters.eval()
    torch.manual_seed(1)
    usual = method.loss(student, teacher, labels, adapters)
    bank.log_z += 1.0
    torch.manual_seed(1)
    assert method.loss(student, teacher, labels, adapters) != usual


def test_banks_stay_in_eval_mode():
    method = CRD(negatives=11, dimension=6)
    student, teacher, labels, adapters = sized(method)
    before = {name: tensor.clone() for name, tensor in adapters.eval().state_dict().items()}
    method.loss(student, teacher, labels, adapters)
    for name, tensor in adapters.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def test_both_embedders_learn_and_banks_do_not():
    method = CRD(negatives=11, dimension=6)
    student, teacher, labels, adapters = sized(method)
    assert {name.split(".")[0] for name, _ in adapters.named_parameters()} == {"student_embedder", "teacher_embedder"}
    method.loss(student, teacher, labels, adapters).backward()
    assert all(parameter.grad.any() for parameter in adapters.parameters())
    assert not any(bank.rows.requires_grad for bank in (adapters["student_bank"], adapters["teacher_bank"]))


def test_banks_start_uniform_with_a_mean_squared_length_of_one():
    torch.manual_seed(0)
    rows = Bank(2000, 128).rows
    assert rows.abs().max().item() == pytest.approx((128 / 3) ** -0.5, rel=1e-4)
    assert rows.square().sum(dim=1).mean().item() == pytest.approx(1, abs=0.01)


def test_scores_stay_finite_in_float32_at_the_default_temperature():
    method = CRD()
    student, teacher, labels, adapters = sized(method)
    student, teacher = (view._replace(embedding=1e4 * view.embedding.detach().float()) for view in (student, teacher))
    adapters.float()
    adapters["teacher_bank"].rows.fill_(128**-0.5)
    loss = method.loss(student, teacher, labels, adapters)
    assert loss.dtype == torch.float32 and loss.isfinite()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("negatives", 0, "negatives must be a whole number of at least 1"),
        ("negatives", 100.5, "negatives must be a whole number of at least 1, not 100.5"),
        ("temperature", 0.0, "temperature must be a finite number above 0"),
        ("dimension", -1, "dimension must be a whole number of at least 1"),
        ("momentum", -0.1, "momentum must be a finite number of at least 0"),
        ("momentum", 1.0, "momentum must be below 1, not 1.0: the banks would never change"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        CRD(**{field: value})
    if field in ("temperature", "dimension"):
        with pytest.raises(ValueError, match=message):
            InBatchCRD(**{field: value})


@pytest.mark.parametrize("method", [CRD(), InBatchCRD()], ids=["crd", "in batch"])
def test_networks_without_an_embedding_are_refused(method):
    shown = View(torch.zeros(3, 2), embedding=torch.zeros(3, 4), census=torch.arange(6) % 2)
    for student, teacher, side in (
        (shown._replace(embedding=None), shown, "student"),
        (shown, View(shown.logits), "teacher"),
    ):
        with pytest.raises(ValueError, match=f"the {side} shows no embedding"):
            method.adapters(student, teacher)


def test_a_data_set_that_leaves_nothing_to_tell_apart_is_refused():
    view = View(torch.zeros(3, 2), embedding=torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"labels of all training images \(the tap `census`\)"):
        CRD().adapters(view, view)
    with pytest.raises(ValueError, match="training images of at least two classes"):
        CRD().adapters(view._replace(census=torch.ones(9, dtype=torch.int64)), view)


def toy_training(method, folder, stop_after: int | None = None) -> Training:
    """Two small networks on 30 images that differ by class, in batches of 8 with an odd last one of 6."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(30) % 3
    pictures = torch.randint(0, 100, (30, 8, 8, 1), generator=generator)
    pictures[torch.arange(30), labels * 2] += 120
    bank = ImageBank(
        *(pictures.to(torch.uint8).numpy(), labels.numpy()),
        **{"mean": [80.0], "std": [60.0], "padding": 1, "device": torch.device("cpu"), "dtype": torch.float64},
    )
    torch.manual_seed(0)
    networks = [build_model(name, classes=3, channels=1, image_size=8).double() for name in ("wrn_10_0.25", "resnet8")]
    sample = Batch(next(bank.plain(8)), bank.labels[:8], torch.arange(8), census=bank.labels)
    steps = iter(range(1, 1000))
    done = []
    surroundings = Surroundings(
        checkpoint=folder / "checkpoint.pt",
        on_step=lambda epochs, text: done.append(next(steps)),
        should_stop=lambda: done[-1] == stop_after,
    )
    recipe = Recipe(epochs=8, batch=8, learning_rate=0.05, crop_padding=1, precision="fp64")
    return Training(Offline(*networks, method, sample), recipe, bank, seed=1, watch={}, surroundings=surroundings)


@pytest.mark.parametrize("method", [CRD(dimension=8), InBatchCRD(dimension=8)], ids=["crd", "in batch"])
def test_training_lowers_the_loss_and_resumes_exactly(method, tmp_path):
    whole = toy_training(method, tmp_path / "whole")
    history = whole.run()
    assert history[-1]["kd"] < 0.8 * history[0]["kd"]
    folder = tmp_path / "stopped"
    for stop in (2, 19):
        with pytest.raises(Stopped):
            toy_training(method, folder, stop).run()
    resumed = toy_training(method, folder)
    assert resumed.run() == history
    for name, tensor in whole.scheme.state_dict().items():
        assert torch.equal(tensor, resumed.scheme.state_dict()[name]), name
