"""How a run is evaluated, and how much of it: quick for a look in two minutes, full for what carries a claim."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recipes.core.errors import UserError


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
        share: of these numbers that is left, and of the images that transfer is tested on; see `for_images`.
    """

    name: str
    attacked: int | None
    curve: int | None
    distances: int | None
    corrupted: int | None
    features: int | None
    outside: int | None
    draws: int
    share: float = 1.0

    def for_images(self, height: int, width: int) -> Preset:
        """The same for images of this size: of larger ones than 32 x 32, quick takes fewer.

        Their numbers are multiplied by 32/√(height·width), but stay at ten or more. Two minutes hold no more of them.
        """
        share = min(1.0, 32 / math.sqrt(height * width)) if self.name == "quick" else 1.0
        return replace(
            self,
            attacked=shrunk(self.attacked, share),
            curve=shrunk(self.curve, share),
            distances=shrunk(self.distances, share),
            corrupted=shrunk(self.corrupted, share),
            features=shrunk(self.features, share),
            outside=shrunk(self.outside, share),
            share=share,
        )


def shrunk(number: int | None, share: float) -> int | None:
    """A share of a number of images, ten at least where there are as many; None, all there are, stays."""
    return None if number is None else max(min(number, 10), round(number * share))


PRESETS = {
    "quick": Preset("quick", attacked=64, curve=64, distances=100, corrupted=200, features=2000, outside=500, draws=3),
    "full": Preset(
        "full", attacked=1000, curve=1000, distances=500, corrupted=10_000, features=10_000, outside=10_000, draws=10
    ),
}


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
        attacked: images that every attack is run on; None for the preset's number.
    """

    preset: Preset
    norm: str = "linf"
    epsilon: float = 4 / 255
    seed: int = 0
    sets: tuple[str, ...] | None = None
    root: Path = Path("data")
    attacked: int | None = None

    @classmethod
    def made(cls, preset: Preset, *, norm: str, epsilon: float | None, **more: Any) -> Settings:
        """With the norm's usual radius where none is asked for.

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


Found = tuple[Any, list[str]]
"""What a part gives: its result, and its warnings."""
