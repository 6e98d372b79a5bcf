"""Out-of-distribution scores from stored features and logits: one number an image, higher = more in-distribution.

Features and logits come from one forward pass in eval mode, training features from clean training images. All is
computed in float64 on the CPU. MSP, max-logit, energy and kNN are pytorch-ood's, with its sign turned (there, higher
is more out-of-distribution). Two of its detectors are not used. Its `Mahalanobis` inverts a float32 sum of squares
plus a fixed 1e-6, which on fewer samples than features gives negative squared distances. Its `ViM` recomputes the
logits as Wh + b, which is not what a head that normalises or scales its features does, and finds the residual in
float32, below whose rounding the residual of collapsed features lies.
"""

from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from ncreg._checks import check_flag, check_integer, check_non_negative, check_num_classes, check_positive, described
from ncreg._features import (
    NotDefined,
    check_all_present,
    check_features,
    check_indices,
    check_varied,
    class_means,
    feature_scale,
    least_distances,
)
from ncreg.numerics import exact
from ncreg.robustness._inputs import check_logits

NEIGHBOURS = 50
"""k of the nearest-neighbour score: of its authors for CIFAR-10."""

FLOOR = 1e-9
"""Mahalanobis: this fraction of the training features' mean variance is added to the variance in every direction."""


def _pytorch_ood() -> Any:
    try:
        return import_module("pytorch_ood.detector")
    except ImportError:
        raise ImportError(
            "this score needs pytorch-ood: pip install 'ncreg[robust]'; Mahalanobis, ViM and NECO do without"
        ) from None


def _exact(logits: Tensor, name: str = "logits") -> Float[Tensor, "batch classes"]:
    return exact(check_logits(logits, name=name))


def msp_score(logits: Float[Tensor, "batch classes"]) -> Float[Tensor, " batch"]:
    """Maximum softmax probability max_c softmax(z)_c.

    Source: Hendrycks & Gimpel, ICLR 2017 (arXiv 1610.02136).

    Raises:
        ValueError: logits that are not finite, or probabilities.

    Example:
        >>> msp_score(torch.tensor([[0.0, 0.0]]))
        tensor([0.5000], dtype=torch.float64)
    """
    return -_pytorch_ood().MaxSoftmax(None).predict_logits(_exact(logits))


def max_logit_score(logits: Float[Tensor, "batch classes"]) -> Float[Tensor, " batch"]:
    """The largest logit max_c z_c.

    Source: Hendrycks et al., ICML 2022 (arXiv 1911.11132).

    Raises:
        ValueError: logits that are not finite, or probabilities.

    Example:
        >>> max_logit_score(torch.tensor([[1.0, 3.0, -2.0]]))
        tensor([3.], dtype=torch.float64)
    """
    return -_pytorch_ood().MaxLogit(None).predict_logits(_exact(logits))


def energy_score(logits: Float[Tensor, "batch classes"], temperature: float = 1.0) -> Float[Tensor, " batch"]:
    """Negative energy T·ln Σ_c exp(z_c/T).

    Source: Liu et al., NeurIPS 2020 (arXiv 2010.03759).

    Raises:
        ValueError: logits that are not finite, or probabilities; a temperature that is not above 0.

    Example:
        >>> energy_score(torch.zeros(1, 4))  # ln 4
        tensor([1.3863], dtype=torch.float64)
    """
    check_positive("temperature", temperature)
    return -_pytorch_ood().EnergyBased(None, t=float(temperature)).predict_logits(_exact(logits))


def knn_score(
    features: Float[Tensor, "batch dim"], train_features: Float[Tensor, "train dim"], *, neighbours: int = NEIGHBOURS
) -> Float[Tensor, " batch"]:
    """−‖u − u_(k)‖: minus the distance to the k-th nearest training feature, all at unit length.

    A feature that is 0 throughout has no direction and stays 0: it is at distance 1 from every other feature.

    Source: Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022 (arXiv 2204.06507); k
    is 50 there for CIFAR-10.

    Args:
        features: of the images to score.
        train_features: of training images.
        neighbours: k.

    Raises:
        ValueError: fewer than k training features, shapes that do not fit, features that are not finite.

    Example:
        >>> train = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
        >>> knn_score(torch.tensor([[1.0, 0.0]]), train, neighbours=2)  # at a right angle: √2 away
        tensor([-1.4142], dtype=torch.float64)
    """
    train = check_features("train_features", train_features)
    rows = check_features("features", features, train.shape[1])
    if len(train) < check_integer("neighbours", neighbours, 1):
        raise NotDefined(f"neighbours={neighbours} but there are only {len(train)} training features: pass fewer")
    labels = torch.zeros(len(train), dtype=torch.int64, device="cpu")
    fitted = _pytorch_ood().KNN(None, k=neighbours).fit_features(_at_unit_size(train), labels)
    return -fitted.predict_features(_at_unit_size(rows))


