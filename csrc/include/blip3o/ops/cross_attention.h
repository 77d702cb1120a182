// Softmax attention of image tokens to the keys of the condition.
#pragma once

#include "blip3o/op.h"

namespace blip3o {

constexpr int64_t kCrossAttentionQueries = 64;  // in a unit of work

// Rows of several heads: row `token` of head `head` begins head * head_stride + token * token_stride in.
struct HeadRows {
    const void* data;
    int64_t head_stride, token_stride;
};

struct CrossAttentionArguments {
    Rows query, out;
    HeadRows key, value;
    const void* query_weight;       // may be null: no norm
    const float* log_multiplicity;  // [keys]; may be null
    float* inverse_rms;             // [queries]; memory of the caller
    int64_t heads, keys, head_dim;
    DType dtype;
    float eps;
    bool pair_products;  // as in LinearArguments
};

struct CrossAttention {
    static constexpr char kName[] = "cross_attention";
    static constexpr char kParameters[] =
        "query, key, value, query_weight, eps, *, log_multiplicity=None, out";

    static CrossAttentionArguments check(Device device, const TensorView& query, const TensorView& key,
                                         const TensorView& value, const OptionalView& query_weight,
                                         double eps, const OptionalView& log_multiplicity,
                                         const TensorView& out) {
        Contract contract(kName, device);
        Dim tokens("N"), width("H d"), heads("H"), keys("M"), head_dim("d");
        const auto head_rows = [&](const TensorView& view, const char* name) -> HeadRows {
            contract(view, name).dtype({query.dtype}).shape({&heads, &keys, &head_dim});
            contract.require(view.stride[2] == 1 || view.shape[2] == 1,
                             "rows of key and value must be contiguous (call .contiguous())");
            return {view.data, view.stride[0], view.stride[1]};
        };
        CrossAttentionArguments a = {};
        a.dtype = query.dtype;
        a.query = contract(query, "query").dtype(kFloats).rows(tokens, width);
        a.key = head_rows(key, "key");
        a.value = head_rows(value, "value");
        a.query_weight = contract(query_weight, "query_weight").array(query.dtype, {&width});
        a.log_multiplicity = contract(log_multiplicity, "log_multiplicity").array<float>({&keys});
        a.out = contract(out, "out").dtype({query.dtype}).rows(tokens, width);
        contract.require(width.value() == heads.value() * head_dim.value(),
                         "query must be H d wide, H and d as in key");
        contract.require(keys.value() > 0 && head_dim.value() > 0,
                         "there must be at least one key, one wide");
        a.heads = heads.value();
        a.keys = keys.value();
        a.head_dim = head_dim.value();
        a.eps = static_cast<float>(eps);
        return a;
    }

    // (head, block of queries) pairs.
    static Work work(const CrossAttentionArguments& a) {
        return {a.heads * ceil_divide(a.query.count, kCrossAttentionQueries),
                kCrossAttentionQueries * a.keys * a.head_dim};
    }
};

}  // namespace blip3o
