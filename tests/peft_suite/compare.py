"""What PEFT's tests did on PEFT's models against what they did on fused ones."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """Per test id: how it ended (passed, failed, skipped, offline, differs), and how many of its models and
    layers were fused.
    """

    ends: Mapping[str, str]
    fused: Mapping[str, int]


def errors(plain: Outcomes, fused: Outcomes, differences: Mapping[str, str]) -> list[str]:
    """One line for everything that is not as it must be, the differences that are listed aside."""
    found = []
    for test, end in sorted(plain.ends.items()):
        now = fused.ends.get(test, "not run")
        if end == "failed":
            found.append(f"{test}: fails with PEFT's own models, and not for want of a hub")
        elif end == "passed" and test in differences and now == "passed":
            found.append(f"{test}: passes, but is listed as a difference; remove it from differences.py")
        elif end == "passed" and now != ("differs" if test in differences else "passed"):
            found.append(f"{test}: passes with PEFT's models, {now} with fused ones")
    for test in sorted(differences):
        end = plain.ends.get(test, "not there")
        if end != "passed":
            found.append(f"{test}: listed as a difference, but {end} with PEFT's models; remove it")
    return found


def summary(plain: Outcomes, fused: Outcomes) -> str:
    """The counts in one line."""
    both = [test for test, end in plain.ends.items() if end == fused.ends.get(test) == "passed"]
    ends = Counter(plain.ends.values())
    with_models = sum(fused.fused.get(test, 0) > 0 for test in both)
    return (
        f"{len(both)} pass in both ({with_models} on fused models, the others make none), "
        f"{Counter(fused.ends.values())['differs']} differ as listed, {ends['offline']} cannot run offline, "
        f"{ends['skipped']} skipped by PEFT"
    )
