"""How long work takes on a GPU: replays of a CUDA graph, with inputs that the cache does not hold."""

import statistics
from collections.abc import Callable, Sequence

import torch

COLD_BYTES = 256 * 2**20  # more than any L2: inputs together at least this large are read from memory
WARM_UP_RUNS = 3


def input_sets(bytes_each: int) -> int:
    """How many sets of inputs of this size must take turns for each to be cold."""
    return max(2, min(64, -(-COLD_BYTES // max(bytes_each, 1))))


def graph_seconds(calls: Sequence[Callable[[], object]], repeats: int = 20) -> list[float]:
    """Seconds of one call, measured ``repeats`` times as a replay of a graph that makes every call once.

    The calls do the same work on different inputs (:func:`input_sets`). Launch gaps are those of a graph;
    host time is not part of it.

    Raises:
        RuntimeError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("timing a graph needs a CUDA device, none is visible")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, allocates
        for _ in range(WARM_UP_RUNS):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    seconds = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        seconds.append(start.elapsed_time(stop) / 1e3 / len(calls))
    return seconds


def median_seconds(calls: Sequence[Callable[[], object]]) -> float:
    """The median of :func:`graph_seconds`."""
    return statistics.median(graph_seconds(calls))
