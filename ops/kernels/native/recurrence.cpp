// Recurrences with a matrix state per head, token by token (notation of ops/recurrence/family.py).
//
//     P_t = diag(exp(g_t)) S_{t-1}                     r_t = P_t^T a_t             o_t = scale S_t^T q_t
//     ADD        S_t = P_t + k_t v_t^T                                             ops/decay
//     REPLACE    S_t = P_t + k_t e_t^T,  e_t = v_t - r_t                           ops/delta (k has the factor beta,
//                                                                                  a is k), ops/dplr without b
//     MOVE       S_t = P_t + k_t v_t^T + b_t r_t^T                                 ops/dplr with b
//
// Decays cost nothing per element of a state, because a state is held as S = diag(exp(G)) M, with G the sum of the
// log-decays since M was last rescaled: keys that write are divided by exp(G), keys that read are multiplied by it. When a G leaves
// [-LIMIT, LIMIT], M is multiplied by exp(G), and G is 0. As exp(G) is computed anew for every token, the rounding of
// slow decays does not add up over many tokens.
//
// The columns of a state are independent of each other in `scan_forward` and `scan_reverse`, its rows in `scan_rows`:
// each loop carries several of them in vectors.
#include "common.h"

constexpr int64_t TOKENS = 64;   // tokens of a block: the states before blocks are saved
constexpr int64_t ROWS = 16;     // rows of a state that `scan_rows` carries together
constexpr int TILE = ROWS / LANES;
constexpr int64_t COLUMNS = 4 * LANES;  // maximum number of columns that the other scans carry together
constexpr float LIMIT = 8;

enum Rule { ADD, REPLACE, MOVE };

struct Tensor {                  // contiguous, [tokens H *]; data is null if the call has no such tensor
    void* data;
    bool is_bfloat16 = false;
};

INLINE float* floats(const Tensor& x, int64_t at) { return static_cast<float*>(x.data) + at; }
INLINE vec load(const Tensor& x, int64_t at, int n) {
    return x.is_bfloat16 ? load(static_cast<bfloat16*>(x.data) + at, n) : load(floats(x, at), n);
}
INLINE void store(const Tensor& x, int64_t at, vec value, int n) {
    if (x.is_bfloat16)
        store(static_cast<bfloat16*>(x.data) + at, value, n);
    else
        store(floats(x, at), value, n);
}

// Fetch n elements that are read a few tokens later: the rows of a head are too far apart for the processor to foresee.
INLINE void prefetch(const Tensor& x, int64_t at, int64_t n) {
    const char* p = static_cast<const char*>(x.data) + at * (x.is_bfloat16 ? 2 : 4);
    for (int64_t i = 0; i < n * (x.is_bfloat16 ? 2 : 4); i += 64) __builtin_prefetch(p + i);
}
constexpr int64_t AHEAD = 8;     // tokens

struct Call {
    Rule rule;
    Tensor q, k, v, a, b;        // q and k have `key_heads` heads, which several heads may share; a is k in ops/delta
    const float *beta, *decay;   // [tokens H], and log-decays [tokens H] or [tokens H K]; null if there are none
    int64_t decays_per_key;      // 1 for log-decays per key, else 0
    double scale;
    const int64_t* bounds;       // tokens of sequence n: bounds[n] to bounds[n + 1]
    int64_t sequences, heads, key_heads, keys, values;
    float* state;                // initial state, or backwards the gradient of the final state [N H K V]; null is zero
    float* final_state;          // final state, or backwards the gradient of the initial state; null if not wanted
    Tensor output;               // o, or backwards its gradient as float32
    Tensor reads;                // REPLACE: e, MOVE: r; float32 [tokens H V]
    float* entries;              // states before the blocks [blocks H K V]
    int64_t threads;
    // backwards only
    Tensor written;              // what k writes, float32: e for REPLACE, else v
    Tensor d_values, d_reads;    // gradients of v and r, float32; for REPLACE, d_reads is d_values, which is -dr
    Tensor d_q, d_k, d_a, d_b;   // [tokens H K], q and k as float32 if heads share them; d_a is absent if a is k
    float *d_decay, *d_beta;     // as decay and beta, but with ceil(K / ROWS) parts of a sum in place of one number

    int64_t row(int64_t token, int64_t head) const { return token * heads + head; }
    int64_t key_row(int64_t token, int64_t head) const { return token * key_heads + head * key_heads / heads; }
    float beta_at(int64_t row) const { return beta ? beta[row] : 1.0f; }
    float* state_at(float* states, int64_t index, int64_t head) const {
        return states ? states + (index * heads + head) * keys * values : nullptr;
    }
    int64_t parts() const { return (keys + ROWS - 1) / ROWS; }
};

