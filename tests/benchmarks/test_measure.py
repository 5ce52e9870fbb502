"""How one contestant of a case is timed on a GPU, with the clocks replaced: the choice between them."""

import pytest
import torch

from benchmarks import measure
from benchmarks.suites import Case, Contestant, Work


@pytest.fixture
def clocks(monkeypatch):
    """Seconds that the graph's clock (or its error) and the events' clock say."""

    def set_clocks(graph: float | Exception, events: float = 2.0) -> None:
        def replay(calls, rounds):
            if isinstance(graph, Exception):
                raise graph
            return [graph] * rounds

        monkeypatch.setattr(measure, "graph_seconds", replay)
        monkeypatch.setattr(measure, "_event_seconds", lambda calls, rounds: [events] * rounds)
        monkeypatch.setattr(measure, "kernel_launches", lambda call: pytest.fail("a profiler ran"))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    return set_clocks


def test_a_graph_where_it_can_be_captured(clocks):
    clocks(graph=1.0)
    found = measure.on_gpu(Contestant([print]), rounds=5)
    assert found == {"value": 1.0, "p20": 1.0, "p80": 1.0, "clock": "graph"}
    assert measure.on_gpu(Contestant([print], capturable=False), rounds=5)["clock"] == "events"


def test_events_where_the_capture_fails(clocks):
    clocks(graph=RuntimeError("operation not permitted when stream is capturing"))
    found = measure.on_gpu(Contestant([print]), rounds=5)
    assert found["clock"] == "events" and found["value"] == 2.0


def test_no_memory_is_no_reason_for_another_clock(clocks):
    clocks(graph=torch.cuda.OutOfMemoryError("CUDA out of memory"))
    assert measure.on_gpu(Contestant([print]), rounds=5) == "OutOfMemoryError: CUDA out of memory"


def test_times_of_different_clocks_have_no_ratio(clocks):
    clocks(graph=1.0)
    contestants = {
        "eager": lambda: Contestant([print], capturable=False),
        "waits": lambda: Contestant([print], capturable=False),
        "graph": lambda: Contestant([print]),
    }
    case = Case(
        suite="adapter", name="a", what={}, baseline="eager", contestants=tuple(contestants),
        build=lambda: Work(contestants, lambda name: None),
    )  # fmt: skip
    gpu = type("Device", (), {"type": "cuda"})()
    rows = {row.contestant: row for row in measure.measure(case, None, gpu, rounds=2)}
    assert rows["waits"].ratio == 1.0
    assert rows["graph"].value == 1.0 and rows["graph"].ratio is None
