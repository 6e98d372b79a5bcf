"""From sums to measures: pure functions of the final statistics, float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ._second import Geometry, SecondPass, squared_distances

_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5}


def effective_rank(values: Tensor) -> Tensor:
    """exp of the entropy of the singular values as shares of their sum (Roy & Vetterli 2007)."""
    share = values / values.sum()
    return torch.special.entr(share).sum().exp()


def stable_rank(values: Tensor) -> Tensor:
    """‖A‖_F²/‖A‖₂² from the singular values of A."""
    return (values / values.amax()).square().sum()


def equinorm(rows: Tensor) -> Tensor:
    """Standard deviation over mean of the rows' lengths."""
    norms = rows.norm(dim=1)
    return norms.std(correction=0) / norms.mean()


def cosine_spread(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of |cos + 1/(C−1)| over pairs of rows, and the standard deviation of the cosines."""
    unit = torch.nn.functional.normalize(rows, dim=1, eps=torch.finfo(rows.dtype).tiny)
    excess = unit @ unit.T + 1 / (len(rows) - 1)
    pairs = excess[~torch.eye(len(rows), dtype=torch.bool, device=rows.device)]
    return pairs.abs().mean(), pairs.std(correction=0)


def of_means(shape: Geometry, trace: Tensor) -> dict[str, Tensor]:
    """What the class means and the per-class within-class traces (C,) tell: NC2, CDNV, trace ratio, ranks."""
    centred, present = shape.centred[shape.present], shape.present
    classes = len(centred)
    equiangular, spread = cosine_spread(centred)
    variance = trace[present] / shape.count[present]
    rows, columns = torch.triu_indices(classes, classes, 1, device=centred.device)
    distance = squared_distances(centred)[rows, columns]
    values = shape.values
    return {
        "nc1_rank": torch.tensor(float(len(shape.basis)), dtype=torch.float64, device=centred.device),
        "trace_ratio": trace.sum() / shape.count.sum() / (centred.square().sum() / classes),
        "cdnv": ((variance[rows] + variance[columns]) / (2 * distance)).mean(),
        "nc2_equinorm": equinorm(centred),
        "nc2_equiangularity": equiangular,
        "nc2_cosine_std": spread,
        "etf_distance": 1 - values.sum() ** 2 / ((classes - 1) * values.square().sum()),
        "stable_rank": stable_rank(values),
        "effective_rank": effective_rank(values),
    }


def of_classifier(shape: Geometry, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """What the last layer tells, alone (NC0, NC2) and against the class means (NC3)."""
    classes = len(weight)
    equiangular, spread = cosine_spread(weight)
    gram = weight @ weight.T
    simplex = torch.eye(classes, dtype=weight.dtype, device=weight.device) - 1 / classes
    here, centred = weight[shape.present], shape.centred[shape.present]
    return {
        "nc0": weight.sum(0).square().sum() / classes,
        "nc2_weight_equinorm": equinorm(weight),
        "nc2_weight_equiangularity": equiangular,
        "nc2_weight_cosine_std": spread,
        "nc2_weight_gram": (gram / gram.norm() - simplex / (classes - 1) ** 0.5).norm(),
        "nc3": (here / here.norm() - centred / centred.norm()).norm(),
        "nc3_bias": (weight @ shape.global_mean + bias).norm(),
    }


def of_scatter(shape: Geometry, scatter: Tensor) -> dict[str, Tensor]:
    """NC1 and the ranks of the within-class scatter (d, d)."""
    along = ((shape.basis @ scatter) * shape.basis).sum(1)
    eigenvalues = torch.linalg.eigvalsh(scatter).clamp_min(0)
    return {
        "nc1": nc1(shape, along),
        "within_stable_rank": stable_rank(eigenvalues),
        "within_effective_rank": effective_rank(eigenvalues),
    }


def nc1(shape: Geometry, along: Tensor) -> Tensor:
    """tr(Σ_W Σ_B⁺)/C from the within-class scatter along each basis vector (r,)."""
    if not len(along):
        return torch.full((), torch.nan, dtype=torch.float64, device=along.device)
    return (along / shape.values[: len(along)].square()).sum() / shape.count.sum()


def of_second_pass(shape: Geometry, sums: SecondPass) -> dict[str, Tensor]:
    """Cosines within and between classes, and the nearest-class-centre accuracy."""
    mean_unit = sums.units[shape.present] / shape.count[shape.present][:, None]
    intra = mean_unit.square().sum(1)
    inter = mean_unit @ mean_unit.T
    pairs = inter[~torch.eye(len(inter), dtype=torch.bool, device=inter.device)]
    found = {
        "intra_cosine": intra.mean(),
        "intra_cosine_min": intra.amin(),
        "intra_cosine_max": intra.amax(),
        "ncc_accuracy": sums.nearest.sum() / sums.count.sum(),
    }
    if len(pairs):
        found |= {
            "inter_cosine": pairs.mean(),
            "inter_cosine_min": pairs.amin(),
            "inter_cosine_max": pairs.amax(),
        }
    return found


def of_decisions(sums: SecondPass, margins: Tensor) -> dict[str, Tensor]:
    """NC4, accuracy, and the margins' mean, least value and quantiles, raw and normalised."""
    total = sums.count.sum()
    found = {"nc4": sums.disagree.sum() / total, "accuracy": sums.correct.sum() / total}
    for name, column in zip(("margin", "normalized_margin"), margins.unbind(1), strict=True):
        found |= {f"{name}_mean": column.mean(), f"{name}_min": column.amin()}
        found |= {f"{name}_{key}": quantile(column, q) for key, q in _QUANTILES.items()}
    return found


def quantile(values: Tensor, q: float) -> Tensor:
    """Linear-interpolation quantile of any number of values (torch.quantile stops at 16 million)."""
    place = q * (len(values) - 1)
    low = int(place)
    ordered = values.sort().values
    return torch.lerp(ordered[low], ordered[min(low + 1, len(values) - 1)], place - low)
