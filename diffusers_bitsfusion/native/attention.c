/* Attention by bf16 dot products, a block of keys at a time (arXiv 2205.14135); the same in torch: ops/attention.py.
 *
 * Scores and sums are fp32; queries, keys, values and the unnormalised probabilities are rounded to bf16. Only for
 * processors with AVX-512 BF16, whose dot products no vectoriser finds: elsewhere nothing is compiled but the answer. */
#include "common.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512BF16__)
#include "transpose.h"

enum {
    LANES = 16,
    ROWS = 6,    /* queries, and */
    GROUP = 4,   /* vectors of outputs, whose sums stay in registers together */
    KEYS = 256,  /* a block */
    QUERIES = 504, /* a unit of work */
    WIDEST = 256   /* head */
};

/* What a unit works on. Of the two packed blocks, [i][j] holds entries 2i and 2i + 1 of the summed axis, bf16 each, for
 * place j of the other one: what a dot product takes. */
static _Thread_local struct {
    _Alignas(64) uint16_t queries[QUERIES * WIDEST];
    _Alignas(64) uint32_t keys[WIDEST / 2 * KEYS];
    _Alignas(64) uint32_t values[KEYS / 2 * WIDEST];
    _Alignas(64) float scores[ROWS * KEYS];
    _Alignas(64) uint16_t shares[ROWS * KEYS];
    _Alignas(64) float sums[QUERIES * WIDEST];
    _Alignas(64) float totals[QUERIES * LANES];
    float largest[QUERIES];
} work;

/* c [ROWS][.., 16 * vectors + 8 * half] (+)= a [ROWS][2 * pairs] b, where b [pairs][..] is packed. */
INLINE void multiply_group(const uint16_t *a, int64_t a_stride, const uint32_t *b, int64_t b_stride, float *c,
                           int64_t c_stride, int64_t pairs, int add, const int vectors, const int half) {
    __m512 sum[ROWS][GROUP];
    __m256 last[ROWS];
    for (int r = 0; r < ROWS; r++) {
        float *out = c + r * c_stride;
        for (int v = 0; v < vectors; v++) sum[r][v] = add ? _mm512_load_ps(out + v * LANES) : _mm512_setzero_ps();
        if (half) last[r] = add ? _mm256_load_ps(out + vectors * LANES) : _mm256_setzero_ps();
    }
    for (int64_t p = 0; p < pairs; p++) {
        __m512i right[GROUP];
        __m256i right_last;
        for (int v = 0; v < vectors; v++) right[v] = _mm512_load_si512(b + p * b_stride + v * LANES);
        if (half) right_last = _mm256_load_si256((const __m256i *)(b + p * b_stride + vectors * LANES));
        for (int r = 0; r < ROWS; r++) {
            int32_t pair;
            memcpy(&pair, a + r * a_stride + 2 * p, sizeof pair);
            const __m512i left = _mm512_set1_epi32(pair);
            for (int v = 0; v < vectors; v++)
                sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)left, (__m512bh)right[v]);
            if (half)
                last[r] = _mm256_dpbf16_ps(last[r], (__m256bh)_mm512_castsi512_si256(left), (__m256bh)right_last);
        }
    }
    for (int r = 0; r < ROWS; r++) {
        float *out = c + r * c_stride;
        for (int v = 0; v < vectors; v++) _mm512_store_ps(out + v * LANES, sum[r][v]);
        if (half) _mm256_store_ps(out + vectors * LANES, last[r]);
    }
}

/* `half`: whether eight columns follow those of the vectors. */
static void multiply(const uint16_t *a, int64_t a_stride, const uint32_t *b, int64_t b_stride, float *c,
                     int64_t c_stride, int64_t pairs, int64_t vectors, int half, int add) {
    for (int64_t v = 0; v < vectors + half; v += GROUP) {
        const uint32_t *right = b + v * LANES;
        float *out = c + v * LANES;
#define DO(VECTORS, HALF) multiply_group(a, a_stride, right, b_stride, out, c_stride, pairs, add, VECTORS, HALF)
        switch (2 * min64(vectors - v, GROUP) + (half && vectors - v < GROUP)) {
            case 8: DO(4, 0); break;
            case 7: DO(3, 1); break;
            case 6: DO(3, 0); break;
            case 5: DO(2, 1); break;
            case 4: DO(2, 0); break;
            case 3: DO(1, 1); break;
            case 2: DO(1, 0); break;
            default: DO(0, 1);
        }
#undef DO
    }
}

