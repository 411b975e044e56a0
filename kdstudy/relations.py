"""How trained networks relate the same test images, and what flows between their layers, beside their teachers."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from kdstudy.answers import load_trained
from kdstudy.core import View
from kdstudy.device import DataOnDevice, data_path
from kdstudy.image_set import ImageSet, read_image_set
from kdstudy.layers import flows
from kdstudy.results import Ledger
from kdstudy.samples import cosines, relative_distances, similarities
from kdstudy.study import RunSpec

CLOSENESS_COLUMNS = ("method", "seed", "maps", "distances", "cosines", "flows")


def example() -> tuple[Tensor, Tensor]:
    """Three images as points in the plane, of the teacher and of the student: (3, 2) each, whole numbers."""
    teacher = torch.tensor([[3, 4], [3, 0], [0, 4]], dtype=torch.float64)
    student = torch.tensor([[4, 3], [4, 0], [0, 3]], dtype=torch.float64)
    return teacher, student


def view_of(points: Tensor) -> View:
    """A network that shows these points (B, D) as its logits, its embedding and, in one pixel, its last two maps."""
    stage_map = points[:, :, None, None]
    return View(points, maps=(stage_map, stage_map), embedding=points)


def by_class(images: ImageSet, classes: int = 10, each: int = 10) -> np.ndarray:
    """Indices of the first `each` test images of up to `classes` classes, spread evenly over all, class by class."""
    return np.concatenate([np.flatnonzero(images.y_test == c)[:each] for c in spread(images.classes, classes)])


def spread(classes: int, count: int) -> np.ndarray:
    """Up to `count` of so many classes, spread evenly over all, in their order."""
    return np.unique(np.linspace(0, classes - 1, count).round().astype(int))


# the fastest algorithm may be another one each time, and the last bits of the maps with it
@torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
@torch.no_grad()
def views(ledger: Ledger, specs: Iterable[RunSpec], index: np.ndarray, device: torch.device) -> dict[str, View]:
    """By run id, what finished runs of one setting and their teachers show of these test images.

    Stem, maps and embedding, in float64 on the CPU. Raises FileNotFoundError for weights that are not on this machine.
    """
    finished = [spec for spec in specs if (ledger.store.record(spec) or {}).get("status") == "finished"]
    wanted = {spec.id: spec for each in finished for spec in (each.teacher, each)}
    seen = {}
    for run, spec in wanted.items():
        if not seen:
            data = DataOnDevice(read_image_set(data_path(spec.dataset)), device)
        images = torch.cat(list(data.watched(0, spec.recipe)["test"].plain(500)))[torch.from_numpy(index)]
        view = load_trained(ledger, spec, data)(images)
        seen[run] = view.only(("stem", "maps", "embedding")).map(lambda tap: tap.double().cpu())
    return seen


def side_by_side(specs: Iterable[RunSpec], seen: Mapping[str, View], rows: Sequence[str]) -> dict[str, View]:
    """The teacher and the students of these rows, of the first seed for which all were seen; empty if there is none."""
    final = [spec for spec in specs if spec.purpose == "final" and spec.id in seen]
    for seed in dict.fromkeys(spec.seed for spec in final):
        students = {spec.row: spec for spec in final if spec.seed == seed}
        if students.keys() >= set(rows):
            chosen = {row: students[row] for row in rows}
            return {"teacher": seen[chosen[rows[0]].teacher.id]} | {row: seen[s.id] for row, s in chosen.items()}
    return {}


def image_tables(view: View) -> dict[str, Tensor]:
    """How a network relates the images that it was shown, in three ways, (B, B) each.

    "maps": the similarities of the last maps, which similarity preserving matches; "distances" and "cosines" of the
    embeddings, which relational distillation and, in the main, probabilistic transfer match.
    """
    return {
        "maps": similarities(view.maps[-1]),
        "distances": relative_distances(view.embedding),
        "cosines": cosines(view.embedding),
    }


def closeness(specs: Iterable[RunSpec], seen: Mapping[str, View]) -> pd.DataFrame:
    """How far the relations in students are from those in their teachers: a row per final run that was seen.

    Columns: method, seed; maps, distances and cosines (`image_gap` of the `image_tables`); flows (`flow_gap`).
    """
    final = [spec for spec in specs if spec.purpose == "final" and spec.id in seen]
    rows = [(spec.row, spec.seed, *_gaps(seen[spec.id], seen[spec.teacher.id])) for spec in final]
    return pd.DataFrame(rows, columns=list(CLOSENESS_COLUMNS))


def _gaps(student: View, teacher: View) -> tuple[float, ...]:
    pairs = zip(image_tables(student).values(), image_tables(teacher).values(), strict=True)
    return (*(image_gap(*pair) for pair in pairs), flow_gap(student, teacher))


def image_gap(one: Tensor, other: Tensor) -> float:
    """Root mean square difference of two tables (B, B), over the pairs of different images."""
    apart = ~torch.eye(len(one), dtype=torch.bool)
    return float((one - other)[apart].square().mean().sqrt())


def flow_gap(student: View, teacher: View) -> float:
    """Length of the difference of two networks' flows, all pairs of layers together, as a share of the teacher's.

    NaN where stem and stages are not equally many or not equally wide.
    """
    widths = [[layer.shape[1] for layer in (view.stem, *view.maps)] for view in (student, teacher)]
    if widths[0] != widths[1]:
        return float("nan")
    pairs = list(zip(flows(student), flows(teacher), strict=True))
    apart = sum((ours - theirs).square().sum() for ours, theirs in pairs)
    return float((apart / sum(theirs.square().sum() for _, theirs in pairs)).sqrt())
