/* Sparse convolutions: outputs, gradients of inputs, and gradients of the active weights. Batch norm
 * in train mode and pooling, and their gradients.
 *
 * A module for CPython. Its functions take addresses as integers. robsparse/kernels/patterns.py,
 * norms.py and pools.py are their only callers: they check types, shapes and memory formats. The
 * functions release the interpreter lock.
 *
 * A *gather* computes, for each pixel of an output map, a sum over active weights of value * input
 * row. The output of a convolution is a gather. Its gradient with respect to the input is another
 * one, over transposed lists. With a stride of s, that gradient has s * s phases: the pixels whose
 * coordinates have the same remainders modulo s use the same taps of the kernel.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

/* Images that are computed together: rows of one block stay in the cache. Measured: docs/speed.md. */
#define BLOCK 64
/* Active weights whose gradients are computed together: their sums stay in the cache. */
#define TOGETHER 256
/* Channels whose batch norm is computed together, at most. */
#define MOST_CHANNELS 64
/* Rows of a channel that are summed in the type of the map. Sums of more rows have double precision. */
#define SUMMED 16

/* geometry.py has the same two limits: lines of taps, and phases. */
#define MOST_TAPS 64
#define MOST_PHASES 256

/* Digest of the sources, from setup.py. */
#ifndef SOURCES
#define SOURCES ""
#endif

typedef struct {
    /* Output pixels (y_first + j * y_step, x_first + i * x_step) for j < height, i < width. */
    int32_t y_first, x_first, y_step, x_step, height, width;
    /* Tap (a, b) of pixel (j, i) is input pixel (j * in_y_step + dy[a], i * in_x_step + dx[b]). */
    int32_t in_y_step, in_x_step, lines, columns;
    /* First entry of g->segments. There is one for each (output channel, a, b), and one at the end. */
    int32_t segment;
    const int32_t *dy, *dx; /* increasing */
} Phase;

typedef struct {
    const void *x, *bias, *other, *gate;
    void *y;
    void *gradient;
    const void *entries;
    const int32_t *segments;
    long images, in_channels, in_height, in_width, out_channels, out_height, out_width;
    int relu;
} Gather;

/* The taps of one pixel that are inside the map: lines a to a_end and columns b to b_end. */
typedef struct {
    int a, a_end, b, b_end;
} Taps;

/* Batch norm. mean, variance (biased), weight_gradient, bias_gradient: one for each channel. */
typedef struct {
    const void *x, *weight, *bias;
    const void *other;           /* added to the result, or NULL */
    const void *upstream, *gate; /* the gradient of the result is 0 where the gate is not above 0 */
    void *y, *gated;             /* result, or gradients of x and of the other map */
    double *mean, *variance, *weight_gradient, *bias_gradient;
    double eps;
    long pixels, channels, images;
    int relu; /* without a gate, the backward pass computes the result of the ReLU again */
} Norm;

/* Pooling over windows of lines x columns pixels that do not overlap. */
typedef struct {
    const void *x, *upstream;
    void *y, *gradient;
    long out_height, out_width, in_width, lines, columns;
    long numbers; /* of a pixel: channels * images */
    int mean;     /* the mean, not the largest number */
} Pool;

/* Runs of entries of one output channel. */
typedef struct {
    int count;
    int32_t first[MOST_TAPS], last[MOST_TAPS];
} Runs;

typedef struct {
    long first, last;
} Range;

static inline Taps taps_inside(const Gather *g, const Phase *p, long j, long i) {
    Taps t = {0, p->lines, 0, p->columns};
    const long y = j * p->in_y_step, x = i * p->in_x_step;
    while (t.a < t.a_end && y + p->dy[t.a] < 0) t.a++;
    while (t.a < t.a_end && y + p->dy[t.a_end - 1] >= g->in_height) t.a_end--;
    while (t.b < t.b_end && x + p->dx[t.b] < 0) t.b++;
    while (t.b < t.b_end && x + p->dx[t.b_end - 1] >= g->in_width) t.b_end--;
    return t;
}

