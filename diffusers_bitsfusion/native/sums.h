/* The sum of a row's codes, which a zero point is multiplied by. */
#ifndef BITSFUSION_SUMS_H
#define BITSFUSION_SUMS_H

#include "common.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

/* Bytes are summed 128 too high, as the instruction for differences of unsigned bytes does it; the largest sum of a row
 * of 2^24 codes fits 32 bits. */
INLINE int32_t sum_codes(const int8_t *codes, int64_t count) {
    int32_t sum = 0;
    int64_t c = 0;
#ifdef __SSE2__
    const __m128i high = _mm_set1_epi8((char)0x80);
    __m128i sums = _mm_setzero_si128();
    for (; c + 16 <= count; c += 16) {
        const __m128i part = _mm_xor_si128(_mm_loadu_si128((const __m128i *)(codes + c)), high);
        sums = _mm_add_epi64(sums, _mm_sad_epu8(part, _mm_setzero_si128()));
    }
    int64_t halves[2];
    _mm_storeu_si128((__m128i *)halves, sums);
    sum = (int32_t)(halves[0] + halves[1] - 128 * c);
#endif
    for (; c < count; c++) sum += codes[c];
    return sum;
}

#endif
