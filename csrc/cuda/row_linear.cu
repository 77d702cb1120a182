// Products of few rows with a weight matrix: x weight^T, and what stands beside it in a decoding step.
//
// One kernel serves the ops row_linear, row_linear_w8, norm_row_linear and row_linear_add. Rows of x may
// be normed first, a weight may be int8 or e4m3 with a scale for each row, rows may be gates and ups of a
// gated activation, and the result may be added to what is there: each rounded as the ops one by one round
// it, so that the bits are theirs.
//
// Tiling   bfloat16: a tile is 16 rows of the weight (8 gates and their 8 ups), all channels, and up to 32
//          rows of x. The warps of a block (up to 16) share its channels in slices of 128 (256 in 8 bits) and
//          multiply on the tensor cores; their sums are added up through shared memory, warp after warp.
//          Blocks stay (one per multiprocessor, more if they are small) and walk over the tiles. A lane copies
//          16 bytes of a row, eight copies at a time, into a ring of slices in shared memory (three, or two for
//          16 rows of x), and reads what it copied itself, so that no thread waits for another. A slice is
//          waited for when those after it are on their way, of the next tile too: a block of 16 warps has 128
//          KiB in flight. Where a multiprocessor has no room for the ring (before sm_90), with more rows of x,
//          or where rows do not begin at 16 bytes, registers hold the next slice. 8 bits become bfloat16 in
//          registers, exactly.
//          Normed rows, up to 8, are normed by every block as it loads them: the row lies in a cache, and the
//          first weights are on their way meanwhile.
//          float32: one warp per row of the weight and 8 rows of x; for tests, not for speed.
// Bytes    the weight once per 32 rows of x (16 in 8 bits; 8 in float32, or if rows are not aligned to 16
//          bytes), 2 N K in bfloat16, N K in 8 bits; x comes from a cache.
// FLOPs    2 M N K; the tensor cores do them for 8 rows of x at least.
// Bound    memory.
//
// The first slices of the weight are on their way before the block waits for the kernel that makes x.
//
// Which warp sums which channels in which order depends on K alone, and a column of the tensor cores' product
// on that column alone: the bits of a row are the same whatever the other rows are and however many.
#include "cuda/async_copy.h"
#include "cuda/convert.h"
#include "cuda/dependent_launch.h"
#include "cuda/e4m3.h"
#include "cuda/launch.h"
#include "cuda/mma.h"
#include "cuda/ops.h"
#include "cuda/rms.h"
#include "cuda/silu.h"
#include "cuda/warp.h"

