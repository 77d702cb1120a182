// x weight^T + bias for few rows of x.
//
// Tiling   bfloat16: a tile is 16 rows of the weight, all channels, and up to 32 rows of x. The warps of a
//          block (up to 16) share its channels in slices of 128 and multiply on the tensor cores; their sums
//          are added up through shared memory, warp after warp. Blocks stay (one per multiprocessor, more if
//          they are small) and walk over the tiles. A lane loads 16 bytes of a row, eight loads at a time,
//          and those of the next slice or tile before it multiplies: a block of 16 warps has 64 to 128 KiB
//          on the way. float32: one warp per row of the weight and 8 rows of x; for tests, not for speed.
// Bytes    the weight once per 32 rows of x (8 in float32, or if rows are not aligned to 16 bytes), 2 N K in
//          bfloat16; x comes from a cache.
// FLOPs    2 M N K; the tensor cores do them for 8 rows of x at least.
// Bound    memory.
// State    not yet run on hardware; the logic is tested on the CPU (tests/csrc/simt).
//
// Which warp sums which channels in which order depends on K alone, and a column of the tensor cores' product
// on that column alone: the bits of a row are the same whatever the other rows are and however many.
#include "cuda/convert.h"
#include "cuda/launch.h"
#include "cuda/mma.h"
#include "cuda/ops.h"
#include "cuda/warp.h"

namespace blip3o::cuda {
namespace {

constexpr int kTileRows = 16;  // rows of the weight in a tile
constexpr int kGroupRows = 8;  // rows of x in one product of the tensor cores
constexpr int kLaneWidth = 8;  // channels of one load
constexpr int kChunk = 4 * kLaneWidth, kChunks = 4, kSlice = kChunk * kChunks;
constexpr int kMostWarps = 16;
constexpr int kPaddedRows = 20;  // of sums in shared memory, so that a warp's stores hit different banks

using Words = Pack<uint32_t, 4>;  // eight channels

// Channels k .. k + 7 of a row of bfloat16; zeros past its width, and for a row past the last.
template <bool kPacked, Reuse kReuse>
__device__ Words load_channels(const Rows& rows, int64_t row, int64_t k) {
    const auto* from = static_cast<const uint16_t*>(rows.data) + row * rows.stride + k;
    if (kPacked) {
        return load_if<kReuse>(row < rows.count && k < rows.width, reinterpret_cast<const uint32_t*>(from));
    }
    Words words = {};
    for (int e = 0; e < kLaneWidth; ++e) {
        const uint32_t bits = row < rows.count && k + e < rows.width ? from[e] : 0;
        words.element[e / 2] |= bits << (e % 2 * 16);
    }
    return words;
}

// Where a lane works: rows g and g + 8 of a tile, row g of a group of x, and its channels of a chunk.
struct LanePlace {
    int row, channel;
};

// What a lane holds of a slice of a tile of the weight: two rows.
struct WeightSlice {
    Words low[kChunks], high[kChunks];
};

// What it holds of some chunks of a group of x: one row.
template <int kCount>
struct XChunks {
    Words row[kCount];
};

template <bool kPacked>
__device__ WeightSlice load_weight(const Rows& weight, int64_t tile, int64_t channel, LanePlace lane) {
    const int64_t row = tile * kTileRows + lane.row;
    WeightSlice slice;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
        const int64_t k = channel + c * kChunk + lane.channel;
        slice.low[c] = load_channels<kPacked, Reuse::no>(weight, row, k);
        slice.high[c] = load_channels<kPacked, Reuse::no>(weight, row + kTileRows / 2, k);
    }
    return slice;
}

template <bool kPacked, int kCount>
__device__ XChunks<kCount> load_x(const Rows& x, int first_row, int64_t channel, LanePlace lane) {
    XChunks<kCount> chunks;
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
        chunks.row[c] =
            load_channels<kPacked, Reuse::yes>(x, first_row + lane.row, channel + c * kChunk + lane.channel);
    }
    return chunks;
}

