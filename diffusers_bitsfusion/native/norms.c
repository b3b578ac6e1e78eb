/* Norms of groups of channels, with what diffusers adds before and the activation after, in one pass over memory; the
 * same in torch: ops/norms.py.
 *
 * Sums of values, and of their squares, are taken of blocks in fp32, relative to a pivot from the block or to the mean of
 * what came before, and of all blocks in double precision: a mean that is large beside the deviation loses nothing. */
#include "exponential.h"

enum {
    RUN = 512,      /* values of a block of a run */
    FEW = 16,       /* values whose mean is a run's first pivot */
    CHANNELS = 640, /* that are summed side by side in images that are channels last */
    GROUPS = 128    /* of these at the most */
};

#define FOR_DTYPE(DO)                    \
    if (dtype == FLOAT32) { DO(FLOAT32) } \
    else { DO(BFLOAT16) }

INLINE void store(void *out, int64_t i, float value, int dtype) {
    if (dtype == FLOAT32) ((float *)out)[i] = value;
    else ((uint16_t *)out)[i] = bf16_of(value);
}

typedef struct {
    double count, sum, square;
} Moments;

/* Adds `count` values whose differences from a pivot, and their squares, have these sums. */
INLINE void add_block(Moments *m, int64_t count, double pivot, double sum, double square) {
    const double n = (double)count;
    m->count += n;
    m->sum += n * pivot + sum;
    m->square += square + pivot * (2.0 * sum + n * pivot);
}

/* Adds a run of values, each with `shift`; in halves, whose sums a processor takes side by side. */
INLINE void add_run(Moments *m, const void *x, int64_t first, int64_t count, float shift, int dtype) {
    for (int64_t start = first, end = first + count; start < end; start += RUN) {
        const int64_t width = min64(RUN, end - start), half = width / 2, middle = start + half;
        float pivot = 0.0f, sum = 0.0f, other_sum = 0.0f, square = 0.0f, other_square = 0.0f;
        if (m->count > 0.0) pivot = (float)(m->sum / m->count) - shift;
        else {
            const int64_t few = min64(width, FEW);
            for (int64_t i = start; i < start + few; i++) pivot += load(x, i, dtype);
            pivot /= (float)few;
        }
        for (int64_t i = 0; i < half; i++) {
            const float value = load(x, start + i, dtype) - pivot, other = load(x, middle + i, dtype) - pivot;
            sum += value;
            other_sum += other;
            square += value * value;
            other_square += other * other;
        }
        if (width % 2) {
            const float value = load(x, start + width - 1, dtype) - pivot;
            sum += value;
            square += value * value;
        }
        add_block(m, width, (double)pivot + shift, sum + other_sum, square + other_square);
    }
}

/* The mean is the sum of two numbers in fp32, of which the second is what the first one lacks. */
typedef struct {
    float mean, rest, factor;
} Statistics;

INLINE Statistics statistics_of(const Moments *m, double eps) {
    const double mean = m->sum / m->count, variance = m->square / m->count - mean * mean;
    const float rounded = (float)mean; /* NaN stays NaN in all three. */
    return (Statistics){rounded, (float)(mean - rounded), (float)(1.0 / sqrt((variance < 0.0 ? 0.0 : variance) + eps))};
}

typedef struct {
    const void *x;              /* [batch, channels, positions], or channels last: [batch, positions, channels] */
    const float *weight, *bias; /* [channels] */
    const float *shift;         /* [batch, channels], added to x before; may be NULL */
    double *moments;            /* [batch, blocks, groups, 2] of images that are channels last: sums, and of squares */
    void *out;                  /* as x, of `dtype` fp32 or bf16, too */
    int64_t channels, positions, groups, dtype, silu;
    int64_t block; /* positions of a row of images that are channels last */
    double eps;
} GroupNormArguments;

TAKES(group_norm, GroupNormArguments)
TAKES(group_moments, GroupNormArguments)
TAKES(group_norm_channels_last, GroupNormArguments)

