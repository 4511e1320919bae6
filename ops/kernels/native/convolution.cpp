// Short causal convolution with one filter per channel, and its activation.
//
//     z_t = b + sum_j w_j x_{t-W+1+j}         y_t = z_t, or silu(z_t) = z_t sigmoid(z_t)
//
// Inputs and outputs are float32 or bfloat16, sums float32. A task copies CHUNK tokens of its channels, and the W - 1
// inputs before them, into a buffer of floats. WIDTH is W if W is a constant for the compiler, else 0.
#include "common.h"

constexpr int CHUNK = 32;

// The inputs of a sequence: the initial state, [W-1 D], and then tokens, which may have a stride.
template <class T>
struct Inputs {
    const T *x, *initial;
    int64_t stride, channels, past;
    vec at(int64_t start, int64_t t, int64_t channel, int n) const {  // t < 0: an input of the state
        if (t >= 0) return load(x + (start + t) * stride + channel, n);
        return initial ? load(initial + (past + t) * channels + channel, n) : vec{};
    }
};

// Fill a buffer [past + length, VECTORS] with the inputs of tokens first to first + length - 1, and those before them.
template <class T>
static void fill(std::vector<vec>& buffer, const Inputs<T>& inputs, const Task& task, int64_t start, int64_t first, int64_t length) {
    for (int64_t t = 0; t < inputs.past + length; t++)
        for (int i = 0; i < task.vectors; i++)
            buffer[t * VECTORS + i] = inputs.at(start, first - inputs.past + t, task.first + i * LANES, task.lanes[i]);
}

INLINE vec filtered(const vec* x, const vec* weight, int64_t width) {
    vec z = weight[width * VECTORS];  // the bias
    for (int64_t j = 0; j < width; j++) z += weight[j * VECTORS] * x[j * VECTORS];
    return z;
}

// The filters of a task, [W + 1, VECTORS]; the last row is the bias.
static std::vector<vec> filters(const float* weight, const float* bias, const Task& task, int64_t channels, int64_t width) {
    std::vector<vec> w((width + 1) * VECTORS);
    for (int i = 0; i < task.vectors; i++) {
        const int64_t channel = task.first + i * LANES;
        for (int64_t j = 0; j < width; j++) w[j * VECTORS + i] = load(weight + j * channels + channel, task.lanes[i]);
        if (bias) w[width * VECTORS + i] = load(bias + channel, task.lanes[i]);
    }
    return w;
}

template <class T, int WIDTH>
static void forward(const T* x, int64_t stride, const float* weight, const float* bias, const T* initial,
                    const int64_t* bounds, int64_t sequences, int64_t channels, int64_t any_width, int64_t silu,
                    T* output, T* final, int64_t threads) {
    const int64_t width = WIDTH ? WIDTH : any_width, past = width - 1;
    each(sequences * blocks(channels), threads, [&](int64_t number) {
        const Task task(number, channels);
        const std::vector<vec> w = filters(weight, bias, task, channels, width);
        std::vector<vec> buffer((past + CHUNK) * VECTORS);
        const int64_t start = bounds[task.sequence], length = bounds[task.sequence + 1] - start;
        const int64_t row = task.sequence * past * channels;
        const Inputs<T> inputs{x, initial ? initial + row : nullptr, stride, channels, past};
        for (int64_t first = 0; first < length; first += CHUNK) {
            const int64_t tokens = std::min<int64_t>(CHUNK, length - first);
            fill(buffer, inputs, task, start, first, tokens);
            for (int64_t t = 0; t < tokens; t++)
                for (int i = 0; i < task.vectors; i++) {
                    const vec z = filtered(&buffer[t * VECTORS + i], &w[i], width);
                    T* y = output + (start + first + t) * channels + task.first + i * LANES;
                    store(y, silu ? z / (1.0f + exp(-z)) : z, task.lanes[i]);
                }
        }
        for (int64_t t = 0; final && t < past; t++)
            for (int i = 0; i < task.vectors; i++) {
                const int64_t channel = task.first + i * LANES;
                store(final + row + t * channels + channel, inputs.at(start, length - past + t, channel, task.lanes[i]),
                      task.lanes[i]);
            }
    });
}

