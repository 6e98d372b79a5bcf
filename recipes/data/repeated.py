"""Images that a set holds twice: in training and in test, where they are not new, or under two classes."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from recipes.data.split import Split


def repeated_images(class_names: tuple[str, ...], train: Split, **others: Split) -> Iterator[str]:
    """Notes on images that are there twice, to the last pixel at the side that they are scaled to.

    Nothing is said of images that are still in their files: each would have to be read for it.

    Args:
        class_names: of the classes.
        train: the training images.
        others: the images that are measured on, by a word for them.
    """
    if not isinstance(train.images, Tensor):
        return
    labels = train.target.tolist()
    shown: dict[int, int] = {}
    pairs = [
        (shown[key], label)
        for key, label in zip(_keys(train.images), labels, strict=True)
        if shown.setdefault(key, label) != label
    ]
    if pairs:
        first, second = (class_names[label] for label in pairs[0])
        yield (
            f"{_count(len(pairs), 'training image')} there under another class too, to the last pixel, the first as "
            f"{first} and {second}: one of the two is wrong"
        )
    for what, split in others.items():
        if not isinstance(split.images, Tensor):
            continue
        if both := sum(key in shown for key in _keys(split.images)):
            yield (
                f"{_count(both, f'{what} image')} among the training images too, to the last pixel, of {len(split)}: "
                "what is measured on them is not how well the classifier does on new images"
            )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s are' if number > 1 else ' is'}"


def _keys(images: Tensor) -> Iterator[int]:
    """A hash of the bytes of each image."""
    return (hash(image.tobytes()) for image in images.cpu().numpy())
