/* Weights to the dense form (codec/radix.py), one output channel after another. */
#include "pack.h"

#include <float.h>
#include <stdlib.h>

enum { MOST_STARTS = 9, ORDINARY_EXPONENT = 40 };

static void load_row(const void *weight, int64_t first, int64_t columns, int dtype, float *restrict row) {
    if (dtype == FLOAT32)
        for (int64_t i = 0; i < columns; i++) row[i] = load(weight, first + i, FLOAT32);
    else if (dtype == BFLOAT16)
        for (int64_t i = 0; i < columns; i++) row[i] = load(weight, first + i, BFLOAT16);
    else
        for (int64_t i = 0; i < columns; i++) row[i] = load(weight, first + i, FLOAT16);
}

/* <w, k> and <k, k> with k = clip(round(w / scale), low, high). Sums are fp64, so that their order is not seen. */
static void fit(const float *restrict row, int64_t columns, float scale, float low, float high, double *dot,
                double *norm) {
    const float inverse = 1.0f / scale;
    double d = 0.0, n = 0.0;
    for (int64_t i = 0; i < columns; i++) {
        float k = rintf(row[i] * inverse);
        k = k < low ? low : k > high ? high : k;
        d += (double)(row[i] * k);
        n += (double)(k * k);
    }
    *dot = d;
    *norm = n;
}

static float one_where_zero(float scale) { return scale == 0.0f ? 1.0f : scale; }

/* Geometric steps from `first` to `last`, `count` of them, a power of two and one. */
static void fill_steps(float *steps, int count, float first, float last) {
    steps[0] = first;
    steps[count - 1] = last;
    for (int width = count - 1; width > 1; width /= 2)
        for (int s = width / 2; s < count; s += width)
            steps[s] = sqrtf(steps[s - width / 2] * steps[s + width / 2]);
}

/* The alternation of codec/scales.py, which explains its starts. */
static float alternate(const float *restrict row, int64_t columns, float largest, float low, float high,
                       double gaussian_step, int starts, int iterations) {
    double squares = 0.0, dot, norm;
    for (int64_t i = 0; i < columns; i++) squares += (double)row[i] * (double)row[i];
    const float gaussian = (float)(sqrt(squares / (double)columns) * gaussian_step), uniform = largest / (-low + 0.5f);
    if (!isfinite(gaussian)) return NAN;
    float steps[MOST_STARTS], scale = one_where_zero(gaussian);
    fill_steps(steps, starts, gaussian, uniform);
    double best = INFINITY;
    for (int s = 0; s < starts; s++) {
        const float start = one_where_zero(steps[s]);
        fit(row, columns, start, low, high, &dot, &norm);
        const double error = start * (start * norm - 2.0 * dot);
        if (error < best) {
            best = error;
            scale = start;
        }
    }
    for (int i = 0; i < iterations; i++) {
        fit(row, columns, scale, low, high, &dot, &norm);
        if (norm > 0.0) scale = (float)(dot / norm);
    }
    return scale;
}

static float largest_of(const float *row, int64_t columns) {
    float largest = 0.0f;
    for (int64_t i = 0; i < columns; i++) {
        const float magnitude = fabsf(row[i]);
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

/* The power of two that brings a row to the size of one; zero for ordinary sizes, whose squares fp32 holds. */
static int exponent_of(float largest) {
    int exponent = 0;
    if (largest > 0.0f && isfinite(largest)) frexpf(largest, &exponent);
    return abs(exponent) > ORDINARY_EXPONENT ? exponent : 0;
}

static float bounded(float scale, float half) {
    return scale < FLT_MIN ? FLT_MIN : scale > FLT_MAX / half ? FLT_MAX / half : scale; /* NaN stays */
}

typedef struct {
    const void *weight; /* [rows, columns] of `dtype` */
    uint8_t *dense;     /* [rows, row_bytes_out] */
    float *scale;       /* [rows] */
    int64_t columns, row_bytes_out, dtype, bits, balance, starts, iterations;
    double gaussian_step;
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
        const float largest = largest_of(row, columns);
        const int exponent = exponent_of(largest);
        if (exponent)
            for (int64_t i = 0; i < columns; i++) row[i] = ldexpf(row[i], -exponent);
        const float found = alternate(row, columns, ldexpf(largest, -exponent), low, high, a->gaussian_step,
                                      (int)a->starts, (int)a->iterations);
        const float scale = bounded(ldexpf(found, exponent), (float)half);
        a->scale[r] = scale;
        if (!isfinite(scale)) continue; /* the caller refuses the weight */
        const float inverse = 1.0f / ldexpf(scale, -exponent);
        for (int64_t i = 0; i < columns; i++) {
            float k = rintf(row[i] * inverse);
            k = k < low ? low : k > high ? high : k;
            digits[i] = (uint8_t)((int)k + half);
        }
        pack_row(digits, words, a->dense + r * a->row_bytes_out, columns, bits);
    }
    free(scratch);
}
