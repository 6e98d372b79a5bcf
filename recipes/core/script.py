"""What the command lines of all scripts share: one-line errors, flags that also take true or false, suggestions."""

from __future__ import annotations

import argparse
import io
import os
import re
import select
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from recipes.core.errors import UserError
from recipes.core.memory import is_out_of_memory, keep_freed_memory, out_of_memory
from recipes.core.suggestions import did_you_mean

POINTER = "(--help lists the options)"
INTERRUPTED = 130
"""Exit code after Ctrl-C where nothing says how to go on: 128 and the number of SIGINT, as shells have it."""
READER_GONE = 141
"""Exit code where the output's reader ended first: 128 and the number of SIGPIPE, as shells have it."""
BOOLEANS = {"true": True, "false": False}
LESS_MEMORY = "fewer or smaller images at a time, --device cpu, or a machine with more"
WIDTH = 100
"""Columns of a help text."""


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would end the process, and says which option may have been meant.

    Args:
        prog: file name of the script.
        doc: docstring of the script, shown by --help.
        former: options that were renamed, each with its present name.
        settings: further arguments of argparse.ArgumentParser.
    """

    def __init__(self, prog: str, doc: str | None, *, former: Mapping[str, str] | None = None, **settings: Any) -> None:
        super().__init__(
            prog=prog, description=doc, formatter_class=wide_help, allow_abbrev=False, exit_on_error=False, **settings
        )
        self.former = dict(former or {})
        self.options = ["--help"]
        self.flags: list[str] = []

    def option(self, name: str, **settings: Any) -> None:
        """Add an option with a value; takes what `add_argument` takes."""
        self.options.append(name)
        self.add_argument(name, **settings)

    def flag(self, name: str, help: str) -> None:
        """Add an option that is false by default: `--name`, `--name true` and `--name=false` are understood."""
        self.flags.append(name)
        self.option(name, nargs="?", const=True, type=boolean, default=False, metavar="true|false", help=help)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The values of a command line.

        Raises:
            UserError: an unknown option, or a value that it cannot have.
        """
        try:
            args, rest = self.parse_known_args(join_flags(argv, self.flags))
        except argparse.ArgumentError as error:
            self.error(str(error))
        if rest:
            self.refuse(rest[0])
        for name, value in vars(args).items():
            if isinstance(value, Path):  # a shell puts the home folder in place of ~ in --out ~/x, not in --out=~/x
                setattr(args, name, Path(os.path.expanduser(value)))
        return args

    def refuse(self, word: str) -> NoReturn:
        """Raise the error for a word that the script does not know."""
        name = word.partition("=")[0]
        if name in self.former:
            raise UserError(f"{name} is called {self.former[name]} now")
        near = did_you_mean(name.lstrip("-"), [option.lstrip("-") for option in self.options], prefix="--")
        raise UserError(f"{word} is unknown{near if name.startswith('-') else ''} {POINTER}")

    def error(self, message: str) -> NoReturn:
        """Raise argparse's message as one line, with the choice that may have been meant."""
        wrong = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        near = did_you_mean(wrong[1], [name.strip(" '") for name in wrong[2].split(",")]) if wrong else ""
        raise UserError(f"{message}{near} {POINTER}")


def wide_help(prog: str) -> argparse.HelpFormatter:
    """Keeps the line breaks of a docstring."""
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=WIDTH)


