/* Products of a wide matrix with a thin one, float32: what the low-rank updates and the routers are made of.

   A BLAS is made for matrices that are wide in every direction. Here one side has two to sixteen columns, so that all
   the time goes into passing over the wide matrix. Each function below passes over it once: a few rows at a time (a
   load of the thin matrix serves them all), two thin columns at a time, the rows after these fetched ahead (several
   short streams of rows are more than the processor foresees by itself). The width is a multiple of eight. */

#ifndef MONKEYJUMP_THIN_H
#define MONKEYJUMP_THIN_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_thread_num(void) { return 0; }
static inline int omp_get_num_threads(void) { return 1; }
#endif

/* The compiler lowers these to what the machine has: two SSE registers, one AVX register, ... */
typedef float v8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));

#define LANES 8
#define BLOCK 4 /* rows at a time */
#define INLINE static inline __attribute__((always_inline))

/* One version of a function for each level of instructions; the loader takes the best that the machine has. */
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#define CLONED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONED
#endif

INLINE v8 load(const float *p) {
    v8 v;
    memcpy(&v, p, sizeof v); /* one unaligned load */
    return v;
}

INLINE void store(float *p, v8 v) { memcpy(p, &v, sizeof v); }

INLINE v8 splat(float f) { return (v8){f, f, f, f, f, f, f, f}; }

INLINE float sum(v8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

/* Eight elements, zero where the bit of an element is zero; all of them where there are no bits. `at` counts elements. */
INLINE v8 masked(v8 v, const uint8_t *bits, int64_t at) {
    if (!bits) return v;
    const i8 place = {1, 2, 4, 8, 16, 32, 64, 128};
    const int32_t b = bits[at / LANES];
    const i8 kept = ((i8){b, b, b, b, b, b, b, b} & place) != 0;
    return (v8)((i8)v & kept);
}

/* Rows [*first, *last) of the calling thread. */
INLINE void own_rows(int64_t rows, int64_t *first, int64_t *last) {
    const int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
    *first = rows * part / parts;
    *last = rows * (part + 1) / parts;
}

/* The sums of all threads into those of the first, always in the same order. */
static inline void add_up(float *sums, size_t size, int threads) {
    for (int thread = 1; thread < threads; thread++)
        for (size_t i = 0; i < size; i++) sums[i] += sums[(size_t)thread * size + i];
}

/* out[row][k] = sum_i x[row, i] w[k, i] over the elements that `bits` keeps, for one or two of the k. */
INLINE void dots(const float *x, int64_t width, const uint8_t *bits, const float *w, int ks, int rows, float out[][2]) {
    v8 acc[BLOCK][2];
    for (int row = 0; row < rows; row++)
        for (int k = 0; k < ks; k++) acc[row][k] = splat(0);
    for (int64_t i = 0; i < width; i += LANES)
        for (int row = 0; row < rows; row++) {
            const int64_t at = row * width + i;
            __builtin_prefetch(x + rows * width + at);
            const v8 value = masked(load(x + at), bits, at);
            for (int k = 0; k < ks; k++) acc[row][k] += value * load(w + k * width + i);
        }
    for (int row = 0; row < rows; row++)
        for (int k = 0; k < ks; k++) out[row][k] = sum(acc[row][k]);
}

/* y[row, i] = start[i] + sum_k c[row][k] w[k, i] in the elements that `bits` keeps, zero in the others; without a start
   the sum begins at zero. Columns after the first two are added to y: they are not `fresh`. */
INLINE void put_rows(float *y, int64_t width, const uint8_t *bits, const float *start, const float *w, int ks, int rows,
                     float c[][2], int fresh) {
    for (int64_t i = 0; i < width; i += LANES) {
        const v8 w0 = load(w + i), w1 = ks == 2 ? load(w + width + i) : splat(0);
        const v8 first = start ? load(start + i) : splat(0);
        for (int row = 0; row < rows; row++) {
            const int64_t at = row * width + i;
            __builtin_prefetch(y + rows * width + at, 1);
            v8 update = splat(c[row][0]) * w0;
            if (ks == 2) update += splat(c[row][1]) * w1;
            store(y + at, (fresh ? first : load(y + at)) + masked(update, bits, at));
        }
    }
}

/* total[k, i] += sum over rows of c[row][k] x[row, i] over the elements that `bits` keeps. */
INLINE void sum_rows(const float *x, int64_t width, const uint8_t *bits, float *total, int ks, int rows, float c[][2]) {
    for (int64_t i = 0; i < width; i += LANES) {
        v8 part[2] = {load(total + i), ks == 2 ? load(total + width + i) : splat(0)};
        for (int row = 0; row < rows; row++) {
            const int64_t at = row * width + i;
            __builtin_prefetch(x + rows * width + at);
            const v8 value = masked(load(x + at), bits, at);
            for (int k = 0; k < ks; k++) part[k] += splat(c[row][k]) * value;
        }
        for (int k = 0; k < ks; k++) store(total + k * width + i, part[k]);
    }
}

#endif
