#include "cpu/ops.h"

#include <vector>

#include "cpu/kernels.h"
#include "cpu/sample_tokens.h"
#include "cpu/thread_pool.h"

namespace blip3o::cpu {
namespace {

// Elements that one thread should have at least; less is done sooner than another thread wakes up.
constexpr int64_t kGrainElements = 16 * 1024;

int64_t grain(int64_t elements_per_unit) {
    return elements_per_unit >= kGrainElements ? 1 : kGrainElements / (elements_per_unit + 1) + 1;
}

void check_slots(const QkNormRopeAppendArguments& a) {
    const int64_t slot_mapping = a.cache.pages * a.cache.page_size;
    for (int64_t token = 0; token < a.tokens; ++token) {
        if (a.positions[token] < 0 || a.positions[token] >= a.max_positions) {
            throw ArgumentError("qk_norm_rope_append: positions[" + std::to_string(token) + "] is " +
                                std::to_string(a.positions[token]) + "; accepted: 0 to " +
                                std::to_string(a.max_positions - 1) + ", the rows of cos_sin_cache");
        }
        if (a.slot_mapping[token] < -1 || a.slot_mapping[token] >= slot_mapping) {
            throw ArgumentError("qk_norm_rope_append: slot_mapping[" + std::to_string(token) + "] is " +
                                std::to_string(a.slot_mapping[token]) + "; accepted: -1 (not written) to " +
                                std::to_string(slot_mapping - 1) + ", the last of the cache");
        }
    }
}

void check_pages(const PagedDecodeAttentionArguments& a) {
    for (int64_t b = 0; b < a.batch; ++b) {
        const int64_t length = a.context_lens[b];
        if (length < 0 || length > a.max_blocks * a.cache.page_size) {
            throw ArgumentError("paged_decode_attention: context_lens[" + std::to_string(b) + "] is " +
                                std::to_string(length) + "; accepted: 0 to " +
                                std::to_string(a.max_blocks * a.cache.page_size) + ", what page_table holds");
        }
        for (int64_t block = 0; block * a.cache.page_size < length; ++block) {
            const int64_t page = a.page_table[b * a.max_blocks + block];
            if (page < 0 || page >= a.cache.pages) {
                throw ArgumentError("paged_decode_attention: page_table[" + std::to_string(b) + ", " +
                                    std::to_string(block) + "] is " + std::to_string(page) +
                                    "; accepted: 0 to " + std::to_string(a.cache.pages - 1) +
                                    ", the pages of k_cache");
            }
        }
    }
}

void check_output_slots(const AdvanceRowsArguments& a) {
    for (int64_t row = 0; row < a.rows; ++row) {
        if (a.output_slots[row] < 0 || a.output_slots[row] >= a.num_output_slots) {
            throw ArgumentError("advance_rows: output_slots[" + std::to_string(row) + "] is " +
                                std::to_string(a.output_slots[row]) + "; accepted: 0 to " +
                                std::to_string(a.num_output_slots - 1) + ", the slots of output_ids");
        }
    }
}

template <class Arguments>
void run(Kernel<Arguments> kernel, const Arguments& arguments, int64_t count, int64_t grain_units) {
    parallel_for(count, grain_units, [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

// A matrix that one kernel hands to the next within an op: memory of the calling thread, kept for its next
// call.
template <int kWhich>
TensorView between(DType dtype, int64_t rows, int64_t columns) {
    thread_local std::vector<float> memory;
    const size_t floats = static_cast<size_t>(rows * columns);
    if (memory.size() < floats) memory.resize(floats);
    TensorView view;
    view.data = memory.data();
    view.dtype = dtype;
    view.device = Device::cpu;
    view.ndim = 2;
    view.shape[0] = rows;
    view.shape[1] = view.stride[0] = columns;
    view.stride[1] = 1;
    return view;
}

void product(const TensorView& x, const TensorView& weight, const OptionalView& scale,
             const TensorView& out) {
    scale ? row_linear_w8(x, weight, *scale, {}, out) : row_linear(x, weight, {}, out);
}

void multiply(LinearArguments arguments) {
    arguments.pair_products = has_bf16_products();
    const int64_t units = (arguments.weight.count + kLinearColumns - 1) / kLinearColumns;
    run(kernels().linear, arguments, arguments.x.count > 0 ? units : 0,
        grain(arguments.x.width * arguments.x.count * kLinearColumns));
}

// By rows of the coarse images.
void run_image(Kernel<PixelShuffleArguments> kernel, const PixelShuffleArguments& arguments) {
    run(kernel, arguments, arguments.width > 0 ? arguments.batch * arguments.height : 0,
        grain(arguments.width * 4 * arguments.fine_channels));
}

}  // namespace

void rms_norm(const TensorView& x, const TensorView& weight, double eps, const OptionalView& bias,
              const OptionalView& residual, const TensorView& out) {
    const auto arguments = check_rms_norm(Device::cpu, x, weight, eps, bias, residual, out);
    run(kernels().rms_norm, arguments, arguments.x.count, grain(arguments.x.width));
}

void silu_mul(const TensorView& gate_up, const TensorView& out) {
    const auto arguments = check_silu_mul(Device::cpu, gate_up, out);
    run(kernels().silu_mul, arguments, arguments.out.count, grain(4 * arguments.out.width));
}

void row_linear(const TensorView& x, const TensorView& weight, const OptionalView& bias,
                const TensorView& out) {
    const auto arguments = check_row_linear(Device::cpu, x, weight, bias, out);
    const int64_t work = arguments.x.width * (arguments.x.count + 1);
    run(kernels().row_linear, arguments, arguments.x.count > 0 ? arguments.weight.count : 0, grain(work));
}

void row_linear_w8(const TensorView& x, const TensorView& weight, const TensorView& scale,
                   const OptionalView& bias, const TensorView& out) {
    const auto arguments = check_row_linear_w8(Device::cpu, x, weight, scale, bias, out);
    Contract("row_linear_w8", Device::cpu)
        .require(arguments.weight_dtype == DType::i8, "this kernel takes an int8 weight, not one of e4m3");
    const int64_t work = arguments.x.width * (arguments.x.count + 1);
    run(kernels().row_linear_w8, arguments, arguments.x.count > 0 ? arguments.weight.count : 0, grain(work));
}

void norm_row_linear(const TensorView& x, const TensorView& norm_weight, double eps, const TensorView& weight,
                     const OptionalView& scale, bool gated, Unused, const TensorView& out) {
    const auto a = check_norm_row_linear(Device::cpu, x, norm_weight, eps, weight, scale, gated, out);
    const TensorView normed = between<0>(a.dtype, a.x.count, a.x.width);
    rms_norm(x, norm_weight, eps, {}, {}, normed);
    if (!gated) return product(normed, weight, scale, out);
    const TensorView gate_up = between<1>(a.dtype, a.x.count, a.weight.count);
    product(normed, weight, scale, gate_up);
    silu_mul(gate_up, out);
}

void row_linear_add(const TensorView& x, const TensorView& weight, const TensorView& residual,
                    const OptionalView& scale) {
    const auto a = check_row_linear_add(Device::cpu, x, weight, residual, scale);
    const TensorView sum = between<0>(a.dtype, a.x.count, a.out.width);
    product(x, weight, scale, sum);
    thread_local std::vector<float> ones;
    if (ones.size() < static_cast<size_t>(a.out.width)) ones.resize(a.out.width, 1.0f);
    const Rows added = {sum.data, a.out.count, a.out.width, a.out.width};
    run(kernels().gated_add, GatedAddArguments{a.out, added, ones.data(), a.dtype, DType::f32}, a.out.count,
        grain(a.out.width));
}

void linear(const TensorView& x, const TensorView& weight, const OptionalView& bias, const TensorView& out) {
    multiply(check_linear("linear", Device::cpu, x, weight, DType::bf16, {}, bias, out));
}

void linear_w8a16(const TensorView& x, const TensorView& weight, const TensorView& scale,
                  const TensorView& out) {
    multiply(check_linear("linear_w8a16", Device::cpu, x, weight, DType::i8, scale, {}, out));
}

void quantize_rows(const TensorView& x, const TensorView& scale, Unused, const TensorView& out) {
    const auto arguments = check_quantize_rows(Device::cpu, x, scale, out);
    run(kernels().quantize_rows, arguments, arguments.x.count, grain(arguments.x.width));
}

void scale_product(const TensorView& product, const TensorView& scale, const TensorView& out,
                   const OptionalView& row_scale, const OptionalView& bias) {
    const auto arguments = check_scale_product(Device::cpu, product, scale, row_scale, bias, out);
    run(kernels().scale_product, arguments, arguments.product.count, grain(arguments.product.width));
}

void qk_norm_rope_append(const TensorView& qkv, const TensorView& q_weight, const TensorView& k_weight,
                         const TensorView& cos_sin_cache, const TensorView& positions,
                         const TensorView& slot_mapping, const TensorView& k_cache, const TensorView& v_cache,
                         double eps, const TensorView& out) {
    const auto arguments = check_qk_norm_rope_append(Device::cpu, qkv, q_weight, k_weight, cos_sin_cache,
                                                     positions, slot_mapping, k_cache, v_cache, eps, out);
    check_slots(arguments);
    run(kernels().qk_norm_rope_append, arguments, arguments.tokens, grain(2 * arguments.qkv.width));
}

void paged_decode_attention(const TensorView& q, const TensorView& k_cache, const TensorView& v_cache,
                            const TensorView& page_table, const TensorView& context_lens, double scale,
                            Unused, const TensorView& out) {
    const auto arguments =
        check_paged_decode_attention(Device::cpu, q, k_cache, v_cache, page_table, context_lens, scale, out);
    check_pages(arguments);
    const int64_t largest_work = arguments.max_blocks * arguments.cache.page_size * arguments.cache.head_dim;
    run(kernels().paged_decode_attention, arguments, arguments.batch * arguments.cache.kv_heads,
        grain(largest_work));
}

void advance_rows(const TensorView& sampled_ids, const TensorView& first_ids, const TensorView& page_table,
                  int64_t page_size, const TensorView& num_generated, const TensorView& context_lens,
                  const TensorView& output_slots, const TensorView& output_ids, const TensorView& positions,
                  const TensorView& slot_mapping, const TensorView& out) {
    const auto arguments =
        check_advance_rows(Device::cpu, sampled_ids, first_ids, page_table, page_size, num_generated,
                           context_lens, output_slots, output_ids, positions, slot_mapping, out);
    check_output_slots(arguments);
    run(kernels().advance_rows, arguments, arguments.rows, arguments.rows);
}

void sample_tokens(const TensorView& logits, const TensorView& temperature, const TensorView& top_k,
                   const TensorView& top_p, const TensorView& seeds, const TensorView& positions, Unused,
                   const TensorView& out) {
    const auto arguments =
        check_sample_tokens(Device::cpu, logits, temperature, top_k, top_p, seeds, positions, out);
    run(sample_rows, arguments, arguments.logits.count, 1);
}

void nearest_code(const TensorView& features, const TensorView& codebook, const TensorView& out) {
    const auto arguments = check_nearest_code(Device::cpu, features, codebook, out);
    run(kernels().nearest_code, arguments, arguments.features.count, 4);
}

void relu_linear_attention(const TensorView& qkv, const OptionalView& q_weight, const OptionalView& k_weight,
                           int64_t num_heads, double eps, const TensorView& out) {
    auto arguments = check_relu_linear_attention(Device::cpu, qkv, q_weight, k_weight, num_heads, eps, out);
    const int64_t rows = arguments.qkv.count;
    std::vector<float> inverse_rms(q_weight || k_weight ? 2 * rows : 0);
    arguments.inverse_rms = inverse_rms.data();
    if (q_weight || k_weight) {
        run(kernels().relu_linear_attention_norms, arguments, rows, grain(arguments.qkv.width));
    }
    run(kernels().relu_linear_attention, arguments, rows > 0 ? arguments.batch * arguments.heads : 0,
        grain(arguments.tokens * arguments.head_dim * arguments.head_dim));
}

void cross_attention(const TensorView& query, const TensorView& key, const TensorView& value,
                     const OptionalView& query_weight, double eps, const OptionalView& log_multiplicity,
                     const TensorView& out) {
    auto arguments =
        check_cross_attention(Device::cpu, query, key, value, query_weight, eps, log_multiplicity, out);
    const int64_t queries = arguments.query.count;
    std::vector<float> inverse_rms(query_weight ? queries : 0);
    arguments.inverse_rms = inverse_rms.data();
    arguments.pair_products = has_bf16_products();
    if (query_weight) {
        run(kernels().cross_attention_norms, arguments, queries, grain(arguments.query.width));
    }
    const int64_t blocks = (queries + kCrossAttentionQueries - 1) / kCrossAttentionQueries;
    run(kernels().cross_attention, arguments, arguments.heads * blocks,
        grain(kCrossAttentionQueries * arguments.keys * arguments.head_dim));
}

void depthwise_glu(const TensorView& x, const TensorView& input_bias, const TensorView& weight,
                   const TensorView& bias, const TensorView& out) {
    const auto arguments = check_depthwise_glu(Device::cpu, x, input_bias, weight, bias, out);
    const int64_t units = (arguments.channels + kDepthwiseGluChannels - 1) / kDepthwiseGluChannels;
    const int64_t pixels = arguments.height * arguments.width;
    run(kernels().depthwise_glu, arguments, pixels > 0 ? arguments.batch * units : 0,
        grain(pixels * kDepthwiseGluChannels * 16));
}

void layer_norm_modulate(const TensorView& x, const TensorView& shift, const TensorView& scale, double eps,
                         const TensorView& out) {
    const auto arguments = check_layer_norm_modulate(Device::cpu, x, shift, scale, eps, out);
    run(kernels().layer_norm_modulate, arguments, arguments.x.count, grain(arguments.x.width));
}

void gated_add(const TensorView& residual, const TensorView& x, const TensorView& gate) {
    const auto arguments = check_gated_add(Device::cpu, residual, x, gate);
    run(kernels().gated_add, arguments, arguments.x.count, grain(arguments.x.width));
}

void channel_rms_norm(const TensorView& x, const TensorView& weight, const TensorView& bias, double eps,
                      const OptionalView& residual, bool relu, const TensorView& out) {
    const auto arguments = check_channel_rms_norm(Device::cpu, x, weight, bias, eps, residual, relu, out);
    run(kernels().channel_rms_norm, arguments, arguments.x.count, grain(arguments.x.width));
}

void add_pixel_shuffle(const TensorView& result, const TensorView& x, const OptionalView& bias) {
    const auto arguments = check_pixel_shuffle("add_pixel_shuffle", Device::cpu, true, result, x, bias);
    run_image(kernels().add_pixel_shuffle, arguments);
}

void add_pixel_unshuffle(const TensorView& result, const TensorView& x, const OptionalView& bias) {
    const auto arguments = check_pixel_shuffle("add_pixel_unshuffle", Device::cpu, false, result, x, bias);
    run_image(kernels().add_pixel_unshuffle, arguments);
}

}  // namespace blip3o::cpu
