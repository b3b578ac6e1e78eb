/* Weights to the dense form (codec/radix.py), one output channel after another. */
#include "pack.h"

#include <stdlib.h>

static void load_row(const void *weight, int64_t first, int64_t columns, int dtype, float *restrict row) {
    if (dtype == FLOAT32)
        for (int64_t i = 0; i < columns; i++) row[i] = load(weight, first + i, FLOAT32);
    else if (dtype == BFLOAT16)
        for (int64_t i = 0; i < columns; i++) row[i] = load(weight, first + i, BFLOAT16);
    else
        for (int64_t i = 0; i < columns; i++) row[i] = load(weight, first + i, FLOAT16);
}

/* <w, k> and <k, k> with k = clip(round(w / scale), low, high). */
static void fit(const float *restrict row, int64_t columns, float scale, float low, float high, float *dot,
                float *norm) {
    const float inverse = 1.0f / scale;
    float d = 0.0f, n = 0.0f;
    for (int64_t i = 0; i < columns; i++) {
        float k = rintf(row[i] * inverse);
        k = k < low ? low : k > high ? high : k;
        d += row[i] * k;
        n += k * k;
    }
    *dot = d;
    *norm = n;
}

static float one_where_zero(float scale) { return scale == 0.0f ? 1.0f : scale; }

/* The alternation of codec/scales.py, which explains its starts. */
static float alternate(const float *restrict row, int64_t columns, float low, float high, float gaussian_step,
                       int starts, int iterations) {
    float squares = 0.0f, largest = 0.0f, dot, norm;
    for (int64_t i = 0; i < columns; i++) {
        squares += row[i] * row[i];
        const float magnitude = fabsf(row[i]);
        largest = magnitude > largest ? magnitude : largest;
    }
    const float gaussian = sqrtf(squares / (float)columns) * gaussian_step, uniform = largest / (-low + 0.5f);
    if (!isfinite(gaussian)) return NAN;
    float scale = one_where_zero(gaussian), best = INFINITY;
    for (int s = 0; s < starts; s++) {
        const float part = (float)s / (float)(starts - 1);
        const float start = one_where_zero(powf(gaussian, 1.0f - part) * powf(uniform, part));
        fit(row, columns, start, low, high, &dot, &norm);
        const float error = start * (start * norm - 2.0f * dot);
        if (error < best) {
            best = error;
            scale = start;
        }
    }
    for (int i = 0; i < iterations; i++) {
        fit(row, columns, scale, low, high, &dot, &norm);
        if (norm > 0.0f) scale = dot / norm;
    }
    return scale;
}

typedef struct {
    const void *weight; /* [rows, columns] of `dtype` */
    uint8_t *dense;     /* [rows, row_bytes_out] */
    float *scale;       /* [rows] */
    int64_t columns, row_bytes_out, dtype, bits, balance, starts, iterations;
    float gaussian_step;
    _Atomic int32_t failed;
} QuantizeArguments;

TAKES(quantize, QuantizeArguments)

EXPORT void bitsfusion_quantize(QuantizeArguments *a, int64_t start, int64_t stop) {
    const int bits = (int)a->bits, half = half_range(bits);
    const int64_t columns = a->columns;
    const float low = (float)-half, high = (float)(a->balance || bits == 8 ? half : half - 1);
    uint8_t *const scratch = malloc((size_t)(words_bytes(columns) + digits_bytes(columns)));
    if (!scratch) {
        a->failed = 1;
        return;
    }
    float *row = (float *)scratch;
    uint32_t *words = (uint32_t *)scratch; /* the row is no longer needed once its digits are known */
    uint8_t *digits = scratch + words_bytes(columns);
    for (int64_t r = start; r < stop; r++) {
        load_row(a->weight, r * columns, columns, (int)a->dtype, row);
        const float scale =
            alternate(row, columns, low, high, a->gaussian_step, (int)a->starts, (int)a->iterations);
        a->scale[r] = scale;
        if (!isfinite(scale)) continue; /* the caller refuses the weight */
        const float inverse = 1.0f / scale;
        for (int64_t i = 0; i < columns; i++) {
            float k = rintf(row[i] * inverse);
            k = k < low ? low : k > high ? high : k;
            digits[i] = (uint8_t)((int)k + half);
        }
        pack_row(digits, words, a->dense + r * a->row_bytes_out, columns, bits);
    }
    free(scratch);
}
