/* The stages of a model on a processor with AVX2 or AVX-512: what the modules of tempovlm.model compute.

   Every matrix is packed into panels of PANEL output columns, so that a tile of ROWS rows by one panel stays in
   registers: (panels, depth / PAIR, PANEL, PAIR). A stage is a list of tasks, each some rows of one layer, that
   threads take in order. A task waits only for the tasks of the layer before it, so nobody waits at a barrier, and
   a thread that loses its core for a moment stops nobody until the others are a whole layer ahead.

   With BF16, factors of products are bfloat16; sums, norms, softmax, router and the residual stream are float32. */

#define _GNU_SOURCE
#include <immintrin.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

#ifdef __AVX512F__
#define LANES 16
#define ROWS 12 /* of a tile: 24 sums, two columns and a factor fill 27 of 32 registers */
typedef __m512 vec;
#define load(p) _mm512_loadu_ps(p)
#define store(p, v) _mm512_storeu_ps(p, v)
#define spread(x) _mm512_set1_ps(x)
#define fma(a, b, c) _mm512_fmadd_ps(a, b, c)
#define maximum(a, b) _mm512_max_ps(a, b)
#define minimum(a, b) _mm512_min_ps(a, b)
#define nearest(x) _mm512_roundscale_ps(x, 8)
#define scaled(x, n) _mm512_scalef_ps(x, n)
#define sum_of(v) _mm512_reduce_add_ps(v)
#define max_of(v) _mm512_reduce_max_ps(v)
#define above(a, b) ((unsigned)_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ))
#define equal(a, b) ((unsigned)_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ))
#else
#define LANES 8
#define ROWS 6 /* of a tile: 12 sums, two columns and a factor fill 15 of 16 registers */
typedef __m256 vec;
#define load(p) _mm256_loadu_ps(p)
#define store(p, v) _mm256_storeu_ps(p, v)
#define spread(x) _mm256_set1_ps(x)
#define fma(a, b, c) _mm256_fmadd_ps(a, b, c)
#define maximum(a, b) _mm256_max_ps(a, b)
#define minimum(a, b) _mm256_min_ps(a, b)
#define nearest(x) _mm256_round_ps(x, 8)
#define above(a, b) ((unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)))
#define equal(a, b) ((unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)))
INLINE vec scaled(vec x, vec n)
{
    __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(power));
}
INLINE float sum_of(vec v)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
INLINE float max_of(vec v)
{
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
#endif
#define PANEL (2 * LANES)

#ifdef BF16
typedef uint16_t elem;
#define PAIR 2
typedef __m512bh factor;
INLINE factor column(const elem *p) { return (factor)_mm512_loadu_si512(p); }
INLINE factor pair_at(const elem *p)
{
    int both;
    memcpy(&both, p, sizeof both);
    return (factor)_mm512_set1_epi32(both);
}
INLINE vec multiply_add(factor a, factor b, vec c) { return _mm512_dpbf16_ps(c, a, b); }
INLINE void put(elem *p, vec v) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(v)); }
#else
typedef float elem;
#define PAIR 1
typedef vec factor;
INLINE factor column(const elem *p) { return load(p); }
INLINE factor pair_at(const elem *p) { return spread(*p); }
INLINE vec multiply_add(factor a, factor b, vec c) { return fma(a, b, c); }
INLINE void put(elem *p, vec v) { store(p, v); }
#endif

/* A packed matrix (rows, depth): rows is a multiple of LANES, depth of PAIR; the last panel may be half empty. */
typedef struct {
    const elem *data;
    const float *bias;
    int32_t rows, depth;
} matrix;

INLINE long panels_of(int rows) { return (rows + PANEL - 1) / PANEL; }
INLINE long up_to(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }
INLINE long least(long a, long b) { return a < b ? a : b; }

INLINE vec exponential(vec x)
{
    x = minimum(maximum(x, spread(-87.0f)), spread(88.0f));
    vec n = nearest(x * spread(1.44269504f));
    vec r = fma(n, spread(-0.693359375f), x);
    r = fma(n, spread(2.12194440e-4f), r);
    vec p = spread(1.0f / 720);
    p = fma(p, r, spread(1.0f / 120));
    p = fma(p, r, spread(1.0f / 24));
    p = fma(p, r, spread(1.0f / 6));
    p = fma(p, r, spread(0.5f));
    p = fma(p, r, spread(1.0f));
    p = fma(p, r, spread(1.0f));
    return scaled(p, n);
}

INLINE vec sigmoid_times(vec x, float slope)
{
    return x / (spread(1.0f) + exponential(x * spread(-slope)));
}

/* ---- products ---------------------------------------------------------------------------------------------- */

/* sums[w][i] += rows a[i] times the w-th of `wide` panels. */
INLINE void tile(const int rows, const int wide, const elem *const *a, const elem *panel, long depth, vec *sums)
{
    const long size = depth * PANEL;
    for (long k = 0; k < depth; k += PAIR) {
#pragma GCC unroll 4
        for (int w = 0; w < wide; w++) {
            const elem *columns = panel + w * size + k * PANEL;
            factor first = column(columns), second = column(columns + LANES * PAIR);
#pragma GCC unroll 12
            for (int i = 0; i < rows; i++) {
                factor x = pair_at(a[i] + k);
                vec *sum = sums + 2 * (w * rows + i);
                sum[0] = multiply_add(x, first, sum[0]);
                sum[1] = multiply_add(x, second, sum[1]);
            }
        }
    }
}

/* How a product ends. STORE: floats. ADD: to floats that are there. GELU: quick GELU, as factors.
   GATED: a panel holds LANES gates and then their LANES values; SiLU(gate) * value * scale, as factors. */
enum { STORE, ADD, GELU, GATED };

