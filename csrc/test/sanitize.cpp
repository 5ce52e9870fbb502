// Runs every CPU kernel on odd sizes, types, layouts and thread counts, for the sanitizers to watch (`make
// sanitize`). What the kernels compute is tested from Python, in tests/ops/; here only that one thread and
// three agree, which a race would break.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "../cpu/adapter.h"
#include "../cpu/allocation.h"
#include "../cpu/importance.h"

namespace {

using namespace adalora_fast;

void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
}

ParallelFor on_threads(int64_t threads) {
    return [threads](int64_t n, int64_t, const Body& body) {
        std::vector<std::thread> running;
        const int64_t part = (n + threads - 1) / threads;
        for (int64_t begin = 0; begin < n; begin += part) {
            running.emplace_back(body, begin, std::min(begin + part, n));
        }
        for (std::thread& thread : running) thread.join();
    };
}

// A model's parameters and gradients in memory of exactly the right size: one entry further is an error.
struct Model {
    std::vector<std::vector<unsigned char>> memory;
    std::vector<Factor> factors;
    std::vector<Place> places;
    int64_t columns = 0;

    Matrix random(int64_t rows, int64_t cols, int64_t seed) {
        static constexpr int64_t sizes[] = {4, 8, 2, 2};
        const Type type = static_cast<Type>(seed % 4);
        const int64_t size = sizes[seed % 4];
        const bool transposed = seed % 3 == 0;
        std::mt19937 generator(static_cast<unsigned>(seed));
        std::vector<unsigned char> bytes(rows * cols * size);
        for (int64_t i = 0; i < rows * cols; ++i) {
            const uint16_t half =
                static_cast<uint16_t>(generator() & 0xbbffu);  // finite in either 16-bit type
            const double value = std::normal_distribution<double>()(generator);
            const float single = static_cast<float>(value);
            const void* source = size == 2   ? static_cast<const void*>(&half)
                                 : size == 4 ? static_cast<const void*>(&single)
                                             : &value;
            std::copy_n(static_cast<const unsigned char*>(source), size, bytes.data() + i * size);
        }
        memory.push_back(std::move(bytes));
        return {memory.back().data(), type, rows, cols, transposed ? 1 : cols, transposed ? rows : 1};
    }

    void add(int64_t rows, int64_t cols, bool scored, bool missing) {
        const int64_t seed = static_cast<int64_t>(factors.size());
        Factor factor;
        factor.weight = random(rows, cols, seed);
        factor.has_gradient = !missing;
        if (!missing) factor.gradient = random(rows, cols, seed + 5);
        factor.start = scored && rows * cols > 0 ? columns : -1;
        places.push_back({factor.start, rows, cols});
        if (factor.start >= 0) columns += rows * cols;
        factors.push_back(factor);
    }

    explicit Model(bool lambda_only) {
        static constexpr int64_t shapes[][3] = {{5, 3, 7}, {1031, 8, 63}, {4, 0, 9}, {1, 1, 1}, {700, 13, 5}};
        for (int repeat = 0; repeat < 2; ++repeat) {
            for (const auto& [in, r, out] : shapes) {
                add(r, in, !lambda_only, repeat == 1 && r == 3);
                add(r, 1, true, false);
                add(out, r, !lambda_only, false);
            }
        }
    }
};

template <typename T>
void check_importance(Score score, Smoothing smoothing) {
    const Model model(score == Score::magnitude);
    const int64_t rows = moment_rows(score) + smoothing_rows(score, smoothing);
    int64_t triplets = 0;
    for (size_t i = 1; i < model.places.size(); i += 3) triplets += model.places[i].rows;
    std::vector<T> statistics[2], scores[2];
    for (int run = 0; run < 2; ++run) {
        const ParallelFor parallel = on_threads(run == 0 ? 1 : 3);
        statistics[run].assign(rows * model.columns, T(0));
        scores[run].assign(triplets, T(0));
        std::vector<int64_t> updates(model.factors.size(), 0);
        const Statistics<T> buffer = {statistics[run].data(), model.columns};
        for (int step = 0; step < 2; ++step) {
            update_importance<T>(model.factors, buffer, updates.data(), score, smoothing, 0.85, 0.4,
                                 parallel);
        }
        for (size_t i = 0; i < updates.size(); ++i) {
            require(updates[i] == (model.factors[i].has_gradient ? 2 : 0), "every step is counted");
        }
        score_triplets<T>(model.places, buffer, score, smoothing, scores[run].data(), parallel);
    }
    require(statistics[0] == statistics[1] && scores[0] == scores[1],
            "any number of threads gives one result");
}

void check_allocation() {
    for (int64_t count : {0, 1, 7, 1000, 1025}) {
        std::vector<float> scores(count);
        for (int64_t i = 0; i < count; ++i) scores[i] = static_cast<float>(i * 7919 % 13);
        for (int64_t budget : {int64_t(-1), int64_t(0), count / 3, count - 1, count, count + 1}) {
            std::vector<unsigned char> bytes(count + 1);
            bool* mask = reinterpret_cast<bool*>(bytes.data());
            select_triplets({scores.data(), Type::float32, count, 1, 1, 1}, budget, mask);
            const int64_t expected = std::clamp<int64_t>(budget, 0, count);
            require(std::count(mask, mask + count, true) == expected, "exactly the budget is kept");
            std::vector<double> wide(count, 1.0);
            std::vector<uint16_t> narrow(2 * count, 1);
            apply_mask(mask, {{wide.data(), count, 8, 8}});
            apply_mask(mask, {{narrow.data(), count / 2, 4, 2}});
            require(std::count(wide.begin(), wide.end(), 1.0) == expected, "the others are zero");
        }
    }
}

}  // namespace

template <typename T>
void check_adapter(int64_t rank, int64_t width) {
    std::vector<T> V(rank * width, T(2)), A(rank * width, T(3)), E(rank, T(5)), dE(rank);
    right_factor_gradients<T>({V.data(), A.data(), E.data(), dE.data(), rank, width});
    require(std::count(V.begin(), V.end(), T(10)) == rank * width, "dA");
    require(std::count(dE.begin(), dE.end(), static_cast<T>(6 * width)) == rank, "dE");
}

int main() {
    for (int64_t score = 0; score < SCORES; ++score) {
        for (int64_t smoothing = 0; smoothing < SMOOTHINGS; ++smoothing) {
            check_importance<float>(static_cast<Score>(score), static_cast<Smoothing>(smoothing));
            check_importance<double>(static_cast<Score>(score), static_cast<Smoothing>(smoothing));
        }
    }
    check_allocation();
    for (const int64_t width : {0, 1, 7, 8, 65}) {
        check_adapter<float>(3, width);
        check_adapter<double>(3, width);
    }
    std::puts("all kernels are clean");
}
