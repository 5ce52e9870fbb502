"""One training run, from settings to a complete folder. The loop itself is transformers' Trainer."""

import ctypes
import gc
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.numpy import save_file
from torch.utils.data import DataLoader, Sampler
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    EvalPrediction,
    PrinterCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_pt_utils import get_length_grouped_indices

from adalora_fast.environment import write_json

from .adapters import adapt, load_encoder, save_adapter
from .allocation import check_budget, ranks_of, training_callbacks
from .card import write_card
from .families import FAMILIES, position_limit
from .fusion import mean_weights
from .progress import TrainingProgress
from .recorder import Recorder
from .runs import RunFolder, RunSettings, open_run, read_json, read_object
from .workloads import Judged, Workload


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
    started = time.perf_counter()
    try:
        set_seed(settings.seed)
        model, tokenizer = load_encoder(settings, workload.task)
        model = adapt(model, settings, workload.task)
        data = workload.prepare(tokenizer, settings.recipe)
        check_lengths(data, unadapted(model), settings)
        checkpoint = last_whole_checkpoint(folder) if saves else None
        folder.start(resumes=checkpoint is not None)
        recorder = Recorder(folder, settings, progress)
        trainer = build_trainer(
            model, tokenizer, data, settings, workload, folder, recorder, evaluates=resumable, saves=saves
        )
        if trainer.args.device.type == "cpu":
            keep_freed_memory()
        gc.collect()
        gc.freeze()  # else every step stops to search the libraries and the model for garbage
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
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
        "train_seconds": round(outcome.metrics["train_runtime"], 2),
        "seconds": round(time.perf_counter() - started, 2),
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
        + f"{result['seconds']:.0f} s"
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


def build_trainer(
    model: Any,
    tokenizer: Any,
    data: dict[str, Dataset],
    settings: RunSettings,
    workload: Workload,
    folder: RunFolder,
    recorder: Recorder,
    *,
    evaluates: bool,
    saves: bool,
) -> "ExperimentTrainer | TranslationTrainer":
    """Trainer with dynamic padding, batches grouped by length, and none of its own output; for translation
    one that generates when it evaluates.
    """
    recipe = settings.recipe
    steps = int(np.ceil(len(data["train"]) / recipe.batch_size) * recipe.epochs)
    translates = workload.task.kind == "translation"
    arguments_class: Any = TrainingArguments
    if translates:
        from .translation import generation_config

        arguments_class = partial(Seq2SeqTrainingArguments, predict_with_generate=True)
        unadapted(model).generation_config = generation_config(tokenizer, recipe)
    arguments = arguments_class(
        output_dir=str(folder.checkpoints),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=batch_per_process(recipe.batch_size),
        # each sentence that is translated is there once for every beam
        per_device_eval_batch_size=recipe.batch_size if translates else 2 * recipe.batch_size,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        warmup_steps=recipe.warmup,
        max_grad_norm=recipe.max_grad_norm,
        lr_scheduler_type="linear",
        seed=settings.seed,
        bf16=recipe.precision == "bf16",
        fp16=recipe.precision == "fp16",
        torch_compile=settings.compile,
        use_cpu=not torch.accelerator.is_available(),  # else mixed precision is refused where there is no GPU
        eval_strategy="epoch" if evaluates else "no",
        save_strategy="epoch" if saves else "no",
        save_total_limit=1,
        logging_steps=max(1, min(10, steps // 10)),
        label_names=workload.label_names,
        average_tokens_across_devices=False,  # the heads average their loss: it counts once, not per process
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several visible GPUs without torchrun would multiply the batch (DataParallel)
    callbacks: list[TrainerCallback] = [*training_callbacks(settings), recorder]
    if unadapted(model).config.model_type not in FAMILIES and settings.method != "full":
        callbacks.append(EverythingLearns())
    trainer_class = TranslationTrainer if translates else ExperimentTrainer
    collator_class = DataCollatorForSeq2Seq if translates else DataCollatorWithPadding
    trainer = trainer_class(
        workload=workload,
        model=model,
        args=arguments,
        train_dataset=data["train"],
        eval_dataset={name: data[name] for name in workload.evaluation},
        data_collator=collator_class(tokenizer),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class EverythingLearns(TrainerCallback):
    """ValueError where a trained tensor has no gradient in the first step: in an encoder that nobody has
    tried, a pooler may be unused, or a layer may not be differentiated.
    """

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step > 0:
            return
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        idle = [name for name, parameter in trained.items() if parameter.grad is None]
        if idle:
            raise ValueError(
                f"{len(idle)} of {len(trained)} trained tensors of this encoder get no gradient, one of them "
                f"{idle[0]}; choose another --model or --method"
            )


def unadapted(model: Any) -> Any:
    """transformers' own model, which generates, within PEFT's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def batch_per_process(batch_size: int) -> int:
    """The share of one of the processes that torchrun started, so that the batch is the recipe's whatever
    their number.

    Raises:
        ValueError: they do not divide it.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if batch_size % processes:
        raise ValueError(
            f"batch_size {batch_size} cannot be shared by {processes} processes; start a divisor of it, "
            "or --set batch_size"
        )
    return batch_size // processes


class Experiment:
    """What is added to a Trainer: its data order depends on the seed and the epoch alone, so that every arm
    sees the same batches, and its metrics come from the workload.
    """

    def __init__(self, *, workload: Workload, **options: Any) -> None:
        self.workload = workload
        self.judged: dict[str, Judged] = {}
        self._split = ""
        super().__init__(compute_metrics=self._judge, **options)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Transformers' own, but for (IA)³'s scales: they start at 1, and decay would draw them to 0."""
        return [name for name in super().get_decay_parameter_names(model) if "ia3_l" not in name.split(".")]

    def evaluation_loop(self, *arguments: Any, metric_key_prefix: str = "eval", **options: Any) -> Any:
        self._split = metric_key_prefix.removeprefix("eval_")
        return super().evaluation_loop(*arguments, metric_key_prefix=metric_key_prefix, **options)

    def _judge(self, outputs: EvalPrediction) -> dict[str, float]:
        judged = self.judged[self._split] = self.workload.judge(self._split, outputs.predictions)
        return dict(judged.metrics)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        data = self.train_dataset if train_dataset is None else train_dataset
        batch_size = self.args.train_batch_size * self.args.world_size
        return PairedOrder([len(ids) for ids in data["input_ids"]], batch_size, self.args.seed)


class ExperimentTrainer(Experiment, Trainer):
    """For classification, regression and question answering."""


class TranslationTrainer(Experiment, Seq2SeqTrainer):
    """For translation: an evaluation gives the loss of the targets and the sentences that are generated."""

    def evaluation_loop(self, *arguments: Any, **options: Any) -> Any:
        # Seq2SeqTrainer would keep the rows with which the last batch is filled up for several processes.
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*arguments, **options)

    def prediction_step(self, *arguments: Any, **options: Any) -> Any:
        with self.compute_loss_context_manager():  # generate in the precision of the training, too
            return super().prediction_step(*arguments, **options)


class PairedOrder(Sampler):
    """Rows in batches of about equal length, in an order that the seed and the epoch decide."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
