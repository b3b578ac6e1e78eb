/* Activations to eight bits, and sums of integer products to outputs; the same in torch: ops/activations.py. */
#include "exponential.h"

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

typedef struct {
    const void *x; /* [rows, columns] of `dtype` */
    int8_t *codes; /* [rows, columns] */
    float *scale;  /* [rows] */
    int64_t columns, dtype;
} TokenArguments;

TAKES(quantize_tokens, TokenArguments)

EXPORT void bitsfusion_quantize_tokens(const TokenArguments *a, int64_t start, int64_t stop) {
    const int64_t columns = a->columns, dtype = a->dtype;
#define DO(DTYPE)                          \
    for (int64_t r = start; r < stop; r++) \
        quantize_token(a->x, r * columns, columns, DTYPE, a->codes + r * columns, a->scale + r);
    FOR_DTYPE(DO)
#undef DO
}

INLINE int32_t ordered(float value) { /* integers in the order of the numbers, NaN beyond the infinities */
    const int32_t bits = (int32_t)bits_of_float(value);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

INLINE float of_ordered(int32_t key) { return float_of_bits((uint32_t)(key ^ ((key >> 31) & 0x7fffffff))); }

typedef struct {
    const void *x; /* [count] of `dtype`, of which a row of the loop is a chunk */
    float *bounds; /* [chunks, 2] */
    int64_t count, chunk, dtype;
} RangeArguments;

TAKES(range, RangeArguments)

/* Of each chunk the smallest and the largest value, and zero. */
EXPORT void bitsfusion_range(const RangeArguments *a, int64_t start, int64_t stop) {
    const int64_t dtype = a->dtype;
    for (int64_t c = start; c < stop; c++) {
        const int64_t first = c * a->chunk, last = min64(first + a->chunk, a->count);
        int32_t low = 0, high = 0;
#define DO(DTYPE)                                          \
    for (int64_t i = first; i < last; i++) {               \
        const int32_t key = ordered(load(a->x, i, DTYPE)); \
        low = key < low ? key : low;                       \
        high = key > high ? key : high;                    \
    }
        FOR_DTYPE(DO)
#undef DO
        a->bounds[2 * c] = of_ordered(low);
        a->bounds[2 * c + 1] = of_ordered(high);
    }
}

typedef struct {
    const void *x;                     /* [count] of `dtype`, of which a row of the loop is a chunk */
    uint8_t *codes;                    /* [count] */
    const float *inverse, *zero_point; /* one each */
    int64_t count, chunk, dtype;
} AffineArguments;

TAKES(quantize_affine, AffineArguments)

EXPORT void bitsfusion_quantize_affine(const AffineArguments *a, int64_t start, int64_t stop) {
    const float factor = *a->inverse, zero = *a->zero_point;
    const int64_t last = min64(stop * a->chunk, a->count), dtype = a->dtype;
    const void *const x = a->x;
    uint8_t *restrict codes = a->codes;
#define DO(DTYPE)                                     \
    for (int64_t i = start * a->chunk; i < last; i++) \
        codes[i] = (uint8_t)clip(rintf(load(x, i, DTYPE) * factor) + zero, 0.0f, 255.0f);
    FOR_DTYPE(DO)
#undef DO
}

typedef struct {
    const int32_t *sums;              /* [rows, columns] */
    const float *token_scale;         /* [rows] */
    const float *weight_scale, *bias; /* [columns] */
    void *out;                        /* [rows, columns], `dtype` fp32 or bf16 */
    int64_t columns, dtype;
} RescaleArguments;

TAKES(rescale, RescaleArguments)
TAKES(rescale_geglu, RescaleArguments)

/* Sums of products of codes to outputs. */
EXPORT void bitsfusion_rescale(const RescaleArguments *a, int64_t start, int64_t stop) {
    const int64_t columns = a->columns;
    const float *restrict weight_scale = a->weight_scale, *restrict bias = a->bias;
    for (int64_t r = start; r < stop; r++) {
        const int32_t *restrict in = a->sums + r * columns;
        const float scale = a->token_scale[r];
        if (a->dtype == FLOAT32) {
            float *restrict y = (float *)a->out + r * columns;
            for (int64_t i = 0; i < columns; i++) y[i] = (float)in[i] * weight_scale[i] * scale + bias[i];
        } else {
            uint16_t *restrict y = (uint16_t *)a->out + r * columns;
            for (int64_t i = 0; i < columns; i++) y[i] = bf16_of((float)in[i] * weight_scale[i] * scale + bias[i]);
        }
    }
}

/* The same, and of the halves of each row, hidden and gate, the product hidden * gelu(gate): sums [rows, 2 columns];
 * weight_scale and bias [2 columns]. */
EXPORT void bitsfusion_rescale_geglu(const RescaleArguments *a, int64_t start, int64_t stop) {
    const int64_t half = a->columns;
    const float *restrict weight_scale = a->weight_scale, *restrict bias = a->bias;
    for (int64_t r = start; r < stop; r++) {
        const int32_t *restrict hidden = a->sums + 2 * r * half, *restrict gate = hidden + half;
        const float scale = a->token_scale[r];
#define GATED(I)                                                   \
    (((float)hidden[I] * weight_scale[I] * scale + bias[I]) *      \
     gelu_of((float)gate[I] * weight_scale[half + I] * scale + bias[half + I]))
        if (a->dtype == FLOAT32) {
            float *restrict y = (float *)a->out + r * half;
            for (int64_t i = 0; i < half; i++) y[i] = GATED(i);
        } else {
            uint16_t *restrict y = (uint16_t *)a->out + r * half;
            for (int64_t i = 0; i < half; i++) y[i] = bf16_of(GATED(i));
        }
#undef GATED
    }
}

typedef struct {
    const void *x; /* [rows, 2 * columns] of `dtype`, the halves of each row being hidden and gate */
    void *out;     /* [rows, columns] so, too */
    int64_t columns, dtype;
} GegluArguments;

TAKES(geglu, GegluArguments)

/* hidden * gelu(gate). */
EXPORT void bitsfusion_geglu(const GegluArguments *a, int64_t start, int64_t stop) {
    const int64_t half = a->columns;
    for (int64_t r = start; r < stop; r++) {
        if (a->dtype == FLOAT32) {
            const float *restrict hidden = (const float *)a->x + 2 * r * half, *restrict gate = hidden + half;
            float *restrict y = (float *)a->out + r * half;
            for (int64_t i = 0; i < half; i++) y[i] = hidden[i] * gelu_of(gate[i]);
        } else {
            const uint16_t *restrict hidden = (const uint16_t *)a->x + 2 * r * half, *restrict gate = hidden + half;
            uint16_t *restrict y = (uint16_t *)a->out + r * half;
            for (int64_t i = 0; i < half; i++)
                y[i] = bf16_of(load(hidden, i, BFLOAT16) * gelu_of(load(gate, i, BFLOAT16)));
        }
    }
}
