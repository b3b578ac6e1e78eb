/* Weights to the dense form (codec/radix.py), one output channel after another. */
#include "common.h"

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

/* Words of `planes` planar digits; digits past the row's end are those of zero weights (`digits` is padded). */
static void join(const uint8_t *restrict digits, uint32_t *restrict words, int64_t width, uint32_t base, int planes) {
    for (int64_t i = 0; i < width; i++) words[i] = digits[(planes - 1) * width + i];
    for (int j = planes - 2; j >= 0; j--)
        for (int64_t i = 0; i < width; i++) words[i] = words[i] * base + digits[j * width + i];
}

static void pack_row(const uint8_t *restrict digits, uint32_t *restrict words, uint8_t *restrict out, int64_t columns,
                     int bits) {
    if (bits == 1) {
        const int64_t width = ceil_div(columns, 5);
        join(digits, words, width, 3, 5);
        for (int64_t i = 0; i < width; i++) out[i] = (uint8_t)words[i];
    } else if (bits == 2) {
        const int64_t width = ceil_div(columns, 3), part = ceil_div(width, 8);
        join(digits, words, width, 5, 3);
        memset(words + width, 0, (size_t)(8 * part - width) * sizeof(uint32_t));
        for (int p = 0; p < 7; p++)
            for (int64_t i = 0; i < part; i++)
                out[p * part + i] = (uint8_t)(words[p * part + i] | ((words[7 * part + i] >> p) & 1u) << 7);
    } else if (bits == 3) {
        const int64_t width = ceil_div(columns, 5);
        join(digits, words, width, 9, 5);
        for (int64_t i = 0; i < width; i++) out[i] = (uint8_t)words[i];
        for (int64_t i = 0; i < width; i++) out[width + i] = (uint8_t)(words[i] >> 8);
    } else if (bits == 4) {
        const int64_t width = ceil_div(columns, 2), part = ceil_div(width, 8);
        join(digits, words, width, 17, 2);
        memset(words + width, 0, (size_t)(8 * part - width) * sizeof(uint32_t));
        for (int64_t i = 0; i < width; i++) out[i] = (uint8_t)words[i];
        memset(out + width, 0, (size_t)part);
        for (int p = 0; p < 8; p++)
            for (int64_t i = 0; i < part; i++) out[width + i] |= (uint8_t)((words[p * part + i] >> 8) << p);
    } else {
        memcpy(out, digits, (size_t)columns);
    }
}

typedef struct {
    const void *weight;         /* [rows, columns] of `dtype` */
    uint8_t *dense;             /* [rows, row_bytes_out] */
    float *scale;               /* [rows] */
    const float *gaussian_step; /* one */
    int64_t columns, row_bytes_out, dtype, bits, balance, starts, iterations;
    _Atomic int32_t *failed;
} QuantizeArguments;

void bitsfusion_quantize(const QuantizeArguments *a, int64_t start, int64_t stop) {
    const int bits = (int)a->bits, half = half_range(bits);
    const int64_t columns = a->columns;
    const float low = (float)-half, high = (float)(a->balance || bits == 8 ? half : half - 1);
    uint8_t *const scratch = malloc((size_t)(5 * columns + 512));
    if (!scratch) {
        *a->failed = 1;
        return;
    }
    float *row = (float *)scratch;
    uint32_t *words = (uint32_t *)scratch; /* the row is no longer needed once its digits are known */
    uint8_t *digits = scratch + 4 * columns + 256;
    for (int64_t r = start; r < stop; r++) {
        load_row(a->weight, r * columns, columns, (int)a->dtype, row);
        const float scale =
            alternate(row, columns, low, high, *a->gaussian_step, (int)a->starts, (int)a->iterations);
        a->scale[r] = scale;
        if (!isfinite(scale)) continue; /* the caller refuses the weight */
        const float inverse = 1.0f / scale;
        for (int64_t i = 0; i < columns; i++) {
            float k = rintf(row[i] * inverse);
            k = k < low ? low : k > high ? high : k;
            digits[i] = (uint8_t)((int)k + half);
        }
        memset(digits + columns, half, 128);
        pack_row(digits, words, a->dense + r * a->row_bytes_out, columns, bits);
    }
    free(scratch);
}