static inline int taps_equal(Taps s, Taps t) {
    return s.a == t.a && s.a_end == t.a_end && s.b == t.b && s.b_end == t.b_end;
}

static inline void find_runs(const int32_t *segments, const Phase *p, long o, Taps t, Runs *runs) {
    const int32_t *mine = segments + p->segment + o * p->lines * p->columns;
    if (t.b == 0 && t.b_end == p->columns) {
        runs->count = 1;
        runs->first[0] = mine[t.a * p->columns];
        runs->last[0] = mine[t.a_end * p->columns];
        return;
    }
    runs->count = t.a_end - t.a;
    for (int a = t.a; a < t.a_end; a++) {
        runs->first[a - t.a] = mine[a * p->columns + t.b];
        runs->last[a - t.a] = mine[a * p->columns + t.b_end];
    }
}

/* Return the coordinates k of first to last with 0 <= k * step + offset < size. */
static inline Range range_inside(long offset, long step, long size, long first, long last) {
    Range r = {first, last};
    while (r.first < r.last && r.first * step + offset < 0) r.first++;
    while (r.first < r.last && (r.last - 1) * step + offset >= size) r.last--;
    return r;
}

/* ------------------------------------------------------------------ instruction sets */

#define TARGET
#define BYTES 16
#define SCALAR float
#define INTEGER int32_t
#define NAME(x) x##_float_plain
#include "_template.h"
#undef SCALAR
#undef INTEGER
#undef NAME
#define SCALAR double
#define INTEGER int64_t
#define NAME(x) x##_double_plain
#include "_template.h"
#undef SCALAR
#undef INTEGER
#undef NAME
#undef BYTES
#undef TARGET

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define X86 1
#define TARGET __attribute__((target("avx2,fma")))
#define BYTES 32
#define SCALAR float
#define INTEGER int32_t
#define NAME(x) x##_float_avx2
#include "_template.h"
#undef SCALAR
#undef INTEGER
#undef NAME
#define SCALAR double
#define INTEGER int64_t
#define NAME(x) x##_double_avx2
#include "_template.h"
#undef SCALAR
#undef INTEGER
#undef NAME
#undef BYTES
#undef TARGET

#define TARGET __attribute__((target("avx512f,avx2,fma")))
#define BYTES 64
#define SCALAR float
#define INTEGER int32_t
#define NAME(x) x##_float_avx512
#include "_template.h"
#undef SCALAR
#undef INTEGER
#undef NAME
#define SCALAR double
#define INTEGER int64_t
#define NAME(x) x##_double_avx512
#include "_template.h"
#undef SCALAR
#undef INTEGER
#undef NAME
#undef BYTES
#undef TARGET
#endif

typedef struct {
    const char *name;
    void (*gather[2])(const Gather *, const Phase *, long, long, long);
    void (*weights[2])(const Gather *, const Phase *, int32_t, int32_t, long, long, long, long);
    void (*norm[2])(const Norm *, long, long);
    void (*norm_gradient[2])(const Norm *, long, long);
    void (*pool[2])(const Pool *, long);
    void (*pool_gradient[2])(const Pool *, long);
} Instructions;

static const Instructions PLAIN = {"plain",
                                   {gather_float_plain, gather_double_plain},
                                   {weights_float_plain, weights_double_plain},
                                   {norm_float_plain, norm_double_plain},
                                   {norm_gradient_float_plain, norm_gradient_double_plain},
                                   {pool_float_plain, pool_double_plain},
                                   {pool_gradient_float_plain, pool_gradient_double_plain}};
#ifdef X86
static const Instructions AVX2 = {"avx2",
                                  {gather_float_avx2, gather_double_avx2},
                                  {weights_float_avx2, weights_double_avx2},
                                  {norm_float_avx2, norm_double_avx2},
                                  {norm_gradient_float_avx2, norm_gradient_double_avx2},
                                  {pool_float_avx2, pool_double_avx2},
                                  {pool_gradient_float_avx2, pool_gradient_double_avx2}};
