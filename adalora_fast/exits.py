"""How a command ends: its exit status, and one line for what the user can mend."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from adalora_fast.environment import is_no_room
from adalora_fast.extras import EXTRAS, missing, remedy

PACKAGE = Path(__file__).parent
# Whose errors are written for the user: the package's own, and those of `bench` in a clone.
OWN = (PACKAGE, PACKAGE.parent / "benchmarks" / "report")


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
    own = isinstance(error, ValueError | OSError) and any(map(Path(place).is_relative_to, OWN))
    if is_no_room(error) and (not own or getattr(error, "errno", None)):
        return f"there is no room left to write ({error}); make some, and the same command goes on"
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        return remedy("this command", [package]) if package in EXTRAS and missing([package]) else None
    return str(error) if own else None