def boolean(text: str) -> bool:
    """True or false.

    Raises:
        ArgumentTypeError: another word.
    """
    try:
        return BOOLEANS[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false") from None


def is_boolean(word: str) -> bool:
    """Whether a word is true or false."""
    return word.lower() in BOOLEANS


def join_flags(argv: Sequence[str], flags: Collection[str], is_value: Callable[[str], bool] = is_boolean) -> list[str]:
    """The command line with every flag in the form --flag=VALUE, where a flag without a value is true.

    Args:
        argv: the words of the command line.
        flags: names of options, with their hyphens.
        is_value: whether the word behind a flag is its value.

    Example:
        >>> join_flags(["--quiet", "RUN", "--fresh", "false"], ["--quiet", "--fresh"])
        ['--quiet=true', 'RUN', '--fresh=false']
    """
    words, joined = list(argv), []
    while words:
        word = words.pop(0)
        if word in flags:
            word += f"={words.pop(0) if words and is_value(words[0]) else 'true'}"
        joined.append(word)
    return joined


def take_keys(argv: Sequence[str], group: str) -> tuple[list[str], list[str]]:
    """The `--GROUP.KEY VALUE` words of a command line, in the form --GROUP.KEY=VALUE, and the other words.

    Raises:
        UserError: a key without a value.

    Example:
        >>> take_keys(["RUN", "--data.name", "folder", "--device=cpu"], "data")
        (['--data.name=folder'], ['RUN', '--device=cpu'])
    """
    words, keys, rest = list(argv), [], []
    while words:
        word = words.pop(0)
        if not word.startswith(f"--{group}."):
            rest.append(word)
        elif "=" in word:
            keys.append(word)
        elif words:
            keys.append(f"{word}={words.pop(0)}")
        else:
            raise UserError(f"{word} needs a value")
    return keys, rest


def run_script(body: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None) -> int:
    """The exit code of a script: that of `body` (None is 0), or 2 with one line when the user has to change something.

    Args:
        body: the script, given the words of its command line.
        argv: those words; None takes them from the process.
    """
    try:
        return body(sys.argv[1:] if argv is None else argv) or 0
    except BrokenPipeError:
        raise  # a pipe between processes; that of a reader is left to `leave_with`
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        return tell_out_of_memory(error, LESS_MEMORY)


def tell_out_of_memory(error: Exception, way_out: str) -> int:
    """Say in one line that memory is used up, for exit code 2; any other error is raised again."""
    if not is_out_of_memory(error):
        raise error
    print(f"error: {out_of_memory(error, way_out)}", file=sys.stderr)
    return 2


def leave_with(main: Callable[[], int | None]) -> NoReturn:
    """End the process with the exit code of `main`, which does all its work whatever becomes of its output.

    Where the reader of standard output left, as `head` does, `READER_GONE` takes the place of 0. Where it could not be
    written, as on a full disk, 2 does, and a line on standard error says so. Notes and progress on standard error
    change no exit code. Ctrl-C ends with a line and `INTERRUPTED`. What the encoding of standard output lacks is
    written as escapes, as on standard error. The process keeps its freed memory (`keep_freed_memory`).
    """
    keep_freed_memory()
    out, _ = (_Outlet.of(name) for name in ("stdout", "stderr"))
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller closed it: print would write notes for one into the other
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    try:
        code: int | str = main() or 0
    except SystemExit as end:  # of --help
        code = end.code or 0
    except KeyboardInterrupt:
        print("stopped: what was not written yet is lost", file=sys.stderr)
        code = INTERRUPTED
    sys.stdout.flush()
    if out is not None and out.failure is not None:
        print(
            f"error: standard output cannot be written ({out.failure.strerror}): a part of it is lost, files are not",
            file=sys.stderr,
        )
        code = code or 2
    sys.stderr.flush()
    sys.exit(READER_GONE if code == 0 and out is not None and out.unread else code)


class _Outlet(io.FileIO):
    """The file below a standard stream: what is written goes nowhere once its reader has left or its disk is full."""

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)
        self.unread = False
        self.failure: OSError | None = None

    @classmethod
    def of(cls, name: str) -> _Outlet | None:
        """Put one below sys.stdout or sys.stderr; None where that is closed, or no file."""
        stream: Any = getattr(sys, name)
        try:
            outlet = cls(stream.fileno())
        except (AttributeError, OSError):
            return None
        stream.flush()
        below = outlet if isinstance(stream.buffer, io.RawIOBase) else io.BufferedWriter(outlet)  # raw: python -u
        settings = {key: getattr(stream, key) for key in ("encoding", "errors", "line_buffering", "write_through")}
        if settings["errors"] == "strict":
            settings["errors"] = "backslashreplace"
        setattr(sys, name, io.TextIOWrapper(below, **settings))
        return outlet

    def write(self, data: Any) -> int:
        """Write bytes."""
        try:
            return super().write(data)
        except BrokenPipeError:
            if not _reader_gone(self):
                raise
            self.unread = True
        except OSError as error:  # a full disk, a terminal that was closed
            self.failure = error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())  # what libraries and processes print goes there too
        os.close(nowhere)
        return super().write(data)


def _reader_gone(file: io.FileIO) -> bool:
    """Whether a file is a pipe that nobody reads any more."""
    if not hasattr(select, "poll"):
        return True  # no way to ask on Windows
    asked = select.poll()
    asked.register(file.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in asked.poll(0))
