// The ops on NVIDIA GPUs: arguments are checked before (blip3o/contracts.h); each call launches on `stream`
// and returns at once, so that calls can be recorded into a graph. Errors are std::runtime_error with CUDA's
// words.
//
// Shapes, dtypes and semantics: blip3o_rt/ops. Workspaces are scratch memory of the sizes in workspaces.h.
#pragma once

#include <cuda_runtime.h>

#include "blip3o/op_arguments.h"
#include "cuda/workspaces.h"

namespace blip3o::cuda {

void rms_norm(const RmsNormArguments& arguments, cudaStream_t stream);
void silu_mul(const SiluMulArguments& arguments, cudaStream_t stream);
void row_linear(const RowProductArguments& arguments, cudaStream_t stream);  // every product of few rows
void qk_norm_rope_append(const QkNormRopeAppendArguments& arguments, cudaStream_t stream);
void paged_decode_attention(const PagedDecodeAttentionArguments& arguments, const AttentionScratch& scratch,
                            cudaStream_t stream);
void paged_prefill_attention(const PagedPrefillAttentionArguments& arguments, cudaStream_t stream);
void decode_attention(const DecodeAttentionArguments& arguments, const AttentionScratch& scratch,
                      cudaStream_t stream);
void advance_rows(const AdvanceRowsArguments& arguments, cudaStream_t stream);
void sample_tokens(const SampleTokensArguments& arguments, void* workspace, cudaStream_t stream);

}  // namespace blip3o::cuda
