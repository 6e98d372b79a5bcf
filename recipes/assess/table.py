"""The printed table of an evaluation."""

from __future__ import annotations

from recipes.assess.result import Result


def table(result: Result) -> str:
    return str(list(result.parts)) + str(result.skipped)
