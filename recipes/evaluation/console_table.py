"""The printed table of a result: a block for each evaluation, percentages with their intervals, warnings at the end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from recipes.evaluation.presets import SPLITS
from recipes.evaluation.results import Result
from recipes.evaluation.temperature import no_temperature

Numbers = Mapping[str, Any]
"""The outcome of one evaluation, as results.json holds it."""


def table(result: Result, evaluations: Collection[str] | None = None) -> str:
    """The outcomes of some evaluations, or of all; lines have 100 characters at most, but for reasons and warnings."""
    about = result.about
    images, shown = SPLITS[about.split], BLOCKS if evaluations is None else evaluations
    lines = [f"{about.run}, checkpoint {about.checkpoint}, {about.preset}, {images} images, seed {about.seed}"]
    if about.image_share < 1:
        lines.append(f"  images are large: {100 * about.image_share:.0f} % of the preset's number of images")
    for name, numbers in result.parts.items():
        if name in shown:
            lines += ["", *BLOCKS[name](numbers, images)]
    skipped = [f"  {name}: {reason}" for name, reason in result.skipped.items() if name in shown]
    lines += ["", "not done", *skipped] if skipped else []
    warnings = [f"  {warning}" for warning in result.warnings if warning.split(": ")[0] in shown]
    lines += ["", "WARNINGS", *warnings] if warnings else []
    kept = [name for name in result.parts if name not in shown]
    lines += ["", f"kept from before, not shown: {', '.join(kept)}"] if kept else []
    return "\n".join(lines)


def percent(value: float | None, interval: Any = None) -> str:
    """A fraction in per cent, with its 95 % interval."""
    if value is None:
        return "-"
    ends = "" if interval is None else f"  [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
    return f"{100 * value:6.2f} %{ends}"


def whole(value: float) -> str:
    """Per cent without decimals; with one decimal if the value would round to 0 or 100 without being it."""
    text = f"{value:.0f}"
    return f"{min(max(value, 0.1), 99.9):.1f}" if text in ("0", "100") and value not in (0, 100) else text


def row(label: str, text: str) -> str:
    """A label and its value in a column."""
    return f"  {label:<38}{text}"


def decimal(value: float | None, form: str = ".4f") -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def calibration(numbers: Numbers, images: str) -> list[str]:
    """Before and after temperature scaling; after it nothing where no temperature is defined."""
    source = "validation images" if images == "test" else "the other half of them"
    why = no_temperature(numbers)
    found = f"temperature T = {numbers['temperature']:.3g}" if why is None else "no temperature T"
    lines = [f"calibration ({numbers['samples']} {images} images; {found} from {source})"]
    lines += [] if why is None else [row("scaled by 1/T", f"not defined: {why}")]
    lines.append(row("accuracy", percent(numbers["accuracy"], numbers["interval"])))
    names = {"ece": "ECE, 15 bins", "adaptive_ece": "adaptive ECE", "brier": "Brier score", "nll": "NLL in nats"}
    for key, label in names.items():
        lines.append(row(label, _scaled(numbers, key, ".4f", numbers["before"][key])))
    ranking = numbers["risk_coverage"]
    lines.append(row("risk-coverage area", _scaled(numbers, "aurc", ".5f", ranking["aurc"])))
    lines.append(row("its excess over a perfect ranking", f"{ranking['excess_aurc']:.5f}"))
    return lines


def _scaled(numbers: Numbers, key: str, form: str, before: float) -> str:
    """A score before and, where there is a temperature, after scaling by it."""
    if no_temperature(numbers) is not None:
        return decimal(before, form)
    after = decimal(numbers["after"].get(key), form)  # results of earlier versions lack the area
    return f"{decimal(before, form)}, scaled by 1/T: {after}"


def ood(numbers: Numbers, images: str) -> list[str]:
    """AUROC and FPR95 by score and set."""
    sets = list(numbers["detections"])
    lines = ["out of distribution, AUROC and (FPR at 95 % TPR) in per cent; perfect is 100 (0), chance 50 (95)"]
    lines.append(row("", "".join(f"{name[:14]:>16}" for name in sets)))
    for score in numbers["detections"][sets[0]]:
        cells = (numbers["detections"][name][score] for name in sets)
        text = "".join(f"{100 * cell['auroc']:8.1f} ({100 * cell['fpr95']:5.1f})" for cell in cells)
        lines.append(row(score, text))
    lines.append(row("NC5, centred", "".join(f"{decimal(numbers['nc5_centred'][name]):>16}" for name in sets)))
    lines += [row(score, f"not done: {reason}") for score, reason in numbers["skipped"].items()]
    return lines + ood_by_layer(numbers.get("by_layer"))  # results of earlier versions have none


def ood_by_layer(numbers: Numbers | None) -> list[str]:
    """NC1 and mean AUROC of each layer, and the advice."""
    if numbers is None:
        return []
    lines = [row(f"by layer, AUROC over {', '.join(numbers['compared'])}", f"{'NC1':>9}{'kNN':>8}{'Mahal.':>8}")]
    for name, layer in numbers["layers"].items():
        cells = "".join(f"{100 * layer['mean_auroc'][score]:8.1f}" for score in ("knn", "mahalanobis"))
        lines.append(row(name, f"{layer['nc1']:9.2e}{cells}"))
    lines += [row(name, f"not done: {reason}") for name, reason in numbers["skipped"].items()]
    lines += [row("inner layers", f"not done: {numbers['not_watched']}")] if numbers["not_watched"] else []
    return lines + ([row("advice, for these images", numbers["advice"])] if numbers["advice"] else [])


def transfer(numbers: Numbers, images: str) -> list[str]:
    """Probes by task."""
    of_encoder = numbers.get("features") == "encoder"  # results of earlier versions do not say it
    which = "the encoder's frozen features (before the fixed projector)" if of_encoder else "frozen features"
    lines = [f"transfer of {which}, accuracy on {images} images"]
    for name, task in numbers["tasks"].items():
        for key, label, setting in (("linear", "linear probe", "l2"), ("knn", "nearest neighbours", "k")):
            probe = task[key]
            edge = f", {setting} = {probe['chosen']:g} at the end of its grid" if probe["at_edge"] else ""
            lines.append(row(f"{name}, {label}", percent(probe["accuracy"], probe["interval"]) + edge))
        few = task["few_shot"]
        lines.append(row(f"{name}, {few['shots']} images a class", percent(few["accuracy"], few["interval"])))
    return lines


def long_tail(numbers: Numbers, images: str) -> list[str]:
    """Accuracy by class size, angles, threshold."""
    test = numbers["test" if images == "test" else "val"]
    lines = [f"long tail (largest class / smallest: {test['imbalance']:.0f}; groups by {numbers['scheme']})"]
    count = sum(group["images"] for group in test["groups"].values())
    lines.append(row(f"balanced accuracy, {images} images", f"{percent(test['balanced'])}  (n = {count})"))
    for name, group in test["groups"].items():
        share = f"{percent(group['accuracy'], group['interval'])}  (n = {group['images']})"
        lines.append(row(f"{name}, {len(group['classes'])} classes", share))
    for label, key in (("class means", "mean_angles"), ("class vectors", "vector_angles")):
        for pair, angles in (numbers[key] or {}).items():
            text = f"{angles['mean']:.1f}°, smallest {angles['smallest']:.1f}°"
            lines.append(row(f"angle of {label}, {pair}", text))
    collapse = numbers["minority_collapse"]
    if collapse:
        text = f"at or below {collapse['threshold']:.3g} images: {len(collapse['below'])} classes"
        lines.append(row("minority collapse, by theory", text))
    if numbers.get("no_threshold"):
        lines.append(row("minority collapse, by theory", numbers["no_threshold"]))
    return lines


def label_noise(numbers: Numbers, images: str) -> list[str]:
    """Wrong labels memorised and seen through."""
    return [
        f"label noise ({numbers['num_wrong']} wrong labels of {numbers['num_wrong'] + numbers['num_right']})",
        row("wrong labels memorised", percent(numbers["memorized"], numbers["memorized_interval"])),
        row("wrong labels seen through", percent(numbers["recovered"], numbers["recovered_interval"])),
        row("training accuracy on right labels", percent(numbers["clean_accuracy"])),
    ]


def terminal_phase(numbers: Numbers, images: str) -> list[str]:
    """Accuracy at zero error and at the end."""
    low, high = numbers["interval"]
    change = f"{100 * numbers['change']:+.2f} points  [{100 * low:+.2f}, {100 * high:+.2f}]"
    return [
        f"terminal phase ({numbers['images']} {images} images)",
        row("accuracy at zero error, and here", f"{percent(numbers['before'])}  {percent(numbers['after'])}"),
        row("change", f"{change}, {numbers['gained']} gained, {numbers['lost']} lost"),
    ]


def bits(numbers: Numbers, images: str) -> list[str]:
    """A line for each number of bits, and what was rounded."""
    counts = f"{numbers['images']} {images} images; NC1 and margins of {numbers['training_images']} training images"
    lines = [f"weights of few bits, rounded channel by channel ({counts})"]
    heads = ("accuracy", "change", "agreement", "ECE", "NC1", "margin/norms")
    lines.append("  " + f"{'bits':<10}" + "".join(f"{head:>14}" for head in heads))
    for level, found in numbers["levels"].items():
        cells = [
            f"{100 * found['accuracy']:.2f} %",
            "" if level == "full" else f"{100 * found['change']:+.2f}",
            "" if level == "full" else f"{100 * found['agreement']:.2f} %",
            decimal(found["ece"]),
            decimal(found["nc1"], ".3g"),
            decimal(found["normalized_margin_mean"], ".3f"),
        ]
        lines.append(f"  {level:<10}" + "".join(f"{cell:>14}" for cell in cells))
    total = numbers["numbers_rounded"] + numbers["numbers_left"]
    share = f"{numbers['numbers_rounded']:,} of {total:,} numbers in {len(numbers['rounded'])} tensors"
    lines.append(row("rounded", f"{share}; {len(numbers['left'])} tensors left (norms, biases)"))
    if not numbers["head_rounded"]:
        lines.append(row("class vectors", "the head holds no matrix: nothing of it was rounded"))
    return lines


def corruptions(numbers: Numbers, images: str) -> list[str]:
    """Mean accuracy of each type."""
    first, *_, last = numbers["severities"]
    lines = [f"corruptions ({numbers['samples']} {images} images, severities {first} to {last})"]
    means = f"{percent(numbers['clean_accuracy'])}  {percent(numbers['mean_accuracy'])}"
    lines.append(row("clean, mean of all", means))
    for name, values in zip(numbers["names"], numbers["accuracy"], strict=True):
        lines.append(row(name, "".join(f"{100 * value:7.1f}" for value in values)))
    return lines


def adversarial(numbers: Numbers, images: str) -> list[str]:
    """Attacks, the headline last, and the curve."""
    lines = [f"adversarial ({numbers['norm']}, ε = {numbers['epsilon']:.4g}, {numbers['images']} {images} images)"]
    for attack in numbers["rows"]:
        lines.append(row(attack["name"], percent(attack["accuracy"], (attack["low"], attack["high"]))))
    head = numbers["headline"]
    lines.append(row(f"ROBUST ACCURACY: {head['name']}", percent(head["accuracy"], (head["low"], head["high"]))))
    lines += [row("note", numbers["note"])] if numbers["note"] else []
    lines += _costs(numbers["costs"]) if "costs" in numbers else []
    curve = numbers["curve"]
    cells = (f"{e:.3g}: {whole(100 * a)} %" for e, a in zip(curve["epsilons"], curve["accuracy"], strict=True))
    lines.append(row("margin-PGD over ε (an upper bound)", ", ".join(cells)))
    flags = {True: " !", False: ""}
    checks = (f"{check['name']} {check['value']:.3g}{flags[check['flagged']]}" for check in numbers["findings"])
    lines.append(row("checks (! is flagged)", ", ".join(checks)))
    return lines


def _costs(costs: Numbers) -> list[str]:
    """What mistakes cost before and after the attacks on costs, and the dearest confusions."""
    lines = [
        row("expected cost, clean and attacked", f"{costs['expected_clean']:.4f}  {costs['expected']:.4f}"),
        row("cost of the decisions, likewise", f"{costs['decided_clean']:.4f}  {costs['decided']:.4f}"),
    ]
    for pair in costs["pairs"]:
        label = f"{pair['true']} not for {pair['predicted']} ({pair['cost']:g})"
        lines.append(row(label[:37], percent(pair["robust"], pair["interval"])))
    return lines


def distances(numbers: Numbers, images: str) -> list[str]:
    """Smallest changes."""
    least, deepfool = numbers["minimum_norm"], {"images": numbers["images"], "failures": numbers["failures"]}
    return [
        "smallest adversarial changes, units of images in [0, 1]",
        row("DeepFool, ρ = mean ‖r‖/‖x‖", _distance(numbers["rho"], deepfool)),
        row("DeepFool, median l2 distance", _distance(numbers["deepfool_l2"]["median"], deepfool)),
        row(f"minimum norm, median {least['norm']}", _distance(least["median"], least)),
    ]


def _distance(value: float | None, search: Numbers) -> str:
    """A distance and on how many images it was sought; no number where too few were brought across."""
    failed = f", not found for {search['failures']} of them" if search["failures"] else ""
    return f"{'not defined' if value is None else decimal(value)}  (n = {search['images']}{failed})"


BLOCKS: dict[str, Callable[[Numbers, str], list[str]]] = {
    "calibration": calibration,
    "ood": ood,
    "transfer": transfer,
    "long_tail": long_tail,
    "label_noise": label_noise,
    "terminal_phase": terminal_phase,
    "bits": bits,
    "corruptions": corruptions,
    "adversarial": adversarial,
    "distances": distances,
}
