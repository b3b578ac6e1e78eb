/* Digits of a row to the dense form (codec/radix.py). */
#ifndef BITSFUSION_PACK_H
#define BITSFUSION_PACK_H

#include "dense.h"

/* Bytes of memory that packing a row needs for its words, and for its digits. */
INLINE int64_t words_bytes(int64_t columns) { return 4 * columns + 256; }
INLINE int64_t digits_bytes(int64_t columns) { return columns + 256; }

/* Words of `planes` planar digits; digits past the row's end are those of zero weights (`digits` is padded). */
static void join(const uint8_t *restrict digits, uint32_t *restrict words, int64_t width, uint32_t base, int planes) {
    for (int64_t i = 0; i < width; i++) words[i] = digits[(planes - 1) * width + i];
    for (int j = planes - 2; j >= 0; j--)
        for (int64_t i = 0; i < width; i++) words[i] = words[i] * base + digits[j * width + i];
}

/* Words of 7 bits, eight to seven bytes; `words` has room for whole groups. */
static void pack_sevens(uint32_t *restrict words, uint8_t *restrict out, int64_t width) {
    const int64_t part = ceil_div(width, 8);
    memset(words + width, 0, (size_t)(8 * part - width) * sizeof(uint32_t));
    for (int p = 0; p < 7; p++)
        for (int64_t i = 0; i < part; i++)
            out[p * part + i] = (uint8_t)(words[p * part + i] | ((words[7 * part + i] >> p) & 1u) << 7);
}

/* Words of 9 bits: low bytes, then a plane of top bits; `words` has room for whole groups. */
static void pack_nines(uint32_t *restrict words, uint8_t *restrict out, int64_t width) {
    const int64_t part = ceil_div(width, 8);
    memset(words + width, 0, (size_t)(8 * part - width) * sizeof(uint32_t));
    for (int64_t i = 0; i < width; i++) out[i] = (uint8_t)words[i];
    memset(out + width, 0, (size_t)part);
    for (int p = 0; p < 8; p++)
        for (int64_t i = 0; i < part; i++) out[width + i] |= (uint8_t)((words[p * part + i] >> 8) << p);
}

static void pack_words(uint32_t *restrict words, uint8_t *restrict out, int64_t width, int word_bits) {
    if (word_bits == 7) {
        pack_sevens(words, out, width);
    } else if (word_bits == 9) {
        pack_nines(words, out, width);
    } else {
        for (int64_t i = 0; i < width; i++) out[i] = (uint8_t)words[i];
        if (word_bits == 16)
            for (int64_t i = 0; i < width; i++) out[width + i] = (uint8_t)(words[i] >> 8);
    }
}

static void pack_row(uint8_t *restrict digits, uint32_t *restrict words, uint8_t *restrict out, int64_t columns,
                     int bits) {
    if (digits_of(bits) == 1) {
        memcpy(out, digits, (size_t)columns);
        return;
    }
    const int64_t width = words_of_row(columns, bits);
    memset(digits + columns, half_range(bits), 128);
    join(digits, words, width, (uint32_t)base_of(bits), digits_of(bits));
    pack_words(words, out, width, word_bits_of(bits));
}

#endif
