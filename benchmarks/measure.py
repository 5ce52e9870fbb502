"""A case measured: the gate first, then every contestant on the clock that suits the device.

On a CPU contestants take turns, so that other work on the machine slows all of them; a ratio is the median
of the rounds' ratios. On a GPU one contestant after the other is made, checked and timed, as replays of a
CUDA graph with inputs that the cache does not hold, or, where a graph cannot contain it, by events around
eager calls; what is done stays where the next one takes too long. No profiler runs here: once one has run,
launches take longer in the whole process, so launches are counted by :func:`count_launches`, in a process
that times nothing.
"""

import gc
import statistics
from collections.abc import Callable, Collection, Iterator

import torch

from adalora_fast.ops.dispatch.timing import graph_seconds
from benchmarks.report.results import Row
from benchmarks.roofline import Ceilings
from benchmarks.suites import Case, Contestant, Work
from benchmarks.turns import kernel_launches, take_turns

WARM_UP = 3


def measure(
    case: Case, ceilings: Ceilings | None, device: torch.device, rounds: int = 20, seconds: float = 0.0
) -> list[Row]:
    """A row per contestant, as :func:`each` has them."""
    return list(each(case, ceilings, device, rounds, seconds))


def each(
    case: Case,
    ceilings: Ceilings | None,
    device: torch.device,
    rounds: int = 20,
    seconds: float = 0.0,
    leave_out: Collection[str] = (),
    base: dict | None = None,
) -> Iterator[Row]:
    """A row per contestant, each when it is known; nothing is timed that does not pass the gate.

    Args:
        rounds, seconds: contestants in turns get more than ``rounds``, up to ten times as many, until
            ``seconds`` are over.
        leave_out: contestants that are not measured.
        base: the baseline's value and clock, where it was measured before.
    """
    work = case.build()
    names = [name for name in work.contestants if name not in leave_out]
    if case.unit == "seconds" and device.type != "cuda":
        found = _in_turns(work, names, case.baseline, rounds, seconds)
        yield from (_row(case, name, found[name], base, ceilings) for name in names)
    else:
        names.sort(key=lambda name: name != case.baseline)  # the baseline first: ratios need it
        for name in names:
            figures = _alone(work, name, case.unit, rounds)
            if name == case.baseline and isinstance(figures, dict):
                base = figures
            yield _row(case, name, figures, base, ceilings)
            gc.collect()
    del work
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _alone(work: Work, name: str, unit: str, rounds: int) -> dict | str:
    """Figures of one contestant, or why there are none: whatever a peer does wrong must not end the run."""
    try:
        contestant = work.contestants[name]()
        work.gate(name)
    except Exception as error:
        return reason(error)
    return on_gpu(contestant, rounds) if unit == "seconds" else _counted(contestant)


def count_launches(case: Case, names: Collection[str]) -> dict[str, int]:
    """Kernels and copies of one call of these contestants of a case, in a profiler; of those that can run."""
    work, found = case.build(), {}
    for name in names:
        try:
            found[name] = kernel_launches(work.contestants[name]().calls[0])
        except Exception as error:
            print(f"launches of {name} in {case.name} are not counted: {reason(error)}", flush=True)
    return found


def reason(error: Exception) -> str:
    """Why a figure is missing, in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _spread(seconds: list[float]) -> dict[str, float]:
    if len(seconds) < 2:
        return {"value": seconds[0]}
    cuts = statistics.quantiles(seconds, n=5, method="inclusive")
    return {"value": statistics.median(seconds), "p20": cuts[0], "p80": cuts[-1]}


def _counted(contestant: Contestant) -> dict | str:
    try:
        return {"value": float(contestant.calls[0]()), "clock": "count"}
    except Exception as error:
        return reason(error)


def _in_turns(
    work: Work, names: list[str], baseline: str, rounds: int, seconds: float
) -> dict[str, dict | str]:
    found: dict[str, dict | str] = {}
    calls: dict[str, Callable[[], object]] = {}
    for name in names:
        try:
            contestant = work.contestants[name]()
            work.gate(name)
            calls[name] = contestant.calls[0]
        except Exception as error:  # whatever a peer does wrong must not end the others' run
            found[name] = reason(error)
    times = take_turns(calls, rounds, seconds) if calls else {}
    for name, milliseconds in times.items():
        found[name] = {**_spread([one / 1e3 for one in milliseconds]), "clock": "host"}
        if baseline in times:
            pairs = zip(milliseconds, times[baseline], strict=True)
            found[name]["ratio"] = statistics.median(own / base for own, base in pairs)
    return found


def on_gpu(contestant: Contestant, rounds: int) -> dict | str:
    """Value, percentiles and clock of a contestant as in a row, or why there is none."""
    try:
        seconds = _graph_seconds(contestant.calls, rounds) if contestant.capturable else None
        clock = "events" if seconds is None else "graph"
        seconds = seconds or _event_seconds(contestant.calls, rounds)
        return {**_spread(seconds), "clock": clock}
    except Exception as error:  # out of memory, an error of the device
        return reason(error)


def _graph_seconds(calls: list[Callable[[], object]], rounds: int) -> list[float] | None:
    """None where the calls run, but not inside of a graph."""
    try:
        return graph_seconds(calls, rounds)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:
        torch.cuda.synchronize()
        return None


def _event_seconds(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """Seconds of one eager call, host time included where the device waits for it."""
    for _ in range(WARM_UP):
        for call in calls:
            call()
    seconds = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for call in calls:
            call()
        stop.record()
        stop.synchronize()
        seconds.append(start.elapsed_time(stop) / 1e3 / len(calls))
    return seconds


def _row(case: Case, name: str, found: dict | str, base: dict | None, ceilings: Ceilings | None) -> Row:
    same = {
        "suite": case.suite, "case": case.name, "what": case.what, "contestant": name,
        "baseline": case.baseline, "unit": case.unit, "moved": case.moved, "operations": case.operations,
    }  # fmt: skip
    if isinstance(found, str):
        return Row(**same, missing=found)
    ratio = found.get("ratio")
    if ratio is None and base is not None and base["value"] and base["clock"] == found["clock"]:
        ratio = found["value"] / base["value"]
    floor = None
    if ceilings is not None and case.moved is not None and case.unit == "seconds":
        floor = ceilings.floor(case.moved, case.operations or 0.0, case.dtype)
    return Row(**same, floor=floor, **{**found, "ratio": ratio})
