/* The 8-bit product of model/kernels.c against plain arithmetic, to the last bit, and what looks through its outputs
 * against what looks through them once they are stored. A program of its own, so that it can be compiled for another
 * processor and run under an emulator. Prints how many cases were right; returns 1 at the first that was wrong. */
#include "../../model/kernels.c"

#include <stdio.h>

#define MOST_LOOKED_AT 40

static uint32_t state = 12345;

static uint32_t draw(uint32_t below)
{
    state = state * 1664525u + 1013904223u;
    return (uint32_t)(((uint64_t)state * below) >> 32);
}

#if HAS_INT8

struct own {
    long n_in, depth, n_out, n_padded;
    int8_t *plain, *packed;
    int32_t *shift;
    float *w_scale, *bias;
};

static struct own make(long n_in, long n_out)
{
    struct own o = {n_in, (n_in + 3) / 4 * 4, n_out, (n_out + PANEL - 1) / PANEL * PANEL, 0, 0, 0, 0, 0};
    o.plain = calloc((size_t)(o.n_padded * o.depth), 1);
    o.packed = malloc((size_t)(o.n_padded * o.depth));
    o.shift = malloc((size_t)o.n_padded * 4);
    o.w_scale = malloc((size_t)n_out * 4);
    o.bias = malloc((size_t)n_out * 4);
    for (long n = 0; n < n_out; n++) {
        const uint32_t kind = draw(4); /* the greatest sums of both signs, and any */
        for (long k = 0; k < n_in; k++)
            o.plain[n * o.depth + k] = (int8_t)(kind == 0 ? 127 : kind == 1 ? -127 : (int)draw(255) - 127);
        o.w_scale[n] = (float)(1 + draw(1000)) * 1e-5f;
        o.bias[n] = (float)draw(2001) * 0.01f - 10.0f;
    }
    for (long n = 0; n < o.n_padded; n++)
        for (long k = 0; k < o.depth; k++)
            o.packed[(n / PANEL * (o.depth / 4) + k / 4) * PANEL * 4 + n % PANEL * 4 + k % 4] = o.plain[n * o.depth + k];
    int8_shift(o.plain, o.n_padded, o.depth, o.shift);
    return o;
}

static float expected(const struct own *o, const float *x, long n)
{
    float peak = 0.0f;
    int bad = 0;
    for (long k = 0; k < o->n_in; k++) {
        bad |= !isfinite(x[k]);
        peak = fabsf(x[k]) > peak ? fabsf(x[k]) : peak;
    }
    if (bad)
        return NAN;
    const float scale = peak / 127.0f, steps = scale > 1e-36f ? 127.0f / peak : 0.0f;
    int32_t sum = 0;
    for (long k = 0; k < o->n_in; k++)
        sum += (int32_t)rintf(x[k] * steps) * o->plain[n * o->depth + k];
    return fmaf((float)sum * o->w_scale[n], scale, o->bias[n]);
}

/* Every n-th output from `from` on, packed by themselves, each part in memory of exactly its size. */
static struct shortlist chosen(const struct own *o, long from, long step)
{
    const long n = from < o->n_out ? (o->n_out - from + step - 1) / step : 0, room = (n + PANEL - 1) / PANEL * PANEL;
    int64_t *ids = malloc((size_t)n * 8);
    float *w_scale = malloc((size_t)n * 4), *bias = malloc((size_t)n * 4);
    int32_t *shift = calloc((size_t)room, 4), *weight = malloc((size_t)(room * o->depth));
    for (long i = 0; i < n; i++) {
        ids[i] = from + i * step;
        w_scale[i] = o->w_scale[ids[i]];
        bias[i] = o->bias[ids[i]];
        shift[i] = o->shift[ids[i]];
    }
    select_outputs((const int32_t *)o->plain, o->depth, ids, n, weight);
    return (struct shortlist){{(const int8_t *)weight, shift, w_scale, bias, n}, ids};
}

static void let_go(const struct shortlist *list)
{
    free((void *)list->outputs.weight);
    free((void *)list->outputs.shift);
    free((void *)list->outputs.w_scale);
    free((void *)list->outputs.bias);
    free((void *)list->ids);
}

