// One token of a recurrence with a matrix state, as in decoding (notation of recurrence.cpp). Every state is read once
// and written once.
//
//     ADD        S' = P + k v^T               P = diag(exp(g)) S           o = scale S'^T q
//     REPLACE    S' = P + k (v - r)^T         r = P^T a
//     MOVE       S' = P + k v^T + b r^T
#include "common.h"

constexpr int COLUMNS = 8;       // vectors of columns that are computed together

enum Rule { ADD, REPLACE, MOVE };

struct Call {
    Rule rule;
    const void *q, *k, *v, *a, *b;   // [N G K] for q and k, [N H K] for a and b, [N H V]
    bool is_bfloat16;                // of these
    const float *beta, *log_decay;   // [N H], and [N H] or [N H K]; null if there are none
    bool decays_per_key;
    float scale;
    int64_t heads, key_heads, keys, values;
    const float* state;              // [N H K V]; null is zero
    float* final_state;              // may be `state`
    void* output;                    // [N H V]
    bool output_is_bfloat16;
};

static vec load_input(const void* x, bool is_bfloat16, int64_t at, int n) {
    return is_bfloat16 ? load(static_cast<const bfloat16*>(x) + at, n) : load(static_cast<const float*>(x) + at, n);
}

// Vectors of one head over the keys, as floats.
struct Head {
    std::vector<vec> q, k, a, b, factor, rest;  // P = factor S + rest S, as in common.h

    Head(const Call& x, int64_t row) {
        const int64_t vectors = (x.keys + LANES - 1) / LANES;
        const int64_t key_row = row / x.heads * x.key_heads + row % x.heads * x.key_heads / x.heads;
        const float beta = x.beta ? x.beta[row] : 1.0f;
        for (auto* of_keys : {&q, &k, &a, &b, &factor, &rest}) of_keys->resize(vectors);
        for (int64_t i = 0; i < vectors; i++) {
            const int n = lanes(x.keys, i);
            const int64_t shared = key_row * x.keys + i * LANES, own = row * x.keys + i * LANES;
            q[i] = x.scale * load_input(x.q, x.is_bfloat16, shared, n);
            k[i] = beta * load_input(x.k, x.is_bfloat16, shared, n);
            if (x.rule != ADD) a[i] = load_input(x.a, x.is_bfloat16, own, n);
            if (x.rule == MOVE) b[i] = load_input(x.b, x.is_bfloat16, own, n);
            vec log_decay = {};
            if (x.log_decay) log_decay = x.decays_per_key ? load(x.log_decay + own, n) : splat(x.log_decay[row]);
            const Exp decay = exponential(log_decay);
            factor[i] = decay.factor;
            rest[i] = decay.rest;
        }
    }
    static const float* floats(const std::vector<vec>& x) { return reinterpret_cast<const float*>(x.data()); }
};

// N vectors of columns of one head, from column `first` on.
template <int N, bool WHOLE> static void columns(const Call& x, const Head& head, int64_t row, int64_t first) {
    const float *q = Head::floats(head.q), *k = Head::floats(head.k), *a = Head::floats(head.a);
    const float *b = Head::floats(head.b), *factor = Head::floats(head.factor), *rest = Head::floats(head.rest);
    const int64_t start = row * x.keys * x.values + first;
    const auto width = [&](int i) { return WHOLE ? LANES : lanes(x.values - first, i); };
    const auto state_at = [&](int64_t key, int i) {
        return x.state ? load(x.state + start + key * x.values + i * LANES, width(i)) : vec{};
    };
    vec read[N] = {}, written[N], output[N] = {};
    for (int64_t key = 0; x.rule != ADD && x.state && key < x.keys; key++)
        for (int i = 0; i < N; i++) {
            const vec s = state_at(key, i);
            read[i] += a[key] * (factor[key] * s + rest[key] * s);
        }
    for (int i = 0; i < N; i++) {
        written[i] = load_input(x.v, x.is_bfloat16, row * x.values + first + i * LANES, width(i));
        if (x.rule == REPLACE) written[i] -= read[i];
    }
    for (int64_t key = 0; key < x.keys; key++)
        for (int i = 0; i < N; i++) {
            const vec s = state_at(key, i);
            vec added = k[key] * written[i];
            if (x.rule == MOVE) added += b[key] * read[i];
            const vec next = factor[key] * s + (rest[key] * s + added);
            output[i] += q[key] * next;
            if (x.final_state) store(x.final_state + start + key * x.values + i * LANES, next, width(i));
        }
    for (int i = 0; i < N; i++) {
        const int64_t at = row * x.values + first + i * LANES;
        if (x.output_is_bfloat16)
            store(static_cast<bfloat16*>(x.output) + at, output[i], width(i));
        else
            store(static_cast<float*>(x.output) + at, output[i], width(i));
    }
}

static void step(const Call& x, int64_t row) {
    const Head head(x, row);
    int64_t first = 0;
    for (; x.values - first >= COLUMNS * LANES; first += COLUMNS * LANES) columns<COLUMNS, true>(x, head, row, first);
    for (; x.values - first >= LANES; first += LANES) columns<1, true>(x, head, row, first);
    if (first < x.values) columns<1, false>(x, head, row, first);
}

extern "C" void recurrence_step(int64_t rule, const void* q, const void* k, const void* v, const void* a, const void* b,
                                const float* beta, const float* log_decay, int64_t is_bfloat16, int64_t decays_per_key,
                                double scale, int64_t rows, int64_t heads, int64_t key_heads, int64_t keys,
                                int64_t values, const float* state, float* final_state, void* output,
                                int64_t output_is_bfloat16, int64_t threads) {
    const Call x = {Rule(rule), q, k, v, a, b, is_bfloat16 != 0, beta, log_decay, decays_per_key != 0, float(scale),
                    heads, key_heads, keys, values, state, final_state, output, output_is_bfloat16 != 0};
    // waking a thread takes as long as a few of these states
    const int64_t least = 1 << 16;
    each(rows * heads, rows * heads * keys * values < least ? 1 : threads, [&](int64_t row) { step(x, row); });
}