//     dz_t = dy_t, or dy_t sigmoid(z_t) (1 + z_t (1 - sigmoid(z_t)))
//     dx_t = sum_j w_j dz_{t+W-1-j}        dw_j = sum_t dz_t x_{t-W+1+j}        db = sum_t dz_t
//
// Sums over tokens have a partial sum per group of sequences, d_weight [groups W+1 D], whose last row is the bias's.
template <class T, int WIDTH>
static void backward(const T* x, int64_t stride, const float* weight, const float* bias, const T* initial,
                     const T* d_output, const T* d_final, const int64_t* bounds, int64_t sequences, int64_t groups,
                     int64_t channels, int64_t any_width, int64_t silu, T* d_x, double* d_weight, T* d_initial,
                     int64_t threads) {
    const int64_t width = WIDTH ? WIDTH : any_width, past = width - 1;
    each(groups * blocks(channels), threads, [&](int64_t number) {
        const Task task(number, channels);  // task.sequence is the index of a group
        const std::vector<vec> w = filters(weight, bias, task, channels, width);
        std::vector<vec> buffer((past + CHUNK) * VECTORS);
        std::vector<vec> dz((past + CHUNK) * VECTORS);  // dz of a chunk, and of the W - 1 tokens after it
        std::vector<vec> sums(width + 1);
        std::vector<wide> totals((width + 1) * VECTORS);
        for (int64_t s = task.sequence * sequences / groups; s < (task.sequence + 1) * sequences / groups; s++) {
            const int64_t start = bounds[s], length = bounds[s + 1] - start, row = s * past * channels;
            const Inputs<T> inputs{x, initial ? initial + row : nullptr, stride, channels, past};
            // the gradient of input t, which is one of the state if t < 0
            auto write = [&](int64_t t, int i, vec d) {
                const int64_t channel = task.first + i * LANES;
                const int n = task.lanes[i];
                if (d_final && t >= length - past) d += load(d_final + row + (t - length + past) * channels + channel, n);
                if (t >= 0)
                    store(d_x + (start + t) * channels + channel, d, n);
                else if (d_initial)
                    store(d_initial + row + (past + t) * channels + channel, d, n);
            };
            std::fill(dz.begin(), dz.end(), vec{});
            for (int64_t first = (length - 1) / CHUNK * CHUNK; length && first >= 0; first -= CHUNK) {
                const int64_t tokens = std::min<int64_t>(CHUNK, length - first);
                // the first rows are those of the chunk after this one
                std::copy_backward(dz.begin(), dz.begin() + past * VECTORS, dz.begin() + (past + tokens) * VECTORS);
                fill(buffer, inputs, task, start, first, tokens);
                for (int64_t t = 0; t < tokens; t++)
                    for (int i = 0; i < task.vectors; i++) {
                        const int64_t at = (start + first + t) * channels + task.first + i * LANES;
                        vec d = d_output ? load(d_output + at, task.lanes[i]) : vec{};
                        if (silu) {
                            const vec z = filtered(&buffer[t * VECTORS + i], &w[i], width);
                            const vec open = 1.0f / (1.0f + exp(-z));
                            d *= open * (1.0f + z * (1.0f - open));
                        }
                        dz[t * VECTORS + i] = d;
                    }
                for (int i = 0; i < task.vectors; i++) {
                    vec known[WIDTH + 1] = {};  // the sums of this chunk, in registers
                    if (!WIDTH) std::fill(sums.begin(), sums.end(), vec{});
                    vec* sum = WIDTH ? known : sums.data();
                    for (int64_t t = 0; t < tokens; t++) {
                        const vec* d = &dz[t * VECTORS + i];
                        vec dx = {};
                        for (int64_t j = 0; j < width; j++) {
                            sum[j] += d[0] * buffer[(t + j) * VECTORS + i];
                            dx += w[j * VECTORS + i] * d[(past - j) * VECTORS];
                        }
                        sum[width] += d[0];
                        write(first + t, i, dx);
                    }
                    for (int64_t j = 0; j <= width; j++)
                        totals[j * VECTORS + i] += __builtin_convertvector(sum[j], wide);
                }
            }
            for (int64_t t = -past; t < 0; t++)
                for (int i = 0; i < task.vectors; i++) {
                    vec d = {};
                    for (int64_t j = 0; j <= t + past; j++) d += w[j * VECTORS + i] * dz[(t + past - j) * VECTORS + i];
                    write(t, i, d);
                }
        }
        for (int64_t j = 0; j <= width; j++)
            for (int i = 0; i < task.vectors; i++)
                for (int lane = 0; lane < task.lanes[i]; lane++)
                    d_weight[(task.sequence * (width + 1) + j) * channels + task.first + i * LANES + lane] =
                        totals[j * VECTORS + i][lane];
    });
}

extern "C" void forward_float32(const float* x, int64_t stride, const float* weight, const float* bias,
                                const float* initial, const int64_t* bounds, int64_t sequences, int64_t channels,
                                int64_t width, int64_t silu, float* output, float* final, int64_t threads) {
    const auto run = width == 4 ? forward<float, 4> : forward<float, 0>;
    run(x, stride, weight, bias, initial, bounds, sequences, channels, width, silu, output, final, threads);
}
extern "C" void forward_bfloat16(const bfloat16* x, int64_t stride, const float* weight, const float* bias,
                                 const bfloat16* initial, const int64_t* bounds, int64_t sequences, int64_t channels,
                                 int64_t width, int64_t silu, bfloat16* output, bfloat16* final, int64_t threads) {
    const auto run = width == 4 ? forward<bfloat16, 4> : forward<bfloat16, 0>;
    run(x, stride, weight, bias, initial, bounds, sequences, channels, width, silu, output, final, threads);
}
extern "C" void backward_float32(const float* x, int64_t stride, const float* weight, const float* bias,
                                 const float* initial, const float* d_output, const float* d_final,
                                 const int64_t* bounds, int64_t sequences, int64_t groups, int64_t channels,
                                 int64_t width, int64_t silu, float* d_x, double* d_weight, float* d_initial,
                                 int64_t threads) {
    const auto run = width == 4 ? backward<float, 4> : backward<float, 0>;
    run(x, stride, weight, bias, initial, d_output, d_final, bounds, sequences, groups, channels, width, silu, d_x,
        d_weight, d_initial, threads);
}
extern "C" void backward_bfloat16(const bfloat16* x, int64_t stride, const float* weight, const float* bias,
                                  const bfloat16* initial, const bfloat16* d_output, const bfloat16* d_final,
                                  const int64_t* bounds, int64_t sequences, int64_t groups, int64_t channels,
                                  int64_t width, int64_t silu, bfloat16* d_x, double* d_weight, bfloat16* d_initial,
                                  int64_t threads) {
    const auto run = width == 4 ? backward<bfloat16, 4> : backward<bfloat16, 0>;
    run(x, stride, weight, bias, initial, d_output, d_final, bounds, sequences, groups, channels, width, silu, d_x,
        d_weight, d_initial, threads);
}
