/* The dense form of codes in memory, described once for C; dense_form.py explains it. */
#ifndef BITSFUSION_DENSE_H
#define BITSFUSION_DENSE_H

#include "common.h"

INLINE int half_range(int bits) { return bits == 8 ? 127 : 1 << (bits - 1); }

/* Levels of the grid, which is the base of the digits. */
INLINE int base_of(int bits) { return 2 * half_range(bits) + 1; }

/* Codes that a word holds. */
INLINE int digits_of(int bits) { return bits == 1 || bits == 3 ? 5 : bits == 2 ? 3 : bits == 4 ? 2 : 1; }

/* Bits that a word is stored in. */
INLINE int word_bits_of(int bits) { return bits == 2 ? 7 : bits == 3 ? 16 : bits == 4 ? 9 : 8; }

/* Words of a row. */
INLINE int64_t words_of_row(int64_t columns, int bits) { return ceil_div(columns, digits_of(bits)); }

/* Bytes of a row. */
INLINE int64_t bytes_of_row(int64_t columns, int bits) {
    const int64_t words = words_of_row(columns, bits);
    switch (word_bits_of(bits)) {
        case 7: return 7 * ceil_div(words, 8);
        case 16: return 2 * words;
        case 9: return words + ceil_div(words, 8);
        default: return words;
    }
}

#endif
