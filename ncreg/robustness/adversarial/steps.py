"""The parts of a gradient attack: what is raised, in which direction, and the ball that must not be left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isfinite
from numbers import Real
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from ncreg._checks import check_word
from ncreg.robustness._inputs import Model, check_logits

Norm = Literal["linf", "l2"]
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
    """What the attack of that name raises, one number an image.

    Raises:
        ValueError: no such loss.
    """
    check_word("loss", name, _LOSSES)
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
    """No parameter of the module (or of a module's bound method) asks for a gradient meanwhile: half the backward."""
    owner = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    learned = [p for p in owner.parameters() if p.requires_grad] if isinstance(owner, nn.Module) else []
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


def lift(logits: Tensor) -> Tensor:
    """At least float32: half-precision margins tie."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def gradient(model: Model, images: Images, objective: Callable[[Rows], Scalars]) -> tuple[Images, Rows]:
    """Gradient with respect to the images, and the logits; zero where there is none, or one that is not finite."""
    with torch.enable_grad():
        x = images.detach().clone().requires_grad_()
        logits = lift(model(x))
        total = objective(logits).sum()
        grad = torch.autograd.grad(total, x, allow_unused=True)[0] if total.requires_grad else None
    grad = torch.zeros_like(images) if grad is None else grad.nan_to_num(0, 0, 0)
    return grad, logits.detach()


def per_image(values: Shaped[Tensor, " batch"]) -> Shaped[Tensor, "batch 1 1 1"]:
    """One number an image, to go with images."""
    return values[:, None, None, None]


def length(rows: Tensor) -> Scalars:
    """Euclidean length of each image in float64; squares of tiny gradients do not underflow."""
    return torch.linalg.vector_norm(rows.flatten(1).double(), dim=1)


def size_in(norm: Norm, delta: Tensor) -> Scalars:
    """How far each image was moved, in float64."""
    return length(delta) if norm == "l2" else delta.flatten(1).double().abs().amax(1)


def steepest(grad: Images, norm: Norm) -> Images:
    """The unit step that raises the objective most: its sign, or the gradient over its own length; 0 stays 0."""
    if norm == "linf":
        return grad.sign()
    size = length(grad)
    return (grad.double() / per_image(torch.where(size > 0, size, 1))).to(grad.dtype)


def project(x: Images, centre: Images, radius: Scalars, norm: Norm) -> Images:
    """The point of the ball around `centre`, cut with [0, 1], next to x: within it exactly, also after rounding.

    For L2 the radius is shortened by 16 units of rounding, so that its length measured in x's own precision agrees.
    """
    anchor = centre.double()
    delta = x.double() - anchor
    limit = _round_down(radius.double(), x.dtype)
    if norm == "linf":
        delta = torch.minimum(torch.maximum(delta, -per_image(limit)), per_image(limit))
    else:
        limit = limit * (1 - 16 * torch.finfo(x.dtype).eps)
        size = length(delta)
        delta = delta * per_image(torch.where(size > limit, limit / torch.where(size > 0, size, 1), 1))
    near = (anchor + delta).clamp(0, 1).to(x.dtype)
    beyond = (near.double() - anchor).abs() > delta.abs()
    return torch.where(beyond, torch.nextafter(near, centre), near)


def _round_down(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest number of `dtype` that is not above the value: distances round to at most this one."""
    near = value.to(dtype)
    below = torch.nextafter(near, torch.full_like(near, -torch.inf))
    return torch.where(near.double() > value, below, near).double().clamp_min(0)


def random_start(images: Images, radius: Scalars, norm: Norm, generator: torch.Generator) -> Images:
    """A point drawn evenly from the ball, then cut to [0, 1]; drawn on the CPU, so the same on every device."""
    shape = images.shape
    if norm == "linf":
        noise = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu") * 2 - 1
    else:
        noise = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        depth = torch.rand(len(images), generator=generator, dtype=torch.float64, device="cpu") ** (
            1 / images[0].numel()
        )
        noise = noise * per_image(depth / length(noise))
    scaled = images.double() + noise.to(images.device) * per_image(radius.double())
    return project(scaled.to(images.dtype), images, radius, norm)


def ascend(
    model: Model,
    images: Images,
    target: Int[Tensor, " batch"],
    radius: Scalars,
    *,
    norm: Norm,
    loss: Loss,
    steps: int,
    step: Scalars,
    start: Images,
) -> tuple[Images, Scalars]:
    """Projected steepest ascent from `start`: of all points visited the one with the lowest margin, and that margin."""
    raised = loss_of(loss)
    x, best = start, start
    lowest = torch.full((len(images),), torch.inf, dtype=torch.float64, device=images.device)
    finite = torch.ones((), dtype=torch.bool, device=images.device)
    for number in range(steps + 1):
        if number < steps:
            grad, logits = gradient(model, x, lambda z: raised(z, target))
        else:
            with torch.no_grad():
                grad, logits = x, lift(model(x))
        margin = logit_margin(logits, target).double()
        finite = finite & logits.isfinite().all()
        best = torch.where(per_image(margin < lowest), x, best)
        lowest = torch.minimum(lowest, margin)
        if number < steps:
            x = project(x + per_image(step).to(x.dtype) * steepest(grad, norm), images, radius, norm)
    if not bool(finite):
        check_logits(torch.full((1, 2), torch.nan, device="cpu"))  # says so in the one wording
    return best, lowest


def check_epsilon(epsilon: float, norm: Norm) -> float:
    """A radius in units of images in [0, 1]: finite, at least 0, and at most 1 in L∞."""
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm must be 'linf' or 'l2', got {norm!r}")
    if isinstance(epsilon, bool) or not isinstance(epsilon, Real):
        raise TypeError(f"epsilon must be a number, got {epsilon!r}")
    if not (isfinite(epsilon) and epsilon >= 0):
        raise ValueError(f"epsilon={epsilon} must be finite and at least 0")
    if norm == "linf" and epsilon > 1:
        raise ValueError(f"epsilon={epsilon} is in units of images in [0, 1], at most 1 in L∞: {epsilon}/255?")
    return float(epsilon)
