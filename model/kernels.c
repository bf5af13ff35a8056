/* What decoding on a CPU spends its time in: the product in eight bits, and attention of one query a row.
 *
 * `model/kernels.py` compiles this file for the processor at hand; the tests hold it against torch. Numbers are
 * float32 and strides count them; letters of shapes are those of `model/attention.py`.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define HAS_VNNI 1
#else
#define HAS_VNNI 0
#endif

#if defined(__AVX2__) && defined(__FMA__)
#define HAS_PAIRS 1 /* products of bytes, added in pairs */
#else
#define HAS_PAIRS 0
#endif

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#define HAS_DOT 1
#include <arm_neon.h>
#else
#define HAS_DOT 0
#endif

#if HAS_VNNI || HAS_PAIRS
#include <immintrin.h>
#endif
#define HAS_INT8 (HAS_VNNI || HAS_PAIRS || HAS_DOT)

#if HAS_VNNI && defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__linux__)
#define HAS_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define HAS_TILES 0
#endif

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__) /* for whoever calls it the same instructions, and so the same bits */
#define ONE_WAY static __attribute__((noinline))
#define UNROLL _Pragma("clang loop unroll(full)") /* a count leaves a loop, whose sums lie in memory */
#else
#define ONE_WAY static __attribute__((noipa))
#define UNROLL _Pragma("GCC unroll 8")
#endif
#define LITTLE 60000 /* numbers: work on fewer is done before another thread has woken */

/* A buffer of at least `size` bytes that a thread keeps for its next call; NULL where there is no memory. */
static void *scratch(size_t size)
{
    static _Thread_local void *buffer;
    static _Thread_local size_t held;
    if (size > held) {
        void *larger = NULL;
        if (posix_memalign(&larger, 64, size) != 0)
            return NULL;
        free(buffer);
        buffer = larger;
        held = size;
    }
    return buffer;
}

/* ---- y = x W' + b in eight bits ------------------------------------------------------------------------ */

#if HAS_INT8

#define BLOCK_ROWS 96  /* in eight bits at a time, so that they stay in the second cache */
#define BLOCK_ROWS_TILED 128
#ifndef FEWEST_TILED
#define FEWEST_TILED 6 /* rows: fewer are done sooner in the ordinary registers */
#endif

#if HAS_VNNI

#define PANEL 64    /* outputs whose weights lie together: (N / 64, K / 4, 64, 4) */
#define VECTORS 4   /* of a panel */
#define MOST_ROWS 6 /* of a tile: their 24 sums and a panel's 4 weights fit into the 32 registers */
typedef uint8_t eight; /* what a number of a row is rounded to */

#elif HAS_PAIRS

#define PANEL 16    /* (N / 16, K / 4, 16, 4) */
#define VECTORS 2   /* of a panel */
#define MOST_ROWS 4 /* of a tile: 8 sums, 4 rows' numbers and 4 more fit into the 16 registers */
typedef int8_t eight;

#else

#define PANEL 16
#define VECTORS 4   /* of 4 outputs each */
#define MOST_ROWS 4 /* of a tile: 16 sums, 4 rows' numbers and 4 weights, of 32 registers */
typedef int8_t eight;

#endif

struct product {
    const int8_t *weight; /* packed */
    const int32_t *shift; /* (N,) where an output's sum begins: `int8_shift` */
    const float *w_scale, *bias; /* (N,) */
    const float *scale;   /* a row each */
    const eight *x;
    long x_stride, n_out;
    float *out; /* (rows, out_stride), of which the first number is that of output `first_out` */
    long out_stride, first_out;
};

#if HAS_VNNI

/* A row in steps of scale, each number plus 128; returns the scale, NaN where the row holds no number. */
static float quantise(const float *x, long n, eight *out)
{
    __m512 most = _mm512_setzero_ps(), bad = _mm512_setzero_ps();
    for (long k = 0; k < n; k += 16) {
        __mmask16 part = n - k >= 16 ? 0xffff : (__mmask16)((1u << (n - k)) - 1);
        __m512 v = _mm512_maskz_loadu_ps(part, x + k);
        most = _mm512_max_ps(_mm512_abs_ps(v), most); /* of NaN and a number, the number: hence `bad` */
        bad = _mm512_fmadd_ps(v, _mm512_setzero_ps(), bad);
    }
    float peak = _mm512_reduce_max_ps(most);
    float scale = _mm512_reduce_add_ps(bad) == 0.0f ? peak / 127.0f : NAN;
    __m512 steps = _mm512_set1_ps(scale > 1e-36f ? 127.0f / peak : 0.0f);
    for (long k = 0; k < n; k += 16) {
        __mmask16 part = n - k >= 16 ? 0xffff : (__mmask16)((1u << (n - k)) - 1);
        __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(part, x + k), steps);
        __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(128));
        _mm_mask_storeu_epi8(out + k, part, _mm512_cvtepi32_epi8(whole));
    }
    return scale;
}

/* Sixteen outputs, of which the last may be beyond the end. */
struct column {
    long n;
    __mmask16 part;
    __m512 w_scale, bias;
};

INLINE struct column column(const struct product *p, long n)
{
    const long left = p->n_out - n;
    const __mmask16 part = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
    return (struct column){n, part, _mm512_maskz_loadu_ps(part, p->w_scale + n),
                           _mm512_maskz_loadu_ps(part, p->bias + n)};
}

/* A row's sums in units of the scales, and the bias. */
INLINE void finish(const struct product *p, const struct column *c, long row, __m512i sums)
{
    const __m512 unit = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), c->w_scale);
    const __m512 y = _mm512_fmadd_ps(unit, _mm512_set1_ps(p->scale[row]), c->bias);
    _mm512_mask_storeu_ps(p->out + row * p->out_stride + c->n - p->first_out, c->part, y);
}

/* `n_rows` rows, known when compiling, times a panel: all sums stay in registers. Of the intrinsic function
 * GCC 12 makes copies of every sum, at half the speed; hence the instruction itself. */
INLINE void tile(const struct product *p, long row, long panel, const int n_rows)
{
    __m512i sums[MOST_ROWS][VECTORS];
    const long depth = p->x_stride; /* the weights of numbers past n_in are zeros */
    const int8_t *w = p->weight + panel * depth * PANEL;
    const uint8_t *x = p->x + row * depth;
    UNROLL
    for (int i = 0; i < n_rows; i++)
        UNROLL
        for (int j = 0; j < VECTORS; j++)
            sums[i][j] = _mm512_loadu_si512(p->shift + panel * PANEL + 16 * j);
    for (long k = 0; k < depth; k += 4, w += 4 * PANEL) {
        __m512i own[VECTORS];
        UNROLL
        for (int j = 0; j < VECTORS; j++)
            own[j] = _mm512_loadu_si512(w + 64 * j);
        UNROLL
        for (int i = 0; i < n_rows; i++) {
            int32_t four;
            memcpy(&four, x + i * depth + k, 4);
            const __m512i all = _mm512_set1_epi32(four);
            UNROLL
            for (int j = 0; j < VECTORS; j++)
                __asm__("vpdpbusd %2, %1, %0" : "+v"(sums[i][j]) : "v"(all), "v"(own[j]));
        }
    }
    UNROLL
    for (int j = 0; j < VECTORS; j++) {
        const struct column c = column(p, panel * PANEL + 16 * j);
        UNROLL
        for (int i = 0; i < n_rows; i++)
            finish(p, &c, row + i, sums[i][j]);
    }
}

#elif HAS_PAIRS

/* The first n of eight numbers, n from 0 to 8. */
INLINE __m256i first_of_eight(long n)
{
    static const int32_t ends[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    return _mm256_loadu_si256((const __m256i *)(ends + 8 - n));
}

INLINE __m256 load_part(const float *x, long left)
{
    return left >= 8 ? _mm256_loadu_ps(x) : _mm256_maskload_ps(x, first_of_eight(left < 0 ? 0 : left));
}

/* A row in steps of scale; returns the scale, NaN where the row holds no number. */
static float quantise(const float *x, long n, eight *out)
{
    __m256 most = _mm256_setzero_ps(), bad = _mm256_setzero_ps();
    for (long k = 0; k < n; k += 8) {
        const __m256 v = load_part(x + k, n - k);
        most = _mm256_max_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), v), most); /* of NaN and a number, the number */
        bad = _mm256_fmadd_ps(v, _mm256_setzero_ps(), bad);
    }
    float each[8], peak = 0.0f;
    _mm256_storeu_ps(each, most);
    for (int i = 0; i < 8; i++)
        peak = each[i] > peak ? each[i] : peak;
    const int sound = _mm256_movemask_ps(_mm256_cmp_ps(bad, _mm256_setzero_ps(), _CMP_NEQ_UQ)) == 0;
    const float scale = sound ? peak / 127.0f : NAN;
    const __m256 steps = _mm256_set1_ps(scale > 1e-36f ? 127.0f / peak : 0.0f);
    for (long k = 0; k < n; k += 8) {
        const __m256i whole = _mm256_cvtps_epi32(_mm256_mul_ps(load_part(x + k, n - k), steps));
        const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
        const int64_t bytes = _mm_cvtsi128_si64(_mm_packs_epi16(halves, halves));
        memcpy(out + k, &bytes, n - k >= 8 ? 8 : (size_t)(n - k));
    }
    return scale;
}

