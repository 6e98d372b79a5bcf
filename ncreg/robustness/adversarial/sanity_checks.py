"""Reasons to distrust an adversarial evaluation: vanishing gradients, large logits, chance, disagreeing attacks."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from ncreg._checks import check_integer
from ncreg._copies import copied
from ncreg._features import check_mask
from ncreg.numerics import at_least_float32
from ncreg.robustness._inputs import Model, check_attackable, check_logits, check_target, outputs_of
from ncreg.robustness.adversarial.objectives import frozen, gradient, logit_margin, loss_of

# Above these a result is flagged. Fractions of the images, except where the comment says otherwise.
ZERO_GRADIENT = 0.01
LOGIT_SCALE = 20.0  # margin; at 17 float32 rounds the probability 1 - e^-17 to 1
CROSS_ENTROPY_GAP = 0.05  # between two attacks of about one strength; honest nets show up to 4 points
MARGIN_GAP = 0.08  # AutoAttack has more steps and nine targets; how much that matters differs from net to net
BLACK_BOX = 0.005
CHANGE = 1e-3  # of the logits, in units of their spread (in half precision four units of rounding)
FAR = 100.0  # a logit below its row's largest by more than so many of the largest leads is of a class that is ruled out


@dataclass(frozen=True)
class Finding:
    """One check of a robust accuracy, and whether it speaks against it.

    Attributes:
        name: which check.
        value: what was measured.
        threshold: above which the result is flagged.
        flagged: value > threshold.
        explanation: what was measured, and what it means when flagged.
    """

    name: str
    value: float
    threshold: float
    flagged: bool
    explanation: str


@torch.inference_mode(False)
def find_suspicions(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    target: Integer[Tensor, " batch"],
    *,
    cross_entropy: Bool[Tensor, " batch"] | None = None,
    margin: Bool[Tensor, " batch"] | None = None,
    black_box: Bool[Tensor, " batch"] | None = None,
    ensemble: Bool[Tensor, " batch"] | None = None,
    batch_size: int = 256,
) -> tuple[Finding, ...]:
    """Checks of the model, and of the masks (B,) of images that each kind of attack did not break.

    After the self-checks of AutoAttack (Croce & Hein 2020) and the list of Carlini et al. 2019 (arXiv 1902.06705).
    Checks of masks that are not given are left out, except `ensemble`, whose absence is a finding of its own.

    Args:
        model: images in [0, 1] (B, channels, H, W) to logits (B, C). In training mode it is a finding, not an error.
        images: in [0, 1].
        target: class indices (B,).
        cross_entropy: what PGD on cross-entropy left.
        margin: what PGD on the margin left.
        black_box: what an attack without gradients left.
        ensemble: what AutoAttack, or APGD on cross-entropy with targeted APGD, left.
        batch_size: images at once.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: images outside [0, 1], a target or mask that does not fit, probabilities, logits that are not
            finite.

    Example:
        >>> model = lambda x: 1000 * torch.stack([x.sum((1, 2, 3)), -x.sum((1, 2, 3))], 1)
        >>> images, target = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
        >>> [finding.name for finding in find_suspicions(model, images, target) if finding.flagged]
        ['zero_gradient', 'logit_scale', 'no_ensemble']
    """
    check_attackable(images)
    check_integer("batch_size", batch_size, 1)
    model, training = _protected(model)
    raw, again, alone = _passes(model, images, batch_size)
    logits = at_least_float32(raw)
    target = check_target(target, check_logits(logits, images), logits.shape[1]).clone()
    masks = {"cross_entropy": cross_entropy, "margin": margin, "black_box": black_box, "ensemble": ensemble}
    for name, mask in masks.items():
        if mask is not None:
            check_mask(name, mask, len(target))
    scale = float(logit_margin(logits, target).abs().median())
    change = max(CHANGE, 4 * torch.finfo(raw.dtype).eps)
    return (
        _zero_gradient(model, images, target, batch_size),
        _finding("logit_scale", scale, LOGIT_SCALE, "median |margin|: when large, cross-entropy is flat in float32"),
        _finding(
            "random_model",
            _change(logits, at_least_float32(again)),
            change,
            "largest change of a logit between two passes over the same images: randomness hides the gradient",
        ),
        _finding(
            "batch_dependence",
            _change(logits, at_least_float32(alone)),
            change,
            "largest change of a logit in a batch of half the size: batch statistics are in use, as in training mode",
        ),
        _finding("training_mode", float(training), 0, "submodules in training mode: call model.eval()"),
        *_disagreements(cross_entropy, margin, black_box, ensemble),
    )


@torch.no_grad()
def _passes(model: Model, images: Tensor, batch_size: int) -> tuple[Tensor, ...]:
    """Logits twice over, and once more in batches of half the size."""
    half = max(1, min(batch_size, len(images)) // 2)
    sizes = (batch_size, batch_size, half)
    return tuple(torch.cat([_tensor(outputs_of(model, part)) for part in images.split(size)]) for size in sizes)


def _tensor(logits: Tensor) -> Tensor:
    return logits if isinstance(logits, Tensor) else check_logits(logits)


def _disagreements(
    cross_entropy: Tensor | None, margin: Tensor | None, black_box: Tensor | None, ensemble: Tensor | None
) -> list[Finding]:
    findings = []
    if cross_entropy is not None and margin is not None:
        findings.append(
            _finding(
                "cross_entropy_gap",
                _gap(cross_entropy, margin),
                CROSS_ENTROPY_GAP,
                "accuracy under PGD on cross-entropy above that on the margin: cross-entropy gradients are masked",
            )
        )
    white_boxes = [mask for mask in (cross_entropy, margin) if mask is not None]
    if black_box is not None and white_boxes:
        findings.append(
            _finding(
                "black_box",
                max(_gap(mask, black_box) for mask in white_boxes),
                BLACK_BOX,
                "accuracy under a PGD attack above that under an attack without gradients: gradients mislead",
            )
        )
    if ensemble is None:
        text = "AutoAttack did not run: a robust accuracy from PGD alone carries no claim"
        return [*findings, _finding("no_ensemble", 1.0, 0, text)]
    if margin is not None:
        findings.append(
            _finding(
                "margin_gap",
                _gap(margin, ensemble),
                MARGIN_GAP,
                "accuracy under PGD on the margin above that under AutoAttack: imaginary robustness, seen by PGD alone",
            )
        )
    return findings


def _zero_gradient(model: Model, images: Tensor, target: Tensor, batch_size: int) -> Finding:
    objective, zero = loss_of("cross_entropy"), 0
    with frozen(model):
        for part, classes in zip(images.split(batch_size), target.split(batch_size), strict=True):
            grad, _ = gradient(model, part, lambda z, classes=classes: objective(z, classes))  # type: ignore[misc]
            zero += int((grad.flatten(1) == 0).all(1).sum())
    return _finding(
        "zero_gradient",
        zero / len(images),
        ZERO_GRADIENT,
        "share of images whose cross-entropy gradient is exactly zero (or not finite): such attacks stand still",
    )


def _protected(model: Model) -> tuple[Model, int]:
    """The model and how many of its submodules are in training mode; a copy if any is, as passes change it."""
    if not isinstance(model, nn.Module):
        return model, 0
    training = sum(module.training for module in model.modules())
    return (copied(model) if training else model), training


def _finding(name: str, value: float, threshold: float, explanation: str) -> Finding:
    return Finding(name, value, threshold, value > threshold, explanation)


def _gap(weaker: Tensor, stronger: Tensor) -> float:
    """Difference of two accuracies, from whole images, so that three of sixty are 0.05 exactly."""
    return (int(weaker.sum()) - int(stronger.sum())) / len(weaker)


def _change(first: Tensor, second: Tensor) -> float:
    """Largest difference of two logits, in units of the largest spread of a row; both without classes ruled out.

    One of them at −1e9 would be all of the spread. Where the two best classes of every row are equal, nothing tells
    which are ruled out.
    """
    behind = (first.amax(1, keepdim=True) - first).double()
    lead = behind.topk(2, largest=False).values[:, 1].max()
    near = (behind <= FAR * lead) | (lead == 0)
    spread = float(behind[near].max())
    change = float((first - second).abs()[near].max())
    return change / spread if spread > 0 else change
