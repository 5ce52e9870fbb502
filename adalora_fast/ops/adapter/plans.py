"""Which launches compute the adapter, with which tiles: offered, estimated, chosen.

A *problem* is one direction of one layer: source [M, C] times a frozen weight [C, D] plus a rank-R change
(forward C = in, D = out; backward C = out, D = in; without a weight the change alone). Three *ways* lead there:

- ``inline``: one matmul that computes its low-rank operand on the way (where its source is not dropped out);
- ``epilogue``: ``project``, then a matmul with the change in its epilogue;
- ``library``: the framework's matmul (cuBLAS), ``project``, and ``update`` in place on its output.

A measured choice (``tuned/<gpu>.json``, see tuning.py) wins. Without one the estimate of :func:`launches` is
minimised: bytes and floating-point operations of every launch against the GPU's rates.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

WAYS = ("inline", "epilogue", "library")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the estimates need to know of a GPU. Rates are what dense bf16 products and copies reach there."""

    flops: float  # per second, half types
    flops_float32: float
    bandwidth: float  # bytes per second, read plus written
    processors: int
    shared: int  # bytes a block can have
    launch: float = 2e-6  # seconds that one more kernel costs inside a graph, its ramp-up and tail included


MACHINES = {
    80: Machine(flops=2.6e14, flops_float32=1.6e13, bandwidth=1.4e12, processors=108, shared=163 * 1024),
    90: Machine(flops=7.0e14, flops_float32=4.5e13, bandwidth=4.0e12, processors=132, shared=227 * 1024),
}
MATMUL_SHARE = 0.87  # of the library's rate that the Triton matmul is assumed to reach, before it is measured

_assumed: Machine | None = None


@contextlib.contextmanager
def assuming(machine: Machine) -> Iterator[None]:
    """Within the context plans are made for ``machine``, whatever GPU is here."""
    global _assumed
    before, _assumed = _assumed, machine
    try:
        yield
    finally:
        _assumed = before


@lru_cache(maxsize=32)
def _machine_of(device: torch.device) -> Machine:
    properties = torch.cuda.get_device_properties(device)
    known = MACHINES[90 if properties.major >= 9 else 80]
    share = properties.multi_processor_count / known.processors
    shared = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
    return replace(
        known,
        flops=known.flops * share,
        flops_float32=known.flops_float32 * share,
        processors=properties.multi_processor_count,
        shared=shared,
    )


def machine_of(device: torch.device) -> Machine:
    """The GPU that ``device`` is; for other devices (interpreter, compilation) the one that is assumed."""
    if _assumed is not None:
        return _assumed
    return _machine_of(device) if device.type == "cuda" else MACHINES[90]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One direction of one layer; sizes of types in bytes."""

    backward: bool
    rows: int  # M
    inner: int  # C
    outer: int  # D
    rank: int  # padded
    size: int  # of the activations' type
    product_size: int  # of the type that the low-rank products are computed in
    base: bool = True  # whether there is a weight to multiply with
    inline: bool = True  # whether the low-rank operand comes from the matmul's own source, as it is

    @property
    def half(self) -> bool:
        return self.product_size == 2


@dataclass(frozen=True)
class Tile:
    """A kernel's tile and how it is compiled: rows, columns of its output or source, depth of its main loop."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A way and the tiles of its kernels (None: that kernel is not launched)."""

    way: str
    matmul: Tile | None = None
    project: Tile | None = None
    update: Tile | None = None


@dataclass(frozen=True, kw_only=True)
class OuterPlan:
    """The tile of ``outer`` and the number of row ranges, each of which makes one partial sum."""

    tile: Tile
    parts: int