/* 2^x for x <= 0, to 4e-5 of its size; NaN stays NaN. */
INLINE __m512 exp2_of(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x); /* the second where one is NaN */
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 part = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(9.618129e-3f);
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(5.550411e-2f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(2.402265e-1f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(6.931472e-1f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

/* Scores of a row to shares 2^(factor (score - largest so far)), their total, and what was summed before rescaled. */
INLINE void soften(const float *scores, uint16_t *shares, int64_t keys, float factor, float *largest, float *total,
                   float *sums, int64_t columns) {
    __m512 most = _mm512_set1_ps(*largest);
    for (int64_t k = 0; k < keys; k += LANES) most = _mm512_max_ps(most, _mm512_load_ps(scores + k));
    const float now = _mm512_reduce_max_ps(most), before = *largest;
    const __m512 scale = _mm512_set1_ps(factor), shift = _mm512_set1_ps(factor * now);
    __m512 sum = _mm512_load_ps(total);
    if (now > before) {
        const __m512 shrink = exp2_of(_mm512_set1_ps(factor * (before - now)));
        sum = _mm512_mul_ps(sum, shrink);
        for (int64_t c = 0; c < columns; c += LANES)
            _mm512_store_ps(sums + c, _mm512_mul_ps(_mm512_load_ps(sums + c), shrink));
        *largest = now;
    }
    for (int64_t k = 0; k < keys; k += 2 * LANES) {
        const __m512 low = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(scores + k), scale, shift));
        const __m512 high = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(scores + k + LANES), scale, shift));
        sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
        _mm512_store_si512(shares + k, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    _mm512_store_ps(total, sum);
}

/* The first `count` of 32 entries. */
INLINE __mmask32 mask_of(int64_t count) {
    return count >= 32 ? 0xffffffffu : count <= 0 ? 0 : (1u << count) - 1;
}

/* `width` entries of x as bf16, and zeros after them up to `wide`. */
INLINE void load_row(const void *x, int64_t first, int64_t width, int64_t wide, int dtype, uint16_t *restrict row) {
    if (dtype == BFLOAT16)
        for (int64_t i = 0; i < wide; i += 2 * LANES) {
            const __mmask32 here = mask_of(width - i);
            _mm512_mask_storeu_epi16(row + i, mask_of(wide - i),
                                     _mm512_maskz_loadu_epi16(here, (const uint16_t *)x + first + i));
        }
    else {
        for (int64_t i = 0; i < width; i++) row[i] = bf16_of(((const float *)x)[first + i]);
        for (int64_t i = width; i < wide; i++) row[i] = 0;
    }
}

/* A block of `count` keys, zeros after them, packed for products that sum over the width ... */
INLINE void pack_keys(const void *x, int64_t first, int64_t stride, int64_t count, int64_t width, int64_t places,
                      int dtype) {
    const int64_t pairs = (width + 1) / 2, wide = ceil_div(pairs, LANES) * LANES * 2;
    _Alignas(64) uint16_t tile[LANES][WIDEST];
    for (int64_t start = 0; start < places; start += LANES) {
        for (int64_t k = 0; k < LANES; k++) {
            const int64_t filled = start + k < count ? width : 0;
            load_row(x, first + (start + k) * stride, filled, wide, dtype, tile[k]);
        }
        for (int64_t p = 0; p < pairs; p += LANES) {
            uint32_t turned[LANES][LANES];
            transpose((const char *)(tile[0] + 2 * p), sizeof tile[0], turned);
            for (int64_t i = 0; i < min64(LANES, pairs - p); i++)
                memcpy(work.keys + (p + i) * places + start, turned[i], sizeof turned[i]);
        }
    }
}

/* ... and of values, for products that sum over them. */
INLINE void pack_values(const void *x, int64_t first, int64_t stride, int64_t count, int64_t width, int64_t places,
                        int64_t columns, int dtype) {
    uint16_t even[WIDEST], odd[WIDEST];
    for (int64_t k = 0; k < places; k += 2) {
        load_row(x, first + k * stride, k < count ? width : 0, columns, dtype, even);
        load_row(x, first + (k + 1) * stride, k + 1 < count ? width : 0, columns, dtype, odd);
        for (int64_t i = 0; i < columns; i++)
            work.values[k / 2 * columns + i] = (uint32_t)even[i] | (uint32_t)odd[i] << 16;
    }
}

typedef struct { int64_t batch, head, token; } strides; /* in elements; those of a head's entries are 1 */

typedef struct {
    const void *q, *k, *v; /* `dtype` (fp32 or bf16) [batch, heads, tokens, width], width <= 256 */
    void *out;             /* so, too */
    strides q_strides, k_strides, v_strides, out_strides;
    int64_t heads, queries, keys, width, dtype;
} AttentionArguments;

TAKES(attention, AttentionArguments)

INLINE void attend(const AttentionArguments *a, int64_t batch, int64_t head, int64_t first_query, int64_t queries,
                   float factor, int dtype) { /* dtype: a constant where this is inlined */
    const strides qs = a->q_strides, ks = a->k_strides, vs = a->v_strides, os = a->out_strides;
    const int64_t keys = a->keys, width = a->width;
    const int64_t even = width + width % 2, columns = ceil_div(width, LANES) * LANES;
    const int64_t rows = ceil_div(queries, ROWS) * ROWS;
    const int half = width % LANES && width % LANES <= LANES / 2; /* of whose last vector half is enough */
    const int64_t q0 = batch * qs.batch + head * qs.head + first_query * qs.token;
    const int64_t k0 = batch * ks.batch + head * ks.head, v0 = batch * vs.batch + head * vs.head;
    for (int64_t r = 0; r < rows; r++)
        load_row(a->q, q0 + r * qs.token, r < queries ? width : 0, even, dtype, work.queries + r * even);
    memset(work.sums, 0, sizeof(float) * rows * columns);
    memset(work.totals, 0, sizeof(float) * rows * LANES);
    for (int64_t r = 0; r < rows; r++) work.largest[r] = -INFINITY;

    for (int64_t first = 0; first < keys; first += KEYS) {
        const int64_t count = min64(keys - first, KEYS), places = ceil_div(count, 2 * LANES) * 2 * LANES;
        pack_keys(a->k, k0 + first * ks.token, ks.token, count, width, places, dtype);
        pack_values(a->v, v0 + first * vs.token, vs.token, count, width, places, columns, dtype);
        for (int64_t r = 0; r < rows; r += ROWS) {
            multiply(work.queries + r * even, even, work.keys, places, work.scores, KEYS, even / 2, places / LANES, 0, 0);
            for (int64_t i = 0; i < ROWS; i++) {
                float *scores = work.scores + i * KEYS;
                for (int64_t place = count; place < places; place++) scores[place] = -INFINITY;
                soften(scores, work.shares + i * KEYS, places, factor, work.largest + r + i,
                       work.totals + (r + i) * LANES, work.sums + (r + i) * columns, columns);
            }
            multiply(work.shares, KEYS, work.values, columns, work.sums + r * columns, columns, places / 2,
                     (width + 7) / LANES, half, 1);
        }
    }
    const int64_t o0 = batch * os.batch + head * os.head + first_query * os.token;
    for (int64_t r = 0; r < queries; r++) {
        const float share = 1.0f / _mm512_reduce_add_ps(_mm512_load_ps(work.totals + r * LANES));
        for (int64_t i = 0; i < width; i++) {
            const float y = work.sums[r * columns + i] * share;
            if (dtype == BFLOAT16) ((uint16_t *)a->out)[o0 + r * os.token + i] = bf16_of(y);
            else ((float *)a->out)[o0 + r * os.token + i] = y;
        }
    }
}

EXPORT int bitsfusion_attention_queries(void) { return QUERIES; }

/* Softmax(q k^T / sqrt(width)) v. A row of this loop is a unit of QUERIES queries; they are numbered heads first. */
EXPORT void bitsfusion_attention(const AttentionArguments *a, int64_t start, int64_t stop) {
    const int64_t chunks = ceil_div(a->queries, QUERIES);
    const float factor = 1.44269504f / sqrtf((float)a->width); /* log2(e) */
    for (int64_t unit = start; unit < stop; unit++) {
        const int64_t first = unit % chunks * QUERIES;
        const int64_t head = unit / chunks % a->heads, batch = unit / chunks / a->heads;
        const int64_t count = min64(a->queries - first, QUERIES);
        if (a->dtype == BFLOAT16) attend(a, batch, head, first, count, factor, BFLOAT16);
        else attend(a, batch, head, first, count, factor, FLOAT32);
    }
}

#else

EXPORT int bitsfusion_attention_queries(void) { return 0; }
EXPORT void bitsfusion_attention(void) {}
EXPORT int64_t bitsfusion_attention_size(void) { return 0; }

#endif
