"""The adapter's kernels compiled for sm_80 and sm_90, and what a layer's launches cost on paper.

    python -m benchmarks.aot_adapter [--offered] [--kinds KIND ...] [--json FILE]

Every specialisation that runs for float32, float16, bfloat16 and bfloat16 with ``precision="highest"``, r in
{4, 8, 12, 16, 32, 64}, DeBERTa-v3-base's four shapes and 4096 x 4096, with and without dropout; with
``--offered`` also every tile that a stored plan may name, for every padded rank. Ends with an error where one
spills, needs more shared memory than a block has, or multiplies half types outside the matrix units.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby, product
from pathlib import Path

from benchmarks import aot  # first: it decides that kernels are compiled, not interpreted

import torch  # isort: skip
from torch import Tensor

from adalora_fast.environment import write_json
from adalora_fast.ops.adapter import plans
from adalora_fast.ops.adapter import triton as launchers
from adalora_fast.ops.adapter.adapter import Adapter
from adalora_fast.ops.adapter.costs import (
    MACHINES,
    Machine,
    OuterPlan,
    Plan,
    Problem,
    factor_launches,
    launches,
    ways,
)

SHAPES = ((768, 768), (768, 3072), (3072, 768), (3072, 3072), (4096, 4096))  # in, out
UNALIGNED = (1001, 777)  # rows that no vector load fits
RANKS = (4, 8, 12, 16, 32, 64)
ROWS = 4096
EVERY_NEED = [True, False, True, True, True]


@dataclass(frozen=True)
class Kind:
    """Types of one layer: its activations', its factors', and whether products are in the factors' type."""

    x: torch.dtype
    factors: torch.dtype
    highest: bool = False


KINDS = {
    "float32": Kind(torch.float32, torch.float32),
    "float16": Kind(torch.float16, torch.float32),
    "bfloat16": Kind(torch.bfloat16, torch.float32),
    "bfloat16-highest": Kind(torch.bfloat16, torch.float32, highest=True),
}


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def layer(kind: Kind, rows: int, inner: int, outer: int, rank: int, dropout_p: float) -> None:
    """Launch forward and backward of one layer on meta tensors."""
    x, weight, bias = (_meta(*s, dtype=kind.x) for s in ((rows, inner), (outer, inner), (outer,)))
    factors = [_meta(*s, dtype=kind.factors) for s in ((rank, inner), (rank, 1), (outer, rank))]
    seed = _meta(1, dtype=torch.int64) if dropout_p else None
    adapter = Adapter(*factors, 0.5, kind.highest, seed, dropout_p)
    y, h, S = launchers.linear(x, None, weight, bias, adapter)
    launchers.backward(y, x, h, S, weight, adapter, True, EVERY_NEED)


def chosen(kinds: Iterable[Kind]) -> set[aot.Specialisation]:
    """What runs where no plan is stored."""
    found: set[aot.Specialisation] = set()
    for arch in aot.ARCHITECTURES:
        collector = aot.Collector((arch,), found)
        with plans.assuming(MACHINES[arch]):
            for kind, (inner, outer), rank, dropout_p in product(kinds, SHAPES, RANKS, (0.0, 0.1)):
                run = (kind, ROWS, inner, outer, rank, dropout_p)
                collector.observe(lambda run=run: layer(*run))
    return found


def _every_plan(
    kind: Kind, rank: int, inner: int, outer: int, machine: Machine
) -> Iterator[Plan | OuterPlan]:
    """Plans that together contain every offered tile of every kernel."""
    problem = launchers.problem_of(
        _meta(ROWS, inner, dtype=kind.x),
        outer,
        rank,
        kind.factors if kind.highest else kind.x,
        backward=False,
    )
    projects = plans.offered("project", problem, machine)
    updates = plans.offered("update", problem, machine)
    for tile in projects:
        yield Plan(way="library", project=tile, update=updates[0])
    for tile in updates:
        yield Plan(way="library", project=projects[0], update=tile)
    for tile in plans.offered("outer", problem, machine):
        yield OuterPlan(tile=tile, parts=8)
    for way in ways(problem):
        if way != "library":
            for tile in plans.offered("matmul", problem, machine, way == "inline"):
                yield Plan(way=way, matmul=tile, project=projects[0])


