"""Triton kernels of the adapter. Forward and backward are the same five kernels with other operands.

AdaLoRA, arXiv 2303.10512, eq. 1, with PEFT's scale c; S = A ⊙ E, and x' is x after dropout::

    forward                backward
    h = x' Sᵀ              g  = c dy B               project  [M, C] → [M, R]
    y = x Wᵀ + b + c h Bᵀ  dx = dy W + keep(g S)     matmul   [M, C] → [M, D], or update in place
                           V  = gᵀ x', dB = c dyᵀ h  outer    [M, C] → [R, C], partial sums
                           dA = V ⊙ E, dE = Σ V ⊙ A  reduce   of the partial sums

``matmul`` may compute its own low-rank operand (h or g) from the tiles it reads anyway (INLINE), so that an
activation is read once; its programs of the first column of tiles store it for the backward.

Products accumulate in float32; h and g are rounded to the product's type, as in plain PyTorch. Sums over
rows go through partial sums that are added in a fixed order: no atomics, the same bits at every run.

Legend: M tokens, C inner size (K forward, N backward), D outer size, R rank, RANK the rank padded to a
power of two ≥ 16 (``tl.dot`` needs 16): h and g are kept padded with zeros, the parameters are masked
where they are read and written. Row offsets are 64 bit, offsets inside a tile 32 bit.
"""

import triton
import triton.language as tl


