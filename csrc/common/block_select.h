// Selection of exactly b of T triplets by one block of threads, without sorting and without atomics on memory
// that others see. nvcc compiles it for the GPU (cuda/cuda_block.cuh), any C++ compiler for a block that is
// emulated (test/host_block.h); the derivation is in docs/native.md.
//
//   1. Scores become unsigned keys in the order of selection (order_key.h).
//   2. Radix select finds the b-th highest key from its highest digit down: a histogram of the digit over the
//      keys that share the digits found so far; the digit where the count of higher ones passes what remains.
//   3. A triplet is kept if its key is higher, or equal and among the first `remaining` equal ones by
//   position.
//
// A Block has threads 0 .. THREADS - 1 in warps of 32. `each(f)` runs f(t) for all of them; what one thread
// writes in it, others may read only after `barrier()`. Register<V> is a variable that every thread has.
#pragma once

#include <cstdint>

#include "order_key.h"

#ifdef __CUDACC__
#define ADALORA_DEVICE __device__ __forceinline__
#define ADALORA_UNROLL _Pragma("unroll 4")
#else
#define ADALORA_DEVICE inline
#define ADALORA_UNROLL
#endif

namespace adalora_fast {

constexpr int WARP = 32, DIGIT_BITS = 8, DIGITS = 1 << DIGIT_BITS;

// Memory of the block, shared by its threads.
template <class Block>
struct Workspace {
    typename Block::template Shared<int, DIGITS> histogram;
    typename Block::template Shared<int, WARP> warp_totals;
    typename Block::template Shared<int, 2> found;  // a digit, and how many of its keys are still to be kept
};

ADALORA_DEVICE int lane_of(int t) { return t % WARP; }
ADALORA_DEVICE int warp_of(int t) { return t / WARP; }

ADALORA_DEVICE int count_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
    return __popc(bits);
#else
    return __builtin_popcount(bits);
#endif
}

ADALORA_DEVICE int lowest_bit(uint32_t bits) {  // -1 where there is none
#ifdef __CUDA_ARCH__
    return __ffs(bits) - 1;
#else
    return __builtin_ffs(static_cast<int>(bits)) - 1;
#endif
}

// values[t] ← the sum over the threads of t's warp up to t.
template <class Block>
ADALORA_DEVICE void warp_inclusive_sum(Block& block, typename Block::template Register<int>& values) {
    for (int distance = 1; distance < WARP; distance *= 2) {
        const auto lower = block.shuffle_up(values, distance);
        block.each([&](int t) { values[t] += lane_of(t) >= distance ? lower[t] : 0; });
    }
}

// The sum over all threads of lower warps than t's, where `totals` is the sum over each warp.
template <class Block>
ADALORA_DEVICE typename Block::template Register<int> sum_of_lower_warps(
    Block& block, Workspace<Block>& shared, const typename Block::template Register<int>& totals) {
    block.each([&](int t) {
        if (lane_of(t) == WARP - 1) shared.warp_totals.set(warp_of(t), totals[t], t);
    });
    block.barrier();
    typename Block::template Register<int> sums(block), source(block);
    block.each([&](int t) {
        sums[t] = lane_of(t) < Block::THREADS / WARP ? shared.warp_totals.get(lane_of(t), t) : 0;
        source[t] = (warp_of(t) + WARP - 1) % WARP;
    });
    warp_inclusive_sum(block, sums);
    auto lower = block.shuffle(sums, source);
    block.each([&](int t) { lower[t] = warp_of(t) == 0 ? 0 : lower[t]; });
    return lower;
}

// Count each active thread's digit. Scores lie close together, so that most lanes of a warp often have one
// digit: the lanes that have the first active lane's are counted with a single addition.
template <class Block>
ADALORA_DEVICE void count_digits(Block& block, Workspace<Block>& shared,
                                 const typename Block::template Register<int>& digit,
                                 const typename Block::template Register<bool>& active) {
    const auto votes = block.ballot(active);
    typename Block::template Register<int> leader(block);
    block.each([&](int t) { leader[t] = votes[t] ? lowest_bit(votes[t]) : 0; });
    const auto common = block.shuffle(digit, leader);
    typename Block::template Register<bool> same(block);
    block.each([&](int t) { same[t] = active[t] && digit[t] == common[t]; });
    const auto together = block.ballot(same);
    block.each([&](int t) {
        if (!active[t]) return;
        if (!same[t]) shared.histogram.add(digit[t], 1, t);
        if (lane_of(t) == leader[t]) shared.histogram.add(digit[t], count_bits(together[t]), t);
    });
}

// From the histogram: the digit of the remaining-th highest key, and how many keys with it are to be kept.
template <class Block>
ADALORA_DEVICE void find_digit(Block& block, Workspace<Block>& shared, int remaining) {
    static_assert(Block::THREADS >= DIGITS, "one thread per digit");
    typename Block::template Register<int> count(block), up_to(block);
    block.each([&](int t) {  // thread t has the t-th highest digit
        count[t] = t < DIGITS ? shared.histogram.get(DIGITS - 1 - t, t) : 0;
        up_to[t] = count[t];
    });
    warp_inclusive_sum(block, up_to);
    const auto lower = sum_of_lower_warps(block, shared, up_to);
    block.each([&](int t) {
        const int higher = lower[t] + up_to[t] - count[t];
        if (higher < remaining && remaining <= higher + count[t]) {
            shared.found.set(0, DIGITS - 1 - t, t);
            shared.found.set(1, remaining - higher, t);
        }
    });
    block.barrier();
}

