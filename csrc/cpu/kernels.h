// The CPU kernels as every instruction set offers them, and the choice between those at run time.
//
// Each csrc/cpu/<op>.cpp is compiled once per instruction set into a namespace of its own. Such a file must
// not instantiate anything of the standard library: the linker keeps one copy of an inline function, and it
// might be the AVX-512 one that then runs on a machine without it.
#pragma once

#include <cstdint>

#include "blip3o/op_arguments.h"

namespace blip3o::cpu {

// A kernel computes the outputs begin .. end of its op; what is counted is said with each.
template <class Arguments>
using Kernel = void (*)(const Arguments&, int64_t begin, int64_t end);

struct Kernels {
    Kernel<RmsNormArguments> rms_norm;                                 // rows
    Kernel<SiluMulArguments> silu_mul;                                 // rows
    Kernel<RowLinearArguments> row_linear;                             // columns of the result
    Kernel<RowLinearInt8Arguments> row_linear_w8;                      // columns of the result
    Kernel<LinearArguments> linear;                                    // kLinearColumns columns
    Kernel<QuantizeRowsArguments> quantize_rows;                       // rows
    Kernel<ScaleProductArguments> scale_product;                       // rows
    Kernel<QkNormRopeAppendArguments> qk_norm_rope_append;             // tokens
    Kernel<PagedDecodeAttentionArguments> paged_decode_attention;      // (sequence, KV head) pairs
    Kernel<AdvanceRowsArguments> advance_rows;                         // rows
    Kernel<NearestCodeArguments> nearest_code;                         // rows of features
    Kernel<ReluLinearAttentionArguments> relu_linear_attention_norms;  // tokens of all batches
    Kernel<ReluLinearAttentionArguments> relu_linear_attention;        // (batch, head) pairs
    Kernel<CrossAttentionArguments> cross_attention_norms;             // queries
    Kernel<CrossAttentionArguments> cross_attention;         // (head, kCrossAttentionQueries queries) pairs
    Kernel<DepthwiseGluArguments> depthwise_glu;             // (image, kDepthwiseGluChannels channels) pairs
    Kernel<LayerNormModulateArguments> layer_norm_modulate;  // rows
    Kernel<GatedAddArguments> gated_add;                     // rows
    Kernel<ChannelRmsNormArguments> channel_rms_norm;        // pixels
    Kernel<PixelShuffleArguments> add_pixel_shuffle;         // rows of the coarse images
    Kernel<PixelShuffleArguments> add_pixel_unshuffle;       // rows of the coarse images
};

constexpr int64_t kCrossAttentionQueries = 64;
constexpr int64_t kDepthwiseGluChannels = 16;
constexpr int64_t kLinearColumns = 16;

enum class Isa { portable, avx2, avx512 };
constexpr Isa kIsas[] = {Isa::portable, Isa::avx2, Isa::avx512};

const char* name_of(Isa isa);

// Whether this build has the kernels of `isa` and this machine runs them.
bool runs_here(Isa isa);

// Whether the kernels in use multiply pairs of bfloat16 in one instruction (AVX512_BF16).
bool has_bf16_products();

// The instruction set in use: the best that runs here, until set_isa says otherwise.
Isa current_isa();

// `isa` must run here.
void set_isa(Isa isa);

const Kernels& kernels();

}  // namespace blip3o::cpu
