// Softmax attention of many queries to few keys, the scores of a tile of queries never leaving the cache.
//
// Blocking  a panel of up to 384 keys of one head is put into the second-level cache in the order that products
//           take it, and every tile of 8 (4) queries of that head passes over it: scores in register tiles,
//           their maximum, exponentials and sum in float32, and the products with the values in register tiles
//           again. Between panels a query carries its maximum, its sum and its accumulators (online softmax).
// Numbers   where the processor multiplies bfloat16, queries and weights are rounded to it for the products,
//           whose sums are float32; else everything is widened to float32.
// Bytes     query and result once per head's columns, keys and values once per range of queries.
// FLOPs     4 M per element of the result, and one exponential for every d of them: bound by the multipliers
//           (6.7 GFLOP for 1024 queries, 730 keys and 20 x 112 channels).
#include "blip3o/ops/cross_attention.h"
#include "cpu/pair_products.h"
#include "cpu/thread_pool.h"
#include "cpu/tile_products.h"

namespace blip3o::cpu::BLIP3O_ISA {
namespace {

constexpr int64_t kPanelKeys =
    384;  // a multiple of what a tile of scores has columns, for every vector width
constexpr float kNone = -__builtin_inff();

// Some of the keys of a head.
struct KeyRange {
    int64_t head, first, count;
};

// Row `index` of a head's keys or values.
template <class T>
const T* row_of(const HeadRows& rows, int64_t head, int64_t index) {
    return static_cast<const T*>(rows.data) + head * rows.head_stride + index * rows.token_stride;
}

// Query `row` of a head, normed and divided by sqrt(head_dim), as vectors: emit(column, value, count).
template <class T, class Emit>
void scaled_query(const CrossAttentionArguments& a, int64_t head, int64_t row, const Emit& emit) {
    const int64_t column = head * a.head_dim;
    const float divisor = 1.0f / __builtin_sqrtf(static_cast<float>(a.head_dim));
    const T* query = a.query.row<T>(row) + column;
    const T* weight = a.query_weight ? static_cast<const T*>(a.query_weight) + column : nullptr;
    const float scale = weight ? a.inverse_rms[row] * divisor : divisor;
    for_each_vector(a.head_dim, [&](int64_t i, int64_t count) {
        Vec value = load(query + i, count) * scale;
        if (weight) value *= load(weight + i, count);
        emit(i, value, count);
    });
}

// Products of a panel of keys and values with a tile of queries, all widened to floats from T.
template <class T>
class FloatProducts {
  public:
    using Element = T;
    using Weight = float;
    static constexpr int64_t kRows = kProductRows;

    static int64_t scratch_floats(const CrossAttentionArguments& a) {
        return 2 * kPanelKeys * round_up(a.head_dim) + kRows * (round_up(a.head_dim) + kPanelKeys);
    }

    FloatProducts(const CrossAttentionArguments& arguments, float* scratch)
        : a(arguments),
          padded(round_up(a.head_dim)),
          keys(scratch),
          values(keys + kPanelKeys * padded),
          queries(values + kPanelKeys * padded),
          scores(queries + kRows * padded),
          weights(scores) {}

    void load_panel(KeyRange range) {
        for (int64_t block = 0; block < range.count; block += kColumns) {
            transpose_keys(range.head, range.first + block, range.count - block, keys + block * a.head_dim);
        }
        for (int64_t i = 0; i < range.count; ++i) {
            widen_row(values + i * padded, row_of<T>(a.value, range.head, range.first + i), a.head_dim);
        }
    }

    void load_queries(int64_t head, int64_t first, int64_t rows) {
        for (int64_t i = 0; i < kRows * padded; i += kLanes) store(queries + i, Vec{});
        for (int64_t r = 0; r < rows; ++r) {
            float* to = queries + r * padded;
            scaled_query<T>(a, head, first + r, [&](int64_t i, Vec value, int64_t) { store(to + i, value); });
        }
    }

