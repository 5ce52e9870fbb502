"""The files of runs by their names, and JSON that may be damaged."""

import json
from pathlib import Path
from typing import Any


def working_of(run: Path) -> Path:
    """Where this run is written until it is complete."""
    return run.with_name(f".{run.name}.partial")


def failure_of(run: Path) -> Path:
    """The file that says why this run of a sweep failed."""
    return run.with_name(f"{run.name}.failed.json")


def read_json(path: Path) -> Any:
    """What a JSON file holds; ValueError naming the file where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also where it is not text
        raise ValueError(f"{path} is not readable JSON ({error}); restore or delete it") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError naming the file where there is none."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object; restore or delete it")
    return content
