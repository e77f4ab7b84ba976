/* The selective scan of Mamba and its backward pass, float32: what monkeyjump/mamba/scan/reference.py states in torch.

       e[n]  = exp(delta[d, t] A[d, n])
       h[n] <- e[n] h[n] + delta[d, t] u[d, t] B[t, n]         for t = 0 .. L - 1, from a given state or zero
       y[d, t] = sum_n h[n] C[t, n] + D[d] u[d, t]

   and, walking back with g = dL/dh and q = dL/dy:

       g[n]  += q[d, t] C[t, n]                                gC[t, n] += q h[n] over all d
       gB[t, n] += g[n] delta u over all d                     w[n] = g[n] e[n] h_before[n]
       gA[d, n] += w[n] delta over all t                       gu[d, t] = delta sum_n g[n] B[t, n] + D[d] q
       gdelta[d, t] = sum_n w[n] A[d, n] + u sum_n g[n] B      gD[d] += q u over all t
       g[n]  *= e[n]

   The lanes of a vector are channels d, which do not depend on each other: no sum across lanes is needed but those of
   gB and gC, taken once for a whole group of channels. TILE channels go together over CHUNK steps at a time, gathered
   into local buffers, so that any strides of u, delta, y and their gradients will do. The forward pass keeps the
   states at the beginnings of the chunks (checkpoints); the backward pass computes those in between again.

   All sums are taken in an order that does not depend on the number of threads. */

#include "thin.h"

#define WIDTH 2                /* vectors side by side */
#define TILE (WIDTH * LANES)   /* channels that go together */
#define CHUNK 16               /* steps between two checkpoints */
#define GROUP 4                /* tiles of one batch row whose gB and gC are summed before they are written */
#define MOST_STATES 256

/* Eight of the sixteen numbers of two vectors. */
#if defined(__clang__) || __GNUC__ >= 12
#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIX(a, b, ...) __builtin_shuffle(a, b, (i8){__VA_ARGS__})
#endif

/* A [B, D, L] tensor of any strides. */
typedef struct {
    float *at;
    int64_t batch, channel, step;
} Strided;

typedef struct {
    Strided u, delta;
    const float *a, *b, *c, *skip; /* [D, N], [B, L, N], [B, L, N], [D] or NULL */
    int64_t channels, length, states, tiles, chunks;
} Operands;

typedef struct {
    v8 lane[WIDTH];
} Row; /* one number for each channel of a tile */

/* 2^x with a relative error of 1e-7; x beyond the exponents of float32 is taken as the nearest within. */
INLINE v8 exp2_of(v8 x) {
    for (int i = 0; i < LANES; i++) x[i] = x[i] < -126.0f ? -126.0f : x[i];
    for (int i = 0; i < LANES; i++) x[i] = x[i] > 127.0f ? 127.0f : x[i];
    const v8 shifted = x + splat(12582912.0f); /* 1.5 2^23: the last bits are now x rounded to an integer */
    const v8 f = x - (shifted - splat(12582912.0f));
    v8 p = splat(1.535336194e-4f);
    p = p * f + splat(1.339887440e-3f);
    p = p * f + splat(9.618437357e-3f);
    p = p * f + splat(5.550332471e-2f);
    p = p * f + splat(2.402264791e-1f);
    p = p * f + splat(6.931472029e-1f);
    p = p * f + splat(1.0f);
    return (v8)((i8)p + ((i8)shifted << 23));
}

INLINE Row zero(void) {
    Row row;
    for (int i = 0; i < WIDTH; i++) row.lane[i] = splat(0);
    return row;
}