    void score(int64_t count) {
        for (int64_t block = 0; block < count; block += kColumns) {
            const int64_t columns = smaller(round_up(count - block), kColumns);
            product_rows({queries, padded, 1}, {keys + block * a.head_dim, columns}, a.head_dim,
                         columns / kLanes, scores + block, kPanelKeys, false);
        }
    }

    void add_values(int64_t count, float* sums, bool add) {
        product({weights, kPanelKeys, 1}, {values, padded}, count, padded / kLanes, sums, padded, add);
    }

  private:
    static constexpr int64_t kColumns = kProductVectors * kLanes;
    static_assert(kPanelKeys % kColumns == 0);

    // A block [head_dim, its columns in whole vectors] of up to kColumns keys.
    void transpose_keys(int64_t head, int64_t first, int64_t count, float* to) {
        const int64_t columns = smaller(round_up(count), kColumns);
        for (int64_t column = 0; column < columns; ++column) {
            float row[kLanes];
            const bool exists = column < count;
            const T* key = row_of<T>(a.key, head, first + column);
            for_each_vector(a.head_dim, [&](int64_t i, int64_t lanes) {
                store(row, exists ? load(key + i, lanes) : Vec{});
                for (int64_t lane = 0; lane < lanes; ++lane) to[(i + lane) * columns + column] = row[lane];
            });
        }
    }

    const CrossAttentionArguments& a;
    const int64_t padded;  // head_dim in whole vectors
    float* const keys;     // blocks of kColumns keys, each transposed
    float* const values;   // [keys, padded]
    float* const queries;  // [kRows, padded]

  public:
    float* const scores;   // [kRows, kPanelKeys]
    float* const weights;  // the same memory
};

#if defined(__AVX512F__)

// The same in bfloat16, to which queries and weights are rounded.
class PairProducts {
  public:
    using Element = bf16;
    using Weight = bf16;
    static constexpr int64_t kRows = kPairRows;

    static int64_t scratch_floats(const CrossAttentionArguments& a) {
        const int64_t padded = round_up(a.head_dim);
        return kPanelKeys / kColumns * panel_floats(kPairVectors, a.head_dim) + kPanelKeys / 2 * padded +
               kRows * (padded / 2 + kPanelKeys + kPanelKeys / 2);
    }

    PairProducts(const CrossAttentionArguments& arguments, float* scratch)
        : a(arguments),
          padded(round_up(a.head_dim)),
          key_block(panel_floats(kPairVectors, a.head_dim)),
          keys(scratch),
          values(keys + kPanelKeys / kColumns * key_block),
          queries(reinterpret_cast<bf16*>(values + kPanelKeys / 2 * padded)),
          scores(values + kPanelKeys / 2 * padded + kRows * padded / 2),
          weights(reinterpret_cast<bf16*>(scores + kRows * kPanelKeys)) {}

    void load_panel(KeyRange range) {
        for (int64_t block = 0; block < range.count; block += kColumns) {
            const int64_t count = smaller(range.count - block, kColumns);
            pack_columns(row_of<bf16>(a.key, range.head, range.first + block), count, a.key.token_stride,
                         a.head_dim, round_up(count) / kLanes, bytes(keys + block / kColumns * key_block));
        }
        for (int64_t i = 0; i < range.count; i += 2) pair_values(range, i);
    }

    void load_queries(int64_t head, int64_t first, int64_t rows) {
        std::memset(queries, 0, kRows * padded * sizeof(bf16));
        for (int64_t r = 0; r < rows; ++r) {
            bf16* to = queries + r * padded;
            scaled_query<bf16>(a, head, first + r,
                               [&](int64_t i, Vec value, int64_t count) { store(to + i, value, count); });
        }
    }