struct Place {                   // a head of a sequence
    int64_t sequence, head, start, stop, first_entry;
    Place(const Call& x, int64_t number) {
        sequence = number / x.heads, head = number % x.heads;
        start = x.bounds[sequence], stop = x.bounds[sequence + 1];
        first_entry = start / TOKENS + sequence;
    }
    int64_t stop_entry() const { return stop / TOKENS + sequence + 1; }  // may be beyond the entry after the last block
    int64_t blocks() const { return (stop - start + TOKENS - 1) / TOKENS; }
};

struct Block {
    int64_t start, stop;         // tokens
    Block(const Place& at, int64_t number) {
        start = at.start + number * TOKENS;
        stop = std::min(start + TOKENS, at.stop);
    }
};

// ---- keys as factors of M

struct Decay {                   // G, as a sum of two floats, and exp(G) of all keys
    std::vector<vec> high, low, factors, inverses;

    explicit Decay(int64_t vectors) : high(vectors), low(vectors), factors(vectors), inverses(vectors) { reset(); }

    void reset() {
        for (auto* sum : {&high, &low}) std::fill(sum->begin(), sum->end(), vec{});
        for (auto* factor : {&factors, &inverses}) std::fill(factor->begin(), factor->end(), splat(1));
    }

    // Add the log-decays of a token. True if M has to be rescaled.
    bool add(const Call& x, int64_t row) {
        if (!x.decay) return false;
        ivec beyond = {};
        const int64_t vectors = high.size(), distinct = x.decays_per_key ? vectors : 1;
        for (int64_t i = 0; i < distinct; i++) {
            vec log_decay = splat(x.decay[x.decays_per_key ? 0 : row]);
            if (x.decays_per_key) log_decay = load(x.decay + row * x.keys + i * LANES, lanes(x.keys, i));
            log_decay = log_decay < -200.0f ? splat(-200) : log_decay;  // exp is 0; differences of infinities are NaN
            const vec sum = high[i] + log_decay, added = sum - high[i];
            low[i] += (high[i] - (sum - added)) + (log_decay - added);  // what the sum has lost by rounding
            high[i] = sum;
            const vec factor = exp(sum);
            factors[i] = factor + factor * low[i];
            inverses[i] = 1.0f / factors[i];
            beyond |= ~((sum >= -LIMIT) & (sum <= LIMIT));
        }
        for (int64_t i = distinct; i < vectors; i++) factors[i] = factors[0], inverses[i] = inverses[0];
        bool any = false;
        for (int lane = 0; lane < LANES; lane++) any |= beyond[lane] != 0;
        return any;
    }
};

struct Keys {
    const Call& x;
    int64_t vectors;             // vectors of a key; a whole number of tiles
    Decay decay;
    std::vector<vec> a, k, b, q; // [TOKENS vectors] each, zero beyond K
    std::vector<vec> factors;    // exp(G) where k, b and q are used
    std::vector<vec> rescaling;  // factors of M
    bool rescales[TOKENS];

    Keys(const Call& x, int64_t longest)
        : x(x), vectors((x.keys + ROWS - 1) / ROWS * TILE), decay(vectors) {
        const int64_t size = (std::min(longest, TOKENS) + 1) * vectors;
        for (auto* buffer : {&a, &k, &q, &factors, &rescaling}) buffer->resize(size);
        if (x.rule == MOVE) b.resize(size);
    }
    const float* at(const std::vector<vec>& buffer, int64_t t) const {
        return reinterpret_cast<const float*>(buffer.data() + t * vectors);
    }
};

// a is the factor of M before a token's rescaling, the others after it. a has one more row, of zeros.
struct ForwardKeys : Keys {
    using Keys::Keys;
    void compute(const Place& place, const Block& block) {
        for (int64_t token = block.start; token < block.stop; token++) {
            const int64_t t = token - block.start;
            const int64_t row = x.row(token, place.head), key_row = x.key_row(token, place.head);
            const int64_t later = x.key_row(token + AHEAD, place.head) * x.keys;
            prefetch(x.q, later, x.keys), prefetch(x.k, later, x.keys);
            rescales[t] = decay.add(x, row);
            for (int64_t i = 0; x.rule != ADD && i < vectors; i++)
                a[t * vectors + i] = load(x.a, row * x.keys + i * LANES, lanes(x.keys, i)) * decay.factors[i];
            if (rescales[t]) {
                std::copy(decay.factors.begin(), decay.factors.end(), rescaling.begin() + t * vectors);
                decay.reset();
            }
            const float beta = x.beta_at(row), scale = float(x.scale);
            for (int64_t i = 0; i < vectors; i++) {
                const int64_t at = key_row * x.keys + i * LANES, to = t * vectors + i;
                const int n = lanes(x.keys, i);
                k[to] = beta * load(x.k, at, n) * decay.inverses[i];
                q[to] = scale * load(x.q, at, n) * decay.factors[i];
                if (x.rule == MOVE) b[to] = load(x.b, at, n) * decay.inverses[i];
                factors[to] = decay.factors[i];
            }
        }
        std::fill_n(a.begin() + (block.stop - block.start) * vectors, vectors, vec{});
    }
};

