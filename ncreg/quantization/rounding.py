"""Symmetric rounding of weights, a scale for each output channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ncreg._checks import check_choice, check_integer, described
from ncreg._copies import copied
from ncreg._readable import readable
from ncreg.frames import max_cosine
from ncreg.heads import FixedHead, NearestETFHead
from ncreg.numerics import at_least_float32

Bits = int | Literal["ternary"]
_M = TypeVar("_M", bound=nn.Module)
THRESHOLD = 0.7  # of a channel's mean |w|: below it a ternary weight is 0


@dataclass(frozen=True, eq=False)
class RoundedFrame:
    """Class vectors of few bits, and what that did to the angle between the two nearest.

    Attributes:
        weight: the rounded rows, each at its old length (C, d).
        max_cosine_before: largest cosine between two class vectors as they came.
        max_cosine: the same after rounding.
    """

    weight: Float[Tensor, "classes dim"]
    max_cosine_before: float
    max_cosine: float

    __str__ = readable


def round_weight(weight: Float[Tensor, ...], bits: Bits, *, channel: int = 0) -> Float[Tensor, ...]:
    """s·clamp(round(w/s), −q, q), q = 2^(bits−1) − 1, s = max|w|/q of each channel; or s·{−1, 0, 1} for "ternary".

    Ternary weights are 0 where |w| is at most 0.7 times the channel's mean |w|, and ±s elsewhere, s the mean |w| there
    (Li, Zhang & Liu, "Ternary Weight Networks", arXiv 1605.04711). A channel of zeros stays. The rounding is
    `torch.fake_quantize_per_channel_affine` with zero points of 0.

    Args:
        weight: of any shape with at least one axis.
        bits: 2 to 16, or "ternary".
        channel: the axis of output channels.

    Raises:
        TypeError: no floating-point tensor, bits of another kind.
        ValueError: bits out of range, a weight that is not finite.

    Example:
        >>> round_weight(torch.tensor([[1.0, -0.4, 0.1]]), 3)
        tensor([[ 1.0000, -0.3333,  0.0000]])
        >>> round_weight(torch.tensor([[1.0, -0.6, 0.1]]), "ternary")
        tensor([[ 0.8000, -0.8000,  0.0000]])
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim < 1:
        raise TypeError("weight must be a floating-point tensor with at least one axis")
    if not bool(weight.isfinite().all()):
        raise ValueError("weight must be finite")
    rows = weight.movedim(check_integer("channel", channel, -weight.ndim, weight.ndim - 1), 0)
    flat = at_least_float32(rows.reshape(len(rows), -1))  # a scale is too small a number for float16
    rounded = _ternary(flat) if _checked_bits(bits) == "ternary" else _uniform(flat, int(bits))
    return rounded.to(weight.dtype).reshape(rows.shape).movedim(0, channel).contiguous()


@overload
def round_weights(model: NearestETFHead, bits: Bits) -> FixedHead: ...


@overload
def round_weights(model: _M, bits: Bits) -> _M: ...


def round_weights(model: nn.Module, bits: Bits) -> nn.Module:
    """A copy of the model with every weight matrix, kernel and class vector rounded by `round_weight`.

    Rounded are the parameters and buffers whose name ends in "weight" and that have at least two axes: linear layers,
    convolutions, embeddings, attention's projections, and the class vectors of learned and fixed heads. Norms, biases
    and position embeddings stay as they are. Transposed convolutions have their channels on the second axis, anew in
    each group. A NearestETFHead, which would restore the simplex from rounded vectors, becomes a FixedHead.

    Args:
        model: any module; it is not changed.
        bits: 2 to 16, or "ternary".

    Raises:
        TypeError: no module, bits of another kind.
        ValueError: bits out of range, a weight that is not finite or computed from others, a model without weights.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> layer.weight.data = torch.tensor([[1.0, -0.6]])
        >>> round_weights(layer, 2).weight.tolist()
        [[1.0, -1.0]]
    """
    _checked_bits(bits)
    names = rounded_names(model)
    if not names:
        raise ValueError(f"{type(model).__name__} has no weight of two or more axes to round")
    rounded = _with_fixed_frames(copied(model))
    for name in names:
        path, _, own = name.rpartition(".")
        module = rounded.get_submodule(path)
        value = getattr(module, own)
        try:
            value.data.copy_(_of_module(module, value.data, bits))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return rounded


