// The cell of sLSTM: gates that read the output of the token before. A task is one head of one sequence.
#include "common.h"

INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exp(-x)); }

//     i, f, z, o = g_t + h_{t-1} R
//     s_t = sigmoid(i - log f' - l_{t-1})              l_t = log(f' e^{l_{t-1}} + e^i)
//     a_t = a_{t-1} + s_t (tanh(z) - a_{t-1})          h_t = sigmoid(o) a_t
//
// Per head there are D channels; gates and logits have 4 D, a state h and a. l is carried in float64 and starts at -inf.
extern "C" void slstm_forward(const float* gates, const float* recurrent, const float* memory, const double* weight,
                              const int64_t* bounds, int64_t sequences, int64_t heads, int64_t width,
                              int64_t exponential_forget, float* output, float* final_memory, double* final_weight,
                              float* logits, float* means, float* shares, int64_t threads) {
    each(sequences * heads, threads, [&](int64_t task) {
        const int64_t head = task % heads, sequence = task / heads;
        const float* matrix = recurrent + head * width * 4 * width;
        std::vector<float> p(4 * width), h(width), a(width);
        std::vector<double> l(width, -INFINITY);
        if (memory) {
            std::copy_n(memory + task * 2 * width, width, h.begin());
            std::copy_n(memory + (task * 2 + 1) * width, width, a.begin());
        }
        if (weight) std::copy_n(weight + task * width, width, l.begin());
        for (int64_t t = bounds[sequence]; t < bounds[sequence + 1]; t++) {
            const int64_t row = t * heads + head;
            std::copy_n(gates + row * 4 * width, 4 * width, p.begin());
            for (int64_t v = 0; v * LANES < 4 * width; v += 4) {
                vec sum[4];
                int n[4];
                for (int r = 0; r < 4; r++) sum[r] = load(p.data() + (v + r) * LANES, n[r] = lanes(4 * width, v + r));
                for (int64_t d = 0; d < width; d++)
                    for (int r = 0; r < 4; r++) sum[r] += h[d] * load(matrix + (d * 4 * width + (v + r) * LANES), n[r]);
                for (int r = 0; r < 4; r++) store(p.data() + (v + r) * LANES, sum[r], n[r]);
            }
            for (int64_t v = 0; v * LANES < width; v++) {
                const int n = lanes(width, v);
                const int64_t at = v * LANES;
                const vec i = load(&p[at], n), f = load(&p[width + at], n), z = load(&p[2 * width + at], n);
                const vec o = load(&p[3 * width + at], n), before = load(&a[at], n);
                const vec log_f = exponential_forget ? f : (f < 0.0f ? f : splat(0)) - log1p(exp(f < 0.0f ? f : -f));
                const wide old = widen(log_f) + load(&l[at], n), add = widen(i);
                const vec d = narrow(add - old), s = sigmoid(d);
                store(&l[at], (add > old ? add : old) + widen(log1p(exp(d > 0.0f ? -d : d))), n);
                const vec mean = before + s * (tanh(z) - before), out = sigmoid(o) * mean;
                store(&a[at], mean, n);
                store(&h[at], out, n);
                store(output + row * width + at, out, n);
                if (logits) {
                    store(means + row * width + at, mean, n);
                    store(shares + row * width + at, s, n);
                }
            }
            if (logits) std::copy_n(p.begin(), 4 * width, logits + row * 4 * width);
        }
        if (final_memory) {
            std::copy_n(h.begin(), width, final_memory + task * 2 * width);
            std::copy_n(a.begin(), width, final_memory + (task * 2 + 1) * width);
            std::copy_n(l.begin(), width, final_weight + task * width);
        }
    });
}

// Gradients of gates and of the initial state; that of R is a product of matrices, h_{t-1} and d_gates of all tokens.
extern "C" void slstm_backward(const float* logits, const float* means, const float* shares, const float* recurrent,
                               const float* memory, const float* d_output, const float* d_final_memory,
                               const float* d_final_weight, const int64_t* bounds, int64_t sequences, int64_t heads,
                               int64_t width, int64_t exponential_forget, float* d_gates, float* d_memory,
                               float* d_weight, int64_t threads) {
    each(sequences * heads, threads, [&](int64_t task) {
        const int64_t head = task % heads, sequence = task / heads, start = bounds[sequence];
        const float* matrix = recurrent + head * width * 4 * width;
        std::vector<float> dh(width), da(width), dl(width);
        if (d_final_memory) {
            std::copy_n(d_final_memory + task * 2 * width, width, dh.begin());
            std::copy_n(d_final_memory + (task * 2 + 1) * width, width, da.begin());
        }
        if (d_final_weight) std::copy_n(d_final_weight + task * width, width, dl.begin());
        for (int64_t t = bounds[sequence + 1] - 1; t >= start; t--) {
            const int64_t row = t * heads + head;
            const float* p = logits + row * 4 * width;
            float* dp = d_gates + row * 4 * width;
            for (int64_t v = 0; v * LANES < width; v++) {
                const int n = lanes(width, v);
                const int64_t at = v * LANES;
                const vec f = load(p + width + at, n), value = tanh(load(p + 2 * width + at, n));
                const vec open = sigmoid(load(p + 3 * width + at, n));
                const vec a = load(means + row * width + at, n), s = load(shares + row * width + at, n);
                const vec before = t > start ? load(means + (row - heads) * width + at, n)
                                   : memory  ? load(memory + (task * 2 + 1) * width + at, n)
                                             : vec{};
                const vec h = load(&dh[at], n) + (d_output ? load(d_output + row * width + at, n) : vec{});
                const vec g = load(&da[at], n) + h * open, l = load(&dl[at], n);
                const vec share = g * (value - before) * s * (1.0f - s), old = l * (1.0f - s) - share;
                store(dp + at, share + l * s, n);
                store(dp + width + at, exponential_forget ? old : old * sigmoid(-f), n);
                store(dp + 2 * width + at, g * s * (1.0f - value * value), n);
                store(dp + 3 * width + at, h * a * open * (1.0f - open), n);
                store(&da[at], g * (1.0f - s), n);
                store(&dl[at], old, n);
            }
            for (int64_t d = 0; d < width; d++) dh[d] = dot(dp, matrix + d * 4 * width, 4 * width);
        }
        std::copy_n(dh.begin(), width, d_memory + task * 2 * width);
        std::copy_n(da.begin(), width, d_memory + (task * 2 + 1) * width);
        std::copy_n(dl.begin(), width, d_weight + task * width);
    });
}
