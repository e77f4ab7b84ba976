/* The low-rank update beside a frozen linear layer, float32: what monkeyjump/ops/low_rank.py states in torch.

       u[n, k]  = gate[n] scale sum_i keep[n, i] x[n, i] A[k, i]        x [N, I], A [r, I]
       y[n, o]  = bias[o] + sum_k u[n, k] B[o, k]                       y [N, O], B [O, r]

   and its backward pass, given g = dL/dy:

       gB[o, k]  = sum_n u[n, k] g[n, o]
       v[n, k]   = gate[n] scale sum_o g[n, o] B[o, k]
       gA[k, i]  = sum_n v[n, k] keep[n, i] x[n, i]
       gx[n, i]  = keep[n, i] sum_k v[n, k] A[k, i]

   y and gx are where the BLAS then adds the frozen layer's own product, which costs it nothing: that saves a pass
   over each. I and O are multiples of eight. Sums over rows are taken per thread and then in the order of the threads: the same
   every time. */

#include "thin.h"

typedef struct {
    const float *x, *a, *bt; /* [N, I], [r, I], [r, O] */
    const float *bias;       /* [O] or NULL */
    const float *gate;       /* [N], `stride` numbers apart, or NULL for 1 */
    const uint8_t *bits;     /* one bit per element of x, or NULL */
    int64_t stride, in, out, rank;
    float scale;
} Operands;

typedef struct {
    const float *g, *u; /* [N, O], [N, r] */
    float *gx;          /* [N, I] or NULL */
    float *ga, *gbt;    /* [r, I] or NULL, [r, O]: sums of one thread */
} Gradients;

INLINE void weigh(const Operands *op, int64_t n, int ks, int rows, float c[][2]) {
    for (int row = 0; row < rows; row++)
        for (int k = 0; k < ks; k++) c[row][k] *= op->scale * (op->gate ? op->gate[(n + row) * op->stride] : 1);
}

INLINE const uint8_t *bits_of(const Operands *op, int64_t n) {
    return op->bits ? op->bits + n * op->in / LANES : NULL;
}

INLINE void forward_columns(const Operands *op, float *u, float *y, int64_t n, int rows, int64_t k, int ks) {
    float c[BLOCK][2];
    dots(op->x + n * op->in, op->in, bits_of(op, n), op->a + k * op->in, ks, rows, c);
    weigh(op, n, ks, rows, c);
    for (int row = 0; row < rows; row++)
        for (int j = 0; j < ks; j++) u[(n + row) * op->rank + k + j] = c[row][j];
    put_rows(y + n * op->out, op->out, NULL, op->bias, op->bt + k * op->out, ks, rows, c, k == 0);
}

INLINE void backward_columns(const Operands *op, const Gradients *of, int64_t n, int rows, int64_t k, int ks) {
    float v[BLOCK][2], u[BLOCK][2];
    const float *g = of->g + n * op->out;
    for (int row = 0; row < rows; row++)
        for (int j = 0; j < ks; j++) u[row][j] = of->u[(n + row) * op->rank + k + j];
    dots(g, op->out, NULL, op->bt + k * op->out, ks, rows, v);
    sum_rows(g, op->out, NULL, of->gbt + k * op->out, ks, rows, u);
    weigh(op, n, ks, rows, v);
    if (of->ga) sum_rows(op->x + n * op->in, op->in, bits_of(op, n), of->ga + k * op->in, ks, rows, v);
    if (of->gx) put_rows(of->gx + n * op->in, op->in, bits_of(op, n), NULL, op->a + k * op->in, ks, rows, v, k == 0);
}

/* Two columns at a time while there are two, BLOCK rows at a time while there are as many. */
#define ALL_COLUMNS(step, rows)                                             \
    do {                                                                    \
        int64_t k = 0;                                                      \
        for (; k + 2 <= op->rank; k += 2) step(rows, k, 2);                 \
        if (k < op->rank) step(rows, k, 1);                                 \
    } while (0)
#define ALL_ROWS(step)                                                      \
    do {                                                                    \
        for (; n + BLOCK <= last; n += BLOCK) ALL_COLUMNS(step, BLOCK);     \
        for (; n < last; n++) ALL_COLUMNS(step, 1);                         \
    } while (0)

CLONED static void forward_rows(const Operands *op, float *u, float *y, int64_t n, int64_t last) {
#define STEP(rows, k, ks) forward_columns(op, u, y, n, rows, k, ks)
    ALL_ROWS(STEP);
#undef STEP
}

CLONED static void backward_rows(const Operands *op, const Gradients *of, int64_t n, int64_t last) {
#define STEP(rows, k, ks) backward_columns(op, of, n, rows, k, ks)
    ALL_ROWS(STEP);
#undef STEP
}

static void transpose(const float *matrix, int64_t rows, int64_t columns, float *out) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t column = 0; column < columns; column++) out[column * rows + row] = matrix[row * columns + column];
}

/* Writes u [N, r] and y. Returns 0, or 1 where there is no memory for B transposed. */
int mj_low_rank_forward(const float *x, const float *a, const float *b, const float *bias, const float *gate,
                        const uint8_t *bits, int64_t stride, int64_t rows, int64_t in, int64_t out, int64_t rank,
                        float scale, int threads, float *u, float *y) {
    float *bt = malloc(sizeof *bt * (size_t)(rank * out));
    if (!bt) return 1;
    transpose(b, out, rank, bt);
    const Operands op = {x, a, bt, bias, gate, bits, stride, in, out, rank, scale};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t first, last;
        own_rows(rows, &first, &last);
        forward_rows(&op, u, y, first, last);
    }
    free(bt);
    return 0;
}

/* Writes gx, gA and gB. `gx` may be NULL; `x` and `ga` are NULL where A is frozen. Returns 0, or 1 where there is no
   memory for the sums of the threads. */
int mj_low_rank_backward(const float *g, const float *x, const float *a, const float *b, const float *u,
                         const float *gate, const uint8_t *bits, int64_t stride, int64_t rows, int64_t in,
                         int64_t out, int64_t rank, float scale, int threads, float *gx, float *ga, float *gb) {
    const size_t wide = (size_t)(rank * out), size = wide + (ga ? (size_t)(rank * in) : 0);
    float *bt = calloc(wide + (size_t)threads * size, sizeof *bt);
    if (!bt) return 1;
    transpose(b, out, rank, bt);
    float *sums = bt + wide;
    const Operands op = {x, a, bt, NULL, gate, bits, stride, in, out, rank, scale};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *own = sums + (size_t)omp_get_thread_num() * size;
        const Gradients of = {g, u, gx, ga ? own + wide : NULL, own};
        int64_t first, last;
        own_rows(rows, &first, &last);
        backward_rows(&op, &of, first, last);
    }
    add_up(sums, size, threads);
    transpose(sums, rank, out, gb);
    if (ga) memcpy(ga, sums + wide, (size - wide) * sizeof *ga);
    free(bt);
    return 0;
}
