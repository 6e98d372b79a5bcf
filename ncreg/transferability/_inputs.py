"""What every score of labelled features checks first."""

import torch
from torch import Tensor

from ncreg._features import check_all_present, check_features, check_indices


def labelled(features: Tensor, target: Tensor, name: str = "features") -> tuple[Tensor, Tensor, Tensor]:
    """Features and classes in float64 and int64 on the CPU, and the number of samples of each class.

    Raises:
        TypeError: no tensors of the right kind.
        ValueError: shapes that do not fit, features not finite, one class alone, a class without a sample.
    """
    rows = check_features(name, features)
    labels = check_indices("target", target, len(rows))
    classes = int(labels.max()) + 1
    if classes < 2:
        raise ValueError("target holds class 0 alone: at least 2 classes can be told apart")
    return rows, labels, check_all_present("target", labels, classes)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """1 at each sample's class, in float64."""
    return torch.nn.functional.one_hot(labels, classes).double()
