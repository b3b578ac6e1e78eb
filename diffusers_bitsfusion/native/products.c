/* Products of eight-bit activations and codes, summed in 32 bits, for processors with AVX2 but without VNNI: of tokens,
 * and of the windows of a convolution.
 *
 * Their one instruction for bytes adds two products in 16 bits. Codes of few bits leave room there for many more, so
 * that sums are widened once in a while only: the fewer bits, the fewer instructions. The weight lies as
 * decode_blocked.c writes codes, in blocks of 16 outputs; what the outputs of some positions see is gathered, 1 kB of
 * each at a time, so that such a piece of a block stays in the first-level cache for all of them. */
#include "dense.h"

#ifdef __AVX2__
#include <immintrin.h>
#include <stdlib.h>

/* Positions and outputs of a tile of sums; bytes of a row of a block, which are four columns; positions of a panel,
 * which are gathered together; columns of a panel; bytes between its rows, which would else share a cache's sets. */
enum { TILE_ROWS = 6, LANES = 16, BLOCK_ROW = 4 * LANES, PANEL = 96, DEPTH = 1024, STRIDE = DEPTH + 64 };

/* Positions of a panel; 0 without the instructions. */
EXPORT int bitsfusion_panel_positions(void) { return PANEL; }

typedef struct {
    const uint8_t *image; /* [batch, height, width, inputs] */
    const int8_t *weight; /* as decode_blocked.c writes codes of `bits` (1 to 7) in blocks of 16 outputs */
    int32_t *sums; /* [count, outputs] */
    int64_t first, count; /* positions of [batch, out_height, out_width] that are computed */
    int64_t flip; /* bits of the image's bytes to be turned, 128 if they are signed */
    int64_t zero_point; /* what stands for zero after that */
    int64_t height, width, inputs, out_height, out_width, outputs;
    int64_t kernel_height, kernel_width, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x;
    int64_t bits;
    int64_t panels, groups; /* parts of the positions, of up to PANEL each, and of the blocks of outputs */
    _Atomic int32_t failed;
} ProductArguments;

TAKES(multiply, ProductArguments)

/* Columns of a row of the weight: fours of inputs, tap after tap. */
INLINE int64_t tap_columns(const ProductArguments *a) { return 4 * ceil_div(a->inputs, 4); }

/* What the columns from `start` to `stop` are multiplied by at a position. */
INLINE void gather(const ProductArguments *a, int64_t position, int64_t start, int64_t stop, uint8_t *to) {
    const int64_t tap_bytes = tap_columns(a), inputs = a->inputs;
    const int64_t row = position / a->out_width, image = row / a->out_height;
    const int64_t top = row % a->out_height * a->stride_y - a->pad_y;
    const int64_t left = position % a->out_width * a->stride_x - a->pad_x;
    for (int64_t column = start, count; column < stop; column += count, to += count) {
        const int64_t tap = column / tap_bytes, input = column % tap_bytes;
        const int64_t y = top + tap / a->kernel_width * a->dilation_y;
        const int64_t x = left + tap % a->kernel_width * a->dilation_x;
        count = min64(tap_bytes - input, stop - column);
        const int64_t found = max64(0, min64(count, inputs - input));
        if (y < 0 || y >= a->height || x < 0 || x >= a->width) memset(to, (int)a->zero_point, (size_t)found);
        else {
            const uint8_t *const from = a->image + ((image * a->height + y) * a->width + x) * inputs + input;
            const uint8_t flip = (uint8_t)a->flip;
            for (int64_t i = 0; i < found; i++) to[i] = from[i] ^ flip;
        }
        memset(to + found, 0, (size_t)(count - found)); /* the weight has anything there */
    }
}

/* Without this a compiler loads a row of the block again for each position, and keeps sums on the stack. */
#define IN_REGISTER(VECTOR) __asm__("" : "+x"(VECTOR))

#define FOR_ROWS(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)

