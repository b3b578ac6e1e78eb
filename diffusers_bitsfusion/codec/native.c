/* Weights to the dense form (codec/radix.py) and back, one output channel after another.
 *
 * Digits of a row are planar, so every loop below runs over plain vectors. Plain C11 for the compiler's vectoriser; no
 * dependency, no threads (the caller splits the rows), no state.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK = 4096 }; /* words decoded at a time: their digits stay in the first-level cache */

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static float float_of_bits(uint32_t bits) {
    union { uint32_t u; float f; } w = {bits};
    return w.f;
}

static uint32_t bits_of_float(float value) {
    union { float f; uint32_t u; } w = {value};
    return w.u;
}

static int half_range(int bits) { return bits == 8 ? 127 : 1 << (bits - 1); }

/* ---- dense form to weights ---- */


typedef struct {
    void *out;      /* first element of the row */
    int64_t columns;
    float scale;
    int half;       /* digit of a zero weight */
} Row;

static void store_f32(const Row *row, const uint8_t *restrict digits, int64_t start, int64_t count) {
    float *restrict out = (float *)row->out + start;
    const float scale = row->scale;
    const int half = row->half;
    for (int64_t i = 0; i < count; i++) out[i] = (float)((int)digits[i] - half) * scale;
}

static void store_bf16(const Row *row, const uint8_t *restrict digits, int64_t start, int64_t count) {
    uint16_t *restrict out = (uint16_t *)row->out + start;
    const float scale = row->scale;
    const int half = row->half;
    for (int64_t i = 0; i < count; i++) {
        const uint32_t u = bits_of_float((float)((int)digits[i] - half) * scale);
        out[i] = (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16); /* to nearest, ties to even */
    }
}

typedef void (*Store)(const Row *, const uint8_t *, int64_t, int64_t);

/* Store `count` digits for the columns from `start`, leaving out what lies past the row's end. */
static void emit(const Row *row, Store store, const uint8_t *digits, int64_t start, int64_t count) {
    if (start + count > row->columns) count = row->columns - start;
    if (count > 0) store(row, digits, start, count);
}

/* Split words into `planes` base-`base` digits and store them; word i of the block is word first + i of the row. */
#define DEFINE_SPLIT(NAME, BASE, PLANES, WORD, MULTIPLIER, SHIFT, PRODUCT)                                             \
    static void NAME(const Row *row, Store store, WORD *restrict words, int64_t first, int64_t count, int64_t width) { \
        uint8_t digits[BLOCK];                                                                                         \
        for (int j = 0; j < PLANES - 1; j++) {                                                                         \
            for (int64_t i = 0; i < count; i++) {                                                                      \
                const WORD quotient = (WORD)(((PRODUCT)words[i] * MULTIPLIER) >> SHIFT);                               \
                digits[i] = (uint8_t)(words[i] - quotient * BASE);                                                     \
                words[i] = quotient;                                                                                   \
            }                                                                                                          \
            emit(row, store, digits, j * width + first, count);                                                        \
        }                                                                                                              \
        for (int64_t i = 0; i < count; i++) digits[i] = (uint8_t)words[i];                                             \
        emit(row, store, digits, (PLANES - 1) * width + first, count);                                                 \
    }

DEFINE_SPLIT(split3, 3, 5, uint16_t, 171u, 9, uint16_t)      /* exact below 3^5 */
DEFINE_SPLIT(split5, 5, 3, uint16_t, 205u, 10, uint16_t)     /* exact below 5^3 */
DEFINE_SPLIT(split9, 9, 5, uint32_t, 58255u, 19, uint32_t)   /* exact below 9^5; products stay below 2^32 */
DEFINE_SPLIT(split17, 17, 2, uint16_t, 241u, 12, uint32_t)   /* exact below 17^2 */


static void row_1bit(const Row *row, Store store, const uint8_t *in) {
    const int64_t width = ceil_div(row->columns, 5);
    uint16_t words[BLOCK];
    for (int64_t first = 0; first < width; first += BLOCK) {
        const int64_t count = min64(BLOCK, width - first);
        for (int64_t i = 0; i < count; i++) words[i] = in[first + i];
        split3(row, store, words, first, count, width);
    }
}

/* Runs of the block [first, first + count) inside part p of the row's words: word p*part + v is element v. */
#define FOR_RUN(P) \
    for (int64_t i = max64(P * part - first, 0), end = min64((P + 1) * part - first, count); i < end; i++)

