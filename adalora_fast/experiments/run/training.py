"""One training run, from settings to a complete folder. The loop itself is transformers' Trainer."""

import ctypes
import gc
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.numpy import save_file
from torch.utils.data import DataLoader
from transformers import Trainer, set_seed

from adalora_fast.environment import write_json
from adalora_fast.experiments.data.rows import Judged
from adalora_fast.experiments.data.workloads import Workload
from adalora_fast.experiments.methods.adapters import adapt, save_adapter
from adalora_fast.experiments.methods.allocation import check_budget, ranks_of, training_callbacks
from adalora_fast.experiments.methods.fusion import mean_weights
from adalora_fast.experiments.methods.nulls import read_ranks
from adalora_fast.experiments.models.families import position_limit
from adalora_fast.experiments.models.loading import load_encoder
from adalora_fast.experiments.settings.files import read_json, read_object
from adalora_fast.experiments.settings.settings import RunSettings

from .card import write_card
from .folder import RunFolder, open_run
from .progress import TrainingProgress
from .recorder import Recorder
from .stopwatch import Stopwatch
from .trainer import build_trainer, unadapted


def train_run(
    settings: RunSettings,
    workload: Workload,
    output: Path,
    progress: TrainingProgress,
    *,
    resumable: bool = True,
) -> dict[str, Any]:
    """Train, evaluate and write the folder `output`; return its result.

    A folder that is already complete is not run again, an interrupted one resumes from its last epoch if it
    was `resumable`.

    Raises:
        BlockingIOError: another process is at work on this folder.
    """
    folder = open_run(output, settings)
    if folder.is_complete:
        progress.finish_run(f"{settings.label}: already complete in {folder.path}")
        return folder.result
    with folder.locked():
        if folder.is_complete:  # by another process, meanwhile
            progress.finish_run(f"{settings.label}: already complete in {folder.path}")
            return folder.result
        try:
            return _train(settings, workload, folder, progress, resumable=resumable)
        finally:
            gc.unfreeze()
            if settings.compile:
                torch._dynamo.reset()  # the next run in this process starts with no graphs of this one


def _train(
    settings: RunSettings,
    workload: Workload,
    folder: RunFolder,
    progress: TrainingProgress,
    *,
    resumable: bool,
) -> dict[str, Any]:
    # PEFT's own AdaLoRA loses its statistics in a checkpoint: such a run begins again.
    saves = resumable and settings.method != "peft"
    checkpoint = last_whole_checkpoint(folder) if saves else None
    watch = Stopwatch.of(folder, checkpoint)
    watch.announce(settings.label, progress)
    found = read_ranks(settings, folder.path)
    try:
        set_seed(settings.seed)
        model, tokenizer = load_encoder(settings, workload.task)
        model = adapt(model, settings, workload.task, found)
        data = workload.prepare(tokenizer, settings.recipe)
        check_lengths(data, unadapted(model), settings)
        folder.start(resumes=checkpoint is not None, at=watch.described)
        recorder = Recorder(folder, settings, progress, watch)
        trainer = build_trainer(
            model,
            tokenizer,
            data,
            settings,
            workload,
            folder.checkpoints,
            [*training_callbacks(settings), recorder],
            evaluates=resumable,
            saves=saves,
        )
        if trainer.args.device.type == "cpu":
            keep_freed_memory()
        gc.collect()
        gc.freeze()  # else every step stops to search the libraries and the model for garbage
        trainer.train(resume_from_checkpoint=checkpoint)
    except (ValueError, OSError):
        folder.abandon()
        raise
    judged = {}
    for split in workload.evaluation:
        values = trainer.evaluate(data[split], metric_key_prefix=f"eval_{split}")
        judged[split] = trainer.judged[split]
        judged[split].metrics["loss"] = values[f"eval_{split}_loss"]
    if not all(np.isfinite(value) for each in judged.values() for value in each.metrics.values()):
        raise ValueError(
            f"{settings.label} diverged: the evaluation loss is not finite at learning_rate "
            f"{settings.recipe.learning_rate:g}; lower it and choose another --output"
        )
    ranks = ranks_of(model, settings)
    task = workload.task
    described = workload.describe()
    result = {
        "task": task.name,
        "model": settings.model,
        "arm": settings.arm,
        "method": settings.label,
        "seed": settings.seed,
        "sample": any(split["sample"] for split in described.values()),
        "splits": described,
        "primary_metric": task.metrics[0],
        "primary": float(np.mean([each.metrics[task.metrics[0]] for each in judged.values()])),
        "metrics": {split: each.metrics for split, each in judged.items()},
        "best_epoch": recorder.best_epoch(task.metrics[0], workload.evaluation),
        "train_loss": recorder.mean_loss(),
        "steps": trainer.state.global_step,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "total_rank": check_budget(ranks, settings) if ranks else 0,
        "attention": unadapted(model).config._attn_implementation,
        **watch.result(),
        "resumed": checkpoint is not None,
    }
    if trainer.is_world_process_zero():
        save_adapter(model, settings, folder.working / "adapter")
        made_by = read_object(folder.working / "config.json")["environment"]
        write_card(folder.working / "adapter", settings, result, made_by, ranks)
        write_json(folder.working / "ranks.json", {"init_r": settings.recipe.init_r, "ranks": ranks})
        save_predictions(judged, folder.working)
        if settings.method == "fusion":
            write_json(folder.working / "fusion.json", describe_fusion(model, settings, data, trainer))
        folder.finish(result)
    progress.finish_run(
        f"{settings.label}: {result['primary_metric']} {result['primary']:.3f}, "
        + (f"total rank {result['total_rank']}, " if ranks else "")
        + f"{result['seconds']:.0f} s{watch.parts_in_words()}"
    )
    return result


