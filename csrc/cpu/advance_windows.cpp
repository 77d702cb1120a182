// Windows of rows move on behind the draws that are kept: a few integers a row.
#include "blip3o/ops/advance_windows.h"

namespace blip3o::cpu::BLIP3O_ISA {

void advance_windows(const AdvanceWindowsArguments& a, int64_t begin, int64_t end) {
    for (int64_t window = begin; window < end; ++window) {
        const int64_t first = a.cu_rows[window];
        if (window == a.windows || !a.moves(window)) {
            const int64_t last = window == a.windows ? a.rows : a.cu_rows[window + 1];
            for (int64_t row = first; row < last; ++row) a.stay(row);
            continue;
        }
        const int64_t kept = a.num_generated[first];
        const int64_t* ids = a.output_ids + a.output_slots[first] - kept;
        int64_t above = 0, last = 0;
        for (int64_t index = a.grid_width; index < kept; ++index) {
            above += a.repeats(ids, index, a.grid_width);
            last += a.repeats(ids, index, 1);
        }
        a.move(window, above >= last);
    }
}

}  // namespace blip3o::cpu::BLIP3O_ISA
