// Attention of one query per sequence over its pages, the query heads of a KV head together.
//
// Online softmax in float32, page by page: scores of a page, new maximum, weights, and the accumulators
// rescaled. Each page is read once, 2 x page_size x head_dim elements of K and V for all heads of the group;
// memory bound.
#include "blip3o/ops/paged_decode_attention.h"
#include "cpu/dot_products.h"
#include "cpu/thread_pool.h"

namespace blip3o::cpu::BLIP3O_ISA {
namespace {

// What one KV head's query group carries from page to page.
struct Group {
    int64_t heads, head_dim, padded_dim, padded_page;
    float* queries;  // [heads, padded_dim], scaled
    float* sums;     // [heads, padded_dim] of weight * v
    float* weights;  // [heads, padded_page]
    float* maximum;  // [heads]
    float* total;    // [heads] of weights
};

Group make_group(const PagedDecodeAttentionArguments& a) {
    Group group;
    group.heads = a.q_heads / a.cache.kv_heads;
    group.head_dim = a.cache.head_dim;
    group.padded_dim = round_up(a.cache.head_dim);
    group.padded_page = round_up(a.cache.page_size);
    group.queries = thread_scratch(group.heads * (2 * group.padded_dim + group.padded_page + 2));
    group.sums = group.queries + group.heads * group.padded_dim;
    group.weights = group.sums + group.heads * group.padded_dim;
    group.maximum = group.weights + group.heads * group.padded_page;
    group.total = group.maximum + group.heads;
    return group;
}

template <class T>
void start(const Group& group, const T* q, float scale) {
    for (int64_t g = 0; g < group.heads; ++g) {
        for_each_vector(group.head_dim, [&](int64_t i, int64_t count) {
            store(group.queries + g * group.padded_dim + i, load(q + g * group.head_dim + i, count) * scale);
            store(group.sums + g * group.padded_dim + i, Vec{});
        });
        group.maximum[g] = -__builtin_inff();
        group.total[g] = 0.0f;
    }
}

// Turns the scores of one head into weights exp(score - maximum) and rescales what was summed before.
void softmax_step(const Group& group, int64_t g, int64_t positions) {
    float* scores = group.weights + g * group.padded_page;
    float* sums = group.sums + g * group.padded_dim;
    for (int64_t p = positions; p < round_up(positions); ++p) scores[p] = -__builtin_inff();
    Vec largest = load(scores);
    for (int64_t p = kLanes; p < positions; p += kLanes) largest = maximum(load(scores + p), largest);
    const float page_maximum = max_lanes(largest);
    const float new_maximum = page_maximum > group.maximum[g] ? page_maximum : group.maximum[g];
    const float rescale = exponential(broadcast(group.maximum[g] - new_maximum))[0];
    Vec total = {};
    for (int64_t p = 0; p < positions; p += kLanes) {
        const Vec weights = exponential(load(scores + p) - new_maximum);
        store(scores + p, weights);
        total += weights;
    }
    group.total[g] = group.total[g] * rescale + sum_lanes(total);
    group.maximum[g] = new_maximum;
    for (int64_t i = 0; i < group.padded_dim; i += kLanes) store(sums + i, load(sums + i) * rescale);
}

// Rows of K and V of one KV head on a page. Pages of a head lie far apart, where the hardware's prefetchers do
// not look, so the next page is fetched while this one is read: a line now and then, since a processor holds
// some twenty fetches and waits for room.
template <class T>
struct Page {
    const T *k, *v;
};

// sums += weight * v for kCount positions; v is their first row. Those from `next` on are fetched.
template <int kCount, class T>
BLIP3O_INLINE void add_values(const Group& group, const T* v, int64_t first, const T* next) {
    const char* lines = reinterpret_cast<const char*>(next);
    for_each_vector(group.head_dim, [&](int64_t i, int64_t count) {
        prefetch<kCount * kLanes * sizeof(T)>(lines, i / kLanes);
        Vec values[kCount];
        for (int p = 0; p < kCount; ++p) values[p] = load(v + p * group.head_dim + i, count);
        for (int64_t g = 0; g < group.heads; ++g) {
            const float* weights = group.weights + g * group.padded_page + first;
            Vec sum = load(group.sums + g * group.padded_dim + i);
            for (int p = 0; p < kCount; ++p) sum += weights[p] * values[p];
            store(group.sums + g * group.padded_dim + i, sum);
        }
    });
}

template <class T>
void attend_page(const Group& group, Page<T> page, Page<T> next, int64_t positions) {
    const int64_t row = group.head_dim;
    dot_products(
        group.queries, group.padded_dim, group.heads, page.k, row, positions, row, next.k,
        [&](int64_t g, int64_t p, float score) { group.weights[g * group.padded_page + p] = score; });
    for (int64_t g = 0; g < group.heads; ++g) softmax_step(group, g, positions);
    int64_t p = 0;
    for (; p + 4 <= positions; p += 4) add_values<4>(group, page.v + p * row, p, next.v + p * row);
    for (; p < positions; ++p) add_values<1>(group, page.v + p * row, p, next.v + p * row);
}

template <class T>
void finish(const Group& group, T* out) {
    for (int64_t g = 0; g < group.heads; ++g) {
        const float inverse = group.total[g] == 0.0f ? 0.0f : 1.0f / group.total[g];  // 0: an empty context
        for_each_vector(group.head_dim, [&](int64_t i, int64_t count) {
            store(out + g * group.head_dim + i, load(group.sums + g * group.padded_dim + i) * inverse, count);
        });
    }
}

// The page that holds `position` of sequence b.
template <class T>
Page<T> page_of(const PagedDecodeAttentionArguments& a, int64_t b, int64_t h, int64_t position) {
    const int64_t page = a.page_table[b * a.max_pages + position / a.cache.page_size];
    const int64_t first = (page * a.cache.kv_heads + h) * a.cache.page_size * a.cache.head_dim;
    return {static_cast<const T*>(a.cache.k) + first, static_cast<const T*>(a.cache.v) + first};
}

template <class T>
void attend(const PagedDecodeAttentionArguments& a, int64_t begin, int64_t end) {
    const Group group = make_group(a);
    const int64_t page_size = a.cache.page_size;
    for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t b = unit / a.cache.kv_heads, h = unit % a.cache.kv_heads;
        const int64_t first_row = (b * a.q_heads + h * group.heads) * a.cache.head_dim;
        start(group, static_cast<const T*>(a.q) + first_row, a.scale);
        const int64_t length = a.context_lens[b];
        for (int64_t position = 0; position < length; position += page_size) {
            const int64_t after = position + page_size, left = length - position;
            const Page<T> page = page_of<T>(a, b, h, position);
            const Page<T> next = after < length ? page_of<T>(a, b, h, after) : page;
            attend_page(group, page, next, left < page_size ? left : page_size);
        }
        finish(group, static_cast<T*>(a.out) + first_row);
    }
}

}  // namespace

void paged_decode_attention(const PagedDecodeAttentionArguments& arguments, int64_t begin, int64_t end) {
    arguments.dtype == DType::bf16 ? attend<bf16>(arguments, begin, end)
                                   : attend<float>(arguments, begin, end);
}

}  // namespace blip3o::cpu::BLIP3O_ISA
