"""Functions of the logits that an attack raises, and their gradient with respect to the images."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from ncreg._checks import check_choice, described
from ncreg.losses.costs import expected_cost_loss
from ncreg.numerics import at_least_float32
from ncreg.robustness._inputs import Model, check_target, outputs_of

Loss = Literal["cross_entropy", "margin", "dlr", "cost", "cost_margin"]
Images = Float[Tensor, "batch channels height width"]
Rows = Float[Tensor, "batch classes"]
Scalars = Float[Tensor, " batch"]


def logit_margin(logits: Rows, target: Integer[Tensor, " batch"]) -> Scalars:
    """z_y − max_{j≠y} z_j, negative where another class wins (Carlini & Wagner 2017, arXiv 1608.04644).

    Raises:
        TypeError: logits that are no floating-point tensor, a target that holds no integers.
        ValueError: shapes that do not fit, fewer than two classes, a class out of range.

    Example:
        >>> logit_margin(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]))
        tensor([1.])
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = logits.dtype if isinstance(logits, Tensor) else described(logits)
        raise TypeError(f"logits must be a floating-point tensor (batch, classes), got {got}")
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must be (batch, classes) with 2 or more classes, got shape {tuple(logits.shape)}")
    return margin_of(logits, check_target(target, logits, logits.shape[1]))


def margin_of(logits: Rows, target: Int[Tensor, " batch"]) -> Scalars:
    """`logit_margin` of checked input."""
    own = logits.gather(1, target[:, None])
    others = logits.scatter(1, target[:, None], -torch.inf)
    return own.squeeze(1) - others.amax(1)


def expected_cost(
    logits: Rows, target: Integer[Tensor, " batch"], cost: Float[Tensor, "classes classes"]
) -> Float[Tensor, " batch"]:
    """Σ_j M[y,j]·softmax(z)_j: the cost of guessing by the model's probabilities, which is a transport distance.

    With a one-hot target every plan is forced, so it is the Wasserstein distance under M, with entropic regularisation
    as well. M = 11ᵀ − I gives 1 − p_y. Source: Terzi, Susto & Chaudhari, "Directional Adversarial Training for Cost
    Sensitive Deep Learning Classification Applications" (arXiv 1910.03468). `ncreg.functional.expected_cost_loss` of
    each sample: arguments and errors are its own.

    Example:
        >>> expected_cost(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([[0.0, 4.0], [1.0, 0.0]]))
        tensor([2.])
    """
    return expected_cost_loss(logits, target, cost, reduction="none")


def loss_of(
    name: Loss, cost: Float[Tensor, "classes classes"] | None = None
) -> Callable[[Rows, Int[Tensor, " batch"]], Scalars]:
    """The function that an attack with this `loss` raises: logits and target to one number an image.

    Raises:
        ValueError: no such loss, one on costs without these, or costs for another one.
    """
    check_choice("loss", name, (*_LOSSES, *_ON_COSTS))
    if (cost is not None) != (name in _ON_COSTS):
        raise ValueError(
            f"loss={name!r} {'takes no cost' if cost is not None else 'needs cost='}: a matrix of costs goes "
            "with loss='cost' and loss='cost_margin'"
        )
    return _LOSSES[name] if cost is None else partial(_ON_COSTS[name], cost=cost)


def _cross_entropy(logits: Rows, target: Int[Tensor, " batch"]) -> Scalars:
    return F.cross_entropy(logits, target, reduction="none")


def _negative_margin(logits: Rows, target: Int[Tensor, " batch"]) -> Scalars:
    # The row's own spread, held constant, keeps gradients of tiny or huge logits in the middle of the number range.
    spread = (logits.amax(1) - logits.amin(1)).detach()
    return -margin_of(logits, target) / torch.where(spread > 0, spread, 1)


def _dlr(logits: Rows, target: Int[Tensor, " batch"]) -> Scalars:
    if logits.shape[1] < 3:
        raise ValueError(f"loss='dlr' needs at least 3 classes, got {logits.shape[1]}: use loss='margin'")
    top = logits.topk(3, dim=1).values
    spread = top[:, 0] - top[:, 2]
    return -margin_of(logits, target) / torch.where(spread > 0, spread, 1)


def _cost_margin(logits: Rows, target: Int[Tensor, " batch"], cost: Float[Tensor, "classes classes"]) -> Scalars:
    """Σ_j M[y,j](z_j − z_y)₊, and before any such class leads the lead of the nearest one, below 0."""
    prices = cost.to(logits)[target]
    leads = logits - logits.gather(1, target[:, None])
    nearest = leads.masked_fill(prices == 0, -torch.inf).amax(1).clamp(max=0)
    nearest = torch.where(nearest.isfinite(), nearest, 0)  # a class that costs nothing to miss
    spread = (logits.amax(1) - logits.amin(1)).detach()
    return ((prices * leads.clamp(min=0)).sum(1) + nearest) / torch.where(spread > 0, spread, 1)


_ON_COSTS = {"cost": expected_cost, "cost_margin": _cost_margin}
_LOSSES = {"cross_entropy": _cross_entropy, "margin": _negative_margin, "dlr": _dlr}


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Switch off the gradients of the model's parameters: an attack needs those of the images alone."""
    owner = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    learned = [p for p in owner.parameters() if p.requires_grad] if isinstance(owner, nn.Module) else []
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


def gradient(model: Model, images: Images, objective: Callable[[Rows], Scalars]) -> tuple[Images, Rows]:
    """Gradient with respect to the images, zero where there is none or it is not finite; and the logits.

    Warns where no path of autograd leads from the logits to the images.
    """
    with torch.enable_grad():
        x = images.detach().clone().requires_grad_()
        logits = at_least_float32(outputs_of(model, x))
        total = objective(logits).sum()
        grad = torch.autograd.grad(total, x, allow_unused=True)[0] if total.requires_grad else None
    if grad is None:
        warn_of_no_gradient()
    grad = torch.zeros_like(images) if grad is None else grad.nan_to_num(0, 0, 0)
    return grad, logits.detach()


def warn_of_no_gradient() -> None:
    """Say that an attack by gradients stands still on this model; Python shows it once a place."""
    warnings.warn(
        "no gradient leads from the logits to the images (the model detaches, rounds, or runs under torch.no_grad): "
        "attacks that follow gradients stand still, and the accuracy they leave says nothing; give a model that "
        "autograd can follow, or use random_search, which needs no gradient",
        stacklevel=3,
    )
