// Attention of one query per sequence over its pages of the KV cache, split over keys: what
// paged_decode_attention and decode_attention have in common.
//
// A context is cut at multiples of 64 and its splits are added up in their order, by the block that is the
// last to arrive: a sequence's bits depend on nothing but its own query, keys and values. Lengths and tables
// are on the device, so a wrong one cannot be reported: a length that the table does not hold, and a page
// that does not exist, give NaN.
#pragma once

#include "blip3o/ops/decode_attention.h"
#include "cuda/arrival.h"
#include "cuda/convert.h"
#include "cuda/dependent_launch.h"
#include "cuda/norm_and_rotate.h"
#include "cuda/paged_context.h"
#include "cuda/warp.h"
#include "cuda/workspaces.h"

namespace blip3o::cuda {
namespace {

constexpr int kSplit = kAttentionSplit;
constexpr int kSplitsAtOnce = 16;  // added up in one round of loads: a context of 1,024
constexpr int kHeadsAtOnce = 2;    // query heads of a KV head that a block computes in one pass

// What the blocks of a sequence and KV head leave for the last of them.
struct Partials {
    float* sums;        // [batch, q_heads, splits, head_dim] of weight * v
    float2* scale;      // [batch, q_heads, splits]: the largest score, and the sum of the weights
    unsigned* arrived;  // [batch, kv_heads]: blocks that have left their part; zero between launches
    int64_t splits;
};

inline Partials partials_in(const LaunchScratch& scratch, const PagedDecodeAttentionArguments& a) {
    const int64_t splits = splits_of(a.max_pages * a.cache.page_size);
    auto* scale = static_cast<float2*>(scratch.memory);
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
// up the splits, kPack neighboring channels a thread.
template <class T, int kPack>
__device__ void combine_if_last(const PagedDecodeAttentionArguments& a, const Partials& partials,
                                int64_t sequence, int64_t kv_head, int length) {
    const int used = (length + kSplit - 1) / kSplit;
    if (!is_last_to_arrive(&partials.arrived[sequence * a.cache.kv_heads + kv_head], used)) return;
    const int size = static_cast<int>(a.cache.head_dim), group = heads_per_kv_head(a);
    const int64_t first_head = sequence * a.q_heads + kv_head * group;
    for (int i = threadIdx.x * kPack; i < group * size; i += blockDim.x * kPack) {
        const int64_t head = first_head + i / size;
        const float2* scale = partials.scale + head * partials.splits;
        const float* sums = partials.sums + head * partials.splits * size + i % size;
        float largest = -INFINITY, total = 0.0f, sum[kPack] = {};
        for (int first = 0; first < used; first += kSplitsAtOnce) {
            float2 part[kSplitsAtOnce];
            float value[kSplitsAtOnce][kPack];
#pragma unroll
            for (int s = 0; s < kSplitsAtOnce; ++s) {
                // Past the last split: that again, for want of a branch.
                const int split = first + s < used ? first + s : used - 1;
                part[s] = __ldcg(scale + split);
                for (int e = 0; e < kPack; ++e) value[s][e] = __ldcg(sums + split * size + e);
            }
            const float before = largest;
#pragma unroll
            for (int s = 0; s < kSplitsAtOnce; ++s) largest = fmaxf(largest, part[s].x);
            const float rescale = expf(before - largest);  // 0 at first
            total *= rescale;
            for (int e = 0; e < kPack; ++e) sum[e] *= rescale;
#pragma unroll
            for (int s = 0; s < kSplitsAtOnce; ++s) {
                if (first + s >= used) break;
                const float weight = expf(part[s].x - largest);
                total += weight * part[s].y;
                for (int e = 0; e < kPack; ++e) sum[e] += weight * value[s][e];
            }
        }
        T* out = static_cast<T*>(a.out) + first_head * size + i;
        for (int e = 0; e < kPack; ++e) out[e] = from_float<T>(sum[e] / total);
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
};

// One head's softmax over the keys that each warp has, to be merged over the warps.
template <int kWarps, int kHeadDim>
struct HeadParts {
    float largest[kWarps], total[kWarps], sums[kWarps][kHeadDim];
};

// Adds up the warps' parts of `heads` heads from head `first_head` on, in their order, and leaves the split's.
template <int kWarps, int kHeadDim>
__device__ void merge_warps(const HeadParts<kWarps, kHeadDim> (&parts)[kHeadsAtOnce], int heads,
                            const Partials& partials, int64_t first_head) {
    for (int i = threadIdx.x; i < heads * kHeadDim; i += kWarps * kWarp) {
        const auto& part = parts[i / kHeadDim];
        const int channel = i % kHeadDim;
        float largest = part.largest[0], total = 0.0f, sum = 0.0f;
        for (int w = 1; w < kWarps; ++w) largest = fmaxf(largest, part.largest[w]);
        for (int w = 0; w < kWarps; ++w) {
            const float scale = expf(part.largest[w] - largest);  // 0 for a warp without keys
            total += scale * part.total[w];
            sum += scale * part.sums[w][channel];
        }
        const int64_t entry = (first_head + i / kHeadDim) * partials.splits + blockIdx.x;
        partials.sums[entry * kHeadDim + channel] = sum;
        if (channel == 0) partials.scale[entry] = make_float2(largest, total);
    }
}

// Where the new token of a sequence is.
struct TokenPlace {
    int position, slot;
};

// Whether the position is in the table of rotations, and the slot the place of the context's last position, or
// -1.
__device__ inline bool is_valid(const TokenPlace& place, const PagedDecodeAttentionArguments& a,
                                const QkNormRopeAppendArguments& token, int64_t sequence, int length) {
    if (place.position < 0 || place.position >= token.max_positions) return false;
    if (place.slot < 0 || length <= 0) return place.slot == -1;
    const auto page_size = static_cast<uint32_t>(a.cache.page_size), key = static_cast<uint32_t>(length - 1);
    const int64_t page = a.page_table[sequence * a.max_pages + key / page_size];
    return page >= 0 && page < a.cache.pages && place.slot == page * page_size + key % page_size;
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
                           int64_t sequence, int64_t kv_head, int position, int group, bool has_newest) {
    const T* packed = static_cast<const T*>(token.qkv.data) + sequence * token.qkv.stride;
    const T* queries = packed + kv_head * group * kHeadDim;
    const T* key = packed + (token.q_heads + kv_head) * kHeadDim;
    const T* value = key + token.cache.kv_heads * kHeadDim;
    const float* rotation = token.cos_sin_cache + int64_t{position} * kHeadDim;
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

// What a lane has of the block's keys and values: its channels of every kKeysPerStep-th, from key `first` on.
template <class T, int kHeadDim>
struct LaneKeys {
    using D = Division<T, kHeadDim>;
    int first;
    uint32_t missing;  // a bit for each that is on a page that does not exist
    Pack<T, D::kPack> k[D::kSteps], v[D::kSteps];

    __device__ int key(int step) const { return first + step * D::kKeysPerStep; }
};

// Softmax over the keys that a warp has, and the sum of their values, for kHeadsAtOnce queries side by side:
// exchanges between lanes that do not wait for one another are on the way together.
template <class T, int kHeadDim, class D = Division<T, kHeadDim>>
__device__ void attend(HeadParts<D::kWarps, kHeadDim> (&parts)[kHeadsAtOnce],
                       const LaneKeys<T, kHeadDim>& own, const Pack<T, D::kPack> (&query)[kHeadsAtOnce],
                       int channel, int length, float scale) {
    float scores[kHeadsAtOnce * D::kSteps] = {};
#pragma unroll
    for (int i = 0; i < kHeadsAtOnce * D::kSteps; ++i) {
        const int s = i % D::kSteps;
        for (int e = 0; e < D::kPack; ++e) {
            scores[i] += to_float(query[i / D::kSteps].element[e]) * scale * to_float(own.k[s].element[e]);
        }
    }
    sum_over_lanes<D::kLanesPerKey>(scores);
    float largest[kHeadsAtOnce], sums[kHeadsAtOnce][D::kPack + 1] = {};  // of values, and of weights
#pragma unroll
    for (int h = 0; h < kHeadsAtOnce; ++h) {
        largest[h] = -INFINITY;
#pragma unroll
        for (int s = 0; s < D::kSteps; ++s) {
            float& score = scores[h * D::kSteps + s];
            if (own.missing >> s & 1) score = nanf("");
            if (own.key(s) < length) largest[h] = fmaxf(largest[h], score);
        }
    }
#pragma unroll
    for (int distance = D::kLanesPerKey; distance < kWarp; distance *= 2) {
#pragma unroll
        for (int h = 0; h < kHeadsAtOnce; ++h) {
            largest[h] = fmaxf(largest[h], __shfl_xor_sync(kAllLanes, largest[h], distance));
        }
    }
#pragma unroll
    for (int i = 0; i < kHeadsAtOnce * D::kSteps; ++i) {
        const int h = i / D::kSteps, s = i % D::kSteps;
        const float weight = own.key(s) < length ? expf(scores[i] - largest[h]) : 0.0f;
        for (int e = 0; e < D::kPack; ++e) sums[h][e] += weight * to_float(own.v[s].element[e]);
        sums[h][D::kPack] += weight;
    }
#pragma unroll
    for (int distance = D::kLanesPerKey; distance < kWarp; distance *= 2) {
#pragma unroll
        for (int i = 0; i < kHeadsAtOnce * (D::kPack + 1); ++i) {
            float& sum = sums[i / (D::kPack + 1)][i % (D::kPack + 1)];
            sum += __shfl_xor_sync(kAllLanes, sum, distance);
        }
    }
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
    for (int h = 0; h < kHeadsAtOnce; ++h) {
        if (lane < D::kLanesPerKey) {
            for (int e = 0; e < D::kPack; ++e) parts[h].sums[warp][channel + e] = sums[h][e];
        }
        if (lane == 0) {
            parts[h].largest[warp] = largest[h];
            parts[h].total[warp] = sums[h][D::kPack];
        }
    }
}

// kMakesHeads: q, and the newest key and value, come from `token` instead of a.q and the cache.
//
// Two rounds of loads lead to keys and values: what depends on nothing (length, place, pages), then they.
template <class T, int kHeadDim, bool kMakesHeads>
__global__ void __launch_bounds__(Division<T, kHeadDim>::kThreads, Division<T, kHeadDim>::blocks(kMakesHeads))
    attend_split_kernel(PagedDecodeAttentionArguments a, QkNormRopeAppendArguments token, Partials partials) {
    wait_for_previous_kernel();
    using D = Division<T, kHeadDim>;
    const int sequence = static_cast<int>(blockIdx.z), kv_head = static_cast<int>(blockIdx.y);
    const int first_key = static_cast<int>(blockIdx.x) * kSplit, group = heads_per_kv_head(a);
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int channel = lane % D::kLanesPerKey * D::kPack;
    const int positions = static_cast<int>(a.max_pages * a.cache.page_size);

    const int length = context_length(a, sequence);
    TokenPlace place = {0, -1};
    if (kMakesHeads) place = {token.positions[sequence], token.slot_mapping[sequence]};
    LaneKeys<T, kHeadDim> own;
    own.first = first_key + warp * D::kKeysPerWarp + lane / D::kLanesPerKey;
    const auto page_size = static_cast<uint32_t>(a.cache.page_size);
    const int32_t* entry = a.page_table + sequence * a.max_pages + own.first / page_size;
    int pages[D::kSteps];
    uint32_t offsets[D::kSteps], offset_on_page = own.first % page_size;
#pragma unroll
    for (int s = 0; s < D::kSteps; ++s) {  // dividing once: address arithmetic would keep the loads apart
        pages[s] = load_if(own.key(s) < positions, entry, -1);
        offsets[s] = offset_on_page;
        entry += D::kKeysPerStep / page_size;
        offset_on_page += D::kKeysPerStep % page_size;
        if (offset_on_page >= page_size) {
            offset_on_page -= page_size;
            ++entry;
        }
    }

    const int newest = place.slot >= 0 ? length - 1 : -1;  // not in the cache yet
    own.missing = 0;
#pragma unroll
    for (int s = 0; s < D::kSteps; ++s) {
        const int row = row_on_page(a, pages[s], kv_head, offsets[s]);
        const int64_t offset = int64_t{row} * kHeadDim + channel;
        const bool cached = row >= 0 && own.key(s) < length && own.key(s) != newest;
        own.missing |= static_cast<uint32_t>(row < 0) << s;
        own.k[s] = load_if<Reuse::no>(cached, static_cast<const T*>(a.cache.k) + offset);
        own.v[s] = load_if<Reuse::no>(cached, static_cast<const T*>(a.cache.v) + offset);
    }
    const bool valid = !kMakesHeads || is_valid(place, a, token, sequence, length);
    if (!valid || first_key >= length) {
        if (blockIdx.x == 0) fill_heads<T>(a, sequence, kv_head, valid && length == 0 ? 0.0f : nanf(""));
        return;
    }

    __shared__ TokenHeads<T, kMakesHeads ? kHeadDim : 1> heads;
    if constexpr (kMakesHeads) {  // while keys and values are on their way
        const bool has_newest = newest >= first_key && newest < first_key + kSplit;
        make_heads(heads, token, sequence, kv_head, place.position, group, has_newest);
        const auto slot = static_cast<uint32_t>(place.slot);
        const int64_t row = row_on_page(a, static_cast<int>(slot / page_size), kv_head, slot % page_size);
        const int64_t offset = row * kHeadDim + channel;
#pragma unroll
        for (int s = 0; s < D::kSteps; ++s) {
            if (own.key(s) != newest) continue;
            own.k[s] = load_pack<T, D::kPack>(heads.key + channel);
            own.v[s] = load_pack<T, D::kPack>(heads.value + channel);
            store_pack(static_cast<T*>(a.cache.k) + offset, own.k[s]);
            store_pack(static_cast<T*>(a.cache.v) + offset, own.v[s]);
        }
    }

    __shared__ HeadParts<D::kWarps, kHeadDim> parts[kHeadsAtOnce];
    const int64_t first_head = int64_t{sequence} * a.q_heads + kv_head * group;
    for (int first = 0; first < group; first += kHeadsAtOnce) {
        const int count = group - first < kHeadsAtOnce ? group - first : kHeadsAtOnce;
        Pack<T, D::kPack> query[kHeadsAtOnce];
        for (int h = 0; h < kHeadsAtOnce; ++h) {
            const int g = first + (h < count ? h : count - 1);  // past the last head: that again
            const T* given = static_cast<const T*>(a.q) + (first_head + g) * kHeadDim;
            query[h] = load_pack<T, D::kPack>((kMakesHeads ? heads.queries[g] : given) + channel);
        }
        if (first > 0) __syncthreads();  // until the parts of the heads before have been read
        attend<T, kHeadDim>(parts, own, query, channel, length, a.scale);
        __syncthreads();
        merge_warps(parts, count, partials, first_head + first);
    }
    combine_if_last<T, 2>(a, partials, sequence, kv_head, length);
}

}  // namespace
}  // namespace blip3o::cuda