def _at_unit_size(rows: Tensor) -> Tensor:
    """Each row over its largest |value|: KNN takes a length below 1e-12 for 1e-12, and squares end at 1e±154."""
    largest = rows.abs().amax(1, keepdim=True)
    return rows / torch.where(largest > 0, largest, 1)


def mahalanobis_score(
    features: Float[Tensor, "batch dim"],
    train_features: Float[Tensor, "train dim"],
    train_target: Integer[Tensor, " train"],
) -> Float[Tensor, " batch"]:
    """−min_c (h − μ_c)ᵀ Σ⁻¹ (h − μ_c), μ_c the class means and Σ = Σ_W + 1e-9·(tr Σ_T/d)·I.

    Σ_W is the within-class covariance that all classes share, Σ_T the total one. That addition keeps Σ regular on
    collapsed features (Σ_W → 0: the score becomes that of the nearest class mean), dead units and fewer samples than
    features; the score does not change with the features' scale.

    Source: Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks",
    NeurIPS 2018 (arXiv 1807.03888), without its input perturbation and its ensemble of layers.

    Args:
        features: of the images to score.
        train_features: of training images.
        train_target: class indices of the same training images.

    Raises:
        ValueError: shapes that do not fit, a class without a training sample, features not finite or all the same.

    Example:
        >>> train, target = torch.tensor([[-1.0], [1.0], [4.0], [6.0]]), torch.tensor([0, 0, 1, 1])  # means 0 and 5
        >>> mahalanobis_score(torch.tensor([[2.0]]), train, target)
        tensor([-4.0000], dtype=torch.float64)
    """
    train = check_features("train_features", train_features)
    target = check_indices("train_target", train_target, len(train))
    rows = check_features("features", features, train.shape[1])
    check_varied("train_features", train)
    counts = check_all_present("train_target", target, int(target.max()) + 1)
    means, anchor = class_means(train, target, counts), train.mean(0)
    within = train - means[target]
    covariance = within.T @ within / len(train)
    covariance.diagonal().add_(FLOOR * (train - anchor).square().mean())
    root = torch.linalg.cholesky(covariance)
    white, white_means = (
        torch.linalg.solve_triangular(root, (part - anchor).T, upper=False).T for part in (rows, means)
    )
    # Not ‖x‖² + ‖y‖² − 2xy: whitening makes lengths so large that the difference would be rounding.
    return -least_distances(white, white_means).square()


