"""What computing the adapter costs: problems, plans, and the bytes and operations of every launch of a plan.

A *problem* is one direction of one layer: source [M, C] times a frozen weight [C, D] plus a rank-R change,
where forward C = in, D = out and backward C = out, D = in; without a weight the change alone. Three *ways*
lead there:

- ``inline``: one matmul that computes its low-rank operand on the way (where its source is not dropped out);
- ``epilogue``: ``project``, then a matmul with the change in its epilogue;
- ``library``: the framework's matmul (cuBLAS), ``project``, and ``update`` in place on its output.
"""

from dataclasses import dataclass

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
    aligned: bool = True  # whether rows begin where 16-byte loads can: sizes and strides are multiples of 16

    @property
    def half(self) -> bool:
        return self.product_size == 2


@dataclass(frozen=True)
class Tile:
    """A kernel's tile, rows x columns of its output or source and depth of its main loop, and how it is
    compiled.
    """

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


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The estimate of one launch: what it must move through memory and compute."""

    kernel: str
    bytes: float
    flops: float

    def least_seconds(self, machine: Machine, half: bool, share: float = 1.0) -> float:
        """The larger of the times of its bytes and of its operations; ``share``: of the machine's rate."""
        rate = machine.flops if half else machine.flops_float32
        return max(self.bytes / machine.bandwidth, self.flops / (rate * share))


def launches(problem: Problem, way: str, columns: int = 128) -> list[Launch]:
    """The launches of a way, every operand read once from memory and every result written once.

    Args:
        columns: width of the matmul's tiles; ``inline`` computes the low-rank operand once per column of
        tiles.
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
    library = Launch(kernel="library", bytes=source + weight + result, flops=2 * m * c * d)
    read = result if problem.base else 0
    update = Launch(kernel="update", bytes=result + read + 4 * r * d + low, flops=2 * m * d * r)
    return [project, library, update] if problem.base else [project, update]


def factor_launches(problem: Problem, parts: int) -> list[Launch]:
    """The launches that make dA, dE and dB of the layer whose backward is ``problem``."""
    m, n, k, r, s = problem.rows, problem.inner, problem.outer, problem.rank, problem.size
    partial = 4 * parts * r * (n + k)
    low = m * r * problem.product_size
    return [
        Launch(kernel="outer", bytes=s * m * (n + k) + 2 * low + partial, flops=2 * m * r * (n + k)),
        Launch(kernel="reduce", bytes=partial + 4 * r * (n + 2 * k), flops=3 * parts * r * (n + k)),
    ]


def estimate(problem: Problem, plan: Plan, machine: Machine) -> float:
    """Seconds that a plan should take."""
    columns = 128 if plan.matmul is None else plan.matmul.columns
    return sum(
        machine.launch
        + launch.least_seconds(machine, problem.half, MATMUL_SHARE if launch.kernel == "matmul" else 1.0)
        for launch in launches(problem, plan.way, columns)
    )


def ways(problem: Problem) -> tuple[str, ...]:
    """The ways that compute ``problem``: products in float32 leave the base to the library."""
    if not problem.base or not problem.half or problem.size != 2:
        return ("library",)
    return WAYS if problem.inline else WAYS[1:]
