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
//          Blocks stay (one per multiprocessor, more if they are small) and walk over the tiles. A lane loads
//          16 bytes of a row, eight loads at a time, and those of the next slice or tile before it multiplies:
//          a block of 16 warps has 64 to 128 KiB on the way. 8 bits become bfloat16 in registers, exactly.
//          Normed rows, up to 8, are normed by every block as it loads them: the row lies in a cache, and the
//          first weights are on their way meanwhile.
//          float32: one warp per row of the weight and 8 rows of x; for tests, not for speed.
// Bytes    the weight once per 32 rows of x (16 in 8 bits; 8 in float32, or if rows are not aligned to 16
//          bytes), 2 N K in bfloat16, N K in 8 bits; x comes from a cache.
// FLOPs    2 M N K; the tensor cores do them for 8 rows of x at least.
// Bound    memory.
//
// Which warp sums which channels in which order depends on K alone, and a column of the tensor cores' product
// on that column alone: the bits of a row are the same whatever the other rows are and however many.
#include "cuda/convert.h"
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
template <class Weight>
constexpr int kPieces = kLaneWidth<Weight> / 8;  // of x that a chunk takes, 16 bytes each

// The 16 bytes of a row from channel k on; zeros past its width, and for a row past the last.
template <class Bits, bool kPacked, Reuse kReuse>
__device__ Words load_channels(const Rows& rows, int64_t row, int64_t k) {
    const auto* from = static_cast<const Bits*>(rows.data) + row * rows.stride + k;
    if (kPacked) {
        return load_if<kReuse>(row < rows.count && k < rows.width, reinterpret_cast<const uint32_t*>(from));
    }
    constexpr int kPerWord = 4 / sizeof(Bits);
    Words words = {};
    for (int w = 0; w < 4; ++w, from += kPerWord, k += kPerWord) {
#pragma unroll 1  // registers are short
        for (int e = 0; e < kPerWord; ++e) {
            const uint32_t bits = row < rows.count && k + e < rows.width ? from[e] : 0;
            words.element[w] |= bits << (e * 8 * sizeof(Bits));
        }
    }
    return words;
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

template <class Weight, bool kPacked>
__device__ WeightSlice load_weight(const RowProductArguments& a, TileRows tile, int64_t channel,
                                   LanePlace lane) {
    using Bits = typename Weight::Bits;
    const Rows first_half = {a.weight.data, a.out.width, a.weight.width, a.weight.stride};
    const int64_t row = tile.first + lane.row;
    WeightSlice slice;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
        const int64_t k = channel + c * kChunk<Weight> + lane.channel;
        slice.low[c] = load_channels<Bits, kPacked, Reuse::no>(first_half, row, k);
        slice.high[c] = load_channels<Bits, kPacked, Reuse::no>(a.weight, row + tile.second_half, k);
    }
    return slice;
}

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
        const Words x = load_channels<uint16_t, kPacked, Reuse::yes>(a.x, first_row + lane.row, k);
        pieces.row[i] = x;
        if (kNorms) {
            const Words weight = load_channels<uint16_t, kPacked, Reuse::yes>(norm_weight, 0, k);
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
template <class Weight, int kGroups, bool kPacked, bool kNorms>
__global__ void __launch_bounds__(kMostWarps* kWarp, 1)
    row_linear_bf16_kernel(RowProductArguments a, unsigned panels, int slices, bool norm_packs) {
    constexpr int kXPieces = kGroups == 4 ? 1 : 4;  // loaded at a time: registers are short
    __shared__ WarpSums<kGroups> shared[kMostWarps];
    const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, index = threadIdx.x % kWarp;
    const LanePlace lane = {index / 4, index % 4 * kLaneWidth<Weight>};
    const int first_row = static_cast<int>(blockIdx.x % panels) * kGroups * kGroupRows;
    const bool gated = kNorms && a.gated;  // what is gated is normed
    const int64_t tile_width = gated ? kHalf : kTileRows, second_half = gated ? a.out.width : kHalf;
    const int64_t tiles = (a.out.width + tile_width - 1) / tile_width, step = gridDim.x / panels;
    int64_t tile = blockIdx.x / panels;
    const auto rows_of = [&](int64_t number) { return TileRows{number * tile_width, second_half}; };
    const auto channel_of = [&](int slice) { return (int64_t{slice} * warps + warp) * kSlice<Weight>; };

    WeightSlice current = load_weight<Weight, kPacked>(a, rows_of(tile), channel_of(0), lane);
    float scale = 0.0f;
    if (kNorms) {
        scale = norm_packs ? row_inverse_rms<kWidestPack<__nv_bfloat16>>(a, lane.row)
                           : row_inverse_rms<1>(a, lane.row);
    }
    for (; tile < tiles; tile += step) {
        float sums[kGroups][4] = {};
        for (int slice = 0; slice < slices; ++slice) {
            const bool last = slice + 1 == slices;
            const WeightSlice next = load_weight<Weight, kPacked>(a, rows_of(last ? tile + step : tile),
                                                                  channel_of(last ? 0 : slice + 1), lane);
#pragma unroll
            for (int g = 0; g < kGroups; ++g) {
#pragma unroll
                for (int piece = 0; piece < kChunks * kPieces<Weight>; piece += kXPieces) {
                    const auto x = load_x<Weight, kPacked, kNorms, kXPieces>(
                        a, first_row + g * kGroupRows, channel_of(slice), piece, lane, scale);
                    multiply<Weight>(sums[g], current, piece, x);
                }
            }
            current = next;
        }
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
            for (int e = 0; e < 4; ++e) {
                const int x_row = g * kGroupRows + index % 4 * 2 + e % 2;
                shared[warp][x_row][lane.row + e / 2 * kHalf] = sums[g][e];
            }
        }
        __syncthreads();
        finish_tile<kGroups>(a, shared, rows_of(tile), first_row, gated);
        __syncthreads();
    }
}