/* Eight outputs, of which the last may be beyond the end. */
struct column {
    long n, left;
    __m256 w_scale, bias;
};

INLINE struct column column(const struct product *p, long n)
{
    const long left = p->n_out - n;
    return (struct column){n, left, load_part(p->w_scale + n, left), load_part(p->bias + n, left)};
}

/* A row's sums in units of the scales, and the bias. */
INLINE void finish(const struct product *p, const struct column *c, long row, __m256i sums)
{
    const __m256 unit = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), c->w_scale);
    const __m256 y = _mm256_fmadd_ps(unit, _mm256_set1_ps(p->scale[row]), c->bias);
    float *out = p->out + row * p->out_stride + c->n - p->first_out;
    if (c->left >= 8)
        _mm256_storeu_ps(out, y);
    else if (c->left > 0)
        _mm256_maskstore_ps(out, first_of_eight(c->left), y);
}

/* `n_rows` rows, known when compiling, times a panel: all sums stay in registers. The product of bytes adds pairs in 16
 * bits and wants one side without signs: so the size of a weight is multiplied by the number, or, where the weight is
 * negative, by the number with its bits turned over, -1 - x: two of 127 times 128 still fit, and what is lacking then,
 * the size once more, is in `shift`. Left to itself, GCC 12 multiplies all before it adds, for which there are too few
 * registers; hence the instructions. */
INLINE void tile(const struct product *p, long row, long panel, const int n_rows)
{
    __m256i sums[MOST_ROWS][VECTORS];
    const long depth = p->x_stride; /* the weights of numbers past n_in are zeros */
    const int8_t *w = p->weight + panel * depth * PANEL;
    const eight *x = p->x + row * depth;
    const __m256i ones = _mm256_set1_epi16(1);
    const __m256i *shift = (const __m256i *)(p->shift + panel * PANEL);
    UNROLL
    for (int i = 0; i < n_rows; i++)
        UNROLL
        for (int j = 0; j < VECTORS; j++)
            sums[i][j] = _mm256_loadu_si256(shift + j);
    for (long k = 0; k < depth; k += 4, w += 4 * PANEL) {
        __m256i all[MOST_ROWS];
        UNROLL
        for (int i = 0; i < n_rows; i++) {
            int32_t four;
            memcpy(&four, x + i * depth + k, 4);
            all[i] = _mm256_set1_epi32(four);
        }
        UNROLL
        for (int j = 0; j < VECTORS; j++) {
            const __m256i own = _mm256_loadu_si256((const __m256i *)(w + 32 * j)), size = _mm256_abs_epi8(own);
            const __m256i negative = _mm256_cmpgt_epi8(_mm256_setzero_si256(), own);
            __m256i part;
            UNROLL
            for (int i = 0; i < n_rows; i++)
                __asm__("vpxor %2, %4, %1\n\tvpmaddubsw %1, %3, %1\n\tvpmaddwd %5, %1, %1\n\tvpaddd %1, %0, %0"
                        : "+x"(sums[i][j]), "=&x"(part)
                        : "x"(negative), "x"(size), "x"(all[i]), "x"(ones));
        }
    }
    UNROLL
    for (int j = 0; j < VECTORS; j++) {
        const struct column c = column(p, panel * PANEL + 8 * j);
        UNROLL
        for (int i = 0; i < n_rows; i++)
            finish(p, &c, row + i, sums[i][j]);
    }
}

#else

INLINE float32x4_t load_part(const float *x, long left)
{
    float four[4] = {0.0f};
    if (left >= 4)
        return vld1q_f32(x);
    for (long i = 0; i < left; i++)
        four[i] = x[i];
    return vld1q_f32(four);
}

/* A row in steps of scale; returns the scale, NaN where the row holds no number. */
static float quantise(const float *x, long n, eight *out)
{
    float32x4_t most = vdupq_n_f32(0.0f), bad = vdupq_n_f32(0.0f);
    for (long k = 0; k < n; k += 4) {
        const float32x4_t v = load_part(x + k, n - k);
        most = vmaxnmq_f32(most, vabsq_f32(v)); /* of NaN and a number, the number */
        bad = vfmaq_f32(bad, v, vdupq_n_f32(0.0f));
    }
    const float peak = vmaxvq_f32(most), scale = vaddvq_f32(bad) == 0.0f ? peak / 127.0f : NAN;
    const float32x4_t steps = vdupq_n_f32(scale > 1e-36f ? 127.0f / peak : 0.0f);
    for (long k = 0; k < n; k += 4) {
        const int16x4_t whole = vqmovn_s32(vcvtnq_s32_f32(vmulq_f32(load_part(x + k, n - k), steps)));
        const int32_t bytes = vget_lane_s32(vreinterpret_s32_s8(vqmovn_s16(vcombine_s16(whole, whole))), 0);
        memcpy(out + k, &bytes, n - k >= 4 ? 4 : (size_t)(n - k));
    }
    return scale;
}

/* Four outputs, of which the last may be beyond the end. */
struct column {
    long n, left;
    float32x4_t w_scale, bias;
};

INLINE struct column column(const struct product *p, long n)
{
    const long left = p->n_out - n;
    return (struct column){n, left, load_part(p->w_scale + n, left), load_part(p->bias + n, left)};
}

/* A row's sums in units of the scales, and the bias. */
INLINE void finish(const struct product *p, const struct column *c, long row, int32x4_t sums)
{
    const float32x4_t unit = vmulq_f32(vcvtq_f32_s32(sums), c->w_scale);
    const float32x4_t y = vfmaq_f32(c->bias, unit, vdupq_n_f32(p->scale[row]));
    float *out = p->out + row * p->out_stride + c->n - p->first_out, four[4];
    vst1q_f32(c->left >= 4 ? out : four, y);
    for (long i = 0; c->left < 4 && i < c->left; i++)
        out[i] = four[i];
}

/* `n_rows` rows, known when compiling, times a panel: all sums stay in registers. */
INLINE void tile(const struct product *p, long row, long panel, const int n_rows)
{
    int32x4_t sums[MOST_ROWS][VECTORS];
    const long depth = p->x_stride; /* the weights of numbers past n_in are zeros */
    const int8_t *w = p->weight + panel * depth * PANEL;
    const eight *x = p->x + row * depth;
    UNROLL
    for (int i = 0; i < n_rows; i++)
        UNROLL
        for (int j = 0; j < VECTORS; j++)
            sums[i][j] = vdupq_n_s32(0);
    for (long k = 0; k < depth; k += 4, w += 4 * PANEL) {
        int8x16_t all[MOST_ROWS];
        UNROLL
        for (int i = 0; i < n_rows; i++) {
            int32_t four;
            memcpy(&four, x + i * depth + k, 4);
            all[i] = vreinterpretq_s8_s32(vdupq_n_s32(four));
        }
        UNROLL
        for (int j = 0; j < VECTORS; j++) {
            const int8x16_t own = vld1q_s8(w + 16 * j);
            UNROLL
            for (int i = 0; i < n_rows; i++)
                sums[i][j] = vdotq_s32(sums[i][j], own, all[i]);
        }
    }
    UNROLL
    for (int j = 0; j < VECTORS; j++) {
        const struct column c = column(p, panel * PANEL + 4 * j);
        UNROLL
        for (int i = 0; i < n_rows; i++)
            finish(p, &c, row + i, sums[i][j]);
    }
}

#endif

INLINE void all_rows(const struct product *p, long n_rows, long panel)
{
    long row = 0;
    for (; row + MOST_ROWS <= n_rows; row += MOST_ROWS)
        tile(p, row, panel, MOST_ROWS);
    switch (n_rows - row) {
#if MOST_ROWS > 4
    case 5: tile(p, row, panel, 5); break;
    case 4: tile(p, row, panel, 4); break;
#endif
    case 3: tile(p, row, panel, 3); break;
    case 2: tile(p, row, panel, 2); break;
    case 1: tile(p, row, panel, 1); break;
    default: break;
    }
}

#if HAS_TILES

#define TILE_ROWS 16

