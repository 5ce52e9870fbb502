"""The cases of a benchmark run, going through them in the time there is, and going on where one stopped.

The file of results is written after every contestant (on a CPU, where contestants take turns, after every
case), so that a run that is killed loses one figure at most. The same command on the same code goes on with
that file: what it has is not measured again, except that for which there was no time.
"""

import contextlib
import importlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from adalora_fast.environment import environment
from adalora_fast.ops.adapter.tuned import file_name
from benchmarks import measure, roofline
from benchmarks.digest import code_digest
from benchmarks.report.results import Results, Row, read
from benchmarks.roofline import Ceilings
from benchmarks.suites import Case, apart, is_compiled

SUITES = ("adapter", "step", "importance", "orthogonality", "allocation", "inference", "memory", "growth")
NO_TIME = "no time left"
RETRIED = (NO_TIME, "not run")  # how the reason of a row begins that a later run tries again
UNKNOWN_CASE = 15.0  # seconds that a suite's first case may take


def plan(scale: str, device: torch.device, only: Sequence[str] = ()) -> list[Case]:
    """Every case in the order in which they matter: the adapter's cases that are no goals come after the
    others, and every compiled peer is a case of its own at the end.

    Raises:
        ValueError: ``only`` names a suite that does not exist.
    """
    if unknown := sorted(set(only) - set(SUITES)):
        raise ValueError(f"there is no suite {', '.join(unknown)}; choose from {', '.join(SUITES)}")
    cases, later, compiled = [], [], []
    for name in SUITES:
        if only and name not in only:
            continue
        listed = importlib.import_module(f"benchmarks.suites.{name}").cases(scale, device)
        for case in (part for whole in listed for part in apart(whole)):
            minor = name == "adapter" and not case.what["goal"]
            (compiled if is_compiled(case) else later if minor else cases).append(case)
    return [*cases, *later, *compiled]


def new_results(device: torch.device, scale: str) -> Results:
    """Results without rows, with the environment of this run."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    name = file_name(gpu).removesuffix(".json") if gpu else "cpu"
    return Results(device=name, environment={**environment(), "code": code_digest()}, scale=scale)


def _same_run(found: Results, fresh: Results) -> bool:
    """Whether figures of both may stand in one file."""
    if (found.device, found.scale) != (fresh.device, fresh.scale):
        return False
    if any(found.environment.get(key) != fresh.environment[key] for key in ("commit", "code", "versions")):
        return False
    keys = ("processor", "threads", "gpus")
    return all(found.environment["machine"].get(key) == fresh.environment["machine"][key] for key in keys)


def open_results(fresh: Results, output: Path | None, folder: Path) -> tuple[Results, Path]:
    """The results to go on with and their file: ``output``, or the one in ``folder`` that an earlier run of
    the same code left, or a new one with the date as its name.

    Raises:
        ValueError: ``output`` holds something else.
    """
    if output is not None:
        if not output.exists():
            return fresh, output
        found = read(output)
        if not _same_run(found, fresh):
            raise ValueError(
                f"{output} holds results of other code, versions or another machine; name another file"
            )
        return found, output
    for path in sorted(folder.glob("*.json"), reverse=True):
        try:
            found = read(path)
        except ValueError:  # figures of another kind
            continue
        if _same_run(found, fresh):
            return found, path
    date = datetime.now(UTC).date().isoformat()
    names = (f"{date}.json", *(f"{date}-{number}.json" for number in range(2, 1000)))
    return fresh, next(folder / name for name in names if not (folder / name).exists())


@dataclass
class Clock:
    """The time of a run; ``minutes`` None: as long as it takes."""

    minutes: float | None = None
    began: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds."""
        if self.minutes is None:
            return float("inf")
        return self.began + 60 * self.minutes - time.monotonic()

    def __str__(self) -> str:
        if self.minutes is None:
            return f"{time.monotonic() - self.began:.0f} s gone"
        seconds = max(0, round(self.left()))
        return f"{seconds // 60}:{seconds % 60:02} left"


