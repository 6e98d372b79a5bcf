"""Measures of single layers that a run logs on request: curvature of the loss, and condensation before BatchNorms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ncreg.models import Classifier
from recipes.core.config import OptimConfig
from recipes.core.errors import UserError
from recipes.core.memory import is_out_of_memory
from recipes.data.split import Split

IMAGES, STEPS, TOLERANCE = 128, 20, 0.02
"""Images that both are taken on; products for each weight at most, and the change of λ at which they end earlier."""

SHOWN = 5
"""Weights that the table of a plan shows."""


def layer_measures(names: Sequence[str], model: Classifier, split: Split) -> dict[str, dict[str, float]]:
    """The measures `names` of each layer, in eval mode on clean images spread over a split.

    Args:
        names: of hessian_norms (of the cross-entropy) and condensation, see `ncreg.metrics`.
        model: whose mode is left as it was.
        split: its images.

    Raises:
        UserError: a model that has no such measure.
    """
    if not names:
        return {}
    from ncreg.metrics import batch_norm_condensation, hessian_norms  # with torchmetrics, which takes a second

    training = model.training
    model.eval()
    images, target = next(_some(split).in_batches(IMAGES))
    found, name = {}, ""
    try:
        for name in names:
            if name == "condensation":
                found[name] = batch_norm_condensation(model, images)
            else:
                found[name] = hessian_norms(model, images, target, steps=STEPS, tolerance=TOLERANCE)
    except (ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"extra_measures={name}: {reason}; leave it out for this model") from None
    finally:
        model.train(training)
    return found


def _some(split: Split) -> Split:
    """Images spread over a split, for they may lie class by class."""
    return split[torch.linspace(0, len(split) - 1, min(len(split), IMAGES)).round().long()]


def curvature_table(model: nn.Module, split: Split, optim: OptimConfig) -> str:
    """The largest curvatures at the start, in training mode as the first step meets them, as lines to print."""
    from ncreg.metrics import hessian_norms

    images, target = next(_some(split).in_batches(IMAGES))
    norms = hessian_norms(model.train(), images, target, steps=STEPS, tolerance=TOLERANCE)
    return "\n".join(_rows(norms, optim, len(images)))


def _rows(norms: Mapping[str, float], optim: OptimConfig, images: int) -> list[str]:
    """The most curved weights first; for SGD with the rate beyond which it diverges on the quadratic model."""
    ordered = sorted(norms, key=lambda name: -norms[name])
    width = max(len("weight"), *(len(name) for name in ordered[:SHOWN]))
    sgd = optim.name == "sgd"
    lines = [
        f"curvature of the cross-entropy at the start, on {images} images: largest |eigenvalue| λ of the Hessian in "
        f"each weight, {min(SHOWN, len(norms))} of {len(norms)}",
        f"{'weight':<{width}}{'λ':>12}" + (f"{'2(1+momentum)/λ':>18}" if sgd else ""),
    ]
    for name in ordered[:SHOWN]:
        # the quadratic λw²/2 under v ← βv + λw, w ← w − ηv is stable for η < 2(1 + β)/λ
        bound = 2 * (1 + optim.momentum) / norms[name] if norms[name] else float("inf")
        lines.append(f"{name:<{width}}{norms[name]:>12.3g}" + (f"{bound:>18.3g}" if sgd else ""))
    return lines
