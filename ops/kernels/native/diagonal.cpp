// Scan with a complex state vector per channel and fixed decays (diagonal state space models).
//
//     h_t = l h_{t-1} + x_t          o_t = Re(sum_k w h_t)          l = exp(a + i angle)
//
// l is the sum of a coarse number and a small rest, so that its rounding, which would be the same in every step, does
// not accumulate. Numbers of a state are stored as [2 K C], real parts first. The forward pass saves the states before
// every CHUNK tokens of a sequence; from these, the backward pass recomputes the states within a chunk.
#include "common.h"

constexpr int CHUNK = 32;

// Row of the saved states at which sequence n begins; every sequence has one row more, for an incomplete chunk.
static int64_t first_entry(const int64_t* bounds, int64_t n) { return bounds[n] / CHUNK + n; }

struct Complex {
    vec re, im;
};
struct Factor {  // of one element: l = coarse + rest, and the output weight
    Complex coarse, rest, weight;
};

INLINE Complex decay(const Factor& l, Complex h, vec x) {
    return {l.coarse.re * h.re - l.coarse.im * h.im + (l.rest.re * h.re - l.rest.im * h.im + x),
            l.coarse.re * h.im + l.coarse.im * h.re + (l.rest.re * h.im + l.rest.im * h.re)};
}
INLINE Complex decay_back(const Factor& l, Complex g) {  // with conj(l)
    return {l.coarse.re * g.re + l.coarse.im * g.im + (l.rest.re * g.re + l.rest.im * g.im),
            l.coarse.re * g.im - l.coarse.im * g.re + (l.rest.re * g.im - l.rest.im * g.re)};
}

// Elements of a task, from states [2 K C].
static void load_states(Complex* h, const float* states, int64_t channel, int n, int64_t keys, int64_t channels) {
    for (int64_t k = 0; k < keys; k++)
        h[k] = {load(states + k * channels + channel, n), load(states + (keys + k) * channels + channel, n)};
}
static void store_states(float* states, const Complex* h, int64_t channel, int n, int64_t keys, int64_t channels) {
    for (int64_t k = 0; k < keys; k++) {
        store(states + k * channels + channel, h[k].re, n);
        store(states + (keys + k) * channels + channel, h[k].im, n);
    }
}

// The factors of a task, [vectors K], from [6 K C]: coarse, rest and weight, real and imaginary.
static std::vector<Factor> gather(const float* factors, const Task& task, int64_t keys, int64_t channels) {
    std::vector<Factor> result(task.vectors * keys);
    for (int i = 0; i < task.vectors; i++)
        for (int64_t k = 0; k < keys; k++) {
            const float* p = factors + k * channels + task.first + i * LANES;
            const int64_t next = keys * channels;
            const int n = task.lanes[i];
            result[i * keys + k] = {{load(p, n), load(p + next, n)},
                                    {load(p + 2 * next, n), load(p + 3 * next, n)},
                                    {load(p + 4 * next, n), load(p + 5 * next, n)}};
        }
    return result;
}

extern "C" void diagonal_forward(const float* x, const float* factors, const float* initial, const int64_t* bounds,
                                 int64_t sequences, int64_t channels, int64_t keys, float* output, float* final,
                                 float* entries, int64_t threads) {
    const int64_t size = 2 * keys * channels;
    each(sequences * blocks(channels), threads, [&](int64_t number) {
        const Task task(number, channels);
        const std::vector<Factor> all = gather(factors, task, keys, channels);
        std::vector<Complex> states(keys);
        const int64_t start = bounds[task.sequence], stop = bounds[task.sequence + 1];
        for (int i = 0; i < task.vectors; i++) {
            const int n = task.lanes[i];
            const int64_t channel = task.first + i * LANES;
            const Factor* l = all.data() + i * keys;
            Complex* h = states.data();
            std::fill(states.begin(), states.end(), Complex{});
            if (initial) load_states(h, initial + task.sequence * size, channel, n, keys, channels);
            for (int64_t t = start; t < stop; t++) {
                if (entries && (t - start) % CHUNK == 0)
                    store_states(entries + (first_entry(bounds, task.sequence) + (t - start) / CHUNK) * size, h,
                                 channel, n, keys, channels);
                const vec xt = load(x + t * channels + channel, n);
                vec o = {};
                for (int64_t k = 0; k < keys; k++) {
                    h[k] = decay(l[k], h[k], xt);
                    o += l[k].weight.re * h[k].re - l[k].weight.im * h[k].im;
                }
                store(output + t * channels + channel, o, n);
            }
            if (final) store_states(final + task.sequence * size, h, channel, n, keys, channels);
        }
    });
}

