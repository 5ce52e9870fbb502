"""The demonstration: four importance scores under one rank budget, on real text, with nothing to download.

A pretrained encoder that comes as a Python package learns which module of the standard library a docstring
belongs to.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from adalora_fast.environment import write_json

from .data.docstrings import DocstringCorpus, build_corpus, corpus_splits
from .data.tasks import Task
from .models.packages import packaged_minilm
from .report import results_table
from .report.plots import plot_ranks
from .run.folder import open_run
from .run.progress import TrainingProgress
from .settings.recipes import Recipe
from .settings.settings import RunSettings

SCORES = ("sensitivity", "movement", "fisher", "gsnr")
FULL = Recipe(epochs=1.6, learning_rate=2e-3, scale=8.0, max_length=64, deltaT=5)
FAST = Recipe(epochs=0.2, learning_rate=4e-3, scale=8.0, max_length=64, deltaT=1)


def run_demo(*, output: Path, fast: bool, seed: int, console: Console) -> dict[str, Any]:
    """Train every method, print the table, draw the ranks; return what summary.json holds."""
    packaged_minilm()  # before anything slow: a missing model is said at once
    with TrainingProgress(runs=len(SCORES) + 2, console=console) as progress:
        corpus = build_corpus(progress=lambda done, total: progress.count("reading docstrings", done, total))
        describe_corpus(corpus, progress.bars.console)
        runs = demo_runs(corpus, recipe=FAST if fast else FULL, seed=seed)
        for settings in runs:  # a folder in the way is refused before any training
            open_run(run_folder(output, settings), settings)
        progress.count("loading libraries", 0, 1)
        from .data.workloads import Classification
        from .run.training import train_run

        progress.count("loading libraries", 1, 1)
        workload = Classification(task=corpus_task(corpus), splits=corpus_splits(corpus))
        results = [
            train_run(settings, workload, run_folder(output, settings), progress, resumable=False)
            for settings in runs
        ]

    title = (
        f"Which module is this docstring from? ({len(corpus.test_texts)} test texts, MiniLM-L6, seed {seed})"
    )
    console.print()
    console.print(results_table(results, title=title, majority=corpus.majority))
    if fast:
        console.print(
            "--fast stops after a fifth of an epoch; without it the differences mean more.", highlight=False
        )
    pictures = plot_ranks(
        [run_folder(output, settings) for settings in runs if settings.method == "adalora"],
        output / f"ranks-seed{seed}",
        title=f"Where each score keeps rank, {FULL.init_r} → {FULL.target_r} on average",
    )
    summary = {
        "majority": corpus.majority,
        "python": corpus.python_version,
        "modules": corpus.modules,
        "counts": corpus.counts,
        "results": {result["method"]: result["primary"] for result in results},
        "recipe": asdict(runs[0].recipe),
    }
    write_json(output / f"summary-seed{seed}.json", summary)
    console.print(
        "\npictures  " + "  ".join(str(path) for path in pictures),
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    console.print(
        f"runs      {output}/<method>-seed{seed}/  (config, metrics, result, ranks, adapter)",
        highlight=False,
        markup=False,
    )
    return summary


def demo_runs(corpus: DocstringCorpus, *, recipe: Recipe, seed: int) -> list[RunSettings]:
    """Head only, plain LoRA at the final rank, and AdaLoRA with each score: the same data, seed and step
    count.
    """
    source = f"standard library of Python {corpus.python_version}"
    common = {"task": "docstrings", "model": "minilm", "recipe": recipe, "seed": seed, "data_dir": source}
    return [
        RunSettings(method="head", **common),
        RunSettings(method="lora", **common),
        *(RunSettings(method="adalora", score=score, **common) for score in SCORES),
    ]


def run_folder(output: Path, settings: RunSettings) -> Path:
    return output / f"{settings.label}-seed{settings.seed}"


def corpus_task(corpus: DocstringCorpus) -> Task:
    """The corpus in the form of a GLUE task."""
    return Task(
        name="docstrings",
        text_columns=("text",),
        labels=corpus.modules,
        metrics=("accuracy",),
        evaluation=("test",),
    )


def describe_corpus(corpus: DocstringCorpus, console: Console) -> None:
    """What was found, what was left out, and the ten modules."""
    counts = corpus.counts
    console.print(
        f"Python {corpus.python_version}: {counts['docstrings']:,} docstrings of functions and classes; "
        f"left out {counts['too_short']} too short, {counts['duplicates']} repeated, "
        f"{counts['shared_between_modules']} shared by modules, {counts['in_other_modules']:,} of other "
        f"modules; {counts['train']:,} to train, {counts['test']} to test",
        highlight=False,
    )
    console.print("modules: " + ", ".join(corpus.modules), highlight=False)
