// silu(gate) * up, elementwise over rows (gate | up).
//
// Tiling   a grid of blocks of 256 threads over the rows and along each row; a thread takes one pack of 16
//          bytes of each half.
// Bytes    per element of the result: gate and up once, the result once. For bfloat16: 6 bytes.
// FLOPs    about 12 per element, most of them the exponential.
// Bound    memory; a decoding step's few rows are bound by launch latency.
#include "cuda/convert.h"
#include "cuda/dependent_launch.h"
#include "cuda/launch.h"
#include "cuda/ops.h"
#include "cuda/silu.h"

namespace blip3o::cuda {
namespace {

constexpr int kThreads = 256;

template <class T, int kPack>
__global__ void __launch_bounds__(kThreads) silu_mul_kernel(SiluMulArguments a) {
    wait_for_previous_kernel();
    const int64_t row = blockIdx.x, column = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * kPack;
    if (column >= a.out.width) return;
    const T* from = static_cast<const T*>(a.gate_up.data) + row * a.gate_up.stride + column;
    const Pack<T, kPack> gate = load_pack<T, kPack>(from);
    const Pack<T, kPack> up = load_pack<T, kPack>(from + a.out.width);
    Pack<T, kPack> result;
    for (int e = 0; e < kPack; ++e) {
        result.element[e] = from_float<T>(silu(to_float(gate.element[e])) * to_float(up.element[e]));
    }
    store_pack(static_cast<T*>(a.out.data) + row * a.out.stride + column, result);
}

template <class T>
void launch_rows(const SiluMulArguments& a, cudaStream_t stream) {
    const bool packed = rows_allow_packs<T>(a.out) && rows_allow_packs<T>(a.gate_up);
    const int64_t packs = packed ? a.out.width / kWidestPack<T> : a.out.width;
    const dim3 grid(static_cast<unsigned>(a.out.count), static_cast<unsigned>(ceil_divide(packs, kThreads)));
    launch(packed ? silu_mul_kernel<T, kWidestPack<T>> : silu_mul_kernel<T, 1>, grid, dim3(kThreads), stream,
           a);
}

}  // namespace

void silu_mul(const SiluMulArguments& arguments, cudaStream_t stream) {
    if (arguments.out.count == 0 || arguments.out.width == 0) return;
    arguments.dtype == DType::bf16 ? launch_rows<__nv_bfloat16>(arguments, stream)
                                   : launch_rows<float>(arguments, stream);
}

}  // namespace blip3o::cuda
