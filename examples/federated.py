"""Federated averaging with skewed labels: what a last norm, a fixed frame and local logit adjustment are worth there.

Ten clients hold scikit-learn's digits, each with a mix of classes of its own: class c is divided among the clients by
proportions from Dirichlet(alpha), so that at alpha = 0.1 most clients see two or three classes. In each round every
client trains a copy of the shared model on its own images; the new shared model is the mean of the copies, weighted by
their numbers of images (McMahan et al. 2017, arXiv 1602.05629). Local training pulls the heads and the features of the
clients apart; a frame that no client can move and a norm behind the features are two remedies that suggest themselves,
cross-entropy adjusted by each client's own class counts (arXiv 2007.07314) is a third.

    python examples/federated.py [--out FOLDER] [--alpha 0.1] [--seeds 0 1 2] [--quick]

`benchmarks/studies/federated.py` repeats it with ten seeds; docs/evidence.md has its table.
"""

import argparse
import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from ncreg import Classifier, param_groups, swap_head
from ncreg.functional import logit_adjusted_cross_entropy

CLASSES = 10
HEADS, NORMS = ("linear", "cosine", "etf"), ("none", "layer", "batch")


def data(seed: int, *, validate: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits at 8×8, standardised: training images and labels, test images and labels; the parts are drawn by seed.

    With `validate` the test images are left alone: a fifth of the training images takes their place.
    """
    images, target = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)
    images = (images - images.mean()) / images.std()
    train, test = train_test_split(range(len(target)), test_size=360, stratify=target, random_state=seed)
    if validate:
        train, test = train_test_split(train, test_size=0.2, stratify=target[train], random_state=seed)
    target = torch.tensor(target)
    return images[train], target[train], images[test], target[test]


def divide(target: Tensor, clients: int, alpha: float, seed: int) -> list[Tensor]:
    """Rows of each client: those of class c by proportions from Dirichlet(alpha); every row goes to one client.

    Example:
        >>> rows = divide(torch.arange(100) % 10, clients=4, alpha=0.5, seed=0)
        >>> sorted(torch.cat(rows).tolist()) == list(range(100))
        True
    """
    generator = np.random.default_rng(seed)
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label in target.unique():
        rows = generator.permutation((target == label).nonzero().squeeze(1).numpy())
        bounds = np.rint(np.cumsum(generator.dirichlet(np.full(clients, alpha)))[:-1] * len(rows)).astype(int)
        for part, piece in zip(parts, np.split(rows, bounds), strict=True):
            part.append(piece)
    return [torch.from_numpy(np.concatenate(part)) for part in parts]


def build(head: str, norm: str, seed: int) -> Classifier:
    """Two convolutions with GroupNorm (no batch statistics but those of the last norm), then norm and head."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in ((1, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.ReLU(), nn.MaxPool2d(2)]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    return swap_head(network, head, num_classes=CLASSES, norm=norm, input_size=(1, 8, 8))


def train_client(
    model: Classifier, images: Tensor, target: Tensor, *, adjusted: bool, epochs: int, rate: float, batch_size: int = 32
) -> None:
    """Plain SGD on one client's images, with cross-entropy or with that of z + ln π of the client."""
    optimizer = torch.optim.SGD(param_groups(model, weight_decay=5e-4), lr=rate, momentum=0.9)
    counts = target.bincount(minlength=CLASSES) + 1  # one more of each: a class that is not there has no logarithm
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(target)).split(batch_size):
            if len(rows) == 1:
                continue  # a batch of one has no batch statistics
            logits = model(images[rows])
            if adjusted:
                loss = logit_adjusted_cross_entropy(logits, target[rows], counts)
            else:
                loss = F.cross_entropy(logits, target[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def mean_state(states: Sequence[Mapping[str, Tensor]], sizes: Sequence[int]) -> dict[str, Tensor]:
    """Σ n_k·state_k/Σ n_k; what counts, such as a number of batches, is rounded."""
    total = sum(sizes)
    mean = {}
    for name, first in states[0].items():
        value = sum(state[name].double() * (size / total) for state, size in zip(states, sizes, strict=True))
        assert isinstance(value, Tensor)
        mean[name] = (value if first.is_floating_point() else value.round()).to(first.dtype)
    return mean


@torch.no_grad()
def accuracy(model: Classifier, images: Tensor, target: Tensor) -> float:
    """Fraction of images that are classified right."""
    return float((model.eval()(images).argmax(1) == target).double().mean())


def federated_averaging(
    head: str,
    norm: str,
    *,
    adjusted: bool,
    alpha: float,
    seed: int,
    rounds: int = 20,
    clients: int = 10,
    epochs: int = 1,
    rate: float = 0.05,
    validate: bool = False,
) -> Iterator[float]:
    """Test accuracy of the shared model after each round; with `validate` that of a fifth of the training images."""
    images, target, test_images, test_target = data(seed, validate=validate)
    rows_of = [rows for rows in divide(target, clients, alpha, seed) if len(rows) > 1]
    shared = build(head, norm, seed)
    for _ in range(rounds):
        states = []
        for rows in rows_of:
            local = copy.deepcopy(shared)
            train_client(local, images[rows], target[rows], adjusted=adjusted, epochs=epochs, rate=rate)
            states.append(local.state_dict())
        shared.load_state_dict(mean_state(states, [len(rows) for rows in rows_of]))
        yield accuracy(shared, test_images, test_target)


def draw(curves: Mapping[tuple[str, str, bool], Tensor], alpha: float, path: Path) -> None:
    """Mean test accuracy over the seeds against rounds, a panel a head; dashed: with local logit adjustment."""
    colours = dict(zip(NORMS, ("#777777", "#d9822b", "#2b6cb0"), strict=True))
    figure, axes = plt.subplots(1, len(HEADS), figsize=(10, 3.6), sharey=True, layout="constrained")
    for axis, head in zip(axes, HEADS, strict=True):
        for norm, adjusted in product(NORMS, (False, True)):
            curve = 100 * curves[head, norm, adjusted].mean(0)
            label = f"{norm} norm" if not adjusted else None
            axis.plot(range(1, len(curve) + 1), curve, color=colours[norm], ls="--" if adjusted else "-", label=label)
        axis.set(title=f"{head} head", xlabel="round")
        axis.grid(alpha=0.25, lw=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test accuracy (%)")
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"Ten clients, Dirichlet({alpha:g}); dashed: adjusted by the client's class counts", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Run every head and norm, without and with adjustment; print the last accuracies, save the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="folder of the figure")
    parser.add_argument("--alpha", type=float, default=0.1, help="of the Dirichlet distribution; smaller: more skewed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of data, division and weights")
    parser.add_argument("--quick", action="store_true", help="one round, one seed")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    rounds, seeds = (1, arguments.seeds[:1]) if arguments.quick else (20, arguments.seeds)
    curves = {}
    print(f"test accuracy (%) after {rounds} rounds, alpha {arguments.alpha:g}, mean of {len(seeds)} seeds")
    print(f"{'head':8}{'norm':8}{'cross-entropy':>15}{'adjusted':>10}")
    for head, norm in product(HEADS, NORMS):
        for adjusted in (False, True):
            settings = {"adjusted": adjusted, "alpha": arguments.alpha, "rounds": rounds}
            found = [list(federated_averaging(head, norm, seed=seed, **settings)) for seed in seeds]
            curves[head, norm, adjusted] = torch.tensor(found)
        plain, other = (100 * float(curves[head, norm, adjusted][:, -1].mean()) for adjusted in (False, True))
        print(f"{head:8}{norm:8}{plain:>15.1f}{other:>10.1f}")
    path = arguments.out / "federated.png"
    draw(curves, arguments.alpha, path)
    print(f"figure: {path}")


if __name__ == "__main__":
    main()
