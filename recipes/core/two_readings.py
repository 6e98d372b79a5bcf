"""Numbers that the versions of YAML read differently: 010 is 8 in YAML 1.1 and 10 in 1.2, 1:30 is 90 or a text."""

from __future__ import annotations

import re

import yaml

OCTAL = re.compile(r"[-+]?0[0-7_]*")
SIXTIES = re.compile(r"[-+]?\d[\d_]*(:[0-5]?\d)+(\.[\d_]*)?")


def two_readings(text: str) -> str | None:
    """What is to be said of a number that YAML 1.1 and 1.2 read differently; None for any other text.

    Example:
        >>> two_readings("010"), two_readings("007"), two_readings("1e-3")
        ('010 is 8 in YAML 1.1 and 10 in 1.2: write 8 or 10, a text in quotes', None, None)
    """
    digits = text.replace("_", "")
    if OCTAL.fullmatch(text) and int(digits, 8) != int(digits):
        one, other = int(digits, 8), int(digits)
        return f"{text} is {one} in YAML 1.1 and {other} in 1.2: write {one} or {other}, a text in quotes"
    if SIXTIES.fullmatch(text):
        return (
            f"{text} is a number to the base of 60 in YAML 1.1 and a text in 1.2: write the number, or a text in quotes"
        )
    return None


def readings_of(node: yaml.Node) -> str | None:
    """`two_readings` of a node without quotes."""
    return two_readings(node.value) if isinstance(node, yaml.ScalarNode) and node.style is None else None
