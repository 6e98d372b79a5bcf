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
from tqdm import tqdm

from ncreg.tpt import TPTScheduler
from recipes.build import build_model, build_optimizer, build_scheduler, image_size, pick_device
from recipes.config import TrainConfig, UserError, as_yaml, parse, parse_command
from recipes.data import Dataset, load, stratified
from recipes.measure import Clock, measure, measure_all
from recipes.objective import build_terms
from recipes.report import closing_lines, draw
from recipes.run_folder import RunFolder
from recipes.signals import EXIT_CODE, Stopped, StopRequest
from recipes.state import TrainState


def train(config: TrainConfig, command: Sequence[str] = (), *, resume: RunFolder | None = None) -> Path:
    """One run, from the configuration to its folder; with `resume`, from where that run was left.

    Raises:
        UserError: what the configuration asks for cannot be had, or the loss is not finite.
        Stopped: SIGTERM or SIGINT came; the run is saved.
    """
    began = time.perf_counter()
    device = pick_device(config.device)
    data = load(config.data, seed=config.seed, image_size=lambda native: image_size(config, native))
    size = None if config.measure_size is None else min(config.measure_size, len(data.train))
    subset = stratified(data.train, size, seed=config.seed, what="measure_size").to(device)
    data = Dataset(data.class_names, data.train.to(device), data.val.to(device), data.test.to(device))
    model = build_model(config, data).to(device)
    terms = build_terms(config.loss, num_classes=len(data.class_names), device=device)
    optimizer = build_optimizer(config.optim, model)
    scheduler = build_scheduler(config, optimizer)
    state = TrainState(model, terms, optimizer, scheduler)
    about = {
        "config": as_yaml(config),
        "class_names": list(data.class_names),
        "image_shape": list(data.train.images.shape[1:]),
    }
    if resume is None:
        run = RunFolder.create(config, command)
    else:
        run = resume
        go_on(run, state)
    steps, size = len(data.train) // config.data.batch_size, config.data.batch_size
    bar = progress_bar(config, state, steps)
    state.clock.add("setup", began)
    if resume is None:
        run.save(about | state.capture())

    with StopRequest() as stop:
        while not scheduler.finished:
            epoch, phase, ramp, rate = state.epoch, scheduler.phase, scheduler.ramp, max(scheduler.get_last_lr())
            weights = {term.name: term.weight(ramp) for term in terms}
            model.train()
            now = time.perf_counter()
            batches = data.train.batches(size, order=order(config.seed, epoch, len(data.train)), skip=len(state.taken))
            for images, target in batches:
                logits, features = model(images, with_features=True)
                available = {"logits": logits, "features": features, "target": target}
                available["weight"] = getattr(model.head, "weight", None)
                losses = {term.name: term(available) for term in terms if weights[term.name]}
                loss = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                state.taken.append(loss.detach())
                step = len(state.taken)
                if device.type == "cpu" or step % 50 == 0 or step == steps:
                    refuse_non_finite(state, steps, run)
                optimizer.step()
                scheduler.step_update((epoch - 1) * steps + step)
                bar.update()
                if stop.asked:
                    run.save(about | state.capture())
                    raise Stopped(f"stopped at step {step} of epoch {epoch}; go on with --resume {run.path}")
            now = state.clock.add("train", now)

            values = measure(model, subset, clock=state.clock)
            val = measure(model, data.val, clock=state.clock, collapse=False)
            scheduler.step(epoch, values["accuracy"])
            mean_loss = float(torch.stack(state.taken).double().mean())
            entry = history_entry(epoch, phase, ramp, rate, mean_loss, values, val, model.num_classes)
            copies = []
            if val["accuracy"] > max((old["val_accuracy"] for old in state.history), default=-1.0):
                copies.append("best")
            if scheduler.onset_epoch == epoch:
                state.at_onset = measure_all(model, data, clock=state.clock)
                copies.append("onset")
                bar.total = steps * (scheduler.last_epoch or config.tpt.max_epochs)
            state.history.append(entry)
            state.taken = []
            now = time.perf_counter()
            run.log(entry)
            run.save(about | state.capture(), *copies)
            state.clock.add("save", now)
            show(bar, entry, scheduler, config)

    bar.close()
    at_end = measure_all(model, data, clock=state.clock)
    summary = {
        "recipe": config.recipe,
        "data": config.data.name,
        "backbone": config.model.backbone,
        "seed": config.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "onset_epoch": scheduler.onset_epoch,
        "epochs": scheduler.epoch,
        "regressions": scheduler.regressions,
        "best_train_accuracy": max(entry["train_accuracy"] for entry in state.history),
        "at_onset": state.at_onset,
        "at_end": at_end,
    }
    draw(run.path / "figures", state.history, scheduler.onset_epoch, title=run.path.name)
    seconds = state.clock.seconds
    images_per_second = scheduler.epoch * steps * size / seconds["train"]
    run.write("timing.json", {"seconds": seconds, "train_images_per_second": images_per_second})
    run.write("summary.json", summary)
    print(closing_lines(summary, run.path))
    print(timing_line(state.clock, images_per_second))
    return run.path


