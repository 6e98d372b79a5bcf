"""Speed of every corruption, and agreement with the numpy package imagecorruptions.

Speed: images a second and type, all five severities, at 28x28 gray, 32x32 RGB (small constants) and 224x224 RGB
(ImageNet's). Against imagecorruptions (imagecorruptions-imaug; skipped where it is not installed), at 32x32 RGB, its
smallest size, with its ImageNet constants: time of both, and over images and severities
  correlation   of the two effects (corrupted less clean), all values; types with random numbers draw other ones
  psnr          of ours against theirs, in dB; both cut off to 8 bits
  mean, std     of either effect

    python benchmarks/corruptions.py [--rounds 10]
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

if __package__ in (None, ""):  # run as a script: import from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import harness
from ncreg.robustness.corruptions import CORRUPTIONS, corrupt

GOALS = [
    "at least 2,000 images a second on one core at 28x28, over all types and severities",
    "types without random numbers agree with imagecorruptions within 8-bit rounding",
]
SEVERITIES = range(1, 6)


def pictures(count: int, channels: int, side: int) -> Tensor:
    """Smooth random images over the whole range, on the 8-bit grid."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, channels, max(side // 4, 2), max(side // 4, 2), generator=g)
    x = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return ((x - low) / (high - low) * 255).round() / 255


def all_severities(images: Tensor, name: str, table: Any) -> Callable[[], None]:
    """One contender: a type at severities 1 to 5."""

    def run() -> None:
        for severity in SEVERITIES:
            corrupt(images, name, severity, constants=table)

    return run


def speed(count: int, channels: int, side: int, table: Any, args: Any) -> dict[str, Any]:
    """Images a second of every type, and over all of them."""
    images = pictures(count, channels, side).to(args.device)
    contenders = {name: all_severities(images, name, table) for name in CORRUPTIONS}
    timed = harness.race(contenders, baseline="gaussian_noise", rounds=args.rounds, warmup=1, device=args.device)
    seconds = {name: found["seconds"]["median"] for name, found in timed.items()}
    calls = count * len(SEVERITIES)
    return {
        "setting": f"{channels}x{side}x{side}, {table} constants, {count} images",
        "images_per_second": calls * len(CORRUPTIONS) / sum(seconds.values()),
        "images_per_second_by_type": {name: calls / taken for name, taken in seconds.items()},
        "contenders": timed,
    }


def agreement(theirs: Callable[..., np.ndarray], args: Any, count: int = 100) -> dict[str, Any]:
    """Time and agreement a type, against the loop over images."""
    images = pictures(count, 3, 32)
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    clean, found = pixels / 255, {}
    for name in CORRUPTIONS:

        def loop(name: str = name) -> np.ndarray:
            return np.stack([[theirs(image, s, name) for image in pixels] for s in SEVERITIES])

        np.random.seed(0)
        contenders: dict[str, Callable[[], Any]] = {
            "ours": all_severities(images, name, "imagenet"),
            "imagecorruptions": loop,
        }
        timed = harness.race(contenders, baseline="imagecorruptions", rounds=max(2, args.rounds // 3), warmup=1)
        other = loop() / 255
        stack = torch.stack([corrupt(images, name, s, constants="imagenet") for s in SEVERITIES])
        mine = np.floor(stack.permute(0, 1, 3, 4, 2).double().numpy() * 255 + 1e-3) / 255
        effects = mine - clean, other - clean
        error = float(((mine - other) ** 2).mean())
        found[name] = {
            "correlation": float(np.corrcoef(effects[0].ravel(), effects[1].ravel())[0, 1]),
            "psnr": float(10 * np.log10(1 / error)) if error else None,  # None: equal
            "largest_difference": float(np.abs(mine - other).max()),
            "mean": [float(effect.mean()) for effect in effects],
            "std": [float(effect.std()) for effect in effects],
            "time_ratio": timed["ours"]["ratio"],
        }
    return {"setting": "3x32x32, imagenet constants, against imagecorruptions", "agreement": found}


def main() -> None:
    """Time, compare, save."""
    args = harness.parser(__doc__ or "", rounds=10).parse_args()
    torch.set_num_threads(args.threads)
    settings = [
        speed(512, 1, 28, "small", args),
        speed(256, 3, 32, "small", args),
        speed(4, 3, 224, "imagenet", args),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from imagecorruptions import corrupt as theirs
        except ImportError:
            print("imagecorruptions is not installed: agreement is left out")
        else:
            settings.append(agreement(theirs, args))
    path = harness.save("corruptions", settings, goals=GOALS, device=args.device, out=args.out)
    for entry in settings:
        print(entry["setting"], f"{entry['images_per_second']:.0f} images/s" if "images_per_second" in entry else "")
    print(path)


if __name__ == "__main__":
    main()
