// Rows of a batch take their draws as the next token: a few integers each.
#include "cpu/kernels.h"

namespace blip3o::cpu::BLIP3O_ISA {

void advance_rows(const AdvanceRowsArguments& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const int64_t draw = a.draws[row], position = a.context_lens[row];
        a.out[row] = (draw < 0 ? 0 : draw) + a.first_ids[row];
        const bool goes_on = position > 0 && position < a.max_blocks * a.page_size;
        a.positions[row] = goes_on ? static_cast<int32_t>(position) : 0;
        a.slot_mapping[row] = -1;
        if (!goes_on) continue;
        const int64_t page = a.page_table[row * a.max_blocks + position / a.page_size];
        a.slot_mapping[row] = static_cast<int32_t>(page * a.page_size + position % a.page_size);
        a.kept[a.places[row]] = draw;
        ++a.drawn[row];
        ++a.context_lens[row];
        ++a.places[row];
    }
}

}  // namespace blip3o::cpu::BLIP3O_ISA