static void row_2bit(const Row *row, Store store, const uint8_t *in) {
    const int64_t width = ceil_div(row->columns, 3), part = ceil_div(width, 8);
    uint16_t words[BLOCK];
    for (int64_t first = 0; first < width; first += BLOCK) {
        const int64_t count = min64(BLOCK, width - first);
        const uint8_t *low = in + first, *top = low - 7 * part;
        for (int64_t i = 0, end = min64(7 * part - first, count); i < end; i++) words[i] = low[i] & 127;
        FOR_RUN(7) words[i] = top[i] >> 7;
        for (int b = 1; b < 7; b++) {
            const uint8_t *byte = top + b * part;
            FOR_RUN(7) words[i] |= (uint16_t)((byte[i] >> 7) << b);
        }
        split5(row, store, words, first, count, width);
    }
}

static void row_3bit(const Row *row, Store store, const uint8_t *in) {
    const int64_t width = ceil_div(row->columns, 5);
    uint32_t words[BLOCK];
    for (int64_t first = 0; first < width; first += BLOCK) {
        const int64_t count = min64(BLOCK, width - first);
        for (int64_t i = 0; i < count; i++) words[i] = in[first + i] | (uint32_t)in[width + first + i] << 8;
        split9(row, store, words, first, count, width);
    }
}

static void row_4bit(const Row *row, Store store, const uint8_t *in) {
    const int64_t width = ceil_div(row->columns, 2), part = ceil_div(width, 8);
    uint16_t words[BLOCK];
    for (int64_t first = 0; first < width; first += BLOCK) {
        const int64_t count = min64(BLOCK, width - first);
        for (int p = 0; p < 8; p++) {
            const uint8_t *top = in + width + first - p * part;
            FOR_RUN(p) words[i] = (uint16_t)(in[first + i] | ((top[i] >> p) & 1) << 8);
        }
        split17(row, store, words, first, count, width);
    }
}

static void row_bytes(const Row *row, Store store, const uint8_t *in) { store(row, in, 0, row->columns); }

/* dense: uint8 [rows, row_bytes_in]; scale: float [rows]; out: [rows, columns], bf16 if `bf16`, else fp32. */
void bitsfusion_decode(const uint8_t *dense, const float *scale, void *out, int64_t rows, int64_t columns,
                       int64_t row_bytes_in, int bits, int bf16) {
    void (*decode_row)(const Row *, Store, const uint8_t *) =
        bits == 1 ? row_1bit : bits == 2 ? row_2bit : bits == 3 ? row_3bit : bits == 4 ? row_4bit : row_bytes;
    const int half = half_range(bits);
    const int64_t out_stride = columns * (bf16 ? 2 : 4);
    for (int64_t r = 0; r < rows; r++) {
        const Row row = {(char *)out + r * out_stride, columns, scale[r], half};
        decode_row(&row, bf16 ? store_bf16 : store_f32, dense + r * row_bytes_in);
    }
}

/* ---- weights to dense form ---- */

