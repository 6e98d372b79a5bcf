"""DeepFool: the nearest decision boundary by repeated linearisation, and Papyan's robustness ratio."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ncreg._checks import check_finite, check_integer
from ncreg._readable import readable
from ncreg.numerics import at_least_float32
from ncreg.robustness._inputs import Model, check_attackable, outputs_of, predict
from ncreg.robustness.adversarial.objectives import frozen, warn_of_no_gradient
from ncreg.robustness.adversarial.steps import Norm, check_epsilon, l2_length, per_image, size_of


@dataclass(frozen=True, eq=False)
class DeepFoolResult:
    """The shortest step from each image to another class that DeepFool finds.

    Attributes:
        norm: "l2" or "linf".
        distance: (B,) ‖r‖ to the boundary, overshoot not counted, in units of images in [0, 1]; inf where the
            boundary was not crossed.
        ratio: (B,) ‖r‖/‖x‖, of the same norm.
        images: x + (1 + overshoot)·r, on the other side; they may leave [0, 1]. As they came where that failed.
        predicted: (B,) the class before.
        rival: (B,) the class after.
        crossed: (B,) whether another class was reached.
        failures: how many images were not brought across; `rho` is without them.
    """

    norm: Norm
    distance: Float[Tensor, " batch"]
    ratio: Float[Tensor, " batch"]
    images: Float[Tensor, "batch channels height width"]
    predicted: Int[Tensor, " batch"]
    rival: Int[Tensor, " batch"]
    crossed: Bool[Tensor, " batch"]
    failures: int

    __str__ = readable

    @property
    def rho(self) -> float:
        """Mean of ‖r‖/‖x‖ over the images that crossed (Papyan, Han & Donoho 2020, in L2); NaN if none did.

        Black images have no ratio, ‖x‖ being 0, and are left out.
        """
        return float(self.ratio[self.crossed & self.ratio.isfinite()].mean())


@torch.inference_mode(False)
def deepfool(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    *,
    norm: Norm = "l2",
    top_k: int = 10,
    max_steps: int = 50,
    overshoot: float = 0.02,
    batch_size: int = 256,
) -> DeepFoolResult:
    """DeepFool (Moosavi-Dezfooli et al. 2016, arXiv 1511.04599): r ← r + |f_j − f_y|/‖∇f_j − ∇f_y‖² (∇f_j − ∇f_y).

    j is at each step the rival whose linearised boundary is nearest, y the class predicted for the image; it stops
    once x + (1 + overshoot)·r is classified otherwise. On an affine model the first step is exact:
    ‖r‖ = min_j |f_j − f_y|/‖w_j − w_y‖. The scale of the logits does not matter. As published, the point may leave
    [0, 1]: this measures the classifier, not an attack; `minimum_norm` stays inside. In L∞ lengths of gradients are
    sums of absolute values, and r moves along their signs.

    Args:
        model: images in [0, 1] (B, channels, H, W) to logits (B, C); a module must be in eval mode.
        images: in [0, 1].
        norm: "l2", as Papyan's ρ wants it, or "linf".
        top_k: only the rivals with the largest logits, at most C − 1; each costs a backward pass a step.
        max_steps: after these an image counts as a failure.
        overshoot: how far beyond the boundary the point is put, as a fraction of r; above 0.
        batch_size: images at once.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: images outside [0, 1], a model in training mode or one that returns probabilities or no finite
            logits, overshoot that is not above 0.

    Example:
        >>> model = lambda x: x.flatten(1) @ torch.tensor([[3.0, 0.0], [0.0, 4.0]])
        >>> found = deepfool(model, torch.tensor([[[[0.5, 0.0]]]]))
        >>> found.distance, found.failures  # |0 - 1.5| / 5
        (tensor([0.3000]), 0)
    """
    if not check_finite("overshoot", overshoot) > 0:
        raise ValueError(f"overshoot={overshoot} must be above 0: without it the point stays on the boundary")
    check_epsilon(0.0, norm)
    top_k, max_steps = check_integer("top_k", top_k, 1), check_integer("max_steps", max_steps, 1)
    images = check_attackable(images).detach()
    logits = predict(model, images, batch_size)
    order = logits.argsort(1, descending=True)[:, : top_k + 1]
    shift = torch.zeros_like(images)
    rival = order[:, 0].clone()
    with frozen(model):
        for chosen in torch.arange(len(images), device=images.device).split(batch_size):
            shift[chosen], rival[chosen] = _descend(model, images[chosen], order[chosen], norm, max_steps, overshoot)
    crossed = rival != order[:, 0]
    shift = torch.where(per_image(crossed), shift, 0)
    distance = torch.where(crossed, size_of(shift, norm), torch.inf)
    return DeepFoolResult(
        norm,
        distance.to(images.dtype),
        (distance / size_of(images, norm)).to(images.dtype),
        images + (1 + overshoot) * shift,
        order[:, 0],
        rival,
        crossed,
        int((~crossed).sum()),
    )


def _descend(
    model: Model, images: Tensor, order: Tensor, norm: Norm, max_steps: int, overshoot: float
) -> tuple[Tensor, Tensor]:
    """The shift of each image, and its class after it: the old one where no boundary could be crossed."""
    shift, label = torch.zeros_like(images), order[:, 0].clone()
    active = torch.arange(len(images), device=images.device)
    for _ in range(max_steps + 1):
        if not len(active):
            break
        x = images[active] + (1 + overshoot) * shift[active]
        logits, differences = logit_differences(model, x, order[active])
        label[active] = torch.where(logits.isfinite().all(1), logits.argmax(1), order[active, 0])
        moving = label[active] == order[active, 0]
        least = torch.finfo(x.dtype).eps * size_of(x, norm)  # a shorter step would be lost in rounding
        step = _nearest_step(logits, differences, order[active], norm, least)
        active, step = active[moving], step[moving]
        shift[active] += step
        active = active[l2_length(step) > 0]  # no gradient leads anywhere
    return shift, label


def logit_differences(model: Model, x: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and for each rival the gradient of its logit minus the first's in `order`: (K, B, channels, H, W)."""
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        logits = at_least_float32(outputs_of(model, x))
        ranked = logits.gather(1, order)
        grads = []
        for rival in range(1, order.shape[1]):
            total = (ranked[:, rival] - ranked[:, 0]).sum()
            found = (
                torch.autograd.grad(total, x, retain_graph=True, allow_unused=True) if total.requires_grad else [None]
            )
            if found[0] is None:
                warn_of_no_gradient()
            grads.append(torch.zeros_like(x) if found[0] is None else found[0].nan_to_num(0, 0, 0))
    return logits.detach(), torch.stack(grads).detach()


