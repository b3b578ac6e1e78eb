/* Digits of a row to the dense form (codec/radix.py). */
#ifndef BITSFUSION_PACK_H
#define BITSFUSION_PACK_H

#include "common.h"

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

static void pack_row(uint8_t *restrict digits, uint32_t *restrict words, uint8_t *restrict out, int64_t columns,
                     int bits) {
    memset(digits + columns, half_range(bits), 128);
    if (bits == 1) {
        const int64_t width = ceil_div(columns, 5);
        join(digits, words, width, 3, 5);
        for (int64_t i = 0; i < width; i++) out[i] = (uint8_t)words[i];
    } else if (bits == 2) {
        const int64_t width = ceil_div(columns, 3);
        join(digits, words, width, 5, 3);
        pack_sevens(words, out, width);
    } else if (bits == 3) {
        const int64_t width = ceil_div(columns, 5);
        join(digits, words, width, 9, 5);
        for (int64_t i = 0; i < width; i++) out[i] = (uint8_t)words[i];
        for (int64_t i = 0; i < width; i++) out[width + i] = (uint8_t)(words[i] >> 8);
    } else if (bits == 4) {
        const int64_t width = ceil_div(columns, 2), part = ceil_div(width, 8);
        join(digits, words, width, 17, 2);
        memset(words + width, 0, (size_t)(8 * part - width) * sizeof(uint32_t));
        for (int64_t i = 0; i < width; i++) out[i] = (uint8_t)words[i];
        memset(out + width, 0, (size_t)part);
        for (int p = 0; p < 8; p++)
            for (int64_t i = 0; i < part; i++) out[width + i] |= (uint8_t)((words[p * part + i] >> 8) << p);
    } else {
        memcpy(out, digits, (size_t)columns);
    }
}

#endif
