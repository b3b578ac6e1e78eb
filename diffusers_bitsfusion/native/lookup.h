/* Rows of 1, 2 and 3 bits by AVX-512 VBMI; included by decode.c, whose other loops these stand in for. */
#ifndef BITSFUSION_LOOKUP_H
#define BITSFUSION_LOOKUP_H

enum { WIDE = 64 }; /* bytes of a vector */

typedef struct { __m512i part[4]; } Table; /* of 256 bytes; those of 128 fill the first two */

INLINE Table load_table(const uint8_t *bytes) {
    Table table;
    for (int p = 0; p < 4; p++) table.part[p] = _mm512_loadu_si512(bytes + p * WIDE);
    return table;
}

INLINE __m512i look_up_128(const Table *table, __m512i words) { /* their top bit is not looked at */
    return _mm512_permutex2var_epi8(table->part[0], words, table->part[1]);
}

INLINE __m512i look_up_256(const Table *table, __m512i words) {
    const __m512i upper = _mm512_permutex2var_epi8(table->part[2], words, table->part[3]);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(words), look_up_128(table, words), upper);
}

INLINE __mmask64 first_lanes(int64_t count) { return count < WIDE ? ((__mmask64)1 << count) - 1 : ~(__mmask64)0; }

INLINE __m512i load_bytes(const uint8_t *in, int64_t count) {
    return count == WIDE ? _mm512_loadu_si512(in) : _mm512_maskz_loadu_epi8(first_lanes(count), in);
}

/* What a row's digits become: the table of its levels, and where it goes. */
typedef struct {
    uint8_t *out;
    int64_t columns;
    __m512i levels;
} Target;

INLINE Target target_of(const Row *row, int kind) {
    const void *levels = kind == BFLOAT16 ? (const void *)row->levels : (const void *)row->float_levels;
    return (Target){row->out, row->columns, _mm512_loadu_si512(levels)};
}

/* Whole vectors are stored without a mask, which would be slower. */
#define STORE(TYPE, SUFFIX, MASK, OUT, LANES, VALUE)                    \
    do {                                                                \
        if (count == WIDE) _mm512_storeu_##TYPE(OUT, VALUE);            \
        else _mm512_mask_storeu_##SUFFIX(OUT, (MASK)(LANES), VALUE);    \
    } while (0)

/* Up to 64 digits (codes for int8) to the columns from `start`; those past the row are left out. */
INLINE void put_digits(const Target *to, __m512i digits, int64_t start, int64_t count, int kind) {
    count = min64(count, to->columns - start);
    if (count <= 0) return;
    const __mmask64 lanes = first_lanes(count);
    if (kind == INT8) {
        STORE(si512, epi8, __mmask64, to->out + start, lanes, digits);
    } else if (kind == BFLOAT16) {
        uint16_t *out = (uint16_t *)to->out + start;
        const __m512i low = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(digits));
        const __m512i high = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(digits, 1));
        STORE(si512, epi16, __mmask32, out, lanes, _mm512_permutexvar_epi16(low, to->levels));
        STORE(si512, epi16, __mmask32, out + 32, lanes >> 32, _mm512_permutexvar_epi16(high, to->levels));
    } else {
        float *out = (float *)to->out + start;
        const __m512 levels = _mm512_castsi512_ps(to->levels);
#define QUARTER(Q)                                                                                              \
    STORE(ps, ps, __mmask16, out + 16 * Q, lanes >> 16 * Q,                                                     \
          _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(digits, Q)), levels))
        QUARTER(0);
        QUARTER(1);
        QUARTER(2);
        QUARTER(3);
#undef QUARTER
    }
}

INLINE void row_1bit(const Row *row, const uint8_t *in, int kind) {
    const int64_t width = words_of_row(row->columns, 1);
    const Target to = target_of(row, kind);
    Table tables[5];
    for (int j = 0; j < digits_of(1); j++) tables[j] = load_table(row->digits[j]);
    for (int64_t i = 0; i < width; i += WIDE) {
        const int64_t count = min64(WIDE, width - i);
        const __m512i words = load_bytes(in + i, count);
        for (int j = 0; j < digits_of(1); j++)
            put_digits(&to, look_up_256(&tables[j], words), j * width + i, count, kind);
    }
}

