// Causal attention of prompts over their pages of the KV cache: the queries of each sequence are those of its
// last positions, its keys all positions up to each query.
//
// Tiling   bfloat16: a block takes 64 rows, which are the query heads of one KV head for as many queries, so
//          that all of them share one reading of K and V; a warp 16 rows. Keys pass by in tiles of 64 through
//          shared memory; scores, weights (softmax as it goes along) and results stay in registers. float32,
//          and heads of other sizes: a warp per query and head; for tests, not for speed.
// Bytes    q and the result once; K and V once for every 64 rows, from a cache after the first.
// FLOPs    6 D per query head and key on the tensor cores: the weights are two bfloat16 each, which keeps 16
//          bits of them, so that the second product counts twice. Tiles past a block's last query are not
//          computed.
// Bound    the tensor cores for a long prompt, latency for a short one: tiles are not loaded ahead.
//
// Tiles of keys begin at multiples of 64 from position 0, and a tile of which a query sees nothing leaves it
// as it is: a query's bits depend on nothing but itself and the keys and values up to it, whatever it is read
// together with and wherever its prompt was cut. Lengths and tables are on the device, so a wrong one cannot
// be reported: a length that the table does not hold or that is less than the sequence's queries, and a
// page that does not exist, give NaN. Tokens of no sequence are not written, nor those of one whose places in
// q are wrong.
#include "cuda/convert.h"
#include "cuda/dependent_launch.h"
#include "cuda/launch.h"
#include "cuda/mma.h"
#include "cuda/ops.h"
#include "cuda/paged_context.h"
#include "cuda/warp.h"

namespace blip3o::cuda {
namespace {

using bfloat = __nv_bfloat16;

constexpr int kKeys = 64;  // of a tile
constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kWarpRows = 16, kRows = kWarps * kWarpRows;
constexpr int kPadding = 8;  // elements after each key in shared memory, so that rows hit different banks

// A sequence's queries, and where the first of them is in its context. None where q does not hold them.
struct Queries {
    int sequence, first_token, count, first_position;  // first_position -1: the length is wrong
};

__device__ inline Queries queries_of(const PagedPrefillAttentionArguments& a, int sequence) {
    const int first = a.cu_seqlens_q[sequence], end = a.cu_seqlens_q[sequence + 1];
    if (first < 0 || end < first || end > a.tokens) return {sequence, 0, 0, -1};
    const int count = end - first, length = context_length(a, sequence);
    return {sequence, first, count, length >= count ? length - count : -1};
}

// The row of 64 that a block begins with; a block beyond the last sequence has no queries.
struct BlockPlace {
    Queries queries;
    int first_row;
};

__device__ inline BlockPlace place_of(const PagedPrefillAttentionArguments& a, int block) {
    const int group = heads_per_kv_head(a);
    for (int sequence = 0; sequence < a.batch; ++sequence) {
        const Queries queries = queries_of(a, sequence);
        const int blocks = (queries.count * group + kRows - 1) / kRows;
        if (block < blocks) return {queries, block * kRows};
        block -= blocks;
    }
    return {{0, 0, 0, 0}, 0};
}

// A tile of keys and values. A key on a page that does not exist is not a number; those from `keys` on are 0.
template <int kHeadDim>
struct Tile {
    static constexpr int kStride = kHeadDim + kPadding;
    alignas(16) bfloat k[kKeys][kStride], v[kKeys][kStride];
};

template <int kHeadDim>
__device__ void load_tile(Tile<kHeadDim>& tile, const PagedPrefillAttentionArguments& a, int sequence,
                          int kv_head, int first_key, int keys) {
    constexpr int kPack = kWidestPack<bfloat>, kPacks = kHeadDim / kPack;
#pragma unroll 4
    for (int i = threadIdx.x; i < kKeys * kPacks; i += kThreads) {
        const int key = i / kPacks, channel = i % kPacks * kPack;
        const bool inside = first_key + key < keys;
        const int row = inside ? cache_row(a, sequence, kv_head, first_key + key) : 0;
        const int64_t offset = int64_t{row} * kHeadDim + channel;
        auto k = load_if<Reuse::yes>(inside && row >= 0, static_cast<const bfloat*>(a.cache.k) + offset);
        const auto v =
            load_if<Reuse::yes>(inside && row >= 0, static_cast<const bfloat*>(a.cache.v) + offset);
        if (row < 0) k.element[0] = from_float<bfloat>(nanf(""));
        store_pack(&tile.k[key][channel], k);
        store_pack(&tile.v[key][channel], v);
    }
}

__device__ inline uint32_t two_of(const bfloat* from) { return *reinterpret_cast<const uint32_t*>(from); }

__device__ inline uint32_t pair(float low, float high) {
    union {
        Pack<bfloat, 2> pack;
        uint32_t word;
    } both = {{{from_float<bfloat>(low), from_float<bfloat>(high)}}};
    return both.word;
}

// What rounding to bfloat16 leaves of a number.
__device__ inline float remainder_of(float value) { return value - to_float(from_float<bfloat>(value)); }

// What a lane carries of its warp's rows g and g + 8 (g = lane / 4; mma.h has the layout).
template <int kHeadDim>
struct Carried {
    float largest[2] = {-INFINITY, -INFINITY}, total[2] = {}, sums[kHeadDim / 8][4] = {};
};

// Turns the scores of a tile into weights, and rescales what was summed before.
template <int kHeadDim>
__device__ void soften(float (&scores)[kKeys / 8][4], Carried<kHeadDim>& carried, const int (&last_key)[2],
                       int first_column, float scale) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float largest = carried.largest[half];
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
            for (int e = 0; e < 2; ++e) {
                float& score = scores[n][2 * half + e];
                score = first_column + 8 * n + e <= last_key[half] ? score * scale : -INFINITY;
                largest = fmaxf(largest, score);
            }
        }
        for (int distance = 1; distance < 4; distance *= 2) {
            largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, distance));
        }
        const float rescale = expf(carried.largest[half] - largest);
        carried.largest[half] = largest;
        carried.total[half] *= rescale;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
            for (int e = 0; e < 2; ++e) {
                float& score = scores[n][2 * half + e];
                score = expf(score - largest);
                carried.total[half] += score;
            }
        }
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
            for (int e = 0; e < 2; ++e) carried.sums[n][2 * half + e] *= rescale;
        }
    }
}

