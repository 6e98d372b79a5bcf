"""The characters of the study glyphs: which are told apart, which fonts are kept together, what a run reads."""

from pathlib import Path

import matplotlib
import numpy as np

from benchmarks.studies import glyphs

DEJAVU = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # it has all three scripts


def test_of_characters_drawn_alike_the_first_is_kept():
    faces = glyphs.faces_of(DEJAVU)
    latin, greek, cyrillic, other = map(ord, "A\u0391\u0410B")
    assert {"DejaVu Sans", "DejaVu Serif"} <= set(faces)
    assert glyphs.told_apart(faces, [latin, greek, cyrillic, other]) == [latin, other]
    assert glyphs.told_apart(faces, [cyrillic, other, latin]) == [cyrillic, other]


def test_a_character_stands_on_the_base_line_in_the_middle():
    file = DEJAVU / "DejaVuSans.ttf"
    rows, columns = np.nonzero(glyphs.drawn(file, ord("H")) > 127)
    assert rows.max() == glyphs.BASE_LINE - 1
    assert abs((columns.min() + columns.max()) / 2 - (glyphs.SIDE - 1) / 2) <= 1
    assert glyphs.drawn(file, ord(" ")) is None


def test_relatives_are_in_one_part():
    folders = [Path("fonts", name, "font.ttf") for group in glyphs.RELATIVES for name in group]
    parts = {path.parent.name: glyphs.part_of(path) for path in folders}
    assert all(len({parts[name] for name in group}) == 1 for group in glyphs.RELATIVES)
    assert glyphs.part_of(Path("elsewhere/noto/Other.otf")) == parts["noto"]


def test_a_run_reads_what_was_drawn(tmp_path):
    images = np.arange(2 * 3 * glyphs.SIDE**2, dtype=np.uint8).reshape(6, glyphs.SIDE, glyphs.SIDE)
    target = np.array([0, 0, 0, 1, 1, 1])
    parts = {
        f"{part}_{what}": value for part in glyphs.DRAWN for what, value in (("images", images), ("target", target))
    }
    np.savez(tmp_path / "few.npz", classes=np.array(["0041 a", "0042 b"]), **parts)
    found = glyphs.glyphs(str(tmp_path / "few.npz"))
    image, label = found["test"][4]
    assert np.array_equal(np.asarray(image), images[4]) and label == 1
    assert found["val"].classes == ["0041 a", "0042 b"] and len(found["train"]) == 6
