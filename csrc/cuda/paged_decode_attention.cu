// Attention of one query per sequence over its pages of the KV cache, split over keys.
//
// Tiling   one block per sequence, KV head and 64 keys; all query heads of the KV head share its one reading
//          of K and V, two of them in one pass. A lane takes 16 bytes of a key's row, so that a row of 128
//          bfloat16 is half a warp; every K and V of the block is loaded into registers before anything is
//          computed. The last block of a sequence and KV head adds up the splits, 16 in one round of loads.
// Bytes    K and V once, 4 D bytes per key and KV head in bfloat16; and 4 (D + 2) bytes per split and query
//          head, written and read: 6% more for Qwen3-1.7B.
// FLOPs    4 D per key and query head.
// Bound    memory; for one short sequence latency: of the launch, of two rounds of loads (length and page table,
//          then K and V), of the count of arrivals, one atomic operation, and of one round of loads behind it.
//
// What it has in common with decode_attention.cu, and what it makes of wrong lengths and pages, is in
// split_attention.h.
#include "cuda/split_attention.h"

#include "cuda/dependent_launch.h"
#include "cuda/launch.h"
#include "cuda/ops.h"

namespace blip3o::cuda {
namespace {

constexpr int kAnyThreads = 128, kAnyWarps = kAnyThreads / kWarp;

// The same for heads of any size and alignment, element by element; K and V are read again for each head.
template <class T>
__global__ void __launch_bounds__(kAnyThreads)
    attend_split_any_kernel(PagedDecodeAttentionArguments a, Partials partials) {
    wait_for_previous_kernel();
    const int64_t sequence = blockIdx.z, kv_head = blockIdx.y, size = a.cache.head_dim;
    const int first_key = static_cast<int>(blockIdx.x) * kSplit, length = context_length(a, sequence);
    if (length <= 0) {
        if (blockIdx.x == 0) fill_heads<T>(a, sequence, kv_head, length == 0 ? 0.0f : nanf(""));
        return;
    }
    if (first_key >= length) return;
    const int keys = length - first_key < kSplit ? length - first_key : kSplit;
    const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;

    __shared__ int64_t rows[kSplit];
    __shared__ float weights[kSplit];
    if (thread < keys) rows[thread] = cache_row(a, sequence, kv_head, first_key + thread);
    __syncthreads();
    const int group = heads_per_kv_head(a);
    for (int g = 0; g < group; ++g) {
        const int64_t head = sequence * a.q_heads + kv_head * group + g;
        const int64_t entry = head * partials.splits + blockIdx.x;
        const T* query = static_cast<const T*>(a.q) + head * size;
        for (int p = warp; p < keys; p += kAnyWarps) {
            const T* key = static_cast<const T*>(a.cache.k) + rows[p] * size;
            float dot = rows[p] < 0 ? nanf("") : 0.0f;
            for (int64_t i = lane; i < size && rows[p] >= 0; i += kWarp) {
                dot += to_float(query[i]) * a.scale * to_float(key[i]);
            }
            dot = sum_over_lanes(dot);
            if (lane == 0) weights[p] = dot;
        }
        __syncthreads();
        float largest = -INFINITY, total = 0.0f;
        for (int p = 0; p < keys; ++p) largest = fmaxf(largest, weights[p]);
        __syncthreads();
        if (thread < keys) weights[thread] = expf(weights[thread] - largest);
        __syncthreads();
        for (int p = 0; p < keys; ++p) total += weights[p];
        for (int64_t c = thread; c < size; c += kAnyThreads) {
            float sum = 0.0f;
            for (int p = 0; p < keys; ++p) {
                if (rows[p] < 0) continue;
                sum += weights[p] * to_float(static_cast<const T*>(a.cache.v)[rows[p] * size + c]);
            }
            partials.sums[entry * size + c] = sum;
        }
        if (thread == 0) partials.scale[entry] = make_float2(largest, total);
        __syncthreads();
    }
    combine_if_last<T, 1>(a, partials, sequence, kv_head, length);
}

template <class T>
void launch_attention(const PagedDecodeAttentionArguments& a, const Partials& partials, cudaStream_t stream) {
    bool packed = true;
    for (const void* pointer :
         {a.q, static_cast<const void*>(a.cache.k), static_cast<const void*>(a.cache.v)}) {
        packed = packed && is_aligned(pointer, 16);
    }
    const QkNormRopeAppendArguments no_token = {};
    const dim3 grid = grid_of(a, partials);
    if (packed && a.cache.head_dim == 128) {
        launch(attend_split_kernel<T, 128, false>, grid, dim3(Division<T, 128>::kThreads), stream, a,
               no_token, partials);
    } else if (packed && a.cache.head_dim == 64) {
        launch(attend_split_kernel<T, 64, false>, grid, dim3(Division<T, 64>::kThreads), stream, a, no_token,
               partials);
    } else {
        launch(attend_split_any_kernel<T>, grid, dim3(kAnyThreads), stream, a, partials);
    }
}

}  // namespace

void paged_decode_attention(const PagedDecodeAttentionArguments& arguments, const LaunchScratch& scratch,
                            cudaStream_t stream) {
    const PagedDecodeAttentionArguments& a = arguments;
    if (a.batch == 0 || a.q_heads == 0 || a.cache.head_dim == 0) return;
    const Partials partials = partials_in(scratch, a);
    a.dtype == DType::bf16 ? launch_attention<__nv_bfloat16>(a, partials, stream)
                           : launch_attention<float>(a, partials, stream);
}

}  // namespace blip3o::cuda
