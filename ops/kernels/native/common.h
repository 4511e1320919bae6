// What the kernels share: vectors of floats, exp, and loops over independent tasks.
//
// Nothing here depends on the number of threads, and no kernel changes the floating-point environment.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

// A vector of LANES floats. GCC and clang translate its arithmetic, whatever the processor has.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

#define INLINE static inline __attribute__((always_inline))

// Unaligned loads and stores of the first n lanes; the lanes after them are 0.
INLINE vec load(const float* p, int n = LANES) {
    vec x = {};
    if (n == LANES)
        std::memcpy(&x, p, sizeof x);
    else
        for (int i = 0; i < n; i++) x[i] = p[i];
    return x;
}
INLINE void store(float* p, vec x, int n = LANES) {
    if (n == LANES)
        std::memcpy(p, &x, sizeof x);
    else
        for (int i = 0; i < n; i++) p[i] = x[i];
}
INLINE vec splat(float x) { return x - vec{}; }
INLINE float sum(vec x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

// exp(x) = factor + rest. Where x is near 0, factor is 1 and rest is exp(x) - 1 to full precision; elsewhere factor is 0.
// A state is then updated as factor * h + (rest * h + w): with a slow decay, the rounding of exp(x) itself, which would
// be the same in every step, does not accumulate. exp(-inf) is 0, so that a reset leaves nothing.
struct Exp {
    vec factor, rest;
};
INLINE Exp exponential(vec x) {
    vec y = x < -87.33f ? splat(-87.33f) : x;
    y = y > 88.0f ? splat(88.0f) : y;
    const vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding and subtracting it rounds to an integer
    vec n = y * 1.44269504f + shift;
    ivec bits;
    std::memcpy(&bits, &n, sizeof n);
    n = n - shift;
    vec r = (y - n * 0.693145752f) - n * 1.42860677e-6f;  // y - n log 2, with log 2 in two parts
    vec p = splat(1.98756915e-4f);
    p = p * r + 1.39819995e-3f;
    p = p * r + 8.33345205e-3f;
    p = p * r + 4.16657962e-2f;
    p = p * r + 1.66666655e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r;  // exp(r) - 1
    ivec exponent = (bits + (127 - 0x4B400000)) << 23;  // 2^n
    vec scale;
    std::memcpy(&scale, &exponent, sizeof scale);
    scale = x < -87.33f ? splat(0) : scale;
    const vec near = n == 0.0f ? splat(1) : splat(0);
    return {near, p * scale + (scale - near * scale)};
}
INLINE vec exp(vec x) {
    Exp e = exponential(x);
    return e.factor + e.rest;
}

// Run task(0) to task(count - 1), which are independent of each other.
template <class Task>
static void each(int64_t count, int64_t threads, const Task& task) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && count > 1)
    for (int64_t i = 0; i < count; i++) task(i);
}