INLINE void finish(const int mode, vec first, vec second, long n, const matrix *w, void *out, float scale)
{
    if (mode == GATED) {
        put((elem *)out + n / 2, sigmoid_times(first, 1.0f) * second * spread(scale));
        return;
    }
    const int both = n + LANES < w->rows;
    if (w->bias) {
        first += load(w->bias + n);
        if (both)
            second += load(w->bias + n + LANES);
    }
    if (mode == GELU) {
        put((elem *)out + n, sigmoid_times(first, 1.702f));
        if (both)
            put((elem *)out + n + LANES, sigmoid_times(second, 1.702f));
        return;
    }
    float *y = (float *)out + n;
    if (mode == ADD) {
        first += load(y);
        if (both)
            second += load(y + LANES);
    }
    store(y, first);
    if (both)
        store(y + LANES, second);
}

INLINE void product_of(const int rows, const int wide, const int mode, const elem *const *a, const matrix *w,
                       void *const *out, const float *scale)
{
    const long panels = panels_of(w->rows), size = (long)w->depth * PANEL;
    long p = 0;
    for (; p + wide <= panels; p += wide) {
        vec sums[2 * ROWS];
#pragma GCC unroll 24
        for (int i = 0; i < 2 * rows * wide; i++)
            sums[i] = spread(0.0f);
        tile(rows, wide, a, w->data + p * size, w->depth, sums);
        for (int v = 0; v < wide; v++)
#pragma GCC unroll 12
            for (int i = 0; i < rows; i++) {
                const vec *sum = sums + 2 * (v * rows + i);
                finish(mode, sum[0], sum[1], (p + v) * PANEL, w, out[i], mode == GATED ? scale[i] : 1.0f);
            }
    }
    if (wide > 1 && p < panels) {
        for (; p < panels; p++) {
            vec sums[2 * ROWS];
            for (int i = 0; i < 2 * rows; i++)
                sums[i] = spread(0.0f);
            tile(rows, 1, a, w->data + p * size, w->depth, sums);
            for (int i = 0; i < rows; i++)
                finish(mode, sums[2 * i], sums[2 * i + 1], p * PANEL, w, out[i], mode == GATED ? scale[i] : 1.0f);
        }
    }
}

#define CASE(rows, wide, mode) \
    case rows: \
        product_of(rows, wide, mode, a, w, out, scale); \
        break;
#ifdef __AVX512F__
#define MORE_CASES(mode) \
    CASE(7, 1, mode) CASE(8, 1, mode) CASE(9, 1, mode) CASE(10, 1, mode) CASE(11, 1, mode) CASE(12, 1, mode)
#else
#define MORE_CASES(mode)
#endif
/* Up to ROWS rows a[i] of `depth` factors, times a matrix, to out[i]. */
#define PRODUCT(name, mode) \
    static void name(int rows, const elem *const *a, const matrix *w, void *const *out, const float *scale) \
    { \
        switch (rows) { \
            CASE(1, 4, mode) CASE(2, 2, mode) CASE(3, 2, mode) CASE(4, 1, mode) CASE(5, 1, mode) CASE(6, 1, mode) \
            MORE_CASES(mode) \
        } \
    }
PRODUCT(product_store, STORE)
PRODUCT(product_add, ADD)
PRODUCT(product_gelu, GELU)
PRODUCT(product_gated, GATED)

typedef void product(int, const elem *const *, const matrix *, void *const *, const float *);

/* Any number of rows, `a_step` factors apart, to outputs that are `out_step` bytes apart. */
static void product_rows(product *run, long rows, const elem *a, long a_step, const matrix *w, void *out,
                         long out_step)
{
    const elem *from[ROWS];
    void *to[ROWS];
    for (long tiles = (rows + ROWS - 1) / ROWS, done = 0; tiles > 0; tiles--) {
        int count = (int)((rows - done + tiles - 1) / tiles);
        for (int i = 0; i < count; i++) {
            from[i] = a + (done + i) * a_step;
            to[i] = (char *)out + (done + i) * out_step;
        }
        run(count, from, w, to, NULL);
        done += count;
    }
}

/* ---- rows -------------------------------------------------------------------------------------------------- */

/* y = x / rms(x) * weight, as floats, as factors, or both. */
static void rms_norm(const float *x, long width, const float *weight, float eps, float *y, elem *z)
{
    vec square = spread(0.0f);
    for (long d = 0; d < width; d += LANES)
        square = fma(load(x + d), load(x + d), square);
    vec scale = spread(1.0f / sqrtf(sum_of(square) / (float)width + eps));
    for (long d = 0; d < width; d += LANES) {
        vec v = load(x + d) * scale * load(weight + d);
        if (y)
            store(y + d, v);
        if (z)
            put(z + d, v);
    }
}

static void layer_norm(const float *x, long width, const float *weight, const float *bias, float eps, float *y,
                       elem *z)
{
    vec sum = spread(0.0f), square = spread(0.0f);
    for (long d = 0; d < width; d += LANES)
        sum += load(x + d);
    vec mean = spread(sum_of(sum) / (float)width);
    for (long d = 0; d < width; d += LANES) {
        vec off = load(x + d) - mean;
        square = fma(off, off, square);
    }
    vec scale = spread(1.0f / sqrtf(sum_of(square) / (float)width + eps));
    for (long d = 0; d < width; d += LANES) {
        vec v = fma((load(x + d) - mean) * scale, load(weight + d), load(bias + d));
        if (y)
            store(y + d, v);
        else
            put(z + d, v);
    }
}

/* y = exp(x - the largest x), of `width` floats; return their sum. y may be x. */
static float exponentials(const float *x, long width, float *y)
{
    vec high = load(x), total = spread(0.0f);
    for (long d = LANES; d < width; d += LANES)
        high = maximum(high, load(x + d));
    high = spread(max_of(high));
    for (long d = 0; d < width; d += LANES) {
        vec v = exponential(load(x + d) - high);
        total += v;
        store(y + d, v);
    }
    return sum_of(total);
}