/* May this process use the registers for matrices? Linux has to be asked, once for all threads. */
static int may_tile(void)
{
    static int granted; /* 1, or -1 */
    int known = __atomic_load_n(&granted, __ATOMIC_RELAXED);
    if (known == 0) {
        known = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0 ? 1 : -1;
        __atomic_store_n(&granted, known, __ATOMIC_RELAXED);
    }
    return known > 0;
}

/* All eight registers hold 16 rows of 64 bytes. The instruction itself, because GCC before 12.4 believes that the
 * intrinsic function reads the first 8 bytes alone, and may leave out the rest (its bug 114098). */
static void begin_tiles(void)
{
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shape.row_bytes[i] = 64;
        shape.rows[i] = TILE_ROWS;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(shape));
}

/* Up to 32 rows times half a panel: in four registers their sums, 64 numbers of a row at a time. */
static void tiled_half(const uint8_t *x, long depth, const int8_t *w, int two, int32_t (*sums)[PANEL])
{
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long k = 0; k < depth; k += 64) {
        _tile_loadd(4, w + k * PANEL, 4 * PANEL);
        _tile_loadd(5, w + k * PANEL + 64, 4 * PANEL);
        _tile_loadd(6, x + k, depth);
        _tile_dpbusd(0, 6, 4);
        _tile_dpbusd(1, 6, 5);
        if (two) {
            _tile_loadd(7, x + TILE_ROWS * depth + k, depth);
            _tile_dpbusd(2, 7, 4);
            _tile_dpbusd(3, 7, 5);
        }
    }
    _tile_stored(0, sums[0], 4 * PANEL);
    _tile_stored(1, sums[0] + 16, 4 * PANEL);
    if (two) {
        _tile_stored(2, sums[TILE_ROWS], 4 * PANEL);
        _tile_stored(3, sums[TILE_ROWS] + 16, 4 * PANEL);
    }
}

/* As `all_rows`, with the same sums. Reads up to a whole register's rows past the last. */
static void all_rows_tiled(const struct product *p, long n_rows, long panel)
{
    int32_t sums[2 * TILE_ROWS][PANEL] __attribute__((aligned(64)));
    const int8_t *w = p->weight + panel * p->x_stride * PANEL;
    for (long row = 0; row < n_rows; row += 2 * TILE_ROWS) {
        const long n = n_rows - row < 2 * TILE_ROWS ? n_rows - row : 2 * TILE_ROWS;
        for (int half = 0; half < 2; half++)
            tiled_half(p->x + row * p->x_stride, p->x_stride, w + 128 * half, n > TILE_ROWS,
                       (int32_t(*)[PANEL])(sums[0] + 32 * half));
        for (int j = 0; j < VECTORS; j++) {
            const struct column c = column(p, panel * PANEL + 16 * j);
            const __m512i shift = _mm512_loadu_si512(p->shift + panel * PANEL + 16 * j);
            for (long i = 0; i < n; i++)
                finish(p, &c, row + i, _mm512_add_epi32(_mm512_load_si512(sums[i] + 16 * j), shift));
        }
    }
}

#else

static int may_tile(void) { return 0; }

#endif

/* x (M, K), out (M, N); `weight` in panels with K padded to `depth` = a multiple of 4, N to one of 16.
 * Every row is rounded by itself and sums of whole numbers are exact, so no row feels another.
 * 0, or 1 where there is no memory. */
int int8_linear(const float *x, long n_rows, long n_in, long depth, const int8_t *weight, const int32_t *shift,
                const float *w_scale, const float *bias, long n_out, float *out, int n_threads)
{
    if (n_rows == 0)
        return 0;
    const int tiled = n_rows >= FEWEST_TILED && depth % 64 == 0 && may_tile();
    const long most = tiled ? BLOCK_ROWS_TILED : BLOCK_ROWS, at_once = n_rows < most ? n_rows : most;
    const long room = (at_once + 15) / 16 * 16; /* rows */
    eight *eights = scratch((size_t)(room * (depth + 4)));
    if (eights == NULL)
        return 1;
    float *scale = (float *)(eights + room * depth);
    const long n_panels = (n_out + PANEL - 1) / PANEL;
    for (long first = 0; first < n_rows; first += at_once) {
        const long n = n_rows - first < at_once ? n_rows - first : at_once;
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1 && n * depth > LITTLE)
        for (long i = 0; i < n; i++)
            scale[i] = quantise(x + (first + i) * n_in, n_in, eights + i * depth);
        const struct product p = {weight, shift, w_scale, bias, scale, eights, depth,
                                  n_out, out + first * n_out, n_out, 0};
#if HAS_TILES
        if (tiled) {
#pragma omp parallel num_threads(n_threads) if (n_threads > 1 && n * n_out * depth > 64 * LITTLE)
            {
                begin_tiles();
#pragma omp for schedule(static)
                for (long panel = 0; panel < n_panels; panel++)
                    all_rows_tiled(&p, n, panel);
                _tile_release();
            }
            continue;
        }
#endif
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1 && n * n_out * depth > 64 * LITTLE)
        for (long panel = 0; panel < n_panels; panel++)
            all_rows(&p, n, panel);
    }
    return 0;
}

/* Weights (N, K) in eight bits -> where the sum of each output begins (N,), to be right in the end. */
void int8_shift(const int8_t *weight, long n_out, long n_in, int32_t *shift)
{
    for (long n = 0; n < n_out; n++) {
        shift[n] = 0;
        for (long k = 0; k < n_in; k++) {
            const int32_t w = weight[n * n_in + k];
#if HAS_VNNI
            shift[n] -= 128 * w; /* `quantise` adds 128 to every number */
#elif HAS_PAIRS
            shift[n] -= w < 0 ? w : 0; /* `tile` takes one from it under every negative weight */
#else
            (void)w; /* nothing is added to a number, and nothing taken from it */
#endif
        }
    }
}

#endif

/* How many outputs' weights lie together; 0 without products in eight bits. */
int panel_width(void)
{
#if HAS_INT8
    return PANEL;
#else
    return 0;
#endif
}

/* ---- attention of one query a row ------------------------------------------------------------------------ */

/* As wide as a register: wider ones GCC 12 keeps in memory, at a quarter of the speed. */
#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#define MOST_HELD 128
typedef float lanes __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef int32_t whole_lanes __attribute__((vector_size(4 * WIDTH), aligned(4)));

