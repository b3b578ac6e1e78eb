/* Packed weights of convolutions to the order in which oneDNN reads them; why: ops/onednn_weights.py.
 *
 * The values that belong to four bytes of a layout (two of bf16, one of fp32) are those of neighbouring inputs. Rows
 * are decoded, and 16 of them at a time transposed in words of four bytes, of which the layout's own are put together:
 * loads and stores are of whole vectors throughout. */
#include "decode.h"
#include "transpose.h"

#include <stdlib.h>

enum { LANES = TILE, HALF = LANES / 2, WORDS = TILE }; /* outputs of a row of the loop; words of a tile of rows */

typedef struct {
    const uint8_t *dense; /* [outputs, row_bytes_in] */
    const float *scale;   /* [outputs] */
    void *blocked;        /* [ceil(outputs / block), taps, ceil(inputs / pack), block, pack] of `kind` (fp32 or bf16),
                           * where `pack` values take four bytes */
    int64_t outputs, inputs, taps, row_bytes_in, bits, kind;
    int64_t block; /* a multiple of 8 */
    int32_t failed;
} DecodeBlockedArguments;

TAKES(decode_blocked, DecodeBlockedArguments)

/* The same of rows that may be fewer, or shorter: what is missing is zero. */
static void transpose_part(const char *from, int64_t stride, int64_t lanes, int64_t bytes, uint32_t (*to)[LANES]) {
    uint32_t tile[LANES][WORDS] = {{0}};
    for (int64_t r = 0; r < lanes; r++) memcpy(tile[r], from + r * stride, (size_t)bytes);
    transpose((const char *)tile, sizeof tile[0], to);
}

/* Where the first outputs of a row of the loop go, and the other half of them, which may lie in the next block. */
typedef struct {
    char *first, *second; /* second: NULL where there is none */
} Lanes;

/* Of the transposed words of one group of inputs (of one input in fp32, of two in bf16), those of each tap. */
INLINE void store_group(uint32_t (*words)[LANES], int64_t taps, int kind, Lanes to, int64_t offset, int64_t tap_bytes) {
    for (int64_t tap = 0; tap < taps; tap++, offset += tap_bytes) {
        uint32_t out[LANES];
        if (kind == FLOAT32) memcpy(out, words[tap], sizeof out);
        else {
            const uint32_t *first = words[tap / 2], *second = words[(taps + tap) / 2];
            const int low = 16 * (int)(tap % 2), high = 16 * (int)((taps + tap) % 2);
            for (int o = 0; o < LANES; o++) out[o] = (first[o] >> low & 0xffffu) | (second[o] >> high & 0xffffu) << 16;
        }
        if (to.second == to.first + sizeof out / 2) memcpy(to.first + offset, out, sizeof out);
        else {
            memcpy(to.first + offset, out, sizeof out / 2);
            if (to.second) memcpy(to.second + offset, out + HALF, sizeof out / 2);
        }
    }
}

/* A row of this loop is 16 outputs. What fills up the last block beyond them is left as it is. */
EXPORT void bitsfusion_decode_blocked(DecodeBlockedArguments *a, int64_t start, int64_t stop) {
    const int64_t taps = a->taps, block = a->block, size = a->kind == FLOAT32 ? 4 : 2;
    const int64_t columns = a->inputs * taps, row_bytes = columns * size, groups = ceil_div(a->inputs * size, 4);
    const int64_t words = LANES * taps; /* transposed at a time: those of 16 groups of inputs */
    char *const rows = malloc((size_t)(LANES * (row_bytes + words * 4)));
    if (!rows) {
        a->failed = 1;
        return;
    }
    uint32_t(*const transposed)[LANES] = (uint32_t(*)[LANES])(rows + LANES * row_bytes);
    for (int64_t first = start * LANES; first < min64(stop * LANES, a->outputs); first += LANES) {
        const int64_t lanes = min64(LANES, a->outputs - first);
        const DecodeArguments part = {.dense = a->dense + first * a->row_bytes_in,
                                      .scale = a->scale + first,
                                      .out = rows,
                                      .columns = columns,
                                      .row_bytes_in = a->row_bytes_in,
                                      .bits = a->bits,
                                      .kind = a->kind};
        bitsfusion_decode(&part, 0, lanes);
#define LANE(OUTPUT) ((char *)a->blocked + ((OUTPUT) / block * block * taps * groups + (OUTPUT) % block) * 4)
        const Lanes to = {LANE(first), lanes > HALF ? LANE(first + HALF) : NULL};
#undef LANE
        for (int64_t group = 0; group < groups; group += LANES) {
            const int64_t count = min64(LANES, groups - group);
            for (int64_t w = 0; w < count * taps; w += WORDS) {
                const int64_t at = (group * taps + w) * 4, bytes = max64(0, min64(WORDS * 4, row_bytes - at));
                if (lanes == LANES && bytes == WORDS * 4) transpose(rows + at, row_bytes, transposed + w);
                else transpose_part(rows + at, row_bytes, lanes, bytes, transposed + w);
            }
            for (int64_t g = 0; g < count; g++) {
                const int64_t offset = (group + g) * block * 4;
                if (a->kind == FLOAT32)
                    store_group(transposed + g * taps, taps, FLOAT32, to, offset, groups * block * 4);
                else store_group(transposed + g * taps, taps, BFLOAT16, to, offset, groups * block * 4);
            }
        }
    }
    free(rows);
}
