// The KV cache that the ops of the decoder share.
#pragma once

#include "blip3o/op.h"

namespace blip3o {

// [pages, kv_heads, page_size, head_dim], contiguous.
struct PagedCache {
    void *k, *v;
    int64_t pages, kv_heads, page_size, head_dim;
};

inline PagedCache check_cache(Contract& contract, const TensorView& k_cache, const TensorView& v_cache,
                              DType dtype, Dim& head_dim) {
    Dim pages("pages"), kv_heads("Hkv"), page_size("page_size");
    void* k = contract(k_cache, "k_cache").array(dtype, {&pages, &kv_heads, &page_size, &head_dim});
    void* v = contract(v_cache, "v_cache").array(dtype, {&pages, &kv_heads, &page_size, &head_dim});
    return {k, v, pages.value(), kv_heads.value(), page_size.value(), head_dim.value()};
}

inline void require_grouped_heads(const Contract& contract, int64_t q_heads, const PagedCache& cache) {
    contract.require(cache.kv_heads > 0 && q_heads % cache.kv_heads == 0,
                     "Hq (of q) must be a multiple of Hkv (of k_cache)");
}

}  // namespace blip3o