/* Rows that choose among every other output and, by turns, some more: as of all, where the rest is impossible. */
static int check_listed(const struct own *o, const float *x, float *out, long n_rows, int n_threads)
{
    enum { n_best = 5 };
    const struct shortlist common = chosen(o, 0, 2), few = chosen(o, 3, 6), none = chosen(o, o->n_out, 1);
    struct shortlist lists[MOST_LOOKED_AT];
    const int64_t banned[] = {-1, 0, 0, 3, n_rows - 1, 2};
    const long n_best_all = o->n_out < n_best ? o->n_out : n_best;
    int64_t ids[n_best * MOST_LOOKED_AT], wanted_ids[n_best * MOST_LOOKED_AT];
    float logprobs[n_best * MOST_LOOKED_AT], wanted[n_best * MOST_LOOKED_AT];
    for (long row = 0; row < n_rows; row++) {
        lists[row] = row / 3 % 2 ? none : few;
        for (long n = 0; n < o->n_out; n++)
            if (!(n % 2 == 0 || (lists[row].ids == few.ids && n % 6 == 3)) || n == 0 || (row == 0 && n == 3) ||
                (row == n_rows - 1 && n == 2))
                out[row * o->n_out + n] = isnan(out[row * o->n_out + n]) ? NAN : -INFINITY;
    }
    int wrong = best_tokens(out, n_rows, o->n_out, n_best_all, wanted_ids, wanted, n_threads);
    wrong |= best_listed(x, n_rows, o->n_in, o->depth, &common, lists, banned, 3, n_best, ids, logprobs, n_threads);
    for (long row = 0; row < n_rows; row++)
        for (long k = 0; k < n_best; k++) {
            const float a = k < n_best_all ? wanted[row * n_best_all + k] : -INFINITY, b = logprobs[row * n_best + k];
            if (isnan(wanted[row * n_best_all]))
                wrong |= !isnan(logprobs[row * n_best]);
            else if (a == -INFINITY)
                wrong |= b != -INFINITY;
            else /* of equals either may come first */
                wrong |= !(fabsf(a - b) < 1e-4f) || ids[row * n_best + k] < 0 || ids[row * n_best + k] >= o->n_out;
        }
    let_go(&common);
    let_go(&few);
    let_go(&none);
    return wrong;
}

static int check(const struct own *o, long n_rows, int n_threads)
{
    float *x = calloc((size_t)(n_rows * o->n_in), 4), *out = calloc((size_t)(n_rows * o->n_out), 4);
    for (long row = 0; row < n_rows; row++) {
        const uint32_t kind = draw(8);
        for (long k = 0; k < o->n_in; k++)
            x[row * o->n_in + k] = kind == 0 ? 1.0f : kind == 1 ? -2.0f : kind == 2 ? 0.0f : (float)draw(20001) * 1e-3f - 10.0f;
        if (kind == 3)
            x[row * o->n_in + draw((uint32_t)o->n_in)] = draw(2) ? NAN : -INFINITY;
    }
    int wrong = int8_linear(x, n_rows, o->n_in, o->depth, o->packed, o->shift, o->w_scale, o->bias, o->n_out, out, n_threads);
    for (long row = 0; row < n_rows; row++)
        for (long n = 0; n < o->n_out; n++) {
            const float a = out[row * o->n_out + n], b = expected(o, x + row * o->n_in, n);
            wrong |= isnan(b) ? !isnan(a) : memcmp(&a, &b, 4) != 0;
        }
    if (n_rows <= MOST_LOOKED_AT) {
        const long n_best = o->n_out < 5 ? o->n_out : 5;
        const int64_t none = 0;
        int64_t ids[2][5 * MOST_LOOKED_AT];
        float logprobs[2][5 * MOST_LOOKED_AT];
        wrong |= best_tokens(out, n_rows, o->n_out, n_best, ids[0], logprobs[0], n_threads);
        wrong |= best_outputs(x, n_rows, o->n_in, o->depth, o->packed, o->shift, o->w_scale, o->bias, o->n_out, &none, 0,
                              n_best, ids[1], logprobs[1], n_threads);
        for (long i = 0; i < n_rows * n_best; i++)
            wrong |= isnan(logprobs[0][i]) ? !isnan(logprobs[1][i])
                                           : ids[0][i] != ids[1][i] || memcmp(&logprobs[0][i], &logprobs[1][i], 4) != 0;
        wrong |= check_listed(o, x, out, n_rows, n_threads);
    }
    free(x);
    free(out);
    return wrong;
}

int main(void)
{
    static const long widths[] = {2, 3, 5, 31, 64, 130, 515}, outputs[] = {1, 4, 7, 17, 70, 600};
    static const long rows[] = {1, 2, 3, 4, 5, 7, 9, 33, 97, 130};
    int right = 0;
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++)
        for (size_t j = 0; j < sizeof outputs / sizeof *outputs; j++) {
            const struct own o = make(widths[i], outputs[j]);
            for (size_t k = 0; k < sizeof rows / sizeof *rows; k++, right++)
                if (check(&o, rows[k], 1 + (int)draw(2))) {
                    printf("wrong: %ld rows of %ld to %ld\n", rows[k], widths[i], outputs[j]);
                    return 1;
                }
            free(o.plain), free(o.packed), free(o.shift), free(o.w_scale), free(o.bias);
        }
    printf("%d cases, panels of %d\n", right, panel_width());
    return 0;
}

#else

int main(void)
{
    printf("0 cases, panels of %d\n", panel_width() + (int)draw(1));
    return 0;
}

#endif