INLINE float total(lanes v)
{
    typedef float four __attribute__((vector_size(16)));
    four parts[WIDTH / 4];
    memcpy(parts, &v, sizeof parts);
    for (int width = WIDTH / 8; width > 0; width /= 2)
        for (int i = 0; i < width; i++)
            parts[i] += parts[i + width];
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

/* e^x for x <= 0, to the last bits of a float; NaN stays. After Cephes' expf (Moshier 1989). */
INLINE float exponential(float x)
{
    const float least = -87.0f;
    float bounded = x < least ? least : x;
    float n = rintf(bounded * 1.44269504f);
    float r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const uint32_t bits = (uint32_t)((int32_t)n + 127) << 23; /* of NaN anything, which p makes NaN again */
    float power;
    memcpy(&power, &bits, 4);
    return x < least ? 0.0f : p * power;
}

/* softmax(q k') v of one head: k and v (S, K), or, with `origins` (S,), position s out of the row that origins[s] is
 * from the present one. `weights` (S,) is written on the way. */
INLINE void attend_head(const float *q, const float *k, const float *v, const int32_t *origins, long origin,
                        long row_stride, long n, const long head_dim, float factor, float *weights, float *out)
{
#define PLACE(s) ((s) * head_dim + (origins == NULL ? 0 : (origins[s] - origin) * row_stride))
    float most = -INFINITY, sum = 0.0f;
    for (long s = 0; s < n; s++) {
        const float *key = k + PLACE(s);
        float dot = 0.0f;
        if (head_dim % WIDTH == 0) {
            lanes sums = *(const lanes *)q * *(const lanes *)key;
            for (long i = WIDTH; i < head_dim; i += WIDTH)
                sums += *(const lanes *)(q + i) * *(const lanes *)(key + i);
            dot = total(sums);
        } else {
            for (long i = 0; i < head_dim; i++)
                dot += q[i] * key[i];
        }
        for (long i = 0; i < head_dim; i += 16) /* a line; memory is what it waits for: a fifth of the time */
            __builtin_prefetch(v + PLACE(s) + i);
        weights[s] = dot *= factor;
        most = dot > most ? dot : most;
    }
#pragma omp simd reduction(+ : sum)
    for (long s = 0; s < n; s++) {
        weights[s] = exponential(weights[s] - most);
        sum += weights[s];
    }
    const float share = 1.0f / sum;
    if (head_dim % WIDTH == 0 && head_dim <= MOST_HELD) {
        lanes sums[MOST_HELD / WIDTH] = {0}; /* in registers, where the size of a head is known when compiling */
        for (long s = 0; s < n; s++) {
            const float *value = v + PLACE(s), weight = weights[s] * share;
            for (long i = 0; i < head_dim / WIDTH; i++)
                sums[i] += weight * *(const lanes *)(value + i * WIDTH);
        }
        memcpy(out, sums, (size_t)head_dim * sizeof(float));
    } else {
        for (long i = 0; i < head_dim; i++)
            out[i] = 0.0f;
        for (long s = 0; s < n; s++) {
            const float *value = v + PLACE(s), weight = weights[s] * share;
            for (long i = 0; i < head_dim; i++)
                out[i] += weight * value[i];
        }
    }
#undef PLACE
}

/* Keys and values of rows, each (N, H_kv, S, K), from the first row on. */
struct stored {
    float *k, *v;
    long row_stride, head_stride, n_heads, n_kv_heads, head_dim;
    const int32_t *origins; /* (N, S), or NULL: which row holds what this one reads at a position */
    long origin_stride, first_row; /* the number, in `origins`, of the first row */
    const int64_t *rows; /* (B / group,), or NULL: the stored row of each, else its own number */
};

/* q (B, H, K), a row every `q_stride` numbers -> out (B, H, K). Row b reads the positions first[b / group] ..
 * last[b / group] of the stored row b / group, or of that row of `rows`; without `first`, all up to the last. */
static int attend(const struct stored *kv, const float *q, long q_stride, const int64_t *first, const int64_t *last,
                  long n_rows, long group, float *out, int n_threads)
{
    const long dim = kv->head_dim, n_pairs = n_rows * kv->n_heads, shared = kv->n_heads / kv->n_kv_heads;
    const float factor = 1.0f / sqrtf((float)dim);
    int failed = 0;
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1 && n_pairs >= 64)
    for (long pair = 0; pair < n_pairs; pair++) {
        const long row = pair / kv->n_heads, head = pair % kv->n_heads, at = row / group;
        const long source = kv->rows == NULL ? at : kv->rows[at];
        const long start = first == NULL ? 0 : first[at], n = last[at] + 1 - start;
        const long place = source * kv->row_stride + head / shared * kv->head_stride + start * dim;
        const float *own = q + row * q_stride + head * dim, *k = kv->k + place, *v = kv->v + place;
        const int32_t *origins = kv->origins == NULL ? NULL : kv->origins + source * kv->origin_stride + start;
        const long origin = source + kv->first_row, stride = kv->row_stride;
        float *weights = scratch((size_t)n * sizeof(float)), *to = out + pair * dim;
        if (weights == NULL) {
            failed = 1;
            continue;
        }
        switch (dim) { /* known when compiling, the loops over a head unroll */
        case 32: attend_head(own, k, v, origins, origin, stride, n, 32, factor, weights, to); break;
        case 64: attend_head(own, k, v, origins, origin, stride, n, 64, factor, weights, to); break;
        case 128: attend_head(own, k, v, origins, origin, stride, n, 128, factor, weights, to); break;
        default: attend_head(own, k, v, origins, origin, stride, n, dim, factor, weights, to); break;
        }
    }
    return failed;
}

INLINE void turn(float *x, const float *cosines, const float *sines, long half)
{
    for (long i = 0; i < half; i++) {
        const float left = x[i], right = x[i + half];
        x[i] = left * cosines[i] - right * sines[i];
        x[i + half] = left * sines[i] + right * cosines[i];
    }
}

/* Self-attention of new tokens, each at a place of its own: qkv (B, H + 2 H_kv, K) -> out (B, H, K). As below, but a
 * token's keys and values are stored, and read, in the row of `kv` that is its own; all are stored before any is read. */
static int new_attention(const struct stored *kv, int32_t *origins, float *qkv, const float *cosines,
                         const float *sines, const int64_t *first, const int64_t *last, long n_rows, float *out,
                         int n_threads)
{
    const long n_heads = kv->n_heads, n_kv_heads = kv->n_kv_heads, head_dim = kv->head_dim, half = head_dim / 2;
    const long n_turning = n_heads + n_kv_heads, width = (n_turning + n_kv_heads) * head_dim;
    for (long row = 0; row < n_rows; row++) {
        float *own = qkv + row * width;
        const long stored = kv->rows == NULL ? row : kv->rows[row];
        if (origins != NULL)
            origins[stored * kv->origin_stride + last[row]] = (int32_t)(kv->first_row + stored);
        if (cosines != NULL)
            for (long head = 0; head < n_turning; head++)
                turn(own + head * head_dim, cosines + row * half, sines + row * half, half);
        for (long head = 0; head < n_kv_heads; head++) {
            const long place = stored * kv->row_stride + head * kv->head_stride + last[row] * head_dim;
            memcpy(kv->k + place, own + (n_heads + head) * head_dim, (size_t)head_dim * sizeof(float));
            memcpy(kv->v + place, own + (n_turning + head) * head_dim, (size_t)head_dim * sizeof(float));
        }
    }
    return attend(kv, qkv, width, first, last, n_rows, 1, out, n_threads);
}

/* Self-attention of one new token in each of B rows: qkv (B, H + 2 H_kv, K) -> out (B, H, K).
 * Keys and values are stored at last[b], then row b reads first[b] .. last[b], each position out of the row that
 * `origins` names, unless that is NULL; the new one is its own. Queries and keys are turned before, in place, by
 * `cosines` and `sines` (B, K / 2), unless those are NULL. 0, or 1 where there is no memory. */
int self_attention(float *k, float *v, long row_stride, long head_stride, long n_heads, long n_kv_heads,
                   long head_dim, int32_t *origins, long origin_stride, long first_row, float *qkv,
                   const float *cosines, const float *sines, const int64_t *first, const int64_t *last, long n_rows,
                   float *out, int n_threads)
{
    const struct stored kv = {k, v, row_stride, head_stride, n_heads, n_kv_heads, head_dim,
                              origins, origin_stride, first_row, NULL};
    return new_attention(&kv, origins, qkv, cosines, sines, first, last, n_rows, out, n_threads);
}

/* Attention over what is stored: q (B, H, K) -> out (B, H, K), `group` neighbouring rows of q over one stored row,
 * of which they read the positions up to last[b / group]. 0, or 1 where there is no memory. */
int stored_attention(float *k, float *v, long row_stride, long head_stride, long n_heads, long n_kv_heads,
                     long head_dim, const float *q, const int64_t *last, long n_rows, long group, float *out,
                     int n_threads)
{
    const struct stored kv = {k, v, row_stride, head_stride, n_heads, n_kv_heads, head_dim, NULL, 0, 0, NULL};
    return attend(&kv, q, n_heads * head_dim, NULL, last, n_rows, group, out, n_threads);
}

/* ---- the likeliest tokens ------------------------------------------------------------------------------------ */

/* `value` into its place among `n` values that descend, behind its equals; the last of more than `n_best` falls out. */
static void insert(float *values, int64_t *ids, long n, long n_best, float value, int64_t id)
{
    long at = n < n_best ? n : n_best - 1;
    for (; at > 0 && value > values[at - 1]; at--) {
        values[at] = values[at - 1];
        ids[at] = ids[at - 1];
    }
    values[at] = value;
    ids[at] = id;
}

INLINE float greatest(const float *x, long n)
{
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (long i = 0; i < n; i++)
        most = x[i] > most ? x[i] : most;
    return most;
}

#define PART 512 /* logits whose exponentials are summed by themselves, as `best_outputs` must */

/* The sum of the exponentials of a part's logits under the greatest of them; 0 where nothing is possible. */
ONE_WAY float sum_part(const float *x, long n, float most)
{
    float sum = 0.0f;
    if (most == -INFINITY)
        return sum;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++)
        sum += exponential(x[i] - most);
    return sum;
}

/* The greatest logit of a row, and the sum of the exponentials under it; NaN for a row that holds what is no number. */
struct total {
    float most, sum;
};

/* Of a row's parts, whose greatest and sums lie `stride` apart. */
ONE_WAY struct total sum_up(const float *greatests, const float *sums, long n_parts, long stride, int bad)
{
    struct total t = {-INFINITY, 0.0f};
    for (long part = 0; part < n_parts * stride; part += stride)
        t.most = greatests[part] > t.most ? greatests[part] : t.most;
    for (long part = 0; part < n_parts * stride; part += stride)
        if (greatests[part] != -INFINITY)
            t.sum += sums[part] * exponential(greatests[part] - t.most);
    if (bad)
        t.sum = NAN;
    return t;
}

/* A row's greatest logits become their log-probabilities; NaN in a row that holds what is no number. */
ONE_WAY void to_logprobs(float *values, long n_best, struct total t)
{
    const float whole = logf(t.sum);
    for (long i = 0; i < n_best; i++)
        if (isnan(t.sum))
            values[i] = NAN;
        else if (values[i] != -INFINITY)
            values[i] = values[i] - t.most - whole;
}

