"""transformers' Trainer, as every run has it: one order of the data for every arm, no output of its own."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Sampler
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
)
from transformers.trainer_pt_utils import get_length_grouped_indices

from adalora_fast.experiments.data.rows import Judged
from adalora_fast.experiments.data.tasks import Task
from adalora_fast.experiments.data.workloads import Workload
from adalora_fast.experiments.models.families import FAMILIES
from adalora_fast.experiments.settings.settings import RunSettings


def build_trainer(
    model: Any,
    tokenizer: Any,
    data: dict[str, Dataset],
    settings: RunSettings,
    workload: Workload,
    checkpoints: Path,
    callbacks: Sequence[TrainerCallback],
    *,
    evaluates: bool = False,
    saves: bool = False,
) -> "ExperimentTrainer | TranslationTrainer":
    """Trainer with dynamic padding, batches grouped by length, and none of its own output; for translation
    one that generates when it evaluates.
    """
    translates = workload.task.kind == "translation"
    if translates:
        from adalora_fast.experiments.data.translation import generation_config

        unadapted(model).generation_config = generation_config(tokenizer, settings.recipe)
    arguments = training_arguments(
        settings,
        workload.task,
        checkpoints,
        rows=len(data["train"]),
        label_names=workload.label_names,
        eval_strategy="epoch" if evaluates else "no",
        save_strategy="epoch" if saves else "no",
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several visible GPUs without torchrun would multiply the batch (DataParallel)
    if unadapted(model).config.model_type not in FAMILIES and settings.method != "full":
        callbacks = [*callbacks, EverythingLearns()]
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
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def training_arguments(
    settings: RunSettings, task: Task, checkpoints: Path, *, rows: int, **options: Any
) -> TrainingArguments:
    """Those of a run on so many rows; ValueError where this machine cannot compute in its precision."""
    recipe = settings.recipe
    translates = task.kind == "translation"
    steps = int(np.ceil(rows / recipe.batch_size) * recipe.epochs)
    batch_size = batch_per_process(recipe.batch_size)
    arguments_class: Any = TrainingArguments
    if translates:
        arguments_class = partial(Seq2SeqTrainingArguments, predict_with_generate=True)
    try:
        return arguments_class(
            output_dir=str(checkpoints),
            num_train_epochs=recipe.epochs,
            per_device_train_batch_size=batch_size,
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
            # else mixed precision is refused where there is no GPU
            use_cpu=not torch.accelerator.is_available(),
            save_total_limit=1,
            logging_steps=max(1, min(10, steps // 10)),
            # the heads average their loss: it counts once, not per process
            average_tokens_across_devices=False,
            report_to="none",
            disable_tqdm=True,
            log_level="error",
            dataloader_pin_memory=torch.cuda.is_available(),
            **options,
        )
    except ValueError as error:  # such as: this GPU has no bfloat16
        raise ValueError(
            f"transformers refuses these settings here ({' '.join(str(error).split())[:160]}); change them "
            "with --set, for instance precision=fp32"
        ) from error


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
