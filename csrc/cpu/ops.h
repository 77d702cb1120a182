// The ops on the CPU: each checks its arguments (ArgumentError), then runs on the pool's threads.
//
// Shapes, dtypes and semantics: blip3o_rt/ops.
#pragma once

#include "blip3o/contracts.h"

namespace blip3o::cpu {

void rms_norm(const TensorView& x, const TensorView& weight, double eps, const OptionalView& bias,
              const OptionalView& residual, const TensorView& out);

void silu_mul(const TensorView& gate_up, const TensorView& out);

void row_linear(const TensorView& x, const TensorView& weight, const OptionalView& bias,
                const TensorView& out);

void row_linear_w8(const TensorView& x, const TensorView& weight, const TensorView& scale,
                   const OptionalView& bias, const TensorView& out);

void norm_row_linear(const TensorView& x, const TensorView& norm_weight, double eps, const TensorView& weight,
                     const OptionalView& scale, bool gated, Unused, const TensorView& out);

void row_linear_add(const TensorView& x, const TensorView& weight, const TensorView& residual,
                    const OptionalView& scale);

void linear(const TensorView& x, const TensorView& weight, const OptionalView& bias, const TensorView& out);

void linear_w8a16(const TensorView& x, const TensorView& weight, const TensorView& scale,
                  const TensorView& out);

void quantize_rows(const TensorView& x, const TensorView& scale, Unused, const TensorView& out);

void scale_product(const TensorView& product, const TensorView& scale, const TensorView& out,
                   const OptionalView& row_scale, const OptionalView& bias);

void qk_norm_rope_append(const TensorView& qkv, const TensorView& q_weight, const TensorView& k_weight,
                         const TensorView& cos_sin_cache, const TensorView& positions,
                         const TensorView& slot_mapping, const TensorView& k_cache, const TensorView& v_cache,
                         double eps, const TensorView& out);

void paged_decode_attention(const TensorView& q, const TensorView& k_cache, const TensorView& v_cache,
                            const TensorView& page_table, const TensorView& context_lens, double scale,
                            Unused, const TensorView& out);

void advance_rows(const TensorView& sampled_ids, const TensorView& first_ids, const TensorView& page_table,
                  int64_t page_size, const TensorView& num_generated, const TensorView& context_lens,
                  const TensorView& output_slots, const TensorView& output_ids, const TensorView& positions,
                  const TensorView& slot_mapping, const TensorView& out);

void sample_tokens(const TensorView& logits, const TensorView& temperature, const TensorView& top_k,
                   const TensorView& top_p, const TensorView& seeds, const TensorView& positions, Unused,
                   const TensorView& out);

void nearest_code(const TensorView& features, const TensorView& codebook, const TensorView& out);

void relu_linear_attention(const TensorView& qkv, const OptionalView& q_weight, const OptionalView& k_weight,
                           int64_t num_heads, double eps, const TensorView& out);

void cross_attention(const TensorView& query, const TensorView& key, const TensorView& value,
                     const OptionalView& query_weight, double eps, const OptionalView& log_multiplicity,
                     const TensorView& out);

void depthwise_glu(const TensorView& x, const TensorView& input_bias, const TensorView& weight,
                   const TensorView& bias, const TensorView& out);

void layer_norm_modulate(const TensorView& x, const TensorView& shift, const TensorView& scale, double eps,
                         const TensorView& out);

void gated_add(const TensorView& residual, const TensorView& x, const TensorView& gate);

void channel_rms_norm(const TensorView& x, const TensorView& weight, const TensorView& bias, double eps,
                      const OptionalView& residual, bool relu, const TensorView& out);

void add_pixel_shuffle(const TensorView& result, const TensorView& x, const OptionalView& bias);

void add_pixel_unshuffle(const TensorView& result, const TensorView& x, const OptionalView& bias);

}  // namespace blip3o::cpu
