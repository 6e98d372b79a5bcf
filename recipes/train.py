"""Train a classifier into neural collapse and measure it.

    python recipes/train.py etf
    python recipes/train.py --config recipes/configs/etf.yaml --model.backbone resnet18 --data.name fashion_mnist

The loop: fit, find zero training error, go on through the terminal phase, measure at both ends.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
if __name__ == "__main__":
    from recipes.core.extras import require_recipes

    require_recipes()
    from recipes.core.cli import check_recipe, parse_command  # before the imports below, which take seconds
    from recipes.core.errors import UserError
    from recipes.core.script import leave_with

    try:
        check_recipe(sys.argv[1:])
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        leave_with(lambda: 2)
    if {"-h", "--help"} & set(sys.argv):
        from recipes.training.names import existing_names

        leave_with(lambda: parse_command(sys.argv[1:], existing_names()) and 0)

import torch

from ncreg.models import Classifier
from ncreg.numerics import in_float64
from recipes.core.cli import parse_command
from recipes.core.config import TrainConfig, as_yaml
from recipes.core.distributed import Ranks, join_ranks, pick_device
from recipes.core.errors import RankError, UserError
from recipes.core.interrupt import EXIT_CODE, Stopped, StopRequest
from recipes.core.script import leave_with, tell_out_of_memory
from recipes.data.augment import batches, check_shift, epoch_order
from recipes.data.lazy_images import report_lost_workers
from recipes.data.left_out import check_readable
from recipes.data.load import Dataset
from recipes.data.names import IN_PYTHON
from recipes.data.split import Split
from recipes.data.unreadable import offering_skip
from recipes.training import build
from recipes.training.adversarial import Adversary
from recipes.training.frozen import FrozenBackbone
from recipes.training.layer_measures import layer_measures
from recipes.training.longer import record_bounds
from recipes.training.metrics import cosine_gaps, measure, measure_all
from recipes.training.names import existing_names
from recipes.training.plan import show_plan
from recipes.training.prepare import (
    announce,
    checkpoint_header,
    costs_of,
    from_seed,
    load_data,
    open_run,
    prepare,
    tell,
)
from recipes.training.records import epoch_record, run_summary
from recipes.training.reporting import EpochHook, TensorBoardLog, closing_lines, timing_line
from recipes.training.run_dir import RunDir
from recipes.training.same_start import check_code, check_data, record_root, unreadable_now
from recipes.training.state import TrainState
from recipes.training.step import check_losses, forward_backward, update

LESS_MEMORY = (
    "--optim.accumulate N takes a batch in N parts; a smaller --data.batch_size or --data.image_size needs less too"
)
STEPS_BETWEEN_CHECKS = 50
"""On a GPU, the host waits for the losses (are they finite?) and looks for a stop request once in so many steps."""


def train(
    config: TrainConfig,
    command: Sequence[str] = (),
    *,
    resume: RunDir | None = None,
    data: Any = None,
    on_epoch: Callable[[dict[str, Any]], object] | None = None,
) -> Path:
    """Train one run, or the rest of the run `resume`; returns its folder.

    Args:
        config: the configuration.
        command: the command line, for the record.
        resume: a run to go on with.
        data: in place of the set that `config` names: a map-style dataset of (image, label) pairs, which is divided, or
            a dict of such datasets by split, "train" and, if there are some, "val" and "test".
        on_epoch: called with the record of each epoch, in place of the function that `config` names.

    Raises:
        UserError: the configuration cannot be carried out, or the loss is not finite.
        Stopped: SIGTERM or SIGINT came; the run is saved.
    """
    device = pick_device(config.device)
    if data is not None:
        config = replace(config, data=replace(config.data, name=IN_PYTHON))
    hook = EpochHook(config.on_epoch, on_epoch)
    with join_ranks(device) as ranks, StopRequest() as stop, report_lost_workers(), ExitStack() as guard:
        return run_epochs(config, command, resume, data, hook, device, ranks, stop, guard)


def run_epochs(
    config: TrainConfig,
    command: Sequence[str],
    resume: RunDir | None,
    given: Any,
    hook: EpochHook,
    device: torch.device,
    ranks: Ranks,
    stop: StopRequest,
    guard: ExitStack,
) -> Path:
    """THE loop: load, build, then train and measure epoch by epoch, and report."""
    began = time.perf_counter()
    if resume is not None:
        ranks.together(lambda: guard.enter_context(resume.alone()) if ranks.main else None)
        check_code(resume, config)
    former = () if resume is None else unreadable_now(resume, config)
    with offering_skip(resume is None):
        data = ranks.together(lambda: load_data(config, device, given, former))
        check_readable((data.train, data.val, data.test), ranks)
    if resume is None:
        check_shift(config.augment, data.train)
    measured, state = prepare(config if resume is None else from_seed(config), data, device, ranks)
    run = open_run(config, command, resume, state)
    if resume is None and ranks.main:
        guard.enter_context(run.alone())
    check_data(run, data, trained=state.scheduler.finished)
    record_bounds(run, config, command, state.scheduler.epoch)
    record_root(run, config)
    guard.enter_context(run.noting_unreadable())
    model, scheduler, clock = state.model, state.scheduler, state.clock
    steps = len(data.train) // config.data.batch_size
    header = checkpoint_header(config, data)
    wrapped = ranks.wrap(model, device, compiled=config.compile)
    adversary = Adversary(
        config.adversarial,
        model,
        ranks,
        seed=config.seed,
        chunks=config.optim.accumulate,
        precision=config.precision,
        cost=costs_of(config, data, device),
    )
    frozen = FrozenBackbone(
        model,
        config,
        ranks,
        (data.train, measured, data.val),
        between=partial(leave_if_asked, stop, run),
        tell=partial(tell, ranks.main and not config.quiet),
    )
    tensorboard = TensorBoardLog(
        run.path / "tensorboard", wanted=config.tensorboard and ranks.main, epochs_done=scheduler.epoch
    )
    progress = announce(config, data, state, steps)
    clock.add("setup", began)
    if resume is None:
        run.save(header | state.capture())
    measure_onset(state, data, run, header)

    while not scheduler.finished:
        # Train for an epoch, or for the rest of it after a resume.
        epoch = state.epoch
        plan = {"epoch": epoch, "phase": scheduler.phase, "ramp": scheduler.ramp, "lr": max(scheduler.get_last_lr())}
        weights = {term.name: term.weight(scheduler.ramp) for term in state.terms}
        model.train()
        images: Split = data.train
        if config.model.freeze_epochs and epoch <= config.model.freeze_epochs + 1:  # frozen, or free from now on
            build.freeze(model, state.optimizer, epoch <= config.model.freeze_epochs)
            trained, images = frozen.stands_in(epoch, data.train, clock)
            wrapped = ranks.wrap(trained, device, compiled=config.compile)
        began = time.perf_counter()
        for batch in batches(
            images,
            epoch_order(config.seed, epoch, len(data.train))[: steps * config.data.batch_size].view(steps, -1),
            config.augment,
            ranks=ranks,
            dtype=next(model.parameters()).dtype,
            seed=config.seed,
            epoch=epoch,
            done=len(state.losses),
            num_classes=model.num_classes,
        ):
            if adversary.active(scheduler.phase):
                batch = adversary(batch, epoch=epoch, step=len(state.losses))
            features = forward_backward(
                batch, wrapped, state, weights, chunks=config.optim.accumulate, precision=config.precision
            )
            done = len(state.losses)
            checks = device.type == "cpu" or done % STEPS_BETWEEN_CHECKS == 0 or done == steps
            if checks:
                check_losses(state, steps, run.checkpoint("last"), last=STEPS_BETWEEN_CHECKS)
            update(state, config.optim, features, batch.labels, steps_per_epoch=steps)
            progress.step()
            if checks and ranks.any(stop.requested, device):
                clock.add("train", began)
                run.save(header | state.capture())
                raise Stopped(f"stopped at step {done} of epoch {epoch}; go on with --resume {run.path}")
        clock.add("train", began)

        # Measure on clean images; the training accuracy tells the scheduler when the terminal phase begins.
        ranks.broadcast_buffers(model)
        values = measure_epoch(*frozen.stands_in(epoch, measured, clock), state, run)
        on_validation = partial(measure, ranks=ranks, clock=clock, collapse=False)
        validation = on_validation(*frozen.stands_in(epoch, data.val, clock))
        scheduler.step(epoch, values["accuracy"], build.stop_value(values, config.tpt))
        mean_loss = float(ranks.sum(in_float64(torch.stack(state.losses)).mean())) / ranks.size
        record = epoch_record({**plan, "loss": mean_loss}, values, validation)
        began = time.perf_counter()
        if config.extra_measures:
            record["layers"] = layer_measures(config.extra_measures, model, measured)
            clock.add("measure_layers", began)
        if state.ema is not None:
            ranks.broadcast_buffers(state.ema.module)
            record["ema"] = on_validation(state.ema.module, data.val)

        # Write down, and save.
        copies = []
        if validation["accuracy"] > max((old["val_accuracy"] for old in state.history), default=-1.0):
            copies.append("best")
        state.history.append(record)
        state.losses = []
        began = time.perf_counter()
        run.log(record)
        tensorboard.add(record)
        run.save(header | state.capture(), *copies)
        clock.add("save", began)
        measure_onset(state, data, run, header)
        if ranks.main:
            hook.add(record, run.path)
        progress.epoch(
            record,
            phase=scheduler.phase,
            epochs=scheduler.last_epoch,
            important=scheduler.finished or scheduler.onset_epoch == epoch,
        )

    progress.close()
    identity = {
        "recipe": config.recipe,
        "threshold": config.tpt.threshold,
        "data": config.data.name,
        "backbone": config.model.backbone,
        "seed": config.seed,
    }
    summary = run_summary(identity, state, data)
    tensorboard.close()
    if ranks.main:
        finish(run, state, summary, images=scheduler.epoch * steps * config.data.batch_size)
    return run.path


def leave_if_asked(stop: StopRequest, run: RunDir) -> None:
    """End a long pass over the images before an epoch's first step; the run is as it was saved last.

    Raises:
        Stopped: SIGTERM or SIGINT came.
    """
    if stop.requested:
        raise Stopped(f"stopped; go on with --resume {run.path}")


def measure_epoch(model: Classifier, split: Split, state: TrainState, run: RunDir) -> dict[str, float]:
    """The measures on training images after an epoch, and the distances of the mean cosines from collapse.

    `model` and `split` are the model and its images, or what stands in for them while the backbone is frozen.

    Raises:
        UserError: the last step left a model that is not finite.
    """
    try:
        measures = measure(model, split, ranks=state.ranks, clock=state.clock)
        return measures | cosine_gaps(measures, state.model.num_classes)
    except ValueError as error:
        raise UserError(
            f"epoch {state.epoch} left a model that is not finite ({error}); the last good checkpoint is "
            f"{run.checkpoint('last')}; lower --optim.lr"
        ) from None


def measure_onset(state: TrainState, data: Dataset, run: RunDir, header: dict[str, Any]) -> None:
    """At zero error, measure the whole of each split; the run is saved before, so that an unreadable image loses none.

    A run that could not do so, or was killed, does it when it goes on.
    """
    if state.at_onset is None and state.scheduler.onset_epoch == state.scheduler.epoch:
        state.at_onset = measure_all(state.model, data, ranks=state.ranks, clock=state.clock)
        run.save(header | state.capture(), "onset")


def finish(run: RunDir, state: TrainState, summary: dict[str, Any], *, images: int) -> None:
    """Figures, timing.json, summary.json and the closing lines."""
    from recipes.training.plots import plot_run  # with matplotlib, for which the first epoch need not wait

    with run.writing():
        onset, threshold = state.scheduler.onset_epoch, summary["threshold"]
        plot_run(run.path / "figures", state.history, onset, title=run.path.name, threshold=threshold)
    seconds = state.clock.seconds
    speed = images / (seconds["train"] + seconds.get("encode", 0.0))
    run.write("timing.json", {"seconds": seconds, "train_images_per_second": speed})
    run.write("summary.json", summary)
    run.all_read()
    print(closing_lines(summary, run.path))
    print(timing_line(state.clock, speed))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0 when the run is done, 2 with one line when something is to be put right, 75 when stopped."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        config, resume, plan, changes = parse_command(argv, existing_names())
        if plan:
            show_plan(config)
            return 0
        run = None
        if resume == "auto":
            run = RunDir.unfinished(config.out, as_yaml(config))
            if run is None and not config.quiet:
                print(
                    f"no unfinished run of this configuration (recipe {config.recipe}) in {config.out}: starting one; "
                    "--resume RUN goes on with a certain run"
                )
        elif resume is not None:
            run = RunDir(Path(resume))
            config = run.config(changes)
        else:
            run = RunDir.unfinished(config.out, as_yaml(config), unreadable=True)
        train(config, ["recipes/train.py", *argv], resume=run)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, RankError):
            print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        return tell_out_of_memory(error, LESS_MEMORY)
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(stopped, file=sys.stderr)
        return EXIT_CODE
    return 0


if __name__ == "__main__":
    leave_with(main)
