// RMSNorm and rotation of query and key heads; keys and values go to the KV cache.
#pragma once

#include "blip3o/paged_cache.h"

namespace blip3o {

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

struct QkNormRopeAppend {
    static constexpr char kName[] = "qk_norm_rope_append";
    static constexpr char kParameters[] =
        "qkv, q_weight, k_weight, cos_sin_cache, positions, slot_mapping, k_cache, v_cache, eps, *, out";

    static QkNormRopeAppendArguments check(Device device, const TensorView& qkv, const TensorView& q_weight,
                                           const TensorView& k_weight, const TensorView& cos_sin_cache,
                                           const TensorView& positions, const TensorView& slot_mapping,
                                           const TensorView& k_cache, const TensorView& v_cache, double eps,
                                           const TensorView& out) {
        Contract contract(kName, device);
        Dim tokens("T"), packed("(Hq + 2 Hkv) D"), q_heads("Hq"), head_dim("D"),
            max_positions("max_positions");
        QkNormRopeAppendArguments a;
        a.dtype = qkv.dtype;
        a.qkv = contract(qkv, "qkv").dtype(kFloats).rows(tokens, packed);
        a.q_weight = contract(q_weight, "q_weight").array(qkv.dtype, {&head_dim});
        a.k_weight = contract(k_weight, "k_weight").array(qkv.dtype, {&head_dim});
        a.cos_sin_cache = contract(cos_sin_cache, "cos_sin_cache").array<float>({&max_positions, &head_dim});
        a.positions = contract(positions, "positions").array<int32_t>({&tokens});
        a.slot_mapping = contract(slot_mapping, "slot_mapping").array<int32_t>({&tokens});
        a.cache = check_cache(contract, k_cache, v_cache, qkv.dtype, head_dim);
        a.out = contract(out, "out").array(qkv.dtype, {&tokens, &q_heads, &head_dim});
        contract.require(head_dim.value() % 2 == 0,
                         "D must be even: rotary embedding turns pairs of channels");
        contract.require(packed.value() == (q_heads.value() + 2 * a.cache.kv_heads) * head_dim.value(),
                         "qkv must be (Hq + 2 Hkv) D wide, Hq and D as in out, Hkv as in k_cache");
        a.tokens = tokens.value();
        a.q_heads = q_heads.value();
        a.max_positions = max_positions.value();
        a.eps = static_cast<float>(eps);
        return a;
    }

    static void check_values(const QkNormRopeAppendArguments& a) {
        const int64_t slots = a.cache.pages * a.cache.page_size;
        for (int64_t token = 0; token < a.tokens; ++token) {
            check_element(kName, "positions", token, a.positions[token], 0, a.max_positions - 1,
                          "the rows of cos_sin_cache");
            check_element(kName, "slot_mapping", token, a.slot_mapping[token], -1, slots - 1,
                          "the slots of the cache (-1: not written)");
        }
    }

    static Work work(const QkNormRopeAppendArguments& a) { return {a.tokens, 2 * a.qkv.width}; }  // tokens
};

}  // namespace blip3o
