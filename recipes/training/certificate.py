"""What a run's loss proves about its features: the certificate of collapse, from one pass over training images."""

from __future__ import annotations

from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor

from ncreg.models import Classifier
from ncreg.theory import collapse_certificate
from recipes.data.split import Split

BATCH = 512
MOST = 10_000
"""Images that are looked at."""

AGREEMENT = 1e-4
"""How far logits may be from affine in the features, in units of their own spread."""


def certificate(model: Classifier, split: Split) -> dict[str, float] | None:
    """Bounds of `ncreg.collapse_certificate` on equally many images of each class.

    None where it says nothing: the loss is not below ln C, or the head is not affine in its features, as they are or
    scaled to length 1.
    """
    chosen = balanced(split.target.cpu(), model.num_classes, MOST)
    if len(chosen) == 0:
        return None
    features, logits = outputs(model, split[chosen.to(split.target.device)])
    target = split.target.cpu()[chosen]
    affine = affine_map(model, features, logits)
    if affine is None:
        return None
    seen, weight = affine
    total = (seen - seen.mean(0)).square().sum(1).mean()
    counts = torch.bincount(target, minlength=model.num_classes).tolist()
    try:
        found = collapse_certificate(F.cross_entropy(logits, target), weight, total, counts)
    except ValueError:  # a loss of ln C or more, or one that has vanished
        return None
    within = 1 - between_variance(seen, target, model.num_classes) / float(total)
    return asdict(found) | {"measured_within_share": within}


@torch.no_grad()
def outputs(model: Classifier, split: Split) -> tuple[Tensor, Tensor]:
    """Features (N, d) and logits (N, C) in eval mode, float64 on the CPU."""
    training = model.training
    model.eval()
    rows = [model(images, with_features=True) for images, _ in split.in_batches(BATCH)]
    model.train(training)
    logits, features = (torch.cat(part).cpu().double() for part in zip(*rows, strict=True))
    return features, logits


def balanced(target: Tensor, num_classes: int, most: int) -> Tensor:
    """Positions of equally many images of each class, the first of each: `most` of them together at most."""
    counts = torch.bincount(target, minlength=num_classes)
    each = min(int(counts.min()), most // num_classes)
    return torch.cat([(target == label).nonzero().flatten()[:each] for label in range(num_classes)])


def affine_map(model: Classifier, features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor] | None:
    """Features as the head sees them, and W with logits = W h + b; None where there is no such W."""
    weight = getattr(model.head, "class_vectors", getattr(model.head, "weight", None))
    if not isinstance(weight, Tensor):
        return None
    rows = weight.detach().cpu().double()
    scale = getattr(model.head, "scale", None)
    scaled = rows if scale is None else float(scale) * rows
    for seen in (features, F.normalize(features, dim=1)):
        for vectors in (rows, scaled):
            rest = logits - seen @ vectors.T
            if float((rest - rest.mean(0)).abs().max()) <= AGREEMENT * float(logits.std()):
                return seen, vectors
    return None


def between_variance(features: Tensor, target: Tensor, num_classes: int) -> float:
    """Trace of Σ_B for balanced classes: mean squared distance of the class means from theirs."""
    means = torch.stack([features[target == label].mean(0) for label in range(num_classes)])
    return float((means - means.mean(0)).square().sum(1).mean())