enum { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

static void load_row(const void *weight, int64_t first, int64_t columns, int dtype, float *restrict row) {
    if (dtype == FLOAT32) {
        memcpy(row, (const float *)weight + first, (size_t)columns * sizeof(float));
    } else if (dtype == BFLOAT16) {
        const uint16_t *restrict in = (const uint16_t *)weight + first;
        for (int64_t i = 0; i < columns; i++) row[i] = float_of_bits((uint32_t)in[i] << 16);
    } else {
        /* Exponent and fraction moved into place, then the exponent's bias put right by a power of two: exact for
         * subnormal numbers too. Infinities and NaNs keep the largest exponent. */
        const uint16_t *restrict in = (const uint16_t *)weight + first;
        for (int64_t i = 0; i < columns; i++) {
            const uint32_t magnitude = in[i] & 0x7fffu, sign = (uint32_t)(in[i] & 0x8000u) << 16;
            const uint32_t finite = bits_of_float(float_of_bits(magnitude << 13) * 0x1p112f);
            row[i] = float_of_bits((magnitude < 0x7c00u ? finite : magnitude << 13 | 0x7f800000u) | sign);
        }
    }
}

/* <w, k> and <k, k> with k = clip(round(w / scale), low, high). */
static void fit(const float *restrict row, int64_t columns, float scale, float low, float high, float *dot,
                float *norm) {
    const float inverse = 1.0f / scale;
    float d = 0.0f, n = 0.0f;
    for (int64_t i = 0; i < columns; i++) {
        float k = rintf(row[i] * inverse);
        k = k < low ? low : k > high ? high : k;
        d += row[i] * k;
        n += k * k;
    }
    *dot = d;
    *norm = n;
}

static float one_where_zero(float scale) { return scale == 0.0f ? 1.0f : scale; }

/* The alternation of codec/scales.py, which explains its starts. */
static float alternate(const float *restrict row, int64_t columns, float low, float high, float gaussian_step,
                       int starts, int iterations) {
    float squares = 0.0f, largest = 0.0f, dot, norm;
    for (int64_t i = 0; i < columns; i++) {
        squares += row[i] * row[i];
        const float magnitude = fabsf(row[i]);
        largest = magnitude > largest ? magnitude : largest;
    }
    const float gaussian = sqrtf(squares / (float)columns) * gaussian_step, uniform = largest / (-low + 0.5f);
    if (!isfinite(gaussian)) return NAN;
    float scale = one_where_zero(gaussian), best = INFINITY;
    for (int s = 0; s < starts; s++) {
        const float part = (float)s / (float)(starts - 1);
        const float start = one_where_zero(powf(gaussian, 1.0f - part) * powf(uniform, part));
        fit(row, columns, start, low, high, &dot, &norm);
        const float error = start * (start * norm - 2.0f * dot);
        if (error < best) {
            best = error;
            scale = start;
        }
    }
    for (int i = 0; i < iterations; i++) {
        fit(row, columns, scale, low, high, &dot, &norm);
        if (norm > 0.0f) scale = dot / norm;
    }
    return scale;
}

/* Words of `planes` planar digits; digits past the row's end are those of zero weights (`digits` is padded). */
static void join(const uint8_t *restrict digits, uint32_t *restrict words, int64_t width, uint32_t base, int planes) {
    for (int64_t i = 0; i < width; i++) words[i] = digits[(planes - 1) * width + i];
    for (int j = planes - 2; j >= 0; j--)
        for (int64_t i = 0; i < width; i++) words[i] = words[i] * base + digits[j * width + i];
}

static void pack_row(const uint8_t *restrict digits, uint32_t *restrict words, uint8_t *restrict out, int64_t columns,
                     int bits) {
    if (bits == 1) {
        const int64_t width = ceil_div(columns, 5);
        join(digits, words, width, 3, 5);
        for (int64_t i = 0; i < width; i++) out[i] = (uint8_t)words[i];
    } else if (bits == 2) {
        const int64_t width = ceil_div(columns, 3), part = ceil_div(width, 8);
        join(digits, words, width, 5, 3);
        memset(words + width, 0, (size_t)(8 * part - width) * sizeof(uint32_t));
        for (int p = 0; p < 7; p++)
            for (int64_t i = 0; i < part; i++)
                out[p * part + i] = (uint8_t)(words[p * part + i] | ((words[7 * part + i] >> p) & 1u) << 7);
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

/* weight: [rows, columns] of `dtype`; dense: uint8 [rows, row_bytes_out]; scale: float [rows]; scratch: at least 5 * columns + 512 bytes, aligned to 4. */
void bitsfusion_quantize(const void *weight, uint8_t *dense, float *scale, void *scratch, int64_t rows,
                         int64_t columns, int64_t row_bytes_out, int dtype, int bits, int balance, float gaussian_step,
                         int starts, int iterations) {
    const int half = half_range(bits);
    const float low = (float)-half, high = (float)(balance || bits == 8 ? half : half - 1);
    float *row = (float *)scratch;
    uint32_t *words = (uint32_t *)scratch; /* the row is no longer needed once its digits are known */
    uint8_t *digits = (uint8_t *)scratch + 4 * columns + 256;
    for (int64_t r = 0; r < rows; r++) {
        load_row(weight, r * columns, columns, dtype, row);
        scale[r] = alternate(row, columns, low, high, gaussian_step, starts, iterations);
        if (!isfinite(scale[r])) continue; /* the caller refuses the weight */
        const float inverse = 1.0f / scale[r];
        for (int64_t i = 0; i < columns; i++) {
            float k = rintf(row[i] * inverse);
            k = k < low ? low : k > high ? high : k;
            digits[i] = (uint8_t)((int)k + half);
        }
        memset(digits + columns, half, 128);
        pack_row(digits, words, dense + r * row_bytes_out, columns, bits);
    }
}
