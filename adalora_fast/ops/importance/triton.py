"""Launchers of the importance kernels: two launches an optimizer step, one more to score, for any number of
layers.

They read weights and gradients where they lie (float32, float16, bfloat16, mixed as they come; a tensor
that is not contiguous is copied) and keep float32 statistics in the layout of ``reference.py``. float64 runs
there.
"""

from functools import lru_cache

import torch
from torch import Tensor

from adalora_fast.ops.dispatch import tables
from adalora_fast.ops.dispatch.launch import launch

from . import kernels, reference
from .reference import Layout, layout_of, unknown
from .rule import ScoreRule

# What kernels.py computes; a name that it does not know ends its compilation.
SCORES = ("sensitivity", "movement", "fisher", "gsnr", "magnitude")
SMOOTHINGS = ("ema_uncertainty", "ema", "sum", "none")

CHUNK = 2048  # entries of a program
WARPS = 8  # of it; with 4, entry by entry access spills on sm_80 (Triton 3.6)
COUNTS = 128  # parameters whose counts a program takes at a time
FLAGS = 512  # programs that look for bad signals: every program of the update reads what each of them found
MISSING = 3  # the type code of a gradient that is None
TRIPLETS = 8  # of a program: one 32-byte sector of a row of lora_B's statistics
BLOCK = 256  # entries of each of them at a time


def limit(score: str, smoothing: str) -> str | None:
    """Why the kernels do not compute this score with this smoothing, or None."""
    return unknown("the Triton kernels", SCORES, SMOOTHINGS, score, smoothing)


def update_(
    parameters: list[Tensor],
    grads: list[Tensor | None],
    statistics: Tensor,
    updates: Tensor,
    rule: ScoreRule,
    active: Tensor | None = None,
) -> None:
    """See ``reference.update_``."""
    layout = layout_of(parameters, rule.score)
    reason = _unfit(statistics, layout) or _unfit_types([*parameters, *grads])
    if reason:
        tables.say_once("importance", reason)
        reference.update_(parameters, grads, statistics, updates, rule, active)
        return
    device = statistics.device
    weights = [parameter.contiguous() for parameter in parameters]
    gradients = [None if grad is None else grad.contiguous() for grad in grads]
    place = tables.place_on(device)
    located, whole = _located(weights, gradients, place)
    chunks, n_chunks, even = _chunks(layout, place)
    aligned = whole and even and statistics.stride(0) % 4 == 0 and statistics.data_ptr() % 16 == 0
    n_flags = max(min(n_chunks, FLAGS), 1)
    flags = updates.new_empty(n_flags, dtype=torch.int32)
    seen = torch.empty_like(updates)
    shares = statistics.new_empty(len(parameters))
    beta_high = float(torch.tensor(rule.beta1, dtype=torch.float32, device="cpu"))  # kernels take float32
    shared = {"SCORE": rule.score, "CHUNK": CHUNK, "COUNTS": COUNTS, "ALIGNED": aligned, "num_warps": WARPS}
    launch(
        kernels.flag_kernel, (n_flags,),
        located, chunks, updates, seen, shares, flags, len(parameters), n_chunks,
        beta_high, rule.beta1 - beta_high, None if active is None else active.view(torch.uint8),
        **shared,
    )  # fmt: skip
    launch(
        kernels.update_kernel, (max(n_chunks, 1),),
        located, chunks, statistics, updates, seen, shares, flags, statistics.stride(0), len(parameters),
        n_flags, 1 - rule.beta1, 1 - rule.beta2,
        SMOOTHING=rule.smoothing, FLAGS=FLAGS, **shared,
    )  # fmt: skip


def triplet_scores(parameters: list[Tensor], statistics: Tensor, rule: ScoreRule) -> Tensor:
    """See ``reference.triplet_scores``."""
    layout = layout_of(parameters, rule.score)
    if reason := _unfit(statistics, layout):
        tables.say_once("importance", reason)
        return reference.triplet_scores(parameters, statistics, rule)
    shapes = tuple(tuple(parameter.shape) for parameter in parameters)
    slices, n_slices = _slices(layout, shapes, tables.place_on(statistics.device))
    scores = statistics.new_empty(sum(layout.ranks))
    if n_slices:
        launch(
            kernels.triplet_kernel, (n_slices,), statistics, slices, scores, statistics.stride(0),
            SCORE=rule.score, SMOOTHING=rule.smoothing, TRIPLETS=TRIPLETS, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return scores


def _unfit(statistics: Tensor, layout: Layout) -> str | None:
    """Why the kernels cannot work on these statistics."""
    if statistics.dtype != torch.float32:
        return f"statistics are {statistics.dtype}, they keep float32"
    if statistics.shape[1] > 1 and statistics.stride(1) != 1:
        return f"statistics have strides {statistics.stride()}, their rows must be contiguous"
    if layout.size >= 2**31:
        return f"{layout.size} entries are more than 32 bits can count"
    return None


def _unfit_types(tensors: list[Tensor | None]) -> str | None:
    strange = {tensor.dtype for tensor in tensors if tensor is not None} - tables.TYPE_CODES.keys()
    return f"a parameter or gradient is {strange.pop()}" if strange else None


def _located(
    weights: list[Tensor], gradients: list[Tensor | None], place: tables.Place
) -> tuple[Tensor, bool]:
    """(addresses of weights, of gradients, and type codes [3, N] flat; whether all are aligned)."""
    codes = tables.TYPE_CODES
    addresses = (
        *(weight.data_ptr() for weight in weights),
        *(0 if gradient is None else gradient.data_ptr() for gradient in gradients),
    )
    types = (
        codes[weight.dtype] + 4 * (MISSING if gradient is None else codes[gradient.dtype])
        for weight, gradient in zip(weights, gradients, strict=True)
    )
    return tables.table((*addresses, *types), torch.int64, place), tables.is_aligned(addresses)


@lru_cache(maxsize=32)
def _chunks(layout: Layout, place: tables.Place) -> tuple[Tensor, int, bool]:
    """(rows of [parameter, offset, column, length], how many, whether columns allow 16-byte access)."""
    rows = [
        (parameter, offset, start + offset, min(CHUNK, size - offset))
        for group in layout.groups
        for size in [group.shape[0] * group.shape[1]]
        for start, parameter in zip(range(group.start, group.stop, size), group.members, strict=True)
        for offset in range(0, size, CHUNK)
    ]
    even = all(column % 4 == 0 and length % 4 == 0 for _, _, column, length in rows)
    flat = tuple(value for row in rows or [(0, 0, 0, 0)] for value in row)
    return tables.table(flat, torch.int32, place), len(rows), even


@lru_cache(maxsize=32)
def _slices(layout: Layout, shapes: tuple[tuple[int, int], ...], place: tables.Place) -> tuple[Tensor, int]:
    """(rows of [column of A, of E, of B, in, out, rank, first triplet, position], how many)."""
    columns = [0] * len(shapes)
    for group in layout.groups:
        size = group.shape[0] * group.shape[1]
        for start, parameter in zip(range(group.start, group.stop, size), group.members, strict=True):
            columns[parameter] = start
    rows, position = [], 0
    for matrix, rank in enumerate(layout.ranks):
        (_, width), _, (height, _) = shapes[3 * matrix : 3 * matrix + 3]
        for first in range(0, rank, TRIPLETS):
            rows.append((*columns[3 * matrix : 3 * matrix + 3], width, height, rank, first, position + first))
        position += rank
    return tables.table(tuple(value for row in rows for value in row), torch.int32, place), len(rows)