constexpr int kFloatWarps = 8;

template <class Weight, int kPack>
__global__ void __launch_bounds__(kFloatWarps* kWarp, 4) row_linear_f32_kernel(RowProductArguments a) {
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

template <class Weight, int kGroups, bool kPacked, bool kNorms = false>
void launch_bf16(const RowProductArguments& a, cudaStream_t stream) {
    const int64_t slices_in_all = ceil_divide(a.x.width, kSlice<Weight>);
    const int64_t slices = ceil_divide(slices_in_all, kMostWarps);  // per warp
    const int64_t warps = slices == 0 ? 1 : ceil_divide(slices_in_all, slices);
    const int64_t panels = ceil_divide(a.x.count, kGroups * kGroupRows);
    const int64_t tiles = ceil_divide(a.weight.count, kTileRows);
    const int64_t resident = multiprocessors() * (kMostWarps / warps);
    const int64_t blocks = tiles < resident ? tiles : resident;
    const bool norm_packs = rows_allow_packs<__nv_bfloat16>(a.x) && is_aligned(a.norm_weight, 16);
    launch(row_linear_bf16_kernel<Weight, kGroups, kPacked, kNorms>,
           dim3(static_cast<unsigned>(blocks * panels)), dim3(static_cast<unsigned>(warps * kWarp)), stream,
           a, static_cast<unsigned>(panels), static_cast<int>(slices), norm_packs);
}

template <class Weight>
void launch_bf16(const RowProductArguments& a, cudaStream_t stream) {
    const bool packed = rows_allow_packs<__nv_bfloat16>(a.x) &&
                        rows_allow_packs<typename Weight::Bits>(a.weight) && is_aligned(a.norm_weight, 16);
    if (a.norm_weight) {
        return packed ? launch_bf16<Weight, 1, true, true>(a, stream)
                      : launch_bf16<Weight, 1, false, true>(a, stream);
    }
    if (!packed) return launch_bf16<Weight, 1, false>(a, stream);
    if (a.x.count <= kGroupRows) return launch_bf16<Weight, 1, true>(a, stream);
    if (a.x.count <= 2 * kGroupRows) return launch_bf16<Weight, 2, true>(a, stream);
    launch_bf16<Weight, kMostGroups<Weight>, true>(a, stream);
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
