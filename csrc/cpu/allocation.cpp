#include "allocation.h"

#include <algorithm>
#include <functional>

#include "../common/order_key.h"

namespace adalora_fast {
namespace {

// The keys of all scores. Every type is exact in float64, so that one order serves all of them.
std::vector<uint64_t> order_keys(const Matrix& scores) {
    std::vector<uint64_t> keys(scores.rows);
    double buffer[BLOCK];
    for (int64_t begin = 0; begin < scores.rows; begin += BLOCK) {
        const int64_t n = std::min(BLOCK, scores.rows - begin);
        const double* values = entries(scores, begin, n, buffer);
        std::transform(values, values + n, keys.begin() + begin, order_key<double>);
    }
    return keys;
}

}  // namespace

void select_triplets(const Matrix& scores, int64_t budget, bool* mask) {
    const int64_t count = scores.rows;
    if (budget <= 0 || budget >= count) {
        std::fill(mask, mask + count, budget > 0);
        return;
    }
    const std::vector<uint64_t> keys = order_keys(scores);
    std::vector<uint64_t> sorted = keys;
    const auto last_kept = sorted.begin() + (budget - 1);
    std::nth_element(sorted.begin(), last_kept, sorted.end(), std::greater<>());
    const uint64_t threshold = *last_kept;
    const int64_t above =
        std::count_if(keys.begin(), keys.end(), [=](uint64_t key) { return key > threshold; });
    int64_t ties = budget - above;  // of the triplets at the threshold, the first so many are kept
    for (int64_t i = 0; i < count; ++i) {
        mask[i] = keys[i] > threshold || (keys[i] == threshold && ties-- > 0);
    }
}

void apply_mask(const bool* mask, const std::vector<Lambdas>& lambdas) {
    for (const Lambdas& matrix : lambdas) {
        char* entry = static_cast<char*>(matrix.data);
        for (int64_t i = 0; i < matrix.count; ++i, entry += matrix.stride) {
            if (!mask[i]) memset(entry, 0, matrix.size);
        }
        mask += matrix.count;
    }
}

}  // namespace adalora_fast
