// The contract of each op, checked once for every device: tensor views in, kernel arguments out.
//
// Shapes, dtypes and semantics are documented with the ops in blip3o_rt/ops. Each function throws
// ArgumentError.
#pragma once

#include "blip3o/tensor_view.h"

namespace blip3o {

using OptionalView = std::optional<TensorView>;

// An argument of an op that an implementation has no use for: any object.
struct Unused {};

inline const void* data_or_null(const OptionalView& view) { return view ? view->data : nullptr; }

// Scratch memory of a call whose other arguments are where `beside` is: at least `elements` of one dtype.
inline void* check_workspace(const char* op, const TensorView& workspace, DType dtype, int64_t elements,
                             const TensorView& beside, const char* name = "workspace") {
    Contract contract(op, beside.device);
    Dim size("elements");
    contract(beside, "the first argument");
    contract(workspace, name).dtype({dtype}).shape({&size}).contiguous();
    contract.require(size.value() >= elements, "the scratch memory is too small for these shapes");
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

inline RowLinearInt8Arguments check_row_linear_w8(Device device, const TensorView& x,
                                                  const TensorView& weight, const TensorView& scale,
                                                  const OptionalView& bias, const TensorView& out) {
    Contract contract("row_linear_w8", device);
    Dim rows("M"), inputs("K"), outputs("N");
    RowLinearInt8Arguments arguments;
    arguments.x = contract(x, "x").dtype({DType::f32, DType::bf16}).rows(rows, inputs);
    arguments.weight = contract(weight, "weight").dtype({DType::i8, DType::e4m3}).rows(outputs, inputs);
    contract(scale, "scale").dtype({DType::f32}).shape({&outputs}).contiguous();
    contract(bias, "bias").dtype({x.dtype}).shape({&outputs}).contiguous();
    arguments.out = contract(out, "out").dtype({x.dtype, DType::f32}).rows(rows, outputs);
    contract.require(rows.value() == 0 || inputs.value() == 0 || out.data != x.data,
                     "out must not be the memory of x; give it memory of its own");
    arguments.scale = scale.as<const float>();
    arguments.bias = data_or_null(bias);
    arguments.dtype = x.dtype;
    arguments.weight_dtype = weight.dtype;
    arguments.out_dtype = out.dtype;
    return arguments;
}

inline LinearArguments check_linear(const char* op, Device device, const TensorView& x,
                                    const TensorView& weight, DType weight_dtype, const OptionalView& scale,
                                    const OptionalView& bias, const TensorView& out) {
    Contract contract(op, device);
    Dim rows("M"), inputs("K"), outputs("N");
    LinearArguments arguments;
    arguments.x = contract(x, "x").dtype({DType::bf16}).rows(rows, inputs);
    arguments.weight = contract(weight, "weight").dtype({weight_dtype}).rows(outputs, inputs);
    contract(scale, "scale").dtype({DType::f32}).shape({&outputs}).contiguous();
    contract(bias, "bias").dtype({DType::bf16}).shape({&outputs}).contiguous();
    arguments.out = contract(out, "out").dtype({DType::bf16}).rows(rows, outputs);
    contract.require(inputs.value() % 2 == 0, "K must be even: steps are multiplied in pairs");
    contract.require(rows.value() == 0 || inputs.value() == 0 || out.data != x.data,
                     "out must not be the memory of x; give it memory of its own");
    arguments.scale = static_cast<const float*>(data_or_null(scale));
    arguments.bias = data_or_null(bias);
    arguments.weight_dtype = weight_dtype;
    arguments.pair_products = false;
    return arguments;
}

inline QuantizeRowsArguments check_quantize_rows(Device device, const TensorView& x, const TensorView& scale,
                                                 const TensorView& out) {
    Contract contract("quantize_rows", device);
    Dim rows("M"), width("K");
    QuantizeRowsArguments arguments;
    arguments.x = contract(x, "x").dtype({DType::f32, DType::bf16}).rows(rows, width);
    contract(scale, "scale").dtype({DType::f32}).shape({&rows}).contiguous();
    arguments.out = contract(out, "out").dtype({DType::i8}).rows(rows, width);
    arguments.scale = scale.as<float>();
    arguments.dtype = x.dtype;
    return arguments;
}

inline ScaleProductArguments check_scale_product(Device device, const TensorView& product,
                                                 const TensorView& scale, const OptionalView& row_scale,
                                                 const OptionalView& bias, const TensorView& out) {
    Contract contract("scale_product", device);
    Dim rows("M"), columns("N");
    ScaleProductArguments arguments;
    contract(product, "product").dtype({DType::i32, DType::f32, DType::bf16});
    arguments.product = contract(product, "product").rows(rows, columns);
    contract(scale, "scale").dtype({DType::f32}).shape({&columns}).contiguous();
    contract(row_scale, "row_scale").dtype({DType::f32}).shape({&rows}).contiguous();
    if (product.dtype == DType::i32) {
        contract(out, "out").dtype({DType::f32, DType::bf16});
    } else {
        contract(out, "out").dtype({product.dtype});
    }
    arguments.out = contract(out, "out").rows(rows, columns);
    contract(bias, "bias").dtype({out.dtype}).shape({&columns}).contiguous();
    arguments.scale = scale.as<const float>();
    arguments.row_scale = row_scale ? row_scale->as<const float>() : nullptr;
    arguments.bias = data_or_null(bias);
    arguments.product_dtype = product.dtype;
    arguments.dtype = out.dtype;
    return arguments;
}

// A plain product as one that could have neighbours.
inline RowProductArguments row_product(const RowLinearArguments& a) {
    return {a.x,  a.weight, a.out, nullptr, a.bias,  nullptr,
            0.0f, false,    false, a.dtype, a.dtype, a.out_dtype};
}

inline RowProductArguments row_product(const RowLinearInt8Arguments& a) {
    return {a.x,  a.weight, a.out, a.scale, a.bias,         nullptr,
            0.0f, false,    false, a.dtype, a.weight_dtype, a.out_dtype};
}

// x, and a weight of its dtype, or of 8 bits with a scale for each row.
inline RowProductArguments check_row_product(Contract& contract, const TensorView& x,
                                             const TensorView& weight, const OptionalView& scale, Dim& rows,
                                             Dim& inputs, Dim& weight_rows) {
    RowProductArguments arguments = {};
    arguments.x = contract(x, "x").dtype({DType::f32, DType::bf16}).rows(rows, inputs);
    arguments.weight = contract(weight, "weight").rows(weight_rows, inputs);
    if (scale) {
        contract(weight, "weight").dtype({DType::i8, DType::e4m3});
    } else {
        contract(weight, "weight").dtype({x.dtype});
    }
    contract(scale, "scale").dtype({DType::f32}).shape({&weight_rows}).contiguous();
    arguments.scale = static_cast<const float*>(data_or_null(scale));
    arguments.dtype = arguments.out_dtype = x.dtype;
    arguments.weight_dtype = weight.dtype;
    return arguments;
}

inline RowProductArguments check_norm_row_linear(Device device, const TensorView& x,
                                                 const TensorView& norm_weight, double eps,
                                                 const TensorView& weight, const OptionalView& scale,
                                                 bool gated, const TensorView& out) {
    Contract contract("norm_row_linear", device);
    Dim rows("M"), inputs("K"), weight_rows(gated ? "2 N" : "N"), outputs("N");
    RowProductArguments arguments = check_row_product(contract, x, weight, scale, rows, inputs, weight_rows);
    contract(norm_weight, "norm_weight").dtype({x.dtype}).shape({&inputs}).contiguous();
    arguments.out = contract(out, "out").dtype({x.dtype}).rows(rows, outputs);
    contract.require(weight_rows.value() == (gated ? 2 : 1) * outputs.value(),
                     gated ? "weight must have a gate row and an up row for each column of out"
                           : "weight must have a row for each column of out");
    contract.require(rows.value() == 0 || inputs.value() == 0 || out.data != x.data,
                     "out must not be the memory of x; give it memory of its own");
    arguments.norm_weight = norm_weight.data;
    arguments.eps = static_cast<float>(eps);
    arguments.gated = gated;
    return arguments;
}

// For the CUDA kernel, whose blocks norm the rows one and all.
inline RowProductArguments check_few_norm_row_linear(Device device, const TensorView& x,
                                                     const TensorView& norm_weight, double eps,
                                                     const TensorView& weight, const OptionalView& scale,
                                                     bool gated, const TensorView& out) {
    const auto arguments = check_norm_row_linear(device, x, norm_weight, eps, weight, scale, gated, out);
    Contract("norm_row_linear", device)
        .require(x.dtype == DType::bf16 && arguments.x.count <= 8,
                 "this kernel takes up to 8 rows of bfloat16; norm them with rms_norm and multiply then");
    return arguments;
}

inline RowProductArguments check_row_linear_add(Device device, const TensorView& x, const TensorView& weight,
                                                const TensorView& residual, const OptionalView& scale) {
    Contract contract("row_linear_add", device);
    Dim rows("M"), inputs("K"), outputs("N");
    RowProductArguments arguments = check_row_product(contract, x, weight, scale, rows, inputs, outputs);
    arguments.out = contract(residual, "residual").dtype({x.dtype}).rows(rows, outputs);
    contract.require(rows.value() == 0 || inputs.value() == 0 || residual.data != x.data,
                     "residual must not be the memory of x; give it memory of its own");
    arguments.adds = true;
    return arguments;
}

inline QkNormRopeAppendArguments check_qk_norm_rope_append(
    Device device, const TensorView& qkv, const TensorView& q_weight, const TensorView& k_weight,
    const TensorView& cos_sin_cache, const TensorView& positions, const TensorView& slot_mapping,
    const TensorView& k_cache, const TensorView& v_cache, double eps, const TensorView& out,
    const char* op = "qk_norm_rope_append") {
    Contract contract(op, device);
    Dim tokens("T"), packed("(Hq + 2 Hkv) D"), q_heads("Hq"), head_dim("D"), max_positions("max_positions");
    Dim pages("pages"), kv_heads("Hkv"), page_size("page_size");
    QkNormRopeAppendArguments arguments;
    arguments.qkv = contract(qkv, "qkv").dtype({DType::f32, DType::bf16}).rows(tokens, packed);
    contract(q_weight, "q_weight").dtype({qkv.dtype}).shape({&head_dim}).contiguous();
    contract(k_weight, "k_weight").dtype({qkv.dtype}).shape({&head_dim}).contiguous();
    contract(cos_sin_cache, "cos_sin_cache")
        .dtype({DType::f32})
        .shape({&max_positions, &head_dim})
        .contiguous();
    contract(positions, "positions").dtype({DType::i32}).shape({&tokens}).contiguous();
    contract(slot_mapping, "slot_mapping").dtype({DType::i32}).shape({&tokens}).contiguous();
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
    arguments.cos_sin_cache = cos_sin_cache.as<const float>();
    arguments.positions = positions.as<const int32_t>();
    arguments.slot_mapping = slot_mapping.as<const int32_t>();
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
    const TensorView& page_table, const TensorView& context_lens, double scale, const TensorView& out,
    const char* op = "paged_decode_attention") {
    Contract contract(op, device);
    Dim batch("B"), q_heads("Hq"), head_dim("D"), max_blocks("max_blocks");
    Dim pages("pages"), kv_heads("Hkv"), page_size("page_size");
    contract(q, "q").dtype({DType::f32, DType::bf16}).shape({&batch, &q_heads, &head_dim}).contiguous();
    for (const auto& [cache, name] : {std::pair{&k_cache, "k_cache"}, std::pair{&v_cache, "v_cache"}}) {
        contract(*cache, name)
            .dtype({q.dtype})
            .shape({&pages, &kv_heads, &page_size, &head_dim})
            .contiguous();
    }
    contract(page_table, "page_table").dtype({DType::i32}).shape({&batch, &max_blocks}).contiguous();
    contract(context_lens, "context_lens").dtype({DType::i32}).shape({&batch}).contiguous();
    contract(out, "out").dtype({q.dtype}).shape({&batch, &q_heads, &head_dim}).contiguous();
    contract.require(kv_heads.value() > 0 && q_heads.value() % kv_heads.value() == 0,
                     "Hq (of q) must be a multiple of Hkv (of k_cache)");
    PagedDecodeAttentionArguments arguments;
    arguments.q = q.data;
    arguments.cache = {k_cache.data,     v_cache.data,      pages.value(),
                       kv_heads.value(), page_size.value(), head_dim.value()};
    arguments.page_table = page_table.as<const int32_t>();
    arguments.context_lens = context_lens.as<const int32_t>();
    arguments.out = out.data;
    arguments.batch = batch.value();
    arguments.q_heads = q_heads.value();
    arguments.max_blocks = max_blocks.value();
    arguments.dtype = q.dtype;
    arguments.scale = static_cast<float>(scale);
    return arguments;
}

inline PagedPrefillAttentionArguments check_paged_prefill_attention(
    Device device, const TensorView& q, const TensorView& k_cache, const TensorView& v_cache,
    const TensorView& page_table, const TensorView& cu_seqlens_q, const TensorView& context_lens,
    double scale, const TensorView& out) {
    Contract contract("paged_prefill_attention", device);
    Dim tokens("T"), batch("B"), starts("B + 1"), q_heads("Hq"), head_dim("D"), max_blocks("max_blocks");
    Dim pages("pages"), kv_heads("Hkv"), page_size("page_size");
    contract(q, "q").dtype({DType::f32, DType::bf16}).shape({&tokens, &q_heads, &head_dim}).contiguous();
    for (const auto& [cache, name] : {std::pair{&k_cache, "k_cache"}, std::pair{&v_cache, "v_cache"}}) {
        contract(*cache, name)
            .dtype({q.dtype})
            .shape({&pages, &kv_heads, &page_size, &head_dim})
            .contiguous();
    }
    contract(page_table, "page_table").dtype({DType::i32}).shape({&batch, &max_blocks}).contiguous();
    contract(cu_seqlens_q, "cu_seqlens_q").dtype({DType::i32}).shape({&starts}).contiguous();
    contract(context_lens, "context_lens").dtype({DType::i32}).shape({&batch}).contiguous();
    contract(out, "out").dtype({q.dtype}).shape({&tokens, &q_heads, &head_dim}).contiguous();
    contract.require(kv_heads.value() > 0 && q_heads.value() % kv_heads.value() == 0,
                     "Hq (of q) must be a multiple of Hkv (of k_cache)");
    contract.require(head_dim.value() <= kMostPromptHeadDim, "D must be at most 256");
    contract.require(starts.value() == batch.value() + 1,
                     "cu_seqlens_q must have one element more than context_lens");
    PagedPrefillAttentionArguments arguments;
    arguments.q = q.data;
    arguments.cache = {k_cache.data,     v_cache.data,      pages.value(),
                       kv_heads.value(), page_size.value(), head_dim.value()};
    arguments.page_table = page_table.as<const int32_t>();
    arguments.cu_seqlens_q = cu_seqlens_q.as<const int32_t>();
    arguments.context_lens = context_lens.as<const int32_t>();
    arguments.out = out.data;
    arguments.tokens = tokens.value();
    arguments.batch = batch.value();
    arguments.q_heads = q_heads.value();
    arguments.max_blocks = max_blocks.value();
    arguments.dtype = q.dtype;
    arguments.scale = static_cast<float>(scale);
    return arguments;
}

// Beyond the contracts of the two ops that it stands for: sizes and addresses that one access of 16 bytes fits.
inline DecodeAttentionArguments check_decode_attention(
    Device device, const TensorView& qkv, const TensorView& q_weight, const TensorView& k_weight,
    const TensorView& cos_sin_cache, const TensorView& positions, const TensorView& slot_mapping,
    const TensorView& k_cache, const TensorView& v_cache, const TensorView& page_table,
    const TensorView& context_lens, double eps, double scale, const TensorView& out) {
    const char* op = "decode_attention";
    DecodeAttentionArguments arguments;
    arguments.token = check_qk_norm_rope_append(device, qkv, q_weight, k_weight, cos_sin_cache, positions,
                                                slot_mapping, k_cache, v_cache, eps, out, op);
    arguments.attention =
        check_paged_decode_attention(device, out, k_cache, v_cache, page_table, context_lens, scale, out, op);
    const int64_t head_dim = arguments.token.cache.head_dim;
    bool aligned = arguments.token.qkv.stride % 8 == 0;
    for (const TensorView* view : {&qkv, &q_weight, &k_weight, &cos_sin_cache, &k_cache, &v_cache}) {
        aligned = aligned && reinterpret_cast<uintptr_t>(view->data) % 16 == 0;
    }
    const Contract contract(op, device);
    contract.require(head_dim == 64 || head_dim == 128, "D must be 64 or 128");
    contract.require(arguments.token.q_heads <= kMostHeadsPerKvHead * arguments.token.cache.kv_heads,
                     "there must be at most 16 query heads for each KV head");
    contract.require(aligned, "rows must begin at multiples of 16 bytes (call .contiguous())");
    return arguments;
}

// inverse_rms is left to the caller, who owns that memory.
inline ReluLinearAttentionArguments check_relu_linear_attention(Device device, const TensorView& qkv,
                                                                const OptionalView& q_weight,
                                                                const OptionalView& k_weight,
                                                                int64_t num_heads, double eps,
                                                                const TensorView& out) {
    Contract contract("relu_linear_attention", device);
    Dim batch("B"), tokens("N"), packed("3 D"), width("D");
    ReluLinearAttentionArguments arguments;
    Dim rows("B N");
    contract(qkv, "qkv").dtype({DType::f32, DType::bf16}).shape({&batch, &tokens, &packed});
    arguments.qkv = contract(qkv, "qkv").rows(rows, packed);
    arguments.out = contract(out, "out").dtype({qkv.dtype}).rows(rows, width);
    contract(q_weight, "q_weight").dtype({qkv.dtype}).shape({&width}).contiguous();
    contract(k_weight, "k_weight").dtype({qkv.dtype}).shape({&width}).contiguous();
    contract.require(packed.value() == 3 * width.value(), "qkv must be three times as wide as out");
    contract.require(num_heads > 0 && width.value() % num_heads == 0, "D must be a multiple of num_heads");
    arguments.q_weight = data_or_null(q_weight);
    arguments.k_weight = data_or_null(k_weight);
    arguments.inverse_rms = nullptr;
    arguments.batch = batch.value();
    arguments.tokens = tokens.value();
    arguments.heads = num_heads;
    arguments.head_dim = width.value() / num_heads;
    arguments.dtype = qkv.dtype;
    arguments.eps = static_cast<float>(eps);
    return arguments;
}

// inverse_rms is left to the caller, who owns that memory.
inline CrossAttentionArguments check_cross_attention(Device device, const TensorView& query,
                                                     const TensorView& key, const TensorView& value,
                                                     const OptionalView& query_weight, double eps,
                                                     const OptionalView& log_multiplicity,
                                                     const TensorView& out) {
    Contract contract("cross_attention", device);
    Dim tokens("N"), width("H d"), heads("H"), keys("M"), head_dim("d");
    CrossAttentionArguments arguments;
    arguments.query = contract(query, "query").dtype({DType::f32, DType::bf16}).rows(tokens, width);
    for (const auto& [view, name] : {std::pair{&key, "key"}, std::pair{&value, "value"}}) {
        contract(*view, name).dtype({query.dtype}).shape({&heads, &keys, &head_dim});
        contract.require(view->stride[2] == 1 || view->shape[2] == 1,
                         "rows of key and value must be contiguous (call .contiguous())");
    }
    contract(query_weight, "query_weight").dtype({query.dtype}).shape({&width}).contiguous();
    contract(log_multiplicity, "log_multiplicity").dtype({DType::f32}).shape({&keys}).contiguous();
    arguments.out = contract(out, "out").dtype({query.dtype}).rows(tokens, width);
    contract.require(width.value() == heads.value() * head_dim.value(),
                     "query must be H d wide, H and d as in key");
    contract.require(keys.value() > 0 && head_dim.value() > 0, "there must be at least one key, one wide");
    arguments.key = {key.data, key.stride[0], key.stride[1]};
    arguments.value = {value.data, value.stride[0], value.stride[1]};
    arguments.query_weight = data_or_null(query_weight);
    arguments.log_multiplicity = static_cast<const float*>(data_or_null(log_multiplicity));
    arguments.inverse_rms = nullptr;
    arguments.heads = heads.value();
    arguments.keys = keys.value();
    arguments.head_dim = head_dim.value();
    arguments.dtype = query.dtype;
    arguments.eps = static_cast<float>(eps);
    arguments.pair_products = false;
    return arguments;
}

inline DepthwiseGluArguments check_depthwise_glu(Device device, const TensorView& x,
                                                 const TensorView& input_bias, const TensorView& weight,
                                                 const TensorView& bias, const TensorView& out) {
    Contract contract("depthwise_glu", device);
    Dim batch("B"), height("H"), width("W"), doubled("2 C"), channels("C"), one("1"), taps("3"),
        rows("B H W");
    DepthwiseGluArguments arguments;
    contract(x, "x").dtype({DType::f32, DType::bf16}).shape({&batch, &height, &width, &doubled});
    arguments.x = contract(x, "x").rows(rows, doubled);
    contract(input_bias, "input_bias").dtype({x.dtype}).shape({&doubled}).contiguous();
    contract(weight, "weight").dtype({x.dtype}).shape({&doubled, &one, &taps, &taps}).contiguous();
    contract(bias, "bias").dtype({x.dtype}).shape({&doubled}).contiguous();
    contract(out, "out").dtype({x.dtype}).shape({&batch, &height, &width, &channels});
    arguments.out = contract(out, "out").rows(rows, channels);
    contract.require(doubled.value() == 2 * channels.value(), "x must be twice as wide as out");
    contract.require(one.value() == 1 && taps.value() == 3, "weight must be [2 C, 1, 3, 3]");
    contract.require(rows.value() == 0 || out.data != x.data,
                     "out must not be the memory of x; give it memory of its own");
    arguments.input_bias = input_bias.data;
    arguments.weight = weight.data;
    arguments.bias = bias.data;
    arguments.batch = batch.value();
    arguments.height = height.value();
    arguments.width = width.value();
    arguments.channels = channels.value();
    arguments.dtype = x.dtype;
    return arguments;
}

inline LayerNormModulateArguments check_layer_norm_modulate(Device device, const TensorView& x,
                                                            const TensorView& shift, const TensorView& scale,
                                                            double eps, const TensorView& out) {
    Contract contract("layer_norm_modulate", device);
    Dim rows("rows"), width("D");
    LayerNormModulateArguments arguments;
    arguments.x = contract(x, "x").dtype({DType::f32, DType::bf16}).rows(rows, width);
    contract(shift, "shift").dtype({DType::f32, x.dtype}).shape({&width}).contiguous();
    contract(scale, "scale").dtype({shift.dtype}).shape({&width}).contiguous();
    arguments.out = contract(out, "out").dtype({x.dtype, DType::f32}).rows(rows, width);
    arguments.shift = shift.data;
    arguments.scale = scale.data;
    arguments.dtype = x.dtype;
    arguments.modulation_dtype = shift.dtype;
    arguments.out_dtype = out.dtype;
    arguments.eps = static_cast<float>(eps);
    return arguments;
}

inline GatedAddArguments check_gated_add(Device device, const TensorView& residual, const TensorView& x,
                                         const TensorView& gate) {
    Contract contract("gated_add", device);
    Dim rows("rows"), width("D");
    GatedAddArguments arguments;
    arguments.residual = contract(residual, "residual").dtype({DType::f32, DType::bf16}).rows(rows, width);
    arguments.x = contract(x, "x").dtype({residual.dtype}).rows(rows, width);
    contract(gate, "gate").dtype({DType::f32, residual.dtype}).shape({&width}).contiguous();
    arguments.gate = gate.data;
    arguments.dtype = residual.dtype;
    arguments.gate_dtype = gate.dtype;
    return arguments;
}

inline ChannelRmsNormArguments check_channel_rms_norm(Device device, const TensorView& x,
                                                      const TensorView& weight, const TensorView& bias,
                                                      double eps, const OptionalView& residual, bool relu,
                                                      const TensorView& out) {
    Contract contract("channel_rms_norm", device);
    Dim rows("rows"), width("C");
    ChannelRmsNormArguments arguments;
    arguments.x = contract(x, "x").dtype({DType::f32, DType::bf16}).rows(rows, width);
    contract(weight, "weight").dtype({x.dtype}).shape({&width}).contiguous();
    contract(bias, "bias").dtype({x.dtype}).shape({&width}).contiguous();
    arguments.residual = contract(residual, "residual").dtype({x.dtype}).rows(rows, width);
    arguments.out = contract(out, "out").dtype({x.dtype}).rows(rows, width);
    arguments.weight = weight.data;
    arguments.bias = bias.data;
    arguments.dtype = x.dtype;
    arguments.eps = static_cast<float>(eps);
    arguments.relu = relu;
    return arguments;
}

// Of both directions: up from x to a result of twice its sides, or down to one of half of them.
inline PixelShuffleArguments check_pixel_shuffle(const char* op, Device device, bool up,
                                                 const TensorView& result, const TensorView& x,
                                                 const OptionalView& bias) {
    Contract contract(op, device);
    Dim batch("B"), height("H"), width("W"), tall("2 H"), wide("2 W"), narrow("C"), deep("D");
    Dim &rows = up ? tall : height, &columns = up ? wide : width;
    Dim &x_rows = up ? height : tall, &x_columns = up ? width : wide;
    contract(result, "result").dtype({DType::f32, DType::bf16}).shape({&batch, &rows, &columns, &narrow});
    contract(result, "result").contiguous();
    contract(x, "x").dtype({result.dtype}).shape({&batch, &x_rows, &x_columns, &deep}).contiguous();
    contract(bias, "bias").dtype({result.dtype}).shape({&narrow}).contiguous();
    contract.require(tall.value() == 2 * height.value() && wide.value() == 2 * width.value(),
                     "the sides of one image must be twice those of the other");
    const int64_t coarse = up ? deep.value() : narrow.value(), fine = up ? narrow.value() : deep.value();
    contract.require(coarse > 0 && 4 * fine % coarse == 0,
                     "4 times the channels of the larger image must be a multiple of the smaller one's");
    return {result.data,   x.data,         bias ? bias->data : nullptr,
            batch.value(), height.value(), width.value(),
            coarse,        fine,           result.dtype};
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

inline AdvanceRowsArguments check_advance_rows(Device device, const TensorView& sampled_ids,
                                               const TensorView& first_ids, const TensorView& page_table,
                                               int64_t page_size, const TensorView& num_generated,
                                               const TensorView& context_lens, const TensorView& output_slots,
                                               const TensorView& output_ids, const TensorView& positions,
                                               const TensorView& slot_mapping, const TensorView& out) {
    Contract contract("advance_rows", device);
    Dim rows("B"), max_blocks("max_blocks"), num_output_slots("N");
    AdvanceRowsArguments arguments;
    contract(sampled_ids, "sampled_ids").dtype({DType::i64}).shape({&rows}).contiguous();
    contract(first_ids, "first_ids").dtype({DType::i64}).shape({&rows}).contiguous();
    contract(page_table, "page_table").dtype({DType::i32}).shape({&rows, &max_blocks}).contiguous();
    contract(num_generated, "num_generated").dtype({DType::i32}).shape({&rows}).contiguous();
    contract(context_lens, "context_lens").dtype({DType::i32}).shape({&rows}).contiguous();
    contract(output_slots, "output_slots").dtype({DType::i64}).shape({&rows}).contiguous();
    contract(output_ids, "output_ids").dtype({DType::i64}).shape({&num_output_slots}).contiguous();
    contract(positions, "positions").dtype({DType::i32}).shape({&rows}).contiguous();
    contract(slot_mapping, "slot_mapping").dtype({DType::i32}).shape({&rows}).contiguous();
    contract(out, "out").dtype({DType::i64}).shape({&rows}).contiguous();
    contract.require(page_size > 0, "page_size must be at least 1");
    arguments.sampled_ids = sampled_ids.as<const int64_t>();
    arguments.first_ids = first_ids.as<const int64_t>();
    arguments.page_table = page_table.as<const int32_t>();
    arguments.num_generated = num_generated.as<int32_t>();
    arguments.context_lens = context_lens.as<int32_t>();
    arguments.output_slots = output_slots.as<int64_t>();
    arguments.output_ids = output_ids.as<int64_t>();
    arguments.positions = positions.as<int32_t>();
    arguments.slot_mapping = slot_mapping.as<int32_t>();
    arguments.out = out.as<int64_t>();
    arguments.rows = rows.value();
    arguments.max_blocks = max_blocks.value();
    arguments.page_size = page_size;
    arguments.num_output_slots = num_output_slots.value();
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
