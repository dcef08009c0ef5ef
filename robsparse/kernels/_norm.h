/* Batch norm in train mode, for one scalar type and one instruction set. _template.h includes this
 * file. Maps have the layout of the other kernels, so a channel has one row at each pixel.
 *
 * The rows of many channels are read in their order in memory. A map is read twice: for the sums, and
 * for the result. Statistics are computed for some pixels, whose rows stay in the cache between their
 * mean and the squares of the differences from it, and then merged as by Chan, Golub and LeVeque,
 * Algorithms for computing the sample variance, 1983, equation 2.1.
 */

/* Return the first `count` numbers at p, followed by `fill`. */
INLINE VEC NAME(load)(const SCALAR *p, long count, SCALAR fill) {
    if (count >= LANES) return *(const LOOSE *)p;
    VEC v = (VEC){0} + fill;
    for (long i = 0; i < count; i++) v[i] = p[i];
    return v;
}

INLINE void NAME(store)(SCALAR *p, VEC v, long count) {
    if (count >= LANES) {
        *(LOOSE *)p = v;
        return;
    }
    for (long i = 0; i < count; i++) p[i] = v[i];
}

/* What the results of one channel are made of. */
typedef struct {
    SCALAR mean, scale, bias;
    SCALAR from_all, from_x; /* in the gradient of x */
} NAME(channel);

/* Return the result at `at`, without the other map and without ReLU. */
INLINE VEC NAME(normal)(const Norm *norm, NAME(channel) c, long at, long count) {
    return (NAME(load)((const SCALAR *)norm->x + at, count, c.mean) - c.mean) * c.scale + c.bias;
}

/* Return the gradient of the result at `at`. It is 0 where the ReLU gave 0. If
 * the gradient of the other map is wanted, it is the same: the first pass writes it, and the second
 * one reads it. */
INLINE VEC NAME(upstream)(const Norm *norm, NAME(channel) c, long at, long count) {
    const VEC zero = {0};
    VEC g = NAME(load)((const SCALAR *)norm->upstream + at, count, 0);
    if (norm->gate)
        g = (VEC)((BITS)g & ~(NAME(load)((const SCALAR *)norm->gate + at, count, 0) <= zero));
    else if (norm->relu)
        g = (VEC)((BITS)g & ~(NAME(normal)(norm, c, at, count) <= zero));
    return g;
}

enum { NAME(of_x), NAME(of_squares), NAME(of_gradient) };

/* Add the terms at `at` to a and b. */
INLINE void NAME(add_terms)(const Norm *norm, NAME(channel) c, long at, long count, VEC *a, VEC *b,
                            const int what) {
    if (what == NAME(of_x)) {
        *a += NAME(load)((const SCALAR *)norm->x + at, count, 0);
        return;
    }
    const VEC d = NAME(load)((const SCALAR *)norm->x + at, count, c.mean) - c.mean;
    if (what == NAME(of_squares)) {
        *a += d * d;
    } else {
        const VEC g = NAME(upstream)(norm, c, at, count);
        if (norm->gated) NAME(store)((SCALAR *)norm->gated + at, g, count);
        *a += g;
        *b += g * d;
    }
}

/* Compute the sums of one kind of terms over the pixels p to `end`, at most SUMMED, for the channels
 * `first` to `last`. a, b: one for each. */
INLINE void NAME(norm_sums)(const Norm *norm, const NAME(channel) *channels, long first, long last,
                            long p, long end, double *a, double *b, const int what) {
    const long count = last - first, images = norm->images;
    VEC part_a[MOST_CHANNELS], part_b[MOST_CHANNELS];
    for (long k = 0; k < count; k++) part_a[k] = part_b[k] = (VEC){0};
    for (; p < end; p++)
        for (long k = 0; k < count; k++) {
            const long at = (p * norm->channels + first + k) * images;
            VEC row_a = {0}, row_b = {0};
            long n = 0;
            for (; n + LANES <= images; n += LANES)
                NAME(add_terms)(norm, channels[k], at + n, LANES, &row_a, &row_b, what);
            if (n < images)
                NAME(add_terms)(norm, channels[k], at + n, images - n, &row_a, &row_b, what);
            part_a[k] += row_a;
            part_b[k] += row_b;
        }
    for (long k = 0; k < count; k++) {
        a[k] = b[k] = 0;
        for (int lane = 0; lane < LANES; lane++) a[k] += part_a[k][lane], b[k] += part_b[k][lane];
    }
}

