"""Collaborative teaching: its terms by hand, and two networks that learn side by side without touching each other."""

import pytest
import torch
import torch.nn.functional as F
from batches import STUDENT_A, TEACHER_A, oracles
from test_methods import batch_of, make_scheme, network, toy_bank, trained_network
from torch import nn
from toy import make_recipe, run_session, tiny_net, tiny_teacher
from toy import make_scheme as offline_scheme

from kdstudy.collaborative import CollaborativeTeaching
from kdstudy.core import View
from kdstudy.models import count_parameters
from kdstudy.recipe import Recipe
from kdstudy.response import CrossEntropy
from kdstudy.schemes import Alone, Collaborative
from kdstudy.train import Training

NO_ADAPTERS = nn.ModuleDict()
MAPS = [[[[1.0, 2], [0, 1]], [[0, 1], [2, 1]]]], [[[[2.0, 0], [1, 1]], [[1, 1], [0, 3]]]]  # of student and expert


def views_by_hand() -> tuple[View, View]:
    """Batch A with its teacher as the scratch teacher, and the same maps in both samples and in two stages."""
    student_maps, expert_maps = ((torch.tensor(x, dtype=torch.float64).repeat(2, 1, 1, 1),) * 2 for x in MAPS)
    z_s, z_scratch = (torch.tensor(z, dtype=torch.float64) for z in (STUDENT_A, TEACHER_A))
    useless = torch.full_like(z_s, float("nan"))  # the expert's logits are not read
    return View(z_s, maps=student_maps), View(useless, maps=expert_maps, members=(View(z_scratch),))


def test_the_terms_are_the_oracles_with_squares_summed_over_classes_and_stages():
    student, teacher = views_by_hand()
    terms = CollaborativeTeaching().objective(student, teacher, torch.tensor([0, 0]), NO_ADAPTERS)
    squares = [
        sum((a - b) ** 2 for a, b in zip(one, other, strict=True))
        for one, other in zip(STUDENT_A, TEACHER_A, strict=True)
    ]
    assert list(terms) == ["ce", "kd", "attention"]
    assert terms["ce"].item() == pytest.approx(oracles()["ce"])
    assert terms["kd"].item() == pytest.approx(0.03 * sum(squares) / 2)
    assert terms["attention"].item() == pytest.approx(1000 / 2 * 2 * oracles()["at_sump2_mean"])


def test_a_weight_of_zero_leaves_its_term_out():
    student, teacher = views_by_hand()
    labels = torch.tensor([0, 0])
    method = CollaborativeTeaching(attention_weight=0.0)
    assert list(method.objective(student, teacher, labels, NO_ADAPTERS)) == ["ce", "kd"]
    method = CollaborativeTeaching(kd_weight=0.0)
    alone = teacher._replace(members=())
    assert list(method.objective(student, alone, labels, NO_ADAPTERS)) == ["ce", "attention"]


def terms_of(scheme, batch=None):
    (phase,) = scheme.phases()
    (turn,) = scheme.turns(phase)
    scheme.set_modes(phase)
    return scheme.losses(phase, turn, batch or batch_of(), None).terms


