// Selective scan (Mamba): a vector of K numbers per channel, written and read by keys and queries of all channels.
//
//     h_t = exp(s_t r) h_{t-1} + k_t x_t          s: step, r: rate         o_t = sum_k q_t h_t
//
// The states of all tokens would be K times as large as the inputs. The forward pass saves those before every CHUNK
// tokens of a sequence; from these, the backward pass recomputes the states within a chunk.
#include "common.h"

constexpr int CHUNK = 32;

// Row of the saved states at which sequence n begins; every sequence has one row more, for an incomplete chunk.
static int64_t first_entry(const int64_t* bounds, int64_t n) { return bounds[n] / CHUNK + n; }

// Rates of the vectors of a task, [vectors K].
static std::vector<vec> gather(const float* rate, const Task& task, int64_t keys, int64_t channels) {
    std::vector<vec> rates(task.vectors * keys);
    for (int i = 0; i < task.vectors; i++)
        for (int64_t k = 0; k < keys; k++)
            rates[i * keys + k] = load(rate + k * channels + task.first + i * LANES, task.lanes[i]);
    return rates;
}

extern "C" void selective_forward(const float* x, const float* step, const float* rate, const float* key,
                                  const float* query, const float* initial, const int64_t* bounds, int64_t sequences,
                                  int64_t channels, int64_t keys, float* output, float* final, float* entries,
                                  int64_t threads) {
    each(sequences * blocks(channels), threads, [&](int64_t number) {
        const Task task(number, channels);
        const std::vector<vec> rates = gather(rate, task, keys, channels);
        std::vector<vec> states(task.vectors * keys);
        const int64_t start = bounds[task.sequence], stop = bounds[task.sequence + 1];
        const int64_t row = task.sequence * keys * channels;
        for (int i = 0; initial && i < task.vectors; i++)
            for (int64_t k = 0; k < keys; k++)
                states[i * keys + k] = load(initial + row + k * channels + task.first + i * LANES, task.lanes[i]);
        for (int64_t chunk = start; chunk < stop; chunk += CHUNK) {
            float* entry = entries ? entries + (first_entry(bounds, task.sequence) + (chunk - start) / CHUNK) * keys * channels : nullptr;
            const int64_t end = chunk + CHUNK < stop ? chunk + CHUNK : stop;
            for (int i = 0; i < task.vectors; i++) {
                const int n = task.lanes[i];
                const int64_t channel = task.first + i * LANES;
                const vec* r = rates.data() + i * keys;
                vec* h = states.data() + i * keys;
                for (int64_t k = 0; entry && k < keys; k++) store(entry + k * channels + channel, h[k], n);
                for (int64_t t = chunk; t < end; t++) {
                    const vec xt = load(x + t * channels + channel, n), st = load(step + t * channels + channel, n);
                    const float *kt = key + t * keys, *qt = query + t * keys;
                    vec o = {};
                    for (int64_t k = 0; k < keys; k++) {
                        h[k] = decay(exponential(st * r[k]), h[k], kt[k] * xt);
                        o += qt[k] * h[k];
                    }
                    store(output + t * channels + channel, o, n);
                }
            }
        }
        for (int i = 0; final && i < task.vectors; i++)
            for (int64_t k = 0; k < keys; k++)
                store(final + row + k * channels + task.first + i * LANES, states[i * keys + k], task.lanes[i]);
    });
}

