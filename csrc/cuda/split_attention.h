// Attention of one query per sequence over its pages of the KV cache, split over keys: what
// paged_decode_attention and decode_attention have in common.
//
// A context is cut at multiples of 64 and its splits are added up in their order, by the block that is the
// last to arrive: a sequence's bits depend on nothing but its own query, keys and values. Lengths and tables
// are on the device, so a wrong one cannot be reported: a length that the table does not hold, and a page
// that does not exist, give NaN.
#pragma once

#include "blip3o/ops/decode_attention.h"
#include "cuda/convert.h"
#include "cuda/norm_and_rotate.h"
#include "cuda/paged_context.h"
#include "cuda/warp.h"
#include "cuda/workspaces.h"

namespace blip3o::cuda {
namespace {

constexpr int kSplit = kAttentionSplit;

// What the blocks of a sequence and KV head leave for the last of them.
struct Partials {
    float* sums;        // [batch, q_heads, splits, head_dim] of weight * v
    float2* scale;      // [batch, q_heads, splits]: the largest score, and the sum of the weights
    unsigned* arrived;  // [batch, kv_heads]: blocks that have left their part; zero between launches
    int64_t splits;
};

inline Partials partials_in(const AttentionScratch& scratch, const PagedDecodeAttentionArguments& a) {
    const int64_t splits = splits_of(a.max_blocks * a.cache.page_size);
    auto* scale = static_cast<float2*>(scratch.partials);
    auto* sums = reinterpret_cast<float*>(scale + a.batch * a.q_heads * splits);
    return {sums, scale, scratch.arrived, splits};
}

// One block per split, KV head and sequence; one for a table that holds nothing.
inline dim3 grid_of(const PagedDecodeAttentionArguments& a, const Partials& partials) {
    return dim3(static_cast<unsigned>(partials.splits > 0 ? partials.splits : 1),
                static_cast<unsigned>(a.cache.kv_heads), static_cast<unsigned>(a.batch));
}

// The results of a KV head's query heads where there is nothing to attend to.
template <class T>
__device__ void fill_heads(const PagedDecodeAttentionArguments& a, int64_t sequence, int64_t kv_head,
                           float value) {
    const int64_t elements = heads_per_kv_head(a) * a.cache.head_dim;
    T* out = static_cast<T*>(a.out) + sequence * a.q_heads * a.cache.head_dim + kv_head * elements;
    for (int64_t i = threadIdx.x; i < elements; i += blockDim.x) out[i] = from_float<T>(value);
}

// Called by all threads once they have left the block's part. The last block of the sequence and KV head adds
// up the splits, and sets the count back for the next launch.
template <class T>
__device__ void combine_if_last(const PagedDecodeAttentionArguments& a, const Partials& partials,
                                int64_t sequence, int64_t kv_head, int length) {
    __shared__ bool last;
    const int used = (length + kSplit - 1) / kSplit;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        const auto ticket = static_cast<unsigned>(used - 1);  // of the last to come
        last = atomicInc(&partials.arrived[sequence * a.cache.kv_heads + kv_head], ticket) == ticket;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    const int size = static_cast<int>(a.cache.head_dim), group = heads_per_kv_head(a);
    const int64_t first_head = sequence * a.q_heads + kv_head * group;
    for (int i = threadIdx.x; i < group * size; i += blockDim.x) {
        const int64_t head = first_head + i / size;
        const float2* scale = partials.scale + head * partials.splits;
        const float* sums = partials.sums + head * partials.splits * size + i % size;
        float largest = -INFINITY, total = 0.0f, sum = 0.0f;
        for (int s = 0; s < used; ++s) largest = fmaxf(largest, __ldcg(scale + s).x);
#pragma unroll 4
        for (int s = 0; s < used; ++s) {
            const float2 part = __ldcg(scale + s);
            const float weight = expf(part.x - largest);
            total += weight * part.y;
            sum += weight * __ldcg(sums + s * size);
        }
        static_cast<T*>(a.out)[first_head * size + i] = from_float<T>(sum / total);
    }
}

// How a block divides 64 keys of kHeadDim elements: kSteps rows per lane, at most 8.
template <class T, int kHeadDim>
struct Division {
    static constexpr int kPack = kWidestPack<T>;
    static constexpr int kLanesPerKey = kHeadDim / kPack, kKeysPerWarp = kWarp / kLanesPerKey;
    static constexpr int kWarps = kKeysPerWarp == 1 ? 8 : 4, kThreads = kWarps * kWarp;
    static constexpr int kKeysPerStep = kWarps * kKeysPerWarp, kSteps = kSplit / kKeysPerStep;
    // On a multiprocessor, to have up to 96 KiB on the way where a token's time depends on it.
    static constexpr int blocks(bool hot) { return (hot ? 12 : 8) / kWarps; }
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

// Whether a token's position is in the table of rotations, and its slot the place of its context's last
// position, or -1.
__device__ inline bool has_place(const PagedDecodeAttentionArguments& a,
                                 const QkNormRopeAppendArguments& token, int64_t sequence, int length) {
    const int64_t position = token.positions[sequence];
    const int32_t slot = token.slot_mapping[sequence];
    if (position < 0 || position >= token.max_positions) return false;
    if (slot < 0 || length <= 0) return slot == -1;
    const auto page_size = static_cast<uint32_t>(a.cache.page_size), key = static_cast<uint32_t>(length - 1);
    const int64_t page = a.page_table[sequence * a.max_blocks + key / page_size];
    return page >= 0 && page < a.cache.pages && slot == page * page_size + key % page_size;
}

// The heads of a token that a block makes itself: its queries, and the newest key and value.
template <class T, int kHeadDim>
struct TokenHeads {
    alignas(16) T queries[kMostHeadsPerKvHead][kHeadDim];
    alignas(16) T key[kHeadDim];
    alignas(16) T value[kHeadDim];
};

// Makes the queries for every block; key and value only for the one that `has_newest`. Ends with a barrier.
template <class T, int kHeadDim>
__device__ void make_heads(TokenHeads<T, kHeadDim>& heads, const QkNormRopeAppendArguments& token,
                           int64_t sequence, int64_t kv_head, int group, bool has_newest) {
    const T* packed = static_cast<const T*>(token.qkv.data) + sequence * token.qkv.stride;
    const T* queries = packed + kv_head * group * kHeadDim;
    const T* key = packed + (token.q_heads + kv_head) * kHeadDim;
    const T* value = key + token.cache.kv_heads * kHeadDim;
    const float* rotation = token.cos_sin_cache + int64_t{token.positions[sequence]} * kHeadDim;
    const int warps = blockDim.x / kWarp;
    for (int head = threadIdx.x / kWarp; head < group + has_newest; head += warps) {
        const bool is_key = head == group;
        const void* weight = is_key ? token.k_weight : token.q_weight;
        norm_and_rotate<T, kRotatedPack>(is_key ? heads.key : heads.queries[head],
                                         is_key ? key : queries + head * kHeadDim,
                                         static_cast<const T*>(weight), rotation, kHeadDim, token.eps);
    }
    if (has_newest && threadIdx.x < kHeadDim) heads.value[threadIdx.x] = value[threadIdx.x];
    __syncthreads();
}

// kMakesHeads: q, and the newest key and value, come from `token` instead of a.q and the cache.
template <class T, int kHeadDim, bool kMakesHeads>
__global__ void __launch_bounds__(Division<T, kHeadDim>::kThreads, Division<T, kHeadDim>::blocks(kMakesHeads))
    attend_split_kernel(PagedDecodeAttentionArguments a, QkNormRopeAppendArguments token, Partials partials) {
    using D = Division<T, kHeadDim>;
    const int sequence = static_cast<int>(blockIdx.z), kv_head = static_cast<int>(blockIdx.y);
    const int first_key = static_cast<int>(blockIdx.x) * kSplit, length = context_length(a, sequence);
    const bool valid = length >= 0 && (!kMakesHeads || has_place(a, token, sequence, length));
    if (!valid || length == 0) {
        if (blockIdx.x == 0) fill_heads<T>(a, sequence, kv_head, valid ? 0.0f : nanf(""));
        return;
    }
    if (first_key >= length) return;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, group = heads_per_kv_head(a);
    const int channel = lane % D::kLanesPerKey * D::kPack;
    const int own_key = first_key + warp * D::kKeysPerWarp + lane / D::kLanesPerKey;  // of the first step
    const int newest =
        kMakesHeads && token.slot_mapping[sequence] >= 0 ? length - 1 : -1;  // not in the cache yet

    Pack<T, D::kPack> k[D::kSteps], v[D::kSteps];
    int rows[D::kSteps];
#pragma unroll
    for (int s = 0; s < D::kSteps; ++s) {
        const int key =
            own_key + s * D::kKeysPerStep;  // past the context: the last one, for want of a branch
        rows[s] = cache_row(a, sequence, kv_head, key < length ? key : length - 1);
    }
#pragma unroll
    for (int s = 0; s < D::kSteps; ++s) {
        const int64_t offset = int64_t{rows[s]} * kHeadDim + channel;
        const int key = own_key + s * D::kKeysPerStep;
        const bool cached = rows[s] >= 0 && key < length && (!kMakesHeads || key != newest);
        k[s] = load_if<Reuse::no>(cached, static_cast<const T*>(a.cache.k) + offset);
        v[s] = load_if<Reuse::no>(cached, static_cast<const T*>(a.cache.v) + offset);
    }

    __shared__ TokenHeads<T, kMakesHeads ? kHeadDim : 1> heads;
    if constexpr (kMakesHeads) {  // while keys and values are on their way
        const bool has_newest = newest >= first_key && newest < first_key + kSplit;
        make_heads(heads, token, sequence, kv_head, group, has_newest);
#pragma unroll
        for (int s = 0; s < D::kSteps; ++s) {
            if (own_key + s * D::kKeysPerStep != newest) continue;
            const int64_t offset = int64_t{rows[s]} * kHeadDim + channel;
            k[s] = load_pack<T, D::kPack>(heads.key + channel);
            v[s] = load_pack<T, D::kPack>(heads.value + channel);
            store_pack(static_cast<T*>(a.cache.k) + offset, k[s]);
            store_pack(static_cast<T*>(a.cache.v) + offset, v[s]);
        }
    }

    __shared__ HeadParts<D::kWarps, kHeadDim> parts[2];  // in turn, so that one barrier per head is enough
    for (int g = 0; g < group; ++g) {
        const int64_t head = int64_t{sequence} * a.q_heads + kv_head * group + g;
        const T* queries = kMakesHeads ? heads.queries[g] : static_cast<const T*>(a.q) + head * kHeadDim;
        const auto query = load_pack<T, D::kPack>(queries + channel);
        float score[D::kSteps], largest = -INFINITY, total = 0.0f, sum[D::kPack] = {};
#pragma unroll
        for (int s = 0; s < D::kSteps; ++s) {
            float dot = 0.0f;
            for (int e = 0; e < D::kPack; ++e) {
                dot += to_float(query.element[e]) * a.scale * to_float(k[s].element[e]);
            }
            dot = sum_over_lanes<D::kLanesPerKey>(dot);
            score[s] = rows[s] < 0 ? nanf("") : dot;
            if (own_key + s * D::kKeysPerStep < length) largest = fmaxf(largest, score[s]);
        }
#pragma unroll
        for (int distance = D::kLanesPerKey; distance < kWarp; distance *= 2) {
            largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, distance));
        }
#pragma unroll
        for (int s = 0; s < D::kSteps; ++s) {
            const float weight = own_key + s * D::kKeysPerStep < length ? expf(score[s] - largest) : 0.0f;
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
    combine_if_last<T>(a, partials, sequence, kv_head, length);
}

}  // namespace
}  // namespace blip3o::cuda
