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

typedef struct {
    const float *centers, *over; /* [C, d], one over their norms [C] */
    int64_t width, count, experts, k;
    float temperature, total; /* what the gates of the chosen sum to; 0: their share of the softmax */
} Rule;

/* Gates and choice of one row from its logits [C]; adapter e takes center e mod C. Of equals the lower one is chosen. */
INLINE void choose(const Rule *rule, const float *logits, float *gates, uint8_t *chosen) {
    float top = -INFINITY, all = 0, kept = 0;
    for (int64_t e = 0; e < rule->experts; e++) {
        gates[e] = logits[e % rule->count];
        top = fmaxf(top, gates[e]);
    }
    for (int64_t e = 0; e < rule->experts; e++) {
        int64_t before = 0;
        for (int64_t other = 0; other < rule->experts; other++)
            before += other < e ? !(gates[other] < gates[e]) : gates[other] > gates[e];
        chosen[e] = before < rule->k;
    }
    for (int64_t e = 0; e < rule->experts; e++) {
        const float p = expf(gates[e] - top);
        all += p;
        gates[e] = chosen[e] ? p : 0;
        kept += gates[e];
    }
    const float factor = rule->total ? rule->total / kept : 1 / all;
    for (int64_t e = 0; e < rule->experts; e++) gates[e] *= factor;
}

CLONED static void route_rows(const Rule *rule, const float *h, int64_t n, int64_t last, float *logits, float *gates,
                              uint8_t *chosen) {
    while (n < last) {
        const int rows = n + BLOCK <= last ? BLOCK : 1;
        float *own = logits + n * rule->count;
        if (rows == BLOCK)
            cosine_step(h + n * rule->width, rule->centers, rule->over, rule->width, rule->count, BLOCK, own);
        else
            cosine_step(h + n * rule->width, rule->centers, rule->over, rule->width, rule->count, 1, own);
        for (int64_t i = 0; i < rows * rule->count; i++) own[i] /= rule->temperature;
        for (int row = 0; row < rows; row++, n++)
            choose(rule, logits + n * rule->count, gates + n * rule->experts, chosen + n * rule->experts);
    }
}

/* For h [N, d] and centers [C, d], d a multiple of eight: logits [N, C], the cosine of every row and center over the
   temperature (a norm below 1e-12 counts as that); gates [N, E] and chosen [N, E]. Returns 0, or 1 where there is no
   memory for the norms of the centers. */
int mj_route(const float *h, const float *centers, int64_t rows, int64_t width, int64_t count, int64_t experts,
             int64_t k, float temperature, float total, int threads, float *logits, float *gates, uint8_t *chosen) {
    float *over = malloc(sizeof *over * (size_t)count);
    if (!over) return 1;
    for (int64_t c = 0; c < count; c++) over[c] = over_norm(centers + c * width, width);
    const Rule rule = {centers, over, width, count, experts, k, temperature, total};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t first, last;
        own_rows(rows, &first, &last);
        route_rows(&rule, h, first, last, logits, gates, chosen);
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
