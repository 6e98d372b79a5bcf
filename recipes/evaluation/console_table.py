"""The printed table of an evaluation: a block a part, intervals beside shares, what is suspicious at the end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from recipes.evaluation.results import Result
from recipes.evaluation.run_under_test import SPLITS

Part = Mapping[str, Any]


def table(result: Result, parts: Collection[str] | None = None) -> str:
    """What was found in the parts asked for, or all, in lines of 100 characters at most but for reasons and doubts."""
    about = result.about
    kind, parts = SPLITS[about.split], BLOCKS if parts is None else parts
    how = f"{about.preset}, {kind} images, seed {about.seed}"
    lines = [f"{about.run}, checkpoint {about.checkpoint}, {how}"]
    if about.image_share < 1:
        lines.append(f"  large images: {100 * about.image_share:.0f} % as many of them as quick takes of small ones")
    for name, part in result.parts.items():
        if name in parts:
            lines += ["", *BLOCKS[name](part, kind)]
    skipped = [f"  {name}: {reason}" for name, reason in result.skipped.items() if name in parts]
    lines += ["", "not done", *skipped] if skipped else []
    doubts = [f"  {warning}" for warning in result.warnings if warning.split(": ")[0] in parts]
    lines += ["", "TO BE DOUBTED", *doubts] if doubts else []
    kept = [name for name in result.parts if name not in parts]
    lines += ["", f"kept from before, not shown: {', '.join(kept)}"] if kept else []
    return "\n".join(lines)


def share(value: float | None, interval: Any = None) -> str:
    """A share in per cent, with its 95 % interval."""
    if value is None:
        return "-"
    ends = "" if interval is None else f"  [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
    return f"{100 * value:6.2f} %{ends}"


def whole(percent: float) -> str:
    """Per cent without decimals; with one where that would show 0 or 100 for what is neither."""
    text = f"{percent:.0f}"
    return f"{min(max(percent, 0.1), 99.9):.1f}" if text in ("0", "100") and percent not in (0, 100) else text


def row(label: str, text: str) -> str:
    """A label and what belongs to it."""
    return f"  {label:<38}{text}"


def number(value: float | None, form: str = ".4f") -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def calibration(part: Part, kind: str) -> list[str]:
    """Before and after temperature scaling."""
    source = "validation images" if kind == "test" else "the other half of them"
    lines = [f"calibration ({part['samples']} {kind} images; temperature T = {part['temperature']:.3g} from {source})"]
    lines.append(row("accuracy", share(part["accuracy"], part["interval"])))
    names = {"ece": "ECE, 15 bins", "adaptive_ece": "adaptive ECE", "brier": "Brier score", "nll": "NLL in nats"}
    for key, label in names.items():
        lines.append(row(label, f"{part['before'][key]:.4f}, scaled by 1/T: {part['after'][key]:.4f}"))
    ranking = part["risk_coverage"]
    lines.append(row("risk-coverage area, its excess", f"{ranking['aurc']:.5f}, {ranking['excess_aurc']:.5f}"))
    return lines


def ood(part: Part, kind: str) -> list[str]:
    """AUROC and FPR95 by score and set."""
    sets = list(part["detections"])
    lines = ["out of distribution, AUROC and (FPR at 95 % TPR) in per cent; perfect is 100 (0), chance 50 (95)"]
    lines.append(row("", "".join(f"{name[:14]:>16}" for name in sets)))
    for score in part["detections"][sets[0]]:
        cells = (part["detections"][name][score] for name in sets)
        text = "".join(f"{100 * cell['auroc']:8.1f} ({100 * cell['fpr95']:5.1f})" for cell in cells)
        lines.append(row(score, text))
    lines.append(row("NC5, centred", "".join(f"{number(part['nc5_centred'][name]):>16}" for name in sets)))
    lines += [row(score, f"not done: {reason}") for score, reason in part["skipped"].items()]
    return lines


def transfer(part: Part, kind: str) -> list[str]:
    """Probes by task."""
    lines = [f"transfer of frozen features, accuracy on {kind} images"]
    for name, found in part["tasks"].items():
        lines.append(row(f"{name}, linear probe", share(found["linear"]["accuracy"], found["linear"]["interval"])))
        lines.append(row(f"{name}, nearest neighbours", share(found["knn"]["accuracy"], found["knn"]["interval"])))
        few = found["few_shot"]
        lines.append(row(f"{name}, {few['shots']} images a class", share(few["accuracy"], few["interval"])))
    return lines


def long_tail(part: Part, kind: str) -> list[str]:
    """Accuracy by class size, angles, threshold."""
    test = part["test" if kind == "test" else "val"]
    lines = [f"long tail (largest class / smallest: {test['imbalance']:.0f}; groups by {part['scheme']})"]
    lines.append(row(f"balanced accuracy, {kind} images", share(test["balanced"])))
    for name, group in test["groups"].items():
        lines.append(row(f"{name}, {len(group['classes'])} classes", share(group["accuracy"], group["interval"])))
    for label, key in (("class means", "mean_angles"), ("class vectors", "vector_angles")):
        for pair, angles in (part[key] or {}).items():
            text = f"{angles['mean']:.1f}°, smallest {angles['smallest']:.1f}°"
            lines.append(row(f"angle of {label}, {pair}", text))
    collapse = part["minority_collapse"]
    if collapse:
        text = f"at or below {collapse['threshold']:.3g} images: {len(collapse['below'])} classes"
        lines.append(row("minority collapse, by theory", text))
    if part.get("no_threshold"):
        lines.append(row("minority collapse, by theory", part["no_threshold"]))
    return lines


def label_noise(part: Part, kind: str) -> list[str]:
    """Memorised and recovered shares."""
    return [
        f"label noise ({part['num_wrong']} wrong labels of {part['num_wrong'] + part['num_right']})",
        row("wrong labels memorised", share(part["memorized"], part["memorized_interval"])),
        row("wrong labels seen through", share(part["recovered"], part["recovered_interval"])),
        row("training accuracy on right labels", share(part["clean_accuracy"])),
    ]


def terminal_phase(part: Part, kind: str) -> list[str]:
    """Accuracy at zero error and at the end."""
    low, high = part["interval"]
    change = f"{100 * part['change']:+.2f} points  [{100 * low:+.2f}, {100 * high:+.2f}]"
    return [
        f"terminal phase ({part['images']} {kind} images)",
        row("accuracy at zero error, and here", f"{share(part['before'])}  {share(part['after'])}"),
        row("change", f"{change}, {part['gained']} gained, {part['lost']} lost"),
    ]


def corruptions(part: Part, kind: str) -> list[str]:
    """Mean accuracy of each type."""
    lines = [
        f"corruptions ({part['samples']} {kind} images, severities {part['severities'][0]} to {part['severities'][-1]})"
    ]
    lines.append(row("clean, mean of all", f"{share(part['clean_accuracy'])}  {share(part['mean_accuracy'])}"))
    for name, values in zip(part["names"], part["accuracy"], strict=True):
        lines.append(row(name, "".join(f"{100 * value:7.1f}" for value in values)))
    return lines


def adversarial(part: Part, kind: str) -> list[str]:
    """Attacks, the headline last, and the curve."""
    lines = [f"adversarial ({part['norm']}, ε = {part['epsilon']:.4g}, {part['images']} {kind} images)"]
    for found in part["rows"]:
        lines.append(row(found["name"], share(found["accuracy"], (found["low"], found["high"]))))
    head = part["headline"]
    lines.append(row(f"ROBUST ACCURACY: {head['name']}", share(head["accuracy"], (head["low"], head["high"]))))
    lines += [row("note", part["note"])] if part["note"] else []
    curve = part["curve"]
    cells = (f"{e:.3g}: {whole(100 * a)} %" for e, a in zip(curve["epsilons"], curve["accuracy"], strict=True))
    lines.append(row("margin-PGD over ε (an upper bound)", ", ".join(cells)))
    checks = (f"{found['name']} {found['value']:.3g}{' !' if found['flagged'] else ''}" for found in part["findings"])
    lines.append(row("checks (! is flagged)", ", ".join(checks)))
    return lines


def distances(part: Part, kind: str) -> list[str]:
    """Smallest changes."""
    least = part["minimum_norm"]
    return [
        "smallest adversarial changes, units of images in [0, 1]",
        row("DeepFool, ρ = mean ‖r‖/‖x‖", f"{number(part['rho'])}  (n = {part['images']})"),
        row("DeepFool, median l2 distance", number(part["deepfool_l2"]["median"])),
        row(f"minimum norm, median {least['norm']}", f"{number(least['median'])}  (n = {least['images']})"),
    ]


BLOCKS: dict[str, Callable[[Part, str], list[str]]] = {
    "calibration": calibration,
    "ood": ood,
    "transfer": transfer,
    "long_tail": long_tail,
    "label_noise": label_noise,
    "terminal_phase": terminal_phase,
    "corruptions": corruptions,
    "adversarial": adversarial,
    "distances": distances,
}
