/* What decoding takes, for the loops that decode into layouts of their own. */
#ifndef BITSFUSION_DECODE_H
#define BITSFUSION_DECODE_H

#include "common.h"

typedef struct {
    const uint8_t *dense; /* [rows, row_bytes_in] */
    const float *scale;   /* [rows] */
    void *out;            /* [rows, columns] of `kind`, int8 being the codes */
    int64_t columns, row_bytes_in, bits, kind;
} DecodeArguments;

EXPORT void bitsfusion_decode(const DecodeArguments *a, int64_t start, int64_t stop);

#endif
