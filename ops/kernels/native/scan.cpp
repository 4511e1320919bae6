// Scan of independent elements, and its form in the log domain; the output is the state.
#include "common.h"

//     h_t = exp(a_t) h_{t-1} + x_t
extern "C" void scan_forward(const float* x, const float* log_decay, const float* initial, const int64_t* bounds,
                             int64_t sequences, int64_t channels, float* output, float* final, int64_t threads) {
    each(sequences * blocks(channels), threads, [&](int64_t number) {
        const Task task(number, channels);
        const int64_t row = task.sequence * channels + task.first;
        vec h[VECTORS] = {};
        for (int i = 0; initial && i < task.vectors; i++) h[i] = load(initial + row + i * LANES, task.lanes[i]);
        for (int64_t t = bounds[task.sequence]; t < bounds[task.sequence + 1]; t++)
            for (int i = 0; i < task.vectors; i++) {
                const int n = task.lanes[i];
                const int64_t at = t * channels + task.first + i * LANES;
                h[i] = decay(exponential(load(log_decay + at, n)), h[i], load(x + at, n));
                store(output + at, h[i], n);
            }
        for (int i = 0; final && i < task.vectors; i++) store(final + row + i * LANES, h[i], task.lanes[i]);
    });
}

//     g_t = dh_t + exp(a_{t+1}) g_{t+1}           dx_t = g_t        da_t = g_t exp(a_t) h_{t-1}
extern "C" void scan_backward(const float*, const float* log_decay, const float* initial, const float* output,
                              const float* d_output, const float* d_final, const int64_t* bounds, int64_t sequences,
                              int64_t channels, float* d_x, float* d_log_decay, float* d_initial, int64_t threads) {
    each(sequences * blocks(channels), threads, [&](int64_t number) {
        const Task task(number, channels);
        const int64_t row = task.sequence * channels + task.first, start = bounds[task.sequence];
        vec g[VECTORS] = {};
        for (int i = 0; d_final && i < task.vectors; i++) g[i] = load(d_final + row + i * LANES, task.lanes[i]);
        for (int64_t t = bounds[task.sequence + 1] - 1; t >= start; t--)
            for (int i = 0; i < task.vectors; i++) {
                const int n = task.lanes[i];
                const int64_t at = t * channels + task.first + i * LANES;
                const vec before = t > start  ? load(output + at - channels, n)
                                   : initial ? load(initial + row + i * LANES, n)
                                             : vec{};
                if (d_output) g[i] += load(d_output + at, n);
                store(d_x + at, g[i], n);
                g[i] = exponential(load(log_decay + at, n)) * g[i];
                store(d_log_decay + at, g[i] * before, n);
            }
        for (int i = 0; d_initial && i < task.vectors; i++) store(d_initial + row + i * LANES, g[i], task.lanes[i]);
    });
}

//     h_t = log(exp(a_t + h_{t-1}) + exp(x_t))
//
// Each step adds log(1 + exp(-|d|)) to the larger of the two terms, with d their difference. If the old state decays
// slowly, h is the sum of many small numbers, so it is carried in float64; the numbers added are float32.
extern "C" void log_scan_forward(const float* x, const float* log_decay, const double* initial, const int64_t* bounds,
                                 int64_t sequences, int64_t channels, float* output, double* final, int64_t threads) {
    each(sequences * blocks(channels), threads, [&](int64_t number) {
        const Task task(number, channels);
        const int64_t row = task.sequence * channels + task.first;
        wide h[VECTORS];
        for (int i = 0; i < task.vectors; i++)
            h[i] = initial ? load(initial + row + i * LANES, task.lanes[i]) : widen(splat(-INFINITY));
        for (int64_t t = bounds[task.sequence]; t < bounds[task.sequence + 1]; t++)
            for (int i = 0; i < task.vectors; i++) {
                const int n = task.lanes[i];
                const int64_t at = t * channels + task.first + i * LANES;
                const wide old = widen(load(log_decay + at, n)) + h[i], add = widen(load(x + at, n));
                const vec d = narrow(add - old);
                h[i] = (add > old ? add : old) + widen(log1p(exp(d > 0.0f ? -d : d)));
                store(output + at, narrow(h[i]), n);
            }
        for (int i = 0; final && i < task.vectors; i++) store(final + row + i * LANES, h[i], task.lanes[i]);
    });
}

//     s_t = exp(a_t + h_{t-1} - h_t)                 the old state's share
//     g_t = dh_t + s_{t+1} g_{t+1}           dx_t = g_t exp(x_t - h_t)        da_t = g_t s_t
extern "C" void log_scan_backward(const float* x, const float* log_decay, const double* initial, const float* output,
                                  const float* d_output, const float* d_final, const int64_t* bounds, int64_t sequences,
                                  int64_t channels, float* d_x, float* d_log_decay, float* d_initial,
                                  int64_t threads) {
    each(sequences * blocks(channels), threads, [&](int64_t number) {
        const Task task(number, channels);
        const int64_t row = task.sequence * channels + task.first, start = bounds[task.sequence];
        vec g[VECTORS] = {};
        for (int i = 0; d_final && i < task.vectors; i++) g[i] = load(d_final + row + i * LANES, task.lanes[i]);
        for (int64_t t = bounds[task.sequence + 1] - 1; t >= start; t--)
            for (int i = 0; i < task.vectors; i++) {
                const int n = task.lanes[i];
                const int64_t at = t * channels + task.first + i * LANES;
                const vec h = load(output + at, n);
                const vec before = t > start  ? load(output + at - channels, n)
                                   : initial ? narrow(load(initial + row + i * LANES, n))
                                             : splat(-INFINITY);
                if (d_output) g[i] += load(d_output + at, n);
                store(d_x + at, g[i] * exp(load(x + at, n) - h), n);
                g[i] = exponential(load(log_decay + at, n) + (before - h)) * g[i];
                store(d_log_decay + at, g[i], n);
            }
        for (int i = 0; d_initial && i < task.vectors; i++) store(d_initial + row + i * LANES, g[i], task.lanes[i]);
    });
}
