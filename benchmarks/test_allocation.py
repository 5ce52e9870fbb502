"""Allocation: scoring all triplets, selecting and masking; the chosen backend, the reference, PEFT's loop.

    pytest benchmarks/test_allocation.py
    python -m benchmarks.test_allocation [--rounds 30] [--threads 1] [--json FILE]

The adapters of DeBERTa-v3-base: 72 linears, r = 16, so 1,152 triplets of which half are kept. PEFT's
mask_to_budget does the same three things (and keeps fewer on ties). Selection alone is timed at 1,152 and at
65,536 triplets beside it. The second form lets all take turns.
"""

from collections.abc import Callable

import pytest
import torch

from adalora_fast.environment import environment, write_json
from adalora_fast.ops import allocate_, backend, importance_scores, importance_update_, select_triplets
from adalora_fast.ops.allocation import reference as plain_allocation
from adalora_fast.ops.importance import layout_of, reference, statistic_names
from benchmarks.adapters import DEVICE, RANK, SHAPES, make_parameters, peft_allocator
from benchmarks.turns import figures, finished, kernel_launches, options, show, take_turns

SCORE, SMOOTHING = "sensitivity", "ema_uncertainty"
TRIPLETS = RANK * len(SHAPES)
KEPT = TRIPLETS // 2
OURS = backend.choose("allocation", DEVICE.type).backend


def whole() -> dict[str, Callable[[], object]]:
    """Score, select and mask, from the same statistics."""
    parameters = make_parameters()
    allocator, model = peft_allocator(parameters)
    allocator.update_ipt(model)
    size = layout_of(parameters, SCORE).size
    statistics = torch.zeros(len(statistic_names(SCORE, SMOOTHING)), size, device=DEVICE)
    updates = torch.zeros(len(parameters), dtype=torch.int64, device=DEVICE)
    with torch.no_grad():
        importance_update_(parameters, [p.grad for p in parameters], statistics, updates, SCORE, SMOOTHING)
    budget, lambdas = torch.tensor(KEPT, device=DEVICE), parameters[1::3]

    @torch.no_grad()
    def ours() -> torch.Tensor:
        return allocate_(importance_scores(parameters, statistics, SCORE, SMOOTHING), budget, lambdas)

    @torch.no_grad()
    def plain() -> torch.Tensor:
        scores = reference.triplet_scores(parameters, statistics, SCORE, SMOOTHING)
        mask = plain_allocation.select(scores, budget)
        plain_allocation.apply_mask_(mask, lambdas)
        return mask

    return {"peft": lambda: allocator.mask_to_budget(model, KEPT), "reference": plain, OURS: ours}


def selection(triplets: int) -> dict[str, Callable[[], object]]:
    """The mask of the best half."""
    scores = torch.rand(triplets, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    budget = torch.tensor(triplets // 2, device=DEVICE)
    return {
        "reference": lambda: plain_allocation.select(scores, budget),
        OURS: lambda: select_triplets(scores, budget),
    }


def gate(running: dict[str, Callable[[], object]]) -> None:
    """No time is reported for a result that is wrong: there are no ties here, so that PEFT agrees too."""
    assert OURS != "reference", backend.choose("allocation", DEVICE.type).reasons
    mask = running[OURS]()
    assert torch.equal(mask, running["reference"]())
    if "peft" in running:
        pattern = running["peft"]()
        assert [kept for name in sorted(pattern) for kept in pattern[name]] == mask.tolist()


@pytest.mark.parametrize("name", ["peft", "reference", OURS])
def test_allocation(benchmark, name):
    running = whole()
    gate(running)
    benchmark(finished(running[name]))


@pytest.mark.parametrize("triplets", [TRIPLETS, 65536])
@pytest.mark.parametrize("name", ["reference", OURS])
def test_selection(benchmark, name, triplets):
    running = selection(triplets)
    gate(running)
    benchmark(finished(running[name]))


def main() -> None:
    arguments = options(__doc__)
    data = {
        "benchmark": "allocation",
        "device": str(DEVICE),
        "environment": environment(),
        "threads": arguments.threads,
    }
    results = {}
    for title, running, baseline in (
        (f"score, select and mask {TRIPLETS:,} triplets", whole(), "peft"),
        (f"select among {TRIPLETS:,} triplets", selection(TRIPLETS), "reference"),
        ("select among 65,536 triplets", selection(65536), "reference"),
    ):
        gate(running)
        times = take_turns(running, arguments.rounds)
        found = figures(times, baseline)
        show(f"{title}, {arguments.threads} thread(s)", found)
        launches = kernel_launches(running[OURS])
        results[title] = {"figures": found, "milliseconds": times, "kernel_launches": launches}
    if arguments.json:
        write_json(arguments.json, {**data, "results": results})


if __name__ == "__main__":
    main()
