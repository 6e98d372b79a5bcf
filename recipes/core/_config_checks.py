"""What the values of a configuration must be; a wrong one is refused by its key, before anything is built."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recipes.core.config import TrainConfig


def check(config: TrainConfig) -> None:
    """Refuse values out of range.

    Raises:
        ValueError: names the key, its value and what is allowed.
    """
    _refuse_null(config)
    data, optim, augment, model = config.data, config.optim, config.augment, config.model
    attack = config.adversarial
    rules = {
        "tpt.max_epochs": (config.tpt.max_epochs, config.tpt.max_epochs >= 1, "at least 1"),
        "data.batch_size": (data.batch_size, data.batch_size >= 2, "at least 2: BatchNorm has no variance of one"),
        "data.val_share": (data.val_share, 0 < data.val_share < 1, "a share in (0, 1)"),
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
        "model.freeze_epochs": (model.freeze_epochs, model.freeze_epochs >= 0, "not negative"),
        "data.label_noise": (data.label_noise, 0 <= data.label_noise < 1, "a share in [0, 1)"),
        "data.imbalance": (data.imbalance, 1 <= data.imbalance < math.inf, "a ratio of at least 1"),
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
        "augment.smoothing": (augment.smoothing, 0 <= augment.smoothing < 1, "a share in [0, 1)"),
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
        "seed": (config.seed, 0 <= config.seed < 2**63, "a whole number, not negative"),
        "loss": (config.loss, bool(config.loss), "at least one term, e.g. {cross_entropy: {}}"),
    }
    for key, (value, holds, allowed) in rules.items():
        if not holds:
            raise ValueError(f"{key}={value}: must be {allowed}")
    for name, term in config.loss.items():
        if not math.isfinite(term.weight):
            raise ValueError(f"loss.{name}.weight={term.weight}: must be finite")
    acting = {term.phase for term in config.loss.values() if term.weight}
    for phase in ("fitting", "terminal"):
        if not acting & {"always", phase}:
            raise ValueError(f"loss={', '.join(config.loss)}: no term acts in the {phase} phase; add one there")


def _refuse_null(group: Any, prefix: str = "") -> None:
    for item in fields(group):
        value = getattr(group, item.name)
        if value is None and "None" not in str(item.type):
            raise ValueError(f"{prefix}{item.name}=null: needs a value; without the key the default holds")
        if is_dataclass(value):
            _refuse_null(value, f"{prefix}{item.name}.")
