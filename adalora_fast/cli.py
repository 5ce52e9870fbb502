"""The command line: `adalora-fast demo | train | sweep | report | evaluate | analyze | soup | export` and
`bench`.

Every command is a frozen dataclass whose fields are its flags. Anything slow is imported when a command runs,
so that `--help` answers at once. `adalora-fast` starts in `entry.py`, which looks first whether the packages
that this file and the command need are installed.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from adalora_fast.exits import carry_out
from adalora_fast.experiments.cli import Evaluate
from adalora_fast.experiments.cli import data_dir_of as _data_dir
from adalora_fast.export_command import Export

if TYPE_CHECKING:
    from rich.console import Console


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
    """One run on one task, in one folder. A complete run is not run again; an interrupted one resumes. On
    several GPUs: torchrun -m adalora_fast train ...
    """

    task: str
    """mrpc, sst2, cola, rte, qnli, qqp, wnli, stsb, mnli, squad, squad_v2 or wmt16_ro_en."""
    model: str | None = None
    """minilm (the packaged encoder), the path of a local folder, or a name on the hub (default: the
    recipe's).
    """
    data_dir: Path | None = None
    """Folder with <task>/<split>.parquet (default: ADALORA_FAST_DATA, else the hub)."""
    output: Path | None = None
    """Folder of the run (default: runs/<task>/<model>-<method>-seed<seed>)."""
    method: str = "adalora"
    """adalora, peft (PEFT's own), lora (at the final rank), full (every weight), head, bitfit, houlsby,
    fusion (of houlsby runs), prompt, prefix, p_tuning or ia3.
    """
    adapters: tuple[Path, ...] = ()
    """For fusion: two or more folders of finished houlsby runs, of any tasks."""
    score: str = "sensitivity"
    """For adalora: sensitivity, movement, fisher, gsnr, magnitude, or the nulls uniform, random and dealt;
    "+sum", "+ema", "+ema_uncertainty" or "+none" for another smoothing, "+task" to leave the orthogonality
    term out.
    """
    recipe: str | None = None
    """One of the package (default: by model and task), or the path of a JSON file."""
    set: tuple[str, ...] = ()
    """Settings of the recipe to change, for instance epochs=5 learning_rate=1e-3 init_r=12."""
    dtype: str = "float32"
    """Of the frozen weights: float32, bfloat16, float16 or nf4 (four bits, as QLoRA)."""
    attention: str | None = None
    """eager, sdpa or flash_attention_2 (default: what is fastest)."""
    compile: bool = False
    """torch.compile the model."""
    record_scores: bool = False
    """Write every triplet's score, λ and place at every mask into allocation.jsonl."""
    seed: int = 0
    """Seed of the initial weights and the order of the data."""

    def run(self, console: "Console") -> None:
        from adalora_fast.experiments.run.single import run_single
        from adalora_fast.experiments.settings.arms import parse_arm
        from adalora_fast.experiments.settings.recipes import parse_overrides

        way = parse_arm(self.score) if self.method == "adalora" else {"method": self.method}
        if way["method"] != self.method:
            raise ValueError(f"{self.score} is no score but a method; give --method {self.score}")
        names = ("dtype", "attention", "compile", "record_scores", "seed")
        run_single(
            task_name=self.task,
            model=self.model,
            data_dir=_data_dir(self.data_dir),
            output=self.output,
            recipe=self.recipe,
            overrides=parse_overrides(self.set),
            options=way
            | {name: getattr(self, name) for name in names}
            | {"adapters": tuple(str(path.expanduser().absolute()) for path in self.adapters)},
            console=console,
        )


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Every task × arm × seed of a recipe, in one folder; the same command goes on where it was interrupted.
    Started several times, the processes share the runs.
    """

    recipe: str
    """One of the package (study-table1, minilm-glue, ...; a wrong name lists them all), or a JSON file."""
    output: Path | None = None
    """Folder of the sweep (default: runs/<recipe>)."""
    model: str | None = None
    """In place of the recipe's: minilm, the path of a local folder, or a name on the hub."""
    data_dir: Path | None = None
    """Folder with <task>/<split>.parquet (default: ADALORA_FAST_DATA, else the hub)."""
    tasks: tuple[str, ...] = ()
    """In place of the recipe's."""
    arms: tuple[str, ...] = ()
    """In place of the recipe's: scores (fisher, fisher+sum, fisher+task, ...), uniform, random, and the
    methods of `train` but fusion.
    """
    seeds: tuple[int, ...] = ()
    """In place of the recipe's."""
    contrasts: tuple[str, ...] = ()
    """In place of the recipe's: the pairs of arms that the report decides on, such as fisher:sensitivity
    (default: every other arm against sensitivity). Declare few, and before there are results.
    """
    set: tuple[str, ...] = ()
    """Settings to change for every task, for instance epochs=5 train_rows=1000."""
    tune: bool = False
    """Choose every arm's learning rate on held-out training data first."""
    dtype: str = "float32"
    """Of the frozen weights: float32, bfloat16, float16 or nf4 (four bits, as QLoRA)."""
    attention: str | None = None
    """eager, sdpa or flash_attention_2 (default: what is fastest)."""
    compile: bool = False
    """torch.compile the model."""
    ray: str | None = None
    """Address of a Ray cluster, one run per GPU ("auto" finds a running one, "local" starts one here)."""

    def run(self, console: "Console") -> int:
        from adalora_fast.experiments.settings.recipes import parse_overrides
        from adalora_fast.experiments.sweep.plan import make_plan
        from adalora_fast.experiments.sweep.sweep import run_sweep

        plan = make_plan(
            recipe=self.recipe,
            model=self.model,
            tasks=self.tasks,
            arms=self.arms,
            seeds=self.seeds,
            contrasts=self.contrasts,
            tune=self.tune,
            data_dir=_data_dir(self.data_dir),
            overrides=parse_overrides(self.set),
            options={name: getattr(self, name) for name in ("dtype", "attention", "compile")},
        )
        output = self.output or Path("runs") / plan.name
        failed = run_sweep(plan, output, console, ray=self.ray)
        console.print(f"tables and pictures: adalora-fast report {output}", highlight=False, soft_wrap=True)
        return 1 if failed else 0


@dataclass(frozen=True, kw_only=True)
class Report:
    """Tables and pictures of a sweep; of any other folder, a table of the complete runs in and below it."""

    folder: Annotated[Path, tyro.conf.Positional] = Path("runs")
    """Where to look."""
    output: Path | None = None
    """Where a sweep's report, and report.html, go (default: report/ in the folder)."""
    html: bool = False
    """Also one HTML page, of a sweep, a run or a folder of runs: tables, rank maps and curves of the runs."""

    def run(self, console: "Console") -> None:
        from adalora_fast.experiments import report
        from adalora_fast.experiments.report import find_runs, load_results, results_table

        if (self.folder / "plan.json").is_file():
            for path in report.write_report(self.folder, self.output, as_html=self.html):
                console.print(str(path), highlight=False, markup=False, soft_wrap=True)
            return
        folders = find_runs(self.folder)
        if not folders:
            raise FileNotFoundError(f"no complete run below {self.folder}; give the folder that holds them")
        console.print(results_table(load_results(folders)))
        if self.html:
            path = report.write_folder_page(self.folder, folders, self.output)
            console.print(str(path), highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Analyze:
    """Compare finished runs of one task: CKA of their representations, or the loss on the paths between them.
    An interrupted comparison of paths goes on with the same command.
    """

    measure: Annotated[Literal["cka", "connectivity"], tyro.conf.Positional]
    """What to compute."""
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, two or more."""
    output: Path = Path("runs/analysis")
    """Folder of the results (JSON), a report (Markdown) and figures."""
    model: str | None = None
    """The base model, where it is not where the runs name it."""
    data_dir: Path | None = None
    """Folder with <task>/<split>.parquet (default: ADALORA_FAST_DATA, else that of the runs)."""
    split: str | None = None
    """Of the task (default: the first that is evaluated)."""
    rows: int | None = None
    """Rows of the split, always the same ones (default: 512 for CKA, all for paths)."""
    layer: int = -1
    """CKA: 0 is the embeddings, -1 the last layer."""
    layers: bool = False
    """CKA: also every layer with every layer."""
    batch_size: int | None = None
    """CKA: estimate it from batches of so many rows."""
    cache: Path | None = None
    """CKA: keep representations in this folder."""
    points: int = 11
    """Paths: evenly spaced points, ends included."""
    pairs: Literal["all", "within", "between"] = "all"
    """Paths: of all runs, of runs that differ in the seed alone, or of all others."""
    most_pairs: int | None = None
    """Paths: at most so many pairs of every two groups of runs, by lot (default: all)."""
    generate: bool = False
    """Paths of translation runs: also BLEU and chrF, which takes many times as long."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes matrix products of bfloat16 numbers: faster, losses differ in the third digit."""

    def run(self, console: "Console") -> None:
        from adalora_fast.analysis import AnalysisProgress, analyze_cka, analyze_connectivity

        common = {"output": self.output, "model": self.model, "data_dir": _data_dir(self.data_dir)}
        common |= {"split": self.split, "precision": self.precision, "progress": AnalysisProgress(console)}
        if self.measure == "cka":
            given = {} if self.rows is None else {"rows": self.rows}
            given |= {"layer": self.layer, "layers": self.layers, "batch_size": self.batch_size}
            analyze_cka(self.folders, cache=self.cache, **given, **common)
        else:
            names = ("points", "rows", "pairs", "most_pairs", "generate")
            chosen = {name: getattr(self, name) for name in names}
            analyze_connectivity(self.folders, **chosen, **common)
        console.print(f"results  {self.output}", highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Soup:
    """One model out of finished runs of one task, of any ranks and methods: the soup of their weights."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, two or more."""
    output: Path = Path("runs/soup")
    """A new or empty folder."""
    recipe: Literal["greedy", "averaging", "uniform"] = "greedy"
    """Greedy: a run enters, with the best of four weights, where that lowers the loss; averaging: the mean of
    those that lowered its loss; uniform: the mean of all.
    """
    save: Literal["lora", "full", "none"] = "lora"
    """A plain LoRA adapter, a whole model, or only soup.json."""
    rank: int | None = None
    """Cut the adapter to this rank (default: the members' ranks added up, which is exact)."""
    selection: Literal["halves", "held_out"] = "halves"
    """Choose on one half of the split and report on the other, or choose on what their training held out."""
    split: str | None = None
    """Of the task (default: the first that is evaluated)."""
    model: str | None = None
    """The base model, where it is not where the runs name it."""
    data_dir: Path | None = None
    """Folder with <task>/<split>.parquet (default: ADALORA_FAST_DATA, else that of the runs)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes matrix products of bfloat16 numbers: faster, losses differ in the third digit."""
    generate: bool = False
    """Translation runs: also BLEU and chrF, which takes many times as long."""

    def run(self, console: "Console") -> None:
        from adalora_fast.analysis import AnalysisProgress, make_soup

        names = ("recipe", "save", "rank", "selection", "split", "model", "precision", "generate")
        options = {name: getattr(self, name) for name in names}
        options |= {"data_dir": _data_dir(self.data_dir), "progress": AnalysisProgress(console)}
        make_soup(self.folders, self.output, **options)
        console.print(f"results  {self.output}", highlight=False, markup=False, soft_wrap=True)


def _bench() -> type:
    """The command `bench`, whose code lies in the repository beside what it reads."""
    root = Path(__file__).parents[1]
    if (root / "benchmarks" / "report" / "cli.py").is_file():
        sys.path.append(str(root))
        from benchmarks.report.cli import Bench

        return Bench
    return NoBench


@dataclass(frozen=True, kw_only=True)
class NoBench:
    """What is made of benchmark results: for a clone of the repository, which has benchmarks/."""

    arguments: tyro.conf.Positional[tuple[str, ...]] = ()

    def run(self, console: "Console") -> None:
        raise ValueError(
            "bench reads benchmarks/, which an installed package has not; clone the repository, then "
            "pip install -e ."
        )


COMMANDS = {
    "demo": Demo,
    "train": Train,
    "sweep": Sweep,
    "report": Report,
    "evaluate": Evaluate,
    "analyze": Analyze,
    "soup": Soup,
    "export": tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(Export),
    "bench": _bench(),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 if it worked, 1 where a comparison found something, 2 where the input was wrong (one
    line on stderr says what to change).
    """
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, args=arguments, prog="adalora-fast", description="AdaLoRA, fast and correct."
    )
    from rich.console import Console

    return carry_out(lambda: command.run(Console()))
