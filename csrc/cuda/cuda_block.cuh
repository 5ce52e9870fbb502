// The Block of common/block_select.h on the GPU: each() is the thread itself, a Register one of its own.
#pragma once

#include "../common/block_select.h"

namespace adalora_fast {

template <int COUNT>
struct CudaBlock {
    static constexpr int THREADS = COUNT;
    static constexpr unsigned WHOLE_WARP = 0xffffffffu;

    template <typename V>
    struct Register {
        V value;
        __device__ explicit Register(const CudaBlock&) : value() {}
        __device__ V& operator[](int) { return value; }
        __device__ const V& operator[](int) const { return value; }
    };

    template <typename V, int N>
    struct Shared {
        V data[N];
        __device__ V get(int i, int) const { return data[i]; }
        __device__ void set(int i, V value, int) { data[i] = value; }
        __device__ void add(int i, V value, int) { atomicAdd(&data[i], value); }
    };

    template <typename V>
    struct Global {
        V* data;
        __device__ V get(int i, int) const { return data[i]; }
        __device__ void set(int i, V value, int) { data[i] = value; }
    };

    template <typename F>
    __device__ __forceinline__ void each(const F& f) const {
        f(static_cast<int>(threadIdx.x));
    }

    __device__ void barrier() const { __syncthreads(); }

    template <class Memory>
    __device__ int same_for_all(const Memory& memory, int i) const {
        return memory.data[i];
    }

    __device__ Register<int> shuffle(const Register<int>& values, const Register<int>& lane) const {
        Register<int> result(*this);
        result.value = __shfl_sync(WHOLE_WARP, values.value, lane.value);
        return result;
    }

    __device__ Register<int> shuffle_up(const Register<int>& values, int distance) const {
        Register<int> result(*this);
        result.value = __shfl_up_sync(WHOLE_WARP, values.value, distance);
        return result;
    }

    __device__ Register<uint32_t> ballot(const Register<bool>& votes) const {
        Register<uint32_t> result(*this);
        result.value = __ballot_sync(WHOLE_WARP, votes.value);
        return result;
    }
};

}  // namespace adalora_fast
