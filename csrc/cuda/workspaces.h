// How much scratch memory kernels want from their caller: sizes that depend on shapes, never on data.
#pragma once

#include <cstdint>

namespace blip3o::cuda {

// Keys that one block of paged_decode_attention and decode_attention attends to. A context is always split at the
// same positions, whatever the batch and the width of the page table: a sequence's result is always the same sum.
constexpr int kAttentionSplit = 64;

// What paged_decode_attention, decode_attention and sample_tokens need beside their arguments. `arrived` is zero
// before the first launch, and every launch leaves it so.
struct LaunchScratch {
    void* memory;       // of attention_workspace or sample_tokens_workspace
    unsigned* arrived;  // [batch, kv_heads], or [batch]
};

// Logits that one block of sample_tokens reads.
constexpr int kSampleChunk = 16 * 1024;

// The tokens of one chunk that may be among the row's first top_k, in any order (sample_tokens.cu has them).
struct SampleChunk {
    int64_t count;                 // -1: the chunk holds NaN or +inf
    unsigned long long low, high;  // bounds of its ranks
    int64_t unused;                // the ranks begin at a multiple of 16 bytes
    unsigned long long ranks[kSampleChunk];
};

constexpr int64_t splits_of(int64_t positions) { return (positions + kAttentionSplit - 1) / kAttentionSplit; }

constexpr int64_t sample_chunks(int64_t vocabulary) { return (vocabulary + kSampleChunk - 1) / kSampleChunk; }

// Floats: for each sequence, head and split the sums of its values, the largest score and the weights' sum.
constexpr int64_t attention_workspace(int64_t batch, int64_t q_heads, int64_t head_dim, int64_t positions) {
    return batch * q_heads * splits_of(positions) * (head_dim + 2);
}

// Numbers of 8 bytes.
constexpr int64_t sample_tokens_workspace(int64_t batch, int64_t vocabulary) {
    return batch * sample_chunks(vocabulary) * static_cast<int64_t>(sizeof(SampleChunk) / sizeof(int64_t));
}

}  // namespace blip3o::cuda
