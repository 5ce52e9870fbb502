#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <type_traits>

#include "importance.h"

namespace adalora_fast {
namespace {

// A thread takes chunks of one parameter: small enough to balance, large enough to be worth the taking.
constexpr int64_t CHUNK = 8 * BLOCK, CHUNKS_PER_THREAD = 4;

struct Chunk {
    const Factor* factor;
    int64_t begin, end;
    double share;  // gsnr: what this step's gradient weighs in the parameter's moments
};

// x ← x + weight (value - x), rounded as torch.lerp rounds.
template <typename T>
struct Lerp {
    bool near;
    T factor;
    explicit Lerp(T weight) : near(std::abs(weight) < T(0.5)), factor(near ? weight : -(T(1) - weight)) {}
    T operator()(T x, T value) const { return (near ? x : value) + factor * (value - x); }
};

template <Score score, typename T>
T signal(T w, T g) {
    if constexpr (score == Score::sensitivity) {
        return std::abs(w * g);
    } else if constexpr (score == Score::movement) {
        return -(w * g);
    } else if constexpr (score == Score::fisher) {
        return g * g;
    } else if constexpr (score == Score::gsnr) {
        return g;  // its I is the ratio, which needs the moments
    } else {
        static_assert(score == Score::magnitude, "this score has no formula here");
        return std::abs(w) + T(0) * g;  // an infinite gradient shows
    }
}

// Whether every signal is finite with room for what is computed from it: differences, and gsnr's squares.
template <Score score, typename T>
bool signals_are_finite(const T* __restrict w, const T* __restrict g, int64_t n) {
    using Flag = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;  // as wide as T, for vector registers
    constexpr T largest = std::numeric_limits<T>::max();
    Flag bad = 0;
    for (int64_t i = 0; i < n; ++i) {
        const T size = std::abs(signal<score>(w[i], g[i]));
        const T room = score == Score::gsnr ? T(16) * size * size : T(4) * size;
        bad |= room <= largest ? Flag(0) : Flag(1);  // false for NaN
    }
    return bad == 0;
}

template <Score score, Smoothing smoothing, typename T>
void update_block(const T* __restrict w, const T* __restrict g, T* __restrict mean, T* __restrict variance,
                  T* __restrict first, T* __restrict second, int64_t n, T share, Lerp<T> ema,
                  Lerp<T> uncertainty) {
    for (int64_t i = 0; i < n; ++i) {
        T value;
        if constexpr (score == Score::gsnr) {
            const T deviation = g[i] - mean[i];
            const T m = mean[i] + deviation * share;
            const T v = (variance[i] + deviation * deviation * share) * (T(1) - share);
            mean[i] = m;
            variance[i] = v;
            value = m * m / (v + T(1e-6) * (v + m * m) + T(1e-30));
        } else {
            value = signal<score>(w[i], g[i]);
        }
        if constexpr (smoothing == Smoothing::ema || smoothing == Smoothing::ema_uncertainty) {
            const T smooth = ema(first[i], value);
            first[i] = smooth;
            if constexpr (smoothing == Smoothing::ema_uncertainty) {
                second[i] = uncertainty(second[i], std::abs(value - smooth));
            }
        } else if constexpr (smoothing == Smoothing::sum) {
            first[i] += value;
        } else {
            static_assert(smoothing == Smoothing::none, "this smoothing has no formula here");
            if constexpr (score != Score::gsnr) first[i] = value;
        }
    }
}

template <Score score, Smoothing smoothing, typename T>
void update_all(const std::vector<Chunk>& chunks, Statistics<T> statistics, double beta1, double beta2,
                const ParallelFor& parallel, bool& finite) {
    const int64_t count = static_cast<int64_t>(chunks.size());
    std::atomic<bool> all_finite{true};
    parallel(count, CHUNKS_PER_THREAD, [&](int64_t from, int64_t to) {
        T weights[BLOCK], gradients[BLOCK];
        for (int64_t c = from; c < to; ++c) {
            const Factor& factor = *chunks[c].factor;
            for (int64_t begin = chunks[c].begin; begin < chunks[c].end; begin += BLOCK) {
                const int64_t n = std::min(BLOCK, chunks[c].end - begin);
                const T* w = entries(factor.weight, begin, n, weights);
                const T* g = entries(factor.gradient, begin, n, gradients);
                if (!signals_are_finite<score>(w, g, n)) all_finite = false;
            }
        }
    });
    finite = all_finite;
    if (!finite) return;

    constexpr int moments = moment_rows(score), smoothed = smoothing_rows(score, smoothing);
    const Lerp<T> ema(static_cast<T>(1 - beta1)), uncertainty(static_cast<T>(1 - beta2));
    parallel(count, CHUNKS_PER_THREAD, [&](int64_t from, int64_t to) {
        T weights[BLOCK], gradients[BLOCK];
        for (int64_t c = from; c < to; ++c) {
            const Factor& factor = *chunks[c].factor;
            if (!factor.has_gradient) continue;
            for (int64_t begin = chunks[c].begin; begin < chunks[c].end; begin += BLOCK) {
                const int64_t n = std::min(BLOCK, chunks[c].end - begin), column = factor.start + begin;
                const auto row = [&](int number, bool exists) {
                    return exists ? statistics.row(number) + column : nullptr;
                };
                update_block<score, smoothing>(
                    entries(factor.weight, begin, n, weights), entries(factor.gradient, begin, n, gradients),
                    row(0, moments > 0), row(1, moments > 0), row(moments, smoothed > 0),
                    row(moments + 1, smoothed > 1), n, static_cast<T>(chunks[c].share), ema, uncertainty);
            }
        }
    });
}

template <Score score, typename T>
void with_smoothing(Smoothing smoothing, const std::vector<Chunk>& chunks, Statistics<T> statistics,
                    double beta1, double beta2, const ParallelFor& parallel, bool& finite) {
    const auto run = [&](auto chosen) {
        update_all<score, decltype(chosen)::value>(chunks, statistics, beta1, beta2, parallel, finite);
    };
    switch (smoothing) {
        case Smoothing::ema_uncertainty:
            return run(std::integral_constant<Smoothing, Smoothing::ema_uncertainty>());
        case Smoothing::ema: return run(std::integral_constant<Smoothing, Smoothing::ema>());
        case Smoothing::sum: return run(std::integral_constant<Smoothing, Smoothing::sum>());
        case Smoothing::none: return run(std::integral_constant<Smoothing, Smoothing::none>());
    }
}

std::vector<Chunk> split(const std::vector<Factor>& factors, const int64_t* updates, double beta1) {
    std::vector<Chunk> chunks;
    for (size_t number = 0; number < factors.size(); ++number) {
        const Factor& factor = factors[number];
        if (factor.start < 0) continue;
        const int64_t size = factor.weight.rows * factor.weight.cols;
        // In float32 the first share would not be exactly 1.
        const double share = (1 - beta1) / (1 - std::pow(beta1, static_cast<double>(updates[number] + 1)));
        for (int64_t begin = 0; begin < size; begin += CHUNK) {
            chunks.push_back({&factor, begin, std::min(begin + CHUNK, size), share});
        }
    }
    return chunks;
}

}  // namespace

template <typename T>
void update_importance(const std::vector<Factor>& factors, Statistics<T> statistics, int64_t* updates,
                       Score score, Smoothing smoothing, double beta1, double beta2,
                       const ParallelFor& parallel) {
    const std::vector<Chunk> chunks = split(factors, updates, beta1);
    bool finite = true;
    const auto run = [&](auto chosen) {
        with_smoothing<decltype(chosen)::value>(smoothing, chunks, statistics, beta1, beta2, parallel,
                                                finite);
    };
    switch (score) {
        case Score::sensitivity: run(std::integral_constant<Score, Score::sensitivity>()); break;
        case Score::movement: run(std::integral_constant<Score, Score::movement>()); break;
        case Score::fisher: run(std::integral_constant<Score, Score::fisher>()); break;
        case Score::gsnr: run(std::integral_constant<Score, Score::gsnr>()); break;
        case Score::magnitude: run(std::integral_constant<Score, Score::magnitude>()); break;
    }
    if (!finite) return;
    for (size_t number = 0; number < factors.size(); ++number)
        updates[number] += factors[number].has_gradient;
}

template void update_importance(const std::vector<Factor>&, Statistics<float>, int64_t*, Score, Smoothing,
                                double, double, const ParallelFor&);
template void update_importance(const std::vector<Factor>&, Statistics<double>, int64_t*, Score, Smoothing,
                                double, double, const ParallelFor&);

}  // namespace adalora_fast
