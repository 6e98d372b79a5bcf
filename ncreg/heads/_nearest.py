"""A simplex head that turns, now and then, to the simplex nearest to the running class means."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor, nn

from ncreg._checks import check_flag, check_integer, check_num_classes, check_number, described
from ncreg._transforms import fx_leaf, jit_tracing, wrapped
from ncreg.distributed import all_reduce_sum, broadcast
from ncreg.frames import nearest_simplex_etf, simplex_etf
from ncreg.heads._cosine import EPS, check_features, checked_scale, default_scale, fixed_logits, lengths, shown
from ncreg.numerics import fill, seeded

PULL = 1e-4  # towards the present frame, relative to the means: keeps still what the means leave open


def _restored(frame: Tensor) -> Tensor:
    """The frame itself where it is a simplex, else the simplex nearest to it, which a mean of simplices needs.

    A mean of differently turned simplices has rows shorter than 1, and no entry of its Gram matrix is farther off
    than the longest of those losses: the rows' lengths say it all.
    """
    short = (lengths(frame) - 1).abs().amax()
    tolerance = 1e-4 if torch.finfo(frame.dtype).eps < 1e-4 else 1e-2
    return nearest_simplex_etf(frame) if bool(short > tolerance) else frame  # NaN stays to be seen


@torch.library.custom_op("ncreg::restored_frame", mutates_args=(), schema="(Tensor frame) -> Tensor")
def _restored_compiled(frame: Tensor) -> Tensor:
    """For compiled code, in which values cannot be looked at."""
    return _restored(frame).clone()


@_restored_compiled.register_fake
def _(frame: Tensor) -> Tensor:
    return torch.empty_like(frame)


class NearestETFHead(nn.Module):
    """Simplex-ETF classifier whose frame follows the features: W = the simplex nearest to running class means.

    The training loop calls `update(features, target)` after each forward pass. Class means run as exponential
    averages of the batches' means (of unit features where normalize is set), over all ranks, absent classes left
    alone; every `every` updates W becomes nearest_simplex_etf of them, 1e-4 of their size of the present W added:
    that keeps still the directions which the means leave open. Until a class is first seen, its vector of
    the seeded initial simplex stands for its mean. W, means and counters are buffers: state_dict holds them all, and
    they may be averaged (SWA, moving averages): `weight` is then the simplex nearest to the averaged buffer.
    Source: Markou, Ajanthan & Gould, "Guiding Neural Collapse", NeurIPS 2024 (arXiv 2411.01248); they solve for
    W by a Riemannian method each step, here it is the closed form.

    Args:
        in_features: d, at least C − 1.
        num_classes: C, at least 2.
        momentum: weight of the newest batch in the running means, in (0, 1].
        every: updates from one re-aiming to the next.
        normalize: whether features are brought to length 1 (at least 1e-6 is divided by, in float16 scale/2¹⁴).
        scale: factor on the logits; the default is ETFHead's.
        seed: of the initial frame's rotation.
        device: where the buffers live.
        dtype: of the buffers.

    Raises:
        ValueError: where d < C − 1, or momentum or every is out of range.

    Example:
        >>> head = NearestETFHead(3, 2, every=1)
        >>> head.update(torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]), torch.tensor([0, 1]))
        >>> head.weight.round(decimals=3) + 0.0
        tensor([[ 1.,  0.,  0.],
                [-1.,  0.,  0.]])
    """

    means: Tensor
    seen: Tensor
    updates: Tensor
    bias = None
    chunks = "weight"
    _last: tuple[Tensor, int, Tensor, Tensor] | None = None  # the buffer that was looked at: version, values, frame

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        momentum: float = 0.1,
        every: int = 10,
        normalize: bool = True,
        scale: float | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = check_integer("in_features", in_features, 1)
        self.num_classes = check_num_classes(num_classes)
        self.every = check_integer("every", every, 1)
        if not 0 < check_number("momentum", momentum) <= 1:
            raise ValueError(f"momentum={momentum} must lie in (0, 1]")
        self.momentum, self.normalize, self.seed = momentum, check_flag("normalize", normalize), seed
        self.scale = checked_scale(scale, default_scale(num_classes) if normalize else 1.0)
        frame = simplex_etf(num_classes, in_features, generator=seeded(seed), dtype=dtype, device=device)
        self.register_buffer("weight", frame)
        self.register_buffer("means", frame.clone())
        self.register_buffer("seen", torch.zeros_like(frame[:, 0]))  # above 0 where seen; a mean of flags is one too
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=frame.device))

    def reset_parameters(self) -> None:
        """Start again: the initial simplex of the seed, no class seen."""
        generator = seeded(self.seed)
        frame = simplex_etf(self.num_classes, self.in_features, generator=generator, dtype=torch.float64, device="cpu")
        fill(self._stored, frame)
        fill(self.means, frame)
        self.seen.zero_()
        self.updates.zero_()

    @property
    def _stored(self) -> Tensor:
        return cast(Tensor, super().__getattr__("weight"))

    @property
    def weight(self) -> Tensor:
        """Class vectors (C, d): the buffer, or the simplex nearest to it where it was averaged with others."""
        stored = self._stored
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return stored if self.training else cast(Tensor, _restored_compiled(stored))
        transformed = torch.compiler.is_exporting() or wrapped(stored) or jit_tracing()
        if transformed or stored.is_meta or type(stored) is not Tensor:
            return stored
        if stored.is_inference():  # such tensors count no versions
            return _restored(stored)
        if self._last is None or not self._unchanged(stored, *self._last[:3]):
            with torch.inference_mode(False), torch.no_grad():
                self._last = stored, stored._version, stored.clone(), _restored(stored)
        return self._last[3]

    def _unchanged(self, stored: Tensor, last: Tensor, version: int, values: Tensor) -> bool:
        """Whether the buffer is as it was looked at.

        Averages that are written through `.data`, and collectives, leave a tensor's version as it was: outside of
        training, where a wait for the device costs little, the values are compared.
        """
        return last is stored and version == stored._version and (self.training or torch.equal(values, stored))

    def train(self, mode: bool = True) -> NearestETFHead:
        """Training or eval mode; the buffer is looked at anew."""
        self._last = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_last": None}  # a copy counts its versions from the start

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        seen = state_dict.get(prefix + "seen")
        if seen is not None and seen.dtype == torch.bool:  # as it was stored once
            state_dict[prefix + "seen"] = seen.to(self.seen.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @fx_leaf
    def forward(self, features: Float[Tensor, "batch in_features"]) -> Float[Tensor, "batch num_classes"]:
        """Logits of a batch of features."""
        return fixed_logits(features, self.weight, self.scale, self.normalize)

    @torch.no_grad()
    def update(self, features: Float[Tensor, "batch in_features"], target: Integer[Tensor, " batch"]) -> None:
        """Update the running class means with a batch, and every so many batches the simplex; all ranks must call it.

        Before or after the batch's backward pass: a new simplex is a new tensor, which leaves the one that logits were
        made with to their gradient.

        Raises:
            ValueError: for features or targets of the wrong shape, targets outside [0, C), or means gone
                non-finite (the head is then left as it was).
            RuntimeError: in a replica of DataParallel, which sees a part of the batch and is thrown away.
        """
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                "NearestETFHead.update in a replica of DataParallel, which is thrown away after the forward pass: call "
                "it on the module itself with the whole batch (model.module.head.update(features, target)), or take "
                "DistributedDataParallel (torchrun)"
            )
        check_features(features, self.in_features)
        if not isinstance(target, Tensor):
            raise TypeError(f"target must be a tensor of class indices, not {described(target)}")
        if target.shape != features.shape[:1] or target.is_floating_point() or target.dtype == torch.bool:
            got = f"{tuple(target.shape)} of {target.dtype}"
            raise ValueError(f"target is {got}: it needs one class index for each of {len(features)} features")
        target = target.long()  # torch knows no minimum of uint16
        low, high = torch.stack(torch.aminmax(target)).tolist() if len(target) else (0, 0)
        if not 0 <= low <= high < self.num_classes:
            raise ValueError(f"target must lie in [0, {self.num_classes}), got {low} to {high}")
        means, seen = self._new_means(features, target)
        due = int(self.updates + 1) % self.every == 0
        if not torch.stack(torch.aminmax(means)).isfinite().all():
            raise ValueError("features are not finite: the running class means stay as they were")
        weight = self._aimed(means.contiguous()) if due else self.weight
        self.means.copy_(means)
        self.seen.copy_((self.seen > 0) | seen)
        self.updates.add_(1)
        if weight is not self._stored:
            with torch.inference_mode(False):
                self._buffers["weight"] = weight.clone(memory_format=torch.contiguous_format)

    def _new_means(self, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Running means with this batch of all ranks taken in, and which classes it has."""
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        wide = F.normalize(wide, dim=1, eps=EPS) if self.normalize else wide
        counted = torch.cat([wide, torch.ones_like(wide[:, :1])], dim=1)
        sums = counted.new_zeros(self.num_classes, counted.shape[1]).index_add_(0, target.long(), counted)
        sums = all_reduce_sum(sums)
        present = sums[:, -1] > 0
        old = self.means.to(sums.dtype)
        rate = torch.where(self.seen > 0, old.new_full((), self.momentum), 1) * present
        # In place: with many classes each copy of the table takes longer than all that is done with the batch.
        means = sums[:, :-1].div_(sums[:, -1:].clamp_min(1)).sub_(old).mul_(rate[:, None]).add_(old)
        return means, present

    def _aimed(self, means: Tensor) -> Tensor:
        """The nearest simplex; rank 0's, should other hardware round otherwise."""
        pull = PULL * torch.linalg.vector_norm(means) / math.sqrt(self.num_classes)
        pull = torch.where(pull > 0, pull, 1.0)  # means that are all 0, of features that died, leave everything open
        weight = nearest_simplex_etf(means + pull * self.weight.to(means.dtype)).to(self.weight.dtype)
        broadcast(weight)
        return weight

    def extra_repr(self) -> str:
        """What tells this head from another."""
        sizes = f"in_features={self.in_features}, num_classes={self.num_classes}"
        aim = f"momentum={self.momentum}, every={self.every}, seed={self.seed}"
        return f"{sizes}, normalize={self.normalize}, scale={shown(self.scale)}, {aim}"
