"""The learning rate of every arm, chosen on a part of the training data before the development set is looked
at.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adalora_fast.environment import write_json
from adalora_fast.experiments.run.folder import read_result
from adalora_fast.experiments.settings.files import failure_of, read_object

DEFAULT = {"learning_rates": [2e-4, 5e-4, 1e-3, 2e-3, 4e-3], "arms": {}, "seeds": [100, 101], "held_out": 0.1}


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The same grid of learning rates and the same seeds for every arm; `held_out` is the fraction of the
    training rows on which they are compared. `arms` gives an arm that lives at other rates, such as full
    fine-tuning, and its variants, a grid of its own, of as many.
    """

    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    held_out: float
    arms: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, rates in {"tuning": self.learning_rates, **self.arms}.items():
            if not rates or not all(_is_number(rate) and rate > 0 for rate in rates):
                raise ValueError(f"{name} needs learning_rates above zero, got {list(rates)}")
            if len(rates) != len(self.learning_rates):
                raise ValueError(
                    f"{name} has {len(rates)} learning rates to choose from and the others "
                    f"{len(self.learning_rates)}; give every arm as many"
                )
        if not self.seeds or not all(isinstance(seed, int) and seed >= 0 for seed in self.seeds):
            raise ValueError(f"tuning needs seeds, integers from 0, got {list(self.seeds)}")
        if not _is_number(self.held_out) or not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out!r}; it must be a fraction between 0 and 1")

    def rates(self, arm: str) -> tuple[float, ...]:
        """The grid of one arm; that of the arm itself where its variant ("full-slow") has none."""
        return self.arms.get(arm, self.arms.get(arm.partition("-")[0], self.learning_rates))

    @classmethod
    def of(cls, content: dict[str, Any] | None) -> "Tuning":
        """From a recipe's `tuning` part; what it leaves out has a default."""
        unknown = sorted((content or {}).keys() - DEFAULT.keys())
        if unknown:
            raise ValueError(f"unknown setting {unknown[0]!r} under tuning; choose from {', '.join(DEFAULT)}")
        values = DEFAULT | (content or {})
        lists = [values["learning_rates"], values["seeds"]]
        lists += values["arms"].values() if isinstance(values["arms"], dict) else [None]
        if not all(isinstance(entry, list) for entry in lists):
            raise ValueError(
                "tuning must hold lists: learning_rates, seeds, and learning rates by arm under arms"
            )
        return cls(
            learning_rates=tuple(values["learning_rates"]),
            arms={arm: tuple(rates) for arm, rates in values["arms"].items()},
            seeds=tuple(values["seeds"]),
            held_out=values["held_out"],
        )

    def choose(
        self,
        output: Path,
        runs: dict[tuple[str, str, float, int], Path],
        tasks: tuple[str, ...],
        arms: tuple[str, ...],
    ) -> tuple[dict[str, dict[str, float]], list[str]]:
        """(the rate with the best mean result of every [task][arm], why some have none). The lower rate wins
        a tie. The choices are written into tuned.json; what is there already stays as it is.

        `runs` gives the folder of (task, arm, rate, seed). A rate at which a run diverged is not chosen, and
        none is chosen while a run is missing for another reason, or where all diverged.

        Raises:
            ValueError: a file is damaged.
        """
        path = output / "tuned.json"
        tuned = _read_choices(path) if path.is_file() else {}
        without = []
        for task in tasks:
            for arm in arms:
                if arm in tuned.setdefault(task, {}):
                    continue
                folders = {
                    rate: [runs[task, arm, rate, seed] for seed in self.seeds] for rate in self.rates(arm)
                }
                try:
                    tuned[task][arm] = _best(folders)
                except NoRate as reason:
                    without.append(f"{task}/{arm}: {reason}")
        if any(tuned.values()):
            write_json(path, tuned)
        return {
            task: {arm: tuned[task][arm]["learning_rate"] for arm in arms if arm in tuned[task]}
            for task in tasks
        }, without


class NoRate(Exception):
    """Why an arm has no learning rate."""


def _best(folders: dict[float, list[Path]]) -> dict[str, Any]:
    """The entry of tuned.json for an arm with these runs; NoRate where there is none."""
    scores = {}
    for rate, of_rate in sorted(folders.items()):
        if any(diverged(folder) for folder in of_rate):
            continue
        missing = next((folder for folder in of_rate if not (folder / "result.json").is_file()), None)
        if missing is not None:
            raise NoRate(f"no rate is chosen before {missing.name} is there; run the command again")
        scores[rate] = float(np.mean([read_result(folder)["primary"] for folder in of_rate]))
    if not scores:
        raise NoRate(f"every learning rate of {sorted(folders)} diverged; give it lower ones")
    best = max(scores, key=lambda rate: (scores[rate], -rate))
    return {"learning_rate": best, "scores": {f"{rate:g}": score for rate, score in scores.items()}}


def diverged(folder: Path) -> bool:
    """Whether this run failed because its numbers were no longer finite."""
    failure = failure_of(folder)
    return failure.is_file() and "diverged" in str(read_object(failure).get("error"))


def _read_choices(path: Path) -> dict[str, dict[str, Any]]:
    """tuned.json; ValueError where something in it is no choice of a rate."""
    tuned = read_object(path)
    for task, choices in tuned.items():
        if not isinstance(choices, dict) or not all(
            isinstance(choice, dict) and _is_number(choice.get("learning_rate"))
            for choice in choices.values()
        ):
            raise ValueError(f"{path} has no learning_rate for an arm of {task}; restore or delete it")
    return tuned


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