static void to_factors(const float *x, long width, elem *z)
{
    for (long d = 0; d < width; d += LANES)
        put(z + d, load(x + d));
}

/* ---- attention --------------------------------------------------------------------------------------------- */

/* Keys and values of `heads` heads of `width` values for up to `room` tokens, packed for products.
   Keys: (heads, room / PANEL, width / PAIR, PANEL, PAIR). Values: (heads, width panels, room / PAIR, PANEL, PAIR). */
typedef struct {
    elem *keys, *values;
    long room, heads, width;
} packed;

INLINE long keys_size(long room, long heads, long width) { return heads * up_to(room, PANEL) * width; }
INLINE long values_size(long room, long heads, long width)
{
    return heads * up_to(room, PANEL) * up_to(width, PANEL);
}

/* Put a token's keys and values (heads * width), as factors, in their places. */
static void pack_token(const packed *to, long token, const elem *key, const elem *value)
{
    const long room = up_to(to->room, PANEL), width = to->width, wide = up_to(width, PANEL);
    for (long h = 0; h < to->heads; h++) {
        elem *keys = to->keys + (h * room + token / PANEL * PANEL) * width + token % PANEL * PAIR;
        for (long d = 0; d < width; d += PAIR)
            memcpy(keys + d * PANEL, key + h * width + d, PAIR * sizeof(elem));
        elem *values = to->values + h * room * wide + token / PAIR * PAIR * PANEL + token % PAIR;
        for (long d = 0; d < width; d++)
            values[d / PANEL * PANEL * room + d % PANEL * PAIR] = value[h * width + d];
    }
}

/* Zero what products read beyond `tokens`: of the values, one of a pair. */
static void pack_end(const packed *to, long tokens)
{
#ifdef BF16
    const long room = up_to(to->room, PANEL), width = to->width, wide = up_to(width, PANEL);
    if (tokens % PAIR)
        for (long h = 0; h < to->heads; h++)
            for (long d = 0; d < width; d++)
                to->values[h * room * wide + d / PANEL * PANEL * room + tokens / PAIR * PAIR * PANEL +
                           d % PANEL * PAIR + tokens % PAIR] = 0;
#else
    (void)to, (void)tokens;
#endif
}

INLINE void tile_of(const int rows, const elem *const *a, const elem *panel, long depth, vec *sums)
{
#pragma GCC unroll 24
    for (int i = 0; i < 2 * rows; i++)
        sums[i] = spread(0.0f);
    tile(rows, 1, a, panel, depth, sums);
}

/* Attention of up to ROWS rows of one head. q[i]: scaled queries as factors. ends[i]: keys that row i sees.
   out[i]: where its width factors go. scores: room for rows * stride floats; shares: the same in factors. */
INLINE void attend_of(const int rows, const packed *kv, long h, const elem *const *q, const long *ends, elem *const *out,
                      float *scores, elem *shares, long stride)
{
    const long room = up_to(kv->room, PANEL), width = kv->width, wide = up_to(width, PANEL);
    long most = 0;
    for (int i = 0; i < rows; i++)
        most = ends[i] > most ? ends[i] : most;
    const long padded = up_to(most, PANEL), deep = up_to(most, PAIR);
    vec sums[2 * ROWS];
    for (long t = 0; t < padded; t += PANEL) { /* keys that no row sees, too: another thread may be packing them */
        tile_of(rows, q, kv->keys + (h * room + t) * width, width, sums);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            store(scores + i * stride + t, sums[2 * i]);
            store(scores + i * stride + t + LANES, sums[2 * i + 1]);
        }
    }
    const elem *from[ROWS];
    float totals[ROWS];
    for (int i = 0; i < rows; i++) {
        float *row = scores + i * stride;
        from[i] = shares + i * stride;
        for (long t = ends[i]; t < padded; t++)
            row[t] = -INFINITY;
        vec high = load(row), total = spread(0.0f);
        for (long t = LANES; t < padded; t += LANES)
            high = maximum(high, load(row + t));
        high = spread(max_of(high));
        for (long t = 0; t < padded; t += LANES) {
            vec v = exponential(load(row + t) - high);
            total += v;
            put(shares + i * stride + t, v);
        }
        for (long t = ends[i]; t < deep; t++)
            shares[i * stride + t] = 0;
        totals[i] = 1.0f / sum_of(total);
    }
    for (long d = 0; d < width; d += PANEL) {
        tile_of(rows, from, kv->values + h * room * wide + d * room, deep, sums);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            put(out[i] + d, sums[2 * i] * spread(totals[i]));
            if (d + LANES < width)
                put(out[i] + d + LANES, sums[2 * i + 1] * spread(totals[i]));
        }
    }
}

#define ATTEND(n) \
    case n: \
        attend_of(n, kv, h, from, ends, to, scores, shares, stride); \
        break;
/* Attention of `rows` rows, `q_step` factors apart; row i sees `first_end + i` keys, or `first_end` if not causal. */
static void attend(const packed *kv, long rows, const elem *q, long q_step, long first_end, int causal, elem *out,
                   long out_step, float *scores, elem *shares, long stride)
{
    const elem *from[ROWS];
    elem *to[ROWS];
    long ends[ROWS];
    for (long h = 0; h < kv->heads; h++)
        for (long tiles = (rows + ROWS - 1) / ROWS, done = 0; tiles > 0; tiles--) {
            int count = (int)((rows - done + tiles - 1) / tiles);
            for (int i = 0; i < count; i++) {
                from[i] = q + (done + i) * q_step + h * kv->width;
                to[i] = out + (done + i) * out_step + h * kv->width;
                ends[i] = first_end + (causal ? done + i : 0);
            }
            switch (count) {
                ATTEND(1) ATTEND(2) ATTEND(3) ATTEND(4) ATTEND(5) ATTEND(6)
#ifdef __AVX512F__
                ATTEND(7) ATTEND(8) ATTEND(9) ATTEND(10) ATTEND(11) ATTEND(12)
#endif
            }
            done += count;
        }
}

