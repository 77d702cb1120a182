// Attention of one query per sequence over its pages of the KV cache.
#pragma once

#include "blip3o/paged_cache.h"

namespace blip3o {

struct PagedDecodeAttentionArguments {
    const void* q;
    PagedCache cache;
    const int32_t *page_table, *context_lens;
    void* out;
    int64_t batch, q_heads, max_pages;
    DType dtype;
    float scale;
};

struct PagedDecodeAttention {
    static constexpr char kName[] = "paged_decode_attention";
    static constexpr char kParameters[] =
        "q, k_cache, v_cache, page_table, context_lens, scale, *, scratch=None, out";

    static PagedDecodeAttentionArguments check(Device device, const TensorView& q, const TensorView& k_cache,
                                               const TensorView& v_cache, const TensorView& page_table,
                                               const TensorView& context_lens, double scale, const Scratch&,
                                               const TensorView& out) {
        Contract contract(kName, device);
        Dim batch("B"), q_heads("Hq"), head_dim("D"), max_pages("max_pages");
        PagedDecodeAttentionArguments a;
        a.dtype = q.dtype;
        a.q = contract(q, "q").dtype(kFloats).array(q.dtype, {&batch, &q_heads, &head_dim});
        a.cache = check_cache(contract, k_cache, v_cache, q.dtype, head_dim);
        a.page_table = contract(page_table, "page_table").array<int32_t>({&batch, &max_pages});
        a.context_lens = contract(context_lens, "context_lens").array<int32_t>({&batch});
        a.out = contract(out, "out").array(q.dtype, {&batch, &q_heads, &head_dim});
        require_grouped_heads(contract, q_heads.value(), a.cache);
        a.batch = batch.value();
        a.q_heads = q_heads.value();
        a.max_pages = max_pages.value();
        a.scale = static_cast<float>(scale);
        return a;
    }

    static void check_values(const PagedDecodeAttentionArguments& a) {
        for (int64_t b = 0; b < a.batch; ++b) {
            check_element(kName, "context_lens", b, a.context_lens[b], 0, a.max_pages * a.cache.page_size,
                          "what page_table holds");
            const int64_t blocks = ceil_divide(a.context_lens[b], a.cache.page_size);
            for (int64_t block = 0; block < blocks; ++block) {
                check_element(kName, "page_table", b, block, a.page_table[b * a.max_pages + block], 0,
                              a.cache.pages - 1, "the pages of k_cache");
            }
        }
    }

    // (sequence, KV head) pairs.
    static Work work(const PagedDecodeAttentionArguments& a) {
        return {a.batch * a.cache.kv_heads, a.max_pages * a.cache.page_size * a.cache.head_dim};
    }
};

}  // namespace blip3o
