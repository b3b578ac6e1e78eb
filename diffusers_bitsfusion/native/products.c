/* Products of eight-bit tokens and codes, summed in 32 bits, for processors with AVX2 but without VNNI.
 *
 * Their one instruction for bytes adds two products in 16 bits. Codes of few bits leave room there for many more, so
 * that sums are widened once in a while only: the fewer bits, the fewer instructions. */
#include "dense.h"

#ifdef __AVX2__
#include <immintrin.h>
#include <stdlib.h>

enum { WIDE = 32, PANEL = 1 << 14 }; /* bytes of a vector; of tokens that are multiplied by one row after another */

/* A tile is the sums of four tokens times two rows. */
enum { TOKENS = 4, ROWS = 2 };

INLINE __m256i load_256(const void *at) { return _mm256_loadu_si256((const __m256i *)at); }

/* Pairs of 16-bit sums to 32 bits. */
INLINE __m256i widened(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }

/* The four sums of two tokens, each times two rows. */
INLINE __m128i totals(const __m256i first[ROWS], const __m256i second[ROWS]) {
    const __m256i pairs =
        _mm256_hadd_epi32(_mm256_hadd_epi32(first[0], first[1]), _mm256_hadd_epi32(second[0], second[1]));
    return _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
}

/* Tokens, which are stored 128 too high, times the rows at `row` and `next`, without the columns past the last whole
 * vector: to[t] has both sums of token t. `run`: vectors of products that fit 16 bits. */
INLINE void tile(const uint8_t *tokens, const int8_t *row, const int8_t *next, int64_t columns, int64_t run,
                 int32_t to[TOKENS][ROWS]) {
    const int64_t whole = columns / WIDE * WIDE;
    __m256i sums[TOKENS][ROWS];
    for (int t = 0; t < TOKENS; t++) sums[t][0] = sums[t][1] = _mm256_setzero_si256();
    for (int64_t start = 0; start < whole; start += run * WIDE) {
        const int64_t stop = min64(start + run * WIDE, whole);
        __m256i part[TOKENS][ROWS];
        for (int t = 0; t < TOKENS; t++) part[t][0] = part[t][1] = _mm256_setzero_si256();
        for (int64_t k = start; k < stop; k += WIDE)
            for (int t = 0; t < TOKENS; t++) {
                const __m256i token = load_256(tokens + t * columns + k);
                part[t][0] = _mm256_add_epi16(part[t][0], _mm256_maddubs_epi16(token, load_256(row + k)));
                part[t][1] = _mm256_add_epi16(part[t][1], _mm256_maddubs_epi16(token, load_256(next + k)));
            }
        for (int t = 0; t < TOKENS; t++)
            for (int r = 0; r < ROWS; r++) sums[t][r] = _mm256_add_epi32(sums[t][r], widened(part[t][r]));
    }
    for (int t = 0; t < TOKENS; t += 2) _mm_storeu_si128((__m128i *)to[t], totals(sums[t], sums[t + 1]));
}

/* Sums of `count` tokens of the panel times one or two rows, whose own sums are in `shifts`. */
INLINE void multiply_rows(const uint8_t *panel, const int8_t *weight, const int32_t *shifts, int32_t *sums,
                          int64_t count, int64_t columns, int64_t run, int64_t stride, const int rows) {
    for (int64_t first = 0; first < count; first += TOKENS) {
        const uint8_t *tokens = panel + first * columns;
        int32_t found[TOKENS][ROWS];
        tile(tokens, weight, weight + (rows - 1) * columns, columns, run, found);
        for (int64_t t = 0; t < min64(TOKENS, count - first); t++)
            for (int r = 0; r < rows; r++) {
                int32_t sum = found[t][r] - 128 * shifts[r];
                for (int64_t k = columns / WIDE * WIDE; k < columns; k++)
                    sum += tokens[t * columns + k] * weight[r * columns + k];
                sums[(first + t) * stride + r] = sum;
            }
    }
}

EXPORT int bitsfusion_multiplies(void) { return 1; }

typedef struct {
    const int8_t *tokens; /* [rows, columns] */
    const int8_t *weight; /* [out, columns], codes of `bits` (1 to 7) */
    int32_t *sums;        /* [rows, out] */
    int64_t columns, out, bits;
    _Atomic int32_t failed;
} ProductArguments;

TAKES(multiply, ProductArguments)

EXPORT void bitsfusion_multiply(ProductArguments *a, int64_t start, int64_t stop) {
    const int64_t columns = a->columns, out = a->out;
    /* 64 vectors of 1-bit codes, one of 7-bit codes. */
    const int64_t run = INT16_MAX / (2 * 255 * half_range((int)a->bits));
    const int64_t most = max64(TOKENS, PANEL / columns / TOKENS * TOKENS);
    int32_t *const shifts = malloc(sizeof(int32_t) * (size_t)out + (size_t)(most * columns));
    if (!shifts) {
        a->failed = 1;
        return;
    }
    uint8_t *const panel = (uint8_t *)(shifts + out); /* a tile that is not full has any tokens for the rest */
    for (int64_t r = 0; r < out; r++) {
        shifts[r] = 0;
        for (int64_t k = 0; k < columns; k++) shifts[r] += a->weight[r * columns + k];
    }
    for (int64_t first = start; first < stop; first += most) {
        const int64_t count = min64(most, stop - first);
        for (int64_t i = 0; i < count * columns; i++) panel[i] = (uint8_t)(a->tokens[first * columns + i] ^ 0x80);
        for (int64_t r = 0; r < out; r += ROWS) {
            const int8_t *two = a->weight + r * columns;
            int32_t *to = a->sums + first * out + r;
            if (r + 1 < out) multiply_rows(panel, two, shifts + r, to, count, columns, run, out, 2);
            else multiply_rows(panel, two, shifts + r, to, count, columns, run, out, 1);
        }
    }
    free(shifts);
}

#else

EXPORT int bitsfusion_multiplies(void) { return 0; }
EXPORT void bitsfusion_multiply(void) {}
EXPORT int64_t bitsfusion_multiply_size(void) { return 0; }

#endif