static const Instructions AVX512 = {"avx512",
                                    {gather_float_avx512, gather_double_avx512},
                                    {weights_float_avx512, weights_double_avx512},
                                    {norm_float_avx512, norm_double_avx512},
                                    {norm_gradient_float_avx512, norm_gradient_double_avx512},
                                    {pool_float_avx512, pool_double_avx512},
                                    {pool_gradient_float_avx512, pool_gradient_double_avx512}};
#endif

static const Instructions *chosen = &PLAIN;

/* Choose an instruction set by name, or the best one of this processor. Return 0 without it. */
static int choose(const char *name) {
    const Instructions *found[3];
    int count = 0;
#ifdef X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) found[count++] = &AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found[count++] = &AVX2;
#endif
    found[count++] = &PLAIN;
    for (int i = 0; i < count; i++)
        if (!*name || strcmp(name, found[i]->name) == 0) {
            chosen = found[i];
            return 1;
        }
    return 0;
}

/* ------------------------------------------------------------------ all lines of a map */

#define NUMBERS 11

/* Read phases from a list of int32: the NUMBERS of a Phase in their order, then dy and dx. */
static void read_phases(const int32_t *list, int count, Phase *phases) {
    for (int i = 0; i < count; i++) {
        Phase *p = phases + i;
        memcpy(p, list, NUMBERS * sizeof(int32_t));
        p->dy = list + NUMBERS;
        p->dx = list + NUMBERS + p->lines;
        list += NUMBERS + p->lines + p->columns;
    }
}

static void gather_all(const Gather *g, const Phase *phases, int count, int double_, int threads) {
    const Instructions *use = chosen;
    const long blocks = (g->images + BLOCK - 1) / BLOCK;
    long lines = 0;
    for (int i = 0; i < count; i++) lines += phases[i].height;
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
#endif
    for (long k = 0; k < blocks * lines; k++) {
        const long n = k / lines * BLOCK;
        long j = k % lines;
        const Phase *p = phases;
        while (j >= p->height) j -= p++->height;
        use->gather[double_](g, p, j, n, n + BLOCK < g->images ? n + BLOCK : g->images);
    }
}

/* A part of the input that fits into the cache of a core, in bytes. */
#define CACHED 1500000

static void weights_all(const Gather *g, const Phase *p, int double_, int threads) {
    const Instructions *use = chosen;
    const long size = double_ ? 8 : 4;
    const long active = g->segments[g->out_channels * p->lines * p->columns];
    long line = g->in_channels * g->in_width * p->in_y_step * size * BLOCK;
    long together = CACHED / (line ? line : 1) - p->lines + 1;
    if (together < 1) together = 1;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
    for (long n = 0; n < g->images; n += BLOCK)
        for (long j = 0; j < p->height; j += together) {
            const long n_end = n + BLOCK < g->images ? n + BLOCK : g->images;
            const long j_end = j + together < p->height ? j + together : p->height;
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
            for (long k = 0; k < active; k += TOGETHER) {
                const long last = k + TOGETHER < active ? k + TOGETHER : active;
                use->weights[double_](g, p, k, last, j, j_end, n, n_end);
            }
        }
}

/* Call `work` for groups of channels. */
static void norm_all(const Norm *norm, void (*work)(const Norm *, long, long), int threads) {
    long together = (norm->channels + threads - 1) / threads;
    if (together > MOST_CHANNELS) together = MOST_CHANNELS;
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
#endif
    for (long c = 0; c < norm->channels; c += together)
        work(norm, c, c + together < norm->channels ? c + together : norm->channels);
}