def moved_by(scheme, term) -> set[str]:
    """The modules of the scheme that a term's gradient reaches; the teacher counts as "expert"."""
    scheme.zero_grad(set_to_none=True)
    terms_of(scheme)[term].backward()
    (expert,) = scheme._teacher
    names = [(name.split(".")[0], p) for name, p in scheme.named_parameters()]
    names += [("expert", p) for p in expert.parameters()]
    return {name for name, p in names if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize(
    ("term", "network_moved"), [("ce", "student"), ("kd", "student"), ("attention", "student"), ("scratch", "scratch")]
)
def test_each_loss_moves_its_own_network_and_no_other(term, network_moved):
    assert moved_by(make_scheme("collaborative_teaching"), term) == {network_moved}


def test_every_weight_of_the_scratch_teacher_learns():
    scheme = make_scheme("collaborative_teaching")
    terms_of(scheme)["scratch"].backward()
    assert all(p.grad.any() for p in scheme.scratch.parameters())
    assert all(p.requires_grad for p in scheme.scratch.parameters())


def test_the_scratch_teacher_has_the_experts_architecture_and_new_weights():
    scheme = make_scheme("collaborative_teaching")
    (expert,) = scheme._teacher
    new, old = scheme.scratch.state_dict(), expert.state_dict()
    assert {name: x.shape for name, x in new.items()} == {name: x.shape for name, x in old.items()}
    for name, x in new.items():
        if "running_var" in name or x.ndim > 1:
            assert not torch.equal(x, old[name]), name
        if "running_mean" in name or "num_batches" in name:
            assert not x.any(), name
    assert not any(p.requires_grad for p in expert.parameters())


def test_the_scratch_teacher_is_drawn_from_the_runs_seed():
    def scratch(seed):
        torch.manual_seed(seed)
        student, expert = network("wrn_10_0.25", torch.float64), network("wrn_10_0.5", torch.float64)
        scheme = Collaborative(student, expert, CollaborativeTeaching(), batch_of(16))
        return scheme.scratch.classifier.weight

    assert torch.equal(scratch(0), scratch(0)) and not torch.equal(scratch(0), scratch(1))


def test_student_and_scratch_teacher_are_in_train_mode_and_the_expert_is_not():
    scheme = make_scheme("collaborative_teaching")
    terms_of(scheme)
    (expert,) = scheme._teacher
    assert scheme.student.training and scheme.scratch.training and not expert.training
    assert any(name.startswith("scratch") for name in scheme.state_dict())


def test_the_student_follows_the_logits_of_the_moment():
    scheme, batch = make_scheme("collaborative_teaching"), batch_of()
    with torch.no_grad():
        student, scratch = scheme.student.train()(batch.images), scheme.scratch.train()(batch.images)
    expected = 0.03 * (student.logits - scratch.logits).square().sum(dim=1).mean()
    assert terms_of(scheme, batch)["kd"].item() == pytest.approx(expected.item())
    label_loss = F.cross_entropy(scratch.logits, batch.labels)
    assert terms_of(scheme, batch)["scratch"].item() == pytest.approx(label_loss.item())


def toy_run(scheme, epochs=3):
    recipe = Recipe(epochs=epochs, batch=16, learning_rate=0.05, crop_padding=1, precision="fp64")
    return Training(scheme, recipe, toy_bank(50), seed=4, watch={}).run()


def test_the_scratch_teacher_learns_as_if_it_were_alone():
    scheme = make_scheme("collaborative_teaching")
    twin = network("wrn_10_0.5", torch.float64)
    twin.load_state_dict(scheme.scratch.state_dict())
    history = toy_run(scheme)
    alone = toy_run(Alone(twin, CrossEntropy(), batch_of(16)))
    assert [row["scratch"] for row in history] == [row["ce"] for row in alone]
    assert all(torch.equal(x, twin.state_dict()[name]) for name, x in scheme.scratch.state_dict().items())


def test_the_student_learns_to_follow_both_teachers():
    torch.manual_seed(0)
    expert = network("wrn_10_0.5", torch.float64)
    toy_run(Alone(expert, CrossEntropy(), batch_of(16)), epochs=8)
    before = {name: x.clone() for name, x in expert.state_dict().items()}
    scheme = Collaborative(network("wrn_10_0.25", torch.float64), expert, CollaborativeTeaching(), batch_of(16))
    history = toy_run(scheme, epochs=8)
    for name in ("ce", "attention", "scratch"):
        assert history[-1][name] < history[0][name], name
    assert all(torch.equal(x, before[name]) for name, x in expert.state_dict().items())


def test_only_the_student_is_deployed():
    scheme = make_scheme("collaborative_teaching")
    assert scheme.deployed is scheme.student
    assert count_parameters(scheme.deployed) == count_parameters(network("wrn_10_0.25", torch.float64))


def test_a_run_that_is_stopped_goes_on_with_the_same_scratch_teacher(tmp_path):
    def session(**options):
        torch.manual_seed(0)
        student, expert = tiny_net(0), tiny_teacher()
        sample = batch_of_colour()
        scheme = Collaborative(student, expert, CollaborativeTeaching(), sample)
        return run_session(scheme, make_recipe(), **options)

    whole = session()
    checkpoint = tmp_path / "checkpoint.pt"
    assert session(checkpoint=checkpoint, stop_after=5).stopped
    second = session(checkpoint=checkpoint)
    assert second.history == whole.history and "scratch.layer.weight" in whole.state
    assert all(torch.equal(second.state[name], x) for name, x in whole.state.items())


def batch_of_colour():
    batch = batch_of(8)
    return batch._replace(images=batch.images.repeat(1, 3, 1, 1), labels=batch.labels % 3)


# wrong use


def test_the_method_is_refused_where_no_scratch_teacher_learns():
    scheme = offline_scheme(CollaborativeTeaching())
    (phase,) = scheme.phases()
    (turn,) = scheme.turns(phase)
    with pytest.raises(ValueError, match="needs a scratch teacher: train it under the collaborative scheme"):
        scheme.losses(phase, turn, batch_of_colour(), None)


def test_networks_whose_stages_do_not_pair_up_are_refused():
    expert = trained_network("resnet18", torch.float64)
    with pytest.raises(ValueError, match="equally many stages"):
        Collaborative(network("wrn_10_0.25", torch.float64), expert, CollaborativeTeaching(), batch_of(4))


@pytest.mark.parametrize("field", ["ce_weight", "kd_weight", "attention_weight"])
def test_a_bad_weight_is_named(field):
    with pytest.raises(ValueError, match=rf"{field} must be .* not -1.0"):
        CollaborativeTeaching(**{field: -1.0})