// Scores of the warp's rows and a tile's keys.
template <int kHeadDim>
__device__ void multiply_keys(float (&scores)[kKeys / 8][4], const uint32_t (&q)[kHeadDim / 16][4],
                              const Tile<kHeadDim>& tile, int lane) {
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
            const bfloat* key = &tile.k[8 * n + lane / 4][16 * step + lane % 4 * 2];
            mma_m16n8k16(scores[n], q[step], {two_of(key), two_of(key + 8)});
        }
    }
}

// Adds weight * v of a tile. The weights' layout as sums is that of the left operand.
template <int kHeadDim>
__device__ void add_values(Carried<kHeadDim>& carried, const float (&weights)[kKeys / 8][4],
                           const Tile<kHeadDim>& tile, int lane) {
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
        uint32_t high[4], low[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float x = weights[2 * step + i / 2][i % 2 * 2],
                        y = weights[2 * step + i / 2][i % 2 * 2 + 1];
            high[i] = pair(x, y);
            low[i] = pair(remainder_of(x), remainder_of(y));
        }
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; n += 2) {
            uint32_t v[4];
            load_transposed(v, &tile.v[16 * step + lane % 16][8 * n + lane / 16 * 8]);
            for (int i = 0; i < 2; ++i) {
                mma_m16n8k16(carried.sums[n + i], high, {v[2 * i], v[2 * i + 1]});
                mma_m16n8k16(carried.sums[n + i], low, {v[2 * i], v[2 * i + 1]});
            }
        }
    }
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 2) attend_prompt_kernel(PagedPrefillAttentionArguments a) {
    wait_for_previous_kernel();
    __shared__ Tile<kHeadDim> tile;
    const int kv_head = static_cast<int>(blockIdx.y), group = heads_per_kv_head(a);
    const BlockPlace place = place_of(a, static_cast<int>(blockIdx.x));
    const Queries& queries = place.queries;
    const int rows = queries.count * group, lane = threadIdx.x % kWarp, t = lane % 4;
    if (rows == 0) return;

    int64_t offset[2];  // of the lane's two rows in q and out
    int last_key[2];
    bool exists[2];
    uint32_t q[kHeadDim / 16][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = place.first_row + threadIdx.x / kWarp * kWarpRows + lane / 4 + half * 8;
        exists[half] = row < rows;
        const int query = (exists[half] ? row : rows - 1) / group, head = kv_head * group + row % group;
        last_key[half] = queries.first_position + query;
        offset[half] = (int64_t{queries.first_token + query} * a.q_heads + head) * kHeadDim + 2 * t;
#pragma unroll
        for (int step = 0; step < kHeadDim / 16; ++step) {
            const bfloat* from = static_cast<const bfloat*>(a.q) + offset[half] + 16 * step;
            q[step][half] = two_of(from);
            q[step][2 + half] = two_of(from + 8);
        }
    }

    const int last_row = place.first_row + kRows < rows ? place.first_row + kRows - 1 : rows - 1;
    const int keys = queries.first_position < 0 ? 0 : queries.first_position + last_row / group + 1;
    Carried<kHeadDim> carried;
    for (int first_key = 0; first_key < keys; first_key += kKeys) {
        load_tile(tile, a, queries.sequence, kv_head, first_key, keys);
        __syncthreads();
        float scores[kKeys / 8][4] = {};
        multiply_keys(scores, q, tile, lane);
        soften(scores, carried, last_key, first_key + 2 * t, a.scale);
        add_values(carried, scores, tile, lane);
        __syncthreads();
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float total = carried.total[half];
        for (int distance = 1; distance < 4; distance *= 2) {
            total += __shfl_xor_sync(kAllLanes, total, distance);
        }
        if (!exists[half]) continue;
        const float inverse = keys == 0 ? nanf("") : 1.0f / total;
        bfloat* out = static_cast<bfloat*>(a.out) + offset[half];
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
            const float* sums = &carried.sums[n][2 * half];
            *reinterpret_cast<uint32_t*>(out + 8 * n) = pair(sums[0] * inverse, sums[1] * inverse);
        }
    }
}

