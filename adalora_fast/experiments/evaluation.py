"""A finished run on any labelled rows: predictions, metrics, and intervals of these.

    OUT/evaluation.json             which run and rows; metrics with intervals
    OUT/predictions.safetensors     per row what a run's own file has, as <part>/<name>
    OUT/predictions-<part>.json     answers, translations

The folder gets its name when everything is in it. The model computes as in training: the same precision and
tokens. Its own compiled form and an attention that is not there are left out.
"""

import hashlib
import json
import shutil
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import TrainerCallback

from adalora_fast.environment import environment, write_json, writing_to
from adalora_fast.experiments.data.rows import HELD_OUT, Judged
from adalora_fast.experiments.settings.files import read_object, working_of
from adalora_fast.experiments.settings.settings import RunSettings

from .data.tasks import Rows, Task, get_task, load_split
from .data.workloads import Classification, Workload
from .metrics import interval
from .metrics.translation import check_installed, chrf_statistics
from .run.finished import FinishedRun, check_files, open_finished, open_soup, restore
from .run.folder import RunFolder
from .run.progress import TrainingProgress
from .run.single import whole_path
from .run.trainer import build_trainer
from .run.training import check_lengths, save_predictions

FILE = "file"  # the part that is read from --file
LEVEL, RESAMPLES = 0.95, 2000
DOCSTRINGS = "docstrings"


def evaluate_run(
    folder: Path | str,
    *,
    console: Console,
    file: Path | None = None,
    split: str | None = None,
    output: Path | None = None,
    model: str | None = None,
    data_dir: Path | None = None,
) -> dict[str, Any]:
    """Evaluate a finished run (or a saved soup) and write the folder `output`; what evaluation.json holds.

    Args:
        folder: of the run, trained with any method.
        file: a parquet file with the columns of the run's task.
        split: of the task, such as train; without `file` and `split`: those that the run evaluated itself.
        output: None is RUN/evaluations/<name of the file or the splits>.
        model, data_dir: in place of the base model and the data that the run names.

    Raises:
        FileNotFoundError: a run that is not finished or kept without what it trained, no such file or data.
        ValueError: rows without the task's columns or labels, another base model, a folder in the way.
    """
    if file is not None and split is not None:
        raise ValueError(f"both the file {file} and the split {split!r} are given; leave one of them out")
    run = open_soup(folder) if (Path(folder) / "soup.json").is_file() else open_finished(folder)
    run = replace(run, settings=_settings_here(run.settings, model))
    check_files(run)
    task = task_of(run)
    parts = read_parts(run, task, file=file, split=split, data_dir=data_dir)
    name = Path(file).stem if file is not None else "-and-".join(parts)
    output = (output or run.path / "evaluations" / name).expanduser().absolute()
    rows = hash_of(parts)
    found = _complete(output, run, rows)
    if found is None:
        try:
            with RunFolder(path=output, settings=run.settings).locked():
                found = _evaluate(run, task, parts, rows, output, console)
        except BaseException:
            with suppress(OSError):
                output.parent.rmdir()  # where it was made for this and is empty again
            raise
    else:
        console.print(f"evaluated before, in {output}", highlight=False, markup=False, soft_wrap=True)
    console.print(table_of(found))
    console.print(
        "Intervals: bootstrap over these rows, of this one run; they say nothing of other seeds.",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"evaluation  {output}", highlight=False, markup=False, soft_wrap=True)
    return found


def _evaluate(
    run: FinishedRun, task: Task, parts: dict[str, Rows], rows: str, output: Path, console: Console
) -> dict[str, Any]:
    started = time.perf_counter()
    settings, working = run.settings, working_of(output)
    with writing_to(output):
        shutil.rmtree(working, ignore_errors=True)  # of an evaluation that was interrupted
        working.mkdir(parents=True)
    try:
        with TrainingProgress(console=console) as progress:
            judged, workload = judge(run, task, parts, working / "trainer", progress)
        shutil.rmtree(working / "trainer", ignore_errors=True)
        result = {
            "run": str(run.path),
            "task": task.name,
            "model": settings.model,
            "name": run.name,
            "settings": asdict(run.settings),
            "rows": rows,
            "splits": {name: described for name, described in workload.describe().items() if name in parts},
            "primary_metric": task.metrics[0],
            "metrics": {name: each.metrics for name, each in judged.items()},
            "intervals": {name: intervals(task, each, parts[name]) for name, each in judged.items()},
            "level": LEVEL,
            "resamples": RESAMPLES,
            "seconds": round(time.perf_counter() - started, 2),
            "environment": environment(),
        }
        with writing_to(output):
            save_predictions(judged, working)
            write_json(working / "evaluation.json", result)
            working.rename(output)
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return result


