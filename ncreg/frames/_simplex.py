"""Frames in closed form: simplex, orthoplex, hypercube; and the Householder basis of 1^⊥ under the simplex."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ncreg._checks import check_flag, check_integer, check_num_classes
from ncreg.numerics import as_float, seeded


def finish(frame: Tensor, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
    """Round a float64 frame once to `dtype`, or to torch's default dtype, on `device`."""
    device = torch.get_default_device() if device is None else device
    return frame.to(device=device, dtype=as_float(dtype) or torch.get_default_dtype())


def rotation(dim: int, columns: int, generator: torch.Generator | None) -> Tensor:
    """A (dim, columns) matrix with orthonormal columns, uniform over all such matrices."""
    generator = seeded(0) if generator is None else generator
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator={generator!r} must be a torch.Generator: torch.Generator().manual_seed(seed)")
    drawn = torch.randn(dim, columns, dtype=torch.float64, device=generator.device, generator=generator)
    q, r = torch.linalg.qr(drawn.cpu())
    # The sign of R's diagonal is LAPACK's choice; fixing it makes the draw uniform.
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def _axes(dim: int, count: int, rotate: bool, generator: torch.Generator | None) -> Tensor:
    """`count` orthonormal rows: the first axes of the space, or axes turned at random."""
    if check_flag("rotate", rotate):
        return rotation(dim, count, generator).T
    return torch.eye(count, dim, dtype=torch.float64, device="cpu")


def on_meta(device: torch.device | str | None) -> bool:
    """Whether the frame goes to the meta device, where it has a shape and no values."""
    return torch.device(device or torch.get_default_device()).type == "meta"


def basis_times(rows: Tensor) -> Tensor:
    """Q @ rows for the (C, C−1) Householder basis Q of 1^⊥, in O(C·d) and without Q."""
    root, total = (rows.shape[0] + 1) ** 0.5, rows.sum(0)
    return torch.cat([rows - total / (root * (root + 1)), -total[None] / root])


def basis_transposed_times(rows: Tensor) -> Tensor:
    """Qᵀ @ rows for the same Q: (C, d) → (C−1, d), blind to an offset that all rows share."""
    root, upper, last = rows.shape[0] ** 0.5, rows[:-1], rows[-1]
    return upper - upper.sum(0) / (root * (root + 1)) - last / root


def simplex_etf(
    num_classes: int,
    dim: int,
    *,
    rotate: bool = True,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "num_classes dim"]:
    """Simplex equiangular tight frame: W Wᵀ = C/(C−1) · (I − 11ᵀ/C), for any dim ≥ num_classes − 1.

    Rows have length 1, their pairwise cosine is −1/(C−1), their sum is 0. W = √(C/(C−1)) · Q · Uᵀ with Q the
    Householder basis of 1^⊥ and U a random rotation (Papyan, Han & Donoho, PNAS 2020, for the geometry).

    Args:
        num_classes: C, at least 2.
        dim: d, at least C − 1.
        rotate: whether to turn the frame uniformly at random; otherwise U is the first C − 1 axes.
        generator: source of the rotation; by default a fresh one with seed 0, never the global one.
        dtype: of the result, rounded once from float64; by default torch's default dtype.
        device: of the result; by default torch's default device.

    Raises:
        ValueError: where dim < C − 1 or C < 2.

    Example:
        >>> weight = simplex_etf(4, 3, dtype=torch.float64)
        >>> (weight @ weight.T).round(decimals=6)[0]
        tensor([ 1.0000, -0.3333, -0.3333, -0.3333], dtype=torch.float64)
    """
    num_classes, dim = check_num_classes(num_classes), check_integer("dim", dim, 1)
    if dim < num_classes - 1:
        raise ValueError(
            f"dim={dim} cannot hold a {num_classes}-class simplex ETF, which needs dim >= {num_classes - 1}: "
            f"put a linear map before it (swap_head's project={num_classes - 1}) "
            "or take a frame for many classes (orthoplex, hypercube, softmax_code)"
        )
    if on_meta(device):
        return finish(torch.empty(num_classes, dim, device="meta"), dtype, device)
    axes = _axes(dim, num_classes - 1, rotate, generator)
    return finish((num_classes / (num_classes - 1)) ** 0.5 * basis_times(axes), dtype, device)


def orthoplex(
    num_classes: int,
    dim: int,
    *,
    rotate: bool = True,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "num_classes dim"]:
    """Orthoplex (cross-polytope): rows e_1 … e_m, −e_1 … −e_(C−m) with m = ⌈C/2⌉, for num_classes ≤ 2·dim.

    The largest pairwise cosine is 0 (for C ≥ 3), which is the least there is for C ≥ dim + 2 (Rankin 1955).

    Args:
        num_classes: C, at least 2.
        dim: d, at least C/2.
        rotate: whether to turn the frame uniformly at random; otherwise its axes are the first m.
        generator: as in `simplex_etf`.
        dtype: of the result.
        device: of the result.

    Raises:
        ValueError: where C > 2d or C < 2.

    Example:
        >>> orthoplex(4, 2, rotate=False) + 0.0  # no negative zeros
        tensor([[ 1.,  0.],
                [ 0.,  1.],
                [-1.,  0.],
                [ 0., -1.]])
    """
    num_classes, dim = check_num_classes(num_classes), check_integer("dim", dim, 1)
    if num_classes > 2 * dim:
        raise ValueError(
            f"dim={dim} cannot hold an orthoplex of {num_classes} classes, which needs dim >= "
            f"{-(-num_classes // 2)}: take hypercube, tammes or softmax_code, or a larger dim"
        )
    if on_meta(device):
        return finish(torch.empty(num_classes, dim, device="meta"), dtype, device)
    axes = _axes(dim, -(-num_classes // 2), rotate, generator)
    return finish(torch.cat([axes, -axes])[:num_classes], dtype, device)


def hypercube(
    num_classes: int,
    dim: int,
    *,
    rotate: bool = True,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "num_classes dim"]:
    """Corners of a cube: class c has the signs of c's binary digits on k = ⌈log₂ C⌉ axes, divided by √k.

    Holds num_classes ≤ 2^dim; the largest pairwise cosine is 1 − 2/k.

    Args:
        num_classes: C, at least 2.
        dim: d, at least log₂ C.
        rotate: whether to turn the frame uniformly at random; otherwise its axes are the first k.
        generator: as in `simplex_etf`.
        dtype: of the result.
        device: of the result.

    Raises:
        ValueError: where C > 2^d or C < 2.

    Example:
        >>> hypercube(3, 2, rotate=False)
        tensor([[-0.7071, -0.7071],
                [ 0.7071, -0.7071],
                [-0.7071,  0.7071]])
    """
    num_classes, dim = check_num_classes(num_classes), check_integer("dim", dim, 1)
    bits = (num_classes - 1).bit_length()
    if bits > dim:
        raise ValueError(
            f"dim={dim} cannot hold a hypercube of {num_classes} classes, which needs dim >= {bits}: "
            "take tammes or softmax_code, or a larger dim"
        )
    if on_meta(device):
        return finish(torch.empty(num_classes, dim, device="meta"), dtype, device)
    digits = torch.arange(num_classes, device="cpu")[:, None] >> torch.arange(bits, device="cpu") & 1
    return finish((2.0 * digits.double() - 1) / bits**0.5 @ _axes(dim, bits, rotate, generator), dtype, device)
