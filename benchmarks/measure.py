"""A case measured: the gate first, then every contestant on the clock that suits the device.

On a CPU contestants take turns, so that other work on the machine slows all of them; a ratio is the median of
the rounds' ratios. On a GPU each is timed as replays of a CUDA graph with inputs that the cache does not
hold, or, where a graph cannot contain it, by events around eager calls.
"""

import gc
import statistics
from collections.abc import Callable

import torch

from adalora_fast.bench.results import Row
from adalora_fast.ops.timing import graph_seconds
from benchmarks.roofline import Ceilings
from benchmarks.suites import Case, Contestant
from benchmarks.turns import kernel_launches, take_turns

WARM_UP = 3


def measure(
    case: Case, ceilings: Ceilings | None, device: torch.device, rounds: int = 20, seconds: float = 0.0
) -> list[Row]:
    """A row per contestant; nothing is timed that does not pass the gate.

    Contestants in turns get more than ``rounds``, up to ten times as many, until ``seconds`` are over.
    """
    work = case.build()
    ready: dict[str, Contestant] = {}
    missing: dict[str, str] = {}
    for name, make in work.contestants.items():
        try:
            contestant = make()
            work.gate(name)
            ready[name] = contestant
        except Exception as error:  # whatever a peer does wrong must not end the others' run
            missing[name] = reason(error)
    if case.unit != "seconds":
        found = {name: _counted(contestant) for name, contestant in ready.items()}
    elif device.type == "cuda":
        found = {name: on_gpu(contestant, rounds) for name, contestant in ready.items()}
    else:
        found = _in_turns(ready, case.baseline, rounds, seconds)
    rows = []
    for name in work.contestants:
        if name in ready and isinstance(found[name], str):
            missing[name] = found[name]
        rows.append(_row(case, name, found.get(name), missing.get(name), found, ceilings))
    del work, ready
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


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


def _in_turns(ready: dict[str, Contestant], baseline: str, rounds: int, seconds: float) -> dict[str, dict]:
    calls = {name: contestant.calls[0] for name, contestant in ready.items()}
    times = take_turns(calls, rounds, seconds) if calls else {}
    found = {}
    for name, milliseconds in times.items():
        found[name] = {**_spread([one / 1e3 for one in milliseconds]), "clock": "host"}
        if baseline in times:
            pairs = zip(milliseconds, times[baseline], strict=True)
            found[name]["ratio"] = statistics.median(own / base for own, base in pairs)
    return found


def on_gpu(contestant: Contestant, rounds: int) -> dict | str:
    """Value, percentiles, clock and launches of a contestant as in a row, or why there is none."""
    try:
        seconds = _graph_seconds(contestant.calls, rounds) if contestant.capturable else None
        clock = "events" if seconds is None else "graph"
        seconds = seconds or _event_seconds(contestant.calls, rounds)
        return {**_spread(seconds), "clock": clock, "launches": kernel_launches(contestant.calls[0])}
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


def _row(
    case: Case, name: str, found: dict | str | None, missing: str | None, all_found: dict, ceilings: Ceilings
) -> Row:
    same = {
        "suite": case.suite, "case": case.name, "what": case.what, "contestant": name,
        "baseline": case.baseline, "unit": case.unit, "moved": case.moved, "operations": case.operations,
    }  # fmt: skip
    if missing is not None:
        return Row(**same, missing=missing)
    base = all_found.get(case.baseline)
    ratio = found.get("ratio")
    if ratio is None and isinstance(base, dict) and base["value"] and base["clock"] == found["clock"]:
        ratio = found["value"] / base["value"]
    floor = None
    if ceilings is not None and case.moved is not None and case.unit == "seconds":
        floor = ceilings.floor(case.moved, case.operations or 0.0, case.dtype)
    return Row(**same, floor=floor, **{**found, "ratio": ratio})
