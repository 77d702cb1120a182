// Top-k, top-p, temperature and a Gumbel-max draw, without a sort.
//
// Tiling   blocks of 512 threads over the row, 16,384 logits each; a block leaves those that may be among the
//          row's top_k. The last block of a row to arrive finds the top_k among them, then the shortest prefix
//          of probability top_p, then the best of that.
// Bytes    the logits once, 4 V (and twice more from the first-level cache); for top_k 1,200 of 217,210 about
//          10% of them again, as ranks of 8 bytes, written once and read twice.
// FLOPs    for every token that may be drawn an exponential and two logarithms, in double.
// Bound    latency: about thirty barriers. Without top_k, one block reads the whole row; without both limits
//          each draws for its part.
//
// A token's rank is one number that orders as (logit descending, index ascending), so that there are no ties.
// The last kept rank is found as in a radix sort, from the highest digits on: nine bits at a time, the
// weights of the ranks still in question are added up in 512 bins, and the search goes on in the bin where
// the sum reaches the limit. A weight is 1 for top_k, and the probability as a whole number for top_p: sums
// of whole numbers have the same bits in any order.
#include "blip3o/philox.h"
#include "cuda/arrival.h"
#include "cuda/dependent_launch.h"
#include "cuda/launch.h"
#include "cuda/ops.h"
#include "cuda/warp.h"
#include "cuda/workspaces.h"

namespace blip3o::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr int kBinBits = 9, kBins = 1 << kBinBits;
constexpr int kKeptInShared = 4096;
static_assert(kBins == kThreads, "a thread looks at one bin");

using Rank = unsigned long long;    // 0: no token
using Weight = unsigned long long;  // whole numbers, so that their order does not matter

constexpr Rank kBroken = ~Rank{0};  // NaN or +inf

// Ranks of the tokens of a vocabulary below 2^index_bits.
struct Ranking {
    int index_bits;

    __device__ Rank last_index() const { return (Rank{1} << index_bits) - 1; }

    // 0 for -inf, which is never drawn.
    __device__ Rank rank_of(float logit, int64_t token) const {
        if (!(logit < INFINITY)) return kBroken;
        if (logit == -INFINITY) return 0;
        const uint32_t bits = __float_as_uint(logit == 0.0f ? 0.0f : logit);  // both zeros are one
        const uint32_t key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
        return Rank{key} << index_bits | (last_index() - static_cast<Rank>(token));
    }

    __device__ float logit(Rank rank) const {
        const auto key = static_cast<uint32_t>(rank >> index_bits);
        return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
    }

    __device__ int64_t token(Rank rank) const {
        return static_cast<int64_t>(last_index() - (rank & last_index()));
    }
};

// One row's parameters.
struct Sampler {
    Ranking ranking;
    double temperature;
    int64_t top_k;  // 0: all
    double top_p;   // 1: all
    uint64_t seed;
    uint32_t position;

    __device__ Sampler(const SampleTokensArguments& a, int64_t row, int index_bits)
        : ranking{index_bits},
          temperature(a.temperature[row]),
          top_k(a.top_k[row] > 0 && a.top_k[row] < a.logits.width ? a.top_k[row] : 0),
          top_p(a.top_p[row] < 1.0f ? a.top_p[row] : 1.0f),
          seed(static_cast<uint64_t>(a.seeds[row])),
          position(static_cast<uint32_t>(a.positions[row])) {}

    __device__ bool can_draw() const { return temperature > 0.0; }
    // Whether chunks can draw by themselves: a filter that compares with the whole row is to be counted here.
    __device__ bool takes_all() const { return top_k == 0 && top_p >= 1.0; }

    // What the token scores in the draw (Gumbel-max).
    __device__ __attribute__((noinline)) double score(Rank rank) const {
        const int64_t token = ranking.token(rank);
        const PhiloxBlock numbers =
            philox_block(seed, Stream::tokens, position, static_cast<uint64_t>(token) / 4);
        const int lane = static_cast<int>(token % 4);
        const uint32_t word = lane == 0   ? numbers.word[0]
                              : lane == 1 ? numbers.word[1]
                              : lane == 2 ? numbers.word[2]
                                          : numbers.word[3];
        return ranking.logit(rank) / temperature - log(-log(as_uniform(word)));
    }

    // The token's probability over that of the first token, as a whole number.
    __device__ __attribute__((noinline)) Weight mass(Rank rank, Rank first) const {
        const int bits = 62 - ranking.index_bits;  // the whole vocabulary's sum fits
        const double one = static_cast<double>(Weight{1} << bits);
        if (rank == first) return Weight{1} << bits;
        const double ratio = exp(ranking.logit(rank) / temperature - ranking.logit(first) / temperature);
        return ratio > 0.0 ? static_cast<Weight>(ratio * one + 0.5) : 0;  // 0 for NaN: infinite quotients
    }
};

