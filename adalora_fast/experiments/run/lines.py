"""Files of JSON with one object per line, as they grow while a run trains."""

import json
from pathlib import Path
from typing import Any

from adalora_fast.environment import write_text


def append_line(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line, default=float) + "\n")


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file, up to one that was cut off; none where there is no file."""
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines
