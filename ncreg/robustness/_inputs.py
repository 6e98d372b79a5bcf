"""What every evaluation does first: check images, target, logits and the model's mode, and run the model."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ncreg._checks import check_integer, described
from ncreg._features import check_indices
from ncreg._modes import in_eval_mode
from ncreg.numerics import at_least_float32, float64_device

# Images in [0, 1] (B, channels, H, W) to logits (B, C): a plain function, an nn.Module, a Classifier.
Model = Callable[[Tensor], Tensor]
"""What the evaluations take for a model: images (B, channels, height, width) in [0, 1] → logits (B, C)."""


def check_images(images: Tensor) -> Tensor:
    """A non-empty batch of finite images (B, channels, H, W) in [0, 1].

    Raises:
        TypeError: no floating-point tensor.
        ValueError: another number of axes, an empty batch, values that are not finite or outside [0, 1].
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor, got {described(images)}")
    if not images.is_floating_point():
        raise TypeError(f"images must be floating-point in [0, 1], got {images.dtype}: images.float() / 255")
    if images.ndim != 4:
        raise ValueError(f"images must be (batch, channels, height, width), got shape {tuple(images.shape)}")
    if images.numel() == 0:
        raise ValueError(f"images is empty, shape {tuple(images.shape)}")
    low, high = (float(v) for v in torch.aminmax(images.detach()))
    if not (low >= 0 and high <= 1):  # not the other way round: NaN fails every comparison
        hint = "normalise inside the model, and hand in the images as they are (ncreg.Normalize)"
        raise ValueError(f"images must be finite and lie in [0, 1], got values from {low:.4g} to {high:.4g}: {hint}")
    return images


def check_attackable(images: Tensor) -> Tensor:
    """`check_images`, on a device that has float64: an attack measures its radius and the margins in it.

    Raises:
        TypeError: the device has no float64, or no floating-point tensor.
        ValueError: as `check_images`.
    """
    if isinstance(images, Tensor) and float64_device(images.device) != images.device:
        raise TypeError(
            f"images are on {images.device}, which has no float64, and attacks measure distances in it: "
            'move model and images to the CPU, model.to("cpu") and images.to("cpu")'
        )
    return check_images(images)


def check_target(target: Tensor, batch: Tensor, num_classes: int, *, name: str = "target") -> Int[Tensor, " batch"]:
    """One class index in [0, num_classes) for each row of `batch` (images or logits), as int64 on its device.

    Raises:
        TypeError: no integer tensor.
        ValueError: another shape than (B,), or an index out of range.
    """
    return check_indices(name, target, len(batch), num_classes).to(batch.device)


def check_logits(logits: Tensor, images: Tensor | None = None, *, name: str | None = None) -> Tensor:
    """Finite logits (B, C) with C >= 2, one row an image, that are not probabilities.

    Args:
        logits: what a model returned, or an argument.
        images: that they are of, where it is known.
        name: of the argument; None speaks of the model.

    Raises:
        TypeError: no floating-point tensor.
        ValueError: another shape, no row, C = 1, values that are not finite, or rows in [0, 1] that each sum to 1.
    """
    wanted, noun = ("model must return", "logits") if name is None else (f"{name} must be", name)
    if not isinstance(logits, Tensor):
        way_out = ": wrap it in a function" if name is None else ""
        raise TypeError(f"{wanted} a tensor of logits, got {described(logits)}{way_out}")
    if not logits.is_floating_point():
        raise TypeError(f"{wanted} floating-point logits, got {logits.dtype}")
    if logits.ndim != 2 or (images is not None and len(logits) != len(images)):
        rows = "batch" if images is None else len(images)
        raise ValueError(f"{wanted} logits of shape ({rows}, classes), got {tuple(logits.shape)}")
    if len(logits) == 0:
        raise ValueError(f"{noun} is empty, shape {tuple(logits.shape)}")
    if logits.shape[1] < 2:
        raise ValueError(
            f"{noun} have {logits.shape[1]} column: a classifier needs at least 2 classes; "
            "of a single sigmoid logit z make two, cat([-z, z], 1) / 2"
        )
    if not bool(logits.isfinite().all()):
        bad = int((~logits.isfinite()).any(1).sum())
        ruled_out = bool((logits.isneginf() | logits.isfinite()).all() and logits.isfinite().any(1).all())
        reason = "to rule out a class take -1e9 in place of -inf" if ruled_out else "the model diverged"
        raise ValueError(f"{noun} are not finite (NaN or infinite) in {bad} of {len(logits)} rows: {reason}")
    if _are_probabilities(logits.detach()):
        found = "the model returns" if name is None else f"{name} are"
        raise ValueError(f"{found} probabilities (rows in [0, 1] that sum to 1): take logits, before softmax")
    return logits


def in_parts(indices: Int[Tensor, " chosen"], size: int) -> Sequence[Tensor]:
    """Indices in parts of `size`; no part for no indices, where `split` gives an empty one, which few models accept."""
    return indices.split(size) if len(indices) else ()


def outputs_of(model: Model, images: Tensor) -> Tensor:
    """What a model returns for images, asked with a copy: a model that changes its input in place changes the copy."""
    return model(images.clone())


@torch.no_grad()
def predict(
    model: Model, images: Float[Tensor, "batch channels height width"], batch_size: int = 256
) -> Float[Tensor, "batch classes"]:
    """Logits of all images in order, at least float32, computed without gradients; every input and output is checked.

    Raises:
        TypeError: images or logits that are no floating-point tensors.
        ValueError: images outside [0, 1], a model in training mode, logits that are not finite or are probabilities.

    Example:
        >>> predict(lambda x: x.flatten(1) * 3, torch.ones(5, 1, 1, 4), batch_size=2).shape
        torch.Size([5, 4])
    """
    in_eval_mode(model)
    check_images(images)
    chunks = images.split(check_integer("batch_size", batch_size, 1))
    rows = torch.cat([_checked_shape(outputs_of(model, chunk), chunk) for chunk in chunks])
    return check_logits(rows, images)


def _checked_shape(logits: Tensor, images: Tensor) -> Tensor:
    """Rows that torch.cat can take; their values are checked once, all together."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        check_logits(logits, images)
    return at_least_float32(logits)


def _are_probabilities(logits: Tensor) -> bool:
    tolerance = 0.01 if logits.dtype in (torch.float16, torch.bfloat16) else 1e-4
    logits = at_least_float32(logits)
    low, high = torch.aminmax(logits)
    return bool(low >= 0) and bool(high <= 1) and bool(((logits.sum(1) - 1).abs() < tolerance).all())
