"""The evaluations of a run, each a function of the run under test that returns its outcome and its warnings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ncreg import robustness
from recipes.core.extras import is_installed, pip_install
from recipes.data.split import Split, stratified
from recipes.evaluation.bits import bits
from recipes.evaluation.costs import costly_confusions, costs_of
from recipes.evaluation.label_evaluations import label_noise, long_tail, numbers
from recipes.evaluation.ood_layers import InnerLayers, detection_by_layer
from recipes.evaluation.presets import NotAvailable, Outcome, Settings, reduced
from recipes.evaluation.run_under_test import Outputs, RunUnderTest
from recipes.evaluation.temperature import no_temperature


def calibration(run: RunUnderTest, settings: Settings) -> Outcome:
    """Calibration with a temperature fitted on validation images.

    With split val, half of the validation images fit the temperature and the other half measure the calibration.
    """
    if not len(run.data.val):
        raise NotAvailable("validation images fit T: there is none")
    test, val = run.outputs_on(run.split), run.outputs_on("val")
    source = "validation images"
    if run.split == "val":
        if len(val.target) < 2:
            raise NotAvailable("one half of the validation images fits T, the other is measured: there is one image")
        (fitted, measured), source = halves(val.target, run.seed), "the other half of the validation images"
        test, val = val[measured], val[fitted]
    report = robustness.evaluate_calibration(test.logits, test.target, val.logits, val.target)
    ranks = torch.arange(1, 21).mul(report.samples).add(19).div(20, rounding_mode="floor") - 1  # n·k/20, rounded up
    curve = {"coverage": report.risk_coverage.coverage[ranks], "risk": report.risk_coverage.risk[ranks]}
    outcome = {
        **vars(report),
        "risk_coverage": {"aurc": report.risk_coverage.aurc, "excess_aurc": report.risk_coverage.excess_aurc, **curve},
        "interval": robustness.binomial_interval(int((test.logits.argmax(1) == test.target).sum()), report.samples),
        "validation_images": len(val.target),
        "temperature_from": source,
    }
    why = no_temperature(outcome)
    way_out = "go by the numbers before scaling, or fit it on more images"
    return outcome, [f"no temperature is best: {why}; {way_out}"] if why else []


def halves(target: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of two random halves whose numbers of images of any class differ by one at most."""
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
    order = order[target[order].argsort(stable=True)]
    return order[::2].sort().values, order[1::2].sort().values


def ood(run: RunUnderTest, settings: Settings) -> Outcome:
    """Every OOD score on classes held out of the run's own set, on other image sets that share no class, on noise.

    Only the first are near; the group of the other sets is called near in results since before there were any.
    """
    absent = int((run.data.class_counts() == 0).sum())
    if absent:
        raise NotAvailable(f"its scores need training images of every class; {absent} outputs of the model have none")
    with InnerLayers(run) as layers:
        train = run.outputs(run.draw("train", settings.preset.features))
        test = run.outputs(run.held_out(settings.preset.outside))
        own, near = _outputs_on_held_out_classes(run, settings), _outputs_on_other_sets(run, settings)
        far = _outputs_on_noise(run, settings)
        inner = layers.activations()
    outside = own | near | far
    groups = dict.fromkeys(own, "held_out") | dict.fromkeys(near, "near") | dict.fromkeys(far, "far")
    head = run.model.head
    try:
        report = robustness.evaluate_ood(
            train.features,
            train.target,
            test.features,
            test.logits,
            {name: (part.features, part.logits) for name, part in outside.items()},
            train_logits=train.logits,
            weight=numbers(getattr(head, "weight", None)),
            bias=numbers(getattr(head, "bias", None)),
        )
    except ImportError:
        raise NotAvailable(f"its scores need pytorch-ood: {pip_install('robust')}") from None
    outcome = {
        "detections": report.detections,
        "groups": groups,
        "nc5": report.nc5,
        "nc5_centred": report.nc5_centred,
        "skipped": report.skipped,
        "training_images": report.num_train,
        "neighbours": report.neighbours,
        "mean_auroc": _means(report.detections, groups),
        "histograms": _score_histograms(report),
        "by_layer": detection_by_layer(inner, train, test, outside, list(own | near) or list(far))
        | {"not_watched": layers.reason},
    }
    return outcome, []


