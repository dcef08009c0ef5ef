/* The kernels for one scalar type and one instruction set. _kernels.c includes this file once for
 * each pair, with these definitions:
 *
 *   SCALAR   float or double
 *   INTEGER  an integer of the same size
 *   BYTES    bytes of a vector
 *   TARGET   attribute that selects the instruction set
 *   NAME(x)  x with a suffix for the pair
 *
 * Maps are (height, width, channels, images) in memory. A row has the values of all images at one
 * channel and pixel. An active weight multiplies a row, so neighbouring images are computed in the
 * lanes of a vector. A weight of 0 costs nothing. Every sum has a fixed order, which does not
 * depend on the number of threads.
 */

#define VEC NAME(vec)
#define LOOSE NAME(loose)
#define BITS NAME(bits)
#define ENTRY NAME(entry)
#define LANES ((long)(BYTES / sizeof(SCALAR)))
/* Vectors of a block of images. At most 8 sums are in registers. */
#define VECTORS (BLOCK * sizeof(SCALAR) / BYTES > 8 ? 8 : (int)(BLOCK * sizeof(SCALAR) / BYTES))
#define INLINE static inline __attribute__((always_inline)) TARGET

typedef SCALAR VEC __attribute__((vector_size(BYTES)));
typedef SCALAR LOOSE __attribute__((vector_size(BYTES), aligned(sizeof(SCALAR)), may_alias));
typedef INTEGER BITS __attribute__((vector_size(BYTES)));

/* An active weight: the row that it multiplies, relative to its output's row, and its value. */
typedef struct {
    int32_t row;
    SCALAR value;
} ENTRY;

/* ------------------------------------------------------------------ gather */

/* Compute `pixels` neighbouring pixels of one output channel for `vectors` vectors of images.
 * in, out: the first element of input and output. in_step, out_step: elements to the next pixel. */
