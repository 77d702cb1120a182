// What each op's kernels receive, on every device: plain pointers and sizes, already checked (contracts.h).
//
// Nothing here is ever compiled out of line, so kernels for several instruction sets share it
// (cpu/kernels.h).
#pragma once

#include <cstdint>

namespace blip3o {

enum class DType : uint8_t { f32, bf16, e4m3, i8, i32, i64, other };

// bfloat16 as it lies in memory: the upper half of a float.
struct bf16 {
    uint16_t bits;
};

// A matrix whose rows are contiguous and lie `stride` elements apart. data is null for an absent optional.
struct Rows {
    void* data;
    int64_t count, width, stride;

    template <class T>
    __attribute__((always_inline)) T* row(int64_t index) const {
        return static_cast<T*>(data) + index * stride;
    }
};

struct RmsNormArguments {
    Rows x, residual, out;
    const void *weight, *bias;  // bias may be null
    DType dtype;
    float eps;
};

struct SiluMulArguments {
    Rows gate_up, out;
    DType dtype;
};

struct RowLinearArguments {
    Rows x, weight, out;
    const void* bias;  // may be null
    DType dtype, out_dtype;
};

struct RowLinearInt8Arguments {
    Rows x, weight, out;
    const float* scale;  // one for each row of weight
    const void* bias;    // may be null
    DType dtype, weight_dtype, out_dtype;
};

struct LinearArguments {
    Rows x, weight, out;
    const float* scale;  // one for each row of weight; may be null
    const void* bias;    // may be null
    DType weight_dtype;
    bool pair_products;  // whether the machine has the instruction, and may use it
};

struct QuantizeRowsArguments {
    Rows x, out;
    float* scale;  // one for each row
    DType dtype;
};

struct ScaleProductArguments {
    Rows product, out;
    const float *scale, *row_scale;  // of columns and of rows; the latter may be null
    const void* bias;                // may be null
    DType product_dtype, dtype;
};

// A product of few rows with its neighbours folded in; what is null or false is left out.
struct RowProductArguments {
    Rows x, weight, out;
    const float* scale;       // one for each row of weight
    const void* bias;         // [weight.count]
    const void* norm_weight;  // rows of x are normed first
    float eps;
    bool gated;  // rows of weight are gates and as many ups: silu(gate) * up
    bool adds;   // into out, which has the dtype of x
    DType dtype, weight_dtype, out_dtype;
};

// A paged cache [pages, kv_heads, page_size, head_dim], contiguous.
struct PagedCache {
    void *k, *v;
    int64_t pages, kv_heads, page_size, head_dim;
};

struct QkNormRopeAppendArguments {
    Rows qkv;
    const void *q_weight, *k_weight;
    const float* cos_sin_cache;  // [max_positions, head_dim]
    const int32_t *positions, *slot_mapping;
    PagedCache cache;
    void* out;  // [tokens, q_heads, head_dim]
    int64_t tokens, q_heads, max_positions;
    DType dtype;
    float eps;
};

struct PagedDecodeAttentionArguments {
    const void* q;
    PagedCache cache;
    const int32_t *page_table, *context_lens;
    void* out;
    int64_t batch, q_heads, max_blocks;
    DType dtype;
    float scale;
};

constexpr int kMostPromptHeadDim = 256;  // that the GPU's kernels have registers for

struct PagedPrefillAttentionArguments {
    const void* q;  // [tokens, q_heads, head_dim]
    PagedCache cache;
    const int32_t *page_table, *cu_seqlens_q, *context_lens;
    void* out;
    int64_t tokens, batch, q_heads, max_blocks;
    DType dtype;
    float scale;
};

constexpr int kMostHeadsPerKvHead = 16;  // whose queries a block has shared memory for

// A new token of each sequence (token.out is not used) and its attention (attention.q is not used).
struct DecodeAttentionArguments {
    QkNormRopeAppendArguments token;
    PagedDecodeAttentionArguments attention;
};

struct ReluLinearAttentionArguments {
    Rows qkv, out;                    // rows are the tokens of all batches
    const void *q_weight, *k_weight;  // may be null: no norm
    float* inverse_rms;               // [batch * tokens, 2]: of q and of k
    int64_t batch, tokens, heads, head_dim;
    DType dtype;
    float eps;
};

// Rows of several heads: row `token` of head `head` begins head * head_stride + token * token_stride in.
struct HeadRows {
    const void* data;
    int64_t head_stride, token_stride;
};

struct CrossAttentionArguments {
    Rows query, out;
    HeadRows key, value;
    const void* query_weight;       // may be null: no norm
    const float* log_multiplicity;  // [keys]; may be null
    float* inverse_rms;             // [queries]
    int64_t heads, keys, head_dim;
    DType dtype;
    float eps;
    bool pair_products;  // as in LinearArguments
};

struct DepthwiseGluArguments {
    Rows x, out;  // rows are the pixels of all images
    const void *input_bias, *weight, *bias;
    int64_t batch, height, width, channels;  // channels of the result
    DType dtype;
};

struct LayerNormModulateArguments {
    Rows x, out;
    const void *shift, *scale;
    DType dtype, modulation_dtype, out_dtype;
    float eps;
};

struct GatedAddArguments {
    Rows residual, x;
    const void* gate;
    DType dtype, gate_dtype;
};

struct ChannelRmsNormArguments {
    Rows x, residual, out;
    const void *weight, *bias;
    DType dtype;
    float eps;
    bool relu;
};

// Of both directions: a coarse image [batch, height, width, coarse_channels] and one of twice its sides.
struct PixelShuffleArguments {
    void* result;
    const void *x, *bias;
    int64_t batch, height, width, coarse_channels, fine_channels;
    DType dtype;
};

struct AdvanceRowsArguments {
    const int64_t *sampled_ids, *first_ids;
    const int32_t* page_table;
    int32_t *num_generated, *context_lens;
    int64_t *output_slots, *output_ids;
    int32_t *positions, *slot_mapping;
    int64_t* out;
    int64_t rows, max_blocks, page_size, num_output_slots;
};

struct SampleTokensArguments {
    Rows logits;
    const float* temperature;
    const int32_t* top_k;
    const float* top_p;
    const int64_t* seeds;
    const int32_t* positions;
    int64_t* out;
};

struct NearestCodeArguments {
    Rows features, codebook;
    int64_t* out;
};

}  // namespace blip3o