def _outputs_on_held_out_classes(run: RunUnderTest, settings: Settings) -> dict[str, Outputs]:
    """Outputs on the classes that data.hold_out kept from the run; empty where it kept none."""
    images, size = run.unseen_classes(), settings.preset.outside
    if images is None:
        return {}
    return {"held_out": run.outputs(images if size is None or size >= len(images) else _evenly_spaced(images, size))}


def _outputs_on_other_sets(run: RunUnderTest, settings: Settings) -> dict[str, Outputs]:
    """Outputs on each available set that shares no class with the run."""
    size, outputs = settings.preset.outside, {}
    for name, data in run.other_sets(settings.sets, settings.root).items():
        if not set(data.class_names) & set(run.data.class_names):
            images: Split = getattr(data, run.split)
            few = images if size is None or size >= len(images) else _evenly_spaced(images, size)
            outputs[name] = run.outputs(few)
    return outputs


def _outputs_on_noise(run: RunUnderTest, settings: Settings) -> dict[str, Outputs]:
    """Outputs on each kind of noise."""
    images, target = run.images(run.held_out(settings.preset.outside))
    return {
        kind: Outputs(*run.outputs_of_images(robustness.noise_images(images, kind, seed=settings.seed)), target.cpu())
        for kind in ("uniform", "gaussian", "shuffle")
    }


def adversarial(run: RunUnderTest, settings: Settings) -> Outcome:
    """Accuracy under every attack at one radius, AutoAttack last, and under margin-PGD over a range of radii."""
    images, target = run.images(run.held_out(settings.attacked or settings.preset.attacked))
    options: dict[str, Any] = {"norm": settings.norm, "seed": settings.seed, "batch_size": run.attacked_at_once}
    kind: Any = settings.preset.name
    with_autoattack, cost = is_installed("pyautoattack"), costs_of(run, settings)
    report = robustness.evaluate_adversarial(
        run.model,
        images,
        target,
        epsilon=settings.epsilon,
        preset=kind,
        autoattack=with_autoattack,
        cost=cost,
        **options,
    )
    few, classes = run.images(run.held_out(settings.preset.curve))
    radii = [settings.epsilon * factor for factor in (0.25, 0.5, 1.0, 2.0, 4.0)]
    radii = [radius for radius in radii if settings.norm == "l2" or radius <= 1]  # beyond 1 every ball is all images
    curve = robustness.robustness_curve(run.model, few, classes, [0.0, *radii], **options)
    outcome = report.as_dict() | {
        "autoattack": report.headline.accuracy if with_autoattack else None,
        "curve": {
            "epsilons": curve.epsilons,
            "accuracy": curve.accuracy,
            "intervals": curve.intervals,
            "images": len(few),
        },
        "margins": _histogram_of(run, images, target),
    }
    if cost is not None and report.costs is not None:
        outcome["costs"]["pairs"] = costly_confusions(report.costs.confusion.cpu(), cost, run.data.class_names)
    warnings = [f"{finding.name}: {finding.explanation}" for finding in report.findings if finding.flagged]
    warnings += [] if with_autoattack else [f"AutoAttack needs pyautoattack: {pip_install('robust')}"]
    return outcome, warnings


