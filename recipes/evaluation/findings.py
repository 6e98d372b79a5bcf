"""For each measure of a report one line that says what its number means for this model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from recipes.evaluation.last_layer import LastLayer

Record = Mapping[str, Any]

SHARED = 0.5
"""Cosine of two class means from which on they are said to share a direction."""

TIGHT, LOOSE = 0.05, 0.5
"""Below the one features count as collapsed, above the other as not: spread within classes over that between them."""


@dataclass(frozen=True)
class Finding:
    """A measure on the page: its name, its values on the training and the evaluated images, and what they mean."""

    label: str
    values: tuple[str, ...]
    meaning: str


def findings(
    main: Record, train: Record | None, *, split: str, classes: int, layer: LastLayer | None = None
) -> dict[str, list[Finding]]:
    """The measures of a report in groups.

    Args:
        main: record of the evaluated images.
        train: record of the training images, where they were measured.
        split: word for the evaluated images.
        classes: C, the number of outputs.
        layer: what is known of the last layer; None for a learned one with a bias.
    """
    layer = layer or LastLayer()
    columns = [main] if train is None else [train, main]
    collapse = columns[0]
    context = Context(collapse, main, split if train is None else "training", split, classes, layer)
    groups: dict[str, list[Finding]] = {}
    for group, key, label, form, meaning in MEASURES:
        values = [value_of(record, key) for record in columns]
        if any(value is not None for value in values):
            words = meaning(context)
            if key == "nc3_bias" and layer.normalizes:
                values = [None] * len(values)
            if words:
                groups.setdefault(group, []).append(Finding(label, tuple(map(form, values)), words))
    return groups


@dataclass(frozen=True)
class Context:
    """What a sentence can speak of: the record whose collapse is told, that of the evaluated images, words."""

    collapse: Record
    main: Record
    collapse_word: str
    main_word: str
    classes: int
    layer: LastLayer

    def __getitem__(self, key: str) -> float:
        found = value_of(self.collapse, key)
        return math.nan if found is None else found

    def of_main(self, key: str) -> float:
        """A measure of the evaluated images."""
        found = value_of(self.main, key)
        return math.nan if found is None else found


def value_of(record: Record, key: str) -> float | None:
    """A measure of a split; None where it is not there or not defined."""
    value = record["measures"].get(key)
    return None if value is None or not math.isfinite(value) else float(value)


def plain(value: float | None) -> str:
    """Three digits, as a person writes them."""
    if value is None:
        return "–"
    text = f"{value:.3f}" if 1e-2 <= abs(value) < 1000 else "0" if value == 0 else f"{value:.2e}"
    return f"−{text[1:]}" if text.startswith("-") else text


def percent(value: float | None) -> str:
    """A share in per cent."""
    return "–" if value is None else f"{100 * value:.2f} %"


def rank(value: float | None) -> str:
    """A number of directions."""
    return "–" if value is None else f"{value:.1f}"


def _accuracy(c: Context) -> str:
    rows = {name: row["accuracy"] for name, row in c.main["per_class"].items() if row["accuracy"] is not None}
    worst = min(rows, key=lambda name: rows[name])
    wrong = round((1 - c.of_main("accuracy")) * c.main["images"])
    absent = len(c.main["per_class"]) - len(rows)
    none = f"; {absent} of its {c.classes} classes have no image here" if absent else ""
    weakest = f"weakest is class {worst} ({percent(rows[worst])})"
    return f"{wrong} of {c.main['images']} {c.main_word} images are wrong; {weakest}{none}."


def _loss(c: Context) -> str:
    chance = math.log(c.main["classes"])
    word = "better than" if c.of_main("loss") < chance else "no better than"
    return f"Guessing evenly among {c.main['classes']} classes costs {chance:.2f}: the probabilities are {word} that."


def _ece(c: Context) -> str:
    sure, right = c.of_main("confidence"), c.of_main("accuracy")
    if abs(sure - right) < 0.01:
        verdict = "on average its confidence is right to within 1 %"
    else:
        verdict = f"on average it is too {'sure' if sure > right else 'unsure'}"
    return f"It is {sure:.1%} sure and {right:.1%} right on {c.main_word} images: {verdict}."


def _nc1(c: Context) -> str:
    directions = c["nc1_rank"]
    ratio = c["nc1"] * c.collapse["classes"] / max(1.0, directions)
    return (
        f"Along the {directions:.0f} directions between classes, features of a class spread {plain(ratio)} times as "
        f"much as the class means: {_verdict(ratio)}."
    )


def _verdict(ratio: float) -> str:
    return "collapsed" if ratio < TIGHT else "partly collapsed" if ratio < LOOSE else "not collapsed"


def _cdnv(c: Context) -> str:
    verdict = "classes are told apart from few images" if c["cdnv"] < 0.1 else "the clouds of two classes overlap"
    return f"The variance within two classes over the squared distance of their means: {verdict}."


def _equinorm(c: Context) -> str:
    rows = {name: row["length"] for name, row in c.collapse["per_class"].items() if row["length"] is not None}
    longest, shortest = max(rows, key=lambda n: rows[n]), min(rows, key=lambda n: rows[n])
    ratio = rows[longest] / max(rows[shortest], 1e-300)
    return f"The mean of class {longest} lies {ratio:.2f} times as far out as that of {shortest} (0: all alike)."


def _angles(c: Context) -> str:
    ideal = f"a simplex has {-1 / (c.collapse['classes'] - 1):.2f}"
    if not c.collapse["closest"]:
        return ""
    pair = c.collapse["closest"][0]
    (first, second), cosine = pair["classes"], pair["cosine"]
    if cosine >= SHARED:
        return f"Features of class {first} and {second} share a direction: cosine {cosine:.2f}; {ideal}."
    return f"No two classes share a direction: the closest, {first} and {second}, have cosine {cosine:.2f}; {ideal}."


def _etf(c: Context) -> str:
    value = c["etf_distance"]
    word = "a simplex" if value < 0.02 else "near a simplex" if value < 0.2 else "far from a simplex"
    return f"Of lengths and angles together the class means are {word} (0: exactly one, 1: all on a line)."


def _nc3(c: Context) -> str:
    value, ends = c["nc3"], "(0: proportional, 1.41: at right angles)"
    if c.layer.fixed:
        word = "point along them" if value < 0.1 else "point roughly along them" if value < 0.7 else "point elsewhere"
        said = f"The class vectors of this head are fixed, so NC3 is about the class means alone: they {word} {ends}."
        return said + _nc3_along(c.layer)
    word = "point the same way" if value < 0.1 else "roughly agree" if value < 0.7 else "do not agree"
    if c.layer.follows:
        return f"The head's simplex follows the running class means: it and the class means {word} {ends}."
    return f"Class vectors of the last layer and class means {word} {ends}."


def _nc3_along(layer: LastLayer) -> str:
    """The part of the class means that fixed class vectors see; nothing where that is all of them."""
    if layer.along is None or layer.along > 0.995:
        return ""
    return (
        f" {100 * layer.along:.0f} % of the variance of the means lies where class vectors point, and there NC3 is "
        f"{plain(layer.nc3_along)}; the rest changes no decision."
    )


def _nc3_bias(c: Context) -> str:
    if c.layer.normalizes:
        return (
            "No measure of this head: it divides the features of an image by their length, so how large the logits of "
            "the centre are says nothing."
        )
    what = "What is left of the logits at the centre of the class means"
    return f"{what}; {'0 where the bias cancels it' if c.layer.has_bias else 'the head has no bias to cancel it'}."


def _nc4(c: Context) -> str:
    images = f"{round(c['nc4'] * c.collapse['images'])} of {c.collapse['images']} {c.collapse_word} images"
    own = c.main.get("on_training_means", {}).get("nc4")
    more = f", and on {percent(own)} of the {c.main_word} images with the training means" if own is not None else ""
    return f"On {images} the nearest class mean says another class than the last layer{more}."


def _nearest(c: Context) -> str:
    own = c.main.get("on_training_means", {}).get("ncc_accuracy")
    if own is None:
        return "Accuracy of taking the class whose mean is nearest, without the last layer."
    return f"Without the last layer, the nearest training mean is right on {percent(own)} of the {c.main_word} images."


def _nc0(c: Context) -> str:
    return "Squared length of the sum of the class vectors, a class: 0 where they balance each other."


def _nc5(c: Context) -> str:
    word = "nearly at right angles to" if c["nc5"] < 0.2 else "partly along"
    return f"Features of images with shuffled pixels are {word} the class means (0: at right angles, 1: along one)."


def _intra(c: Context) -> str:
    loosest = f"the loosest class has {plain(c['intra_cosine_min'])}"
    return (
        f"Two images of a class point the same way to cosine {plain(c['intra_cosine'])}; {loosest} (1: one direction)."
    )


def _inter(c: Context) -> str:
    ideal = -1 / (c.collapse["classes"] - 1)
    return f"Images of two classes have cosine {plain(c['inter_cosine'])} on average; at collapse {ideal:.3f}."


def _margin(c: Context) -> str:
    if "margins" not in c.main:
        return ""
    half, most = plain(c.main["margins"]["median"]), plain(c.main["margins"]["q01"])
    return (
        f"Half of the {c.main_word} images lead their rival by {half} or more, all but 1 % by {most}; below 0 is wrong."
    )


def _within_rank(c: Context) -> str:
    used = rank(c["within_effective_rank"])
    return f"Within their classes features spread over about {used} of {c.collapse['dimensions']} dimensions."


def _effective(c: Context) -> str:
    classes = c.collapse["classes"]
    used = rank(c["effective_rank"])
    return f"The class means use about {used} of the {classes - 1} directions that {classes} classes can span."


def _rankme(c: Context) -> str:
    little = c["rankme"] < 1.5 * (c.collapse["classes"] - 1) + 1
    word = "little beside the classes is left in them" if little else "there is more than the classes in them"
    used = rank(c["rankme"])
    return f"All features together use about {used} of {c.collapse['dimensions']} dimensions: {word}."


Meaning = Callable[[Context], str]
MEASURES: tuple[tuple[str, str, str, Callable[[float | None], str], Meaning], ...] = (
    ("Decisions", "accuracy", "accuracy", percent, _accuracy),
    ("Decisions", "loss", "cross-entropy (nats)", plain, _loss),
    ("Decisions", "ece", "calibration error (ECE)", percent, _ece),
    ("Decisions", "margin_mean", "mean margin (logits)", plain, _margin),
    ("Within classes", "nc1", "NC1 within-class variability", plain, _nc1),
    ("Within classes", "cdnv", "class-distance normalised variance", plain, _cdnv),
    ("Within classes", "intra_cosine", "cosine within classes", plain, _intra),
    ("Within classes", "within_effective_rank", "effective rank within classes", rank, _within_rank),
    ("Between classes", "nc2_equinorm", "NC2 lengths of means, std/mean", plain, _equinorm),
    ("Between classes", "nc2_equiangularity", "NC2 mean |cosine + 1/(C−1)|", plain, _angles),
    ("Between classes", "inter_cosine", "cosine between classes", plain, _inter),
    ("Between classes", "etf_distance", "distance from a simplex", plain, _etf),
    ("Between classes", "effective_rank", "effective rank of the means", rank, _effective),
    ("Between classes", "rankme", "RankMe of all features", rank, _rankme),
    ("Last layer", "nc0", "NC0 sum of class vectors", plain, _nc0),
    ("Last layer", "nc3", "NC3 means against class vectors", plain, _nc3),
    ("Last layer", "nc3_bias", "NC3 bias against the centre", plain, _nc3_bias),
    ("Last layer", "nc4", "NC4 disagreement with nearest mean", percent, _nc4),
    ("Last layer", "ncc_accuracy", "accuracy of the nearest mean", percent, _nearest),
    ("Last layer", "nc5", "NC5 shuffled images against means", plain, _nc5),
)
"""Group, key, name, form of the number, and the sentence."""


def train_against_test(train: Record, main: Record, split: str) -> list[str]:
    """Sentences that set the evaluated images against the training images."""
    said = []
    if value_of(train, "accuracy") is not None:
        gap = train["measures"]["accuracy"] - main["measures"]["accuracy"]
        way = "lower" if gap > 0 else "higher"
        said.append(f"Accuracy is {100 * abs(gap):.1f} points {way} on {split} than on training images.")
    before, after = value_of(train, "nc1"), value_of(main, "nc1")
    if before and after:
        ratio = after / before
        word = "as collapsed as the training features" if ratio < 1.5 else "less collapsed than the training features"
        said.append(f"NC1 on {split} images is {ratio:.2g} times that on training images: their features are {word}.")
    return said