def offered(kinds: Iterable[Kind]) -> set[aot.Specialisation]:
    """Every tile that a stored plan may name, for rows that vector loads fit and rows that they do not."""
    found: set[aot.Specialisation] = set()
    for arch in aot.ARCHITECTURES:
        collector = aot.Collector((arch,), found)
        with plans.assuming(MACHINES[arch]):
            for kind, rank, (inner, outer) in product(kinds, (16, 32, 64, 128), (SHAPES[1], UNALIGNED)):
                for plan in _every_plan(kind, rank, inner, outer, MACHINES[arch]):
                    for dropout_p in (0.0, 0.1):
                        run = (kind, ROWS, inner, outer, rank, dropout_p)
                        with plans.forced(plan):
                            collector.observe(lambda run=run: layer(*run))
    return found


def faults(found: list[aot.Resources]) -> list[str]:
    """aot.faults, and half types whose products are not on the matrix units."""
    without = [
        f"{one.kernel} for sm_{one.arch} ({one.types}; {one.constants}) has no matrix instruction"
        for one in found
        if one.kernel != "reduce" and one.types.split()[0] != "float32" and not one.matrix
        and "float32" not in _product_type(one)
    ]  # fmt: skip
    return aot.faults(found) + without


def _product_type(one: aot.Resources) -> str:
    """The type of h and g among a kernel's arguments."""
    place = {"project": 3, "matmul": 3, "update": 1, "outer": 2}
    types = one.types.split()
    return types[place[one.kernel]] if one.kernel in place and len(types) > place[one.kernel] else types[-1]


def costs() -> list[dict]:
    """What every launch of a layer moves and computes in bf16, r = 16, and its least time beside the frozen
    matmul's.
    """
    rows = []
    for (arch, machine), (inner, outer), backward in product(MACHINES.items(), SHAPES, (False, True)):
        source, result = (outer, inner) if backward else (inner, outer)
        problem = Problem(
            backward=backward, rows=ROWS, inner=source, outer=result, rank=16, size=2, product_size=2
        )
        plan = plans.estimated(problem, machine)
        made = launches(problem, plan.way, plan.matmul.columns if plan.matmul else 128)
        if backward:
            made += factor_launches(problem, plans.estimated_outer(problem, machine).parts)
        frozen = launches(problem, "library")[1].least_seconds(machine, half=True)
        rows += [
            {
                "arch": arch,
                "in": inner,
                "out": outer,
                "direction": "backward" if backward else "forward",
                "way": plan.way,
                **asdict(one),
                "least_us": one.least_seconds(machine, half=True) * 1e6,
                "frozen_us": frozen * 1e6,
            }
            for one in made
        ]
    return rows


def costs_table() -> str:
    """:func:`costs` as text, with each direction's sum."""
    lines = []
    for place, made in groupby(
        costs(), key=lambda row: [row[k] for k in ("arch", "in", "out", "direction", "way")]
    ):
        made = list(made)
        least, frozen = sum(row["least_us"] for row in made), made[0]["frozen_us"]
        arch, inner, outer, direction, way = place
        lines.append(
            f"sm_{arch} {inner:4} -> {outer:4} {direction:8} {way:8} {least:6.1f} us at least, "
            f"frozen {frozen:6.1f}, ratio {least / frozen:.2f}: "
            + ", ".join(
                f"{row['kernel']} {row['bytes'] / 1e6:.1f} MB {row['flops'] / 1e9:.2f} GFLOP" for row in made
            )
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--offered", action="store_true", help="also every tile a stored plan may name")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS], help="types of the layers")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--json", type=Path, help="write the table and the costs to this file")
    arguments = parser.parse_args()
    kinds = [KINDS[name] for name in arguments.kinds]
    wanted = chosen(kinds) | (offered(kinds) if arguments.offered else set())
    found = aot.compile_all(wanted, arguments.workers)
    print(aot.table(found))
    print(aot.summary(found))
    print(costs_table())
    wrong = faults(found)
    print(*wrong, f"{len(found)} specialisations, {len(wrong)} faults", sep="\n")
    if arguments.json:
        write_json(arguments.json, aot.as_content(found, wrong) | {"costs": costs_table().splitlines()})
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
