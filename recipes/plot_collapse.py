"""Draw the collapse of a run: features and class means on the simplex, through training.

    python recipes/plot_collapse.py RUN [RUN ...] [--part train] [--images 600]

Features of the untrained model and of every checkpoint are stored in RUN/collapse/features-PART.npz; the figure
RUN/collapse/simplex-PART.png (and .svg) is made from them, its points are in view-PART.json. Docs: docs/compare.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import matplotlib.pyplot as plt
import torch

from ncreg.checkpoint import load_checkpoint, load_classifier
from ncreg.models import Classifier
from recipes.core.cli import parse
from recipes.core.config import TrainConfig
from recipes.core.errors import UserError
from recipes.data.load import Dataset, load
from recipes.data.split import Split, stratified
from recipes.evaluation.simplex_plot import Snapshot, draw, project, save, stored
from recipes.training.build import build_model, class_vectors, image_size
from recipes.training.metrics import BATCH
from recipes.training.run_dir import RunDir

WORDS = {"onset": "zero error", "best": "best validation", "last": "end"}


def checkpoints(run: Path) -> list[tuple[int, str, Path]]:
    """Epoch, name and file of the run's checkpoints, the earliest first; of equal epochs the end, then zero error."""
    found = []
    for path in (run / "checkpoints").glob("*.pt"):
        if path.stem not in ("previous", "coming"):
            found.append((int(load_checkpoint(path)["epoch"]), path.stem, path))
    rank = {"last": 0, "onset": 1}
    found.sort(key=lambda item: (item[0], rank.get(item[1], 2)))
    return [item for place, item in enumerate(found) if place == 0 or item[0] != found[place - 1][0]]


def models(run: Path, config: TrainConfig, data: Dataset) -> Iterator[tuple[str, Classifier]]:
    """The untrained model, rebuilt from its seed, then one a checkpoint."""
    if not config.model.pretrained:
        yield "epoch 0", build_model(config.model, data, seed=config.seed)
    for epoch, name, path in checkpoints(run):
        yield f"epoch {epoch}" + (f" ({WORDS[name]})" if name in WORDS else ""), load_classifier(path)


@torch.inference_mode()
def snapshot(title: str, model: Classifier, split: Split) -> Snapshot:
    """Eval-mode features of the images."""
    model.eval()
    features = torch.cat([model(images, with_features=True).features for images, _ in split.in_batches(BATCH)])
    weight = class_vectors(model).detach()
    return Snapshot(title, features.float().numpy(), split.target.numpy(), weight.float().numpy())


def snapshots(run: Path, *, part: str, images: int) -> tuple[list[Snapshot], tuple[str, ...]]:
    """A run's snapshots, read from its folder or made and stored there, and the names of its classes.

    Raises:
        UserError: no run folder, no checkpoint, or too few images.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is no run folder: it has no config.yaml")
    config = parse(["--config", str(run / "config.yaml")])
    data = load(
        config.data,
        seed=config.seed,
        image_size=partial(image_size, backbone=config.model.backbone, requested=config.data.image_size),
    )
    path = run / "collapse" / f"features-{part}.npz"
    wanted = [f"epoch {epoch}" for epoch, _, _ in checkpoints(run)]
    if not wanted:
        raise UserError(f"{run} has no checkpoint yet")
    split: Split = getattr(data, part)
    split = stratified(split, min(images, len(split)), seed=config.seed, what="--images")
    if path.exists():
        found = stored(path)
        there = [item.title.split(" (")[0] for item in found if item.title != "epoch 0"]
        if there == wanted and len(found[0].target) == len(split):
            return found, data.class_names
    found = [snapshot(title, model, split) for title, model in models(run, config, data)]
    save(path, found)
    return found, data.class_names


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0, or 2 with one line when something is to be put right."""
    parser = argparse.ArgumentParser(
        prog="plot_collapse.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of recipes/train.py")
    parser.add_argument("--part", choices=("train", "val", "test"), default="train", help="default: train")
    parser.add_argument("--images", type=int, default=600, help="images shown, by class shares; default: 600")
    args = parser.parse_args(argv)
    try:
        for run in args.runs:
            found, names = snapshots(run, part=args.part, images=args.images)
            views = [project(item) for item in found]
            canvas, words = draw(views, names, title=run.name)
            for kind in ("png", "svg"):
                canvas.savefig(run / "collapse" / f"simplex-{args.part}.{kind}", dpi=130)
            plt.close(canvas)
            content = {"class_names": names, "views": [view.plain() for view in views]}
            RunDir(run / "collapse").write(f"view-{args.part}.json", content)
            print(f"{run / 'collapse' / f'simplex-{args.part}.png'}\n{words}")
    except (UserError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
