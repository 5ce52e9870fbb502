"""The contrasts that a plan declares: the few pairs of arms on which a sweep is to decide.

A verdict on every pair of arms asks for a correction over all of them, under which nothing is found; on pairs
that are chosen after a look at the results it is worth nothing. A plan therefore names its pairs beforehand,
in the recipe's grid ("contrasts": [["movement", "sensitivity"], ...]) or with `--contrasts
movement:sensitivity`; the order says what is subtracted from what. Where it names none, every other arm is
compared with the baseline.
"""

from collections.abc import Iterable, Sequence
from typing import Any

Pair = tuple[str, str]


def read_contrasts(content: Any, arms: Sequence[str]) -> tuple[Pair, ...]:
    """A list of pairs of arms as JSON has it. ValueError where it is something else."""
    if not isinstance(content, list) or not content:
        raise ValueError(f'contrasts is {content!r}; give a list of pairs of arms, [["fisher", "lora"], ...]')
    for entry in content:
        two = isinstance(entry, list) and len(entry) == 2 and all(isinstance(arm, str) for arm in entry)
        if not two:
            raise ValueError(f'the contrast {entry!r} is no pair of arms; write ["fisher", "lora"]')
    return checked((tuple(pair) for pair in content), arms)


def parse_contrasts(texts: Iterable[str], arms: Sequence[str]) -> tuple[Pair, ...]:
    """(("fisher", "lora"), ...) of "fisher:lora", ...; ValueError for what is no pair of these arms."""
    pairs = []
    for text in texts:
        a, _, b = text.partition(":")
        if not a or not b or ":" in b:
            raise ValueError(f"the contrast {text!r} is no pair of arms; write fisher:lora")
        pairs.append((a, b))
    return checked(pairs, arms)


def checked(pairs: Iterable[Pair], arms: Sequence[str]) -> tuple[Pair, ...]:
    """The pairs; ValueError where one names an arm that is not among `arms`, or is there twice."""
    seen: set[frozenset[str]] = set()
    pairs = tuple(pairs)
    for a, b in pairs:
        for arm in (a, b):
            if arm not in arms:
                raise ValueError(f"the contrast {a}:{b} names {arm}, no arm of the plan: {', '.join(arms)}")
        if a == b:
            raise ValueError(f"the contrast {a}:{b} compares an arm with itself; name two")
        if frozenset((a, b)) in seen:
            raise ValueError(f"the contrast {a}:{b} is there twice; give each pair once, one way round")
        seen.add(frozenset((a, b)))
    return pairs


def default_contrasts(arms: Sequence[str], baseline: str) -> tuple[Pair, ...]:
    """What a plan without a declaration is about: every other arm against the baseline, or against the first
    arm where the baseline is not among them.
    """
    first = baseline if baseline in arms else arms[0]
    return tuple((arm, first) for arm in arms if arm != first)


def added_contrasts(before: Sequence[Pair], asked: Iterable[Pair]) -> list[Pair]:
    """The pairs that are not declared yet, either way round."""
    known = {frozenset(pair) for pair in before}
    return [pair for pair in asked if frozenset(pair) not in known]