def go_on(run: RunFolder, state: TrainState) -> None:
    """Take up a run where its newest whole checkpoint left it."""
    found, passed_over = run.load()
    if passed_over:
        print(f"note: {passed_over}; going back to epoch {found['epoch']}", file=sys.stderr)
    state.restore(found)
    run.write_history(state.history)


def progress_bar(config: TrainConfig, state: TrainState, steps: int) -> tqdm:
    """Steps of the whole run; silent where there is no terminal, or on request."""
    last = state.scheduler.last_epoch or config.tpt.max_epochs
    done = state.scheduler.epoch * steps + len(state.taken)
    return tqdm(total=steps * last, initial=done, unit="step", disable=True if config.quiet else None)


def order(seed: int, epoch: int, count: int) -> Tensor:
    """The batch order of an epoch: a function of seed and epoch alone, so that recipes and resumed runs share it."""
    drawn = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1)
    return torch.randperm(count, generator=torch.Generator().manual_seed(drawn))


def refuse_non_finite(state: TrainState, steps: int, run: RunFolder) -> None:
    """Stop at the first loss of the epoch that is not finite; the last checkpoint is from before it."""
    finite = torch.stack(state.taken[-50:]).isfinite()
    if finite.all():
        return
    first = len(state.taken) - len(finite) + int((~finite).nonzero()[0]) + 1
    value, whole = state.taken[first - 1].item(), (state.epoch - 1) * steps + first
    raise UserError(
        f"the loss is {value} at step {first} of epoch {state.epoch} (step {whole} of the run); the last good "
        f"checkpoint is {run.checkpoint('last')}; lower --optim.lr"
    )


def history_entry(
    epoch: int,
    phase: str,
    ramp: float,
    rate: float,
    loss: float,
    values: dict[str, float],
    val: dict[str, float],
    num_classes: int,
) -> dict[str, Any]:
    """What history.jsonl keeps of an epoch."""
    ideal = -1 / (num_classes - 1)
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
    total = sum(clock.seconds.values())
    shares = {name: clock.seconds.get(name, 0.0) / total for name in ("measure_forward", "measure_collapse")}
    return (
        f"{total:.0f} s, {images_per_second:.0f} training images/s; measuring took {sum(shares.values()):.0%} "
        f"({shares['measure_forward']:.0%} forward pass, {shares['measure_collapse']:.0%} measures)"
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
        run = None
        if resume == "auto":
            run = RunFolder.unfinished(config)
        elif resume is not None:
            run = RunFolder(Path(resume))
            config = resumed(run)
        train(config, ["recipes/train.py", *argv], resume=run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
