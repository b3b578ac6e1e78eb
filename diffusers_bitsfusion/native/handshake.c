/* What the loader asks a library: its sources, its sizes, and which of the targets in targets.py this processor takes,
 * by its place there. */
#include "dense.h"

#ifndef BITSFUSION_SOURCES
#define BITSFUSION_SOURCES "unknown"
#endif

EXPORT const char *bitsfusion_sources(void) { return BITSFUSION_SOURCES; }

/* What a row takes in memory; compared with dense_form.py. */
EXPORT int64_t bitsfusion_row_bytes(int64_t columns, int bits) { return bytes_of_row(columns, bits); }

EXPORT int bitsfusion_target(void) {
#if defined(__x86_64__) || defined(_M_X64)
#define HAS(FEATURE) __builtin_cpu_supports(FEATURE)
    __builtin_cpu_init();
    if (!(HAS("avx2") && HAS("fma") && HAS("bmi2"))) return 0;
    if (!(HAS("avx512f") && HAS("avx512bw") && HAS("avx512cd") && HAS("avx512dq") && HAS("avx512vl"))) return 1;
    if (!(HAS("avx512vbmi") && HAS("avx512vnni"))) return 2;
    return HAS("avx512bf16") ? 4 : 3;
#undef HAS
#else
    return 0;
#endif
}
