"""scikit-learn's digits at 32×32, as tensors and as a folder of images; what the scripts beside this one train on."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import TensorDataset

TEST_SIZE = 360


def split(train_size: int) -> tuple[list[int], list[int], np.ndarray, np.ndarray]:
    """Rows of the training and the test images, all images (1797, 8, 8) in [0, 1], all labels."""
    images, target = load_digits(return_X_y=True)
    sizes = {"train_size": train_size, "test_size": TEST_SIZE}
    train, test = train_test_split(range(len(target)), **sizes, stratify=target, random_state=0)
    return train, test, images.reshape(-1, 8, 8) / 16, target


def datasets(train_size: int) -> tuple[TensorDataset, TensorDataset]:
    """Training and test images (1, 32, 32), standardised, with labels."""
    train, test, images, target = split(train_size)
    tensor = torch.tensor(images, dtype=torch.float32)[:, None]
    tensor = F.interpolate((tensor - tensor.mean()) / tensor.std(), size=32, mode="bilinear")
    labels = torch.tensor(target)
    return TensorDataset(tensor[train], labels[train]), TensorDataset(tensor[test], labels[test])


def write_folder(root: Path, train_size: int) -> Path:
    """root/train/CLASS/ROW.png and root/validation/CLASS/ROW.png, as timm reads them."""
    train, test, images, target = split(train_size)
    for name, rows in {"train": train, "validation": test}.items():
        for row in rows:
            path = root / name / str(target[row]) / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            grey = Image.fromarray((255 * images[row]).round().astype(np.uint8))
            grey.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR).save(path)
    return root


def accuracy(model: torch.nn.Module, data: TensorDataset) -> float:
    """Accuracy in [0, 1] in eval mode."""
    images, labels = data.tensors
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).float().mean())


def report(onset: int | None, history: list[dict[str, float]], test_accuracy: float) -> None:
    """Print both ends of the terminal phase."""
    print(f"zero training error at epoch {onset}, trained to epoch {len(history)}")
    ends = {"at zero error": onset, "at the end": len(history)}
    for name, row in ((name, history[epoch - 1]) for name, epoch in ends.items() if epoch):
        print(f"{name:14} train accuracy {100 * row['accuracy']:.2f} %, NC1 {row['nc1']:.6e}, NC3 {row['nc3']:.6f}")
    print(f"test accuracy {100 * test_accuracy:.2f} %")
