"""What a run shows of its allocation: scalars for its log, a histogram of ranks for its reporters."""

import torch
from transformers import TrainerCallback

from adalora_fast.allocator.allocator import RankAllocator

RANKS = "adalora/ranks"
HISTOGRAMS = 20  # of the layers' ranks, at most, in one run


def is_training_log(logs: dict | None) -> bool:
    """Whether the Trainer logs a stretch of training, not what ``evaluate()`` or ``train()`` return."""
    return logs is not None and "loss" in logs


def figures_of(allocators: list[RankAllocator], ranks: list[int]) -> dict[str, float]:
    """Budget, spread of the ranks, churn (the share of the kept triplets that the mask before the last had
    pruned) and R, for a log entry; of several models budgets and R are added up.

    Args:
        allocators: one for each adapted model.
        ranks: of all their layers.
    """
    figures = {
        "adalora/budget": sum(allocator.budget for allocator in allocators),
        "adalora/rank_min": min(ranks),
        "adalora/rank_mean": sum(ranks) / len(ranks),
        "adalora/rank_max": max(ranks),
    }
    changes = [allocator.last_mask_change for allocator in allocators]
    kept = sum(change.kept for change in changes if change is not None)
    if kept:
        figures["adalora/churn"] = sum(change.revived for change in changes if change is not None) / kept
    values = [allocator.regulariser.value for allocator in allocators]
    if any(value is not None for value in values):
        figures["adalora/orthogonality"] = sum(float(value) for value in values if value is not None)
    return figures


class RankHistograms:
    """The ranks of all layers as one histogram, at most :data:`HISTOGRAMS` times a run.

    Args:
        reporters: the Trainer's callbacks; TensorBoard's and W&B's are written to, through the writers that
            they have opened.
    """

    def __init__(self, reporters: list[TrainerCallback]) -> None:
        self._reporters = reporters
        self._next = 0

    def start(self) -> None:
        """A run begins."""
        self._next = 0

    def is_due(self, step: int) -> bool:
        """Whether the next one is to be written."""
        return step >= self._next

    def write(self, ranks: list[int], step: int, max_steps: int) -> None:
        """Write the ranks at ``step`` of ``max_steps``."""
        self._next = step + max(1, max_steps // HISTOGRAMS)
        for reporter in self._reporters:
            writer, wandb = getattr(reporter, "tb_writer", None), getattr(reporter, "_wandb", None)
            if writer is not None:
                writer.add_histogram(RANKS, torch.tensor(ranks), step)
            elif wandb is not None and wandb.run is not None:
                wandb.log({RANKS: wandb.Histogram(ranks), "train/global_step": step})
