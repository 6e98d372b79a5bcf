"""NC5: how orthogonal the mean out-of-distribution feature is to the class means."""

from __future__ import annotations

from jaxtyping import Float, Integer
from torch import Tensor

from ncreg._checks import check_flag
from ncreg._features import NotDefined, check_all_present, check_features, check_indices, class_means


def ood_orthogonality(
    features: Float[Tensor, "train dim"],
    target: Integer[Tensor, " train"],
    ood_features: Float[Tensor, "ood dim"],
    *,
    centre: bool = False,
) -> float:
    """NC5 = mean over c of |cos(μ_c, μ_OOD)|: 0 where the mean OOD feature is orthogonal to every class mean.

    Source: Ammar et al., ICLR 2024 (arXiv 2310.06823).

    Args:
        features: of training images.
        target: their classes.
        ood_features: of out-of-distribution images.
        centre: measure from the unweighted mean of the class means instead of the origin. Post-ReLU features need it
            to say anything: none of their cosines is negative.

    Raises:
        ValueError: shapes that do not fit, a class without a sample, features not finite, a mean of length 0.

    Example:
        >>> import torch
        >>> ood_orthogonality(torch.eye(2), torch.tensor([0, 1]), torch.tensor([[3.0, 4.0]]))  # cosines 0.6 and 0.8
        0.7
    """
    rows = check_features("features", features)
    labels = check_indices("target", target, len(rows))
    means = class_means(rows, labels, check_all_present("target", labels, int(labels.max()) + 1))
    return nc5_of(
        means, check_features("ood_features", ood_features, rows.shape[1]), centre=check_flag("centre", centre)
    )


def nc5_of(means: Float[Tensor, "classes dim"], ood_features: Float[Tensor, "ood dim"], *, centre: bool) -> float:
    """`ood_orthogonality` of class means at hand."""
    other = ood_features.mean(0)
    origin: Float[Tensor, " dim"] | float = means.mean(0) if centre else 0.0
    return float(_cosines(means - origin, other - origin).abs().mean())


def _cosines(means: Float[Tensor, "classes dim"], other: Float[Tensor, " dim"]) -> Float[Tensor, " classes"]:
    lengths = means.norm(dim=1) * other.norm()
    if not bool((lengths > 0).all()):
        raise NotDefined("NC5: a class mean or the mean OOD feature has length 0, so it has no direction")
    return (means @ other) / lengths
