"""`adalora-fast bench report | compare`: what is made of benchmark results."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from rich.console import Console

RESULTS = Path("benchmarks/results")


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """Tables and, with --output, pictures of benchmark results."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Result files (default: the newest of every device below benchmarks/results)."""
    output: Path | None = None
    """Folder for report.md and the pictures (default: print the tables only)."""

    def run(self, console: "Console") -> int:
        from benchmarks.report.report import tables
        from benchmarks.report.results import read

        found = [read(path) for path in self.files or newest(RESULTS)]
        text = "\n\n".join(tables(results) for results in found)
        if self.output is None:
            console.out(text, highlight=False)
            return 0
        from benchmarks.report.plots import draw

        self.output.mkdir(parents=True, exist_ok=True)
        report = self.output / "report.md"
        report.write_text(text + "\n", encoding="utf-8")
        lines = [str(report)]
        for results in found:
            files, without = draw(results, self.output)
            lines += [*map(str, files), *without]
        console.out("\n".join(lines), highlight=False)
        return 0


@dataclass(frozen=True, kw_only=True)
class BenchCompare:
    """Whether this package became slower from one result file to another; exits with 1 if it did.

    Compared are ratios to the frozen model of the same run, so that the files may come from different
    machines.
    """

    old: Annotated[Path, tyro.conf.Positional]
    """The file from before."""
    new: Annotated[Path, tyro.conf.Positional]
    """The file of now."""
    threshold: float = 1.1
    """How many times slower counts."""

    def run(self, console: "Console") -> int:
        from benchmarks.report.compare import compare
        from benchmarks.report.results import read

        found = compare(read(self.old), read(self.new), self.threshold)
        console.out(str(found), highlight=False)
        return 1 if found.regressions else 0


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is made of benchmark results (python -m benchmarks.cpu and benchmarks/gpu.py make them)."""

    command: tyro.conf.OmitSubcommandPrefixes[
        Annotated[BenchReport, tyro.conf.subcommand("report")]
        | Annotated[BenchCompare, tyro.conf.subcommand("compare")]
    ]

    def run(self, console: "Console") -> int:
        return self.command.run(console)


def newest(folder: Path) -> list[Path]:
    """The last file, by name, of every folder that holds results of benchmarks.

    Raises:
        FileNotFoundError: there is none.
    """
    files: dict[Path, Path] = {}
    for path in sorted(folder.glob("*/*.json")):
        if '"format"' in path.read_text()[:200]:
            files[path.parent] = path
    if not files:
        raise FileNotFoundError(
            f"no benchmark results below {folder}; name a file, or run python -m benchmarks.cpu"
        )
    return list(files.values())
