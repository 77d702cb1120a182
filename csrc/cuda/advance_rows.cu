// Rows of a batch take their draws as the next token: ids, positions and slot_mapping for the decoder, counters.
//
// Tiling   a thread for each row.
// Bytes    about 100 a row.
// Bound    launch latency: it is one launch in place of a dozen.
// State    not yet run on hardware; the logic is tested on the CPU (tests/csrc/simt).
//
// Places are on the device, so nobody can be told of a wrong one: a row whose place `kept` does not have stays
// as it is.
#include "cuda/launch.h"
#include "cuda/ops.h"

namespace blip3o::cuda {
namespace {

constexpr int kThreads = 64;

__global__ void __launch_bounds__(kThreads) advance_rows_kernel(AdvanceRowsArguments a) {
    const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (row >= a.rows) return;
    const int64_t draw = a.draws[row];
    const int position = a.context_lens[row], page_size = static_cast<int>(a.page_size);
    a.out[row] = (draw < 0 ? 0 : draw) + a.first_ids[row];
    const int64_t place = a.places[row];
    const bool has_place = place >= 0 && place < a.kept_places;
    const bool goes_on = has_place && position > 0 && position < a.max_blocks * page_size;
    a.positions[row] = goes_on ? position : 0;
    if (!goes_on) {
        a.slot_mapping[row] = -1;
        return;
    }
    const int page = a.page_table[row * a.max_blocks + position / page_size];
    a.slot_mapping[row] = page * page_size + position % page_size;
    a.kept[place] = draw;
    a.drawn[row] += 1;
    a.context_lens[row] = position + 1;
    a.places[row] = place + 1;
}

}  // namespace

void advance_rows(const AdvanceRowsArguments& arguments, cudaStream_t stream) {
    if (arguments.rows == 0) return;
    const dim3 grid(static_cast<unsigned>(ceil_divide(arguments.rows, kThreads)));
    launch(advance_rows_kernel, grid, dim3(kThreads), stream, arguments);
}

}  // namespace blip3o::cuda
