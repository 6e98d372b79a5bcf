"""Train a classifier into neural collapse and measure it.

    python recipes/train.py etf
    python recipes/train.py --config recipes/configs/etf.yaml --model.backbone resnet18 --data.name fashion_mnist

The loop: fit, find zero training error, go on through the terminal phase, measure at both ends.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
if __name__ == "__main__":
    from recipes.core.extras import require_recipes

    require_recipes()

import torch

from ncreg.heads import HEADS
from ncreg.norms import NORMS
from recipes.core.cli import parse, parse_command
from recipes.core.config import TrainConfig
from recipes.core.distributed import Ranks, join_ranks
from recipes.core.errors import UserError
from recipes.core.interrupt import EXIT_CODE, Stopped, StopRequest
from recipes.data.lazy_images import report_lost_workers
from recipes.data.load import SOURCES, Dataset, load
from recipes.data.split import Split, stratified
from recipes.loop import Loop
from recipes.training.board import Board
from recipes.training.build import image_size, pick_device
from recipes.training.loss_terms import loss_names
from recipes.training.plan import show_plan
from recipes.training.reporting import closing_lines, draw, opening_line, progress_bar, run_summary, show, timing_line
from recipes.training.run_dir import RunDir
from recipes.training.state import TrainState, build_state


def train(config: TrainConfig, command: Sequence[str] = (), *, resume: RunDir | None = None) -> Path:
    """One run, from the configuration to its folder; with `resume`, from where that run was left.

    Raises:
        UserError: what the configuration asks for cannot be had, or the loss is not finite.
        Stopped: SIGTERM or SIGINT came; the run is saved.
    """
    device = pick_device(config.device)
    with join_ranks(device) as ranks, StopRequest() as stop, report_lost_workers():
        return fit(config, command, resume, device, ranks, stop)


def fit(
    config: TrainConfig,
    command: Sequence[str],
    resume: RunDir | None,
    device: torch.device,
    ranks: Ranks,
    stop: StopRequest,
) -> Path:
    """The run itself: build, loop, measure, save."""
    began = time.perf_counter()
    data = load(config.data, seed=config.seed, image_size=lambda native: image_size(config, native)).to(device)
    subset = measured_images(config, data)
    state = build_state(config, data, device, ranks)
    ranks.images_per_rank(config.data.batch_size, config.optim.accumulate)
    run = open_run(config, command, resume, state)
    for note in data.notes if ranks.main else ():
        print(f"note: {note}", file=sys.stderr)
    if ranks.main and not config.quiet:
        print(opening_line(config, data, state.model), flush=True)
    steps = len(data.train) // config.data.batch_size
    loop = Loop(config, data, state, run, stop, steps)
    bar = progress_bar(config, state, steps)
    board = Board(run, config.tensorboard and ranks.main, done=state.scheduler.epoch)
    state.clock.add("setup", began)
    if resume is None:
        loop.save()

    while not state.scheduler.finished:
        planned = loop.epoch(bar)
        entry, copies = loop.measure_epoch(planned, subset)
        state.history.append(entry)
        state.taken = []
        now = time.perf_counter()
        run.log(entry)
        board.add(entry)
        loop.save(*copies)
        state.clock.add("save", now)
        bar.total = steps * (state.scheduler.last_epoch or config.tpt.max_epochs)
        show(bar, entry, state.scheduler, config, ranks)

    bar.close()
    summary = run_summary(config, state, data)
    board.close()
    if ranks.main:
        finish(run, state, summary, images=state.scheduler.epoch * steps * config.data.batch_size)
    return run.path


def measured_images(config: TrainConfig, data: Dataset) -> Split:
    """The training images that each epoch is judged and measured on."""
    judged = data.correctly_labelled() if config.tpt.target == "clean_subset" else data.train
    size = None if config.measure_size is None else min(config.measure_size, len(judged))
    return stratified(judged, size, seed=config.seed, what="measure_size")


def finish(run: RunDir, state: TrainState, summary: dict[str, Any], *, images: int) -> None:
    """Figures, timing, summary, and the closing lines."""
    with run.writing():
        draw(run.path / "figures", state.history, state.scheduler.onset_epoch, title=run.path.name)
    seconds = state.clock.seconds
    run.write("timing.json", {"seconds": seconds, "train_images_per_second": images / seconds["train"]})
    run.write("summary.json", summary)
    print(closing_lines(summary, run.path))
    print(timing_line(state.clock, images / seconds["train"]))


def open_run(config: TrainConfig, command: Sequence[str], resume: RunDir | None, state: TrainState) -> RunDir:
    """A new folder made by the main rank, or an old one gone on with."""
    if resume is not None:
        go_on(resume, state, quiet=config.quiet)
        return resume
    ranks = state.ranks
    path = ranks.from_main(str(RunDir.create(config, command).path) if ranks.main else None)
    return RunDir(Path(path), writes=ranks.main)


def go_on(run: RunDir, state: TrainState, *, quiet: bool) -> None:
    """Take up a run where its newest whole checkpoint left it."""
    found, passed_over = run.load()
    run.writes = state.ranks.main
    if passed_over and run.writes:
        print(f"note: {passed_over}; going back to epoch {found['epoch']}", file=sys.stderr)
    state.restore(found)
    run.write_history(state.history)
    if run.writes and not quiet:
        print(f"going on with {run.path} at epoch {state.epoch}, after step {len(state.taken)} of it")


def resumed(run: RunDir) -> TrainConfig:
    """The configuration of a run that is to go on."""
    if not (run.path / "config.yaml").is_file():
        raise UserError(f"resume={run.path} is no run folder: it has no config.yaml")
    if run.finished:
        raise UserError(f"run {run.path} is finished: its summary.json is there; nothing to resume")
    return parse(["--config", str(run.path / "config.yaml")])


def existing_names() -> dict[str, Sequence[str]]:
    """What --help lists beside the recipes, by its title."""
    return {
        "heads": list(HEADS),
        "norms": list(NORMS),
        "losses": loss_names(),
        "data sets": [*SOURCES, "torchvision.NAME"],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0 when the run is done, 2 with one line when something is to be put right, 75 when stopped."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        config, resume, plan = parse_command(argv, existing_names())
        if plan:
            show_plan(config)
            return 0
        run = None
        if resume == "auto":
            run = RunDir.unfinished(config)
            if run is None and not config.quiet:
                print("no unfinished run of this configuration: starting one")
        elif resume is not None:
            run = RunDir(Path(resume))
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