INLINE void row_2bit(const Row *row, const uint8_t *in, int kind) {
    const int64_t width = words_of_row(row->columns, 2), part = ceil_div(width, 8), plain = min64(width, 7 * part);
    const Target to = target_of(row, kind);
    Table tables[3];
    for (int j = 0; j < digits_of(2); j++) tables[j] = load_table(row->digits[j]);
    for (int64_t i = 0; i < plain; i += WIDE) {
        const int64_t count = min64(WIDE, plain - i);
        const __m512i words = load_bytes(in + i, count); /* and a bit of the eighth part's, on top */
        for (int j = 0; j < digits_of(2); j++)
            put_digits(&to, look_up_128(&tables[j], words), j * width + i, count, kind);
    }
    for (int64_t i = plain; i < width; i += WIDE) {
        const int64_t count = min64(WIDE, width - i);
        __m512i words = _mm512_setzero_si512();
        for (int b = 0; b < 7; b++) {
            const __mmask64 top = _mm512_movepi8_mask(load_bytes(in + b * part + i - plain, count));
            words = _mm512_or_si512(words, _mm512_maskz_set1_epi8(top, (char)(1 << b)));
        }
        for (int j = 0; j < digits_of(2); j++)
            put_digits(&to, look_up_128(&tables[j], words), j * width + i, count, kind);
    }
}

/* 16-bit words / 81, exact for those below 9^5. */
INLINE __m512i divide_by_81(__m512i words) {
    return _mm512_srli_epi16(_mm512_mulhi_epu16(words, _mm512_set1_epi16((short)51782)), 6);
}

INLINE __m512i remainder_of_81(__m512i words, __m512i quotient) {
    return _mm512_sub_epi16(words, _mm512_mullo_epi16(quotient, _mm512_set1_epi16(81)));
}

/* Words are split into two pairs of digits, whose tables are those of bytes, and the last one. */
INLINE void row_3bit(const Row *row, const uint8_t *in, int kind) {
    const int64_t width = words_of_row(row->columns, 3);
    const Target to = target_of(row, kind);
    const Table even = load_table(row->digits[0]), odd = load_table(row->digits[1]);
    const __m512i lower = _mm512_set1_epi16(0xff);
    for (int64_t i = 0; i < width; i += WIDE) {
        const int64_t count = min64(WIDE, width - i);
        const __m512i low = load_bytes(in + i, count), high = load_bytes(in + width + i, count);
        __m512i lowest[2], middle[2], highest[2];
        for (int h = 0; h < 2; h++) { /* even words, then odd ones */
            const __m512i words = h ? _mm512_or_si512(_mm512_srli_epi16(low, 8), _mm512_andnot_si512(lower, high))
                                    : _mm512_or_si512(_mm512_and_si512(lower, low), _mm512_slli_epi16(high, 8));
            const __m512i quotient = divide_by_81(words);
            lowest[h] = remainder_of_81(words, quotient);
            highest[h] = divide_by_81(quotient);
            middle[h] = remainder_of_81(quotient, highest[h]);
        }
        const __m512i first = _mm512_or_si512(lowest[0], _mm512_slli_epi16(lowest[1], 8));
        const __m512i second = _mm512_or_si512(middle[0], _mm512_slli_epi16(middle[1], 8));
        const __m512i last = _mm512_or_si512(highest[0], _mm512_slli_epi16(highest[1], 8));
        put_digits(&to, look_up_128(&even, first), i, count, kind);
        put_digits(&to, look_up_128(&odd, first), width + i, count, kind);
        put_digits(&to, look_up_128(&even, second), 2 * width + i, count, kind);
        put_digits(&to, look_up_128(&odd, second), 3 * width + i, count, kind);
        put_digits(&to, look_up_128(&even, last), 4 * width + i, count, kind);
    }
}

#endif
