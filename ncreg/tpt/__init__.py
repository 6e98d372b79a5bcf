"""The terminal phase of training: find zero error, then train past it on purpose."""

from ncreg.tpt._scheduler import TPTScheduler
from ncreg.tpt._terminal import FLOOR

__all__ = ["FLOOR", "TPTScheduler"]
