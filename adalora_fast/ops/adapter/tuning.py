"""Measure which plan is fastest on this GPU and store it (tuned.py).

    python -m adalora_fast.ops.adapter.tuning --shapes 768x768 768x3072 --rows 4096 --ranks 16

writes ``<gpu>.json`` to the package's ``tuned`` folder, or to the one that ``--folder`` names; set
``ADALORA_FAST_TUNED`` to that folder to use it.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from adalora_fast.ops.dispatch import launch
from adalora_fast.ops.dispatch.timing import input_sets, median_seconds

from . import plans, tuned
from . import triton as launchers
from .adapter import Adapter
from .costs import Machine, OuterPlan, Plan, Problem, ways

Timer = Callable[[list[Callable[[], object]]], float]
PARTS = (1, 2, 4, 8, 16)
SCALING, DROPOUT = 0.5, 0.1


class Layer:
    """Sets of inputs of one layer, and calls that compute one direction of it on each."""

    def __init__(
        self,
        rows: int,
        inner: int,
        outer: int,
        rank: int,
        dtype: torch.dtype,
        device: torch.device,
        sets: int,
    ) -> None:
        def draw(*shape: int, type_: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, device=device, dtype=torch.float32).mul_(shape[-1] ** -0.5).to(type_)

        self.factors = [draw(*s, type_=torch.float32) for s in ((rank, inner), (rank, 1), (outer, rank))]
        self.bias = draw(outer)
        self.weights = [draw(outer, inner) for _ in range(sets)]
        self.x = [draw(rows, inner) for _ in range(sets)]
        self.dy = [draw(rows, outer) for _ in range(sets)]
        self.seed = torch.ones(1, dtype=torch.int64, device=device)
        padded = launchers.padded(rank)
        self.h = [draw(rows, padded) for _ in range(sets)]

    def forward(self, dropped: bool) -> list[Callable[[], object]]:
        adapter = Adapter(*self.factors, SCALING)
        if dropped:
            adapter = adapter._replace(seed=self.seed, dropout_p=DROPOUT)
        return [
            lambda x=x, w=w: launchers.linear(x, None, w, self.bias, adapter)
            for x, w in zip(self.x, self.weights)
        ]

    def backward(self, needs: list[bool]) -> list[Callable[[], object]]:
        adapter = Adapter(*self.factors, SCALING)
        return [
            lambda x=x, w=w, dy=dy, h=h: launchers.backward(dy, x, h, h, w, adapter, True, needs)
            for x, w, dy, h in zip(self.x, self.weights, self.dy, self.h)
        ]


def candidates(problem: Problem, machine: Machine) -> Iterator[Plan]:
    """Every way with every tile of its largest kernel, the others as estimated; then every tile of those."""
    for way in ways(problem):
        start = plans.complete(problem, way, machine)
        if start is None:
            continue
        for kernel in ("matmul", "project", "update"):
            if getattr(start, kernel) is not None:
                for tile in plans.offered(kernel, problem, machine, way == "inline"):
                    yield replace(start, **{kernel: tile})


def outer_candidates(problem: Problem, machine: Machine) -> Iterator[OuterPlan]:
    for tile in plans.offered("outer", problem, machine):
        for parts in PARTS:
            if parts == 1 or parts * tile.rows <= problem.rows:
                yield OuterPlan(tile=tile, parts=parts)


def _fastest(choices, calls: list[Callable[[], object]], timer: Timer):
    """(plan, seconds) of the fastest of ``choices`` for the same calls."""
    timed = []
    for plan in dict.fromkeys(choices):
        with plans.forced(plan):
            try:
                calls[0]()  # compiles, outside any graph
            except OutOfResources:
                continue  # this GPU has less shared memory than was thought
            timed.append((timer(calls), plan))
    seconds, plan = min(timed, key=lambda pair: pair[0])
    return plan, seconds


def tune_layer(
    rows: int, inner: int, outer: int, rank: int, dtype: torch.dtype, device: torch.device,
    timer: Timer = median_seconds,
) -> list[dict]:  # fmt: skip
    """The fastest plans of one layer, as entries of a tuned file: forward with and without dropout, backward,
    factors.
    """
    machine = plans.machine_of(device)
    bytes_each = dtype.itemsize * (rows * (inner + outer) + inner * outer)
    layer = Layer(rows, inner, outer, rank, dtype, device, input_sets(bytes_each))
    base = dict(outer=outer, rank=rank, dtype=dtype)
    forward = launchers.problem_of(layer.x[0], **base, backward=False)
    backward = launchers.problem_of(layer.dy[0], outer=inner, rank=rank, dtype=dtype, backward=True)
    measured = [
        ("change", forward, candidates, layer.forward(dropped=False)),
        ("change", replace(forward, inline=False), candidates, layer.forward(dropped=True)),
        ("change", backward, candidates, layer.backward([True, False, False, False, False])),
        ("factors", backward, outer_candidates, layer.backward([False, False, True, True, True])),
    ]
    entries = []
    for kind, problem, choices, calls in measured:
        plan, seconds = _fastest(choices(problem, machine), calls, timer)
        entries.append(tuned.encode(kind, problem, plan, seconds))
    return entries


def _shape(text: str) -> tuple[int, int]:
    inner, _, outer = text.partition("x")
    if not (inner.isdigit() and outer.isdigit() and int(inner) and int(outer)):
        raise argparse.ArgumentTypeError(f"{text!r} is not IN x OUT, such as 768x3072")
    return int(inner), int(outer)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=_shape, nargs="+", required=True, metavar="INxOUT")
    parser.add_argument("--rows", type=int, nargs="+", default=[4096], help="tokens of a batch")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16])
    parser.add_argument(
        "--types", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"]
    )
    parser.add_argument("--folder", type=Path, default=tuned.SHIPPED, help="where <gpu>.json is written")
    options = parser.parse_args(arguments)
    if (reason := launch.refusal("cuda")) is not None:
        print(f"tuning: {reason}; it measures on the GPU whose plans it stores", file=sys.stderr)
        return 2
    from adalora_fast.environment import environment

    device = torch.device("cuda", torch.cuda.current_device())
    gpu = torch.cuda.get_device_name(device)
    path = options.folder / tuned.file_name(gpu)
    for inner, outer in options.shapes:
        for rows in options.rows:
            for rank in options.ranks:
                for name in options.types:
                    entries = tune_layer(rows, inner, outer, rank, getattr(torch, name), device)
                    tuned.write(path, entries, environment())  # after every layer: an interruption loses one
                    for entry in entries:
                        what = f"{inner}x{outer} M={rows} r={rank} {name} {entry['kind']}"
                        print(f"{what}: {entry['seconds'] * 1e6:.1f} us with {entry['plan']}")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
