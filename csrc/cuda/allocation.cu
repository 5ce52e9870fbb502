// Allocation on the GPU: which triplets the budget keeps, λ of the others set to zero, and each matrix's
// rank, in one launch of one block (one more per 256 matrices beyond the first 256). Nothing waits for the
// device: the budget is read there, and the pointers to λ travel with the launch.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cuda_block.cuh"

namespace adalora_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int THREADS = 1024;
using Block = CudaBlock<THREADS>;
using Mask = Block::Global<bool>;

template <typename Score>
__global__ void __launch_bounds__(THREADS)
    allocate_kernel(const Score* __restrict__ scores, int count, const int64_t* __restrict__ budget,
                    bool* mask, const __grid_constant__ LambdaTable table, int* __restrict__ ranks) {
    __shared__ Workspace<Block> shared;
    Block block;
    Mask kept{mask};
    select_triplets(block, shared, scores, count, *budget, kept);
    block.barrier();
    apply_mask(block, kept, table, ranks);
}

__global__ void __launch_bounds__(THREADS)
    apply_mask_kernel(bool* mask, const __grid_constant__ LambdaTable table, int* __restrict__ ranks) {
    Block block;
    Mask kept{mask};
    apply_mask(block, kept, table, ranks);
}

cudaStream_t current_stream(const Tensor& tensor) {
    void* stream = nullptr;
    // Of the checks of an error code this one is there in every PyTorch from 2.10.
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    return static_cast<cudaStream_t>(stream);
}

Tensor empty_like(const Tensor& tensor, int64_t size, ScalarType type) {
    return torch::stable::empty({&size, 1}, type, std::nullopt, tensor.device());
}

// One table per 256 matrices; at least one, which may be empty.
std::vector<LambdaTable> tables_of(const std::vector<Tensor>& lora_E, int64_t triplets) {
    std::vector<LambdaTable> tables(1);
    int64_t start = 0;
    for (const Tensor& values : lora_E) {
        STD_TORCH_CHECK(
            values.is_cuda() && values.dim() == 2 && values.size(1) == 1 && values.is_contiguous(),
            "lora_E must be contiguous [r, 1] on the GPU");
        if (tables.back().matrices == LambdaTable::CAPACITY) tables.emplace_back();
        LambdaTable& table = tables.back();
        const int k = table.matrices++;
        table.start[k] = static_cast<int>(start);
        start += values.size(0);
        table.start[k + 1] = static_cast<int>(start);
        table.data[k] = values.data_ptr();
        table.size[k] = static_cast<uint8_t>(values.element_size());
        table.largest_rank = std::max(table.largest_rank, static_cast<int>(values.size(0)));
    }
    STD_TORCH_CHECK(start == triplets, "the mask has ", triplets, " entries for ", start, " triplets");
    return tables;
}

std::tuple<Tensor, Tensor> allocation_allocate_(const Tensor& scores, const Tensor& budget,
                                                const std::vector<Tensor>& lora_E) {
    STD_TORCH_CHECK(scores.dim() == 1 && scores.is_contiguous() && scores.numel() <= 1 << 24,
                    "scores must be a contiguous vector of at most 16,777,216 entries");
    STD_TORCH_CHECK(budget.numel() == 1 && budget.is_cuda() && budget.scalar_type() == ScalarType::Long,
                    "budget must be an int64 scalar on the GPU");
    const bool wide = scores.scalar_type() == ScalarType::Double;
    STD_TORCH_CHECK(wide || scores.scalar_type() == ScalarType::Float, "scores must be float32 or float64");
    const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
    // Selection alone is the allocation of a model without matrices.
    const std::vector<LambdaTable> tables = tables_of(lora_E, lora_E.empty() ? 0 : scores.numel());
    Tensor mask = empty_like(scores, scores.numel(), ScalarType::Bool);
    Tensor ranks = empty_like(scores, static_cast<int64_t>(lora_E.size()), ScalarType::Int);
    const int count = static_cast<int>(scores.numel());
    const auto* limit = static_cast<const int64_t*>(budget.data_ptr());
    auto* kept = static_cast<bool*>(mask.data_ptr());
    int* rank = static_cast<int*>(ranks.data_ptr());
    const cudaStream_t stream = current_stream(scores);
    if (wide) {
        allocate_kernel<<<1, THREADS, 0, stream>>>(static_cast<const double*>(scores.data_ptr()), count,
                                                   limit, kept, tables[0], rank);
    } else {
        allocate_kernel<<<1, THREADS, 0, stream>>>(static_cast<const float*>(scores.data_ptr()), count, limit,
                                                   kept, tables[0], rank);
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    for (size_t next = 1; next < tables.size(); ++next) {
        rank += LambdaTable::CAPACITY;
        apply_mask_kernel<<<1, THREADS, 0, stream>>>(kept, tables[next], rank);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    return {mask, ranks};
}

Tensor allocation_select(const Tensor& scores, const Tensor& budget) {
    return std::get<0>(allocation_allocate_(scores, budget, {}));
}

void allocation_apply_mask_(const Tensor& mask, const std::vector<Tensor>& lora_E) {
    STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.dim() == 1 && mask.is_contiguous(),
                    "mask must be a contiguous bool vector");
    const torch::stable::accelerator::DeviceGuard guard(mask.get_device_index());
    const std::vector<LambdaTable> tables = tables_of(lora_E, mask.numel());
    Tensor ranks = empty_like(mask, static_cast<int64_t>(lora_E.size()), ScalarType::Int);
    int* rank = static_cast<int*>(ranks.data_ptr());
    for (const LambdaTable& table : tables) {
        apply_mask_kernel<<<1, THREADS, 0, current_stream(mask)>>>(static_cast<bool*>(mask.data_ptr()), table,
                                                                   rank);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
        rank += LambdaTable::CAPACITY;
    }
}

}  // namespace
}  // namespace adalora_fast

// The schemas are defined in cpu/ops.cpp.
STABLE_TORCH_LIBRARY_IMPL(adalora_fast_C, CUDA, m) {
    m.impl("allocation_select", TORCH_BOX(&adalora_fast::allocation_select));
    m.impl("allocation_apply_mask_", TORCH_BOX(&adalora_fast::allocation_apply_mask_));
    m.impl("allocation_allocate_", TORCH_BOX(&adalora_fast::allocation_allocate_));
}
