"""One training run, from settings to a complete folder. The loop itself is transformers' Trainer."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from . import metrics
from .adapters import adapt, check_budget, load_encoder, ranks_of, save_adapter
from .progress import TrainingProgress
from .runs import RunFolder, RunSettings, open_run, write_json
from .tasks import Split, Task

Splits = dict[str, Split]  # "train" and every split of task.evaluation


def train_run(
    settings: RunSettings,
    task: Task,
    load_splits: Callable[[], Splits],
    output: Path,
    progress: TrainingProgress,
    *,
    resumable: bool = True,
) -> dict[str, Any]:
    """Train, evaluate and write the folder `output`; return its result.

    A folder that is already complete is not run again (`load_splits` is then not called), an interrupted one
    resumes from its last epoch if it was `resumable`.
    """
    folder = open_run(output, settings)
    if folder.is_complete:
        progress.finish_run(f"{settings.label}: already complete in {folder.path}")
        return folder.result
    splits = load_splits()
    started = time.perf_counter()
    try:
        set_seed(settings.seed)
        model, tokenizer = load_encoder(settings, task)
        model = adapt(model, settings)
        data = {
            name: tokenize(split, tokenizer, settings.recipe.max_length) for name, split in splits.items()
        }
        folder.start()
        recorder = Recorder(folder, settings, progress)
        trainer = build_trainer(model, tokenizer, data, settings, task, folder, recorder, resumable=resumable)
        checkpoint = last_whole_checkpoint(folder) if resumable else None
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
    except (ValueError, OSError):
        folder.abandon()
        raise
    evaluated = {}
    for split in task.evaluation:
        values = trainer.evaluate(data[split], metric_key_prefix=f"eval_{split}")
        evaluated[split] = {name: values[f"eval_{split}_{name}"] for name in (*task.metrics, "loss")}

    if not all(np.isfinite(values["loss"]) for values in evaluated.values()):
        raise ValueError(
            f"{settings.label} diverged: the evaluation loss is not finite at learning_rate "
            f"{settings.recipe.learning_rate:g}; lower it and choose another --output"
        )
    ranks = ranks_of(model, settings)
    result = {
        "task": task.name,
        "model": settings.model,
        "method": settings.label,
        "seed": settings.seed,
        "sample": any(split.sample for split in splits.values()),
        "splits": {name: describe(split) for name, split in splits.items()},
        "primary_metric": task.metrics[0],
        "primary": float(np.mean([values[task.metrics[0]] for values in evaluated.values()])),
        "metrics": evaluated,
        "best_epoch": recorder.best_epoch(task),
        "train_loss": recorder.mean_loss(),
        "steps": trainer.state.global_step,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "total_rank": check_budget(ranks, settings) if ranks else 0,
        "train_seconds": round(outcome.metrics["train_runtime"], 2),
        "seconds": round(time.perf_counter() - started, 2),
        "resumed": checkpoint is not None,
    }
    if trainer.is_world_process_zero():
        save_adapter(model, settings, folder.working / "adapter")
        write_json(folder.working / "ranks.json", {"init_r": settings.recipe.init_r, "ranks": ranks})
        folder.finish(result)
    progress.finish_run(
        f"{settings.label}: {result['primary_metric']} {result['primary']:.3f}, total rank "
        f"{result['total_rank']}, {result['seconds']:.0f} s"
    )
    return result


def last_whole_checkpoint(folder: RunFolder) -> str | None:
    """The newest checkpoint that was written to its end; None: the run begins again."""
    found = sorted(
        folder.checkpoints.glob("checkpoint-*"),
        key=lambda path: int(path.name.rpartition("-")[2]),
        reverse=True,
    )
    for path in found:
        weights = any((path / name).is_file() for name in ("adapter_model.safetensors", "model.safetensors"))
        if weights and all((path / name).is_file() for name in ("trainer_state.json", "optimizer.pt")):
            return str(path)
    return None


def tokenize(split: Split, tokenizer: Any, max_length: int) -> Dataset:
    """Token ids of one text or a pair of texts; padding is left to the batch."""
    encoded = tokenizer(*split.texts, truncation=True, max_length=max_length)
    return Dataset.from_dict({**encoded, "labels": split.labels})


def describe(split: Split) -> dict[str, Any]:
    """What result.json says about the data of one split."""
    source = {"rows": len(split), "source": split.source, "sample": split.sample}
    counts = split.label_counts
    return source | ({"label_counts": counts} if len(counts) <= 20 else {})


def build_trainer(
    model: Any,
    tokenizer: Any,
    data: dict[str, Dataset],
    settings: RunSettings,
    task: Task,
    folder: RunFolder,
    recorder: "Recorder",
    *,
    resumable: bool,
) -> Trainer:
    """Trainer with dynamic padding, batches grouped by length, and none of its own output."""
    recipe = settings.recipe
    steps = int(np.ceil(len(data["train"]) / recipe.batch_size) * recipe.epochs)
    arguments = TrainingArguments(
        output_dir=str(folder.checkpoints),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=2 * recipe.batch_size,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        warmup_steps=recipe.warmup,
        max_grad_norm=recipe.max_grad_norm,
        lr_scheduler_type="linear",
        train_sampling_strategy="group_by_length",
        seed=settings.seed,
        bf16=settings.precision == "bf16",
        eval_strategy="epoch" if resumable else "no",
        save_strategy="epoch" if resumable else "no",
        save_total_limit=1,
        logging_steps=max(1, min(10, steps // 10)),
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        dataloader_pin_memory=False,
    )
    callbacks: list[TrainerCallback] = [recorder]
    if settings.method == "adalora":
        from adalora_fast import AdaLoraCallback

        schedule = {"tinit": recipe.tinit, "tfinal": recipe.tfinal, "deltaT": recipe.deltaT}
        callbacks.insert(0, AdaLoraCallback(**schedule))
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data["train"],
        eval_dataset={name: data[name] for name in task.evaluation},
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=lambda outputs: _compute(task, outputs),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _compute(task: Task, outputs: EvalPrediction) -> dict[str, float]:
    logits = outputs.predictions[0] if isinstance(outputs.predictions, tuple) else outputs.predictions
    return metrics.compute(task.metrics, logits, outputs.label_ids)


class Recorder(TrainerCallback):
    """Writes metrics.jsonl, one object per log step or evaluation, and moves the progress bar."""

    def __init__(self, folder: RunFolder, settings: RunSettings, progress: TrainingProgress) -> None:
        self.path = folder.working / "metrics.jsonl"
        self.settings = settings
        self.progress = progress
        self.evaluations: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # An interrupted run may have logged steps after its last checkpoint, and what follows the training.
        kept = [line for line in self._read() if line["step"] <= state.global_step]
        end = next((i for i, line in enumerate(kept) if "train_runtime" in line), len(kept))
        kept = kept[:end]
        self.evaluations = [line for line in kept if any(key.startswith("eval_") for key in line)]
        if state.is_world_process_zero:
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.progress.start_run(self.settings.label, state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.advance()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        line: dict[str, Any] = {"step": state.global_step, **(logs or {})}
        if "loss" in line:
            self.progress.note(f"loss {float(line['loss']):.3f}")
        if any(key.startswith("eval_") for key in line):
            self.evaluations.append(line)
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps(line, default=float) + "\n")

    def best_epoch(self, task: Task) -> dict[str, Any] | None:
        """The epoch with the best primary metric (mean over splits), as papers report it; None without
        evaluations.
        """
        by_step: dict[int, dict[str, Any]] = {}
        for line in self.evaluations:
            by_step.setdefault(line["step"], {}).update(line)
        keys = [f"eval_{split}_{task.metrics[0]}" for split in task.evaluation]
        values = [(float(np.mean([line[key] for key in keys])), line["epoch"]) for line in by_step.values()]
        if not values:
            return None
        primary, epoch = max(values, key=lambda pair: pair[0])
        return {"epoch": epoch, "primary": primary}

    def mean_loss(self) -> float:
        """Mean training loss over the logged steps of the whole run, interrupted or not."""
        total = steps = 0.0
        for line in self._read():
            if "loss" in line:
                total += line["loss"] * (line["step"] - steps)
                steps = line["step"]
        return total / steps if steps else float("nan")

    def _read(self) -> list[dict[str, Any]]:
        """The lines so far, up to one that was cut off."""
        lines: list[dict[str, Any]] = []
        if self.path.is_file():
            for text in self.path.read_text().splitlines():
                try:
                    lines.append(json.loads(text))
                except json.JSONDecodeError:
                    break
        return lines