namespace blip3o::cuda {
namespace {

constexpr int kTileRows = 16;  // rows of the weight in a tile
constexpr int kHalf = kTileRows / 2;
constexpr int kGroupRows = 8;  // rows of x in one product of the tensor cores
constexpr int kChunks = 4;     // of a slice; a lane loads 16 bytes of each
constexpr int kMostWarps = 16;
constexpr int kPaddedRows = 20;  // of sums in shared memory, so that a warp's stores hit different banks

using Words = Pack<uint32_t, 4>;  // 16 bytes of a row

// Four neighboring channels of a row as bfloat16.
struct FourChannels {
    uint32_t word[2];
};

// How a weight is kept: the bits of an element, and four channels of a lane's 16 bytes.
struct Bfloat16 {
    using Bits = uint16_t;
    static __device__ FourChannels widen(const Words& words, int four) {
        return {{words.element[2 * four], words.element[2 * four + 1]}};
    }
};

struct Int8 {
    using Bits = uint8_t;
    static __device__ FourChannels widen(const Words& words, int four) {
        return {{int8_to_bf16x2(__byte_perm(words.element[four], 0, 0x4140)),
                 int8_to_bf16x2(__byte_perm(words.element[four], 0, 0x4342))}};
    }
};

struct E4m3 {
    using Bits = uint8_t;
    static __device__ FourChannels widen(const Words& words, int four) {
        return {{e4m3_to_bf16x2(__byte_perm(words.element[four], 0, 0x1404)),
                 e4m3_to_bf16x2(__byte_perm(words.element[four], 0, 0x3424))}};
    }
};

template <class Weight>
constexpr int kLaneWidth = 16 / sizeof(typename Weight::Bits);  // channels of one load
template <class Weight>
constexpr int kChunk = 4 * kLaneWidth<Weight>;
template <class Weight>
constexpr int kSlice = kChunk<Weight> * kChunks;
template <class Weight>
constexpr int kMostGroups = kLaneWidth<Weight> == 8 ? 4 : 2;  // of x per block: widening takes registers
// A ring takes memory that would cache x: with 16 rows two slices leave room for them, with 32 rows none do.
constexpr int kMostRingGroups = 2;
template <int kGroups>
constexpr int kStages = kGroups == 1 ? 3 : 2;
template <class Weight>
constexpr int kPieces = kLaneWidth<Weight> / 8;  // of x that a chunk takes, 16 bytes each

// 16 bytes of a row of which so many elements are left; zeros past them.
template <class Bits>
__device__ Words load_elements(const Bits* from, int64_t left) {
    constexpr int kPerWord = 4 / sizeof(Bits);
    Words words = {};
    for (int w = 0; w < 4; ++w, from += kPerWord, left -= kPerWord) {
#pragma unroll 1  // registers are short
        for (int e = 0; e < kPerWord; ++e) {
            const uint32_t bits = e < left ? from[e] : 0;
            words.element[w] |= bits << (e * 8 * sizeof(Bits));
        }
    }
    return words;
}

// The 16 bytes of a row of x, or of the norm's weight, from channel k on; zeros past its width, and for a row
// past the last.
template <bool kPacked>
__device__ Words load_row(const Rows& rows, int64_t row, int64_t k) {
    const auto* from = static_cast<const uint16_t*>(rows.data) + row * rows.stride + k;
    if (kPacked) {
        const bool inside = row < rows.count && k < rows.width;
        return load_if<Reuse::yes>(inside, reinterpret_cast<const uint32_t*>(from));
    }
    return load_elements(from, row < rows.count ? rows.width - k : 0);
}

// Where a lane works: row g of each half of a tile, row g of a group of x, and its channels of a chunk.
struct LanePlace {
    int row, channel;
};

// Which rows of the weight a tile has: so many from first on, and the same again so far behind them.
struct TileRows {
    int64_t first, second_half;
};

// What a lane holds of a slice of a tile of the weight: two rows.
struct WeightSlice {
    Words low[kChunks], high[kChunks];
};

// What it holds of x for some pieces of the slice, eight channels each: one row.
template <int kCount>
struct XPieces {
    Words row[kCount];
};

// How a weight gets to the registers: an element or 16 bytes at a time, or through a ring in shared memory.
enum class Loads { elements, packs, ring };

// The slices of a warp, one after the other through a tile and then the next one.
template <class Weight>
struct SlicePlace {
    int64_t second_half;
    int tile, tile_width, step, slice, slices, warp, warps;

    __device__ TileRows rows() const { return {int64_t{tile} * tile_width, second_half}; }
    __device__ int64_t channel() const { return (int64_t{slice} * warps + warp) * kSlice<Weight>; }
    __device__ void advance() {
        if (++slice < slices) return;
        slice = 0;
        tile += step;
    }
};

// Where a lane's two rows of a slice lie, and how many of their channels are left: none of a row past the last.
template <class Weight>
struct LaneRows {
    using Bits = typename Weight::Bits;
    const Bits *low, *high;
    int low_left, high_left;

    __device__ LaneRows(const RowProductArguments& a, const SlicePlace<Weight>& place, LanePlace lane) {
        const TileRows tile = place.rows();
        const int64_t row = tile.first + lane.row, channel = place.channel() + lane.channel;
        low = static_cast<const Bits*>(a.weight.data) + row * a.weight.stride + channel;
        high = low + tile.second_half * a.weight.stride;
        const int left = static_cast<int>(a.weight.width - channel);
        low_left = row < a.out.width ? left : 0;
        high_left = row + tile.second_half < a.weight.count ? left : 0;
    }

    // 16 bytes of a row of which so many channels are left; zeros past them.
    template <Loads kLoads>
    static __device__ Words load(const Bits* from, int left) {
        if (kLoads == Loads::elements) return load_elements(from, left);
        return load_if<Reuse::no>(left > 0, reinterpret_cast<const uint32_t*>(from));
    }
};

// Slices by way of registers: the next one is loaded before the current one is multiplied.
template <class Weight, Loads kLoads, int kStages>
class Weights {
  public:
    __device__ Weights(const RowProductArguments& a, const SlicePlace<Weight>& first, LanePlace lane)
        : a_(a), lane_(lane), following_(load(first)) {}

