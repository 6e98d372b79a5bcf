"""Accuracy under corruptions, type by severity."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ncreg._checks import check_integer
from ncreg._readable import readable
from ncreg.robustness._inputs import Model, check_images, check_target, predict
from ncreg.robustness.corruptions._constants import Table
from ncreg.robustness.corruptions._corrupt import CORRUPTION_GROUPS, check_name, check_severity, corrupt
from ncreg.robustness.intervals import binomial_interval

# The benchmark's types: the extra ones were held out for validation.
DEFAULT_NAMES = tuple(name for group, names in CORRUPTION_GROUPS.items() if group != "extra" for name in names)


@dataclass(frozen=True)
class CorruptionReport:
    """Accuracy of one model on corrupted copies of one set.

    Attributes:
        names: corruption types, the rows of the tables.
        severities: the columns.
        samples: images in the set.
        clean_accuracy: share of images classified rightly without corruption, in [0, 1].
        accuracy: share of images classified rightly, in [0, 1].
        low: lower end of its Wilson 95 % interval.
        high: upper end.
        mean_accuracy: mean of `accuracy` over all types and severities.
    """

    names: tuple[str, ...]
    severities: tuple[int, ...]
    samples: int
    clean_accuracy: float
    accuracy: Float[Tensor, "types severities"]
    low: Float[Tensor, "types severities"]
    high: Float[Tensor, "types severities"]
    mean_accuracy: float

    __str__ = readable


def corruption_accuracy(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    target: Int[Tensor, " batch"],
    *,
    names: Sequence[str] = DEFAULT_NAMES,
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    seed: int = 0,
    batch_size: int = 256,
    constants: Table | None = None,
) -> CorruptionReport:
    """Share of images classified rightly under each corruption type and severity.

    Args:
        model: images in [0, 1] to logits, in eval mode.
        images: the clean set; image i draws the random numbers of index i, so that models see the same corruptions.
        target: class indices.
        names: corruption types; default all of the benchmark but frost.
        severities: of 1 … 5.
        seed: of the corruptions.
        batch_size: images a forward pass; the result does not depend on it.
        constants: as in `corrupt`.

    Raises:
        ValueError: names or severities that are none, unknown or double; all that `corrupt` and the model's outputs
            are refused for.
        TypeError: no tensors, or of another kind.

    Example:
        >>> images, target = torch.rand(8, 1, 8, 8), torch.arange(8) % 2
        >>> report = corruption_accuracy(lambda x: x.flatten(1)[:, :2] - 3, images, target, names=["fog"])
        >>> report.accuracy.shape
        torch.Size([1, 5])
    """
    names = _listed("names", names, check_name)
    severities = _listed("severities", severities, check_severity)
    check_images(images)
    check_integer("batch_size", batch_size, 1)

    def right(logits: Tensor) -> int:
        return int((logits.argmax(1) == check_target(target, logits, logits.shape[1])).sum())

    n = len(images)
    clean = right(predict(model, images, batch_size))
    correct = torch.zeros(len(names), len(severities), dtype=torch.int64, device="cpu")
    for row, name in enumerate(names):
        for column, severity in enumerate(severities):
            parts = (
                corrupt(images[at : at + batch_size], name, severity, seed=seed, first_index=at, constants=constants)
                for at in range(0, n, batch_size)
            )
            correct[row, column] = right(torch.cat([predict(model, part, batch_size) for part in parts]))
    ends = torch.tensor([binomial_interval(int(k), n) for k in correct.flatten()], dtype=torch.float64, device="cpu")
    low, high = ends.T.reshape(2, *correct.shape)
    accuracy = correct.double() / n
    return CorruptionReport(names, severities, n, clean / n, accuracy, low, high, float(accuracy.mean()))


def mean_corruption_error(report: CorruptionReport, baseline: CorruptionReport) -> float:
    """mCE: mean over types of Σ_s error / Σ_s error of a baseline model; 1 is the baseline's robustness, lower better.

    Source: Hendrycks & Dietterich, ICLR 2019 (arXiv 1903.12261), whose baseline is AlexNet and whose unit is per cent.

    Args:
        report: of the model.
        baseline: of the baseline, on the same types and severities.

    Raises:
        ValueError: types or severities that differ, or a type on which the baseline makes no error.

    Example:
        >>> def report(error):
        ...     table = torch.full((2, 5), 1 - error, dtype=torch.float64)
        ...     return CorruptionReport(("fog", "snow"), (1, 2, 3, 4, 5), 10, 1.0, table, table, table, 1 - error)
        >>> round(mean_corruption_error(report(0.2), report(0.4)), 6)
        0.5
    """
    for field in ("names", "severities"):
        mine, other = getattr(report, field), getattr(baseline, field)
        if mine != other:
            raise ValueError(f"report and baseline differ in {field}: {mine} against {other}")
    own, base = ((1 - table.accuracy).sum(1) for table in (report, baseline))
    perfect = [name for name, error in zip(report.names, base.tolist(), strict=True) if error <= 0]
    if perfect:
        raise ValueError(
            f"baseline makes no error on {', '.join(perfect)}: leave the type out, or use another baseline"
        )
    return float((own / base).mean())


def _listed(argument: str, values: Sequence, check: Callable) -> tuple:
    """A tuple of known values, none twice."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{argument} must be a list, got {values!r}: [{values!r}]")
    found = tuple(check(value) for value in values)
    if not found:
        raise ValueError(f"{argument} is empty")
    if len(set(found)) < len(found):
        raise ValueError(f"{argument} holds a value twice: {found}")
    return found
