"""Importance statistics of every parameter, and every triplet's score, in Triton: one launch over all layers.

What is computed is in ``reference.py`` (arXiv 2303.10512, eq. 7-11); everything here is float32. An optimizer
step is two launches::

    flag     bad[p] = a signal seen by program p is not finite (or leaves no room for differences and
             squares), or the step is not active
    update   where no bad[p] is set:  Ī ← β1 Ī + (1 - β1) I,  Ū ← β2 Ū + (1 - β2) |I - Ī|,  count ← count + 1

and scoring is one more, ``triplet``. No launch reads what another program of it writes, sums have a fixed
order, there are no atomics: results do not depend on the schedule.

Legend: a chunk is at most CHUNK entries of one parameter, a row of ``chunks`` [parameter, offset, column,
length] where ``column`` is its place in the statistics; ``located`` [3, N] holds N parameters' addresses,
their gradients' and their type codes (weight + 4 * gradient; 3 is a gradient that is missing). A slice is up
to TRIPLETS triplets of one matrix.
"""

import triton
import triton.language as tl

from adalora_fast.ops.dispatch.entries import load_entries


@triton.jit
def _signal(weight, gradient, SCORE: tl.constexpr):
    if SCORE == "sensitivity":
        signal = tl.abs(weight * gradient)
    elif SCORE == "movement":
        signal = -(weight * gradient)
    elif SCORE == "fisher":
        signal = gradient * gradient
    elif SCORE == "gsnr":
        signal = gradient
    elif SCORE == "magnitude":
        signal = tl.abs(weight) + 0 * gradient  # an infinite gradient still shows
    else:
        tl.static_assert(False, "this score has no formula here; write one, or refuse it in triton.limit")
    return signal


