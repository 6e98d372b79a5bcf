"""Images that cannot be read: the error that names them all, and how they are found before the first epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from recipes.core.errors import UserError

MOST_NAMED = 10
"""Images that a message names at most."""


class Unreadable(UserError):
    """Images that cannot be read.

    Attributes:
        images: a sentence on each, by its name: a path, or its number in a set.
    """

    def __init__(self, images: Mapping[str, str]) -> None:
        super().__init__(images)  # what pickle gives back to another process
        self.images = dict(images)

    def __str__(self) -> str:
        """All sentences in one line, or the first of many."""
        return joined(list(self.images.values()))


@contextmanager
def offering_skip(taken: bool = True) -> Iterator[None]:
    """Let the error of images that cannot be read say that --data.unreadable skip does without them.

    Args:
        taken: whether the command takes that key; otherwise the error stays as it is.

    Raises:
        UserError: from within the block, in place of `Unreadable`.

    Example:
        >>> with offering_skip():
        ...     raise Unreadable({"a.png": "a.png is empty"})
        Traceback (most recent call last):
        recipes.core.errors.UserError: a.png is empty; or leave out what is unreadable: --data.unreadable skip
    """
    try:
        yield
    except Unreadable as error:
        if not taken:
            raise
        raise UserError(f"{error}; or leave out what is unreadable: --data.unreadable skip") from None


def joined(sentences: list[str]) -> str:
    """Sentences in one line; of many the first, and how many more there are.

    Example:
        >>> joined(["a.png is empty", "b.png is empty"])
        'a.png is empty; b.png is empty'
    """
    more = f"; and {len(sentences) - MOST_NAMED} more" if len(sentences) > MOST_NAMED else ""
    return "; ".join(sentences[:MOST_NAMED]) + more


def left_out_note(sentences: list[str]) -> str:
    """The note on images that data.unreadable=skip left out, from a sentence on each."""
    return f"left out as data.unreadable=skip says: {len(sentences)} unreadable images ({joined(sentences)})"
