"""The orthogonality regulariser of every factor in Triton: its value and gradient in two launches.

With X = P' [r, width] for a factor P' = Q = lora_A [r, in] or P' = Pᵀ = lora_Bᵀ [r, out] (``reference.py``;
arXiv 2303.10512, eq. 4), in float32, without tf32::

    gram       partials[c] = X_c X_cᵀ  [R, R]     of every chunk c of CHUNK columns of every factor
    gradient   G = Σ_c partials[c] - I            slope = 2 / (2n ‖G‖_F)  (fro)  or 4  (squared)
               dR/dX_c = slope G X_c              R = Σ ‖G‖_F / 2n  or  Σ ‖G‖²_F

Every program of a factor sums its partials again, in the same order: reading r² numbers costs less than a
launch. The factor's first program adds its norm; the one that comes last sums them all in their order, so
that results do not depend on the schedule. The only atomic counts those that have come.

A product in full float32 keeps its inner dimension in registers: it is cut into slices of K. Legend: R the
rank padded to a power of two of at least 16; BLOCK of its rows are one program's; F factors; a row of
``segments`` is [factor, is lora_B, rank, width, first column, first partial of the factor, how many], one for
each chunk; ``located`` [3, F] the factors' addresses, their gradients' distances in bytes from the first, and
the type codes (factor + 4 * gradient).
"""

import triton
import triton.language as tl

from adalora_fast.ops.dispatch.entries import load_entries, store_entries