// Adds the products of the slice's chunks from `first` on. Eight neighbouring channels of a lane serve as four
// of each of two products: the order of channels is free, as long as weight and x agree.
template <int kCount>
__device__ void multiply(float (&sums)[4], const WeightSlice& weight, int first, const XChunks<kCount>& x) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
        const uint32_t (&low)[4] = weight.low[first + c].element, (&high)[4] = weight.high[first + c].element;
        const uint32_t (&row)[4] = x.row[c].element;
        mma_m16n8k16(sums, {low[0], high[0], low[1], high[1]}, {row[0], row[1]});
        mma_m16n8k16(sums, {low[2], high[2], low[3], high[3]}, {row[2], row[3]});
    }
}

__device__ inline void store_result(const RowLinearArguments& a, int64_t row, int64_t column, float value) {
    const int64_t offset = row * a.out.stride + column;
    if (a.out_dtype == DType::f32) {
        static_cast<float*>(a.out.data)[offset] = value;
    } else {
        static_cast<__nv_bfloat16*>(a.out.data)[offset] = from_float<__nv_bfloat16>(value);
    }
}

template <int kGroups>
using WarpSums = float[kGroups * kGroupRows][kPaddedRows];

// Adds up the warps' sums of a tile, in their order, and stores what is inside the matrix.
template <int kGroups>
__device__ void finish_tile(const RowLinearArguments& a, const WarpSums<kGroups>* sums, int64_t tile,
                            int64_t first_row) {
    const int warps = blockDim.x / kWarp;
    for (int i = threadIdx.x; i < kGroups * kGroupRows * kTileRows; i += blockDim.x) {
        const int weight_row = i % kTileRows, x_row = i / kTileRows;
        const int64_t row = first_row + x_row, column = tile * kTileRows + weight_row;
        if (row >= a.x.count || column >= a.weight.count) continue;
        float sum = sums[0][x_row][weight_row];
        for (int w = 1; w < warps; ++w) sum += sums[w][x_row][weight_row];
        if (a.bias) sum += to_float(static_cast<const __nv_bfloat16*>(a.bias)[column]);
        store_result(a, row, column, sum);
    }
}

// Block i takes the rows of x number i % panels, and every tile at a distance of gridDim.x / panels.
template <int kGroups, bool kPacked>
__global__ void __launch_bounds__(kMostWarps* kWarp, 1)
    row_linear_bf16_kernel(RowLinearArguments a, unsigned panels, int slices) {
    constexpr int kXChunks = kGroups < 4 ? kChunks : 1;  // loaded at a time: registers are short
    __shared__ WarpSums<kGroups> shared[kMostWarps];
    const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, index = threadIdx.x % kWarp;
    const LanePlace lane = {index / 4, index % 4 * kLaneWidth};
    const int first_row = static_cast<int>(blockIdx.x % panels) * kGroups * kGroupRows;
    const int64_t tiles = (a.weight.count + kTileRows - 1) / kTileRows, step = gridDim.x / panels;
    int64_t tile = blockIdx.x / panels;
    const auto channel_of = [&](int slice) { return (int64_t{slice} * warps + warp) * kSlice; };

    WeightSlice current = load_weight<kPacked>(a.weight, tile, channel_of(0), lane);
    for (; tile < tiles; tile += step) {
        float sums[kGroups][4] = {};
        for (int slice = 0; slice < slices; ++slice) {
            const bool last = slice + 1 == slices;
            const WeightSlice next = load_weight<kPacked>(a.weight, last ? tile + step : tile,
                                                          channel_of(last ? 0 : slice + 1), lane);
#pragma unroll
            for (int i = 0; i < kGroups * kChunks; i += kXChunks) {
                const int g = i / kChunks, chunk = i % kChunks;
                const auto x = load_x<kPacked, kXChunks>(a.x, first_row + g * kGroupRows,
                                                         channel_of(slice) + chunk * kChunk, lane);
                multiply(sums[g], current, chunk, x);
            }
            current = next;
        }
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
            for (int e = 0; e < 4; ++e) {
                const int x_row = g * kGroupRows + index % 4 * 2 + e % 2;
                shared[warp][x_row][lane.row + e / 2 * (kTileRows / 2)] = sums[g][e];
            }
        }
        __syncthreads();
        finish_tile<kGroups>(a, shared, tile, first_row);
        __syncthreads();
    }
}

