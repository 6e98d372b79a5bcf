"""The parts of an evaluation, each a function of the run under test that gives a typed result and its warnings."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ncreg import robustness
from recipes.data.split import Split, stratified
from recipes.evaluation.labels import label_noise, long_tail, numbers
from recipes.evaluation.presets import Found, NotHere, Settings, shrunk
from recipes.evaluation.run_under_test import Subject


def calibration(subject: Subject, settings: Settings) -> Found:
    """Calibration on test images, the temperature fitted on validation images; or on a half of these for the other."""
    test, val = subject.of_part(subject.split), subject.of_part("val")
    source = "validation images"
    if subject.split == "val":
        (fitted, held), source = halves(val.target, subject.seed), "the other half of the validation images"
        test, val = val[held], val[fitted]
    report = robustness.evaluate_calibration(test.logits, test.target, val.logits, val.target)
    ranks = torch.arange(1, 21).mul(report.samples).add(19).div(20, rounding_mode="floor") - 1  # n·k/20, rounded up
    curve = {"coverage": report.risk_coverage.coverage[ranks], "risk": report.risk_coverage.risk[ranks]}
    found = {
        **vars(report),
        "risk_coverage": {"aurc": report.risk_coverage.aurc, "excess_aurc": report.risk_coverage.excess_aurc, **curve},
        "interval": robustness.binomial_interval(int((test.logits.argmax(1) == test.target).sum()), report.samples),
        "validation_images": len(val.target),
        "temperature_from": source,
    }
    bound = report.temperature_at_bound
    return found, [f"the temperature has no best value on validation images ({bound})"] if bound else []


def halves(target: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of two halves drawn with a seed, whose images of any class differ in number by one at most."""
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
    order = order[target[order].argsort(stable=True)]
    return order[::2].sort().values, order[1::2].sort().values


def ood(subject: Subject, settings: Settings) -> Found:
    """Every score on noise (far) and on the other image sets at hand whose classes are not the run's (near)."""
    size = settings.preset.outside
    train, test = subject.of_part("train", settings.preset.features), subject.of_part(subject.split, size)
    outside: dict[str, Split] = {}
    for name, data in subject.others(settings.sets, settings.root).items():
        if not set(data.class_names) & set(subject.data.class_names):
            held: Split = getattr(data, subject.split)
            outside[name] = held if size is None or size >= len(held) else _first(held, size)
    groups = dict.fromkeys(outside, "near")
    made, _ = subject.images(subject.held_out(size))
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
            weight=numbers(weight),
            bias=numbers(bias),
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


def adversarial(subject: Subject, settings: Settings) -> Found:
    """Every attack at the radius asked for, AutoAttack last, and margin-PGD over a range of radii."""
    images, target = subject.images(subject.held_out(settings.attacked or settings.preset.attacked))
    asked: dict[str, Any] = {"norm": settings.norm, "seed": settings.seed}
    kind: Any = settings.preset.name
    there = importlib.util.find_spec("pyautoattack") is not None
    report = robustness.evaluate_adversarial(
        subject.model, images, target, epsilon=settings.epsilon, preset=kind, autoattack=there, **asked
    )
    few, classes = subject.images(subject.held_out(settings.preset.curve))
    radii = [settings.epsilon * share for share in (0.25, 0.5, 1.0, 2.0, 4.0)]
    radii = [radius for radius in radii if settings.norm == "l2" or radius <= 1]  # beyond 1 every ball is all images
    curve = robustness.robustness_curve(subject.model, few, classes, [0.0, *radii], **asked)
    found = report.as_dict() | {
        "autoattack": report.headline.accuracy if there else None,
        "curve": {
            "epsilons": curve.epsilons,
            "accuracy": curve.accuracy,
            "intervals": curve.intervals,
            "images": len(few),
        },
        "margins": _histogram_of(subject, images, target),
    }
    return found, [f"{finding.name}: {finding.explanation}" for finding in report.findings if finding.flagged]


def _histogram_of(subject: Subject, images: Tensor, target: Tensor) -> dict[str, Any]:
    """Clean margins in units of the logits' spread, which no scale of the logits changes: 40 bins over [-1, 1]."""
    logits = robustness.predict(subject.model, images).double()
    own = logits.gather(1, target[:, None]).squeeze(1)
    margin = own - logits.scatter(1, target[:, None], -torch.inf).amax(1)
    relative = margin / (logits.amax(1) - logits.amin(1)).clamp_min(1e-300)
    return {"ends": [-1.0, 1.0], "counts": _histogram(relative, -1.0, 1.0), "median": float(relative.median())}


