/* The file's byte form to the dense form (codec/radix.py), where they differ: 2, 3 and 4 bits. */
#include "pack.h"

#include <stdlib.h>

typedef struct {
    const uint8_t *packed; /* [rows, row_bytes] */
    uint8_t *dense;        /* [rows, row_bytes_out] */
    int64_t columns, row_bytes, row_bytes_out, bits;
    _Atomic int32_t failed;
} RepackArguments;

TAKES(repack, RepackArguments)

EXPORT void bitsfusion_repack(RepackArguments *a, int64_t start, int64_t stop) {
    const int64_t columns = a->columns, row_bytes = a->row_bytes;
    uint32_t *const words = malloc((size_t)(words_bytes(columns) + digits_bytes(columns)));
    if (!words) {
        a->failed = 1;
        return;
    }
    uint8_t *const digits = (uint8_t *)words + words_bytes(columns);
    for (int64_t r = start; r < stop; r++) {
        const uint8_t *const packed = a->packed + r * row_bytes;
        uint8_t *const out = a->dense + r * a->row_bytes_out;
        if (a->bits == 2) {
            for (int64_t i = 0; i < row_bytes; i++) words[i] = packed[i];
            pack_sevens(words, out, row_bytes);
        } else if (a->bits == 3) {
            for (int64_t i = 0; i < row_bytes; i++) digits[i] = packed[i] % 9;
            for (int64_t i = 0; i < row_bytes; i++) digits[row_bytes + i] = packed[i] / 9;
            pack_row(digits, words, out, columns, 3);
        } else {
            memcpy(digits, packed, (size_t)columns);
            pack_row(digits, words, out, columns, 4);
        }
    }
    free(words);
}
