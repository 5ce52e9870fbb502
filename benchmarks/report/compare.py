"""Two benchmark results compared: whether ours became slower, in ratios that hold across machines."""

from dataclasses import dataclass, field

from benchmarks.report.results import Results, Row

THRESHOLD = 1.10
OURS = "adalora_fast"


@dataclass(frozen=True)
class Change:
    """One of our contestants in one case: its value over the baseline's, before and now."""

    suite: str
    case: str
    contestant: str
    old: float
    new: float | None
    missing: str | None = None

    @property
    def factor(self) -> float | None:
        """Above 1 is slower."""
        return self.new / self.old if self.new is not None else None

    def __str__(self) -> str:
        name = f"{self.suite}: {self.case}, {self.contestant}"
        if self.new is None:
            return f"{name}: {self.old:.3f} of the baseline before, missing now ({self.missing})"
        return f"{name}: {self.old:.3f} → {self.new:.3f} of the baseline ({self.factor:.2f}x)"


@dataclass
class Comparison:
    """What changed from an old to a new file.

    Args:
        regressions: slower than the threshold allows and than the spread explains, or missing now.
        improvements: the other way round.
        unchanged: how many others are in both files.
        notes: what makes the comparison less certain.
    """

    threshold: float
    regressions: list[Change] = field(default_factory=list)
    improvements: list[Change] = field(default_factory=list)
    unchanged: int = 0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [*self.notes]
        for title, changes in (("slower", self.regressions), ("faster", self.improvements)):
            lines += [f"{title}: {change}" for change in changes]
        lines.append(
            f"{len(self.regressions)} slower by more than {self.threshold:g}, {len(self.improvements)} "
            f"faster, {self.unchanged} unchanged"
        )
        return "\n".join(lines)


def compare(old: Results, new: Results, threshold: float = THRESHOLD) -> Comparison:
    """Compare the ratio to the baseline (the frozen model where a case has one) of everything of ours.

    A change counts beyond ``threshold``, and only if neither median lies within the other's spread (20th to
    80th percentile).

    Raises:
        ValueError: a threshold of 1 or less, a file whose sizes mean nothing, or nothing in common.
    """
    if threshold <= 1:
        raise ValueError(f"the threshold must be above 1, got {threshold}; 1.1 allows ten per cent")
    for results in (old, new):
        if results.scale == "tiny":
            raise ValueError("one of the results is of scale 'tiny', whose times mean nothing")
    found = Comparison(threshold)
    if old.device != new.device:
        found.notes.append(f"note: measured on {old.device} before and {new.device} now")
    before = {key: row for key, row in _ours(old).items() if row.ratio is not None}
    now = _ours(new)
    if not before.keys() & now.keys():
        raise ValueError("the two results have no case in common")
    only = len(before.keys() - now.keys())
    if only:
        found.notes.append(f"note: {only} cases of the old file are not in the new one")
    for key in before.keys() & now.keys():
        _judge(found, key, before[key], now[key])
    found.regressions.sort(key=lambda change: -(change.factor or float("inf")))
    found.improvements.sort(key=lambda change: change.factor)
    return found


def _judge(found: Comparison, key: tuple[str, str, str], old: Row, new: Row) -> None:
    change = Change(*key, old=old.ratio, new=new.ratio, missing=new.missing or "no ratio")
    if change.factor is None or (change.factor > found.threshold and _apart(slower=new, faster=old)):
        found.regressions.append(change)
    elif change.factor < 1 / found.threshold and _apart(slower=old, faster=new):
        found.improvements.append(change)
    else:
        found.unchanged += 1


def _apart(slower: Row, faster: Row) -> bool:
    """Neither median lies within the other's spread; counts have none."""
    low = slower.ratio * (slower.p20 / slower.value if slower.p20 and slower.value else 1.0)
    high = faster.ratio * (faster.p80 / faster.value if faster.p80 and faster.value else 1.0)
    return low > faster.ratio and slower.ratio > high


def _ours(results: Results) -> dict[tuple[str, str, str], Row]:
    return {
        (row.suite, row.case, row.contestant): row
        for row in results.rows
        if row.contestant.startswith(OURS) and row.contestant != row.baseline
    }
