#include "adapter.h"

#include <algorithm>

namespace adalora_fast {

template <typename T>
void right_factor_gradients(const RightFactor<T>& factor) {
    constexpr int64_t LANES = 16;    // sums side by side, so that they fill vector registers
    constexpr int64_t BLOCK = 1024;  // entries summed in T before they join the row's sum
    for (int64_t i = 0; i < factor.rank; ++i) {
        T* __restrict v = factor.V + i * factor.width;
        const T* __restrict a = factor.lora_A + i * factor.width;
        const T e = factor.lora_E[i];
        double sum = 0;
        for (int64_t begin = 0; begin < factor.width; begin += BLOCK) {
            const int64_t end = std::min(begin + BLOCK, factor.width);
            T sums[LANES] = {};
            int64_t k = begin;
            for (; k + LANES <= end; k += LANES) {
                for (int64_t lane = 0; lane < LANES; ++lane) {
                    sums[lane] += v[k + lane] * a[k + lane];
                    v[k + lane] *= e;
                }
            }
            for (; k < end; ++k) {
                sums[0] += v[k] * a[k];
                v[k] *= e;
            }
            for (const T lane : sums) sum += static_cast<double>(lane);
        }
        factor.dE[i] = static_cast<T>(sum);
    }
}

template void right_factor_gradients(const RightFactor<float>&);
template void right_factor_gradients(const RightFactor<double>&);

}  // namespace adalora_fast
