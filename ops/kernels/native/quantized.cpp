// Products of a few rows with a matrix of weights of 8 or 4 bits, as in decoding. Weights are read at the rate of memory.
//
//     y_rn = s_r sum_k a_rk w_nk + bias_n        x_rk = s_r a_rk
//     w_nk = c_n q_nk (8 bits)                   w_nk = c_ng q_nk + o_ng (4 bits, where k is in group g)
//
// q are the codes of the weights, c their scales and o their offsets. The rows are rounded to 16 bits (a, with the scale
// s of the row), so that products are integers: a processor multiplies twice as many of them at once as of floats. The
// sums of a row are added in the same order in every batch, so that its result does not depend on other rows.
#include "common.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

constexpr int GROUP = 32;        // inputs that share a scale and an offset, with 4 bits
constexpr int64_t EXACT = 2048;  // inputs whose products with 8 bits do not overflow the sum, of 8 integers
constexpr int64_t TASK = 32;     // outputs of a task
constexpr int AHEAD = 2048;      // bytes of codes that are fetched before they are read

typedef float floats __attribute__((vector_size(32)));
typedef int32_t ints __attribute__((vector_size(32)));
typedef int16_t shorts __attribute__((vector_size(32)));
typedef uint16_t halves8 __attribute__((vector_size(16)));
typedef uint32_t words8 __attribute__((vector_size(32)));

template <class V, class T> INLINE V read(const T* p) {
    V x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

// Widen 16 codes, and add up products of neighbours. By intrinsics: GCC 12 does not find these instructions itself.
#if defined(__AVX2__)
INLINE shorts widen(const int8_t* p) { return (shorts)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
INLINE shorts widen(const uint8_t* p) { return (shorts)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)); }
INLINE ints dot(shorts a, shorts b) { return (ints)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#else
template <class T> INLINE shorts widen(const T* p) {
    shorts y;
    for (int i = 0; i < 16; i++) y[i] = p[i];
    return y;
}
INLINE ints dot(shorts a, shorts b) {
    ints y;
    for (int i = 0; i < 8; i++) y[i] = int(a[2 * i]) * b[2 * i] + int(a[2 * i + 1]) * b[2 * i + 1];
    return y;
}
#endif
INLINE floats to_floats(ints x) { return __builtin_convertvector(x, floats); }
INLINE float total(floats x) { return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7])); }

// Rows in 16 bits, padded with zeros to whole groups. A row with a value that is not finite becomes NaN.
struct Rows {
    const int64_t keys, eights;   // inputs, and groups rounded up to a multiple of 8
    std::vector<int16_t> values;  // [rows keys]
    std::vector<float> sums;      // of the values of each group, [rows eights]
    std::vector<float> scales;    // [rows]

    // x [rows given], where keys is `given` rounded up to a multiple of 32
    Rows(const float* x, int64_t rows, int64_t given)
        : keys((given + GROUP - 1) / GROUP * GROUP), eights((keys / GROUP + 7) / 8 * 8), values(rows * keys),
          sums(rows * eights), scales(rows) {
        std::vector<float> padded(keys);
        for (int64_t r = 0; r < rows; r++) {
            vec largest = {}, strange = {};
            for (int64_t k = 0; k < given; k += LANES) {
                const int n = lanes(given - k, 0);
                const vec value = load(x + r * given + k, n);
                const vec size = value < 0 ? -value : value;
                largest = size > largest ? size : largest;
                strange += value - value;  // NaN if a value is not finite, else 0
                store(&padded[k], value, n);
            }
            float top = 0;
            for (int i = 0; i < LANES; i++) top = std::max(top, largest[i]);
            scales[r] = std::max(top / 32767, 1e-35f) + sum(strange);
            if (std::isnan(scales[r])) continue;
            const float inverse = 1 / scales[r];
            int16_t* a = &values[r * keys];
            for (int64_t k = 0; k < keys; k++) a[k] = int16_t(std::nearbyint(padded[k] * inverse));
            for (int64_t g = 0; g < keys / GROUP; g++) {
                int32_t sum = 0;
                for (int i = 0; i < GROUP; i++) sum += a[g * GROUP + i];
                sums[r * eights + g] = float(sum);
            }
        }
    }
};

// Codes [outputs keys] and scales [outputs].
struct Int8 {
    const int8_t* codes;
    const float* scales;
};

