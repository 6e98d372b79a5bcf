"""Train a classifier into neural collapse and measure it.

    python recipes/train.py etf
    python recipes/train.py --config recipes/configs/etf.yaml --model.backbone resnet18 --data.name fashion_mnist

The loop: fit, find zero training error, go on through the terminal phase, measure at both ends.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from ncreg.heads import NearestETFHead
from ncreg.models import Classifier
from recipes.adversary import Adversary
from recipes.augment import Batch, batches
from recipes.board import Board
from recipes.build import (
    autocast,
    build_args,
    build_model,
    build_optimizer,
    build_scheduler,
    class_vectors,
    freeze,
    full,
    image_size,
    pick_device,
    watched,
)
from recipes.config import TrainConfig, UserError, as_yaml, parse, parse_command
from recipes.data import Dataset, load
from recipes.measure import measure, measure_all
from recipes.objective import build_terms, try_out
from recipes.plan import show_plan
from recipes.ranks import Ranks, joined
from recipes.report import closing_lines, draw, history_entry, progress_bar, show, timing_line
from recipes.run_folder import RunFolder
from recipes.signals import EXIT_CODE, Stopped, StopRequest
from recipes.split import Split, stratified
from recipes.state import TrainState
from recipes.unread import lost_workers_told


def train(config: TrainConfig, command: Sequence[str] = (), *, resume: RunFolder | None = None) -> Path:
    """One run, from the configuration to its folder; with `resume`, from where that run was left.

    Raises:
        UserError: what the configuration asks for cannot be had, or the loss is not finite.
        Stopped: SIGTERM or SIGINT came; the run is saved.
    """
    device = pick_device(config.device)
    with joined(device) as ranks, StopRequest() as stop, lost_workers_told():
        return fit(config, command, resume, device, ranks, stop)


def fit(
    config: TrainConfig,
    command: Sequence[str],
    resume: RunFolder | None,
    device: torch.device,
    ranks: Ranks,
    stop: StopRequest,
) -> Path:
    """The run itself: build, loop, measure, save."""
    began = time.perf_counter()
    data = load(config.data, seed=config.seed, image_size=lambda native: image_size(config, native)).to(device)
    judged = data.rightly_labelled() if config.tpt.target == "clean_subset" else data.train
    size = None if config.measure_size is None else min(config.measure_size, len(judged))
    subset = stratified(judged, size, seed=config.seed, what="measure_size")
    model = build_model(config, data).to(device)
    counts, width = data.class_counts(), model.head_hidden_size
    terms = build_terms(config.loss, class_counts=counts, num_features=width, device=device)
    try_out(terms, model, soft=config.augment.softens)
    optimizer = build_optimizer(config.optim, model)
    scheduler = build_scheduler(config, optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
    ema = None if config.optim.ema is None else ModelEmaV3(model, decay=config.optim.ema)
    state = TrainState(model, terms, optimizer, scheduler, scaler, ema, ranks)
    about = {
        "config": as_yaml(config),
        "build": build_args(config, data),
        "class_names": list(data.class_names),
        "image_shape": list(data.train.images.shape[1:]),
    }
    ranks.share_of_batch(config.data.batch_size, config.optim.accumulate)
    run = open_run(config, command, resume, state)
    for note in data.notes if ranks.main else ():
        print(f"note: {note}", file=sys.stderr)
    steps = len(data.train) // config.data.batch_size
    wrapped = ranks.wrap(model, device, compiled=config.compile)
    adversary = Adversary(config, model, ranks)
    bar = progress_bar(config, state, steps)
    board = Board(run, config.tensorboard and ranks.main, done=scheduler.epoch)
    state.clock.add("setup", began)
    if resume is None:
        run.save(about | state.capture())

    while not scheduler.finished:
        epoch, phase, ramp, rate = state.epoch, scheduler.phase, scheduler.ramp, max(scheduler.get_last_lr())
        weights = {term.name: term.weight(ramp) for term in terms}
        model.train()
        if config.model.freeze_epochs and epoch <= config.model.freeze_epochs + 1:  # frozen, or free from now on
            freeze(model, optimizer, epoch <= config.model.freeze_epochs)
            wrapped = ranks.wrap(model, device, compiled=config.compile)
        now = time.perf_counter()
        turn = order(config.seed, epoch, len(data.train))[: steps * config.data.batch_size]
        draws: dict[str, Any] = {
            "dtype": next(model.parameters()).dtype,
            "seed": config.seed,
            "epoch": epoch,
            "done": len(state.taken),
            "num_classes": model.num_classes,
        }
        for batch in batches(data.train, turn.view(steps, -1), config.augment, ranks=ranks, **draws):
            if adversary.acts(phase):
                batch = adversary(batch, epoch=epoch, step=len(state.taken))
            optimizer.zero_grad(set_to_none=True)
            loss, features = descend(batch, wrapped, state, weights, config)
            state.taken.append(loss)
            step = len(state.taken)
            look_up = device.type == "cpu" or step % 50 == 0 or step == steps  # a GPU is not waited for at every step
            if look_up:
                refuse_non_finite(state, steps, run)
            if config.optim.clip is not None:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
            scaler.step(optimizer)
            scaler.update()
            if isinstance(model.head, NearestETFHead):
                model.head.update(features, batch.labels)
            if ema is not None:
                ema.update(model)
            scheduler.step_update((epoch - 1) * steps + step)
            bar.update()
            if look_up and ranks.any(stop.asked, device):
                run.save(about | state.capture())
                raise Stopped(f"stopped at step {step} of epoch {epoch}; go on with --resume {run.path}")
        now = state.clock.add("train", now)

        values = measured(model, subset, state, run)
        val = measure(model, data.val, ranks=ranks, clock=state.clock, collapse=False)
        scheduler.step(epoch, values["accuracy"], watched(values, config.tpt))
        mean_loss = float(ranks.sum(torch.stack(state.taken).double().mean())) / ranks.size
        entry = history_entry(epoch, phase, ramp, rate, mean_loss, values, val, model.num_classes)
        if ema is not None:
            entry["ema"] = measure(ema.module, data.val, ranks=ranks, clock=state.clock, collapse=False)
        copies = []
        if val["accuracy"] > max((old["val_accuracy"] for old in state.history), default=-1.0):
            copies.append("best")
        if scheduler.onset_epoch == epoch:
            state.at_onset = measure_all(model, data, ranks=ranks, clock=state.clock)
            copies.append("onset")
            bar.total = steps * (scheduler.last_epoch or config.tpt.max_epochs)
        state.history.append(entry)
        state.taken = []
        now = time.perf_counter()
        run.log(entry)
        board.add(entry)
        run.save(about | state.capture(), *copies)
        state.clock.add("save", now)
        show(bar, entry, scheduler, config, ranks)

    bar.close()
    summary = summary_of(config, state, data)
    board.close()
    if ranks.main:
        finish(run, state, summary, images=scheduler.epoch * steps * config.data.batch_size)
    return run.path


def descend(
    batch: Batch, wrapped: nn.Module, state: TrainState, weights: Mapping[str, float], config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """Forward, losses and backward of a batch, in as many parts as asked for; its loss, and its features."""
    count, ranks, device = config.optim.accumulate, state.ranks, batch.images.device
    reads_weight = any("weight" in term.consumes for term in state.terms)
    total, seen = torch.zeros((), device=device), []
    for number, part in enumerate(batch.parts(count), start=1):
        with ranks.alone_until(wrapped, number == count):
            with autocast(config, device):
                logits, features = wrapped(part.images, with_features=True)
            available = {"logits": full(logits), "features": full(features), "target": part.target}
            if reads_weight:
                available["weight"] = class_vectors(state.model)
            losses = {term.name: term(available) for term in state.terms if weights[term.name]}
            loss = torch.stack([weights[name] * value for name, value in losses.items()]).sum() / count
            state.scaler.scale(loss).backward()
        total = total + loss.detach()
        seen.append(available["features"].detach())
    return total, torch.cat(seen)


def summary_of(config: TrainConfig, state: TrainState, data: Dataset) -> dict[str, Any]:
    """What summary.json says: what was run, and the measures at zero error and at the end."""
    scheduler, measured_all = state.scheduler, partial(measure_all, data=data, ranks=state.ranks, clock=state.clock)
    summary = {
        "recipe": config.recipe,
        "threshold": config.tpt.threshold,
        "data": config.data.name,
        "backbone": config.model.backbone,
        "seed": config.seed,
        "parameters": sum(p.numel() for p in state.model.parameters()),
        "class_counts": data.class_counts().tolist(),
        "onset_epoch": scheduler.onset_epoch,
        "epochs": scheduler.epoch,
        "regressions": scheduler.regressions,
        "best_train_accuracy": max(entry["train_accuracy"] for entry in state.history),
        "at_onset": state.at_onset,
        "at_end": measured_all(state.model),
    }
    if state.ema is not None:
        summary["at_end_ema"] = measured_all(state.ema.module)
    return summary


def finish(run: RunFolder, state: TrainState, summary: dict[str, Any], *, images: int) -> None:
    """Figures, timing, summary, and the closing lines."""
    with run.writing():
        draw(run.path / "figures", state.history, state.scheduler.onset_epoch, title=run.path.name)
    seconds = state.clock.seconds
    run.write("timing.json", {"seconds": seconds, "train_images_per_second": images / seconds["train"]})
    run.write("summary.json", summary)
    print(closing_lines(summary, run.path))
    print(timing_line(state.clock, images / seconds["train"]))


def open_run(config: TrainConfig, command: Sequence[str], resume: RunFolder | None, state: TrainState) -> RunFolder:
    """A new folder made by the main rank, or an old one gone on with."""
    if resume is not None:
        go_on(resume, state, quiet=config.quiet)
        return resume
    ranks = state.ranks
    path = ranks.from_main(str(RunFolder.create(config, command).path) if ranks.main else None)
    return RunFolder(Path(path), writes=ranks.main)


def go_on(run: RunFolder, state: TrainState, *, quiet: bool) -> None:
    """Take up a run where its newest whole checkpoint left it."""
    found, passed_over = run.load()
    run.writes = state.ranks.main
    if passed_over and run.writes:
        print(f"note: {passed_over}; going back to epoch {found['epoch']}", file=sys.stderr)
    state.restore(found)
    run.write_history(state.history)
    if run.writes and not quiet:
        print(f"going on with {run.path} at epoch {state.epoch}, after step {len(state.taken)} of it")


def order(seed: int, epoch: int, count: int) -> Tensor:
    """The batch order of an epoch: a function of seed and epoch alone, so that recipes and resumed runs share it."""
    drawn = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]) >> 1
    return torch.randperm(count, generator=torch.Generator().manual_seed(drawn))


def measured(model: Classifier, subset: Split, state: TrainState, run: RunFolder) -> dict[str, float]:
    """The measures of an epoch; a model that its last step has broken ends the run."""
    try:
        return measure(model, subset, ranks=state.ranks, clock=state.clock)
    except ValueError as error:
        raise UserError(
            f"epoch {state.epoch} left a model that is not finite ({error}); the last good checkpoint is "
            f"{run.checkpoint('last')}; lower --optim.lr"
        ) from None


def refuse_non_finite(state: TrainState, steps: int, run: RunFolder) -> None:
    """Stop at the first loss of the epoch that is not finite; the last checkpoint is from before it."""
    finite = state.ranks.sum(torch.stack(state.taken[-50:])).isfinite()  # the same verdict on all ranks
    if finite.all():
        return
    first = len(state.taken) - len(finite) + int((~finite).nonzero()[0]) + 1
    value, whole = state.taken[first - 1].item(), (state.epoch - 1) * steps + first
    raise UserError(
        f"the loss is {value} at step {first} of epoch {state.epoch} (step {whole} of the run); the last good "
        f"checkpoint is {run.checkpoint('last')}; lower --optim.lr"
    )


def resumed(run: RunFolder) -> TrainConfig:
    """The configuration of a run that is to go on."""
    if not (run.path / "config.yaml").is_file():
        raise UserError(f"resume={run.path} is no run folder: it has no config.yaml")
    if run.finished:
        raise UserError(f"run {run.path} is finished: its summary.json is there; nothing to resume")
    return parse(["--config", str(run.path / "config.yaml")])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0 when the run is done, 2 with one line when something is to be put right, 75 when stopped."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        config, resume = parse_command(argv)
        if "--plan" in argv:
            show_plan(config)
            return 0
        run = None
        if resume == "auto":
            run = RunFolder.unfinished(config)
            if run is None and not config.quiet:
                print("no unfinished run of this configuration: starting one")
        elif resume is not None:
            run = RunFolder(Path(resume))
            config = resumed(run)
        train(config, ["recipes/train.py", *argv], resume=run)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(stopped, file=sys.stderr)
        return EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