/* A row's best so far, best first, and how many of them there are. */
struct best {
    float *values;
    int64_t *ids;
    long n, n_wanted;
};

/* The logits of the outputs from `from` on, in the order of these, the first of equals before the others; returns the
 * greatest of them. */
static float look_through(struct best *b, const float *x, long n, long from)
{
    float most = -INFINITY;
    long start = 0;
    for (; b->n < b->n_wanted && start < n; start++) {
        insert(b->values, b->ids, b->n++, b->n_wanted, x[start], from + start);
        most = x[start] > most ? x[start] : most;
    }
    for (; start < n; start += 64) {
        const long end = start + 64 < n ? start + 64 : n;
        const float top = greatest(x + start, end - start);
        most = top > most ? top : most;
        if (top > b->values[b->n_wanted - 1])
            for (long i = start; i < end; i++)
                if (x[i] > b->values[b->n_wanted - 1])
                    insert(b->values, b->ids, b->n_wanted, b->n_wanted, x[i], from + i);
    }
    return most;
}

/* logits (B, V) -> the n_best <= V greatest of each row and their log-probabilities, each (B, n_best). 0, or 1 where
 * there is no memory. */
int best_tokens(const float *logits, long n_rows, long vocab_size, long n_best, int64_t *ids, float *logprobs,
                int n_threads)
{
    const long n_parts = (vocab_size + PART - 1) / PART;
    int failed = 0;
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1 && n_rows >= 4)
    for (long row = 0; row < n_rows; row++) {
        const float *x = logits + row * vocab_size;
        float *greatests = scratch((size_t)n_parts * 2 * sizeof(float)), *sums = greatests + n_parts;
        if (greatests == NULL) {
            failed = 1;
            continue;
        }
        struct best b = {logprobs + row * n_best, ids + row * n_best, 0, n_best};
        int bad = 0;
        for (long part = 0; part < n_parts; part++) {
            const long from = part * PART, n = vocab_size - from < PART ? vocab_size - from : PART;
            greatests[part] = look_through(&b, x + from, n, from);
            sums[part] = sum_part(x + from, n, greatests[part]);
            for (long i = from; i < from + n; i++)
                bad |= x[i] != x[i];
        }
        to_logprobs(b.values, n_best, sum_up(greatests, sums, n_parts, 1, bad));
    }
    return failed;
}

/* ---- drawing a token ------------------------------------------------------------------------------------------- */

#define GRAIN 64   /* logits in a row whose greatest is known */
#define BORDERS 8  /* that are tried in one pass */

/* What a row may draw from: its logits over the temperature, and the weight e^(x - most) of each that is still in. */
struct odds {
    float *scaled, *weights, *greatests; /* (V,), (V,), (V / GRAIN,) */
    int32_t *places;                     /* (V,), to sort */
    long n;
    float most;
};

/* How many logits lie above each border, or what they weigh. */
static void above(const struct odds *o, int count, const float *borders, double *found)
{
    lanes sums[BORDERS] = {0};
    const lanes one = (lanes){0} + 1.0f;
    float rest[BORDERS] = {0};
    for (long start = 0; start < o->n; start += GRAIN) {
        if (o->greatests[start / GRAIN] <= borders[BORDERS - 1])
            continue;
        const long end = start + GRAIN < o->n ? start + GRAIN : o->n;
        long i = start;
        for (; i + WIDTH <= end; i += WIDTH) {
            const lanes x = *(const lanes *)(o->scaled + i), w = count ? one : *(const lanes *)(o->weights + i);
            for (int j = 0; j < BORDERS; j++)
                sums[j] += (lanes)((x > (lanes){0} + borders[j]) & (whole_lanes)w);
        }
        for (; i < end; i++)
            for (int j = 0; j < BORDERS; j++)
                rest[j] += o->scaled[i] > borders[j] ? (count ? 1.0f : o->weights[i]) : 0.0f;
    }
    for (int j = 0; j < BORDERS; j++)
        found[j] = (double)total(sums[j]) + rest[j];
}

/* Does place `a` stand before `b` where logits fall, the first of equals before the others? */
INLINE int stands_before(const float *x, int32_t a, int32_t b)
{
    return x[a] > x[b] || (x[a] == x[b] && a < b);
}

/* Places in that order, by a heap: there may be most of the vocabulary of them. */
static void sort_places(const float *x, int32_t *places, long n)
{
    for (long built = n / 2, left = n; left > 1;) {
        int32_t moving;
        if (built > 0) {
            moving = places[--built];
        } else {
            moving = places[--left];
            places[left] = places[0];
        }
        long at = built;
        for (long child = 2 * at + 1; child < left; child = 2 * at + 1) {
            if (child + 1 < left && stands_before(x, places[child], places[child + 1]))
                child++;
            if (!stands_before(x, moving, places[child]))
                break;
            places[at] = places[child];
            at = child;
        }
        places[at] = moving;
    }
}

/* Take the weights of all but the likeliest: of those which are `wanted` in number, with their equals, or else the
 * fewest that weigh so much. Three passes over borders find about where to cut; what lies there is sorted. */
static void narrow(struct odds *o, int by_number, double wanted)
{
    float high = INFINITY, low = -INFINITY, top = o->most, step = 2.0f;
    double before = 0.0;
    for (int pass = 0; pass < 3; pass++, step /= BORDERS) {
        float borders[BORDERS];
        double found[BORDERS];
        for (int j = 0; j < BORDERS; j++)
            borders[j] = top - step * (float)(j + 1);
        above(o, by_number, borders, found);
        int j = 0;
        while (j < BORDERS && found[j] < wanted)
            j++;
        if (j > 0) {
            high = borders[j - 1];
            before = found[j - 1];
        }
        if (j == BORDERS)
            break; /* below them all, or in what rounding left between them and `low` */
        low = top = borders[j];
        top += step;
    }
    long n = 0, kept = 0;
    for (long start = 0; start < o->n; start += GRAIN)
        if (o->greatests[start / GRAIN] > low)
            for (long i = start; i < o->n && i < start + GRAIN; i++)
                if (o->scaled[i] > low && o->scaled[i] <= high && o->scaled[i] > -INFINITY && o->weights[i] > 0.0f)
                    o->places[n++] = (int32_t)i;
    sort_places(o->scaled, o->places, n);
    for (; kept < n && before < wanted; kept++)
        before += by_number ? 1.0 : o->weights[o->places[kept]];
    const float least = kept > 0 ? o->scaled[o->places[kept - 1]] : high;
    const long last = kept == 0 || by_number ? o->n : o->places[kept - 1];
    if (before < wanted && low == -INFINITY) /* all are wanted; above a border, sums in another order fell short */
        return;
    for (long i = 0; i < o->n; i++) {
        const float x = o->scaled[i];
        o->weights[i] = x > least || (x == least && i <= last) ? o->weights[i] : 0.0f;
    }
}

/* The sum of what is still in, of the logits from `start` on that are looked at together. */
static float weigh_grain(const struct odds *o, long start)
{
    const long end = start + GRAIN < o->n ? start + GRAIN : o->n;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (long i = start; i < end; i++)
        sum += o->weights[i];
    return sum;
}

static double weigh(const struct odds *o)
{
    double sum = 0.0;
    for (long start = 0; start < o->n; start += GRAIN)
        sum += weigh_grain(o, start);
    return sum;
}

/* One row of `draw_tokens`; -1 where it holds no numbers, or none that may be drawn. */
static long draw_row(struct odds *o, const float *logits, float temperature, long top_k, float top_p, double uniform)
{
    const float most = greatest(logits, o->n);
    int bad = 0;
    for (long i = 0; i < o->n; i++)
        bad |= logits[i] != logits[i];
    if (bad || most == -INFINITY || most == INFINITY)
        return -1;
    long id = 0;
    o->most = most / temperature;
    if (temperature <= 0.0f || isinf(o->most)) { /* as cold as numbers go: the greatest alone */
        while (logits[id] != most)
            id++;
        return id;
    }
    for (long start = 0; start < o->n; start += GRAIN) {
        const long end = start + GRAIN < o->n ? start + GRAIN : o->n;
#pragma omp simd
        for (long i = start; i < end; i++) {
            const float x = logits[i] / temperature;
            o->scaled[i] = x;
            o->weights[i] = exponential(x - o->most);
        }
        o->greatests[start / GRAIN] = greatest(o->scaled + start, end - start);
    }
    if (top_k > 0 && top_k < o->n)
        narrow(o, 1, (double)top_k);
    if (top_p < 1.0f)
        narrow(o, 0, fmax(top_p, 1e-30) * weigh(o)); /* at least one, where top_p was too small for a float */
    /* The inverse of the cumulative distribution, in the order of the vocabulary. */
    const double wanted = uniform * weigh(o);
    double passed = 0.0;
    for (long start = 0; start < o->n; start += GRAIN) {
        const float part = weigh_grain(o, start);
        if (passed + part > wanted) {
            double within = passed;
            for (long i = start; i < o->n && i < start + GRAIN; i++) {
                if (o->weights[i] > 0.0f)
                    id = i;
                within += o->weights[i];
                if (within > wanted)
                    break;
            }
            return id; /* by rounding at the latest that grain's last */
        }
        passed += part;
    }
    for (long i = 0; i < o->n; i++)
        if (o->weights[i] > 0.0f)
            id = i;
    return id;
}

