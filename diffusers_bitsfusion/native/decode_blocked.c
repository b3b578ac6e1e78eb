/* Packed weights of convolutions to the order in which oneDNN reads them; why: ops/onednn_float_weights.py.
 *
 * The values that belong to four bytes of a layout (two of bf16, one of fp32) are those of neighbouring inputs. Rows
 * are decoded, and 16 of them at a time transposed: for bf16 in words of four bytes, of which the layout's own are put
 * together. Loads and stores are of whole vectors throughout. */
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

INLINE void store_lanes(Lanes to, int64_t offset, const uint32_t *words) {
    if (to.second == to.first + HALF * 4) memcpy(to.first + offset, words, LANES * 4);
    else {
        memcpy(to.first + offset, words, HALF * 4);
        if (to.second) memcpy(to.second + offset, words + HALF, HALF * 4);
    }
}

/* Rows of codes as fp32. Its words are single weights, so bytes are transposed, and become weights on their way out:
 * the rows of a layer then stay in the second-level cache. */
INLINE void store_floats(const DecodeBlockedArguments *a, int64_t first, const int8_t *rows, Lanes to) {
    const int64_t columns = a->inputs * a->taps, lanes = min64(LANES, a->outputs - first);
    const int64_t input_bytes = a->block * 4, tap_bytes = a->inputs * input_bytes;
    float scale[LANES] = {0};
    memcpy(scale, a->scale + first, (size_t)lanes * sizeof *scale);
    for (int64_t column = 0, tap = 0, input = 0; column < columns; column += TILE) {
        const int64_t count = min64(TILE, columns - column);
        int8_t codes[TILE][TILE];
        transpose_bytes(rows + column, columns, lanes, count, codes);
        for (int64_t c = 0; c < count; c++) {
            float weights[LANES];
            for (int o = 0; o < LANES; o++) weights[o] = (float)codes[c][o] * scale[o];
            store_lanes(to, tap * tap_bytes + input * input_bytes, (const uint32_t *)weights);
            if (++tap == a->taps) tap = 0, input++;
        }
    }
}

/* Of the transposed words of one group of two inputs in bf16, those of each tap. */
INLINE void store_pair(uint32_t (*words)[LANES], int64_t taps, Lanes to, int64_t offset, int64_t tap_bytes) {
    for (int64_t tap = 0; tap < taps; tap++, offset += tap_bytes) {
        uint32_t out[LANES];
        const uint32_t *first = words[tap / 2], *second = words[(taps + tap) / 2];
        const int low = 16 * (int)(tap % 2), high = 16 * (int)((taps + tap) % 2);
        for (int o = 0; o < LANES; o++) out[o] = (first[o] >> low & 0xffffu) | (second[o] >> high & 0xffffu) << 16;
        store_lanes(to, offset, out);
    }
}

/* Rows of bf16. `transposed` has room for the words of 16 pairs of inputs. */
INLINE void store_pairs(const DecodeBlockedArguments *a, int64_t first, const char *rows, uint32_t (*transposed)[LANES],
                        Lanes to) {
    const int64_t taps = a->taps, row_bytes = a->inputs * taps * 2, pairs = ceil_div(a->inputs, 2);
    const int64_t lanes = min64(LANES, a->outputs - first), pair_bytes = a->block * 4;
    for (int64_t pair = 0; pair < pairs; pair += LANES) {
        const int64_t count = min64(LANES, pairs - pair);
        for (int64_t w = 0; w < count * taps; w += WORDS) {
            const int64_t at = (pair * taps + w) * 4, bytes = max64(0, min64(WORDS * 4, row_bytes - at));
            if (lanes == LANES && bytes == WORDS * 4) transpose(rows + at, row_bytes, transposed + w);
            else transpose_part(rows + at, row_bytes, lanes, bytes, transposed + w);
        }
        for (int64_t p = 0; p < count; p++)
            store_pair(transposed + p * taps, taps, to, (pair + p) * pair_bytes, pairs * pair_bytes);
    }
}

/* A row of this loop is 16 outputs. What fills up the last block beyond them is left as it is. */
EXPORT void bitsfusion_decode_blocked(DecodeBlockedArguments *a, int64_t start, int64_t stop) {
    const int floats = a->kind == FLOAT32;
    const int64_t taps = a->taps, block = a->block, columns = a->inputs * taps;
    const int64_t row_bytes = columns * (floats ? 1 : 2), groups = floats ? a->inputs : ceil_div(a->inputs, 2);
    char *const rows = malloc((size_t)(LANES * (row_bytes + (floats ? 0 : LANES * taps * 4))));
    if (!rows) {
        a->failed = 1;
        return;
    }
    for (int64_t first = start * LANES; first < min64(stop * LANES, a->outputs); first += LANES) {
        const int64_t lanes = min64(LANES, a->outputs - first);
        const DecodeArguments part = {.dense = a->dense + first * a->row_bytes_in,
                                      .scale = a->scale + first,
                                      .out = rows,
                                      .columns = columns,
                                      .row_bytes_in = a->row_bytes_in,
                                      .bits = a->bits,
                                      .kind = floats ? INT8 : a->kind};
        bitsfusion_decode(&part, 0, lanes);
#define LANE(OUTPUT) ((char *)a->blocked + ((OUTPUT) / block * block * taps * groups + (OUTPUT) % block) * 4)
        const Lanes to = {LANE(first), lanes > HALF ? LANE(first + HALF) : NULL};
#undef LANE
        if (floats) store_floats(a, first, (const int8_t *)rows, to);
        else store_pairs(a, first, rows, (uint32_t(*)[LANES])(rows + LANES * row_bytes), to);
    }
    free(rows);
}
