"""From final sums to measures: pure functions in float64. docs/metrics.md says what each number means."""

from __future__ import annotations

import torch
from torch import Tensor

from ncreg.metrics._geometry import Geometry, squared_distances, tiles
from ncreg.metrics._reduce import Statistics
from ncreg.metrics._second_pass import SecondPass

_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5}


def effective_rank(values: Tensor) -> Tensor:
    """Exponential of the entropy of the singular values over their sum (Roy & Vetterli 2007)."""
    return torch.special.entr(values / values.sum()).sum().exp()


def stable_rank(values: Tensor) -> Tensor:
    """‖A‖_F²/‖A‖₂² from the singular values of A."""
    return (values / values.amax()).square().sum()


def equinorm(rows: Tensor) -> Tensor:
    """Standard deviation over mean of the rows' lengths."""
    norms = rows.norm(dim=1)
    return norms.std(correction=0) / norms.mean()


def _pairs_only(tile: Tensor, rows: slice, columns: slice, value: float = 0) -> Tensor:
    """A tile of a symmetric table with this value in place of the table's diagonal."""
    return tile.fill_diagonal_(value) if rows is columns else tile


def angles(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of |cos + 1/(C−1)| over pairs of vectors, and the standard deviation of the cosines."""
    classes = len(vectors)
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    pairs = torch.tensor(classes * (classes - 1.0), dtype=vectors.dtype, device=vectors.device)
    simplex = -classes / pairs
    mean = (unit.sum(0).square().sum() - unit.square().sum()) / pairs
    excess, variance = torch.zeros_like(pairs), torch.zeros_like(pairs)
    for rows, columns, times in tiles(classes):
        cosine = unit[rows] @ unit[columns].T
        excess += times * _pairs_only((cosine - simplex).abs_(), rows, columns).sum()
        variance += times * _pairs_only((cosine - mean).square_(), rows, columns).sum()
    return excess / pairs, (variance / pairs).sqrt()


def cdnv(centred: Tensor, variance: Tensor) -> Tensor:
    """Mean over pairs of (V_i + V_j)/(2‖μ_i − μ_j‖²)."""
    classes = len(centred)
    total = torch.zeros_like(variance[0])
    for rows, columns, times in tiles(classes):
        distance = squared_distances(centred, rows, columns).mul_(2)
        ratio = (variance[rows, None] + variance[columns]) / distance
        total += times * _pairs_only(ratio, rows, columns).sum()
    return total / torch.tensor(classes * (classes - 1.0), dtype=total.dtype, device=total.device)


def gram_to_simplex(weight: Tensor) -> Tensor:
    """‖WWᵀ/‖WWᵀ‖_F − (I − 11ᵀ/C)/√(C−1)‖_F."""
    classes = len(weight)
    squares, total = weight.new_zeros(()), weight.new_zeros(())
    side = weight if classes <= weight.shape[1] else weight.T  # WWᵀ and WᵀW have one norm
    for rows, columns, times in tiles(len(side)):
        squares += times * (side[rows] @ side[columns].T).square_().sum()
    for rows, columns, times in tiles(classes):
        gram = weight[rows] @ weight[columns].T / squares.sqrt()
        simplex = _pairs_only(torch.full_like(gram, -1 / classes), rows, columns, 1 - 1 / classes)
        total += times * (gram - simplex / (classes - 1) ** 0.5).square().sum()
    return total.sqrt()


def nc1(geometry: Geometry, along: Tensor) -> Tensor:
    """tr(Σ_W Σ_B⁺)/C from the within-class scatter along each basis vector (r,); NaN where the means coincide."""
    if not len(along):
        return torch.full_like(geometry.counts[0], torch.nan)
    return (along / geometry.values[: len(along)].square()).sum() / geometry.counts.sum()


def to_simplex(values: Tensor, classes: int) -> Tensor:
    """1 − (ΣS)²/((C−1)·ΣS²) as the variance of the C−1 singular values over their mean square: no cancellation."""
    values = torch.nn.functional.pad(values, (0, classes - 1 - len(values)))  # or cut off the one that is 0
    return (values - values.mean()).square().sum() / values.square().sum()


def of_means(geometry: Geometry, trace: Tensor) -> dict[str, Tensor]:
    """The measures of class means and within-class traces (C,): NC2, CDNV, trace ratio, ranks."""
    here = geometry.present
    centred, values = geometry.centred[here], geometry.values
    equiangularity, spread = angles(centred)
    between = centred.square().sum() / len(centred)
    return {
        "nc1_rank": torch.full_like(between, len(geometry.basis)),
        "trace_ratio": trace.sum() / geometry.counts.sum() / between,
        "cdnv": cdnv(centred, trace[here] / geometry.counts[here]),
        "nc2_equinorm": equinorm(centred),
        "nc2_equiangularity": equiangularity,
        "nc2_cosine_std": spread,
        "etf_distance": to_simplex(values, len(centred)),
        "stable_rank": stable_rank(values),
        "effective_rank": effective_rank(values),
    }


def of_classifier(geometry: Geometry, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """The measures of the last layer, alone (NC0, NC2) and against the class means (NC3)."""
    equiangularity, spread = angles(weight)
    rows, centred = weight[geometry.present], geometry.centred[geometry.present]
    return {
        "nc0": weight.sum(0).square().sum() / len(weight),
        "nc2_weight_equinorm": equinorm(weight),
        "nc2_weight_equiangularity": equiangularity,
        "nc2_weight_cosine_std": spread,
        "nc2_weight_gram": gram_to_simplex(weight),
        "nc3": (rows / rows.norm() - centred / centred.norm()).norm(),
        "nc3_bias": (weight @ geometry.global_mean + bias).norm(),
    }


def of_scatter(scatter: Tensor) -> dict[str, Tensor]:
    """Ranks of the within-class scatter (d, d)."""
    eigenvalues = torch.linalg.eigvalsh(scatter).clamp_min(0)
    return {
        "within_stable_rank": stable_rank(eigenvalues),
        "within_effective_rank": effective_rank(eigenvalues),
    }


def of_second_pass(geometry: Geometry, sums: SecondPass) -> dict[str, Tensor]:
    """Cosines within and between classes, and the nearest-class-centre accuracy."""
    units = sums.units[geometry.present] / geometry.counts[geometry.present][:, None]
    classes = len(units)
    intra = units.square().sum(1)
    low, high = torch.full_like(intra[0], torch.inf), torch.full_like(intra[0], -torch.inf)
    for rows, columns, _ in tiles(classes):
        cosine = units[rows] @ units[columns].T
        low = torch.minimum(low, _pairs_only(cosine, rows, columns, torch.inf).amin())
        high = torch.maximum(high, _pairs_only(cosine, rows, columns, -torch.inf).amax())
    pairs = torch.full_like(low, classes * (classes - 1.0))
    defined = pairs > 0
    return {
        "intra_cosine": intra.mean(),
        "intra_cosine_min": intra.amin(),
        "intra_cosine_max": intra.amax(),
        "inter_cosine": (units.sum(0).square().sum() - intra.sum()) / pairs,
        "inter_cosine_min": torch.where(defined, low, torch.nan),
        "inter_cosine_max": torch.where(defined, high, torch.nan),
        "ncc_accuracy": sums.nearest.sum() / sums.counts.sum(),
    }


def of_decisions(sums: SecondPass, margins: Tensor) -> dict[str, Tensor]:
    """NC4, accuracy, and the margins' mean, least value and quantiles, raw and normalised."""
    total = sums.counts.sum()
    found = {"nc4": sums.disagree.sum() / total, "classifier_accuracy": sums.correct.sum() / total}
    for name, column in zip(("margin", "normalized_margin"), margins.unbind(1), strict=True):
        ordered = column.sort().values
        found |= {f"{name}_mean": column.mean(), f"{name}_min": ordered[0]}
        found |= {f"{name}_{key}": _quantile(ordered, fraction) for key, fraction in _QUANTILES.items()}
    return found


def _quantile(ordered: Tensor, fraction: float) -> Tensor:
    """Quantile of sorted values, linear between neighbours (torch.quantile stops at 16 million values)."""
    place = fraction * (len(ordered) - 1)
    low = int(place)
    return torch.lerp(ordered[low], ordered[min(low + 1, len(ordered) - 1)], place - low)


def of_statistics(found: Statistics, classifier: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
    """Every measure that these statistics allow."""
    geometry, second = found.geometry, found.second
    values = of_means(geometry, found.trace)
    if second is not None:
        values["nc1"] = nc1(geometry, second.spread[: len(geometry.basis)])
    elif found.scatter is not None:
        values["nc1"] = nc1(geometry, ((geometry.basis @ found.scatter) * geometry.basis).sum(1))
    if found.scatter is not None:
        values |= of_scatter(found.scatter)
    if classifier is not None:
        values |= of_classifier(geometry, *classifier)
    if second is not None:
        values |= of_second_pass(geometry, second)
        if found.margins is not None:
            values |= of_decisions(second, found.margins)
    return values


def as_published(values: dict[str, Tensor], classes: int) -> dict[str, Tensor]:
    """The normalisations of Papyan, Han & Donoho's notebook: NC1 not over C, NC3 squared, sample deviations."""
    sample = (classes / (classes - 1)) ** 0.5 if classes > 1 else float("nan")
    changed = {"nc1": lambda v: v * classes, "nc3": torch.square}
    changed |= {key: lambda v: v * sample for key in ("nc2_equinorm", "nc2_weight_equinorm")}
    return {key: changed[key](value) if key in changed else value for key, value in values.items()}