// All are factors of dM before a token's rescaling, except `rescaled`. a has a minus sign where d_reads is -dr.
struct ReverseKeys : Keys {
    std::vector<vec> rescaled;   // a after a token's rescaling
    ReverseKeys(const Call& x, int64_t longest) : Keys(x, longest), rescaled(a.size()) {}
    void compute(const Place& place, const Block& block) {
        for (int64_t token = block.stop - 1; token >= block.start; token--) {
            const int64_t t = token - block.start;
            const int64_t row = x.row(token, place.head), key_row = x.key_row(token, place.head);
            const int64_t later = x.key_row(token - AHEAD, place.head) * x.keys;
            prefetch(x.q, later, x.keys), prefetch(x.k, later, x.keys);
            const float beta = x.beta_at(row), scale = float(x.scale), sign = x.rule == MOVE ? 1.0f : -1.0f;
            for (int64_t i = 0; i < vectors; i++) {
                const int64_t at = key_row * x.keys + i * LANES, to = t * vectors + i;
                const int n = lanes(x.keys, i);
                k[to] = beta * load(x.k, at, n) * decay.factors[i];
                q[to] = scale * load(x.q, at, n) * decay.inverses[i];
                if (x.rule != ADD) a[to] = rescaled[to] = sign * load(x.a, at, n) * decay.inverses[i];
                if (x.rule == MOVE) b[to] = load(x.b, at, n) * decay.factors[i];
                factors[to] = decay.factors[i];
            }
            rescales[t] = decay.add(x, row);
            if (rescales[t]) {
                std::copy(decay.factors.begin(), decay.factors.end(), rescaling.begin() + t * vectors);
                for (int64_t i = 0; i < vectors; i++) rescaled[t * vectors + i] *= decay.factors[i];
                decay.reset();
            }
        }
    }
};

// ---- scans of N vectors of columns of M, [K N]

template <int N> struct Columns {
    vec at[N];
};
template <int N> static Columns<N> load_columns(const Tensor& x, int64_t at, int64_t n) {
    Columns<N> out;
    for (int i = 0; i < N; i++) out.at[i] = load(x, at + i * LANES, lanes(n, i));
    return out;
}
template <int N> static void store_columns(const Tensor& x, int64_t at, const Columns<N>& in, int64_t n) {
    for (int i = 0; i < N; i++) store(x, at + i * LANES, in.at[i], lanes(n, i));
}

template <int N> struct Write {
    const float* key;
    const Columns<N>* columns;
};
template <int N> struct Read {
    const float* key;
    Columns<N>* columns;
};

// Add outer products of keys and columns to M, and read the result with other keys: one pass over M.
template <int N, int W, int R> INLINE void pass(vec* m, int64_t keys, Write<N> (&&writes)[W], Read<N> (&&reads)[R]) {
    vec written[W][N], read[R][N];
    for (int j = 0; j < W; j++) std::copy_n(writes[j].columns->at, N, written[j]);
    for (int j = 0; j < R; j++) std::fill_n(read[j], N, vec{});
    for (int64_t k = 0; k < keys; k++, m += N)
        for (int i = 0; i < N; i++) {
            vec x = m[i];
            for (int j = 0; j < W; j++) x += writes[j].key[k] * written[j][i];
            m[i] = x;
            for (int j = 0; j < R; j++) read[j][i] += reads[j].key[k] * x;
        }
    for (int j = 0; j < R; j++) std::copy_n(read[j], N, reads[j].columns->at);
}

template <int N> static void rescale(vec* m, int64_t keys, const float* factors) {
    for (int64_t k = 0; k < keys; k++)
        for (int i = 0; i < N; i++) m[k * N + i] *= factors[k];
}