/* ---- tasks and threads ------------------------------------------------------------------------------------- */

enum { MOST_THREADS = 64, SPINS = 2000 };

typedef int ticker(void);

/* `count` tasks, taken in order, `lag` of them a layer. Task t may begin once all tasks up to t - lag are done.
   The caller's thread calls `tick` before the first layer, and when it comes to another one. */
typedef struct job {
    void (*run)(const struct job *, long task, char *scratch);
    const void *work;
    long count, lag, scratch;
    ticker *tick;
    _Atomic long next;
    _Atomic long current[MOST_THREADS];
    _Atomic int over;
} job;

typedef struct {
    pthread_mutex_t lock, taken;
    pthread_cond_t begin, end;
    job *now;
    int threads, busy, wanted;
    long number; /* of the job */
} crew;

#define NEW_CREW \
    {PTHREAD_MUTEX_INITIALIZER, PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, PTHREAD_COND_INITIALIZER, \
     NULL, 0, 0, 0, 0}
static crew the_crew = NEW_CREW;

/* A fork leaves the threads behind, and locks as they were. */
static void forget_crew(void) { the_crew = (crew)NEW_CREW; }

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, forget_crew); }

INLINE int is_due(job *j, int me, long task)
{
    for (int i = 0; i < MOST_THREADS; i++)
        if (i != me && atomic_load(&j->current[i]) <= task - j->lag)
            return 0;
    return 1;
}

static void take_tasks(job *j, int me)
{
    char *scratch = aligned_alloc(64, up_to(j->scratch, 64));
    long layer = 0;
    while (scratch && !atomic_load(&j->over)) {
        atomic_store(&j->current[me], atomic_load(&j->next)); /* a bound for those who look before the task is known */
        long task = atomic_fetch_add(&j->next, 1);
        if (task >= j->count)
            break;
        atomic_store(&j->current[me], task);
        if (me == 0 && j->tick && task / j->lag > layer) {
            layer = task / j->lag;
            if (j->tick()) {
                atomic_store(&j->over, 1);
                break;
            }
        }
        for (int spins = 0; !is_due(j, me, task); spins++) {
            if (atomic_load(&j->over))
                break;
            if (spins < SPINS)
                _mm_pause();
            else
                sched_yield();
        }
        if (atomic_load(&j->over))
            break;
        j->run(j, task, scratch);
    }
    if (!scratch && me == 0) /* else the caller does without this worker */
        atomic_store(&j->over, 2);
    atomic_store(&j->current[me], INT64_MAX);
    free(scratch);
}

static void *work_for_ever(void *number)
{
    const int me = (int)(intptr_t)number;
    crew *c = &the_crew;
    long done = 0;
    pthread_mutex_lock(&c->lock);
    for (;;) {
        while (!c->now || c->number == done || me >= c->wanted)
            pthread_cond_wait(&c->begin, &c->lock);
        job *now = c->now;
        done = c->number;
        c->busy++;
        pthread_mutex_unlock(&c->lock);
        take_tasks(now, me);
        pthread_mutex_lock(&c->lock);
        if (--c->busy == 0)
            pthread_cond_signal(&c->end);
    }
    return NULL;
}

/* Run all tasks on up to `threads` threads, of which the caller is one and a layer's tasks the most; alone if another caller has them.
   Return 0, 1 if the ticker ended it, 2 if there was no memory. */
static int run_job(job *j, int threads)
{
    crew *c = &the_crew;
    if (j->tick && j->tick())
        return 1;
    atomic_store(&j->next, 0);
    atomic_store(&j->over, 0);
    for (int i = 0; i < MOST_THREADS; i++)
        atomic_store(&j->current[i], INT64_MAX);
    threads = (int)least(least(threads, MOST_THREADS), least(j->lag, j->count));
    if (threads < 2 || pthread_mutex_trylock(&c->taken)) {
        take_tasks(j, 0);
        return atomic_load(&j->over);
    }
    pthread_mutex_lock(&c->lock);
    for (pthread_t t; c->threads < threads - 1; c->threads++) {
        if (pthread_create(&t, NULL, work_for_ever, (void *)(intptr_t)(c->threads + 1)))
            break;
        pthread_detach(t);
    }
    c->now = j;
    c->number++;
    c->wanted = threads;
    pthread_cond_broadcast(&c->begin);
    pthread_mutex_unlock(&c->lock);
    take_tasks(j, 0);
    pthread_mutex_lock(&c->lock);
    c->now = NULL;
    while (c->busy)
        pthread_cond_wait(&c->end, &c->lock);
    pthread_mutex_unlock(&c->lock);
    pthread_mutex_unlock(&c->taken);
    return atomic_load(&j->over);
}

/* Take the next `count` items of `size` bytes, on a boundary of 64 bytes. */
INLINE void *take(char **at, long count, long size)
{
    void *p = *at;
    *at += up_to(count * size, 64);
    return p;
}

/* ---- vision transformer ------------------------------------------------------------------------------------ */

enum { CHUNK = 48 /* rows that a thread takes through all products, so that they stay in its cache */ };

typedef struct {
    matrix qkv, out, up, down;
    const float *norm, *norm_bias, *mlp_norm, *mlp_norm_bias;
} vision_block;

typedef struct {
    matrix patches;
    const float *positions; /* (tokens, width), the class embedding in the first row */
    const float *norm, *norm_bias;
    const vision_block *blocks;
    const int32_t *keep; /* (blocks,): place of the output in the features, or -1 */
    int32_t num_blocks, num_kept, width, heads, tokens, patch_values;
    float eps;
} vision;

typedef struct {
    const vision *model;
    const float *patches;
    float *x, *features;
} encoding;

