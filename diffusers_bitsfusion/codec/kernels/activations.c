/* Activations to eight bits, and sums of integer products to outputs; the same in torch: ops/activations.py. */
#include "common.h"

#define TINY 1e-30f

INLINE float clip(float value, float low, float high) { /* NaN to low */
    value = value > low ? value : low;
    return value < high ? value : high;
}

INLINE void quantize_token(const void *x, int64_t first, int64_t columns, int dtype, int8_t *restrict codes,
                           float *scale) {
    int32_t largest = 0; /* of the bits of |x|, which order as the numbers do, with NaN above all */
    for (int64_t i = 0; i < columns; i++) {
        const int32_t bits = (int32_t)(bits_of_float(load(x, first + i, dtype)) & 0x7fffffffu);
        largest = bits > largest ? bits : largest;
    }
    const float found = float_of_bits((uint32_t)largest), span = found < TINY ? TINY : found;
    const float inverse = 127.0f / span;
    *scale = span / 127.0f;
    for (int64_t i = 0; i < columns; i++)
        codes[i] = (int8_t)clip(rintf(load(x, first + i, dtype) * inverse), -127.0f, 127.0f);
}

#define FOR_DTYPE(DO)                             \
    if (dtype == FLOAT32) { DO(FLOAT32) }         \
    else if (dtype == BFLOAT16) { DO(BFLOAT16) }  \
    else { DO(FLOAT16) }

/* x: [rows, columns] of `dtype`; codes: int8 [rows, columns]; scale: float [rows]. */
void bitsfusion_quantize_tokens(const void *x, int8_t *codes, float *scale, int64_t rows, int64_t columns, int dtype) {
#define DO(DTYPE) \
    for (int64_t r = 0; r < rows; r++) quantize_token(x, r * columns, columns, DTYPE, codes + r * columns, scale + r);
    FOR_DTYPE(DO)
#undef DO
}

INLINE int32_t ordered(float value) { /* integers in the order of the numbers, NaN beyond the infinities */
    const int32_t bits = (int32_t)bits_of_float(value);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

INLINE float of_ordered(int32_t key) { return float_of_bits((uint32_t)(key ^ ((key >> 31) & 0x7fffffff))); }

/* The smallest and the largest of zero and x[first] ... x[first + count - 1], `dtype`. */
void bitsfusion_range(const void *x, float *low_high, int64_t first, int64_t count, int dtype) {
    int32_t low = 0, high = 0;
#define DO(DTYPE)                                                    \
    for (int64_t i = first; i < first + count; i++) {                \
        const int32_t key = ordered(load(x, i, DTYPE));              \
        low = key < low ? key : low;                                 \
        high = key > high ? key : high;                              \
    }
    FOR_DTYPE(DO)
#undef DO
    low_high[0] = of_ordered(low);
    low_high[1] = of_ordered(high);
}

/* x[first] ... x[first + count - 1] of `dtype` to codes at the same places; inverse and zero_point: one float each. */
void bitsfusion_quantize_affine(const void *x, uint8_t *restrict codes, const float *inverse, const float *zero_point,
                                int64_t first, int64_t count, int dtype) {
    const float factor = *inverse, zero = *zero_point;
#define DO(DTYPE)                                     \
    for (int64_t i = first; i < first + count; i++)   \
        codes[i] = (uint8_t)clip(rintf(load(x, i, DTYPE) * factor) + zero, 0.0f, 255.0f);
    FOR_DTYPE(DO)
#undef DO
}

/* Sums of products of codes to outputs: sums int32 [rows, columns]; token_scale float [rows]; weight_scale and bias
 * float [columns]; out [rows, columns], `dtype` fp32 or bf16. */
void bitsfusion_rescale(const int32_t *restrict sums, const float *restrict token_scale,
                        const float *restrict weight_scale, const float *restrict bias, void *out, int64_t rows,
                        int64_t columns, int dtype) {
    for (int64_t r = 0; r < rows; r++) {
        const int32_t *restrict in = sums + r * columns;
        const float scale = token_scale[r];
        if (dtype == FLOAT32) {
            float *restrict y = (float *)out + r * columns;
            for (int64_t i = 0; i < columns; i++) y[i] = (float)in[i] * weight_scale[i] * scale + bias[i];
        } else {
            uint16_t *restrict y = (uint16_t *)out + r * columns;
            for (int64_t i = 0; i < columns; i++) y[i] = bf16_of((float)in[i] * weight_scale[i] * scale + bias[i]);
        }
    }
}

/* 2^x for x <= 0, to 2e-7 of its size, of at least 2^-126; NaN to that too. */
INLINE float exp2_of(float x) {
    x = x > -126.0f ? x : -126.0f;
    const float whole = rintf(x), part = x - whole;
    float y = 1.5403530e-4f; /* Taylor's, powers of log(2) */
    y = y * part + 1.3333558e-3f;
    y = y * part + 9.6181291e-3f;
    y = y * part + 5.5504109e-2f;
    y = y * part + 2.4022651e-1f;
    y = y * part + 6.9314718e-1f;
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

/* The same, and of the halves of each row, hidden and gate, the product hidden * gelu(gate): sums int32 [rows, 2 half];
 * token_scale float [rows]; weight_scale and bias float [2 half]; out [rows, half], `dtype` fp32 or bf16. */
void bitsfusion_rescale_geglu(const int32_t *restrict sums, const float *restrict token_scale,
                              const float *restrict weight_scale, const float *restrict bias, void *out, int64_t rows,
                              int64_t half, int dtype) {
    for (int64_t r = 0; r < rows; r++) {
        const int32_t *restrict hidden = sums + 2 * r * half, *restrict gate = hidden + half;
        const float scale = token_scale[r];
#define GATED(I)                                                   \
    (((float)hidden[I] * weight_scale[I] * scale + bias[I]) *      \
     gelu_of((float)gate[I] * weight_scale[half + I] * scale + bias[half + I]))
        if (dtype == FLOAT32) {
            float *restrict y = (float *)out + r * half;
            for (int64_t i = 0; i < half; i++) y[i] = GATED(i);
        } else {
            uint16_t *restrict y = (uint16_t *)out + r * half;
            for (int64_t i = 0; i < half; i++) y[i] = bf16_of(GATED(i));
        }
#undef GATED
    }
}