def _histogram_of(run: RunUnderTest, images: Tensor, target: Tensor) -> dict[str, Any]:
    """Clean margins in units of the logits' spread, which no scale of the logits changes: 40 bins over [-1, 1]."""
    logits = robustness.predict(run.model, images, run.attacked_at_once).double()
    own = logits.gather(1, target[:, None]).squeeze(1)
    margin = own - logits.scatter(1, target[:, None], -torch.inf).amax(1)
    relative = margin / (logits.amax(1) - logits.amin(1)).clamp_min(1e-300)
    return {"ends": [-1.0, 1.0], "counts": _histogram(relative, -1.0, 1.0), "median": float(relative.median())}


def distances(run: RunUnderTest, settings: Settings) -> Outcome:
    """Smallest adversarial changes: DeepFool's ρ as in Papyan, Han & Donoho 2020, and the least change in the norm."""
    images, target = run.images(run.held_out(settings.preset.distances))
    batch = run.attacked_at_once
    deepfool = robustness.deepfool(run.model, images, batch_size=batch)
    few, classes = run.images(run.held_out(settings.preset.curve))
    norm: Any = settings.norm
    nearest = robustness.minimum_norm(run.model, few, classes, norm=norm, seed=settings.seed, batch_size=batch)
    crossed = deepfool.distance[deepfool.crossed]
    median = float(crossed.median()) if len(crossed) else None
    report = {
        "images": len(images),
        "rho": deepfool.rho if len(crossed) else None,
        "failures": deepfool.failures,
        "deepfool_l2": {"median": median, "images": len(images)},
        "minimum_norm": {
            "norm": norm,
            "median": nearest.median,
            "images": len(few),
            "clean_correct": int(nearest.clean_correct.sum()),
            "failures": nearest.failures,
        },
    }
    warnings = (
        [f"DeepFool did not bring {deepfool.failures} of {len(images)} images across"] if deepfool.failures else []
    )
    warnings += [f"no adversarial image was found for {nearest.failures} of {len(few)}"] if nearest.failures else []
    return report, warnings


def corruptions(run: RunUnderTest, settings: Settings) -> Outcome:
    """Accuracy under every type and severity."""
    images, target = run.images(run.held_out(settings.preset.corrupted))
    batch = run.attacked_at_once
    report = robustness.corruption_accuracy(run.model, images, target, seed=settings.seed, batch_size=batch)
    return vars(report) | {"mean_error": 1 - report.mean_accuracy}, []


def transfer(run: RunUnderTest, settings: Settings) -> Outcome:
    """Probes of the frozen features on the available sets, and on the quarter turns of the run's own images.

    Of a model with a fixed projector they are the encoder's: what is behind it has collapsed onto the run's classes.
    """
    tasks, warnings = transfer_tasks(run, settings)
    probes: dict[str, dict[str, Any]] = {}
    for name, parts in tasks.items():
        fitted, tested = (run.outputs(part, encoder=run.has_two_spaces) for part in parts)
        task = (fitted.features, fitted.target, tested.features, tested.target)
        shots = min(5, int(torch.bincount(fitted.target).min()))
        probes[name] = {
            "classes": int(fitted.target.max()) + 1,
            "linear": robustness.linear_probe(*task, seed=settings.seed),
            "knn": robustness.knn_probe(*task, seed=settings.seed),
            "few_shot": robustness.few_shot(*task, shots=shots, draws=settings.preset.draws, seed=settings.seed),
        }
    means = {probe: sum(row[probe].accuracy for row in probes.values()) / len(probes) for probe in ("linear", "knn")}
    return {"tasks": probes, "mean": means, "features": "encoder" if run.has_two_spaces else "last"}, warnings


