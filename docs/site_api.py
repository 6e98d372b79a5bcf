"""The API pages of the site: which names are public, and the directives that show their docstrings.

A package's `__all__` says what is public in it; a module without one gives its functions, classes and documented
constants without underscore. Each name is shown once, on the page of the first module of `MODULES` that has it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parents[1]
MODULES = (
    "ncreg.frames",
    "ncreg.heads",
    "ncreg.norms",
    "ncreg.models",
    "ncreg.losses",
    "ncreg.functional",
    "ncreg.metrics",
    "ncreg.theory",
    "ncreg.optim",
    "ncreg.tpt",
    "ncreg.averaging",
    "ncreg.checkpoint",
    "ncreg.pretrained",
    "ncreg.quantization",
    "ncreg.transferability",
    "ncreg.robustness.adversarial",
    "ncreg.robustness.corruptions",
    "ncreg.robustness.ood",
    "ncreg.robustness.calibration",
    "ncreg.robustness.transfer",
    "ncreg.robustness",
    "ncreg.integrations",
    "ncreg.integrations.timm",
    "ncreg.integrations.lightning",
    "ncreg.integrations.transformers",
    "ncreg.distributed",
    "ncreg.numerics",
    "ncreg",
)


@dataclass(frozen=True)
class PublicName:
    """A public name, as it is imported."""

    path: str
    entry: str
    """The path of the entry that shows it, which may be that of another module."""
    is_here: bool
    """Whether that entry is on its own module's page."""
    summary: str


@functools.cache
def package() -> griffe.Module:
    """The package as written, not imported."""
    return griffe.load("ncreg", search_paths=[str(ROOT)], docstring_parser="google", resolve_aliases=True)


def module_at(dotted: str) -> griffe.Module:
    """A module by its name."""
    return package() if dotted == "ncreg" else package()[dotted.removeprefix("ncreg.")]


def members_of(module: griffe.Module) -> dict[str, griffe.Object | griffe.Alias]:
    """The public names of a module and what they stand for, without its submodules."""
    if module.exports is None:
        own = {name: member for name, member in module.members.items() if not (name[0] == "_" or member.is_alias)}
        return {name: found for name, found in own.items() if found.is_class or found.is_function or found.docstring}
    named = {str(name): member_at(f"{module.path}.{name}") for name in module.exports}
    return {name: found for name, found in named.items() if not found.is_module}


def member_at(path: str) -> griffe.Object | griffe.Alias:
    """What Python finds under a path. Where a submodule and an imported function have one name, it is the function."""
    parent, _, name = path.rpartition(".")
    module = module_at(parent)
    source = module.imports.get(name, path)
    return member_at(source) if module[name].is_module and source != path else module[name]


@functools.cache
def public_names() -> dict[str, list[PublicName]]:
    """Module → its public names."""
    homes: dict[str, str] = {}
    found: dict[str, list[PublicName]] = {}
    for dotted in MODULES:
        module, found[dotted] = module_at(dotted), []
        for name, member in members_of(module).items():
            is_here = member.canonical_path not in homes
            home = homes.setdefault(member.canonical_path, member.path)
            text = member.docstring.value.partition("\n\n")[0].replace("\n", " ") if member.docstring else ""
            found[dotted].append(PublicName(f"{dotted}.{name}", home, is_here, text))
    return found


def pages() -> dict[str, str]:
    """The text of each API page by its path inside the site."""
    texts = {"api/index.md": index()}
    for dotted, names in public_names().items():
        if dotted == "ncreg":
            continue
        lines = [f"# {dotted}", f"::: {dotted}\n    options: {{members: false, show_root_heading: false}}"]
        lines += [f"::: {name.entry}" for name in names if name.is_here]
        if others := [name for name in names if not name.is_here]:
            lines += [f"## Also in `{dotted}`", listing(others)]
        texts[f"api/{dotted}.md"] = "\n\n".join(lines) + "\n"
    return texts


def index() -> str:
    """The first page: what `ncreg` itself hands on, then the modules."""
    lines = ["# API", "What `import ncreg` gives, and below it every module with its public names.", "## ncreg"]
    lines.append(listing(public_names()["ncreg"]))
    for dotted, names in public_names().items():
        if dotted != "ncreg":
            lines += [f"## [{dotted}]({dotted}.md)", listing(names)]
    return "\n\n".join(lines) + "\n"


def listing(names: list[PublicName]) -> str:
    """A line a name, linked to where it is shown."""
    return "\n".join(f"- [`{name.path.rpartition('.')[2]}`][{name.entry}] {name.summary}" for name in names)
