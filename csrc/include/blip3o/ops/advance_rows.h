// Sampled tokens become the next tokens of their sequences.
#pragma once

#include "blip3o/op.h"

namespace blip3o {

struct AdvanceRowsArguments {
    const int64_t *sampled_ids, *first_ids;
    const int32_t* page_table;
    int32_t *num_generated, *context_lens;
    int64_t *output_slots, *output_ids;
    int32_t *positions, *slot_mapping;
    int64_t* out;
    int64_t rows, max_blocks, page_size, num_output_slots;
};

struct AdvanceRows {
    static constexpr char kName[] = "advance_rows";
    static constexpr char kParameters[] =
        "sampled_ids, first_ids, page_table, page_size, num_generated, context_lens, output_slots, "
        "output_ids, positions, slot_mapping, *, out";

    static AdvanceRowsArguments check(Device device, const TensorView& sampled_ids,
                                      const TensorView& first_ids, const TensorView& page_table,
                                      int64_t page_size, const TensorView& num_generated,
                                      const TensorView& context_lens, const TensorView& output_slots,
                                      const TensorView& output_ids, const TensorView& positions,
                                      const TensorView& slot_mapping, const TensorView& out) {
        Contract contract(kName, device);
        Dim rows("B"), max_blocks("max_blocks"), num_output_slots("N");
        AdvanceRowsArguments a;
        a.sampled_ids = contract(sampled_ids, "sampled_ids").array<int64_t>({&rows});
        a.first_ids = contract(first_ids, "first_ids").array<int64_t>({&rows});
        a.page_table = contract(page_table, "page_table").array<int32_t>({&rows, &max_blocks});
        a.num_generated = contract(num_generated, "num_generated").array<int32_t>({&rows});
        a.context_lens = contract(context_lens, "context_lens").array<int32_t>({&rows});
        a.output_slots = contract(output_slots, "output_slots").array<int64_t>({&rows});
        a.output_ids = contract(output_ids, "output_ids").array<int64_t>({&num_output_slots});
        a.positions = contract(positions, "positions").array<int32_t>({&rows});
        a.slot_mapping = contract(slot_mapping, "slot_mapping").array<int32_t>({&rows});
        a.out = contract(out, "out").array<int64_t>({&rows});
        contract.require(page_size > 0, "page_size must be at least 1");
        a.rows = rows.value();
        a.max_blocks = max_blocks.value();
        a.page_size = page_size;
        a.num_output_slots = num_output_slots.value();
        return a;
    }

    static void check_values(const AdvanceRowsArguments& a) {
        for (int64_t row = 0; row < a.rows; ++row) {
            check_element(kName, "output_slots", row, a.output_slots[row], 0, a.num_output_slots - 1,
                          "the slots of output_ids");
        }
    }

    static Work work(const AdvanceRowsArguments& a) { return {a.rows, 1}; }  // rows
};

}  // namespace blip3o