//     g_t = conj(w) do_t + conj(l) g_{t+1}        dx_t = sum_k Re(g_t)
//     dl  = sum_t g_t conj(h_{t-1})               dw = sum_t do_t conj(h_t)
//
// Sums over tokens have a partial sum per group of sequences: d_factors [groups 4 K C], dl and dw, real and imaginary.
extern "C" void diagonal_backward(const float* x, const float* factors, const float* entries, const float* d_output,
                                  const float* d_final, const int64_t* bounds, int64_t sequences, int64_t groups,
                                  int64_t channels, int64_t keys, float* d_x, double* d_factors, float* d_initial,
                                  int64_t threads) {
    const int64_t size = 2 * keys * channels;
    struct Sums {
        Complex decay, weight;
    };
    each(groups * blocks(channels), threads, [&](int64_t number) {
        const Task task(number, channels);  // task.sequence is the index of a group
        const std::vector<Factor> all = gather(factors, task, keys, channels);
        std::vector<Complex> gradient(keys);             // g of the current token
        std::vector<Complex> states((CHUNK + 1) * keys);  // h before the chunk and after each of its tokens
        std::vector<Sums> sums(keys);
        std::vector<wide> totals(4 * keys);
        for (int i = 0; i < task.vectors; i++) {
            const int n = task.lanes[i];
            const int64_t channel = task.first + i * LANES;
            const Factor* l = all.data() + i * keys;
            Complex* g = gradient.data();
            std::fill(totals.begin(), totals.end(), wide{});
            for (int64_t s = task.sequence * sequences / groups; s < (task.sequence + 1) * sequences / groups; s++) {
                const int64_t start = bounds[s], stop = bounds[s + 1];
                std::fill(gradient.begin(), gradient.end(), Complex{});
                if (d_final) load_states(g, d_final + s * size, channel, n, keys, channels);
                for (int64_t chunk = (stop - start + CHUNK - 1) / CHUNK - 1; chunk >= 0; chunk--) {
                    const int64_t first = start + chunk * CHUNK;
                    const int length = first + CHUNK < stop ? CHUNK : int(stop - first);
                    load_states(states.data(), entries + (first_entry(bounds, s) + chunk) * size, channel, n, keys,
                                channels);
                    for (int t = 0; t < length; t++) {
                        const vec xt = load(x + (first + t) * channels + channel, n);
                        const Complex* h = states.data() + t * keys;
                        for (int64_t k = 0; k < keys; k++) states[(t + 1) * keys + k] = decay(l[k], h[k], xt);
                    }
                    std::fill(sums.begin(), sums.end(), Sums{});
                    for (int t = length - 1; t >= 0; t--) {
                        const int64_t at = (first + t) * channels + channel;
                        const vec dt = d_output ? load(d_output + at, n) : vec{};
                        const Complex *before = states.data() + t * keys, *h = before + keys;
                        vec dx = {};
                        for (int64_t k = 0; k < keys; k++) {
                            const Complex gk = {g[k].re + l[k].weight.re * dt, g[k].im - l[k].weight.im * dt};
                            dx += gk.re;
                            sums[k].decay.re += before[k].re * gk.re + before[k].im * gk.im;
                            sums[k].decay.im += before[k].re * gk.im - before[k].im * gk.re;
                            sums[k].weight.re += dt * h[k].re;
                            sums[k].weight.im -= dt * h[k].im;
                            g[k] = decay_back(l[k], gk);
                        }
                        store(d_x + at, dx, n);
                    }
                    for (int64_t k = 0; k < keys; k++) {
                        const vec parts[] = {sums[k].decay.re, sums[k].decay.im, sums[k].weight.re, sums[k].weight.im};
                        for (int j = 0; j < 4; j++) totals[j * keys + k] += __builtin_convertvector(parts[j], wide);
                    }
                }
                if (d_initial) store_states(d_initial + s * size, g, channel, n, keys, channels);
            }
            for (int64_t j = 0; j < 4 * keys; j++)
                for (int lane = 0; lane < n; lane++)
                    d_factors[(task.sequence * 4 * keys + j) * channels + channel + lane] = totals[j][lane];
        }
    });
}
