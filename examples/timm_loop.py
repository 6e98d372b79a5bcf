"""Neural collapse inside a loop that is not ours: timm's optimizer, schedule and meters on scikit-learn's digits.

What ncreg adds to the loop is marked with a comment: the swapped head, parameter groups in which γ decays, the
scheduler that finds zero training error and extends training past it, and the measures.

    python examples/timm_loop.py [--out FOLDER] [--quick]
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import AverageMeter, accuracy
from torch import Tensor

from ncreg import TPTScheduler, param_groups, swap_head
from ncreg.metrics import NeuralCollapse


def data(train_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits at 32×32, standardised: training images and labels, test images and labels."""
    images, target = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    images = F.interpolate((images - images.mean()) / images.std(), size=32, mode="bilinear")
    rows = range(len(target))
    train, test = train_test_split(rows, train_size=train_size, test_size=360, stratify=target, random_state=0)
    target = torch.tensor(target)
    return images[train], target[train], images[test], target[test]


@torch.no_grad()
def evaluate(model: torch.nn.Module, images: Tensor, target: Tensor, collapse: NeuralCollapse | None = None) -> float:
    """Accuracy in [0, 1] in eval mode; features go to `collapse` on the way."""
    model.eval()
    top1 = AverageMeter()
    for batch, labels in zip(images.split(256), target.split(256), strict=True):
        logits, features = model(batch, with_features=True)
        top1.update(float(accuracy(logits, labels)[0]) / 100, len(labels))
        if collapse is not None:
            collapse.update(features, labels)
    return top1.avg


def train(epochs: int, train_size: int, batch_size: int = 64) -> tuple[list[dict[str, float]], int | None]:
    """The loop; returns the history and the epoch of zero training error."""
    torch.manual_seed(0)
    images, target, test_images, test_target = data(train_size)
    backbone = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    model = swap_head(backbone, "etf")  # ncreg: last BatchNorm and fixed simplex head
    groups = param_groups(model, weight_decay=5e-4)  # ncreg: γ decays too
    optimizer = create_optimizer_v2(groups, opt="sgd", lr=0.05, momentum=0.9)
    schedule = CosineLRScheduler(optimizer, t_initial=epochs, warmup_t=2, warmup_lr_init=1e-3)
    scheduler = TPTScheduler(optimizer, schedule, max_epochs=epochs, min_terminal=epochs // 4)  # ncreg
    history: list[dict[str, float]] = []
    while not scheduler.finished:
        model.train()
        for batch in torch.randperm(len(target)).split(batch_size)[: len(target) // batch_size]:
            loss = F.cross_entropy(model(images[batch]), target[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        collapse = NeuralCollapse(10, model.head_hidden_size, classifier=model.head)  # ncreg: on training features
        fitted = evaluate(model, images, target, collapse)
        measured = {key: float(value) for key, value in collapse.compute().items()}
        scheduler.step(len(history) + 1, fitted)  # ncreg: clean *training* accuracy in [0, 1], not validation per cent
        history.append({"train": fitted, "test": evaluate(model, test_images, test_target), **measured})
    return history, scheduler.onset_epoch


def draw(history: list[dict[str, float]], onset: int | None, path: Path) -> None:
    """Errors and measures of collapse over the epochs, the onset marked."""
    epochs = range(1, len(history) + 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.6), layout="constrained")
    for key, colour, style in (("train", "#0072B2", "-"), ("test", "#D55E00", "--")):
        left.plot(epochs, [100 * (1 - row[key]) for row in history], color=colour, ls=style, label=f"{key} error")
    left.set(ylabel="error (%)", yscale="symlog", ylim=(0, 100))
    names = {"nc1": "NC1", "nc2_equiangularity": "NC2 (angles)", "nc3": "NC3", "etf_distance": "distance to the ETF"}
    styles = zip(["#0072B2", "#D55E00", "#009E73", "#CC79A7"], ["-", "--", "-.", ":"], strict=True)
    for (key, name), (colour, style) in zip(names.items(), styles, strict=True):
        right.plot(epochs, [row[key] for row in history], color=colour, ls=style, label=name)
    right.set(ylabel="measures of collapse", yscale="log")
    for axis in (left, right):
        if onset is not None:
            axis.axvline(onset, color="0.4", ls=":", lw=1.2)
            place = {"xycoords": axis.get_xaxis_transform(), "rotation": 90, "va": "center", "fontsize": 8}
            axis.annotate("zero training error", (onset + 0.3, 0.84), color="0.3", **place)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.25, lw=0.5)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8.5)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Train, print both ends of the terminal phase, save the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="folder of the figure")
    parser.add_argument("--quick", action="store_true", help="few images, few epochs")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    history, onset = train(epochs=8, train_size=256) if arguments.quick else train(epochs=60, train_size=1400)
    print(f"zero training error at epoch {onset}, trained to epoch {len(history)}")
    ends = {"at zero error": history[(onset or 1) - 1], "at the end": history[-1]}
    if onset is None:
        ends.pop("at zero error")
    for name, row in ends.items():
        print(f"{name:14} test accuracy {100 * row['test']:.2f} %, NC1 {row['nc1']:.2e}, NC3 {row['nc3']:.3f}")
    path = arguments.out / "timm_loop.png"
    draw(history, onset, path)
    print(f"figure: {path}")


if __name__ == "__main__":
    main()