// Each pass writes a token, answers its query, and reads what the next token predicts.
template <int N>
static void scan_forward(const ForwardKeys& keys, const Place& place, const Block& block, int64_t first, vec* m) {
    const Call& x = keys.x;
    const int64_t n = x.values - first;
    Columns<N> read = {}, output;
    const Write<N> nothing = {keys.at(keys.a, 0), &read};
    if (x.rule != ADD) pass<N>(m, x.keys, {nothing}, {Read<N>{keys.at(keys.a, 0), &read}});
    for (int64_t token = block.start; token < block.stop; token++) {
        const int64_t t = token - block.start, at = x.row(token, place.head) * x.values + first;
        if (keys.rescales[t]) rescale<N>(m, x.keys, keys.at(keys.rescaling, t));
        prefetch(x.v, at + AHEAD * x.heads * x.values, std::min<int64_t>(n, N * LANES));
        const Columns<N> value = load_columns<N>(x.v, at, n);
        Columns<N> saved = read;
        for (int i = 0; i < N && x.rule == REPLACE; i++) saved.at[i] = value.at[i] - read.at[i];
        if (x.reads.data) store_columns(x.reads, at, saved, n);
        const Read<N> query = {keys.at(keys.q, t), &output}, next = {keys.at(keys.a, t + 1), &read};
        const Write<N> write = {keys.at(keys.k, t), x.rule == REPLACE ? &saved : &value};
        if (x.rule == ADD)
            pass<N>(m, x.keys, {write}, {query});
        else if (x.rule == REPLACE)
            pass<N>(m, x.keys, {write}, {query, next});
        else
            pass<N>(m, x.keys, {write, {keys.at(keys.b, t), &saved}}, {query, next});
        store_columns(x.output, at, output, n);
    }
}

//     dS_t = exp(g_{t+1}) dP_{t+1} + scale q_t do_t^T          dP_t = dS_t + a_t dr_t^T (ADD: dS_t)
//     dv_t = dS_t^T k_t           REPLACE: dr_t = -dv_t        MOVE: dr_t = dS_t^T b_t
template <int N>
static void scan_reverse(const ReverseKeys& keys, const Place& place, const Block& block, int64_t first, vec* m) {
    const Call& x = keys.x;
    const int64_t n = x.values - first;
    Columns<N> d_read = {}, d_value;
    Columns<N>* const later_read = x.rule == MOVE ? &d_read : &d_value;
    Write<N> later = {keys.at(keys.q, 0), &d_read};  // what the token after this one read; zero at first
    for (int64_t token = block.stop - 1; token >= block.start; token--) {
        const int64_t t = token - block.start, at = x.row(token, place.head) * x.values + first;
        prefetch(x.output, at - AHEAD * x.heads * x.values, std::min<int64_t>(n, N * LANES));
        const Columns<N> d_output = load_columns<N>(x.output, at, n);
        const Write<N> query = {keys.at(keys.q, t), &d_output};
        const Read<N> value = {keys.at(keys.k, t), &d_value};
        if (x.rule == ADD)
            pass<N>(m, x.keys, {query}, {value});
        else if (x.rule == REPLACE)
            pass<N>(m, x.keys, {later, query}, {value});
        else
            pass<N>(m, x.keys, {later, query}, {value, {keys.at(keys.b, t), &d_read}});
        store_columns(x.d_values, at, d_value, n);
        if (x.rule == MOVE) store_columns(x.d_reads, at, d_read, n);
        if (keys.rescales[t]) rescale<N>(m, x.keys, keys.at(keys.rescaling, t));
        later = {keys.at(keys.rescaled, t), later_read};
    }
    if (x.rule != ADD) pass<N>(m, x.keys, {later}, {Read<N>{later.key, &d_value}});
}

// M of the columns `from` to `to`, in groups of 4, 2 or 1 vectors; the last group may be wider by one vector.
struct Matrix {
    const Call& x;
    int64_t from, to;
    std::vector<vec> data;

    Matrix(const Call& x, int64_t from, int64_t to)
        : x(x), from(from), to(to), data(x.keys * ((to - from + LANES - 1) / LANES + 1)) {}

    template <class F> void each_group(const F& f) {
        vec* group = data.data();
        for (int64_t first = from; first < to;) {
            const int64_t left = to - first;
            const auto run = [&](auto n) {
                f(n, first, group);
                group += n * x.keys;
                first += n * LANES;
            };
            if (left > 2 * LANES) run(std::integral_constant<int, 4>{});
            else if (left > LANES) run(std::integral_constant<int, 2>{});
            else run(std::integral_constant<int, 1>{});
        }
    }
    void read(const float* states) {
        if (!states) return;  // zero
        each_group([&](auto n, int64_t first, vec* m) {
            for (int64_t k = 0; k < x.keys; k++)
                for (int i = 0; i < n; i++)
                    m[k * n + i] = load(states + k * x.values + first + i * LANES, lanes(x.values - first, i));
        });
    }
    void write(float* states, const Keys& keys) {
        if (!states) return;
        const float* factors = reinterpret_cast<const float*>(keys.decay.factors.data());
        each_group([&](auto n, int64_t first, vec* m) {
            for (int64_t k = 0; k < x.keys; k++)
                for (int i = 0; i < n; i++) {
                    float* to = states + k * x.values + first + i * LANES;
                    store(to, factors[k] * m[k * n + i], lanes(x.values - first, i));
                }
        });
    }
};

