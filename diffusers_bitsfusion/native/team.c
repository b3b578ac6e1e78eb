/* Rows of a loop shared out over the threads that torch itself computes with.
 *
 * A second set of threads would take turns with torch's, which keep their cores busy for a while after each
 * operation. */
#include "common.h"

#include <stdatomic.h>

typedef void (*Loop)(void *arguments, int64_t start, int64_t stop);

/* GOMP_parallel, which OpenMP runtimes have for compiled code: calls a function on so many threads. */
typedef void (*Parallel)(void (*function)(void *), void *data, unsigned threads, unsigned flags);

typedef struct {
    Loop loop;
    void *arguments;
    int64_t rows, step;
    _Atomic int64_t next;
} Work;

static void take_ranges(void *shared) {
    Work *const work = shared;
    for (int64_t start; (start = atomic_fetch_add(&work->next, work->step)) < work->rows;)
        work->loop(work->arguments, start, min64(start + work->step, work->rows));
}

/* Calls `loop` for ranges that cover `rows`. */
EXPORT void bitsfusion_run(Parallel parallel, Loop loop, void *arguments, int64_t rows, int threads) {
    if (threads < 2) {
        loop(arguments, 0, rows);
        return;
    }
    Work work = {loop, arguments, rows, ceil_div(rows, threads), 0};
    parallel(take_ranges, &work, (unsigned)threads, 0);
}