/* Adds to `sums` the products of `quads` fours of columns, which are no more than 16 bits have room for. */
INLINE void add_products(const uint8_t *const rows[TILE_ROWS], const int8_t *block, int64_t quads,
                         int32_t (*sums)[LANES]) {
    const __m256i ones = _mm256_set1_epi16(1);
#define DECLARE(R) __m256i low##R = _mm256_setzero_si256(), high##R = low##R;
#define MULTIPLY(R)                                                             \
    {                                                                           \
        int32_t four;                                                           \
        memcpy(&four, rows[R] + 4 * q, 4);                                      \
        const __m256i token = _mm256_set1_epi32(four);                          \
        low##R = _mm256_add_epi16(low##R, _mm256_maddubs_epi16(token, low));    \
        high##R = _mm256_add_epi16(high##R, _mm256_maddubs_epi16(token, high)); \
        IN_REGISTER(low##R);                                                    \
        IN_REGISTER(high##R);                                                   \
    }
#define WIDEN(R)                                                                                                     \
    {                                                                                                                \
        __m256i *const to = (__m256i *)sums[R];                                                                      \
        _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), _mm256_madd_epi16(low##R, ones)));          \
        _mm256_storeu_si256(to + 1, _mm256_add_epi32(_mm256_loadu_si256(to + 1), _mm256_madd_epi16(high##R, ones))); \
    }
    FOR_ROWS(DECLARE)
    for (int64_t q = 0; q < quads; q++) {
        __m256i low = _mm256_loadu_si256((const __m256i *)(block + q * BLOCK_ROW));
        __m256i high = _mm256_loadu_si256((const __m256i *)(block + q * BLOCK_ROW) + 1);
        IN_REGISTER(low);
        IN_REGISTER(high);
        FOR_ROWS(MULTIPLY)
    }
    FOR_ROWS(WIDEN)
#undef DECLARE
#undef MULTIPLY
#undef WIDEN
}

/* Sums of 16 outputs or fewer; a size that a compiler knows makes no call of it. */
INLINE void copy_sums(int32_t *to, const int32_t *from, int64_t outputs) {
    if (outputs == LANES) memcpy(to, from, LANES * sizeof *to);
    else memcpy(to, from, (size_t)outputs * sizeof *to);
}

/* A tile of up to six positions and 16 outputs: its sums so far, or `start` where there are none, and the products of
 * so many fours of columns. `run`: fours that fit 16 bits. */
INLINE void multiply_tile(const uint8_t *panel, int64_t rows, const int8_t *block, int64_t quads, int64_t run,
                          const int32_t *start, int32_t *to, int64_t stride, int64_t outputs) {
    int32_t sums[TILE_ROWS][LANES] = {{0}};
    const uint8_t *at[TILE_ROWS];
    for (int64_t r = 0; r < TILE_ROWS; r++) { /* a tile that is not full has its last row again */
        at[r] = panel + min64(r, rows - 1) * STRIDE;
        copy_sums(sums[r], start ? start : to + min64(r, rows - 1) * stride, outputs);
    }
    for (int64_t first = 0; first < quads; first += run) {
        const uint8_t *tokens[TILE_ROWS];
        for (int r = 0; r < TILE_ROWS; r++) tokens[r] = at[r] + 4 * first;
        add_products(tokens, block + first * BLOCK_ROW, min64(run, quads - first), sums);
    }
    for (int64_t r = 0; r < rows; r++) copy_sums(to + r * stride, sums[r], outputs);
}

/* Sums of `count` gathered positions with the outputs of one block, for columns `from` to `to` of all. */
INLINE void multiply_block(const ProductArguments *a, const uint8_t *panel, int64_t count, int64_t block, int64_t from,
                           int64_t to, int64_t run, int32_t *sums) {
    const int64_t quads = a->kernel_height * a->kernel_width * tap_columns(a) / 4;
    const int64_t blocks = ceil_div(a->outputs, LANES), outputs = min64(LANES, a->outputs - block * LANES);
    int32_t start[LANES] = {0};
    copy_sums(start, (const int32_t *)(a->weight + blocks * quads * BLOCK_ROW) + block * LANES, outputs);
    /* A byte, unless the image is not finite, whose scale is then NaN. */
    for (int o = 0; o < LANES; o++) start[o] *= (uint8_t)a->zero_point;
    const int8_t *const columns = a->weight + block * quads * BLOCK_ROW + from * LANES;
    for (int64_t row = 0; row < count; row += TILE_ROWS)
        multiply_tile(panel + row * STRIDE, min64(TILE_ROWS, count - row), columns, (to - from) / 4, run,
                      from ? NULL : start, sums + row * a->outputs + block * LANES, a->outputs, outputs);
}

/* A row of this loop is a panel of positions and one of the groups of blocks. */
EXPORT void bitsfusion_multiply(ProductArguments *a, int64_t start, int64_t stop) {
    const int64_t columns = a->kernel_height * a->kernel_width * tap_columns(a);
    const int64_t blocks = ceil_div(a->outputs, LANES), share = ceil_div(blocks, a->groups);
    const int64_t positions = ceil_div(ceil_div(a->count, a->panels), TILE_ROWS) * TILE_ROWS;
    /* 64 pairs of products of 1-bit codes, one of 7-bit codes. */
    const int64_t run = INT16_MAX / (2 * 255 * half_range((int)a->bits));
    uint8_t *const panel = malloc((size_t)PANEL * STRIDE);
    if (!panel) {
        a->failed = 1;
        return;
    }
    for (int64_t item = start; item < stop; item++) {
        const int64_t first = item / a->groups * positions, count = min64(positions, a->count - first);
        const int64_t block = item % a->groups * share, end = min64(block + share, blocks);
        for (int64_t from = 0; from < columns; from += DEPTH) {
            const int64_t to = min64(from + DEPTH, columns);
            for (int64_t r = 0; r < count; r++) gather(a, a->first + first + r, from, to, panel + r * STRIDE);
            for (int64_t b = block; b < end; b++)
                multiply_block(a, panel, count, b, from, to, run, a->sums + first * a->outputs);
        }
    }
    free(panel);
}

#else

EXPORT int bitsfusion_panel_positions(void) { return 0; }
EXPORT void bitsfusion_multiply(void) {}
EXPORT int64_t bitsfusion_multiply_size(void) { return 0; }

#endif
