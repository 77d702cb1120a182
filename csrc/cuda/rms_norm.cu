// RMSNorm of rows with an optional residual: residual += x, then y / sqrt(mean(y^2) + eps) * weight + bias. A row may
// be written to a second place too, which is looked up on the device; where that is none, it is not.
//
// Tiling   one block of 256 threads per row; each thread takes packs of 16 bytes at a distance of the block.
//          The sum of squares goes over the lanes of each warp by shuffles, over the warps through shared
//          memory.
// Bytes    per element: x once (from memory), out once; with a residual also its load and store. The second
//          pass over the row finds it in the first-level cache. For bfloat16: 4 bytes, with a residual 8.
// FLOPs    5 per element.
// Bound    memory at every width; a decoding step's few rows are bound by launch latency.
#include "cuda/convert.h"
#include "cuda/dependent_launch.h"
#include "cuda/launch.h"
#include "cuda/ops.h"
#include "cuda/rms.h"

namespace blip3o::cuda {
namespace {

template <class T, int kPack>
__global__ void __launch_bounds__(kNormThreads, 4) rms_norm_kernel(RmsNormArguments a) {
    wait_for_previous_kernel();
    using Packed = Pack<T, kPack>;
    const int64_t row = blockIdx.x, packs = a.x.width / kPack;
    const auto* x = reinterpret_cast<const Packed*>(static_cast<const T*>(a.x.data) + row * a.x.stride);
    auto* residual = reinterpret_cast<Packed*>(static_cast<T*>(a.residual.data) + row * a.residual.stride);
    auto* out = reinterpret_cast<Packed*>(static_cast<T*>(a.out.data) + row * a.out.stride);
    const auto* weight = static_cast<const Packed*>(a.weight);
    const auto* bias = static_cast<const Packed*>(a.bias);
    const bool adds = a.residual.data != nullptr;
    const int64_t slot = a.slots ? a.slots[row] : -1;
    const bool keeps = slot >= 0 && slot < a.kept.count;
    auto* kept = reinterpret_cast<Packed*>(static_cast<T*>(a.kept.data) + slot * a.kept.stride);
    __shared__ float warp_sums[kNormWarps];

    float squares = 0.0f;
    for (int64_t i = threadIdx.x; i < packs; i += kNormThreads) {
        Packed y = x[i];
        if (adds) {
            const Packed before = residual[i];
            for (int e = 0; e < kPack; ++e) {
                y.element[e] = from_float<T>(to_float(before.element[e]) + to_float(y.element[e]));
            }
            residual[i] = y;
        }
        for (int e = 0; e < kPack; ++e) squares += to_float(y.element[e]) * to_float(y.element[e]);
    }
    squares = sum_over_lanes(squares);
    if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = squares;
    __syncthreads();
    const float scale = inverse_rms(warp_sums, a.x.width, a.eps);

    // The packs that this thread has just written or read.
    for (int64_t i = threadIdx.x; i < packs; i += kNormThreads) {
        const Packed y = adds ? residual[i] : x[i], w = weight[i];
        Packed b = {}, result;
        if (bias) b = bias[i];
        for (int e = 0; e < kPack; ++e) {
            const float value = to_float(y.element[e]) * scale * to_float(w.element[e]);
            result.element[e] = from_float<T>(bias ? value + to_float(b.element[e]) : value);
        }
        out[i] = result;
        if (keeps) kept[i] = result;
    }
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class T>
void launch_rows(const RmsNormArguments& a, cudaStream_t stream) {
    const bool packed = rows_allow_packs<T>(a.x) && rows_allow_packs<T>(a.out) &&
                        (!a.residual.data || rows_allow_packs<T>(a.residual)) &&
                        (!a.slots || rows_allow_packs<T>(a.kept)) && aligned(a.weight) && aligned(a.bias);
    const dim3 grid(static_cast<unsigned>(a.x.count)), block(kNormThreads);
    launch(packed ? rms_norm_kernel<T, kWidestPack<T>> : rms_norm_kernel<T, 1>, grid, block, stream, a);
}

}  // namespace

void rms_norm(const RmsNormArguments& arguments, cudaStream_t stream) {
    if (arguments.x.count == 0) return;
    arguments.dtype == DType::bf16 ? launch_rows<__nv_bfloat16>(arguments, stream)
                                   : launch_rows<float>(arguments, stream);
}

}  // namespace blip3o::cuda