def vim_score(
    features: Float[Tensor, "batch dim"],
    logits: Float[Tensor, "batch classes"],
    train_features: Float[Tensor, "train dim"],
    train_logits: Float[Tensor, "train classes"],
    *,
    weight: Float[Tensor, "classes dim"] | None = None,
    bias: Float[Tensor, " classes"] | None = None,
    dim: int | None = None,
) -> Float[Tensor, " batch"]:
    """Energy ln Σ_c exp(z_c) − α·‖R(h − o)‖: less a virtual logit, the length outside the principal span.

    R projects out the `dim` principal directions of the training features around o = −W⁺b, the point where all logits
    are 0 (the origin for a head without bias), or nearest to it where class vectors depend on each other but for
    float32's rounding, as those of a simplex do, which sum to 0; α brings the mean virtual logit of training images to
    their mean largest logit, the mean length taken as at least float32's rounding, 1.2e-7 of the features' own.

    Source: Wang et al., "ViM: Out-Of-Distribution with Virtual-logit Matching", CVPR 2022 (arXiv 2203.10807).

    Args:
        features: of the images to score.
        logits: of the same images.
        train_features: of training images.
        train_logits: of the same training images.
        weight: the head's, needed with a bias alone.
        bias: the head's.
        dim: principal directions; None takes the paper's 1000 from 2048 features on and 512 from 768 on, else half
            of the features.

    Raises:
        ValueError: shapes that do not fit, values not finite, dim outside [1, features), training images whose largest
            logits are not above 0 in the mean.

    Example:
        >>> train = torch.tensor([[2.0, 0.5], [-2.0, -0.5], [2.0, -0.5], [-2.0, 0.5]])  # spread along the first axis
        >>> train_logits = torch.tensor([[1.0, -1.0]]).repeat(4, 1)  # α = 1/0.5
        >>> vim_score(torch.tensor([[2.0, 1.0]]), torch.zeros(1, 2), train, train_logits, dim=1)  # ln 2 − 2·1
        tensor([-1.3069], dtype=torch.float64)
    """
    train = check_features("train_features", train_features)
    rows = check_features("features", features, train.shape[1])
    z, train_z = _exact(logits), _exact(train_logits, "train_logits")
    for name, left, right in (("logits", z, rows), ("train_logits", train_z, train)):
        if len(left) != len(right):
            raise ValueError(f"{name} has {len(left)} rows where the features have {len(right)}")
    if z.shape[1] != train_z.shape[1]:
        raise ValueError(f"logits have {z.shape[1]} classes where train_logits have {train_z.shape[1]}")
    check_varied("train_features", train)
    dim = vim_dim(train.shape[1], dim)
    origin = _origin(weight, bias, train.shape[1])
    around = train - origin
    _, vectors = torch.linalg.eigh(around.T @ around / len(train))  # ascending
    rest = vectors[:, : train.shape[1] - dim]
    level = float(train_z.amax(1).mean())
    if not level > 0:
        raise NotDefined(
            f"ViM: the largest logits of training images are {level:.4g} in the mean and must be above 0 to scale a "
            "virtual logit (log-probabilities instead of logits?)"
        )
    length = float((around @ rest).norm(dim=1).mean())
    length = max(length, torch.finfo(torch.float32).eps * float(around.square().sum(1).mean().sqrt()))
    return z.logsumexp(1) - level / length * ((rows - origin) @ rest).norm(dim=1)


def vim_dim(features: int, dim: int | None) -> int:
    """The number of principal directions of `vim_score`."""
    if features < 2:
        raise NotDefined("ViM needs at least 2 features: one has no direction outside the principal ones")
    if dim is None:
        return 1000 if features >= 2048 else 512 if features >= 768 else features // 2
    if check_integer("dim", dim, 1) >= features:
        raise ValueError(f"dim={dim} principal directions of {features} features leave no residual: pass fewer")
    return dim


def _origin(weight: Tensor | None, bias: Tensor | None, dim: int) -> Tensor:
    if bias is None:
        return torch.zeros(dim, dtype=torch.float64, device="cpu")
    if weight is None:
        raise ValueError("bias is given without weight: both say where all logits are 0")
    w = check_features("weight", weight, dim)
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a tensor of shape ({len(w)},), got {described(bias)}")
    if bias.shape != (len(w),) or not bool(bias.isfinite().all()):
        raise ValueError(f"bias must be finite, of shape ({len(w)},), got {bias.tolist()}")
    # Class vectors that sum to 0 have a singular value that is this small, not 0.
    rounding = torch.finfo(torch.float32).eps * max(w.shape)
    return -torch.linalg.pinv(w, rtol=rounding) @ exact(bias)


