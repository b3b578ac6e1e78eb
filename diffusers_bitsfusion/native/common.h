/* What the compiled loops share. Plain C11 for the compiler's vectoriser; no dependency, no state.
 *
 * A loop takes the struct of arguments beside it, which arguments.py has, too, and the range of rows to go over; team.c
 * calls it. Loops that allocate set `failed` and leave their rows where there is no memory, and the caller raises. */
#ifndef BITSFUSION_COMMON_H
#define BITSFUSION_COMMON_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* A loop's size of arguments, which is compared with that in Python. */
#define TAKES(LOOP, ARGUMENTS) \
    EXPORT int64_t bitsfusion_##LOOP##_size(void) { return (int64_t)sizeof(ARGUMENTS); }

#define INLINE static inline __attribute__((always_inline))

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

INLINE float float_of_bits(uint32_t bits) {
    union { uint32_t u; float f; } w = {bits};
    return w.f;
}

INLINE uint32_t bits_of_float(float value) {
    union { float f; uint32_t u; } w = {value};
    return w.u;
}

enum { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2, INT8 = 3 };

/* Exponent and fraction moved into place, then the exponent's bias put right by a power of two: exact for subnormal
 * numbers too. Infinities and NaNs keep the largest exponent. */
INLINE float float_of_half(uint16_t bits) {
    const uint32_t magnitude = bits & 0x7fffu, sign = (uint32_t)(bits & 0x8000u) << 16;
    const uint32_t finite = bits_of_float(float_of_bits(magnitude << 13) * 0x1p112f);
    return float_of_bits((magnitude < 0x7c00u ? finite : magnitude << 13 | 0x7f800000u) | sign);
}

INLINE float load(const void *values, int64_t i, int dtype) {
    if (dtype == FLOAT32) return ((const float *)values)[i];
    const uint16_t bits = ((const uint16_t *)values)[i];
    return dtype == BFLOAT16 ? float_of_bits((uint32_t)bits << 16) : float_of_half(bits);
}

INLINE uint16_t bf16_of(float value) {
    const uint32_t u = bits_of_float(value);
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16); /* to nearest, ties to even */
}

#endif
