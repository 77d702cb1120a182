// Top-k, top-p and temperature sampling of one token per row.
#pragma once

#include "blip3o/op.h"

namespace blip3o {

struct SampleTokensArguments {
    Rows logits;
    const float* temperature;
    const int32_t* top_k;
    const float* top_p;
    const int64_t* seeds;
    const int32_t* positions;
    int64_t* out;
};

struct SampleTokens {
    static constexpr char kName[] = "sample_tokens";
    static constexpr char kParameters[] =
        "logits, temperature, top_k, top_p, seeds, positions, *, scratch=None, out";

    static SampleTokensArguments check(Device device, const TensorView& logits, const TensorView& temperature,
                                       const TensorView& top_k, const TensorView& top_p,
                                       const TensorView& seeds, const TensorView& positions, const Scratch&,
                                       const TensorView& out) {
        Contract contract(kName, device);
        Dim batch("B"), vocabulary("V");
        SampleTokensArguments a;
        a.logits = contract(logits, "logits").dtype({DType::f32}).rows(batch, vocabulary);
        a.temperature = contract(temperature, "temperature").array<float>({&batch});
        a.top_k = contract(top_k, "top_k").array<int32_t>({&batch});
        a.top_p = contract(top_p, "top_p").array<float>({&batch});
        a.seeds = contract(seeds, "seeds").array<int64_t>({&batch});
        a.positions = contract(positions, "positions").array<int32_t>({&batch});
        a.out = contract(out, "out").array<int64_t>({&batch});
        return a;
    }
};

}  // namespace blip3o
