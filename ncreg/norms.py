"""Norms for the last layer: what stands between the pooled features and the head."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ncreg._checks import check_choice, check_flag, check_fraction, check_integer, check_keywords, check_positive
from ncreg._features import check_pooled
from ncreg._transforms import batched, fx_leaf, jit_tracing, recomputed, recorded, wrapped
from ncreg.distributed import all_reduce_sum, world_size


class LastBatchNorm(nn.Module):
    """Batch normalisation of pooled features before the head: y = γ ⊙ (h − μ)/√(σ² + eps), no β by default.

    Without β the training features have mean 0 and (1/N)Σ‖y‖² = ‖γ‖², which weight decay on γ then bounds (Pan & Cao,
    "Towards Understanding Neural Collapse: The Effects of Batch Normalization and Weight Decay", arXiv 2309.04644).
    Statistics are those of all ranks, exact for uneven batches, on CPU and GPU; every rank must take part in a training
    forward. In eval mode, and on one process, it is torch's batch_norm, but a batch that is not finite (an overflow in
    float16, whose step a GradScaler skips) leaves the running statistics alone, and under activation checkpointing a
    batch counts once, not again where backward recomputes it (again if the norm itself is compiled). `eval()` warns
    once of batches that overflowed in float16; under torch.compile nothing notices them. It is no subclass of torch's
    BatchNorm, so SyncBatchNorm.convert_sync_batchnorm leaves it alone; so does torch.optim.swa_utils.update_bn: use
    `ncreg.update_bn` after averaging weights.

    Args:
        num_features: d.
        bias: whether to learn β.
        gamma: a "vector" γ (d,), a "scalar" γ (1,) or "none" (γ = 1).
        eps: added to the variance.
        momentum: weight of the newest batch in the running statistics; None averages all batches alike.
        device: where parameters and buffers live.
        dtype: of parameters and buffers.

    Raises:
        ValueError: for fewer than two samples in training (over all ranks), or features not (batch, d).
        TypeError: for features of another dtype than the norm's; those of float16 and bfloat16 go into float32.

    Example:
        >>> LastBatchNorm(3)(torch.tensor([[1., 2., 3.], [3., 2., 1.]])).round(decimals=3)
        tensor([[-1.,  0.,  1.],
                [ 1.,  0., -1.]], grad_fn=<RoundBackward1>)
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    _entered: Tensor | None = None  # whether every batch of float16 entered the running statistics
    _warned = False

    def __init__(
        self,
        num_features: int,
        *,
        bias: bool = False,
        gamma: Literal["vector", "scalar", "none"] = "vector",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = check_integer("num_features", num_features, 1)
        sizes = {"vector": num_features, "scalar": 1, "none": None}
        self.gamma, self.eps = check_choice("gamma", gamma, sizes), check_positive("eps", eps)
        self.momentum = None if momentum is None else check_fraction("momentum", momentum)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        size = sizes[gamma]
        self.weight = nn.Parameter(torch.ones(size, **place)) if size is not None else None
        self.bias = nn.Parameter(torch.zeros(num_features, **place)) if check_flag("bias", bias) else None
        self.register_buffer("running_mean", torch.zeros(num_features, **place))
        self.register_buffer("running_var", torch.ones(num_features, **place))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=device))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start again: γ = 1, β = 0, no running statistics."""
        self.reset_running_stats()
        if self.weight is not None:
            self.weight.fill_(1)
        if self.bias is not None:
            self.bias.zero_()

    def reset_running_stats(self) -> None:
        """Forget the running statistics."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()
        self._entered = None

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._entered = None  # what overflowed belongs to the statistics of before

    @fx_leaf
    def forward(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Normalised features, by batch statistics in training and running statistics in eval mode."""
        check_pooled(features, self.num_features, "norm")
        _check_dtype(features, self.running_mean.dtype)
        weight: Tensor | None = self.weight
        if weight is not None and self.gamma == "scalar":
            weight = weight.repeat(self.num_features)  # batch_norm's backward misreads an expanded weight
        # FSDP's mixed precision rounds parameters and leaves buffers: both go in the buffers' dtype.
        weight, bias = (None if p is None else p.to(self.running_mean.dtype) for p in (weight, self.bias))
        running = self.running_mean, self.running_var
        if not self.training:
            return F.batch_norm(features, *running, weight, bias, False, 0.0, self.eps)
        if wrapped(features) and not batched(self.running_mean):
            raise RuntimeError(
                "LastBatchNorm writes running statistics in training, which torch.func cannot undo: call .eval(), or "
                "vmap over stacked buffers as well (torch.func.stack_module_state and functional_call)"
            )
        # Clones: batch_norm keeps them for backward, so that they must not change once they are written.
        mean, variance, count = self.running_mean.clone(), self.running_var.clone(), self.num_batches_tracked + 1
        if world_size() > 1:
            normed = self._all_ranks(features, weight, mean, variance, self._share(count))
        else:
            normed = self._one_rank(features, weight, bias, mean, variance, self._share(count))
        self._write(mean, variance, count, features)
        return normed

    def _share(self, count: Tensor) -> float | Tensor:
        """The newest batch's weight in the running statistics; a tensor where the count cannot be read."""
        if self.momentum is not None:
            return self.momentum
        return count.to(self.running_mean.dtype).reciprocal() if recorded(count) else 1 / float(count)

    @torch.no_grad()
    def _write(self, mean: Tensor, variance: Tensor, count: Tensor, features: Tensor) -> None:
        """Take over new running statistics, unless they are not finite: nothing would mend them later."""
        if recomputed():
            return
        largest = torch.finfo(
            mean.dtype
        ).max  # compiled code has finite values, in float32, of what overflows when stored
        finite = ((mean.abs() <= largest) & (variance <= largest)).all()
        for name, value in (("running_mean", mean), ("running_var", variance), ("num_batches_tracked", count)):
            buffer = getattr(self, name)
            buffer.copy_(torch.where(finite, value, buffer))
        unreadable = recorded(finite) or wrapped(finite) or finite.is_meta
        if not (unreadable or self._warned) and _in_float16(features, self.running_mean.dtype):
            known = self._entered  # stays on the device: to read it would wait for the batch
            self._entered = finite if known is None or known.device != finite.device else known & finite

    def train(self, mode: bool = True) -> LastBatchNorm:
        """Training or eval mode; warns once, on the way to eval mode, of batches that were not finite."""
        entered, self._entered = self._entered, None if not mode else self._entered
        if not mode and entered is not None and not bool(entered):
            self._warned = True
            none = not int(self.num_batches_tracked)
            warnings.warn(
                "LastBatchNorm left batches out of its running statistics that are not finite in float16: "
                + ("none has entered them, and eval mode goes by mean 0 and variance 1; " if none else "")
                + "keep the norm in float32 (norm.float()), make the features smaller, or train in bfloat16",
                stacklevel=2,
            )
        return super().train(mode)

    def _one_rank(
        self,
        features: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        share: float | Tensor,
    ) -> Tensor:
        """Torch's batch_norm by the batch's statistics; it moves the running ones."""
        if not jit_tracing():
            _require_two(features.shape[0])
        if isinstance(share, float):
            return F.batch_norm(features, mean, variance, weight, bias, True, share, self.eps)
        batch = torch.zeros_like(mean), torch.zeros_like(variance)
        normed = F.batch_norm(features, *batch, weight, bias, True, 1.0, self.eps)
        with torch.no_grad():
            mean.lerp_(batch[0], share)
            variance.lerp_(batch[1], share)
        return normed

    def _all_ranks(
        self,
        features: Tensor,
        weight: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        share: float | Tensor,
    ) -> Tensor:
        """Two-pass statistics over all ranks: the mean first, then the squared deviations from it."""
        wide = features if features.dtype == torch.float64 else features.float()
        ones = wide.new_full((1,), wide.shape[0])
        total = all_reduce_sum(torch.cat([wide.sum(0), ones]))
        mean, count = total[:-1] / total[-1], total[-1].detach()
        if wide.shape[0] < 2:  # a rank with two samples knows without a device sync
            _require_two(int(count), " over all ranks")
        deviation = wide - mean
        scatter = all_reduce_sum(deviation.square().sum(0))
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), share)
            running_var.lerp_((scatter / (count - 1)).to(running_var.dtype), share)
        scaled = deviation * torch.rsqrt(scatter / count + self.eps)
        scaled = scaled if weight is None else scaled * weight
        scaled = scaled if self.bias is None else scaled + self.bias
        return scaled.to(features.dtype)

    def extra_repr(self) -> str:
        """What tells this norm from another."""
        bias = self.bias is not None
        return f"{self.num_features}, gamma={self.gamma!r}, {bias=}, eps={self.eps}, momentum={self.momentum}"


