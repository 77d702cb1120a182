// Attention of one query per sequence over its pages of the KV cache, split over keys.
//
// Tiling   attend_split: one block per sequence, KV head and 64 keys; all query heads of the KV head share
//          its one reading of K and V. A lane takes 16 bytes of a key's row, so that a row of 128 bfloat16
//          is half a warp; every K and V of the block is loaded into registers before anything is computed.
//          combine: one block per sequence and head adds up the splits.
// Bytes    K and V once, 4 D bytes per key and KV head in bfloat16; and 4 (D + 2) bytes per split and query
//          head, written and read: 6% more for Qwen3-1.7B.
// FLOPs    4 D per key and query head.
// Bound    memory; for one short sequence launch latency, and that of two loads (block table, then K and V).
// State    not yet run on hardware; the logic is tested on the CPU (tests/csrc/simt).
//
// A context is cut at multiples of 64 and its splits are added up in their order, so a sequence's bits depend
// on nothing but its own query, keys and values. Lengths and tables are on the device, so nobody can be told
// of a wrong one: a length that the table does not hold, and a page that does not exist, give NaN.
#include "cuda/convert.h"
#include "cuda/launch.h"
#include "cuda/ops.h"
#include "cuda/warp.h"
#include "cuda/workspaces.h"

namespace blip3o::cuda {
namespace {

constexpr int kSplit = kAttentionSplit;

// What the blocks of attend_split leave for combine.
struct Partials {
    float* sums;    // [batch, q_heads, splits, head_dim] of weight * v
    float2* scale;  // [batch, q_heads, splits]: the largest score, and the sum of the weights
    int64_t splits;
};

// A length that the table does not hold reads as 0 here; combine gives NaN for it.
__device__ inline int context_length(const PagedDecodeAttentionArguments& a, int64_t sequence) {
    const int64_t length = a.context_lengths[sequence];
    return length >= 0 && length <= a.max_blocks * a.cache.page_size ? static_cast<int>(length) : 0;
}

__device__ inline int heads_per_kv_head(const PagedDecodeAttentionArguments& a) {
    return static_cast<int>(a.q_heads) / static_cast<int>(a.cache.kv_heads);
}

// The row of the cache, counted in heads of head_dim elements, that holds a position; -1 on a page that does
// not exist.
__device__ inline int64_t cache_row(const PagedDecodeAttentionArguments& a, int64_t sequence, int64_t kv_head,
                                    int position) {
    const auto page_size = static_cast<uint32_t>(a.cache.page_size), key = static_cast<uint32_t>(position);
    const int64_t page = a.block_table[sequence * a.max_blocks + key / page_size];
    const int64_t row = (page * a.cache.kv_heads + kv_head) * page_size + key % page_size;
    return page >= 0 && page < a.cache.pages ? row : -1;
}

// How a block of attend_split divides 64 keys of kHeadDim elements: kSteps rows per lane, at most 8.
template <class T, int kHeadDim>
struct Division {
    static constexpr int kPack = kWidestPack<T>;
    static constexpr int kLanesPerKey = kHeadDim / kPack, kKeysPerWarp = kWarp / kLanesPerKey;
    static constexpr int kWarps = kKeysPerWarp == 1 ? 8 : 4, kThreads = kWarps * kWarp;
    static constexpr int kSteps = kSplit / (kWarps * kKeysPerWarp);
    static constexpr int kBlocks = 12 / kWarps;  // on a multiprocessor: up to 96 KiB on the way
    static_assert(kThreads >= kHeadDim);
};

// One head's softmax over the keys that each warp has, to be merged over the warps.
template <int kWarps, int kHeadDim>
struct HeadParts {
    float largest[kWarps], total[kWarps], sums[kWarps][kHeadDim];
};

// Adds up the warps' parts, in their order, and leaves the split's.
template <int kWarps, int kHeadDim>
__device__ void merge_warps(const HeadParts<kWarps, kHeadDim>& parts, const Partials& partials,
                            int64_t entry) {
    float largest = parts.largest[0], total = 0.0f, sum = 0.0f;
    for (int w = 1; w < kWarps; ++w) largest = fmaxf(largest, parts.largest[w]);
    const int channel = threadIdx.x;
    if (channel >= kHeadDim) return;
    for (int w = 0; w < kWarps; ++w) {
        const float scale = expf(parts.largest[w] - largest);  // 0 for a warp without keys
        total += scale * parts.total[w];
        sum += scale * parts.sums[w][channel];
    }
    partials.sums[entry * kHeadDim + channel] = sum;
    if (channel == 0) partials.scale[entry] = make_float2(largest, total);
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(Division<T, kHeadDim>::kThreads, Division<T, kHeadDim>::kBlocks)
    attend_split_kernel(PagedDecodeAttentionArguments a, Partials partials) {
    using D = Division<T, kHeadDim>;
    const int64_t sequence = blockIdx.z, kv_head = blockIdx.y;
    const int first_key = static_cast<int>(blockIdx.x) * kSplit, length = context_length(a, sequence);
    if (first_key >= length) return;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int channel = lane % D::kLanesPerKey * D::kPack;
    const int own_key = first_key + warp * D::kKeysPerWarp + lane / D::kLanesPerKey;  // of the first step
    constexpr int kKeysPerStep = D::kWarps * D::kKeysPerWarp;

    Pack<T, D::kPack> k[D::kSteps], v[D::kSteps];
    int64_t rows[D::kSteps];
#pragma unroll
    for (int s = 0; s < D::kSteps; ++s) {
        const int key = own_key + s * kKeysPerStep;  // past the context: the last one, for want of a branch
        rows[s] = cache_row(a, sequence, kv_head, key < length ? key : length - 1);
    }
#pragma unroll
    for (int s = 0; s < D::kSteps; ++s) {
        const int64_t offset = rows[s] * kHeadDim + channel;
        const bool inside = rows[s] >= 0 && own_key + s * kKeysPerStep < length;
        k[s] = load_if<Reuse::no>(inside, static_cast<const T*>(a.cache.k) + offset);
        v[s] = load_if<Reuse::no>(inside, static_cast<const T*>(a.cache.v) + offset);
    }

    __shared__ HeadParts<D::kWarps, kHeadDim> parts[2];  // in turn, so that one barrier per head is enough
    const int group = heads_per_kv_head(a);
    for (int g = 0; g < group; ++g) {
        const int64_t head = sequence * a.q_heads + kv_head * group + g;
        const auto query = load_pack<T, D::kPack>(static_cast<const T*>(a.q) + head * kHeadDim + channel);
        float score[D::kSteps], largest = -INFINITY, total = 0.0f, sum[D::kPack] = {};
#pragma unroll
        for (int s = 0; s < D::kSteps; ++s) {
            float dot = 0.0f;
            for (int e = 0; e < D::kPack; ++e) {
                dot += to_float(query.element[e]) * a.scale * to_float(k[s].element[e]);
            }
            dot = sum_over_lanes<D::kLanesPerKey>(dot);
            score[s] = rows[s] < 0 ? nanf("") : dot;
            if (own_key + s * kKeysPerStep < length) largest = fmaxf(largest, score[s]);
        }
#pragma unroll
        for (int distance = D::kLanesPerKey; distance < kWarp; distance *= 2) {
            largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, distance));
        }
#pragma unroll
        for (int s = 0; s < D::kSteps; ++s) {
            const float weight = own_key + s * kKeysPerStep < length ? expf(score[s] - largest) : 0.0f;
            total += weight;
            for (int e = 0; e < D::kPack; ++e) sum[e] += weight * to_float(v[s].element[e]);
        }
#pragma unroll
        for (int distance = D::kLanesPerKey; distance < kWarp; distance *= 2) {
            total += __shfl_xor_sync(kAllLanes, total, distance);
            for (int e = 0; e < D::kPack; ++e) sum[e] += __shfl_xor_sync(kAllLanes, sum[e], distance);
        }
        auto& part = parts[g % 2];
        if (lane < D::kLanesPerKey) {
            for (int e = 0; e < D::kPack; ++e) part.sums[warp][channel + e] = sum[e];
        }
        if (lane == 0) {
            part.largest[warp] = largest;
            part.total[warp] = total;
        }
        __syncthreads();
        merge_warps(part, partials, head * partials.splits + blockIdx.x);
    }
}

constexpr int kAnyThreads = 128, kAnyWarps = kAnyThreads / kWarp;

// The same for heads of any size and alignment, element by element; K and V are read again for each head.
template <class T>
__global__ void __launch_bounds__(kAnyThreads)
    attend_split_any_kernel(PagedDecodeAttentionArguments a, Partials partials) {
    const int64_t sequence = blockIdx.z, kv_head = blockIdx.y, size = a.cache.head_dim;
    const int first_key = static_cast<int>(blockIdx.x) * kSplit, length = context_length(a, sequence);
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
}

constexpr int kCombineThreads = 128;

template <class T>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(PagedDecodeAttentionArguments a, Partials partials) {
    const int64_t sequence = blockIdx.y, head = sequence * a.q_heads + blockIdx.x, size = a.cache.head_dim;
    const int length = context_length(a, sequence);
    const int used = (length + kSplit - 1) / kSplit;
    const float2* scale = partials.scale + head * partials.splits;
    const float* sums = partials.sums + head * partials.splits * size;
    float largest = -INFINITY;
    for (int s = 0; s < used; ++s) largest = fmaxf(largest, scale[s].x);
    for (int64_t c = threadIdx.x; c < size; c += kCombineThreads) {
        float total = 0.0f, sum = 0.0f;
#pragma unroll 4
        for (int s = 0; s < used; ++s) {
            const float weight = expf(scale[s].x - largest);
            total += weight * scale[s].y;
            sum += weight * sums[s * size + c];
        }
        float result = used > 0 ? sum / total : 0.0f;
        if (length != a.context_lengths[sequence]) result = nanf("");
        static_cast<T*>(a.out)[head * size + c] = from_float<T>(result);
    }
}

template <class T, int kHeadDim>
void launch_splits(const PagedDecodeAttentionArguments& a, const Partials& partials, dim3 grid,
                   cudaStream_t stream) {
    launch(attend_split_kernel<T, kHeadDim>, grid, dim3(Division<T, kHeadDim>::kThreads), stream, a,
           partials);
}

template <class T>
void launch_attention(const PagedDecodeAttentionArguments& a, const Partials& partials, cudaStream_t stream) {
    bool packed = true;
    for (const void* pointer :
         {a.q, static_cast<const void*>(a.cache.k), static_cast<const void*>(a.cache.v)}) {
        packed = packed && is_aligned(pointer, 16);
    }
    const dim3 grid(static_cast<unsigned>(partials.splits), static_cast<unsigned>(a.cache.kv_heads),
                    static_cast<unsigned>(a.batch));
    if (partials.splits > 0) {
        if (packed && a.cache.head_dim == 128) {
            launch_splits<T, 128>(a, partials, grid, stream);
        } else if (packed && a.cache.head_dim == 64) {
            launch_splits<T, 64>(a, partials, grid, stream);
        } else {
            launch(attend_split_any_kernel<T>, grid, dim3(kAnyThreads), stream, a, partials);
        }
    }
    launch(combine_kernel<T>, dim3(static_cast<unsigned>(a.q_heads), static_cast<unsigned>(a.batch)),
           dim3(kCombineThreads), stream, a, partials);
}

}  // namespace

void paged_decode_attention(const PagedDecodeAttentionArguments& arguments, void* workspace,
                            cudaStream_t stream) {
    const int64_t splits = splits_of(arguments.max_blocks * arguments.cache.page_size);
    const int64_t entries = arguments.batch * arguments.q_heads * splits;
    if (arguments.batch == 0 || arguments.q_heads == 0 || arguments.cache.head_dim == 0) return;
    auto* scale = static_cast<float2*>(workspace);
    const Partials partials = {reinterpret_cast<float*>(scale + entries), scale, splits};
    arguments.dtype == DType::bf16 ? launch_attention<__nv_bfloat16>(arguments, partials, stream)
                                   : launch_attention<float>(arguments, partials, stream);
}

}  // namespace blip3o::cuda
