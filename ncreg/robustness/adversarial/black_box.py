"""A random search that sees no gradient."""

import torch
from einops import rearrange
from jaxtyping import Float, Integer
from torch import Tensor

from ncreg._checks import check_integer
from ncreg.numerics import seeded
from ncreg.robustness._inputs import Model, in_parts
from ncreg.robustness.adversarial.attempt import AttackResult, Attempt
from ncreg.robustness.adversarial.steps import Norm, check_epsilon, l2_length, per_image, project


@torch.inference_mode(False)
def random_search(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    target: Integer[Tensor, " batch"],
    *,
    epsilon: float,
    norm: Norm = "linf",
    queries: int = 200,
    seed: int = 0,
    batch_size: int = 256,
) -> AttackResult:
    """A black-box attack: random squares are moved by ±2ε a channel, and kept where the margin falls.

    After the Square Attack (Andriushchenko et al. 2020, arXiv 1912.00049), without its tuning: it starts from random
    vertical stripes, its squares shrink from half the side to one pixel, and every proposal is projected onto the
    ball. It needs no gradient, so where it beats an attack that has one, that gradient is to be distrusted.
    Arguments, results and errors are those of `pgd`; `queries` are forward passes an image.

    Example:
        >>> model = lambda x: torch.stack([x.sum((1, 2, 3)), torch.full((len(x),), 1.0)], 1)
        >>> random_search(model, torch.full((1, 1, 2, 2), 0.3), torch.tensor([0]), epsilon=0.1).robust
        tensor([False])
    """
    epsilon, queries = check_epsilon(epsilon, norm), check_integer("queries", queries, 1)
    generator, attempt = seeded(seed), Attempt(model, images, target, batch_size)
    images, radius, left = attempt.images, attempt.radius(epsilon), attempt.correct
    for number in range(queries if epsilon > 0 else 0):
        draw = _uniform(len(images), 2 + images.shape[1], generator)
        if number == 0:
            draw = _uniform(len(images), images.shape[1] * images.shape[3], generator)
        for part in in_parts(left.nonzero().squeeze(1), batch_size):
            x, drawn = images[part], draw[part.cpu()].to(images.device)
            moved = _stripes(x, drawn) if number == 0 else _square(x, drawn, 1 - number / queries)
            if norm == "l2":  # the same bump, as long as the ball is wide
                moved = moved / per_image(l2_length(moved))
            proposal = (attempt.attacked[part].double() + 2 * epsilon * moved).to(x.dtype)
            proposal = project(proposal, x, radius[part], norm)
            attempt.look(part, proposal)
        left = attempt.correct & (attempt.lowest >= 0)
    return attempt.result(f"random search {queries}", norm, epsilon)


def _uniform(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.rand(rows, columns, generator=generator, dtype=torch.float64, device="cpu")


def _stripes(images: Tensor, drawn: Tensor) -> Tensor:
    """A sign for each column of each channel."""
    return rearrange(drawn.round() * 2 - 1, "b (c w) -> b c 1 w", c=images.shape[1]).expand(images.shape)


def _square(images: Tensor, drawn: Tensor, left: float) -> Tensor:
    """A sign a channel within a square of half the side, times the squared fraction of queries `left`; 0 outside."""
    height, width = images.shape[2:]
    side = max(1, round(min(height, width) / 2 * left**2))
    row, column = (drawn[:, :1] * (height - side + 1)).floor(), (drawn[:, 1:2] * (width - side + 1)).floor()
    rows, columns = torch.arange(height, device=drawn.device), torch.arange(width, device=drawn.device)
    vertical, horizontal = (rows >= row) & (rows < row + side), (columns >= column) & (columns < column + side)
    inside = vertical[:, None, :, None] & horizontal[:, None, None, :]
    return inside * (drawn[:, 2:].round() * 2 - 1)[:, :, None, None]