/* logits (B, V) -> a token of each row, drawn as `model.sampling.sample` does it with temperature, top_k (0: off), top_p
 * and uniform, each (B,), and its log-probability among all logits, unless it is not wanted: then 0. A row that holds
 * no numbers, or none that is possible, has NaN. 0, or 1 where there is no memory. */
int draw_tokens(const float *logits, long n_rows, long vocab_size, const float *temperature, const int64_t *top_k,
                const float *top_p, const double *uniform, int wants_logprobs, int64_t *ids, float *logprobs,
                int n_threads)
{
    const long n_parts = (vocab_size + PART - 1) / PART;
    int failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads(n_threads) if (n_threads > 1 && n_rows >= 4)
    for (long row = 0; row < n_rows; row++) {
        const float *x = logits + row * vocab_size;
        const long n_grains = (vocab_size + GRAIN - 1) / GRAIN;
        float *memory = scratch((size_t)(3 * vocab_size + n_grains + 2 * n_parts) * sizeof(float));
        if (memory == NULL) {
            failed = 1;
            continue;
        }
        float *weights = memory + vocab_size, *tops = weights + vocab_size, *parts = tops + n_grains;
        struct odds odds = {memory, weights, tops, (int32_t *)(parts + 2 * n_parts), vocab_size, 0.0f};
        const long id = draw_row(&odds, x, temperature[row], top_k[row], top_p[row], uniform[row]);
        ids[row] = id < 0 ? 0 : id;
        logprobs[row] = NAN;
        if (id < 0)
            continue;
        logprobs[row] = 0.0f;
        if (wants_logprobs) {
            logprobs[row] = x[ids[row]];
            for (long part = 0; part < n_parts; part++) {
                const long from = part * PART, n = vocab_size - from < PART ? vocab_size - from : PART;
                parts[part] = greatest(x + from, n);
                parts[n_parts + part] = sum_part(x + from, n, parts[part]);
            }
            to_logprobs(logprobs + row, 1, sum_up(parts, parts + n_parts, n_parts, 1, 0));
        }
    }
    return failed;
}

#if HAS_INT8

#define PART_PANELS (PART / PANEL)
#define LOOKED_AT 32 /* rows at a time: their logits of a part are 64 KB */

/* What one thread has found: a list of each row, beside the logits of the part that it looks through. */
struct finder {
    float *logits, *values;
    int64_t *ids;
    long n_found;
};

/* The weights of some outputs, or of all, as `int8_linear` takes them. */
struct outputs {
    const int8_t *weight;
    const int32_t *shift;
    const float *w_scale, *bias;
    int64_t n;
};

/* Rows x (M, K) -> the greatest logits of each in `values`, best first, and which outputs they are, each (M, n_best)
 * with n_best <= N; log-probabilities where no `totals` (M,) are asked for. The logits of some hundred outputs at a
 * time stay in the second cache. `banned` (n_banned, 2) are rows, -1 for all of them, and outputs that are impossible.
 * The same to the last bit, with whatever rows and threads. 0, or 1 where there is no memory. */
static int find_best(const float *x, long n_rows, long n_in, long depth, const struct outputs *o, const int64_t *banned,
                     long n_banned, long n_best, int64_t *ids, float *values_out, struct total *totals, int n_threads)
{
    const long n_out = o->n;
#if HAS_TILES
    const int tiled = n_rows >= FEWEST_TILED && depth % 64 == 0 && may_tile();
#endif
    const long most = BLOCK_ROWS_TILED, at_once = n_rows < most ? n_rows : most, room = (at_once + 15) / 16 * 16;
    const long n_panels = (n_out + PANEL - 1) / PANEL, n_parts = (n_panels + PART_PANELS - 1) / PART_PANELS;
    const long wanted = n_threads > 1 && at_once * n_out * depth > 64 * LITTLE ? n_threads : 1;
    const long n_finders = wanted < n_parts ? wanted : n_parts;
    const size_t listed = (size_t)(at_once * n_best), per_part = (size_t)(n_parts * at_once);
    const size_t finder_bytes = listed * sizeof(int64_t) + ((size_t)(LOOKED_AT * PART) + listed) * sizeof(float);
    char *memory = scratch((size_t)n_finders * (finder_bytes + sizeof(struct finder)) + 2 * per_part * sizeof(float) +
                           (size_t)(room * (depth + 4)) + 64);
    if (memory == NULL)
        return 1;
    int64_t *lists = (int64_t *)memory;
    struct finder *finders = (struct finder *)(lists + (size_t)n_finders * listed);
    float *greatests = (float *)(finders + n_finders), *sums = greatests + per_part, *scale = sums + per_part;
    float *numbers = scale + room;
    char *lines = (char *)(numbers + (size_t)n_finders * ((size_t)(LOOKED_AT * PART) + listed));
    eight *eights = (eight *)(lines + -(uintptr_t)lines % 64);
    for (long first = 0; first < n_rows; first += at_once) {
        const long n = n_rows - first < at_once ? n_rows - first : at_once;
        for (long i = 0; i < n; i++)
            scale[i] = quantise(x + (first + i) * n_in, n_in, eights + i * depth);
#pragma omp parallel for schedule(static) num_threads((int)n_finders) if (n_finders > 1)
        for (long one = 0; one < n_finders; one++) {
            struct finder *f = finders + one;
            f->logits = numbers + one * (LOOKED_AT * PART + (long)listed);
            f->values = f->logits + LOOKED_AT * PART;
            f->ids = lists + one * (long)listed;
            f->n_found = 0;
#if HAS_TILES
            if (tiled)
                begin_tiles();
#endif
            for (long part = one * n_parts / n_finders; part < (one + 1) * n_parts / n_finders; part++) {
                const long from = part * PART, left = n_out - from, own = left < PART ? left : PART;
                const long end = (part + 1) * PART_PANELS < n_panels ? (part + 1) * PART_PANELS : n_panels;
                for (long top = 0; top < n; top += LOOKED_AT) {
                    const long bottom = top + LOOKED_AT < n ? top + LOOKED_AT : n;
                    const struct product p = {o->weight,   o->shift,  o->w_scale, o->bias,
                                              scale + top, eights + top * depth, depth, n_out,
                                              f->logits,   PART,      from};
                    for (long panel = part * PART_PANELS; panel < end; panel++) {
#if HAS_TILES
                        if (tiled) {
                            all_rows_tiled(&p, bottom - top, panel);
                            continue;
                        }
#endif
                        all_rows(&p, bottom - top, panel);
                    }
                    for (const int64_t *b = banned; b < banned + 2 * n_banned; b += 2)
                        if (b[1] >= from && b[1] < from + own)
                            for (long row = top; row < bottom; row++)
                                if (b[0] < 0 || b[0] == first + row)
                                    f->logits[(row - top) * PART + b[1] - from] = -INFINITY;
                    for (long row = top; row < bottom; row++) {
                        struct best b = {f->values + row * n_best, f->ids + row * n_best, f->n_found, n_best};
                        const float *logits = f->logits + (row - top) * PART;
                        greatests[part * at_once + row] = look_through(&b, logits, own, from);
                        sums[part * at_once + row] = sum_part(logits, own, greatests[part * at_once + row]);
                    }
                }
                f->n_found = f->n_found + own < n_best ? f->n_found + own : n_best;
            }
#if HAS_TILES
            if (tiled)
                _tile_release();
#endif
        }
        for (long row = 0; row < n; row++) {
            float *values = values_out + (first + row) * n_best;
            int64_t *own = ids + (first + row) * n_best;
            long found = 0;
            for (const struct finder *f = finders; f < finders + n_finders; f++)
                for (long i = row * n_best; i < row * n_best + f->n_found; i++) {
                    if (found == n_best && !(f->values[i] > values[n_best - 1]))
                        break;
                    insert(values, own, found, n_best, f->values[i], f->ids[i]);
                    found += found < n_best;
                }
            const struct total t = sum_up(greatests + row, sums + row, n_parts, at_once, isnan(scale[row]));
            if (totals != NULL)
                totals[first + row] = t;
            else
                to_logprobs(values, n_best, t);
        }
    }
    return 0;
}

