/* Rows of 1, 2 and 3 bits by AVX2; included by decode.c, whose other loops these stand in for. Digits stay in registers
 * from word to weight. A row's last vector overlaps the one before it, so that none but short rows is cut. */
#ifndef BITSFUSION_DIVIDE_H
#define BITSFUSION_DIVIDE_H

#include <string.h>

enum { WIDE = 32 }; /* bytes of a vector */

/* Words of up to 16 bits, at even and at odd places. */
typedef struct { __m256i even, odd; } Words;

/* The lower bytes of words, in turn. */
INLINE __m256i lower_bytes(Words words) {
    return _mm256_or_si256(_mm256_and_si256(words.even, _mm256_set1_epi16(255)), _mm256_slli_epi16(words.odd, 8));
}

/* The lowest digits, a byte each; words become their quotients. Of word - quotient * base the lower byte is enough. */
INLINE __m256i take_digits(Words *words, unsigned base) {
    const __m256i low = lower_bytes(*words), multiplier = _mm256_set1_epi16((short)multiplier_of(base));
    const int divided = shift_of(base), multiplied = base == 3 ? 1 : base == 5 ? 2 : 3; /* 2^multiplied + 1 is base */
    words->even = _mm256_srli_epi16(_mm256_mulhi_epu16(words->even, multiplier), divided);
    words->odd = _mm256_srli_epi16(_mm256_mulhi_epu16(words->odd, multiplier), divided);
    const __m256i quotient = lower_bytes(*words), inside = _mm256_set1_epi8((char)(255 << multiplied));
    const __m256i shifted = _mm256_and_si256(_mm256_slli_epi16(quotient, multiplied), inside);
    return _mm256_sub_epi8(_mm256_sub_epi8(low, quotient), shifted);
}

/* What a row's digits become: the bytes of its levels in bf16, and where it goes. */
typedef struct {
    uint8_t *out;
    int64_t columns;
    __m256 scale;
    __m256i low_levels, high_levels;
} Target;

INLINE Target target_of(const Row *row) {
    uint8_t low[16], high[16];
    for (int k = 0; k < 16; k++) low[k] = (uint8_t)row->levels[k], high[k] = (uint8_t)(row->levels[k] >> 8);
    return (Target){row->out, row->columns, _mm256_set1_ps(row->scale),
                    _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)low)),
                    _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)high))};
}

INLINE void put_codes(float *out, __m128i codes, __m256 scale) {
    _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)), scale));
}

/* What 32 digits are in the output's dtype. */
INLINE void put_vector(const Target *to, void *out, __m256i digits, int kind, unsigned base) {
    const __m256i codes = _mm256_sub_epi8(digits, _mm256_set1_epi8((char)(base / 2)));
    if (kind == INT8) {
        _mm256_storeu_si256(out, codes);
    } else if (kind == BFLOAT16) {
        const __m256i low = _mm256_shuffle_epi8(to->low_levels, digits);
        const __m256i high = _mm256_shuffle_epi8(to->high_levels, digits);
        const __m256i even = _mm256_unpacklo_epi8(low, high), odd = _mm256_unpackhi_epi8(low, high); /* eights */
        _mm256_storeu_si256(out, _mm256_permute2x128_si256(even, odd, 0x20));
        _mm256_storeu_si256((__m256i *)out + 1, _mm256_permute2x128_si256(even, odd, 0x31));
    } else {
        const __m128i first = _mm256_castsi256_si128(codes), second = _mm256_extracti128_si256(codes, 1);
        put_codes((float *)out, first, to->scale);
        put_codes((float *)out + 8, _mm_srli_si128(first, 8), to->scale);
        put_codes((float *)out + 16, second, to->scale);
        put_codes((float *)out + 24, _mm_srli_si128(second, 8), to->scale);
    }
}

