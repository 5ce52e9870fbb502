#include "adapter.h"

namespace adalora_fast {

template <typename T>
void right_factor_gradients(const RightFactor<T>& factor) {
    constexpr int64_t LANES = 8;  // sums side by side, so that they fill vector registers
    for (int64_t i = 0; i < factor.rank; ++i) {
        T* __restrict v = factor.V + i * factor.width;
        const T* __restrict a = factor.lora_A + i * factor.width;
        const T e = factor.lora_E[i];
        double sums[LANES] = {};
        int64_t k = 0;
        for (; k + LANES <= factor.width; k += LANES) {
            for (int64_t lane = 0; lane < LANES; ++lane) {
                sums[lane] += static_cast<double>(v[k + lane]) * static_cast<double>(a[k + lane]);
                v[k + lane] *= e;
            }
        }
        double sum = 0;
        for (; k < factor.width; ++k) {
            sum += static_cast<double>(v[k]) * static_cast<double>(a[k]);
            v[k] *= e;
        }
        for (const double lane : sums) sum += lane;
        factor.dE[i] = static_cast<T>(sum);
    }
}

template void right_factor_gradients(const RightFactor<float>&);
template void right_factor_gradients(const RightFactor<double>&);

}  // namespace adalora_fast
