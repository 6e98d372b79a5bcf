"""The simplex ETF nearest to given class means, and how far they are from it.

Both see the means through the (C−1)-dimensional basis of 1^⊥: A = H̃ᵀQ (d, C−1), of full rank where the (d, C)
matrix of centred means never is. The nearest frame is the polar factor of A, the distance a function of A's
singular values.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ncreg._checks import described
from ncreg._transforms import bare, derivatives_taken, recorded, wrapped
from ncreg.frames._simplex import basis_times, basis_transposed_times
from ncreg.numerics import in_float64

ONCE = "nearest_simplex_etf is differentiable once: it has no second derivative here"


class _Polar(torch.autograd.Function):
    """Orthonormal polar factor U Vᵀ of A = U S Vᵀ (m, n), m ≥ n, with a gradient at repeated singular values.

    Backward needs only sums s_i + s_j, where that of the singular vectors would divide by s_i − s_j. Directions
    with singular values below `cutoff` are free: the factor completes them to an exact frame, the gradient
    leaves them out. The derivative is a self-adjoint map: forward mode takes the same one.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, cutoff: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u @ vh, u, s, vh

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
        matrix, cutoff = inputs
        saved = (matrix, *output[1:], cutoff)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *unused: Any) -> tuple[Tensor, None]:
        matrix, *factors = ctx.saved_tensors
        _only_once(matrix, int(wrapped(matrix)))
        pulled = _polar_derivative(gradient, *factors)
        return (_Once.apply(pulled, matrix) if torch.is_grad_enabled() and not wrapped(matrix) else pulled), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> tuple[Tensor, None, None, None]:
        matrix, *factors = ctx.saved_tensors
        _only_once(matrix, 1)
        return _polar_derivative(tangent, *factors), None, None, None


class _Once(torch.autograd.Function):
    """A gradient whose own derivative in the matrix is refused; torch's once_differentiable lets it pass for zero."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, matrix: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(ONCE)


def _only_once(matrix: Tensor, levels: int) -> None:
    """Refuse more derivatives at once than the level of torch.func that this one is taken at."""
    if derivatives_taken(matrix) > levels:
        raise RuntimeError(ONCE)


def _polar_derivative(direction: Tensor, u: Tensor, s: Tensor, vh: Tensor, cutoff: Tensor) -> Tensor:
    """The change of the polar factor U Vᵀ with a change of the matrix, or the pull-back of a gradient."""
    turned = direction @ vh.mT
    z = u.mT @ turned
    within = (z - z.mT) * _inverse_above(s[:, None] + s, cutoff)
    beyond = (turned - u @ z) * _inverse_above(s, cutoff)
    return (u @ within + beyond) @ vh


def _inverse_above(value: Tensor, cutoff: Tensor) -> Tensor:
    """1/value above the cutoff, 0 elsewhere."""
    kept = value > cutoff
    return kept / torch.where(kept, value, 1.0)


def _check_means(means: Tensor) -> None:
    if not isinstance(means, Tensor):
        raise TypeError(f"means must be a tensor of class means, not {described(means)}")
    if means.ndim != 2 or means.shape[0] < 2 or not means.is_floating_point():
        got = f"{tuple(means.shape)} of {means.dtype}"
        raise ValueError(f"means are {got}: class means are a floating-point (num_classes >= 2, dim) matrix")
    if not recorded(means) and not bare(means.isfinite()).all():
        raise ValueError("means must be finite; a class without samples has no mean: leave its row out")


def _length(matrix: Tensor) -> Tensor:
    """The Frobenius norm, whatever the size of the entries."""
    largest = matrix.abs().amax()
    return largest * (matrix / torch.where(largest > 0, largest, 1)).norm()


def _on_basis(means: Tensor) -> Tensor:
    """Qᵀ · means (C−1, d) in float64; a shared offset goes first, before it can swamp the digits."""
    means = in_float64(means)
    return basis_transposed_times(means - means[:1].detach())


def nearest_simplex_etf(means: Float[Tensor, "num_classes dim"]) -> Float[Tensor, "num_classes dim"]:
    """The simplex ETF nearest to class means: argmax of ⟨W, means⟩ over all simplex ETFs W of unit rows.

    Closed form: with X S Yᵀ the singular value decomposition of H̃ᵀQ (H̃ the centred means, Q a basis of 1^⊥),
    Wᵀ = √(C/(C−1)) · X Yᵀ Qᵀ. It is unique where the centred means have rank C − 1; else it is one of the
    nearest, exact all the same. Neither the means' common offset nor their scale counts. Differentiable once,
    at repeated singular values too (an exact simplex has nothing else); computed in float64.

    A proximal pull to an earlier frame W₀ is nearest_simplex_etf(means + δ·W₀). The problem is that of Markou,
    Ajanthan & Gould, "Guiding Neural Collapse", NeurIPS 2024 (arXiv 2411.01248), solved there iteratively.

    Raises:
        ValueError: where dim < C − 1, or a mean is not finite.

    Example:
        >>> means = torch.tensor([[2.0, 0.1], [-1.0, 1.0], [-1.0, -1.0]])
        >>> nearest_simplex_etf(means).round(decimals=3)
        tensor([[ 1.0000,  0.0210],
                [-0.5180,  0.8550],
                [-0.4820, -0.8760]])
    """
    _check_means(means)
    num_classes, dim = means.shape
    if dim < num_classes - 1:
        raise ValueError(
            f"means in dim={dim} have no nearest {num_classes}-class simplex ETF, which needs dim >= "
            f"{num_classes - 1}: project the features to {num_classes - 1} dimensions or more"
        )
    # Singular values this small are the rounding of the means as given, offset included.
    cutoff = torch.finfo(means.dtype).eps * max(num_classes, dim) ** 0.5 * _length(in_float64(means.detach()))
    axes = _Polar.apply(_on_basis(means).mT, cutoff)[0]
    return ((num_classes / (num_classes - 1)) ** 0.5 * basis_times(axes.mT)).to(means)


def etf_distance(means: Float[Tensor, "num_classes dim"]) -> Float[Tensor, ""]:
    """Relative squared distance of class means to the nearest simplex ETF of any size: 1 − (ΣS)²/((C−1)·ΣS²).

    S are the singular values of the centred means. 0 at an exact simplex, at most 1 − 1/(C−1); invariant to
    rotation, scale and offset. Where dim < C − 1 no simplex fits, and at least 1 − dim/(C−1) remains; means that
    all coincide give nan. Differentiable; computed in float64.

    Raises:
        ValueError: for means that are not a finite floating-point (C ≥ 2, dim) matrix.

    Example:
        >>> etf_distance(torch.eye(5)) < 1e-12  # centred, orthogonal means are a simplex
        tensor(True)
    """
    _check_means(means)
    values = torch.linalg.svdvals(_on_basis(means))
    values = F.pad(values / values.detach().amax(), (0, len(means) - 1 - len(values)))  # squares stay within range
    # The same number as the variance of S over its mean square: no cancellation near a simplex.
    return ((values - values.mean()).square().sum() / values.square().sum()).to(means)
