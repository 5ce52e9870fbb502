"""Where `adalora-fast` starts: the command runs, or one line says what is missing.

A base installation has this command too, without the packages of the extra `demo`. So this file imports only
the standard library, and `export`, which needs none of them, runs all the same.
"""

import argparse
import logging
import os
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path

from adalora_fast.environment import is_no_room
from adalora_fast.export_command import Export
from adalora_fast.extras import EXTRAS, missing, needed, remedy

PACKAGE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it worked, 1 where a comparison found something, 2 where the input was wrong or a
    package is missing (one line on stderr says what to do).
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    absent = missing(needed(arguments))
    if not absent:
        from adalora_fast.cli import main as command_line

        return command_line(arguments)
    if arguments[:1] == ["export"]:
        return carry_out(parse_plainly(Export, "export", arguments[1:]).run)
    named = arguments and not arguments[0].startswith("-")
    return refuse(remedy(arguments[0] if named else "the command line", absent))


def carry_out(run: Callable[[], int | None]) -> int:
    """Run a command; its exit status. An error that the user can mend is one line on stderr."""
    _quiet_libraries()
    try:
        return run() or 0
    except Exception as error:
        message = _for_the_user(error)
        if message is None:
            raise
        return refuse(message)
    except KeyboardInterrupt:
        print("adalora-fast: interrupted; the same command goes on", file=sys.stderr)
        return 130


def _quiet_libraries() -> None:
    """The progress display speaks for the whole program; what libraries say of their own future does not
    matter here.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it names a package it could use
    warnings.filterwarnings("ignore", category=FutureWarning)


def refuse(message: str) -> int:
    """Say why nothing was done, in one line on stderr; the exit status."""
    print(f"adalora-fast: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _for_the_user(error: Exception) -> str | None:
    """Errors that this package raises itself say what to do, a package of an extra that is missing can be
    installed, and a full disk is no defect, whoever met it. None for the others, which keep their traceback.
    """
    place = traceback.extract_tb(error.__traceback__)[-1].filename
    own = isinstance(error, ValueError | OSError) and Path(place).is_relative_to(PACKAGE)
    if is_no_room(error) and (not own or getattr(error, "errno", None)):
        return f"there is no room left to write ({error}); make some, and the same command goes on"
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        return remedy("this command", [package]) if package in EXTRAS and missing([package]) else None
    return str(error) if own else None


def parse_plainly(command: type, name: str, arguments: Sequence[str]) -> object:
    """The dataclass `command` from its flags, by the standard library's parser: fields without a default are
    positional, and a bool is a flag. (The full command line is made by tyro, from the same dataclass.)
    """
    summary = " ".join((command.__doc__ or "").split())
    parser = argparse.ArgumentParser(prog=f"adalora-fast {name}", description=summary)
    for field in fields(command):
        flag = f"--{field.name.replace('_', '-')}"
        if field.default is MISSING:
            parser.add_argument(field.name, type=field.type)
        elif field.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            parser.add_argument(flag, type=_type_of(field.type), default=field.default)
    return command(**vars(parser.parse_args(arguments)))


def _type_of(annotation: object) -> Callable[[str], object]:
    """`str` of `str | None`."""
    if isinstance(annotation, types.UnionType):
        return next(kind for kind in annotation.__args__ if kind is not types.NoneType)
    return annotation
