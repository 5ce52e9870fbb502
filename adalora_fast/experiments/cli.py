"""`adalora-fast evaluate`: a finished run on any labelled rows."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """A finished run on labelled rows: predictions, and metrics with bootstrap intervals. Also of the folder
    that `soup` has written.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Of the run, as train, sweep or demo has written it."""
    file: Path | None = None
    """A parquet file with the columns of the run's task (GLUE: its texts and label; SQuAD: id, context,
    question, answers; translation: translation).
    """
    split: str | None = None
    """Of the task, for instance train (default, without --file: those that the run evaluated itself)."""
    output: Path | None = None
    """A new folder (default: <run>/evaluations/<name of the file or split>)."""
    model: str | None = None
    """The base model, where it is not where the run names it."""
    data_dir: Path | None = None
    """Folder with <task>/<split>.parquet (default: ADALORA_FAST_DATA, else that of the run)."""

    def run(self, console: "Console") -> None:
        from .evaluation import evaluate_run

        evaluate_run(
            self.folder,
            file=self.file,
            split=self.split,
            output=self.output,
            model=self.model,
            data_dir=data_dir_of(self.data_dir),
            console=console,
        )


def data_dir_of(given: Path | None) -> Path | None:
    """The folder of the data: what is given, else ADALORA_FAST_DATA, else None."""
    return given or (Path(os.environ["ADALORA_FAST_DATA"]) if "ADALORA_FAST_DATA" in os.environ else None)
