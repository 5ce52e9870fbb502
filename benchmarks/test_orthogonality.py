"""The orthogonality regulariser of DeBERTa-v3-base's adapters, value and gradient: ours and PEFT's loop.

    pytest benchmarks/test_orthogonality.py
    python -m benchmarks.test_orthogonality [--rounds 30] [--threads 1] [--json FILE]

144 factors of 72 linears, r = 16, float32, Frobenius norm, which is what PEFT computes in its forward. The
floor reads every factor and writes its gradient: 8 bytes an entry. The second form lets all take turns, with
a copy that moves as many bytes.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from adalora_fast.environment import environment, write_json
from adalora_fast.ops import backend, orthogonality
from benchmarks.adapters import DEVICE, make_parameters
from benchmarks.turns import figures, finished, kernel_launches, options, show, take_turns

BYTES_PER_ENTRY = 8
OURS = f"adalora_fast ({backend.choose('orthogonality', DEVICE.type).backend})"


def peft_loop(factors: list[Tensor]) -> Tensor:
    """The loop of PEFT's AdaLoraModel.forward: mean over the factors of ‖P' P'ᵀ - I‖."""
    total = 0
    for number, factor in enumerate(factors):
        cov = factor @ factor.T if number % 2 == 0 else factor.T @ factor  # lora_A, lora_B, lora_A, ...
        identity = torch.eye(*cov.size(), out=torch.empty_like(cov))
        identity.requires_grad = False
        total += torch.norm(cov - identity, p="fro")
    return total / len(factors)


def contestants() -> dict[str, Callable[[], list[Tensor]]]:
    """Each returns the gradients of all factors."""
    parameters = make_parameters()
    factors = [factor for number, factor in enumerate(parameters) if number % 3 != 1]
    entries = sum(factor.numel() for factor in factors)
    source, target = (torch.ones(entries * BYTES_PER_ENTRY // 8, device=DEVICE) for _ in range(2))
    return {
        "peft": lambda: list(torch.autograd.grad(peft_loop(factors), factors)),
        OURS: lambda: list(torch.autograd.grad(orthogonality(factors[0::2], factors[1::2])[0], factors)),
        "copy": lambda: [target.copy_(source)],
    }


def gate(running: dict[str, Callable[[], list[Tensor]]]) -> None:
    """No time is reported for a result that is wrong."""
    for ours, theirs in zip(running[OURS](), running["peft"](), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["peft", OURS, "copy"])
def test_orthogonality(benchmark, name):
    running = contestants()
    gate(running)
    benchmark(finished(running[name]))


def main() -> None:
    arguments = options(__doc__)
    running = contestants()
    gate(running)
    times = take_turns(running, arguments.rounds)
    found = figures(times, "peft")
    show(f"orthogonality of 144 factors, value and gradient, {arguments.threads} thread(s)", found)
    if arguments.json:
        data = {"benchmark": "orthogonality", "environment": environment(), "threads": arguments.threads}
        data |= {"device": str(DEVICE), "kernel_launches": kernel_launches(running[OURS])}
        write_json(arguments.json, {**data, "figures": found, "milliseconds": times})


if __name__ == "__main__":
    main()
