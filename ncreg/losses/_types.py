"""What the batch of a loss looks like, and how a loss names its hyperparameters."""

from jaxtyping import Float, Integer
from torch import Tensor, nn

Features = Float[Tensor, "batch dim"]
Logits = Float[Tensor, "batch classes"]
Labels = Integer[Tensor, " batch"]
ClassVectors = Float[Tensor, "classes dim"]
ClassWeight = Float[Tensor, " classes"]
Loss = Float[Tensor, ""]
Losses = Float[Tensor, ""] | Float[Tensor, " all_ranks_batch"]  # the latter with reduction="none"


def show_hyperparameters(module: nn.Module) -> str:
    """The hyperparameters a module holds."""
    return ", ".join(
        f"{name}={value!r}" for name, value in vars(module).items() if name[0] != "_" and name != "training"
    )