    void score(int64_t count) {
        for (int64_t block = 0; block < count; block += kColumns) {
            const char* panel = bytes(keys + block / kColumns * key_block);
            tile_of(smaller(round_up(count - block), kColumns) / kLanes)(queries, padded, panel,
                                                                         (a.head_dim + 1) / 2, {panel, panel},
                                                                         scores + block, kPanelKeys, false);
        }
    }

    void add_values(int64_t count, float* sums, bool add) {
        for (int64_t column = 0; column < padded; column += kColumns) {
            const char* panel = bytes(values + column * kPanelKeys / 2);
            tile_of(smaller(padded - column, kColumns) / kLanes)(weights, kPanelKeys, panel, (count + 1) / 2,
                                                                 {panel, panel}, sums + column, padded, add);
        }
    }

  private:
    static constexpr int64_t kColumns = kPairVectors * kLanes;
    static_assert(kPanelKeys % kColumns == 0);

    static char* bytes(float* memory) { return reinterpret_cast<char*>(memory); }

    static PairTile tile_of(int64_t vectors) {
        return vectors == 1   ? pair_tile_of<1>(kRows)
               : vectors == 2 ? pair_tile_of<2>(kRows)
                              : pair_tile_of<3>(kRows);
    }

    // The values of keys i and i + 1 of a range, zero for one that is not there, as a pair of steps.
    void pair_values(KeyRange range, int64_t i) {
        const bf16* first = row_of<bf16>(a.value, range.head, range.first + i);
        const bf16* second = i + 1 < range.count ? first + a.value.token_stride : nullptr;
        for_each_vector(a.head_dim, [&](int64_t column, int64_t count) {
            const int64_t group = column / kColumns * kColumns, width = smaller(padded - group, kColumns);
            float* to = values + group * kPanelKeys / 2 + i / 2 * width + column - group;
            store_pairs(bytes(to), (VecBits)load(first + column, count),
                        second ? (VecBits)load(second + column, count) : VecBits{});
        });
    }

    const CrossAttentionArguments& a;
    const int64_t padded, key_block;  // head_dim in whole vectors; floats of a block of keys
    float* const keys;                // panels of kColumns keys
    float* const values;              // panels of kColumns channels, their steps the keys
    bf16* const queries;              // [kRows, padded]

  public:
    float* const scores;  // [kRows, kPanelKeys]
    bf16* const weights;  // [kRows, kPanelKeys]
};

#endif

// What the queries of a range carry from panel to panel, and the biases of a panel.
struct Carried {
    int64_t padded;  // head_dim in whole vectors
    float* biases;   // [kPanelKeys]; -inf for keys that only fill up
    float* sums;     // [queries, padded] of weight * value
    float* maxima;   // [queries]
    float* totals;   // [queries] of weights

    static int64_t scratch_floats(int64_t padded, int64_t queries) {
        return kPanelKeys + queries * (padded + 2);
    }