/* Call `work` for all lines of the output. */
static void pool_all(const Pool *pool, void (*work)(const Pool *, long), int threads) {
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) if (threads > 1)
#endif
    for (long j = 0; j < pool->out_height; j++) work(pool, j);
}

/* ------------------------------------------------------------------ Python */

static void *address(PyObject *number) { return PyLong_AsVoidPtr(number); }

/* Read the arguments that gather and weight_gradient share: images, in_channels, in_height,
 * in_width, out_channels, out_height, out_width, entries, segments, phases, number of phases, double,
 * threads, x. */
#define SHARED 14

static int read_shared(PyObject *const *args, Gather *g, Phase *phases, int *count, int *double_,
                       int *threads) {
    long number[7];
    memset(g, 0, sizeof *g);
    for (int i = 0; i < 7; i++) number[i] = PyLong_AsLong(args[i]);
    g->images = number[0];
    g->in_channels = number[1], g->in_height = number[2], g->in_width = number[3];
    g->out_channels = number[4], g->out_height = number[5], g->out_width = number[6];
    g->entries = address(args[7]);
    g->segments = address(args[8]);
    const int32_t *list = address(args[9]);
    *count = (int)PyLong_AsLong(args[10]);
    *double_ = (int)PyLong_AsLong(args[11]);
    *threads = (int)PyLong_AsLong(args[12]);
    g->x = address(args[13]);
    if (PyErr_Occurred()) return 0;
    if (*count > MOST_PHASES) {
        PyErr_SetString(PyExc_ValueError, "too many phases");
        return 0;
    }
    read_phases(list, *count, phases);
    for (int i = 0; i < *count; i++)
        if (phases[i].lines > MOST_TAPS) {
            PyErr_SetString(PyExc_ValueError, "the kernel is too large");
            return 0;
        }
    return 1;
}

