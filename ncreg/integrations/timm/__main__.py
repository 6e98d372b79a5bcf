"""Run a script of timm's with ncreg's names known: `python -m ncreg.integrations.timm validate.py ...`."""

import runpy
import sys
from pathlib import Path

import ncreg.integrations.timm as _  # noqa: F401  registers names, replaces functions


def main(argv: list[str]) -> None:
    """Run `argv[0]` with the rest as its arguments, as `python` would."""
    if not argv or not Path(argv[0]).is_file():
        raise SystemExit(f"usage: python -m ncreg.integrations.timm SCRIPT [ARGUMENTS]; no script at {argv[:1]}")
    sys.argv = argv
    sys.path[0] = str(Path(argv[0]).resolve().parent)
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