static void forward_columns(const Call& x, const Place& place, int64_t from, int64_t to) {
    ForwardKeys keys(x, place.stop - place.start);
    Matrix matrix(x, from, to);
    matrix.read(x.state_at(x.state, place.sequence, place.head));
    for (int64_t number = 0; number < place.blocks(); number++) {
        const Block block(place, number);
        matrix.write(x.state_at(x.entries, place.first_entry + number, place.head), keys);
        keys.compute(place, block);
        matrix.each_group([&](auto n, int64_t first, vec* m) { scan_forward<n>(keys, place, block, first, m); });
    }
    matrix.write(x.state_at(x.final_state, place.sequence, place.head), keys);
    for (int64_t entry = place.first_entry + place.blocks(); x.entries && entry < place.stop_entry(); entry++)
        for (int64_t k = 0; k < x.keys; k++)
            std::fill_n(x.state_at(x.entries, entry, place.head) + k * x.values + from, to - from, 0.0f);
}

static void reverse_columns(const Call& x, const Place& place, int64_t from, int64_t to) {
    ReverseKeys keys(x, place.stop - place.start);
    Matrix matrix(x, from, to);
    matrix.read(x.state_at(x.state, place.sequence, place.head));
    for (int64_t number = place.blocks() - 1; number >= 0; number--) {
        const Block block(place, number);
        keys.compute(place, block);
        matrix.each_group([&](auto n, int64_t first, vec* m) { scan_reverse<n>(keys, place, block, first, m); });
    }
    matrix.write(x.state_at(x.final_state, place.sequence, place.head), keys);
}

// ---- scan of ROWS rows of M and dM, [V TILE], forwards and backwards through a block

struct Tile {
    vec at[TILE];
};

INLINE Tile tile_at(const float* key) {
    Tile out;
    for (int i = 0; i < TILE; i++) out.at[i] = load(key + i * LANES);
    return out;
}
INLINE Tile load_tile(const Tensor& x, int64_t at, int64_t n) {
    Tile out;
    for (int i = 0; i < TILE; i++) out.at[i] = load(x, at + i * LANES, lanes(n, i));
    return out;
}
INLINE void store_tile(const Tensor& x, int64_t at, const Tile& in, int64_t n) {
    for (int i = 0; i < TILE; i++) store(x, at + i * LANES, in.at[i], lanes(n, i));
}
INLINE Tile operator*(Tile x, const Tile& y) {
    for (int i = 0; i < TILE; i++) x.at[i] *= y.at[i];
    return x;
}
INLINE Tile operator*(float x, Tile y) {
    for (int i = 0; i < TILE; i++) y.at[i] *= x;
    return y;
}
INLINE Tile operator+(Tile x, const Tile& y) {
    for (int i = 0; i < TILE; i++) x.at[i] += y.at[i];
    return x;
}
INLINE float sum(const Tile& x) {
    float total = 0;
    for (int i = 0; i < TILE; i++) total += sum(x.at[i]);
    return total;
}

static void read_rows(Tile* tile, const float* states, int64_t first, const Call& x) {
    float* to = reinterpret_cast<float*>(tile);
    std::fill_n(to, x.values * ROWS, 0.0f);
    for (int64_t k = 0; states && k < std::min(ROWS, x.keys - first); k++)
        for (int64_t v = 0; v < x.values; v++) to[v * ROWS + k] = states[(first + k) * x.values + v];
}

// The same rows of all keys of a token.
struct Rows {
    const Keys& keys;
    int64_t first;               // the first row
    Tile at(const std::vector<vec>& buffer, int64_t t) const { return tile_at(keys.at(buffer, t) + first); }

    void rescale(Tile* m, int64_t t) const {
        if (!keys.rescales[t]) return;
        const Tile factors = at(keys.rescaling, t);
        for (int64_t v = 0; v < keys.x.values; v++) m[v] = m[v] * factors;
    }
};

// S_t from P_t
template <Rule rule>
static void write_rows(const Rows& rows, int64_t t, int64_t row, const Tile* decayed, Tile* state) {
    const Call& x = rows.keys.x;
    const int64_t at = row * x.values;
    const Tile k = rows.at(rows.keys.k, t), b = rule == MOVE ? rows.at(rows.keys.b, t) : k;
    const float *written = floats(x.written, at), *reads = floats(x.reads, at);
    for (int64_t v = 0; v < x.values; v++)
        for (int i = 0; i < TILE; i++) {
            vec m = decayed[v].at[i] + written[v] * k.at[i];
            if (rule == MOVE) m += reads[v] * b.at[i];
            state[v].at[i] = m;
        }
}

