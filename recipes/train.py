"""Train a classifier into neural collapse and measure it.

    python recipes/train.py etf
    python recipes/train.py --config recipes/configs/etf.yaml --model.backbone resnet18 --data.name fashion_mnist

The loop: fit, find zero training error, go on through the terminal phase, measure at both ends.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from ncreg.checkpoint import save_checkpoint
from ncreg.models import Classifier
from ncreg.tpt import TPTScheduler
from recipes.build import build_model, build_optimizer, build_scheduler, image_size, pick_device
from recipes.config import TrainConfig, UserError, as_yaml, parse
from recipes.data import Dataset, load, stratified
from recipes.measure import Clock, measure, measure_all
from recipes.objective import build_terms
from recipes.report import RunFolder, closing_lines, draw


def train(config: TrainConfig, command: Sequence[str] = ()) -> Path:
    """One run, from the configuration to its folder.

    Raises:
        UserError: what the configuration asks for cannot be had, or the loss is not finite.
    """
    began = time.perf_counter()
    clock = Clock()
    device = pick_device(config.device)
    data = load(config.data, seed=config.seed, image_size=lambda native: image_size(config, native))
    size = None if config.measure_size is None else min(config.measure_size, len(data.train))
    subset = stratified(data.train, size, seed=config.seed, what="measure_size").to(device)
    data = Dataset(data.class_names, data.train.to(device), data.val.to(device), data.test.to(device))
    model = build_model(config, data).to(device)
    terms = build_terms(config.loss, num_classes=len(data.class_names))
    optimizer = build_optimizer(config.optim, model)
    scheduler = build_scheduler(config, optimizer)
    run = RunFolder(config, command)
    steps = len(data.train) // config.data.batch_size
    bar = tqdm(total=steps * config.tpt.max_epochs, unit="step", disable=True if config.quiet else None)
    at_onset: dict[str, Any] | None = None
    clock.add("setup", began)
    save(run, "last", config, data, model, optimizer, scheduler)

    while not scheduler.finished:
        epoch, phase, ramp = scheduler.epoch + 1, scheduler.phase, scheduler.ramp
        rate = max(scheduler.get_last_lr())
        weights = {term.name: term.weight(ramp) for term in terms}
        now = time.perf_counter()
        model.train()
        taken: list[Tensor] = []
        batches = data.train.batches(config.data.batch_size, generator=order(config.seed, epoch), drop_last=True)
        for step, (images, target) in enumerate(batches, 1):
            logits, features = model(images, with_features=True)
            available = {"logits": logits, "features": features, "target": target}
            available["weight"] = getattr(model.head, "weight", None)
            losses = {term.name: term(available) for term in terms if weights[term.name]}
            loss = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            taken.append(loss.detach())
            if device.type == "cpu" or step % 50 == 0 or step == steps:
                refuse_non_finite(taken, epoch, steps, run)
            optimizer.step()
            scheduler.step_update((epoch - 1) * steps + step)
            bar.update()
        now = clock.add("train", now)

        values = measure(model, subset, clock=clock)
        val = measure(model, data.val, clock=clock, collapse=False)
        scheduler.step(epoch, values["accuracy"])
        entry = history_entry(epoch, phase, ramp, rate, float(torch.stack(taken).mean()), values, val, model)
        run.log(entry)
        now = time.perf_counter()
        if scheduler.onset_epoch == epoch:
            at_onset = measure_all(model, data, clock=clock)
            save(run, "onset", config, data, model, optimizer, scheduler)
            bar.total = steps * (scheduler.last_epoch or config.tpt.max_epochs)
        save(run, "last", config, data, model, optimizer, scheduler)
        clock.add("save", now)
        show(bar, entry, scheduler, config)

    bar.close()
    at_end = measure_all(model, data, clock=clock)
    summary = {
        "recipe": config.recipe,
        "data": config.data.name,
        "backbone": config.model.backbone,
        "seed": config.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "onset_epoch": scheduler.onset_epoch,
        "epochs": scheduler.epoch,
        "regressions": scheduler.regressions,
        "best_train_accuracy": max(entry["train_accuracy"] for entry in run.history),
        "at_onset": at_onset,
        "at_end": at_end,
    }
    run.write("summary.json", summary)
    draw(run.path / "figures", run.history, scheduler.onset_epoch, title=run.path.name)
    clock.seconds["total"] = time.perf_counter() - began
    images_per_second = scheduler.epoch * steps * config.data.batch_size / clock.seconds["train"]
    run.write("timing.json", {"seconds": clock.seconds, "train_images_per_second": images_per_second})
    print(closing_lines(summary, run.path))
    print(timing_line(clock, images_per_second))
    return run.path


def order(seed: int, epoch: int) -> torch.Generator:
    """The generator of an epoch's batch order: a function of seed and epoch alone, so that a resumed run agrees."""
    return torch.Generator().manual_seed(
        int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1)
    )


