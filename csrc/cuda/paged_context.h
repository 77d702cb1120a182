// Where the contexts of sequences are in a paged cache: what all attention over it has in common.
#pragma once

#include <cstdint>

namespace blip3o::cuda {

// A length that the table does not hold reads as -1.
template <class Arguments>
__device__ int context_length(const Arguments& a, int64_t sequence) {
    const int64_t length = a.context_lens[sequence];
    return length >= 0 && length <= a.max_pages * a.cache.page_size ? static_cast<int>(length) : -1;
}

template <class Arguments>
__device__ int heads_per_kv_head(const Arguments& a) {
    return static_cast<int>(a.q_heads) / static_cast<int>(a.cache.kv_heads);
}

// The row of the cache, counted in heads of head_dim elements (of which no GPU holds 2^31), that is so far on a
// page; -1 on a page that does not exist.
template <class Arguments>
__device__ int row_on_page(const Arguments& a, int page, int kv_head, uint32_t offset) {
    const uint32_t first = page * static_cast<uint32_t>(a.cache.kv_heads) + kv_head;
    const bool exists = page >= 0 && page < a.cache.pages;
    return exists ? static_cast<int>(first * static_cast<uint32_t>(a.cache.page_size) + offset) : -1;
}

// The row that a position is in.
template <class Arguments>
__device__ int cache_row(const Arguments& a, int64_t sequence, int kv_head, int position) {
    const auto page_size = static_cast<uint32_t>(a.cache.page_size), key = static_cast<uint32_t>(position);
    const int page = a.page_table[sequence * a.max_pages + key / page_size];
    return row_on_page(a, page, kv_head, key % page_size);
}

}  // namespace blip3o::cuda
