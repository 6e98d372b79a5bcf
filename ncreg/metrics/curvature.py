"""How curved the loss is in each layer's weights: the largest eigenvalue of the Hessian's blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ncreg._checks import check_integer, check_positive, check_seed, described
from ncreg._modes import drawing_apart, uncompiled
from ncreg.numerics import seeded


def hessian_norms(
    model: nn.Module,
    images: Float[Tensor, "batch ..."],
    target: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    layers: Sequence[str] | None = None,
    steps: int = 50,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> dict[str, float]:
    """Largest |eigenvalue| of ∂²L/∂W² for each weight W of two or more axes, by power iteration.

    Hessian-vector products are exact, v ↦ ∇(∇L·v), so nothing of the size of a Hessian is built. On the quadratic
    model of the loss gradient descent in W alone diverges beyond a step of 2/λ: layers far above the others, at
    initialisation, bound the learning rate. Softmax regression at W = 0 has λ_max(XᵀX/N)/C.

    Args:
        model: images to logits, in eval mode for a Hessian that does not depend on the batch's statistics. In training
            mode too it keeps its running statistics; what it draws (dropout, stochastic depth) is drawn once, from
            `seed`, and the same in all products.
        images: one batch.
        target: their classes, or whatever the loss takes.
        loss: of logits and target, a mean over the batch.
        layers: names of weights; None takes all trained ones of two or more axes.
        steps: products at most for each weight.
        tolerance: relative change of the eigenvalue at which it stops; the result is a lower bound, near the eigenvalue
            unless others are as large.
        seed: of the starts, and of what a model in training mode draws. The global generators stay as they were.

    Raises:
        ValueError: no such weight, or a loss that is no finite number.
        TypeError: no module.

    Source: Skorski, Temperoni & Theobald, "Revisiting Weight Initialization of Deep Neural Networks"
    (arXiv 2004.09506).

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> nn.init.zeros_(layer.weight)
        Parameter containing: ...
        >>> rows = torch.tensor([[2.0, 0.0], [0.0, 1.0]])  # XᵀX/N has 2 and ½
        >>> found = hessian_norms(layer, rows, torch.tensor([0, 1]), tolerance=1e-6)
        >>> round(found["weight"], 3)
        1.0
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {described(model)}")
    check_integer("steps", steps, 1)
    check_positive("tolerance", tolerance)
    weights, seed = _weights(model, layers), check_seed(seed)
    with (
        _buffers_kept(model),
        drawing_apart(model, seed=seed),
        torch.inference_mode(False),
        torch.enable_grad(),
        sdpa_kernel(SDPBackend.MATH),  # attention's fused kernels have no second derivative
        uncompiled(),  # nor has compiled code
    ):
        # Clones take part in gradients where tensors of inference mode cannot, and the model may change its input.
        value = loss(model(images.clone()), target.clone())
        if value.ndim or not bool(value.isfinite()):
            raise ValueError(f"the loss must be one finite number, got {value.tolist()}")
        gradients = torch.autograd.grad(value, list(weights.values()), create_graph=True, allow_unused=True)
        generator = seeded(seed)
        return {
            name: 0.0 if slope is None else _largest(slope, weight, steps, tolerance, generator)
            for (name, weight), slope in zip(weights.items(), gradients, strict=True)
        }


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Whatever a forward pass in training mode writes into the buffers, afterwards they are as before."""
    training = any(part.training for part in model.modules())
    before = [(buffer, buffer.clone()) for buffer in model.buffers()] if training else []
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def _weights(model: nn.Module, layers: Sequence[str] | None) -> dict[str, Tensor]:
    trained: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad and p.ndim >= 2}
    if layers is not None:
        lacking = [name for name in layers if name not in trained]
        if lacking:
            raise ValueError(f"layers names {lacking[0]!r}: no trained weight of two or more axes; {_some(trained)}")
        trained = {name: trained[name] for name in layers}
    if not trained:
        raise ValueError("the model has no trained weight of two or more axes")
    return trained


def _some(names: dict[str, Tensor]) -> str:
    shown = list(names)[:3]
    return f"there are {', '.join(shown)}{', …' if len(names) > 3 else ''}" if shown else "there is none"


def _largest(slope: Tensor, weight: Tensor, steps: int, tolerance: float, generator: torch.Generator) -> float:
    """|λ| of the Hessian's block by power iteration: ‖Hv‖ of unit vectors v, which rises towards it."""
    if not slope.requires_grad:  # linear in this weight: no second derivative
        return 0.0
    vector = torch.randn(weight.shape, generator=generator, dtype=torch.float32, device="cpu").to(weight)
    size = 0.0
    for _ in range(steps):
        vector = vector / torch.linalg.vector_norm(vector)
        (product,) = torch.autograd.grad(slope, weight, vector, retain_graph=True, allow_unused=True)
        if product is None:
            return 0.0
        before, size = size, float(torch.linalg.vector_norm(product))
        if size == 0 or abs(size - before) <= tolerance * size:
            break
        vector = product
    return size