//     dq_t = scale S_t do_t      dk_t = dS_t v_t (REPLACE: dS_t e_t, which is also dbeta_t times k_t)
//     da_t = P_t dr_t            db_t = dS_t r_t           dg_t = row sums of P_t * dP_t
//
// d_state is dS_t without the part of the output, and becomes dP_t. S_t do_t is computed as
// P_t do_t + k_t <v_t, do_t> + b_t <r_t, do_t> (REPLACE: with e in place of v; without b).
template <Rule rule>
static void gradients_of_token(const Rows& rows, const Rows& d_rows, const Place& place, int64_t token, int64_t t,
                               const Tile* decayed, Tile* d_state) {
    const Call& x = rows.keys.x;
    const int64_t V = x.values, n = x.keys - rows.first;
    const int64_t row = x.row(token, place.head), at = row * V;
    const float *written = floats(x.written, at), *reads = floats(x.reads, at);
    const float *d_output = floats(x.output, at), *d_reads = floats(x.d_reads, at);
    const Tile d_query = d_rows.at(d_rows.keys.q, t), d_read = d_rows.at(d_rows.keys.a, t);
    vec sum_q[TILE] = {}, sum_a[TILE] = {}, sum_k[TILE] = {}, sum_b[TILE] = {}, sum_decay[TILE] = {};
    for (int64_t v = 0; v < V; v++)
        for (int i = 0; i < TILE; i++) {
            const vec m = decayed[v].at[i];
            vec d = d_state[v].at[i] + d_output[v] * d_query.at[i];
            sum_q[i] += d_output[v] * m;
            sum_k[i] += written[v] * d;
            if (rule == MOVE) sum_b[i] += reads[v] * d;
            if (rule != ADD) {
                sum_a[i] += d_reads[v] * m;
                d += d_reads[v] * d_read.at[i];
            }
            sum_decay[i] += m * d;
            d_state[v].at[i] = d;
        }
    Tile d_q, d_a, d_k, d_b, d_decay;
    for (int i = 0; i < TILE; i++) {
        d_q.at[i] = sum_q[i], d_a.at[i] = sum_a[i], d_k.at[i] = sum_k[i], d_b.at[i] = sum_b[i];
        d_decay.at[i] = sum_decay[i];
    }
    const Tile factors = rows.at(rows.keys.factors, t), d_factors = d_rows.at(d_rows.keys.factors, t);
    const int64_t to = row * x.keys + rows.first, part = row * x.parts() + rows.first / ROWS;
    const float beta = x.beta_at(row);
    const Tile k = load_tile(x.k, x.key_row(token, place.head) * x.keys + rows.first, n);
    d_q = d_q * factors + beta * dot(written, d_output, V) * k;
    if (rule == MOVE) d_q = d_q + dot(reads, d_output, V) * load_tile(x.b, to, n);
    store_tile(x.d_q, to, float(x.scale) * d_q, n);
    d_k = d_k * d_factors;
    if (x.d_beta) x.d_beta[part] = sum(d_k * k);
    d_k = beta * d_k;
    d_a = (rule == MOVE ? 1.0f : -1.0f) * (d_a * factors);
    if (x.d_a.data) store_tile(x.d_a, to, d_a, n);
    store_tile(x.d_k, to, rule == REPLACE && !x.d_a.data ? d_k + d_a : d_k, n);
    if (rule == MOVE) store_tile(x.d_b, to, d_b * d_factors, n);
    d_decay = d_decay * factors * d_factors;
    if (x.d_decay && x.decays_per_key) store_tile({x.d_decay}, to, d_decay, n);
    else if (x.d_decay) x.d_decay[part] = sum(d_decay);
}

// `states` begins with the state before the block, and gets P of all tokens.
template <Rule rule>
static void scan_rows(const Rows& rows, const Rows& d_rows, const Place& place, const Block& block, Tile* states,
                      Tile* d_state) {
    const Call& x = rows.keys.x;
    const int64_t V = x.values, length = block.stop - block.start, first = x.row(block.start, place.head);
    for (int64_t t = 0; t < length; t++) {
        rows.rescale(states + t * V, t);
        if (t + 1 < length) write_rows<rule>(rows, t, first + t * x.heads, states + t * V, states + (t + 1) * V);
    }
    for (int64_t t = length - 1; t >= 0; t--) {
        gradients_of_token<rule>(rows, d_rows, place, block.start + t, t, states + t * V, d_state);
        d_rows.rescale(d_state, t);
    }
}

