"""Accuracy and collapse of a run or a model on a split of its own data or of other data, and the report on it."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ncreg.robustness import binomial_interval
from recipes.core import files
from recipes.core.config import DataConfig
from recipes.core.costs import read_costs
from recipes.core.errors import UserError
from recipes.data.lazy_images import report_lost_workers
from recipes.data.load import in_memory_if_small, split_source
from recipes.data.split import Source, Split, TooFew, concatenate, stratified
from recipes.data.unreadable import offering_skip
from recipes.evaluation.collapse_page import page
from recipes.evaluation.collapse_report import MeasuredSplit, measure_split
from recipes.evaluation.feature_store import FeatureStore
from recipes.evaluation.model_pass import nc5_of, pass_over
from recipes.evaluation.model_under_test import ModelUnderTest, run_config, tell
from recipes.training.reporting import ROWS, shown

UNCHANGED = {"train_size": None, "imbalance": 1.0, "label_noise": 0.0}
"""Keys of data that change the training images, and the values with which they change nothing."""

IDENTIFYING = ("name", "root", "val_share", *UNCHANGED)
"""Keys of data that say which images of which set are evaluated."""

TRAIN_IMAGES = 50_000
"""Training images that the evaluated ones are set against, at most."""

MEASURES = (
    ("accuracy", "accuracy", "{:.2%}"),
    ("cross-entropy (nats)", "loss", "{:.4f}"),
    ("calibration error (ECE)", "ece", "{:.2%}"),
    *((label, key, form) for label, split, key, form in ROWS if split == "train" and key != "accuracy"),
)
"""What is printed: label, key in the result, format; the measures of collapse as at the end of a run."""

COSTS = (
    ("expected cost", "expected_cost", "{:.4f}"),
    ("cost of the decisions", "decision_cost", "{:.4f}"),
    ("cost of the cheapest decisions", "cheapest_decision_cost", "{:.4f}"),
    ("accuracy of the cheapest decisions", "cheapest_decision_accuracy", "{:.2%}"),
)
"""What is printed besides where a file says what mistakes cost."""


@dataclass(frozen=True)
class Evaluation:
    """What evaluate.py writes: the result for results files, and the page."""

    result: dict[str, Any]
    page: str


def evaluate_model(
    tested: ModelUnderTest,
    *,
    split: str,
    overrides: Sequence[str],
    layers: Sequence[str] = (),
    train_images: int = TRAIN_IMAGES,
    cost: Path | None = None,
) -> Evaluation:
    """Everything that evaluate.py says of a model on a split.

    Args:
        tested: the run or model.
        split: train, val, test or all.
        overrides: `--data.KEY VALUE` words.
        layers: names of inner layers to measure, ("all",) for the model's stages.
        train_images: training images beside those of another split, at most; 0 for none.
        cost: file of what mistakes cost, by class names.

    Raises:
        UserError: a key without effect, data that does not fit the classifier, images that cannot be measured, or costs
            that cannot be used.
    """
    model, side = tested.model, tested.side
    own = run_config(Path(tested.word)).data if tested.is_run else None
    data, is_other = _data_config(tested.config.data, overrides, split, side, own=own)
    with offering_skip(is_other), report_lost_workers(), ExitStack() as stores:
        source = tested.read(data)
        order = tested.check_fit(source)
        left = dataclasses.replace(data, hold_out=[])  # `read` has left them out, so that order and images agree
        images, beside, notes = _images(source, left, split, seed=tested.config.seed, is_other=is_other)
        notes += tested.notes_on_draw(source, split, all_too=True) if is_other else []
        device, names = next(model.parameters()).device, order.names
        costs = None if cost is None else read_costs(cost, names)
        wanted = {split: order.split(images).to(device)}
        if beside is not None and train_images and split != "train":
            count = min(len(beside), max(train_images, len(source.class_names)))
            chosen = stratified(beside, count, seed=tested.config.seed, what="--train-images")
            wanted = {"train": order.split(chosen).to(device)} | wanted
        measured: list[MeasuredSplit] = []
        for name, part in wanted.items():
            seen = pass_over(model, part, stores.enter_context(FeatureStore()), layers=layers, cost=costs)
            train = measured[0].collapse if measured else None
            measured.append(measure_split(name, seen, names, model.head, train=train))
        tell([*tested.notes, *tested.notes_on(source, order), *notes])
        measured[0].record["measures"]["nc5"] = nc5_of(model, wanted[split], measured[0].collapse)
        facts = [*tested.notes, f"Data: {data.name}, {split} images, {len(source.class_names)} classes."]
        text = page(measured, names, model.head, title=_title(tested), facts=facts) if train_images else ""
    main = measured[-1]
    assert main.seen.decisions is not None
    result = {
        "run": tested.word,
        "data": data.name,
        "data_keys": _data_keys(data),
        "part": split,
        "images": main.record["images"],
        **{name: value for name, value in main.record["measures"].items() if name != "nc5"},
        "per_class": dict(zip(names, main.seen.decisions.per_class(), strict=True)),
        "confusion": main.seen.decisions.confusion.tolist(),
        "report": {part.name: part.record for part in measured},
    }
    return Evaluation(result, text)


def _title(tested: ModelUnderTest) -> str:
    return Path(tested.word).name if tested.is_run else tested.word


def _data_config(
    config: DataConfig, overrides: Sequence[str], split: str, side: int, *, own: DataConfig | None
) -> tuple[DataConfig, bool]:
    """The configuration of the data to evaluate, and whether it is other data than a run's `own`.

    Raises:
        UserError: a key that would do nothing, or divide a run's own images otherwise than it did.
    """
    given = {word.removeprefix("--data.").partition("=")[0] for word in overrides if word.startswith("--data.")}
    data = dataclasses.replace(config, batch_size=2)  # so that any number of images is enough
    is_other = own is None or bool(given & {"name", "root"})
    if "image_size" in given and data.image_size not in (None, side):
        raise UserError(
            f"data.image_size={data.image_size}: the run takes images of side {side}, all are brought to it"
        )
    for key in () if is_other else sorted(given & {"unreadable", "val_share"}):
        if (then := getattr(own, key)) != (now := getattr(data, key)):
            raise UserError(
                f"--data.{key} {now}: the run divided its images with data.{key}={then}, and some that it was trained "
                "on would be held out; drop the key"
            )
    if is_other and split == "all":
        for key in sorted(given & {"val_share", *UNCHANGED}):
            raise UserError(
                f"--data.{key} does nothing with --split all, which takes all images of other data; drop it"
            )
    for key in UNCHANGED.keys() - given if is_other else ():
        setattr(data, key, UNCHANGED[key])
    if is_other and "hold_out" not in given:
        data.hold_out = []  # numbers of the run's own classes
    return data, is_other


def _images(
    source: Source, config: DataConfig, split: str, *, seed: int, is_other: bool
) -> tuple[Split, Split | None, list[str]]:
    """The images to evaluate, the training images beside them, and notes on how they came about."""
    if is_other and split == "all":
        splits = [images for images in (source.train, source.val, source.test) if images is not None]
        return concatenate(in_memory_if_small(splits, config.memory_limit)), None, list(source.notes)
    try:
        data = split_source(source, config, seed=seed)
    except TooFew as error:
        way = "; --split all evaluates every image, none is drawn" if is_other else ""
        raise UserError(f"{error}{way}") from None
    notes = list(data.notes)
    if split != "all":
        return getattr(data, split), data.train, notes
    values = {key: getattr(config, key) for key in UNCHANGED}
    changed = ", ".join(f"data.{key}={value}" for key, value in values.items() if value != UNCHANGED[key])
    sizes = f"{len(data.train)} training, {len(data.val)} validation and {len(data.test)} test images"
    if changed:
        notes.append(f"all is what the run had of its data, with {changed}: {sizes}")
    return concatenate((data.train, data.val, data.test)), None, notes


def _data_keys(config: DataConfig) -> dict[str, Any]:
    """The values that say which images were evaluated, with the folder as an absolute path."""
    without = {"hold_out": sorted(config.hold_out)} if config.hold_out else {}
    return {key: getattr(config, key) for key in IDENTIFYING} | {"root": str(config.root.resolve())} | without


def file_name(result: dict[str, Any], tested: ModelUnderTest) -> str:
    """Name of a result's file, without .json; other data and other checkpoints have names of their own."""
    keys = result["data_keys"]
    checksum = f"{zlib.crc32(json.dumps(keys).encode()):08x}"
    source = Path(tested.word)
    is_own = tested.is_run and keys == _data_keys(run_config(source).data)
    data = keys["name"] if is_own else f"{keys['name']}-{Path(keys['root']).name}-{checksum}"
    checkpoint = f"-{source.stem}" if tested.is_run and source.suffix == ".pt" else ""
    return f"{files.fitting(f'evaluation-{files.file_name(data)}')}-{result['part']}{files.fitting(checkpoint, 40)}"


def accuracy_table(result: dict[str, Any]) -> str:
    """The result as lines to print."""
    lines = [f"{result['images']} images, {result['data']} {result['part']}"]
    rows = [*MEASURES, *(row for row in COSTS if row[1] in result)]
    lines += [f"{label:<38}{shown(result[key], form):>14}" for label, key, form in rows]
    right = sum(row[label] for label, row in enumerate(result["confusion"]))
    low, high = binomial_interval(right, result["images"])
    lines.insert(2, f"{'  its 95 % interval':<38}{f'{low:.1%} to {high:.1%}':>14}")
    lines += ["", "accuracy of each class, lowest first, of how many images, and what it is taken for most often:"]
    names = list(result["per_class"])
    for name, value in sorted(result["per_class"].items(), key=lambda item: 2 if item[1] is None else item[1]):
        row = list(result["confusion"][names.index(name)])
        share = f"{'no image':>14}" if value is None else f"{value:>14.2%} of {sum(row)}"
        row[names.index(name)] = 0
        rival = f"   {names[row.index(max(row))]} ({max(row)})" if max(row) else ""
        lines.append(f"  {name:<36}{share}{rival}")
    return "\n".join(lines)