/* Eight rows of eight numbers as their eight columns. */
INLINE void transpose(v8 row[LANES]) {
    v8 pair[LANES], four[LANES];
    for (int i = 0; i < LANES; i += 2) {
        pair[i] = MIX(row[i], row[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        pair[i + 1] = MIX(row[i], row[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int j = 0; j < 2; j++) {
            four[i + 2 * j] = MIX(pair[i + j], pair[i + 2 + j], 0, 1, 8, 9, 4, 5, 12, 13);
            four[i + 2 * j + 1] = MIX(pair[i + j], pair[i + 2 + j], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; i++) {
        row[i] = MIX(four[i], four[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        row[i + 4] = MIX(four[i], four[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

/* steps x TILE numbers of a tensor, those of channels beyond the last as zero. */
INLINE void gather(const Strided *from, int64_t batch, int64_t d, int64_t channels, int64_t t, int steps, Row *out) {
    const float *at = from->at + batch * from->batch + d * from->channel + t * from->step;
    const int whole = channels == TILE;
    if (whole && from->channel == 1) {
        for (int s = 0; s < steps; s++) memcpy(out + s, at + s * from->step, sizeof(Row));
    } else if (whole && steps == CHUNK && from->step == 1) {
        for (int i = 0; i < WIDTH; i++)
            for (int s = 0; s < CHUNK; s += LANES) {
                v8 row[LANES];
                for (int j = 0; j < LANES; j++) row[j] = load(at + (i * LANES + j) * from->channel + s);
                transpose(row);
                for (int j = 0; j < LANES; j++) out[s + j].lane[i] = row[j];
            }
    } else {
        memset(out, 0, sizeof(Row) * (size_t)steps);
        for (int i = 0; i < channels; i++)
            for (int s = 0; s < steps; s++) ((float *)(out + s))[i] = at[i * from->channel + s * from->step];
    }
}

INLINE void scatter(const Row *in, const Strided *to, int64_t batch, int64_t d, int64_t channels, int64_t t, int steps) {
    float *at = to->at + batch * to->batch + d * to->channel + t * to->step;
    const int whole = channels == TILE;
    if (whole && to->channel == 1) {
        for (int s = 0; s < steps; s++) memcpy(at + s * to->step, in + s, sizeof(Row));
    } else if (whole && steps == CHUNK && to->step == 1) {
        for (int i = 0; i < WIDTH; i++)
            for (int s = 0; s < CHUNK; s += LANES) {
                v8 row[LANES];
                for (int j = 0; j < LANES; j++) row[j] = in[s + j].lane[i];
                transpose(row);
                for (int j = 0; j < LANES; j++) store(at + (i * LANES + j) * to->channel + s, row[j]);
            }
    } else {
        for (int i = 0; i < channels; i++)
            for (int s = 0; s < steps; s++) at[i * to->channel + s * to->step] = ((const float *)(in + s))[i];
    }
}

/* [channels, N] into N rows and back; those of channels beyond the last are zero. */
INLINE void gather_states(const float *from, int64_t channels, int64_t states, float factor, Row *out) {
    memset(out, 0, sizeof(Row) * (size_t)states);
    for (int64_t i = 0; i < channels; i++)
        for (int64_t n = 0; n < states; n++) ((float *)out)[n * TILE + i] = from[i * states + n] * factor;
}

INLINE void scatter_states(const Row *in, int64_t channels, int64_t states, float *to) {
    for (int64_t i = 0; i < channels; i++)
        for (int64_t n = 0; n < states; n++) to[i * states + n] = ((const float *)in)[n * TILE + i];
}

/* One number for each channel from `d` on; zeros without `from`. */
INLINE Row gather_channels(const float *from, int64_t d, int64_t channels) {
    Row row = zero();
    if (from) memcpy(&row, from + d, sizeof(float) * (size_t)channels);
    return row;
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

#define LOG2_E 1.44269504088896341f
#define LN_2 0.69314718055994531f

/* One tile of one batch row over the whole length. */
INLINE void forward_tile(const Operands *op, const Strided *y, int64_t batch, int64_t tile, int64_t states,
                         const float *first, float *last, Row *kept) {
    const int64_t d = tile * TILE, channels = least(TILE, op->channels - d), at = (batch * op->channels + d) * states;
    Row a[MOST_STATES], h[MOST_STATES], u[CHUNK], delta[CHUNK], out[CHUNK];
    const Row skip = gather_channels(op->skip, d, channels);
    gather_states(op->a + d * states, channels, states, LOG2_E, a);
    if (first)
        gather_states(first + at, channels, states, 1, h);
    else
        memset(h, 0, sizeof(Row) * (size_t)states);
    for (int64_t t0 = 0; t0 < op->length; t0 += CHUNK) {
        const int steps = (int)least(CHUNK, op->length - t0);
        if (kept) memcpy(kept + t0 / CHUNK * states, h, sizeof(Row) * (size_t)states);
        gather(&op->u, batch, d, channels, t0, steps, u);
        gather(&op->delta, batch, d, channels, t0, steps, delta);
        const float *b = op->b + (batch * op->length + t0) * states, *c = op->c + (batch * op->length + t0) * states;
        for (int s = 0; s < steps; s++, b += states, c += states) {
            Row sum;
            for (int i = 0; i < WIDTH; i++) sum.lane[i] = skip.lane[i] * u[s].lane[i];
            for (int64_t n = 0; n < states; n++)
                for (int i = 0; i < WIDTH; i++) {
                    const v8 step = delta[s].lane[i];
                    h[n].lane[i] = exp2_of(step * a[n].lane[i]) * h[n].lane[i] + step * u[s].lane[i] * splat(b[n]);
                    sum.lane[i] += h[n].lane[i] * splat(c[n]);
                }
            out[s] = sum;
        }
        scatter(out, y, batch, d, channels, t0, steps);
    }
    scatter_states(h, channels, states, last + at);
}

/* What the backward pass carries from chunk to chunk for one tile. */
typedef struct {
    Row a[MOST_STATES], g[MOST_STATES], ga[MOST_STATES], skip, gskip;
} Carried;

typedef struct {
    Strided q, gu, gdelta;
    const float *glast; /* [B, D, N] or NULL */
    const Row *kept;    /* [B, tiles, chunks, N] */
    float *ga, *gfirst; /* [B, D, N] each */
    float *gskip;       /* [B, D] or NULL */
    float *gb, *gc;     /* [B, groups, L, N] each */
} Gradients;

/* One chunk of one tile. `gb` and `gc` [CHUNK, N] gather, lane by lane, what all tiles of a group give. */
INLINE void backward_chunk(const Operands *op, const Gradients *of, int64_t batch, int64_t tile, int64_t states,
                           int64_t t0, Carried *carried, Row *h, Row *e, v8 *gb, v8 *gc) {
    const int64_t d = tile * TILE, channels = least(TILE, op->channels - d);
    const int steps = (int)least(CHUNK, op->length - t0);
    Row u[CHUNK], delta[CHUNK], q[CHUNK], gu[CHUNK], gdelta[CHUNK];
    gather(&op->u, batch, d, channels, t0, steps, u);
    gather(&op->delta, batch, d, channels, t0, steps, delta);
    gather(&of->q, batch, d, channels, t0, steps, q);
    const float *b = op->b + (batch * op->length + t0) * states, *c = op->c + (batch * op->length + t0) * states;
    Row *a = carried->a, *g = carried->g, *ga = carried->ga;
    memcpy(h, of->kept + ((batch * op->tiles + tile) * op->chunks + t0 / CHUNK) * states, sizeof(Row) * (size_t)states);
    for (int s = 0; s < steps; s++)
        for (int64_t n = 0; n < states; n++)
            for (int i = 0; i < WIDTH; i++) {
                const v8 step = delta[s].lane[i], decay = exp2_of(step * a[n].lane[i]);
                const int64_t at = s * states + n;
                e[at].lane[i] = decay;
                h[at + states].lane[i] = decay * h[at].lane[i] + step * u[s].lane[i] * splat(b[at]);
            }
    for (int s = steps - 1; s >= 0; s--) {
        Row decayed = zero(), added = zero();
        for (int64_t n = 0; n < states; n++) {
            const int64_t at = s * states + n;
            v8 of_b = gb[at], of_c = gc[at];
            for (int i = 0; i < WIDTH; i++) {
                const v8 step = delta[s].lane[i], here = g[n].lane[i] + q[s].lane[i] * splat(c[at]);
                const v8 before = here * e[at].lane[i], w = before * h[at].lane[i];
                of_c += q[s].lane[i] * h[at + states].lane[i];
                of_b += here * (step * u[s].lane[i]);
                ga[n].lane[i] += w * step;
                decayed.lane[i] += w * a[n].lane[i];
                added.lane[i] += here * splat(b[at]);
                g[n].lane[i] = before;
            }
            gb[at] = of_b;
            gc[at] = of_c;
        }
        for (int i = 0; i < WIDTH; i++) {
            gu[s].lane[i] = delta[s].lane[i] * added.lane[i] + carried->skip.lane[i] * q[s].lane[i];
            carried->gskip.lane[i] += q[s].lane[i] * u[s].lane[i];
            gdelta[s].lane[i] = splat(LN_2) * decayed.lane[i] + u[s].lane[i] * added.lane[i];
        }
    }
    scatter(gu, &of->gu, batch, d, channels, t0, steps);
    scatter(gdelta, &of->gdelta, batch, d, channels, t0, steps);
}

/* GROUP tiles of one batch row, from the last chunk to the first. */
INLINE void backward_group(const Operands *op, const Gradients *of, int64_t batch, int64_t group, int64_t states,
                           Carried *carried, Row *h, Row *e, v8 *gb, v8 *gc) {
    const int64_t groups = (op->tiles + GROUP - 1) / GROUP, from = group * GROUP, to = least(from + GROUP, op->tiles);
    for (int64_t tile = from; tile < to; tile++) {
        const int64_t d = tile * TILE, channels = least(TILE, op->channels - d);
        Carried *own = carried + (tile - from);
        gather_states(op->a + d * states, channels, states, LOG2_E, own->a);
        if (of->glast)
            gather_states(of->glast + (batch * op->channels + d) * states, channels, states, 1, own->g);
        else
            memset(own->g, 0, sizeof(Row) * (size_t)states);
        memset(own->ga, 0, sizeof(Row) * (size_t)states);
        own->skip = gather_channels(op->skip, d, channels);
        own->gskip = zero();
    }
    for (int64_t t0 = (op->chunks - 1) * CHUNK; t0 >= 0; t0 -= CHUNK) {
        const int64_t size = least(CHUNK, op->length - t0) * states, at = ((batch * groups + group) * op->length + t0) * states;
        memset(gb, 0, sizeof *gb * (size_t)size);
        memset(gc, 0, sizeof *gc * (size_t)size);
        for (int64_t tile = from; tile < to; tile++)
            backward_chunk(op, of, batch, tile, states, t0, carried + (tile - from), h, e, gb, gc);
        for (int64_t i = 0; i < size; i++) {
            of->gb[at + i] = sum(gb[i]);
            of->gc[at + i] = sum(gc[i]);
        }
    }
    for (int64_t tile = from; tile < to; tile++) {
        const int64_t d = tile * TILE, channels = least(TILE, op->channels - d), at = (batch * op->channels + d) * states;
        scatter_states(carried[tile - from].ga, channels, states, of->ga + at);
        scatter_states(carried[tile - from].g, channels, states, of->gfirst + at);
        if (of->gskip)
            memcpy(of->gskip + batch * op->channels + d, &carried[tile - from].gskip, sizeof(float) * (size_t)channels);
    }
}

/* With the number of states known the compiler unrolls the loops over them. */
CLONED static void forward_of(const Operands *op, const Strided *y, int64_t batch, int64_t tile, const float *first,
                              float *last, Row *kept) {
    if (op->states == 16)
        forward_tile(op, y, batch, tile, 16, first, last, kept);
    else
        forward_tile(op, y, batch, tile, op->states, first, last, kept);
}

CLONED static void backward_of(const Operands *op, const Gradients *of, int64_t batch, int64_t group, Carried *carried,
                               Row *h, Row *e, v8 *gb, v8 *gc) {
    if (op->states == 16)
        backward_group(op, of, batch, group, 16, carried, h, e, gb, gc);
    else
        backward_group(op, of, batch, group, op->states, carried, h, e, gb, gc);
}

static Operands operands(float *u, float *delta, const float *a, const float *b, const float *c, const float *skip,
                         const int64_t *strides, int64_t channels, int64_t length, int64_t states) {
    return (Operands){{u, strides[0], strides[1], strides[2]},
                      {delta, strides[3], strides[4], strides[5]},
                      a,
                      b,
                      c,
                      skip,
                      channels,
                      length,
                      states,
                      (channels + TILE - 1) / TILE,
                      (length + CHUNK - 1) / CHUNK};
}

/* Writes y [B, D, L] and the last states [B, D, N], and the checkpoints [B, tiles, chunks, N, TILE] unless NULL.
   `strides` holds those of u, delta and y, in numbers. `skip` [D] and `first` [B, D, N] may be NULL. */
void mj_scan_forward(float *u, float *delta, const float *a, const float *b, const float *c, const float *skip,
                     const float *first, const int64_t *strides, int64_t batch, int64_t channels, int64_t length, int64_t states,
                     int threads, float *y, float *last, float *kept) {
    const Operands op = operands(u, delta, a, b, c, skip, strides, channels, length, states);
    const Strided out = {y, strides[6], strides[7], strides[8]};
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < batch * op.tiles; item++)
        forward_of(&op, &out, item / op.tiles, item % op.tiles, first, last,
                   kept ? (Row *)kept + item * op.chunks * states : NULL);
}

/* Writes the gradients: gu and gdelta [B, D, L], ga (per batch row) and gfirst [B, D, N], gb and gc (per group of
   channels) [B, groups, L, N], gskip (per batch row; may be NULL) [B, D]. `strides` holds those of u, delta, q, gu and gdelta; q is dL/dy, glast (may be NULL)
   that of the last states. Returns 0, or 1 where there is no memory for what the threads carry. */
int mj_scan_backward(float *u, float *delta, const float *a, const float *b, const float *c, const float *skip,
                     const float *kept, float *q, const float *glast, const int64_t *strides, int64_t batch, int64_t channels, int64_t length,
                     int64_t states, int threads, float *gu, float *gdelta, float *ga, float *gb, float *gc,
                     float *gfirst, float *gskip) {
    const Operands op = operands(u, delta, a, b, c, skip, strides, channels, length, states);
    const Gradients of = {{q, strides[6], strides[7], strides[8]},
                          {gu, strides[9], strides[10], strides[11]},
                          {gdelta, strides[12], strides[13], strides[14]},
                          glast, (const Row *)kept, ga, gfirst, gskip, gb, gc};
    const int64_t groups = (op.tiles + GROUP - 1) / GROUP;
    const size_t rows = (size_t)(states * (2 * CHUNK + 1)), sums = (size_t)(states * 2 * CHUNK);
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const size_t size = sizeof(Carried) * GROUP + sizeof(Row) * rows + sizeof(v8) * sums;
        Carried *carried = aligned_alloc(64, (size + 63) / 64 * 64);
        if (!carried) {
#pragma omp atomic write
            failed = 1;
        }
        Row *h = (Row *)(carried + GROUP), *e = h + states * (CHUNK + 1);
        v8 *own_gb = (v8 *)(e + states * CHUNK), *own_gc = own_gb + states * CHUNK;
#pragma omp for schedule(static)
        for (int64_t item = 0; item < batch * groups; item++)
            if (carried) backward_of(&op, &of, item / groups, item % groups, carried, h, e, own_gb, own_gc);
        free(carried);
    }
    return failed;
}