    Carried(int64_t padded_head, int64_t queries, float* scratch)
        : padded(padded_head),
          biases(scratch),
          sums(biases + kPanelKeys),
          maxima(sums + queries * padded),
          totals(maxima + queries) {}
};

void load_biases(const CrossAttentionArguments& a, KeyRange range, float* biases) {
    for (int64_t i = 0; i < round_up(range.count); ++i) {
        biases[i] = i >= range.count     ? kNone
                    : a.log_multiplicity ? a.log_multiplicity[range.first + i]
                                         : 0.0f;
    }
}

// Turns the scores of one query into weights exp(score - maximum) and rescales what it carries. The weights may
// be in the memory of the scores.
template <class Weight>
void softmax_row(const Carried& carried, float* scores, Weight* weights, int64_t query, int64_t count,
                 bool first_panel) {
    Vec largest = broadcast(kNone);
    for (int64_t k = 0; k < count; k += kLanes) {
        const Vec biased = load(scores + k) + load(carried.biases + k);
        store(scores + k, biased);
        largest = maximum(biased, largest);
    }
    const float panel_maximum = max_lanes(largest);
    const float before = first_panel ? kNone : carried.maxima[query];
    const float new_maximum = panel_maximum > before ? panel_maximum : before;
    const float subtracted = new_maximum == kNone ? 0.0f : new_maximum;
    Vec total = {};
    for (int64_t k = 0; k < count; k += kLanes) {
        const Vec weight = exponential(load(scores + k) - subtracted);
        store(weights + k, weight);
        total += weight;
    }
    carried.maxima[query] = new_maximum;
    if (first_panel) {
        carried.totals[query] = sum_lanes(total);
        return;
    }
    const float rescale = exponential(broadcast(before - subtracted))[0];
    carried.totals[query] = carried.totals[query] * rescale + sum_lanes(total);
    float* sums = carried.sums + query * carried.padded;
    for (int64_t i = 0; i < carried.padded; i += kLanes) store(sums + i, load(sums + i) * rescale);
}

// Queries begin .. end against the keys of a panel.
template <class Products>
void attend_panel(const CrossAttentionArguments& a, Products& products, const Carried& carried,
                  KeyRange range, int64_t begin, int64_t end) {
    products.load_panel(range);
    load_biases(a, range, carried.biases);
    for (int64_t query = begin; query < end; query += Products::kRows) {
        const int64_t rows = smaller(end - query, Products::kRows);
        products.load_queries(range.head, query, rows);
        products.score(range.count);
        for (int64_t r = 0; r < rows; ++r) {
            softmax_row(carried, products.scores + r * kPanelKeys, products.weights + r * kPanelKeys,
                        query - begin + r, range.count, range.first == 0);
        }
        products.add_values(range.count, carried.sums + (query - begin) * carried.padded, range.first > 0);
    }
}

template <class T>
void finish(const CrossAttentionArguments& a, const Carried& carried, int64_t head, int64_t begin,
            int64_t end) {
    for (int64_t query = begin; query < end; ++query) {
        const float inverse = 1.0f / carried.totals[query - begin];
        T* out = a.out.row<T>(query) + head * a.head_dim;
        for_each_vector(a.head_dim, [&](int64_t i, int64_t count) {
            store(out + i, load(carried.sums + (query - begin) * carried.padded + i) * inverse, count);
        });
    }
}

// Units are blocks of kCrossAttentionQueries queries, those of a head one after another.
template <class Products>
void attend(const CrossAttentionArguments& a, int64_t begin, int64_t end) {
    static_assert(kCrossAttentionQueries % Products::kRows == 0);
    const int64_t blocks = (a.query.count + kCrossAttentionQueries - 1) / kCrossAttentionQueries;
    const int64_t queries = smaller(blocks, end - begin) * kCrossAttentionQueries;
    const int64_t padded = round_up(a.head_dim), products_floats = Products::scratch_floats(a);
    float* scratch = thread_scratch(products_floats + Carried::scratch_floats(padded, queries));
    Products products(a, scratch);
    const Carried carried(padded, queries, scratch + products_floats);
    for (int64_t unit = begin; unit < end;) {
        const int64_t head = unit / blocks, last = smaller(end, (head + 1) * blocks);
        const int64_t first_query = (unit - head * blocks) * kCrossAttentionQueries;
        const int64_t last_query = smaller((last - head * blocks) * kCrossAttentionQueries, a.query.count);
        for (int64_t first = 0; first < a.keys; first += kPanelKeys) {
            const KeyRange range = {head, first, smaller(a.keys - first, kPanelKeys)};
            attend_panel(a, products, carried, range, first_query, last_query);
        }
        finish<typename Products::Element>(a, carried, head, first_query, last_query);
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
    if (arguments.dtype == DType::f32) return attend<FloatProducts<float>>(arguments, begin, end);
#if defined(__AVX512F__)
    if (arguments.pair_products) return attend<PairProducts>(arguments, begin, end);
#endif
    attend<FloatProducts<bf16>>(arguments, begin, end);
}

}  // namespace blip3o::cpu::BLIP3O_ISA
