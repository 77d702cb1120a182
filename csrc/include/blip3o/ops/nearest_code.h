// The code with the largest dot product with each row of features.
#pragma once

#include "blip3o/op.h"

namespace blip3o {

struct NearestCodeArguments {
    Rows features, codebook;
    int64_t* out;
};

struct NearestCode {
    static constexpr char kName[] = "nearest_code";
    static constexpr char kParameters[] = "features, codebook, *, out";

    static NearestCodeArguments check(Device device, const TensorView& features, const TensorView& codebook,
                                      const TensorView& out) {
        Contract contract(kName, device);
        Dim rows("N"), codes("C"), width("D");
        NearestCodeArguments a;
        a.features = contract(features, "features").dtype({DType::f32}).rows(rows, width);
        a.codebook = contract(codebook, "codebook").dtype({DType::f32}).rows(codes, width);
        a.out = contract(out, "out").array<int64_t>({&rows});
        contract.require(codes.value() > 0, "codebook must have at least one row");
        contract.require(width.value() > 0, "features and codebook must be at least one wide");
        return a;
    }

    // Rows of features, four of which pass over a panel of codes together.
    static Work work(const NearestCodeArguments& a) { return {a.features.count, 4096}; }
};

}  // namespace blip3o
