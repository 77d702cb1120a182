// RMSNorm and rotary embedding of the query and key heads of each token; keys and values go to their
// slots of the cache.
//
// Tiling   one warp per head (query, key or value), four warps to a block, blocks over heads and tokens. A
//          lane holds the same channels of both halves of a head, which rotation turns into each other.
// Bytes    per token: (Hq + 2 Hkv) D elements in and as many out, and D floats of the rotation for every
//          head (from a cache after the first). For Qwen3-1.7B in bfloat16: 16 KiB.
// FLOPs    about 12 per element of q and k.
// Bound    launch latency in a decoding step; memory for a long prompt.
//
// Positions and slot_mapping are on the device, so a wrong one cannot be reported: a token whose position or slot
// is out of range gets a query of NaN and is not written.
#include "cuda/convert.h"
#include "cuda/dependent_launch.h"
#include "cuda/launch.h"
#include "cuda/norm_and_rotate.h"
#include "cuda/ops.h"
#include "cuda/warp.h"

namespace blip3o::cuda {
namespace {

constexpr int kHeadsPerBlock = 4, kThreads = kHeadsPerBlock * kWarp;

template <class T, int kPack>
__global__ void __launch_bounds__(kThreads) qk_norm_rope_append_kernel(QkNormRopeAppendArguments a) {
    wait_for_previous_kernel();
    const int size = static_cast<int>(a.cache.head_dim), lane = threadIdx.x % kWarp;
    const int64_t token = blockIdx.x, q_heads = a.q_heads, kv_heads = a.cache.kv_heads;
    const int64_t head = int64_t{blockIdx.y} * kHeadsPerBlock + threadIdx.x / kWarp;
    if (head >= q_heads + 2 * kv_heads) return;
    const T* from = static_cast<const T*>(a.qkv.data) + token * a.qkv.stride + head * size;
    const int64_t position = a.positions[token], slot = a.slot_mapping[token], page_size = a.cache.page_size;
    const bool valid =
        position >= 0 && position < a.max_positions && slot >= -1 && slot < a.cache.pages * page_size;
    const float* rotation = a.cos_sin_cache + position * size;

    if (head < q_heads) {
        T* to = static_cast<T*>(a.out) + (token * q_heads + head) * size;
        if (valid) {
            norm_and_rotate<T, kPack>(to, from, static_cast<const T*>(a.q_weight), rotation, size, a.eps);
        } else {
            for (int i = lane; i < size; i += kWarp) to[i] = from_float<T>(nanf(""));
        }
        return;
    }
    if (!valid || slot < 0) return;
    const bool is_key = head < q_heads + kv_heads;
    const int64_t kv_head = (head - q_heads) % kv_heads;
    const int64_t row = (slot / page_size * kv_heads + kv_head) * page_size + slot % page_size;
    T* to = static_cast<T*>(is_key ? a.cache.k : a.cache.v) + row * size;
    if (is_key) {
        norm_and_rotate<T, kPack>(to, from, static_cast<const T*>(a.k_weight), rotation, size, a.eps);
    } else {
        for (int i = lane * kPack; i < size; i += kWarp * kPack) {
            store_pack(to + i, load_pack<T, kPack>(from + i));
        }
    }
}

template <class T>
void launch_heads(const QkNormRopeAppendArguments& a, cudaStream_t stream) {
    bool packed = a.cache.head_dim / 2 % kRotatedPack == 0 && a.qkv.stride % kRotatedPack == 0 &&
                  is_aligned(a.cos_sin_cache, kRotatedPack * sizeof(float));
    for (const void* pointer :
         {static_cast<const void*>(a.qkv.data), a.q_weight, a.k_weight, static_cast<const void*>(a.cache.k),
          static_cast<const void*>(a.cache.v), static_cast<const void*>(a.out)}) {
        packed = packed && is_aligned(pointer, kRotatedPack * sizeof(T));
    }
    const int64_t heads = a.q_heads + 2 * a.cache.kv_heads;
    const dim3 grid(static_cast<unsigned>(a.tokens),
                    static_cast<unsigned>(ceil_divide(heads, kHeadsPerBlock)));
    launch(packed ? qk_norm_rope_append_kernel<T, kRotatedPack> : qk_norm_rope_append_kernel<T, 1>, grid,
           dim3(kThreads), stream, a);
}

}  // namespace

void qk_norm_rope_append(const QkNormRopeAppendArguments& arguments, cudaStream_t stream) {
    if (arguments.tokens == 0) return;
    arguments.dtype == DType::bf16 ? launch_heads<__nv_bfloat16>(arguments, stream)
                                   : launch_heads<float>(arguments, stream);
}

}  // namespace blip3o::cuda
