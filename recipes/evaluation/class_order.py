"""Which output of a model stands for which class of the data: by their names where both have them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from recipes.core.errors import UserError
from recipes.data.class_names import alike
from recipes.data.load import Dataset
from recipes.data.split import Split

WORDNET = re.compile(r"n\d{8}")
"""A name that ImageNet gives a class, whose number among the thousand is agreed on, too."""

MOST_NAMED = 12
"""Names of a list that a message shows at most."""


@dataclass(frozen=True)
class ClassOrder:
    """The outputs of a model and the classes of some data.

    Attributes:
        names: of the outputs.
        output: of each class of the data, (classes,).
        note: a sentence for the user on how they were brought together; empty where nothing needs saying.
    """

    names: tuple[str, ...]
    output: Tensor
    note: str = ""

    def split(self, split: Split) -> Split:
        """The images with the outputs as their classes."""
        return Split(split.images, self.output.to(split.target.device)[split.target])

    def data_set(self, data: Dataset) -> Dataset:
        """Every split of a data set with the outputs as classes."""
        train, val, test = map(self.split, (data.train, data.val, data.test))
        return replace(data, class_names=self.names, train=train, val=val, test=test)


def class_order(known: Sequence[Sequence[str]], data: Sequence[str], outputs: int, *, model: str) -> ClassOrder:
    """The order of a model's outputs beside that of the data's classes.

    Args:
        known: lists of the names of the outputs, any of which may be the data's; none where the model has no names.
        data: names of the data's classes.
        outputs: of the model.
        model: word for it in messages.

    Raises:
        UserError: a class of the data that the model does not know, or more classes than outputs.

    Example:
        >>> class_order([("cat", "dog", "owl")], ("dog", "cat"), 3, model="mine").output
        tensor([1, 0])
    """
    for names in known:
        if set(data) <= set(names):
            place = {name: index for index, name in enumerate(names)}
            return ClassOrder(tuple(names), torch.tensor([place[name] for name in data]))
    numbers = _numbers(data)
    if known and numbers and max(numbers) < outputs and WORDNET.fullmatch(known[0][0]):  # as ImageNetV2's folders
        note = (
            f"the data names its classes by numbers, {listed(data)}: they are taken for the numbers of {model}'s "
            f"outputs, {numbers[0]} for {known[0][numbers[0]]}; --class-names says it if they are others"
        )
        return ClassOrder(tuple(known[0]), torch.tensor(numbers), note)
    if known:
        near = alike([name for name in data if name not in known[0]], known[0])
        raise UserError(
            f"classes differ: {model} knows {listed(known[0])}, the data has {listed(data)}{near}; --class-names says "
            "what the outputs of a model are"
        )
    if len(data) > outputs:
        count = f"{outputs} output{'s' * (outputs != 1)}"
        some = listed(data).partition(" ")[2]
        raise UserError(f"{model} has {count}, the data {len(data)} classes {some}: it needs an output for each")
    names = tuple(data) + tuple(f"output {index}" for index in range(len(data), outputs))
    rest = "" if len(data) == outputs else f", and the other {outputs - len(data)} outputs stand for no class of it"
    sorting = ", sorted as text, as torchvision's ImageFolder does it" if numbers != sorted(numbers) else ""
    note = (
        f"{model} names no classes: its outputs are taken for those of the data in their order, "
        f"{listed(data)}{sorting}{rest}; --class-names says it if they are others"
    )
    return ClassOrder(names, torch.arange(len(data)), note)


def _numbers(names: Sequence[str]) -> list[int]:
    """The names as numbers; none unless all are different ones."""
    if not all(name.isascii() and name.isdecimal() for name in names):
        return []
    numbers = [int(name) for name in names]
    return numbers if len(set(numbers)) == len(numbers) else []


def listed(names: Sequence[str]) -> str:
    """The names in one line, the first of many.

    Example:
        >>> listed(["cat", "dog"])
        '2 (cat, dog)'
    """
    more = ", …" if len(names) > MOST_NAMED else ""
    return f"{len(names)} ({', '.join(names[:MOST_NAMED])}{more})"
