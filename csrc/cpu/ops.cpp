// The CPU kernels as PyTorch operators `adalora_fast_C::*`, through the stable ABI: one binary for every
// PyTorch from 2.10 on and every Python from 3.11 on. adalora_fast/ops/*/native.py calls them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "adapter.h"
#include "allocation.h"
#include "importance.h"

namespace adalora_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Type type_of(const Tensor& tensor, const char* what) {
    const ScalarType type = tensor.scalar_type();
    if (type == ScalarType::Float) return Type::float32;
    if (type == ScalarType::Double) return Type::float64;
    if (type == ScalarType::Half) return Type::float16;
    STD_TORCH_CHECK(
        type == ScalarType::BFloat16, what,
        " must be float32, float64, float16 or bfloat16; ADALORA_FAST_BACKEND=reference takes others");
    return Type::bfloat16;
}

Matrix matrix_of(const Tensor& tensor, const char* what) {
    STD_TORCH_CHECK(tensor.dim() == 2, what, " has ", tensor.dim(), " dimensions, it must have 2");
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    return {tensor.data_ptr(), type_of(tensor, what), sizes[0], sizes[1], strides[0], strides[1]};
}

void run_parallel(int64_t n, int64_t grain, const Body& body) {
    if (n > 0) torch::stable::parallel_for(0, n, grain, body);
}

template <typename T>
Statistics<T> statistics_of(const Tensor& tensor) {
    return {static_cast<T*>(tensor.data_ptr()), tensor.stride(0)};
}

void check_statistics(const Tensor& statistics, Score score, Smoothing smoothing, int64_t columns) {
    STD_TORCH_CHECK(statistics.dim() == 2 && (statistics.size(1) <= 1 || statistics.stride(1) == 1),
                    "statistics must have two dimensions and contiguous rows");
    const int64_t rows = moment_rows(score) + smoothing_rows(score, smoothing);
    STD_TORCH_CHECK(statistics.size(0) == rows && statistics.size(1) == columns, "statistics is [",
                    statistics.size(0), ", ", statistics.size(1), "], it must be [", rows, ", ", columns,
                    "]");
}

Score score_of(int64_t score) {
    STD_TORCH_CHECK(score >= 0 && score < SCORES, "there is no score ", score);
    return static_cast<Score>(score);
}

Smoothing smoothing_of(int64_t smoothing) {
    STD_TORCH_CHECK(smoothing >= 0 && smoothing < SMOOTHINGS, "there is no smoothing ", smoothing);
    return static_cast<Smoothing>(smoothing);
}

// places [parameters, 3] int64: first column in the statistics or -1, rows, columns.
std::vector<Place> places_of(const Tensor& places) {
    STD_TORCH_CHECK(places.scalar_type() == ScalarType::Long && places.is_contiguous() && places.dim() == 2 &&
                        places.size(1) == 3 && places.size(0) % 3 == 0,
                    "places must be contiguous int64 [3 · matrices, 3]");
    const int64_t* data = static_cast<const int64_t*>(places.data_ptr());
    std::vector<Place> found;
    for (int64_t i = 0; i < places.size(0); ++i, data += 3) found.push_back({data[0], data[1], data[2]});
    return found;
}

int64_t columns_of(const std::vector<Place>& places) {
    int64_t columns = 0;
    for (const Place& place : places) columns += place.start < 0 ? 0 : place.rows * place.cols;
    return columns;
}

template <typename Run>
void with_type(const Tensor& tensor, const char* what, const Run& run) {
    switch (type_of(tensor, what)) {
        case Type::float32: return run(float());
        case Type::float64: return run(double());
        default: STD_TORCH_CHECK(false, what, " must be float32 or float64");
    }
}

