"""Relations shown of trained networks are those that the networks have, held against their own teachers."""

import math

import numpy as np
import pytest
import torch
from staged import study

from kdstudy import answers, lesson, relations
from kdstudy.core import View
from kdstudy.image_set import ImageSet
from kdstudy.results import Ledger
from kdstudy.study import RunSpec

CPU = torch.device("cpu")
METHODS = {"response": {"ce": {}, "kd": {}}, "relation": {"fsp": {}, "similarity": {}}}


@pytest.fixture(scope="module")
def ledger(tmp_path_factory) -> Ledger:
    """Teachers and CE students of two seeds, similarity preserving of the second alone, FSP of the first."""
    with study(tmp_path_factory.mktemp("study"), "resnet14x0.25", "resnet8x0.25", METHODS) as executor:
        executor.make_chosen("response", ["ce"])
        executor.make_chosen("relation", ["similarity"], seeds=[1])
        executor.make_chosen("relation", ["fsp"], seeds=[0])
        yield executor.ledger


def all_runs(ledger: Ledger) -> list[RunSpec]:
    return [spec for stage in ("response", "relation") for spec in ledger.runs("mine", stage)]


INDEX = np.array([4, 1, 29])


@pytest.fixture
def seen(ledger) -> dict[str, View]:
    return relations.views(ledger, all_runs(ledger), INDEX, CPU)


def test_images_stand_class_by_class_and_classes_are_spread_over_all():
    parts = ([np.zeros((n, 4, 4, 1), np.uint8), np.arange(n) % classes] for n, classes in ((7, 3), (99, 33)))
    few, many = (ImageSet("mine", *part, *part) for part in parts)
    assert relations.by_class(few, each=2).tolist() == [0, 3, 1, 4, 2, 5]
    assert relations.by_class(many, classes=3, each=2).tolist() == [0, 33, 16, 49, 32, 65]


def test_views_are_those_of_finished_runs_and_their_teachers_for_the_images_asked_for(ledger, seen):
    made = [spec for spec in all_runs(ledger) if ledger.store.record(spec)]
    assert len(made) == 4
    assert seen.keys() == {spec.id for spec in made} | {spec.teacher.id for spec in made}
    for spec in made:
        network, data = answers.trained(ledger, spec, CPU)
        with torch.no_grad():
            view = network(next(data.watched(0, spec.recipe)["test"].plain(30)))
        torch.testing.assert_close(seen[spec.id].embedding.float(), view.embedding[INDEX])
        assert seen[spec.id].maps[0].dtype == torch.float64


def test_students_are_set_beside_the_teacher_of_their_own_seed(ledger, seen):
    runs = all_runs(ledger)
    ids = {(spec.row, spec.seed): spec for spec in runs}
    for row, seed in (("similarity", 1), ("fsp", 0)):
        shown = relations.side_by_side(runs, seen, ("ce", row))
        wanted = {"teacher": ids[row, seed].teacher, "ce": ids["ce", seed], row: ids[row, seed]}
        assert list(shown) == list(wanted)
        assert all(shown[name] is seen[spec.id] for name, spec in wanted.items())
    assert relations.side_by_side(runs, seen, ("fsp", "similarity")) == {}


def test_closeness_is_to_the_own_teacher_and_zero_for_the_teacher_itself(ledger, seen):
    runs = all_runs(ledger)
    found = relations.closeness(runs, seen).set_index(["method", "seed"])
    assert sorted(found.index) == [("ce", 0), ("ce", 1), ("fsp", 0), ("similarity", 1)]
    assert (found > 0).all(axis=None)
    as_taught = seen | {spec.id: seen[spec.teacher.id] for spec in runs if spec.id in seen}
    assert (relations.closeness(runs, as_taught)[["maps", "distances", "cosines", "flows"]] == 0).all(axis=None)


def test_the_gap_of_images_leaves_out_what_an_image_is_to_itself():
    one, other = torch.tensor([[9.0, 1.0], [2.0, 9.0]]), torch.tensor([[0.0, 4.0], [6.0, 0.0]])
    assert relations.image_gap(one, other) == pytest.approx(math.sqrt((9 + 16) / 2))


def flowing(value: float, width: int = 2) -> View:
    return View(torch.zeros(1, 2), stem=torch.full((1, width, 2, 2), value), maps=(torch.ones(1, 1, 2, 2),))


def test_the_gap_of_flows_is_a_share_of_the_teachers_and_unknown_between_unequal_widths():
    assert relations.flow_gap(flowing(3.0), flowing(2.0)) == pytest.approx(0.5)
    assert math.isnan(relations.flow_gap(flowing(1.0, width=3), flowing(2.0)))


def test_no_loss_on_relations_sees_a_turned_and_stretched_teacher_and_some_see_a_shift():
    teacher, student = relations.example()
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double()
    students = {"other": student, "turned": 2 * teacher @ turn, "moved": teacher + 1}
    lines = lesson.blindness_table(teacher, students).data.splitlines()[2:]
    table = {cells[1].strip(): [float(cell) for cell in cells[2:5]] for cells in (line.split("|") for line in lines)}
    assert table.pop("squared distance") == pytest.approx([4 / 3, 250 / 3, 2], abs=1e-4)
    assert all(other > 0 and turned == 0 for other, turned, _ in table.values())
    blind = {name for name, (*_, moved) in table.items() if moved == 0}
    assert blind == {"relational: distances", "relational: angles", "instance graph: edges"}