static void encode_task(const job *j, long task, char *scratch)
{
    const encoding *e = j->work;
    const vision *m = e->model;
    const long layer = task / j->lag, crop = task % j->lag, T = m->tokens, D = m->width, W = D / m->heads;
    const long stride = up_to(T, PANEL), hidden = m->blocks[0].up.rows;
    float *x = e->x + crop * T * D;
    elem *factors = take(&scratch, CHUNK * (hidden > m->patch_values ? hidden : m->patch_values), sizeof(elem));
    if (layer == 0) {
        const float *patches = e->patches + crop * (T - 1) * m->patch_values;
        for (long r = 0; r < T - 1; r += CHUNK) {
            long count = least(CHUNK, T - 1 - r);
            for (long i = 0; i < count; i++)
                to_factors(patches + (r + i) * m->patch_values, m->patch_values, factors + i * m->patch_values);
            product_rows(product_store, count, factors, m->patch_values, &m->patches, x + (r + 1) * D,
                         D * (long)sizeof(float));
        }
        memset(x, 0, D * sizeof(float));
        for (long t = 0; t < T; t++) {
            for (long d = 0; d < D; d += LANES)
                store(x + t * D + d, load(x + t * D + d) + load(m->positions + t * D + d));
            layer_norm(x + t * D, D, m->norm, m->norm_bias, m->eps, x + t * D, NULL);
        }
    }
    const vision_block *b = m->blocks + layer;
    elem *normed = take(&scratch, CHUNK * D, sizeof(elem)), *query = take(&scratch, T * D, sizeof(elem));
    elem *key = take(&scratch, 2 * D, sizeof(elem)), *value = key + D;
    float *qkv = take(&scratch, CHUNK * 3 * D, sizeof(float)), *scores = take(&scratch, ROWS * stride, sizeof(float));
    elem *shares = take(&scratch, ROWS * stride, sizeof(elem));
    packed kv = {NULL, NULL, T, m->heads, W};
    kv.keys = take(&scratch, keys_size(T, m->heads, W), sizeof(elem));
    kv.values = take(&scratch, values_size(T, m->heads, W), sizeof(elem));
    const vec scale = spread(1.0f / sqrtf((float)W));
    for (long r = 0; r < T; r += CHUNK) {
        long count = least(CHUNK, T - r);
        for (long i = 0; i < count; i++)
            layer_norm(x + (r + i) * D, D, b->norm, b->norm_bias, m->eps, NULL, normed + i * D);
        product_rows(product_store, count, normed, D, &b->qkv, qkv, 3 * D * (long)sizeof(float));
        for (long i = 0; i < count; i++) {
            const float *row = qkv + i * 3 * D;
            for (long d = 0; d < D; d += LANES)
                put(query + (r + i) * D + d, load(row + d) * scale);
            to_factors(row + D, D, key);
            to_factors(row + 2 * D, D, value);
            pack_token(&kv, r + i, key, value);
        }
    }
    pack_end(&kv, T);
    for (long r = 0; r < T; r += CHUNK) {
        long count = least(CHUNK, T - r);
        float *rows = x + r * D;
        attend(&kv, count, query + r * D, D, T, 0, normed, D, scores, shares, stride);
        product_rows(product_add, count, normed, D, &b->out, rows, D * (long)sizeof(float));
        for (long i = 0; i < count; i++)
            layer_norm(rows + i * D, D, b->mlp_norm, b->mlp_norm_bias, m->eps, NULL, normed + i * D);
        product_rows(product_gelu, count, normed, D, &b->up, factors, hidden * (long)sizeof(elem));
        product_rows(product_add, count, factors, hidden, &b->down, rows, D * (long)sizeof(float));
    }
    if (m->keep[layer] >= 0)
        for (long t = 1; t < T; t++)
            memcpy(e->features + ((crop * (T - 1) + t - 1) * m->num_kept + m->keep[layer]) * D, x + t * D,
                   D * sizeof(float));
}

/* patches (crops, tokens - 1, patch values) to features (crops, tokens - 1, kept * width). */
EXPORT int encode(const vision *m, const float *patches, long crops, float *features, int threads, ticker *tick)
{
    const long T = m->tokens, D = m->width, W = D / m->heads, stride = up_to(T, PANEL);
    const long hidden = m->blocks[0].up.rows, wide = hidden > m->patch_values ? hidden : m->patch_values;
    const long floats = CHUNK * 3 * D + ROWS * stride;
    const long elems = CHUNK * (wide + D) + T * D + 2 * D + ROWS * stride + keys_size(T, m->heads, W) +
                       values_size(T, m->heads, W);
    float *x = aligned_alloc(64, up_to(crops * T * D * (long)sizeof(float), 64));
    if (!x)
        return 2;
    encoding e = {m, patches, x, features};
    job j = {encode_task, &e, crops * m->num_blocks, crops, floats * (long)sizeof(float) + elems * (long)sizeof(elem) + 1024,
             tick, 0, {0}, 0};
    int over = run_job(&j, threads);
    free(x);
    return over;
}

/* ---- projector --------------------------------------------------------------------------------------------- */

typedef struct {
    matrix query, key_value, out, gate_up, down;
    const float *padding; /* (2, features): added where a patch is empty, and where it is in part */
    int32_t side, pool, heads, features, width, out_width;
} projector;

enum { MOST_POOLED = 64 /* patches of a window */ };

typedef struct {
    const projector *model;
    const float *features, *masks;
    float *tokens;
} projection;