def _check_dtype(features: Tensor, dtype: torch.dtype) -> None:
    """Refuse what torch's batch_norm takes for no pair: it wants one dtype, or half precision into float32.

    Raises:
        TypeError: features of another dtype.
    """
    halves = torch.float16, torch.bfloat16
    if features.dtype != dtype and not (features.dtype in halves and dtype == torch.float32):
        raise TypeError(
            f"features of {features.dtype} into a LastBatchNorm of {dtype}: bring both to one dtype "
            f"(features.to({dtype}) or norm.to({features.dtype}))"
        )


def _in_float16(features: Tensor, dtype: torch.dtype) -> bool:
    """Whether features or statistics of this dtype are in float16, or the features come from autocast to it."""
    kind = features.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.float16 in (features.dtype, dtype, torch.get_autocast_dtype(kind) if autocast else None)


def _require_two(count: int, where: str = "") -> None:
    if count < 2:
        raise ValueError(
            f"a batch of {count} sample(s){where} has no variance, which LastBatchNorm needs in training: "
            "drop the last partial batch (drop_last=True), use a larger batch, or call .eval()"
        )


class FilterResponseNorm(nn.Module):
    """Filter response normalisation of pooled features: y = γ ⊙ h/√(h² + |ε|) + β, with a learned ε.

    On a vector the response's mean square is the response's square, so this is a smooth sign of each feature, and
    ε, learned, says how smooth. No batch statistics. Source: Singh & Krishnan, "Filter Response Normalization
    Layer", CVPR 2020 (arXiv 1911.09737), without its thresholded activation.

    Args:
        num_features: d.
        bias: whether to learn β.
        eps: where ε starts; at least 1e-6 is added to h² for good.
        device: where the parameters live.
        dtype: of the parameters.

    Example:
        >>> FilterResponseNorm(2)(torch.tensor([[3.0, 0.0]])).detach().round(decimals=3)
        tensor([[0.9490, 0.0000]])
    """

    def __init__(
        self,
        num_features: int,
        *,
        bias: bool = False,
        eps: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = check_integer("num_features", num_features, 1)
        self._eps = check_positive("eps", eps)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(num_features, **place))
        self.bias = nn.Parameter(torch.zeros(num_features, **place)) if check_flag("bias", bias) else None
        self.eps = nn.Parameter(torch.full((1,), eps, **place))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start again: γ = 1, β = 0, and ε where it started."""
        self.weight.fill_(1)
        self.eps.fill_(self._eps)
        if self.bias is not None:
            self.bias.zero_()

    @fx_leaf
    def forward(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Normalised features, each by itself."""
        check_pooled(features, self.num_features, "norm")
        wide = features.to(torch.promote_types(features.dtype, torch.float32))  # float16 ends at the square of 255
        scaled = self.weight * wide / _hypotenuse(wide, (self.eps.abs().to(wide.dtype) + 1e-6).sqrt())
        return (scaled if self.bias is None else scaled + self.bias).to(features.dtype)

    def extra_repr(self) -> str:
        """What tells this norm from another."""
        return f"{self.num_features}, bias={self.bias is not None}"