struct Range {
    Rank low, high;
};

struct Draw {
    double score;
    Rank rank;
};

// Where the last kept rank is: in low .. high, above which ranks of weight `before` are kept for certain.
struct Search {
    Rank low, high;
    Weight before, inside;
    Weight limit;  // kept are the ranks that have less than this before them; 0: not yet known
};

struct Shared {
    Weight bins[kBins], warp_totals[kWarps];
    Range warp_ranges[kWarps];
    Draw warp_draws[kWarps];
    Search search;
    int kept;
};

__device__ Range merge(Range a, Range b) {
    return {a.low < b.low ? a.low : b.low, a.high > b.high ? a.high : b.high};
}

__device__ Range range_over_block(Range range, Shared& shared) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        range = merge(range, {__shfl_xor_sync(kAllLanes, range.low, distance),
                              __shfl_xor_sync(kAllLanes, range.high, distance)});
    }
    if (threadIdx.x % kWarp == 0) shared.warp_ranges[threadIdx.x / kWarp] = range;
    __syncthreads();
    for (int warp = 0; warp < kWarps; ++warp) range = merge(range, shared.warp_ranges[warp]);
    return range;
}

// The sum over the threads before this one; `total` over all.
__device__ Weight sum_before(Weight value, Weight& total, Shared& shared) {
    const int lane = threadIdx.x % kWarp, own_warp = threadIdx.x / kWarp;
    Weight sum = value;
    for (int distance = 1; distance < kWarp; distance *= 2) {
        const Weight below = __shfl_up_sync(kAllLanes, sum, distance);
        if (lane >= distance) sum += below;
    }
    if (lane == kWarp - 1) shared.warp_totals[own_warp] = sum;
    __syncthreads();
    total = 0;
    for (int warp = 0; warp < kWarps; ++warp) {
        if (warp == own_warp) sum += total;
        total += shared.warp_totals[warp];
    }
    return sum - value;
}

// The better of two draws: on equal scores that of the lower index.
__device__ Draw better(Draw a, Draw b, const Ranking& ranking) {
    if (b.rank == 0) return a;
    const bool second = a.rank == 0 || b.score > a.score ||
                        (b.score == a.score && ranking.token(b.rank) < ranking.token(a.rank));
    return second ? b : a;
}

__device__ Draw best_over_block(Draw best, const Ranking& ranking, Shared& shared) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        best = better(best,
                      {__shfl_xor_sync(kAllLanes, best.score, distance),
                       __shfl_xor_sync(kAllLanes, best.rank, distance)},
                      ranking);
    }
    if (threadIdx.x % kWarp == 0) shared.warp_draws[threadIdx.x / kWarp] = best;
    __syncthreads();
    for (int warp = 0; warp < kWarps; ++warp) best = better(best, shared.warp_draws[warp], ranking);
    return best;
}

// Sources of ranks: for_each calls visit(rank) for the ranks a thread has, all lanes of a warp at once and so
// for some lanes with 0.

// The logits first .. end of a row.
struct Logits {
    const float* row;
    int64_t first, end;
    Ranking ranking;

    template <class Visit>
    __device__ void for_each(const Visit& visit) const {
#pragma unroll 8
        for (int64_t i = first; i < end; i += kThreads) {
            const int64_t token = i + threadIdx.x;
            visit(token < end ? ranking.rank_of(row[token], token) : 0);
        }
    }
};

// What all blocks have left of a row.
struct ChunkRanks {
    const SampleChunk* chunks;
    int64_t count;

    // Warps take pieces of 256 ranks, so that a lane has eight loads on the way.
    template <class Visit>
    __device__ void for_each(const Visit& visit) const {
        constexpr int kLoads = 8, kPiece = kLoads * kWarp;
        int64_t piece = threadIdx.x / kWarp;
        for (int64_t c = 0; c < count; ++c) {
            const int64_t ranks = __ldcg(&chunks[c].count), pieces = (ranks + kPiece - 1) / kPiece;
            for (; piece < pieces; piece += kWarps) {
                Rank loaded[kLoads];
#pragma unroll
                for (int i = 0; i < kLoads; ++i) {
                    const int64_t index = piece * kPiece + i * kWarp + threadIdx.x % kWarp;
                    loaded[i] = index < ranks ? __ldcg(&chunks[c].ranks[index]) : 0;
                }
#pragma unroll
                for (int i = 0; i < kLoads; ++i) visit(loaded[i]);
            }
            piece -= pieces;
        }
    }
};

