// Factors (lora_A, lora_E, lora_B) as raw memory, read block by block in the type that statistics have.
#pragma once

#include <cstdint>
#include <cstring>

namespace adalora_fast {

enum class Type { float32, float64, float16, bfloat16 };

// A matrix [rows, cols] in any layout; null data stands for zeros.
struct Matrix {
    const void* data = nullptr;
    Type type = Type::float32;
    int64_t rows = 0, cols = 0, row_stride = 0, col_stride = 0;

    bool is_contiguous() const { return (cols <= 1 || col_stride == 1) && (rows <= 1 || row_stride == cols); }
};

inline float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

struct Float16 {
    uint16_t bits;
    // Exponent and mantissa move to float32's places; the exponents' biases differ by 112. Multiplying by
    // 2^112 also makes subnormal numbers right. Infinity and NaN keep the largest exponent. No branches.
    explicit operator float() const {
        const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu) << 13;
        const float scaled = float_of_bits(magnitude) * float_of_bits(0x77800000u);
        uint32_t result;
        memcpy(&result, &scaled, sizeof(result));
        result |= (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
        return float_of_bits(result | static_cast<uint32_t>(bits & 0x8000u) << 16);
    }
    explicit operator double() const { return static_cast<float>(*this); }
};

struct BFloat16 {
    uint16_t bits;
    explicit operator float() const { return float_of_bits(static_cast<uint32_t>(bits) << 16); }
    explicit operator double() const { return static_cast<float>(*this); }
};

constexpr int64_t BLOCK = 1024;  // entries converted at a time; three blocks of float64 fit the L1 cache

template <typename From, typename To>
inline void convert(const From* source, int64_t stride, int64_t n, To* target) {
    if (stride == 1) {
        for (int64_t i = 0; i < n; ++i) target[i] = static_cast<To>(source[i]);
    } else {
        for (int64_t i = 0; i < n; ++i) target[i] = static_cast<To>(source[i * stride]);
    }
}

template <typename From, typename To>
void copy_entries(const Matrix& matrix, int64_t begin, int64_t n, To* target) {
    const From* data = static_cast<const From*>(matrix.data);
    if (matrix.is_contiguous()) return convert(data + begin, 1, n, target);
    for (int64_t done = 0; done < n;) {
        const int64_t row = (begin + done) / matrix.cols, col = (begin + done) % matrix.cols;
        const int64_t length = n - done < matrix.cols - col ? n - done : matrix.cols - col;
        convert(data + row * matrix.row_stride + col * matrix.col_stride, matrix.col_stride, length,
                target + done);
        done += length;
    }
}

// Entries [begin, begin + n) in row-major order as T: in place where they already are, else in `buffer`.
template <typename T>
const T* entries(const Matrix& matrix, int64_t begin, int64_t n, T* buffer) {
    constexpr Type own = sizeof(T) == 4 ? Type::float32 : Type::float64;
    if (matrix.data == nullptr) {
        for (int64_t i = 0; i < n; ++i) buffer[i] = T(0);
        return buffer;
    }
    if (matrix.type == own && matrix.is_contiguous()) return static_cast<const T*>(matrix.data) + begin;
    switch (matrix.type) {
        case Type::float32: copy_entries<float>(matrix, begin, n, buffer); break;
        case Type::float64: copy_entries<double>(matrix, begin, n, buffer); break;
        case Type::float16: copy_entries<Float16>(matrix, begin, n, buffer); break;
        case Type::bfloat16: copy_entries<BFloat16>(matrix, begin, n, buffer); break;
    }
    return buffer;
}

}  // namespace adalora_fast