/* All digits of up to 32 words, which begin at word `first` of the row's `width`; columns past the row are left out. */
INLINE void put_words(const Target *to, Words words, int64_t first, int64_t count, int64_t width, int kind,
                      unsigned base, int planes) {
    const int64_t size = kind == FLOAT32 ? 4 : kind == BFLOAT16 ? 2 : 1;
    const int whole = count == WIDE && (planes - 1) * width + first + WIDE <= to->columns;
#pragma GCC unroll 5
    for (int j = 0; j < planes; j++) {
        const __m256i digits = j < planes - 1 ? take_digits(&words, base) : lower_bytes(words);
        const int64_t start = j * width + first;
        if (whole) {
            put_vector(to, to->out + start * size, digits, kind, base);
        } else {
            const int64_t inside = min64(count, to->columns - start);
            uint8_t vector[4 * WIDE];
            put_vector(to, vector, digits, kind, base);
            if (inside > 0) memcpy(to->out + start * size, vector, (size_t)(inside * size));
        }
    }
}

/* `at` is where each vector of `COUNT` bytes begins, and `count` how many of them it has. */
#define FOR_VECTORS(COUNT)                                                                                        \
    for (int64_t next = 0, at, count; at = min64(next, max64((COUNT) - WIDE, 0)), count = min64(WIDE, (COUNT) - at), \
                 next < (COUNT); next += WIDE)

/* The first of `readable` bytes, at most 32. */
INLINE __m256i load_bytes(const uint8_t *in, int64_t readable) {
    if (readable >= WIDE) return _mm256_loadu_si256((const __m256i *)in);
    uint8_t bytes[WIDE] = {0};
    memcpy(bytes, in, (size_t)readable);
    return _mm256_loadu_si256((const __m256i *)bytes);
}

INLINE Words words_of(__m256i bytes) {
    return (Words){_mm256_and_si256(bytes, _mm256_set1_epi16(255)), _mm256_srli_epi16(bytes, 8)};
}

INLINE void row_1bit(const Row *row, const uint8_t *in, int kind) {
    const int64_t width = words_of_row(row->columns, 1);
    const Target to = target_of(row);
    FOR_VECTORS(width) {
        const Words words = words_of(load_bytes(in + at, width - at));
        put_words(&to, words, at, count, width, kind, base_of(1), digits_of(1));
    }
}

INLINE void row_2bit(const Row *row, const uint8_t *in, int kind) {
    const int64_t width = words_of_row(row->columns, 2), part = ceil_div(width, 8), plain = min64(width, 7 * part);
    const Target to = target_of(row);
    const __m256i top = _mm256_set1_epi8((char)128);
    FOR_VECTORS(plain) {
        const __m256i words = _mm256_andnot_si256(top, load_bytes(in + at, plain - at));
        put_words(&to, words_of(words), at, count, width, kind, base_of(2), digits_of(2));
    }
    FOR_VECTORS(width - plain) {
        __m256i words = _mm256_setzero_si256();
        for (int b = 0; b < 7; b++) {
            const __m256i tops = _mm256_and_si256(top, load_bytes(in + b * part + at, part - at));
            words = _mm256_or_si256(words, _mm256_srli_epi16(tops, 7 - b));
        }
        put_words(&to, words_of(words), plain + at, count, width, kind, base_of(2), digits_of(2));
    }
}

INLINE void row_3bit(const Row *row, const uint8_t *in, int kind) {
    const int64_t width = words_of_row(row->columns, 3);
    const Target to = target_of(row);
    const __m256i byte = _mm256_set1_epi16(255);
    FOR_VECTORS(width) {
        const __m256i low = load_bytes(in + at, width - at), high = load_bytes(in + width + at, width - at);
        const Words words = {_mm256_or_si256(_mm256_and_si256(byte, low), _mm256_slli_epi16(high, 8)),
                             _mm256_or_si256(_mm256_srli_epi16(low, 8), _mm256_andnot_si256(byte, high))};
        put_words(&to, words, at, count, width, kind, base_of(3), digits_of(3));
    }
}

#endif
