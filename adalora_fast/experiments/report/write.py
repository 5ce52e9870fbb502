"""Writing a sweep's report: everything is made beside its place first, then moved there."""

import os
import shutil
import tempfile
from pathlib import Path

from .collect import read_sweep
from .contrasts import compare_all
from .document import MARK, document
from .figures import draw_figures
from .html import sweep_page
from .tables import as_csv, contrast_rows, latex, published_rows, result_rows, table_rows

NOT_ALWAYS = ("ranks-*.png", "ranks-*.svg", "curves-*.png", "curves-*.svg", "agreement.png",
              "agreement.svg", "contrasts.png", "contrasts.svg", "published.csv", "report.html")  # fmt: skip


def write_report(sweep_folder: Path, output: Path | None = None, *, as_html: bool = False) -> list[Path]:
    """Write report.md, results.csv, table.csv, contrasts.csv, table.tex and the figures of a sweep,
    published.csv where there are published numbers to set beside it, and report.html where it is asked for.

    A pure function of the files in `sweep_folder`: the same files give the same bytes. Missing, unfinished
    and failed runs are listed with their reason. `output` is OUT/report by default; what an earlier report
    left there is replaced, anything else stays.

    Returns:
        The files, report.md first.

    Raises:
        FileNotFoundError: the folder has no plan.json.
        ValueError: a file is not what a run of this package wrote, or a folder is in the way; it is named.
    """
    sweep = read_sweep(sweep_folder)
    output = Path(output).expanduser() if output is not None else sweep.folder / "report"
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give a folder for the report")
    contrasts = compare_all(sweep)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise ValueError(f"cannot write to {output} ({error.strerror}); choose another folder") from error
    try:
        figures, remarks = draw_figures(sweep, contrasts, beside)
        texts = {
            "report.md": document(sweep, contrasts, figures, remarks),
            "results.csv": as_csv(result_rows(sweep)),
            "table.csv": as_csv(table_rows(sweep, contrasts)),
            "contrasts.csv": as_csv(contrast_rows(contrasts)),
            "table.tex": latex(sweep, contrasts),
        }
        if published := published_rows(sweep):
            texts["published.csv"] = as_csv(published)
        if as_html:
            texts["report.html"] = sweep_page(sweep, contrasts, tuple(remarks))
        for name, text in texts.items():
            (beside / name).write_text(text, encoding="utf-8")
        names = [*texts, *sorted(path.name for path in beside.iterdir() if path.name not in texts)]
        _move(beside, output, names)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return [output / name for name in names]


def _move(beside: Path, output: Path, names: list[str]) -> None:
    """Each file whole or not at all, report.md last, so that it never names what is not there."""
    output.mkdir(exist_ok=True)
    earlier = output / "report.md"
    if earlier.is_file() and earlier.read_text(encoding="utf-8", errors="replace").startswith(MARK):
        for pattern in NOT_ALWAYS:
            for path in output.glob(pattern):
                if path.name not in names:
                    path.unlink()
    for name in reversed(names):
        os.replace(beside / name, output / name)
