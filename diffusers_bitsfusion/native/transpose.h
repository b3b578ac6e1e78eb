/* Tiles of 16 by 16 words of four bytes, or of bytes, turned. */
#ifndef BITSFUSION_TRANSPOSE_H
#define BITSFUSION_TRANSPOSE_H

#include "common.h"

#ifdef __AVX512F__
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

enum { TILE = 16 };

/* to[w][r] = word w of row r, of rows `stride` bytes apart. */
INLINE void transpose(const char *from, int64_t stride, uint32_t (*to)[TILE]) {
#ifdef __AVX512F__
    __m512i rows[TILE], pairs[TILE];
    for (int r = 0; r < TILE; r++) rows[r] = _mm512_loadu_si512(from + r * stride);
    for (int r = 0; r < TILE; r += 2) {
        pairs[r] = _mm512_unpacklo_epi32(rows[r], rows[r + 1]);
        pairs[r + 1] = _mm512_unpackhi_epi32(rows[r], rows[r + 1]);
    }
    for (int r = 0; r < TILE; r += 4)
        for (int h = 0; h < 2; h++) { /* rows[r + 2h + i]: words 2h + i of each quarter, of four rows */
            rows[r + 2 * h] = _mm512_unpacklo_epi64(pairs[r + h], pairs[r + 2 + h]);
            rows[r + 2 * h + 1] = _mm512_unpackhi_epi64(pairs[r + h], pairs[r + 2 + h]);
        }
    for (int w = 0; w < 4; w++) {
        const __m512i low = _mm512_shuffle_i32x4(rows[w], rows[4 + w], 0x44);
        const __m512i high = _mm512_shuffle_i32x4(rows[w], rows[4 + w], 0xee);
        const __m512i next_low = _mm512_shuffle_i32x4(rows[8 + w], rows[12 + w], 0x44);
        const __m512i next_high = _mm512_shuffle_i32x4(rows[8 + w], rows[12 + w], 0xee);
        _mm512_storeu_si512(to[w], _mm512_shuffle_i32x4(low, next_low, 0x88));
        _mm512_storeu_si512(to[4 + w], _mm512_shuffle_i32x4(low, next_low, 0xdd));
        _mm512_storeu_si512(to[8 + w], _mm512_shuffle_i32x4(high, next_high, 0x88));
        _mm512_storeu_si512(to[12 + w], _mm512_shuffle_i32x4(high, next_high, 0xdd));
    }
#else
    for (int w = 0; w < TILE; w++)
        for (int r = 0; r < TILE; r++) memcpy(to[w] + r, from + r * stride + w * 4, 4);
#endif
}

/* to[b][r] = byte b of row r, of rows `stride` bytes apart. Of a tile that has fewer rows or bytes, what is missing is
 * zero. */
INLINE void transpose_bytes(const int8_t *from, int64_t stride, int64_t rows, int64_t bytes, int8_t (*to)[TILE]) {
    int8_t whole[TILE][TILE];
    if (rows < TILE || bytes < TILE) {
        memset(whole, 0, sizeof whole);
        for (int64_t r = 0; r < rows; r++) memcpy(whole[r], from + r * stride, (size_t)bytes);
        from = whole[0];
        stride = TILE;
    }
#ifdef __SSE2__
    __m128i tile[TILE], mixed[TILE];
    for (int r = 0; r < TILE; r++) tile[r] = _mm_loadu_si128((const __m128i *)(from + r * stride));
    for (int round = 0; round < 4; round++) { /* each doubles the rows that a vector has bytes of */
        for (int r = 0; r < TILE / 2; r++) {
            mixed[2 * r] = _mm_unpacklo_epi8(tile[r], tile[r + TILE / 2]);
            mixed[2 * r + 1] = _mm_unpackhi_epi8(tile[r], tile[r + TILE / 2]);
        }
        memcpy(tile, mixed, sizeof tile);
    }
    for (int b = 0; b < TILE; b++) _mm_storeu_si128((__m128i *)to[b], tile[b]);
#else
    for (int b = 0; b < TILE; b++)
        for (int r = 0; r < TILE; r++) to[b][r] = from[r * stride + b];
#endif
}

/* Four rows of bytes, `stride` rows apart, side by side: byte i of to[b] is byte b of row i. */
INLINE void interleave_bytes(const int8_t (*rows)[TILE], int64_t stride, uint32_t to[TILE]) {
#ifdef __SSE2__
    __m128i row[4];
    for (int i = 0; i < 4; i++) row[i] = _mm_loadu_si128((const __m128i *)rows[i * stride]);
    const __m128i low = _mm_unpacklo_epi8(row[0], row[1]), next_low = _mm_unpacklo_epi8(row[2], row[3]);
    const __m128i high = _mm_unpackhi_epi8(row[0], row[1]), next_high = _mm_unpackhi_epi8(row[2], row[3]);
    __m128i *const out = (__m128i *)to;
    _mm_storeu_si128(out, _mm_unpacklo_epi16(low, next_low));
    _mm_storeu_si128(out + 1, _mm_unpackhi_epi16(low, next_low));
    _mm_storeu_si128(out + 2, _mm_unpacklo_epi16(high, next_high));
    _mm_storeu_si128(out + 3, _mm_unpackhi_epi16(high, next_high));
#else
    for (int b = 0; b < TILE; b++)
        for (int i = 0; i < 4; i++) memcpy((int8_t *)(to + b) + i, rows[i * stride] + b, 1);
#endif
}

#endif
