"""The parts of an evaluation, each a function of the run under test that gives a typed result and its warnings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ncreg import robustness
from recipes.assess.presets import Preset
from recipes.assess.subject import Subject
from recipes.config import UserError
from recipes.split import Split


class NotHere(Exception):
    """A part that has no meaning for this run, or lacks what it needs here; the message is the reason."""


@dataclass(frozen=True)
class Settings:
    """How a run is evaluated.

    Attributes:
        preset: how much of it is looked at.
        norm: of the attacks, linf or l2.
        epsilon: their radius, in units of [0, 1].
        seed: of every draw.
        sets: image sets for OOD and transfer; None for those at hand.
        root: where they lie.
    """

    preset: Preset
    norm: str = "linf"
    epsilon: float = 4 / 255
    seed: int = 0
    sets: tuple[str, ...] | None = None
    root: Path = Path("data")

    @classmethod
    def made(cls, preset: Preset, *, norm: str, epsilon: float | None, **more: Any) -> Settings:
        """With the norm's usual radius where none is asked for.

        Raises:
            UserError: a radius that is not positive.
        """
        epsilon = {"linf": 4 / 255, "l2": 0.5}[norm] if epsilon is None else epsilon
        if not 0 < epsilon < float("inf"):
            raise UserError(f"--epsilon {epsilon}: must be a positive radius in units of [0, 1], such as 4/255")
        return cls(preset, norm, epsilon, **more)


Found = tuple[Any, list[str]]


def calibration(subject: Subject, settings: Settings) -> Found:
    """Calibration on test images, the temperature fitted on validation images."""
    test, val = subject.of_part("test"), subject.of_part("val")
    report = robustness.evaluate_calibration(test.logits, test.target, val.logits, val.target)
    coverage = torch.linspace(0.05, 1.0, 20)
    ranks = (coverage * report.samples).ceil().long().clamp(1, report.samples) - 1
    curve = {"coverage": report.risk_coverage.coverage[ranks], "risk": report.risk_coverage.risk[ranks]}
    found = {
        **vars(report),
        "risk_coverage": {"aurc": report.risk_coverage.aurc, "excess_aurc": report.risk_coverage.excess_aurc, **curve},
        "interval": robustness.binomial_interval(int((test.logits.argmax(1) == test.target).sum()), report.samples),
        "validation_images": len(val.target),
    }
    bound = report.temperature_at_bound
    return found, [f"the temperature has no best value on validation images ({bound})"] if bound else []


def ood(subject: Subject, settings: Settings) -> Found:
    """Every score on noise (far) and on the other image sets at hand whose classes are not the run's (near)."""
    size = settings.preset.outside
    train, test = subject.of_part("train", settings.preset.features), subject.of_part("test", size)
    outside: dict[str, Split] = {}
    for name, data in subject.others(settings.sets, settings.root).items():
        if not set(data.class_names) & set(subject.data.class_names):
            outside[name] = data.test if size is None or size >= len(data.test) else _first(data.test, size)
    groups = dict.fromkeys(outside, "near")
    made, _ = subject.images(subject.drawn("test", size))
    kinds = ("uniform", "gaussian", "shuffle")
    groups |= dict.fromkeys(kinds, "far")
    noise = {kind: robustness.noise_images(made, kind, seed=settings.seed) for kind in kinds}
    rows = {name: subject.outputs(split) for name, split in outside.items()}
    pairs = {name: (row.features, row.logits) for name, row in rows.items()}
    pairs |= {kind: subject.run_on(images) for kind, images in noise.items()}
    head = subject.model.head
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    try:
        report = robustness.evaluate_ood(
            train.features,
            train.target,
            test.features,
            test.logits,
            pairs,
            train_logits=train.logits,
            weight=_plain(weight),
            bias=_plain(bias),
        )
    except ImportError as error:
        raise NotHere(str(error)) from None
    counts = {
        name: {"id": _histogram(report.id_scores[name], low, high)}
        | {key: _histogram(scores[name], low, high) for key, scores in report.ood_scores.items()}
        | {"ends": [low, high]}
        for name, (low, high) in _ranges(report).items()
    }
    found = {
        "detections": report.detections,
        "groups": groups,
        "nc5": report.nc5,
        "nc5_centred": report.nc5_centred,
        "skipped": report.skipped,
        "training_images": report.num_train,
        "mean_auroc": _means(report.detections, groups),
        "histograms": counts,
    }
    return found, []


def _plain(tensor: Any) -> Tensor | None:
    return tensor.detach().double().cpu() if isinstance(tensor, Tensor) else None


def _first(split: Split, size: int) -> Split:
    """`size` images of a split, evenly spaced: sets that are sorted by class keep all of them."""
    return split[torch.linspace(0, len(split) - 1, size, dtype=torch.float64).round().long()]


def _ranges(report: robustness.OODReport) -> dict[str, tuple[float, float]]:
    """The ends of each score over all images."""
    ends = {}
    for name, scores in report.id_scores.items():
        everything = torch.cat([scores, *(other[name] for other in report.ood_scores.values())])
        ends[name] = (float(everything.min()), float(everything.max()))
    return ends


def _histogram(scores: Tensor, low: float, high: float, bins: int = 40) -> list[int]:
    place = ((scores - low) / max(high - low, 1e-300) * bins).long().clamp(0, bins - 1)
    return torch.bincount(place, minlength=bins).tolist()


def _means(detections: Any, groups: dict[str, str]) -> dict[str, dict[str, float]]:
    """Mean AUROC of each score over the sets of a group."""
    means: dict[str, dict[str, float]] = {}
    for group in dict.fromkeys(groups.values()):
        members = [found for name, found in detections.items() if groups[name] == group]
        means[group] = {score: sum(m[score].auroc for m in members) / len(members) for score in members[0]}
    return means


PARTS: dict[str, Callable[[Subject, Settings], Found]] = {
    "calibration": calibration,
    "ood": ood,
}
"""Every part by its name, in the order in which they are done."""