// Ranks in shared memory.
struct SharedRanks {
    const Rank* ranks;
    int count;

    template <class Visit>
    __device__ void for_each(const Visit& visit) const {
        const int lane = threadIdx.x % kWarp;
        for (int first = threadIdx.x - lane; first < count; first += kThreads) {
            visit(first + lane < count ? ranks[first + lane] : 0);
        }
    }
};

struct One {
    __device__ Weight operator()(Rank) const { return 1; }
};

// The limit of a search that knows its own.
struct Known {
    __device__ Weight operator()(Weight) const { return 1; }
};

// One step of a search: into the bin where the sum of the weights, from the highest rank on, reaches the
// limit. Where it never does, the search keeps its range. limit_of(total) gives a limit not known before.
template <class Source, class WeightOf, class LimitOf>
__device__ void narrow(Search& search, const Source& source, Shared& shared, const WeightOf& weight_of,
                       const LimitOf& limit_of) {
    const int bits = 64 - __clzll(static_cast<long long>(search.high - search.low));
    const int shift = bits > kBinBits ? bits - kBinBits : 0;
    shared.bins[threadIdx.x] = 0;
    __syncthreads();
    if (threadIdx.x == 0) shared.search = search;  // not before: all have read what the last step left
    source.for_each([&](Rank rank) {
        if (rank < search.low || rank > search.high) return;
        atomicAdd(&shared.bins[(rank - search.low) >> shift], weight_of(rank));
    });
    __syncthreads();
    const Rank bin = kBins - 1 - threadIdx.x;
    const Weight inside = shared.bins[bin];
    Weight total;
    const Weight before = search.before + sum_before(inside, total, shared);
    if (search.limit == 0) search.limit = limit_of(total);
    if (before < search.limit && before + inside >= search.limit) {
        const Rank low = search.low + (bin << shift);
        shared.search = {low, low + ((Rank{1} << shift) - 1), before, inside, search.limit};
    }
    __syncthreads();
    const Weight limit = search.limit;
    search = shared.search;
    search.limit = limit;
}

// Copies the ranks from `floor` on to `to` in some order; shared.kept counts them once all threads have come.
template <class Source>
__device__ void keep(const Source& source, Rank floor, Rank* to, Shared& shared) {
    if (threadIdx.x == 0) shared.kept = 0;
    __syncthreads();
    const int lane = threadIdx.x % kWarp;
    source.for_each([&](Rank rank) {
        const bool kept = rank >= floor && rank != 0;
        const uint32_t votes = __ballot_sync(kAllLanes, kept);
        if (votes == 0) return;
        int place = lane == 0 ? atomicAdd(&shared.kept, __popc(votes)) : 0;
        place = __shfl_sync(kAllLanes, place, 0) + __popc(votes & ((1u << lane) - 1));
        if (kept) to[place] = rank;
    });
    __syncthreads();
}

template <class Source>
__device__ Draw draw_from(const Source& source, Rank floor, const Sampler& sampler, Shared& shared) {
    Draw best = {0.0, 0};
    source.for_each([&](Rank rank) {
        if (rank >= floor && rank != 0) best = better(best, {sampler.score(rank), rank}, sampler.ranking);
    });
    return best_over_block(best, sampler.ranking, shared);
}

// Leaves those of a block's logits that may be among the row's top_k.
__device__ void gather_chunk(const SampleTokensArguments& a, const Sampler& sampler, int64_t row,
                             SampleChunk& chunk, Shared& shared) {
    const int64_t first = int64_t{blockIdx.x} * kSampleChunk;
    const int64_t last = first + kSampleChunk < a.logits.width ? first + kSampleChunk : a.logits.width;
    const auto* logits = static_cast<const float*>(a.logits.data) + row * a.logits.stride;

    const Logits own = {logits, first, last, sampler.ranking};
    Range range = {kBroken, 0};
    own.for_each([&](Rank rank) {
        if (rank != 0) range = merge(range, {rank, rank});
    });
    range = range_over_block(range, shared);
    if (range.high == kBroken || range.high == 0) {
        if (threadIdx.x == 0) chunk.count = range.high == 0 ? 0 : -1;
        return;
    }
    Search top = {range.low, range.high, 0, 0, static_cast<Weight>(sampler.top_k)};
    if (sampler.takes_all() && sampler.can_draw()) {
        const Rank drawn = draw_from(own, 0, sampler, shared).rank;
        if (threadIdx.x == 0) {
            chunk.count = 1;
            chunk.ranks[0] = chunk.low = chunk.high = drawn;
        }
        return;
    }
    if (sampler.top_k > 0) narrow(top, own, shared, One(), Known());
    keep(own, top.low, chunk.ranks, shared);
    if (threadIdx.x == 0) {
        chunk.count = shared.kept;
        chunk.low = top.low;
        chunk.high = range.high;
    }
}

