// Linear attention with a ReLU kernel.
#pragma once

#include "blip3o/op.h"

namespace blip3o {

struct ReluLinearAttentionArguments {
    Rows qkv, out;                    // rows are the tokens of all batches
    const void *q_weight, *k_weight;  // may be null: no norm
    float* inverse_rms;               // [batch * tokens, 2]: of q and of k; memory of the caller
    int64_t batch, tokens, heads, head_dim;
    DType dtype;
    float eps;
};

struct ReluLinearAttention {
    static constexpr char kName[] = "relu_linear_attention";
    static constexpr char kParameters[] = "qkv, q_weight, k_weight, num_heads, eps, *, out";

    static ReluLinearAttentionArguments check(Device device, const TensorView& qkv,
                                              const OptionalView& q_weight, const OptionalView& k_weight,
                                              int64_t num_heads, double eps, const TensorView& out) {
        Contract contract(kName, device);
        Dim batch("B"), tokens("N"), packed("3 D"), width("D"), rows("B N");
        ReluLinearAttentionArguments a = {};
        a.dtype = qkv.dtype;
        a.qkv = contract(qkv, "qkv").dtype(kFloats).shape({&batch, &tokens, &packed}).rows(rows, packed);
        a.out = contract(out, "out").dtype({qkv.dtype}).rows(rows, width);
        a.q_weight = contract(q_weight, "q_weight").array(qkv.dtype, {&width});
        a.k_weight = contract(k_weight, "k_weight").array(qkv.dtype, {&width});
        contract.require(packed.value() == 3 * width.value(), "qkv must be three times as wide as out");
        contract.require(num_heads > 0 && width.value() % num_heads == 0,
                         "D must be a multiple of num_heads");
        a.batch = batch.value();
        a.tokens = tokens.value();
        a.heads = num_heads;
        a.head_dim = width.value() / num_heads;
        a.eps = static_cast<float>(eps);
        return a;
    }

    // (batch, head) pairs.
    static Work work(const ReluLinearAttentionArguments& a) {
        return {a.qkv.count > 0 ? a.batch * a.heads : 0, a.tokens * a.head_dim * a.head_dim};
    }
};

}  // namespace blip3o
