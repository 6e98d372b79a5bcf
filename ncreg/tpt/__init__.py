"""The terminal phase of training: find zero error, then train past it on purpose."""

from ncreg.tpt._scheduler import FLOOR, TPTScheduler

__all__ = ["FLOOR", "TPTScheduler"]
