// The last step of the adapter's backward (docs/maths.md): from V = gᵀ x' to the gradients of lora_A, lora_E.
#pragma once

#include <cstdint>

namespace adalora_fast {

// One matrix of `rank` rows of `width` entries, contiguous, like lora_A; lora_E has one entry a row.
template <typename T>
struct RightFactor {
    T* V = nullptr;  // becomes dA
    const T* lora_A = nullptr;
    const T* lora_E = nullptr;
    T* dE = nullptr;
    int64_t rank = 0, width = 0;
};

// dE = Σ V ⊙ A over a row, then V ← V ⊙ E, in one pass. Sums of a thousand entries are added in float64.
template <typename T>
void right_factor_gradients(const RightFactor<T>& factor);

}  // namespace adalora_fast
