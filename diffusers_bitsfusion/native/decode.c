/* Dense form (codec/radix.py) to weights, one output channel after another. Digits of a row are planar, so every loop
 * runs over plain vectors. */
#include "decode.h"
#include "dense.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

enum { LANES = 32, MOST = 17 }; /* bf16 values of a vector; levels of the widest grid that is looked up */

enum { BLOCK = 4096 }; /* words decoded at a time: they stay in the first-level cache */

typedef struct {
    void *out;      /* first element of the row */
    int64_t columns;
    float scale;
    uint16_t levels[LANES];    /* what digits are in bf16, up to MOST */
    float float_levels[LANES]; /* and in fp32 */
    const uint8_t (*digits)[256]; /* for lookup.h: of every byte as a word; for int8 the codes that they mean */
} Row;

/* word / base, exact for every word of that base (the rows below say how large they get). */
INLINE uint32_t multiplier_of(unsigned base) { return base == 3 ? 21846 : base == 5 ? 13108 : base == 9 ? 58255 : 3856; }

INLINE int shift_of(unsigned base) { return base == 9 ? 3 : 0; }

INLINE uint16_t divide(uint16_t word, unsigned base) {
    return (uint16_t)((uint16_t)((word * multiplier_of(base)) >> 16) >> shift_of(base));
}

/* The lowest digit of a word, which becomes its quotient. */
INLINE uint16_t take_digit(uint16_t *word, unsigned base) {
    const uint16_t quotient = divide(*word, base), digit = (uint16_t)(*word - quotient * base);
    *word = quotient;
    return digit;
}

#ifdef __AVX512BW__
/* Digits to the bf16 values that `levels` has for them: a permutation, which no vectoriser finds. */
INLINE void look_up(uint16_t *restrict digits, int64_t count, const uint16_t *levels) {
    int64_t i = 0;
    const __m512i table = _mm512_loadu_si512(levels);
    for (; i + LANES <= count; i += LANES)
        _mm512_storeu_si512(digits + i, _mm512_permutexvar_epi16(_mm512_loadu_si512(digits + i), table));
    for (; i < count; i++) digits[i] = levels[digits[i]];
}
#endif

/* One digit of each word to the columns from `start`. Kind and base are constants where this is inlined, so each loop
 * is a few vector instructions. */
INLINE void store_digits(const Row *row, uint16_t *restrict words, int64_t start, int64_t count, int kind,
                         unsigned base) {
    const int half = (int)base / 2;
    const float scale = row->scale;
    if (kind == FLOAT32) {
        float *restrict out = (float *)row->out + start;
        for (int64_t i = 0; i < count; i++) out[i] = (float)((int)take_digit(words + i, base) - half) * scale;
    } else if (kind == INT8) {
        int8_t *restrict out = (int8_t *)row->out + start;
        for (int64_t i = 0; i < count; i++) out[i] = (int8_t)(take_digit(words + i, base) - half);
    } else {
        uint16_t *restrict out = (uint16_t *)row->out + start;
#ifdef __AVX512BW__
        for (int64_t i = 0; i < count; i++) out[i] = take_digit(words + i, base);
        look_up(out, count, row->levels);
#else /* arithmetic is vectorised, reading a table is not */
        for (int64_t i = 0; i < count; i++)
            out[i] = bf16_of((float)((int)take_digit(words + i, base) - half) * scale);
#endif
    }
}

/* All digits of a block of words; word i of the block is word first + i of the row's `width`. */
INLINE void store_words(const Row *row, uint16_t *restrict words, int64_t first, int64_t count, int64_t width,
                        int kind, unsigned base, int planes) {
    for (int j = 0; j < planes; j++) {
        const int64_t start = j * width + first;
        store_digits(row, words, start, min64(count, row->columns - start), kind, base);
    }
}

/* Runs of the block [first, first + count) inside part p of the row's words: word p*part + v is element v. */
#define FOR_RUN(P) \
    for (int64_t i = max64(P * part - first, 0), end = min64((P + 1) * part - first, count); i < end; i++)

#ifdef __AVX512VBMI__
/* A permutation of bytes looks the digits of 64 words up at once, which arithmetic finds a word at a time. Words of more
 * than a byte are split first. */
#include "lookup.h"
#elif defined(__AVX2__)
#include "divide.h"
#else
INLINE void row_1bit(const Row *row, const uint8_t *in, int kind) {
    const int64_t width = words_of_row(row->columns, 1);
    uint16_t words[BLOCK]; /* below 3^5 */
    for (int64_t first = 0; first < width; first += BLOCK) {
        const int64_t count = min64(BLOCK, width - first);
        for (int64_t i = 0; i < count; i++) words[i] = in[first + i];
        store_words(row, words, first, count, width, kind, base_of(1), digits_of(1));
    }
}

