"""Which plan computes a problem: measured and stored (tuned.py), else the one that should be fastest.

Offered are tiles that compile without spilling a register for sm_80 and sm_90 (``make aot`` checks it) and
whose buffers fit the GPU's shared memory. Without a stored choice the estimate of costs.py is minimised
over the ways, with tiles that give every processor a program.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache

import torch

from . import tuned
from .costs import MACHINES, Machine, OuterPlan, Plan, Problem, Tile, estimate, ways

# Of a matmul: rows x columns of the output, depth of the loop; of ``project``: rows x columns of the
# source; of ``update``: rows x columns of the output; of ``outer``: rows of the loop x columns of the
# source. Beside each the highest padded rank with which nothing spills, for aligned rows and for others.
_MATMUL = (
    (Tile(128, 128, 64, 8, 3), 64, 0),
    (Tile(128, 64, 64, 4, 3), 32, 0),
    (Tile(64, 128, 64, 4, 3), 64, 0),
    (Tile(64, 64, 64, 4, 3), 128, 0),
    (Tile(32, 64, 64, 4, 4), 64, 0),
    (Tile(16, 64, 64, 4, 4), 128, 0),
)
_HALF = {
    "matmul": _MATMUL,
    "project": (
        (Tile(64, 64, 0, 4, 3), 128, 32),
        (Tile(32, 128, 0, 4, 3), 64, 64),
        (Tile(16, 256, 0, 4, 3), 32, 32),
        (Tile(16, 64, 0, 4, 3), 128, 64),
        (Tile(16, 32, 0, 4, 2), 128, 128),
    ),
    "update": (
        (Tile(64, 64, 0, 4, 1), 128, 128),
        (Tile(32, 64, 0, 4, 1), 64, 64),
        (Tile(16, 64, 0, 4, 1), 64, 64),
    ),
    "outer": (
        (Tile(64, 128, 0, 4, 3), 32, 0),
        (Tile(64, 64, 0, 4, 3), 128, 64),
        (Tile(32, 64, 0, 4, 3), 16, 16),
        (Tile(32, 32, 0, 4, 3), 128, 128),
    ),
}
_FLOAT32 = {
    "matmul": (),
    "project": (
        (Tile(32, 32, 0, 8, 3), 64, 32),
        (Tile(16, 32, 0, 8, 3), 128, 64),
        (Tile(16, 16, 0, 8, 3), 128, 128),
    ),
    "update": ((Tile(32, 32, 0, 8, 1), 128, 128), (Tile(16, 32, 0, 8, 1), 128, 128)),
    "outer": ((Tile(32, 32, 0, 4, 3), 32, 32), (Tile(16, 32, 0, 4, 3), 128, 128)),
}

_assumed: Machine | None = None
_forced: Plan | OuterPlan | None = None


@contextlib.contextmanager
def assuming(machine: Machine) -> Iterator[None]:
    """Within the context plans are made for ``machine``, whatever GPU is here."""
    global _assumed
    before, _assumed = _assumed, machine
    try:
        yield
    finally:
        _assumed = before


@contextlib.contextmanager
def forced(plan: Plan | OuterPlan) -> Iterator[None]:
    """Within the context ``plan`` is chosen wherever it can compute the problem (for tests and tuning)."""
    global _forced
    before, _forced = _forced, plan
    try:
        yield
    finally:
        _forced = before


@lru_cache(maxsize=32)
def _machine_of(device: torch.device) -> Machine:
    properties = torch.cuda.get_device_properties(device)
    known = MACHINES[90 if properties.major >= 9 else 80]
    share = properties.multi_processor_count / known.processors
    return replace(
        known,
        flops=known.flops * share,
        flops_float32=known.flops_float32 * share,
        processors=properties.multi_processor_count,
        shared=getattr(properties, "shared_memory_per_block_optin", 99 * 1024),
    )


def machine_of(device: torch.device) -> Machine:
    """The GPU that ``device`` is; for other devices (interpreter, compilation) the one that is assumed."""
    if _assumed is not None:
        return _assumed
    return _machine_of(device) if device.type == "cuda" else MACHINES[90]


def shared_bytes(kernel: str, tile: Tile, problem: Problem, inline: bool = False) -> int:
    """An upper bound of a block's shared memory: every operand in as many buffers as there are stages."""
    size, product, rank = problem.size, problem.product_size, problem.rank
    if kernel == "matmul":
        factor = rank * (4 * (tile.stages - 1) + product) if inline else 0
        loop = tile.depth * ((tile.rows + tile.columns) * size * tile.stages + factor)
        return max(loop, (tile.rows + tile.columns) * rank * product + 4 * tile.rows * tile.columns)
    if kernel == "project":
        return tile.columns * (
            tile.rows * (size * tile.stages + product) + rank * (4 * tile.stages + product)
        )
    if kernel == "outer":
        return tile.rows * (tile.columns + rank) * max(size, product) * tile.stages
    return (tile.rows + tile.columns) * rank * product + 4 * tile.rows * tile.columns