constexpr int kMostLaneChannels = kMostPromptHeadDim / kWarp;

// One warp per query and head, 32 keys at a time.
template <class T>
__global__ void __launch_bounds__(kThreads) attend_prompt_any_kernel(PagedPrefillAttentionArguments a) {
    wait_for_previous_kernel();
    const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp, size = a.cache.head_dim;
    const int token = static_cast<int>(warp / a.q_heads), head = static_cast<int>(warp % a.q_heads);
    const int kv_head = head / heads_per_kv_head(a), lane = threadIdx.x % kWarp;
    if (token >= a.tokens || token < a.cu_seqlens_q[0] || token >= a.cu_seqlens_q[a.batch]) return;
    int sequence = 0;
    while (token >= a.cu_seqlens_q[sequence + 1]) ++sequence;
    const Queries queries = queries_of(a, sequence);
    if (queries.count == 0) return;
    const int last_key =
        queries.first_position < 0 ? -1 : queries.first_position + token - queries.first_token;
    const T* query = static_cast<const T*>(a.q) + warp * size;

    float largest = -INFINITY, total = 0.0f, sums[kMostLaneChannels] = {};
    for (int first_key = 0; first_key <= last_key; first_key += kWarp) {
        const bool inside = first_key + lane <= last_key;
        const int row = inside ? cache_row(a, sequence, kv_head, first_key + lane) : 0;
        float score = inside ? row < 0 ? nanf("") : 0.0f : -INFINITY;
        for (int i = 0; i < size && inside && row >= 0; ++i) {
            score +=
                to_float(query[i]) * a.scale * to_float(static_cast<const T*>(a.cache.k)[row * size + i]);
        }
        float larger = fmaxf(largest, score);
        for (int distance = kWarp / 2; distance > 0; distance /= 2) {
            larger = fmaxf(larger, __shfl_xor_sync(kAllLanes, larger, distance));
        }
        const float rescale = expf(largest - larger), weight = expf(score - larger);
        largest = larger;
        total = total * rescale + sum_over_lanes(weight);
        for (float& sum : sums) sum *= rescale;
        for (int key = 0; key < kWarp && first_key + key <= last_key; ++key) {
            const float its_weight = __shfl_sync(kAllLanes, weight, key);
            const int its_row = __shfl_sync(kAllLanes, row, key);
            const T* value = static_cast<const T*>(a.cache.v) + (its_row < 0 ? 0 : its_row) * size;
            for (int c = 0; c < kMostLaneChannels; ++c) {
                if (c * kWarp + lane < size) sums[c] += its_weight * to_float(value[c * kWarp + lane]);
            }
        }
    }
    for (int c = 0; c < kMostLaneChannels; ++c) {
        if (c * kWarp + lane >= size) continue;
        static_cast<T*>(a.out)[warp * size + c * kWarp + lane] =
            from_float<T>(sums[c] / total);  // NaN: no key
    }
}

template <int kHeadDim>
void launch_prompts(const PagedPrefillAttentionArguments& a, cudaStream_t stream) {
    const int64_t group = a.q_heads / a.cache.kv_heads;
    const int64_t most = ceil_divide(a.tokens * group, kRows) + a.batch;  // a sequence's last has few rows
    launch(attend_prompt_kernel<kHeadDim>,
           dim3(static_cast<unsigned>(most), static_cast<unsigned>(a.cache.kv_heads)), dim3(kThreads), stream,
           a);
}

template <class T>
void launch_any(const PagedPrefillAttentionArguments& a, cudaStream_t stream) {
    launch(attend_prompt_any_kernel<T>,
           dim3(static_cast<unsigned>(ceil_divide(a.tokens * a.q_heads, kWarps))), dim3(kThreads), stream, a);
}

}  // namespace

void paged_prefill_attention(const PagedPrefillAttentionArguments& arguments, cudaStream_t stream) {
    const PagedPrefillAttentionArguments& a = arguments;
    if (a.tokens == 0 || a.batch == 0 || a.q_heads == 0 || a.cache.head_dim == 0) return;
    bool packed = a.dtype == DType::bf16;
    for (const void* pointer : {a.q, static_cast<const void*>(a.cache.k), static_cast<const void*>(a.cache.v),
                                static_cast<const void*>(a.out)}) {
        packed = packed && is_aligned(pointer, 16);
    }
    if (packed && a.cache.head_dim == 128) return launch_prompts<128>(a, stream);
    if (packed && a.cache.head_dim == 64) return launch_prompts<64>(a, stream);
    a.dtype == DType::bf16 ? launch_any<bfloat>(a, stream) : launch_any<float>(a, stream);
}

}  // namespace blip3o::cuda
