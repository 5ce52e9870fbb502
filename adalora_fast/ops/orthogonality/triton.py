"""Launchers of the orthogonality kernels: two launches for any number of matrices, ranks up to 128.

Factors are read where they lie, in float32, float16 or bfloat16, and gradients are written into the stacks
that the op returns. float64 and larger ranks run in ``reference.py``.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from adalora_fast.ops.dispatch import tables
from adalora_fast.ops.dispatch.launch import launch

from . import kernels, reference
from .reference import groups_by_shape, shapes_of

LARGEST_RANK = 128
CHUNK = {16: 512, 32: 512, 64: 1024, 128: 2048}  # columns of a program: few partials where they are large
BLOCK = {16: 16, 32: 32, 64: 64, 128: 64}  # triplets of a program
GRAM_K = {16: 32, 32: 32, 64: 16, 128: 16}  # columns in one product of the first launch
GRADIENT_K = 16  # triplets in one of the second
COLUMNS = 64  # of a tile of the gradient
WARPS = {16: 4, 32: 8, 64: 8, 128: 8}
REGISTERS = 168  # of a thread at most: left alone, the assembler takes fewer and spills a few bytes
NORMS = 256  # factors whose norms are added at a time
ALIGNMENT = 16  # bytes: what a thread reads or writes at once

Shapes = tuple[tuple[int, int], ...]


def loss(
    lora_A: list[Tensor], lora_B: list[Tensor], penalty: str, with_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    """See ``reference.loss``."""
    if reason := _unfit(lora_A, lora_B):
        tables.say_once("orthogonality", reason)
        return reference.loss(lora_A, lora_B, penalty, with_grad)
    device = lora_A[0].device
    place = tables.place_on(device)
    factors = [factor.contiguous() for factor in (*lora_A, *lora_B)]
    stacks, gradients, places = (
        _stacks(lora_A, lora_B) if with_grad else ([], None, [(0, f.dtype) for f in factors])
    )
    segments, n_segments, taken, R, rank, even = _segments(shapes_of(lora_A), shapes_of(lora_B), place)
    if not n_segments:  # ranks of zero only
        return torch.zeros((), dtype=torch.float32, device=device), stacks
    codes = tables.TYPE_CODES
    addresses = tuple(factors[i].data_ptr() for i in taken)
    distances = tuple(places[i][0] for i in taken)
    types = [codes[factors[i].dtype] + 4 * codes[places[i][1]] for i in taken]
    located = tables.table((*addresses, *distances, *types), torch.int64, place)
    partials = torch.empty(n_segments, R, R, dtype=torch.float32, device=device)
    norms = torch.empty(len(taken), dtype=torch.float32, device=device)
    counter = torch.empty((), dtype=torch.int32, device=device)
    value = torch.empty((), dtype=torch.float32, device=device)
    shared = {
        "R": R, "BLOCK": BLOCK[R], "CHUNK": CHUNK[R],
        "RANK": rank, "TYPE": types[0] if len(set(types)) == 1 else -1,
        "ALIGNED": even and tables.is_aligned((*addresses, *distances)),
        "num_warps": WARPS[R], "maxnreg": REGISTERS,
    }  # fmt: skip
    blocks = R // BLOCK[R]
    launch(
        kernels.gram_kernel, (n_segments, blocks * blocks),
        located, segments, partials, counter, len(taken),
        K=GRAM_K[R], **shared,
    )  # fmt: skip
    launch(
        kernels.gradient_kernel, (n_segments, blocks),
        located, segments, partials, gradients, norms, counter, value, len(taken), len(factors),
        K=GRADIENT_K, COLUMNS=COLUMNS, NORMS=NORMS, SQUARED=penalty == "squared", GRADIENT=with_grad,
        **shared,
    )  # fmt: skip
    return value, stacks


def _unfit(lora_A: list[Tensor], lora_B: list[Tensor]) -> str | None:
    """Why the kernels cannot run, or None."""
    strange = {factor.dtype for factor in (*lora_A, *lora_B)} - tables.TYPE_CODES.keys()
    if strange:
        return f"a factor is {strange.pop()}"
    rank = max(factor.shape[0] for factor in lora_A)
    if rank > LARGEST_RANK:
        return f"a layer has rank {rank}, they take up to {LARGEST_RANK}"
    return None


def _stacks(
    lora_A: list[Tensor], lora_B: list[Tensor]
) -> tuple[list[Tensor], Tensor, list[tuple[int, torch.dtype]]]:
    """(new gradients stacked by shape, as the reference returns them; the bytes they lie in; how far from
    their start each factor's begins, and its type).

    They lie in one piece of memory, so that the table of addresses does not depend on where that is.
    """
    parts, places, size = [], [], 0
    for factors in (lora_A, lora_B):
        at = [(0, example.dtype) for example in factors]
        for group in groups_by_shape(shapes_of(factors)):
            example = factors[group[0]]
            parts.append((size, (len(group), *example.shape), example.dtype))
            each = example.numel() * example.element_size()
            for position, i in enumerate(group):
                at[i] = size + position * each, example.dtype
            size += -(-len(group) * each // ALIGNMENT) * ALIGNMENT
        places += at
    memory = torch.empty(size, dtype=torch.uint8, device=lora_A[0].device)
    stacks = [
        memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        for start, shape, dtype in parts
    ]
    return stacks, memory, places


@lru_cache(maxsize=32)
def _segments(
    shapes_A: Shapes, shapes_B: Shapes, place: tables.Place
) -> tuple[Tensor, int, tuple[int, ...], int, int, bool]:
    """(rows of segments, how many, the factors that have triplets, R, their rank if it is one and else 0,
    whether shapes allow 16-byte access).
    """
    sizes = [(0, *shape) for shape in shapes_A] + [(1, rank, height) for height, rank in shapes_B]
    taken = tuple(i for i, (_, rank, _) in enumerate(sizes) if rank)
    ranks = {sizes[i][1] for i in taken}
    R = max([16, *(1 << (rank - 1).bit_length() for rank in ranks)])
    rows = []
    for factor, i in enumerate(taken):
        transposed, rank, width = sizes[i]
        starts = range(0, max(width, 1), CHUNK[R])
        first = len(rows)
        rows += [(factor, transposed, rank, width, start, first, len(starts)) for start in starts]
    even = all(sizes[i][2] % 8 == 0 and sizes[i][1] % 8 == 0 for i in taken)
    flat = tuple(value for row in rows for value in row)
    rank = ranks.pop() if len(ranks) == 1 else 0
    return tables.table(flat, torch.int32, place), len(rows), taken, R, rank, even
