// Which triplets a budget keeps, and zeroing λ of the others (arXiv 2303.10512, eq. 5 and 6).
#pragma once

#include <cstdint>
#include <vector>

#include "elements.h"

namespace adalora_fast {

// Keep exactly `budget` of the entries [count, 1]: the highest, ties to the lower position, NaN as -inf.
void select_triplets(const Matrix& scores, int64_t budget, bool* mask);

// λ of one matrix: `count` entries of `size` bytes, `stride` bytes apart.
struct Lambdas {
    void* data = nullptr;
    int64_t count = 0, stride = 0, size = 0;
};

// Set every λ outside the mask to zero; the mask goes matrix by matrix.
void apply_mask(const bool* mask, const std::vector<Lambdas>& lambdas);

}  // namespace adalora_fast