def judge(
    run: FinishedRun, task: Task, parts: dict[str, Rows], scratch: Path, progress: TrainingProgress
) -> tuple[dict[str, Judged], Workload]:
    """What the run's model says of every part; `scratch` is a folder that its Trainer may write to."""
    settings = run.settings
    workload = workload_of(task, settings, parts)
    model, tokenizer = restore(run, task)
    data = workload.prepare(tokenizer, settings.recipe)
    check_lengths(data, model, settings)
    watcher = Watcher(progress)
    trainer = build_trainer(model, tokenizer, data, settings, workload, scratch, [watcher])
    judged = {}
    for name in workload.evaluation:
        batches = -(-len(data[name]) // trainer.args.per_device_eval_batch_size)
        progress.start_run(f"{run.name} on {name}", batches)
        values = trainer.evaluate(data[name], metric_key_prefix=f"eval_{name}")
        judged[name] = trainer.judged[name]
        judged[name].metrics["loss"] = values[f"eval_{name}_loss"]
        progress.finish_run(f"{run.name} on {name}: {len(parts[name]):,} rows")
        if not all(np.isfinite(value) for value in judged[name].metrics.values()):
            raise ValueError(
                f"{run.path} gives a loss that is not finite on {name}; evaluate a run that did not diverge"
            )
    return judged, workload


class Watcher(TrainerCallback):
    """Moves the progress display with every batch."""

    def __init__(self, progress: TrainingProgress) -> None:
        self.progress = progress

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.advance()


def task_of(run: FinishedRun) -> Task:
    """The run's task; that of the demo with as many labels as its training data had, by their codes."""
    if run.settings.task != DOCSTRINGS:
        return get_task(run.settings.task)
    try:
        counts = run.result["splits"]["train"]["label_counts"]
        labels = tuple(str(code) for code in range(1 + max(map(int, counts))))
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{run.path / 'result.json'} does not say which labels the run was trained on; train it again"
        ) from None
    return Task(
        name=DOCSTRINGS, text_columns=("text",), labels=labels, metrics=("accuracy",), evaluation=("test",)
    )


def read_parts(
    run: FinishedRun, task: Task, *, file: Path | None, split: str | None, data_dir: Path | None
) -> dict[str, Rows]:
    """The rows to evaluate on, by the name of their part. Every row of a file or split is taken.

    Raises:
        ValueError, FileNotFoundError: see `tasks.load_split`; a held-out part of a run that has none.
    """
    load = loader_of(task)
    if file is not None:
        return {FILE: load(task, Path(file).expanduser(), None)}
    settings = run.settings
    wanted = (split,) if split else (HELD_OUT,) if settings.held_out else task.evaluation
    if task.name == DOCSTRINGS:
        return {_part(name): _docstrings(settings, name) for name in wanted}
    folder = data_dir if data_dir is not None else settings.data_dir and Path(settings.data_dir)
    if HELD_OUT in wanted:
        if not settings.held_out:
            raise ValueError(
                f"{run.path} was trained on all of the training data, so none of it is held out; choose "
                f"--split {' or '.join(task.evaluation)}"
            )
        return {HELD_OUT: load(task, "train", folder).hold_out(settings.held_out)[1]}
    return {_part(name): load(task, name, folder) for name in wanted}


def _part(split: str) -> str:
    return "training" if split == "train" else split  # a workload trains on what is called "train"


def loader_of(task: Task) -> Any:
    """The function that reads this task's rows."""
    if task.kind == "question_answering":
        from .data.squad import load_questions

        return load_questions
    if task.kind == "translation":
        from .data.translation import load_pairs

        check_installed()
        return load_pairs
    return load_split


