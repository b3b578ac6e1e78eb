/* Codes of convolutions in the order that oneDNN's integer convolution reads them; why: ops/onednn_weights.py. */
#include "sums.h"

#define LANES 16 /* outputs written side by side: a cache line */

typedef struct {
    const int8_t *plain; /* [outputs, inputs, taps] */
    int8_t *blocked;     /* [ceil(outputs / block), ceil(inputs / (4 * group)), taps, group, block, 4], then minus the
                          * sum of each output's codes, int32 [ceil(outputs / block) * block] */
    int64_t outputs, inputs, taps;
    int64_t block; /* 8, or a multiple of 16 */
    int64_t group; /* fours of inputs */
} BlockArguments;

TAKES(block_weight, BlockArguments)

/* A row of this loop is a block. What fills up the last block and the last group of inputs is left as it is. */
EXPORT void bitsfusion_block_weight(const BlockArguments *a, int64_t first, int64_t last) {
    const int8_t *const plain = a->plain;
    int8_t *const blocked = a->blocked;
    const int64_t outputs = a->outputs, inputs = a->inputs, taps = a->taps, block = a->block;
    const int64_t quads = ceil_div(inputs, 4), columns = inputs * taps, group = a->group, width = min64(LANES, block);
    const int64_t filled = ceil_div(quads, group) * group;
    int8_t *const sums = blocked + ceil_div(outputs, block) * block * taps * filled * 4;
    for (int64_t start = first * block; start < min64(last * block, outputs); start += width) {
        const int64_t lanes = min64(width, outputs - start);
        const int8_t *const rows = plain + start * columns;
        int8_t *const lane = blocked + (start / block * block * taps * filled + start % block) * 4;
        for (int64_t tap = 0; tap < taps; tap++)
            for (int64_t quad = 0; quad < quads; quad++) {
                const int8_t *const from = rows + quad * 4 * taps + tap;
                int8_t *const to = lane + ((quad / group * taps + tap) * group + quad % group) * block * 4;
                const int64_t count = min64(4, inputs - quad * 4);
                if (count == 4)
                    for (int64_t o = 0; o < lanes; o++) {
                        const int8_t *const row = from + o * columns;
                        const int8_t four[4] = {row[0], row[taps], row[2 * taps], row[3 * taps]};
                        memcpy(to + o * 4, four, 4);
                    }
                else
                    for (int64_t o = 0; o < lanes; o++)
                        for (int64_t i = 0; i < count; i++) to[o * 4 + i] = from[o * columns + i * taps];
            }
        for (int64_t o = 0; o < lanes; o++) {
            const int32_t sum = -sum_codes(rows + o * columns, columns);
            memcpy(sums + (start + o) * 4, &sum, 4);
        }
    }
}
