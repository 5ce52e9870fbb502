"""The plan of a benchmark run, going through it in the time there is, and going on where one stopped.

The file of results is written after every case, so that a run that is killed loses one case at most. The same
command on the same code goes on with that file: cases that it has are not measured again, except those for
which there was no time.
"""

import contextlib
import hashlib
import importlib
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from adalora_fast.bench.results import Results, Row, read
from adalora_fast.environment import environment
from adalora_fast.ops.adapter.tuned import file_name
from benchmarks import measure, roofline
from benchmarks.roofline import Ceilings
from benchmarks.suites import Case

ROOT = Path(__file__).parents[1]
SUITES = ("adapter", "step", "importance", "orthogonality", "allocation", "inference", "memory", "growth")
CODE = ("adalora_fast/**/*.py", "adalora_fast/**/*.json", "csrc/**/*.*", "benchmarks/**/*.py")
RETRIED = ("no time left", "not run")  # how the reason of a row begins that a later run tries again
UNKNOWN_CASE = 15.0  # seconds that a suite's first case may take


def plan(scale: str, device: torch.device, only: Sequence[str] = ()) -> list[Case]:
    """Every case in the order in which they matter: the adapter's cases that are no goals come last.

    Raises:
        ValueError: ``only`` names a suite that does not exist.
    """
    if unknown := sorted(set(only) - set(SUITES)):
        raise ValueError(f"there is no suite {', '.join(unknown)}; choose from {', '.join(SUITES)}")
    cases, later = [], []
    for name in SUITES:
        if not only or name in only:
            listed = importlib.import_module(f"benchmarks.suites.{name}").cases(scale, device)
            for case in listed:
                (later if name == "adapter" and not case.what["goal"] else cases).append(case)
    return cases + later


def code_digest(root: Path = ROOT) -> str:
    """A digest of all code that figures depend on: the commit does not tell one edited tree from another."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in CODE for path in root.glob(pattern)}):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


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
        clock: a case that it leaves no time for is not started, one that is not done in time is given up.
        rounds: timed rounds of each contestant.
        seconds: that a case on a CPU is given, in up to ten times the rounds.
    """

    results: Results
    path: Path | None
    device: torch.device
    clock: Clock
    rounds: int = 20
    seconds: float = 0.0
    longest: dict[str, float] = field(default_factory=dict)  # seconds of a suite's longest case
    broken: str | None = None  # the case that the GPU did not survive

    def __call__(self, cases: list[Case]) -> None:
        planned = {(case.suite, case.name) for case in cases}
        self.results.rows = [row for row in self.results.rows if not _is_retried(row, planned)]
        done = self.results.done()
        found = self.results.ceilings
        ceilings = Ceilings(**found) if found else None
        for number, case in enumerate(cases, 1):
            if (case.suite, case.name) in done:
                continue
            title = f"[{number}/{len(cases)}] {case.suite}: {case.name}"
            if reason := self._why_not(case):
                self.results.rows += missing_rows(case, reason)
                continue
            began = time.monotonic()
            rows = self._measured(case, ceilings)
            seconds = time.monotonic() - began
            self.longest[case.suite] = max(seconds, self.longest.get(case.suite, 0.0))
            self.results.rows += rows
            self.write()
            missing = [row.contestant for row in rows if row.missing]
            without = f", without {', '.join(missing)}" if missing else ""
            print(f"{title}: {seconds:.1f} s{without}; {self.clock}", flush=True)
        self.write()

    def write(self) -> None:
        if self.path is not None:
            self.results.write(self.path)

    def _why_not(self, case: Case) -> str | None:
        if self.broken is not None:
            return f"not run: the GPU failed in {self.broken}; the same command goes on"
        if self.clock.left() < self.longest.get(case.suite, UNKNOWN_CASE):
            return self._no_time()
        return None

    def _no_time(self) -> str:
        return f"no time left in {self.clock.minutes:g} minutes; the same command goes on"

    def _ceilings_now(self) -> Ceilings:
        """A CPU shares its machine: what it can do is asked before each case, and the best of it is kept."""
        now = roofline.measure(self.device)
        known = self.results.ceilings
        self.results.ceilings = (now.best(Ceilings(**known)) if known else now).as_dict()
        return now

    def _measured(self, case: Case, ceilings: Ceilings | None) -> list[Row]:
        try:
            with _ends_after(self.clock.left()):
                if self.device.type == "cpu" and case.moved is not None:
                    ceilings = self._ceilings_now()
                rows = measure.measure(case, ceilings, self.device, self.rounds, self.seconds)
                if self.device.type == "cuda":
                    torch.cuda.synchronize()  # an error of the case's own work is raised here at the latest
            return rows
        except OutOfTime:
            return missing_rows(case, self._no_time())
        except Exception as error:  # one case must not end the others' run
            if self.device.type == "cuda" and not _works():
                self.broken = f"{case.suite}: {case.name}"
            return missing_rows(case, measure.reason(error))


def _works() -> bool:
    """Whether the GPU still takes work: after some errors it takes none from this process."""
    try:
        torch.cuda.synchronize()
        return bool(torch.ones(1, device="cuda").item() == 1)
    except RuntimeError:
        return False


def _is_retried(row: Row, planned: set[tuple[str, str]]) -> bool:
    again = row.missing is not None and row.missing.startswith(RETRIED)
    return again and (row.suite, row.case) in planned


def missing_rows(case: Case, reason: str) -> list[Row]:
    """A row per contestant that says why there is no figure."""
    same = {
        "suite": case.suite, "case": case.name, "what": case.what, "baseline": case.baseline,
        "unit": case.unit, "moved": case.moved, "operations": case.operations,
    }  # fmt: skip
    return [Row(**same, contestant=name, missing=reason) for name in case.contestants]


def unfinished(results: Results) -> int:
    """How many cases a later run will try again."""
    return len({(r.suite, r.case) for r in results.rows if r.missing and r.missing.startswith(RETRIED)})


def show(results: Results, path: Path | None) -> None:
    """The tables, what is left to do, and where the figures are."""
    from adalora_fast.bench.report import tables

    print(f"\n{tables(results)}\n")
    if left := unfinished(results):
        print(f"{left} cases are not measured yet; the same command goes on with them.")
    commit = results.environment["commit"]
    if commit is None or commit.endswith("+changes"):
        print(f"The tree is not that of a commit ({commit}): these figures are for looking, not for keeping.")
    if path is not None:
        print(f"Written to {path}")