/* One row of windows of one crop. */
static void project_task(const job *j, long task, char *scratch)
{
    const projection *p = j->work;
    const projector *m = p->model;
    const long s = m->side, k = m->pool, F = m->features, D = m->width, keys = k * k, W = D / m->heads;
    const long crop = task / s, line = task % s, patches = s * k, hidden = m->down.depth;
    elem *windows = take(&scratch, s * keys * F, sizeof(elem)), *means = take(&scratch, s * F, sizeof(elem));
    elem *mixed = take(&scratch, s * D, sizeof(elem)), *gated = take(&scratch, s * hidden, sizeof(elem));
    float *kv = take(&scratch, s * keys * 2 * D, sizeof(float)), *q = take(&scratch, s * D, sizeof(float));
    float *row = take(&scratch, 2 * F, sizeof(float)), *mean = row + F;
    for (long w = 0; w < s; w++) {
        memset(mean, 0, F * sizeof(float));
        for (long n = 0; n < keys; n++) {
            const long patch = (crop * patches + line * k + n / k) * patches + w * k + n % k;
            const float mask = p->masks[patch];
            const float empty = mask == 0.0f, partial = mask < 1.0f && mask != 0.0f;
            for (long d = 0; d < F; d += LANES) {
                vec v = load(p->features + patch * F + d) + spread(empty) * load(m->padding + d) +
                        spread(partial) * load(m->padding + F + d);
                put(windows + (w * keys + n) * F + d, v);
                store(mean + d, load(mean + d) + v);
            }
        }
        for (long d = 0; d < F; d += LANES)
            put(means + w * F + d, load(mean + d) * spread(1.0f / (float)keys));
    }
    product_rows(product_store, s, means, F, &m->query, q, D * (long)sizeof(float));
    product_rows(product_store, s * keys, windows, F, &m->key_value, kv, 2 * D * (long)sizeof(float));
    const float scale = 1.0f / sqrtf((float)W);
    for (long w = 0; w < s; w++)
        for (long h = 0; h < m->heads; h++) {
            float share[MOST_POOLED], high = -INFINITY, total = 0.0f;
            for (long n = 0; n < keys; n++) {
                float sum = 0.0f;
                for (long d = h * W; d < (h + 1) * W; d++)
                    sum += q[w * D + d] * kv[(w * keys + n) * 2 * D + d];
                share[n] = sum * scale;
                high = share[n] > high || share[n] != share[n] ? share[n] : high;
            }
            for (long n = 0; n < keys; n++)
                total += share[n] = expf(share[n] - high);
            for (long d = h * W; d < (h + 1) * W; d++) {
                float sum = 0.0f;
                for (long n = 0; n < keys; n++)
                    sum += share[n] * kv[(w * keys + n) * 2 * D + D + d];
                q[w * D + d] = sum / total;
            }
        }
    to_factors(q, s * D, mixed);
    product_rows(product_store, s, mixed, D, &m->out, kv, D * (long)sizeof(float));
    to_factors(kv, s * D, mixed);
    const elem *from[ROWS];
    void *to[ROWS];
    float ones[ROWS];
    for (long w = 0; w < s; w += ROWS) {
        int count = (int)least(ROWS, s - w);
        for (int i = 0; i < count; i++)
            from[i] = mixed + (w + i) * D, to[i] = gated + (w + i) * hidden, ones[i] = 1.0f;
        product_gated(count, from, &m->gate_up, to, ones);
    }
    product_rows(product_store, s, gated, hidden, &m->down, p->tokens + (crop * s + line) * s * m->out_width,
                 m->out_width * (long)sizeof(float));
}

/* features (crops, patches, F) and shares of real pixels (crops, patches) to tokens (crops, side^2, out width). */
EXPORT int project(const projector *m, const float *features, const float *masks, long crops, float *tokens,
                   int threads)
{
    const long s = m->side, keys = m->pool * m->pool, D = m->width, F = m->features;
    const long elems = s * (keys * F + F + D + m->down.depth), floats = s * (keys * 2 + 1) * D + 2 * F;
    projection p = {m, features, masks, tokens};
    job j = {project_task, &p, crops * s, crops * s + 1, elems * (long)sizeof(elem) + floats * (long)sizeof(float) + 1024,
             NULL, 0, {0}, 0};
    return run_job(&j, threads);
}

/* ---- decoder ----------------------------------------------------------------------------------------------- */

typedef struct {
    matrix qkv, out;
    matrix gate_up, down; /* of the first expert; the others follow */
    const float *norm, *q_norm, *k_norm, *moe_norm;
    const float *router; /* (width, experts up to a multiple of 16) */
} block;

typedef struct {
    const block *blocks;
    matrix head;
    const float *norm, *cos, *sin; /* tables: (positions, head width) */
    int32_t width, heads, experts;
    float eps;
} decoder;

enum { MOST_EXPERTS = 256 };

/* Add the experts of `rows` rows (width) of x. */
static void visit_experts(const decoder *m, const block *b, long rows, float *x, int top_k, char *scratch)
{
    const long D = m->width, E = m->experts, wide = up_to(E, 16), hidden = b->down.depth;
    float *normed = take(&scratch, CHUNK * D, sizeof(float)), *weights = take(&scratch, wide * CHUNK, sizeof(float));
    elem *factors = take(&scratch, CHUNK * D, sizeof(elem)), *gated = take(&scratch, ROWS * hidden, sizeof(elem));
    uint8_t *lists = take(&scratch, E * CHUNK, 1);
    int counts[MOST_EXPERTS] = {0};
    float scores[MOST_EXPERTS] = {0};
    for (long i = 0; i < rows; i++) {
        float *row = normed + i * D;
        rms_norm(x + i * D, D, b->moe_norm, m->eps, row, factors + i * D);
        for (long e = 0; e < wide; e += LANES) {
            vec parts[4] = {spread(0.0f), spread(0.0f), spread(0.0f), spread(0.0f)};
            for (long d = 0; d < D; d += 4)
                for (int part = 0; part < 4; part++)
                    parts[part] = fma(spread(row[d + part]), load(b->router + (d + part) * wide + e), parts[part]);
            store(scores + e, (parts[0] + parts[1]) + (parts[2] + parts[3]));
        }
        for (long e = E; e < wide; e++)
            scores[e] = -INFINITY;
        const float sum = 1.0f / exponentials(scores, wide, weights + i * wide);
        for (long e = 0; e < E; e++) { /* those that fewer than top_k beat: of equals the first wins */
            int better = 0;
            vec mine = spread(scores[e]);
            for (long o = 0; o < wide; o += LANES) {
                vec others = load(scores + o);
                unsigned before = e <= o ? 0 : e - o >= LANES ? ~0u : (1u << (e - o)) - 1;
                better += __builtin_popcount(above(others, mine) | (equal(others, mine) & before));
            }
            if (better < top_k) {
                weights[i * wide + e] *= sum;
                lists[e * CHUNK + counts[e]++] = (uint8_t)i;
            }
        }
    }
    const long in_size = panels_of(b->gate_up.rows) * b->gate_up.depth * PANEL;
    const long out_size = panels_of(b->down.rows) * b->down.depth * PANEL;
    matrix gate_up = b->gate_up, down = b->down;
    for (long e = 0; e < E; e++, gate_up.data += in_size, down.data += out_size) {
        const elem *from[ROWS];
        void *to[ROWS];
        float shares[ROWS];
        for (long tiles = (counts[e] + ROWS - 1) / ROWS, done = 0; tiles > 0; tiles--) {
            int count = (int)((counts[e] - done + tiles - 1) / tiles);
            const uint8_t *rows_of = lists + e * CHUNK + done;
            for (int i = 0; i < count; i++) {
                from[i] = factors + rows_of[i] * D;
                to[i] = gated + i * hidden;
                shares[i] = weights[rows_of[i] * wide + e];
            }
            product_gated(count, from, &gate_up, to, shares);
            for (int i = 0; i < count; i++) {
                from[i] = gated + i * hidden;
                to[i] = x + rows_of[i] * D;
            }
            product_add(count, from, &down, to, NULL);
            done += count;
        }
    }
}

