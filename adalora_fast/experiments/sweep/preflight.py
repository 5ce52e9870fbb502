"""What would fail in every run of a sweep, or of one of its arms, is found before the first run.

Looked at are the model (its weights and its tokenizer are loaded once), the data of every task, what every
arm adds to the model (on the meta device, so that it costs no memory), its schedule, its precision, the
compiler where it is asked for, and the room on the disk.
"""

import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adalora_fast.experiments.data.rows import CACHED_ROWS, cache_folder, keeping_tokens
from adalora_fast.experiments.data.tasks import Task, get_task
from adalora_fast.experiments.data.workloads import Workload, load_workload
from adalora_fast.experiments.methods.adapters import adapt
from adalora_fast.experiments.methods.allocation import check_schedule
from adalora_fast.experiments.models.families import position_limit
from adalora_fast.experiments.models.loading import load_encoder, outline_encoder
from adalora_fast.experiments.run.single import check_score
from adalora_fast.experiments.run.trainer import training_arguments
from adalora_fast.experiments.run.training import check_lengths
from adalora_fast.experiments.settings.recipes import Recipe
from adalora_fast.experiments.settings.settings import RunSettings

FEW = 4  # rows that are tokenised to see whether it can be done
NUMBER = 4  # bytes of what is trained, and of each of Adam's two moments


def check_runs(left: Iterable[RunSettings], output: Path) -> None:
    """Check all that these runs, which are to be written below `output`, have in common.

    Raises:
        ValueError, FileNotFoundError: in one line, what is wrong and what to do. Nothing has been written.
    """
    left = list(left)
    if not left:
        return
    if left[0].compile:
        check_compiler()
    workloads: dict[tuple, Workload] = {}
    trained: dict[tuple, int] = {}
    tokenizer = None
    for settings in left:
        arm = _arm_of(settings)
        if arm in trained:
            continue
        task = get_task(settings.task)
        with _of_arm(settings):
            check_score(settings)
            outline = outline_encoder(settings, task)
        if tokenizer is None:
            tokenizer = load_encoder(settings, task)[1]
        data = (settings.task, settings.held_out, settings.recipe.train_rows, settings.recipe.evaluation_rows)
        if data not in workloads:
            workloads[data] = load_workload(settings)
            check_cache(workloads[data])
        with _of_arm(settings):
            check_texts(workloads[data], tokenizer, outline, settings)
            check_steps(workloads[data], settings)
            trained[arm] = count_trained(outline, settings, task)
    check_room([(settings.recipe, trained[_arm_of(settings)]) for settings in left], output)


def _arm_of(settings: RunSettings) -> tuple:
    return settings.task, settings.arm, settings.held_out


@contextmanager
def _of_arm(settings: RunSettings) -> Iterator[None]:
    """Name the arm in what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{settings.task}/{settings.arm}: {error}") from error


def check_compiler() -> None:
    """ValueError where torch.compile does not work on this machine."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        torch.compile(nn.Linear(2, 2).to(device))(torch.ones(1, 2, device=device))
    except Exception as error:  # whatever the compiler lacks
        raise ValueError(
            f"--compile does not work here ({' '.join(str(error).split())[:160]}); leave it out"
        ) from error
    finally:
        torch._dynamo.reset()


def check_cache(workload: Any) -> None:
    """An error that names ADALORA_FAST_CACHE where a long table of tokens could not be kept."""
    if all(len(split) < CACHED_ROWS for split in workload.splits.values()):
        return
    folder = cache_folder()
    with keeping_tokens(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("permission denied")


def check_texts(workload: Any, tokenizer: Any, outline: nn.Module, settings: RunSettings) -> None:
    """ValueError where the tokenizer cannot do what the task needs, or a text is longer than the model."""
    limit = position_limit(outline)
    splits = workload.splits
    if limit is None or settings.recipe.max_length <= limit:
        splits = {name: split.select(range(min(FEW, len(split)))) for name, split in splits.items()}
    data = replace(workload, splits=splits).prepare(tokenizer, settings.recipe)
    check_lengths(data, outline, settings)


def check_steps(workload: Any, settings: RunSettings) -> None:
    """ValueError where the budget's schedule does not fit the run, or the precision this machine. How many
    windows a question makes is known only when all are tokenised: there the schedule is left to the run.
    """
    recipe, rows = settings.recipe, len(workload.splits["train"])
    training_arguments(replace(settings, compile=False), workload.task, Path("."), rows=rows)
    if workload.task.kind != "question_answering":
        check_schedule(settings, math.ceil(math.ceil(rows / recipe.batch_size) * recipe.epochs))


def count_trained(outline: nn.Module, settings: RunSettings, task: Task) -> int:
    """How many numbers a run trains; ValueError where the model cannot be adapted as the arm wants it."""
    # Fused layers read numbers, of which there are none here; PEFT's own have the same shapes.
    stand_in = replace(settings, method="peft") if settings.method == "adalora" else settings
    with torch.device("meta"):
        model = adapt(outline, stand_in, task)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def check_room(runs: list[tuple[Recipe, int]], output: Path) -> None:
    """ValueError where the disk has less room than these runs write at least: what each of them has trained,
    and while one is at work a checkpoint, with Adam's moments, beside the one before it.
    """
    checkpoints = [3 * trained * (2 if recipe.epochs > 1 else 1) for recipe, trained in runs]
    needed = NUMBER * (sum(trained for _, trained in runs) + max(checkpoints))
    place = output
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ValueError(
            f"the {len(runs)} runs that are left write at least {_bytes(needed)} to {output}, where "
            f"{_bytes(free)} are free; make room, or choose another --output"
        )


def _bytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
