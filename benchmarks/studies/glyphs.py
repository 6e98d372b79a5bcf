"""Characters drawn from installed fonts: hundreds of classes, tested on fonts of other packages. Generated data.

    python benchmarks/studies/glyphs.py --out data/glyphs.npz     # draws them: a minute

With `data.name: benchmarks/studies/glyphs.py:glyphs` and `data.root: data/glyphs.npz` a run reads them. Letters and
digits of Latin, Greek and Cyrillic, 32 by 32 pixels, at one size on one base line. Of characters that many fonts draw
alike (Latin and Cyrillic a) the first is kept. Packages of one designer, or after one model (Arimo, Liberation Sans),
are in one part, so no font for the test is a relative of a font for training. The file holds the names of its fonts.

The study drew from these packages of Debian 12 (apt-get install fonts-NAME); others in the folder take part as well:
    arundina b612 beteckna cantarell clear-sans cmu comic-neue courier-prime crosextra-caladea crosextra-carlito
    croscore dejavu dosis dustin ebgaramond ecolier-court fanwood fantasque-sans femkeklaver firacode freefont-ttf
    gfs-didot gfs-neohellenic go hack inconsolata inter jetbrains-mono junicode jura karla kristi lato league-
    spartan liberation linex linuxlibertine lmodern lobstertwo monofur mononoki mplus nanum noto-core oldstandard
    open-sans paratype play quicksand roboto-slab roboto-unhinted rufscript sil-andika sil-charis sil-doulos sil-
    gentium-basic sora spleen stix symbola terminus-otb texgyre tuffy ubuntu-title unifont urw-base35 vollkorn
    yanone-kaffeesatz
"""

from __future__ import annotations

import argparse
import hashlib
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from fontTools.ttLib import TTFont, TTLibError  # type: ignore[import-untyped]
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Dataset

RANGES = ((0x30, 0x7F), (0xC0, 0x180), (0x370, 0x400), (0x400, 0x460))
LETTERS = {
    code for start, end in RANGES for code in range(start, end) if unicodedata.category(chr(code)) in {"Lu", "Ll", "Nd"}
}
SIDE, EM, BASE_LINE = 32, 21, 24
LEFT_OUT = ("smallcaps", "sample", "keyboard", "unifont", "spleen", "terminus", "babel", "math", "dingbat", "d050000")
RELATIVES = (  # folders of packages with fonts after one model, such as Helvetica and Times, or by one designer
    ("liberation", "croscore", "urw-base35", "freefont", "tex-gyre"),
    ("charis", "doulos", "andika", "gentium", "gentium-basic"),
    ("noto", "open-sans", "unhinted", "slab", "RobotoTTF"),
    ("stix", "stix-word"),
)
STYLES = ("Regular", "Bold", "Italic")
DRAWN = {"train": 36, "val": 8, "test": 12}
AT_LEAST = 200


class Glyphs(Dataset[tuple[Image.Image, int]]):
    """Images and their classes, as torchvision's sets give them."""

    def __init__(self, images: np.ndarray, target: np.ndarray, classes: list[str]) -> None:
        self.images, self.targets, self.classes = images, target.tolist(), classes

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.targets[index]


def glyphs(root: str) -> dict[str, Glyphs]:
    """The three parts of the file that this script wrote."""
    with np.load(root) as found:
        classes = found["classes"].tolist()
        return {part: Glyphs(found[f"{part}_images"], found[f"{part}_target"], classes) for part in DRAWN}


def faces_of(folder: Path) -> dict[str, list[tuple[Path, set[int]]]]:
    """Family → its files of the wanted styles, with the characters that they have."""
    faces: dict[str, list[tuple[Path, set[int]]]] = defaultdict(list)
    taken = set()
    for file in sorted(path for path in folder.rglob("*") if path.suffix in {".ttf", ".otf"}):
        try:
            with TTFont(file, lazy=True) as font:
                characters = set(font.getBestCmap() or ())
                names = font["name"]
                family, style = str(names.getBestFamilyName()), str(names.getBestSubFamilyName())
            ImageFont.truetype(str(file), EM)
        except (TTLibError, KeyError, OSError, AssertionError):  # broken, or of bitmaps
            continue
        left_out = any(word in family.lower() for word in LEFT_OUT) or len(LETTERS & characters) < AT_LEAST
        if style in STYLES and not left_out and (family, style) not in taken:
            taken.add((family, style))  # some families are there as TrueType and as OpenType
            faces[family].append((file, characters))
    return faces