    __device__ WeightSlice next(SlicePlace<Weight> place) {
        const WeightSlice current = following_;
        place.advance();
        following_ = load(place);
        return current;
    }

  private:
    __device__ WeightSlice load(const SlicePlace<Weight>& place) const {
        const LaneRows<Weight> from(a_, place, lane_);
        WeightSlice slice;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            const int skipped = c * kChunk<Weight>;
            slice.low[c] = from.template load<kLoads>(from.low + skipped, from.low_left - skipped);
            slice.high[c] = from.template load<kLoads>(from.high + skipped, from.high_left - skipped);
        }
        return slice;
    }

    const RowProductArguments& a_;
    LanePlace lane_;
    WeightSlice following_;
};

constexpr int kCopies = 2 * kChunks;  // of a lane and slice: low and high rows

// Bytes of a block's ring.
constexpr size_t ring_bytes(int warps, int stages) {
    return sizeof(Words) * kWarp * kCopies * warps * stages;
}

// Slices by way of a ring in shared memory. A lane reads the slots that it copied to, and no other.
template <class Weight, int kStages>
class Weights<Weight, Loads::ring, kStages> {
  public:
    __device__ Weights(const RowProductArguments& a, const SlicePlace<Weight>& first, LanePlace lane)
        : a_(a), place_(first), lane_(lane) {
        ring_ = static_cast<Words*>(dynamic_shared_memory()) + first.warp * kStages * kCopies * kWarp +
                threadIdx.x % kWarp;
        for (int stage = 0; stage < kStages - 1; ++stage) fetch(stage);
    }

    __device__ WeightSlice next(const SlicePlace<Weight>&) {
        fetch(stage_ == 0 ? kStages - 1 : stage_ - 1);  // the slots that were read last
        wait_for_copies<kStages - 1>();
        const Words* slots = ring_ + stage_ * kCopies * kWarp;
        WeightSlice current;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            current.low[c] = slots[2 * c * kWarp];
            current.high[c] = slots[(2 * c + 1) * kWarp];
        }
        stage_ = stage_ + 1 == kStages ? 0 : stage_ + 1;
        return current;
    }

  private:
    // Zeros past the width, and for a row past the last.
    __device__ void fetch(int stage) {
        const LaneRows<Weight> from(a_, place_, lane_);
        Words* slots = ring_ + stage * kCopies * kWarp;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            const int skipped = c * kChunk<Weight>;
            copy_async(&slots[2 * c * kWarp], from.low + skipped, skipped < from.low_left);
            copy_async(&slots[(2 * c + 1) * kWarp], from.high + skipped, skipped < from.high_left);
        }
        commit_copies();
        place_.advance();
    }

    const RowProductArguments& a_;
    SlicePlace<Weight> place_;
    LanePlace lane_;
    Words* ring_;
    int stage_ = 0;
};

// Eight channels normed and rounded, as rms_norm does.
__device__ inline Words normed(const Words& x, const Words& weight, float inverse_rms) {
    Words result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 y = to_floats(x.element[i]), w = to_floats(weight.element[i]);
        result.element[i] = from_floats({y.x * inverse_rms * w.x, y.y * inverse_rms * w.y});
    }
    return result;
}

template <class Weight, bool kPacked, bool kNorms, int kCount>
__device__ XPieces<kCount> load_x(const RowProductArguments& a, int first_row, int64_t channel, int first,
                                  LanePlace lane, float inverse_rms) {
    const Rows norm_weight = {const_cast<void*>(a.norm_weight), 1, a.x.width, a.x.width};
    XPieces<kCount> pieces;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        const int chunk = (first + i) / kPieces<Weight>, piece = (first + i) % kPieces<Weight>;
        const int64_t k = channel + chunk * kChunk<Weight> + lane.channel + piece * 8;
        const Words x = load_row<kPacked>(a.x, first_row + lane.row, k);
        pieces.row[i] = x;
        if (kNorms) {
            const Words weight = load_row<kPacked>(norm_weight, 0, k);
            pieces.row[i] = normed(x, weight, inverse_rms);
        }
    }
    return pieces;
}

