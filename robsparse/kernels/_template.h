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

/* Add to sums[k] the products of the rows x and dy of one pixel, for the entries `first` to `last`.
 * Lane l of sums[k] has the images whose number has the remainder l. */
INLINE void NAME(products)(const ENTRY *first, const ENTRY *last, const SCALAR *x, const SCALAR *dy,
                           long images, VEC *sums, const int vectors, long few) {
    VEC d[8];
#pragma GCC unroll 8
    for (int v = 0; v < vectors && !few; v++) d[v] = *(const LOOSE *)(dy + v * LANES);
    for (const ENTRY *e = first; e < last; e++, sums++) {
        const SCALAR *row = x + (long)e->row * images;
        if (few) {
            for (long n = 0; n < few; n++) ((SCALAR *)sums)[n] += row[n] * dy[n];
            continue;
        }
        VEC sum = *sums;
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) sum += d[v] * *(const LOOSE *)(row + v * LANES);
        *sums = sum;
    }
}

/* Add to sums the products of the output lines j to j_end, for the entries `first` to `last`, which
 * are of the output channels o and following, and for the images from n on: `vectors` vectors, or
 * `few` images. */
INLINE void NAME(lines)(const Gather *g, const Phase *p, long o, int32_t first, int32_t last, long j,
                        long j_end, long n, VEC *sums, const int vectors, long few) {
    const int32_t *segments = g->segments + p->segment;
    const long taps_all = p->lines * p->columns;
    for (; j < j_end; j++)
        for (long i = 0; i < p->width; i++) {
            const Taps taps = taps_inside(g, p, j, i);
            const long in = (j * p->in_y_step * g->in_width + i * p->in_x_step) * g->in_channels;
            const long out = (j * g->out_width + i) * g->out_channels;
            const SCALAR *x = (const SCALAR *)g->x + in * g->images + n;
            const SCALAR *dy = (const SCALAR *)g->y + out * g->images + n;
            for (long c = o; c < g->out_channels && segments[c * taps_all] < last; c++) {
                Runs runs;
                find_runs(g->segments, p, c, taps, &runs);
                for (int r = 0; r < runs.count; r++) {
                    const int32_t from = runs.first[r] > first ? runs.first[r] : first;
                    const int32_t to = runs.last[r] < last ? runs.last[r] : last;
                    if (from < to)
                        NAME(products)((const ENTRY *)g->entries + from,
                                       (const ENTRY *)g->entries + to, x, dy + c * g->images,
                                       g->images, sums + (from - first), vectors, few);
                }
            }
        }
}

/* Add to the gradients of the active weights `first` to `last` the sums over the output lines j to
 * j_end and the images n to n_end. At most TOGETHER weights. g->y: the gradient of the output. */
static TARGET void NAME(weights)(const Gather *g, const Phase *p, int32_t first, int32_t last,
                                 long j, long j_end, long n, long n_end) {
    const int32_t *segments = g->segments + p->segment;
    const VEC zero = {0};
    VEC sums[TOGETHER];
    long o = 0;
    while (segments[(o + 1) * p->lines * p->columns] <= first) o++;
    for (int32_t k = first; k < last; k++) sums[k - first] = zero;
    for (; n_end - n >= VECTORS * LANES; n += VECTORS * LANES)
        NAME(lines)(g, p, o, first, last, j, j_end, n, sums, VECTORS, 0);
    for (; n_end - n >= LANES; n += LANES)
        NAME(lines)(g, p, o, first, last, j, j_end, n, sums, 1, 0);
    if (n < n_end) NAME(lines)(g, p, o, first, last, j, j_end, n, sums, 1, n_end - n);
    for (int32_t k = first; k < last; k++) {
        SCALAR sum = 0;
        for (int lane = 0; lane < LANES; lane++) sum += sums[k - first][lane];
        ((SCALAR *)g->gradient)[k] += sum;
    }
}

#include "_norm.h"
#include "_pool.h"

#undef VEC
#undef LOOSE
#undef BITS
#undef ENTRY
#undef LANES
#undef VECTORS
#undef INLINE
