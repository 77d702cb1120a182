// Sampled tokens become the next tokens of their sequences: ids, positions and slot_mapping for the decoder.
//
// Tiling   a thread for each row.
// Bytes    about 100 a row.
// Bound    launch latency: it is one launch instead of a dozen.
//
// Output slots are on the device, where a wrong one cannot be reported: such a row stays as it is.
#include "cuda/launch.h"
#include "cuda/ops.h"

namespace blip3o::cuda {
namespace {

constexpr int kThreads = 64;

__global__ void __launch_bounds__(kThreads) advance_rows_kernel(AdvanceRowsArguments a) {
    const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (row >= a.rows) return;
    const int64_t sampled = a.sampled_ids[row];
    const int position = a.context_lens[row], page_size = static_cast<int>(a.page_size);
    a.out[row] = (sampled < 0 ? 0 : sampled) + a.first_ids[row];
    const int64_t slot = a.output_slots[row];
    const bool has_slot = slot >= 0 && slot < a.num_output_slots;
    const bool goes_on = has_slot && position > 0 && position < a.max_blocks * page_size;
    a.positions[row] = goes_on ? position : 0;
    if (!goes_on) {
        a.slot_mapping[row] = -1;
        return;
    }
    const int page = a.page_table[row * a.max_blocks + position / page_size];
    a.slot_mapping[row] = page * page_size + position % page_size;
    a.output_ids[slot] = sampled;
    a.num_generated[row] += 1;
    a.context_lens[row] = position + 1;
    a.output_slots[row] = slot + 1;
}

}  // namespace

void advance_rows(const AdvanceRowsArguments& arguments, cudaStream_t stream) {
    if (arguments.rows == 0) return;
    const dim3 grid(static_cast<unsigned>(ceil_divide(arguments.rows, kThreads)));
    launch(advance_rows_kernel, grid, dim3(kThreads), stream, arguments);
}

}  // namespace blip3o::cuda
