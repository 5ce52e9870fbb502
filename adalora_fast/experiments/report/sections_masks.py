"""The report's tables of masks: how much they change, and how much of a score is λ's own."""

from .collect import Sweep
from .masks import KINDS, MaskFacts, facts_by_arm
from .tables import markdown, task_name

HEAD = (
    "task", "arm", "runs", "masks", "churn", "last third", "returns", "share of λ", "of Q", "of P", "ρ(λ, S)",
    "same mask",
)  # fmt: skip
WORDS = (
    "*Churn*: of the triplets that a mask keeps, those that the mask before had pruned, in per cent; the "
    "mean over masks, and over the last third of them, in which the budget hardly falls. *Returns*: how "
    "often a triplet came back in a run, per triplet of the final budget. *Share*: what λ's own score and "
    "the means over Q and P add to S, in per cent of the sum of their sizes. *ρ(λ, S)*: Spearman's "
    "correlation of λ's own score with S over the triplets. *Same mask*: the part of the kept triplets that "
    "λ's own score would have kept without hysteresis, in per cent. Nulls score nothing."
)


def masks(sweep: Sweep) -> str:
    """Per task and arm that has logged its masks."""
    rows = [
        (task_name(task), arm, facts.runs, f"{facts.masks:.0f}", *_cells(facts))
        for task in sweep.plan.tasks
        for arm, facts in facts_by_arm(sweep, task).items()
    ]
    if not rows:
        return "No run has logged its masks (runs of earlier versions have not)."
    return f"{markdown(HEAD, rows, left=2)}\n\n{WORDS}"


def _cells(facts: MaskFacts) -> tuple[str, ...]:
    shares = (None,) * 3 if facts.share is None else tuple(facts.share[kind] for kind in KINDS)
    return (
        _percent(facts.churn),
        _percent(facts.last_churn),
        f"{facts.returns:.2f}",
        *map(_percent, shares),
        "–" if facts.spearman is None else f"{facts.spearman:.4f}",
        _percent(facts.same_mask),
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
