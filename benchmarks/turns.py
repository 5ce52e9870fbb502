"""Contestants that take turns in one process, and what is said of their times.

On a machine with other work only ratios mean something: what slows a round slows all of its contestants.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

WARM_UP = 3


def take_turns(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every contestant in every round; the first rounds, which warm up, are not timed.

    Where there is a GPU a turn ends when it has done all its work.
    """
    finish = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(rounds + WARM_UP):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            finish()
            if round_number >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def figures(times: dict[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """Median, 20th and 80th percentile of each; how many times faster than ``baseline``, round by round."""
    found = {}
    for name, milliseconds in times.items():
        cuts = statistics.quantiles(milliseconds, n=5)
        ratios = [base / own for base, own in zip(times[baseline], milliseconds, strict=True)]
        found[name] = {
            "median_ms": statistics.median(milliseconds),
            "p20_ms": cuts[0],
            "p80_ms": cuts[-1],
            f"times_faster_than_{baseline}": statistics.median(ratios),
        }
    return found


def finished(run: Callable[[], object]) -> Callable[[], object]:
    """``run``, and where there is a GPU the wait for it."""
    if not torch.cuda.is_available():
        return run
    return lambda: (run(), torch.cuda.synchronize())


def kernel_launches(run: Callable[[], object]) -> int | None:
    """How many kernels and copies a call runs on the GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in trace.events())


def show(title: str, found: dict[str, dict[str, float]]) -> None:
    """A line per contestant."""
    print(title)
    for name, figure in found.items():
        median, low, high, ratio = figure.values()
        print(f"  {name:12}{median:9.3f} ms   (p20 {low:.3f}, p80 {high:.3f})   {ratio:6.2f}x")


def options(description: str) -> argparse.Namespace:
    """The command line of a benchmark of turns; sets PyTorch's number of threads."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds (default 30)")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch's threads (default 1)")
    parser.add_argument("--json", type=Path, help="write the figures and the environment to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments
