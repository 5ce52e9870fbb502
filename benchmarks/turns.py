"""Contestants that take turns in one process.

On a machine with other work only ratios mean something: what slows a round slows all of its contestants.
"""

import time
from collections.abc import Callable

import torch

WARM_UP = 3
MOST = 10  # times as many rounds, where a round is short


def take_turns(
    contestants: dict[str, Callable[[], object]], rounds: int, seconds: float = 0.0
) -> dict[str, list[float]]:
    """Milliseconds of every contestant in every round; the first rounds, which warm up, are not timed.

    Whoever begins a round begins the next one last. There are at least ``rounds`` of them, and up to ten
    times as many until ``seconds`` are over. Where there is a GPU a turn ends when it has done all its work.
    """
    finish = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    began, number = time.perf_counter(), -WARM_UP
    while number < rounds or (number < MOST * rounds and time.perf_counter() - began < seconds):
        for name in order:
            start = time.perf_counter()
            contestants[name]()
            finish()
            if number >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
        order.append(order.pop(0))
        number += 1
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
