"""A stand-in for timm's train.py: few of its flags, its calls into timm in its order. `test_timm_script.py` runs it.

The names of timm are imported before `--device-modules` are, as there; the checkpoint of an epoch is saved before the
schedule is stepped, and not at all between two validations; the results of an epoch are listed after that; an interrupt
ends the loop without a word; nothing but the optimizer's, the model's and the task's state is in a checkpoint.
"""

import argparse
import importlib
import json
import logging
import os
import sys

import torch
from timm import utils
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import create_model, resolve_model_input_args
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask, LogitDistillationTask, resume_task_checkpoint

parser = argparse.ArgumentParser()
parser.add_argument("--data-dir")
parser.add_argument("--device-modules", nargs="+")
parser.add_argument("--model", default="resnet50")
parser.add_argument("--model-kwargs", nargs="*", default={}, action=utils.ParseKwargs)
parser.add_argument("--kd-model-name")
parser.add_argument("--num-classes", type=int)
parser.add_argument("--input-size", nargs=3, type=int)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--opt", default="sgd")
parser.add_argument("--momentum", type=float, default=0.9)
parser.add_argument("--weight-decay", type=float, default=5e-4)
parser.add_argument("--layer-decay", type=float)
parser.add_argument("--lr", type=float, default=0.05)
parser.add_argument("--sched", default="cosine")
parser.add_argument("--sched-on-updates", action="store_true")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--warmup-epochs", type=int, default=0)
parser.add_argument("--stop-epoch", type=int)
parser.add_argument("--kill-after", type=int, help="of this stand-in alone: exit at once after saving so many epochs")
parser.add_argument("--start-epoch", type=int)
parser.add_argument("--val-split", default="validation")
parser.add_argument("--val-interval", type=int, default=1)
parser.add_argument("--train-interpolation", default="random")
parser.add_argument("--resume", default="")
parser.add_argument("--no-resume-opt", action="store_true")
parser.add_argument("--hflip", type=float, default=0.0)
parser.add_argument("--scale", nargs="+", type=float, default=[0.7, 1.0])
parser.add_argument("--seed", type=int, default=42)
parser.add_argument("--device", default="cpu")
parser.add_argument("--model-ema", action="store_true")
parser.add_argument("--clip-grad", type=float)
parser.add_argument("--output", default="")
parser.add_argument("--experiment", default="")


def main():
    args = parser.parse_args()
    for module in args.device_modules or ():
        importlib.import_module(module)
    device = utils.init_distributed_device(args)
    utils.random_seed(args.seed, args.rank)
    model = create_model(
        **resolve_model_input_args(
            args.model, vars(args), pretrained=False, num_classes=args.num_classes, drop_rate=0.0, **args.model_kwargs
        )
    )
    config = resolve_data_config(vars(args), model=model)
    model.to(device)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    task = make_task(args, model, device)
    resume_epoch = None
    if args.resume:
        resume_epoch = resume_task_checkpoint(task, args.resume, None if args.no_resume_opt else optimizer)
    if args.model_ema:
        task.setup_ema(decay=0.9)
    loader, loader_eval = loaders(args, config, device)
    if args.distributed:
        task.prepare_distributed(device_ids=None)
    saver = None
    if utils.is_primary(args):
        folder = os.path.join(args.output, args.experiment)
        os.makedirs(folder, exist_ok=True)
        saver = utils.CheckpointSaver(
            model=model, optimizer=optimizer, args=args, checkpoint_dir=folder, recovery_dir=folder, task=task
        )
    updates = len(loader)
    schedule, num_epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args, decreasing_metric=False), updates_per_epoch=updates
    )
    start = args.start_epoch if args.start_epoch is not None else resume_epoch or 0
    if schedule is not None and start > 0:
        schedule.step_update(start * updates) if args.sched_on_updates else schedule.step(start)
    results = []
    try:
        for epoch in range(start, min(num_epochs, args.stop_epoch or num_epochs)):
            if args.distributed:
                loader.sampler.set_epoch(epoch)
            rates = [group["lr"] for group in optimizer.param_groups]
            loss = train_one_epoch(epoch, task, model, loader, optimizer, schedule, args)
            if (epoch + 1) % args.val_interval != 0 and epoch + 1 != num_epochs:
                if schedule is not None:
                    schedule.step(epoch + 1, metric=None)
                continue
            metric = loss if loader_eval is None else validate(task, loader_eval, args)
            if saver is not None:
                print(f"epoch {epoch} loss {loss!r} top1 {metric:.2f} rates {rates}", flush=True)
                saver.save_checkpoint(epoch, metric=metric)
            if args.kill_after == epoch + 1:
                os._exit(9)
            if schedule is not None:
                schedule.step(epoch + 1, metric)
            results.append({"epoch": epoch, "metric": metric})
    except KeyboardInterrupt:
        pass
    if args.distributed:
        torch.distributed.destroy_process_group()
    print(f"--result {json.dumps(results)}")


def make_task(args, model, device):
    criterion = torch.nn.CrossEntropyLoss()
    if args.kd_model_name:
        return LogitDistillationTask(model, args.kd_model_name, criterion, device=device)
    return ClassificationTask(model, criterion, device=device)


def loaders(args, config, device):
    shared = {"mean": config["mean"], "std": config["std"], "num_workers": 0, "distributed": args.distributed}
    shared |= {"input_size": config["input_size"], "batch_size": args.batch_size, "device": device}
    train = create_dataset("", root=args.data_dir, split="train", is_training=True, batch_size=args.batch_size)
    augmentation = {"hflip": args.hflip, "scale": args.scale, "color_jitter": None}
    augmentation["interpolation"] = args.train_interpolation
    loader = create_loader(train, is_training=True, **augmentation, **shared)
    if not args.val_split:
        return loader, None
    valid = create_dataset("", root=args.data_dir, split=args.val_split, is_training=False, batch_size=args.batch_size)
    return loader, create_loader(
        valid, is_training=False, crop_pct=1.0, interpolation=config["interpolation"], **shared
    )


def train_one_epoch(epoch, task, model, loader, optimizer, schedule, args):
    model.train()
    updates, losses = epoch * len(loader), utils.AverageMeter()
    for images, target in loader:
        result = task(images, target)
        optimizer.zero_grad()
        result["loss"].backward()
        if args.clip_grad:
            utils.dispatch_clip_grad(task.get_clip_parameters(exclude_head=True), args.clip_grad, mode="agc")
        optimizer.step()
        updates += 1
        task.update_ema(step=updates)
        losses.update(result["loss"].item(), len(target))
        if schedule is not None:
            schedule.step_update(num_updates=updates, metric=losses.avg)
    return losses.avg


@torch.inference_mode()
def validate(task, loader, args):
    model = task.get_eval_model()
    model.eval()
    evaluator = task.create_evaluator()
    for images, target in loader:
        evaluator.update(model(images), target)
    return evaluator.compute(distributed=args.distributed)["top1"]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    logging.getLogger("ncreg").setLevel(logging.DEBUG)  # what the processes beside the first one have measured, too
    main()
