"""Which runs belong together, in which order they are shown, and which of them are paired.

A group is all runs that differ in nothing but the seed.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np

from .saved import SavedRun

METHODS = ("lora", "full", "adalora", "peft", "bitfit", "head")
SCORES = ("sensitivity", "movement", "fisher", "gsnr", "magnitude", "uniform", "random")
PAIRS = ("all", "within", "between")
# Settings that say where, how fast and by which name, not what.
ELSEWHERE = ("seed", "variant", "data_dir", "model", "attention", "compile", "recipe")


def groups_of(runs: Sequence[SavedRun]) -> list[str]:
    """The group of each run: its label, with what else tells it from other groups of the same label."""
    ways = [_way(run) for run in runs]
    names = [run.settings.label for run in runs]
    for setting in ("target_r", *(name for name in ways[0] if name != "target_r")):
        for name in set(names):
            same = [i for i, other in enumerate(names) if other == name]
            if len({repr(ways[i][setting]) for i in same}) > 1 and len({repr(ways[i]) for i in same}) > 1:
                for i in same:
                    value = ways[i][setting]
                    names[i] += f"-r{value}" if setting == "target_r" else f" {setting}={value}"
    return names


def in_order(runs: Sequence[SavedRun]) -> list[SavedRun]:
    """LoRA by rank, full, AdaLoRA by score, the rest; runs of a group together, by their seed."""

    def key(of: tuple[SavedRun, str]) -> tuple:
        run, group = of
        settings = run.settings
        score = SCORES.index(settings.score) if settings.score in SCORES else len(SCORES)
        rank = settings.recipe.target_r
        # A method that has no score or no rank keeps the defaults, which are the same for all.
        return (
            METHODS.index(settings.method),
            score,
            settings.arm.partition("-")[0],
            rank,
            group,
            settings.seed,
        )

    return [run for run, _ in sorted(zip(runs, groups_of(runs), strict=True), key=key)]


def pairs_of(runs: Sequence[SavedRun], which: str = "all", most: int | None = None) -> list[tuple[int, int]]:
    """Places (a, b), a < b, of the runs to compare.

    Args:
        which: all pairs, those within a group, or those between groups.
        most: at most so many of any two groups (and of any group with itself), drawn by a lot that depends on
            what the runs trained, so that it is always the same.

    Raises:
        ValueError: another `which`, `most` below 1, or no such pair.
    """
    if which not in PAIRS:
        raise ValueError(f"unknown pairs {which!r}; choose {', '.join(PAIRS)}")
    if most is not None and most < 1:
        raise ValueError(f"{most} pairs of two groups are too few; take 1 or more")
    groups = groups_of(runs)
    pairs = [
        (a, b)
        for a, b in combinations(range(len(runs)), 2)
        if which == "all" or (groups[a] == groups[b]) == (which == "within")
    ]
    if not pairs:
        raise ValueError(f"there are no pairs of runs {which} the groups {', '.join(dict.fromkeys(groups))}")
    if most is None:
        return pairs
    prints = [run.fingerprint() for run in runs]

    def lot(pair: tuple[int, int]) -> str:
        return hashlib.sha256("".join(sorted(prints[run] for run in pair)).encode()).hexdigest()

    drawn: dict[frozenset[str], list[tuple[int, int]]] = {}
    for pair in sorted(pairs, key=lot):
        drawn.setdefault(frozenset(groups[run] for run in pair), []).append(pair)
    return sorted(pair for each in drawn.values() for pair in each[:most])


def group_means(groups: Sequence[str], matrix: np.ndarray) -> dict[str, Any]:
    """Means over pairs of different runs by the groups of the two, and over how many; null where none was
    computed, which is NaN in `matrix` [R, R].
    """
    names = list(dict.fromkeys(groups))
    places = np.array([names.index(group) for group in groups])
    means, counts = [], []
    for first, second in np.ndindex(len(names), len(names)):
        block = matrix[np.ix_(places == first, places == second)]
        if first == second:
            block = block[np.triu_indices(len(block), 1)]
        values = block[np.isfinite(block)]
        counts.append(len(values))
        means.append(float(values.mean()) if len(values) else None)
    rows = range(0, len(means), len(names))
    return {
        "groups": names,
        "group_means": [means[row : row + len(names)] for row in rows],
        "group_pairs": [counts[row : row + len(names)] for row in rows],
    }


def _way(run: SavedRun) -> dict[str, Any]:
    """Every setting that decides how the run was trained, but its seed."""
    settings = asdict(run.settings)
    return {**settings["recipe"], **{name: settings[name] for name in settings if name not in ELSEWHERE}}
