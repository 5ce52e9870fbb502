// Importance statistics of every adapter parameter, and every triplet's score (arXiv 2303.10512, eq. 7-11).
//
// The meaning is adalora_fast/ops/importance/reference.py; names and order of scores, smoothings and rows are
// its own. Nothing here knows PyTorch: the caller hands over memory and a way to run a loop on its threads.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "elements.h"

namespace adalora_fast {

enum class Score { sensitivity, movement, fisher, gsnr, magnitude };
enum class Smoothing { ema_uncertainty, ema, sum, none };

constexpr int64_t SCORES = 5, SMOOTHINGS = 4;  // as ops/importance/native.py numbers them

// What is kept per entry: gsnr's mean and variance first, then the smoothing's own rows.
constexpr int moment_rows(Score score) { return score == Score::gsnr ? 2 : 0; }
constexpr int smoothing_rows(Score score, Smoothing smoothing) {
    if (smoothing == Smoothing::none) return score == Score::gsnr ? 0 : 1;
    return smoothing == Smoothing::ema_uncertainty ? 2 : 1;
}

// Runs body(begin, end) over parts of [0, n), each of at least `grain` where there is more than one.
using Body = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor = std::function<void(int64_t n, int64_t grain, const Body& body)>;

// One parameter: its weight, its gradient, and the first of its columns in the statistics (-1: it has none).
struct Factor {
    Matrix weight, gradient;
    bool has_gradient = false;
    int64_t start = -1;
};

// Rows [row, column] of a buffer whose columns lie side by side.
template <typename T>
struct Statistics {
    T* data = nullptr;
    int64_t row_stride = 0;
    T* row(int number) const { return data + number * row_stride; }
};

// Update the statistics in place and count the update of every parameter with a gradient. If any signal is
// not finite, or too large for differences (and gsnr's squares) of two signals, nothing at all is changed.
template <typename T>
void update_importance(const std::vector<Factor>& factors, Statistics<T> statistics, int64_t* updates,
                       Score score, Smoothing smoothing, double beta1, double beta2,
                       const ParallelFor& parallel);

// A parameter's place and shape as the scores need it.
struct Place {
    int64_t start, rows, cols;
};

// S of every triplet, matrix by matrix: s(E) + mean of s over A's row and over B's column. `places` has
// lora_A, lora_E, lora_B of every matrix.
template <typename T>
void score_triplets(const std::vector<Place>& places, Statistics<T> statistics, Score score,
                    Smoothing smoothing, T* scores, const ParallelFor& parallel);

}  // namespace adalora_fast
