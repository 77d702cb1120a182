// Linear attention with a ReLU kernel: the keys of a head meet its values in a state [d, d], then the queries.
//
// Blocking  heads in groups, tokens in blocks of 64: the keys and values of a block are normed and widened once
//           into the second-level cache, and each head's block product of d x 64 x d is summed in registers
//           before it joins the head's float32 state. A head is computed by one thread over all tokens in
//           order, so its bits depend on its own tokens alone.
// Bytes     q and k twice (once for the norms), v once, the result once; per token 12 D in bfloat16.
// FLOPs     4 d D per token and its norms: 0.6 GFLOP for 2048 tokens of 70 heads of 32, beside 55 MB; neither
//           the units nor memory alone bound it.
#include "blip3o/ops/relu_linear_attention.h"
#include "cpu/thread_pool.h"
#include "cpu/tile_products.h"

namespace blip3o::cpu::BLIP3O_ISA {
namespace {

constexpr int64_t kBlockTokens = 64;
constexpr int64_t kGroupHeads = 8;
constexpr int64_t kFetchAhead = 8;  // rows; they lie further apart than the hardware's prefetchers follow
constexpr float kEpsilon = 1e-15f;

static_assert(kBlockTokens % kProductRows == 0 && kLanes % kProductRows == 0);

// What one thread holds of a group of heads.
struct Group {
    int64_t first, heads, head_dim, padded;  // padded: head_dim in whole vectors, filled up with zeros
    float *left, *right;                     // [heads, kBlockTokens, padded] keys or queries, and values
    float *state, *total;                    // [heads, padded, padded] and [heads, padded]
    float* result;                           // [kProductRows, padded]
};

Group make_group(const ReluLinearAttentionArguments& a) {
    Group group;
    group.head_dim = a.head_dim;
    group.padded = round_up(a.head_dim);
    const int64_t heads = a.heads < kGroupHeads ? a.heads : kGroupHeads;
    const int64_t block = heads * kBlockTokens * group.padded;
    const int64_t state = heads * group.padded * group.padded;
    group.left = thread_scratch(2 * block + state + (heads + kProductRows) * group.padded);
    group.right = group.left + block;
    group.state = group.right + block;
    group.total = group.state + state;
    group.result = group.total + heads * group.padded;
    return group;
}

BLIP3O_INLINE Vec positive(Vec x) { return x < 0.0f ? Vec{} : x; }  // a NaN stays one

// Columns of the group's heads in rows of qkv.
template <class T>
const T* columns(const ReluLinearAttentionArguments& a, const Group& group, int64_t row, int64_t third) {
    return a.qkv.row<T>(row) + third * a.heads * a.head_dim + group.first * a.head_dim;
}

template <class T>
void fetch(const T* from, int64_t elements) {
    const char* bytes = reinterpret_cast<const char*>(from);
    const int64_t size = elements * static_cast<int64_t>(sizeof(T));
    for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(bytes + i, 0, 2);
}

// to[head, token, :] = relu(x * scale * weight) for one token of all heads of the group.
template <class T>
void widen_positive(const Group& group, float* to, int64_t token, const T* x, float scale, const T* weight) {
    for (int64_t h = 0; h < group.heads; ++h) {
        float* row = to + (h * kBlockTokens + token) * group.padded;
        const int64_t first = h * group.head_dim;
        for_each_vector(group.head_dim, [&](int64_t i, int64_t count) {
            Vec value = load(x + first + i, count) * scale;
            if (weight) value *= load(weight + first + i, count);
            store(row + i, positive(value));
        });
    }
}

template <class T>
void widen_values(const Group& group, int64_t token, const T* x) {
    for (int64_t h = 0; h < group.heads; ++h) {
        widen_row(group.right + (h * kBlockTokens + token) * group.padded, x + h * group.head_dim,
                  group.head_dim);
    }
}

template <class T>
const T* group_weight(const Group& group, const void* weight) {
    return weight ? static_cast<const T*>(weight) + group.first * group.head_dim : nullptr;
}

// total += the sum of the keys of a block.
void add_keys(const Group& group, int64_t h, int64_t tokens) {
    const float* keys = group.left + h * kBlockTokens * group.padded;
    for (int64_t i = 0; i < group.head_dim; i += kLanes) {
        Vec sum = {};
        for (int64_t t = 0; t < tokens; ++t) sum += load(keys + t * group.padded + i);
        float* to = group.total + h * group.padded + i;
        store(to, load(to) + sum);
    }
}

// state += keys^T values of a block.
void add_products(const Group& group, int64_t h, int64_t tokens) {
    const int64_t padded = group.padded, vectors = padded / kLanes;
    const float* keys = group.left + h * kBlockTokens * padded;
    const float* values = group.right + h * kBlockTokens * padded;
    float* state = group.state + h * padded * padded;
    for (int64_t i = 0; i < group.head_dim; i += kProductRows) {
        product({keys + i, 1, padded}, {values, padded}, tokens, vectors, state + i * padded, padded, true);
    }
}

// The state of all heads of the group over the tokens from row `begin` on.
template <class T>
void sum_states(const ReluLinearAttentionArguments& a, const Group& group, int64_t begin) {
    const int64_t padded = group.padded, width = group.heads * group.head_dim;
    for (int64_t i = 0; i < group.heads * padded * padded; i += kLanes) store(group.state + i, Vec{});
    for (int64_t i = 0; i < group.heads * padded; i += kLanes) store(group.total + i, Vec{});
    const T* weight = group_weight<T>(group, a.k_weight);
    for (int64_t block = 0; block < a.tokens; block += kBlockTokens) {
        const int64_t tokens = a.tokens - block < kBlockTokens ? a.tokens - block : kBlockTokens;
        for (int64_t t = 0; t < tokens; ++t) {
            const int64_t row = begin + block + t;
            if (block + t + kFetchAhead < a.tokens) {
                fetch(columns<T>(a, group, row + kFetchAhead, 1), width);
                fetch(columns<T>(a, group, row + kFetchAhead, 2), width);
            }
            const float scale = weight ? a.inverse_rms[2 * row + 1] : 1.0f;
            widen_positive(group, group.left, t, columns<T>(a, group, row, 1), scale, weight);
            widen_values(group, t, columns<T>(a, group, row, 2));
        }
        for (int64_t h = 0; h < group.heads; ++h) {
            add_products(group, h, tokens);
            add_keys(group, h, tokens);
        }
    }
}

// The results of up to kProductRows tokens of one head, to the rows from `row` on.
template <class T>
void attend(const ReluLinearAttentionArguments& a, const Group& group, int64_t h, int64_t first,
            int64_t tokens, int64_t row) {
    const int64_t padded = group.padded, vectors = padded / kLanes;
    const float* queries = group.left + (h * kBlockTokens + first) * padded;
    product({queries, padded, 1}, {group.state + h * padded * padded, padded}, group.head_dim, vectors,
            group.result, padded, false);
    for (int64_t t = 0; t < tokens; ++t) {
        Vec products = {};
        for (int64_t i = 0; i < group.head_dim; i += kLanes) {
            products += load(queries + t * padded + i) * load(group.total + h * padded + i);
        }
        const float inverse = 1.0f / (sum_lanes(products) + kEpsilon);
        T* out = a.out.row<T>(row + t) + (group.first + h) * group.head_dim;
        for_each_vector(group.head_dim, [&](int64_t i, int64_t count) {
            store(out + i, load(group.result + t * padded + i) * inverse, count);
        });
    }
}

// The queries of the group, against the states.
template <class T>
void ask_states(const ReluLinearAttentionArguments& a, const Group& group, int64_t begin) {
    const T* weight = group_weight<T>(group, a.q_weight);
    for (int64_t block = 0; block < a.tokens; block += kBlockTokens) {
        const int64_t tokens = a.tokens - block < kBlockTokens ? a.tokens - block : kBlockTokens;
        for (int64_t t = 0; t < tokens; ++t) {
            const int64_t row = begin + block + t;
            if (block + t + kFetchAhead < a.tokens) {
                fetch(columns<T>(a, group, row + kFetchAhead, 0), group.heads * group.head_dim);
            }
            const float scale = weight ? a.inverse_rms[2 * row] : 1.0f;
            widen_positive(group, group.left, t, columns<T>(a, group, row, 0), scale, weight);
        }
        for (int64_t h = 0; h < group.heads; ++h) {
            for (int64_t t = 0; t < tokens; t += kProductRows) {
                const int64_t count = tokens - t < kProductRows ? tokens - t : kProductRows;
                attend<T>(a, group, h, t, count, begin + block + t);
            }
        }
    }
}

template <class T>
void attend_heads(const ReluLinearAttentionArguments& a, int64_t begin, int64_t end) {
    Group group = make_group(a);
    for (int64_t unit = begin; unit < end; unit += group.heads) {
        const int64_t batch = unit / a.heads, left_over = a.heads - unit % a.heads;
        group.first = unit % a.heads;
        group.heads = left_over < kGroupHeads ? left_over : kGroupHeads;
        if (end - unit < group.heads) group.heads = end - unit;
        sum_states<T>(a, group, batch * a.tokens);
        ask_states<T>(a, group, batch * a.tokens);
    }
}

template <class T>
float inverse_rms(const T* x, int64_t width, float eps) {
    Vec squares = {};
    for_each_vector(width, [&](int64_t i, int64_t count) {
        const Vec value = load(x + i, count);
        squares += value * value;
    });
    return 1.0f / __builtin_sqrtf(sum_lanes(squares) / static_cast<float>(width) + eps);
}

template <class T>
void norm_rows(const ReluLinearAttentionArguments& a, int64_t begin, int64_t end) {
    const int64_t width = a.heads * a.head_dim;
    for (int64_t row = begin; row < end; ++row) {
        const T* x = a.qkv.row<T>(row);
        a.inverse_rms[2 * row] = inverse_rms(x, width, a.eps);
        a.inverse_rms[2 * row + 1] = inverse_rms(x + width, width, a.eps);
    }
}

}  // namespace

void relu_linear_attention_norms(const ReluLinearAttentionArguments& arguments, int64_t begin, int64_t end) {
    arguments.dtype == DType::bf16 ? norm_rows<bf16>(arguments, begin, end)
                                   : norm_rows<float>(arguments, begin, end);
}

void relu_linear_attention(const ReluLinearAttentionArguments& arguments, int64_t begin, int64_t end) {
    arguments.dtype == DType::bf16 ? attend_heads<bf16>(arguments, begin, end)
                                   : attend_heads<float>(arguments, begin, end);
}

}  // namespace blip3o::cpu::BLIP3O_ISA
