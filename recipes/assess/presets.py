"""How much of a run is looked at: quick for a look in two minutes, full for what carries a claim."""

from __future__ import annotations

from dataclasses import dataclass


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
