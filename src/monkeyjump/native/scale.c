/* Propulsion's gated scaling of a layer's outputs, float32: one pass forward, one backward. See monkeyjump/ops/scale.py.

       out[n, o] = y[n, o] (1 + m[n] gain[o])
       gy[n, o]  = g[n, o] (1 + m[n] gain[o])
       ggain[o]  = sum_n m[n] g[n, o] y[n, o] */

#include "thin.h"

CLONED static void forward_rows(const float *y, const float *gain, const float *gate, int64_t width, int64_t n,
                                int64_t last, float *out) {
    for (; n < last; n++)
        for (int64_t i = 0; i < width; i += LANES)
            store(out + n * width + i, load(y + n * width + i) * (splat(1) + splat(gate[n]) * load(gain + i)));
}

CLONED static void backward_rows(const float *g, const float *y, const float *gain, const float *gate, int64_t width,
                                 int64_t n, int64_t last, float *gy, float *ggain) {
    for (; n < last; n++)
        for (int64_t i = 0; i < width; i += LANES) {
            const int64_t at = n * width + i;
            const v8 grad = load(g + at), m = splat(gate[n]);
            store(gy + at, grad * (splat(1) + m * load(gain + i)));
            store(ggain + i, load(ggain + i) + m * grad * load(y + at));
        }
}

/* y [N, O], gain [O], gate [N] -> out [N, O]. */
void mj_scale_forward(const float *y, const float *gain, const float *gate, int64_t rows, int64_t width, int threads,
                      float *out) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t first, last;
        own_rows(rows, &first, &last);
        forward_rows(y, gain, gate, width, first, last, out);
    }
}

/* Writes gy [N, O] and ggain [O]. Returns 0, or 1 where there is no memory for the sums of the threads. */
int mj_scale_backward(const float *g, const float *y, const float *gain, const float *gate, int64_t rows, int64_t width,
                      int threads, float *gy, float *ggain) {
    float *parts = calloc((size_t)threads * (size_t)width, sizeof *parts);
    if (!parts) return 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t first, last;
        own_rows(rows, &first, &last);
        backward_rows(g, y, gain, gate, width, first, last, gy, parts + (size_t)omp_get_thread_num() * (size_t)width);
    }
    add_up(parts, (size_t)width, threads);
    memcpy(ggain, parts, (size_t)width * sizeof *ggain);
    free(parts);
    return 0;
}
