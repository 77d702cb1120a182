// Causal attention of prompts over their pages of the KV cache.
#pragma once

#include "blip3o/paged_cache.h"

namespace blip3o {

constexpr int kMostPromptHeadDim = 256;  // that the GPU's kernels have registers for

struct PagedPrefillAttentionArguments {
    const void* q;  // [tokens, q_heads, head_dim]
    PagedCache cache;
    const int32_t *page_table, *cu_seqlens_q, *context_lens;
    void* out;
    int64_t tokens, batch, q_heads, max_pages;
    DType dtype;
    float scale;
};

struct PagedPrefillAttention {
    static constexpr char kName[] = "paged_prefill_attention";
    static constexpr char kParameters[] =
        "q, k_cache, v_cache, page_table, cu_seqlens_q, context_lens, scale, *, out";

    static PagedPrefillAttentionArguments check(Device device, const TensorView& q, const TensorView& k_cache,
                                                const TensorView& v_cache, const TensorView& page_table,
                                                const TensorView& cu_seqlens_q,
                                                const TensorView& context_lens, double scale,
                                                const TensorView& out) {
        Contract contract(kName, device);
        Dim tokens("T"), batch("B"), starts("B + 1"), q_heads("Hq"), head_dim("D"), max_pages("max_pages");
        PagedPrefillAttentionArguments a;
        a.dtype = q.dtype;
        a.q = contract(q, "q").dtype(kFloats).array(q.dtype, {&tokens, &q_heads, &head_dim});
        a.cache = check_cache(contract, k_cache, v_cache, q.dtype, head_dim);
        a.page_table = contract(page_table, "page_table").array<int32_t>({&batch, &max_pages});
        a.cu_seqlens_q = contract(cu_seqlens_q, "cu_seqlens_q").array<int32_t>({&starts});
        a.context_lens = contract(context_lens, "context_lens").array<int32_t>({&batch});
        a.out = contract(out, "out").array(q.dtype, {&tokens, &q_heads, &head_dim});
        require_grouped_heads(contract, q_heads.value(), a.cache);
        contract.require(head_dim.value() <= kMostPromptHeadDim, "D must be at most 256");
        contract.require(starts.value() == batch.value() + 1,
                         "cu_seqlens_q must have one element more than context_lens");
        a.tokens = tokens.value();
        a.batch = batch.value();
        a.q_heads = q_heads.value();
        a.max_pages = max_pages.value();
        a.scale = static_cast<float>(scale);
        return a;
    }
};

}  // namespace blip3o