/* gather(shared..., y, bias, other, gate, relu) */
static PyObject *py_gather(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    Gather g;
    Phase phases[MOST_PHASES];
    int count, double_, threads;
    if (given != SHARED + 5) {
        PyErr_SetString(PyExc_TypeError, "gather takes 19 arguments");
        return NULL;
    }
    if (!read_shared(args, &g, phases, &count, &double_, &threads)) return NULL;
    g.y = address(args[SHARED]);
    g.bias = address(args[SHARED + 1]);
    g.other = address(args[SHARED + 2]);
    g.gate = address(args[SHARED + 3]);
    g.relu = (int)PyLong_AsLong(args[SHARED + 4]);
    if (PyErr_Occurred()) return NULL;
    Py_BEGIN_ALLOW_THREADS;
    gather_all(&g, phases, count, double_, threads);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

/* weight_gradient(shared..., gradient of y, gradient of the entries (set to 0)) */
static PyObject *py_weight_gradient(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    Gather g;
    Phase phases[MOST_PHASES];
    int count, double_, threads;
    if (given != SHARED + 2) {
        PyErr_SetString(PyExc_TypeError, "weight_gradient takes 16 arguments");
        return NULL;
    }
    if (!read_shared(args, &g, phases, &count, &double_, &threads)) return NULL;
    g.y = address(args[SHARED]);
    g.gradient = address(args[SHARED + 1]);
    if (PyErr_Occurred()) return NULL;
    Py_BEGIN_ALLOW_THREADS;
    weights_all(&g, phases, double_, threads);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

/* norm(pixels, channels, images, eps, relu, double, threads, x, weight, bias, mean, variance, y,
 *      other map)
 * norm_gradient(the same up to variance, then gradient of x, gradient of y, gate, gradient of the
 *               other map, gradients of weight and bias) */
static PyObject *norm_call(PyObject *const *args, Py_ssize_t given, int backward) {
    Norm n = {0};
    if (given != (backward ? 18 : 14)) {
        PyErr_SetString(PyExc_TypeError, "norm takes 14 arguments and norm_gradient 18");
        return NULL;
    }
    n.pixels = PyLong_AsLong(args[0]), n.channels = PyLong_AsLong(args[1]);
    n.images = PyLong_AsLong(args[2]);
    n.eps = PyFloat_AsDouble(args[3]);
    n.relu = (int)PyLong_AsLong(args[4]);
    const int double_ = (int)PyLong_AsLong(args[5]), threads = (int)PyLong_AsLong(args[6]);
    n.x = address(args[7]), n.weight = address(args[8]), n.bias = address(args[9]);
    n.mean = address(args[10]), n.variance = address(args[11]);
    n.y = address(args[12]);
    if (backward) {
        n.upstream = address(args[13]), n.gate = address(args[14]), n.gated = address(args[15]);
        n.weight_gradient = address(args[16]), n.bias_gradient = address(args[17]);
    } else {
        n.other = address(args[13]);
    }
    if (PyErr_Occurred()) return NULL;
    Py_BEGIN_ALLOW_THREADS;
    norm_all(&n, (backward ? chosen->norm_gradient : chosen->norm)[double_], threads);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

static PyObject *py_norm(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    return norm_call(args, given, 0);
}

static PyObject *py_norm_gradient(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    return norm_call(args, given, 1);
}

/* pool(out_height, out_width, in_width, lines, columns, numbers, mean, double, threads, x, y, gradient
 *      of y, gradient of x). Without a gradient of y, it computes y. */
static PyObject *py_pool(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    Pool p;
    if (given != 13) {
        PyErr_SetString(PyExc_TypeError, "pool takes 13 arguments");
        return NULL;
    }
    p.out_height = PyLong_AsLong(args[0]), p.out_width = PyLong_AsLong(args[1]);
    p.in_width = PyLong_AsLong(args[2]);
    p.lines = PyLong_AsLong(args[3]), p.columns = PyLong_AsLong(args[4]);
    p.numbers = PyLong_AsLong(args[5]);
    p.mean = (int)PyLong_AsLong(args[6]);
    const int double_ = (int)PyLong_AsLong(args[7]), threads = (int)PyLong_AsLong(args[8]);
    p.x = address(args[9]), p.y = address(args[10]);
    p.upstream = address(args[11]), p.gradient = address(args[12]);
    if (PyErr_Occurred()) return NULL;
    Py_BEGIN_ALLOW_THREADS;
    pool_all(&p, (p.upstream ? chosen->pool_gradient : chosen->pool)[double_], threads);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

/* index(positions, count, in_channels, taps, transposed, tap_segment, tap_stride, tap_row, segments,
 *       number of segments, entries, double, slots)
 *
 * Sort the active weights into segments. positions (int64): indices into (outputs, inputs, taps),
 * increasing. The segment of a weight is tap_segment[tap] + channel * tap_stride[tap], where
 * channel is its output, or its input if transposed. Its row is tap_row[tap] plus the other
 * channel. segments has one entry more than there are segments. slots[k] becomes
 * the number of the weight of entry k in `positions`. */
static PyObject *py_index(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    if (given != 13) {
        PyErr_SetString(PyExc_TypeError, "index takes 13 arguments");
        return NULL;
    }
    const int64_t *positions = address(args[0]);
    const long count = PyLong_AsLong(args[1]), in_channels = PyLong_AsLong(args[2]);
    const long taps = PyLong_AsLong(args[3]), transposed = PyLong_AsLong(args[4]);
    const int32_t *tap_segment = address(args[5]), *tap_stride = address(args[6]);
    const int32_t *tap_row = address(args[7]);
    int32_t *segments = address(args[8]);
    const long n_segments = PyLong_AsLong(args[9]);
    char *entries = address(args[10]);
    const long double_ = PyLong_AsLong(args[11]);
    int32_t *slots = address(args[12]);
    if (PyErr_Occurred()) return NULL;
    Py_BEGIN_ALLOW_THREADS;
    const long size = double_ ? sizeof(entry_double_plain) : sizeof(entry_float_plain);
    memset(segments, 0, (n_segments + 1) * sizeof(int32_t));
    for (int pass = 0; pass < 2; pass++) {
        for (long k = 0; k < count; k++) {
            const long tap = positions[k] % taps, channels = positions[k] / taps;
            const long in = channels % in_channels, out = channels / in_channels;
            const long mine = transposed ? in : out, other = transposed ? out : in;
            int32_t *place = segments + tap_segment[tap] + mine * tap_stride[tap];
            if (pass == 0) {
                place[1]++;
            } else {
                const long at = (*place)++;
                *(int32_t *)(entries + at * size) = (int32_t)other + tap_row[tap];
                slots[at] = (int32_t)k;
            }
        }
        if (pass == 0)
            for (long s = 0; s < n_segments; s++) segments[s + 1] += segments[s];
    }
    /* The second pass moved each start to the next one. */
    memmove(segments + 1, segments, n_segments * sizeof(int32_t));
    segments[0] = 0;
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

/* fill(entries, values, slots, count, double): entry k gets values[slots[k]]. */
static PyObject *py_fill(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    if (given != 5) {
        PyErr_SetString(PyExc_TypeError, "fill takes 5 arguments");
        return NULL;
    }
    void *entries = address(args[0]);
    const void *values = address(args[1]);
    const int32_t *slots = address(args[2]);
    const long count = PyLong_AsLong(args[3]), double_ = PyLong_AsLong(args[4]);
    if (PyErr_Occurred()) return NULL;
    if (double_)
        for (long k = 0; k < count; k++)
            ((entry_double_plain *)entries)[k].value = ((const double *)values)[slots[k]];
    else
        for (long k = 0; k < count; k++)
            ((entry_float_plain *)entries)[k].value = ((const float *)values)[slots[k]];
    Py_RETURN_NONE;
}

static PyObject *py_use(PyObject *self, PyObject *name) {
    const char *text = PyUnicode_AsUTF8(name);
    if (!text) return NULL;
    if (!choose(text))
        return PyErr_Format(PyExc_ValueError, "this processor has no instruction set '%s'", text);
    Py_RETURN_NONE;
}

static PyObject *py_instructions(PyObject *self, PyObject *none) {
    return PyUnicode_FromString(chosen->name);
}

static PyMethodDef METHODS[] = {
    {"gather", (PyCFunction)(void (*)(void))py_gather, METH_FASTCALL, "Compute a map."},
    {"weight_gradient", (PyCFunction)(void (*)(void))py_weight_gradient, METH_FASTCALL,
     "Compute the gradient of the active weights."},
    {"norm", (PyCFunction)(void (*)(void))py_norm, METH_FASTCALL, "Compute batch norm."},
    {"norm_gradient", (PyCFunction)(void (*)(void))py_norm_gradient, METH_FASTCALL,
     "Compute the gradients of batch norm."},
    {"pool", (PyCFunction)(void (*)(void))py_pool, METH_FASTCALL, "Compute pooling."},
    {"index", (PyCFunction)(void (*)(void))py_index, METH_FASTCALL, "Sort the active weights."},
    {"fill", (PyCFunction)(void (*)(void))py_fill, METH_FASTCALL, "Copy values to entries."},
    {"use", py_use, METH_O, "Choose an instruction set by name; '' is the best one."},
    {"instructions", py_instructions, METH_NOARGS, "Return the name of the instruction set."},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef MODULE = {.m_base = PyModuleDef_HEAD_INIT,
                                    .m_name = "_kernels",
                                    .m_doc = "Layers of sparse networks, with images innermost.",
                                    .m_size = -1,
                                    .m_methods = METHODS};

PyMODINIT_FUNC PyInit__kernels(void) {
    choose("");
    PyObject *module = PyModule_Create(&MODULE);
    if (module && PyModule_AddStringConstant(module, "sources", SOURCES) < 0) Py_CLEAR(module);
    return module;
}
