// Draws that agree with their guesses are kept, and each image's window of rows moves on behind them.
//
// Tiling   a warp for each window, which counts how often a token repeats the one above it and the last one;
//          its first lane moves the window. One more warp for the rows of no window.
// Bytes    8 for each token of the image so far, from a cache, and about 100 a row.
// Bound    launch latency, and a few hundred nanoseconds of dependent loads.
//
// What it reads is on the device, where a wrong value cannot be reported: such a window stays as it is.
#include "blip3o/ops/advance_windows.h"
#include "cuda/launch.h"
#include "cuda/ops.h"
#include "cuda/warp.h"

namespace blip3o::cuda {
namespace {

__global__ void __launch_bounds__(kWarp) advance_windows_kernel(AdvanceWindowsArguments a) {
    const int64_t window = blockIdx.x, lane = threadIdx.x;
    const int64_t first = a.cu_rows[window];
    if (window == a.windows || !a.moves(window)) {
        const int64_t last = window == a.windows ? a.rows : a.cu_rows[window + 1];
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

}  // namespace

void advance_windows(const AdvanceWindowsArguments& arguments, cudaStream_t stream) {
    if (arguments.rows == 0) return;
    const dim3 grid(static_cast<unsigned>(arguments.windows + 1));
    launch(advance_windows_kernel, grid, dim3(kWarp), stream, arguments);
}

}  // namespace blip3o::cuda
