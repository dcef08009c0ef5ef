/* Pooling over windows that do not overlap, for one scalar type and one instruction set. _template.h
 * includes this file. In the layout of the kernels, all numbers of a pixel are neighbours.
 */

/* Compute output line j: the largest number or the mean of each window. NaN wins, as in torch. */
static TARGET void NAME(pool)(const Pool *pool, long j) {
    const SCALAR pixels = (SCALAR)(pool->lines * pool->columns);
    for (long i = 0; i < pool->out_width; i++) {
        const long corner = (j * pool->lines * pool->in_width + i * pool->columns) * pool->numbers;
        const SCALAR *x = (const SCALAR *)pool->x + corner;
        SCALAR *y = (SCALAR *)pool->y + (j * pool->out_width + i) * pool->numbers;
        for (long n = 0; n < pool->numbers; n += LANES) {
            VEC found = NAME(load)(x + n, pool->numbers - n, 0);
            for (long tap = 1; tap < pool->lines * pool->columns; tap++) {
                const long row = tap / pool->columns * pool->in_width + tap % pool->columns;
                const VEC v = NAME(load)(x + row * pool->numbers + n, pool->numbers - n, 0);
                const BITS wins = (v > found) | (v != v);
                found = pool->mean ? found + v : (VEC)(((BITS)v & wins) | ((BITS)found & ~wins));
            }
            NAME(store)(y + n, pool->mean ? found / pixels : found, pool->numbers - n);
        }
    }
}

/* Write the gradient of the windows of output line j. The first number that is the largest one gets
 * it. */
static TARGET void NAME(pool_gradient)(const Pool *pool, long j) {
    const SCALAR pixels = (SCALAR)(pool->lines * pool->columns);
    for (long i = 0; i < pool->out_width; i++) {
        const long corner = (j * pool->lines * pool->in_width + i * pool->columns) * pool->numbers;
        const long out = (j * pool->out_width + i) * pool->numbers;
        for (long n = 0; n < pool->numbers; n += LANES) {
            const long count = pool->numbers - n;
            const VEC up = NAME(load)((const SCALAR *)pool->upstream + out + n, count, 0);
            VEC y = {0};
            BITS open = ~(BITS){0};
            if (!pool->mean) y = NAME(load)((const SCALAR *)pool->y + out + n, count, 0);
            for (long tap = 0; tap < pool->lines * pool->columns; tap++) {
                const long row = tap / pool->columns * pool->in_width + tap % pool->columns;
                const long at = corner + row * pool->numbers + n;
                VEC g = up / pixels;
                if (!pool->mean) {
                    const VEC v = NAME(load)((const SCALAR *)pool->x + at, count, 0);
                    const BITS hit = ((v == y) | (v != v)) & open;
                    open &= ~hit;
                    g = (VEC)((BITS)up & hit);
                }
                NAME(store)((SCALAR *)pool->gradient + at, g, count);
            }
        }
    }
}
