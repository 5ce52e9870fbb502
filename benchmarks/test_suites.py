"""The suites of single operators under pytest-benchmark: every contestant of every case, the gate first.

    pytest benchmarks            (a CPU: the quick cases; a GPU: all of them)

On a GPU the time that counts is ``extra_info["seconds"]``, replays of a CUDA graph with inputs that the cache
does not hold; pytest-benchmark's own clock sees the host alone. ``benchmarks/gpu.py`` and ``benchmarks.cpu``
measure the same cases with all contestants side by side.
"""

import gc
from collections.abc import Iterator

import pytest
import torch

from benchmarks import measure, roofline, runner
from benchmarks.suites import Case, Contestant, Work

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
OPERATORS = ("adapter", "importance", "orthogonality", "allocation")
CASES = runner.plan("full" if CUDA else "quick", DEVICE, OPERATORS)
PAIRS = [
    pytest.param(case, name, id=f"{case.suite} {case.name} {name}".replace(" ", "-"))
    for case in CASES
    for name in case.contestants
]


@pytest.fixture(scope="session")
def ceilings() -> roofline.Ceilings:
    """What this device can do at best, measured in this run."""
    return roofline.measure(DEVICE)


@pytest.fixture(scope="module")
def built() -> Iterator[dict[str, Work]]:
    """The inputs of one case, which its contestants share."""
    before = torch.get_num_threads()
    if not CUDA:
        torch.set_num_threads(1)  # ratios are steadier so
    works: dict[str, Work] = {}
    yield works
    works.clear()
    torch.set_num_threads(before)


def ready(built: dict[str, Work], case: Case, name: str) -> Contestant:
    """The contestant, which has passed the gate; skips where it cannot take part."""
    key = f"{case.suite} {case.name}"
    if key not in built:
        built.clear()  # the last case's inputs go before the next one's come
        gc.collect()
        torch.cuda.empty_cache()
        built[key] = case.build()
    try:
        contestant = built[key].contestants[name]()
        built[key].gate(name)
    except AssertionError:
        raise
    except Exception as error:
        if name == "adalora_fast":
            raise
        pytest.skip(measure.reason(error))
    return contestant


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_contestant(benchmark, ceilings, built, case, name):
    contestant = ready(built, case, name)
    moved, operations = case.moved, case.operations or 0.0
    floor = ceilings.floor(moved, operations, case.dtype)
    benchmark.group = f"{case.suite}: {case.name}"
    benchmark.extra_info.update(case.what, device=str(DEVICE), contestant=name, bytes=moved, floor=floor)
    if not CUDA:
        benchmark(contestant.calls[0])
        return
    found = measure.on_gpu(contestant, rounds=20)
    if isinstance(found, str):
        (pytest.fail if name == "adalora_fast" else pytest.skip)(found)
    seconds = found.pop("value")
    benchmark.extra_info.update(found, seconds=seconds, achieved=floor / seconds)
    benchmark.pedantic(lambda: (contestant.calls[0](), torch.cuda.synchronize()), rounds=5, iterations=1)