void importance_update_(const std::vector<Tensor>& parameters,
                        const std::vector<std::optional<Tensor>>& grads, const Tensor& statistics,
                        const Tensor& updates, const Tensor& places, int64_t score, int64_t smoothing,
                        double beta1, double beta2) {
    const std::vector<Place> where = places_of(places);
    STD_TORCH_CHECK(parameters.size() == where.size() && grads.size() == where.size(), "places is for ",
                    where.size(), " parameters, got ", parameters.size(), " and ", grads.size(),
                    " gradients");
    const Score chosen = score_of(score);
    const Smoothing smooth = smoothing_of(smoothing);
    check_statistics(statistics, chosen, smooth, columns_of(where));
    STD_TORCH_CHECK(updates.scalar_type() == ScalarType::Long && updates.is_contiguous() &&
                        updates.numel() == static_cast<int64_t>(where.size()),
                    "updates must be contiguous int64, one per parameter");
    std::vector<Factor> factors(where.size());
    for (size_t i = 0; i < where.size(); ++i) {
        Factor& factor = factors[i];
        factor.start = where[i].start;
        factor.has_gradient = grads[i].has_value();
        if (factor.start < 0) continue;
        factor.weight = matrix_of(parameters[i], "a parameter");
        STD_TORCH_CHECK(factor.weight.rows == where[i].rows && factor.weight.cols == where[i].cols,
                        "parameter ", i, " has another shape than places says");
        if (!factor.has_gradient) continue;
        factor.gradient = matrix_of(*grads[i], "a gradient");
        STD_TORCH_CHECK(
            factor.gradient.rows == factor.weight.rows && factor.gradient.cols == factor.weight.cols,
            "gradient ", i, " has another shape than its parameter");
    }
    int64_t* counts = static_cast<int64_t*>(updates.data_ptr());
    with_type(statistics, "statistics", [&](auto type) {
        update_importance<decltype(type)>(factors, statistics_of<decltype(type)>(statistics), counts, chosen,
                                          smooth, beta1, beta2, run_parallel);
    });
}

Tensor importance_scores(const Tensor& statistics, const Tensor& places, int64_t score, int64_t smoothing) {
    const std::vector<Place> where = places_of(places);
    const Score chosen = score_of(score);
    const Smoothing smooth = smoothing_of(smoothing);
    check_statistics(statistics, chosen, smooth, columns_of(where));
    int64_t triplets = 0;
    for (size_t i = 1; i < where.size(); i += 3) triplets += where[i].rows;
    const int64_t size[] = {triplets};
    Tensor scores = torch::stable::empty({size, 1}, statistics.scalar_type());
    with_type(statistics, "statistics", [&](auto type) {
        using T = decltype(type);
        score_triplets<T>(where, statistics_of<T>(statistics), chosen, smooth,
                          static_cast<T*>(scores.data_ptr()), run_parallel);
    });
    return scores;
}

Tensor adapter_right_factor_gradients_(const Tensor& V, const Tensor& lora_A, const Tensor& lora_E) {
    STD_TORCH_CHECK(V.dim() == 2 && lora_A.dim() == 2 && lora_A.size(0) == V.size(0) &&
                        lora_A.size(1) == V.size(1) && lora_E.numel() == V.size(0),
                    "V and lora_A must be [r, in], lora_E [r, 1]");
    STD_TORCH_CHECK(lora_A.scalar_type() == V.scalar_type() && lora_E.scalar_type() == V.scalar_type() &&
                        V.is_contiguous() && lora_A.is_contiguous() && lora_E.is_contiguous(),
                    "V, lora_A and lora_E must be contiguous and of one type");
    Tensor dE = torch::stable::empty(lora_E.sizes(), V.scalar_type());
    with_type(V, "V", [&](auto type) {
        using T = decltype(type);
        right_factor_gradients<T>({static_cast<T*>(V.data_ptr()), static_cast<const T*>(lora_A.data_ptr()),
                                   static_cast<const T*>(lora_E.data_ptr()), static_cast<T*>(dE.data_ptr()),
                                   V.size(0), V.size(1)});
    });
    return dE;
}

int64_t integer_of(const Tensor& scalar) {
    STD_TORCH_CHECK(scalar.numel() == 1, "budget must be a scalar, it has ", scalar.numel(), " entries");
    const void* data = scalar.data_ptr();
    if (scalar.scalar_type() == ScalarType::Int) return *static_cast<const int32_t*>(data);
    STD_TORCH_CHECK(scalar.scalar_type() == ScalarType::Long, "budget must be int64 or int32");
    return *static_cast<const int64_t*>(data);
}

