"""NCTI: which of several backbones is nearest to neural collapse on the images of a new task."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, log

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from ncreg._checks import described
from ncreg._features import check_varied
from ncreg._readable import readable
from ncreg.transferability._inputs import labelled, one_hot

COMPONENTS, SHRINKING = 64, 32  # principal components kept, and those that decide the shrinkage
FLOOR = 1e-9
"""This fraction of the features' mean variance is added to the variance in every direction."""


@dataclass(frozen=True)
class NCTIScore:
    """Three terms of one candidate, and the sum of its ranks among all.

    Attributes:
        within: −ln Σ_c ‖P_c‖_*, P_c the rule's probabilities of the samples of class c: high where they are alike.
        spread: ‖Z‖_* of the features on the rule's C−1 discriminants: high where these are all in use.
        posterior: mean probability of the true class under the rule.
        score: sum of the ranks of the three, 1 for the lowest of the candidates; ties share the mean of their ranks.
    """

    within: float
    spread: float
    posterior: float
    score: float

    __str__ = readable


def ncti(
    candidates: Mapping[str, Float[Tensor, "samples _"]], target: Integer[Tensor, " samples"]
) -> dict[str, NCTIScore]:
    """Score backbones by three signs of collapse on the new task, each as a rank among the candidates.

    The rule is nearest centre under one covariance, on the first 64 principal components: linear discriminant analysis,
    its covariance shrunk towards a multiple of I by s = exp(−their first 32 variances), below 1e-10 not at all. So the
    features' scale matters. A score says nothing by itself: other candidates change it.

    Args:
        candidates: features of the same images by the backbone's name, each (samples, its own width).
        target: their classes, each of 0 … C−1 present; more samples than classes.

    Raises:
        TypeError: no tensors of the right kind, candidates that are no dict.
        ValueError: fewer than two candidates, shapes that do not fit, features not finite or all the same.

    Source: Wang, Luo, Zheng, Huang & Baktashmotlagh, "How Far Pre-trained Models Are from Neural Collapse on the Target
    Dataset Informs their Transferability", ICCV 2023; the numbers are those of their code.

    Example:
        >>> target, generator = torch.arange(60) % 3, torch.Generator().manual_seed(0)
        >>> noise = torch.randn(60, 4, generator=generator)
        >>> helpful = noise + 4 * torch.nn.functional.one_hot(target, 4)
        >>> found = ncti({"noise": noise, "helpful": helpful}, target)
        >>> found["helpful"].score, found["noise"].score
        (5.0, 4.0)
    """
    if not isinstance(candidates, Mapping):
        raise TypeError(f"candidates must be a dict of features by name, not {described(candidates)}")
    if len(candidates) < 2:
        raise ValueError(f"candidates holds {len(candidates)} backbone: ranks need at least 2")
    terms = {}
    for name, features in candidates.items():
        shown = f"candidates[{name!r}]"
        rows, labels, counts = labelled(features, target, shown)
        check_varied(shown, rows)
        if len(rows) <= len(counts):
            raise ValueError(f"{shown} has {len(rows)} samples of {len(counts)} classes: more samples are needed")
        terms[name] = _terms(rows, labels, counts)
    ranks = _ranks(torch.tensor(list(terms.values()), dtype=torch.float64, device="cpu"))
    return {name: NCTIScore(*terms[name], float(rank)) for name, rank in zip(terms, ranks.sum(1), strict=True)}


def _terms(rows: Tensor, labels: Tensor, counts: Tensor) -> tuple[float, float, float]:
    rows, shrinkage = _components(rows)
    means = one_hot(labels, len(counts)).T @ rows / counts[:, None]
    root, discriminants = _discriminants(rows, means, labels, shrinkage)
    white, white_means = (torch.linalg.solve_triangular(root, part.T, upper=False).T for part in (rows, means))
    logits = white @ white_means.T - white_means.square().sum(1) / 2 + counts.double().log()
    chances = logits.softmax(1)
    within = sum(float(torch.linalg.matrix_norm(chances[labels == c], "nuc")) for c in range(len(counts)))
    spread = float(torch.linalg.matrix_norm(white @ discriminants, "nuc"))
    return -log(within), spread, float(chances.gather(1, labels[:, None]).mean())


def _components(rows: Tensor) -> tuple[Float[Tensor, "samples components"], float]:
    """The first principal components, and the shrinkage that goes with their variances."""
    centred = rows - rows.mean(0)
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    variances = singular[:SHRINKING].square() / (len(rows) - 1)
    shrinkage = exp(-float(variances.sum()))
    return (left * singular)[:, :COMPONENTS], shrinkage if shrinkage > 1e-10 else 0.0


def _discriminants(rows: Tensor, means: Tensor, labels: Tensor, shrinkage: float) -> tuple[Tensor, Tensor]:
    """L with LLᵀ = Σ_W, and the C−1 directions behind L⁻¹ in which classes differ most."""

    def shrunk(scatter: Tensor) -> Tensor:
        level = scatter.diagonal().mean()
        return (1 - shrinkage) * scatter + shrinkage * level * torch.eye(
            len(scatter), dtype=torch.float64, device="cpu"
        )

    within, samples = rows - means[labels], len(rows)
    covariance = shrunk(within.T @ within / samples)
    covariance.diagonal().add_(FLOOR * rows.square().mean())
    root = torch.linalg.cholesky(covariance)
    # St − Sw of scikit-learn: where covariances are shrunk, so is their difference
    between = shrunk((rows.T @ rows - within.T @ within) / samples)
    half = torch.linalg.solve_triangular(root, between, upper=False)
    _, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(root, half.T, upper=False))  # ascending
    return root, vectors[:, -(len(means) - 1) :]


def _ranks(values: Float[Tensor, "candidates terms"]) -> Float[Tensor, "candidates terms"]:
    """Ranks within each column from 1; equal values share their mean rank."""
    below = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    return below + (equal + 1) / 2
