// Sampled tokens become the next tokens of their sequences: a few integers a row.
#include "blip3o/ops/advance_rows.h"

namespace blip3o::cpu::BLIP3O_ISA {

void advance_rows(const AdvanceRowsArguments& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const int64_t sampled = a.sampled_ids[row], position = a.context_lens[row];
        a.out[row] = (sampled < 0 ? 0 : sampled) + a.first_ids[row];
        const bool goes_on = position > 0 && position < a.max_blocks * a.page_size;
        a.positions[row] = goes_on ? static_cast<int32_t>(position) : 0;
        a.slot_mapping[row] = -1;
        if (!goes_on) continue;
        const int64_t page = a.page_table[row * a.max_blocks + position / a.page_size];
        a.slot_mapping[row] = static_cast<int32_t>(page * a.page_size + position % a.page_size);
        a.output_ids[a.output_slots[row]] = sampled;
        ++a.num_generated[row];
        ++a.context_lens[row];
        ++a.output_slots[row];
    }
}

}  // namespace blip3o::cpu::BLIP3O_ISA
