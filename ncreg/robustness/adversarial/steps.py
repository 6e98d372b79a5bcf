"""The step of projected gradient ascent (PGD): direction, projection and random start, for attacks and for training.

Attacks that measure robustness compute it in float64 and stay in the ball to the last bit. Training computes it in the
images' own precision, by `perturb`, because there its time counts and a rounding error of the radius doesn't.
"""

from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from ncreg._checks import check_choice, check_non_negative
from ncreg.numerics import at_least_float32
from ncreg.robustness._inputs import Model, check_logits, outputs_of
from ncreg.robustness.adversarial.objectives import (
    Images,
    Loss,
    Scalars,
    expected_cost,
    gradient,
    loss_of,
    margin_of,
)

Norm = Literal["linf", "l2"]
Radius = TypeVar("Radius", float, Tensor)


def per_image(values: Shaped[Tensor, " batch"]) -> Shaped[Tensor, "batch 1 1 1"]:
    """One number an image, to go with images."""
    return values[:, None, None, None]


def l2_length(rows: Tensor) -> Scalars:
    """Euclidean length of each image in float64; squares of tiny gradients do not underflow."""
    return torch.linalg.vector_norm(rows.flatten(1).double(), dim=1)


def fast_l2_length(rows: Tensor) -> Scalars:
    """Euclidean length of each image in its own precision and memory order, for training."""
    return torch.linalg.vector_norm(rows, dim=(1, 2, 3))


def size_of(change: Tensor, norm: Norm) -> Scalars:
    """Norm of each image's change, in float64."""
    return l2_length(change) if norm == "l2" else change.flatten(1).double().abs().amax(1)


def default_step_size(radius: Radius, steps: int) -> Radius:
    """2.5·radius/steps (Madry et al. 2018, arXiv 1706.06083): far enough to cross the ball and to turn back."""
    return 2.5 * radius / steps


def ascent_direction(grad: Images, norm: Norm, length: Callable[[Tensor], Scalars] = l2_length) -> Images:
    """The unit step that raises the objective most: the gradient's sign, or the gradient over its length; 0 stays 0."""
    if norm == "linf":
        return grad.sign()
    size = length(grad)
    return (grad.to(size.dtype) / per_image(size.clamp_min(torch.finfo(size.dtype).tiny))).to(grad.dtype)


def project(x: Images, centre: Images, radius: Scalars, norm: Norm) -> Images:
    """The point nearest to x in the ball around `centre`, cut with [0, 1]: exactly within it, also after rounding.

    For L2 the radius is shortened by 16 units of rounding, so that its length measured in x's own precision agrees.
    """
    anchor = centre.double()
    delta = x.double() - anchor
    limit = _round_down(radius.double(), x.dtype)
    if norm == "linf":
        delta = torch.minimum(torch.maximum(delta, -per_image(limit)), per_image(limit))
    else:
        limit = limit * (1 - 16 * torch.finfo(x.dtype).eps)
        size = l2_length(delta)
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
        noise = noise * per_image(depth / l2_length(noise))
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
    step_size: Scalars,
    start: Images,
    cost: Tensor | None = None,
) -> tuple[Images, Scalars]:
    """Projected gradient ascent from `start`: of all points visited the one with the lowest margin, and that margin.

    With costs it is the one of the highest expected cost, and minus that.
    """
    objective = loss_of(loss, cost)
    x, best = start, start
    lowest = torch.full((len(images),), torch.inf, dtype=torch.float64, device=images.device)
    finite = torch.ones((), dtype=torch.bool, device=images.device)
    for number in range(steps + 1):
        if number < steps:
            grad, logits = gradient(model, x, lambda z: objective(z, target))
        else:
            with torch.no_grad():
                grad, logits = x, at_least_float32(outputs_of(model, x))
        margin = margin_or_cost(logits, target, cost)
        finite = finite & logits.isfinite().all()
        best = torch.where(per_image(margin < lowest), x, best)
        lowest = torch.minimum(lowest, margin)
        if number < steps:
            x = project(x + per_image(step_size).to(x.dtype) * ascent_direction(grad, norm), images, radius, norm)
    if not bool(finite):
        check_logits(torch.full((1, 2), torch.nan, device="cpu"))  # raises the error of logits that are not finite
    return best, lowest


def margin_or_cost(logits: Tensor, target: Tensor, cost: Tensor | None) -> Scalars:
    """What an attack lowers, in float64: the margin, or minus the expected cost."""
    if cost is None:
        return margin_of(logits, target).double()
    return -expected_cost(logits.double(), target, cost)


def perturb(
    loss: Callable[[Images], Tensor],
    images: Images,
    start: Images,
    *,
    epsilon: float,
    norm: Norm,
    steps: int,
    step_size: float | None = None,
) -> Images:
    """Images in the ball around `images` with a higher `loss`, by projected gradient ascent, for adversarial training.

    x_{t+1} = Π(x_t + step_size·u_t), u_t the direction of `ascent_direction`, Π the ball cut with [0, 1]
    (Madry et al. 2018, arXiv 1706.06083), in the images' own precision.

    Args:
        loss: images (B, channels, H, W) to a scalar, summed over the images.
        images: in [0, 1].
        start: the first change of each image, in units of images; it is cut back to the ball.
        epsilon: radius of the ball, in units of images in [0, 1].
        norm: "linf" or "l2".
        steps: gradients.
        step_size: length of a step; None takes 2.5 · epsilon/steps.

    Example:
        >>> images = torch.full((1, 1, 1, 2), 0.5)
        >>> perturb(lambda x: x.sum(), images, torch.zeros_like(images), epsilon=0.1, norm="linf", steps=2).flatten()
        tensor([0.6000, 0.6000])
    """
    size = default_step_size(epsilon, steps) if step_size is None else step_size
    change = clip_change(start, images, epsilon, norm)
    for _ in range(steps):
        change.requires_grad_(True)
        (grad,) = torch.autograd.grad(loss(images + change), change)
        uphill = ascent_direction(grad, norm, fast_l2_length)
        change = clip_change(change.detach() + size * uphill, images, epsilon, norm)
    return (images + change).clamp(0, 1)


def clip_change(change: Images, images: Images, epsilon: float, norm: Norm) -> Images:
    """The change cut back to the ball of radius epsilon, then to images in [0, 1]; `project` without its float64."""
    if norm == "linf":
        change = change.clamp(-epsilon, epsilon)
    else:
        change = change * per_image(epsilon / fast_l2_length(change).clamp_min(epsilon))
    return (images + change).clamp(0, 1) - images


def check_epsilon(epsilon: float, norm: Norm) -> float:
    """A radius in units of images in [0, 1]: finite, at least 0, and at most 1 in L∞."""
    check_choice("norm", norm, ("linf", "l2"))
    radius = check_non_negative("epsilon", epsilon)
    if norm == "linf" and radius > 1:
        raise ValueError(f"epsilon={epsilon} is in units of images in [0, 1], at most 1 in L∞: {epsilon}/255?")
    return radius
