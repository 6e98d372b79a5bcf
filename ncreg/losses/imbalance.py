"""Losses and weights for classes of unequal size."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from ncreg._checks import check_choice, check_constant, check_finite, check_flag, check_fraction, check_number
from ncreg._transforms import bare, fx_leaf, jit_tracing, row_count
from ncreg.distributed import gather_batch
from ncreg.losses._inputs import (
    ClassWeight,
    GatheredLosses,
    Logits,
    Losses,
    LossModule,
    Reduction,
    average,
    check_reduction,
    check_rows,
)
from ncreg.losses._targets import Target, check_target, is_soft, one_hot, reads_are_free, sample_weights, weighed
from ncreg.numerics import at_least_float32, widest

Counts = Sequence[int | float] | Shaped[Tensor, " classes"]


def logit_adjusted_cross_entropy(
    logits: Logits,
    target: Target,
    class_counts: Counts,
    *,
    tau: float = 1.0,
    label_smoothing: float = 0.0,
    class_weight: ClassWeight | None = None,
    reduction: Reduction = "mean",
) -> Losses:
    """Cross-entropy of z + τ·ln π, π_c = n_c/Σn: trained with it, argmax z aims at balanced accuracy.

    A rare class must lead by a wider margin in training; at test time the logits stay as they are. τ = 1 is balanced
    softmax, −ln(n_y e^{z_y} / Σ_c n_c e^{z_c}); τ = 0 cross-entropy.

    Smoothing spreads the fraction s of a label over the classes by π^τ, so that at the optimum all wrong logits are
    equal. Evenly smoothed labels (`smooth_labels`) do harm: at their optimum the rarest class has the largest wrong
    logit, which beats the right one wherever that class has (1 − s)·C/s + 1 times the images: 91 times with ten
    classes and s = 0.1. The two are the same where classes are balanced, and for τ = 0.

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021 (arXiv 2007.07314); Ren et al., "Balanced
    Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020 (arXiv 2007.10740).

    Args:
        logits: z.
        target: class indices in [0, C), or soft labels.
        class_counts: n, training samples of each class, all above 0; only their ratios matter.
        tau: τ.
        label_smoothing: s in [0, 1].
        class_weight: weight of a class's samples; the mean is then the weighted mean, smoothed labels or not by the
            weights of the labels as they are given, for class indices as in torch.
        reduction: "mean", "sum" or "none" (one value a sample).

    Raises:
        ValueError: shapes, labels, counts, tau, label_smoothing or reduction that do not fit.
        TypeError: logits that are not floating-point, labels that are not integers, a tau or label_smoothing that is
            no number.

    Example:
        >>> logit_adjusted_cross_entropy(torch.zeros(1, 2), torch.tensor([1]), [3, 1])  # -ln(1/4)
        tensor(1.3863)
    """
    check_rows("logits", logits)
    check_finite("tau", tau)
    check_fraction("label_smoothing", label_smoothing)
    classes = logits.shape[1]
    target = check_target(target, logits, classes)
    counts = checked_counts(class_counts, classes).to(logits.device)
    lifted = at_least_float32(logits)
    shift = tau * (counts / counts.sum()).log()
    adjusted = lifted + shift.to(lifted)
    of_labels = sample_weights(class_weight, target, classes)  # torch's mean goes by them
    if label_smoothing:
        sharp = target if is_soft(target) else one_hot(target, classes, lifted.dtype)
        target = torch.lerp(sharp.to(lifted), shift.softmax(0).to(lifted).expand_as(lifted), label_smoothing)
    target, weight = weighed(target, class_weight, classes)
    losses = F.cross_entropy(adjusted, target.to(lifted) if is_soft(target) else target, reduction="none")
    return average(losses, reduction, weight, of_labels)


class LogitAdjustedLoss(LossModule):
    """`logit_adjusted_cross_entropy` with the counts of a training set, which are kept as a buffer.

    Args:
        class_counts: n, training samples of each class, all above 0; only their ratios matter.
        tau: τ; 1 is balanced softmax, 0 cross-entropy.
        label_smoothing: s in [0, 1], spread over the classes by their shares to the power of τ.
        class_weight: weight of a class's samples (C,); the mean is then the weighted mean.
        reduction: "mean", "sum" or "none" (one value a sample).
        gather: take the batches of all ranks together; `ncreg.losses` says what for.

    Example:
        >>> import torch
        >>> loss = LogitAdjustedLoss([3, 1])
        >>> loss(torch.zeros(1, 2), torch.tensor([1]))  # -ln(1/4)
        tensor(1.3863)
    """

    consumes = ("logits", "target")
    class_counts: Tensor
    class_weight: Tensor | None

    def __init__(
        self,
        class_counts: Counts,
        *,
        tau: float = 1.0,
        label_smoothing: float = 0.0,
        class_weight: ClassWeight | None = None,
        reduction: Reduction = "mean",
        gather: bool = False,
    ) -> None:
        super().__init__()
        counts = checked_counts(class_counts)
        # floats, since an average of buffers rounds integers down; float32, which every device has, where it is exact
        self.register_buffer("class_counts", counts.float() if bool((counts == counts.float()).all()) else counts)
        self.tau = check_finite("tau", check_constant("tau", tau, "loss"))
        self.label_smoothing = check_fraction("label_smoothing", label_smoothing)
        self.register_buffer("class_weight", class_weight)
        self.reduction = check_reduction(reduction)
        self.gather = check_flag("gather", gather)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LogitAdjustedLoss":
        """The counts follow the module to another device, not to a coarser dtype."""
        exact = self.class_counts
        super()._apply(fn, recurse)
        if self.class_counts.dtype != exact.dtype and not exact.is_meta:
            self.class_counts = exact.to(self.class_counts.device)
        return self

    @fx_leaf
    def forward(self, logits: Logits, target: Target) -> GatheredLosses:
        """The loss of the batch."""
        if self.gather:
            logits, target = gather_batch(logits, target)
        return logit_adjusted_cross_entropy(
            logits,
            target,
            self.class_counts,
            tau=self.tau,
            label_smoothing=self.label_smoothing,
            class_weight=self.class_weight,
            reduction=self.reduction,
        )


def class_weights(
    class_counts: Counts,
    scheme: Literal["inverse", "effective"] = "inverse",
    *,
    beta: float = 0.999,
    dtype: torch.dtype | None = None,
) -> ClassWeight:
    """Weights of classes for `class_weight=`, summing to C: w_c ∝ 1/n_c, or ∝ (1 − β)/(1 − β^{n_c}).

    The latter is one over the effective number of samples, which saturates at 1/(1 − β): β = 0 weighs all classes
    alike, β → 1 is the inverse count.

    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019 (arXiv 1901.05555).

    Args:
        class_counts: n, training samples of each class, all above 0.
        scheme: "inverse" or "effective".
        beta: β in [0, 1), for "effective" alone; theirs are 0.9, 0.99, 0.999 and 0.9999.
        dtype: of the result; torch's default dtype where it is None.

    Raises:
        ValueError: an unknown scheme, counts or beta out of range.

    Example:
        >>> class_weights([30, 10])
        tensor([0.5000, 1.5000])
        >>> class_weights([2, 1], "effective", beta=0.5)  # effective numbers 1.5 and 1
        tensor([0.8000, 1.2000])
    """
    counts = checked_counts(class_counts)
    if check_choice("scheme", scheme, ("inverse", "effective")) == "inverse":
        weight = 1 / counts
    else:
        if not 0 <= check_number("beta", beta) < 1:
            raise ValueError(f"beta={beta} must be in [0, 1)")
        # 1 − β^n without its cancellation near β = 1.
        weight = -1 / torch.expm1(counts * torch.tensor(beta, dtype=counts.dtype, device=counts.device).log())
    place = counts.device if isinstance(class_counts, Tensor) else torch.get_default_device()
    return (weight * (len(counts) / weight.sum())).to(place, dtype or torch.get_default_dtype())


def checked_counts(class_counts: Counts, classes: int | None = None) -> Float[Tensor, " classes"]:
    """Samples of each class, finite and above 0, as float64 (float32 where the device has no other).

    On an accelerator the values are asserted without waiting for the device.
    """
    try:
        counts = class_counts if isinstance(class_counts, Tensor) else torch.as_tensor(class_counts, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"class_counts must hold one number a class, got {class_counts!r}") from None
    if counts.ndim != 1 or row_count(counts) < 2 or (not jit_tracing() and classes not in (None, len(counts))):
        expected = "one number a class, two or more" if classes is None else f"shape ({classes},), one number a class"
        raise ValueError(f"class_counts must have {expected}, got shape {tuple(counts.shape)}")
    if counts.dtype == torch.bool or counts.is_complex():
        raise TypeError(f"class_counts must hold numbers, got {counts.dtype}")
    if counts.is_floating_point() and isinstance(class_counts, list | tuple):
        counts = torch.tensor(class_counts, dtype=torch.float64, device="cpu")  # not rounded to float32 on the way
    seen = bare(counts if counts.is_floating_point() else counts.long())  # torch compares no uint16
    valid = (seen > 0) & (seen < torch.inf)
    if not reads_are_free(seen):
        torch._assert_async(valid.all(), "class_counts must be finite and above 0")
    elif not bool(valid.all()):
        first = int((~valid).nonzero()[0])
        raise ValueError(
            f"class_counts[{first}]={seen[first].item()}: every class needs a training sample; "
            "leave classes without one out of the problem"
        )
    return counts.to(widest(counts.device))