@triton.jit
def _segment(segments, located, n_factors, RANK: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """(factor, is lora_B, rank, width, first column, address, type code) of this program."""
    row = segments + tl.program_id(0) * 7
    factor = tl.load(row)
    transposed = tl.load(row + 1)
    rank = tl.load(row + 2)
    width = tl.load(row + 3)
    start = tl.load(row + 4)
    code = tl.load(located + 2 * n_factors + factor)
    if RANK > 0:
        rank = RANK  # known when compiled: lora_B's rows can be read at once
    if TYPE >= 0:
        code = TYPE
    if ALIGNED:
        width = tl.multiple_of(width, 8)
        start = tl.multiple_of(start, 16)
    return factor, transposed, rank, width, start, tl.load(located + factor), code


@triton.jit
def _in_A(rank, width, triplets, columns):
    """(offsets, which exist) of a tile [triplets, columns] of lora_A."""
    offsets = triplets[:, None] * width + columns[None, :]
    return offsets, (triplets < rank)[:, None] & (columns < width)[None, :]


@triton.jit
def _in_B(rank, width, columns, triplets):
    """(offsets, which exist) of a tile [columns, triplets] of lora_B, whose rows are X's columns."""
    offsets = columns[:, None] * rank + triplets[None, :]
    return offsets, (columns < width)[:, None] & (triplets < rank)[None, :]


@triton.jit
def gram_kernel(
    located, segments, partials, counter, n_factors,
    R: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr,
    RANK: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One chunk's share of a BLOCK x BLOCK part of its factor's Gram matrix."""
    _, transposed, rank, width, start, address, code = _segment(
        segments, located, n_factors, RANK, TYPE, ALIGNED
    )
    block = tl.program_id(1)
    upper = block // (R // BLOCK) * BLOCK + tl.arange(0, BLOCK)  # triplets of the part's rows
    lower = block % (R // BLOCK) * BLOCK + tl.arange(0, BLOCK)  # and of its columns
    gram = tl.zeros([BLOCK, BLOCK], tl.float32)
    if transposed == 0:
        for column in range(start, tl.minimum(start + CHUNK, width), K):
            offsets, inside = _in_A(rank, width, upper, column + tl.arange(0, K))
            Q = load_entries(address, code % 4, offsets, inside, ALIGNED)  # [BLOCK, K]
            if BLOCK == R:
                gram = tl.dot(Q, tl.trans(Q), acc=gram, input_precision="ieee")
            else:
                offsets, inside = _in_A(rank, width, lower, column + tl.arange(0, K))
                other = load_entries(address, code % 4, offsets, inside, ALIGNED)  # [BLOCK, K]
                gram = tl.dot(Q, tl.trans(other), acc=gram, input_precision="ieee")
    else:
        for column in range(start, tl.minimum(start + CHUNK, width), K):
            places, within = _in_B(rank, width, column + tl.arange(0, K), upper)
            P = load_entries(address, code % 4, places, within, ALIGNED)  # [K, BLOCK]
            if BLOCK == R:
                gram = tl.dot(tl.trans(P), P, acc=gram, input_precision="ieee")
            else:
                places, within = _in_B(rank, width, column + tl.arange(0, K), lower)
                beside = load_entries(address, code % 4, places, within, ALIGNED)  # [K, BLOCK]
                gram = tl.dot(tl.trans(P), beside, acc=gram, input_precision="ieee")
    own = partials + tl.program_id(0).to(tl.int64) * (R * R)
    tl.store(own + upper[:, None] * R + lower[None, :], gram)
    if tl.program_id(0) + block == 0:
        tl.store(counter, 0)  # for the launch after this one


@triton.jit
def _sum_of_partials(partials, first, last, rank, rows, columns, R: tl.constexpr):
    """The part [rows, columns] of G = Σ_c partials[c] - I."""
    entries = rows[:, None] * R + columns[None, :]
    identity = (rows[:, None] == columns[None, :]) & (rows < rank)[:, None]
    total = tl.load(partials + tl.cast(first, tl.int64) * (R * R) + entries)
    for partial in range(first + 1, last):
        total += tl.load(partials + tl.cast(partial, tl.int64) * (R * R) + entries)
    return total - tl.where(identity, 1.0, 0.0)


@triton.jit
def gradient_kernel(
    located, segments, partials, gradients, norms, counter, value, n_factors, count,
    R: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
    NORMS: tl.constexpr, SQUARED: tl.constexpr, GRADIENT: tl.constexpr,
    RANK: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The gradient by BLOCK triplets of one chunk; ``count`` is 2n. The last of the factors' first programs
    writes R.
    """
    factor, transposed, rank, width, start, address, code = _segment(
        segments, located, n_factors, RANK, TYPE, ALIGNED
    )
    row = segments + tl.program_id(0) * 7
    first = tl.load(row + 5)
    last = first + tl.load(row + 6)
    square = 0.0
    for cut in range(0, R, K):
        inner = cut + tl.arange(0, K)
        part = _sum_of_partials(partials, first, last, rank, tl.arange(0, R), inner, R)  # [R, K]
        square += tl.sum(tl.sum(part * part, axis=1), axis=0)
    norm = tl.sqrt_rn(square)
    if SQUARED:
        share = square
        slope = tl.where(norm > 0, 4.0, 0.0)
    else:
        share = norm / count
        slope = tl.where(norm > 0, 2.0 / count / norm, 0.0)

    if GRADIENT:
        result = gradients.to(tl.int64) + tl.load(located + n_factors + factor)
        triplets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        for column in range(start, tl.minimum(start + CHUNK, width), COLUMNS):
            columns = column + tl.arange(0, COLUMNS)
            if transposed == 0:
                dQ = tl.zeros([BLOCK, COLUMNS], tl.float32)
                for cut in range(0, R, K):
                    inner = cut + tl.arange(0, K)
                    offsets, inside = _in_A(rank, width, inner, columns)
                    Q = load_entries(address, code % 4, offsets, inside, ALIGNED)  # [K, COLUMNS]
                    G = _sum_of_partials(partials, first, last, rank, triplets, inner, R)  # [BLOCK, K]
                    dQ = tl.dot(G, Q, acc=dQ, input_precision="ieee")
                targets, written = _in_A(rank, width, triplets, columns)
                store_entries(result, code // 4, targets, dQ * slope, written, ALIGNED)
            else:
                dP = tl.zeros([COLUMNS, BLOCK], tl.float32)
                for cut in range(0, R, K):
                    inner = cut + tl.arange(0, K)
                    places, within = _in_B(rank, width, columns, inner)
                    P = load_entries(address, code % 4, places, within, ALIGNED)  # [COLUMNS, K]
                    H = _sum_of_partials(partials, first, last, rank, inner, triplets, R)  # [K, BLOCK]
                    dP = tl.dot(P, H, acc=dP, input_precision="ieee")
                goals, stored = _in_B(rank, width, columns, triplets)
                store_entries(result, code // 4, goals, dP * slope, stored, ALIGNED)

    if start + tl.program_id(1) == 0:
        tl.store(norms + factor, share)
        tl.debug_barrier()
        come = tl.atomic_add(counter, 1, sem="acq_rel")
        if come == n_factors - 1:
            total = tl.zeros([NORMS], tl.float32)
            for begin in range(0, n_factors, NORMS):
                which = begin + tl.arange(0, NORMS)
                total += tl.load(norms + which, mask=which < n_factors, other=0.0, cache_modifier=".cg")
            tl.store(value, tl.sum(total, axis=0))
