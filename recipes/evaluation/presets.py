"""How a run is evaluated: the evaluations, the splits, and the numbers of images of the presets quick and full."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recipes.core.errors import UserError

EVALUATION_NAMES = (
    "calibration",
    "ood",
    "transfer",
    "long_tail",
    "label_noise",
    "terminal_phase",
    "bits",
    "corruptions",
    "distances",
    "adversarial",
)
"""The evaluations in the order in which they run: the most expensive last."""

SPLITS = {"test": "test", "val": "validation"}
"""Splits that a run can be evaluated on, neither trained on, and the word for their images."""


@dataclass(frozen=True)
class Preset:
    """Numbers of images, None for all that there are, and how thorough the attacks are.

    Attributes:
        attacked: test images that every attack is run on.
        curve: test images of the curve of accuracy over epsilon.
        distances: test images whose smallest adversarial change is looked for (DeepFool on 100 in Papyan's protocol).
        corrupted: test images of every corruption and severity.
        features: training images whose features the OOD scores and probes are fitted to.
        outside: images of each OOD set.
        draws: draws of the few-shot probe.
        fraction: of these numbers that is left for large images, and of the images that transfer is tested on; see
            `for_images`.
    """

    name: str
    attacked: int | None
    curve: int | None
    distances: int | None
    corrupted: int | None
    features: int | None
    outside: int | None
    draws: int
    fraction: float = 1.0

    def for_images(self, height: int, width: int) -> Preset:
        """The preset for images of this size: of images larger than 32 x 32, quick takes fewer.

        Their numbers are multiplied by 32/√(height·width), but stay at ten or more, to keep quick at about two minutes.
        """
        fraction = min(1.0, 32 / math.sqrt(height * width)) if self.name == "quick" else 1.0
        return replace(
            self,
            attacked=reduced(self.attacked, fraction),
            curve=reduced(self.curve, fraction),
            distances=reduced(self.distances, fraction),
            corrupted=reduced(self.corrupted, fraction),
            features=reduced(self.features, fraction),
            outside=reduced(self.outside, fraction),
            fraction=fraction,
        )


def reduced(number: int | None, fraction: float) -> int | None:
    """A fraction of a number of images, at least ten if there are as many; None, which means all, stays None."""
    return None if number is None else max(min(number, 10), round(number * fraction))


PRESETS = {
    "quick": Preset("quick", attacked=64, curve=64, distances=100, corrupted=200, features=2000, outside=500, draws=3),
    "full": Preset(
        "full", attacked=1000, curve=1000, distances=500, corrupted=10_000, features=10_000, outside=10_000, draws=10
    ),
}


class NotAvailable(Exception):
    """An evaluation has no meaning for this run, or needs something that is not installed; the message says which."""


@dataclass(frozen=True)
class Settings:
    """How a run is evaluated.

    Attributes:
        preset: numbers of images.
        norm: of the attacks, linf or l2.
        epsilon: their radius, in units of [0, 1].
        seed: of every draw.
        sets: image sets for OOD and transfer; None for those that are available.
        root: folder of these sets.
        attacked: images that every attack is run on; None for the preset's number.
        cost: file of what mistakes cost; None for the run's own, if it has one.
    """

    preset: Preset
    norm: str = "linf"
    epsilon: float = 4 / 255
    seed: int = 0
    sets: tuple[str, ...] | None = None
    root: Path = Path("data")
    attacked: int | None = None
    cost: Path | None = None

    @classmethod
    def create(cls, preset: Preset, *, norm: str, epsilon: float | None, **more: Any) -> Settings:
        """Checked settings; an epsilon of None is the usual one of the norm, 4/255 for linf and 0.5 for l2.

        Raises:
            UserError: a radius that is not positive, or beyond every image; no image to attack.
        """
        epsilon = {"linf": 4 / 255, "l2": 0.5}[norm] if epsilon is None else epsilon
        if not 0 < epsilon < float("inf"):
            raise UserError(f"--epsilon {epsilon}: must be a positive radius in units of [0, 1], such as 4/255")
        if norm == "linf" and epsilon > 1:
            raise UserError(f"--epsilon {epsilon}: at most 1, in units of [0, 1]; {epsilon:g}/255?")
        settings = cls(preset, norm, epsilon, **more)
        if settings.attacked is not None and settings.attacked < 1:
            raise UserError(f"--attacked {settings.attacked}: must be at least one image")
        return settings


Outcome = tuple[Any, list[str]]
"""What an evaluation returns: its result, and its warnings."""
