// qk_norm_rope_append of one token per sequence, then paged_decode_attention.
#pragma once

#include "blip3o/ops/paged_decode_attention.h"
#include "blip3o/ops/qk_norm_rope_append.h"

namespace blip3o {

constexpr int kMostHeadsPerKvHead = 16;  // whose queries a block has shared memory for

// A new token of each sequence (token.out is not used) and its attention (attention.q is not used).
struct DecodeAttentionArguments {
    QkNormRopeAppendArguments token;
    PagedDecodeAttentionArguments attention;
};

struct DecodeAttention {
    static constexpr char kName[] = "decode_attention";
    static constexpr char kParameters[] =
        "qkv, q_weight, k_weight, cos_sin_cache, positions, slot_mapping, k_cache, v_cache, page_table, "
        "context_lens, eps, scale, *, scratch=None, out";

    // Beyond the contracts of its two ops: sizes and addresses for accesses of 16 bytes.
    static DecodeAttentionArguments check(Device device, const TensorView& qkv, const TensorView& q_weight,
                                          const TensorView& k_weight, const TensorView& cos_sin_cache,
                                          const TensorView& positions, const TensorView& slot_mapping,
                                          const TensorView& k_cache, const TensorView& v_cache,
                                          const TensorView& page_table, const TensorView& context_lens,
                                          double eps, double scale, const Scratch& scratch,
                                          const TensorView& out) {
        DecodeAttentionArguments a;
        a.token = QkNormRopeAppend::check(device, qkv, q_weight, k_weight, cos_sin_cache, positions,
                                          slot_mapping, k_cache, v_cache, eps, out);
        a.attention = PagedDecodeAttention::check(device, out, k_cache, v_cache, page_table, context_lens,
                                                  scale, scratch, out);
        const int64_t head_dim = a.token.cache.head_dim;
        bool aligned = a.token.qkv.stride % 8 == 0;
        for (const TensorView* view : {&qkv, &q_weight, &k_weight, &cos_sin_cache, &k_cache, &v_cache}) {
            aligned = aligned && reinterpret_cast<uintptr_t>(view->data) % 16 == 0;
        }
        const Contract contract(kName, device);
        contract.require(head_dim == 64 || head_dim == 128, "D must be 64 or 128");
        contract.require(a.token.q_heads <= kMostHeadsPerKvHead * a.token.cache.kv_heads,
                         "there must be at most 16 query heads for each KV head");
        contract.require(aligned, "rows must begin at multiples of 16 bytes (call .contiguous())");
        return a;
    }
};

}  // namespace blip3o