class OutOfTime(BaseException):
    """Raised within a case at the end of the time: no case takes it for a contestant's error."""


@contextlib.contextmanager
def _ends_after(seconds: float) -> Iterator[None]:
    """Raise :class:`OutOfTime` within the context when its time is over."""
    if seconds == float("inf"):
        yield
        return

    def ring(*arguments: object) -> None:
        raise OutOfTime

    handler = signal.signal(signal.SIGALRM, ring)
    timer = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


@dataclass
class Run:
    """Going through a plan.

    Args:
        results: what there is already, and where rows are added.
        path: their file; None writes nothing.
        device: where contestants run.
        clock: a case that it leaves no time for is not started, one that is not done in time is given up,
            but for the contestants that are done.
        rounds: timed rounds of each contestant.
        seconds: that a case on a CPU is given, in up to ten times the rounds.
        blocked: says why a contestant of a case may not be timed, or None.
    """

    results: Results
    path: Path | None
    device: torch.device
    clock: Clock
    rounds: int = 20
    seconds: float = 0.0
    blocked: Callable[[Case, str], str | None] = lambda case, name: None
    longest: dict[str, float] = field(default_factory=dict)  # seconds of a suite's longest case
    broken: str | None = None  # the case that the GPU did not survive

    def __call__(self, cases: list[Case]) -> None:
        for number, case in enumerate(cases, 1):
            found = self._forget_what_is_tried_again(case)
            left = [name for name in case.contestants if name not in found]
            if not left:
                continue
            reasons = {name: reason for name in left if (reason := self.blocked(case, name))}
            if len(reasons) < len(left) and (reason := self._why_not(case)):
                reasons = dict.fromkeys(left, reason)
            self.results.rows += [missing_row(case, name, reason) for name, reason in reasons.items()]
            if len(reasons) == len(left):
                continue
            began = time.monotonic()
            self._measure(case, {*found, *reasons})
            seconds = time.monotonic() - began
            self.longest[case.suite] = max(seconds, self.longest.get(case.suite, 0.0))
            self.write()
            rows = self._rows(case)
            missing = [name for name, row in rows.items() if row.missing]
            without = f", without {', '.join(missing)}" if missing else ""
            title = f"[{number}/{len(cases)}] {case.suite}: {case.name}"
            print(f"{title}: {seconds:.1f} s{without}; {self.clock}", flush=True)
        self.write()

    def write(self) -> None:
        if self.path is not None:
            self.results.write(self.path)

    def count_launches(self, cases: list[Case]) -> None:
        """Fill in the launches of what was timed. A profiler runs here: time nothing afterwards."""
        for number, case in enumerate(cases, 1):
            rows = {name: row for name, row in self._rows(case).items() if row.value and row.launches is None}
            rows = {name: row for name, row in rows.items() if row.unit == "seconds"}
            if not rows or self._why_not(case):
                continue
            try:
                with _ends_after(self.clock.left()):
                    counts = measure.count_launches(case, list(rows))
            except OutOfTime:
                break
            for name, launches in counts.items():
                place = self.results.rows.index(rows[name])
                self.results.rows[place] = replace(rows[name], launches=launches)
            self.write()
            print(f"[{number}/{len(cases)}] {case.suite}: {case.name}: launches {counts}", flush=True)

    def _rows(self, case: Case) -> dict[str, Row]:
        """The rows of a case by contestant."""
        here = (case.suite, case.name)
        return {row.contestant: row for row in self.results.rows if (row.suite, row.case) == here}

    def _forget_what_is_tried_again(self, case: Case) -> dict[str, Row]:
        """The rows of a case that stay. Contestants that take turns are measured together or not at all."""
        rows = self._rows(case)
        again = [row for row in rows.values() if row.missing and row.missing.startswith(RETRIED)]
        if again and self.device.type == "cpu" and case.unit == "seconds":
            again = list(rows.values())
        self.results.rows = [row for row in self.results.rows if row not in again]
        return {name: row for name, row in rows.items() if row not in again}

    def _why_not(self, case: Case) -> str | None:
        if self.broken is not None:
            return f"not run: the GPU failed in {self.broken}; the same command goes on"
        if self.clock.left() < self.longest.get(case.suite, UNKNOWN_CASE):
            return self._no_time()
        return None

    def _no_time(self) -> str:
        return f"{NO_TIME} in {self.clock.minutes:g} minutes; the same command goes on"

    def _ceilings(self, case: Case) -> Ceilings | None:
        """A CPU shares its machine: what it can do is asked before each case, and the best of it is kept."""
        known = self.results.ceilings
        if self.device.type != "cpu" or case.moved is None:
            return Ceilings(**known) if known else None
        now = roofline.measure(self.device)
        self.results.ceilings = (now.best(Ceilings(**known)) if known else now).as_dict()
        return now

    def _measure(self, case: Case, leave_out: set[str]) -> None:
        """Add the rows of a case, each as soon as it is there."""
        known = self._rows(case).get(case.baseline)
        base = {"value": known.value, "clock": known.clock} if known is not None and known.value else None
        try:
            with _ends_after(self.clock.left()):
                ceilings = self._ceilings(case)
                options = {"leave_out": leave_out, "base": base}
                for row in measure.each(case, ceilings, self.device, self.rounds, self.seconds, **options):
                    if self.device.type == "cuda" and not _works():
                        self.broken = f"{case.suite}: {case.name}, {row.contestant}"
                        row = missing_row(case, row.contestant, row.missing or "the GPU failed in it")
                    self.results.rows.append(row)
                    self.write()
                    if self.broken is not None:
                        break
            self._fill(case, self._why_not(case) or "no contestant of this name was made")
        except OutOfTime:
            self._fill(case, self._no_time())
        except Exception as error:  # one case must not end the others' run
            if self.device.type == "cuda" and not _works():
                self.broken = f"{case.suite}: {case.name}"
            self._fill(case, measure.reason(error))

    def _fill(self, case: Case, reason: str) -> None:
        """A row that says why there is no figure for every contestant that has none."""
        there = self._rows(case)
        self.results.rows += [missing_row(case, n, reason) for n in case.contestants if n not in there]


