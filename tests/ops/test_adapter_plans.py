"""Plans: only what is offered and fits, and a model of bytes that agrees with what is launched."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adalora_fast.ops.adapter import costs, plans
from adalora_fast.ops.adapter import triton as kernels
from adalora_fast.ops.adapter.adapter import Adapter
from adalora_fast.ops.adapter.costs import MACHINES, WAYS, OuterPlan, Plan, Problem, Tile
from adalora_fast.ops.dispatch import launch
from tests.helpers.kernel_cases import plan_of

META = torch.device("meta")
SHAPES = [(768, 768), (768, 3072), (3072, 768), (3072, 3072), (4096, 4096)]
RANKS = (16, 32, 64, 128)
KERNELS = ("matmul", "project", "update", "outer")
SMALL_MACHINE = replace(MACHINES[80], processors=20, shared=99 * 1024)  # capability 8.6, 8.9 and 12.0
ALL_MACHINES = [*MACHINES.values(), SMALL_MACHINE]


def problem(inner=768, outer=768, *, rows=4096, rank=16, backward=False, size=2, product_size=2, **flags):
    return Problem(
        backward=backward, rows=rows, inner=inner, outer=outer, rank=rank, size=size,
        product_size=product_size, **flags,
    )  # fmt: skip


PROBLEMS = [
    problem(c, d, rows=rows, rank=rank, backward=backward, size=size, product_size=product, base=base)
    for c, d in [*SHAPES, (1, 1), (50000, 7)]
    for rows in (1, 64, 1024, 4096, 2**17)
    for rank in RANKS
    for size, product in ((2, 2), (2, 4), (4, 2), (4, 4))
    for backward, base in ((False, True), (True, True), (False, False), (True, False))
]


@pytest.mark.parametrize("machine", ALL_MACHINES, ids=["8.0", "9.0", "8.6"])
def test_the_estimate_picks_what_is_offered(machine):
    for p in PROBLEMS:
        plan, outer = plans.estimated(p, machine), plans.estimated_outer(p, machine)
        assert plan.way in costs.ways(p)
        inline = plan.way == "inline"
        assert (plan.matmul is None) == (plan.way == "library")
        assert (plan.project is None) == inline and (plan.update is None) == (plan.way != "library")
        for kernel in ("matmul", "project", "update"):
            tile = getattr(plan, kernel)
            assert tile is None or tile in plans.offered(kernel, p, machine, inline), (p, plan)
        assert outer.tile in plans.offered("outer", p, machine)
        assert 1 <= outer.parts <= 16


@pytest.mark.parametrize("machine", ALL_MACHINES, ids=["8.0", "9.0", "8.6"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_offered_tile_fits_shared_memory(machine, kernel):
    for p in PROBLEMS:
        for inline in (False, True):
            tiles = plans.offered(kernel, p, machine, inline)
            for tile in tiles:
                assert plans.shared_bytes(kernel, tile, p, inline) <= machine.shared
                if kernel in ("matmul", "project"):  # what the main loop keeps in flight, counted again
                    depth = tile.depth or tile.columns
                    columns = tile.columns if kernel == "matmul" else 0
                    flying = tile.stages - 1
                    assert flying * depth * (tile.rows + columns) * p.size <= machine.shared
                assert tile.rows >= 16 and tile.columns >= 16, "tl.dot needs sixteen"
            if kernel != "matmul":
                assert tiles, f"nothing computes {kernel} of {p}"


def test_larger_ranks_are_offered_no_more():
    for kernel in KERNELS:
        counts = [len(plans.offered(kernel, problem(rank=rank), MACHINES[90])) for rank in RANKS]
        assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("size", "product_size"), [(4, 4), (2, 4), (4, 2)])
def test_float32_leaves_the_base_to_the_library(size, product_size, backward):
    p = problem(size=size, product_size=product_size, backward=backward)
    assert costs.ways(p) == ("library",)
    assert plans.choose(p, META).way == "library"
    with plans.forced(plan_of("inline")):
        assert plans.choose(p, META).way == "library", "what cannot compute the problem is not forced"


def test_ways_of_half_problems():
    assert costs.ways(problem()) == WAYS
    assert costs.ways(problem(inline=False)) == ("epilogue", "library")
    assert costs.ways(problem(base=False)) == ("library",)


@pytest.mark.parametrize("way", WAYS)
def test_a_forced_plan_is_chosen(way):
    forced, outer = plan_of(way), OuterPlan(tile=Tile(16, 32, 0, 4, 1), parts=3)
    with plans.forced(forced):
        assert plans.choose(problem(), META) is forced
        with plans.forced(outer):
            assert plans.choose_outer(problem(), META) is outer
        assert plans.choose(problem(), META) is forced
    assert plans.choose(problem(), META) == plans.estimated(problem(), MACHINES[90])


def test_an_assumed_machine_is_planned_for():
    machine = replace(MACHINES[80], processors=4)
    with plans.assuming(machine):
        assert plans.machine_of(META) is plans.machine_of(torch.device("cpu")) is machine
    assert plans.machine_of(META) is MACHINES[90]


def problems_of(rows: int) -> list[Problem]:
    """What a forward and backward of so many rows ask a plan for."""
    seen = []

    def choose(problem, device):
        seen.append(problem)
        return plan_of("library")

    empty = {"dtype": torch.float16, "device": META}
    x, weight, grad = (torch.empty(size, **empty) for size in ((rows, 48), (32, 48), (rows, 32)))
    factors = [torch.empty(size, **empty) for size in ((8, 48), (8, 1), (32, 8))]
    with patch.object(plans, "choose", choose), launch.observed(lambda *call: None):
        adapter = Adapter(*factors, 0.5)
        _, h, S = kernels.linear(x, None, weight, None, adapter)
        needs = [True, False, True, True, True]
        kernels.backward(grad, x, h, S, weight, adapter, True, needs)
    return seen


@pytest.mark.parametrize(
    ("rows", "bucket"), [(0, 1), (1, 1), (2, 2), (3, 4), (63, 64), (64, 64), (1000, 1024), (1025, 2048)]
)
def test_lengths_share_plans_up_to_powers_of_two(rows, bucket):
    forward, backward = problems_of(rows)
    assert forward.rows == backward.rows == bucket
    assert (forward.backward, forward.inner, forward.outer) == (False, 48, 32)
    assert (backward.backward, backward.inner, backward.outer) == (True, 32, 48)
    assert forward.rank == 16 and forward.size == forward.product_size == 2


def moved(calls: list, parts_of_args) -> list[tuple[str, int]]:
    """(kernel, bytes of the tensors it reads and writes) of every launch."""
    counted = []
    for kernel, _, arguments, meta in calls:
        tensors = list(parts_of_args(kernel.__name__, arguments, meta))
        counted.append((kernel.__name__, sum(t.numel() * t.element_size() for t in tensors)))
    return counted


def touched(name: str, arguments: tuple, meta: dict) -> list[torch.Tensor]:
    """The tensors of a launch, but the factor that a matmul with a computed operand does not read."""
    tensors = list(arguments)
    if name == "matmul" and not meta["INLINE"]:
        tensors[5] = None
    return [t for t in tensors if isinstance(t, torch.Tensor)]


def bytes_launched(inner: int, outer: int, way: str, rows: int = 4096) -> list[tuple[str, int]]:
    half = {"dtype": torch.bfloat16, "device": META}
    x, weight, grad = (torch.empty(size, **half) for size in ((rows, inner), (outer, inner), (rows, outer)))
    factors = [torch.empty(size, device=META) for size in ((16, inner), (16, 1), (outer, 16))]
    calls = []
    outer_plan = OuterPlan(tile=Tile(16, 32, 0, 4, 1), parts=4)
    with (
        plans.forced(plan_of(way, Tile(128, 128, 64, 8, 3))),
        patch.object(plans, "choose_outer", lambda *arguments: outer_plan),
        launch.observed(lambda *call: calls.append(call)),
    ):
        adapter = Adapter(*factors, 0.5)
        _, h, S = kernels.linear(x, None, weight, None, adapter)
        needs = [True, False, True, True, True]
        kernels.backward(grad, x, h, S, weight, adapter, True, needs)
    return moved(calls, touched)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("inner", "outer"), SHAPES)
def test_bytes_agree_with_the_tensors_that_are_launched(inner, outer, way):
    forward = problem(inner, outer, inline=way == "inline")
    backward = problem(outer, inner, backward=True)
    model = [
        *costs.launches(forward, way),
        *costs.launches(backward, way),
        *costs.factor_launches(backward, parts=4),
    ]
    model = [(step.kernel, step.bytes) for step in model if step.kernel != "library"]
    real = bytes_launched(inner, outer, way)
    assert [name for name, _ in model] == [name for name, _ in real]
    for (name, estimated), (_, counted) in zip(model, real, strict=True):
        assert estimated == pytest.approx(counted, rel=0.03), name


A100_FLOPS, A100_BYTES = 312e12, 1555e9
FLOORS = {  # microseconds on an A100 of 4096 bfloat16 rows at rank 16: base, x to h, update, dy and x reduced
    (768, 768): (15.5, 4.1, 0.3, 4.3 + 4.2),
    (768, 3072): (62, 4.1, 1.3, 16.5 + 4.2),
    (3072, 768): (62, 16.3, 0.3, 4.3 + 16.4),
    (3072, 3072): (248, 16.3, 1.3, 16.5 + 16.4),
}


@pytest.mark.parametrize(("inner", "outer"), FLOORS)
def test_floors(inner, outer):
    base, project, update, reductions = FLOORS[inner, outer]
    steps = {step.kernel: step for step in costs.launches(problem(inner, outer), "library")}
    outer_step, _ = costs.factor_launches(problem(outer, inner, backward=True), parts=1)
    assert steps["library"].flops / A100_FLOPS * 1e6 == pytest.approx(base, rel=0.03)
    assert steps["project"].bytes / A100_BYTES * 1e6 == pytest.approx(project, rel=0.03)
    assert steps["update"].flops / A100_FLOPS * 1e6 == pytest.approx(update, rel=0.03, abs=0.05)
    assert outer_step.bytes / A100_BYTES * 1e6 == pytest.approx(reductions, rel=0.03)


def test_the_first_floor_in_bytes():
    """x of 768 columns to h: 6.3 MB of x, 49 KB of the factor, 131 KB of h."""
    project, *_ = costs.launches(problem(768, 768), "epilogue")
    assert project.bytes == 4096 * 768 * 2 + 16 * 768 * 4 + 4096 * 16 * 2
    assert project.bytes == pytest.approx(6.4e6, rel=0.03)


def test_operations_of_the_ways():
    """Inline computes its low-rank operand once per column of tiles; the others once."""
    m, c, d, r = 4096, 768, 3072, 16
    base, low, change = 2 * m * c * d, 2 * m * c * r, 2 * m * d * r
    totals = {
        way: sum(step.flops for step in costs.launches(problem(c, d), way, columns=128)) for way in WAYS
    }
    assert totals["epilogue"] == totals["library"] == base + low + change
    assert totals["inline"] == base + (d // 128) * low + change


def test_without_a_base_there_is_none_to_read():
    steps = costs.launches(problem(base=False), "library")
    assert [step.kernel for step in steps] == ["project", "update"]
    both = costs.launches(problem(), "library")[-1].bytes - steps[-1].bytes
    assert both == 4096 * 768 * 2


@pytest.mark.parametrize("way", WAYS)
def test_the_estimate_is_the_sum_of_its_launches(way):
    machine, p = MACHINES[90], problem(768, 3072)
    plan = plans.complete(p, way, machine)
    columns = plan.matmul.columns if plan.matmul else 128
    seconds = 0.0
    for step in costs.launches(p, way, columns):
        rate = machine.flops * (costs.MATMUL_SHARE if step.kernel == "matmul" else 1)
        seconds += machine.launch + max(step.bytes / machine.bandwidth, step.flops / rate)
    assert costs.estimate(p, plan, machine) == pytest.approx(seconds)
    best = plans.estimated(p, machine)
    assert costs.estimate(p, best, machine) <= seconds


@given(
    rows=st.integers(0, 17).map(lambda n: 2**n),
    inner=st.integers(1, 5000),
    outer=st.integers(1, 5000),
    rank=st.sampled_from(RANKS),
    product_size=st.sampled_from([2, 4]),
    machine=st.sampled_from(ALL_MACHINES),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_partial_sums_stay_small(rows, inner, outer, rank, product_size, machine):
    """Parts cover the rows, and partial sums in float32 cost at most half of what is read."""
    p = problem(outer, inner, rows=rows, rank=rank, product_size=product_size, backward=True)
    plan = plans.estimated_outer(p, machine)
    span = -(-rows // (plan.parts * plan.tile.rows)) * plan.tile.rows
    assert span * plan.parts >= rows
    if plan.parts > 1:
        assert 4 * plan.parts * rank * (inner + outer) <= 0.5 * rows * (inner + outer) * p.size


def test_plans_are_frozen_and_hashable():
    assert hash(plan_of("inline")) == hash(plan_of("inline"))
    assert isinstance(plans.choose(problem(), META), Plan)
    with pytest.raises(AttributeError):
        plan_of("inline").way = "library"
