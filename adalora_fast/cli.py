"""The command line: `adalora-fast demo | train | report | export | bench`.

Every command is a frozen dataclass whose fields are its flags. Anything slow is imported when a command runs,
so that `--help` answers at once.
"""

import logging
import os
import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from adalora_fast.bench.cli import Bench

if TYPE_CHECKING:
    from rich.console import Console

PACKAGE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Fine-tune a packaged encoder on real text with every importance score; nothing is downloaded. A few
    minutes.
    """

    fast: bool = False
    """Less than a minute: a fifth of an epoch per run."""
    output: Path | None = None
    """Where runs and pictures go (default: runs/demo, or runs/demo-fast)."""
    seed: int = 0
    """Seed of the initial weights and the order of the data."""

    def run(self, console: "Console") -> None:
        from adalora_fast.experiments.demo import run_demo

        output = self.output or Path("runs/demo-fast" if self.fast else "runs/demo")
        run_demo(output=output.expanduser(), fast=self.fast, seed=self.seed, console=console)


@dataclass(frozen=True, kw_only=True)
class Train:
    """One run on a GLUE task, in one folder. A complete run is not run again; an interrupted one resumes."""

    task: str
    """mrpc, sst2, cola, rte, qnli, qqp, wnli, stsb or mnli."""
    model: str = "microsoft/deberta-v3-base"
    """minilm (the packaged encoder), the path of a local folder, or a name on the hub."""
    data_dir: Path | None = None
    """Folder with <task>/<split>.parquet (default: ADALORA_FAST_DATA, else the hub)."""
    output: Path | None = None
    """Folder of the run (default: runs/<task>/<model>-<method>-seed<seed>)."""
    method: str = "adalora"
    """adalora, lora (at the final rank), head (classification head only) or full (every weight)."""
    score: str = "sensitivity"
    """sensitivity, movement, fisher, gsnr or magnitude."""
    smoothing: str | None = None
    """ema_uncertainty, ema, sum or none (default: the score's own)."""
    score_gradient: str = "total"
    """total (as PEFT does), or task (without the orthogonality term)."""
    recipe: str | None = None
    """default, paper, minilm, or the path of a JSON file; the flags below override it."""
    init_r: int | None = None
    """Rank at the start."""
    target_r: int | None = None
    """Average rank at the end."""
    learning_rate: Annotated[float | None, tyro.conf.arg(aliases=["--lr"])] = None
    """Peak learning rate."""
    epochs: float | None = None
    """Passes over the training data."""
    seed: int = 0
    """Seed of the initial weights and the order of the data."""

    def run(self, console: "Console") -> None:
        from adalora_fast.experiments.glue import run_glue

        data_dir = self.data_dir or (
            Path(os.environ["ADALORA_FAST_DATA"]) if "ADALORA_FAST_DATA" in os.environ else None
        )
        run_glue(
            task_name=self.task,
            model=self.model,
            data_dir=data_dir,
            output=self.output,
            recipe=self.recipe,
            overrides={
                name: getattr(self, name) for name in ("init_r", "target_r", "learning_rate", "epochs")
            },
            options={
                name: getattr(self, name)
                for name in ("method", "score", "smoothing", "score_gradient", "seed")
            },
            console=console,
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """A table of every complete run below a folder."""

    folder: Annotated[Path, tyro.conf.Positional] = Path("runs")
    """Where to look."""

    def run(self, console: "Console") -> None:
        from adalora_fast.experiments.report import find_runs, load_results, results_table

        folders = find_runs(self.folder)
        if not folders:
            raise FileNotFoundError(f"no complete run below {self.folder}; give the folder that holds them")
        console.print(results_table(load_results(folders)))


@dataclass(frozen=True, kw_only=True)
class Export:
    """An exact plain LoRA adapter from a saved AdaLoRA one, without loading the base; and who serves it."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The adapter's folder, as save_pretrained wrote it."""
    out: Annotated[Path, tyro.conf.Positional]
    """A new or empty folder for the LoRA adapter."""
    uniform: bool = False
    """The same rank in every layer, padded with zeros, as SGLang and TGI need it."""
    base: str | None = None
    """Name or path of the base model to write into the configuration (default: as it was)."""

    def run(self, console: "Console") -> None:
        from adalora_fast.integrations.export import export_folder
        from adalora_fast.integrations.serving import servable

        plain = export_folder(self.folder, self.out, uniform=self.uniform, base=self.base)
        total, layers = sum(plain.ranks.values()), len(plain.ranks)
        console.out(
            f"{self.out}: {total} triplets in {layers} matrices, r = {plain.config.r}", highlight=False
        )
        for server, reasons in servable(self.out).items():
            console.out(f"{server}: {'; '.join(reasons) or 'takes it'}", highlight=False)


COMMANDS = {"demo": Demo, "train": Train, "report": Report, "export": Export, "bench": Bench}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 if it worked, 1 where a comparison found something, 2 where the input was wrong (one
    line on stderr says what to change).
    """
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, args=arguments, prog="adalora-fast", description="AdaLoRA, fast and correct."
    )
    from rich.console import Console

    _quiet_libraries()
    try:
        return command.run(Console()) or 0
    except (ValueError, OSError) as error:
        if not _is_about_input(error):
            raise
        print(f"adalora-fast: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
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


def _is_about_input(error: Exception) -> bool:
    """Errors that this package raises itself say what to do; one from deeper down is a defect and keeps its
    traceback.
    """
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename).is_relative_to(PACKAGE)


if __name__ == "__main__":
    sys.exit(main())
