// Softmax attention of many queries to few keys, the scores of a tile of queries never leaving the cache.
//
// Blocking  a panel of up to 384 keys of one head is widened into the second-level cache, keys transposed, and
//           every tile of kProductRows queries of that head passes over it: scores in register tiles, their
//           maximum, exponentials and sum in float32, and the products with the values in register tiles
//           again. Between panels a query carries its maximum, its sum and its accumulators (online softmax).
// Bytes     query and result once per head's columns, keys and values once per range of queries.
// FLOPs     4 M per element of the result, and one exponential for every d of them: bound by the multiply-add
//           units (6.7 GFLOP for 1024 queries, 730 keys and 20 x 112 channels).
#include "cpu/kernels.h"
#include "cpu/thread_pool.h"
#include "cpu/tile_products.h"

namespace blip3o::cpu::BLIP3O_ISA {
namespace {

constexpr int64_t kPanelKeys =
    384;  // a multiple of what a tile of scores has columns, for every vector width
constexpr int64_t kBlockColumns = kProductVectors * kLanes;
constexpr float kNone = -__builtin_inff();

static_assert(kPanelKeys % kBlockColumns == 0 && kCrossAttentionQueries % kProductRows == 0);

// What one thread holds: a panel of a head, a tile of queries, and what the range's queries carry.
struct Room {
    int64_t head_dim, padded;  // padded: head_dim in whole vectors
    float* keys;               // blocks of kBlockColumns keys, each [head_dim, columns of the block]
    float* values;             // [keys, padded]
    float* biases;             // [keys in whole vectors]; -inf for those that only fill up
    float* queries;            // [kProductRows, padded]
    float* scores;             // [kProductRows, kPanelKeys]
    float* sums;               // [queries of the range, padded] of weight * value
    float* maxima;             // [queries of the range]
    float* totals;             // [queries of the range] of weights
};

Room make_room(const CrossAttentionArguments& a, int64_t queries) {
    Room room;
    room.head_dim = a.head_dim;
    room.padded = round_up(a.head_dim);
    const int64_t panel = kPanelKeys * room.padded;
    room.keys = thread_scratch(2 * panel + kPanelKeys + kProductRows * (room.padded + kPanelKeys) +
                               queries * (room.padded + 2));
    room.values = room.keys + panel;
    room.biases = room.values + panel;
    room.queries = room.biases + kPanelKeys;
    room.scores = room.queries + kProductRows * room.padded;
    room.sums = room.scores + kProductRows * kPanelKeys;
    room.maxima = room.sums + queries * room.padded;
    room.totals = room.maxima + queries;
    return room;
}

template <class T>
float element(const T* from) {
    return load(from, 1)[0];
}

// Keys first .. first + count of head h, transposed block by block.
template <class T>
void pack_keys(const CrossAttentionArguments& a, const Room& room, int64_t h, int64_t first, int64_t count) {
    const T* keys = static_cast<const T*>(a.key.data) + h * a.key.head_stride + first * a.key.token_stride;
    for (int64_t block = 0; block < count; block += kBlockColumns) {
        float* to = room.keys + block * room.head_dim;
        const int64_t left_over = round_up(count - block);
        const int64_t columns = left_over < kBlockColumns ? left_over : kBlockColumns;
        for (int64_t column = 0; column < columns; ++column) {
            float row[kLanes];
            const bool exists = block + column < count;
            const T* key = keys + (block + column) * a.key.token_stride;
            for_each_vector(room.head_dim, [&](int64_t i, int64_t lanes) {
                store(row, exists ? load(key + i, lanes) : Vec{});
                for (int64_t lane = 0; lane < lanes; ++lane) to[(i + lane) * columns + column] = row[lane];
            });
        }
    }
}

template <class T>
void pack_values(const CrossAttentionArguments& a, const Room& room, int64_t h, int64_t first,
                 int64_t count) {
    const T* values =
        static_cast<const T*>(a.value.data) + h * a.value.head_stride + first * a.value.token_stride;
    for (int64_t key = 0; key < count; ++key) {
        widen_row(room.values + key * room.padded, values + key * a.value.token_stride, room.head_dim);
    }
    for (int64_t key = 0; key < round_up(count); ++key) {
        room.biases[key] = key >= count ? kNone : a.log_multiplicity ? a.log_multiplicity[first + key] : 0.0f;
    }
}

// Queries first .. first + rows, normed and divided by sqrt(head_dim).
template <class T>
void widen_queries(const CrossAttentionArguments& a, const Room& room, int64_t h, int64_t first,
                   int64_t rows) {
    const int64_t column = h * a.head_dim;
    const float divisor = 1.0f / __builtin_sqrtf(static_cast<float>(a.head_dim));
    const T* weight = a.query_weight ? static_cast<const T*>(a.query_weight) + column : nullptr;
    for (int64_t r = 0; r < rows; ++r) {
        const T* query = a.query.row<T>(first + r) + column;
        const float scale = weight ? a.inverse_rms[first + r] * divisor : divisor;
        for_each_vector(a.head_dim, [&](int64_t i, int64_t count) {
            Vec value = load(query + i, count) * scale;
            if (weight) value *= load(weight + i, count);
            store(room.queries + r * room.padded + i, value);
        });
    }
    for (float* rest = room.queries + rows * room.padded; rest < room.queries + kProductRows * room.padded;
         rest += kLanes) {
        store(rest, Vec{});
    }
}

void score_tile(const Room& room, int64_t count) {
    for (int64_t block = 0; block < count; block += kBlockColumns) {
        const int64_t left_over = round_up(count - block);
        const int64_t columns = left_over < kBlockColumns ? left_over : kBlockColumns;
        product_rows({room.queries, room.padded, 1}, {room.keys + block * room.head_dim, columns},
                     room.head_dim, columns / kLanes, room.scores + block, kPanelKeys, false);
    }
}

// Turns the scores of one query into weights exp(score - maximum) and rescales what it carries.
void softmax_row(const Room& room, float* scores, int64_t query, int64_t count, bool first_panel) {
    Vec largest = broadcast(kNone);
    for (int64_t k = 0; k < count; k += kLanes) {
        const Vec biased = load(scores + k) + load(room.biases + k);
        store(scores + k, biased);
        largest = maximum(biased, largest);
    }
    const float panel_maximum = max_lanes(largest);
    const float carried = first_panel ? kNone : room.maxima[query];
    const float new_maximum = panel_maximum > carried ? panel_maximum : carried;
    const float subtracted = new_maximum == kNone ? 0.0f : new_maximum;
    Vec total = {};
    for (int64_t k = 0; k < count; k += kLanes) {
        const Vec weights = exponential(load(scores + k) - subtracted);
        store(scores + k, weights);
        total += weights;
    }
    room.maxima[query] = new_maximum;
    if (first_panel) {
        room.totals[query] = sum_lanes(total);
        return;
    }
    const float rescale = exponential(broadcast(carried - subtracted))[0];
    room.totals[query] = room.totals[query] * rescale + sum_lanes(total);
    float* sums = room.sums + query * room.padded;
    for (int64_t i = 0; i < room.padded; i += kLanes) store(sums + i, load(sums + i) * rescale);
}

// Queries begin .. end of head h against `count` keys from `first` on.
template <class T>
void attend_panel(const CrossAttentionArguments& a, const Room& room, int64_t h, int64_t begin, int64_t end,
                  int64_t first, int64_t count) {
    pack_keys<T>(a, room, h, first, count);
    pack_values<T>(a, room, h, first, count);
    for (int64_t query = begin; query < end; query += kProductRows) {
        const int64_t rows = end - query < kProductRows ? end - query : kProductRows;
        widen_queries<T>(a, room, h, query, rows);
        score_tile(room, count);
        for (int64_t r = 0; r < rows; ++r) {
            softmax_row(room, room.scores + r * kPanelKeys, query - begin + r, count, first == 0);
        }
        product({room.scores, kPanelKeys, 1}, {room.values, room.padded}, count, room.padded / kLanes,
                room.sums + (query - begin) * room.padded, room.padded, first > 0);
    }
}

template <class T>
void finish(const CrossAttentionArguments& a, const Room& room, int64_t h, int64_t begin, int64_t end) {
    for (int64_t query = begin; query < end; ++query) {
        const float inverse = 1.0f / room.totals[query - begin];
        T* out = a.out.row<T>(query) + h * a.head_dim;
        for_each_vector(a.head_dim, [&](int64_t i, int64_t count) {
            store(out + i, load(room.sums + (query - begin) * room.padded + i) * inverse, count);
        });
    }
}

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Units are blocks of kCrossAttentionQueries queries, those of a head one after another.
template <class T>
void attend(const CrossAttentionArguments& a, int64_t begin, int64_t end) {
    const int64_t blocks = (a.query.count + kCrossAttentionQueries - 1) / kCrossAttentionQueries;
    const Room room = make_room(a, smaller(blocks, end - begin) * kCrossAttentionQueries);
    for (int64_t unit = begin; unit < end;) {
        const int64_t h = unit / blocks, last = smaller(end, (h + 1) * blocks);
        const int64_t first_query = (unit - h * blocks) * kCrossAttentionQueries;
        const int64_t last_query = smaller((last - h * blocks) * kCrossAttentionQueries, a.query.count);
        for (int64_t first = 0; first < a.keys; first += kPanelKeys) {
            attend_panel<T>(a, room, h, first_query, last_query, first, smaller(a.keys - first, kPanelKeys));
        }
        finish<T>(a, room, h, first_query, last_query);
        unit = last;
    }
}

template <class T>
void norm_rows(const CrossAttentionArguments& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const T* query = a.query.row<T>(row);
        Vec squares = {};
        for_each_vector(a.query.width, [&](int64_t i, int64_t count) {
            const Vec value = load(query + i, count);
            squares += value * value;
        });
        const float mean = sum_lanes(squares) / static_cast<float>(a.query.width);
        a.inverse_rms[row] = 1.0f / __builtin_sqrtf(mean + a.eps);
    }
}

}  // namespace

void cross_attention_norms(const CrossAttentionArguments& arguments, int64_t begin, int64_t end) {
    arguments.dtype == DType::bf16 ? norm_rows<bf16>(arguments, begin, end)
                                   : norm_rows<float>(arguments, begin, end);
}

void cross_attention(const CrossAttentionArguments& arguments, int64_t begin, int64_t end) {
    arguments.dtype == DType::bf16 ? attend<bf16>(arguments, begin, end)
                                   : attend<float>(arguments, begin, end);
}

}  // namespace blip3o::cpu::BLIP3O_ISA
