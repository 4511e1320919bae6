// Scan of independent elements: h_t = exp(a_t) h_{t-1} + x_t, the output is h_t.
#include "common.h"

constexpr int VECTORS = 64 / LANES;  // a task has 64 channels of one sequence: whole cache lines of every token
constexpr int BLOCK = VECTORS * LANES;

struct Channels {  // the channels of a task
    int64_t sequence, first;
    int lanes[VECTORS];  // channels of each vector; 0 where there are none
    Channels(int64_t task, int64_t channels) {
        const int64_t blocks = (channels + BLOCK - 1) / BLOCK;
        sequence = task / blocks;
        first = task % blocks * BLOCK;
        for (int i = 0; i < VECTORS; i++) {
            const int64_t left = channels - first - i * LANES;
            lanes[i] = left < 0 ? 0 : left < LANES ? int(left) : LANES;
        }
    }
};

static int64_t tasks(int64_t sequences, int64_t channels) { return sequences * ((channels + BLOCK - 1) / BLOCK); }

extern "C" void scan_forward(const float* x, const float* log_decay, const float* initial, const int64_t* bounds,
                             int64_t sequences, int64_t channels, float* output, float* final, int64_t threads) {
    each(tasks(sequences, channels), threads, [&](int64_t task) {
        const Channels c(task, channels);
        const int64_t row = c.sequence * channels + c.first;
        vec h[VECTORS] = {};
        for (int i = 0; initial && i < VECTORS; i++) h[i] = load(initial + row + i * LANES, c.lanes[i]);
        for (int64_t t = bounds[c.sequence]; t < bounds[c.sequence + 1]; t++) {
            const int64_t at = t * channels + c.first;
            for (int i = 0; i < VECTORS; i++) {
                const Exp a = exponential(load(log_decay + at + i * LANES, c.lanes[i]));
                h[i] = a.factor * h[i] + (a.rest * h[i] + load(x + at + i * LANES, c.lanes[i]));
                store(output + at + i * LANES, h[i], c.lanes[i]);
            }
        }
        for (int i = 0; final && i < VECTORS; i++) store(final + row + i * LANES, h[i], c.lanes[i]);
    });
}

// g_t = dh_t + exp(a_{t+1}) g_{t+1}        dx_t = g_t        da_t = g_t exp(a_t) h_{t-1}
extern "C" void scan_backward(const float* log_decay, const float* initial, const float* output, const float* d_output,
                              const float* d_final, const int64_t* bounds, int64_t sequences, int64_t channels,
                              float* d_x, float* d_log_decay, float* d_initial, int64_t threads) {
    each(tasks(sequences, channels), threads, [&](int64_t task) {
        const Channels c(task, channels);
        const int64_t row = c.sequence * channels + c.first;
        const int64_t start = bounds[c.sequence];
        for (int i = 0; i < VECTORS; i++) {
            const int n = c.lanes[i];
            const int64_t offset = i * LANES;
            vec g = d_final ? load(d_final + row + offset, n) : vec{};  // the gradient that reaches a token's state
            for (int64_t t = bounds[c.sequence + 1] - 1; t >= start; t--) {
                const int64_t at = t * channels + c.first + offset;
                if (d_output) g += load(d_output + at, n);
                store(d_x + at, g, n);
                const Exp a = exponential(load(log_decay + at, n));
                const vec before = t > start ? load(output + at - channels, n)
                                   : initial ? load(initial + row + offset, n)
                                             : vec{};
                const vec decayed = a.factor * g + a.rest * g;
                store(d_log_decay + at, decayed * before, n);
                g = decayed;
            }
            if (d_initial) store(d_initial + row + offset, g, n);
        }
    });
}
