"""Whether the tail of an optimizer step, captured once and replayed, is the eager one, and how fast it is.

    python -m benchmarks.capture [--json adalora_fast/proofs/GPU.json]

The tail is the orthogonality term's gradient, AdamW, importance, the budget's schedule and the allocation.
Two copies of a model take the same steps, one with an eager tail and an ordinary allocator, one with replays
of a graph that was captured before the first step, through warm-up, budget decrease, final mask and final
phase. Every mask, and at the end every weight and statistic, must be the same, bit for bit; the file says so
under "proven", and ``RankAllocator(capturable=True)`` raises while no file does.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch

from adalora_fast import AdaLoraLinear, RankAllocator, orthogonality_loss
from adalora_fast.allocator import capture
from adalora_fast.environment import environment, write_json
from adalora_fast.ops.importance import SIGNALS

SCHEDULE = {"target_r": 6, "tinit": 3, "tfinal": 6, "deltaT": 3, "total_step": 30}
STEPS, WARM_UP = 34, 3
SIZES = [(256, 320), (320, 320), (320, 64)]  # (in, out)
RANK, ROWS, GAMMA = 12, 128, 0.1


class Run:
    """A small model that trains on the device alone: its data are made there."""

    def __init__(self, device: torch.device, score: str, capturable: bool) -> None:
        torch.manual_seed(0)
        layers = [AdaLoraLinear(k, n, RANK) for k, n in SIZES]
        self.model = torch.nn.Sequential(*layers).to(device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        if device.type == "cuda":
            self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-2, capturable=True, foreach=True)
        else:  # where nothing is captured AdamW counts on the host
            self.optimizer = torch.optim.SGD(self.parameters, lr=1e-2)
        with patch.object(capture, "require_proof", lambda: None):  # this is what makes the proof
            self.allocator = RankAllocator(self.model, score=score, capturable=capturable, **SCHEDULE)

    def task(self, t: int) -> None:
        """The task's gradient, in the place where the tail expects it."""
        device = self.parameters[0].device
        generator = torch.Generator(device).manual_seed(t)
        x, y = (torch.randn(ROWS, n, generator=generator, device=device) for n in (SIZES[0][0], SIZES[-1][1]))
        torch._foreach_zero_([parameter.grad for parameter in self.parameters])
        (self.model(x) - y).square().mean().backward()

    def tail(self) -> None:
        """What is captured."""
        (GAMMA * orthogonality_loss(self.model)).backward()
        self.optimizer.step()
        self.allocator.step()

    def state(self) -> dict[str, torch.Tensor]:
        """Every weight and statistic."""
        weights = {name: parameter.detach().cpu() for name, parameter in self.model.named_parameters()}
        return weights | self.allocator.state_dict()["tensors"]


def captured(run: Run) -> Callable[[], None]:
    """The tail as a graph's replay; the run is afterwards as it was before."""
    before = [parameter.detach().clone() for parameter in run.parameters]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, makes tables, allocates the optimizer's state
        for _ in range(WARM_UP):
            run.tail()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run.tail()
    with torch.no_grad():
        for parameter, value in zip(run.parameters, before, strict=True):
            parameter.copy_(value)
        for state in run.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
    run.allocator.reset()
    return graph.replay


def compare(device: torch.device, score: str, graph: Callable[[Run], Callable[[], None]] = captured) -> dict:
    """Both runs, step by step; ``graph`` makes the second's tail."""
    eager, other = Run(device, score, capturable=False), Run(device, score, capturable=True)
    replay = graph(other)
    masks = []
    for t in range(STEPS):
        for run, tail in ((eager, eager.tail), (other, replay)):
            run.task(t)
            tail()
        masks.append(eager.allocator.rank_pattern() == other.allocator.rank_pattern())
    ours, theirs = eager.state(), other.state()
    differences = {
        name: f"{(ours[name].double() - theirs[name].double()).abs().max():.3g}" if name in theirs else None
        for name in ours
        if name not in theirs or not torch.equal(ours[name], theirs[name])
    }
    return {
        "score": score,
        "steps": STEPS,
        "masks_equal": all(masks),
        "bitwise_equal": ours.keys() == theirs.keys() and not differences,
        "differences": differences,
        "final_ranks": list(other.allocator.ranks().values()),
        "expected_total": eager.allocator.schedule.target,
        "moved": eager.allocator.is_final and other.allocator.is_final,
    }


def is_proof(found: dict) -> bool:
    """The runs are equal, and something was there to be equal."""
    whole = sum(found["final_ranks"]) == found["expected_total"]
    return found["masks_equal"] and found["bitwise_equal"] and found["moved"] and whole


def seconds(tail: Callable[[], None], repeats: int = 50) -> float:
    """Median of one tail, by events."""
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        tail()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.capture needs a CUDA device; none is visible", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    found = [compare(device, score) for score in SIGNALS]
    for one in found:
        print(f"{one['score']:12} {'equal' if is_proof(one) else 'NOT EQUAL'}: {one}")
    eager, other = Run(device, "sensitivity", False), Run(device, "sensitivity", True)
    replay = captured(other)
    for run in (eager, other):
        run.task(0)
    times = {"eager": seconds(eager.tail), "replayed": seconds(replay)}
    print(
        f"the tail of a step: {times['eager'] * 1e6:.1f} µs eager, {times['replayed'] * 1e6:.1f} µs replayed"
    )
    proven = all(map(is_proof, found))
    if arguments.json:
        write_json(
            arguments.json,
            {"proven": proven, "environment": environment(), "comparisons": found, "seconds": times},
        )
    return 0 if proven else 1


if __name__ == "__main__":
    sys.exit(main())
