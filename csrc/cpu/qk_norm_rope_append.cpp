// RMSNorm and rotary embedding of the query and key heads of each token; keys and values go to their
// slots of the cache.
#include "blip3o/ops/qk_norm_rope_append.h"
#include "cpu/simd.h"
#include "cpu/thread_pool.h"

namespace blip3o::cpu::BLIP3O_ISA {
namespace {

// to = rope(rms_norm(from)); `rotation` = (cos | sin), `head` is scratch for size floats and a vector more.
template <class T>
void norm_and_rotate(T* to, const T* from, const T* weight, const float* rotation, int64_t size, float eps,
                     float* head) {
    Vec squares = {};
    for_each_vector(size, [&](int64_t i, int64_t count) {
        const Vec x = load(from + i, count);
        squares += x * x;
    });
    const float scale = 1.0f / __builtin_sqrtf(sum_lanes(squares) / static_cast<float>(size) + eps);
    for_each_vector(size, [&](int64_t i, int64_t count) {
        store(head + i, load(from + i, count) * scale * load(weight + i, count));
    });
    const int64_t half = size / 2;
    for_each_vector(half, [&](int64_t i, int64_t count) {
        const Vec a = load(head + i, count), b = load(head + half + i, count);
        const Vec cosine = load(rotation + i, count), sine = load(rotation + half + i, count);
        store(to + i, a * cosine - b * sine, count);
        store(to + half + i, b * cosine + a * sine, count);
    });
}

template <class T>
void append_tokens(const QkNormRopeAppendArguments& a, int64_t begin, int64_t end) {
    const int64_t size = a.cache.head_dim, page_size = a.cache.page_size;
    float* head = thread_scratch(round_up(size));
    for (int64_t token = begin; token < end; ++token) {
        const T* q = a.qkv.row<T>(token);
        const T* k = q + a.q_heads * size;
        const T* v = k + a.cache.kv_heads * size;
        const float* rotation = a.cos_sin_cache + a.positions[token] * size;
        for (int64_t h = 0; h < a.q_heads; ++h) {
            norm_and_rotate(static_cast<T*>(a.out) + (token * a.q_heads + h) * size, q + h * size,
                            static_cast<const T*>(a.q_weight), rotation, size, a.eps, head);
        }
        const int64_t slot = a.slot_mapping[token];
        if (slot < 0) continue;
        for (int64_t h = 0; h < a.cache.kv_heads; ++h) {
            const int64_t row = (slot / page_size * a.cache.kv_heads + h) * page_size + slot % page_size;
            norm_and_rotate(static_cast<T*>(a.cache.k) + row * size, k + h * size,
                            static_cast<const T*>(a.k_weight), rotation, size, a.eps, head);
            std::memcpy(static_cast<T*>(a.cache.v) + row * size, v + h * size, size * sizeof(T));
        }
    }
}

}  // namespace

void qk_norm_rope_append(const QkNormRopeAppendArguments& arguments, int64_t begin, int64_t end) {
    arguments.dtype == DType::bf16 ? append_tokens<bf16>(arguments, begin, end)
                                   : append_tokens<float>(arguments, begin, end);
}

}  // namespace blip3o::cpu::BLIP3O_ISA