static void gradients_of_rows(const Call& x, const Place& place, int64_t from, int64_t to) {
    ForwardKeys keys(x, place.stop - place.start);
    ReverseKeys d_keys(x, place.stop - place.start);
    std::vector<Tile> states(std::min(place.stop - place.start, TOKENS) * x.values);
    std::vector<Tile> d_states((to - from) / ROWS * x.values);
    const auto d_state = [&](int64_t first) { return d_states.data() + (first - from) / ROWS * x.values; };
    for (int64_t first = from; first < to; first += ROWS)
        read_rows(d_state(first), x.state_at(x.state, place.sequence, place.head), first, x);
    for (int64_t number = place.blocks() - 1; number >= 0; number--) {
        const Block block(place, number);
        keys.decay.reset();
        keys.compute(place, block);
        d_keys.compute(place, block);
        for (int64_t first = from; first < to; first += ROWS) {
            read_rows(states.data(), x.state_at(x.entries, place.first_entry + number, place.head), first, x);
            const auto scan = x.rule == ADD ? scan_rows<ADD> : x.rule == REPLACE ? scan_rows<REPLACE> : scan_rows<MOVE>;
            scan({keys, first}, {d_keys, first}, place, block, states.data(), d_state(first));
        }
    }
}

// o_t = scale S_t u_t of queries u_t along the values (ADD); `output` holds u, as it holds do_t of dq_t = scale S_t do_t.
static void read_values(const Rows& rows, const Place& place, const Block& block, Tile* m) {
    constexpr int CHAINS = 4;    // sums that do not wait for each other
    const Call& x = rows.keys.x;
    for (int64_t token = block.start; token < block.stop; token++) {
        const int64_t t = token - block.start, row = x.row(token, place.head), at = row * x.values;
        rows.rescale(m, t);
        prefetch(x.written, at + AHEAD * x.heads * x.values, x.values);
        prefetch(x.output, at + AHEAD * x.heads * x.values, x.values);
        const Tile k = rows.at(rows.keys.k, t);
        const float *written = floats(x.written, at), *query = floats(x.output, at);
        Tile sums[CHAINS] = {};
        const auto pass = [&](int64_t v, Tile& sum) {
            for (int i = 0; i < TILE; i++) {
                m[v].at[i] += written[v] * k.at[i];
                sum.at[i] += query[v] * m[v].at[i];
            }
        };
        int64_t v = 0;
        for (; v + CHAINS <= x.values; v += CHAINS)
            for (int j = 0; j < CHAINS; j++) pass(v + j, sums[j]);
        for (; v < x.values; v++) pass(v, sums[0]);
        const Tile sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        store_tile(x.d_q, row * x.keys + rows.first, float(x.scale) * (sum * rows.at(rows.keys.factors, t)),
                   x.keys - rows.first);
    }
}

static void write_rows_of_state(const Rows& rows, const Tile* m, float* states) {
    const Call& x = rows.keys.x;
    const float* factors = reinterpret_cast<const float*>(rows.keys.decay.factors.data()) + rows.first;
    const float* from = reinterpret_cast<const float*>(m);
    for (int64_t k = 0; states && k < std::min(ROWS, x.keys - rows.first); k++)
        for (int64_t v = 0; v < x.values; v++) states[(rows.first + k) * x.values + v] = factors[k] * from[v * ROWS + k];
}

static void rows_reading_values(const Call& x, const Place& place, int64_t from, int64_t to) {
    ForwardKeys keys(x, place.stop - place.start);
    std::vector<Tile> states((to - from) / ROWS * x.values);
    const auto each_tile = [&](const auto& f) {
        for (int64_t first = from; first < to; first += ROWS)
            f(Rows{keys, first}, states.data() + (first - from) / ROWS * x.values);
    };
    each_tile([&](const Rows& rows, Tile* m) {
        read_rows(m, x.state_at(x.state, place.sequence, place.head), rows.first, x);
    });
    for (int64_t number = 0; number < place.blocks(); number++) {
        const Block block(place, number);
        keys.compute(place, block);
        each_tile([&](const Rows& rows, Tile* m) { read_values(rows, place, block, m); });
    }
    each_tile([&](const Rows& rows, Tile* m) {
        write_rows_of_state(rows, m, x.state_at(x.final_state, place.sequence, place.head));
    });
}