static long experts_scratch(const decoder *m)
{
    const long D = m->width, wide = up_to(m->experts, 16);
    return CHUNK * (D + wide) * (long)sizeof(float) + (CHUNK * D + ROWS * m->blocks[0].down.depth) * (long)sizeof(elem) +
           m->experts * CHUNK + 1024;
}

/* Rotate a row's heads in place (Su et al. 2021, the halves of a head being the pairs). */
INLINE void rotate(float *x, long heads, long W, const float *cos, const float *sin, float scale)
{
    for (long h = 0; h < heads; h++, x += W)
        for (long d = 0; d < W / 2; d++) {
            float first = x[d], second = x[d + W / 2];
            x[d] = (first * cos[d] - second * sin[d]) * scale;
            x[d + W / 2] = (second * cos[d + W / 2] + first * sin[d + W / 2]) * scale;
        }
}

/* Queries, keys and values (3 * width) of a row: norms and rotation, in place. Queries are scaled. */
static void prepare_row(const decoder *m, const block *b, float *qkv, long position)
{
    const long D = m->width, W = D / m->heads;
    const float *cos = m->cos + position * W, *sin = m->sin + position * W;
    rms_norm(qkv, D, b->q_norm, m->eps, qkv, NULL);
    rms_norm(qkv + D, D, b->k_norm, m->eps, qkv + D, NULL);
    rotate(qkv, m->heads, W, cos, sin, 1.0f / sqrtf((float)W));
    rotate(qkv + D, m->heads, W, cos, sin, 1.0f);
}

typedef struct {
    const decoder *model;
    const int32_t *steps, *top_k; /* (num_steps,): block, experts */
    long num_steps, batch, tokens, chunks, room;
    float *x;              /* (batch, tokens, width) */
    float *keys, *values;  /* (num_steps, batch, heads, capacity, head width) */
    long capacity;
    elem *query;           /* (batch, tokens, width) */
    elem *packed_keys, *packed_values; /* three steps' */
} reading;

enum { HELD = 3 /* steps whose packed keys are kept: a task may read those of two steps back at most */ };

static packed packed_of(const reading *r, long step, long row)
{
    const long H = r->model->heads, W = r->model->width / H, place = step % HELD * r->batch + row;
    packed kv = {r->packed_keys + place * keys_size(r->room, H, W), r->packed_values + place * values_size(r->room, H, W),
                 r->room, H, W};
    return kv;
}

/* Some tokens of one row: the rest of step - 1 after its queries, keys and values, then those of this step. */
static void read_task(const job *j, long task, char *scratch)
{
    const reading *r = j->work;
    const decoder *m = r->model;
    const long D = m->width, H = m->heads, W = D / H, T = r->tokens;
    const long step = task / j->lag, row = task % j->lag / r->chunks, first = task % r->chunks * CHUNK;
    const long count = least(CHUNK, T - first), stride = up_to(r->room, PANEL);
    float *x = r->x + (row * T + first) * D;
    elem *query = r->query + (row * T + first) * D;
    elem *normed = take(&scratch, CHUNK * D, sizeof(elem)), *key = take(&scratch, 2 * D, sizeof(elem));
    float *qkv = take(&scratch, CHUNK * 3 * D, sizeof(float)), *scores = take(&scratch, ROWS * stride, sizeof(float));
    elem *shares = take(&scratch, ROWS * stride, sizeof(elem));
    if (step > 0) {
        const block *b = m->blocks + r->steps[step - 1];
        packed kv = packed_of(r, step - 1, row);
        attend(&kv, count, query, D, first + 1, 1, normed, D, scores, shares, stride);
        product_rows(product_add, count, normed, D, &b->out, x, D * (long)sizeof(float));
        visit_experts(m, b, count, x, r->top_k[step - 1], scratch);
    }
    if (step == r->num_steps)
        return;
    const block *b = m->blocks + r->steps[step];
    packed kv = packed_of(r, step, row);
    for (long i = 0; i < count; i++)
        rms_norm(x + i * D, D, b->norm, m->eps, NULL, normed + i * D);
    product_rows(product_store, count, normed, D, &b->qkv, qkv, 3 * D * (long)sizeof(float));
    for (long i = 0; i < count; i++) {
        float *now = qkv + i * 3 * D;
        prepare_row(m, b, now, first + i);
        to_factors(now, D, query + i * D);
        to_factors(now + D, 2 * D, key);
        pack_token(&kv, first + i, key, key + D);
        for (long h = 0; h < H; h++) {
            const long place = (((step * r->batch + row) * H + h) * r->capacity + first + i) * W;
            memcpy(r->keys + place, now + D + h * W, W * sizeof(float));
            memcpy(r->values + place, now + 2 * D + h * W, W * sizeof(float));
        }
    }
    if (first + count == T)
        pack_end(&kv, T);
}