def refuse_non_finite(taken: Sequence[Tensor], epoch: int, steps: int, run: RunFolder) -> None:
    """Stop at the first loss of the epoch that is not finite; the last checkpoint is of the epoch before."""
    finite = torch.stack(list(taken[-50:])).isfinite()
    if finite.all():
        return
    first = len(taken) - len(finite) + int((~finite).nonzero()[0]) + 1
    raise UserError(
        f"the loss is {taken[first - 1].item()} at step {first} of epoch {epoch} (step {(epoch - 1) * steps + first} "
        f"of the run); the last good checkpoint, of epoch {epoch - 1}, is {run.checkpoint('last')}; lower --optim.lr"
    )


def history_entry(
    epoch: int,
    phase: str,
    ramp: float,
    rate: float,
    loss: float,
    values: dict[str, float],
    val: dict[str, float],
    model: Classifier,
) -> dict[str, Any]:
    """What history.jsonl keeps of an epoch."""
    ideal = -1 / (model.num_classes - 1)
    gaps = {"intra_cosine_gap": 1 - values["intra_cosine"], "inter_cosine_gap": abs(values["inter_cosine"] - ideal)}
    return {
        "epoch": epoch,
        "phase": phase,
        "ramp": ramp,
        "lr": rate,
        "loss": loss,
        "train_accuracy": values["accuracy"],
        "train_loss": values["loss"],
        "val_accuracy": val["accuracy"],
        "val_loss": val["loss"],
        "measures": {name: value for name, value in values.items() if name not in ("accuracy", "loss")} | gaps,
    }


def save(
    run: RunFolder,
    name: str,
    config: TrainConfig,
    data: Dataset,
    model: Classifier,
    optimizer: Optimizer,
    scheduler: TPTScheduler,
) -> None:
    """A checkpoint: weights, all that steers the rest of the run, and what is needed to use the model."""
    state = {
        "epoch": scheduler.epoch,
        "config": as_yaml(config),
        "class_names": list(data.class_names),
        "image_shape": list(data.train.images.shape[1:]),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
    }
    save_checkpoint(run.checkpoint(name), state)


def show(bar: tqdm, entry: dict[str, Any], scheduler: TPTScheduler, config: TrainConfig) -> None:
    """The state of the run beside the progress bar, or a line now and then where there is no terminal."""
    shown = {
        "loss": f"{entry['loss']:.4f}",
        "acc": f"{entry['train_accuracy']:.2%}",
        "nc1": f"{entry['measures']['nc1']:.2e}",
        "phase": scheduler.phase,
    }
    bar.set_postfix(shown)
    every = max(1, config.tpt.max_epochs // 20)
    news = entry["epoch"] in (1, scheduler.onset_epoch) or scheduler.finished or entry["epoch"] % every == 0
    if bar.disable and news and not config.quiet:
        print(f"epoch {entry['epoch']:>4}  " + "  ".join(f"{key} {value}" for key, value in shown.items()), flush=True)


def timing_line(clock: Clock, images_per_second: float) -> str:
    """Where the time went."""
    total = clock.seconds["total"]
    shares = {name: clock.seconds.get(name, 0.0) / total for name in ("measure_forward", "measure_collapse")}
    return (
        f"{total:.0f} s, {images_per_second:.0f} training images/s; measuring took {sum(shares.values()):.0%} "
        f"({shares['measure_forward']:.0%} forward pass, {shares['measure_collapse']:.0%} measures)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0 when the run is done, 2 with one line when something is to be put right."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        train(parse(argv), ["recipes/train.py", *argv])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