def offered(kernel: str, problem: Problem, machine: Machine, inline: bool = False) -> list[Tile]:
    """The tiles with which ``kernel`` may run, largest first.

    Without aligned rows the base is left to the library: the matmul would load its operands one by one.
    """
    return [
        tile
        for tile, aligned, unaligned in (_HALF if problem.half else _FLOAT32)[kernel]
        if problem.rank <= (aligned if problem.aligned else unaligned)
        and shared_bytes(kernel, tile, problem, inline) <= machine.shared
    ]


def _filling(tiles: list[Tile], programs: Callable[[Tile], int], wanted: int) -> Tile:
    """The first tile (the largest) that makes enough programs for every processor, else the last."""
    return next((tile for tile in tiles if programs(tile) >= wanted), tiles[-1])


def _shortest(tiles: list[Tile], programs: Callable[[Tile], int], processors: int, extra: int) -> Tile:
    """The matmul tile whose waves of programs take least. A wave costs the tile's area, ``extra`` columns of
    low-rank operand included, and its edges, which are what it loads.
    """

    def cost(tile: Tile) -> float:
        waves = -(-programs(tile) // processors)
        return waves * (tile.rows * (tile.columns + extra) + 16 * (tile.rows + tile.columns))

    return min(tiles, key=cost)


def complete(problem: Problem, way: str, machine: Machine) -> Plan | None:
    """The way with tiles chosen by size, None where no tile computes it."""

    def over_output(tile: Tile) -> int:
        return -(-problem.rows // tile.rows) * -(-problem.outer // tile.columns)

    def over_rows(tile: Tile) -> int:
        return -(-problem.rows // tile.rows)

    inline, library = way == "inline", way == "library"
    wanted = machine.processors
    matmul = [] if library else offered("matmul", problem, machine, inline)
    if not library and not matmul:
        return None
    project = offered("project", problem, machine)
    update = offered("update", problem, machine)
    return Plan(
        way=way,
        matmul=None if library else _shortest(matmul, over_output, wanted, problem.rank if inline else 0),
        project=None if inline else _filling(project, over_rows, wanted),
        update=_filling(update, over_output, 2 * wanted) if library else None,
    )


@lru_cache(maxsize=4096)
def estimated(problem: Problem, machine: Machine) -> Plan:
    """The plan that should be fastest."""
    plans = [plan for way in ways(problem) if (plan := complete(problem, way, machine)) is not None]
    return min(plans, key=lambda plan: estimate(problem, plan, machine))


@lru_cache(maxsize=4096)
def estimated_outer(problem: Problem, machine: Machine) -> OuterPlan:
    """The tile and the number of parts that fill the GPU without partial sums growing beside the input."""
    tiles = offered("outer", problem, machine)
    width = problem.inner + problem.outer
    most = max(1, min(16, problem.rows // (16 * problem.rank)))  # partial sums at most a quarter of the bytes

    def parts(tile: Tile) -> int:
        return min(most, -(-2 * machine.processors * tile.columns // width))

    tile = _filling(tiles, lambda tile: -(-width // tile.columns) * parts(tile), machine.processors)
    return OuterPlan(tile=tile, parts=parts(tile))


def choose(problem: Problem, device: torch.device) -> Plan:
    """The plan for a problem on a device."""
    if isinstance(_forced, Plan) and _forced.way in ways(problem):
        return _forced
    stored = tuned.plan_of(problem, device) if device.type == "cuda" else None
    return stored or estimated(problem, machine_of(device))


def choose_outer(problem: Problem, device: torch.device) -> OuterPlan:
    """How dA, dE and dB of the layer whose backward is ``problem`` are summed."""
    if isinstance(_forced, OuterPlan):
        return _forced
    stored = tuned.outer_plan_of(problem, device) if device.type == "cuda" else None
    return stored or estimated_outer(problem, machine_of(device))