/* Compute the statistics of the channels `first` to `last`. */
INLINE void NAME(statistics)(const Norm *norm, long first, long last) {
    NAME(channel) channels[MOST_CHANNELS];
    double sums[MOST_CHANNELS], squares[MOST_CHANNELS], unused[MOST_CHANNELS];
    for (long k = first; k < last; k++) norm->mean[k] = norm->variance[k] = 0;
    for (long p = 0; p < norm->pixels; p += SUMMED) {
        const long end = p + SUMMED < norm->pixels ? p + SUMMED : norm->pixels;
        const double numbers = (double)(end - p) * norm->images, all = (double)end * norm->images;
        NAME(norm_sums)(norm, channels, first, last, p, end, sums, unused, NAME(of_x));
        for (long k = 0; k < last - first; k++) channels[k].mean = (SCALAR)(sums[k] / numbers);
        NAME(norm_sums)(norm, channels, first, last, p, end, squares, unused, NAME(of_squares));
        for (long k = first; k < last; k++) {
            const double delta = sums[k - first] / numbers - norm->mean[k];
            norm->mean[k] += delta * numbers / all;
            norm->variance[k] += squares[k - first] + delta * delta * (all - numbers) * numbers / all;
        }
    }
    for (long k = first; k < last; k++) norm->variance[k] /= (double)norm->pixels * norm->images;
}

INLINE void NAME(write_result)(const Norm *norm, NAME(channel) c, long at, long count) {
    const VEC zero = {0};
    VEC y = NAME(normal)(norm, c, at, count);
    if (norm->other) y += NAME(load)((const SCALAR *)norm->other + at, count, 0);
    if (norm->relu) y = (VEC)((BITS)y & ~(y <= zero)); /* NaN stays, as in torch */
    NAME(store)((SCALAR *)norm->y + at, y, count);
}

INLINE void NAME(write_gradient)(const Norm *norm, NAME(channel) c, long at, long count) {
    const VEC d = NAME(load)((const SCALAR *)norm->x + at, count, c.mean) - c.mean;
    const VEC g = norm->gated ? NAME(load)((const SCALAR *)norm->gated + at, count, 0)
                              : NAME(upstream)(norm, c, at, count);
    NAME(store)((SCALAR *)norm->y + at, g * c.scale + (d * c.from_x + c.from_all), count);
}

/* Write the result, or the gradient of x, for the channels `first` to `last`. */
INLINE void NAME(write_all)(const Norm *norm, const NAME(channel) *channels, long first, long last,
                            void (*const write)(const Norm *, NAME(channel), long, long)) {
    const long images = norm->images;
    for (long p = 0; p < norm->pixels; p++)
        for (long k = 0; k < last - first; k++) {
            const long at = (p * norm->channels + first + k) * images;
            long n = 0;
            for (; n + LANES <= images; n += LANES) write(norm, channels[k], at + n, LANES);
            if (n < images) write(norm, channels[k], at + n, images - n);
        }
}

INLINE void NAME(read_channels)(const Norm *norm, long first, long last, NAME(channel) *channels) {
    for (long k = first; k < last; k++) {
        const double weight = norm->weight ? ((const SCALAR *)norm->weight)[k] : 1;
        NAME(channel) *c = channels + k - first;
        c->mean = (SCALAR)norm->mean[k];
        c->scale = (SCALAR)(weight / sqrt(norm->variance[k] + norm->eps));
        c->bias = norm->bias ? ((const SCALAR *)norm->bias)[k] : 0;
    }
}

/* Compute statistics and results of the channels `first` to `last`, at most MOST_CHANNELS. */
static TARGET void NAME(norm)(const Norm *norm, long first, long last) {
    NAME(channel) channels[MOST_CHANNELS];
    NAME(statistics)(norm, first, last);
    NAME(read_channels)(norm, first, last, channels);
    NAME(write_all)(norm, channels, first, last, NAME(write_result));
}

/* Compute the gradients of x, weight and bias for the channels `first` to `last`. */
static TARGET void NAME(norm_gradient)(const Norm *norm, long first, long last) {
    NAME(channel) channels[MOST_CHANNELS];
    double sums[MOST_CHANNELS] = {0}, products[MOST_CHANNELS] = {0};
    const double numbers = (double)norm->pixels * norm->images;
    NAME(read_channels)(norm, first, last, channels);
    for (long p = 0; p < norm->pixels; p += SUMMED) {
        const long end = p + SUMMED < norm->pixels ? p + SUMMED : norm->pixels;
        double a[MOST_CHANNELS], b[MOST_CHANNELS];
        NAME(norm_sums)(norm, channels, first, last, p, end, a, b, NAME(of_gradient));
        for (long k = 0; k < last - first; k++) sums[k] += a[k], products[k] += b[k];
    }
    for (long k = first; k < last; k++) {
        NAME(channel) *c = channels + k - first;
        const double a = sums[k - first], b = products[k - first];
        const double variance = norm->variance[k] + norm->eps;
        c->from_all = (SCALAR)(-c->scale * a / numbers);
        c->from_x = (SCALAR)(-c->scale * b / numbers / variance);
        norm->weight_gradient[k] = b / sqrt(variance);
        norm->bias_gradient[k] = a;
    }
    NAME(write_all)(norm, channels, first, last, NAME(write_gradient));
}
