"""What stands before a run's first epoch: images, model and schedule, tried out; the run folder; the opening lines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3

from ncreg.checkpoint import classifier_header
from recipes.core.config import TrainConfig, as_yaml
from recipes.core.costs import read_costs
from recipes.core.distributed import Ranks, copies_notes
from recipes.core.errors import UserError
from recipes.core.files import file_name
from recipes.core.idle_keys import idle_notes
from recipes.core.own_code import own_files, texts
from recipes.data.load import Dataset, load
from recipes.data.split import Split, stratified
from recipes.training import build
from recipes.training.elsewhere import Move
from recipes.training.layer_measures import layer_measures
from recipes.training.longer import under_new_bounds
from recipes.training.loss_terms import build_terms, try_terms
from recipes.training.metrics import CLASSES_AT_ONCE, LEFT_OUT
from recipes.training.reporting import Progress, batch_notes, frozen_notes, opening_line, size_notes
from recipes.training.run_dir import RunDir
from recipes.training.same_start import check_images
from recipes.training.state import TrainState


def load_data(config: TrainConfig, device: torch.device, given: Any = None, former: Sequence[str] = ()) -> Dataset:
    """The images on the device, at the size that the backbone takes; see `load` for `given` and `former`."""
    size = partial(build.image_size, backbone=config.model.backbone, requested=config.data.image_size)
    return load(config.data, seed=config.seed, image_size=size, given=given, former=former).to(device)


def measured_images(config: TrainConfig, data: Dataset) -> Split:
    """The training images that are measured after every epoch, and on which zero error is looked for."""
    judged = data.correctly_labelled() if config.tpt.target == "clean_subset" else data.train
    size = None if config.measure_size is None else min(config.measure_size, len(judged))
    return stratified(judged, size, seed=config.seed, what="measure_size")


def prepare(config: TrainConfig, data: Dataset, device: torch.device, ranks: Ranks) -> tuple[Split, TrainState]:
    """The images that are measured and the state at the start, once everything is tried out that a run can refuse."""
    measured = measured_images(config, data)
    state = build_state(config, data, device, ranks)
    layer_measures(config.extra_measures, state.model, measured)
    return measured, state


def from_seed(config: TrainConfig) -> TrainConfig:
    """The configuration without pretrained weights, for a run whose checkpoint holds what became of them."""
    return replace(config, model=replace(config.model, pretrained=False, weights=None, start_from=None))


def build_state(config: TrainConfig, data: Dataset, device: torch.device, ranks: Ranks) -> TrainState:
    """Model, loss terms, optimizer and schedule at the start of a run."""
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    note = partial(tell, ranks.main)
    model = build.build_model(config.model, data, seed=config.seed, dtype=dtype, note=note).to(device)
    widths = {"num_features": model.head_hidden_size, "num_encoder_features": model.backbone_width}
    cost = costs_of(config, data, device)
    terms = build_terms(config.loss, class_counts=data.class_counts(), **widths, device=device, cost=cost)
    try_terms(terms, model, soft=config.augment.softens)
    optimizer = build.build_optimizer(config.optim, model)
    build.check_freeze(model, config.model.freeze_epochs)
    scheduler = build.build_scheduler(config.tpt, config.optim, optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
    ema = None if config.optim.ema is None else ModelEmaV3(model, decay=config.optim.ema)
    ranks.images_per_rank(config.data.batch_size, config.optim.accumulate)
    return TrainState(model, terms, optimizer, scheduler, scaler, ema, ranks)


def costs_of(config: TrainConfig, data: Dataset, device: torch.device) -> torch.Tensor | None:
    """What mistakes cost, in float32 (C, C); None where the configuration names no file of costs."""
    path = config.data.cost
    return None if path is None else read_costs(path, data.class_names, key="data.cost").to(device, torch.float32)


def open_run(config: TrainConfig, command: Sequence[str], resume: RunDir | None, state: TrainState) -> RunDir:
    """A new run folder, made by the main rank; or the run to resume, with `state` set to where it stopped."""
    if resume is None:
        path = None
        if state.ranks.main:
            backbone = config.model.backbone.replace(":", "/").rstrip("/").rpartition("/")[2]  # local-dir:/a/b gives b
            path = RunDir.create(
                config.out,
                f"{file_name(config.data.name)}-{file_name(config.recipe)}-{backbone}-seed{config.seed}",
                config=as_yaml(config),
                command=command,
                images=config.data.root if config.data.name == "folder" else None,
                code=texts(own_files(config)),
            ).path
        return RunDir(Path(state.ranks.from_main(str(path))), writes=state.ranks.main)
    check_images(resume, config)
    found, skipped = resume.load()
    resume.writes = state.ranks.main
    if skipped and resume.writes:
        print(f"note: {skipped}; going back to epoch {found['epoch']}", file=sys.stderr)
    move = Move(resume, command)
    try:
        state.restore(under_new_bounds(found, state.scheduler, config, resume))
    except UserError as error:
        raise move.refusal(error) from None
    if resume.writes and (moved := move.note(state.epoch)):
        tell(True, moved)
    resume.write_history(state.history)
    if resume.writes and not config.quiet:
        print(f"going on with {resume.path} at epoch {state.epoch}, after step {len(state.losses)} of it")
    return resume


def checkpoint_header(config: TrainConfig, data: Dataset) -> dict[str, Any]:
    """What a checkpoint says besides the state: enough for `ncreg.load_classifier` to build the model again."""
    return {"config": as_yaml(config)} | classifier_header(
        build=build.classifier_args(config.model, data, seed=config.seed),
        class_names=data.class_names,
        image_shape=data.train.images.shape[1:],
    )


def announce(config: TrainConfig, data: Dataset, state: TrainState, steps: int) -> Progress:
    """Print notes on the data and the opening line; the progress bar of the run."""
    main, scheduler = state.ranks.main, state.scheduler
    hints = [] if config.quiet else batch_notes(config.data.batch_size, len(data.train))
    hints += [] if config.quiet else idle_notes(config)
    hints += [] if config.quiet else frozen_notes(state.model, config.model.freeze_epochs)
    hints += [] if config.quiet else size_notes(config, data, data.train.images.shape[-1])
    hints += copies_notes()
    hints += [] if state.model.num_classes <= CLASSES_AT_ONCE else [LEFT_OUT]
    for note in [*data.notes, *hints]:
        tell(main, note)
    if main and not config.quiet:
        line = opening_line(data, state.model, data_name=config.data.name, backbone=config.model.backbone)
        print(line, flush=True)
    return Progress(
        steps=steps,
        done=scheduler.epoch * steps + len(state.losses),
        epochs=scheduler.last_epoch,
        max_epochs=config.tpt.max_epochs,
        visible=main and not config.quiet,
    )


def tell(wanted: bool, note: str) -> None:
    """Print a sentence for the user beside the output, where it is wanted."""
    if wanted:
        print(f"note: {note}", file=sys.stderr)
