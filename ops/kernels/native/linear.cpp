// Products of a few rows with a matrix of weights, as in decoding. Every weight is read once, at the rate of memory.
//
//     y_rn = sum_k x_rk w_nk + bias_n
#include "common.h"

constexpr int SUMS = 8;          // of rows and outputs, computed together: as many as registers hold
constexpr int64_t TASK = 64;     // outputs of a task
constexpr int AHEAD = 2048;      // bytes that are fetched before they are read

// R rows [R K] of x and N outputs; w points to the weights of the first one.
template <int R, int N, class T>
INLINE void outputs(const float* x, const T* w, int64_t keys, float (&y)[R][N]) {
    vec sums[R][N] = {};
    int64_t k = 0;
    for (; k + LANES <= keys; k += LANES)
        for (int n = 0; n < N; n++) {
            const T* at = w + n * keys + k;
            __builtin_prefetch(reinterpret_cast<const char*>(at) + AHEAD);
            const vec weight = load(at, LANES);
            for (int r = 0; r < R; r++) sums[r][n] += weight * load(x + r * keys + k);
        }
    for (int n = 0; n < N && k < keys; n++) {
        const vec weight = load(w + n * keys + k, int(keys - k));
        for (int r = 0; r < R; r++) sums[r][n] += weight * load(x + r * keys + k, int(keys - k));
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) y[r][n] = sum(sums[r][n]);
}

template <class T> INLINE float read(const T* x, int64_t at) { return load(x + at, 1)[0]; }
template <class T> INLINE void write(T* x, int64_t at, float value) { store(x + at, splat(value), 1); }

template <int R, class T>
static void rows(const float* x, const T* w, const T* bias, T* y, int64_t keys, int64_t width, int64_t threads) {
    constexpr int OUTPUTS = R == 1 ? SUMS / 2 : R >= SUMS ? 1 : SUMS / R;
    each((width + TASK - 1) / TASK, threads, [&](int64_t task) {
        const int64_t stop = std::min(width, (task + 1) * TASK);
        const auto run = [&](auto count, int64_t first) {
            constexpr int N = count;
            float results[R][N];
            outputs<R, N, T>(x, w + first * keys, keys, results);
            for (int r = 0; r < R; r++)
                for (int n = 0; n < N; n++)
                    write(y, r * width + first + n, results[r][n] + (bias ? read(bias, first + n) : 0));
        };
        int64_t n = task * TASK;
        for (; n + OUTPUTS <= stop; n += OUTPUTS) run(std::integral_constant<int, OUTPUTS>{}, n);
        for (; n < stop; n++) run(std::integral_constant<int, 1>{}, n);
    });
}

template <class T>
static void linear(const T* x, const T* w, const T* bias, T* y, int64_t count, int64_t keys, int64_t width,
                   int64_t threads) {
    std::vector<float> wide(count * keys);
    for (int64_t i = 0; i < count * keys; i++) wide[i] = read(x, i);
    const float* from = wide.data();
    if (width * keys < 1 << 18) threads = 1;  // waking a thread takes as long
    for (int64_t left = count; left > 0;) {
        const auto run = [&](auto number) {
            rows<number, T>(from, w, bias, y, keys, width, threads);
            from += number * keys, y += number * width, left -= number;
        };
        if (left >= 8) run(std::integral_constant<int, 8>{});
        else if (left >= 4) run(std::integral_constant<int, 4>{});
        else if (left == 3) run(std::integral_constant<int, 3>{});
        else if (left == 2) run(std::integral_constant<int, 2>{});
        else run(std::integral_constant<int, 1>{});
    }
}

extern "C" void linear_float32(const float* x, const float* w, const float* bias, float* y, int64_t count, int64_t keys,
                               int64_t width, int64_t threads) {
    linear(x, w, bias, y, count, keys, width, threads);
}

extern "C" void linear_bfloat16(const bfloat16* x, const bfloat16* w, const bfloat16* bias, bfloat16* y, int64_t count,
                                int64_t keys, int64_t width, int64_t threads) {
    linear(x, w, bias, y, count, keys, width, threads);
}
