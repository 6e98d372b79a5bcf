"""Multinomial logistic regression on standardised features, in float64 on the CPU, by L-BFGS."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from ncreg._checks import check_positive
from ncreg._features import check_all_present, check_features, check_indices, feature_scale
from ncreg._readable import readable


@dataclass(frozen=True)
class LinearProbe:
    """Logits W·(h − mean)/scale + b, float64.

    Attributes:
        weight: W (C, d).
        bias: b (C,).
        mean: of each feature over the samples it was fitted to (d,).
        scale: their standard deviations (d,), 1 where a feature is constant.
        l2: weight of ½‖W‖² beside the mean cross-entropy.
        converged: whether every entry of the gradient came below 1e-6.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor
    l2: float
    converged: bool

    __str__ = readable

    def __call__(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch classes"]:
        """Logits of features, taken as data: no gradient goes back to them."""
        rows = check_features("features", features, len(self.mean))
        return ((rows - self.mean) / self.scale) @ self.weight.T + self.bias


def fit_linear_probe(features: Float[Tensor, "train dim"], target: Integer[Tensor, " train"], l2: float) -> LinearProbe:
    """Multinomial logistic regression: min over W, b of the mean cross-entropy + (l2/2)‖W‖², by L-BFGS.

    The features are standardised first, so that l2 means the same whatever their scale. Equal to scikit-learn's
    `LogisticRegression(C=1/(l2·N))` on standardised features (C=2/(l2·N) with two classes, where it has one vector in
    place of two); the bias is not penalised.

    Args:
        features: of the training samples.
        target: their classes, each of 0 … C−1 present.
        l2: weight of the penalty, above 0.

    Raises:
        TypeError: no tensors of the right kind.
        ValueError: shapes that do not fit, a class without a sample, features not finite, l2 not above 0.

    Example:
        >>> probe = fit_linear_probe(torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1]), l2=0.1)
        >>> probe(torch.tensor([[2.0]])).argmax(1)
        tensor([1])
    """
    rows, labels, classes = labelled("features", features, "target", target)
    check_positive("l2", l2)
    # An error of the weights is at most the gradient over l2.
    return fitted_probe(rows, labels, classes, l2, tolerance=max(1e-10, min(1e-8, 1e-6 * l2)))


def fitted_probe(
    rows: Tensor, labels: Tensor, classes: int, l2: float, *, tolerance: float, start: LinearProbe | None = None
) -> LinearProbe:
    """The probe of checked samples, to a gradient of `tolerance` in every entry, from another one where given."""
    mean, scale = rows.mean(0), feature_scale(rows)
    rows = (rows - mean) / scale
    weight = rows.new_zeros(classes, rows.shape[1]) if start is None else start.weight
    bias = rows.new_zeros(classes) if start is None else start.bias
    with torch.inference_mode(False), torch.enable_grad():  # clones outside it can take gradients
        weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        converged = _minimise(rows.clone(), labels.clone(), l2, weight, bias, tolerance)
    bias = bias.detach() - bias.detach().mean()  # any shift is as good: this one is scikit-learn's
    return LinearProbe(weight.detach(), bias, mean, scale, float(l2), converged)


def labelled(features_name: str, features: Tensor, name: str, target: Tensor) -> tuple[Tensor, Tensor, int]:
    """Features and classes of labelled samples, checked, and how many classes there are."""
    rows = check_features(features_name, features)
    labels = check_indices(name, target, len(rows))
    classes = int(labels.max()) + 1
    if classes < 2:
        raise ValueError(f"{name} holds class 0 alone: a probe needs at least 2 classes")
    check_all_present(name, labels, classes)
    return rows, labels, classes


def _minimise(rows: Tensor, labels: Tensor, l2: float, weight: Tensor, bias: Tensor, tolerance: float) -> bool:
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=1000,
        max_eval=2000,
        tolerance_grad=tolerance,
        tolerance_change=1e-16,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(rows @ weight.T + bias, labels) + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    loss()
    return all(float(part.grad.abs().max()) < 1e-6 for part in (weight, bias) if part.grad is not None)
