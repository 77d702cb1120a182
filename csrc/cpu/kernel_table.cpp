// The kernels of one instruction set as a table.
#include "cpu/kernels.h"

namespace blip3o::cpu::BLIP3O_ISA {

void rms_norm(const RmsNormArguments&, int64_t begin, int64_t end);
void silu_mul(const SiluMulArguments&, int64_t begin, int64_t end);
void row_linear(const RowLinearArguments&, int64_t begin, int64_t end);
void row_linear_int8(const RowLinearInt8Arguments&, int64_t begin, int64_t end);
void qk_norm_rope_append(const QkNormRopeAppendArguments&, int64_t begin, int64_t end);
void paged_decode_attention(const PagedDecodeAttentionArguments&, int64_t begin, int64_t end);
void nearest_code(const NearestCodeArguments&, int64_t begin, int64_t end);

extern const Kernels kKernels;
const Kernels kKernels = {
    rms_norm,    silu_mul, row_linear, row_linear_int8, qk_norm_rope_append, paged_decode_attention,
    nearest_code};

}  // namespace blip3o::cpu::BLIP3O_ISA
