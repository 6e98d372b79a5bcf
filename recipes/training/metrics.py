"""Measurements of a run on clean images in eval mode: accuracy, loss, and how far features have collapsed."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ncreg.functional import chunked_argmax, chunked_cross_entropy
from ncreg.models import Classifier
from ncreg.numerics import float64_device, in_float64
from ncreg.theory import collapse_certificate
from recipes.core.distributed import Ranks
from recipes.data.load import Dataset
from recipes.data.split import Split, of_rank

if TYPE_CHECKING:
    from ncreg.metrics import NeuralCollapse

BATCH = 512
"""Images of a forward pass, at most."""

PIXELS = {"cpu": 512 * 32 * 32, "other": 64 * 224 * 224}
"""Pixels of the images of a forward pass, at most: on a CPU larger activations leave the caches, on others the memory.

benchmarks/forward_batches.py times other numbers.
"""

FEW = 16
"""Images of a forward pass on a CPU, at least, where the memory of others has room for them: with fewer, and a single
thread, torch takes slower kernels for convolutions of 1 by 1.
"""

CLASSES_AT_ONCE = 2**16
"""Most classes whose logits are made for a whole batch, and whose pairs the measures of collapse go through."""


def images_at_once(side: int, device: torch.device, num_classes: int = 1) -> int:
    """Images of a forward pass that trains nothing: BATCH, or fewer where they are large or have very many logits.

    Args:
        side: of the images, in pixels.
        device: of the model.
        num_classes: of the logits.

    Example:
        >>> images_at_once(32, torch.device("cpu")), images_at_once(224, torch.device("cpu"))
        (512, 16)
    """
    fitting = PIXELS.get(device.type, PIXELS["other"]) // side**2
    if fitting < FEW and FEW * side**2 <= PIXELS["other"]:
        fitting = FEW
    return max(1, min(BATCH, fitting, BATCH * CLASSES_AT_ONCE // num_classes))


LEFT_OUT = (
    f"more than {CLASSES_AT_ONCE:,} classes: the measures of collapse, over all pairs of them, are left out (nan)"
)

UNKNOWN = {"intra_cosine": math.nan, "inter_cosine": math.nan}

ONE_PROCESS = Ranks()

CERTIFICATE_IMAGES = 10_000
"""Images that the certificate looks at, at most."""

AFFINE_TOLERANCE = 1e-4
"""Largest distance of logits from an affine function of the features, in units of the logits' standard deviation."""


@dataclass
class Clock:
    """Seconds spent, by activity."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, start: float) -> float:
        """Add the time since `start` to activity `name`; returns the present time."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - start
        return now


@torch.inference_mode()
def measure(
    model: Classifier, split: Split, *, ranks: Ranks = ONE_PROCESS, clock: Clock | None = None, collapse: bool = True
) -> dict[str, float]:
    """Accuracy, cross-entropy and, with `collapse`, every measure of NeuralCollapse on a split, in eval mode.

    All come from one forward pass. Beyond 65,536 classes the measures of collapse, which go through all pairs of
    classes, are left out: they are NaN. Each rank takes its part of the images; all ranks return the same numbers.
    """
    clock = clock or Clock()
    device = split.target.device
    left_out = collapse and model.num_classes > CLASSES_AT_ONCE
    collapse = collapse and not left_out
    metric: Any = None
    if collapse:
        metric = collapse_metric(model.num_classes, model.head_hidden_size, model.head).to(device)
    training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=float64_device(device))  # correct, loss
    now = time.perf_counter()
    for images, target in of_rank(split, ranks).in_batches(images_at_once(split.side, device)):
        features, correct, loss = _decided(model, images, target)
        sums[0] += correct.sum().to(sums.device)
        sums[1] += loss.to(sums.device)
        now = clock.add("measure_forward", now)
        if collapse:
            metric.update(features, target)
            now = clock.add("measure_collapse", now)
    correct, loss = ranks.sum(sums).tolist()
    result = {"accuracy": correct / len(split), "loss": loss / len(split)}
    if collapse:
        with warnings.catch_warnings():  # the notes on the data say which classes are absent
            warnings.filterwarnings("ignore", message=".*classes have no samples")
            result |= {name: _scalar(value) for name, value in metric.compute().items()}
        clock.add("measure_collapse", now)
    if left_out:
        result |= {name: math.nan for name in measure_names() if name not in (*result, *cosine_gaps(UNKNOWN, 2))}
    model.train(training)
    return result