def linearised_distances(logits: Tensor, differences: Tensor, order: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Distance |f_j − f_y|/‖∇f_j − ∇f_y‖ to each rival's linearised boundary, and that gradient's dual norm (K, B).

    The distance is inf where the gradient is zero.
    """
    ranked = logits.gather(1, order).double()
    gap = (ranked[:, 1:] - ranked[:, :1]).abs().T
    slope = torch.linalg.vector_norm(differences.flatten(2).double(), ord=2 if norm == "l2" else 1, dim=2)
    return torch.where(slope > 0, gap / torch.where(slope > 0, slope, 1), torch.inf), slope


def _nearest_step(logits: Tensor, differences: Tensor, order: Tensor, norm: Norm, least: Tensor) -> Tensor:
    """The step onto the nearest linearised boundary; zero where no rival has a gradient."""
    distance, slope = linearised_distances(logits, differences, order, norm)
    nearest = distance.argmin(0, keepdim=True)
    size, slope = (rows.gather(0, nearest).squeeze(0) for rows in (distance, slope))
    size = torch.maximum(size, least)
    along = differences.gather(0, nearest[..., None, None, None].expand(1, *differences.shape[1:])).squeeze(0)
    along = along.double() / per_image(torch.where(slope > 0, slope, torch.inf)) if norm == "l2" else along.sign()
    return (along * per_image(torch.where(slope > 0, size, 0))).to(differences.dtype)