//     g_t = q_t do_t + exp(s_{t+1} r) g_{t+1}     u_t = g_t exp(s_t r) h_{t-1}
//     dx_t = sum_k k_t g_t      ds_t = sum_k r u_t      dr = sum_t s_t u_t
//     dk_t = sum_c x_t g_t      dq_t = sum_c do_t h_t
//
// Sums over channels have a partial sum per block of channels, d_keys and d_queries [blocks tokens K], which are added
// up at the end; the sum over tokens has one per group of sequences, d_rate [groups K C].
extern "C" void selective_backward(const float* x, const float* step, const float* rate, const float* key,
                                   const float* query, const float* entries, const float* d_output,
                                   const float* d_final, const int64_t* bounds, int64_t sequences, int64_t groups,
                                   int64_t channels, int64_t keys, float* d_x, float* d_step, double* d_rate,
                                   float* d_keys, float* d_queries, float* d_initial, int64_t threads) {
    const int64_t tokens = bounds[sequences];
    each(groups * blocks(channels), threads, [&](int64_t number) {
        const Task task(number, channels);  // task.sequence is the index of a group
        const std::vector<vec> rates = gather(rate, task, keys, channels);
        std::vector<vec> gradient(task.vectors * keys);      // g of the current token
        std::vector<vec> states((CHUNK + 1) * keys);         // h before the chunk and after each of its tokens
        std::vector<Exp> decays(CHUNK * keys);
        std::vector<vec> sum_k(CHUNK * keys), sum_q(CHUNK * keys), sum_r(keys);
        std::vector<wide> total_r(task.vectors * keys);
        for (int64_t s = task.sequence * sequences / groups; s < (task.sequence + 1) * sequences / groups; s++) {
            const int64_t start = bounds[s], stop = bounds[s + 1], row = s * keys * channels;
            for (int i = 0; i < task.vectors; i++)
                for (int64_t k = 0; k < keys; k++)
                    gradient[i * keys + k] = d_final ? load(d_final + row + k * channels + task.first + i * LANES, task.lanes[i]) : vec{};
            const int64_t chunks = (stop - start + CHUNK - 1) / CHUNK;
            for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
                const float* entry = entries + (first_entry(bounds, s) + chunk) * keys * channels;
                const int64_t first = start + chunk * CHUNK;
                const int length = first + CHUNK < stop ? CHUNK : int(stop - first);
                std::fill(sum_k.begin(), sum_k.end(), vec{});
                std::fill(sum_q.begin(), sum_q.end(), vec{});
                for (int i = 0; i < task.vectors; i++) {
                    const int n = task.lanes[i];
                    const int64_t channel = task.first + i * LANES;
                    const vec* r = rates.data() + i * keys;
                    vec* g = gradient.data() + i * keys;
                    for (int64_t k = 0; k < keys; k++) states[k] = load(entry + k * channels + channel, n);
                    for (int t = 0; t < length; t++) {
                        const int64_t at = (first + t) * channels + channel;
                        const vec xt = load(x + at, n), st = load(step + at, n);
                        const float* kt = key + (first + t) * keys;
                        const vec* h = states.data() + t * keys;
                        for (int64_t k = 0; k < keys; k++) {
                            decays[t * keys + k] = exponential(st * r[k]);
                            states[(t + 1) * keys + k] = decay(decays[t * keys + k], h[k], kt[k] * xt);
                        }
                    }
                    std::fill(sum_r.begin(), sum_r.end(), vec{});
                    for (int t = length - 1; t >= 0; t--) {
                        const int64_t at = (first + t) * channels + channel;
                        const vec xt = load(x + at, n), st = load(step + at, n);
                        const vec dt = d_output ? load(d_output + at, n) : vec{};
                        const float *kt = key + (first + t) * keys, *qt = query + (first + t) * keys;
                        const vec *before = states.data() + t * keys, *h = before + keys;
                        const Exp* a = decays.data() + t * keys;
                        vec *sk = sum_k.data() + t * keys, *sq = sum_q.data() + t * keys;
                        vec dx = {}, ds = {};
                        for (int64_t k = 0; k < keys; k++) {
                            const vec gk = g[k] + qt[k] * dt;
                            sq[k] += dt * h[k];
                            sk[k] += xt * gk;
                            dx += kt[k] * gk;
                            g[k] = a[k] * gk;
                            const vec u = g[k] * before[k];
                            ds += r[k] * u;
                            sum_r[k] += st * u;
                        }
                        store(d_x + at, dx, n);
                        store(d_step + at, ds, n);
                    }
                    for (int64_t k = 0; k < keys; k++)
                        total_r[i * keys + k] += __builtin_convertvector(sum_r[k], wide);
                }
                const int64_t at = (task.block * tokens + first) * keys;
                for (int64_t j = 0; j < length * keys; j++) {
                    d_keys[at + j] = sum(sum_k[j]);
                    d_queries[at + j] = sum(sum_q[j]);
                }
            }
            for (int i = 0; d_initial && i < task.vectors; i++)
                for (int64_t k = 0; k < keys; k++)
                    store(d_initial + row + k * channels + task.first + i * LANES, gradient[i * keys + k], task.lanes[i]);
        }
        for (int i = 0; i < task.vectors; i++)
            for (int64_t k = 0; k < keys; k++)
                for (int lane = 0; lane < task.lanes[i]; lane++)
                    d_rate[(task.sequence * keys + k) * channels + task.first + i * LANES + lane] = total_r[i * keys + k][lane];
    });
    add_blocks(d_keys, blocks(channels), tokens * keys, threads);
    add_blocks(d_queries, blocks(channels), tokens * keys, threads);
}
