// Draws that agree with their guesses are kept, and each image's window of rows moves on behind them. The embeddings
// of the tokens that its rows read are written behind that, where asked for.
//
// Tiling   a block for each window. Its first warp counts how often a token repeats the one above it and the last
//          one; its first lane moves the window; all threads copy the embeddings of its rows, 16 bytes at a time and
//          four of them on the way. A block more for each row, which copies its embedding if it is of no window.
// Bytes    8 for each token of the image so far, from a cache, and about 100 a row; an embedding read and written.
// Bound    launch latency, and a few hundred nanoseconds of dependent loads.
//
// What it reads is on the device, where a wrong value cannot be reported: such a window stays as it is, and the
// embedding of an id that has none is not a number.
#include <type_traits>

#include "blip3o/ops/advance_windows.h"
#include "cuda/convert.h"
#include "cuda/dependent_launch.h"
#include "cuda/launch.h"
#include "cuda/ops.h"
#include "cuda/warp.h"

namespace blip3o::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kPacksAtOnce = 4;  // that a thread has on the way

// By the lanes of one warp.
__device__ void advance(const AdvanceWindowsArguments& a, int64_t window, int64_t first, int64_t last) {
    const int64_t lane = threadIdx.x;
    if (window >= a.windows || !a.moves(window)) {
        for (int64_t row = first + lane; row < last; row += kWarp) a.stay(row);
        return;
    }
    const int64_t kept = a.num_generated[first];
    const int64_t* ids = a.output_ids + a.output_slots[first] - kept;
    int more = 0;  // repeats of the token above, less those of the last one
    for (int64_t index = a.grid_width + lane; index < kept; index += kWarp) {
        more += static_cast<int>(a.repeats(ids, index, a.grid_width)) -
                static_cast<int>(a.repeats(ids, index, 1));
    }
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
        more += __shfl_xor_sync(kAllLanes, more, distance);
    if (lane == 0) a.move(window, more >= 0);
}

// The embeddings of the tokens that rows read, by the threads of a block. All rows are one range of packs, so that
// every thread has several on the way.
template <class T, class Weight, int kPack>
__device__ void embed(const AdvanceWindowsArguments& a, int64_t first, int64_t last) {
    const int width = static_cast<int>(a.embedded.width) / kPack;
    const int packs = static_cast<int>(last - first) * width;
    for (int begin = static_cast<int>(threadIdx.x); begin < packs; begin += kThreads * kPacksAtOnce) {
        Pack<Weight, kPack> weights[kPacksAtOnce];
        bool known[kPacksAtOnce];
#pragma unroll
        for (int n = 0; n < kPacksAtOnce; ++n) {
            const int i = begin + n * kThreads;
            const int64_t id = i < packs ? a.out[first + i / width] : -1;
            const int64_t offset = id * a.embedding.stride + i % width * kPack;
            known[n] = id >= 0 && id < a.embedding.count;
            weights[n] = {};
            if (known[n]) {
                weights[n] = load_pack<Weight, kPack>(static_cast<const Weight*>(a.embedding.data) + offset);
            }
        }
#pragma unroll
        for (int n = 0; n < kPacksAtOnce; ++n) {
            const int i = begin + n * kThreads;
            if (i >= packs) break;
            Pack<T, kPack> result;
            for (int e = 0; e < kPack; ++e) {
                const float value = known[n] ? to_float(weights[n].element[e]) : nanf("");
                result.element[e] = from_float<T>(value);
            }
            const int64_t row = first + i / width;
            store_pack(static_cast<T*>(a.embedded.data) + row * a.embedded.stride + i % width * kPack,
                       result);
        }
    }
}

// kWidens: the embedding is bfloat16 beside float32.
template <class T, int kPack, bool kWidens>
__global__ void __launch_bounds__(kThreads) advance_windows_kernel(AdvanceWindowsArguments a) {
    wait_for_previous_kernel();
    const int64_t window = blockIdx.x, loose = window - a.windows;
    if (loose >= 0 && loose < a.cu_rows[a.windows]) return;  // a row of a window
    const int64_t first = loose >= 0 ? loose : a.cu_rows[window];
    const int64_t last = loose >= 0 ? loose + 1 : a.cu_rows[window + 1];
    if (threadIdx.x < kWarp) advance(a, window, first, last);
    if (!a.embeds) return;
    __syncthreads();
    embed<T, std::conditional_t<kWidens, __nv_bfloat16, T>, kPack>(a, first, last);
}

template <class T, bool kWidens>
void launch_windows(const AdvanceWindowsArguments& a, cudaStream_t stream) {
    constexpr int kPack = kWidestPack<T>;
    const bool packed = rows_allow_packs<T>(a.embedded) && a.embedding.stride % kPack == 0 &&
                        is_aligned(a.embedding.data, 16);
    const dim3 grid(static_cast<unsigned>(a.windows + a.rows)), block(a.embeds ? kThreads : kWarp);
    launch(packed ? advance_windows_kernel<T, kPack, kWidens> : advance_windows_kernel<T, 1, kWidens>, grid,
           block, stream, a);
}

}  // namespace

void advance_windows(const AdvanceWindowsArguments& arguments, cudaStream_t stream) {
    if (arguments.rows == 0) return;
    if (arguments.embedded_dtype == DType::bf16) {
        launch_windows<__nv_bfloat16, false>(arguments, stream);
    } else if (arguments.embedding_dtype == DType::bf16) {
        launch_windows<float, true>(arguments, stream);
    } else {
        launch_windows<float, false>(arguments, stream);
    }
}

}  // namespace blip3o::cuda