// Products of R rows, from number `row`, with output n, without the scales of the rows.
template <int R>
INLINE void output(const Int8& matrix, const Rows& x, int64_t row, int64_t n, float (&y)[R]) {
    const int64_t keys = x.keys;
    const int16_t* a = &x.values[row * keys];
    const int8_t* q = matrix.codes + n * keys;
    floats sums[R] = {};
    for (int64_t first = 0; first < keys; first += EXACT) {
        ints part[R] = {};
        for (int64_t k = first; k < std::min(keys, first + EXACT); k += GROUP) {
            __builtin_prefetch(q + k + AHEAD);
            const shorts low = widen(q + k), high = widen(q + k + 16);
            for (int r = 0; r < R; r++) {
                const int16_t* at = a + r * keys + k;
                part[r] += dot(low, read<shorts>(at)) + dot(high, read<shorts>(at + 16));
            }
        }
        for (int r = 0; r < R; r++) sums[r] += to_floats(part[r]);
    }
    for (int r = 0; r < R; r++) y[r] = total(sums[r]) * matrix.scales[n];
}

// Codes [outputs groups 16], where a byte has inputs i and i + 16 of its group; scales and offsets [outputs groups].
struct Int4 {
    const uint8_t* codes;
    const bfloat16 *scales, *offsets;
};

// Up to 8 scales or offsets; those after them are 0.
INLINE floats eight(const bfloat16* p, int count) {
    halves8 x = {};
    if (count == 8) x = read<halves8>(p);
    else
        for (int i = 0; i < count; i++) x[i] = p[i].bits;
    return (floats)(__builtin_convertvector(x, words8) << 16);
}

// Add the products of up to 8 groups, from number g.
template <int R>
INLINE void add_groups(const Int4& matrix, const Rows& x, int64_t row, int64_t n, int64_t g, int count,
                       floats (&sums)[R]) {
    const int64_t first = n * (x.keys / GROUP) + g;
    const floats offsets = eight(matrix.offsets + first, count);
    for (int r = 0; r < R; r++) sums[r] += offsets * read<floats>(&x.sums[(row + r) * x.eights + g]);
    const floats packed = eight(matrix.scales + first, count);
    float scales[8];  // in memory: a load spreads a scale over a vector at no cost
    std::memcpy(scales, &packed, sizeof scales);
    const uint8_t* q = matrix.codes + first * (GROUP / 2);
    for (int j = 0; j < count; j++, q += GROUP / 2) {
        __builtin_prefetch(q + AHEAD);
        const shorts both = widen(q), low = both & 15, high = both >> 4;
        for (int r = 0; r < R; r++) {
            const int16_t* a = &x.values[(row + r) * x.keys + (g + j) * GROUP];
            sums[r] += to_floats(dot(low, read<shorts>(a)) + dot(high, read<shorts>(a + 16))) * scales[j];
        }
    }
}

template <int R>
INLINE void output(const Int4& matrix, const Rows& x, int64_t row, int64_t n, float (&y)[R]) {
    const int64_t groups = x.keys / GROUP;
    floats sums[R] = {};
    int64_t g = 0;
    for (; g + 8 <= groups; g += 8) add_groups(matrix, x, row, n, g, 8, sums);
    if (g < groups) add_groups(matrix, x, row, n, g, int(groups - g), sums);
    for (int r = 0; r < R; r++) y[r] = total(sums[r]);
}

template <class Matrix>
static void multiply(const Matrix& matrix, const float* input, const float* bias, float* y, int64_t count, int64_t keys,
                     int64_t width, int64_t threads) {
    const Rows x(input, count, keys);
    if (width * keys < 1 << 18) threads = 1;  // waking a thread takes as long
    each((width + TASK - 1) / TASK, threads, [&](int64_t task) {
        const int64_t stop = std::min(width, (task + 1) * TASK);
        int64_t row = 0;
        const auto rows = [&](auto number) {
            constexpr int R = number;
            for (int64_t n = task * TASK; n < stop; n++) {
                float results[R];
                output<R>(matrix, x, row, n, results);
                for (int r = 0; r < R; r++)
                    y[(row + r) * width + n] = std::fma(results[r], x.scales[row + r], bias ? bias[n] : 0.0f);
            }
            row += R;
        };
        while (row < count) {
            if (count - row >= 8) rows(std::integral_constant<int, 8>{});
            else if (count - row >= 4) rows(std::integral_constant<int, 4>{});
            else if (count - row >= 2) rows(std::integral_constant<int, 2>{});
            else rows(std::integral_constant<int, 1>{});
        }
    });
}

extern "C" void linear_int8(const float* x, const int8_t* codes, const float* scales, const float* bias, float* y,
                            int64_t count, int64_t keys, int64_t width, int64_t threads) {
    multiply(Int8{codes, scales}, x, bias, y, count, keys, width, threads);
}

extern "C" void linear_int4(const float* x, const uint8_t* codes, const bfloat16* scales, const bfloat16* offsets,
                            const float* bias, float* y, int64_t count, int64_t keys, int64_t width, int64_t threads) {
    multiply(Int4{codes, scales, offsets}, x, bias, y, count, keys, width, threads);
}
