"""Float64 reference for the measures of collapse, from their definitions.

Explicit d×d matrices, explicit pairs and explicit samples, in numpy and scipy; slow on purpose, and sharing no
code and no algebra with ncreg.metrics.
"""

from itertools import combinations, permutations

import numpy as np
from scipy import linalg


def class_means(features, target, classes):
    return np.stack([features[target == c].mean(0) for c in classes])


def covariances(features, target, classes):
    """Σ_W over samples and Σ_B over classes, as sums of outer products."""
    means = class_means(features, target, classes)
    dim = features.shape[1]
    within, between = np.zeros((dim, dim)), np.zeros((dim, dim))
    for c, mean in zip(classes, means, strict=True):
        centred = features[target == c] - mean
        # the mean of rounded deviations is taken off again: an offset must not leave a trace
        centred = centred - centred.mean(0)
        within += sum(np.outer(row, row) for row in centred)
    for mean in means:
        step = mean - means.mean(0)
        between += np.outer(step, step)
    return within / len(features), between / len(classes)


def nc1(features, target, classes):
    """tr(Σ_W Σ_B⁺)/C and the rank of Σ_B."""
    within, between = covariances(features, target, classes)
    cutoff = max(between.shape[0], len(classes)) * np.finfo(float).eps
    inverse, rank = linalg.pinvh(between, rtol=cutoff, atol=0.0, return_rank=True)
    return np.trace(within @ inverse) / len(classes), rank


def pair_cosines(rows):
    return np.array([a @ b / (linalg.norm(a) * linalg.norm(b)) for a, b in permutations(rows, 2)])


def equinorm(rows):
    norms = [linalg.norm(row) for row in rows]
    return np.std(norms) / np.mean(norms)


def ranks(matrix):
    """Stable rank and effective rank."""
    values = linalg.svdvals(matrix)
    share = values / values.sum()
    share = share[share > 0]
    return linalg.norm(matrix) ** 2 / linalg.norm(matrix, 2) ** 2, np.exp(-(share * np.log(share)).sum())


def etf_distance(centred):
    """1 − cos² of the angle to the best-fitting simplex, searched by an orthogonal Procrustes problem."""
    classes, dim = centred.shape
    simplex = np.eye(classes) - 1 / classes
    wide = np.zeros((classes, max(classes, dim)))
    wide[:, :dim] = centred
    rotation, _ = linalg.orthogonal_procrustes(np.pad(simplex, ((0, 0), (0, wide.shape[1] - classes))), wide)
    fitted = np.pad(simplex, ((0, 0), (0, wide.shape[1] - classes))) @ rotation
    cosine = (fitted * wide).sum() / (linalg.norm(fitted) * linalg.norm(wide))
    return 1 - cosine**2


def neural_collapse(features, target, weight=None, bias=None, *, center="class_means"):
    """Every measure of ncreg.metrics.NeuralCollapse, by the same keys."""
    features, target = np.asarray(features, dtype=np.float64), np.asarray(target)
    classes = np.unique(target)
    number = len(classes)
    means = class_means(features, target, classes)
    centre = means.mean(0)
    centred = means - centre
    within, between = covariances(features, target, classes)
    value, rank = nc1(features, target, classes)
    variance = [
        np.mean([linalg.norm(h - m) ** 2 for h in features[target == c]]) for c, m in zip(classes, means, strict=True)
    ]
    cosines = pair_cosines(centred)
    found = {
        "nc1": value,
        "nc1_rank": rank,
        "trace_ratio": np.trace(within) / np.trace(between),
        "cdnv": np.mean(
            [
                (variance[i] + variance[j]) / (2 * linalg.norm(means[i] - means[j]) ** 2)
                for i, j in combinations(range(number), 2)
            ]
        ),
        "nc2_equinorm": equinorm(centred),
        "nc2_equiangularity": np.abs(cosines + 1 / (number - 1)).mean(),
        "nc2_cosine_std": cosines.std(),
        "etf_distance": etf_distance(centred),
    }
    found["stable_rank"], found["effective_rank"] = ranks(centred)
    found["within_stable_rank"], found["within_effective_rank"] = ranks(within)
    found |= cosines_by_pairs(features, target, classes, centre if center == "class_means" else features.mean(0))
    nearest = np.array([classes[np.argmin([linalg.norm(h - m) for m in means])] for h in features])
    found["ncc_accuracy"] = np.mean(nearest == target)
    if weight is not None:
        found |= _classifier(features, target, np.asarray(weight, float), np.asarray(bias, float), classes, nearest)
    return found


def cosines_by_pairs(features, target, classes, centre):
    """Intra- and inter-class cosines as means over all pairs of samples."""
    unit = np.array([(h - centre) / linalg.norm(h - centre) for h in features])
    groups = [unit[target == c] for c in classes]
    intra = [np.mean([u @ v for u in group for v in group]) for group in groups]
    inter = [np.mean([u @ v for u in a for v in b]) for a, b in permutations(groups, 2)]
    return {
        "intra_cosine": np.mean(intra),
        "intra_cosine_min": np.min(intra),
        "intra_cosine_max": np.max(intra),
        "inter_cosine": np.mean(inter),
        "inter_cosine_min": np.min(inter),
        "inter_cosine_max": np.max(inter),
    }


def _classifier(features, target, weight, bias, classes, nearest):
    means = class_means(features, target, classes)
    centre = means.mean(0)
    number = len(weight)
    cosines = pair_cosines(weight)
    gram = weight @ weight.T
    simplex = (np.eye(number) - np.ones((number, number)) / number) / np.sqrt(number - 1)
    rows, centred = weight[classes], means - centre
    found = {
        "nc0": linalg.norm(weight.T @ np.ones(number)) ** 2 / number,
        "nc2_weight_equinorm": equinorm(weight),
        "nc2_weight_equiangularity": np.abs(cosines + 1 / (number - 1)).mean(),
        "nc2_weight_cosine_std": cosines.std(),
        "nc2_weight_gram": linalg.norm(gram / linalg.norm(gram) - simplex),
        "nc3": linalg.norm(rows / linalg.norm(rows) - centred / linalg.norm(centred)),
        "nc3_bias": linalg.norm(weight @ centre + bias),
    }
    logits = np.array([weight @ h + bias for h in features])
    chosen = logits.argmax(1)
    margin = np.array([z[y] - max(z[k] for k in range(number) if k != y) for z, y in zip(logits, target, strict=True)])
    length = np.sqrt(np.mean([w @ w for w in weight]))
    scaled = np.array([m / (linalg.norm(h) * length) for m, h in zip(margin, features, strict=True)])
    found |= {"nc4": np.mean(chosen != nearest), "classifier_accuracy": np.mean(chosen == target)}
    for name, values in (("margin", margin), ("normalized_margin", scaled)):
        found |= {f"{name}_mean": values.mean(), f"{name}_min": values.min()}
        found |= {f"{name}_{key}": np.quantile(values, q) for key, q in (("q01", 0.01), ("q10", 0.1), ("q50", 0.5))}
    return found
