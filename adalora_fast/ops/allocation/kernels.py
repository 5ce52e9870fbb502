"""Selection of the budget's triplets in Triton: one program, no sorting, no atomics.

The b highest of T scores are those above a threshold, and of the scores equal to it the first few. Both are
found by bisection (``reference.py`` has the rule; arXiv 2303.10512, eq. 5 and 6). A score is mapped to an
integer in the same order (NaN to -inf, -0 to 0), a triplet's key is (score, lower position first), and with
all keys different::

    threshold = the largest v with |{key >= v}| >= b        kept = {key >= threshold}

is b triplets exactly. The threshold is made bit by bit: 32 counts over the scores, then as many as a position
has bits over the ties. Legend: T triplets in the order (matrix, i).
"""

import triton
import triton.language as tl


@triton.jit
def _keys(scores, position, n_triplets):
    """int32 in the order of the scores [BLOCK]; the smallest int32 stands outside, below every score."""
    inside = position < n_triplets
    score = tl.load(scores + position, mask=inside, other=0.0).to(tl.float32)
    score = tl.where(score == score, score, float("-inf")) + 0.0  # -0.0 + 0.0 is 0.0
    bits = score.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # a negative number's bits grow with its size
    return tl.where(inside, ordered, -2147483648)


@triton.jit
def select_kernel(
    scores, budget, mask, n_triplets, BLOCK: tl.constexpr, BITS: tl.constexpr, RESIDENT: tl.constexpr
):
    """Writes mask [T], T <= 2**BITS. RESIDENT: T <= BLOCK, all keys stay in registers; else each count reads
    them.
    """
    lane = tl.arange(0, BLOCK)
    one = tl.full((), 1, tl.int64)
    wanted = tl.minimum(tl.maximum(tl.load(budget).to(tl.int64), 0), n_triplets)
    own = _keys(scores, lane, n_triplets)  # [BLOCK]

    threshold = tl.full((), -2147483648, tl.int64)
    for bit in range(32):
        candidate = threshold + (one << (31 - bit))
        bound = candidate.to(tl.int32)
        count = tl.full((), 0, tl.int32)
        if RESIDENT:
            count += tl.sum((own >= bound).to(tl.int32), axis=0)
        else:
            for start in range(0, n_triplets, BLOCK):
                count += tl.sum((_keys(scores, start + lane, n_triplets) >= bound).to(tl.int32), axis=0)
        threshold = tl.where(count >= wanted, candidate, threshold)
    limit = threshold.to(tl.int32)

    above = tl.full((), 0, tl.int32)
    for start in range(0, n_triplets, BLOCK):
        above += tl.sum((_keys(scores, start + lane, n_triplets) > limit).to(tl.int32), axis=0)
    room = wanted - above  # so many of the ties are kept

    # The last position that is kept: the largest p with fewer than `room` ties before it.
    last = tl.full((), 0, tl.int32)
    for bit in range(BITS):
        upto = last + (one << (BITS - 1 - bit)).to(tl.int32)
        ties = tl.full((), 0, tl.int32)
        if RESIDENT:
            ties += tl.sum(tl.where(lane < upto, (own == limit).to(tl.int32), 0), axis=0)
        else:
            for start in range(0, n_triplets, BLOCK):
                tied = (_keys(scores, start + lane, n_triplets) == limit).to(tl.int32)
                ties += tl.sum(tl.where(start + lane < upto, tied, 0), axis=0)
        last = tl.where(ties < room, upto, last)

    end = tl.where(room > 0, last + 1, 0)
    for start in range(0, n_triplets, BLOCK):
        position = start + lane
        key = _keys(scores, position, n_triplets)
        kept = (key > limit) | ((key == limit) & (position < end))
        tl.store(mask + position, kept.to(tl.uint8), mask=position < n_triplets)


@triton.jit
def zero_kernel(matrices, mask, BLOCK: tl.constexpr):
    """λ ← 0 outside the mask, one program a matrix; a row of ``matrices`` is [address of Λ, bytes from one λ
    to the next, bytes of one, rank, first triplet].
    """
    row = matrices + tl.program_id(0) * 5
    address = tl.load(row)
    step = tl.load(row + 1)
    size = tl.load(row + 2)
    rank = tl.load(row + 3)
    first = tl.load(row + 4)
    for start in range(0, rank, BLOCK):
        triplet = start + tl.arange(0, BLOCK)  # [BLOCK]
        kept = tl.load(mask + first + triplet, mask=triplet < rank, other=1)
        written = tl.where(kept == 0, size, 0)  # bytes
        place = address + triplet * step
        nothing = tl.zeros([BLOCK], tl.int64)  # zero has the same bits in every floating type
        tl.store(place.to(tl.pointer_type(tl.int16)), nothing.to(tl.int16), mask=written == 2)
        tl.store(place.to(tl.pointer_type(tl.int32)), nothing.to(tl.int32), mask=written == 4)
        tl.store(place.to(tl.pointer_type(tl.int64)), nothing, mask=written == 8)
