/* Exponentials, and the activations made of them, in operations that vectorise. */
#ifndef BITSFUSION_EXPONENTIAL_H
#define BITSFUSION_EXPONENTIAL_H

#include "common.h"

/* 2^x for x <= 0, to 1e-7 of its size, of at least 2^-126; NaN to that too. */
INLINE float exp2_of(float x) {
    x = x > -126.0f ? x : -126.0f;
    const float whole = rintf(x), part = x - whole;
    float y = 1.534581105e-4f; /* the polynomial of least error, 2e-9, on [-1/2, 1/2] */
    y = y * part + 1.339993150e-3f;
    y = y * part + 9.618488963e-3f;
    y = y * part + 5.550328776e-2f;
    y = y * part + 2.402264689e-1f;
    y = y * part + 6.931472057e-1f;
    y = y * part + 1.0f;
    return y * float_of_bits((uint32_t)((int32_t)whole + 127) << 23);
}

/* x times the normal distribution's integral up to x, which is found to 1e-7 (Abramowitz and Stegun, 7.1.26). */
INLINE float gelu_of(float x) {
    const float z = fabsf(x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z);
    float y = 1.061405429f;
    y = y * t - 1.453152027f;
    y = y * t + 1.421413741f;
    y = y * t - 0.284496736f;
    y = y * t + 0.254829592f;
    const float tail = 0.5f * y * t * exp2_of(x * x * -0.72134752f);
    return x * (x > 0.0f ? 1.0f - tail : tail);
}

/* x / (1 + exp(-x)). */
INLINE float silu_of(float x) {
    const float z = exp2_of(fabsf(x) * -1.44269504f);
    return x * (x > 0.0f ? 1.0f : z) / (1.0f + z);
}

#endif