constexpr int kFloatWarps = 8;

template <int kPack>
__global__ void __launch_bounds__(kFloatWarps* kWarp) row_linear_f32_kernel(RowLinearArguments a) {
    const int64_t column = int64_t{blockIdx.x} * kFloatWarps + threadIdx.x / kWarp;
    if (column >= a.weight.count) return;
    const int64_t first_row = int64_t{blockIdx.y} * kGroupRows;
    const auto* weight = static_cast<const float*>(a.weight.data) + column * a.weight.stride;
    const auto* x = static_cast<const float*>(a.x.data) + first_row * a.x.stride;
    const int lane = threadIdx.x % kWarp;
    float sums[kGroupRows] = {};
    for (int64_t k = lane * kPack; k < a.weight.width; k += kWarp * kPack) {
        const auto w = load_pack<float, kPack>(weight + k);
#pragma unroll
        for (int r = 0; r < kGroupRows; ++r) {
            if (first_row + r >= a.x.count) break;
            const auto row = load_pack<float, kPack>(x + r * a.x.stride + k);
            for (int e = 0; e < kPack; ++e) sums[r] += w.element[e] * row.element[e];
        }
    }
#pragma unroll
    for (int r = 0; r < kGroupRows; ++r) {
        const float sum = sum_over_lanes(sums[r]);
        if (lane != 0 || first_row + r >= a.x.count) continue;
        store_result(a, first_row + r, column,
                     a.bias ? sum + static_cast<const float*>(a.bias)[column] : sum);
    }
}

template <int kGroups, bool kPacked>
void launch_bf16(const RowLinearArguments& a, cudaStream_t stream) {
    const int64_t slices_in_all = ceil_divide(a.x.width, kSlice);
    const int64_t slices = ceil_divide(slices_in_all, kMostWarps);  // per warp
    const int64_t warps = slices == 0 ? 1 : ceil_divide(slices_in_all, slices);
    const int64_t panels = ceil_divide(a.x.count, kGroups * kGroupRows);
    const int64_t tiles = ceil_divide(a.weight.count, kTileRows);
    const int64_t resident = multiprocessors() * (kMostWarps / warps);
    const int64_t blocks = tiles < resident ? tiles : resident;
    launch(row_linear_bf16_kernel<kGroups, kPacked>, dim3(static_cast<unsigned>(blocks * panels)),
           dim3(static_cast<unsigned>(warps * kWarp)), stream, a, static_cast<unsigned>(panels),
           static_cast<int>(slices));
}

void launch_f32(const RowLinearArguments& a, bool packed, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(ceil_divide(a.weight.count, kFloatWarps)),
                    static_cast<unsigned>(ceil_divide(a.x.count, kGroupRows)));
    launch(packed ? row_linear_f32_kernel<kWidestPack<float>> : row_linear_f32_kernel<1>, grid,
           dim3(kFloatWarps * kWarp), stream, a);
}

}  // namespace

void row_linear(const RowLinearArguments& arguments, cudaStream_t stream) {
    const RowLinearArguments& a = arguments;
    if (a.x.count == 0 || a.weight.count == 0) return;
    if (a.dtype == DType::f32) {
        return launch_f32(a, rows_allow_packs<float>(a.x) && rows_allow_packs<float>(a.weight), stream);
    }
    const bool packed = rows_allow_packs<__nv_bfloat16>(a.x) && rows_allow_packs<__nv_bfloat16>(a.weight);
    if (!packed) return launch_bf16<1, false>(a, stream);
    if (a.x.count <= kGroupRows) return launch_bf16<1, true>(a, stream);
    a.x.count <= 2 * kGroupRows ? launch_bf16<2, true>(a, stream) : launch_bf16<4, true>(a, stream);
}

}  // namespace blip3o::cuda
