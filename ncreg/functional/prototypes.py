"""Losses that pull each feature to the vector of its own class."""

from jaxtyping import Float, Integer
from torch import Tensor

from ncreg.functional._inputs import check_labels, check_rows, full_precision, unit_rows


def dot_regression_loss(
    features: Float[Tensor, "batch dim"],
    target: Integer[Tensor, " batch"],
    weight: Float[Tensor, "classes dim"],
    *,
    normalize: bool = True,
    length: float = 1.0,
    reduction: str = "mean",
) -> Float[Tensor, ""] | Float[Tensor, " batch"]:
    """½(cos θ − 1)², θ between h and w_y: pulls to the own class vector, pushes from none.

    With lengths: (1/2ℓ)(w_y · h − ℓ)², ℓ = √(E_W E_H) the dot product aimed at.

    Args:
        features: h.
        target: class indices in [0, C).
        weight: W, one class vector a row, usually a fixed simplex.
        normalize: scale h and w to unit length (then to a product of ℓ) first.
        length: ℓ.
        reduction: "mean", "sum" or "none" (a value a sample).

    Raises:
        ValueError, TypeError: on shapes, types or labels that do not fit.

    Source: Yang et al., "Inducing Neural Collapse in Imbalanced Learning: Do We Really Need a Learnable Classifier
    at the End of Deep Neural Network?", NeurIPS 2022 (arXiv 2203.09081).

    >>> import torch
    >>> dot_regression_loss(torch.tensor([[0.0, 2.0]]), torch.tensor([1]), torch.eye(2))
    tensor(0.)
    """
    check_rows("features", features)
    check_rows("weight", weight, features.shape[1])
    target = check_labels(target, features, len(weight))
    if length <= 0:
        raise ValueError(f"length={length}: the dot product aimed at must be positive")
    own = weight.index_select(0, target)
    scale = unit_rows if normalize else full_precision
    dots = (scale(features) * scale(own).to(features.device)).sum(1)
    gap = length * (dots - 1) if normalize else dots - length
    loss = gap.square() / (2 * length)
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss
