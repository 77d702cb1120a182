// Sampling of tokens from rows of logits.
#pragma once

#include "blip3o/op_arguments.h"

namespace blip3o::cpu {

// Draws the tokens of the rows begin .. end.
void sample_rows(const SampleTokensArguments& arguments, int64_t begin, int64_t end);

}  // namespace blip3o::cpu
