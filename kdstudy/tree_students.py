"""Distillation into a decision tree: a student that can be read."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdstudy.core import Method, Phase, View, require_choice, require_positive, require_whole
from kdstudy.trees import DecisionTree


class Labels(nn.Module):
    """The labels of all training images, in their order."""

    census: Tensor  # (N,) int64

    def __init__(self, census: Tensor) -> None:
        super().__init__()
        self.register_buffer("census", census)


@dataclass(frozen=True, kw_only=True)
class SoftTree(Method):
    """A decision tree fitted to the teacher's soft targets.

    N. Frosst, G. Hinton, "Distilling a Neural Network Into a Soft Decision Tree", 2017, arXiv:1711.09784, for the idea
    that a tree learns better from a network's probabilities than from labels; M. Craven, J. Shavlik, "Extracting
    Tree-Structured Representations of Trained Networks", NIPS 8, 1996, for its fidelity, the share of images on which
    tree and teacher agree; L. Breiman, J. Friedman, R. Olshen, C. Stone, "Classification and Regression Trees", 1984,
    for the tree.

    The student is a `tree_<depth>`. Split by split, scikit-learn's regression tree takes the pixel and the threshold
    that most reduce the squared error `mean_n sum_c (p_nc - q_nc)^2` of all plain training images at once, where
    `p_n = softmax(z_t / T)` and `q_n` is the mean of p over the images of n's leaf; no leaf has fewer than `least_leaf`
    images. With `target` "labels", the control, p is one-hot and T is 1.

    A leaf of m images answers `z_s = T log q'`, `q' = (m q + smoothing / C) / (m + smoothing)`. Softened like the
    teacher that is q', which is never zero, so that every label has a likelihood. No gradient is followed;
    `loss` is the squared error that remains. Defaults: T 1, leaves of any size, a smoothing by 1 image.

    Differs from the printed text:

    * Frosst and Hinton's tree is soft: every split is a logistic unit on all pixels, every leaf has its share in the
      answer, and all is trained by gradient descent. This one is hard, each split asks one pixel, and it is grown
      greedily: weaker, but its answers can be followed by eye.
    * Craven and Shavlik ask the teacher about made-up images, too, and split by m of n pixels. Here neither.
    """

    kind: ClassVar[str] = "response"
    paper: ClassVar[str] = "after Frosst, Hinton 2017, arXiv:1711.09784; Breiman, Friedman, Olshen, Stone 1984"
    reads: ClassVar[tuple[str, ...]] = ("logits", "census", "network")

    ce_weight: float = 0.0
    target: str = "teacher"
    temperature: float = 1.0
    least_leaf: int = 1
    smoothing: float = 1.0

    def __post_init__(self) -> None:
        """Refuse hyperparameters out of range, and weights that would do nothing."""
        super().__post_init__()
        require_choice("target", self.target, ("teacher", "labels"))
        require_positive("temperature", self.temperature)
        require_whole("least_leaf", self.least_leaf)
        require_positive("smoothing", self.smoothing)
        if self.ce_weight:
            raise ValueError(f"ce_weight must be 0, not {self.ce_weight!r}: `target` says what a tree is fitted to")
        if self.kd_weight != 1:
            raise ValueError(f"kd_weight must be 1, not {self.kd_weight!r}: a tree has nothing to weigh")
        if self.target == "labels" and self.temperature != 1:
            raise ValueError(f"temperature must be 1, not {self.temperature!r}: labels cannot be softened")

    def loss(self, student: View, teacher: View, labels: Tensor, adapters: nn.ModuleDict) -> Tensor:
        """The squared error of the softened answers, summed over classes, a scalar."""
        answers = (student.logits / self.temperature).softmax(dim=1)
        return (answers - self.targets(teacher.logits, labels)).square().sum(dim=1).mean()

    def targets(self, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """What the tree is fitted to, (B, C): the teacher's softened probabilities, or the labels, one-hot."""
        if self.target == "labels":
            return F.one_hot(labels, teacher_logits.shape[1]).to(teacher_logits.dtype)
        return (teacher_logits / self.temperature).softmax(dim=1)

    def adapters(self, student: View, teacher: View) -> nn.ModuleDict:
        """The training labels, if these are the target. ValueError unless the student is a tree, and if they lack."""
        if not isinstance(student.network, DecisionTree):
            raise ValueError("only a decision tree can be fitted like one: the student must be a tree_<depth>")
        if self.target == "teacher":
            return nn.ModuleDict()
        if student.census is None:
            raise ValueError("a tree that is fitted to labels needs those of all training images (the tap `census`)")
        return nn.ModuleDict({"labels": Labels(student.census)})

    def phases(self) -> tuple[Phase, ...]:
        """None: `initialise` does it all."""
        return ()

    @torch.no_grad()
    def initialise(
        self, student: nn.Module, teacher: nn.Module, plain_batches: Iterable[Tensor], adapters: nn.ModuleDict
    ) -> None:
        """Grow the tree on all images; ties between pixels are broken by torch's global generator."""
        batches = [(images, teacher(images).logits) for images in plain_batches]
        images, answers = (torch.cat(part) for part in zip(*batches, strict=True))
        labels = adapters["labels"].census if self.target == "labels" else images.new_empty(0)
        grow(student, images, self.targets(answers, labels), self.least_leaf, self.smoothing, self.temperature)


def grow(
    tree: DecisionTree, images: Tensor, targets: Tensor, least_leaf: int, smoothing: float, temperature: float
) -> None:
    """Fit a tree, in place, to `targets` (N, C) of `images` (N, channels, H, W); see `SoftTree`."""
    from sklearn.tree import DecisionTreeRegressor

    seed = int(torch.randint(2**31, ()))
    regressor = DecisionTreeRegressor(max_depth=tree.depth, min_samples_leaf=least_leaf, random_state=seed)
    fitted = regressor.fit(images.flatten(1).cpu().numpy(), targets.double().cpu().numpy()).tree_

    splits = len(tree.threshold)
    places = np.zeros(2 * splits + 1, dtype=np.int64)  # the fitted tree's node for each place of the complete one
    for place in range(splits):
        node = places[place]
        is_leaf = fitted.children_left[node] < 0
        places[2 * place + 1] = node if is_leaf else fitted.children_left[node]
        places[2 * place + 2] = node if is_leaf else fitted.children_right[node]
    inner, leaves = places[:splits], places[splits:]
    is_split = torch.from_numpy(fitted.children_left[inner] >= 0)

    tree.pixel.copy_(torch.from_numpy(fitted.feature[inner]).where(is_split, 0))
    tree.threshold.copy_(torch.from_numpy(fitted.threshold[inner]).where(is_split, torch.inf))
    count = torch.from_numpy(fitted.n_node_samples[leaves]).unsqueeze(1)
    means = torch.from_numpy(fitted.value[leaves, :, 0])
    smoothed = (count * means + smoothing / means.shape[1]) / (count + smoothing)
    tree.leaf.copy_(temperature * smoothed.log())