// Run f(x, place, from, to) for all heads of all sequences. If there are more threads than heads, the columns or rows 0
// to `size` are divided too, into multiples of `unit`; results do not depend on the division.
template <class F> static void each_head(const Call& x, int64_t size, int64_t unit, const F& f) {
    const int64_t places = x.sequences * x.heads, units = (size + unit - 1) / unit;
    if (places == 0) return;
    const int64_t divisions = std::max<int64_t>(std::min((x.threads + places - 1) / places, units), 1);
    const int64_t part = (units + divisions - 1) / divisions * unit;
    each(places * divisions, x.threads, [&](int64_t number) {
        const int64_t from = number % divisions * part;
        if (from < size) f(x, Place(x, number / divisions), from, std::min(from + part, size));
    });
}

extern "C" void recurrence_forward(int64_t rule, void* q, void* k, void* v, void* a, void* b, const float* beta,
                                   const float* decay, int64_t is_bfloat16, int64_t decays_per_key, double scale,
                                   const int64_t* bounds, int64_t sequences, int64_t key_heads, int64_t heads,
                                   int64_t keys, int64_t values, float* initial, void* output, int64_t is_wide,
                                   float* final, float* entries, float* reads, int64_t threads) {
    const auto typed = [&](void* data) { return Tensor{data, is_bfloat16 != 0}; };
    Call x = {};
    x.rule = Rule(rule), x.q = typed(q), x.k = typed(k), x.v = typed(v), x.a = typed(a), x.b = typed(b);
    x.beta = beta, x.decay = decay, x.decays_per_key = decays_per_key, x.scale = scale;
    x.bounds = bounds, x.sequences = sequences, x.key_heads = key_heads, x.heads = heads;
    x.keys = keys, x.values = values;
    x.state = initial, x.final_state = final, x.output = {output, is_bfloat16 && !is_wide}, x.reads = {reads};
    x.entries = entries, x.threads = threads;
    each_head(x, x.values, COLUMNS, forward_columns);
}

extern "C" void recurrence_backward(int64_t rule, void* q, void* k, void* a, void* b, const float* beta,
                                    const float* decay, int64_t is_bfloat16, int64_t decays_per_key, double scale,
                                    const int64_t* bounds, int64_t sequences, int64_t key_heads, int64_t heads,
                                    int64_t keys, int64_t values, float* written, float* entries, float* reads,
                                    float* d_output, float* d_final, void* d_q, void* d_k, void* d_a, void* d_b,
                                    float* d_beta, float* d_decay, float* d_initial, float* d_values, float* d_reads,
                                    int64_t threads) {
    const auto typed = [&](void* data) { return Tensor{data, is_bfloat16 != 0}; };
    Call x = {};
    x.rule = Rule(rule), x.q = typed(q), x.k = typed(k), x.a = typed(a), x.b = typed(b);
    x.beta = beta, x.decay = decay, x.decays_per_key = decays_per_key, x.scale = scale;
    x.bounds = bounds, x.sequences = sequences, x.key_heads = key_heads, x.heads = heads;
    x.keys = keys, x.values = values;
    x.state = d_final, x.final_state = d_initial, x.output = {d_output}, x.reads = {reads}, x.entries = entries;
    x.written = {written}, x.d_values = {d_values}, x.d_reads = {d_reads};
    x.d_q = {d_q, is_bfloat16 && key_heads == heads}, x.d_k = {d_k, x.d_q.is_bfloat16};
    x.d_a = typed(d_a), x.d_b = typed(d_b);
    x.d_beta = d_beta, x.d_decay = d_decay, x.threads = threads;
    each_head(x, x.values, COLUMNS, reverse_columns);
    each_head(x, (x.keys + ROWS - 1) / ROWS * ROWS, ROWS, gradients_of_rows);
}

// ADD with queries along the values, [tokens H V] as float32: `output` is [tokens H K].
extern "C" void recurrence_reading_values(void* k, const float* decay, int64_t is_bfloat16, int64_t decays_per_key,
                                          double scale, const int64_t* bounds, int64_t sequences, int64_t heads,
                                          int64_t keys, int64_t values, float* query, float* value, float* initial,
                                          void* output, float* final, int64_t threads) {
    Call x = {};
    x.rule = ADD, x.k = {k, is_bfloat16 != 0}, x.q = x.k;  // the queries along the keys are not used
    x.decay = decay, x.decays_per_key = decays_per_key, x.scale = scale;
    x.bounds = bounds, x.sequences = sequences, x.key_heads = heads, x.heads = heads;
    x.keys = keys, x.values = values, x.state = initial, x.final_state = final;
    x.output = {query}, x.written = {value}, x.d_q = {output, is_bfloat16 != 0}, x.threads = threads;
    each_head(x, (x.keys + ROWS - 1) / ROWS * ROWS, ROWS, rows_reading_values);
}
