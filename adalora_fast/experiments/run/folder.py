"""One run, one folder: settings, measurements, result, adapter and ranks.

A run is written into `.NAME.partial` beside its folder, which takes its name only when everything is in it.
So a folder that exists is complete, and one that was interrupted is recognised and goes on.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adalora_fast.environment import environment, write_json, writing_to
from adalora_fast.experiments.settings.files import read_json, read_object, working_of
from adalora_fast.experiments.settings.recipes import Recipe
from adalora_fast.experiments.settings.settings import RunSettings
from adalora_fast.locks import locked


def is_main_process() -> bool:
    """False in the processes of a distributed run (torchrun, accelerate) that write nothing."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Where a run lives. `working` is written to; `path` appears when the run is complete."""

    path: Path
    settings: RunSettings

    @property
    def working(self) -> Path:
        return working_of(self.path)

    @property
    def checkpoints(self) -> Path:
        return self.working / "checkpoints"

    @property
    def is_complete(self) -> bool:
        return (self.path / "result.json").is_file()

    @property
    def result(self) -> dict[str, Any]:
        """result.json of a complete run; ValueError where it is none."""
        return read_result(self.path)

    def start(self, *, resumes: bool = False, at: dict[str, Any] | None = None) -> None:
        """Make the working folder, with config.json in it. One left by an interrupted run is taken over; a
        run that `resumes` adds the machine on which it goes on, and what `at` says, to what is written there.
        """
        if not is_main_process():
            return
        file = self.working / "config.json"
        with writing_to(self.path):
            self.working.mkdir(parents=True, exist_ok=True)
            here = environment()
            if resumes and file.is_file():
                before = read_object(file)
                write_json(file, before | {"resumed": [*before.get("resumed", []), here | (at or {})]})
            else:
                write_json(file, {"settings": asdict(self.settings), "environment": here})

    def abandon(self) -> None:
        """Remove the working folder of a run that could not begin: the corrected one needs its place."""
        if is_main_process() and not (self.checkpoints.is_dir() and any(self.checkpoints.iterdir())):
            shutil.rmtree(self.working, ignore_errors=True)

    def locked(self) -> AbstractContextManager[None]:
        """Keep other processes off this run while it is at work; the lock goes with the process. (Of the
        processes of one distributed run, the first one holds it.)

        Raises:
            BlockingIOError: another process is at work on it.
        """
        return _locked_run(self.path) if is_main_process() else nullcontext()

    def finish(self, result: dict[str, Any]) -> None:
        """Write result.json, give the folder its name, and remove what was only needed for resuming: last,
        because a run that is killed meanwhile is complete.
        """
        write_json(self.working / "result.json", result)
        self.working.rename(self.path)
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)


@contextmanager
def _locked_run(path: Path) -> Iterator[None]:
    with writing_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        yield


def alone_in(folder: Path) -> AbstractContextManager[None]:
    """Wait until no other process reads and changes what all runs in this folder share."""
    return locked(folder / "plan.json", wait=True)


def open_run(path: Path | str, settings: RunSettings) -> RunFolder:
    """The folder of this run: new, interrupted or complete.

    Raises ValueError where a folder of this name holds something else, naming the first setting that differs.
    """
    folder = RunFolder(path=Path(path).expanduser().absolute(), settings=settings)
    for existing in (folder.path, folder.working):
        if (existing / "config.json").is_file():
            there = _settings_in(existing)
            difference = there and first_difference(_completed(there), _completed(_as_json(settings)))
            if difference is not None:
                raise ValueError(
                    f"{existing} holds a run with {difference}; choose another --output or delete it"
                )
        elif (
            existing is folder.path and existing.exists() and (existing.is_file() or any(existing.iterdir()))
        ):
            raise ValueError(f"{existing} exists and is not a run; choose another --output")
    if folder.path.is_dir() and not folder.is_complete and any(folder.path.iterdir()):
        raise ValueError(f"{folder.path} has no result.json; choose another --output or delete it")
    return folder


def _settings_in(folder: Path) -> dict[str, Any] | None:
    """The settings of the run in ``folder``; None where it has gone meanwhile, ValueError where its
    config.json is something else's.
    """
    try:
        settings = read_json(folder / "config.json")["settings"]
    except FileNotFoundError:  # renamed by the process that has just finished it
        return None
    except (ValueError, KeyError, TypeError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{folder} exists and is not a run; choose another --output")
    return settings


def _completed(settings: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of settings that came later than the run, and the data's folder as seen from here:
    results that are committed name it relative to the repository.
    """
    recipe = settings.get("recipe")
    recipe = _as_json(Recipe()) | recipe if isinstance(recipe, dict) else recipe
    settings = _as_json(RunSettings(task="", model="")) | settings | {"recipe": recipe}
    data_dir = settings["data_dir"]
    return settings | {"data_dir": os.path.abspath(data_dir) if isinstance(data_dir, str) else data_dir}


def _as_json(settings: RunSettings | Recipe) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(settings)))


def read_result(folder: Path) -> dict[str, Any]:
    """result.json of the complete run in `folder`; ValueError where it is no result."""
    result = read_object(folder / "result.json")
    primary = result.get("primary")
    if isinstance(primary, bool) or not isinstance(primary, int | float):
        raise ValueError(
            f"{folder / 'result.json'}: primary is {primary!r}, not a number; delete {folder}, run it again"
        )
    return result


def first_difference(there: dict[str, Any], asked: dict[str, Any], prefix: str = "") -> str | None:
    """Such as "recipe.epochs = 3, and 5 was asked for": the first key, by name, whose values differ."""
    for key in sorted(there.keys() | asked.keys()):
        before, now = there.get(key), asked.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            nested = first_difference(before, now, f"{prefix}{key}.")
            if nested is not None:
                return nested
        elif before != now:
            return f"{prefix}{key} = {before!r}, and {now!r} was asked for"
    return None