# Tiles that compile without spilling on sm_80 and sm_90 (experiments: benchmarks/aot_adapter.py). Of a matmul:
# rows x columns of the output, depth of the loop; of ``project``: rows x columns of the source; of ``update``:
# rows x columns of the output; of ``outer``: rows of the loop x columns of the source.
MATMUL = (
    Tile(128, 256, 64, 8, 3),
    Tile(128, 128, 64, 8, 3),
    Tile(128, 64, 64, 4, 3),
    Tile(64, 128, 64, 4, 3),
    Tile(64, 64, 64, 4, 4),
    Tile(32, 64, 64, 4, 4),
    Tile(16, 64, 128, 4, 3),
)
PROJECT = (Tile(64, 64, 0, 4, 3), Tile(32, 128, 0, 4, 3), Tile(16, 256, 0, 4, 3), Tile(16, 64, 0, 4, 3))
UPDATE = (Tile(128, 64, 0, 4, 1), Tile(64, 64, 0, 4, 1), Tile(32, 64, 0, 4, 1), Tile(16, 64, 0, 4, 1))
OUTER = (Tile(64, 128, 0, 4, 3), Tile(64, 64, 0, 4, 3), Tile(32, 64, 0, 4, 3), Tile(16, 64, 0, 4, 3))


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The estimate of one launch: what it must move through memory and compute."""

    kernel: str
    bytes: float
    flops: float

    def seconds(self, machine: Machine, half: bool, share: float = 1.0) -> float:
        rate = machine.flops if half else machine.flops_float32
        return machine.launch + max(self.bytes / machine.bandwidth, self.flops / (rate * share))


def launches(problem: Problem, way: str, columns: int = 128) -> list[Launch]:
    """The launches of a way, every operand read once from memory and every result written once.

    Args:
        columns: width of the matmul's tiles (``inline`` computes the low-rank operand once per column of tiles).
    """
    m, c, d, r, s = problem.rows, problem.inner, problem.outer, problem.rank, problem.size
    low = m * r * problem.product_size
    source, result, weight = m * c * s, m * d * s, c * d * s
    project = Launch(kernel="project", bytes=source + 4 * r * c + low, flops=2 * m * c * r)
    factors = 4 * r * (c + d)
    if way == "inline":
        again = -(-d // columns)
        flops = 2 * m * c * d + 2 * m * c * r * again + 2 * m * d * r
        return [Launch(kernel="matmul", bytes=source + weight + result + factors + low, flops=flops)]
    if way == "epilogue":
        flops = 2 * m * d * (c + r)
        moved = source + weight + result + 4 * r * d + low
        return [project, Launch(kernel="matmul", bytes=moved, flops=flops)]
    return [
        project,
        Launch(kernel="library", bytes=source + weight + result, flops=2 * m * c * d),
        Launch(kernel="update", bytes=2 * result + 4 * r * d + low, flops=2 * m * d * r),
    ]


def factor_launches(problem: Problem, parts: int) -> list[Launch]:
    """The launches that make dA, dE and dB of the layer whose backward is ``problem``."""
    m, n, k, r, s = problem.rows, problem.inner, problem.outer, problem.rank, problem.size
    partial = 4 * parts * r * (n + k)
    low = m * r * problem.product_size
    return [
        Launch(kernel="outer", bytes=s * m * (n + k) + 2 * low + partial, flops=2 * m * r * (n + k)),
        Launch(kernel="reduce", bytes=partial + 4 * r * (n + 2 * k), flops=3 * parts * r * (n + k)),
    ]


def estimate(problem: Problem, way: str, machine: Machine, columns: int = 128) -> float:
    """Seconds that a way should take."""
    return sum(
        launch.seconds(machine, problem.half, MATMUL_SHARE if launch.kernel == "matmul" else 1.0)
        for launch in launches(problem, way, columns)
    )


def ways(problem: Problem) -> tuple[str, ...]:
    """The ways that compute ``problem``: products in float32 leave the base to the library."""
    if not problem.base or not problem.half or problem.size != 2:
        return ("library",)
    return WAYS if problem.inline else WAYS[1:]


def fits(tile: Tile, problem: Problem, machine: Machine, inline: bool = False) -> bool:
    """Whether a matmul tile's pipeline fits a block's shared memory."""
    loaded = tile.depth * (tile.rows + tile.columns + (problem.rank if inline else 0)) * problem.size
    epilogue = (tile.rows + tile.columns) * problem.rank * problem.size
    return max(loaded * tile.stages, epilogue) <= machine.shared


def offered_matmul(problem: Problem, machine: Machine, inline: bool = False) -> list[Tile]:
    """The matmul tiles that may run ``problem``."""
    return [
        tile
        for tile in MATMUL
        if fits(tile, problem, machine, inline) and tile.rows * tile.columns * problem.rank <= 2**21
    ]


def offered_project(problem: Problem) -> list[Tile]:
    return list(PROJECT)


def offered_update(problem: Problem) -> list[Tile]:
    return list(UPDATE)


def offered_outer(problem: Problem) -> list[Tile]:
    return list(OUTER)


def _filling(tiles: list[Tile], programs, wanted: int) -> Tile:
    """The first tile (the largest) that makes enough programs for every processor, else the last."""
    return next((tile for tile in tiles if programs(tile) >= wanted), tiles[-1])


def _matmul_tile(problem: Problem, machine: Machine, inline: bool) -> Tile:
    def programs(tile: Tile) -> int:
        return -(-problem.rows // tile.rows) * -(-problem.outer // tile.columns)

    return _filling(offered_matmul(problem, machine, inline), programs, machine.processors)


def _complete(problem: Problem, way: str, machine: Machine) -> Plan:
    project = _filling(offered_project(problem), lambda t: -(-problem.rows // t.rows), machine.processors)
    if way == "library":

        def programs(tile: Tile) -> int:
            return -(-problem.rows // tile.rows) * -(-problem.outer // tile.columns)

        update = _filling(offered_update(problem), programs, 2 * machine.processors)
        return Plan(way=way, project=project, update=update)
    inline = way == "inline"
    matmul = _matmul_tile(problem, machine, inline)
    return Plan(way=way, matmul=matmul, project=None if inline else project)


_forced: Plan | OuterPlan | None = None


@contextlib.contextmanager
def forced(plan: "Plan | OuterPlan") -> Iterator[None]:
    """Within the context ``plan`` is chosen wherever it can compute the problem (for tests and tuning)."""
    global _forced
    before, _forced = _forced, plan
    try:
        yield
    finally:
        _forced = before


@lru_cache(maxsize=4096)
def _estimated(problem: Problem, machine: Machine) -> Plan:
    def seconds(way: str) -> float:
        columns = _matmul_tile(problem, machine, way == "inline").columns if way != "library" else 128
        return estimate(problem, way, machine, columns)

    return _complete(problem, min(ways(problem), key=seconds), machine)


def choose(problem: Problem, device: torch.device) -> Plan:
    """The plan for a problem on a device."""
    if isinstance(_forced, Plan) and _forced.way in ways(problem):
        return _forced
    return _estimated(problem, machine_of(device))


@lru_cache(maxsize=4096)
def _outer(problem: Problem, machine: Machine) -> OuterPlan:
    tiles = offered_outer(problem)
    width = problem.inner + problem.outer
    longest = max(1, problem.rows // 256)  # a part reads at least so many rows: its partial sums cost too

    def parts(tile: Tile) -> int:
        return min(longest, 16, -(-2 * machine.processors * tile.columns // width))

    tile = _filling(tiles, lambda t: -(-width // t.columns) * parts(t), machine.processors)
    return OuterPlan(tile=tile, parts=parts(tile))


def choose_outer(problem: Problem, device: torch.device) -> OuterPlan:
    """How dA, dE and dB of the layer whose backward is ``problem`` are summed."""
    return _forced if isinstance(_forced, OuterPlan) else _outer(problem, machine_of(device))