/* `best_tokens` of what `int8_linear` gives, without ever holding all of it. 0, or 1 where there is no memory. */
int best_outputs(const float *x, long n_rows, long n_in, long depth, const int8_t *weight, const int32_t *shift,
                 const float *w_scale, const float *bias, long n_out, const int64_t *banned, long n_banned,
                 long n_best, int64_t *ids, float *logprobs, int n_threads)
{
    const struct outputs all = {weight, shift, w_scale, bias, n_out};
    return find_best(x, n_rows, n_in, depth, &all, banned, n_banned, n_best, ids, logprobs, NULL, n_threads);
}

/* Weights (N, K / 4) of four numbers each, output by output -> those of some outputs in panels, padded with zeros. */
void select_outputs(const int32_t *weight, long depth, const int64_t *ids, long n_ids, int32_t *out)
{
    const long fours = depth / 4;
    for (long first = 0; first < n_ids; first += PANEL, out += fours * PANEL)
        for (long from = 0; from < fours; from += 16) { /* a cache line of each */
            const long end = from + 16 < fours ? from + 16 : fours;
            for (long n = 0; n < PANEL; n++) {
                const int32_t *own = first + n < n_ids ? weight + ids[first + n] * fours : NULL;
                for (long k = from; k < end; k++)
                    out[k * PANEL + n] = own ? own[k] : 0;
            }
        }
}

/* Outputs alone, and their ids in rising order; model/kernels.py describes it field by field (ShortlistWeights). */
struct shortlist {
    struct outputs outputs;
    const int64_t *ids;
};

/* `banned` of rows first .. first + n_rows, -1 for all, as `find_best` takes it over a list; returns how many of it. */
static long ban_listed(const struct shortlist *list, const int64_t *banned, long n_banned, long first, long n_rows,
                       int64_t *own)
{
    long n_own = 0;
    for (const int64_t *b = banned; b < banned + 2 * n_banned; b += 2) {
        if (b[0] >= 0 && (b[0] < first || b[0] >= first + n_rows))
            continue;
        long low = 0, high = list->outputs.n;
        while (low < high) {
            const long middle = (low + high) / 2;
            if (list->ids[middle] < b[1])
                low = middle + 1;
            else
                high = middle;
        }
        if (low < list->outputs.n && list->ids[low] == b[1]) {
            own[2 * n_own] = b[0] < 0 ? -1 : b[0] - first;
            own[2 * n_own++ + 1] = low;
        }
    }
    return n_own;
}

/* The greatest logits of some rows among a list, `n` a row, and what all of the list sum to. */
struct choice {
    int64_t *ids;
    float *values;
    struct total *totals;
    long n;
};

/* The next of `n` rows of memory of a choice; `at` moves behind it. */
static struct choice place_choice(char **at, long n_rows, long n)
{
    struct choice c = {(int64_t *)*at, NULL, NULL, n};
    c.totals = (struct total *)(c.ids + n_rows * n);
    c.values = (float *)(c.totals + n_rows);
    *at = (char *)(c.values + n_rows * (n + n % 2)); /* whole numbers of 8 bytes */
    return c;
}

static size_t choice_bytes(long n_rows, long n)
{
    return (size_t)n_rows * ((size_t)n * sizeof(int64_t) + sizeof(struct total) + (size_t)(n + n % 2) * sizeof(float));
}

/* Row `row` of both in one, best first, of equals those of `a`, which has some; -inf where there are no more. */
static void merge(const struct choice *a, const struct choice *b, long row, long n_best, int64_t *ids, float *values)
{
    const struct total t = a->totals[row], u = b->totals[row];
    long i = row * a->n, j = row * b->n;
    for (long k = 0; k < n_best; k++) {
        const int left = i < (row + 1) * a->n, right = j < (row + 1) * b->n;
        const struct choice *from = !left || (right && b->values[j] > a->values[i]) ? b : a;
        ids[k] = left || right ? from->ids[from == a ? i : j] : a->ids[row * a->n];
        values[k] = left || right ? from->values[from == a ? i++ : j++] : -INFINITY;
    }
    const float most = t.most > u.most ? t.most : u.most;
    struct total both = {most, t.sum + u.sum}; /* what is no number stays so */
    if (both.sum == both.sum && most != -INFINITY)
        both.sum = t.sum * exponential(t.most - most) + u.sum * exponential(u.most - most);
    to_logprobs(values, n_best, both);
}

/* `best_outputs` of rows that choose among what is common to them and among a list of their own, which holds nothing of
 * that; neighbours with one list share its product. Where there are fewer than `n_best`, -inf follows. 0, or 1 where
 * there is no memory. */
int best_listed(const float *x, long n_rows, long n_in, long depth, const struct shortlist *common,
                const struct shortlist *lists, const int64_t *banned, long n_banned, long n_best, int64_t *ids,
                float *logprobs, int n_threads)
{
    const long n_common = n_best < common->outputs.n ? n_best : common->outputs.n;
    const size_t bans = (size_t)n_banned * 2 * sizeof(int64_t);
    char *memory = malloc(choice_bytes(n_rows, n_common) + choice_bytes(n_rows, n_best) + bans + 1), *at = memory;
    if (memory == NULL)
        return 1;
    const struct choice shared = place_choice(&at, n_rows, n_common), own = place_choice(&at, n_rows, n_best);
    int64_t *barred = (int64_t *)at;
    const long n_barred = ban_listed(common, banned, n_banned, 0, n_rows, barred);
    if (find_best(x, n_rows, n_in, depth, &common->outputs, barred, n_barred, n_common, shared.ids, shared.values,
                  shared.totals, n_threads)) {
        free(memory);
        return 1;
    }
    for (long i = 0; i < n_rows * n_common; i++)
        shared.ids[i] = common->ids[shared.ids[i]];
    int failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads(n_threads) reduction(| : failed) if (n_threads > 1 && n_rows >= 8)
    for (long first = 0; first < n_rows; first++) {
        const struct shortlist *list = lists + first;
        if (first > 0 && list->ids == list[-1].ids)
            continue;
        long end = first + 1;
        while (end < n_rows && lists[end].ids == list->ids)
            end++;
        const long n = end - first, n_own = n_best < list->outputs.n ? n_best : list->outputs.n;
        const struct choice mine = {own.ids + first * n_best, own.values + first * n_best, own.totals + first, n_own};
        const struct choice theirs = {shared.ids + first * n_common, shared.values + first * n_common,
                                      shared.totals + first, n_common};
        for (long row = 0; row < n; row++)
            mine.totals[row] = (struct total){-INFINITY, 0.0f};
        if (n_own > 0) {
            int64_t *bans_here = malloc(bans + 1);
            const int lacks = bans_here == NULL ||
                              find_best(x + first * n_in, n, n_in, depth, &list->outputs, bans_here,
                                        ban_listed(list, banned, n_banned, first, n, bans_here), n_own, mine.ids,
                                        mine.values, mine.totals, 1);
            free(bans_here);
            if (lacks) {
                failed = 1;
                continue;
            }
        }
        for (long i = 0; i < n * n_own; i++)
            mine.ids[i] = list->ids[mine.ids[i]];
        for (long row = 0; row < n; row++)
            merge(&theirs, &mine, row, n_best, ids + (first + row) * n_best, logprobs + (first + row) * n_best);
    }
    free(memory);
    return failed;
}

#endif

/* ---- the blocks of a decoder, one new token a row, or of an encoder over whole texts --------------------------------- */

#if HAS_INT8

struct linear {
    const int8_t *weight;
    const int32_t *shift;
    const float *w_scale, *bias;
    int64_t n_in, depth, n_out;
};

struct norm {
    const float *weight, *bias; /* (D,), or NULL */
    float eps;
    int32_t kind; /* 1: LayerNorm, 2: RMSNorm */
};

/* One layer: what it is made of, and what it reads and writes in this step. */
struct block {
    struct norm attention_norm, cross_norm, feed_forward_norm;
    struct linear qkv, out, cross_q, cross_out, up, down;
    float *k, *v, *memory_k, *memory_v;
    const int64_t *first; /* (B,), or NULL: a row reads from its beginning; of texts the row that is a text's first */
};

/* What is the same in all layers. */
struct shape {
    int64_t d_model, n_heads, n_kv_heads, head_dim, d_ff;
    int32_t norm_first, activation, gated, has_cross;
};

/* What is the same in all layers of a step. */
struct step {
    int64_t n_rows, row_stride, head_stride, memory_row_stride, memory_head_stride, group;
    const int64_t *last, *memory_last;
    const float *cosines, *sines;
    int32_t *origins;
    int64_t origin_stride, first_row;
    const int64_t *rows; /* (B,), or NULL: the row of the cache that each token belongs to, else its own number */
    int32_t n_threads, whole_texts; /* are rows the tokens of texts that are read as a whole? */
};

