"""What one adapter call costs beside its arithmetic: forward and backward of a layer too small to matter.

    python -m benchmarks.call_overhead [--calls 2000] [--json FILE]

Three ways take turns in blocks on one thread: the eager path, the same op through PyTorch's dispatcher, and
PEFT's layer. Figures are microseconds per forward and backward, the median of the blocks.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import SVDLinear
from torch import nn

from adalora_fast.environment import environment, write_json
from adalora_fast.integrations.layers import fuse_layer

WIDTH, TOKENS, RANK, BLOCK = 32, 8, 4, 100


def build() -> SVDLinear:
    torch.manual_seed(0)
    config = AdaLoraConfig(total_step=100, init_r=RANK, target_r=2, lora_alpha=8)
    base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)  # as get_peft_model leaves it
    return SVDLinear(base, "default", config, r=RANK, lora_alpha=8)


def contestants() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    eager, plain = build(), build()
    fuse_layer(eager, "default", "default")
    base, arguments = eager.base_layer, eager._adapter("default")

    def dispatched(x: torch.Tensor) -> torch.Tensor:
        factors, scaling = arguments[:3], arguments[3]
        op = torch.ops.adalora_fast.adapter_linear
        return op(x, None, base.weight, base.bias, *factors, scaling, False)[0]

    return {"adalora_fast eager": eager, "adalora_fast dispatched": dispatched, "peft": plain}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=2000, help="timed calls of each (default 2000)")
    parser.add_argument("--json", type=Path, help="write the figures and the environment to this file")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    grad = torch.randn(TOKENS, WIDTH)
    layers = contestants()
    times: dict[str, list[float]] = {name: [] for name in layers}
    for round_number in range(arguments.calls // BLOCK + 2):
        for name, layer in layers.items():
            start = time.perf_counter()
            for _ in range(BLOCK):
                layer(x).backward(grad)
            if round_number >= 2:  # the first rounds warm up
                times[name].append(1e6 * (time.perf_counter() - start) / BLOCK)
    figures = {name: statistics.median(values) for name, values in times.items()}
    for name, microseconds in figures.items():
        print(f"{name:26}{microseconds:8.1f} µs per forward and backward")
    if arguments.json:
        data = {"benchmark": "call_overhead", "environment": environment(), "microseconds": figures}
        write_json(arguments.json, data)


if __name__ == "__main__":
    main()
