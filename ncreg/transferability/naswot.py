"""NASWOT: how well an untrained ReLU network tells images apart, by which of its units are on."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ncreg._modes import in_eval_mode

_OTHERS = (
    *("gelu", "silu", "elu", "celu", "selu", "leaky_relu", "hardswish", "hardsigmoid", "hardtanh", "mish", "softplus"),
    *("sigmoid", "tanh", "_prelu_kernel", "rrelu_with_noise", "log_sigmoid_forward", "_softmax", "erf"),
    *("glu", "hardshrink", "softshrink", "_safe_softmax", "_transformer_encoder_layer_fwd"),
)
_FUSED = "attention"  # in the names of torch's kernels with a softmax inside


@torch.no_grad()
def naswot(
    model: Callable[[Float[Tensor, "batch ..."]], Any],
    images: Float[Tensor, "batch ..."],
) -> float:
    """Ln |det K|, K_ij = number of ReLU units that are on for both images i and j or off for both.

    An image's code is one bit for each output of each ReLU, N_A in all, so K_ii = N_A. A network whose codes differ
    more has the larger determinant. Two images with the same code give −∞. Compare networks on the same images: the
    score grows with N_A and with the batch. The functions that the model calls are watched, not its modules, so ReLUs
    in functional form count too, `clamp(min=0)` and `maximum` with 0 among them; `where(x > 0, x, 0)` and products with
    a mask are not seen. Statistics of BatchNorm are those of eval mode.

    Args:
        model: a ReLU network, every part of it in eval mode, usually untrained.
        images: at least two, as the model takes them; 128 in the paper.

    Raises:
        TypeError: images that are no floating-point tensor.
        ValueError: a model with a part in training mode, without a ReLU or with another activation (a sigmoid in a gate
            or attention's softmax too, also within a kernel that makes it all), fewer than two images, values not
            finite.

    Source: Mellor, Turner, Storkey & Crowley, "Neural Architecture Search without Training", ICML 2021
    (arXiv 2006.04647).

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU()).eval()
        >>> net[0].weight.data = torch.tensor([[1.0], [-1.0]])
        >>> round(naswot(net, torch.tensor([[1.0], [-1.0]])), 4)  # K = 2·I: codes 10 and 01
        1.3863
    """
    if not (isinstance(images, Tensor) and images.is_floating_point()):
        raise TypeError("images must be a floating-point tensor")
    if len(images) < 2:
        raise ValueError(f"images holds {len(images)}: at least 2 can be told apart")
    in_eval_mode(model)
    with _Codes(len(images)) as codes:
        model(images.clone())  # it may change its input in place
    if not codes.units:
        raise ValueError("the model has no ReLU, so no codes of on and off: NASWOT is for ReLU networks")
    alike = codes.alike
    if bool((alike - torch.diag(alike.diagonal()) >= codes.units).any()):
        return float("-inf")  # by bits: a determinant would be rounding
    return float(torch.linalg.slogdet(alike).logabsdet)


def _is_relu(name: str, given: dict[str, Any]) -> bool:
    """Whether a call is max(x, 0), under whatever name; a ReLU with a ceiling or another threshold is refused."""
    if name in ("clamp", "clip") and _zero(given.get("min")):
        if given.get("max") is not None:
            raise ValueError("the model clamps from 0 to a largest value: NASWOT is for networks with ReLU alone")
        return True
    if name == "threshold":
        if not (_zero(given["threshold"]) and _zero(given["value"])):
            raise ValueError("the model uses a threshold other than 0: NASWOT is for networks with ReLU alone")
        return True
    if name == "clamp_min":
        return _zero(given["min"])
    return name == "relu" or (name == "maximum" and (_zero(given["self"]) or _zero(given["other"])))


def _zero(bound: Any) -> bool:
    """Whether a bound, a number or a tensor, is 0 throughout."""
    return bound is not None and not (bool(bound.any()) if isinstance(bound, Tensor) else bound)


class _Codes(TorchDispatchMode):
    """Watches a forward pass: how many units, and in how many of them every two images agree."""

    def __init__(self, images: int) -> None:
        super().__init__()
        self.units, self.images = 0, images
        self.alike = torch.zeros(images, images, dtype=torch.float64, device="cpu")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        relu = _is_relu(name.rstrip("_"), given)  # before the call, which may be in place
        result = func(*args, **(kwargs or {}))
        if relu:
            self._take(result)
        elif name.rstrip("_") in _OTHERS or name in _OTHERS or _FUSED in name:
            raise ValueError(f"the model uses {name.strip('_')}: NASWOT is for networks with ReLU alone")
        return result

    def _take(self, outputs: Tensor) -> None:
        if outputs.ndim < 2 or len(outputs) != self.images:
            raise ValueError(f"a ReLU gives shape {tuple(outputs.shape)}, not one row for each of {self.images} images")
        if not bool(outputs.isfinite().all()):
            raise ValueError("a ReLU gives NaN or infinite values")
        on = (outputs > 0).flatten(1).float()  # sums of bits are exact in float32 up to 16 million
        for part in on.split(2**24, dim=1):
            both = part @ part.T
            each = part.sum(1)
            # on for both, or off for both
            self.alike += (part.shape[1] - each[:, None] - each + 2 * both).cpu()
        self.units += on.shape[1]
