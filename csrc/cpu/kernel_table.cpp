// The kernels of one instruction set as a table.
#include "cpu/kernels.h"

namespace blip3o::cpu::BLIP3O_ISA {

void rms_norm(const RmsNormArguments&, int64_t begin, int64_t end);
void silu_mul(const SiluMulArguments&, int64_t begin, int64_t end);
void row_linear(const RowLinearArguments&, int64_t begin, int64_t end);
void row_linear_w8(const RowLinearInt8Arguments&, int64_t begin, int64_t end);
void linear(const LinearArguments&, int64_t begin, int64_t end);
void quantize_rows(const QuantizeRowsArguments&, int64_t begin, int64_t end);
void scale_product(const ScaleProductArguments&, int64_t begin, int64_t end);
void qk_norm_rope_append(const QkNormRopeAppendArguments&, int64_t begin, int64_t end);
void paged_decode_attention(const PagedDecodeAttentionArguments&, int64_t begin, int64_t end);
void advance_rows(const AdvanceRowsArguments&, int64_t begin, int64_t end);
void nearest_code(const NearestCodeArguments&, int64_t begin, int64_t end);
void relu_linear_attention_norms(const ReluLinearAttentionArguments&, int64_t begin, int64_t end);
void relu_linear_attention(const ReluLinearAttentionArguments&, int64_t begin, int64_t end);
void cross_attention_norms(const CrossAttentionArguments&, int64_t begin, int64_t end);
void cross_attention(const CrossAttentionArguments&, int64_t begin, int64_t end);
void depthwise_glu(const DepthwiseGluArguments&, int64_t begin, int64_t end);
void layer_norm_modulate(const LayerNormModulateArguments&, int64_t begin, int64_t end);
void gated_add(const GatedAddArguments&, int64_t begin, int64_t end);
void channel_rms_norm(const ChannelRmsNormArguments&, int64_t begin, int64_t end);
void add_pixel_shuffle(const PixelShuffleArguments&, int64_t begin, int64_t end);
void add_pixel_unshuffle(const PixelShuffleArguments&, int64_t begin, int64_t end);

extern const Kernels kKernels;
const Kernels kKernels = {rms_norm,
                          silu_mul,
                          row_linear,
                          row_linear_w8,
                          linear,
                          quantize_rows,
                          scale_product,
                          qk_norm_rope_append,
                          paged_decode_attention,
                          advance_rows,
                          nearest_code,
                          relu_linear_attention_norms,
                          relu_linear_attention,
                          cross_attention_norms,
                          cross_attention,
                          depthwise_glu,
                          layer_norm_modulate,
                          gated_add,
                          channel_rms_norm,
                          add_pixel_shuffle,
                          add_pixel_unshuffle};

}  // namespace blip3o::cpu::BLIP3O_ISA
