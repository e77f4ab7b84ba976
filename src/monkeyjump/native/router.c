/* What a router asks of the hidden states, float32: one pass for the similarities, one for the statistics of the
   centers. See monkeyjump/routing/gates.py and monkeyjump/routing/ema.py. */

#include <math.h>

#include "thin.h"

INLINE float norm_of(const float *row, int64_t width) {
    v8 square = splat(0);
    for (int64_t i = 0; i < width; i += LANES) square += load(row + i) * load(row + i);
    return sqrtf(sum(square));
}

INLINE float over_norm(const float *row, int64_t width) { return 1 / fmaxf(norm_of(row, width), 1e-12f); }

INLINE void cosine_columns(const float *h, const float *centers, const float *over, int64_t width, int64_t count,
                           int rows, int64_t c, int cs, float *out) {
    float dot[BLOCK][2];
    dots(h, width, NULL, centers + c * width, cs, rows, dot);
    for (int row = 0; row < rows; row++)
        for (int j = 0; j < cs; j++) out[row * count + c + j] = dot[row][j] * over[c + j];
}

INLINE void cosine_step(const float *h, const float *centers, const float *over, int64_t width, int64_t count, int rows,
                        float *out) {
    int64_t c = 0;
    for (; c + 2 <= count; c += 2) cosine_columns(h, centers, over, width, count, rows, c, 2, out);
    if (c < count) cosine_columns(h, centers, over, width, count, rows, c, 1, out);
    for (int row = 0; row < rows; row++) { /* the rows are in the first cache by now */
        const float over_row = over_norm(h + row * width, width);
        for (c = 0; c < count; c++) out[row * count + c] *= over_row;
    }
}

CLONED static void cosine_rows(const float *h, const float *centers, const float *over, int64_t width, int64_t count,
                               int64_t n, int64_t last, float *out) {
    for (; n + BLOCK <= last; n += BLOCK)
        cosine_step(h + n * width, centers, over, width, count, BLOCK, out + n * count);
    for (; n < last; n++) cosine_step(h + n * width, centers, over, width, count, 1, out + n * count);
}

/* out[n, c] = cosine of h[n] and centers[c], for h [N, d] and centers [C, d], d a multiple of eight; a norm below 1e-12
   counts as that. Returns 0, or 1 where there is no memory for the norms of the centers. */
int mj_cosines(const float *h, const float *centers, int64_t rows, int64_t width, int64_t count, int threads,
               float *out) {
    float *over = malloc(sizeof *over * (size_t)count);
    if (!over) return 1;
    for (int64_t c = 0; c < count; c++) over[c] = over_norm(centers + c * width, width);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t first, last;
        own_rows(rows, &first, &last);
        cosine_rows(h, centers, over, width, count, first, last, out);
    }
    free(over);
    return 0;
}

/* What a row counts with: 1 (or one over its norm), or 0 where it belongs to no center or holds what is not finite. */
INLINE float share_of(const float *row, const uint8_t *assigned, int64_t width, int64_t count, int unit) {
    int belongs = 0;
    for (int64_t c = 0; c < count; c++) belongs |= assigned[c];
    if (!belongs) return 0;
    const float norm = norm_of(row, width);
    if (!isfinite(norm)) return 0;
    return unit ? 1 / fmaxf(norm, 1e-12f) : 1;
}

INLINE void sum_columns(const float *h, const uint8_t *assigned, const float *share, int64_t width, int64_t count,
                        int rows, int64_t c, int cs, float *sums) {
    float w[BLOCK][2];
    for (int row = 0; row < rows; row++)
        for (int j = 0; j < cs; j++) w[row][j] = assigned[row * count + c + j] ? share[row] : 0;
    sum_rows(h, width, NULL, sums + c * width, cs, rows, w);
}

INLINE void sum_step(const float *h, const uint8_t *assigned, const float *share, int64_t width, int64_t count,
                     int rows, float *sums, float *counts) {
    int64_t c = 0;
    for (; c + 2 <= count; c += 2) sum_columns(h, assigned, share, width, count, rows, c, 2, sums);
    if (c < count) sum_columns(h, assigned, share, width, count, rows, c, 1, sums);
    for (int row = 0; row < rows; row++)
        for (c = 0; c < count; c++) counts[c] += assigned[row * count + c];
}

CLONED static void sum_states(const float *h, const uint8_t *assigned, int64_t width, int64_t count, int unit,
                              int64_t n, int64_t last, float *sums, float *counts) {
    while (n < last) {
        float share[BLOCK];
        const int rows = n + BLOCK <= last ? BLOCK : 1;
        int all = 1;
        for (int row = 0; row < rows; row++) {
            share[row] = share_of(h + (n + row) * width, assigned + (n + row) * count, width, count, unit);
            all &= share[row] != 0;
        }
        if (all && rows == BLOCK)
            sum_step(h + n * width, assigned + n * count, share, width, count, BLOCK, sums, counts);
        else /* a row that does not count is left out: zero times infinity is no zero */
            for (int row = 0; row < rows; row++)
                if (share[row] != 0)
                    sum_step(h + (n + row) * width, assigned + (n + row) * count, share + row, width, count, 1, sums,
                             counts);
        n += rows;
    }
}

/* sums[c] = sum of the rows of h [N, d] that assigned [N, C] gives to c, as unit vectors or as they are; counts[c]: how
   many. Returns 0, or 1 where there is no memory for the sums of the threads. */
int mj_center_sums(const float *h, const uint8_t *assigned, int64_t rows, int64_t width, int64_t count, int unit,
                   int threads, float *sums, float *counts) {
    const size_t wide = (size_t)(count * width), size = wide + (size_t)count;
    float *parts = calloc((size_t)threads * size, sizeof *parts);
    if (!parts) return 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *own = parts + (size_t)omp_get_thread_num() * size;
        int64_t first, last;
        own_rows(rows, &first, &last);
        sum_states(h, assigned, width, count, unit, first, last, own, own + wide);
    }
    add_up(parts, size, threads);
    memcpy(sums, parts, wide * sizeof *sums);
    memcpy(counts, parts + wide, (size_t)count * sizeof *counts);
    free(parts);
    return 0;
}
