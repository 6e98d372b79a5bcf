"""Class means, their span and their distances, which both passes and all measures use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_EDGE = 512  # rows and columns of a tile of a C × C table: its few temporaries fit into a processor's cache
_LARGEST_BLOCK = 2**24  # entries of a temporary of pairs
_SMALL = 256  # a singular value decomposition of this size is cheap
LARGEST = 1e100  # beyond it, and below its reciprocal, squares of squares leave float64
_EPS = torch.finfo(torch.float64).eps
_ROUNDINGS = 8  # at most so many units in the last place are wrong in a class mean


class Geometry(NamedTuple):
    """Class means and what follows from them, float64.

    counts (C,), mean (C, d), the global mean for absent classes, present (C,) bool, global_mean (d,): the unweighted
    mean of the present class means, basis (r, d): orthonormal rows that span the centred means within their numerical
    rank r, values: all singular values of the centred means, descending.
    """

    counts: Tensor
    mean: Tensor
    present: Tensor
    global_mean: Tensor
    basis: Tensor
    values: Tensor

    @property
    def centred(self) -> Tensor:
        """Class means minus the global mean (C, d); zero for absent classes."""
        return self.mean - self.global_mean


def class_geometry(count: Tensor, mean: Tensor) -> Geometry:
    """Centre the present class means and find the numerical span of their between-class covariance.

    Raises:
        ValueError: the means are so long or so short that their squares leave float64.
    """
    present = count > 0
    largest = float(mean[present].abs().amax())
    if largest and not 1 / LARGEST < largest < LARGEST:
        raise ValueError(
            f"features are out of range: the largest entry of their class means is {largest:.3g}, and squares must "
            f"fit into float64; rescale the features to entries between {1 / LARGEST:g} and {LARGEST:g}"
        )
    global_mean = mean[present].mean(0)
    rounding = _ROUNDINGS * _EPS * mean[present].abs().amax(0)
    differ = (mean[present] - global_mean).abs().amax(0) > rounding
    mean = torch.where(present[:, None] & differ, mean, global_mean)
    values, basis = _span(mean[present] - global_mean, noise=len(mean[present]) * rounding[differ].square().sum())
    if not len(basis):  # they coincide: what tells them apart is rounding, which no measure may take for a distance
        mean, values = global_mean.expand_as(mean), torch.zeros_like(values)
    return Geometry(count, mean, present, global_mean, basis, values)


def _span(centred: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values of the centred means (P, d), and an orthonormal basis (r, d) of their row space.

    r ≤ P − 1 is the numerical rank of the between-class covariance, whose eigenvalues are the squared singular values.
    An eigenvalue of up to `noise` counts as zero: rounding of means that lie far from zero can have made it.
    The Gram matrix of the smaller side is several times cheaper than the singular value decomposition, but squares
    the condition number: it is used only where that costs less than about 1e-10.
    """
    classes, dim = centred.shape
    if min(classes, dim) > _SMALL:
        wide = classes <= dim
        eigenvalues, vectors = torch.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
        full = min(classes - 1, dim)
        if eigenvalues[-full] > torch.maximum(1e-5 * eigenvalues[-1], noise):
            values = eigenvalues.clamp_min(0).sqrt().flip(0)
            vectors = vectors.flip(1)[:, :full].T
            return values, (vectors @ centred) / values[:full, None] if wide else vectors
    _, values, basis = torch.linalg.svd(centred, full_matrices=False)
    squared = values.square()
    rank = int((squared > torch.maximum(squared.amax() * max(centred.shape) * _EPS, noise)).sum())
    return values, basis[: min(rank, classes - 1)]


def tiles(rows: int) -> Iterator[tuple[slice, slice, int]]:
    """Rows, columns and multiplicity of the tiles on and above the diagonal of a symmetric table.

    A tile off the diagonal counts twice, for its mirror image.
    """
    ranges = [slice(start, min(start + _EDGE, rows)) for start in range(0, rows, _EDGE)]
    for place, first in enumerate(ranges):
        for second in ranges[place:]:
            yield first, second, 1 if first is second else 2


def squared_distances(points: Tensor, rows: slice, columns: slice) -> Tensor:
    """‖p_i − p_j‖² for i in rows and j in columns; pairs far closer than their distance to zero are redone exactly."""
    left, right = points[rows], points[columns]
    scale = left.square().sum(1)[:, None] + right.square().sum(1)
    squared = (scale - 2 * left @ right.T).clamp_min(0)
    for pairs in (squared < 1e-4 * scale).nonzero().split(max(1, _LARGEST_BLOCK // points.shape[1])):
        first, second = pairs.unbind(1)
        squared[first, second] = (left[first] - right[second]).square().sum(1)
    return squared