Tensor allocation_select(const Tensor& scores, const Tensor& budget) {
    STD_TORCH_CHECK(scores.dim() == 1, "scores has ", scores.dim(), " dimensions, it must have 1");
    Tensor mask = torch::stable::empty(scores.sizes(), ScalarType::Bool);
    const Matrix column = {
        scores.data_ptr(), type_of(scores, "scores"), scores.size(0), 1, scores.stride(0), 1};
    select_triplets(column, integer_of(budget), static_cast<bool*>(mask.data_ptr()));
    return mask;
}

std::vector<Lambdas> lambdas_of(const std::vector<Tensor>& lora_E, int64_t triplets) {
    std::vector<Lambdas> lambdas;
    int64_t total = 0;
    for (const Tensor& values : lora_E) {
        STD_TORCH_CHECK(values.dim() == 2 && values.size(1) == 1, "lora_E must be [r, 1]");
        const int64_t size = static_cast<int64_t>(values.element_size());
        lambdas.push_back({values.data_ptr(), values.size(0), values.stride(0) * size, size});
        total += values.size(0);
    }
    STD_TORCH_CHECK(total == triplets, "the mask has ", triplets, " entries for ", total, " triplets");
    return lambdas;
}

void allocation_apply_mask_(const Tensor& mask, const std::vector<Tensor>& lora_E) {
    STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.dim() == 1 && mask.is_contiguous(),
                    "mask must be a contiguous bool vector");
    const std::vector<Lambdas> lambdas = lambdas_of(lora_E, mask.numel());
    apply_mask(static_cast<const bool*>(mask.data_ptr()), lambdas);
}

std::tuple<Tensor, Tensor> allocation_allocate_(const Tensor& scores, const Tensor& budget,
                                                const std::vector<Tensor>& lora_E) {
    const std::vector<Lambdas> lambdas = lambdas_of(lora_E, scores.numel());
    Tensor mask = allocation_select(scores, budget);
    const int64_t matrices = static_cast<int64_t>(lambdas.size());
    Tensor ranks = torch::stable::empty({&matrices, 1}, ScalarType::Int);
    const bool* kept = static_cast<const bool*>(mask.data_ptr());
    apply_mask(kept, lambdas);
    int32_t* rank = static_cast<int32_t*>(ranks.data_ptr());
    for (const Lambdas& matrix : lambdas) {
        *rank++ = static_cast<int32_t>(std::count(kept, kept + matrix.count, true));
        kept += matrix.count;
    }
    return {mask, ranks};
}

}  // namespace
}  // namespace adalora_fast

STABLE_TORCH_LIBRARY(adalora_fast_C, m) {
    m.def("adapter_right_factor_gradients_(Tensor(a!) V, Tensor lora_A, Tensor lora_E) -> Tensor");
    m.def(
        "importance_update_(Tensor[] parameters, Tensor?[] grads, Tensor(a!) statistics, Tensor(b!) updates, "
        "Tensor places, int score, int smoothing, float beta1, float beta2) -> ()");
    m.def("importance_scores(Tensor statistics, Tensor places, int score, int smoothing) -> Tensor");
    m.def("allocation_select(Tensor scores, Tensor budget) -> Tensor");
    m.def("allocation_apply_mask_(Tensor mask, Tensor(a!)[] lora_E) -> ()");
    m.def(
        "allocation_allocate_(Tensor scores, Tensor budget, Tensor(a!)[] lora_E) -> (Tensor mask, Tensor "
        "ranks)");
}

STABLE_TORCH_LIBRARY_IMPL(adalora_fast_C, CPU, m) {
    m.impl("adapter_right_factor_gradients_", TORCH_BOX(&adalora_fast::adapter_right_factor_gradients_));
    m.impl("importance_update_", TORCH_BOX(&adalora_fast::importance_update_));
    m.impl("importance_scores", TORCH_BOX(&adalora_fast::importance_scores));
    m.impl("allocation_select", TORCH_BOX(&adalora_fast::allocation_select));
    m.impl("allocation_apply_mask_", TORCH_BOX(&adalora_fast::allocation_apply_mask_));
    m.impl("allocation_allocate_", TORCH_BOX(&adalora_fast::allocation_allocate_));
}
