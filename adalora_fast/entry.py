"""Where `adalora-fast` starts: the command runs, or one line says what is missing.

A base installation has this command too, without the packages of the extra `demo`. So this file imports only
the standard library, and `export`, which needs none of them, runs all the same.
"""

import argparse
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields

from adalora_fast.exits import carry_out, refuse
from adalora_fast.export_command import Export
from adalora_fast.extras import missing, needed, remedy


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