// Adds the products of the slice's pieces from `first` on. Four neighboring channels of a lane serve as those
// of one product: the order of channels is free, as long as weight and x agree.
template <class Weight, int kCount>
__device__ void multiply(float (&sums)[4], const WeightSlice& weight, int first, const XPieces<kCount>& x) {
#pragma unroll
    for (int i = 0; i < 2 * kCount; ++i) {
        const int chunk = (2 * first + i) / (2 * kPieces<Weight>),
                  four = (2 * first + i) % (2 * kPieces<Weight>);
        const FourChannels low = Weight::widen(weight.low[chunk], four);
        const FourChannels high = Weight::widen(weight.high[chunk], four);
        const FourChannels row = Bfloat16::widen(x.row[i / 2], i % 2);
        mma_m16n8k16(sums, {low.word[0], high.word[0], low.word[1], high.word[1]},
                     {row.word[0], row.word[1]});
    }
}

// 1 / rms of the lane's row of x, in the order of rms_norm's threads, whatever the size of this block.
template <int kPack>
__device__ float row_inverse_rms(const RowProductArguments& a, int row) {
    __shared__ float warp_sums[kGroupRows][kNormWarps];
    const int lane = threadIdx.x % kWarp;
    for (int part = threadIdx.x / kWarp; part < kGroupRows * kNormWarps; part += blockDim.x / kWarp) {
        const int x_row = part / kNormWarps, warp = part % kNormWarps;
        if (x_row >= a.x.count) break;
        const auto* x = static_cast<const __nv_bfloat16*>(a.x.data) + x_row * a.x.stride;
        float squares = 0.0f;
        for (int64_t k = (warp * kWarp + lane) * kPack; k < a.x.width; k += kNormThreads * kPack) {
            const auto pack = load_pack<__nv_bfloat16, kPack>(x + k);
            for (int e = 0; e < kPack; ++e) squares += to_float(pack.element[e]) * to_float(pack.element[e]);
        }
        squares = sum_over_lanes(squares);
        if (lane == 0) warp_sums[x_row][warp] = squares;
    }
    __syncthreads();
    return row < a.x.count ? inverse_rms(warp_sums[row], a.x.width, a.eps) : 0.0f;
}

// The product with row `column` of the weight, of which there is the sum.
template <class T>
__device__ float finish_product(const RowProductArguments& a, int64_t column, float sum) {
    if (a.scale) sum *= a.scale[column];
    if (a.bias) sum += to_float(static_cast<const T*>(a.bias)[column]);
    return sum;
}

template <class T>
__device__ float rounded(float value) {
    return to_float(from_float<T>(value));
}

template <class T>
__device__ void store_result(const RowProductArguments& a, int64_t row, int64_t column, float value) {
    const int64_t offset = row * a.out.stride + column;
    if (a.adds) {
        T* residual = static_cast<T*>(a.out.data) + offset;
        *residual = from_float<T>(to_float(*residual) + rounded<T>(value));
    } else if (a.out_dtype == DType::f32) {
        static_cast<float*>(a.out.data)[offset] = value;
    } else {
        static_cast<T*>(a.out.data)[offset] = from_float<T>(value);
    }
}

template <int kGroups>
using WarpSums = float[kGroups * kGroupRows][kPaddedRows];

// Adds up the warps' sums of a tile, in their order, and stores what is inside the matrix.
template <int kGroups>
__device__ void finish_tile(const RowProductArguments& a, const WarpSums<kGroups>* sums, TileRows tile,
                            int64_t first_row, bool gated) {
    using T = __nv_bfloat16;
    const int warps = blockDim.x / kWarp;
    for (int i = threadIdx.x; i < kGroups * kGroupRows * kTileRows; i += blockDim.x) {
        const int weight_row = i % kTileRows, x_row = i / kTileRows;
        const int64_t row = first_row + x_row, column = tile.first + weight_row;
        if (row >= a.x.count || column >= a.out.width || (gated && weight_row >= kHalf)) continue;
        const auto sum_of = [&](int of_row) {
            float sum = sums[0][x_row][of_row];
            for (int w = 1; w < warps; ++w) sum += sums[w][x_row][of_row];
            return sum;
        };
        float value = finish_product<T>(a, column, sum_of(weight_row));
        if (gated) {
            const float up = finish_product<T>(a, column + tile.second_half, sum_of(weight_row + kHalf));
            value = silu(rounded<T>(value)) * rounded<T>(up);
        }
        store_result<T>(a, row, column, value);
    }
}

