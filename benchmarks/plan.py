"""A plan of parts that are run one after the other, each in a process of its own with a limit and a log file.

No part blocks the next: one that hangs is ended at its limit, one that fails is reported, and what a part
wrote before is kept. ``plan.json`` in the folder says after every part how far the plan is.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

LEAST = 3.0  # seconds: with less left a part is not started
UNFINISHED = 3  # exit code of a part that ended by itself because its time was over
MERCY = 5.0  # seconds between the request to end and the end
SHOWN = 8  # lines of a log that are printed when the part ends
WIDTH = 200


@dataclass(frozen=True, kw_only=True)
class Part:
    """One step of a plan.

    Args:
        name: also that of its log, NAME.log.
        what: in words.
        seconds: its limit; the plan's own end may come before.
        command: program and arguments; {seconds} and {minutes} in one stand for the time that it has.
        refusal: why it cannot run here; None where it can.
        environment: variables that are set for it.
    """

    name: str
    what: str
    seconds: float
    command: Sequence[str]
    refusal: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(kw_only=True)
class Outcome:
    """How a part ended.

    Args:
        verdict: ``done``, ``failed``, ``out of time``, ``interrupted``, or ``not run``.
        code: the process' exit code.
        why: in words, where it is not ``done``.
    """

    name: str
    verdict: str
    seconds: float = 0.0
    code: int | None = None
    why: str = ""


def run(
    parts: Sequence[Part],
    folder: Path,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
    mercy: float = MERCY,
) -> list[Outcome]:
    """Every part in its turn, for ``seconds`` in all; logs and ``plan.json`` go to the folder.

    An interruption (Ctrl-C, a request to end) ends the part that runs and leaves the others out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end, outcomes, stopped = clock() + seconds, [], False
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        for part in parts:
            left = end - clock()
            if part.refusal is not None:
                outcome = Outcome(name=part.name, verdict="not run", why=part.refusal)
            elif stopped:
                outcome = Outcome(name=part.name, verdict="not run", why="the plan was interrupted")
            elif left < LEAST:
                outcome = Outcome(name=part.name, verdict="not run", why="no time left")
            else:
                outcome = _run_part(part, folder, min(part.seconds, left), mercy)
                stopped = outcome.verdict == "interrupted"
            outcomes.append(outcome)
            _save(folder, outcomes)
            _show(part, outcome, folder, max(0.0, end - clock()))
    finally:
        signal.signal(signal.SIGTERM, before)
    return outcomes


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _run_part(part: Part, folder: Path, seconds: float, mercy: float) -> Outcome:
    began = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **part.environment}
    own = max(seconds - mercy, 1.0)  # it may end by itself
    times = {"{seconds}": f"{own:g}", "{minutes}": f"{own / 60:g}"}
    command = [times.get(argument, argument) for argument in part.command]
    with open(folder / f"{part.name}.log", "wb") as log:
        try:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True, env=environment,
            )  # fmt: skip
        except OSError as error:
            return Outcome(name=part.name, verdict="failed", why=str(error))
        verdict, why = "done", ""
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            verdict, why = "out of time", f"ended after {seconds:.0f} s"
        except KeyboardInterrupt:
            verdict, why = "interrupted", "interrupted"
        _end(process, mercy)
    if verdict == "done" and process.returncode == UNFINISHED:
        verdict, why = "out of time", "not all of it was done"
    elif verdict == "done" and process.returncode != 0:
        verdict, why = "failed", f"exit code {process.returncode}"
    return Outcome(
        name=part.name, verdict=verdict, seconds=round(time.monotonic() - began, 1),
        code=process.returncode, why=why,
    )  # fmt: skip


def _end(process: subprocess.Popen, mercy: float) -> None:
    """End the part and all that it started, which is a process group of its own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None and number == signal.SIGTERM:
            continue  # what is left of its group goes at once
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:  # nothing is left of it
            break
        try:
            process.wait(mercy)
        except subprocess.TimeoutExpired:
            continue


def _save(folder: Path, outcomes: list[Outcome]) -> None:
    text = json.dumps([asdict(outcome) for outcome in outcomes], indent=1)
    temporary = folder / ".plan.json"
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, folder / "plan.json")


def _show(part: Part, outcome: Outcome, folder: Path, left: float) -> None:
    why = f" ({outcome.why})" if outcome.why else ""
    minutes = f"{int(left) // 60}:{int(left) % 60:02}"
    print(f"=== {part.name}: {outcome.verdict}{why}, {outcome.seconds:.0f} s; {minutes} left", flush=True)
    log = folder / f"{part.name}.log"
    if outcome.verdict != "not run" and log.is_file():
        for line in log.read_text(errors="replace").splitlines()[-SHOWN:]:
            print(f"    {line[:WIDTH]}", flush=True)


def table(parts: Sequence[Part], outcomes: Sequence[Outcome]) -> str:
    """What became of every part, a line each."""
    lines = [f"{'part':<22}{'verdict':<13}{'seconds':>8}  what"]
    for part, outcome in zip(parts, outcomes, strict=True):
        seconds = f"{outcome.seconds:.0f}" if outcome.verdict != "not run" else ""
        why = f" [{outcome.why}]" if outcome.why else ""
        lines.append(f"{part.name:<22}{outcome.verdict:<13}{seconds:>8}  {part.what}{why}")
    return "\n".join(lines)


def exit_code(parts: Sequence[Part], outcomes: Sequence[Outcome]) -> int:
    """0 where every part that could run is done; 130 after an interruption; else 1."""
    if any(outcome.verdict == "interrupted" for outcome in outcomes):
        return 130
    could = [outcome for part, outcome in zip(parts, outcomes, strict=True) if part.refusal is None]
    return 0 if all(outcome.verdict == "done" for outcome in could) else 1


def listing(parts: Sequence[Part]) -> str:
    """The parts with their limits, without running them."""
    return "\n".join(
        f"{part.name:<22}{part.seconds:>5.0f} s  {part.what}"
        + (f" [not here: {part.refusal}]" if part.refusal else "")
        for part in parts
    )


def choose(parts: Sequence[Part], only: Sequence[str] = (), skip: Sequence[str] = ()) -> list[Part]:
    """The parts of these names, in the plan's order. A name may be the beginning of several: ``gate``.

    Raises:
        ValueError: a name fits no part.
    """

    def fits(part: Part, names: Sequence[str]) -> bool:
        return any(part.name == name or part.name.startswith(f"{name}-") for name in names)

    for name in (*only, *skip):
        if not any(fits(part, [name]) for part in parts):
            known = ", ".join(part.name for part in parts)
            raise ValueError(f"there is no part {name}; choose from {known}")
    chosen = [part for part in parts if not only or fits(part, only)]
    return [part for part in chosen if not fits(part, skip)]


def python(*arguments: str) -> list[str]:
    """A command of this interpreter."""
    return [sys.executable, *map(str, arguments)]