def transfer_tasks(run: RunUnderTest, settings: Settings) -> tuple[dict[str, tuple[Split, Split]], list[str]]:
    """Training and test images of each set that is probed, no more than the preset takes, and warnings."""
    size, split = settings.preset.features, run.split
    others = run.other_sets(settings.sets, settings.root)
    tasks: dict[str, tuple[Split, Split]] = {name: (data.train, getattr(data, split)) for name, data in others.items()}
    warnings, count = [], len(run.data.train)
    if count >= 8:  # two of each: a probe is chosen on one of them
        own, test_own = (turned(run.draw(name, size), settings.seed + n) for n, name in enumerate(("train", split)))
        tasks["quarter_turns"] = (own, test_own)
    elif tasks:
        warnings.append(f"no probe of quarter turns: it needs two training images of each, and there are {count}")
    else:
        raise NotAvailable(f"quarter turns need 8 training images, there are {count}; and no other set is at hand")
    for name, (train, test) in tasks.items():
        if size is not None and len(train) > size:
            train = stratified(train, size, seed=settings.seed, what=name)
        if settings.preset.fraction < 1:
            test = _evenly_spaced(test, reduced(len(test), settings.preset.fraction) or 0)
        tasks[name] = train, test
    return tasks, warnings


def turned(split: Split, seed: int) -> Split:
    """Every image rotated by 0 to 3 quarter turns, drawn evenly; the number of turns is its class."""
    turns = torch.arange(len(split))[torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))] % 4
    images = split.read().cpu()
    rows = torch.empty_like(images)
    for count in range(4):
        rows[turns == count] = images[turns == count].rot90(count, (2, 3))
    return Split(rows, turns)


def terminal_phase(run: RunUnderTest, settings: Settings) -> Outcome:
    """Accuracy at zero error and at this checkpoint, paired on the same images."""
    if run.checkpoint == "onset" or not (run.path / "checkpoints" / "onset.pt").is_file():
        raise NotAvailable("there is no earlier checkpoint of zero error to compare with")
    place = [f"--data.root={run.config.data.root}"]
    first = RunUnderTest.open(run.path, checkpoint="onset", device=str(run.device), split=run.split, overrides=place)
    before, after = first.outputs_on(first.split), run.outputs_on(run.split)
    return robustness.paired_accuracy(before.logits.argmax(1), after.logits.argmax(1), after.target), []


def _evenly_spaced(split: Split, size: int) -> Split:
    """`size` evenly spaced images of a split: a set that is sorted by class keeps all its classes."""
    return split[torch.linspace(0, len(split) - 1, size, dtype=torch.float64).round().long()]


def _score_histograms(report: robustness.OODReport) -> dict[str, dict[str, Any]]:
    """Histograms of each score over its range on all images: in-distribution, and each other set."""
    histograms = {}
    for name, scores in report.id_scores.items():
        by_set = {"id": scores} | {key: other[name] for key, other in report.ood_scores.items()}
        everything = torch.cat(list(by_set.values()))
        low, high = float(everything.min()), float(everything.max())
        histograms[name] = {key: _histogram(values, low, high) for key, values in by_set.items()} | {
            "ends": [low, high]
        }
    return histograms


def _histogram(scores: Tensor, low: float, high: float, bins: int = 40) -> list[int]:
    place = ((scores - low) / max(high - low, 1e-300) * bins).long().clamp(0, bins - 1)
    return torch.bincount(place, minlength=bins).tolist()


def _means(detections: Any, groups: dict[str, str]) -> dict[str, dict[str, float]]:
    """Mean AUROC of each score over the sets of a group."""
    means: dict[str, dict[str, float]] = {}
    for group in dict.fromkeys(groups.values()):
        members = [by_score for name, by_score in detections.items() if groups[name] == group]
        means[group] = {score: sum(m[score].auroc for m in members) / len(members) for score in members[0]}
    return means


EVALUATIONS: dict[str, Callable[[RunUnderTest, Settings], Outcome]] = {
    "calibration": calibration,
    "ood": ood,
    "transfer": transfer,
    "long_tail": long_tail,
    "label_noise": label_noise,
    "terminal_phase": terminal_phase,
    "bits": bits,
    "corruptions": corruptions,
    "distances": distances,
    "adversarial": adversarial,
}
"""Every evaluation by its name in EVALUATION_NAMES."""