// Block i takes the rows of x number i % panels, and every tile at a distance of gridDim.x / panels.
template <class Weight, int kGroups, Loads kLoads, bool kNorms>
__global__ void __launch_bounds__(kMostWarps* kWarp, 1)
    row_linear_bf16_kernel(RowProductArguments a, unsigned panels, int slices, bool norm_packs) {
    constexpr bool kPacked = kLoads != Loads::elements;
    // Loaded at a time: registers are short.
    constexpr int kXPieces = kGroups == 4 ? 1 : kNorms && kPieces<Weight> > 1 ? 2 : 4;
    __shared__ WarpSums<kGroups> shared[kMostWarps];
    const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, index = threadIdx.x % kWarp;
    const LanePlace lane = {index / 4, index % 4 * kLaneWidth<Weight>};
    const int first_row = static_cast<int>(blockIdx.x % panels) * kGroups * kGroupRows;
    const bool gated = kNorms && a.gated;  // what is gated is normed
    const int64_t second_half = gated ? a.out.width : kHalf;
    const int tile_width = gated ? kHalf : kTileRows, step = static_cast<int>(gridDim.x / panels);
    const int tiles = static_cast<int>((a.out.width + tile_width - 1) / tile_width);
    SlicePlace<Weight> place = {
        second_half, static_cast<int>(blockIdx.x / panels), tile_width, step, 0, slices, warp, warps};

    Weights<Weight, kLoads, kStages<kGroups>> weights(a, place, lane);  // its first slices
    wait_for_previous_kernel();
    float scale = 0.0f;
    if (kNorms) {
        scale = norm_packs ? row_inverse_rms<kWidestPack<__nv_bfloat16>>(a, lane.row)
                           : row_inverse_rms<1>(a, lane.row);
    }
    while (place.tile < tiles) {
        const TileRows rows = place.rows();
        float sums[kGroups][4] = {};
        for (int slice = 0; slice < slices; ++slice, place.advance()) {
            const WeightSlice current = weights.next(place);
#pragma unroll
            for (int g = 0; g < kGroups; ++g) {
#pragma unroll
                for (int piece = 0; piece < kChunks * kPieces<Weight>; piece += kXPieces) {
                    const auto x = load_x<Weight, kPacked, kNorms, kXPieces>(
                        a, first_row + g * kGroupRows, place.channel(), piece, lane, scale);
                    multiply<Weight>(sums[g], current, piece, x);
                }
            }
        }
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
            for (int e = 0; e < 4; ++e) {
                const int x_row = g * kGroupRows + index % 4 * 2 + e % 2;
                shared[warp][x_row][lane.row + e / 2 * kHalf] = sums[g][e];
            }
        }
        __syncthreads();
        finish_tile<kGroups>(a, shared, rows, first_row, gated);
        __syncthreads();
    }
}

constexpr int kFloatWarps = 8;

template <class Weight, int kPack>
__global__ void __launch_bounds__(kFloatWarps* kWarp, 4) row_linear_f32_kernel(RowProductArguments a) {
    wait_for_previous_kernel();
    const int64_t column = int64_t{blockIdx.x} * kFloatWarps + threadIdx.x / kWarp;
    if (column >= a.weight.count) return;
    const int64_t first_row = int64_t{blockIdx.y} * kGroupRows;
    const auto* weight = static_cast<const Weight*>(a.weight.data) + column * a.weight.stride;
    const auto* x = static_cast<const float*>(a.x.data) + first_row * a.x.stride;
    const int lane = threadIdx.x % kWarp;
    float sums[kGroupRows] = {};
    for (int64_t k = lane * kPack; k < a.weight.width; k += kWarp * kPack) {
        const auto w = load_pack<Weight, kPack>(weight + k);
#pragma unroll
        for (int r = 0; r < kGroupRows; ++r) {
            if (first_row + r >= a.x.count) break;
            const auto row = load_pack<float, kPack>(x + r * a.x.stride + k);
            for (int e = 0; e < kPack; ++e) sums[r] += to_float(w.element[e]) * row.element[e];
        }
    }
#pragma unroll
    for (int r = 0; r < kGroupRows; ++r) {
        const float sum = sum_over_lanes(sums[r]);
        if (lane != 0 || first_row + r >= a.x.count) continue;
        store_result<float>(a, first_row + r, column, finish_product<float>(a, column, sum));
    }
}

