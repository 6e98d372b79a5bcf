"""Names of classes: one of its own for each, and the same class behind the same number in every split."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recipes.core.errors import UserError
from recipes.data.split import Split

MOST_NAMED = 20
"""Classes that a message names at most."""


def distinct(names: Iterable[Any]) -> tuple[str, ...]:
    """The names as strings; one that repeats gets its number, as ImageNet has two classes called crane.

    Example:
        >>> distinct(["crane", "owl", "crane"])
        ('crane (0)', 'owl', 'crane (2)')
    """
    plain = [", ".join(name) if isinstance(name, tuple) else str(name) for name in names]
    twice = {name for name in plain if plain.count(name) > 1} if len(set(plain)) < len(plain) else set()
    return tuple(f"{name} ({number})" if name in twice else name for number, name in enumerate(plain))


def check_composition(names: Sequence[str], where: str) -> None:
    """Refuse names of classes that differ only in the composition of their letters (é as one sign or as two).

    Raises:
        UserError: with both names; a computer of Apple and one with Linux write the same name differently.
    """
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise UserError(
                f"{where}: the classes {ascii(other)} and {ascii(name)} differ only in the composition of letters, and "
                "look alike: bring their images into one folder"
            )


def few(names: Sequence[str]) -> str:
    """Names in a line: the first ones, and how many more there are.

    Example:
        >>> few(["cat", "dog"]), few([str(number) for number in range(1000)])
        ('cat, dog', '0, 1, 2, 3, 4 and 995 more')
    """
    return ", ".join(names) if len(names) <= MOST_NAMED else f"{', '.join(names[:5])} and {len(names) - 5} more"


def alike(unknown: Sequence[str], known: Sequence[str]) -> str:
    """A hint where a name differs from a known one in what is hard to see; nothing where none does.

    Example:
        >>> alike(["e"], ["a", "b"]), alike(["Cat "], ["cat", "dog"])
        ('', "; 'Cat ' and 'cat' differ only in case, spaces or the composition of letters: name both alike")
    """
    plain = {_plain(name): name for name in known}
    for name in unknown:
        if (like := plain.get(_plain(name))) is not None:
            return (
                f"; {ascii(name)} and {ascii(like)} differ only in case, spaces or the composition of letters: name "
                "both alike"
            )
    return ""


def _plain(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def without_unlabelled(splits: Mapping[str, Split], what: str) -> tuple[dict[str, Split], list[str]]:
    """The splits that have labels, and a note on each other one: the test images of many a set have -1 for all.

    Where the test split goes, the validation split takes its place, as in a set without test images.
    """
    bare = [part for part, split in splits.items() if part != "train" and _is_bare(split)]
    kept = {part: split for part, split in splits.items() if part not in bare}
    notes = [f"left out: {what}: {part} has no labels (all are negative)" for part in bare]
    if "test" in bare and "val" in kept:
        kept["test"] = kept.pop("val")
        notes[-1] += "; its validation images are tested on"
    return kept, notes


def _is_bare(split: Split) -> bool:
    return bool((split.target < 0).all())


def same_classes(
    splits: Mapping[str, Split], names: Mapping[str, Sequence[str] | None], what: str
) -> tuple[dict[str, Split], list[str]]:
    """The splits with the classes of the training split, by name, and a note on each that had numbered them anew.

    A folder without images of some class, opened by itself, numbers the classes behind it one lower. A split none
    of whose names is known, or whose labels go beyond its names, keeps its numbers, with a note.

    Args:
        splits: by name, as they were opened, each by itself.
        names: of the classes of each, by the split's name; None where it has none, whose numbers stand as they are.
        what: what messages call the data.

    Raises:
        UserError: a split knows some of the classes, and has images of one that the training split does not know.
    """
    known, taken, notes = names["train"], dict(splits), []
    for part, split in splits.items():
        own = names.get(part)
        if known is None or own is None or tuple(own) == tuple(known) or _is_bare(split):
            continue
        number, present = _numbers(own, known), split.target.unique().tolist()
        if not set(own) & set(known) or max(present) >= len(own) or min(present) < 0:
            notes.append(
                f"{what}: {part} names its classes {', '.join(own[:5])}{', …' if len(own) > 5 else ''}, which fit "
                "neither its labels nor the names in train: its classes are taken by number"
            )
            continue
        if unknown := [own[label] for label in present if number[label] < 0]:
            raise UserError(
                f"{what}: {part} has images of {', '.join(unknown[:5])}, which train does not know; its classes are "
                f"{', '.join(known[:5])}{', …' if len(known) > 5 else ''}{alike(unknown, known)}"
            )
        if moved := [label for label in present if number[label] != label]:
            first = moved[0]
            notes.append(
                f"{what}: {part} numbers its classes differently from train ({own[first]} is {first} there and "
                f"{int(number[first])} in train): they are taken by name"
            )
            taken[part] = Split(split.images, number[split.target])
    return taken, notes


def _numbers(own: Sequence[str], known: Sequence[str]) -> Tensor:
    """The number among `known` of each name; -1 for one that is not there."""
    place = {name: number for number, name in enumerate(known)}
    return torch.tensor([place.get(name, -1) for name in own])
