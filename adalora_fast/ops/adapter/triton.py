"""The adapter op on a GPU: launchers of the kernels in kernels.py, by the plans of plans.py.

The functions have the contract of reference.py. Of what a backward needs, ``h`` is kept padded to [M, RANK],
and S is not kept: the kernels form lora_A ⊙ lora_E in registers.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from adalora_fast.ops.dispatch.launch import launch

from . import kernels, plans
from .adapter import Adapter
from .dropout import survivors_scale, threshold_of
from .plans import Plan, Problem
from .reference import base_product, output

DROPS_INSIDE = True
MAX_RANK = 128
GROUP = 8  # rows of tiles that share the weight's columns in L2
REDUCE_COLUMNS, REDUCE_ROWS = 512, 64  # of dA and of dB, per program of ``reduce``


def limit(rank: int, dtype: torch.dtype) -> str | None:
    """Why the kernels do not compute an adapter of this rank in this type, or None."""
    if rank > MAX_RANK:
        return f"rank {rank} is over {MAX_RANK}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"they compute in float32, float16 and bfloat16, not in {dtype}"
    return None


def padded(rank: int) -> int:
    """RANK: the columns that h has for a rank."""
    return max(16, 1 << (rank - 1).bit_length())


def saved_shapes(rows: int, lora_A: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the second and third result of :func:`linear`, which go to :func:`backward`."""
    return (rows, padded(int(lora_A.shape[0]))), (0,)


class _Factor(NamedTuple):
    """A factor as ``project`` and ``update`` read it: C x R, by strides; E where it is folded in."""

    tensor: Tensor
    lora_E: Tensor
    stride_r: int
    stride_c: int
    fold: bool


class _Drop(NamedTuple):
    """Dropout of the adapter's input: its seed, threshold and the scale of what survives."""

    seed: Tensor | None
    threshold: int
    scale: float

    @classmethod
    def of(cls, adapter: Adapter) -> "_Drop":
        if adapter.seed is None or adapter.dropout_p == 0.0:
            return cls(None, 0, 1.0)
        return cls(adapter.seed, threshold_of(adapter.dropout_p), survivors_scale(adapter.dropout_p))

    @property
    def on(self) -> bool:
        return self.seed is not None


_NO_DROP = _Drop(None, 0, 1.0)


def _factors(adapter: Adapter) -> tuple[_Factor, _Factor]:
    """(lora_A ⊙ lora_E, lora_B)"""
    lora_A, lora_E, lora_B = adapter.lora_A, adapter.lora_E.contiguous(), adapter.lora_B
    return (
        _Factor(lora_A, lora_E, lora_A.stride(0), lora_A.stride(1), True),
        _Factor(lora_B, lora_E, lora_B.stride(1), lora_B.stride(0), False),
    )


def _matrix(tensor: Tensor) -> Tensor:
    """[M, C] with contiguous rows, near enough for a tile's 32-bit offsets; a copy only where needed."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    wide = rows.stride(0) * 256 >= 2**31
    return rows.contiguous() if wide or (rows.stride(1) != 1 and rows.shape[1] > 1) else rows


def _precision(dtype: torch.dtype) -> str:
    """How float32 products are taken: PyTorch's own setting decides, "highest" is exact."""
    exact = dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "ieee" if exact else "tf32"


@lru_cache(maxsize=4096)
def _problem(
    rows: int, inner: int, outer: int, rank: int, size: int, product_size: int, **flags: bool
) -> Problem:
    return Problem(
        rows=1 << max(rows - 1, 0).bit_length(),  # one plan for all lengths up to a power of two
        inner=inner,
        outer=outer,
        rank=padded(rank),
        size=size,
        product_size=product_size,
        **flags,
    )


def problem_of(source: Tensor, outer: int, rank: int, dtype: torch.dtype, **flags: bool) -> Problem:
    """The problem of multiplying ``source`` with a weight, its low-rank products in ``dtype``."""
    aligned = (source.shape[1] | outer | source.stride(0) | source.data_ptr()) % 16 == 0
    sizes = source.element_size(), dtype.itemsize
    return _problem(*source.shape, outer, rank, *sizes, aligned=aligned, **flags)


