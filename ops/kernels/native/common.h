// What the kernels share: vectors of floats, exp and functions of it, and loops over independent tasks.
//
// Nothing here depends on the number of threads, and no kernel changes the floating-point environment.
#pragma once
#include <algorithm>
#include <cmath>
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
typedef double wide __attribute__((vector_size(8 * LANES)));
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

// The same for bfloat16, the upper half of a float; stores round to the nearest, ties to even.
struct bfloat16 {
    uint16_t bits;
};
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
INLINE vec load(const bfloat16* p, int n = LANES) {
    halves x = {};
    if (n == LANES)
        std::memcpy(&x, p, sizeof x);
    else
        for (int i = 0; i < n; i++) x[i] = p[i].bits;
    return (vec)(__builtin_convertvector(x, words) << 16);
}
INLINE void store(bfloat16* p, vec x, int n = LANES) {
    words bits = (words)x;
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    bits = x == x ? bits : bits * 0 + 0x7FC0;
    const halves y = __builtin_convertvector(bits, halves);
    if (n == LANES)
        std::memcpy(p, &y, sizeof y);
    else
        for (int i = 0; i < n; i++) p[i].bits = y[i];
}

// Lanes of vector i that hold elements, of n elements in all.
INLINE int lanes(int64_t n, int64_t i) { return int(std::max<int64_t>(std::min<int64_t>(n - i * LANES, LANES), 0)); }

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
    const ivec bits = (ivec)n;
    n = n - shift;
    vec r = (y - n * 0.693145752f) - n * 1.42860677e-6f;  // y - n log 2, with log 2 in two parts
    vec p = splat(1.98756915e-4f);
    p = p * r + 1.39819995e-3f;
    p = p * r + 8.33345205e-3f;
    p = p * r + 4.16657962e-2f;
    p = p * r + 1.66666655e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r;  // exp(r) - 1
    vec scale = (vec)((bits + (127 - 0x4B400000)) << 23);  // 2^n
    scale = x < -87.33f ? splat(0) : scale;
    const vec near = n == 0.0f ? splat(1) : splat(0);
    return {near, p * scale + (scale - near * scale)};
}
INLINE vec exp(vec x) {
    const Exp e = exponential(x);
    return e.factor + e.rest;
}
INLINE vec tanh(vec x) {
    const Exp e = exponential(2.0f * x);
    const vec y = (e.factor - 1.0f) + e.rest;  // exp(2x) - 1, to full precision near 0
    return y / (y + 2.0f);
}
INLINE vec operator*(Exp a, vec h) { return a.factor * h + a.rest * h; }
INLINE vec decay(Exp a, vec h, vec written) { return a.factor * h + (a.rest * h + written); }

INLINE vec narrow(wide x) { return __builtin_convertvector(x, vec); }
INLINE wide widen(vec x) { return __builtin_convertvector(x, wide); }

// The first n lanes of float64 numbers.
INLINE wide load(const double* p, int n) {
    wide x = {};
    for (int i = 0; i < n; i++) x[i] = p[i];
    return x;
}
INLINE void store(double* p, wide x, int n) {
    for (int i = 0; i < n; i++) p[i] = x[i];
}

// log(1 + y) for 0 <= y <= 1, as 2 atanh(y / (2 + y))
INLINE vec log1p(vec y) {
    const vec s = y / (2.0f + y), u = s * s;
    vec p = splat(1.0f / 15);
    p = p * u + 1.0f / 13;
    p = p * u + 1.0f / 11;
    p = p * u + 1.0f / 9;
    p = p * u + 1.0f / 7;
    p = p * u + 1.0f / 5;
    p = p * u + 1.0f / 3;
    return 2.0f * (s + s * u * p);
}

INLINE float dot(const float* x, const float* y, int64_t n) {
    vec total = {};
    for (int64_t i = 0; i < n; i += LANES) total += load(x + i, lanes(n - i, 0)) * load(y + i, lanes(n - i, 0));
    return sum(total);
}

// Sequences and channels are split into tasks: a task has BLOCK channels (whole cache lines) of one sequence, or of one
// group of sequences.
constexpr int VECTORS = 64 / LANES;
constexpr int BLOCK = VECTORS * LANES;

static inline int64_t blocks(int64_t channels) { return (channels + BLOCK - 1) / BLOCK; }

struct Task {
    int64_t sequence, block, first;  // first: the first channel
    int vectors, lanes[VECTORS];     // how many vectors there are, and the channels of each
    Task(int64_t task, int64_t channels) {
        sequence = task / blocks(channels);
        block = task % blocks(channels);
        first = block * BLOCK;
        const int64_t left = channels - first < BLOCK ? channels - first : BLOCK;
        vectors = int((left + LANES - 1) / LANES);
        for (int i = 0; i < vectors; i++) lanes[i] = left - i * LANES < LANES ? int(left - i * LANES) : LANES;
    }
};

// Run task(0) to task(count - 1), which are independent of each other.
template <class Task>
static void each(int64_t count, int64_t threads, const Task& task) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && count > 1)
    for (int64_t i = 0; i < count; i++) task(i);
}

// Add the rows of x [rows size] to its first row, one after another.
static inline void add_blocks(float* x, int64_t rows, int64_t size, int64_t threads) {
    constexpr int64_t part = 4096;
    each((size + part - 1) / part, threads, [&](int64_t number) {
        const int64_t stop = (number + 1) * part < size ? (number + 1) * part : size;
        for (int64_t row = 1; row < rows; row++)
            for (int64_t i = number * part; i < stop; i++) x[i] += x[row * size + i];
    });
}
