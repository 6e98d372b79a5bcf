"""How collapsed the features of a split are: NC0 to NC4, spectra, ranks and cosines, from blocks of features."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ncreg.metrics import NearestClassCenter, NeuralCollapse
from recipes.evaluation.feature_store import Features

RANKME_EPSILON = 1e-7
"""Added to the shares of the singular values, as in RankMe's paper."""


@dataclass(frozen=True)
class Collapse:
    """What is known of the features of a split, float64.

    Attributes:
        measures: of `ncreg.metrics.NeuralCollapse`, and rankme.
        means: class means (C, d), NaN for classes without images.
        counts: images of each class (C,).
        within: eigenvalues of the within-class covariance, descending (d,).
        between: eigenvalues of the covariance of the class means, descending, at most C − 1.
    """

    measures: dict[str, float]
    means: Tensor
    counts: Tensor
    within: Tensor
    between: Tensor

    @property
    def centred(self) -> Tensor:
        """Class means minus their own mean (C, d)."""
        return self.means - self.means[self.counts > 0].mean(0)

    def cosines(self) -> Tensor:
        """Cosines of the centred class means (C, C); NaN for classes without images."""
        unit = self.centred / self.centred.norm(dim=1, keepdim=True).clamp_min(1e-300)
        return unit @ unit.T


class Layer:
    """A last layer with weight (C, d) and perhaps a bias, as the metrics read it."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias


def measurable(head: Any, num_classes: int, width: int) -> Any:
    """The head where it has class vectors (C, d), else None."""
    weight = getattr(head, "class_vectors", getattr(head, "weight", None))
    fits = isinstance(weight, Tensor) and tuple(weight.shape) == (num_classes, width)
    return head if fits else None


def collapse_of(features: Features, num_classes: int, head: Any = None) -> Collapse:
    """Every measure of the features of a split, from two passes over them.

    Args:
        features: in blocks.
        num_classes: C.
        head: the last layer; None for the measures that need none.
    """
    metric = NeuralCollapse(num_classes, features.width, classifier=head, cache=False)
    with warnings.catch_warnings():  # the report says which classes are absent
        warnings.filterwarnings("ignore", message=".*classes have no samples")
        with torch.no_grad():
            for _ in metric.passes():
                for rows, target in features:
                    metric.update(rows, target)
        measures = {name: float(value) if value.numel() == 1 else math.nan for name, value in metric.compute().items()}
    means, counts = metric.class_means(), torch.bincount(features.target, minlength=num_classes)
    covariance = metric.within_class_covariance()
    within = torch.linalg.eigvalsh(covariance).clamp_min(0).flip(0)
    here = means[counts > 0]
    between = torch.linalg.svdvals(here - here.mean(0)).square() / len(here)
    measures["rankme"] = rankme(covariance, means, counts)
    return Collapse(measures, means, counts, within, between[: max(1, len(here) - 1)])


def rankme(covariance: Tensor, means: Tensor, counts: Tensor) -> float:
    """exp(−Σ p log p) with p = σ/Σσ + ε from the singular values σ of the features (N, d), not centred.

    Source: Garrido et al., "RankMe", ICML 2023 (arXiv 2210.02885).

    Args:
        covariance: within classes (d, d).
        means: of the classes (C, d).
        counts: of their images (C,).

    Example:
        >>> round(rankme(torch.zeros(2, 2), torch.eye(2), torch.tensor([4, 4])), 3)
        2.0
    """
    here = counts > 0
    rows = means[here] * counts[here, None].double().sqrt()
    gram = covariance.double() * counts.sum() + rows.double().T @ rows.double()
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    shares = values / values.sum() + RANKME_EPSILON
    return float(torch.special.entr(shares).sum().exp())


def on_means_of(train: Collapse, features: Features, head: Any) -> dict[str, float]:
    """NC4 and the accuracy of the nearest class mean where the means are those of the training features."""
    metric = NearestClassCenter(train.means, head)
    for rows, target in features:
        metric.update(rows, target)
    return {name: float(value) for name, value in metric.compute().items()}


def affine_logits(head: Layer, rows: Tensor) -> Tensor:
    """Features · Wᵀ + b."""
    logits = rows.to(head.weight.dtype) @ head.weight.T
    return logits if head.bias is None else logits + head.bias
