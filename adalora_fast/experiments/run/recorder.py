"""What is written down while a run trains: losses and evaluations, and where the rank budget goes."""

from typing import Any

import numpy as np
from transformers import TrainerCallback

from adalora_fast.experiments.settings.settings import RunSettings

from .folder import RunFolder
from .lines import append_line, read_lines, write_lines
from .masks import MaskLog, allocator_of
from .progress import TrainingProgress
from .stopwatch import Stopwatch

QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}


class Recorder(TrainerCallback):
    """Writes metrics.jsonl (a line per log step or evaluation, with the seconds until then) and, where ranks
    are allocated, allocation.jsonl (budget, ranks and spread of the importance scores per log step; what
    every mask changed and what its scores were made of, see `masks`), and moves the progress display.
    """

    def __init__(
        self, folder: RunFolder, settings: RunSettings, progress: TrainingProgress, watch: Stopwatch
    ) -> None:
        self.path = folder.working / "metrics.jsonl"
        self.allocation = folder.working / "allocation.jsonl"
        self.settings = settings
        self.progress = progress
        self.watch = watch
        self.evaluations: list[dict[str, Any]] = []
        self.mask_log: MaskLog | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # An interrupted run may have logged steps after its last checkpoint, and what follows the training.
        kept = [line for line in read_lines(self.path) if line["step"] <= state.global_step]
        end = next((i for i, line in enumerate(kept) if "train_runtime" in line), len(kept))
        kept = kept[:end]
        self.evaluations = [line for line in kept if any(key.startswith("eval_") for key in line)]
        if state.is_world_process_zero:
            write_lines(self.path, kept)
            if self.allocation.is_file():
                before = [line for line in read_lines(self.allocation) if line["step"] <= state.global_step]
                write_lines(self.allocation, before)
        if self.settings.method == "adalora":
            self.mask_log = MaskLog(allocator_of(model), self.settings)
        self.watch.begin_training()
        self.progress.start_run(self.settings.label, state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.advance()
        if self.mask_log is not None and self.mask_log.is_due:
            line = {"step": state.global_step, **self.mask_log.line()}
            if state.is_world_process_zero:
                append_line(self.allocation, line)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.pulse("evaluating")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch.end_training()

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        line: dict[str, Any] = {"step": state.global_step, **(logs or {}), **self.watch.now()}
        if "loss" in line:
            self.progress.note(f"loss {float(line['loss']):.3f}")
        if any(key.startswith("eval_") for key in line):
            self.evaluations.append(line)
        if state.is_world_process_zero:
            append_line(self.path, line)
            if "loss" in line and self.settings.method == "adalora":
                append_line(self.allocation, {"step": state.global_step, **allocation_now(model)})

    def best_epoch(self, metric: str, evaluation: tuple[str, ...]) -> dict[str, Any] | None:
        """The epoch with the best primary metric (mean over splits), as papers report it; None without
        evaluations.
        """
        by_step: dict[int, dict[str, Any]] = {}
        for line in self.evaluations:
            by_step.setdefault(line["step"], {}).update(line)
        keys = [f"eval_{split}_{metric}" for split in evaluation]
        values = [
            (float(np.mean([line[key] for key in keys])), line["epoch"])
            for line in by_step.values()
            if all(key in line for key in keys)
        ]
        if not values:
            return None
        primary, epoch = max(values, key=lambda pair: pair[0])
        return {"epoch": epoch, "primary": primary}

    def mean_loss(self) -> float:
        """Mean training loss over the logged steps of the whole run, interrupted or not."""
        total = steps = 0.0
        for line in read_lines(self.path):
            if "loss" in line:
                total += line["loss"] * (line["step"] - steps)
                steps = line["step"]
        return total / steps if steps else float("nan")


def allocation_now(model: Any) -> dict[str, Any]:
    """Budget, rank of every matrix, and the spread of the importance scores at the last mask."""
    allocator = allocator_of(model)
    pattern = allocator.rank_pattern()
    line = {
        "budget": allocator.budget,
        "ranks": [sum(kept) for kept in pattern.values()],
        "scores": None,
    }
    scores = allocator.scores()
    if scores is not None:
        values = scores.double().cpu().numpy()
        kept = np.array([keep for triplets in pattern.values() for keep in triplets])
        if np.isfinite(values).all() and len(kept) == len(values) and kept.any():
            line["scores"] = {name: float(np.quantile(values, q)) for name, q in QUANTILES.items()}
            line["scores"]["lowest_kept"] = float(values[kept].min())
    return line