def keep_freed_memory() -> None:
    """Tell glibc's malloc to keep what large tensors leave, for the rest of the process. By default it gives
    them back to the system, and the next step gets and clears the same pages again. Without glibc: nothing.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)


def check_lengths(data: dict[str, Dataset], model: Any, settings: RunSettings) -> None:
    """ValueError where a text has more tokens than the model has positions."""
    limit = position_limit(model)
    if limit is None:
        return
    for split, rows in data.items():
        longest = max(
            len(ids)
            for name in ("input_ids", "labels")
            if name in rows.column_names
            for ids in rows[name]
            if isinstance(ids, list)
        )
        if longest > limit:
            raise ValueError(
                f"max_length {settings.recipe.max_length} lets through a text of {longest} tokens in "
                f"{split}, and {settings.model} has {limit} positions; --set max_length={limit}"
            )


def describe_fusion(
    model: Any, settings: RunSettings, data: dict[str, Dataset], trainer: Trainer
) -> dict[str, Any]:
    """fusion.json: the runs that were fused, and by split and place the mean weight of each of them."""
    batch_size = trainer.args.per_device_eval_batch_size
    batches = {
        split: DataLoader(rows, batch_size, collate_fn=trainer.data_collator)
        for split, rows in data.items()
        if split != "train"
    }
    with trainer.accelerator.autocast():  # in batches and a precision that the evaluation has just managed
        weights = {split: mean_weights(model, of_split) for split, of_split in batches.items()}
    return {"adapters": list(settings.adapters), "weights": weights}


def save_predictions(judged: dict[str, Judged], folder: Path) -> None:
    """predictions.safetensors with every array as `<split>/<name>`, and the answers as JSON."""
    arrays = {
        f"{split}/{name}": array for split, each in judged.items() for name, array in each.arrays.items()
    }
    save_file(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()},
        folder / "predictions.safetensors",
    )
    for split, each in judged.items():
        if each.answers is not None:
            write_json(folder / f"predictions-{split}.json", each.answers)


def last_whole_checkpoint(folder: RunFolder) -> str | None:
    """The newest checkpoint that was written to its end; None: the run begins again."""
    found = sorted(
        folder.checkpoints.glob("checkpoint-*"),
        key=lambda path: int(path.name.rpartition("-")[2]),
        reverse=True,
    )
    needed = ["optimizer.pt", "scheduler.pt"]
    if folder.settings.method == "adalora":
        needed.append("adalora_allocator.safetensors")
    for path in found:
        weights = any((path / name).is_file() for name in ("adapter_model.safetensors", "model.safetensors"))
        try:
            read_json(path / "trainer_state.json")
        except (OSError, ValueError):
            continue
        if weights and all((path / name).is_file() for name in needed):
            return str(path)
    return None
