"""A small net on digits, and what the attacks make of it."""

import pytest
import torch
from adversarial_cases import EPS, digits
from torch import nn

from ncreg.robustness import evaluate_adversarial


@pytest.fixture(scope="session")
def net():
    """A small convolutional net on digits, trained on noisy images so that attacks neither fail nor win outright."""
    images, target = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()]
        made = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))
        optimizer = torch.optim.Adam(made.parameters(), 3e-3)
        for _ in range(250):
            chosen = torch.randint(0, 1500, (128,))
            noisy = (images[chosen] + 0.1 * torch.randn(128, 1, 8, 8).sign()).clamp(0, 1)
            optimizer.zero_grad()
            nn.functional.cross_entropy(made(noisy), target[chosen]).backward()
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return made.eval()


@pytest.fixture(scope="session")
def batch():
    images, target = digits()
    return images[1500:1700], target[1500:1700]


@pytest.fixture(scope="session")
def few(batch):
    return batch[0][:60], batch[1][:60]


@pytest.fixture(scope="session")
def report(net, few):
    return evaluate_adversarial(net, *few, epsilon=EPS)
