"""Contestants that take turns in one process.

On a machine with other work only ratios mean something: what slows a round slows all of its contestants.
"""

import time
from collections.abc import Callable

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


def kernel_launches(run: Callable[[], object]) -> int | None:
    """How many kernels and copies a call runs on the GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in trace.events())
