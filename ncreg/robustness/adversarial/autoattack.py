"""AutoAttack (Croce & Hein 2020) through the package pyautoattack, one attack after the other on what is left."""

import logging
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from ncreg._checks import check_choice, check_integer, check_seed
from ncreg._features import check_mask
from ncreg.robustness._inputs import Model, in_parts, outputs_of
from ncreg.robustness.adversarial.attempt import AttackResult, Attempt
from ncreg.robustness.adversarial.objectives import frozen, warn_of_no_gradient
from ncreg.robustness.adversarial.steps import Norm, check_epsilon, project

Version = Literal["standard", "apgd"]


@dataclass(frozen=True, eq=False)
class AutoAttackResult(AttackResult):
    """Robust accuracy under each attack of the ensemble, in the order in which they ran.

    Attributes, besides those of `AttackResult`, whose `robust` and `images` are those after every attack:
        version: "standard" or "apgd".
        after: name of each attack to the mask (B,) of what was left once it had run.
        target_classes: how many rival classes the targeted attacks aimed at: min(9, C − 1).
        note: what differs from AutoAttack as published, "" for nothing.
    """

    version: Version
    after: dict[str, Bool[Tensor, " batch"]]
    target_classes: int
    note: str


@torch.inference_mode(False)
def autoattack(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    target: Integer[Tensor, " batch"],
    *,
    epsilon: float,
    norm: Norm = "linf",
    version: Version = "standard",
    steps: int = 100,
    queries: int = 5000,
    survivors: Bool[Tensor, " batch"] | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> AutoAttackResult:
    """AutoAttack: APGD on cross-entropy, targeted APGD on DLR, targeted FAB, Square (arXiv 2003.01690).

    Each attack sees only what the ones before it left, so the accuracy is at most that of any of them. The targeted
    attacks aim at the 9 likeliest rivals, at all C − 1 when C < 10. The targeted DLR loss needs four classes: with two
    or three, targeted APGD raises the margin z_t − z_y in its place, and the result's `note` says so. Square in L2
    needs images of at least 5 pixels a side. Attacked images are put back into the ball exactly and looked at afresh.

    Args:
        model: images in [0, 1] (B, channels, H, W) to logits (B, C); a module must be in eval mode.
        images: in [0, 1]; attacked in float32.
        target: class indices (B,).
        epsilon: radius, in units of images in [0, 1].
        norm: "linf" or "l2".
        version: "standard" runs all four, "apgd" the first two, a fraction of the cost.
        steps: gradients a run of APGD and FAB (published: 100).
        queries: forward passes an image of Square (published: 5000).
        survivors: attack these alone, and count the others as broken: what earlier attacks left.
        seed: of every attack; the global generators are left as they were.
        batch_size: images at once; APGD's draws depend on it.

    Raises:
        ImportError: the package pyautoattack is missing.
        TypeError: arguments of the wrong kind.
        ValueError: as in `pgd`, an unknown version, survivors of another shape.

    Example:
        >>> model = lambda x: (x - 0.5).flatten(1) @ torch.tensor([[1.0, -1.0], [1.0, -1.0]])
        >>> images = torch.tensor([[0.6, 0.5], [0.9, 0.9], [0.0, 0.0]]).reshape(3, 1, 1, 2)
        >>> autoattack(model, images, torch.tensor([0, 0, 0]), epsilon=0.1, version="apgd").robust  # the third is wrong
        tensor([False,  True, False])
    """
    epsilon, count = check_epsilon(epsilon, norm), check_integer("batch_size", batch_size, 1)
    check_choice("version", version, ("standard", "apgd"))
    seed, steps, queries = check_seed(seed), check_integer("steps", steps, 1), check_integer("queries", queries, 1)
    attempt = Attempt(model, images, target, count)
    images, target, radius = attempt.images, attempt.target, attempt.radius(epsilon)
    alive = attempt.correct
    if survivors is not None:
        alive = alive & check_mask("survivors", survivors, len(images)).to(images.device)
    suite, note = _suite(model, attempt.num_classes, images, epsilon, norm, version, steps, queries)
    after: dict[str, Tensor] = {}
    devices = [images.device] if images.device.type == "cuda" else []
    with frozen(model), torch.random.fork_rng(devices=devices):
        for name, attack in suite.items():
            attack.seed = seed
            for part in in_parts(alive.nonzero().squeeze(1), count) if epsilon > 0 else ():
                x = images[part].contiguous()  # its views want contiguous memory
                found = attack.perturb(x.float().clone(), target[part]).to(x.dtype)
                attempt.look(part, project(found, x, radius[part], norm))
            alive = alive & attempt.robust()
            after[name] = alive
    return AutoAttackResult(
        name=f"AutoAttack ({version})",
        norm=norm,
        epsilon=epsilon,
        images=attempt.attacked,
        clean_correct=attempt.correct,
        robust=alive,
        version=version,
        after=after,
        target_classes=_target_classes(attempt.num_classes),
        note=note,
    )


def _target_classes(num_classes: int) -> int:
    return min(9, num_classes - 1)


def _suite(
    model: Model,
    num_classes: int,
    images: Tensor,
    epsilon: float,
    norm: Norm,
    version: Version,
    steps: int,
    queries: int,
) -> tuple[dict[str, Any], str]:
    """The attacks by name, and what differs from AutoAttack as published."""
    try:
        apgd, fab, square = (import_module(f"pyautoattack.{name}") for name in ("autopgd_base", "fab_pt", "square"))
    except ImportError as error:
        raise ImportError(f"autoattack needs the package pyautoattack: pip install 'ncreg[robust]' ({error})") from None
    silent = logging.Logger("silent", logging.CRITICAL + 1)
    common = {"eps": epsilon, "norm": {"linf": "Linf", "l2": "L2"}[norm], "device": images.device}
    targets, notes = _target_classes(num_classes), []
    logits = _Logits(model, images.dtype, num_classes)

    suite: dict[str, Any] = {"apgd-ce": apgd.APGDAttack(logits, n_iter=steps, loss="ce", logger=silent, **common)}
    suite["apgd-t"] = apgd.APGDAttack_targeted(logits, n_iter=steps, n_target_classes=targets, logger=silent, **common)
    if num_classes < 4:
        suite["apgd-t"].dlr_loss_targeted = lambda z, y: _targeted_margin(z, y, suite["apgd-t"].y_target)
        notes.append(f"C={num_classes}: targeted APGD raises the margin, the targeted DLR loss needs 4 classes")
    if version == "standard":
        fab_t = fab.FABAttack_PT(logits, n_iter=steps, n_target_classes=targets, targeted=True, **common)
        fab_t.get_diff_logits_grads_batch_targeted = lambda *given: _difference(logits, *given)
        suite["fab-t"] = fab_t
        if norm == "l2" and min(images.shape[2:]) < 5:
            notes.append("Square left out: in L2 it needs images of at least 5 pixels a side")
        else:
            suite["square"] = square.SquareAttack(logits, n_queries=queries, resc_schedule=False, **common)
    return suite, "; ".join(notes)


class _Logits:
    """The model as pyautoattack needs it: float32 in and out, a tensor of its own, always differentiable."""

    def __init__(self, model: Model, dtype: torch.dtype, num_classes: int) -> None:
        self.model, self.dtype, self.num_classes = model, dtype, num_classes

    def __call__(self, x: Tensor) -> Tensor:
        # Square asks about no images once all are broken, which few models take.
        z = outputs_of(self.model, x.to(self.dtype)).float() if len(x) else x.new_zeros(0, self.num_classes)
        if torch.is_grad_enabled() and x.requires_grad and not z.requires_grad:
            warn_of_no_gradient()
        # Plus nothing times x: a model that gives no gradient then gives a zero one.
        return z + 0 * x.flatten(1).sum(1, keepdim=True)


def _targeted_margin(logits: Tensor, target: Tensor, rival: Tensor) -> Tensor:
    """z_t − z_y over the row's spread, held constant."""
    difference = logits.gather(1, rival[:, None]) - logits.gather(1, target[:, None])
    spread = (logits.amax(1) - logits.amin(1)).detach()
    return difference.squeeze(1) / torch.where(spread > 0, spread, 1)


def _difference(logits: _Logits, images: Tensor, target: Tensor, rival: Tensor) -> tuple[Tensor, Tensor]:
    """FAB's z_t − z_y and its gradient with respect to the images alone: its own fills the parameters' gradients."""
    with torch.enable_grad():
        x = images.detach().clone().requires_grad_()
        z = logits(x)
        difference = (z.gather(1, rival[:, None]) - z.gather(1, target[:, None])).squeeze(1)
        (grad,) = torch.autograd.grad(difference.sum(), x)
    return difference.detach()[:, None], grad[:, None]
