"""One file out of page.html, the styles, the scripts and the data."""

import html
import json
import re
from pathlib import Path
from typing import Any

from adalora_fast.environment import write_text, writing_to
from adalora_fast.experiments.report.collect import Sweep
from adalora_fast.experiments.report.contrasts import Contrasts

from .content import runs_content, sweep_content

HERE = Path(__file__).parent
SCRIPTS = ("dom.js", "tables.js", "ranks.js", "charts.js", "run.js", "report.js")  # in the order of their use


def sweep_page(sweep: Sweep, contrasts: Contrasts, remarks: tuple[str, ...] = ()) -> str:
    """report.html of a sweep."""
    return page(sweep_content(sweep, contrasts, remarks))


def folder_page(folder: Path, runs: list[Path]) -> str:
    """report.html of the complete runs in a folder that is no sweep's; one run is enough."""
    return page(runs_content(folder, runs))


def write_folder_page(folder: Path, runs: list[Path], output: Path | None = None) -> Path:
    """`folder_page` as report.html in `output`, which is report/ in the folder by default.

    ValueError where a file is not what a run of this package wrote, or a file is in the way; it is named.
    """
    output = Path(output).expanduser() if output is not None else folder / "report"
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give a folder for the report")
    text = folder_page(folder, runs)
    with writing_to(output, "choose another folder"):
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / "report.html", text)
    return output / "report.html"


def page(content: dict[str, Any]) -> str:
    """The page that shows `content`. Every "<" of the data is escaped: no text in it ends its element."""
    data = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    data = data.replace("<", "\\u003c")
    parts = {
        "title": html.escape(f"{content['title']}: report"),
        "style": f"<style>\n{_read('report.css')}</style>",
        "data": f'<script type="application/json" id="data">{data}</script>',
        "scripts": "\n".join(f"<script>\n{_read(name)}</script>" for name in SCRIPTS),
    }
    return re.sub(r"<!-- (title|style|data|scripts) -->", lambda place: parts[place[1]], _read("page.html"))


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
