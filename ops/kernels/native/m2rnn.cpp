// The cell of M2RNN: a matrix of K x V numbers per head that goes through tanh at every token.
//
//     A_t = tanh(S_{t-1} W + k_t v_t^T)        S_t = S_{t-1} + c_t (A_t - S_{t-1}),  c = 1 - e^g        o_t = q_t S_t
//
// A task is one head of one sequence. The forward pass saves the states before every CHUNK tokens; from these, the
// backward pass recomputes the states within a chunk. Matrices are padded with zeros: rows to a multiple of ROWS,
// columns to whole vectors.
#include "common.h"

constexpr int CHUNK = 32;
constexpr int ROWS = 4;

struct Shape {
    int64_t keys, values, rows, columns;  // rows, columns: with padding
    Shape(int64_t k, int64_t v)
        : keys(k), values(v), rows((k + ROWS - 1) / ROWS * ROWS), columns((v + LANES - 1) / LANES * LANES) {}
    int64_t size() const { return rows * columns; }
    int64_t square() const { return values * columns; }
};

// Copy a matrix of `rows` rows into one with padded columns, and back.
static void pad(const float* x, int64_t rows, const Shape& s, float* out) {
    for (int64_t r = 0; r < rows; r++) std::copy_n(x + r * s.values, s.values, out + r * s.columns);
}
static void strip(const float* x, int64_t rows, const Shape& s, float* out) {
    for (int64_t r = 0; r < rows; r++) std::copy_n(x + r * s.columns, s.values, out + r * s.values);
}

// out += x w, with x and out [rows columns] and w [values columns].
INLINE void multiply(const float* x, const float* w, const Shape& s, float* out) {
    for (int64_t i = 0; i < s.columns; i += LANES)
        for (int64_t k = 0; k < s.rows; k += ROWS) {
            const float* row = x + k * s.columns;
            float* o = out + k * s.columns + i;
            vec sum[ROWS];
            for (int r = 0; r < ROWS; r++) sum[r] = load(o + r * s.columns);
            for (int64_t j = 0; j < s.values; j++) {
                const vec wj = load(w + j * s.columns + i);
                for (int r = 0; r < ROWS; r++) sum[r] += row[r * s.columns + j] * wj;
            }
            for (int r = 0; r < ROWS; r++) store(o + r * s.columns, sum[r]);
        }
}

// One head's keys, values and weights of one sequence, padded as states are.
struct Head {
    Shape s;
    int64_t heads, head;
    const float *key, *value, *log_decay;
    std::vector<float> weight, v;
    Head(const Shape& shape, int64_t heads, int64_t head, const float* key, const float* value, const float* log_decay,
         const float* w)
        : s(shape), heads(heads), head(head), key(key), value(value), log_decay(log_decay), weight(s.square()), v(s.columns) {
        pad(w + head * s.values * s.values, s.values, s, weight.data());
    }
    int64_t row(int64_t t) const { return t * heads + head; }
    float change(int64_t t) const { return -std::expm1(log_decay[row(t)]); }
    // Compute A and the state after token t, which may be stored in the place of the state before it.
    void advance(int64_t t, const float* state, float* candidate, float* after) {
        const float* k = key + row(t) * s.keys;
        const float c = change(t);
        std::copy_n(value + row(t) * s.values, s.values, v.begin());
        for (int64_t r = 0; r < s.rows; r++)
            for (int64_t i = 0; i < s.columns; i += LANES)
                store(candidate + r * s.columns + i, (r < s.keys ? k[r] : 0.0f) * load(&v[i]));
        multiply(state, weight.data(), s, candidate);
        for (int64_t i = 0; i < s.size(); i += LANES) {
            const vec a = tanh(load(candidate + i)), old = load(state + i);
            store(candidate + i, a);
            store(after + i, old + c * (a - old));
        }
    }
};

// Index of the first saved state of sequence n; every sequence has one more, for an incomplete chunk.
static int64_t first_entry(const int64_t* bounds, int64_t n) { return bounds[n] / CHUNK + n; }

extern "C" void m2rnn_forward(const float* query, const float* key, const float* value, const float* log_decay,
                              const float* weight, const float* initial, const int64_t* bounds, int64_t sequences,
                              int64_t heads, int64_t keys, int64_t values, float* output, float* final, float* entries,
                              int64_t threads) {
    const Shape s(keys, values);
    const int64_t size = keys * values;
    each(sequences * heads, threads, [&](int64_t task) {
        const int64_t sequence = task / heads, start = bounds[sequence];
        Head head(s, heads, task % heads, key, value, log_decay, weight);
        std::vector<float> state(s.size()), candidate(s.size()), o(s.columns);
        if (initial) pad(initial + task * size, keys, s, state.data());
        for (int64_t t = start; t < bounds[sequence + 1]; t++) {
            const int64_t entry = first_entry(bounds, sequence) + (t - start) / CHUNK;
            if (entries && (t - start) % CHUNK == 0)
                strip(state.data(), keys, s, entries + (entry * heads + head.head) * size);
            head.advance(t, state.data(), candidate.data(), state.data());
            const float* q = query + head.row(t) * keys;
            for (int64_t i = 0; i < s.columns; i += LANES) {
                vec sum = {};
                for (int64_t k = 0; k < keys; k++) sum += q[k] * load(&state[k * s.columns + i]);
                store(&o[i], sum);
            }
            std::copy_n(o.begin(), values, output + head.row(t) * values);
        }
        if (final) strip(state.data(), keys, s, final + task * size);
    });
}