def _works() -> bool:
    """Whether the GPU still takes work: after some errors it takes none from this process."""
    try:
        torch.cuda.synchronize()
        return bool(torch.ones(1, device="cuda").item() == 1)
    except RuntimeError:
        return False


def missing_row(case: Case, name: str, reason: str) -> Row:
    """A row that says why there is no figure."""
    return Row(
        suite=case.suite, case=case.name, what=case.what, contestant=name, baseline=case.baseline,
        unit=case.unit, moved=case.moved, operations=case.operations, missing=reason,
    )  # fmt: skip


def unfinished(results: Results) -> int:
    """How many cases a later run will try again."""
    return len({(r.suite, r.case) for r in results.rows if r.missing and r.missing.startswith(RETRIED)})


def no_time_left(results: Results, cases: list[Case]) -> bool:
    """Whether there was no time for some of these cases."""
    here = {(case.suite, case.name) for case in cases}
    reasons = [row.missing or "" for row in results.rows if (row.suite, row.case) in here]
    return any(reason.startswith(NO_TIME) for reason in reasons)


def show(results: Results, path: Path | None) -> None:
    """The tables, what is left to do, and where the figures are."""
    from benchmarks.report.report import tables

    print(f"\n{tables(results)}\n")
    if left := unfinished(results):
        print(f"{left} cases are not measured yet; the same command goes on with them.")
    commit = results.environment["commit"]
    if commit is None or commit.endswith("+changes"):
        print(f"The tree is not that of a commit ({commit}): these figures are for looking, not for keeping.")
    if path is not None:
        print(f"Written to {path}")