def distances(subject: Subject, settings: Settings) -> Found:
    """How far the nearest other class is: DeepFool's ρ as in Papyan, Han & Donoho 2020, and the norm's own distance."""
    images, target = subject.images(subject.held_out(settings.preset.distances))
    found = robustness.deepfool(subject.model, images)
    few, classes = subject.images(subject.held_out(settings.preset.curve))
    norm: Any = settings.norm
    nearest = robustness.minimum_norm(subject.model, few, classes, norm=norm, seed=settings.seed)
    crossed = found.distance[found.crossed]
    median = float(crossed.median()) if len(crossed) else None
    report = {
        "images": len(images),
        "rho": found.rho if len(crossed) else None,
        "failures": found.failures,
        "deepfool_l2": {"median": median, "images": len(images)},
        "minimum_norm": {
            "norm": norm,
            "median": nearest.median,
            "images": len(few),
            "clean_correct": int(nearest.clean_correct.sum()),
            "failures": nearest.failures,
        },
    }
    lost = [f"DeepFool did not bring {found.failures} of {len(images)} images across"] if found.failures else []
    lost += [f"no adversarial image was found for {nearest.failures} of {len(few)}"] if nearest.failures else []
    return report, lost


def corruptions(subject: Subject, settings: Settings) -> Found:
    """Accuracy under every type and severity."""
    images, target = subject.images(subject.held_out(settings.preset.corrupted))
    report = robustness.corruption_accuracy(subject.model, images, target, seed=settings.seed)
    return vars(report) | {"mean_error": 1 - report.mean_accuracy}, []


def transfer(subject: Subject, settings: Settings) -> Found:
    """Probes of the frozen features on other sets at hand, and on the quarter turns of the run's own images."""
    size, split = settings.preset.features, subject.split
    found: dict[str, dict[str, Any]] = {}
    others = subject.others(settings.sets, settings.root)
    tasks: dict[str, tuple[Split, Split]] = {name: (data.train, getattr(data, split)) for name, data in others.items()}
    seen, held = (turned(subject.drawn(part, size), settings.seed + n) for n, part in enumerate(("train", split)))
    tasks["quarter_turns"] = (seen, held)
    for name, (train, test) in tasks.items():
        if size is not None and len(train) > size:
            train = stratified(train, size, seed=settings.seed, what=name)
        if settings.preset.share < 1:
            test = _first(test, shrunk(len(test), settings.preset.share) or 0)
        known, asked = subject.outputs(train), subject.outputs(test)
        task = (known.features, known.target, asked.features, asked.target)
        shots = min(5, int(torch.bincount(known.target).min()))
        found[name] = {
            "classes": int(known.target.max()) + 1,
            "linear": robustness.linear_probe(*task, seed=settings.seed),
            "knn": robustness.knn_probe(*task, seed=settings.seed),
            "few_shot": robustness.few_shot(*task, shots=shots, draws=settings.preset.draws, seed=settings.seed),
        }
    means = {probe: sum(row[probe].accuracy for row in found.values()) / len(found) for probe in ("linear", "knn")}
    return {"tasks": found, "mean": means}, []


def turned(split: Split, seed: int) -> Split:
    """Every image by a quarter turn drawn evenly, 0 to 3 of them, which is its class: what features keep of a view."""
    turns = torch.arange(len(split))[torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))] % 4
    images = split.read().cpu()
    rows = torch.empty_like(images)
    for count in range(4):
        rows[turns == count] = images[turns == count].rot90(count, (2, 3))
    return Split(rows, turns)


def terminal_phase(subject: Subject, settings: Settings) -> Found:
    """The checkpoint at zero error against this one, on the same images."""
    if subject.checkpoint == "onset" or not (subject.run / "checkpoints" / "onset.pt").is_file():
        raise NotHere("there is no earlier checkpoint of zero error to compare with")
    first = Subject.open(subject.run, checkpoint="onset", device=str(subject.device), split=subject.split)
    before, after = first.of_part(first.split), subject.of_part(subject.split)
    return robustness.paired_accuracy(before.logits.argmax(1), after.logits.argmax(1), after.target), []


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
    "transfer": transfer,
    "long_tail": long_tail,
    "label_noise": label_noise,
    "terminal_phase": terminal_phase,
    "corruptions": corruptions,
    "distances": distances,
    "adversarial": adversarial,
}
"""Every part by its name, in the order in which they are done: the dearest last."""
