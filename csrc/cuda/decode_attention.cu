// A new token's attention in one launch: RMSNorm and rotation of its query and key heads, the append of key and
// value to the KV cache, and its attention over the cache, split over keys.
//
// Tiling   that of paged_decode_attention.cu. While its K and V are on their way, each block norms and rotates
//          the query heads it needs, a warp each; the block of the newest position makes key and value too,
//          attends to them out of shared memory and writes them to the cache, where nobody reads them.
// Bytes    those of paged_decode_attention; and the token's q heads once per split, from a cache.
// FLOPs    4 D per key and query head, and about 12 per element of q per split.
// Bound    memory; for one short sequence latency: of one launch instead of three, of two rounds of loads (length,
//          position, slot and page table, then K and V; the norms hide behind them), of the count of arrivals,
//          and of one round of loads behind it.
//
// Queries, keys and values are rounded as qk_norm_rope_append rounds them, so the bits are those of the two ops
// one after the other. A token whose position or slot is wrong gets NaN and is not written.
#include "cuda/launch.h"
#include "cuda/ops.h"
#include "cuda/split_attention.h"

namespace blip3o::cuda {
namespace {

template <class T, int kHeadDim>
void launch_token(const DecodeAttentionArguments& arguments, const Partials& partials, cudaStream_t stream) {
    launch(attend_split_kernel<T, kHeadDim, true>, grid_of(arguments.attention, partials),
           dim3(Division<T, kHeadDim>::kThreads), stream, arguments.attention, arguments.token, partials);
}

template <class T>
void launch_attention(const DecodeAttentionArguments& arguments, const Partials& partials,
                      cudaStream_t stream) {
    arguments.token.cache.head_dim == 128 ? launch_token<T, 128>(arguments, partials, stream)
                                          : launch_token<T, 64>(arguments, partials, stream);
}

}  // namespace

void decode_attention(const DecodeAttentionArguments& arguments, const LaunchScratch& scratch,
                      cudaStream_t stream) {
    if (arguments.attention.batch == 0 || arguments.attention.q_heads == 0) return;
    const Partials partials = partials_in(scratch, arguments.attention);
    arguments.attention.dtype == DType::bf16 ? launch_attention<__nv_bfloat16>(arguments, partials, stream)
                                             : launch_attention<float>(arguments, partials, stream);
}

}  // namespace blip3o::cuda