@triton.jit
def _chunk_signal(
    located, chunks, chunk, n_parameters, SCORE: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr
):
    """(signal [CHUNK], how many entries exist, parameter, column, whether it has a gradient)."""
    parameter = tl.load(chunks + chunk * 4)
    offset = tl.load(chunks + chunk * 4 + 1)
    column = tl.load(chunks + chunk * 4 + 2)
    length = tl.load(chunks + chunk * 4 + 3)
    weights = tl.load(located + parameter)
    gradients = tl.load(located + n_parameters + parameter)
    code = tl.load(located + 2 * n_parameters + parameter)
    if ALIGNED:
        offset = tl.multiple_of(offset, 16)
        column = tl.multiple_of(column, 4)
        length = tl.multiple_of(length, 4)  # masks decide about wide access, too
    lane = tl.arange(0, CHUNK)  # [CHUNK]
    present = code < 12
    weight = load_entries(weights, code % 4, offset + lane, lane < length, ALIGNED)
    given = tl.where(present, length, 0)  # a missing gradient counts as zero
    gradient = load_entries(gradients, code // 4, offset + lane, lane < given, ALIGNED)
    return _signal(weight, gradient, SCORE), length, parameter, column, present


@triton.jit
def flag_kernel(
    located, chunks, updates, seen, shares, flags, n_parameters, n_chunks, beta_high, beta_low, active,
    SCORE: tl.constexpr, CHUNK: tl.constexpr, COUNTS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Whether any signal of this program's chunks is bad. Also copies the counts, which the update changes,
    and turns them into gsnr's shares a = (1 - β1) / (1 - β1^count).
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    bad = tl.zeros([CHUNK], tl.int32)
    if active is not None:
        bad += tl.where(tl.load(active) == 0, 1, 0)
    for chunk in range(program, n_chunks, programs):
        signal, _, _, _, _ = _chunk_signal(located, chunks, chunk, n_parameters, SCORE, CHUNK, ALIGNED)
        peak = tl.abs(signal)
        # Differences of signals must be finite too, and gsnr squares them: leave room for both.
        if SCORE == "gsnr":
            room = 16 * peak * peak
        else:
            room = 4 * peak
        bad = bad | tl.where(room < float("inf"), 0, 1)  # not a number is not smaller either
    tl.store(flags + program, tl.max(bad, axis=0))

    for start in range(program * COUNTS, n_parameters, programs * COUNTS):
        parameter = start + tl.arange(0, COUNTS)
        count = tl.load(updates + parameter, mask=parameter < n_parameters, other=0)
        tl.store(seen + parameter, count, mask=parameter < n_parameters)
        if SCORE == "gsnr":
            # In float64, by squaring: in float32 the first share would not be exactly 1.
            beta = tl.zeros([COUNTS], tl.float64) + beta_high + beta_low
            square = beta
            power = tl.full([COUNTS], 1.0, tl.float64)
            left = count + 1
            while tl.max(left, axis=0) > 0:
                power = tl.where(left % 2 == 1, power * square, power)
                square = square * square
                left = left // 2
            share = (1 - beta) / (1 - power)
            tl.store(shares + parameter, share.to(tl.float32), mask=parameter < n_parameters)


@triton.jit
def _lerp(start, end, weight):
    """start + weight (end - start), in the form that is exact at the nearer end."""
    return tl.where(weight < 0.5, start + weight * (end - start), end - (end - start) * (1 - weight))


@triton.jit
def gradient_signal_to_noise(mean, variance):
    square = mean * mean
    return square / (variance + 1e-6 * (variance + square) + 1e-30)


@triton.jit
def update_kernel(
    located, chunks, statistics, updates, seen, shares, flags, row_stride, n_parameters, n_flags,
    rate1, rate2,
    SCORE: tl.constexpr, SMOOTHING: tl.constexpr, CHUNK: tl.constexpr, COUNTS: tl.constexpr,
    FLAGS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One chunk's statistics, one program each; ``rate1`` = 1 - β1, ``rate2`` = 1 - β2."""
    program = tl.program_id(0)
    signal, length, number, column, present = _chunk_signal(
        located, chunks, program, n_parameters, SCORE, CHUNK, ALIGNED
    )
    flag = tl.arange(0, FLAGS)
    finite = tl.max(tl.load(flags + flag, mask=flag < n_flags, other=0), axis=0) == 0
    lane = tl.arange(0, CHUNK)  # [CHUNK]
    inside = lane < length
    moving = lane < tl.where(finite & present, length, 0)
    stride = tl.cast(row_stride, tl.int64)
    if ALIGNED:
        stride = tl.multiple_of(stride, 4)
    first = statistics + column + lane  # row 0's pointers [CHUNK]

    if SCORE == "gsnr":
        share = tl.load(shares + number)
        mean = tl.load(first, mask=inside, other=0.0)
        variance = tl.load(first + stride, mask=inside, other=0.0)
        deviation = signal - mean
        mean = mean + share * deviation
        variance = (variance + share * deviation * deviation) * (1 - share)
        tl.store(first, mean, mask=moving)
        tl.store(first + stride, variance, mask=moving)
        signal = gradient_signal_to_noise(mean, variance)
        first = first + 2 * stride
    if SMOOTHING == "sum":
        total = tl.load(first, mask=inside, other=0.0)
        tl.store(first, total + signal, mask=moving)
    elif SMOOTHING == "none" and SCORE != "gsnr":  # gsnr's moments are enough
        tl.store(first, signal, mask=moving)
    elif SMOOTHING == "ema" or SMOOTHING == "ema_uncertainty":
        average = _lerp(tl.load(first, mask=inside, other=0.0), signal, rate1)  # Ī, eq. 9
        tl.store(first, average, mask=moving)
        if SMOOTHING == "ema_uncertainty":
            spread = tl.load(first + stride, mask=inside, other=0.0)
            spread = _lerp(spread, tl.abs(signal - average), rate2)  # Ū, eq. 10
            tl.store(first + stride, spread, mask=moving)
    elif SMOOTHING != "none":
        tl.static_assert(False, "this smoothing has no formula here; write one, or refuse it in triton.limit")

    for start in range(program * COUNTS, n_parameters, tl.num_programs(0) * COUNTS):
        parameter = start + tl.arange(0, COUNTS)
        count = tl.load(seen + parameter, mask=parameter < n_parameters, other=0)
        code = tl.load(located + 2 * n_parameters + parameter, mask=parameter < n_parameters, other=0)
        count += tl.where(code < 12, tl.where(finite, 1, 0), 0)
        tl.store(updates + parameter, count, mask=parameter < n_parameters)


@triton.jit
def _element_scores(statistics, stride, entries, inside, SCORE: tl.constexpr, SMOOTHING: tl.constexpr):
    if SCORE == "gsnr" and SMOOTHING != "none":
        statistics += 2 * stride  # behind its moments
    scores = tl.load(statistics + entries, mask=inside, other=0.0)
    if SMOOTHING == "ema_uncertainty":
        scores = scores * tl.load(statistics + stride + entries, mask=inside, other=0.0)  # eq. 11
    elif SCORE == "gsnr" and SMOOTHING == "none":
        variance = tl.load(statistics + stride + entries, mask=inside, other=0.0)
        scores = gradient_signal_to_noise(scores, variance)
    else:
        tl.static_assert(
            SMOOTHING == "ema" or SMOOTHING == "sum" or SMOOTHING == "none",
            "this smoothing has no formula here; write one, or refuse it in triton.limit",
        )
    return scores


@triton.jit
def triplet_kernel(
    statistics, slices, scores, row_stride,
    SCORE: tl.constexpr, SMOOTHING: tl.constexpr, TRIPLETS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """S = s(λ) + mean_j s(P_j) + mean_j s(Q_j) of one slice (eq. 7); a row of ``slices`` is [column of A, of
    E, of B, in, out, rank, first triplet of the slice, its position among the scores].
    """
    row = slices + tl.program_id(0) * 8
    column_A = tl.load(row)
    column_E = tl.load(row + 1)
    column_B = tl.load(row + 2)
    width = tl.load(row + 3)
    height = tl.load(row + 4)
    rank = tl.load(row + 5)
    triplet = tl.load(row + 6) + tl.arange(0, TRIPLETS)  # [TRIPLETS]
    position = tl.load(row + 7) + tl.arange(0, TRIPLETS)  # [TRIPLETS]
    stride = tl.cast(row_stride, tl.int64)
    exists = triplet < rank  # [TRIPLETS]
    lane = tl.arange(0, BLOCK)  # [BLOCK]

    score = _element_scores(statistics, stride, column_E + triplet, exists, SCORE, SMOOTHING)
    if SCORE != "magnitude":  # which keeps λ alone
        along_rows = tl.zeros([TRIPLETS, BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            entry = start + lane
            entries = column_A + triplet[:, None] * width + entry[None, :]  # [TRIPLETS, BLOCK]
            inside = exists[:, None] & (entry < width)[None, :]
            along_rows += _element_scores(statistics, stride, entries, inside, SCORE, SMOOTHING)
        along_columns = tl.zeros([BLOCK, TRIPLETS], tl.float32)
        for start in range(0, height, BLOCK):
            entry = start + lane
            places = column_B + entry[:, None] * rank + triplet[None, :]  # [BLOCK, TRIPLETS]
            within = (entry < height)[:, None] & exists[None, :]
            along_columns += _element_scores(statistics, stride, places, within, SCORE, SMOOTHING)
        score += tl.sum(along_rows, axis=1) / tl.maximum(width, 1)
        score += tl.sum(along_columns, axis=0) / tl.maximum(height, 1)
    tl.store(scores + position, score, mask=exists)
