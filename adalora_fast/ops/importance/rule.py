"""ScoreRule: by which score, with which smoothing, triplets are judged."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ScoreRule:
    """What the statistics of a run are, and how they move.

    Attributes:
        score: one of ``SIGNALS``, or the name of a registered score.
        smoothing: one of ``SMOOTHINGS``.
        beta1, beta2: decay of Ī (and of gsnr's moments) and of Ū, in (0, 1), as in PEFT.

    Raises:
        ValueError: an unknown smoothing, or a decay out of range.
    """

    score: str = "sensitivity"
    smoothing: str = "ema_uncertainty"
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        if self.smoothing not in SMOOTHINGS:
            raise ValueError(f"smoothing {self.smoothing!r} is not one of {tuple(SMOOTHINGS)}")
        for name in ("beta1", "beta2"):
            beta = getattr(self, name)
            if not 0.0 < beta < 1.0:
                raise ValueError(f"{name} must be between 0 and 1, got {beta}")

    @property
    def statistics(self) -> tuple[str, ...]:
        """What is kept per entry: rows of the statistics buffer, in this order."""
        return statistic_names(self.score, self.smoothing)


# What a smoothing keeps per entry.
SMOOTHINGS: dict[str, tuple[str, ...]] = {
    "ema_uncertainty": ("ema", "uncertainty"),
    "ema": ("ema",),
    "sum": ("sum",),
    "none": ("last",),
}
MOMENTS = ("mean", "variance")  # of gsnr's gradients


def statistic_names(score: str, smoothing: str) -> tuple[str, ...]:
    """The rows of the statistics buffer for this score with this smoothing."""
    if score == "gsnr":
        return MOMENTS + (() if smoothing == "none" else SMOOTHINGS[smoothing])
    return SMOOTHINGS[smoothing]