def _hypotenuse(a: Tensor, b: Tensor) -> Tensor:
    """√(a² + b²) without overflow; b is above 0."""
    if not torch.onnx.is_in_onnx_export():
        return torch.hypot(a, b)
    largest = torch.maximum(a.abs(), b)  # ONNX has no hypot
    return largest * ((a / largest).square() + (b / largest).square()).sqrt()


NORMS: dict[str, Callable[..., nn.Module]] = {
    "none": nn.Identity,
    "batch": LastBatchNorm,
    "layer": partial(nn.LayerNorm, bias=False),
    "rms": nn.RMSNorm,
    "filter_response": FilterResponseNorm,
}
"""Norms that last_norm knows by name."""

_WIDTH = ("num_features", "normalized_shape")  # their first argument


def last_norm(kind: str, num_features: int, **args: Any) -> nn.Module:
    """The last-layer norm of that kind, none of which has a bias by default.

    Args:
        kind: "none" (identity), "batch" (LastBatchNorm), "layer" (nn.LayerNorm), "rms" (nn.RMSNorm) or
            "filter_response" (FilterResponseNorm).
        num_features: d.
        **args: go to the norm's constructor.

    Raises:
        ValueError: for an unknown kind, a setting that it does not have, or settings for none.

    Example:
        >>> last_norm("batch", 8, gamma="scalar")
        LastBatchNorm(8, gamma='scalar', bias=False, eps=1e-05, momentum=0.1)
    """
    if not isinstance(kind, str) or kind not in NORMS:
        raise ValueError(f"norm {kind!r} is unknown; known: {', '.join(map(repr, NORMS))}")
    if kind == "none" and args:
        raise ValueError(f"norm 'none' has no setting, but got {', '.join(args)}: leave it out, or pick another norm")
    check_keywords(f"norm {kind!r}: args", args, NORMS[kind], besides=_WIDTH)
    return NORMS[kind](check_integer("num_features", num_features, 1), **args)