INLINE void row_2bit(const Row *row, const uint8_t *in, int kind) {
    const int64_t width = words_of_row(row->columns, 2), part = ceil_div(width, 8);
    uint16_t words[BLOCK]; /* below 5^3 */
    for (int64_t first = 0; first < width; first += BLOCK) {
        const int64_t count = min64(BLOCK, width - first);
        const uint8_t *low = in + first, *top = low - 7 * part;
        for (int64_t i = 0, end = min64(7 * part - first, count); i < end; i++) words[i] = low[i] & 127;
        FOR_RUN(7) {
            uint8_t word = 0;
            for (int b = 0; b < 7; b++) word |= (uint8_t)((top[i + b * part] & 128) >> (7 - b));
            words[i] = word;
        }
        store_words(row, words, first, count, width, kind, base_of(2), digits_of(2));
    }
}

INLINE void row_3bit(const Row *row, const uint8_t *in, int kind) {
    const int64_t width = words_of_row(row->columns, 3);
    uint16_t words[BLOCK]; /* below 9^5 */
    for (int64_t first = 0; first < width; first += BLOCK) {
        const int64_t count = min64(BLOCK, width - first);
        for (int64_t i = 0; i < count; i++) words[i] = (uint16_t)(in[first + i] | in[width + first + i] << 8);
        store_words(row, words, first, count, width, kind, base_of(3), digits_of(3));
    }
}

#endif

INLINE void row_4bit(const Row *row, const uint8_t *in, int kind) {
    const int64_t width = words_of_row(row->columns, 4), part = ceil_div(width, 8);
    uint16_t words[BLOCK]; /* below 17^2 */
    for (int64_t first = 0; first < width; first += BLOCK) {
        const int64_t count = min64(BLOCK, width - first);
        for (int p = 0; p < 8; p++) {
            const uint8_t *top = in + width + first - p * part;
            FOR_RUN(p) words[i] = (uint16_t)(in[first + i] | ((top[i] >> p) & 1) << 8);
        }
        store_words(row, words, first, count, width, kind, base_of(4), digits_of(4));
    }
}

INLINE void row_bytes(const Row *row, const uint8_t *restrict in, int kind, int half) {
    const int64_t columns = row->columns;
    const float scale = row->scale;
    if (kind == FLOAT32) {
        float *restrict out = (float *)row->out;
        for (int64_t i = 0; i < columns; i++) out[i] = (float)((int)in[i] - half) * scale;
    } else if (kind == INT8) {
        int8_t *restrict out = (int8_t *)row->out;
        for (int64_t i = 0; i < columns; i++) out[i] = (int8_t)(in[i] - half);
    } else {
        uint16_t *restrict out = (uint16_t *)row->out;
        for (int64_t i = 0; i < columns; i++) out[i] = bf16_of((float)((int)in[i] - half) * scale);
    }
}

#ifdef __AVX512VBMI__

/* Digits of every byte as a word, less `zero`; this thread's last ones are kept, since a row may take less time. */
static const uint8_t (*digits_less(int base, int zero))[256] {
    static _Thread_local uint8_t digits[5][256];
    static _Thread_local int last_base, last_zero;
    if (base != last_base || zero != last_zero)
        for (int place = 0, divisor = 1; place < 5; place++, divisor *= base)
            for (int word = 0; word < 256; word++) digits[place][word] = (uint8_t)(word / divisor % base - zero);
    last_base = base;
    last_zero = zero;
    return (const uint8_t (*)[256])digits;
}

#endif

TAKES(decode, DecodeArguments)

INLINE void decode_rows(const DecodeArguments *a, int64_t start, int64_t stop, int kind, int64_t element_size) {
    const int bits = (int)a->bits, half = half_range(bits);
    Row row = {.columns = a->columns};
#ifdef __AVX512VBMI__
    if (bits <= 3) row.digits = digits_less(2 * half + 1, kind == INT8 ? half : 0);
#endif
    for (int64_t r = start; r < stop; r++) {
        const uint8_t *in = a->dense + r * a->row_bytes_in;
        row.out = (char *)a->out + r * a->columns * element_size;
        row.scale = a->scale[r];
        for (int k = 0; k < MOST; k++) {
            row.float_levels[k] = (float)(k - half) * row.scale;
            row.levels[k] = bf16_of(row.float_levels[k]);
        }
        if (bits == 1) row_1bit(&row, in, kind);
        else if (bits == 2) row_2bit(&row, in, kind);
        else if (bits == 3) row_3bit(&row, in, kind);
        else if (bits == 4) row_4bit(&row, in, kind);
        else row_bytes(&row, in, kind, half);
    }
}

EXPORT void bitsfusion_decode(const DecodeArguments *a, int64_t start, int64_t stop) {
    if (a->kind == FLOAT32) decode_rows(a, start, stop, FLOAT32, 4);
    else if (a->kind == BFLOAT16) decode_rows(a, start, stop, BFLOAT16, 2);
    else decode_rows(a, start, stop, INT8, 1);
}