def _docstrings(settings: RunSettings, split: str) -> Rows:
    """Of the running Python, which must be the one that the run was trained on."""
    from adalora_fast.experiments.data.docstrings import corpus_splits

    from .data.docstrings import build_corpus

    splits = corpus_splits(build_corpus())
    if split not in splits:
        raise ValueError(f"{DOCSTRINGS} has no split {split!r}; choose {' or '.join(splits)}")
    if splits[split].source != settings.data_dir:
        raise ValueError(
            f"the run was trained on the {settings.data_dir}, and this is the {splits[split].source}, whose "
            "labels may be others; use that Python, or give --file"
        )
    return splits[split]


def workload_of(task: Task, settings: RunSettings, parts: dict[str, Rows]) -> Workload:
    """The workload of these rows. A workload also tokenises what is trained on: here one of the rows."""
    splits: Any = {"train": next(iter(parts.values())).select([0]), **parts}
    if task.kind == "question_answering":
        from .data.question_answering import QuestionAnswering

        return QuestionAnswering(task=task, splits=splits, recipe=settings.recipe)
    if task.kind == "translation":
        from .data.translation import Translation

        return Translation(task=task, splits=splits)
    return Classification(task=task, splits=splits)


def intervals(task: Task, judged: Judged, rows: Any) -> dict[str, list[float]]:
    """[low, high] of the task's metrics, by the bootstrap over rows."""
    arrays = judged.arrays
    found = {}
    for name in task.metrics:
        if task.kind == "question_answering":
            data = ("mean", None, arrays[name])
        elif name == "bleu":
            data = (name, None, arrays["bleu_statistics"])
        elif name == "chrf":
            data = (name, None, chrf_statistics(list(judged.answers.values()), rows.targets))
        else:
            data = (name, arrays["labels"], arrays["predictions"])
        ends = interval(*data, level=LEVEL, resamples=RESAMPLES)
        found[name] = [ends.low, ends.high]
    return found


def hash_of(parts: dict[str, Rows]) -> str:
    """A hash of the rows themselves, whatever file they are from."""
    content = {
        name: {key: value for key, value in vars(part).items() if key not in ("source", "sample")}
        for name, part in parts.items()
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def table_of(result: dict[str, Any]) -> Table:
    """Every metric of the task with its interval, and the loss; by part, with its rows."""
    table = Table(
        title=escape(f"{result['name']} on {result['task']}, {result['model']}"),
        title_justify="left",
    )
    table.add_column("rows of")
    for heading in ("rows", "metric", "value", f"{result['level']:.0%} interval"):
        table.add_column(heading, justify="right")
    for part, metrics in result["metrics"].items():
        described = result["splits"][part]
        own = result["intervals"][part]
        for place, name in enumerate([*own, "loss"]):
            source = Path(described["source"]).name if part == FILE else part
            first = (source, f"{described['rows']:,}") if place == 0 else ("", "")
            ends = f"{own[name][0]:.4f} to {own[name][1]:.4f}" if name in own else "–"
            table.add_row(*map(escape, first), name, f"{metrics[name]:.4f}", ends)
    return table


def _settings_here(settings: RunSettings, model: str | None) -> RunSettings:
    """Those of the run, as this machine can compute them; `model` in place of the base that it names."""
    attention = settings.attention
    if attention == "flash_attention_2" and not torch.cuda.is_available():
        attention = None
    base = settings.model if model is None else whole_path(model)
    return replace(settings, model=base, attention=attention, compile=False)


def _complete(output: Path, run: FinishedRun, rows: str) -> dict[str, Any] | None:
    """What is in the folder from before; None where it is new, ValueError where it holds something else."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / "evaluation.json").is_file():
        raise ValueError(f"{output} exists and is not an evaluation; choose another --output")
    found = read_object(output / "evaluation.json")
    if (found.get("run"), found.get("rows")) != (str(run.path), rows):
        raise ValueError(
            f"{output} holds an evaluation of other rows or of another run; choose another --output or "
            "delete it"
        )
    return found
