"""Models, images and attacks that several tests of this folder use."""

import numpy as np
import torch
from sklearn.datasets import load_digits

from ncreg.robustness import (
    autoattack,
    evaluate_adversarial,
    fgsm,
    pgd,
    random_search,
    robustness_curve,
)

EPS = 0.1


SCALES = (1e-3, 1e-2, 10.0, 1e3)


def digits():
    data = load_digits()
    return torch.tensor(data.images / 16, dtype=torch.float32)[:, None], torch.tensor(data.target)


def affine(seed=0, classes=5, shape=(2, 3, 4), dtype=torch.float64):
    """Weights, a model over images in the middle of [0, 1], and a batch with its own predictions as target."""
    generator = torch.Generator().manual_seed(seed)
    features = int(np.prod(shape))
    weight = torch.randn(classes, features, generator=generator, dtype=dtype)
    images = 0.4 + 0.2 * torch.rand(16, *shape, generator=generator, dtype=dtype)

    def model(x):
        return (x - 0.5).flatten(1) @ weight.T

    return weight, model, images, model(images).argmax(1)


ATTACKS = {
    "fgsm": fgsm,
    "pgd": lambda *given, **more: pgd(*given, **{"steps": 5, **more}),
    "random_search": lambda *given, **more: random_search(*given, **{"queries": 20, **more}),
    "autoattack": lambda *given, **more: autoattack(*given, **{"steps": 5, "queries": 20, **more}),
    "curve": lambda *given, epsilon, **more: robustness_curve(*given, [epsilon], **{"steps": 3, **more}),
    "evaluate": lambda *given, **more: evaluate_adversarial(*given, **{"autoattack": False, **more}),
}