def _decided(model: Classifier, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features (B, d), whether each image is recognised (B,), and the summed cross-entropy in float64.

    With very many classes the logits of a batch are too large to be made: both are taken in chunks of classes.
    """
    if model.num_classes > CLASSES_AT_ONCE and hasattr(model.head, "chunks"):
        features = model(images, with_features="alone").features
        loss = chunked_cross_entropy(features, model.head, target, reduction="sum")
        return features, chunked_argmax(features, model.head) == target, in_float64(loss)
    logits, features = model(images, with_features=True)
    wide = in_float64(logits)
    loss = F.cross_entropy(wide, target.to(wide.device), reduction="sum")
    return features, logits.argmax(1) == target, loss


def cosine_gaps(measures: Mapping[str, float], num_classes: int) -> dict[str, float]:
    """Distances of the mean cosines from their values at collapse: 1 within classes, −1/(C−1) between them."""
    ideal = -1 / (num_classes - 1)
    return {
        "intra_cosine_gap": 1 - measures["intra_cosine"],
        "inter_cosine_gap": abs(measures["inter_cosine"] - ideal),
    }


def collapse_metric(num_classes: int, num_features: int, head: torch.nn.Module) -> NeuralCollapse:
    """The metric of a head; the first one brings torchmetrics, which takes a second and no run needs before."""
    from ncreg.metrics import NeuralCollapse

    return NeuralCollapse(num_classes, num_features, classifier=head)


def measure_names() -> tuple[str, ...]:
    """Names of the measures of an epoch: those of `measure`, then those of `cosine_gaps`."""
    metric = collapse_metric(2, 2, torch.nn.Linear(2, 2))
    metric.update(torch.eye(2), torch.arange(2))
    measures = metric.compute()
    return ("accuracy", "loss", *measures, *cosine_gaps(UNKNOWN, 2))


def measure_all(
    model: Classifier, data: Dataset, *, ranks: Ranks = ONE_PROCESS, clock: Clock | None = None
) -> dict[str, Any]:
    """What a run reports at zero error and at its end: the certificate, and `measure` on the whole of each split."""
    return {
        "certificate": certificate(model, data.train),
        "train": measure(model, data.train, ranks=ranks, clock=clock),
        "val": measure(model, data.val, ranks=ranks, clock=clock, collapse=False),
        "test": measure(model, data.test, ranks=ranks, clock=clock),
    }


def _scalar(value: Tensor) -> float:
    return math.nan if value.numel() != 1 else float(value)


def certificate(model: Classifier, split: Split) -> dict[str, float] | None:
    """What the loss proves about the collapse of features: bounds of `ncreg.collapse_certificate`.

    Computed on equally many images of each class. None if the theory does not apply: the loss is ln C or more, or the
    head is not affine in its features, neither as they are nor scaled to length 1.
    """
    chosen = balanced(split.target.cpu(), model.num_classes, CERTIFICATE_IMAGES)
    if len(chosen) == 0:
        return None
    features, logits = outputs(model, split[chosen.to(split.target.device)])
    target = split.target.cpu()[chosen]
    affine = affine_map(model, features, logits)
    if affine is None:
        return None
    inputs, weight = affine
    total = (inputs - inputs.mean(0)).square().sum(1).mean()
    counts = torch.bincount(target, minlength=model.num_classes).tolist()
    try:
        found = collapse_certificate(F.cross_entropy(logits, target), weight, total, counts)
    except ValueError:  # a loss of ln C or more, or one that has vanished
        return None
    within = 1 - between_variance(inputs, target, model.num_classes) / float(total)
    return asdict(found) | {"measured_within_share": within}


@torch.no_grad()
def outputs(model: Classifier, split: Split) -> tuple[Tensor, Tensor]:
    """Features (N, d) and logits (N, C) in eval mode, float64 on the CPU."""
    training = model.training
    model.eval()
    batch = images_at_once(split.side, split.target.device)
    rows = [model(images, with_features=True) for images, _ in split.in_batches(batch)]
    model.train(training)
    logits, features = (torch.cat(part).cpu().double() for part in zip(*rows, strict=True))
    return features, logits


def balanced(target: Tensor, num_classes: int, most: int) -> Tensor:
    """Indices of the first images of each class, equally many of each and at most `most` together."""
    counts = torch.bincount(target, minlength=num_classes)
    each = min(int(counts.min()), most // num_classes)
    if each == 0:
        return counts[:0]
    return torch.cat([(target == label).nonzero().flatten()[:each] for label in range(num_classes)])


def affine_map(model: Classifier, features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor] | None:
    """Inputs h (N, d) of the head and its W (C, d) with logits = W h + b; None if there is no such W."""
    weight = getattr(model.head, "class_vectors", getattr(model.head, "weight", None))
    if not isinstance(weight, Tensor):
        return None
    rows = weight.detach().cpu().double()
    scale = getattr(model.head, "scale", None)
    scaled = rows if scale is None else float(scale) * rows
    for inputs in (features, F.normalize(features, dim=1)):
        for vectors in (rows, scaled):
            rest = logits - inputs @ vectors.T
            if float((rest - rest.mean(0)).abs().max()) <= AFFINE_TOLERANCE * float(logits.std()):
                return inputs, vectors
    return None


def between_variance(features: Tensor, target: Tensor, num_classes: int) -> float:
    """Trace of Σ_B for balanced classes: mean squared distance of the class means from their own mean."""
    means = torch.stack([features[target == label].mean(0) for label in range(num_classes)])
    return float((means - means.mean(0)).square().sum(1).mean())
