"""How a run is evaluated, and how much of it: quick for a look in two minutes, full for what carries a claim."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.config import UserError


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
    """

    name: str
    attacked: int | None
    curve: int | None
    distances: int | None
    corrupted: int | None
    features: int | None
    outside: int | None
    draws: int


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
    """

    preset: Preset
    norm: str = "linf"
    epsilon: float = 4 / 255
    seed: int = 0
    sets: tuple[str, ...] | None = None
    root: Path = Path("data")

    @classmethod
    def made(cls, preset: Preset, *, norm: str, epsilon: float | None, **more: Any) -> Settings:
        """With the norm's usual radius where none is asked for.

        Raises:
            UserError: a radius that is not positive, or beyond every image.
        """
        epsilon = {"linf": 4 / 255, "l2": 0.5}[norm] if epsilon is None else epsilon
        if not 0 < epsilon < float("inf"):
            raise UserError(f"--epsilon {epsilon}: must be a positive radius in units of [0, 1], such as 4/255")
        if norm == "linf" and epsilon > 1:
            raise UserError(f"--epsilon {epsilon}: at most 1, in units of [0, 1]; {epsilon:g}/255?")
        return cls(preset, norm, epsilon, **more)


Found = tuple[Any, list[str]]
"""What a part gives: its result, and its warnings."""
