"""Compile every specialisation of the importance, orthogonality and allocation kernels without a GPU.

    python -m benchmarks.aot_bookkeeping [--op importance] [--sample] [--json FILE]

Prints registers, shared memory and spill bytes of each, and fails if one spills or needs more shared memory
than a block can have.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from benchmarks import aot  # first: it decides that kernels are compiled, not interpreted

import torch  # isort: skip

from adalora_fast.environment import write_json
from adalora_fast.ops.allocation import triton as allocation
from adalora_fast.ops.importance import SIGNALS, SMOOTHINGS, ScoreRule, layout_of, statistic_names
from adalora_fast.ops.importance import triton as importance
from adalora_fast.ops.orthogonality import triton as orthogonality


def _model(rank: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """A_0, E_0, B_0, ... of two matrices, without storage."""
    shapes = [(768, 768), (768, 3072)]
    return [
        torch.empty(shape, dtype=dtype, device="meta")
        for width, height in shapes
        for shape in ((rank, width), (rank, 1), (height, rank))
    ]


def launch_importance(sample: bool) -> None:
    cases = [(score, smoothing, rank) for rank in (16, 3) for score in SIGNALS for smoothing in SMOOTHINGS]
    if sample:  # aligned, and not
        cases = [("sensitivity", "ema_uncertainty", 16), ("gsnr", "ema_uncertainty", 3)]
    for score, smoothing, rank in cases:
        parameters = _model(rank)
        size = layout_of(parameters, score).size
        statistics = torch.empty(len(statistic_names(score, smoothing)), size, device="meta")
        updates = torch.empty(len(parameters), dtype=torch.int64, device="meta")
        for active in (None, torch.empty((), dtype=torch.bool, device="meta")):
            importance.update_(
                parameters, parameters, statistics, updates, ScoreRule(score, smoothing, 0.85, 0.85), active
            )
        importance.triplet_scores(parameters, statistics, ScoreRule(score, smoothing))


def launch_orthogonality(sample: bool) -> None:
    float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
    cases = [((rank,), (dtype,)) for rank in (12, 16, 32, 64, 128) for dtype in (float32, bfloat16)]
    cases += [
        ((16,), (float16,)),
        ((8, 16), (float32,)),
        ((3, 100), (float32,)),
        ((3, 100), (float32, bfloat16)),
    ]
    for ranks, dtypes in cases[2:3] if sample else cases:
        model = [factor for rank in ranks for dtype in dtypes for factor in _model(rank, dtype)]
        for penalty, with_grad in (("fro", True), ("fro", False), ("squared", True))[: 1 if sample else 3]:
            orthogonality.loss(model[0::3], model[2::3], penalty, with_grad)


def launch_allocation(sample: bool) -> None:
    budget = torch.empty((), dtype=torch.int64, device="meta")
    for count in (1152, 65536) if sample else (50, 100, 200, 500, 1152, 3000, 8000, 16384, 65536):
        allocation.select(torch.empty(count, device="meta"), budget)
    allocation.apply_mask_(torch.empty(32, dtype=torch.bool, device="meta"), _model(16)[1::3])


LAUNCHES = {
    "importance": launch_importance,
    "orthogonality": launch_orthogonality,
    "allocation": launch_allocation,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", choices=tuple(LAUNCHES), action="append", help="these alone; all by default")
    parser.add_argument("--sample", action="store_true", help="a few specialisations, for a quick look")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    arguments = parser.parse_args()
    collector = aot.Collector()
    for op in arguments.op or LAUNCHES:
        collector.observe(partial(LAUNCHES[op], arguments.sample))
    found = aot.compile_all(collector.found, arguments.workers)
    wrong = aot.faults(found)
    print(aot.table(found))
    print(aot.summary(found))
    print(*wrong, f"{len(found)} specialisations, {len(wrong)} faults", sep="\n")
    if arguments.json:
        write_json(arguments.json, aot.as_content(found, wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
