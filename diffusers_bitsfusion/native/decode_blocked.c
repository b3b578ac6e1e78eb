/* Packed weights in blocks of outputs: as oneDNN reads them (ops/onednn_float_weights.py), and codes for products.c.
 *
 * The values that belong to four bytes of a layout (four codes, two of bf16, one of fp32) are those of neighbouring
 * inputs. Rows are decoded, and 16 of them at a time transposed: for bf16 in words of four bytes, of which the layout's
 * own are put together. Loads and stores are of whole vectors throughout. */
#include "decode.h"
#include "sums.h"
#include "transpose.h"

#include <stdlib.h>

/* Outputs of a row of the loop; words of a tile of rows; codes of a word. */
enum { LANES = TILE, HALF = LANES / 2, WORDS = TILE, QUAD = 4 };

typedef struct {
    const uint8_t *dense; /* [outputs, row_bytes_in] */
    const float *scale;   /* [outputs] */
    void *blocked;        /* [ceil(outputs / block), taps, ceil(inputs / pack), block, pack] of `kind` (fp32, bf16 or
                           * int8, the codes), where `pack` values take four bytes; after codes minus the sum of each
                           * output's, int32 [ceil(outputs / block) * block] */
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

/* Rows of codes, four inputs to a word. `turned` has room for the columns of 16 inputs. */
INLINE void store_codes(const DecodeBlockedArguments *a, int64_t first, const int8_t *rows, int8_t (*turned)[TILE],
                        Lanes to) {
    const int64_t taps = a->taps, inputs = a->inputs, columns = inputs * taps, quads = ceil_div(inputs, QUAD);
    const int64_t lanes = min64(LANES, a->outputs - first), quad_bytes = a->block * QUAD;
    for (int64_t input = 0; input < inputs; input += TILE) {
        const int64_t count = min64(TILE, inputs - input), filled = ceil_div(count, QUAD) * QUAD;
        for (int64_t column = 0; column < count * taps; column += TILE)
            transpose_bytes(rows + input * taps + column, columns, lanes, min64(TILE, count * taps - column),
                            turned + column);
        memset(turned + count * taps, 0, (size_t)((filled - count) * taps * TILE));
        for (int64_t q = 0; q < filled / QUAD; q++)
            for (int64_t tap = 0; tap < taps; tap++) {
                uint32_t words[LANES];
                interleave_bytes((const int8_t(*)[TILE])turned + q * QUAD * taps + tap, taps, words);
                store_lanes(to, (tap * quads + input / QUAD + q) * quad_bytes, words);
            }
    }
}

/* Minus the sums of rows of codes. */
INLINE void store_sums(const DecodeBlockedArguments *a, int64_t first, const int8_t *rows) {
    const int64_t columns = a->inputs * a->taps, lanes = min64(LANES, a->outputs - first);
    const int64_t filled = ceil_div(a->outputs, a->block) * a->block;
    const int64_t row_bytes = a->taps * ceil_div(a->inputs, QUAD) * QUAD;
    char *const sums = (char *)a->blocked + filled * row_bytes + first * (int64_t)sizeof(int32_t);
    for (int64_t o = 0; o < lanes; o++) {
        const int32_t sum = -sum_codes(rows + o * columns, columns);
        memcpy(sums + o * (int64_t)sizeof sum, &sum, sizeof sum);
    }
}

/* Bytes of a value of a decoded row: fp32 is made of codes on its way out. */
INLINE int64_t bytes_of_value(int64_t kind) { return kind == BFLOAT16 ? 2 : 1; }

/* Bytes of what is transposed before it is stored: the columns of 16 pairs of inputs, or of 16 inputs. */
INLINE int64_t turned_bytes(const DecodeBlockedArguments *a) {
    if (a->kind == BFLOAT16) return LANES * a->taps * LANES * 4;
    return a->kind == INT8 ? (TILE * a->taps + TILE) * TILE : 0;
}

/* A row of this loop is 16 outputs. What fills up the last block beyond them is left as it is. */
EXPORT void bitsfusion_decode_blocked(DecodeBlockedArguments *a, int64_t start, int64_t stop) {
    const int64_t kind = a->kind, pack = kind == FLOAT32 ? 1 : kind == BFLOAT16 ? 2 : QUAD;
    const int64_t taps = a->taps, block = a->block, columns = a->inputs * taps, groups = ceil_div(a->inputs, pack);
    const int64_t row_bytes = columns * bytes_of_value(kind);
    char *const rows = malloc((size_t)(LANES * row_bytes + turned_bytes(a)));
    if (!rows) {
        a->failed = 1;
        return;
    }
    void *const turned = rows + LANES * row_bytes;
    for (int64_t first = start * LANES; first < min64(stop * LANES, a->outputs); first += LANES) {
        const int64_t lanes = min64(LANES, a->outputs - first);
        const DecodeArguments part = {.dense = a->dense + first * a->row_bytes_in,
                                      .scale = a->scale + first,
                                      .out = rows,
                                      .columns = columns,
                                      .row_bytes_in = a->row_bytes_in,
                                      .bits = a->bits,
                                      .kind = kind == BFLOAT16 ? BFLOAT16 : INT8};
        bitsfusion_decode(&part, 0, lanes);
#define LANE(OUTPUT) ((char *)a->blocked + ((OUTPUT) / block * block * taps * groups + (OUTPUT) % block) * 4)
        const Lanes to = {LANE(first), lanes > HALF ? LANE(first + HALF) : NULL};
#undef LANE
        if (kind == BFLOAT16) store_pairs(a, first, rows, turned, to);
        else if (kind == FLOAT32) store_floats(a, first, (const int8_t *)rows, to);
        else {
            store_codes(a, first, (const int8_t *)rows, turned, to);
            store_sums(a, first, (const int8_t *)rows);
        }
    }
    free(rows);
}
