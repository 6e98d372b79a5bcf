"""Functions of the logits that an attack raises, and their gradient with respect to the images."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ncreg._checks import check_choice
from ncreg.numerics import at_least_float32
from ncreg.robustness._inputs import Model

Loss = Literal["cross_entropy", "margin", "dlr"]
Images = Float[Tensor, "batch channels height width"]
Rows = Float[Tensor, "batch classes"]
Scalars = Float[Tensor, " batch"]


def logit_margin(logits: Rows, target: Int[Tensor, " batch"]) -> Scalars:
    """z_y − max_{j≠y} z_j, negative where another class wins (Carlini & Wagner 2017, arXiv 1608.04644).

    Example:
        >>> logit_margin(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]))
        tensor([1.])
    """
    own = logits.gather(1, target[:, None])
    others = logits.scatter(1, target[:, None], -torch.inf)
    return own.squeeze(1) - others.amax(1)


def loss_of(name: Loss) -> Callable[[Rows, Int[Tensor, " batch"]], Scalars]:
    """The function that an attack with this `loss` raises: logits and target to one number an image.

    Raises:
        ValueError: no such loss.
    """
    check_choice("loss", name, _LOSSES)
    return _LOSSES[name]


def _cross_entropy(logits: Rows, target: Int[Tensor, " batch"]) -> Scalars:
    return F.cross_entropy(logits, target, reduction="none")


def _negative_margin(logits: Rows, target: Int[Tensor, " batch"]) -> Scalars:
    # The row's own spread, held constant, keeps gradients of tiny or huge logits in the middle of the number range.
    spread = (logits.amax(1) - logits.amin(1)).detach()
    return -logit_margin(logits, target) / torch.where(spread > 0, spread, 1)


def _dlr(logits: Rows, target: Int[Tensor, " batch"]) -> Scalars:
    if logits.shape[1] < 3:
        raise ValueError(f"loss='dlr' needs at least 3 classes, got {logits.shape[1]}: use loss='margin'")
    top = logits.topk(3, dim=1).values
    spread = top[:, 0] - top[:, 2]
    return -logit_margin(logits, target) / torch.where(spread > 0, spread, 1)


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
    """Gradient with respect to the images, zero where there is none or it is not finite; and the logits."""
    with torch.enable_grad():
        x = images.detach().clone().requires_grad_()
        logits = at_least_float32(model(x))
        total = objective(logits).sum()
        grad = torch.autograd.grad(total, x, allow_unused=True)[0] if total.requires_grad else None
    grad = torch.zeros_like(images) if grad is None else grad.nan_to_num(0, 0, 0)
    return grad, logits.detach()
