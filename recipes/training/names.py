"""The names that train.py --help lists; importing this takes little, as it reads no data and builds no model."""

from __future__ import annotations

from collections.abc import Sequence

from ncreg.heads import HEADS
from ncreg.norms import NORMS
from recipes.data.names import IN_PYTHON, SOURCE_NAMES
from recipes.training.loss_terms import loss_names


def existing_names() -> dict[str, Sequence[str]]:
    """What --help lists beside the recipes, by its title."""
    return {
        "heads": list(HEADS),
        "norms": list(NORMS),
        "losses": loss_names(),
        "data sets": [name for name in SOURCE_NAMES if name != IN_PYTHON]
        + ["torchvision.NAME", "timm:NAME", "FILE.py:NAME"],
    }