/* Final norm and head of one row: logits (head rows up to a multiple of LANES). */
static void head_of(const decoder *m, const float *x, elem *normed, float *logits)
{
    const elem *from[1] = {normed};
    void *to[1] = {logits};
    rms_norm(x, m->width, m->norm, m->eps, NULL, normed);
    product_store(1, from, &m->head, to, NULL);
}

/* Read prompts x (batch, tokens, width), which is changed, padded on the right to `lengths` (batch,).
   Keys and values go to the first places of a cache (steps, batch, heads, capacity, head width);
   logits (batch, head rows) are of the last real tokens. */
EXPORT int read_prompts(const decoder *m, const int32_t *steps, const int32_t *top_k, long num_steps, float *x,
                        long batch, long tokens, const int64_t *lengths, float *keys, float *values, long capacity,
                        float *logits, int threads, ticker *tick)
{
    const long D = m->width, H = m->heads, W = D / H, room = up_to(tokens, PANEL), stride = room;
    const long held = HELD * batch, rows = batch * tokens;
    const long sizes[] = {rows * D, held * keys_size(room, H, W), held * values_size(room, H, W), D};
    char *memory = aligned_alloc(64, up_to((sizes[0] + sizes[1] + sizes[2] + sizes[3]) * (long)sizeof(elem) + 512, 64));
    if (!memory)
        return 2;
    char *at = memory;
    reading r = {m, steps, top_k, num_steps, batch, tokens, (tokens + CHUNK - 1) / CHUNK, room, x, keys, values, capacity,
                 NULL, NULL, NULL};
    r.query = take(&at, sizes[0], sizeof(elem));
    r.packed_keys = take(&at, sizes[1], sizeof(elem));
    r.packed_values = take(&at, sizes[2], sizeof(elem));
    elem *normed = take(&at, sizes[3], sizeof(elem));
    const long scratch = (CHUNK * D + 2 * D + ROWS * stride) * (long)sizeof(elem) +
                         (CHUNK * 3 * D + ROWS * stride) * (long)sizeof(float) + experts_scratch(m) + 1024;
    const long lag = batch * r.chunks;
    job j = {read_task, &r, lag * (num_steps + 1), lag, scratch, tick, 0, {0}, 0};
    int over = run_job(&j, threads);
    for (long i = 0; i < batch && !over; i++)
        head_of(m, x + (i * tokens + lengths[i] - 1) * D, normed, logits + i * up_to(m->head.rows, LANES));
    free(memory);
    return over;
}

/* One token x (width), which is changed, at `position`: writes the cache there, and logits (head rows). */
EXPORT int decode(const decoder *m, const int32_t *steps, const int32_t *top_k, long num_steps, float *x, float *keys,
                  float *values, long capacity, long position, float *logits)
{
    const long D = m->width, H = m->heads, W = D / H, end = position + 1;
    char *memory = aligned_alloc(64, up_to(experts_scratch(m) + (D * 3 + up_to(end, LANES)) * (long)sizeof(float) +
                                           D * (long)sizeof(elem) + 1024, 64));
    if (!memory)
        return 2;
    char *at = memory;
    float *qkv = take(&at, 3 * D, sizeof(float)), *shares = take(&at, up_to(end, LANES), sizeof(float));
    elem *normed = take(&at, D, sizeof(elem));
    const elem *from[1] = {normed};
    for (long s = 0; s < num_steps; s++) {
        const block *b = m->blocks + steps[s];
        void *to_qkv[1] = {qkv}, *to_x[1] = {x};
        rms_norm(x, D, b->norm, m->eps, NULL, normed);
        product_store(1, from, &b->qkv, to_qkv, NULL);
        prepare_row(m, b, qkv, position);
        for (long h = 0; h < H; h++) {
            float *key = keys + (s * H + h) * capacity * W, *value = values + (s * H + h) * capacity * W;
            float *q = qkv + h * W;
            memcpy(key + position * W, q + D, W * sizeof(float));
            memcpy(value + position * W, q + 2 * D, W * sizeof(float));
            for (long t = 0; t < end; t++) {
                vec sum = spread(0.0f);
                for (long d = 0; d < W; d += LANES)
                    sum = fma(load(q + d), load(key + t * W + d), sum);
                shares[t] = sum_of(sum);
            }
            for (long t = end; t < up_to(end, LANES); t++)
                shares[t] = -INFINITY;
            const float scale = 1.0f / exponentials(shares, up_to(end, LANES), shares);
            for (long d = 0; d < W; d += LANES) {
                vec even = spread(0.0f), odd = spread(0.0f);
                long t = 0;
                for (; t + 1 < end; t += 2) {
                    even = fma(spread(shares[t]), load(value + t * W + d), even);
                    odd = fma(spread(shares[t + 1]), load(value + (t + 1) * W + d), odd);
                }
                if (t < end)
                    even = fma(spread(shares[t]), load(value + t * W + d), even);
                put(normed + h * W + d, (even + odd) * spread(scale));
            }
        }
        product_add(1, from, &b->out, to_x, NULL);
        visit_experts(m, b, 1, x, top_k[s], at);
    }
    head_of(m, x, normed, logits);
    free(memory);
    return 0;
}

/* Columns of a panel, and factors that are side by side in it. */
EXPORT int panel_columns(void) { return PANEL; }
EXPORT int panel_pair(void) { return PAIR; }
