// Scores as unsigned integers whose order is the order of selection: a higher key is kept first.
//
// A float's bits, read as an integer, grow with its magnitude. Setting the sign bit of the positive ones and
// inverting the negative ones makes that the order of the values themselves. Two cases are made equal first:
// zeros of both signs, and NaN with -inf (a score that is not a number counts as the lowest).
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define ADALORA_HOST_DEVICE __host__ __device__
#else
#define ADALORA_HOST_DEVICE
#endif

namespace adalora_fast {

template <typename Score>
struct OrderKey;

template <>
struct OrderKey<float> {
    using Type = uint32_t;
    static constexpr Type sign = 0x80000000u, infinity = 0x7f800000u;
};

template <>
struct OrderKey<double> {
    using Type = uint64_t;
    static constexpr Type sign = 0x8000000000000000u, infinity = 0x7ff0000000000000u;
};

template <typename Score>
ADALORA_HOST_DEVICE inline typename OrderKey<Score>::Type order_key(Score score) {
    using Format = OrderKey<Score>;
    typename Format::Type bits;
    static_assert(sizeof(bits) == sizeof(score), "a key has its score's width");
    memcpy(&bits, &score, sizeof(bits));
    if ((bits & ~Format::sign) > Format::infinity) bits = Format::sign | Format::infinity;  // NaN
    if (bits == Format::sign) bits = 0;                                                     // -0
    return bits & Format::sign ? ~bits : bits | Format::sign;
}

}  // namespace adalora_fast
