"""Nearest class centre, every sample judged by centres that it took no part in."""

from jaxtyping import Float, Integer
from torch import Tensor

from ncreg._features import least_distances
from ncreg.transferability._inputs import labelled


def leave_one_out_accuracy(features: Float[Tensor, "samples dim"], target: Integer[Tensor, " samples"]) -> float:
    """Share of samples whose nearest class centre is their own's, which is taken without them.

    From one pass: without sample i the centre of its class is n/(n−1) times as far away, ‖h_i − μ_c‖·n/(n−1). A sample
    alone in its class counts as wrong, for without it the class has no centre.

    Args:
        features: of labelled images, from one pass in eval mode.
        target: their classes, each of 0 … C−1 present.

    Raises:
        TypeError: no tensors of the right kind.
        ValueError: shapes that do not fit, features not finite, a class without a sample.

    Example:
        >>> import torch
        >>> leave_one_out_accuracy(torch.tensor([[0.0], [1.0], [5.0], [6.0], [2.6]]), torch.tensor([0, 0, 1, 1, 1]))
        0.8
    """
    rows, labels, counts = labelled(features, target)
    rows = rows - rows.mean(0)
    means = rows.new_zeros(len(counts), rows.shape[1]).index_add(0, labels, rows) / counts[:, None]
    size = counts[labels].double()
    own = (rows - means[labels]).norm(dim=1) * size / (size - 1)
    return float(((own < least_distances(rows, means, labels)) & (size > 1)).double().mean())