def neco_score(
    features: Float[Tensor, "batch dim"],
    train_features: Float[Tensor, "train dim"],
    *,
    num_classes: int | None = None,
    dim: int | None = None,
    standardize: bool = False,
) -> Float[Tensor, " batch"]:
    """‖P(h − μ)‖ / ‖h − μ‖ in [0, 1], P onto the first `dim` principal directions of training features, μ their mean.

    Under neural collapse ID features lie in the C−1 dimensions of the class means, and OOD features across them (NC5).
    A feature exactly at μ scores 0.

    Source: Ammar et al., "NECO: NEural Collapse Based Out-of-distribution detection", ICLR 2024 (arXiv 2310.06823).
    The authors multiply by the largest logit for some architectures: multiply by `max_logit_score` for that.

    Args:
        features: of the images to score.
        train_features: of training images.
        num_classes: C, for the default `dim`.
        dim: principal directions; None takes C−1, or where the features are no more than that the fewest that hold
            90 % of the variance.
        standardize: divide each feature by its standard deviation first; the authors do where the features have not
            collapsed.

    Raises:
        ValueError: shapes that do not fit, features not finite or all the same, dim outside [1, features).

    Example:
        >>> train = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # spread along the first axis
        >>> neco_score(torch.tensor([[3.0, 4.0]]), train, num_classes=2)
        tensor([0.6000], dtype=torch.float64)
    """
    train = check_features("train_features", train_features)
    rows = check_features("features", features, train.shape[1])
    check_varied("train_features", train)
    centred, rows = train - train.mean(0), rows - train.mean(0)
    if check_flag("standardize", standardize):
        scale = feature_scale(train)
        centred, rows = centred / scale, rows / scale
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(train))  # ascending
    dim = neco_dim(values.flip(0), num_classes, dim)
    kept, length = (rows @ vectors[:, -dim:]).norm(dim=1), rows.norm(dim=1)
    return torch.where(length > 0, kept / length, 0.0)


def neco_dim(variances: Float[Tensor, " dim"], num_classes: int | None, dim: int | None) -> int:
    """The number of principal directions of `neco_score`, whose variances are given in descending order."""
    features = len(variances)
    if features < 2:
        raise NotDefined("NECO needs at least 2 features: with one, every score is 1")
    if dim is None and num_classes is None:
        raise ValueError("pass num_classes (dim is then C−1) or dim, the number of principal directions")
    if dim is None and num_classes is not None and num_classes - 1 < features:
        return check_num_classes(num_classes) - 1
    if dim is None:
        held = variances.cumsum(0) / variances.sum()
        return min(int((held < 0.9).sum()) + 1, features - 1)
    if check_integer("dim", dim, 1) >= features:
        raise ValueError(f"dim={dim} principal directions of {features} features leave nothing out: pass fewer")
    return dim


def nci_score(
    features: Float[Tensor, "batch dim"],
    logits: Float[Tensor, "batch classes"],
    train_features: Float[Tensor, "train dim"],
    weight: Float[Tensor, "classes dim"],
    *,
    alpha: float = 0.0,
) -> Float[Tensor, " batch"]:
    """w_ŷ·(h − μ)/‖h − μ‖ + α‖h‖₁, ŷ the predicted class, μ the mean of the training features.

    Under collapse a feature stands on its class vector, so the first term is ‖w_ŷ‖ for in-distribution images. The
    second tells features near the origin; a head on unit features puts no length into them in training, so leave α at 0
    there. A feature exactly at μ has a first term of 0.

    Source: Liu & Qin, "Detecting Out-of-Distribution through the Lens of Neural Collapse", CVPR 2025
    (arXiv 2311.01479).

    Args:
        features: of the images to score.
        logits: of the same images.
        train_features: of training images.
        weight: the head's, one class vector a row.
        alpha: α, to be chosen on validation data; pytorch-ood's default is 0 as well.

    Raises:
        ValueError: shapes that do not fit, values not finite, alpha below 0.

    Example:
        >>> h = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> nci_score(h, h, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.eye(2))
        tensor([1.0000, 1.0000, 0.7071], dtype=torch.float64)
    """
    train = check_features("train_features", train_features)
    rows, vectors = check_features("features", features, train.shape[1]), check_features("weight", weight)
    z = _exact(logits)
    if vectors.shape != (z.shape[1], train.shape[1]):
        raise ValueError(f"weight must have shape {(z.shape[1], train.shape[1])}, got {tuple(vectors.shape)}")
    if len(z) != len(rows):
        raise ValueError(f"logits has {len(z)} rows where the features have {len(rows)}")
    centred = rows - train.mean(0)
    length = centred.norm(dim=1)
    along = torch.linalg.vecdot(centred, vectors[z.argmax(1)])
    return torch.where(length > 0, along / length, 0.0) + check_non_negative("alpha", alpha) * rows.abs().sum(1)
