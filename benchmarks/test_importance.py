"""The importance update of DeBERTa-v3-base's adapters: the chosen backend, the reference, PEFT's loop.

    pytest benchmarks/test_importance.py
    python -m benchmarks.test_importance [--rounds 30] [--threads 1] [--json FILE]

72 adapted linears, r = 16, float32: 2.66 million entries in 216 parameters, sensitivity with
ema_uncertainty, which is what PEFT computes. The floor reads weight and gradient, and reads and writes two
statistics: 24 bytes an entry. The C++ kernel reads weights and gradients twice, since a step that overflowed
may change nothing. The second form lets all take turns, with a copy that moves as many bytes as the floor.
"""

from collections.abc import Callable

import pytest
import torch

from adalora_fast.environment import environment, write_json
from adalora_fast.ops import backend, importance_update_
from adalora_fast.ops.importance import layout_of, reference, statistic_names
from benchmarks.adapters import DEVICE, make_parameters, peft_allocator
from benchmarks.turns import figures, finished, kernel_launches, options, show, take_turns

SCORE, SMOOTHING, BETA = "sensitivity", "ema_uncertainty", 0.85
BYTES_PER_ENTRY = 24
OURS = backend.choose("importance", DEVICE.type).backend


def contestants() -> dict[str, Callable[[], object]]:
    """PEFT's loop, the reference and the op, each with statistics of its own over the same parameters."""
    parameters = make_parameters()
    grads = [parameter.grad for parameter in parameters]
    size = layout_of(parameters, SCORE).size
    allocator, model = peft_allocator(parameters, BETA)

    def ours(update: Callable) -> Callable[[], torch.Tensor]:
        statistics = torch.zeros(len(statistic_names(SCORE, SMOOTHING)), size, device=DEVICE)
        updates = torch.zeros(len(parameters), dtype=torch.int64, device=DEVICE)

        def run() -> torch.Tensor:
            with torch.no_grad():
                update(parameters, grads, statistics, updates, SCORE, SMOOTHING, BETA, BETA)
            return statistics

        return run

    source, target = (torch.ones(size * BYTES_PER_ENTRY // 8, device=DEVICE) for _ in range(2))
    return {
        "peft": lambda: allocator.update_ipt(model),
        "reference": ours(reference.update_),
        OURS: ours(importance_update_),
        "copy": lambda: target.copy_(source),
    }


def gate(running: dict[str, Callable[[], object]]) -> None:
    """No time is reported for a result that is wrong."""
    assert OURS != "reference", backend.choose("importance", DEVICE.type).reasons
    torch.testing.assert_close(running[OURS](), running["reference"](), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["peft", "reference", OURS, "copy"])
def test_importance_update(benchmark, name):
    running = contestants()
    gate(running)
    benchmark(finished(running[name]))


def main() -> None:
    arguments = options(__doc__)
    running = contestants()
    gate(running)
    times = take_turns(running, arguments.rounds)
    found = figures(times, "peft")
    size = layout_of(make_parameters(), SCORE).size
    rates = {name: BYTES_PER_ENTRY * size / figure["median_ms"] / 1e6 for name, figure in found.items()}
    show(f"importance update of {size:,} entries, {arguments.threads} thread(s)", found)
    print("GB/s of the floor's bytes:", {name: round(rate, 1) for name, rate in rates.items()})
    if arguments.json:
        data = {"benchmark": "importance", "environment": environment(), "threads": arguments.threads}
        data |= {"device": str(DEVICE), "kernel_launches": kernel_launches(running[OURS])}
        data |= {"entries": size, "floor_bytes": BYTES_PER_ENTRY * size, "figures": found}
        write_json(arguments.json, {**data, "gigabytes_per_second": rates, "milliseconds": times})


if __name__ == "__main__":
    main()
