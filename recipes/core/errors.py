"""The one error that is shown to the user as a line."""

from __future__ import annotations


class UserError(Exception):
    """Something that the user can put right; shown as one line, without a traceback."""


class RankError(UserError):
    """An error of one process of a run under torchrun, which the others do not know of: it is shown by that process."""


class NotHere(UserError):
    """Data that this machine does not have and cannot download; another one may."""


PARTIAL = 3
"""Exit code of a command that gave results for a part of what it was given, and named the rest."""
