// The ops on NVIDIA GPUs, launched on `stream` with arguments that have been checked (blip3o/ops). A call returns
// at once, so that a CUDA graph can capture it. Errors are std::runtime_error with CUDA's words.
//
// Shapes, dtypes and semantics: blip3o_rt/ops. Scratch memory has the sizes in workspaces.h.
#pragma once

#include <cuda_runtime.h>

#include "blip3o/ops/advance_windows.h"
#include "blip3o/ops/decode_attention.h"
#include "blip3o/ops/norm_row_linear.h"
#include "blip3o/ops/paged_prefill_attention.h"
#include "blip3o/ops/rms_norm_keep.h"
#include "blip3o/ops/row_linear.h"
#include "blip3o/ops/row_linear_add.h"
#include "blip3o/ops/row_linear_w8.h"
#include "blip3o/ops/sample_tokens.h"
#include "blip3o/ops/silu_mul.h"
#include "cuda/workspaces.h"

namespace blip3o::cuda {

void rms_norm(const RmsNormArguments& arguments, cudaStream_t stream);  // and rms_norm_keep
void silu_mul(const SiluMulArguments& arguments, cudaStream_t stream);
void row_linear(const RowProductArguments& arguments, cudaStream_t stream);  // every product of few rows
void qk_norm_rope_append(const QkNormRopeAppendArguments& arguments, cudaStream_t stream);
void paged_decode_attention(const PagedDecodeAttentionArguments& arguments, const LaunchScratch& scratch,
                            cudaStream_t stream);
void paged_prefill_attention(const PagedPrefillAttentionArguments& arguments, cudaStream_t stream);
void decode_attention(const DecodeAttentionArguments& arguments, const LaunchScratch& scratch,
                      cudaStream_t stream);
void advance_windows(const AdvanceWindowsArguments& arguments, cudaStream_t stream);
void sample_tokens(const SampleTokensArguments& arguments, const LaunchScratch& scratch, cudaStream_t stream);

}  // namespace blip3o::cuda
