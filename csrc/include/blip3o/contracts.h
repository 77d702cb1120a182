// The contract of each op, checked once for every device: tensor views in, kernel arguments out.
//
// Shapes, dtypes and semantics are documented with the ops in blip3o_rt/ops. Each function throws
// ArgumentError.
#pragma once

#include "blip3o/tensor_view.h"

namespace blip3o {

using OptionalView = std::optional<TensorView>;

inline const void* data_or_null(const OptionalView& view) { return view ? view->data : nullptr; }

// Scratch memory of a call whose other arguments are where `beside` is: at least `elements` of one dtype.
inline void* check_workspace(const char* op, const TensorView& workspace, DType dtype, int64_t elements,
                             const TensorView& beside) {
    Contract contract(op, beside.device);
    Dim size("elements");
    contract(beside, "the first argument");
    contract(workspace, "workspace").dtype({dtype}).shape({&size}).contiguous();
    contract.require(size.value() >= elements, "workspace is too small for these shapes");
    return workspace.data;
}

inline RmsNormArguments check_rms_norm(Device device, const TensorView& x, const TensorView& weight,
                                       double eps, const OptionalView& bias, const OptionalView& residual,
                                       const TensorView& out) {
    Contract contract("rms_norm", device);
    Dim rows("rows"), width("D");
    RmsNormArguments arguments;
    arguments.x = contract(x, "x").dtype({DType::f32, DType::bf16}).rows(rows, width);
    contract(weight, "weight").dtype({x.dtype}).shape({&width}).contiguous();
    contract(bias, "bias").dtype({x.dtype}).shape({&width}).contiguous();
    arguments.residual = contract(residual, "residual").dtype({x.dtype}).rows(rows, width);
    arguments.out = contract(out, "out").dtype({x.dtype}).rows(rows, width);
    arguments.weight = weight.data;
    arguments.bias = data_or_null(bias);
    arguments.dtype = x.dtype;
    arguments.eps = static_cast<float>(eps);
    return arguments;
}

inline SiluMulArguments check_silu_mul(Device device, const TensorView& gate_up, const TensorView& out) {
    Contract contract("silu_mul", device);
    Dim rows("M"), doubled("2 I"), width("I");
    SiluMulArguments arguments;
    arguments.gate_up = contract(gate_up, "gate_up").dtype({DType::f32, DType::bf16}).rows(rows, doubled);
    arguments.out = contract(out, "out").dtype({gate_up.dtype}).rows(rows, width);
    arguments.dtype = gate_up.dtype;
    contract.require(doubled.value() == 2 * width.value(), "gate_up must be twice as wide as out");
    return arguments;
}

inline RowLinearArguments check_row_linear(Device device, const TensorView& x, const TensorView& weight,
                                           const OptionalView& bias, const TensorView& out) {
    Contract contract("row_linear", device);
    Dim rows("M"), inputs("K"), outputs("N");
    RowLinearArguments arguments;
    arguments.x = contract(x, "x").dtype({DType::f32, DType::bf16}).rows(rows, inputs);
    arguments.weight = contract(weight, "weight").dtype({x.dtype}).rows(outputs, inputs);
    contract(bias, "bias").dtype({x.dtype}).shape({&outputs}).contiguous();
    arguments.out = contract(out, "out").dtype({x.dtype, DType::f32}).rows(rows, outputs);
    contract.require(rows.value() == 0 || inputs.value() == 0 || out.data != x.data,
                     "out must not be the memory of x; give it memory of its own");
    arguments.bias = data_or_null(bias);
    arguments.dtype = x.dtype;
    arguments.out_dtype = out.dtype;
    return arguments;
}

inline RowLinearInt8Arguments check_row_linear_int8(Device device, const TensorView& x,
                                                    const TensorView& weight, const TensorView& scale,
                                                    const OptionalView& bias, const TensorView& out) {
    Contract contract("row_linear_int8", device);
    Dim rows("M"), inputs("K"), outputs("N");
    RowLinearInt8Arguments arguments;
    arguments.x = contract(x, "x").dtype({DType::f32, DType::bf16}).rows(rows, inputs);
    arguments.weight = contract(weight, "weight").dtype({DType::i8}).rows(outputs, inputs);
    contract(scale, "scale").dtype({DType::f32}).shape({&outputs}).contiguous();
    contract(bias, "bias").dtype({x.dtype}).shape({&outputs}).contiguous();
    arguments.out = contract(out, "out").dtype({x.dtype, DType::f32}).rows(rows, outputs);
    contract.require(rows.value() == 0 || inputs.value() == 0 || out.data != x.data,
                     "out must not be the memory of x; give it memory of its own");
    arguments.scale = scale.as<const float>();
    arguments.bias = data_or_null(bias);
    arguments.dtype = x.dtype;
    arguments.out_dtype = out.dtype;
    return arguments;
}

inline QkNormRopeAppendArguments check_qk_norm_rope_append(
    Device device, const TensorView& qkv, const TensorView& q_weight, const TensorView& k_weight,
    const TensorView& rope_table, const TensorView& positions, const TensorView& slots,
    const TensorView& k_cache, const TensorView& v_cache, double eps, const TensorView& out) {
    Contract contract("qk_norm_rope_append", device);
    Dim tokens("T"), packed("(Hq + 2 Hkv) D"), q_heads("Hq"), head_dim("D"), max_positions("max_positions");
    Dim pages("pages"), kv_heads("Hkv"), page_size("page_size");
    QkNormRopeAppendArguments arguments;
    arguments.qkv = contract(qkv, "qkv").dtype({DType::f32, DType::bf16}).rows(tokens, packed);
    contract(q_weight, "q_weight").dtype({qkv.dtype}).shape({&head_dim}).contiguous();
    contract(k_weight, "k_weight").dtype({qkv.dtype}).shape({&head_dim}).contiguous();
    contract(rope_table, "rope_table").dtype({DType::f32}).shape({&max_positions, &head_dim}).contiguous();
    contract(positions, "positions").dtype({DType::i32}).shape({&tokens}).contiguous();
    contract(slots, "slots").dtype({DType::i32}).shape({&tokens}).contiguous();
    for (const auto& [cache, name] : {std::pair{&k_cache, "k_cache"}, std::pair{&v_cache, "v_cache"}}) {
        contract(*cache, name)
            .dtype({qkv.dtype})
            .shape({&pages, &kv_heads, &page_size, &head_dim})
            .contiguous();
    }
    contract(out, "out").dtype({qkv.dtype}).shape({&tokens, &q_heads, &head_dim}).contiguous();
    contract.require(head_dim.value() % 2 == 0, "D must be even: rotary embedding turns pairs of channels");
    contract.require(packed.value() == (q_heads.value() + 2 * kv_heads.value()) * head_dim.value(),
                     "qkv must be (Hq + 2 Hkv) D wide, Hq and D as in out, Hkv as in k_cache");
    arguments.q_weight = q_weight.data;
    arguments.k_weight = k_weight.data;
    arguments.rope_table = rope_table.as<const float>();
    arguments.positions = positions.as<const int32_t>();
    arguments.slots = slots.as<const int32_t>();
    arguments.cache = {k_cache.data,     v_cache.data,      pages.value(),
                       kv_heads.value(), page_size.value(), head_dim.value()};
    arguments.out = out.data;
    arguments.tokens = tokens.value();
    arguments.q_heads = q_heads.value();
    arguments.max_positions = max_positions.value();
    arguments.dtype = qkv.dtype;
    arguments.eps = static_cast<float>(eps);
    return arguments;
}

inline PagedDecodeAttentionArguments check_paged_decode_attention(
    Device device, const TensorView& q, const TensorView& k_cache, const TensorView& v_cache,
    const TensorView& block_table, const TensorView& context_lengths, double scale, const TensorView& out) {
    Contract contract("paged_decode_attention", device);
    Dim batch("B"), q_heads("Hq"), head_dim("D"), max_blocks("max_blocks");
    Dim pages("pages"), kv_heads("Hkv"), page_size("page_size");
    contract(q, "q").dtype({DType::f32, DType::bf16}).shape({&batch, &q_heads, &head_dim}).contiguous();
    for (const auto& [cache, name] : {std::pair{&k_cache, "k_cache"}, std::pair{&v_cache, "v_cache"}}) {
        contract(*cache, name)
            .dtype({q.dtype})
            .shape({&pages, &kv_heads, &page_size, &head_dim})
            .contiguous();
    }
    contract(block_table, "block_table").dtype({DType::i32}).shape({&batch, &max_blocks}).contiguous();
    contract(context_lengths, "context_lengths").dtype({DType::i32}).shape({&batch}).contiguous();
    contract(out, "out").dtype({q.dtype}).shape({&batch, &q_heads, &head_dim}).contiguous();
    contract.require(kv_heads.value() > 0 && q_heads.value() % kv_heads.value() == 0,
                     "Hq (of q) must be a multiple of Hkv (of k_cache)");
    PagedDecodeAttentionArguments arguments;
    arguments.q = q.data;
    arguments.cache = {k_cache.data,     v_cache.data,      pages.value(),
                       kv_heads.value(), page_size.value(), head_dim.value()};
    arguments.block_table = block_table.as<const int32_t>();
    arguments.context_lengths = context_lengths.as<const int32_t>();
    arguments.out = out.data;
    arguments.batch = batch.value();
    arguments.q_heads = q_heads.value();
    arguments.max_blocks = max_blocks.value();
    arguments.dtype = q.dtype;
    arguments.scale = static_cast<float>(scale);
    return arguments;
}

inline SampleTokensArguments check_sample_tokens(Device device, const TensorView& logits,
                                                 const TensorView& temperature, const TensorView& top_k,
                                                 const TensorView& top_p, const TensorView& seeds,
                                                 const TensorView& positions, const TensorView& out) {
    Contract contract("sample_tokens", device);
    Dim batch("B"), vocabulary("V");
    SampleTokensArguments arguments;
    arguments.logits = contract(logits, "logits").dtype({DType::f32}).rows(batch, vocabulary);
    contract(temperature, "temperature").dtype({DType::f32}).shape({&batch}).contiguous();
    contract(top_k, "top_k").dtype({DType::i32}).shape({&batch}).contiguous();
    contract(top_p, "top_p").dtype({DType::f32}).shape({&batch}).contiguous();
    contract(seeds, "seeds").dtype({DType::i64}).shape({&batch}).contiguous();
    contract(positions, "positions").dtype({DType::i32}).shape({&batch}).contiguous();
    contract(out, "out").dtype({DType::i64}).shape({&batch}).contiguous();
    arguments.temperature = temperature.as<const float>();
    arguments.top_k = top_k.as<const int32_t>();
    arguments.top_p = top_p.as<const float>();
    arguments.seeds = seeds.as<const int64_t>();
    arguments.positions = positions.as<const int32_t>();
    arguments.out = out.as<int64_t>();
    return arguments;
}

inline NearestCodeArguments check_nearest_code(Device device, const TensorView& features,
                                               const TensorView& codebook, const TensorView& out) {
    Contract contract("nearest_code", device);
    Dim rows("N"), codes("C"), width("D");
    NearestCodeArguments arguments;
    arguments.features = contract(features, "features").dtype({DType::f32}).rows(rows, width);
    arguments.codebook = contract(codebook, "codebook").dtype({DType::f32}).rows(codes, width);
    contract(out, "out").dtype({DType::i64}).shape({&rows}).contiguous();
    contract.require(codes.value() > 0, "codebook must have at least one row");
    contract.require(width.value() > 0, "features and codebook must be at least one wide");
    arguments.out = out.as<int64_t>();
    return arguments;
}

}  // namespace blip3o
