"""What a ranking of backbones found: the scores of each, and the data they were computed on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

NOT_FOR_TRAINED = "for untrained networks"
"""Why a candidate has no NASWOT."""


@dataclass(frozen=True)
class BackboneScores:
    """What is known of a candidate without training it. Higher is better, but for `cdnv`.

    Attributes:
        name: of the candidate.
        linear_probe: held-out accuracy of logistic regression on the training features, its penalty chosen on a part
            of these.
        probe_interval: its Wilson 95 % interval.
        probe_l2: the chosen penalty.
        nearest_center: leave-one-out accuracy of the nearest class centre, on the training features.
        cdnv: class-distance normalised variance of the training features; lower is better.
        logme: log evidence of the labels, a sample; infinite where they are fitted exactly.
        dim: number of features.
        parameters: of the backbone, in all.
        image_size: side of its images in pixels.
        seconds: of the pass over all images, reading included.
        images_per_second: of that pass.
        ncti: sum of its three ranks among the candidates; None where it is the only one.
        ncti_terms: the three numbers that are ranked.
        naswot: of untrained ReLU networks.
        no_naswot: why there is none.
        probe_at_edge: whether the penalty is at an end of its grid, so that a wider grid may do better.
    """

    name: str
    linear_probe: float
    probe_interval: tuple[float, float]
    probe_l2: float
    nearest_center: float
    cdnv: float
    logme: float
    dim: int
    parameters: int
    image_size: int
    seconds: float
    images_per_second: float
    ncti: float | None = None
    ncti_terms: dict[str, float] = field(default_factory=dict)
    naswot: float | None = None
    no_naswot: str = ""
    probe_at_edge: bool = False


@dataclass(frozen=True)
class BackboneRanking:
    """Candidates on a data set, the best linear probe first.

    Attributes:
        data: name of the set.
        data_keys: the `data` keys that were given.
        classes: number of classes.
        train_images: images that the scores were computed on.
        held_out: the split whose accuracy the probe gives.
        held_out_images: images of it.
        seed: of the splits, draws and random weights.
        scores: of the candidates.
        failed: the reason, for each candidate that could not be scored.
        notes: sentences for the user.
    """

    data: str
    data_keys: dict[str, str]
    classes: int
    train_images: int
    held_out: str
    held_out_images: int
    seed: int
    scores: tuple[BackboneScores, ...]
    failed: dict[str, str]
    notes: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """The ranking as plain values."""
        return asdict(self)
