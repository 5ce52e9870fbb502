#include <algorithm>

#include "importance.h"

namespace adalora_fast {
namespace {

enum class Form { product, single, ratio };  // s = first · second, first, or gsnr's m̄² / (Var + ε)

template <Form form, typename T>
T element_score(const T* first, const T* second, int64_t i) {
    if constexpr (form == Form::product) return first[i] * second[i];
    if constexpr (form == Form::single) return first[i];
    const T square = first[i] * first[i];
    return square / (second[i] + T(1e-6) * (second[i] + square) + T(1e-30));
}

// Runs of a few entries are summed in T, which keeps vector registers full, and the runs in float64. The
// order depends on the shape alone: the same result on any number of threads.
constexpr int64_t RUN = 8, LANES = 8;

template <Form form, typename T>
T mean_of_row(const T* first, const T* second, int64_t n) {
    double sums[LANES] = {};
    int64_t i = 0;
    for (; i + RUN * LANES <= n; i += RUN * LANES) {
        T run[LANES] = {};
        for (int64_t step = 0; step < RUN * LANES; step += LANES) {
            for (int64_t lane = 0; lane < LANES; ++lane) {
                run[lane] += element_score<form>(first, second, i + step + lane);
            }
        }
        for (int64_t lane = 0; lane < LANES; ++lane) sums[lane] += run[lane];
    }
    for (; i < n; ++i) sums[i % LANES] += element_score<form>(first, second, i);
    double sum = 0;
    for (const double lane : sums) sum += lane;
    return static_cast<T>(sum / n);
}

// Adds to scores[i] what the parameter's entries of triplet i contribute.
template <Form form, typename T>
void add_rows(const Place& place, const T* first, const T* second, T* scores) {
    for (int64_t i = 0; i < place.rows; ++i) {
        const int64_t offset = i * place.cols;
        scores[i] += mean_of_row<form>(first + offset, second + offset, place.cols);
    }
}

template <Form form, typename T>
void add_columns(const Place& place, const T* first, const T* second, T* scores) {
    std::vector<double> sums(place.cols, 0.0);
    std::vector<T> runs(place.cols);
    T* run = runs.data();
    for (int64_t from = 0; from < place.rows; from += RUN) {
        std::fill(runs.begin(), runs.end(), T(0));
        for (int64_t j = from; j < std::min(from + RUN, place.rows); ++j) {
            const T* a = first + j * place.cols;
            const T* b = second + j * place.cols;
            for (int64_t i = 0; i < place.cols; ++i) run[i] += element_score<form>(a, b, i);
        }
        for (int64_t i = 0; i < place.cols; ++i) sums[i] += run[i];
    }
    for (int64_t i = 0; i < place.cols; ++i) scores[i] += static_cast<T>(sums[i] / place.rows);
}

template <Form form, typename T>
void score_all(const std::vector<Place>& places, const T* first, const T* second, T* scores,
               const ParallelFor& parallel) {
    const int64_t matrices = static_cast<int64_t>(places.size()) / 3;
    std::vector<int64_t> starts(matrices + 1, 0);
    for (int64_t k = 0; k < matrices; ++k) starts[k + 1] = starts[k] + places[3 * k + 1].rows;
    parallel(matrices, 1, [&](int64_t from, int64_t to) {
        for (int64_t k = from; k < to; ++k) {
            T* own = scores + starts[k];
            for (int64_t i = 0; i < places[3 * k + 1].rows; ++i) own[i] = T(0);
            for (int kind = 0; kind < 3; ++kind) {
                const Place& place = places[3 * k + kind];
                if (place.start < 0) continue;
                const T* a = first + place.start;
                const T* b = second + place.start;
                kind == 2 ? add_columns<form>(place, a, b, own) : add_rows<form>(place, a, b, own);
            }
        }
    });
}

}  // namespace

template <typename T>
void score_triplets(const std::vector<Place>& places, Statistics<T> statistics, Score score,
                    Smoothing smoothing, T* scores, const ParallelFor& parallel) {
    const int moments = moment_rows(score);
    if (smoothing == Smoothing::ema_uncertainty) {
        const T* rows[] = {statistics.row(moments), statistics.row(moments + 1)};
        score_all<Form::product>(places, rows[0], rows[1], scores, parallel);
    } else if (smoothing == Smoothing::none && score == Score::gsnr) {
        score_all<Form::ratio, T>(places, statistics.row(0), statistics.row(1), scores, parallel);
    } else {
        const T* row = statistics.row(moments);
        score_all<Form::single>(places, row, row, scores, parallel);
    }
}

template void score_triplets(const std::vector<Place>&, Statistics<float>, Score, Smoothing, float*,
                             const ParallelFor&);
template void score_triplets(const std::vector<Place>&, Statistics<double>, Score, Smoothing, double*,
                             const ParallelFor&);

}  // namespace adalora_fast
