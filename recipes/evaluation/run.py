"""An evaluation from the command line to its folder: each part is saved as soon as it is done."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from recipes.core.errors import UserError
from recipes.core.files import environment, locked
from recipes.data.load import check_set
from recipes.evaluation.evaluations import PARTS
from recipes.evaluation.plots import draw
from recipes.evaluation.presets import PRESETS, NotHere, Settings
from recipes.evaluation.results import About, Damaged, Result, digest, plain
from recipes.evaluation.run_under_test import SPLITS, Subject


def assess(
    run: Path,
    settings: Settings,
    *,
    parts: Sequence[str] = tuple(PARTS),
    checkpoint: str = "last",
    split: str = "test",
    out: str | None = None,
    device: str = "auto",
    fresh: bool = False,
    command: Sequence[str] = (),
    quiet: bool = False,
) -> tuple[Result, Path]:
    """Evaluate one run part by part, each saved as soon as it is done; the result and its folder.

    Raises:
        UserError: no finished run, a result of other settings in the way, another evaluation at work on it, or a part
            that could not be done.
    """
    subject = Subject.open(run, checkpoint=checkpoint, device=device, seed=settings.seed, split=split)
    settings = replace(settings, preset=settings.preset.for_images(*subject.shape[1:]))
    target = subject.held_out().target
    there, classes = len(target), len(target.unique())
    if settings.attacked is not None and not classes <= settings.attacked <= there:
        raise UserError(
            f"--attacked {settings.attacked}: {run} has {there} {split} images of {classes} classes, so {classes} "
            f"(one of each) to {there}"
        )
    if subject.config.data.name in (settings.sets or ()):
        print(f"note: --sets {subject.config.data.name} is the run's own data: left out", file=sys.stderr)
    if checkpoint == "last" and not (run / "summary.json").is_file():
        print(f"note: {run} is not finished: what is evaluated is its newest checkpoint", file=sys.stderr)
    folder = folder_in(run, out or folder_name(checkpoint, split))
    with locked(folder) as held:  # two at once would each write the file without the other's parts
        if held is None:
            raise UserError(f"another evaluation is writing to {folder}: wait for its end, or --out NAME")
        result = begun(folder, about(subject, settings), fresh=parts if fresh else ())
        add_parts(result, subject, settings, parts, folder, command=command, quiet=quiet)
        draw(folder / "figures", result, parts, title=run.name)
    return result, folder


def folder_name(checkpoint: str, split: str) -> str:
    """Where in its run an evaluation lies: robustness, and after it what is not the last checkpoint, the test part."""
    rest = [word for word, usual in ((checkpoint, "last"), (split, "test")) if word != usual]
    return "-".join(["robustness", *rest])


def folder_in(run: Path, name: str) -> Path:
    """The folder of a run in which an evaluation lies or is to lie.

    Raises:
        UserError: it would lie elsewhere, or there is something else of that name.
    """
    check_name(name)
    folder = run / name
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else {name} if folder.exists() else set()
    if there and not there & {"results.json", "lock"}:  # the lock is there from the start on
        raise UserError(f"--out {name}: {folder} is there and is no evaluation; choose another name")
    return folder


def check_name(name: str) -> None:
    """Refuse what is no name of a folder inside a run."""
    if name in ("", ".", "..") or Path(name).name != name:
        raise UserError(f"--out {name!r}: must be the name of a folder inside the run, such as robustness-2")


def add_parts(
    result: Result,
    subject: Subject,
    settings: Settings,
    parts: Sequence[str],
    folder: Path,
    *,
    command: Sequence[str],
    quiet: bool,
) -> None:
    """The parts that the result has not yet, each written as soon as it is done; one that fails keeps none back."""
    made_by, failed = environment(command), []
    if not quiet:
        print(f"evaluating {subject.run}, checkpoint {subject.checkpoint}: {', '.join(parts)}", flush=True)
    bar = tqdm(parts, unit="part", disable=True if quiet else None)
    for name in bar:
        bar.set_description(name)
        if name in result.parts:
            continue
        start = time.perf_counter()
        if bar.disable and not quiet:
            print(f"{name:<14}", end="", flush=True)
        result.skipped.pop(name, None)
        try:
            found, warnings = PARTS[name](subject, settings)
        except NotHere as reason:
            result.skipped[name] = str(reason)
        except (ValueError, TypeError, RuntimeError) as error:
            failed.append(f"part {name}: {' '.join(str(error).split())}")
        else:
            result.parts[name], result.commits[name] = plain(found, name), made_by["git_commit"]
            result.environment = made_by
            result.warnings += [f"{name}: {warning}" for warning in warnings]
        result.write(folder)
        if bar.disable and not quiet:
            print(f"{time.perf_counter() - start:6.0f} s", flush=True)
    if failed:
        raise UserError(f"{subject.run}, {'; '.join(failed)}")


def about(subject: Subject, settings: Settings) -> About:
    """What is evaluated, and how."""
    config = subject.config
    return About(
        run=subject.run.name,
        recipe=config.recipe,
        data=config.data.name,
        backbone=config.model.backbone,
        run_seed=config.seed,
        checkpoint=subject.checkpoint,
        checkpoint_sha256=digest(subject.run / "checkpoints" / f"{subject.checkpoint}.pt"),
        preset=settings.preset.name,
        epsilon=settings.epsilon,
        norm=settings.norm,
        seed=settings.seed,
        sets=settings.sets,
        split=subject.split,
        image_share=settings.preset.share,
        attacked=settings.attacked,
    )


def begun(folder: Path, what: About, *, fresh: Sequence[str] = ()) -> Result:
    """The result in `folder` to go on with, less the parts to be done afresh, or a new one.

    Raises:
        UserError: there is one of another checkpoint or other settings, or a damaged one, and nothing is to be done
            afresh; or one of another version.
    """
    path = folder / "results.json"
    if not path.exists():
        return Result(what, {})
    try:
        found = Result.read(path)
    except Damaged:
        if fresh:
            return Result(what, {})
        raise
    for key, value in asdict(what).items():
        was = getattr(found.about, key)
        if was != value and key != "run":
            if fresh:
                return Result(what, {})
            raise UserError(
                f"{path} was made with {key}={was!r}, now it is {value!r}: --out NAME keeps both, --fresh replaces it"
            )
    for part in fresh:
        found.parts.pop(part, None)
        found.warnings = [warning for warning in found.warnings if not warning.startswith(f"{part}: ")]
    return found


def number(text: str) -> float:
    """A number, also written as a fraction: 8/255."""
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except ZeroDivisionError:
        raise ValueError(f"{text} divides by zero") from None


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would leave the process."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: an unknown option, or a value that it cannot have.
    """
    parser = _Parser(prog="robustness.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="*", type=Path, help="run folders; default: the newest finished one under runs/")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="full", help="default: full")
    parser.add_argument(
        "--quick", action="store_const", const="quick", dest="preset", help="the same as --preset quick"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="a comma between them; default: %(default)s")
    parser.add_argument("--checkpoint", default="last", help="last, onset, best or previous; default: last")
    parser.add_argument("--split", choices=tuple(SPLITS), default="test", help="images to evaluate on; with val no "
                        "test image is looked at; default: test")  # fmt: skip
    parser.add_argument("--epsilon", type=number, default=None, help="radius of the attacks, e.g. 8/255; default: "
                        "4/255 for linf, 0.5 for l2, in units of [0, 1]")  # fmt: skip
    parser.add_argument("--norm", choices=("linf", "l2"), default="linf", help="of the attacks; default: linf")
    parser.add_argument("--attacked", type=int, metavar="N", help="images that the attacks are run on; default: the "
                        "preset's number")  # fmt: skip
    parser.add_argument("--sets", help="image sets for OOD and transfer, a comma between them, torchvision.NAME too; "
                        "default: those at hand")  # fmt: skip
    parser.add_argument("--root", type=Path, default=Path("data"), help="where those sets lie; default: data")
    parser.add_argument("--seed", type=int, default=0, help="of every draw; default: 0")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...; default: auto")
    parser.add_argument("--out", help="name of the folder inside the run; default: robustness[-CHECKPOINT][-val]")
    parser.add_argument("--fresh", action="store_true", help="do the parts anew; made with other settings or "
                        "damaged, all is replaced")  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="print the table alone")
    args = parser.parse_args(argv)
    args.parts = [part.strip() for part in args.parts.split(",")]
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        raise UserError(f"--parts {unknown[0]} is unknown: one of {', '.join(PARTS)}")
    args.sets = None if args.sets is None else tuple(name.strip() for name in args.sets.split(","))
    for name in args.sets or ():
        check_set("--sets ", name)
    if args.out is not None:
        check_name(args.out)
    return args