/* A row is a group of an image. */
INLINE void norm_planes(const GroupNormArguments *a, int64_t row, const int dtype, const int silu) {
    const int64_t width = a->channels / a->groups, first = (row % a->groups) * width, positions = a->positions;
    const int64_t start = row * width * positions;
    const float *const shift = a->shift == NULL ? NULL : a->shift + row / a->groups * a->channels;
    Moments moments = {0};
    if (shift == NULL) add_run(&moments, a->x, start, width * positions, 0.0f, dtype);
    else
        for (int64_t c = 0; c < width; c++)
            add_run(&moments, a->x, start + c * positions, positions, shift[first + c], dtype);
    const Statistics own = statistics_of(&moments, a->eps);
    for (int64_t c = 0; c < width; c++) {
        const float added = shift == NULL ? 0.0f : shift[first + c];
        const float scale = own.factor * a->weight[first + c], bias = a->bias[first + c] - own.rest * scale;
        const int64_t end = start + (c + 1) * positions;
        for (int64_t i = end - positions; i < end; i++) {
            const float y = (load(a->x, i, dtype) + added - own.mean) * scale + bias;
            store(a->out, i, silu ? silu_of(y) : y, dtype);
        }
    }
}

#define EACH_ROW(NORM)                                                                      \
    const int64_t dtype = a->dtype;                                                         \
    if (dtype == FLOAT32 && a->silu) { NORM(FLOAT32, 1) }                                   \
    else if (dtype == FLOAT32) { NORM(FLOAT32, 0) }                                         \
    else if (a->silu) { NORM(BFLOAT16, 1) }                                                 \
    else { NORM(BFLOAT16, 0) }

/* silu(groups of x + shift, each normalised), or without the activation. */
EXPORT void bitsfusion_group_norm(const GroupNormArguments *a, int64_t start, int64_t stop) {
#define NORM(DTYPE, SILU) \
    for (int64_t row = start; row < stop; row++) norm_planes(a, row, DTYPE, SILU);
    EACH_ROW(NORM)
#undef NORM
}

/* Adds the values of `width` channels, each with its shift, at `count` positions to the moments of their groups; four
 * positions at a time, so that fewer sums are read and written. */
INLINE void add_channels(const GroupNormArguments *a, int64_t start, int64_t count, int64_t first_channel, int64_t width,
                         const float *restrict shift, double *restrict moments, int dtype) {
    const void *const restrict x = a->x;
    const int64_t stride = a->channels, middle = start + count / 2 * stride;
    float pivot[CHANNELS], sums[CHANNELS] = {0}, squares[CHANNELS] = {0};
    double sum[CHANNELS], square[CHANNELS];
    for (int64_t c = 0; c < width; c++) pivot[c] = load(x, middle + c, dtype) + shift[c];
#define AT(P) (load(x, first + (P) * stride + c, dtype) + shift[c] - pivot[c])
    int64_t p = 0;
    for (; p + 4 <= count; p += 4) {
        const int64_t first = start + p * stride;
        for (int64_t c = 0; c < width; c++) {
            const float v0 = AT(0), v1 = AT(1), v2 = AT(2), v3 = AT(3);
            sums[c] += v0 + v1 + (v2 + v3);
            squares[c] += v0 * v0 + v1 * v1 + (v2 * v2 + v3 * v3);
        }
    }
    for (; p < count; p++) {
        const int64_t first = start + p * stride;
        for (int64_t c = 0; c < width; c++) {
            const float value = AT(0);
            sums[c] += value;
            squares[c] += value * value;
        }
    }
#undef AT
    const double n = (double)count;
    for (int64_t c = 0; c < width; c++) {
        const double from = pivot[c], s = sums[c];
        sum[c] = n * from + s;
        square[c] = squares[c] + from * (2.0 * s + n * from);
    }
    const int64_t group_width = a->channels / a->groups;
    for (int64_t c = 0; c < width;) {
        const int64_t group = (first_channel + c) / group_width;
        for (const int64_t end = min64((group + 1) * group_width - first_channel, width); c < end; c++) {
            moments[2 * group] += sum[c];
            moments[2 * group + 1] += square[c];
        }
    }
}

