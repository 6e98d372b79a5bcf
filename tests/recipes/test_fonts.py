"""Class names in any script are drawn without a missing glyph, or replaced by the number of the class."""

import warnings
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib import font_manager

from recipes.core.fonts import _font_with, _letters, drawable
from recipes.core.plot_style import STYLE
from recipes.evaluation.simplex_plot import View, corners, draw

STIX = Path(matplotlib.get_data_path(), "fonts", "ttf", "STIXGeneral.ttf")


def drawn(names, path):
    shown, style = drawable(names, STYLE)
    with warnings.catch_warnings(), plt.rc_context(style):
        warnings.simplefilter("error")  # matplotlib warns of every glyph that is missing
        figure = plt.figure()
        for row, name in enumerate(shown):
            figure.text(0.1, 0.1 + 0.08 * row, name)
        figure.savefig(path)
        plt.close(figure)
    return shown, style["font.family"]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_names_in_many_scripts_leave_no_missing_glyph(suffix, tmp_path):
    names = ["dog", "лиса", "αλεπού", "كلب", "狐狸", "여우", "हाथी", "🦊", "tab\tname", "", "\U00100000"]
    shown, _ = drawn(names, tmp_path / f"names.{suffix}")
    assert shown[:3] == names[:3] and shown[8:] == ["class 8", "class 9", "class 10"]
    for number, (name, seen) in enumerate(zip(names, shown, strict=True)):
        assert seen in (name, f"class {number}")


@pytest.fixture
def installed(monkeypatch):
    """Letters that a font besides matplotlib's default has, made known to matplotlib whatever its list of fonts holds.

    That list is cached for a user, and an old cache may lack even the fonts that come with matplotlib.
    """
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    font_manager.fontManager.addfont(STIX)
    yield _letters(str(STIX)) - _letters(font_manager.findfont("DejaVu Sans"))
    _font_with.cache_clear()


def check_lending(letters, folder):
    _font_with.cache_clear()
    name = "".join(letter for letter in sorted(letters) if letter.isalpha())[:5]
    assert len(name) == 5
    shown, fonts = drawn([name], folder / "names.png")
    assert shown == [name] and fonts[0] == "DejaVu Sans" and len(fonts) > 1


def test_another_installed_font_lends_its_letters(installed, tmp_path):
    check_lending(installed, tmp_path)


def test_the_order_in_which_fonts_are_found_decides_nothing(installed, tmp_path, monkeypatch):
    """A family has files of several weights, and the bold ones may lack letters."""
    fonts = sorted(font_manager.fontManager.ttflist, key=lambda font: font.fname)
    for order in (fonts, fonts[::-1]):
        monkeypatch.setattr(font_manager.fontManager, "ttflist", order)
        font_manager.fontManager.addfont(STIX)  # matplotlib forgets what it found in the list of before
        check_lending(installed, tmp_path)


def test_names_of_latin_letters_change_nothing():
    assert drawable(["T-shirt/top", "Ankle boot"], STYLE) == (["T-shirt/top", "Ankle boot"], STYLE)


def test_the_simplex_view_names_classes_in_any_script(tmp_path):
    names = ["狐狸", "dog", "हाथी"]
    edge = corners(3)
    view = View("the end", np.arange(3), edge, edge, edge, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure, _ = draw([view], names)
        figure.savefig(tmp_path / "view.png")
    plt.close(figure)
    assert {text.get_text() for panel in figure.axes for text in panel.texts} == set(drawable(names, STYLE)[0])