def _project(
    source: Tensor, factor: _Factor, dtype: torch.dtype, scale: float, drop: _Drop, plan: Plan
) -> Tensor:
    """low [M, RANK] = scale · drop(source) · factor."""
    (rows, columns), rank, tile = source.shape, factor.lora_E.shape[0], plan.project
    low = source.new_empty(rows, padded(rank), dtype=dtype)
    if rows:
        launch(
            kernels.project, (-(-rows // tile.rows),),
            source, factor.tensor, factor.lora_E, low, drop.seed, rows, columns, rank, source.stride(0),
            factor.stride_r, factor.stride_c, scale * drop.scale, drop.threshold,
            FOLD=factor.fold, DROP=drop.on, RANK=padded(rank), EVEN=columns % tile.columns == 0,
            PRECISION=_precision(dtype), BLOCK_M=tile.rows, BLOCK_C=tile.columns,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return low


def _update(
    base: Tensor | None, low: Tensor, factor: _Factor, out: Tensor, scale: float, drop: _Drop, plan: Plan
) -> Tensor:
    """out [M, D] = base + scale · drop(low · factor)."""
    (rows, outer), rank, tile = out.shape, factor.lora_E.shape[0], plan.update
    if rows:
        launch(
            kernels.update, (-(-rows // tile.rows), -(-outer // tile.columns)),
            base, low, factor.tensor, factor.lora_E, out, drop.seed, rows, outer, rank,
            0 if base is None else base.stride(0), factor.stride_r, factor.stride_c, scale * drop.scale,
            drop.threshold,
            ADD=base is not None, FOLD=factor.fold, DROP=drop.on, RANK=padded(rank),
            PRECISION=_precision(low.dtype), BLOCK_M=tile.rows, BLOCK_D=tile.columns,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


def _matmul(
    source: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, out: Tensor, first: _Factor,
    second: _Factor, low_scale: float, out_scale: float, drop: _Drop, plan: Plan,
) -> None:  # fmt: skip
    """out [M, D] = source weight + bias + out_scale · drop(low · second); ``low`` is written where the plan
    is inline.
    """
    (rows, inner), outer, rank, tile = source.shape, weight.shape[1], first.lora_E.shape[0], plan.matmul
    if rows:
        launch(
            kernels.matmul, (-(-rows // tile.rows) * -(-outer // tile.columns),),
            source, weight, bias, low, out, first.tensor, second.tensor, first.lora_E, drop.seed,
            rows, inner, outer, rank, source.stride(0), weight.stride(0), weight.stride(1),
            first.stride_r, first.stride_c, second.stride_r, second.stride_c,
            low_scale, out_scale * drop.scale, drop.threshold,
            BIAS=bias is not None, INLINE=plan.way == "inline", FOLD_IN=first.fold, DROP=drop.on,
            RANK=padded(rank), EVEN=inner % tile.depth == 0,
            BLOCK_M=tile.rows, BLOCK_D=tile.columns, BLOCK_C=tile.depth, GROUP=GROUP,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def linear(
    x: Tensor, adapter_input: Tensor | None, weight: Tensor, bias: Tensor | None, adapter: Adapter
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h, an empty tensor)."""
    rows, drop = _matrix(x), _Drop.of(adapter)
    inputs = rows if adapter_input is None else _matrix(adapter_input)
    dtype = adapter.product_dtype(x.dtype)
    right, left = _factors(adapter)
    outer = weight.shape[0]
    # One product serves base and adapter where both are of one type.
    flags = {"base": dtype == x.dtype, "inline": inputs is rows and not drop.on}
    problem = problem_of(rows, outer, adapter.rank, dtype, backward=False, **flags)
    plan = plans.choose(problem, x.device)
    if plan.way == "inline":
        h = rows.new_empty(rows.shape[0], problem.rank, dtype=dtype)
    else:
        h = _project(inputs, right, dtype, 1.0, drop, plan)
    y, out = output(x, outer)
    if plan.way == "library":
        base_product(rows, weight, bias, out)
        _update(out, h, left, out, adapter.scaling, _NO_DROP, plan)
    else:
        contiguous = None if bias is None else bias.contiguous()
        _matmul(rows, weight.t(), contiguous, h, out, right, left, 1.0, adapter.scaling, _NO_DROP, plan)
    return y, h, rows.new_empty(0, dtype=dtype)


def _delta(result: Tensor, out: Tensor, x: Tensor, adapter: Adapter) -> Tensor:
    """Write result + the adapter of x to ``out``; returns h."""
    rows, base = _matrix(x), _matrix(result)
    dtype = adapter.product_dtype(result.dtype)
    problem = problem_of(rows, base.shape[1], adapter.rank, dtype, backward=False, base=False)
    plan = plans.choose(problem, x.device)
    right, left = _factors(adapter)
    h = _project(rows, right, dtype, 1.0, _Drop.of(adapter), plan)
    _update(base, h, left, out.view(base.shape), adapter.scaling, _NO_DROP, plan)
    return h


def delta(result: Tensor, x: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor, Tensor]:
    """(result + c h Bᵀ, h, an empty tensor); ``result`` is left as it is."""
    out = result.new_empty(result.shape)
    h = _delta(result, out, x, adapter)
    return out, h, h.new_empty(0)


def delta_(result: Tensor, x: Tensor, adapter: Adapter) -> None:
    """result += c h Bᵀ in place; ``result`` is contiguous."""
    _delta(result, result, x, adapter)
    torch.autograd.graph.increment_version(result)  # a kernel's writes go unnoticed otherwise


def backward(
    grad: Tensor, adapter_input: Tensor, h: Tensor, S: Tensor, weight: Tensor | None, adapter: Adapter,
    shared_input: bool, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dx', dA, dE, dB); what ``needs`` (in this order) leaves out is an empty tensor."""
    need_x, need_input, need_A, need_E, need_B = needs
    rows, inputs, drop = _matrix(grad), _matrix(adapter_input), _Drop.of(adapter)
    dtype, columns, scaling = h.dtype, inputs.shape[1], adapter.scaling
    right, left = _factors(adapter)
    both = need_x and shared_input  # dx carries the base's and the adapter's path
    flags = {"base": both and dtype == grad.dtype}
    problem = problem_of(rows, columns, adapter.rank, dtype, backward=True, **flags)
    plan = plans.choose(problem, grad.device)
    dx, d_input, dA, dE, dB = (grad.new_empty(0) for _ in needs)

    g = None
    if plan.way == "inline":
        g = rows.new_empty(rows.shape[0], problem.rank, dtype=dtype)
    elif both or need_input or need_A or need_E:
        g = _project(rows, left, dtype, scaling, _NO_DROP, plan)
    if both and plan.way != "library":
        dx = rows.new_empty(inputs.shape)
        _matmul(rows, weight, None, g, dx, left, right, scaling, 1.0, drop, plan)
    elif need_x:
        dx = rows @ weight
        if both:
            _update(dx, g, right, dx, 1.0, drop, plan)
    if need_input:
        d_input = _update(None, g, right, inputs.new_empty(inputs.shape), 1.0, drop, plan)
    if need_A or need_E or need_B:
        whole = problem if problem.base else problem_of(rows, columns, adapter.rank, dtype, backward=True)
        dA, dE, dB = _factor_gradients(inputs, rows, g, h, adapter, drop, whole, needs[2:])
    return (
        dx.view(adapter_input.shape) if need_x else dx,
        d_input.view(adapter_input.shape) if need_input else d_input,
        dA,
        dE,
        dB,
    )


def _factor_gradients(
    inputs: Tensor, grad: Tensor, g: Tensor | None, h: Tensor, adapter: Adapter, drop: _Drop,
    problem: Problem, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dA, dE, dB) through partial sums over ranges of rows; empty where not needed."""
    need_A, need_E, need_B = needs
    lora_A, lora_E, lora_B, scaling, *_ = adapter
    need_right = need_A or need_E
    rows, rank, padding = grad.shape[0], lora_A.shape[0], problem.rank
    width, height = inputs.shape[1], grad.shape[1]
    plan = plans.choose_outer(problem, grad.device)
    tile = plan.tile
    span = -(-rows // (plan.parts * tile.rows)) * tile.rows  # rows of one part
    parts = -(-rows // span) if rows else 0
    partial_a = grad.new_empty(parts if need_right else 0, padding, width, dtype=torch.float32)
    partial_b = grad.new_empty(parts if need_B else 0, padding, height, dtype=torch.float32)
    tiles_a = -(-width // tile.columns) if need_right else 0
    tiles_b = -(-height // tile.columns) if need_B else 0
    if parts:
        launch(
            kernels.outer, (tiles_a + tiles_b, parts),
            inputs, grad, h if g is None else g, h, partial_a, partial_b, drop.seed,
            rows, width, height, span, tiles_a, inputs.stride(0), grad.stride(0),
            drop.scale, scaling, drop.threshold,
            DROP=drop.on, RANK=padding, PRECISION=_precision(h.dtype), BLOCK_M=tile.rows,
            BLOCK_C=tile.columns, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    dA = torch.empty_like(lora_A, memory_format=torch.contiguous_format) if need_A else grad.new_empty(0)
    dE = torch.empty_like(lora_E, memory_format=torch.contiguous_format) if need_E else grad.new_empty(0)
    dB = torch.empty_like(lora_B, memory_format=torch.contiguous_format) if need_B else grad.new_empty(0)
    programs_a = rank if need_right else 0
    launch(
        kernels.reduce, (programs_a + (-(-height // REDUCE_ROWS) if need_B else 0),),
        partial_a, partial_b, lora_A, lora_E.contiguous(), dA, dE, dB,
        width, height, rank, lora_A.stride(0), lora_A.stride(1), parts, programs_a,
        NEED_A=need_A, NEED_E=need_E, RANK=padding, BLOCK=REDUCE_COLUMNS, BLOCK_N=REDUCE_ROWS,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return dA, dE, dB