//     dS_t = q_t do_t^T + (1 - c_{t+1}) dS_{t+1} + dP_{t+1} W^T       dP_t = c_t dS_t (1 - A_t^2)
//     dg_t = (1 - c_t) sum dS_t (S_{t-1} - A_t)      dk_t = dP_t v_t      dv_t = k_t dP_t      dW = sum_t S_{t-1}^T dP_t
//
// d_weight has one matrix per sequence and head, [sequences heads V V].
extern "C" void m2rnn_backward(const float* query, const float* key, const float* value, const float* log_decay,
                               const float* weight, const float* entries, const float* d_output, const float* d_final,
                               const int64_t* bounds, int64_t sequences, int64_t heads, int64_t keys, int64_t values,
                               float* d_query, float* d_key, float* d_value, float* d_log_decay, double* d_weight,
                               float* d_initial, int64_t threads) {
    const Shape s(keys, values);
    const int64_t size = keys * values;
    each(sequences * heads, threads, [&](int64_t task) {
        const int64_t sequence = task / heads, start = bounds[sequence], stop = bounds[sequence + 1];
        Head head(s, heads, task % heads, key, value, log_decay, weight);
        std::vector<float> transposed(s.square()), sum_w(s.columns * s.columns), d_state(s.size()), d_product(s.size());
        std::vector<float> states((CHUNK + 1) * s.size()), candidates(CHUNK * s.size()), d_o(s.columns), d_v(s.columns);
        double* total = d_weight + task * values * values;
        std::fill_n(total, values * values, 0.0);
        for (int64_t i = 0; i < values; i++)
            for (int64_t j = 0; j < values; j++) transposed[j * s.columns + i] = head.weight[i * s.columns + j];
        if (d_final) pad(d_final + task * size, keys, s, d_state.data());
        for (int64_t chunk = (stop - start + CHUNK - 1) / CHUNK - 1; chunk >= 0; chunk--) {
            const int64_t first = start + chunk * CHUNK, length = std::min<int64_t>(CHUNK, stop - first);
            pad(entries + ((first_entry(bounds, sequence) + chunk) * heads + head.head) * size, keys, s, states.data());
            for (int64_t t = 0; t < length; t++)
                head.advance(first + t, &states[t * s.size()], &candidates[t * s.size()], &states[(t + 1) * s.size()]);
            std::fill(sum_w.begin(), sum_w.end(), 0.0f);
            for (int64_t t = length - 1; t >= 0; t--) {
                const int64_t row = head.row(first + t);
                const float c = head.change(first + t), kept = std::exp(log_decay[row]);
                const float *old = &states[t * s.size()], *a = &candidates[t * s.size()];
                std::copy_n(value + row * values, values, head.v.begin());
                if (d_output) std::copy_n(d_output + row * values, values, d_o.begin());
                std::fill(d_v.begin(), d_v.end(), 0.0f);
                vec d_decay = {};
                for (int64_t k = 0; k < keys; k++) {
                    vec d_q = {}, d_k = {};
                    for (int64_t i = 0; i < s.columns; i += LANES) {
                        const int64_t at = k * s.columns + i;
                        const vec o = load(&d_o[i]), ds = load(&d_state[at]) + query[row * keys + k] * o;
                        const vec ak = load(a + at), dp = c * ds * (1.0f - ak * ak);
                        d_q += load(old + s.size() + at) * o;
                        d_decay += ds * (load(old + at) - ak);
                        d_k += dp * load(&head.v[i]);
                        store(&d_v[i], load(&d_v[i]) + key[row * keys + k] * dp);
                        store(&d_product[at], dp);
                        store(&d_state[at], kept * ds);
                    }
                    d_query[row * keys + k] = sum(d_q);
                    d_key[row * keys + k] = sum(d_k);
                }
                d_log_decay[row] = kept * sum(d_decay);
                std::copy_n(d_v.begin(), values, d_value + row * values);
                for (int64_t i = 0; i < s.columns; i += LANES)
                    for (int64_t j = 0; j < values; j += ROWS) {  // columns are a multiple of ROWS
                        vec w[ROWS];
                        for (int r = 0; r < ROWS; r++) w[r] = load(&sum_w[(j + r) * s.columns + i]);
                        for (int64_t k = 0; k < keys; k++) {
                            const vec dp = load(&d_product[k * s.columns + i]);
                            for (int r = 0; r < ROWS; r++) w[r] += old[k * s.columns + j + r] * dp;
                        }
                        for (int r = 0; r < ROWS; r++) store(&sum_w[(j + r) * s.columns + i], w[r]);
                    }
                multiply(d_product.data(), transposed.data(), s, d_state.data());
            }
            for (int64_t i = 0; i < values; i++)
                for (int64_t j = 0; j < values; j++) total[i * values + j] += sum_w[i * s.columns + j];
        }
        if (d_initial) strip(d_state.data(), keys, s, d_initial + task * size);
    });
}