template <class Weight, int kGroups, Loads kLoads, bool kNorms>
void launch_bf16(const RowProductArguments& a, cudaStream_t stream) {
    const int64_t slices_in_all = ceil_divide(a.x.width, kSlice<Weight>);
    const int64_t slices = slices_in_all == 0 ? 1 : ceil_divide(slices_in_all, kMostWarps);  // per warp
    const int64_t warps = slices_in_all == 0 ? 1 : ceil_divide(slices_in_all, slices);
    const int64_t panels = ceil_divide(a.x.count, kGroups * kGroupRows);
    const int64_t tiles = ceil_divide(a.weight.count, kTileRows);
    const int64_t resident = multiprocessors() * (kMostWarps / warps);
    const int64_t blocks = tiles < resident ? tiles : resident;
    const bool norm_packs = rows_allow_packs<__nv_bfloat16>(a.x) && is_aligned(a.norm_weight, 16);
    const size_t ring = kLoads == Loads::ring ? ring_bytes(static_cast<int>(warps), kStages<kGroups>) : 0;
    launch(row_linear_bf16_kernel<Weight, kGroups, kLoads, kNorms>,
           dim3(static_cast<unsigned>(blocks * panels)), dim3(static_cast<unsigned>(warps * kWarp)),
           DynamicSharedMemory{ring}, stream, a, static_cast<unsigned>(panels), static_cast<int>(slices),
           norm_packs);
}

template <class Weight, int kGroups, bool kNorms = false>
void launch_packed(const RowProductArguments& a, cudaStream_t stream) {
    constexpr size_t kRing = ring_bytes(kMostWarps, kStages<kGroups>);
    constexpr size_t kSums = kMostWarps * sizeof(WarpSums<kGroups>) + sizeof(float) * kGroupRows * kNormWarps;
    if constexpr (kGroups <= kMostRingGroups) {
        if (shared_memory_per_block() >= kRing + kSums) {
            return launch_bf16<Weight, kGroups, Loads::ring, kNorms>(a, stream);
        }
    }
    launch_bf16<Weight, kGroups, Loads::packs, kNorms>(a, stream);
}

template <class Weight>
void launch_bf16(const RowProductArguments& a, cudaStream_t stream) {
    const bool packed = rows_allow_packs<__nv_bfloat16>(a.x) &&
                        rows_allow_packs<typename Weight::Bits>(a.weight) && is_aligned(a.norm_weight, 16);
    if (a.norm_weight) {
        return packed ? launch_packed<Weight, 1, true>(a, stream)
                      : launch_bf16<Weight, 1, Loads::elements, true>(a, stream);
    }
    if (!packed) return launch_bf16<Weight, 1, Loads::elements, false>(a, stream);
    if (a.x.count <= kGroupRows) return launch_packed<Weight, 1>(a, stream);
    if (a.x.count <= 2 * kGroupRows) return launch_packed<Weight, 2>(a, stream);
    launch_packed<Weight, kMostGroups<Weight>>(a, stream);
}

template <class Weight, int kPack>
void launch_f32(const RowProductArguments& a, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(ceil_divide(a.weight.count, kFloatWarps)),
                    static_cast<unsigned>(ceil_divide(a.x.count, kGroupRows)));
    launch(row_linear_f32_kernel<Weight, kPack>, grid, dim3(kFloatWarps * kWarp), stream, a);
}

void launch_f32(const RowProductArguments& a, cudaStream_t stream) {
    if (a.weight_dtype == DType::i8) return launch_f32<int8_t, 1>(a, stream);
    if (a.weight_dtype == DType::e4m3) return launch_f32<E4m3Bits, 1>(a, stream);
    const bool packed = rows_allow_packs<float>(a.x) && rows_allow_packs<float>(a.weight);
    packed ? launch_f32<float, kWidestPack<float>>(a, stream) : launch_f32<float, 1>(a, stream);
}

}  // namespace

void row_linear(const RowProductArguments& arguments, cudaStream_t stream) {
    const RowProductArguments& a = arguments;
    if (a.x.count == 0 || a.weight.count == 0) return;
    if (a.dtype == DType::f32) return launch_f32(a, stream);
    if (a.weight_dtype == DType::i8) return launch_bf16<Int8>(a, stream);
    if (a.weight_dtype == DType::e4m3) return launch_bf16<E4m3>(a, stream);
    launch_bf16<Bfloat16>(a, stream);
}

}  // namespace blip3o::cuda