@triton.jit
def _keep(seed, row, start, threshold, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which entries of a tile survive dropout: those whose 16 random bits reach ``threshold``.

    Philox 4x32-10 with the seed as key and (column // 8, row, 0, 0) as counter: 128 bits serve eight columns,
    whatever the tiling.
    """
    group = start // 8 + tl.arange(0, BLOCK_C // 8)
    rows = row + tl.arange(0, BLOCK_M)
    c0 = tl.broadcast_to(group[None, :], [BLOCK_M, BLOCK_C // 8]).to(tl.uint32)
    c1 = tl.broadcast_to(rows[:, None], [BLOCK_M, BLOCK_C // 8]).to(tl.uint32)
    zero = c0 * 0
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [M, C / 8, 2, 2], word 2 i + j
    bits = tl.join(words & 0xFFFF, words >> 16)  # [M, C / 8, 2, 2, 2]
    return tl.reshape(bits, [BLOCK_M, BLOCK_C]).to(tl.int32) >= threshold  # [M, C]


@triton.jit
def _tile(
    source, stride, rows, columns, start, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, EVEN: tl.constexpr
):
    """[BLOCK_M, BLOCK_C] of a matrix with contiguous rows, from column ``start``; zero outside."""
    m = tl.arange(0, BLOCK_M)
    c = start + tl.arange(0, BLOCK_C)
    inside = (m < rows)[:, None]
    if not EVEN:
        inside = inside & (c < columns)[None, :]
    return tl.load(source + m[:, None] * stride + c[None, :], mask=inside, other=0.0)


@triton.jit
def _factor(
    factor, lora_E, stride_r, stride_c, rank, columns, start,
    FOLD: tl.constexpr, RANK: tl.constexpr, BLOCK_C: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """[BLOCK_C, RANK] of lora_B, or of (lora_A ⊙ lora_E)ᵀ with FOLD; zero outside."""
    r = tl.arange(0, RANK)
    c = start + tl.arange(0, BLOCK_C)
    inside = (r < rank)[None, :]
    if not EVEN:
        inside = inside & (c < columns)[:, None]
    tile = tl.load(factor + c[:, None] * stride_c + r[None, :] * stride_r, mask=inside, other=0.0)
    if FOLD:
        tile = tile * tl.load(lora_E + r, mask=r < rank, other=0.0)[None, :]
    return tile


@triton.jit(do_not_specialize=["rows", "threshold"])
def project(
    source, factor, lora_E, low, seed,
    rows, columns, rank, source_stride, stride_r, stride_c, scale, threshold,
    FOLD: tl.constexpr, DROP: tl.constexpr, RANK: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """low [M, RANK] = scale · drop(source [M, C]) factor [C, R]; one program per BLOCK_M rows."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    left = (rows - first).to(tl.int32)
    source += first * source_stride
    total = tl.zeros([BLOCK_M, RANK], tl.float32)
    if DROP:
        key = tl.load(seed)
    for start in range(0, columns, BLOCK_C):
        tile = _tile(source, source_stride, left, columns, start, BLOCK_M, BLOCK_C, EVEN)  # [M, C]
        if DROP:
            tile = tl.where(_keep(key, first, start, threshold, BLOCK_M, BLOCK_C), tile, 0.0)
        f = _factor(factor, lora_E, stride_r, stride_c, rank, columns, start, FOLD, RANK, BLOCK_C, EVEN)
        dtype = low.dtype.element_ty
        total = tl.dot(tile.to(dtype), f.to(dtype), total, input_precision=PRECISION)
    m = tl.arange(0, BLOCK_M)
    r = tl.arange(0, RANK)
    total = tl.where((r < rank)[None, :], total * scale, 0.0)  # an infinite input made the padding NaN
    low += first * RANK
    tl.store(low + m[:, None] * RANK + r[None, :], total.to(low.dtype.element_ty), mask=(m < left)[:, None])


@triton.jit(do_not_specialize=["rows", "threshold"])
def matmul(
    source, weight, bias, low, out, factor_in, factor_out, lora_E, seed,
    rows, inner, outer, rank, source_stride, weight_stride_c, weight_stride_d,
    in_stride_r, in_stride_c, out_stride_r, out_stride_d, low_scale, out_scale, threshold,
    BIAS: tl.constexpr, INLINE: tl.constexpr, FOLD_IN: tl.constexpr, DROP: tl.constexpr,
    RANK: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out [M, D] = source [M, C] weight [C, D] + bias + out_scale · drop(low [M, R] factor_out [R, D]).

    INLINE: low = low_scale · source factor_in [C, R] is computed on the way and stored; else it is read.
    One of the factors is lora_A ⊙ lora_E: the first with FOLD_IN (forward), else the second.
    """
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_d = tl.cdiv(outer, BLOCK_D)
    pid = tl.program_id(0)
    first_m = pid // (GROUP * tiles_d) * GROUP  # GROUP rows of tiles at a time share the weight in L2
    height = tl.minimum(tiles_m - first_m, GROUP)
    tile_m = first_m + pid % (GROUP * tiles_d) % height
    tile_d = pid % (GROUP * tiles_d) // height

    first = tile_m.to(tl.int64) * BLOCK_M
    first_d = tile_d * BLOCK_D
    left = (rows - first).to(tl.int32)
    m = tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_D)
    r = tl.arange(0, RANK)
    inside_d = (d < outer - first_d)[None, :]
    dtype = low.dtype.element_ty
    source += first * source_stride
    low += first * RANK
    weight += first_d.to(tl.int64) * weight_stride_d
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    h = tl.zeros([BLOCK_M, RANK], tl.float32)
    for start in range(0, inner, BLOCK_C):
        tile = _tile(source, source_stride, left, inner, start, BLOCK_M, BLOCK_C, EVEN)  # [M, C]
        inside = inside_d
        if not EVEN:
            inside = inside & (c < inner - start)[:, None]
        offsets = c[:, None] * weight_stride_c + d[None, :] * weight_stride_d
        w = tl.load(weight + offsets, mask=inside, other=0.0)  # [C, D]
        weight += BLOCK_C * weight_stride_c
        total = tl.dot(tile, w, total)
        if INLINE:
            f = _factor(
                factor_in, lora_E, in_stride_r, in_stride_c, rank, inner, start, FOLD_IN, RANK, BLOCK_C, EVEN
            )  # [C, R]
            h = tl.dot(tile, f.to(dtype), h)

    if INLINE:
        h = tl.where((r < rank)[None, :], h * low_scale, 0.0).to(dtype)
        if tile_d == 0:
            tl.store(low + m[:, None] * RANK + r[None, :], h, mask=(m < left)[:, None])
    else:
        h = tl.load(low + m[:, None] * RANK + r[None, :], mask=(m < left)[:, None], other=0.0)
    g = _factor(
        factor_out,
        lora_E,
        out_stride_r,
        out_stride_d,
        rank,
        outer,
        first_d,
        not FOLD_IN,
        RANK,
        BLOCK_D,
        False,
    )  # [D, R]
    change = tl.dot(h, tl.trans(g.to(dtype))) * out_scale  # [M, D]
    if DROP:
        change = tl.where(_keep(tl.load(seed), first, first_d, threshold, BLOCK_M, BLOCK_D), change, 0.0)
    total += change
    if BIAS:
        b = tl.load(bias + first_d + d, mask=d < outer - first_d, other=0.0)
        total += b.to(tl.float32)[None, :]
    out += first * outer + first_d
    inside_out = (m < left)[:, None] & inside_d
    tl.store(out + m[:, None] * outer + d[None, :], total.to(out.dtype.element_ty), mask=inside_out)


@triton.jit(do_not_specialize=["rows", "threshold"])
def update(
    base, low, factor, lora_E, out, seed,
    rows, outer, rank, base_stride, stride_r, stride_d, scale, threshold,
    ADD: tl.constexpr, FOLD: tl.constexpr, DROP: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [M, D] = base (with ADD) + scale · drop(low [M, R] factor [R, D]); ``out`` may be ``base``."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    start = tl.program_id(1) * BLOCK_D
    left = (rows - first).to(tl.int32)
    m = tl.arange(0, BLOCK_M)
    r = tl.arange(0, RANK)
    d = start + tl.arange(0, BLOCK_D)
    inside = (m < left)[:, None] & (d < outer)[None, :]
    low += first * RANK
    h = tl.load(low + m[:, None] * RANK + r[None, :], mask=(m < left)[:, None], other=0.0)
    f = _factor(factor, lora_E, stride_r, stride_d, rank, outer, start, FOLD, RANK, BLOCK_D, False)
    total = tl.dot(h, tl.trans(f.to(h.dtype)), input_precision=PRECISION) * scale  # [M, D]
    if DROP:
        total = tl.where(_keep(tl.load(seed), first, start, threshold, BLOCK_M, BLOCK_D), total, 0.0)
    if ADD:
        base += first * base_stride
        total += tl.load(base + m[:, None] * base_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
    out += first * outer
    tl.store(out + m[:, None] * outer + d[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _outer_tile(
    source, low, partial, seed, first, last, columns, start, source_stride, scale, threshold,
    DROP: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial [RANK, C] = scale · lowᵀ drop(source) over the rows [first, last)."""
    r = tl.arange(0, RANK)
    m = tl.arange(0, BLOCK_M)
    c = start + tl.arange(0, BLOCK_C)
    total = tl.zeros([RANK, BLOCK_C], tl.float32)
    if DROP:
        key = tl.load(seed)
    source += first.to(tl.int64) * source_stride
    low += first.to(tl.int64) * RANK
    for done in range(0, last - first, BLOCK_M):
        left = last - first - done
        tile = _tile(source, source_stride, left, columns, start, BLOCK_M, BLOCK_C, False)  # [M, C]
        if DROP:
            tile = tl.where(_keep(key, first + done, start, threshold, BLOCK_M, BLOCK_C), tile, 0.0)
        h = tl.load(low + m[None, :] * RANK + r[:, None], mask=(m < left)[None, :], other=0.0)  # [R, M]
        total = tl.dot(h, tile.to(h.dtype), total, input_precision=PRECISION)
        source += BLOCK_M * source_stride
        low += BLOCK_M * RANK
    tl.store(partial + r[:, None] * columns + c[None, :], total * scale, mask=(c < columns)[None, :])


@triton.jit(do_not_specialize=["rows", "threshold", "span", "tiles_a"])
def outer(
    x, dy, g, h, partial_a, partial_b, seed,
    rows, inner, outer_size, span, tiles_a, x_stride, dy_stride, a_scale, b_scale, threshold,
    DROP: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial_a [P, RANK, K] = gᵀ drop(x) and partial_b [P, RANK, N] = c hᵀ dy, each over ``span`` rows.

    Programs (i, p): the first ``tiles_a`` values of i are columns of x, the others columns of dy.
    """
    i = tl.program_id(0)
    p = tl.program_id(1)
    first = p * span
    last = tl.minimum(first + span, rows)
    if i < tiles_a:
        _outer_tile(
            x, g, partial_a + p.to(tl.int64) * RANK * inner, seed, first, last, inner, i * BLOCK_C,
            x_stride, a_scale, threshold, DROP, RANK, PRECISION, BLOCK_M, BLOCK_C,
        )  # fmt: skip
    else:
        _outer_tile(
            dy, h, partial_b + p.to(tl.int64) * RANK * outer_size, seed, first, last, outer_size,
            (i - tiles_a) * BLOCK_C, dy_stride, b_scale, threshold, False, RANK, PRECISION, BLOCK_M, BLOCK_C,
        )  # fmt: skip


@triton.jit(do_not_specialize=["parts", "programs_a"])
def reduce(
    partial_a, partial_b, lora_A, lora_E, dA, dE, dB,
    inner, outer_size, rank, stride_r, stride_c, parts, programs_a,
    NEED_A: tl.constexpr, NEED_E: tl.constexpr, RANK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dA [R, K] = V ⊙ E, dE [R, 1] = Σ V ⊙ A, dB [N, R] from the partial sums, added in their order.

    The first ``programs_a`` programs are rows of dA (one owns a whole row, so dE needs no further pass), the
    others rows of dB.
    """
    i = tl.program_id(0)
    if i < programs_a:
        e = tl.load(lora_E + i).to(tl.float32)
        slope = tl.zeros([BLOCK], tl.float32)
        for start in range(0, inner, BLOCK):
            c = start + tl.arange(0, BLOCK)
            inside = c < inner
            v = tl.zeros([BLOCK], tl.float32)
            for p in range(0, parts):
                v += tl.load(partial_a + (p * RANK + i) * inner + c, mask=inside, other=0.0)
            if NEED_A:
                tl.store(dA + i * inner + c, (v * e).to(dA.dtype.element_ty), mask=inside)
            if NEED_E:
                a = tl.load(lora_A + i * stride_r + c * stride_c, mask=inside, other=0.0).to(tl.float32)
                slope += v * a
        if NEED_E:
            tl.store(dE + i, tl.sum(slope, 0).to(dE.dtype.element_ty))
    else:
        n = (i - programs_a) * BLOCK_N + tl.arange(0, BLOCK_N)
        r = tl.arange(0, RANK)
        inside_b = (r < rank)[:, None] & (n < outer_size)[None, :]
        total = tl.zeros([RANK, BLOCK_N], tl.float32)
        for p in range(0, parts):
            offsets = (p * RANK + r)[:, None] * outer_size + n[None, :]
            total += tl.load(partial_b + offsets, mask=inside_b, other=0.0)
        tl.store(dB + n[None, :] * rank + r[:, None], total.to(dB.dtype.element_ty), mask=inside_b)
