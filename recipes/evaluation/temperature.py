"""Whether the images that a temperature was fitted on determine one, and what is said where they do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NO_TEMPERATURE = {
    "lower": "the images that T was fitted on hold no error, or hardly one: every smaller T seems better",
    "upper": "on the images that T was fitted on the logits are worse than guessing: every larger T seems better",
    "flat": "the logits of each image that T was fitted on are all equal: T changes nothing",
}
"""Why there is no best temperature, by the bound that the search ran into."""


def no_temperature(calibration: Mapping[str, Any]) -> str | None:
    """Why no temperature is defined, given the outcome of a calibration; None where one is.

    Example:
        >>> no_temperature({"temperature": 1.5, "temperature_at_bound": None}) is None
        True
        >>> no_temperature({"temperature": 0.0014, "temperature_at_bound": "lower"})[:50]
        'the images that T was fitted on hold no error, or '
    """
    bound = calibration.get("temperature_at_bound")  # results of earlier versions do not say it
    return None if bound is None else NO_TEMPERATURE[bound]
