"""One optimizer step: forward pass, loss terms, backward pass, and everything that moves with the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ncreg.heads import NearestETFHead
from ncreg.numerics import at_least_float32
from recipes.core.config import OptimConfig
from recipes.core.errors import UserError
from recipes.data.augment import Batch
from recipes.training.build import class_vectors
from recipes.training.state import TrainState


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Half precision in the forward pass for precision bfloat16 and float16, otherwise no effect."""
    half = precision in ("bfloat16", "float16")
    return torch.autocast(device.type, dtype=getattr(torch, precision) if half else torch.bfloat16, enabled=half)


def forward_backward(
    batch: Batch, wrapped: nn.Module, state: TrainState, weights: Mapping[str, float], *, chunks: int, precision: str
) -> Tensor:
    """Fresh gradients of a batch, computed in `chunks` chunks; its loss goes to `state.losses`. Its features (B, d).

    Args:
        batch: this process's images.
        wrapped: the model as DDP and torch.compile wrap it.
        state: the model itself, the loss terms, the gradient scaler, the ranks.
        weights: weight of each loss term in this epoch; a term of weight 0 is not computed.
        chunks: for gradient accumulation.
        precision: of the forward pass.
    """
    state.optimizer.zero_grad(set_to_none=True)
    device = batch.images.device
    reads_weight = any("weight" in term.consumes for term in state.terms)
    reads_encoder = any("encoder" in term.consumes for term in state.terms)
    read = {part for term in state.terms if weights[term.name] for part in term.consumes}
    wanted: bool | str = "encoder" if reads_encoder else True
    if "head" in read and "logits" not in read:
        wanted = "alone"  # the losses read the head themselves: the logits of many classes are never made
    # DDP waits for the gradient of every parameter: a learned head whose logits no loss reads gets one of 0.
    learned_head = any(p.requires_grad for p in state.model.head.parameters())
    unused_head = learned_head and not {"logits", "head"} & read
    total, seen = torch.zeros((), device=device), []
    for number, chunk in enumerate(batch.chunks(chunks), start=1):
        with state.ranks.no_sync_unless_last(wrapped, number == chunks):
            with autocast(precision, device):
                outputs = wrapped(chunk.images, with_features=wanted)
            available: dict[str, Any] = {name: at_least_float32(rows) for name, rows in outputs._asdict().items()}
            available |= {"target": chunk.target, "head": state.model.head}
            if reads_weight:
                available["weight"] = class_vectors(state.model)
            losses = {}
            for term in state.terms:
                if weights[term.name]:
                    with autocast(precision if "head" in term.consumes else "float32", device):
                        losses[term.name] = term(available) * term.share(chunk.target, batch.target, chunks)
            state.latest = {name: value.detach() for name, value in losses.items()}
            loss = torch.stack([weights[name] * value for name, value in losses.items()]).sum() / chunks
            if unused_head:
                loss = loss + 0 * available["logits"].sum()
            state.scaler.scale(loss).backward()
        total = total + loss.detach()
        seen.append(available["features"].detach())
    state.losses.append(total)
    return torch.cat(seen)


def update(state: TrainState, optim: OptimConfig, features: Tensor, labels: Tensor, *, steps_per_epoch: int) -> None:
    """Take the optimizer step, then update the nearest-ETF head, the moving average and the schedule."""
    if optim.clip is not None:
        state.scaler.unscale_(state.optimizer)
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), optim.clip)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if isinstance(state.model.head, NearestETFHead):
        state.model.head.update(features, labels)
    if state.ema is not None:
        state.ema.update(state.model)
    state.scheduler.step_update((state.epoch - 1) * steps_per_epoch + len(state.losses))


def check_losses(state: TrainState, steps_per_epoch: int, checkpoint: Path, *, last: int) -> None:
    """Stop the run if one of the `last` losses of the epoch is not finite; `checkpoint` is from before it.

    Raises:
        UserError: on all ranks alike.
    """
    finite = state.ranks.sum(torch.stack(state.losses[-last:])).isfinite()
    if finite.all():
        return
    first = len(state.losses) - len(finite) + int((~finite).nonzero()[0]) + 1
    value, of_run = state.losses[first - 1].item(), (state.epoch - 1) * steps_per_epoch + first
    named = [name for name, term in state.latest.items() if not bool(term.isfinite())]
    source = f", from {' and '.join(named)}" if named and len(state.latest) > 1 else ""
    way = "lower --optim.lr" if of_run > 1 else "no rate has acted yet: look at this loss and at the images"
    raise UserError(
        f"the loss is {value}{source} at step {first} of epoch {state.epoch} (step {of_run} of the run); the last good "
        f"checkpoint is {checkpoint}; {way}"
    )
