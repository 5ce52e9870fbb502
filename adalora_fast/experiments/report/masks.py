"""What the masks of a sweep's runs changed, and what their scores were made of (`experiments.masks`)."""

from dataclasses import dataclass

import numpy as np

from .collect import Run, Sweep, read_lines
from .logs import Curve, join

KINDS = ("lora_E", "lora_A", "lora_B")  # λ, Q, P


@dataclass(frozen=True, kw_only=True)
class MaskFacts:
    """Means over the runs of one arm, whose masks all count alike.

    Args:
        runs: how many were logged.
        masks: of one run, but the first, before which nothing was pruned.
        churn: the revived share of the kept triplets; None where there was one mask only.
        last_churn: of the last third of the masks, in which the budget hardly falls.
        returns: how often a triplet came back in one run, per triplet of the final budget.
        share: of Σ |term| in Σ |S| by kind of factor; None for nulls.
        spearman: of λ's term with S.
        same_mask: the part of the kept triplets that s(λ) alone would have kept.
    """

    runs: int
    masks: float
    churn: float | None
    last_churn: float | None
    returns: float
    share: dict[str, float] | None
    spearman: float | None
    same_mask: float | None


def mask_facts(runs: list[Run]) -> MaskFacts | None:
    """None where no run has logged its masks."""
    logged = [lines for lines in map(mask_lines, runs) if lines]
    if not logged:
        return None
    churns = [[churn_of(line) for line in lines[1:]] for lines in logged]
    ends = [own[2 * len(own) // 3 :] for own in churns]
    terms = [line["terms"] for lines in logged for line in lines if isinstance(line.get("terms"), dict)]
    correlations = [entry["spearman"]["lora_E"] for entry in terms]
    returns = [sum(line["mask"]["revived"] for line in own) / own[-1]["mask"]["kept"] for own in logged]
    shares = {kind: float(np.mean([entry["share"][kind] for entry in terms])) for kind in KINDS if terms}
    return MaskFacts(
        runs=len(logged),
        masks=float(np.mean([len(own) for own in churns])),
        churn=_mean([np.mean(own) for own in churns if own]),
        last_churn=_mean([np.mean(own) for own in ends if own]),
        returns=float(np.mean(returns)),
        share=shares or None,
        spearman=_mean([value for value in correlations if value is not None]),
        same_mask=_mean([entry["same_mask"] for entry in terms]),
    )


def churn_curve(runs: list[Run]) -> Curve | None:
    """Churn in per cent by step, at the masks that all runs with a log of them made."""
    logged = [lines for lines in map(mask_lines, runs) if lines]
    return join([{line["step"]: 100 * churn_of(line) for line in lines[1:]} for lines in logged])


def mask_lines(run: Run) -> list[dict]:
    """The lines of allocation.jsonl that are of a mask."""
    lines = read_lines(run.folder / "allocation.jsonl")
    return [line for line in lines if isinstance(line.get("mask"), dict)]


def churn_of(line: dict) -> float:
    """The revived share of the kept triplets."""
    mask = line["mask"]
    return mask["revived"] / mask["kept"] if mask["kept"] else 0.0


def facts_by_arm(sweep: Sweep, task: str) -> dict[str, MaskFacts]:
    """Of the arms whose runs have logged their masks."""
    found = {arm: mask_facts(list(sweep.of(task, arm).values())) for arm in sweep.plan.arms}
    return {arm: facts for arm, facts in found.items() if facts is not None}


def _mean(values: list) -> float | None:
    return float(np.mean(values)) if values else None
