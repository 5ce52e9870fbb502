// The CUDA selection run by an emulated block, for tests: built and called by tests/ops/test_block_select.py.
#include "../common/block_select.h"
#include "host_block.h"

namespace {

using namespace adalora_fast;

constexpr int FINE = 0, RACE = 1;

template <int THREADS, typename Score>
int allocate(const Score* scores, int count, int64_t budget, bool* mask, const LambdaTable* table, int* ranks,
             int order) {
    using Block = HostBlock<THREADS>;
    Block block(static_cast<Order>(order));
    Workspace<Block> shared;
    typename Block::template Global<bool> kept(mask, count);
    try {
        select_triplets(block, shared, scores, count, budget, kept);
        block.barrier();
        if (table != nullptr) apply_mask(block, kept, *table, ranks);
    } catch (const Race&) {
        return RACE;
    }
    return FINE;
}

}  // namespace

extern "C" {

int emulate_float32(const float* scores, int count, int64_t budget, bool* mask, int threads, int order) {
    return threads == 1024 ? allocate<1024>(scores, count, budget, mask, nullptr, nullptr, order)
                           : allocate<256>(scores, count, budget, mask, nullptr, nullptr, order);
}

int emulate_float64(const double* scores, int count, int64_t budget, bool* mask, int threads, int order) {
    return threads == 1024 ? allocate<1024>(scores, count, budget, mask, nullptr, nullptr, order)
                           : allocate<256>(scores, count, budget, mask, nullptr, nullptr, order);
}

// Selection, mask, ranks and zeroing λ as the fused kernel does them; `data`, `ranks_in` and `sizes` per
// matrix.
int emulate_allocate(const float* scores, int64_t budget, bool* mask, void* const* data, const int* ranks_in,
                     const int* sizes, int matrices, int* ranks, int order) {
    LambdaTable table{};
    table.matrices = matrices;
    for (int k = 0; k < matrices; ++k) {
        table.data[k] = data[k];
        table.size[k] = static_cast<uint8_t>(sizes[k]);
        table.start[k + 1] = table.start[k] + ranks_in[k];
        if (ranks_in[k] > table.largest_rank) table.largest_rank = ranks_in[k];
    }
    return allocate<256>(scores, table.start[matrices], budget, mask, &table, ranks, order);
}

}  // extern "C"