static int apply(const struct linear *l, const float *x, long n_rows, float *out, int n_threads)
{
    return int8_linear(x, n_rows, l->n_in, l->depth, l->weight, l->shift, l->w_scale, l->bias, l->n_out, out,
                       n_threads);
}

static void normalise(const struct norm *norm, const float *from, long n_rows, long dim, float *to, int n_threads)
{
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1 && n_rows * dim > LITTLE)
    for (long row = 0; row < n_rows; row++) {
        const float *x = from + row * dim;
        float *out = to + row * dim;
        float mean = 0.0f, square = 0.0f;
        if (norm->kind == 1) {
#pragma omp simd reduction(+ : mean)
            for (long i = 0; i < dim; i++)
                mean += x[i];
            mean /= (float)dim;
        }
#pragma omp simd reduction(+ : square)
        for (long i = 0; i < dim; i++)
            square += (x[i] - mean) * (x[i] - mean);
        const float factor = 1.0f / sqrtf(square / (float)dim + norm->eps);
        for (long i = 0; i < dim; i++)
            out[i] = (x[i] - mean) * factor;
        if (norm->weight != NULL)
            for (long i = 0; i < dim; i++)
                out[i] *= norm->weight[i];
        if (norm->bias != NULL)
            for (long i = 0; i < dim; i++)
                out[i] += norm->bias[i];
    }
}

INLINE float sigmoid(float x)
{
    const float e = exponential(-fabsf(x));
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

INLINE float hyperbolic_tangent(float x)
{
    const float e = exponential(-2.0f * fabsf(x));
    return copysignf((1.0f - e) / (1.0f + e), x);
}

/* The error function to 1.5e-7 (Abramowitz and Stegun 1964, 7.1.26). */
INLINE float error_function(float x)
{
    const float size = fabsf(x), t = 1.0f / (1.0f + 0.3275911f * size);
    const float p = (((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f;
    return copysignf(1.0f - p * t * exponential(-size * size), x);
}

/* The first of `model.block.ACTIVATIONS`, those of a feed-forward network, in its order. */
INLINE float activate(float x, const int kind)
{
    switch (kind) {
    case 0: return x < 0.0f ? 0.0f : x;
    case 1: return 0.5f * x * (1.0f + error_function(x * 0.70710678f));
    case 2: return 0.5f * x * (1.0f + hyperbolic_tangent(0.79788456f * (x + 0.044715f * x * x * x)));
    case 3: return x * sigmoid(1.702f * x);
    default: return x * sigmoid(x);
    }
}

/* x (F) or, gated, (2 F), of which the first half is activated and scales the other, in place. */
INLINE void activate_as(float *x, long d_ff, int gated, const int kind)
{
    if (gated)
        for (long i = 0; i < d_ff; i++)
            x[i] = activate(x[i], kind) * x[d_ff + i];
    else
        for (long i = 0; i < d_ff; i++)
            x[i] = activate(x[i], kind);
}

static void activate_row(float *x, const struct shape *s)
{
    switch (s->activation) { /* a loop for each, which vectorises */
    case 0: activate_as(x, s->d_ff, s->gated, 0); break;
    case 1: activate_as(x, s->d_ff, s->gated, 1); break;
    case 2: activate_as(x, s->d_ff, s->gated, 2); break;
    case 3: activate_as(x, s->d_ff, s->gated, 3); break;
    default: activate_as(x, s->d_ff, s->gated, 4); break;
    }
}

/* x (B, F) or, gated, (B, 2 F) -> (B, F), in place. */
static void activate_all(float *x, long n_rows, const struct shape *s, int n_threads)
{
    const long width = s->gated ? 2 * s->d_ff : s->d_ff;
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1 && n_rows * width > LITTLE / 4)
    for (long row = 0; row < n_rows; row++)
        activate_row(x + row * width, s);
    for (long row = 1; s->gated && row < n_rows; row++)
        memmove(x + row * s->d_ff, x + row * width, (size_t)s->d_ff * sizeof(float));
}

/* What a sub-layer reads of x: x itself, or its norm, which goes to `y`. */
static const float *enter(const struct shape *s, const struct norm *norm, const float *x, long n_rows, float *y,
                          int n_threads)
{
    if (!s->norm_first)
        return x;
    normalise(norm, x, n_rows, s->d_model, y, n_threads);
    return y;
}

/* x + y, or the norm of it: Add & Norm. */
static void leave(const struct shape *s, const struct norm *norm, float *x, long n_rows, const float *y, int n_threads)
{
    for (long i = 0; i < n_rows * s->d_model; i++)
        x[i] += y[i];
    if (!s->norm_first)
        normalise(norm, x, n_rows, s->d_model, x, n_threads);
}

/* Self-attention of texts that stand one after the other, each row a token: qkv (B, H + 2 H_kv, K) -> out (B, H, K).
 * Keys and values go to k and v (H_kv, B, K), of which a row reads its own text, rows first[b] .. last[b]. 0, or 1
 * where there is no memory. */
static int text_attention(const struct shape *s, const struct step *t, const struct block *b, float *qkv, float *out)
{
    const long dim = s->head_dim, n_turning = s->n_heads + s->n_kv_heads, half = dim / 2;
    const long width = (n_turning + s->n_kv_heads) * dim;
    const struct stored kv = {b->k, b->v, 0, t->n_rows * dim, s->n_heads, s->n_kv_heads, dim, NULL, 0, 0, NULL};
    for (long row = 0; row < t->n_rows; row++) {
        float *own = qkv + row * width;
        if (t->cosines != NULL)
            for (long head = 0; head < n_turning; head++)
                turn(own + head * dim, t->cosines + row * half, t->sines + row * half, half);
        for (long head = 0; head < s->n_kv_heads; head++) {
            const long place = head * kv.head_stride + row * dim;
            memcpy(b->k + place, own + (s->n_heads + head) * dim, (size_t)dim * sizeof(float));
            memcpy(b->v + place, own + (n_turning + head) * dim, (size_t)dim * sizeof(float));
        }
    }
    return attend(&kv, qkv, width, b->first, t->last, t->n_rows, 1, out, t->n_threads);
}

/* Self-attention of tokens over what the cache holds before them. 0, or 1 where there is no memory. */
static int cached_attention(const struct shape *s, const struct step *t, const struct block *b, float *qkv, float *out)
{
    const struct stored kv = {b->k, b->v, t->row_stride, t->head_stride, s->n_heads, s->n_kv_heads, s->head_dim,
                              t->origins, t->origin_stride, t->first_row, t->rows};
    return new_attention(&kv, t->origins, qkv, t->cosines, t->sines, b->first, t->last, t->n_rows, out, t->n_threads);
}

/* x (B, D) through all blocks, in place. `work` holds B times D + the widest of a sub-layer's inner rows + H K.
 * 0, or 1 where there is no memory. */
int run_blocks(const struct shape *s, const struct block *blocks, long n_blocks, const struct step *t, float *x,
                   float *work, long widest)
{
    const long n = t->n_rows;
    const int n_threads = t->n_threads;
    float *y = work, *wide = y + n * s->d_model, *heads = wide + n * widest;
    int failed = 0;
    for (const struct block *b = blocks; b < blocks + n_blocks; b++) {
        failed |= apply(&b->qkv, enter(s, &b->attention_norm, x, n, y, n_threads), n, wide, n_threads);
        if (t->whole_texts)
            failed |= text_attention(s, t, b, wide, heads);
        else
            failed |= cached_attention(s, t, b, wide, heads);
        failed |= apply(&b->out, heads, n, y, n_threads);
        leave(s, &b->attention_norm, x, n, y, n_threads);
        if (s->has_cross) {
            failed |= apply(&b->cross_q, enter(s, &b->cross_norm, x, n, y, n_threads), n, wide, n_threads);
            failed |= stored_attention(b->memory_k, b->memory_v, t->memory_row_stride, t->memory_head_stride,
                                       s->n_heads, s->n_kv_heads, s->head_dim, wide, t->memory_last, n, t->group,
                                       heads, n_threads);
            failed |= apply(&b->cross_out, heads, n, y, n_threads);
            leave(s, &b->cross_norm, x, n, y, n_threads);
        }
        failed |= apply(&b->up, enter(s, &b->feed_forward_norm, x, n, y, n_threads), n, wide, n_threads);
        activate_all(wide, n, s, n_threads);
        failed |= apply(&b->down, wide, n, y, n_threads);
        leave(s, &b->feed_forward_norm, x, n, y, n_threads);
    }
    return failed;
}

#endif
