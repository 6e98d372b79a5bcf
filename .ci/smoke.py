"""What a clean installation of the wheel must do: `make release-check` runs it outside the repository.

python -I smoke.py VERSION
"""

import importlib.util
import sys
from importlib import import_module, metadata

import torch

import ncreg

MODULES = ("functional", "heads", "losses", "metrics", "models", "optim", "quantization", "robustness", "theory", "tpt")


def main(version: str) -> None:
    """Import what is public, swap a head, fit a little, fold."""
    assert "site-packages" in ncreg.__file__, ncreg.__file__
    assert ncreg.__version__ == metadata.version("ncreg") == version, ncreg.__version__
    assert not importlib.util.find_spec("recipes"), "the wheel holds the library alone"
    for module in (ncreg, *(import_module(f"ncreg.{name}") for name in MODULES)):
        missing = [name for name in getattr(module, "__all__", []) if not hasattr(module, name)]
        assert not missing, f"{module.__name__}: {missing}"
    torch.manual_seed(0)
    target = torch.arange(60) % 3
    images = torch.randn(60, 3, 32, 32) * 0.1 + target.view(-1, 1, 1, 1)
    model = ncreg.swap_head("test_resnet", "etf", num_classes=3)
    optimizer = torch.optim.SGD(ncreg.param_groups(model, weight_decay=5e-4), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    collapse = ncreg.NeuralCollapse(3, model.head.in_features, classifier=model.head)
    with torch.no_grad():
        logits, features = model.eval()(images, with_features=True)
    collapse.update(features, target)
    assert float(collapse.compute()["nc2_weight_equiangularity"]) < 1e-6
    folded = ncreg.fold(model, normalize="drop")
    assert torch.equal(folded(images).argmax(1), logits.argmax(1))
    print(f"ncreg {version} on Python {sys.version.split()[0]}, torch {torch.__version__}: the wheel works")


if __name__ == "__main__":
    main(sys.argv[1])