def rounded_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the parameters and buffers that `round_weights` rounds, as in the model's state dict; others stay.

    Raises:
        TypeError: no module.
        ValueError: a weight that is computed from others.

    Example:
        >>> rounded_names(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)))
        ('0.weight',)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {described(model)}")
    names = []
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module) or hasattr(module, "weight_v") or hasattr(module, "weight_orig"):
            raise ValueError(
                f"{path or type(module).__name__} computes its weight from others (weight norm, pruning, …), which "
                "rounding would not hold: remove the parametrization first (torch.nn.utils.prune.remove for pruning)"
            )
        if hasattr(module, "normalized_shape"):  # a layer norm over several axes has as many in its weight
            continue
        for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if name.endswith("weight") and value.ndim >= 2 and value.is_floating_point():
                names.append(f"{path}.{name}".lstrip("."))
    return tuple(names)


def round_frame(weight: Float[Tensor, "classes dim"], bits: Bits) -> RoundedFrame:
    """A frame of few bits: rows rounded by `round_weight`, then brought back to their lengths.

    A head of int8 or ternary class vectors is this weight in `ncreg.heads.FixedHead`: the scale of each row is all that
    is not an integer in it. The simplex is no longer exact: `max_cosine` says by how much.

    Args:
        weight: class vectors, such as a simplex ETF.
        bits: 2 to 16, or "ternary".

    Raises:
        TypeError: no floating-point tensor.
        ValueError: bits out of range, a weight that is no finite matrix, a class vector of length 0.

    Example:
        >>> from ncreg.frames import simplex_etf
        >>> frame = simplex_etf(10, 64, generator=torch.Generator().manual_seed(0))
        >>> found = round_frame(frame, "ternary")
        >>> round(found.max_cosine_before, 4), found.max_cosine > found.max_cosine_before
        (-0.1111, True)
    """
    before = float(max_cosine(weight))
    rows = round_weight(weight, bits)
    rows = rows * (torch.linalg.vector_norm(weight, dim=1) / torch.linalg.vector_norm(rows, dim=1))[:, None]
    return RoundedFrame(rows, before, float(max_cosine(rows)))


def _with_fixed_frames(model: nn.Module) -> nn.Module:
    """The model with a FixedHead of the same class vectors in place of each NearestETFHead."""
    made: dict[nn.Module, FixedHead] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, NearestETFHead):
            if module not in made:
                made[module] = FixedHead(module.weight, normalize=module.normalize, scale=1.0).train(module.training)
                made[module].scale = module.scale  # it may be a learned one
            if not path:
                return made[module]
            model.set_submodule(path, made[module])
    return model


def _of_module(module: nn.Module, weight: Tensor, bits: Bits) -> Tensor:
    """The weight with each output channel rounded by itself, wherever the module has these."""
    if not isinstance(module, nn.modules.conv._ConvTransposeNd):
        return round_weight(weight, bits)
    # (in, out/groups, …): the channels of one group are read by the inputs of that group alone
    channels = weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)
    return round_weight(channels, bits).unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)


def _checked_bits(bits: Bits) -> Bits:
    if isinstance(bits, str):
        check_choice("bits", bits, ("ternary",))
        return "ternary"
    return check_integer("bits", bits, 2, 16)


def _uniform(rows: Float[Tensor, "channels n"], bits: int) -> Float[Tensor, "channels n"]:
    largest = 2 ** (bits - 1) - 1
    scale = rows.abs().amax(1, keepdim=True) / largest
    return (rows / torch.where(scale > 0, scale, 1)).round().clamp(-largest, largest) * scale


def _ternary(rows: Float[Tensor, "channels n"]) -> Float[Tensor, "channels n"]:
    size = rows.abs()
    kept = size > THRESHOLD * size.mean(1, keepdim=True)
    scale = (size * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
    return rows.sign() * kept * scale