// The budget-th highest key, and in `remaining` how many of the keys equal to it are kept; 0 < budget <
// count.
template <class Block, typename Score>
ADALORA_DEVICE typename OrderKey<Score>::Type find_threshold(Block& block, Workspace<Block>& shared,
                                                             const Score* scores, int count, int& remaining) {
    using Key = typename OrderKey<Score>::Type;
    Key prefix = 0, known = 0;  // the digits found so far, and where they lie
    for (int shift = static_cast<int>(sizeof(Key)) * 8 - DIGIT_BITS; shift >= 0; shift -= DIGIT_BITS) {
        block.each([&](int t) {
            if (t < DIGITS) shared.histogram.set(t, 0, t);
        });
        block.barrier();
        ADALORA_UNROLL
        for (int base = 0; base < count; base += Block::THREADS) {
            typename Block::template Register<int> digit(block);
            typename Block::template Register<bool> active(block);
            block.each([&](int t) {
                const Key key = base + t < count ? order_key(scores[base + t]) : Key(0);
                digit[t] = static_cast<int>(key >> shift) & (DIGITS - 1);
                active[t] = base + t < count && (key & known) == prefix;
            });
            count_digits(block, shared, digit, active);
        }
        block.barrier();
        find_digit(block, shared, remaining);
        // Every thread reads the same; a later write to `found` comes after the next pass's barriers.
        prefix |= static_cast<Key>(block.same_for_all(shared.found, 0)) << shift;
        known |= static_cast<Key>(DIGITS - 1) << shift;
        remaining = block.same_for_all(shared.found, 1);
    }
    return prefix;
}

// mask[i] ← whether triplet i is kept. Each warp goes through a range of its own, so that equal scores are
// numbered by position with one sum over the warps.
template <class Block, typename Score>
ADALORA_DEVICE void select_triplets(Block& block, Workspace<Block>& shared, const Score* scores, int count,
                                    int64_t budget, typename Block::template Global<bool>& mask) {
    if (budget <= 0 || budget >= count) {
        for (int base = 0; base < count; base += Block::THREADS) {
            block.each([&](int t) {
                if (base + t < count) mask.set(base + t, budget > 0, t);
            });
        }
        return;
    }
    int remaining = static_cast<int>(budget);
    const auto threshold = find_threshold(block, shared, scores, count, remaining);

    constexpr int WARPS = Block::THREADS / WARP;
    const int range = (count + WARPS * WARP - 1) / (WARPS * WARP) * WARP;
    typename Block::template Register<int> ties(block);
    typename Block::template Register<bool> tied(block), higher(block);
    const auto compare = [&](int offset) {
        block.each([&](int t) {
            const int i = warp_of(t) * range + offset + lane_of(t);
            const auto key = i < count ? order_key(scores[i]) : threshold;
            tied[t] = i < count && key == threshold;
            higher[t] = key > threshold;
        });
        return block.ballot(tied);
    };
    block.each([&](int t) { ties[t] = 0; });
    ADALORA_UNROLL
    for (int offset = 0; offset < range; offset += WARP) {
        const auto votes = compare(offset);
        block.each([&](int t) { ties[t] += count_bits(votes[t]); });
    }
    auto number = sum_of_lower_warps(block, shared, ties);
    ADALORA_UNROLL
    for (int offset = 0; offset < range; offset += WARP) {
        const auto votes = compare(offset);
        block.each([&](int t) {
            const int i = warp_of(t) * range + offset + lane_of(t);
            const int before = number[t] + count_bits(votes[t] & ((1u << lane_of(t)) - 1));
            if (i < count) mask.set(i, higher[t] || (tied[t] && before < remaining), t);
            number[t] += count_bits(votes[t]);
        });
    }
}

// λ of up to CAPACITY matrices: where they lie, the bytes of an entry, and their first triplet. Handed to the
// kernel by value: nothing is copied to the device, so that nothing waits for it.
struct LambdaTable {
    static constexpr int CAPACITY = 256;
    int matrices, largest_rank;
    void* data[CAPACITY];
    int start[CAPACITY + 1];
    uint8_t size[CAPACITY];
};

ADALORA_DEVICE void set_zero(void* data, int index, int size) {
    if (size == 8) static_cast<uint64_t*>(data)[index] = 0;
    if (size == 4) static_cast<uint32_t*>(data)[index] = 0;
    if (size == 2) static_cast<uint16_t*>(data)[index] = 0;
}

// λ ← 0 outside the mask, and how many triplets each matrix keeps: a warp per matrix.
template <class Block>
ADALORA_DEVICE void apply_mask(Block& block, typename Block::template Global<bool>& mask,
                               const LambdaTable& table, int* ranks) {
    typename Block::template Register<bool> kept(block);
    typename Block::template Register<int> rank(block);
    for (int first = 0; first < table.matrices; first += Block::THREADS / WARP) {
        block.each([&](int t) { rank[t] = 0; });
        for (int offset = 0; offset < table.largest_rank; offset += WARP) {
            block.each([&](int t) {
                const int matrix = first + warp_of(t), i = offset + lane_of(t);
                kept[t] = false;
                if (matrix >= table.matrices || table.start[matrix] + i >= table.start[matrix + 1]) return;
                kept[t] = mask.get(table.start[matrix] + i, t);
                if (!kept[t]) set_zero(table.data[matrix], i, table.size[matrix]);
            });
            const auto votes = block.ballot(kept);
            block.each([&](int t) { rank[t] += count_bits(votes[t]); });
        }
        block.each([&](int t) {
            if (lane_of(t) == 0 && first + warp_of(t) < table.matrices) ranks[first + warp_of(t)] = rank[t];
        });
    }
}

}  // namespace adalora_fast
