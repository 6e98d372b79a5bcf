"""A loss that is added stands in every list that names losses: the package, the functions, the recipes, the page."""

import importlib
import inspect
import pkgutil
import re
from functools import partial
from pathlib import Path

import pytest
import torch

import ncreg
from ncreg import functional, losses
from recipes.training import loss_terms

CLASSES = {name: getattr(losses, name) for name in losses.__all__ if name.endswith("Loss")}
TAKE_THE_HEAD = {name for name, loss in CLASSES.items() if "head" in loss.consumes}
OWN_LOOP = {"SampledCrossEntropyLoss", "ShardedCrossEntropyLoss"}  # no recipe's, as docs/many_classes.md says


def terms():
    """The modules of the losses that a configuration can name."""
    made = loss_terms._losses(torch.ones(3), 4)
    return {name: make.func if isinstance(make, partial) else make for name, make in made.items()}


def takes(loss, argument):
    return argument in inspect.signature(loss).parameters


def public(kind):
    """Public functions or classes that the modules of losses define."""
    names = [module.name for module in pkgutil.iter_modules(losses.__path__) if not module.name.startswith("_")]
    modules = [importlib.import_module(f"ncreg.losses.{name}") for name in names]
    found = ((name, item, module) for module in modules for name, item in inspect.getmembers(module, kind))
    return {name for name, item, module in found if item.__module__ == module.__name__ and not name.startswith("_")}


def test_every_module_is_in_its_package():
    assert public(inspect.isclass) - {"ClassMeanMemory"} == set(CLASSES)


@pytest.mark.parametrize("name", [*CLASSES, "ClassMeanMemory"])
def test_help_of_a_module_names_each_argument_of_its_own(name):
    explained = re.findall(r"^    (\w+): \S", inspect.getdoc(getattr(losses, name)), re.MULTILINE)
    assert explained == list(inspect.signature(getattr(losses, name)).parameters)


def test_every_function_with_a_source_is_in_functional():
    named = {name for name in public(inspect.isfunction) if name.endswith(("_loss", "_cosine", "_cross_entropy"))}
    assert len(named) >= len(CLASSES) and named <= set(functional.__all__)


def test_the_package_offers_all_that_take_no_head():
    assert set(CLASSES) - TAKE_THE_HEAD == {name for name in ncreg.__all__ if name.endswith("Loss")}


def test_a_configuration_can_name_every_loss_but_two():
    assert set(CLASSES.values()) - set(terms().values()) == {CLASSES[name] for name in OWN_LOOP}


def test_losses_that_weigh_classes_are_those_that_take_weights():
    weigh = {name for name, loss in terms().items() if takes(loss, "class_weight") or takes(loss, "weight")}
    assert weigh == set(loss_terms.WEIGHABLE)


@pytest.mark.parametrize("name", CLASSES)
def test_the_page_has_a_row_for_it(name):
    page = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
    assert any(row.startswith("|") and f"`{name}" in row for row in page.splitlines())
