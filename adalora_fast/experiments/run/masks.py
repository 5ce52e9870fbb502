"""What the masks of a run changed, and what the scores were made of: a line of allocation.jsonl for each.

    {"step": 60, "mask": {"kept": 560, "revived": 4, "dropped": 9},
     "terms": {"share": {"lora_E": .99, ...}, "spearman": {"lora_E": 1.0, ...}, "same_mask": .998}}

*revived*: kept triplets that the mask before had pruned; their share of the kept is the churn. *share*: of
Σ |term| over all triplets, with S = s(λ) + mean s(P) + mean s(Q). *spearman*: of a term with S.
*same_mask*: the part of the kept triplets that s(λ) alone would keep. Scores of nulls have no terms.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

from adalora_fast.allocator.allocator import RankAllocator
from adalora_fast.experiments.settings.settings import NULLS, RunSettings
from adalora_fast.ops import select_triplets


def allocator_of(model: nn.Module) -> RankAllocator:
    """The allocator of the model that the Trainer trains."""
    from adalora_fast.integrations.trainer import unwrap

    return unwrap(model).base_model.rankallocator


class MaskLog:
    """Sees every mask of an allocator once.

    Args:
        allocator: from now on it keeps the terms of its scores.
        settings: of the run; with `record_scores` the lines have every triplet's score, λ and place, too.
    """

    def __init__(self, allocator: RankAllocator, settings: RunSettings) -> None:
        self.allocator, self.settings = allocator, settings
        allocator.keep_terms = settings.score not in NULLS
        self._seen = allocator.mask_number

    @property
    def is_due(self) -> bool:
        """Whether there was a mask since the last line."""
        return self.allocator.mask_number != self._seen

    def line(self) -> dict[str, Any]:
        """Of the last mask; waits for the device."""
        self._seen = self.allocator.mask_number
        change = self.allocator.last_mask_change
        line: dict[str, Any] = {
            "mask": {"kept": change.kept, "revived": change.revived, "dropped": change.dropped},
            "terms": None,
        }
        kept = torch.tensor([keep for of_one in self.allocator.rank_pattern().values() for keep in of_one])
        scores, terms = self.allocator.scores(), self.allocator.score_terms()
        if terms is not None:
            line["terms"] = described({kind: term.cpu() for kind, term in terms.items()}, scores.cpu(), kept)
        if self.settings.record_scores:
            values = torch.cat([values.detach().flatten() for values in self.allocator.lambdas()])
            line["triplets"] = {
                "score": scores.tolist(), "lambda": values.tolist(), "kept": kept.int().tolist(),
            }  # fmt: skip
        return line


def described(
    terms: dict[str, torch.Tensor], scores: torch.Tensor, kept: torch.Tensor
) -> dict[str, Any] | None:
    """What S [T] is made of; None where a score is no finite number."""
    from scipy.stats import spearmanr

    if not all(values.isfinite().all() for values in (scores, *terms.values())):
        return None
    sizes = {kind: float(term.double().abs().sum()) for kind, term in terms.items()}
    total = sum(sizes.values())
    by_lambda = select_triplets(terms["lora_E"], kept.sum())
    return {
        "share": {kind: size / total if total else 0.0 for kind, size in sizes.items()},
        "spearman": {
            kind: float(spearmanr(term, scores).statistic) if _varies(term) and _varies(scores) else None
            for kind, term in terms.items()
        },
        "same_mask": float((by_lambda & kept).sum() / kept.sum().clamp(min=1)),
    }


def _varies(values: torch.Tensor) -> bool:
    return bool(np.ptp(values.numpy()) > 0)