INLINE void NAME(sums)(const Gather *g, const Runs *runs, SCALAR bias, long in, long in_step,
                       long out, long out_step, const int pixels, const int vectors) {
    const SCALAR *x = (const SCALAR *)g->x + in;
    const VEC zero = {0};
    VEC sum[8];
#pragma GCC unroll 8
    for (int i = 0; i < pixels * vectors; i++) sum[i] = zero + bias;
    for (int r = 0; r < runs->count; r++) {
        const ENTRY *last = (const ENTRY *)g->entries + runs->last[r];
        for (const ENTRY *e = (const ENTRY *)g->entries + runs->first[r]; e < last; e++) {
            const SCALAR *row = x + (long)e->row * g->images;
#pragma GCC unroll 8
            for (int i = 0; i < pixels * vectors; i++)
                sum[i] += e->value *
                          *(const LOOSE *)(row + i / vectors * in_step + i % vectors * LANES);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < pixels * vectors; i++) {
        const long at = out + i / vectors * out_step + i % vectors * LANES;
        VEC s = sum[i];
        if (g->other) s += *(const LOOSE *)((const SCALAR *)g->other + at);
        if (g->relu) s = (VEC)((BITS)s & ~(s <= zero)); /* NaN stays, as in torch */
        if (g->gate)
            s = (VEC)((BITS)s & ~(*(const LOOSE *)((const SCALAR *)g->gate + at) <= zero));
        *(LOOSE *)((SCALAR *)g->y + at) = s;
    }
}

/* The same for one pixel and fewer images than a vector has lanes. */
INLINE void NAME(few)(const Gather *g, const Runs *runs, SCALAR bias, long in, long out,
                      long images) {
    const SCALAR *x = (const SCALAR *)g->x + in;
    SCALAR sum[BYTES / sizeof(SCALAR)] = {0};
    for (long n = 0; n < images; n++) sum[n] = bias;
    for (int r = 0; r < runs->count; r++) {
        const ENTRY *last = (const ENTRY *)g->entries + runs->last[r];
        for (const ENTRY *e = (const ENTRY *)g->entries + runs->first[r]; e < last; e++)
            for (long n = 0; n < images; n++) sum[n] += e->value * x[(long)e->row * g->images + n];
    }
    for (long n = 0; n < images; n++) {
        SCALAR s = sum[n];
        if (g->other) s += ((const SCALAR *)g->other)[out + n];
        if (g->relu) s = s <= 0 ? 0 : s;
        if (g->gate) s = ((const SCALAR *)g->gate)[out + n] <= 0 ? 0 : s;
        ((SCALAR *)g->y)[out + n] = s;
    }
}

/* Compute all output channels at `pixels` pixels from (j, i) of a phase, for the images from n on:
 * `vectors` vectors, or `few` images. */
INLINE void NAME(pixels)(const Gather *g, const Phase *p, long j, long i, Taps taps, long n,
                         const int pixels, const int vectors, long few) {
    const long in_row = (j * p->in_y_step * g->in_width + i * p->in_x_step) * g->in_channels;
    const long y = p->y_first + j * p->y_step, x = p->x_first + i * p->x_step;
    const long in_step = p->in_x_step * g->in_channels * g->images;
    const long out_step = p->x_step * g->out_channels * g->images;
    const long in = in_row * g->images + n;
    long out = (y * g->out_width + x) * g->out_channels * g->images + n;
    for (long o = 0; o < g->out_channels; o++, out += g->images) {
        Runs runs;
        find_runs(g->segments, p, o, taps, &runs);
        const SCALAR bias = g->bias ? ((const SCALAR *)g->bias)[o] : 0;
        if (few)
            NAME(few)(g, &runs, bias, in, out, few);
        else
            NAME(sums)(g, &runs, bias, in, in_step, out, out_step, pixels, vectors);
    }
}

/* Compute line j of a phase for the images from n on: `vectors` vectors, or `few` images. */
INLINE void NAME(line)(const Gather *g, const Phase *p, long j, long n, const int vectors,
                       long few) {
    for (long i = 0; i < p->width;) {
        const Taps taps = taps_inside(g, p, j, i);
        /* Two pixels share the reading of the entries if the same taps are inside the map. */
        if (vectors <= 4 && !few && i + 1 < p->width && taps_equal(taps, taps_inside(g, p, j, i + 1))) {
            NAME(pixels)(g, p, j, i, taps, n, 2, vectors, 0);
            i += 2;
        } else {
            NAME(pixels)(g, p, j, i, taps, n, 1, vectors, few);
            i += 1;
        }
    }
}

/* Compute line j of a phase for the images n to `end`, at most BLOCK of them. */
static TARGET void NAME(gather)(const Gather *g, const Phase *p, long j, long n, long end) {
    for (; end - n >= VECTORS * LANES; n += VECTORS * LANES) NAME(line)(g, p, j, n, VECTORS, 0);
    for (; end - n >= LANES; n += LANES) NAME(line)(g, p, j, n, 1, 0);
    if (n < end) NAME(line)(g, p, j, n, 1, end - n);
}

/* ------------------------------------------------------------------ gradient of weights */

/* Return the product of `a` and `b` over `pixels` pixels and `images` images. */
INLINE SCALAR NAME(dot)(const SCALAR *a, long a_step, const SCALAR *b, long b_step, long pixels,
                        long images) {
    const VEC zero = {0};
    VEC sum[4] = {zero, zero, zero, zero};
    SCALAR rest = 0;
    for (long i = 0; i < pixels; i++, a += a_step, b += b_step) {
        long n = 0;
        for (; n + 4 * LANES <= images; n += 4 * LANES)
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++)
                sum[v] += *(const LOOSE *)(a + n + v * LANES) * *(const LOOSE *)(b + n + v * LANES);
        for (; n + LANES <= images; n += LANES)
            sum[0] += *(const LOOSE *)(a + n) * *(const LOOSE *)(b + n);
        for (; n < images; n++) rest += a[n] * b[n];
    }
    const VEC all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    for (int lane = 0; lane < LANES; lane++) rest += all[lane];
    return rest;
}

/* Add to the gradient of each active weight of output channel o the sum over the output lines
 * j to j_end and the images n to n_end. g->y: the gradient of the output. */
static TARGET void NAME(weights)(const Gather *g, const Phase *p, long o, long j, long j_end,
                                 long n, long n_end) {
    const long x_step = p->in_x_step * g->in_channels * g->images;
    const long y_step = g->out_channels * g->images;
    const ENTRY *entries = g->entries;
    SCALAR *gradient = g->gradient;
    const SCALAR *y = (const SCALAR *)g->y + o * g->images + n;
    const SCALAR *x = (const SCALAR *)g->x + n;
    for (long a = 0; a < p->lines; a++)
        for (long b = 0; b < p->columns; b++) {
            const Range js = range_inside(p->dy[a], p->in_y_step, g->in_height, j, j_end);
            const Range is = range_inside(p->dx[b], p->in_x_step, g->in_width, 0, p->width);
            const int32_t *segment = g->segments + p->segment + (o * p->lines + a) * p->columns + b;
            for (int32_t k = segment[0]; k < segment[1]; k++) {
                SCALAR sum = 0;
                for (long line = js.first; line < js.last; line++) {
                    const long pixel =
                        line * p->in_y_step * g->in_width + is.first * p->in_x_step;
                    const SCALAR *dx = x + (entries[k].row + pixel * g->in_channels) * g->images;
                    const SCALAR *dy = y + (line * g->out_width + is.first) * y_step;
                    sum += NAME(dot)(dy, y_step, dx, x_step, is.last - is.first, n_end - n);
                }
                gradient[k] += sum;
            }
        }
}

#undef VEC
#undef LOOSE
#undef BITS
#undef ENTRY
#undef LANES
#undef VECTORS
#undef INLINE
