"""The learning rate of every arm, chosen on a part of the training data before the development set is looked
at.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adalora_fast.environment import write_json

from .runs import read_json

DEFAULT = {"learning_rates": [2e-4, 5e-4, 1e-3, 2e-3, 4e-3], "seeds": [100, 101], "held_out": 0.1}


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The same grid of learning rates and the same seeds for every arm; `held_out` is the fraction of the
    training rows on which they are compared.
    """

    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    held_out: float

    def __post_init__(self) -> None:
        if not self.learning_rates or not all(rate > 0 for rate in self.learning_rates):
            raise ValueError(f"tuning needs learning_rates above zero, got {list(self.learning_rates)}")
        if not self.seeds:
            raise ValueError("tuning needs seeds; give at least one")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; it must be a fraction between 0 and 1")

    @classmethod
    def of(cls, content: dict[str, Any] | None) -> "Tuning":
        """From a recipe's `tuning` part; what it leaves out has a default."""
        unknown = sorted((content or {}).keys() - DEFAULT.keys())
        if unknown:
            raise ValueError(f"unknown setting {unknown[0]!r} under tuning; choose from {', '.join(DEFAULT)}")
        values = DEFAULT | (content or {})
        return cls(
            learning_rates=tuple(values["learning_rates"]),
            seeds=tuple(values["seeds"]),
            held_out=values["held_out"],
        )

    def choose(
        self,
        output: Path,
        runs: dict[tuple[str, str, float, int], Path],
        tasks: tuple[str, ...],
        arms: tuple[str, ...],
    ) -> dict[str, dict[str, float]]:
        """The rate with the best mean result of every [task][arm]; the lower rate wins a tie. Written into
        tuned.json; what is there already stays as it is.

        `runs` gives the folder of (task, arm, rate, seed). A rate of which a run failed is not chosen.

        Raises:
            ValueError: every rate of an arm failed.
        """
        path = output / "tuned.json"
        tuned = read_json(path) if path.is_file() else {}
        for task in tasks:
            for arm in arms:
                if arm in tuned.get(task, {}):
                    continue
                scores = {}
                for rate in sorted(self.learning_rates):
                    results = [runs[task, arm, rate, seed] / "result.json" for seed in self.seeds]
                    if all(result.is_file() for result in results):
                        scores[rate] = float(np.mean([read_json(result)["primary"] for result in results]))
                if not scores:
                    raise ValueError(
                        f"no learning rate of {list(self.learning_rates)} worked for {arm} on {task}; "
                        f"see the .failed.json files in {output / 'tuning' / task}"
                    )
                best = max(scores, key=lambda rate: (scores[rate], -rate))
                tuned.setdefault(task, {})[arm] = {
                    "learning_rate": best,
                    "scores": {f"{rate:g}": score for rate, score in scores.items()},
                }
        write_json(path, tuned)
        return {task: {arm: tuned[task][arm]["learning_rate"] for arm in arms} for task in tasks}