// The draw of a row of which `source` has the ranks that matter; `top` is where the last of the top_k is.
template <class Source>
__device__ Draw finish_row(const Source& source, Search top, Rank first, const Sampler& sampler,
                           Shared& shared) {
    while (top.low != top.high && top.before + top.inside != top.limit) {
        narrow(top, source, shared, One(), Known());
    }
    Search nucleus = {top.low, first, 0, 0, 0};
    const auto mass = [&](Rank rank) { return sampler.mass(rank, first); };
    const auto share = [&](Weight total) {
        const double wanted = ceil(sampler.top_p * static_cast<double>(total));
        return wanted >= 1.0 ? static_cast<Weight>(wanted) : Weight{1};
    };
    while (sampler.top_p < 1.0 && nucleus.low != nucleus.high) narrow(nucleus, source, shared, mass, share);
    return draw_from(source, nucleus.low, sampler, shared);
}

// Draws from what all blocks have left of a row.
__device__ void draw_row(const SampleTokensArguments& a, const Sampler& sampler, int64_t row,
                         const ChunkRanks& all, Shared& shared, Rank* kept) {
    Range range = {kBroken, 0};
    Weight own_count = 0, count;
    for (int64_t c = threadIdx.x; c < all.count; c += kThreads) {
        const int64_t ranks = __ldcg(&all.chunks[c].count);
        if (ranks < 0) range.high = kBroken;
        if (ranks <= 0) continue;
        range = merge(range, {__ldcg(&all.chunks[c].low), __ldcg(&all.chunks[c].high)});
        own_count += static_cast<Weight>(ranks);
    }
    range = range_over_block(range, shared);
    sum_before(own_count, count, shared);
    if (range.high == kBroken || range.high == 0 || !sampler.can_draw()) {
        if (threadIdx.x == 0) a.out[row] = -1;
        return;
    }
    const bool limited = sampler.top_k > 0 && static_cast<Weight>(sampler.top_k) < count;
    Search top = {range.low, range.high, 0, count, limited ? static_cast<Weight>(sampler.top_k) : count};
    if (limited) narrow(top, all, shared, One(), Known());
    Draw drawn;
    if (top.before + top.inside <= kKeptInShared) {
        keep(all, top.low, kept, shared);
        drawn = finish_row(SharedRanks{kept, shared.kept}, top, range.high, sampler, shared);
    } else {
        drawn = finish_row(all, top, range.high, sampler, shared);
    }
    if (threadIdx.x == 0) a.out[row] = sampler.ranking.token(drawn.rank);
}

__global__ void __launch_bounds__(kThreads, 1)
    sample_tokens_kernel(SampleTokensArguments a, LaunchScratch scratch, int64_t chunks_per_row,
                         int index_bits) {
    wait_for_previous_kernel();
    __shared__ Shared shared;
    __shared__ Rank kept[kKeptInShared];
    const int64_t row = blockIdx.y;
    const Sampler sampler(a, row, index_bits);
    SampleChunk* chunks = static_cast<SampleChunk*>(scratch.memory) + row * chunks_per_row;
    if (chunks_per_row > 0) gather_chunk(a, sampler, row, chunks[blockIdx.x], shared);
    if (!is_last_to_arrive(scratch.arrived + row, static_cast<int>(gridDim.x))) return;
    draw_row(a, sampler, row, {chunks, chunks_per_row}, shared, kept);
}

}  // namespace

void sample_tokens(const SampleTokensArguments& arguments, const LaunchScratch& scratch,
                   cudaStream_t stream) {
    const int64_t rows = arguments.logits.count, vocabulary = arguments.logits.width;
    if (rows == 0) return;
    const int64_t chunks = sample_chunks(vocabulary);
    int index_bits = 1;
    while ((int64_t{1} << index_bits) < vocabulary) ++index_bits;
    const dim3 grid(static_cast<unsigned>(chunks > 0 ? chunks : 1), static_cast<unsigned>(rows));
    launch(sample_tokens_kernel, grid, dim3(kThreads), stream, arguments, scratch, chunks, index_bits);
}

}  // namespace blip3o::cuda