INLINE void shift_of(const GroupNormArguments *a, int64_t image, int64_t first, int64_t width, float *shift) {
    if (a->shift == NULL) memset(shift, 0, (size_t)width * sizeof *shift);
    else memcpy(shift, a->shift + image * a->channels + first, (size_t)width * sizeof *shift);
}

/* Moments of images that are channels last: of each group in a block of positions, which is a row. */
EXPORT void bitsfusion_group_moments(const GroupNormArguments *a, int64_t start, int64_t stop) {
    const int64_t channels = a->channels, blocks = ceil_div(a->positions, a->block), dtype = a->dtype;
    float shift[CHANNELS];
    for (int64_t row = start; row < stop; row++) {
        const int64_t position = row % blocks * a->block, image = row / blocks;
        const int64_t first = (image * a->positions + position) * channels;
        const int64_t count = min64(a->block, a->positions - position);
        double *const moments = a->moments + 2 * row * a->groups;
        memset(moments, 0, 2 * (size_t)a->groups * sizeof *moments);
        for (int64_t c = 0; c < channels; c += CHANNELS) {
            const int64_t width = min64(CHANNELS, channels - c);
            shift_of(a, image, c, width, shift);
#define DO(DTYPE) add_channels(a, first + c, count, c, width, shift, moments, DTYPE);
            FOR_DTYPE(DO)
#undef DO
        }
    }
}

INLINE void statistics_of_image(const GroupNormArguments *a, int64_t image, Statistics *statistics) {
    const int64_t groups = a->groups, blocks = ceil_div(a->positions, a->block);
    const double *const moments = a->moments + 2 * image * blocks * groups;
    for (int64_t g = 0; g < groups; g++) {
        Moments sum = {(double)(a->channels / groups * a->positions), 0.0, 0.0};
        for (int64_t b = 0; b < blocks; b++) {
            sum.sum += moments[2 * (b * groups + g)];
            sum.square += moments[2 * (b * groups + g) + 1];
        }
        statistics[g] = statistics_of(&sum, a->eps);
    }
}

INLINE void norm_block(const GroupNormArguments *a, int64_t row, const Statistics *statistics, const int dtype,
                       const int silu) {
    const void *const restrict x = a->x;
    void *const restrict out = a->out;
    const int64_t channels = a->channels, group_width = channels / a->groups;
    const int64_t blocks = ceil_div(a->positions, a->block), image = row / blocks;
    const int64_t position = row % blocks * a->block, end = min64(position + a->block, a->positions);
    float shift[CHANNELS], mean[CHANNELS], scale[CHANNELS], bias[CHANNELS];
    for (int64_t c = 0; c < channels; c += CHANNELS) {
        const int64_t width = min64(CHANNELS, channels - c);
        shift_of(a, image, c, width, shift);
        for (int64_t i = 0; i < width;) {
            const int64_t group = (c + i) / group_width;
            for (const int64_t stop = min64((group + 1) * group_width - c, width); i < stop; i++) {
                mean[i] = statistics[group].mean;
                scale[i] = statistics[group].factor * a->weight[c + i];
                bias[i] = a->bias[c + i] - statistics[group].rest * scale[i];
            }
        }
        for (int64_t p = position; p < end; p++) {
            const int64_t place = (image * a->positions + p) * channels + c;
            for (int64_t i = 0; i < width; i++) {
                const float y = (load(x, place + i, dtype) + shift[i] - mean[i]) * scale[i] + bias[i];
                store(out, place + i, silu ? silu_of(y) : y, dtype);
            }
        }
    }
}

/* `bitsfusion_group_norm` of images that are channels last, from their moments; a row is a block of positions. */
EXPORT void bitsfusion_group_norm_channels_last(const GroupNormArguments *a, int64_t start, int64_t stop) {
    const int64_t blocks = ceil_div(a->positions, a->block);
    Statistics statistics[GROUPS];
#define NORM(DTYPE, SILU)                                                                           \
    for (int64_t row = start; row < stop; row++) {                                                  \
        if (row == start || row % blocks == 0) statistics_of_image(a, row / blocks, statistics);   \
        norm_block(a, row, statistics, DTYPE, SILU);                                                \
    }
    EACH_ROW(NORM)
#undef NORM
}