def drawn(file: Path, character: int) -> np.ndarray | None:
    """The character, white on black; None where the font draws nothing."""
    image = Image.new("L", (SIDE, SIDE))
    font = ImageFont.truetype(str(file), EM, layout_engine=ImageFont.Layout.BASIC)
    ImageDraw.Draw(image).text((SIDE / 2, BASE_LINE), chr(character), fill=255, font=font, anchor="ms")
    pixels = np.asarray(image)
    return pixels if pixels.any() else None


def told_apart(faces: dict[str, list[tuple[Path, set[int]]]], codes: list[int], *, share: float = 0.2) -> list[int]:
    """The characters without those that more than `share` of the families draw like an earlier one."""
    alike, both = np.zeros((2, len(codes), len(codes)))
    for styles in faces.values():
        images = [drawn(styles[0][0], code) if code in styles[0][1] else None for code in codes]
        there = np.array([image is not None for image in images])
        pixels = np.stack([np.zeros((SIDE, SIDE)) if image is None else image for image in images])
        pixels = pixels.reshape(len(codes), -1).astype(np.float64) / 255
        squares = (pixels**2).sum(1)
        sums = squares[:, None] + squares[None]
        distance = (sums - 2 * pixels @ pixels.T) / np.where(sums > 0, sums, 1)
        pairs = there[:, None] & there[None]
        both += pairs
        alike += pairs & (distance < 0.03)
    kept: list[int] = []
    for row in range(len(codes)):
        if not any(alike[row, other] > share * both[row, other] for other in kept):
            kept.append(row)
    return [codes[row] for row in kept]


def part_of(file: Path) -> str:
    """The part of a font, by its folder, that is its package: more fonts on a machine move none to another part."""
    package = next((group[0] for group in RELATIVES if file.parent.name in group), file.parent.name)
    place = int(hashlib.sha256(package.encode()).hexdigest(), 16) % 100
    return "train" if place < 54 else "val" if place < 74 else "test"


def chosen(
    faces: dict[str, list[tuple[Path, set[int]]]], code: int, part: str, count: int
) -> Iterator[tuple[Path, np.ndarray]]:
    """`count` drawings of a character by the fonts of a part, in an order drawn for the character."""
    files = [file for styles in faces.values() for file, has in styles if code in has and part_of(file) == part]
    for place in np.random.default_rng(code).permutation(len(files)):
        image = drawn(files[place], code)
        if image is not None:
            yield files[place], image
            count -= 1
        if not count:
            return


def collect(folder: Path) -> dict[str, Any]:
    """Arrays of all parts; a character that a part has too few fonts for is left out."""
    faces = faces_of(folder)
    classes = []
    images: dict[str, list[np.ndarray]] = {part: [] for part in DRAWN}
    fonts: dict[str, set[str]] = {part: set() for part in DRAWN}
    for code in told_apart(faces, sorted(LETTERS)):
        found = {part: list(chosen(faces, code, part, count)) for part, count in DRAWN.items()}
        if any(len(found[part]) < count for part, count in DRAWN.items()):
            continue
        classes.append(f"{code:04x} {unicodedata.name(chr(code)).lower()}")
        for part, pairs in found.items():
            images[part].append(np.stack([image for _, image in pairs]))
            fonts[part] |= {file.name for file, _ in pairs}
    arrays: dict[str, Any] = {"classes": np.array(classes)}
    for part, count in DRAWN.items():
        arrays[f"{part}_images"] = np.concatenate(images[part])
        arrays[f"{part}_target"] = np.repeat(np.arange(len(classes)), count)
        arrays[f"{part}_fonts"] = np.array(sorted(fonts[part]))
    return arrays


def main() -> None:
    """Draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fonts", type=Path, default=Path("/usr/share/fonts"), help="folder of the fonts")
    parser.add_argument("--out", type=Path, default=Path("data/glyphs.npz"), help="file to write")
    args = parser.parse_args()
    arrays = collect(args.fonts)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out, **arrays)
    parts = [f"{part} {len(arrays[f'{part}_target'])} of {len(arrays[f'{part}_fonts'])} fonts" for part in DRAWN]
    print(f"{len(arrays['classes'])} classes; {', '.join(parts)}: {args.out}")


if __name__ == "__main__":
    main()
